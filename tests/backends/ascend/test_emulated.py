"""The Ascend backend on the emulator: the whole suite, the demo's answer, packing against the documents' own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import k2lite
from k2lite.backends.ascend import backend as backend_module, experts, operations
from k2lite.backends.ascend.backend import AscendBackend
from k2lite.backends.ascend.layout import CODES, SCALES, ExpertKind, PackedAlongOutputs, packed_matrix
from k2lite.backends.ascend.packing import Packing
from k2lite.backends.base import Assignment, UnsupportedOperationError
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.errors import BackendError
from k2lite.quant.types import ExpertWeights
from k2lite.testing import oracle
from k2lite.testing.samples import corner_matrix, expert, matrix, normal
from k2lite.testing.suite import run_suite
from tests.backends.plain_runtime import PlainRuntime

from . import emulator

QUESTION = "How many centimeters are 12 meters?"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def backend() -> AscendBackend:
    emulator.install()
    emulator.calls.clear()
    return AscendBackend(PlainRuntime())


def test_it_passes_the_suite(backend: AscendBackend) -> None:
    report = run_suite(backend)
    assert [case for case in report.cases if not case.passed] == []
    assert set(emulator.calls) == set(emulator.SCHEMAS)


def test_it_answers_as_the_demo_does(
    backend: AscendBackend, demo_with: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With experts of several arenas, each one 3-D tensor; what the plan says of their memory is what they take."""
    weights: list[torch.Tensor] = []
    real = operations.grouped_matmul
    monkeypatch.setattr(experts, "grouped_matmul", lambda x, w, *rest: (weights.extend(w), real(x, w, *rest))[1])
    monkeypatch.setattr(backend_module, "MAX_GROUPS", 100)
    engine = k2lite.load(demo_with("int4_g32"), backend=backend, host_backend="reference", context=128)
    prompt = engine.tokenizer.render([{"role": "user", "content": QUESTION}])
    answer = list(engine.generate(prompt.ids, max_tokens=5, temperature=0))
    assert engine.tokenizer.decode(answer).startswith("1200 centi")
    assert set(emulator.calls) == set(emulator.SCHEMAS)
    device = engine.placement.device
    assert device is not None
    assert {weight.dim() for weight in weights} == {3}
    assert {len(weight) for weight in weights} == {100, device.slots % 100}
    in_arenas = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    zeros = backend._experts._zeros.nbytes
    assert 0 < zeros == 100 * device.beside_bytes
    assert 0 <= device.arena_bytes - zeros - sum(in_arenas.values()) < 256 * device.slots


def test_what_it_lacks_falls_back_on_the_chip(backend: AscendBackend) -> None:
    """FP8 experts keep their bytes on the way to a slot, and plain torch multiplies them there."""
    lines: list[str] = []
    with pytest.raises(BackendError, match="can't multiply fp8"):
        k2lite.load(DEMO_FOLDER, backend=backend, host_backend="reference", experts_on="device")
    with k2lite.load(
        DEMO_FOLDER,
        backend=backend,
        host_backend="reference",
        experts_on="device",
        vram=64 << 20 | 256 << 20,
        context=64,
        allow_fallback=True,
        notify=lines.append,
    ) as engine:
        prompt = engine.tokenizer.render([{"role": "user", "content": QUESTION}])
        answer = list(engine.generate(prompt.ids, max_tokens=3, temperature=0))
        assert engine.tokenizer.decode(answer).startswith("120")
    told = [line for line in lines if "falls back" in line]
    assert len(told) == len(set(told))
    assert "backend ascend: expert_ffn falls back to plain torch: no fp8_e4m3_b128" in told
    assert not emulator.calls["npu_grouped_matmul"]


def test_fp8_is_refused_with_the_recipe(backend: AscendBackend) -> None:
    with pytest.raises(
        BackendError, match=r"ascend can't multiply fp8_e4m3_b128; .* --experts int4_g32 .*--trunk int8"
    ):
        k2lite.load(DEMO_FOLDER, backend=backend, host_backend="reference")


def documented_pack(values: np.ndarray) -> np.ndarray:
    """npu_convert_weight_to_int4pack's ND rule, element by element: of each 8 along the last axis, element i goes to
    bits 4 i .. 4 i + 3 of an int32, two's complement."""
    packed = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for place in range(8):
        packed |= (values[:, place::8].astype(np.int64) & 0xF).astype(np.uint32) << np.uint32(4 * place)
    return packed.view(np.int32)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("int4_g32", 256, 384),
        ("int4_g32", 136, 160),
        ("int4_g32", 129, 96),
        ("int4_g64", 128, 128),
        ("int4_g128", 8, 256),
    ],
)
def test_codes_are_packed_as_the_vendor_documents(name: str, rows: int, columns: int) -> None:
    """Blocked kernels, plain ones and both: from float64's own decoding of what is stored."""
    stored = corner_matrix(rows + columns, name, rows, columns)
    packed = packed_matrix(stored)
    scale = oracle.exact(stored.parts["weight_scale"])
    values = oracle.weight_values(stored) / np.repeat(scale, columns // scale.shape[1], axis=1)
    wanted = np.zeros((columns, -(-rows // 8) * 8))
    wanted[:, :rows] = np.round(values).T
    assert (packed.parts[CODES].numpy() == documented_pack(wanted)).all()
    assert torch.equal(packed.parts[SCALES][:, :rows], stored.parts["weight_scale"].T)
    assert torch.equal(packed.dequantize(), stored.dequantize())


@pytest.mark.parametrize(("rows", "columns", "bits"), [(192, 128, 8), (70, 72, 8), (384, 256, 4), (131, 130, 4)])
@pytest.mark.parametrize("first", [0, 16, 64])
def test_packing_writes_its_columns_and_no_other(rows: int, columns: int, bits: int, first: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    stored = torch.randint(0, 256, (rows, -(-columns * bits // 32) * 4), generator=generator, dtype=torch.uint8)
    columns = stored.shape[1] * 8 // bits
    room = torch.full((columns, 256 + first), 0xA5, dtype=torch.uint8)
    packing = Packing()
    packing.add_codes(stored.view(torch.int32), bits, room, first)
    scales = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    there = torch.zeros(columns, rows + first + 3, dtype=torch.bfloat16)
    packing.add_scales(scales, there, first)
    packing.run()
    start, stop = first * bits // 8, first * bits // 8 + -(-rows * bits // 8)
    assert (room[:, :start] == 0xA5).all()
    assert (room[:, stop:] == 0xA5).all()
    if bits == 8:
        assert torch.equal(room[:, start:stop], (stored ^ 0x80).T)
    assert torch.equal(there[:, first : first + rows], scales.T)
    assert not there[:, first + rows :].any()


@pytest.mark.parametrize("name", ["int4_g32", "int8_channel", "bf16"])
def test_experts_of_an_arena_and_others_come_to_the_same(backend: AscendBackend, name: str) -> None:
    """One 3-D weight over all slots, most of them unused, and a list of 2-D ones, against float64."""
    sources = [expert(60 + 3 * number, (name, name, name), 128, 64) for number in range(3)]
    kind = [(weight.format, weight.shape) for weight in sources[0]]
    slots = backend.alloc_slots(kind, 7)
    order = (5, 0, 3)
    in_arena = [backend.pack_expert(source, slots[slot]) for source, slot in zip(sources, order, strict=True)]
    alone = [backend.pack_expert(source, backend.alloc(backend.expert_slot(kind).nbytes)) for source in sources]
    for packed, source in zip(in_arena, sources, strict=True):
        assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(packed, source, strict=True))
    x = normal(70, 5, 128)
    rows = [torch.tensor(r) for r in ([0, 2, 4], [1, 2], [3, 0])]
    places = [torch.tensor(p) for p in ([0, 1, 0], [0, 0], [0, 1])]

    def run(packed: list[ExpertWeights]) -> torch.Tensor:
        out = torch.full((5, 2, 128), 7.0)
        backend.expert_ffn(x, [Assignment(*item) for item in zip(packed, rows, places, strict=True)], out).wait()
        return out

    found = run(in_arena)
    assert emulator.calls["npu_grouped_matmul"] == 2
    assert torch.equal(found, run(alone))
    for source, row, place in zip(sources, rows, places, strict=True):
        expected = oracle.mlp(oracle.exact(x)[row.numpy()], source)
        assert oracle.relative_error(found[row, place], expected) < 2e-2
    assert (found[1, 1] == 7.0).all()


def test_arenas_and_lists_are_as_large_as_the_operation_takes(backend: AscendBackend) -> None:
    small = expert(80, ("int4_g32", "int4_g32", "int4_g32"), 64, 32)
    kind = [(weight.format, weight.shape) for weight in small]
    slots = backend.alloc_slots(kind, operations.MAX_GROUPS + 2)
    arenas = [backend.pack_expert(small, slots[at]).gate_proj.format for at in (0, 1023, 1024)]
    assert [(stored.arena.slots, stored.slot) for stored in arenas] == [(1024, 0), (1024, 1023), (2, 0)]  # type: ignore[attr-defined]
    alone = backend.pack_expert(small, backend.alloc(backend.expert_slot(kind).nbytes))
    work = [Assignment(alone, torch.tensor([at]), torch.tensor([0])) for at in range(130)]
    backend.expert_ffn(normal(81, 130, 64), work, torch.empty(130, 1, 64)).wait()
    assert emulator.calls["npu_grouped_matmul"] == 4  # 128 and 2


def test_what_has_no_layout_is_refused(backend: AscendBackend) -> None:
    gate, down = expert(90, ("int4_g32", "int4_g32", "bf16"), 64, 32), matrix(91, "int4_g64", 32, 64)
    with pytest.raises(UnsupportedOperationError, match="gate_proj is int4_g32 and up_proj int4_g64"):
        ExpertKind.of([(w.format, w.shape) for w in (gate.gate_proj, down, gate.down_proj)])
    wide = packed_matrix(matrix(92, "int8_channel", 4, 70_000))
    with pytest.raises(UnsupportedOperationError, match="sides are 65535 at most"):
        backend.linear(torch.ones(1, 70_000), wide)
    with pytest.raises(UnsupportedOperationError, match="can't multiply fp8_e4m3_b128"):
        backend.linear(torch.ones(1, 128), matrix(93, "fp8_e4m3_b128", 4, 128))
    many = [torch.zeros(1, 130, width) for width in (8, 16)]
    with pytest.raises(UnsupportedOperationError, match="this model has 130, 64 and 16"):
        backend.attention(*many, [], matrix(94, "bf16", 130 * 16, 64), 0.1)
    assert isinstance(wide.format, PackedAlongOutputs)
