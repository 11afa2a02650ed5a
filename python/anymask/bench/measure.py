"""Measures one case: every result is checked, then anymask and its peers are timed in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anymask.bench.check import GRADIENTS, Expected, assert_finite
from anymask.bench.results import Row, Settings
from anymask.bench.subjects import PEERS, Anymask, Deterministic, Subject, Unsupported
from anymask.bench.suites import Case
from anymask.measuring import interleaved_medians

LEAST_ROUNDS = 3


def draw(case: Case, device: str, backward: bool) -> tuple[Tensor, ...]:
    """Random q, k, v [batch, length, heads, head_dim] and the gradient of the output."""
    g = case.geometry
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(g.batch, g.length, h, g.head_dim) for h in (g.heads, g.kv_heads, g.kv_heads)]
    dtype = getattr(torch, g.dtype)
    q, k, v, dout = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in (*shapes, shapes[0])
    )
    return (*(x.requires_grad_(backward) for x in (q, k, v)), dout)


def measure(
    case: Case, settings: Settings, say: Callable[[str], None], checked: bool = True
) -> Row:
    """Times one case. What fails is named in the row's problems, and the rest goes on. Results that
    are not checked against a reference must still be finite."""
    row = _Measurement(case, settings, say, checked).run()
    _release(settings.device)
    return row


class _Measurement:
    def __init__(
        self, case: Case, settings: Settings, say: Callable[[str], None], checked: bool
    ) -> None:
        self.case, self.settings, self.say = case, settings, say
        self.mask = case.build()
        self.backward = "backward" in settings.passes
        g = case.geometry
        pairs = self.mask.pairs * g.heads * (g.batch // len(self.mask.indices))
        self.row = Row(case, pairs, checked=checked)

    def run(self) -> Row:
        started = time.perf_counter()
        with self._recorded("case"):
            *inputs, self.dout = draw(self.case, self.settings.device, self.backward)
            self.expected = None
            if self.row.checked:
                self.say("reference")
                dout = self.dout if self.backward else None
                self.expected = Expected(self.mask, *inputs, dout)
            self._passes(tuple(inputs))
        self.row.wall = time.perf_counter() - started
        return self.row

    def _passes(self, inputs: tuple[Tensor, ...]) -> None:
        subjects: dict[str, Subject] = {}
        for kind in self._kinds():
            with self._recorded(f"{kind.name} plan"), self._first(kind.name):
                subjects[kind.name] = kind(self.case, self.mask, inputs)
        plans = {name: s.make_plan for name, s in subjects.items() if s.make_plan is not None}
        if "plan" in self.settings.passes:
            self._time("plan", plans)

        outputs: dict[str, Tensor] = {}
        for name, subject in subjects.items():
            self.say(f"{name} forward")
            with self._recorded(f"{name} forward"), self._first(name):
                found = subject.forward()
                self._check(subject, found)
                outputs[name] = found["out"]
        if "forward" in self.settings.passes:
            calls = {n: subjects[n].forward for n in outputs if "forward" in subjects[n].passes}
            self._time("forward", calls)
        if not self.backward:
            return

        calls = {}
        for name, out in outputs.items():
            self.say(f"{name} backward")
            subject = subjects[name]
            dout = subject.turned(self.dout).contiguous()
            call = _gradients(out, subject.leaves, dout)
            with self._recorded(f"{name} backward"), self._first(name):
                self._check(subject, dict(zip(GRADIENTS, call())))
                calls[name] = call
        self._time("backward", calls)

    def _kinds(self) -> list[type[Subject]]:
        kinds: list[type[Subject]] = [Anymask]
        if self.settings.deterministic and self.backward:
            kinds.append(Deterministic)
        return kinds + [PEERS[name] for name in self.settings.peers]

    def _check(self, subject: Subject, results: Mapping[str, Tensor]) -> None:
        if self.expected is None:
            assert_finite(results)
            return
        share = self.expected.check({name: subject.turned(x) for name, x in results.items()})
        before = self.row.errors.get(subject.name, 0.0)
        self.row.errors[subject.name] = max(before, share)

    def _time(self, what: str, calls: Mapping[str, Callable[[], Any]]) -> None:
        if not calls:
            return
        self.say(f"timing {what}")
        with self._recorded(f"timing {what}"):
            medians = interleaved_medians(
                calls, device=self.settings.device, rounds=self.settings.rounds,
                budget=self.settings.budget, least=LEAST_ROUNDS, warm_up=False,
            )  # fmt: skip
            for name, seconds in medians.items():
                self.row.seconds.setdefault(name, {})[what] = seconds

    @contextmanager
    def _first(self, name: str) -> Iterator[None]:
        """Adds the time of a first call, compilation included."""
        started = time.perf_counter()
        yield
        first = self.row.first_calls.get(name, 0.0)
        self.row.first_calls[name] = first + time.perf_counter() - started

    @contextmanager
    def _recorded(self, what: str) -> Iterator[None]:
        """Failures become the row's problems."""
        try:
            yield
            return
        except Unsupported:
            return
        except Exception as error:
            self.row.problems[what] = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
        _release(self.settings.device)


def _gradients(
    out: Tensor, leaves: tuple[Tensor, ...], dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _release(device: str) -> None:
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
