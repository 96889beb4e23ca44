"""The options of quantize that have the source model read a text first, so that rounding knows its matrices' inputs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from k2lite.quant.errors import RequestError

from .eval import DEFAULT_WINDOW, read_text

if TYPE_CHECKING:
    from k2lite.calibration import Calibration
    from k2lite.config import ModelConfig
    from k2lite.quant.checkpoint import Checkpoint
    from k2lite.quant.quantization_plan import QuantizationPlan

NEAREST, GPTQ = "nearest", "gptq"
DEFAULT_TOKENS = 16384


def add_calibration_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounding",
        choices=(NEAREST, GPTQ),
        default=NEAREST,
        help="gptq: later columns make good for the errors of earlier ones; for small models and slices, "
        "needs --calibration (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="the text that SRC reads for --rounding gptq, UTF-8, control tokens allowed",
    )
    parser.add_argument(
        "--calibration-tokens", type=int, metavar="N", help=f"read N tokens of it (default: {DEFAULT_TOKENS})"
    )


def check_calibration_arguments(args: argparse.Namespace) -> None:
    """Refuse half of what is needed, and options without effect. Raises RequestError."""
    if args.rounding == GPTQ:
        if args.source.suffix == ".gguf":
            raise RequestError("--rounding gptq runs the model, and only folders run: quantize the GGUF to one first")
        if args.calibration is None:
            raise RequestError("--rounding gptq needs a text: add --calibration FILE")
        if args.importance is not None:
            raise RequestError("--importance has no effect with --rounding gptq: its Hessians hold the moments already")
        if args.calibration_tokens is not None and args.calibration_tokens < 2:
            raise RequestError(f"--calibration-tokens is {args.calibration_tokens}; expected 2 or more")
        return
    for option in ("calibration", "calibration_tokens"):
        if getattr(args, option) is not None:
            raise RequestError(f"--{option.replace('_', '-')} has no effect without --rounding gptq")


def calibrate(
    args: argparse.Namespace, config: ModelConfig, checkpoint: Checkpoint, plan: QuantizationPlan
) -> Calibration:
    """Have the source model read the text. Raises MemoryPlanError with the sum if what is kept of it would not fit."""
    from k2lite.calibration import Calibration, demand_memory
    from k2lite.loading import load
    from k2lite.quant.method import to_integers
    from k2lite.reading import read_windows, windows_of
    from k2lite.text.tokenizer import load_tokenizer

    to_integers(plan.matrices)
    text = read_text(args.calibration)
    windows = windows_of(load_tokenizer(args.source), text, DEFAULT_WINDOW, args.calibration_tokens or DEFAULT_TOKENS)
    tokens = sum(map(len, windows))
    demand_memory(config, plan, tokens)
    calibration = Calibration(checkpoint, text, tokens)
    engine = load(args.source, backend=args.backend or "auto", context=DEFAULT_WINDOW, recorder=calibration)
    print(f"k2lite quantize: {args.source} reads {args.calibration}", file=sys.stderr)
    read_windows(engine, windows)
    return calibration
