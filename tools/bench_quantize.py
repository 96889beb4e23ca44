"""Times `k2lite quantize` of a folder against plain reading and writing of the same bytes, and shows its peak memory.

`python tools/bench_quantize.py SRC [--torch] [OPTIONS OF QUANTIZE]`, SRC at true width from tools/make_slice.py. The
plain pass reads SRC's shards and writes as many bytes as the result has, 16 MiB after 16 MiB with direct I/O, synced at
the end; the order is quantize, plain, quantize, plain, and the page cache is asked to forget SRC before each.
--torch times the amax rule written in a few lines of torch on one expert matrix of the same width instead of a folder.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PIECE = 16 << 20
PAGE = mmap.PAGESIZE


def forget(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def plain_pass(source: Path, target: Path, nbytes: int) -> float:
    """Seconds to read all of `source` and to write `nbytes`, spread evenly over the reads."""
    files = sorted(source.glob("*.safetensors"))
    share = nbytes / sum(path.stat().st_size for path in files)
    buffer = mmap.mmap(-1, PIECE)
    buffer.write(os.urandom(PIECE))
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    read = written = 0
    began = time.monotonic()
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        while count := os.preadv(fd, [buffer], read_at := os.lseek(fd, 0, os.SEEK_CUR)):
            os.lseek(fd, read_at + count, os.SEEK_SET)
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


def quantize(source: Path, target: Path, options: list[str]) -> tuple[float, int]:
    """Seconds of the whole process and the most memory it held, in bytes."""
    forget(source)
    began = time.monotonic()
    code = (
        "import sys, re; from k2lite.cli import main; code = main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "quantize", str(source), str(target), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    found = re.search(r"(\d+)\s*$", result.stdout)
    return time.monotonic() - began, int(found[1]) * 1024 if found else 0


def warm(source: Path, options: list[str]) -> None:
    """Have the kernels compiled and kept: a run on a few megabytes would compile the same ones."""
    from tests.quant.quantizing import write_source

    small = source.with_name(f"{source.name}-warm")
    shutil.rmtree(small, ignore_errors=True)
    write_source(small / "source", "fp8" if "float8" in _dtypes(source) else "bf16")
    quantize(small / "source", small / "made", options)
    shutil.rmtree(small)


def _dtypes(source: Path) -> str:
    path = next(source.glob("*.safetensors"))
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return "float8" if any(entry.get("dtype") == "F8_E4M3" for entry in header.values()) else ""


def torch_seconds_a_weight() -> float:
    """FP8 to INT4 with groups of 32 by the amax rule, in plain torch on all cores, on a matrix of K2's experts."""
    import torch

    rows, columns = 2048, 7168
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(rows // 128, columns // 128)
    best = float("inf")
    for _ in range(3):
        began = time.monotonic()
        weight = codes.to(torch.float32) * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        groups = weight.view(rows, -1, 32)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16).to(torch.float32)
        stored = ((groups / scale).round().clamp(-7, 7) + 8).to(torch.uint8).view(rows, columns)
        (stored[:, 0::2] | stored[:, 1::2] << 4).contiguous().view(torch.int32)
        best = min(best, time.monotonic() - began)
    return best / (rows * columns)


def main() -> int:
    if sys.argv[1] == "--torch":
        per_weight = torch_seconds_a_weight()
        print(f"torch, amax rule, one expert matrix in memory: {per_weight * 1e9:.2f} ns a weight")
        return 0
    source, options = Path(sys.argv[1]), sys.argv[2:]
    target = source.with_name(f"{source.name}-quantized")
    spare = target.with_suffix(".plain")
    shutil.rmtree(target, ignore_errors=True)
    warm(source, options)
    runs, plain = [], []
    read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    for _ in range(2):
        runs.append(quantize(source, target, options))
        written = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        shutil.rmtree(target)
        plain.append(plain_pass(source, spare, written))
    seconds, peak = min(run[0] for run in runs), max(run[1] for run in runs)
    print(f"source {read / 1e9:.2f} GB, result {written / 1e9:.2f} GB, {os.cpu_count()} cores; {' '.join(options)}")
    print("quantize " + " and ".join(f"{run[0]:.1f}" for run in runs) + " s, whole process; plain "
          + " and ".join(f"{one:.1f}" for one in plain) + " s")  # fmt: skip
    print(f"ratio {seconds / min(plain):.2f} of the best of each; peak memory {peak / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
