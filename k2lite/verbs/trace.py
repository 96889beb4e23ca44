"""Record what a model does while it reads a text: which experts it chooses, and how large its matrices' inputs are.

The trace (--out) holds ids and weights of every token in every MoE layer, 32 bytes a token and layer for eight experts,
and says which model it is of; `k2lite replay` and `k2lite stats` read it. The moments (--moments) are for quantize
--importance. Both are written whole or not at all. The text is read in windows, each from an empty context; control
tokens in it count as such, so that it can be rendered dialogues.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .eval import DEFAULT_WINDOW, read_text
from .model_options import add_model_arguments, load_engine

if TYPE_CHECKING:
    from k2lite.engine import Engine
    from k2lite.moment_recorder import MomentRecorder
    from k2lite.offload.routing_trace import RoutingTrace

BYTES_A_CHOICE = 4  # its id and its weight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the trace of experts chosen")
    parser.add_argument(
        "--moments", type=Path, metavar="FILE", help="write the mean square of each input of each matrix"
    )
    parser.add_argument(
        "--window", type=int, metavar="N",
        help=f"tokens in a window (default: the context, with --moments {DEFAULT_WINDOW})",
    )  # fmt: skip
    add_text_arguments(parser, required=True)


def add_text_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """What is read while something is recorded."""
    rest = "" if required else " (default: a short one of k2lite's own)"
    parser.add_argument("--text", required=required, metavar="FILE", help=f"UTF-8 text to read; - is stdin{rest}")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read N tokens of the text (default: all)")


def execute(args: argparse.Namespace) -> int:
    from k2lite.moment_recorder import MomentRecorder
    from k2lite.quant.errors import RequestError

    check_text_arguments(args)
    if args.out is None and args.moments is None:
        raise RequestError("nothing to record; name a file with --out, --moments or both")
    for option, path in (("--out", args.out), ("--moments", args.moments)):
        if path is not None and not path.absolute().parent.is_dir():
            raise RequestError(f"{option} {path}: its folder does not exist")
    text = read_text(args.text)
    args.context = _window(args)
    moments = None if args.moments is None else MomentRecorder()
    trace = record(args, load_engine(args, moments), text, head=moments is not None, out=args.out)
    if args.out is not None:
        trace.write(args.out)
        print(f"k2lite trace: wrote {args.out}: {_described(trace, args.out)}", file=sys.stderr)
    if moments is not None:
        _write_moments(args, moments, len(trace.ids))
        print(f"k2lite trace: wrote {args.moments}, the moments of {len(trace.ids)} tokens", file=sys.stderr)
    return 0


def _window(args: argparse.Namespace) -> int | None:
    """Tokens of the context, which is a window."""
    from k2lite.quant.errors import RequestError

    if args.window is not None and args.context is not None:
        raise RequestError("--window and --context are the same number here; give one of them")
    given: int | None = args.context if args.window is None else args.window
    return DEFAULT_WINDOW if given is None and args.moments is not None else given


def _described(trace: RoutingTrace, path: Path) -> str:
    n_tokens, n_layers, active = trace.ids.shape
    return (
        f"{n_tokens} tokens x {n_layers} layers x {active} of {trace.model.n_experts} experts "
        f"({path.stat().st_size / 2**20:.1f} MiB)"
    )


def _write_moments(args: argparse.Namespace, moments: MomentRecorder, tokens: int) -> None:
    from k2lite.demo_folder import DEMO_FOLDER
    from k2lite.model_folder import open_model

    _, checkpoint = open_model(args.model or DEMO_FOLDER)
    moments.write(args.moments, checkpoint.schema.matrix_widths(), model=checkpoint.fingerprint(), tokens=tokens)


def check_text_arguments(args: argparse.Namespace) -> None:
    """Refuse what can't be read before anything loads. Raises RequestError."""
    from k2lite.quant.errors import RequestError

    if args.max_tokens is not None and args.max_tokens < 1:
        raise RequestError(f"--max-tokens is {args.max_tokens}; expected 1 or more")


def record(
    args: argparse.Namespace, engine: Engine, text: str, *, head: bool = False, out: Path | None = None
) -> RoutingTrace:
    """Have the engine read the text, with `head` to the logits, with a progress line. Raises RequestError before it
    reads where the disk of `out` has no room for what comes of it."""
    from k2lite.demo_folder import DEMO_FOLDER
    from k2lite.model_folder import open_model
    from k2lite.offload.routing_trace import TracedModel
    from k2lite.progress import ProgressLine
    from k2lite.quant.durable_files import demand_room
    from k2lite.routing_recording import record_routing

    folder = args.model or DEMO_FOLDER
    config, checkpoint = open_model(folder, latent_norm_eps=args.latent_norm_eps)
    model = TracedModel(
        folder.resolve().name, config.model_type, config.moe_layers, config.n_routed_experts, checkpoint.expert_bytes
    )
    ids = engine.tokenizer.encode(text, allow_special=True)[: args.max_tokens]
    if out is not None:
        demand_room(out, BYTES_A_CHOICE * len(ids) * len(config.moe_layers) * config.num_experts_per_tok)
    line = ProgressLine(len(ids))
    try:
        report = lambda done: line.update(done, f"token {done} of {len(ids)}")  # noqa: E731
        return record_routing(engine, ids, model, report, head=head)
    finally:
        line.close()
