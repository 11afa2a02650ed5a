"""The kernels that a package carries: the library finds them by itself, with no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from anymask import _library
from library_under_test import ROOT

_CODE = """
import json, sys
from anymask import _library, machine
if sys.argv[1]:
    _library.library().anymask_set_cuda_package_cache(sys.argv[1].encode())
ready = machine.warm_up_cuda(90)
print(json.dumps({"ready": ready, **machine.cuda_report()}))
"""


def shipped() -> Path | None:
    """The package's own layer, else what the C++ tests made of this source tree, if that is not
    older than the library."""
    library = Path(_library.path())
    own = Path(_library.__file__).with_name("kernels")
    if own.is_dir():
        return own
    made = [path for path in ROOT.glob("build/*/kernels") if any(path.iterdir())]
    newest = max(made, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None or newest.stat().st_mtime < library.stat().st_mtime:
        return None
    return newest


def run(layer: str, cache: Path):
    environment = {
        **os.environ,
        "ANYMASK_NVRTC": "/nowhere/libnvrtc.so",
        "ANYMASK_CACHE_DIR": str(cache),
        "ANYMASK_LIBRARY": _library.path(),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run(
        [sys.executable, "-c", _CODE, layer],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_kernel_is_there_without_a_compiler(tmp_path):
    layer = shipped()
    if layer is None:
        pytest.skip("no kernels: `ctest --preset release -R kernel_check` makes them")
    done = run(str(layer), tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ready"] == found["kernels"] > 0
    assert found["package_cache"]["files"] >= found["kernels"]
    assert "problem" in found["compiler"]
    assert not (tmp_path / "cache").exists()  # nothing was compiled, nothing kept


def test_without_them_the_compiler_is_missed(tmp_path):
    (tmp_path / "empty").mkdir()
    done = run(str(tmp_path / "empty"), tmp_path / "cache")
    assert done.returncode != 0 and "NVRTC" in done.stderr
