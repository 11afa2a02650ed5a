"""Is a result right? The benchmarked call itself beside plain attention in more precision.

A few (batch entry, key head) places are computed whole, in blocks of rows, from the mask's own
definition. So a check takes seconds and fits in memory at the largest size that is timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from anymask.benchmark_masks import BenchmarkMask

_BLOCK = 2**27  # scores that exist at a time: 0.5 GB in float32
_FLOOR = {"out": 1e-6, "lse": 1e-6}
_GRADIENT_FLOOR = 1e-5
GRADIENTS = ("dq", "dk", "dv")
_ONE_PLACE = 2**16  # lengths from which on a single place is checked


class WrongResult(RuntimeError):
    """A result that is further from the reference than its precision explains."""


class Slice(NamedTuple):
    """One key head of one batch entry: q, dout [group, Sq, D], k, v [Sk, D], key_bias [Sk]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor | None
    key_bias: Tensor | None = None


AnyMask = Union[BenchmarkMask, Tensor]  # a dense mask: bool [batch, 1, length, length]


def visible(mask: AnyMask, entry: int, start: int, stop: int, device: Any) -> Tensor:
    """bool [stop - start, length]: what those rows may see, by the definition of the intervals."""
    if isinstance(mask, Tensor):
        return mask[entry, 0, start:stop]
    indices = mask.indices[entry if len(mask.indices) > 1 else 0, 0]
    column = [torch.from_numpy(c.copy()).to(device)[None] for c in indices.T]
    i = torch.arange(start, stop, device=device, dtype=torch.int32)[:, None]
    if mask.causal:
        masked = i >= column[0] if len(column) == 1 else (i >= column[0]) & (i < column[1])
        masked |= torch.arange(len(indices), device=device, dtype=torch.int32) > i
    elif len(column) == 2:
        masked = (i >= column[0]) | (i < column[1])
    else:
        masked = (i >= column[0]) & (i < column[1]) | (i >= column[2]) & (i < column[3])
    return ~masked


def attention(inputs: Slice, mask: AnyMask, entry: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and (with dout) dq, dk, dv of a slice, each step done and rounded in `dtype`."""
    q, k, v = (x.to(dtype) for x in inputs[:3])
    dout = None if inputs.dout is None else inputs.dout.to(dtype)
    bias = None if inputs.key_bias is None else inputs.key_bias.to(dtype)
    group, length, dim = q.shape
    scale = dim**-0.5
    # What is summed over blocks of rows is rounded once, as one matrix product would.
    wide = torch.promote_types(dtype, torch.float32)
    found = {"out": q.new_empty(group, length, v.shape[1]), "lse": q.new_empty(group, length)}
    if dout is not None:
        found |= {"dq": torch.empty_like(q)}
        found |= {"dk": torch.zeros_like(k, dtype=wide), "dv": torch.zeros_like(v, dtype=wide)}
    rows = max(1, min(length, _BLOCK // max(length, 1)))
    for start in range(0, length, rows):
        here = slice(start, min(start + rows, length))
        allowed = visible(mask, entry, here.start, here.stop, q.device)
        blind = ~allowed.any(-1, keepdim=True)
        for g in range(group):
            scores = (q[g, here] @ k.T).mul_(scale)
            if bias is not None:
                scores += bias
            scores.masked_fill_(~allowed, -torch.inf)
            found["lse"][g, here] = torch.logsumexp(scores, -1)
            p = torch.softmax(scores, -1).masked_fill_(blind, 0.0)
            found["out"][g, here] = p @ v
            if dout is None:
                continue
            dp = dout[g, here] @ v.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            found["dq"][g, here] = ds @ k
            found["dk"] += ds.T.to(wide) @ q[g, here].to(wide)
            found["dv"] += p.T.to(wide) @ dout[g, here].to(wide)
    return {name: x.to(dtype) for name, x in found.items()}


def compare(name: str, got: Tensor, ref: Tensor, low: Tensor, floor: float | None = None) -> float:
    """The error as a share of what is allowed; raises WrongResult above 1.

    `low` is the same mathematics in the tested precision. Allowed is twice its error and twice one
    rounding, for the largest element and for the norm of all: the first alone would let anything
    pass where a long row makes all elements small. `floor`: what is allowed an element in any case.
    """
    floor = _FLOOR.get(name, _GRADIENT_FLOOR) if floor is None else floor
    if not torch.equal(got.isinf(), ref.isinf()):
        raise WrongResult(f"{name}: infinities in the wrong places")
    finite = ref.isfinite()
    got, exact, plain = (x.to(ref.dtype)[finite] for x in (got, ref, low))
    if exact.numel() == 0:
        return 0.0
    error, naive = got - exact, plain - exact
    rounded = (exact.to(low.dtype) + 0.3 - 0.3).to(ref.dtype) - exact
    once = exact.to(low.dtype).to(ref.dtype) - exact
    worst = 0.0
    for what, size, rounding, least in (
        ("largest", lambda x: float(x.abs().max()), rounded, floor),
        ("norm of the", lambda x: float(x.norm()), once, floor * exact.numel() ** 0.5),
    ):
        bound = 2 * size(naive) + 2 * size(rounding) + least
        share = size(error) / bound
        if not share <= 1:  # NaN is wrong too
            raise WrongResult(f"{name}: {what} error {size(error):.2e}, allowed {bound:.2e}")
        worst = max(worst, share)
    return worst


def assert_finite(results: Mapping[str, Tensor]) -> None:
    """Raises WrongResult unless all results by name are finite; lse may be -inf."""
    for name, result in results.items():
        if name != "lse" and not result.isfinite().all():
            raise WrongResult(f"{name}: not finite everywhere")


class Expected:
    """What a call on q [B, S, H, D], k, v (and dout) should give, at a few places.

    The reference is computed in float64 on the CPU and in float32 (no TF32) on a GPU.
    """

    def __init__(self, mask: AnyMask, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None) -> None:
        batch, length, heads, _ = q.shape
        kv_heads = k.shape[2]
        last = (batch - 1, kv_heads - 1)
        self._heads, self._group = heads, heads // kv_heads
        self.places = sorted({last} if length >= _ONE_PLACE else {(0, 0), last})
        precise = torch.float64 if q.device.type == "cpu" else torch.float32
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad():
                self._pairs = []
                for entry, head in self.places:
                    inputs = Slice(*(None if x is None else self._at(x, entry, head)
                                     for x in (q, k, v, dout)))  # fmt: skip
                    inputs = inputs._replace(k=inputs.k[0], v=inputs.v[0])
                    pair = [attention(inputs, mask, entry, t) for t in (precise, q.dtype)]
                    self._pairs.append(pair)
        finally:
            torch.set_float32_matmul_precision(before)

    def _at(self, tensor: Tensor, entry: int, head: int) -> Tensor:
        """[heads, S, D] that belong to a key head, of [B, S, H, D] or (lse) [B, H, S]."""
        by_head = tensor[entry].transpose(0, 1) if tensor.dim() == 4 else tensor[entry]
        each = self._group if by_head.shape[0] == self._heads else 1
        return by_head[head * each : (head + 1) * each]

    def check(self, results: Mapping[str, Tensor]) -> float:
        """Compares results by name (out, lse, dq, dk, dv), shaped as the call has them; returns
        the largest error as a share of what is allowed, or raises WrongResult."""
        assert_finite(results)
        worst = 0.0
        for name, result in results.items():
            for (entry, head), (ref, low) in zip(self.places, self._pairs):
                got = self._at(result.detach(), entry, head).reshape(ref[name].shape)
                worst = max(worst, compare(name, got, ref[name], low[name]))
        return worst
