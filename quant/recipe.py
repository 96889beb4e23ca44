"""Which format each weight gets: a choice for the routed experts, one for the trunk, one for the head, and rules by
name for who wants more.

Only matrices are quantized. Router, norms, biases and embeddings are kept as they are. Knows no files.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import RequestError
from .formats import FP8_NAME, PACKED_INT, SCALE_SEARCHES, QuantFormat, ScaleSearch, format_named

KEEP = "keep"
TARGETS = (*PACKED_INT, FP8_NAME, "bf16", KEEP)

Kind = Literal["experts", "trunk", "lm_head", "kept"]


@dataclass(frozen=True)
class Rule:
    """A weight whose stored name (without ".weight") matches `pattern` from its first character on gets `target`.
    "re:" before the pattern is compressed-tensors' spelling and may be left out."""

    pattern: str
    target: str

    def matches(self, module: str) -> bool:
        return re.match(self.pattern.removeprefix("re:"), module) is not None


@dataclass(frozen=True)
class Recipe:
    """Targets by kind, rules that come before them (the first that matches decides), and how scales are found."""

    experts: str
    trunk: str
    lm_head: str
    rules: tuple[Rule, ...] = ()
    scale_search: ScaleSearch = "amax"

    def __post_init__(self) -> None:
        for option, value in (("experts", self.experts), ("trunk", self.trunk), ("lm-head", self.lm_head)):
            _demand_target(f"--{option}", value)
        for rule in self.rules:
            _demand_target(f"--rule {rule.pattern}", rule.target)
            try:
                re.compile(rule.pattern.removeprefix("re:"))
            except re.error as error:
                raise RequestError(f"--rule {rule.pattern}: not a regular expression: {error}") from error
        if self.scale_search not in SCALE_SEARCHES:
            raise RequestError(f"--scale-search is {self.scale_search!r}; known: {', '.join(SCALE_SEARCHES)}")

    def target(self, module: str, kind: Kind, source: QuantFormat) -> QuantFormat:
        """The format that `module` will have, `source` itself where it is kept. Raises RequestError for a rule that
        would quantize what must be kept."""
        rule = next((rule for rule in self.rules if rule.matches(module)), None)
        chosen = rule.target if rule else {"experts": self.experts, "trunk": self.trunk, "lm_head": self.lm_head}.get(
            kind, KEEP
        )  # fmt: skip
        if chosen == KEEP or chosen == source.name:
            return source
        if kind == "kept":
            raise RequestError(
                f"--rule {rule.pattern if rule else ''}={chosen} matches {module}, which is always kept as it is"
            )
        return format_named(chosen)

    def as_dict(self) -> dict[str, Any]:
        """The settings as the manifest and the journal hold them."""
        return asdict(self) | {"rules": [f"{rule.pattern}={rule.target}" for rule in self.rules]}


def default_recipe(formats: set[str]) -> Recipe:
    """For a checkpoint whose routed experts have `formats`: FP8 gives INT4 experts and keeps the trunk bit for bit;
    INT4 experts are kept and the BF16 trunk becomes int8; BF16 gives INT4 experts and an int8 trunk."""
    if formats == {FP8_NAME}:
        return Recipe(experts="int4_g32", trunk=KEEP, lm_head=KEEP)
    experts = KEEP if all(name in PACKED_INT for name in formats) else "int4_g32"
    return Recipe(experts=experts, trunk="int8_g128", lm_head=KEEP)


def trunk_recipe(target: str) -> Recipe:
    """What `--trunk TARGET` does while loading: all else is kept. Raises RequestError for an unknown format."""
    return Recipe(experts=KEEP, trunk=target, lm_head=KEEP)


def parse_rule(text: str) -> Rule:
    """PATTERN=FORMAT, the format being what follows the last "="."""
    pattern, equals, target = text.rpartition("=")
    if not equals or not pattern:
        raise RequestError(f"--rule {text}: expected PATTERN=FORMAT, such as 're:.*layers\\.3\\..*=int8_g128'")
    return Rule(pattern, target)


def _demand_target(option: str, value: str) -> None:
    if value not in TARGETS:
        raise RequestError(f"{option}: the format {value!r} is unknown; known: {', '.join(TARGETS)}")
