"""Perplexity, KL and agreement against float64 numpy written another way, and what the bootstrap promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import k2lite
from k2lite.errors import K2LiteError, RequestError
from k2lite.evaluation import (
    bootstrap_interval,
    check_same_vocabulary,
    evaluate,
    score_window,
    split_windows,
    summarize,
)
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

IDS = [(11 * at * at + 5 * at + 3) % 160 for at in range(70)]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> k2lite.Engine:
    """The model of `engine` stored in bfloat16: near it, and not it."""
    folder = tmp_path_factory.mktemp("second") / "model"
    config = tiny_config()
    write_checkpoint(folder, config, random_weights(config, seed=0), format="bf16")
    return k2lite.load(folder, backend="reference", context=256)


def probabilities(engine: k2lite.Engine, ids: list[int]) -> np.ndarray:
    """float64 [T, V] by the definition of softmax, each row shifted by its mean (not by its maximum)."""
    logits = engine.logits(ids).numpy().astype(np.float64)
    powers = np.exp(logits - logits.mean(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def oracle(a: k2lite.Engine, b: k2lite.Engine, windows: list[list[int]]) -> tuple[float, float, float, float]:
    """Perplexities, KL and agreement, token by token in plain Python."""
    loss_a, loss_b, divergence, agree = [], [], [], []
    for ids in windows:
        p, q = probabilities(a, ids), probabilities(b, ids)
        for at in range(1, len(ids)):
            before_p, before_q = p[at - 1], q[at - 1]
            loss_a.append(-math.log2(before_p[ids[at]]))
            loss_b.append(-math.log2(before_q[ids[at]]))
            divergence.append(math.fsum(x * math.log(x / y) for x, y in zip(before_p, before_q, strict=True)))
            agree.append(int(np.argsort(before_p)[-1] == np.argsort(before_q)[-1]))
    n = len(loss_a)
    return 2 ** (math.fsum(loss_a) / n), 2 ** (math.fsum(loss_b) / n), math.fsum(divergence) / n, sum(agree) / n


def test_every_measure_is_that_of_plain_float64_arithmetic(engine: k2lite.Engine, second: k2lite.Engine) -> None:
    windows = split_windows(IDS, 48)  # 48 and 22: more rows than one block of the softmax, and a short window
    assert [len(window) for window in windows] == [48, 22]
    seen: list[int] = []
    result = evaluate(engine, second, windows, seen.append)
    assert seen == [1, 2]
    assert (result.windows, result.scored_tokens) == (2, 68)
    found = (result.perplexity_a, result.perplexity_b, result.kl, result.top1_agreement)
    values = [estimate.value for estimate in found if estimate is not None]
    assert values == pytest.approx(oracle(engine, second, [list(window) for window in windows]), rel=1e-10)
    assert result.kl is not None
    assert result.kl.value > 0
    assert result.perplexity_a.value != values[1]
    for estimate in found:
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high


def test_a_model_does_not_differ_from_itself(engine: k2lite.Engine) -> None:
    result = evaluate(engine, engine, split_windows(IDS[:40], 20))
    assert result.kl is not None
    assert result.top1_agreement is not None
    assert (result.kl.value, result.kl.low, result.kl.high) == (0, 0, 0)
    assert (result.top1_agreement.value, result.top1_agreement.low) == (1, 1)
    assert result.perplexity_a == result.perplexity_b
    alone = evaluate(engine, None, split_windows(IDS[:40], 20))
    assert alone.perplexity_a == result.perplexity_a
    assert (alone.perplexity_b, alone.kl, alone.top1_agreement) == (None, None, None)


def test_kl_is_of_b_from_a_and_not_the_other_way() -> None:
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])
    scores = score_window([0, 1], p.log().expand(2, 2), q.log().expand(2, 2))
    expected = [-math.log(0.25), math.log(2), 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 1]
    assert scores[:, 0] == pytest.approx(expected, rel=1e-6)


def test_the_first_token_is_not_scored_and_the_last_logits_are_unused() -> None:
    logits = torch.zeros(3, 5)
    logits[2] = torch.inf  # what follows the window is nobody's business
    scores = score_window([4, 1, 2], logits, None)
    assert scores.shape == (1, 2)
    assert scores[0] == pytest.approx(math.log(5))


def test_windows_cover_the_text_once() -> None:
    assert split_windows(range(9), 4) == [range(4), range(4, 8)]  # one token alone can't be scored
    assert split_windows(range(10), 4) == [range(4), range(4, 8), range(8, 10)]
    assert split_windows(range(3), 512) == [range(3)]
    with pytest.raises(RequestError, match="the text has 1 tokens; at least 2"):
        split_windows([7], 4)
    with pytest.raises(RequestError, match="the text has 0 tokens"):
        split_windows([], 4)
    with pytest.raises(RequestError, match="a window of 1 tokens"):
        split_windows(IDS, 1)


def test_one_window_has_no_interval() -> None:
    result = summarize(np.array([[6.0]]), np.array([3.0]))
    assert result.perplexity_a.value == pytest.approx(math.exp(2))
    assert (result.perplexity_a.low, result.perplexity_a.high) == (None, None)


def test_the_interval_is_the_same_every_time_and_depends_on_the_seed() -> None:
    draw = np.random.default_rng(1)
    counts = draw.integers(5, 50, 30).astype(np.float64)
    sums = draw.normal(2, 1, (30, 2)) * counts[:, None]
    first, again = bootstrap_interval(sums, counts), bootstrap_interval(sums, counts)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, bootstrap_interval(sums, counts, seed=1))


def test_the_interval_covers_the_truth_and_is_as_wide_as_theory_says() -> None:
    """Of 200 samples with a known mean, about 95 % of the intervals hold it. Windows are blocks: their tokens share a
    level, which an interval over single tokens would be far too narrow for."""
    draw = np.random.default_rng(0)
    windows, tokens, held, widths = 60, 20, 0, []
    for _ in range(200):
        level = draw.normal(3, 1, windows)
        sums = (level[:, None] + draw.normal(0, 0.5, (windows, tokens))).sum(axis=1)[:, None]
        low, high = bootstrap_interval(sums, np.full(windows, float(tokens)), resamples=300)
        held += bool(low[0] <= 3 <= high[0])
        widths.append(high[0] - low[0])
    assert 0.88 <= held / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt((1 + 0.5**2 / tokens) / windows), rel=0.1)


def test_logits_that_are_no_numbers_are_an_error(engine: k2lite.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "logits", lambda ids: torch.full((len(ids), 160), torch.nan))
    with pytest.raises(K2LiteError, match="window 1 of 2: the logits hold NaN or infinity"):
        evaluate(engine, None, split_windows(IDS[:8], 4))


class Words:
    """A tokenizer of these tokens."""

    def __init__(self, *tokens: bytes) -> None:
        self.n_vocab = len(tokens)
        self.token_bytes = tokens.__getitem__


class Model:
    """As much of an engine as a comparison of vocabularies looks at."""

    def __init__(self, vocab_size: int, *tokens: bytes) -> None:
        self.config = type("Config", (), {"vocab_size": vocab_size})
        self.tokenizer = Words(*tokens)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Model(9, b"a", b"b"), "A has a vocabulary of 8 and B one of 9"),
        (Model(8, b"a"), "the tokenizer of A has 2 tokens and that of B 1"),
        (Model(8, b"a", b"c"), "token 1 is b'b' in A and b'c' in B"),
    ],
)
def test_different_vocabularies_can_t_be_compared(other: Model, expected: str) -> None:
    ours = Model(8, b"a", b"b")
    check_same_vocabulary(ours, ours)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=expected):
        check_same_vocabulary(ours, other)  # type: ignore[arg-type]
