"""Writes quantised/model.safetensors: random weights in the quantised formats of safetensors checkpoints. `CASE.SUFFIX` are tensors as a
checkpoint of the format stores them (SUFFIX is what follows the layer's name), and `CASE.expected` are the weights, F32 of
[outputs, inputs], as the format's library makes them in F32. Every case is computed a second time from the stored bytes.

All codes are met, and a few scales are zero, negative, subnormal or the greatest. The matrices are small, to keep the file at about
400 KB.

Who makes the expected weights: compressed-tensors (FP8 too), bitsandbytes on the CPU, and for GPTQ and AWQ, whose packages are
not easily installed, the formulas of GPTQModel (`dequantize_weight`) and AutoAWQ (`dequantize_gemm`), computed in F32.
compressed-tensors 0.17.1 still knows `weight_g_idx`; 0.20 refuses `actorder: "group"`. Libraries multiply in the type of the
scales (F16, BF16): here the same scales are first widened to F32, which is exact.

    pip install torch==2.15.0 numpy==2.4.6 safetensors==0.8.0 compressed-tensors==0.17.1 bitsandbytes==0.50.2
    python3 make_quantised.py quantised/model.safetensors
"""

import json
import sys

import bitsandbytes.functional as bnb
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file

# Bits of scales: zeros, the least subnormal numbers, a negative one; for F16 the greatest too (no product overflows F32).
SPECIAL = {
    torch.float16: np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xBC00], np.uint16),
    torch.bfloat16: np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0xBF80], np.uint16),
    torch.float32: np.array([0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0xBF800000], np.uint32),
}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
# Rows and columns of weights that share a scale in FP8 by blocks.
BLOCK = [128, 128]

rng = np.random.default_rng(23)
stored = {}


def scales(shape, dtype, special=True):
    """Positive scales of ordinary size, of which a few are special ones."""
    made = torch.from_numpy(rng.uniform(0.001, 0.1, shape).astype(np.float32)).to(dtype)
    if special:
        bits = torch.from_numpy(SPECIAL[dtype].copy()).view(dtype)
        made.view(-1)[rng.permutation(made.numel())[: len(bits)]] = bits
    return made


def codes(shape, count):
    """Random codes of which each is met."""
    size = int(np.prod(shape))
    assert size >= count
    return rng.permutation(np.arange(size) % count).reshape(shape)


def add(case, tensors, expected, again):
    """Takes a case over, if the second computation gives the same bits (any NaN is as good as another)."""
    expected = expected.contiguous()
    assert expected.dtype == torch.float32 and again.dtype == np.float32 and expected.shape == again.shape, case
    first = expected.numpy()
    assert np.array_equal(np.isnan(first), np.isnan(again)), case
    valid = ~np.isnan(first)
    assert np.array_equal(first[valid].view(np.uint32), again[valid].view(np.uint32)), case
    assert np.isfinite(first[valid]).all(), case
    for name, tensor in {**tensors, "expected": expected}.items():
        stored[f"{case}.{name}"] = tensor.contiguous()


def nibbles(tensor):
    """The 4-bit values of a tensor of I32 or U8 in the order in which they lie in the file, low ones of a byte first."""
    data = tensor.contiguous().numpy().view(np.uint8)
    return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1)


def product(numbers, factors):
    """numbers * factors, rounded once to F32: the F64 product of such numbers is exact."""
    return (np.asarray(numbers, np.float64) * factors.double().numpy()).astype(np.float32)


def fp8(case, shape, strategy, scale, name="weight_scale"):
    """weight F8_E4M3 [N, K]: value of the code, in F32, times scale."""
    bits = codes(shape, 256).astype(np.uint8)
    weight = torch.from_numpy(bits).view(torch.float8_e4m3fn)
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, block_structure=BLOCK if strategy == "block" else None)
    expected = dequantize(weight, scale.float(), args=args)

    exponent, fraction = bits.astype(np.int64) >> 3 & 15, bits & 7
    value = np.where(exponent == 0, fraction * 2.0**-9, (8.0 + fraction) * 2.0 ** (exponent - 10))
    value = np.where(bits & 127 == 127, np.nan, value) * np.where(bits & 128, -1.0, 1.0)
    every = scale
    if strategy == "block":
        every = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[: shape[0], : shape[1]]
    add(case, {"weight": weight, name: scale}, expected, product(value, every))


def compressed(case, shape, group, symmetric, order=None):
    """compressed-tensors, pack-quantized: (code - zero) * scale, where zero is 8 if none is stored. A word has eight codes of a
    row, the first in the lowest bits; a word of zero points has those of eight rows."""
    groups = shape[1] // group
    strategy = {"strategy": "channel"} if groups == 1 else {"strategy": "group", "group_size": group}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, **strategy)
    )
    quantised = codes(shape, 16).astype(np.int8) - 8
    tensors = {
        "weight_packed": pack_to_int32(torch.from_numpy(quantised), 4),
        "weight_scale": scales((shape[0], groups), torch.bfloat16),
        "weight_shape": torch.tensor(shape),
    }
    if not symmetric:
        zero = codes((shape[0], groups), 16).astype(np.int8) - 8
        tensors["weight_zero_point"] = pack_to_int32(torch.from_numpy(zero), 4, packed_dim=0)
    if order is not None:
        tensors["weight_g_idx"] = torch.from_numpy(order)
    wide = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    expected = PackedQuantizationCompressor.decompress(wide, scheme)["weight"]

    of = np.arange(shape[1]) // group if order is None else order
    number = nibbles(tensors["weight_packed"]).astype(np.int64) - 8
    if not symmetric:
        number -= nibbles(tensors["weight_zero_point"].T).T.astype(np.int64)[:, of] - 8
    add(case, tensors, expected, product(number, tensors["weight_scale"][:, of]))


def pack(values, order=range(8)):
    """I32 of eight 4-bit values along the last dimension: at place i, from the lowest, lies value order[i]."""
    eights = values.reshape(*values.shape[:-1], -1, 8)[..., list(order)].astype(np.uint32)
    return torch.from_numpy(np.bitwise_or.reduce(eights << np.arange(0, 32, 4, dtype=np.uint32), -1).view(np.int32))


def unpack(words):
    """The formulas' way: each word shifted by each of eight amounts."""
    shifted = torch.bitwise_right_shift(words.unsqueeze(-1), torch.arange(0, 32, 4, dtype=torch.int32))
    return torch.bitwise_and(shifted, 15).reshape(*words.shape[:-1], -1)


def gptq(case, shape, group, zeros=8, order=None, less=1):
    """GPTQ: scales[g] * (code - zero[g]) with g = g_idx[k]. qweight has eight codes of a column (of inputs) to a word, qzeros
    eight outputs to a word. `less` is what the format subtracts from zeros: 1, or 0 in gptq_v2. A stored 15 then means a zero of
    16, as for exllama; some other readers keep only four bits of the sum, and take 0."""
    outputs, inputs = shape
    groups = inputs // group
    if zeros is None:
        zeros = codes((groups, outputs), 16) + less
    zeros = np.broadcast_to(zeros, (groups, outputs))
    code = codes((inputs, outputs), 16)
    of = np.arange(inputs) // group if order is None else order
    tensors = {
        "qweight": pack(np.ascontiguousarray(code.T)).T.contiguous(),
        "qzeros": pack(zeros - less),
        "scales": scales((groups, outputs), torch.float16),
        "g_idx": torch.from_numpy(of.astype(np.int32)),
    }
    which = tensors["g_idx"].long()
    integer = unpack(tensors["qweight"].T).T - (unpack(tensors["qzeros"]) + less)[which]
    expected = (tensors["scales"].float()[which] * integer).T

    # By output, from the bytes: word (k // 8, n) has code (k, n), word (g, n // 8) has zero (g, n).
    word = tensors["qweight"].numpy().view(np.uint32)
    number = (word.repeat(8, 0) >> (4 * (np.arange(inputs) % 8))[:, None].astype(np.uint32) & 15).astype(np.int64)
    assert np.array_equal(number, code)
    number -= nibbles(tensors["qzeros"])[of].astype(np.int64) + less
    add(case, tensors, expected, product(number, tensors["scales"][of]).T)


def awq(case, shape, group):
    """AWQ, GEMM: (code - zero[g]) * scales[g] with g = k // group. Words have eight outputs: 0, 2, 4, 6, 1, 3, 5, 7 from the
    lowest bits."""
    outputs, inputs = shape
    groups = inputs // group
    code, zeros = codes((inputs, outputs), 16), codes((groups, outputs), 16)
    tensors = {
        "qweight": pack(code, AWQ_ORDER),
        "qzeros": pack(zeros, AWQ_ORDER),
        "scales": scales((groups, outputs), torch.float16),
    }
    # AutoAWQ's AWQ_REVERSE_ORDER, by output.
    back = (torch.arange(outputs).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]]).reshape(-1)
    code_again, zeros_again = unpack(tensors["qweight"])[:, back], unpack(tensors["qzeros"])[:, back]
    every = [tensor.repeat_interleave(group, dim=0) for tensor in (zeros_again, tensors["scales"].float())]
    expected = ((code_again - every[0]) * every[1]).T

    # Output n of a word lies at n // 2 if it is even, at 4 + n // 2 if it is odd.
    place = np.arange(outputs)
    place = place // 8 * 8 + place % 8 // 2 + 4 * (place % 2)
    of = np.arange(inputs) // group
    number = nibbles(tensors["qweight"])[:, place].astype(np.int64)
    assert np.array_equal(number, code)
    number -= nibbles(tensors["qzeros"])[:, place].astype(np.int64)[of]
    add(case, tensors, expected, product(number, tensors["scales"][of]).T)


def nf4(case, shape, double):
    """bitsandbytes, NF4: quant_map[code] * absmax of the 64 weights' block, the first of two codes in a byte's high bits. With
    double quantisation absmax = nested_quant_map[absmax code] * nested_absmax of 256 blocks + nested_offset."""
    weights = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).bfloat16()
    weight, state = bnb.quantize_4bit(weights, blocksize=64, compress_statistics=double, quant_type="nf4")
    if double:
        state.absmax = torch.from_numpy(codes(state.absmax.shape, 256).astype(np.uint8))
    else:
        special = torch.from_numpy(SPECIAL[torch.float32].copy()).view(torch.float32)
        state.absmax[torch.from_numpy(rng.permutation(state.absmax.numel())[: len(special)])] = special
    tensors = {"weight": weight, **{f"weight.{name}": part.clone() for name, part in state.as_dict(packed=True).items()}}
    # Published models say bfloat16 here: the type that the library rounds to, after it has multiplied in F32.
    assert state.dtype == torch.bfloat16
    rounded = bnb.dequantize_4bit(weight, state)
    state.dtype = torch.float32
    expected = bnb.dequantize_4bit(weight, state)
    assert torch.equal(rounded, expected.bfloat16()), case

    said = json.loads(tensors["weight.quant_state.bitsandbytes__nf4"].numpy().tobytes())
    assert (said["blocksize"], said["dtype"], tuple(said["shape"])) == (64, "bfloat16", shape), said
    absmax = tensors["weight.absmax"]
    if double:
        assert said["nested_blocksize"] == 256 and len(tensors["weight.nested_absmax"]) == 2, said
        nested = tensors["weight.nested_absmax"].repeat_interleave(256)[: len(absmax)]
        absmax = product(tensors["weight.nested_quant_map"].numpy()[absmax.numpy()], nested) + np.float32(said["nested_offset"])
        absmax = torch.from_numpy(absmax)
    code = nibbles(weight).reshape(-1, 2)[:, ::-1].reshape(-1)
    assert len(np.unique(code)) == 16, case
    value = tensors["weight.quant_map"].numpy()[code]
    add(case, tensors, expected, product(value, absmax.repeat_interleave(64)).reshape(shape))


fp8("fp8_tensor", (16, 48), "tensor", scales((), torch.float32, special=False))
fp8("fp8_tensor1", (16, 48), "tensor", scales((1,), torch.bfloat16, special=False))
fp8("fp8_row", (16, 48), "channel", scales((16, 1), torch.float32))
fp8("fp8_row_bf16", (16, 48), "channel", scales((16, 1), torch.bfloat16))
# The last blocks have 8 rows, and 16 columns. Two shapes, so that rows and columns of blocks cannot be mistaken for each other.
fp8("fp8_block", (136, 144), "block", scales((2, 2), torch.float32, special=False), "weight_scale_inv")
fp8("fp8_block_tall", (136, 16), "block", scales((2, 1), torch.float32, special=False), "weight_scale_inv")

compressed("ct_channel", (16, 128), 128, symmetric=True)
compressed("ct_group", (16, 256), 128, symmetric=True)
compressed("ct_asym", (16, 128), 32, symmetric=False)
compressed("ct_act", (16, 128), 32, symmetric=True, order=rng.permutation(np.arange(128, dtype=np.int32) // 32))

gptq("gptq", (32, 256), 128)
gptq("gptq_asym", (32, 64), 32, zeros=None)
gptq("gptq_act", (32, 128), 32, order=rng.permutation(np.arange(128) // 32))
gptq("gptq_v2", (32, 64), 32, zeros=None, less=0)
gptq("gptq_channel", (32, 64), 64)

awq("awq", (32, 256), 128)
awq("awq_64", (32, 128), 64)

nf4("nf4", (16, 128), double=False)
# More than 256 blocks of 64, so that there is a second nested block.
nf4("nf4_double", (66, 256), double=True)

save_file(stored, sys.argv[1])
read = load_file(sys.argv[1])
assert {name: (tensor.dtype, tensor.shape) for name, tensor in read.items()} == {
    name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()
}
