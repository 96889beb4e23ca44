"""Decides how a weight is stored from the tensors that are there, and says what is wrong with them.

The tensors' own names and dtypes decide; the shape must be the config's and the declaration must agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .errors import CheckpointError
from .formats import FP8_NAME, QuantFormat, Shape, format_named
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
) -> tuple[QuantFormat | None, list[str]]:
    """The format of `module`, a stored name, whose tensors by suffix are `records`, and the problems found. The format
    is None where it can't be told."""
    try:
        found = _by_suffixes(shape, records)
        parts = found.parts(shape)
    except CheckpointError as error:
        return None, [str(error)]
    problems = []
    for suffix, (dtype, part_shape) in parts.items():
        record = records[suffix]
        dtypes = {dtype, torch.int64} if suffix == "weight_shape" else {dtype}
        if record.dtype not in dtypes:
            problems.append(f"{suffix} is {_dtype_name(record.dtype)}, expected {_dtype_name(dtype)}")
        if record.shape != part_shape:
            problems.append(f"{suffix} has shape {list(record.shape)}, expected {list(part_shape)}")
    if found.name not in PLAIN_DTYPES:
        if not quantizable:
            problems.append(f"is stored as {found.name}, expected bf16, f16 or f32")
        elif declared is None or not declared.allows(module, found.name):
            says = "has no quantization_config" if declared is None else f"({declared.method}) does not say so"
            problems.append(f"is stored as {found.name}, and config.json {says}")
    return found, problems


def _by_suffixes(shape: Shape, records: Mapping[str, TensorRecord]) -> QuantFormat:
    suffixes = set(records)
    if suffixes == {"weight"}:
        dtype = records["weight"].dtype
        if dtype not in _PLAIN_NAMES:
            wants = "a weight_scale_inv beside it" if dtype == torch.float8_e4m3fn else "BF16, F16 or F32"
            raise CheckpointError(f"weight is {_dtype_name(dtype)}, expected {wants}")
        return format_named(_PLAIN_NAMES[dtype])
    if suffixes == _FP8_SUFFIXES:
        return format_named(FP8_NAME)
    if suffixes == _INT4_SUFFIXES:
        scale = records["weight_scale"].shape
        groups = scale[1] if len(scale) == 2 else 0
        group_size = shape[1] // groups if groups else 0
        return format_named(f"int4_g{group_size}")
    raise CheckpointError(
        f"has {', '.join(sorted(suffixes)) or 'no tensor'}, expected weight; or {', '.join(sorted(_FP8_SUFFIXES))}; "
        f"or {', '.join(sorted(_INT4_SUFFIXES))}"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
