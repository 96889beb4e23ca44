"""Times `k2lite quantize` of a folder against plain reading and writing of the same bytes, and beside peers.

SRC is at true width, from tools/make_slice.py. The plain pass reads SRC's shards and writes as many bytes as the
result has, 16 MiB after 16 MiB with direct I/O, synced at the end. A plain pass and, as a process of its own, a
quantization by each rule take turns; the page cache is asked to forget SRC before each. Prints medians and extremes,
the ratio to the plain pass and the most memory held. Beside it, in memory and without any disk, the amax rule in a few
lines of torch (its best number of rows at once), and llama.cpp's own quantizer of --gguf, a Q8_0 file (k2lite export
writes one), as a time for SRC's bytes, where --python can import llama_cpp. Other options go to quantize.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

PIECE = 16 << 20
PAGE = mmap.PAGESIZE
RULES = ("amax", "mse")
BYTES_A_WEIGHT = {"fp8_e4m3_b128": 1, "bf16": 2, "f16": 2, "f32": 4}
QUANTIZE = (
    "import sys, re; from k2lite.cli import main; code = main(sys.argv[1:]); "
    "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
)
LLAMA = """
import ctypes, sys, time
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True, int(sys.argv[3])
began = time.monotonic()
code = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params))
print("seconds", time.monotonic() - began)
sys.exit(code)
"""


@dataclass(frozen=True)
class Run:
    """`work_s` is without start-up and exit; seconds of the whole process otherwise."""

    seconds: float
    work_s: float
    peak_bytes: int
    weights: int


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest)
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument(
        "--rules", metavar="LIST", default=",".join(RULES), help="scale searches (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each (default: %(default)s)")
    parser.add_argument("--gguf", metavar="FILE", type=Path, help="a Q8_0 file for llama.cpp's quantizer")
    parser.add_argument("--python", metavar="FILE", default=sys.executable, help="a Python that can import llama_cpp")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args, options = parser.parse_known_args(argv)
    rules = args.rules.split(",")
    if args.runs < 1 or not set(rules) <= set(RULES):
        parser.error(f"--runs is {args.runs}, --rules {args.rules}; expected 1 or more, and some of {', '.join(RULES)}")
    with tempfile.TemporaryDirectory(prefix="bench-quantize-", dir=args.source.resolve().parent) as scratch:
        facts = compare(args.source, Path(scratch), rules, args.runs, options)
        facts["torch_s"] = torch_seconds_a_weight() * facts["weights"]
        facts["llama_s"], why = llama_seconds(facts["read_bytes"], args.gguf, Path(scratch), args.python)
    print(table(facts, why))
    if args.json:
        print(json.dumps(facts))
    return 0


def compare(source: Path, scratch: Path, rules: list[str], count: int, options: list[str]) -> dict[str, Any]:
    """Plain passes and quantizations in turn."""
    runs: dict[str, list[Run]] = {rule: [] for rule in rules}
    plain: list[float] = []
    for rule in rules:
        warm(source, scratch, [*options, "--scale-search", rule])
    read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    target, written = scratch / "made", 0
    for _ in range(count):
        for rule in rules:
            runs[rule].append(quantize(source, target, [*options, "--scale-search", rule]))
            written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
            shutil.rmtree(target)
        plain.append(plain_pass(source, scratch / "plain", written))
    pace = statistics.median(plain)
    facts: dict[str, Any] = {"read_bytes": read, "written_bytes": written, "cores": os.cpu_count(), "plain_s": plain}
    facts["weights"] = runs[rules[0]][0].weights
    for rule, those in runs.items():
        seconds = [run.seconds for run in those]
        facts[rule] = {
            "seconds": seconds,
            "work_s": [run.work_s for run in those],
            "ratio": statistics.median(seconds) / pace,
            "work_ratio": statistics.median(run.work_s for run in those) / pace,
            "peak_bytes": max(run.peak_bytes for run in those),
        }
    return facts


def forget(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def plain_pass(source: Path, target: Path, nbytes: int) -> float:
    """Seconds to read all of `source` and to write `nbytes`, spread evenly over the reads."""
    forget(source)
    files = sorted(source.glob("*.safetensors"))
    share = nbytes / sum(path.stat().st_size for path in files)
    buffer = mmap.mmap(-1, PIECE)
    buffer.write(os.urandom(PIECE))
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    read = written = 0
    began = time.monotonic()
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        at = 0
        while count := os.preadv(fd, [buffer], at):
            at += count
            read += count
            while read * share - written >= PIECE:
                written += os.write(out, buffer)
            if count % PAGE:
                break
        os.close(fd)
    left = -(-(nbytes - written) // PAGE) * PAGE
    os.write(out, memoryview(buffer)[:left])
    os.fsync(out)
    seconds = time.monotonic() - began
    os.close(out)
    target.unlink()
    return seconds


def quantize(source: Path, target: Path, options: list[str]) -> Run:
    forget(source)
    command = [sys.executable, "-c", QUANTIZE, "quantize", str(source), str(target), "--json", *options]
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    seconds = time.monotonic() - began
    if result.returncode:
        sys.exit(result.stderr)
    said, peak = result.stdout.strip().rsplit("\n", 1)
    facts = json.loads(said.rsplit("\n", 1)[-1])
    weights = sum(
        use["source_bytes"] // BYTES_A_WEIGHT.get(use["source"], 1)
        for use in facts["table"]
        if use["source"] != use["target"]
    )
    return Run(seconds, facts["seconds"], int(peak) * 1024, weights)


def warm(source: Path, scratch: Path, options: list[str]) -> None:
    """Have the kernels compiled and kept: a run on a few megabytes compiles the same ones."""
    from tests.quant.quantizing import write_source

    write_source(scratch / "small", "fp8" if _is_fp8(source) else "bf16")
    quantize(scratch / "small", scratch / "made", options)
    shutil.rmtree(scratch / "small")
    shutil.rmtree(scratch / "made")


def _is_fp8(source: Path) -> bool:
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if any(entry.get("dtype") == "F8_E4M3" for entry in header.values()):
            return True
    return False


def torch_seconds_a_weight() -> float:
    """FP8 to INT4 with groups of 32 by the amax rule, in plain torch on all cores, on a matrix of K2's experts: as many
    rows at once as is best."""
    import torch

    rows, columns = 2048, 7168
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(rows // 128, columns // 128)
    torch.set_num_threads(os.cpu_count() or 1)

    def convert(first: int, last: int) -> torch.Tensor:
        block = scales[first // 128 : last // 128]
        weight = codes[first:last].to(torch.float32) * block.repeat_interleave(128, 0).repeat_interleave(128, 1)
        groups = weight.view(last - first, -1, 32)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16).to(torch.float32)
        stored = ((groups / scale).round_().clamp_(-7, 7) + 8).to(torch.uint8).view(last - first, columns)
        return (stored[:, 0::2] | stored[:, 1::2] << 4).contiguous().view(torch.int32)

    best = float("inf")
    for step in (128, 512, rows):
        for _ in range(3):
            began = time.monotonic()
            for first in range(0, rows, step):
                convert(first, first + step)
            best = min(best, time.monotonic() - began)
    return best / (rows * columns)


def llama_seconds(nbytes: int, gguf: Path | None, scratch: Path, python: str) -> tuple[float | None, str]:
    """Of llama.cpp's quantizer from Q8_0 to Q4_0 with its reading and writing, as if the file had `nbytes`; None and
    why not."""
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        return None, f"not installed: {python} can't import llama_cpp"
    if gguf is None:
        return None, "no --gguf named"
    command = [python, "-c", LLAMA, str(gguf), str(scratch / "q4_0.gguf"), str(os.cpu_count())]
    result = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"seconds ([\d.]+)", result.stdout)
    if result.returncode or found is None:
        sys.exit(f"llama.cpp's quantizer failed: {result.stderr[-2000:]}")
    return float(found[1]) * nbytes / gguf.stat().st_size, ""


def table(facts: dict[str, Any], why: str) -> str:
    pace = statistics.median(facts["plain_s"])
    lines = [
        f"source {facts['read_bytes'] / 1e9:.2f} GB, result {facts['written_bytes'] / 1e9:.2f} GB, "
        f"{facts['cores']} cores, {facts['weights'] / 1e9:.2f} G weights converted",
        f"  {'':<28} {'median s':>8} {'min':>7} {'max':>7} {'ratio':>6} {'peak GiB':>9}",
        _line("plain 16 MiB direct I/O", facts["plain_s"], pace),
    ]
    for rule in RULES:
        if rule in facts:
            found = facts[rule]
            lines.append(_line(f"quantize, {rule}", found["seconds"], pace, f"{found['peak_bytes'] / 2**30:>9.2f}"))
            lines.append(_line("  without start-up", found["work_s"], pace))
    lines.append(_line("torch, amax, in memory", [facts["torch_s"]], pace))
    llama = facts["llama_s"]
    lines.append(
        f"  {'llama.cpp, Q8_0 to Q4_0':<28} {why}" if llama is None else _line("llama.cpp, Q8_0 to Q4_0", [llama], pace)
    )
    return "\n".join(lines)


def _line(what: str, seconds: list[float], pace: float, end: str = "") -> str:
    median = statistics.median(seconds)
    return f"  {what:<28} {median:>8.1f} {min(seconds):>7.1f} {max(seconds):>7.1f} {median / pace:>6.2f} {end}"


if __name__ == "__main__":
    sys.exit(main())
