"""Run as a program: prints one checksum for each operation, to be compared between instruction sets."""

from __future__ import annotations

import hashlib
import json

import torch

from k2lite.backends.base import RoutingRule, Segment
from k2lite.backends.cpu import isa
from k2lite.backends.cpu.backend import CpuBackend
from tests.backends.cpu.samples import FLOAT, INTEGER, STEP, expert, normal, weight


def checksums() -> dict[str, str]:
    backend, found = CpuBackend(), {}
    for format in INTEGER + FLOAT:
        matrix = weight(format, 37, 7 * STEP.get(format, 37), 1)
        for tokens in (1, 9):
            found[f"{format} {tokens}"] = backend.linear(normal(tokens, matrix.shape[1], seed=2), matrix)
    found["mlp"] = backend.mlp(30 * normal(3, 160, seed=3), expert("int4_g32", 160, 96, 4))
    found["norm"] = backend.rms_norm(normal(2, 333, seed=5), normal(333, seed=6), 1e-6)
    rule = RoutingRule(4, 3, 2, True, 2.5)
    found["router"] = backend.router(normal(9, 20, seed=7), weight("bf16", 12, 20, 8), normal(12, seed=9), rule)[1]
    query, latent = 3 * normal(5, 6, 24, seed=10), normal(140, 40, seed=11)
    kv_b = weight("fp8_e4m3_b128", 6 * 28, 32, 12)
    found["attention"] = backend.attention(query[..., :16], query[..., 16:], [Segment(0, 5, latent)], kv_b, 0.3)
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16] for name, value in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"isa": isa.selected(), **checksums()}))
