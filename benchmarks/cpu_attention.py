"""anymask beside torch on the CPU, forward and backward, in one run, with this project's targets.

    python benchmarks/cpu_attention.py                          # everything: about an hour
    python benchmarks/cpu_attention.py --lengths 1024,4096 --dtypes float32 --dims 64 --no-flex

Peers: torch's scaled_dot_product_attention with a dense mask (is_causal for causal, no mask for
full) and FlexAttention compiled for the CPU (forward: it has no backward there). Every result is
compared with torch's before it is timed; times are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anymask as am
import common
import torch
from anymask import machine
from anymask.benchmark_masks import BenchmarkMask, benchmark_mask
from anymask.measuring import flops, interleaved_medians
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

MASKS = (
    "full",
    "causal",
    "causal_document",
    "share_question",
    "global_sliding_window",
    "random_eviction",
)
HEADS, TILE = 8, 128
MEMORY_LENGTH, MEMORY_LIMIT_MIB = 65536, 256.0
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


class Figures(NamedTuple):
    """One mask at one size; seconds. `peers` and `peers_backward` by name."""

    dtype: str
    dim: int
    length: int
    mask: str
    density: float
    tile_density: float
    plan: float
    forward: float
    backward: float | None
    peers: dict[str, float]
    peers_backward: dict[str, float]
    forward_peak_share: float
    backward_peak_share: float | None


class Target(NamedTuple):
    """One target's outcome."""

    what: str
    value: float
    limit: float
    at_most: bool

    @property
    def passed(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


# ---- peers --------------------------------------------------------------------------------------


def flex_attention_call(case: BenchmarkMask, q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """FlexAttention compiled, with its block mask made from the same tile classes."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    length = q.shape[2]
    starts = torch.from_numpy(case.indices[0, 0, :, 0].copy())

    def causal_until(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i >= j) & (i < starts[j])

    def global_window(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (i < 16) | (j < 16) | ((i - j <= length // 16) & (j - i <= length // 16))

    allowed = global_window if case.name == "global_sliding_window" else causal_until
    assert case.name in MASKS
    classes = torch.from_numpy(case.mask.tile_classes(q_len=length, tile=TILE))

    def tiles(kind: int) -> tuple[Any, Any]:
        chosen = (classes == kind).int()
        order = torch.argsort(chosen, stable=True, dim=-1, descending=True)
        return chosen.sum(-1, dtype=torch.int32), order.int()

    block_mask = BlockMask.from_kv_blocks(*tiles(3), *tiles(1), BLOCK_SIZE=TILE, mask_mod=allowed)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    plain = case.name == "full"
    return lambda: compiled(q, k, v, block_mask=None if plain else block_mask)


def sdpa_call(case: BenchmarkMask, q: Any, k: Any, v: Any, dense: Any) -> Callable[[], Any]:
    if case.name == "full":
        return lambda: scaled_dot_product_attention(q, k, v)
    if case.name == "causal":
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=dense)


# ---- one case -----------------------------------------------------------------------------------


def measure(
    options: argparse.Namespace, dtype_name: str, dim: int, length: int, name: str, peak: float
) -> Figures:
    dtype = getattr(torch, dtype_name)
    case = benchmark_mask(name, length)
    counts = case.mask.statistics(q_len=length, tile=TILE)
    mask = case.mask.to("cpu")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, dim, dtype=dtype) for _ in range(3))
    bshd = [x.transpose(1, 2) for x in (q, k, v)]

    def make_plan() -> am.Plan:
        return am.plan(
            mask, batch=1, q_heads=HEADS, kv_heads=HEADS, q_len=length, kv_len=length,
            head_dim=dim, dtype=dtype,
        )  # fmt: skip

    plan = make_plan()
    needs_dense = name not in ("full", "causal")
    dense = mask.to_dense(q_len=length) if needs_dense else None
    calls: dict[str, Callable[[], Any]] = {
        "anymask": lambda: am.attention(*bshd, plan=plan),
        "sdpa": sdpa_call(case, q, k, v, dense),
    }
    if options.flex:
        calls["flex"] = flex_attention_call(case, q, k, v)
    check(name, dtype_name, {key: call() for key, call in calls.items()})
    times = interleaved_medians(calls, rounds=options.rounds, budget=options.budget)
    plan_time = interleaved_medians({"plan": make_plan}, rounds=7, budget=2.0)["plan"]

    backward: dict[str, float] = {}
    if options.backward:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        outputs = {
            "anymask": am.attention(*(x.transpose(1, 2) for x in leaves), plan=plan),
            "sdpa": sdpa_call(case, *leaves, dense)(),
        }
        calls = {key: gradient_call(out, leaves) for key, out in outputs.items()}
        backward = interleaved_medians(calls, rounds=options.rounds, budget=options.budget)
    work, backward_work = flops(counts.visible_pairs * HEADS, dim)
    own, own_backward = times.pop("anymask"), backward.pop("anymask", None)
    return Figures(
        dtype_name, dim, length, name, counts.density, counts.tile_density, plan_time, own,
        own_backward, times, backward, work / own / peak,
        backward_work / own_backward / peak if own_backward else None,
    )  # fmt: skip


def check(name: str, dtype: str, results: dict[str, Any]) -> None:
    own = results["anymask"].transpose(1, 2).float()
    for peer, theirs in results.items():
        if peer != "anymask":
            error = (own - theirs.float()).abs().nan_to_num(0.0).max().item()
            if error > TOLERANCE[dtype]:
                raise SystemExit(f"{name} {dtype}: differs from {peer} by {error:.2e}")


def gradient_call(out: Any, leaves: list[Any]) -> Callable[[], Any]:
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


# ---- memory -------------------------------------------------------------------------------------


def memory_probe(dim: int) -> None:
    """Prints MiB beyond inputs and outputs of a forward and backward call (in its own process)."""

    def status(field: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
        raise RuntimeError(f"/proc/self/status has no {field}")

    def reset_peak() -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def mib(*tensors: Any) -> float:
        return sum(x.numel() * x.element_size() for x in tensors) / 2**20

    small = torch.zeros(1, 64, HEADS, dim, requires_grad=True)
    am.attention(small, small, small, am.causal()).sum().backward()  # threads, library
    mask = benchmark_mask("causal_document", MEMORY_LENGTH).mask.to("cpu")
    shape = (1, MEMORY_LENGTH, HEADS, dim)
    leaves = [torch.randn(shape).requires_grad_() for _ in range(3)]
    gradient = torch.randn(shape)
    reset_peak()
    before = status("VmRSS")
    out, lse = am.attention(*leaves, mask, return_lse=True)
    forward = status("VmHWM") - before - mib(out, lse)
    reset_peak()
    before = status("VmRSS")
    gradients = torch.autograd.grad(out, leaves, gradient)
    backward = status("VmHWM") - before - mib(*gradients)
    print(json.dumps({"forward": forward, "backward": backward}))


def measure_memory(dim: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory-probe", str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- targets ------------------------------------------------------------------------------------


def targets(rows: list[Figures], memory: dict[str, float]) -> list[Target]:
    found = []
    full = {(r.dtype, r.dim, r.length): r for r in rows if r.mask == "full"}
    for r in rows:
        where = f"{r.mask} {r.dtype} D={r.dim} S={r.length}"
        passes = [("forward", r.forward, r.peers), ("backward", r.backward, r.peers_backward)]
        if r.mask in ("full", "causal"):
            for name, own, peers in passes:
                if own is not None:
                    least = 1.0 if name == "forward" else 1.5
                    ratio = min(peers.values()) / own
                    found.append(Target(f"{where}: {name} / best peer", ratio, least, False))
            continue
        base = full.get((r.dtype, r.dim, r.length))
        for name, own, peers in passes:
            if own is None:
                continue
            dense = base and (base.forward if name == "forward" else base.backward)
            if dense:
                cost = own / (dense * r.tile_density)
                found.append(Target(f"{where}: {name} / tiles of full", cost, 1.3, True))
            if r.density < 0.2:
                ratio = peers["sdpa"] / own
                found.append(Target(f"{where}: {name} / dense mask", ratio, 3.0, False))
    for r in rows:
        if r.length == 16384:
            where = f"{r.mask} {r.dtype} D={r.dim}"
            found.append(Target(f"{where}: plan / forward", r.plan / r.forward, 0.02, True))
    for name, value in memory.items():
        what = f"causal_document S={MEMORY_LENGTH}: {name} MiB beyond inputs and outputs"
        found.append(Target(what, value, MEMORY_LIMIT_MIB, True))
    return found


# ---- output -------------------------------------------------------------------------------------


def table_of(rows: list[Figures], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("mask", no_wrap=True)
    for name in (
        "allowed", "plan ms", "fwd ms", "sdpa", "flex", "x best", "peak", "bwd ms", "sdpa",
        "x sdpa", "peak",
    ):  # fmt: skip
        table.add_column(name, justify="right")

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.2f}"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    for r in rows:
        peer = r.peers_backward.get("sdpa")
        table.add_row(
            r.mask, f"{r.density:.3f}", ms(r.plan), ms(r.forward), ms(r.peers["sdpa"]),
            ms(r.peers.get("flex")), f"{min(r.peers.values()) / r.forward:.2f}",
            share(r.forward_peak_share), ms(r.backward), ms(peer),
            f"{peer / r.backward:.2f}" if peer and r.backward else "-",
            share(r.backward_peak_share),
        )  # fmt: skip
    return table


def report(console: Console, rows: list[Figures], found: list[Target]) -> None:
    groups: dict[tuple, list[Figures]] = {}
    for row in rows:
        groups.setdefault((row.dtype, row.dim, row.length), []).append(row)
    for (dtype, dim, length), group in groups.items():
        console.print(table_of(group, f"{dtype}, D={dim}, S={length}, B=1, H={HEADS}"))
    missed = [target for target in found if not target.passed]
    for target in missed:
        sign = "<=" if target.at_most else ">="
        console.print(
            f"[red]miss[/] {target.what}: {target.value:.3g} (wanted {sign} {target.limit:g})",
            highlight=False,
        )
    console.print(
        f"[bold]{len(found) - len(missed)} of {len(found)} targets passed, {len(missed)} missed[/]"
    )


def main() -> None:
    options = parse()
    if options.memory_probe:
        memory_probe(options.memory_probe)
        return
    torch.set_num_threads(machine.threads())
    console = common.console_of(140)
    peaks = {name: machine.measure_cpu_peak(name) * 1e9 for name in options.dtypes}
    cases = [
        (dtype, dim, length, name)
        for dtype in options.dtypes
        for dim in options.dims
        for length in options.lengths
        for name in options.masks
    ]
    rows, memory = [], {}
    with common.progress(console, 52) as bar:
        task = bar.add_task("", total=len(cases) + options.memory)
        for dtype, dim, length, name in cases:
            bar.update(task, description=f"{name} {dtype} D={dim} S={length}")
            rows.append(measure(options, dtype, dim, length, name, peaks[dtype]))
            bar.advance(task)
        if options.memory:
            bar.update(task, description=f"memory at S={MEMORY_LENGTH}")
            memory = measure_memory(64)
    found = targets(rows, memory)
    console.print(
        f"{machine.cpu_name()}, {machine.threads()} threads, {machine.instruction_set()}, "
        f"torch {torch.__version__}; arithmetic peak "
        + ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in peaks.items()),
        highlight=False,
    )
    report(console, rows, found)
    if options.json:
        document = {
            "machine": machine.describe(),
            "peak_gflops": {name: value / 1e9 for name, value in peaks.items()},
            "rows": [row._asdict() for row in rows],
            "memory_mib": memory,
            "targets": [
                {**target._asdict(), "passed": target.passed}
                for target in found
                if math.isfinite(target.value)
            ],
        }
        common.write_json(options.json, document)


def parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    def numbers(text: str) -> list[int]:
        return [int(part) for part in names(text)]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=names, default=list(MASKS))
    parser.add_argument("--dtypes", type=names, default=["float32", "bfloat16"])
    parser.add_argument("--dims", type=numbers, default=[64, 128])
    parser.add_argument("--lengths", type=numbers, default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=7, help="times each is measured")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a case and pass")
    parser.add_argument("--no-flex", dest="flex", action="store_false")
    parser.add_argument("--no-backward", dest="backward", action="store_false")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--memory-probe", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
