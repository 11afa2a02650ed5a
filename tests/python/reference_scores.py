"""Score options by definition: dense attention in torch, differentiable in any precision, and
dropout's pattern pair by pair in NumPy. Shares no code with the package."""

from __future__ import annotations

import numpy as np
import torch


def philox(counter, key, rounds=7):
    """Philox4x32; four words (arrays that broadcast) under two."""
    x = [np.asarray(word, np.uint64) for word in counter]
    k = [int(word) for word in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        one, two = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [
            (two >> np.uint64(32)) ^ x[1] ^ np.uint64(k[0]),
            two & low,
            (one >> np.uint64(32)) ^ x[3] ^ np.uint64(k[1]),
            one & low,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def halves(number):
    return [int(number) % 2**32, (int(number) % 2**64) >> 32]


def threshold(p):
    if 1 / 64 <= p <= 63 / 64:
        return int(np.floor(p * 256 + 0.5)) * 256
    return min(int(np.floor(p * 65536 + 0.5)), 65535)


def kept(p, seed, batch, heads, q_len, kv_len, offset=0):
    """bool [batch, heads, q_len, kv_len]: the pairs that dropout keeps."""
    rows, blocks = np.arange(q_len)[:, None], np.arange(-(-kv_len // 64))[None, :]
    j = np.arange(kv_len)
    bits = j // 2 % 2 * 16 + j // 8 % 8 * 2 + j % 2
    limit, outputs = threshold(p), 8
    while outputs and limit % 4 == 0:
        limit, outputs = limit // 4, outputs - 1
    result = np.empty((batch, heads, q_len, kv_len), bool)
    for b, h in np.ndindex(batch, heads):
        key = philox([b, h, *halves(offset)], halves(seed))[:2]
        numbers = np.zeros((q_len, kv_len), np.int64)
        for t in range(outputs):
            words = philox([rows, blocks, 0, 0], key, 7 + 2 * t)
            words = np.stack([np.broadcast_to(w, (q_len, blocks.size)) for w in words])
            for i in range(2):
                word = words[j // 4 % 2 * 2 + i, :, j // 64].T.astype(np.int64)
                numbers += (word >> bits & 1) << (2 * t + i)
        result[b, h] = numbers >= limit
    return result


def attention(
    q, k, v, allowed, scale=None, key_bias=None, bias=None, sink=None, softcap=0.0, dropout_p=0.0,
    kept=None,
):  # fmt: skip
    """(out, lse, P before dropping) in q's own precision; allowed and kept: torch bool [batch,
    q_heads, q_len, kv_len]."""
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    x = (q.transpose(1, 2) @ k.transpose(2, 3)) * scale
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    if bias is not None:
        x = x + bias
    if key_bias is not None:
        x = x + key_bias.repeat_interleave(heads // key_bias.shape[1], dim=1)[:, :, None]
    x = x.to(q.dtype)
    seen = allowed & (x.detach() > -torch.inf)
    sinks = x.new_zeros((*x.shape[:3], 1)) - torch.inf
    if sink is not None:
        sinks = sink.to(q.dtype)[None, :, None, None].expand(sinks.shape)
    logits = torch.cat([x.masked_fill(~seen, -torch.inf), sinks], -1)
    seen = torch.cat([seen, sinks.detach() > -torch.inf], -1)
    blind = ~seen.any(-1, keepdim=True)
    logits = logits.masked_fill(blind, 0.0)  # -inf - -inf would be NaN
    weights = p = torch.softmax(logits, -1).masked_fill(~seen, 0.0)[..., :-1]
    lse = torch.logsumexp(logits, -1).masked_fill(blind[..., 0], -torch.inf)
    if kept is not None:
        weights = p.masked_fill(~kept, 0.0) / (1 - threshold(dropout_p) / 65536)
    return (weights @ v).transpose(1, 2), lse, p
