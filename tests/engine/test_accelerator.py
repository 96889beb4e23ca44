"""An accelerator beside the host, on the stand-in device: the same tokens at any budget, and bad news that is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import k2lite
from k2lite.backends.base import Capabilities, Event, ExpertSlot
from k2lite.backends.reference import ReferenceBackend
from k2lite.backends.torch_device.expert_link import Copy, ExpertLink
from k2lite.engine import Chunk
from k2lite.errors import BackendError, DeviceLostError, DeviceMemoryError, MemoryPlanError, RequestError
from k2lite.learned_routing import keep_in_file
from k2lite.offload.cache import ExpertCache
from k2lite.offload.lease import CacheLease
from k2lite.quant.types import ExpertWeights, QuantTensor
from tests.engine.test_budgets import PREFETCH, hint_wrong
from tests.offload.caches import FaultyFiles, random_delays
from tests.samples import examples
from tests.stand_in.engines import NOTHING, ONLY_THE_BUFFER, OtherHost, StandInBackend, on_stand_in, vram_for
from tests.stand_in.runtime import StandInEvent

IDS = [3, 1, 4, 1, 5]
NEVER: frozenset[int] = frozenset()
PLACES = ("device", "host", "split")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def statistics(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "uses.safetensors"
    with k2lite.load(tiny_folder, backend="reference", context=16) as engine:
        engine.logits(IDS)
        keep_in_file(engine.experts, engine.config, path)
    return path


def greedy(engine: k2lite.Engine, tokens: int = 3) -> list[int]:
    return list(map(int, engine.generate(IDS, max_tokens=tokens, temperature=0, stop_ids=NEVER)))


def logits_of(engine: k2lite.Engine, tokens: int = 3) -> list[torch.Tensor]:
    """Of each new token, the first one behind a prompt."""
    with engine.open(16) as sequence:
        rows = [engine.prefill(sequence, IDS)]
        for _ in range(tokens):
            rows.append(engine.step([Chunk(sequence, [int(rows[-1].argmax())])])[0][0])
    return rows


def dawdle(engine: k2lite.Engine, prefetch: str, seed: int) -> None:
    """A drive that answers late and in any order; "wrong" guesses are what the router likes least."""
    cache = engine.experts
    assert isinstance(cache, ExpertCache)
    cache.store.files = FaultyFiles(random_delays(seed))
    if prefetch == "wrong":
        cache.hint = partial(hint_wrong, cache.hint, engine.config.n_routed_experts)  # type: ignore[method-assign]


@given(
    where=st.sampled_from(("device", "host")),
    device_slots=st.integers(2, 17),
    ram_slots=st.integers(4, 16),
    prefetch=st.sampled_from(PREFETCH),
    policy=st.sampled_from(("hazard", "cyclic", "lru")),
    seed=st.integers(0, 999),
    pins=st.sampled_from((0, ONLY_THE_BUFFER)),
)
@settings(max_examples=examples(5), deadline=None)
def test_any_budget_gives_the_reference_backends_bits(
    tiny_folder: Path,
    engine: k2lite.Engine,
    where: str,
    device_slots: int,
    ram_slots: int,
    prefetch: str,
    policy: str,
    seed: int,
    pins: int,
) -> None:
    """The stand-in computes as the reference backend does, so that one, without any tier, is the oracle."""
    expected = logits_of(engine)
    with on_stand_in(
        tiny_folder,
        seed,
        device_slots=device_slots,
        pins=pins,
        experts_on=where,
        policy=policy,
        prefetch=prefetch != "off",
        resident_experts=ram_slots,
    ) as (other, _):
        dawdle(other, prefetch, seed)
        for found, row in zip(logits_of(other), expected, strict=True):
            assert torch.equal(found, row)


@pytest.mark.parametrize("where", PLACES)
def test_the_arithmetic_follows_from_the_plan_and_not_from_budgets(
    tiny_folder: Path, statistics: Path, where: str
) -> None:
    """With a host that multiplies otherwise, so that an expert that changed sides would change bits."""
    hot = {"hot_experts": statistics} if where == "split" else {}
    # the hot set is part of the arithmetic, so with split the room for it stays the same
    budgets = [(3, 4), (3, 9)] if where == "split" else [(2, 4), (5, 7), (17, 16)]
    found: list[tuple[str, list[torch.Tensor]]] = []
    for seed, (device_slots, ram_slots) in enumerate(budgets):
        with on_stand_in(
            tiny_folder,
            seed,
            device_slots=device_slots,
            experts_on=where,
            host=OtherHost(),
            resident_experts=ram_slots,
            **hot,
        ) as (engine, _):
            dawdle(engine, "wrong", seed)
            assert engine.placement.experts_on(1) == where
            found.append((engine.placement.arithmetic, logits_of(engine)))
    for arithmetic, rows in found[1:]:
        assert arithmetic == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(rows, found[0][1], strict=True))


def test_where_experts_multiply_shows_in_name_and_bits(tiny_folder: Path, statistics: Path) -> None:
    names, rows = [], []
    for where, slots in (("device", 4), ("host", 4), ("split", 3), ("split", 6)):
        hot = {"hot_experts": statistics} if where == "split" else {}
        with on_stand_in(tiny_folder, device_slots=slots, experts_on=where, host=OtherHost(), **hot) as (engine, _):
            names.append(engine.placement.arithmetic)
            rows.append(logits_of(engine, 1)[-1])
    assert len(set(names)) == 4
    assert "3 experts on the device (set " in names[2]
    for first in range(4):
        for second in range(first):
            assert not torch.equal(rows[first], rows[second])


class Few(StandInBackend):
    """Lacks the experts' format, and lays out anew whatever it is given: only what it lacks may pass by."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), expert_formats=frozenset({"f32"}))

    def place_expert(self, src: ExpertWeights, slot: torch.Tensor, copy: Copy) -> ExpertWeights:
        raise AssertionError(f"{src}, which it can't multiply, is laid out by it in {slot} by {copy}")


def test_experts_on_a_device_that_lacks_their_format_fall_back_there(tiny_folder: Path, engine: k2lite.Engine) -> None:
    lines: list[str] = []
    options: dict[str, Any] = {"host_backend": "reference", "context": 16, "experts_on": "device"}
    with pytest.raises(BackendError, match="stand-in can't multiply int4_g32"):
        k2lite.load(tiny_folder, backend=Few(), **options)
    options["vram"] = vram_for(tiny_folder, 5, host_backend=ReferenceBackend(), context=16)
    with k2lite.load(tiny_folder, backend=Few(), **options, allow_fallback=True, notify=lines.append) as other:
        assert other.placement.device is not None
        assert other.placement.device.slots == 5
        assert all(torch.equal(a, b) for a, b in zip(logits_of(other), logits_of(engine), strict=True))
    assert lines == ["backend stand-in: expert_ffn falls back to plain torch: no int4_g32"]


@pytest.mark.parametrize("where", ["host", "split"])
def test_a_host_that_lays_experts_out_anew_gets_them_so(tiny_folder: Path, statistics: Path, where: str) -> None:
    """onnx takes no experts as they are stored; beside an accelerator they are packed as they are without one."""

    class Swapping(OtherHost):
        """Wants every expert's bytes the other way round."""

        def expert_slot(self, expert: Any) -> ExpertSlot:
            return replace(super().expert_slot(expert), repacked=True)

        def pack_expert(self, src: ExpertWeights, slot: torch.Tensor) -> ExpertWeights:
            packed = super().pack_expert(src, slot)
            for part in (part for matrix in packed for part in matrix.parts.values()):
                part.copy_(part.flip(0))
            return packed

        def expert_ffn(self, x: torch.Tensor, work: Any, out: torch.Tensor) -> Event:
            def back(matrix: QuantTensor) -> QuantTensor:
                return replace(matrix, parts={name: part.flip(0) for name, part in matrix.parts.items()})

            return super().expert_ffn(
                x, [replace(item, expert=ExpertWeights(*map(back, item.expert))) for item in work], out
            )

    hot = {"hot_experts": statistics} if where == "split" else {}
    rows = []
    for host in (OtherHost(), Swapping()):
        with on_stand_in(tiny_folder, device_slots=3, experts_on=where, host=host, **hot) as (engine, _):
            rows.append(logits_of(engine))
            assert engine.placement.packs_experts == isinstance(host, Swapping)
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


def test_what_stays_on_the_device_is_not_sent_again(tiny_folder: Path) -> None:
    with on_stand_in(tiny_folder, device_slots=18, experts_on="device") as (engine, backend):
        assert engine.placement.everything_fits
        tokens = greedy(engine)
        counters = engine.experts.counters
        assert counters.device.sent_experts == engine.experts.stats.distinct_experts
        assert counters.read_experts - counters.prefetch.wasted == counters.device.sent_experts
        sent = backend.runtime.sent_bytes
        assert greedy(engine) == tokens
        # the second time only ids, positions and indices go there
        assert backend.runtime.sent_bytes - sent < counters.device.sent_bytes / 4


def test_ram_is_released_after_the_copies_from_it(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in can't see this one: a kernel that it runs takes the copies that it waits for along."""
    sent: list[StandInEvent] = []
    waited: list[StandInEvent] = []
    send, synchronize, release = ExpertLink.send, StandInEvent.synchronize, CacheLease.release

    def noted(*args: Any, **options: Any) -> Any:
        found = send(*args, **options)
        sent.append(found.event)  # type: ignore[arg-type]
        return found

    def checked(lease: CacheLease) -> None:
        assert all(event in waited for event in sent)
        release(lease)

    monkeypatch.setattr(ExpertLink, "send", noted)
    monkeypatch.setattr(StandInEvent, "synchronize", lambda event: (waited.append(event), synchronize(event))[1])
    monkeypatch.setattr(CacheLease, "release", checked)
    with on_stand_in(tiny_folder, device_slots=4, experts_on="device", resident_experts=6) as (engine, _):
        greedy(engine, 2)
    assert sent


def test_auto_takes_the_device_if_half_of_the_experts_have_room(tiny_folder: Path) -> None:
    for slots, expected in ((7, "host"), (8, "device")):
        with on_stand_in(tiny_folder, device_slots=slots) as (engine, _):
            assert engine.placement.multiply_on == expected
            assert ("experts on the device" in str(engine.placement)) == (expected == "device")


def test_pages_that_can_t_be_locked_are_told_once(tiny_folder: Path, engine: k2lite.Engine) -> None:
    said: list[str] = []
    options = {"experts_on": "device", "device_slots": 5, "notify": said.append}
    with on_stand_in(tiny_folder, pins=ONLY_THE_BUFFER, **options) as (other, _):
        said.clear()
        assert greedy(other) == greedy(engine)
        assert other.experts.counters.device.returned_bytes == 0
        assert other.experts.counters.device.demoted_experts > 0
    assert len(said) == 1
    assert "through a small pinned buffer" in said[0]
    with (
        on_stand_in(tiny_folder, pins=NOTHING, **options) as (other, _),
        pytest.raises(BackendError, match="ulimit -l"),
    ):
        greedy(other)


def test_short_memory_on_the_device_is_a_plan_error_with_the_sum(tiny_folder: Path) -> None:
    with pytest.raises(MemoryPlanError, match=r"trunk .* \+ KV .* \+ a step .* = .*, and stand-in may give 200.0 MiB"):
        k2lite.load(tiny_folder, backend=StandInBackend(), vram="200MiB", host_backend="reference")
    with pytest.raises(MemoryPlanError, match="--vram 8.00 GiB is more than the .* available"):
        k2lite.load(tiny_folder, backend=StandInBackend(), vram="8GiB", host_backend="reference")
    with (
        pytest.raises(MemoryPlanError, match="experts that multiply there take 2 slots"),
        on_stand_in(tiny_folder, device_slots=1, experts_on="device"),
    ):
        pass


def test_out_of_memory_in_mid_run_fails_one_request_and_no_other(tiny_folder: Path, engine: k2lite.Engine) -> None:
    expected = logits_of(engine)
    with on_stand_in(tiny_folder, device_slots=5, experts_on="device") as (other, backend):
        with other.open(16) as living:
            first = other.prefill(living, IDS)
            with backend.runtime.only(1000), pytest.raises(DeviceMemoryError, match="a smaller --context or fewer"):
                logits_of(other)
            runtime = backend.runtime
            runtime.peak_bytes = before = runtime.used_bytes
            with living.fork(len(IDS)) as other_one:
                other.step([Chunk(other_one, [int(first.argmax())])])
            takes = runtime.peak_bytes - before
            for share in (0.2, 0.4, 0.6):  # somewhere in a step
                with runtime.only(int(share * takes)), pytest.raises(DeviceMemoryError, match="no memory left"):
                    other.step([Chunk(living, [int(first.argmax())])])
                assert living.ids == IDS
            (row,) = other.step([Chunk(living, [int(first.argmax())])])
            assert torch.equal(row[0], expected[1])
        assert all(torch.equal(a, b) for a, b in zip(logits_of(other), expected, strict=True))


def test_a_lost_device_is_told_at_once_and_for_good(tiny_folder: Path) -> None:
    backend = StandInBackend()
    engine = k2lite.load(tiny_folder, backend=backend, experts_on="device", host_backend="reference", context=16)
    with engine.open(16) as sequence:
        engine.prefill(sequence, IDS)
        backend.runtime.lose()
        for _ in range(2):
            with pytest.raises(DeviceLostError, match="fell off the bus; start k2lite again") as told:
                engine.step([Chunk(sequence, [1])])
            assert "\n" not in str(told.value)
        assert sequence.ids == IDS
    with pytest.raises(DeviceLostError):
        engine.open(16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_on": "split"}, "need --hot-experts FILE"),
        ({"hot_experts": "x"}, "hot_experts has no effect unless experts_on is split"),
        ({"threads": 2, "host_backend": ReferenceBackend()}, "options of a host_backend that load"),
    ],
)
def test_options_that_contradict_are_refused(tiny_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        k2lite.load(tiny_folder, backend=StandInBackend(), **{"host_backend": "reference", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"threads": 1}, {"activations": "bf16"}])
def test_options_of_the_host_are_refused_where_nothing_multiplies_there(
    tiny_folder: Path, statistics: Path, option: dict[str, object]
) -> None:
    """Whether the user put all experts on the device, or memory's size did."""
    split = {"experts_on": "split", "hot_experts": statistics}
    for slots, placed, works in (
        (8, {}, False),
        (8, {"experts_on": "device"}, False),
        (16, split, False),
        (7, {}, True),
        (15, split, True),
    ):
        vram = vram_for(tiny_folder, slots, context=16, host_backend="reference", **placed)
        options = {"context": 16, "vram": vram, **placed, **option}
        if works:
            k2lite.load(tiny_folder, backend=StandInBackend(), **options).close()  # type: ignore[arg-type]
            continue
        with pytest.raises(RequestError, match=f"{next(iter(option))} has no effect: all experts multiply on the dev"):
            k2lite.load(tiny_folder, backend=StandInBackend(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "in_ram"), [(0.5, 8), (8, 8), (0.25, 4), (1.0, 10), (16, 10)])
def test_a_share_of_resident_experts_is_one_of_all(tiny_folder: Path, asked: float, in_ram: int) -> None:
    """16 experts, of which 6 stay on the device and need no room in RAM."""
    with on_stand_in(tiny_folder, device_slots=8, experts_on="device", resident_experts=asked) as (engine, _):
        assert engine.placement.device is not None
        assert engine.placement.device.resident_slots == 6
        assert (engine.placement.slots, engine.placement.experts) == (in_ram, 16)
    with on_stand_in(tiny_folder, device_slots=8, experts_on="host", resident_experts=asked) as (engine, _):
        assert engine.placement.slots == (16 if in_ram == 10 else in_ram)


@pytest.mark.parametrize("option", [{"vram": "1GiB"}, {"experts_on": "host"}, {"hot_experts": "x"}])
def test_options_of_an_accelerator_have_no_effect_elsewhere(tiny_folder: Path, option: dict[str, object]) -> None:
    with pytest.raises(RequestError, match="has no effect with backend 'reference'"):
        k2lite.load(tiny_folder, backend="reference", **option)  # type: ignore[arg-type]
