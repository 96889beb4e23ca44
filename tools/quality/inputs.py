"""Shows a recorder of k2lite the inputs of the training model's matrices: `k2lite.recording` for batched float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k2lite.recording import Recorder
from tools.demo_training.batches import Row
from tools.demo_training.transformer import Moe, Transformer


@torch.no_grad()
def record(model: Transformer, recorder: Recorder, rows: Iterable[Row]) -> int:
    """Have the model read rows; returns how many tokens these were."""
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("router"):
            stored = name if name == "lm_head" else f"model.{name}"
            hooks.append(module.register_forward_pre_hook(_linear(recorder, stored)))
        elif isinstance(module, Moe):
            hooks.append(module.register_forward_hook(_experts(recorder, f"model.{name}.experts")))
    tokens = 0
    try:
        for row in rows:
            ids, positions, documents, _ = (torch.from_numpy(part)[None] for part in row)
            hidden = model(ids, positions, documents)
            recorder.matrix("lm_head", hidden[0])  # the head is called as a function
            tokens += ids.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return tokens


def _linear(recorder: Recorder, module: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: recorder.matrix(module, inputs[0])


def _experts(recorder: Recorder, prefix: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
    def tell(moe: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
        assert isinstance(moe, Moe)
        (x,) = inputs
        for expert in moe.ids.unique().tolist():
            rows = (moe.ids == expert).any(-1).nonzero().flatten()
            at = f"{prefix}.{expert}"
            recorder.expert(at, x, rows)
            mine = x[rows]
            gate, up = moe.gate_up_proj[expert]
            recorder.matrix(f"{at}.gate_proj", mine)
            recorder.matrix(f"{at}.up_proj", mine)
            recorder.matrix(f"{at}.down_proj", F.silu(mine @ gate.T) * (mine @ up.T))

    return tell
