"""Score options through the PyTorch operator: autograd, torch.compile, torch.func and more."""

from __future__ import annotations

import anymask as am
import pytest
import torch
from anymask import machine

LENGTH = 48


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of calls on a few numbers: waking threads costs more than they do."""
    before = machine.threads()
    machine.set_threads(1)
    yield
    machine.set_threads(before)


def inputs(dtype=torch.float64, batch=2, length=LENGTH, heads=(4, 2), dim=8, grad=True):
    shapes = [(batch, length, h, dim) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def options(dtype=torch.float64, batch=2, length=LENGTH, heads=(4, 2), grad=True):
    """key_bias, bias, sink."""
    shapes = [(batch, heads[1], length), (1, heads[0], length, length), (heads[0],)]
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def call(q, k, v, key_bias, bias, sink, mask=None, **others):
    others = {"softcap": 2.0, "dropout_p": 0.25, "seed": 3, **others}
    mask = am.causal() if mask is None else mask
    return am.attention(q, k, v, mask, key_bias=key_bias, bias=bias, sink=sink, **others)


def gradients(function, leaves):
    out = function(*leaves)
    return out, torch.autograd.grad(out.sin().sum(), leaves)


def assert_same(one, two):
    (out, grads), (other, others) = one, two
    torch.testing.assert_close(out, other)
    for a, b in zip(grads, others):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seen", [am.causal(), am.full()])
@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (1, 2, 4, 4), (2, 1, 4, 4), (1, 1, 1, 4)])
def test_gradcheck(seen, shape):
    leaves = inputs(batch=2, length=4, heads=(2, 1))
    key_bias, _, sink = options(batch=2, length=4, heads=(2, 1))
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda *x: call(*x, mask=seen, return_lse=True), (*leaves, key_bias, bias, sink)
    )


@pytest.mark.parametrize("name", ["key_bias", "bias", "sink"])
def test_gradcheck_of_each(name):
    leaves, names = inputs(batch=2, length=4, heads=(2, 1)), ("key_bias", "bias", "sink")
    tensor = options(batch=2, length=4, heads=(2, 1))[names.index(name)]
    torch.autograd.gradcheck(
        lambda x: am.attention(*leaves, am.causal(), return_lse=True, **{name: x}), tensor
    )


@pytest.mark.parametrize("given", [{"softcap": 0.7}, {"dropout_p": 0.5, "seed": 1}])
def test_gradcheck_of_numbers(given):
    leaves = inputs(batch=2, length=4, heads=(2, 1))
    torch.autograd.gradcheck(
        lambda *x: am.attention(*x, am.causal(), return_lse=True, **given), leaves
    )


def operator_arguments(grad, given):
    leaves, (key_bias, bias, sink) = inputs(grad=grad), options(grad=grad)
    mask = am.causal()
    scores = {
        "all": (key_bias, bias, sink, torch.tensor([3, 4]), 0.25, 2.0),
        "bias": (None, bias),
        "sink": (None, None, sink),
        "dropout": (None, None, None, torch.tensor([3, 4]), 0.25),
        "softcap": (None, None, None, None, 0.0, 2.0),
    }[given]
    return (*leaves, list(mask.arrays), mask.spec, None, None, False), scores


@pytest.mark.parametrize("given", ["all", "bias", "sink", "dropout", "softcap"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_forward(grad, given):
    before, scores = operator_arguments(grad, given)
    torch.library.opcheck(torch.ops.anymask.forward.default, (*before, *scores))


@pytest.mark.parametrize("wanted", [[], [True, False, True], [True, True, True]])
def test_opcheck_backward(wanted):
    before, scores = operator_arguments(False, "all")
    out, lse = torch.ops.anymask.forward(*before, *scores)
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(
            torch.ops.anymask.backward.default,
            (torch.randn_like(out), dlse, *before[:3], out, lse, *before[3:], wanted, *scores),
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    leaves = [*inputs(), *options()]
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    assert_same(gradients(compiled, leaves), gradients(call, leaves))
    few = leaves[:4]

    def one(q, k, v, key_bias):
        return am.attention(q, k, v, key_bias=key_bias * 2)

    compiled = torch.compile(one, fullgraph=True, backend=backend)
    assert_same(gradients(compiled, few), gradients(one, few))


def test_compile_with_changing_lengths():
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (16, 33, 20):
        leaves = [*inputs(length=length), *options(length=length)]
        assert_same(gradients(compiled, leaves), gradients(call, leaves))


def test_compile_with_seeds():
    leaves = inputs(torch.float32)

    def drawn(q, k, v):
        return am.attention(q, k, v, dropout_p=0.5)

    def given(q, k, v, seed):
        return am.attention(q, k, v, dropout_p=0.5, seed=seed)

    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = [drawn(*leaves) for _ in range(2)]
    torch.manual_seed(0)
    got = [compiled(*leaves) for _ in range(2)]
    assert not torch.equal(expected[0], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    compiled = torch.compile(given, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3, torch.tensor([1, 0]), torch.tensor([1, 5])):
        assert torch.equal(compiled(*leaves, seed), given(*leaves, seed))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_repeats_what_was_drawn(reentrant):
    from torch.utils.checkpoint import checkpoint

    def drawn(*leaves):
        return am.attention(*leaves, dropout_p=0.5)

    leaves = inputs()
    torch.manual_seed(5)
    expected = gradients(drawn, leaves)
    torch.manual_seed(5)
    out = checkpoint(drawn, *leaves, use_reentrant=reentrant)
    out.sin().sum().backward()
    assert_same((out, [leaf.grad for leaf in leaves]), expected)


def test_func_transforms():
    leaves = [*inputs(grad=False), *options(grad=False)]

    def loss(*leaves):
        return call(*leaves).sin().sum()

    expected = gradients(call, [x.clone().requires_grad_() for x in leaves])[1]
    for got in (
        torch.func.grad(loss, argnums=tuple(range(6)))(*leaves),
        torch.compile(
            torch.func.grad(loss, argnums=tuple(range(6))), fullgraph=True, backend="aot_eager"
        )(*leaves),
    ):
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)

    biases = torch.stack([leaves[4], leaves[4] * 2, -leaves[4]])
    in_dims = (None,) * 4 + (0, None)
    outs = torch.func.vmap(call, in_dims)(*leaves[:4], biases, leaves[5])
    slopes = torch.func.vmap(torch.func.grad(loss, argnums=4), in_dims)(
        *leaves[:4], biases, leaves[5]
    )
    for i in range(3):
        one = (*leaves[:4], biases[i], leaves[5])
        torch.testing.assert_close(outs[i], call(*one))
        torch.testing.assert_close(slopes[i], torch.func.grad(loss, argnums=4)(*one))


def test_partial_gradients():
    leaves = [*inputs(), *options()]
    expected = gradients(call, leaves)[1]
    for i, leaf in enumerate(leaves):
        alone = [x if j == i else x.detach() for j, x in enumerate(leaves)]
        (got,) = torch.autograd.grad(call(*alone).sin().sum(), leaf)
        torch.testing.assert_close(got, expected[i])
    assert not call(*(x.detach() for x in leaves)).requires_grad


def test_only_wanted_gradients_are_computed(monkeypatch):
    from anymask import _torch_calls as calls

    seen = []
    empty = calls.empty_gradients
    monkeypatch.setattr(
        calls, "empty_gradients", lambda *args: seen.append(list(args[3])) or empty(*args)
    )
    leaves = [*inputs(), *(x.detach() for x in options())]
    call(*leaves).sum().backward()
    call(*leaves[:5], leaves[5].requires_grad_()).sum().backward()
    am.attention(*leaves[:3]).sum().backward()
    assert [sum(wanted) for wanted in seen] == [0, 1, 0]


def test_parameters_and_lse_alone():
    q, k, v = inputs(torch.float32)
    sink, bias = (torch.nn.Parameter(x.detach().float()) for x in options()[:0:-1])
    out, lse = am.attention(q, k, v, sink=sink, bias=bias, return_lse=True)
    grads = torch.autograd.grad((out.sin().sum(), lse.sum()), (sink, bias))
    plain = [x.detach().requires_grad_() for x in (sink, bias)]
    out, lse = am.attention(q, k, v, sink=plain[0], bias=plain[1], return_lse=True)
    for a, b in zip(grads, torch.autograd.grad((out.sin().sum(), lse.sum()), plain)):
        assert torch.equal(a, b)
    _, lse = am.attention(q, k, v, sink=sink, return_lse=True)
    (dsink,) = torch.autograd.grad(lse.sum(), sink)
    expected = (sink.detach()[None, :, None] - lse).exp().sum((0, 2))
    torch.testing.assert_close(dsink, expected)


def test_second_derivatives_are_refused():
    leaves = [*inputs(), *options()]
    (dbias,) = torch.autograd.grad(call(*leaves).sin().sum(), leaves[4], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not available"):
        dbias.sum().backward()


def test_autocast_leaves_options_alone():
    leaves = [*inputs(torch.float32), *options(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = call(*leaves)
    assert out.dtype == torch.bfloat16
    expected = call(*(x.bfloat16() for x in leaves[:3]), *leaves[3:])
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert leaves[4].grad.dtype == torch.float32 and leaves[4].grad.shape == leaves[4].shape


def test_a_plan_changes_nothing():
    leaves, mask = [*inputs(), *options()], am.causal()
    plan = am.plan(
        mask, batch=2, q_heads=4, kv_heads=2, q_len=LENGTH, kv_len=LENGTH, head_dim=8,
        dtype=torch.float64,
    )  # fmt: skip
    planned = gradients(
        lambda q, k, v, key_bias, bias, sink: am.attention(
            q, k, v, plan=plan, key_bias=key_bias, bias=bias, sink=sink, softcap=2.0,
            dropout_p=0.25, seed=3,
        ),
        leaves,
    )  # fmt: skip
    assert_same(planned, gradients(call, leaves))


def test_layouts_and_shapes_without_memory():
    leaves = [*inputs(grad=False), *options(grad=False)]
    swapped = [x.transpose(1, 2) for x in leaves[:3]]
    out = call(*swapped, *leaves[3:], layout="bhsd")
    assert torch.equal(out.transpose(1, 2), call(*leaves))
    meta = [x.to("meta") for x in leaves]
    out, lse = call(*meta, seed=torch.zeros(2, dtype=torch.int64, device="meta"), return_lse=True)
    assert out.shape == (2, LENGTH, 4, 8) and lse.shape == (2, 4, LENGTH)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, *leaves):
            return call(*leaves)

    leaves = tuple([*inputs(grad=False), *options(grad=False)])
    program = torch.export.export(Layer(), leaves)
    torch.testing.assert_close(program.module()(*leaves), Layer()(*leaves))
