"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib

import anymask as am
import numpy as np
import pytest

MODULES = ["attention", "masks", "plans", "benchmark_masks", "_inspection", "drawing"]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"anymask.{name}")
    names = {**vars(module), "am": am, "np": np}
    results = doctest.testmod(module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_public_names_are_documented():
    for name in am.__all__:
        assert (getattr(am, name).__doc__ or "").strip(), name
