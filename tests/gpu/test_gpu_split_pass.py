"""The backward with dQ apart from dK and dV: calls of many rows that see few keys each."""

import anymask as am
import mask_cases
import numpy as np
import pytest
import reference
import torch
from problem import DEVICE, HALVES, LENGTH, ON_GPU, assert_same, check, gradient_of, inputs, run

BATCH, HEADS = (4, 24) if ON_GPU else (2, 4)  # 65536 rows and more, which is when it is used


def short_documents(rng, m, n, rows=60):
    """Ids of documents of about so many rows, another layout for each batch entry."""
    count = max(1, min(m, n) // rows)
    return [np.sort(rng.integers(0, count, (BATCH, x))).astype(np.int32) for x in (m, n)]


def masks(rng, m, n):
    """Masks that show a key tile a few row tiles, through every way bits are made."""
    q_ids, kv_ids = short_documents(rng, m, n)
    documents = am.documents(q_ids, kv_ids), reference.documents(q_ids, kv_ids)
    causal = am.causal(), reference.causal(m, n)
    window = am.sliding_window(50, 9), reference.sliding_window(m, n, 50, 9)
    lists = [-1 - x[:, None].repeat(2, 1) for x in (q_ids, kv_ids)]
    ids = am.ids(*lists), reference.ids(*lists)
    bits = mask_cases.dense(rng, 1, 1, m, n)
    yield tuple(a & b for a, b in zip(documents, causal))
    yield window
    yield tuple(a & b for a, b in zip(ids, causal))
    yield tuple(a & b for a, b in zip(documents, ids))
    yield tuple(a & b | c for a, b, c in zip(documents, causal, window))  # no recipe
    yield tuple(a & b for a, b in zip(window, bits))
    yield documents[0].reordered(), documents[1]


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [*(((128, 128), dtype) for dtype in HALVES), ((64, 64), "bfloat16"), ((128, 40), "float16")],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_masks(dims, dtype, deterministic):
    rng = np.random.default_rng(21)
    m, n = LENGTH, LENGTH + 41
    q, k, v = inputs(BATCH, m, n, (HEADS, HEADS), dims, dtype)
    for mask, allowed in masks(rng, m, n):
        check(q, k, v, mask, allowed, with_lse=True, deterministic=deterministic)


def scattered(rng, m, n, columns):
    """Indices of rows that see keys, other ones for every 64 keys, many of which a block of 64 rows
    passes over: `columns` 2, one run of rows; 4, with two holes."""
    steps = np.arange(-(-n // 64))
    begin = rng.integers(0, m, (BATCH, 1, steps.size))
    end = np.minimum(begin + rng.integers(0, m // 3, begin.shape), m)
    masked = (end, begin) if columns == 2 else (0 * begin, begin // 32 * 32, end, 0 * end + m)
    return np.stack(masked, -1).repeat(64, 2)[:, :, :n].astype(np.int32)


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("kv_heads", [HEADS, HEADS // 2])
def test_steps_that_show_a_warpgroup_nothing(columns, kv_heads):
    """A warpgroup passes over them, and must not hold on to what others wait for meanwhile."""
    rng = np.random.default_rng(24)
    m, n = LENGTH, LENGTH + 41
    q, k, v = inputs(BATCH, m, n, (HEADS, kv_heads), (128, 128))
    for _ in range(3):
        indices = scattered(rng, m, n, columns)
        check(q, k, v, am.intervals(indices, causal=False),
              reference.intervals(indices, False, m), with_lse=True)  # fmt: skip


def test_a_warpgroup_without_rows():
    """It is far ahead of the other one, which still reads the keys in whose place it puts their
    gradients; where it did not wait for that, one in twenty of such calls was wrong."""
    m, n = LENGTH, LENGTH + 41  # 60 rows in the last tile
    q, k, v = inputs(BATCH, m, n, (HEADS, HEADS), (128, 128))
    window = am.sliding_window(50, 9).to(DEVICE)
    check(q, k, v, window, reference.sliding_window(m, n, 50, 9))
    dout = gradient_of(q, v)
    first = run(q, k, v, window, dout=dout)
    for _ in range(300 if ON_GPU else 2):
        for got, expected in zip(run(q, k, v, window, dout=dout), first):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("m", "n"), [(190, 900), (900, 190)])
def test_tiles_of_rows_or_keys_alone(m, n):
    """Of what there is less, a tile behind the end has none."""
    rng = np.random.default_rng(26)
    batch = 4 * BATCH  # enough rows, though they are short
    q, k, v = inputs(batch, m, n, (HEADS, HEADS), (128, 128))
    q_ids, kv_ids = (np.sort(rng.integers(0, 5, (batch, x))).astype(np.int32) for x in (m, n))
    check(q, k, v, am.documents(q_ids, kv_ids), reference.documents(q_ids, kv_ids))
    check(q, k, v, am.causal(), reference.causal(m, n), with_lse=True)


@pytest.mark.parametrize("kv_heads", [HEADS, HEADS // 4])
@pytest.mark.parametrize("rows", [150, 250, 400])
def test_documents_of_several_tiles(rows, kv_heads):
    rng = np.random.default_rng(25)
    length = LENGTH + 3
    q, k, v = inputs(BATCH, length, heads=(HEADS, kv_heads), dims=(128, 128))
    q_ids, kv_ids = short_documents(rng, length, length, rows)
    documents = reference.documents(q_ids, q_ids)
    check(q, k, v, am.documents(q_ids, q_ids), documents)
    check(q, k, v, am.documents(q_ids, q_ids) & am.causal(),
          documents & reference.causal(length, length))  # fmt: skip
    check(q, k, v, am.causal(), reference.causal(length, length), deterministic=True)
    check(q, k, v, am.full(), reference.documents(0 * q_ids, 0 * kv_ids))


@pytest.mark.parametrize("kv_heads", [1, HEADS // 4, HEADS // 2])
def test_grouped_heads(kv_heads):
    rng = np.random.default_rng(22)
    length = LENGTH + 3
    q, k, v = inputs(BATCH, length, heads=(HEADS, kv_heads), dims=(128, 128))
    for mask, allowed in masks(rng, length, length):
        check(q, k, v, mask, allowed, scale=-0.2)


@pytest.mark.parametrize(("dims", "dtype"), [((128, 128), "bfloat16"), ((64, 104), "float16")])
@pytest.mark.parametrize("heads", [(12, 12), (24, 12), (15, 15)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_few_causal_items(dims, dtype, heads, deterministic):
    """Which this kernel alone serves (tests/cuda/backward_split_test.cpp says when)."""
    rng = np.random.default_rng(27)
    for m, n in ((LENGTH, LENGTH), (LENGTH + 41, LENGTH), (2 * LENGTH // 3, LENGTH)):
        q, k, v = inputs(2, m, n, heads, dims, dtype)
        causal = reference.causal(m, n)
        check(q, k, v, am.causal(), causal, with_lse=True, deterministic=deterministic)
        q_ids, kv_ids = (np.sort(rng.integers(0, 3, (2, x))).astype(np.int32) for x in (m, n))
        check(q, k, v, am.causal() & am.documents(q_ids, kv_ids),
              causal & reference.documents(q_ids, kv_ids), deterministic=deterministic)  # fmt: skip
    dout = gradient_of(q, v)
    first = run(q, k, v, am.causal(), dout=dout)
    for _ in range(20):
        assert_same(run(q, k, v, am.causal(), dout=dout), first)


def test_either_pass_in_one_batch_of_plans():
    """The same variant of a call, dense and sparse by turns: both passes leave all in order."""
    rng = np.random.default_rng(23)
    q, k, v = inputs(BATCH, LENGTH, heads=(HEADS, HEADS), dims=(128, 128))
    q_ids, kv_ids = short_documents(rng, LENGTH, LENGTH)
    for _ in range(2):
        check(q, k, v, am.causal(), reference.causal(LENGTH, LENGTH))
        check(q, k, v, am.documents(q_ids, kv_ids), reference.documents(q_ids, kv_ids))


def test_rows_and_keys_without_pairs():
    q, k, v = inputs(BATCH, LENGTH, heads=(HEADS, HEADS), dims=(128, 128))
    nobody = np.zeros((1, 1, LENGTH, LENGTH), bool)
    check(q, k, v, ~am.full(), nobody)
    q_ids = np.arange(LENGTH, dtype=np.int32) // 70
    kv_ids = q_ids + 5
    for deterministic in (False, True):
        check(q, k, v, am.documents(q_ids, kv_ids), reference.documents(q_ids, kv_ids),
              deterministic=deterministic)  # fmt: skip


def test_sums_have_one_order():
    """Without sums that blocks race for, results repeat bit by bit, asked to or not."""
    q, k, v = inputs(BATCH, LENGTH, heads=(HEADS, HEADS), dims=(128, 128))
    mask, dout = am.sliding_window(100, 100), gradient_of(q, v)
    first = run(q, k, v, mask, dout=dout)
    for _ in range(5):
        assert_same(run(q, k, v, mask, dout=dout), first)
