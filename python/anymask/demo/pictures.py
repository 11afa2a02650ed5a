"""The report's pictures as inline SVG. Colours are CSS variables of the page around them."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

# Classes of a tile as Mask.tile_classes gives them: 1 all, 2 none, 3 some.
_PALETTE = {1: (15, 118, 110, 255), 2: (0, 0, 0, 0), 3: (245, 158, 11, 255)}
_SHADES = {1: (15, 118, 110, 255), 2: (0, 0, 0, 0), 3: (15, 118, 110, 150)}


def png(indices: np.ndarray, palette: dict[int, tuple[int, int, int, int]]) -> bytes:
    """A PNG of palette indices, uint8 [rows, columns]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows, columns = indices.shape
    entries = [palette.get(i, (0, 0, 0, 0)) for i in range(max(palette) + 1)]
    lines = np.pad(indices.astype(np.uint8), ((0, 0), (1, 0)))  # filter 0 in front of each row
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", bytes(value for entry in entries for value in entry[:3])),
            chunk(b"tRNS", bytes(entry[3] for entry in entries)),
            chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "tick") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


# ---- masks --------------------------------------------------------------------------------------

_SIDE, _LEFT, _TOP = 440, 62, 10


def _mask_frame(picture: np.ndarray, palette: dict, length: int, label: str, extra: str) -> str:
    data = base64.b64encode(png(picture, palette)).decode()
    middle = _LEFT + _SIDE / 2
    parts = [
        f'<rect class="paper" x="{_LEFT}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}"/>',
        f'<image x="{_LEFT}" y="{_TOP}" width="{_SIDE}" height="{_SIDE}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/>',
        extra,
    ]
    for i in range(5):
        at = _SIDE * i / 4
        value = f"{length * i // 4:,}"
        parts.append(_text(_LEFT + at, _TOP + _SIDE + 16, value))
        parts.append(_text(_LEFT - 6, _TOP + at + 4, value, "end"))
    parts.append(_text(middle, _TOP + _SIDE + 34, "key", kind="axis"))
    turn = f"translate(13 {_TOP + _SIDE / 2}) rotate(-90)"
    parts.append(f'<g transform="{turn}">{_text(0, 0, "query", kind="axis")}</g>')
    return _svg(_LEFT + _SIDE + 22, _TOP + _SIDE + 42, label, parts)


def mask_pairs(classes: np.ndarray, cu_seqlens: np.ndarray, names: Sequence[str]) -> str:
    """The mask itself, from the classes of tiles of a pixel's size, with its documents' names."""
    length = int(cu_seqlens[-1])
    labels = []
    for name, begin, end in zip(names, cu_seqlens, cu_seqlens[1:]):
        middle = (int(begin) + int(end)) / 2 / length * _SIDE
        if (int(end) - int(begin)) / length * _SIDE < 13:
            continue  # no room for a line of text
        if middle < _SIDE / 2:
            x, anchor = _LEFT + middle + 8, "start"
        else:
            x, anchor = _LEFT + int(begin) / length * _SIDE - 6, "end"
        labels.append(_text(x, _TOP + middle + 4, name, anchor, "name"))
    return _mask_frame(classes, _SHADES, length, "which byte may see which", "".join(labels))


def mask_tiles(classes: np.ndarray, length: int) -> str:
    """How the mask falls on tiles, one square a tile."""
    size = max(8, 512 // len(classes))
    grown = classes.repeat(size, axis=0).repeat(size, axis=1)
    grown[::size] = 2  # a gap between squares
    grown[:, ::size] = 2
    return _mask_frame(grown, _PALETTE, length, "the class of each tile", "")


# ---- curves -------------------------------------------------------------------------------------


def _nice_step(span: float) -> float:
    raw = max(span, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)


class _Axes:
    """A frame with steps along x; `low` and `high` bound y."""

    def __init__(self, steps: int, low: float, high: float, height: int) -> None:
        self.width, self.height = 940, height
        self.left, self.right, self.top, self.bottom = 62, 925, 12, height - 40
        self.last = max(steps - 1, 1)
        self.low, self.high = low, high

    def x(self, step: float) -> float:
        return self.left + (self.right - self.left) * step / self.last

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * min(max(share, 0.0), 1.0)

    def grid(self, ticks: Sequence[tuple[float, str]]) -> list[str]:
        parts = []
        for value, text in ticks:
            y = self.y(value)
            parts.append(_line(self.left, y, self.right, y, "grid"))
            parts.append(_text(self.left - 8, y + 4, text, "end"))
        every = max(1, round(_nice_step(self.last)))
        for step in range(0, self.last + 1, every):
            parts.append(_text(self.x(step), self.bottom + 18, str(step + 1)))
        parts.append(_text((self.left + self.right) / 2, self.height - 4, "step", kind="axis"))
        return parts

    def curve(self, values: Sequence[float], kind: str) -> str:
        points = " ".join(f"{self.x(i):.1f},{self.y(v):.1f}" for i, v in enumerate(values))
        return f'<polyline class="{kind}" points="{points}"/>'

    def dots(self, values: Sequence[float], titles: Sequence[str], kind: str) -> str:
        return "".join(
            f'<circle class="{kind}" cx="{self.x(i):.1f}" cy="{self.y(v):.1f}" r="3.2">'
            f"<title>{escape(title)}</title></circle>"
            for i, (v, title) in enumerate(zip(values, titles))
        )


def losses(torch: Sequence[float], anymask: Sequence[float]) -> str:
    """Both curves on top of each other: torch's wide and pale, anymask's thin on it."""
    every = [*torch, *anymask]
    step = _nice_step(max(every) - min(every))
    low, high = math.floor(min(every) / step) * step, math.ceil(max(every) / step) * step
    high = high if high > low else low + step
    axes = _Axes(len(torch), low, high, 340)
    count = round((high - low) / step)
    ticks = [(low + i * step, f"{low + i * step:.3g}") for i in range(count + 1)]
    titles = [
        f"step {i + 1}: torch {a:.6f}, anymask {b:.6f}"
        for i, (a, b) in enumerate(zip(torch, anymask))
    ]
    parts = [
        *axes.grid(ticks),
        axes.curve(torch, "torch"),
        axes.curve(anymask, "anymask"),
        axes.dots(anymask, titles, "anymask-dot"),
    ]
    return _svg(axes.width, axes.height, "training losses", parts)


def differences(values: Sequence[float]) -> str:
    """|difference of the losses| a step, on a logarithmic axis; nothing where they are equal."""
    there = [v for v in values if v > 0.0] or [1e-8]
    low, high = math.floor(math.log10(min(there))), math.ceil(math.log10(max(there)))
    high = max(high, low + 1)
    axes = _Axes(len(values), low, high, 170)
    every = max(1, (high - low + 2) // 4)
    parts = axes.grid([(e, f"1e{e}") for e in range(low, high + 1, every)])
    for i, value in enumerate(values):
        if value > 0.0:
            x, y = axes.x(i), axes.y(math.log10(value))
            parts.append(_line(x, axes.bottom, x, y, "stem"))
            parts.append(
                f'<circle class="anymask-dot" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
                f"<title>step {i + 1}: {value:.2e}</title></circle>"
            )
    return _svg(axes.width, axes.height, "difference of the losses", parts)


# ---- bars ---------------------------------------------------------------------------------------


def bars(torch: float, anymask: float, texts: tuple[str, str], label: str) -> str:
    """One bar each."""
    longest = max(torch, anymask, 1e-12)
    parts = []
    for row, (name, value, text) in enumerate(
        (("torch", torch, texts[0]), ("anymask", anymask, texts[1]))
    ):
        y = 8 + row * 42
        width = max(2.0, 270 * value / longest)
        parts.append(_text(66, y + 20, name, "end", "axis"))
        parts.append(
            f'<rect class="bar-{name}" x="76" y="{y}" width="{width:.1f}" height="30" rx="3"/>'
        )
        parts.append(_text(76 + width + 8, y + 20, text, "start", "value"))
    return _svg(460, 92, label, parts)
