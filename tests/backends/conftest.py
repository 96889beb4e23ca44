"""The demo model as folders that a chip's backend takes, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from k2lite.cli import main
from k2lite.demo_folder import DEMO_FOLDER


@pytest.fixture(scope="session")
def demo_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The shipped demo with experts in the format of that name and an INT8 trunk."""

    @cache
    def folder(experts: str) -> Path:
        made = tmp_path_factory.mktemp("demo") / experts
        assert main(["quantize", str(DEMO_FOLDER), str(made), "--experts", experts, "--trunk", "int8_channel"]) == 0
        return made

    return folder
