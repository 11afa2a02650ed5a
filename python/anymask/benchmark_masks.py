"""The twelve masks of the FlashMask paper's kernel benchmark (arXiv 2410.01359).

Each is given as ``startend_row_indices``, the form in which the paper states it, and, where there
is a natural one, as an expression of other mask kinds that allows the same pairs.

    >>> case = benchmark_mask("causal_document", 8192)
    >>> case.mask
    intervals(<int32 [1, 1, 8192, 1]>, causal=True)
    >>> case.composed
    causal() & documents(<int32 [8192]>)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anymask import masks
from anymask.masks import Mask

_DATA = Path(__file__).with_name("data") / "flashmask_documents.json"
SAMPLES = 5  # layouts of documents a sequence length, counted from 1
DEFAULT_SAMPLE = 3  # the one that tables of a single sample use
GLOBAL_TOKENS = 16
_NEVER = -(2**31) + 1  # an id that nothing else has


class Documents(NamedTuple):
    """Contiguous documents that fill a sequence."""

    lengths: np.ndarray  # int64 [documents]
    prefixes: np.ndarray  # int64 [documents], tokens of each document's prefix
    sparse: np.ndarray  # bool [documents], the documents that qk_sparse drops

    @property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        return self.ends - self.lengths

    @property
    def ids(self) -> np.ndarray:
        """int32 [length]: the document of each position."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    def per_token(self, values: np.ndarray) -> np.ndarray:
        """One value a document -> one a position."""
        return np.repeat(values, self.lengths)


class BenchmarkMask(NamedTuple):
    """One of the twelve masks at one length."""

    name: str
    indices: np.ndarray  # startend_row_indices, int32 [layouts, 1, length, n]
    causal: bool
    composed: Mask | None  # the same mask from other kinds, where that is natural
    documents: tuple[Documents, ...]  # the layouts: one, or one a batch entry
    window: int  # tokens of a sliding window

    @property
    def mask(self) -> Mask:
        """As intervals; random_eviction with the hint that its keys are scattered."""
        mask = masks.intervals(self.indices, self.causal)
        return mask.reordered() if self.name == "random_eviction" else mask

    @property
    def pairs(self) -> int:
        """Allowed pairs of a query and a key, summed over the layouts."""
        length, n = self.indices.shape[2:]
        column = np.clip(self.indices[:, 0].astype(np.int64), 0, length)
        first = np.arange(length) if self.causal else np.zeros(length, np.int64)
        last = np.full_like(column[..., 0], length)
        if self.causal:
            runs = [(column[..., 0], column[..., 1] if n == 2 else last)]
        elif n == 2:
            runs = [(column[..., 0], last), (first, column[..., 1])]
        else:
            runs = [(column[..., 0], column[..., 1]), (column[..., 2], column[..., 3])]
        runs = [(np.maximum(begin, first), end) for begin, end in runs]
        masked = sum(np.maximum(end - begin, 0) for begin, end in runs)
        if len(runs) == 2:
            (a, b), (c, d) = runs
            masked = masked - np.maximum(np.minimum(b, d) - np.maximum(a, c), 0)
        return int((length - first - masked).sum())


@functools.cache
def _samples() -> dict[int, Any]:
    with open(_DATA, encoding="utf-8") as file:
        return {int(length): value for length, value in json.load(file)["samples"].items()}


def paper_documents(length: int, sample: int = DEFAULT_SAMPLE) -> Documents:
    """The paper's documents for a length of 8192, 32768 or 131072; for any other, those of the
    nearest of the three in proportion (documents that shrink to nothing are left out)."""
    known = _samples()
    if not 1 <= sample <= SAMPLES:
        raise ValueError(f"sample: got {sample}, 1 to {SAMPLES} are there")
    nearest = min(known, key=lambda n: abs(np.log(n / max(length, 1))))
    layout = known[nearest][sample - 1]
    lengths = np.array([d["length"] for d in layout["documents"]], np.int64)
    prefixes = np.array([d["prefix"] for d in layout["documents"]], np.int64)
    sparse = np.array(layout["qk_sparse"], bool)
    if nearest != length:
        ends = np.cumsum(lengths) * length // nearest
        lengths, whole = np.diff(ends, prepend=0), lengths
        prefixes = prefixes * lengths // whole
    lengths[-1:] += length - lengths.sum()
    kept = lengths > 0
    return Documents(lengths[kept], prefixes[kept], sparse[kept])


def random_documents(
    length: int, rng: np.random.Generator, least: int = 3, most: int = 7
) -> Documents:
    """`least` to `most` documents, cut anywhere, prefixes of any length, one of them sparse."""
    count = min(int(rng.integers(least, most + 1)), length)
    cuts = np.sort(rng.choice(np.arange(1, length), count - 1, replace=False))
    lengths = np.diff(cuts, prepend=0, append=length)
    sparse = np.arange(count) == rng.integers(count)
    return Documents(lengths, rng.integers(1, lengths + 1), sparse)


# ---- the masks ----------------------------------------------------------------------------------
# j: key columns; each function returns (columns of startend_row_indices, causal, composed).

_Case = tuple  # (list of arrays [length], bool, Mask or None)
_Rng = np.random.Generator


def _full(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    return [np.full_like(j, len(j)), np.zeros_like(j)], False, masks.full()


def _causal(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    return [np.full_like(j, len(j))], True, masks.causal()


def _sliding_window(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    ends = np.minimum(j + window, len(j))
    return [ends], True, masks.sliding_window(window - 1) if window else None


def _causal_document(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    return [docs.per_token(docs.ends)], True, masks.causal() & masks.documents(docs.ids)


def _document(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    columns = [docs.per_token(docs.ends), docs.per_token(docs.starts)]
    return columns, False, masks.documents(docs.ids)


def _share_question(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    # Each document is a question and 2 to 6 answers of about equal length.
    ends = np.empty_like(j)
    parts = np.empty(len(j), np.int32)
    questions = np.full(len(j), _NEVER, np.int32)
    part = 0
    for index, (start, end) in enumerate(zip(docs.starts, docs.ends)):
        answers = int(rng.integers(2, 7))
        cuts = np.linspace(start, end, answers + 2).astype(np.int64)
        for piece, (a, b) in enumerate(zip(cuts[:-1], cuts[1:])):
            ends[a:b] = end if piece == 0 else b
            parts[a:b] = part
            part += 1
        questions[cuts[0] : cuts[1]] = index
    composed = masks.causal() & (masks.documents(parts) | masks.documents(docs.ids, questions))
    return [ends], True, composed


def _global_sliding_window(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    length, first = len(j), min(GLOBAL_TOKENS, len(j))
    lts = np.minimum(j + window + 1, length)
    lte = np.full_like(j, length)
    uts = np.full_like(j, first)
    ute = np.maximum(j - window, first)
    is_global = j < first
    for column in (lts, lte, uts, ute):
        column[is_global] = 0
    # Rows of global tokens see everything (eq >= 0), the others the global columns (-1 == -1).
    eq = np.where(is_global, 0, -1).astype(np.int32)
    ek = np.where(is_global, -1, _NEVER).astype(np.int32)
    return [lts, lte, uts, ute], False, masks.sliding_window(window, window) | masks.ids(eq, ek)


def _causal_blockwise(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    last = docs.starts[-1] if len(docs.lengths) else 0
    lts = docs.per_token(docs.ends)
    lte = np.full_like(j, last)
    lts[last:] = 0
    lte[last:] = 0
    eq = np.where(j >= last, 0, -1 - docs.ids).astype(np.int32)
    ek = (-1 - docs.ids).astype(np.int32)
    return [lts, lte], True, masks.causal() & masks.ids(eq, ek)


def _prefix_lm(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    prefix = len(j) // 2
    return [np.full_like(j, len(j)), np.where(j < prefix, 0, j)], False, masks.prefix_lm(prefix)


def _prefix_lm_document(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    starts = docs.per_token(docs.starts)
    in_prefix = j < starts + docs.per_token(docs.prefixes)
    columns = [docs.per_token(docs.ends), np.where(in_prefix, starts, j)]
    prefix_ids = np.where(in_prefix, docs.ids, _NEVER).astype(np.int32)
    composed = masks.causal() & masks.documents(docs.ids) | masks.documents(docs.ids, prefix_ids)
    return columns, False, composed


def _qk_sparse(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    dropped = docs.per_token(docs.sparse)
    lts = np.where(dropped, j, 0)
    lte = np.where(dropped, docs.per_token(docs.ends), 0)
    dropped_ids = np.where(dropped, docs.ids, _NEVER).astype(np.int32)
    return [lts, lte], True, masks.causal() & ~masks.documents(docs.ids, dropped_ids)


def _random_eviction(j: np.ndarray, docs: Documents, window: int, rng: _Rng) -> _Case:
    # Each row from the middle on evicts one random column before it that is still there.
    length = len(j)
    lts = np.full_like(j, length)
    present = list(range(length // 2))
    draws = rng.random(length)
    for row in range(length // 2, length):
        if present:
            place = int(draws[row] * len(present))
            lts[present[place]] = row
            present[place] = row
        else:
            present.append(row)
    return [lts], True, None


_MASKS: dict[str, Callable[..., _Case]] = {
    "full": _full,
    "causal": _causal,
    "sliding_window": _sliding_window,
    "causal_document": _causal_document,
    "document": _document,
    "share_question": _share_question,
    "global_sliding_window": _global_sliding_window,
    "causal_blockwise": _causal_blockwise,
    "prefix_lm": _prefix_lm,
    "prefix_lm_document": _prefix_lm_document,
    "qk_sparse": _qk_sparse,
    "random_eviction": _random_eviction,
}

NAMES = tuple(_MASKS)
# Those that depend on the layout of documents.
WITH_DOCUMENTS = (
    "causal_document",
    "document",
    "share_question",
    "causal_blockwise",
    "prefix_lm_document",
    "qk_sparse",
)


def benchmark_mask(
    name: str,
    length: int,
    *,
    sample: int = DEFAULT_SAMPLE,
    documents: Documents | Sequence[Documents] | None = None,
    window: int | None = None,
    seed: int = 0,
) -> BenchmarkMask:
    """One of the twelve masks (`NAMES`) for a sequence of `length` tokens.

    Args:
        name: of the mask.
        length: queries and keys.
        sample: which of the paper's five layouts of documents, 1 to 5.
        documents: instead of the paper's, documents that fill `length`; a list: one a batch entry.
        window: tokens of the sliding windows; `length` / 16 when not given.
        seed: of what is random in the mask (answers of share_question, evicted columns).

    Raises:
        ValueError: for an unknown name, or documents that do not fill the length.
    """
    if name not in _MASKS:
        raise ValueError(f"name: got {name!r}, one of {', '.join(NAMES)} is needed")
    if documents is None:
        documents = paper_documents(length, sample)
    layouts = (documents,) if isinstance(documents, Documents) else tuple(documents)
    window = length // 16 if window is None else window
    made = []
    for index, docs in enumerate(layouts):
        if docs.lengths.sum() != length:
            raise ValueError(f"documents: fill {docs.lengths.sum()} tokens, not {length}")
        rng = np.random.default_rng(seed + index)
        made.append(_MASKS[name](np.arange(length), docs, window, rng))
    indices = np.stack([np.stack(columns, axis=-1) for columns, _, _ in made])
    _, causal, composed = made[0]
    composed = composed if len(made) == 1 else None
    return BenchmarkMask(name, indices.astype(np.int32)[:, None], causal, composed, layouts, window)
