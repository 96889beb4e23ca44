"""The processor as a device: what `k2lite backends` and a report of the conformance suite call it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from .host_memory import host_memory
from .spec import Device

# What kernels are chosen by, as Linux names it (x86-64, then aarch64).
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX",
    "asimddp": "dot product",
    "i8mm": "i8mm",
}


def processor(driver: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> Device:
    """`driver` is the library that multiplies, with its version."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = [line.partition(":") for line in text.splitlines()]
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    flags = next((value.split() for key, _, value in lines if key.strip() in ("flags", "Features")), [])
    features = [spoken for flag, spoken in _FEATURES.items() if flag in flags]
    name = ", ".join([*names[:1], platform.machine(), *features, f"{os.cpu_count()} cores"])
    return Device(name, driver, host_memory().total_bytes)
