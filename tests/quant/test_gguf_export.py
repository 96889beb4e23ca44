"""The file that `export` writes, read by the gguf package, against weights that were made without k2lite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from k2lite.gguf_metadata import kv_b_heads
from k2lite.gguf_model import export_metadata
from k2lite.model_folder import open_model
from k2lite.quant import conversion, gguf_export, gguf_split, gguf_writer
from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.gguf_export import EXPORT_TYPES, ExportProgress, export, plan_export
from k2lite.quant.gguf_file import read_gguf
from k2lite.quant.gguf_writer import GgufWriter
from tests.checkpoints import Weights
from tests.quant.quantizing import write_source

# the layers' names in GGUF, as llama.cpp's table has them
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 3)


def write(source: Path, path: Path, type_name: str, most_bytes: int | None = None) -> ExportProgress:
    config, checkpoint = open_model(source)
    checkpoint.raise_for_problems()
    plan = plan_export(checkpoint, type_name, kv_b_heads(config))
    parts = plan.parts(path, export_metadata(source, config, type_name)[0], most_bytes)
    return export(plan, parts, lambda _: None)


def expected(weights: Weights, heads: int, nope: int) -> Iterator[tuple[str, np.ndarray]]:
    """What llama.cpp's converter makes of a checkpoint's weights: its names, its stacks, its split of kv_b_proj."""
    stacks: dict[str, list[np.ndarray]] = {}
    for name, weight in weights.items():
        value = weight.float().numpy()
        if ".mlp.experts." in name:
            before, _, after = name.partition(".experts.")
            stacks.setdefault(f"{before}.experts.{after.split('.', 1)[1]}", []).append(value)
        elif "kv_b_proj" in name:
            by_head = value.reshape(heads, -1, value.shape[1])
            yield name.replace("kv_b_proj", "k_b_proj"), by_head[:, :nope].transpose(0, 2, 1)
            yield name.replace("kv_b_proj", "v_b_proj"), by_head[:, nope:]
        else:
            yield name, value
    for name, stack in stacks.items():
        yield name, np.stack(stack)


def gguf_name(name: str) -> str:
    # the converter cuts this name in two as well
    module, _, suffix = name.replace("correction_bias", "correction.bias").rpartition(".")
    found = NAMES.get_name(module)
    assert found is not None, name
    return f"{found}.{suffix}"


def read_by_package(path: Path) -> tuple[gguf.GGUFReader, dict[str, tuple[str, np.ndarray]]]:
    """Of each tensor its type and its values."""
    reader = gguf.GGUFReader(path)
    return reader, {
        tensor.name: (tensor.tensor_type.name.lower(), gguf.dequantize(np.array(tensor.data), tensor.tensor_type))
        for tensor in reader.tensors
    }


def rounded(value: np.ndarray, kind: str) -> np.ndarray:
    """Through the package's own quantizer and back."""
    package = gguf.GGMLQuantizationType[kind.upper()]
    return gguf.dequantize(gguf.quantize(np.ascontiguousarray(value, np.float32), package), package).reshape(
        value.shape
    )


def expected_type(name: str, value: np.ndarray, type_name: str) -> str:
    if value.ndim == 1 or "ffn_gate_inp" in name:
        return "f32"
    kind = "q8_0" if type_name == "q4_0" and "_exps" not in name else type_name
    return "bf16" if value.shape[-1] % 32 and kind.startswith("q") else kind


@pytest.mark.parametrize("type_name", EXPORT_TYPES)
def test_the_package_reads_the_values_that_the_source_has(tmp_path: Path, type_name: str) -> None:
    weights = write_source(tmp_path / "model", "fp8")
    write(tmp_path / "model", tmp_path / "out.gguf", type_name)
    _, found = read_by_package(tmp_path / "out.gguf")
    wanted = {gguf_name(name): value for name, value in expected(weights, heads=4, nope=16)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        kind, values = found[name]
        assert kind == expected_type(name, value, type_name), name
        assert np.array_equal(values.reshape(value.shape), rounded(value, kind)), name


def test_int4_experts_become_q4_0_and_q8_0_without_loss(tmp_path: Path) -> None:
    weights = write_source(tmp_path / "model", "int4")
    wanted = {gguf_name(name): value for name, value in expected(weights, heads=4, nope=16) if ".experts." in name}
    for type_name in ("q4_0", "q8_0"):
        progress = write(tmp_path / "model", tmp_path / f"{type_name}.gguf", type_name)
        _, found = read_by_package(tmp_path / f"{type_name}.gguf")
        assert (progress.scales.scales, progress.scales.changed) == (2 * 8 * 3 * 128 * 256 // 32, 0)
        for name, value in wanted.items():
            assert found[name][0] == type_name
            assert np.array_equal(found[name][1], value), name


def test_the_metadata_is_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64, "beta_fast": 1.0, "beta_slow": 1.0,
            "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    write_source(tmp_path / "model", "bf16", rope_scaling=yarn)
    write(tmp_path / "model", tmp_path / "out.gguf", "q8_0")
    reader, _ = read_by_package(tmp_path / "out.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items()}
    wanted: dict[str, Any] = {
        gguf.Keys.General.ARCHITECTURE: "deepseek2",
        gguf.Keys.General.FILE_TYPE: gguf.LlamaFileType.MOSTLY_Q8_0,
        gguf.Keys.LLM.BLOCK_COUNT: 3,
        gguf.Keys.LLM.LEADING_DENSE_BLOCK_COUNT: 1,
        gguf.Keys.LLM.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID,
        gguf.Keys.LLM.EXPERT_WEIGHTS_NORM: True,
        gguf.Keys.LLM.EXPERT_WEIGHTS_SCALE: pytest.approx(2.827),
        gguf.Keys.Attention.HEAD_COUNT: 4,
        gguf.Keys.Attention.HEAD_COUNT_KV: 1,
        gguf.Keys.Attention.KEY_LENGTH: 128 + 8,
        gguf.Keys.Attention.VALUE_LENGTH: 128,
        gguf.Keys.Attention.KEY_LENGTH_MLA: 16 + 8,
        gguf.Keys.Attention.VALUE_LENGTH_MLA: 32,
        gguf.Keys.Attention.LAYERNORM_RMS_EPS: pytest.approx(1e-6),
        gguf.Keys.Rope.DIMENSION_COUNT: 8,
        gguf.Keys.Rope.SCALING_TYPE: "yarn",
        gguf.Keys.Rope.SCALING_FACTOR: 32.0,
        gguf.Keys.Rope.SCALING_ORIG_CTX_LEN: 64,
        gguf.Keys.Rope.SCALING_YARN_LOG_MUL: pytest.approx(0.1),
        gguf.Keys.Rope.SCALING_YARN_BETA_FAST: 1.0,
    }
    for key, value in wanted.items():
        assert keys[key.format(arch="deepseek2")] == value, key


def test_a_number_too_large_for_f16_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_source(tmp_path / "model", "int4")
    name = "model.layers.2.mlp.experts.5.up_proj.weight_scale"
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][3, 1] = 1e5
            save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.5\.up_proj\..*99840.*F16 can't hold"):
        write(tmp_path / "model", tmp_path / "out.gguf", "q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_mistakes_and_a_full_disk_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "model", "bf16")
    with pytest.raises(RequestError, match="'q6_k' is unknown; known: q4_0, q8_0, bf16, f16, f32"):
        write(tmp_path / "model", tmp_path / "out.gguf", "q6_k")
    written = gguf_writer.os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) > 1000 and full.left < 0:  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")
        full.left -= len(data)  # type: ignore[attr-defined]
        return written(descriptor, data)

    full.left = 300_000  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setattr(gguf_writer.os, "write", full)
        with pytest.raises(CheckpointError, match=r"out.gguf.partial: can't be written: No space left on device"):
            write(tmp_path / "model", tmp_path / "out.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    write(tmp_path / "model", tmp_path / "out.gguf", "f32")
    with pytest.raises(RequestError, match="exists already"):
        write(tmp_path / "model", tmp_path / "out.gguf", "f32")


def test_parts_hold_together_what_one_file_holds(tmp_path: Path) -> None:
    """Read by the package part by part; a tensor that is larger than a part has its own."""
    write_source(tmp_path / "model", "int4")
    write(tmp_path / "model", tmp_path / "one.gguf", "q4_0")
    most = 100_000
    write(tmp_path / "model", tmp_path / "many.gguf", "q4_0", most)
    one, values = read_by_package(tmp_path / "one.gguf")
    paths = sorted(tmp_path.glob("many*"))
    names = [f"many-{number:05d}-of-{len(paths):05d}.gguf" for number in range(1, len(paths) + 1)]
    assert [path.name for path in paths] == names
    assert len(paths) > 3
    found: dict[str, tuple[str, np.ndarray]] = {}
    for number, path in enumerate(paths):
        reader, own = read_by_package(path)
        keys = {key: field.contents() for key, field in reader.fields.items() if key.startswith("split.")}
        assert keys == {"split.no": number, "split.count": len(paths), "split.tensors.count": len(values)}
        types = {key: field.types[0].name for key, field in reader.fields.items() if key.startswith("split.")}
        assert types == {"split.no": "UINT16", "split.count": "UINT16", "split.tensors.count": "INT32"}
        assert len(own) == 1 or sum(int(tensor.n_bytes) for tensor in reader.tensors) <= most
        if number == 0:
            assert one.fields.keys() - {"GGUF.kv_count"} <= reader.fields.keys()
        assert not found.keys() & own.keys()
        found |= own
    assert list(found) == list(values)
    for name, (kind, value) in values.items():
        assert found[name][0] == kind
        assert np.array_equal(found[name][1], value), name
    ours = read_gguf(paths[0])
    assert ours.files == tuple(paths)
    assert ours.tensors.keys() == values.keys()


def test_a_full_disk_in_a_late_part_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "model", "int4")
    append = gguf_split.GgufWriter.append

    def full(writer: GgufWriter, tensor: torch.Tensor) -> None:
        if "-00003-" in writer.path.name:
            raise CheckpointError("full")
        append(writer, tensor)

    monkeypatch.setattr(gguf_split.GgufWriter, "append", full)
    with pytest.raises(CheckpointError, match="full"):
        write(tmp_path / "model", tmp_path / "out.gguf", "q4_0", 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_more_parts_than_files_may_be_open_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(gguf_split.resource, "getrlimit", lambda _: (300, 1000))
    monkeypatch.setattr(gguf_split.resource, "setrlimit", lambda _, limits: asked.append(limits))
    parts = [(tmp_path / f"{number}.gguf", {}, []) for number in range(700)]
    gguf_split.demand_places(parts[:40])
    assert asked == []
    gguf_split.demand_places(parts[:400])
    assert asked == [(400 + gguf_split.OTHER_FILES, 1000)]
    assert (tmp_path / "1.gguf").exists() is False
    with pytest.raises(RequestError, match=r"800 parts are more files .* \(1000\): raise --split-max-size"):
        gguf_split.demand_places([*parts, *((tmp_path / f"x{number}", {}, []) for number in range(100))])


def test_what_a_killed_run_left_is_removed_unless_it_is_being_written(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("out-2.gguf.partial", "other.gguf.partial", "out.gguf")]
    left = [tmp_path / name for name in ("out.gguf.partial", "out-00001-of-00004.gguf.partial")]
    for path in (*kept, *left):
        path.write_bytes(b"x")
    assert gguf_split.remove_leftovers(tmp_path / "out.gguf") == [f"{path.name}, 0.0 GB" for path in sorted(left)]
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    writer = GgufWriter(tmp_path / "new.gguf", {}, [])
    with pytest.raises(RequestError, match=r"new.gguf.partial: another k2lite is writing it"):
        gguf_split.remove_leftovers(tmp_path / "new.gguf")
    writer.close()
    assert not (tmp_path / "new.gguf.partial").exists()


def test_no_more_than_a_few_blocks_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are read one by one, and their rows in blocks: the largest read says so."""
    write_source(tmp_path / "model", "f32")
    sizes = []
    read = conversion.read_direct

    def counted(path: Path, offset: int, nbytes: int, what: str) -> torch.Tensor:
        sizes.append(nbytes)
        return read(path, offset, nbytes, what)

    monkeypatch.setattr(conversion, "read_direct", counted)
    monkeypatch.setattr(gguf_export, "BLOCK_WEIGHTS", 1 << 10)
    write(tmp_path / "model", tmp_path / "out.gguf", "q4_0")
    # 128 rows of the widest matrix (384 columns); kv_b_proj, read whole, is [192, 128]
    assert max(sizes) == 128 * 384 * 4
    assert len(read_gguf(tmp_path / "out.gguf").tensors) > 40


def test_an_empty_list_is_one_of_strings_to_the_package(tmp_path: Path) -> None:
    """The merges of a byte tokenizer."""
    writer = GgufWriter(tmp_path / "a.gguf", {"tokenizer.ggml.merges": []}, [])
    writer.complete()
    writer.publish()
    writer.close()
    types = gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.ggml.merges"].types
    assert types[0] == gguf.GGUFValueType.ARRAY
