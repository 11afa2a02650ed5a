"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

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


@pytest.mark.parametrize("page", ["scores.md"])
def test_pages(page):
    """The blocks of a page run, one after the other."""
    pytest.importorskip("torch")
    path = Path(__file__).parents[2] / "docs" / page
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S)
    assert blocks
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_public_names_are_documented():
    for name in am.__all__:
        assert (getattr(am, name).__doc__ or "").strip(), name
