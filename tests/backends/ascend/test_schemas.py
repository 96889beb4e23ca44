"""The table of schemas: every call fits it, another declaration is seen, and the real wheel's own if there is one."""

from __future__ import annotations

import importlib.metadata
import os
import zipfile
from pathlib import Path

import pytest
import torch

from k2lite.backends.ascend import spec
from k2lite.backends.ascend.schemas import SCHEMAS, VERSIONS, declaration, differences, installed

from . import emulator

YAML = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"


def parsed(**changed: str) -> dict[str, object]:
    found = {name: torch._C.parse_schema(f"npu::{declaration(name)}") for name in SCHEMAS}
    found |= {name: torch._C.parse_schema(f"npu::{name}{text}") for name, text in changed.items()}
    return found


def test_what_the_dispatcher_has_is_what_the_table_says() -> None:
    emulator.install()
    assert differences(installed()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(Tensor self, int dim=-1, bool fast=False) -> Tensor", None),
        ("(Tensor x, int dim=-1) -> Tensor", "npu_swiglu has no self"),
        ("(Tensor self, int axis=-1) -> Tensor", "npu_swiglu has no dim"),
        ("(Tensor self, *, int dim=-1) -> Tensor", "npu_swiglu declares dim otherwise"),
        ("(Tensor self, bool fast, int dim=-1) -> Tensor", "npu_swiglu declares dim otherwise"),
        ("(Tensor self, int dim=1) -> Tensor", "npu_swiglu declares dim otherwise"),
        ("(Tensor[] self, int dim=-1) -> Tensor", "npu_swiglu declares self otherwise"),
    ],
)
def test_another_declaration_is_seen(text: str, said: str | None) -> None:
    wrong = differences(parsed(npu_swiglu=text))
    assert len(wrong) == (said is not None)
    assert said is None or wrong[0].startswith(said)


def test_a_missing_operation_is_seen() -> None:
    found = parsed()
    del found["npu_swiglu"]
    assert differences(found) == ["npu_swiglu is missing"]


def test_the_real_wheel_declares_what_the_table_says() -> None:
    """TORCH_NPU_WHEEL may name a wheel that is not installed."""
    yaml = pytest.importorskip("yaml")
    version, text = _vendor_file()
    declared = {}
    for section in yaml.safe_load(text).values():
        for entry in section if isinstance(section, list) else []:
            line = entry.get("func", "") if isinstance(entry, dict) else ""
            name = line.partition("(")[0]
            if name in SCHEMAS:
                declared[name] = torch._C.parse_schema(f"npu::{line}")
    assert differences(declared) == []
    assert version in VERSIONS


def _vendor_file() -> tuple[str, str]:
    if "TORCH_NPU_WHEEL" in os.environ:
        wheel = Path(os.environ["TORCH_NPU_WHEEL"])
        return wheel.name.split("-")[1], zipfile.ZipFile(wheel).read(YAML).decode()
    try:
        package = importlib.metadata.distribution("torch-npu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torch_npu is not here: its own schemas can't be compared (TORCH_NPU_WHEEL names a wheel)")
    return package.version, Path(str(package.locate_file(YAML))).read_text(encoding="utf-8")


def test_the_list_says_what_is_missing_and_never_more_than_emulated() -> None:
    found = spec.spec()
    assert found.probe().reason == "the package torch_npu is not installed" or found.probe().error is not None
    assert found.evidence_text() == "emulated; not run on hardware"
    assert "fp8_e4m3_b128" not in found.capabilities.formats
