"""The four calls that other systems' users know, whole, beside torch with a dense mask.

    python benchmarks/moving.py --json FILE                # CPU: S=2048, 8 query and 2 key heads
    python benchmarks/moving.py --device cuda --json FILE  # S=8192, B=2, 32 and 8 heads, D=128
    python benchmarks/moving.py --from FILE...             # their figures into docs/moving/*.md

A call is all that a user of the system writes: mask, plan and attention, and its gradients to q, k
and v. torch's scaled_dot_product_attention gets the same mask as a dense tensor, made beforehand.
Results and gradients are compared with torch's in float32 (float64 on the CPU) before they are
timed; times are medians of interleaved rounds, memory is a training call's peak (on a GPU), torch's
with its mask.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anymask as am
import common
import torch
from anymask import bench, machine
from anymask.bench import report
from anymask.bench.check import WrongResult, compare
from anymask.bench.results import describe_gpu
from anymask.benchmark_masks import benchmark_mask
from anymask.measuring import interleaved_medians
from dynamic_calls import Inputs, hidden_from, scores_of
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[1]
PASSES = ("forward", "training")
WIDTH = 104  # of a page's lines
PAGES = {
    "flashmask": "Causal documents as `startend_row_indices`",
    "custom_masks": "Causal documents as a dense mask",
    "flexible_masks": "Causal documents as `eq` and `ek`",
    "dynamic_masks": "Each query keeps an eighth of the keys, by scores as published",
}
_PROTOCOL = ROOT / "benchmarks" / "results" / "2026-11-20-h200-protocol.json"


class Case(NamedTuple):
    """One page's call: on leaves [batch, heads, length, head_dim], and torch's mask."""

    page: str
    leaves: list[Any]
    call: Callable[[], Any]
    mask: Any  # bool or additive, [batch, 1 or heads, length, length]


def cases(options: argparse.Namespace) -> list[Case]:
    torch.manual_seed(0)
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    batch, length, dim = options.batch, options.length, options.dim
    shapes = [(batch, heads, length, dim) for heads in (options.heads, *2 * [options.kv_heads])]

    def leaves() -> list[Any]:
        return [torch.randn(shape, **place).requires_grad_() for shape in shapes]

    documents = benchmark_mask("causal_document", length)
    indices = torch.from_numpy(documents.indices).to(options.device)
    dense = torch.from_numpy(documents.mask.to_dense(q_len=length)).to(options.device)
    ids = -1 - torch.from_numpy(documents.documents[0].ids.copy()).to(options.device)
    ids = ids.reshape(1, 1, length)

    def flashmask(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return am.flashmask_attention(q, k, v, indices, causal=True).transpose(1, 2)

    calls = {
        "flashmask": flashmask,
        "custom_masks": lambda q, k, v: am.flash_attention_custom_mask(q, k, v, dense),
        "flexible_masks": lambda q, k, v: am.flexible_attention(
            q, k, v, causal=True, eq=ids, ek=ids, score_func_mode=1
        ),
    }
    found = []
    for page, call in calls.items():
        mine = leaves()
        found.append(Case(page, mine, lambda call=call, mine=mine: call(*mine), dense))
    keep, mine = length // 8, leaves()
    dt_proj = torch.randn(options.kv_heads, options.kv_heads * dim, **place)
    inputs = Inputs(*mine, dt_proj / (options.kv_heads * dim) ** 0.5,
                    torch.full((options.kv_heads,), 0.5, device=options.device))  # fmt: skip
    found.append(
        Case(
            "dynamic_masks", mine,
            lambda: am.apply_dynamic_mask_attention(*inputs, keep_window_size=keep),
            dynamic_mask(inputs, keep),
        )
    )  # fmt: skip
    return [case for case in found if case.page in options.pages]


def dynamic_mask(inputs: Inputs, keep: int) -> Any:
    """exp(score) where a key is kept, else -inf; [batch, heads, length, length]."""
    with torch.no_grad():
        scores = scores_of(inputs)
        rows = torch.arange(scores.shape[-1], device=scores.device)
        visible = (rows[:, None] >= rows) & (
            rows[:, None] < hidden_from(scores, keep)[:, :, None, :]
        )
        bias = scores.exp()[:, :, None, :].masked_fill(~visible, float("-inf"))
        group = inputs.query.shape[1] // inputs.key.shape[1]
        return bias.to(inputs.query.dtype).repeat_interleave(group, 1)


# ---- measuring ----------------------------------------------------------------------------------


def torch_call(case: Case, leaves: list[Any], mask: Any) -> Any:
    """SDPA; key heads are repeated, since not every backend with a mask takes groups."""
    q, k, v = leaves
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def results(call: Callable[[], Any], leaves: list[Any], dout: Any) -> dict:
    out = call()
    # The dynamic scores depend on value, which torch's mask does not know: dq and dk alone.
    gradients = torch.autograd.grad(out, leaves[:2], dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(("dq", "dk"), gradients))}


def check(options: argparse.Namespace, case: Case, dout: Any) -> float:
    """The largest error as a share of what is allowed; raises WrongResult."""
    precise_type = torch.float64 if options.device == "cpu" else torch.float32
    found = [results(case.call, case.leaves, dout)]
    for dtype in (precise_type, case.leaves[0].dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in case.leaves]
        mask = case.mask if case.mask.dtype == torch.bool else case.mask.to(dtype)
        call = functools.partial(torch_call, case, leaves, mask)
        found.append(results(call, leaves, dout))
    own, ref, low = found
    return max(compare(name, own[name], ref[name], low[name]) for name in own)


def measure(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """One page's figures; seconds by pass and subject."""
    dout = torch.randn_like(case.leaves[0])
    row: dict[str, Any] = {"page": case.page, "error": check(options, case, dout)}
    theirs = [x.detach().clone().requires_grad_() for x in case.leaves]
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {"anymask": case.call, "torch": lambda: torch_call(case, theirs, case.mask)}
    }
    subjects = {"anymask": case.leaves, "torch": theirs}
    calls["training"] = {
        name: lambda call=call, mine=subjects[name]: torch.autograd.grad(call(), mine, dout)
        for name, call in calls["forward"].items()
    }
    for what, functions in calls.items():
        row[what] = interleaved_medians(
            functions, device=options.device, rounds=options.rounds, budget=options.budget
        )
    row["bytes"] = {}
    if options.device == "cuda":
        for name, call in calls["training"].items():
            row["bytes"][name] = peak_bytes(call)
        row["bytes"]["torch"] += case.mask.numel() * case.mask.element_size()
    return row


def peak_bytes(call: Callable[[], Any]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- output -------------------------------------------------------------------------------------


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.3g}" if value < 0.1 else f"{value * 1e3:.0f}"


def cells(row: dict[str, Any]) -> list[str]:
    found = []
    for what in PASSES:
        own, torchs = row[what].get("anymask"), row[what].get("torch")
        found += [ms(own), ms(torchs), f"{torchs / own:.1f}" if own and torchs else "-"]
    sizes = [row["bytes"].get(name) for name in ("anymask", "torch")]
    return [*found, *("-" if size is None else f"{size / 2**20:.0f}" for size in sizes)]


HEADINGS = ("forward ms", "torch", "times", "with backward ms", "torch", "times", "MiB", "torch")


def where(document: dict[str, Any]) -> str:
    gpu = document["gpu"]
    if gpu:
        return f"{gpu['name']}, torch {gpu['torch']}"
    found = document["machine"]
    return f"{found['cpu']}, {found['threads']} threads, torch {found['torch']}"


def sizes_of(document: dict[str, Any]) -> str:
    return "S={length}, B={batch}, {heads} query and {kv_heads} key heads, D={dim}, {dtype}".format(
        **document["sizes"]
    )


def page_text(page: str, documents: list[dict[str, Any]]) -> str:
    """What stands between the marks of a page."""
    intro = (
        f"{PAGES[page]}: the whole call, with gradients to q, k and v, beside torch's "
        "`scaled_dot_product_attention` with the same mask as a dense tensor, made beforehand. "
        "Memory is the peak of a training call, torch's with its mask."
    )
    lines = ["", textwrap.fill(intro, WIDTH, break_long_words=False), ""]
    lines += ["| | " + " | ".join(HEADINGS) + " |", "| --- |" + " ---: |" * len(HEADINGS)]
    for document in documents:
        for row in document["rows"]:
            if row["page"] == page:
                name = f"{where(document)}; {sizes_of(document)}"
                lines.append(f"| {name} | " + " | ".join(cells(row)) + " |")
    for name, wanted, option in (("a CPU", False, ""), ("a GPU", True, " --device cuda")):
        if not any(bool(document["gpu"]) == wanted for document in documents):
            empty = " | ".join("-" for _ in HEADINGS)
            lines.append(
                f"| {name}: not measured yet (`python benchmarks/moving.py{option}`) | {empty} |"
            )
    if page == "flashmask":
        text = textwrap.fill(against_flashmask(), WIDTH, break_long_words=False)
        lines += ["", text]
    return "\n".join([*lines, ""])


def against_flashmask() -> str:
    """Recorded figures of FlashMask's Hopper kernel beside this library's, in two sentences."""
    about, rows = bench.read(_PROTOCOL)
    parts = []
    for geometry, lines in report.by_geometry(rows).items():
        ratios = [
            report.geometric_mean([line.ratio(what, ["flashmask_v3"]) for line in lines])
            for what in report.TIMED
        ]
        parts.append(f"{ratios[0]:.2f} / {ratios[1]:.2f} at S = {geometry.length}")
    return (
        "Against FlashMask's own Hopper kernel (V3), forward / backward, over the twelve masks, on "
        f"an {about['gpu']['name']}: {', '.join(parts)} times as fast (geometric means; V3 as "
        "recorded on such a GPU). [paper_table.md](../paper_table.md) has every mask, and the "
        "figures that the paper published."
    )


def write_pages(paths: list[Path], folder: Path) -> None:
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for page in PAGES:
        path = folder / f"{page}.md"
        text = path.read_text(encoding="utf-8")
        before, begin, rest = text.partition("<!-- measured -->")
        _, end, after = rest.partition("<!-- /measured -->")
        if not begin or not end:
            raise SystemExit(f"{path}: has no <!-- measured --> and <!-- /measured -->")
        path.write_text(f"{before}{begin}\n{page_text(page, documents)}\n{end}{after}", "utf-8")


def main() -> int:
    options = parse()
    if options.saved is not None:
        write_pages(options.saved, ROOT / "docs" / "moving")
        return 0
    if not common.is_ready(options.device):
        return 1
    console = common.console_of(150)
    sizes = ("length", "batch", "heads", "kv_heads", "dim", "dtype", "rounds")
    document: dict[str, Any] = {
        "machine": machine.describe(),
        "gpu": describe_gpu() if options.device == "cuda" else None,
        "sizes": {name: getattr(options, name) for name in sizes},
        "rows": [],
    }
    table = Table(title=f"{where(document)}; {sizes_of(document)}", title_justify="left")
    table.add_column("page", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    wrong = []
    with console.status("measuring") as status:
        for case in cases(options):
            status.update(f"measuring {case.page}")
            try:
                row = measure(options, case)
            except WrongResult as error:
                wrong.append(f"wrong: {case.page}: {error}")
                continue
            document["rows"].append(row)
            table.add_row(case.page, *cells(row))
            if options.json:
                common.write_json(options.json, document)
    console.print(table)
    for text in wrong:
        console.print(text, markup=False)
    return 1 if wrong else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--pages", type=lambda text: text.split(","), default=list(PAGES))
    parser.add_argument("--length", type=int, help="2048, or 8192 on cuda")
    parser.add_argument("--batch", type=int, help="1, or 2 on cuda")
    parser.add_argument("--heads", type=int, help="8, or 32 on cuda")
    parser.add_argument("--kv-heads", type=int, help="2, or 8 on cuda")
    parser.add_argument("--dim", type=int, help="64, or 128 on cuda")
    parser.add_argument("--dtype", help="float32, or bfloat16 on cuda")
    parser.add_argument("--rounds", type=int, default=9, help="times each is measured")
    parser.add_argument("--budget", type=float, help="seconds a page and pass: 20, or 2 on cuda")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--from", dest="saved", type=Path, nargs="*", metavar="JSON",
                        help="measure nothing: write these figures into docs/moving")  # fmt: skip
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    defaults = {
        "length": 8192 if cuda else 2048,
        "batch": 2 if cuda else 1,
        "heads": 32 if cuda else 8,
        "kv_heads": 8 if cuda else 2,
        "dim": 128 if cuda else 64,
        "dtype": "bfloat16" if cuda else "float32",
        "budget": 2.0 if cuda else 20.0,
    }
    common.take_defaults(options, defaults)
    return options


if __name__ == "__main__":
    sys.exit(main())
