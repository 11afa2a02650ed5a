"""Gradients of q whose parts come from many blocks, in turns: more of them than run at a time."""

import anymask as am
import numpy as np
import pytest
import reference
from anymask.benchmark_masks import benchmark_mask
from problem import DEVICE, ON_GPU, assert_same, check, gradient_of, inputs, run

BATCH, HEADS, LENGTH = (3, 16, 1500) if ON_GPU else (1, 2, 200)
DIMS = [(64, 64), (128, 128), (256, 256)]


def masks(m):
    """All key tiles at the same rows, at rows of their own, and most of them at the same few."""
    ids = np.arange(m, dtype=np.int32) // (m // 2 - 60)
    last = ids == ids.max()
    documents = am.causal() & am.documents(ids, ids)
    blockwise = am.causal() & am.dense(last[None, None, :, None].repeat(m, 3))
    yield am.full(), np.ones((1, 1, m, m), bool)
    yield am.causal(), reference.causal(m, m)
    yield (
        documents | blockwise,
        reference.causal(m, m) & (reference.documents(ids, ids) | last[None, None, :, None]),
    )


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_many_blocks(dims, deterministic):
    q, k, v = inputs(BATCH, LENGTH, heads=(HEADS, HEADS), dims=dims)
    for mask, allowed in masks(LENGTH):
        check(q, k, v, mask, allowed, deterministic=deterministic)


@pytest.mark.parametrize("dims", DIMS)
def test_turns_have_one_order(dims):
    q, k, v = inputs(BATCH, LENGTH, heads=(HEADS, HEADS), dims=dims)
    dout = gradient_of(q, v)
    for mask, _ in masks(LENGTH):
        mask = mask.to(DEVICE)
        first = run(q, k, v, mask, dout=dout, deterministic=True)
        for _ in range(10 if ON_GPU else 2):
            assert_same(run(q, k, v, mask, dout=dout, deterministic=True), first)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_few_rows_that_all_keys_meet(dims):
    """Where chains of parts would wait for each other, dQ is made apart."""
    length = 4096 if ON_GPU else 512  # with 16 heads, 65536 rows
    mask = benchmark_mask("global_sliding_window", length).mask
    q, k, v = inputs(1, length, heads=(16 if ON_GPU else 2,) * 2, dims=dims)
    check(q, k, v, mask, mask.to_dense(q_len=length), deterministic=True)
