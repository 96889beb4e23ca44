"""Where the demo checkpoint lies that comes with the package: a small Kimi-K2 that was really trained
(docs/demo-model.md). Imports nothing, so that `--help` may name it."""

from __future__ import annotations

from pathlib import Path

DEMO_FOLDER = Path(__file__).resolve().parent / "demo"
