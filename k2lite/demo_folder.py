"""The demo checkpoint that comes with the package: a small Kimi-K2 that was really trained (docs/demo-model.md)."""

from __future__ import annotations

import shutil
from pathlib import Path

from k2lite.quant.durable_files import write_new_folder

DEMO_FOLDER = Path(__file__).resolve().parent / "demo"


def copy_demo(folder: Path) -> None:
    """The demo checkpoint in a folder of its own. Raises RequestError for a name that exists or can't be written."""
    write_new_folder(folder, lambda partial: shutil.copytree(DEMO_FOLDER, partial, dirs_exist_ok=True))
