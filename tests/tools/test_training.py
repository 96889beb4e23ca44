"""The loop: a killed run ends where an unkilled one does; the loss is the mean it says it is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import REPO
from tools.demo_training.training import Settings, Trainer, schedule, weighted_loss
from tools.demo_training.transformer import Transformer

from .miniature import STEPS, miniature, random_batch, train


def test_a_run_killed_between_saves_ends_bit_for_bit_like_one_that_was_not(tmp_path: Path) -> None:
    state, log = tmp_path / "state.pt", tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "tests.tools.miniature", str(state), str(log), "5"]
    killed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(state, weights_only=True)["step"] == 4
    resumed = train(state, log)
    whole = train(tmp_path / "other.pt", tmp_path / "other.jsonl")
    assert resumed.step == whole.step == STEPS
    for (name, ours), theirs in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    last, other = (json.loads(path.read_text().splitlines()[-1]) for path in (log, tmp_path / "other.jsonl"))
    del last["seconds"], other["seconds"]
    assert last == other


def test_a_half_written_state_does_not_replace_the_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state.pt"
    trainer = Trainer(miniature(), Settings(steps=2), random_batch)
    trainer.save(state)
    good = state.read_bytes()

    def cut_short(_: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(state)
    assert state.read_bytes() == good


def test_training_lowers_the_loss_on_a_batch_it_sees_again() -> None:
    trainer = Trainer(miniature(), Settings(steps=1000, warmup_steps=1), lambda _: random_batch(0))
    losses = [trainer.train_step()["loss"] for _ in range(15)]
    assert losses[-1] < losses[0] - 1.5


def test_the_loss_and_its_gradient_are_those_of_the_weighted_mean(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.demo_training.training.HEAD_ROWS", 7)
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, model.c.hidden_size, requires_grad=True)
    targets, weights = torch.randint(0, 512, (2, 9)), torch.rand(2, 9).round() * 0.9 + 0.1
    shown = weighted_loss(model, hidden, targets, weights)
    ours, hidden.grad = hidden.grad, None
    losses = F.cross_entropy(model.head(hidden).flatten(0, 1), targets.flatten(), reduction="none")
    ((losses * weights.flatten()).sum() / weights.sum()).backward()
    assert ours is not None
    assert hidden.grad is not None
    assert (ours - hidden.grad).abs().max() < 0.02 * hidden.grad.abs().max()
    assert shown == pytest.approx(float(losses.detach()[weights.flatten() == 1].mean()), rel=1e-5)


def test_the_schedule_warms_up_stays_and_decays_to_two_percent() -> None:
    settings = Settings(steps=1000, warmup_steps=10, decay_share=0.3)
    scales = [schedule(step, settings) for step in range(1001)]
    assert scales[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert set(scales[10:701]) == {1.0}
    assert scales[701:] == sorted(scales[701:], reverse=True)
    assert scales[1000] == pytest.approx(0.02)
