"""What a benchmark measures: masks at geometries, alone or in the named suites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from anymask.benchmark_masks import (
    DEFAULT_SAMPLE,
    NAMES,
    SAMPLES,
    WITH_DOCUMENTS,
    BenchmarkMask,
    benchmark_mask,
    random_documents,
)


class Geometry(NamedTuple):
    """The sizes of one call; query and key lengths are equal."""

    length: int
    batch: int
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.kv_heads == self.heads else f"{self.heads}/{self.kv_heads}"
        return f"S={self.length} B={self.batch} H={heads} D={self.head_dim} {self.dtype}"


class Case(NamedTuple):
    """One row of a benchmark: a mask at a geometry."""

    mask: str
    geometry: Geometry
    sample: int = DEFAULT_SAMPLE  # of the paper's layouts, or the seed of random documents
    documents: str = "paper"  # or "random": a layout of its own for each batch entry
    window: int | None = None

    def build(self) -> BenchmarkMask:
        """The mask itself. Raises ValueError for a mask or sample that does not exist."""
        g = self.geometry
        layouts = None
        if self.documents == "random" and self.mask in WITH_DOCUMENTS:
            rng = np.random.default_rng([g.length, g.batch, self.sample])
            layouts = [random_documents(g.length, rng) for _ in range(g.batch)]
        sample = self.sample if self.documents == "paper" else DEFAULT_SAMPLE
        return benchmark_mask(
            self.mask, g.length, sample=sample, documents=layouts, window=self.window
        )


# ---- suites -------------------------------------------------------------------------------------

_TOKENS = 131072  # of a batch, in the paper's and the protocol's geometries
_LENGTHS = (8192, 32768, 131072)


def _protocol(sample: int) -> Iterator[Case]:
    for length in _LENGTHS:
        for mask in NAMES:
            yield Case(mask, Geometry(length, _TOKENS // length), sample)


def _paper(sample: int) -> Iterator[Case]:
    """The paper's kernel tables: hidden size 4096, all five layouts of documents."""
    for head_dim in (64, 128):
        for length in _LENGTHS:
            geometry = Geometry(
                length, _TOKENS // length, 4096 // head_dim, 4096 // head_dim, head_dim
            )
            for mask in NAMES:
                samples = range(1, SAMPLES + 1) if mask in WITH_DOCUMENTS else (sample,)
                yield from (Case(mask, geometry, each) for each in samples)


def _dims(sample: int) -> Iterator[Case]:
    for head_dim, heads in ((64, 64), (256, 16)):
        for mask in NAMES:
            yield Case(mask, Geometry(8192, 4, heads, heads, head_dim), sample)


# Short sequences and grouped heads: mask -> seed of its random documents, drawn so that the allowed
# share is that at which the recorded figures were taken (within 0.006).
_SHORT = (
    (
        Geometry(1024, 32),
        {"full": 0, "causal": 0, "sliding_window": 0, "causal_document": 23, "document": 16,
         "share_question": 20},
    ),
    (
        Geometry(2048, 16),
        {"full": 0, "causal": 0, "sliding_window": 0, "causal_document": 66, "document": 79,
         "share_question": 74},
    ),
    (
        Geometry(8192, 4, 32, 8),
        {"full": 0, "causal": 0, "sliding_window": 0, "causal_document": 50, "document": 89,
         "share_question": 105},
    ),
    (Geometry(2048, 1, 8, 8), {"causal": 0, "causal_document": 84}),
)  # fmt: skip


def _short(sample: int) -> Iterator[Case]:
    for geometry, masks in _SHORT:
        for mask, seed in masks.items():
            window = 128 if geometry.length <= 2048 else None
            yield Case(mask, geometry, seed, "random", window)


# Calls that do not fill a GPU many times over: (length, batch, heads, kv_heads), and the masks.
_SMALL = (
    (
        ((1024, 16, 32, 8), (2048, 4, 32, 8), (3072, 4, 32, 8), (4096, 4, 32, 8), (2048, 8, 16, 8),
         (2048, 4, 64, 8)),
        ("full", "causal", "document", "prefix_lm"),
    ),
    (
        ((2048, 1, 8, 8), (2048, 1, 16, 16), (2048, 1, 24, 24), (2048, 1, 32, 32), (4096, 1, 4, 4),
         (4096, 1, 8, 8), (4096, 1, 12, 12), (8192, 1, 8, 8)),
        ("causal", "causal_document"),
    ),
)  # fmt: skip
_SMALL_DOCUMENTS = 84  # the seed of their random documents


def _small(sample: int) -> Iterator[Case]:
    for geometries, masks in _SMALL:
        for geometry in geometries:
            for mask in masks:
                yield Case(mask, Geometry(*geometry), _SMALL_DOCUMENTS, "random")


_SUITES = {
    "protocol": _protocol, "short": _short, "small": _small, "dims": _dims, "paper": _paper,
}  # fmt: skip
SUITES = tuple(_SUITES)


def suite(
    name: str,
    *,
    masks: Sequence[str] = NAMES,
    lengths: Sequence[int] = (),
    head_dims: Sequence[int] = (),
    sample: int = DEFAULT_SAMPLE,
    dtype: str = "bfloat16",
) -> list[Case]:
    """The cases of a named suite (`SUITES`) with those masks, lengths and head dimensions (empty:
    all of them).

    protocol: twelve masks, 131072 tokens a batch in sequences of 8192, 32768 and 131072, D = 128.
    short: sequences of 1024 and 2048, grouped heads; random documents. small: few items, grouped
    heads at 1024 to 4096; random documents. dims: D = 64 and 256.
    paper: as protocol, D = 64 and 128, documents averaged over the paper's five layouts.
    """
    if name not in _SUITES:
        raise ValueError(f"suite: got {name!r}, one of {', '.join(SUITES)} is needed")
    check_masks(masks)
    return [
        case._replace(geometry=case.geometry._replace(dtype=dtype))
        for case in _SUITES[name](sample)
        if case.mask in masks
        and (not lengths or case.geometry.length in lengths)
        and (not head_dims or case.geometry.head_dim in head_dims)
    ]


def check_masks(masks: Sequence[str]) -> None:
    """Raises ValueError for a name that is not one of the twelve."""
    unknown = [name for name in masks if name not in NAMES]
    if unknown:
        raise ValueError(f"masks: {', '.join(unknown)} unknown; there are {', '.join(NAMES)}")
