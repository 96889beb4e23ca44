"""The options that every verb that loads a model shares, so that the same words mean the same thing everywhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2lite.engine import Engine
    from k2lite.recording import Recorder
    from k2lite.sampling import SamplingParams

EXPERTS_ON = ("device", "host", "split")
# As in offload/policies.py, which needs numpy; a test compares them. The first is the default.
POLICIES = ("hazard", "cyclic", "lru", "lfu", "lfru", "static")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to load it."""
    parser.add_argument(
        "model", metavar="MODEL", type=Path, nargs="?", help="a model folder, as downloaded (default: the demo model)"
    )
    parser.add_argument(
        "--backend",
        default="auto",
        metavar="NAME",
        help="what multiplies, as k2lite backends lists it (default: auto, the best that is ready)",
    )
    parser.add_argument(
        "--allow-fallback",
        action="store_true",
        help="let plain torch do what the backend can't, operation by operation; each is told once",
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="tokens a conversation may hold (default: the model's, or 32768)"
    )
    parser.add_argument(
        "--activations",
        metavar="FORMAT",
        help="what inputs of integer weights are rounded to on the CPU: int8, or bf16: slower, finer (default: int8)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads that multiply on the CPU (default: what the process may use)"
    )
    add_trunk_argument(parser)
    add_memory_arguments(parser)
    add_device_arguments(parser)
    add_eps_argument(parser)


def add_trunk_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trunk",
        default="keep",
        metavar="FORMAT",
        help="quantize attention, shared experts and dense layers while loading, to a format of quantize --trunk, such "
        "as int8_g128 (default: keep)",
    )


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """How much memory the model may take, and what happens with experts that have no room. None changes a token where
    the backend is batch-invariant."""
    parser.add_argument(
        "--ram", metavar="SIZE", help="memory the process may take, such as 96GiB (default: what the machine can spare)"
    )
    parser.add_argument(
        "--resident-experts",
        metavar="N",
        help="routed experts that have room in RAM, beside those that stay on an accelerator: a share of all, such as "
        "0.2, or a number (default: what fits)",
    )
    parser.add_argument(
        "--policy", metavar="NAME", help=f"which experts stay in RAM: {', '.join(POLICIES)} (default: {POLICIES[0]})"
    )
    parser.add_argument("--no-prefetch", action="store_true", help="don't read experts ahead on the router's guess")
    parser.add_argument(
        "--mirror", type=Path, metavar="DIR", help="a copy of the weight files on another drive; reads are shared"
    )
    add_packed_copy_argument(parser)


def add_packed_copy_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--packed-copy",
        type=Path,
        metavar="DIR",
        help="for backends that lay experts out anew (ascend, onnx): keep and use them so in DIR; the first run writes "
        "it, about as large as the experts",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """For an accelerator's backend; with another they are errors."""
    add_vram_argument(parser)
    parser.add_argument(
        "--experts-on",
        choices=EXPERTS_ON,
        help="where experts multiply: on the device, on the host, or split: the hottest on the device, the others on "
        "the host (default: device or host, by sizes; part of the arithmetic)",
    )
    parser.add_argument(
        "--hot-experts",
        type=Path,
        metavar="FILE",
        help="for split: statistics of an earlier run that say which experts are the hottest",
    )


def add_vram_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vram", metavar="SIZE", help="memory to take of the accelerator, such as 20GiB (default: what is free there)"
    )


def add_statistics_argument(parser: argparse.ArgumentParser) -> None:
    """For verbs that end with `keep_statistics`."""
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="begin with what routing showed before, and add this run",
    )


def keep_statistics(args: argparse.Namespace, engine: Engine) -> None:
    """At the end of a run: what its routers chose goes where --statistics says. Raises RequestError."""
    if args.statistics is not None:
        from k2lite.learned_routing import keep_in_file

        keep_in_file(engine.experts, engine.config, args.statistics)


def memory_options(args: argparse.Namespace) -> dict[str, Any]:
    """The memory arguments as `k2lite.load` takes them. Raises RequestError."""
    options: dict[str, Any] = {
        "ram": args.ram,
        "prefetch": not args.no_prefetch,
        "mirror": args.mirror,
        "packed_copy": args.packed_copy,
        "statistics": getattr(args, "statistics", None),
        "vram": args.vram,
        "experts_on": args.experts_on,
        "hot_experts": args.hot_experts,
    }
    if args.policy is not None:
        options["policy"] = args.policy
    if args.resident_experts is not None:
        options["resident_experts"] = _share_or_count(args.resident_experts)
    return options


def _share_or_count(text: str) -> float:
    from k2lite.quant.errors import RequestError

    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise RequestError(f"--resident-experts is {text!r}; expected a share such as 0.2, or a number of experts")


def add_eps_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--latent-norm-eps",
        type=float,
        metavar="EPS",
        help="eps of the two latent norms of MLA (default: 1e-6, as in Hugging Face's code)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen. What is left out comes from generation_config.json, else from the defaults named here."""
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most new tokens (default: what the context holds)")
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="0 is greedy: no filter has an effect (default: 0.6)"
    )
    parser.add_argument("--top-p", type=float, metavar="X", help="smallest set with this probability (default: 1, off)")
    parser.add_argument("--top-k", type=int, metavar="N", help="the N likeliest tokens only (default: 0, off)")
    parser.add_argument(
        "--min-p", type=float, metavar="X", help="at least this share of the likeliest (default: 0, off)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer (default: random)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def check_sampling_arguments(args: argparse.Namespace) -> None:
    """Refuse what no model could do, before minutes are spent on loading one. Raises RequestError."""
    from k2lite.quant.errors import RequestError
    from k2lite.sampling import SamplingParams

    SamplingParams(**_given(args))
    if args.temperature is not None:
        _demand_effect(args, args.temperature)
    if args.max_tokens is not None and args.max_tokens < 1:
        raise RequestError(f"max_tokens is {args.max_tokens}; expected 1 or more")
    if "" in args.stop:
        raise RequestError("an empty --stop has no effect; name a text or leave it out")


def load_engine(
    args: argparse.Namespace, recorder: Recorder | None = None, *, sequences: int = 1, forecast: bool = False
) -> Engine:
    """Load the model that the arguments name and print the plan, one line, on stderr; with `forecast` the speed that
    it allows is measured and part of the line."""
    from k2lite.demo_folder import DEMO_FOLDER
    from k2lite.loading import load

    if args.model is None:
        print("k2lite: no MODEL is named, so the demo model answers: a small Kimi-K2 of k2lite's own", file=sys.stderr)
    folder = args.model or DEMO_FOLDER
    engine = load(
        folder,
        backend=args.backend,
        allow_fallback=args.allow_fallback,
        notify=lambda line: print(f"k2lite: {line}", file=sys.stderr),
        context=args.context,
        latent_norm_eps=args.latent_norm_eps,
        activations=args.activations,
        threads=args.threads,
        trunk=args.trunk,
        **memory_options(args),
        recorder=recorder,
        sequences=sequences,
    )
    speed = ""
    if forecast:
        from k2lite.prediction import expected
        from k2lite.quant.errors import CheckpointError

        try:
            speed = expected(engine)
        except CheckpointError as error:  # of an expert that may never be asked for
            speed = f"; no speed is foretold: {error}"
    print(f"k2lite: {engine.placement}{speed}", file=sys.stderr)
    return engine


def sampling_params(args: argparse.Namespace, engine: Engine) -> SamplingParams:
    """The user's choice, else the folder's recommendation, else k2lite's default; a seed is drawn if none is given."""
    import secrets
    from dataclasses import replace

    params = replace(engine.recommended_sampling, **{"seed": secrets.randbits(32), **_given(args)})
    _demand_effect(args, params.temperature)
    return params


def _demand_effect(args: argparse.Namespace, temperature: float) -> None:
    """At temperature 0 the likeliest token is taken, whatever the filters are. A seed does no harm: its answer is the
    same each time."""
    from k2lite.quant.errors import RequestError

    filters = {"--top-p": (args.top_p, 1), "--top-k": (args.top_k, 0), "--min-p": (args.min_p, 0)}
    for option, (value, off) in filters.items():
        if temperature == 0 and value is not None and value != off:
            raise RequestError(
                f"{option} {value:g} has no effect at temperature 0, which takes the likeliest token: leave it out, or "
                "give another --temperature"
            )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k", "min_p", "seed")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
