"""The one place that knows torch.npu: whether there is a chip, which, and its memory. Not run on hardware.

The names are torch_npu's (npu/__init__.py, 2.14), which mirror those for CUDA.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..spec import Device, Probe
from ..torch_device.torch_pinned import TorchPinnedRuntime

# Chips whose tables lack what the backend needs: BF16, and INT4 weights.
TOO_OLD = ("Ascend310", "Ascend910A", "Ascend910ProA", "Ascend910PremiumA")


class NpuRuntime(TorchPinnedRuntime):
    """Chip number `index`."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(_npu(), "npu", index)


def probe(version: str, nodes: Path = Path("/dev")) -> Probe:
    """`version` of torch_npu, which is imported."""
    npu = _npu()
    if not npu.is_available():
        found = sorted(nodes.glob("davinci[0-9]*"))
        if not found:
            return Probe(False, f"{version} finds no chip: there is no device node {nodes}/davinci*")
        closed = [str(node) for node in found if not os.access(node, os.R_OK | os.W_OK)]
        why = f"no permission for {', '.join(closed)}" if closed else f"{found[0]} is there; see npu-smi info"
        return Probe(False, f"{version} finds no chip: {why}")
    names = [str(npu.get_device_name(index)) for index in range(npu.device_count())]
    devices = tuple(Device(name, version, int(npu.mem_get_info(at)[1])) for at, name in enumerate(names))
    if names[0].startswith(TOO_OLD):
        return Probe(False, f"{names[0]} has no BF16 products with INT4 weights; A2, A3 and later have", devices)
    return Probe(True, f"{version}, {names[0]}; emulated only: please run k2lite backends test ascend", devices)


def _npu() -> Any:
    return torch.npu  # type: ignore[attr-defined]
