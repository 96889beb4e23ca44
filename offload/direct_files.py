"""Files read past the page cache: O_DIRECT into page-aligned memory.

Invariant: memory, offset and length of every request are multiples of a page, so that the device writes where the
kernels will read. Where a file system refuses O_DIRECT, plain reads take its place, said aloud once a folder, and the
pages that they leave in the cache are dropped. Knows no experts.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

PAGE_BYTES = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)

Say = Callable[[str], None]


def say_on_stderr(text: str) -> None:
    print(f"k2lite: {text}", file=sys.stderr, flush=True)


class _OpenFile:
    """Closed when the last reader lets go of it: another thread may be in the middle of a read."""

    def __init__(self, fd: int, *, direct: bool) -> None:
        self.fd = fd
        self.direct = direct

    def __del__(self) -> None:
        os.close(self.fd)


class DirectFiles:
    """Opens files as they are asked for and keeps them open. `read` may be called from any thread."""

    def __init__(self, say: Say = say_on_stderr) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._open: dict[Path, _OpenFile] = {}
        self._refusing: set[Path] = set()

    @property
    def refusing(self) -> tuple[Path, ...]:
        """Folders whose file system was found to refuse direct reads."""
        return tuple(sorted(self._refusing))

    def read(self, path: Path, offset: int, view: memoryview) -> int:
        """One request: bytes of `path` from `offset` into `view`; how many came, 0 at the end. Raises OSError."""
        file = self._file(path)
        try:
            count = os.preadv(file.fd, [view], offset)
        except OSError as error:
            self._forget(path, file)
            if error.errno == errno.EINVAL and file.direct:
                self._refuse(path)
                return self.read(path, offset, view)
            raise
        if not file.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fd, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def size(self, path: Path) -> int:
        """Bytes of the file now. Raises OSError."""
        return os.fstat(self._file(path).fd).st_size

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _file(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._open.get(path)
        if file is None:
            file = self._opened(path)
            with self._lock:
                file = self._open.setdefault(path, file)
        return file

    def _opened(self, path: Path) -> _OpenFile:
        if _O_DIRECT and path.parent not in self._refusing:
            try:
                return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT), direct=True)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        self._refuse(path)
        return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), direct=False)

    def _forget(self, path: Path, file: _OpenFile) -> None:
        """A file that failed is opened anew for the next read: its drive may be back."""
        with self._lock:
            if self._open.get(path) is file:
                del self._open[path]

    def _refuse(self, path: Path) -> None:
        with self._lock:
            known = path.parent in self._refusing
            self._refusing.add(path.parent)
        if not known:
            self._say(f"{path.parent}: the file system refuses direct reads; reading through the page cache, slower")
