"""What waiting for turns costs deterministic gradients on a GPU: a simulation, needs no GPU.

    python benchmarks/chained_sums.py                     # masks x heads side by side x latencies
    python benchmarks/chained_sums.py --masks full --chunks 1,2 --latencies 1,2,3
    python benchmarks/chained_sums.py --pairs 256 --ascending  # as a variant of the kernel would

Blocks draw items, which are the key tiles of a (batch, head) pair, the last one first and those of
a chunk of pairs by turns. An item walks the row tiles that it meets, a step each, and a step ends
when the row tile's part before it has been added and its turn has come, which takes `latency`
steps. Printed is the share of the time that all blocks work: 1 is a pass in which nobody waits or
runs out of work. It knows nothing of caches, and so not what more pairs side by side cost.
docs/kernels/backward.md has what was measured beside it.
"""

from __future__ import annotations

import argparse
import heapq

import common
import numpy as np
from anymask.benchmark_masks import NAMES, benchmark_mask
from rich.table import Table

TILE = (64, 128)  # query rows and keys, as the kernels for head dimensions up to 128 have them
NONE = 2  # the class of a tile without pairs
BETWEEN_ITEMS = 3.0  # steps that a block takes from one item to the next


def numbers(kind):
    return lambda text: tuple(kind(x) for x in text.split(","))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=numbers(str), default=NAMES, help="separated by commas")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--pairs", type=int, default=64, help="(batch, head) pairs")
    parser.add_argument("--blocks", type=int, default=132, help="that run at a time")
    parser.add_argument(
        "--chunks", type=numbers(int), default=(1, 2, 4, 8, 16), help="pairs side by side"
    )
    parser.add_argument("--latencies", type=numbers(float), default=(1.0, 2.0, 3.0),
                        help="steps that a turn takes from block to block")  # fmt: skip
    parser.add_argument(
        "--ascending", action="store_true", help="row tiles in order, none before a gap at the end"
    )
    return parser.parse_args(arguments)


def late_rows_last(rows: list[int]) -> list[int]:
    """The row tiles of an item, those before its first gap at the end (`late_row_tiles`)."""
    gaps = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    if not gaps or rows[0] % 32 + gaps[0] >= 32:
        return rows
    return rows[gaps[0] :] + rows[: gaps[0]]


def share_at_work(
    met: np.ndarray,
    pairs: int,
    chunk: int,
    latency: float,
    blocks: int = 132,
    ascending: bool = False,
) -> float:
    """The share of the time that blocks work.

    Args:
        met: bool [row tiles, key tiles], those that meet.
        pairs: (batch, head) pairs, all with the same mask.
        chunk: pairs whose items are drawn by turns.
        latency: in steps.
        blocks: that run at a time.
        ascending: whether all items walk their row tiles in order.
    """
    items = [np.nonzero(column)[0].tolist() for column in met.T]
    if not ascending:
        items = [late_rows_last(rows) for rows in items]
    free = [0.0] * blocks  # when each block is, as a heap
    turns = [[-np.inf] * len(met) for _ in range(pairs)]  # when each row tile's next turn has come
    for first in range(0, pairs, chunk):
        for rows in reversed(items):
            for pair in range(first, min(first + chunk, pairs)):
                now = heapq.heappop(free) + BETWEEN_ITEMS
                turn = turns[pair]
                for row in rows:
                    now = max(now + 1.0, turn[row])
                    turn[row] = now + latency
                heapq.heappush(free, now)
    work = pairs * (sum(map(len, items)) + BETWEEN_ITEMS * len(items))
    return work / blocks / max(free)


def main() -> int:
    options = parse()
    console = common.console_of(100)
    table = Table("mask", "latency", *map(str, options.chunks))
    with common.progress(console) as bar:
        task = bar.add_task("", total=len(options.masks) * len(options.latencies))
        for name in options.masks:
            bar.update(task, description=name)
            mask = benchmark_mask(name, options.length).mask
            met = mask.tile_classes(q_len=options.length, tile=TILE)[0, 0] != NONE
            for latency in options.latencies:
                shares = [
                    share_at_work(
                        met, options.pairs, chunk, latency, options.blocks, options.ascending
                    )
                    for chunk in options.chunks
                ]
                table.add_row(name, f"{latency:g}", *(f"{share:.2f}" for share in shares))
                bar.advance(task)
    console.print(f"S = {options.length}, {options.pairs} pairs, {options.blocks} blocks; share of "
                  "the time at work, by pairs side by side")  # fmt: skip
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
