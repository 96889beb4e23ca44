"""Times what a user waits for before anything happens: `k2lite --help`, `k2lite info` of the demo checkpoint, and from
torch's import to the first CPU kernel, on a fresh machine (an empty folder for compiled kernels) and later.

Prints what the fresh start says, minimum, median and maximum over several runs; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FIRST_KERNEL = """
import torch, time
began = time.perf_counter()
from k2lite.backends.cpu.backend import CpuBackend
CpuBackend().rms_norm(torch.ones(1, 64), torch.ones(64), 1e-6)
print(time.perf_counter() - began)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        _run(["demo", model])
        cases = {"help": ["--help"], "info": ["info", model]}
        seconds = {name: sorted(_run(arguments) for _ in range(runs)) for name, arguments in cases.items()}
        kernels = str(Path(folder) / "kernels")
        seconds["fresh"] = [_first_kernel(kernels)]
        seconds["kernel"] = sorted(_first_kernel(kernels) for _ in range(runs))
    for name, times in seconds.items():
        print(f"{name:<6} min {times[0]:.3f} s, median {statistics.median(times):.3f} s, max {times[-1]:.3f} s")
    print(json.dumps({name: {"median_s": round(statistics.median(times), 4)} for name, times in seconds.items()}))
    return 0


def _run(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "k2lite", *arguments], cwd=REPO, check=True, capture_output=True)
    return time.perf_counter() - began


def _first_kernel(cache: str) -> float:
    """What it says goes to stderr."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", FIRST_KERNEL]
    return float(subprocess.run(command, cwd=REPO, env=environment, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    sys.exit(main())
