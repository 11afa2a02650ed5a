"""The command: trains twice, shows progress, writes the report, ends with its path."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from anymask.demo import config as configs
from anymask.demo.config import Config

_TORCH_SECONDS = {"cpu": 65.0, "cuda": 60.0}  # torch's share of three minutes


class DemoError(Exception):
    """What the user reads instead of a traceback."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anymask demo",
        description="Trains a small byte-level language model on the Python standard library's "
        "source twice from the same start, with torch's attention under a dense mask and with "
        "anymask, and reports losses, speed and memory of both.",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="training steps (default: up to 24, on a GPU 100, as many as torch's run does in "
        "about a minute)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-report"),
        metavar="FOLDER",
        help="where the report goes (default: demo-report)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if anymask runs there, else the CPU (default)",
    )
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes: a test")
    return parser


def _cuda_problem() -> str:
    """Why a GPU cannot be used here; empty when it can."""
    import torch

    import anymask as am

    if not torch.cuda.is_available():
        return "torch finds no CUDA GPU"
    try:
        q = torch.randn(1, 128, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        am.attention(q, q, q, am.causal()).float().sum().backward()
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is: the CPU still works
        return f"anymask does not run on the GPU: {error}"
    return ""


def _choose(options: argparse.Namespace, console: Console) -> Config:
    if options.steps is not None and options.steps < 1:
        raise DemoError(f"--steps: got {options.steps}, at least 1 is needed")
    if not -(2**63) <= options.seed < 2**63:
        raise DemoError(f"--seed: got {options.seed}, a 64-bit integer is needed")
    problem = "" if options.device == "cpu" else _cuda_problem()
    if options.device == "cuda" and problem:
        raise DemoError(f"--device cuda: {problem}")
    if problem and not problem.startswith("torch"):
        console.print(f"[yellow]Using the CPU: {problem}[/]", highlight=False)
    base = configs.CPU if options.device == "cpu" or problem else configs.CUDA
    if options.tiny:
        base = configs.TINY.but(device=base.device, dtype=base.dtype)
    chosen = base.but(seed=options.seed, sample=0 if options.tiny else 200)
    if options.steps is None:
        return chosen.but(seconds=_TORCH_SECONDS[base.device])
    return chosen.but(steps=options.steps)


def _train(config: Config, progress: Progress) -> object:
    """One training process; returns its Run."""
    from anymask.demo.results import Run

    run = Run(config)
    name = {"torch": "torch, dense mask", "anymask": "anymask"}[config.implementation]
    task = progress.add_task(name, total=config.steps, figures="starting")
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "anymask.demo.train", config.to_json()],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("{"):  # whatever a library has to say
                    continue
                run.add(json.loads(line))
                figures = (
                    f"loss {run.losses[-1]:.3f}   {run.tokens_per_second:>9,.0f} tokens a second"
                )
                progress.update(task, completed=len(run.losses), figures=figures)
            process.wait()
        finally:
            process.kill()
            process.wait()
        progress.update(task, total=len(run.losses))
        if process.returncode:
            errors.seek(0)
            raise DemoError(
                f"training with {config.implementation} failed with status {process.returncode}:\n"
                + errors.read().strip()[-4000:]
            )
    return run


def _facts(config: Config, parameters: int, total_seconds: float) -> list[tuple[str, str]]:
    import torch

    import anymask as am
    from anymask import machine

    processor = f"{machine.cpu_name()}, {machine.cores()} cores"
    if config.device == "cuda":
        memory = torch.cuda.get_device_properties("cuda").total_memory / 1024**3
        trained_on = [("trained on", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB")]
        trained_on.append(("processor", processor))
    else:
        uses = f"anymask uses {machine.instruction_set()}"
        trained_on = [("trained on", f"the CPU: {processor}; {uses}")]
    return [
        *trained_on,
        ("software", f"anymask {am.__version__}, torch {torch.__version__}, "
         f"Python {platform.python_version()}"),
        ("model", f"{parameters:,} parameters: {config.layers} layers, width {config.width}, "
         f"{config.heads} heads of {config.head_dim}; {config.dtype}"),
        ("text", "the Python standard library's source files of up to "
         f"{config.longest_document:,} bytes, whole files packed into sequences of "
         f"{config.length:,} bytes, {config.batch} a step"),
        ("optimizer", f"AdamW, learning rate {config.learning_rate:g} after a short rise"),
        ("seed", str(config.seed)),
        ("whole demo", f"{total_seconds:.0f} seconds"),
    ]  # fmt: skip


def _where(config: Config) -> str:
    if config.device == "cpu":
        return f"the CPU in {config.dtype}"
    import torch

    return f"the GPU ({torch.cuda.get_device_name()}) in {config.dtype}"


def _summary(both: object) -> Table:
    from anymask.demo.results import text_of_bytes

    table = Table(title="The same training run", title_justify="left", title_style="bold")
    for name, justify in (("", "left"), ("torch", "right"), ("anymask", "right"), ("", "right")):
        table.add_column(name, justify=justify)
    torch, anymask = both.torch, both.anymask
    table.add_row(
        "tokens a second",
        f"{torch.tokens_per_second:,.0f}",
        f"{anymask.tokens_per_second:,.0f}",
        f"{both.speedup:.1f} x as fast",
    )
    table.add_row(
        "peak memory",
        text_of_bytes(torch.peak_bytes),
        text_of_bytes(anymask.peak_bytes),
        f"{anymask.peak_bytes / max(torch.peak_bytes, 1):.0%} of torch's",
    )
    table.add_row("first loss", f"{torch.losses[0]:.4f}", f"{anymask.losses[0]:.4f}", "")
    table.add_row(
        f"loss at step {len(anymask.losses)}",
        f"{torch.losses[-1]:.4f}",
        f"{anymask.losses[-1]:.4f}",
        f"at most {both.largest_difference:.1e} apart",
    )
    return table


def _run(options: argparse.Namespace, console: Console) -> Path:
    begin = time.perf_counter()
    if importlib.util.find_spec("torch") is None:
        raise DemoError("PyTorch is needed: pip install torch")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output: cannot make the folder {options.output}: {error}") from error

    from anymask.demo import corpus
    from anymask.demo.report import render
    from anymask.demo.results import Comparison, MaskView

    config = _choose(options, console)
    documents = corpus.read_documents(config.longest_document)
    sequences = corpus.pack(documents, config.length, config.seed)
    view = MaskView.of(sequences[0])
    console.print(
        f"Training a byte-level language model twice on {len(documents)} source files of Python's "
        f"standard library, sequences of {config.length:,} bytes, on {_where(config)}.",
        highlight=False,
    )
    with Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    ) as progress:
        torch = _train(config.but(implementation="torch", sample=0), progress)
        steps = len(torch.losses)
        anymask = _train(config.but(implementation="anymask", steps=steps, seconds=None), progress)
    both = Comparison(torch, anymask)
    facts = _facts(config, anymask.parameters, time.perf_counter() - begin)
    path = options.output / "report.html"
    path.write_text(render(both, view, facts), encoding="utf-8")
    figures = {**both.figures(), "facts": dict(facts)}
    (options.output / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    console.print()
    console.print(_summary(both))
    return path.resolve()


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    console = Console()
    try:
        path = _run(options, console)
    except (DemoError, RuntimeError) as error:
        print(f"anymask demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("anymask demo: stopped", file=sys.stderr)
        return 130
    print(f"Report: {path}")
    return 0
