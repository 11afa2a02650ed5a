"""A benchmark's figures as tables: each geometry's, with ratios to the peers and their means."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anymask.bench.results import Row
from anymask.bench.suites import Case, Geometry

LABELS = {
    "anymask": "anymask",
    "flashmask_v3": "FlashMask V3",
    "flex": "FlexAttention",
    "cudnn": "cuDNN",
    "sdpa": "torch SDPA",
}
_HEADINGS = {"flex": "Flex", "cudnn": "cuDNN", "sdpa": "SDPA"}
_RECORDED = Path(__file__).parents[1] / "data" / "peers_h200.json"
TIMED = ("forward", "backward")


# ---- figures ------------------------------------------------------------------------------------


@functools.cache
def _recorded() -> dict[tuple[Geometry, str], dict[str, Any]]:
    with open(_RECORDED, encoding="utf-8") as file:
        rows = json.load(file)["rows"]
    sizes = ("length", "batch", "heads", "kv_heads", "head_dim")
    return {(Geometry(*(row[s] for s in sizes)), row["mask"]): row for row in rows}


def recorded(case: Case, library: str, what: str) -> float | None:
    """A library's TFLOP/s, forward or backward, as measured on an H200 earlier; see the file's own
    words about how. None where there is no such figure."""
    row = _recorded().get((case.geometry, case.mask), {})
    return row[library][TIMED.index(what)] if library in row else None


class Line:
    """One mask at one geometry: the mean over its samples of documents."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.case = rows[0].case
        self.allowed = statistics.fmean(row.allowed for row in rows)

    def seconds(self, subject: str, what: str) -> float | None:
        return _mean([row.seconds.get(subject, {}).get(what) for row in self.rows])

    def tflops(self, subject: str, what: str) -> float | None:
        if subject == "flashmask_v3":
            return recorded(self.case, subject, what)
        return _mean([row.tflops(subject, what) for row in self.rows])

    def ratio(self, what: str, others: Sequence[str]) -> float | None:
        """anymask's figure over the best of the others."""
        own = self.tflops("anymask", what)
        theirs = [figure for figure in (self.tflops(s, what) for s in others) if figure]
        return own / max(theirs) if own and theirs else None

    def compilation(self, subject: str) -> float | None:
        times = [row.compilation.get(subject, row.first_calls.get(subject)) for row in self.rows]
        return max((t for t in times if t is not None), default=None)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def lines(rows: Sequence[Row]) -> list[Line]:
    """Rows that differ in their documents alone, together."""
    groups: dict[Case, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case._replace(sample=0), []).append(row)
    return [Line(group) for group in groups.values()]


def by_geometry(rows: Sequence[Row]) -> dict[Geometry, list[Line]]:
    groups: dict[Geometry, list[Line]] = {}
    for line in lines(rows):
        groups.setdefault(line.case.geometry, []).append(line)
    return groups


def peers_of(rows: Sequence[Row]) -> list[str]:
    """Peers that have a figure, in the order of `LABELS`."""
    timed = {subject for row in rows for subject in row.seconds}
    return [name for name in LABELS if name in timed and name != "anymask"]


def has_recorded(run: dict[str, Any]) -> bool:
    """Recorded figures are of one kind of GPU: they say nothing about another."""
    return "H200" in ((run.get("gpu") or {}).get("name") or "")


def geometric_mean(values: Sequence[float | None]) -> float | None:
    logarithms = [math.log(value) for value in values if value]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None


# ---- tables -------------------------------------------------------------------------------------


def _number(value: float | None, scale: float = 1.0, digits: int | None = None) -> str:
    if value is None:
        return "-"
    value *= scale
    if digits is None:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _factor(value: float | None) -> str:
    if value is None:
        return "-"
    return f"[{'green' if value >= 1 else 'red'}]{value:.2f}[/]"


def _columns(rows: Sequence[Row], with_recorded: bool) -> list[tuple[str, Any]]:
    """(heading, line -> text) of each column that has something to say."""
    peers = peers_of(rows)
    columns: list[tuple[str, Any]] = [
        ("allowed", lambda line: f"{line.allowed:.3f}"),
        ("plan µs", lambda line: _number(line.seconds("anymask", "plan"), 1e6)),
    ]
    if "flex" in peers:
        columns += [
            ("Flex plan µs", lambda line: _number(line.seconds("flex", "plan"), 1e6)),
            ("compile s", lambda line: _number(line.compilation("flex"), digits=1)),
        ]
    for what, short in zip(TIMED, ("fwd", "bwd")):
        if not any(what in times for row in rows for times in row.seconds.values()):
            continue
        columns += [
            (f"{short} ms", lambda line, w=what: _number(line.seconds("anymask", w), 1e3)),
            ("TFLOP/s", lambda line, w=what: _number(line.tflops("anymask", w))),
        ]
        if what == "backward" and any("anymask_deterministic" in row.seconds for row in rows):
            columns.append(
                ("determ.", lambda line: _number(line.tflops("anymask_deterministic", "backward")))
            )
        columns += [
            (_HEADINGS[peer], lambda line, p=peer, w=what: _number(line.tflops(p, w)))
            for peer in peers
        ]
        if peers:
            columns.append(("x best", lambda line, w=what: _factor(line.ratio(w, peers))))
        if with_recorded:
            columns += [
                ("V3", lambda line, w=what: _number(line.tflops("flashmask_v3", w))),
                ("x V3", lambda line, w=what: _factor(line.ratio(w, ["flashmask_v3"]))),
            ]
    return columns


def _means(title: str, group: Sequence[Line], peers: Sequence[str], recorded: bool) -> str:
    """One sentence of geometric means."""
    others = {LABELS[peer]: [peer] for peer in peers}
    if len(peers) > 1:
        others["best peer"] = list(peers)
    if recorded:
        others[LABELS["flashmask_v3"] + " as recorded"] = ["flashmask_v3"]
    parts = []
    for name, subjects in others.items():
        ratios = [geometric_mean([x.ratio(w, subjects) for x in group]) for w in TIMED]
        if any(ratios):
            parts.append(f"{name} {' / '.join(map(_factor, ratios))}")
    return f"{title}: {', '.join(parts)}" if parts else ""


def tables(run: dict[str, Any], rows: Sequence[Row]) -> list[Any]:
    """Everything to print: a rich table a geometry, the means, what failed."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    peers, with_recorded = peers_of(rows), has_recorded(run)
    printed: list[Any] = []
    for geometry, group in by_geometry(rows).items():
        table = Table(
            title=str(geometry), title_justify="left", title_style="bold", box=SIMPLE_HEAD,
            pad_edge=False,
        )  # fmt: skip
        table.add_column("mask", no_wrap=True)
        columns = _columns([row for line in group for row in line.rows], with_recorded)
        for heading, _ in columns:
            table.add_column(heading, justify="right")
        for line in group:
            table.add_row(line.case.mask, *(text(line) for _, text in columns))
        printed.append(table)
        printed.append(_means("times faster (forward / backward)", group, peers, with_recorded))
    everything = lines(rows)
    if len(printed) > 2:
        printed.append(_means("all of them", everything, peers, with_recorded))
    for row in rows:
        for what, text in row.problems.items():
            where = f"{row.case.mask} {row.case.geometry}"
            problem = escape(f"{where}: {what}: {text}")
            printed.append(f"[red]{problem}[/]")
    return [part for part in printed if part != ""]


def one_line(row: Row) -> str:
    """A row as a line of plain text, for logs."""
    parts = []
    for subject in row.seconds:
        figures = [_number(row.tflops(subject, what)) for what in TIMED]
        parts.append(f"{subject} {' / '.join(figures)}")
    problems = "; ".join(f"{what}: {text[:120]}" for what, text in row.problems.items())
    g = row.case.geometry
    checked = f"checked to {max(row.errors.values(), default=0.0):.2f} of the allowed error"
    if not row.checked:
        checked = f"sample {row.case.sample}, finite"
    return f"{g} {row.case.mask}: {', '.join(parts)} TFLOP/s, {checked}, {row.wall:.1f} s" + (
        f"; {problems}" if problems else ""
    )
