"""plan, verify, bench and the memory options, as a user meets them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import k2lite
from k2lite import benchmark
from k2lite.backends.registry import BUILT_IN
from k2lite.cli import main
from k2lite.learned_routing import keep_in_file
from k2lite.offload import drive_rate
from k2lite.offload.policies import DEFAULT_POLICY, POLICIES
from k2lite.prediction import expected
from k2lite.quant.checksums import MANIFEST_NAME, read_checksums
from k2lite.verbs.model_options import POLICIES as POLICY_NAMES
from tests.checkpoints import random_weights, tiny_config, write_checkpoint
from tests.stand_in.engines import on_stand_in, vram_for

Capture = pytest.CaptureFixture[str]
MACHINE = {"name": "desk", "ram": "128GB", "reserve": "8GB", "ram_gb_per_s": 70, "drive_gb_per_s": 6.5, "tflops": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs") / "model"
    config = tiny_config()
    write_checkpoint(folder, config, random_weights(config, seed=3), format="fp8")
    return folder


def run_json(capsys: Capture, *arguments: object, code: int = 0) -> dict[str, object]:
    assert main([*map(str, arguments), "--json"]) == code
    return dict(json.loads(capsys.readouterr().out))


def fails(capsys: Capture, *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    return line


def test_the_help_names_the_policies_there_are() -> None:
    assert set(POLICY_NAMES) == set(POLICIES)
    assert POLICY_NAMES[0] == DEFAULT_POLICY


def test_verify_writes_checksums_compares_them_and_names_what_differs(
    tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    first = run_json(capsys, "verify", folder)
    assert (first["compared"], first["written"], first["problems"]) == (0, False, [])
    assert not (folder / MANIFEST_NAME).exists()
    run_json(capsys, "verify", folder, "--write")
    assert len(read_checksums(folder)) == first["pieces"]
    second = run_json(capsys, "verify", folder, "--write")
    assert (second["compared"], second["written"]) == (first["pieces"], False)
    assert main(["verify", str(folder)]) == 0
    assert "as the manifest says" in capsys.readouterr().out

    shard = sorted(folder.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    third = run_json(capsys, "verify", folder, "--write", code=1)
    (problem,) = third["problems"]  # type: ignore[misc]
    assert shard.name in problem
    assert "the file is damaged" in problem
    assert third["written"] is False


@pytest.mark.parametrize(
    "content", ['{"version": 2}', "[]", '{"version": 1, "pieces": {"layer 1, expert 0": {"checksum": "x"}}}']
)
def test_a_manifest_that_makes_no_sense_is_one_line(tiny: Path, tmp_path: Path, capsys: Capture, content: str) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / MANIFEST_NAME).write_text(content)
    assert MANIFEST_NAME in fails(capsys, "verify", tmp_path / "model")


def test_plan_of_a_folder_and_of_a_config_alone(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    machine = tmp_path / "desk.json"
    machine.write_text(json.dumps(MACHINE))
    facts = run_json(capsys, "plan", tiny, "--machine", machine, "--context", 64)
    sizes = facts["bytes"]
    assert isinstance(sizes, dict)
    assert (sizes["slots"], sizes["experts"], sizes["context_tokens"]) == (16, 16, 64)
    alone = run_json(capsys, "plan", tiny / "config.json", "--machine", machine, "--context", 64)["bytes"]
    assert isinstance(alone, dict)
    assert alone["experts_all"] == sizes["experts_all"]
    assert main(["plan", str(tiny), "--machine", str(machine), "--ram", "1GiB"]) == 2
    assert "trunk" in capsys.readouterr().err
    assert main(["plan", str(tiny)]) == 0
    shown = capsys.readouterr()
    assert "limit" in shown.out
    assert "measuring" in shown.err


def test_a_config_alone_is_planned_for_this_machine_and_its_drive(
    tiny: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drive_rate, "TRIAL_BYTES", 8 << 20)
    config = tmp_path / "config.json"
    shutil.copy(tiny / "config.json", config)
    assert main(["plan", str(config), "--context", "64", "--ram", "2GiB", "--json"]) == 0
    shown = capsys.readouterr()
    machine = json.loads(shown.out)["machine"]
    assert machine["memory_bytes"] == 2 << 30
    assert min(machine["memory"], machine["drive"], machine["flops"]) > 1e6
    assert f"the drive with 8.0 MiB in {tmp_path}" in shown.err
    assert list(tmp_path.iterdir()) == [config]
    said = fails(capsys, "plan", config, "--drive", tmp_path / "none")
    assert "none: its drive can't be measured: No such file or directory; name a folder with --drive" in said
    assert "--drive has no effect: the folder" in fails(capsys, "plan", tiny, "--drive", tmp_path)
    assert "--drive has no effect: --machine" in fails(
        capsys, "plan", config, "--drive", tmp_path, "--machine", tmp_path / "m"
    )


def test_the_line_that_run_prints_has_the_speed_to_expect(tiny: Path) -> None:
    """All experts in memory, and some: the numbers are those of `plan`, so only their order is judged."""
    for options in ([], ["--resident-experts", "6"]):
        engine = k2lite.load(tiny, context=64, resident_experts=int(options[1]) if options else None)
        middle, low, high = map(float, re.findall(r"[\d.e+]+", expected(engine).partition("allow")[2]))
        assert 0 < low <= middle <= high
        engine.close()


def test_plan_for_an_accelerator_of_another_machine(shared: Path, tmp_path: Path, capsys: Capture) -> None:
    machine = tmp_path / "m.json"
    config = shared / "data/Kimi-K2-Instruct/config.json"
    card = {"vram": "24GB", "vram_gb_per_s": 806, "bus_gb_per_s": 25, "layer_ms": 0.25}
    machine.write_text(json.dumps(MACHINE | card))
    facts = run_json(capsys, "plan", config, "--machine", machine, "--context", 8192)
    sizes, decode = facts["bytes"], facts["decode"]
    assert isinstance(sizes, dict)
    assert isinstance(decode, dict)
    assert 0 < sizes["experts_on_device"] < 24e9
    assert decode["low"]["best"] < decode["middle"]["best"] < decode["high"]["best"]
    assert facts["experts_on"] == "host"  # 24 GB have no room for half of 945 GB
    speeds = facts["places"]
    assert isinstance(speeds, dict)
    assert speeds["host"]["middle"] == decode["middle"]["best"]
    assert 0 < speeds["device"]["low"] < speeds["device"]["high"]
    assert set(facts["prefill_tok_s"].values()) == {0.0}  # type: ignore[attr-defined]
    assert main(["plan", str(config), "--machine", str(machine), "--context", "8192"]) == 0
    shown = capsys.readouterr().out
    assert "experts on host " in shown
    assert "host_tflops" in shown
    machine.write_text(json.dumps(MACHINE | card | {"host_tflops": 2}))
    bigger = run_json(capsys, "plan", config, "--machine", machine, "--context", 8192, "--vram", "700GiB")
    assert bigger["experts_on"] == "device"
    assert bigger["decode"]["middle"]["link_s"] > 0  # type: ignore[index]
    machine.write_text(json.dumps(MACHINE))
    assert "--vram has no effect" in fails(capsys, "plan", config, "--machine", machine, "--vram", "8GiB")
    machine.write_text(json.dumps(MACHINE | card | {"vram": "8GB"}))
    assert "the accelerator of desk has" in fails(capsys, "plan", config, "--machine", machine)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"speed": 3}, "'speed': unknown"), ({"ram": None}, "ram is None"), ({"tflops": -1}, "tflops is -1"),
     ({"vram": "24GB"}, "vram needs"), ({"ram": "lots"}, "'lots' is no size")],
)  # fmt: skip
def test_a_machine_that_makes_no_sense_is_one_line(
    tiny: Path, tmp_path: Path, capsys: Capture, change: dict[str, object], message: str
) -> None:
    (tmp_path / "m.json").write_text(json.dumps(MACHINE | change))
    assert message in fails(capsys, "plan", tiny, "--machine", tmp_path / "m.json")


def test_bench_counts_what_it_did(tiny: Path, capsys: Capture) -> None:
    facts = run_json(capsys, "bench", tiny, "--prompt-tokens", 5, "--tokens", 4, "--resident-experts", 6)
    decode, prefill = facts["decode"], facts["prefill"]
    assert isinstance(decode, dict)
    assert isinstance(prefill, dict)
    assert (prefill["tokens"], decode["tokens"]) == (5, 4)
    assert decode["requested_experts"] == 4 * 2 * 3
    assert decode["read_bytes"] > 0
    assert decode["share_of_bound"] > 0
    assert main(["bench", str(tiny), "--prompt-tokens", "5", "--tokens", "1"]) == 0
    assert "planned" in capsys.readouterr().out
    assert "--tokens is 0" in fails(capsys, "bench", tiny, "--tokens", 0)


@pytest.fixture
def stand_in(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[object, ...]]:
    """An accelerator with room for some of 16 experts, for the command line: options of `bench` by where they multiply.
    Its rates are known."""
    monkeypatch.setitem(BUILT_IN, "stand-in", "tests.stand_in.spec")
    monkeypatch.setattr(benchmark, "measure_rates", lambda _: benchmark.Rates(1e9, 2e10, 4e11, 1e10))
    uses = tmp_path / "uses.safetensors"
    with k2lite.load(tiny, backend="reference", context=16) as engine:
        engine.logits([1, 2, 3])
        keep_in_file(engine.experts, engine.config, uses)
    options: dict[str, tuple[object, ...]] = {}
    for where, slots, more in (("device", 9, ()), ("host", 4, ()), ("split", 6, ("--hot-experts", uses))):
        named = {"experts_on": where} | ({"hot_experts": uses} if more else {})
        vram = vram_for(tiny, slots, context=16, host_backend="reference", **named)
        sizes = ("--context", 16, "--prompt-tokens", 6, "--tokens", 6, "--resident-experts", 5, "--seed", 1)
        options[where] = ("--backend", "stand-in", "--vram", vram, "--experts-on", where, *more, *sizes)
    return options


def test_bench_counts_an_accelerators_memory_and_the_link_to_it(
    tiny: Path, stand_in: dict[str, tuple[object, ...]], capsys: Capture
) -> None:
    for where, options in stand_in.items():
        facts: dict[str, Any] = run_json(capsys, "bench", tiny, *options)
        decode, plan = facts["decode"], facts["plan"]
        assert plan["multiply_on"] == where
        asked, expert = decode["requested_experts"], plan["experts_bytes"] / 16
        assert asked == 6 * 2 * 3  # of the hot ones of a split, too
        assert decode["hit_experts"] * expert + decode["read_bytes"] >= asked * expert
        there = decode["device_hit_experts"]
        assert (there > 0) == (where != "host")
        assert decode["device_hit_rate"] == there / asked <= decode["hit_rate"]
        sent = asked - there if where == "device" else 0
        assert decode["sent_bytes"] == sent * expert == decode["sent_bytes_per_token"] * 6
        on_device = {"device": asked, "host": 0, "split": there}[where]
        after = max(
            decode["read_bytes"] / 1e9,
            decode["sent_bytes"] / 1e10,
            on_device * expert / 4e11,
            (asked - on_device) * expert / 2e10,
        )
        bound_s = facts["trunk_read_bytes"] / 4e11 + after / 6
        assert decode["bound_tok_s"] == pytest.approx(1 / bound_s)
        assert decode["share_of_bound"] == pytest.approx(decode["tok_s"] * bound_s)


def test_bench_says_what_an_accelerator_did(
    tiny: Path, stand_in: dict[str, tuple[object, ...]], capsys: Capture
) -> None:
    assert main(["bench", str(tiny), *map(str, stand_in["device"])]) == 0
    shown = capsys.readouterr().out
    assert "of the hits on stand-in: " in shown
    assert "stand-in's memory 400.0 GB/s, the link there 10.0 GB/s" in shown


def test_the_rates_of_an_accelerator_are_measured_in_the_run(tiny: Path) -> None:
    with on_stand_in(tiny, allow_fallback=True) as (engine, _):
        rates = benchmark.measure_rates(engine)
    assert min(rates.drive, rates.memory, rates.device, rates.link) > 0
    with k2lite.load(tiny, backend="reference", context=16) as engine:
        rates = benchmark.measure_rates(engine)
    assert (rates.device, rates.link) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--ram", "much"], "'much' is no size"), (["--resident-experts", "x"], "--resident-experts is 'x'"),
     (["--policy", "best"], "policy 'best' is unknown"), (["--mirror", "/nowhere"], "can't be read"),
     (["--ram", "1MiB"], "the budget is 1.0 MiB")],
)  # fmt: skip
def test_memory_options_that_can_t_be_are_one_line(
    tiny: Path, capsys: Capture, options: list[str], message: str
) -> None:
    assert message in fails(capsys, "bench", tiny, *options)


def test_bench_can_follow_a_trace(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    """Two tokens that take turns and share nothing: with room for both every later use is a hit."""
    choices = [[[5, 6, 7], [0, 1, 2]], [[0, 1, 2], [3, 4, 5]]]
    lines: list[dict[str, object]] = [{"tok": token, "layers": layers} for token, layers in enumerate(choices)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines * 4))
    common = ("bench", tiny, "--prompt-tokens", 2, "--tokens", 3, "--no-prefetch", "--routing", trace)
    decode = run_json(capsys, *common, "--resident-experts", 14)["decode"]
    assert isinstance(decode, dict)
    assert (decode["requested_experts"], decode["hit_experts"]) == (18, 18)
    decode = run_json(capsys, *common, "--resident-experts", 7, "--policy", "lru")["decode"]
    assert isinstance(decode, dict)
    assert decode["hit_experts"] == 0
    machine = tmp_path / "desk.json"
    machine.write_text(json.dumps(MACHINE))
    plan = ("plan", tiny, "--machine", machine, "--context", 64, "--routing", trace)
    traced = run_json(capsys, *plan)["traced"]
    assert isinstance(traced, dict)
    assert traced["decode"]["hit_rate"] == 1, "there is room for all that the trace asks for"
    assert traced["decode"]["best"] == traced["decode"]["perfect"]
    assert main([str(part) for part in plan]) == 0
    assert "    trace  " in capsys.readouterr().out
    lines[0]["layers"] = [[0, 1], [2, 3]]
    trace.write_text(json.dumps(lines[0]))
    assert "the trace has 2 experts a token, numbered up to 3, and the model 3 of 8" in fails(capsys, *common)
    assert "and the model 3 of 8" in fails(capsys, *plan)
