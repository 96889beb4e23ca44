"""Rotary position embedding with YaRN: frequencies, tables of cosines and sines, and the factor on the scores.

Invariant: pairs are interleaved, (x0, x1), (x2, x3), ..., as the checkpoint's rows are; the half-rotation of other
models would be wrong here. YaRN acts at all lengths, as in Hugging Face, vLLM, SGLang and llama.cpp.
Formulas: YaRN (arXiv 2309.00071) with DeepSeek-V3's two mscale values (arXiv 2412.19437).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from k2lite.quant.errors import ConfigError

from .config_reader import KeyReader


@dataclass(frozen=True)
class YarnConfig:
    """The yarn block. Defaults for absent keys are Hugging Face's."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings of one model. `dim` is qk_rope_head_dim."""

    dim: int
    theta: float
    yarn: YarnConfig | None

    @classmethod
    def read(cls, text: KeyReader, *, dim: int) -> RopeConfig:
        """Read either spelling: rope_theta with rope_scaling, or rope_parameters (transformers 5)."""
        if dim % 2:
            raise ConfigError(f"{text.path}: qk_rope_head_dim is {dim}; supported: even numbers (pairs are rotated)")
        old = text.mapping("rope_scaling")
        new = text.mapping("rope_parameters")
        if old is not None and new is not None and _yarn(text, "rope_scaling") != _yarn(text, "rope_parameters"):
            raise ConfigError(f"{text.path}: rope_scaling and rope_parameters are both given and differ; keep one")
        if new is None:
            return cls(dim, text.number("rope_theta"), None if old is None else _yarn(text, "rope_scaling"))
        inner = text.section("rope_parameters")
        theta = inner.number("rope_theta") if inner.given(["rope_theta"]) else text.number("rope_theta")
        if text.given(["rope_theta"]) and text.number("rope_theta") != theta:
            raise ConfigError(f"{text.path}: rope_theta and rope_parameters.rope_theta are both given and differ")
        return cls(dim, theta, _yarn(text, "rope_parameters"))

    @property
    def softmax_mscale(self) -> float:
        """YaRN's factor on the attention scores enters squared: once for the query, once for the key."""
        return 1.0 if self.yarn is None else _mscale(self.yarn.factor, self.yarn.mscale_all_dim)

    @property
    def cos_sin_scale(self) -> float:
        if self.yarn is None:
            return 1.0
        return _mscale(self.yarn.factor, self.yarn.mscale) / _mscale(self.yarn.factor, self.yarn.mscale_all_dim)

    def frequencies(self) -> npt.NDArray[np.float64]:
        """Radians a position for each pair, float64 [dim / 2]."""
        steps = np.arange(0, self.dim, 2, dtype=np.float64)
        plain: npt.NDArray[np.float64] = np.power(self.theta, -steps / self.dim)
        if self.yarn is None:
            return plain
        low, high = self.yarn_range()
        ramp = np.clip((np.arange(self.dim // 2) - low) / (high - low), 0.0, 1.0)
        blended: npt.NDArray[np.float64] = plain * (1.0 - ramp) + plain / self.yarn.factor * ramp
        return blended

    def yarn_range(self) -> tuple[float, float]:
        """The pairs between which YaRN blends from untouched (below) to divided by the factor (above)."""
        assert self.yarn is not None

        def pair_of(rotations: float) -> float:
            length = self.yarn.original_max_position_embeddings  # type: ignore[union-attr]
            return self.dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(self.theta))

        low = max(math.floor(pair_of(self.yarn.beta_fast)), 0)
        high = min(math.ceil(pair_of(self.yarn.beta_slow)), self.dim - 1)
        return (low, high) if low != high else (low, high + 0.001)

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 [T, dim / 2] each, for int64 positions [T].

        The angle is a float32 product, as in every engine K2 was trained or served with."""
        frequencies = torch.from_numpy(self.frequencies()).to(torch.float32)
        angles = (positions.to(torch.float32)[:, None] * frequencies).to(torch.float64)
        scale = self.cos_sin_scale
        return (angles.cos() * scale).to(torch.float32), (angles.sin() * scale).to(torch.float32)


def _yarn(text: KeyReader, key: str) -> YarnConfig | None:
    block = text.section(key)
    kinds = ("yarn", "default")
    kind_key = "rope_type" if block.given(["rope_type"]) else "type"
    kind = block.choice(kind_key, kinds, default="default")
    if block.given(["type"]):
        block.choice("type", (kind,))
    if kind == "default":
        return None
    block.absent("attention_factor")
    block.choice("truncate", (True,), default=True)
    return YarnConfig(
        factor=block.number("factor"),
        original_max_position_embeddings=block.integer("original_max_position_embeddings"),
        beta_fast=block.number("beta_fast", default=32.0),
        beta_slow=block.number("beta_slow", default=1.0),
        mscale=block.number("mscale", default=1.0, positive=False),
        mscale_all_dim=block.number("mscale_all_dim", default=0.0, positive=False),
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
