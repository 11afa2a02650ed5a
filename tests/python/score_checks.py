"""What the tests of the score options share: inputs, options, the comparison with the definition.
For tensors of any device."""

from __future__ import annotations

import anymask as am
import mask_cases
import numpy as np
import reference
import reference_scores
import torch
from checks import DTYPES, assert_close

OPTIONS = ("key_bias", "bias", "sink")


def draw(rng, shape, dtype):
    return torch.from_numpy(rng.standard_normal(shape)).to(DTYPES[dtype])


def inputs(rng, dtype, batch=2, lengths=(150, 201), heads=(4, 2), dims=(32, 24)):
    shapes = [
        (batch, lengths[0], heads[0], dims[0]),
        (batch, lengths[1], heads[1], dims[0]),
        (batch, lengths[1], heads[1], dims[1]),
    ]
    return [draw(rng, shape, dtype) for shape in shapes]


def every(allowed, q, k):
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return torch.from_numpy(np.array(reference._per_head(allowed, sizes))).to(q.device)


def check(
    q, k, v, mask, allowed, *, scale=None, backward=True, lse_gradient=True, deterministic=False,
    **options,
):  # fmt: skip
    """Results and all gradients under some options against the definition in float64."""
    allowed, numbers = every(allowed, q, k), dict(options)
    tensors = {name: numbers.pop(name) for name in OPTIONS if name in numbers}
    seed = numbers.pop("seed", None)
    p = numbers.get("dropout_p", 0.0)
    kept = None
    if p:
        pair = seed.tolist() if hasattr(seed, "tolist") else (seed, 0)
        kept = reference_scores.kept(p, pair[0], *allowed.shape, offset=pair[1])
        kept = torch.from_numpy(kept).to(q.device)

    def run(function, dtype=None):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
        added = {
            name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()
        }
        return function(leaves, added), [*leaves, *added.values()]

    def library(leaves, added):
        return am.attention(
            *leaves, mask, scale=scale, return_lse=True, deterministic=deterministic, seed=seed,
            **added, **numbers,
        )  # fmt: skip

    def definition(leaves, added):
        return reference_scores.attention(*leaves, allowed, scale, kept=kept, **added, **numbers)

    got, leaves = run(library)
    ref, ref_leaves = run(definition, torch.float64)
    low, low_leaves = run(definition)
    low = [low[0], low[1].to(got[1].dtype)]  # lse comes in float32, whatever the inputs are
    seen = ref[1][ref[1].isfinite()]
    unit = 2.0**-22 * float(seen.abs().max()) if seen.numel() else 0.0  # two roundings of lse
    for name, floor, *results in zip(("out", "lse"), (1e-6, max(1e-6, unit)), got, ref, low):
        assert_close(name, results[0], results[1].detach(), results[2], floor)
    assert got[1].dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    blind = ref[1] == -torch.inf
    assert (got[0].transpose(1, 2)[blind] == 0).all()
    if not backward:
        return

    dout, dlse = (torch.randn_like(x, dtype=torch.float64).to(x.dtype) for x in got)
    dlse = dlse.masked_fill(blind, 0.0)

    def gradients(outputs, leaves):
        count = 2 if lse_gradient else 1
        douts = [dout.to(outputs[0].dtype), dlse.to(outputs[1].dtype)]
        return torch.autograd.grad(outputs[:count], leaves, douts[:count])

    floor = 1e-5
    if min(allowed.shape[2:]) < 32:  # see test_attention.py; dropout scales the product
        floor = max(floor, 2 * torch.finfo(q.dtype).eps / (1 - p))
    noise = rounding_noise(ref, dout, q, k, scale, tensors)
    results = (gradients(got, leaves), gradients(ref, ref_leaves), gradients(low, low_leaves))
    for name, leaf, *each in zip(["q", "k", "v", *tensors], leaves, *results):
        assert each[0].dtype == leaf.dtype and each[0].shape == leaf.shape
        assert_close("d" + name, *each, floor + noise.get(name, 0.0))


def rounding_noise(ref, dout, q, k, scale, tensors):
    """The error that gradients have from rounding `out` to q's type and sums to float32 (float64)
    alone, six standard deviations of it: the naive result has as much of its own, but with few
    entries may be lucky with all of them."""
    out, lse, p = (x.detach() for x in ref)
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    products = ((dout.double() * out) ** 2).sum(-1).transpose(1, 2)
    sums = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32)
    eps = max(torch.finfo(q.dtype).eps, 4 * sums.eps)
    rows = products * (6 * eps) ** 2 / 12  # variance of rowsum(dout * out)
    pairs = p**2 * rows[..., None]  # of the logits' gradients

    def of_key_heads(x, heads):
        return x.unflatten(1, (heads, -1)).sum(2)

    keys = k.double().repeat_interleave(group, 2).transpose(1, 2)
    variance = {
        "q": (scale * (p @ keys)) ** 2 * rows[..., None],
        "k": of_key_heads(
            pairs.transpose(2, 3) @ (scale * q.double().transpose(1, 2)) ** 2, k.shape[2]
        ),
    }
    for name, x in tensors.items():
        if name == "sink":
            weight = (x.double()[None, :, None] - lse).exp().masked_fill(lse.isinf(), 0.0)
            variance[name] = (weight**2 * rows).sum((0, 2))
        elif name == "bias":
            variance[name] = pairs.sum_to_size(x.shape)
        else:
            variance[name] = of_key_heads(pairs.sum(2), x.shape[1]).sum_to_size(x.shape)
    return {name: float(x.max().sqrt()) if x.numel() else 0.0 for name, x in variance.items()}


def some_options(rng, which, dtype, q, k):
    batch, q_len, heads, _ = q.shape
    kv_len = k.shape[1]
    made = {
        "softcap": lambda: {"softcap": 1.5},
        "key_bias": lambda: {"key_bias": draw(rng, (batch, k.shape[2], kv_len), dtype)},
        "bias": lambda: {"bias": draw(rng, (1, heads, q_len, kv_len), dtype)},
        "sink": lambda: {"sink": draw(rng, (heads,), dtype)},
        "dropout": lambda: {"dropout_p": 0.3, "seed": 5},
    }
    if which == "all":
        return {name: x for make in made.values() for name, x in make().items()}
    return made[which]()


def random_options(rng, dtype, b, h, m, n):
    """Any of the options, of any shape and type."""

    def some(shape):
        narrow = dtype in ("bfloat16", "float16") and rng.random() < 0.5
        x = draw(rng, shape, "float32" if narrow else dtype)
        return x.masked_fill(torch.from_numpy(rng.random(shape) < 0.1), -torch.inf)

    def either(size):
        return size if rng.random() < 0.5 else 1

    options = {}
    if rng.random() < 0.5:
        options["bias"] = some((either(b), either(h), either(m), n))
    if rng.random() < 0.5:
        options["key_bias"] = some((either(b), mask_cases.divisor(rng, h), n))
    if rng.random() < 0.5:
        options["sink"] = some((h,))
    if rng.random() < 0.5:
        options["softcap"] = float(rng.choice([0.5, 3.0, 50.0]))
    if rng.random() < 0.5:
        options["dropout_p"] = float(rng.choice([0.1, 0.3, 0.5]))
        options["seed"] = torch.from_numpy(rng.integers(-(2**62), 2**62, 2))
    return options
