"""Real text that every machine has: the Python standard library's own source, packed.

Each file is a document. Whole documents are packed into sequences, so that no document is cut and a
sequence holds several; a query may see only what comes before it in its own document.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SMALLEST = 64  # bytes; shorter files say nothing
SEPARATOR = 0  # ends each document, fills what is left of a sequence


@dataclass(frozen=True)
class Sequence:
    """`length` bytes and their documents: document i is text[cu_seqlens[i] : cu_seqlens[i + 1]]."""

    text: np.ndarray  # uint8 [length]
    cu_seqlens: np.ndarray  # int32 [documents + 1]
    names: tuple[str, ...]

    @property
    def ids(self) -> np.ndarray:
        """The document of each byte."""
        lengths = np.diff(self.cu_seqlens)
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def read_documents(longest: int, root: Path | None = None) -> list[tuple[str, bytes]]:
    """The standard library's source files of at most `longest` bytes, by name.

    Raises RuntimeError when there are none (a Python without its library's source).
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _LEFT_OUT.intersection(name.parts):
            continue
        try:
            text = path.read_bytes()
        except OSError:
            continue  # a dangling link, a file that only root may read
        if _SMALLEST <= len(text) <= longest:
            documents.append((name.as_posix(), text))
    if not documents:
        raise RuntimeError(
            f"demo: found no Python source file of {_SMALLEST} to {longest} bytes under {root}; "
            "this Python came without its standard library's source"
        )
    return documents


def pack(documents: list[tuple[str, bytes]], length: int, seed: int) -> list[Sequence]:
    """Packs all documents into sequences of `length` bytes, in an order that `seed` decides.

    First fit: a document goes into the first sequence with room for it and its separator.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    bins: list[list[tuple[str, bytes]]] = []
    room: list[int] = []
    for name, text in order:
        need = len(text) + 1
        if need > length:
            raise ValueError(
                f"documents: {name} has {len(text)} bytes, a sequence of {length} holds at most "
                f"{length - 1} and a separator"
            )
        place = next((i for i, free in enumerate(room) if free >= need), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(length)
        bins[place].append((name, text))
        room[place] -= need
    # The last few sequences are the emptiest: they took what fitted nowhere else.
    full = [bin for bin, free in zip(bins, room) if free <= length // 8] or bins[:1]
    return [_join(bin, length) for bin in full]


def _join(documents: list[tuple[str, bytes]], length: int) -> Sequence:
    text = np.full(length, SEPARATOR, np.uint8)
    cu_seqlens = [0]
    for _, content in documents:
        begin = cu_seqlens[-1]
        text[begin : begin + len(content)] = np.frombuffer(content, np.uint8)
        cu_seqlens.append(begin + len(content) + 1)
    if cu_seqlens[-1] < length:  # the empty rest is a document too
        cu_seqlens.append(length)
    return Sequence(text, np.array(cu_seqlens, np.int32), tuple(name for name, _ in documents))
