"""Attention and masks by definition, in float64 NumPy: shares no code with the package."""

from __future__ import annotations

import numpy as np


def attention(q, k, v, allowed, scale=None):
    """(out, lse) of q [B, Sq, Hq, D], k, v; allowed broadcasts to [B, Hq, Sq, Sk]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    p, lse = _probabilities(q, k, allowed, scale, group)
    out = np.einsum("bhij,bjhd->bihd", p, np.repeat(v, group, axis=2))
    return out, lse


def _probabilities(q, k, allowed, scale, group):
    scores = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, group, axis=2)) * scale
    allowed = _per_head(allowed, scores.shape)
    scores = np.where(allowed, scores, -np.inf)
    largest = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + largest)[..., 0]
    return weights / np.where(total == 0, 1.0, total), lse


def _per_head(allowed, shape):
    """Mask heads are a divisor of the query heads: each serves a run of neighbours."""
    allowed = np.asarray(allowed, bool)
    heads = allowed.shape[-3] if allowed.ndim >= 3 else 1
    if heads not in (1, shape[1]):
        allowed = np.repeat(allowed, shape[1] // heads, axis=-3)
    return np.broadcast_to(allowed, shape)


def attention_backward(q, k, v, allowed, dout, dlse=None, scale=None):
    """(dq, dk, dv) of sum(out * dout) + sum(lse * dlse)."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    batch, kv_len, kv_heads, dim = k.shape
    group = q.shape[2] // kv_heads
    scale = dim**-0.5 if scale is None else scale
    p, _ = _probabilities(q, k, allowed, scale, group)
    kk, vv = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    dv = np.einsum("bhij,bihd->bjhd", p, dout)
    dp = np.einsum("bihd,bjhd->bhij", dout, vv)
    row = (p * dp).sum(axis=-1, keepdims=True)
    if dlse is not None:
        row = row - np.asarray(dlse, np.float64)[..., None]
    ds = p * (dp - row) * scale
    dq = np.einsum("bhij,bjhd->bihd", ds, kk)
    dk = np.einsum("bhij,bihd->bjhd", ds, q)

    def per_kv_head(x):
        return x.reshape(batch, kv_len, kv_heads, group, x.shape[-1]).sum(axis=3)

    return dq, per_kv_head(dk), per_kv_head(dv)


# ---- masks, pair by pair ------------------------------------------------------------------------


def _grid(q_len, kv_len):
    return np.arange(q_len)[:, None], np.arange(kv_len)[None, :]


def causal(q_len, kv_len):
    i, j = _grid(q_len, kv_len)
    return (j <= i + kv_len - q_len)[None, None]


def sliding_window(q_len, kv_len, left, right):
    i, j = _grid(q_len, kv_len)
    i = i + kv_len - q_len
    above = True if left < 0 else j >= i - left
    below = True if right < 0 else j <= i + right
    return np.broadcast_to(above & below, (q_len, kv_len))[None, None]


def prefix_lm(q_len, kv_len, lengths):
    lengths = np.atleast_1d(lengths)
    j = np.arange(kv_len)
    return causal(q_len, kv_len) | (j < lengths[:, None])[:, None, None, :]


def documents(q_ids, kv_ids):
    q_ids, kv_ids = np.atleast_2d(q_ids), np.atleast_2d(kv_ids)
    return (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]


def cu_documents(cu_seqlens, length):
    ids = np.searchsorted(np.asarray(cu_seqlens)[1:], np.arange(length), side="right")
    return documents(ids, ids)


def intervals(indices, causal_mask, q_len):
    """indices [B, H, Sk, n]; the definition's own words, one column kind at a time."""
    indices = np.clip(np.asarray(indices, np.int64), 0, q_len)
    kv_len, n = indices.shape[2:]
    i = np.arange(q_len)[None, None, :, None]
    column = [indices[..., c][:, :, None, :] for c in range(n)]
    if causal_mask:
        masked = i >= column[0] if n == 1 else (i >= column[0]) & (i < column[1])
        return ~masked & causal(q_len, kv_len)
    if n == 2:
        return ~((i >= column[0]) | (i < column[1]))
    one = (i >= column[0]) & (i < column[1])
    two = (i >= column[2]) & (i < column[3])
    return ~(one | two)


def blocks(block_mask, rows, columns, q_len, kv_len):
    big = np.repeat(np.repeat(np.asarray(block_mask) != 0, rows, axis=2), columns, axis=3)
    return big[:, :, :q_len, :kv_len]


def ids(eq, ek):
    eq, ek = np.asarray(eq), np.asarray(ek)
    return (eq[..., :, None] >= 0) | (eq[..., :, None] == ek[..., None, :])


def top_keys(scores, keep, q_len):
    """Row by row: sort the keys before a query by (score, lower index first), keep the best."""
    scores = np.asarray(scores, np.float32).astype(np.float64)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    kv_len = scores.shape[2]
    allowed = np.zeros((*scores.shape[:2], q_len, kv_len), bool)
    for b, h in np.ndindex(*scores.shape[:2]):
        for i in range(q_len):
            before = np.arange(max(0, i + kv_len - q_len + 1))
            best = before[np.argsort(-scores[b, h, before], kind="stable")][:keep]
            allowed[b, h, i, best] = True
    return allowed
