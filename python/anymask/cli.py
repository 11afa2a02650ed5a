"""The command line: `anymask show`, `bench`, `doctor`, `warmup`, `demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anymask.bench.command import add_options as add_bench_options
from anymask.benchmark_masks import NAMES, SAMPLES


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `anymask`; returns the process's exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:  # has options of its own
        from anymask.demo import main as demo

        return demo(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"anymask {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="anymask", description="Flash attention under any mask, on CPUs and NVIDIA GPUs."
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser(
        "demo", help="train a small language model with torch's attention and with anymask"
    )

    show = commands.add_parser(
        "show",
        help="draw a mask and how it falls on tiles",
        description="Draws one of the twelve benchmark masks, or a mask from a .npy file, with its "
        "tiles by class: in the terminal, or to a picture.",
    )
    show.add_argument(
        "mask",
        help=f"a name ({', '.join(NAMES)}), 'all' of them, or a .npy file of a dense mask "
        "[queries, keys] or [batch, heads, queries, keys]",
    )
    show.add_argument("--length", type=int, default=4096, help="tokens (default: 4096)")
    show.add_argument("--tile", type=int, default=128, help="rows and columns of a tile")
    show.add_argument("--sample", type=int, default=3, help=f"documents: 1 to {SAMPLES}")
    show.add_argument("--batch", type=int, default=0, help="batch entry of a .npy mask")
    show.add_argument("--head", type=int, default=0, help="head of a .npy mask")
    show.add_argument("--width", type=int, default=64, help="columns of the terminal to use")
    show.add_argument(
        "-o", "--output", type=Path, help="a picture (.png, .svg, .pdf); for 'all' a folder"
    )
    show.set_defaults(run=_show)

    bench = commands.add_parser("bench", help="time the twelve masks beside other libraries")
    add_bench_options(bench)
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="what was found on this machine")
    doctor.set_defaults(run=_doctor)

    warmup = commands.add_parser(
        "warmup",
        help="compile the GPU kernels ahead of their first use",
        description="Compiles every GPU kernel into the user cache. Needs NVRTC, but no GPU.",
    )
    warmup.add_argument(
        "--capability", type=int, default=90, help="compute capability (default: 90, Hopper)"
    )
    warmup.set_defaults(run=_warmup)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Any, dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        from anymask import _library

        print(f"anymask {_library.version()}")
        parser.exit()


# ---- show ---------------------------------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    names = list(NAMES) if options.mask == "all" else [options.mask]
    for name in names:
        mask, title, length = _mask(name, options)
        _show_one(console, options, name, mask, title, length)
    return 0


def _mask(name: str, options: argparse.Namespace) -> tuple[Any, str, int | None]:
    """(mask, title, length) of a name or a .npy file."""
    from anymask import benchmark_masks, masks

    if name in NAMES:
        case = benchmark_masks.benchmark_mask(name, options.length, sample=options.sample)
        return case.mask, f"{name}, {options.length} tokens", options.length
    if not name.endswith(".npy"):
        raise ValueError(f"{name!r} is neither a .npy file nor one of {', '.join(NAMES)}")
    import numpy as np

    allowed = np.load(name, mmap_mode="r")
    return masks.dense(allowed), f"{Path(name).name} {list(allowed.shape)}", None


def _show_one(
    console: Any, options: argparse.Namespace, name: str, mask: Any, title: str, length: int | None
) -> None:
    from anymask import drawing

    place = (options.batch, options.head)
    if options.output is not None:
        path = options.output
        if options.mask == "all":
            path.mkdir(parents=True, exist_ok=True)
            path = path / f"{name}.png"
        drawing.draw(mask, path, length, tile=options.tile, place=place, title=title)
        console.print(f"[bold]{title}[/]  {path}", highlight=False)
    else:
        console.print(f"\n[bold]{title}[/]", highlight=False)
        picture = drawing.render(mask, length, tile=options.tile, place=place, width=options.width)
        console.print(picture)
    console.print(
        f"{drawing.summary(mask.statistics(q_len=length, tile=options.tile))} "
        f"({options.tile} x {options.tile})",
        highlight=False,
    )


# ---- bench --------------------------------------------------------------------------------------


def _bench(options: argparse.Namespace) -> int:
    from anymask.bench import command

    return command.run(options)


# ---- doctor -------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from anymask import _library, machine

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    console = Console()
    try:
        table.add_row("library", f"{_library.path()} (version {_library.version()})")
    except RuntimeError as error:
        console.print(f"[red]library[/]  {error}", highlight=False)
        return 1
    found = machine.describe()
    sets = ", ".join(
        f"{name} (in use)" if name == found["instruction_set"] else name
        for name in found["instruction_sets"]
    )
    table.add_row("CPU", f"{found['cpu']}, {found['cores']} cores for this process")
    table.add_row("instruction sets", sets)
    table.add_row("threads", str(found["threads"]))
    table.add_row("system", f"{found['system']}, Python {found['python']}")
    table.add_row("NumPy", found["numpy"] or "not found")
    table.add_row("torch", _torch(found["torch"]))
    for name, text in _cuda(machine.cuda_report()):
        table.add_row(name, text)
    table.add_row("check", _self_check())
    console.print(table, highlight=False)
    return 0


def _cuda(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about the CUDA backend: what is there, or what is missing."""
    from rich.markup import escape

    def version_or_problem(part: dict[str, Any]) -> str:
        if "problem" in part:
            problem = part["problem"].split(" Looked for:")[0]
            return f"[yellow]{escape(problem)}[/]"
        where = f" ({part['path']})" if "path" in part else ""
        return f"version {part['version']}{where}"

    rows = [("GPU driver", version_or_problem(found["driver"]))]
    for gpu in found["gpus"]:
        rows.append(
            (
                f"GPU {gpu['index']}",
                f"{gpu['name']}, compute capability {gpu['capability']}, "
                f"{gpu['multiprocessors']} multiprocessors, "
                f"{gpu['memory_bytes'] / 2**30:.0f} GiB",
            )
        )
    rows.append(("GPU compiler", version_or_problem(found["compiler"])))
    for name, title in (("package_cache", "shipped kernels"), ("user_cache", "kernel cache")):
        cache = found.get(name) or {}
        if cache.get("path"):
            of_all = f" of {found['kernels']}" if name == "package_cache" else ""
            size = f"{cache['files']}{of_all} files, {cache['bytes'] / 2**20:.1f} MiB"
            rows.append((title, f"{size}, {cache['path']}"))
    return rows


def _warmup(options: argparse.Namespace) -> int:
    from rich.console import Console

    from anymask import machine

    console = Console()
    with console.status("compiling GPU kernels"):
        kernels = machine.warm_up_cuda(options.capability)
    console.print(f"{kernels} kernels for compute capability {options.capability} are ready")
    return 0


def _torch(version: str | None) -> str:
    if version is None:
        return "not installed (pip install 'anymask[torch]'); NumPy arrays work without it"
    import torch

    gpu = "no CUDA GPU"
    if torch.cuda.is_available():
        gpu = ", ".join(
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        )
    return f"{version}, {gpu}"


def _self_check() -> str:
    import numpy as np

    from anymask import attention, causal, machine, measuring

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 150, 2, 64), np.float32) for _ in range(3))
    before = machine.instruction_set()
    expected = measuring.reference(q, k, v, causal().to_dense(q_len=150))
    try:
        for name in machine.instruction_sets():
            machine.set_instruction_set(name)
            error = float(np.abs(attention(q, k, v, causal()) - expected).max())
            if not error < 1e-5:
                return f"[red]attention is wrong by {error:.1e} with {name}[/]"
    finally:
        machine.set_instruction_set(before)
    return "[green]attention agrees with a float64 reference on every instruction set[/]"
