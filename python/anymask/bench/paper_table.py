"""This library's figures beside those that the FlashMask paper published, as Markdown.

anymask bench --from *.json --paper-table docs/paper_table.md
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anymask.bench.report import (
    LABELS,
    TIMED,
    Line,
    by_geometry,
    geometric_mean,
    has_recorded,
    recorded,
)
from anymask.bench.results import Row
from anymask.bench.suites import Geometry
from anymask.benchmark_masks import SAMPLES, WITH_DOCUMENTS

_PUBLISHED = Path(__file__).parents[1] / "data" / "paper_a100.json"
_HIDDEN = 4096  # of the paper's geometries
_TOKENS = 131072
_PEAKS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}  # dense bf16 TFLOP/s of the SXM cards
_PEERS = ("flex", "cudnn", "flashmask_v3")


@functools.cache
def published() -> dict[tuple[int, int, str], dict[str, Any]]:
    """The paper's rows by (head_dim, length, mask)."""
    with open(_PUBLISHED, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    return {(row["head_dim"], row["length"], row["mask"]): row for row in rows}


def is_of_the_paper(geometry: Geometry) -> bool:
    """Whether the paper has figures of this geometry."""
    heads = _HIDDEN // geometry.head_dim
    return (
        geometry.heads == geometry.kv_heads == heads
        and geometry.length * geometry.batch == _TOKENS
        and any(key[:2] == (geometry.head_dim, geometry.length) for key in published())
    )


# ---- cells --------------------------------------------------------------------------------------


def _pair(values: Sequence[float | None], text: str) -> str:
    """Forward / backward."""
    if not any(values):
        return "-"
    return " / ".join("-" if not value else format(value, text) for value in values)


def _digits(value: float) -> str:
    return ".2f" if value < 10 else ".1f" if value < 100 else ".0f"


def _times(values: Sequence[float | None]) -> str:
    return " / ".join("-" if not value else format(value, _digits(value)) for value in values)


def _own_ms(line: Line) -> list[float | None]:
    seconds = [line.seconds("anymask", what) for what in TIMED]
    return [value * 1e3 if value else None for value in seconds]


def _theirs(line: Line, library: str) -> dict[str, list[float]] | None:
    g = line.case.geometry
    row = published().get((g.head_dim, g.length, line.case.mask))
    return row[library] if row else None


def _factors(line: Line, library: str) -> list[float | None]:
    """How many times faster than what the paper published."""
    theirs, own = _theirs(line, library), _own_ms(line)
    if theirs is None:
        return [None, None]
    return [ms / mine if mine else None for ms, mine in zip(theirs["ms"], own)]


def _peer(line: Line, name: str, with_recorded: bool) -> list[tuple[float | None, bool]]:
    """(TFLOP/s, whether recorded earlier) forward and backward."""
    found: list[tuple[float | None, bool]] = []
    for what in TIMED:
        here = None if name == "flashmask_v3" else line.tflops(name, what)
        earlier = recorded(line.case, name, what) if with_recorded and here is None else None
        found.append((here, False) if here is not None else (earlier, earlier is not None))
    return found


def _peer_cell(found: Sequence[tuple[float | None, bool]]) -> str:
    star = "*" if any(earlier for _, earlier in found) else ""
    return _pair([value for value, _ in found], ".0f") + star


# ---- tables -------------------------------------------------------------------------------------


def _table(
    geometry: Geometry, lines: Sequence[Line], card: str, peak: float | None, with_recorded: bool
) -> list[str]:
    peers = [
        name
        for name in _PEERS
        if any(value for line in lines for value, _ in _peer(line, name, with_recorded))
    ]
    headings = ["mask", "allowed", f"ms, {card}", "ms, FlashMask, A100", "times faster"]
    headings += ["ms, FlexAttention, A100", "times faster", f"TFLOP/s, {card}"]
    headings += ["of peak"] if peak else []
    headings += ["FlashMask of A100's peak", *(f"{LABELS[name]}, {card}" for name in peers)]
    table = [
        f"### D = {geometry.head_dim}, S = {geometry.length}, B = {geometry.batch}, "
        f"{geometry.heads} heads",
        "",
        "| " + " | ".join(headings) + " |",
        "| --- |" + " ---: |" * (len(headings) - 1),
    ]
    for line in lines:
        rates = [line.tflops("anymask", what) for what in TIMED]
        cells = [line.case.mask, f"{line.allowed:.3f}", _times(_own_ms(line))]
        for library in ("flashmask", "flex"):
            theirs = _theirs(line, library)
            cells.append(_times(theirs["ms"]) if theirs else "-")
            cells.append(_pair(_factors(line, library), ".1f"))
        cells.append(_pair(rates, ".0f"))
        if peak:
            cells.append(_pair([rate / peak if rate else None for rate in rates], ".0%"))
        theirs = _theirs(line, "flashmask")
        shares = [rate / _PEAKS["A100"] for rate in theirs["tflops"]] if theirs else []
        cells.append(_pair(shares, ".0%"))
        cells += [_peer_cell(_peer(line, name, with_recorded)) for name in peers]
        table.append("| " + " | ".join(cells) + " |")
    return [*table, "", _means(lines, peers, with_recorded), ""]


def _means(lines: Sequence[Line], peers: Sequence[str], with_recorded: bool) -> str:
    parts = []
    for library, name in (("flashmask", "FlashMask on the A100"), ("flex", "FlexAttention there")):
        factors = [_factors(line, library) for line in lines]
        parts.append((name, [geometric_mean(column) for column in zip(*factors)]))
    for peer in peers:
        columns: list[list[float]] = [[], []]
        for line in lines:
            for index, (value, _) in enumerate(_peer(line, peer, with_recorded)):
                own = line.tflops("anymask", TIMED[index])
                if own and value:
                    columns[index].append(own / value)
        parts.append((f"{LABELS[peer]} here", [geometric_mean(column) for column in columns]))
    texts = [f"{_pair(values, '.2f')} than {name}" for name, values in parts if any(values)]
    return f"Geometric means, times faster: {', '.join(texts)}."


def _samples(lines: Sequence[Line]) -> str:
    """Which layouts of documents the figures are of."""
    seen = {
        tuple(sorted(row.case.sample for row in line.rows))
        for line in lines
        if line.case.mask in WITH_DOCUMENTS
    }
    if seen == {tuple(range(1, SAMPLES + 1))}:
        return f"the mean of the paper's {SAMPLES} samples of documents, as there"
    numbers = sorted({number for numbers in seen for number in numbers})
    which = ", ".join(map(str, numbers)) or "-"
    return f"sample {which} of the paper's documents, not the mean of all {SAMPLES}"


def _checks(rows: Sequence[Row]) -> str:
    unchecked = sum(not row.checked for row in rows)
    if not unchecked:
        return "Every result was compared with a reference before it was timed."
    return (
        f"{len(rows) - unchecked} of {len(rows)} results were compared with a reference before "
        "they were timed; of the others, further samples of a mask at its longest lengths, only "
        "that they are finite."
    )


def markdown(run: dict[str, Any], rows: Sequence[Row]) -> str:
    """The tables of all rows that the paper has figures for.

    Raises ValueError where there are none.
    """
    groups = {g: lines for g, lines in by_geometry(rows).items() if is_of_the_paper(g)}
    if not groups:
        raise ValueError("no row has a geometry of the paper's tables (see --suite paper)")
    card = _card(run)
    with_recorded = has_recorded(run)
    everything = [line for lines in groups.values() for line in lines]
    timed = [row for line in everything for row in line.rows]
    text = [
        f"{_device(run)}, {_dates(run)}, torch {run['machine']['torch']}; {_samples(everything)}. "
        + _checks(timed),
        "",
    ]
    for geometry in sorted(groups, key=lambda g: (-g.head_dim, g.length)):
        text += _table(geometry, groups[geometry], card, _PEAKS.get(card), with_recorded)
    if with_recorded:
        text += [
            "\\* recorded earlier on an H200, sample 3: `python/anymask/data/peers_h200.json`."
        ]
    return "\n".join(text).rstrip() + "\n"


def _device(run: dict[str, Any]) -> str:
    name: str = (run.get("gpu") or {}).get("name") or run["machine"]["cpu"]
    return name


def _dates(run: dict[str, Any]) -> str:
    """When it was made, or its parts, from the first to the last."""
    dates = sorted(part["date"] for part in run.get("parts", [run]))
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def _card(run: dict[str, Any]) -> str:
    device = _device(run)
    return next((name for name in _PEAKS if name in device), device)


def marks(run: dict[str, Any]) -> tuple[str, str]:
    """The lines of a page between which a run's tables are: each card has its own."""
    return f"<!-- paper-table {_card(run)} -->", f"<!-- /paper-table {_card(run)} -->"


def write(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    """Puts the tables between the page's marks for the run's card; makes a page of them where there
    is none."""
    tables = markdown(run, rows)
    begin, end = marks(run)
    page = path.read_text(encoding="utf-8") if path.exists() else f"{begin}\n{end}\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path}: has no {begin} and {end} to write between")
    path.write_text(f"{before}{begin}\n\n{tables}\n{end}{after}", encoding="utf-8")
