"""Environment variables of this process, set for a while."""

import contextlib
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables for the length of a block; None: not set."""
    before = {name: os.environ.get(name) for name in values}

    def become(wanted: Mapping[str, str | None]) -> None:
        for name, value in wanted.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    become(values)
    try:
        yield
    finally:
        become(before)
