"""Workers of pieces: which mistakes the driver tells apart."""

import pickle
from types import SimpleNamespace

import pytest

from jobs import pool
from unlearn.errors import ConfigError, MissingExtra, StorageError, UnlearnError


@pytest.mark.parametrize(
    "met, kind", [(MissingExtra("a", "b", "c"), MissingExtra), (StorageError("x"), StorageError),
                  (ConfigError("x"), UnlearnError)]
)  # fmt: skip
def test_a_mistake_comes_back_from_a_worker_as_what_it_is(met, kind, monkeypatch):
    def task():
        def call(piece):
            raise met

        return call

    monkeypatch.setattr(pool.logs, "start_worker", lambda *_, **__: None)
    monkeypatch.setattr(pool.signals, "show_stacks", lambda: None)
    monkeypatch.setitem(pool.sys.modules, "ray", SimpleNamespace(get=lambda x: x))
    good, told = pickle.loads(pickle.dumps(pool._Actor(task, "INFO", 0).run([()], [()], None)))
    assert not good and type(told) is kind and str(told) == str(met)
