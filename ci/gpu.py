#!/usr/bin/env python3
"""One command on a GPU machine answers for the whole crate, without a Rust toolchain or a network there. `cargo xtask gpu-bundle DIR`
puts this, test executables, examples, programs and data into DIR.

    DIR/gpu run [OUT] [--steps A,B]     runs them, prints a table, writes OUT/results.json and logs
    DIR/gpu list                        the steps

OUT is DIR/out unless given; it also takes the 15 GB checkpoint of the stream steps. `--steps` takes names or their beginnings.
Exit status 1: a step failed. A step whose tool or file is not there is `absent`, which is no failure and no success.
"""
import glob, json, os, shutil, site, subprocess, sys, time
from pathlib import Path

# What a script of ours ends with where a tool that it needs is not there.
ABSENT = 77


def steps(here: Path, out: Path):
    """(name, seconds it may take, command) in the order in which they are worth having."""
    examples, program, model, packed = here / "examples", here / "bin/layer-streamer", out / "7b", out / "7b-packed"
    speller = str(examples / "speller")
    yield "device", 60, ["nvidia-smi"]
    yield "transfer", 120, [examples / "bench_transfer", "--device", "cuda", "--json"]
    for test in sorted((here / "deps").glob("*"), key=lambda path: (not path.name.startswith("cuda"), path.name)):
        yield f"test-{test.name}", 300, [test] if test.name.endswith("_check") else [test, "--test-threads=1", "--nocapture"]
    yield "generate", 60, [program, "generate", "--device", "cuda", "--model", speller, "4096="]
    yield "nvtx", 120, [sys.executable, here / "ci/gpu-nvtx.py", program, out / "nvtx"]
    yield "kernels", 300, [examples / "bench_kernels", "--device", "cuda", "--json"]
    yield "torch-attention", 120, [sys.executable, here / "ci/torch-attention.py"]
    # The same bytes on either device; twenty passes, so that a slot that is filled too early shows.
    yield "c-host", 120, [here / "ci/same-sums", examples / "embed", examples / "embed_cuda", speller]
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        for check in sorted((here / "deps").glob("*_check")):
            yield f"{tool}-{check.name}", 400, sanitizer + [check, "--small", "--no-timing"]
        yield f"{tool}-kernels", 500, sanitizer + [examples / "bench_kernels", "--device", "cuda", "--small", "--rounds", "1", "--window", "0.01", "--json"]
        yield f"{tool}-transforms", 300, sanitizer + [here / "deps/cuda", "tensors_that_change"]
    yield "checkpoint", 400, [program, "make-checkpoint", model, "--shape", "qwen2.5-7b"]
    stream = [examples / "bench_stream", "--device", "cuda", "--model", model, "--json"]
    yield "stream-disk", 200, stream + ["--rounds", "6"]
    yield "stream-disk-passes", 200, stream + ["--passes", "3"]
    yield "stream-disk-uring", 200, stream + ["--rounds", "3", "--reader", "uring"]
    yield "stream-disk-pread", 200, stream + ["--rounds", "3", "--reader", "pread"]
    yield "stream-pinned", 200, stream + ["--rounds", "6", "--tier", "0-27=pinned"]
    yield "stream-pinned-passes", 200, stream + ["--passes", "20", "--tier", "0-27=pinned"]
    half = ",".join(f"{unit}={'gpu' if unit % 2 else 'pinned'}" for unit in range(28))
    yield "stream-half-passes", 200, stream + ["--passes", "20", "--tier", half]
    # Packed on disk, in RAM, and on the GPU: beside the same links.
    yield "pack", 200, [program, "pack", model, packed]
    stream_packed = [examples / "bench_stream", "--device", "cuda", "--model", packed, "--json"]
    yield "stream-packed-disk", 200, stream_packed + ["--rounds", "6"]
    yield "stream-packed-pinned", 200, stream_packed + ["--rounds", "6", "--tier", "0-27=pinned"]
    yield "stream-packed-gpu", 200, stream_packed + ["--passes", "20", "--tier", "0-27=gpu-packed"]
    yield "stream-packed-in-ram", 200, stream + ["--rounds", "6", "--tier", "0-27=pinned-packed"]
    # What a trace costs, pipelines in turn; and one to look at, with lanes of the device's own time.
    yield "stream-trace", 200, stream + ["--rounds", "12", "--tier", "0-27=pinned", "--sweep", "trace=0,1"]
    yield "trace", 100, [program, "generate", "--device", "cuda", "--model", model, "--prompt-ids", "1,2,3", "--print-ids",
                         "--max-new-tokens", "6", "--n-gpu", "2", "--n-cpu-pinned", "4", "--tier", "0-13=pinned", "--trace", out / "7b.html"]
    yield "first-token", 300, [here / "bin/xtask", "first-token", model, "--rounds", "3", "--device", "cuda", "--program", program]
    ids = ",".join(str(id) for id in range(1, 65))
    yield "generate-7b", 200, [program, "generate", "--device", "cuda", "--model", model, "--prompt-ids", ids, "--print-ids",
                               "--max-new-tokens", "8", "--n-gpu", "1"]
    yield "generate-7b-packed", 200, [program, "generate", "--device", "cuda", "--model", packed, "--prompt-ids", ids, "--print-ids",
                                      "--max-new-tokens", "8", "--n-gpu", "1"]


def libraries() -> str:
    """Where Python's packages keep cuBLAS, newest first, and what the loader was told already."""
    places = site.getsitepackages() + [site.getusersitepackages()] + [path for path in sys.path if path.endswith("-packages")]
    found = [os.path.dirname(path) for place in dict.fromkeys(places) for path in glob.glob(f"{place}/nvidia/**/libcublas.so.*", recursive=True)]
    found += [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
    return ":".join(dict.fromkeys(sorted(found, key=lambda path: "cu13" not in path)))


def run(here: Path, out: Path, chosen: list) -> int:
    out.mkdir(parents=True, exist_ok=True)
    env = os.environ | {
        "LD_LIBRARY_PATH": libraries(), "LAYER_STREAMER_ROOT": str(here), "LAYER_STREAMER_TEST_DEVICE": "cuda",
        # The tests' folders belong on the disk that is measured, not in memory.
        "TMPDIR": str(out), "RUST_BACKTRACE": "1",
    }
    env["PATH"] += ":/usr/local/cuda/bin"
    print(f"cuBLAS: {env['LD_LIBRARY_PATH'] or 'not found'}")
    results = []
    for name, seconds, command in steps(here, out):
        if chosen and not any(name.startswith(part) for part in chosen):
            continue
        command, log, start = [str(part) for part in command], out / f"{name}.log", time.monotonic()
        if not shutil.which(command[0], path=env["PATH"]) or any(part.startswith((f"{here}/bin/", f"{here}/ci/", f"{here}/deps/", f"{here}/examples/")) and not os.path.exists(part) for part in command):
            result = "absent"
            log.write_text("not there: " + next(part for part in command if not shutil.which(part, path=env["PATH"])))
        else:
            with open(log, "wb") as file:
                process = subprocess.Popen(command, cwd=here, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
                try:
                    code = process.wait(seconds)
                    result = {0: "ok", ABSENT: "absent"}.get(code, f"exit {code}")
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    result = f"more than {seconds} s"
        taken = time.monotonic() - start
        text = log.read_text(errors="replace")
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        entry = {"step": name, "result": result, "seconds": round(taken, 2), "command": command}
        try:
            entry["figures"] = json.loads(last)
        except ValueError:
            entry["tail"] = text.splitlines()[-12:]
        results.append(entry)
        # After every step, so that a machine that is taken away leaves what there was.
        (out / "results.json").write_text(json.dumps(results, indent=1))
        print(f"{name:24} {result:14} {taken:8.1f} s   {last[:110] if 'figures' not in entry else summary(entry['figures'])}", flush=True)
    bad = [entry for entry in results if entry["result"] not in ("ok", "absent")]
    for entry in bad:
        print(f"\n== {entry['step']}: {entry['result']}, {out / (entry['step'] + '.log')}")
        print("\n".join(entry.get("tail", [])))
    return 1 if bad or not results else 0


def summary(figures) -> str:
    """A line of the figures that matter most, of those that are there."""
    if not isinstance(figures, dict):
        return ""
    keys = ["measured", "limit", "ratio", "pass_seconds", "allocations", "on_device_read_and_written_gb_s"]
    median = lambda value: value.get("median") if isinstance(value, dict) else value
    found = {key: median(figures.get(key)) for key in keys}
    return ", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, (int, float)))


def main() -> int:
    arguments = sys.argv[1:]
    here, chosen = Path(__file__).resolve().parent, []
    if "--steps" in arguments:
        at = arguments.index("--steps")
        chosen = [part for part in "".join(arguments[at + 1:at + 2]).split(",") if part]
        del arguments[at:at + 2]
    match arguments:
        case ["run", *rest] if len(rest) <= 1:
            return run(here, Path(rest[0]).resolve() if rest else here / "out", chosen)
        case ["list"]:
            print("\n".join(f"{name:24} {seconds:4} s   {' '.join(map(str, command))}" for name, seconds, command in steps(here, here / "out")))
        case _:
            print(__doc__.strip(), file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
