"""apply_dynamic_mask_attention: the call of flash dynamic mask attention."""

from __future__ import annotations

from typing import Any

from anymask import _tensors, masks
from anymask.attention import attention
from anymask.compat import _arguments as arguments

_NAMES = ("query", "key", "value")
_SCORES = ("exp", "linear")
# Pairs of a general mask that are ranked at once: its temporaries stay below 200 MiB.
_PAIRS_AT_ONCE = 1 << 24


def apply_dynamic_mask_attention(
    query: Any,
    key: Any,
    value: Any,
    dt_proj: Any,
    A: Any,
    causal_mask: Any = None,
    keep_window_size: int = 2048,
    is_causal: bool = True,
    *,
    scale: float | None = None,
    score: str = "exp",
) -> Any:
    """Attention in which each query keeps the best-scored of the keys that it may see.

    A key's score is ``s = A * softplus(dt_proj v)``, v its values of all heads side by side. Of the
    keys that a query may see it keeps the `keep_window_size` best, equal scores by lower index, and
    attends to them with the logits ``scale * q k + z``, where z is ``exp(s)`` or s.

    Args:
        query: torch [batch, heads, q_len, head_dim]; float16, bfloat16, float32, or float64 on the
            CPU.
        key: [batch, kv_heads, kv_len, head_dim]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, kv_len, v_head_dim].
        dt_proj: [score heads, kv_heads * v_head_dim], of value's type; score heads is kv_heads or
            heads.
        A: [score heads], any floating type.
        causal_mask: [batch or 1, 1, q_len, kv_len], bool with True = keep, or additive with 0 =
            keep; what else is there hides. Better left out where it is just the triangle: only
            without it is memory linear in the lengths.
        keep_window_size: how many keys a query keeps at most.
        is_causal: query i sees keys up to ``i + kv_len - q_len``, and what `causal_mask` keeps of
            them. False: all that `causal_mask` keeps; without one all queries keep the same keys.
        scale: of q k^T; None: ``head_dim ** -0.5``.
        score: "exp": z = exp(s), the published form, which overflows where s > 88; "linear": z = s,
            the later form.

    Returns:
        out [batch, heads, q_len, v_head_dim] of query's type. A query that may see nothing has out
        0 and zero gradients. Gradients flow to query, key, dt_proj, A and, through attention and
        through the scores, to value; the selection itself is a constant. They are reproducible bit
        by bit on the CPU, and everywhere under ``torch.use_deterministic_algorithms(True)``.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    Beyond ``dt_proj v``, which is of value's type, s and z are computed in float64, whatever the
    inputs are; keys are selected by s and logits biased by z in float32 (float64 for float64).

    >>> q, k, v = (torch.ones(1, heads, 6, 8) for heads in (4, 2, 2))
    >>> dt_proj, A = torch.ones(2, 16), torch.ones(2)
    >>> am.apply_dynamic_mask_attention(q, k, v, dt_proj, A, keep_window_size=3).shape
    torch.Size([1, 4, 6, 8])

    Source: Trainable Dynamic Mask Sparse Attention, arXiv 2508.02124;
    github.com/flash-algo/flash-sparse-attention (SmallDoges/flash-dmattn before).
    """
    sizes = arguments.sizes_of(query, key, value, _NAMES, "bhsd")
    if not _tensors.is_torch(query):
        raise TypeError(f"query: got {type(query).__name__}, a torch tensor is needed")
    is_causal = arguments.flag(is_causal, "is_causal")
    factor = arguments.scale(scale, "scale")
    keep = masks._integer(keep_window_size, "keep_window_size")
    if keep < 0:
        raise ValueError(f"keep_window_size: got {keep}, 0 or more is needed")
    if score not in _SCORES:
        raise ValueError(f"score: got {score!r}, 'exp' or 'linear' is needed")
    _check_parameters(dt_proj, A, query, value)
    if causal_mask is not None:
        _check_mask(causal_mask, query, sizes)
    scores = _scores(value, dt_proj, A)
    ranking = scores.detach().float()
    if causal_mask is None:
        mask = _linear_mask(ranking, keep, is_causal, sizes)
    else:
        mask = masks.dense(_kept(ranking, causal_mask, keep, is_causal, sizes))
    bias = scores.exp() if score == "exp" else scores
    return attention(
        query,
        key,
        value,
        mask,
        scale=factor,
        layout="bhsd",
        key_bias=bias if arguments.dtype_name(query) == "float64" else bias.float(),
        deterministic=arguments.deterministic(query),
    )


def _scores(value: Any, dt_proj: Any, A: Any) -> Any:
    """s: float64 [batch, score heads, kv_len]. In float32, torch's softplus may differ in its last
    bit between one place of an array and another, and keys of equal dt would no longer tie."""
    from torch.nn.functional import softplus

    batch, heads, length, dim = value.shape
    dt = dt_proj @ value.transpose(1, 2).reshape(batch, length, heads * dim).transpose(1, 2)
    return A[:, None] * softplus(dt.double())


def _linear_mask(
    scores: Any, keep: int, is_causal: bool, sizes: arguments.Sizes
) -> masks.Mask | None:
    """The mask without a mask of the caller's: an integer or two a key."""
    if keep >= sizes.kv_len:
        return masks.causal() if is_causal else None
    if is_causal:
        return masks.top_keys(scores, keep, sizes.q_len)
    import torch

    from anymask import torch_op

    # A single query sees all keys: its mask is 1 where a key is kept and 0 where it is not.
    kept = torch_op.top_keys(scores, keep, 1)
    rows = torch.cat([kept * sizes.q_len, torch.zeros_like(kept)], dim=-1)
    return masks.intervals(rows, causal=False).reordered()


def _kept(scores: Any, causal_mask: Any, keep: int, is_causal: bool, sizes: arguments.Sizes) -> Any:
    """bool [batch, score heads, q_len, kv_len]: the best of the keys that each query may see."""
    import torch

    visible = causal_mask if causal_mask.dtype == torch.bool else causal_mask == 0
    if is_causal:
        triangle = torch.ones(sizes.q_len, sizes.kv_len, dtype=torch.bool, device=visible.device)
        visible = visible & triangle.tril_(sizes.kv_len - sizes.q_len)
    if keep >= sizes.kv_len:
        return visible
    ranked = scores.masked_fill(scores.isnan(), float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)[:, :, None]
    kept = visible.new_empty((*scores.shape[:2], sizes.q_len, sizes.kv_len))
    rows = max(1, _PAIRS_AT_ONCE // max(1, scores.numel()))
    for first in range(0, sizes.q_len, rows):
        part = kept[:, :, first : first + rows]
        places = order.expand(part.shape)
        best = visible[:, :, first : first + rows].expand(part.shape).gather(-1, places)
        best &= best.cumsum(-1, dtype=torch.int32) <= keep
        part.scatter_(-1, places, best)
    return kept


# ---- checks -------------------------------------------------------------------------------------


def _check_parameters(dt_proj: Any, A: Any, query: Any, value: Any) -> None:
    q_heads, kv_heads, dim = query.shape[1], value.shape[1], value.shape[3]
    for name, tensor in (("dt_proj", dt_proj), ("A", A)):
        if not _tensors.is_torch(tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, a torch tensor is needed")
        if not tensor.dtype.is_floating_point:
            raise TypeError(
                f"{name}: got element type {arguments.dtype_name(tensor)}, a floating type is "
                "needed"
            )
        arguments.same_device(tensor, name, query, "query")
    arguments._element_type(dt_proj, "dt_proj", value, "value")
    heads = dt_proj.shape[0] if dt_proj.ndim == 2 else 0
    if heads not in (kv_heads, q_heads) or dt_proj.shape[1] != kv_heads * dim:
        raise arguments.shape_error(
            dt_proj,
            "dt_proj",
            f"[score heads, kv_heads * v_head_dim] = [{kv_heads} or {q_heads}, {kv_heads * dim}]",
        )
    if tuple(A.shape) != (heads,):
        raise arguments.shape_error(A, "A", f"[score heads] = [{heads}], as dt_proj has,")


def _check_mask(mask: Any, query: Any, sizes: arguments.Sizes) -> None:
    if not _tensors.is_torch(mask):
        raise TypeError(f"causal_mask: got {type(mask).__name__}, a torch tensor is needed")
    arguments.same_device(mask, "causal_mask", query, "query")
    lengths = (1, sizes.q_len, sizes.kv_len)
    if mask.ndim != 4 or mask.shape[0] not in (1, sizes.batch) or tuple(mask.shape[1:]) != lengths:
        raise arguments.shape_error(
            mask, "causal_mask", f"[{sizes.batch} or 1, 1, {sizes.q_len}, {sizes.kv_len}]"
        )
