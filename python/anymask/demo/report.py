"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from anymask.demo import pictures
from anymask.demo.results import Comparison, MaskView, text_of_bytes
from anymask.drawing import ALL, COLOURS, SOME


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{MIDDLE DOT}" for c in text)


def _rows(facts: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts
    )


def _figure_row(name: str, torch: str, anymask: str, ratio: str) -> str:
    cells = "".join(f'<td class="number">{escape(x)}</td>' for x in (torch, anymask, ratio))
    return f"<tr><th>{escape(name)}</th>{cells}</tr>"


def _card(name: str, value: str, detail: str) -> str:
    return (
        f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<em>{escape(detail)}</em></div>"
    )


def _cards(both: Comparison) -> str:
    torch, anymask = both.torch, both.anymask
    return "".join(
        (
            _card(
                "Training speed",
                f"{both.speedup:.1f}\N{MULTIPLICATION SIGN}",
                f"{torch.tokens_per_second:,.0f} \N{RIGHTWARDS ARROW} "
                f"{anymask.tokens_per_second:,.0f} tokens a second",
            ),
            _card(
                "Peak memory of training",
                text_of_bytes(anymask.peak_bytes),
                f"torch: {text_of_bytes(torch.peak_bytes)}",
            ),
            _card(
                "Largest difference of the losses",
                f"{both.largest_difference:.1e}",
                f"over {len(anymask.losses)} steps, in nats",
            ),
        )
    )


def _title(both: Comparison) -> str:
    if both.speedup >= 1.05:
        return f"The same training run, {both.speedup:.1f} times as fast"
    return "The same training run, with torch and with anymask"


def _mask_legend(view: MaskView) -> str:
    counts = view.statistics
    none = counts.tiles - counts.all_tiles - counts.some_tiles
    entries = (
        (COLOURS[ALL], "all pairs allowed", counts.all_tiles, "computed without a mask"),
        (COLOURS[SOME], "some", counts.some_tiles, "computed with the mask's bits"),
        ("var(--line)", "none", none, "skipped"),
    )
    return "".join(
        f'<span><i style="background:{color}"></i>{escape(name)}: {count:,} '
        f"{'tile' if count == 1 else 'tiles'}, {escape(what)}</span>"
        for color, name, count, what in entries
    )


def _figures(both: Comparison) -> str:
    torch, anymask = both.torch, both.anymask

    def ratio(a: float, b: float) -> str:
        return f"{a / b:.1f}\N{MULTIPLICATION SIGN}" if b > 0 else "\N{EN DASH}"

    def milliseconds(run_seconds: float) -> str:
        return f"{1000 * run_seconds:,.1f} ms"

    masks = [
        sum(run.mask_seconds[1:] or run.mask_seconds) / max(len(run.mask_seconds) - 1, 1)
        for run in (torch, anymask)
    ]
    return "".join(
        (
            _figure_row(
                "tokens a second",
                f"{torch.tokens_per_second:,.0f}",
                f"{anymask.tokens_per_second:,.0f}",
                ratio(anymask.tokens_per_second, torch.tokens_per_second),
            ),
            _figure_row(
                "a training step",
                milliseconds(torch.step_seconds),
                milliseconds(anymask.step_seconds),
                ratio(torch.step_seconds, anymask.step_seconds),
            ),
            _figure_row(
                "of which: dense mask / plan",
                milliseconds(masks[0]),
                milliseconds(masks[1]),
                ratio(masks[0], masks[1]),
            ),
            _figure_row(
                "peak memory of training",
                text_of_bytes(torch.peak_bytes),
                text_of_bytes(anymask.peak_bytes),
                ratio(torch.peak_bytes, anymask.peak_bytes),
            ),
            _figure_row(
                "last loss, nats a byte",
                f"{torch.losses[-1]:.6f}",
                f"{anymask.losses[-1]:.6f}",
                "",
            ),
        )
    )


def render(both: Comparison, view: MaskView, facts: Sequence[tuple[str, str]]) -> str:
    """The page's HTML."""
    torch, anymask = both.torch, both.anymask
    config = anymask.config
    documents = len(view.sequence.names)
    memory_what = "device memory" if config.device != "cpu" else "resident memory"
    sample = ""
    if anymask.sample:
        sample = (
            f"<p style='margin:18px 0 0'>What the model writes after {len(anymask.losses)} steps "
            f"on {len(anymask.losses) * config.batch * config.length:,} bytes (it has only begun "
            f"to learn):</p><pre>{escape(_printable(anymask.sample))}</pre>"
        )
    values = {
        "title": escape(_title(both)),
        "lead": "A byte-level language model, trained twice from the same start on the same "
        "batches: once with torch's scaled_dot_product_attention under a dense mask, once with "
        "anymask. The text is the Python standard library's own source, each file a document.",
        "cards": _cards(both),
        "mask_text": f"The first sequence: {config.length:,} bytes, {documents} documents. A byte "
        "sees what comes before it in its own document. "
        f"{100 * view.statistics.density:.1f}% of all pairs are allowed and "
        f"{100 * view.statistics.tile_density:.1f}% of the tiles hold an allowed pair: anymask "
        "computes only those. With a dense mask every tile is computed.",
        "mask_pairs": pictures.mask_pairs(
            view.pairs, view.sequence.cu_seqlens, view.sequence.names
        ),
        "mask_tiles": pictures.mask_tiles(view.tiles, config.length),
        "mask_legend": _mask_legend(view),
        "loss_text": f"Mean cross entropy a byte, in nats: from {anymask.losses[0]:.2f} to "
        f"{anymask.losses[-1]:.2f} in {len(anymask.losses)} steps. Both compute exact attention, "
        "so the curves lie on top of each other; what differs is the order of sums in "
        f"{config.dtype}. Largest difference: {both.largest_difference:.2e}.",
        "losses": pictures.losses(torch.losses, anymask.losses),
        "losses_over_time": pictures.losses_over_time(torch.points, anymask.points),
        "differences": pictures.differences(both.differences),
        "speed_text": "A whole training step: making the mask (each batch packs other documents), "
        "forward, backward and optimizer; the mean over all steps but the first. A token is a "
        f"byte. Memory: the peak of {memory_what} above what was in use before the first step. "
        "Each run had a process of its own, one after the other.",
        "speed_bars": pictures.bars(
            torch.tokens_per_second,
            anymask.tokens_per_second,
            (f"{torch.tokens_per_second:,.0f}", f"{anymask.tokens_per_second:,.0f}"),
            "training speed",
        ),
        "memory_bars": pictures.bars(
            torch.peak_bytes,
            anymask.peak_bytes,
            (text_of_bytes(torch.peak_bytes), text_of_bytes(anymask.peak_bytes)),
            "peak memory",
        ),
        "figures": _figures(both),
        "facts": _rows(facts),
        "sample": sample,
        "footer": "Written by <code>anymask demo</code>. All figures were measured in this run on "
        "this machine; results.json beside this page holds them.",
    }
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return Template(page).substitute(values)
