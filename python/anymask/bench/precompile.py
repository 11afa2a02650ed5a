"""Compiles FlexAttention for many cases at once, each in a process of its own.

torch compiles one graph at a time in a process, for 1 to 28 seconds a mask and geometry; what it
makes is kept on disk, where the benchmark's own process finds it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from anymask.bench.suites import Case


def precompile(
    cases: Sequence[Case], device: str, backward: bool, jobs: int, say: Callable[[str], None]
) -> dict[Case, float]:
    """Compiles for every mask and geometry of `cases` in `jobs` processes.

    Returns each one's seconds (keys have sample 0), without those that failed: they will fail again
    where it is recorded.
    """
    kinds = list(dict.fromkeys(case._replace(sample=0) for case in cases))
    found: dict[Case, float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare) as pool:
        futures = {
            pool.submit(_compile, _a_sample(kind, cases), device, backward): kind for kind in kinds
        }
        for future in as_completed(futures):
            if future.exception() is None:
                found[futures[future]] = future.result()
            say(f"compiled {len(found)} of {len(kinds)}")
    return found


def _a_sample(kind: Case, cases: Sequence[Case]) -> Case:
    return next(case for case in cases if case._replace(sample=0) == kind)


def _prepare() -> None:
    # One compiler a process: the processes are the parallel part.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def _compile(case: Case, device: str, backward: bool) -> float:
    import torch

    from anymask.bench.measure import draw
    from anymask.bench.subjects import Flex

    *inputs, dout = draw(case, device, backward)
    started = time.perf_counter()
    flex = Flex(case, case.build(), tuple(inputs))
    out = flex.forward()["out"]
    if backward:
        torch.autograd.grad(out, flex.leaves, flex.turned(dout).contiguous())
    if device != "cpu":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    del inputs, dout, flex, out
    if device != "cpu":
        torch.cuda.empty_cache()
    return elapsed
