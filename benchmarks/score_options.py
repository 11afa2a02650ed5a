"""What score options cost on a Hopper GPU: time of each pass, and over the same call without them.

    python benchmarks/score_options.py [--length 8192] [--head-dim 128] [--heads 32] [--batch 2]

Causal, bf16. Forward through the operator, backward through its gradient, best of some calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import anymask as am
import torch


def milliseconds(call: Callable[[], Any], repeats: int = 12) -> float:
    """The best of some calls, by the GPU's clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--pairs", action="store_true", help="also a bias of every pair")
    options = parser.parse_args()
    batch, length, heads, dim = options.batch, options.length, options.heads, options.head_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    leaves = [draw(batch, length, heads, dim).requires_grad_() for _ in range(3)]
    dout = draw(batch, length, heads, dim)
    subjects = {
        "none": {},
        "softcap 30": {"softcap": 30.0},
        "key_bias": {"key_bias": draw(batch, heads, length).requires_grad_()},
        "sink": {"sink": draw(heads).requires_grad_()},
        "dropout 0.1": {"dropout_p": 0.1, "seed": 1},
        "dropout 0.125": {"dropout_p": 0.125, "seed": 1},
        "softcap, dropout 0.1": {"softcap": 30.0, "dropout_p": 0.1, "seed": 1},
    }
    if options.pairs:
        pairs = draw(1, heads, length, length)
        subjects["bias"] = {"bias": pairs}
        subjects["bias, shared gradient"] = {"bias": pairs.clone().requires_grad_()}
    plain = None
    print(f"{torch.cuda.get_device_name()}, causal, {batch} x {length} x {heads} x {dim}, bf16")
    for name, added in subjects.items():
        tensors = [x for x in added.values() if isinstance(x, torch.Tensor) and x.requires_grad]

        def forward(added: dict[str, Any] = added) -> Any:
            return am.attention(*leaves, am.causal(), deterministic=options.deterministic, **added)

        out = forward()
        inputs = [*leaves, *tensors]
        times = (
            milliseconds(forward),
            milliseconds(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)),  # noqa: B023
        )
        plain = plain or times
        over = ", ".join(f"{100 * (one / base - 1):+.1f}%" for one, base in zip(times, plain))
        print(
            f"{name:24} forward {times[0]:8.3f} ms, backward {times[1]:8.3f} ms   {over}",
            flush=True,
        )


if __name__ == "__main__":
    main()
