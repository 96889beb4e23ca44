"""`k2lite backends` as a user meets it: the list, its JSON, a test run, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k2lite.backends import registry
from k2lite.backends.base import Capabilities
from k2lite.backends.reference import ReferenceBackend
from k2lite.backends.spec import BackendSpec, Probe
from k2lite.cli import main


def spec(probe: Probe, backend: type[ReferenceBackend] = ReferenceBackend) -> BackendSpec:
    can = Capabilities(frozenset({"bf16", "f32"}), "x", expert_formats=frozenset({"int4_g64", "int8_channel"}))
    return BackendSpec("mine", 1, 0, can, lambda: probe, backend, "emulated")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> object:
    """Make one backend the only one there is."""

    def only(given: BackendSpec) -> None:
        monkeypatch.setattr(registry, "find", lambda name: registry.Found(name, given))
        monkeypatch.setattr(registry, "backend_names", lambda: ("mine",))

    return only


def test_the_list_says_why_one_is_not_ready(only: object, capsys: pytest.CaptureFixture[str]) -> None:
    cause = ImportError("the package is installed and can't be imported")
    cause.__cause__ = OSError("libascendcl.so: cannot open shared object file")
    only(spec(Probe(False, "the driver is missing", error=cause)))  # type: ignore[operator]
    assert main(["backends"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "mine         not ready: the driver is missing",
        "    because   ImportError: the package is installed and can't be imported",
        "    because   OSError: libascendcl.so: cannot open shared object file",
        "    formats   bf16, f32",
        "    experts   int4_g64, int8_channel",
        "    evidence  emulated",
    ]
    assert main(["backends", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["backends"]
    assert (row["name"], row["ready"], row["reason"]) == ("mine", False, "the driver is missing")
    assert len(row["causes"]) == 2
    assert row["group_sizes"] == [64, "channel"]
    assert row["evidence"] == "emulated"
    assert row["devices"] == []


def test_ours_are_ready_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["backends"]}
    assert rows["reference"]["ready"]
    assert rows["reference"]["evidence"].startswith("ran on hardware (2")
    assert rows["reference"]["devices"][0]["memory_bytes"] > 0


class Broken(ReferenceBackend):
    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({"f16"}), "broken")

    def combine(self, out: object, weights: object, shared: object) -> object:  # type: ignore[override]  # noqa: ARG002
        return shared


def test_a_failed_suite_is_exit_code_1_and_a_report(
    only: object, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    only(spec(Probe(True, "here"), Broken))  # type: ignore[operator]
    assert main(["backends", "test", "mine", "--report", str(tmp_path / "new" / "report.json")]) == 1
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("failed: combine, [6, 8, 256]: error ") for line in out)
    assert " cases passed" in out[-1]
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert main(["backends", "test", "mine", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["cases"] == report["cases"]
    assert report["passed"] is False
    assert {case["operation"] for case in report["cases"] if not case["passed"]} == {"combine"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["backends", "test", "auto"], "name one backend"),
        (["backends", "test", "nope"], "backend 'nope' is unknown; known: auto, cpu, reference"),
        (["backends", "tset"], "invalid choice: 'tset'"),
        (["run", "--backend", "nope", "-p", "x"], "backend 'nope' is unknown"),
        (["quantize", "k2lite/demo", "x", "--backend", "nope"], "backend 'nope' is unknown"),
        (["quantize", "k2lite/demo", "x", "--backend", "auto"], "--backend auto names none"),
        (["quantize", "k2lite/demo", "x", "--backend", "onnx", "--trunk", "keep"], "--trunk must be one of"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_quantize_takes_its_defaults_from_the_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "k2lite/demo", "--backend", "onnx", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["settings"]["experts"], plan["settings"]["trunk"]) == ("int4_g32", "int8_channel")
