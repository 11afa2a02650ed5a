"""What the calls of other systems share: their checks of q, k and v, types, docs and examples."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import anymask as am
import numpy as np
import pytest
import reference
import torch
from anymask import compat
from checks import DTYPES, assert_close, naive, per_head, poisoned

DOCUMENTS = sorted((Path(__file__).parents[2] / "docs" / "moving").glob("*.md"))
# Those that need nothing but q, k and v.
CALLS = {
    name: getattr(am, name) for name in compat.__all__ if name != "apply_dynamic_mask_attention"
}


def draw(rng, shape, dtype="float32"):
    return torch.from_numpy(rng.standard_normal(shape)).to(DTYPES[dtype])


def draw_qkv(rng, batch, lengths, heads, dim, dtype="float32"):
    """q [batch, lengths[0], heads[0], dim], k and v of the second length and heads."""
    q = draw(rng, (batch, lengths[0], heads[0], dim), dtype)
    return q, *(draw(rng, (batch, lengths[1], heads[1], dim), dtype) for _ in range(2))


def check(call, q, k, v, allowed, *, layout="bshd", scale=None, **options):
    """Forward and backward of `call` on q, k, v [batch, length, heads, dim] against float64."""
    every = per_head(allowed, q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    seeded = torch.Generator().manual_seed(q.numel())
    dout = torch.randn(*q.shape[:3], v.shape[3], dtype=torch.float64, generator=seeded).to(q.dtype)
    with poisoned():
        if layout == "bhsd":
            out = call(*(x.transpose(1, 2) for x in leaves), **options).transpose(1, 2)
        else:
            out = call(*leaves, **options)
        got = torch.autograd.grad(out, leaves, dout)

    arrays = [x.detach().double().numpy() for x in leaves]
    low_leaves = [x.detach().clone().requires_grad_() for x in leaves]
    low_out, _ = naive(*low_leaves, every, scale)
    assert_close("out", out, reference.attention(*arrays, every.numpy(), scale)[0], low_out, 1e-6)
    blind = ~every.any(-1)
    assert (out.transpose(1, 2)[blind] == 0).all()
    assert (got[0].transpose(1, 2)[blind] == 0).all()
    ref = reference.attention_backward(*arrays, every.numpy(), dout.double().numpy(), None, scale)
    low = torch.autograd.grad(low_out, low_leaves, dout)
    # With few elements the naive result may be exact by luck: allow the rounding of one product.
    few = min(every.shape[2:]) < 32
    floor = max(1e-5, 2 * torch.finfo(q.dtype).eps) if few else 1e-5
    for name, g, r, x in zip(("dq", "dk", "dv"), got, ref, low):
        assert_close(name, g, r, x, floor)
    return out


def test_signatures():
    expected = {
        "flashmask_attention": "query key value startend_row_indices dropout causal window_size "
        "return_softmax_lse return_seed_offset fixed_seed_offset rng_name training name "
        "softmax_scale block_mask learnable_sink",
        "apply_dynamic_mask_attention": "query key value dt_proj A causal_mask keep_window_size "
        "is_causal scale score",
        "flash_attention_custom_mask": "q k v mask sm_scale",
        "flexible_attention": "q k v causal sm_scale eq ek score_func_mode",
    }
    for name, names in expected.items():
        assert list(inspect.signature(getattr(am, name)).parameters) == names.split()
    assert set(expected) == set(compat.__all__)
    positional = inspect.signature(am.flashmask_attention).parameters.values()
    assert [p.name for p in positional if p.kind is not p.KEYWORD_ONLY][-1] == (
        "startend_row_indices"
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(37, 37), (141, 70), (70, 141), (1, 9)])
def test_without_a_mask(name, dtype, lengths):
    q, k, v = draw_qkv(np.random.default_rng(1), 2, lengths, (4, 2), 24, dtype)
    layout = "bshd" if name == "flashmask_attention" else "bhsd"
    check(CALLS[name], q, k, v, np.ones((1, 1, *lengths), bool), layout=layout)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(name, lengths):
    q, k, v = draw_qkv(np.random.default_rng(2), 1, lengths, (2, 1), 8)
    if name != "flashmask_attention":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = CALLS[name](q, k, v)
    assert out.shape == q.shape and not out.any()


@pytest.mark.parametrize("name", CALLS)
def test_numpy_gives_what_torch_gives(name):
    arrays = [x.numpy() for x in draw_qkv(np.random.default_rng(3), 2, (4, 4), (4, 4), 16)]
    out = CALLS[name](*arrays)
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, CALLS[name](*map(torch.from_numpy, arrays)).numpy())


@pytest.mark.parametrize("name", CALLS)
def test_scale_strides_and_autocast(name):
    layout = "bshd" if name == "flashmask_attention" else "bhsd"
    factor = "softmax_scale" if layout == "bshd" else "sm_scale"
    packed = draw(np.random.default_rng(4), (2, 33, 3, 2, 16))
    q, k, v = packed.unbind(2)
    allowed = np.ones((1, 1, 33, 33), bool)
    for scale in (0.7, -0.2, 0.0):
        check(CALLS[name], q, k, v, allowed, layout=layout, scale=scale, **{factor: scale})
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        assert CALLS[name](q, k.bfloat16(), v).dtype == torch.bfloat16


@pytest.mark.parametrize("name", CALLS)
def test_errors_of_the_tensors(name):
    bshd = name == "flashmask_attention"
    names = ("query", "key", "value") if bshd else ("q", "k", "v")
    shapes = [(2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 24)]
    if not bshd:
        shapes = [(b, h, s, d) for b, s, h, d in shapes]
    good = [torch.ones(shape) for shape in shapes]
    length, heads = (1, 2) if bshd else (2, 1)

    def changed(axis, size):
        return lambda x: torch.ones([size if i == axis else n for i, n in enumerate(x.shape)])

    cases = [
        (TypeError, "{0}: got list, a tensor", 0, lambda x: [1.0]),
        (TypeError, "{1}: got NoneType, a tensor", 1, lambda x: None),
        (TypeError, "{2}: got ndarray, but {0} is a Tensor", 2, lambda x: x.numpy()),
        (ValueError, r"{0}: got shape .*\[batch, .*head_dim\]", 0, lambda x: x[0]),
        (TypeError, "{0}: got element type int64, one of float32", 0, lambda x: x.long()),
        (TypeError, "{1}: got element type bfloat16, {0}'s float32", 1, lambda x: x.bfloat16()),
        (ValueError, "{2}: got head_dim 12, a multiple of 8", 2, changed(3, 12)),
        (ValueError, "{2}: got head_dim 264, a multiple of 8 up to 256", 2, changed(3, 264)),
        (ValueError, r"{1}: got head_dim 24 .*{0}'s 16", 1, changed(3, 24)),
        (ValueError, r"{1}: got batch 3 .*{0}'s 2", 1, changed(0, 3)),
        (ValueError, r"{2}: got length 6 .*{1}'s 7", 2, changed(length, 6)),
        (ValueError, r"{2}: got heads 4 .*{1}'s 2", 2, changed(heads, 4)),
        (ValueError, r"{1}: got 3 heads, a divisor of {0}'s 4", (1, 2), changed(heads, 3)),
        (ValueError, "{0}: its last dimension must be contiguous", 0,
         lambda x: torch.ones(*x.shape[:3], 32)[..., ::2]),
    ]  # fmt: skip
    factor = "softmax_scale" if bshd else "sm_scale"
    for error, message, places, change in cases:
        bad = list(good)
        for place in places if isinstance(places, tuple) else (places,):
            bad[place] = change(good[place])
        with pytest.raises(error, match="^" + message.format(*names)):
            CALLS[name](*bad)
    with pytest.raises(ValueError, match=f"^{factor}: got inf, a finite"):
        CALLS[name](*good, **{factor: float("inf")})
    with pytest.raises(TypeError, match=f"^{factor}: got '1', a number"):
        CALLS[name](*good, **{factor: "1"})
    assert CALLS[name](*good).isfinite().all()


@pytest.mark.parametrize("name", ["custom_masks", "dynamic_masks", "flashmask", "flexible_masks"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"anymask.compat.{name}")
    names = {**vars(module), "am": am, "np": np, "torch": torch}
    results = doctest.testmod(module, globs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0 and results.attempted > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_pages_run_and_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert code
    names = {"__name__": "page"}
    for block in code:
        exec(compile(block, document.name, "exec"), names)
    links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in local if not (document.parent / link).exists()]


def test_there_is_a_page_for_each_call():
    pages = {path.stem for path in DOCUMENTS}
    assert {"flashmask", "custom_masks", "dynamic_masks", "flexible_masks"} <= pages
