"""Draws a mask and how it falls on tiles: in the terminal (rich) or as a picture (matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from anymask._inspection import MaskStatistics
from anymask.masks import Mask

# Classes of a tile, as Mask.tile_classes tells them.
ALL, NONE, SOME = 1, 2, 3
LABELS = {ALL: "all pairs allowed", SOME: "some: needs its bits", NONE: "none: skipped"}
COLOURS = {ALL: "#2a6f97", SOME: "#f4a261", NONE: "#e9ecef"}
_DARK_NONE = "#22262b"  # none on a terminal, which is usually dark
_GLYPHS = {ALL: "█", SOME: "▒", NONE: "·"}
_PICTURE_PIXELS = 768


def _merge(classes: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Classes of groups of rows x columns tiles: the union of what their pairs are."""
    height, width = classes.shape
    padded = np.zeros((-(-height // rows) * rows, -(-width // columns) * columns), np.uint8)
    padded[:height, :width] = classes
    groups = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    return np.bitwise_or.reduce(np.bitwise_or.reduce(groups, axis=3), axis=1)


def _one(classes: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    batches, heads = classes.shape[:2]
    if not (0 <= place[0] < batches and 0 <= place[1] < heads):
        raise ValueError(
            f"place: got {place}; the mask tells {batches} batch entries and {heads} heads apart"
        )
    return classes[place]


def summary(counts: MaskStatistics) -> str:
    """One line about how much of a mask is allowed, by pairs and by tiles."""
    skipped = counts.tiles - counts.all_tiles - counts.some_tiles
    return (
        f"{counts.density:.2%} of pairs allowed; of {counts.tiles} tiles {counts.all_tiles} all, "
        f"{counts.some_tiles} some, {skipped} skipped"
    )


def render(
    mask: Mask,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    tile: int | tuple[int, int] = 128,
    place: tuple[int, int] = (0, 0),
    width: int = 64,
    colour: bool | None = None,
) -> Any:
    """The tiles of a mask by class, as a rich renderable for a terminal.

    Args:
        mask: the mask; lengths that its arrays do not tell are `q_len` and `kv_len`.
        tile: rows and columns of a tile.
        place: which of the mask's own batch entries and heads.
        width: columns of the terminal to use at most; tiles are merged until they fit.
        colour: True: two rows of tiles a line in colour; False: one glyph a tile; None: colour
            where the terminal has 256 or more.

    >>> from rich.console import Console
    >>> Console(width=70).print(render(am.causal(), 64, tile=16, colour=False))
    ▒▒··
    ██▒▒
    █ all pairs allowed   ▒ some: needs its bits   · none: skipped
    """
    return _Tiles(
        _one(mask.tile_classes(q_len=q_len, kv_len=kv_len, tile=tile), place), width, colour
    )


class _Tiles:
    """What `render` returns: asks the console for its width and colours when it is printed."""

    def __init__(self, classes: np.ndarray, width: int, colour: bool | None) -> None:
        self.classes = classes
        self.width = width
        self.colour = colour

    def __rich_console__(self, console: Any, options: Any) -> Any:
        colour = self.colour
        if colour is None:
            colour = console.color_system in ("256", "truecolor")
        width = max(1, min(self.width, options.max_width))
        scale = max(1, -(-self.classes.shape[1] // width))
        yield _in_colour(self.classes, scale) if colour else _in_glyphs(self.classes, scale)


def _in_colour(classes: np.ndarray, scale: int) -> Any:
    from rich.text import Text

    text = Text()
    colours = {**COLOURS, NONE: _DARK_NONE}
    pixels = _merge(classes, scale, scale)
    for top in range(0, len(pixels), 2):
        lower = pixels[top + 1] if top + 1 < len(pixels) else None
        for column, value in enumerate(pixels[top]):
            style = colours[int(value)]
            if lower is not None:
                style += f" on {colours[int(lower[column])]}"
            text.append("▀", style=style)
        text.append("\n")
    for kind in (ALL, SOME, NONE):
        text.append("█ ", style=colours[kind])
        text.append(f"{LABELS[kind]}   ")
    text.rstrip()
    return text


def _in_glyphs(classes: np.ndarray, scale: int) -> Any:
    from rich.text import Text

    # A character is twice as high as it is wide.
    rows = _merge(classes, 2 * scale, scale)
    lines = ["".join(_GLYPHS[int(value)] for value in row) for row in rows]
    legend = "   ".join(f"{_GLYPHS[kind]} {LABELS[kind]}" for kind in (ALL, SOME, NONE))
    return Text("\n".join([*lines, legend]))


def _pairs_image(mask: Mask, q_len: int | None, kv_len: int | None, place: tuple) -> np.ndarray:
    """The share of allowed pairs a pixel, exact up to 4096 pairs a side, else by tile class."""
    classes = _one(mask.tile_classes(q_len=q_len, kv_len=kv_len, tile=4096), place)
    if classes.size == 1:
        pairs = _one(np.asarray(mask.to_dense(q_len=q_len, kv_len=kv_len)), place)
        step = max(1, -(-max(pairs.shape) // _PICTURE_PIXELS))
        height, width = (-(-n // step) for n in pairs.shape)
        padded = np.full((height * step, width * step), np.nan, np.float32)
        padded[: pairs.shape[0], : pairs.shape[1]] = pairs
        return np.nanmean(padded.reshape(height, step, width, step), axis=(1, 3))
    fine = max(16, 4096 * max(classes.shape) // _PICTURE_PIXELS)
    classes = _one(mask.tile_classes(q_len=q_len, kv_len=kv_len, tile=fine), place)
    return np.choose(classes, [0.0, 1.0, 0.0, 0.5])


def draw(
    mask: Mask,
    path: str | Path | None = None,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    tile: int | tuple[int, int] = 128,
    place: tuple[int, int] = (0, 0),
    title: str | None = None,
) -> Any:
    """A picture of a mask: its pairs on the left, its tiles by class on the right.

    Args:
        mask: the mask; lengths that its arrays do not tell are `q_len` and `kv_len`.
        path: where to save the picture (.png, .svg, .pdf); None: nowhere.
        tile: rows and columns of a tile.
        place: which of the mask's own batch entries and heads.
        title: above the picture; the mask's expression by default.

    Returns:
        The matplotlib figure.

    Raises:
        RuntimeError: when matplotlib is not installed.
    """
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise RuntimeError(
            "drawing to a file needs matplotlib: pip install 'anymask[draw]'"
        ) from error
    classes = _one(mask.tile_classes(q_len=q_len, kv_len=kv_len, tile=tile), place)
    counts = mask.statistics(q_len=q_len, kv_len=kv_len, tile=tile)
    figure = Figure(figsize=(9.2, 5.2), layout="constrained", dpi=120)
    figure.suptitle(title or repr(mask), fontsize=12, fontweight="bold")
    left, right = figure.subplots(1, 2)

    shades = ListedColormap(
        [_blend(COLOURS[NONE], COLOURS[ALL], share) for share in np.linspace(0, 1, 64)]
    )
    image = _pairs_image(mask, q_len, kv_len, place)
    left.imshow(image, cmap=shades, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    left.set_title(f"pairs: {counts.density:.2%} allowed", fontsize=10)

    rows, columns = tile if isinstance(tile, tuple) else (tile, tile)
    kinds = ListedColormap([COLOURS[ALL], COLOURS[NONE], COLOURS[SOME]])
    right.imshow(classes, cmap=kinds, vmin=1, vmax=3, interpolation="nearest", aspect="auto")
    right.set_title(f"tiles of {rows} x {columns}: {counts.tile_density:.2%} computed", fontsize=10)
    if max(classes.shape) <= 96:
        right.set_xticks(np.arange(-0.5, classes.shape[1]), minor=True)
        right.set_yticks(np.arange(-0.5, classes.shape[0]), minor=True)
        right.grid(which="minor", color="white", linewidth=0.4)
    for axes in (left, right):
        axes.tick_params(which="both", left=False, bottom=False, labelleft=False, labelbottom=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_box_aspect(image.shape[0] / image.shape[1])
        axes.set_xlabel("keys", fontsize=9)
    left.set_ylabel("queries", fontsize=9)
    figure.legend(
        handles=[Patch(facecolor=COLOURS[kind], label=LABELS[kind]) for kind in (ALL, SOME, NONE)],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    if path is not None:
        figure.savefig(path)
    return figure


def _blend(a: str, b: str, share: float) -> str:
    one, two = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in (a, b))
    return "#" + "".join(f"{round(x):02x}" for x in one + (two - one) * share)
