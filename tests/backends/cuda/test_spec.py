"""What the CUDA backend says of itself where there is no card, and what asking costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from types import ModuleType

import pytest
import torch

from k2lite.backends.cuda import spec as cuda
from k2lite.backends.registry import find, open_backend
from k2lite.errors import BackendError
from tests.conftest import REPO


def test_it_says_what_stands_behind_it() -> None:
    assert cuda.spec().evidence_text() == "interpreter-tested, not run on hardware"
    assert "bf16 activations" in cuda.CAPABILITIES.arithmetic


def test_another_triton_is_refused_by_number() -> None:
    other = ModuleType("triton")
    other.__version__ = "3.9.0"  # type: ignore[attr-defined]
    probe = cuda._found(other)
    assert not probe.ready
    assert "triton is 3.9.0, and the kernels need 3.6.0: pip install 'k2lite[cuda]'" in probe.reason


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_a_card_it_is_an_error_and_nothing_else() -> None:
    assert not find("cuda").probe().ready
    with pytest.raises(BackendError, match="backend cuda is not ready"):
        open_backend("cuda")


def test_triton_is_in_the_extra_and_nowhere_else() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["cuda"] == [f"triton=={cuda.TRITON}"]
    assert not [name for name in project["dependencies"] if name.startswith("triton")]


def test_listing_backends_imports_no_triton() -> None:
    code = "import sys; from k2lite.backends.registry import find; find('cuda'); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
