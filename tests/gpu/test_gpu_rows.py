"""Calls of few rows and of many: forward kernels with row tiles of their own, for all else that a
call may have. `check` of masks does both by itself; score options are here with many rows, and in
test_gpu_scores.py with few."""

from __future__ import annotations

import anymask as am
import numpy as np
import pytest
import reference
import score_checks
import torch
from checks import assert_close, naive, per_head
from problem import DEVICE, HALVES, ON_GPU, check, inputs, planned, poisoned
from test_gpu_scores import EACH, draw, masks, to_device

DIMS = [(64, 64), (128, 128), (72, 40), (192, 128)]

# Batch, heads, rows: 132 tiles of 128 rows are few.
LIMIT = [(1, 132, 128), (1, 133, 128), (2, 33, 129), (2, 33, 257), (131, 1, 1), (133, 1, 1)]


@pytest.mark.parametrize("sizes", LIMIT, ids=str)
@pytest.mark.parametrize("dims", DIMS[:2])
def test_on_both_sides_of_the_limit(dims, sizes):
    batch, heads, q_len = sizes if ON_GPU else (min(sizes[0], 2), min(sizes[1], 3), sizes[2])
    kv_len = 333
    q, k, v = inputs(batch, q_len, kv_len, (heads, 1), dims)
    window = reference.sliding_window(q_len, kv_len, 150, 20)
    every = per_head(window, batch, heads, q_len, kv_len).to(DEVICE)
    ref = naive(q.double(), k.double(), v.double(), every)
    low = naive(q, k, v, every)
    mask = am.sliding_window(150, 20)
    for plan in (False, True):
        with poisoned():
            got = am.attention(q, k, v, **planned(q, k, v, mask, plan), return_lse=True)
        assert_close("out", got[0], ref[0], low[0], 1e-6)
        assert (got[1] - ref[1]).abs().max() <= 1e-3


SIZES = [(1, 8, 300, 401), (2, 3, 129, 257), (1, 1, 1000, 777), (3, 2, 64, 1025), (1, 4, 65, 15)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dims", DIMS)
def test_odd_sizes(dims, sizes, dtype):
    b, h, m, n = sizes if ON_GPU else (*sizes[:2], sizes[2] // 4 + 1, sizes[3] // 4 + 1)
    rng = np.random.default_rng(1)
    q, k, v = inputs(b, m, n, (h, h), dims, dtype)
    for name, (mask, allowed) in masks(rng, b, h, m, n).items():
        check(q, k, v, mask, allowed, plan=name in ("runs", "baked"))
    # Tiles of which a strip of 64 rows sees nothing, before, between and after those that it sees.
    gaps = np.ones((m, n), bool)
    gaps[: m // 2, n // 4 : n // 2] = gaps[m // 2 :, : n // 3] = False
    gaps[m // 3 :, 2 * n // 3 :] = False
    check(q, k, v, am.dense(gaps), gaps, with_lse=True)
    check(q, k, v, am.dense(gaps).reordered(), gaps)
    ids = np.sort(rng.integers(0, 4, (b, max(m, n))).astype(np.int32))
    documents = reference.documents(ids[:, :m], ids[:, :n])
    check(q, k, v, am.documents(ids[:, :m], ids[:, :n]), documents)


# Heads of two batch entries and two row tiles each, whatever the tile: 136 in all are many.
MANY, FEW = ((34, 17), (8, 4)) if ON_GPU else ((4, 2), (2, 1))
ROWS, KEYS = (200, 304) if ON_GPU else (70, 104)


OPTIONS = [(dims, "bfloat16", which) for dims in DIMS[:2] for which in EACH]
OPTIONS += [(dims, dtype, "all") for dims in DIMS for dtype in HALVES]


@pytest.mark.parametrize("heads", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dims, dtype, which", OPTIONS)
def test_score_options(dims, dtype, which, heads):
    rng = np.random.default_rng(2)
    drawn = score_checks.inputs(rng, dtype, 2, (ROWS, KEYS), heads, dims)
    q, k, v = (x.to(DEVICE) for x in drawn)
    options = to_device(score_checks.some_options(rng, which, dtype, q, k))
    for name, (mask, allowed) in masks(rng, 2, heads[0], ROWS, KEYS).items():
        if name in ("none", "runs", "baked") or which == "dropout":
            compare_forward(q, k, v, mask, allowed, **options)


@pytest.mark.parametrize("heads", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("kv_len", [KEYS, KEYS - 3])  # rows of whole 16 bytes, and not
@pytest.mark.parametrize("dims", DIMS[:2])
def test_biases_of_pairs(dims, kv_len, heads):
    rng = np.random.default_rng(3)
    drawn = score_checks.inputs(rng, "bfloat16", 2, (ROWS, kv_len), heads, dims)
    q, k, v = (x.to(DEVICE) for x in drawn)
    for shape in ((2, heads[0]), (1, heads[0]), (2, 1), (1, 1)):
        bias = draw(rng, (*shape, ROWS, kv_len))
        for mask, allowed in masks(rng, 2, heads[0], ROWS, kv_len).values():
            compare_forward(q, k, v, mask, allowed, bias=bias)
    hidden = torch.from_numpy(rng.random(bias.shape) < 0.3).to(DEVICE)
    allowed = rng.random((2, 1, ROWS, kv_len)) < 0.1
    options = {"bias": bias.masked_fill(hidden, -torch.inf), "dropout_p": 0.1, "seed": 3}
    compare_forward(q, k, v, am.dense(allowed).reordered(), allowed, **options)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
@pytest.mark.parametrize("heads", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dims", DIMS[:2])
def test_softcaps(dims, heads, softcap):
    rng = np.random.default_rng(4)
    drawn = score_checks.inputs(rng, "bfloat16", 2, (ROWS, KEYS), heads, dims)
    q, k, v = (x.to(DEVICE) for x in drawn)
    for factor in (1, 10):
        allowed = reference.causal(ROWS, KEYS)
        compare_forward(q * factor, k, v, am.causal(), allowed, softcap=softcap)


def compare_forward(q, k, v, mask, allowed, **options):
    mask = None if mask is None else mask.to(DEVICE)
    with poisoned():
        score_checks.check(q, k, v, mask, allowed, backward=False, **options)
