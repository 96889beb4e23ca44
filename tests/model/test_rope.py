"""YaRN's numbers against the golden file and against transformers; rotation against complex multiplication."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from k2lite.backends.reference import ReferenceBackend
from k2lite.config import read_config
from k2lite.rope import RopeConfig, YarnConfig

MODELS = [
    "Kimi-K2-Instruct (K2-Base same)",
    "Kimi-K2-Instruct-0905 / K2-Thinking",
    "Kimi-K2.5/2.6/2.7",
    "DeepSeek-V3/R1",
]


@pytest.mark.parametrize("name", MODELS)
def test_numbers_equal_the_golden_file(shared: Path, name: str) -> None:
    golden = json.loads((shared / "data/derived/yarn_golden.json").read_text())[name]
    yarn = YarnConfig(golden["factor"], golden["orig"], golden["beta_fast"], golden["beta_slow"], 1.0, 1.0)
    rope = RopeConfig(golden["dim"], golden["rope_theta"], yarn)
    low, high = rope.yarn_range()
    assert (low, high) == (golden["low"], golden["high"])
    np.testing.assert_allclose(rope.frequencies(), golden["inv_freq"], rtol=1e-14)
    assert rope.cos_sin_scale == golden["cos_sin_scale"]
    assert rope.softmax_mscale == pytest.approx(golden["mscale_all"], rel=1e-15)
    assert 192**-0.5 * rope.softmax_mscale**2 == pytest.approx(golden["softmax_scale"], rel=1e-15)


PUBLISHED = {
    "Kimi-K2-Instruct": MODELS[0],
    "Kimi-K2.5": MODELS[2],
    "Kimi-K2.6": MODELS[2],
    "Kimi-K2.7-Code-NVFP4": MODELS[2],  # saved by transformers 5: the new spelling
    "DeepSeek-V3": MODELS[3],
    "DeepSeek-R1": MODELS[3],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_leads_to_the_golden_numbers(shared: Path, name: str) -> None:
    golden = json.loads((shared / "data/derived/yarn_golden.json").read_text())[PUBLISHED[name]]
    config = read_config(shared / "data" / name)
    assert config.softmax_scale == pytest.approx(golden["softmax_scale"], rel=1e-15)
    np.testing.assert_allclose(config.rope.frequencies(), golden["inv_freq"], rtol=1e-14)
    assert config.rope.cos_sin_scale == golden["cos_sin_scale"]


def test_every_golden_model_is_tested(shared: Path) -> None:
    assert set(MODELS) <= (found := set(json.loads((shared / "data/derived/yarn_golden.json").read_text())))
    assert len(found - set(MODELS)) == 0, found


@given(
    theta=st.sampled_from([1e4, 5e4, 1e6]),
    pairs=st.integers(2, 48),
    factor=st.floats(1.5, 80),
    original=st.integers(1, 8192),
    beta_fast=st.floats(1, 40),
)
@example(theta=1e4, pairs=8, factor=4.0, original=6, beta_fast=2.0)  # low equals high: no division by zero
@settings(deadline=None)
def test_frequencies_equal_transformers(
    theta: float, pairs: int, factor: float, original: int, beta_fast: float
) -> None:
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    block = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    }
    config = DeepseekV3Config(
        qk_rope_head_dim=2 * pairs, head_dim=2 * pairs, rope_parameters=block, max_position_embeddings=1 << 20
    )
    theirs, their_scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours = RopeConfig(2 * pairs, theta, YarnConfig(factor, original, beta_fast, 1.0, 1.0, 0.5))
    np.testing.assert_allclose(ours.frequencies(), theirs.double().numpy(), rtol=2e-6)
    assert ours.cos_sin_scale == pytest.approx(their_scale)


@given(tokens=st.integers(1, 5), heads=st.integers(1, 3), pairs=st.integers(1, 8), seed=st.integers(0, 99))
@settings(deadline=None)
def test_rotation_turns_interleaved_pairs_as_complex_numbers(tokens: int, heads: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, 2 * pairs, generator=generator)
    angles = torch.rand(tokens, pairs, generator=generator) * 6
    turned = torch.view_as_complex(x.view(tokens, heads, pairs, 2).double())
    turned = turned * torch.exp(1j * angles.double())[:, None]
    ours = ReferenceBackend().rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(ours.double(), torch.view_as_real(turned).flatten(-2), rtol=1e-5, atol=1e-5)
