"""A cycle's file for the small data set and the small model."""

import logging
from dataclasses import dataclass

import pytest
from support.cycles import tiny_cycle, written

from unlearn import log
from unlearn.cycles.cycle import Cycle


@dataclass(frozen=True)
class Given:
    cycle: Cycle
    source: str


@pytest.fixture(autouse=True)
def log_as_before():
    """A step sends the log of its process to an output that is closed behind the test."""
    loggers = [logging.getLogger(name) for name in log.LOGGERS]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def given(tmp_path, tiny_shards, tiny_model):
    """given(**changes of the cycle) -> the cycle, and the path of its file."""

    def make(**changes) -> Given:
        cycle = tiny_cycle(tmp_path, tiny_shards, tiny_model, **changes)
        return Given(cycle, written(cycle))

    return make
