"""Finds, loads and calls anymask's shared library through its C ABI (include/anymask/anymask.h)."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

_NAME = "libanymask.so"

# C types by letter: p pointer, q int64, i int32, d double, s string.
_TYPES = {
    "p": ctypes.c_void_p,
    "q": ctypes.c_int64,
    "i": ctypes.c_int32,
    "d": ctypes.c_double,
    "s": ctypes.c_char_p,
}

# Arguments of every function that returns a status. Structures travel as packed `bytes`, arrays
# and outputs as pointers (see _tensors.py).
_PROTOTYPES = {
    "anymask_plan_bytes": "ppp",
    "anymask_build_plan": "pppqp",
    "anymask_build_forward_plan": "pppqp",
    "anymask_forward_workspace_bytes": "ppp",
    "anymask_backward_workspace_bytes": "ppippp",
    "anymask_attention_forward": "p",
    "anymask_attention_backward": "p",
    "anymask_mask_shape": "pppp",
    "anymask_mask_statistics": "ppqqp",
    "anymask_mask_to_dense": "ppp",
    "anymask_mask_tile_classes": "ppqqp",
    "anymask_intervals_from_dense": "pipp",
    "anymask_top_keys_workspace_bytes": "pp",
    "anymask_top_keys": "pqqpppq",
    "anymask_cpu_instruction_sets": "sq",
    "anymask_cpu_instruction_set": "sq",
    "anymask_set_cpu_instruction_set": "s",
    "anymask_set_cpu_threads": "i",
    "anymask_cpu_threads": "p",
    "anymask_measure_cpu_peak": "ip",
    "anymask_cuda_report": "pp",
    "anymask_warm_up_cuda": "ip",
    "anymask_add_cuda_library_folder": "s",
    "anymask_set_cuda_package_cache": "s",
}

_EXCEPTIONS = {1: ValueError, 2: TypeError, 3: NotImplementedError, 4: RuntimeError}

_lock = threading.Lock()
_loaded: ctypes.CDLL | None = None


def candidates() -> list[Path]:
    """Where the library is looked for: ``ANYMASK_LIBRARY`` alone if set, else the package."""
    override = os.environ.get("ANYMASK_LIBRARY")
    return [Path(override)] if override else [Path(__file__).with_name(_NAME)]


def library() -> ctypes.CDLL:
    """The shared library, loaded on first use.

    Raises RuntimeError when it is not there or cannot be loaded.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> ctypes.CDLL:
    for path in candidates():
        if not path.exists():
            continue
        try:
            lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise RuntimeError(f"anymask: cannot load {path}: {error}") from error
        lib.anymask_version.restype = ctypes.c_char_p
        lib.anymask_last_error.restype = ctypes.c_char_p
        for name, letters in _PROTOTYPES.items():
            function = getattr(lib, name)
            function.argtypes = [_TYPES[letter] for letter in letters]
            function.restype = ctypes.c_int32
        _prepare_cuda(lib)
        return lib
    looked = ", ".join(str(path) for path in candidates())
    raise RuntimeError(
        f"anymask: {_NAME} was not found; looked at {looked}. Install the package (pip install .) "
        "or build the library with CMake and set ANYMASK_LIBRARY to its path."
    )


def _prepare_cuda(lib: ctypes.CDLL) -> None:
    """Tells the library where pip puts NVRTC, and where the package's own kernels are."""
    folders = {entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))}
    for folder in sorted(folders):
        lib.anymask_add_cuda_library_folder(folder.encode())
    kernels = Path(__file__).with_name("kernels")
    if kernels.is_dir():
        lib.anymask_set_cuda_package_cache(str(kernels).encode())


def path() -> str:
    """The loaded library's path."""
    return library()._name


def version() -> str:
    """The loaded library's version."""
    return library().anymask_version().decode()


def check(status: int) -> None:
    """Raises what a status other than OK means, with the library's own message."""
    if status:
        message = library().anymask_last_error().decode(errors="replace")
        raise _EXCEPTIONS.get(status, RuntimeError)(message)


def call(name: str, *arguments: object) -> None:
    """Calls a function that returns a status; raises ValueError, TypeError,
    NotImplementedError or RuntimeError when it fails."""
    check(getattr(library(), name)(*arguments))
