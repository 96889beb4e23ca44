"""What a checkpoint folder must hold, in names and shapes. Made from a model's config by whoever knows the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .types import PROJECTIONS


@dataclass(frozen=True, slots=True)
class TrunkSpec:
    """A trunk tensor's shape, and whether it may be stored in a quantized format."""

    shape: tuple[int, ...]
    quantizable: bool


@dataclass(frozen=True, slots=True)
class IgnoredTensor:
    """Stored names that match `pattern` in full are known and not needed to run the text model, for `reason`. What is
    `carried` is a part of the model that a copy of the folder must not lose."""

    pattern: str
    reason: str
    carried: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointSchema:
    """`trunk` is keyed by canonical name: the stored name without `prefix`. Routed experts are
    model.layers.{layer}.mlp.experts.{expert}.{projection}.*, with gate_proj and up_proj
    [moe_intermediate_size, hidden_size] and down_proj the other way round."""

    prefix: str
    trunk: Mapping[str, TrunkSpec]
    expert_layers: tuple[int, ...]
    n_routed_experts: int
    hidden_size: int
    moe_intermediate_size: int
    ignored: tuple[IgnoredTensor, ...]

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """[out, in] of one projection of a routed expert."""
        if projection == "down_proj":
            return self.hidden_size, self.moe_intermediate_size
        return self.moe_intermediate_size, self.hidden_size

    def matrix_widths(self) -> dict[str, int]:
        """Inputs of every matrix that may be quantized, by its stored name without ".weight"."""
        trunk = {name: spec.shape[1] for name, spec in self.trunk.items() if spec.quantizable}
        widths = {self.prefix + name.removesuffix(".weight"): width for name, width in trunk.items()}
        for layer in self.expert_layers:
            for expert in range(self.n_routed_experts):
                at = f"{self.prefix}model.layers.{layer}.mlp.experts.{expert}"
                widths |= {f"{at}.{name}": self.projection_shape(name)[1] for name in PROJECTIONS}
        return widths
