"""flashmask_attention: every mask, window and block mask, alone and together, both passes."""

from __future__ import annotations

import functools

import anymask as am
import numpy as np
import pytest
import reference
import reference_scores
import torch
from checks import assert_close, naive, per_head, poisoned
from hypothesis import given
from hypothesis import strategies as st
from test_compat_common import check, draw_qkv

FORMS = [(True, 1), (True, 2), (False, 2), (False, 4)]
LENGTHS = [(261, 261), (130, 301), (301, 130)]


def random_indices(rng, batch, heads, lengths, columns):
    """Any order, overlapping, beyond both ends."""
    shape = (batch, heads, lengths[1], columns)
    return torch.from_numpy(rng.integers(-2, lengths[0] + 3, shape).astype(np.int32))


def window_rule(lengths, left, right):
    """Row i sees keys i - left .. i + right, rows counted from the end."""
    i = np.arange(lengths[0])[:, None] + lengths[1] - lengths[0]
    j = np.arange(lengths[1])
    return ((left < 0) | (j >= i - left)) & ((right < 0) | (j <= i + right))


def call(**options):
    return functools.partial(am.flashmask_attention, **options)


@pytest.mark.parametrize(("causal", "columns"), FORMS)
@pytest.mark.parametrize("mask_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_intervals(causal, columns, mask_heads, lengths):
    rng = np.random.default_rng(mask_heads)
    indices = random_indices(rng, rng.choice([1, 2]), mask_heads, lengths, columns)
    allowed = reference.intervals(indices.numpy(), causal, lengths[0])
    q, k, v = draw_qkv(rng, 2, lengths, (4, 2), 16)
    check(call(startend_row_indices=indices, causal=causal), q, k, v, allowed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize(("causal", "columns"), FORMS)
def test_types(dtype, causal, columns):
    rng = np.random.default_rng(11)
    indices = random_indices(rng, 1, 2, (141, 141), columns)
    allowed = reference.intervals(indices.numpy(), causal, 141)
    q, k, v = draw_qkv(rng, 1, (141, 141), (2, 2), 64, dtype)
    check(call(startend_row_indices=indices, causal=causal), q, k, v, allowed)


def test_the_order_of_the_two_runs_says_nothing():
    rng = np.random.default_rng(12)
    leaves = [x.requires_grad_() for x in draw_qkv(rng, 1, (300, 300), (2, 1), 16)]
    indices = random_indices(rng, 1, 1, (300, 300), 4)
    results = []
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        out = am.flashmask_attention(*leaves, indices[..., order].contiguous())
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("causal", [True, False])
def test_runs_that_end_before_they_begin_hide_nothing(causal):
    rng = np.random.default_rng(13)
    q, k, v = draw_qkv(rng, 1, (150, 150), (1, 1), 16)
    backwards = torch.tensor([90, 20] if causal else [90, 20, 150, 0], dtype=torch.int32)
    indices = backwards.expand(1, 1, 150, -1)
    out = am.flashmask_attention(q, k, v, indices, causal=causal)
    assert torch.equal(out, am.flashmask_attention(q, k, v, causal=causal))


def test_rows_that_see_nothing():
    rng = np.random.default_rng(14)
    indices = torch.full((2, 1, 290, 2), 100, dtype=torch.int32)
    indices[..., 1] = 230
    indices[1] = torch.tensor([0, 290], dtype=torch.int32)  # entry 1: nobody sees anything
    q, k, v = draw_qkv(rng, 2, (290, 290), (4, 2), 32)
    options = {"startend_row_indices": indices, "causal": True}
    check(call(**options), q, k, v, reference.intervals(indices.numpy(), True, 290))
    out, lse = am.flashmask_attention(q, k, v, return_softmax_lse=True, **options)
    assert (lse[0, :, 100:230] == -torch.inf).all() and (lse[1] == -torch.inf).all()
    assert lse[0, :, :100].isfinite().all() and out.isfinite().all()


# ---- windows and blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 7, (3, 90), (140, 0), (-1, 5), (6, -1), -1, 2**40, [2, 4]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(201, 201), (70, 150), (150, 70)])
def test_windows(window, causal, lengths):
    left, right = window if isinstance(window, (tuple, list)) else (window, window)
    allowed = window_rule(lengths, left, right)[None, None]
    if causal:
        allowed = allowed & reference.causal(*lengths)
    q, k, v = draw_qkv(np.random.default_rng(21), 1, lengths, (2, 1), 16)
    check(call(window_size=window, causal=causal), q, k, v, allowed)


@pytest.mark.parametrize(("causal", "columns"), FORMS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_window_and_intervals_intersect(causal, columns, lengths):
    rng = np.random.default_rng(22)
    indices = random_indices(rng, 2, 2, lengths, columns)
    allowed = reference.intervals(indices.numpy(), causal, lengths[0])
    allowed = allowed & window_rule(lengths, 60, 9)
    q, k, v = draw_qkv(rng, 2, lengths, (4, 2), 16)
    options = {"startend_row_indices": indices, "causal": causal, "window_size": (60, 9)}
    check(call(**options), q, k, v, allowed)


def random_blocks(rng, batch, heads, lengths):
    shape = (batch, heads, *(-(-length // 128) for length in lengths))
    return torch.from_numpy(rng.choice([0, 0, 1, 7, -1], shape).astype(np.int32))


def blocks_rule(blocks, lengths):
    return reference.blocks(blocks.numpy(), 128, 128, *lengths)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask_heads", [1, 2, 4])
@pytest.mark.parametrize("dim", [40, 128])
def test_blocks_alone(causal, mask_heads, dim):
    rng, lengths = np.random.default_rng(23), (300, 390)
    blocks = random_blocks(rng, rng.choice([1, 2]), mask_heads, lengths)
    allowed = blocks_rule(blocks, lengths)
    if causal:
        allowed = allowed & reference.causal(*lengths)
    q, k, v = draw_qkv(rng, 2, lengths, (4, 2), dim)
    check(call(block_mask=blocks, causal=causal), q, k, v, allowed)


@given(seed=st.integers(0, 2**32 - 1), form=st.sampled_from(FORMS), window=st.booleans())
def test_everything_together(seed, form, window):
    rng = np.random.default_rng(seed)
    causal, columns = form
    lengths = tuple(int(n) for n in rng.integers(1, 300, 2))
    kv_heads, group = (int(n) for n in rng.integers(1, 3, 2))
    heads = kv_heads * group
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    counts = [int(n) for n in rng.choice(divisors, 2)]
    indices = random_indices(rng, 1, counts[0], lengths, columns)
    blocks = random_blocks(rng, 2, counts[1], lengths)
    each = [reference.intervals(indices.numpy(), causal, lengths[0]), blocks_rule(blocks, lengths)]
    options = {"startend_row_indices": indices, "causal": causal, "block_mask": blocks}
    if window:
        options["window_size"] = tuple(int(n) for n in rng.integers(0, 200, 2))
        each.append(window_rule(lengths, *options["window_size"])[None, None])
    allowed = True
    for part in each:
        allowed = allowed & reference._per_head(part, (2, heads, *lengths))
    q, k, v = draw_qkv(rng, 2, lengths, (heads, kv_heads), 16)
    check(call(**options), q, k, v, allowed)


# ---- what comes back ----------------------------------------------------------------------------


def test_gradient_through_lse():
    rng, lengths = np.random.default_rng(31), (140, 150)
    indices = random_indices(rng, 1, 1, lengths, 4)
    leaves = [x.requires_grad_() for x in draw_qkv(rng, 1, lengths, (2, 1), 16)]
    allowed = reference.intervals(indices.numpy(), False, lengths[0])
    every = per_head(allowed, 1, 2, *lengths)
    with poisoned():
        out, lse = am.flashmask_attention(*leaves, indices, return_softmax_lse=True)
        douts = torch.randn_like(out), torch.randn_like(lse).masked_fill(~every.any(-1), 0.0)
        got = torch.autograd.grad((out, lse), leaves, douts)
    assert lse.shape == (1, 2, 140) and lse.dtype == torch.float32
    arrays = [x.detach().numpy() for x in leaves]
    ref = reference.attention_backward(*arrays, every.numpy(), *(x.numpy() for x in douts))
    low_leaves = [x.detach().clone().requires_grad_() for x in leaves]
    low_out, low_lse = naive(*low_leaves, every)
    assert_close("lse", lse, reference.attention(*arrays, every.numpy())[1], low_lse, 1e-6)
    low = torch.autograd.grad((low_out, low_lse), low_leaves, douts)
    for name, g, r, x in zip(("dq", "dk", "dv"), got, ref, low):
        assert_close(name, g, r, x, 1e-5)


@pytest.mark.parametrize("numpy", [True, False])
def test_what_is_returned_and_in_which_order(numpy):
    q, k, v = draw_qkv(np.random.default_rng(32), 1, (9, 9), (2, 2), 16)
    given_seed = torch.tensor([5, 3])
    if numpy:
        q, k, v, given_seed = (x.numpy() for x in (q, k, v, given_seed))
    kind = np.ndarray if numpy else torch.Tensor
    out = am.flashmask_attention(q, k, v)
    assert isinstance(out, kind) and out.shape == (1, 9, 2, 16)
    out, lse = am.flashmask_attention(q, k, v, return_softmax_lse=True)
    assert lse.shape == (1, 2, 9)
    out, seed_offset = am.flashmask_attention(q, k, v, return_seed_offset=True)
    assert isinstance(seed_offset, kind) and seed_offset.tolist() == [0, 0]
    assert str(seed_offset.dtype).endswith("int64")
    both = am.flashmask_attention(
        q, k, v, return_softmax_lse=True, return_seed_offset=True, fixed_seed_offset=given_seed
    )
    assert [x.shape for x in both[:2]] == [out.shape, lse.shape] and both[2] is given_seed


def test_names_and_training_change_nothing():
    q, k, v = draw_qkv(np.random.default_rng(33), 1, (9, 9), (2, 2), 16)
    state = torch.get_rng_state()
    out = am.flashmask_attention(
        q, k, v, dropout=0.5, training=False, rng_name="local_seed", name="attention",
        return_seed_offset=True,
    )[0]  # fmt: skip
    assert torch.equal(out, am.flashmask_attention(q, k, v))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("numpy", [True, False])
def test_dropout(numpy):
    rng, lengths = np.random.default_rng(36), (140, 150)
    tensors = draw_qkv(rng, 1, lengths, (2, 2), 16)
    indices, pair = random_indices(rng, 1, 1, lengths, 4), torch.tensor([2**40 + 3, -5])
    mask = am.intervals(indices, causal=False)
    expected = am.attention(*tensors, mask, dropout_p=0.3, seed=pair)
    if numpy:
        tensors, indices, pair = [x.numpy() for x in tensors], indices.numpy(), pair.numpy()

    def dropped(**options):
        out, seed_offset = am.flashmask_attention(
            *tensors, indices, dropout=0.3, return_seed_offset=True, **options
        )
        return torch.as_tensor(out), seed_offset

    out, same = dropped(fixed_seed_offset=pair)
    assert torch.equal(out, expected) and same is pair
    first, drawn = dropped()
    assert str(drawn.dtype).endswith("int64") and drawn.shape == (2,)
    assert torch.equal(dropped(fixed_seed_offset=drawn)[0], first)
    assert not torch.equal(dropped()[0], first)
    out, seed_offset = dropped(training=False)
    assert seed_offset.tolist() == [0, 0]
    assert torch.equal(out, torch.as_tensor(am.flashmask_attention(*tensors, indices)))
    if not numpy:
        torch.manual_seed(4)
        first, _ = dropped()
        torch.manual_seed(4)
        assert torch.equal(dropped()[0], first)


def test_gradients_under_dropout():
    rng, lengths = np.random.default_rng(37), (140, 150)
    leaves = [x.requires_grad_() for x in draw_qkv(rng, 1, lengths, (2, 1), 16)]
    indices = random_indices(rng, 1, 1, lengths, 2)
    options = {"causal": True, "dropout": 0.2, "fixed_seed_offset": torch.tensor([1, 2])}
    out = am.flashmask_attention(*leaves, indices, **options)
    same = am.attention(
        *leaves, am.intervals(indices, causal=True), dropout_p=0.2, seed=torch.tensor([1, 2])
    )
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad(same.sin().sum(), leaves)):
        assert torch.equal(a, b)


def test_a_sink():
    """The same as one more key of score `sink` and value 0, in both passes."""
    rng = np.random.default_rng(17)
    indices = random_indices(rng, 2, 2, (90, 90), 1)
    allowed = per_head(reference.intervals(indices.numpy(), True, 90), 2, 4, 90, 90)
    leaves = [x.requires_grad_() for x in draw_qkv(rng, 2, (90, 90), (4, 2), 16, "float64")]
    sink = torch.from_numpy(rng.standard_normal(4)).requires_grad_()
    got = call(startend_row_indices=indices, causal=True, learnable_sink=sink)(
        *leaves, return_softmax_lse=True
    )
    expected = reference_scores.attention(*leaves, allowed, sink=sink)
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-9)
    dout = torch.randn_like(got[0])
    gradients = [torch.autograd.grad(x[0], [*leaves, sink], dout) for x in (got, expected)]
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=1e-9)


def test_numpy_masks():
    rng, lengths = np.random.default_rng(34), (140, 150)
    indices, blocks = random_indices(rng, 1, 2, lengths, 4), random_blocks(rng, 1, 1, lengths)
    tensors = draw_qkv(rng, 1, lengths, (2, 2), 16)
    expected = am.flashmask_attention(*tensors, indices, block_mask=blocks)
    masks = {"startend_row_indices": indices.numpy(), "block_mask": blocks.numpy()}
    assert torch.equal(am.flashmask_attention(*tensors, **masks), expected)
    out = am.flashmask_attention(*(x.numpy() for x in tensors), **masks)
    assert np.array_equal(out, expected.numpy())


def test_traced_whole():
    q, k, v = draw_qkv(np.random.default_rng(35), 1, (30, 30), (2, 2), 16)
    indices = random_indices(np.random.default_rng(35), 1, 1, (30, 30), 1)

    def function(q, k, v, indices):
        return am.flashmask_attention(
            q, k, v, indices, causal=True, window_size=9, return_softmax_lse=True
        )

    traced = torch.compile(function, backend="eager", fullgraph=True)
    for got, expected in zip(traced(q, k, v, indices), function(q, k, v, indices)):
        assert torch.equal(got, expected)


# ---- errors -------------------------------------------------------------------------------------

Q, K, V = (torch.ones(2, length, heads, 16) for length, heads in ((5, 4), (7, 2), (7, 2)))


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "rng_name: got 'local_seed'; torch has one generator a device",
         {"dropout": 0.1, "rng_name": "local_seed"}),
        (TypeError, "fixed_seed_offset: is on meta; it must be on cpu",
         {"fixed_seed_offset": torch.zeros(2, dtype=torch.int64, device="meta")}),
        (ValueError, "dropout: got 1.0, 0 <= dropout < 1", {"dropout": 1.0, "training": False}),
        (ValueError, "dropout: got -0.1, 0 <= dropout < 1", {"dropout": -0.1}),
        (TypeError, "dropout: got '0', a number", {"dropout": "0"}),
        (TypeError, "causal: got 'yes', True or False", {"causal": "yes"}),
        (TypeError, "training: got None, True or False", {"training": None}),
        (TypeError, "return_softmax_lse: got 'no'", {"return_softmax_lse": "no"}),
        (TypeError, "return_seed_offset: got 'no'", {"return_seed_offset": "no"}),
        (TypeError, "rng_name: got 1, a string", {"rng_name": 1}),
        (TypeError, "name: got 1, a string or None", {"name": 1}),
        (TypeError, "fixed_seed_offset: got tuple, a tensor", {"fixed_seed_offset": (1, 2)}),
        (TypeError, r"fixed_seed_offset: got int32 \(2,\), int64", {"fixed_seed_offset": ints(2)}),
        (TypeError, r"fixed_seed_offset: got int64 \(3,\)",
         {"fixed_seed_offset": torch.ones(3).long()}),
        (TypeError, "window_size: got 1.5, an integer", {"window_size": 1.5}),
        (TypeError, "window_size: got True, an integer", {"window_size": True}),
        (TypeError, "window_size: got None, an integer", {"window_size": (3, None)}),
        (ValueError, r"window_size: got \(1, 2, 3\), a number or", {"window_size": (1, 2, 3)}),
        (ValueError, r"window_size: got \(5, -2\), sizes of 0 or more", {"window_size": (5, -2)}),
        (TypeError, "block_mask: got element type bool, int32",
         {"block_mask": ints(2, 1, 1, 1).bool()}),
        (ValueError, r"block_mask: got shape \(2, 1, 1, 2\), .*1, 1\], one entry for 128 x 128",
         {"block_mask": ints(2, 1, 1, 2)}),
        (ValueError, r"block_mask: got shape \(1, 1\)", {"block_mask": ints(1, 1)}),
        (ValueError, r"block_mask: got shape .*dividing 4", {"block_mask": ints(1, 3, 1, 1)}),
    ],
)  # fmt: skip
def test_errors(error, message, options):
    with pytest.raises(error, match="^" + message):
        am.flashmask_attention(Q, K, V, **options)
    assert am.flashmask_attention(Q, K, V, causal=True).isfinite().all()


@pytest.mark.parametrize(
    ("error", "message", "indices", "causal"),
    [
        (TypeError, "got list, a tensor", [1], False),
        (TypeError, "got element type int64, int32", ints(2, 1, 7, 2).long(), False),
        (TypeError, "is on meta; it must be on cpu", ints(2, 1, 7, 2).to("meta"), False),
        (ValueError, r"got shape \(1, 7, 2\), \[2 or 1, mask heads", ints(1, 7, 2), False),
        (ValueError, r"got shape \(3, 1, 7, 2\), \[2 or 1", ints(3, 1, 7, 2), False),
        (ValueError, r"got shape \(2, 3, 7, 2\)", ints(2, 3, 7, 2), False),
        (ValueError, r"got shape \(2, 1, 5, 2\), .*dividing 4, 7", ints(2, 1, 5, 2), False),
        (ValueError, r".*n = 2 or 4 \(not causal\)", ints(2, 1, 7, 1), False),
        (ValueError, r".*n = 2 or 4 \(not causal\)", ints(2, 1, 7, 3), False),
        (ValueError, r".*n = 1 or 2 \(causal\)", ints(2, 1, 7, 4), True),
    ],
)  # fmt: skip
def test_errors_of_the_indices(error, message, indices, causal):
    with pytest.raises(error, match=f"^startend_row_indices: {message}"):
        am.flashmask_attention(Q, K, V, indices, causal=causal)
