"""Compiles launches for cards that are not here, and reads what the assembler says of them.

    python -m tests.backends.cuda.compiling CARD CASE [CARD CASE ...]

CARD is a compute capability without its dot (80, 89, 90), CASE a name of k2_launches.CASES or "all". A line of JSON for
each kernel: registers of a thread, bytes of its spills, bytes of shared memory of a program. Without the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from k2lite.backends.cuda.launch import Launch
from tests.backends.cuda.k2_launches import CASES, launches

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(launch: Launch, card: int) -> Any:
    """The kernel as Triton's own launcher would have it: 1 is a constant, multiples of 16 are known to be such."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = dict.fromkeys(names, "constexpr")
    constants, attributes = dict(launch.constants), {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            constants[name] = 1
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def usage(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
    spills = found["STACK"] + found["LOCAL"]
    return {"registers": found["REG"], "spill_bytes": spills, "shared_bytes": int(kernel.metadata.shared)}


def main(arguments: list[str]) -> None:
    seen = set()
    for card, asked in zip(arguments[::2], arguments[1::2], strict=True):
        for case in CASES if asked == "all" else [asked]:
            for launch in launches(case):
                kernel = compiled(launch, int(card))
                if (card, kernel.hash) in seen:
                    continue
                seen.add((card, kernel.hash))
                facts = {"card": int(card), "case": case, "kernel": launch.kernel.fn.__name__, **usage(kernel)}
                print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
