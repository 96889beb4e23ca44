"""Measure prefill and decode: tok/s, hit rate, bytes read, GB/s, share of the bound, peak memory.

The bound is what the drive's and the memory's own rates allow, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from k2lite.quant.errors import RequestError

from .model_options import add_model_arguments, load_engine


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
    import torch

    from k2lite.benchmark import Rates, bench, report
    from k2lite.machine import measure_memory
    from k2lite.model_sizes import EMBEDDINGS
    from k2lite.offload.cache import ExpertCache
    from k2lite.offload.drive_rate import store_rate
    from k2lite.offload.routing_trace import read_trace
    from k2lite.traced_routing import follow_trace

    args.context = args.prompt_tokens + args.tokens if args.context is None else args.context
    engine = load_engine(args)
    if args.routing is not None:
        follow_trace(engine, read_trace(args.routing))
    cache = engine.experts
    if not isinstance(cache, ExpertCache):
        raise TypeError("bench measures an ExpertCache")
    # ids without text: what a router makes of them decides nothing here
    state = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(engine.config.vocab_size, (args.prompt_tokens,), generator=state).tolist()
    rates = Rates(store_rate(cache.store), measure_memory())
    prefill, decode = bench(engine, ids, args.tokens)
    checkpoint = cache.store.checkpoint
    trunk_read = engine.placement.all_trunk_bytes - checkpoint.trunk_module(EMBEDDINGS).nbytes
    facts = report(engine, prefill, decode, rates, trunk_read) | {"routing": str(args.routing or "the model's own")}
    print(json.dumps(facts) if args.json else as_text(facts))
    sys.stdout.flush()
    return 0


def as_text(facts: dict[str, Any]) -> str:
    from k2lite.byte_sizes import gib

    lines = []
    for name in ("prefill", "decode"):
        phase = facts[name]
        lines.append(
            f"{name:<8} {phase['tok_s']:8.2f} tok/s  {phase['tokens']} tokens in {phase['seconds']:.2f} s; hit rate "
            f"{phase['hit_rate']:.1%}, {phase['read_bytes_per_token'] / 1e6:.1f} MB a token from the drive at "
            f"{phase['read_bytes_per_s'] / 1e9:.2f} GB/s"
        )
    decode = facts["decode"]
    lines.append(
        f"bound    {decode['bound_tok_s']:8.2f} tok/s for decode ({decode['share_of_bound']:.0%} reached): drive "
        f"{facts['drive_bytes_per_s'] / 1e9:.2f} GB/s, memory {facts['memory_bytes_per_s'] / 1e9:.1f} GB/s, trunk "
        f"{facts['trunk_read_bytes'] / 1e6:.0f} MB a token"
    )
    guesses = facts["prefetch"]
    lines.append(
        f"prefetch {guesses['issued']} issued, {guesses['useful']} useful, {guesses['late']} late, "
        f"{guesses['wasted']} wasted ({guesses['wasted_bytes'] / 1e6:.1f} MB)"
    )
    lines.append(f"routing  {facts['routing']}")
    lines.append(f"memory   peak {gib(facts['peak_rss_bytes'])}, planned {gib(facts['planned_bytes'])}")
    return "\n".join(lines)
