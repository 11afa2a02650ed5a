"""benchmarks/dynamic_masks.py: right calls are timed, wrong ones found, missing ones named."""

from __future__ import annotations

import json
import os

import pytest
from library_under_test import ROOT

torch = pytest.importorskip("torch")

from anymask.bench.check import WrongResult  # noqa: E402

SMALL = ["--lengths", "300", "--keeps", "40", "--heads", "4", "--kv-heads", "2", "--dim", "16"]
SMALL += ["--rounds", "2", "--budget", "0.1"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dynamic_masks

    return dynamic_masks


@pytest.fixture
def calls(benchmark):
    import dynamic_calls

    return dynamic_calls


def run(benchmark, monkeypatch, *arguments):
    options = benchmark.parse([*SMALL, *arguments])
    monkeypatch.setattr(benchmark, "parse", lambda: options)
    return benchmark.main()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures(benchmark, monkeypatch, tmp_path, dtype):
    path = tmp_path / "figures.json"
    assert run(benchmark, monkeypatch, "--dtype", dtype, "--json", str(path)) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert not row["problems"] and 0 < row["error"] <= 1 and not row["largest"]
    for what in ("forward", "training"):
        assert set(row[what]) == {"dynamic", "causal", "torch"}
        factor = row["times_faster"]["torch"][what]
        assert factor == row[what]["torch"] / row[what]["dynamic"]
        assert row["selection_share"][what] == row["selection"] / row[what]["dynamic"]
    assert row["density"] == sum(min(i + 1, 40) for i in range(300)) / 300**2


def test_wrong_calls_are_found(benchmark, calls, monkeypatch, capsys):
    options = benchmark.parse(SMALL)
    inputs = calls.draw(options, 300)
    scores = calls.scores_of(inputs)
    assert 0 < calls.check(inputs, scores, 40) <= 1
    with pytest.raises(WrongResult, match="out"):
        calls.check(inputs, scores + 0.1, 40)  # other biases, the same selection
    selected = calls.hidden_from
    monkeypatch.setattr(calls, "hidden_from", lambda scores, keep: selected(scores, keep + 1))
    with pytest.raises(WrongResult, match="selection: query"):
        calls.check(inputs, scores, 40)
    assert run(benchmark, monkeypatch) == 1
    assert "wrong: S=300 keep 40: selection" in capsys.readouterr().out


def test_a_torch_that_goes_wrong_is_no_peer(benchmark, calls, monkeypatch):
    options = benchmark.parse(SMALL)
    inputs = calls.draw(options, 300)
    arguments = (inputs, calls.scores_of(inputs), 40, None)
    assert calls.fastest_torch_call(*arguments)[0] == "default"
    monkeypatch.setattr(calls, "scaled_dot_product_attention", lambda q, *a, **k: q)
    with pytest.raises(RuntimeError, match="default: wrong result"):
        calls.fastest_torch_call(*arguments)


@pytest.mark.parametrize("gib", [78, 139])
def test_the_longest_sequence_for_torch(benchmark, calls, monkeypatch, gib):
    options = benchmark.parse(["--device", "cuda"])
    assert options.largest and options.lengths == [32768]
    tried = []

    def works(self, options, length):
        tried.append(length)
        return length**2 < 2**31

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib * 2**30, gib * 2**30))
    monkeypatch.setattr(calls._Trial, "works", works)
    assert calls.largest_length(options) == 40960
    assert tried[0] == {78: 57344, 139: 81920}[gib]
    assert tried == list(range(tried[0], 40959, -8192))
    masks = options.kv_heads * 2 * tried[0] ** 2
    assert masks < gib * 2**30


def test_lengths_are_tried_in_another_process(benchmark, calls, monkeypatch):
    options = benchmark.parse(SMALL)
    trial = calls._Trial()
    try:
        assert trial.works(options, 64)
        assert not trial.works(options, -1)  # a RuntimeError of torch's
        options.dtype = "no type"  # none of torch's
        with pytest.raises(AttributeError):
            trial.works(options, 64)
    finally:
        trial.end()
    monkeypatch.setattr(calls, "torch_holds", os.execv)  # the process becomes another and is lost
    assert not trial.works("/bin/false", ["false"])
    assert trial._pool is None


def test_targets(benchmark):
    times = {"dynamic": 2.0, "causal": 10.0, "torch": 39.0}
    row = benchmark.Figures(
        32768, 1024, 0.03, 0.3, 0.1, times, {**times, "causal": 14.0}, {}, 0.5, {}, False
    )
    assert benchmark.missed_targets("cuda", [row]) == [
        "S=32768 keep 1024, forward: 5.0 x causal (wanted 6)",
        "S=32768 keep 1024, forward: selection 15.0% (wanted 10% at most)",
        "S=32768 keep 1024, training: selection 15.0% (wanted 10% at most)",
    ]
    (one, two, *_) = benchmark.missed_targets("cuda", [row._replace(largest=True, selection=0.1)])
    assert one == "S=32768 keep 1024, forward: 19.5 x torch (wanted 20)" and "training" in two
    assert benchmark.missed_targets("cpu", [row]) == []
