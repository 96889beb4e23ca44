"""Second moments of the inputs of a model's matrices: recorded on a text, read back one matrix at a time.

A .safetensors file: for each matrix X "X.moment" F32 [in], the mean of x_j^2 over its own tokens, and "X.count" I64
[1], how many these were; metadata "model" (the fingerprint of the weights) and "tokens". A routed expert's up_proj has
the inputs of its gate_proj, whose entry stands for both.

Few tokens tell little, so a routed expert's moments are drawn towards its layer's: as if PRIOR_TOKENS more tokens had
been seen, with the layer's mean over all its experts' tokens. Units of a down_proj's input mean something else in each
expert: there the prior is flat, the mean over the units too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save

from .checkpoint import Checkpoint
from .durable_files import replace_file
from .errors import CheckpointError, RequestError
from .file_reading import read_exactly
from .safetensors_file import TensorRecord, read_header, read_metadata

PRIOR_TOKENS = 64
_KIND = "k2lite_moments"
_EXPERT = re.compile(r"(.*\.layers\.\d+\.mlp\.experts\.)\d+\.(gate_proj|down_proj)")
_BLOCK = 16 << 20


def entry_name(module: str) -> str:
    """The module whose entry holds this one's inputs."""
    routed_up = ".mlp.experts." in module and module.endswith(".up_proj")
    return module.removesuffix("up_proj") + "gate_proj" if routed_up else module


def write_moments(path: Path, moments: Mapping[str, tuple[torch.Tensor, int]], *, model: str, tokens: int) -> None:
    """`moments`: the mean squares float32 [in] of each module's inputs, and of how many tokens."""
    tensors: dict[str, torch.Tensor] = {}
    for module, (moment, count) in moments.items():
        tensors[f"{module}.moment"] = moment.to(torch.float32).contiguous()
        tensors[f"{module}.count"] = torch.tensor([count])
    metadata = {"format": "pt", "kind": _KIND, "model": model, "tokens": str(tokens)}
    replace_file(path, [save(tensors, metadata)])


def open_moments(path: Path, checkpoint: Checkpoint) -> Moments:
    """The moments in a file. Raises RequestError if they were recorded on another model than `checkpoint`; the formats
    that it is stored in may differ."""
    moments = Moments(path)
    if moments.model != checkpoint.fingerprint():
        raise RequestError(f"{path}: was recorded on another model than {checkpoint.folder}; record this one")
    return moments


class Moments:
    """A file of moments. `model` is the fingerprint of the model that it was recorded on."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file can't be read, RequestError if it holds something else."""
        self.path = path
        self._records = read_header(path)
        metadata = read_metadata(path)
        if metadata.get("kind") != _KIND or "model" not in metadata:
            raise RequestError(f"{path}: holds no moments; k2lite trace MODEL --moments FILE --text FILE writes them")
        self.model = metadata["model"]
        counts = {name: record for name, record in self._records.items() if name.endswith(".count")}
        self._counts = {name.removesuffix(".count"): int(self._read(record)[0]) for name, record in counts.items()}
        self._prior = lru_cache(maxsize=4)(self._prior_of)
        self.identity = f"xxh3 {_digest(path)}"

    def widths(self) -> Mapping[str, int]:
        """Inputs of each module that has an entry, up_proj of experts too."""
        found = {}
        for name, record in self._records.items():
            if name.endswith(".moment"):
                module = name.removesuffix(".moment")
                found[module] = record.shape[0]
                if _EXPERT.fullmatch(module) and module.endswith("gate_proj"):
                    found[module.removesuffix("gate_proj") + "up_proj"] = record.shape[0]
        return found

    def of(self, module: str) -> torch.Tensor:
        """Mean squares float32 [in] of the inputs of `module`; a routed expert's are drawn towards its layer's."""
        entry = entry_name(module)
        moment = self._moment(entry)
        expert = _EXPERT.fullmatch(entry)
        if expert is None:
            return moment
        count = self._counts[entry]
        return (moment * count + self._prior(expert[1], expert[2]) * PRIOR_TOKENS) / (count + PRIOR_TOKENS)

    def _prior_of(self, layer: str, projection: str) -> torch.Tensor:
        entries = [name for name in self._counts if name.startswith(layer) and name.endswith(projection)]
        total = sum(self._counts[name] for name in entries)
        if not total:
            raise RequestError(f"{self.path}: {layer} saw no token")
        mean = torch.stack([self._moment(name) * (self._counts[name] / total) for name in entries]).sum(0)
        return mean if projection == "gate_proj" else torch.full_like(mean, float(mean.mean()))

    def _moment(self, entry: str) -> torch.Tensor:
        moment = self._read(self._records[f"{entry}.moment"])
        if not (torch.isfinite(moment) & (moment >= 0)).all():
            raise CheckpointError(f"{self.path}: {entry} holds a mean square that is negative, NaN or infinite")
        return moment

    def _read(self, record: TensorRecord) -> torch.Tensor:
        buffer = torch.empty(record.nbytes, dtype=torch.uint8)
        read_exactly(self.path, record.offset, buffer, f"tensor {record.name}")
        return buffer.view(record.dtype).view(record.shape)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
