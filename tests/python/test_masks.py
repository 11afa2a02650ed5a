"""Masks say what their definitions say, in every representation that can express them."""

from __future__ import annotations

import copy
import pickle

import anymask as am
import mask_cases
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

lengths = st.one_of(st.integers(1, 8), st.integers(1, 300))
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("kind", mask_cases.KINDS)
@given(m=lengths, n=lengths, seed=seeds, square=st.booleans())
def test_kind_means_its_definition(kind, m, n, seed, square):
    rng = np.random.default_rng(seed)
    b, h, n = 2, 4, m if square else n
    mask, allowed = mask_cases.KINDS[kind](rng, b, h, m, n)
    expected = mask_cases.everywhere(allowed, b, h, m, n)
    np.testing.assert_array_equal(mask_cases.dense_of(mask, b, h, m, n), expected)


@given(m=lengths, n=lengths, seed=seeds, leaves=st.integers(1, 8))
def test_expression_means_its_parts(m, n, seed, leaves):
    rng = np.random.default_rng(seed)
    mask, allowed = mask_cases.random_tree(rng, 2, 4, m, n, leaves)
    np.testing.assert_array_equal(mask_cases.dense_of(mask, 2, 4, m, n), allowed)


@given(m=lengths, n=lengths, seed=seeds)
def test_algebra(m, n, seed):
    rng = np.random.default_rng(seed)
    (a, _), (b, _), (c, _) = (mask_cases.random_tree(rng, 2, 4, m, n, 2) for _ in range(3))

    def same(x, y):
        np.testing.assert_array_equal(
            mask_cases.dense_of(x, 2, 4, m, n), mask_cases.dense_of(y, 2, 4, m, n)
        )

    same(~(a & b), ~a | ~b)
    same(~(a | b), ~a & ~b)
    same(~~a, a)
    same(a & (b | c), (a & b) | (a & c))
    same(a | am.full(), am.full())
    same(a & ~a, ~am.full())
    same(a & am.full(), a)


@given(cuts=st.lists(st.integers(0, 200), max_size=6), length=st.integers(1, 200), seed=seeds)
def test_documents_in_every_representation(cuts, length, seed):
    cu = np.array([0, *sorted(min(cut, length) for cut in cuts)], np.int32)
    ids = np.searchsorted(cu[1:], np.arange(length), side="right").astype(np.int32)
    edges = np.append(cu, length)
    ends = edges[1:][ids] if len(edges) > 1 else np.full(length, length)
    starts = edges[:-1][ids]
    allowed = ids[:, None] == ids[None, :]
    masks = [
        am.documents(ids),
        am.documents(ids.astype(np.int64)[None]),
        am.documents(ids, ids.copy()),
        am.documents(cu_seqlens=cu),
        am.intervals(np.stack([ends, starts], -1).astype(np.int32), causal=False),
        am.dense(allowed),
        am.dense(np.asfortranarray(allowed.astype(np.float32))),
        am.ids(-1 - ids, -1 - ids),
    ]
    for mask in masks:
        np.testing.assert_array_equal(mask.to_dense(1, 1, length)[0, 0], allowed, repr(mask))
    causal = am.intervals(ends.astype(np.int32)[:, None], causal=True)
    for mask in masks:
        both = (mask & am.causal()).to_dense(1, 1, length)
        np.testing.assert_array_equal(both, causal.to_dense(1, 1, length), repr(mask))


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=seeds, cut=st.integers(0, 15))
def test_blocks_in_every_representation(rows, columns, seed, cut):
    rng = np.random.default_rng(seed)
    block_mask = rng.random((rows, columns)) < 0.5
    allowed = block_mask.repeat(16, 0).repeat(16, 1)[: rows * 16 - cut, : columns * 16 - cut]
    finer = block_mask.repeat(2, 0).repeat(2, 1)
    for mask in (
        am.blocks(block_mask, 16),
        am.blocks(block_mask.astype(np.int32), (16, 16)),
        am.dense(allowed),
    ):
        np.testing.assert_array_equal(mask.to_dense(1, 1, *allowed.shape)[0, 0], allowed)
    coarse = am.blocks(block_mask, 32).to_dense(1, 1, rows * 32, columns * 32)
    np.testing.assert_array_equal(
        coarse, am.blocks(finer, 16).to_dense(1, 1, rows * 32, columns * 32)
    )


@given(m=lengths, n=lengths, window=st.integers(0, 40))
def test_windows_and_prefixes_in_every_representation(m, n, window):
    def same(x, y):
        np.testing.assert_array_equal(x.to_dense(1, 1, m, n), y.to_dense(1, 1, m, n))

    same(am.sliding_window(-1, 0), am.causal())
    same(am.sliding_window(-1, -1), am.full())
    same(am.sliding_window(window), am.causal() & am.sliding_window(window, -1))
    same(am.prefix_lm(0), am.causal())
    same(am.prefix_lm(n), am.full())
    prefix = np.where(np.arange(n) < window, 0, -1).astype(np.int32)
    same(
        am.prefix_lm(window), am.causal() | am.ids(np.full(m, -1, np.int32), -1 - (prefix < 0) * 1)
    )


@given(m=st.integers(1, 80), n=st.integers(1, 80), keep=st.integers(0, 90), seed=seeds)
def test_top_keys_are_the_best_before_each_query(m, n, keep, seed):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((2, 2, n)).round(int(rng.integers(0, 3)))  # few digits: many ties
    scores[rng.random(scores.shape) < 0.05] = np.nan
    mask = am.top_keys(scores, keep, q_len=m)
    np.testing.assert_array_equal(mask.to_dense(2, 2, m, n), reference.top_keys(scores, keep, m))


@given(m=lengths, n=lengths, seed=seeds)
def test_reordering_changes_no_mask(m, n, seed):
    mask, allowed = mask_cases.random_tree(np.random.default_rng(seed), 2, 4, m, n, 3)
    np.testing.assert_array_equal(mask_cases.dense_of(mask.reordered(), 2, 4, m, n), allowed)


@given(m=lengths, n=lengths, seed=seeds, causal=st.booleans())
def test_intervals_from_dense_finds_what_intervals_made(m, n, seed, causal):
    rng = np.random.default_rng(seed)
    columns = int(rng.choice([1, 2] if causal else [2, 4]))
    indices = rng.integers(0, m + 1, (2, 3, n, columns)).astype(np.int32)
    allowed = reference.intervals(indices, causal, m)
    found, is_causal = am.intervals_from_dense(allowed, causal)
    assert is_causal == causal
    assert found.dtype == np.int32 and found.shape[:3] == (2, 3, n)
    assert found.shape[3] <= columns
    again = am.intervals(found, causal).to_dense(2, 3, m, n)
    np.testing.assert_array_equal(again, np.broadcast_to(allowed, (2, 3, m, n)))


def test_intervals_from_dense_decides_about_causal_itself():
    lower = np.tril(np.ones((9, 9), bool))
    indices, causal = am.intervals_from_dense(lower)
    assert causal and indices.shape == (1, 1, 9, 1)
    indices, causal = am.intervals_from_dense(np.ones((5, 7), np.uint8))
    assert not causal and indices.shape == (1, 1, 7, 2)


def test_intervals_from_dense_names_the_column():
    allowed = np.ones((8, 4), bool)
    allowed[[1, 3, 5], 2] = False
    with pytest.raises(ValueError, match=r"column 2 of batch 0, head 0 has 3 runs"):
        am.intervals_from_dense(allowed)


@given(m=lengths, n=lengths, seed=seeds, tile=st.sampled_from([(16, 16), (128, 128), (64, 32)]))
def test_tile_classes_and_counts(m, n, seed, tile):
    rng = np.random.default_rng(seed)
    mask, _ = mask_cases.random_tree(rng, 2, 4, m, n, 3)
    classes = mask.tile_classes(2, 4, m, n, tile=tile)
    own = mask.to_dense(2, 4, m, n)
    assert classes.shape == (*own.shape[:2], -(-m // tile[0]), -(-n // tile[1]))
    for place in np.ndindex(*classes.shape[:2]):
        for r, c in np.ndindex(*classes.shape[2:]):
            pairs = own[place][r * tile[0] : (r + 1) * tile[0], c * tile[1] : (c + 1) * tile[1]]
            truth = 1 if pairs.all() else 2 if not pairs.any() else 3
            assert classes[place][r, c] in (truth, 3)
    counts = mask.statistics(2, 4, m, n, tile=tile)
    assert counts.pairs == own.size and counts.visible_pairs == own.sum()
    assert counts.tiles == classes.size
    assert counts.all_tiles == (classes == 1).sum()
    assert counts.some_tiles == (classes == 3).sum()
    assert mask.density(2, 4, m, n) == pytest.approx(own.mean())


def test_dense_mask_of_more_than_2_to_the_31_elements():
    length = 1 << 16
    row = np.zeros((length, 1), bool)
    row[-5:] = True
    allowed = np.broadcast_to(row, (length, length))  # stride 0
    assert allowed.size > 2**31
    classes = am.dense(allowed).tile_classes(tile=4096)
    assert (classes[0, 0, :-1] == 2).all() and (classes[0, 0, -1] == 3).all()


def test_dense_mask_whose_offsets_pass_2_to_the_31():
    # A view into 40000 x 65536 elements of untouched (zero) memory: only its corners are written.
    memory = np.zeros(40000 * 65536, np.uint8).reshape(40000, 65536)
    memory[-1, -100:] = 1
    mask = am.dense(memory[-40:, -300:]) & am.full()
    np.testing.assert_array_equal(mask.to_dense()[0, 0], memory[-40:, -300:] != 0)
    whole = am.dense(memory[::1000, ::512])
    np.testing.assert_array_equal(whole.to_dense()[0, 0], memory[::1000, ::512] != 0)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (am.full(), "full()"),
        (am.sliding_window(3, 2), "sliding_window(3, right=2)"),
        (am.causal() & am.sliding_window(7), "causal() & sliding_window(7)"),
        (~(am.causal() | am.prefix_lm(3)), "~(causal() | prefix_lm(3))"),
        (am.full() & (am.causal() & am.full()), "full() & (causal() & full())"),
        (am.full() | am.causal() & ~am.full(), "full() | causal() & ~full()"),
        (am.documents(np.zeros(4, np.int32)), "documents(<int32 [4]>)"),
        (am.documents(cu_seqlens=[0, 4]), "documents(cu_seqlens=<int32 [2]>)"),
        (am.blocks(np.ones((2, 2), bool), 64), "blocks(<bool [1, 1, 2, 2]>, block_size=64)"),
        (
            am.blocks(np.ones((2, 2), bool), (16, 32)),
            "blocks(<bool [1, 1, 2, 2]>, block_size=(16, 32))",
        ),
        (
            am.intervals(np.zeros((4, 1), np.int32), causal=True),
            "intervals(<int32 [1, 1, 4, 1]>, causal=True)",
        ),
        (am.causal().reordered() & am.full(), "causal().reordered() & full()"),
        ((am.causal() | ~am.full()).reordered(), "(causal() | ~full()).reordered()"),
        (am.dense(np.ones((2, 3), bool)), "dense(<bool [1, 1, 2, 3]>)"),
        (am.ids(np.zeros(2, np.int32), np.zeros(3, np.int32)),
         "ids(<int32 [1, 1, 2]>, <int32 [1, 1, 3]>)"),
    ],
)  # fmt: skip
def test_repr_reads_like_the_code(mask, text):
    assert repr(mask) == text


def test_masks_are_values():
    mask = am.causal() & am.documents(np.zeros(4, np.int32))
    with pytest.raises(AttributeError, match="cannot be changed"):
        mask.spec = ()
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        np.testing.assert_array_equal(twin.to_dense(), mask.to_dense())
    with pytest.raises(TypeError, match="truth value"):
        bool(mask)
    with pytest.raises(TypeError):
        mask & True


def test_sizes_come_from_the_arrays():
    ids = np.zeros((3, 5), np.int32)
    assert am.documents(ids).to_dense().shape == (3, 1, 5, 5)
    assert am.intervals(np.zeros((1, 2, 7, 2), np.int32), causal=False).to_dense().shape == (
        1, 2, 7, 7,
    )  # fmt: skip
    assert (am.dense(np.ones((4, 6), bool)) & am.causal()).to_dense().shape == (1, 1, 4, 6)
    assert am.causal().to_dense(kv_len=3).shape == (1, 1, 3, 3)
    assert am.causal().to_dense(q_len=2, kv_len=0).shape == (1, 1, 2, 0)


def test_torch_masks_stay_torch():
    torch = pytest.importorskip("torch")
    ids = torch.tensor([0, 0, 1])
    allowed = (am.documents(ids) & am.causal()).to_dense()
    assert isinstance(allowed, torch.Tensor) and allowed.dtype == torch.bool
    indices, causal = am.intervals_from_dense(allowed)
    assert isinstance(indices, torch.Tensor) and causal
    np.testing.assert_array_equal(am.intervals(indices, causal).to_dense(), allowed)
    moved = am.documents(ids.numpy()).to("cpu")
    assert isinstance(moved.arrays[0], torch.Tensor)
