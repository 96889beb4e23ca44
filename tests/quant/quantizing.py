"""A small source folder, a job that quantizes it, and the same job as a process of its own that can be killed:
`python -m tests.quant.quantizing SRC DST RESUME [LIMIT]` (LIMIT: the largest file it may write, 0 for none)."""

from __future__ import annotations

import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from k2lite.model_folder import open_model
from k2lite.quant import quantizer
from k2lite.quant.errors import K2LiteError
from k2lite.quant.file_reading import read_json_object
from k2lite.quant.quantization_plan import QuantizationPlan, plan_quantization
from k2lite.quant.quantized_config import quantized_config
from k2lite.quant.quantizer import Job, quantize, source_identity
from k2lite.quant.recipe import Recipe
from tests.checkpoints import Weights, random_weights, tiny_config, write_checkpoint

# rows of 128 columns and more, so that every group fits
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "v_head_dim": 32,
}
RECIPE = Recipe(experts="int4_g32", trunk="keep", lm_head="keep")


def write_source(folder: Path, format: str, *, prefix: str = "", **changes: Any) -> Weights:
    """A folder in `format`; returns its dequantized weights by stored name."""
    config = tiny_config(**{**WIDE, **changes})
    (text_config := config.get("text_config") or config)
    weights = random_weights(text_config, seed=7)
    return write_checkpoint(folder, config, weights, format=format, prefix=prefix)


def make_plan(source: Path, recipe: Recipe = RECIPE, *, text_only: bool = False) -> QuantizationPlan:
    _, checkpoint = open_model(source)
    checkpoint.raise_for_problems()
    return plan_quantization(checkpoint, recipe, text_only=text_only)


def make_job(source: Path, destination: Path, recipe: Recipe = RECIPE) -> Job:
    config, checkpoint = open_model(source)
    plan = make_plan(source, recipe)
    files = {"config.json": config.source, **{shard.path.name: shard.path for shard in checkpoint.shards}}
    raw = read_json_object(config.source)
    return Job(plan, source, source_identity(files), quantized_config(raw, plan), destination)


def run(source: Path, destination: Path, recipe: Recipe = RECIPE, *, resume: bool = False) -> None:
    quantize(make_job(source, destination, recipe), resume=resume, report=lambda _: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    quantizer.SYNC_BYTES = 40_000  # a line of the journal every few experts, as every few dozen GB of a big model
    if int(sys.argv[4]):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
    try:
        run(Path(sys.argv[1]), Path(sys.argv[2]), resume=sys.argv[3] == "resume")
    except K2LiteError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    # not ru_maxrss, which begins with what the parent held
    print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
