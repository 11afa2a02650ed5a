"""Every mask kind and expression, forward and backward."""

from __future__ import annotations

import anymask as am
import mask_cases
import numpy as np
import pytest
import reference
import torch
from anymask import benchmark_masks
from checks import assert_close
from problem import DEVICE, HALVES, LENGTH, ON_GPU, Results, check, expect, inputs, poisoned, run

DIMS = [(8, 8), (40, 40), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)]


def test_memory_is_poisoned():
    with poisoned():
        q = torch.ones(3, 5, device=DEVICE, dtype=torch.bfloat16)
        for memory in (q.new_empty(1000), torch.empty_like(q), torch.empty(9, device=DEVICE)):
            assert memory.isnan().all()
        assert (torch.empty(1000, dtype=torch.uint8, device=DEVICE) == 255).all()


# With 44 and more heads blocks have several items one after the other, else one at most.
@pytest.mark.parametrize("heads", [2, 44])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", benchmark_masks.NAMES)
def test_benchmark_masks(name, dtype, heads):
    case = benchmark_masks.benchmark_mask(name, LENGTH)
    q, k, v = inputs(1, LENGTH, heads=(heads, heads), dims=(128, 128), dtype=dtype)
    check(q, k, v, case.mask, reference.intervals(case.indices, case.causal, LENGTH))
    if case.composed is not None:
        allowed = case.mask.to_dense(q_len=LENGTH)
        check(q, k, v, case.composed, allowed, plan=True, deterministic=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", mask_cases.KINDS)
def test_every_kind(kind, dtype):
    sizes = [(2, 4, 150, 201), (2, 4, 300, 129), (1, 4, 257, 257), (2, 48, 300, 201)]
    for seed, (b, h, m, n) in enumerate(sizes):
        mask, allowed = mask_cases.KINDS[kind](np.random.default_rng(seed), b, h, m, n)
        check(*inputs(b, m, n, heads=(h, h // 2), dtype=dtype), mask, allowed)
        check(*inputs(b, m, n, heads=(h, h // 2), dtype=dtype), ~mask, ~allowed, plan=True)


@pytest.mark.parametrize("seed", range(60 if ON_GPU else 6))
def test_random_expressions(seed):
    rng = np.random.default_rng(seed)
    b, kv_heads, group = (int(rng.integers(1, 4)) for _ in range(3))
    h = kv_heads * group
    m, n = (int(x) for x in rng.integers(1, rng.choice([40, LENGTH]), 2))
    n = m if rng.random() < 0.4 else n
    mask, allowed = mask_cases.random_tree(rng, b, h, m, n, int(rng.integers(1, 6)))
    dims, dtype = DIMS[rng.integers(len(DIMS))], str(rng.choice(HALVES))
    check(
        *inputs(b, m, n, (h, kv_heads), dims, dtype), mask, allowed,
        plan=bool(rng.random() < 0.5), with_lse=bool(rng.random() < 0.5),
        deterministic=bool(rng.random() < 0.5),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_scattered_keys(dims, dtype):
    """Masks whose plan carries an order of keys: gathered k and v, scattered dk and dv."""
    rng = np.random.default_rng(15)
    m, n = LENGTH // 2, LENGTH
    q, k, v = inputs(2, m, n, (4, 2), dims, dtype)
    scores = rng.standard_normal((2, 2, n))
    check(q, k, v, am.top_keys(scores, 40, q_len=m), reference.top_keys(scores, 40, m), plan=True)
    mask, allowed = mask_cases.dense(rng, 2, 4, m, n)
    seldom = np.broadcast_to(rng.random(n) < 0.2, (m, n))
    mask, allowed = (mask & am.dense(seldom.copy())).reordered(), allowed & seldom
    check(q, k, v, mask, allowed, with_lse=True)
    check(q, k, v, mask, allowed, deterministic=True)
    nobody = np.zeros((1, 1, m, n), bool)
    check(q, k, v, am.dense(nobody).reordered(), nobody)


def test_masks_of_every_batch_entry_and_head():
    rng = np.random.default_rng(3)
    m, n = 130, 260
    q, k, v = inputs(3, m, n, heads=(6, 3))
    for batch in (1, 3):
        for heads in (1, 2, 3, 6):
            allowed = rng.random((batch, heads, m, n)) < 0.4
            check(q, k, v, am.dense(allowed), allowed)
            indices = rng.integers(0, m, (batch, heads, n, 2)).astype(np.int32)
            check(q, k, v, am.intervals(indices, True), reference.intervals(indices, True, m))


def patchwork(rng, places, m, n):
    """Random pairs of every density, each place's own, with tiles of all and of nothing among."""
    allowed = rng.random((*places, m, n)) < rng.random((*places, 1, 1))
    for one in allowed.reshape(-1, m, n):
        rows, columns = int(rng.integers(0, m)), int(rng.integers(0, n))
        one[rows : rows + 200, columns:] = True
        one[rows // 2 :, : columns // 2] = False
    return allowed


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "dims", [(64, 64), (128, 128), (64, 128), (192, 128), (192, 192), (256, 256)]
)
def test_dense_masks_with_bits_of_their_own(dims, deterministic):
    """Plans of dense masks have their bits as the kernels read them: for every place, in tiles of
    every shape, and (one row of keys, one mask for many batch entries) where they have not."""
    rng = np.random.default_rng(16)
    b, h, m, n = 3, 6, LENGTH - 37, LENGTH // 2 + 5
    q, k, v = inputs(b, m, n, (h, 2), dims)
    options = {"deterministic": deterministic, "with_lse": True}
    for heads in (1, 2, 6):
        allowed = patchwork(rng, (b, heads), m, n)
        check(q, k, v, am.dense(allowed), allowed, **options)
    allowed = patchwork(rng, (b, 2), m, n)
    causal, window = reference.causal(m, n), reference.sliding_window(m, n, 90, 30)
    mask = ~am.dense(allowed) & am.causal() | am.sliding_window(90, 30)
    check(q, k, v, mask, (~allowed & causal) | window, plan=True, **options)
    check(q, k, v, am.dense(allowed & causal).reordered(), allowed & causal, **options)
    row = rng.random((b, 1, 1, n)) < 0.6
    check(q, k, v, am.dense(row), np.broadcast_to(row, (b, 1, m, n)), **options)
    eq, ek = (rng.integers(-4, 1, (b, h, length)).astype(np.int32) for length in (m, n))
    one = allowed[:1, :1]
    check(q, k, v, am.dense(one) & am.ids(eq, ek), one & reference.ids(eq, ek), **options)


def test_a_plan_serves_every_layer():
    mask = (am.causal() & am.documents(torch.arange(LENGTH, device=DEVICE) // 90)).to(DEVICE)
    plan = am.plan(
        mask, batch=2, q_heads=4, kv_heads=2, q_len=LENGTH, kv_len=LENGTH, head_dim=64,
        dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip
    before = plan.buffer.clone()
    for _ in range(3):
        q, k, v = inputs(2, LENGTH, heads=(4, 2))
        dout = torch.randn_like(q)
        planned = run(q, k, v, plan=plan, dout=dout, deterministic=True)
        alone = run(q, k, v, mask, dout=dout, deterministic=True)
        for a, b in zip(planned, alone):
            assert torch.equal(a, b)
    assert torch.equal(plan.buffer, before)


@pytest.mark.parametrize("seed", range(20 if ON_GPU else 2))
def test_agrees_with_the_cpu(seed):
    """The CPU backend in float64 is the reference."""
    rng = np.random.default_rng(100 + seed)
    b, h, m, n = 2, 4, *(int(x) for x in rng.integers(1, 500, 2))
    mask, allowed = mask_cases.random_tree(rng, b, h, m, n, int(rng.integers(1, 5)))
    dims, dtype = DIMS[rng.integers(len(DIMS))], str(rng.choice(HALVES))
    q, k, v = inputs(b, m, n, (h, 2), dims, dtype)
    dout = torch.randn((b, m, h, dims[1]), device=DEVICE).to(q.dtype)
    got = run(q, k, v, mask.to(DEVICE), dout=dout)
    there = [x.cpu() for x in (q, k, v)]
    precise = run(*(x.double() for x in there), mask.to("cpu"), dout=dout.cpu().double())
    every = torch.from_numpy(np.array(allowed))
    naive = expect(*there, every, dout=dout.cpu(), dtype=q.dtype)
    for name, x, ref, low in zip(Results._fields, got, precise, naive):
        assert_close(name, x.cpu(), ref, low, 2 * torch.finfo(q.dtype).eps)
