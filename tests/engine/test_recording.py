"""What a recorder is told is what the matrices read: against transformers' own modules, and without changing a bit."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import k2lite
from k2lite.calibration import WAITING_FACTORS, Calibration, demand_memory
from k2lite.errors import MemoryPlanError
from k2lite.model_folder import open_model
from k2lite.moment_recorder import MomentRecorder
from k2lite.quant import error_compensation
from k2lite.quant.formats import format_named
from k2lite.quant.moments import PRIOR_TOKENS, Moments
from k2lite.quant.quantizer import READ_AHEAD_BLOCKS, quantize
from k2lite.quant.recipe import Recipe
from tests.checkpoints import Weights, random_weights, tiny_config, write_checkpoint
from tests.model.oracle import load_oracle
from tests.quant.quantizing import make_job, make_plan, write_source

IDS = [3, 150, 7, 7, 21, 90, 14, 15, 92, 65, 35]
CONFIG = tiny_config(num_hidden_layers=2)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    folder = tmp_path_factory.mktemp("recording") / "model"
    return folder, write_checkpoint(folder, CONFIG, random_weights(CONFIG, seed=3), format="bf16")


def inputs_by_transformers(tmp_path: Path, weights: Weights) -> dict[str, torch.Tensor]:
    """The inputs of every Linear of the trunk."""
    model = load_oracle(tmp_path / "oracle", CONFIG, weights)
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: seen.update({name: inputs[0].detach().flatten(0, -2)})

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        model(torch.tensor([IDS]), use_cache=False)
    return seen


def test_moments_are_those_of_what_the_matrices_read(values: tuple[Path, Weights], tmp_path: Path) -> None:
    folder, weights = values
    recorder = MomentRecorder()
    engine = k2lite.load(folder, backend="reference", recorder=recorder)
    logits = engine.logits(IDS)
    assert torch.equal(logits, k2lite.load(folder, backend="reference").logits(IDS))
    engine.logits(IDS)  # a second time: means and counts over both
    schema = open_model(folder)[1].schema
    recorder.write(tmp_path / "m", schema.matrix_widths(), model="x", tokens=2 * len(IDS))
    moments = Moments(tmp_path / "m")
    assert moments.widths() == schema.matrix_widths()
    theirs = inputs_by_transformers(tmp_path, weights)
    trunk = [name for name in schema.matrix_widths() if ".mlp.experts." not in name]
    for name in trunk:
        assert torch.allclose(moments.of(name), theirs[name].square().mean(0), rtol=2e-4, atol=1e-7), name
    # every token goes to K experts, so these together read what the shared expert reads, K times
    at = "model.layers.1.mlp"
    active, total = CONFIG["num_experts_per_tok"], torch.zeros(CONFIG["hidden_size"])
    counts = {expert: moments._counts[f"{at}.experts.{expert}.gate_proj"] for expert in range(8)}
    for expert, count in counts.items():
        total += count * moments._moment(f"{at}.experts.{expert}.gate_proj")
    assert sum(counts.values()) == 2 * len(IDS) * active
    shared = moments.of(f"{at}.shared_experts.gate_proj")
    assert torch.allclose(total / (2 * len(IDS) * active), shared, rtol=1e-5)


def test_hessians_are_those_of_what_the_matrices_read(values: tuple[Path, Weights], tmp_path: Path) -> None:
    folder, weights = values
    _, checkpoint = open_model(folder)
    calibration = Calibration(checkpoint, "text", 2 * len(IDS))
    engine = k2lite.load(folder, backend="reference", recorder=calibration)
    for half in (IDS[:6], IDS[6:]):
        engine.logits(half)
    both = Calibration(checkpoint, "text", len(IDS))
    k2lite.load(folder, backend="reference", recorder=both).logits(IDS)
    theirs = inputs_by_transformers(tmp_path, weights)
    for name in ("model.layers.1.self_attn.kv_b_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        x = theirs[name].double()
        assert torch.allclose(both.hessian(name), x.T @ x / len(x), rtol=1e-3, atol=1e-5), name
    # a routed expert: its own tokens, found by hand, and its layer's
    at = "model.layers.1.mlp"
    x = theirs[f"{at}.shared_experts.gate_proj"].double()
    scores = torch.sigmoid(x @ weights[f"{at}.gate.weight"].double().T)
    chosen = (scores + weights[f"{at}.gate.e_score_correction_bias"].double()).topk(3).indices
    expert = int(chosen.flatten().mode().values)
    mine = x[(chosen == expert).any(1)]
    expected = (mine.T @ mine + PRIOR_TOKENS * x.T @ x / len(x)) / (len(mine) + PRIOR_TOKENS)
    assert torch.allclose(both.hessian(f"{at}.experts.{expert}.up_proj"), expected, rtol=1e-3, atol=1e-5)
    gate, up = (weights[f"{at}.experts.{expert}.{name}.weight"].double() for name in ("gate_proj", "up_proj"))
    hidden = torch.nn.functional.silu(mine @ gate.T) * (mine @ up.T)
    flat = torch.eye(hidden.shape[1]).double() * hidden.square().mean()
    expected = (hidden.T @ hidden + PRIOR_TOKENS * flat) / (len(mine) + PRIOR_TOKENS)
    assert torch.allclose(both.hessian(f"{at}.experts.{expert}.down_proj"), expected, rtol=1e-3, atol=1e-6)
    # windows of the same text are other contexts, and as many tokens
    assert sum(len(rows) for chunks in calibration._routed.values() for _, rows in chunks) == 3 * len(IDS)


def test_more_than_memory_is_refused_with_the_sum(values: tuple[Path, Weights]) -> None:
    folder, _ = values
    config, _ = open_model(folder)
    plan = make_plan(folder, Recipe(experts="int4_g32", trunk="keep", lm_head="keep"))
    demand_memory(config, plan, 1000)
    # by hand: attention 64 + 24 + 32 + 4 x 20 a layer, feed-forward 64 + 96 and 64 + 32, head 64
    hessians = 6 * 96 * 96 * 8 + (READ_AHEAD_BLOCKS + 1) * 96 * 96 * 4
    with pytest.raises(MemoryPlanError) as refused:
        demand_memory(config, plan, 10**9)
    assert "720 numbers a token x 1000000000 tokens x 4 bytes = 2682.21 GiB" in str(refused.value)
    assert f"{READ_AHEAD_BLOCKS + 1} factors of 4 bytes = {hessians / 2**10:.1f} KiB" in str(refused.value)


def test_no_more_factors_live_at_once_than_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's matrix has a factor of its own; here none is used before as many are made as can be."""

    class Flat:
        settings: ClassVar = {"text": "none"}

        def widths(self) -> dict[str, int]:
            return open_model(tmp_path / "model")[1].schema.matrix_widths()

        def hessian(self, module: str) -> torch.Tensor:
            return torch.eye(self.widths()[module], dtype=torch.float64)

    living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def counted(hessian: torch.Tensor) -> torch.Tensor:
        nonlocal most
        factor = inverse_factor(hessian)
        living.add(factor)
        most = max(most, len(living))
        if most >= READ_AHEAD_BLOCKS:
            queue_is_full.set()
        return factor

    def waiting(*arguments: Any) -> dict[str, torch.Tensor]:
        assert queue_is_full.wait(60)
        return compensated(*arguments)

    queue_is_full = threading.Event()
    inverse_factor, compensated = error_compensation.inverse_factor, error_compensation.compensated
    monkeypatch.setattr(error_compensation, "inverse_factor", counted)
    monkeypatch.setattr(error_compensation, "compensated", waiting)
    write_source(tmp_path / "model", "bf16", num_hidden_layers=2, n_routed_experts=16)
    job = replace(make_job(tmp_path / "model", tmp_path / "out"), hessians=Flat())
    quantize(job, resume=False, report=lambda _: None)
    assert READ_AHEAD_BLOCKS <= most <= WAITING_FACTORS


def test_an_expert_that_no_token_chose_has_the_layers_moments(values: tuple[Path, Weights], tmp_path: Path) -> None:
    folder, _ = values
    recorder = MomentRecorder()
    k2lite.load(folder, backend="reference", recorder=recorder).logits([1])
    schema = open_model(folder)[1].schema
    recorder.write(tmp_path / "m", schema.matrix_widths(), model="x", tokens=1)
    moments = Moments(tmp_path / "m")
    unused = [name for name, count in moments._counts.items() if not count]
    assert len(unused) == 2 * 5  # of eight experts a token uses three; gate and down
    gate = next(name for name in unused if name.endswith("gate_proj"))
    assert torch.allclose(moments.of(gate), moments.of("model.layers.1.mlp.shared_experts.gate_proj"), rtol=1e-5)
    weight = torch.randn(4, CONFIG["hidden_size"])
    assert format_named("int4_g32").quantize(weight, scale_search="mse", importance=moments.of(gate))
