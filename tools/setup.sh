#!/usr/bin/env bash
# Everything that `make demo` and `make test` need, on a fresh Debian or Ubuntu machine: system
# packages (only those that are missing), a virtual environment in .venv, the package itself.
#   tools/setup.sh demo|dev
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:?"usage: tools/setup.sh demo|dev"}

need=()
command -v c++ >/dev/null || need+=(g++)
command -v git >/dev/null || need+=(git)
command -v "${PYTHON:-python3}" >/dev/null || need+=(python3)
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || need+=(python3-venv)
if [ "$extra" = dev ] && ! echo '#include <gtest/gtest.h>' | c++ -E -x c++ - >/dev/null 2>&1; then
  need+=(libgtest-dev)
fi
if [ ${#need[@]} -gt 0 ]; then
  echo "==> installing ${need[*]}"
  root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "missing: ${need[*]}; install them first" >&2; exit 1; }
    root=(sudo)
  fi
  "${root[@]}" apt-get update -q
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${need[@]}"
fi

if [ ! -x .venv/bin/python ]; then
  echo "==> creating the virtual environment .venv"
  "${PYTHON:-python3}" -m venv .venv
fi
# Reinstalls when the project's metadata or a C++ source is newer than the last install.
stamp=.venv/anymask-$extra
if [ ! -e "$stamp" ] || [ -n "$(find pyproject.toml CMakeLists.txt src include python -newer "$stamp" -print -quit)" ]; then
  echo "==> installing anymask[$extra] (PyTorch is the large part)"
  # The versions that the figures of this repository were measured with.
  .venv/bin/python -m pip install -q --disable-pip-version-check "torch==${TORCH_VERSION:-2.13.0}"
  .venv/bin/python -m pip install -q --disable-pip-version-check ".[$extra]"
  touch "$stamp"
fi
