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

from .calibration_options import GPTQ, add_calibration_arguments, calibrate, check_calibration_arguments

if TYPE_CHECKING:
    from k2lite.backends.base import Capabilities
    from k2lite.config import ModelConfig
    from k2lite.quant.checkpoint import Checkpoint
    from k2lite.quant.quantization_plan import QuantizationPlan
    from k2lite.quant.quantizer import Job, Progress
    from k2lite.quant.recipe import Recipe
    from k2lite.quant.time_estimate import TimeEstimate

FORMATS = "int4_g32, int4_g64, int4_g128, int8_g128, int8_channel, fp8_e4m3_b128, bf16, keep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="a model folder, as downloaded, or a .gguf file")
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
        "--importance",
        metavar="FILE",
        type=Path,
        help="have --scale-search mse weigh errors by the moments of k2lite trace --moments FILE",
    )
    add_calibration_arguments(parser)
    parser.add_argument(
        "--backend",
        metavar="NAME",
        help="what will multiply: sets the defaults, refuses formats that it lacks, reads for --rounding gptq",
    )
    parser.add_argument("--text-only", action="store_true", help="leave a vision tower out")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and a measured guess of its time")
    parser.add_argument("--resume", action="store_true", help="go on where a run was cut off")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def execute(args: argparse.Namespace) -> int:
    if args.source.suffix == ".gguf":
        from k2lite.gguf_model import as_folder, open_gguf

        model = open_gguf(args.source)
        for note in model.notes:
            print(f"k2lite quantize: {note}", file=sys.stderr)
        with as_folder(model) as folder:
            return _execute(args, folder, model.config, model.checkpoint)
    from k2lite.model_folder import open_model

    return _execute(args, args.source, *open_model(args.source))


def _execute(args: argparse.Namespace, folder: Path, config: ModelConfig, checkpoint: Checkpoint) -> int:
    """`folder` holds config.json, the tokenizer and what else is carried along."""
    from k2lite.backend_check import demand_recipe
    from k2lite.quant.quantization_plan import plan_quantization
    from k2lite.quant.quantizer import demand_usable

    checkpoint.raise_for_problems()
    check_calibration_arguments(args)
    native = _is_int4_native(checkpoint)
    if native and args.destination is None and not args.dry_run and args.backend is None:
        print(
            f"k2lite quantize: the experts of {args.source} are INT4 already; run it as it is, or with "
            "--trunk int8_g128 (run, chat, serve, plan, bench), which quantizes the trunk while loading; name DST for "
            "a folder of it",
            file=sys.stderr,
        )
        return 0
    capabilities = _capabilities(args.backend)
    plan = plan_quantization(checkpoint, _recipe(args, checkpoint, capabilities), text_only=args.text_only)
    if capabilities is not None:
        demand_recipe(_formats(plan), args.backend, capabilities)
    print(as_text(args.source, plan), file=sys.stderr)
    if args.dry_run:
        _say_plan(args, plan, checkpoint)
        return 0
    if args.destination is None:
        raise RequestError("name a folder to write to: k2lite quantize SRC DST")
    job = _job(args, folder, checkpoint, plan)
    demand_usable(job.destination, args.resume)  # before a model reads for hours
    job = _with_statistics(args, job, config, checkpoint)
    progress, seconds = _run(job, args)
    facts = {**plan_facts(plan), "seconds": seconds, "read_bytes": progress.read_bytes,
             "written_bytes": progress.written_bytes, "folder": str(args.destination)}  # fmt: skip
    if args.json:
        print(json.dumps(facts))
    print(summary(facts), file=sys.stderr)
    return 0


def _say_plan(args: argparse.Namespace, plan: QuantizationPlan, checkpoint: Checkpoint) -> None:
    """What --dry-run adds to the plan. Where the result would lie decides how long it takes."""
    from dataclasses import asdict

    from k2lite.quant.method import Method, to_integers
    from k2lite.quant.moments import open_moments
    from k2lite.quant.time_estimate import estimate_time

    if args.importance is not None:
        Method("mse", open_moments(args.importance, checkpoint)).demand_known(plan.matrices)
    if args.rounding == GPTQ:
        to_integers(plan.matrices)
        print("  the time is that of plain rounding: reading the text and GPTQ come on top", file=sys.stderr)
    estimate = None if args.destination is None else estimate_time(plan, args.destination)
    print(estimate_text(estimate) if estimate else "  name a folder to write to for the time it takes", file=sys.stderr)
    if args.json:
        took = None if estimate is None else {"seconds": estimate.seconds, "limit": estimate.limit, **asdict(estimate)}
        print(json.dumps({**plan_facts(plan), "time": took}))


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
    if args.importance is not None:  # it has no other use
        chosen.setdefault("scale_search", "mse")
    return replace(recipe, rules=tuple(map(parse_rule, args.rule)), **chosen)


def _is_int4_native(checkpoint: Checkpoint) -> bool:
    formats = checkpoint.formats().get("routed experts", {})
    return bool(formats) and all(name.startswith("int4") for name in formats)


def _job(args: argparse.Namespace, folder: Path, checkpoint: Checkpoint, plan: QuantizationPlan) -> Job:
    from k2lite.quant.file_reading import read_json_object
    from k2lite.quant.quantized_config import quantized_config
    from k2lite.quant.quantizer import Job, source_identity

    if args.destination.resolve() == args.source.resolve():
        raise RequestError(f"{args.destination}: is the source; name another folder")
    config_file = folder / "config.json"
    files = {shard.path.name: shard.path for shard in checkpoint.shards}
    if folder == args.source:
        files = {config_file.name: config_file, **files}
    config_json = quantized_config(read_json_object(config_file), plan)
    return Job(plan, folder, source_identity(files), config_json, args.destination)


def _with_statistics(args: argparse.Namespace, job: Job, config: ModelConfig, checkpoint: Checkpoint) -> Job:
    """The job with what the user has it know of the matrices' inputs."""
    from dataclasses import replace

    if args.importance is not None:
        from k2lite.quant.moments import open_moments

        job = replace(job, importance=open_moments(args.importance, checkpoint))
    if args.rounding == GPTQ:
        job = replace(job, hessians=calibrate(args, config, checkpoint, job.plan))
    job.method.demand_known(job.plan.matrices)
    return job


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
    from k2lite.byte_sizes import gib

    lines = [f"{source}: {len(plan.shards)} files, {gib(plan.total_bytes)} to write"]
    for use in plan.table():
        change = use.source if use.source == use.target else f"{use.source} -> {use.target}"
        sizes = f"{gib(use.source_bytes)} -> {gib(use.target_bytes)}"
        lines.append(f"  {use.kind:<8} {use.tensors:>7} x  {change:<28} {sizes}")
    lines += [f"  left out {count:>7} x  {reason}" for reason, count in plan.left_out.items()]
    return "\n".join(lines)


def estimate_text(estimate: TimeEstimate) -> str:
    """The estimate as a person reads it."""
    from k2lite.progress import duration

    disk = duration(estimate.read_s + estimate.write_s)
    return (
        f"  about {duration(estimate.seconds)}, limited by the {estimate.limit}: "
        f"disk {disk} ({estimate.read_speed / 1e9:.2f} GB/s in, {estimate.write_speed / 1e9:.2f} GB/s out), "
        f"{estimate.threads} threads {duration(estimate.compute_s)}"
    )


def summary(facts: dict[str, Any]) -> str:
    from k2lite.progress import duration

    seconds = max(facts["seconds"], 1e-9)
    return (
        f"k2lite quantize: wrote {facts['folder']} in {duration(facts['seconds'])}, "
        f"{facts['read_bytes'] / seconds / 1e9:.2f} GB/s in, {facts['written_bytes'] / seconds / 1e9:.2f} GB/s out"
    )
