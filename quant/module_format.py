"""Decides how a weight is stored from the tensors that are there, and says what is wrong with them.

The tensors' own names and dtypes decide; the shape must be the config's and the declaration must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch

from .errors import CheckpointError
from .formats import PACKED_INT, QuantFormat, Shape, format_named
from .fp8 import COMPRESSED_TENSORS_SCALE, SCALE, Fp8Block
from .plain import PLAIN_DTYPES
from .quantization_config import QuantizationConfig
from .safetensors_file import TensorRecord

QUANT_SUFFIXES = ("weight_scale_inv", "weight_packed", "weight_scale", "weight_shape")
_PLAIN_NAMES = {dtype: name for name, dtype in PLAIN_DTYPES.items()}
_FP8_SUFFIXES = {SCALE: {"weight", SCALE}, COMPRESSED_TENSORS_SCALE: {"weight", COMPRESSED_TENSORS_SCALE}}
_PACKED_SUFFIXES = {"weight_packed", "weight_scale", "weight_shape"}


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
    wanted = declared.format_of(module) if declared else None
    try:
        found = _by_suffixes(shape, records, wanted)
        parts = found.parts(shape)
    except CheckpointError as error:
        return None, [(None, str(error))]
    problems = [*_part_problems(parts, records), *_declaration_problems(found, declared, wanted, quantizable)]
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
    found: QuantFormat, declared: QuantizationConfig | None, wanted: str | None, quantizable: bool
) -> Iterator[tuple[str | None, str]]:
    if found.name in PLAIN_DTYPES:
        return
    if not quantizable:
        yield None, f"is stored as {found.name}, expected bf16, f16 or f32"
    elif declared is None:
        yield None, f"is stored as {found.name}, and config.json has no quantization_config"
    elif wanted != found.name:
        yield None, f"is stored as {found.name}, which config.json's quantization_config does not say of it"
    elif isinstance(found, Fp8Block) and found.scale_suffix != declared.fp8_scale_suffix:
        # other readers would not find the scale and take the codes for the weights
        yield found.scale_suffix, f"must be named {declared.fp8_scale_suffix} with quant_method {declared.method!r}"


def _by_suffixes(shape: Shape, records: Mapping[str, TensorRecord], wanted: str | None) -> QuantFormat:
    suffixes = set(records)
    if suffixes == {"weight"}:
        dtype = records["weight"].dtype
        if dtype not in _PLAIN_NAMES:
            fp8 = f"a {SCALE} (or, in compressed-tensors, {COMPRESSED_TENSORS_SCALE}) beside it"
            wants = fp8 if dtype == torch.float8_e4m3fn else "bfloat16, float16 or float32"
            raise CheckpointError(f"has a weight of dtype {_dtype_name(dtype)}, expected {wants}")
        return format_named(_PLAIN_NAMES[dtype])
    for scale_suffix, expected in _FP8_SUFFIXES.items():
        if suffixes == expected:
            return Fp8Block(scale_suffix)
    if suffixes == _PACKED_SUFFIXES:
        return format_named(_packed_name(shape, records["weight_packed"].shape, records["weight_scale"].shape, wanted))
    choices = [{"weight"}, *_FP8_SUFFIXES.values(), _PACKED_SUFFIXES]
    raise CheckpointError(
        f"has {', '.join(sorted(suffixes)) or 'no tensor'}, "
        f"expected {'; or '.join(', '.join(sorted(choice)) for choice in choices)}"
    )


def _packed_name(shape: Shape, packed: Shape, scale: Shape, wanted: str | None) -> str:
    """The packed format with these tensors' shapes. Where two have them (a row of 128 columns is one group), or none
    has, it is the one that the declaration wants: what does not fit is then told tensor by tensor."""
    fitting = _fitting_names(shape, packed, scale)
    if wanted is not None and wanted in (fitting or PACKED_INT):
        return wanted
    if fitting:
        return fitting[0]
    raise CheckpointError(
        f"has weight_packed of shape {list(packed)} and weight_scale of shape {list(scale)}, which "
        f"none of {', '.join(PACKED_INT)} has for a weight of shape {list(shape)}"
    )


@lru_cache(maxsize=256)
def _fitting_names(shape: Shape, packed: Shape, scale: Shape) -> tuple[str, ...]:
    """A big checkpoint asks a hundred thousand times for few shapes."""
    fitting = []
    for name in PACKED_INT:
        try:
            parts = format_named(name).parts(shape)
        except CheckpointError:
            continue
        if (parts["weight_packed"][1], parts["weight_scale"][1]) == (packed, scale):
            fitting.append(name)
    return tuple(fitting)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
