"""The PyTorch operators anymask::plan, anymask::forward, anymask::backward and anymask::top_keys.

A mask enters as plain data, integers and tensors (see _nodes.py), so that Dynamo, autograd, fake
tensors and checkpointing treat it like any other argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from anymask import _scores, _tensors
from anymask import _torch_calls as calls
from anymask.masks import Mask
from anymask.plans import Plan, Problem

_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}

_lib = torch.library.Library("anymask", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_lib.define(
    "plan(Tensor[] mask_arrays, SymInt[] mask_spec, SymInt[] sizes, ScalarType dtype, "
    "Device device) -> Tensor",
    tags=_tags,
)
_lib.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor[] mask_arrays, SymInt[] mask_spec, Tensor? plan, "
    "float? scale, bool deterministic, Tensor? key_bias=None, Tensor? bias=None, "
    "Tensor? sink=None, Tensor? seed_offset=None, float dropout_p=0.0, float softcap=0.0) "
    "-> (Tensor, Tensor)",
    tags=_tags,
)
_lib.define(
    "backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor[] mask_arrays, SymInt[] mask_spec, Tensor? plan, float? scale, bool deterministic, "
    "bool[] wanted=[], Tensor? key_bias=None, Tensor? bias=None, Tensor? sink=None, "
    "Tensor? seed_offset=None, float dropout_p=0.0, float softcap=0.0) -> Tensor[]",
    tags=_tags,
)


_lib.define(
    "top_keys(Tensor scores, SymInt keep, SymInt q_len) -> Tensor",
    tags=_tags,
)
_lib.impl("plan", calls.plan, "CompositeExplicitAutograd")
_lib.impl("forward", calls.forward, "CompositeExplicitAutograd")
_lib.impl("backward", calls.backward, "CompositeExplicitAutograd")
_lib.impl("top_keys", calls.top_keys, "CompositeExplicitAutograd")


# ---- fake tensors -------------------------------------------------------------------------------


@torch.library.register_fake("anymask::plan", lib=_lib)
def _plan_fake(mask_arrays, mask_spec, sizes, dtype, device):  # type: ignore[no-untyped-def]
    integers = [*mask_spec, *sizes]
    for array in mask_arrays:
        integers += [*array.shape, *array.stride()]
    if all(type(n) is int for n in integers):
        size = calls.plan_bytes(mask_arrays, mask_spec, sizes, dtype, device)
    else:
        size = torch.library.get_ctx().new_dynamic_size()
    return torch.empty(size, dtype=torch.uint8, device=device)


@torch.library.register_fake("anymask::forward", lib=_lib)
def _forward_fake(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return calls.forward_outputs(q, k, v)


@torch.library.register_fake("anymask::backward", lib=_lib)
def _backward_fake(dout, dlse, q, k, v, *rest):  # type: ignore[no-untyped-def]
    wanted = rest[7] if len(rest) > 7 else ()
    return calls.empty_gradients(q, k, v, wanted, rest[8:])


@torch.library.register_fake("anymask::top_keys", lib=_lib)
def _top_keys_fake(scores, keep, q_len):  # type: ignore[no-untyped-def]
    return scores.new_empty((*scores.shape, 1), dtype=torch.int32)


# ---- autograd -----------------------------------------------------------------------------------


def _alone(q: Tensor, k: Tensor, v: Tensor, options: Sequence[Any] = ()) -> bool:
    """Nobody but autograd watches this call: no tracing mode, torch.func transform or subclass.
    Then the kernels below call the library at once, which saves half of a small call's time."""
    return (
        type(q) is type(k) is type(v) is Tensor
        and not q.is_meta
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and (not options or all(type(option) in _PLAIN for option in options))
    )


_PLAIN = (Tensor, torch.nn.Parameter, type(None), float)
# Arguments of anymask::forward before the score options, of which four are tensors.
_BEFORE_OPTIONS, _OPTION_TENSORS = 8, 4


class _Attention(torch.autograd.Function):
    """The derivative of anymask::forward, under torch.func's transforms too."""

    @staticmethod
    def forward(q, k, v, *rest):  # type: ignore[no-untyped-def]
        if _alone(q, k, v, rest[_BEFORE_OPTIONS - 3 :]):
            return calls.forward(q, k, v, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.anymask.forward(q, k, v, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        q, k, v, mask_arrays, mask_spec, plan, scale, deterministic, *options = inputs
        tensors, numbers = options[:_OPTION_TENSORS], options[_OPTION_TENSORS:]
        ctx.save_for_backward(q, k, v, *output, plan, *tensors, *mask_arrays)
        ctx.settings = mask_spec, scale, deterministic, len(tensors), numbers
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, plan, *arrays = ctx.saved_tensors
        mask_spec, scale, deterministic, count, numbers = ctx.settings
        needed = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(needed)
        # The differentiable options are the first, and None where they are not given.
        options, wanted = (), ()
        if count > 0:
            options = (*arrays[:count], *numbers)
            wanted = needed[_BEFORE_OPTIONS : _BEFORE_OPTIONS + len(_scores.DIFFERENTIABLE)]
        gradients = torch.ops.anymask.backward
        if not torch.is_grad_enabled() and _alone(q, k, v, options):
            gradients = calls.backward
        dq, dk, dv, *others = gradients(
            dout, dlse, q, k, v, out, lse, arrays[count:], mask_spec, plan, scale, deterministic,
            wanted, *options,
        )  # fmt: skip
        if count == 0:
            return dq, dk, dv, None, None, None, None, None
        of_options = [others.pop(0) if one else None for one in wanted]
        missing = len(needed) - _BEFORE_OPTIONS - len(of_options)
        return (dq, dk, dv, None, None, None, None, None, *of_options, *(None,) * missing)


class _Gradient(torch.autograd.Function):
    """anymask::backward, which has no derivative: says so instead of dropping terms."""

    @staticmethod
    def forward(*inputs):  # type: ignore[no-untyped-def]
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(torch.ops.anymask.backward(*inputs))

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
        raise NotImplementedError("anymask.attention: second derivatives are not available")


def _watched() -> bool:
    """Whether anybody records the operators that are called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def _with_autograd(function: type) -> Any:
    # An autograd kernel runs at one level of torch.func's transforms at a time, so the single-level
    # apply is the right one here: Function.apply would start all levels over.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def kernel(*inputs):  # type: ignore[no-untyped-def]
        if not torch.is_grad_enabled() or not any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        ):
            return function.forward(*inputs)  # type: ignore[attr-defined]
        if not torch._C._are_functorch_transforms_active():
            return apply(*inputs)
        with enable_single_level_autograd_function():
            return apply(*inputs)

    return kernel


_differentiable_forward = _with_autograd(_Attention)
_lib.impl("forward", _differentiable_forward, "Autograd")
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
    several = type(results[0])  # a tuple, or a list where the operator has one
    stacked = several(torch.stack(parts) for parts in zip(*results))
    return stacked, several([0] * len(stacked))


@torch.library.register_vmap("anymask::forward", lib=_lib)
def _forward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
    return _slices(torch.ops.anymask.forward, info, in_dims, inputs)


@torch.library.register_vmap("anymask::backward", lib=_lib)
def _backward_vmap(info, in_dims, *inputs):  # type: ignore[no-untyped-def]
    return _slices(torch.ops.anymask.backward, info, in_dims, inputs)


# ---- what attention.py and plans.py call --------------------------------------------------------


def _arrays(mask: Mask) -> list[Tensor]:
    return [_tensor(a) if isinstance(a, np.ndarray) else a for a in mask.arrays]


def _tensor(array: np.ndarray) -> Tensor:
    """The same memory as a torch tensor. torch warns about arrays that are read-only; nothing here
    writes to a mask, so it gets to see them as if they were not."""
    if torch.compiler.is_compiling() or array.flags.writeable:
        return torch.from_numpy(array)
    interface = {**array.__array_interface__, "data": (array.ctypes.data, False)}
    view = np.asarray(type("View", (), {"__array_interface__": interface, "base": array})())
    return torch.from_numpy(view)


def top_keys(scores: Tensor, keep: int, q_len: int) -> Tensor:
    """masks.top_keys for torch."""
    return torch.ops.anymask.top_keys(scores.detach().float(), keep, q_len)


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


def _score_options(
    device: torch.device,
    dropout_p: Any,
    seed: Any,
    key_bias: Any,
    bias: Any,
    softcap: Any,
    sink: Any,
) -> _scores.ScoreOptions:
    """attention's arguments as the operators'."""
    for name, tensor in (("key_bias", key_bias), ("bias", bias), ("sink", sink)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, but q is a torch tensor")
    dropout_p = _scores.number(dropout_p, "dropout_p")
    softcap = _scores.number(softcap, "softcap")
    seed_offset = None if seed is None else _seed_offset(seed, device)
    if dropout_p == 0.0:
        seed_offset = None
    elif seed_offset is None:
        seed_offset = drawn_seed(device)
    return _scores.ScoreOptions(key_bias, bias, sink, seed_offset, dropout_p, softcap)


def drawn_seed(device: torch.device) -> Tensor:
    """A fresh seed and offset from torch's generator of a device, without waiting for it."""
    return torch.randint(2**63 - 1, (2,), device=device)


def _seed_offset(seed: Any, device: torch.device) -> Tensor:
    integer = _scores.checked_seed(seed)
    if integer is not None:
        # Filled rather than copied from the host, which would wait for the device.
        pair = torch.zeros(2, dtype=torch.int64, device=device)
        pair[:1].fill_(integer)
        return pair
    pair = _tensor(seed) if isinstance(seed, np.ndarray) else seed
    if pair.device != device:
        raise TypeError(f"seed: is on {pair.device}; q is on {device}")
    return pair.contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    plan: Plan | None,
    scale: float | None,
    deterministic: bool,
    options: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor]:
    """attention.attention for torch tensors; `options`: the arguments of _score_options, if any."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: got {type(tensor).__name__}; q, k and v must all be torch tensors or all "
                "NumPy arrays"
            )
        calls.four_dimensions(tensor, name)
    q, k, v = _autocast(q, k, v)
    if q.dtype not in _NAMES:
        raise TypeError(f"q: got {q.dtype}, one of {', '.join(_NAMES.values())} is needed")
    scores = _score_options(q.device, *options) if options else ()
    arrays = _arrays(mask)
    # Without the dispatcher where it would come to this anyway: that saves a fifth of a small call.
    at_once = not _watched() and _alone(q, k, v, scores)
    batch, q_len, q_heads, head_dim = q.shape
    sizes = (batch, q_heads, k.shape[2], q_len, k.shape[1], head_dim, v.shape[3])
    if plan is not None:
        plan.check(Problem(*sizes, _NAMES[q.dtype], _device_name(q.device)))
        buffer = plan.buffer
        buffer = torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
    elif torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (scores and any(x is not None and x.requires_grad for x in scores[:3]))
    ):
        # Made here rather than inside forward, so that autograd saves it for backward.
        build = calls.plan if at_once else torch.ops.anymask.plan
        buffer = build(arrays, mask.spec, sizes, q.dtype, q.device)
    else:
        buffer = None
    forward = _differentiable_forward if at_once else torch.ops.anymask.forward
    if not scores:  # unpacking nothing takes time too
        return forward(q, k, v, arrays, mask.spec, buffer, scale, deterministic)
    return forward(q, k, v, arrays, mask.spec, buffer, scale, deterministic, *scores)
