"""Time the CUDA backend's kernels at Kimi-K2's sizes on a card, beside what its memory, its link and torch give.

    python tools/bench_cuda.py [--only WORD] [--repeats N] [--json]

Every repeat times the kernel, then its yardstick: a device-to-device copy (bytes read and written), torch's BF16
matmul, or a copy from pinned memory. Shares are medians of the pairs; a bar is met where the share reaches it. Weights
are drawn anew from a pool larger than the card's cache, so no repeat finds its bytes there. Needs a card that does
nothing else. Table on stderr; with --json one object is the last line of stdout.

Not run on hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2lite.backends.base import Segment
from k2lite.backends.cuda.experts import (
    Work,
    addresses,
    expert_kind,
    multiply_experts,
    tile_size,
    tiles,
)
from k2lite.backends.cuda.products import prepare
from k2lite.backends.registry import open_backend
from k2lite.quant.errors import K2LiteError
from k2lite.quant.formats import format_named
from k2lite.quant.types import ExpertWeights, QuantTensor

EXPERTS, ACTIVE, HIDDEN, WIDTH = 384, 8, 7168, 2048
HEADS, NOPE, ROTARY, VALUE, RANK = 64, 128, 64, 128, 512
POOL_BYTES = 1 << 30  # of weights that repeats draw from: many times any card's cache
COPY_BYTES = 1 << 30
Start = Callable[[int], object]  # the repeat's number -> starts the work


@dataclass(frozen=True)
class Bar:
    """A row of the table. share: of the yardstick, or times a bound where `most`; bar: what it is to reach, 0 for
    nothing."""

    name: str
    seconds: float
    share: float
    bar: float
    goal: float | None
    most: bool
    met: bool


class Card:
    """Seeded weights on the card, and the clock."""

    def __init__(self, repeats: int) -> None:
        self.backend = open_backend("cuda")
        self.device = self.backend.device
        self.repeats = repeats
        self._random = torch.Generator(self.device).manual_seed(0)

    def weight(self, format: str, outputs: int, columns: int) -> QuantTensor:
        kind, parts = format_named(format), {}
        for name, (dtype, shape) in kind.parts((outputs, columns)).items():
            codes = torch.randint(0, 0x70, (*shape, dtype.itemsize), device=self.device, generator=self._random)
            if name == "weight_packed" or dtype == torch.float8_e4m3fn:
                parts[name] = codes.to(torch.uint8).view(dtype).view(shape)
            else:
                parts[name] = (codes[..., 0] * 1e-4 + 1e-3).to(dtype)
        return QuantTensor(kind, (outputs, columns), parts)

    def pool(self, format: str, outputs: int, columns: int) -> list[QuantTensor]:
        nbytes = format_named(format).nbytes((outputs, columns))
        return [self.weight(format, outputs, columns) for _ in range(max(2, POOL_BYTES // nbytes))]

    def expert(self, format: str) -> ExpertWeights:
        gate, up = (self.weight(format, WIDTH, HIDDEN) for _ in range(2))
        return ExpertWeights(gate, up, self.weight(format, HIDDEN, WIDTH))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self._random)

    def seconds(self, work: Start, number: int) -> float:
        """Of one start of the work, by the card's own clock."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work(number)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def graph(self, work: Start) -> Start:
        """The same launches without the host: what a captured trunk would run."""
        work(0)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work(0)
        return lambda _: captured.replay()

    def paired(self, work: Start, yardstick: Start) -> tuple[float, float]:
        """Medians: seconds of the work, and the yardstick's seconds over the work's."""
        for warm in range(3):
            work(warm)
            yardstick(warm)
        pairs = [(self.seconds(work, n), self.seconds(yardstick, n)) for n in range(self.repeats)]
        return median(a for a, _ in pairs), median(b / a for a, b in pairs)

    def copy(self) -> Start:
        source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2))
        return lambda _: target.copy_(source)

    def bandwidth(self, name: str, work: Start, nbytes: int, bar: float, goal: float | None = None) -> Bar:
        """A copy of half as many bytes reads and writes as many as the work reads."""
        spent, ratio = self.paired(work, self.copy())
        share = ratio * nbytes / (2 * COPY_BYTES)
        return Bar(name, spent, share, bar, goal, False, share >= bar)


def decode_experts(card: Card) -> Iterator[Bar]:
    """8 of 384 experts, addresses changed between replays of one graph."""
    pool = [card.expert("int4_g32") for _ in range(64)]
    kind = expert_kind(pool[0])
    assert kind is not None
    nbytes = sum(matrix.nbytes for matrix in pool[0])
    single = None
    for tokens in (1, 4, 16):
        chosen = torch.stack([torch.randperm(len(pool))[:ACTIVE] for _ in range(tokens)]).flatten()
        distinct, counts = torch.unique(chosen, return_counts=True)
        order = torch.argsort(chosen, stable=True)
        lists = torch.tensor(tiles(counts.tolist(), tile_size(16)), dtype=torch.int32, device=card.device)
        tables = [
            torch.tensor([addresses(pool[(int(e) + 9 * n) % len(pool)]) for e in distinct], device=card.device)
            for n in range(8)
        ]
        work = Work(
            tables[0].clone(), lists, (order // ACTIVE).to(card.device, torch.int32), order.to(card.device, torch.int32)
        )
        x, out = prepare(card.normal(tokens, HIDDEN), kind.kinds[0]), card.normal(tokens * ACTIVE, HIDDEN)
        replay = card.graph(lambda _, x=x, work=work, out=out: multiply_experts(x, work, kind, out, 16))

        def start(n: int, work: Work = work, tables: list[torch.Tensor] = tables, replay: Start = replay) -> None:
            work.table.copy_(tables[n % len(tables)])
            replay(n)

        read = nbytes * len(distinct)
        row = card.bandwidth(f"INT4 expert block, {tokens} tokens, {len(distinct)} experts", start, read, 0.60, 0.75)
        if single is None:
            single = row.seconds / read
            yield row
        else:
            times = row.seconds / (single * read)
            yield Bar(f"{row.name}, times the bytes' time", row.seconds, times, 1.3, None, True, times <= 1.3)


def trunk(card: Card) -> Iterator[Bar]:
    shapes = {"q_a": (1536, HIDDEN), "q_b": (HEADS * (NOPE + ROTARY), 1536), "o": (HIDDEN, HEADS * VALUE)}
    for format in ("fp8_e4m3_b128", "bf16", "int8_g128", "int4_g32"):
        for name, shape in shapes.items():
            pool, x = card.pool(format, *shape), card.normal(1, shape[1])
            bar = 0.75 if format in ("fp8_e4m3_b128", "bf16") else 0.0
            yield card.bandwidth(
                f"{format} GEMV {name}, 1 token",
                lambda n, pool=pool, x=x: card.backend.linear(x, pool[n % len(pool)]),
                pool[0].nbytes,
                bar,
            )


def attention(card: Card) -> Iterator[Bar]:
    cached = 8192
    caches = [card.normal(cached, RANK + ROTARY) for _ in range(64)]
    kv_b = card.weight("fp8_e4m3_b128", HEADS * (NOPE + VALUE), RANK)
    q_nope, q_rope = card.normal(1, HEADS, NOPE), card.normal(1, HEADS, ROTARY)

    def start(n: int) -> object:
        return card.backend.attention(q_nope, q_rope, [Segment(0, 1, caches[n % len(caches)])], kv_b, 0.1)

    yield card.bandwidth(f"MLA decode, {cached} tokens", start, caches[0].nbytes + kv_b.nbytes, 0.60)


def prefill(card: Card) -> Iterator[Bar]:
    """Grouped products of 4,096 tokens; a pool of experts stands for 384, each read from memory."""
    tokens = 4096
    pool = [card.expert("int4_g32") for _ in range(64)]
    kind = expert_kind(pool[0])
    assert kind is not None
    chosen = torch.rand(tokens, EXPERTS).topk(ACTIVE).indices.flatten()
    counts = torch.bincount(chosen, minlength=EXPERTS)
    order = torch.argsort(chosen, stable=True)
    size = tile_size(int(counts.max()))
    work = Work(
        torch.tensor([addresses(pool[e % len(pool)]) for e in range(EXPERTS)], device=card.device),
        torch.tensor(tiles(counts.tolist(), size), dtype=torch.int32, device=card.device),
        (order // ACTIVE).to(card.device, torch.int32),
        order.to(card.device, torch.int32),
    )
    x, out = prepare(card.normal(tokens, HIDDEN), kind.kinds[0]), card.normal(tokens * ACTIVE, HIDDEN)
    side = 8192
    a, b = (card.normal(side, side).bfloat16() for _ in range(2))
    spent, ratio = card.paired(lambda _: multiply_experts(x, work, kind, out, size), lambda _: a @ b)
    share = ratio * (6 * tokens * ACTIVE * HIDDEN * WIDTH) / (2 * side**3)
    yield Bar("prefill, 4096 tokens, 384 experts, of the BF16 rate", spent, share, 0.25, 0.40, False, share >= 0.25)


PARTS: dict[str, Callable[[Card], Iterator[Bar]]] = {
    "experts": decode_experts,
    "trunk": trunk,
    "attention": attention,
    "prefill": prefill,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(PARTS), help="one part of the table")
    parser.add_argument("--repeats", type=int, default=50, help="pairs that a median is taken of (50)")
    parser.add_argument("--json", action="store_true", help="one object as the last line of stdout")
    options = parser.parse_args(arguments)
    card = Card(options.repeats)
    rows = []
    with torch.inference_mode():
        for name, part in PARTS.items():
            if options.only in (None, name):
                for row in part(card):
                    rows.append(row)
                    said = "met" if row.met else "MISSED"
                    print(
                        f"{row.name:60} {row.seconds * 1e6:10.1f} us {row.share:6.3f} ({row.bar}) {said}",
                        file=sys.stderr,
                    )
    if options.json:
        name = torch.cuda.get_device_name(card.device)
        facts = {"device": name, "torch": torch.__version__, "arithmetic": card.backend.capabilities().arithmetic}
        print(json.dumps({**facts, "bars": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except K2LiteError as error:
        print(f"bench_cuda: {error}", file=sys.stderr)
        sys.exit(2)
