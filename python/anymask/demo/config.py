"""What one run of the demo trains, as plain data that goes from process to process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

IMPLEMENTATIONS = ("torch", "anymask")


@dataclass(frozen=True)
class Config:
    implementation: str = "anymask"  # whose attention: one of IMPLEMENTATIONS
    device: str = "cpu"
    dtype: str = "float32"
    length: int = 8192  # bytes in a sequence
    batch: int = 1
    width: int = 128
    layers: int = 2
    heads: int = 4
    head_dim: int = 32
    learning_rate: float = 1e-2
    seed: int = 0
    steps: int = 24
    seconds: float | None = None  # train no further once this much time has passed
    sample: int = 0  # bytes to write at the end

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation: got {self.implementation!r}, one of {IMPLEMENTATIONS} is needed"
            )

    @property
    def longest_document(self) -> int:
        """Files up to half a sequence, so that every sequence holds several."""
        return self.length // 2 - 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Config:
        return Config(**json.loads(text))

    def but(self, **changes: object) -> Config:
        return replace(self, **changes)  # type: ignore[arg-type]


CPU = Config()
CUDA = Config(
    device="cuda",
    dtype="bfloat16",
    batch=4,
    width=1024,
    layers=6,
    heads=16,
    head_dim=64,
    learning_rate=1e-3,
    steps=100,
)
TINY = Config(length=256, width=32, layers=1, heads=2, head_dim=16, steps=2)
