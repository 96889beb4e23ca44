"""Record which experts a model chooses while it reads a text.

The trace (--out) holds ids and weights of every token in every MoE layer, 32 bytes a token and layer for eight experts,
and says which model it is of; `k2lite replay` and `k2lite stats` read it. It is written whole or not at all. A text
longer than the context is read in windows of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .eval import read_text
from .model_options import add_model_arguments, load_engine

if TYPE_CHECKING:
    from k2lite.engine import Engine
    from k2lite.offload.routing_trace import RoutingTrace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the trace to write")
    add_text_arguments(parser, required=True)


def add_text_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """What is read while choices are recorded."""
    rest = "" if required else " (default: a short one of k2lite's own)"
    parser.add_argument("--text", required=required, metavar="FILE", help=f"UTF-8 text to read; - is stdin{rest}")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read N tokens of the text (default: all)")


def execute(args: argparse.Namespace) -> int:
    from k2lite.quant.errors import RequestError

    check_text_arguments(args)
    if not args.out.absolute().parent.is_dir():
        raise RequestError(f"--out {args.out}: its folder does not exist")
    text = read_text(args.text)
    trace = record(args, load_engine(args), text)
    trace.write(args.out)
    n_tokens, n_layers, active = trace.ids.shape
    print(
        f"k2lite trace: wrote {args.out}: {n_tokens} tokens x {n_layers} layers x {active} of "
        f"{trace.model.n_experts} experts ({args.out.stat().st_size / 2**20:.1f} MiB)",
        file=sys.stderr,
    )
    return 0


def check_text_arguments(args: argparse.Namespace) -> None:
    """Refuse what can't be read before anything loads. Raises RequestError."""
    from k2lite.quant.errors import RequestError

    if args.max_tokens is not None and args.max_tokens < 1:
        raise RequestError(f"--max-tokens is {args.max_tokens}; expected 1 or more")


def record(args: argparse.Namespace, engine: Engine, text: str) -> RoutingTrace:
    """Have the engine read the text, with a progress line."""
    from k2lite.demo_folder import DEMO_FOLDER
    from k2lite.loading import open_model
    from k2lite.offload.routing_trace import TracedModel
    from k2lite.progress import ProgressLine
    from k2lite.routing_recording import record_routing

    folder = args.model or DEMO_FOLDER
    config, checkpoint = open_model(folder, latent_norm_eps=args.latent_norm_eps)
    model = TracedModel(
        folder.resolve().name, config.model_type, config.moe_layers, config.n_routed_experts, checkpoint.expert_bytes
    )
    ids = engine.tokenizer.encode(text)[: args.max_tokens]
    line = ProgressLine(len(ids))
    try:
        return record_routing(engine, ids, model, lambda done: line.update(done, f"token {done} of {len(ids)}"))
    finally:
        line.close()
