"""What a call costs before any arithmetic: anymask beside torch on a problem of one token.

    python benchmarks/call_overhead.py [--device cuda] [--json FILE]

On CUDA the figures are the host's time to queue a call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anymask as am
import common
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention


def microseconds(function: Callable[[], Any], calls: int, device: str) -> float:
    """The least of 7 batches of calls: what else the machine does only adds to it."""
    for _ in range(calls // 5 + 1):
        function()
    batches = []
    for _ in range(7):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        batches.append((time.perf_counter() - start) / calls * 1e6)
    return min(batches)


def cases(device: str) -> dict[str, Callable[[], Any]]:
    """Calls by name."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = (1, 1, 1, 64)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    leaf = q.clone().requires_grad_()
    gradient = torch.ones_like(q)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    causal, mixed = am.causal(), am.causal() & am.documents(ids)
    sizes = {"batch": 1, "q_heads": 1, "kv_heads": 1, "q_len": 1, "kv_len": 1, "head_dim": 64}
    planned = am.plan(mixed, **sizes, dtype=dtype, device=device)
    compiled = torch.compile(lambda x: am.attention(x, k, v, plan=planned), fullgraph=True)

    def train(out: Any) -> None:
        torch.autograd.grad(out, leaf, gradient)

    result = {
        "torch sdpa": lambda: scaled_dot_product_attention(q, k, v),
        "anymask, causal()": lambda: am.attention(q, k, v, causal),
        "anymask, causal() & documents(ids)": lambda: am.attention(q, k, v, mixed),
        "anymask, the same with a plan": lambda: am.attention(q, k, v, plan=planned),
        "anymask, with a plan, compiled": lambda: compiled(q),
        "making a plan": lambda: am.plan(mixed, **sizes, dtype=dtype, device=device),
        "torch sdpa, forward and backward": lambda: train(scaled_dot_product_attention(leaf, k, v)),
        "anymask with a plan, forward and backward": lambda: train(
            am.attention(leaf, k, v, plan=planned)
        ),
        "anymask, forward and backward": lambda: train(am.attention(leaf, k, v, mixed)),
    }
    if device == "cpu":
        arrays = [x.numpy() for x in (q, k, v)]
        result["anymask, NumPy, causal()"] = lambda: am.attention(*arrays, causal)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--calls", type=int, default=2000, help="in each of seven batches")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = Table(title="microseconds a call, one query and one key", title_style="")
    table.add_column("call")
    table.add_column("microseconds", justify="right")
    figures = {}
    for name, function in cases(options.device).items():
        figures[name] = microseconds(function, options.calls, options.device)
        table.add_row(name, f"{figures[name]:.1f}")
    Console().print(table)
    if options.json:
        common.write_json(options.json, figures)


if __name__ == "__main__":
    main()
