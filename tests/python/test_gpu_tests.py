"""The GPU tests can be collected without a GPU, and those that CUDA is not the subject of run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from library_under_test import ROOT

torch = pytest.importorskip("torch")


def run(*arguments, **environment):
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_they_are_skipped_with_one_message():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("torch finds no CUDA GPU") == 1


def test_some_run_on_the_cpu():
    names = "poisoned or views or agrees or checkpointing or huge or graph_of_a_mask or two_streams"
    done = run("-k", names, ANYMASK_TEST_DEVICE="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
