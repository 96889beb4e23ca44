"""The miniature's config, weights and batches. Run as a program it trains, and can kill itself on the way:
`python -m tests.tools.miniature STATE LOG KILL_AT` (0: don't)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tools.demo_training.batches import Batch
from tools.demo_training.shape import CONFIG, model_config
from tools.demo_training.training import Settings, Trainer
from tools.demo_training.transformer import Transformer

N_VOCAB = 512
STEPS = 7
CHANGES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "bos_token_id": N_VOCAB - 256,
    "eos_token_id": N_VOCAB - 255,
}
MINI_CONFIG = {**CONFIG, **CHANGES}


def miniature(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(model_config(CHANGES))


def random_batch(step: int, rows: int = 2, tokens: int = 24) -> Batch:
    """Two documents a row; a function of the step alone, as the real batches are."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, N_VOCAB, (rows, tokens + 1), generator=generator)
    half = tokens // 2
    positions = torch.arange(half).repeat(2).expand(rows, -1)
    documents = torch.arange(2).repeat_interleave(half).expand(rows, -1)
    return Batch(ids[:, :-1], positions, documents, ids[:, 1:], torch.ones(rows, tokens))


def train(state: Path, log: Path, kill_at: int = 0) -> Trainer:
    """Train to the last step, from `state` if it is there; SIGKILL itself before step `kill_at`."""

    def batch_of(step: int) -> Batch:
        if kill_at and step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return random_batch(step)

    settings = Settings(steps=STEPS, warmup_steps=2, log_every=1, save_every=2)
    trainer = Trainer(miniature(), settings, batch_of)
    if state.is_file():
        trainer.load(state)
    trainer.run(state, log)
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
