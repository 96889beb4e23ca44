"""embed, rms_norm, rope, router, combine: what works on rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from k2lite.backends.base import Backend, Capabilities, RoutingRule
from k2lite.quant.formats import format_named
from k2lite.quant.types import QuantTensor

from . import oracle
from .case import Case, Measured, demand
from .oracle import Judged
from .samples import normal, on_device, rows_with_corners

# experts, rule, an offset of the bias (a large negative one makes every biased score negative)
ROUTES = {
    "384 experts, 8 active": (384, RoutingRule(8, 1, 1, True, 2.827), 0.0),
    "negative scores": (48, RoutingRule(6, 1, 1, True, 1.0), -3.0),
    "not normalized": (48, RoutingRule(6, 1, 1, False, 2.5), 0.0),
    "groups": (64, RoutingRule(4, 8, 3, True, 2.5), 0.0),
    "groups, negative scores": (12, RoutingRule(4, 3, 2, True, 2.5), -3.0),
    "all experts active": (8, RoutingRule(8, 1, 1, True, 1.0), 0.0),
}
ROUTER_HIDDEN = 96


def cases() -> Iterator[Case]:
    for name in ("bf16", "f16", "f32"):

        def takes(can: Capabilities, name: str = name) -> bool:
            return name in can.formats

        yield Case("embed", name, partial(_embed, name), takes)
    for tokens, width in ((9, 512), (9, 7168), (1, 1), (0, 64)):
        yield Case("rms_norm", f"[{tokens}, {width}]", partial(_rms_norm, tokens, width))
    yield Case("rms_norm", "bits", partial(_bits, _norm_of))
    for shape in ((7, 64), (7, 4, 64), (0, 4, 64), (1, 2)):
        yield Case("rope", str(list(shape)), partial(_rope, shape))
    for name, (experts, rule, offset) in ROUTES.items():

        def fits(can: Capabilities, experts: int = experts) -> bool:
            return can.max_experts is None or experts <= can.max_experts

        yield Case("router", name, partial(_router, experts, rule, offset), fits)
        yield Case("router", f"{name}, ties", partial(_ties, experts, rule, offset), fits)
    yield Case("router", "scores that vanish", _vanishing)
    yield Case("router", "no tokens", _router_without_tokens)
    for tokens, active in ((6, 8), (1, 1), (0, 4)):
        yield Case("combine", f"[{tokens}, {active}, 256]", partial(_combine, tokens, active))
    yield Case("combine", "bits", partial(_bits, _sum_of))


def _vector_bound(backend: Backend) -> float:
    return backend.capabilities().numerics.vector_error


def _embed(format: str, backend: Backend) -> None:
    stored = format_named(format)
    table = QuantTensor(stored, (40, 24), stored.quantize(normal(1, 40, 24)))
    for ids in ([3, 39, 0, 3], [5], []):
        wanted = torch.tensor(ids, dtype=torch.int64)
        found = backend.embed(backend.upload(wanted), on_device(backend, table))
        demand(found.dtype == torch.float32, f"dtype {found.dtype}")
        demand(torch.equal(found.cpu(), table.parts["weight"][wanted].float()), f"other rows than those of {ids}")


def _rms_norm(tokens: int, width: int, backend: Backend) -> Measured:
    x, weight, eps = rows_with_corners(2, tokens, width), 1 + normal(3, width), 1e-6
    found = backend.rms_norm(backend.upload(x), backend.upload(weight), eps)
    expected = oracle.rms_norm(oracle.exact(x), oracle.exact(weight), eps)
    return Measured(oracle.relative_error(found, Judged(expected, np.abs(expected))), _vector_bound(backend))


def _norm_of(backend: Backend, rows: slice) -> torch.Tensor:
    return backend.rms_norm(backend.upload(normal(4, 6, 1000)[rows]), backend.upload(normal(5, 1000)), 1e-5)


def _sum_of(backend: Backend, rows: slice) -> torch.Tensor:
    parts = (normal(6, 6, 4, 300), normal(7, 6, 4), normal(8, 6, 300))
    return backend.combine(*(backend.upload(part[rows].contiguous()) for part in parts))


def _bits(operation: Callable[[Backend, slice], torch.Tensor], backend: Backend) -> None:
    whole = operation(backend, slice(0, 6))
    demand(torch.equal(whole, operation(backend, slice(0, 6))), "another result the second time")
    if backend.capabilities().numerics.batch_invariant:
        for token in range(6):
            alone = operation(backend, slice(token, token + 1))[0]
            demand(torch.equal(alone, whole[token]), f"row {token} alone has other bits than among others")


def _rope(shape: tuple[int, ...], backend: Backend) -> Measured:
    x = normal(9, *shape, 2)[..., 0]  # not contiguous, as a slice of a query is not
    angles = torch.arange(shape[0])[:, None] * 0.7 + torch.arange(shape[-1] // 2)
    cos, sin = torch.cos(angles), torch.sin(angles)
    found = backend.rope(*map(backend.upload, (x, cos, sin)))
    expected = oracle.rope(*map(oracle.exact, (x, cos, sin)))
    magnitude = np.abs(oracle.exact(x))
    return Measured(oracle.relative_error(found, Judged(expected, magnitude)), _vector_bound(backend))


def _f32(values: torch.Tensor) -> QuantTensor:
    return QuantTensor(format_named("f32"), tuple(values.shape), {"weight": values})


def _route(
    backend: Backend, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rule: RoutingRule
) -> tuple[torch.Tensor, torch.Tensor]:
    found = backend.router(backend.upload(x), on_device(backend, _f32(weight)), backend.upload(bias), rule)
    ids, weights = found[0].cpu(), found[1].cpu()
    shape = (len(x), rule.num_experts_per_tok)
    demand(ids.dtype == torch.int64 and weights.dtype == torch.float32, f"dtypes {ids.dtype}, {weights.dtype}")
    demand(tuple(ids.shape) == shape == tuple(weights.shape), f"shapes {list(ids.shape)}, {list(weights.shape)}")
    return ids, weights


def _router(experts: int, rule: RoutingRule, offset: float, backend: Backend) -> Measured:
    x = normal(11, 40, ROUTER_HIDDEN)
    weight = normal(12, experts, ROUTER_HIDDEN) * ROUTER_HIDDEN**-0.5
    bias = 0.3 * normal(13, experts) + offset
    ids, weights = _route(backend, x, weight, bias, rule)
    logits = oracle.exact(x) @ oracle.exact(weight).T
    bound = _vector_bound(backend)
    errors = [0.0]
    compared = 0
    for token in range(len(x)):
        expected, scales, margin = oracle.route(logits[token], oracle.exact(bias), rule)
        if margin < 4 * bound:
            continue  # its own rounding may choose otherwise
        compared += 1
        chosen = ids[token].tolist()
        demand(chosen == expected, f"token {token}: experts {chosen}, expected {expected}")
        errors += [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(weights[token].tolist(), scales, strict=True)]
    demand(compared > 0, "no token was clear enough to compare: its numerics are too wide")
    return Measured(max(errors), 4 * bound)


def _ties(experts: int, rule: RoutingRule, offset: float, backend: Backend) -> None:
    """Experts in pairs with equal rows and equal biases: the lower of a pair comes first."""
    x = normal(14, 6, ROUTER_HIDDEN)
    half = normal(15, experts // 2, ROUTER_HIDDEN) * 0.5
    weight, bias = half.repeat_interleave(2, 0), (normal(16, experts // 2) + offset).repeat_interleave(2, 0)
    ids, weights = _route(backend, x, weight, bias, rule)
    for token in range(len(x)):
        chosen = ids[token].tolist()
        demand(chosen == sorted(set(chosen)), f"experts {chosen} are not distinct and ascending")
        odd = [expert for expert in chosen if expert % 2 and expert - 1 not in chosen]
        demand(not odd, f"took {odd} of pairs of equals, and not the lower ones")
        by_id = dict(zip(chosen, weights[token].tolist(), strict=True))
        unequal = [e for e in chosen if e % 2 == 0 and e + 1 in by_id and by_id[e] != by_id[e + 1]]
        demand(not unequal, f"equal experts got other weights: {unequal}")
    if rule.n_group == 1:
        ids, _ = _route(backend, x, torch.zeros(experts, ROUTER_HIDDEN), torch.full((experts,), offset), rule)
        lowest = list(range(rule.num_experts_per_tok))
        demand(ids.tolist() == [lowest] * len(x), "with all scores equal, others than the lowest ids were chosen")


def _vanishing(backend: Backend) -> None:
    rule = RoutingRule(2, 1, 1, True, 2.827)
    _, weights = _route(backend, torch.ones(1, 4), torch.full((6, 4), -50.0), torch.zeros(6), rule)
    demand(weights.tolist() == [[0.0, 0.0]], f"weights {weights.tolist()} where every score is zero")


def _router_without_tokens(backend: Backend) -> None:
    _route(backend, torch.zeros(0, 4), torch.ones(6, 4), torch.zeros(6), RoutingRule(2, 1, 1, True, 1.0))


def _combine(tokens: int, active: int, backend: Backend) -> Measured:
    inputs = (normal(17, tokens, active, 256), normal(18, tokens, active).abs(), normal(19, tokens, 256))
    found = backend.combine(*map(backend.upload, inputs))
    return Measured(oracle.relative_error(found, oracle.combine(*map(oracle.exact, inputs))), _vector_bound(backend))
