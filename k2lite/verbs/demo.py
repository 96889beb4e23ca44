"""Write the demo checkpoint to a new folder.

A small Kimi-K2 with random weights in K2-Instruct's own file format: everything runs on it, its text is noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write it; must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")


def execute(args: argparse.Namespace) -> int:
    from k2lite.demo_checkpoint import write_demo

    write_demo(args.folder, seed=args.seed)
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    print(f"k2lite demo: wrote {args.folder} ({size / 2**20:.1f} MiB, random weights)", file=sys.stderr)
    return 0
