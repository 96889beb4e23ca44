"""A model folder looked at: its config and where its weights lie.

Reads config.json and the headers of the shards and no weights; every problem that these show is found here. Knows no
backend that is open and no plan, so that verbs that don't compute start quickly.
"""

from __future__ import annotations

from pathlib import Path

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import CheckpointError
from k2lite.quant.quantization_config import parse_quantization_config

from .config import ModelConfig, read_config
from .weights import checkpoint_schema


def open_model(folder: Path, *, latent_norm_eps: float | None = None) -> tuple[ModelConfig, Checkpoint]:
    """Read config.json and every shard's header, but no weights. The checkpoint's `problems` are not yet errors."""
    if folder.suffix == ".gguf" and folder.is_file():
        raise CheckpointError(f"{folder}: a GGUF file; k2lite quantize {folder} DST makes a folder of it that runs")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; a model is a folder with config.json and .safetensors files")
    config = read_config(folder, latent_norm_eps=latent_norm_eps)
    quantization = parse_quantization_config(config.quantization_config, config.source)
    return config, Checkpoint.open(folder, checkpoint_schema(config), quantization)
