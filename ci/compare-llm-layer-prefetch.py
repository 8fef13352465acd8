#!/usr/bin/env python3
"""Warm passes of the Python package that this crate succeeds beside this crate's own, on the CPU, turn by turn:
`cargo xtask compare-llm-layer-prefetch FOLDER` makes the environment with PyTorch and the package, and calls this with
BENCH_STREAM FOLDER ROUNDS.

The package's CUDA calls are replaced by nothing, which flatters it: what is left is reading, copying and handing over. This crate
streams with its layers resident in pinned memory, from which it copies every one of them; and then with them on the device, which
on the CPU is RAM as well, so that nothing moves. That is what it does by itself where they fit.
"""
import glob, importlib.util, json, math, os, statistics, struct, subprocess, sys, sysconfig, time
import torch

class Nothing:
    """An event, a stream, or a block of work on one: all done at once."""
    def __init__(self, *_): pass
    def record(self, *_): pass
    synchronize = wait_event = wait_stream = __enter__ = __exit__ = record

torch.cuda.Event = torch.cuda.Stream = torch.cuda.stream = Nothing
torch.cuda.synchronize = lambda *_: None
torch.cuda.default_stream = torch.cuda.current_stream = Nothing
torch.Tensor.pin_memory = lambda tensor: tensor
empty = torch.empty
torch.empty = lambda *shape, device=None, **options: empty(*shape, **options)

program, model, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(f"{model}/config.json") as file:
    layers = json.load(file)["num_hidden_layers"]
path = sysconfig.get_paths()["purelib"] + "/layer_streamer/layer_streamer.py"
spec = importlib.util.spec_from_file_location("llm_layer_prefetch", path)
package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)

tensors, starts = {}, {}
for shard in sorted(glob.glob(model + "/*.safetensors")):
    name = os.path.basename(shard)
    with open(shard, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    starts[name] = 8 + length
    tensors |= {k: (name, v["data_offsets"][0], v["shape"]) for k, v in header.items() if k != "__metadata__"}
prefix = "model.layers.0."
keys = [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]
sizes = {key: math.prod(tensors[prefix + key][2]) for key in keys}
total = 2 * sum(sizes.values()) * layers
settings = {"2/4/4, batches 1, 1, 2": (2, 4, 4, 1, 1, 2), "2/4/4": (2, 4, 4, None, None, None), "2/4/0": (2, 4, None, None, None, None),
            "2/0/4": (2, None, 4, None, None, None), "1/0/0": (1, None, None, None, None, None)}
theirs, ours, still = {name: [] for name in settings}, [], []
for turn in range(rounds):
    for name, values in settings.items():
        streamer = package.LayerStreamer(model, tensors, starts, keys, sizes, torch.bfloat16, layers, *values, track_progress=False)
        for warm in (False, True, True):
            start = time.perf_counter()
            streamer.run_pass(None, lambda x, weights, layer: x)
            if warm:
                theirs[name].append(total / (time.perf_counter() - start) / 1e9)
        del streamer
    bench = [program, "--device", "cpu", "--model", model, "--json"]
    def run(*options):
        return json.loads(subprocess.run([*bench, *options], check=True, capture_output=True, text=True).stdout)
    ours.append(run("--tier", f"0-{layers - 1}=pinned", "--passes", "12")["measured"]["median"])
    still.append(run("--keep", "100")["pass_seconds"]["median"])
    print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
print(f"{'warm passes, n_gpu/n_cpu_pinned/n_cpu':40} median GB/s")
for name, rates in theirs.items():
    print(f"{'llm-layer-prefetch ' + name:40} {statistics.median(rates):.2f}")
best = max(statistics.median(rates) for rates in theirs.values())
print(f"{'layer-streamer, resident in pinned RAM':40} {statistics.median(ours):.2f}  ({statistics.median(ours) / best:.1f} x the best above)")
print(f"{'layer-streamer, on the device':40} nothing moves: {1e6 * statistics.median(still):.0f} µs a pass, theirs {total / best / 1e6:.0f} ms")
