"""The config.json of a quantized folder: the source's, with the quantization_config that tells what the plan writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .declaration import (
    EXPERTS_TARGETS,
    REST_TARGETS,
    ROUTER_IGNORE,
    declaration,
    fp8_declaration,
    group_declaration,
)
from .formats import FP8_NAME
from .plain import PLAIN_DTYPES
from .quantization_plan import Matrix, QuantizationPlan
from .recipe import Kind

KEY = "quantization_config"


def quantized_config(raw: Mapping[str, Any], plan: QuantizationPlan) -> dict[str, Any]:
    """`raw` is the source's config.json. The block stands where it stood: inside text_config for kimi_k25."""
    declared = plan_declaration(plan)
    config = {key: value for key, value in raw.items() if key != KEY}
    inside = config.get("text_config")
    if isinstance(inside, dict):
        config["text_config"] = {key: value for key, value in inside.items() if key != KEY} | _block(declared)
        return config
    return config | _block(declared)


def plan_declaration(plan: QuantizationPlan) -> dict[str, Any] | None:
    """What is said of each matrix: a format for the routed experts, one for the rest, and by name whatever a rule has
    made different. None if nothing is quantized."""
    by_kind: dict[Kind, list[Matrix]] = {}
    for matrix in plan.matrices:
        by_kind.setdefault(matrix.kind, []).append(matrix)
    names = {matrix.target.name for matrix in plan.matrices} - PLAIN_DTYPES.keys()
    if names == {FP8_NAME}:
        return fp8_declaration()
    experts = _commonest(by_kind.get("experts", []))
    rest = _commonest(by_kind.get("trunk", []))
    exceptions: dict[str, list[str]] = {}
    for kind, usual in (("experts", experts), ("trunk", rest), ("lm_head", rest)):
        for matrix in by_kind.get(kind, []):  # type: ignore[call-overload]
            if matrix.target.name != usual and not {matrix.target.name, usual} <= PLAIN_DTYPES.keys():
                exceptions.setdefault(matrix.target.name, []).append(matrix.module)
    plain = [module for name, modules in exceptions.items() if name in PLAIN_DTYPES for module in modules]
    special = {tuple(modules): name for name, modules in exceptions.items() if name not in PLAIN_DTYPES}
    if not special:
        # a head that is as plain as the rest is no exception, and Moonshot names it all the same
        return declaration(experts, rest, ignore=["lm_head"] if rest in PLAIN_DTYPES and not plain else plain)
    usual_groups = {EXPERTS_TARGETS: experts, REST_TARGETS: rest}
    groups = special | {targets: name for targets, name in usual_groups.items() if name not in PLAIN_DTYPES}
    unquantized = [target for targets, name in usual_groups.items() if name in PLAIN_DTYPES for target in targets]
    ignore = [*plain, ROUTER_IGNORE, *(target for target in unquantized if target.startswith("re:"))]
    return group_declaration(groups, ignore)


def _commonest(matrices: list[Matrix]) -> str:
    counts = Counter(matrix.target.name for matrix in matrices)
    return counts.most_common(1)[0][0] if counts else "bf16"


def _block(declared: dict[str, Any] | None) -> dict[str, Any]:
    return {KEY: declared} if declared else {}
