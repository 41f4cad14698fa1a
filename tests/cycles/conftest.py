"""What the tests of cycles share."""

import pytest
from support.cycles import tiny_cycle

from unlearn.cycles.cycle import Cycle


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_shards, tiny_model):
    """made(**changes) -> a cycle of its own, with an empty ledger and no release."""
    return lambda **changes: tiny_cycle(tmp_path_factory.mktemp("cycle"), tiny_shards, tiny_model, **changes)


@pytest.fixture
def cycle(made) -> Cycle:
    return made()
