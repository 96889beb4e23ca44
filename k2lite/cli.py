"""The command line: finds the verb, hands over, and turns a user's mistake into one line and exit code 2.

Imports no torch: `k2lite --help` must answer at once. A verb's module says its arguments and imports the rest when
it runs. stdout is the answer, stderr everything else.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from k2lite import __version__

from .errors import one_line
from .quant.errors import K2LiteError
from .verbs import (
    backends,
    bench,
    chat,
    check,
    demo,
    eval,
    export,
    info,
    plan,
    quantize,
    replay,
    run,
    serve,
    stats,
    trace,
    verify,
)

VERBS = (
    info,
    plan,
    run,
    chat,
    serve,
    quantize,
    verify,
    check,
    export,
    eval,
    bench,
    trace,
    replay,
    stats,
    backends,
    demo,
)
USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage above it. The verbs' parsers are of the same class."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {one_line(message)} ({self.prog} --help lists what there is)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="k2lite", description="Run Kimi-K2 on one workstation.")
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
    atexit.register(gc.freeze)  # or Python would look through all that torch has made, half a second, before it ends
    _prepare_streams()
    args = build_parser().parse_args(argv)
    try:
        code = int(args.execute(args))
        sys.stdout.flush()
        return code
    except K2LiteError as error:
        print(f"k2lite {args.verb}: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()  # its reader has gone
        return 0
    except OSError as error:
        # no permission, a full disk: the user's machine, not k2lite
        _drop_stdout()
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"k2lite {args.verb}: {one_line(where + (error.strerror or str(error)))}", file=sys.stderr)
        return USER_ERROR


def _prepare_streams() -> None:
    """A character that a stream can't encode or decode is replaced, which is better than a traceback in an answer.
    A closed stream becomes an empty one: print would write to stdout what is meant for a missing stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open till the end)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _drop_stdout() -> None:
    """Keep Python from trying at exit to write what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
