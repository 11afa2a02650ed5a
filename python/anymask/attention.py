"""attention: softmax(scale * q k^T, where the mask allows) v."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from anymask import _scores, _tensors
from anymask._library import check, library
from anymask._scores import NO_SCORES
from anymask.masks import Mask
from anymask.plans import Plan, Problem, pointer_to

# The end of anymask_forward_args after the mask: plan, plan_bytes, scale, stream, workspace, bytes
FORWARD_TAIL = struct.Struct("@PqdPPq")
NAN = float("nan")
_FULL = Mask((0, 0, 0, 0))
_FLOATS = ("float32", "float16", "bfloat16", "float64")


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Mask | None = None,
    *,
    plan: Plan | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    deterministic: bool = False,
    dropout_p: float = 0.0,
    seed: Any = None,
    key_bias: Any = None,
    bias: Any = None,
    softcap: float = 0.0,
    sink: Any = None,
) -> Any:
    """Exact attention under any mask, in memory linear in the sequence.

    Args:
        q: [batch, q_len, q_heads, head_dim]: torch (differentiable) or NumPy (forward only);
            float32, float16, bfloat16, or float64 on the CPU. Any strides with a contiguous last
            dimension, nothing is copied. Head dimensions are multiples of 8 up to 256.
        k: [batch, kv_len, kv_heads, head_dim]; q_heads is a multiple of kv_heads, and query head h
            reads key head ``h // (q_heads // kv_heads)``.
        v: [batch, kv_len, kv_heads, v_head_dim].
        mask: what each query may see; None: everything.
        plan: the mask's plan for these sizes (see `plan`), instead of `mask`.
        scale: of q k^T; None: ``head_dim ** -0.5``.
        layout: "bshd", or "bhsd" for q, k, v and the result as [batch, heads, length, head_dim].
        return_lse: also return the logarithm of each query's sum of exponentials.
        deterministic: bitwise reproducible gradients (on the CPU they always are).
        dropout_p: the probability, to a multiple of 1 / 256, that a weight becomes 0; the others
            are divided by 1 - dropout_p.
        seed: what decides which: an integer, or int64 [2] (seed, offset) on q's device, which needs
            no synchronisation; the same seed drops the same pairs on every device. None: drawn from
            torch's generator of that device, or NumPy's.
        key_bias: [batch or 1, heads, kv_len], heads a divisor of q_heads: added to the scores of a
            key. -inf hides it. Biases and sink have q's type or float32 (float64 where q is), and
            gradients.
        bias: [batch or 1, q_heads or 1, q_len or 1, kv_len], added to the scores of a pair.
        softcap: where positive, scores x are first capped to ``softcap * tanh(x / softcap)``.
        sink: [q_heads], the logit of one more key that every query sees and that has no value.

    Returns:
        out [batch, q_len, q_heads, v_head_dim] in `layout`, of q's type; with `return_lse`
        (out, lse), lse [batch, q_heads, q_len] float32 (float64 for float64), natural logarithm, of
        all weights, the sink's and dropped ones too. A query that may see nothing has out 0, lse
        -inf (or the sink) and zero gradients.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    >>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
    >>> am.attention(q, k, v, am.causal()).shape
    (1, 4, 2, 8)

    Source: FlashAttention (arXiv 2205.14135, 2307.08691); column-wise masks: FlashMask (arXiv
    2410.01359).
    """
    if plan is not None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: got {type(plan).__name__}, an anymask.Plan is needed")
        if mask is not None and mask is not plan.mask:
            raise ValueError("mask: the plan brings its own mask; pass one of the two")
        mask = plan.mask
    elif mask is None:
        mask = _FULL
    elif not isinstance(mask, Mask):
        raise TypeError(
            f"mask: got {type(mask).__name__}, an anymask.Mask is needed (anymask.dense(allowed) "
            "makes one from an array)"
        )
    if layout == "bhsd":
        q, k, v = _swapped(q, "q"), _swapped(k, "k"), _swapped(v, "v")
    elif layout != "bshd":
        raise ValueError(f"layout: got {layout!r}, 'bshd' or 'bhsd' is needed")

    if scale is not None and not isinstance(scale, float):
        scale = _scores.number(scale, "scale")
    options = ()
    if (
        dropout_p != 0.0
        or softcap != 0.0
        or not (seed is None and key_bias is None and bias is None and sink is None)
    ):
        options = (dropout_p, seed, key_bias, bias, softcap, sink)
    if isinstance(q, np.ndarray):
        scores = _scores.numpy_options(*options) if options else None
        out, lse = _numpy_attention(q, k, v, mask, plan, scale, scores)
    else:
        from anymask import torch_op

        out, lse = torch_op.attention(q, k, v, mask, plan, scale, bool(deterministic), options)
    if layout == "bhsd":
        out = out.swapaxes(1, 2)
    return (out, lse) if return_lse else out


def _swapped(tensor: Any, name: str) -> Any:
    if getattr(tensor, "ndim", 4) != 4:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, 4 dimensions are needed")
    return tensor.swapaxes(1, 2) if hasattr(tensor, "swapaxes") else tensor


def _numpy_attention(
    q: np.ndarray,
    k: Any,
    v: Any,
    mask: Mask,
    plan: Plan | None,
    scale: float | None,
    scores: _scores.ScoreOptions | None,
) -> tuple[np.ndarray, np.ndarray]:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: got {type(array).__name__}, but q is a NumPy array")
        if array.ndim != 4:
            raise ValueError(f"{name}: got shape {array.shape}, 4 dimensions are needed")
    if q.dtype.name not in _FLOATS:
        raise TypeError(f"q: got element type {q.dtype}, one of {', '.join(_FLOATS)} is needed")
    batch, q_len, q_heads, head_dim = q.shape
    out = np.empty((batch, q_len, q_heads, v.shape[3]), q.dtype)
    lse = np.empty((batch, q_heads, q_len), np.float64 if q.dtype == np.float64 else np.float32)
    plan_pointer = plan_bytes = 0
    if plan is not None:
        sizes = (batch, q_heads, k.shape[2], q_len, k.shape[1], head_dim, v.shape[3])
        plan.check(Problem(*sizes, q.dtype.name, "cpu"))
        buffer = np.asarray(plan.buffer)
        plan_pointer, plan_bytes = pointer_to(buffer) or 0, buffer.size
    packed, _nodes = _tensors.pack_mask(mask.spec, mask.arrays)
    views = (("q", q), ("k", k), ("v", v), ("out", out), ("lse", lse))
    args = b"".join([_tensors.pack_numpy(array, name) for name, array in views])
    score_pointer, _options = NO_SCORES, None
    if scores is not None:
        score_pointer, _options = _scores.pack_options(scores, _tensors.pack_numpy)
    tail = FORWARD_TAIL.pack(plan_pointer, plan_bytes, NAN if scale is None else scale, 0, 0, 0)
    check(library().anymask_attention_forward(args + packed + score_pointer + tail))
    return out, lse
