"""What the matrices of a model read on a calibration text, and one matrix's Hessian at a time made of it.

Kept are the inputs of each layer's blocks, and which of them each routed expert was to read; never all Hessians, which
are hundreds of times as many numbers. They are the inputs in the model as it is, not in one whose earlier layers are
quantized already. What a routed expert's down_proj reads is computed again from its other two matrices.
Shapes: T tokens, D hidden, F expert width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import xxhash

from k2lite.backends.host_memory import host_memory
from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import MemoryPlanError
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.moments import PRIOR_TOKENS
from k2lite.quant.quantization_plan import QuantizationPlan
from k2lite.quant.quantizer import READ_AHEAD_BLOCKS
from k2lite.quant.types import ExpertKey

from .byte_sizes import gib
from .config import ModelConfig
from .recording import Recorder

# float64 matrices that live at once while one Hessian is made and inverted, the layer's own among them; measured: 5.6.
WORKING_HESSIANS = 6
# float32 factors of Hessians that wait or are at work at most: one a block, if each block is a matrix.
WAITING_FACTORS = READ_AHEAD_BLOCKS + 1


class Calibration(Recorder):
    """Give it to `load`, let the engine read, then ask for Hessians. A routed expert's Hessian is drawn towards that of
    all inputs of its layer, as if PRIOR_TOKENS more of these had been seen; its down_proj's towards a multiple of the
    identity, since the units of two experts have nothing in common."""

    def __init__(self, checkpoint: Checkpoint, text: str, tokens: int) -> None:
        """`text`, and how many `tokens` of it will be read, for `settings`."""
        self._checkpoint = checkpoint
        self._settings = {"text": f"xxh3 {xxhash.xxh3_64(text.encode()).hexdigest()}", "tokens": tokens}
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._routed: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._copies: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=4)
        self._layer_hessian: tuple[str, torch.Tensor] = ("", torch.empty(0))

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._settings

    def matrix(self, module: str, x: torch.Tensor) -> None:
        if ".mlp.experts." not in module:
            self._inputs.setdefault(module, []).append(self._kept(x))

    def expert(self, module: str, x: torch.Tensor, rows: torch.Tensor) -> None:
        self._routed.setdefault(module, []).append((self._kept(x), rows.cpu()))

    def _kept(self, x: torch.Tensor) -> torch.Tensor:
        """A copy on the host, since a backend may use its buffers again; the same one for all who read the same."""
        for seen, copy in self._copies:
            if seen is x:
                return copy
        copy = x.detach().to("cpu", torch.float32, copy=True)
        self._copies.append((x, copy))
        return copy

    def widths(self) -> Mapping[str, int]:
        return self._checkpoint.schema.matrix_widths()

    def hessian(self, module: str) -> torch.Tensor:
        """Mean of x x^T over the tokens that the matrix read, float64 [in, in]."""
        expert, _, projection = module.rpartition(".")
        if ".mlp.experts." not in module:
            return _mean_products(self._inputs[module])
        chunks = self._routed.get(expert, [])
        mine = [x[rows] for x, rows in chunks]
        if projection == "down_proj":
            mine = list(self._down_inputs(expert, mine))
            prior = _flat(mine, self._checkpoint.schema.projection_shape("down_proj")[1])
        else:
            prior = self._layer(expert.rpartition(".")[0])
        count = sum(map(len, mine))
        if not count:
            return prior.clone()
        return (_mean_products(mine) * count + prior * PRIOR_TOKENS) / (count + PRIOR_TOKENS)

    def _layer(self, experts: str) -> torch.Tensor:
        """Of all that a layer's routed experts (".../mlp.experts") read; the last layer's is kept."""
        if self._layer_hessian[0] != experts:
            read: dict[int, torch.Tensor] = {}
            for module, chunks in self._routed.items():
                if module.rpartition(".")[0] == experts:
                    read |= {id(x): x for x, _ in chunks}
            self._layer_hessian = (experts, _mean_products(read.values()))
        return self._layer_hessian[1]

    def _down_inputs(self, expert: str, inputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """silu(gate(x)) * up(x), float32 [n, F]."""
        layer, number = expert.removeprefix(f"{self._checkpoint.schema.prefix}model.layers.").split(".mlp.experts.")
        layout = self._checkpoint.expert(ExpertKey(int(layer), int(number)))
        weights = expert_weights(layout, read_extents(layout))
        gate, up = weights.gate_proj.dequantize(), weights.up_proj.dequantize()
        for x in inputs:
            yield torch.nn.functional.silu(x @ gate.T) * (x @ up.T)


def _mean_products(chunks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean of x x^T over all rows x of all chunks, float64; products are float32, chunk by chunk."""
    total: torch.Tensor | None = None
    count = 0
    for x in chunks:
        products = (x.T @ x).to(torch.float64)
        total = products if total is None else total.add_(products)
        count += len(x)
    if total is None:
        raise ValueError("no inputs were recorded")
    return total / count


def _flat(inputs: list[torch.Tensor], width: int) -> torch.Tensor:
    """The identity times the mean square; the identity itself where nothing was seen."""
    count = sum(x.numel() for x in inputs)
    mean = sum(float(x.double().square().sum()) for x in inputs) / count if count else 1.0
    return torch.eye(width, dtype=torch.float64) * mean


def demand_memory(config: ModelConfig, plan: QuantizationPlan, tokens: int) -> None:
    """Raise MemoryPlanError with the sum unless the inputs of `tokens` tokens fit, one matrix's Hessians, and the
    factors of those that wait to be rounded."""
    c = config
    attention = c.hidden_size + c.q_lora_rank + c.kv_lora_rank + c.num_attention_heads * c.v_head_dim
    numbers = c.hidden_size  # of the head
    for layer in range(c.num_hidden_layers):
        width = c.moe_intermediate_size * c.n_shared_experts if c.is_moe(layer) else c.intermediate_size
        numbers += attention + c.hidden_size + width
    inputs = 4 * numbers * tokens
    widest = max(matrix.source.shape[-1] for matrix in plan.matrices)
    hessians = widest**2 * (8 * WORKING_HESSIANS + 4 * WAITING_FACTORS)
    available = host_memory().available_bytes
    if inputs + hessians > available:
        raise MemoryPlanError(
            f"--rounding gptq keeps the inputs of all layers: {numbers} numbers a token x {tokens} tokens x 4 bytes = "
            f"{gib(inputs)}, and {WORKING_HESSIANS} Hessians of {widest} x {widest} x 8 bytes + {WAITING_FACTORS} "
            f"factors of 4 bytes = {gib(hessians)}; {gib(available)} of memory is available: it is for small models "
            "and slices; fewer --calibration-tokens need less"
        )
