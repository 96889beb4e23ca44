"""`k2lite check`: the demo model passes, copies that were broken on purpose don't, and each band of the verdicts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import k2lite
from k2lite.check import report, scales
from k2lite.check.answers import judge_call, judge_number
from k2lite.check.identity import identity
from k2lite.check.judging import judge
from k2lite.check.reading import TEXTS, text
from k2lite.check.scales import scale_agreement
from k2lite.cli import main
from k2lite.demo_checkpoint import DEMO_CONFIG, write_random_demo, write_random_model
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.errors import ContextLengthError
from k2lite.model_folder import open_model
from k2lite.prediction import engine_cache
from k2lite.quant.checkpoint import Checkpoint
from k2lite.speed_model import Bandwidths

Capture = pytest.CaptureFixture[str]
TOKENS = 192


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured of the machine is not these tests' matter; the most that this process ever held is others'
    doing."""
    monkeypatch.setattr(report, "peak_rss_bytes", lambda: 1 << 29)
    monkeypatch.setattr(report, "measure_rates", lambda _: Bandwidths(1e10, 1e9, 1e12, 1e-4, one_bus=True))


def checked(folder: Path, tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", str(folder), "--tokens", str(TOKENS), *options, "--json", str(tmp_path / "report.json")])
    return code, dict(json.loads((tmp_path / "report.json").read_text()))


def suspicious(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"{verdict['about']}: {verdict['said']}" for verdict in facts["verdicts"] if verdict["outcome"] == "suspicious"
    ]


def test_the_demo_model_is_not_suspicious_at_any_budget(tmp_path: Path, capsys: Capture) -> None:
    code, facts = checked(DEMO_FOLDER, tmp_path, "--resident-experts", "40")
    shown = capsys.readouterr()
    assert suspicious(facts) == []
    assert code == 0
    assert facts["ok"] is True
    assert shown.out.splitlines()[-1] == "ok: nothing is suspicious"
    assert "routing changed" in shown.err
    outcomes = {verdict["about"]: verdict["outcome"] for verdict in facts["verdicts"]}
    assert outcomes["text, chinese"] == "not judged"  # its tokenizer has no Chinese
    assert outcomes["text, python"] == outcomes["routing"] == "ok"
    assert [answer["judgement"] for answer in facts["answers"]] == ["right", "right"]
    assert json.dumps(str(DEMO_FOLDER.parent)) not in json.dumps(facts)  # made to be sent
    assert facts["model"]["formats"]["routed experts"]
    assert 0 < facts["hits"]["decode"]["ram"] < 1
    assert facts["hits"]["decode"]["read_bytes"] > 0
    assert facts["tokens"] == {"asked": TOKENS, "read": TOKENS}
    assert facts["speed"]["predicted_decode_tok_s"]["middle"] > 0


def broken(tmp_path: Path, change: Callable[[dict[str, Any]], None] = lambda _: None, **config: object) -> Path:
    """The demo model with its tensors changed, and its config."""
    folder = tmp_path / "broken"
    shutil.copytree(DEMO_FOLDER, folder)
    change_files(folder, change)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | config))
    return folder


def change_files(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    stored = {file: load_file(file) for file in folder.glob("*.safetensors")}
    tensors = {name: tensor for part in stored.values() for name, tensor in part.items()}
    change(tensors)
    for file, part in stored.items():
        save_file({name: tensors[name].clone() for name in part}, file, metadata={"format": "pt"})


def experts_moved_on(tensors: dict[str, Any]) -> None:
    """Every expert holds what its neighbour should."""
    before = dict(tensors)
    for name in before:
        parts = name.split(".")
        if "experts" in parts:
            parts[5] = str((int(parts[5]) + 1) % 64)
            tensors[name] = before[".".join(parts)]


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (experts_moved_on, {}, "experts and routers don't belong together"),
        (lambda _: None, {"routed_scaling_factor": 1.0}, "(routed_scaling_factor) is too low"),
    ],
    ids=["experts moved on", "factor too low"],
)
def test_a_model_broken_on_purpose_is_suspicious(
    tmp_path: Path, capsys: Capture, change: Callable[[dict[str, Any]], None], config: dict[str, object], said: str
) -> None:
    code, facts = checked(broken(tmp_path, change, **config), tmp_path)
    assert any(said in line for line in suspicious(facts)), facts["verdicts"]
    assert code == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("suspicious: ")


def scales_swapped(tensors: dict[str, Any]) -> None:
    """gate_proj has the scales of up_proj and the other way round, as a wrong mapping of names makes it. The loss of
    this model hardly shows it: its scales are all alike."""
    before = dict(tensors)
    for name in before:
        if ".mlp.experts." in name and "gate_proj.weight_scale" in name:
            other = name.replace("gate_proj", "up_proj")
            tensors[name], tensors[other] = before[other], before[name]


def scales_of_the_next_expert(tensors: dict[str, Any]) -> None:
    before = dict(tensors)
    for name in before:
        parts = name.split(".")
        if "experts" in parts and parts[-1].startswith("weight_scale"):
            parts[5] = str((int(parts[5]) + 1) % 64)
            tensors[name] = before[".".join(parts)]


@pytest.mark.parametrize("change", [None, scales_swapped, scales_of_the_next_expert])
@pytest.mark.parametrize("experts", ["fp8", "int4_g32"])
def test_scales_that_belong_elsewhere_are_suspicious(
    tmp_path: Path, experts: str, change: Callable[[dict[str, Any]], None] | None
) -> None:
    folder = broken(tmp_path, change or (lambda _: None)) if experts == "fp8" else None
    if folder is None:
        folder = tmp_path / "int4"
        config = DEMO_CONFIG | {"n_routed_experts": 64, "num_hidden_layers": 3}
        write_random_model(folder, config, experts=experts, trunk="bf16", seed=0)
        if change is not None:
            change_files(folder, change)
    scales = scale_agreement(open_model(folder)[1])
    outcomes = {verdict.outcome for verdict in judge(with_value(scales, "scales")) if "scales" in verdict.about}
    assert ("suspicious" in outcomes) == (change is not None), scales


def test_random_weights_are_suspicious(tmp_path: Path, capsys: Capture) -> None:
    write_random_demo(tmp_path / "model")
    assert main(["check", str(tmp_path / "model"), "--tokens", "192", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert any("experts and routers don't belong together" in line for line in suspicious(facts))


def test_what_the_texts_do_not_hold_is_said_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception): ...

    def begin(*_: object) -> None:
        raise Begun

    most = sum(len(text(name).encode()) for name in TEXTS)
    with k2lite.load(DEMO_FOLDER, context=report.context_for(9999)) as engine:
        whole = sum(len(engine.tokenizer.encode(text(name))) for name in TEXTS)
        monkeypatch.setattr(report, "read_texts", begin)
        said: list[str] = []
        for tokens, expected in ((TOKENS, []), (9999, [f"{whole} tokens of text are read, not 9999"])):
            with pytest.raises(Begun):
                report.check(engine, tokens, lambda *_: None, said.append)
            assert [line.partition(":")[0] for line in said] == expected
    assert whole <= most < 9999
    with (
        k2lite.load(DEMO_FOLDER, context=128) as engine,
        pytest.raises(ContextLengthError, match="a question and its answer take .* and the context holds 128"),
    ):
        report.check(engine, TOKENS, lambda *_: None, said.append)


def test_mistakes_are_one_line(tmp_path: Path, capsys: Capture) -> None:
    for options, said in (
        (["--context", "1919"], "--context is 1919; this check takes 1920"),
        (["--tokens", "5"], "--tokens is 5; expected 6 or more"),
        (["--json", str(tmp_path)], "a folder; --json takes the file to write"),
        (["--json", str(tmp_path / "no" / "f")], "its folder does not exist"),
    ):
        assert main(["check", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_the_texts_are_there_and_long_enough() -> None:
    assert all(len(text(name).encode()) > 1500 for name in TEXTS)


GOOD: dict[str, Any] = {
    "model": {
        "config": {
            "hidden_size": 7168, "n_routed_experts": 384, "num_experts_per_tok": 8, "routed_scaling_factor": 2.827,
            "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "num_attention_heads": 64,
            "moe_intermediate_size": 2048, "kv_lora_rank": 512, "vocab_size": 163840,
        }
    },
    "texts": [
        {"name": "english", "bytes_per_token": 4.5, "perplexity": 9.0, "bits_per_byte": 0.7,
         "unigram_bits_per_byte": 3.0}
    ],
    "scales": {"gate_proj": {"correlation": -0.7, "layer": 1, "groups": 512}},
    "routing": {
        "tokens": 500,
        "layers": [
            {"layer": 1, "distinct": 300, "entropy_bits": 7.5, "busiest": 0.3, "reuse": 0.3, "least_weight_sum": 2.826,
             "most_weight_sum": 2.828}
        ],
    },
    "routing_changed": {
        name: {"loss": 2.0 + change, "change": change, "error": 0.02}
        for name, change in (("as_it_is", 0.0), ("without_experts", 7.0), ("other_experts", 6.0),
                             ("less_of_them", 0.2), ("more_of_them", 0.1))
    },
    "answers": [{"asked": "a", "judgement": "right", "said": "b"}],
    "speed": {"decode_tok_s": 1.5, "bytes_a_token": 2e10,
              "predicted_decode_tok_s": {"low": 1.2, "middle": 1.8, "high": 2.6}},
    "memory": {"peak_rss_bytes": 99, "planned_bytes": 100},
}  # fmt: skip


def with_value(value: object, *path: object) -> dict[str, Any]:
    facts = deepcopy(GOOD)
    place: Any = facts
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return facts


def test_a_good_report_is_ok_throughout() -> None:
    assert {verdict.outcome for verdict in judge(GOOD)} == {"ok"}
    # a gain that few tokens may well show by chance
    assert {verdict.outcome for verdict in judge(with_value(-0.03, "routing_changed", "more_of_them", "change"))} == {
        "ok"
    }


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (with_value(128, "model", "config", "num_attention_heads"), "num_attention_heads 128, published 64"),
        (with_value(None, "texts", 0, "perplexity"), "the perplexity is not finite"),
        (with_value(2e5, "texts", 0, "perplexity"), "worse than any token of 163840 being as likely"),
        (with_value(3.1, "texts", 0, "bits_per_byte"), "counting tokens does as well"),
        (with_value(-0.05, "scales", "gate_proj", "correlation"), "they have nothing to do with their codes"),
        (with_value(None, "scales", "gate_proj", "correlation"), "all scales are equal"),
        (with_value(9, "routing", "layers", 0, "distinct"), "layer 1 is dead: it uses 9 of 384 experts"),
        (with_value(0.02, "routing", "layers", 0, "reuse"), "layer 1 chooses as if by chance"),
        (with_value(1.0, "routing", "layers", 0, "least_weight_sum"), "weights sum to 1.000 to 2.828"),
        (with_value(None, "routing", "layers", 0, "least_weight_sum"), "weights sum to no number to 2.828"),
        (with_value(0.1, "routing_changed", "without_experts", "change"), "without any the loss is +0.100 nats"),
        (
            with_value(0.1, "routing_changed", "other_experts", "change"),
            "with others than chosen the loss is +0.100 nats",
        ),
        (with_value(-0.1, "routing_changed", "less_of_them", "change"), "(routed_scaling_factor) is too high"),
        (with_value(-0.1, "routing_changed", "more_of_them", "change"), "(routed_scaling_factor) is too low"),
        (with_value(None, "routing_changed", "as_it_is", "loss"), "the loss is not finite"),
        (with_value("wrong", "answers", 0, "judgement"), "b"),
        (with_value(0.5, "speed", "decode_tok_s"), "less than half of it"),
        (with_value(103, "memory", "peak_rss_bytes"), "GiB at most"),
    ],
)
def test_each_band_is_seen_alone(facts: dict[str, Any], said: str) -> None:
    (found,) = [verdict for verdict in judge(facts) if verdict.outcome == "suspicious"]
    assert said in found.said


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (with_value(512, "model", "config", "hidden_size"), "no published model has these sizes"),
        (with_value(1.0, "texts", 0, "bytes_per_token"), "its tokenizer has no tokens for it"),
        (with_value({}, "scales"), "routed experts have none"),
        (with_value(20, "scales", "gate_proj", "groups"), "20 groups are too few"),
        (with_value(10, "routing", "tokens"), "10 tokens are too few"),
        (with_value([], "routing", "layers"), "no routed experts"),
        (with_value({}, "routing_changed"), "there are none"),
        (with_value([], "answers"), "no chat template"),
        (with_value("unfinished", "answers", 0, "judgement"), "b"),
        (with_value(1e6, "speed", "bytes_a_token"), "other things than bytes decide"),
        (with_value({}, "speed", "predicted_decode_tok_s"), "nothing was written"),
    ],
)
def test_what_can_t_be_judged_says_so(facts: dict[str, Any], said: str) -> None:
    assert [said in verdict.said for verdict in judge(facts) if verdict.outcome == "not judged"] == [True]
    assert not any(verdict.outcome == "suspicious" for verdict in judge(facts))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('<|tool_calls_section_begin|><|tool_call_begin|>functions.send_letter:0<|tool_call_argument_begin|>'
         '{"city": "Torino", "count": 3}<|tool_call_end|><|tool_calls_section_end|>', "right"),
        ('<|tool_call_begin|>functions.send_letter:0<|tool_call_argument_begin|>{"city": 1, "count": 3}'
         "<|tool_call_end|>", "wrong"),
        ('<|tool_call_begin|>functions.send_letter:0<|tool_call_argument_begin|>{"city": "T"}'
         "<|tool_call_end|>", "wrong"),
        ('<|tool_call_begin|>functions.other:0<|tool_call_argument_begin|>{}<|tool_call_end|>', "wrong"),
        ("<|tool_call_begin|>functions.send_letter:0<|tool_call_argument_begin|>{<|tool_call_end|>", "wrong"),
        ("I can't.", "wrong"),
    ],
)  # fmt: skip
def test_a_call_is_judged_by_its_schema(answer: str, expected: str) -> None:
    assert judge_call(answer)[0] == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1200 centimeters", "right"),
        ("It is 1,200 cm.", "right"),
        ("<think>1200?</think>12", "wrong"),
        ("120", "wrong"),
        ("12 meters are 12,000 centimeters", "wrong"),
        ("11200", "wrong"),
    ],
)
def test_a_number_is_looked_for_in_what_is_said(answer: str, expected: str) -> None:
    assert judge_number(answer)[0] == expected


def test_a_layer_of_equal_scales_is_not_forgotten_for_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = open_model(DEMO_FOLDER)
    first, real = checkpoint.schema.expert_layers[0], scales._groups

    def groups(checkpoint: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
        found = real(checkpoint, layer)
        if layer == first:
            found["up_proj"][0] = 1.0
        return found

    monkeypatch.setattr(scales, "_groups", groups)
    found = scale_agreement(checkpoint)
    assert found["up_proj"]["layer"] == first
    assert math.isnan(found["up_proj"]["correlation"])
    assert -1 <= found["gate_proj"]["correlation"] < -0.5


def test_a_report_names_no_path(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_random_demo(folder)
    shard = next(folder.glob("*.safetensors"))
    shutil.copy(shard, folder / "model-other.safetensors")
    with k2lite.load(folder, context=64) as engine:
        assert engine_cache(engine).store.checkpoint.notes
        described = json.dumps(identity(engine))
    assert "model-other.safetensors: not read" in described
    assert str(tmp_path) not in described
