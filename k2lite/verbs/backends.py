"""List what can multiply: ready or exactly why not.

Without more words: every backend, ours and those of installed packages. `test NAME` runs the conformance suite on one:
every operation against float64, and a whole small model token for token. Exit code 1 if a case fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2lite.backends.registry import Found
    from k2lite.testing.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    test = actions.add_parser("test", help="run the conformance suite", description="Run the conformance suite.")
    test.add_argument("name", metavar="NAME", help="of the backend, as the list has it")
    test.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the report as JSON")
    test.add_argument("--report", type=Path, metavar="FILE", help="write what was found as JSON")


def execute(args: argparse.Namespace) -> int:
    if args.action == "test":
        return _test(args)
    from k2lite.backends.registry import backend_names, find

    rows = [facts(find(name)) for name in backend_names()]
    print(json.dumps({"backends": rows}) if args.json else "\n".join(map(as_text, rows)))
    return 0


def facts(found: Found) -> dict[str, Any]:
    """What the list says of one backend. Formats and evidence are null for one that can't be read."""
    from dataclasses import asdict

    from k2lite.quant.formats import PACKED_INT

    probe = found.probe()
    table: dict[str, Any] = {"contract": None, "evidence": None, "formats": None, "expert_formats": None}
    if found.spec is not None:
        can = found.spec.capabilities
        groups = {PACKED_INT[name][1] for name in can.formats | can.formats_of(experts=True) if name in PACKED_INT}
        table = {
            "contract": found.spec.contract,
            "evidence": found.spec.evidence_text(),
            "formats": sorted(can.formats),
            "expert_formats": sorted(can.formats_of(experts=True)),
            "group_sizes": [*sorted(size for size in groups if size), *(["channel"] if None in groups else [])],
            "dtypes": list(can.dtypes),
            "max_experts": can.max_experts,
            "arithmetic": can.arithmetic,
            "numerics": asdict(can.numerics),
        }
    return {
        "name": found.name,
        "ready": probe.ready,
        "reason": probe.reason,
        "causes": [f"{type(error).__name__}: {error}" for error in _chain(probe.error)],
        "devices": [asdict(device) for device in probe.devices],
        **table,
    }


def _chain(error: BaseException | None) -> list[BaseException]:
    """An exception and those behind it, the outermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


def as_text(row: dict[str, Any]) -> str:
    """The lines that a person reads of one backend."""
    from k2lite.byte_sizes import gib

    lines = [f"{row['name']:<12} {'ready' if row['ready'] else 'not ready'}: {row['reason']}"]
    lines += [f"    because   {cause}" for cause in row["causes"]]
    for device in row["devices"]:
        memory = "" if device["memory_bytes"] is None else f", {gib(device['memory_bytes'])}"
        lines.append(f"    device    {device['name']} ({device['driver']}){memory}")
    if row["formats"] is not None:
        lines.append(f"    formats   {', '.join(row['formats'])}")
        if row["expert_formats"] != row["formats"]:
            lines.append(f"    experts   {', '.join(row['expert_formats'])}")
        lines.append(f"    evidence  {row['evidence']}")
    return "\n".join(lines)


def _test(args: argparse.Namespace) -> int:
    from k2lite.backends.registry import AUTO, find, open_backend
    from k2lite.quant.errors import RequestError
    from k2lite.testing.suite import run_suite

    if args.name == AUTO:
        raise RequestError("backends test: name one backend; auto is a choice among them")
    backend = open_backend(args.name)
    found = find(args.name)
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.touch()  # what can't be written is said before minutes of work
    report = run_suite(backend, found.probe().devices, lambda line: print(line, file=sys.stderr))
    if args.report is not None:
        args.report.write_text(report.as_json(), encoding="utf-8")
    print(json.dumps(report.as_dict()) if args.json else _summary(report))
    return 0 if report.passed else 1


def _summary(report: Report) -> str:
    failed = [case for case in report.cases if not case.passed]
    lines = [f"failed: {case.operation}, {case.case}: {case.said}" for case in failed]
    passed = len(report.cases) - len(failed)
    return "\n".join([*lines, f"{report.backend}: {passed} of {len(report.cases)} cases passed"])
