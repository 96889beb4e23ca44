"""Where one routed expert lies on disk, in the fewest reads, and its views once the bytes are in memory.

Parts that lie next to one another become one extent; a small gap is read along, because a request costs more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from .errors import CheckpointError
from .file_reading import read_exactly
from .formats import QuantFormat
from .safetensors_file import TensorRecord
from .types import PROJECTIONS, ExpertKey, ExpertLayout, ExpertWeights, Extent, PartView, QuantTensor

# An NVMe drive moves this in a few microseconds, and takes tens for one more request.
MAX_GAP_BYTES = 16 * 1024


def expert_layout(
    key: ExpertKey,
    stored: Mapping[tuple[str, str], tuple[Path, TensorRecord]],
    formats: Mapping[str, QuantFormat],
    shapes: Mapping[str, tuple[int, int]],
    checksum: str | None = None,
) -> ExpertLayout:
    """Coalesce an expert's stored tensors, by (projection, suffix), into extents and views."""
    extents = expert_extents(stored.values())
    parts = {part: _place(record, path, extents) for part, (path, record) in stored.items()}
    return ExpertLayout(key, extents, parts, formats, shapes, checksum)


def expert_extents(stored: Iterable[tuple[Path, TensorRecord]]) -> tuple[Extent, ...]:
    """The fewest runs that hold an expert's stored tensors, in the order of files and bytes."""
    runs: list[tuple[Path, int, int]] = []
    for path, record in sorted(stored, key=lambda item: (item[0], item[1].offset)):
        end = record.offset + record.nbytes
        if runs and runs[-1][0] == path and record.offset - runs[-1][2] <= MAX_GAP_BYTES:
            runs[-1] = (path, runs[-1][1], end)
        else:
            runs.append((path, record.offset, end))
    return tuple(Extent(path, start, end - start) for path, start, end in runs)


def _place(record: TensorRecord, path: Path, extents: Sequence[Extent]) -> PartView:
    for number, extent in enumerate(extents):
        at = record.offset - extent.offset
        if extent.file == path and at >= 0 and at + record.nbytes <= extent.nbytes:
            return PartView(number, at, record.dtype, record.shape)
    raise ValueError(f"tensor {record.name} lies in no extent of its expert")


def read_extents(layout: ExpertLayout) -> list[torch.Tensor]:
    """Read each extent into memory of its own, uint8. Raises CheckpointError naming file and expert."""
    buffers = []
    for extent in layout.extents:
        buffer = torch.empty(extent.nbytes, dtype=torch.uint8)
        read_exactly(extent.file, extent.offset, buffer, _name(layout.key))
        buffers.append(buffer)
    return buffers


def expert_weights(layout: ExpertLayout, buffers: Sequence[torch.Tensor]) -> ExpertWeights:
    """Views into `buffers`, one uint8 tensor an extent. A part whose place in its extent does not suit its dtype is
    copied: safetensors promises no alignment."""

    def tensor(projection: str) -> QuantTensor:
        parts = {
            suffix: _view(buffers[view.extent], view)
            for (owner, suffix), view in layout.parts.items()
            if owner == projection
        }
        if (shape := layout.parts.get((projection, "weight_shape"))) is not None:
            where = f"{layout.extents[shape.extent].file}: {_name(layout.key)}, {projection}"
            check_weight_shape(parts, layout.shapes[projection], where)
        return QuantTensor(layout.formats[projection], layout.shapes[projection], parts)

    return ExpertWeights(*map(tensor, PROJECTIONS))


def check_weight_shape(parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], what: str) -> None:
    """Compressed-tensors stores a packed weight's shape as a tensor: it must be the one the config gives."""
    if "weight_shape" in parts and tuple(parts["weight_shape"].tolist()) != shape:
        found = parts["weight_shape"].tolist()
        raise CheckpointError(f"{what}: weight_shape holds {found}, expected {list(shape)}; download the file again")


def _view(buffer: torch.Tensor, view: PartView) -> torch.Tensor:
    size = view.dtype.itemsize
    for length in view.shape:
        size *= length
    raw = buffer[view.offset : view.offset + size]
    # torch asks for the second, processors for the first; they differ where a buffer is a slice of an arena
    if raw.data_ptr() % view.dtype.itemsize or raw.storage_offset() % view.dtype.itemsize:
        raw = raw.clone()
    return raw.view(view.dtype).view(view.shape)


def _name(key: ExpertKey) -> str:
    return f"layer {key.layer}, expert {key.expert}"
