"""Draws the pictures of README.md and docs/masks.md: `python docs/pictures/draw.py [FOLDER]`.

Each shows a mask of 256 queries (down) x 256 keys (across) on tiles of 16 x 16: tiles whose pairs
are all allowed in blue, those with some in orange, with the allowed pairs dark, those with none
empty. A real mask has 128 x 128 tiles and looks the same, only larger.
"""

import sys
from pathlib import Path

import anymask as am
import numpy as np
from anymask import drawing
from anymask.benchmark_masks import NAMES, Documents, benchmark_mask
from anymask.demo.pictures import colour, png

LENGTH, TILE = 256, 16
PAPER, GRID, ALL, SOME_HIDDEN, SOME_ALLOWED, FRAME = range(6)
PALETTE = {
    PAPER: (255, 255, 255, 255),
    GRID: (232, 236, 239, 255),
    ALL: colour(drawing.COLOURS[drawing.ALL]),
    SOME_HIDDEN: (253, 236, 220, 255),
    SOME_ALLOWED: colour(drawing.COLOURS[drawing.SOME]),
    FRAME: (148, 162, 175, 255),
}
DOCUMENTS = Documents(
    np.array([54, 90, 34, 78]), np.array([18, 30, 12, 24]), np.array([False, True, False, True])
)


def kinds() -> "dict[str, am.Mask]":
    """One example of each mask kind, and of an expression."""
    position = np.arange(LENGTH, dtype=np.int32)
    ids = DOCUMENTS.ids
    scattered = np.full((LENGTH, 1), LENGTH, np.int32)
    scattered[:, 0] = np.minimum(position + 8 + (position * 37) % 150, LENGTH)
    wheel = np.add.outer(np.arange(8), np.arange(8)) % 3 != 1
    disc = np.hypot(*np.meshgrid(position - 128, position - 128)) < 110
    scores = ((position * 97) % 251).astype(np.float32)[None, None]
    eq = np.where(position < 40, 1, -1 - ids).astype(np.int32)
    return {
        "full": am.full(),
        "causal": am.causal(),
        "sliding_window": am.sliding_window(40, 10),
        "prefix_lm": am.prefix_lm(90),
        "documents": am.documents(ids),
        "intervals": am.intervals(scattered, causal=True),
        "blocks": am.blocks(wheel, block_size=32),
        "dense": am.dense(disc),
        "ids": am.ids(eq, -1 - ids),
        "top_keys": am.top_keys(scores, 60),
        "expression": am.causal() & am.documents(ids) & ~am.sliding_window(24, 0),
    }


def draw(mask: am.Mask, path: Path) -> None:
    allowed = mask.to_dense(q_len=LENGTH)[0, 0]
    classes = mask.tile_classes(q_len=LENGTH, tile=TILE)[0, 0]
    classes = classes.repeat(TILE, axis=0).repeat(TILE, axis=1)
    pixels = np.select(
        [classes == 1, classes == 2, allowed], [ALL, PAPER, SOME_ALLOWED], SOME_HIDDEN
    )
    empty = pixels == PAPER
    pixels[::TILE][empty[::TILE]] = GRID
    pixels[:, ::TILE][empty[:, ::TILE]] = GRID
    path.write_bytes(png(np.pad(pixels, 1, constant_values=FRAME), PALETTE))


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name in NAMES:
        draw(benchmark_mask(name, LENGTH, documents=DOCUMENTS).mask, folder / f"{name}.png")
    for name, mask in kinds().items():
        draw(mask, folder / f"kind-{name}.png")


if __name__ == "__main__":
    main()
