"""Determinism, streams, CUDA graphs, no waiting for the device."""

from __future__ import annotations

import contextlib

import anymask as am
import numpy as np
import pytest
import reference
import torch
from anymask import benchmark_masks
from checks import per_head
from problem import DEVICE, LENGTH, ON_GPU, Results, assert_same, compare, gradient_of, inputs, run

RUNS = 100 if ON_GPU else 3
LONG = 2 * LENGTH
SIDE = 4000 if ON_GPU else 100  # of the other stream's matrices: more work than a call


def side_stream():
    """A stream of its own, and how to work on it."""
    if not ON_GPU:
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream())


def documents_mask(length):
    case = benchmark_masks.benchmark_mask("causal_document", length)
    return case.mask.to(DEVICE)


def scattered_mask(length):
    return benchmark_masks.benchmark_mask("random_eviction", length).mask.to(DEVICE)


# ---- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("make", [documents_mask, scattered_mask, lambda n: am.full()])
def test_deterministic_gradients_beside_other_work(make, dims):
    """Bitwise equal over many runs while another stream keeps the GPU busy."""
    mask = make(LONG)
    q, k, v = inputs(2, LONG, heads=(8, 2), dims=dims)
    dout = gradient_of(q, v)
    plan = am.plan(
        mask, batch=2, q_heads=8, kv_heads=2, q_len=LONG, kv_len=LONG, head_dim=dims[0],
        dtype=q.dtype, device=DEVICE,
    )  # fmt: skip
    first = run(q, k, v, plan=plan, dout=dout, deterministic=True)
    noise = torch.randn(SIDE, SIDE, device=DEVICE)
    other, equal = side_stream(), torch.ones(5, dtype=torch.bool, device=DEVICE)
    for count in range(RUNS):
        with other:
            for _ in range(count % 4):
                noise = (noise @ noise).tanh()
        again = run(q, k, v, plan=plan, dout=dout, deterministic=True)
        equal &= torch.stack([(a == b).all() for a, b in zip(first, again)])
    assert equal.all(), dict(zip(Results._fields, equal.tolist()))


def test_forward_is_reproducible_without_asking():
    mask = documents_mask(LONG)
    q, k, v = inputs(4, LONG, heads=(8, 8))
    first = am.attention(q, k, v, mask, return_lse=True)
    for _ in range(RUNS):
        for a, b in zip(am.attention(q, k, v, mask, return_lse=True), first):
            assert torch.equal(a, b)


# ---- streams ------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_two_streams_at_once(deterministic):
    """Different masks and kernels side by side give what each gives alone."""
    jobs = []
    for make, dims in ((documents_mask, (128, 128)), (scattered_mask, (64, 64))):
        q, k, v = inputs(4, LONG, heads=(8, 4), dims=dims)
        mask, dout = make(LONG), gradient_of(q, v)
        options = {"dout": dout, "deterministic": deterministic}
        jobs.append(((q, k, v, mask), options, run(q, k, v, mask, **options), side_stream()))
    if ON_GPU:
        torch.cuda.synchronize()
        for *_, stream in jobs:  # wait for the host: then the queues run side by side
            with stream:
                torch.cuda._sleep(100_000_000)
    found = [[], []]
    for _ in range(10 if ON_GPU else 1):
        for index, (arguments, options, _, stream) in enumerate(jobs):
            with stream:
                found[index].append(run(*arguments, **options))
    if ON_GPU:
        torch.cuda.synchronize()
    for (_, _, alone, _), results in zip(jobs, found):
        for result in results:
            if deterministic:
                assert_same(result, alone)
                continue
            assert torch.equal(result.out, alone.out)
            for a, b in zip(result[2:], alone[2:]):
                error = (a.float() - b.float()).norm() / b.float().norm()
                assert error < 1e-2  # sums in another order, rounded to 16 bits


@pytest.mark.cuda
def test_nothing_waits_for_the_device():
    mask = am.causal() & am.documents(torch.arange(LENGTH, device=DEVICE) // 90)
    q, k, v = (x.requires_grad_() for x in inputs(1, LENGTH))
    dout = gradient_of(q, v)

    def work():
        plan = am.plan(
            mask, batch=1, q_heads=4, kv_heads=4, q_len=LENGTH, kv_len=LENGTH, head_dim=64,
            dtype=q.dtype, device=DEVICE,
        )  # fmt: skip
        torch.autograd.grad(am.attention(q, k, v, plan=plan), (q, k, v), dout)
        torch.autograd.grad(am.attention(q, k, v, mask.reordered()), (q, k, v), dout)

    work()  # compiles and loads every kernel, and leaves torch the memory
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)  # half a second on the GPU
        work()
        done.record()
        assert not done.query()  # the calls came back while it lasts
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- graphs -------------------------------------------------------------------------------------


def captured(work):
    """(what work() returns, a function that computes it anew in the same memory)."""
    if not ON_GPU:
        results = [x.clone() for x in work()]

        def again():
            for old, new in zip(results, work()):
                old.copy_(new)

        return results, again
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return results, graph.replay


def documents(rng, b, h, m, n):
    q_ids, kv_ids = (np.sort(rng.integers(0, 5, (b, size))) for size in (m, n))
    return am.documents(q_ids, kv_ids), reference.documents(q_ids, kv_ids)


def cu_documents(rng, b, h, m, n):
    boundaries = np.concatenate([[0], np.sort(rng.integers(0, n + 1, 4))]).astype(np.int32)
    return am.documents(cu_seqlens=boundaries), reference.cu_documents(boundaries, n)


def prefixes(rng, b, h, m, n):
    lengths = rng.integers(0, n + 2, b)
    return am.prefix_lm(lengths), reference.prefix_lm(m, n, lengths)


def intervals(rng, b, h, m, n):
    indices = rng.integers(-2, m + 3, (b, h // 2, n, 2)).astype(np.int32)
    return am.intervals(indices, True), reference.intervals(indices, True, m)


def blocks(rng, b, h, m, n):
    kept = rng.random((b, h, -(-m // 32), -(-n // 64))) < 0.5
    return am.blocks(kept, (32, 64)), reference.blocks(kept, 32, 64, m, n)


def dense(rng, b, h, m, n):
    allowed = rng.random((b, h, m, n)) < rng.choice([0.05, 0.5, 0.95])
    return am.dense(allowed), allowed


def ids(rng, b, h, m, n):
    eq, ek = (rng.integers(-4, 1, (b, h, size)) for size in (m, n))
    return am.ids(eq, ek), reference.ids(eq, ek)


def scattered(rng, b, h, m, n):
    allowed = rng.random((b, 1, m, n)) < 0.5
    seldom = rng.random((1, 1, 1, n)) < rng.choice([0.1, 0.6])
    return (am.dense(allowed) & am.dense(seldom)).reordered(), allowed & seldom


MAKERS = (documents, cu_documents, prefixes, intervals, blocks, dense, ids, scattered)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_graph_of_plan_forward_and_backward(make, deterministic):
    """Replayed with other q, k, v, dout and other contents of the mask's arrays."""
    b, h, m, n = 2, 4, LENGTH // 2, LENGTH // 2
    first, _ = make(np.random.default_rng(0), b, h, m, n)
    mask = am.Mask(first.spec, tuple(torch.tensor(a).to(DEVICE) for a in first.arrays))
    q, k, v = (x.requires_grad_() for x in inputs(b, m, n, heads=(h, 2)))
    dout = gradient_of(q, v)

    def work():
        plan = am.plan(
            mask, batch=b, q_heads=h, kv_heads=2, q_len=m, kv_len=n, head_dim=64, dtype=q.dtype,
            device=DEVICE,
        )  # fmt: skip
        out, lse = am.attention(q, k, v, plan=plan, return_lse=True, deterministic=deterministic)
        return [out.detach(), lse, *torch.autograd.grad(out, (q, k, v), dout)]

    results, replay = captured(work)
    for seed in (1, 2, 3):
        other, allowed = make(np.random.default_rng(seed), b, h, m, n)
        with torch.no_grad():
            for old, new in zip(mask.arrays, other.arrays):
                old.copy_(torch.tensor(new))
            for old in (q, k, v, dout):
                old.copy_(torch.randn_like(old))
            for result in results:
                result.fill_(torch.nan)
        replay()
        every = per_head(allowed, b, h, m, n).to(DEVICE)
        leaves = [x.detach() for x in (q, k, v)]
        compare(Results(*(x.detach() for x in results)), *leaves, every, dout=dout)


def test_graph_of_a_mask_made_in_the_call():
    """Without a plan, attention plans in each pass: that is captured too."""
    ids = torch.arange(LENGTH, dtype=torch.int32, device=DEVICE) // 100
    q, k, v = inputs(1, LENGTH)
    results, replay = captured(lambda: [am.attention(q, k, v, am.causal() & am.documents(ids))])
    for width in (30, 400):
        ids.copy_(torch.arange(LENGTH, device=DEVICE) // width)
        replay()
        alone = am.attention(q, k, v, am.causal() & am.documents(ids.clone()))
        assert torch.equal(results[0], alone)
    plain = ids.cpu().numpy()[None]
    every = reference.documents(plain, plain) & reference.causal(LENGTH, LENGTH)
    assert every.mean() > 0.2  # the last mask is not the first one
