"""Views of NumPy arrays and torch tensors, packed as the C ABI's structures.

A structure is a ``bytes`` object laid out as the C compiler would: one ``struct.pack`` is several
times faster than filling a ``ctypes.Structure`` field by field, and a call packs up to ten tensors.
torch is never imported here; it is looked up once some tensor has brought it.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# anymask_tensor: data, (dtype, device_type, device_index, ndim), shape[4], stride[4]
_TENSOR = struct.Struct("@P4i8q")
# anymask_node without its two arrays: (kind, reserved), left, right
_NODE = struct.Struct("@2i2q")
# anymask_problem: seven sizes, (dtype, device_type, device_index, reserved)
_PROBLEM = struct.Struct("@7q4i")
# anymask_mask: nodes, count
_MASK = struct.Struct("@Pq")

NO_TENSOR = bytes(_TENSOR.size)
_NO_TENSORS = [NO_TENSOR * n for n in range(3)]
CPU, CUDA = 0, 1

DTYPE_CODES = {
    "float32": 0,
    "float16": 1,
    "bfloat16": 2,
    "float64": 3,
    "int32": 4,
    "int64": 5,
    "uint8": 6,
    "bool": 6,
    "int8": 7,
    "int16": 8,
}
_SHORT_NAMES = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16"}
_SHORT_NAMES.update({"half": "float16", "bf16": "bfloat16", "f64": "float64", "fp64": "float64"})
_PAD = {n: (1,) * n for n in range(5)}
# Strides of a tensor without elements mean nothing, and frameworks say anything (often 0).
_EMPTY_STRIDES = _PAD

# Element types met so far: their names take a microsecond to find.
_torch_codes: dict[Any, int] = {}
_numpy_codes: dict[np.dtype, int] = {}


def torch_module() -> Any | None:
    """torch if something has imported it, else None."""
    return sys.modules.get("torch")


def is_torch(value: object) -> bool:
    """Whether `value` is a torch tensor; never imports torch."""
    torch = torch_module()
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(dtype: object) -> str:
    """Canonical name of a NumPy dtype, torch dtype or string ("bf16", "float32", ...)."""
    if isinstance(dtype, str):
        name = _SHORT_NAMES.get(dtype, dtype)
    elif type(dtype).__module__ == "torch":
        name = str(dtype).split(".")[-1]
    else:
        name = np.dtype(dtype).name  # type: ignore[call-overload]
    if name not in DTYPE_CODES:
        raise TypeError(f"dtype: got {dtype}, which anymask does not know")
    return name


def torch_code(dtype: Any, name: str) -> int:
    """The C ABI's code of a torch dtype; `name` is the argument to blame."""
    code = _torch_codes.get(dtype)
    if code is None:
        text = str(dtype).split(".")[-1]
        if text not in DTYPE_CODES:
            raise TypeError(f"{name}: got element type {text}, which anymask does not know")
        code = _torch_codes[dtype] = DTYPE_CODES[text]
    return code


def torch_place(tensor: Any, name: str) -> tuple[int, int]:
    """The C ABI's device type and index of a torch tensor. (Two flags: the name of its device takes
    four times as long.)"""
    if tensor.is_cpu:
        return CPU, 0
    if tensor.is_cuda:
        return CUDA, tensor.get_device()
    raise TypeError(f"{name}: got a tensor on {tensor.device}, it must be on the CPU or a CUDA GPU")


def pack_torch(tensor: Any, name: str, pointer: int | None = None) -> bytes:
    """anymask_tensor of a torch tensor (strides in elements, no copy).

    `pointer` stands in for the address of a tensor without memory, where only its shape matters.
    """
    shape = tensor.shape
    ndim = len(shape)
    if ndim > 4 or ndim == 0:
        raise ValueError(f"{name}: got {ndim} dimensions, 1 to 4 are possible")
    address = tensor.data_ptr() if pointer is None else pointer
    device_type, index = torch_place(tensor, name)
    code = torch_code(tensor.dtype, name)
    strides = tensor.stride() if address else _EMPTY_STRIDES[ndim]
    if ndim == 4:
        return _TENSOR.pack(address, code, device_type, index, 4, *shape, *strides)
    pad = _PAD[4 - ndim]
    return _TENSOR.pack(address, code, device_type, index, ndim, *shape, *pad, *strides, *pad)


def _numpy_code(dtype: np.dtype, name: str) -> int:
    code = _numpy_codes.get(dtype)
    if code is None:
        if dtype.name not in DTYPE_CODES or not dtype.isnative:
            raise TypeError(f"{name}: got element type {dtype}, which anymask does not know")
        code = _numpy_codes[dtype] = DTYPE_CODES[dtype.name]
    return code


def pack_numpy(array: np.ndarray, name: str) -> bytes:
    """anymask_tensor of a NumPy array (strides in elements, no copy)."""
    ndim, size = array.ndim, array.itemsize
    code = _numpy_code(array.dtype, name)
    if ndim > 4 or ndim == 0:
        raise ValueError(f"{name}: got {ndim} dimensions, 1 to 4 are possible")
    strides = [stride // size for stride in array.strides] if array.size else _EMPTY_STRIDES[ndim]
    if any(stride % size for stride in array.strides):
        raise ValueError(f"{name}: got strides {array.strides} that split its elements")
    pad = _PAD[4 - ndim]
    return _TENSOR.pack(array.ctypes.data, code, CPU, 0, ndim, *array.shape, *pad, *strides, *pad)


def pack(array: Any, name: str) -> bytes:
    """anymask_tensor of a NumPy array or torch tensor.

    Raises TypeError or ValueError that names the argument when it is neither, or has an element
    type, device, number of dimensions or strides that the library does not take.
    """
    if isinstance(array, np.ndarray):
        return pack_numpy(array, name)
    if is_torch(array):
        return pack_torch(array, name)
    raise TypeError(f"{name}: got {type(array).__name__}, a NumPy array or torch tensor is needed")


def _pack_nodes(
    spec: Sequence[int], arrays: Sequence[Any], pack_array: Callable[[Any, str], bytes]
) -> bytes:
    """The array of anymask_node that a mask's spec (four integers a node) and arrays state."""
    parts = []
    left = iter(arrays)
    for i in range(0, len(spec), 4):
        parts.append(_NODE.pack(spec[i], 0, spec[i + 1], spec[i + 2]))
        count = spec[i + 3]
        for _ in range(count):
            parts.append(pack_array(next(left), "mask"))
        parts.append(_NO_TENSORS[2 - count])
    return b"".join(parts)


def pack_problem(sizes: Sequence[int], dtype: int, device_type: int, index: int) -> bytes:
    """anymask_problem; `sizes`: batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim."""
    return _PROBLEM.pack(*sizes, dtype, device_type, index, 0)


def pack_mask(
    spec: Sequence[int],
    arrays: Sequence[Any],
    pack_array: Callable[[Any, str], bytes] = pack,
) -> tuple[bytes, Any]:
    """anymask_mask and the object that must live as long as it is used.

    pack_array: `pack`, or what does the same for the arrays that there are.
    """
    nodes = _pack_nodes(spec, arrays, pack_array)
    buffer = ctypes.create_string_buffer(nodes, len(nodes))
    return _MASK.pack(ctypes.addressof(buffer), len(spec) // 4), buffer
