"""The one place that knows torch.mlu: whether there is a chip, which, and its memory. Not run on hardware.

The names are torch_mlu's (public snapshot of 2024-09), which mirror those for CUDA.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from k2lite.quant.errors import BackendError

from ..spec import Device, Probe
from ..torch_device.torch_pinned import TorchPinnedRuntime
from .adapter import Operations


class MluRuntime(TorchPinnedRuntime):
    """Chip number `index`."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(_mlu(), "mlu", index)


def probe(torch_mlu: str, operations: ModuleType, nodes: Path = Path("/dev")) -> Probe:
    """torch_mlu: the package with its version; operations: torch_mlu_ops, imported like it."""
    try:
        Operations(operations)
    except BackendError as error:
        return Probe(False, str(error), error=error)
    mlu = _mlu()
    if not mlu.is_available():
        found = sorted(nodes.glob("cambricon_dev[0-9]*"))
        if not found:
            return Probe(False, f"{torch_mlu} finds no chip: there is no device node {nodes}/cambricon_dev*")
        closed = [str(node) for node in found if not os.access(node, os.R_OK | os.W_OK)]
        why = f"no permission for {', '.join(closed)}" if closed else f"{found[0]} is there; see cnmon"
        return Probe(False, f"{torch_mlu} finds no chip: {why}")
    names = [str(mlu.get_device_name(index)) for index in range(mlu.device_count())]
    devices = tuple(Device(name, torch_mlu, int(mlu.mem_get_info(at)[1])) for at, name in enumerate(names))
    said = f"{torch_mlu}, {names[0]}; emulated only: please run k2lite backends test cambricon"
    return Probe(True, said, devices)


def _mlu() -> Any:
    return torch.mlu  # type: ignore[attr-defined]
