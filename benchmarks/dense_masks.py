"""Dense boolean masks, one a batch entry, beside the full mask and beside torch with the same mask.

    python benchmarks/dense_masks.py                            # CPU: S=1024, B=2, H=8, D=64
    python benchmarks/dense_masks.py --device cuda --json FILE  # S=8192, B=4, H=32, D=128, bf16

Two masks [batch, 1, length, length]: random pairs, in which no tile can be skipped, so the time is
compared with that of no mask at all; and the causal documents of the FlashMask paper's layouts, as
if nobody had told the library what they are. The plan, which reads the mask and packs it to bits,
is timed apart. Results under a mask are compared with the definition before they are timed, those
of torch too, by the rule of `anymask bench`; times are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anymask as am
import common
import numpy as np
import torch
from anymask import machine
from anymask.bench.check import GRADIENTS, Expected, WrongResult
from anymask.bench.results import describe_gpu
from anymask.benchmark_masks import SAMPLES, benchmark_mask
from anymask.measuring import flops, interleaved_medians
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

MASKS = ("random", "causal_document")
LEAST_SHARE = 0.85  # of the full mask's speed, under a random mask
BACKENDS = {"cpu": ("math",), "cuda": ("cudnn", "efficient")}
_BACKEND_NAMES = {"cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


class Figures(NamedTuple):
    """One mask; seconds by subject: anymask, full (anymask without a mask) and torch's backends."""

    mask: str
    density: float
    plan: float
    forward: dict[str, float]
    backward: dict[str, float]
    errors: dict[str, float]  # as a share of what is allowed
    problems: dict[str, str]

    def share_of_full(self, what: str) -> float | None:
        """The full mask's time over this one's."""
        times = getattr(self, what)
        if "full" not in times or "anymask" not in times:
            return None
        return times["full"] / times["anymask"]

    def times_torch(self, what: str) -> float | None:
        """How many times faster than the faster of torch's backends."""
        times = getattr(self, what)
        theirs = [times[name] for name in times if name not in ("anymask", "full")]
        return min(theirs) / times["anymask"] if theirs and "anymask" in times else None


def allowed(options: argparse.Namespace, name: str) -> Any:
    """bool [batch, 1, length, length] on the device."""
    batch, length = options.batch, options.length
    if name == "random":
        generator = torch.Generator(options.device).manual_seed(1)
        shape = (batch, 1, length, length)
        return torch.rand(shape, generator=generator, device=options.device) < options.density
    parts = [
        benchmark_mask(name, length, sample=entry % SAMPLES + 1).mask.to_dense(q_len=length)
        for entry in range(batch)
    ]
    return torch.from_numpy(np.concatenate(parts)).to(options.device)


def sdpa_call(backend: str, leaves: list[Any], mask: Any) -> Callable[[], Any]:
    """torch with a dense mask; [batch, heads, length, head_dim]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call() -> Any:
        return scaled_dot_product_attention(*leaves, attn_mask=mask)

    if backend not in _BACKEND_NAMES:
        return call

    def chosen() -> Any:
        with sdpa_kernel(getattr(SDPBackend, _BACKEND_NAMES[backend])):
            return call()

    return chosen


class Measurement:
    """One mask under all subjects."""

    def __init__(self, options: argparse.Namespace, name: str, say: Callable[[str], None]) -> None:
        self.options, self.name = options, name
        self.say = lambda text: say(f"{name}: {text}")
        self.mask = allowed(options, name)
        self.calls: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "backward": {}}
        self.errors: dict[str, float] = {}
        self.problems: dict[str, str] = {}

    def run(self) -> Figures:
        options = self.options
        dtype = getattr(torch, options.dtype)
        generator = torch.Generator(options.device).manual_seed(0)
        shape = (options.batch, options.length, options.heads, options.dim)
        q, k, v, dout = (
            torch.randn(shape, generator=generator, device=options.device, dtype=dtype)
            for _ in range(4)
        )

        def make_plan(mask: Any) -> Any:
            return am.plan(
                mask, batch=options.batch, q_heads=options.heads, kv_heads=options.heads,
                q_len=options.length, kv_len=options.length, head_dim=options.dim, dtype=dtype,
                device=options.device,
            )  # fmt: skip

        self.say("reference")
        expected = Expected(self.mask, q, k, v, dout)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        plans = {"anymask": make_plan(am.dense(self.mask)), "full": make_plan(am.full())}
        for subject, plan in plans.items():
            call = functools.partial(am.attention, *leaves, plan=plan)
            self._take(subject, call, leaves, dout, expected if subject == "anymask" else None)
        if options.torch:
            turned = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
            dout = dout.transpose(1, 2).contiguous()
            for subject in BACKENDS[options.device]:
                call = sdpa_call(subject, turned, self.mask)
                self._take(subject, call, turned, dout, expected, turned=True)
        del expected
        times = {}
        for what, calls in self.calls.items():
            self.say(f"timing {what}")
            times[what] = self._medians(calls)
        self.say("timing the plan")
        plan = self._medians({"plan": lambda: make_plan(am.dense(self.mask))})["plan"]
        density = float(self.mask.sum(dtype=torch.int64)) / self.mask.numel()
        failed = {"errors": self.errors, "problems": self.problems}
        return Figures(self.name, density, plan, **times, **failed)

    def _take(
        self, subject: str, call: Callable[[], Any], leaves: list[Any], dout: Any,
        expected: Expected | None, turned: bool = False,
    ) -> None:  # fmt: skip
        """Checks a subject and puts its calls among those to be timed. turned: heads come first."""

        def checked(results: dict[str, Any]) -> None:
            if expected is None:
                return
            if turned:
                results = {name: x.transpose(1, 2) for name, x in results.items()}
            before = self.errors.get(subject, 0.0)
            self.errors[subject] = max(before, expected.check(results))

        self.say(f"checking {subject}")
        what = "forward"
        try:
            out = call()
            checked({"out": out})
            self.calls[what][subject] = call
            what = "backward"

            def backward() -> Any:
                return torch.autograd.grad(out, leaves, dout, retain_graph=True)

            checked(dict(zip(GRADIENTS, backward())))
            self.calls[what][subject] = backward
        except Exception as error:  # not supported, no memory, wrong: named with the figures
            text = " ".join(str(error).split())[:300]
            self.problems[f"{subject} {what}"] = f"{type(error).__name__}: {text}"
        if self.options.device == "cuda":
            torch.cuda.empty_cache()

    def _medians(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        options = self.options
        return interleaved_medians(
            calls, device=options.device, rounds=options.rounds, budget=options.budget
        )


# ---- output -------------------------------------------------------------------------------------


def table_of(options: argparse.Namespace, rows: list[Figures], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("mask", no_wrap=True)
    backends = [name for name in BACKENDS[options.device] if any(name in r.forward for r in rows)]
    headings = ["allowed", "plan ms"]
    for short in ("fwd", "bwd"):
        headings += [f"{short} ms", "full", *(f"torch {name}" for name in backends)]
        headings += ["of full", "x torch", "TFLOP/s"]
    for heading in headings:
        table.add_column(heading, justify="right")
    places = options.batch * options.heads * options.length**2

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.2f}"

    for row in rows:
        cells = [f"{row.density:.3f}", f"{row.plan * 1e3:.3f}"]
        work = flops(round(row.density * places), options.dim)
        for what, amount in zip(("forward", "backward"), work):
            share, factor = row.share_of_full(what), row.times_torch(what)
            times = getattr(row, what)
            own = times.get("anymask")
            cells += [ms(own), ms(times.get("full")), *(ms(times.get(name)) for name in backends)]
            cells.append("-" if share is None else f"{share:.0%}")
            cells.append("-" if factor is None else f"{factor:.1f}")
            cells.append("-" if own is None else f"{amount / own / 1e12:.3g}")
        table.add_row(row.mask, *cells)
    return table


def missed_targets(rows: list[Figures]) -> list[str]:
    return [
        f"{row.mask} {what}: {share:.0%} of the full mask's speed (wanted {LEAST_SHARE:.0%})"
        for row in rows
        if row.mask == "random"
        for what in ("forward", "backward")
        for share in [row.share_of_full(what)]
        if share is not None and share < LEAST_SHARE
    ]


def write(options: argparse.Namespace, rows: list[Figures]) -> None:
    sizes = ("length", "batch", "heads", "dim", "dtype", "density", "rounds")
    document = {
        "machine": machine.describe(),
        "gpu": describe_gpu() if options.device == "cuda" else None,
        "sizes": {name: getattr(options, name) for name in sizes},
        "missed": missed_targets(rows),
        "rows": [
            {
                **row._asdict(),
                "share_of_full": {w: row.share_of_full(w) for w in ("forward", "backward")},
                "times_torch": {w: row.times_torch(w) for w in ("forward", "backward")},
            }
            for row in rows
        ],
    }
    common.write_json(options.json, document)


def main() -> int:
    options = parse()
    if not common.is_ready(options.device):
        return 1
    if options.device == "cpu":
        where = f"{machine.cpu_name()}, {machine.threads()} threads, torch {torch.__version__}"
    else:
        gpu = describe_gpu()
        where = f"{gpu['name']}, driver {gpu['driver']}, torch {gpu['torch']}"
    console = common.console_of(160)
    rows: list[Figures] = []
    with common.progress(console, 44) as bar:
        task = bar.add_task("", total=len(options.masks))
        for name in options.masks:
            say = lambda text: bar.update(task, description=text)  # noqa: E731
            rows.append(Measurement(options, name, say).run())
            bar.advance(task)
            if options.json:
                write(options, rows)
    console.print(where, highlight=False)
    title = (
        f"{options.dtype}, S={options.length}, B={options.batch}, H={options.heads}, "
        f"D={options.dim}; TFLOP/s by allowed pairs"
    )
    console.print(table_of(options, rows, title))
    for row in rows:
        for what, text in row.problems.items():
            console.print(f"problem: {row.mask}: {what}: {text}", markup=False)
    for text in missed_targets(rows):
        console.print(f"missed: {text}", markup=False, highlight=False)
    wrong = [
        text
        for row in rows
        for what, text in row.problems.items()
        if what.startswith("anymask") and WrongResult.__name__ in text
    ]
    return 1 if wrong else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--masks", type=names, default=list(MASKS), help=", ".join(MASKS))
    parser.add_argument("--density", type=float, default=0.5, help="of the random mask")
    parser.add_argument("--length", type=int, help="1024, or 8192 on cuda")
    parser.add_argument("--batch", type=int, help="2, or 4 on cuda")
    parser.add_argument("--heads", type=int, help="8, or 32 on cuda")
    parser.add_argument("--dim", type=int, help="64, or 128 on cuda")
    parser.add_argument("--dtype", help="float32, or bfloat16 on cuda")
    parser.add_argument("--rounds", type=int, default=20, help="times each is measured")
    parser.add_argument("--budget", type=float, help="seconds a mask and pass: 20, or 4 on cuda")
    parser.add_argument("--no-torch", dest="torch", action="store_false")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    defaults = {
        "length": 8192 if cuda else 1024,
        "batch": 4 if cuda else 2,
        "heads": 32 if cuda else 8,
        "dim": 128 if cuda else 64,
        "dtype": "bfloat16" if cuda else "float32",
        "budget": 4.0 if cuda else 20.0,
    }
    common.take_defaults(options, defaults)
    unknown = [name for name in options.masks if name not in MASKS]
    if unknown:
        parser.error(f"--masks: {', '.join(unknown)} unknown; there are {', '.join(MASKS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
