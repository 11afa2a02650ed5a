"""Calls of the library with torch tensors: plans, the forward and the backward pass.

Plain functions below autograd, the same for the CPU and CUDA; memory for plans and scratch comes
from torch's allocator. torch_op.py makes operators of them.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anymask import _scores, _tensors
from anymask._library import check, library
from anymask._scores import NO_SCORES, ScoreOptions
from anymask._tensors import pack_mask, pack_problem, pack_torch
from anymask.attention import FORWARD_TAIL, NAN
from anymask.plans import ALIGNMENT, aligned_bytes

# The end of anymask_backward_args: as FORWARD_TAIL, then deterministic, reserved
_BACKWARD_TAIL = struct.Struct("@PqdPPq2i")
# Stands for the memory of fake tensors where the library looks at shapes only.
_SOMEWHERE = 4096


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    # torch.cuda.current_stream would make an object of it first.
    return torch._C._cuda_getCurrentRawStream(device.index)


def _problem(q: Tensor, k: Tensor, v: Tensor) -> bytes:
    batch, q_len, q_heads, head_dim = q.shape
    sizes = (batch, q_heads, k.shape[2], q_len, k.shape[1], head_dim, v.shape[3])
    return pack_problem(sizes, _tensors.torch_code(q.dtype, "q"), *_tensors.torch_place(q, "q"))


def _aligned(plan: Tensor) -> Tensor:
    """The plan, moved if something (a saved-tensor hook, say) gave it other memory."""
    if plan.data_ptr() % ALIGNMENT == 0:
        return plan
    return _aligned_bytes(plan.numel(), plan.device).copy_(plan)


def _aligned_bytes(size: int, device: torch.device) -> Tensor:
    if device.type == "cpu":  # torch's own CPU memory is aligned to 64 bytes only
        return torch.from_numpy(aligned_bytes(size))
    return torch.empty(size, dtype=torch.uint8, device=device)


def _bytes_of_plan(mask: bytes, problem: bytes) -> int:
    size = ctypes.c_int64()
    check(library().anymask_plan_bytes(mask, problem, ctypes.byref(size)))
    return size.value


def _build(mask: bytes, problem: bytes, device: torch.device, forward_only: bool = False) -> Tensor:
    buffer = _aligned_bytes(_bytes_of_plan(mask, problem), device)
    build = library().anymask_build_plan
    if forward_only:
        build = library().anymask_build_forward_plan
    check(build(mask, problem, buffer.data_ptr(), buffer.numel(), _stream(device)))
    return buffer


def _scratch(
    mask: bytes,
    problem: bytes,
    device: torch.device,
    deterministic: bool | None,
    scores: tuple[Any, ...],
) -> Tensor:
    """Scratch memory of a CUDA call: the forward pass for deterministic=None, else backward, with
    `scores`: its score options and gradients as _scores packs them, None where there are none."""
    size = ctypes.c_int64()
    result = ctypes.byref(size)
    if deterministic is None:
        check(library().anymask_forward_workspace_bytes(mask, problem, result))
    else:
        check(
            library().anymask_backward_workspace_bytes(
                mask, problem, int(deterministic), *scores, result
            )
        )
    return torch.empty(size.value, dtype=torch.uint8, device=device)


def _tail(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: bytes,
    plan: Tensor | None,
    scale: float | None,
    deterministic: bool | None,
    scores: tuple[Any, ...] = (None, None),
) -> tuple[tuple[Any, ...], Any]:
    """(plan, plan_bytes, scale, stream, workspace, workspace_bytes), and what must stay alive."""
    scale = NAN if scale is None else scale
    if plan is not None:
        plan = _aligned(plan)
    if q.device.type != "cuda":
        if plan is None:
            return (0, 0, scale, 0, 0, 0), None
        return (plan.data_ptr(), plan.numel(), scale, 0, 0, 0), plan
    problem = _problem(q, k, v)
    plan = _build(mask, problem, q.device, deterministic is None) if plan is None else plan
    work = _scratch(mask, problem, q.device, deterministic, scores)
    stream = _stream(q.device)
    values = (plan.data_ptr(), plan.numel(), scale, stream, work.data_ptr(), work.numel())
    return values, (plan, work)


def four_dimensions(tensor: Tensor, name: str) -> None:
    """Raises ValueError for a tensor of another rank."""
    if tensor.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, 4 dimensions are needed")


def plan(
    mask_arrays: list[Tensor],
    mask_spec: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The operator anymask::plan."""
    mask, _nodes = pack_mask(mask_spec, mask_arrays, pack_torch)
    return _build(mask, _planned_problem(sizes, dtype, device), device)


def _planned_problem(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> bytes:
    place = (_tensors.CUDA, device.index) if device.type == "cuda" else (_tensors.CPU, 0)
    return pack_problem(sizes, _tensors.torch_code(dtype, "dtype"), *place)


def plan_bytes(
    mask_arrays: list[Tensor],
    mask_spec: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """The size of what `plan` returns, for tensors without memory."""
    mask, _nodes = pack_mask(mask_spec, mask_arrays, partial(pack_torch, pointer=_SOMEWHERE))
    return _bytes_of_plan(mask, _planned_problem(sizes, dtype, device))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_arrays: list[Tensor],
    mask_spec: Sequence[int],
    plan: Tensor | None,
    scale: float | None,
    deterministic: bool,
    *scores: Any,
) -> tuple[Tensor, Tensor]:
    """The operator anymask::forward; `scores`: the first of ScoreOptions' values, or all."""
    out, lse = forward_outputs(q, k, v)
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    mask, _nodes = pack_mask(mask_spec, mask_arrays, pack_torch)
    tail, _alive = _tail(q, k, v, mask, plan, scale, None)
    options, _options = _pack_options(scores) if scores else (NO_SCORES, None)
    args = b"".join(
        (
            pack_torch(q, "q"),
            pack_torch(k, "k"),
            pack_torch(v, "v"),
            pack_torch(out, "out"),
            pack_torch(lse, "lse"),
            mask,
            options,
            FORWARD_TAIL.pack(*tail),
        )
    )
    check(library().anymask_attention_forward(args))
    return out, lse


def _pack_options(scores: tuple[Any, ...]) -> tuple[bytes, Any]:
    options = ScoreOptions(*scores)
    if options.bias is not None and options.bias.stride(-1) not in (0, 1):
        options = options._replace(bias=options.bias.contiguous())
    pointer, buffer = _scores.pack_options(options, pack_torch)
    return pointer, (buffer, options)


def forward_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for out and lse."""
    four_dimensions(q, "q")
    four_dimensions(k, "k")
    four_dimensions(v, "v")
    batch, q_len, q_heads, _ = q.shape
    out = q.new_empty((batch, q_len, q_heads, v.shape[3]))
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((batch, q_heads, q_len), dtype=lse_type)


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask_arrays: list[Tensor],
    mask_spec: Sequence[int],
    plan: Tensor | None,
    scale: float | None,
    deterministic: bool,
    wanted: Sequence[bool] = (),
    *scores: Any,
) -> list[Tensor]:
    """The operator anymask::backward: dq, dk, dv and the gradients of those of key_bias, bias and
    sink that are wanted."""
    gradients = empty_gradients(q, k, v, wanted, scores)
    dout = torch.zeros_like(out) if dout is None else _loadable(_rows_contiguous(dout))
    q, k, v, out = _loadable(q), _loadable(k), _loadable(v), _loadable(out)
    mask, _nodes = pack_mask(mask_spec, mask_arrays, pack_torch)
    options, _options = _pack_options(scores) if scores else (NO_SCORES, (None, None))
    score_gradients, _gradients = NO_SCORES, None
    if len(gradients) > 3:
        names = [name for name, needed in zip(_scores.DIFFERENTIABLE, wanted) if needed]
        score_gradients, _gradients = _scores.pack_gradients(
            dict(zip(names, gradients[3:])), pack_torch
        )
    tail, _alive = _tail(q, k, v, mask, plan, scale, deterministic, (_options[0], _gradients))
    dlse_view = _tensors.NO_TENSOR
    if dlse is not None:
        dlse = dlse.contiguous()
        dlse_view = pack_torch(dlse, "dlse")
    args = b"".join(
        (
            pack_torch(q, "q"),
            pack_torch(k, "k"),
            pack_torch(v, "v"),
            pack_torch(out, "out"),
            pack_torch(lse, "lse"),
            pack_torch(dout, "dout"),
            dlse_view,
            pack_torch(gradients[0], "dq"),
            pack_torch(gradients[1], "dk"),
            pack_torch(gradients[2], "dv"),
            mask,
            options,
            score_gradients,
            _BACKWARD_TAIL.pack(*tail, deterministic, 0),
        )
    )
    check(library().anymask_attention_backward(args))
    return gradients


def empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, wanted: Sequence[bool] = (), scores: tuple[Any, ...] = ()
) -> list[Tensor]:
    """Memory for dq, dk, dv and the gradients of the score options that are wanted."""
    # empty_like keeps the layout of dense tensors, so that a transposed leaf gets its own back.
    gradients = [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]
    if wanted:
        gradients += [x.new_empty(x.shape) for x, needed in zip(scores, wanted) if needed]
    return gradients


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _loadable(tensor: Tensor) -> Tensor:
    """The tensor, copied if CUDA's copy engine cannot read it: it needs addresses and strides of
    whole 16 bytes, which is 8 elements of the 16-bit types that CUDA calls take."""
    if not tensor.is_cuda:
        return tensor
    *steps, _ = tensor.stride()
    if tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def top_keys(scores: Tensor, keep: int, q_len: int) -> Tensor:
    """The operator anymask::top_keys: int32 [batch, heads, kv_len, 1]."""
    ends = torch.empty((*scores.shape, 1), dtype=torch.int32, device=scores.device)
    packed = pack_torch(scores, "scores")
    size = ctypes.c_int64()
    check(library().anymask_top_keys_workspace_bytes(packed, ctypes.byref(size)))
    work = torch.empty(size.value, dtype=torch.uint8, device=scores.device)
    check(
        library().anymask_top_keys(
            packed,
            keep,
            q_len,
            pack_torch(ends, "ends"),
            _stream(scores.device),
            work.data_ptr(),
            work.numel(),
        )
    )
    return ends
