"""The desk of a sweep: an actor at which the driver lays out legs of trials, slots take them, and Ray Tune's trials
wait for points.

It decides nothing and writes nothing: whatever happens is told to the driver, which keeps the records. It imports
little, so that it is there at once.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

MOMENT = 1.0  # seconds that a call waits at most for something to happen, so that no caller hangs on a desk


@dataclass(frozen=True)
class Leg:
    """A part of a trial that one slot does in one go: train its run until a step, and measure. run: reference of the
    Run, in a list, which nobody looks into on the way. attempts: how often its workers have died at it."""

    trial: str
    point: str
    run: list
    until: int
    attempts: int = 0


@dataclass(frozen=True)
class Event:
    """What the driver is told. kind: "taken" by a slot, "row", "measured", "failed", "again" where its workers have
    died; "go" where Ray Tune has a point go on to its next stage."""

    kind: str
    trial: str = ""
    point: str = ""
    slot: int | None = None
    about: Any = None


class Desk:
    """Asynchronous: many callers wait at one time."""

    def __init__(self, attempts: int):
        """attempts: how often the workers may die at one leg; -1: as often as they like."""
        self.attempts = attempts
        self.legs: list[Leg] = []
        self.taken: dict[int, Leg] = {}
        self.troubles: dict[str, str] = {}
        self.events: deque[Event] = deque()
        self.replies: dict[tuple[str, int], dict] = {}
        self.over = False
        self.changed = asyncio.Condition()

    # of the driver

    async def put(self, legs: list[Leg]) -> None:
        """The slots take them in the order of their points."""
        async with self.changed:
            self.legs = sorted([*self.legs, *legs], key=lambda leg: leg.trial)
            self.changed.notify_all()

    async def settle(self, point: str, stage: int, reply: dict) -> None:
        """What Ray Tune's trial of this point is told of its stage."""
        async with self.changed:
            self.replies[point, stage] = reply
            self.changed.notify_all()

    async def news(self) -> list[Event]:
        """Everything that has happened since the last call; waits a moment where nothing has."""
        await self._until(lambda: bool(self.events))
        news, self.events = list(self.events), deque()
        return news

    async def close(self) -> None:
        """Let every caller go: the sweep is over."""
        async with self.changed:
            self.over = True
            self.legs = []
            self.changed.notify_all()

    # of the slots

    async def next(self, slot: int) -> Leg | str | None:
        """The next leg for a slot; "over" at the end, None where there is none yet.

        A slot that asks while its last leg is not done has lost its workers at it, and gets it again.
        """
        if leg := self.taken.pop(slot, None):
            leg = replace(leg, attempts=leg.attempts + 1)
            about = self.troubles.pop(leg.trial, "a worker has died")
            if 0 <= self.attempts < leg.attempts:
                await self._tell(
                    Event(
                        "failed",
                        leg.trial,
                        leg.point,
                        slot,
                        f"its workers failed {leg.attempts} times, the last time: {about}",
                    )
                )
            else:
                await self._tell(Event("again", leg.trial, leg.point, slot, about))
                return await self._take(slot, leg)
        await self._until(lambda: self.over or bool(self.legs))
        if self.over:
            return "over"
        return await self._take(slot, self.legs.pop(0)) if self.legs else None

    async def _take(self, slot: int, leg: Leg) -> Leg:
        self.taken[slot] = leg
        await self._tell(Event("taken", leg.trial, leg.point, slot))
        return leg

    async def row(self, slot: int, trial: str, row: dict) -> None:
        if leg := self._has(slot, trial):
            await self._tell(Event("row", trial, leg.point, slot, row))

    async def trouble(self, slot: int, trial: str, message: str) -> None:
        """Why the workers of a slot are about to start again with the leg that they have."""
        if self._has(slot, trial):
            self.troubles.setdefault(trial, message)

    async def failed(self, slot: int, trial: str, message: str) -> None:
        """The leg that a slot has cannot be done."""
        if leg := self._has(slot, trial):
            del self.taken[slot]
            await self._tell(Event("failed", trial, leg.point, slot, message))

    async def measured(self, slot: int, trial: str, outcome: dict) -> None:
        if leg := self._has(slot, trial):
            del self.taken[slot]
            await self._tell(Event("measured", trial, leg.point, slot, outcome))

    def _has(self, slot: int, trial: str) -> Leg | None:
        leg = self.taken.get(slot)
        return leg if leg and leg.trial == trial else None

    # of Ray Tune's trials

    async def go(self, point: str, stage: int) -> None:
        await self._tell(Event("go", point=point, about=stage))

    async def reply(self, point: str, stage: int) -> dict | None:
        """What came of a stage; None where that is not known yet."""
        await self._until(lambda: self.over or (point, stage) in self.replies)
        return self.replies.get((point, stage), {"done": True} if self.over else None)

    async def _tell(self, event: Event) -> None:
        async with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    async def _until(self, ready) -> None:
        async with self.changed:
            try:
                await asyncio.wait_for(self.changed.wait_for(ready), MOMENT)
            except TimeoutError:
                pass


def serve(settings: dict) -> None:
    """What each worker of a slot runs; it is named here, so that the driver need not import what only workers use."""
    from jobs.slots import work

    work(settings)
