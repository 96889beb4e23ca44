"""The words that quant, backends and offload share: which expert, which bytes, which numbers.

Plain frozen data. Knows nothing of files being open, of devices or of arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .formats import QuantFormat

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class ExpertKey(NamedTuple):
    """One routed expert: the layer's number in the model (dense layers count) and the expert's in the layer."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in a file."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PartView:
    """Where one stored tensor lies: `offset` bytes into extent number `extent` of its layout."""

    extent: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A weight matrix as stored. `shape` is [out, in]; `parts` are named by the checkpoint's own suffixes
    ("weight", "weight_scale_inv", "weight_packed", ...). `derived` is a backend's, for what it works out once from the
    others; it lives as long as they do and is not copied."""

    format: QuantFormat
    shape: tuple[int, ...]
    parts: Mapping[str, torch.Tensor]
    derived: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def dequantize(self) -> torch.Tensor:
        """The values in float32, [out, in]."""
        return self.format.dequantize(self.parts, self.shape)


class ExpertWeights(NamedTuple):
    """The three matrices of one expert."""

    gate_proj: QuantTensor
    up_proj: QuantTensor
    down_proj: QuantTensor


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where one expert lies on disk: its extents, coalesced into the fewest runs, and every part as a view
    into them, keyed by (projection, suffix). `checksum` is what the manifest says of it, if it does (checksums.py)."""

    key: ExpertKey
    extents: tuple[Extent, ...]
    parts: Mapping[tuple[str, str], PartView]
    formats: Mapping[str, QuantFormat]
    shapes: Mapping[str, tuple[int, int]]
    checksum: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all extents: what one read of this expert moves."""
        return sum(extent.nbytes for extent in self.extents)
