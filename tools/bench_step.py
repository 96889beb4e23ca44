"""Times a whole decode step beside the sum of its kernels, and llama.cpp's beside both if it is there.

    python tools/make_slice.py SLICE --format int4 --experts 64 --vocab 32768 --trunk int8_g128 --lm-head int8_g128
    k2lite export SLICE SLICE.gguf --type q4_0      # the same for llama.cpp
    python tools/bench_step.py SLICE [--gguf SLICE.gguf --llama-python PYTHON] [--json]

A step is `Engine.step` of one token with all experts in RAM. The kernels are the same operations with the same inputs,
called one behind another; what counts of them is the time inside of the compute team. Each pair is a step and then its
kernels; the ratio is the median of the pairs. llama.cpp (a Python with llama_cpp, and the slice as a GGUF file) takes
turns with both, in a process of its own. Beside them the milliseconds a token of the bundled demo. Believe the numbers
only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import k2lite
from k2lite.backends.cpu.backend import CpuBackend
from k2lite.backends.cpu.compute_team import ComputeTeam
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.engine import Chunk, Sequence
from tools.peer_process import Peer

OPERATIONS = ("linear", "mlp", "expert_ffn", "rms_norm", "rope", "router", "combine", "attention")
PROMPT = 128
TURN = 8  # tokens of a turn with llama.cpp
# Reads a number of tokens from each line of stdin; decodes so many, or prefills where it is negative; prints seconds.
PEER = """
import sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=int(sys.argv[2]),
              n_threads_batch=int(sys.argv[2]), verbose=False)
def run(tokens):
    began = time.perf_counter()
    if tokens < 0:
        model.reset()
        model.eval([(7 * i) % 250 + 1 for i in range(-tokens)])
    else:
        for i in range(tokens):
            model.eval([i % 250 + 1])
    return time.perf_counter() - began
for line in sys.stdin:
    print(run(int(line)), flush=True)
"""


class Decoding:
    """A sequence of an engine that grows by a token a step."""

    def __init__(self, engine: k2lite.Engine) -> None:
        self.engine = engine
        self.sequence: Sequence = engine.open()
        ids = [(7 * i + i * i) % 250 for i in range(PROMPT)]
        self.logits = engine.step([Chunk(self.sequence, ids)])[0][0]
        for _ in range(3):
            self.step()

    def step(self) -> float:
        token = int(self.logits.argmax())
        began = time.perf_counter()
        self.logits = self.engine.step([Chunk(self.sequence, [token])])[0][0]
        return time.perf_counter() - began


@contextmanager
def replaced(owner: type, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


def record_step(decoding: Decoding) -> list[tuple[str, tuple[Any, ...]]]:
    """The operations of one step and their inputs."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    depth = [0]

    def recording(name: str) -> Callable[..., Any]:
        original = getattr(CpuBackend, name)

        def call(backend: CpuBackend, *arguments: Any) -> Any:
            depth[0] += 1
            try:
                return original(backend, *arguments)
            finally:
                depth[0] -= 1
                if not depth[0]:
                    found.append((name, arguments))

        return call

    originals = {name: getattr(CpuBackend, name) for name in OPERATIONS}
    try:
        for name in OPERATIONS:
            setattr(CpuBackend, name, recording(name))
        decoding.step()
    finally:
        for name, original in originals.items():
            setattr(CpuBackend, name, original)
    return found


def kernel_seconds(backend: CpuBackend, operations: list[tuple[str, tuple[Any, ...]]]) -> tuple[float, int]:
    """Seconds inside of the compute team, and how often it was called."""
    original, times = ComputeTeam.run, list[float]()

    def run(team: ComputeTeam, *arguments: Any) -> None:
        began = time.perf_counter()
        original(team, *arguments)
        times.append(time.perf_counter() - began)

    with torch.inference_mode(), replaced(ComputeTeam, "run", run):
        for name, arguments in operations:
            getattr(backend, name)(*arguments)
    return sum(times), len(times)


def measure_step(decoding: Decoding, repeats: int) -> dict[str, float]:
    backend = decoding.engine.backend
    assert isinstance(backend, CpuBackend)
    operations = record_step(decoding)
    steps, kernels, launches = [], [], 0
    for _ in range(repeats):
        steps.append(decoding.step())
        seconds, launches = kernel_seconds(backend, operations)
        kernels.append(seconds)
    ratios = [step / sum_of_kernels for step, sum_of_kernels in zip(steps, kernels, strict=True)]
    return {
        "ms": 1e3 * median(steps),
        "kernels_ms": 1e3 * median(kernels),
        "times_kernels": median(ratios),
        "launches": launches,
        "tokens_s": 1 / median(steps),
    }


def measure_beside(decoding: Decoding, peer: Peer, turns: int) -> dict[str, float]:
    """Tokens a second of both in turns, decode and then prefill of a prompt."""
    peer.seconds(-PROMPT)
    peer.seconds(TURN)
    ours, theirs, ratios = [], [], []
    for _ in range(turns):
        ours.append(TURN / sum(decoding.step() for _ in range(TURN)))
        theirs.append(TURN / peer.seconds(TURN))
        ratios.append(ours[-1] / theirs[-1])
    prefill_ours, prefill_theirs = [], []
    for _ in range(3):
        with decoding.engine.open() as sequence:
            began = time.perf_counter()
            decoding.engine.prefill(sequence, [(7 * i) % 250 + 1 for i in range(PROMPT)])
            prefill_ours.append(PROMPT / (time.perf_counter() - began))
        prefill_theirs.append(PROMPT / peer.seconds(-PROMPT))
    return {
        "tokens_s_in_turns": median(ours),
        "llama_cpp_tokens_s": median(theirs),
        "times_llama_cpp": median(ratios),
        "prefill_tokens_s": median(prefill_ours),
        "llama_cpp_prefill_tokens_s": median(prefill_theirs),
    }


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slice", type=Path, metavar="SLICE", help="a folder of tools/make_slice.py")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="pairs (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--gguf", metavar="FILE", help="llama.cpp's slice")
    parser.add_argument("--llama-python", metavar="PYTHON", help="a Python that has llama_cpp")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}

    def tell(name: str, found: dict[str, float]) -> None:
        results[name] = found
        print(f"{name:<8} " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()), file=sys.stderr)

    with k2lite.load(DEMO_FOLDER, backend="cpu", context=1024, threads=args.threads) as engine:
        tell("demo", measure_step(Decoding(engine), args.repeats))
    with k2lite.load(args.slice, backend="cpu", context=1024, threads=args.threads) as engine:
        if engine.placement.slots < engine.placement.experts:
            parser.error(f"{args.slice}: not all experts have room in RAM ({engine.placement.slots} have)")
        decoding = Decoding(engine)
        for _ in range(args.repeats):
            decoding.step()  # most experts are read at their first use
        tell("slice", measure_step(decoding, args.repeats))
        if args.gguf and args.llama_python:
            threads = engine.backend.threads  # type: ignore[attr-defined]
            with Peer(args.llama_python, PEER, args.gguf, str(threads)) as peer:
                tell("peer", measure_beside(decoding, peer, max(3, args.repeats // TURN)))
    if args.json:
        print(json.dumps({"torch": torch.__version__, "cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
