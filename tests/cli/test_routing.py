"""`k2lite trace`, `replay` and `stats` as a user meets them, and the pictures they draw."""

from __future__ import annotations

import json
import re
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest

from k2lite.charts import RAMP, heat_map_png, heat_map_svg, html_page, html_table, line_chart
from k2lite.cli import main
from k2lite.offload.routing_trace import RoutingTrace, TracedModel, read_trace
from tools.synthetic_routing import synthetic_routing

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.trace"
    model = TracedModel("a<b", "kimi_k2", (1, 2, 3, 4), 16, 1000)
    RoutingTrace(synthetic_routing(30, 4, 16, 2, seed=0), model).write(path)
    return path


def decode_png(data: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a PNG without filters, read by the format's description (RFC 2083)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, []
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        parts.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in parts] == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", parts[0][1])
    assert rest == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(parts[1][1]), dtype=np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_trace_records_the_demo_model_and_stats_reads_it(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out, picture = tmp_path / "text", tmp_path / "out", tmp_path / "map.png"
    text.write_text("Moonlight on water")
    assert main(["trace", str(demo), "--out", str(out), "--text", str(text), "--max-tokens", "6"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"wrote {out}: 6 tokens x" in captured.err
    trace = read_trace(out)
    assert trace.model.name == "model"
    assert trace.model.expert_bytes > 0
    assert main(["stats", str(out), "--json", "--picture", str(picture)]) == 0
    recorded = json.loads(capsys.readouterr().out)
    assert main(["stats", str(demo), "--text", str(text), "--max-tokens", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == recorded
    counts = np.array(recorded["counts"])
    assert counts.sum() == trace.ids.size
    assert decode_png(picture.read_bytes()).shape == (4 * counts.shape[0], 4 * counts.shape[1], 3)


def test_a_disk_without_room_for_the_trace_is_said_before_the_text_is_read(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("Some text.")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=400))
    assert main(["trace", str(demo), "--out", str(tmp_path / "t"), "--text", str(tmp_path / "text")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"t: will have (\d+) bytes and its disk has 400 free", said)
    assert not (tmp_path / "t").exists()


def test_stats_of_a_trace(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "map.html"
    assert main(["stats", str(trace), "--picture", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a<b: 30 tokens x 4 layers x 2 of 16 experts"
    assert [line.split()[0] for line in lines[-5:]] == ["1", "2", "3", "4", "mean"]
    assert len({len(line) for line in lines[-6:]}) == 1
    assert "a&lt;b" in page.read_text()
    assert "a<b" not in page.read_text()


def test_replay_prints_the_table_and_draws_the_chart(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "chart.svg"
    base = ["replay", str(trace), "--policy", "lru,hazard", "--slots", "10%,32", "--warmup", "10"]
    assert main([*base, "--json", "--picture", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tokens"], report["counted_tokens"], report["expert_bytes"]) == (30, 20, 1000)
    runs = report["runs"]
    assert [(run["policy"], run["slots"]) for run in runs] == [
        (policy, slots) for slots in (6, 32) for policy in ("lru", "hazard", "belady")
    ]
    for run in runs:
        assert run["hit_rate"] == pytest.approx(1 - run["reads_per_token"] / 8)
        assert run["read_bytes_per_token"] == pytest.approx(1000 * run["reads_per_token"])
        best = next(r for r in runs if r["slots"] == run["slots"] and r["policy"] == "belady")
        assert run["misses_over_belady"] == pytest.approx(run["reads_per_token"] / best["reads_per_token"])
    tree = ElementTree.fromstring(picture.read_text())
    assert len(tree.findall(f"{SVG}polyline")) == 3
    assert {"lru", "hazard", "belady"} <= {text.text for text in tree.iter(f"{SVG}text")}
    assert main(base) == 0
    table = capsys.readouterr().out.splitlines()
    assert "the last 20 tokens counted" in table[0]
    assert table[1].split()[:3] == ["slots", "share", "policy"]
    assert [line.split()[2] for line in table[2:]] == ["lru", "hazard", "belady"] * 2
    assert main([*base, "--expert-bytes", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["expert_bytes"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "{trace}", "--policy", "lru,best"], "policy 'best' is unknown"),
        (["replay", "{trace}", "--slots", "many"], "--slots 'many'"),
        (["replay", "{trace}", "--slots", "1"], "1 slots can't hold"),
        (["replay", "{trace}", "--warmup", "100%"], "leaves none"),
        (["replay", "{trace}", "--experts", "8"], "the trace says 16 experts, not 8"),
        (["replay", "{trace}", "--experts", "0"], "--experts is 0"),
        (["replay", "{trace}", "--expert-bytes", "-1"], "--expert-bytes is -1"),
        (["replay", "{trace}", "--picture", "x.png"], "a chart is drawn as .svg or .html"),
        (["replay", "{trace}.absent"], "can't be read"),
        (["stats", "{trace}", "--picture", "x.gif"], "a map is drawn as .svg, .html, .png"),
        (["stats", "{trace}", "--text", "x"], "--text is for a model"),
        (["stats", "{trace}", "--max-tokens", "3"], "--max-tokens is for a model"),
        (["stats", "{demo}", "--experts", "3"], "--experts is for a trace"),
        (["stats", "{demo}", "--max-tokens", "0"], "--max-tokens is 0"),
        (["trace", "{demo}", "--out", "{trace}.absent/t", "--text", "x"], "its folder does not exist"),
        (["trace", "{demo}", "--out", "{trace}", "--text", "{trace}.absent"], "can't be read"),
    ],
)
def test_a_mistake_is_one_line(
    trace: Path, demo: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([text.format(trace=trace, demo=demo) for text in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_heat_map_s_colors_go_up_its_ramp() -> None:
    values = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 4.0]])
    pixels = decode_png(heat_map_png(values, cell=3))
    assert pixels.shape == (6, 9, 3)
    for row in range(2):
        for column in range(3):
            block = pixels[3 * row : 3 * row + 3, 3 * column : 3 * column + 3].reshape(-1, 3)
            assert (block == RAMP[int(values[row, column])]).all()
    assert (decode_png(heat_map_png(np.zeros((2, 2)))) == RAMP[0]).all()


def test_texts_from_outside_are_escaped() -> None:
    evil = "<script>&\"'"
    chart = line_chart(evil, evil, evil, {evil: [(0.1, 0.2), (0.3, 0.4)]})
    heat = heat_map_svg(evil, evil, [evil], np.ones((1, 4)))
    for svg in (chart, heat):
        assert evil in [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    page = html_page(evil, [html_table([evil], [[evil]])])
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 4


def test_a_point_lies_where_its_values_say() -> None:
    tree = ElementTree.fromstring(line_chart("t", "x", "y", {"a": [(0.5, 1.0), (0.0, 0.0), (1.0, 0.5)]}))
    (line,) = tree.findall(f"{SVG}polyline")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in line.attrib["points"].split())
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y2 == pytest.approx(y2 - y1)
    assert y1 < y0
