"""The values that one key of a run may take in a sweep, and the order in which keys are chosen."""

import copy
import json
import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import Field, model_validator

from unlearn.config import Part


class OptunaTrial(Protocol):
    """What of a trial of Optuna is used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Domain(Part):
    """The values of one key: exactly one of the first six. when: values of other keys with which this one is set at
    all."""

    loguniform: tuple[float, float] | None = Field(default=None, description="numbers, even in their logarithm")
    uniform: tuple[float, float] | None = Field(default=None, description="numbers")
    randint: tuple[int, int] | None = Field(default=None, description="whole numbers, both ends among them")
    choice: list[Any] | None = Field(default=None, min_length=1, description="any of these values")
    grid: list[Any] | None = Field(default=None, min_length=1, description="the same, for search_by: grid")
    same_as: str | None = Field(default=None, description="another searched key whose value it takes")
    times: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="with same_as: multiplied by this")
    when: dict[str, Any] = Field(default_factory=dict, description="key: value, or a list of values")

    @model_validator(mode="after")
    def _one_kind(self):
        kinds = ("loguniform", "uniform", "randint", "choice", "grid", "same_as")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds)}")
        low, high = self.ends if self.ends else (0, 1)
        if not (math.isfinite(low) and math.isfinite(high) and low < high) or (self.loguniform and low <= 0):
            raise ValueError(
                f"{given[0]} [{low:g}, {high:g}]: give low < high" + (", both above 0" if self.loguniform else "")
            )
        if self.times is not None and self.same_as is None:
            raise ValueError("times is for same_as")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """(low, high) of a range, else None."""
        return self.loguniform or self.uniform or self.randint

    @property
    def values(self) -> list[Any] | None:
        """The values of a choice, else None."""
        return self.choice if self.choice is not None else self.grid

    def draw(self, rng: random.Random) -> Any:
        if self.values is not None:
            return copy.deepcopy(rng.choice(self.values))
        assert self.ends, "a tied key is not drawn"
        low, high = self.ends
        if self.randint:
            return rng.randint(int(low), int(high))
        return math.exp(rng.uniform(math.log(low), math.log(high))) if self.loguniform else rng.uniform(low, high)

    def told(self, value: Any) -> Any:
        """The value as Optuna knows it: of a choice that is not of plain values alone, its JSON."""
        plain = self.values is None or all(isinstance(each, str | int | float | bool | None) for each in self.values)
        return value if plain else json.dumps(value)

    def suggest(self, key: str, trial: OptunaTrial) -> Any:
        """A value that Optuna proposes."""
        if self.values is not None:
            names = [self.told(value) for value in self.values]
            return copy.deepcopy(self.values[names.index(trial.suggest_categorical(key, names))])
        assert self.ends, "a tied key is not proposed"
        if self.randint:
            return trial.suggest_int(key, *self.randint)
        return trial.suggest_float(key, *self.ends, log=self.loguniform is not None)


def ordered(search: dict[str, Domain]) -> list[str]:
    """The keys, each behind those that its condition names. Raises ValueError for a circle."""
    order, left = [], list(search)
    while left:
        ready = [key for key in left if not any(other in left for other in search[key].when if other != key)]
        if not ready:
            raise ValueError(f"search: the conditions of {', '.join(left)} name each other in a circle")
        order += ready
        left = [key for key in left if key not in ready]
    return order


def times(value: Any, factor: float | None) -> Any:
    if factor is None:
        return copy.deepcopy(value)
    product = value * factor
    return int(product) if isinstance(value, int) and float(product).is_integer() else product
