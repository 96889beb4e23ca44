"""Where this user's files lie that can be made again: $XDG_CACHE_HOME or ~/.cache, as the XDG base directory says."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """k2lite's own folder there; it need not exist yet."""
    given = os.environ.get("XDG_CACHE_HOME")
    base = Path(given) if given else Path(os.path.expanduser("~")) / ".cache"
    return base / "k2lite"
