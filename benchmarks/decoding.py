"""A few new queries against a cache of keys, as in decoding, beside torch; and short whole rows.

    python benchmarks/decoding.py [--device cuda] [--json FILE]

Rows are the last of the sequence and see all keys before them. On the CPU time is of the whole
call; on a GPU calls are replayed from a CUDA graph, which leaves Python out of it, with a plan.
Both in turns with torch's kernels; bandwidth is what keys and values have, once each. The first key
head's result is compared with float64 before a call is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anymask as am
import common
import torch
from anymask import machine
from anymask.bench.check import Slice, attention, compare
from anymask.measuring import interleaved_medians
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

DTYPES = ("float32", "bfloat16", "float16")
CALLS = 10  # of a CUDA graph
BACKENDS = {
    "cpu": {"torch": None},
    "cuda": {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION},
}


class Case(NamedTuple):
    rows: int
    heads: int
    kv_heads: int
    keys: int
    batch: int = 1


CASES = {
    "cpu": (
        *(Case(rows, 8, 8, 1024) for rows in (1, 2, 4, 8, 16)),
        Case(1, 32, 32, 4096),
        Case(1, 32, 8, 4096),
        Case(1, 64, 8, 4096),
    ),
    "cuda": (
        Case(1, 32, 8, 4096),
        Case(1, 32, 8, 32768),
        Case(1, 32, 32, 8192),
        Case(1, 4, 1, 32768),
        Case(1, 32, 8, 8192, batch=16),
        Case(1, 32, 8, 4096, batch=20),
        Case(1, 32, 8, 4096, batch=128),
        Case(16, 32, 8, 32768),
        Case(512, 8, 8, 8192),
        *(Case(rows, heads, heads, rows) for rows, heads in ((2048, 4), (4096, 4), (8192, 2))),
    ),
}


class Row(NamedTuple):
    """One case of one type; seconds."""

    dtype: str
    rows: int
    heads: int
    kv_heads: int
    keys: int
    batch: int
    times: dict[str, float]  # anymask's and torch's, those that can
    gigabytes: float  # a second, of anymask
    error: float  # as a share of what is allowed


def measure(case: Case, dtype: str, options: argparse.Namespace) -> Row:
    """Raises WrongResult."""
    device = options.device
    torch.manual_seed(0)
    place = {"dtype": getattr(torch, dtype), "device": device}
    q = torch.randn(case.batch, case.heads, case.rows, options.dim, **place)
    k, v = (
        torch.randn(case.batch, case.kv_heads, case.keys, options.dim, **place) for _ in range(2)
    )
    visible = torch.ones(case.rows, case.keys, dtype=torch.bool, device=device)
    visible = visible.tril(case.keys - case.rows)
    ours = masked(case, q.dtype, options)
    calls = {"anymask": lambda: am.attention(q, k, v, layout="bhsd", **ours)}
    for name, backend in BACKENDS[device].items():
        calls[name] = torch_call(q, k, v, visible, backend)
    with torch.no_grad():
        error = check(calls["anymask"](), q, k, v, visible)
        calls = {name: call for name, call in calls.items() if can(call)}
        each = 1
        if device == "cuda":
            calls, each = {name: graphed(call) for name, call in calls.items()}, CALLS
        times = interleaved_medians(
            calls, device=device, rounds=options.rounds, budget=options.budget
        )
    times = {name: time / each for name, time in times.items()}
    size = (k.numel() + v.numel()) * k.element_size()
    return Row(dtype, *case, times, gigabytes=size / times["anymask"] / 1e9, error=error)


def masked(case: Case, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """The mask as an option of a call; on a GPU as a plan."""
    mask = am.causal() if case.rows > 1 else None
    if options.device == "cpu":
        return {"mask": mask}
    return {
        "plan": am.plan(
            am.full() if mask is None else mask, batch=case.batch, q_heads=case.heads,
            kv_heads=case.kv_heads, q_len=case.rows, kv_len=case.keys, head_dim=options.dim,
            dtype=dtype, device="cuda",
        )
    }  # fmt: skip


def torch_call(q: Any, k: Any, v: Any, visible: Any, backend: SDPBackend | None) -> Callable:
    """torch's call with one of its kernels, or with whichever it chooses."""
    shared = {"enable_gqa": q.shape[1] != k.shape[1]}
    if q.shape[2] > 1:
        shared["attn_mask"] = visible if backend is None else causal_lower_right(*visible.shape)
    if backend is None:
        return lambda: scaled_dot_product_attention(q, k, v, **shared)

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, **shared)

    return call


def can(call: Callable) -> bool:
    """Whether torch has a kernel for that."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def graphed(call: Callable) -> Callable:
    """CALLS of them in a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
    torch.cuda.synchronize()
    return graph.replay


def check(out: Any, q: Any, k: Any, v: Any, visible: Any) -> float:
    """The error of the first key head's output, as a share of what is allowed."""
    group = q.shape[1] // k.shape[1]
    part, mask = Slice(q[0, :group], k[0, 0], v[0, 0], None), visible[None, None]
    exact, naive = (attention(part, mask, 0, dtype)["out"] for dtype in (torch.float64, q.dtype))
    return compare("out", out[0, :group], exact, naive)


def report(rows: list[Row], options: argparse.Namespace) -> Table:
    where = f"{machine.cpu_name()}, {machine.threads()} threads"
    if options.device == "cuda":
        where = torch.cuda.get_device_name()
    table = Table(title=f"{where}, D={options.dim}, microseconds", title_style="")
    peers = list(BACKENDS[options.device])
    for name in ("type", "batch", "rows", "heads", "keys", "anymask", *peers, "GB/s"):
        table.add_column(name, justify="left" if name == "type" else "right")
    for row in rows:
        mine = row.times["anymask"]
        others = (
            f"{row.times[p] * 1e6:.0f} ({row.times[p] / mine:.2f} x)" if p in row.times else ""
            for p in peers
        )
        table.add_row(
            row.dtype, str(row.batch), str(row.rows), f"{row.heads}/{row.kv_heads}", str(row.keys),
            f"{mine * 1e6:.0f}", *others, f"{row.gigabytes:.1f}",
        )  # fmt: skip
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="cuda: bfloat16 alone")
    parser.add_argument("--keys", type=int, help="of every case, instead of its own")
    parser.add_argument("--rounds", type=int, default=200, help="times each is measured")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a case")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    if not common.is_ready(options.device):
        return 1
    common.take_defaults(options, {"dtypes": DTYPES if options.device == "cpu" else ("bfloat16",)})
    cases = CASES[options.device]
    console = common.console_of(100)
    rows = []
    with common.progress(console) as bar:
        task = bar.add_task("", total=len(options.dtypes) * len(cases))
        for dtype in options.dtypes:
            for case in cases:
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
                "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
                "dim": options.dim,
                "rows": [r._asdict() for r in rows],
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
