"""Reads experts from the drives into slots: whole, checked, off the threads that compute.

Invariant: an expert is reported as read only when every byte has come and, where the manifest has a checksum, the bytes
are those that were written. An extent is read in pieces by several threads, so that one expert alone keeps a drive
busy; with a mirror, pieces are shared between the two copies and a copy that fails is replaced by the other. Errors
name file, layer and expert. Knows no policy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from k2lite.quant.checkpoint import Checkpoint
from k2lite.quant.checksums import demand_checksum, expert_piece
from k2lite.quant.errors import CheckpointError, RequestError
from k2lite.quant.expert_layout import expert_weights
from k2lite.quant.types import ExpertKey, ExpertLayout, ExpertWeights, Extent

from .direct_files import PAGE_BYTES, DirectFiles, Say, say_on_stderr
from .read_pool import Group, ReadPool
from .slots import Arena, rounded_out, slot_bytes_for

# Requests that were begun together end together where a drive serves all alike: more than one expert's keep it busy.
READ_THREADS = 16
# Drives are as fast as they get with requests of a few MB; more pieces let one expert use several threads.
READ_BYTES = 2 << 20
_TRIES = 3
# An extent that is so small a part of its expert (shapes that stand apart) lies on a page with those of many others.
_SMALL_SHARE = 1 / 1000


class PackedExperts(Protocol):
    """Experts in other bytes than the checkpoint's, as PackedCopy (packed_copy.py) has them."""

    @property
    def slot_bytes(self) -> int:
        """Whole pages that hold any of them."""

    def expert(self, key: ExpertKey) -> ExpertLayout:
        """Where one lies, in one extent that begins on a page."""

    def views(self, layout: ExpertLayout, memory: torch.Tensor) -> ExpertWeights:
        """What was read into `memory`, uint8. Raises CheckpointError for wrong bytes."""


class ShortReadError(Exception):
    """A file ended before the bytes did."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`nbytes` from `offset` of `file` (whole pages) to `at` in the slot; the first `needed` must come, since a file
    may end inside the last page. `shared`: a small extent's pages, which hold other experts' too."""

    file: Path
    offset: int
    nbytes: int
    needed: int
    at: int
    shared: bool = False


class ExpertRead:
    """One expert on its way into a slot. `weights` or `error` is set when `on_done` is called, in a reader's thread;
    neither if it was cancelled."""

    def __init__(self, key: ExpertKey, slot: int, on_done: Callable[[ExpertRead], None]) -> None:
        self.key = key
        self.slot = slot
        self.nbytes = 0
        self.weights: ExpertWeights | None = None
        self.error: Exception | None = None
        self.cancelled = False
        self.on_done = on_done
        self.left = 0
        self.group = Group((), urgent=True)


class ExpertStore:
    """The experts of `checkpoint`, and of its copy in the folder `mirror`; or those of a packed copy of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        mirror: Path | None = None,
        packed: PackedExperts | None = None,
        files: DirectFiles | None = None,
        say: Say = say_on_stderr,
        threads: int = READ_THREADS,
    ) -> None:
        self.checkpoint = checkpoint
        self.packed = packed
        self.files = DirectFiles(say) if files is None else files
        self._say = say
        self.mirror = mirror
        if mirror is not None:
            check_mirror(checkpoint, mirror)
        self._pool = ReadPool(threads)
        self._lock = threading.Lock()
        self._outstanding: dict[Path, int] = {}
        self._failed: set[Path] = set()
        self._pages: dict[Piece, bytes] = {}  # that are shared, once an expert was right with them

    def start(
        self, key: ExpertKey, arena: Arena, slot: int, on_done: Callable[[ExpertRead], None], *, urgent: bool = True
    ) -> ExpertRead:
        """Begin to read an expert into a slot that is this read's alone until `on_done`. Raises CheckpointError if
        the headers already show that it can't be read."""
        layout = self.checkpoint.expert(key) if self.packed is None else self.packed.expert(key)
        memory = arena.memory(slot)
        pieces = [piece for piece in read_pieces(layout.extents) if not self._is_known(piece, memory)]
        read = ExpertRead(key, slot, on_done)
        read.left, read.nbytes = len(pieces), layout.nbytes

        def work(piece: Piece) -> Callable[[], None]:
            return lambda: self._run(read, layout, piece, memory, arena)

        read.group = Group([work(piece) for piece in pieces], urgent=urgent)
        self._pool.submit(read.group)
        return read

    def hasten(self, read: ExpertRead) -> None:
        """A speculative read is needed now."""
        self._pool.hasten(read.group)

    def cancel(self, read: ExpertRead) -> None:
        """A speculative read is not needed; `on_done` still comes, at once or when what has begun is over."""
        read.cancelled = True
        dropped = self._pool.cancel(read.group)
        if dropped:
            self._finish(read, None, None, pieces=dropped)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that holds any of its experts."""
        return slot_bytes_for(self.checkpoint) if self.packed is None else self.packed.slot_bytes

    @property
    def busy_s(self) -> float:
        """Seconds in which something was being read."""
        return self._pool.busy_s

    def close(self) -> None:
        self._pool.close()
        self.files.close()

    def _is_known(self, piece: Piece, memory: memoryview) -> bool:
        """Whether the piece was read for another expert; if so it is put into the slot."""
        pages = self._pages.get(replace(piece, at=0, needed=0)) if piece.shared else None
        if pages is not None:
            memory[piece.at : piece.at + piece.nbytes] = pages
        return pages is not None

    def _note_shared(self, layout: ExpertLayout, memory: memoryview) -> None:
        for piece in read_pieces(layout.extents):
            if piece.shared:
                pages = bytes(memory[piece.at : piece.at + piece.nbytes])
                self._pages.setdefault(replace(piece, at=0, needed=0), pages)

    def _run(self, read: ExpertRead, layout: ExpertLayout, piece: Piece, memory: memoryview, arena: Arena) -> None:
        error: Exception | None = None
        if read.error is None and not read.cancelled:
            try:
                self._read(piece, memory[piece.at : piece.at + piece.nbytes], read.key)
            except Exception as failure:
                error = failure
        self._finish(read, layout, error, arena=arena)

    def _finish(
        self,
        read: ExpertRead,
        layout: ExpertLayout | None,
        error: Exception | None,
        *,
        pieces: int = 1,
        arena: Arena | None = None,
    ) -> None:
        with self._lock:
            read.error = read.error or error
            read.left -= pieces
            last = not read.left
        if not last:
            return
        if read.error is None and not read.cancelled and layout is not None and arena is not None:
            try:
                read.weights = self._checked(layout, arena, read.slot)
                self._note_shared(layout, arena.memory(read.slot))
            except Exception as failure:
                read.error = failure
        read.on_done(read)

    def _checked(self, layout: ExpertLayout, arena: Arena, slot: int) -> ExpertWeights:
        if self.packed is not None:
            return self.packed.views(layout, arena.tensor(slot))
        try:
            return checked_views(layout, arena, slot)
        except CheckpointError as error:
            if self.mirror is None:
                raise
            # its pieces came from both copies, and one of them is wrong
            for folder in (layout.extents[0].file.parent, self.mirror):
                try:
                    for piece in read_pieces(layout.extents):
                        view = arena.memory(slot)[piece.at : piece.at + piece.nbytes]
                        read_whole(self.files, folder / piece.file.name, piece, view)
                    weights = checked_views(layout, arena, slot)
                except (OSError, ShortReadError, CheckpointError):
                    continue
                self._say(f"{error}; {folder} holds the right bytes")
                return weights
            raise

    def _read(self, piece: Piece, view: memoryview, key: ExpertKey) -> None:
        problems: list[str] = []
        tried: list[Path] = []
        while (file := self._next_copy(piece, tried)) is not None:
            tried.append(file)
            try:
                read_whole(self.files, file, piece, view)
            except (OSError, ShortReadError) as error:
                problems.append(f"{file}: {expert_piece(key)} can't be read: {_reason(error)}")
                self._note_failure(file, error)
            else:
                return
            finally:
                with self._lock:
                    self._outstanding[file.parent] -= piece.nbytes
        raise CheckpointError("; ".join(problems))

    def _next_copy(self, piece: Piece, tried: Sequence[Path]) -> Path | None:
        """The copy with the least to do that has not failed before; a failed one only if there is no other."""
        copies = [piece.file] if self.mirror is None else [piece.file, self.mirror / piece.file.name]
        left = [file for file in copies if file not in tried]
        if not left:
            return None
        with self._lock:
            best = min(left, key=lambda file: (file.parent in self._failed, self._outstanding.get(file.parent, 0)))
            self._outstanding[best.parent] = self._outstanding.get(best.parent, 0) + piece.nbytes
        return best

    def _note_failure(self, file: Path, error: Exception) -> None:
        if self.mirror is None:
            return
        with self._lock:
            known = file.parent in self._failed
            self._failed.add(file.parent)
        if not known:
            self._say(f"{file}: {_reason(error)}; reading from the other copy from now on")


def checked_views(layout: ExpertLayout, arena: Arena, slot: int) -> ExpertWeights:
    """Views into a slot that has been filled, once shapes and checksum are found right. Raises CheckpointError."""
    whole, at, buffers = arena.tensor(slot), 0, []
    for extent in layout.extents:
        start, nbytes = rounded_out(extent)
        first = at + extent.offset - start
        buffers.append(whole[first : first + extent.nbytes])
        at += nbytes
    weights = expert_weights(layout, buffers)
    demand_checksum(layout.checksum, weights, f"{layout.extents[0].file}: {expert_piece(layout.key)}")
    return weights


def read_pieces(extents: Sequence[Extent]) -> list[Piece]:
    """What to read for these extents, which lie one after another in the slot, each rounded out to pages."""
    pieces, at = [], 0
    small = _SMALL_SHARE * sum(extent.nbytes for extent in extents)
    for extent in extents:
        start, nbytes = rounded_out(extent)
        end = extent.offset + extent.nbytes
        for offset in range(start, start + nbytes, READ_BYTES):
            size = min(READ_BYTES, start + nbytes - offset)
            needed, shared = min(size, end - offset), extent.nbytes < small
            pieces.append(Piece(extent.file, offset, size, needed, at + offset - start, shared))
        at += nbytes
    return pieces


def read_whole(files: DirectFiles, file: Path, piece: Piece, view: memoryview) -> None:
    """Fill `view`, however short single reads are. Raises OSError or ShortReadError."""
    done = tries = 0
    while True:
        count = files.read(file, piece.offset + done, view[done:])
        if done + count >= piece.needed:
            return
        # the next direct read must begin on a page
        step = count // PAGE_BYTES * PAGE_BYTES
        done += step
        tries = 0 if step else tries + 1
        size = files.size(file)
        if tries == _TRIES or size < piece.offset + piece.needed:
            raise ShortReadError(
                f"found {done + count - step} of {piece.needed} bytes at offset {piece.offset}, the file has {size}; "
                "it has become shorter, download it again"
            )


def check_mirror(checkpoint: Checkpoint, mirror: Path) -> None:
    """Raise RequestError if `mirror` is no copy of the checkpoint's weight files, as far as sizes and headers tell."""
    if mirror.resolve() == checkpoint.folder.resolve():
        raise RequestError(f"{mirror}: the mirror is the model itself; name the folder of a second copy")
    for shard in checkpoint.shards:
        copy = mirror / shard.path.name
        try:
            size = copy.stat().st_size
            if size != shard.nbytes:
                raise RequestError(
                    f"{copy}: has {size} bytes and {shard.path} has {shard.nbytes}; a mirror holds the same files"
                )
            same = _head(copy) == _head(shard.path)
        except OSError as error:
            raise RequestError(
                f"{copy}: can't be read: {error.strerror or error}; a mirror holds the same files"
            ) from error
        if not same:
            raise RequestError(f"{copy}: its header is not that of {shard.path}; a mirror holds the same files")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
