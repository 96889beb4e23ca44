"""Times K2's expert block beside kt-kernel's RAWINT4 on the same bytes, in turns.

    python tools/bench_kt_kernel.py LAYER [--python PYTHON] [--extra-path PATH] [--json]

LAYER is a folder with one layer of 64 experts, written here if it is missing (1.6 GB). PYTHON has torch and kt_kernel,
or finds kt_kernel under PATH. kt-kernel needs neither its own torch nor a GPU: asked for pinned memory, it gets plain.
The times are those of the whole call of each: ours with the choice of experts as the model makes it and the weighted
sum, theirs `forward`. Ratios are medians of the pairs. At one token a plain read of as many experts takes a turn too,
and says which share of its speed each reaches. The peer is stopped while it is not its turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2lite.backends.base import Assignment
from k2lite.backends.cpu.backend import CpuBackend
from k2lite.expert_work import tokens_by_expert
from k2lite.quant.formats import format_named
from k2lite.quant.types import PROJECTIONS, ExpertWeights, QuantTensor
from tools.memory_read import read_bytes_per_second
from tools.peer_process import Peer

HIDDEN, WIDTH, EXPERTS, ACTIVE = 7168, 2048, 64, 8
SHAPES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
TURN = 9  # calls of one token in a turn; its median counts, as who was stopped wakes up slowly
PEER = """
import os, sys, time
from statistics import median
os.environ["KT_FORCE_SYNC_SUBMIT"] = "1"  # else the work is queued on a CUDA stream that does not exist
import torch
def without_pinning(function):
    return lambda *args, **kwargs: (kwargs.pop("pin_memory", None), function(*args, **kwargs))[1]
for name in ("zeros", "empty", "ones", "full"):
    setattr(torch, name, without_pinning(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # it talks on stdout
from kt_kernel import KTMoEWrapper
moe = KTMoEWrapper(layer_idx=1, num_experts=64, num_experts_per_tok=8, hidden_size=7168, moe_intermediate_size=2048,
                   gpu_experts_mask=None, cpuinfer_threads=int(sys.argv[2]), threadpool_count=1,
                   weight_path=sys.argv[1], chunked_prefill_size=512, method="RAWINT4")
moe.load_weights(torch.arange(64, dtype=torch.int64))
generator = torch.Generator().manual_seed(1)
for line in sys.stdin:
    tokens, times = int(line), []
    for _ in range(TURN if tokens == 1 else 1):
        x = torch.randn(tokens, 7168, generator=generator).to(torch.bfloat16)
        ids = torch.stack([torch.randperm(64, generator=generator)[:8] for _ in range(tokens)])
        weights = torch.rand(tokens, 8, generator=generator)
        began = time.perf_counter()
        moe.forward(x, ids, weights, 0)
        times.append(time.perf_counter() - began)
    print(median(times), file=answers, flush=True)
""".replace("TURN", str(TURN))


def write_layer(path: Path) -> None:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for expert in range(EXPERTS):
        for name, (rows, columns) in SHAPES.items():
            at = f"model.layers.1.mlp.experts.{expert}.{name}."
            tensors[at + "weight_packed"] = torch.randint(
                -(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32, generator=generator
            )
            scale = torch.rand(rows, columns // 32, generator=generator) * 0.002 + 0.001
            tensors[at + "weight_scale"] = scale.to(torch.bfloat16)
            tensors[at + "weight_shape"] = torch.tensor([rows, columns], dtype=torch.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def read_layer(path: Path, backend: CpuBackend) -> list[ExpertWeights]:
    tensors, form = load_file(path), format_named("int4_g32")
    experts = []
    for expert in range(EXPERTS):
        matrices = []
        for name in PROJECTIONS:
            at = f"model.layers.1.mlp.experts.{expert}.{name}."
            parts = {suffix: backend.upload(tensors.pop(at + suffix)) for suffix in ("weight_packed", "weight_scale")}
            matrices.append(QuantTensor(form, SHAPES[name], parts))
        experts.append(ExpertWeights(*matrices))
    return experts


def our_seconds(backend: CpuBackend, experts: list[ExpertWeights], tokens: int) -> float:
    x, out = torch.randn(tokens, HIDDEN), torch.empty(tokens, ACTIVE, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:ACTIVE].sort().values for _ in range(tokens)])
    weights, shared = torch.rand(tokens, ACTIVE), torch.zeros(tokens, HIDDEN)
    began = time.perf_counter()
    work = [Assignment(experts[number], *places) for number, places in tokens_by_expert(ids).items()]
    backend.expert_ffn(x, work, out).wait()
    backend.combine(out, weights, shared)
    return time.perf_counter() - began


def read_seconds(backend: CpuBackend, experts: list[ExpertWeights]) -> float:
    """What as many experts as a token takes need at least."""
    chosen = [part for e in torch.randperm(EXPERTS)[:ACTIVE] for weight in experts[e] for part in weight.parts.values()]
    rate = read_bytes_per_second(backend, [part for part in chosen if part.nbytes > 1 << 20])
    return sum(part.nbytes for part in chosen) / rate


def compare(
    backend: CpuBackend, experts: list[ExpertWeights], peer: Peer, tokens: int, repeats: int
) -> dict[str, float]:
    turns = []
    for repeat in range(2 + repeats):
        calls = TURN if tokens == 1 else 1
        ours = median(our_seconds(backend, experts, tokens) for _ in range(calls))
        theirs = peer.seconds(tokens)
        turn = ours, theirs, median(read_seconds(backend, experts) for _ in range(calls))
        turns += [turn] if repeat >= 2 else []
    found = {
        "ms": 1e3 * median(ours for ours, _, _ in turns),
        "kt_kernel_ms": 1e3 * median(theirs for _, theirs, _ in turns),
        "times_kt_kernel": median(theirs / ours for ours, theirs, _ in turns),
    }
    if tokens == 1:
        found["share_of_ceiling"] = median(read / ours for ours, _, read in turns)
        found["kt_kernel_share_of_ceiling"] = median(read / theirs for _, theirs, read in turns)
    return found


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("layer", type=Path, metavar="LAYER")
    parser.add_argument("--python", default=sys.executable, metavar="PYTHON", help="default: this one")
    parser.add_argument("--extra-path", metavar="PATH", help="a folder with the module kt_kernel")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="turns of one token; others take a sixth")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    args = parser.parse_args()
    file = args.layer / "model.safetensors"
    if not file.exists():
        write_layer(file)
    backend, cases = CpuBackend(), {}
    experts = read_layer(file, backend)
    with Peer(args.python, PEER, str(args.layer), str(backend.threads), extra_path=args.extra_path) as peer:
        for tokens in (1, 64, 256):
            repeats = args.repeats if tokens == 1 else max(3, args.repeats // 6)
            name = f"decode_{tokens}" if tokens == 1 else f"prefill_{tokens}"
            cases[name] = compare(backend, experts, peer, tokens, repeats)
    for name, found in cases.items():
        print(f"{name:<12} " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()), file=sys.stderr)
    if args.json:
        print(json.dumps({"torch": torch.__version__, "cases": cases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
