"""From what was measured to verdict lines: ok, suspicious and why, or not judged and why not.

The bands were set by measuring the demo model and broken copies of it (docs/check.md). They see what is grossly wrong,
not what is a little worse. Pure functions of a report's facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["ok", "suspicious", "not judged"]

# Below so many bytes a token of a text the tokenizer spells it out: the model was hardly trained on it.
LEAST_BYTES_PER_TOKEN = 1.5
# Nats a token. Experts that are missing or others must cost that much; less or more of the right ones may gain no more,
# where the gain is clearly more than its error.
LEAST_LOSS, MOST_GAIN, CLEARLY = 0.3, 0.02, 2.0
# Scales and sizes of codes that belong together fall together; those that don't have nothing to do with one another.
MOST_CORRELATION, LEAST_GROUPS = -0.1, 64
# Fewer tokens say too little of a router.
LEAST_TOKENS = 64
# A token uses more of the token before's experts than chance would have it, by this factor.
LEAST_REUSE = 1.2
WEIGHT_SUM_ERROR = 0.01
# A share of the lowest speed predicted; and a size below which other things than bytes decide.
LEAST_SPEED, LEAST_BYTES_A_TOKEN = 0.5, 100e6
MEMORY_MARGIN = 1.02

# Values of config.json as published, by (hidden_size, n_routed_experts).
PUBLISHED: dict[tuple[int, int], dict[str, Any]] = {
    (7168, 384): {"num_experts_per_tok": 8, "routed_scaling_factor": 2.827, "norm_topk_prob": True, "n_group": 1,
                  "topk_group": 1, "num_attention_heads": 64, "moe_intermediate_size": 2048, "kv_lora_rank": 512},
    (7168, 256): {"num_experts_per_tok": 8, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "n_group": 8,
                  "topk_group": 4, "num_attention_heads": 128, "moe_intermediate_size": 2048, "kv_lora_rank": 512},
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    about: str
    outcome: Outcome
    said: str


def judge(facts: Mapping[str, Any]) -> list[Verdict]:
    """All verdicts on the facts of a report, in the order of the table."""
    return [
        *_config(facts["model"]["config"]),
        *(_text(score, facts["model"]["config"]["vocab_size"]) for score in facts["texts"]),
        *_scales(facts["scales"]),
        *_routing(facts),
        *_experts(facts["routing_changed"]),
        *_answers(facts["answers"]),
        *_speed(facts["speed"]),
        _memory(facts["memory"]),
    ]


def _config(config: Mapping[str, Any]) -> Iterator[Verdict]:
    published = PUBLISHED.get((config["hidden_size"], config["n_routed_experts"]))
    if published is None:
        yield Verdict("config", "not judged", "no published model has these sizes")
        return
    other = [f"{key} {config[key]}, published {value}" for key, value in published.items() if config[key] != value]
    yield Verdict("config", "suspicious" if other else "ok", "; ".join(other) or "as published")


def knows(score: Mapping[str, Any]) -> bool:
    """Whether the tokenizer, and so the model's training, has the language of a text."""
    return bool(score["bytes_per_token"] >= LEAST_BYTES_PER_TOKEN)


def _text(score: Mapping[str, Any], vocabulary: int) -> Verdict:
    about = f"text, {score['name']}"
    if not knows(score):
        said = f"its tokenizer has no tokens for it ({score['bytes_per_token']:.2f} bytes a token)"
        return Verdict(about, "not judged", said)
    perplexity, bits, unigram = score["perplexity"], score["bits_per_byte"], score["unigram_bits_per_byte"]
    if not _finite(perplexity):
        return Verdict(about, "suspicious", "the perplexity is not finite")
    found = f"perplexity {perplexity:.4g}, {bits:.3f} bits a byte"
    if perplexity >= vocabulary:
        return Verdict(about, "suspicious", f"{found}: worse than any token of {vocabulary} being as likely")
    if bits >= unigram:
        return Verdict(about, "suspicious", f"{found}: counting tokens does as well ({unigram:.3f})")
    return Verdict(about, "ok", f"{found} (counting tokens: {unigram:.3f})")


def _scales(scales: Mapping[str, Mapping[str, Any]]) -> Iterator[Verdict]:
    if not scales:
        yield Verdict("scales", "not judged", "routed experts have none")
    for projection, found in scales.items():
        about, value = f"scales, {projection}", found["correlation"]
        at = f"layer {found['layer']}, {found['groups']} groups"
        if found["groups"] < LEAST_GROUPS:
            yield Verdict(about, "not judged", f"{at} are too few")
        elif value is None:
            yield Verdict(about, "suspicious", f"all scales are equal ({at})")
        elif value > MOST_CORRELATION:
            said = f"they have nothing to do with their codes (correlation {value:+.2f}, {at})"
            yield Verdict(about, "suspicious", said)
        else:
            yield Verdict(about, "ok", f"they belong to their codes (correlation {value:+.2f} or lower)")


def _routing(facts: Mapping[str, Any]) -> Iterator[Verdict]:
    config, routing = facts["model"]["config"], facts["routing"]
    if not routing["layers"]:
        yield Verdict("routing", "not judged", "no routed experts")
        return
    if routing["tokens"] < LEAST_TOKENS:
        yield Verdict("routing", "not judged", f"{routing['tokens']} tokens are too few (--tokens)")
        return
    active, n_experts = config["num_experts_per_tok"], config["n_routed_experts"]
    scale = config["routed_scaling_factor"]
    problems = []
    for row in routing["layers"]:
        at = f"layer {row['layer']}"
        if row["distinct"] < min(2 * active, n_experts):
            problems.append(f"{at} is dead: it uses {row['distinct']} of {n_experts} experts")
        elif not _finite(row["reuse"]) or (active < n_experts and row["reuse"] < LEAST_REUSE * active / n_experts):
            problems.append(f"{at} chooses as if by chance: reuse {row['reuse']}, chance {active / n_experts:.3f}")
        sums = (row["least_weight_sum"], row["most_weight_sum"])
        if config["norm_topk_prob"] and not all(
            _finite(total) and abs(total - scale) <= WEIGHT_SUM_ERROR * scale for total in sums
        ):
            low, high = (f"{total:.3f}" if _finite(total) else "no number" for total in sums)
            problems.append(f"{at}: weights sum to {low} to {high}, the config says {scale}")
    if problems:
        yield Verdict("routing", "suspicious", "; ".join(problems))
        return
    rows = routing["layers"]
    found = (
        f"{len(rows)} layers, entropy {min(row['entropy_bits'] for row in rows):.2f} to "
        f"{max(row['entropy_bits'] for row in rows):.2f} of {math.log2(n_experts):.2f} bits, busiest expert in "
        f"{max(row['busiest'] for row in rows):.0%} of the tokens, reuse {min(row['reuse'] for row in rows):.2f} to "
        f"{max(row['reuse'] for row in rows):.2f}"
    )
    yield Verdict("routing", "ok", found)


def _experts(changed: Mapping[str, Mapping[str, float | None]]) -> Iterator[Verdict]:
    """Losses under changed routing against the one as it is."""
    if not changed:
        yield Verdict("routed experts", "not judged", "there are none")
        return
    change = {name: found["change"] or 0.0 for name, found in changed.items()}
    if not all(_finite(found["loss"]) for found in changed.values()):
        yield Verdict("routed experts", "suspicious", "the loss is not finite")
        return
    for name, spoken in (("without_experts", "without any"), ("other_experts", "with others than chosen")):
        said = f"{spoken} the loss is {change[name]:+.3f} nats a token"
        if change[name] >= LEAST_LOSS:
            yield Verdict("routed experts", "ok", said)
        else:
            wrong = f"{said}, less than {LEAST_LOSS}: experts and routers don't belong together"
            yield Verdict("routed experts", "suspicious", wrong)
    less, more = change["less_of_them"], change["more_of_them"]
    said = f"at 0.6 and 1.67 of their weight {less:+.3f} and {more:+.3f} nats a token"
    best = "less_of_them" if less < more else "more_of_them"
    error = changed[best]["error"]
    if -change[best] > MOST_GAIN and error is not None and -change[best] > CLEARLY * error:
        what = "high" if best == "less_of_them" else "low"
        yield Verdict("routed experts", "suspicious", f"{said}: their weight (routed_scaling_factor) is too {what}")
    else:
        yield Verdict("routed experts", "ok", said)


def _answers(answers: list[Mapping[str, Any]]) -> Iterator[Verdict]:
    if not answers:
        yield Verdict("answers", "not judged", "the folder has no chat template")
    outcomes: dict[str, Outcome] = {"right": "ok", "wrong": "suspicious", "unfinished": "not judged"}
    for answer in answers:
        yield Verdict(f"answer to {answer['asked']!r}", outcomes[answer["judgement"]], answer["said"])


def _speed(speed: Mapping[str, Any]) -> Iterator[Verdict]:
    measured, predicted = speed["decode_tok_s"], speed["predicted_decode_tok_s"]
    if not predicted or not measured:
        yield Verdict("decode speed", "not judged", "nothing was written, or there are no routed experts")
        return
    said = (
        f"{measured:.3g} tok/s, predicted {predicted['middle']:.3g} ({predicted['low']:.3g} to {predicted['high']:.3g})"
    )
    if speed["bytes_a_token"] < LEAST_BYTES_A_TOKEN:
        yield Verdict(
            "decode speed", "not judged", f"{said}: the model is so small that other things than bytes decide"
        )
    elif measured < LEAST_SPEED * predicted["low"]:
        yield Verdict("decode speed", "suspicious", f"{said}: less than half of it")
    else:
        yield Verdict("decode speed", "ok", said)


def _memory(memory: Mapping[str, Any]) -> Verdict:
    peak, planned = memory["peak_rss_bytes"], memory["planned_bytes"]
    said = f"{peak / 2**30:.2f} GiB at most, planned {planned / 2**30:.2f} GiB"
    return Verdict("memory", "ok" if peak <= MEMORY_MARGIN * planned else "suspicious", said)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
