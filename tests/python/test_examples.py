"""The Python examples and benchmarks run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from library_under_test import ROOT


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_attention():
    text = run(str(ROOT / "examples" / "attention.py"))
    assert "causal() & documents(<int64 [6]>)" in text and "dk (1, 512, 2, 64)" in text


def test_masks(tmp_path):
    pytest.importorskip("matplotlib")
    text = run(str(ROOT / "examples" / "masks.py"), str(tmp_path / "mask.png"))
    assert "pairs allowed" in text and (tmp_path / "mask.png").exists()


def test_cpu_benchmark(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "figures.json"
    run(
        str(ROOT / "benchmarks" / "cpu_attention.py"), "--lengths", "256", "--dims", "64",
        "--dtypes", "bfloat16", "--masks", "full,causal_document,random_eviction", "--rounds", "2",
        "--budget", "0.2", "--no-flex", "--no-memory", "--json", str(path),
    )  # fmt: skip
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 3 and written["targets"]


def test_decoding(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "figures.json"
    run(
        str(ROOT / "benchmarks" / "decoding.py"), "--keys", "200", "--dim", "64",
        "--dtypes", "float32", "--rounds", "2", "--budget", "0.1", "--json", str(path),
    )  # fmt: skip
    document = json.loads(path.read_text())
    rows = document["rows"]
    assert document["date"].endswith("UTC") and "commit" in document
    assert {row["rows"] for row in rows} == {1, 2, 4, 8, 16}
    assert all(row["times"]["anymask"] > 0 and 0 < row["error"] <= 1 for row in rows)


def test_call_overhead():
    pytest.importorskip("torch")
    text = run(str(ROOT / "benchmarks" / "call_overhead.py"), "--calls", "5")
    assert "anymask" in text
