"""Writes a checkpoint at Kimi-K2's true tensor sizes, with few layers and random weights, to measure on.

The folder is a standard one that every verb opens: shards, index, config.json, a byte tokenizer. INT4 and FP8 weights
are drawn as they are stored, other formats quantize Gaussian values; activations stay of order 1 and the router
chooses freely, but the text is noise. Prints formats and bytes by class, and the bytes of the same slice as a GGUF file
for llama.cpp, which the last command writes.

    python tools/make_slice.py DIR --format int4                                  # 19 GB of experts
    python tools/make_slice.py DIR --format int4 --vocab 32768 --trunk int8_g128 --lm-head int8_g128
    k2lite export DIR DIR.gguf --type q4_0
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2lite.config import ModelConfig, parse_config
from k2lite.model_folder import open_model
from k2lite.quant.errors import K2LiteError, RequestError
from k2lite.quant.quantization_config import parse_quantization_config
from k2lite.quant.schema import CheckpointSchema
from k2lite.quant.types import PROJECTIONS
from k2lite.weights import checkpoint_schema
from tools.k2_slice.config import PRESETS, SliceFormats, slice_config
from tools.k2_slice.layout import ShardLayout, slice_layout
from tools.k2_slice.writing import Progress, write_slice

USER_ERROR = 2
EMBEDDINGS = "model.embed_tokens.weight"
PEER_TITLE = "beside the slice as GGUF (trunk Q8_0, experts Q4_0)"
BITS_OF_32 = {"Q8_0": 34 * 8, "Q4_0": 18 * 8, "F32": 32 * 32}  # llama.cpp's blocks of 32 values


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write it; must not exist or be empty")
    parser.add_argument("--layers", type=int, default=3, help="the first is dense (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=384, help="routed experts a layer (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=163840, help="vocabulary (default: %(default)s)")
    parser.add_argument(
        "--format",
        choices=sorted(PRESETS),
        default="fp8",
        help="fp8: as K2-Instruct ships; int4: as K2-Thinking ships (default: %(default)s)",
    )
    parser.add_argument("--trunk", metavar="FORMAT", help="of the trunk's matrices, such as int8_g128")
    parser.add_argument("--lm-head", metavar="FORMAT", help="of the head, such as int8_g128")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    options = vars(parser.parse_args(argv))
    try:
        make_slice(**options, progress=_show_progress())
        print(report(options["folder"]))
    except K2LiteError as error:
        print(f"make_slice: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def make_slice(
    folder: Path,
    *,
    layers: int = 3,
    experts: int = 384,
    vocab: int = 163840,
    format: str = "fp8",
    trunk: str | None = None,
    lm_head: str | None = None,
    seed: int = 0,
    sizes: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the folder. `sizes` replaces keys of config.json, for a reduced width. Raises K2LiteError's children."""
    if seed < 0:
        raise RequestError(f"the seed is {seed}; expected 0 or more")
    config, shards = plan_slice(
        layers=layers, experts=experts, vocab=vocab, format=format, trunk=trunk, lm_head=lm_head, sizes=sizes
    )
    write_slice(folder, config, shards, seed=seed, progress=progress or (lambda _file, _done: None))


def plan_slice(
    *,
    layers: int,
    experts: int,
    vocab: int,
    format: str,
    trunk: str | None = None,
    lm_head: str | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[ShardLayout]]:
    """config.json and every shard's header: all that can be known, and refused, before a byte is written."""
    preset = PRESETS[format]
    formats = SliceFormats(preset.experts, trunk or preset.trunk, lm_head or preset.lm_head)
    raw = slice_config(formats, layers=layers, experts=experts, vocab=vocab, sizes=sizes or {})
    config = parse_config(raw, Path("config.json"))
    parse_quantization_config(config.quantization_config, config.source)
    return raw, slice_layout(config, formats)


def report(folder: Path) -> str:
    """What was written, from the folder's own headers, and the peers' bytes for the same numbers."""
    config, checkpoint = open_model(folder)
    lines = [
        f"{folder}: {config.num_hidden_layers} layers",
        f"  {'class':<16} {'format':<14} {'weights':>8} {'bytes':>15}",
    ]
    for kind, uses in checkpoint.formats().items():
        lines += [f"  {kind:<16} {name:<14} {use.tensors:>8} {use.nbytes:>15,}" for name, use in uses.items()]
    table = checkpoint.formats()["embeddings"]["bf16"].nbytes
    peer_trunk, peer_table, peer_experts = peer_bytes(config)
    lines += [
        f"  {PEER_TITLE:<56} {'k2lite':>15} {'GGUF':>15}",
        _compared("trunk", checkpoint.trunk_bytes, peer_trunk),
        _compared(
            "trunk without embeddings, of which a token reads a row",
            checkpoint.trunk_bytes - table,
            peer_trunk - peer_table,
        ),
        _compared("routed experts", checkpoint.experts_bytes, peer_experts),
    ]
    return "\n".join(lines)


def _compared(what: str, ours: int, theirs: int) -> str:
    return f"    {what:<54} {ours:>15,} {theirs:>15,}"


def peer_bytes(config: ModelConfig) -> tuple[int, int, int]:
    """Bytes of the slice that `k2lite export --type q4_0` makes of it: its trunk, the embeddings in it, its routed
    experts. Matrices are Q8_0 (the embeddings too), experts Q4_0, router, norms and bias F32."""
    schema = checkpoint_schema(config)
    trunk = sum(_gguf_bytes(spec.shape, _peer_type(name, schema)) for name, spec in schema.trunk.items())
    expert = sum(_gguf_bytes(schema.projection_shape(projection), "Q4_0") for projection in PROJECTIONS)
    experts = expert * schema.n_routed_experts * len(schema.expert_layers)
    return trunk, _gguf_bytes(schema.trunk[EMBEDDINGS].shape, "Q8_0"), experts


def _peer_type(name: str, schema: CheckpointSchema) -> str:
    return "Q8_0" if schema.trunk[name].quantizable or name == EMBEDDINGS else "F32"


def _gguf_bytes(shape: Sequence[int], kind: str) -> int:
    return math.prod(shape) * BITS_OF_32[kind] // 32 // 8


def _show_progress() -> Callable[[str, int], None]:
    began = time.perf_counter()

    def show(file: str, done: int) -> None:
        seconds = time.perf_counter() - began
        print(f"make_slice: {file}, {done / 1e9:.2f} GB, {done / 1e9 / seconds:.2f} GB/s", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
