"""Write a folder with INT4, INT8 or FP8 weights, in one pass.

The result is again a standard folder. The plan is printed before work begins; a run that was cut off goes on with
--resume. INT4-native Kimi-K2 folders (Thinking, K2.5 and later) run as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2lite.quant.errors import RequestError

if TYPE_CHECKING:
    from k2lite.backends.base import Capabilities
    from k2lite.quant.checkpoint import Checkpoint
    from k2lite.quant.quantization_plan import QuantizationPlan
    from k2lite.quant.quantizer import Job, Progress
    from k2lite.quant.recipe import Recipe

FORMATS = "int4_g32, int4_g64, int4_g128, int8_g128, int8_channel, fp8_e4m3_b128, bf16, keep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="a model folder, as downloaded")
    parser.add_argument("destination", metavar="DST", type=Path, nargs="?", help="the folder to write")
    parser.add_argument("--experts", metavar="FORMAT", help=f"of the routed experts: {FORMATS}")
    parser.add_argument("--trunk", metavar="FORMAT", help="of attention, shared experts and dense layers")
    parser.add_argument("--lm-head", metavar="FORMAT", help="of the output matrix (default: keep)")
    parser.add_argument(
        "--rule", action="append", default=[], metavar="PATTERN=FORMAT",
        help="weights whose name matches, before all else; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--scale-search",
        metavar="RULE",
        help="how integer scales are found: amax (default), or mse: smaller errors, slower, scales of either sign",
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="what will multiply: sets the defaults, and refuses formats that it lacks"
    )
    parser.add_argument("--text-only", action="store_true", help="leave a vision tower out")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--resume", action="store_true", help="go on where a run was cut off")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def execute(args: argparse.Namespace) -> int:
    from k2lite.backend_check import demand_recipe
    from k2lite.loading import open_model
    from k2lite.quant.quantization_plan import plan_quantization

    config, checkpoint = open_model(args.source)
    checkpoint.raise_for_problems()
    native = _is_int4_native(checkpoint)
    if native and args.destination is None and not args.dry_run and args.backend is None:
        print(f"k2lite quantize: the experts of {args.source} are INT4 already; run it as it is", file=sys.stderr)
        return 0
    capabilities = _capabilities(args.backend)
    plan = plan_quantization(checkpoint, _recipe(args, checkpoint, capabilities), text_only=args.text_only)
    if capabilities is not None:
        demand_recipe(_formats(plan), args.backend, capabilities)
    print(as_text(args.source, plan), file=sys.stderr)
    if args.dry_run:
        if args.json:
            print(json.dumps(plan_facts(plan)))
        return 0
    if args.destination is None:
        raise RequestError("name a folder to write to: k2lite quantize SRC DST")
    job = _job(args, config.source, checkpoint, plan)
    progress, seconds = _run(job, args)
    facts = {**plan_facts(plan), "seconds": seconds, "read_bytes": progress.read_bytes,
             "written_bytes": progress.written_bytes, "folder": str(args.destination)}  # fmt: skip
    if args.json:
        print(json.dumps(facts))
    print(summary(facts), file=sys.stderr)
    return 0


def _capabilities(backend: str | None) -> Capabilities | None:
    """The table of the backend that is named; it need not be ready on this machine."""
    if backend is None:
        return None
    from k2lite.backends.registry import AUTO, backend_names, find

    if backend == AUTO:
        raise RequestError(f"--backend auto names none; the folder is made for one of {', '.join(backend_names())}")
    return find(backend).checked_spec().capabilities


def _formats(plan: QuantizationPlan) -> dict[str, set[str]]:
    formats: dict[str, set[str]] = {}
    for matrix in plan.matrices:
        if len(matrix.source.shape) == 2:
            formats.setdefault(matrix.kind, set()).add(matrix.target.name)
    return formats


def _recipe(args: argparse.Namespace, checkpoint: Checkpoint, capabilities: Capabilities | None) -> Recipe:
    """The user's choice, else what is good for this source and the backend that is named."""
    from dataclasses import replace

    from k2lite.backend_check import recipe_for
    from k2lite.quant.recipe import default_recipe, parse_rule

    recipe = default_recipe(set(checkpoint.formats().get("routed experts", {})))
    if capabilities is not None:
        recipe = recipe_for(checkpoint, recipe, args.backend, capabilities)
    given = {name: getattr(args, name) for name in ("experts", "trunk", "lm_head", "scale_search")}
    chosen = {name: value for name, value in given.items() if value is not None}
    return replace(recipe, rules=tuple(map(parse_rule, args.rule)), **chosen)


def _is_int4_native(checkpoint: Checkpoint) -> bool:
    formats = checkpoint.formats().get("routed experts", {})
    return bool(formats) and all(name.startswith("int4") for name in formats)


def _job(args: argparse.Namespace, config: Path, checkpoint: Checkpoint, plan: QuantizationPlan) -> Job:
    from k2lite.quant.file_reading import read_json_object
    from k2lite.quant.quantized_config import quantized_config
    from k2lite.quant.quantizer import Job, source_identity

    if args.destination.resolve() == args.source.resolve():
        raise RequestError(f"{args.destination}: is the source; name another folder")
    files = {config.name: config, **{shard.path.name: shard.path for shard in checkpoint.shards}}
    config_json = quantized_config(read_json_object(config), plan)
    return Job(plan, args.source, source_identity(files), config_json, args.destination)


def _run(job: Job, args: argparse.Namespace) -> tuple[Progress, float]:
    from k2lite.progress import ProgressLine
    from k2lite.quant.quantizer import quantize

    total = sum(piece.source_nbytes for shard in job.plan.shards for piece in shard.pieces)
    line = ProgressLine(total)

    def report(progress: Progress) -> None:
        seconds = max(line.elapsed_s, 1e-9)
        speeds = f"{progress.read_bytes / seconds / 1e9:.2f} GB/s in, {progress.written_bytes / seconds / 1e9:.2f} out"
        line.update(progress.done_bytes, f"{progress.piece}  {speeds}")

    try:
        progress = quantize(job, resume=args.resume, report=report)
    finally:
        line.close()
    return progress, line.elapsed_s


def plan_facts(plan: QuantizationPlan) -> dict[str, Any]:
    """What --json prints of a plan."""
    from dataclasses import asdict

    return {
        "settings": plan.settings,
        "table": [asdict(use) for use in plan.table()],
        "bytes": plan.total_bytes,
        "files": len(plan.shards),
        "left_out": dict(plan.left_out),
    }


def as_text(source: Path, plan: QuantizationPlan) -> str:
    """The plan as a person reads it."""
    from k2lite.placement import gib

    lines = [f"{source}: {len(plan.shards)} files, {gib(plan.total_bytes)} to write"]
    for use in plan.table():
        change = use.source if use.source == use.target else f"{use.source} -> {use.target}"
        sizes = f"{gib(use.source_bytes)} -> {gib(use.target_bytes)}"
        lines.append(f"  {use.kind:<8} {use.tensors:>7} x  {change:<28} {sizes}")
    lines += [f"  left out {count:>7} x  {reason}" for reason, count in plan.left_out.items()]
    return "\n".join(lines)


def summary(facts: dict[str, Any]) -> str:
    from k2lite.progress import duration

    seconds = max(facts["seconds"], 1e-9)
    return (
        f"k2lite quantize: wrote {facts['folder']} in {duration(facts['seconds'])}, "
        f"{facts['read_bytes'] / seconds / 1e9:.2f} GB/s in, {facts['written_bytes'] / seconds / 1e9:.2f} GB/s out"
    )
