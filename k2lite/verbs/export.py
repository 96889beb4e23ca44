"""Write a model as a GGUF file, for llama.cpp, or feed-forward blocks of layers as ONNX.

OUT.gguf: INT4 and INT8 codes are copied, all else is rounded to the type. With q4_0 the routed experts are Q4_0 and all
other matrices Q8_0. OUT.onnx: of each layer named, normalized hidden states in, the block's output out; routed experts
are one QMoE, integer matrices MatMulNBits. A file is under its own name only when it is whole, and all its parts are;
what a run that was cut off has left is removed by the next one, which begins anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2lite.quant.errors import RequestError

if TYPE_CHECKING:
    from k2lite.quant.gguf_export import ExportPlan, ExportProgress

TYPES = "q4_0 (routed experts; the rest is q8_0), q8_0, bf16, f16, f32"
SHOWN_NOTES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="a model folder, as downloaded")
    parser.add_argument("destination", metavar="OUT", type=Path, help="the file to write: OUT.gguf or OUT.onnx")
    parser.add_argument("--type", metavar="TYPE", help=f"OUT.gguf: of the weights: {TYPES}")
    parser.add_argument("--layers", metavar="LIST", help="OUT.onnx: as 1, 1,3 or 1-4; layers are counted from 0")
    parser.add_argument(
        "--split-max-size",
        metavar="SIZE",
        help="OUT.gguf: parts of up to so many bytes, such as 50GB, OUT-00001-of-0000N.gguf and on (default: one file)",
    )
    parser.add_argument(
        "--weights", choices=("external", "inputs"), help="OUT.onnx: in OUT.onnx.data (default), or inputs of the graph"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def execute(args: argparse.Namespace) -> int:
    if args.destination.suffix == ".onnx":
        return _execute_onnx(args)
    from k2lite.gguf_metadata import kv_b_heads
    from k2lite.gguf_model import export_metadata
    from k2lite.model_folder import open_model
    from k2lite.progress import ProgressLine
    from k2lite.quant.gguf_export import export, plan_export
    from k2lite.quant.gguf_split import demand_places, part_bytes, remove_leftovers

    most_bytes = _check(args)
    config, checkpoint = open_model(args.source)
    checkpoint.raise_for_problems()
    plan = plan_export(checkpoint, args.type, kv_b_heads(config))
    metadata, notes = export_metadata(args.source, config, args.type)
    parts = plan.parts(args.destination, metadata, most_bytes)
    notes += [f"left out: {len(names)} x {reason}" for reason, names in checkpoint.ignored.items()]
    print(as_text(args.source, plan, [part_bytes(part) for part in parts], notes), file=sys.stderr)
    demand_places(parts)  # before anything is removed: an earlier run may have been cut off while it gave names
    for left in remove_leftovers(args.destination):
        print(f"k2lite export: removed what a run that was cut off has left: {left}", file=sys.stderr)
    line = ProgressLine(sum(stack.source_nbytes for stack in plan.stacks))
    try:
        report = lambda progress: line.update(progress.read_bytes, progress.tensor)  # noqa: E731
        progress = export(plan, parts, report)
    finally:
        line.close()
    facts = export_facts([path for path, *_ in parts], progress, line.elapsed_s)
    if args.json:
        print(json.dumps(facts))
    print(summary(facts), file=sys.stderr)
    return 0


def _execute_onnx(args: argparse.Namespace) -> int:
    from k2lite.model_folder import open_model
    from k2lite.onnx_export import parse_layers, plan_layer, remove_leftovers, write_onnx
    from k2lite.quant.errors import BackendError

    if args.type is not None:
        raise RequestError("--type has no effect on an ONNX file: codes are copied, all else is float32")
    if args.split_max_size is not None:
        raise RequestError("--split-max-size has no effect on an ONNX file: its weights lie in one file beside it")
    if args.layers is None:
        raise RequestError("--layers is needed for an ONNX file: as 1, 1,3 or 1-4")
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise BackendError("an ONNX file needs the package onnx: pip install k2lite[onnx]") from error
    config, checkpoint = open_model(args.source)
    checkpoint.raise_for_problems()
    layers = [plan_layer(config, checkpoint, layer) for layer in parse_layers(args.layers)]
    for left in remove_leftovers(args.destination):
        print(f"k2lite export: removed what a run that was cut off has left: {left}", file=sys.stderr)
    nbytes = write_onnx(args.destination, layers, config.hidden_size, args.weights or "external")
    facts = {"file": str(args.destination), "bytes": nbytes, "layers": [layer.layer for layer in layers]}
    if args.json:
        print(json.dumps(facts))
    print(f"k2lite export: wrote {args.destination}, {nbytes / 1e9:.3f} GB, {len(layers)} layers", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> int | None:
    """Bytes of a part, if there are to be parts. Raises RequestError for what needs no reading to be refused."""
    from k2lite.byte_sizes import parse_bytes

    if args.destination.suffix != ".gguf":
        raise RequestError(f"{args.destination}: name a file that ends in .gguf or .onnx")
    for option in ("layers", "weights"):
        if getattr(args, option) is not None:
            raise RequestError(f"--{option} has no effect on a GGUF file")
    if args.type is None:
        raise RequestError(f"--type is needed for a GGUF file: {TYPES}")
    if not args.destination.absolute().parent.is_dir():
        raise RequestError(f"{args.destination}: its folder does not exist; make it first")
    most_bytes = None if args.split_max_size is None else parse_bytes(args.split_max_size)
    if most_bytes is not None and most_bytes < 1:
        raise RequestError(f"--split-max-size is {args.split_max_size}; expected 1 byte or more")
    return most_bytes


def export_facts(paths: list[Path], progress: ExportProgress, seconds: float) -> dict[str, Any]:
    """What --json prints; `file` is what readers are given, the first of `files`."""
    scales = progress.scales
    return {
        "file": str(paths[0]),
        "files": [str(path) for path in paths],
        "bytes": sum(path.stat().st_size for path in paths),
        "read_bytes": progress.read_bytes,
        "seconds": seconds,
        "scales_copied": scales.scales,
        "scales_changed": scales.changed,
        "scales_zeroed": scales.zeroed,
        "tensors_with_zeroed_scales": progress.zeroed,
    }


def as_text(source: Path, plan: ExportPlan, sizes: list[int], notes: list[str]) -> str:
    """The plan as a person reads it; `sizes` are the files' bytes."""
    from k2lite.byte_sizes import gib

    table: dict[tuple[str, str], list[int]] = {}
    for stack in plan.stacks:
        row = table.setdefault((stack.kind, stack.spec.type.name), [0, 0])
        row[0] += 1
        row[1] += stack.spec.nbytes
    lines = [f"{source}: {len(plan.stacks)} tensors, {gib(sum(sizes))} to write"]
    if len(sizes) > 1:
        lines[0] += f" in {len(sizes)} parts of up to {gib(max(sizes))}"
    lines += [f"  {kind:<8} {count:>6} x  {name:<5} {gib(size)}" for (kind, name), (count, size) in table.items()]
    return "\n".join([*lines, *map("  {}".format, [*notes, *_shortened(plan.notes)])])


def _shortened(notes: tuple[str, ...]) -> list[str]:
    more = len(notes) - SHOWN_NOTES
    return [*notes[:SHOWN_NOTES], *([f"... and {more} more like it"] if more > 0 else [])]


def summary(facts: dict[str, Any]) -> str:
    from k2lite.progress import duration

    more = f" and {len(facts['files']) - 1} more parts" if len(facts["files"]) > 1 else ""
    text = f"k2lite export: wrote {facts['file']}{more}, {facts['bytes'] / 1e9:.3f} GB, in {duration(facts['seconds'])}"
    if facts["scales_copied"]:
        changed, zeroed = facts["scales_changed"], facts["scales_zeroed"]
        text += f"; the cast to F16 changed {changed} of {facts['scales_copied']} scales"
        if zeroed:
            named = ", ".join(facts["tensors_with_zeroed_scales"][:SHOWN_NOTES])
            text += f", {zeroed} of them to zero, in {named}"
    return text
