"""Measures everything that a report holds, in an order in which nothing disturbs what comes later.

Texts first, then answers, rates, and last the changed routing, which spoils what the cache has learned. Names no path
and no person: the report is made to be sent. Knows no terminal.
"""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from k2lite import __version__
from k2lite.backends.processor import processor
from k2lite.benchmark import Phase, peak_rss_bytes
from k2lite.engine import Engine
from k2lite.offload.routing_analysis import analyse
from k2lite.planning import work_of
from k2lite.prediction import engine_cache, measure_rates, model_bytes, predicted_speeds

from .answers import GreedyAnswer, demand_room, greedy_answers
from .identity import identity
from .judging import judge, knows
from .probes import VARIANTS, probe
from .reading import CHUNK_TOKENS, TEXTS, Progress, Reading, TextScore, encoded, read_texts, sum_of, text
from .scales import scale_agreement

VERSION = 1
ANSWER_TOKENS = 96
PROBE_TOKENS = 384


def context_for(tokens: int) -> int:
    """Tokens of context that a check of `tokens` tokens of text needs; a token is a byte or more."""
    longest_text = max(len(text(name).encode()) for name in TEXTS)
    return max(min(_of_each(tokens), longest_text), len(VARIANTS) * PROBE_TOKENS, 1024)


def _of_each(tokens: int) -> int:
    return max(2, tokens // 3)


def check(engine: Engine, tokens: int, progress: Progress, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole report on a loaded model, of whose three texts `tokens` tokens are read; `progress` hears tokens done
    of `total_tokens`, and what was done; `say` gets a line if the texts have fewer. Every value is JSON's; what is not
    finite is None. Raises ContextLengthError before anything is read."""
    answer_tokens = min(ANSWER_TOKENS, max(1, tokens))
    demand_room(engine, answer_tokens)
    texts = encoded(engine, min(_of_each(tokens), engine.placement.context_tokens))
    done = sum(map(len, texts.values()))
    if done < 3 * _of_each(tokens):
        say(f"{done} tokens of text are read, not {tokens}: a text ends before its third, or the context does")
    reading = read_texts(engine, texts, progress)
    answers = greedy_answers(engine, answer_tokens)
    progress(done, "answered")
    speed = _speed(engine, reading, answers)
    peak = peak_rss_bytes()
    facts: dict[str, Any] = {
        "k2lite_check": VERSION,
        "k2lite": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": identity(engine),
        "machine": _machine(engine),
        "arithmetic": engine.placement.arithmetic,
        "backend": engine.placement.backend,
        "plan": asdict(engine.placement),
        "tokens": {"asked": tokens, "read": done},
        "texts": [_described(score) for score in reading.scores],
        "scales": scale_agreement(engine_cache(engine).store.checkpoint),
        "routing": _routing(engine, reading),
        "answers": [asdict(answer) for answer in answers],
        "hits": {"prefill": _hits(reading.prefill), "decode": _hits(sum_of([item.decode for item in answers]))},
        "prefetch": asdict(engine.experts.counters.prefetch),
        "speed": speed,
        "routing_changed": _probed(engine, reading, texts, lambda at, what: progress(done + at, what)),
        "memory": {"peak_rss_bytes": peak, "planned_bytes": engine.placement.total_bytes},
    }
    facts = _finite(facts)
    verdicts = judge(facts)
    facts["verdicts"] = [asdict(verdict) for verdict in verdicts]
    facts["ok"] = all(verdict.outcome != "suspicious" for verdict in verdicts)
    return facts


def total_tokens(tokens: int) -> int:
    """What `progress` counts up to, at most."""
    return 3 * _of_each(tokens) + len(VARIANTS) * min(PROBE_TOKENS, _of_each(tokens))


def _machine(engine: Engine) -> dict[str, Any]:
    device = processor(f"torch {torch.__version__}")
    refusing = bool(engine_cache(engine).store.files.refusing)
    return asdict(device) | {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "device": str(engine.backend.device),
        "direct_reads": not refusing,
    }


def _routing(engine: Engine, reading: Reading) -> dict[str, Any]:
    """Over the texts in languages that the tokenizer knows; a text spelled out repeats itself."""
    known = np.concatenate([np.full(score.tokens + 1, knows(_described(score))) for score in reading.scores])
    layers: list[dict[str, Any]] = []
    if known.sum() > 1 and engine.config.moe_layers:
        ids = reading.ids[known]
        found = analyse(ids, engine.config.n_routed_experts)
        sums = reading.weights[known].astype(np.float64).sum(axis=2)
        for at, layer in enumerate(engine.config.moe_layers):
            layers.append(
                {
                    "layer": layer,
                    "distinct": int(found.distinct[at]),
                    "entropy_bits": float(found.entropy_bits[at]),
                    "busiest": float(found.counts[at].max() / len(ids)),
                    "reuse": float(found.reuse[1][at]),
                    "least_weight_sum": float(sums[:, at].min()),
                    "most_weight_sum": float(sums[:, at].max()),
                }
            )
    return {"tokens": int(known.sum()), "layers": layers}


def _described(score: TextScore) -> dict[str, Any]:
    return asdict(score) | {"bytes_per_token": score.bytes_per_token}


def _hits(phase: Phase) -> dict[str, Any]:
    """Of the experts that were asked for, the shares that lay in RAM, and that had to be read."""
    asked = max(1, phase.requested_experts)
    return {
        "requested": phase.requested_experts,
        "ram": phase.hit_experts / asked,
        "read": 1 - phase.hit_experts / asked if phase.requested_experts else 0.0,
        "read_bytes": phase.read_bytes,
        "read_bytes_a_token": phase.read_bytes / max(1, phase.tokens),
        "read_bytes_per_s": phase.read_bytes / phase.read_s if phase.read_s else 0.0,
    }


def _speed(engine: Engine, reading: Reading, answers: Sequence[GreedyAnswer]) -> dict[str, Any]:
    rates = measure_rates(engine)
    predicted = predicted_speeds(engine, rates)
    work = work_of(engine.config, model_bytes(engine))
    return {
        "decode_tok_s": sum_of([answer.decode for answer in answers]).tok_s,
        "prefill_tok_s": reading.prefill.tok_s,
        "predicted_decode_tok_s": {curve: found["best"] for curve, found in predicted["decode"].items()}
        if predicted
        else {},
        "predicted_prefill_tok_s": predicted["prefill_tok_s"][str(CHUNK_TOKENS)] if predicted else None,
        "bytes_a_token": work.trunk_read + work.active * work.expert,
        "memory_bytes_per_s": rates.memory,
        "drive_bytes_per_s": rates.drive,
        "flops": rates.flops,
    }


def _probed(
    engine: Engine, reading: Reading, texts: Mapping[str, list[int]], progress: Progress
) -> dict[str, dict[str, float]]:
    """On the text that the model knows best beside counting tokens; {} without routed experts."""
    if not engine.config.moe_layers:
        return {}
    best = min(reading.scores, key=lambda score: score.bits_per_byte / score.unigram_bits_per_byte)
    most = max(2, min(PROBE_TOKENS, engine.placement.context_tokens // len(VARIANTS)))
    found = probe(engine, texts[best.name][:most], progress)
    return {name: asdict(changed) for name, changed in found.items()}


def _finite(value: Any) -> Any:
    """As JSON can have it."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
