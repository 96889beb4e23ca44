"""A tiny random model of 2 MoE layers with 8 experts, and what its files hold by an independent reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import random_weights, tiny_config, write_checkpoint

Stored = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload") / "model"
    config = tiny_config()
    write_checkpoint(folder, config, random_weights(config, seed=0), format="int4")
    return folder


@pytest.fixture(scope="session")
def stored(tiny_folder: Path) -> Stored:
    return {name: tensor for path in tiny_folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
