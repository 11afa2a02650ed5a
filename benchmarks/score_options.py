"""What score options cost: softcap, biases, sinks and dropout over the same call without them.

    python benchmarks/score_options.py                            # CPU: S=1024, D=64, no mask
    python benchmarks/score_options.py --device cuda --json FILE  # causal, S=8192, H=32, D=128

Forward and backward apart; a bias is timed with and without its own gradient. Before it is timed,
every result is compared for one key head of all batch entries with the definition in float32
(float64 on the CPU), by the rule of `anymask bench`; times are medians of interleaved rounds. What
is not supported is named, and the rest goes on. With ANYMASK_CPU_THREADS=1 the CPU's figures are
those of one thread.
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
from anymask.measuring import flops, interleaved_medians
from rich.table import Table
from score_reference import Expected

SEED = 7
PLAIN = "plain"
# Options whose cost has a target: at most this much over the plain call, in either pass.
LIMIT, LIMITED = 0.10, ("softcap", "sink", "dropout_p=0.1", "dropout_p=0.5")


class Case(NamedTuple):
    """One set of options. `learned`: the tensors among them that get a gradient."""

    name: str
    options: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    dropout_p: float = 0.0
    softcap: float = 0.0


CASES = (
    Case(PLAIN),
    Case("softcap", softcap=30.0),
    Case("sink", ("sink",), ("sink",)),
    Case("dropout_p=0.1", dropout_p=0.1),
    Case("dropout_p=0.5", dropout_p=0.5),
    Case("key_bias, its gradient", ("key_bias",), ("key_bias",)),
    Case("bias of every pair", ("bias",)),
    Case("bias, its gradient", ("bias",), ("bias",)),
)


class Figures(NamedTuple):
    """One case in one type; seconds, None where it failed. error: share of what is allowed."""

    dtype: str
    case: str
    forward: float | None
    backward: float | None
    forward_cost: float | None  # over the plain call, 0.1 for 10%
    backward_cost: float | None
    error: float | None
    problem: str | None


# ---- one type -----------------------------------------------------------------------------------


def draw(options: argparse.Namespace, dtype: Any) -> dict[str, Any]:
    """q, k, v, dout and every option's tensor."""
    generator = torch.Generator(options.device).manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device=options.device, dtype=dtype)

    batch, length, heads, dim = options.batch, options.length, options.heads, options.dim
    inputs = {
        "q": normal(batch, length, heads, dim),
        "k": normal(batch, length, options.kv_heads, dim),
        "v": normal(batch, length, options.kv_heads, dim),
        "dout": normal(batch, length, heads, dim),
        "key_bias": normal(batch, heads, length),
        "sink": normal(heads),
    }
    if any("bias" in case.options for case in options.cases):
        inputs["bias"] = normal(1, heads, length, length)
    return inputs


def leaves_of(case: Case, inputs: dict[str, Any]) -> dict[str, Any]:
    names = ("q", "k", "v", *case.learned)
    return {name: inputs[name].detach().requires_grad_() for name in names}


def call_of(case: Case, inputs: dict[str, Any], leaves: dict[str, Any], plan: Any) -> Any:
    given = {name: leaves.get(name, inputs[name]) for name in case.options}
    if case.dropout_p:
        given |= {"dropout_p": case.dropout_p, "seed": SEED}
    tensors = [leaves[name] for name in ("q", "k", "v")]
    given["softcap"] = case.softcap
    return lambda: am.attention(*tensors, plan=plan, return_lse=True, **given)


def gradients_of(out: Any, leaves: dict[str, Any], dout: Any) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True)


def measure(
    options: argparse.Namespace, dtype_name: str, say: Callable[[str], None]
) -> list[Figures]:
    """Every case in one type."""
    dtype = getattr(torch, dtype_name)
    inputs = draw(options, dtype)
    mask = am.causal() if options.causal else am.full()
    plan = am.plan(
        mask, batch=options.batch, q_heads=options.heads, kv_heads=options.kv_heads,
        q_len=options.length, kv_len=options.length, head_dim=options.dim, dtype=dtype,
        device=options.device,
    )  # fmt: skip
    calls: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "backward": {}}
    errors: dict[str, float] = {}
    problems: dict[str, str] = {}
    for case in options.cases:
        say(f"{dtype_name} {case.name}: checking")
        what = "forward"
        try:
            leaves = leaves_of(case, inputs)
            call = call_of(case, inputs, leaves, plan)
            out, lse = call()
            expected = Expected(
                inputs, case.options, case.learned if options.backward else None,
                causal=options.causal, softcap=case.softcap, dropout_p=case.dropout_p, seed=SEED,
            )  # fmt: skip
            errors[case.name] = expected.check({"out": out, "lse": lse})
            calls["forward"][case.name] = call
            if not options.backward:
                continue
            what = "backward"
            backward = gradients_of(out, leaves, inputs["dout"])
            found = {f"d{name}": x for name, x in zip(leaves, backward())}
            errors[case.name] = max(errors[case.name], expected.check(found))
            calls["backward"][case.name] = backward
        except Exception as error:  # not supported, no memory, wrong: named in the table
            text = " ".join(str(error).split())[:300]
            problems[case.name] = f"{what}: {type(error).__name__}: {text}"
        finally:
            out = lse = found = expected = None  # references and a bias's gradient take gigabytes
            release(options.device)
    times = {}
    for what, functions in calls.items():
        say(f"{dtype_name}: timing {what}")
        times[what] = interleaved_medians(
            functions, device=options.device, rounds=options.rounds, budget=options.budget
        )
    return [
        Figures(
            dtype_name, case.name, *(times[what].get(case.name) for what in times),
            *(cost(times[what], case.name) for what in times), errors.get(case.name),
            problems.get(case.name),
        )
        for case in options.cases
    ]  # fmt: skip


def cost(times: dict[str, float], name: str) -> float | None:
    if name not in times or PLAIN not in times:
        return None
    return times[name] / times[PLAIN] - 1


def release(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


# ---- output -------------------------------------------------------------------------------------


def table_of(options: argparse.Namespace, rows: list[Figures], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("options", no_wrap=True)
    for name in ("fwd ms", "TFLOP/s", "over plain", "bwd ms", "TFLOP/s", "over plain", "error"):
        table.add_column(name, justify="right")
    work = dict(zip(("forward", "backward"), flops(pairs_of(options), options.dim)))

    def part(row: Figures, what: str) -> tuple[str, str, str]:
        seconds, more = getattr(row, what), getattr(row, f"{what}_cost")
        if seconds is None:
            return "-", "-", "-"
        colour = ""
        if row.case in LIMITED and more is not None:
            colour = "green" if more <= LIMIT else "red"
        text = "" if more is None or row.case == PLAIN else f"{more:+.1%}"
        rate = f"{work[what] / seconds / 1e12:.{0 if options.device == 'cuda' else 3}f}"
        return f"{seconds * 1e3:.3f}", rate, f"[{colour}]{text}[/]" if colour else text

    for row in rows:
        error = "-" if row.error is None else f"{row.error:.2f}"
        table.add_row(row.case, *part(row, "forward"), *part(row, "backward"), error)
    return table


def pairs_of(options: argparse.Namespace) -> int:
    length = options.length
    pairs = length * (length + 1) // 2 if options.causal else length**2
    return pairs * options.batch * options.heads


def missed_targets(rows: list[Figures]) -> list[str]:
    return [
        f"{row.dtype} {row.case} {what}: {more:+.1%} (wanted at most {LIMIT:.0%})"
        for row in rows
        if row.case in LIMITED
        for what, more in (("forward", row.forward_cost), ("backward", row.backward_cost))
        if more is not None and more > LIMIT
    ]


def where_text(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        gpu = describe_gpu()
        return f"{gpu['name']}, driver {gpu['driver']}, torch {gpu['torch']}"
    return (
        f"{machine.cpu_name()}, threads: {machine.threads()}, {machine.instruction_set()}, "
        f"torch {torch.__version__}"
    )


def write(options: argparse.Namespace, rows: list[Figures]) -> None:
    sizes = ("length", "batch", "heads", "kv_heads", "dim", "causal", "rounds")
    document = {
        "machine": machine.describe(),
        "gpu": describe_gpu() if options.device == "cuda" else None,
        "sizes": {name: getattr(options, name) for name in sizes},
        "limit": LIMIT,
        "missed": missed_targets(rows),
        "rows": [row._asdict() for row in rows],
    }
    common.write_json(options.json, document)


def main() -> int:
    options = parse()
    if not common.is_ready(options.device):
        return 1
    console = common.console_of(140)
    rows: list[Figures] = []
    with common.progress(console, 48) as bar:
        task = bar.add_task("", total=len(options.dtypes) * (len(options.cases) + 2))

        def say(text: str) -> None:
            bar.update(task, description=text, advance=1)

        for dtype in options.dtypes:
            rows += measure(options, dtype, say)
            if options.json:
                write(options, rows)
    console.print(where_text(options), highlight=False)
    sizes = (
        f"{'causal' if options.causal else 'no mask'}, S={options.length}, B={options.batch}, "
        f"H={options.heads}/{options.kv_heads}, D={options.dim}"
    )
    for dtype in options.dtypes:
        group = [row for row in rows if row.dtype == dtype]
        console.print(table_of(options, group, f"{dtype}, {sizes}"))
    for row in rows:
        if row.problem:
            console.print(f"problem: {row.dtype} {row.case}: {row.problem}", markup=False)
    for text in missed_targets(rows):
        console.print(f"missed: {text}", markup=False, highlight=False)
    return 1 if any(WrongResult.__name__ in (row.problem or "") for row in rows) else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", type=names, help="beginnings of the names of options, to choose")
    parser.add_argument("--length", type=int, help="1024, or 8192 on cuda")
    parser.add_argument("--batch", type=int, help="1, or 4 on cuda")
    parser.add_argument("--heads", type=int, help="4, or 32 on cuda")
    parser.add_argument("--kv-heads", type=int, help="as many as heads")
    parser.add_argument("--dim", type=int, help="64, or 128 on cuda")
    parser.add_argument("--mask", choices=["full", "causal"], help="full, or causal on cuda")
    parser.add_argument("--dtypes", type=names, help="float32,bfloat16, or bfloat16 on cuda")
    parser.add_argument("--rounds", type=int, default=30, help="times each is measured")
    parser.add_argument("--budget", type=float, help="seconds a pass: 60, or 6 on cuda")
    parser.add_argument("--forward-only", dest="backward", action="store_false")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    defaults = {
        "length": 8192 if cuda else 1024,
        "batch": 4 if cuda else 1,
        "heads": 32 if cuda else 4,
        "dim": 128 if cuda else 64,
        "mask": "causal" if cuda else "full",
        "dtypes": ["bfloat16"] if cuda else ["float32", "bfloat16"],
        "budget": 6.0 if cuda else 60.0,
    }
    common.take_defaults(options, defaults)
    options.kv_heads = options.kv_heads or options.heads
    options.causal = options.mask == "causal"
    wanted = options.only
    options.cases = [
        case
        for case in CASES
        if wanted is None or case.name == PLAIN or case.name.startswith(tuple(wanted))
    ]
    return options


if __name__ == "__main__":
    sys.exit(main())
