"""A small byte-level language model whose attention is handed in from outside."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (q, k, v) -> out, all [batch, length, heads, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

BYTES = 256


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


class Rotation(nn.Module):
    """Rotary position encoding."""

    def __init__(self, length: int, head_dim: int) -> None:
        super().__init__()
        frequency = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(length)[:, None, None] * frequency
        self.register_buffer("cosine", angle.cos())
        self.register_buffer("sine", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        cosine, sine = self.cosine[: x.shape[1]], self.sine[: x.shape[1]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotate: Rotation, attend: Attend) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(_normed(x)).view(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        q, k = (rotate(_normed(t)).to(v.dtype) for t in (q, k))
        x = x + self.out(attend(q, k, v).reshape(batch, length, -1))
        return x + self.down(F.relu(self.up(_normed(x))).square())


class LanguageModel(nn.Module):
    """Predicts each next byte."""

    def __init__(self, width: int, layers: int, heads: int, head_dim: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.rotate = Rotation(length, head_dim)
        self.blocks = nn.ModuleList(Block(width, heads, head_dim) for _ in range(layers))
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text: Tensor, attend: Attend) -> Tensor:
        x = _normed(self.embedding(text))
        for block in self.blocks:
            x = block(x, self.rotate, attend)
        return self.head(_normed(x))


@torch.no_grad()
def write(model: LanguageModel, attend: Attend, prompt: bytes, count: int, seed: int) -> bytes:
    """`count` bytes that the model writes after `prompt`."""
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    text = torch.tensor(list(prompt), device=device)[None]
    for _ in range(count):
        logits = model(text, attend)[0, -1].float()
        odds = (logits / 0.7).softmax(-1)
        text = torch.cat((text, torch.multinomial(odds, 1, generator=generator)[None]), dim=1)
    return bytes(text[0].tolist())
