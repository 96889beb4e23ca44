"""The header parser against the safetensors package, and against files made to harm."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from k2lite.quant.errors import CheckpointError
from k2lite.quant.safetensors_file import TensorRecord, read_header
from tests.quant.headers import header_bytes
from tests.samples import examples

# What the safetensors package raises for a file that it does not like: its own error, or one of Python's.
PACKAGE_ERRORS = (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError, AttributeError)


TORCH_NAMES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool "
    "float8_e4m3fnuz float8_e5m2fnuz complex64"
)


def sample() -> dict[str, torch.Tensor]:
    """One tensor of every dtype, a scalar, and empty ones."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [getattr(torch, name) for name in TORCH_NAMES.split()]
    bytes_of = {dtype: torch.randint(0, 2, (3, 8 * dtype.itemsize), generator=generator) for dtype in dtypes}
    tensors = {f"t.{dtype}": data.to(torch.uint8).view(dtype) for dtype, data in bytes_of.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "é·名": torch.arange(3)}


def value_of(path: Path, record: TensorRecord) -> torch.Tensor:
    with path.open("rb") as file:
        file.seek(record.offset)
        data = bytearray(file.read(record.nbytes))
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(record.dtype).view(record.shape) if data else torch.empty(record.shape, dtype=record.dtype)


def assert_reads_as_the_package(path: Path) -> None:
    ours = read_header(path)
    with safe_open(path, framework="pt") as theirs:
        assert set(ours) == set(theirs.keys())
        for name, record in ours.items():
            expected = theirs.get_tensor(name)
            assert (record.name, record.dtype, record.shape) == (name, expected.dtype, tuple(expected.shape))
            assert record.nbytes == expected.nbytes
            if record.nbytes:
                raw = value_of(path, record).reshape(-1).view(torch.uint8)
                assert torch.equal(raw, expected.contiguous().reshape(-1).view(torch.uint8))


def test_every_dtype_reads_as_the_package_reads_it(tmp_path: Path) -> None:
    save_file(sample(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_reads_as_the_package(tmp_path / "a.safetensors")


def test_a_scale_of_exponents_is_a_dtype_too(tmp_path: Path) -> None:
    """The package's binding to torch has no F8_E8M0, its format has."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(header_bytes({"s": {"dtype": "F8_E8M0", "shape": [2, 3], "data_offsets": [0, 6]}}) + b"\x7f" * 6)
    record = read_header(path)["s"]
    assert (record.dtype, record.shape, record.nbytes) == (torch.float8_e8m0fnu, (2, 3), 6)
    assert value_of(path, record).float().eq(1.0).all()


@pytest.mark.parametrize("metadata", [None, {"a": "b"}])
def test_a_file_without_tensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({}, tmp_path / "a.safetensors", metadata=metadata)
    assert read_header(tmp_path / "a.safetensors") == {}


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    save_file({"z": torch.ones(4), "a": torch.ones(4), "m": torch.ones(4)}, tmp_path / "a.safetensors")
    offsets = [record.offset for record in read_header(tmp_path / "a.safetensors").values()]
    assert offsets == sorted(offsets)


Header = dict[str, Any]


def two_tensors() -> Header:
    """Bytes 0 to 16 and 16 to 32."""
    return {
        "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b.weight": {"dtype": "BF16", "shape": [8], "data_offsets": [16, 32]},
    }


def changed(name: str, **fields: Any) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[name] |= fields

    return change


def replaced(name: str, value: Any) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[name] = value

    return change


def without(name: str, field: str) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        del header[name][field]

    return change


EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
HOSTILE: list[tuple[str, Callable[[Header], None], str]] = [
    ("overlap", changed("b.weight", data_offsets=[8, 24]), "b.weight at byte .* overlaps"),
    ("same bytes twice", changed("b.weight", data_offsets=[0, 16]), "overlaps"),
    ("hole", changed("a.weight", shape=[1, 2], data_offsets=[0, 8]), "b.weight at byte .* hole"),
    ("hole at the start", changed("a.weight", shape=[1, 2], data_offsets=[8, 16]), "a.weight at byte .* hole"),
    ("rest", changed("b.weight", shape=[4], data_offsets=[16, 24]), "8 bytes after the last tensor"),
    (
        "beyond the end",
        changed("b.weight", shape=[16], data_offsets=[16, 48]),
        "b.weight with bytes up to .* in a file",
    ),
    ("far beyond", changed("b.weight", shape=[1 << 61], data_offsets=[16, (1 << 62) + 16]), "b.weight with bytes up"),
    ("reversed", changed("a.weight", data_offsets=[16, 0]), "a.weight with data_offsets"),
    ("negative offset", changed("a.weight", data_offsets=[-16, 0]), "a.weight with data_offsets"),
    ("one offset", changed("a.weight", data_offsets=[16]), "a.weight with data_offsets"),
    ("three offsets", changed("a.weight", data_offsets=[0, 16, 32]), "a.weight with data_offsets"),
    ("offsets of floats", changed("a.weight", data_offsets=[0.0, 16.0]), "a.weight with data_offsets"),
    ("offsets of bools", changed("a.weight", data_offsets=[False, 16]), "a.weight with data_offsets"),
    ("offsets of strings", changed("a.weight", data_offsets=["0", "16"]), "a.weight with data_offsets"),
    ("offsets an object", changed("a.weight", data_offsets={"0": 16}), "a.weight with data_offsets"),
    ("offsets of 2^64", changed("a.weight", data_offsets=[1 << 64, (1 << 64) + 16]), "a.weight with data_offsets"),
    ("wrong byte count", changed("a.weight", shape=[2, 3]), r"16 bytes for F32 \[2, 3\], expected 24 bytes"),
    ("more bytes than sizes", changed("a.weight", shape=[3]), r"16 bytes for F32 \[3\], expected 12 bytes"),
    ("wrong dtype size", changed("a.weight", dtype="F64"), "16 bytes for F64 .* expected 32 bytes"),
    ("unknown dtype", changed("a.weight", dtype="F4"), "a.weight with dtype 'F4', expected one of F64, F32"),
    ("dtype in small letters", changed("a.weight", dtype="f32"), "dtype 'f32'"),
    ("dtype a number", changed("a.weight", dtype=7), "dtype 7"),
    ("dtype a list", changed("a.weight", dtype=["F32"]), "dtype"),
    ("dtype null", changed("a.weight", dtype=None), "dtype None"),
    ("negative sizes", changed("a.weight", shape=[-2, -2]), r"a.weight with shape \[-2, -2\]"),
    ("sizes of bools", changed("a.weight", shape=[True, 4]), "a.weight with shape"),
    ("sizes of floats", changed("a.weight", shape=[2.0, 2.0]), "a.weight with shape"),
    ("shape a number", changed("a.weight", shape=4), "a.weight with shape 4"),
    ("shape a string", changed("a.weight", shape="22"), "a.weight with shape"),
    ("a size of 2^64", changed("a.weight", shape=[1 << 64]), "a.weight with shape"),
    ("a product of 2^64 + 4", changed("a.weight", shape=[(1 << 62) + 1, 4]), "16 bytes for F32"),
    ("a product of 4000 bits", changed("a.weight", shape=[(1 << 63) - 1] * 64), "16 bytes for F32"),
    ("a million sizes", changed("a.weight", shape=[1] * 1_000_000), "a.weight with shape"),
    (
        "sizes that overflow before a zero",
        changed("a.weight", shape=[1 << 62, 1 << 62, 0], data_offsets=[0, 0]),
        "64 b",
    ),
    ("no shape", without("a.weight", "shape"), "a.weight with the entry"),
    ("no offsets", without("a.weight", "data_offsets"), "a.weight with the entry"),
    ("one field more", changed("a.weight", strides=[2, 1]), "a.weight with the entry"),
    ("entry null", replaced("a.weight", None), "a.weight with the entry None"),
    ("entry a list", replaced("a.weight", [0, 16]), "a.weight with the entry"),
    ("metadata a list", replaced("__metadata__", ["a"]), "__metadata__"),
    ("metadata null", replaced("__metadata__", None), "__metadata__"),
    ("metadata of numbers", replaced("__metadata__", {"step": 3}), "__metadata__"),
    ("metadata nested", replaced("__metadata__", {"a": {"b": "c"}}), "__metadata__"),
    ("name with a terminal escape", replaced("\x1b[2J", EMPTY), "printable"),
    ("name with a line break", replaced("a\nb", EMPTY), "printable"),
    ("name with half a surrogate pair", replaced("\ud800", EMPTY), "printable"),
    ("name of 100 kB", replaced("n" * 100_000, EMPTY), "at most 1000"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_entries(tmp_path: Path, change: Callable[[Header], None], message: str) -> None:
    header = two_tensors()
    change(header)
    path = tmp_path / "h.safetensors"
    path.write_bytes(header_bytes(header) + bytes(32))
    assert_refused(path, message)


def assert_refused(path: Path, message: str) -> None:
    """CheckpointError that names the file, in few words that can be printed anywhere."""
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert len(text) < 1500 + len(str(path))
    assert text.isprintable()


def test_the_unchanged_header_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(header_bytes(two_tensors()) + bytes(32))
    assert_reads_as_the_package(path)


def raw(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


BROKEN: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "a file of 0 bytes, expected at least 8"),
    ("seven bytes", b"\0" * 7, "a file of 7 bytes"),
    ("header longer than the file", struct.pack("<Q", 100) + b"{}", "header of 100 bytes in a file of 10"),
    ("header of 2^64 - 1 bytes", struct.pack("<Q", (1 << 64) - 1) + b"{}", "at most 100000000"),
    (
        "header of 100 MB and one",
        struct.pack("<Q", 100_000_001) + b"{}",
        "header of 100000001 bytes.*at most 100000000",
    ),
    ("no header", raw(b""), "not JSON"),
    ("not UTF-8", raw(b'{"\xff": 1}'), "not JSON"),
    ("UTF-16", raw('{"a": 1}'.encode("utf-16")), "not JSON"),
    ("not JSON", raw(b"{nonsense}"), "not JSON"),
    ("half of it", raw(b'{"a": {"dtype": "F32"'), "not JSON"),
    ("a list", raw(b"[1, 2]"), "JSON list"),
    ("a number", raw(b"1"), "JSON int"),
    ("two objects", raw(b"{}{}"), "not JSON"),
    ("an integer of 5000 digits", raw(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    ("lists in lists", raw(b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "nested too deeply"),
    ("objects in objects", raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "nested too deeply"),
    ("NaN", raw(b'{"a": NaN}'), "with the entry nan"),
    ("zeros", b"\0" * 64, "not JSON"),
    ("a pickle", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 64, "header of"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(content)
    assert_refused(path, message)


@pytest.mark.parametrize("depth", [5, 50, 300, 600, 850, *range(930, 1000, 3)])
def test_no_depth_of_nesting_gets_through(tmp_path: Path, depth: int) -> None:
    """Just below the parser's own limit, what shows the value must not run into it either."""
    path = tmp_path / "h.safetensors"
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        path.write_bytes(raw(b'{"a": {"dtype": "F32", "shape": ' + opening * depth + b"1" + closing * depth + b"}}"))
        assert_refused(path, "with the entry|nested too deeply")
        path.write_bytes(raw(b'{"a": ' + opening * depth + b"1" + closing * depth + b"}"))
        assert_refused(path, "with the entry|nested too deeply")


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b'{"a": {"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}',
        b'{"__metadata__": {"x": "1", "x": "2"}, "a": {"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    ],
)
def test_names_that_occur_twice(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(raw(text) + b"\0\0")
    assert_refused(path, "found the name '.*' twice")


def test_a_late_duplicate_among_very_many_names_is_found_in_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(raw(b"{" + b",".join(b'"%d":0' % n for n in range(200_000)) + b',"199999":0}'))
    assert_refused(path, "'199999' twice")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.safetensors", "No such file")
    assert_refused(tmp_path, "directory")


def test_nothing_is_allocated_for_numbers_that_were_not_checked(tmp_path: Path) -> None:
    """The sizes claimed here are exabytes."""
    path = tmp_path / "h.safetensors"
    tracemalloc.start()
    try:
        for header, length in (
            ({"a": {"dtype": "F64", "shape": [1 << 57], "data_offsets": [0, 1 << 60]}}, None),
            ({"a": {"dtype": "F64", "shape": [1 << 30, 0], "data_offsets": [0, 0]}}, None),
            ({}, 99_999_999),
            ({}, 1 << 60),
        ):
            content = header_bytes(header)
            path.write_bytes(content if length is None else struct.pack("<Q", length) + content[8:])
            try:
                read_header(path)
            except CheckpointError:
                continue
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


VALID = save(sample(), metadata={"format": "pt"})
HEADER_END = 8 + struct.unpack("<Q", VALID[:8])[0]
FRAGMENTS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"9", b"-", b".", b"e", b"\\u0000", b"null", b"true", b" ")
INTERESTING = (-1, 0, 1, 2, 7, 8, 24, 2**31, 2**63 - 1, 2**63, 2**64, True, None, 1.5, "1", [], {}, "F32", "BF16", "X")


def with_bytes_changed(random: random.Random) -> bytes:
    data = bytearray(VALID)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(HEADER_END if random.random() < 0.8 else len(data))
        match random.randrange(4):
            case 0:
                data[at] = random.randrange(256)
            case 1:
                data[at : at + random.randint(1, 8)] = b""
            case 2:
                data[at:at] = random.choice(FRAGMENTS)
            case _:
                data[at : at + 1] = random.choice(FRAGMENTS)
    if random.random() < 0.5:  # keep the length right, so that more than the length is tested
        end = max(bytes(data).rfind(b"}"), 8) + 1
        data[:8] = struct.pack("<Q", end - 8)
    return bytes(data[: random.randrange(len(data))]) if random.random() < 0.1 else bytes(data)


def with_header_changed(random: random.Random) -> bytes:
    header = json.loads(VALID[8:HEADER_END])
    for _ in range(random.randint(1, 3)):
        name = random.choice(list(header))
        entry = header[name]
        match random.randrange(5):
            case 0:
                header[random.choice(["new", "__metadata__", "", name + " "])] = entry
            case 1:
                header[name] = random.choice(INTERESTING)
            case 2 if isinstance(entry, dict) and entry:
                entry[random.choice(list(entry))] = random.choice(INTERESTING)
            case 3 if isinstance(entry, dict) and entry:
                value = entry[random.choice(list(entry))]
                if isinstance(value, list) and value:
                    value[random.randrange(len(value))] = random.choice(INTERESTING)
            case _:
                del header[name]
                if not header:
                    break
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + VALID[HEADER_END:]


@given(random=st.randoms(use_true_random=False), kind=st.sampled_from([with_bytes_changed, with_header_changed]))
@settings(max_examples=examples(600), deadline=None)
def test_a_changed_file_is_refused_or_reads_as_the_package_reads_it(
    tmp_path_factory: pytest.TempPathFactory, random: random.Random, kind: Callable[[random.Random], bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(kind(random))
    assert_refused_or_as_the_package(path)


def assert_refused_or_as_the_package(path: Path) -> None:
    try:
        read_header(path)
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert refusal.isprintable()
    if not refusal:
        assert_reads_as_the_package(path)


@given(content=st.binary(max_size=200))
@settings(max_examples=examples(100), deadline=None)
def test_random_bytes_are_refused_or_read_as_the_package_reads_them(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content)
    assert_refused_or_as_the_package(path)


def test_what_is_refused_here_and_not_by_the_package_is_refused_on_purpose(tmp_path: Path) -> None:
    """Stricter than the package: names twice, names that can't be printed, unknown fields."""
    path = tmp_path / "h.safetensors"
    accepted = []
    for name, change, _ in HOSTILE:
        header = two_tensors()
        change(header)
        path.write_bytes(header_bytes(header) + bytes(32))
        try:
            with safe_open(path, framework="pt") as file:
                [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (not a dict)
        except PACKAGE_ERRORS:
            continue
        accepted.append(name)
    printable = {"name with a terminal escape", "name with a line break", "name of 100 kB"}
    assert set(accepted) == {"one field more", "metadata null"} | printable
