"""Dropout, biases, softcap and sink against their definitions, forward and backward."""

from __future__ import annotations

import anymask as am
import mask_cases
import numpy as np
import pytest
import reference
import reference_scores
import torch
from anymask import machine
from checks import DTYPES, assert_close, poisoned
from hypothesis import given
from hypothesis import strategies as st

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
    return torch.from_numpy(np.array(reference._per_head(allowed, sizes)))


def check(q, k, v, mask, allowed, *, scale=None, lse_gradient=True, **options):
    """Results and all gradients under some options against the definition in float64."""
    allowed, numbers = every(allowed, q, k), dict(options)
    tensors = {name: numbers.pop(name) for name in OPTIONS if name in numbers}
    seed = numbers.pop("seed", None)
    p = numbers.get("dropout_p", 0.0)
    kept = None
    if p:
        pair = seed.tolist() if hasattr(seed, "tolist") else (seed, 0)
        kept = reference_scores.kept(p, pair[0], *allowed.shape, offset=pair[1])
        kept = torch.from_numpy(kept)

    def run(function, dtype=None):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
        added = {
            name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()
        }
        return function(leaves, added), [*leaves, *added.values()]

    def library(leaves, added):
        return am.attention(
            *leaves, mask, scale=scale, return_lse=True, seed=seed, **added, **numbers
        )

    def definition(leaves, added):
        return reference_scores.attention(*leaves, allowed, scale, kept=kept, **added, **numbers)

    with poisoned():
        got, leaves = run(library)
    ref, ref_leaves = run(definition, torch.float64)
    low, low_leaves = run(definition)
    for name, *results in zip(("out", "lse"), got, ref, low):
        assert_close(name, results[0], results[1].detach(), results[2], 1e-6)
    assert got[1].dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    blind = ref[1] == -torch.inf
    assert (got[0].transpose(1, 2)[blind] == 0).all()

    dout = torch.randn(got[0].shape, dtype=torch.float64).to(got[0].dtype)
    dlse = torch.randn(got[1].shape, dtype=torch.float64).to(got[1].dtype).masked_fill(blind, 0.0)

    def gradients(outputs, leaves):
        count = 2 if lse_gradient else 1
        douts = [dout.to(outputs[0].dtype), dlse.to(outputs[1].dtype)]
        return torch.autograd.grad(outputs[:count], leaves, douts[:count])

    floor = 1e-5
    if min(allowed.shape[2:]) < 32:  # see test_attention.py; dropout scales the product
        floor = max(floor, 2 * torch.finfo(q.dtype).eps / (1 - p))
    noise = rounding_noise(ref, dout, q, k, scale, tensors)
    with poisoned():
        results = [gradients(got, leaves)]
    results += (gradients(ref, ref_leaves), gradients(low, low_leaves))
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


@pytest.mark.parametrize("which", ["softcap", "key_bias", "bias", "sink", "dropout", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_option(instruction_set, dtype, which):
    rng = np.random.default_rng(1)
    q, k, v = inputs(rng, dtype)
    mask, allowed = mask_cases.intervals(rng, 2, 4, 150, 201)
    check(q, k, v, mask, allowed, **some_options(rng, which, dtype, q, k))
    check(q, k, v, None, np.ones((1, 1, 150, 201)), **some_options(rng, which, dtype, q, k))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 150, 201), (1, 4, 150, 201), (2, 1, 150, 201), (1, 1, 150, 201), (2, 4, 1, 201),
     (1, 4, 1, 201), (2, 1, 1, 201), (1, 1, 1, 201)],
)  # fmt: skip
def test_shapes_of_biases(shape, scattered, dtype):
    rng = np.random.default_rng(2)
    q, k, v = inputs(rng, dtype)
    mask, allowed = mask_cases.dense(rng, 2, 4, 150, 201)
    mask = mask.reordered() if scattered else mask
    heads = int(rng.choice([1, 2, 4]))
    key_bias = draw(rng, (shape[0], heads, 201), dtype)
    check(q, k, v, mask, allowed, bias=draw(rng, shape, dtype), key_bias=key_bias)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_shapes_of_key_biases(heads, batch):
    rng = np.random.default_rng(3)
    q, k, v = inputs(rng, "float32", batch=3, heads=(6, 3), lengths=(70, 90))
    key_bias = draw(rng, (batch, heads, 90), "float32")
    check(q, k, v, am.causal(), reference.causal(70, 90), key_bias=key_bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_options_may_be_float32(instruction_set, dtype):
    rng = np.random.default_rng(4)
    q, k, v = inputs(rng, dtype)
    options = {
        "bias": draw(rng, (2, 1, 150, 201), "float32"),
        "key_bias": draw(rng, (1, 2, 201), dtype),
        "sink": draw(rng, (4,), "float32"),
    }
    check(q, k, v, am.causal(), reference.causal(150, 201), **options)


def test_strides_of_options(instruction_set):
    rng = np.random.default_rng(5)
    q, k, v = inputs(rng, "float32")
    allowed = reference.causal(150, 201)
    biases = [
        draw(rng, (1, 1, 150, 201), "float32").expand(2, 4, 150, 201),
        draw(rng, (2, 4, 1, 201), "float32").expand(2, 4, 150, 201),
        draw(rng, (2, 4, 150, 1), "float32").expand(2, 4, 150, 201),
        draw(rng, (2, 4, 201, 150), "float32").transpose(2, 3),
        draw(rng, (2, 4, 300, 407), "float32")[:, :, ::2, 3:204],
    ]
    for bias in biases:
        check(q, k, v, am.causal(), allowed, bias=bias)
    key_biases = [
        draw(rng, (201, 2, 2), "float32").permute(1, 2, 0),
        draw(rng, (2, 1, 201), "float32").expand(2, 4, 201),
    ]
    for key_bias in key_biases:
        sink = draw(rng, (8,), "float32")[::2]
        check(q, k, v, am.causal(), allowed, key_bias=key_bias, sink=sink)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_minus_infinity_hides(instruction_set, dtype, sinks):
    rng = np.random.default_rng(6)
    q, k, v = inputs(rng, dtype)
    allowed = rng.random((2, 4, 150, 201)) < 0.5
    hidden = rng.random((2, 4, 150, 201)) < 0.5
    hidden[:, :, 10:80] = True  # whole rows, the first tile of all others, and some keys
    hidden[:, 1, :, :128] = True
    hidden_keys = rng.random((2, 2, 201)) < 0.2
    options = {
        "bias": draw(rng, hidden.shape, dtype).masked_fill(torch.from_numpy(hidden), -torch.inf),
        "key_bias": draw(rng, hidden_keys.shape, dtype).masked_fill(
            torch.from_numpy(hidden_keys), -torch.inf
        ),
    }
    if sinks:
        options["sink"] = torch.tensor([0.5, -torch.inf, 2.0, -1.0], dtype=q.dtype)
    check(q, k, v, am.dense(allowed), allowed, **options, softcap=2.0)
    # The same as a mask says it.
    zero = torch.zeros(hidden.shape, dtype=q.dtype)
    out = am.attention(q, k, v, bias=zero.masked_fill(torch.from_numpy(hidden), -torch.inf))
    same = am.attention(q, k, v, am.dense(~hidden))
    torch.testing.assert_close(out, same, rtol=0, atol=1e-6 if dtype == "float32" else 2e-2)


def test_sinks_of_queries_that_see_nothing(instruction_set):
    rng = np.random.default_rng(7)
    q, k, v = inputs(rng, "float32")
    allowed = np.zeros((1, 1, 150, 201), bool)
    allowed[..., 100:, :50] = True
    sink = draw(rng, (4,), "float32")
    check(q, k, v, am.dense(allowed), allowed, sink=sink)
    out, lse = am.attention(q, k, v, am.dense(allowed), sink=sink, return_lse=True)
    assert not out[:, :100].any()
    sinks = sink[None, :, None].expand(2, 4, 100)
    torch.testing.assert_close(lse[:, :, :100], sinks, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
def test_scales(instruction_set, scale):
    rng = np.random.default_rng(8)
    q, k, v = inputs(rng, "float32", lengths=(70, 75))
    options = some_options(rng, "all", "float32", q, k)
    check(q, k, v, am.causal(), reference.causal(70, 75), scale=scale, **options)


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 30.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softcaps(instruction_set, softcap, dtype):
    rng = np.random.default_rng(9)
    q, k, v = inputs(rng, dtype, lengths=(70, 75))
    check(q * 20, k, v, am.causal(), reference.causal(70, 75), softcap=softcap)


@pytest.mark.parametrize("kv_len", [0, 1, 2, 33])
@pytest.mark.parametrize("q_len", [0, 1, 2, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_and_empty(instruction_set, q_len, kv_len, dtype):
    rng = np.random.default_rng(10)
    q, k, v = inputs(rng, dtype, lengths=(q_len, kv_len), dims=(16, 8))
    for mask, allowed in (
        (None, np.ones((1, 1, q_len, kv_len), bool)),
        (am.causal(), reference.causal(q_len, kv_len)),
        (~am.full(), np.zeros((1, 1, q_len, kv_len), bool)),
    ):
        check(q, k, v, mask, allowed, **some_options(rng, "all", dtype, q, k))


@pytest.mark.parametrize("heads", [(8, 2), (8, 8), (4, 1)])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_decoding(instruction_set, heads, key_heads):
    rng = np.random.default_rng(11)
    q, k, v = inputs(rng, "float32", lengths=(1, 300), heads=heads)
    options = {
        "bias": draw(rng, (2, heads[0], 1, 300), "float32"),
        "key_bias": draw(rng, (1, key_heads, 300), "float32"),
        "sink": draw(rng, heads[:1], "float32"),
        "softcap": 2.0,
    }
    allowed = rng.random((2, 1, 1, 300)) < 0.7
    for mask in (am.dense(allowed), am.dense(allowed).reordered()):
        check(q, k, v, mask, allowed, **options)
    check(q, k, v, am.dense(allowed), allowed, dropout_p=0.2, seed=3, **options)


# ---- dropout ------------------------------------------------------------------------------------


def pattern(p, seed, mask=None, batch=2, heads=4, q_len=70, kv_len=150, dtype="float32"):
    """What the library keeps, bool [batch, heads, q_len, kv_len]: equal weights of one-hot
    values."""
    q = torch.zeros(batch, q_len, heads, 8, dtype=DTYPES[dtype])
    k = torch.zeros(batch, kv_len, heads, 8, dtype=DTYPES[dtype])
    parts = []
    for first in range(0, kv_len, 256):
        values = torch.zeros(kv_len, 256)
        count = min(256, kv_len - first)
        values[first : first + count, :count] = torch.eye(count)
        v = values.to(q.dtype)[None, :, None].expand(batch, kv_len, heads, 256)
        out = am.attention(q, k, v, mask, dropout_p=p, seed=seed)
        parts.append(out[..., :count].transpose(1, 2) > 0)
    return torch.cat(parts, -1).numpy()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 0.9, 1e-3, 0.0625])
def test_the_pattern_is_the_documented_one(instruction_set, p):
    seed = np.array([-(2**40) - 7, 2**35 + 3])
    expected = reference_scores.kept(p, seed[0], 2, 4, 70, 150, offset=seed[1])
    for dtype in DTYPES:
        assert np.array_equal(pattern(p, seed, dtype=dtype), expected)


def test_the_pattern_belongs_to_the_callers_keys(instruction_set):
    rng = np.random.default_rng(12)
    allowed = rng.random((1, 4, 200, 500)) < 0.3
    allowed[..., 100:300] = False
    expected = reference_scores.kept(0.4, 11, 1, 4, 200, 500)
    for mask in (am.dense(allowed), am.dense(allowed).reordered()):
        got = pattern(0.4, 11, mask, 1, 4, 200, 500)
        assert np.array_equal(got, expected & allowed)


def test_nothing_is_dropped_at_0_and_almost_all_at_the_other_end():
    assert pattern(0.0, 1).all()
    assert pattern(1e-6, 1).all()  # rounds to 0
    assert 0 <= pattern(0.9999999, 1).mean() < 1e-3


def test_patterns_are_random():
    """Means and correlations within five standard deviations."""
    p = 0.3
    kept = np.stack([pattern(p, seed, kv_len=256, q_len=256) for seed in (1, 2, 2**33)])
    x = (kept - (1 - p)) / np.sqrt(p * (1 - p))

    def assert_independent(products):
        assert abs(products.mean()) < 5 / np.sqrt(products.size)

    assert_independent(x)
    assert np.abs(x.mean((-1, -2))).max() < 5 / np.sqrt(256 * 256)
    for axis in range(3):  # seeds, batch entries, heads
        assert_independent(x.take(0, axis) * x.take(1, axis))
    assert_independent(x[..., 1:] * x[..., :-1])  # neighbouring keys
    assert_independent(x[..., 32:] * x[..., :-32])  # the same bit of the next block
    assert_independent(x[..., 1:, :] * x[..., :-1, :])  # neighbouring rows
    assert_independent(x[..., 1:, 1:] * x[..., :-1, :-1])
    columns, rows = x.mean(-2) * np.sqrt(256), x.mean(-1) * np.sqrt(256)
    assert abs((columns**2).mean() - 1) < 5 * np.sqrt(2 / columns.size)
    assert abs((rows**2).mean() - 1) < 5 * np.sqrt(2 / rows.size)


def test_the_mean_stays():
    rng = np.random.default_rng(13)
    q, k, v = inputs(rng, "float64", batch=1, lengths=(64, 256))
    expected = am.attention(q, k, v)
    outs = torch.stack([am.attention(q, k, v, dropout_p=0.37, seed=i) for i in range(400)])
    error = (outs.mean(0) - expected).abs() / (outs.std(0) / 20)
    assert error.max() < 6 and error.mean() < 1


def test_where_seeds_come_from():
    rng = np.random.default_rng(14)
    q, k, v = inputs(rng, "float32")
    options = {"dropout_p": 0.5}
    one = am.attention(q, k, v, seed=7, **options)
    for same in (np.int32(7), torch.tensor([7, 0]), np.array([7, 0])):
        assert torch.equal(am.attention(q, k, v, seed=same, **options), one)
    for other in (8, -7, torch.tensor([7, 1]), torch.tensor([7, 2**40])):
        assert not torch.equal(am.attention(q, k, v, seed=other, **options), one)
    arrays = [x.numpy() for x in (q, k, v)]
    for seed in (7, np.array([7, 0])):
        assert np.array_equal(am.attention(*arrays, seed=seed, **options), one.numpy())
    torch.manual_seed(3)
    first, second = (am.attention(q, k, v, **options) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(am.attention(q, k, v, **options), first)
    assert not torch.equal(first, second)
    first, second = (am.attention(*arrays, **options) for _ in range(2))
    assert not np.array_equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(am.attention(q, k, v, seed=7), am.attention(q, k, v))
    am.attention(q, k, v, seed=7, **options)
    assert torch.equal(torch.get_rng_state(), state)


# ---- the same bits, and anything at once --------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scattered", [False, True])
def test_threads_do_not_change_a_bit(shape, dtype, scattered):
    rng = np.random.default_rng(15)
    q, k, v = (x.requires_grad_() for x in inputs(rng, dtype, lengths=(391, 420), heads=(4, 2)))
    mask, _ = mask_cases.dense(rng, 2, 4, 391, 420)
    mask = mask.reordered() if scattered else mask
    bias = draw(rng, (*shape, 391, 420), dtype).requires_grad_()
    key_bias = draw(rng, (1, 2, 420), dtype).requires_grad_()
    sink = draw(rng, (4,), dtype).requires_grad_()
    leaves = (q, k, v, bias, key_bias, sink)
    dout = torch.randn_like(am.attention(q, k, v, mask))
    runs = []
    before = machine.threads()
    try:
        for threads in (1, 2, 3, 7, 2):
            machine.set_threads(threads)
            out = am.attention(
                q, k, v, mask, bias=bias, key_bias=key_bias, sink=sink, softcap=3.0,
                dropout_p=0.1, seed=1,
            )  # fmt: skip
            runs.append([out, *torch.autograd.grad(out, leaves, dout)])
    finally:
        machine.set_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@given(
    m=st.integers(1, 150),
    n=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
)
def test_random_masks_shapes_and_options(m, n, seed, dtype):
    rng = np.random.default_rng(seed)
    b, kv_heads, group = (int(rng.integers(1, 3)) for _ in range(3))
    h = kv_heads * group
    mask, allowed = mask_cases.random_tree(rng, b, h, m, n, int(rng.integers(1, 4)))
    dims = tuple(int(rng.choice([8, 16, 32, 64])) for _ in range(2))
    q, k, v = inputs(rng, dtype, b, (m, n), (h, kv_heads), dims)
    check(q, k, v, mask, allowed, **random_options(rng, dtype, b, h, m, n))


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
