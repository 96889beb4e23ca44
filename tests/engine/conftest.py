"""A tiny random model, loaded once for the tests that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

import k2lite
from tests.checkpoints import random_weights, tiny_config, write_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = tiny_config()
    write_checkpoint(folder, config, random_weights(config, seed=0), format="int4")
    return folder


@pytest.fixture(scope="session")
def engine(tiny_folder: Path) -> k2lite.Engine:
    return k2lite.load(tiny_folder, backend="reference", context=256)
