"""A small set that touches every kind of kernel, for compute-sanitizer (see sanitizer.sh).

Its reference is the CPU backend, so that hardly any kernel but anymask's own runs.
"""

from __future__ import annotations

import anymask as am
import numpy as np
import pytest
import torch
from problem import DEVICE

DIMS = [(64, 64), (72, 72), (128, 128), (192, 128), (256, 256)]


def masks(b, h, m, n):
    rng = np.random.default_rng(0)
    q_ids, kv_ids = (np.sort(rng.integers(0, 3, (b, size))).astype(np.int32) for size in (m, n))
    return {
        "runs": am.causal() & am.intervals(rng.integers(0, m, (1, 1, n, 1)).astype(np.int32), True),
        "recipe": am.sliding_window(50, 20)
        & am.intervals(rng.integers(0, m, (1, h, n, 4)).astype(np.int32), False)
        & am.dense(rng.random((b, 1, m, n)) < 0.9),
        "machine": am.documents(q_ids, kv_ids)
        | ~am.blocks(rng.random((1, 1, -(-m // 16), -(-n // 16))) < 0.5, 16),
        "ids": am.causal() & am.documents(q_ids, kv_ids),
        "reordered": am.dense(rng.random((1, h, m, n)) < 0.1).reordered(),
    }


def on(device, tensors, mask, dout, deterministic, biases):
    leaves = [x.to(device, copy=True).requires_grad_() for x in tensors]
    biases = {name: x.to(device, copy=True).requires_grad_() for name, x in biases.items()}
    mask = mask.to(device)
    plan = am.plan(
        mask, batch=leaves[0].shape[0], q_heads=leaves[0].shape[2], kv_heads=leaves[1].shape[2],
        q_len=leaves[0].shape[1], kv_len=leaves[1].shape[1], head_dim=leaves[0].shape[3],
        v_head_dim=leaves[2].shape[3], dtype=leaves[0].dtype, device=device,
    )  # fmt: skip
    out, lse = am.attention(
        *leaves, plan=plan, return_lse=True, deterministic=deterministic, **biases
    )
    leaves += biases.values()
    return [x.cpu() for x in (out, lse, *torch.autograd.grad(out, leaves, dout.to(device)))]


@pytest.mark.parametrize("kind", ["runs", "recipe", "machine", "ids", "reordered"])
@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_small_set(dims, kind):
    check((1, 2, 1, 310, 470), dims, masks(1, 2, 310, 470)[kind])


@pytest.mark.parametrize("kind", ["runs", "machine", "ids"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_few_rows_of_many_keys(dims, kind):
    """Key tiles with several blocks, which join what they make; one row; a strip of rows."""
    for rows in (1, 9, 140):
        check((2, 4, 2, rows, 1500), dims, masks(2, 4, rows, 1500)[kind])


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_other_divisions_of_the_backward(dims):
    """dQ apart from dK and dV, for many rows of few pairs; segments of rows, for few long items."""
    check((1, 64, 32, 1030, 1100), dims, am.sliding_window(60, 3))
    check((1, 2, 1, 2100, 470), dims, am.causal())
    check((1, 2, 2, 2100, 470), dims, masks(1, 2, 2100, 470)["reordered"])


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
@pytest.mark.parametrize("kv_len", [472, 470])  # rows of whole 16 bytes, and not
@pytest.mark.parametrize("kind", ["runs", "reordered"])
def test_biases(dims, kv_len, kind):
    bias, key_bias = torch.randn(1, 2, 310, kv_len).bfloat16(), torch.randn(1, 2, kv_len).bfloat16()
    mask = masks(1, 2, 310, kv_len)[kind]
    check((1, 2, 1, 310, kv_len), dims, mask, bias=bias)
    check((2, 2, 1, 310, kv_len), dims, am.causal(), bias=bias, key_bias=key_bias)


def check(sizes, dims, mask, **biases):
    """Both passes, the backward deterministic too, beside the CPU's."""
    b, h, kv_heads, m, n = sizes
    dtype = torch.float16 if dims[0] == 72 else torch.bfloat16
    shapes = [(b, m, h, dims[0]), (b, n, kv_heads, dims[0]), (b, n, kv_heads, dims[1])]
    q, k, v, dout = (torch.randn(s).to(dtype) for s in (*shapes, (b, m, h, dims[1])))
    expected = on(torch.device("cpu"), (q, k, v), mask, dout, False, biases)
    for deterministic in (False, True):
        found = on(DEVICE, (q, k, v), mask, dout, deterministic, biases)
        for x, y in zip(found, expected):
            assert not x.isnan().any() and torch.equal(x.isinf(), y.isinf())
            x, y = (each.float().nan_to_num(neginf=0) for each in (x, y))
            assert (x - y).norm() <= 2e-2 * y.norm()
