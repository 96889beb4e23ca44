"""What a processor is called, on machines of other kinds."""

from __future__ import annotations

import platform
from pathlib import Path

from k2lite.backends.processor import processor

X86 = """processor\t: 0
model name\t: Some Processor 9000
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni
processor\t: 1
model name\t: Some Processor 9000
flags\t\t: fpu sse2
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def test_name_and_what_kernels_are_chosen_by(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(X86)
    found = processor("lib 1.0", file)
    assert found.name.startswith(f"Some Processor 9000, {platform.machine()}, AVX2, AVX-512, AVX-512 VNNI, ")
    assert found.name.endswith(" cores")
    assert found.driver == "lib 1.0"
    file.write_text(ARM)
    assert processor("lib 1.0", file).name.startswith(f"{platform.machine()}, dot product, i8mm, ")


def test_without_a_list_of_features_it_still_has_a_name(tmp_path: Path) -> None:
    found = processor("lib 1.0", tmp_path / "none")
    assert found.name.startswith(f"{platform.machine()}, ")
    assert found.memory_bytes is not None
    assert found.memory_bytes > 0
