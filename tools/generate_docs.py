"""Fills the generated parts of README.md: the tree, from the files' docstrings, and the help, from the parser.

`--check` changes nothing and exits with 1 if a part is out of date.
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
README = REPO / "README.md"
FOLDERS = ("k2lite", "offload", "backends", "quant", "tools", "tests")
HELP_COLUMNS = "100"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    before = README.read_text(encoding="utf-8")
    after = before
    parts = {"tree": tree}
    # argparse prints options in another way from Python 3.13 on
    if not check or sys.version_info < (3, 13):
        parts["help"] = command_help
    for name, text in ((name, make()) for name, make in parts.items()):
        after = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda match, text=text: f"{match[1]}```\n{text}```\n{match[2]}",  # type: ignore[misc]
            after,
            flags=re.DOTALL,
        )
    if check:
        if before != after:
            print("README.md is out of date: run python tools/generate_docs.py")
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


def tree() -> str:
    """Every folder and Python file with the first sentence of its docstring."""
    return "".join(line + "\n" for folder in FOLDERS for line in _lines(REPO / folder, 0))


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


def command_help() -> str:
    """What `k2lite --help` and each verb's --help print."""
    sys.path.insert(0, str(REPO))
    from k2lite.cli import VERBS

    verbs = [module.__name__.rpartition(".")[2] for module in VERBS]
    return "\n".join(_help_of(arguments) for arguments in ([], *([verb] for verb in verbs)))


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
