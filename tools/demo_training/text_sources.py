"""English and Python text whose licences let weights be distributed, from packages that every machine can install.

The texts are source files: code with its docstrings and comments. A file is held out or trained on by the hash of its
name, so any machine with the same package versions splits alike.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.03
MAX_FILE_BYTES = 200_000


@dataclass(frozen=True)
class Source:
    """A package, its licence, and the share of its files that is taken (large ones would drown the rest)."""

    package: str
    licence: str
    share: float


SOURCES = (
    Source("python standard library", "PSF-2.0", 0.5),
    Source("sympy", "BSD-3-Clause", 0.2),
    Source("networkx", "BSD-3-Clause", 0.6),
    Source("numpy", "BSD-3-Clause", 0.4),
)


def is_held_out(name: str, share: float = HELD_OUT_SHARE) -> bool:
    """Decided by the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def folder_of(source: Source) -> Path:
    if source.package == "python standard library":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {source.package} is not installed; pip install {source.package}")
    return Path(spec.submodule_search_locations[0])


def texts(*, held_out: bool) -> Iterator[str]:
    """The texts of the training set or of the held-out set, in a fixed order."""
    for source in SOURCES:
        folder = folder_of(source)
        for path in sorted(folder.rglob("*.py")):
            name = f"{source.package}/{path.relative_to(folder)}"
            skipped = "site-packages" in path.parts[len(folder.parts) :] or path.stat().st_size > MAX_FILE_BYTES
            if skipped or is_held_out(name) != held_out or not is_held_out("taken:" + name, source.share):
                continue
            text = path.read_text(encoding="utf-8", errors="replace")
            if len(text) > 200:
                yield text
