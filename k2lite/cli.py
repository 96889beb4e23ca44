"""The command line: finds the verb, hands over, and turns a user's mistake into one line and exit code 2.

Imports no torch: `k2lite --help` must answer at once. A verb's module says its arguments and imports the rest when
it runs. stdout is the answer, stderr everything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from k2lite import __version__

from .quant.errors import K2LiteError
from .verbs import chat, demo, info, run

VERBS = (info, run, chat, demo)
USER_ERROR = 2
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="k2lite", description="Run Kimi-K2 on one workstation.")
    parser.add_argument("--version", action="version", version=f"k2lite {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for module in VERBS:
        name = module.__name__.rpartition(".")[2]
        summary = (module.__doc__ or "").partition("\n")[0].rstrip(".")
        verb = verbs.add_parser(name, help=summary, description=summary + ".")
        module.add_arguments(verb)
        verb.set_defaults(execute=module.execute)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.execute(args))
    except K2LiteError as error:
        print(f"k2lite {args.verb}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our stdout has gone; keep Python from complaining again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
