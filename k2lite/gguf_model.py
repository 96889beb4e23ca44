"""A model as a GGUF file: what its metadata says, in both directions, put together from config, tokenizer and sampling.

Reading gives what a folder would hold: config.json, the tokenizer's files, and the weights as a checkpoint.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.gguf_checkpoint import GgufCheckpoint
from k2lite.quant.gguf_file import read_gguf

from .config import ModelConfig, parse_config
from .generation_config import read_generation_config
from .gguf_metadata import config_of, kv_b_heads, metadata_of
from .text.gguf_tokenizer import tokenizer_files, tokenizer_metadata
from .weights import checkpoint_schema

# What llama.cpp computes with unless told otherwise on its command line; measured with llama-cpp-python 0.3.36.
LLAMA_CPP_BETAS = (32.0, 1.0)
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


@dataclass(frozen=True)
class GgufModel:
    """`files` are the small files of the folder that the GGUF file amounts to, by name."""

    path: Path
    config: ModelConfig
    checkpoint: Checkpoint
    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def open_gguf(path: Path) -> GgufModel:
    """Read the heads of a GGUF file and its parts, no weights. Raises CheckpointError, ConfigError or TokenizerError
    naming the file; what is wrong with tensors is in the checkpoint's `problems`."""
    source = read_gguf(path)
    raw, notes = config_of(source.metadata, path)
    config = parse_config(raw, path)
    checkpoint = GgufCheckpoint.read(source, checkpoint_schema(config), kv_b_heads(config))
    files, more = tokenizer_files(source.metadata, path)
    files["config.json"] = _json(raw)
    sampling = {
        name: source.metadata[f"general.sampling.{key}"]
        for name, key in _SAMPLING.items()
        if f"general.sampling.{key}" in source.metadata
    }
    if sampling:
        files["generation_config.json"] = _json(sampling)
    return GgufModel(path, config, checkpoint, files, (*notes, *more))


@contextmanager
def as_folder(model: GgufModel) -> Iterator[Path]:
    """The small files in a temporary folder, from which they are carried along as those of any other source."""
    with tempfile.TemporaryDirectory(prefix="k2lite-gguf-") as name:
        for file, content in model.files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)


def export_metadata(folder: Path, config: ModelConfig, type_name: str) -> tuple[dict[str, Any], list[str]]:
    """All metadata of the GGUF file of a folder, and what its user should know."""
    metadata = metadata_of(config, name=folder.resolve().name, type_name=type_name)
    if (folder / "generation_config.json").is_file():
        _, params = read_generation_config(folder)
        metadata |= {f"general.sampling.{key}": getattr(params, name) for name, key in _SAMPLING.items()}
    tokenizer, notes = tokenizer_metadata(folder, config.vocab_size)
    yarn = config.rope.yarn
    if yarn is not None and (yarn.beta_fast, yarn.beta_slow) != LLAMA_CPP_BETAS:
        notes.append(
            "llama.cpp does not read yarn_beta_fast and yarn_beta_slow of deepseek2 files and takes 32 and 1: run it "
            f"with --yarn-beta-fast {yarn.beta_fast:g} --yarn-beta-slow {yarn.beta_slow:g}"
        )
    if config.latent_norm_eps != config.rms_norm_eps:
        notes.append(
            f"llama.cpp will use the eps {config.rms_norm_eps:g} for the norms of MLA's latents, where k2lite uses "
            f"{config.latent_norm_eps:g}"
        )
    return metadata | tokenizer, notes


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
