"""What speed a loaded engine's plan allows on this machine, from bandwidths measured now.

Invariant: it is told and decides nothing, since what k2lite chooses never depends on a timing.
"""

from __future__ import annotations

import math
from typing import Any

from k2lite.offload.cache import ExpertCache
from k2lite.offload.drive_rate import store_rate
from k2lite.offload.store import ExpertStore

from .engine import Engine
from .machine import LAYER_S, Machine, measure_flops, measure_memory
from .model_sizes import EMBEDDINGS
from .placement import WeightBytes
from .planning import ModelBytes, speeds
from .speed_model import Bandwidths

# A start must not wait for its own forecast.
QUICK_S, RATE_S = 0.2, 1.0


def engine_cache(engine: Engine) -> ExpertCache:
    """The cache of an engine that `load` made."""
    if not isinstance(engine.experts, ExpertCache):
        raise TypeError("only an engine with an ExpertCache can be measured")
    return engine.experts


def measure_rates(engine: Engine, *, quick: bool = False) -> Bandwidths:
    """Of memory and of the drives that hold the experts. `quick` takes about a third of a second: the drive is left
    out (infinite) where all experts fit, arithmetic always. Raises CheckpointError where an expert can't be read."""
    drive = math.inf
    if not (quick and engine.placement.everything_fits):
        ours = engine_cache(engine).store
        # its own: what is read here is no part of a run
        store = ExpertStore(ours.checkpoint, mirror=ours.mirror, packed=ours.packed)
        try:
            drive = store_rate(store, seconds=QUICK_S if quick else RATE_S)
        finally:
            store.close()
    return Bandwidths(
        measure_memory(), drive, math.inf if quick else measure_flops(engine.backend), LAYER_S, one_bus=True
    )


def model_bytes(engine: Engine) -> ModelBytes:
    """The bytes that the plan of a loaded engine counted."""
    plan, checkpoint = engine.placement, engine_cache(engine).store.checkpoint
    weights = WeightBytes(
        str(checkpoint.folder), plan.all_trunk_bytes, plan.experts_bytes, plan.slot_bytes, plan.experts
    )
    return ModelBytes(weights, checkpoint.trunk_module(EMBEDDINGS).nbytes)


def predicted_speeds(engine: Engine, rates: Bandwidths) -> dict[str, Any]:
    """As `plan --json` has them; {} for a model without routed experts."""
    if not engine.placement.experts_bytes:
        return {}
    machine = Machine("this machine", engine.placement.budget_bytes, 0, rates)
    return speeds(engine.config, model_bytes(engine), machine, engine.placement)


def expected(engine: Engine) -> str:
    """The part of a line that tells what to expect of decode; empty where there is nothing to say, and where a device
    takes part, whose bandwidths a start does not measure."""
    if engine.placement.device is not None:
        return ""
    found = predicted_speeds(engine, measure_rates(engine, quick=True))
    if not found:
        return ""
    low, middle, high = (found["decode"][curve]["best"] for curve in ("low", "middle", "high"))
    return f"; memory and drive allow {middle:.3g} tok/s ({low:.3g} to {high:.3g})"
