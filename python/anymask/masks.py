"""Masks: values that say what each query may see, joined by ``&``, ``|`` and ``~``.

    import anymask as am

    mask = am.causal() & am.documents(ids)          # causal inside each document
    mask = am.sliding_window(1024, 1024) | am.prefix_lm(16)

Row `i` is a query, column `j` a key. Masks hold views of the arrays given to their constructors
(NumPy or torch, never copied when they are arrays already) and can be used for any number of heads
and layers. Everything is checked in full when a mask meets a problem: in `attention`, `plan` or
`Mask.to_dense`.
"""

from __future__ import annotations

from typing import Any, Union

import numpy as np

from anymask import _nodes as nodes

_Size = Union[int, tuple[int, int]]


class Mask:
    """What each query may see: an immutable expression of mask kinds.

    Made by the functions of this module and combined with ``&`` (both allow), ``|`` (either allows)
    and ``~`` (the opposite). An expression may have 32 nodes, leaves and operators counted, of
    which `prefix_lm` and causal `intervals` take three.
    """

    spec: tuple[int, ...]
    arrays: tuple[Any, ...]

    def __init__(self, spec: tuple[int, ...], arrays: tuple[Any, ...] = ()) -> None:
        object.__setattr__(self, "spec", spec)
        object.__setattr__(self, "arrays", arrays)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a Mask cannot be changed; make a new one")

    def __reduce__(self) -> Any:
        return Mask, (self.spec, self.arrays)

    def __and__(self, other: Mask) -> Mask:
        return _joined(self, other, nodes.AND)

    def __or__(self, other: Mask) -> Mask:
        return _joined(self, other, nodes.OR)

    def __invert__(self) -> Mask:
        return self.complement()

    def __bool__(self) -> bool:
        raise TypeError("a Mask has no truth value: join masks with &, | and ~, not and, or, not")

    def __repr__(self) -> str:
        return nodes.text_of(self.spec, self.arrays)

    def complement(self) -> Mask:
        """``~mask``, for functions that torch.compile traces: its tracer knows ``&`` and ``|`` of
        objects, but not ``~``."""
        return Mask((*self.spec, nodes.NOT, 0, 0, 0), self.arrays)

    def reordered(self) -> Mask:
        """The same mask, with the hint that its keys are scattered token by token (random eviction,
        dynamic masks).

        The plan then drops keys that nobody sees and brings those with similar first and last rows
        together, so that more tiles are skipped. Results do not change; it costs a gather of k, v.
        """
        return Mask((*self.spec, nodes.REORDERED, 0, 0, 0), self.arrays)

    def to(self, device: Any) -> Mask:
        """The same mask with its arrays as torch tensors on `device`."""
        import torch

        return Mask(self.spec, tuple(torch.as_tensor(a, device=device) for a in self.arrays))

    # The methods below look at the mask's pairs, on the CPU. Sizes that they are not given come
    # from the mask's arrays; kv_len from q_len and q_len from kv_len.

    def to_dense(
        self,
        batch: int | None = None,
        q_heads: int | None = None,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> Any:
        """True where a query may see a key: bool [mask batch, mask heads, q_len, kv_len].

        The first two sizes are what the mask tells apart: 1 where it is the same for all. NumPy, or
        a torch tensor when the mask's arrays are.

        Raises ValueError when the arrays do not fit the sizes, or neither tells a length.

        >>> am.causal().to_dense(q_len=3)[0, 0].astype(int)
        array([[1, 0, 0],
               [1, 1, 0],
               [1, 1, 1]])
        """
        from anymask import _inspection

        return _inspection.to_dense(self, batch, q_heads, q_len, kv_len)

    def density(
        self,
        batch: int | None = None,
        q_heads: int | None = None,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> float:
        """The share of pairs that are allowed, counted exactly, O(1) memory a pair.

        >>> am.causal().density(q_len=4)
        0.625
        """
        return self.statistics(batch, q_heads, q_len, kv_len).density

    def statistics(
        self,
        batch: int | None = None,
        q_heads: int | None = None,
        q_len: int | None = None,
        kv_len: int | None = None,
        *,
        tile: _Size = 128,
    ) -> Any:
        """Pairs and tiles of `tile` rows x columns, counted by class, over the mask's own batch
        entries and heads: a `MaskStatistics`."""
        from anymask import _inspection

        return _inspection.statistics(self, batch, q_heads, q_len, kv_len, _pair("tile", tile))

    def tile_classes(
        self,
        batch: int | None = None,
        q_heads: int | None = None,
        q_len: int | None = None,
        kv_len: int | None = None,
        *,
        tile: _Size = 128,
    ) -> np.ndarray:
        """The class of each tile of `tile` rows x columns: 1 all pairs allowed, 2 none, 3 some.

        Returns uint8 [mask batch, mask heads, ceil(q_len / rows), ceil(kv_len / columns)]. A class
        may say some where the truth is simpler (``a & b`` of two partial tiles), never the reverse.
        """
        from anymask import _inspection

        return _inspection.tile_classes(self, batch, q_heads, q_len, kv_len, _pair("tile", tile))


def _joined(a: Mask, b: Mask, kind: int) -> Mask:
    if not isinstance(b, Mask):
        return NotImplemented
    return Mask(a.spec + b.spec + (kind, 0, 0, 0), a.arrays + b.arrays)


def _array(value: Any, name: str, dtype: Any = None) -> Any:
    """Arrays as they are; lists become NumPy arrays."""
    if hasattr(value, "ndim") and hasattr(value, "dtype"):
        return value
    if isinstance(value, (list, tuple)):
        return np.asarray(value, dtype)
    raise TypeError(f"{name}: got {type(value).__name__}, an array or tensor is needed")


def _integer(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # before anything else: torch.compile may trace symbolic integers
    if isinstance(value, (bool, float, str)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: got {value!r}, an integer is needed")
    return value.__index__()


def _pair(name: str, size: _Size) -> tuple[int, int]:
    rows, columns = size if isinstance(size, tuple) else (size, size)
    rows, columns = _integer(rows, name), _integer(columns, name)
    if rows <= 0 or columns <= 0:
        raise ValueError(f"{name}: got {size}, positive sizes are needed")
    return rows, columns


def _dimensions(array: Any, name: str, what: str, *allowed: int) -> None:
    if array.ndim not in allowed:
        raise ValueError(f"{name}: got shape {tuple(array.shape)}, {what} is needed")


def full() -> Mask:
    """Every query sees every key.

    >>> am.full()
    full()
    """
    return Mask((nodes.FULL, 0, 0, 0))


def causal() -> Mask:
    """Query i sees key j iff ``j <= i + kv_len - q_len``: the last query sees every key.

    >>> am.causal() & am.sliding_window(4, 4)
    causal() & sliding_window(4, right=4)
    """
    return Mask((nodes.CAUSAL, 0, 0, 0))


def sliding_window(left: int, right: int = 0) -> Mask:
    """Query i sees keys ``i' - left .. i' + right`` with ``i' = i + kv_len - q_len``.

    A negative size leaves that side open: ``sliding_window(-1, 0)`` is `causal`.
    """
    return Mask((nodes.SLIDING_WINDOW, _integer(left, "left"), _integer(right, "right"), 0))


def prefix_lm(length: Any) -> Mask:
    """`causal`, and every query sees the first `length` keys.

    Args:
        length: an integer, or an int32 or int64 array [batch] (or [1]) of one length a batch entry.
    """
    if isinstance(length, int) or getattr(length, "ndim", None) == 0:
        return Mask((nodes.PREFIX_LM, _integer(length, "length"), 0, 0))
    lengths = _array(length, "length")
    _dimensions(lengths, "length", "an integer or [batch]", 1)
    return Mask((nodes.PREFIX_LM, 0, 0, 1), (lengths,))


def documents(q_ids: Any = None, kv_ids: Any = None, *, cu_seqlens: Any = None) -> Mask:
    """Query i sees key j iff they belong to the same document. Not causal by itself.

    Args:
        q_ids: int32 or int64 [q_len] or [batch or 1, q_len], the document of each query. Ids need
            not be sorted: equal ids see each other wherever they are.
        kv_ids: the same for the keys; `q_ids` when not given.
        cu_seqlens: instead of ids, int32 [documents + 1], cumulative lengths from 0 of documents
            back to back, the same in every batch entry; what lies beyond the last is a document of
            its own. The name says which of the two you mean.

    >>> am.causal() & am.documents(cu_seqlens=[0, 3, 8])
    causal() & documents(cu_seqlens=<int32 [3]>)
    """
    if (q_ids is None) == (cu_seqlens is None):
        raise ValueError("documents: either ids or cu_seqlens= is needed, and only one of them")
    if cu_seqlens is not None:
        if kv_ids is not None:
            raise ValueError("kv_ids: goes with q_ids, not with cu_seqlens")
        lengths = _array(cu_seqlens, "cu_seqlens", np.int32)
        _dimensions(lengths, "cu_seqlens", "[documents + 1]", 1)
        return Mask((nodes.CU_DOCUMENTS, 0, 0, 1), (lengths,))
    q_ids = _array(q_ids, "q_ids")
    _dimensions(q_ids, "q_ids", "[q_len] or [batch, q_len]", 1, 2)
    kv_ids = q_ids if kv_ids is None else _array(kv_ids, "kv_ids")
    _dimensions(kv_ids, "kv_ids", "[kv_len] or [batch, kv_len]", 1, 2)
    return Mask((nodes.DOCUMENTS, 0, 0, 2), (q_ids, kv_ids))


def intervals(indices: Any, causal: bool) -> Mask:
    """FlashMask's ``startend_row_indices``: for each key column, the rows that may not see it.

    Args:
        indices: int32 [batch or 1, mask heads, kv_len, n] (or [kv_len, n]), half-open runs of rows,
            clamped to [0, q_len], in any order, overlapping or not.
        causal: whether the causal triangle applies on top, which also says what the columns mean.
            causal, n = 1 (LTS): rows ``i >= LTS`` are masked; n = 2 (LTS, LTE): ``LTS <= i < LTE``.
            Not causal, n = 2 (LTS, UTE): ``i >= LTS or i < UTE``; n = 4 (LTS, LTE, UTS, UTE):
            ``LTS <= i < LTE or UTS <= i < UTE``.

    Source: FlashMask, arXiv 2410.01359.
    """
    indices = _array(indices, "indices", np.int32)
    _dimensions(indices, "indices", "[batch, mask heads, kv_len, n]", 2, 4)
    if indices.ndim == 2:
        indices = indices[None, None]
    return Mask((nodes.INTERVALS, 1 if causal else 0, 0, 1), (indices,))


def blocks(block_mask: Any, block_size: _Size = 128) -> Mask:
    """One entry per block of queries x keys, non-zero = keep.

    Args:
        block_mask: bool or any integer type [batch or 1, mask heads, row blocks, column blocks] (or
            the last two alone), ``ceil(q_len / rows)`` and ``ceil(kv_len / columns)`` blocks.
        block_size: rows and columns of a block, multiples of 16; one number for both.
    """
    rows, columns = _pair("block_size", block_size)
    block_mask = _array(block_mask, "block_mask", np.uint8)
    _dimensions(block_mask, "block_mask", "[batch, mask heads, row blocks, column blocks]", 2, 4)
    if block_mask.ndim == 2:
        block_mask = block_mask[None, None]
    return Mask((nodes.BLOCKS, rows, columns, 1), (block_mask,))


def dense(allowed: Any) -> Mask:
    """One element per pair, non-zero = keep.

    Args:
        allowed: any type, [batch or 1, mask heads, q_len or 1, kv_len or 1] (or the last two
            alone); mask heads is any divisor of the query heads. Dimensions of 1 are broadcast
            without a copy, and strides may be anything: expanded views cost nothing.
    """
    allowed = _array(allowed, "allowed")
    _dimensions(allowed, "allowed", "[q_len, kv_len] or [batch, mask heads, q_len, kv_len]", 2, 4)
    if allowed.ndim == 2:
        allowed = allowed[None, None]
    return Mask((nodes.DENSE, 0, 0, 1), (allowed,))


def ids(eq: Any, ek: Any) -> Mask:
    """Query i sees key j iff ``eq[i] >= 0 or eq[i] == ek[j]``.

    Args:
        eq: int32 or int64 [batch or 1, mask heads, q_len] (or [q_len]).
        ek: the same for the keys, [batch or 1, mask heads, kv_len] (or [kv_len]).
    """
    eq, ek = _array(eq, "eq"), _array(ek, "ek")
    _dimensions(eq, "eq", "[batch, mask heads, q_len]", 1, 3)
    _dimensions(ek, "ek", "[batch, mask heads, kv_len]", 1, 3)
    eq = eq[None, None] if eq.ndim == 1 else eq
    ek = ek[None, None] if ek.ndim == 1 else ek
    return Mask((nodes.IDS, 0, 0, 2), (eq, ek))


def top_keys(scores: Any, keep: int, q_len: int | None = None) -> Mask:
    """A dynamic mask: each query keeps its `keep` best-scored keys among those before it.

    Causal (bottom-right). Ties go to the lower index, NaN below everything; selected in float32.
    The selection is a constant: no gradient flows to the scores. Once `keep` better keys exist, a
    key never comes back, so the whole mask is one integer a key.

    Args:
        scores: [batch, heads, kv_len], of any floating type; heads is any divisor of the query
            heads. Selected where they live, on a GPU without host synchronisation.
        keep: how many keys a query sees at most.
        q_len: queries; as many as keys by default.

    >>> am.top_keys(np.array([[[3.0, 1.0, 2.0]]]), keep=1).to_dense()[0, 0].astype(int)
    array([[1, 0, 0],
           [1, 0, 0],
           [1, 0, 0]])
    """
    scores = _array(scores, "scores")
    _dimensions(scores, "scores", "[batch, heads, kv_len]", 3)
    keep = _integer(keep, "keep")
    q_len = scores.shape[2] if q_len is None else _integer(q_len, "q_len")
    if isinstance(scores, np.ndarray):
        from anymask import _inspection

        ends = _inspection.top_keys(scores, keep, q_len)
    else:
        from anymask import torch_op

        ends = torch_op.top_keys(scores, keep, q_len)
    return intervals(ends, causal=True).reordered()
