"""Say before anything loads what a model will take and how fast it can be.

MODEL is a folder, or a config.json before its weights are downloaded. Bandwidths are measured, or come from --machine
FILE, a JSON object: name, ram, ram_gb_per_s, drive_gb_per_s, tflops, and if there are any reserve, vram, vram_gb_per_s,
bus_gb_per_s, layer_ms. With --routing TRACE the hit rate is also that of a replay of recorded choices.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from k2lite.quant.errors import RequestError

if TYPE_CHECKING:
    from k2lite.backends.base import Backend
    from k2lite.config import ModelConfig
    from k2lite.machine import Machine
    from k2lite.planning import ModelBytes
    from k2lite.quant.checkpoint import Checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder, or a config.json")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="what multiplies (default: %(default)s)")
    parser.add_argument(
        "--ram", metavar="SIZE", help="memory the process may take (default: what the machine can spare)"
    )
    parser.add_argument("--context", type=int, metavar="TOKENS", help="as for run")
    parser.add_argument("--machine", type=Path, metavar="FILE", help="plan for the machine that this file describes")
    parser.add_argument("--routing", type=Path, metavar="TRACE", help="predict for a trace's choices too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    from k2lite.backends.registry import open_backend
    from k2lite.offload.routing_trace import read_trace
    from k2lite.planning import as_text, plan_report

    routing = None if args.routing is None else read_trace(args.routing)
    backend = open_backend(args.backend)
    config, model, checkpoint = _model(args.model)
    machine = _machine(args, backend, checkpoint)
    facts = plan_report(
        config,
        model,
        machine,
        backend=backend.name,
        arithmetic=backend.capabilities().arithmetic,
        context=args.context,
        routing=routing,
    )
    facts = {"model": str(args.model), **facts}
    print(json.dumps(facts) if args.json else as_text(str(args.model), facts))
    return 0


def _model(path: Path) -> tuple[ModelConfig, ModelBytes, Checkpoint | None]:
    from k2lite.loading import open_model
    from k2lite.model_sizes import EMBEDDINGS, published_sizes
    from k2lite.placement import WeightBytes
    from k2lite.planning import ModelBytes

    if path.is_dir():
        config, checkpoint = open_model(path)
        checkpoint.raise_for_problems()
        embeddings = checkpoint.trunk_module(EMBEDDINGS).nbytes
        return config, ModelBytes(WeightBytes.of(config, checkpoint), embeddings), checkpoint
    from k2lite.config import parse_config
    from k2lite.config_reader import read_object
    from k2lite.offload.slots import rounded_out
    from k2lite.quant.types import Extent

    raw = read_object(path)
    config = parse_config(raw, path)
    sizes = published_sizes(config, raw)
    slot = rounded_out(Extent(path, 1, sizes.expert))[1]  # in one run, wherever it begins
    experts = len(config.moe_layers) * config.n_routed_experts
    return config, ModelBytes(WeightBytes(str(path), sizes.trunk, sizes.experts, slot, experts), sizes.embeddings), None


def _machine(args: argparse.Namespace, backend: Backend, checkpoint: Checkpoint | None) -> Machine:
    from dataclasses import replace

    from k2lite.byte_sizes import parse_bytes
    from k2lite.machine import read_machine, this_machine
    from k2lite.offload.drive_rate import store_rate
    from k2lite.offload.store import ExpertStore
    from k2lite.placement import spare_bytes

    ram = None if args.ram is None else parse_bytes(args.ram)
    if args.machine is not None:
        machine = read_machine(args.machine)
        return machine if ram is None else replace(machine, memory_bytes=ram)
    if checkpoint is None:
        raise RequestError(
            "a config.json has no weights to measure the drive with; describe the machine in a file and name it with "
            "--machine (k2lite plan --help says what it holds)"
        )
    store = ExpertStore(checkpoint)
    try:
        print("k2lite plan: measuring memory and drive", file=sys.stderr)
        rate = store_rate(store)
    finally:
        store.close()
    return this_machine(spare_bytes(backend.memory()) if ram is None else ram, rate)
