"""flexible_attention: the call of Triton flash attention with flexible masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from anymask import masks
from anymask.attention import attention
from anymask.compat import _arguments as arguments

_NONE, _DOCUMENTS = 0, 1
_READ_IN_PLACE = ("int32", "int64")
# What other integer types become: the narrower of the two that holds them
_WIDER = {"bool": "int32", "int8": "int32", "int16": "int32", "uint8": "int32", "uint16": "int32",
          "uint32": "int64"}  # fmt: skip


def flexible_attention(
    q: Any,
    k: Any,
    v: Any,
    causal: bool = False,
    sm_scale: float | None = None,
    eq: Any = None,
    ek: Any = None,
    score_func_mode: int = 0,
) -> Any:
    """Attention under masks that are a function of a number per query and a number per key.

    Args:
        q: [batch, heads, q_len, head_dim]: torch (differentiable) or NumPy (forward only); float16,
            bfloat16, float32, or float64 on the CPU.
        k: [batch, kv_heads, kv_len, head_dim]; heads is a multiple of kv_heads.
        v: [batch, kv_heads, kv_len, v_head_dim].
        causal: query i sees keys up to ``i + kv_len - q_len``, in every mode.
        sm_scale: of q k^T; None: ``head_dim ** -0.5``.
        eq: integers [batch or 1, heads or 1, q_len], one a query; expanded views take no memory.
        ek: integers [batch or 1, heads or 1, kv_len], one a key; with `eq` or not at all.
        score_func_mode: 0: `eq` and `ek` are not looked at. 1, documents: query i sees key j iff
            ``eq[i] >= 0 or eq[i] == ek[j]``: queries with a negative id see the keys of that id,
            the others all.

    Returns:
        out [batch, heads, q_len, v_head_dim] of q's type. A query that may see nothing has out 0
        and zero gradients. Tiles that the ids or `causal` rule out are skipped. Gradients are
        reproducible bit by bit on the CPU, and everywhere under
        ``torch.use_deterministic_algorithms(True)``.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    >>> q = k = v = np.ones((1, 2, 4, 8), np.float32)
    >>> ids = np.array([-1, -1, -2, -2]).reshape(1, 1, 4)    # two documents of 2
    >>> am.flexible_attention(q, k, v, causal=True, eq=ids, ek=ids, score_func_mode=1).shape
    (1, 2, 4, 8)

    Source: github.com/zzsfornlp/Triton-Flash-Attention-with-Flexible-Masks.
    """
    sizes = arguments.sizes_of(q, k, v, ("q", "k", "v"), "bhsd")
    causal = arguments.flag(causal, "causal")
    factor = arguments.scale(sm_scale, "sm_scale")
    mode = masks._integer(score_func_mode, "score_func_mode")
    if mode not in (_NONE, _DOCUMENTS):
        raise ValueError(f"score_func_mode: got {mode}, 0 (none) or 1 (documents) is needed")
    for name, one, other in (("eq", eq, ek), ("ek", ek, eq)):
        if one is None and (mode == _DOCUMENTS or other is not None):
            raise ValueError(f"{name}: got None, but score_func_mode is {mode} and eq and ek "
                             "come together")  # fmt: skip
    mask = masks.causal() if causal else None
    if mode == _DOCUMENTS:
        documents = masks.ids(
            _ids(eq, "eq", "q_len", sizes.q_len, sizes, q),
            _ids(ek, "ek", "kv_len", sizes.kv_len, sizes, q),
        )
        mask = documents if mask is None else mask & documents
    return attention(
        q, k, v, mask, scale=factor, layout="bhsd", deterministic=arguments.deterministic(q)
    )


def _ids(ids: Any, name: str, length_name: str, length: int, sizes: arguments.Sizes, q: Any) -> Any:
    """int32 or int64 [batch or 1, heads or 1, length], the same memory where the type allows."""
    arguments.an_array(ids, name)
    wanted = (sizes.batch, sizes.q_heads, length)
    if (
        ids.ndim != 3
        or any(size not in (1, whole) for size, whole in zip(ids.shape[:2], wanted))
        or ids.shape[2] != length
    ):
        raise ValueError(
            f"{name}: got shape {tuple(ids.shape)}, [batch or 1, heads or 1, {length_name}] with "
            f"[batch, heads, {length_name}] = {list(wanted)} is needed"
        )
    arguments.same_device(ids, name, q, "q")
    given = arguments.dtype_name(ids)
    if given in _READ_IN_PLACE:
        return ids
    if given not in _WIDER:
        raise TypeError(f"{name}: got element type {given}, an integer type is needed")
    if isinstance(ids, np.ndarray):
        return ids.astype(_WIDER[given])
    import torch

    return ids.to(getattr(torch, _WIDER[given]))
