"""Attention under any mask, from Python: NumPy, PyTorch with gradients, a plan for many layers.

python examples/attention.py
"""

from __future__ import annotations

import anymask as am
import numpy as np


def with_numpy() -> None:
    """A causal mask inside each of two documents, without torch."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 6, 2, 8), np.float32) for _ in range(3))
    mask = am.causal() & am.documents([0, 0, 0, 1, 1, 1])
    out = am.attention(q, k, v, mask)
    print(mask)
    print(mask.to_dense()[0, 0].astype(int))
    print("out", out.shape, "density", mask.density())


def with_torch() -> None:
    """Grouped heads, gradients, and one plan for every layer."""
    import torch

    length, q_heads, kv_heads, head_dim = 512, 8, 2, 64
    ids = torch.arange(length) // 100  # documents of 100 tokens
    sinks = torch.arange(length)[None, :] < 4  # four tokens that all later ones see
    mask = am.causal() & (am.documents(ids) | am.dense(sinks))
    plan = am.plan(
        mask,
        batch=1,
        q_heads=q_heads,
        kv_heads=kv_heads,
        q_len=length,
        kv_len=length,
        head_dim=head_dim,
        dtype=torch.bfloat16,
    )
    q = torch.randn(1, length, q_heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(1, length, kv_heads, head_dim, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    out, lse = am.attention(q, k, v, plan=plan, return_lse=True)
    out.float().square().sum().backward()
    print("out", tuple(out.shape), "lse", tuple(lse.shape), "dk", tuple(k.grad.shape))


if __name__ == "__main__":
    with_numpy()
    try:
        with_torch()
    except ImportError:
        print("torch is not installed: its half of the example is left out")
