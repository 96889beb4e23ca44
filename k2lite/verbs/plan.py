"""Say before anything loads what a model will take and how fast it can be.

MODEL is a folder, or a config.json before its weights are downloaded. Bandwidths are measured: the drive's on the
folder's own files, or on a file that is written for it and removed again. Or they come from --machine FILE, a JSON
object: name, ram, ram_gb_per_s, drive_gb_per_s, tflops, and if there are any reserve, vram, vram_gb_per_s,
bus_gb_per_s, host_tflops, layer_ms. With --routing TRACE the hit rate is also that of a replay of
recorded choices.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from k2lite.quant.errors import RequestError

from .model_options import add_packed_copy_argument, add_trunk_argument, add_vram_argument

if TYPE_CHECKING:
    from k2lite.backends.base import Backend, Memory
    from k2lite.config import ModelConfig
    from k2lite.machine import Machine
    from k2lite.offload.packed_copy import PackedCopy
    from k2lite.planning import ModelBytes
    from k2lite.quant.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder, or a config.json")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="what multiplies (default: %(default)s)")
    parser.add_argument(
        "--ram", metavar="SIZE", help="memory the process may take (default: what the machine can spare)"
    )
    add_vram_argument(parser)
    parser.add_argument("--context", type=int, metavar="TOKENS", help="as for run")
    add_trunk_argument(parser)
    add_packed_copy_argument(parser)
    parser.add_argument("--machine", type=Path, metavar="FILE", help="plan for the machine that this file describes")
    parser.add_argument(
        "--drive", type=Path, metavar="DIR",
        help="where the weights of a config.json will lie: that drive is measured (default: beside the config.json)",
    )  # fmt: skip
    parser.add_argument("--routing", type=Path, metavar="TRACE", help="predict for a trace's choices too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    from k2lite.backends.registry import open_backend
    from k2lite.offload.packed_source import packing_bytes
    from k2lite.offload.routing_trace import read_trace
    from k2lite.placement import arithmetic_name
    from k2lite.planning import as_text, plan_report

    _check(args)
    routing = None if args.routing is None else read_trace(args.routing)
    backend = open_backend(args.backend)
    config, model, checkpoint, packed = _model(args.model, args.trunk, backend, args.packed_copy)
    machine = _with_accelerator(args, backend, _machine(args, backend, checkpoint))
    facts = plan_report(
        config,
        model,
        machine,
        backend=backend.name,
        arithmetic=arithmetic_name(backend, model.trunk_to),
        context=args.context,
        # on an accelerator experts are laid out on their way, which takes no room in RAM
        packing=0 if checkpoint is None or machine.device_bytes or packed else packing_bytes(checkpoint, backend),
        routing=routing,
    )
    facts = {"model": str(args.model), **facts}
    if packed is not None:
        if machine.device_bytes and facts.get("experts_on", "device") != "device":
            raise RequestError("--packed-copy has no effect: experts would multiply on the host, as stored")
        facts["packed_copy"] = {"folder": str(packed.folder), "bytes": packed.nbytes, "is_whole": packed.is_whole}
    print(json.dumps(facts) if args.json else as_text(str(args.model), facts))
    return 0


def _model(
    path: Path, trunk: str, backend: Backend, packed_copy: Path | None
) -> tuple[ModelConfig, ModelBytes, Checkpoint | None, PackedCopy | None]:
    """Refuses what `run` would refuse."""
    from k2lite.model_folder import open_model
    from k2lite.model_sizes import EMBEDDINGS, published_sizes
    from k2lite.offload.packed_copy import PackedCopy
    from k2lite.placement import WeightBytes, demand_formats, demand_trunk_format
    from k2lite.planning import ModelBytes
    from k2lite.quant.quantization_plan import plan_trunk

    if path.is_dir():
        config, checkpoint = open_model(path)
        checkpoint.raise_for_problems()
        changed = plan_trunk(checkpoint, trunk).values()
        demand_formats(checkpoint, backend, changed)
        embeddings = checkpoint.trunk_module(EMBEDDINGS).nbytes
        packed = None if packed_copy is None else PackedCopy(packed_copy, checkpoint, backend)
        weights = WeightBytes.of(config, checkpoint, changed, packed)
        return config, ModelBytes(weights, embeddings, trunk if changed else None), checkpoint, packed
    from k2lite.config import parse_config
    from k2lite.config_reader import read_object
    from k2lite.offload.slots import rounded_out
    from k2lite.quant.types import Extent

    raw = read_object(path)
    config = parse_config(raw, path)
    sizes = published_sizes(config, raw, trunk=trunk)
    if sizes.converted:
        demand_trunk_format(backend, trunk)
    slot = rounded_out(Extent(path, 1, sizes.expert))[1]  # in one run, wherever it begins
    experts = len(config.moe_layers) * config.n_routed_experts
    weights = WeightBytes(str(path), sizes.trunk, sizes.experts, slot, experts)
    return config, ModelBytes(weights, sizes.embeddings, trunk if sizes.converted else None), None, None


def _check(args: argparse.Namespace) -> None:
    """Refuse options without effect. Raises RequestError."""
    if args.packed_copy is not None and not args.model.is_dir():
        raise RequestError(f"--packed-copy has no effect: {args.model} has no experts to pack")
    if args.drive is not None and (args.machine is not None or args.model.is_dir()):
        other = "--machine" if args.machine is not None else f"the folder {args.model}"
        raise RequestError(f"--drive has no effect: {other} says already which drive it is")


def _machine(args: argparse.Namespace, backend: Backend, checkpoint: Checkpoint | None) -> Machine:
    from dataclasses import replace

    from k2lite.byte_sizes import parse_bytes
    from k2lite.machine import read_machine, this_machine
    from k2lite.placement import spare_bytes

    ram = None if args.ram is None else parse_bytes(args.ram)
    if args.machine is not None:
        machine = read_machine(args.machine)
        return machine if ram is None else replace(machine, memory_bytes=ram)
    rate = _drive_rate(args, checkpoint)
    return this_machine(spare_bytes(_ram(backend)) if ram is None else ram, rate, backend)


def _drive_rate(args: argparse.Namespace, checkpoint: Checkpoint | None) -> float:
    """Bytes a second, measured on the model's own files, or on a file written where they will lie."""
    from k2lite.byte_sizes import gib
    from k2lite.offload import drive_rate
    from k2lite.offload.store import ExpertStore

    if checkpoint is None:
        folder = args.model.absolute().parent if args.drive is None else args.drive
        size = drive_rate.TRIAL_BYTES
        print(f"k2lite plan: measuring memory, and the drive with {gib(size)} in {folder}", file=sys.stderr)
        try:
            return drive_rate.folder_rate(folder, size=size)
        except RequestError as error:
            raise RequestError(f"{error}; name a folder with --drive, or a machine with --machine") from error
    store = ExpertStore(checkpoint)
    try:
        print("k2lite plan: measuring memory and drive", file=sys.stderr)
        return drive_rate.store_rate(store)
    finally:
        store.close()


def _ram(backend: Backend) -> Memory:
    """The host's memory, also beside an accelerator."""
    from k2lite.backends.host_memory import host_memory

    return backend.memory() if backend.device.type == "cpu" else host_memory()


def _with_accelerator(args: argparse.Namespace, backend: Backend, machine: Machine) -> Machine:
    """The machine with the accelerator of a backend that has one, measured. Raises RequestError, MemoryPlanError."""
    from dataclasses import replace

    from k2lite.backends.torch_device.backend import TorchDeviceBackend
    from k2lite.byte_sizes import parse_bytes
    from k2lite.device_rates import measure_device
    from k2lite.placement import budget_of

    vram = None if args.vram is None else parse_bytes(args.vram)
    if args.machine is not None and machine.device_bytes:
        return machine if vram is None else replace(machine, device_bytes=vram)
    if args.machine is not None or not isinstance(backend, TorchDeviceBackend):
        if vram is not None:
            raise RequestError(f"--vram has no effect: {machine.name} with backend {backend.name} has no accelerator")
        return machine
    found = measure_device(backend)
    rates = replace(
        machine.rates,
        device=found.memory,
        bus=found.link,
        flops=found.flops,
        host_flops=machine.rates.flops,
        one_bus=False,
    )
    return replace(machine, device_bytes=budget_of(backend.memory(), vram, "--vram"), rates=rates)
