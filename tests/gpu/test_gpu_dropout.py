"""Dropout's pattern on the GPU, against its definition. What it does to attention is among
test_gpu_scores.py."""

from __future__ import annotations

import anymask as am
import numpy as np
import pytest
import reference_scores
import torch
from checks import DTYPES
from problem import DEVICE, HALVES, LENGTH, ON_GPU

M, N = (LENGTH // 2, LENGTH - 83) if ON_GPU else (90, 121)


def pattern(p, seed, mask, heads, q_len, kv_len, dtype, dim=64):
    """What the GPU keeps, bool [1, heads, q_len, kv_len]: equal weights of one-hot values."""
    q = torch.zeros(1, q_len, heads, dim, dtype=DTYPES[dtype], device=DEVICE)
    k = torch.zeros(1, kv_len, heads, dim, dtype=q.dtype, device=DEVICE)
    one_hot = torch.eye(kv_len, device=DEVICE).to(q.dtype)
    mask = None if mask is None else mask.to(DEVICE)
    parts = []
    for first in range(0, kv_len, dim):
        values = torch.zeros(kv_len, dim, dtype=q.dtype, device=DEVICE)
        columns = one_hot[:, first : first + dim]
        values[:, : columns.shape[1]] = columns
        v = values[None, :, None].expand(1, kv_len, heads, dim)
        out = am.attention(q, k, v, mask, dropout_p=p, seed=seed)
        parts.append(out[..., : columns.shape[1]].transpose(1, 2) > 0)
    return torch.cat(parts, -1).cpu().numpy()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 1e-3])
def test_the_pattern_is_the_documented_one(p, dim, dtype):
    seed = torch.tensor([-(2**40) - 7, 2**35 + 3], device=DEVICE)
    expected = reference_scores.kept(p, int(seed[0]), 1, 3, M, N, offset=int(seed[1]))
    assert np.array_equal(pattern(p, seed, None, 3, M, N, dtype, dim), expected)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_pattern_belongs_to_the_callers_keys(dim):
    rng = np.random.default_rng(12)
    allowed = rng.random((1, 2, M, N)) < 0.3
    allowed[..., M // 3 : M // 2] = False
    expected = reference_scores.kept(0.4, 11, 1, 2, M, N)
    for mask in (am.dense(allowed), am.dense(allowed).reordered()):
        got = pattern(0.4, 11, mask, 2, M, N, "bfloat16", dim)
        assert np.array_equal(got, expected & allowed)


@pytest.mark.cuda
def test_a_graph_may_change_its_seed():
    q = torch.randn(2, M, 4, 64, device=DEVICE).bfloat16()
    k, v = torch.randn(2, 2, N, 2, 64, device=DEVICE).bfloat16()
    seed = torch.tensor([5, 0], device=DEVICE)
    plan = am.plan(
        am.causal(), batch=2, q_heads=4, kv_heads=2, q_len=M, kv_len=N, head_dim=64,
        dtype=q.dtype, device=DEVICE,
    )  # fmt: skip

    def call():
        return am.attention(q, k, v, plan=plan, dropout_p=0.2, seed=seed)

    eager = []
    for offset in range(3):
        seed[1] = offset
        eager.append(call())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for offset in (2, 0, 1):
        seed[1] = offset
        graph.replay()
        assert torch.equal(out, eager[offset])
