"""What the two runs measured, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import anymask as am
from anymask.demo.config import Config
from anymask.demo.corpus import Sequence


@dataclass
class Run:
    """One implementation's training run."""

    config: Config
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # a step, mask included
    mask_seconds: list[float] = field(default_factory=list)  # of which: dense mask or plan
    peak_bytes: int = 0
    parameters: int = 0
    sample: str = ""

    def add(self, message: dict[str, Any]) -> None:
        """Takes one line of the training process."""
        if "result" in message:
            self.peak_bytes = message["result"]["peak_bytes"]
            self.parameters = message["result"]["parameters"]
            self.sample = message["result"]["sample"]
        else:
            self.losses.append(message["loss"])
            self.seconds.append(message["seconds"])
            self.mask_seconds.append(message["mask_seconds"])

    @property
    def step_seconds(self) -> float:
        """The mean step without the first one, which also starts threads and fills caches."""
        return float(np.mean(self.seconds[1:] or self.seconds))

    @property
    def points(self) -> list[tuple[float, float]]:
        """(seconds since the start, loss) of each step."""
        return list(zip(np.cumsum(self.seconds).tolist(), self.losses))

    @property
    def tokens_per_second(self) -> float:
        return self.config.batch * self.config.length / self.step_seconds


@dataclass
class Comparison:
    torch: Run
    anymask: Run

    @property
    def speedup(self) -> float:
        return self.torch.step_seconds / self.anymask.step_seconds

    @property
    def differences(self) -> list[float]:
        return [abs(a - b) for a, b in zip(self.torch.losses, self.anymask.losses)]

    @property
    def largest_difference(self) -> float:
        return max(self.differences)

    def figures(self) -> dict[str, Any]:
        """Everything that was measured, for results.json."""
        runs = {"torch": self.torch, "anymask": self.anymask}
        return {
            "config": {**vars(self.anymask.config), "implementation": None},
            "speedup": self.speedup,
            "largest_loss_difference": self.largest_difference,
            **{
                name: {
                    "tokens_per_second": run.tokens_per_second,
                    "step_seconds": run.step_seconds,
                    "peak_bytes": run.peak_bytes,
                    "losses": run.losses,
                    "seconds": run.seconds,
                    "mask_seconds": run.mask_seconds,
                }
                for name, run in runs.items()
            },
        }


@dataclass
class MaskView:
    """The first sequence's mask: as a picture of about 512 x 512 and on tiles of 128 x 128."""

    sequence: Sequence
    pairs: np.ndarray
    tiles: np.ndarray
    statistics: am.MaskStatistics

    @staticmethod
    def of(sequence: Sequence) -> MaskView:
        mask = am.causal() & am.documents(cu_seqlens=sequence.cu_seqlens)
        length = len(sequence.text)
        return MaskView(
            sequence,
            mask.tile_classes(q_len=length, tile=max(1, length // 512))[0, 0],
            mask.tile_classes(q_len=length)[0, 0],
            mask.statistics(q_len=length),
        )


def text_of_bytes(count: float) -> str:
    if abs(count) < 1024**2:
        return f"{count / 1024:.0f} KiB"
    return f"{count / 1024**2:.0f} MiB" if count < 10 * 1024**3 else f"{count / 1024**3:.1f} GiB"
