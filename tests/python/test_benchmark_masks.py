"""The twelve masks are those of the protocol, and every way to write one agrees."""

from __future__ import annotations

import anymask as am
import numpy as np
import pytest
import reference
from anymask import benchmark_masks

# Allowed share at S = 8192 and 32768, sample 3.
SHARES = {
    "full": (1.000, 1.000),
    "causal": (0.500, 0.500),
    "sliding_window": (0.061, 0.061),
    "causal_document": (0.114, 0.044),
    "document": (0.227, 0.088),
    "share_question": (0.057, 0.026),
    "global_sliding_window": (0.125, 0.122),
    "causal_blockwise": (0.286, 0.095),
    "prefix_lm": (0.625, 0.625),
    "prefix_lm_document": (0.120, 0.046),
    "qk_sparse": (0.430, 0.482),
    "random_eviction": (0.375, 0.375),
}


def test_there_are_twelve():
    assert tuple(SHARES) == benchmark_masks.NAMES


@pytest.mark.parametrize("length", [1, 2, 17, 100, 513])
@pytest.mark.parametrize("name", benchmark_masks.NAMES)
def test_intervals_and_expression_agree(name, length):
    case = benchmark_masks.benchmark_mask(name, length)
    allowed = reference.intervals(case.indices, case.causal, length)
    np.testing.assert_array_equal(case.mask.to_dense(q_len=length), allowed)
    if case.composed is not None:
        np.testing.assert_array_equal(case.composed.to_dense(q_len=length), allowed)
    again = am.intervals(*am.intervals_from_dense(allowed))
    np.testing.assert_array_equal(again.to_dense(q_len=length), allowed)


@pytest.mark.parametrize("name", benchmark_masks.NAMES)
def test_allowed_shares(name):
    density = benchmark_masks.benchmark_mask(name, 8192).mask.density(q_len=8192)
    tolerance = 0.002 if name == "share_question" else 0.0006  # the answers are drawn at random
    assert density == pytest.approx(SHARES[name][0], abs=tolerance)


def test_allowed_shares_of_a_longer_sequence():
    for name in ("causal_document", "share_question", "qk_sparse"):
        density = benchmark_masks.benchmark_mask(name, 32768).mask.density(q_len=32768)
        assert density == pytest.approx(SHARES[name][1], abs=0.002)


@pytest.mark.parametrize("length", [8192, 32768, 131072])
def test_documents_fill_the_paper_lengths(length):
    for sample in range(1, benchmark_masks.SAMPLES + 1):
        documents = benchmark_masks.paper_documents(length, sample)
        assert documents.lengths.sum() == length and (documents.prefixes > 0).all()
        assert len(documents.ids) == length


def test_random_eviction_evicts_one_earlier_column_a_row():
    case = benchmark_masks.benchmark_mask("random_eviction", 200)
    starts = case.indices[0, 0, :, 0]
    evicted = np.flatnonzero(starts < 200)
    assert sorted(starts[evicted]) == list(range(100, 200))
    assert (starts[evicted] > evicted).all()


def test_errors():
    with pytest.raises(ValueError, match="name: got 'nothing', one of full"):
        benchmark_masks.benchmark_mask("nothing", 10)
    with pytest.raises(ValueError, match="sample: got 0, 1 to 5"):
        benchmark_masks.paper_documents(8192, 0)
    documents = benchmark_masks.paper_documents(50)
    with pytest.raises(ValueError, match="documents: fill 50 tokens, not 60"):
        benchmark_masks.benchmark_mask("document", 60, documents=documents)
