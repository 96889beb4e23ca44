"""For a person with a card: the conformance suite, then the demo model on the card at several budgets, token by token.

    python tools/check_device.py cuda

Prints a line a step and exits with 1 if a case fails or a budget changes a token. What is measured on the way (speeds,
hit rates) goes to stdout as JSON, for docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import k2lite
from k2lite.backends.base import Backend
from k2lite.backends.registry import find, open_backend
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.testing.suite import run_suite

PROMPT, NEW_TOKENS = [2, 700, 31, 9, 77], 16
NEVER: frozenset[int] = frozenset()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("backend", help="as k2lite backends lists it")
    name = parser.parse_args().backend
    report = run_suite(open_backend(name), find(name).probe().devices, say)
    failed = [str(case) for case in report.cases if not case.passed]
    say(f"conformance: {len(report.cases) - len(failed)} of {len(report.cases)} cases passed")
    runs = compare(DEMO_FOLDER, lambda: open_backend(name))
    print(json.dumps({"device": report.device, "failed": failed, "runs": runs}, indent=1))
    return int(bool(failed) or not all(run["same"] for run in runs))


def compare(folder: Path, opened: Callable[[], Backend], **options: Any) -> list[dict[str, Any]]:
    """The same answer for each place, with all the memory there is, and with as little RAM and VRAM as it goes with."""
    runs: list[dict[str, Any]] = []
    for place in ("device", "host"):
        plenty = {"context": 64, "experts_on": place, **options}
        tokens, facts, little = _answer(folder, opened(), plenty)
        runs.append({"place": place, "budget": "plenty", "same": True} | facts)
        again, facts, _ = _answer(folder, opened(), plenty | little)
        runs.append({"place": place, "budget": "little", "same": again == tokens} | facts)
        say(f"experts on {place}, little memory: {'the same tokens' if again == tokens else f'{again}, not {tokens}'}")
    return runs


def _answer(
    folder: Path, backend: Backend, options: dict[str, Any]
) -> tuple[list[int], dict[str, Any], dict[str, int]]:
    """Tokens, what was measured, and the budgets that this model just goes with."""
    with k2lite.load(folder, backend=backend, **options) as engine:
        device = engine.placement.device
        if device is None:
            raise SystemExit(f"{engine.placement.backend} is no accelerator's backend")
        began = time.perf_counter()
        tokens = list(map(int, engine.generate(PROMPT, max_tokens=NEW_TOKENS, temperature=0, stop_ids=NEVER)))
        seconds = time.perf_counter() - began
        counters = engine.experts.counters.device
        facts = {
            "tok_s": NEW_TOKENS / seconds,
            "device_hits": counters.hit_experts,
            "sent_bytes": counters.sent_bytes,
        }
        fewest = engine.config.num_experts_per_tok + 1
        least = device.total_bytes - device.arena_bytes + (fewest + 2) * device.slot_bytes
    return tokens, facts, {"resident_experts": fewest, "vram": least}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
