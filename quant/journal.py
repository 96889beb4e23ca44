"""What a run of `quantize`, or one that writes a packed copy, has put on the disk so far: one line for each finished
piece, appended after its bytes.

Invariant: a line that can be read describes bytes that were synced before it was written. The first line holds the
settings and what the source was. A torn last line is forgotten; its piece is made again. Format: JSON lines.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .durable_files import sync
from .errors import CheckpointError, RequestError

JOURNAL_NAME = ".k2lite_quantize.jsonl"


class Journal:
    """Open means locked: no second process can work on the same folder."""

    def __init__(self, folder: Path, name: str = JOURNAL_NAME) -> None:
        self.path = folder / name
        self._pending: list[str] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise CheckpointError(f"{self.path}: can't be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise RequestError(f"{folder}: another k2lite is writing here; wait for it or end it") from error

    def read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """The first line, None in a new journal, and the pieces in order."""
        self._file.seek(0)
        lines: list[dict[str, Any]] = []
        length = 0
        for raw in self._file:
            try:
                line = json.loads(raw)
            except ValueError:
                break
            if not raw.endswith(b"\n"):
                break
            lines.append(line)
            length += len(raw)
        os.ftruncate(self._file.fileno(), length)
        return (lines[0], lines[1:]) if lines else (None, [])

    def forget(self, count: int) -> None:
        """Take back the last `count` pieces: they will be made again."""
        if count:
            self._file.seek(0)
            lines = self._file.readlines()
            os.ftruncate(self._file.fileno(), sum(map(len, lines[: len(lines) - count])))
            os.fsync(self._file.fileno())

    def begin(self, identity: Mapping[str, Any]) -> None:
        self.add(identity)
        self.commit()
        sync(self.path.parent)

    def add(self, line: Mapping[str, Any]) -> None:
        """Note a piece; `commit` writes it."""
        self._pending.append(json.dumps(line))

    def commit(self) -> None:
        """Write what was added. Its bytes must be on the disk by now."""
        if not self._pending:
            return
        try:
            self._file.write("".join(f"{line}\n" for line in self._pending).encode("utf-8"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: can't be written: {error.strerror or error}; make room and go on with --resume"
            ) from error
        self._pending.clear()

    def remove(self) -> None:
        """The run is over and everything is in its place."""
        self.path.unlink()
        sync(self.path.parent)
        self.close()

    def close(self) -> None:
        self._file.close()


def demand_same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Raise RequestError naming what a resumed run would do otherwise than the run that it goes on with."""
    for part in ("settings", "source"):
        old, new = found.get(part, {}), wanted[part]
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            shown = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            what = "other settings" if part == "settings" else "another source"
            raise RequestError(
                f"{where}: --resume with {what}: {shown}{more}; use what the run was begun with, or remove the folder "
                "and begin anew"
            )
