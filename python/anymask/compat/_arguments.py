"""Checks that these calls share. The library checks too; here errors carry the caller's names, and
shapes are told in the caller's order."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

FLOATS = ("float32", "float16", "bfloat16", "float64")


class Sizes(NamedTuple):
    """The sizes of one call."""

    batch: int
    q_heads: int
    q_len: int
    kv_len: int


def dtype_name(array: Any) -> str:
    """Of NumPy arrays and torch tensors alike: "int32", "bfloat16", ..."""
    return str(array.dtype).split(".")[-1]


def an_array(value: Any, name: str) -> None:
    """TypeError unless `value` is a NumPy array or torch tensor."""
    if not (hasattr(value, "ndim") and hasattr(value, "dtype") and hasattr(value, "shape")):
        raise TypeError(f"{name}: got {type(value).__name__}, a tensor or array is needed")


def same_device(array: Any, name: str, query: Any, query_name: str) -> None:
    """TypeError unless `array` lives where `query` does."""
    here = "cpu" if isinstance(query, np.ndarray) else str(query.device)
    there = "cpu" if isinstance(array, np.ndarray) else str(array.device)
    if there != here:
        raise TypeError(f"{name}: is on {there}; it must be on {here}, where {query_name} is")


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, int, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, True or False is needed")
    return bool(value)


def scale(value: Any, name: str) -> float | None:
    """The factor of q k^T; None stays None."""
    if value is None:
        return None
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {value!r}, a number or None is needed")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, a finite number is needed")
    return number


def sizes_of(q: Any, k: Any, v: Any, names: tuple[str, str, str], layout: str) -> Sizes:
    """Checks q, k and v against each other. `layout` is attention's: "bshd" or "bhsd"."""
    length, heads = (1, 2) if layout == "bshd" else (2, 1)
    axes = ["batch", "", "", "head_dim"]
    axes[length], axes[heads] = "length", "heads"
    for name, tensor in zip(names, (q, k, v)):
        an_array(tensor, name)
        if tensor.ndim != 4:
            shape = tuple(tensor.shape)
            raise ValueError(f"{name}: got shape {shape}, [{', '.join(axes)}] is needed")
        if isinstance(tensor, np.ndarray) != isinstance(q, np.ndarray):
            kind = type(tensor).__name__
            raise TypeError(f"{name}: got {kind}, but {names[0]} is a {type(q).__name__}")
        same_device(tensor, name, q, names[0])
        _element_type(tensor, name, q, names[0])
        _head_dim(tensor, name)
    for name, tensor, other, other_name in (
        (names[1], k, q, names[0]),
        (names[2], v, k, names[1]),
    ):
        same = [("batch", 0)]
        same += [("head_dim", 3)] if tensor is k else [("length", length), ("heads", heads)]
        for what, axis in same:
            if tensor.shape[axis] != other.shape[axis]:
                raise ValueError(
                    f"{name}: got {what} {tensor.shape[axis]} (shape {tuple(tensor.shape)}), "
                    f"{other_name}'s {other.shape[axis]} is needed"
                )
    q_heads, kv_heads = q.shape[heads], k.shape[heads]
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(
            f"{names[1]}: got {kv_heads} heads, a divisor of {names[0]}'s {q_heads} is needed"
        )
    return Sizes(q.shape[0], q_heads, q.shape[length], k.shape[length])


def _element_type(tensor: Any, name: str, q: Any, q_name: str) -> None:
    if dtype_name(tensor) not in FLOATS:
        raise TypeError(
            f"{name}: got element type {dtype_name(tensor)}, one of {', '.join(FLOATS)} is needed"
        )
    if tensor.dtype != q.dtype and not _autocast(q):
        raise TypeError(
            f"{name}: got element type {dtype_name(tensor)}, {q_name}'s {dtype_name(q)} is needed"
        )


def _autocast(q: Any) -> bool:
    """Whether torch will bring tensors of several types to one."""
    if isinstance(q, np.ndarray):
        return False
    import torch

    device = q.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _head_dim(tensor: Any, name: str) -> None:
    head_dim = tensor.shape[3]
    if head_dim % 8 != 0 or not 8 <= head_dim <= 256:
        raise ValueError(f"{name}: got head_dim {head_dim}, a multiple of 8 up to 256 is needed")
    if isinstance(tensor, np.ndarray):
        contiguous = tensor.strides[3] == tensor.itemsize
    else:
        contiguous = tensor.stride(3) == 1
    if not contiguous and 0 not in tensor.shape:
        raise ValueError(f"{name}: its last dimension must be contiguous (call contiguous() on it)")


def shape_error(array: Any, name: str, needed: str) -> ValueError:
    return ValueError(f"{name}: got shape {tuple(array.shape)}, {needed} is needed")


def deterministic(q: Any) -> bool:
    """What torch.use_deterministic_algorithms says; these calls have no argument for it."""
    if isinstance(q, np.ndarray):
        return False
    import torch

    return torch.are_deterministic_algorithms_enabled()
