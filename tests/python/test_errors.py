"""Every error names the argument, what it got and what it needs; the next good call works."""

from __future__ import annotations

import anymask as am
import numpy as np
import pytest


def arrays(batch=2, q_len=5, kv_len=7, q_heads=4, kv_heads=2, dim=16, v_dim=16, dtype=np.float32):
    return [
        np.ones(shape, dtype)
        for shape in (
            (batch, q_len, q_heads, dim),
            (batch, kv_len, kv_heads, dim),
            (batch, kv_len, kv_heads, v_dim),
        )
    ]


def ones(*shape):
    return np.ones(shape, np.float32)


Q, K, V = arrays()
I32 = np.int32


def plan(**changes):
    sizes = {
        "batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 5, "kv_len": 7, "head_dim": 16,
        "dtype": "float32",
    }  # fmt: skip
    return am.plan(am.causal(), **{**sizes, **changes})


CALLS = [
    # shapes and types of q, k, v
    (ValueError, r"q: got shape \(2, 5, 4\), 4 dim", lambda: am.attention(Q[..., 0], K, V)),
    (ValueError, r"v: got shape .*4 dim", lambda: am.attention(Q, K, V[0])),
    (ValueError, r"^k .*\[2, 7, 2, 8\]", lambda: am.attention(Q, K[..., :8].copy(), V)),
    (ValueError, r"^v .*with k's batch", lambda: am.attention(Q, K, V[:, 1:])),
    (ValueError, r"^k .*q's batch", lambda: am.attention(Q, K[:1], V)),
    (ValueError, r"q has 4 heads and k has 3", lambda: am.attention(*arrays(kv_heads=3))),
    (ValueError, r"head_dim 12; .*multiple of 8", lambda: am.attention(*arrays(dim=12))),
    (ValueError, r"head_dim 264; .*8 to 256", lambda: am.attention(*arrays(dim=264))),
    (ValueError, r"v has head_dim 20", lambda: am.attention(*arrays(v_dim=20))),
    (ValueError, r"q has stride 2 in its last", lambda: am.attention(
        np.ones((2, 5, 4, 32), np.float32)[..., ::2], K, V)),
    (TypeError, r"^k .*float64.*float32", lambda: am.attention(Q, K.astype(np.float64), V)),
    (TypeError, r"q: got element type int64", lambda: am.attention(*(Q.astype(int),) * 3)),
    (TypeError, r"q: got element type complex64", lambda: am.attention(
        Q.astype(np.complex64), K, V)),
    (TypeError, r"k: got list, but q is a NumPy", lambda: am.attention(Q, [1], V)),
    (TypeError, r"q: got list; q, k and v must", lambda: am.attention([1], K, V)),
    (ValueError, r"layout: got 'sbhd'", lambda: am.attention(Q, K, V, layout="sbhd")),
    (ValueError, r"scale is inf", lambda: am.attention(Q, K, V, scale=float("inf"))),
    (TypeError, r"scale: got '0.5', a number", lambda: am.attention(Q, K, V, scale="0.5")),
    # score options
    (ValueError, r"dropout_p is 1\.0.*at least 0 and less than 1", lambda: am.attention(
        Q, K, V, dropout_p=1.0)),
    (ValueError, r"dropout_p is -0\.1", lambda: am.attention(Q, K, V, dropout_p=-0.1)),
    (ValueError, r"dropout_p is nan", lambda: am.attention(Q, K, V, dropout_p=float("nan"))),
    (TypeError, r"dropout_p: got '0.1', a number", lambda: am.attention(Q, K, V, dropout_p="0.1")),
    (ValueError, r"softcap is -1\.0.*0 \(none\) or more", lambda: am.attention(
        Q, K, V, softcap=-1)),
    (ValueError, r"softcap is inf", lambda: am.attention(Q, K, V, softcap=float("inf"))),
    (TypeError, r"softcap: got \[1\], a number", lambda: am.attention(Q, K, V, softcap=[1])),
    (TypeError, r"seed: got 1\.5, an integer or int64 of shape \(2,\)", lambda: am.attention(
        Q, K, V, dropout_p=0.1, seed=1.5)),
    (TypeError, r"seed: got True", lambda: am.attention(Q, K, V, seed=True)),
    (TypeError, r"seed: got int32 of shape \(2,\)", lambda: am.attention(
        Q, K, V, dropout_p=0.1, seed=np.zeros(2, I32))),
    (TypeError, r"seed: got int64 of shape \(3,\)", lambda: am.attention(
        Q, K, V, dropout_p=0.1, seed=np.zeros(3, np.int64))),
    (ValueError, r"seed: got 9223372036854775808, an integer of 64 bits", lambda: am.attention(
        Q, K, V, dropout_p=0.1, seed=2**63)),
    (TypeError, r"key_bias: got list, but q is a NumPy array", lambda: am.attention(
        Q, K, V, key_bias=[1.0])),
    (ValueError, r"key_bias has shape \[2, 3, 7\]; .*\[2 or 1, a divisor of 4, 7\]",
     lambda: am.attention(Q, K, V, key_bias=ones(2, 3, 7))),
    (ValueError, r"key_bias has shape \[3, 2, 7\]", lambda: am.attention(
        Q, K, V, key_bias=ones(3, 2, 7))),
    (ValueError, r"key_bias has shape \[2, 2, 5\]", lambda: am.attention(
        Q, K, V, key_bias=ones(2, 2, 5))),
    (ValueError, r"key_bias has shape \[2, 7\]", lambda: am.attention(
        Q, K, V, key_bias=ones(2, 7))),
    (TypeError, r"key_bias has type float64; it needs the type of q, float32$",
     lambda: am.attention(Q, K, V, key_bias=np.ones((2, 2, 7)))),
    (ValueError, r"^bias has shape \[2, 2, 5, 7\]; .*\[2 or 1, 4 or 1, 5 or 1, 7\]",
     lambda: am.attention(Q, K, V, bias=ones(2, 2, 5, 7))),
    (ValueError, r"^bias has shape \[2, 4, 5, 1\]", lambda: am.attention(
        Q, K, V, bias=ones(2, 4, 5, 1))),
    (ValueError, r"^bias has shape \[5, 7\]", lambda: am.attention(Q, K, V, bias=ones(5, 7))),
    (TypeError, r"^bias has type float16; .*float32", lambda: am.attention(
        Q, K, V, bias=ones(1, 1, 5, 7).astype(np.float16))),
    (TypeError, r"^bias has type float64; .*float16, or float32", lambda: am.attention(
        *arrays(dtype=np.float16), bias=np.ones((1, 1, 5, 7)))),
    (ValueError, r"sink has shape \[2\]; it needs \[q_heads\] = \[4\]", lambda: am.attention(
        Q, K, V, sink=ones(2))),
    (TypeError, r"sink has type int64", lambda: am.attention(
        Q, K, V, sink=np.ones(4, np.int64))),
    # masks and plans as arguments
    (TypeError, r"mask: got ndarray, an anymask.Mask", lambda: am.attention(Q, K, V, Q)),
    (TypeError, r"plan: got Mask, an anymask.Plan", lambda: am.attention(Q, K, V, plan=am.full())),
    (ValueError, r"mask: the plan brings its own", lambda: am.attention(
        Q, K, V, am.full(), plan=plan())),
    (ValueError, r"plan: .*q_len is 6, the call has 5", lambda: am.attention(
        Q, K, V, plan=plan(q_len=6))),
    (ValueError, r"kv_heads is 4, the call has 2; dtype is bfloat16", lambda: am.attention(
        Q, K, V, plan=plan(kv_heads=4, dtype="bf16"))),
    (TypeError, r"mask: got int, an anymask.Mask", lambda: am.plan(
        3, batch=1, q_heads=1, kv_heads=1, q_len=1, kv_len=1, head_dim=8, dtype="float32")),
    (TypeError, r"dtype: got float8", lambda: plan(dtype="float8")),
    # constructors
    (TypeError, r"left: got 1.5, an integer", lambda: am.sliding_window(1.5)),
    (TypeError, r"length: got str", lambda: am.prefix_lm("3")),
    (ValueError, r"length: got shape \(1, 1\)", lambda: am.prefix_lm(np.ones((1, 1), I32))),
    (ValueError, r"documents: either ids or cu_seqlens", lambda: am.documents()),
    (ValueError, r"documents: either ids or cu_seqlens", lambda: am.documents(
        [0], cu_seqlens=[0])),
    (ValueError, r"kv_ids: goes with q_ids", lambda: am.documents(
        kv_ids=[0], cu_seqlens=[0])),
    (TypeError, r"q_ids: got int, an array", lambda: am.documents(3)),
    (ValueError, r"q_ids: got shape \(1, 1, 1\)", lambda: am.documents(np.ones((1, 1, 1), I32))),
    (ValueError, r"indices: got shape \(4,\)", lambda: am.intervals(np.ones(4, I32), True)),
    (ValueError, r"block_size: got 0, positive", lambda: am.blocks(np.ones((1, 1)), 0)),
    (ValueError, r"allowed: got shape \(2, 2, 2\)", lambda: am.dense(np.ones((2, 2, 2)))),
    (ValueError, r"eq: got shape \(2, 2\)", lambda: am.ids(np.ones((2, 2), I32), [1])),
    (ValueError, r"q_len: causal\(\) does not tell", lambda: am.causal().to_dense()),
    (ValueError, r"kv_len: the mask's arrays disagree: 3, 4", lambda: (
        am.dense(np.ones((3, 3))) & am.dense(np.ones((3, 4)))).to_dense()),
    # masks that do not fit the call
    (ValueError, r"documents: q_ids.*q_len = 5", lambda: am.attention(
        Q, K, V, am.documents(np.zeros(6, I32), np.zeros(7, I32)))),
    (ValueError, r"documents: kv_ids.*kv_len = 7", lambda: am.attention(
        Q, K, V, am.documents(np.zeros(5, I32)))),
    (TypeError, r"documents: q_ids.*float32.*int32 or int64", lambda: am.attention(
        Q, K, V, am.documents(np.zeros(5, np.float32), np.zeros(7, I32)))),
    (ValueError, r"documents: q_ids has shape \[3, 5\]; its batch must be 1 or 2",
     lambda: am.attention(Q, K, V, am.documents(np.zeros((3, 5), I32), np.zeros(7, I32)))),
    (ValueError, r"cu_seqlens needs q_len == kv_len, got 5 and 7", lambda: am.attention(
        Q, K, V, am.documents(cu_seqlens=[0, 5]))),
    (TypeError, r"startend_row_indices.*int64.*int32", lambda: am.attention(
        Q, K, V, am.intervals(np.zeros((7, 1), np.int64), True))),
    (ValueError, r"startend_row_indices.*n = 1 or 2 \(causal\)", lambda: am.attention(
        Q, K, V, am.intervals(np.zeros((7, 4), I32), True))),
    (ValueError, r"startend_row_indices.*n = 2 or 4 \(not causal\)", lambda: am.attention(
        Q, K, V, am.intervals(np.zeros((7, 1), I32), False))),
    (ValueError, r"startend_row_indices.*kv_len = 7", lambda: am.attention(
        Q, K, V, am.intervals(np.zeros((6, 1), I32), True))),
    (ValueError, r"3 mask heads must divide the 4 query heads", lambda: am.attention(
        Q, K, V, am.intervals(np.zeros((1, 3, 7, 1), I32), True))),
    (ValueError, r"block_size is 8 x 16; both must be multiples of 16", lambda: am.attention(
        Q, K, V, am.blocks(np.ones((1, 1), bool), (8, 16)))),
    (ValueError, r"blocks: block_mask.*one entry per block of 16 x 16", lambda: am.attention(
        Q, K, V, am.blocks(np.ones((2, 1), bool), 16))),
    (TypeError, r"blocks: block_mask.*bool or integer", lambda: am.attention(
        Q, K, V, am.blocks(np.ones((1, 1), np.float32), 16))),
    (ValueError, r"dense: allowed.*q_len = 5, kv_len = 7", lambda: am.attention(
        Q, K, V, am.dense(np.ones((5, 6), bool)))),
    (TypeError, r"mask: got element type complex64", lambda: am.attention(
        Q, K, V, am.dense(np.ones((5, 7), np.complex64)))),
    (ValueError, r"ids: ek.*kv_len = 7", lambda: am.attention(
        Q, K, V, am.ids(np.zeros(5, I32), np.zeros(5, I32)))),
    (ValueError, r"prefix_lm: n.*\[2\]", lambda: am.attention(
        Q, K, V, am.prefix_lm(np.zeros(3, I32)))),
    (ValueError, r"mask has .* nodes once lowered; at most 32", lambda: am.attention(
        Q, K, V, sum_of_masks(40))),
    (ValueError, r"allowed: got shape \(3,\)", lambda: am.intervals_from_dense(np.ones(3))),
]  # fmt: skip


def sum_of_masks(count):
    mask = am.causal()
    for size in range(count - 1):
        mask = mask | am.sliding_window(size)
    return mask


@pytest.mark.parametrize(("error", "message", "call"), CALLS, ids=[c[1][:40] for c in CALLS])
def test_error(error, message, call):
    with pytest.raises(error, match=message):
        call()
    assert np.isfinite(am.attention(Q, K, V, am.causal())).all()


def test_torch_errors():
    torch = pytest.importorskip("torch")
    q, k, v = map(torch.from_numpy, (Q, K, V))
    with pytest.raises(TypeError, match="k: got ndarray; q, k and v must all be torch"):
        am.attention(q, K, v)
    with pytest.raises(TypeError, match=r"q: got torch\.int32"):
        am.attention(q.int(), k, v)
    with pytest.raises(TypeError, match=r"k .*bfloat16.*float32"):
        am.attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="last dimension"):
        am.attention(torch.ones(2, 5, 4, 32)[..., ::2], k, v)
    with pytest.raises(ValueError, match="mask: the plan brings its own"):
        am.attention(q, k, v, am.full(), plan=plan())
    with pytest.raises(ValueError, match="q_len is 6, the call has 5"):
        am.attention(q, k, v, plan=plan(q_len=6, dtype=torch.float32))
    with pytest.raises(ValueError, match="q: got shape"):
        am.attention(q[0], k, v, layout="bhsd")


def test_torch_errors_of_score_options():
    torch = pytest.importorskip("torch")
    q, k, v = map(torch.from_numpy, (Q, K, V))
    with pytest.raises(TypeError, match="sink: got ndarray, but q is a torch tensor"):
        am.attention(q, k, v, sink=ones(4))
    with pytest.raises(TypeError, match="seed: is on meta; q is on cpu"):
        am.attention(q, k, v, dropout_p=0.1, seed=torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(TypeError, match=r"seed: got float32 of shape \(2,\)"):
        am.attention(q, k, v, dropout_p=0.1, seed=torch.zeros(2))
    with pytest.raises(TypeError, match="bias has type bfloat16"):
        am.attention(q, k, v, bias=torch.zeros(1, 1, 5, 7, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"key_bias has shape \[2, 3, 7\]"):
        am.attention(q, k, v, key_bias=torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match=r"dropout_p is 2\.0"):
        am.attention(q, k, v, dropout_p=2)


def test_missing_library(monkeypatch, tmp_path):
    from anymask import _library

    monkeypatch.setattr(_library, "_loaded", None)
    monkeypatch.setenv("ANYMASK_LIBRARY", str(tmp_path / "nothing.so"))
    with pytest.raises(RuntimeError, match=r"was not found; looked at .*nothing\.so"):
        am.causal().to_dense(q_len=3)
    (tmp_path / "nothing.so").write_bytes(b"not a library")
    with pytest.raises(RuntimeError, match=r"cannot load .*nothing\.so"):
        am.causal().to_dense(q_len=3)
