"""Measure prefill and decode: tok/s, hit rate, bytes read, GB/s, share of the bound, peak memory.

The bound is what the own rates of drive and memory, and of an accelerator's memory and the link to it, allow, measured
in the same run.
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
    from k2lite.engine import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="to read (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="to write (default: %(default)s)")
    parser.add_argument(
        "--routing", type=Path, metavar="TRACE", help="let a trace choose the experts, so that reuse is real"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompt's ids (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    for option, value in (("--prompt-tokens", args.prompt_tokens), ("--tokens", args.tokens)):
        if value < 1:
            raise RequestError(f"{option} is {value}; expected 1 or more")
    from k2lite.offload.routing_trace import read_trace
    from k2lite.traced_routing import follow_trace

    args.context = args.prompt_tokens + args.tokens if args.context is None else args.context
    engine = load_engine(args)
    if args.routing is not None:
        follow_trace(engine, read_trace(args.routing))
    facts = measured(engine, args.prompt_tokens, args.tokens, seed=args.seed)
    facts |= {"routing": str(args.routing or "the model's own")}
    print(json.dumps(facts) if args.json else as_text(facts))
    sys.stdout.flush()
    return 0


def measured(engine: Engine, prompt_tokens: int, tokens: int, *, seed: int = 0) -> dict[str, Any]:
    """All but the routing's name of what --json prints, for an engine that `load` made."""
    import torch

    from k2lite.benchmark import bench, measure_rates, report
    from k2lite.model_sizes import EMBEDDINGS
    from k2lite.prediction import engine_cache

    # ids without text: what a router makes of them decides nothing here
    state = torch.Generator().manual_seed(seed)
    ids = torch.randint(engine.config.vocab_size, (prompt_tokens,), generator=state).tolist()
    checkpoint = engine_cache(engine).store.checkpoint
    rates = measure_rates(engine)
    prefill, decode = bench(engine, ids, tokens)
    trunk_read = engine.placement.all_trunk_bytes - checkpoint.trunk_module(EMBEDDINGS).nbytes
    return report(engine, prefill, decode, rates, trunk_read)


def as_text(facts: dict[str, Any]) -> str:
    from k2lite.byte_sizes import gib

    lines, device = [], facts["plan"]["device"]
    for name in ("prefill", "decode"):
        phase = facts[name]
        lines.append(
            f"{name:<8} {phase['tok_s']:8.2f} tok/s  {phase['tokens']} tokens in {phase['seconds']:.2f} s; hit rate "
            f"{phase['hit_rate']:.1%}, {phase['read_bytes_per_token'] / 1e6:.1f} MB a token from the drive at "
            f"{phase['read_bytes_per_s'] / 1e9:.2f} GB/s"
        )
        if device is not None:
            lines.append(
                f"         of the hits on {device['name']}: {phase['device_hit_rate']:.1%} of all experts asked for; "
                f"{phase['sent_bytes_per_token'] / 1e6:.1f} MB a token sent there, {phase['returned_bytes'] / 1e6:.1f} "
                "MB came back in all"
            )
    decode = facts["decode"]
    rates = f"drive {facts['drive_bytes_per_s'] / 1e9:.2f} GB/s, memory {facts['memory_bytes_per_s'] / 1e9:.1f} GB/s"
    if device is not None:
        rates += (
            f", {device['name']}'s memory {facts['device_bytes_per_s'] / 1e9:.1f} GB/s, the link there "
            f"{facts['link_bytes_per_s'] / 1e9:.1f} GB/s"
        )
    lines.append(
        f"bound    {decode['bound_tok_s']:8.2f} tok/s for decode ({decode['share_of_bound']:.0%} reached): {rates}, "
        f"trunk {facts['trunk_read_bytes'] / 1e6:.0f} MB a token"
    )
    guesses = facts["prefetch"]
    lines.append(
        f"prefetch {guesses['issued']} issued, {guesses['useful']} useful, {guesses['late']} late, "
        f"{guesses['wasted']} wasted ({guesses['wasted_bytes'] / 1e6:.1f} MB)"
    )
    lines.append(f"routing  {facts['routing']}")
    lines.append(f"memory   peak {gib(facts['peak_rss_bytes'])}, planned {gib(facts['planned_bytes'])}")
    return "\n".join(lines)
