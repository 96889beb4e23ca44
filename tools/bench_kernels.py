"""Time the CPU kernels at Kimi-K2's sizes beside what the memory and torch give in the same minutes.

    python tools/bench_kernels.py [--json] [--only NAME] [--experts N] [--repeats N]

Every repeat times the kernel, then its ceiling: for cases that the memory bounds, the better of a plain read of as
many bytes and a torch sum; for the others torch's float32 matmul or attention of as many operations, as a peer. Shares
and ratios are medians of the pairs. Believe them only on a machine that does nothing else.
Table on stderr; with --json one object is the last line of stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's threads spin on after a yardstick, beside our kernel
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2lite.backends.base import Assignment, Segment
from k2lite.backends.cpu import isa
from k2lite.backends.cpu.backend import CpuBackend
from k2lite.quant.formats import format_named
from k2lite.quant.types import ExpertWeights, QuantTensor
from tools.memory_read import read_bytes_per_second

HIDDEN, WIDTH, ACTIVE = 7168, 2048, 8
HEADS, NOPE, ROTARY, VALUE, RANK = 64, 128, 64, 128, 512
Timed = Callable[[], float]


def random_weight(format: str, rows: int, columns: int, seed: int) -> QuantTensor:
    """Random stored bytes of touched memory: values are of no matter here, but are finite."""
    generator = torch.Generator().manual_seed(seed)
    form, parts = format_named(format), {}
    for suffix, (dtype, shape) in form.parts((rows, columns)).items():
        if dtype == torch.int32:
            part = torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=torch.int32)
        elif suffix == "weight" and dtype == torch.float8_e4m3fn:
            part = torch.randint(0, 0x78, shape, generator=generator, dtype=torch.uint8).view(dtype)
        else:
            part = (torch.rand(shape, generator=generator) * 0.02 + 0.001).to(dtype)
        parts[suffix] = part
    return QuantTensor(form, (rows, columns), parts)


def copy_of(weight: QuantTensor, backend: CpuBackend) -> QuantTensor:
    parts = {name: backend.upload(part) for name, part in weight.parts.items()}
    return QuantTensor(weight.format, weight.shape, parts)


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Bench:
    """A backend, a set of experts larger than the caches, and the two yardsticks."""

    def __init__(self, experts: int, repeats: int, threads: int | None) -> None:
        self.backend = CpuBackend(threads=threads)
        self.repeats = repeats
        self.random = np.random.default_rng(0)
        self.n_experts = experts
        self._experts: list[ExpertWeights] = []

    @property
    def experts(self) -> list[ExpertWeights]:
        if not self._experts:
            shapes = ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
            first = ExpertWeights(*(random_weight("int4_g32", *shape, seed=i) for i, shape in enumerate(shapes)))
            self._experts = [
                ExpertWeights(*(copy_of(weight, self.backend) for weight in first)) for _ in range(self.n_experts)
            ]
        return self._experts

    def read_rate(self, tensors: Sequence[torch.Tensor]) -> float:
        """Bytes a second: the better of our plain read and a torch sum of the same buffers."""
        ours = read_bytes_per_second(self.backend, tensors)
        words = [tensor.view(torch.int32) if tensor.dtype != torch.int32 else tensor for tensor in tensors]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        torch.set_num_threads(self.backend.threads)
        theirs = nbytes / seconds(lambda: [word.sum(dtype=torch.int64) for word in words])
        torch.set_num_threads(1)
        return max(ours, theirs)

    def ids(self, tokens: int) -> torch.Tensor:
        rows = [np.sort(self.random.permutation(self.n_experts)[:ACTIVE]) for _ in range(tokens)]
        return torch.from_numpy(np.stack(rows))

    def ffn(self, x: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> float:
        used = torch.unique(ids).tolist()
        return seconds(
            lambda: self.backend.expert_ffn(
                x, [Assignment(self.experts[e], *torch.where(ids == e)) for e in used], out
            ).wait()
        )

    def memory_case(self, run: Callable[[int], tuple[float, Sequence[torch.Tensor]]]) -> dict[str, float]:
        """run(i) -> seconds and the weights it read; paired with a read of other buffers of that kind."""
        times, rates, shares = [], [], []
        for i in range(self.repeats + 2):
            took, tensors = run(i)
            rate = sum(tensor.nbytes for tensor in tensors) / took
            ceiling = self.read_rate([tensor for tensor in tensors if tensor.nbytes > 1 << 20])
            if i >= 2:
                times.append(took)
                rates.append(rate)
                shares.append(rate / ceiling)
        return {"ms": median(times) * 1e3, "gb_s": median(rates) / 1e9, "share_of_ceiling": median(shares)}

    def compute_case(self, run: Timed, flop: float, peer: Timed | None, repeats: int) -> dict[str, float]:
        """The peer does as many operations; times_torch is how many times faster ours is."""
        times, ratios = [], []
        run()
        for _ in range(repeats):
            times.append(run())
            if peer is not None:
                torch.set_num_threads(self.backend.threads)
                ratios.append(peer() / times[-1])
                torch.set_num_threads(1)
        result = {"ms": median(times) * 1e3, "gflop_s": flop / median(times) / 1e9}
        if ratios:
            result |= {"times_torch": median(ratios), "torch_ms": median(ratios) * median(times) * 1e3}
        return result


def parts_of(weights: Sequence[QuantTensor]) -> list[torch.Tensor]:
    return [part for weight in weights for part in weight.parts.values()]


def decode(bench: Bench, tokens: int) -> dict[str, float]:
    out = torch.empty(tokens, ACTIVE, HIDDEN)

    def run(_: int) -> tuple[float, list[torch.Tensor]]:
        ids, x = bench.ids(tokens), torch.randn(tokens, HIDDEN)
        took = bench.ffn(x, ids, out)
        return took, parts_of([weight for e in torch.unique(ids).tolist() for weight in bench.experts[e]])

    return bench.memory_case(run)


def prefill(bench: Bench, tokens: int, one_expert: bool) -> dict[str, float]:
    """`tokens` tokens over all experts, or over one."""
    x, out = torch.randn(tokens, HIDDEN), torch.empty(tokens, ACTIVE, HIDDEN)
    ids = torch.zeros(tokens, 1, dtype=torch.int64) if one_expert else bench.ids(tokens)
    flop = 2.0 * ids.numel() * 3 * HIDDEN * WIDTH
    a, b = torch.randn(256, HIDDEN), torch.randn(WIDTH, HIDDEN)
    share = flop / (2 * 256 * HIDDEN * WIDTH)
    return bench.compute_case(lambda: bench.ffn(x, ids, out), flop, lambda: share * seconds(lambda: a @ b.T), 5)


def trunk(bench: Bench, format: str) -> dict[str, float]:
    """o_proj: [7168, 8192], from copies that together are larger than the caches."""
    first = random_weight(format, HIDDEN, HEADS * VALUE, 5)
    copies = [first, *(copy_of(first, bench.backend) for _ in range(4))]
    x = torch.randn(1, HEADS * VALUE)

    def run(i: int) -> tuple[float, list[torch.Tensor]]:
        weight = copies[i % len(copies)]
        return seconds(lambda: bench.backend.linear(x, weight)), list(weight.parts.values())

    return bench.memory_case(run)


def attention(bench: Bench, tokens: int, cached: int) -> dict[str, float]:
    """Beside torch's attention over the same 576 / 512 shape (which leaves kv_b out)."""
    kv_b = random_weight("bf16", HEADS * (NOPE + VALUE), RANK, 6)
    latent = torch.randn(cached, RANK + ROTARY)
    q_nope, q_rope = torch.randn(tokens, HEADS, NOPE), torch.randn(tokens, HEADS, ROTARY)
    segment = [Segment(0, tokens, latent)]
    query = torch.randn(1, HEADS, tokens, RANK + ROTARY)
    keys = latent.expand(1, HEADS, -1, -1)
    causal = torch.ones(tokens, cached, dtype=torch.bool).tril(cached - tokens)
    seen = sum(cached - tokens + t + 1 for t in range(tokens))

    def ours() -> float:
        return seconds(lambda: bench.backend.attention(q_nope, q_rope, segment, kv_b, 0.1))

    def theirs() -> float:
        scaled = torch.nn.functional.scaled_dot_product_attention
        return seconds(lambda: scaled(query, keys, keys[..., :RANK], attn_mask=causal, scale=0.1))

    flop = 2.0 * HEADS * seen * (2 * RANK + ROTARY) + 2.0 * tokens * HEADS * RANK * (NOPE + VALUE)
    return bench.compute_case(ours, flop, theirs, 5)


CASES: dict[str, Callable[[Bench], dict[str, float]]] = {
    "decode_1": lambda bench: decode(bench, 1),
    "decode_2": lambda bench: decode(bench, 2),
    "decode_4": lambda bench: decode(bench, 4),
    "prefill_256": lambda bench: prefill(bench, 256, False),
    "prefill_one_expert_32": lambda bench: prefill(bench, 32, True),
    "prefill_one_expert_256": lambda bench: prefill(bench, 256, True),
    "trunk_fp8": lambda bench: trunk(bench, "fp8_e4m3_b128"),
    "trunk_int8": lambda bench: trunk(bench, "int8_g128"),
    "trunk_bf16": lambda bench: trunk(bench, "bf16"),
    "attention_decode_8k": lambda bench: attention(bench, 1, 8192),
    "attention_prefill_256": lambda bench: attention(bench, 256, 1024),
}


def chosen(only: Sequence[str]) -> Iterator[tuple[str, Callable[[Bench], dict[str, float]]]]:
    for name, case in CASES.items():
        if not only or name in only:
            yield name, case


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], choices=CASES, metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--experts", type=int, default=64, metavar="N", help="experts in memory, 24.8 MB each")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="pairs of a memory-bound case")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = parser.parse_args()
    began = time.perf_counter()
    bench = Bench(args.experts, args.repeats, args.threads)
    ready = time.perf_counter() - began
    cases: dict[str, dict[str, float]] = {}
    print(f"path {isa.selected()}, {bench.backend.threads} threads, kernels ready in {ready:.2f} s", file=sys.stderr)
    for name, case in chosen(args.only):
        cases[name] = case(bench)
        numbers = "  ".join(f"{key} {value:.3g}" for key, value in cases[name].items())
        print(f"{name:<24} {numbers}", file=sys.stderr, flush=True)
    if args.json:
        facts = {"isa": isa.selected(), "threads": bench.backend.threads, "ready_s": ready}
        print(json.dumps({**facts, "peers": {"torch": torch.__version__}, "cases": cases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
