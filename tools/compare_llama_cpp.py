"""Compares llama.cpp with k2lite on GGUF files: greedy tokens, logits, and what makes the first difference.

    python tools/compare_llama_cpp.py FILE.gguf ... --python PYTHON    # PYTHON has llama-cpp-python 0.3.36

llama.cpp answers; k2lite reads the same ids, so that every step of every prompt is compared in the same context. k2lite
computes twice with the file's values in float32: exactly (its reference backend), and with llama.cpp's rounding of
inputs (tools/llama_cpp/arithmetic.py). For small models: the values lie in a folder of float32 while it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

if TYPE_CHECKING:
    from k2lite.backends.base import Backend
    from k2lite.engine import Engine
    from k2lite.gguf_model import GgufModel
    from k2lite.text.tokenizer import Tokenizer
    from tools.llama_cpp.arithmetic import MatrixNames

PEER = Path(__file__).resolve().parent / "llama_cpp" / "peer.py"
QUESTIONS = (
    "Hello",
    "How many centimeters are 12 meters?",
    "What is 37 plus 48?",
    "Please send a letter with city Torino and count 3.",
    "Write a story about a small dog that found a red ball in the garden.",
    "Who are you?",
    "Tell me about the sea and the wind.",
)
STORY = "Once upon a time there was a little girl named Lily. She liked to play outside in the park."


@dataclass(frozen=True)
class Compared:
    """One prompt: logits [tokens, vocab] of llama.cpp and of k2lite, exact and rounded as llama.cpp rounds."""

    text: str
    ids: np.ndarray
    peer: np.ndarray
    exact: np.ndarray
    rounded: np.ndarray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", metavar="FILE.gguf", type=Path, nargs="+")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=64, help="to write after each prompt (default: %(default)s)")
    parser.add_argument("--cache", choices=("f16", "f32"), default="f32", help="llama.cpp's (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    for file in args.files:
        print("\n".join(report(file.name, args.cache, list(compare(file, args)))), flush=True)
    return 0


def compare(file: Path, args: argparse.Namespace) -> Iterator[Compared]:
    from k2lite.gguf_model import open_gguf
    from k2lite.quant.gguf_file import read_gguf
    from tools.llama_cpp.arithmetic import LlamaArithmetic, MatrixNames

    model = open_gguf(file)
    model.checkpoint.raise_for_problems()
    types = {name: tensor.type.name for name, tensor in read_gguf(file).tensors.items()}
    with tempfile.TemporaryDirectory(prefix="k2lite-compare-") as scratch:
        folder = Path(scratch) / "float32"
        write_float32(model, folder)
        names = MatrixNames()
        rounding = open_engine(folder, LlamaArithmetic(types, names, cache=args.cache), names)
        exact = open_engine(folder, "reference")
        prompts = dict(prompts_of(exact.tokenizer))
        found = ask_peer(file, model, list(prompts.values()), args, Path(scratch))
        for (text, prompt), ids, logits in zip(prompts.items(), found["ids"], found["logits"], strict=True):
            read = [*prompt, *ids[:-1].tolist()]
            ours = (engine.logits(read)[len(prompt) - 1 :].numpy() for engine in (exact, rounding))
            yield Compared(text, ids, logits, *ours)


def write_float32(model: GgufModel, folder: Path) -> None:
    """A folder with the file's values."""
    from safetensors.torch import save_file

    from k2lite.quant.conversion import read_rows
    from k2lite.quant.types import PROJECTIONS, ExpertKey

    folder.mkdir()
    for name, content in model.files.items():
        (folder / name).write_bytes(content)
    checkpoint, tensors = model.checkpoint, {}
    for name in checkpoint.schema.trunk:
        tensors[name] = checkpoint.trunk(name).dequantize()
    for layer in checkpoint.schema.expert_layers:
        for expert in range(checkpoint.schema.n_routed_experts):
            modules = checkpoint.expert_modules(ExpertKey(layer, expert))
            for projection in PROJECTIONS:
                module = modules[projection]
                values = read_rows(module, 0, module.shape[0]).dequantize()
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"] = values
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def open_engine(folder: Path, backend: str | Backend, names: MatrixNames | None = None) -> Engine:
    import k2lite

    return k2lite.load(folder, backend=backend, recorder=names, context=1024)


def prompts_of(tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    for question in QUESTIONS:
        yield question, list(tokenizer.render([{"role": "user", "content": question}]).ids)
    yield STORY, tokenizer.encode(STORY)


def ask_peer(
    file: Path, model: GgufModel, prompts: list[list[int]], args: argparse.Namespace, scratch: Path
) -> dict[str, np.ndarray]:
    """llama.cpp does not read the betas of YaRN from the file; the rest it does."""
    settings: dict[str, Any] = {"n_ctx": 1024, "n_threads": args.threads, "n_threads_batch": args.threads}
    yarn = model.config.rope.yarn
    if yarn is not None:
        settings |= {"yarn_beta_fast": yarn.beta_fast, "yarn_beta_slow": yarn.beta_slow}
    request = {"file": str(file), "prompts": prompts, "tokens": args.tokens, "cache": args.cache, "settings": settings}
    (scratch / "request.json").write_text(json.dumps(request))
    subprocess.run([args.python, PEER, scratch / "request.json", scratch / "answers.npz"], check=True)
    return dict(np.load(scratch / "answers.npz"))


def report(name: str, cache: str, prompts: list[Compared]) -> list[str]:
    """Gaps and errors in logits. An error is a root mean square over the vocabulary: its median over all steps of all
    prompts, and in brackets the largest, since a step whose router chose other experts is off by much more."""
    tokens = len(prompts[0].ids)
    lines = [
        f"{name}, llama.cpp's cache {cache}, {len(prompts)} prompts, {tokens} tokens each: the same greedy tokens on "
        f"{sum(first_difference(item, item.exact) is None for item in prompts)} against exact float32, on "
        f"{sum(first_difference(item, item.rounded) is None for item in prompts)} with llama.cpp's rounding",
        f"  from exact float32 llama.cpp is off by {errors(prompts, 'peer', 'exact')}, k2lite with llama.cpp's "
        f"rounding by {errors(prompts, 'rounded', 'exact')}; these two differ by {errors(prompts, 'peer', 'rounded')}",
    ]
    for item in prompts:
        at = first_difference(item, item.exact)
        if at is not None:
            lines.append(f"  {item.text[:40]!r}: {described(item, at)}")
    return lines


def first_difference(item: Compared, ours: np.ndarray) -> int | None:
    differ = np.flatnonzero(ours.argmax(-1) != item.ids)
    return int(differ[0]) if len(differ) else None


def described(item: Compared, at: int) -> str:
    """The step where k2lite chooses a and llama.cpp b: by how much each of the three prefers a."""
    a, b = int(item.exact[at].argmax()), int(item.ids[at])
    gaps = [float(logits[at, a] - logits[at, b]) for logits in (item.exact, item.peer, item.rounded)]
    error = float(np.sqrt(np.mean((item.peer[at] - item.exact[at]) ** 2)))
    return (
        f"token {at + 1}, {a} or {b}: gap {gaps[0]:+.4f} in exact float32, {gaps[1]:+.4f} in llama.cpp, {gaps[2]:+.4f} "
        f"with its rounding; error of a logit at this step {error:.4f}"
    )


def errors(prompts: list[Compared], one: str, other: str) -> str:
    steps = [np.sqrt(np.mean((getattr(item, one) - getattr(item, other)) ** 2, axis=-1)) for item in prompts]
    return f"{np.median(steps):.1e} ({np.max(steps):.1e})"


if __name__ == "__main__":
    sys.exit(main())
