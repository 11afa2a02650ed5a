"""A benchmark's figures as a picture (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anymask.bench.report import LABELS, TIMED, Line, by_geometry, has_recorded, peers_of
from anymask.bench.results import Row

COLOURS = {
    "anymask": "#2a6f97",
    "flashmask_v3": "#f4a261",
    "flex": "#a8b0b8",
    "cudnn": "#76b900",
    "sdpa": "#a8b0b8",
}


def draw(run: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Bars of TFLOP/s: a row of panels a pass, a column of panels a geometry."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = by_geometry(rows)
    subjects = ["anymask", *(["flashmask_v3"] if has_recorded(run) else []), *peers_of(rows)]
    timed = [what for what in TIMED if any(row.tflops("anymask", what) for row in rows)]
    if not timed:
        raise ValueError("plot: there is no figure to draw")
    figure, panels = pyplot.subplots(
        len(timed), len(groups), squeeze=False, sharey="row",
        figsize=(max(4.0, 4.6 * len(groups)), 2.9 * len(timed) + 1.2),
    )  # fmt: skip
    for line_of_panels, what in zip(panels, timed):
        for panel, (geometry, group) in zip(line_of_panels, groups.items()):
            _panel(panel, group, what, subjects)
            panel.set_title(f"{what}, {geometry}", fontsize=9)
        line_of_panels[0].set_ylabel("TFLOP/s")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(subjects), frameon=False)
    where = (run.get("gpu") or {}).get("name") or run["machine"]["cpu"]
    figure.suptitle(f"{where}; allowed pairs counted exactly", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(panel: Any, group: Sequence[Line], what: str, subjects: Sequence[str]) -> None:
    width = 0.84 / len(subjects)
    for index, subject in enumerate(subjects):
        places = [i - 0.42 + (index + 0.5) * width for i in range(len(group))]
        heights = [line.tflops(subject, what) or 0.0 for line in group]
        label = LABELS[subject] + (" (recorded)" if subject == "flashmask_v3" else "")
        panel.bar(places, heights, width, label=label, color=COLOURS[subject])
    panel.set_xticks(range(len(group)), [line.case.mask for line in group])
    panel.tick_params(axis="x", labelrotation=60, labelsize=7)
    for tick in panel.get_xticklabels():
        tick.set_horizontalalignment("right")
        tick.set_rotation_mode("anchor")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", linewidth=0.4)
    panel.set_axisbelow(True)
