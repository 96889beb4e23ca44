"""Record what a model does on a text: the second moments of each matrix's inputs.

The text is read in windows, each from an empty context; control tokens in it count as such, so that it can be rendered
dialogues. The moments are for quantize --importance. Slower than an ordinary run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .eval import DEFAULT_WINDOW, read_text
from .model_options import add_model_arguments, load_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument(
        "--moments", type=Path, metavar="FILE", help="write the mean square of each input of each matrix"
    )


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Which text is read, and how."""
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to read; - is stdin")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read N tokens of the text (default: all)")
    parser.add_argument(
        "--window", type=int, default=DEFAULT_WINDOW, metavar="N", help="tokens in a window (default: %(default)s)"
    )


def execute(args: argparse.Namespace) -> int:
    from k2lite.demo_folder import DEMO_FOLDER
    from k2lite.loading import open_model
    from k2lite.moment_recorder import MomentRecorder
    from k2lite.quant.errors import RequestError
    from k2lite.reading import read_windows

    if args.moments is None:
        raise RequestError("nothing to record; name a file with --moments")
    if not args.moments.absolute().parent.is_dir():
        raise RequestError(f"{args.moments}: there is no such folder")
    text = read_text(args.text)
    args.context = args.window if args.context is None else args.context
    recorder = MomentRecorder()
    engine = load_engine(args, recorder)
    tokens = read_windows(engine, text, args.window, args.max_tokens)
    _, checkpoint = open_model(args.model or DEMO_FOLDER)
    recorder.write(args.moments, checkpoint.schema.matrix_widths(), model=checkpoint.fingerprint(), tokens=tokens)
    print(f"k2lite trace: wrote {args.moments}, the moments of {tokens} tokens", file=sys.stderr)
    return 0
