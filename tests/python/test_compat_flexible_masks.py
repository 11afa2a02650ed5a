"""flexible_attention: ids for queries and keys, causal or not, both passes."""

from __future__ import annotations

import functools

import anymask as am
import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_compat_common import check, draw_qkv

LENGTHS = [(261, 261), (130, 301), (301, 130)]


def call(**options):
    return functools.partial(am.flexible_attention, **options)


def draw_ids(rng, batch, heads, length, low=-4, high=1):
    return torch.from_numpy(rng.integers(low, high, (batch, heads, length)))


def rule(eq, ek, lengths, causal, batch, heads):
    """By definition: visible iff eq >= 0 or eq == ek, and causal if asked."""
    eq = np.broadcast_to(eq.numpy(), (batch, heads, lengths[0]))
    ek = np.broadcast_to(ek.numpy(), (batch, heads, lengths[1]))
    allowed = reference.ids(eq, ek)
    return allowed & reference.causal(*lengths) if causal else allowed


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ids", [(1, 1, 1, 1), (2, 4, 2, 4), (1, 4, 2, 1), (2, 1, 1, 4)])
def test_ids(causal, lengths, ids):
    rng = np.random.default_rng(1)
    eq, ek = draw_ids(rng, *ids[:2], lengths[0]), draw_ids(rng, *ids[2:], lengths[1])
    q, k, v = draw_qkv(rng, 2, lengths, (4, 2), 16)
    options = {"causal": causal, "eq": eq, "ek": ek, "score_func_mode": 1}
    check(call(**options), q, k, v, rule(eq, ek, lengths, causal, 2, 4), layout="bhsd")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_types(dtype):
    rng = np.random.default_rng(2)
    ids = draw_ids(rng, 1, 2, 150)
    q, k, v = draw_qkv(rng, 1, (150, 150), (2, 2), 64, dtype)
    options = {"causal": True, "eq": ids, "ek": ids, "score_func_mode": 1}
    check(call(**options), q, k, v, rule(ids, ids, (150, 150), True, 1, 2), layout="bhsd")


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
     torch.bool],
    ids=str,
)  # fmt: skip
def test_types_of_ids(dtype):
    rng = np.random.default_rng(3)
    low = -4 if dtype.is_signed and dtype is not torch.bool else 0
    ek = draw_ids(rng, 1, 1, 40, low, low + 2).to(dtype)
    for eq in (draw_ids(rng, 1, 1, 40, low, low + 3).to(dtype), draw_ids(rng, 1, 1, 40)):
        q, k, v = draw_qkv(rng, 1, (40, 40), (2, 1), 16)
        expected = rule(eq.long(), ek.long(), (40, 40), False, 1, 2)
        check(call(eq=eq, ek=ek, score_func_mode=1), q, k, v, expected, layout="bhsd")


def test_ids_at_the_ends_of_their_type():
    rng = np.random.default_rng(4)
    smallest, largest = -(2**63), 2**63 - 1
    eq = torch.tensor([smallest, largest, -1, -(2**32) - 1, 0]).reshape(1, 1, 5)
    ek = torch.tensor([smallest, -1, -(2**32) - 1, largest, 2**32 - 1]).reshape(1, 1, 5)
    q, k, v = draw_qkv(rng, 1, (5, 5), (1, 1), 16)
    options = {"eq": eq, "ek": ek, "score_func_mode": 1}
    check(call(**options), q, k, v, rule(eq, ek, (5, 5), False, 1, 1), layout="bhsd")


def test_expanded_ids():
    rng = np.random.default_rng(5)
    q, k, v = draw_qkv(rng, 2, (70, 90), (4, 2), 16)
    eq, ek = draw_ids(rng, 2, 1, 70), draw_ids(rng, 1, 1, 90)
    expected = rule(eq, ek, (70, 90), False, 2, 4)
    options = {"eq": eq.expand(2, 4, 70), "ek": ek.expand(2, 4, 90), "score_func_mode": 1}
    check(call(**options), q, k, v, expected, layout="bhsd")


def test_rows_that_see_nothing():
    rng = np.random.default_rng(6)
    eq, ek = draw_ids(rng, 2, 4, 200), draw_ids(rng, 2, 4, 300)
    eq[0, :, 50:180] = -9  # an id that no key has
    eq[1] = -9
    q, k, v = draw_qkv(rng, 2, (200, 300), (4, 2), 16)
    expected = rule(eq, ek, (200, 300), False, 2, 4)
    check(call(eq=eq, ek=ek, score_func_mode=1), q, k, v, expected, layout="bhsd")


def test_scores_far_below_zero():
    # A maximum that starts at -10000 instead of -inf loses these rows.
    q, k = torch.full((1, 1, 40, 16), 100.0), torch.full((1, 1, 40, 16), -100.0)
    v = torch.randn(1, 1, 40, 16)
    ids = torch.full((1, 1, 40), -1)
    out = am.flexible_attention(q, k, v, eq=ids, ek=ids, score_func_mode=1)
    assert torch.allclose(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_mode_0_does_not_look_at_ids(causal, lengths):
    rng = np.random.default_rng(7)
    q, k, v = draw_qkv(rng, 1, lengths, (2, 1), 16)
    allowed = reference.causal(*lengths) if causal else np.ones((1, 1, *lengths), bool)
    out = check(call(causal=causal), q, k, v, allowed, layout="bhsd")
    eq, ek = draw_ids(rng, 1, 1, lengths[0]), draw_ids(rng, 1, 1, lengths[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    assert torch.equal(am.flexible_attention(q, k, v, causal, None, eq, ek, 0), out.transpose(1, 2))


@given(seed=st.integers(0, 2**32 - 1), causal=st.booleans())
def test_random_sizes(seed, causal):
    rng = np.random.default_rng(seed)
    lengths = tuple(int(n) for n in rng.integers(1, 200, 2))
    kv_heads, group = (int(n) for n in rng.integers(1, 4, 2))
    heads = kv_heads * group
    eq = draw_ids(rng, rng.choice([1, 2]), rng.choice([1, heads]), lengths[0])
    ek = draw_ids(rng, rng.choice([1, 2]), rng.choice([1, heads]), lengths[1])
    q, k, v = draw_qkv(rng, 2, lengths, (heads, kv_heads), 16)
    options = {"causal": causal, "eq": eq, "ek": ek, "score_func_mode": 1}
    check(call(**options), q, k, v, rule(eq, ek, lengths, causal, 2, heads), layout="bhsd")


def test_ids_rule_tiles_out():
    ids = np.repeat(-1 - np.arange(4), 128).reshape(1, 1, 512)
    classes = am.ids(ids, ids).tile_classes(tile=128)[0, 0]
    assert np.array_equal(classes, np.where(np.eye(4), 1, 2))  # 1 all pairs, 2 none


def test_numpy_and_tracing():
    rng = np.random.default_rng(8)
    tensors = [x.transpose(1, 2).contiguous() for x in draw_qkv(rng, 1, (50, 50), (2, 1), 16)]
    ids = draw_ids(rng, 1, 1, 50).short()
    function = functools.partial(am.flexible_attention, causal=True, score_func_mode=1)
    expected = function(*tensors, eq=ids, ek=ids)
    array = ids.numpy()
    assert torch.equal(function(*tensors, eq=array, ek=array), expected)
    out = function(*(x.numpy() for x in tensors), eq=array, ek=array)
    assert np.array_equal(out, expected.numpy())
    traced = torch.compile(
        lambda *x: am.flexible_attention(*x[:3], True, None, x[3], x[3], 1),
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(traced(*tensors, ids), expected)


Q, K, V = torch.ones(2, 4, 5, 16), torch.ones(2, 2, 7, 16), torch.ones(2, 2, 7, 16)
EQ, EK = torch.zeros(2, 1, 5, dtype=torch.int32), torch.zeros(2, 1, 7, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "score_func_mode: got 2, 0", {"score_func_mode": 2}),
        (TypeError, "score_func_mode: got 'doc', an integer", {"score_func_mode": "doc"}),
        (TypeError, "causal: got 'yes', True or False", {"causal": "yes"}),
        (ValueError, "eq: got None, but", {"score_func_mode": 1}),
        (ValueError, "ek: got None, but", {"score_func_mode": 1, "eq": EQ}),
        (ValueError, "eq: got None, but", {"ek": EK}),
        (ValueError, "ek: got None, but", {"eq": EQ}),
        (TypeError, "eq: got list, a tensor", {"eq": [1], "ek": EK, "score_func_mode": 1}),
        (ValueError, r"eq: got shape \(2, 5\), .*\[2, 4, 5\]",
         {"eq": EQ[:, 0], "ek": EK, "score_func_mode": 1}),
        (ValueError, r"eq: got shape \(2, 1, 7\)", {"eq": EK, "ek": EK, "score_func_mode": 1}),
        (ValueError, r"ek: got shape \(2, 2, 7\)",
         {"eq": EQ, "ek": EK.expand(2, 2, 7), "score_func_mode": 1}),
        (ValueError, r"ek: got shape \(3, 1, 7\)",
         {"eq": EQ, "ek": EK[:1].expand(3, 1, 7), "score_func_mode": 1}),
        (TypeError, "ek: got element type float32, an integer type",
         {"eq": EQ, "ek": EK.float(), "score_func_mode": 1}),
        (TypeError, "eq: is on meta; it must be on cpu, where q is",
         {"eq": EQ.to("meta"), "ek": EK, "score_func_mode": 1}),
    ],
)  # fmt: skip
def test_errors(error, message, options):
    with pytest.raises(error, match="^" + message):
        am.flexible_attention(Q, K, V, **options)
    assert am.flexible_attention(Q, K, V, True, None, EQ, EK, 1).isfinite().all()
