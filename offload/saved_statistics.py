"""Statistics kept from one run for the next: what policy, counts and predictor learned of one model's routing.

Invariant: they warm-start a model of the same kind, layers and number of experts only; they change speed, never tokens.
Knows no slots: who was resident is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from k2lite.quant.errors import RequestError

from .array_file import read_arrays, write_arrays
from .policy import State
from .routing_trace import TracedModel

KIND = "routing_statistics"


def save_statistics(path: Path, model: TracedModel, parts: Mapping[str, State]) -> None:
    """Keep the states of `parts`, for example {"policy.hazard": policy.state(), "router": stats.state()}; a part's name
    may hold dots, an array's may not. Raises RequestError where the file can't be written."""
    arrays = {f"{part}.{name}": array for part, state in parts.items() for name, array in state.items()}
    write_arrays(path, KIND, _facts(model), arrays)


def load_statistics(path: Path, model: TracedModel) -> dict[str, State]:
    """The parts, each for its owner's `restore`. Raises RequestError where the file is damaged or another model's."""
    facts, arrays = read_arrays(path, KIND)
    for key, expected in _facts(model).items():
        if facts.get(key) != expected:
            raise RequestError(f"{path}: statistics of another model: {key} is {facts.get(key)}, expected {expected}")
    parts: dict[str, State] = {}
    for full_name, array in arrays.items():
        part, _, name = full_name.rpartition(".")
        parts.setdefault(part, {})[name] = array
    return parts


def _facts(model: TracedModel) -> dict[str, object]:
    """A model's name and its experts' bytes are left out: a quantized copy routes as the original does."""
    return {"model_type": model.model_type, "layers": list(model.layers), "n_experts": model.n_experts}
