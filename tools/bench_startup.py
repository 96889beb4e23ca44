"""Times what a user waits for before anything happens: `k2lite --help`, and `k2lite info` of the demo checkpoint.

Prints minimum, median and maximum over several runs; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        _run(["demo", model])
        cases = {"help": ["--help"], "info": ["info", model]}
        seconds = {name: sorted(_run(arguments) for _ in range(runs)) for name, arguments in cases.items()}
    for name, times in seconds.items():
        print(f"k2lite {name:<6} min {times[0]:.3f} s, median {statistics.median(times):.3f} s, max {times[-1]:.3f} s")
    print(json.dumps({name: {"median_s": round(statistics.median(times), 4)} for name, times in seconds.items()}))
    return 0


def _run(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "k2lite", *arguments], cwd=REPO, check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
