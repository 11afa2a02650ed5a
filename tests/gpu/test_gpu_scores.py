"""Biases, softcap, sink and dropout on the GPU, against their definitions in float64.

Their kernels are compiled when they are first used, each in seconds: so the tests run twice, first
all at once on as many threads as there are cores, to compile what they need and nothing else.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading

import anymask as am
import mask_cases
import numpy as np
import pytest
import reference
import score_checks
import torch
from anymask import torch_op
from problem import DEVICE, HALVES, LENGTH, ON_GPU, poisoned

DIMS = [(64, 64), (128, 128), (256, 256), (192, 128), (72, 200)]
EACH = ["softcap", "key_bias", "bias", "sink", "dropout"]
M, N = (LENGTH // 2, LENGTH - 83) if ON_GPU else (90, 121)
TILED = LENGTH - 76 if ON_GPU else 120  # rows of 16-bit biases are whole 16 bytes, unlike N's


def to_device(options):
    return {name: x.to(DEVICE) if hasattr(x, "to") else x for name, x in options.items()}


def inputs(seed, dtype="bfloat16", batch=2, lengths=(M, N), heads=(4, 2), dims=(64, 64)):
    """A random generator and q, k, v."""
    rng = np.random.default_rng(seed)
    return rng, [x.to(DEVICE) for x in score_checks.inputs(rng, dtype, batch, lengths, heads, dims)]


def draw(rng, shape, dtype="bfloat16"):
    return score_checks.draw(rng, shape, dtype).to(DEVICE)


compiling = False


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(request):
    """Runs the tests of this file for their kernels alone, side by side."""
    global compiling
    if not ON_GPU or not torch.cuda.is_available():
        return
    items = [
        item
        for item in request.session.items
        if item.module is request.module and not item.get_closest_marker("cuda")
    ]
    compiling = True
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [
            pool.submit(
                item.function, **(item.callspec.params if hasattr(item, "callspec") else {})
            )
            for item in items
        ]
        concurrent.futures.wait(runs)  # whoever failed will fail again, and be reported
    compiling = False
    seen.clear()


seen = set()
seen_lock = threading.Lock()


def compile_kernels(q, k, v, mask, scale=None, deterministic=False, **options):
    """Both passes once for every variant that a call might need. Not through autograd, which has
    one thread for a device."""
    mask = am.full() if mask is None else mask
    tensors = [options.get(name) for name in ("key_bias", "bias", "sink")]
    one_row = tensors[1] is not None and tensors[1].shape[2] == 1
    numbers = (options.get("dropout_p", 0.0), options.get("softcap", 0.0))
    key = (
        tuple((min(x, 192) + 63) // 64 for x in (q.shape[3], v.shape[3])), q.dtype, deterministic,
        type(mask), tuple(x is None for x in tensors), one_row, tuple(x > 0 for x in numbers),
        tuple(mask.spec), q.numel() == 0 or k.numel() == 0, k.shape[1] % 8,
    )  # fmt: skip
    with seen_lock:
        if key in seen:
            return
        seen.add(key)
    seed = options.get("seed")
    seed = None if seed is None else torch_op._seed_offset(seed, q.device)
    scores = (*tensors, seed, *numbers)
    arrays = torch_op._arrays(mask)
    with torch.no_grad():
        out, lse = torch.ops.anymask.forward(
            q, k, v, arrays, mask.spec, None, scale, False, *scores
        )
        wanted = [x is not None for x in tensors]
        torch.ops.anymask.backward(
            out, None, q, k, v, out, lse, arrays, mask.spec, None, scale, deterministic, wanted,
            *scores,
        )  # fmt: skip


def check(q, k, v, mask, allowed, **options):
    mask = None if mask is None else mask.to(DEVICE)
    options = to_device(options)
    if compiling:
        return compile_kernels(q, k, v, mask, **options)
    with poisoned():
        score_checks.check(q, k, v, mask, allowed, **options)


def masks(rng, b, h, m, n):
    """One for every way in which the kernels come by mask bits."""
    masked = rng.integers(0, m + 1, (b, 1, n, 4)).astype(np.int32)
    allowed = rng.random((b, h, m, n)) < 0.5
    return {
        "none": (None, np.ones((1, 1, m, n), bool)),
        "runs": (am.causal(), reference.causal(m, n)),
        "recipe": (am.intervals(masked, False), reference.intervals(masked, False, m)),
        "machine": (~am.sliding_window(50, 20), ~reference.sliding_window(m, n, 50, 20)),
        "baked": (am.dense(allowed), allowed),
    }


# Every option by itself with a kernel of every size; all together also with other types and sizes.
EVERY = [(dims, "bfloat16", which) for dims in DIMS[:3] for which in EACH]
EVERY += [(dims, dtype, "all") for dims in DIMS for dtype in HALVES]


@pytest.mark.parametrize("dims, dtype, which", EVERY)
def test_every_option(dims, dtype, which):
    rng, (q, k, v) = inputs(1, dtype, dims=dims)
    options = score_checks.some_options(rng, which, dtype, q, k)
    for name, (mask, allowed) in masks(rng, 2, 4, M, N).items():
        if (
            name in ("none", "runs")
            or which in ("key_bias", "all")
            or (name, which) == ("baked", "dropout")
        ):
            check(q, k, v, mask, allowed, **options)
    check(q, k, v, am.causal(), reference.causal(M, N), deterministic=True, **options)


REORDERED = [((128, 128), which) for which in ("key_bias", "bias", "dropout", "all")]
REORDERED += [((64, 64), "all"), ((256, 256), "all")]


@pytest.mark.parametrize("dims, which", REORDERED)
def test_reordered_keys(dims, which):
    rng, (q, k, v) = inputs(2, dims=dims)
    mask, allowed = mask_cases.intervals(rng, 2, 2, M, N)
    options = score_checks.some_options(rng, which, "bfloat16", q, k)
    check(q, k, v, mask.reordered(), allowed, **options)
    allowed = rng.random((2, 1, M, N)) < 0.1
    allowed[..., ::3] = False
    check(q, k, v, am.dense(allowed).reordered(), allowed, **options)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kv_len", [N, N + 1])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rows", [1, M])
def test_shapes_of_biases(rows, heads, batch, kv_len, wide):
    rng, (q, k, v) = inputs(3, lengths=(M, kv_len), dims=(128, 128))
    options = {
        "bias": draw(rng, (batch, heads, rows, kv_len), "float32" if wide else "bfloat16"),
        "key_bias": draw(rng, (batch, heads, kv_len), "bfloat16" if wide else "float32"),
        "sink": draw(rng, (4,), "float32" if wide else "bfloat16"),
    }
    check(q, k, v, am.causal(), reference.causal(M, kv_len), **options)


TILES = [((64, 64), "bfloat16"), ((128, 128), "bfloat16"), ((128, 128), "float16")]
TILES += [((64, 128), "bfloat16"), ((256, 256), "bfloat16")]


@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dims, dtype", TILES)
def test_biases_in_tiles(dims, dtype, shape):
    """What the backward pass leaves to the copy engine, and what the forward reads by eights."""
    assert TILED % 8 == 0
    rng, (q, k, v) = inputs(21, dtype, lengths=(M, TILED), dims=dims)
    bias = draw(rng, (*shape, M, TILED), dtype)
    for mask, allowed in masks(rng, 2, 4, M, TILED).values():
        check(q, k, v, mask, allowed, bias=bias)
    allowed = reference.causal(M, TILED)
    check(q, k, v, am.causal(), allowed, bias=bias, deterministic=True, scale=-0.2)
    bias = bias.masked_fill(torch.from_numpy(rng.random(bias.shape) < 0.3).to(DEVICE), -torch.inf)
    key_bias = draw(rng, (2, 2, TILED), dtype)
    check(q, k, v, None, np.ones((1, 1, M, TILED), bool), bias=bias, key_bias=key_bias)
    if dims != (64, 64):
        return
    rows = draw(rng, (*shape, 2 * M, TILED + 8), dtype)[..., ::2, 8:]
    for view in (rows, bias[:1, :1].expand(2, 4, M, TILED)):
        check(q, k, v, am.causal(), allowed, bias=view, dropout_p=0.1, seed=3)


@pytest.mark.cuda
@pytest.mark.gibibytes(2)
@pytest.mark.parametrize("heads", [4, 34])  # few rows and many
def test_dense_masks_and_biases_from_far_memory(heads):
    """Loads of mask bits that queue behind those of biases see the bits of their own tile: with
    nothing in the caches, one call in a hundred once saw a later tile's."""
    rng, (q, k, v) = inputs(22, lengths=(M, TILED), heads=(heads, 2), dims=(128, 128))
    bias = draw(rng, (2, heads, M, TILED))
    mask = am.dense(rng.random((2, heads, M, TILED)) < 0.5).to(DEVICE)
    plan = am.plan(
        mask, batch=2, q_heads=heads, kv_heads=2, q_len=M, kv_len=TILED, head_dim=128,
        dtype=q.dtype, device=DEVICE,
    )  # fmt: skip
    other = torch.empty(2**26, device=DEVICE)  # 256 MiB, several times what L2 holds
    first = am.attention(q, k, v, plan=plan, bias=bias)
    for i in range(1000):
        other.fill_(i)
        assert torch.equal(am.attention(q, k, v, plan=plan, bias=bias), first)


def test_strides_of_options():
    rng, (q, k, v) = inputs(4, "float16")
    allowed = reference.causal(M, N)
    biases = [
        draw(rng, (1, 1, M, N), "float16").expand(2, 4, M, N),
        draw(rng, (2, 4, M, 1), "float16").expand(2, 4, M, N),
        draw(rng, (2, 4, N, M), "float16").transpose(2, 3),
        draw(rng, (2, 4, 2 * M, N + 7), "float16")[:, :, ::2, 3 : N + 3],
        draw(rng, (2, 4, M, N + 4), "float32")[..., 1 : N + 1],
    ]
    for bias in biases:
        check(q, k, v, am.causal(), allowed, bias=bias)
    key_biases = [
        draw(rng, (N, 2, 2), "float16").permute(1, 2, 0),
        draw(rng, (2, 1, N), "float32").expand(2, 4, N),
        draw(rng, (2, 4, 2 * N + 1), "float32")[..., 1::2],
    ]
    for key_bias in key_biases:
        sink = draw(rng, (8,), "float16")[::2]
        check(q, k, v, am.causal(), allowed, key_bias=key_bias, sink=sink)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dims", [(128, 128), (256, 256)])
def test_minus_infinity_hides(dims, softcap):
    rng, (q, k, v) = inputs(5, dims=dims)
    allowed = rng.random((2, 4, M, N)) < 0.5
    hidden = rng.random((2, 4, M, N)) < 0.5
    hidden[:, :, 10:80] = True  # whole rows, the first tiles of all others, and some keys
    hidden[:, 1, :, : N // 2] = True
    hidden_keys = torch.from_numpy(rng.random((2, 2, N)) < 0.2)
    hidden = torch.from_numpy(hidden)
    options = {
        "bias": draw(rng, hidden.shape).masked_fill(hidden.to(DEVICE), -torch.inf),
        "key_bias": draw(rng, (2, 2, N)).masked_fill(hidden_keys.to(DEVICE), -torch.inf),
        "softcap": softcap,
    }
    check(q, k, v, am.dense(allowed), allowed, **options)
    sink = torch.tensor([0.5, -torch.inf, 2.0, -1.0], dtype=q.dtype)
    check(q, k, v, am.dense(allowed), allowed, sink=sink, **options)
    check(q, k, v, am.causal(), reference.causal(M, N), scale=-0.2, **options)


def test_sinks_of_queries_that_see_nothing():
    rng, (q, k, v) = inputs(6)
    allowed = np.zeros((1, 1, M, N), bool)
    allowed[..., M // 2 :, :50] = True
    sink = draw(rng, (4,))
    for mask in (am.dense(allowed), ~am.full()):
        if compiling:
            break
        with poisoned():
            out, lse = am.attention(q, k, v, mask.to(DEVICE), sink=sink, return_lse=True)
        assert not out[:, : M // 2].any()
        sinks = sink.float()[None, :, None].expand(2, 4, M // 2)
        torch.testing.assert_close(lse[:, :, : M // 2], sinks, rtol=0, atol=1e-5)
    check(q, k, v, am.dense(allowed), allowed, sink=sink)


@pytest.mark.parametrize("size", [-60.0, 60.0])
def test_sinks_far_from_the_scores(size):
    _, (q, k, v) = inputs(7)
    sink = torch.full((4,), size, dtype=torch.float32, device=DEVICE)
    check(q, k, v, am.causal(), reference.causal(M, N), sink=sink)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
@pytest.mark.parametrize("which", EACH)
def test_scales(which, scale):
    rng, (q, k, v) = inputs(8, dims=(128, 128))
    options = score_checks.some_options(rng, which, "bfloat16", q, k)
    check(q, k, v, am.causal(), reference.causal(M, N), scale=scale, **options)


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 5.0, 30.0, 1e4])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
def test_softcaps(dims, softcap):
    """Scores on both sides of where the polynomial ends."""
    _, (q, k, v) = inputs(9, dims=dims)
    for factor in (1, 10):
        check(q * factor, k, v, am.causal(), reference.causal(M, N), softcap=softcap)


@pytest.mark.parametrize("q_len", [0, 1, 2, 65, 130])
@pytest.mark.parametrize("kv_len", [0, 1, 2, 79, 193])
def test_lengths(q_len, kv_len):
    rng, (q, k, v) = inputs(10, lengths=(q_len, kv_len), dims=(128, 128))
    for mask, allowed in (
        (None, np.ones((1, 1, q_len, kv_len), bool)),
        (am.causal(), reference.causal(q_len, kv_len)),
        (~am.full(), np.zeros((1, 1, q_len, kv_len), bool)),
    ):
        check(q, k, v, mask, allowed, **score_checks.some_options(rng, "all", "bfloat16", q, k))


@pytest.mark.parametrize("heads", [(8, 1), (8, 8), (6, 3)])
def test_heads(heads):
    rng, (q, k, v) = inputs(11, heads=heads, dims=(64, 64))
    for key_heads in (1, heads[1], heads[0]):
        options = {
            "key_bias": draw(rng, (2, key_heads, N)),
            "bias": draw(rng, (1, heads[0], 1, N)),
            "sink": draw(rng, heads[:1]),
        }
        check(q, k, v, am.causal(), reference.causal(M, N), **options, dropout_p=0.1, seed=4)


@pytest.mark.parametrize("number", range(12))
def test_anything_at_once(number):
    rng = np.random.default_rng(100 + number)
    b, kv_heads, group = (int(rng.integers(1, 4)) for _ in range(3))
    m, n = (int(rng.integers(1, LENGTH)) for _ in range(2))
    mask, allowed = mask_cases.random_tree(rng, b, kv_heads * group, m, n, int(rng.integers(1, 4)))
    dtype = str(rng.choice(HALVES))
    dims = DIMS[int(rng.integers(len(DIMS)))]
    heads = (kv_heads * group, kv_heads)
    q, k, v = (x.to(DEVICE) for x in score_checks.inputs(rng, dtype, b, (m, n), heads, dims))
    options = score_checks.random_options(rng, dtype, b, heads[0], m, n)
    check(q, k, v, mask, allowed, **options)


# ---- the same every time, and everywhere ---------------------------------------------------------


def both_passes(q, k, v, mask, dout, **options):
    """Results, and gradients of q, k, v and the options that have them."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    added = {
        name: x.detach().requires_grad_()
        for name, x in options.items()
        if name in score_checks.OPTIONS
    }
    with poisoned():
        out = am.attention(*leaves, mask, **{**options, **added})
        gradients = torch.autograd.grad(out, [*leaves, *added.values()], dout)
    return dict(zip(["out", "dq", "dk", "dv", *("d" + name for name in added)], (out, *gradients)))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(2, 4), (1, 4), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kv_len", [N, TILED])
def test_the_same_bits_every_time(shape, kv_len):
    """Gradients of options always; the others where that is asked for."""
    rng, (q, k, v) = inputs(14, lengths=(M, kv_len), dims=(128, 128))
    options = to_device(score_checks.some_options(rng, "all", "bfloat16", q, k))
    if kv_len == TILED:
        options["softcap"] = 0.0
    options["bias"] = draw(rng, (*shape, M, kv_len))
    dout = torch.randn_like(q)
    for deterministic in (True, False):
        first = both_passes(q, k, v, am.causal(), dout, deterministic=deterministic, **options)
        for _ in range(5):
            again = both_passes(q, k, v, am.causal(), dout, deterministic=deterministic, **options)
            for name, one in first.items():
                if deterministic or name != "dq":
                    assert torch.equal(one, again[name]), name


@pytest.mark.cuda
@pytest.mark.parametrize("dims", [(128, 128), (256, 256)])
def test_the_cpu_has_the_same(dims):
    """Dropout's pattern too: another one would differ everywhere."""
    rng, (q, k, v) = inputs(15, dims=dims)
    options = to_device(score_checks.some_options(rng, "all", "bfloat16", q, k))
    dout = torch.randn(2, M, 4, dims[1], device=DEVICE).to(q.dtype)
    mask, _ = mask_cases.intervals(rng, 2, 2, M, N)
    got = both_passes(q, k, v, mask.to(DEVICE), dout, **options)
    options = {name: x.cpu() if hasattr(x, "cpu") else x for name, x in options.items()}
    expected = both_passes(*(x.cpu() for x in (q, k, v)), mask, dout.cpu(), **options)
    for name, one in expected.items():
        error = (got[name].cpu().float() - one.float()).abs().max()
        assert error <= 0.02 * one.float().abs().max(), name


@pytest.mark.cuda
def test_a_graph_has_the_backward_pass_too():
    rng, (q, k, v) = inputs(16, dims=(128, 128))
    options = to_device(score_checks.some_options(rng, "all", "bfloat16", q, k))
    options["bias"] = draw(rng, (1, 1, M, N))  # in rounds
    options["seed"] = torch.tensor([5, 0], device=DEVICE)
    dout = torch.randn_like(q)
    eager = both_passes(q, k, v, am.causal(), dout, deterministic=True, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both_passes(q, k, v, am.causal(), dout, deterministic=True, **options)
    for _ in range(2):
        graph.replay()
        for name, one in eager.items():
            assert torch.equal(one, found[name]), name


# ---- size ---------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.gibibytes(14)
def test_biases_beyond_two_to_the_31():
    q_len = kv_len = 50_000
    q, k, v = (torch.randn(1, q_len, 1, 64, device=DEVICE).bfloat16() for _ in range(3))
    bias = torch.empty(1, 1, q_len, kv_len, dtype=torch.bfloat16, device=DEVICE).normal_()
    leaves = [x.requires_grad_() for x in (q, bias)]
    out = am.attention(q, k, v, bias=bias)
    dout = torch.randn_like(out)
    dq, dbias = torch.autograd.grad(out, leaves, dout)
    rows = [0, 1, 24_999, 43_000, 49_998, 49_999]
    with torch.no_grad():
        q, k, v, dout = (x[0, :, 0].double() for x in (q, k, v, dout))
        weights = ((q[rows] @ k.T) / 8 + bias[0, 0, rows].double()).softmax(-1)
        expected = weights @ v
        assert (out[0, rows, 0].double() - expected).abs().max() < 2e-3
        of_weights = dout[rows] @ v.T
        slopes = weights * (of_weights - (dout[rows] * expected).sum(-1, keepdim=True))
        assert (dbias[0, 0, rows].double() - slopes).abs().max() < 0.01 * slopes.abs().max()
        assert (dq[0, rows, 0].double() - slopes @ k / 8).abs().max() < 2e-3
