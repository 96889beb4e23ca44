"""`k2lite trace --moments`, `quantize --importance` and `--rounding gptq` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import k2lite
from k2lite.cli import main
from k2lite.quant.moments import Moments
from tests.checkpoints import random_weights, tiny_config, write_checkpoint


def run(*arguments: object) -> None:
    """In this process: what another would take to begin is longer than the work."""
    assert main([str(argument) for argument in arguments]) == 0


TEXT = "<|im_user|>user<|im_middle|>A library of words.<|im_end|>"
# the few matrices of the trunk, so that it is quick
TRUNK = ("--experts", "keep", "--trunk", "int4_g32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_what_is_recorded_weighs_what_is_quantized(
    demo: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("trace", demo, "--moments", tmp_path / "m", "--text", text, "--window", 16)
    moments = Moments(tmp_path / "m")
    read = k2lite.load(demo).tokenizer.encode(TEXT, allow_special=True)  # control tokens count as such
    assert f"the moments of {len(read)} tokens" in capsys.readouterr().err
    assert moments._counts["lm_head"] == len(read)
    search = ("--scale-search", "mse")
    run("quantize", demo, tmp_path / "weighed", *TRUNK, "--importance", tmp_path / "m")  # means mse
    settings = json.loads((tmp_path / "weighed" / "k2lite_manifest.json").read_text())["settings"]
    assert settings["importance"] == moments.identity
    run("quantize", demo, tmp_path / "plain", *TRUNK, *search)
    logits = [k2lite.load(tmp_path / name).logits([1, 2, 3]) for name in ("weighed", "plain")]
    assert not logits[0].equal(logits[1])


def test_gptq_reads_its_text_and_says_so_in_the_manifest(demo: Path, text: Path, tmp_path: Path) -> None:
    read = k2lite.load(demo).tokenizer.encode(TEXT, allow_special=True)
    for tokens, name in ((20, "out"), (len(read) + 9, "all")):  # more than there are: those that there are
        arguments = ("--rounding", "gptq", "--calibration", text, "--calibration-tokens", tokens)
        run("quantize", demo, tmp_path / name, *TRUNK, *arguments)
        settings = json.loads((tmp_path / name / "k2lite_manifest.json").read_text())["settings"]
        assert settings["rounding"] == "gptq"
        assert settings["calibration"]["tokens"] == min(tokens, len(read))
    assert settings["calibration"]["text"].startswith("xxh3 ")
    run("quantize", demo, tmp_path / "plain", *TRUNK)
    found, plain = (k2lite.load(tmp_path / name).logits([1, 2, 3]) for name in ("out", "plain"))
    assert found.isfinite().all()
    assert not found.equal(plain)
    nothing = ("--experts", "bf16", "--trunk", "bf16", "--lm-head", "bf16", "--rounding", "gptq", "--calibration", text)
    assert main(["quantize", str(demo), str(tmp_path / "none"), *map(str, nothing)]) == 2


def test_a_trunk_is_quantized_while_loading(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("run", demo, "--trunk", "int8_channel", "-p", "Hi", "--max-tokens", 2, "--temperature", 0, "--json")
    assert "trunk to int8_channel" in json.loads(capsys.readouterr().out)["plan"]["arithmetic"]


def test_mistakes_are_one_line(demo: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path / "tiny", config, random_weights(config, seed=1))
    out = str(tmp_path / "out")
    for arguments, message in (
        (["trace", str(demo), "--text", str(text)], "nothing to record; name a file with --out, --moments or both"),
        (["trace", str(demo), "--text", str(text), "--moments", f"{out}/a/b"], "its folder does not exist"),
        (["trace", str(demo), "--text", "none", "--moments", out], "none: can't be read"),
        (["quantize", str(demo), out, "--rounding", "gptq"], "--rounding gptq needs a text: add --calibration FILE"),
        (["quantize", str(demo), out, "--calibration", str(text)], "--calibration has no effect without --rounding"),
        (["quantize", str(demo), out, "--importance", str(text)], "text.txt: found a header of"),
        (["run", str(demo), "--trunk", "int9", "-p", "x"], "--trunk: the format 'int9' is unknown"),
        (["run", str(demo), "--trunk", "int8_g128", "-p", "x"], "int8_g128 needs rows of a multiple of 128 columns"),
    ):
        assert main(arguments) == 2, arguments
        stderr = capsys.readouterr().err
        assert message in stderr
        said = [line for line in stderr.splitlines() if "the best that is ready" not in line]
        assert len(said) == 1 or arguments[0] == "quantize"  # which prints its plan first
    assert not Path(out).exists()
