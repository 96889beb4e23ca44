"""linear, mlp, expert_ffn, pack_expert: every format that the backend's table names, with its corners."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from k2lite.backends.base import Assignment, Backend
from k2lite.quant.formats import FORMAT_NAMES
from k2lite.quant.types import ExpertWeights, QuantTensor

from . import oracle
from .case import Case, Measured, demand
from .samples import corner_matrix, expert, matrix, normal, on_device, packed, rows_with_corners, smallest_step

HIDDEN, WIDTH, TOKENS = 128, 128, 9
# Errors of a gate and an up projection come together in what the down projection multiplies.
MLP_GROWTH = 4.0


def cases() -> Iterator[Case]:
    for name in FORMAT_NAMES:

        def takes(can: object, name: str = name) -> bool:
            return name in can.formats  # type: ignore[attr-defined]

        step = smallest_step(name)
        shapes = {(1, step), (5, 3 * step), (136, -(-192 // step) * step), (40, -(-640 // step) * step)}
        for rows, columns in sorted(shapes):
            said = f"{name} [{rows}, {columns}]"
            yield Case("linear", said, partial(_linear, matrix(1, name, rows, columns)), takes)
        columns = -(-192 // step) * step
        yield Case("linear", f"{name}, every code", partial(_linear, corner_matrix(2, name, 136, columns)), takes)
        yield Case("linear", f"{name}, parts at 8 bytes", partial(_shifted, matrix(3, name, 24, columns)), takes)
        yield Case("linear", f"{name}, no tokens", partial(_no_tokens, matrix(3, name, 24, columns)), takes)
        yield Case("linear", f"{name}, bits", partial(_linear_bits, matrix(4, name, 72, columns)), takes)
        yield Case("mlp", name, partial(_mlp, expert(5, (name, name, name), HIDDEN, WIDTH)), takes)

        def takes_expert(can: object, name: str = name) -> bool:
            return name in can.formats_of(experts=True)  # type: ignore[attr-defined]

        yield Case("expert_ffn", name, partial(_expert_ffn, name), takes_expert)
        yield Case("expert_ffn", f"{name}, order of work", partial(_order_of_work, name), takes_expert)
        yield Case("pack_expert", name, partial(_pack, name), takes_expert)
    yield Case("expert_ffn", "no work", _no_work)


def _linear(weight: QuantTensor, backend: Backend) -> Measured:
    x = rows_with_corners(10, TOKENS, weight.shape[1])
    found = backend.linear(backend.upload(x), on_device(backend, weight))
    expected = oracle.linear(oracle.exact(x), oracle.weight_values(weight))
    return Measured(oracle.relative_error(found, expected), backend.capabilities().numerics.linear_error)


def _shifted(weight: QuantTensor, backend: Backend) -> None:
    """Where a weight lies must not decide a bit, nor must x being a slice of something wider."""
    wide = backend.upload(normal(11, 3, weight.shape[1] + 7))
    x = wide[:, 5 : 5 + weight.shape[1]]
    aligned = backend.linear(x.contiguous(), on_device(backend, weight))
    for shift in (8, 40):
        found = backend.linear(x, on_device(backend, weight, shift=shift))
        demand(torch.equal(found, aligned), f"another result for a weight {shift} bytes behind a boundary")


def _no_tokens(weight: QuantTensor, backend: Backend) -> None:
    found = backend.linear(backend.upload(normal(1, 0, weight.shape[1])), on_device(backend, weight))
    demand(tuple(found.shape) == (0, weight.shape[0]), f"shape {list(found.shape)} for no tokens")


def _linear_bits(weight: QuantTensor, backend: Backend) -> None:
    x = backend.upload(rows_with_corners(12, TOKENS, weight.shape[1]))
    there = on_device(backend, weight)
    whole = backend.linear(x, there)
    demand(torch.equal(whole, backend.linear(x, there)), "another result the second time")
    if backend.capabilities().numerics.batch_invariant:
        for token in range(TOKENS):
            alone = backend.linear(x[token : token + 1], there)[0]
            demand(torch.equal(alone, whole[token]), f"row {token} alone has other bits than among others")


def _mlp(weights: ExpertWeights, backend: Backend) -> Measured:
    x = normal(13, TOKENS, HIDDEN)
    found = backend.mlp(backend.upload(x), ExpertWeights(*(on_device(backend, weight) for weight in weights)))
    bound = MLP_GROWTH * backend.capabilities().numerics.linear_error
    return Measured(oracle.relative_error(found, oracle.mlp(oracle.exact(x), weights)), bound)


def _work(backend: Backend, format: str) -> tuple[list[tuple[ExpertWeights, list[int], list[int]]], list[Assignment]]:
    """Three experts, the last without rows, for four tokens with two slots each; slot 1 of token 2 is nobody's."""
    plan = [([0, 1, 3], [0, 1, 0]), ([0, 1, 2, 3], [1, 0, 0, 1]), ([], [])]
    sources = [
        (expert(20 + 3 * number, (format, format, format), HIDDEN, WIDTH), *places)
        for number, places in enumerate(plan)
    ]
    work = [
        Assignment(packed(backend, source), *(backend.upload(torch.tensor(index).long()) for index in (rows, slots)))
        for source, rows, slots in sources
    ]
    return sources, work


def _expert_ffn(format: str, backend: Backend) -> Measured:
    x = normal(14, 4, HIDDEN)
    sources, work = _work(backend, format)
    out = backend.upload(torch.full((4, 2, HIDDEN), 7.0))
    backend.expert_ffn(backend.upload(x), work, out).wait()
    demand(bool((out[2, 1] == 7.0).all()), "wrote to a slot that was not assigned")
    error = 0.0
    for source, rows, slots in sources:
        if rows:
            expected = oracle.mlp(oracle.exact(x)[rows], source)
            error = max(error, oracle.relative_error(backend.download(out)[rows, slots], expected))
    return Measured(error, MLP_GROWTH * backend.capabilities().numerics.linear_error)


def _order_of_work(format: str, backend: Backend) -> None:
    """Experts come as they are read: neither their order nor the calls they come in may decide a bit."""
    x = backend.upload(normal(15, 4, HIDDEN))
    _, work = _work(backend, format)
    results = []
    for calls in ([work], [work[::-1]], [[item] for item in work]):
        out = backend.upload(torch.zeros(4, 2, HIDDEN))
        for call in calls:
            backend.expert_ffn(x, call, out).wait()
        results.append(out)
    demand(all(torch.equal(results[0], other) for other in results[1:]), "the order of work changed bits")


def _no_work(backend: Backend) -> None:
    out = backend.upload(torch.ones(2, 2, 8))
    backend.expert_ffn(backend.upload(normal(1, 2, 8)), [], out).wait()
    demand(bool((out == 1).all()), "wrote something without work")


def _pack(format: str, backend: Backend) -> None:
    source = expert(30, (format, format, format), HIDDEN, WIDTH)
    room = backend.expert_slot([(weight.format, weight.shape) for weight in source])
    slot = backend.alloc(room.nbytes)
    found = backend.pack_expert(source, slot)
    begin, end = slot.data_ptr(), slot.data_ptr() + room.nbytes
    for mine, theirs in zip(found, source, strict=True):
        same = torch.equal(mine.dequantize().cpu(), theirs.dequantize())
        demand(same and mine.shape == theirs.shape, "an expert's values are others once it is packed")
        inside = all(begin <= part.data_ptr() and part.data_ptr() + part.nbytes <= end for part in mine.parts.values())
        demand(inside, "a packed part lies outside its slot")
