"""What a benchmark was asked and what it found, as plain data and as JSON."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from anymask import machine
from anymask.bench.suites import Case, Geometry
from anymask.measuring import flops

PASSES = ("plan", "forward", "backward")


class Settings(NamedTuple):
    """How to measure."""

    device: str = "cpu"
    passes: tuple[str, ...] = PASSES
    peers: tuple[str, ...] = ()
    deterministic: bool = False  # time the deterministic backward pass too
    rounds: int = 25  # how often a call is timed at most
    budget: float = 1.0  # seconds for timing one pass of a case, all subjects together
    compile_jobs: int = 0  # processes that compile FlexAttention ahead
    stop_after: float | None = None  # seconds after which no new case is begun
    every_sample: bool = False  # compare long sequences of every sample with a reference


@dataclass
class Row:
    """One case's figures. Subjects are "anymask", "anymask_deterministic" and the peers."""

    case: Case
    pairs: int  # allowed, over all batch entries and query heads
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)  # by subject and pass
    first_calls: dict[str, float] = field(default_factory=dict)  # seconds, compilation included
    compilation: dict[str, float] = field(default_factory=dict)  # seconds, where done ahead
    errors: dict[str, float] = field(default_factory=dict)  # largest, as a share of the allowed
    problems: dict[str, str] = field(default_factory=dict)  # what failed, and why
    wall: float = 0.0  # seconds that the whole row took
    checked: bool = True  # against a reference; False: only that everything is finite

    @property
    def allowed(self) -> float:
        """Share of the pairs."""
        g = self.case.geometry
        return self.pairs / (g.batch * g.heads * g.length**2)

    def tflops(self, subject: str, what: str) -> float | None:
        """By exactly counted pairs, forward or backward; None where not measured."""
        seconds = self.seconds.get(subject, {}).get(what)
        if not seconds:
            return None
        forward, backward = flops(self.pairs, self.case.geometry.head_dim)
        return (forward if what == "forward" else backward) / seconds / 1e12

    @property
    def wrong(self) -> bool:
        """Whether a result of anymask's own failed its check."""
        return any(
            what.startswith("anymask") and text.startswith("WrongResult")
            for what, text in self.problems.items()
        )

    def to_dict(self) -> dict[str, Any]:
        case = self.case._asdict()
        return {
            **case.pop("geometry")._asdict(),
            **case,
            "allowed": self.allowed,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "tflops": {
                subject: {what: self.tflops(subject, what) for what in times if what != "plan"}
                for subject, times in self.seconds.items()
            },
            "first_calls": self.first_calls,
            "compilation": self.compilation,
            "errors": self.errors,
            "problems": self.problems,
            "wall": self.wall,
            "checked": self.checked,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        geometry = Geometry(**{name: data[name] for name in Geometry._fields})
        names = set(Case._fields) - {"geometry"}
        case = Case(geometry=geometry, **{name: data[name] for name in names})
        kept = ("pairs", "seconds", "first_calls", "compilation", "errors", "problems", "wall")
        return Row(case, **{name: data[name] for name in kept}, checked=data.get("checked", True))

    def joined(self, later: Row) -> Row:
        """This row with what a later one of the same case found: its figures win."""
        found = {
            name: {**getattr(self, name), **getattr(later, name)}
            for name in ("seconds", "first_calls", "compilation", "errors", "problems")
        }
        # What went wrong before and has a figure now is no problem any more.
        for what in [what for what in self.problems if what not in later.problems]:
            subject, _, part = what.partition(" ")
            if part in later.seconds.get(subject, {}):
                del found["problems"][what]
        checked = self.checked or later.checked
        return Row(self.case, self.pairs, **found, wall=self.wall + later.wall, checked=checked)


# ---- JSON ---------------------------------------------------------------------------------------


def describe_run(settings: Settings, commit: str | None = None) -> dict[str, Any]:
    """When, where and how the figures were made."""
    return {
        **describe_version(commit),
        "settings": settings._asdict(),
        "machine": machine.describe(),
        "gpu": None if settings.device == "cpu" else describe_gpu(),
    }


def describe_version(commit: str | None = None) -> dict[str, str | None]:
    """The date, and the commit: git's answer where it is not given, None where it has none."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or _output("git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"),
    }


def describe_gpu() -> dict[str, Any]:
    """The GPU and the software that it runs with."""
    import torch

    return {
        "name": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": machine.package_version("triton"),
    }


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def write(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes a run's figures, in one step: a run that is cut off leaves the rows before."""
    text = json.dumps({**run, "rows": [row.to_dict() for row in rows]}, indent=1) + "\n"
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read(*paths: Path) -> tuple[dict[str, Any], list[Row]]:
    """(the first file's run, all files' rows); a case that several files have is one row, in which
    later figures win. Raises ValueError for other files, and for files of different machines."""
    runs: list[dict[str, Any]] = []
    rows: dict[Case, Row] = {}
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        try:
            for row in map(Row.from_dict, data.pop("rows")):
                rows[row.case] = rows[row.case].joined(row) if row.case in rows else row
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not written by anymask bench --json ({error})") from None
        runs.append(data)
        if _processor(data) != _processor(runs[0]):
            raise ValueError(
                f"{path}: measured on {_processor(data)}, {paths[0]} on {_processor(runs[0])}"
            )
    about = runs[0]
    if len(runs) > 1:
        about["parts"] = [{"date": run.get("date"), "commit": run.get("commit")} for run in runs]
    return about, list(rows.values())


def _processor(run: dict[str, Any]) -> str:
    gpu, machine_ = run.get("gpu") or {}, run.get("machine") or {}
    return gpu.get("name") or machine_.get("cpu") or "an unknown machine"
