"""Copy the demo checkpoint to a new folder.

It is a small Kimi-K2 that was really trained, in K2-Instruct's own file format; `run` and `chat` without a MODEL use it
where it lies. With --random the folder is smaller still and its weights are random: everything runs on it, its text is
noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from k2lite.quant.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write it; must not exist or be empty")
    parser.add_argument("--random", action="store_true", help="random weights instead of the trained ones")
    parser.add_argument("--seed", type=int, metavar="N", help="of the random weights (default: 0)")


def execute(args: argparse.Namespace) -> int:
    from k2lite.demo_folder import copy_demo

    if args.random:
        from k2lite.demo_checkpoint import write_random_demo

        write_random_demo(args.folder, seed=args.seed or 0)
    elif args.seed is not None:
        raise RequestError("--seed is for --random; the trained checkpoint is what it is")
    else:
        copy_demo(args.folder)
    size = sum(path.stat().st_size for path in args.folder.iterdir())
    kind = "random" if args.random else "trained"
    print(f"k2lite demo: wrote {args.folder} ({size / 2**20:.1f} MiB, {kind} weights)", file=sys.stderr)
    return 0
