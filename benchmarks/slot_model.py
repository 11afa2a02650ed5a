"""Whether warps of the backward that makes dQ apart can wait for each other for ever, or one
overwrites what another still reads: a model.

It is of the slots in src/cuda/device/sm90/backward_split_shared.h (SplitPhase, SlotQueue), and
needs no GPU.

    python benchmarks/slot_model.py                # random masks, with and without each rule
    python benchmarks/slot_model.py --cases 20000

The loading warp and two math warpgroups are coroutines that wait for slots to be filled and given
back, in random order. Each rule below was missing once, and hung on a GPU or gave wrong results;
without it the model fails too. docs/kernels/backward.md tells of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Generator
from dataclasses import dataclass, field

import common
from rich.table import Table

SLOTS = 6
PHASES_AHEAD = 4
WARPGROUPS = 2
PATIENCE = 100  # rounds in which nobody gets any further


@dataclass(frozen=True)
class Rules:
    """What a warpgroup does before it looks for a step beyond one that shows it nothing; and before
    it puts dK and dV where K and V were."""

    gives_back_its_slot: bool = True  # of the step before, which it would hold until the next
    returns_keys: bool = True  # the slots from which dK and dV of the tile before leave
    awaits_readers: bool = True  # the other warpgroup's rows, which read K and V of the tile too


@dataclass(frozen=True)
class Phase:
    """A tile's rows or keys: for each step, which warpgroups it shows something."""

    of_keys: bool
    steps: list[tuple[bool, bool]]
    rows_stay: tuple[bool, bool] = (False, False)
    keys_stay: bool = False

    @property
    def kept_rows(self) -> int:
        return sum(self.rows_stay)


def random_phases(rng: random.Random, items: int = 8) -> list[Phase]:
    """Items as the loading warp publishes them: rows under one head after the other, then keys."""

    def steps(count: int) -> list[tuple[bool, bool]]:
        return [(rng.random() < 0.6, rng.random() < 0.6) for _ in range(count)]

    phases = []
    for _ in range(rng.randint(1, items)):
        heads, has_keys = rng.choice((0, 1, 1, 1, 2)), rng.random() < 0.9
        kept: tuple[tuple[bool, bool], bool] = ((False, False), False)
        for head in range(heads):
            tiles = rng.choice((0, 1, 1, 2, 2, 3, 4, 5))
            meets_own = head == heads - 1 and has_keys and tiles > 0 and rng.random() < 0.8
            if meets_own:
                kept = ((rng.random() < 0.9, rng.random() < 0.9), True)
            stay = kept if meets_own else ((False, False), False)
            phases.append(Phase(False, steps(2 * tiles), *stay))
        if has_keys:
            more = rng.choice((0, 1, 2, 3, 6))
            phases.append(Phase(True, steps(sum(kept[0]) + more), *kept))
    return phases


class SlotQueue:
    """Slots in the order in which they come free."""

    def __init__(self) -> None:
        self.slots = list(range(SLOTS))

    def take(self) -> int:
        return self.slots.pop(0)

    def put(self, slot: int) -> None:
        assert slot not in self.slots
        self.slots.append(slot)


@dataclass
class Model:
    phases: list[Phase]
    rules: Rules
    rng: random.Random
    published: int = 0
    filled: list[int] = field(default_factory=lambda: [0] * SLOTS)  # how often
    returned: list[list[int]] = field(
        default_factory=lambda: [[0] * SLOTS for _ in range(WARPGROUPS)]
    )
    ended: list[int] = field(default_factory=lambda: [0] * WARPGROUPS)  # phases
    overwritten: bool = False  # something that was still to be read

    def load(self, queue: SlotQueue) -> Generator[None, None, int]:
        slot = queue.take()
        while any(returned[slot] < self.filled[slot] for returned in self.returned):
            yield
        self.filled[slot] += 1
        return slot

    def loader(self) -> Generator[None, None, None]:
        queue = SlotQueue()
        rows: list[int] = []
        keys: list[int] = []
        for phase in self.phases:
            while self.published - min(self.ended) >= PHASES_AHEAD:
                yield
            self.published += 1
            if phase.of_keys:
                if not phase.keys_stay:
                    keys = [(yield from self.load(queue)), (yield from self.load(queue))]
                for slot, stays in zip(rows, phase.rows_stay):
                    if stays:
                        queue.put(slot)
                for _ in range(len(phase.steps) - phase.kept_rows):
                    queue.put((yield from self.load(queue)))
                for slot in keys:
                    queue.put(slot)
            elif phase.steps:
                rows = [(yield from self.load(queue)), (yield from self.load(queue))]
                keys = []
                for left in range(len(phase.steps), 0, -1):
                    slot = yield from self.load(queue)
                    if phase.keys_stay and left <= 2:
                        keys.append(slot)
                    else:
                        queue.put(slot)
                for slot, stays in zip(rows, phase.rows_stay):
                    if not stays:
                        queue.put(slot)

    def warpgroup(self, w: int) -> Generator[None, None, None]:
        queue = SlotQueue()
        seen = [0] * SLOTS  # how often a slot was waited for
        rows: list[int] = []
        keys: list[int] = []
        leaving: list[int] = []

        def give_back(slot: int) -> None:
            self.returned[w][slot] += 1

        def return_keys() -> None:
            while leaving:
                give_back(leaving.pop())

        def fill(slot: int) -> Generator[None, None, None]:
            seen[slot] += 1
            while self.filled[slot] < seen[slot]:
                yield

        def take_own() -> Generator[None, None, list[int]]:
            own = [queue.take(), queue.take()]
            for slot in own:
                yield from fill(slot)
            return own

        def walk(phase: Phase) -> Generator[None, None, None]:
            waiting = [slot for slot, stays in zip(rows, phase.rows_stay) if stays]
            resident = waiting if phase.of_keys else []
            held = None  # the slot of the step whose products run
            for index, shows in enumerate(phase.steps):
                stays = not phase.of_keys and phase.keys_stay and index >= len(phase.steps) - 2
                if resident:
                    slot = resident.pop(0)
                else:
                    slot = queue.take()
                    yield from fill(slot)
                if stays:
                    keys.append(slot)
                else:
                    queue.put(slot)
                if shows[w]:
                    return_keys()
                    if held is not None:
                        give_back(held)
                    held = None if stays else slot
                    for _ in range(self.rng.randint(0, 3)):
                        yield
                    continue
                if not stays:
                    give_back(slot)
                if self.rules.gives_back_its_slot and held is not None:
                    give_back(held)
                    held = None
                if self.rules.returns_keys:
                    return_keys()
            if held is not None:
                give_back(held)
            return_keys()

        for number, phase in enumerate(self.phases):
            while self.published <= number:
                yield
            if phase.of_keys:
                if not phase.keys_stay:
                    keys = yield from take_own()
                yield from walk(phase)
                if phase.keys_stay:
                    while self.rules.awaits_readers and min(self.ended) < number:
                        yield
                    self.overwritten |= min(self.ended) < number
                leaving = list(keys)
                for slot in keys:
                    queue.put(slot)
                keys = []
            elif phase.steps:
                rows, keys = (yield from take_own()), []
                yield from walk(phase)
                for slot, stays in zip(rows, phase.rows_stay):
                    if not stays:
                        queue.put(slot)
                        give_back(slot)
            else:
                return_keys()
            self.ended[w] = number + 1

    def fails(self) -> bool:
        """Runs all three by turns of random length. Whether they stop before their ends, or what
        was still to be read was overwritten."""
        running = [self.loader(), *(self.warpgroup(w) for w in range(WARPGROUPS))]
        idle = 0
        while running and idle < PATIENCE:
            before = (self.filled[:], [x[:] for x in self.returned], self.published, self.ended[:])
            for routine in self.rng.sample(running, len(running)):
                for _ in range(self.rng.randint(1, 6)):
                    try:
                        next(routine)
                    except StopIteration:
                        running.remove(routine)
                        break
            after = (self.filled, self.returned, self.published, self.ended)
            idle = idle + 1 if before == after else 0
        return bool(running) or self.overwritten


def count_failing(cases: int, rules: Rules, seed: int = 0) -> int:
    """Of so many random lists of phases, those that hang or overwrite what is still to be read."""
    count = 0
    for case in range(cases):
        rng = random.Random(f"{seed} {case}")
        count += Model(random_phases(rng), rules, rng).fails()
    return count


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="random masks for each line")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    table = Table("rules", "fail", title=f"of {settings.cases} random masks")
    lines = {
        "as they are": Rules(),
        "a slot is held until the next visible step": Rules(gives_back_its_slot=False),
        "K and V are returned at the next visible step": Rules(returns_keys=False),
        "dK and dV are put away as soon as they are made": Rules(awaits_readers=False),
    }
    for name, rules in lines.items():
        table.add_row(name, str(count_failing(settings.cases, rules, settings.seed)))
    common.console_of(100).print(table)


if __name__ == "__main__":
    main()
