"""A whole model on a device that is not the processor: no operation of ours mixes host and device, and bits stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from k2lite.demo_checkpoint import DEMO_CONFIG, write_random_model
from k2lite.testing.model_cases import SIZES
from tests.conftest import REPO

# inference_mode is no_grad here: a tensor of Python has no version counter to leave out
HEAD = """
import sys
import torch
torch.set_num_threads(1)
torch.inference_mode = torch.no_grad
from tests.backends import privateuse1
from tests.backends.plain_runtime import PlainRuntime
import k2lite
IDS = [256, *b"any device"]

def logits(backend):
    return k2lite.load(sys.argv[1], backend=backend, host_backend="reference", context=64).logits(IDS)
"""
BACKENDS = {
    "npu": """
from tests.backends.ascend import emulator
from k2lite.backends.ascend.backend import AscendBackend
emulator.install()

def backend(kind):
    return AscendBackend(PlainRuntime(kind))
""",
    "mlu": """
from tests.backends.cambricon import emulator
from k2lite.backends.cambricon.adapter import Operations
from k2lite.backends.cambricon.backend import CambriconBackend

def backend(kind):
    return CambriconBackend(PlainRuntime(kind), Operations(emulator.stand_in("1.3.2")))
""",
}
BODY = """
expected = logits(backend("cpu"))
privateuse1.install(NAME)
there = backend(NAME + ":0")
found = logits(there)
assert found.device.type in ("cpu", NAME), found.device
assert torch.equal(found.cpu(), expected)

# what is planted is seen: a weight that stayed at home
norm = there.rms_norm
there.rms_norm = lambda x, weight, eps: norm(x, weight.cpu(), eps)
try:
    logits(there)
except privateuse1.MixedDevicesError as error:
    print("seen:", error)
"""


@pytest.mark.parametrize(("name", "experts"), [("npu", "int4_g32"), ("mlu", "int4_g64")])
def test_a_model_runs_on_it_and_never_mixes(name: str, experts: str, tmp_path: Path) -> None:
    """In a process of its own, since a device is named once a process."""
    write_random_model(tmp_path / "model", {**DEMO_CONFIG, **SIZES}, experts=experts, trunk="int8_channel", seed=2)
    code = HEAD + BACKENDS[name] + BODY.replace("NAME", repr(name))
    command = [sys.executable, "-c", code, str(tmp_path / "model")]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("seen: aten::mul: 1 tensors of the device and 1 of the host")
