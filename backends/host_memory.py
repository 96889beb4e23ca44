"""How many bytes of RAM this process may still take: the machine's, and the control group's if that is less."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil
import torch

from .base import Memory

_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
# (limit, in use) of the process's own control group: version 2, then version 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def host_memory(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Memory:
    """RAM in bytes. A limit of the control group, or of any group above it, counts when it is tighter."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for folder in _groups(proc, root):
        for limit_name, usage_name in _CGROUP_FILES:
            limit = _number(folder / limit_name)
            if limit is not None and limit < total:
                total = limit
            if limit is not None:
                available = min(available, max(0, limit - _unreclaimable(folder, usage_name)))
    return Memory(total_bytes=total, available_bytes=available)


def ask_for_large_pages(memory: torch.Tensor) -> None:
    """Advise the kernel to back untouched memory with large pages, where it has them: a processor's own prefetch stops
    at a page's end. Advice only: nothing happens where it can't be followed."""
    first = -(-memory.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
    nbytes = (memory.data_ptr() + memory.nbytes - first) // _LARGE_PAGE * _LARGE_PAGE
    if nbytes > 0 and sys.platform.startswith("linux"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), _MADV_HUGEPAGE)


def _groups(proc: Path, root: Path) -> list[Path]:
    """The process's memory control groups, innermost first, up to the mount point."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    found: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        folder = base / path.lstrip("/")
        found += [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    return found


def _unreclaimable(folder: Path, usage_name: str) -> int:
    """Bytes in use without the page cache, which the kernel gives back."""
    usage = _number(folder / usage_name) or 0
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return usage
    cache = int(stat.get("inactive_file", stat.get("total_inactive_file", "0")))
    return max(0, usage - cache)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" means no limit
