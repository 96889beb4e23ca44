"""The training loop: MuonClip, router balance, a log line every few steps, a state from which a killed run goes on.

Invariant: a run that was killed and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch
from .muonclip import Muon, qk_clip
from .transformer import Transformer

HEAD_ROWS = 4096  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Settings:
    """One run. Learning rates are of the stable phase; the schedule is warm-up, stable, decay (WSD)."""

    steps: int
    tokens_per_step: int = 2048
    lr: float = 3e-3
    adam_lr: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.35
    balance_rate: float = 0.004
    balance_band: tuple[float, float] = (0.25, 4.5)
    clip_threshold: float = 30.0
    log_every: int = 20
    save_every: int = 200
    seed: int = 1


class Trainer:
    """`batch_of(step)` gives any step's batch; `log` gets one dict a logged step."""

    def __init__(self, model: Transformer, settings: Settings, batch_of: Callable[[int], Batch]) -> None:
        self.model = model
        self.settings = settings
        self.step = 0
        self._batch_of = batch_of
        matrices, rest = split_parameters(model)
        self._muon = Muon(matrices, lr=settings.lr)
        self._adam = torch.optim.AdamW(rest, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._began = time.monotonic()
        self._spent_s = 0.0
        self._stop = False

    def run(self, state: Path, log: Path) -> None:
        """Train to the last step, saving on the way, at the end, and when asked to end by SIGTERM."""
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stop", True))
        try:
            while self.step < self.settings.steps and not self._stop:
                line = self.train_step()
                if self.step % self.settings.log_every == 0 or self.step == 1:
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                if self.step % self.settings.save_every == 0:
                    self.save(state)
            self.save(state)
        finally:
            signal.signal(signal.SIGTERM, previous)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns what the log keeps."""
        settings, model = self.settings, self.model
        batch = self._batch_of(self.step)
        scale = schedule(self.step, settings)
        for optimizer, lr in ((self._muon, settings.lr), (self._adam, settings.adam_lr)):
            optimizer.param_groups[0]["lr"] = lr * scale
        hidden = model(batch.ids, batch.positions, batch.documents, measure=True)
        loss = weighted_loss(model, hidden, batch.targets, batch.weights)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        self._muon.step()
        self._adam.step()
        model.zero_grad(set_to_none=True)
        clipped = sum(qk_clip(layer.self_attn, settings.clip_threshold) for layer in model.layers)
        loads = [moe.load for moe in model.moes]
        for moe in model.moes:
            moe.balance(moe.load, settings.balance_rate * scale, settings.balance_band)
        self.step += 1
        return {
            "step": self.step,
            "tokens": self.step * settings.tokens_per_step,
            "seconds": round(self._spent_s + time.monotonic() - self._began, 1),
            "loss": round(loss, 4),
            "gradient_norm": round(norm, 3),
            "lr": settings.lr * scale,
            "max_logit": round(max(float(layer.self_attn.max_logits.max()) for layer in model.layers), 2),
            "clipped_heads": clipped,
            "max_load": [round(float(load.max() / load.mean()), 2) for load in loads],
            "min_load": [round(float(load.min() / load.mean()), 3) for load in loads],
        }

    def save(self, path: Path) -> None:
        """Write the whole state under a temporary name, then rename."""
        state = {
            "step": self.step,
            "seconds": self._spent_s + time.monotonic() - self._began,
            "model": self.model.state_dict(),
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
        }
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
        self.step, self._spent_s = state["step"], state["seconds"]
        self._began = time.monotonic()


def split_parameters(model: Transformer) -> tuple[list[Tensor], list[Tensor]]:
    """Muon's matrices, and AdamW's: embeddings, head, norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.startswith(("embed_tokens", "lm_head"))
        (matrices if is_matrix else rest).append(parameter)
    return matrices, rest


def schedule(step: int, settings: Settings) -> float:
    """The share of the learning rate: linear warm-up, stable, then a cosine down to 2 %."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    decay_steps = max(1, int(settings.steps * settings.decay_share))
    into = step - (settings.steps - decay_steps)
    if into <= 0:
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, into / decay_steps)))


def weighted_loss(model: Transformer, hidden: Tensor, targets: Tensor, weights: Tensor) -> float:
    """Backward through the weighted mean of the cross-entropy, a block of logits at a time; returns the mean over the
    fully weighted tokens."""
    flat = hidden.flatten(0, 1)
    detached = flat.detach().requires_grad_()
    goal, weight = targets.flatten(), weights.flatten()
    total, full, full_count = weight.sum(), 0.0, 0
    for at in range(0, len(flat), HEAD_ROWS):
        block = slice(at, at + HEAD_ROWS)
        losses = F.cross_entropy(model.head(detached[block]), goal[block], reduction="none")
        ((losses * weight[block]).sum() / total).backward()
        is_full = weight[block] == 1
        full += float(losses.detach()[is_full].sum())
        full_count += int(is_full.sum())
    flat.backward(detached.grad)
    return full / max(1, full_count)
