#!/usr/bin/env bash
# Runs a small set of GPU tests under compute-sanitizer: memory errors, then misuse of barriers.
#   tests/gpu/sanitizer.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
# Every tensor gets memory of its own, so that a step beyond it is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Only anymask's kernels are watched: torch's would take most of the time.
for tool in memcheck synccheck; do
  echo "==> compute-sanitizer --tool $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kernel_substring=anymask_ \
    "$python" -m pytest tests/gpu/test_gpu_sanitizer.py -q -x "$@"
done
