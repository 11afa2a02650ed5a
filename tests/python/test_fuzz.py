"""The fuzzer, for a bounded time."""

from __future__ import annotations

import time

import fuzz_masks


def test_fuzz(intensity):
    assert fuzz_masks.fuzz(12 * intensity, seed=int(time.time())) > 3
