"""How much processor time the control group grants, in whole processors, rounded up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def cgroup_processors(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """One number for each limit that holds for this process, its own group's and those above; none without limits."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        group = base / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
            limit = _quota(folder)
            if limit is not None:
                yield limit


def _quota(folder: Path) -> int | None:
    """Version 2 has quota and period in one file, version 1 in two; "max" or -1 is no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or not int(period):
        return None
    return max(1, -(-int(quota) // int(period)))
