"""Prefixes on the drive: the same answers, after a restart too; nothing that is damaged or another model's is used."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import httpx
import pytest

import k2lite
from k2lite.demo_checkpoint import write_random_demo
from k2lite.engine import Engine, Sequence
from k2lite.errors import RequestError
from k2lite.server.prefix_cache import PrefixCache
from k2lite.server.prefix_store import BLOCK_TOKENS, PrefixStore
from tests.server.conftest import served

PROMPT = [65 + at % 23 for at in range(3 * BLOCK_TOKENS + 40)]
PLENTY = 1 << 30


def prefilled(engine: Engine, ids: list[int]) -> Sequence:
    sequence = engine.open()
    engine.prefill(sequence, ids)
    return sequence


def keep(engine: Engine, folder: Path, ids: list[int], *, limit_bytes: int = PLENTY) -> None:
    store = PrefixStore(folder, engine, limit_bytes=limit_bytes)
    store.save(prefilled(engine, ids))
    store.close()


def taken(engine: Engine, store: PrefixStore, ids: list[int]) -> Sequence:
    sequence, arriving = PrefixCache(engine, keep=1, store=store).take(ids, lambda: False)
    if arriving is not None:
        arriving.result()
    return sequence


def test_what_is_read_back_goes_on_as_what_was_computed(random_engine: Engine, tmp_path: Path) -> None:
    keep(random_engine, tmp_path, PROMPT)
    sequence = taken(random_engine, PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY), PROMPT)
    assert len(sequence.ids) == 3 * BLOCK_TOKENS
    computed = prefilled(random_engine, PROMPT[: 3 * BLOCK_TOKENS])
    rest = PROMPT[3 * BLOCK_TOKENS :]
    assert random_engine.prefill(sequence, rest).equal(random_engine.prefill(computed, rest))


def test_only_the_common_beginning_is_taken(random_engine: Engine, tmp_path: Path) -> None:
    keep(random_engine, tmp_path, PROMPT)
    store = PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY)
    other = [*PROMPT[:200], 66, *PROMPT[201:]]
    assert store.known(other) == BLOCK_TOKENS
    assert taken(random_engine, store, other).ids == PROMPT[:BLOCK_TOKENS]
    assert store.known([66, *PROMPT[1:]]) == 0
    assert (
        len(taken(random_engine, store, PROMPT[: 2 * BLOCK_TOKENS]).ids) == BLOCK_TOKENS
    )  # its last token begins the answer


def test_two_conversations_share_their_beginning(random_engine: Engine, tmp_path: Path) -> None:
    keep(random_engine, tmp_path, PROMPT)
    keep(random_engine, tmp_path, [*PROMPT[:-100], *PROMPT[:200]])
    assert len(list(tmp_path.glob("*.kv"))) == 3 + 2


@pytest.mark.parametrize("harm", ["flip", "cut", "lengthen", "remove", "swap"])
def test_a_damaged_block_is_computed_again(random_engine: Engine, tmp_path: Path, harm: str) -> None:
    keep(random_engine, tmp_path, PROMPT)
    store = PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY)
    _, second, third = sorted(tmp_path.glob("*.kv"))
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    if harm == "flip":
        second.write_bytes(data)
    elif harm == "cut":
        os.truncate(second, len(data) - 1)
    elif harm == "lengthen":
        second.write_bytes(second.read_bytes() + b"x")
    elif harm == "remove":
        second.unlink()
    else:
        second.write_bytes(b"k2lite prefix\0\0\0" + bytes(len(data) - 16))
    sequence = taken(random_engine, store, PROMPT)
    assert len(sequence.ids) == BLOCK_TOKENS
    assert store.known(PROMPT) == BLOCK_TOKENS
    assert not second.exists()
    assert third.exists()
    keep(random_engine, tmp_path, PROMPT)
    assert (
        len(taken(random_engine, PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY), PROMPT).ids)
        == len(PROMPT) - 40
    )


def test_another_model_is_not_mistaken_for_this_one(random_engine: Engine, tmp_path: Path) -> None:
    keep(random_engine, tmp_path / "store", PROMPT)
    write_random_demo(tmp_path / "model")  # the same weights, written anew
    with k2lite.load(tmp_path / "model", context=2048) as engine:
        assert PrefixStore(tmp_path / "store", engine, limit_bytes=PLENTY).known(PROMPT) == 0


def test_the_limit_holds_and_the_oldest_go_first(random_engine: Engine, tmp_path: Path) -> None:
    keep(random_engine, tmp_path, PROMPT)
    block = next(tmp_path.glob("*.kv")).stat().st_size
    other = [70, *PROMPT]
    keep(random_engine, tmp_path, other, limit_bytes=4 * block)
    store = PrefixStore(tmp_path, random_engine, limit_bytes=4 * block)
    assert store.total_bytes == 4 * block
    assert store.known(other) == 3 * BLOCK_TOKENS
    assert store.known(PROMPT) == BLOCK_TOKENS  # of one age, the longest beginning goes first


def test_a_full_drive_is_said_once_and_stops_nobody(
    random_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    store.save(prefilled(random_engine, PROMPT))
    store.save(prefilled(random_engine, [70, *PROMPT]))
    store.close()
    assert not list(tmp_path.iterdir())
    assert [record.getMessage() for record in caplog.records] == ["prefixes can't be stored: No space left on device"]


def test_a_sequence_that_is_forgotten_is_not_written(random_engine: Engine, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY)
    cache = PrefixCache(random_engine, keep=0, store=store)
    cache.give_back(prefilled(random_engine, PROMPT))  # closed before or while it is written
    cache.close()
    assert all(path.suffix == ".kv" for path in tmp_path.iterdir())


def test_a_server_that_is_started_again_knows_its_conversations(random_engine: Engine, tmp_path: Path) -> None:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1.0, "seed": 5}
    answers = []
    for expected in (0, 3 * BLOCK_TOKENS):
        store = PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY)
        with served(random_engine, store=store) as (address, service):
            reply = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
            service.scheduler.close()
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == expected
        answers.append(reply["choices"][0]["text"])
    assert answers[0] == answers[1]


def test_a_conversation_keeps_its_own_beginning_where_room_ends(random_engine: Engine, tmp_path: Path) -> None:
    keep(random_engine, tmp_path, PROMPT)
    block = next(tmp_path.glob("*.kv")).stat().st_size
    for path in tmp_path.glob("*.kv"):
        path.unlink()
    keep(random_engine, tmp_path, PROMPT, limit_bytes=2 * block)
    assert PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY).known(PROMPT) == 2 * BLOCK_TOKENS


def test_a_sequence_that_fails_while_it_waits_does_not_stop_the_others(random_engine: Engine, tmp_path: Path) -> None:
    store = PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY)
    cache = PrefixCache(random_engine, keep=4, store=store)
    failed = prefilled(random_engine, [71, *PROMPT])
    cache.give_back(failed)
    cache.drop(failed)
    cache.give_back(prefilled(random_engine, PROMPT))
    cache.close()
    assert store.known(PROMPT) == 3 * BLOCK_TOKENS


def test_another_eps_is_another_arithmetic(random_engine: Engine, tmp_path: Path) -> None:
    folder = random_engine.config.source.parent
    keep(random_engine, tmp_path, PROMPT)
    with k2lite.load(folder, context=2048, latent_norm_eps=1e-3) as engine:
        assert PrefixStore(tmp_path, engine, limit_bytes=PLENTY).known(PROMPT) == 0


def test_a_size_that_holds_no_block_is_refused(random_engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--prefix-size is 1000 bytes, and 128 tokens of this model take"):
        PrefixStore(tmp_path, random_engine, limit_bytes=1000)


def test_a_drive_that_hangs_does_not_keep_the_server(
    random_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY)
    begun, go_on = threading.Event(), threading.Event()
    real = os.replace

    def slow(source: str, target: str) -> None:
        begun.set()
        go_on.wait()
        real(source, target)

    monkeypatch.setattr("os.replace", slow)
    store.save(prefilled(random_engine, PROMPT))
    store.save(prefilled(random_engine, [70, *PROMPT]))
    begun.wait()
    threading.Timer(0.2, go_on.set).start()
    store.close(patience_s=0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "2 conversations were not stored whole: the drive took too long"
    ]
    assert len(list(tmp_path.glob("*.kv"))) == 1


def test_what_a_killed_server_left_goes(random_engine: Engine, tmp_path: Path) -> None:
    old, new = tmp_path / "a.new", tmp_path / "b.new"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    PrefixStore(tmp_path, random_engine, limit_bytes=PLENTY)
    assert not old.exists()
    assert new.exists()  # another server may be writing it
