"""Read a model folder once, whole, and check its bytes.

What the folder's manifest has a checksum of is compared; with --write, checksums of all else are added to the manifest
(k2lite_manifest.json), and later runs check every expert that they read. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2lite.offload.verify import Verification

SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder, as downloaded")
    parser.add_argument("--write", action="store_true", help="add checksums that are not known yet to the manifest")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    from k2lite.model_folder import open_model
    from k2lite.offload.store import ExpertStore
    from k2lite.offload.verify import verify
    from k2lite.progress import ProgressLine

    _, checkpoint = open_model(args.model)
    checkpoint.raise_for_problems()
    total = checkpoint.trunk_bytes + checkpoint.experts_bytes
    store = ExpertStore(checkpoint)
    line = ProgressLine(total)
    began = time.perf_counter()

    def report(done: int, name: str) -> None:
        line.update(done, f"{name}  {done / max(line.elapsed_s, 1e-9) / 1e9:.2f} GB/s")

    try:
        found = verify(store, report)
    finally:
        line.close()
        store.close()
    seconds = time.perf_counter() - began
    written = False
    if args.write and not found.problems and len(found.checksums) > found.known:
        write_checksums(args.model, found)
        written = True
    facts = facts_of(args.model, found, seconds, written)
    print(json.dumps(facts) if args.json else as_text(facts))
    if args.write and found.problems:
        print("k2lite verify: nothing was written: a checksum of wrong bytes would hide them", file=sys.stderr)
    return 1 if found.problems else 0


def write_checksums(folder: Path, found: Verification) -> None:
    """Put the checksums into the folder's manifest, whatever else it says. Raises CheckpointError or RequestError."""
    from k2lite.quant.checksums import MANIFEST_NAME, MANIFEST_VERSION, read_manifest
    from k2lite.quant.durable_files import replace_file

    manifest = read_manifest(folder) or {"version": MANIFEST_VERSION, "pieces": {}}
    pieces = manifest["pieces"]
    for name, digest in found.checksums.items():
        pieces[name] = {**pieces.get(name, {}), "checksum": digest}
    replace_file(folder / MANIFEST_NAME, [(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()])


def facts_of(folder: Path, found: Verification, seconds: float, written: bool) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "pieces": len(found.checksums),
        "compared": found.known,
        "written": written,
        "read_bytes": found.read_bytes,
        "seconds": seconds,
        "bytes_per_s": found.read_bytes / max(seconds, 1e-9),
        "problems": found.problems,
    }


def as_text(facts: dict[str, Any]) -> str:
    new = facts["pieces"] - facts["compared"]
    unknown = f"{new} have no checksum yet (--write adds them)" if new and not facts["written"] else f"{new} added"
    lines = [
        f"{facts['folder']}: {facts['pieces']} pieces read, {facts['compared']} as the manifest says, {unknown}; "
        f"{facts['read_bytes'] / 1e9:.2f} GB at {facts['bytes_per_s'] / 1e9:.2f} GB/s"
    ]
    lines += [f"  PROBLEM  {problem}" for problem in facts["problems"][:SHOWN]]
    if len(facts["problems"]) > SHOWN:
        lines.append(f"  and {len(facts['problems']) - SHOWN} more")
    return "\n".join(lines)
