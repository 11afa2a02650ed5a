"""Finds the package and its library: what is installed, else this source tree's build."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if importlib.util.find_spec("anymask") is None:
    sys.path.insert(0, str(ROOT / "python"))
if "ANYMASK_LIBRARY" not in os.environ and not list(
    Path(importlib.util.find_spec("anymask").origin).parent.glob("libanymask.*")
):
    built = sorted(ROOT.glob("build/*/libanymask.so"), key=lambda path: path.stat().st_mtime)
    preferred = [path for path in built if path.parent.name == "release"] or built
    if preferred:
        os.environ["ANYMASK_LIBRARY"] = str(preferred[-1])
