"""Rotary position embedding with YaRN: frequencies, tables of cosines and sines, and the factor on the scores.

Invariant: pairs are interleaved, (x0, x1), (x2, x3), ..., as the checkpoint's rows are; the half-rotation of other
models would be wrong here. YaRN acts at all lengths, as in Hugging Face, vLLM, SGLang and llama.cpp.
Formulas: YaRN (arXiv 2309.00071) with DeepSeek-V3's two mscale values (arXiv 2412.19437).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from k2lite.quant.errors import ConfigError

from .config_reader import KeyReader


@dataclass(frozen=True)
class YarnConfig:
    """The yarn block. Defaults for absent keys are those of DeepSeek's code and of Hugging Face's."""

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
        _whole_rotation(text)
        blocks = [text.section(key) for key in ("rope_scaling", "rope_parameters") if text.mapping(key) is not None]
        yarns = {_yarn(block) for block in blocks} or {None}
        thetas = {place.number("rope_theta") for place in (text, *blocks) if place.given(["rope_theta"])}
        if len(yarns) > 1:
            raise ConfigError(f"{text.path}: rope_scaling and rope_parameters are both given and differ; keep one")
        if len(thetas) > 1:
            raise ConfigError(f"{text.path}: rope_theta is given in two places, and the two differ; keep one")
        theta = thetas.pop() if thetas else text.number("rope_theta")
        if theta <= 1:
            raise ConfigError(f"{text.path}: rope_theta is {theta}; supported: a number greater than 1")
        return cls(dim, theta, yarns.pop())

    @property
    def softmax_mscale(self) -> float:
        """YaRN's factor on the attention scores enters squared: once for the query, once for the key."""
        return 1.0 if self.yarn is None else _mscale(self.yarn.factor, self.yarn.mscale_all_dim)

    @property
    def cos_sin_scale(self) -> float:
        if self.yarn is None:
            return 1.0
        return _mscale(self.yarn.factor, self.yarn.mscale) / _mscale(self.yarn.factor, self.yarn.mscale_all_dim)

    @cache  # noqa: B019 (a config lives as long as its model, and there are few)
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


def _whole_rotation(reader: KeyReader) -> None:
    """qk_rope_head_dim is what rotates, all of it."""
    share = reader.number("partial_rotary_factor", default=1.0)
    if share != 1:
        raise ConfigError(f"{reader.path}: partial_rotary_factor is {share}; supported: 1")


def _yarn(block: KeyReader) -> YarnConfig | None:
    _whole_rotation(block)
    kinds = ("yarn", "default")
    kind_key = "rope_type" if block.given(["rope_type"]) else "type"
    kind = block.choice(kind_key, kinds, default="default")
    if block.given(["type"]):
        block.choice("type", (kind,))
    if kind == "default":
        return None
    block.absent("attention_factor")
    block.choice("truncate", (True,), default=True)
    mscale, mscale_all_dim = 1.0, 0.0
    # one alone is refused: DeepSeek's code, vLLM and SGLang take another value for the other than Hugging Face's does
    if block.given(["mscale", "mscale_all_dim"]):
        mscale, mscale_all_dim = block.number("mscale"), block.number("mscale_all_dim")
    return YarnConfig(
        factor=block.number("factor"),
        original_max_position_embeddings=block.integer("original_max_position_embeddings"),
        beta_fast=block.number("beta_fast", default=32.0),
        beta_slow=block.number("beta_slow", default=1.0),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
