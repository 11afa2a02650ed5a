"""Dynamic masks beside a plain causal mask and beside torch with a dense mask.

    python benchmarks/dynamic_masks.py                            # CPU: 8192 tokens, keep 512
    python benchmarks/dynamic_masks.py --device cuda --json FILE  # 32768 tokens, keep 1024 and 2048

The dynamic call is all of it: scores, selection, plan, gathers, attention, and its gradients to
query, key, value, dt_proj and A. The causal call makes its plan, too. Selection and plan are timed
apart as well. torch gets the kept keys and their bias as one dense mask a key head, made
beforehand, without a gradient: less work than the call does; of its backends the faster one
counts. On a GPU the last rows are of the longest sequence whose dense masks fit into its memory
and give torch's right result.

Before it is timed, a call is compared, for its first key head, with the definition in float32
(float64 on the CPU) by the rule of `anymask bench`, and the selection with sorted prefixes. Times
are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anymask as am
import common
import torch
from anymask import machine
from anymask.bench.check import WrongResult
from anymask.bench.results import describe_gpu
from anymask.measuring import interleaved_medians
from dynamic_calls import (
    Inputs,
    causal_call,
    check,
    draw,
    dynamic_call,
    fastest_torch_call,
    largest_length,
    scores_of,
    training_call,
)
from rich.table import Table

DTYPES = ("float32", "bfloat16", "float16")
PASSES = ("forward", "training")
# Targets by device: times faster than causal, than torch, and the selection's share at most.
TARGETS = {"cpu": (4.0, None, None), "cuda": (6.0, 20.0, 0.10)}


class Figures(NamedTuple):
    """One window at one length; seconds by subject: dynamic, causal, torch. `training`: forward and
    backward."""

    length: int
    keep: int
    density: float  # allowed pairs as a share of all query and key pairs
    selection: float
    plan: float
    forward: dict[str, float]
    training: dict[str, float]
    torch_backend: dict[str, str]
    error: float  # of the call, as a share of what is allowed
    problems: dict[str, str]
    largest: bool  # whether this is the longest sequence that torch's masks leave room for

    def times_faster(self, what: str, than: str) -> float | None:
        times = getattr(self, what)
        return times[than] / times["dynamic"] if than in times and "dynamic" in times else None

    def selection_share(self, what: str) -> float | None:
        whole = getattr(self, what).get("dynamic")
        return self.selection / whole if whole else None


def measure(
    options: argparse.Namespace, length: int, keep: int, say: Callable[[str], None], largest: bool
) -> Figures:
    """Times one window at one length. Raises WrongResult."""
    inputs = draw(options, length)
    scores = scores_of(inputs)
    problems: dict[str, str] = {}
    say("checking")
    error = check(inputs, scores, keep)
    backends: dict[str, str] = {}
    leaves = Inputs(*(x.detach().requires_grad_() for x in inputs))
    dense = Inputs(*leaves[:3], *inputs[3:])
    dout = torch.randn_like(inputs.query)

    def torch_call(what: str) -> dict[str, Callable[[], Any]]:
        if not options.torch:
            return {}
        say(f"torch, {what}")
        gradient = dout if what == "training" else None
        try:
            backends[what], call = fastest_torch_call(dense, scores, keep, gradient)
        except RuntimeError as failure:  # no memory, no backend that takes it
            problems[f"torch {what}"] = " ".join(str(failure).split())[:300]
            release(options)
            return {}
        return {"torch": call}

    timing = {"device": options.device, "rounds": options.rounds, "budget": options.budget}
    calls = {"dynamic": dynamic_call(inputs, keep), "causal": causal_call(inputs)}
    calls |= torch_call("forward")
    say("timing forward")
    forward = interleaved_medians(calls, **timing)
    calls.clear()
    calls["dynamic"] = training_call(dynamic_call(leaves, keep), list(leaves), dout)
    calls["causal"] = training_call(causal_call(leaves), list(leaves[:3]), dout)
    calls |= torch_call("training")
    say("timing forward and backward")
    training = interleaved_medians(calls, **timing)
    calls.clear()
    release(options)

    mask = am.top_keys(scores, keep)

    def plan() -> am.Plan:
        return am.plan(
            mask, batch=1, q_heads=options.heads, kv_heads=options.kv_heads, q_len=length,
            kv_len=length, head_dim=options.dim, dtype=inputs.query.dtype, device=options.device,
        )  # fmt: skip

    say("timing selection and plan")
    parts = {"selection": lambda: am.top_keys(scores, keep), "plan": plan}
    parts_times = interleaved_medians(parts, **{**timing, "rounds": 3 * options.rounds})
    pairs = keep * length - keep * (keep - 1) // 2 if keep < length else length * (length + 1) // 2
    return Figures(
        length, keep, pairs / length**2, *parts_times.values(), forward, training, backends, error,
        problems, largest,
    )  # fmt: skip


def release(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.empty_cache()


# ---- output -------------------------------------------------------------------------------------


def table_of(rows: list[Figures], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("S", "keep", "pairs", "select ms", "plan ms"):
        table.add_column(name, justify="right")
    for what in ("fwd", "fwd+bwd"):
        for name in (f"{what} ms", "select", "causal", "torch", "x causal", "x torch"):
            table.add_column(name, justify="right")

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.2f}"

    def factor(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    for r in rows:
        cells = [str(r.length), str(r.keep), f"{r.density:.3f}", ms(r.selection), ms(r.plan)]
        for what in PASSES:
            times = getattr(r, what)
            share = r.selection_share(what)
            cells += [ms(times.get("dynamic")), "-" if share is None else f"{share:.1%}"]
            cells += [ms(times.get(subject)) for subject in ("causal", "torch")]
            cells += [factor(r.times_faster(what, subject)) for subject in ("causal", "torch")]
        table.add_row(*cells)
    return table


def missed_targets(device: str, rows: list[Figures]) -> list[str]:
    """Factors over causal at the stated lengths, over torch at the longest it can hold."""
    causal, dense, share = TARGETS[device]
    missed = []
    for row in rows:
        where = f"S={row.length} keep {row.keep}"
        for what in PASSES:
            wanted = [] if row.largest else [("causal", causal)]
            wanted += [("torch", dense)] if row.largest and dense else []
            for subject, least in wanted:
                factor = row.times_faster(what, subject)
                if factor is not None and factor < least:
                    missed.append(f"{where}, {what}: {factor:.1f} x {subject} (wanted {least:g})")
            part = row.selection_share(what)
            if share and part and part > share:
                missed.append(f"{where}, {what}: selection {part:.1%} (wanted {share:.0%} at most)")
    return missed


def where_text(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        gpu = describe_gpu()
        memory = torch.cuda.mem_get_info()[1] / 2**30
        return f"{gpu['name']}, {memory:.0f} GiB, driver {gpu['driver']}, torch {gpu['torch']}"
    return (
        f"{machine.cpu_name()}, {machine.threads()} threads, {machine.instruction_set()}, "
        f"torch {torch.__version__}"
    )


def write(options: argparse.Namespace, rows: list[Figures]) -> None:
    sizes = ("dtype", "heads", "kv_heads", "dim", "rounds")
    document = {
        "machine": {**machine.describe(), "device": where_text(options)},
        "gpu": describe_gpu() if options.device == "cuda" else None,
        **{name: getattr(options, name) for name in sizes},
        "missed": missed_targets(options.device, rows),
        "rows": [
            {
                **row._asdict(),
                "times_faster": {
                    subject: {what: row.times_faster(what, subject) for what in PASSES}
                    for subject in ("causal", "torch")
                },
                "selection_share": {what: row.selection_share(what) for what in PASSES},
            }
            for row in rows
        ],
    }
    common.write_json(options.json, document)


def main() -> int:
    options = parse()
    if not common.is_ready(options.device):
        return 1
    console = common.console_of(170)
    cases = [(length, keep, False) for length in options.lengths for keep in options.keeps]
    rows: list[Figures] = []
    wrong: list[str] = []
    lost: list[str] = []
    with common.progress(console, 48) as bar:
        task = bar.add_task("", total=len(cases) + options.largest * len(options.keeps))

        def measure_all(cases: list[tuple[int, int, bool]]) -> None:
            for length, keep, largest in cases:
                where = f"S={length} keep {keep}"

                def say(text: str, where: str = where) -> None:
                    bar.update(task, description=f"{where}: {text}")

                try:
                    rows.append(measure(options, length, keep, say, largest))
                except WrongResult as error:
                    wrong.append(f"wrong: {where}: {error}")
                except torch.OutOfMemoryError as error:
                    lost.append(f"problem: {where}: {' '.join(str(error).split())[:200]}")
                bar.advance(task)
                release(options)
                if options.json:
                    write(options, rows)

        measure_all(cases)
        if options.largest:
            bar.update(task, description="the longest sequence for torch")
            longest = largest_length(options)
            if longest:
                measure_all([(longest, keep, True) for keep in options.keeps])
    console.print(where_text(options), highlight=False)
    title = (
        f"{options.dtype}, B=1, H={options.heads}, kv heads {options.kv_heads}, D={options.dim}; "
        "torch: a dense mask a key head, made beforehand"
    )
    console.print(table_of(rows, title))
    for length in {row.length for row in rows if row.largest}:
        console.print(f"S={length}: the longest that torch's masks leave room for", highlight=False)
    for row in rows:
        for what, text in row.problems.items():
            console.print(f"problem: S={row.length} keep {row.keep}: {what}: {text}", markup=False)
    for text in [f"missed: {text}" for text in missed_targets(options.device, rows)] + lost + wrong:
        console.print(text, markup=False, highlight=False)
    return 1 if wrong else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=numbers, help="8192, or 32768 on cuda")
    parser.add_argument("--keeps", type=numbers, help="512, or 1024,2048 on cuda")
    parser.add_argument("--heads", type=int, help="8, or 32 on cuda")
    parser.add_argument("--kv-heads", type=int, help="2, or 8 on cuda")
    parser.add_argument("--dim", type=int, help="64, or 128 on cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="float32, or bfloat16 on cuda")
    parser.add_argument("--rounds", type=int, default=7, help="times each is measured")
    parser.add_argument("--budget", type=float, help="seconds a case and pass: 30, or 3 on cuda")
    parser.add_argument("--no-torch", dest="torch", action="store_false")
    parser.add_argument("--no-largest", dest="largest", action="store_false",
                        help="leave out the longest sequence whose dense masks fit")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    options.largest = options.largest and options.torch and cuda
    defaults = {
        "lengths": [32768] if cuda else [8192],
        "keeps": [1024, 2048] if cuda else [512],
        "heads": 32 if cuda else 8,
        "kv_heads": 8 if cuda else 2,
        "dim": 128 if cuda else 64,
        "dtype": "bfloat16" if cuda else "float32",
        "budget": 3.0 if cuda else 30.0,
    }
    common.take_defaults(options, defaults)
    return options


if __name__ == "__main__":
    sys.exit(main())
