"""A few new queries against a cache of keys on the CPU, as in decoding, beside torch.

    python benchmarks/cpu_decoding.py [--json FILE]

Rows are the last of the sequence and see all keys before them. Time is of the whole call, in turns
with torch's; bandwidth is what keys and values have, once each. The first key head's result is
compared with float64 before a call is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import anymask as am
import common
import torch
from anymask import machine
from anymask.bench.check import Slice, attention, compare
from anymask.measuring import interleaved_medians
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

DTYPES = ("float32", "bfloat16", "float16")


class Case(NamedTuple):
    rows: int
    heads: int
    kv_heads: int
    keys: int


CASES = (
    *(Case(rows, 8, 8, 1024) for rows in (1, 2, 4, 8, 16)),
    Case(1, 32, 32, 4096),
    Case(1, 32, 8, 4096),
    Case(1, 64, 8, 4096),
)


class Row(NamedTuple):
    """One case of one type; seconds."""

    dtype: str
    rows: int
    heads: int
    kv_heads: int
    keys: int
    anymask: float
    torch: float
    gigabytes: float  # a second, of anymask
    error: float  # as a share of what is allowed


def measure(case: Case, dtype: str, options: argparse.Namespace) -> Row:
    """Raises WrongResult."""
    torch.manual_seed(0)
    place = {"dtype": getattr(torch, dtype)}
    q = torch.randn(1, case.heads, case.rows, options.dim, **place)
    k, v = (torch.randn(1, case.kv_heads, case.keys, options.dim, **place) for _ in range(2))
    mask = am.causal() if case.rows > 1 else None
    visible = torch.ones(case.rows, case.keys, dtype=torch.bool).tril(case.keys - case.rows)
    calls = {
        "anymask": lambda: am.attention(q, k, v, mask, layout="bhsd"),
        "torch": lambda: scaled_dot_product_attention(
            q, k, v, attn_mask=visible if case.rows > 1 else None,
            enable_gqa=case.heads != case.kv_heads,
        ),
    }  # fmt: skip
    with torch.no_grad():
        error = check(calls["anymask"](), q, k, v, visible)
        times = interleaved_medians(calls, rounds=options.rounds, budget=options.budget)
    size = (k.numel() + v.numel()) * k.element_size()
    return Row(dtype, *case, **times, gigabytes=size / times["anymask"] / 1e9, error=error)


def check(out: Any, q: Any, k: Any, v: Any, visible: Any) -> float:
    """The error of the first key head's output, as a share of what is allowed."""
    group = q.shape[1] // k.shape[1]
    part, mask = Slice(q[0, :group], k[0, 0], v[0, 0], None), visible[None, None]
    exact, naive = (attention(part, mask, 0, dtype)["out"] for dtype in (torch.float64, q.dtype))
    return compare("out", out[0, :group], exact, naive)


def report(rows: list[Row], options: argparse.Namespace) -> Table:
    title = f"{machine.cpu_name()}, {machine.threads()} threads, D={options.dim}, microseconds"
    table = Table(title=title, title_style="", title_justify="left")
    for name in ("type", "rows", "heads", "keys", "anymask", "torch", "x torch", "GB/s"):
        table.add_column(name, justify="left" if name == "type" else "right")
    for row in rows:
        table.add_row(
            row.dtype, str(row.rows), f"{row.heads}/{row.kv_heads}", str(row.keys),
            f"{row.anymask * 1e6:.0f}", f"{row.torch * 1e6:.0f}", f"{row.torch / row.anymask:.2f}",
            f"{row.gigabytes:.1f}",
        )  # fmt: skip
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--keys", type=int, help="of every case, instead of its own")
    parser.add_argument("--rounds", type=int, default=200, help="times each is measured")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    common.is_ready("cpu")
    console = common.console_of(100)
    rows = []
    with common.progress(console) as bar:
        task = bar.add_task("", total=len(options.dtypes) * len(CASES))
        for dtype in options.dtypes:
            for case in CASES:
                if options.keys:
                    case = case._replace(keys=options.keys)
                bar.update(task, description=f"{dtype}, {case.rows} rows, {case.keys} keys")
                rows.append(measure(case, dtype, options))
                bar.advance(task)
    console.print(report(rows, options))
    if options.json:
        common.write_json(
            options.json,
            {
                "machine": machine.describe(),
                "dim": options.dim,
                "rows": [r._asdict() for r in rows],
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
