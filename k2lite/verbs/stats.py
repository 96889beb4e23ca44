"""Show how a model routes: popularity, entropy, reuse, and how far a layer foretells the next.

MODEL is a folder, whose model first reads a text, or a trace (from k2lite trace, or JSON lines of expert ids). Reuse
and recall are shares of a token's experts; tables that foretell come from the first half of the tokens and are judged
on the second.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_options import add_model_arguments, load_engine
from .trace import add_text_arguments, check_text_arguments, record

if TYPE_CHECKING:
    from k2lite.offload.routing_analysis import RoutingFacts
    from k2lite.offload.routing_trace import RoutingTrace

PICTURES = (".svg", ".html", ".png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_text_arguments(parser, required=False)
    parser.add_argument("--experts", type=int, metavar="N", help="experts a layer, where a trace does not say")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="a heat map of uses, layers by experts: FILE.svg, .html or .png"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    from k2lite.offload.routing_analysis import analyse

    _check(args)
    trace = _trace(args)
    facts = analyse(trace.ids, trace.model.n_experts)
    if args.picture is not None:
        _draw(args.picture, trace, facts)
    print(json.dumps(report(trace, facts), ensure_ascii=False) if args.json else as_text(trace, facts))
    return 0


def _check(args: argparse.Namespace) -> None:
    from k2lite.quant.errors import RequestError

    check_text_arguments(args)
    if args.picture is not None and args.picture.suffix not in PICTURES:
        raise RequestError(f"--picture {args.picture}: a map is drawn as {', '.join(PICTURES)}")
    given = args.model is not None and args.model.is_file()
    for option, value in (("--text", args.text), ("--max-tokens", args.max_tokens), ("--context", args.context)):
        if given and value is not None:
            raise RequestError(f"{option} is for a model; {args.model} is a trace")
    if not given and args.experts is not None:
        raise RequestError("--experts is for a trace; a model says how many it has")
    if args.experts is not None and args.experts < 1:
        raise RequestError(f"--experts is {args.experts}; expected 1 or more")


def _trace(args: argparse.Namespace) -> RoutingTrace:
    from k2lite.offload.routing_trace import read_trace
    from k2lite.sample_text import SAMPLE_TEXT

    from .eval import read_text

    if args.model is not None and args.model.is_file():
        return read_trace(args.model, n_experts=args.experts)
    text = SAMPLE_TEXT if args.text is None else read_text(args.text)
    return record(args, load_engine(args), text)


def report(trace: RoutingTrace, facts: RoutingFacts) -> dict[str, Any]:
    """What --json prints; lists are per layer, those of recall begin with the second one."""
    return {
        "model": trace.model.name,
        "tokens": len(trace.ids),
        "layers": list(trace.model.layers),
        "experts": trace.model.n_experts,
        "experts_per_token": trace.ids.shape[2],
        "distinct": facts.distinct.tolist(),
        "entropy_bits": facts.entropy_bits.tolist(),
        "top_shares": {str(share): values.tolist() for share, values in facts.top_shares.items()},
        "reuse": {str(lag): values.tolist() for lag, values in facts.reuse.items()},
        "recall_by_previous_token": facts.by_previous_token.tolist(),
        "recall_by_popularity": facts.by_popularity.tolist(),
        "recall_by_previous_layer": facts.by_previous_layer.tolist(),
        "counts": facts.counts.tolist(),
    }


def _table(trace: RoutingTrace, facts: RoutingFacts) -> list[list[str]]:
    """A header, a row a layer, and the mean."""
    shares = [f"top {share:.0%}" for share in facts.top_shares]
    lags = [f"lag {lag}" for lag in facts.reuse]
    header = ["layer", "distinct", "entropy", *shares, *lags, "token", "popular", "layer-1"]
    columns = [facts.entropy_bits, *facts.top_shares.values(), *facts.reuse.values()]
    recalls = [facts.by_previous_token, facts.by_popularity, facts.by_previous_layer]
    rows = [header]
    for at, layer in enumerate(trace.model.layers):
        foretold = [f"{values[at - 1]:.3f}" if at else "-" for values in recalls]
        rows.append([str(layer), str(facts.distinct[at]), *(f"{values[at]:.3f}" for values in columns), *foretold])
    means = [f"{values.mean():.3f}" if values.size else "-" for values in (*columns, *recalls)]
    return [*rows, ["mean", f"{facts.distinct.mean():.1f}", *means]]


def as_text(trace: RoutingTrace, facts: RoutingFacts) -> str:
    """The table that a person reads."""
    n_tokens, n_layers, active = trace.ids.shape
    table = _table(trace, facts)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        [
            f"{trace.model.name}: {n_tokens} tokens x {n_layers} layers x {active} of {trace.model.n_experts} experts",
            "  entropy in bits of the experts' uses; top: share of uses of the most used; lag: share of a token's",
            "  experts that the token so many before used too; then recall of a layer's choice from the token before,",
            "  from popularity, and from what the token used in the layer before",
            *("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table),
        ]
    )


def _draw(path: Path, trace: RoutingTrace, facts: RoutingFacts) -> None:
    """Uses of each expert as a share of its layer's."""
    from k2lite.charts import heat_map_png, heat_map_svg, html_page, html_table
    from k2lite.quant.durable_files import replace_file

    shares = facts.counts / facts.counts.sum(axis=1, keepdims=True)
    title = f"Expert uses, {trace.model.name}, {len(trace.ids)} tokens"
    if path.suffix == ".png":
        replace_file(path, [heat_map_png(shares)])
        return
    labels = [str(layer) for layer in trace.model.layers]
    picture = heat_map_svg(title, "expert", labels, shares)
    if path.suffix == ".html":
        header, *rows = _table(trace, facts)
        picture = html_page(title, [picture, html_table(header, rows)])
    replace_file(path, [picture.encode()])
