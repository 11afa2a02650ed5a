"""benchmarks/dense_masks.py: right results are timed, wrong ones and missing ones are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from library_under_test import ROOT

torch = pytest.importorskip("torch")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dense_masks

    return dense_masks


def run(benchmark, monkeypatch, *arguments):
    small = ["--length", "160", "--heads", "2", "--dim", "32", "--rounds", "2", "--budget", "0.1"]
    options = benchmark.parse([*small, *arguments])
    monkeypatch.setattr(benchmark, "parse", lambda: options)
    return benchmark.main()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_masks(benchmark, monkeypatch, tmp_path, dtype):
    path = tmp_path / "figures.json"
    assert run(benchmark, monkeypatch, "--dtype", dtype, "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["mask"] for row in rows] == ["random", "causal_document"]
    for row in rows:
        assert not row["problems"] and row["plan"] > 0
        assert set(row["errors"]) == {"anymask", "math"}
        for what in ("forward", "backward"):
            times = row[what]
            assert set(times) == {"anymask", "full", "math"}
            assert row["share_of_full"][what] == times["full"] / times["anymask"]
    assert rows[0]["density"] == pytest.approx(0.5, abs=0.02)


def test_each_batch_entry_has_a_mask_of_its_own(benchmark):
    options = benchmark.parse(["--length", "256", "--batch", "3"])
    for name in benchmark.MASKS:
        mask = benchmark.allowed(options, name)
        assert mask.shape == (3, 1, 256, 256) and mask.dtype == torch.bool
        assert not torch.equal(mask[0], mask[1])
    assert not np.triu(mask[0, 0], 1).any()


def test_a_wrong_result_is_an_error(benchmark, monkeypatch, capsys):
    whole = benchmark.am.attention
    monkeypatch.setattr(
        benchmark.am, "attention", lambda q, k, v, plan: whole(q, k, v, benchmark.am.causal())
    )
    assert run(benchmark, monkeypatch, "--masks", "random", "--no-torch") == 1
    assert "problem: random: anymask forward: WrongResult" in capsys.readouterr().out


def test_targets(benchmark):
    row = benchmark.Figures(
        "random", 0.5, 1e-3, {"anymask": 2.0, "full": 1.8, "efficient": 30.0, "cudnn": 8.0},
        {"anymask": 2.0, "full": 1.6}, {}, {},
    )  # fmt: skip
    assert row.share_of_full("forward") == 0.9 and row.times_torch("forward") == 4
    assert row.times_torch("backward") is None
    (missed,) = benchmark.missed_targets([row])
    assert missed == "random backward: 80% of the full mask's speed (wanted 85%)"
