"""Safetensors files that are headers and holes: any size of checkpoint, in a few kilobytes of disk."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4, "I64": 8, "U8": 1}
Entry = tuple[str, tuple[int, ...]]  # dtype, shape


def header_bytes(header: Any) -> bytes:
    """The length and the JSON, padded with spaces to 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def layout(tensors: Mapping[str, Entry]) -> tuple[dict[str, Any], int]:
    """A header for tensors one after another, and their bytes in sum."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header, at


def write_sparse(path: Path, tensors: Mapping[str, Entry]) -> int:
    """A file of the right size whose tensors are holes (zeros that take no disk). Returns the tensors' bytes."""
    header, nbytes = layout(tensors)
    head = header_bytes(header)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + nbytes)
    return nbytes


def write_sparse_folder(folder: Path, shards: Mapping[str, Mapping[str, Entry]]) -> int:
    """Sparse shards and their index; returns the tensors' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(write_sparse(folder / file, tensors) for file, tensors in shards.items())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def inventory_tensors(patterns: list[dict[str, Any]], *, layers: int = 61, experts: int = 384) -> dict[str, Entry]:
    """Every tensor of a published checkpoint from tensor_inventory.json's patterns, each layer's together."""
    by_layer: dict[int, dict[str, Entry]] = {}
    for item in patterns:
        entry = item["dtype"], tuple(item["shape"])
        for layer, name in _expand(item["pattern"], item["copies"], layers, experts):
            by_layer.setdefault(layer, {})[name] = entry
    return {name: entry for layer in sorted(by_layer) for name, entry in by_layer[layer].items()}


def _expand(pattern: str, copies: int, layers: int, experts: int) -> Iterator[tuple[int, str]]:
    if ".blocks.B." in pattern:
        yield from ((layers + 1, pattern.replace(".B.", f".{block}.")) for block in range(copies))
    elif ".experts.E." in pattern:
        for layer in range(layers - copies // experts, layers):
            at = pattern.replace(".N.", f".{layer}.")
            yield from ((layer, at.replace(".E.", f".{expert}.")) for expert in range(experts))
    elif ".N." in pattern:
        yield from ((layer, pattern.replace(".N.", f".{layer}.")) for layer in range(layers - copies, layers))
    else:
        yield (0 if ".layers.0." in pattern else layers), pattern
