"""Masks as values: build, combine, look at and draw them.

python examples/masks.py [FILE.png]
"""

from __future__ import annotations

import sys

import anymask as am
import numpy as np
from anymask import drawing
from rich.console import Console


def main() -> None:
    length, prompt = 1024, 64
    # Every token sees the prompt, a window around itself and its own document; none sees padding.
    documents = am.documents(np.repeat([0, 1, 2], [400, 300, 324]))
    columns = np.arange(length)[None, :]  # one row, broadcast to all
    mask = am.sliding_window(96, 96) | documents | am.dense(columns < prompt)
    mask = mask & am.dense(columns < 1000)
    console = Console()
    console.print(drawing.render(mask, length, tile=32))
    console.print(drawing.summary(mask.statistics(q_len=length, tile=32)))

    # A dense mask that happens to be intervals needs one to four numbers a key, not a row.
    indices, causal = am.intervals_from_dense(np.tril(np.ones((length, length), bool), -5))
    console.print(f"{length} x {length} pairs as {list(indices.shape)} integers, causal={causal}")

    if len(sys.argv) > 1:
        drawing.draw(mask, sys.argv[1], length, tile=32, title="prompt, window, documents")
        console.print(f"wrote {sys.argv[1]}")


if __name__ == "__main__":
    main()
