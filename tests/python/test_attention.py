"""Attention, forward and backward, against the float64 reference on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import anymask as am
import mask_cases
import numpy as np
import pytest
import reference
import torch
from anymask import benchmark_masks
from checks import DTYPES, assert_close, naive, per_head
from hypothesis import given
from hypothesis import strategies as st


def draw(rng, shape, dtype):
    return torch.from_numpy(rng.standard_normal(shape)).to(DTYPES[dtype])


def check(q, k, v, mask, allowed, *, scale=None, lse_gradient=False, **options):
    """Forward and backward of q, k, v (torch, any strides) under a mask against the reference."""
    batch, q_len, q_heads, _ = q.shape
    kv_len = k.shape[1]
    every = per_head(allowed, batch, q_heads, q_len, kv_len)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = am.attention(*leaves, mask, scale=scale, return_lse=True, **options)
    arrays = [x.detach().double().numpy() for x in (q, k, v)]
    ref_out, ref_lse = reference.attention(*arrays, every.numpy(), scale)

    low_leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    low_out, low_lse = naive(*low_leaves, every, scale)
    assert_close("out", out, ref_out, low_out, 1e-6)
    assert_close("lse", lse, ref_lse, low_lse, 1e-6)
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    blind = ~every.any(-1)
    assert (out.transpose(1, 2)[blind] == 0).all() and (lse[blind] == -torch.inf).all()

    dout = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    dlse = torch.randn(lse.shape, dtype=torch.float64).to(lse.dtype) if lse_gradient else None
    if dlse is not None:
        dlse = dlse.masked_fill(blind, 0.0)
    outputs, gradients = ((out, lse), (dout, dlse)) if lse_gradient else ((out,), (dout,))
    got = torch.autograd.grad(outputs, leaves, gradients)
    ref = reference.attention_backward(
        *arrays, every.numpy(), dout.double().numpy(), None if dlse is None else dlse.numpy(), scale
    )
    outputs = (low_out, low_lse) if lse_gradient else (low_out,)
    gradients = (dout, dlse.to(low_lse.dtype)) if lse_gradient else (dout,)
    low = torch.autograd.grad(outputs, low_leaves, gradients)
    # With few elements the naive result may be exact by luck: allow the rounding of one product.
    floor = 1e-5 if min(q_len, kv_len) >= 32 else max(1e-5, 2 * torch.finfo(q.dtype).eps)
    for name, g, r, x in zip(("dq", "dk", "dv"), got, ref, low):
        assert_close(name, g, r, x, floor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", benchmark_masks.NAMES)
def test_benchmark_masks(instruction_set, name, dtype):
    rng = np.random.default_rng(1)
    length = 333
    case = benchmark_masks.benchmark_mask(name, length)
    q, k, v = (draw(rng, (1, length, 2, 32), dtype) for _ in range(3))
    check(q, k, v, case.mask, reference.intervals(case.indices, case.causal, length))


@pytest.mark.parametrize("kind", mask_cases.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind(instruction_set, kind, dtype):
    rng = np.random.default_rng(2)
    b, h, m, n = 2, 4, 150, 201
    mask, allowed = mask_cases.KINDS[kind](rng, b, h, m, n)
    q = draw(rng, (b, m, h, 64), dtype)
    k, v = (draw(rng, (b, n, 2, d), dtype) for d in (64, 64))
    check(q, k, v, mask, allowed)


@pytest.mark.parametrize("dims", [(8, 8), (16, 24), (40, 128), (192, 128), (256, 256), (128, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_head_dims(instruction_set, dims, dtype):
    rng = np.random.default_rng(3)
    q, k, v = (draw(rng, (1, 70, 2, d), dtype) for d in (dims[0], dims[0], dims[1]))
    check(q, k, v, am.causal(), reference.causal(70, 70))


@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (6, 3), (1, 1)])
def test_grouped_heads(instruction_set, heads):
    rng = np.random.default_rng(4)
    q = draw(rng, (2, 65, heads[0], 32), "float32")
    k, v = (draw(rng, (2, 129, heads[1], 32), "float32") for _ in range(2))
    mask, allowed = mask_cases.dense(rng, 2, heads[0], 65, 129)
    check(q, k, v, mask & am.causal(), allowed & reference.causal(65, 129))


@pytest.mark.parametrize("kv_len", [0, 1, 2, 33, 64])
@pytest.mark.parametrize("q_len", [0, 1, 2, 33, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_and_empty(instruction_set, q_len, kv_len, dtype):
    rng = np.random.default_rng(5)
    q = draw(rng, (1, q_len, 2, 16), dtype)
    k, v = (draw(rng, (1, kv_len, 2, 16), dtype) for _ in range(2))
    for mask, allowed in (
        (None, np.ones((1, 1, q_len, kv_len), bool)),
        (am.causal(), reference.causal(q_len, kv_len)),
        (~am.full(), np.zeros((1, 1, q_len, kv_len), bool)),
    ):
        check(q, k, v, mask, allowed)


def test_no_batch():
    q = torch.zeros(0, 5, 2, 8, requires_grad=True)
    out = am.attention(q, q, q, am.causal())
    out.sum().backward()
    assert out.shape == q.shape and q.grad.shape == q.shape


def test_empty_rows_and_columns(instruction_set):
    rng = np.random.default_rng(6)
    allowed = rng.random((2, 2, 140, 170)) < 0.3
    allowed[:, :, 10:80] = False
    allowed[:, :, :, 60:150] = False
    allowed[1, 1] = False
    q, k, v = (draw(rng, (2, length, 2, 32), "float32") for length in (140, 170, 170))
    check(q, k, v, am.dense(allowed), allowed, lse_gradient=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_gradient_through_lse_and_scale(instruction_set, dtype):
    rng = np.random.default_rng(7)
    q, k, v = (draw(rng, (1, 90, 2, 16), dtype) for _ in range(3))
    check(q, k, v, am.causal(), reference.causal(90, 90), scale=0.7, lse_gradient=True)
    check(q, k, v, am.causal(), reference.causal(90, 90), scale=0.0)
    check(q, k, v, am.causal(), reference.causal(90, 90), scale=-0.3)


def test_large_scores_do_not_overflow(instruction_set):
    rng = np.random.default_rng(8)
    q, k, v = (draw(rng, (1, 80, 1, 16), "float32").requires_grad_() for _ in range(3))
    out = am.attention(q * 100, k * 100, v, am.causal())  # scores of +-10^5
    allowed = reference.causal(80, 80)
    ref, _ = reference.attention(*(x.detach().numpy() for x in (q * 100, k * 100, v)), allowed)
    assert_close("out", out, ref, naive(q * 100, k * 100, v, per_head(allowed, 1, 1, 80, 80))[0])
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_strided_views(instruction_set):
    rng = np.random.default_rng(9)
    length, allowed = 75, reference.causal(75, 75)
    packed = draw(rng, (2, length, 3, 4, 16), "float32")
    check(*packed.unbind(2), am.causal(), allowed)
    bhsd = [draw(rng, (2, 4, length, 16), "bfloat16").transpose(1, 2) for _ in range(3)]
    check(*bhsd, am.causal(), allowed)
    wide = draw(rng, (2, length, 4, 40), "float32")[..., 3:19]
    check(wide, wide, wide, am.causal(), allowed)
    shared = draw(rng, (2, length, 1, 16), "float32").expand(2, length, 4, 16)
    check(draw(rng, (2, length, 4, 16), "float32"), shared, shared, am.causal(), allowed)
    backwards = draw(rng, (1, length, 2, 16), "float32").numpy()[:, ::-1]
    out = am.attention(backwards, backwards, backwards, am.causal())
    ref, _ = reference.attention(backwards, backwards, backwards, allowed)
    np.testing.assert_allclose(out, ref, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scattered_keys(instruction_set, dtype):
    rng = np.random.default_rng(15)
    q, k, v = (
        draw(rng, (2, length, heads, 32), dtype) for length, heads in ((140, 4), (301, 2), (301, 2))
    )
    scores = rng.standard_normal((2, 2, 301))
    check(q, k, v, am.top_keys(scores, 40, q_len=140), reference.top_keys(scores, 40, 140))
    mask, allowed = mask_cases.dense(rng, 2, 4, 140, 301)
    seldom = np.broadcast_to(rng.random(301) < 0.2, (140, 301))
    check(q, k, v, (mask & am.dense(seldom)).reordered(), allowed & seldom, lse_gradient=True)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_reordered_keys_without_queries_or_keys(sizes):
    q_len, kv_len = sizes
    code = (
        "import torch, anymask as am\n"
        f"q, k = (torch.ones(1, n, 1, 8) for n in ({q_len}, {kv_len}))\n"
        f"blocks = torch.ones({-(-q_len // 16)}, {-(-kv_len // 16)}, dtype=torch.int32)\n"
        "mask = (am.blocks(blocks, 16) & am.dense(torch.ones(q.shape[1], k.shape[1])))\n"
        "assert not am.attention(q, k, k, mask.reordered()).any()\n"
    )  # in a process of its own: it would take the others down with it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_layout_bhsd_is_the_same_call():
    rng = np.random.default_rng(10)
    q, k, v = (draw(rng, (2, 33, 4, 16), "float32") for _ in range(3))
    out, lse = am.attention(q, k, v, am.causal(), return_lse=True)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    for tensors in (swapped, [x.contiguous() for x in swapped]):
        other, other_lse = am.attention(*tensors, am.causal(), layout="bhsd", return_lse=True)
        assert torch.equal(other.transpose(1, 2), out) and torch.equal(other_lse, lse)


def test_numpy_and_torch_agree():
    rng = np.random.default_rng(11)
    arrays = [rng.standard_normal((2, 40, 2, 16)).astype(np.float32) for _ in range(3)]
    mask = am.documents(rng.integers(0, 3, (2, 40)))
    out, lse = am.attention(*arrays, mask, return_lse=True)
    other, other_lse = am.attention(*map(torch.from_numpy, arrays), mask, return_lse=True)
    assert isinstance(out, np.ndarray) and np.array_equal(out, other.numpy())
    assert np.array_equal(lse, other_lse.numpy())
    bhsd = [x.swapaxes(1, 2) for x in arrays]
    assert np.array_equal(am.attention(*bhsd, mask, layout="bhsd").swapaxes(1, 2), out)


def test_numpy_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(12)
    arrays = [rng.standard_normal((1, 40, 2, 16)).astype(ml_dtypes.bfloat16) for _ in range(3)]
    out = am.attention(*arrays, am.causal())
    tensors = [torch.from_numpy(x.astype(np.float32)).bfloat16() for x in arrays]
    assert out.dtype == ml_dtypes.bfloat16
    expected = am.attention(*tensors, am.causal())
    assert np.array_equal(out.astype(np.float32), expected.float().numpy())


def test_plans_of_empty_problems():
    for sizes in ((0, 5), (5, 0), (0, 0)):
        q, k = (np.ones((1, n, 1, 8), np.float32) for n in sizes)
        for dtype in ("float32", torch.float32):
            plan = am.plan(
                am.causal(), batch=1, q_heads=1, kv_heads=1, q_len=sizes[0], kv_len=sizes[1],
                head_dim=8, dtype=dtype,
            )  # fmt: skip
            assert not am.attention(q, k, k, plan=plan).any()
            assert not am.attention(*map(torch.from_numpy, (q, k, k)), plan=plan).any()


@pytest.mark.parametrize("numpy", [True, False])
def test_a_plan_changes_nothing(numpy):
    rng = np.random.default_rng(13)
    mask = am.causal() & am.documents(np.sort(rng.integers(0, 4, (2, 100))))
    q, k, v = (draw(rng, (2, 100, heads, 16), "float32") for heads in (4, 2, 2))
    plan = am.plan(
        mask, batch=2, q_heads=4, kv_heads=2, q_len=100, kv_len=100, head_dim=16,
        dtype=np.float32 if numpy else torch.float32,
    )  # fmt: skip
    assert isinstance(plan.buffer, np.ndarray) == numpy
    expected = am.attention(q, k, v, mask)
    assert torch.equal(am.attention(q, k, v, plan=plan), expected)
    assert torch.equal(am.attention(q, k, v, mask, plan=plan), expected)
    arrays = am.attention(q.numpy(), k.numpy(), v.numpy(), plan=plan)
    assert np.array_equal(arrays, expected.numpy())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    one = torch.autograd.grad(am.attention(*leaves, mask).sin().sum(), leaves)
    two = torch.autograd.grad(am.attention(*leaves, plan=plan).sin().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_calls_from_several_threads():
    rng = np.random.default_rng(16)
    jobs = [
        ([draw(rng, (1, 200, 2, 32), "float32").requires_grad_() for _ in range(3)], mask)
        for mask in (am.causal(), am.sliding_window(20), am.full(), am.prefix_lm(50))
    ]

    def work(job):
        leaves, mask = job
        out = am.attention(*leaves, mask)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    alone = [work(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, jobs * 5))
    for index, results in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(results, alone[index % len(jobs)]))


def test_gradients_are_reproducible():
    rng = np.random.default_rng(14)
    leaves = [draw(rng, (1, 300, 2, 32), "float32").requires_grad_() for _ in range(3)]
    runs = [
        torch.autograd.grad(am.attention(*leaves, am.causal()).sin().sum(), leaves)
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@given(
    m=st.integers(1, 150),
    n=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
    leaves=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
)
def test_random_masks_and_shapes(m, n, seed, leaves, dtype):
    rng = np.random.default_rng(seed)
    b, kv_heads, group = (int(rng.integers(1, 3)) for _ in range(3))
    h = kv_heads * group
    d, dv = (int(rng.choice([8, 16, 32, 64])) for _ in range(2))
    mask, allowed = mask_cases.random_tree(rng, b, h, m, n, leaves)
    q = draw(rng, (b, m, h, d), dtype)
    k, v = draw(rng, (b, n, kv_heads, d), dtype), draw(rng, (b, n, kv_heads, dv), dtype)
    check(q, k, v, mask, allowed, lse_gradient=bool(rng.random() < 0.5))
