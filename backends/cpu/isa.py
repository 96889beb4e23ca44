"""Which instruction set the kernels are built on: the best that the processor has, or what K2LITE_ISA names.

Invariant: a path that the processor can't run never reaches the compiler, which would abort the process. All paths
give equal bits; they differ in the integer dot product and in how wide a register is. Knows no kernel.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from numba.core import config as _config

from k2lite.quant.errors import BackendError

config: Any = _config  # its attributes come from the environment

VARIABLE = "K2LITE_ISA"
# Best first: LLVM's features that each path needs.
X86_NEEDS = {
    "vnni": ("avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "generic": (),
}
ARM_NEEDS = {"neon": ("dotprod",), "generic": ()}
# What the compiler is told when a path below the best is forced, so that it can't use more than that path has.
FORCED_CPU = {"avx2": "haswell", "generic": "x86-64"}


def _needs() -> dict[str, tuple[str, ...]]:
    arm = platform.machine().lower() in {"aarch64", "arm64"}
    return ARM_NEEDS if arm else X86_NEEDS if platform.machine().lower() in {"x86_64", "amd64"} else {"generic": ()}


def available() -> tuple[str, ...]:
    """The paths that this processor can run, best first."""
    if config.CPU_NAME is not None:
        return ("generic",)  # the user chose what Numba compiles for; its features are not known
    features = llvm.get_host_cpu_features()
    return tuple(name for name, needs in _needs().items() if all(features.get(need, False) for need in needs))


@cache
def selected() -> str:
    """The path of this process, fixed by the first call. Raises BackendError for one that can't run here."""
    paths = available()
    name = os.environ.get(VARIABLE, paths[0])
    if name not in paths:
        raise BackendError(f"{VARIABLE} is {name!r}; this processor runs {', '.join(paths)}")
    if name != paths[0] and name in FORCED_CPU and "neon" not in paths:
        config.CPU_NAME, config.CPU_FEATURES = FORCED_CPU[name], ""
    return name
