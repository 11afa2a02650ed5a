"""Tests that need a Hopper GPU. Without one they are skipped as a whole.

ANYMASK_TEST_DEVICE=cpu runs all of them that CUDA is not the subject of on the CPU instead, at
smaller sizes: that checks the tests themselves.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

# Masks, references and comparisons are those of the CPU tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import library_under_test  # noqa: F401

pytest.importorskip("torch")
import torch
from problem import ON_GPU


@functools.cache
def missing():
    """What these tests need and this machine lacks; None when they can run."""
    if not ON_GPU:
        return None
    if not torch.cuda.is_available():
        return "the GPU tests need an NVIDIA Hopper GPU: torch finds no CUDA GPU"
    found = torch.cuda.get_device_capability()
    if found != (9, 0):
        name = torch.cuda.get_device_name()
        return f"the GPU tests need an NVIDIA Hopper GPU: this is {name}, capability {found}"
    return None


def pytest_configure(config):
    config.addinivalue_line("markers", "gibibytes(n): GPU memory that a test takes")
    config.addinivalue_line("markers", "cuda: CUDA itself is tested; nothing of it runs on the CPU")
    if missing():
        config.option.reportchars = "fE"  # one message for all that is skipped, below


def pytest_terminal_summary(terminalreporter):
    if missing():
        terminalreporter.write_line(f"skipped as a whole: {missing()}")


@pytest.fixture(scope="session", autouse=True)
def one_thread_of_torch():
    """As in the CPU tests: waking torch's threads costs more than they do."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh(request):
    """The same random numbers whatever ran before; no memory kept for what comes after."""
    if missing():
        pytest.skip(missing())
    if not ON_GPU and request.node.get_closest_marker("cuda"):
        pytest.skip("tests CUDA itself")
    torch.manual_seed(0)
    yield
    if ON_GPU:
        torch.cuda.empty_cache()
