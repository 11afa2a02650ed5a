"""flashmask_attention: FlashMask's call."""

from __future__ import annotations

from typing import Any, Optional, Union

import numpy as np

from anymask import _scores, masks
from anymask.attention import attention
from anymask.compat import _arguments as arguments

BLOCK = 128
_NAMES = ("query", "key", "value")
_Window = Optional[Union[int, "tuple[int, int]"]]


def flashmask_attention(
    query: Any,
    key: Any,
    value: Any,
    startend_row_indices: Any = None,
    *,
    dropout: float = 0.0,
    causal: bool = False,
    window_size: _Window = None,
    return_softmax_lse: bool = False,
    return_seed_offset: bool = False,
    fixed_seed_offset: Any = None,
    rng_name: str = "",
    training: bool = True,
    name: str | None = None,
    softmax_scale: float | None = None,
    block_mask: Any = None,
    learnable_sink: Any = None,
) -> Any:
    """Attention under FlashMask's masks: per key column, runs of rows that may not see it.

    A query sees a key iff all that is given allows it: `startend_row_indices`, `causal`,
    `window_size` and `block_mask`, in any combination.

    Args:
        query: [batch, q_len, q_heads, head_dim]: torch (differentiable) or NumPy (forward only);
            float16, bfloat16, float32, or float64 on the CPU.
        key: [batch, kv_len, kv_heads, head_dim]; q_heads is a multiple of kv_heads.
        value: [batch, kv_len, kv_heads, v_head_dim].
        startend_row_indices: int32 [batch or 1, mask heads, kv_len, n], half-open runs of rows,
            clamped to [0, q_len], in any order, overlapping or not; mask heads is 1, kv_heads,
            q_heads or any other divisor of q_heads. Row i is hidden from a key if, causal,
            n = 1 (LTS): ``i >= LTS``; n = 2 (LTS, LTE): ``LTS <= i < LTE``; not causal,
            n = 2 (LTS, UTE): ``i >= LTS or i < UTE``; n = 4 (LTS, LTE, UTS, UTE):
            ``LTS <= i < LTE or UTS <= i < UTE``.
        dropout: probability of dropping a weight while `training`, to a multiple of 1 / 256.
        causal: query i sees keys up to ``i + kv_len - q_len``; says what the columns of
            `startend_row_indices` mean, too.
        window_size: (left, right), or one number for both: query i sees keys ``i - left`` to
            ``i + right``, i counted from the end as in `causal` when q_len and kv_len differ;
            -1 leaves a side open.
        return_softmax_lse: also return the logarithms of the sums of exponentials.
        return_seed_offset: also return the seed and offset of the dropout.
        fixed_seed_offset: int64 [2] where query is, the seed and offset to use; drawn from torch's
            generator of that device (NumPy's) when not given.
        rng_name: the name of another generator to draw them from: "", as torch has one a device.
            Nothing is drawn without dropout.
        training: False switches dropout off.
        name: not used, as there.
        softmax_scale: of q k^T; None: ``head_dim ** -0.5``.
        block_mask: int32 [batch or 1, mask heads, ceil(q_len / 128), ceil(kv_len / 128)], non-zero
            = keep, with any head_dim, its mask heads independent of those above.
        learnable_sink: [q_heads], of query's type or float32, the logit of one more key that every
            query sees and that has no value; counted in lse. Differentiable.

    Returns:
        out [batch, q_len, q_heads, v_head_dim] of query's type; or a tuple of out, then (if asked)
        lse [batch, q_heads, q_len] float32 (float64 for float64), natural logarithm, then (if
        asked) seed_offset int64 [2]: the one used or given, or zeros where there was none. A query
        that may see nothing has out 0, lse -inf and zero gradients. Gradients are reproducible bit
        by bit on the CPU, and everywhere under ``torch.use_deterministic_algorithms(True)``.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    >>> q = k = v = np.ones((1, 4, 2, 8), np.float32)
    >>> ends = np.array([2, 2, 4, 4], np.int32).reshape(1, 1, 4, 1)    # two documents of 2
    >>> am.flashmask_attention(q, k, v, ends, causal=True, return_softmax_lse=True)[1].shape
    (1, 2, 4)

    Source: FlashMask, arXiv 2410.01359; the signature of paddle.nn.functional.flashmask_attention.
    """
    sizes = arguments.sizes_of(query, key, value, _NAMES, "bshd")
    causal = arguments.flag(causal, "causal")
    training = arguments.flag(training, "training")
    return_softmax_lse = arguments.flag(return_softmax_lse, "return_softmax_lse")
    return_seed_offset = arguments.flag(return_seed_offset, "return_seed_offset")
    factor = arguments.scale(softmax_scale, "softmax_scale")
    _check_names(rng_name, name)
    dropout = _dropout(dropout, training)
    seed_offset = _seed_offset(fixed_seed_offset, query, dropout > 0.0, rng_name)
    mask = _mask(query, sizes, startend_row_indices, causal, window_size, block_mask)
    out, lse = attention(
        query,
        key,
        value,
        mask,
        scale=factor,
        return_lse=True,
        deterministic=arguments.deterministic(query),
        dropout_p=dropout,
        seed=seed_offset if dropout > 0.0 else None,
        sink=learnable_sink,
    )
    results = [out]
    if return_softmax_lse:
        results.append(lse)
    if return_seed_offset:
        results.append(seed_offset)
    return out if len(results) == 1 else tuple(results)


def _mask(
    query: Any, sizes: arguments.Sizes, indices: Any, causal: bool, window: _Window, blocks: Any
) -> masks.Mask | None:
    parts = []
    if indices is not None:
        parts.append(_intervals(indices, causal, sizes, query))
    if window is not None:
        left, right = _window(window)
        parts.append(masks.sliding_window(left, 0 if causal else right))
    elif causal and indices is None:
        parts.append(masks.causal())
    if blocks is not None:
        parts.append(_blocks(blocks, sizes, query))
    mask = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask


def _intervals(indices: Any, causal: bool, sizes: arguments.Sizes, query: Any) -> masks.Mask:
    name = "startend_row_indices"
    columns = (1, 2) if causal else (2, 4)
    wanted = (
        f"[{sizes.batch} or 1, mask heads dividing {sizes.q_heads}, {sizes.kv_len}, n] with n = "
        f"{columns[0]} or {columns[1]} ({'causal' if causal else 'not causal'})"
    )
    _mask_array(indices, name, sizes, query, (sizes.kv_len,), wanted)
    if indices.shape[3] not in columns:
        raise arguments.shape_error(indices, name, wanted)
    return masks.intervals(indices, causal)


def _blocks(blocks: Any, sizes: arguments.Sizes, query: Any) -> masks.Mask:
    lengths = (-(-sizes.q_len // BLOCK), -(-sizes.kv_len // BLOCK))
    wanted = (
        f"[{sizes.batch} or 1, mask heads dividing {sizes.q_heads}, {lengths[0]}, {lengths[1]}], "
        f"one entry for {BLOCK} x {BLOCK} pairs,"
    )
    _mask_array(blocks, "block_mask", sizes, query, lengths, wanted)
    return masks.blocks(blocks, BLOCK)


def _mask_array(
    array: Any, name: str, sizes: arguments.Sizes, query: Any, lengths: tuple, wanted: str
) -> None:
    """int32 [batch or 1, mask heads, *lengths, ...] where query is."""
    arguments.an_array(array, name)
    if arguments.dtype_name(array) != "int32":
        raise TypeError(f"{name}: got element type {arguments.dtype_name(array)}, int32 is needed")
    if array.ndim != 4 or array.shape[0] not in (1, sizes.batch):
        raise arguments.shape_error(array, name, wanted)
    heads = array.shape[1]
    if heads < 1 or sizes.q_heads % heads != 0:
        raise arguments.shape_error(array, name, wanted)
    if tuple(array.shape[2 : 2 + len(lengths)]) != lengths:
        raise arguments.shape_error(array, name, wanted)
    arguments.same_device(array, name, query, "query")


def _window(window: Any) -> tuple[int, int]:
    pair = window if isinstance(window, (tuple, list)) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"window_size: got {window!r}, a number or (left, right) is needed")
    left, right = (masks._integer(size, "window_size") for size in pair)
    if left < -1 or right < -1:
        raise ValueError(
            f"window_size: got {window!r}, sizes of 0 or more are needed, or -1 for an open side"
        )
    return left, right


# ---- dropout ------------------------------------------------------------------------------------


def _dropout(dropout: Any, training: bool) -> float:
    """The probability of dropping a weight in this call."""
    if isinstance(dropout, (bool, str)) or not hasattr(dropout, "__float__"):
        raise TypeError(f"dropout: got {dropout!r}, a number is needed")
    if not 0.0 <= float(dropout) < 1.0:
        raise ValueError(f"dropout: got {dropout!r}, 0 <= dropout < 1 is needed")
    return float(dropout) if training else 0.0


def _seed_offset(fixed: Any, query: Any, needed: bool, rng_name: str) -> Any:
    """The seed and offset: the caller's, drawn where they are needed, else zeros."""
    if fixed is not None:
        arguments.an_array(fixed, "fixed_seed_offset")
        if arguments.dtype_name(fixed) != "int64" or tuple(fixed.shape) != (2,):
            raise TypeError(
                f"fixed_seed_offset: got {arguments.dtype_name(fixed)} {tuple(fixed.shape)}, "
                "int64 of shape (2,) is needed"
            )
        arguments.same_device(fixed, "fixed_seed_offset", query, "query")
        return fixed
    if needed and rng_name:
        raise ValueError(
            f"rng_name: got {rng_name!r}; torch has one generator a device, so '' is needed, or "
            "fixed_seed_offset"
        )
    if isinstance(query, np.ndarray):
        return _scores.drawn_seed() if needed else np.zeros(2, np.int64)
    import torch

    from anymask import torch_op

    if needed:
        return torch_op.drawn_seed(query.device)
    return torch.zeros(2, dtype=torch.int64, device=query.device)


def _check_names(rng_name: Any, name: Any) -> None:
    if not isinstance(rng_name, str):
        raise TypeError(f"rng_name: got {rng_name!r}, a string is needed")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name: got {name!r}, a string or None is needed")
