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
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        geometry = Geometry(**{name: data[name] for name in Geometry._fields})
        names = set(Case._fields) - {"geometry"}
        case = Case(geometry=geometry, **{name: data[name] for name in names})
        kept = ("pairs", "seconds", "first_calls", "compilation", "errors", "problems", "wall")
        return Row(case, **{name: data[name] for name in kept})


# ---- JSON ---------------------------------------------------------------------------------------


def describe_run(settings: Settings, commit: str | None = None) -> dict[str, Any]:
    """Where and how the figures were made."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit or _output("git", "-C", os.path.dirname(__file__), "rev-parse", "HEAD"),
        "settings": settings._asdict(),
        "machine": machine.describe(),
        "gpu": None if settings.device == "cpu" else describe_gpu(),
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
    """(the first file's run, all files' rows). Raises ValueError for other files."""
    runs, rows = [], []
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        try:
            rows += [Row.from_dict(row) for row in data.pop("rows")]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not written by anymask bench --json ({error})") from None
        runs.append(data)
    return runs[0], rows
