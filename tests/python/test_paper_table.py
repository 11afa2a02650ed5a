"""The table beside the paper's figures: its data, its cells, the page that it is written into."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from anymask import bench, benchmark_masks, cli
from anymask.bench import paper_table
from anymask.bench.suites import Geometry
from library_under_test import ROOT


def a_run(gpu="NVIDIA H200", samples=(1, 2, 3, 4, 5), **choice):
    """Everything takes a quarter of the time that the paper has for FlashMask."""
    rows = []
    for case in bench.suite("paper", **choice):
        g = case.geometry
        if case.sample not in samples and case.mask in benchmark_masks.WITH_DOCUMENTS:
            continue
        forward, backward = paper_table.published()[g.head_dim, g.length, case.mask]["flashmask"][
            "ms"
        ]
        row = bench.Row(case, 10**10)
        row.seconds["anymask"] = {"forward": forward / 4e3, "backward": backward / 4e3}
        row.checked = case.sample == 1 or case.mask not in benchmark_masks.WITH_DOCUMENTS
        rows.append(row)
    about = {"date": "2026-01-02", "machine": {"cpu": "a CPU", "torch": "2.0"}}
    software = {"driver": "1", "cuda": "13.0", "cudnn": 1, "triton": "3"}
    return {**about, "gpu": gpu and {"name": gpu, **software}}, rows


# ---- the data -----------------------------------------------------------------------------------


def test_the_data_says_what_the_papers_text_says():
    """Its text states the least and the greatest gain over FlexAttention, and the shares of the
    A100's peak of 312 TFLOP/s, both by the totals of the two passes."""
    stated = {128: ((1.121, 1.607), (0.378, 0.623)), 64: ((1.042, 1.536), (0.336, 0.551))}
    for head_dim, (gains, shares) in stated.items():
        rows = {key[1:]: row for key, row in paper_table.published().items() if key[0] == head_dim}
        assert len(rows) == 36

        def total(row, library):
            work = sum(ms * rate for ms, rate in zip(row[library]["ms"], row[library]["tflops"]))
            return work / sum(row[library]["ms"])

        found = [total(row, "flashmask") / total(row, "flex") for row in rows.values()]
        assert (min(found), max(found)) == pytest.approx(gains, abs=0.002)
        # These leave out full and causal, which are faster.
        found = [
            total(row, "flashmask") / 312
            for (_, mask), row in rows.items()
            if mask not in ("full", "causal")
        ]
        assert (min(found), max(found)) == pytest.approx(shares, abs=0.002)


def test_its_masks_are_these_masks():
    """The paper's share of skipped tiles of 128 x 128, the mean of its samples."""
    for name in benchmark_masks.NAMES:
        samples = range(1, 6) if name in benchmark_masks.WITH_DOCUMENTS else (3,)
        skipped = [
            1 - benchmark_masks.benchmark_mask(name, 8192, sample=sample)
            .mask.statistics(q_len=8192, tile=128).tile_density
            for sample in samples
        ]  # fmt: skip
        stated = paper_table.published()[128, 8192, name]["sparsity"]
        assert statistics.fmean(skipped) == pytest.approx(stated, abs=0.012), name


# ---- the table ----------------------------------------------------------------------------------


def test_cells():
    about, rows = a_run(masks=["causal", "document"], lengths=[8192], head_dims=[128])
    text = paper_table.markdown(about, rows)
    causal = next(line for line in text.splitlines() if line.startswith("| causal |"))
    cells = [cell.strip() for cell in causal.strip("|").split("|")]
    assert cells[2:5] == ["9.75 / 29.6", "39.0 / 119", "4.0 / 4.0"]
    assert cells[5:7] == ["55.6 / 180", "5.7 / 6.1"]
    # 4 D 10^10 / 9.7525 ms = 525 TFLOP/s
    assert cells[7:10] == ["525 / 432", "53% / 44%", "73% / 60%"]
    assert cells[10:] == ["411 / 386*", "575 / 503*", "572 / 561*"]
    assert "4.00 / 4.00 than FlashMask on the A100" in text
    assert "the mean of the paper's 5 samples of documents, as there. 2 of 6 results" in text


def test_peers_of_the_same_run_come_first():
    about, rows = a_run(masks=["full"], lengths=[8192], head_dims=[128])
    rows[0].seconds["flex"] = {"forward": 1.0, "backward": 1.0}
    text = paper_table.markdown(about, rows)
    assert "| 5 / 13 | 613 / 540* | 598 / 585* |" in text
    assert "sample - of" in text


def test_another_card():
    about, rows = a_run("NVIDIA H100 80GB HBM3", (3,), head_dims=[64], lengths=[32768])
    text = paper_table.markdown(about, rows)
    assert "ms, H100" in text and "V3" not in text and "*" not in text
    assert "sample 3 of the paper's documents, not the mean of all 5" in text
    about, rows = a_run(None, (3,), head_dims=[64], lengths=[32768])
    assert "of peak" not in paper_table.markdown(about, rows)


def test_geometries():
    assert paper_table.is_of_the_paper(Geometry(8192, 16))
    assert paper_table.is_of_the_paper(Geometry(131072, 1, 64, 64, 64))
    for other in (Geometry(8192, 4), Geometry(8192, 16, 32, 8), Geometry(2048, 64)):
        assert not paper_table.is_of_the_paper(other)
        with pytest.raises(ValueError, match="no row has a geometry"):
            paper_table.markdown(a_run()[0], [bench.Row(bench.Case("full", other), 1)])


def test_the_page(tmp_path, capsys):
    about, rows = a_run(lengths=[8192])
    figures, page = tmp_path / "figures.json", tmp_path / "page.md"
    bench.write(figures, about, rows)
    begin, end = paper_table.marks(about)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    command = ["bench", "--from", str(figures), "--paper-table", str(page)]
    assert cli.main(command) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.index("D = 128, S = 8192") < text.index("D = 64, S = 8192")
    assert cli.main(command) == 0 and page.read_text() == text
    for without in ("no marks", "\n".join(paper_table.marks({"gpu": {"name": "NVIDIA H100"}}))):
        page.write_text(without)
        assert cli.main(command) == 1 and page.read_text() == without
        assert "no <!-- paper-table H200 -->" in capsys.readouterr().err


def test_cards_have_tables_of_their_own(tmp_path):
    page = tmp_path / "page.md"
    of_card = {card: a_run(f"NVIDIA {card}", lengths=[8192]) for card in ("H100", "H200")}
    page.write_text(
        "".join("{}\n{}\n".format(*paper_table.marks(run[0])) for run in of_card.values())
    )
    for about, rows in of_card.values():
        paper_table.write(page, about, rows)
    for card, (about, rows) in of_card.items():
        begin, end = paper_table.marks(about)
        tables = page.read_text().split(begin)[1].split(end)[0]
        assert (
            tables.strip() == paper_table.markdown(about, rows).strip() and f"ms, {card}" in tables
        )


def test_the_documented_tables_are_those_of_their_figures():
    page = (ROOT / "docs" / "paper_table.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^anymask bench --from (.+) --paper-table docs/paper_table.md$", page, re.M
    )
    cards = set()
    for command in commands:
        figures = [ROOT / name for name in command.split()]
        assert figures and all(json.loads(path.read_text())["rows"] for path in figures)
        run, rows = bench.read(*figures)
        begin, end = paper_table.marks(run)
        tables = page.split(begin)[1].split(end)[0].strip()
        assert tables == paper_table.markdown(run, rows).strip()
        cards.add(begin)
    assert cards == set(re.findall(r"<!-- paper-table .+ -->", page)) and len(cards) == 2
