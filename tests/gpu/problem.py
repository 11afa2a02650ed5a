"""What the GPU tests share: the device, inputs, a float64 reference and the comparison with it."""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

import anymask as am
import torch
from checks import DTYPES, assert_close, naive, per_head

DEVICE = torch.device(os.environ.get("ANYMASK_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
HALVES = ("bfloat16", "float16")
LENGTH = 700 if ON_GPU else 150  # several tiles of every kernel, and no multiple of any
MULTIPROCESSORS = 132 if ON_GPU else 2


class Results(NamedTuple):
    """Both passes' results; gradients of sum(out * dout) + sum(lse * dlse)."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def inputs(batch, q_len, kv_len=None, heads=(4, 4), dims=(64, 64), dtype="bfloat16"):
    """Random q, k, v [batch, length, heads, head_dim]."""
    kv_len = q_len if kv_len is None else kv_len
    shapes = (
        (batch, q_len, heads[0], dims[0]),
        (batch, kv_len, heads[1], dims[0]),
        (batch, kv_len, heads[1], dims[1]),
    )
    return [torch.randn(shape, device=DEVICE).to(DTYPES[dtype]) for shape in shapes]


def gradient_of(q, v):
    """A random gradient of the output for q and v."""
    return torch.randn((*q.shape[:3], v.shape[3]), device=DEVICE).to(q.dtype)


@contextlib.contextmanager
def poisoned():
    """Memory that torch hands out is full of NaN (bytes: 255): what is not written shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def run(q, k, v, mask=None, *, dout=None, dlse=None, **options):
    """anymask's results on tensors as they are (any strides)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with poisoned():
        out, lse = am.attention(*leaves, mask, return_lse=True, **options)
        outputs, gradients = [out], [gradient_of(q, v) if dout is None else dout]
        if dlse is not None:
            outputs, gradients = [*outputs, lse], [*gradients, dlse]
        found = torch.autograd.grad(outputs, leaves, gradients)
    return Results(out.detach(), lse.detach(), *found)


def expect(q, k, v, every, *, dout, dlse=None, scale=None, dtype=torch.float64):
    """The same by dense attention in `dtype`; `every` is bool [batch, heads, q_len, kv_len]."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = naive(*leaves, every, scale)
    outputs, gradients = [out], [dout.to(dtype)]
    if dlse is not None:
        outputs, gradients = [*outputs, lse], [*gradients, dlse.to(dtype)]
    found = torch.autograd.grad(outputs, leaves, gradients)
    return Results(out.detach(), lse.detach(), *found)


def compare(got, q, k, v, every, *, dout, dlse=None, scale=None, also=None):
    """Asserts that results are as good as naive attention in their own precision; `also`: others of
    the same inputs."""
    options = {"dout": dout, "dlse": dlse, "scale": scale}
    ref = expect(q, k, v, every, **options)
    low = expect(q, k, v, every, **options, dtype=q.dtype)
    for each in (got,) if also is None else (got, also):
        compare_with(ref, low, each, q, every)


def compare_with(ref, low, got, q, every):
    # With few elements the naive result may be exact by luck: allow the rounding of one product.
    few = min(every.shape[2:]) < 32
    floor = max(1e-5, 2 * torch.finfo(q.dtype).eps) if few else 1e-5
    for name, *three in zip(Results._fields, got, ref, low):
        assert_close(name, *three, floor if name.startswith("d") else 1e-6)
        assert_close_in_norm(name, *three, floor)
    # Scores and their sums are float32 whatever the inputs are: far better than the naive result.
    seen = ref.lse.isfinite()
    assert ((got.lse - ref.lse)[seen].abs() <= 1e-3).all(), "lse"
    blind = ~every.any(-1)
    assert (got.out.transpose(1, 2)[blind] == 0).all() and (got.lse[blind] == -torch.inf).all()
    assert (got.dq.transpose(1, 2)[blind] == 0).all()


def assert_close_in_norm(name, got, ref, low, floor):
    """As checks.assert_close, for the norm of all elements. The largest error alone would let much
    pass where long rows make all elements small: 0.3 itself is rounded by 1e-3 in 16 bits."""
    once = ref.to(low.dtype).double()
    got, ref, low, once = (x.double().nan_to_num(neginf=0.0) for x in (got, ref, low, once))
    error, naive_error, rounding = ((x - ref).norm() for x in (got, low, once))
    bound = 2 * naive_error + 2 * rounding + floor / 10 * ref.numel() ** 0.5
    assert error <= bound, f"{name}: norm of the error {error:.3e}, allowed {bound:.3e}"


def check(q, k, v, mask, allowed, *, scale=None, with_lse=False, dout=None, plan=False, **options):
    """Both passes under a mask against the reference.

    `allowed` says what the mask means (NumPy, see mask_cases); `with_lse` sends a gradient through
    lse too; `plan` makes a plan first. The forward pass also runs with more heads: calls of few
    rows and of many have kernels of their own, and tests are small.
    """
    every = per_head(allowed, q.shape[0], q.shape[2], q.shape[1], k.shape[1]).to(DEVICE)
    mask = None if mask is None else mask.to(DEVICE)
    dout = gradient_of(q, v) if dout is None else dout
    dlse = None
    if with_lse:
        dlse = torch.randn(every.shape[:3], device=DEVICE).masked_fill(~every.any(-1), 0.0)
    got = run(q, k, v, **planned(q, k, v, mask, plan), dout=dout, dlse=dlse, scale=scale, **options)
    more = forward_of_many_rows(q, k, v, mask, scale, plan)
    also = None if more is None else got._replace(out=more[0], lse=more[1])
    compare(got, q, k, v, every, dout=dout, dlse=dlse, scale=scale, also=also)
    return got


def planned(q, k, v, mask, plan=True):
    """The mask as an option of a call: as it is, or planned."""
    if not plan:
        return {"mask": mask}
    return {
        "plan": am.plan(
            mask, batch=q.shape[0], q_heads=q.shape[2], kv_heads=k.shape[2], q_len=q.shape[1],
            kv_len=k.shape[1], head_dim=q.shape[3], v_head_dim=v.shape[3], dtype=q.dtype,
            device=DEVICE,
        )
    }  # fmt: skip


def forward_of_many_rows(q, k, v, mask, scale=None, plan=False):
    """(out, lse) from a call with each query head so many times that there are more row tiles than
    are cut, so that all of them are summed alike; None where there are as it is. k, v and a mask's
    heads stand for more then."""
    tiles = q.shape[0] * q.shape[2] * -(-q.shape[1] // 192)  # of the largest
    most_cut = MULTIPROCESSORS if q.shape[1] > 16 else 4 * MULTIPROCESSORS
    times = most_cut // max(tiles, 1) + 1
    if times == 1 or tiles == 0:
        return None
    q = q.detach().repeat_interleave(times, 2)
    with poisoned(), torch.no_grad():
        out, lse = am.attention(
            q, k, v, **planned(q, k, v, mask, plan), scale=scale, return_lse=True
        )
    out, lse = out.unflatten(2, (-1, times)), lse.unflatten(1, (-1, times))
    assert torch.equal(out, out[:, :, :, :1].expand_as(out))
    assert torch.equal(lse, lse[:, :, :1].expand_as(lse))
    return out[:, :, :, 0], lse[:, :, 0]


def assert_same(one, two):
    """Bitwise equality, NaN included as a failure."""
    for name, a, b in zip(Results._fields, one, two):
        assert torch.equal(a, b), f"{name} differs by {(a.double() - b.double()).abs().max():.2e}"
