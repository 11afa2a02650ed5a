"""benchmarks/moving.py: the four calls beside torch, and the pages that their figures go into."""

from __future__ import annotations

import json

import pytest
from library_under_test import ROOT

torch = pytest.importorskip("torch")

SMALL = ["--length", "160", "--heads", "4", "--kv-heads", "2", "--dim", "16", "--batch", "2"]
SMALL += ["--rounds", "2", "--budget", "0.1"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import moving

    return moving


def run(benchmark, monkeypatch, *arguments):
    options = benchmark.parse([*SMALL, *arguments])
    monkeypatch.setattr(benchmark, "parse", lambda: options)
    return benchmark.main()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures_and_pages(benchmark, monkeypatch, tmp_path, dtype):
    path = tmp_path / "figures.json"
    assert run(benchmark, monkeypatch, "--dtype", dtype, "--json", str(path)) == 0
    document = json.loads(path.read_text())
    assert [row["page"] for row in document["rows"]] == list(benchmark.PAGES)
    for row in document["rows"]:
        assert 0 < row["error"] <= 1
        assert set(row["forward"]) == set(row["training"]) == {"anymask", "torch"}

    for page in benchmark.PAGES:
        marks = "before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n"
        (tmp_path / f"{page}.md").write_text(marks)
    benchmark.write_pages([path], tmp_path)
    texts = {page: (tmp_path / f"{page}.md").read_text() for page in benchmark.PAGES}
    for text in texts.values():
        assert text.startswith("before") and text.endswith("after\n") and "old" not in text
        assert f"S=160, B=2, 4 query and 2 key heads, D=16, {dtype}" in text
        assert "a GPU: not measured yet" in text
    assert "1.35 / 1.09 at S = 8192" in " ".join(texts["flashmask"].split())
    document["gpu"] = {"name": "Some GPU", "torch": "2.0"}
    document["rows"][1]["bytes"] = {"anymask": 3 * 2**20, "torch": 2**30}
    path.write_text(json.dumps(document))
    benchmark.write_pages([path], tmp_path)
    text = (tmp_path / "custom_masks.md").read_text()
    assert "| Some GPU, torch 2.0; S=160" in text and "| 3 | 1024 |" in text
    assert "a GPU: not measured" not in text and "a CPU: not measured" in text
    (tmp_path / "flashmask.md").write_text("no marks")
    with pytest.raises(SystemExit, match=r"flashmask\.md: has no <!-- measured -->"):
        benchmark.write_pages([path], tmp_path)


def test_a_wrong_result_is_an_error(benchmark, monkeypatch, capsys):
    whole = benchmark.am.flexible_attention
    monkeypatch.setattr(
        benchmark.am, "flexible_attention", lambda *a, **k: whole(*a, **{**k, "causal": False})
    )
    assert run(benchmark, monkeypatch, "--pages", "custom_masks,flexible_masks") == 1
    assert "wrong: flexible_masks: out: " in capsys.readouterr().out


def test_every_page_has_its_marks(benchmark):
    for page in benchmark.PAGES:
        text = (ROOT / "docs" / "moving" / f"{page}.md").read_text(encoding="utf-8")
        begin, end = text.index("<!-- measured -->"), text.index("<!-- /measured -->")
        assert "| forward ms | torch |" in text[begin:end]
