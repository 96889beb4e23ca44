"""Measures a model larger than memory against what drive and memory allow: issue 6's table, in one command.

    python tools/make_slice.py SLICE --format int4 --vocab 32768 --trunk int8_g128 --lm-head int8_g128
    python tools/bench_tiers.py SLICE [--routing TRACE] [--limit 8GB] [--only start,decode,plan,memory] [--json]

Each measurement is a process of its own inside a memory control group of --limit bytes. As many other experts as the
steps read are read alone, in the same run: the store's own rate. `start`: from nothing to the first token after a
prompt of one, the model's files not in the page cache. `decode`: steps against missing bytes / drive + trunk / memory,
and a prompt of 512 tokens against reading each expert once. `plan`: predicted against measured speed. `memory`: 2,000
tokens against the plan's bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2lite.byte_sizes import parse_bytes
from k2lite.model_folder import open_model
from k2lite.offload.routing_trace import RoutingTrace, TracedModel
from tools.tiers.measuring import Setting
from tools.tiers.memory_limit import HOW, MemoryGroup, memory_group

REPO = Path(__file__).resolve().parent.parent
SECTIONS = ("start", "decode", "plan", "memory")
# Budgets as shares of the limit, and chunks of a prompt: what `plan` is asked about.
PLANNED = ((0.5, 512), (0.6, 128), (0.7, 512), (0.8, 256), (0.9, 128), (0.97, 512))
LONG_TOKENS = 2000
START_RUNS = 5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="SLICE", help="a folder of tools/make_slice.py")
    parser.add_argument("--routing", metavar="TRACE", default="", help="measure decode with a trace's choices too")
    parser.add_argument("--limit", default="8GB", metavar="SIZE", help="of the control group (default: %(default)s)")
    parser.add_argument("--no-limit", action="store_true", help="make no control group: the shell is in one already")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--decode", default="own,trace", metavar="NAMES", help="whose choices (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="of two decode steps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args(argv)
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    sections: dict[str, Callable[..., Any]] = {
        "start": start_section,
        "decode": decode_section,
        "plan": plan_section,
        "memory": memory_section,
    }
    facts: dict[str, Any] = {"model": options.model, "limit_bytes": parse_bytes(options.limit)}
    with _group(options) as group:
        for name in SECTIONS:
            if name in wanted:
                facts[name] = sections[name](group, options)
    if options.json:
        print(json.dumps(facts))
    return 0


@contextmanager
def _group(options: argparse.Namespace) -> Iterator[MemoryGroup]:
    if options.no_limit:
        yield MemoryGroup(None)
        return
    try:
        with memory_group(parse_bytes(options.limit)) as group:
            yield group
    except OSError as error:
        sys.exit(f"bench_tiers: no control group can be made here ({error}); {HOW}")


def measured(group: MemoryGroup, setting: Setting) -> dict[str, Any]:
    """What tools/tiers/measuring.py says of a setting. Ends the program where it fails."""
    command = [sys.executable, "-m", "tools.tiers.measuring", json.dumps(asdict(setting))]
    with group.start(command, cwd=REPO, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"bench_tiers: {setting} ended with {process.returncode}")
    return dict(json.loads(out.splitlines()[-1]))


def start_section(group: MemoryGroup, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the command to its first token, beside reading the trunk at the store's rate."""
    # not `k2lite run`: a random model's token may be none that the slice's tokenizer has a text for
    program = "import sys, k2lite; print(int(next(k2lite.load(sys.argv[1]).generate([1], max_tokens=1))), flush=True)"
    command = [sys.executable, "-c", program, options.model]
    runs = []
    for _ in range(START_RUNS):
        forget(Path(options.model))
        began = time.perf_counter()
        with group.start(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            first = os.read(process.stdout.fileno(), 1)
            runs.append(time.perf_counter() - began)
            process.communicate()
        if process.returncode or not first:
            sys.exit(f"bench_tiers: {' '.join(command)} ended with {process.returncode}")
    facts = measured(group, Setting(options.model, rounds=1, round_tokens=4, warm_up_tokens=0, prompt_tokens=8))
    trunk, rate = facts["plan"]["trunk_bytes"], facts["decode"]["drive_rate"]
    found = {
        "runs_s": runs,
        "median_s": statistics.median(runs),
        "trunk_bytes": trunk,
        "drive_rate": rate,
        "trunk_s": trunk / rate,
        "beyond_s": statistics.median(runs) - trunk / rate,
    }
    print(
        f"start    {found['median_s']:.2f} s to the first token (median of {START_RUNS}, {min(runs):.2f} to "
        f"{max(runs):.2f}); the trunk's {trunk / 1e9:.2f} GB take {trunk / rate:.2f} s at {rate / 1e9:.2f} GB/s: "
        f"{found['beyond_s']:.2f} s beyond"
    )
    return found


def forget(folder: Path) -> None:
    """Have the page cache give up the model's files."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def decode_section(group: MemoryGroup, options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for name, routing in (("own", ""), ("trace", options.routing)):
        if name not in options.decode.split(",") or (name == "trace" and not routing):
            continue
        setting = Setting(options.model, routing=routing, rounds=options.rounds, prompt_twice=True)
        facts = measured(group, setting)
        print(f"decode with {'the routers of random weights' if name == 'own' else routing}")
        print(decode_text(facts), flush=True)
        found[name] = facts
    return found


def decode_text(facts: dict[str, Any]) -> str:
    now, prompt, memory = facts["decode"], facts["prefill"], facts["memory"]
    ratios = [each["ratio"] for each in facts["rounds"]]
    return "\n".join(
        [
            f"  store alone {now['drive_rate'] / 1e9:.2f} GB/s, memory {now['memory_rate'] / 1e9:.1f} GB/s, trunk "
            f"{now['trunk_bytes'] / 1e6:.0f} MB, missing {now['missing_bytes'] / 1e6:.0f} MB a token (hit rate "
            f"{now['hit_rate']:.1%})",
            f"  bound {now['bound_s'] * 1e3:.1f} ms, step {now['step_s'] * 1e3:.1f} ms ({now['tok_s']:.2f} tokens/s): "
            f"ratio {now['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); drive at {now['drive_use']:.1%} of "
            f"its own rate while something is read ({now['reading_s'] * 1e3:.1f} ms)",
            f"  the same with resident experts / memory in the bound: ratio {now['ratio_with_residents']:.3f}",
            f"  prompt of {prompt['tokens']} in chunks of {prompt['chunk_tokens']}: {prompt['seconds']:.2f} s "
            f"({prompt['tok_s']:.1f} tokens/s), its experts alone {prompt['reading_alone_s']:.2f} s: ratio "
            f"{prompt['ratio']:.3f} ({prompt['waiting_s']:.2f} s of it only waiting)",
            f"  memory now {memory['now'] / 1e9:.3f} GB, at most {memory['peak'] / 1e9:.3f} GB, planned "
            f"{facts['planned_bytes'] / 1e9:.3f} GB",
        ]
    )


def plan_section(group: MemoryGroup, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What `k2lite plan --routing` predicts beside what was measured, with uniform choices and with the trace's."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        uniform = Path(folder) / "uniform"
        write_uniform_trace(uniform, Path(options.model))
        for number, (share, chunk) in enumerate(PLANNED):
            routing = options.routing if options.routing and number % 2 else str(uniform)
            ram = int(share * parse_bytes(options.limit))
            setting = Setting(
                options.model, ram_bytes=ram, routing=routing, chunk_tokens=chunk, prompt_tokens=chunk, rounds=8
            )
            facts = measured(group, setting)
            now, said = facts["decode"]["tok_s"], facts["predicted"]["decode"]
            row = {
                "ram_bytes": ram,
                "chunk_tokens": chunk,
                "routing": Path(routing).name,
                "predicted_tok_s": said["best"],
                "measured_tok_s": now,
                "error": said["best"] / now - 1,
                "predicted_hit_rate": said["hit_rate"],
                "measured_hit_rate": facts["decode"]["hit_rate"],
                "predicted_prefill_tok_s": facts["predicted"]["prefill_tok_s"],
                "measured_prefill_tok_s": facts["prefill"]["tok_s"],
                "rates": facts["predicted"]["rates"],
            }
            print(
                f"plan     {ram / 1e9:.2f} GB, {row['routing']}: predicted {said['best']:.2f} tokens/s, measured "
                f"{now:.2f} ({row['error']:+.0%}); hit rate {said['hit_rate']:.1%} and {row['measured_hit_rate']:.1%}; "
                f"prompt in chunks of {chunk}: {row['predicted_prefill_tok_s']:.1f} and "
                f"{row['measured_prefill_tok_s']:.1f} tokens/s",
                flush=True,
            )
            found.append(row)
    return found


def write_uniform_trace(path: Path, model: Path) -> None:
    """300 tokens that choose among a model's experts without any habit."""
    config, _ = open_model(model)
    random, shape = np.random.default_rng(0), (300, len(config.moe_layers), config.n_routed_experts)
    ids = np.sort(random.random(shape).argsort(axis=2)[:, :, : config.num_experts_per_tok], axis=2)
    facts = TracedModel("uniform", config.model_type, config.moe_layers, config.n_routed_experts)
    RoutingTrace(ids.astype(np.uint16), facts).write(path)


def memory_section(group: MemoryGroup, options: argparse.Namespace) -> dict[str, Any]:
    """A long answer: what the process holds, beside the plan."""
    facts = measured(
        group, Setting(options.model, routing=options.routing, rounds=1, warm_up_tokens=0, round_tokens=LONG_TOKENS)
    )
    peak, planned = facts["memory"]["peak"], facts["planned_bytes"]
    print(
        f"memory   {LONG_TOKENS} tokens: at most {peak / 1e9:.3f} GB resident, planned {planned / 1e9:.3f} GB "
        f"({peak / planned - 1:+.1%}); the limit was met {group.failures} times"
    )
    return {"peak_bytes": peak, "planned_bytes": planned, "share": peak / planned}


if __name__ == "__main__":
    sys.exit(main())
