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


def share_at_work(benchmark, *arguments, **named):
    return benchmark.simulate(*arguments, **named)[0]


def test_the_second_key_tile_is_a_turn_behind(benchmark):
    for latency in (0.0, 1.0, 2.5):
        whole = ROWS + benchmark.BETWEEN_ITEMS
        share = share_at_work(benchmark, FULL, 1, 1, latency, blocks=2)
        assert share == pytest.approx(whole / (whole + latency))


def test_under_a_causal_mask_key_tiles_start_apart(benchmark):
    causal = np.arange(ROWS)[:, None] >= 2 * np.arange(2)
    whole = ROWS + benchmark.BETWEEN_ITEMS
    for latency, behind in ((1.0, 0.0), (2.0, 0.0), (3.5, 1.5)):
        share = share_at_work(benchmark, causal, 1, 1, latency, blocks=2)
        assert share == pytest.approx((whole - 1) / (whole + behind))


def test_nobody_waits_alone_or_for_other_pairs(benchmark):
    assert share_at_work(benchmark, FULL, 3, 1, 0.5, blocks=1) == 1
    assert share_at_work(benchmark, FULL, 4, 4, 9.0, blocks=4) == pytest.approx(1)


def test_who_comes_later_anyway_does_not_wait(benchmark):
    """Rows of their own, 8 and 11, and then two that both key tiles meet."""
    met = np.zeros((40, 2), bool)
    met[0:8, 1] = met[16:27, 0] = met[30:32, :] = True
    work = (8 + 11 + 4 + 2 * benchmark.BETWEEN_ITEMS) / 2
    whole = 11 + 2 + benchmark.BETWEEN_ITEMS
    assert share_at_work(benchmark, met, 1, 1, 2.0, 2) == pytest.approx(work / whole)


def test_row_tiles_come_from_memory_again_unless_they_fit(benchmark):
    """A block at key tiles of two pairs by turns meets each pair's rows twice."""
    for cached, misses in ((2 * ROWS, 0.5), (2 * ROWS - 1, 1.0)):
        assert benchmark.simulate(FULL, 2, 2, 0.0, 1, cached)[1] == misses
    assert benchmark.simulate(FULL, 2, 1, 0.0, 1, ROWS)[1] == 0.5  # one pair after the other


def test_the_table_has_every_mask_and_latency(benchmark, monkeypatch, capsys):
    options = benchmark.parse(
        ["--masks=full,causal", "--length=512", "--pairs=4", "--latencies=1,4", "--chunks=1,4"]
    )
    monkeypatch.setattr(benchmark, "parse", lambda: options)
    assert benchmark.main() == 0
    text = capsys.readouterr().out
    assert text.count("full") == 2 and text.count("causal") == 2
