"""Measure perplexity on a text, and how far model B is from model MODEL.

The text is cut into windows, each read from an empty context; the first token of a window is not scored. With B:
KL(A||B) per token over the whole vocabulary and the share of tokens where both like the same token best. Intervals
are 95 %, from a bootstrap over windows. The table, or the JSON object, goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2lite.quant.errors import RequestError

from .model_options import add_model_arguments, load_engine

if TYPE_CHECKING:
    from k2lite.evaluation import Estimate, Evaluation

DEFAULT_WINDOW = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("other", metavar="B", type=Path, nargs="?", help="a second folder, compared with the first")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text to score; - is stdin")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read N tokens of the text (default: all)")
    parser.add_argument(
        "--window", type=int, default=DEFAULT_WINDOW, metavar="N", help="tokens in a window (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    _check(args)
    text = read_text(args.text)
    from k2lite.demo_folder import DEMO_FOLDER
    from k2lite.evaluation import check_same_vocabulary, evaluate, split_windows
    from k2lite.progress import ProgressLine

    # what a window needs is all the context there is
    args.context = args.window if args.context is None else args.context
    if args.other is not None:
        args.ram = _half_of_ram(args.ram)
    a = load_engine(args)
    args.model = args.model or DEMO_FOLDER
    b = None
    if args.other is not None:
        b = load_engine(argparse.Namespace(**{**vars(args), "model": args.other}))
        check_same_vocabulary(a, b)
    windows = split_windows(a.tokenizer.encode(text)[: args.max_tokens], args.window)
    line = ProgressLine(len(windows))
    try:
        result = evaluate(a, b, windows, lambda done: line.update(done, f"window {done} of {len(windows)}"))
    finally:
        line.close()
    print(json.dumps(report(args, result), ensure_ascii=False) if args.json else as_text(args, result))
    return 0


def _half_of_ram(ram: str | None) -> int:
    """Two models share the budget: what the first has planned and not yet touched looks free to the second."""
    from k2lite.backends.host_memory import host_memory
    from k2lite.byte_sizes import parse_bytes
    from k2lite.placement import spare_bytes

    return (spare_bytes(host_memory()) if ram is None else parse_bytes(ram)) // 2


def _check(args: argparse.Namespace) -> None:
    """Refuse what can't be measured before anything loads."""
    for option, value in (("--window", args.window), ("--max-tokens", args.max_tokens)):
        if value is not None and value < 2:
            raise RequestError(f"{option} is {value}; expected 2 or more, since a window's first token is not scored")
    if args.context is not None and args.context < args.window:
        raise RequestError(f"--context is {args.context} and --window {args.window}: a window must fit in the context")


def read_text(file: str) -> str:
    """The text of a file, or of stdin for "-". Raises RequestError."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise RequestError(f"{file}: can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{file}: byte {error.start} is not UTF-8 text: {error.reason}") from error


def report(args: argparse.Namespace, result: Evaluation) -> dict[str, Any]:
    """What --json prints. KL is in nats, the agreement a share; an interval is null if there is one window only."""
    from dataclasses import asdict

    return {
        "a": str(args.model),
        "b": None if args.other is None else str(args.other),
        "text": args.text,
        "window": args.window,
        **asdict(result),
    }


def as_text(args: argparse.Namespace, result: Evaluation) -> str:
    """The table that a person reads."""
    rows: list[tuple[str, Estimate | None, str]] = [
        ("perplexity A", result.perplexity_a, "{:.4f}"),
        ("perplexity B", result.perplexity_b, "{:.4f}"),
        ("KL(A||B), nats a token", result.kl, "{:.6f}"),
        ("top-1 agreement", result.top1_agreement, "{:.2%}"),
    ]
    lines = [
        f"{args.text}: {result.scored_tokens} tokens scored in {result.windows} windows of at most {args.window}",
        f"  A {args.model}" + ("" if args.other is None else f"\n  B {args.other}"),
        f"  {'':<24} {'value':>12}   95 % interval",
    ]
    for name, estimate, shape in rows:
        if estimate is not None:
            interval = "none: one window" if estimate.low is None else _interval(estimate, shape)
            lines.append(f"  {name:<24} {shape.format(estimate.value):>12}   {interval}")
    return "\n".join(lines)


def _interval(estimate: Estimate, shape: str) -> str:
    return f"{shape.format(estimate.low)} to {shape.format(estimate.high)}"
