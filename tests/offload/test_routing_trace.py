"""Trace and statistics files: what is written comes back, published JSON lines are read, damage is said in one line."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from k2lite.errors import RequestError
from k2lite.offload.policies import make_policy
from k2lite.offload.routing_trace import RoutingTrace, TracedModel, read_trace
from k2lite.offload.saved_statistics import load_statistics, save_statistics
from k2lite.offload.statistics import RouterStats
from tools.synthetic_routing import synthetic_routing

MODEL = TracedModel("tiny", "kimi_k2", (1, 2, 3), 16, 1000)
IDS = synthetic_routing(20, 3, 16, 4, seed=0)
WEIGHTS = np.random.default_rng(0).random(IDS.shape).astype(np.float16)


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    RoutingTrace(IDS, MODEL, WEIGHTS).write(tmp_path / "trace")
    return tmp_path / "trace"


def test_a_trace_comes_back_and_is_a_plain_safetensors_file(trace_file: Path) -> None:
    trace = read_trace(trace_file)
    assert trace.model == MODEL
    assert trace.weights is not None
    stored = load_file(trace_file)
    for found in (stored, {"ids": trace.ids, "weights": trace.weights}):
        np.testing.assert_array_equal(found["ids"], IDS)
        np.testing.assert_array_equal(found["weights"], WEIGHTS)
        assert (found["ids"].dtype, found["weights"].dtype) == (np.uint16, np.float16)


def test_a_trace_without_weights(tmp_path: Path) -> None:
    RoutingTrace(IDS, MODEL).write(tmp_path / "trace")
    assert read_trace(tmp_path / "trace").weights is None


def test_published_traces(shared: Path) -> None:
    folder = shared / "traces" / "kimi-linear_olmoe"
    for name, shape, n_experts in (("kimi_300", (300, 26, 8), 256), ("olmoe_299", (299, 16, 8), 64)):
        path = folder / f"trace_{name}.jsonl"
        trace = read_trace(path)
        assert (trace.ids.shape, trace.model.n_experts) == (shape, n_experts)
        last = json.loads(path.read_text().splitlines()[-1])
        assert trace.ids[-1].tolist() == last["layers"]


def test_json_lines_are_sorted_and_other_keys_ignored(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"layers": [[3, 1], [0, 40]], "ranks": []}\n\n{"tok": 1, "layers": [[2, 1], [0, 1]]}\n')
    trace = read_trace(path)
    assert trace.ids.tolist() == [[[1, 3], [0, 40]], [[1, 2], [0, 1]]]
    assert trace.model == TracedModel("t", "unknown", (0, 1), 64, 0)
    assert read_trace(path, n_experts=41).model.n_experts == 41
    with pytest.raises(RequestError, match="expert 40 of a model that has 40"):
        read_trace(path, n_experts=40)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"layers": [[1, 2]]}\n{"layers": [[1]]}', r"line 2: layers x k is \[1, 1\], before it was \[1, 2\]"),
        ('{"tok": 1}', 'line 1: "layers" is '),
        ('{"layers": []}', 'line 1: "layers" is '),
        ('{"layers": [[]]}', 'line 1: "layers" is '),
        ('{"layers": [[1, 2], [3]]}', "expected lists of as many"),
        ('{"layers": [[1, true]]}', "expected lists of as many"),
        ('{"layers": [[1.0, 2]]}', "expected lists of as many"),
        ('{"layers": [[1, 1]]}', "occurs twice"),
        ('{"layers": [[-1, 1]]}', "expert ids from -1"),
        ('{"layers": [[65536, 1]]}', "to 65536"),
        ('{"layers": [[99999999999999999999, 1]]}', "beyond all integers"),
        ('{"layers": [[1, 2]]', "line 1"),
    ],
)
def test_bad_json_lines(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(lines)
    with pytest.raises(RequestError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_damaged_files(trace_file: Path, tmp_path: Path) -> None:
    whole = trace_file.read_bytes()
    for cut in (0, 7, 40, len(whole) - 1):
        trace_file.write_bytes(whole[:cut])
        with pytest.raises(RequestError, match=r"trace: .*expected"):
            read_trace(trace_file)
    with pytest.raises(RequestError, match="can't be read"):
        read_trace(tmp_path / "absent")
    with pytest.raises(RequestError, match="can't be read"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "routing_statistics"}, "expected 'routing_trace'"),
        ({"version": "2"}, "of version '2'"),
        ({"facts": "[]"}, "facts"),
        ({"facts": json.dumps({"name": "x"})}, "model_type is"),
        ({"n_experts": 15}, r"expert 1\d of a model that has 15"),
        ({"n_experts": "16"}, "n_experts is '16', expected int"),
        ({"layers": [1, 2]}, "ids of 3 layers for a model of 2"),
        ({"layers": [1, 2, "3"]}, "expected integers"),
        ({"ids": IDS.astype(np.int32)}, "expected uint16"),
        ({"ids": IDS[0]}, "expected uint16"),
        ({"ids": IDS[:, :, :0]}, "none of them 0"),
        ({"ids": None}, "no array 'ids'"),
        ({"weights": WEIGHTS[:1]}, "weights"),
    ],
)
def test_contradictions_in_a_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    facts: dict[str, Any] = {"name": "t", "model_type": "m", "layers": [1, 2, 3], "n_experts": 16, "expert_bytes": 0}
    facts |= {key: change[key] for key in change if key in facts}
    header = {"kind": "routing_trace", "version": "1", "facts": json.dumps(facts)}
    header |= {key: change[key] for key in change if key in header}
    arrays = {"ids": IDS, "weights": WEIGHTS} | {key: change[key] for key in change if key in ("ids", "weights")}
    save_file({name: a for name, a in arrays.items() if a is not None}, tmp_path / "t", metadata=header)
    with pytest.raises(RequestError, match=message):
        read_trace(tmp_path / "t")


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """As on a disk with so many bytes left: writes beyond fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_trace_and_no_rest(trace_file: Path) -> None:
    before = trace_file.read_bytes()
    with room_for(1000), pytest.raises(RequestError, match="trace: can't be written: "):
        RoutingTrace(synthetic_routing(500, 3, 16, 4, seed=1), MODEL).write(trace_file)
    assert trace_file.read_bytes() == before
    assert [path.name for path in trace_file.parent.iterdir()] == ["trace"]
    with pytest.raises(RequestError, match="can't be written"):
        RoutingTrace(IDS, MODEL).write(trace_file.parent / "absent" / "trace")


def test_statistics_come_back_for_the_same_model_only(tmp_path: Path) -> None:
    policy, stats = make_policy("hazard", MODEL.layers, 16, 9), RouterStats(MODEL.layers, 16)
    for layer in range(3):
        policy.observe(layer, [1, 2, 3, 4])
    path = tmp_path / "statistics"
    save_statistics(path, MODEL, {"policy.hazard": policy.state(), "router": stats.state()})
    parts = load_statistics(path, TracedModel("a copy", "kimi_k2", (1, 2, 3), 16, 5))
    assert set(parts) == {"policy.hazard", "router"}
    for name, array in policy.state().items():
        np.testing.assert_array_equal(parts["policy.hazard"][name], array)
    stats.restore(parts["router"])
    with pytest.raises(RequestError, match="another model: n_experts is 16, expected 8"):
        load_statistics(path, TracedModel("tiny", "kimi_k2", (1, 2, 3), 8))
    with pytest.raises(RequestError, match="'routing_statistics', expected 'routing_trace'"):
        read_trace(path)
