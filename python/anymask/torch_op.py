"""The PyTorch operators anymask::plan, anymask::forward and anymask::backward.

A mask enters as plain data, integers and tensors (see _nodes.py), so that Dynamo, autograd, fake
tensors and checkpointing treat it like any other argument. Everything here works the same on the
CPU and on CUDA; memory for plans and scratch comes from torch's allocator.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from anymask import _tensors
from anymask._library import check, library
from anymask._tensors import pack_torch
from anymask.attention import FORWARD_TAIL, NAN
from anymask.masks import Mask
from anymask.plans import ALIGNMENT, Plan, Problem, aligned_bytes

# The end of anymask_backward_args: as FORWARD_TAIL, then deterministic, reserved
_BACKWARD_TAIL = struct.Struct("@PqdPPq2i")
_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}
# Stands for the memory of fake tensors where the library looks at shapes only.
_SOMEWHERE = 4096

_lib = torch.library.Library("anymask", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define(
    "plan(Tensor[] mask_arrays, SymInt[] mask_spec, SymInt[] sizes, ScalarType dtype, "
    "Device device) -> Tensor",
    tags=_tags,
)
_lib.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor[] mask_arrays, SymInt[] mask_spec, Tensor? plan, "
    "float? scale, bool deterministic) -> (Tensor, Tensor)",
    tags=_tags,
)
_lib.define(
    "backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor[] mask_arrays, SymInt[] mask_spec, Tensor? plan, float? scale, bool deterministic) "
    "-> (Tensor, Tensor, Tensor)",
    tags=_tags,
)


# ---- calling the library ------------------------------------------------------------------------


def _place(device: torch.device) -> tuple[int, int]:
    return (_tensors.CUDA, device.index) if device.type == "cuda" else (_tensors.CPU, 0)


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_stream(device).cuda_stream


def _problem(q: Tensor, k: Tensor, v: Tensor) -> bytes:
    batch, q_len, q_heads, head_dim = q.shape
    sizes = (batch, q_heads, k.shape[2], q_len, k.shape[1], head_dim, v.shape[3])
    return _tensors.pack_problem(sizes, _tensors.torch_code(q.dtype, "q"), *_place(q.device))


def _aligned(plan: Tensor) -> Tensor:
    """The plan, moved if something (a saved-tensor hook, say) gave it other memory."""
    if plan.data_ptr() % ALIGNMENT == 0:
        return plan
    return _aligned_bytes(plan.numel(), plan.device).copy_(plan)


def _aligned_bytes(size: int, device: torch.device) -> Tensor:
    if device.type == "cpu":  # torch's own CPU memory is aligned to 64 bytes only
        return torch.from_numpy(aligned_bytes(size))
    return torch.empty(size, dtype=torch.uint8, device=device)


def _plan_bytes(mask: bytes, problem: bytes) -> int:
    size = ctypes.c_int64()
    check(library().anymask_plan_bytes(mask, problem, ctypes.byref(size)))
    return size.value


def _build(mask: bytes, problem: bytes, device: torch.device) -> Tensor:
    buffer = _aligned_bytes(_plan_bytes(mask, problem), device)
    check(
        library().anymask_build_plan(
            mask, problem, buffer.data_ptr(), buffer.numel(), _stream(device)
        )
    )
    return buffer


def _scratch(problem: bytes, device: torch.device, deterministic: bool | None) -> Tensor:
    """Scratch memory of a CUDA call: the forward pass for deterministic=None, else backward."""
    size = ctypes.c_int64()
    if deterministic is None:
        check(library().anymask_forward_workspace_bytes(problem, ctypes.byref(size)))
    else:
        check(
            library().anymask_backward_workspace_bytes(
                problem, int(deterministic), ctypes.byref(size)
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
    plan = _build(mask, problem, q.device) if plan is None else plan
    work = _scratch(problem, q.device, deterministic)
    stream = _stream(q.device)
    values = (plan.data_ptr(), plan.numel(), scale, stream, work.data_ptr(), work.numel())
    return values, (plan, work)


def _four(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, 4 dimensions are needed")


# ---- the operators ------------------------------------------------------------------------------


def _plan(
    mask_arrays: list[Tensor],
    mask_spec: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    mask, _nodes = _tensors.pack_mask(mask_spec, mask_arrays)
    code = _tensors.torch_code(dtype, "dtype")
    return _build(mask, _tensors.pack_problem(sizes, code, *_place(device)), device)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_arrays: list[Tensor],
    mask_spec: Sequence[int],
    plan: Tensor | None,
    scale: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_outputs(q, k, v)
    mask, _nodes = _tensors.pack_mask(mask_spec, mask_arrays)
    tail, _alive = _tail(q, k, v, mask, plan, scale, None)
    args = b"".join(
        (
            pack_torch(q, "q"),
            pack_torch(k, "k"),
            pack_torch(v, "v"),
            pack_torch(out, "out"),
            pack_torch(lse, "lse"),
            mask,
            FORWARD_TAIL.pack(*tail),
        )
    )
    check(library().anymask_attention_forward(args))
    return out, lse


def _forward_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    _four(q, "q")
    _four(k, "k")
    _four(v, "v")
    batch, q_len, q_heads, _ = q.shape
    out = q.new_empty((batch, q_len, q_heads, v.shape[3]))
    lse_type = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((batch, q_heads, q_len), dtype=lse_type)


def _backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _gradients(q, k, v)
    dout = torch.zeros_like(out) if dout is None else _rows_contiguous(dout)
    mask, _nodes = _tensors.pack_mask(mask_spec, mask_arrays)
    tail, _alive = _tail(q, k, v, mask, plan, scale, deterministic)
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
            _BACKWARD_TAIL.pack(*tail, deterministic, 0),
        )
    )
    check(library().anymask_attention_backward(args))
    return gradients


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # empty_like keeps the layout of dense tensors, so that a transposed leaf gets its own back.
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_lib.impl("plan", _plan, "CompositeExplicitAutograd")
_lib.impl("forward", _forward, "CompositeExplicitAutograd")
_lib.impl("backward", _backward, "CompositeExplicitAutograd")


# ---- fake tensors -------------------------------------------------------------------------------


@torch.library.register_fake("anymask::plan", lib=_lib)
def _plan_fake(mask_arrays, mask_spec, sizes, dtype, device):  # type: ignore[no-untyped-def]
    integers = [*mask_spec, *sizes]
    for array in mask_arrays:
        integers += [*array.shape, *array.stride()]
    if all(type(n) is int for n in integers):
        mask, _nodes = _tensors.pack_mask(mask_spec, mask_arrays, _SOMEWHERE)
        code = _tensors.torch_code(dtype, "dtype")
        size = _plan_bytes(mask, _tensors.pack_problem(sizes, code, *_place(device)))
    else:
        size = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(size, dtype=torch.uint8, device=device)


@torch.library.register_fake("anymask::forward", lib=_lib)
def _forward_fake(q, k, v, mask_arrays, mask_spec, plan, scale, deterministic):  # type: ignore
    return _forward_outputs(q, k, v)


@torch.library.register_fake("anymask::backward", lib=_lib)
def _backward_fake(dout, dlse, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return _gradients(q, k, v)


# ---- autograd -----------------------------------------------------------------------------------


def _alone(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Nobody but autograd watches this call: no tracing mode, torch.func transform or subclass.
    Then the kernels below call the library at once, which saves half of a small call's time."""
    return (
        type(q) is type(k) is type(v) is Tensor
        and q.device.type != "meta"
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


class _Attention(torch.autograd.Function):
    """The derivative of anymask::forward, under torch.func's transforms too."""

    @staticmethod
    def forward(q, k, v, *rest):  # type: ignore[no-untyped-def]
        if _alone(q, k, v):
            return _forward(q, k, v, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.anymask.forward(q, k, v, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, mask_arrays, mask_spec, plan, scale, deterministic = inputs
        out, lse = output
        ctx.save_for_backward(q, k, v, out, lse, plan, *mask_arrays)
        ctx.mask_spec = mask_spec
        ctx.scale = scale
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, plan, *mask_arrays = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 8
        gradients = torch.ops.anymask.backward
        if not torch.is_grad_enabled() and _alone(q, k, v):
            gradients = _backward
        return (
            *gradients(
                dout, dlse, q, k, v, out, lse, mask_arrays, ctx.mask_spec, plan, ctx.scale,
                ctx.deterministic,
            ),
            None, None, None, None, None,
        )  # fmt: skip


class _Gradient(torch.autograd.Function):
    """anymask::backward, which has no derivative: says so instead of dropping terms."""

    @staticmethod
    def forward(*inputs):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.anymask.backward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        raise NotImplementedError("anymask.attention: second derivatives are not available")


def _with_autograd(function: type) -> Any:
    # An autograd kernel runs at one level of torch.func's transforms at a time, so the single-level
    # apply is the right one here: Function.apply would start all levels over.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def kernel(*inputs):  # type: ignore[no-untyped-def]
        if not torch.is_grad_enabled() or not any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        ):
            return function.forward(*inputs)  # type: ignore[attr-defined]
        with enable_single_level_autograd_function():
            return apply(*inputs)

    return kernel


_lib.impl("forward", _with_autograd(_Attention), "Autograd")
_lib.impl("backward", _with_autograd(_Gradient), "Autograd")


def _slices(function, info, in_dims, inputs):  # type: ignore[no-untyped-def]
    """vmap by one call a slice: the mask's arrays may be batched too."""

    def slice_of(value, dim, i):  # type: ignore[no-untyped-def]
        if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [slice_of(v, d, i) for v, d in zip(value, dim)]
        return value if dim is None else value.select(dim, i)

    results = [
        function(*(slice_of(value, dim, i) for value, dim in zip(inputs, in_dims)))
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results))
    return stacked, (0,) * len(stacked)


@torch.library.register_vmap("anymask::forward", lib=_lib)
def _forward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
    return _slices(torch.ops.anymask.forward, info, in_dims, inputs)


@torch.library.register_vmap("anymask::backward", lib=_lib)
def _backward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
    return _slices(torch.ops.anymask.backward, info, in_dims, inputs)


# ---- what attention.py and plans.py call --------------------------------------------------------


def _arrays(mask: Mask) -> list[Tensor]:
    return [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in mask.arrays]


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index}"


def make_plan(mask: Mask, sizes: tuple[int, ...], dtype: Any, device: Any) -> Plan:
    """plans.plan for torch."""
    dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, _tensors.dtype_name(dtype))
    if dtype not in _NAMES:
        raise TypeError(f"dtype: got {dtype}, one of {', '.join(_NAMES.values())} is needed")
    if device is None:
        device = next((a.device for a in mask.arrays if isinstance(a, Tensor)), "cpu")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    buffer = torch.ops.anymask.plan(_arrays(mask), mask.spec, sizes, dtype, device)
    return Plan(mask, Problem(*sizes, _NAMES[dtype], _device_name(device)), buffer)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = q.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    plan: Plan | None,
    scale: float | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """attention.attention for torch tensors."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: got {type(tensor).__name__}; q, k and v must all be torch tensors or all "
                "NumPy arrays"
            )
        _four(tensor, name)
    q, k, v = _autocast(q, k, v)
    if q.dtype not in _NAMES:
        raise TypeError(f"q: got {q.dtype}, one of {', '.join(_NAMES.values())} is needed")
    arrays = _arrays(mask)
    batch, q_len, q_heads, head_dim = q.shape
    sizes = (batch, q_heads, k.shape[2], q_len, k.shape[1], head_dim, v.shape[3])
    if plan is not None:
        plan.check(Problem(*sizes, _NAMES[q.dtype], _device_name(q.device)))
        buffer = plan.buffer
        buffer = torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # Made here rather than inside forward, so that autograd saves it for backward.
        buffer = torch.ops.anymask.plan(arrays, mask.spec, sizes, q.dtype, q.device)
    else:
        buffer = None
    return torch.ops.anymask.forward(q, k, v, arrays, mask.spec, buffer, scale, deterministic)
