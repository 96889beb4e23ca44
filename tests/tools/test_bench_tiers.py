"""The table's parts on a slice of reduced width: what is measured is counted right; how fast it is, nobody asserts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from k2lite.model_folder import open_model
from k2lite.offload.routing_trace import read_trace
from tests.tools.test_make_slice import SIZES
from tools import bench_tiers
from tools.make_slice import make_slice
from tools.tiers.measuring import Setting, measure
from tools.tiers.memory_limit import MemoryGroup


@pytest.fixture(scope="module")
def slice_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiers") / "slice"
    make_slice(folder, format="int4", layers=3, experts=16, vocab=520, sizes={**SIZES, "num_experts_per_tok": 2})
    return folder


def test_a_setting_is_counted_right(slice_folder: Path, tmp_path: Path) -> None:
    bench_tiers.write_uniform_trace(tmp_path / "uniform", slice_folder)
    setting = Setting(
        str(slice_folder),
        routing=str(tmp_path / "uniform"),
        prompt_tokens=20,
        chunk_tokens=20,
        warm_up_tokens=1,
        rounds=2,
        round_tokens=3,
        context_tokens=64,
        prompt_twice=True,
    )
    facts = measure(setting)
    _, checkpoint = open_model(slice_folder)
    first, again = facts["first_prefill"], facts["prefill"]
    assert 0 < first["read_bytes"] == first["needed_bytes"] <= checkpoint.experts_bytes
    assert again["read_bytes"] + first["read_bytes"] <= checkpoint.experts_bytes, "there is room for all"
    assert [facts["trunk_bytes"] for facts in facts["rounds"]] == [facts["decode"]["trunk_bytes"]] * 2
    for each in facts["rounds"]:
        assert each["missing_bytes"] == pytest.approx((1 - each["hit_rate"]) * 4 * checkpoint.expert_bytes)
        assert each["bound_s"] > 0
    assert facts["predicted"]["chunk_tokens"] == 20
    assert 0 < facts["predicted"]["decode"]["hit_rate"] <= 1
    assert facts["memory"]["now"] <= facts["memory"]["peak"]


def test_a_uniform_trace_has_no_habit(slice_folder: Path, tmp_path: Path) -> None:
    bench_tiers.write_uniform_trace(tmp_path / "uniform", slice_folder)
    trace = read_trace(tmp_path / "uniform")
    assert trace.ids.shape == (300, 2, 2)
    assert set(trace.ids.ravel().tolist()) == set(range(16))


def test_the_plan_s_rows_compare_what_was_said_with_what_was(
    slice_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Setting] = []

    def fake(_group: MemoryGroup, setting: Setting) -> dict[str, Any]:
        asked.append(setting)
        return {
            "decode": {"tok_s": 4.0, "hit_rate": 0.5},
            "predicted": {"decode": {"best": 5.0, "hit_rate": 0.4}, "prefill_tok_s": 9.0, "rates": {}},
            "prefill": {"tok_s": 8.0},
        }

    monkeypatch.setattr(bench_tiers, "measured", fake)
    options = argparse.Namespace(model=str(slice_folder), routing="trace.jsonl", limit="8GB")
    rows = bench_tiers.plan_section(MemoryGroup(None), options)
    assert [row["error"] for row in rows] == [0.25] * len(bench_tiers.PLANNED)
    assert len(rows) >= 6
    assert [setting.ram_bytes / 8e9 for setting in asked] == [share for share, _ in bench_tiers.PLANNED]
    assert {Path(setting.routing).name for setting in asked} == {"uniform", "trace.jsonl"}
    assert "+25%" in capsys.readouterr().out


def test_a_command_in_no_group_runs_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert MemoryGroup(None).start(["echo", "a b"]).wait() == 0
    assert capfd.readouterr().out == "a b\n"
    assert MemoryGroup(None).failures == 0
