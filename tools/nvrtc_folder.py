"""Prints the folder of Python packages that has NVRTC, the environment's own where none has."""

import sys
import sysconfig
from pathlib import Path

PLACES = ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib")
having = (path for path in sys.path if any((Path(path) / place).is_dir() for place in PLACES))
print(next(having, sysconfig.get_path("purelib")))
