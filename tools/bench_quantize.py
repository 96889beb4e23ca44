"""Times `k2lite quantize` of a folder against plain reading and writing of the same bytes, and shows its peak memory.

`python tools/bench_quantize.py SRC [OPTIONS OF QUANTIZE]`, SRC at true width from tools/make_slice.py. The plain pass
reads SRC's shards and writes as many bytes as the result has, in pieces of 16 MiB through the page cache, synced at the
end; the order is quantize, plain, quantize, plain, and the page cache is asked to forget SRC before each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

PIECE = 16 << 20


def forget(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def plain_pass(source: Path, target: Path, nbytes: int) -> float:
    """Seconds to read all of `source` and to write `nbytes`."""
    forget(source)
    began = time.monotonic()
    left = nbytes
    with target.open("wb", buffering=0) as out:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while data := file.read(PIECE):
                    out.write(data[:left])
                    left -= min(left, len(data))
        os.fsync(out.fileno())
    seconds = time.monotonic() - began
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


def main() -> int:
    source = Path(sys.argv[1])
    target = source.with_name(f"{source.name}-quantized")
    shutil.rmtree(target, ignore_errors=True)
    seconds, peak = quantize(source, target, sys.argv[2:])
    read, written = (sum(path.stat().st_size for path in at.glob("*.safetensors")) for at in (source, target))
    shutil.rmtree(target)
    plain = [plain_pass(source, target.with_suffix(".plain"), written)]
    again, _ = quantize(source, target, sys.argv[2:])
    shutil.rmtree(target)
    plain.append(plain_pass(source, target.with_suffix(".plain"), written))
    print(f"source {read / 1e9:.2f} GB, result {written / 1e9:.2f} GB, {os.cpu_count()} cores")
    print(f"quantize {seconds:.1f} and {again:.1f} s, plain {plain[0]:.1f} and {plain[1]:.1f} s")
    print(f"ratio {min(seconds, again) / min(plain):.2f} of the best of each; peak memory {peak / 2**30:.2f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
