"""Where an expert lies: few reads, views without copies, and the right bytes wherever its parts were put."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.errors import CheckpointError
from k2lite.quant.expert_layout import MAX_GAP_BYTES, expert_weights, read_extents
from k2lite.quant.quantization_config import parse_quantization_config
from k2lite.quant.schema import CheckpointSchema, IgnoredTensor
from k2lite.quant.types import PROJECTIONS, ExpertKey, ExpertLayout
from tests.checkpoints import INT4_CONFIG
from tests.quant.headers import Entry, header_bytes, layout as header_of, write_sparse_folder
from tests.samples import examples

HIDDEN, WIDTH = 64, 32
SHAPES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
KEY = ExpertKey(0, 0)
SCHEMA = CheckpointSchema("", {}, (0,), 1, HIDDEN, WIDTH, (IgnoredTensor(r"filler.*", "filler"),))


def parts_of_the_expert() -> dict[str, tuple[str, torch.Tensor]]:
    """The nine stored tensors, by name, with their dtypes' names."""
    generator = torch.Generator().manual_seed(5)
    parts: dict[str, tuple[str, torch.Tensor]] = {}
    for projection, (rows, columns) in SHAPES.items():
        at = f"model.layers.0.mlp.experts.0.{projection}"
        words = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int32)
        scales = torch.rand(rows, columns // 32, generator=generator).to(torch.bfloat16)
        parts[f"{at}.weight_packed"] = ("I32", words)
        parts[f"{at}.weight_scale"] = ("BF16", scales)
        parts[f"{at}.weight_shape"] = ("I32", torch.tensor([rows, columns], dtype=torch.int32))
    return parts


PARTS = parts_of_the_expert()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(folder: Path, files: list[list[tuple[str, int]]], *, lead: int = 0) -> ExpertLayout:
    """Write the parts in the order given, each followed by filler bytes, one list a file; return the layout.
    `lead` bytes of padding in the header move everything off its alignment."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, Entry]] = {}
    contents: dict[str, bytes] = {}
    for number, items in enumerate(files):
        tensors: dict[str, Entry] = {}
        content = b""
        for name, filler in items:
            dtype, tensor = PARTS[name]
            tensors[name] = dtype, tuple(tensor.shape)
            content += raw(tensor)
            if filler:
                tensors[f"filler.{number}.{name}"] = "U8", (filler,)
                content += b"\xee" * filler
        shards[f"{number}.safetensors"], contents[f"{number}.safetensors"] = tensors, content
    write_sparse_folder(folder, shards)
    for file, tensors in shards.items():
        head = header_bytes(header_of(tensors)[0])
        head = (len(head) - 8 + lead).to_bytes(8, "little") + head[8:] + b" " * lead
        (folder / file).write_bytes(head + contents[file])
    checkpoint = Checkpoint.open(folder, SCHEMA, parse_quantization_config(INT4_CONFIG, folder))
    assert checkpoint.problems == ()
    return checkpoint.expert(KEY)


def assert_reads_right(layout: ExpertLayout) -> None:
    for projection, tensor in zip(PROJECTIONS, expert_weights(layout, read_extents(layout)), strict=True):
        assert tensor.shape == SHAPES[projection]
        assert tensor.format.name == "int4_g32"
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            expected = PARTS[f"model.layers.0.mlp.experts.0.{projection}.{suffix}"][1]
            assert tensor.parts[suffix].dtype == expected.dtype
            assert torch.equal(tensor.parts[suffix], expected), (projection, suffix)


def names(kind: str = "") -> list[str]:
    return [name for name in PARTS if name.endswith(kind)]


EXPERT_BYTES = sum(tensor.nbytes for _, tensor in PARTS.values())


def test_an_expert_in_one_run_is_one_extent_of_its_own_bytes(tmp_path: Path) -> None:
    layout = write(tmp_path, [[(name, 0) for name in PARTS]])
    assert len(layout.extents) == 1
    assert layout.nbytes == EXPERT_BYTES
    assert_reads_right(layout)


def test_packed_weights_and_scales_apart_are_two_extents(tmp_path: Path) -> None:
    order = [(name, 0) for name in names("packed")]
    order[-1] = (order[-1][0], MAX_GAP_BYTES + 1)
    layout = write(tmp_path, [order + [(name, 0) for name in names("scale") + names("shape")]])
    assert len(layout.extents) == 2
    assert layout.nbytes == EXPERT_BYTES
    assert_reads_right(layout)


def test_a_gap_is_read_along_up_to_the_limit(tmp_path: Path) -> None:
    for gap, extents, read in ((MAX_GAP_BYTES, 1, EXPERT_BYTES + MAX_GAP_BYTES), (MAX_GAP_BYTES + 1, 2, EXPERT_BYTES)):
        order = [(name, gap if number == 3 else 0) for number, name in enumerate(PARTS)]
        layout = write(tmp_path / str(gap), [order])
        assert (len(layout.extents), layout.nbytes) == (extents, read)
        assert_reads_right(layout)


def test_what_follows_the_expert_is_not_read(tmp_path: Path) -> None:
    layout = write(tmp_path, [[(name, 100 if name == list(PARTS)[-1] else 0) for name in PARTS]])
    assert layout.nbytes == EXPERT_BYTES


def test_an_expert_in_two_files(tmp_path: Path) -> None:
    layout = write(
        tmp_path, [[(name, 0) for name in names("scale")], [(n, 0) for n in names("packed") + names("shape")]]
    )
    assert [extent.file.name for extent in layout.extents] == ["0.safetensors", "1.safetensors"]
    assert layout.nbytes == EXPERT_BYTES
    assert_reads_right(layout)


@given(random=st.randoms(use_true_random=False))
@settings(max_examples=examples(60), deadline=None)
def test_any_placement(random: random.Random) -> None:
    """Any order, any gaps, any alignment, up to three files: few sorted disjoint extents, and the right bytes."""
    order = list(PARTS)
    random.shuffle(order)
    gaps = (0, 0, 1, 2, 7, 300, MAX_GAP_BYTES, MAX_GAP_BYTES + 1, 3 * MAX_GAP_BYTES)
    files: list[list[tuple[str, int]]] = [[] for _ in range(random.randint(1, 3))]
    for name in order:
        random.choice(files).append((name, random.choice(gaps)))
    with tempfile.TemporaryDirectory() as folder:
        layout = write(Path(folder), [items for items in files if items], lead=random.randrange(8))
        places = [(extent.file, extent.offset, extent.offset + extent.nbytes) for extent in layout.extents]
        assert places == sorted(places)
        for (file, _, end), (next_file, begin, _) in itertools.pairwise(places):
            assert file != next_file or begin - end > MAX_GAP_BYTES
        covered = dict.fromkeys(range(len(places)), 0)
        for view in layout.parts.values():
            size = view.dtype.itemsize * torch.Size(view.shape).numel()
            assert view.offset >= 0
            assert view.offset + size <= layout.extents[view.extent].nbytes
            covered[view.extent] += size
        # an extent holds parts and gaps between them, nothing before the first or after the last
        for number, extent in enumerate(layout.extents):
            ends = [
                (v.offset, v.offset + v.dtype.itemsize * torch.Size(v.shape).numel())
                for v in layout.parts.values()
                if v.extent == number
            ]
            assert (min(b for b, _ in ends), max(e for _, e in ends)) == (0, extent.nbytes)
            assert extent.nbytes - covered[number] <= MAX_GAP_BYTES * (len(ends) - 1)
        assert_reads_right(layout)


def test_aligned_parts_are_views_and_others_are_copies(tmp_path: Path) -> None:
    """Within a buffer, a part at a multiple of its item size is not copied."""
    at = "model.layers.0.mlp.experts.0."
    gaps = {f"{at}gate_proj.weight_packed": 2, f"{at}up_proj.weight_packed": 2}
    layout = write(tmp_path, [[(name, gaps.get(name, 0)) for name in PARTS]])
    (buffer,) = read_extents(layout)
    weights = expert_weights(layout, [buffer])
    begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    for projection, tensor in zip(PROJECTIONS, weights, strict=True):
        for suffix, part in tensor.parts.items():
            view = layout.parts[projection, suffix]
            aligned = view.offset % view.dtype.itemsize == 0
            assert (begin <= part.data_ptr() < end) is aligned, (projection, suffix)
    assert any(view.offset % view.dtype.itemsize for view in layout.parts.values())
    assert_reads_right(layout)


@pytest.mark.parametrize("slot", [0, 1, 2, 4, 8, 4096, 4097])
def test_buffers_may_be_slices_of_an_arena(tmp_path: Path, slot: int) -> None:
    layout = write(tmp_path, [[(name, 0) for name in PARTS]])
    (buffer,) = read_extents(layout)
    arena = torch.zeros(slot + buffer.nbytes, dtype=torch.uint8)
    arena[slot:] = buffer
    weights = expert_weights(layout, [arena[slot:]])
    expected = expert_weights(layout, [buffer])
    for ours, theirs in zip(weights, expected, strict=True):
        assert torch.equal(ours.dequantize(), theirs.dequantize())
    if slot % 8 == 0:
        arena.zero_()
        assert not weights.gate_proj.parts["weight_packed"].any()


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_parts_are_aligned_in_memory_wherever_the_buffer_is(tmp_path: Path, shift: int) -> None:
    layout = write(tmp_path, [[(name, 0) for name in PARTS]])
    memory = np.zeros(EXPERT_BYTES + 64, np.uint8)
    begin = -memory.ctypes.data % 64 + shift
    place = memory[begin : begin + EXPERT_BYTES]
    place[:] = read_extents(layout)[0].numpy()
    for tensor in expert_weights(layout, [torch.from_numpy(place)]):
        for part in tensor.parts.values():
            assert part.data_ptr() % part.dtype.itemsize == 0


def test_a_short_file_names_the_file_and_the_expert(tmp_path: Path) -> None:
    layout = write(tmp_path, [[(name, 0) for name in PARTS]])
    file = layout.extents[0].file
    file.write_bytes(file.read_bytes()[:-1])
    found, expected = EXPERT_BYTES - 1, EXPERT_BYTES
    with pytest.raises(CheckpointError, match=rf"^{file}: layer 0, expert 0: found {found} of {expected} bytes"):
        read_extents(layout)
