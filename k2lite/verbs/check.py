"""Check a model that nobody here could run: is it whole, is it sane, how fast is it. One report to send.

Reads three short texts that come with k2lite (English, Python, Chinese), has two questions answered, reads a text again
with the routing changed, and says of each what is ok and what is suspicious. The table goes to stdout, with --json FILE
everything that was measured into a file; --json alone prints it. Exit code 1 if anything is suspicious.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from k2lite.quant.errors import RequestError

from .model_options import add_model_arguments, load_engine

DEFAULT_TOKENS = 1536
STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens", type=int, default=DEFAULT_TOKENS, metavar="N",
        help="of text to read in all, which bounds the time (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="write all that was measured; without FILE, print it"
    )


def execute(args: argparse.Namespace) -> int:
    _check(args)
    from k2lite.check.report import check, context_for, total_tokens
    from k2lite.config import read_config
    from k2lite.demo_folder import DEMO_FOLDER
    from k2lite.progress import ProgressLine
    from k2lite.quant.durable_files import replace_file

    longest = read_config(args.model or DEMO_FOLDER, latent_norm_eps=args.latent_norm_eps).max_position_embeddings
    needed = min(context_for(args.tokens), longest)
    if args.context is None:
        args.context = needed
    if args.context < needed:
        raise RequestError(f"--context is {args.context}; this check takes {needed}, which it has without --context")
    engine = load_engine(args)
    line = ProgressLine(total_tokens(args.tokens))
    try:
        facts = check(engine, args.tokens, line.update, lambda said: print(f"k2lite check: {said}", file=sys.stderr))
    finally:
        line.close()
    if args.json == STDOUT:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(as_text(facts))
    if args.json not in (None, STDOUT):
        replace_file(Path(args.json), [(json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode()])
        print(f"k2lite check: wrote {args.json}", file=sys.stderr)
    return 0 if facts["ok"] else 1


def _check(args: argparse.Namespace) -> None:
    """Refuse what can't be done before anything loads. Raises RequestError."""
    if args.tokens < 6:
        raise RequestError(f"--tokens is {args.tokens}; expected 6 or more, two of each text")
    if args.json not in (None, STDOUT):
        path = Path(args.json)
        if path.is_dir():
            raise RequestError(f"--json {path}: a folder; --json takes the file to write, and MODEL comes before it")
        if not path.absolute().parent.is_dir():
            raise RequestError(f"--json {path}: its folder does not exist")


def as_text(facts: dict[str, Any]) -> str:
    """The table that a person reads: what it is, what was measured, the verdicts."""
    from k2lite.byte_sizes import gib

    model, machine, speed, hits = (facts[name] for name in ("model", "machine", "speed", "hits"))
    formats = ", ".join(f"{kind} {'+'.join(uses)}" for kind, uses in model["formats"].items())
    size = sum(shard["bytes"] for shard in model["shards"])
    lines = [
        f"{model['name']}: {model['config']['model_type']}, fingerprint {model['fingerprint']}, config "
        f"{model['files']['config.json'][:12]}, {len(model['shards'])} shards, {gib(size)}",
        f"  formats     {formats}",
        f"  machine     {machine['name']}; {gib(machine['memory_bytes'])} at {speed['memory_bytes_per_s'] / 1e9:.1f} "
        f"GB/s; drive {speed['drive_bytes_per_s'] / 1e9:.2f} GB/s",
        f"  arithmetic  backend {facts['backend']} ({facts['arithmetic']}), k2lite {facts['k2lite']}",
        f"  prefill     {speed['prefill_tok_s']:.3g} tok/s" + _prediction(speed["predicted_prefill_tok_s"]),
        f"  decode      {speed['decode_tok_s']:.3g} tok/s" + _prediction(speed["predicted_decode_tok_s"].get("middle")),
    ]
    for phase in ("prefill", "decode"):
        found = hits[phase]
        lines.append(
            f"  experts     {phase}: {found['ram']:.1%} in RAM, {found['read']:.1%} read, "
            f"{found['read_bytes_a_token'] / 1e6:.1f} MB a token at {found['read_bytes_per_s'] / 1e9:.2f} GB/s"
        )
    width = max(len(verdict["about"]) for verdict in facts["verdicts"])
    lines += [
        f"  {verdict['outcome']:<10}  {verdict['about']:<{width}}  {verdict['said']}" for verdict in facts["verdicts"]
    ]
    bad = sum(verdict["outcome"] == "suspicious" for verdict in facts["verdicts"])
    lines.append(f"suspicious: {bad} of {len(facts['verdicts'])}" if bad else "ok: nothing is suspicious")
    return "\n".join(lines)


def _prediction(tok_s: float | None) -> str:
    return "" if tok_s is None else f", predicted {tok_s:.3g}"
