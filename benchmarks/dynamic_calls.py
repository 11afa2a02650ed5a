"""What dynamic_masks.py times: the dynamic call, a causal one and torch's, and their check."""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import Any, NamedTuple

import anymask as am
import torch
from anymask.bench.check import Slice, WrongResult, attention, compare
from anymask.benchmark_masks import BenchmarkMask
from anymask.measuring import seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, softplus

BACKENDS = {
    "cpu": {"default": None},
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}
_LENGTH_STEP = 8192  # in which the longest sequence for torch is looked for
_CHECKED_PREFIXES = 16
_LARGEST_DIFFERENCE = 0.05  # of torch's result, as a share of its norm


class Inputs(NamedTuple):
    query: Any  # [1, heads, length, head_dim]
    key: Any
    value: Any
    dt_proj: Any
    A: Any


def draw(options: argparse.Namespace, length: int) -> Inputs:
    """Random inputs, whose scores are random, too."""
    torch.manual_seed(0)
    place = {"dtype": getattr(torch, options.dtype), "device": options.device}
    heads, kv_heads, dim = options.heads, options.kv_heads, options.dim
    query = torch.randn(1, heads, length, dim, **place)
    key, value = (torch.randn(1, kv_heads, length, dim, **place) for _ in range(2))
    dt_proj = torch.randn(kv_heads, kv_heads * dim, **place) / math.sqrt(kv_heads * dim)
    A = torch.full((kv_heads,), 0.5, device=options.device)
    return Inputs(query, key, value, dt_proj, A)


def scores_of(inputs: Inputs) -> Any:
    """float32 [1, kv_heads, length], as the call has them."""
    flat = inputs.value.transpose(1, 2).flatten(2)
    dt = inputs.dt_proj @ flat.transpose(1, 2)
    return (inputs.A.double()[:, None] * softplus(dt.double())).float()


def dynamic_call(inputs: Inputs, keep: int) -> Callable[[], Any]:
    return lambda: am.apply_dynamic_mask_attention(*inputs, keep_window_size=keep)


def causal_call(inputs: Inputs) -> Callable[[], Any]:
    return lambda: am.attention(*inputs[:3], am.causal(), layout="bhsd")


def training_call(call: Callable[[], Any], leaves: list[Any], dout: Any) -> Callable[[], Any]:
    """Forward and backward."""
    return lambda: torch.autograd.grad(call(), leaves, dout)


# ---- torch --------------------------------------------------------------------------------------


def hidden_from(scores: Any, keep: int) -> Any:
    """int32 [1, kv_heads, length]: the row from which on a key is hidden."""
    return am.top_keys(scores, keep).arrays[0][..., 0]


def dense_masks(inputs: Inputs, scores: Any, keep: int) -> list[Any]:
    """[1, 1, length, length] a key head: exp(score) where a key is kept, else -inf."""
    length = inputs.key.shape[2]
    rows = torch.arange(length, device=scores.device)
    ends = hidden_from(scores, keep)
    masks = []
    for head in range(inputs.key.shape[1]):
        visible = (rows[:, None] >= rows) & (rows[:, None] < ends[0, head])
        bias = scores[0, head].exp().to(inputs.query.dtype).expand(visible.shape)
        masks.append(bias.masked_fill(~visible, float("-inf"))[None, None])
    return masks


def torch_call(inputs: Inputs, masks: list[Any], backend: Any) -> Callable[[], Any]:
    """torch, a key head at a time, with as many dense masks as it takes for a mask that differs
    from head to head."""
    query, key, value = inputs[:3]
    group = query.shape[1] // key.shape[1]

    def call() -> Any:
        parts = []
        for head, mask in enumerate(masks):
            some = slice(head * group, (head + 1) * group)
            one = [
                x[:, head : head + 1].expand(-1, group, -1, -1).contiguous() for x in (key, value)
            ]
            parts.append(scaled_dot_product_attention(query[:, some], *one, attn_mask=mask))
        return torch.cat(parts, 1)

    def chosen() -> Any:
        with sdpa_kernel(backend):
            return call()

    return call if backend is None else chosen


def fastest_torch_call(
    inputs: Inputs, scores: Any, keep: int, dout: Any | None
) -> tuple[str, Callable[[], Any]]:
    """(backend, call) of torch's fastest whose result is that of the dynamic call; with `dout`
    forward and backward, else forward alone. Raises RuntimeError where none can do it."""
    device = inputs.query.device.type
    masks = dense_masks(inputs, scores, keep)
    plain = Inputs(*(x.detach() for x in inputs))
    own = dynamic_call(plain, keep)()
    found: dict[str, tuple[float, Callable[[], Any]]] = {}
    failures = []
    for name, backend in BACKENDS[device].items():
        call = torch_call(plain, masks, backend)
        try:
            # Some kernels go wrong, in silence, where a mask has more than 2^31 elements.
            error = float((call() - own).float().norm() / own.float().norm())
            if not error <= _LARGEST_DIFFERENCE:
                raise RuntimeError(f"wrong result, {error:.1%} away")
            if dout is not None:
                call = training_call(torch_call(inputs, masks, backend), list(inputs[:3]), dout)
                seconds(call, device)
            found[name] = seconds(call, device), call
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
    if not found:
        raise RuntimeError("; ".join(failures))
    best = min(found, key=lambda name: found[name][0])
    return best, found[best][1]


def largest_length(options: argparse.Namespace) -> int:
    """The longest sequence, in steps of 8192, whose dense masks and a pass of training fit into
    the GPU's free memory and give torch's right result; 0 where none does. Tried, not only
    computed, in a process of its own: a kernel that reads where it must not ends that one."""
    free = torch.cuda.mem_get_info()[0]
    size = torch.tensor([], dtype=getattr(torch, options.dtype)).element_size()
    length = 0
    while _bytes_for_torch(options, length + _LENGTH_STEP, size) <= free:
        length += _LENGTH_STEP
    trial = _Trial()
    while length and not trial.works(options, length):
        length -= _LENGTH_STEP
    trial.end()
    return length


class _Trial:
    """A process that tries lengths; a new one after an attempt that broke it."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def works(self, options: argparse.Namespace, length: int) -> bool:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context)
        try:
            return self._pool.submit(torch_holds, options, length).result()
        except (RuntimeError, BrokenExecutor):
            self.end()
            return False

    def end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None


def torch_holds(options: argparse.Namespace, length: int) -> bool:
    """Whether torch trains under dense masks of that length and is right. Raises RuntimeError where
    the process can do nothing more on the GPU."""
    inputs = scores = leaves = None
    try:
        inputs = draw(options, length)
        scores = scores_of(inputs)
        leaves = Inputs(*(x.requires_grad_() for x in inputs[:3]), *inputs[3:])
        fastest_torch_call(leaves, scores, min(options.keeps), torch.randn_like(inputs.query))
        return True
    except RuntimeError:
        return False
    finally:
        inputs = scores = leaves = None
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()


def _bytes_for_torch(options: argparse.Namespace, length: int, size: int) -> int:
    """Masks, what is at hand while the last one is made, and tensors like query in a pass."""
    masks = options.kv_heads * size * length**2 + (size + 2) * length**2
    return masks + 14 * size * options.heads * length * options.dim


# ---- check --------------------------------------------------------------------------------------


def check(inputs: Inputs, scores: Any, keep: int) -> float:
    """Compares the first key head's queries with the definition: out, dq and dk.
    Returns the largest error as a share of what is allowed, or raises WrongResult."""
    ends = hidden_from(scores, keep)
    _check_selection(scores[0, 0], ends[0, 0], keep)
    group = inputs.query.shape[1] // inputs.key.shape[1]
    leaves = Inputs(*(x.detach().requires_grad_() for x in inputs[:3]), *inputs[3:])
    out = dynamic_call(leaves, keep)()
    dout = torch.randn_like(out)
    dq, dk = torch.autograd.grad(out, [leaves.query, leaves.key], dout)
    got = {"out": out[0, :group], "dq": dq[0, :group], "dk": dk[0, 0]}
    mask = BenchmarkMask(
        "top_keys", ends[:, :1, :, None].cpu().numpy(), True, None, (), window=keep
    )
    one = Slice(
        inputs.query[0, :group], inputs.key[0, 0], inputs.value[0, 0],
        dout[0, :group], scores[0, 0].double().exp(),
    )  # fmt: skip
    precise = torch.float64 if inputs.query.device.type == "cpu" else torch.float32
    expected = [attention(one, mask, 0, dtype) for dtype in (precise, inputs.query.dtype)]
    worst = 0.0
    for name, result in got.items():
        result = result.detach()
        if not result.isfinite().all():
            raise WrongResult(f"{name}: not finite everywhere")
        worst = max(worst, compare(name, result, *(found[name] for found in expected)))
    return worst


def _check_selection(scores: Any, ends: Any, keep: int) -> None:
    """Some queries' keys beside a stable sort of the scores of their prefix."""
    length = len(scores)
    for row in {round(x) for x in torch.linspace(0, length - 1, _CHECKED_PREFIXES).tolist()}:
        best = torch.sort(scores[: row + 1], descending=True, stable=True).indices[:keep]
        kept = torch.nonzero(ends[: row + 1] > row)[:, 0]
        if not torch.equal(best.sort().values, kept):
            raise WrongResult(f"selection: query {row} keeps other keys than its best {keep}")
