"""After training: the correction biases alone are moved, on training data, until no expert is nearly idle and a quarter
of each layer's experts carries enough of a dialogue. The weights stay as they are.

While training a rule for the load of one batch moves the biases; what it leaves is judged here over whole dialogues."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from k2lite.text.tokenizer import Tokenizer

from .batches import Row, text_row
from .evaluation import forward
from .tools_data import tool_dialogue
from .transformer import Moe, Transformer


@dataclass(frozen=True)
class Marks:
    """What is wanted of each layer, with room for the difference between training data and held-out data."""

    least_share: float = 0.0028
    top_quarter: float = 0.514
    step: float = 0.016  # of the least used experts' biases, in units of the router's sigmoid
    rounds: int = 12


def sample_rows(tokenizer: Tokenizer, text: npt.NDArray[np.uint16]) -> tuple[list[Row], list[Row]]:
    """Training dialogues and windows of training text, in the proportion that the evaluation has."""
    rng = random.Random("settle")
    dialogues = []
    for _ in range(72):
        made = tool_dialogue(rng, held_out=False)
        ids = tokenizer.render(made.messages, made.tools, add_generation_prompt=False).ids
        dialogues.append(text_row(np.array(ids, dtype=np.uint16)))
    starts = [rng.randrange(len(text) - 1024) for _ in range(24)]
    return dialogues, [text_row(text[at : at + 1024]) for at in starts]


@torch.no_grad()
def settle_biases(model: Transformer, dialogues: list[Row], texts: list[Row], marks: Marks) -> None:
    """Move the biases round by round, each MoE layer for itself; prints each round's figures by layer, in percent."""
    for at in range(marks.rounds):
        used, quarters = _uses(model, dialogues, texts)
        shares = used / used.sum(axis=1, keepdims=True)
        least = ", ".join(f"{100 * share:.2f}" for share in shares.min(axis=1))
        busy = ", ".join(f"{100 * quarter:.1f}" for quarter in quarters)
        print(f"round {at}: least used expert {least}; busiest quarter {busy}", flush=True)
        moved = [_move(moe, shares[i], quarters[i], marks) for i, moe in enumerate(model.moes)]
        if not any(moved):
            return


def _uses(
    model: Transformer, dialogues: list[Row], texts: list[Row]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How often each expert was chosen [L, E], and the mean share of a dialogue's busiest quarter [L]."""
    experts = model.c.n_routed_experts
    used = np.zeros((len(model.moes), experts))
    quarters = np.zeros(len(model.moes))
    for at, row in enumerate([*dialogues, *texts]):
        forward(model, row)
        for layer, moe in enumerate(model.moes):
            counts = np.bincount(moe.ids.numpy().ravel(), minlength=experts)
            used[layer] += counts
            if at < len(dialogues):
                quarters[layer] += np.sort(counts)[-(experts // 4) :].sum() / counts.sum() / len(dialogues)
    return used, quarters


def _move(moe: Moe, share: npt.NDArray[np.float64], quarter: float, marks: Marks) -> bool:
    """Raise nearly idle experts; where a dialogue is spread too wide, raise the busiest quarter by half as much."""
    idle = share < marks.least_share
    moe.bias += marks.step * torch.from_numpy(idle).float()
    wide = quarter < marks.top_quarter
    if wide:
        busiest = np.argsort(share)[-(len(share) // 4) :]
        moe.bias[torch.from_numpy(busiest.copy())] += marks.step / 2
    return bool(idle.any() or wide)
