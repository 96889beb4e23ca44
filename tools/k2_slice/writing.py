"""Writes a slice: every shard's header first, then each weight's bytes at the places the header promised.

Invariant: a folder has its final name only when it is complete, fsynced and opens without a problem; what fails leaves
nothing. Memory holds one block of rows of one weight.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from k2lite.model_folder import open_model
from k2lite.quant.durable_files import write_new_folder
from k2lite.quant.errors import RequestError
from k2lite.text.byte_tokenizer import N_BYTES, write_byte_tokenizer

from .drawing import draw
from .layout import SHAPE_SUFFIX, ShardLayout, StoredTensor

Progress = Callable[[str, int], None]  # the file, and the bytes of the folder that are written once it is


def write_slice(
    folder: Path, config: dict[str, Any], shards: Sequence[ShardLayout], *, seed: int, progress: Progress
) -> None:
    """Write the folder, complete or not at all. Refuses a name that exists, unless it is an empty folder."""

    def fill(partial: Path) -> None:
        _check_space(partial, shards)
        _fill(partial, config, shards, seed, progress)
        open_model(partial)[1].raise_for_problems()

    write_new_folder(folder, fill)


def _check_space(folder: Path, shards: Sequence[ShardLayout]) -> None:
    needed = sum(len(shard.header) + shard.data_bytes for shard in shards)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RequestError(f"{folder.parent}: the slice needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")


def _fill(folder: Path, config: dict[str, Any], shards: Sequence[ShardLayout], seed: int, progress: Progress) -> None:
    done = 0
    for shard in shards:
        write_shard(folder / shard.file, shard, seed)
        done += len(shard.header) + shard.data_bytes
        progress(shard.file, done)
    index = {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }
    end_of_turn = N_BYTES + 2  # <|im_end|>
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"max_length": config["max_position_embeddings"], "eos_token_id": end_of_turn},
    )
    write_byte_tokenizer(folder)


def write_shard(path: Path, shard: ShardLayout, seed: int) -> None:
    """One file. Its space is taken at once, so that a full disk is met before the work."""
    start = len(shard.header)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.posix_fallocate(file, 0, start + shard.data_bytes)
        _write_at(file, 0, shard.header)
        places: dict[str, dict[str, StoredTensor]] = {}
        for tensor in shard.tensors:
            places.setdefault(tensor.weight.name, {})[tensor.suffix] = tensor
        for weight in shard.weights:
            here = places[weight.name]
            at = {suffix: start + tensor.offset for suffix, tensor in here.items()}
            for parts in draw(weight, seed):
                parts.pop(SHAPE_SUFFIX, None)  # of the block; the weight's own follows
                for suffix, part in parts.items():
                    at[suffix] += _write_at(file, at[suffix], _raw(part, here[suffix].dtype))
            if SHAPE_SUFFIX in here:
                whole = torch.tensor(weight.shape, dtype=here[SHAPE_SUFFIX].dtype)
                at[SHAPE_SUFFIX] += _write_at(file, at[SHAPE_SUFFIX], _raw(whole, whole.dtype))
            if any(at[suffix] != start + tensor.offset + tensor.nbytes for suffix, tensor in here.items()):
                raise AssertionError(f"{weight.format.name}: parts() and quantize() differ for {list(weight.shape)}")
    finally:
        os.close(file)


def _raw(part: torch.Tensor, dtype: torch.dtype) -> memoryview:
    if part.dtype != dtype:
        raise AssertionError(f"a part has dtype {part.dtype}, its header says {dtype}")
    return part.contiguous().flatten().view(torch.uint8).numpy().data


def _write_at(file: int, offset: int, content: bytes | memoryview) -> int:
    view = memoryview(content)
    written = 0
    while written < len(view):
        written += os.pwrite(file, view[written:], offset + written)
    return written


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
