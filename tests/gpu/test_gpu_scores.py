"""Dropout, biases, softcap and sink on the GPU, against their definitions in float64."""

from __future__ import annotations

import anymask as am
import mask_cases
import numpy as np
import pytest
import reference
import reference_scores
import score_checks
import torch
from checks import DTYPES
from problem import DEVICE, HALVES, LENGTH, ON_GPU, poisoned

DIMS = [(64, 64), (128, 128), (256, 256), (192, 128), (72, 200)]
BACKWARD = not ON_GPU  # the GPU has the forward pass so far
EACH = ["softcap", "key_bias", "bias", "sink", "dropout"]
M, N = (LENGTH // 2, LENGTH - 83) if ON_GPU else (90, 121)


def to_device(options):
    return {name: x.to(DEVICE) if hasattr(x, "to") else x for name, x in options.items()}


def inputs(seed, dtype="bfloat16", batch=2, lengths=(M, N), heads=(4, 2), dims=(64, 64)):
    """A random generator and q, k, v."""
    rng = np.random.default_rng(seed)
    return rng, [x.to(DEVICE) for x in score_checks.inputs(rng, dtype, batch, lengths, heads, dims)]


def draw(rng, shape, dtype="bfloat16"):
    return score_checks.draw(rng, shape, dtype).to(DEVICE)


def check(q, k, v, mask, allowed, **options):
    mask = None if mask is None else mask.to(DEVICE)
    with poisoned():
        score_checks.check(q, k, v, mask, allowed, backward=BACKWARD, **to_device(options))


def masks(rng, b, h, m, n):
    """One for every way in which the kernels make mask bits, and keys in another order."""
    return {
        "none": (None, np.ones((1, 1, m, n), bool)),
        "runs": (am.causal(), reference.causal(m, n)),
        "recipe": mask_cases.dense(rng, b, h, m, n),
        "machine": (~am.sliding_window(50, 20), ~reference.sliding_window(m, n, 50, 20)),
    }


@pytest.mark.parametrize("which", [*EACH, "all"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dims", DIMS, ids=lambda dims: f"{dims[0]}-{dims[1]}")
def test_every_option(dims, dtype, which):
    rng, (q, k, v) = inputs(1, dtype, dims=dims)
    options = score_checks.some_options(rng, which, dtype, q, k)
    for mask, allowed in masks(rng, 2, 4, M, N).values():
        check(q, k, v, mask, allowed, **options)
    check(q, k, v, am.causal(), reference.causal(M, N), deterministic=True, **options)


@pytest.mark.parametrize("which", [*EACH, "all"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
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
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
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


@pytest.mark.parametrize("number", range(20))
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


# ---- dropout ------------------------------------------------------------------------------------


def pattern(p, seed, mask, heads, q_len, kv_len, dtype, dim=64):
    """What the GPU keeps, bool [1, heads, q_len, kv_len]: equal weights of one-hot values."""
    q = torch.zeros(1, q_len, heads, dim, dtype=DTYPES[dtype], device=DEVICE)
    k = torch.zeros(1, kv_len, heads, dim, dtype=q.dtype, device=DEVICE)
    one_hot = torch.eye(kv_len, device=DEVICE).to(q.dtype)
    mask = None if mask is None else mask.to(DEVICE)
    parts = []
    for first in range(0, kv_len, dim):
        values = torch.zeros(kv_len, dim, dtype=q.dtype, device=DEVICE)
        columns = one_hot[:, first : first + dim]
        values[:, : columns.shape[1]] = columns
        v = values[None, :, None].expand(1, kv_len, heads, dim)
        out = am.attention(q, k, v, mask, dropout_p=p, seed=seed)
        parts.append(out[..., : columns.shape[1]].transpose(1, 2) > 0)
    return torch.cat(parts, -1).cpu().numpy()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 1e-3])
def test_the_pattern_is_the_documented_one(p, dim, dtype):
    seed = torch.tensor([-(2**40) - 7, 2**35 + 3], device=DEVICE)
    expected = reference_scores.kept(p, int(seed[0]), 1, 3, M, N, offset=int(seed[1]))
    assert np.array_equal(pattern(p, seed, None, 3, M, N, dtype, dim), expected)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_pattern_belongs_to_the_callers_keys(dim):
    rng = np.random.default_rng(12)
    allowed = rng.random((1, 2, M, N)) < 0.3
    allowed[..., M // 3 : M // 2] = False
    expected = reference_scores.kept(0.4, 11, 1, 2, M, N)
    for mask in (am.dense(allowed), am.dense(allowed).reordered()):
        got = pattern(0.4, 11, mask, 2, M, N, "bfloat16", dim)
        assert np.array_equal(got, expected & allowed)


@pytest.mark.cuda
def test_a_graph_may_change_its_seed():
    _, (q, k, v) = inputs(13)
    seed = torch.tensor([5, 0], device=DEVICE)
    plan = am.plan(
        am.causal(), batch=2, q_heads=4, kv_heads=2, q_len=M, kv_len=N, head_dim=64,
        dtype=q.dtype, device=DEVICE,
    )  # fmt: skip

    def call():
        return am.attention(q, k, v, plan=plan, dropout_p=0.2, seed=seed)

    eager = []
    for offset in range(3):
        seed[1] = offset
        eager.append(call())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for offset in (2, 0, 1):
        seed[1] = offset
        graph.replay()
        assert torch.equal(out, eager[offset])


@pytest.mark.cuda
def test_the_same_bits_every_time():
    rng, (q, k, v) = inputs(14, dims=(128, 128))
    options = to_device(score_checks.some_options(rng, "all", "bfloat16", q, k))
    first = am.attention(q, k, v, am.causal(), return_lse=True, **options)
    for _ in range(10):
        again = am.attention(q, k, v, am.causal(), return_lse=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


# ---- size ---------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.gibibytes(8)
def test_biases_beyond_two_to_the_31():
    q_len = kv_len = 50_000
    q, k, v = (torch.randn(1, q_len, 1, 64, device=DEVICE).bfloat16() for _ in range(3))
    bias = torch.empty(1, 1, q_len, kv_len, dtype=torch.bfloat16, device=DEVICE).normal_()
    out = am.attention(q, k, v, bias=bias)
    rows = [0, 1, 24_999, 43_000, 49_998, 49_999]
    scores = (q[0, rows, 0].double() @ k[0, :, 0].double().T) / 8 + bias[0, 0, rows].double()
    expected = scores.softmax(-1) @ v[0, :, 0].double()
    assert (out[0, rows, 0].double() - expected).abs().max() < 2e-3
