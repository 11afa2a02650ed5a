"""flash_attention_custom_mask: dense masks of every type and shape, both passes."""

from __future__ import annotations

import functools

import anymask as am
import numpy as np
import pytest
import torch
from anymask.compat import _arguments, custom_masks
from test_compat_common import check, draw_qkv

B, H, HK, M, N = 2, 4, 2, 261, 141


def call(**options):
    return functools.partial(am.flash_attention_custom_mask, **options)


def draw(rng, dtype="float32", lengths=(M, N), dim=16):
    return draw_qkv(rng, B, lengths, (H, HK), dim, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("lengths", [(261, 261), (141, 300), (300, 141)])
def test_random_masks_beyond_128_tokens(dtype, lengths):
    rng = np.random.default_rng(1)
    allowed = rng.random((B, H, *lengths)) < 0.5
    q, k, v = draw(rng, dtype, lengths, 64)
    check(call(mask=torch.from_numpy(allowed)), q, k, v, allowed, layout="bhsd")


@pytest.mark.parametrize("keep", ["above the diagonal", "far off the diagonal", "last key"])
def test_masks_that_live_away_from_the_diagonal(keep):
    i, j = np.arange(M)[:, None], np.arange(M)
    allowed = {
        "above the diagonal": j >= i,
        "far off the diagonal": abs(i - j) > 150,
        "last key": (j == M - 1) & (i >= 0),
    }[keep]
    q, k, v = draw(np.random.default_rng(2), lengths=(M, M))
    mask = torch.from_numpy(allowed)
    check(call(mask=mask), q, k, v, allowed[None, None], layout="bhsd")


@pytest.mark.parametrize(
    "shape",
    [
        (), (1,), (N,), (1, N), (M, 1), (1, 1), (M, N), (1, M, N), (H, M, N), (H, 1, 1), (H, 1, N),
        (B, 1, 1, N), (1, 1, M, 1), (1, H, M, 1), (B, 1, M, N), (1, H, 1, 1), (B, H, M, N),
    ],
)  # fmt: skip
def test_broadcasting(shape):
    rng = np.random.default_rng(3)
    mask = rng.random(shape) < 0.6 if shape else np.array(True)
    allowed = np.broadcast_to(mask, (B, H, M, N))
    q, k, v = draw(rng)
    one = check(call(mask=torch.from_numpy(np.asarray(mask))), q, k, v, allowed, layout="bhsd")
    expanded = torch.from_numpy(np.asarray(mask)).expand(B, H, M, N)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    two = am.flash_attention_custom_mask(q, k, v, expanded)
    assert torch.equal(one, two.transpose(1, 2))


TYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.uint16, torch.uint32,
    torch.uint64, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type_of_mask(dtype):
    rng = np.random.default_rng(4)
    values = torch.from_numpy(rng.choice([0.0, 0.0, 1.0, 2.0, 64.0], (1, 1, 90, 70)))
    mask = values.to(dtype)
    q, k, v = draw(rng, lengths=(90, 70))
    check(call(mask=mask), q, k, v, (values != 0).numpy(), layout="bhsd")


def test_numbers_that_are_hard_to_tell_from_zero():
    values = [0.0, -0.0, 1e-45, -3.0, float("nan"), float("-inf"), 0.5, 2.0**-1074]
    allowed = np.array([False, False, True, True, True, True, True, True])
    q, k, v = draw(np.random.default_rng(5), lengths=(3, 8))
    for dtype in (torch.float32, torch.float64):
        mask = torch.tensor(values, dtype=dtype)
        expected = allowed & (mask.numpy() != 0)
        check(call(mask=mask), q, k, v, np.broadcast_to(expected, (1, 1, 3, 8)), layout="bhsd")
    for number in (2**40, -(2**40), 256, -128):
        mask = torch.tensor([0, number, 0, 0, number, 0, 0, 0])
        assert torch.equal(
            am.flash_attention_custom_mask(*(x.transpose(1, 2) for x in (q, k, v)), mask),
            am.flash_attention_custom_mask(*(x.transpose(1, 2) for x in (q, k, v)), mask != 0),
        )


def test_rows_columns_and_heads_that_see_nothing():
    rng = np.random.default_rng(6)
    allowed = rng.random((B, H, M, N)) < 0.3
    allowed[:, :, 20:200] = False
    allowed[:, :, :, 60:131] = False
    allowed[1, 1] = False
    q, k, v = draw(rng)
    check(call(mask=torch.from_numpy(allowed)), q, k, v, allowed, layout="bhsd")
    check(call(mask=torch.zeros(1)), q, k, v, np.zeros_like(allowed), layout="bhsd")


def test_strided_masks_are_read_in_place():
    rng = np.random.default_rng(7)
    q, k, v = draw(rng)
    wide = torch.from_numpy(rng.random((N, B, H, M + 3)) < 0.5)
    mask = wide.permute(1, 2, 3, 0)[:, :, 3:]
    check(call(mask=mask), q, k, v, mask.numpy(), layout="bhsd")
    sizes = _arguments.Sizes(B, H, M, N)
    for given in (mask, mask[:1, :1].expand(B, H, M, N), mask[0, 0, :1]):
        seen = custom_masks._four_dimensions(given, sizes, q)
        assert seen.data_ptr() == given.data_ptr()
    complex_mask = torch.ones(1, 1, 1, N, dtype=torch.complex64).expand(B, H, M, N)
    assert custom_masks._four_dimensions(complex_mask, sizes, q).numel() == N


def test_masks_of_more_than_2_31_elements():
    # Untouched zeros take no memory: only the pages of the heads' first rows are ever there.
    rows = 150
    memory = np.zeros(2**31 + 2 * rows * rows, np.uint8)
    mask = np.lib.stride_tricks.as_strided(
        memory[7:], (1, 2, rows, rows), (0, 2**31, rows, 1), writeable=True
    )
    rng = np.random.default_rng(8)
    mask[...] = rng.random(mask.shape) < 0.4
    q, k, v = draw_qkv(rng, 1, (rows, rows), (2, 1), 16)
    check(call(mask=torch.from_numpy(mask)), q, k, v, mask != 0, layout="bhsd")


def test_a_plan_serves_several_layers():
    rng = np.random.default_rng(9)
    mask = torch.from_numpy(rng.random((B, 1, M, N)) < 0.5)
    q, k, v = (x.transpose(1, 2) for x in draw(rng))
    plan = am.plan(
        am.dense(mask), batch=B, q_heads=H, kv_heads=HK, q_len=M, kv_len=N, head_dim=16,
        dtype=q.dtype,
    )  # fmt: skip
    expected = am.flash_attention_custom_mask(q, k, v, mask)
    assert torch.equal(am.attention(q, k, v, plan=plan, layout="bhsd"), expected)


def test_no_gradient_flows_to_the_mask():
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in draw(np.random.default_rng(10)))
    mask = torch.ones(N, requires_grad=True)
    am.flash_attention_custom_mask(q, k, v, mask).sum().backward()
    assert mask.grad is None and q.grad is not None


def test_numpy_masks():
    rng = np.random.default_rng(11)
    tensors = [x.transpose(1, 2) for x in draw(rng)]
    mask = rng.random((B, 1, M, N)) < 0.5
    expected = am.flash_attention_custom_mask(*tensors, torch.from_numpy(mask))
    assert torch.equal(am.flash_attention_custom_mask(*tensors, mask), expected)
    arrays = [x.numpy() for x in tensors]
    for dtype in ("bool", "uint16", "uint64", "complex64", ">i4", "longdouble"):
        out = am.flash_attention_custom_mask(*arrays, mask.astype(dtype))
        assert np.array_equal(out, expected.numpy())


def test_traced_whole():
    q, k, v = (x.transpose(1, 2) for x in draw(np.random.default_rng(12)))
    traced = torch.compile(am.flash_attention_custom_mask, backend="eager", fullgraph=True)
    mask = torch.rand(M, N) < 0.5
    assert torch.equal(traced(q, k, v, mask), am.flash_attention_custom_mask(q, k, v, mask))


Q, K, V = torch.ones(2, 4, 5, 16), torch.ones(2, 2, 7, 16), torch.ones(2, 2, 7, 16)


@pytest.mark.parametrize(
    ("error", "message", "mask"),
    [
        (TypeError, "mask: got list, a tensor", [True]),
        (TypeError, "mask: got Mask, a tensor", am.causal()),
        (ValueError, r"mask: got shape \(5, 6\), one that broadcasts to .*\[2, 4, 5, 7\]",
         torch.ones(5, 6)),
        (ValueError, r"mask: got shape \(2, 2, 5, 7\)", torch.ones(2, 2, 5, 7)),
        (ValueError, r"mask: got shape \(3, 1, 5, 7\)", torch.ones(3, 1, 5, 7)),
        (ValueError, r"mask: got shape \(1, 1, 1, 5, 7\)", torch.ones(1, 1, 1, 5, 7)),
        (ValueError, r"mask: got shape \(0,\)", torch.ones(0)),
        (TypeError, "mask: is on meta; it must be on cpu, where q is",
         torch.ones(5, 7, device="meta")),
    ],
)  # fmt: skip
def test_errors(error, message, mask):
    with pytest.raises(error, match="^" + message):
        am.flash_attention_custom_mask(Q, K, V, mask)
    assert am.flash_attention_custom_mask(Q, K, V, torch.ones(5, 7)).isfinite().all()
