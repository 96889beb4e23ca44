"""The folder that tests of this folder damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.quant.damage import CONFIG, WEIGHTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An FP8 folder of three shards to be damaged."""
    write_checkpoint(tmp_path / "model", CONFIG, WEIGHTS, format="fp8")
    return tmp_path / "model"
