"""A mask as plain data: its spec, four integers a node in postfix order, and its arrays.

The four integers are kind, left, right (see anymask.h) and how many arrays the node takes from the
mask's tuple of arrays. Plain integers and tensors are what torch.compile, checkpointing and every
other framework can carry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

FULL = 0
CAUSAL = 1
SLIDING_WINDOW = 2
PREFIX_LM = 3
DOCUMENTS = 4
CU_DOCUMENTS = 5
INTERVALS = 6
BLOCKS = 7
DENSE = 8
IDS = 9
NOT = 100
AND = 101
OR = 102
REORDERED = 103


class Node(NamedTuple):
    kind: int
    left: int
    right: int
    arrays: tuple[Any, ...]


def nodes_of(spec: Sequence[int], arrays: Sequence[Any]) -> list[Node]:
    """The nodes in postfix order."""
    nodes = []
    position = 0
    for i in range(0, len(spec), 4):
        end = position + spec[i + 3]
        nodes.append(Node(spec[i], spec[i + 1], spec[i + 2], tuple(arrays[position:end])))
        position = end
    return nodes


# ---- repr -------------------------------------------------------------------------------------

_BINDING = {REORDERED: 5, NOT: 4, AND: 3, OR: 1}  # like Python's own operators


def _array_text(array: Any) -> str:
    dtype = str(array.dtype).split(".")[-1]
    return f"<{dtype} {list(array.shape)}>"


def _leaf_text(node: Node) -> str:
    texts = [_array_text(array) for array in node.arrays]
    if node.kind == FULL:
        return "full()"
    if node.kind == CAUSAL:
        return "causal()"
    if node.kind == SLIDING_WINDOW:
        right = f", right={node.right}" if node.right else ""
        return f"sliding_window({node.left}{right})"
    if node.kind == PREFIX_LM:
        return f"prefix_lm({texts[0] if texts else node.left})"
    if node.kind == DOCUMENTS:
        if node.arrays[0] is node.arrays[1]:
            del texts[1]
        return f"documents({', '.join(texts)})"
    if node.kind == CU_DOCUMENTS:
        return f"documents(cu_seqlens={texts[0]})"
    if node.kind == INTERVALS:
        return f"intervals({texts[0]}, causal={bool(node.left)})"
    if node.kind == BLOCKS:
        if node.left != node.right:
            return f"blocks({texts[0]}, block_size=({node.left}, {node.right}))"
        return f"blocks({texts[0]}, block_size={node.left})"
    if node.kind == DENSE:
        return f"dense({texts[0]})"
    if node.kind == IDS:
        return f"ids({', '.join(texts)})"
    return f"<kind {node.kind}>"


def text_of(spec: Sequence[int], arrays: Sequence[Any]) -> str:
    """The Python expression that makes the mask, arrays by type and shape."""
    stack: list[tuple[str, int]] = []  # (text, how tightly its outermost operator binds)
    for node in nodes_of(spec, arrays):
        binding = _BINDING.get(node.kind, 5)
        if node.kind < NOT:
            stack.append((_leaf_text(node), 5))
        elif node.kind == REORDERED:
            text, inner = stack.pop()
            stack.append((f"{text if inner == 5 else f'({text})'}.reordered()", 5))
        elif node.kind == NOT:
            text, inner = stack.pop()
            stack.append((f"~{text}" if inner >= binding else f"~({text})", binding))
        else:
            (left, left_binding), (right, right_binding) = stack[-2:]
            del stack[-2:]
            left = left if left_binding >= binding else f"({left})"
            right = right if right_binding > binding else f"({right})"
            sign = "&" if node.kind == AND else "|"
            stack.append((f"{left} {sign} {right}", binding))
    return stack[-1][0] if stack else "<empty>"


# ---- what the arrays say about the problem ------------------------------------------------------


class Sizes(NamedTuple):
    """Batch, heads and lengths; None where nothing tells."""

    batch: int | None = None
    q_heads: int | None = None
    q_len: int | None = None
    kv_len: int | None = None


def _leaf_sizes(node: Node) -> Sizes:
    """Sizes that one leaf fixes; 1 for a batch or head dimension that it broadcasts."""
    if not node.arrays:
        return Sizes()
    shapes = [tuple(array.shape) for array in node.arrays]
    first = shapes[0]
    if node.kind == PREFIX_LM:
        return Sizes(batch=first[0])
    if node.kind == DOCUMENTS:
        batch = max([shape[0] for shape in shapes if len(shape) == 2], default=1)
        return Sizes(batch, None, first[-1], shapes[1][-1])
    if node.kind == INTERVALS:
        return Sizes(first[0], first[1], None, first[2])
    if node.kind == BLOCKS:
        return Sizes(first[0], first[1])
    if node.kind == DENSE:
        q_len, kv_len = (size if size != 1 else None for size in first[2:])
        return Sizes(first[0], first[1], q_len, kv_len)
    if node.kind == IDS:
        return Sizes(max(s[0] for s in shapes), max(s[1] for s in shapes), first[2], shapes[1][2])
    return Sizes()


def _common(name: str, values: list[int]) -> int | None:
    distinct = sorted(set(values))
    if len(distinct) > 1:
        raise ValueError(
            f"{name}: the mask's arrays disagree: {', '.join(map(str, distinct))}; pass arrays of "
            "one length"
        )
    return distinct[0] if distinct else None


def infer_sizes(spec: Sequence[int], arrays: Sequence[Any]) -> Sizes:
    """What a mask's arrays say about the problem; raises ValueError where they disagree."""
    leaves = [_leaf_sizes(node) for node in nodes_of(spec, arrays)]
    heads = 1
    for leaf in leaves:
        if leaf.q_heads:
            heads = heads * leaf.q_heads // math.gcd(heads, leaf.q_heads)
    return Sizes(
        _common("batch", [leaf.batch for leaf in leaves if leaf.batch not in (None, 1)]) or 1,
        heads,
        _common("q_len", [leaf.q_len for leaf in leaves if leaf.q_len is not None]),
        _common("kv_len", [leaf.kv_len for leaf in leaves if leaf.kv_len is not None]),
    )
