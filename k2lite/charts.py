"""Pictures without a drawing library: line charts and heat maps as SVG, alone or in an HTML page, heat maps as PNG too.

Invariant: every text that comes from outside is escaped; a picture refers to nothing outside itself. Knows no models.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 52
# Tells apart for the color-blind (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
STYLE = "font-family:sans-serif;font-size:12px"
# A map's colors from 0 to 1, dark to bright: black, violet, red, yellow, white; lightness rises all the way.
RAMP = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], dtype=np.float64)
CELL = 4  # pixels of a PNG's cell


def line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """An SVG of y from 0 to 1 over x, both shares; one line a name, with a legend in the order given."""
    most = max((x for points in lines.values() for x, _ in points), default=1.0) or 1.0
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + x / most * inner_width, TOP + (1 - y) * inner_height

    parts = [_text(LEFT, 22, title, "font-weight:bold")]
    for step in range(6):
        y = step / 5
        left, at = place(0, y)
        parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{LEFT + inner_width}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 8, at + 4, f"{y:.0%}", "", "end"))
        across, bottom = place(most * step / 5, 0)
        parts.append(
            _text(across, bottom + 18, f"{most * step / 5:.3g}" if most > 1 else f"{most * step / 5:.1%}", "", "middle")
        )
    parts.append(_text(LEFT + inner_width / 2, HEIGHT - 12, x_label, "", "middle"))
    parts.append(f'<g transform="rotate(-90 16 {TOP + inner_height / 2})">')
    parts.append(_text(16, TOP + inner_height / 2, y_label, "", "middle") + "</g>")
    for index, (name, points) in enumerate(lines.items()):
        color, dash = COLORS[index % len(COLORS)], ' stroke-dasharray="6 4"' if index >= len(COLORS) else ""
        placed = [place(x, y) for x, y in sorted(points)]
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{shown}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in placed]
        height = TOP + 14 + 20 * index
        right = LEFT + inner_width + 12
        parts.append(
            f'<line x1="{right}" y1="{height}" x2="{right + 20}" y2="{height}" stroke="{color}" '
            f'stroke-width="2"{dash}/>'
        )
        parts.append(_text(right + 26, height + 4, name))
    return _svg(WIDTH, HEIGHT, parts)


def heat_map_svg(title: str, x_label: str, y_labels: Sequence[str], values: Floats) -> str:
    """An SVG of values [rows, columns], scaled to their largest; a row label each."""
    import base64

    rows, columns = values.shape
    cell_height = max(4, min(16, 640 // rows))
    width = max(columns, min(960, columns * 8))
    height = rows * cell_height
    image = base64.b64encode(heat_map_png(values, cell=1)).decode()
    every = max(1, math.ceil(12 / cell_height))  # a label needs 12 pixels
    parts = [
        _text(LEFT, 22, title, "font-weight:bold"),
        f'<image x="{LEFT}" y="{TOP}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{image}"/>',
        *(
            _text(LEFT - 6, TOP + row * cell_height + cell_height / 2 + 4, y_labels[row], "font-size:10px", "end")
            for row in range(0, rows, every)
        ),
        _text(LEFT + width / 2, TOP + height + 24, x_label, "", "middle"),
    ]
    return _svg(LEFT + width + 20, TOP + height + 40, parts)


def heat_map_png(values: Floats, *, cell: int = CELL) -> bytes:
    """The bytes of a PNG: values [rows, columns] scaled to their largest, `cell` pixels each way."""
    largest = float(values.max(initial=0.0))
    scaled = np.clip(values / largest if largest > 0 else values, 0, 1) * (len(RAMP) - 1)
    low = np.minimum(scaled.astype(np.int64), len(RAMP) - 2)
    part = (scaled - low)[..., None]
    pixels = np.rint(RAMP[low] * (1 - part) + RAMP[low + 1] * part).astype(np.uint8)
    pixels = pixels.repeat(cell, axis=0).repeat(cell, axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: no filter
    size = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", size) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page of pictures and tables that are HTML already."""
    style = f"body{{{STYLE};margin:24px}}td,th{{padding:2px 10px;text-align:right}}"
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
    body = f"<h1>{escape(title)}</h1>{''.join(parts)}"
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    background = f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{STYLE}">{background}{"".join(parts)}</svg>'
