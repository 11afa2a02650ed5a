"""The definition of score options, for checking what score_options.py times.

Dense attention by torch's autograd, in float32 (float64 on the CPU), for one key head of all batch
entries; dropout's pattern pair by pair from its description in docs/scores.md. Shares nothing with
the library's own kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from anymask.bench.check import WrongResult, compare

_LOW_WORD = 0xFFFFFFFF


def dropped(
    p: float, seed: int, entry: int, head: int, q_len: int, kv_len: int, device: Any
) -> Any:
    """bool [q_len, kv_len]: the pairs that dropout takes from a batch entry and query head."""
    subkey = _philox([entry, head, 0, 0], [seed & _LOW_WORD, seed >> 32 & _LOW_WORD], "cpu")
    key = [int(subkey[0]), int(subkey[1])]
    rows = torch.arange(q_len, device=device)[:, None]
    blocks = torch.arange(-(-kv_len // 64), device=device)[None, :]
    j = torch.arange(64, device=device)
    first, bits = j // 4 % 2 * 2, j // 2 % 2 * 16 + j // 8 * 2 + j % 2
    limit, outputs = _threshold(p), 8
    while outputs and limit % 4 == 0:
        limit, outputs = limit // 4, outputs - 1
    numbers = torch.zeros(q_len, blocks.numel() * 64, dtype=torch.int32, device=device)
    for t in range(outputs):
        words = torch.stack(_philox([rows, blocks, 0, 0], key, device, 7 + 2 * t), -1)
        for i in range(2):
            bit = (words[..., first + i] >> bits & 1).to(torch.int32)
            numbers += bit.flatten(1) << 2 * t + i
    return numbers[:, :kv_len] < limit


def _threshold(p: float) -> int:
    if 1 / 64 <= p <= 63 / 64:
        return int(p * 256 + 0.5) * 256
    return min(int(p * 65536 + 0.5), 65535)


def _philox(counter: Sequence[Any], key: Sequence[int], device: Any, rounds: int = 7) -> list[Any]:
    """Philox4x32, words in int64; wrapped products keep all 64 of their bits."""
    x = [torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter]
    x = list(torch.broadcast_tensors(*x))
    k = list(key)
    for _ in range(rounds):
        one, two = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [
            two >> 32 & _LOW_WORD ^ x[1] ^ k[0],
            two & _LOW_WORD,
            one >> 32 & _LOW_WORD ^ x[3] ^ k[1],
            one & _LOW_WORD,
        ]
        k = [k[0] + 0x9E3779B9 & _LOW_WORD, k[1] + 0xBB67AE85 & _LOW_WORD]
    return x


class Expected:
    """What a call with options should give for its last key head, in all batch entries.

    Args:
        inputs: q, k, v, dout [batch, length, heads, head_dim], and the options' tensors by name:
            key_bias [batch, heads, length], bias [1, heads, length, length], sink [heads].
        options: the names of those in use.
        learned: those that get a gradient; None: no gradients at all.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        options: Sequence[str],
        learned: Sequence[str] | None,
        *,
        causal: bool,
        softcap: float,
        dropout_p: float,
        seed: int,
    ) -> None:
        q, k = inputs["q"], inputs["k"]
        group = q.shape[2] // k.shape[2]
        self._heads = slice(q.shape[2] - group, q.shape[2])
        self._kv_head = slice(k.shape[2] - 1, k.shape[2])
        self._causal, self._softcap = causal, softcap
        self._dropout_p, self._seed = dropout_p, seed
        names = ("q", "k", "v", *options)
        self._wanted = None if learned is None else ("q", "k", "v", *learned)
        mine = {name: self._mine(name, inputs[name].detach()) for name in names}
        dout = self._mine("dout", inputs["dout"])
        precise = torch.float64 if q.device.type == "cpu" else torch.float32
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            self._pairs = [self._computed(mine, dout, dtype) for dtype in (precise, q.dtype)]
        finally:
            torch.set_float32_matmul_precision(before)
        self._noise = self._sink_noise(mine, dout) if "sink" in names else 0.0

    def check(self, results: Mapping[str, Any]) -> float:
        """Compares results by name: out, lse, dq, dk, dv, dkey_bias, dbias, dsink. Returns the
        largest error as a share of what is allowed, or raises WrongResult."""
        worst = 0.0
        for name, result in results.items():
            if not result.isfinite().all():
                raise WrongResult(f"{name}: not finite everywhere")
            ref, low = (found[name] for found in self._pairs)
            got = self._mine(name, result.detach())
            floor = self._noise if name == "dsink" else None
            worst = max(worst, compare(name, got, ref, low, floor))
        return worst

    def _mine(self, name: str, tensor: Any) -> Any:
        """The part of a tensor (or its gradient) that belongs to the key head."""
        name = name.removeprefix("d") if name != "dout" else name
        if name in ("k", "v"):
            return tensor[:, :, self._kv_head]
        if name in ("q", "out", "dout"):
            return tensor[:, :, self._heads]
        return tensor[self._heads] if name == "sink" else tensor[:, self._heads]

    def _computed(self, inputs: Mapping[str, Any], dout: Any, dtype: Any) -> dict[str, Any]:
        leaves = {
            name: x.to(dtype).requires_grad_(self._wanted is not None and name in self._wanted)
            for name, x in inputs.items()
        }
        batch, _, group, _ = dout.shape
        out = torch.empty(dout.shape, dtype=dtype, device=dout.device)
        lse = out.new_empty(batch, group, dout.shape[1])
        for entry in range(batch):
            for g in range(group):
                one, sums = self._head(leaves, entry, g)
                out[entry, :, g] = one.detach()
                lse[entry, g] = sums.detach()
                if self._wanted is not None:
                    one.backward(dout[entry, :, g].to(dtype))
        found = {"out": out, "lse": lse}
        for name in self._wanted or ():
            found[f"d{name}"] = leaves[name].grad
        return found

    def _head(self, leaves: Mapping[str, Any], entry: int, g: int) -> tuple[Any, Any]:
        """out and lse of one query head of one batch entry."""
        q, k, v = leaves["q"][entry, :, g], leaves["k"][entry, :, 0], leaves["v"][entry, :, 0]
        logits = (q @ k.T) * q.shape[-1] ** -0.5
        if self._softcap:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        if "bias" in leaves:
            logits = logits + leaves["bias"][0, g]
        if "key_bias" in leaves:
            logits = logits + leaves["key_bias"][entry, g]
        if self._causal:
            length = len(q)
            hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
            logits = logits.masked_fill(hidden, -torch.inf)
        lse = torch.logsumexp(logits, -1)
        if "sink" in leaves:
            lse = torch.logaddexp(lse, leaves["sink"][g])
        weights = torch.exp(logits - lse[:, None])
        if self._dropout_p:
            head = self._heads.start + g
            place = (entry, head, len(q), len(k), q.device)
            gone = dropped(self._dropout_p, self._seed, *place)
            kept = 1 - _threshold(self._dropout_p) / 65536
            weights = weights.masked_fill(gone, 0.0) / kept
        return weights @ v, lse

    def _sink_noise(self, inputs: Mapping[str, Any], dout: Any) -> float:
        """The error that dsink has from rounding `out` to q's type alone, six standard deviations
        of it: with a number or two a head the naive result may be lucky."""
        precise, sink = self._pairs[0], inputs["sink"].to(self._pairs[0]["lse"].dtype)
        products = (dout.to(precise["out"].dtype) * precise["out"]).square().sum(-1)
        weight = torch.exp(sink[None, :, None] - precise["lse"])
        variance = (products.transpose(1, 2) * weight.square()).sum((0, 2))
        eps = max(torch.finfo(dout.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        return 6 * eps * float((variance / 12).detach().max().sqrt()) + 1e-5
