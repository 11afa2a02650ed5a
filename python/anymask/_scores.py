"""The score options of a call: what attention's arguments become, and their C structures."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from anymask import _tensors

# Pointers to anymask_score_options and anymask_score_gradients where there are none.
NO_SCORES = bytes(8)
_POINTER = struct.Struct("@P")
_NUMBERS = struct.Struct("@2d")


class ScoreOptions(NamedTuple):
    """In the order of the operators' arguments."""

    key_bias: Any = None
    bias: Any = None
    sink: Any = None
    seed_offset: Any = None
    dropout_p: float = 0.0
    softcap: float = 0.0


# The options that have gradients.
DIFFERENTIABLE = ScoreOptions._fields[:3]


def number(value: Any, name: str) -> float:
    """A real number; its range is the library's to check."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {value!r}, a number is needed")
    return float(value)


def checked_seed(seed: Any) -> int | None:
    """`seed` if it is an integer, None if it is a seed and an offset in an array."""
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: got {seed}, an integer of 64 bits is needed")
        return int(seed)
    if not (hasattr(seed, "dtype") and hasattr(seed, "shape")):
        raise _seed_error(repr(seed))
    dtype = str(seed.dtype).split(".")[-1]
    if dtype != "int64" or tuple(seed.shape) != (2,):
        raise _seed_error(f"{dtype} of shape {tuple(seed.shape)}")
    return None


def _seed_error(got: str) -> TypeError:
    return TypeError(
        f"seed: got {got}, an integer or int64 of shape (2,), a seed and an offset, is needed"
    )


def numpy_options(
    dropout_p: Any, seed: Any, key_bias: Any, bias: Any, softcap: Any, sink: Any
) -> ScoreOptions:
    """A NumPy call's options."""
    for name, array in (("key_bias", key_bias), ("bias", bias), ("sink", sink)):
        if array is not None and not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: got {type(array).__name__}, but q is a NumPy array")
    dropout_p, softcap = number(dropout_p, "dropout_p"), number(softcap, "softcap")
    if bias is not None and bias.ndim and bias.strides[-1] not in (0, bias.itemsize):
        bias = np.ascontiguousarray(bias)
    seed_offset = None if seed is None else _numpy_seed(seed)
    if dropout_p == 0.0:
        seed_offset = None
    elif seed_offset is None:
        seed_offset = drawn_seed()
    return ScoreOptions(key_bias, bias, sink, seed_offset, dropout_p, softcap)


def drawn_seed() -> np.ndarray:
    """A fresh seed and offset from NumPy."""
    return np.random.default_rng().integers(0, 2**63, 2)


def _numpy_seed(seed: Any) -> np.ndarray:
    integer = checked_seed(seed)
    if integer is not None:
        return np.array([integer, 0], np.int64)
    if not isinstance(seed, np.ndarray):
        raise TypeError(f"seed: got {type(seed).__name__}, but q is a NumPy array")
    return np.ascontiguousarray(seed)


def pack_options(options: ScoreOptions, pack: Callable[[Any, str], bytes]) -> tuple[bytes, Any]:
    """A pointer to anymask_score_options, and what must live as long as it is used."""
    parts = [
        _tensors.NO_TENSOR if tensor is None else pack(tensor, name)
        for name, tensor in zip(ScoreOptions._fields, options[:4])
    ]
    parts.append(_NUMBERS.pack(options.softcap, options.dropout_p))
    return _pointer(parts)


def pack_gradients(
    gradients: dict[str, Any], pack: Callable[[Any, str], bytes]
) -> tuple[bytes, Any]:
    """The same for anymask_score_gradients; `gradients`: those that are wanted, by option."""
    return _pointer(
        [
            pack(gradients[name], "d" + name) if name in gradients else _tensors.NO_TENSOR
            for name in DIFFERENTIABLE
        ]
    )


def _pointer(parts: list[bytes]) -> tuple[bytes, Any]:
    structure = b"".join(parts)
    buffer = ctypes.create_string_buffer(structure, len(structure))
    return _POINTER.pack(ctypes.addressof(buffer)), buffer
