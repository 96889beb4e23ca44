"""--allow-fallback: what the backend can do it does, the rest is plain torch's and told once, and never by luck."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import k2lite
from k2lite.backends.base import Assignment, Capabilities, Event, UnsupportedOperationError
from k2lite.backends.fallback import FallbackBackend
from k2lite.backends.reference import ReferenceBackend
from k2lite.errors import BackendError
from k2lite.quant.types import ExpertWeights, QuantTensor
from tests.checkpoints import random_weights, tiny_config, write_checkpoint


class Doubling(ReferenceBackend):
    """Takes plain numbers and INT4 with groups of 32, and gives twice the product, so that one sees who multiplied."""

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({"bf16", "f32", "int4_g32"}), "doubling", expert_formats=frozenset({"f32"}))

    def linear(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        if weight.shape[0] == 7:
            raise UnsupportedOperationError("7 rows are not a multiple of 8")
        return 2 * super().linear(x, weight)


def matrix(format: str, rows: int = 8, columns: int = 32) -> QuantTensor:
    from k2lite.quant.formats import format_named

    stored = format_named(format)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return QuantTensor(stored, (rows, columns), stored.quantize(values))


def test_formats_and_shapes_that_it_lacks_are_multiplied_by_plain_torch() -> None:
    lines: list[str] = []
    backend, plain, x = FallbackBackend(Doubling(), lines.append), ReferenceBackend(), torch.ones(2, 32)
    for weight, factor in ((matrix("int4_g32"), 2), (matrix("int8_channel"), 1), (matrix("f32", 7), 1)):
        assert torch.equal(backend.linear(x, weight), factor * plain.linear(x, weight))
        backend.linear(x, weight)
    assert lines == [
        "backend reference: linear falls back to plain torch: no int8_channel",
        "backend reference: linear falls back to plain torch: 7 rows are not a multiple of 8",
    ]
    assert backend.capabilities().arithmetic == "doubling, plain torch where it has none"


def test_without_it_the_refusal_is_an_error_of_one_line() -> None:
    with pytest.raises(BackendError, match="7 rows"):
        Doubling().linear(torch.ones(1, 32), matrix("f32", 7))


def test_which_expert_falls_back_does_not_depend_on_the_company_it_came_in() -> None:
    """One expert that the backend takes, one of a format and one of a shape that it does not, in any grouping."""

    class Picky(Doubling):
        def expert_ffn(self, x: torch.Tensor, work: Sequence[Assignment], out: torch.Tensor) -> Event:
            if any(item.expert.gate_proj.shape[0] == 24 for item in work):
                raise UnsupportedOperationError("a width of 24")
            return super().expert_ffn(x, work, out)

    def expert(format: str, width: int) -> ExpertWeights:
        return ExpertWeights(matrix(format, width, 32), matrix(format, width, 32), matrix(format, 32, width))

    experts = [expert("f32", 32), expert("int4_g32", 32), expert("f32", 24)]
    rows = torch.tensor([0, 1])
    work = [Assignment(expert, rows, torch.full((2,), slot)) for slot, expert in enumerate(experts)]
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    results = []
    for groups in ([work], [work[::-1]], [[item] for item in work], [work[1:], work[:1]]):
        backend = FallbackBackend(Picky(), lambda line: None)  # noqa: ARG005
        out = torch.zeros(2, 3, 32)
        for group in groups:
            backend.expert_ffn(x, group, out).wait()
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])
    plain = ReferenceBackend()
    assert torch.equal(results[0][:, 0], Doubling().mlp(x, experts[0]))
    assert torch.equal(results[0][:, 1], plain.mlp(x, experts[1]))
    assert torch.equal(results[0][:, 2], plain.mlp(x, experts[2]))


def test_a_model_loads_with_it_and_is_refused_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from k2lite.backends import registry
    from k2lite.backends.spec import BackendSpec, Probe

    class Few(ReferenceBackend):
        def capabilities(self) -> Capabilities:
            return Capabilities(frozenset({"bf16", "f32"}), "few")

    spec = BackendSpec("few", 1, 0, Few().capabilities(), lambda: Probe(True, "here"), Few)
    monkeypatch.setattr(registry, "find", lambda name: registry.Found(name, spec))
    config = tiny_config()
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=4), format="int4")
    with pytest.raises(BackendError, match="can't multiply int4_g32"):
        k2lite.load(tmp_path / "model", backend="few")
    lines: list[str] = []
    engine = k2lite.load(tmp_path / "model", backend="few", allow_fallback=True, notify=lines.append)
    found = engine.logits([1, 2, 3])
    assert torch.equal(found, k2lite.load(tmp_path / "model", backend=ReferenceBackend()).logits([1, 2, 3]))
    assert lines == ["backend reference: expert_ffn falls back to plain torch: no int4_g32"]
    assert engine.placement.arithmetic == "few, plain torch where it has none"
