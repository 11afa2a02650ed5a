"""flash_attention_custom_mask: the call of FlashAttention 2 with custom masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from anymask import _tensors, masks
from anymask.attention import attention
from anymask.compat import _arguments as arguments


def flash_attention_custom_mask(
    q: Any, k: Any, v: Any, mask: Any = None, sm_scale: float | None = None
) -> Any:
    """Attention under any dense mask, of any batch and head.

    Args:
        q: [batch, heads, q_len, head_dim]: torch (differentiable) or NumPy (forward only); float16,
            bfloat16, float32, or float64 on the CPU.
        k: [batch, kv_heads, kv_len, head_dim]; heads is a multiple of kv_heads.
        v: [batch, kv_heads, kv_len, v_head_dim].
        mask: of any type, non-zero (NaN too) = keep, broadcastable to [batch, heads, q_len,
            kv_len]; None keeps all. It is read in place, with any strides: expanded views and
            dimensions of 1 take no memory, and it may have more than 2**31 elements. (A type that
            the kernels do not read, such as complex64, is first brought to bool.) No gradient flows
            to it. An additive mask, 0 = keep and -inf = hide, is another thing: pass
            ``additive == 0``.
        sm_scale: of q k^T; None: ``head_dim ** -0.5``.

    Returns:
        out [batch, heads, q_len, v_head_dim] of q's type. A query that may see nothing has out 0
        and zero gradients. Gradients are reproducible bit by bit on the CPU, and everywhere under
        ``torch.use_deterministic_algorithms(True)``.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it needs.

    The mask is read once for forward and backward together. To read it once for several layers,
    plan it: ``plan = am.plan(am.dense(mask), ...)`` and ``am.attention(q, k, v, plan=plan,
    layout="bhsd")``.

    >>> q = k = v = np.ones((1, 2, 4, 8), np.float32)
    >>> am.flash_attention_custom_mask(q, k, v, np.array([1, 1, 0, 1])).shape    # key 2 is padding
    (1, 2, 4, 8)

    Source: github.com/alexzhang13/flashattention2-custom-mask.
    """
    sizes = arguments.sizes_of(q, k, v, ("q", "k", "v"), "bhsd")
    factor = arguments.scale(sm_scale, "sm_scale")
    rule = None if mask is None else masks.dense(_four_dimensions(mask, sizes, q))
    return attention(
        q, k, v, rule, scale=factor, layout="bhsd", deterministic=arguments.deterministic(q)
    )


def _four_dimensions(mask: Any, sizes: arguments.Sizes, q: Any) -> Any:
    """The same memory as [batch or 1, heads or 1, q_len or 1, kv_len or 1], in a type that the
    kernels read."""
    arguments.an_array(mask, "mask")
    full = tuple(sizes)
    trailing = zip(reversed(mask.shape), reversed(full))
    if mask.ndim > 4 or any(size not in (1, whole) for size, whole in trailing):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, one that broadcasts to "
            f"[batch, heads, q_len, kv_len] = {list(full)} is needed"
        )
    arguments.same_device(mask, "mask", q, "q")
    mask = mask[(None,) * (4 - mask.ndim)]
    if arguments.dtype_name(mask) in _tensors.DTYPE_CODES:
        return mask if isinstance(mask, np.ndarray) else mask.detach()
    strides = mask.strides if isinstance(mask, np.ndarray) else mask.stride()
    # Expanded dimensions become 1 again, so that the bools take no more memory than the mask did.
    mask = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    return mask.astype(bool) if isinstance(mask, np.ndarray) else mask.detach().bool()
