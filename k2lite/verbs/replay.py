"""Replay a routing trace: hit rates of cache policies beside Belady's optimum.

A hit is an expert that needed no read since its last eviction. Slots are a pool over all layers, empty at first; the
first tokens (--warmup) are replayed but not counted. All experts of a token in a layer are judged at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2lite.offload.replay import Replayed
    from k2lite.offload.routing_trace import RoutingTrace

PICTURES = (".svg", ".html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", type=Path, help="from k2lite trace, or JSON lines of expert ids")
    parser.add_argument(
        "--policy",
        default="lru,cyclic,hazard",
        metavar="NAMES",
        help="of hazard, cyclic, lru, lfu, lfru, static, belady, separated by commas (default: %(default)s; belady is "
        "always added)",
    )
    parser.add_argument(
        "--slots",
        default="5%,10%,20%,30%",
        metavar="NUMBERS",
        help="shares of all experts, or counts, separated by commas (default: 5%%,10%%,20%%,30%%)",
    )
    parser.add_argument(
        "--warmup", default="25%", metavar="N", help="tokens, or their share, that are not counted (default: 25%%)"
    )
    parser.add_argument("--experts", type=int, metavar="N", help="experts a layer, where the trace does not say")
    parser.add_argument(
        "--expert-bytes", type=int, metavar="N", help="bytes of one expert, where the trace does not say"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the hit rates: FILE.svg or FILE.html")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    from k2lite.offload.replay import BELADY, count_of, replay
    from k2lite.offload.routing_trace import read_trace
    from k2lite.progress import ProgressLine

    _check(args)
    trace = read_trace(args.trace, n_experts=args.experts)
    n_tokens, n_layers, _ = trace.ids.shape
    total = n_layers * trace.model.n_experts
    slots = [count_of(text.strip(), total, "--slots") for text in args.slots.split(",")]
    warmup = count_of(args.warmup, n_tokens, "--warmup")
    names = list(dict.fromkeys([*(name.strip() for name in args.policy.split(",")), BELADY]))
    runs: list[Replayed] = []
    line = ProgressLine(len(slots) * len(names))
    try:
        for count in slots:
            for name in names:
                runs.append(replay(trace.ids, trace.model.n_experts, name, count, warmup_tokens=warmup))
                line.update(len(runs), f"{name}, {count} slots")
    finally:
        line.close()
    facts = report(args, trace, runs)
    if args.picture is not None:
        _draw(args.picture, facts)
    print(json.dumps(facts, ensure_ascii=False) if args.json else as_text(facts))
    return 0


def _check(args: argparse.Namespace) -> None:
    from k2lite.quant.errors import RequestError

    for option, value in (("--experts", args.experts), ("--expert-bytes", args.expert_bytes)):
        if value is not None and value < 1:
            raise RequestError(f"{option} is {value}; expected 1 or more")
    if args.picture is not None and args.picture.suffix not in PICTURES:
        raise RequestError(f"--picture {args.picture}: a chart is drawn as {' or '.join(PICTURES)}")


def report(args: argparse.Namespace, trace: RoutingTrace, runs: list[Replayed]) -> dict[str, Any]:
    """What --json prints. Bytes are null where nobody said how large an expert is; `misses_over_belady` is null where
    Belady's optimum misses nothing."""
    from k2lite.offload.replay import BELADY

    n_tokens, n_layers, active = trace.ids.shape
    expert_bytes = args.expert_bytes or trace.model.expert_bytes or None
    best = {run.slots: run.reads for run in runs if run.policy == BELADY}
    return {
        "trace": str(args.trace),
        "model": trace.model.name,
        "tokens": n_tokens,
        "counted_tokens": runs[0].tokens,
        "layers": n_layers,
        "experts": trace.model.n_experts,
        "experts_per_token": active,
        "expert_bytes": expert_bytes,
        "runs": [
            {
                "policy": run.policy,
                "slots": run.slots,
                "share": run.slots / (n_layers * trace.model.n_experts),
                "hit_rate": run.hit_rate,
                "reads_per_token": run.reads_per_token,
                "read_bytes_per_token": None if expert_bytes is None else run.reads_per_token * expert_bytes,
                "misses_over_belady": run.reads / best[run.slots] if best[run.slots] else None,
            }
            for run in runs
        ],
    }


def _header(facts: dict[str, Any]) -> list[str]:
    unit = "reads/token" if facts["expert_bytes"] is None else "MB/token"
    return ["slots", "share", "policy", "hit rate", unit, "misses / Belady's"]


def _rows(facts: dict[str, Any]) -> list[list[str]]:
    rows = []
    for run in facts["runs"]:
        read_bytes, regret = run["read_bytes_per_token"], run["misses_over_belady"]
        reads = f"{run['reads_per_token']:.1f}" if read_bytes is None else f"{read_bytes / 1e6:.1f}"
        shown = "-" if regret is None else f"{regret:.2f}"
        rows.append([str(run["slots"]), f"{run['share']:.1%}", run["policy"], f"{run['hit_rate']:.4f}", reads, shown])
    return rows


def _title(facts: dict[str, Any]) -> str:
    return (
        f"{facts['trace']}: {facts['tokens']} tokens x {facts['layers']} layers x {facts['experts_per_token']} of "
        f"{facts['experts']} experts, the last {facts['counted_tokens']} tokens counted"
    )


def as_text(facts: dict[str, Any]) -> str:
    """The table that a person reads."""
    table = [_header(facts), *_rows(facts)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join([_title(facts), *lines])


def _draw(path: Path, facts: dict[str, Any]) -> None:
    """Hit rates over slots, a line a policy."""
    from k2lite.charts import html_page, html_table, line_chart
    from k2lite.quant.durable_files import replace_file

    lines: dict[str, list[tuple[float, float]]] = {}
    for run in facts["runs"]:
        lines.setdefault(run["policy"], []).append((run["share"], run["hit_rate"]))
    chart = line_chart(f"Hit rates, {facts['model']}", "slots, share of all experts", "hit rate", lines)
    if path.suffix == ".html":
        chart = html_page(_title(facts), [chart, html_table(_header(facts), _rows(facts))])
    replace_file(path, [chart.encode()])
