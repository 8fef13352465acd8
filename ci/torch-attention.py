#!/usr/bin/env python3
"""What PyTorch's FLASH_ATTENTION backend takes for the attention that bench_kernels times: one JSON object on the last line.

    ci/torch-attention.py [--quick]

One sequence of T tokens, 28 query heads, 4 key and value heads of 128, BF16, causal. The backend knows no grouped heads
in some versions: the keys' and values' heads are then repeated, outside what is timed, which costs it little at these
lengths (it reads each of them once a tile of queries either way). The inputs go round in 512 MiB, as in bench_kernels.
Exit status 77: there is no PyTorch.
"""
import json
import statistics
import sys

try:
    import torch
except ImportError:
    print("there is no PyTorch")
    sys.exit(77)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, GROUPS, SIZE = 28, 4, 128
ROUNDS = 3 if "--quick" in sys.argv[1:] else 9


def seconds(tokens: int) -> float:
    """The median of rounds that last some tenths of a second, by events."""
    def make(heads):
        return torch.randn(1, heads, tokens, SIZE, device="cuda", dtype=torch.bfloat16)
    copies = max(1, (512 << 20) // (2 * (HEADS + 2 * GROUPS) * tokens * SIZE))
    sets = [(make(HEADS), make(GROUPS), make(GROUPS)) for _ in range(min(copies, 32))]
    options = {"is_causal": True, "enable_gqa": True}
    try:
        scaled_dot_product_attention(*sets[0], **options)
    except (RuntimeError, TypeError):
        options = {"is_causal": True}
        sets = [(q, k.repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)) for q, k, v in sets]
    calls, times = 1, []
    while True:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for call in range(calls):
            scaled_dot_product_attention(*sets[call % len(sets)], **options)
        end.record()
        end.synchronize()
        taken = begin.elapsed_time(end) / 1e3
        if taken < 0.1:
            calls *= 2
            continue
        times.append(taken / calls)
        if len(times) == ROUNDS:
            return statistics.median(times)


figures = {}
with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    for tokens in (1 << 10, 4 << 10, 8 << 10):
        taken = seconds(tokens)
        operations = 4 * SIZE * HEADS * (tokens * (tokens + 1) // 2)
        figures[f"prefill_{tokens}_tflop_s"] = operations / taken / 1e12
        print(f"prefill, {tokens} tokens: {taken * 1e6:.1f} µs, {operations / taken / 1e12:.1f} TFLOP/s", flush=True)
print(json.dumps({"torch": torch.__version__, "device": torch.cuda.get_device_name(), **figures}))
