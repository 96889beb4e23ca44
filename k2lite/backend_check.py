"""What a backend can't multiply, said before anything loads, with the recipe that would work.

Reads capability tables and formats; knows no backend by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from k2lite.backends.base import Capabilities
from k2lite.quant.checkpoint import EXPERTS_KIND, Checkpoint
from k2lite.quant.errors import BackendError, CheckpointError
from k2lite.quant.formats import FP8_NAME, Shape, format_named
from k2lite.quant.recipe import Recipe

# Best first: experts small, the trunk exact.
EXPERT_CHOICES = ("int4_g32", "int4_g64", "int4_g128", "int8_g128", "int8_channel", FP8_NAME, "bf16")
TRUNK_CHOICES = ("int8_g128", "int8_channel", FP8_NAME, "bf16", "int4_g32", "int4_g64", "int4_g128")
# What `quantize` keeps as it is, whatever the recipe.
KEPT_KINDS = ("norms", "router", "embeddings")


def demand_multipliable(checkpoint: Checkpoint, name: str, capabilities: Capabilities) -> None:
    """Raise BackendError for a model that backend `name` can't run."""
    most, experts = capabilities.max_experts, checkpoint.schema.n_routed_experts
    if most is not None and experts > most:
        raise BackendError(f"backend {name} takes at most {most} experts a layer, and this model has {experts}")
    lacking = sorted(_lacking(checkpoint, capabilities))
    if lacking:
        taken = ", ".join(sorted(capabilities.formats | capabilities.formats_of(experts=True)))
        raise BackendError(
            f"backend {name} can't multiply {', '.join(lacking)}; it takes {taken}; "
            + _way_out(checkpoint, capabilities)
        )


def recipe_for(checkpoint: Checkpoint, recipe: Recipe, name: str, capabilities: Capabilities) -> Recipe:
    """The default `recipe` of a source with each target that the backend lacks replaced by the best that it takes.
    Raises BackendError where there is none."""
    from dataclasses import replace

    options = _options(checkpoint, capabilities, dict.fromkeys(_lacking_options(checkpoint, recipe, capabilities)))
    if options is None:
        raise BackendError(f"no recipe makes a folder of {checkpoint.folder} that backend {name} can multiply")
    return replace(recipe, **options)  # type: ignore[arg-type]


def demand_recipe(formats: Mapping[str, Iterable[str]], name: str, capabilities: Capabilities) -> None:
    """Raise BackendError for a plan whose weights, the formats by kind ("experts" or another), it can't multiply."""
    for kind, used in formats.items():
        taken = capabilities.formats_of(experts=kind == "experts")
        lacking = sorted(set(used) - taken)
        if lacking:
            option = kind.replace("_", "-") if kind in ("experts", "trunk", "lm_head") else "rule"
            raise BackendError(
                f"backend {name} can't multiply {', '.join(lacking)} ({kind}); --{option} must be one of "
                f"{', '.join(sorted(taken))}"
            )


def _lacking(checkpoint: Checkpoint, capabilities: Capabilities) -> set[str]:
    return {
        name
        for kind, uses in checkpoint.formats().items()
        if kind != "norms"
        for name in set(uses) - capabilities.formats_of(experts=kind == EXPERTS_KIND)
    }


def _way_out(checkpoint: Checkpoint, capabilities: Capabilities) -> str:
    options: dict[str, None] = {}
    for kind, uses in checkpoint.formats().items():
        if kind != "norms" and set(uses) - capabilities.formats_of(experts=kind == EXPERTS_KIND):
            if kind in KEPT_KINDS:
                return f"no recipe helps, since {kind} are kept as they are"
            options[_option_of(kind)] = None
    chosen = _options(checkpoint, capabilities, options)
    if chosen is None:
        return "no recipe of k2lite quantize makes a folder that it takes"
    flags = " ".join(f"--{option.replace('_', '-')} {target}" for option, target in sorted(chosen.items()))
    # an option that is left out may have a default that the backend lacks
    kept = " ".join(f"--{option.replace('_', '-')} keep" for option in ("experts", "trunk") if option not in chosen)
    recipe = " ".join(filter(None, (flags, kept)))
    return f"k2lite quantize {checkpoint.folder} DST {recipe} makes a folder that it takes"


def _lacking_options(checkpoint: Checkpoint, recipe: Recipe, capabilities: Capabilities) -> Iterable[str]:
    uses = checkpoint.formats()
    for option, kinds in _kinds(uses).items():
        target = getattr(recipe, option)
        found = {name for kind in kinds for name in uses[kind]} if target == "keep" else {target}
        if found - capabilities.formats_of(experts=option == "experts"):
            yield option


def _options(checkpoint: Checkpoint, capabilities: Capabilities, wanted: Mapping[str, None]) -> dict[str, str] | None:
    """The best target for each option; None if one has none."""
    shapes = _shapes(checkpoint)
    chosen = {}
    for option in wanted:
        choices = EXPERT_CHOICES if option == "experts" else TRUNK_CHOICES
        taken = capabilities.formats_of(experts=option == "experts")
        fits = [name for name in choices if name in taken and all(_stores(name, shape) for shape in shapes[option])]
        if not fits:
            return None
        chosen[option] = fits[0]
    return chosen


def _kinds(uses: Mapping[str, object]) -> dict[str, list[str]]:
    """The kinds of tensors that each option of `quantize` means."""
    kinds: dict[str, list[str]] = {"experts": [], "trunk": [], "lm_head": []}
    for kind in uses:
        if kind not in KEPT_KINDS:
            kinds[_option_of(kind)].append(kind)
    return kinds


def _option_of(kind: str) -> str:
    return {EXPERTS_KIND: "experts", "head": "lm_head"}.get(kind, "trunk")


def _shapes(checkpoint: Checkpoint) -> dict[str, set[Shape]]:
    schema = checkpoint.schema
    shapes: dict[str, set[Shape]] = {"experts": set(), "trunk": set(), "lm_head": set()}
    shapes["experts"] |= {schema.projection_shape(projection) for projection in ("gate_proj", "down_proj")}
    for name, spec in schema.trunk.items():
        if spec.quantizable:
            shapes["lm_head" if name.startswith("lm_head") else "trunk"].add(spec.shape)
    return shapes


def _stores(name: str, shape: Shape) -> bool:
    try:
        format_named(name).parts(shape)
    except CheckpointError:
        return False
    return True
