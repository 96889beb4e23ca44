"""Writes docs/structure.md, from the files' docstrings, and docs/commands.md, from the parser.

`--check` changes nothing and exits with 1 if one is out of date.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
DOCS = REPO / "docs"
FOLDERS = ("k2lite", "offload", "backends", "quant", "tools", "tests")
HELP_COLUMNS = "100"
MADE_BY = "Made by `python tools/generate_docs.py`; a test holds it to the code."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    pages = {"structure.md": structure}
    # argparse prints options in another way from Python 3.13 on
    if not check or sys.version_info < (3, 13):
        pages["commands.md"] = commands
    outdated = []
    for name, make in pages.items():
        page, text = DOCS / name, make()
        if check and (not page.is_file() or page.read_text(encoding="utf-8") != text):
            outdated.append(name)
        elif not check:
            page.write_text(text, encoding="utf-8")
    for name in outdated:
        print(f"docs/{name} is out of date: run python tools/generate_docs.py")
    return int(bool(outdated))


def structure() -> str:
    """The page of the tree: every folder and Python file with the first sentence of its docstring."""
    parts = [
        "# Structure\n\nEvery folder and file with the first sentence that it says of itself. A folder imports only"
        f"\nwhat comes after it: k2lite, offload, backends, quant.\n\n{MADE_BY}\n"
    ]
    for folder in FOLDERS:
        lines = "".join(line + "\n" for line in _lines(REPO / folder, 0))
        parts.append(f"\n## {folder}\n\n```\n{lines}```\n")
    return "".join(parts)


def _lines(folder: Path, level: int) -> Iterator[str]:
    yield _entry(f"{folder.name}/", folder / "__init__.py", level)
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in entries:
        if path.is_symlink():
            yield f"{'  ' * (level + 1) + path.name:<34} -> ../{path.name}"
        elif path.is_dir() and any(path.glob("*.py")):
            yield from _lines(path, level + 1)
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield _entry(path.name, path, level + 1)


def _entry(name: str, documented: Path, level: int) -> str:
    docstring = None
    if documented.is_file():
        docstring = ast.get_docstring(ast.parse(documented.read_text(encoding="utf-8")))
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.;?])\s", paragraph)[0].rstrip(".;")
    return f"{'  ' * level + name:<34} {sentence}".rstrip()


def commands() -> str:
    """The page of all commands: what `k2lite --help` and each verb's --help print."""
    sys.path.insert(0, str(REPO))
    from k2lite.cli import VERBS

    verbs = [[], *([module.__name__.rpartition(".")[2]] for module in VERBS)]
    parts = [f"\n## {' '.join(['k2lite', *verb])}\n\n```\n{_help_of(verb)}```\n" for verb in verbs]
    return f"# Commands\n\n{MADE_BY}\n" + "".join(parts)


def _help_of(arguments: list[str]) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "k2lite", *arguments, "--help"],
        cwd=REPO,
        env={**os.environ, "COLUMNS": HELP_COLUMNS, "PYTHON_COLORS": "0", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return f"$ k2lite {' '.join([*arguments, '--help'])}\n{result.stdout}"


if __name__ == "__main__":
    sys.exit(main())
