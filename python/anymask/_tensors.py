"""Views of NumPy arrays and torch tensors, packed as the C ABI's structures.

A structure is a ``bytes`` object laid out as the C compiler would: one ``struct.pack`` is several
times faster than filling a ``ctypes.Structure`` field by field, and a call packs up to ten tensors.
torch is never imported here; it is looked up once some tensor has brought it.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# anymask_tensor: data, (dtype, device_type, device_index, ndim), shape[4], stride[4]
_TENSOR = struct.Struct("@P4i8q")
# anymask_node without its two arrays: (kind, reserved), left, right
_NODE = struct.Struct("@2i2q")
# anymask_problem: seven sizes, (dtype, device_type, device_index, reserved)
_PROBLEM = struct.Struct("@7q4i")

NO_TENSOR = bytes(_TENSOR.size)
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

_torch_codes: dict[Any, int] = {}


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


def pack_torch(tensor: Any, name: str, pointer: int | None = None) -> bytes:
    """anymask_tensor of a torch tensor (strides in elements, no copy).

    `pointer` stands in for the address of a tensor without memory, where only its shape matters.
    """
    address = tensor.data_ptr() if pointer is None else pointer
    shape, ndim = tensor.shape, tensor.dim()
    if ndim > 4 or ndim == 0:
        raise ValueError(f"{name}: got {ndim} dimensions, 1 to 4 are possible")
    device = tensor.device
    if device.type == "cpu":
        device_type, index = CPU, 0
    elif device.type == "cuda":
        device_type, index = CUDA, device.index
    else:
        raise TypeError(f"{name}: got a tensor on {device}, it must be on the CPU or a CUDA GPU")
    code = torch_code(tensor.dtype, name)
    strides = tensor.stride() if address else _EMPTY_STRIDES[ndim]
    if ndim == 4:
        return _TENSOR.pack(address, code, device_type, index, 4, *shape, *strides)
    pad = _PAD[4 - ndim]
    return _TENSOR.pack(address, code, device_type, index, ndim, *shape, *pad, *strides, *pad)


def pack_numpy(array: np.ndarray, name: str) -> bytes:
    """anymask_tensor of a NumPy array (strides in elements, no copy)."""
    ndim, size = array.ndim, array.itemsize
    code = DTYPE_CODES.get(array.dtype.name)
    if code is None or not array.dtype.isnative:
        raise TypeError(f"{name}: got element type {array.dtype}, which anymask does not know")
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


def pack_nodes(spec: Sequence[int], arrays: Sequence[Any], pointer: int | None = None) -> bytes:
    """The array of anymask_node that a mask's spec (four integers a node) and arrays state."""
    parts = []
    position = 0
    for i in range(0, len(spec), 4):
        count = spec[i + 3]
        parts.append(_NODE.pack(spec[i], 0, spec[i + 1], spec[i + 2]))
        for slot in range(2):
            if slot < count:
                array = arrays[position]
                if pointer is None:
                    parts.append(pack(array, "mask"))
                else:
                    parts.append(pack_torch(array, "mask", pointer))
                position += 1
            else:
                parts.append(NO_TENSOR)
    return b"".join(parts)


def pack_problem(sizes: Sequence[int], dtype: int, device_type: int, index: int) -> bytes:
    """anymask_problem; `sizes`: batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim."""
    return _PROBLEM.pack(*sizes, dtype, device_type, index, 0)


_MASK = struct.Struct("@Pq")


def pack_mask(
    spec: Sequence[int], arrays: Sequence[Any], pointer: int | None = None
) -> tuple[bytes, Any]:
    """anymask_mask and the object that must live as long as it is used.

    `pointer` stands for the arrays' memory where only their shapes matter (fake tensors).
    """
    nodes = pack_nodes(spec, arrays, pointer)
    buffer = ctypes.create_string_buffer(nodes, len(nodes))
    return _MASK.pack(ctypes.addressof(buffer), len(spec) // 4), buffer
