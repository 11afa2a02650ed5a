"""What the benchmark scripts share: options by device, progress bars, results in a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from anymask import machine
from anymask.bench.results import describe_version
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def take_defaults(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Values for the options that were not given."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def is_ready(device: str) -> bool:
    """Whether torch can use the device; says so where it cannot. The CPU gets all its threads."""
    if device == "cpu":
        torch.set_num_threads(machine.threads())
    elif not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA GPU here", file=sys.stderr)
        return False
    return True


def console_of(width: int) -> Console:
    """A console; of that width where its output goes to a file."""
    return Console(width=width if not sys.stdout.isatty() else None)


def progress(console: Console, width: int = 40) -> Progress:
    """A bar of tasks, with `width` columns for what is being done."""
    return Progress(
        TextColumn(f"{{task.description:<{width}}}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, transient=True,
    )  # fmt: skip


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """The document, with date and commit before it."""
    text = json.dumps({**describe_version(), **document}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
