"""What tests of the data share."""

import pytest

from unlearn.data.storage import Storage


@pytest.fixture
def copied(place, tiny_shards) -> Storage:
    """The small data set at a place of the test's own."""
    storage = Storage(place)
    for name in Storage(tiny_shards).files():
        storage.write(name, Storage(tiny_shards).read(name))
    return storage
