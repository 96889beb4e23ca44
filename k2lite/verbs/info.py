"""Describe a model folder: architecture, formats, bytes, shards, problems.

Reads config.json and the headers of the weight files, no weights. Exit code 1 if there are problems.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .model_options import add_eps_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder, as downloaded")
    add_eps_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    facts = describe(args.model, latent_norm_eps=args.latent_norm_eps)
    print(json.dumps(facts) if args.json else as_text(facts))
    return 1 if facts["problems"] else 0


def describe(folder: Path, *, latent_norm_eps: float | None = None) -> dict[str, Any]:
    """All that is known of a folder without reading weights; sizes in bytes."""
    from dataclasses import asdict

    from k2lite.model_folder import open_model

    config, checkpoint = open_model(folder, latent_norm_eps=latent_norm_eps)
    facts = {key: value for key, value in asdict(config).items() if key not in ("unknown_keys", "source")}
    return {
        "folder": str(folder),
        "config": facts,
        "unknown_config_keys": list(config.unknown_keys),
        "formats": {
            kind: {name: asdict(use) for name, use in uses.items()} for kind, uses in checkpoint.formats().items()
        },
        "trunk_bytes": checkpoint.trunk_bytes,
        "experts_bytes": checkpoint.experts_bytes,
        "expert_bytes": checkpoint.expert_bytes,
        "kv_bytes_per_token": 4 * config.num_hidden_layers * config.latent_dim,
        "shards": [{"file": shard.path.name, "bytes": shard.nbytes} for shard in checkpoint.shards],
        "ignored": {reason: len(names) for reason, names in checkpoint.ignored.items()},
        "notes": list(checkpoint.notes),
        "problems": list(checkpoint.problems),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The report a person reads."""
    from k2lite.byte_sizes import gib

    config = facts["config"]
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    yarn = config["rope"]["yarn"]
    lines = [
        f"{facts['folder']}: {config['model_type']}, {layers} layers ({dense} dense, {layers - dense} MoE)",
        f"  experts     {config['n_routed_experts']} a layer, {config['num_experts_per_tok']} used per token, "
        f"{config['n_shared_experts']} shared"
        + (f", {config['topk_group']} of {config['n_group']} groups" if config["n_group"] > 1 else ""),
        f"  sizes       hidden {config['hidden_size']}, expert width {config['moe_intermediate_size']}, "
        f"{config['num_attention_heads']} heads, latents {config['q_lora_rank']} and {config['kv_lora_rank']}, "
        f"vocabulary {config['vocab_size']}",
        f"  positions   {config['max_position_embeddings']}"
        + (f", YaRN x {yarn['factor']:g} from {yarn['original_max_position_embeddings']}" if yarn else ", no scaling"),
        f"  norms       eps {config['rms_norm_eps']:g}, of the latents {config['latent_norm_eps']:g}",
        f"  trunk       {gib(facts['trunk_bytes'])}",
        f"  experts     {gib(facts['experts_bytes'])}, one {gib(facts['expert_bytes'])}",
        f"  KV cache    {facts['kv_bytes_per_token']} bytes a token",
        f"  files       {len(facts['shards'])} of weights, {gib(sum(shard['bytes'] for shard in facts['shards']))}",
        "  formats",
    ]
    for kind, uses in facts["formats"].items():
        shown = ", ".join(f"{name} x {use['tensors']} ({gib(use['nbytes'])})" for name, use in uses.items())
        lines.append(f"    {kind:<16} {shown}")
    lines += [f"  skipped     {count} tensors: {reason}" for reason, count in facts["ignored"].items()]
    if facts["unknown_config_keys"]:
        lines.append(f"  unknown keys in config.json, without effect: {', '.join(facts['unknown_config_keys'])}")
    lines += [f"  note        {note}" for note in facts["notes"]]
    lines += [f"  PROBLEM     {problem}" for problem in facts["problems"]] or [
        "  problems    none found in the headers"
    ]
    return "\n".join(lines)
