"""benchmarks/score_options.py: what it compares with, what it times, what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import reference_scores
from library_under_test import ROOT

torch = pytest.importorskip("torch")

from anymask.bench.check import WrongResult  # noqa: E402


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import score_options

    return score_options


def parsed(benchmark, *arguments):
    small = ["--length", "96", "--heads", "4", "--kv-heads", "2", "--batch", "2", "--dim", "16"]
    return benchmark.parse([*small, "--rounds", "2", "--budget", "0.1", *arguments])


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_reference_drops_what_the_definition_drops(benchmark, p):
    import score_reference

    seed = -3 * 2**40 + 5
    kept = reference_scores.kept(p, seed, 2, 3, 37, 70)
    for entry, head in np.ndindex(2, 3):
        gone = score_reference.dropped(p, seed, entry, head, 37, 70, "cpu")
        np.testing.assert_array_equal(~gone.numpy(), kept[entry, head])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_every_option_is_right_and_timed(benchmark, dtype, mask):
    options = parsed(benchmark, "--mask", mask)
    rows = benchmark.measure(options, dtype, lambda text: None)
    assert [row.case for row in rows] == [case.name for case in benchmark.CASES]
    for row in rows:
        assert row.problem is None and row.forward > 0 and row.backward > 0
        assert 0 < row.error <= 1
    assert rows[0].forward_cost == 0 and rows[1].backward_cost is not None


def test_wrong_results_are_found(benchmark):
    options = parsed(benchmark)
    inputs = benchmark.draw(options, torch.float32)
    plan = benchmark.am.plan(
        None, batch=2, q_heads=4, kv_heads=2, q_len=96, kv_len=96, head_dim=16, dtype=torch.float32
    )
    case = benchmark.Case("all", ("sink", "key_bias", "bias"), ("sink", "key_bias", "bias"), 0.1, 2)
    leaves = benchmark.leaves_of(case, inputs)
    out, lse = benchmark.call_of(case, inputs, leaves, plan)()
    gradients = benchmark.gradients_of(out, leaves, inputs["dout"])()
    found = {"out": out, "lse": lse} | {f"d{n}": x for n, x in zip(leaves, gradients)}
    rest = {"causal": False, "softcap": 2.0, "dropout_p": 0.1, "seed": benchmark.SEED}
    expected = benchmark.Expected(inputs, case.options, case.learned, **rest)
    assert 0 < expected.check(found) <= 1
    for name, value in found.items():
        for wrong in (value * 1.1, value * 0, value + torch.nan):
            with pytest.raises(WrongResult, match=f"^{name}"):
                expected.check({name: wrong})
    for change in ({"softcap": 3.0}, {"dropout_p": 0.11}, {"seed": 8}, {"causal": True}):
        other = benchmark.Expected(inputs, case.options, case.learned, **{**rest, **change})
        with pytest.raises(WrongResult):
            other.check(found)


def test_what_is_not_supported_is_named(benchmark, monkeypatch, capsys, tmp_path):
    whole = benchmark.am.attention

    def without_bias(*arguments, bias=None, **others):
        if bias is not None:
            raise NotImplementedError("bias: not here")
        return whole(*arguments, **others)

    monkeypatch.setattr(benchmark.am, "attention", without_bias)
    path = tmp_path / "figures.json"
    options = parsed(benchmark, "--dtypes", "float32", "--only", "bias,sink", "--json", str(path))
    monkeypatch.setattr(benchmark, "parse", lambda: options)
    assert benchmark.main() == 0
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"plain", "sink", "bias of every pair", "bias, its gradient"}
    failed = rows["bias, its gradient"]
    assert failed["problem"] == "forward: NotImplementedError: bias: not here"
    assert failed["forward"] is None and rows["sink"]["backward"] > 0
    printed = capsys.readouterr().out
    assert "problem: float32 bias of every pair: forward: NotImplementedError" in printed


def test_a_wrong_result_is_an_error(benchmark, monkeypatch):
    whole = benchmark.am.attention

    def careless(*arguments, softcap=0.0, **others):
        return whole(*arguments, **others)

    monkeypatch.setattr(benchmark.am, "attention", careless)
    options = parsed(benchmark, "--dtypes", "float32", "--only", "softcap")
    # Scores of random inputs of 16 numbers are far below a cap of 30.
    options.cases = [case._replace(softcap=case.softcap and 0.5) for case in options.cases]
    monkeypatch.setattr(benchmark, "parse", lambda: options)
    assert benchmark.main() == 1
