"""Other systems' calls, with their names, arguments and meanings, on this library's kernels.

`docs/moving` has a page for each: what changes, and what was wrong there.
"""

from __future__ import annotations

from anymask.compat.custom_masks import flash_attention_custom_mask
from anymask.compat.dynamic_masks import apply_dynamic_mask_attention
from anymask.compat.flashmask import flashmask_attention
from anymask.compat.flexible_masks import flexible_attention

__all__ = [
    "apply_dynamic_mask_attention",
    "flash_attention_custom_mask",
    "flashmask_attention",
    "flexible_attention",
]
