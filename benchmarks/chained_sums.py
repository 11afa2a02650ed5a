"""What waiting for turns costs deterministic gradients on a GPU: a simulation, needs no GPU.

    python benchmarks/chained_sums.py                     # masks x heads side by side x latencies
    python benchmarks/chained_sums.py --masks full --chunks 1,2 --latencies 1,2,3
    python benchmarks/chained_sums.py --head-dim 64 --pairs 256

Blocks draw items, which are the key tiles of a (batch, head) pair, the last one first and those of
a chunk of pairs by turns. An item walks the row tiles that it meets, a step each, and a step ends
when the row tile's part before it has been added and its turn has come, which takes `latency`
steps. Printed is the share of the time that all blocks work: 1 is a pass in which nobody waits or
runs out of work. Behind it, the share of steps whose row tile (Q, dO and dQ's sums) is not among
the last used ones that fit the cache: what more pairs side by side cost. If all steps missed, they
would ask for twice an H100's bandwidth, at head dimension 256 for four times. Of its 50 MiB, 28
are what fits best to what docs/kernels/backward.md has as measured. Keys are not reordered here.
"""

from __future__ import annotations

import argparse
import heapq
from collections import OrderedDict

import common
import numpy as np
from anymask.benchmark_masks import NAMES, benchmark_mask
from rich.table import Table

ROWS = 64  # of a row tile
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
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--cache", type=float, default=28.0, help="MiB that hold row tiles")
    return parser.parse_args(arguments)


def simulate(
    met: np.ndarray, pairs: int, chunk: int, latency: float, blocks: int = 132, cached: int = 0
) -> tuple[float, float]:
    """The share of the time that blocks work, and the share of steps that miss the cache.

    Args:
        met: bool [row tiles, key tiles], those that meet.
        pairs: (batch, head) pairs, all with the same mask.
        chunk: pairs whose items are drawn by turns.
        latency: in steps.
        blocks: that run at a time.
        cached: row tiles that fit the cache; 0: nobody asks.
    """
    items = [np.nonzero(column)[0].tolist() for column in met.T]
    free = [0.0] * blocks  # when each block is, as a heap
    turns = [[-np.inf] * len(met) for _ in range(pairs)]  # when each row tile's next turn has come
    steps = []  # (when it begins, pair, row tile)
    for first in range(0, pairs, chunk):
        for rows in reversed(items):
            for pair in range(first, min(first + chunk, pairs)):
                now = heapq.heappop(free) + BETWEEN_ITEMS
                turn = turns[pair]
                for row in rows:
                    if cached:
                        steps.append((now, pair, row))
                    now = max(now + 1.0, turn[row])
                    turn[row] = now + latency
                heapq.heappush(free, now)
    work = pairs * (sum(map(len, items)) + BETWEEN_ITEMS * len(items))
    return work / blocks / max(free), share_of_misses(steps, cached)


def share_of_misses(steps: list[tuple[float, int, int]], cached: int) -> float:
    """Of row tiles in the order of time, with the `cached` last used ones at hand."""
    last: OrderedDict[tuple[int, int], None] = OrderedDict()
    misses = 0
    for _, *tile in sorted(steps):
        key = tuple(tile)
        misses += key not in last
        last[key] = None
        last.move_to_end(key)
        if len(last) > cached:
            last.popitem(last=False)
    return misses / max(1, len(steps))


def main() -> int:
    options = parse()
    console = common.console_of(100)
    table = Table("mask", "latency", *map(str, options.chunks))
    tile = (ROWS, 128 if options.head_dim <= 128 else 64)
    cached = int(options.cache * 2**20 / (ROWS * options.head_dim * 8))
    with common.progress(console) as bar:
        task = bar.add_task("", total=len(options.masks) * len(options.latencies))
        for name in options.masks:
            bar.update(task, description=name)
            mask = benchmark_mask(name, options.length).mask
            met = mask.tile_classes(q_len=options.length, tile=tile)[0, 0] != NONE
            for latency in options.latencies:
                cells = []
                for chunk in options.chunks:
                    share, misses = simulate(
                        met, options.pairs, chunk, latency, options.blocks, cached
                    )
                    cells.append(f"{share:.2f} {misses:.2f}")
                table.add_row(name, f"{latency:g}", *cells)
                bar.advance(task)
    console.print(f"S = {options.length}, {options.pairs} pairs, {options.blocks} blocks; share of "
                  "time at work,\nand of steps that miss, by pairs side by side")  # fmt: skip
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
