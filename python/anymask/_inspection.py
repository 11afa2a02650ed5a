"""Looks at a mask's pairs and tiles through the library, on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from anymask import _tensors
from anymask._library import call
from anymask._nodes import infer_sizes
from anymask.masks import Mask

_HEAD_DIM = 64  # any: a mask does not depend on it


class MaskStatistics(NamedTuple):
    """Counts over a mask's own batch entries and heads."""

    pairs: int
    visible_pairs: int
    tiles: int
    all_tiles: int
    some_tiles: int

    @property
    def density(self) -> float:
        """Allowed pairs / pairs."""
        return self.visible_pairs / max(self.pairs, 1)

    @property
    def tile_density(self) -> float:
        """Tiles with an allowed pair / tiles: the share of the work that attention does."""
        return (self.all_tiles + self.some_tiles) / max(self.tiles, 1)


class _Query:
    """One mask with one problem, packed for the library."""

    def __init__(
        self,
        mask: Mask,
        batch: int | None,
        q_heads: int | None,
        q_len: int | None,
        kv_len: int | None,
    ) -> None:
        told = infer_sizes(mask.spec, mask.arrays)
        q_len = told.q_len if q_len is None else q_len
        kv_len = told.kv_len if kv_len is None else kv_len
        if q_len is None and kv_len is None:
            raise ValueError(f"q_len: {mask!r} does not tell its lengths; pass q_len (and kv_len)")
        self.q_len = kv_len if q_len is None else q_len
        self.kv_len = q_len if kv_len is None else kv_len
        batch = told.batch if batch is None else batch
        q_heads = told.q_heads if q_heads is None else q_heads
        sizes = (batch, q_heads, q_heads, self.q_len, self.kv_len, _HEAD_DIM, _HEAD_DIM)
        self.problem = _tensors.pack_problem(sizes, 0, _tensors.CPU, 0)

        # The library reads masks on the CPU here, wherever they live.
        self.torch_device = None
        arrays = mask.arrays
        for array in arrays:
            if _tensors.is_torch(array):
                self.torch_device = array.device
        if self.torch_device is not None and self.torch_device.type != "cpu":
            arrays = tuple(a.cpu() if _tensors.is_torch(a) else a for a in arrays)
        self._arrays = arrays
        self.mask, self._nodes = _tensors.pack_mask(mask.spec, arrays)

        batches, heads = ctypes.c_int64(), ctypes.c_int64()
        call(
            "anymask_mask_shape",
            self.mask,
            self.problem,
            ctypes.byref(batches),
            ctypes.byref(heads),
        )
        self.shape = (batches.value, heads.value)


def to_dense(
    mask: Mask,
    batch: int | None,
    q_heads: int | None,
    q_len: int | None,
    kv_len: int | None,
) -> Any:
    query = _Query(mask, batch, q_heads, q_len, kv_len)
    allowed = np.empty((*query.shape, query.q_len, query.kv_len), np.uint8)
    call(
        "anymask_mask_to_dense", query.mask, query.problem, _tensors.pack_numpy(allowed, "allowed")
    )
    allowed = allowed.view(np.bool_)
    torch = _tensors.torch_module()
    if query.torch_device is not None and torch is not None:
        return torch.from_numpy(allowed).to(query.torch_device)
    return allowed


def statistics(
    mask: Mask,
    batch: int | None,
    q_heads: int | None,
    q_len: int | None,
    kv_len: int | None,
    tile: tuple[int, int],
) -> MaskStatistics:
    query = _Query(mask, batch, q_heads, q_len, kv_len)
    counts = (ctypes.c_int64 * len(MaskStatistics._fields))()
    call("anymask_mask_statistics", query.mask, query.problem, *tile, ctypes.byref(counts))
    return MaskStatistics(*counts)


def tile_classes(
    mask: Mask,
    batch: int | None,
    q_heads: int | None,
    q_len: int | None,
    kv_len: int | None,
    tile: tuple[int, int],
) -> np.ndarray:
    query = _Query(mask, batch, q_heads, q_len, kv_len)
    rows, columns = (-(-n // size) for n, size in zip((query.q_len, query.kv_len), tile))
    classes = np.empty((*query.shape, rows, columns), np.uint8)
    call(
        "anymask_mask_tile_classes",
        query.mask,
        query.problem,
        *tile,
        _tensors.pack_numpy(classes, "classes"),
    )
    return classes


def top_keys(scores: np.ndarray, keep: int, q_len: int) -> np.ndarray:
    """masks.top_keys for NumPy: int32 [batch, heads, kv_len, 1]."""
    scores = scores.astype(np.float32, copy=False)
    ends = np.empty((*scores.shape, 1), np.int32)
    call(
        "anymask_top_keys",
        _tensors.pack_numpy(scores, "scores"),
        keep,
        q_len,
        _tensors.pack_numpy(ends, "ends"),
        None,
        None,
        0,
    )
    return ends


class Intervals(NamedTuple):
    """What `intervals` takes: ``am.intervals(*am.intervals_from_dense(allowed))``."""

    indices: Any
    causal: bool


def intervals_from_dense(allowed: Any, causal: bool | None = None) -> Intervals:
    """Recovers ``startend_row_indices`` from a dense mask.

    Args:
        allowed: bool or integers, non-zero = keep, [q_len, kv_len] or
            [batch or 1, mask heads, q_len, kv_len]; NumPy, or torch on any device.
        causal: True: pairs above the causal diagonal are not looked at, and the result is meant for
            ``causal=True``. None: True if no pair above the diagonal is allowed.

    Returns:
        (indices, causal): int32 [batch, mask heads, kv_len, n] with the fewest columns n that can
        say it; of `allowed`'s kind.

    Raises:
        ValueError: naming the first column whose masked rows need more runs than there are.

    >>> indices, causal = am.intervals_from_dense(np.tril(np.ones((4, 4), bool)))
    >>> indices[0, 0, :, 0], causal
    (array([4, 4, 4, 4], dtype=int32), True)
    """
    is_torch = _tensors.is_torch(allowed)
    dense = allowed.detach().cpu().numpy() if is_torch else np.asarray(allowed)
    if dense.ndim not in (2, 4):
        raise ValueError(
            f"allowed: got shape {dense.shape}, [q_len, kv_len] or "
            "[batch, mask heads, q_len, kv_len] is needed"
        )
    dense = dense if dense.dtype in (np.bool_, np.uint8) else dense != 0
    if dense.ndim == 2:
        dense = dense[None, None]
    batch, heads, q_len, kv_len = dense.shape
    if causal is None:
        above = np.arange(kv_len) > np.arange(q_len)[:, None] + (kv_len - q_len)
        causal = not (dense.astype(bool) & above).any()
    indices = np.empty((batch, heads, kv_len, 4), np.int32)
    columns = ctypes.c_int32()
    call(
        "anymask_intervals_from_dense",
        _tensors.pack_numpy(dense, "allowed"),
        int(causal),
        _tensors.pack_numpy(indices, "indices"),
        ctypes.byref(columns),
    )
    result: Any = np.ascontiguousarray(indices[..., : columns.value])
    if is_torch:
        torch = _tensors.torch_module()
        assert torch is not None
        result = torch.from_numpy(result).to(allowed.device)
    return Intervals(result, bool(causal))
