"""Records the second moments of every matrix's inputs while a model reads a text: what `trace --moments` writes.

Sums are float64, one vector a matrix; a routed expert's counts its own tokens only.
"""

from __future__ import annotations

from pathlib import Path

import torch

from k2lite.quant.moments import entry_name, write_moments

from .recording import Recorder


class MomentRecorder(Recorder):
    """Give it to `load`, let the engine read, then `write`."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def matrix(self, module: str, x: torch.Tensor) -> None:
        if entry_name(module) != module:  # another matrix has the same inputs
            return
        squares = x.to(torch.float64).square().sum(0).cpu()
        self._sums[module] = self._sums[module] + squares if module in self._sums else squares
        self._counts[module] = self._counts.get(module, 0) + len(x)

    def write(self, path: Path, widths: dict[str, int], *, model: str, tokens: int) -> None:
        """`widths`: the inputs of every matrix of the model; a routed expert that no token chose is written with count
        0. Raises CheckpointError where the file can't be written."""
        moments = {}
        for module, width in widths.items():
            if entry_name(module) == module:
                count = self._counts.get(module, 0)
                total = self._sums.get(module, torch.zeros(width, dtype=torch.float64))
                moments[module] = ((total / max(count, 1)).to(torch.float32), count)
        write_moments(path, moments, model=model, tokens=tokens)
