"""The machine that a plan is for: this one, measured, or one that a JSON file describes.

    {"name": "desktop", "ram": "128GB", "ram_gb_per_s": 70, "drive_gb_per_s": 6.5, "tflops": 1,
     "reserve": "8GB", "vram": "24GB", "vram_gb_per_s": 806, "bus_gb_per_s": 25, "host_tflops": 1, "layer_ms": 0.25}

The last six may be left out: no reserve, no accelerator, 0.1 ms a layer. Units are GB/s (1e9) and 1e12 operations/s;
tflops are the accelerator's if there is one, and host_tflops the processor's beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k2lite.backends.base import Backend
from k2lite.quant.errors import ConfigError
from k2lite.quant.file_reading import read_json_object, shown
from k2lite.quant.formats import format_named
from k2lite.quant.types import QuantTensor

from .byte_sizes import parse_bytes
from .speed_model import Bandwidths

_REQUIRED = ("ram", "ram_gb_per_s", "drive_gb_per_s", "tflops")
_OPTIONAL = ("name", "reserve", "vram", "vram_gb_per_s", "bus_gb_per_s", "host_tflops", "layer_ms")
LAYER_S = 0.1e-3
_SUM_BYTES = 256 << 20
# As many as one expert gets of a long prompt, and a few times more.
_ROWS = 64


@dataclass(frozen=True)
class Machine:
    """`memory_bytes` is what may be taken of RAM, `device_bytes` of an accelerator's memory (0: there is none)."""

    name: str
    memory_bytes: int
    device_bytes: int
    rates: Bandwidths


def read_machine(path: Path) -> Machine:
    """A machine from a file. Raises ConfigError naming the key."""
    raw = read_json_object(path, ConfigError)
    unknown = sorted(set(raw) - {*_REQUIRED, *_OPTIONAL})
    if unknown:
        raise ConfigError(
            f"{path}: {', '.join(map(shown, unknown))}: unknown; known: {', '.join(_REQUIRED + _OPTIONAL)}"
        )
    for key in _REQUIRED:
        if key not in raw:
            raise ConfigError(f"{path}: {key} is missing; a machine has {', '.join(_REQUIRED)}")
    device = _size(path, raw, "vram")
    if device and not {"vram_gb_per_s", "bus_gb_per_s"} <= set(raw):
        raise ConfigError(f"{path}: vram needs vram_gb_per_s and bus_gb_per_s")
    memory = _size(path, raw, "ram") - _size(path, raw, "reserve")
    rates = Bandwidths(
        memory=_number(path, raw, "ram_gb_per_s") * 1e9,
        drive=_number(path, raw, "drive_gb_per_s") * 1e9,
        flops=_number(path, raw, "tflops") * 1e12,
        layer_s=_number(path, raw, "layer_ms") / 1e3 if "layer_ms" in raw else LAYER_S,
        one_bus=not device,
        device=_number(path, raw, "vram_gb_per_s") * 1e9 if device else 0.0,
        bus=_number(path, raw, "bus_gb_per_s") * 1e9 if device else 0.0,
        host_flops=_number(path, raw, "host_tflops") * 1e12 if "host_tflops" in raw else 0.0,
    )
    return Machine(str(raw.get("name", path.stem)), max(0, memory), device, rates)


def this_machine(memory_bytes: int, drive_bytes_per_s: float, backend: Backend | None = None) -> Machine:
    """This machine; memory and arithmetic, that of `backend` if it is the processor's, are measured in about a
    second."""
    rates = Bandwidths(measure_memory(), drive_bytes_per_s, measure_flops(backend), LAYER_S, one_bus=True)
    return Machine("this machine", memory_bytes, 0, rates)


def measure_memory() -> float:
    """Bytes a second that all threads together read: the best of a few sums over touched memory."""
    values = torch.ones(_SUM_BYTES // 4, dtype=torch.float32)
    with _all_threads():
        return _SUM_BYTES / _best(lambda: values.sum(), 5)


def measure_flops(backend: Backend | None = None) -> float:
    """Operations a second of a product as wide as an expert of Kimi-K2's, by the kernels that will do it: INT4 or
    BF16, the first that `backend` takes. Without one, or with an accelerator's, of torch in BF16."""
    shape = (2048, 7168)
    if backend is None or backend.device.type != "cpu":
        x, weight = torch.ones(_ROWS, shape[1], dtype=torch.bfloat16), torch.ones(shape, dtype=torch.bfloat16)
        with _all_threads():
            return 2 * _ROWS * math.prod(shape) / _best(lambda: x @ weight.T, 3)
    known = backend.capabilities().formats
    form = next((format_named(name) for name in ("int4_g32", "bf16") if name in known), format_named("f32"))
    parts = {suffix: torch.ones(size, dtype=dtype) for suffix, (dtype, size) in form.parts(shape).items()}
    stored, rows = backend.upload_matrix(QuantTensor(form, shape, parts)), torch.ones(_ROWS, shape[1])
    return 2 * _ROWS * math.prod(shape) / _best(lambda: backend.linear(rows, stored), 3)


@contextmanager
def _all_threads() -> Iterator[None]:
    """torch has one thread beside the CPU backend's own; for a yardstick it gets as many as that has."""
    from k2lite.backends.cpu.compute_team import allowed_threads

    before = torch.get_num_threads()
    torch.set_num_threads(allowed_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(work: Any, times: int) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def _size(path: Path, raw: dict[str, Any], key: str) -> int:
    value = raw.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f'{path}: {key} is {shown(value)}; write it as "128GB" or as bytes')
    return parse_bytes(value)


def _number(path: Path, raw: dict[str, Any], key: str) -> float:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigError(f"{path}: {key} is {shown(value)}; supported: a number greater than 0")
    return float(value)
