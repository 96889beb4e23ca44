"""The tool for a person with a card, on the stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import random_weights, tiny_config, write_checkpoint
from tests.stand_in.engines import StandInBackend
from tools import check_device


def test_budgets_are_compared_for_each_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=2), format="int4")
    monkeypatch.setattr(check_device, "PROMPT", [3, 1, 4])
    monkeypatch.setattr(check_device, "NEW_TOKENS", 3)
    runs = check_device.compare(tmp_path / "model", StandInBackend, host_backend="reference", context=16)
    assert [(run["place"], run["budget"], run["same"]) for run in runs] == [
        (place, budget, True) for place in ("device", "host") for budget in ("plenty", "little")
    ]
    assert runs[1]["sent_bytes"] > runs[0]["sent_bytes"] > runs[2]["sent_bytes"] == 0
