"""The command `anymask bench`: its options, its progress and what it prints."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from anymask import bench
from anymask.bench import report
from anymask.bench.suites import check_masks
from anymask.benchmark_masks import DEFAULT_SAMPLE, NAMES, SAMPLES

_DESCRIPTION = """\
Times the twelve masks of the FlashMask paper, plan, forward and backward apart, beside other
libraries in the same process. Every result is checked at the benchmarked size before it is timed.
TFLOP/s count allowed pairs exactly."""
_PEERS = ("flex", "cudnn", "sdpa")
_DEFAULT_PEERS = {"cpu": ("sdpa",), "cuda": ("flex", "cudnn")}
_LOG_WIDTH = 180  # of tables that no terminal shows


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part and part != "none")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


# fmt: off
def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `anymask bench`."""
    parser.description = _DESCRIPTION
    what = parser.add_argument_group("what to measure")
    what.add_argument("--suite", choices=bench.SUITES, help="a named set of sizes; default: "
                      "protocol on cuda, one size of its own on the CPU")
    what.add_argument("--masks", type=_names, default=NAMES, help="names, separated by commas")
    what.add_argument("--lengths", type=_numbers, default=(), help="of the suite's, or without a "
                      "suite any (default: 2048)")
    what.add_argument("--head-dims", type=_numbers, default=(), help="likewise (default: 128)")
    what.add_argument("--batch", type=int, help="without a suite (default: 1)")
    what.add_argument("--heads", type=int, help="without a suite (default: 8)")
    what.add_argument("--kv-heads", type=int, help="without a suite (default: as many as heads)")
    what.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                      help="default: float32 on the CPU, bfloat16 on cuda")
    what.add_argument("--sample", type=int, default=DEFAULT_SAMPLE,
                      help=f"the paper's layout of documents, 1 to {SAMPLES}")
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    how.add_argument("--passes", type=_names, default=bench.PASSES,
                     help="of plan, forward, backward (default: all)")
    how.add_argument("--forward-only", dest="passes", action="store_const",
                     const=("plan", "forward"), help="as --passes plan,forward")
    how.add_argument("--peers", type=_names, help=f"of {', '.join(_PEERS)}, or none (default: "
                     "sdpa on the CPU; flex, cudnn on cuda)")
    how.add_argument("--no-peers", dest="peers", action="store_const", const=())
    how.add_argument("--deterministic", action="store_true",
                     help="time the deterministic backward pass too")
    how.add_argument("--rounds", type=int, help="times a call is timed at most "
                     "(default: 5 on the CPU, 25 on cuda)")
    how.add_argument("--budget", type=float, help="seconds for timing one pass of a mask "
                     "(default: 10 on the CPU, 1 on cuda); three rounds run in any case")
    how.add_argument("--stop-after", type=float, metavar="SECONDS",
                     help="begin no further mask after so long")
    how.add_argument("--check-every-sample", action="store_true",
                     help="from 65536 tokens on too: compare all samples of a mask's documents "
                     "with a reference, not the first alone")
    how.add_argument("--compile-jobs", type=int,
                     help="processes that compile FlexAttention ahead (default: 8 on cuda, at most "
                     "half the cores; 0: compile when needed)")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, help="write all figures to this file, mask by mask")
    out.add_argument("--resume", action="store_true",
                     help="keep the rows that the file of --json has, measure those that it lacks")
    out.add_argument("--plot", type=Path, help="draw them (.png, .svg, .pdf)")
    out.add_argument("--commit", help="what the JSON names as commit; default: git's answer")
    out.add_argument("--from", dest="saved", type=Path, nargs="+", metavar="JSON",
                     help="measure nothing: print, draw and (with --json) join figures that --json "
                     "wrote")
    out.add_argument("--paper-table", type=Path, metavar="PAGE",
                     help="write a table beside the paper's figures between the marks of a page")
# fmt: on


def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status, 1 when a result was wrong."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, _LOG_WIDTH))
    if options.saved:
        about, rows = bench.read(*options.saved)
        if options.json is not None:
            bench.write(options.json, about, rows)
    else:
        settings, cases = _settings(options), _cases(options)
        if settings.device == "cpu":
            _same_threads()
        elif not _has_gpu():
            raise RuntimeError("--device cuda: torch finds no CUDA GPU here")
        about = bench.describe_run(settings, options.commit)
        rows = _measured(console, options, settings, cases, about)
    console.print(_where(about), highlight=False)
    for part in report.tables(about, rows):
        console.print(part, highlight=False)
    if options.json is not None:
        console.print(f"wrote {options.json}")
    if options.plot is not None:
        from anymask.bench import plot

        plot.draw(about, rows, options.plot)
        console.print(f"drew {options.plot}")
    if options.paper_table is not None:
        from anymask.bench import paper_table

        paper_table.write(options.paper_table, about, rows)
        console.print(f"wrote {options.paper_table}")
    return 1 if any(row.wrong for row in rows) else 0


# ---- options ------------------------------------------------------------------------------------


def _settings(options: argparse.Namespace) -> bench.Settings:
    cpu = options.device == "cpu"
    peers = _DEFAULT_PEERS[options.device] if options.peers is None else options.peers
    for name, given, known in (
        ("peers", peers, _PEERS), ("passes", options.passes, bench.PASSES),
    ):  # fmt: skip
        unknown = [value for value in given if value not in known]
        if unknown:
            raise ValueError(f"{name}: {', '.join(unknown)} unknown; there are {', '.join(known)}")
    jobs = options.compile_jobs
    if jobs is None:
        from anymask import machine

        jobs = 0 if cpu else min(8, machine.cores() // 2)
    return bench.Settings(
        device=options.device,
        passes=tuple(options.passes),
        peers=tuple(peers) if bench.has_torch() else (),
        deterministic=options.deterministic,
        rounds=options.rounds or (5 if cpu else 25),
        budget=options.budget or (10.0 if cpu else 1.0),
        compile_jobs=jobs,
        stop_after=options.stop_after,
        every_sample=options.check_every_sample,
    )


def _cases(options: argparse.Namespace) -> list[bench.Case]:
    own_sizes = {
        name: getattr(options, name)
        for name in ("batch", "heads", "kv_heads")
        if getattr(options, name) is not None
    }
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    name = options.suite
    if name is None and options.device == "cuda" and not own_sizes:
        name = "protocol"
    if name is not None:
        if own_sizes:
            raise ValueError(f"{', '.join(own_sizes)}: a suite has its own; leave --suite out")
        cases = bench.suite(
            name, masks=options.masks, lengths=options.lengths, head_dims=options.head_dims,
            sample=options.sample, dtype=dtype,
        )  # fmt: skip
        if not cases:
            raise ValueError(f"masks, lengths, head-dims: suite {name} has none of these")
        return cases
    check_masks(options.masks)
    heads = own_sizes.get("heads", 8)
    return [
        bench.Case(
            mask,
            bench.Geometry(
                length, own_sizes.get("batch", 1), heads, own_sizes.get("kv_heads", heads),
                head_dim, dtype,
            ),
            options.sample,
        )
        for head_dim in options.head_dims or (128,)
        for length in options.lengths or (2048,)
        for mask in options.masks
    ]  # fmt: skip


def _has_gpu() -> bool:
    if not bench.has_torch():
        return False
    import torch

    return torch.cuda.is_available()


def _same_threads() -> None:
    """torch and anymask measure with the same number of threads."""
    from anymask import machine

    if bench.has_torch():
        import torch

        torch.set_num_threads(machine.threads())


# ---- progress -----------------------------------------------------------------------------------


def _measured(
    console: Any,
    options: argparse.Namespace,
    settings: bench.Settings,
    cases: list[bench.Case],
    about: dict[str, Any],
) -> list[bench.Row]:
    """Runs the cases with a bar on a terminal, elsewhere with a line a mask."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    done: list[bench.Row] = []
    if options.resume:
        if options.json is None:
            raise ValueError("--resume: the file to go on with is that of --json")
        if options.json.exists():
            about_before, done = bench.read(options.json)
            about.update({name: about_before[name] for name in ("date", "commit")})
        cases = [case for case in cases if case not in {row.case for row in done}]
    started = time.perf_counter()
    with Progress(
        TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(cases))

        def finished(row: bench.Row) -> None:
            done.append(row)
            bar.advance(task)
            if options.json is not None:
                bench.write(options.json, about, done)
            if not console.is_terminal:
                elapsed = time.perf_counter() - started
                print(f"{elapsed:6.1f} s  {report.one_line(row)}", file=sys.stderr, flush=True)

        bench.run(cases, settings, lambda text: bar.update(task, description=text), finished)
    return done


def _where(about: dict[str, Any]) -> str:
    machine, gpu = about["machine"], about.get("gpu")
    if gpu is None:
        where = f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    else:
        where = (
            f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}, "
            f"triton {gpu['triton']}"
        )
    commit = f", commit {about['commit'][:12]}" if about.get("commit") else ""
    return f"{about['date']}, {where}, torch {machine['torch']}{commit}"
