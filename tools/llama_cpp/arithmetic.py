"""llama.cpp's rounding in float32 products: what its CPU backend does to the inputs of a matrix, by the matrix's type.

Q8_0 and Q4_0 are multiplied with inputs in Q8_0 (groups of 32, a scale in F16), F16 and BF16 with inputs in the same
type, F32 as they are; a cache in F16 rounds latents, queries and probabilities. Sums stay float32, in another order.
Source: llama.cpp, ggml-cpu.c (vec_dot_type) and src/llama-graph.cpp (attention without flash attention).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from k2lite.backends.base import RoutingRule, Segment, causal_rows, dot, softmax
from k2lite.backends.reference import ReferenceBackend
from k2lite.quant.ggml_blocks import GgmlBlocks
from k2lite.quant.gguf_names import gguf_name, split_names, stack_name
from k2lite.quant.types import QuantTensor
from k2lite.recording import Recorder

Rounding = Callable[[torch.Tensor], torch.Tensor]
Q8_0 = GgmlBlocks("q8_0")


def _through_q8_0(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return Q8_0.dequantize(Q8_0.quantize(rows), tuple(rows.shape)).view(x.shape)


INPUTS: Mapping[str, Rounding] = {
    "f32": lambda x: x,
    "f16": lambda x: x.half().float(),
    "bf16": lambda x: x.bfloat16().float(),
    "q8_0": _through_q8_0,
    "q4_0": _through_q8_0,
}


class MatrixNames(Recorder):
    """Hears the name of each matrix just before it multiplies."""

    def __init__(self) -> None:
        self.module: str | None = None

    def matrix(self, module: str, x: torch.Tensor) -> None:  # noqa: ARG002
        self.module = module


class LlamaArithmetic(ReferenceBackend):
    """`types` are those of the file's tensors by their names in it; `names` must be the recorder of the same engine.
    Weights are the file's values in float32."""

    def __init__(self, types: Mapping[str, str], names: MatrixNames, *, cache: str) -> None:
        super().__init__()
        self._types, self._names, self._cache = types, names, INPUTS[cache]

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        module, self._names.module = self._names.module, None
        if module is None:  # the router, which is F32
            return super().linear(x, weight)
        return super().linear(INPUTS[self._types[_gguf_name(module)]](x), weight)

    def router(
        self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._names.module = None
        return super().router(x, weight, bias, rule)

    def attention(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        segments: Sequence[Segment],
        kv_b: QuantTensor,
        scale: float,
    ) -> torch.Tensor:
        """As the default of `Backend`, in which the inputs of each of the four products are rounded."""
        module, self._names.module = self._names.module, None
        key_name, value_name = split_names(f"{module}.weight") or ("", "")
        to_key, to_value = INPUTS[self._types[key_name]], INPUTS[self._types[value_name]]
        heads, nope = q_nope.shape[1:]
        rank = kv_b.shape[1]
        per_head = kv_b.dequantize().view(heads, -1, rank)
        key_rows = per_head[:, :nope].transpose(1, 2).contiguous()  # [H, R, nope]
        out = q_nope.new_empty(q_nope.shape[0], heads, per_head.shape[1] - nope)
        stored = [replace(segment, latent=self._cache(segment.latent)) for segment in segments]
        for token, latent in causal_rows(stored):
            absorbed = dot(key_rows, to_key(q_nope[token])[:, None])  # [H, R]
            query = self._cache(torch.cat((absorbed, q_rope[token]), dim=-1))
            p = self._cache(softmax(dot(query[:, None], latent) * scale))  # [H, N]
            mixed = dot(p[:, None], latent[:, :rank].T.contiguous())  # [H, R]
            out[token] = dot(per_head[:, nope:], to_value(mixed)[:, None])
        return out


def _gguf_name(module: str) -> str:
    """Of a matrix, by its stored name without ".weight"."""
    if ".mlp.experts." in module:
        layer, rest = module.removeprefix("model.layers.").split(".", 1)
        return stack_name(int(layer), rest.rpartition(".")[2])
    return gguf_name(f"{module}.weight")
