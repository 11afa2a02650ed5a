"""What is timed: anymask itself and its peers, each as one call, forward and backward."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anymask.attention import attention
from anymask.bench.mask_mods import mask_mod
from anymask.bench.suites import Case
from anymask.benchmark_masks import BenchmarkMask
from anymask.plans import plan


class Unsupported(RuntimeError):
    """A peer that has no way to compute this case: no figure, and no failure either."""


class Subject(abc.ABC):
    """One way to compute a case. `leaves` are its q, k, v, laid out as it likes best."""

    name = ""
    passes: tuple[str, ...] = ("forward", "backward")
    head_first = True  # [batch, heads, length, head_dim]; else the tensors as they come

    def __init__(self, case: Case, mask: BenchmarkMask, inputs: tuple[Tensor, ...]) -> None:
        """`inputs`: q, k, v [batch, length, heads, head_dim]."""
        self.case, self.mask = case, mask
        self.leaves = tuple(
            self.turned(x).detach().contiguous().requires_grad_(x.requires_grad) for x in inputs
        )

    def turned(self, tensor: Tensor) -> Tensor:
        """Between this subject's layout and [batch, length, heads, head_dim], either way."""
        return tensor.transpose(1, 2) if self.head_first and tensor.dim() == 4 else tensor

    @abc.abstractmethod
    def forward(self) -> dict[str, Tensor]:
        """out, in this subject's layout, and lse where it tells it."""

    @property
    def make_plan(self) -> Callable[[], Any] | None:
        """What it computes once for a mask, where there is such a thing."""
        return None


# ---- anymask ------------------------------------------------------------------------------------


class Anymask(Subject):
    name = "anymask"
    head_first = False
    deterministic = False

    def __init__(self, case: Case, mask: BenchmarkMask, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(case, mask, inputs)
        self._mask = mask.mask.to(inputs[0].device)
        self._plan = self._planned()

    def _planned(self) -> Any:
        q, g = self.leaves[0], self.case.geometry
        return plan(
            self._mask, batch=g.batch, q_heads=g.heads, kv_heads=g.kv_heads, q_len=g.length,
            kv_len=g.length, head_dim=g.head_dim, dtype=q.dtype, device=q.device,
        )  # fmt: skip

    @property
    def make_plan(self) -> Callable[[], Any]:
        return self._planned

    def forward(self) -> dict[str, Tensor]:
        out, lse = attention(
            *self.leaves, plan=self._plan, return_lse=True, deterministic=self.deterministic
        )
        return {"out": out, "lse": lse}


class Deterministic(Anymask):
    name = "anymask_deterministic"
    passes = ("backward",)
    deterministic = True

    @property
    def make_plan(self) -> None:
        return None


# ---- peers --------------------------------------------------------------------------------------

_flex: dict[str, Any] = {}  # what was compiled last, by "case", "attention", "block_mask"


def _compiled_for(case: Case) -> dict[str, Any]:
    """FlexAttention compiled afresh for a mask and geometry; samples of documents share it."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    key = case._replace(sample=0)
    if _flex.get("case") != key:
        # Buffers that the backward pass may overwrite cannot be kept for another round.
        config.donated_buffer = False
        torch._dynamo.reset()
        options = {"dynamic": False, "fullgraph": True}
        _flex.update(
            case=key,
            attention=torch.compile(flex_attention, **options),
            block_mask=torch.compile(create_block_mask, dynamic=False),
        )
    return _flex


class Flex(Subject):
    """torch's FlexAttention, compiled."""

    name = "flex"

    def __init__(self, case: Case, mask: BenchmarkMask, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(case, mask, inputs)
        self._compiled = _compiled_for(case)
        self._mod = mask_mod(mask, inputs[0].device)
        self._layouts = len(mask.indices) if len(mask.indices) > 1 else None
        self._block_mask = None if self._mod is None else self._made()

    def _made(self) -> Any:
        length = self.case.geometry.length
        device = str(self.leaves[0].device)
        return self._compiled["block_mask"](
            self._mod, self._layouts, None, length, length, device=device
        )

    @property
    def make_plan(self) -> Callable[[], Any] | None:
        return None if self._mod is None else self._made

    def forward(self) -> dict[str, Tensor]:
        g = self.case.geometry
        out = self._compiled["attention"](
            *self.leaves, block_mask=self._block_mask, enable_gqa=g.heads != g.kv_heads
        )
        return {"out": out}


class Sdpa(Subject):
    """torch's scaled_dot_product_attention, with a dense mask where it needs one."""

    name = "sdpa"

    def __init__(self, case: Case, mask: BenchmarkMask, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(case, mask, inputs)
        g = case.geometry
        self._options: dict[str, Any] = {"enable_gqa": True} if g.heads != g.kv_heads else {}
        if mask.name == "causal":
            self._options["is_causal"] = True
        elif mask.name != "full":
            dense = torch.from_numpy(mask.mask.to_dense(q_len=g.length))
            self._options["attn_mask"] = dense.to(inputs[0].device)

    def forward(self) -> dict[str, Tensor]:
        out = torch.nn.functional.scaled_dot_product_attention(*self.leaves, **self._options)
        return {"out": out}


class Cudnn(Sdpa):
    """cuDNN through scaled_dot_product_attention, where it needs no dense mask."""

    name = "cudnn"

    def __init__(self, case: Case, mask: BenchmarkMask, inputs: tuple[Tensor, ...]) -> None:
        if mask.name not in ("full", "causal"):
            raise Unsupported("cuDNN takes other masks as dense tensors only")
        super().__init__(case, mask, inputs)

    def forward(self) -> dict[str, Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().forward()


PEERS: dict[str, type[Subject]] = {peer.name: peer for peer in (Flex, Cudnn, Sdpa)}
