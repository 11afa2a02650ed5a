"""Dynamic masks beside a plain causal mask and beside torch with a dense mask.

    python benchmarks/dynamic_masks.py                            # CPU: 8192 tokens, keep 512
    python benchmarks/dynamic_masks.py --device cuda --json FILE  # 32768 tokens, keep 1024 and 2048

The dynamic call is all of it: scores, selection, plan, gathers, attention, and its gradients to
query, key, value, dt_proj and A. Selection and plan are timed apart as well. torch gets the kept
keys and their bias as one dense mask, made beforehand, without a gradient: less work than the call
does. Before it is timed the result is compared with torch's in float32, for one key head; times are
medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anymask as am
import torch
from anymask import machine
from anymask.measuring import interleaved_medians
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention, softplus

TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 1e-2}


class Figures(NamedTuple):
    """One window at one length; seconds. Pairs as a share of all query and key pairs."""

    length: int
    keep: int
    density: float
    selection: float
    plan: float
    dynamic: float
    dynamic_training: float
    causal: float
    causal_training: float
    torch: float | None
    torch_training: float | None


class Inputs(NamedTuple):
    query: Any
    key: Any
    value: Any
    dt_proj: Any
    A: Any


def draw(options: argparse.Namespace, length: int) -> Inputs:
    """Random inputs, whose scores are random, too."""
    torch.manual_seed(0)
    place = {"dtype": getattr(torch, options.dtype), "device": options.device}
    heads, kv_heads, dim = options.heads, options.kv_heads, options.dim
    query = torch.randn(1, heads, length, dim, **place)
    key, value = (torch.randn(1, kv_heads, length, dim, **place) for _ in range(2))
    dt_proj = torch.randn(kv_heads, kv_heads * dim, **place) / math.sqrt(kv_heads * dim)
    A = torch.full((kv_heads,), 0.5, device=options.device)
    return Inputs(query, key, value, dt_proj, A)


def dynamic_call(inputs: Inputs, keep: int) -> Callable[[], Any]:
    return lambda: am.apply_dynamic_mask_attention(*inputs, keep_window_size=keep)


def causal_call(inputs: Inputs) -> Callable[[], Any]:
    return lambda: am.attention(*inputs[:3], am.causal(), layout="bhsd")


def training_call(call: Callable[[], Any], leaves: list[Any]) -> Callable[[], Any]:
    """Forward and backward."""
    gradient = torch.randn_like(call())
    return lambda: torch.autograd.grad(call(), leaves, gradient)


# ---- torch --------------------------------------------------------------------------------------


def scores_of(inputs: Inputs) -> Any:
    """float32 [1, kv_heads, length], as the call has them."""
    flat = inputs.value.transpose(1, 2).flatten(2)
    return inputs.A[:, None] * softplus((inputs.dt_proj @ flat.transpose(1, 2)).float())


def torch_call(inputs: Inputs, scores: Any, keep: int) -> Callable[[], Any]:
    """torch, a key head at a time, with dense masks [1, 1, length, length]: as many as it takes for
    a mask that differs from head to head."""
    query, key, value = inputs[:3]
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    hidden_from = am.top_keys(scores, keep).arrays[0]  # the row from which on a key is hidden
    rows = torch.arange(key.shape[2], device=query.device)
    dense = []
    for head in range(kv_heads):
        visible = (rows[:, None] >= rows) & (rows[:, None] < hidden_from[0, head, :, 0])
        bias = scores[0, head].exp().to(query.dtype).expand(visible.shape)
        dense.append(bias.masked_fill(~visible, float("-inf"))[None, None])

    def call() -> Any:
        parts = []
        for head, mask in enumerate(dense):
            some = slice(head * group, (head + 1) * group)
            one = [x[:, head : head + 1].expand(-1, group, -1, -1) for x in (key, value)]
            parts.append(scaled_dot_product_attention(query[:, some], *one, attn_mask=mask))
        return torch.cat(parts, 1)

    return call


def check(options: argparse.Namespace, inputs: Inputs, scores: Any, keep: int) -> None:
    """The first key head's queries against torch in float32."""
    group = options.heads // options.kv_heads
    query, key, value = (x.float() for x in inputs[:3])
    first = Inputs(query[:, :group], key[:, :1], value[:, :1], *inputs[3:])
    theirs = torch_call(first, scores[:, :1], keep)()
    own = dynamic_call(inputs, keep)()[:, :group]
    error = (own - theirs).abs().max().item()
    if not error <= TOLERANCE[options.dtype]:
        raise SystemExit(f"keep {keep}: differs from torch by {error:.2e}")


# ---- one window ---------------------------------------------------------------------------------


def measure(options: argparse.Namespace, length: int, keep: int) -> Figures:
    inputs = draw(options, length)
    scores = scores_of(inputs)
    calls = {"dynamic": dynamic_call(inputs, keep), "causal": causal_call(inputs)}
    if options.torch:
        check(options, inputs, scores, keep)
        calls["torch"] = torch_call(inputs, scores, keep)
    timing = {"device": options.device, "rounds": options.rounds, "budget": options.budget}
    times = interleaved_medians(calls, **timing)

    leaves = Inputs(*(x.detach().requires_grad_() for x in inputs))
    calls = {
        "dynamic": training_call(dynamic_call(leaves, keep), list(leaves)),
        "causal": training_call(causal_call(leaves), list(leaves[:3])),
    }
    if options.torch:
        dense = torch_call(Inputs(*leaves[:3], *inputs[3:]), scores, keep)
        calls["torch"] = training_call(dense, list(leaves[:3]))
    training = interleaved_medians(calls, **timing)

    mask = am.top_keys(scores, keep)

    def plan() -> am.Plan:
        return am.plan(
            mask, batch=1, q_heads=options.heads, kv_heads=options.kv_heads, q_len=length,
            kv_len=length, head_dim=options.dim, dtype=inputs.query.dtype, device=options.device,
        )  # fmt: skip

    parts = interleaved_medians(
        {"selection": lambda: am.top_keys(scores, keep), "plan": plan}, **timing
    )
    pairs = keep * length - keep * (keep - 1) // 2 if keep < length else length * (length + 1) // 2
    return Figures(
        length, keep, pairs / length**2, parts["selection"], parts["plan"], times["dynamic"],
        training["dynamic"], times["causal"], training["causal"], times.get("torch"),
        training.get("torch"),
    )  # fmt: skip


# ---- output -------------------------------------------------------------------------------------


def table_of(rows: list[Figures], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in (
        "S", "keep", "pairs", "select ms", "of call", "plan ms", "fwd ms", "causal", "torch",
        "x causal", "fwd+bwd ms", "causal", "torch", "x causal",
    ):  # fmt: skip
        table.add_column(name, justify="right")

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.2f}"

    for r in rows:
        table.add_row(
            str(r.length), str(r.keep), f"{r.density:.3f}", ms(r.selection),
            f"{r.selection / r.dynamic_training:.1%}", ms(r.plan), ms(r.dynamic), ms(r.causal),
            ms(r.torch), f"{r.causal / r.dynamic:.2f}", ms(r.dynamic_training),
            ms(r.causal_training), ms(r.torch_training),
            f"{r.causal_training / r.dynamic_training:.2f}",
        )  # fmt: skip
    return table


def machine_text(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return (
        f"{machine.cpu_name()}, {machine.threads()} threads, {machine.instruction_set()}, "
        f"torch {torch.__version__}"
    )


def main() -> None:
    options = parse()
    if options.device == "cpu":
        torch.set_num_threads(machine.threads())
    console = Console(width=140 if not sys.stdout.isatty() else None)
    cases = [(length, keep) for length in options.lengths for keep in options.keeps]
    rows = []
    with Progress(
        TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(cases))
        for length, keep in cases:
            bar.update(task, description=f"S={length} keep {keep}")
            rows.append(measure(options, length, keep))
            bar.advance(task)
    console.print(machine_text(options), highlight=False)
    title = (
        f"{options.dtype}, B=1, H={options.heads}, kv heads {options.kv_heads}, D={options.dim}; "
        "torch: a dense mask, made beforehand"
    )
    console.print(table_of(rows, title))
    if options.json:
        document = {
            "machine": {**machine.describe(), "device": machine_text(options)},
            "dtype": options.dtype,
            "heads": options.heads,
            "kv_heads": options.kv_heads,
            "dim": options.dim,
            "rows": [row._asdict() for row in rows],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=numbers, help="8192, or 32768 on cuda")
    parser.add_argument("--keeps", type=numbers, help="512, or 1024,2048 on cuda")
    parser.add_argument("--heads", type=int, help="8, or 32 on cuda")
    parser.add_argument("--kv-heads", type=int, help="2, or 8 on cuda")
    parser.add_argument("--dim", type=int, help="64, or 128 on cuda")
    parser.add_argument("--dtype", choices=list(TOLERANCE), help="float32, or bfloat16 on cuda")
    parser.add_argument("--rounds", type=int, default=7, help="times each is measured")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds a case and pass")
    parser.add_argument("--no-torch", dest="torch", action="store_false")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    defaults = {
        "lengths": [32768] if cuda else [8192],
        "keeps": [1024, 2048] if cuda else [512],
        "heads": 32 if cuda else 8,
        "kv_heads": 8 if cuda else 2,
        "dim": 128 if cuda else 64,
        "dtype": "bfloat16" if cuda else "float32",
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
