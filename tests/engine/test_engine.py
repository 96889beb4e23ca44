"""Generation, contexts, errors before work, counters, and a conversation's prefix reuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import k2lite
from k2lite.backends.base import Memory
from k2lite.backends.reference import ReferenceBackend
from k2lite.engine import Chunk
from k2lite.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    MemoryPlanError,
    RequestError,
)
from k2lite.generation_config import read_generation_config
from k2lite.kv_cache import LatentCache
from k2lite.session import Session
from tests.checkpoints import random_weights, tiny_config, write_checkpoint

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NEVER: frozenset[int] = frozenset()


def greedy(engine: k2lite.Engine, tokens: int, **options: object) -> list[int]:
    made = engine.generate(PROMPT, max_tokens=tokens, temperature=0, stop_ids=NEVER, **options)  # type: ignore[arg-type]
    return [int(token) for token in made]


def test_greedy_takes_the_most_likely_token_each_time(engine: k2lite.Engine) -> None:
    made = greedy(engine, 12)
    logits = engine.logits([*PROMPT, *made])
    assert made == logits[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_the_same_seed_gives_the_same_answer_and_another_another(engine: k2lite.Engine) -> None:
    def draw(seed: int) -> list[int]:
        return list(map(int, engine.generate(PROMPT, max_tokens=16, temperature=2.0, seed=seed, stop_ids=NEVER)))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_generation_ends_with_the_stop_id(engine: k2lite.Engine) -> None:
    made = greedy(engine, 12)
    stop = made[5]
    tokens = list(engine.generate(PROMPT, max_tokens=12, temperature=0, stop_ids=frozenset([stop])))
    assert tokens == made[: made.index(stop) + 1]
    assert [token.is_stop for token in tokens] == [False] * (len(tokens) - 1) + [True]


def test_stop_ids_come_from_config_and_generation_config(tmp_path: Path) -> None:
    config = tiny_config(eos_token_id=[7, 9])
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=0), format="bf16")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 11, "temperature": 0.25, "top_k": 3}')
    engine = k2lite.load(tmp_path / "model")
    assert engine.stop_ids == {7, 9, 11}
    assert (engine.recommended_sampling.temperature, engine.recommended_sampling.top_k) == (0.25, 3)


def test_a_token_is_an_int_with_its_log_probability(engine: k2lite.Engine) -> None:
    token = next(engine.generate(PROMPT, max_tokens=1, temperature=0))
    assert isinstance(token, int)
    expected = torch.log_softmax(engine.logits(PROMPT)[-1].double(), -1)[int(token)]
    assert token.logprob == pytest.approx(float(expected), abs=1e-9)


def test_what_does_not_fit_the_context_is_refused_before_any_work(engine: k2lite.Engine) -> None:
    before = engine.counters.prefill_tokens
    with pytest.raises(ContextLengthError, match="the prompt has 8 tokens and 249 new ones are asked for.*holds 256"):
        engine.generate(PROMPT, max_tokens=249)
    with pytest.raises(ContextLengthError, match="257 tokens asked for"):
        engine.open(257)
    with pytest.raises(ContextLengthError, match="holds 256"):
        engine.generate(list(range(100)) * 3)
    with pytest.raises(RequestError, match="empty"):
        engine.generate([])
    with pytest.raises(RequestError, match="max_tokens is 0"):
        engine.generate(PROMPT, max_tokens=0)
    with pytest.raises(RequestError, match="token id 160 is outside the vocabulary of 160"):
        engine.logits([0, 160])
    with pytest.raises(RequestError, match="token id -1"):
        engine.generate([-1], max_tokens=1)
    with pytest.raises(RequestError, match="empty"):
        engine.logits([])
    with pytest.raises(RequestError, match=r"token id 1\.5 is not an integer"):
        engine.logits([1.5])  # type: ignore[list-item]
    assert engine.counters.prefill_tokens == before


def test_sequences_that_want_the_same_experts_ask_for_them_once_a_step(engine: k2lite.Engine) -> None:
    first = engine.open(32)
    engine.prefill(first, PROMPT)
    second, third = first.fork(len(PROMPT)), first.fork(len(PROMPT))
    asked = []
    for together in ([first], [second, third]):
        before = engine.experts.counters.requested_experts
        engine.step([Chunk(sequence, [5]) for sequence in together])
        asked.append(engine.experts.counters.requested_experts - before)
    assert asked[0] == asked[1] > 0


def test_a_prompt_is_checked_whole_before_its_first_chunk(engine: k2lite.Engine) -> None:
    before = engine.experts.counters.requested_experts
    for ids, error, message in (
        ([1, 2, 3, 999], RequestError, "token id 999"),
        ([1] * 40, ContextLengthError, "room for 32"),
        ([], RequestError, "without tokens"),
    ):
        sequence = engine.open(32)
        with pytest.raises(error, match=message):
            engine.prefill(sequence, ids, chunk_tokens=2)
        assert sequence.ids == []
    with pytest.raises(RequestError, match="chunk_tokens is 0"):
        engine.prefill(engine.open(32), [1], chunk_tokens=0)
    with pytest.raises(RequestError, match="token id 160"):
        Session(engine).answer([1, 160], k2lite.SamplingParams())
    assert engine.experts.counters.requested_experts == before


def test_closing_an_answer_frees_its_cache(engine: k2lite.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = engine.open
    monkeypatch.setattr(engine, "open", lambda *args: opened.append(original(*args)) or opened[-1])
    tokens = engine.generate(PROMPT, max_tokens=9, temperature=0, stop_ids=NEVER)
    next(tokens)
    assert opened[0].cache.length == len(PROMPT)
    tokens.close()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="closed"):
        _ = opened[0].cache


def test_the_cache_holds_one_latent_a_token_and_layer(engine: k2lite.Engine) -> None:
    config = engine.config
    cache = engine.open(10).cache
    assert config.latent_dim == config.kv_lora_rank + config.qk_rope_head_dim
    assert cache._rows.shape == (config.num_hidden_layers, 10, config.latent_dim)
    assert cache._rows.nbytes == LatentCache.nbytes_for(config, 10)
    assert engine.placement.kv_bytes == LatentCache.nbytes_for(config, 256)


def test_the_context_can_be_filled_to_the_last_token(engine: k2lite.Engine) -> None:
    ids = [1] * 250
    assert len(list(engine.generate(ids, temperature=0, stop_ids=NEVER))) == 6


def test_a_context_longer_than_the_model_s_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ContextLengthError, match="context of 99999999 tokens asked for; this model takes 1 to"):
        k2lite.load(tiny_folder, context=99_999_999)


def test_counters_count(tiny_folder: Path) -> None:
    engine = k2lite.load(tiny_folder)
    greedy(engine, 5)
    counters, experts = engine.counters, engine.experts.counters
    assert (counters.prefill_tokens, counters.decode_tokens) == (len(PROMPT), 4)
    assert counters.prefill_s > 0
    assert counters.decode_s > 0
    tokens, config = len(PROMPT) + 4, engine.config
    used = engine.experts.stats.counts
    assert used.shape == (len(config.moe_layers), config.n_routed_experts)
    assert used.sum() == tokens * config.num_experts_per_tok * len(config.moe_layers)
    assert experts.read_experts == engine.experts.stats.distinct_experts <= experts.requested_experts
    assert experts.read_bytes > 0
    assert experts.read_s > 0


@pytest.mark.parametrize(
    "content",
    ['{"temperature": -1}', '{"top_p": 0}', '{"top_k": 2.5}', '{"min_p": 7}', "[]", "{", '{"eos_token_id": "x"}'],
)
def test_a_generation_config_that_makes_no_sense_names_its_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        read_generation_config(tmp_path)


def test_a_generation_config_may_say_null(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": null, "top_k": null, "eos_token_id": null}')
    assert read_generation_config(tmp_path) == ((), k2lite.SamplingParams())


def test_a_step_that_fails_at_its_logits_changes_no_sequence(
    engine: k2lite.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = engine.open(32)
    engine.prefill(sequence, PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(engine._model, "logits", _raise)
        with pytest.raises(CheckpointError):
            engine.step([Chunk(sequence, [1, 2])])
    assert (sequence.ids, sequence.cache.length) == (PROMPT, len(PROMPT))
    (logits,) = engine.step([Chunk(sequence, [1, 2])])
    assert torch.equal(logits[0], engine.logits([*PROMPT, 1, 2])[-1])


def test_a_failed_step_changes_no_sequence(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = k2lite.load(tiny_folder)
    sequence = engine.open(32)
    engine.prefill(sequence, PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(engine.experts, "lease", _raise)
        with pytest.raises(CheckpointError):
            engine.step([Chunk(sequence, [1, 2])])
    assert sequence.ids == PROMPT
    (logits,) = engine.step([Chunk(sequence, [1, 2])])
    assert torch.equal(logits[0], engine.logits([*PROMPT, 1, 2])[-1])


def _raise(*_: object) -> None:
    raise CheckpointError("a read failed")


def test_misuse_of_step_is_an_error(engine: k2lite.Engine) -> None:
    sequence = engine.open(8)
    with pytest.raises(ValueError, match="two chunks"):
        engine.step([Chunk(sequence, [1]), Chunk(sequence, [2])])
    with pytest.raises(RequestError, match="without tokens"):
        engine.step([Chunk(sequence, [])])
    with pytest.raises(ContextLengthError, match="room for 8"):
        engine.step([Chunk(sequence, [1] * 9)])
    with pytest.raises(ValueError, match="truncate"):
        sequence.truncate(5)
    sequence.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.step([Chunk(sequence, [1])])


def test_which_logits_come_back(engine: k2lite.Engine) -> None:
    shapes = []
    for wanted in ("last", "all", "none"):
        (logits,) = engine.step([Chunk(engine.open(8), [1, 2, 3], wanted)])  # type: ignore[arg-type]
        shapes.append(tuple(logits.shape))
    assert shapes == [(1, 160), (3, 160), (0, 160)]


def test_a_model_larger_than_memory_is_refused_with_the_sum(tiny_folder: Path) -> None:
    class Small(ReferenceBackend):
        def memory(self) -> Memory:
            return Memory(1 << 30, 1 << 20)

    with pytest.raises(MemoryPlanError, match=r"trunk .* \+ KV for 256 tokens .* \+ 4 experts .* = .* budget is 0"):
        k2lite.load(tiny_folder, backend=Small(), context=256)


def test_an_unknown_backend_lists_the_known(tiny_folder: Path) -> None:
    with pytest.raises(BackendError, match="backend 'gpu' is unknown; known: auto, cpu, reference"):
        k2lite.load(tiny_folder, backend="gpu")


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        k2lite.load(tmp_path / "nothing")


def test_a_folder_without_tokenizer_loads_and_only_text_raises(engine: k2lite.Engine) -> None:
    from k2lite.errors import TokenizerError

    assert len(engine.logits([1, 2])) == 2
    with pytest.raises(TokenizerError, match="tiktoken.model"):
        engine.tokenizer.encode("x")
    with pytest.raises(TokenizerError, match="tiktoken.model"):
        engine.tokenizer.render([{"role": "user", "content": "x"}])
