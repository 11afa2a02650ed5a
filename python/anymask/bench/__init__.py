"""`anymask bench`: the twelve masks of the FlashMask paper, beside other libraries.

Every result is checked at the size that is timed (check.py); anymask and its peers are timed in
turns in one process (measure.py); a row that fails says why, and the rest goes on.

    from anymask import bench

    cases = bench.suite("protocol", masks=["causal_document"], lengths=[8192])
    rows = bench.run(cases, bench.Settings(device="cuda", peers=("flex",)))
    rows[0].tflops("anymask", "forward")
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence

from anymask.bench.results import PASSES, Row, Settings, describe_run, read, write
from anymask.bench.suites import SUITES, Case, Geometry, suite

# From this length on a reference takes longer than what is timed: of several samples of a mask's
# documents the first alone is compared with one.
LONG = 65536


def has_torch() -> bool:
    """Without torch, NumPy arrays are measured: forward, alone."""
    return importlib.util.find_spec("torch") is not None


def run(
    cases: Sequence[Case],
    settings: Settings,
    say: Callable[[str], None] = lambda text: None,
    finished: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Checks and times every case.

    Args:
        cases: what to measure; see `suite`.
        settings: how.
        say: hears what is being done.
        finished: gets each row when it is there.

    Returns:
        One row a case, fewer after `settings.stop_after` seconds. What fails (no memory, not
        supported, a wrong result) is in the row's problems, and has no figure.
    """
    if has_torch():
        from anymask.bench.measure import measure
    else:
        from anymask.bench.numpy_arrays import measure  # type: ignore[assignment]
    started = time.perf_counter()
    compiled: dict[Case, float] = {}
    if settings.compile_jobs and "flex" in settings.peers:
        from anymask.bench.precompile import precompile

        backward = "backward" in settings.passes
        compiled = precompile(cases, settings.device, backward, settings.compile_jobs, say)
    rows: list[Row] = []
    seen: set[Case] = set()
    for case in cases:
        if settings.stop_after and time.perf_counter() - started > settings.stop_after:
            break
        key = case._replace(sample=0)
        long = case.geometry.length >= LONG and not settings.every_sample
        checked = not (long and key in seen)
        seen.add(key)
        row = measure(case, settings, lambda text, case=case: say(f"{case.mask}: {text}"), checked)
        if key in compiled:
            row.compilation["flex"] = compiled[key]
        rows.append(row)
        finished(row)
    return rows


__all__ = [
    "PASSES",
    "SUITES",
    "Case",
    "Geometry",
    "Row",
    "Settings",
    "describe_run",
    "has_torch",
    "read",
    "run",
    "suite",
    "write",
]
