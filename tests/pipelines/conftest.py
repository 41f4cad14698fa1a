"""A cycle's file for the small data set and the small model."""

from dataclasses import dataclass

import pytest
from support.cycles import tiny_cycle, written

from unlearn.cycles.cycle import Cycle


@dataclass(frozen=True)
class Given:
    cycle: Cycle
    source: str


@pytest.fixture
def given(tmp_path, tiny_shards, tiny_model):
    """given(**changes of the cycle) -> the cycle, and the path of its file."""

    def make(**changes) -> Given:
        cycle = tiny_cycle(tmp_path, tiny_shards, tiny_model, **changes)
        return Given(cycle, written(cycle))

    return make
