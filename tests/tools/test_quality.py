"""The parts of the quality table against the runtime: what a recorder is told, greedy answers, documents and ratios."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import k2lite
from k2lite.calibration import Calibration
from k2lite.model_folder import open_model
from k2lite.moment_recorder import MomentRecorder
from tools.demo_training.export import export, load_exported
from tools.demo_training.transformer import Transformer
from tools.quality.decoding import greedy
from tools.quality.inputs import record
from tools.quality.measures import Scores, logits_of, mean_kl, ratio
from tools.quality.rules import WAYS
from tools.quality.texts import Judged, packed

from .miniature import MINI_CONFIG, miniature

DOCUMENTS = [[(7 * at * at + 3 * n) % 500 for at in range(9 + 4 * n)] for n in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    torch.manual_seed(5)
    model = miniature(seed=5)
    with torch.no_grad():
        for parameter in model.parameters():  # layers begin nearly silent
            parameter.add_(0.1 * torch.randn(parameter.shape))
    target = tmp_path_factory.mktemp("quality") / "model"
    export(model, MINI_CONFIG, tokenizer_folder, target)
    return target


@pytest.fixture
def exported(folder: Path) -> Transformer:
    model = miniature().eval()
    load_exported(model, folder)
    return model


def test_a_recorder_is_told_what_the_runtime_tells_it(folder: Path, exported: Transformer) -> None:
    _, checkpoint = open_model(folder)
    ours = MomentRecorder(), Calibration(checkpoint, "", 0)
    theirs = MomentRecorder(), Calibration(checkpoint, "", 0)
    for mine, other in zip(ours, theirs, strict=True):
        assert record(exported, mine, packed(DOCUMENTS)) == sum(map(len, DOCUMENTS))
        engine = k2lite.load(folder, backend="reference", recorder=other)
        for ids in DOCUMENTS:
            engine.logits(ids)
    assert ours[0]._counts == theirs[0]._counts
    for module, total in theirs[0]._sums.items():
        assert torch.allclose(ours[0]._sums[module], total, rtol=1e-3, atol=1e-7), module
    for module in ("model.layers.2.mlp.experts.3.gate_proj", "model.layers.1.mlp.experts.2.down_proj"):
        assert torch.allclose(ours[1].hessian(module), theirs[1].hessian(module), rtol=1e-3, atol=1e-6), module


def test_greedy_answers_are_the_runtimes(folder: Path, exported: Transformer) -> None:
    engine = k2lite.load(folder, backend="reference")
    wanted = [
        list(map(int, engine.generate(ids, max_tokens=8, temperature=0, stop_ids=frozenset()))) for ids in DOCUMENTS
    ]
    assert greedy(exported, DOCUMENTS, stop=-1, max_tokens=8) == wanted
    stop = wanted[1][3]
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in wanted]
    assert greedy(exported, DOCUMENTS, stop=stop, max_tokens=8) == cut


def test_packed_documents_see_themselves_only(folder: Path, exported: Transformer) -> None:
    engine = k2lite.load(folder, backend="reference")
    for ids, logits in zip(DOCUMENTS, logits_of(exported, Judged(DOCUMENTS, 4, [])), strict=True):
        assert torch.allclose(logits, engine.logits(ids), atol=1e-4)


def test_a_ratio_of_paired_documents_is_tighter_than_its_parts() -> None:
    rng = np.random.default_rng(random.Random(3).randrange(9))
    kl, counts = rng.gamma(0.5, size=60), np.full(60, 10.0)
    scores = [Scores(np.stack((kl, factor * kl, kl), 1), counts, kl, kl) for factor in (1.0, 0.8)]
    assert ratio(scores[1], scores[0]) == pytest.approx([0.8, 0.8, 0.8])
    value, low, high = mean_kl(scores[0], slice(None))
    assert value == pytest.approx(kl.sum() / 600)
    assert low < value < high


def test_every_rule_is_compared_with_one_that_is_measured() -> None:
    titles = [way.title for way in WAYS]
    assert len(set(titles)) == len(titles)
    assert {way.base for way in WAYS} <= set(titles)
