"""What `k2lite backends` says of a chip that is not there, closed, too old or ready, with the vendor's module faked."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from k2lite.backends.ascend import npu_device
from k2lite.backends.cambricon import mlu_device
from k2lite.backends.spec import Probe

from .cambricon.emulator import stand_in


def module(name: str | None) -> SimpleNamespace:
    """As torch's module of the vendor answers; None: no chip."""
    return SimpleNamespace(
        is_available=lambda: name is not None,
        device_count=lambda: 1,
        get_device_name=lambda _: name,
        mem_get_info=lambda _: (30 << 30, 32 << 30),
    )


@pytest.fixture(params=["npu", "mlu"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def probe(monkeypatch: pytest.MonkeyPatch, kind: str, name: str | None, nodes: Path) -> Probe:
    if kind == "npu":
        monkeypatch.setattr(npu_device, "_npu", lambda: module(name))
        return npu_device.probe("torch_npu 2.14.0", nodes)
    monkeypatch.setattr(mlu_device, "_mlu", lambda: module(name))
    return mlu_device.probe("torch_mlu 1.28.0", stand_in("1.3.2"), nodes)


NODES = {"npu": "davinci0", "mlu": "cambricon_dev0"}


def test_no_node(monkeypatch: pytest.MonkeyPatch, kind: str, tmp_path: Path) -> None:
    found = probe(monkeypatch, kind, None, tmp_path)
    assert not found.ready
    assert f"there is no device node {tmp_path}/{NODES[kind][:-1]}*" in found.reason


def test_a_node_without_permission(monkeypatch: pytest.MonkeyPatch, kind: str, tmp_path: Path) -> None:
    (tmp_path / NODES[kind]).touch()
    assert "is there; see" in probe(monkeypatch, kind, None, tmp_path).reason
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"no permission for {tmp_path}/{NODES[kind]}" in probe(monkeypatch, kind, None, tmp_path).reason


def test_a_chip_is_ready_and_called_emulated(monkeypatch: pytest.MonkeyPatch, kind: str, tmp_path: Path) -> None:
    found = probe(monkeypatch, kind, {"npu": "Ascend910B3", "mlu": "MLU590"}[kind], tmp_path)
    assert found.ready
    assert "emulated only: please run k2lite backends test" in found.reason
    assert found.devices[0].memory_bytes == 32 << 30


def test_a_chip_without_the_formats_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = probe(monkeypatch, "npu", "Ascend310P3", tmp_path)
    assert (found.ready, found.reason.split(" has no")[0]) == (False, "Ascend310P3")


def test_a_library_that_calls_otherwise_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlu_device, "_mlu", lambda: module("MLU590"))
    other = stand_in("1.3.2")
    del other.group_gemm
    found = mlu_device.probe("torch_mlu 1.28.0", other)
    assert (found.ready, found.reason) == (False, "torch_mlu_ops 1.3.2 has no group_gemm")
