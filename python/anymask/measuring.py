"""Times functions side by side, in interleaved rounds, and counts their arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# A wait of about a millisecond on the GPU, so that the host has queued a call's work before the GPU
# comes to it: the events then enclose no gap in which the GPU waits for Python.
_HEAD_START_CYCLES = 2_000_000


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    """One call's time; on a GPU by device events, without what the host does before."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved_medians(
    functions: Mapping[str, Callable[[], Any]],
    *,
    device: str = "cpu",
    rounds: int = 5,
    budget: float = 20.0,
    least: int = 2,
    warm_up: bool = True,
) -> dict[str, float]:
    """Median seconds of each function, called in turns so that a slow moment hits all alike.

    Args:
        functions: by name.
        device: "cpu" or "cuda".
        rounds: how often each is timed, within the budget.
        budget: seconds for all of it.
        least: rounds that run whatever the budget says.
        warm_up: call each once first.
    """
    for function in functions.values() if warm_up else ():
        seconds(function, device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    count = 0
    while count < least or (count < rounds and time.perf_counter() - start < budget):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
        count += 1
    return {name: statistics.median(values) for name, values in times.items()}


def flops(pairs: int, head_dim: int, v_head_dim: int | None = None) -> tuple[float, float]:
    """Arithmetic of the forward and the backward pass over `pairs` allowed pairs of a query and a
    key, all batch entries and heads counted: 2 and 5 products."""
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    forward = 2.0 * pairs * (head_dim + v_head_dim)
    return forward, 2.0 * pairs * (3 * head_dim + 2 * v_head_dim)


def reference(q: Any, k: Any, v: Any, allowed: Any) -> np.ndarray:
    """Dense attention in float64, for checking results before they are timed.

    q [B, Sq, H, D], k, v NumPy or torch; `allowed` broadcasts to [B, H, Sq, Sk].
    """
    q, k, v = (_float64(x).swapaxes(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3])
    scores = np.where(allowed, scores, -np.inf)
    largest = scores.max(axis=-1, keepdims=True, initial=-1e300)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    return (weights @ v / np.where(total == 0, 1, total)).swapaxes(1, 2)


def _float64(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, np.float64)
