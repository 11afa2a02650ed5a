"""The report's pictures as inline SVG. Colours are CSS variables of the page around them."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from anymask.drawing import ALL, COLOURS, NONE, SOME

Colour = tuple[int, int, int, int]  # red, green, blue, opacity


def colour(text: str, opacity: int = 255) -> Colour:
    """Of "#rrggbb"."""
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue, opacity


_CLEAR = (0, 0, 0, 0)
_TILES = {ALL: colour(COLOURS[ALL]), SOME: colour(COLOURS[SOME]), NONE: _CLEAR}
_PAIRS = {ALL: colour(COLOURS[ALL]), SOME: colour(COLOURS[ALL], 150), NONE: _CLEAR}


def png(indices: np.ndarray, palette: dict[int, Colour]) -> bytes:
    """A PNG of palette indices, uint8 [rows, columns]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows, columns = indices.shape
    entries = [palette.get(i, _CLEAR) for i in range(max(palette) + 1)]
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
    return _mask_frame(classes, _PAIRS, length, "which byte may see which", "".join(labels))


def mask_tiles(classes: np.ndarray, length: int) -> str:
    """How the mask falls on tiles, one square a tile."""
    size = max(8, 512 // len(classes))
    grown = classes.repeat(size, axis=0).repeat(size, axis=1)
    grown[::size] = NONE  # a gap between squares
    grown[:, ::size] = NONE
    return _mask_frame(grown, _TILES, length, "the class of each tile", "")


# ---- curves -------------------------------------------------------------------------------------


def _nice_step(span: float, parts: int) -> float:
    """A round step that divides `span` into at most `parts` or so."""
    raw = max(span, 1e-9) / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)


class _Axes:
    """A frame: x from `first` to `last`, y from `low` to `high`."""

    def __init__(self, first: float, last: float, low: float, high: float, height: int) -> None:
        self.width, self.height = 940, height
        self.left, self.right, self.top, self.bottom = 62, 925, 12, height - 40
        self.first, self.last = first, last if last > first else first + 1
        self.low, self.high = low, high if high > low else low + 1

    def x(self, value: float) -> float:
        share = (value - self.first) / (self.last - self.first)
        return self.left + (self.right - self.left) * share

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.bottom - (self.bottom - self.top) * min(max(share, 0.0), 1.0)

    def grid(self, ticks: Sequence[tuple[float, str]], name: str, least: float) -> list[str]:
        """Lines and labels; labels of x are multiples of a round number, `least` at least."""
        parts = []
        for value, text in ticks:
            y = self.y(value)
            parts.append(_line(self.left, y, self.right, y, "grid"))
            parts.append(_text(self.left - 8, y + 4, text, "end"))
        step = max(least, _nice_step(self.last - self.first, 8))
        labels = [self.first, *(step * i for i in range(1, int(self.last / step + 1e-9) + 1))]
        for value in labels:
            if value == self.first or self.x(value) > self.left + 25:
                parts.append(_text(self.x(value), self.bottom + 18, f"{value:g}"))
        parts.append(_text((self.left + self.right) / 2, self.height - 4, name, kind="axis"))
        return parts

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> str:
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{kind}" points="{places}"/>'

    def dot(self, x: float, y: float, title: str, kind: str = "anymask-dot") -> str:
        return (
            f'<circle class="{kind}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.2">'
            f"<title>{escape(title)}</title></circle>"
        )


def _loss_axes(
    values: Sequence[float], first: float, last: float, height: int
) -> tuple[_Axes, list[tuple[float, str]]]:
    step = _nice_step(max(values) - min(values), 4)
    low = math.floor(min(values) / step) * step
    count = max(1, math.ceil((max(values) - low) / step - 1e-9))
    ticks = [(low + i * step, f"{low + i * step:.4g}") for i in range(count + 1)]
    return _Axes(first, last, low, ticks[-1][0], height), ticks


def losses(torch: Sequence[float], anymask: Sequence[float]) -> str:
    """Both curves on top of each other: torch's wide and pale, anymask's thin on it."""
    axes, ticks = _loss_axes([*torch, *anymask], 1, len(torch), 340)
    parts = [
        *axes.grid(ticks, "step", 1),
        axes.curve(list(enumerate(torch, 1)), "torch"),
        axes.curve(list(enumerate(anymask, 1)), "anymask"),
    ]
    for step, (a, b) in enumerate(zip(torch, anymask), 1):
        parts.append(axes.dot(step, b, f"step {step}: torch {a:.6f}, anymask {b:.6f}"))
    return _svg(axes.width, axes.height, "training losses", parts)


def losses_over_time(
    torch: Sequence[tuple[float, float]], anymask: Sequence[tuple[float, float]]
) -> str:
    """The same curves of (seconds, loss)."""
    every = [*torch, *anymask]
    axes, ticks = _loss_axes([loss for _, loss in every], 0, max(x for x, _ in every), 260)
    parts = axes.grid(ticks, "seconds of training", 0)
    for name, points in (("torch", torch), ("anymask", anymask)):
        parts.append(axes.curve(points, f"{name}-thin"))
        for step, (x, y) in enumerate(points, 1):
            parts.append(
                axes.dot(x, y, f"{name}, step {step}: {y:.4f} after {x:.1f} s", f"{name}-dot")
            )
    return _svg(axes.width, axes.height, "training losses over time", parts)


def differences(values: Sequence[float]) -> str:
    """|difference of the losses| a step, on a logarithmic axis; nothing where they are equal."""
    there = [v for v in values if v > 0.0] or [1e-8]
    low, high = math.floor(math.log10(min(there))), math.ceil(math.log10(max(there)))
    high = max(high, low + 1)
    axes = _Axes(1, len(values), low, high, 170)
    every = max(1, (high - low + 2) // 4)
    parts = axes.grid([(e, f"1e{e}") for e in range(low, high + 1, every)], "step", 1)
    for step, value in enumerate(values, 1):
        if value > 0.0:
            x, y = axes.x(step), math.log10(value)
            parts.append(_line(x, axes.bottom, x, axes.y(y), "stem"))
            parts.append(axes.dot(step, y, f"step {step}: {value:.2e}"))
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
