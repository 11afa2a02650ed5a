"""`anymask demo`: the same small language model trained with torch's attention and with anymask."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the process's exit status."""
    from anymask.demo.command import main as run

    return run(argv)
