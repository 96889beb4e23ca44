"""The comparison with llama.cpp, but for llama.cpp: the values of a GGUF file, its rounding, and the report."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import k2lite
from k2lite.gguf_model import open_gguf
from k2lite.quant.gguf_file import read_gguf
from tests.quant.quantizing import write_source
from tests.quant.test_gguf_export import write
from tools.compare_llama_cpp import Compared, open_engine, report, write_float32
from tools.llama_cpp.arithmetic import INPUTS, LlamaArithmetic, MatrixNames

IDS = [3, 150, 7, 7, 21, 90]


def rounded_logits(folder: Path, file: Path, cache: str) -> torch.Tensor:
    names = MatrixNames()
    types = {name: tensor.type.name for name, tensor in read_gguf(file).tensors.items()}
    return open_engine(folder, LlamaArithmetic(types, names, cache=cache), names).logits(IDS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "model"
    write_source(folder, "bf16", num_hidden_layers=2, max_position_embeddings=1024)
    return folder


def test_float32_is_not_rounded_and_a_file_gives_its_own_values(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "m.gguf", "f32")
    write_float32(open_gguf(tmp_path / "m.gguf"), tmp_path / "float32")
    exact = k2lite.load(source, backend="reference").logits(IDS)
    assert torch.equal(k2lite.load(tmp_path / "float32", backend="reference").logits(IDS), exact)
    assert torch.equal(rounded_logits(tmp_path / "float32", tmp_path / "m.gguf", "f32"), exact)


@pytest.mark.parametrize(("kind", "cache", "least", "most"), [("f16", "f32", 1e-5, 1e-3), ("f32", "f16", 1e-5, 1e-3),
                                                              ("q8_0", "f32", 1e-3, 0.2)])  # fmt: skip
def test_rounding_costs_what_its_type_holds(
    source: Path, tmp_path: Path, kind: str, cache: str, least: float, most: float
) -> None:
    write(source, tmp_path / "m.gguf", kind)
    write_float32(open_gguf(tmp_path / "m.gguf"), tmp_path / "float32")
    exact = k2lite.load(tmp_path / "float32", backend="reference").logits(IDS)
    found = rounded_logits(tmp_path / "float32", tmp_path / "m.gguf", cache)
    assert least < float((found - exact).norm() / exact.norm()) < most


def test_inputs_in_q8_0_are_those_of_the_package() -> None:
    x = torch.randn(3, 4, 64)
    kind = gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(INPUTS["q4_0"](x).numpy(), gguf.dequantize(gguf.quantize(x.numpy(), kind), kind))


def test_the_first_difference_is_told_with_its_gaps() -> None:
    peer = np.zeros((3, 4), np.float32)
    peer[:, 2] = 1.0
    exact = peer.copy()
    exact[1] = [0, 1.5, 1, 0]
    same = Compared("same", peer.argmax(-1), peer, peer, peer)
    other = Compared("other", peer.argmax(-1), peer, exact, peer)
    first, _, difference = report("m.gguf", "f32", [same, other])
    assert "the same greedy tokens on 1 against exact float32, on 2 with llama.cpp's rounding" in first
    assert "'other': token 2, 1 or 2: gap +0.5000 in exact float32, -1.0000 in llama.cpp, -1.0000" in difference
    assert "error of a logit at this step 0.7500" in difference
