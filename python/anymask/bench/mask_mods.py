"""The twelve masks as functions of a pair, in the way that FlexAttention's users write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from anymask.benchmark_masks import GLOBAL_TOKENS, BenchmarkMask

MaskMod = Callable[[Any, Any, Any, Any], Any]  # (batch, head, query, key) -> allowed


def mask_mod(mask: BenchmarkMask, device: Any) -> MaskMod | None:
    """A mask's natural function; None where everything is allowed.

    Of several natural ways the one with the fewest look-ups in tables is taken.
    """
    length, window, name = mask.indices.shape[2], mask.window, mask.name

    def table(values: Sequence[np.ndarray]) -> Callable[[Any, Any], Any]:
        """A look-up by (batch entry, position) in one table, or one a batch entry."""
        rows = torch.from_numpy(np.stack(values)).to(device)
        if len(rows) == 1:
            only = rows[0]
            return lambda b, at: only[at]
        return lambda b, at: rows[b, at]

    def documents() -> Callable[[Any, Any], Any]:
        return table([layout.ids for layout in mask.documents])

    def column(index: int) -> Callable[[Any, Any], Any]:
        return table(list(mask.indices[:, 0, :, index]))

    if name == "full":
        return None
    if name == "causal":
        return lambda b, h, q, k: q >= k
    if name == "sliding_window":
        return lambda b, h, q, k: (q >= k) & (q - k < window)
    if name == "causal_document":
        ids = documents()
        return lambda b, h, q, k: (q >= k) & (ids(b, q) == ids(b, k))
    if name == "document":
        ids = documents()
        return lambda b, h, q, k: ids(b, q) == ids(b, k)
    if name in ("share_question", "random_eviction"):
        end = column(0)
        return lambda b, h, q, k: (q >= k) & (q < end(b, k))
    if name == "global_sliding_window":
        first = GLOBAL_TOKENS
        return lambda b, h, q, k: (
            (q < first) | (k < first) | ((q - k <= window) & (k - q <= window))
        )
    if name == "causal_blockwise":
        ids = documents()
        in_last = table([layout.ids == layout.ids[-1] for layout in mask.documents])
        return lambda b, h, q, k: (q >= k) & ((ids(b, q) == ids(b, k)) | in_last(b, q))
    if name == "prefix_lm":
        prefix = length // 2
        return lambda b, h, q, k: (q >= k) | (k < prefix)
    if name == "prefix_lm_document":
        ids = documents()
        in_prefix = table([
            np.arange(length) < layout.per_token(layout.starts + layout.prefixes)
            for layout in mask.documents
        ])  # fmt: skip
        return lambda b, h, q, k: (ids(b, q) == ids(b, k)) & ((q >= k) | in_prefix(b, k))
    if name == "qk_sparse":
        resumes = column(1)
        return lambda b, h, q, k: (q >= k) & (q >= resumes(b, k))
    raise ValueError(f"mask: got {name!r}, which has no function here")
