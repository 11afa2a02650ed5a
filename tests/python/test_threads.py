"""Loops share torch's OpenMP threads; a forked child must not wait for them."""

from __future__ import annotations

import os

import anymask as am
import numpy as np
import pytest
from anymask import _library

torch = pytest.importorskip("torch")


def test_a_forked_child_computes_the_same() -> None:
    q = torch.randn(1, 600, 4, 64)
    torch.matmul(q, q.transpose(-1, -2))  # starts torch's team
    out = am.attention(q, q, q, am.causal())
    child = os.fork()
    if child == 0:
        again = am.attention(q, q, q, am.causal())
        same = np.array_equal(again.numpy(), out.numpy())  # torch's own threads hang in a child
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_any_number_of_threads_gives_the_same_bits() -> None:
    q, k, v = (torch.randn(1, 700, 2, 64, requires_grad=True) for _ in range(3))
    results = []
    for threads in (1, 2, 3, 0):
        _library.call("anymask_set_cpu_threads", threads)
        out = am.attention(q, k, v, am.sliding_window(300))
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other):
            assert torch.equal(mine, theirs)
