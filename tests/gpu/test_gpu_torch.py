"""torch.compile, checkpointing, autocast, torch.func, several GPUs, errors."""

from __future__ import annotations

import anymask as am
import numpy as np
import pytest
import reference
import torch
from problem import DEVICE, LENGTH, ON_GPU, check, gradient_of, inputs
from torch.utils.checkpoint import checkpoint

BACKENDS = ["aot_eager", "inductor"] if ON_GPU else ["aot_eager"]


def some_ids(batch=2, length=LENGTH):
    return torch.randint(0, 4, (batch, length), dtype=torch.int32, device=DEVICE).sort().values


def leaves(**options):
    return [x.requires_grad_() for x in inputs(2, LENGTH, heads=(4, 2), **options)]


def gradients(function, tensors, dout, dlse=None):
    results = function(*tensors)
    if dlse is None:
        return results, *torch.autograd.grad(results, tensors, dout)
    return *results, *torch.autograd.grad(results, tensors, (dout, dlse))


def assert_equal(one, two):
    for a, b in zip(one, two):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    """One graph for both passes, mask and plan included; eager's results to the last bit."""

    def function(q, k, v, ids, window):
        mask = am.causal() & am.documents(ids) | am.sliding_window(window)
        out, lse = am.attention(q, k, v, mask, return_lse=True, deterministic=True)
        return out * 2, lse * 0.5  # exact whatever the compiler makes of it

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    tensors = leaves()
    dout = gradient_of(*tensors[::2])
    dlse = torch.randn(2, 4, LENGTH, device=DEVICE)
    for window in (3, 50):
        ids = some_ids()
        assert_equal(
            gradients(lambda *x, i=ids, w=window: compiled(*x, i, w), tensors, dout, dlse),
            gradients(lambda *x, i=ids, w=window: function(*x, i, w), tensors, dout, dlse),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_layers_with_one_plan(backend):
    mask = am.causal() & am.documents(some_ids())
    plan = am.plan(
        mask, batch=2, q_heads=4, kv_heads=2, q_len=LENGTH, kv_len=LENGTH, head_dim=64,
        dtype=torch.bfloat16, device=DEVICE,
    )  # fmt: skip

    def layers(q, k, v):
        for _ in range(3):
            q = am.attention(q, k, v, plan=plan, deterministic=True)
        return q

    torch._dynamo.reset()
    tensors = leaves()
    dout = gradient_of(*tensors[::2])
    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    for a, b in zip(gradients(compiled, tensors, dout), gradients(layers, tensors, dout)):
        # Each layer's part of dk and dv is rounded to 16 bits before the sum, or not.
        assert (a - b).float().norm() <= 1e-2 * b.float().norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    mask, tensors = am.causal() & am.documents(some_ids()), leaves()
    dout = gradient_of(*tensors[::2])

    def layer(q, k, v):
        return am.attention(q, k, v, mask, deterministic=True)

    expected = gradients(layer, tensors, dout)
    out = checkpoint(layer, *tensors, use_reentrant=reentrant)
    out.backward(dout)
    assert_equal((out, *(x.grad for x in tensors)), expected)


def test_autocast():
    tensors = [x.detach().float().requires_grad_() for x in leaves()]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = am.attention(*tensors, am.causal())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, am.attention(*(x.bfloat16() for x in tensors), am.causal()))
    out.float().sum().backward()
    assert tensors[0].grad.dtype == torch.float32 and tensors[0].grad.isfinite().all()


def test_partial_gradients():
    q, k, v = leaves()
    expected = torch.autograd.grad(am.attention(q, k, v, am.causal()).sum(), q)[0]
    out = am.attention(q, k.detach(), v.detach(), am.causal())
    torch.testing.assert_close(torch.autograd.grad(out.sum(), q)[0], expected)
    _, lse = am.attention(q, k, v, am.causal(), return_lse=True)
    for gradient in torch.autograd.grad(lse.sum(), (q, k)):
        assert gradient.isfinite().all() and gradient.any()


def test_vmap_of_gradients():
    mask, (q, k, v) = am.causal(), inputs(1, 90, heads=(2, 1))
    stacked = torch.stack([q, q * 2, -q])

    def loss(q, k, v):
        return am.attention(q, k, v, mask, deterministic=True).float().square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (0, None, None))(stacked, k, v)
    for i in range(3):
        assert torch.equal(found[i], torch.func.grad(loss)(stacked[i], k, v))


# ---- several GPUs -------------------------------------------------------------------------------


@pytest.mark.cuda
def test_several_gpus_in_one_process(monkeypatch):
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (2, LENGTH))).astype(np.int32)
    allowed = reference.documents(ids, ids) & reference.causal(LENGTH, LENGTH)
    found = {}
    for _ in range(2):
        for index in range(count):  # the current device stays the first one
            device = torch.device("cuda", index)
            monkeypatch.setattr("problem.DEVICE", device)
            torch.manual_seed(0)
            q, k, v = inputs(2, LENGTH, heads=(4, 2))
            mask = am.causal() & am.documents(ids)
            got = check(q, k, v, mask, allowed, deterministic=True, dout=torch.ones_like(q))
            assert all(x.device == device for x in got)
            found.setdefault(index, got)
            assert torch.cuda.current_device() == 0
    one, two = (torch.ones(1, 8, 2, 64, device=f"cuda:{i}").bfloat16() for i in range(2))
    with pytest.raises(TypeError, match="k is on cuda:1; q is on cuda:0"):
        am.attention(one, two, two)


# ---- errors -------------------------------------------------------------------------------------


def halves(*shape, device=None):
    return torch.ones(shape, dtype=torch.bfloat16, device=device or DEVICE)


def plan_for(**changes):
    sizes = {"batch": 1, "q_heads": 2, "kv_heads": 2, "q_len": 9, "kv_len": 9, "head_dim": 64}
    options = {"dtype": torch.bfloat16, "device": DEVICE}
    return am.plan(am.causal(), **{**sizes, **options, **changes})


def call(q=None, k=None, v=None, mask=None, **options):
    q, k, v = (halves(1, 9, 2, 64) if x is None else x for x in (q, k, v))
    return am.attention(q, k, v, mask, **options)


ERRORS = [
    (TypeError, r"q .*float16 or bfloat16", lambda: call(*(halves(1, 9, 2, 64).float(),) * 3)),
    (TypeError, r"q .*float16 or bfloat16", lambda: call(*(halves(1, 9, 2, 64).double(),) * 3)),
    (TypeError, r"k .*float16.*bfloat16", lambda: call(k=halves(1, 9, 2, 64).half())),
    (TypeError, r"k is on cpu; q is on cuda", lambda: call(k=halves(1, 9, 2, 64, device="cpu"))),
    (TypeError, r"documents: q_ids is on cpu; it must be on cuda", lambda: call(
        mask=am.documents(torch.zeros(9, dtype=torch.int32)))),
    (TypeError, r"startend_row_indices.* is on cpu", lambda: call(
        mask=am.intervals(np.zeros((9, 1), np.int32), True))),
    (ValueError, r"documents: q_ids.*q_len = 9", lambda: call(
        mask=am.documents(torch.zeros(8, dtype=torch.int32, device=DEVICE)))),
    (ValueError, r"q has head_dim 12", lambda: call(*(halves(1, 9, 2, 12),) * 3)),
    (ValueError, r"q has head_dim 264", lambda: call(*(halves(1, 9, 2, 264),) * 3)),
    (ValueError, r"q has 2 heads and k has 3", lambda: call(
        k=halves(1, 9, 3, 64), v=halves(1, 9, 3, 64))),
    (ValueError, r"last dimension", lambda: call(q=halves(1, 9, 2, 128)[..., ::2])),
    (ValueError, r"device is cpu, the call has cuda:\d", lambda: call(
        plan=plan_for(device="cpu"))),
    (ValueError, r"q_len is 10, the call has 9", lambda: call(plan=plan_for(q_len=10))),
    (ValueError, r"scale is inf", lambda: call(scale=float("inf"))),
]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize(("error", "message", "wrong"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_error(error, message, wrong):
    with pytest.raises(error, match=message):
        wrong()
    q, k, v = inputs(1, 60)
    check(q, k, v, am.causal(), reference.causal(60, 60))  # the next good call works


def test_second_derivatives_are_refused():
    q, k, v = leaves()
    (dq,) = torch.autograd.grad(am.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not available"):
        dq.sum().backward()
