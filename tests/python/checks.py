"""When a result passes: not much worse than the same mathematics done naively in its precision."""

from __future__ import annotations

import contextlib

import numpy as np
import reference
import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@contextlib.contextmanager
def poisoned():
    """Inside, torch fills new memory with NaN: what a call forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def naive(q, k, v, allowed, scale=None):
    """Dense attention in q's own precision, differentiable; a query that sees nothing gets 0."""
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ k.transpose(2, 3)) * scale
    scores = scores.masked_fill(~allowed, float("-inf"))
    seen = allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, 0.0)
    p = torch.softmax(scores, -1).masked_fill(~allowed, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(~seen[..., 0], float("-inf"))
    return (p @ v).transpose(1, 2), lse


def per_head(allowed, batch, q_heads, q_len, kv_len):
    """A mask's own batches and heads -> a torch bool [batch, q_heads, q_len, kv_len]."""
    return torch.from_numpy(np.array(reference._per_head(allowed, (batch, q_heads, q_len, kv_len))))


def assert_close(name, got, ref, low, floor=0.0):
    """max|got - ref| <= 2 max|low - ref| + 2 max|(ref + 0.3 - 0.3) - ref| (in low's precision)."""
    dtype = low.dtype
    ref = ref.detach() if isinstance(ref, torch.Tensor) else torch.as_tensor(np.asarray(ref))
    got, ref = got.detach().double(), ref.to(got.device, torch.float64)
    low = low.detach().double()
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(ref.shape)}"
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} NaN"
    infinite = ref.isinf()
    assert torch.equal(got.isinf(), infinite), f"{name}: infinities in the wrong places"
    if ref.numel() == 0 or infinite.all():
        return
    keep = ~infinite
    rounded = ((ref.to(dtype) + 0.3 - 0.3).double() - ref)[keep].abs().max()
    error, naive_error = ((x - ref)[keep].abs().max() for x in (got, low))
    bound = 2 * naive_error + 2 * rounded + floor
    assert error <= bound, f"{name}: error {error:.3e}, allowed {bound:.3e}"
