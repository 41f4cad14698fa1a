"""Where the points of a sweep come from, as a search algorithm of Ray Tune."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ray.tune.search import Searcher

from jobs.sweep_state import SweepState
from unlearn.search.alone import mask
from unlearn.search.records import Point
from unlearn.search.space import Parameters

EQUAL = 200  # equal points in a row, after which the space counts as searched


class Source(Protocol):
    """Proposes points, and is told what came of them."""

    def propose(self, number: int) -> tuple[str, Parameters] | None:
        """(its name for the proposal, the point); None at the end. number: grows with the proposals, in equal steps
        after a restart."""
        ...

    def tell(self, name: str, point: Point) -> None: ...


class Listed:
    """The points of a grid, or drawn at random."""

    def __init__(self, points: Iterator[Parameters]):
        self.points = points

    def propose(self, number: int) -> tuple[str, Parameters] | None:
        point = next(self.points, None)
        return None if point is None else ("", point)

    def tell(self, name: str, point: Point) -> None:
        pass


class Stateless(Searcher):
    """A search algorithm that goes on from the records of a sweep, and from nothing that Ray Tune keeps."""

    def set_search_properties(self, metric, mode, config, **spec) -> bool:
        return True

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are what a sweep goes on from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        pass

    def __getstate__(self) -> dict:
        """The same where Ray Tune pickles itself."""
        return {}


class Suggestions(Stateless):
    """What Ray Tune asks for trials: points of a source that have something to run. What is known of a point already is
    told to the source at once, and is no trial of Ray Tune."""

    def __init__(self, source: Source, state: SweepState):
        super().__init__()
        self.source, self.state = source, state
        self.replays = iter(state.replays())
        self.running: dict[str, str] = {}  # trial of Ray Tune -> point
        self.names: dict[
            str, list[str]
        ] = {}  # point that runs -> the source's names for it: it may be proposed again meanwhile

    def suggest(self, trial_id: str) -> dict | str | None:
        for point in self.replays:
            self.state.begin(self.state.point(point).parameters)
            return self._given(trial_id, point, [])
        for again in range(EQUAL):
            if self.state.ends:
                return Searcher.FINISHED
            proposal = self.source.propose(len(self.state.ids) * EQUAL + again)
            if proposal is None:
                return Searcher.FINISHED
            name, parameters = proposal
            point = self.state.begin(parameters)
            if point is None:  # it would be one more than the budget has
                return Searcher.FINISHED
            if point in self.names:
                self.names[point].append(name)
            elif self.state.to_run(point):
                return self._given(trial_id, point, [name])
            else:
                self.source.tell(name, self.state.point(point))
        return Searcher.FINISHED if not self.names else None

    def _given(self, trial_id: str, point: str, names: list[str]) -> dict:
        self.running[trial_id], self.names[point] = point, names
        parameters = self.state.point(point).parameters
        return {"point": point, "parameters": {key: _plain(mask(value, key)) for key, value in parameters.items()}}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        point = self.running.pop(trial_id)
        if self.state.stopping:  # what is not over goes on at the next start
            return
        self.state.ended(point)
        for name in self.names.pop(point):
            self.source.tell(name, self.state.point(point))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
