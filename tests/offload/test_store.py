"""The store brings every byte, whatever the drive does, and says which file, layer and expert where it can't."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from k2lite.errors import CheckpointError, RequestError
from k2lite.offload.direct_files import PAGE_BYTES, DirectFiles
from k2lite.offload.slots import Arena, rounded_out
from k2lite.offload.store import READ_BYTES, read_pieces
from k2lite.quant.checksums import MANIFEST_NAME, read_checksums
from k2lite.quant.expert_layout import expert_weights, read_extents
from k2lite.quant.types import ExpertKey, Extent
from tests.checkpoints import random_weights, tiny_config, write_checkpoint
from tests.offload.caches import SAID, FaultyFiles, Gate, io_error, open_cache, random_delays
from tests.offload.test_lease import Stored, demand_right, settled, take_all
from tools.make_slice import make_slice

SLICE_SIZES = {"hidden_size": 256, "intermediate_size": 320, "moe_intermediate_size": 128, "num_attention_heads": 4,
               "num_key_value_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
               "qk_rope_head_dim": 16, "v_head_dim": 32}  # fmt: skip


def read_everything(folder: Path, stored: Stored, **options: object) -> None:
    cache = open_cache(folder, 3, ring=1, **options)  # type: ignore[arg-type]
    for layer in (1, 2):
        with cache.lease(layer, list(range(8)), []) as lease:
            for group in lease.ready():
                demand_right(layer, group, stored)
    settled(cache)
    cache.close()


@pytest.mark.parametrize("format", ["fp8", "int4", "bf16"])
def test_every_byte_of_every_format(tmp_path: Path, format: str) -> None:
    config = tiny_config(hidden_size=96)
    write_checkpoint(tmp_path / "model", config, random_weights(config, seed=1), format=format)
    stored = {name: t for path in (tmp_path / "model").glob("*.safetensors") for name, t in load_file(path).items()}
    read_everything(tmp_path / "model", stored)


@pytest.mark.parametrize("most", [PAGE_BYTES, PAGE_BYTES + 512, 2 * PAGE_BYTES - 1])
def test_short_reads_are_gone_on_with(tiny_folder: Path, stored: Stored, most: int) -> None:
    read_everything(tiny_folder, stored, files=FaultyFiles(most=most))


def test_a_file_system_that_refuses_direct_reads_is_read_otherwise_and_it_is_said_once(
    tiny_folder: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: object, flags: int, *rest: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *rest)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "open", refuse)
    SAID.clear()
    read_everything(tiny_folder, stored)
    assert [text for text in SAID if "refuses direct reads" in text] == SAID
    assert len(SAID) == 1


def test_pieces_are_whole_pages_and_cover_each_extent_once() -> None:
    extents = [Extent(Path("a"), 5000, 3 * READ_BYTES), Extent(Path("b"), 8192, 100), Extent(Path("a"), 99999999, 4096)]
    pieces = read_pieces(extents)
    assert all(not piece.offset % PAGE_BYTES and not piece.nbytes % PAGE_BYTES for piece in pieces)
    assert all(piece.nbytes <= READ_BYTES for piece in pieces)
    at = 0
    for extent in extents:
        mine = [p for p in pieces if at <= p.at < at + rounded_out(extent)[1]]
        assert [p.offset - p.at for p in mine] == [rounded_out(extent)[0] - at] * len(mine)
        assert sum(p.nbytes for p in mine) == rounded_out(extent)[1]
        assert mine[-1].offset + mine[-1].needed == extent.offset + extent.nbytes
        at += rounded_out(extent)[1]


def test_a_truncated_shard_names_file_layer_and_expert(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    cache = open_cache(tmp_path / "model", 4, ring=1)
    for shard in (tmp_path / "model").glob("*.safetensors"):
        os.truncate(shard, shard.stat().st_size // 8)
    with (
        pytest.raises(
            CheckpointError, match=r"\.safetensors: layer 2, expert \d can't be read: found \d+ of \d+ bytes"
        ),
        cache.lease(2, list(range(8))) as lease,
    ):
        take_all(lease)
    settled(cache)


def manifest_for(folder: Path) -> None:
    """Checksums by the package itself, of each expert's parts in the order that the manifest's writer promises."""
    import xxhash

    stored = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    pieces = {}
    for layer in (1, 2):
        for expert in range(8):
            digest = xxhash.xxh3_64()
            for projection in ("gate_proj", "up_proj", "down_proj"):
                at = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                for suffix in ("weight_packed", "weight_scale"):
                    digest.update(stored[f"{at}.{suffix}"].view(torch.uint8).numpy().tobytes())
            pieces[f"layer {layer}, expert {expert}"] = {"checksum": digest.hexdigest()}
    (folder / MANIFEST_NAME).write_text(json.dumps({"version": 1, "pieces": pieces}))


def test_a_flipped_byte_under_a_manifest_never_becomes_a_weight(
    tiny_folder: Path, stored: Stored, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    manifest_for(folder)
    cache = open_cache(folder, 4, ring=1)
    with cache.lease(2, [5]) as lease:
        assert list(take_all(lease)) == [5]
    cache.close()
    (extent, *_) = cache.store.checkpoint.expert(ExpertKey(2, 6)).extents
    with extent.file.open("r+b") as file:
        file.seek(extent.offset + 77)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    cache = open_cache(folder, 4, ring=1)
    with (
        pytest.raises(CheckpointError, match=r"safetensors: layer 2, expert 6: the checksum is \w+ and .* damaged"),
        cache.lease(2, [6]) as lease,
    ):
        take_all(lease)
    with cache.lease(2, [5]) as lease:
        assert list(take_all(lease)) == [5]
    settled(cache)
    # with a mirror the right copy is found, whichever it is
    for model, mirror in ((folder, tiny_folder), (tiny_folder, folder)):
        SAID.clear()
        cache = open_cache(model, 4, ring=1, mirror=mirror)
        cache.store.checkpoint.checksums = read_checksums(folder)
        with cache.lease(2, list(range(8))) as lease:
            for group in lease.ready():
                demand_right(2, group, stored)
        assert all(text.endswith(f"{tiny_folder} holds the right bytes") for text in SAID)


def test_a_mirror_shares_the_reads_and_replaces_a_drive_that_fails(
    tiny_folder: Path, stored: Stored, tmp_path: Path
) -> None:
    mirror = tmp_path / "copy"
    shutil.copytree(tiny_folder, mirror)
    files = FaultyFiles(random_delays(0))
    read_everything(tiny_folder, stored, files=files, mirror=mirror)
    shares = [sum(path.parent == folder for path, _ in files.reads) for folder in (tiny_folder, mirror)]
    assert min(shares) > 0.2 * sum(shares)

    for gone, other in ((tiny_folder, mirror), (mirror, tiny_folder)):

        def vanished(path: Path, offset: int, gone: Path = gone) -> None:
            if path.parent == gone:
                io_error(path, offset)

        SAID.clear()
        files = FaultyFiles(vanished)
        read_everything(tiny_folder, stored, files=files, mirror=mirror)
        (said,) = SAID
        assert said.startswith(f"{gone}/")
        assert "Input/output error; reading from the other copy" in said
        assert sum(path.parent == gone for path, _ in files.reads) <= 4  # one for each thread
        assert any(path.parent == other for path, _ in files.reads)

    cache = open_cache(tiny_folder, 4, ring=1, mirror=mirror, files=FaultyFiles(io_error))
    with (
        pytest.raises(CheckpointError, match=rf"{tiny_folder.name}.*layer 1, expert 0.*; .*copy.*layer 1, expert 0"),
        cache.lease(1, [0]) as lease,
    ):
        take_all(lease)


def test_a_copy_that_hardly_answers_leaves_the_work_to_the_other(
    tiny_folder: Path, stored: Stored, tmp_path: Path
) -> None:
    """However slow a drive is: what it has begun is all that waits for it. Here it answers nothing until the other
    copy has brought everything else."""
    mirror = tmp_path / "copy"
    shutil.copytree(tiny_folder, mirror)
    gate, lock, threads = Gate(), threading.Lock(), 4
    begun = {tiny_folder: 0, mirror: 0}

    def slow(path: Path, offset: int) -> None:
        with lock:
            begun[path.parent] += 1
            if sum(begun.values()) == pieces:
                gate.opened.set()
        if path.parent == tiny_folder:
            gate(path, offset)

    files = FaultyFiles(slow)
    cache = open_cache(tiny_folder, 8, ring=1, mirror=mirror, files=files, threads=threads)
    pieces = sum(len(read_pieces(cache.store.checkpoint.expert(ExpertKey(1, n)).extents)) for n in range(8))
    with cache.lease(1, list(range(8))) as lease:
        for group in lease.ready():
            demand_right(1, group, stored)
    settled(cache)
    assert sum(begun.values()) == pieces
    assert 0 < begun[tiny_folder] < threads  # the other copy is never left without a reader
    cache.close()


def test_a_mirror_that_is_no_copy_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="can't be read: No such file"):
        open_cache(tiny_folder, 4, mirror=tmp_path)
    with pytest.raises(RequestError, match="the mirror is the model itself"):
        open_cache(tiny_folder, 4, mirror=tiny_folder)
    shutil.copytree(tiny_folder, tmp_path / "copy")
    (shard, *_) = sorted((tmp_path / "copy").glob("*.safetensors"))
    head = bytearray(shard.read_bytes())
    head[20] ^= 1
    shard.write_bytes(head)
    with pytest.raises(RequestError, match="its header is not that of"):
        open_cache(tiny_folder, 4, mirror=tmp_path / "copy")
    os.truncate(shard, 99)
    with pytest.raises(RequestError, match="has 99 bytes"):
        open_cache(tiny_folder, 4, mirror=tmp_path / "copy")


def test_pages_that_many_experts_share_are_read_once(tmp_path: Path) -> None:
    """The shapes of a slice's experts stand apart, all on one page. What was wrong is not remembered."""
    make_slice(tmp_path / "slice", format="int4", layers=2, experts=16, vocab=520, sizes=SLICE_SIZES)
    files = FaultyFiles()
    cache = open_cache(tmp_path / "slice", 16, ring=0, files=files)
    layout = cache.store.checkpoint.expert(ExpertKey(1, 0))
    small = min(layout.extents, key=lambda extent: extent.nbytes)
    assert (len(layout.extents), small.nbytes) == (2, 24)
    data = bytearray(small.file.read_bytes())
    small.file.write_bytes(bytes(data[: small.offset]) + bytes(24) + bytes(data[small.offset + 24 :]))
    with pytest.raises(CheckpointError, match="weight_shape holds"), cache.lease(1, [0]) as lease:
        take_all(lease)
    small.file.write_bytes(data)
    with cache.lease(1, [0]) as lease:
        take_all(lease)
    files.reads.clear()
    with cache.lease(1, [0, 1, 2, 3]) as lease:
        found = take_all(lease)
    assert all(offset != small.offset // PAGE_BYTES * PAGE_BYTES for _, offset in files.reads)
    for number, weights in found.items():
        alone = cache.store.checkpoint.expert(ExpertKey(1, number))
        for mine, theirs in zip(weights, expert_weights(alone, read_extents(alone)), strict=True):
            assert all(torch.equal(part, theirs.parts[suffix]) for suffix, part in mine.parts.items())


def test_an_arena_is_whole_pages_on_page_boundaries() -> None:
    arena = Arena(3, 2 * PAGE_BYTES)
    assert [arena.tensor(slot).data_ptr() % PAGE_BYTES for slot in range(3)] == [0, 0, 0]
    arena.memory(1)[:] = b"\x07" * (2 * PAGE_BYTES)
    assert arena.tensor(1).eq(7).all()
    assert not arena.tensor(0).any()
    assert not arena.tensor(2).any()
    arena.give_back(1)
    assert not arena.tensor(1).any()
    with pytest.raises(ValueError, match="no whole pages"):
        Arena(3, 1000)


def open_files(folder: Path) -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith(str(folder)):
            found.append(target)
    return found


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_source_that_ends_leaves_no_thread_and_no_file(tiny_folder: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "model"  # of its own: other tests' sources may end meanwhile
    shutil.copytree(tiny_folder, folder)
    before = set(threading.enumerate())
    cache = open_cache(folder, 4, ring=1)
    workers = set(threading.enumerate()) - before
    with cache.lease(1, [0, 1]) as lease:
        take_all(lease)
    assert len(workers) == 4
    assert open_files(folder)
    if how == "close":
        cache.close()
    del cache, lease
    gc.collect()
    for thread in workers:
        thread.join(5)
    assert not any(thread.is_alive() for thread in workers)
    assert not open_files(folder)


def test_nothing_leaks_over_many_faults(tiny_folder: Path, stored: Stored, tmp_path: Path, soak: bool) -> None:
    """EIO, short files, slow answers and leases that are left in the middle, in random order."""
    mirror = tmp_path / "copy"
    shutil.copytree(tiny_folder, mirror)
    count = 1000 if soak else 50
    state = torch.Generator().manual_seed(7)

    def draw(below: int) -> int:
        return int(torch.randint(below, (1,), generator=state))

    files = FaultyFiles()
    for copy in (None, mirror):
        cache = open_cache(tiny_folder, 5, ring=2, files=files, prefetch_width=2, mirror=copy)
        before = set(threading.enumerate())
        raised = 0
        for number in range(count // 2):
            delay, at = random_delays(number, 0.0005), draw(6)
            seen: list[int] = []

            def fault(path: Path, offset: int, delay=delay, at=at, seen=seen) -> None:  # type: ignore[no-untyped-def]
                delay(path, offset)
                seen.append(offset)
                if len(seen) > at:
                    io_error(path, offset)

            files.fault = fault
            layer = 1 + draw(2)
            cache.hint(layer, torch.randperm(8, generator=state).tolist()[:2])
            keep = None if draw(2) else [0, 1]
            try:
                with cache.lease(
                    layer, sorted(torch.randperm(8, generator=state).tolist()[: 1 + draw(8)]), keep
                ) as lease:
                    for group in lease.ready():
                        demand_right(layer, group, stored)
                        if not draw(4):
                            break
            except CheckpointError:
                raised += 1
            if not number % 10:
                files.fault = None
                settled(cache)
        assert raised > count // 8
        assert not set(threading.enumerate()) - before
        assert len(open_files(tiny_folder)) <= 4
        files.fault = None
        settled(cache)
        for layer in (1, 2):
            with cache.lease(layer, list(range(8))) as lease:
                for group in lease.ready():
                    demand_right(layer, group, stored)
        settled(cache)
        cache.close()
        files = FaultyFiles()


def test_direct_reads_leave_the_page_cache_alone(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(range(256)) * 64)
    files = DirectFiles(SAID.append)
    arena = Arena(1, 4 * PAGE_BYTES)
    SAID.clear()
    assert files.read(tmp_path / "data", PAGE_BYTES, arena.memory(0)[: 2 * PAGE_BYTES]) == 2 * PAGE_BYTES
    assert bytes(arena.memory(0)[:256]) == bytes(range(256))
    assert files.size(tmp_path / "data") == 256 * 64
    assert files.refusing == (() if not SAID else (tmp_path,))
