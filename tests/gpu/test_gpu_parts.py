"""Calls of few row tiles and many keys, whose key tiles several blocks share, and one joins."""

import anymask as am
import numpy as np
import pytest
import reference
import score_checks
import torch
from problem import DEVICE, HALVES, ON_GPU, check, gradient_of, inputs, planned, poisoned
from test_gpu_rows import compare_forward
from test_gpu_scores import masks, to_device

# Batch, heads, rows, keys: decoding, a few rows, row tiles for some blocks and for nearly all.
SIZES = [
    (1, (32, 8), 1, 5000), (2, (3, 1), 5, 3001), (1, (2, 2), 300, 9001), (3, (8, 4), 250, 2049),
    (1, (4, 4), 2048, 2048), (1, (33, 3), 500, 1100), (1, (32, 8), 16, 3000), (40, (8, 4), 9, 2100),
]  # fmt: skip
DIMS = [(64, 64), (128, 128), (72, 40), (192, 128)]


# One row: the heads of a group are rows then, of calls that are cut or not, with blocks for all or
# not; with more heads than rows of a tile they are not.
ONE_ROW = [
    (1, (16, 2), 1, 700), (1, (64, 1), 1, 4001), (16, (32, 8), 1, 1500), (20, (32, 8), 1, 1100),
    (2, (136, 1), 1, 1300), (64, (16, 8), 1, 900), (3, (32, 1), 1, 3000), (20, (16, 8), 1, 2500),
]  # fmt: skip


def made(sizes):
    batch, heads, m, n = sizes
    return sizes if ON_GPU else (batch, (heads[1] * 2, heads[1]), m // 16 + 1, n // 16)


def few_see_much(m, n):
    """Rows that see all keys, few, or none, far apart, so that parts begin and end anywhere."""
    allowed = np.zeros((m, n), bool)
    allowed[::7] = True
    allowed[m // 3 : m // 2, n // 2 :] = True
    allowed[m // 2 :, : n // 5] = True
    allowed[3 * m // 4 :] = False
    return allowed


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dims", DIMS)
def test_masks(dims, sizes):
    b, heads, m, n = made(sizes)
    rng = np.random.default_rng(1)
    q, k, v = inputs(b, m, n, heads, dims)
    check(q, k, v, None, np.ones((1, 1, m, n), bool))
    check(q, k, v, am.causal(), reference.causal(m, n), plan=True)
    check(q, k, v, am.sliding_window(n // 3, 0), reference.sliding_window(m, n, n // 3, 0))
    allowed = few_see_much(m, n)
    check(q, k, v, am.dense(allowed), allowed, with_lse=True)
    ids = np.sort(rng.integers(0, 3, (b, max(m, n))).astype(np.int32))
    documents = reference.documents(ids[:, :m], ids[:, :n])
    check(q, k, v, am.documents(ids[:, :m], ids[:, :n]), documents)
    scattered = rng.random((1, heads[1], 1, n)) < 0.4
    each = scattered.repeat(m, 2)
    check(q, k, v, am.dense(each).reordered(), each)


@pytest.mark.parametrize("sizes", ONE_ROW, ids=str)
@pytest.mark.parametrize("dims", DIMS[:2])
def test_one_row(dims, sizes):
    b, heads, m, n = sizes if ON_GPU else (2, (4, 2), 1, 100)
    rng = np.random.default_rng(3)
    q, k, v = inputs(b, m, n, heads, dims)
    cases = list(masks(rng, b, heads[0], m, n).values())
    cases += list(masks(rng, 1, 1, m, n).values())
    ends = rng.integers(0, 2, (b, heads[1], n, 4)).astype(np.int32)  # a row or none, any order
    cases += [(am.intervals(ends, False), reference.intervals(ends, False, m))]
    cases += [(None, np.ones((1, 1, m, n), bool)), (am.causal(), reference.causal(m, n))]
    for mask, allowed in cases:
        compare_forward(q, k, v, mask, allowed)
        compare_forward(q, k, v, mask, allowed, softcap=2.0)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    found = am.attention(*turned, am.causal().to(DEVICE))
    assert torch.equal(found, am.attention(q, k, v, am.causal().to(DEVICE)))


@pytest.mark.parametrize("sizes", SIZES[:4], ids=str)
@pytest.mark.parametrize("dims", DIMS[:2])
@pytest.mark.parametrize("dtype", HALVES)
def test_score_options(dtype, dims, sizes):
    b, heads, m, n = made(sizes)
    n = min(n, 2500)  # the reference is slow
    rng = np.random.default_rng(2)
    drawn = score_checks.inputs(rng, dtype, b, (m, n), heads, dims)
    q, k, v = (x.to(DEVICE) for x in drawn)
    options = to_device(score_checks.some_options(rng, "all", dtype, q, k))
    for mask, allowed in masks(rng, b, heads[0], m, n).values():
        compare_forward(q, k, v, mask, allowed, **options)


@pytest.mark.parametrize("dims", DIMS[:2])
def test_parts_have_one_order(dims):
    """Whoever comes last joins them: results do not tell who that was."""
    b, heads, m, n = made((1, (8, 8), 1500, 4000))
    q, k, v = inputs(b, m, n, heads, dims)
    other = torch.randn(1024, 1024, device=DEVICE)
    plans = planned(q, k, v, am.causal().to(DEVICE))
    first = None
    for _ in range(100 if ON_GPU else 3):
        with poisoned():
            got = am.attention(q, k, v, **plans, return_lse=True)
        other = other @ other * 1e-3
        first = got if first is None else first
        assert torch.equal(got[0], first[0]) and torch.equal(got[1], first[1])


def test_training_through_few_rows():
    """The backward pass takes lse as parts have made it."""
    b, heads, m, n = made((2, (4, 2), 130, 3000))
    q, k, v = inputs(b, m, n, heads, (128, 128))
    check(q, k, v, am.causal(), reference.causal(m, n), with_lse=True, dout=gradient_of(q, v))
