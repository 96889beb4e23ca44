"""`k2lite export SRC OUT.onnx`: run by onnxruntime alone, in a process without k2lite, against numpy in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2lite import onnx_export
from k2lite.cli import main
from k2lite.errors import RequestError
from k2lite.onnx_export import parse_layers
from tests.checkpoints import Weights, random_weights, tiny_config, write_checkpoint

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TOKENS = 7
# What a user of the file runs, with nothing of ours: -I -S leaves only what is put on the path here.
BARE = """
import sys
sys.path.append({libraries!r})
import importlib.util
assert importlib.util.find_spec("k2lite") is None and importlib.util.find_spec("torch") is not None
import numpy, onnxruntime
session = onnxruntime.InferenceSession({model!r}, providers=["CPUExecutionProvider"])
feed = dict(numpy.load({feed!r}))
numpy.savez({out!r}, **dict(zip([o.name for o in session.get_outputs()], session.run(None, feed))))
assert "k2lite" not in sys.modules and "torch" not in sys.modules
"""


# Dies where the weights are half written.
KILLED = """
import os, signal
from k2lite import onnx_export
from k2lite.cli import main
real = onnx_export._mlp_pieces
def dies(*arguments):
    yield from real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
onnx_export._mlp_pieces = dies
main({arguments!r})
"""


def run_bare(model: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    libraries = str(Path(onnxruntime.__file__).parent.parent)
    np.savez(model.parent / "feed.npz", **feed)
    paths = {"model": str(model), "feed": str(model.parent / "feed.npz"), "out": str(model.parent / "out.npz")}
    code = BARE.format(libraries=libraries, **paths)
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=model.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(np.load(model.parent / "out.npz"))


def silu_mlp(x: np.ndarray, weights: Weights, at: str) -> np.ndarray:
    gate, up, down = (weights[f"{at}.{name}_proj.weight"].double().numpy() for name in ("gate", "up", "down"))
    h = x @ gate.T
    return (h / (1 + np.exp(-h)) * (x @ up.T)) @ down.T


def block(x: np.ndarray, weights: Weights, config: dict[str, Any], layer: int) -> np.ndarray:
    """DeepSeek-V3, section 2.1.2, in float64."""
    at = f"model.layers.{layer}.mlp"
    if layer < config["first_k_dense_replace"]:
        return silu_mlp(x, weights, at)
    scores = 1 / (1 + np.exp(-x @ weights[f"{at}.gate.weight"].double().numpy().T))
    choice = scores + weights[f"{at}.gate.e_score_correction_bias"].double().numpy()
    out = silu_mlp(x, weights, f"{at}.shared_experts")
    for token in range(len(x)):
        chosen = np.argsort(-choice[token])[: config["num_experts_per_tok"]]
        total = scores[token, chosen].sum() if config["norm_topk_prob"] else 1.0
        for expert in chosen:
            y = silu_mlp(x[token : token + 1], weights, f"{at}.experts.{expert}")[0]
            out[token] += scores[token, expert] / total * config["routed_scaling_factor"] * y
    return out


def written(folder: Path, **changes: Any) -> tuple[dict[str, Any], Weights]:
    config = tiny_config(n_group=1, topk_group=1, **changes)
    return config, write_checkpoint(folder, config, random_weights(config, seed=5), format="int4")


@pytest.mark.parametrize("normalize", [True, False])
def test_onnxruntime_alone_gives_what_the_layers_are(tmp_path: Path, normalize: bool) -> None:
    config, weights = written(tmp_path / "model", norm_topk_prob=normalize)
    out = tmp_path / "layers.onnx"
    assert main(["export", str(tmp_path / "model"), str(out), "--layers", "0-1"]) == 0
    assert out.stat().st_size < 20_000 < (tmp_path / "layers.onnx.data").stat().st_size
    generator = torch.Generator().manual_seed(6)
    feed = {f"layers.{n}.x": torch.randn(TOKENS, config["hidden_size"], generator=generator).numpy() for n in (0, 1)}
    found = run_bare(out, feed)
    for layer in (0, 1):
        expected = block(feed[f"layers.{layer}.x"].astype(np.float64), weights, config, layer)
        error = np.linalg.norm(found[f"layers.{layer}.y"] - expected) / np.linalg.norm(expected)
        assert error < 1e-5, layer


def test_weights_may_be_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes, handed over with the call, give the same but for the order of sums."""
    import onnx
    from onnx import numpy_helper

    config, _ = written(tmp_path / "model")
    stored, given = tmp_path / "stored.onnx", tmp_path / "given.onnx"
    for out, how in ((stored, "external"), (given, "inputs")):
        assert main(["export", str(tmp_path / "model"), str(out), "--layers", "1", "--weights", how, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts == {"file": str(given), "bytes": given.stat().st_size, "layers": [1]}
    assert not (tmp_path / "given.onnx.data").exists()
    x = torch.randn(TOKENS, config["hidden_size"], generator=torch.Generator().manual_seed(7)).numpy()
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(stored).graph.initializer}
    assert {"layers.1.fc1.codes", "layers.1.router.bias", "layers.1.shared_experts.down.values"} <= set(weights)
    expected = run_bare(stored, {"layers.1.x": x})["layers.1.y"]
    found = run_bare(given, {"layers.1.x": x, **weights})["layers.1.y"]
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_mistakes_are_one_line(tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "model")
    grouped = tiny_config(n_group=2, topk_group=1)
    write_checkpoint(tmp_path / "grouped", grouped, random_weights(grouped, seed=5), format="int4")
    (tmp_path / "there.onnx").write_bytes(b"")
    model, out = str(tmp_path / "model"), str(tmp_path / "out.onnx")
    capsys.readouterr()
    for arguments, message in (
        ((model, out), "--layers is needed"),
        ((model, out, "--layers", "1", "--type", "q8_0"), "--type has no effect on an ONNX file"),
        ((model, out, "--layers", "1", "--split-max-size", "1GB"), "--split-max-size has no effect on an ONNX file"),
        ((model, out, "--layers", "x"), "expected numbers as 1, 1,3 or 1-4"),
        ((model, out, "--layers", "9"), "9 is none of the"),
        ((model, str(tmp_path / "there.onnx"), "--layers", "1"), "exists already"),
        ((model, str(tmp_path / "no" / "out.onnx"), "--layers", "1"), "can't be written"),
        ((str(tmp_path / "grouped"), out, "--layers", "1"), "in 2 groups, which QMoE can't do"),
        ((str(demo), out, "--layers", "1"), "--experts int4_g32 makes a folder that can be exported"),
        ((model, str(tmp_path / "o.gguf"), "--type", "f32", "--layers", "1"), "--layers has no effect on a GGUF file"),
        ((model, str(tmp_path / "o.gguf")), "--type is needed for a GGUF file"),
    ):
        code, said = main(["export", *arguments]), capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1), said
        assert message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped", "model", "there.onnx"]


def test_weights_without_their_graph_are_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "model")

    def rename(path: Path, target: Path) -> Path:
        if target.suffix == ".onnx":
            raise OSError(28, "No space left on device")
        return real(path, target)

    real = Path.rename
    monkeypatch.setattr(Path, "rename", rename)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out.onnx"), "--layers", "1"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), str(tmp_path / "out.onnx"), "--layers", "1"]
    killed = subprocess.run([sys.executable, "-c", KILLED.format(arguments=arguments)], capture_output=True, text=True)
    left = {"out.onnx.partial", "out.onnx.data.partial"}
    assert (killed.returncode, {path.name for path in tmp_path.iterdir()}) == (-9, {"model", *left}), killed.stderr
    with onnx_export.locked_partial(tmp_path / "out.onnx"):
        capsys.readouterr()
        assert main(arguments) == 2
        assert "out.onnx.partial: another k2lite is writing it" in capsys.readouterr().err
    (tmp_path / "out.onnx.partial").write_bytes(b"half")
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("removed what a run that was cut off has left") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out.onnx", "out.onnx.data"}


def test_layers_are_read_as_said() -> None:
    assert parse_layers("3,1-2,2") == [1, 2, 3]
    for text in ("", "1-", "-2", "1..3", "5-4", "²", "0-99999999999"):
        with pytest.raises(RequestError, match="--layers"):
            parse_layers(text)
