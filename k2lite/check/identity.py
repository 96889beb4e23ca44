"""Which model it is: hashes of the files that describe it, formats, shards, and a fingerprint of the weights.

Reads the trunk's vectors only. Holds the folder's name and no path.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from k2lite.engine import Engine
from k2lite.prediction import engine_cache

# What decides a model's text beside its weights; those that are there are hashed.
FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tiktoken.model", "tokenizer.json",
    "chat_template.jinja", "model.safetensors.index.json",
)  # fmt: skip


def identity(engine: Engine) -> dict[str, Any]:
    """Sizes in bytes, hashes SHA-256."""
    checkpoint = engine_cache(engine).store.checkpoint
    folder = checkpoint.folder
    config = {key: value for key, value in asdict(engine.config).items() if key not in ("source", "unknown_keys")}
    return {
        "name": folder.resolve().name,
        "config": config,
        "files": {name: _sha256(folder / name) for name in FILES if (folder / name).is_file()},
        "fingerprint": checkpoint.fingerprint(),
        "formats": {
            kind: {name: asdict(use) for name, use in uses.items()} for kind, uses in checkpoint.formats().items()
        },
        "shards": [{"file": shard.path.name, "bytes": shard.nbytes} for shard in checkpoint.shards],
        "checksums": len(checkpoint.checksums),
        "notes": [note.replace(f"{folder}/", "") for note in checkpoint.notes],
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
