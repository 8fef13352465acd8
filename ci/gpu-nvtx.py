#!/usr/bin/env python3
"""What NVIDIA's tools see of a run on a GPU: ci/gpu-nvtx.py PROGRAM FOLDER, where CUDA's headers and nsys are; `gpu run` calls it.

Attaches the tool of tests/nvtx/injection.c, which keeps ranges and CUDA calls, and holds each range against the calls that its
thread made within it. Then runs the same under `nsys profile -t cuda,nvtx` and looks for the names in what that wrote.
Exit status 1: something is missing; 77: there is no CUPTI, or no nsys, to find out with.
"""
import glob, os, shutil, site, subprocess, sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPELLED = " four thousand ninety-six\n"
LAYERS = 8
failures = []


def check(ok, what):
    print(("ok      " if ok else "MISSING ") + what, flush=True)
    if not ok:
        failures.append(what)


def headers(name):
    """The include folder that has the header, in the toolkit or in a Python package of it."""
    places = ["/usr/local/cuda", "/usr/local/cuda/extras/CUPTI", *glob.glob("/usr/local/cuda/targets/*"), os.environ.get("CUPTI_HOME", "")]
    places += [f"{place}/nvidia/*" for place in site.getsitepackages() + [path for path in sys.path if path.endswith("-packages")]]
    found = [path for place in places if place for path in glob.glob(f"{place}/include/{name}")]
    if not found:
        print(f"{name} is not there; CUPTI_HOME may say where")
        sys.exit(77)
    return found[0].removesuffix("/" + name)


def tool(folder):
    cupti, to = headers("cupti.h"), folder / "tool.so"
    includes = [flag for name in ("nvtx3/nvToolsExt.h", "cuda_runtime_api.h", "cupti.h") for flag in ("-isystem", headers(name))]
    libraries = [path for place in ("lib64", "lib") for path in sorted(glob.glob(f"{cupti}/../{place}/libcupti.so*"))]
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-DCUDA_CALLS", *includes, "-o", to, ROOT / "tests/nvtx/injection.c", libraries[0],
                    f"-Wl,-rpath,{Path(libraries[0]).resolve().parent}"], check=True)
    return to


def calls(path):
    """(nanoseconds, thread, kind, category, message, payload, range) of each."""
    *lines, last = path.read_text().splitlines()
    check(last == f"{len(lines)}\tcalls", f"all of {len(lines)} calls were kept")
    for line in lines:
        nanos, thread, kind, domain, category, message, payload, number = line.split("\t")
        yield int(nanos), int(thread), kind, int(category), message, int(payload) if payload else None, int(number)


def attached(generate, folder):
    out = folder / "calls"
    env = os.environ | {"NVTX_INJECTION64_PATH": str(tool(folder)), "LAYER_STREAMER_NVTX_OUT": str(out)}
    ran = subprocess.run(generate, env=env, capture_output=True, text=True)
    check(ran.returncode == 0 and ran.stdout == SPELLED, f"the run ends as without a tool ({ran.returncode}, {ran.stdout!r})")
    if ran.returncode:
        print(ran.stderr)
    open_ranges, cuda, found, streams = {}, defaultdict(list), [], []
    for nanos, thread, kind, category, message, payload, number in calls(out):
        if kind in ("push", "start"):
            open_ranges[("push", thread) if kind == "push" else number] = (nanos, thread, category, message, payload)
        elif kind in ("pop", "end"):
            begun = open_ranges.pop(("push", thread) if kind == "pop" else number)
            found.append((*begun, nanos))
        elif kind == "cuda":
            cuda[thread].append((nanos, message, payload or 0))
        elif kind == "stream":
            streams.append(message)
    check(not open_ranges, f"each of {len(found)} ranges has its end")
    check({"layer-streamer transfer", "layer-streamer compute"} <= set(streams), f"streams are named: {', '.join(sorted(streams))}")
    stages = dict(enumerate(["read", "pin", "transfer", "compute"], 1))
    counts = Counter((stages[category], message) for _, _, category, message, payload, _ in found if payload is not None)
    for stage in ("read", "transfer", "compute"):
        each = {count for (of, _), count in counts.items() if of == stage}
        check(len([0 for of, _ in counts if of == stage]) == LAYERS, f"{stage}: ranges of {LAYERS} layers, {sorted(each)} of each")
    within = lambda begin, end, thread: [call for call in cuda[thread] if begin <= call[0] <= end]
    copies = [(within(begin, end, thread), payload) for begin, thread, category, _, payload, end in found if category == 3 and payload]
    exact = sum(sum(bytes for _, name, bytes in calls if "MemcpyAsync" in name) == payload for calls, payload in copies)
    check(copies and exact == len(copies), f"{exact} of {len(copies)} transfer ranges hold cudaMemcpyAsync calls of exactly their bytes")
    computed = [within(begin, end, thread) for begin, thread, category, _, payload, end in found if category == 4 and payload]
    launches = [sum("LaunchKernel" in name for _, name, _ in calls) for calls in computed]
    check(launches and min(launches) > 0, f"{len(launches)} compute ranges hold {min(launches, default=0)} to {max(launches, default=0)} kernel launches")


def unpacked(data):
    """What a .qdstrm holds: LZ4 blocks, each behind its packed and its unpacked size, after a plain head. That format is not
    documented: whatever unpacks to exactly its size is taken for a block."""
    def varint(at):
        value = shift = 0
        while at < len(data) and shift < 35:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                break
        return value, at

    def extended(length, at, end):
        while length >= 15 and at < end:
            length, at = length + data[at], at + 1
            if data[at - 1] != 255:
                break
        return length, at

    def block(at, end, size):
        out = bytearray()
        while at < end:
            token = data[at]
            literals, at = extended(token >> 4, at + 1, end)
            out += data[at:at + literals]
            at += literals
            if at >= end:
                return out if at == end and len(out) == size else None
            offset = data[at] | data[at + 1] << 8 if at + 1 < end else 0
            if not 0 < offset <= len(out) or len(out) > size:
                return None
            length, at = extended(token & 15, at + 2, end)
            for index in range(len(out) - offset, len(out) - offset + length + 4):
                out.append(out[index])

    at = 0
    while at < len(data):
        packed, start = varint(at)
        size, start = varint(start)
        out = block(start, start + packed, size) if 8 < packed <= size < 1 << 26 and start + packed <= len(data) else None
        at = start + packed if out else at + 1
        if out:
            yield bytes(out)


def profiled(generate, folder):
    nsys = sorted(glob.glob("/opt/nvidia/nsight-compute/*/host/target-linux-x64/nsys") + glob.glob("/usr/local/cuda*/bin/nsys"))
    nsys = shutil.which("nsys") or (nsys and nsys[0])
    if not nsys:
        print("nsys is not there")
        sys.exit(1 if failures else 77)
    env = {name: value for name, value in os.environ.items() if name != "NVTX_INJECTION64_PATH"}
    # Without samples of the processors, which would be most of it.
    command = [nsys, "profile", "-t", "cuda,nvtx", "-s", "none", "--cpuctxsw", "none", "--force-overwrite", "true", "-o", folder / "run", *generate]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    print(f"nsys ended with {ran.returncode}: {' | '.join((ran.stdout + ran.stderr).strip().splitlines()[-4:])}")
    check(SPELLED.strip() in ran.stdout, "under nsys the program runs to its end")
    stream = folder / "run.qdstrm"
    if not stream.exists():
        return check(False, "nsys wrote run.qdstrm")
    blocks = list(unpacked(stream.read_bytes()))
    data = b"\n".join(blocks)
    print(f"{stream.name}: {stream.stat().st_size} bytes, {len(blocks)} blocks of {len(data)}")
    for names in (["layer-streamer"], ["read", "pin", "transfer", "compute"], [f"layer {layer}" for layer in range(LAYERS)],
                  ["starved", "blocked", "pass begins", "pass ends"], ["ls-read", "ls-transfer"],
                  ["layer-streamer transfer", "layer-streamer compute"]):
        missing = [name for name in names if name.encode() not in data]
        check(not missing, f"nsys wrote {', '.join(names)}" + (f"; not {', '.join(missing)}" if missing else ""))


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    folder = Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # All on disk, so that each stage has each layer in each pass.
    generate = [sys.argv[1], "generate", "--device", "cuda", "--model", str(ROOT / "examples/speller"), "--n-gpu", "2", "--n-cpu-pinned", "2", "4096="]
    attached(generate, folder)
    profiled(generate, folder)
    sys.exit(f"{len(failures)} missing" if failures else 0)


main()
