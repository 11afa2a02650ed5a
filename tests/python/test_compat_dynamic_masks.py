"""apply_dynamic_mask_attention: selection, bias and gradients against a slow, independent one."""

from __future__ import annotations

import functools
import math

import anymask as am
import numpy as np
import pytest
import torch
from anymask.compat import dynamic_masks
from checks import DTYPES, assert_close, poisoned
from hypothesis import given
from hypothesis import strategies as st

NAMES = ("query", "key", "value", "dt_proj", "A")


def draw(rng, lengths, heads, dim=16, *, batch=2, score_heads=None, dtype="float32", steps=None):
    """query, key, value, dt_proj, A. `steps`: multiples of 1 / steps, so that every type holds the
    scores exactly and many are equal."""
    score_heads = score_heads or heads[1]
    shapes = [(batch, heads[0], lengths[0], dim)] + [(batch, heads[1], lengths[1], dim)] * 2
    shapes += [(score_heads, heads[1] * dim), (score_heads,)]
    tensors = [rng.standard_normal(shape) for shape in shapes]
    tensors[3] /= math.sqrt(shapes[3][1])
    tensors[4] *= 0.4
    if steps:
        tensors[2] = rng.integers(-1, 2, shapes[2]) / steps
        tensors[3] = rng.integers(-1, 2, shapes[3]) / steps
        tensors[4] = rng.choice([-1.0, -0.5, 0.5, 1.0], shapes[4])
    return [torch.from_numpy(x).to(DTYPES[dtype]) for x in tensors]


# ---- the definition, slowly ---------------------------------------------------------------------


def visible_pairs(causal_mask, is_causal, batch, q_len, kv_len):
    """bool [batch, q_len, kv_len]."""
    visible = np.ones((batch, q_len, kv_len), bool)
    if causal_mask is not None:
        allowed = causal_mask if causal_mask.dtype == torch.bool else causal_mask == 0
        visible &= allowed[:, 0].numpy()
    if is_causal:
        i, j = np.arange(q_len)[:, None], np.arange(kv_len)
        visible &= j <= i + kv_len - q_len
    return visible


def kept_pairs(value, dt_proj, A, visible, keep):
    """Query by query: bool [batch, score heads, q_len, kv_len]. Softplus is not needed: it rises,
    so the order is that of dt, turned round by a negative A; equal for all when A is 0."""
    flat = value.detach().double().permute(0, 2, 1, 3).flatten(2).numpy()
    dt = flat @ dt_proj.detach().double().numpy().T
    batch, q_len, kv_len = visible.shape
    heads = dt.shape[2]
    kept = np.zeros((batch, heads, q_len, kv_len), bool)
    for b in range(batch):
        for h in range(heads):
            score = dt[b, :, h] * np.sign(float(A[h]))
            for i in range(q_len):
                seen = [j for j in range(kv_len) if visible[b, i, j]]
                seen.sort(key=lambda j, s=score: (-s[j], j))
                kept[b, h, i, seen[:keep]] = True
    return kept


def slow(query, key, value, dt_proj, A, kept, scale, score):
    """Dense, in the tensors' own precision, differentiable; nothing seen gives 0."""
    heads = query.shape[1]
    flat = value.permute(0, 2, 1, 3).flatten(2)
    s = A * torch.log1p(torch.exp(flat @ dt_proj.T))
    bias = (s.exp() if score == "exp" else s).transpose(1, 2)
    kept = torch.from_numpy(kept).repeat_interleave(heads // kept.shape[1], 1)
    bias = bias.repeat_interleave(heads // bias.shape[1], 1)
    key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scale + bias[:, :, None]
    seen = kept.any(-1, keepdim=True)
    logits = logits.masked_fill(~kept, float("-inf")).masked_fill(~seen, 0.0)
    return torch.softmax(logits, -1).masked_fill(~kept, 0.0) @ value


def condition_of_sums(inputs, kept, scale, score, dout):
    """How far roundings move the gradients of dt_proj and A, in units of float32. float64 inputs.

    Either is few sums over all keys, of terms that cancel. A term has weights in it that come back
    as exp(logit - lse), two numbers as large as z and rounded as such. So it is the largest sum of
    the terms' absolute values, times the largest z. (Of 40 random inputs none was off by more than
    1.4 of that, the naive way, which subtracts the largest logit and has no lse, by 0.4.)
    """
    query, key, value, dt_proj, A = inputs
    flat = value.permute(0, 2, 1, 3).flatten(2)
    dt = flat @ dt_proj.T
    of_keys = A.expand_as(dt).clone().requires_grad_()  # as if each key had an A of its own
    out = slow(query, key, value, dt_proj, of_keys, kept, scale, score)
    (terms,) = torch.autograd.grad(out, of_keys, dout)
    slopes = terms * A * dt.sigmoid() / torch.log1p(dt.exp())  # of dt
    if terms.numel() == 0:
        return {}
    s = A * torch.log1p(dt.exp())
    z = max(1.0, (s.exp() if score == "exp" else s).abs().max().item())
    sums = torch.einsum("bkh,bkd->hd", slopes.abs(), flat.abs())
    return {"dt_proj": z * sums.max().item(), "A": z * terms.abs().sum((0, 1)).max().item()}


def check(inputs, keep, *, causal_mask=None, is_causal=True, scale=None, score="exp"):
    """out and all five gradients against float64."""
    query, key, value, dt_proj, A = inputs
    visible = visible_pairs(causal_mask, is_causal, query.shape[0], query.shape[2], key.shape[2])
    kept = kept_pairs(value, dt_proj, A, visible, keep)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    rng = torch.Generator().manual_seed(query.numel())
    dout = torch.randn(*query.shape[:3], value.shape[3], dtype=torch.float64, generator=rng)

    def run(call, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = call(leaves)
        return leaves, out, torch.autograd.grad(out, leaves, dout.to(dtype))

    def naive(leaves, order=slice(None)):
        query, key, value, *others = leaves
        return slow(query, key[:, :, order], value[:, :, order], *others, kept[..., order], factor,
                    score)  # fmt: skip

    def call(leaves):
        return am.apply_dynamic_mask_attention(
            *leaves, causal_mask, keep, is_causal, scale=scale, score=score
        )

    _, ref, ref_gradients = run(naive, torch.float64)
    _, low, *low_gradients = run(naive, query.dtype)
    # The gradients of A and dt_proj are few sums of many terms, which the naive way may hit by
    # luck: it is as good as in the worst of several orders of the keys.
    for _ in range(5):
        order = torch.randperm(key.shape[2], generator=rng).numpy()
        low_gradients.append(run(functools.partial(naive, order=order), query.dtype)[2])
    with poisoned():
        _, out, gradients = run(call, query.dtype)
    assert out.dtype == query.dtype
    assert_close("out", out, ref.detach(), low, 1e-6)
    blind = torch.from_numpy(~kept.any(-1)).repeat_interleave(query.shape[1] // kept.shape[1], 1)
    assert (out[blind] == 0).all() and (gradients[0][blind] == 0).all()
    # Beyond that, they are rounded once, and their terms are.
    eps, term_eps = (torch.finfo(dtype).eps for dtype in (query.dtype, torch.float32))
    conditions = condition_of_sums([x.detach().double() for x in inputs], kept, factor, score, dout)
    for name, got, expected, *lows in zip(NAMES, gradients, ref_gradients, *low_gradients):
        assert got.dtype == query.dtype
        worst = max(lows, key=lambda x, ref=expected: (x.double() - ref).abs().max())
        floor = 1e-5
        if name in conditions:
            rounded = 2 * eps * expected.abs().max().item()
            floor = max(floor, rounded, 2 * term_eps * conditions[name])
        assert_close("d" + name, got, expected, worst, floor)
    return out


# ---- values and gradients -----------------------------------------------------------------------

LENGTHS = [(150, 150), (61, 170), (170, 61)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("keep", [1, 20, 64, 169])
@pytest.mark.parametrize("score", ["exp", "linear"])
def test_causal(lengths, keep, score):
    # With one key kept, gradients of scores are 0, which the naive way gets exactly.
    dtype = "float64" if keep == 1 else "float32"
    check(draw(np.random.default_rng(1), lengths, (4, 2), dtype=dtype), keep, score=score)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [(2, 2, 2), (6, 2, 2), (6, 2, 6), (4, 1, 1), (4, 1, 4)])
def test_heads(lengths, heads):
    rng = np.random.default_rng(2)
    check(draw(rng, lengths, heads[:2], score_heads=heads[2]), 30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_types_and_ties(dtype, is_causal):
    rng = np.random.default_rng(3)
    inputs = draw(rng, (130, 130), (4, 2), dtype=dtype, steps=2)
    check(inputs, 25, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_every_key_ties(is_causal, masked):
    # A is 0 when training begins: each query keeps the first keys that it may see.
    rng = np.random.default_rng(4)
    inputs = draw(rng, (90, 110), (2, 2))
    inputs[4].zero_()
    mask = torch.from_numpy(rng.random((2, 1, 90, 110)) < 0.6) if masked else None
    check(inputs, 17, is_causal=is_causal, causal_mask=mask)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("score", ["exp", "linear"])
@pytest.mark.parametrize("keep", [1, 40])
def test_not_causal(lengths, score, keep):
    dtype = "float64" if keep == 1 else "float32"
    inputs = draw(np.random.default_rng(5), lengths, (4, 2), dtype=dtype)
    check(inputs, keep, is_causal=False, score=score)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("keep", [150, 151, 5000])
def test_windows_that_keep_all(is_causal, keep):
    rng = np.random.default_rng(6)
    inputs = draw(rng, (150, 150), (4, 2))
    check(inputs, keep, is_causal=is_causal)
    mask = torch.from_numpy(rng.random((1, 1, 150, 150)) < 0.5)
    check(inputs, keep, is_causal=is_causal, causal_mask=mask)


@pytest.mark.parametrize("is_causal", [True, False])
def test_windows_that_keep_nothing(is_causal):
    out = check(draw(np.random.default_rng(7), (40, 50), (2, 1)), 0, is_causal=is_causal)
    assert not out.any()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("additive", [True, False])
def test_general_masks(lengths, is_causal, batch, additive):
    rng = np.random.default_rng(8)
    mask = torch.from_numpy(rng.random((batch, 1, *lengths)) < 0.7)
    mask[:, :, 3] = False  # a query that sees nothing
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    inputs = draw(rng, lengths, (4, 2))
    check(inputs, 12, causal_mask=mask, is_causal=is_causal)


def test_general_masks_are_ranked_in_parts(monkeypatch):
    rng = np.random.default_rng(9)
    mask = torch.from_numpy(rng.random((2, 1, 60, 70)) < 0.5)
    inputs = draw(rng, (60, 70), (4, 2))
    whole = check(inputs, 9, causal_mask=mask)
    monkeypatch.setattr(dynamic_masks, "_PAIRS_AT_ONCE", 7 * 2 * 2 * 70 + 5)
    assert torch.equal(check(inputs, 9, causal_mask=mask), whole)


@pytest.mark.parametrize("keep", [5, 60, 200])
def test_the_triangle_as_a_mask_is_the_same(keep):
    inputs = draw(np.random.default_rng(10), (100, 160), (4, 2), steps=2)
    triangle = torch.ones(1, 1, 100, 160, dtype=torch.bool).tril(60)
    fast = am.apply_dynamic_mask_attention(*inputs, None, keep)
    for is_causal in (True, False):
        dense = am.apply_dynamic_mask_attention(*inputs, triangle, keep, is_causal)
        torch.testing.assert_close(dense, fast, atol=2e-6, rtol=0)


def test_scale():
    inputs = draw(np.random.default_rng(11), (60, 60), (2, 1))
    for scale in (0.7, -0.3, 0.0):
        check(inputs, 10, scale=scale)


def test_values_of_another_head_dim():
    rng = np.random.default_rng(12)
    query, key, _, _, A = draw(rng, (80, 80), (4, 2))
    value, dt_proj = (torch.from_numpy(rng.standard_normal(n)).float()
                      for n in ((2, 2, 80, 24), (2, 48)))  # fmt: skip
    check([query, key, value, dt_proj / 7, A], 13)


@given(seed=st.integers(0, 2**32 - 1), is_causal=st.booleans(), masked=st.booleans())
def test_random_sizes(seed, is_causal, masked):
    rng = np.random.default_rng(seed)
    lengths = tuple(int(n) for n in rng.integers(1, 130, 2))
    kv_heads, group = (int(n) for n in rng.integers(1, 4, 2))
    heads = (kv_heads * group, kv_heads)
    score_heads = heads[rng.integers(2)]
    inputs = draw(rng, lengths, heads, 8, score_heads=score_heads, dtype="float64", steps=2)
    mask = torch.from_numpy(rng.random((rng.choice([1, 2]), 1, *lengths)) < 0.6) if masked else None
    score = str(rng.choice(["exp", "linear"]))
    keep = int(rng.integers(0, lengths[1] + 2))
    check(inputs, keep, causal_mask=mask, is_causal=is_causal, score=score)


@pytest.mark.parametrize("score", ["exp", "linear"])
@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"masked": True}])
def test_gradients_by_differences(score, options):
    rng = np.random.default_rng(13)
    inputs = draw(rng, (6, 9), (4, 2), 8, batch=1, dtype="float64")
    mask = torch.from_numpy(rng.random((1, 1, 6, 9)) < 0.8) if options.get("masked") else None
    torch.autograd.gradcheck(
        lambda *x: am.apply_dynamic_mask_attention(
            *x, mask, 4, options.get("is_causal", True), score=score
        ),
        [x.requires_grad_() for x in inputs],
        fast_mode=True,
    )


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_alone(name):
    place = NAMES.index(name)
    inputs = draw(np.random.default_rng(14), (50, 50), (2, 1))
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(
        am.apply_dynamic_mask_attention(*leaves, None, 9).sin().sum(), leaves
    )
    inputs[place].requires_grad_()
    am.apply_dynamic_mask_attention(*inputs, None, 9).sin().sum().backward()
    torch.testing.assert_close(inputs[place].grad, expected[place])
    assert all(x.grad is None for x in inputs if x is not inputs[place])


# ---- cost ---------------------------------------------------------------------------------------


def masks_made(monkeypatch, *arguments):
    made = []
    attention = dynamic_masks.attention
    monkeypatch.setattr(
        dynamic_masks, "attention", lambda *a, **b: made.append(a[3]) or attention(*a, **b)
    )
    am.apply_dynamic_mask_attention(*arguments)
    return made[0]


def test_memory_is_linear_and_tiles_are_skipped(monkeypatch):
    inputs = draw(np.random.default_rng(15), (2048, 2048), (2, 1), 8, batch=1)
    mask = masks_made(monkeypatch, *inputs, None, 64)
    assert sum(math.prod(array.shape) for array in mask.arrays) == 2048
    assert repr(mask).endswith(".reordered()")
    everyone = masks_made(monkeypatch, *inputs, None, 64, False)
    assert sum(math.prod(array.shape) for array in everyone.arrays) == 2 * 2048
    assert repr(everyone).endswith(".reordered()")
    assert np.array_equal(everyone.to_dense(1, 2, 2048, 2048).sum(-1), np.full((1, 1, 2048), 64))
    assert masks_made(monkeypatch, *inputs, None, 2048).spec == am.causal().spec


# ---- torch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("keep", [9, 60])
def test_compile(backend, keep):
    function = functools.partial(am.apply_dynamic_mask_attention, keep_window_size=keep)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    inputs = draw(np.random.default_rng(16), (60, 60), (4, 2), dtype="float64")
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for call in (function, compiled):
        out = call(*leaves)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)


def test_strides_and_autocast():
    packed = torch.randn(2, 40, 3, 4, 16)
    query, key, value = (x.transpose(1, 2) for x in packed.unbind(2))
    _, _, _, dt_proj, A = draw(np.random.default_rng(17), (40, 40), (4, 4))
    check([query, key, value, dt_proj, A], 11)
    with torch.autocast("cpu", torch.bfloat16):
        out = am.apply_dynamic_mask_attention(query, key, value, dt_proj, A, None, 11)
    assert out.dtype == torch.bfloat16
    full = am.apply_dynamic_mask_attention(query, key, value, dt_proj, A, None, 40)
    with torch.autocast("cpu", torch.bfloat16):
        half = am.apply_dynamic_mask_attention(query, key, value, dt_proj, A, None, 40)
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_no_queries_or_no_keys(lengths, is_causal, masked):
    inputs = draw(np.random.default_rng(18), lengths, (2, 1), 8)
    mask = torch.ones(1, 1, *lengths, dtype=torch.bool) if masked else None
    out = am.apply_dynamic_mask_attention(*inputs, mask, 2, is_causal)
    assert out.shape == inputs[0].shape and not out.any()


# ---- errors -------------------------------------------------------------------------------------

INPUTS = [torch.ones(2, 4, 5, 16), torch.ones(2, 2, 7, 16), torch.ones(2, 2, 7, 24)]
INPUTS += [torch.ones(2, 48), torch.ones(2)]
Q, K, V, DT, A = INPUTS


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "query: got list, a tensor or array", {"query": [1.0]}),
        (TypeError, "key: got ndarray, but query is a Tensor", {"key": K.numpy()}),
        (TypeError, "query: got ndarray, a torch tensor is needed",
         {"query": Q.numpy(), "key": K.numpy(), "value": V.numpy()}),
        (ValueError, r"key: got 3 heads, a divisor of query's 4",
         {"key": torch.ones(2, 3, 7, 16), "value": torch.ones(2, 3, 7, 24)}),
        (ValueError, r"value: got length 6 .*key's 7", {"value": V[:, :, :6]}),
        (TypeError, "dt_proj: got ndarray, a torch tensor", {"dt_proj": DT.numpy()}),
        (TypeError, "dt_proj: got element type int64, a floating", {"dt_proj": DT.long()}),
        (TypeError, "dt_proj: got element type bfloat16, value's float32",
         {"dt_proj": DT.bfloat16()}),
        (TypeError, "dt_proj: is on meta; it must be on cpu", {"dt_proj": DT.to("meta")}),
        (ValueError, r"dt_proj: got shape \(3, 48\), .*\[2 or 4, 48\]",
         {"dt_proj": torch.ones(3, 48), "A": torch.ones(3)}),
        (ValueError, r"dt_proj: got shape \(2, 32\), .*\[2 or 4, 48\]", {"dt_proj": DT[:, :32]}),
        (ValueError, r"dt_proj: got shape \(48,\)", {"dt_proj": DT[0]}),
        (TypeError, "A: got float, a torch tensor", {"A": 1.0}),
        (TypeError, "A: got element type int32, a floating", {"A": A.int()}),
        (ValueError, r"A: got shape \(4,\), .*\[2\], as dt_proj has", {"A": torch.ones(4)}),
        (TypeError, "causal_mask: got list, a torch tensor", {"causal_mask": [[True]]}),
        (ValueError, r"causal_mask: got shape \(5, 7\), \[2 or 1, 1, 5, 7\]",
         {"causal_mask": torch.ones(5, 7)}),
        (ValueError, r"causal_mask: got shape \(2, 4, 5, 7\)",
         {"causal_mask": torch.ones(2, 4, 5, 7)}),
        (ValueError, r"causal_mask: got shape \(1, 1, 5, 8\)",
         {"causal_mask": torch.ones(1, 1, 5, 8)}),
        (ValueError, "keep_window_size: got -1, 0 or more", {"keep_window_size": -1}),
        (TypeError, "keep_window_size: got 1.5, an integer", {"keep_window_size": 1.5}),
        (TypeError, "is_causal: got 'yes', True or False", {"is_causal": "yes"}),
        (ValueError, "scale: got inf, a finite", {"scale": float("inf")}),
        (ValueError, "score: got 'log', 'exp' or 'linear'", {"score": "log"}),
    ],
)  # fmt: skip
def test_errors(error, message, options):
    good = dict(zip(NAMES, INPUTS))
    with pytest.raises(error, match="^" + message):
        am.apply_dynamic_mask_attention(**{**good, **options})
    assert am.apply_dynamic_mask_attention(**good, keep_window_size=3).isfinite().all()
