"""Trains one model in a process of its own: `python -m anymask.demo.train CONFIG_JSON`.

A process each keeps the two memory figures apart. Prints one JSON object a line: a step's
{"step", "loss", "seconds", "mask_seconds"}, and at the end {"result": {...}}.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import anymask as am
from anymask.demo import corpus
from anymask.demo.config import Config
from anymask.demo.model import Attend, LanguageModel, write

_WARM_UP = 4  # steps over which the learning rate rises


def torch_attention(ids: Tensor, config: Config) -> Attend:
    """torch's scaled_dot_product_attention under the dense mask.

    The mask is added to the scores, in the type of q: on the CPU a boolean one is turned into this
    form in every layer anew, which is slower.
    """
    length = ids.shape[1]
    hidden = ids[:, :, None] != ids[:, None, :]
    hidden |= torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
    dtype = getattr(torch, config.dtype)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=ids.device)
    mask = mask.masked_fill_(hidden, float("-inf"))[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return attend


def anymask_attention(ids: Tensor, config: Config) -> Attend:
    """anymask under the same mask: no N x N tensor, and one plan for all layers."""
    batch, length = ids.shape
    plan = am.plan(
        am.causal() & am.documents(ids),
        batch=batch,
        q_heads=config.heads,
        kv_heads=config.heads,
        q_len=length,
        kv_len=length,
        head_dim=config.head_dim,
        dtype=getattr(torch, config.dtype),
        device=ids.device,
    )
    return lambda q, k, v: am.attention(q, k, v, plan=plan)


_ATTENTION = {"torch": torch_attention, "anymask": anymask_attention}


def batches(config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Bytes and document ids, [batch, length] each: the same ones for every implementation."""
    documents = corpus.read_documents(config.longest_document)
    epoch = 0
    while True:
        sequences = corpus.pack(documents, config.length, config.seed + epoch)
        for i in range(0, len(sequences) - config.batch + 1, config.batch):
            chosen = sequences[i : i + config.batch]
            text = torch.stack([torch.from_numpy(s.text) for s in chosen])
            ids = torch.stack([torch.from_numpy(s.ids) for s in chosen])
            yield text.to(config.device).long(), ids.to(config.device)
        epoch += 1


def loss_of(logits: Tensor, text: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of each next byte within its document."""
    targets = text[:, 1:].masked_fill(ids[:, 1:] != ids[:, :-1], -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


class Memory:
    """How far memory rises above what was in use at the start, in bytes."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(OSError):  # forget the peak of starting up, where allowed
                Path("/proc/self/clear_refs").write_text("5")
            self._start = self._status("VmRSS:")

    def peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self._start
        return self._status("VmHWM:") - self._start

    @staticmethod
    def _status(field: str) -> int:
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now(config: Config) -> float:
    if config.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def train(config: Config) -> Iterator[dict]:
    """Yields what the module prints."""
    torch.manual_seed(config.seed)
    model = LanguageModel(
        config.width, config.layers, config.heads, config.head_dim, config.length
    ).to(config.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    device_type = torch.device(config.device).type
    lower = config.dtype != "float32"
    make_attention = _ATTENTION[config.implementation]
    data = batches(config)

    def loss_on(text: Tensor, ids: Tensor, attend: Attend) -> Tensor:
        with torch.autocast(device_type, getattr(torch, config.dtype), enabled=lower):
            return loss_of(model(text, attend), text, ids)

    # Load code and start threads before anything is measured.
    few = torch.zeros(1, 16, dtype=torch.long, device=config.device)
    loss_on(few, few, make_attention(few.int(), config)).backward()
    optimizer.zero_grad()

    memory = Memory(config.device)
    begin = _now(config)
    for step in range(config.steps):
        text, ids = next(data)
        start = _now(config)
        attend = make_attention(ids, config)
        planned = _now(config)
        loss = loss_on(text, ids, attend)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / _WARM_UP)
        optimizer.step()
        optimizer.zero_grad()
        end = _now(config)
        yield {
            "step": step,
            "loss": loss.item(),
            "seconds": end - start,
            "mask_seconds": planned - start,
        }
        del attend, loss
        if config.seconds is not None and end - begin > config.seconds:
            break
    peak = memory.peak()
    sample = ""
    if config.sample:
        with torch.autocast(device_type, getattr(torch, config.dtype), enabled=lower):
            text = write(
                model,
                lambda q, k, v: am.attention(q, k, v, am.causal()),
                b"def ",
                min(config.sample, config.length - 4),
                config.seed,
            )
        sample = text.decode("latin-1")
    parameters = sum(p.numel() for p in model.parameters())
    yield {"result": {"peak_bytes": peak, "parameters": parameters, "sample": sample}}


def main() -> None:
    for message in train(Config.from_json(sys.argv[1])):
        print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main()
