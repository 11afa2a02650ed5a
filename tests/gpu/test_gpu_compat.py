"""The calls of other libraries that need score options in the backward pass, on the GPU."""

from __future__ import annotations

import anymask as am
import pytest
import reference_scores
import torch
from anymask.compat import _arguments as arguments
from anymask.compat import dynamic_masks
from checks import assert_close
from problem import DEVICE, poisoned

pytestmark = pytest.mark.cuda


class RoundedOutput(torch.autograd.Function):
    """P V, whose gradient takes rowsum(dO O) from O in bfloat16, as passes that save O do.

    The gradient of the logits is then P (dP - that); sums of it over many pairs, which the softmax
    makes nearly cancel, show the difference.
    """

    @staticmethod
    def forward(ctx, logits, v):
        weights = logits.softmax(-1)
        out = (weights @ v).bfloat16().to(v.dtype)
        ctx.save_for_backward(weights, v, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        weights, v, out = ctx.saved_tensors
        slopes = weights * (dout @ v.transpose(2, 3) - (dout * out).sum(-1, keepdim=True))
        return slopes, weights.transpose(2, 3) @ dout


def check(found, leaves, dout, definition, rounded=None):
    """out and the leaves' gradients against a definition in float64 and, done naively, bfloat16.

    `rounded`: the definition with `RoundedOutput`, whose error counts as a naive one too.
    """
    results = []
    for one in (lambda: definition(torch.float64), lambda: definition(torch.bfloat16), rounded):
        if one is not None:
            out = one()
            results.append((out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))))
    for index, got in enumerate(found):
        ref, *lows = (result[index].double() for result in results)
        low = max(lows, key=lambda low: (low - ref).abs().max())
        assert_close(f"result {index}", got, ref, low.bfloat16(), 1e-5)


def weighed(dtype, q, k, v, logits_of, kept=1.0, allowed=None):
    """Attention [batch, heads, length, dim] by its definition."""
    k, v = (x.to(dtype).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = logits_of(q.to(dtype) @ k.transpose(2, 3) * q.shape[3] ** -0.5).to(dtype)
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1) * kept
    return weights.to(dtype) @ v


# The last one leaves most keys unseen, whose rows of k and v are not gathered.
@pytest.mark.parametrize(
    "length, keep, dim", [(300, 100, 64), (300, 1000, 64), (2500, 40, 64), (2500, 40, 128)]
)
def test_dynamic_masks(length, keep, dim):
    batch, heads, kv_heads = 1, 16, 8  # A has an entry a key head: its errors are to be many
    shapes = [(batch, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    shapes.append((kv_heads, kv_heads * dim))
    leaves = [torch.randn(shape, device=DEVICE).bfloat16() for shape in shapes]
    leaves[3] = leaves[3] / dim
    leaves = [x.requires_grad_() for x in (*leaves, torch.randn(kv_heads, device=DEVICE))]
    dout = torch.randn(shapes[0], device=DEVICE).bfloat16()

    with poisoned():
        out = am.apply_dynamic_mask_attention(*leaves, keep_window_size=keep)
        found = torch.autograd.grad(out, leaves, dout)
    q, k, v, dt_proj, A = leaves
    scores = dynamic_masks._scores(v, dt_proj, A)
    sizes = arguments.sizes_of(q, k, v, ("query", "key", "value"), "bhsd")
    everything = torch.ones(1, 1, length, length, dtype=torch.bool, device=DEVICE)
    allowed = dynamic_masks._kept(scores.detach().float(), everything, keep, True, sizes)
    group = heads // kv_heads
    if allowed.shape[1] > 1:
        allowed = allowed.repeat_interleave(group, 1)

    def definition(dtype):
        scores = dynamic_masks._scores(v, dt_proj, A)
        bias = scores.exp().repeat_interleave(group, 1)[:, :, None]
        return weighed(dtype, q, k, v, lambda logits: logits + bias.to(dtype), allowed=allowed)

    def rounded():
        bias = dynamic_masks._scores(v, dt_proj, A).exp().repeat_interleave(group, 1)[:, :, None]
        keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
        logits = q.double() @ keys.transpose(2, 3) * dim**-0.5 + bias
        return RoundedOutput.apply(logits.masked_fill(~allowed, -torch.inf), values)

    check((out, *found), leaves, dout, definition, rounded)


def test_flashmask_with_dropout():
    batch, heads, length, dim, p = 2, 4, 300, 64, 0.25
    leaves = [torch.randn(batch, length, heads, dim, device=DEVICE).bfloat16() for _ in range(3)]
    leaves = [x.requires_grad_() for x in leaves]
    dout = torch.randn(leaves[0].shape, device=DEVICE).bfloat16()
    seed = torch.tensor([3, 4], device=DEVICE)
    with poisoned():
        out = am.flashmask_attention(*leaves, causal=True, dropout=p, fixed_seed_offset=seed)
        found = torch.autograd.grad(out, leaves, dout)
    kept = reference_scores.kept(p, 3, batch, heads, length, length, offset=4)
    kept = torch.from_numpy(kept).to(DEVICE) / (1 - p)
    allowed = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
    q, k, v = (x.transpose(1, 2) for x in leaves)

    def definition(dtype):
        return weighed(dtype, q, k, v, lambda x: x, kept, allowed).transpose(1, 2)

    check((out, *found), leaves, dout, definition)
