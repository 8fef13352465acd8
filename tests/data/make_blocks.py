"""Writes blocks.gguf: for each type of quantised blocks that is read, random blocks (`blocks.TYPE`) and the F32 that the Python package
`gguf` makes of them (`weights.TYPE`). Every byte of a block is random, so that all codes and scales are met; some blocks have special
scales.

    pip install gguf numpy
    python3 make_blocks.py blocks.gguf
"""

import sys

import gguf
import numpy as np

TYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()
# Where the F16 of a block lie.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2],
    "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}
# Zeros, the least and the greatest numbers, subnormal ones, infinities, NaN.
SPECIAL = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00]

rng = np.random.default_rng(22)
writer = gguf.GGUFWriter(sys.argv[1], "blocks")
for name in TYPES:
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rows, row = 10, 512 // elements
    blocks = rng.integers(0, 256, (rows, row, size), np.uint8)
    flat = blocks.reshape(-1, size)
    for at in HALVES[name]:
        # Finite, of ordinary size; the first have special ones.
        scales = rng.standard_normal(len(flat)).astype(np.float16)
        special = rng.permutation(SPECIAL)
        scales[: len(special)] = np.array(special, np.uint16).view(np.float16)
        flat[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        flat[: 6, 0] = [0, 1, 2, 127, 254, 255]
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(blocks.reshape(rows, -1), kind)
    assert weights.shape == (rows, 512) and weights.dtype == np.float32
    writer.add_tensor(f"blocks.{name}", blocks.reshape(rows, -1), raw_dtype=kind)
    writer.add_tensor(f"weights.{name}", weights)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
