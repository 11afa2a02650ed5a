"""anymask: flash attention under any mask, on CPUs and NVIDIA GPUs.

import anymask as am

out = am.attention(q, k, v, am.causal() & am.documents(ids))
"""

from __future__ import annotations

from anymask._inspection import Intervals, MaskStatistics, intervals_from_dense
from anymask.attention import attention
from anymask.compat import (
    apply_dynamic_mask_attention,
    flash_attention_custom_mask,
    flashmask_attention,
    flexible_attention,
)
from anymask.masks import (
    Mask,
    blocks,
    causal,
    dense,
    documents,
    full,
    ids,
    intervals,
    prefix_lm,
    sliding_window,
    top_keys,
)
from anymask.plans import Plan, Problem, plan

__all__ = [
    "Intervals",
    "Mask",
    "MaskStatistics",
    "Plan",
    "Problem",
    "apply_dynamic_mask_attention",
    "attention",
    "blocks",
    "causal",
    "dense",
    "documents",
    "flash_attention_custom_mask",
    "flashmask_attention",
    "flexible_attention",
    "full",
    "ids",
    "intervals",
    "intervals_from_dense",
    "plan",
    "prefix_lm",
    "sliding_window",
    "top_keys",
]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from anymask._library import version

        return version()
    raise AttributeError(f"module 'anymask' has no attribute {name!r}")
