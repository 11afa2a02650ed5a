"""The calls of other libraries that need score options in the backward pass, on the GPU."""

from __future__ import annotations

import anymask as am
import pytest
import reference_scores
import torch
from anymask.compat import _arguments as arguments
from anymask.compat import dynamic_masks
from problem import DEVICE, poisoned

pytestmark = pytest.mark.cuda


def close(found, expected, tolerance=0.02):
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).abs().max()
        assert error <= tolerance * other.double().abs().max()


def weighed(q, k, v, logits_of, kept=1.0, allowed=None):
    """Attention [batch, heads, length, dim] by its definition, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = logits_of(q.double() @ k.transpose(2, 3) * q.shape[3] ** -0.5)
    return (logits.masked_fill(~allowed, -torch.inf).softmax(-1) * kept) @ v


# The last one leaves most keys unseen, whose rows of k and v are not gathered.
@pytest.mark.parametrize(
    "length, keep, dim", [(300, 100, 64), (300, 1000, 64), (2500, 40, 64), (2500, 40, 128)]
)
def test_dynamic_masks(length, keep, dim):
    batch, heads, kv_heads = 2, 4, 2
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
    bias = scores.exp().repeat_interleave(group, 1)[:, :, None]
    expected = weighed(q, k, v, lambda logits: logits + bias, allowed=allowed)
    close((out, *found), (expected, *torch.autograd.grad(expected, leaves, dout.double())))


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
    expected = weighed(q, k, v, lambda x: x, kept, allowed).transpose(1, 2)
    close((out, *found), (expected, *torch.autograd.grad(expected, leaves, dout.double())))
