"""The PyTorch operator: autograd, fake tensors, torch.compile, checkpointing, torch.func."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import anymask as am  # noqa: E402

LENGTH = 48


def inputs(dtype=torch.float64, batch=2, length=LENGTH, heads=(4, 2), dim=8, grad=True):
    shapes = [(batch, length, h, dim) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def some_mask(batch=2, length=LENGTH):
    ids = torch.randint(0, 3, (batch, length), dtype=torch.int32).sort().values
    return am.causal() & am.documents(ids)


def gradients(function, leaves):
    out = function(*leaves)
    return out, torch.autograd.grad(out.sin().sum(), leaves)


def assert_same(one, two):
    (out, grads), (other, others) = one, two
    torch.testing.assert_close(out, other)
    for a, b in zip(grads, others):
        torch.testing.assert_close(a, b)


def test_torch_is_not_imported_without_a_tensor():
    code = (
        "import sys, numpy as np, anymask as am\n"
        "q = np.ones((1, 4, 2, 8), np.float32)\n"
        "am.attention(q, q, q, am.causal() & am.documents([0, 0, 1, 1]))\n"
        "am.plan(am.causal(), batch=1, q_heads=1, kv_heads=1, q_len=4, kv_len=4, head_dim=8,\n"
        "        dtype='float32')\n"
        "am.causal().to_dense(q_len=3)\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_gradcheck():
    mask = am.causal() & am.documents(torch.tensor([0, 0, 1, 1, 1, 2]))
    leaves = inputs(batch=1, length=6)
    for options in ({}, {"scale": 0.4}, {"layout": "bshd"}):
        torch.autograd.gradcheck(
            lambda *x, options=options: am.attention(*x, mask, return_lse=True, **options), leaves
        )
    allowed = torch.rand(1, 4, 5, 6) < 0.6
    allowed[..., 2, :] = False
    allowed[..., 0] |= torch.tensor([True, True, False, True, True])
    q, k, v = inputs(batch=1, length=6)
    q = q[:, :5]
    torch.autograd.gradcheck(lambda *x: am.attention(*x, am.dense(allowed)), (q, k, v))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_opcheck_forward(grad, planned):
    mask, leaves = some_mask(), inputs(grad=grad)
    plan = am.plan(
        mask, batch=2, q_heads=4, kv_heads=2, q_len=LENGTH, kv_len=LENGTH, head_dim=8,
        dtype=torch.float64,
    )  # fmt: skip
    args = (*leaves, list(mask.arrays), mask.spec, plan.buffer if planned else None, 0.3, False)
    torch.library.opcheck(torch.ops.anymask.forward.default, args)


def test_opcheck_plan_and_backward():
    mask, (q, k, v) = some_mask(), inputs(grad=False)
    sizes = (2, 4, 2, LENGTH, LENGTH, 8, 8)
    for each in (mask, am.causal()):
        torch.library.opcheck(
            torch.ops.anymask.plan.default,
            (list(each.arrays), each.spec, sizes, torch.float64, torch.device("cpu")),
        )
    arrays = list(mask.arrays)
    out, lse = torch.ops.anymask.forward(q, k, v, arrays, mask.spec, None, None, False)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.anymask.backward.default,
            (torch.randn_like(out), dlse, q, k, v, out, lse, arrays, mask.spec, None, None, False),
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_a_mask_from_outside(backend):
    mask = some_mask()

    def function(q, k, v):
        return am.attention(q, k, v, mask) * 2

    leaves = inputs()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_same(gradients(compiled, leaves), gradients(function, leaves))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_a_mask_built_inside(backend):
    def function(q, k, v, ids, window):
        others = am.documents(ids, ids + 1).complement()
        mask = (am.sliding_window(window) | am.prefix_lm(3)) & others
        out, lse = am.attention(q, k, v, mask, return_lse=True, layout="bhsd")
        return out + lse.masked_fill(lse.isinf(), 0.0)[..., None]

    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in inputs()]
    ids = torch.randint(0, 3, (2, LENGTH))
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for window in (3, 4, 9):
        assert_same(
            gradients(lambda *x, w=window: compiled(*x, ids, w), leaves),
            gradients(lambda *x, w=window: function(*x, ids, w), leaves),
        )


def test_compile_with_changing_lengths():
    def function(q, k, v, ids):
        return am.attention(q, k, v, am.causal() & am.documents(ids))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (16, 33, 20):
        leaves, ids = inputs(length=length), torch.randint(0, 2, (2, length))
        assert_same(
            gradients(lambda *x, i=ids: compiled(*x, i), leaves),
            gradients(lambda *x, i=ids: function(*x, i), leaves),
        )


def test_compile_with_a_plan_and_masks_as_arguments():
    mask, leaves = some_mask(), inputs()
    plan = am.plan(
        mask, batch=2, q_heads=4, kv_heads=2, q_len=LENGTH, kv_len=LENGTH, head_dim=8,
        dtype=torch.float64,
    )  # fmt: skip

    def function(q, k, v, mask=None, plan=None):
        return am.attention(q, k, v, mask, plan=plan)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = gradients(lambda *x: function(*x, mask), leaves)
    assert_same(gradients(lambda *x: compiled(*x, plan=plan), leaves), expected)
    assert_same(gradients(lambda *x: compiled(*x, mask=mask), leaves), expected)


def test_compiled_layers_share_one_plan():
    seen = []

    def backend(graph, example):
        from torch._functorch.aot_autograd import aot_module_simplified
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        def count(graph, example):
            seen.append([str(node.target) for node in graph.graph.nodes])
            return graph.forward

        return aot_module_simplified(
            graph,
            example,
            fw_compiler=count,
            bw_compiler=count,
            partition_fn=min_cut_rematerialization_partition,
        )

    mask = some_mask()

    def layers(q, k, v):
        for _ in range(3):
            q = am.attention(q, k, v, mask) + q
        return q

    leaves = inputs()
    gradients(torch.compile(layers, fullgraph=True, backend=backend), leaves)
    forward, backward = seen
    assert sum("anymask.forward" in name for name in forward) == 3
    assert sum("anymask.plan" in name for name in forward) == 1
    assert sum("anymask.backward" in name for name in backward) == 3
    assert not any("anymask.plan" in name for name in backward)


def test_plan_is_built_once_a_training_call(monkeypatch):
    from anymask import _torch_calls

    built = []
    build = _torch_calls._build
    monkeypatch.setattr(_torch_calls, "_build", lambda *args: built.append(1) or build(*args))
    gradients(lambda *x: am.attention(*x, some_mask()), inputs())
    assert len(built) == 1


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    mask, leaves = some_mask(), inputs()
    _, expected = gradients(lambda *x: am.attention(*x, mask), leaves)
    for reentrant in (True, False):
        checkpoint(am.attention, *leaves, mask, use_reentrant=reentrant).sin().sum().backward()
        for leaf, gradient in zip(leaves, expected):
            assert torch.equal(leaf.grad, gradient)
            leaf.grad = None


def test_saved_tensors_may_move():
    mask, leaves = some_mask(), inputs()
    expected = gradients(lambda *x: am.attention(*x, mask), leaves)

    def moved(tensor):  # unaligned memory
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return memory[1:].view(tensor.shape).copy_(tensor)

    with torch.autograd.graph.saved_tensors_hooks(moved, lambda tensor: tensor):
        out = am.attention(*leaves, mask)
    assert_same((out, torch.autograd.grad(out.sin().sum(), leaves)), expected)


def test_func_transforms():
    mask, (q, k, v) = some_mask(), inputs(grad=False)

    def loss(q, k, v):
        return am.attention(q, k, v, mask).sin().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v), expected):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected[0])

    stacked = torch.stack([q, q * 2, -q])
    outs = torch.func.vmap(lambda x: am.attention(x, k, v, mask))(stacked)
    per_sample = torch.func.vmap(torch.func.grad(loss), (0, None, None))(stacked, k, v)
    for i in range(3):
        torch.testing.assert_close(outs[i], am.attention(stacked[i], k, v, mask))
        torch.testing.assert_close(per_sample[i], torch.func.grad(loss)(stacked[i], k, v))
    ids = torch.randint(0, 3, (3, LENGTH))
    outs = torch.func.vmap(lambda i: am.attention(q, k, v, am.documents(i)))(ids)
    torch.testing.assert_close(outs[2], am.attention(q, k, v, am.documents(ids[2])))


def test_second_derivatives_are_refused():
    q, k, v = inputs()
    (dq,) = torch.autograd.grad(am.attention(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not available"):
        dq.sum().backward()


def test_partial_gradients():
    mask, (q, k, v) = some_mask(), inputs()
    expected = gradients(lambda *x: am.attention(*x, mask), [q, k, v])[1]
    out = am.attention(q, k.detach(), v.detach(), mask)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), q)[0], expected[0])
    _, lse = am.attention(q, k, v, mask, return_lse=True)
    torch.autograd.grad(lse.sum(), (q, k))
    assert not am.attention(q.detach(), k.detach(), v.detach()).requires_grad
    with torch.no_grad():
        assert not am.attention(q, k, v).requires_grad


def test_expanded_output_gradient():
    mask, leaves = some_mask(), inputs()
    sums = torch.autograd.grad(am.attention(*leaves, mask).sum(), leaves)
    out = am.attention(*leaves, mask)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out).contiguous())
    for a, b in zip(sums, ones):
        assert torch.equal(a, b)


def test_gradients_keep_their_leaf_layout():
    leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs()]
    am.attention(*leaves, layout="bhsd").sum().backward()
    for leaf in leaves:
        assert leaf.grad.stride() == leaf.stride()


def test_autocast():
    leaves = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = am.attention(*leaves, am.causal())
        mixed = am.attention(leaves[0], leaves[1].bfloat16(), leaves[2], am.causal())
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, am.attention(*(x.bfloat16() for x in leaves), am.causal()))
    out.float().sum().backward()
    assert leaves[0].grad.dtype == torch.float32


def test_numpy_masks_serve_torch():
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (2, LENGTH)))
    leaves = inputs()
    assert_same(
        gradients(lambda *x: am.attention(*x, am.documents(ids)), leaves),
        gradients(lambda *x: am.attention(*x, am.documents(torch.from_numpy(ids))), leaves),
    )
    compiled = torch.compile(
        lambda *x: am.attention(*x, am.documents(ids)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*leaves), am.attention(*leaves, am.documents(ids)))


def test_meta_tensors_have_shapes():
    q = torch.empty(2, 7, 4, 16, device="meta")
    v = torch.empty(2, 7, 2, 24, device="meta")
    out, lse = am.attention(q, q[:, :, :2], v, am.causal(), return_lse=True)
    assert out.shape == (2, 7, 4, 24) and lse.shape == (2, 4, 7)
    assert out.device.type == "meta" and lse.dtype == torch.float32


class _Recorder:
    def __init__(self):
        super().__init__()
        self.seen = []

    def record(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class _Dispatched(_Recorder, torch.utils._python_dispatch.TorchDispatchMode):
    __torch_dispatch__ = _Recorder.record


class _Called(_Recorder, torch.overrides.TorchFunctionMode):
    __torch_function__ = _Recorder.record


@pytest.mark.parametrize("grad", [False, True])
def test_watchers_see_the_operator(grad):
    """A small call does without the dispatcher, but not where somebody would miss it."""
    leaves, mask = inputs(grad=grad), some_mask()
    expected = am.attention(*leaves, mask)
    for mode in (_Dispatched(), _Called()):
        with mode:
            assert torch.equal(am.attention(*leaves, mask), expected)
        assert any("anymask.forward" in name for name in mode.seen), mode.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(am.attention(*leaves, mask), expected)
    assert "anymask::forward" in {event.name for event in profile.events()}


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, ids):
            return am.attention(q, k, v, am.causal() & am.documents(ids))

    args = (*inputs(torch.float32, grad=False), torch.randint(0, 3, (2, LENGTH)))
    program = torch.export.export(Layer(), args)
    torch.testing.assert_close(program.module()(*args), Layer()(*args))


def test_top_keys():
    leaves, scores = inputs(), torch.randn(2, 2, LENGTH, requires_grad=True)
    torch.library.opcheck(torch.ops.anymask.top_keys.default, (scores.detach(), 5, LENGTH))

    def function(q, k, v, scores):
        return am.attention(q, k, v, am.top_keys(scores, 5))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(
        gradients(lambda *x: compiled(*x, scores), leaves),
        gradients(lambda *x: function(*x, scores), leaves),
    )
    torch.testing.assert_close(
        function(*leaves, scores), function(*leaves, scores.detach().numpy())
    )


@pytest.mark.filterwarnings("error")
def test_read_only_numpy_masks():
    allowed = np.random.default_rng(0).random((LENGTH, LENGTH)) < 0.5
    allowed.flags.writeable = False
    out = am.attention(*inputs(), am.dense(allowed))
    assert out.isfinite().all()
