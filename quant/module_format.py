"""Decides how a weight is stored from the tensors that are there, and says what is wrong with them.

The tensors' own names and dtypes decide; the shape must be the config's and the declaration must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from .errors import CheckpointError
from .formats import FP8_NAME, INT4_NAMES, QuantFormat, Shape, format_named
from .plain import PLAIN_DTYPES
from .quantization_config import QuantizationConfig
from .safetensors_file import TensorRecord

QUANT_SUFFIXES = ("weight_scale_inv", "weight_packed", "weight_scale", "weight_shape")
_PLAIN_NAMES = {dtype: name for name, dtype in PLAIN_DTYPES.items()}
_FP8_SUFFIXES = {"weight", "weight_scale_inv"}
_INT4_SUFFIXES = {"weight_packed", "weight_scale", "weight_shape"}


def module_format(
    module: str,
    shape: Shape,
    records: Mapping[str, TensorRecord],
    declared: QuantizationConfig | None,
    *,
    quantizable: bool,
) -> tuple[QuantFormat | None, list[tuple[str | None, str]]]:
    """The format of `module`, a stored name, whose tensors by suffix are `records`, and the problems found: each is a
    suffix, None where it is the whole module's, and a sentence. The format is None if there are any."""
    try:
        found = _by_suffixes(shape, records)
        parts = found.parts(shape)
    except CheckpointError as error:
        return None, [(None, str(error))]
    problems = [*_part_problems(parts, records), *_declaration_problems(module, found, declared, quantizable)]
    return (None if problems else found), problems


def _part_problems(
    parts: Mapping[str, tuple[torch.dtype, Shape]], records: Mapping[str, TensorRecord]
) -> Iterator[tuple[str | None, str]]:
    for suffix, (dtype, part_shape) in parts.items():
        record = records[suffix]
        dtypes = {dtype, torch.int64} if suffix == "weight_shape" else {dtype}
        if record.dtype not in dtypes:
            yield suffix, f"has dtype {_dtype_name(record.dtype)}, expected {_dtype_name(dtype)}"
        if record.shape != part_shape:
            yield suffix, f"has shape {list(record.shape)}, expected {list(part_shape)}"


def _declaration_problems(
    module: str, found: QuantFormat, declared: QuantizationConfig | None, quantizable: bool
) -> Iterator[tuple[str | None, str]]:
    if found.name in PLAIN_DTYPES:
        return
    if not quantizable:
        yield None, f"is stored as {found.name}, expected bf16, f16 or f32"
    elif declared is None:
        yield None, f"is stored as {found.name}, and config.json has no quantization_config"
    elif not declared.allows(module, found.name):
        yield None, f"is stored as {found.name}, which config.json's quantization_config does not say of it"


def _by_suffixes(shape: Shape, records: Mapping[str, TensorRecord]) -> QuantFormat:
    suffixes = set(records)
    if suffixes == {"weight"}:
        dtype = records["weight"].dtype
        if dtype not in _PLAIN_NAMES:
            wants = "a weight_scale_inv beside it" if dtype == torch.float8_e4m3fn else "bfloat16, float16 or float32"
            raise CheckpointError(f"has a weight of dtype {_dtype_name(dtype)}, expected {wants}")
        return format_named(_PLAIN_NAMES[dtype])
    if suffixes == _FP8_SUFFIXES:
        return format_named(FP8_NAME)
    if suffixes == _INT4_SUFFIXES:
        return format_named(_int4_name(shape, records["weight_scale"].shape))
    raise CheckpointError(
        f"has {', '.join(sorted(suffixes)) or 'no tensor'}, expected weight; or {', '.join(sorted(_FP8_SUFFIXES))}; "
        f"or {', '.join(sorted(_INT4_SUFFIXES))}"
    )


def _int4_name(shape: Shape, scale: Shape) -> str:
    for name, group_size in INT4_NAMES.items():
        if len(shape) == 2 and scale == (shape[0], shape[1] // group_size) and not shape[1] % group_size:
            return name
    sizes = ", ".join(map(str, INT4_NAMES.values()))
    raise CheckpointError(
        f"has weight_scale of shape {list(scale)}, expected one scale for each {sizes} columns of {list(shape)}"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
