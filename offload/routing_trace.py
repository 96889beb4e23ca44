"""A routing trace: which experts each token chose in each MoE layer, and of which model.

Two forms are read. k2lite's own (`kind` routing_trace, a safetensors file): `ids` uint16 [T, L, K], ascending in each
choice, `weights` float16 [T, L, K] where they were kept, and the facts of `TracedModel`. And JSON lines as other
projects publish them: an object a token whose "layers" is a list of L lists of K expert ids ("tok", the token's number,
and other keys are ignored); it doesn't say how many experts there are.
Invariant: in a trace that was read every id is an expert, and none occurs twice in a choice.

Shapes: T tokens, L MoE layers, K active experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from k2lite.quant.errors import RequestError
from k2lite.quant.file_reading import parse_json_object, shown

from .array_file import read_arrays, write_arrays

KIND = "routing_trace"
MAX_EXPERTS = 1 << 16
# JSON lines show the largest id only: the number of experts is taken to be a multiple of this
EXPERTS_STEP = 32


@dataclass(frozen=True)
class TracedModel:
    """Which model was traced. `layers` are its MoE layers by number; `expert_bytes` is 0 where it is not known."""

    name: str
    model_type: str
    layers: tuple[int, ...]
    n_experts: int
    expert_bytes: int = 0


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    ids: npt.NDArray[np.uint16]  # [T, L, K]
    model: TracedModel
    weights: npt.NDArray[np.float16] | None = None  # [T, L, K]

    def __post_init__(self) -> None:
        """Raises ValueError where arrays and facts contradict one another."""
        ids, model = self.ids, self.model
        if ids.ndim != 3 or ids.dtype != np.uint16 or 0 in ids.shape:
            raise ValueError(f"ids {ids.dtype} {list(ids.shape)}, expected uint16 [tokens, layers, k], none of them 0")
        if ids.shape[1] != len(model.layers):
            raise ValueError(f"ids of {ids.shape[1]} layers for a model of {len(model.layers)}")
        if not 1 <= model.n_experts <= MAX_EXPERTS:
            raise ValueError(f"{model.n_experts} experts, expected 1 to {MAX_EXPERTS}")
        if int(ids.max()) >= model.n_experts:
            raise ValueError(f"expert {ids.max()} of a model that has {model.n_experts}")
        ordered = np.sort(ids, axis=2)
        if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
            raise ValueError("an expert occurs twice in one token's choice")
        if self.weights is not None and self.weights.shape != ids.shape:
            raise ValueError(f"weights {list(self.weights.shape)} for ids {list(ids.shape)}")

    def write(self, path: Path) -> None:
        """Put the trace in place whole. Raises RequestError where it can't be written."""
        arrays: dict[str, npt.NDArray[Any]] = {"ids": self.ids}
        if self.weights is not None:
            arrays["weights"] = self.weights
        write_arrays(path, KIND, asdict(self.model), arrays)


def read_trace(path: Path, *, n_experts: int | None = None) -> RoutingTrace:
    """A trace in either form. `n_experts` says what JSON lines don't. Raises RequestError."""
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise RequestError(f"{path}: can't be read: {error.strerror or error}") from error
    if first == b"{":
        return _read_json_lines(path, n_experts)
    facts, arrays = read_arrays(path, KIND)
    model = _model_of(path, facts)
    if n_experts is not None and n_experts != model.n_experts:
        raise RequestError(f"{path}: the trace says {model.n_experts} experts, not {n_experts}")
    ids, weights = arrays.get("ids"), arrays.get("weights")
    if ids is None:
        raise RequestError(f"{path}: found no array 'ids'")
    try:
        return RoutingTrace(ids, model, weights)  # type: ignore[arg-type]  # its own check
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error


def _model_of(path: Path, facts: dict[str, Any]) -> TracedModel:
    kinds: dict[str, type] = {"name": str, "model_type": str, "layers": list, "n_experts": int, "expert_bytes": int}
    for field in fields(TracedModel):
        if type(facts.get(field.name)) is not kinds[field.name]:
            found, expected = shown(facts.get(field.name)), kinds[field.name].__name__
            raise RequestError(f"{path}: facts: {field.name} is {found}, expected {expected}")
    if not all(type(layer) is int for layer in facts["layers"]):
        raise RequestError(f"{path}: facts: layers is {shown(facts['layers'])}, expected integers")
    return TracedModel(**{**{name: facts[name] for name in kinds}, "layers": tuple(facts["layers"])})


def _read_json_lines(path: Path, n_experts: int | None) -> RoutingTrace:
    tokens: list[npt.NDArray[np.int64]] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    tokens.append(_choices(line, f"{path}: line {number}"))
                    if tokens[-1].shape != tokens[0].shape:
                        found, expected = list(tokens[-1].shape), list(tokens[0].shape)
                        raise RequestError(f"{path}: line {number}: layers x k is {found}, before it was {expected}")
    except OSError as error:
        raise RequestError(f"{path}: can't be read: {error.strerror or error}") from error
    ids = np.stack(tokens)
    largest = int(ids.max(initial=0))
    if n_experts is None:
        n_experts = -(-(largest + 1) // EXPERTS_STEP) * EXPERTS_STEP
    model = TracedModel(path.stem, "unknown", tuple(range(ids.shape[1])), n_experts)
    if largest >= MAX_EXPERTS or int(ids.min(initial=0)) < 0:
        raise RequestError(f"{path}: expert ids from {ids.min()} to {largest}, expected 0 to {MAX_EXPERTS - 1}")
    try:
        return RoutingTrace(np.sort(ids, axis=2).astype(np.uint16), model)
    except ValueError as error:
        raise RequestError(f"{path}: {error}") from error


def _choices(line: bytes, where: str) -> npt.NDArray[np.int64]:
    """One token's ids [L, K]."""
    layers = parse_json_object(line, where, RequestError).get("layers")
    good = isinstance(layers, list) and all(
        isinstance(layer, list) and len(layer) == len(layers[0]) and all(type(expert) is int for expert in layer)
        for layer in layers
    )
    if not good or not layers or not layers[0]:
        raise RequestError(f'{where}: "layers" is {shown(layers)}, expected lists of as many expert ids each')
    try:
        return np.array(layers, dtype=np.int64)
    except OverflowError as error:
        raise RequestError(f"{where}: an expert id is beyond all integers") from error
