"""Answer one prompt.

The text streams to stdout as it is made; with --json one object follows at the end instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from .model_options import (
    add_model_arguments,
    add_sampling_arguments,
    add_statistics_argument,
    check_sampling_arguments,
    keep_statistics,
    load_engine,
    sampling_params,
)

if TYPE_CHECKING:
    from k2lite.engine import Engine
    from k2lite.sampling import SamplingParams
    from k2lite.session import Answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="what to say to the model")
    add_sampling_arguments(parser)
    add_statistics_argument(parser)
    parser.add_argument(
        "--raw", action="store_true", help="TEXT is the prompt itself: no chat template, control tokens allowed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, ids, counters, plan")


def execute(args: argparse.Namespace) -> int:
    from k2lite.session import Session

    check_sampling_arguments(args)
    engine = load_engine(args, forecast=True)
    tokenizer = engine.tokenizer
    if args.raw:
        prompt_ids = tokenizer.encode(args.prompt, allow_special=True)
    else:
        prompt_ids = tokenizer.render([{"role": "user", "content": args.prompt}]).ids
    params = sampling_params(args, engine)
    answer = Session(engine).answer(prompt_ids, params, max_tokens=args.max_tokens, stop=tuple(args.stop))
    for piece in answer:
        if not args.json:
            print(piece, end="", flush=True)
    keep_statistics(args, engine)
    if args.json:
        print(json.dumps(report(engine, params, prompt_ids, answer)))
    else:
        print()
        print(summary(engine), file=sys.stderr)
    return 0


def report(engine: Engine, params: SamplingParams, prompt_ids: list[int], answer: Answer) -> dict[str, Any]:
    """What --json prints."""
    from dataclasses import asdict

    return {
        "text": answer.text,
        "ids": answer.ids,
        "finish_reason": answer.finish_reason,
        "prompt_ids": prompt_ids,
        "sampling": asdict(params),
        "counters": {
            **asdict(engine.counters),
            **asdict(engine.experts.counters),
            "distinct_experts": engine.experts.stats.distinct_experts,
        },
        "plan": asdict(engine.placement),
    }


def summary(engine: Engine) -> str:
    """One line: tokens and speeds."""
    c = engine.counters
    prefill = f"{c.prefill_tokens} tokens read ({rate(c.prefill_tokens, c.prefill_s)})"
    # the first new token comes out of the prefill
    return f"k2lite: {prefill}, {c.decode_tokens + 1} written ({rate(c.decode_tokens, c.decode_s)})"


def rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tok/s" if seconds else "- tok/s"
