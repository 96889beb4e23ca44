"""Bytes and speeds before a download: the published sizes to the byte, the speed model against its derivation."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k2lite.config import parse_config
from k2lite.model_sizes import published_sizes
from k2lite.placement import WeightBytes
from k2lite.planning import ModelBytes, work_of
from k2lite.speed_model import Bandwidths, Decode, Work, decode_speed, hit_rate, prefill_speed, what_would_help


@pytest.mark.parametrize(
    ("config", "inventory"),
    [("Kimi-K2.6", "Kimi-K2.5 / K2.6"), ("Kimi-K2.5", "Kimi-K2.5 / K2.6"), ("Kimi-K2-Instruct", "Kimi-K2-Instruct")],
)
def test_a_config_alone_gives_the_published_bytes(shared: Path, config: str, inventory: str) -> None:
    path = shared / "data" / config / "config.json"
    raw = json.loads(path.read_text())
    known = json.loads((shared / "data/derived/tensor_inventory.json").read_text())
    (found,) = [value for name, value in known.items() if name.startswith(inventory)]
    parsed = parse_config(raw, path)
    sizes = published_sizes(parsed, raw)
    assert sizes.total == found["total_bytes"]
    experts = [p["bytes_each"] * p["copies"] for p in found["patterns"] if ".experts.E." in p["pattern"]]
    assert sizes.experts == sum(experts)
    weights = WeightBytes("x", sizes.trunk, sizes.experts, sizes.expert, 60 * 384)
    work = work_of(parsed, ModelBytes(weights, sizes.embeddings))
    assert (work.active, work.layers) == (480, 61)
    assert work.flops_per_token == pytest.approx(65e9, rel=0.03)  # routing.md section 4


@pytest.fixture(scope="module")
def derivation(shared: Path) -> Any:
    spec = importlib.util.spec_from_file_location("speed_model_proof", shared / "proofs/speed_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(machine: dict[str, Any], expert_bytes: float, curve: str) -> Decode:
    work = Work(machine["D"] * 1e9, expert_bytes, 60 * 384, 480, 60, 65.2e9)
    rates = Bandwidths(
        memory=machine["bwr"] * 1e9,
        drive=machine["bwn"] * 1e9,
        flops=machine["F"],
        layer_s=machine["ov"],
        one_bus=bool(machine["uni"]),
        device=machine["bwg"] * 1e9,
        bus=machine["bwp"] * 1e9,
    )
    return decode_speed(work, rates, curve, held=machine["rexp"] * 1e9, on_device=machine["vexp"] * 1e9)  # type: ignore[arg-type]


def test_speeds_are_those_of_the_derivation(derivation: Any) -> None:
    for machine in derivation.M:
        for mine, curve in (("low", "low"), ("middle", "mid"), ("high", "high")):
            found, expected = ours(machine, derivation.b * 1e9, mine), derivation.decode(machine, curve)
            assert found.serial == pytest.approx(expected["serial"], rel=1e-6), machine["name"]
            assert found.best == pytest.approx(max(expected["intra"], expected["look2"]), rel=1e-6), machine["name"]
            assert found.perfect == pytest.approx(expected["perfect"], rel=1e-6), machine["name"]


def test_the_best_schedule_column_of_the_facts(shared: Path, derivation: Any) -> None:
    """The table as it is printed there, found by the first word of a row (A1, A1b, ...)."""
    rows = re.findall(r"^\| (\w+) (.*)\|$", (shared / "facts/routing.md").read_text(), re.MULTILINE)
    table = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    checked = 0
    for machine in derivation.M:
        cells = table.get(machine["name"].split()[0])
        if cells is None or len(cells) != 10 or cells[6] == "same":
            continue
        best = ours(machine, derivation.b * 1e9, "middle").best
        assert best == pytest.approx(float(cells[6]), rel=0.15), machine["name"]
        checked += 1
    assert checked >= 8


def test_more_memory_and_faster_parts_never_slow_a_plan() -> None:
    work = Work(10e9, 25e6, 23040, 480, 61, 65e9)
    rates = Bandwidths(70e9, 6e9, 1e12, 1e-4, one_bus=True)
    speeds = [decode_speed(work, rates, "middle", held=share * 576e9).best for share in (0.01, 0.1, 0.4, 0.9, 1.0)]
    assert speeds == sorted(speeds)
    assert decode_speed(work, rates, "middle", held=576e9).missing_bytes == 0
    assert all(factor >= 1 for factor in what_would_help(work, rates, held=60e9).values())
    prompts = [prefill_speed(work, rates, tokens, held=60e9) for tokens in (1, 16, 128, 1024, 4096)]
    assert prompts == sorted(prompts)
    assert prefill_speed(replace(work, trunk_flops=22e9), rates, 512, held=60e9) == pytest.approx(
        512 / (512 / prefill_speed(work, rates, 512, held=60e9) + 512 * 22e9 / 1e12)
    )
    assert [hit_rate("low", share) for share in (-1, 0, 0.02, 1, 2)] == [0, 0, 0.10, 1, 1]
