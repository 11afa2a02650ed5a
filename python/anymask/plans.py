"""Plans: how a mask falls on tiles, computed once for every layer, forward and backward."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from anymask import _tensors
from anymask._library import call
from anymask.masks import Mask

ALIGNMENT = 256


class Problem(NamedTuple):
    """The sizes, element type and device that a plan is made for."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: str
    device: str


class Plan:
    """A mask, the problem it was planned for and one flat buffer. Made by `plan`."""

    mask: Mask
    problem: Problem
    buffer: Any  # uint8, 256-byte aligned: a torch tensor or a NumPy array

    def __init__(self, mask: Mask, problem: Problem, buffer: Any) -> None:
        self.mask = mask
        self.problem = problem
        self.buffer = buffer

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k}={v!r}" for k, v in self.problem._asdict().items())
        return f"plan({self.mask!r}, {sizes})"

    def check(self, problem: Problem) -> None:
        """Raises ValueError naming each size in which a call differs from this plan."""
        if problem != self.problem:
            differing = [
                f"{name} is {there}, the call has {here}"
                for name, there, here in zip(Problem._fields, self.problem, problem)
                if there != here
            ]
            raise ValueError("plan: made for another problem: " + "; ".join(differing))


def plan(
    mask: Mask | None,
    *,
    batch: int,
    q_heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: Any,
    device: Any = None,
) -> Plan:
    """Plans `mask` for attention of the given sizes; pass the result to `attention`.

    `attention` makes a plan in each call that is not given one. Making it once pays when several
    calls (layers, steps) share mask and sizes. A plan holds what the mask's arrays said when it was
    made: make a new one after changing them.

    Args:
        mask: what each query may see; None is `full`.
        batch, q_heads, kv_heads, q_len, kv_len, head_dim: the sizes of q [batch, q_len, q_heads,
            head_dim] and k [batch, kv_len, kv_heads, head_dim].
        v_head_dim: the last dimension of v; `head_dim` when not given.
        dtype: of q, k and v: a NumPy or torch dtype, or a name such as "float32" or "bf16".
        device: where the call will run; by default where the mask's arrays are.

    Returns:
        A `Plan`, whose buffer is a torch tensor if `dtype` or `device` is torch's or the mask's
        arrays are torch tensors, else a NumPy array.

    Raises:
        ValueError, TypeError: when the mask does not fit the sizes, naming the argument.

    >>> p = am.plan(am.causal(), batch=1, q_heads=8, kv_heads=2, q_len=256, kv_len=256,
    ...             head_dim=64, dtype="float32")
    >>> p.problem.v_head_dim
    64
    """
    from anymask.masks import full

    mask = full() if mask is None else mask
    if not isinstance(mask, Mask):
        raise TypeError(f"mask: got {type(mask).__name__}, an anymask.Mask is needed")
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    sizes = (batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim)
    if _wants_torch(mask, dtype, device):
        from anymask import torch_op

        return torch_op.make_plan(mask, sizes, dtype, device)
    if device not in (None, "cpu"):
        raise TypeError(f"device: got {device!r}; NumPy arrays live on the cpu")
    name = _tensors.dtype_name(dtype)
    buffer = build_numpy(mask, sizes, _tensors.DTYPE_CODES[name])
    return Plan(mask, Problem(*sizes, name, "cpu"), buffer)


def _wants_torch(mask: Mask, dtype: Any, device: Any) -> bool:
    if device is not None and device != "cpu":
        return True
    return any(type(thing).__module__.split(".")[0] == "torch" for thing in (dtype, *mask.arrays))


def aligned_bytes(size: int) -> np.ndarray:
    """Zeros that begin at a multiple of ALIGNMENT: equal plans are equal to the last byte."""
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def pointer_to(buffer: np.ndarray) -> int | None:
    """Address of a plan's buffer; null when the plan is empty (NumPy's is anywhere then)."""
    return buffer.ctypes.data if buffer.size else None


def build_numpy(mask: Mask, sizes: tuple[int, ...], dtype_code: int) -> np.ndarray:
    """A CPU plan in NumPy memory."""
    packed, _nodes = _tensors.pack_mask(mask.spec, mask.arrays)
    problem = _tensors.pack_problem(sizes, dtype_code, _tensors.CPU, 0)
    size = ctypes.c_int64()
    call("anymask_plan_bytes", packed, problem, ctypes.byref(size))
    buffer = aligned_bytes(size.value)
    call("anymask_build_plan", packed, problem, pointer_to(buffer), size.value, None)
    return buffer
