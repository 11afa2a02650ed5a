"""benchmarks/chained_sums.py: what its simulation gives where that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from library_under_test import ROOT

pytest.importorskip("torch")  # of what the benchmark scripts share
ROWS = 20
FULL = np.ones((ROWS, 2), bool)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import chained_sums

    return chained_sums


def test_the_second_key_tile_is_a_turn_behind(benchmark):
    for latency in (0.0, 1.0, 2.5):
        whole = ROWS + benchmark.BETWEEN_ITEMS
        share = benchmark.share_at_work(FULL, 1, 1, latency, blocks=2)
        assert share == pytest.approx(whole / (whole + latency))


def test_under_a_causal_mask_key_tiles_start_apart(benchmark):
    causal = np.arange(ROWS)[:, None] >= 2 * np.arange(2)
    whole = ROWS + benchmark.BETWEEN_ITEMS
    for latency, behind in ((1.0, 0.0), (2.0, 0.0), (3.5, 1.5)):
        share = benchmark.share_at_work(causal, 1, 1, latency, blocks=2)
        assert share == pytest.approx((whole - 1) / (whole + behind))


def test_nobody_waits_alone_or_for_other_pairs(benchmark):
    assert benchmark.share_at_work(FULL, 3, 1, 0.5, blocks=1) == 1
    assert benchmark.share_at_work(FULL, 4, 4, 9.0, blocks=4) == pytest.approx(1)


def test_rows_before_a_gap_come_last(benchmark):
    assert benchmark.late_rows_last([0, 1, 5, 6, 9]) == [5, 6, 9, 0, 1]
    assert benchmark.late_rows_last([3, 4, 5]) == [3, 4, 5]
    assert benchmark.late_rows_last([30, 31, 40]) == [30, 31, 40]  # the word of rows ends first
    assert benchmark.late_rows_last([]) == []


def test_in_order_nobody_waits_who_comes_later_anyway(benchmark):
    """Rows of their own, 8 and 11, and then two that both key tiles meet."""
    met = np.zeros((40, 2), bool)
    met[0:8, 1] = met[16:27, 0] = met[30:32, :] = True
    work = (8 + 11 + 4 + 2 * benchmark.BETWEEN_ITEMS) / 2
    whole = 11 + 2 + benchmark.BETWEEN_ITEMS
    latency = 2.0
    in_order = benchmark.share_at_work(met, 1, 1, latency, blocks=2, ascending=True)
    assert in_order == pytest.approx(work / whole)
    shared_first = benchmark.share_at_work(met, 1, 1, latency, blocks=2)
    assert shared_first == pytest.approx(work / (whole + latency))


def test_the_table_has_every_mask_and_latency(benchmark, monkeypatch, capsys):
    options = benchmark.parse(
        ["--masks=full,causal", "--length=512", "--pairs=4", "--latencies=1,4", "--chunks=1,4"]
    )
    monkeypatch.setattr(benchmark, "parse", lambda: options)
    assert benchmark.main() == 0
    text = capsys.readouterr().out
    assert text.count("full") == 2 and text.count("causal") == 2
