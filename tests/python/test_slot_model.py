"""benchmarks/slot_model.py: no list of phases fails, and the model can tell."""

from __future__ import annotations

import pytest
from library_under_test import ROOT

pytest.importorskip("torch")  # of what the benchmark scripts share


@pytest.fixture
def model(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import slot_model

    return slot_model


def test_nothing_fails(model):
    assert model.count_failing(400, model.Rules()) == 0


@pytest.mark.parametrize("rule", ["gives_back_its_slot", "returns_keys", "awaits_readers"])
def test_each_rule_is_needed(model, rule):
    assert model.count_failing(400, model.Rules(**{rule: False})) > 0


def test_prints_a_line_for_each_set_of_rules(model, capsys):
    model.main(["--cases", "20"])
    printed = capsys.readouterr().out
    assert "20 random masks" in printed and "as they are" in printed
