"""Beginnings of conversations on the drive: what was computed once is read back, after a restart too.

A prefix lies in blocks of 128 tokens. A block's name is a hash over the model, the arithmetic and all tokens up to its
end, so two conversations that begin alike share their blocks, and another model's are never found. Invariant: a block
that is read back holds the very bytes that were computed; one that is damaged is removed and computed again. Holds no
text and no token ids, but latents of what users wrote: files are readable by their owner only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import xxhash

from k2lite.engine import Engine, Sequence
from k2lite.kv_cache import LatentCache
from k2lite.quant.errors import RequestError

BLOCK_TOKENS = 128
_MAGIC, _VERSION = b"k2lite prefix\0\0\0", 1
_HEADER = struct.Struct("<16sIIIIQ")  # magic, version, layers, tokens, values a token, xxh3-64 of the rest
# For what is still to be written when the server ends.
CLOSE_S = 5.0
# A server that was killed leaves a file under a temporary name; one of this age is nobody's.
ABANDONED_S = 600.0
log = logging.getLogger("k2lite.server")


class PrefixStore:
    """Blocks under `folder`, up to `limit_bytes`; what was not used for longest goes first. Several threads and several
    servers may share a folder; each server counts what it has seen."""

    def __init__(self, folder: Path, engine: Engine, *, limit_bytes: int) -> None:
        """Raises RequestError where the folder can't be used, or holds no block."""
        block = _HEADER.size + LatentCache.nbytes_for(engine.config, BLOCK_TOKENS)
        if limit_bytes < block:
            raise RequestError(
                f"--prefix-size is {limit_bytes} bytes, and {BLOCK_TOKENS} tokens of this model take {block}"
            )
        self.folder, self.limit_bytes = folder, limit_bytes
        self.total_bytes = 0
        self._root = arithmetic_identity(engine)
        self._lock = threading.Lock()
        self._sizes: OrderedDict[Path, int] = OrderedDict()  # the most recently used last
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()  # to be written, by identity
        self._writing: Sequence | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="k2lite-prefix-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="k2lite-prefix-write")
        self._complaint = ""
        demand_folder(folder)
        self._look_around()

    def known(self, ids: list[int]) -> int:
        """Tokens of the longest beginning of `ids` that is stored: a multiple of BLOCK_TOKENS."""
        found = []
        with self._lock:
            for path in self._paths(ids):
                if path not in self._sizes:
                    break
                found.append(path)
        return len(found) * BLOCK_TOKENS

    def load(self, sequence: Sequence, ids: list[int], length: int, stop: Callable[[], bool]) -> Future[None]:
        """Bring `sequence`, which holds a beginning of `ids`, to `length` tokens in another thread, which alone touches
        it until the future is done. Ends earlier at a block that is damaged or gone, or when `stop` says so."""
        return self._reader.submit(self._load, sequence, ids, length, stop)

    def save(self, sequence: Sequence) -> None:
        """Write in another thread what is not stored yet. The sequence may grow meanwhile."""
        with self._lock:
            self._waiting[id(sequence)] = sequence
        self._writer.submit(self._save_next).add_done_callback(_log_bug)

    def forget(self, sequence: Sequence) -> None:
        """Don't write it after all, its memory is wanted."""
        with self._lock:
            self._waiting.pop(id(sequence), None)
            if self._writing is sequence:
                self._writing = None

    def flush(self) -> None:
        """Wait until all that `save` was given is written."""
        self._writer.submit(lambda: None).result()

    def close(self, patience_s: float = CLOSE_S) -> None:
        """Write what waits, for a while, and end the threads."""
        try:
            self._writer.submit(lambda: None).result(patience_s)
        except TimeoutError:
            with self._lock:
                left, self._writing = len(self._waiting) + (self._writing is not None), None
                self._waiting.clear()
            log.warning("%d conversations were not stored whole: the drive took too long", left)
        self._writer.shutdown()
        self._reader.shutdown()

    def _paths(self, ids: list[int]) -> list[Path]:
        """Where each whole block of a sequence lies or would lie."""
        paths, chain = [], self._root
        for end in range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS):
            block = np.asarray(ids[end - BLOCK_TOKENS : end], dtype="<i8").tobytes()
            chain = hashlib.blake2b(chain + block, digest_size=20).digest()
            paths.append(self.folder / f"{end // BLOCK_TOKENS:06d}-{chain.hex()}.kv")
        return paths

    def _look_around(self) -> None:
        for left in self.folder.glob("*.new"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_S:
                    left.unlink()
        found = []
        for path in self.folder.glob("*.kv"):
            with contextlib.suppress(FileNotFoundError):  # another server's, which removed it
                status = path.stat()
                # of one age the longer goes first: without its beginning it is of no use
                found.append((status.st_mtime_ns, -int(path.name[:6]), path, status.st_size))
        self._sizes = OrderedDict((path, size) for _, _, path, size in sorted(found))
        self.total_bytes = sum(self._sizes.values())

    def _load(self, sequence: Sequence, ids: list[int], length: int, stop: Callable[[], bool]) -> None:
        paths = self._paths(ids[:length])
        for at, path in enumerate(paths):
            start, end = at * BLOCK_TOKENS, (at + 1) * BLOCK_TOKENS
            if end > len(sequence.ids) and not stop():
                rows = self._read(path, sequence)
                if rows is None:
                    break
                sequence.append(ids[len(sequence.ids) : end], rows[:, len(sequence.ids) - start :])
        self._touch(paths)

    def _read(self, path: Path, sequence: Sequence) -> torch.Tensor | None:
        """The latents of a block, float32 [layers, BLOCK_TOKENS, latent], or None if it can't be had whole."""
        shape = (sequence.cache.layers, BLOCK_TOKENS, sequence.cache.latent)
        rows = torch.empty(shape, dtype=torch.float32)
        payload = _bytes_of(rows)
        problem = "damaged"
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
                whole = file.readinto(payload) == len(payload) and not file.read(1)
            if whole and header == _header(shape, payload):
                return rows
        except OSError as error:
            problem = error.strerror or "can't be read"
        log.warning("a stored prefix is %s; it is computed again", problem)
        self._remove(path)
        return None

    def _touch(self, paths: list[Path]) -> None:
        for path in reversed(paths):
            with contextlib.suppress(OSError):
                os.utime(path)
            with self._lock:
                if path in self._sizes:
                    self._sizes.move_to_end(path)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        with self._lock:
            self.total_bytes -= self._sizes.pop(path, 0)

    def _save_next(self) -> None:
        with self._lock:
            if not self._waiting:
                return
            _, sequence = self._waiting.popitem(last=False)
            self._writing, cache = sequence, sequence.cache  # who closes a sequence says forget before
        paths = self._paths(list(sequence.ids))
        self._touch(paths)  # so that what it needs is not what goes first
        try:
            for at, path in enumerate(paths):
                if self._writing is not sequence:
                    break
                if path in self._sizes:
                    continue
                if not self._write(path, cache.read(at * BLOCK_TOKENS, (at + 1) * BLOCK_TOKENS), paths):
                    break
            self._complaint = ""
        except OSError as error:
            if error.strerror != self._complaint:  # once, not for every request
                self._complaint = str(error.strerror)
                log.warning("prefixes can't be stored: %s", error.strerror)
        finally:
            with self._lock:
                self._writing = None
        self._touch(paths)

    def _write(self, path: Path, rows: torch.Tensor, needed: list[Path]) -> bool:
        """False where there is only room if a block in `needed` went."""
        payload = _bytes_of(rows.cpu().contiguous())
        size = _HEADER.size + len(payload)
        while self.total_bytes + size > self.limit_bytes:
            oldest = next(iter(self._sizes), None)
            if oldest is None or oldest in needed:
                return False
            self._remove(oldest)
        # no fsync: a block that a crash tore is found by its checksum
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".new")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_header(tuple(rows.shape), payload))
                file.write(payload)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        with self._lock:
            self._sizes[path] = size
            self.total_bytes += size
        return True


def demand_folder(folder: Path) -> None:
    """Make it, if need be. Raises RequestError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RequestError(f"{folder}: can't keep prefixes here: {error.strerror}; see --prefix-dir") from error


def _log_bug(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.error("a prefix was not stored: %s", type(error).__name__)


def _bytes_of(rows: torch.Tensor) -> memoryview:
    return rows.numpy().data.cast("B")


def _header(shape: tuple[int, ...], payload: memoryview) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, *shape, xxhash.xxh3_64_intdigest(payload))


def arithmetic_identity(engine: Engine) -> bytes:
    """A hash of all that decides latents beside the tokens: the model's files as they are now (names, sizes, times of
    change, config.json), the plan's arithmetic, and our own code."""
    digest = hashlib.sha256(f"{_VERSION} {torch.__version__} {engine.placement.arithmetic}".encode())
    folder = engine.config.source.parent
    digest.update(engine.config.source.read_bytes())
    digest.update(f"{engine.config.latent_norm_eps}".encode())  # an option may say otherwise than the file
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    import k2lite

    package = Path(k2lite.__file__).parent
    for source in sorted([*package.glob("*.py"), *package.glob("backends/**/*.py"), *package.glob("quant/*.py")]):
        digest.update(source.read_bytes())
    return digest.digest()
