"""The head of a GGUF file: written by the gguf package, read by us, and damaged in every way that a download can be."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from k2lite.quant.errors import CheckpointError
from k2lite.quant.gguf_file import read_gguf
from tests.samples import examples


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "deepseek2")
    writer.add_block_count(3)
    writer.add_rope_freq_base(50000.0)
    writer.add_expert_weights_norm(True)
    writer.add_array("words", ["one", "zwei", "三", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_tensor("a", np.arange(12, dtype=np.float32).reshape(3, 4))
    blocks = gguf.quantize(np.ones((2, 5, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("b.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_package_s_file_is_read(file: Path) -> None:
    model = read_gguf(file)
    assert model.metadata["general.architecture"] == "deepseek2"
    assert model.metadata["deepseek2.block_count"] == 3
    assert model.metadata["deepseek2.rope.freq_base"] == 50000.0
    assert model.metadata["deepseek2.expert_weights_norm"] is True
    assert model.metadata["words"] == ["one", "zwei", "三", ""]
    assert model.metadata["numbers"].tolist() == [1, -2, 3]
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert model.tensors.keys() == reader.keys()
    for name, tensor in model.tensors.items():
        assert (tensor.offset, tensor.nbytes) == (reader[name].data_offset, reader[name].n_bytes)
        assert tensor.shape == tuple(reader[name].shape[::-1].tolist())
    assert model.tensors["b.weight"].type.name == "q8_0"


def test_a_cut_or_changed_file_is_an_error_or_a_file(file: Path) -> None:
    whole = file.read_bytes()
    generator, messages = random.Random(5), []
    end = max(tensor.offset + tensor.nbytes for tensor in read_gguf(file).tensors.values())
    for length in range(0, end, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="model.gguf: "):
            read_gguf(file)
    for _ in range(examples(300)):
        damaged = bytearray(whole)
        for _ in range(generator.choice((1, 1, 3))):
            damaged[generator.randrange(420)] = generator.choice((0, 1, 255, generator.randrange(256)))
        file.write_bytes(damaged)
        try:
            model = read_gguf(file)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert all(tensor.offset + tensor.nbytes <= len(whole) for tensor in model.tensors.values())
    assert len(messages) > 100
    assert all(message.startswith(str(file)) and len(message) < 2000 for message in messages)


def head(n_tensors: int, n_keys: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ALIGNMENT = text("general.alignment")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML", r"the magic b'GGML', expected b'GGUF'; name a GGUF file"),
        (b"GGUF\0\0\0\3" + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (head(0, 1 << 40, b""), "1099511627776 keys"),
        (head(0, 1, text("k") + struct.pack("<IIQ", 9, 8, 1 << 50)), "key k: an array of 1125899906842624, expected"),
        (head(0, 1, text("k") + struct.pack("<IIQ", 9, 6, 1 << 20)), "the file's end after 0 bytes of k"),
        (head(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1)), "an array of value type 9"),
        (head(0, 1, text("k") + struct.pack("<I", 77)), "key k of value type 77"),
        (head(0, 1, text("k") + struct.pack("<IQ", 8, 1 << 40)), "a text of 1099511627776 bytes in k"),
        (head(0, 2, 2 * (text("k") + struct.pack("<II", 4, 1))), "key k twice"),
        (head(0, 1, ALIGNMENT + struct.pack("<II", 4, 3)), "general.alignment 3"),
        (head(1, 0, tensor("t", [32], 99, 0) + bytes(64)), "tensor t of ggml type 99"),
        (head(1, 0, tensor("t", [4, 1 << 59], 0, 0) + bytes(64)), "tensor t of shape"),
        (head(1, 0, tensor("t", [0], 0, 0) + bytes(64)), "tensor t of shape"),
        (head(1, 0, tensor("t", [1, 1, 1, 1, 1], 0, 0) + bytes(64)), "tensor t with 5 dimensions"),
        (head(1, 0, tensor("t", [48], 2, 0) + bytes(64)), "tensor t: q4_0 in rows of 48, expected multiples of 32"),
        (head(1, 0, tensor("t", [32], 0, 8) + bytes(640)), "a multiple of 32 inside the file"),
        (head(1, 0, tensor("t", [32], 0, 1 << 62) + bytes(640)), "a multiple of 32 inside the file"),
        (head(2, 0, 2 * tensor("t", [1], 0, 0) + bytes(640)), "tensor t twice"),
        (head(2, 0, tensor("t", [32], 0, 0) + tensor("u", [1], 0, 32) + bytes(640)), "tensor u at byte .*another"),
        (head(1, 0, tensor("t\n", [32], 0, 0) + bytes(640)), r"the name 't\\n'"),
    ],
)  # fmt: skip
def test_what_can_t_be_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def split(folder: Path, count: int = 3) -> list[Path]:
    """A file of three parts as llama.cpp cuts them, all metadata in the first."""
    paths = [folder / f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "deepseek2")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        if number == 0:
            writer.add_block_count(7)
        writer.add_tensor(f"t{number}", np.full(8, number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_parts_are_joined(tmp_path: Path) -> None:
    paths = split(tmp_path)
    model = read_gguf(paths[0])
    assert model.files == tuple(paths)
    assert model.metadata["deepseek2.block_count"] == 7
    assert {name: tensor.file for name, tensor in model.tensors.items()} == {f"t{i}": paths[i] for i in range(3)}


def test_parts_that_don_t_fit_are_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    with pytest.raises(CheckpointError, match=r"part 2 of 3, expected the first; name m-00001-of-00003.gguf"):
        read_gguf(paths[1])
    third = paths[2].read_bytes()
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf: part is missing"):
        read_gguf(paths[0])
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(CheckpointError, match="split.no 1 of 3, expected 2 of 3"):
        read_gguf(paths[0])
    paths[2].write_bytes(third)
    renamed = tmp_path / "other.gguf"
    paths[0].rename(renamed)
    with pytest.raises(CheckpointError, match="expected a name ending in -00001-of-00003.gguf; rename it"):
        read_gguf(renamed)
