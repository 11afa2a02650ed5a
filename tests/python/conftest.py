"""Fixtures: the instruction sets of this machine, how hard to test."""

from __future__ import annotations

import ctypes
import os

import library_under_test  # noqa: F401
import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--intensity",
        type=float,
        default=float(os.environ.get("ANYMASK_TEST_INTENSITY", "1")),
        help="how much work the randomised tests do: 1 is the default, 10 ten times as many cases",
    )


def pytest_configure(config):
    from hypothesis import HealthCheck, settings

    examples = max(1, round(25 * config.getoption("--intensity")))
    settings.register_profile(
        "anymask",
        max_examples=examples,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("anymask")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


@pytest.fixture(scope="session", autouse=True)
def one_thread_of_torch():
    """The reference's tensors are small: waking torch's threads costs more than they do."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers():
    """torch's random numbers are the same whatever ran before."""
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def intensity(request):
    return request.config.getoption("--intensity")


def instruction_sets():
    """The instruction sets that this machine can run; none without a library."""
    from anymask._library import call

    names = ctypes.create_string_buffer(256)
    try:
        call("anymask_cpu_instruction_sets", names, len(names))
    except RuntimeError:
        return []
    return names.value.decode().split(",")


def pytest_generate_tests(metafunc):
    if "instruction_set" in metafunc.fixturenames:
        names = instruction_sets() or [None]
        metafunc.parametrize("instruction_set", names, indirect=True)


@pytest.fixture
def instruction_set(request):
    """Runs a test once on every instruction set of this machine."""
    from anymask._library import call

    before = ctypes.create_string_buffer(64)
    call("anymask_cpu_instruction_set", before, len(before))
    call("anymask_set_cpu_instruction_set", request.param.encode())
    yield request.param
    call("anymask_set_cpu_instruction_set", before.value)
