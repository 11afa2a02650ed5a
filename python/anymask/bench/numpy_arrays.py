"""Measures one case on NumPy arrays, where torch is not installed: the forward pass, alone."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from anymask.attention import attention
from anymask.bench.results import Row, Settings
from anymask.bench.suites import Case
from anymask.measuring import interleaved_medians, reference
from anymask.plans import plan

_TOLERANCE = {"float32": 5e-6, "float16": 4e-3}


def measure(
    case: Case, settings: Settings, say: Callable[[str], None], checked: bool = True
) -> Row:
    """Times the forward pass; every result is checked. Raises ValueError for an element type that
    NumPy lacks."""
    g, mask = case.geometry, case.build()
    if g.dtype not in _TOLERANCE:
        raise ValueError(f"dtype: {g.dtype} needs torch, which is not installed")
    started = time.perf_counter()
    row = Row(case, mask.pairs * g.heads * (g.batch // len(mask.indices)))
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal((g.batch, g.length, heads, g.head_dim), np.float32).astype(g.dtype)
        for heads in (g.heads, g.kv_heads, g.kv_heads)
    )

    def make_plan():  # type: ignore[no-untyped-def]
        return plan(
            mask.mask, batch=g.batch, q_heads=g.heads, kv_heads=g.kv_heads, q_len=g.length,
            kv_len=g.length, head_dim=g.head_dim, dtype=g.dtype,
        )  # fmt: skip

    planned = make_plan()
    out = attention(q, k, v, plan=planned)
    say("reference")
    group, allowed = g.heads // g.kv_heads, mask.mask.to_dense(q_len=g.length)
    expected = reference(q[-1:, :, -group:], k[-1:, :, -1:], v[-1:, :, -1:], allowed[-1:])
    error = float(np.abs(out[-1:, :, -group:].astype(np.float64) - expected).max())
    if not error <= _TOLERANCE[g.dtype]:
        row.problems["anymask forward"] = f"WrongResult: out: error {error:.2e}"
        return row
    row.errors["anymask"] = error / _TOLERANCE[g.dtype]
    say("timing")
    calls = {"plan": make_plan, "forward": lambda: attention(q, k, v, plan=planned)}
    calls = {name: call for name, call in calls.items() if name in settings.passes}
    row.seconds["anymask"] = interleaved_medians(
        calls, rounds=settings.rounds, budget=settings.budget, least=3
    )
    row.wall = time.perf_counter() - started
    return row
