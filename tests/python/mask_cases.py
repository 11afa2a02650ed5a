"""Random masks and what they mean, pair by pair: for the property tests and the fuzzer."""

from __future__ import annotations

import anymask as am
import numpy as np
import reference


def batch_or_one(rng, batch):
    return batch if rng.random() < 0.5 else 1


def divisor(rng, heads):
    return int(rng.choice([n for n in range(1, heads + 1) if heads % n == 0]))


def full(rng, b, h, m, n):
    return am.full(), np.ones((1, 1, m, n), bool)


def causal(rng, b, h, m, n):
    return am.causal(), reference.causal(m, n)


def sliding_window(rng, b, h, m, n):
    left, right = (int(rng.integers(-1, max(m, n) + 2)) for _ in range(2))
    return am.sliding_window(left, right), reference.sliding_window(m, n, left, right)


def prefix_lm(rng, b, h, m, n):
    if rng.random() < 0.5:
        length = int(rng.integers(0, n + 2))
        return am.prefix_lm(length), reference.prefix_lm(m, n, length)
    lengths = rng.integers(0, n + 2, batch_or_one(rng, b)).astype(rng.choice(["int32", "int64"]))
    return am.prefix_lm(lengths), reference.prefix_lm(m, n, lengths)


def documents(rng, b, h, m, n):
    dtype = rng.choice(["int32", "int64"])
    kinds = max(1, min(m, n) // 8)
    q_ids = rng.integers(0, kinds + 1, (batch_or_one(rng, b), m)).astype(dtype)
    kv_ids = rng.integers(0, kinds + 1, (batch_or_one(rng, b), n)).astype(dtype)
    if rng.random() < 0.5:
        q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
    if m == n and rng.random() < 0.5:
        return am.documents(q_ids), reference.documents(q_ids, q_ids)
    return am.documents(q_ids, kv_ids), reference.documents(q_ids, kv_ids)


def cu_documents(rng, b, h, m, n):
    if m != n:
        return documents(rng, b, h, m, n)
    cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, 5)))
    cu_seqlens = np.concatenate([[0], cuts]).astype(np.int32)
    return am.documents(cu_seqlens=cu_seqlens), reference.cu_documents(cu_seqlens, n)


def intervals(rng, b, h, m, n):
    is_causal = bool(rng.random() < 0.5)
    columns = int(rng.choice([1, 2] if is_causal else [2, 4]))
    shape = (batch_or_one(rng, b), divisor(rng, h), n, columns)
    indices = rng.integers(-2, m + 3, shape).astype(np.int32)
    return am.intervals(indices, is_causal), reference.intervals(indices, is_causal, m)


def blocks(rng, b, h, m, n):
    rows, columns = (int(x) for x in rng.choice([16, 32, 48, 64, 128], 2))
    shape = (batch_or_one(rng, b), divisor(rng, h), -(-m // rows), -(-n // columns))
    block_mask = (rng.random(shape) < 0.5).astype(rng.choice(["bool", "uint8", "int32", "int64"]))
    mask = am.blocks(block_mask, (rows, columns))
    return mask, reference.blocks(block_mask, rows, columns, m, n)


def dense(rng, b, h, m, n):
    shape = [batch_or_one(rng, b), divisor(rng, h), m, n]
    shape[2] = 1 if rng.random() < 0.2 else m
    shape[3] = 1 if rng.random() < 0.2 else n
    allowed = rng.random(shape) < rng.choice([0.05, 0.5, 0.95])
    allowed = allowed.astype(rng.choice(["bool", "uint8", "int16", "int32", "float32"]))
    return am.dense(allowed), np.broadcast_to(allowed != 0, (*shape[:2], m, n))


def ids(rng, b, h, m, n):
    dtype = rng.choice(["int32", "int64"])
    eq = rng.integers(-4, 2, (batch_or_one(rng, b), divisor(rng, h), m)).astype(dtype)
    ek = rng.integers(-4, 2, (batch_or_one(rng, b), divisor(rng, h), n)).astype(dtype)
    eq_all, ek_all = (np.repeat(x, h // x.shape[1], axis=1) for x in (eq, ek))
    return am.ids(eq, ek), reference.ids(eq_all, ek_all)


KINDS = {
    f.__name__: f
    for f in (
        full, causal, sliding_window, prefix_lm, documents, cu_documents, intervals, blocks, dense,
        ids,
    )
}  # fmt: skip


def everywhere(allowed, b, h, m, n):
    """A mask's meaning for every batch entry and query head."""
    return reference._per_head(allowed, (b, h, m, n))


def random_leaf(rng, b, h, m, n):
    mask, allowed = KINDS[str(rng.choice(list(KINDS)))](rng, b, h, m, n)
    return mask, everywhere(allowed, b, h, m, n)


def random_tree(rng, b, h, m, n, leaves):
    """(mask, allowed [b, h, m, n]) of a random expression with that many leaves."""
    if leaves == 1:
        mask, allowed = random_leaf(rng, b, h, m, n)
    else:
        left = int(rng.integers(1, leaves))
        (mask, allowed), (other, more) = (
            random_tree(rng, b, h, m, n, count) for count in (left, leaves - left)
        )
        if rng.random() < 0.5:
            mask, allowed = mask & other, allowed & more
        else:
            mask, allowed = mask | other, allowed | more
    if rng.random() < 0.15:
        mask, allowed = ~mask, ~allowed
    if rng.random() < 0.15:
        mask = mask.reordered()  # a hint: means the same
    return mask, allowed


def dense_of(mask, b, h, m, n):
    """What the library says, for every batch entry and query head."""
    return everywhere(mask.to_dense(b, h, m, n), b, h, m, n)
