"""Runs a command in a memory control group of its own, so that a model larger than memory meets a real limit.

Version 1 and 2 of control groups; needs the right to make one. The group is removed afterwards.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CONTROLLERS = Path("/sys/fs/cgroup")
HOW = (
    "as root: mkdir /sys/fs/cgroup/memory/tiers (version 2: /sys/fs/cgroup/tiers), write the bytes to its "
    "memory.limit_in_bytes (memory.max), this shell's pid to its cgroup.procs, then run with --no-limit"
)


@dataclass(frozen=True)
class MemoryGroup:
    """`None` for a folder: no limit could be set, or none was asked for."""

    folder: Path | None

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """The command, in the group from its first instruction."""
        if self.folder is None:
            return subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload, no-any-return]
        into = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return subprocess.Popen(["sh", "-c", into, "sh", *command], text=True, **options)  # type: ignore[call-overload, no-any-return]

    @property
    def failures(self) -> int:
        """How often the kernel had to reclaim because the limit was met; 0 where it isn't counted."""
        if self.folder is None or not (self.folder / "memory.failcnt").exists():
            return 0
        return int((self.folder / "memory.failcnt").read_text())


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """A group with this limit. Raises OSError where none can be made."""
    version_1 = (CONTROLLERS / "memory" / "memory.limit_in_bytes").exists()
    folder = (CONTROLLERS / "memory" if version_1 else CONTROLLERS) / f"k2lite-tiers-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit_bytes))
        yield MemoryGroup(folder)
    finally:
        for _ in range(50):  # the kernel lets go of what has just ended a moment later
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)
