"""Offsets beyond 2^31 elements: masks, inputs and outputs. Skipped where memory is short."""

from __future__ import annotations

import anymask as am
import numpy as np
import pytest
import reference
import torch
from problem import DEVICE, ON_GPU, check, compare, inputs, run

FAR = 2**31 if ON_GPU else 2**15  # elements


@pytest.fixture(autouse=True)
def enough_memory(request):
    """Gibibytes that a test names by its marker."""
    needed = request.node.get_closest_marker("gibibytes").args[0]
    if ON_GPU and torch.cuda.mem_get_info()[0] < needed * 2**30:
        pytest.skip(f"needs {needed} GiB of free GPU memory")


def last_rows(q, k, v, mask, allowed, rows):
    """Both passes with a gradient on the last rows alone: they are all that has to be known.

    `allowed` is bool [rows, kv_len].
    """
    dout = torch.zeros((*q.shape[:3], v.shape[3]), device=DEVICE, dtype=q.dtype)
    dout[:, -rows:] = torch.randn_like(dout[:, -rows:])
    got = run(q, k, v, mask, dout=dout)
    assert got.out.isfinite().all() and not got.dq[:, :-rows].any()
    every = allowed.expand(q.shape[0], q.shape[2], rows, k.shape[1])
    parts = got._replace(
        out=got.out[:, -rows:], lse=got.lse[:, :, -rows:], dq=got.dq[:, -rows:]
    )  # fmt: skip
    compare(parts, q[:, -rows:], k, v, every, dout=dout[:, -rows:])


@pytest.mark.gibibytes(20)
def test_dense_mask_with_more_elements_than_an_int_counts():
    length = int(FAR**0.5) + 200
    allowed = torch.rand(length, length, device=DEVICE) < 0.3
    assert allowed.numel() > FAR
    q, k, v = inputs(1, length, heads=(1, 1))
    last_rows(q, k, v, am.dense(allowed), allowed[-70:], 70)


@pytest.mark.gibibytes(20)
def test_dense_mask_of_many_heads_by_shape():
    """Expanded: the same memory for all batch entries, and one place of the bits for each."""
    b, h, length = (9, 64, 2048) if ON_GPU else (3, 4, 160)
    one = torch.rand(1, h, 1, length, device=DEVICE) < 0.5
    allowed = one.expand(b, h, length, length)
    assert allowed.numel() > FAR
    q, k, v = inputs(b, length, heads=(h, 1), dims=(16, 16))
    got = am.attention(q, k, v, am.dense(allowed))
    same = am.attention(q, k, v, am.dense(one))
    assert torch.equal(got, same)
    corner = allowed[-1:, -1:].cpu().numpy()
    check(q[-1:, :, -1:], k[-1:], v[-1:], am.dense(corner), corner)
    alone = am.attention(q[-1:, :, -1:], k[-1:], v[-1:], am.dense(allowed[-1:, -1:]))
    assert torch.equal(got[-1:, :, -1:], alone)


@pytest.mark.gibibytes(20)
def test_inputs_that_lie_far_apart():
    """Steps between batch entries, rows and heads of up to 2^31 elements and more."""
    b, length, heads, dim = 2, 130, 4, 64
    memory = torch.randn(2 * FAR // 2 + FAR // 16 + 2**18, device=DEVICE, dtype=torch.bfloat16)
    row, part = heads * dim, length * heads * dim
    far_row = (FAR // (length - 1) // 8 + 1) * 8
    layouts = {
        "entries": (FAR, row, dim, 1),
        "rows": (row, far_row, dim, 1),
        "heads": (part, dim, (FAR // (heads - 1) // 8 + 1) * 8, 1),
    }
    allowed = reference.causal(length, length)
    for strides in layouts.values():
        q, k, v, dout = (
            memory.as_strided((b, length, heads, dim), strides, i * 2 * part) for i in range(4)
        )
        assert sum(s * (n - 1) for s, n in zip(strides, q.shape)) >= FAR
        check(q, k, v, am.causal(), allowed, dout=dout)


@pytest.mark.gibibytes(60)
def test_outputs_with_more_elements_than_an_int_counts():
    """Every batch entry computes the same, so that the last one must equal the first."""
    length, heads, dim = (64, 64, 128) if ON_GPU else (20, 2, 16)
    batch = FAR // (length * heads * dim) + 5
    one = inputs(1, length, heads=(heads, heads), dims=(dim, dim))
    many = [x.expand(batch, length, heads, dim) for x in one]
    assert many[0].numel() > FAR
    dout = torch.randn_like(one[0])
    got = run(*many, am.causal(), dout=dout.expand_as(many[0]))
    for result in got:
        assert torch.equal(result[-1], result[0]) and torch.equal(result[batch // 2], result[0])
    first = type(got)(*(x[:1] for x in got))
    every = torch.from_numpy(np.array(reference.causal(length, length))).to(DEVICE)
    compare(first, *one, every.expand(1, heads, length, length), dout=dout)
