"""What this machine and this installation have: for `anymask doctor` and benchmark records."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from importlib import metadata
from typing import Any

from anymask import _library, _tensors
from anymask._library import call


def _text(function: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    call(function, buffer, len(buffer))
    return buffer.value.decode()


def cpu_name() -> str:
    """The processor's name as it tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def instruction_sets() -> list[str]:
    """Those that the CPU backend can use here, plainest first."""
    return _text("anymask_cpu_instruction_sets").split(",")


def instruction_set() -> str:
    """The one in use."""
    return _text("anymask_cpu_instruction_set")


def set_instruction_set(name: str) -> None:
    """Chooses the CPU backend's instruction set; raises ValueError for one not to be had."""
    call("anymask_set_cpu_instruction_set", name.encode())


def threads() -> int:
    """Threads of the CPU backend."""
    count = ctypes.c_int32()
    call("anymask_cpu_threads", ctypes.byref(count))
    return count.value


def set_threads(count: int) -> None:
    """Sets the threads of the CPU backend; 0: one a core."""
    call("anymask_set_cpu_threads", count)


def measure_cpu_peak(dtype: str) -> float:
    """GFLOP/s that the CPU's arithmetic reaches with all threads and data in registers."""
    gflops = ctypes.c_double()
    code = _tensors.DTYPE_CODES[_tensors.dtype_name(dtype)]
    call("anymask_measure_cpu_peak", code, ctypes.byref(gflops))
    return gflops.value


def cuda_report() -> dict[str, Any]:
    """What the CUDA backend found: driver, gpus, compiler, package_cache, user_cache, kernels."""
    size = ctypes.c_int64(1 << 16)
    buffer = ctypes.create_string_buffer(size.value)
    call("anymask_cuda_report", buffer, ctypes.byref(size))
    return json.loads(buffer.value)


def warm_up_cuda(capability: int = 90) -> int:
    """Compiles every kernel for GPUs of a compute capability (90 for 9.0) into the user cache,
    unless a cache has it; returns how many there are. Needs NVRTC, no GPU."""
    kernels = ctypes.c_int32()
    call("anymask_warm_up_cuda", capability, ctypes.byref(kernels))
    return kernels.value


def package_version(name: str) -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """All of it, as plain data."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": threads(),
        "instruction_sets": instruction_sets(),
        "instruction_set": instruction_set(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": package_version("numpy"),
        "torch": package_version("torch"),
        "anymask": _library.version(),
    }
