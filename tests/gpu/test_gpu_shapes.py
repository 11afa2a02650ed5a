"""Head dimensions, lengths, heads, scales, strides and alignments, forward and backward."""

from __future__ import annotations

import anymask as am
import mask_cases
import numpy as np
import pytest
import reference
import torch
from checks import assert_close, naive, per_head
from problem import DEVICE, HALVES, LENGTH, ON_GPU, check, gradient_of, inputs

EQUAL = [(d, d) for d in (8, 16, 24, 40, 56, 64, 72, 104, 128, 136, 168, 192, 200, 248, 256)]
DIFFERENT = [(192, 128), (16, 24), (40, 128), (128, 8), (64, 256), (256, 64), (72, 200)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dims", EQUAL + DIFFERENT, ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_head_dims(dims, dtype):
    m, n = LENGTH // 3, LENGTH // 2
    q, k, v = inputs(1, m, n, (4, 2), dims, dtype)
    check(q, k, v, am.causal(), reference.causal(m, n), with_lse=True)
    window = am.sliding_window(70, 9)
    check(q, k, v, window, reference.sliding_window(m, n, 70, 9), deterministic=True)
    check(q, k, v, None, np.ones((1, 1, m, n), bool))


@pytest.mark.parametrize("q_len", [0, 1, 2, 63, 64, 65, 127, 129, 192, 257])
def test_lengths(q_len):
    for kv_len in (0, 1, 2, 79, 80, 81, 128, 177, 255, 400):
        q, k, v = inputs(1, q_len, kv_len, (2, 1))
        for mask, allowed in (
            (None, np.ones((1, 1, q_len, kv_len), bool)),
            (am.causal(), reference.causal(q_len, kv_len)),
            (~am.full(), np.zeros((1, 1, q_len, kv_len), bool)),
        ):
            check(q, k, v, mask, allowed)


@pytest.mark.parametrize("dims", [(128, 128), (256, 256)])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 700), (700, 1), (3, 129), (129, 3), (0, 3), (3, 0)])
def test_short_lengths_in_other_kernels(sizes, dims):
    q, k, v = inputs(2, *sizes, (2, 2), dims)
    check(q, k, v, am.causal(), reference.causal(*sizes), deterministic=True)


def test_no_batch():
    q, k, v = inputs(0, 5)
    out = am.attention(*(x.requires_grad_() for x in (q, k, v)), am.causal())
    out.sum().backward()
    assert out.shape == q.shape and q.grad.shape == q.shape


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("heads", [(8, 1), (8, 2), (6, 3), (1, 1), (5, 5), (12, 4)])
def test_grouped_heads(heads, dims):
    rng = np.random.default_rng(4)
    m, n = LENGTH // 4, LENGTH // 2
    mask, allowed = mask_cases.dense(rng, 2, heads[0], m, n)
    q, k, v = inputs(2, m, n, heads, dims)
    check(q, k, v, mask & am.causal(), allowed & reference.causal(m, n))
    check(q, k, v, am.causal(), reference.causal(m, n), deterministic=True)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128)])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_large_groups(kv_heads, dims):
    """A group's rows that do not fit L2: its query heads are items of their own, dK and dV sums."""
    group, m, n = 33 if ON_GPU else 3, LENGTH + 200, LENGTH + 77
    group *= 1 if dims == (128, 128) else 2
    rng = np.random.default_rng(14)
    q, k, v = inputs(1, m, n, (group * kv_heads, kv_heads), dims)
    check(q, k, v, am.causal(), reference.causal(m, n), with_lse=True)
    mask, allowed = mask_cases.dense(rng, 1, 1, m, n)
    check(q, k, v, mask.reordered(), allowed)
    check(q, k, v, ~am.full(), np.zeros((1, 1, m, n), bool))


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2)])
def test_few_long_items(heads, dims):
    """Too few key tiles for all multiprocessors: segments of rows are items of their own."""
    m, n = (2500, 1900) if ON_GPU else (300, 200)
    rng = np.random.default_rng(16)
    q, k, v = inputs(1, m, n, heads, dims)
    check(q, k, v, am.causal(), reference.causal(m, n), with_lse=True)
    mask, allowed = mask_cases.dense(rng, 1, heads[1], m, n)
    window = am.sliding_window(700, 100), reference.sliding_window(m, n, 700, 100)
    check(q, k, v, mask & window[0], allowed & window[1])
    check(q, k, v, (mask & am.causal()).reordered(), allowed & reference.causal(m, n))


def test_more_work_than_multiprocessors():
    """Persistent blocks take many items each: batch, heads and rows in every combination."""
    length = LENGTH // 2
    for batch, heads in ((7, (16, 8)), (40, (4, 1))):
        q, k, v = inputs(batch, length, heads=heads)
        ids = np.sort(np.random.default_rng(5).integers(0, 5, (batch, length))).astype(np.int32)
        allowed = reference.documents(ids, ids) & reference.causal(length, length)
        check(q, k, v, am.causal() & am.documents(ids), allowed)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_empty_rows_and_columns(dims):
    rng = np.random.default_rng(6)
    m, n = LENGTH // 2, LENGTH - 80
    allowed = rng.random((2, 2, m, n)) < 0.3
    allowed[:, :, 10 : m // 2] = False
    allowed[:, :, :, n // 3 : n - 9] = False
    allowed[1, 1] = False
    q, k, v = inputs(2, m, n, (2, 2), dims)
    check(q, k, v, am.dense(allowed), allowed, with_lse=True)
    check(q, k, v, am.dense(allowed), allowed, deterministic=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3, 1e-3])
def test_scales(scale, dtype):
    q, k, v = inputs(1, LENGTH // 2, heads=(2, 2), dims=(128, 128), dtype=dtype)
    allowed = reference.causal(LENGTH // 2, LENGTH // 2)
    check(q, k, v, am.causal(), allowed, scale=scale, with_lse=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("last", [-100, 100])
def test_scores_far_from_zero(last, dims, dtype):
    """All far below 0, or rising from there key by key: what exp2 measures from has to follow."""
    q, k, v = inputs(1, 300, 700, (2, 2), dims, dtype)
    q[..., 0] = 8 * (dims[0] / 64) ** 0.5
    k[..., 0] = torch.linspace(-100, last, 700, device=DEVICE)[:, None]
    check(q, k, v, None, np.ones((1, 1, 300, 700), bool))
    check(q, k, v, am.causal(), reference.causal(300, 700))


def test_large_scores_do_not_overflow():
    q, k, v = (x.requires_grad_() for x in inputs(1, 200, heads=(1, 1), dims=(64, 64)))
    every = per_head(reference.causal(200, 200), 1, 1, 200, 200).to(DEVICE)
    out = am.attention(q * 100, k * 100, v, am.causal())  # scores of +-10^5
    exact = naive(*((x * factor).double() for x, factor in ((q, 100), (k, 100), (v, 1))), every)[0]
    assert_close("out", out, exact, naive(q * 100, k * 100, v, every)[0])
    for gradient in torch.autograd.grad(out.float().sum(), (q, k, v)):
        assert gradient.isfinite().all()


# ---- strides and alignments ---------------------------------------------------------------------


def views(shape, dtype=torch.bfloat16):
    """The same values lying in memory in many ways."""
    b, n, h, d = shape
    values = torch.randn(shape, device=DEVICE).to(dtype)

    def laid(memory, view):
        view(memory).copy_(values)
        return view(memory)

    def memory(*sizes):
        return torch.full(sizes, float("nan"), device=DEVICE, dtype=dtype)

    return {
        "contiguous": values,
        "transposed": laid(memory(b, h, n, d), lambda x: x.transpose(1, 2)),
        "length first": laid(memory(n, b, h, d), lambda x: x.transpose(0, 1)),
        "packed with others": laid(memory(b, n, 3, h, d), lambda x: x[:, :, 1]),
        "every second row": laid(memory(b, 2 * n, h, d), lambda x: x[:, 1::2]),
        "part of wide rows": laid(memory(b, n, h, d + 24), lambda x: x[..., 16 : 16 + d]),
        "address off by 2 bytes": laid(memory(b, n, h, d + 8), lambda x: x[..., 1 : 1 + d]),
        "rows off by 6 bytes": laid(memory(b, n, h, d + 3), lambda x: x[..., :d]),
    }


@pytest.mark.parametrize("which", ["q", "k", "v", "dout", "all"])
def test_views(which):
    b, h, d, length = 2, 4, 64, LENGTH // 3
    allowed = reference.causal(length, length)
    laid = {name: views((b, length, h, d)) for name in ("q", "k", "v", "dout")}
    for layout in laid["q"]:
        q, k, v, dout = (
            laid[name][layout if which in (name, "all") else "contiguous"] for name in laid
        )
        check(q, k, v, am.causal(), allowed, dout=dout)


def test_expanded_tensors():
    b, h, d, length = 2, 4, 64, LENGTH // 3
    allowed = reference.causal(length, length)
    q, k, v = inputs(b, length, heads=(h, h), dims=(d, d))
    one_head = torch.randn(b, length, 1, d, device=DEVICE).bfloat16().expand(b, length, h, d)
    one_entry = torch.randn(1, length, h, d, device=DEVICE).bfloat16().expand(b, length, h, d)
    check(q, one_head, one_head, am.causal(), allowed)
    check(one_entry, k, one_entry, am.causal(), allowed)
    for dout in (
        torch.ones((), device=DEVICE).bfloat16().expand(b, length, h, d),  # what sum() sends back
        torch.randn(b, 1, 1, d, device=DEVICE).bfloat16().expand(b, length, h, d),
    ):
        check(q, k, v, am.causal(), allowed, dout=dout)


def test_layout_bhsd():
    q, k, v = inputs(2, LENGTH // 3, heads=(4, 2))
    out, lse = am.attention(q, k, v, am.causal(), return_lse=True)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    for tensors in (swapped, [x.contiguous() for x in swapped]):
        other, other_lse = am.attention(*tensors, am.causal(), layout="bhsd", return_lse=True)
        assert torch.equal(other.transpose(1, 2), out) and torch.equal(other_lse, lse)


def test_dense_masks_of_any_strides():
    rng = np.random.default_rng(9)
    b, h, m, n = 2, 4, 90, 200
    q, k, v = inputs(b, m, n, (h, h))
    allowed = rng.random((b, h, m, n)) < 0.5
    whole = torch.from_numpy(allowed).to(DEVICE)
    odd = torch.zeros(b, h, m, n + 3, dtype=torch.bool, device=DEVICE)[..., 2:-1]
    for laid in (
        whole.transpose(2, 3).contiguous().transpose(2, 3),
        whole.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        whole.float() * 0.5,
        whole.to(torch.int64),
        odd.copy_(whole),
    ):
        check(q, k, v, am.dense(laid), allowed)
    row = whole[:1, :1, :1].expand(b, h, m, n)
    check(q, k, v, am.dense(row), np.broadcast_to(allowed[:1, :1, :1], (b, h, m, n)))


def test_gradients_keep_their_leaf_layout():
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in inputs(1, 150)]
    out = am.attention(*leaves, layout="bhsd")
    out.backward(gradient_of(*(x.transpose(1, 2) for x in leaves[::2])).transpose(1, 2))
    for leaf in leaves:
        assert leaf.grad.stride() == leaf.stride()
