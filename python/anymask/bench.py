"""`anymask bench`: the twelve masks, forward and backward, each checked before it is timed."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from anymask import machine
from anymask.attention import attention
from anymask.benchmark_masks import NAMES, BenchmarkMask, benchmark_mask
from anymask.measuring import flops, interleaved_medians, reference
from anymask.plans import Plan, plan

_CHECK_LENGTH = 320
_TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-12}


class Settings(NamedTuple):
    """What to measure."""

    masks: tuple[str, ...] = NAMES
    length: int = 2048
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "float32"
    device: str = "cpu"
    backward: bool = True
    peers: bool = True
    rounds: int = 5
    budget: float = 20.0  # seconds a mask and pass
    sample: int = 3


class Row(NamedTuple):
    """One mask's figures; seconds, None where not measured."""

    mask: str
    density: float
    forward: float
    backward: float | None
    plan: float
    forward_tflops: float
    backward_tflops: float | None
    peer_forward: float | None
    peer_backward: float | None


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _draw(settings: Settings, length: int) -> list[Any]:
    """Random q, k, v: torch where it is installed, else NumPy."""
    rng = np.random.default_rng(0)
    heads = (settings.heads, settings.kv_heads, settings.kv_heads)
    arrays = [
        rng.standard_normal((settings.batch, length, h, settings.head_dim), np.float32)
        for h in heads
    ]
    if not has_torch():
        if settings.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype: {settings.dtype} needs torch, which is not installed")
        return [x.astype(settings.dtype) for x in arrays]
    import torch

    dtype = getattr(torch, settings.dtype)
    return [torch.from_numpy(x).to(settings.device, dtype) for x in arrays]


def _place(mask: Any, device: str) -> Any:
    return mask.to(device) if has_torch() else mask


def check(settings: Settings, name: str) -> None:
    """Compares a mask's result at a small size with a float64 reference; raises RuntimeError."""
    case = benchmark_mask(name, _CHECK_LENGTH, sample=settings.sample)
    q, k, v = _draw(settings, _CHECK_LENGTH)
    out = attention(q, k, v, _place(case.mask, settings.device))
    expected = reference(q, k, v, case.mask.to_dense(q_len=_CHECK_LENGTH))
    out = out.detach().cpu().double().numpy() if has_torch() else np.asarray(out, np.float64)
    error = float(np.abs(out - expected).max())
    if not error <= _TOLERANCE[settings.dtype]:
        raise RuntimeError(
            f"{name}: wrong by {error:.2e} from the reference at length {_CHECK_LENGTH}"
        )


def _plan(case: BenchmarkMask, settings: Settings) -> Callable[[], Plan]:
    mask = _place(case.mask, settings.device)
    dtype: Any = settings.dtype
    if has_torch():
        import torch

        dtype = getattr(torch, settings.dtype)
    length = settings.length
    return lambda: plan(
        mask, batch=settings.batch, q_heads=settings.heads, kv_heads=settings.kv_heads,
        q_len=length, kv_len=length, head_dim=settings.head_dim, dtype=dtype,
        device=settings.device,
    )  # fmt: skip


def _peer(case: BenchmarkMask, settings: Settings, q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """torch's scaled_dot_product_attention with the mask as it takes it."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options: dict[str, Any] = {"enable_gqa": True} if settings.heads != settings.kv_heads else {}
    if case.name == "causal":
        options["is_causal"] = True
    elif case.name != "full":
        options["attn_mask"] = _place(case.mask, settings.device).to_dense(q_len=settings.length)
    return lambda: scaled_dot_product_attention(q, k, v, **options)


def measure(settings: Settings, name: str) -> Row:
    """Times one mask."""
    case = benchmark_mask(name, settings.length, sample=settings.sample)
    q, k, v = _draw(settings, settings.length)
    make_plan = _plan(case, settings)
    planned = make_plan()
    functions: dict[str, Callable[[], Any]] = {
        "forward": lambda: attention(q, k, v, plan=planned),
        "plan": make_plan,
    }
    peers = settings.peers and has_torch()
    if peers:
        functions["peer"] = _peer(case, settings, q, k, v)
    timing = {
        "device": settings.device, "rounds": settings.rounds, "budget": settings.budget,
    }  # fmt: skip
    forward = interleaved_medians(functions, **timing)  # type: ignore[arg-type]
    backward: dict[str, float] = {}
    if settings.backward and has_torch():
        backward = interleaved_medians(
            _backward(case, settings, planned, peers, q, k, v),
            **timing,  # type: ignore[arg-type]
        )
    density = case.mask.density(q_len=settings.length)
    pairs = round(density * settings.length**2) * settings.batch * settings.heads
    forward_flops, backward_flops = flops(pairs, settings.head_dim)
    seconds = backward.get("backward")
    return Row(
        name, density, forward["forward"], seconds, forward["plan"],
        forward_flops / forward["forward"] / 1e12,
        backward_flops / seconds / 1e12 if seconds else None,
        forward.get("peer"), backward.get("peer"),
    )  # fmt: skip


def _backward(
    case: BenchmarkMask, settings: Settings, planned: Plan, peers: bool, *inputs: Any
) -> dict[str, Callable[[], Any]]:
    import torch

    leaves = [x.requires_grad_() for x in inputs]
    outputs = {"backward": attention(*leaves, plan=planned)}
    if peers:
        outputs["peer"] = _peer(case, settings, *leaves)()
    functions = {}
    for name, out in outputs.items():
        gradient = torch.randn_like(out)
        functions[name] = lambda out=out, gradient=gradient: torch.autograd.grad(
            out, leaves, gradient, retain_graph=True
        )
    return functions


def run(settings: Settings, progress: Callable[[str, str, int], None]) -> list[Row]:
    """Checks and times every mask; `progress(mask, what, steps done)` hears of each step."""
    unknown = [name for name in settings.masks if name not in NAMES]
    if unknown:
        raise ValueError(f"masks: {', '.join(unknown)} unknown; there are {', '.join(NAMES)}")
    rows = []
    for index, name in enumerate(settings.masks):
        progress(name, "checking", 2 * index)
        check(settings, name)
        progress(name, "timing", 2 * index + 1)
        rows.append(measure(settings, name))
    progress("", "done", 2 * len(settings.masks))
    return rows


def to_json(settings: Settings, rows: Sequence[Row], path: Path) -> None:
    """Writes settings, machine and figures."""
    document = {
        "settings": settings._asdict(),
        "machine": machine.describe(),
        "python": platform.python_version(),
        "rows": [row._asdict() for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


__all__ = ["Row", "Settings", "check", "has_torch", "measure", "run", "to_json"]
