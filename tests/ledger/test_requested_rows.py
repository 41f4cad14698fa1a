"""Requests are looked up in the shards: what they match, what they miss, and what a run is told to forget."""

import numpy as np
import pytest

from unlearn.data import selection, shards
from unlearn.ledger.ledger import Ledger
from unlearn.ledger.selection import resolve


@pytest.fixture
def asked(sqlite):
    """asked({"subjects": [...]}, ...) -> the requests."""

    def ask(*named: dict):
        with Ledger(str(sqlite), create=True) as ledger:
            return ledger.requests(ids=ledger.add([{"forget": one} for one in named]))

    return ask


def rows(manifest, **conditions) -> np.ndarray:
    return selection.select(manifest, selection.config.Rows(**conditions), 0, "forget").rows


def test_requests_of_one_kind_keep_their_kind(asked, tiny_shards):
    manifest = shards.find(tiny_shards)
    subjects = manifest.table(["subject"])["subject"].to_pylist()
    chosen = resolve(asked({"subjects": [subjects[0]]}, {"subjects": ["nobody", subjects[-1]]}), manifest)
    assert chosen.forget is not None and chosen.forget.subjects == [subjects[0], subjects[-1]] and not chosen.forget.ids
    assert chosen.matched == {1: subjects.count(subjects[0]), 2: subjects.count(subjects[-1])}
    assert chosen.missing == {2: ["nobody"]} and chosen.erased == []
    by_class = resolve(asked({"classes": [manifest.classes[0]]}, {"classes": [1, "no such class"]}), manifest)
    assert by_class.forget is not None and by_class.forget.classes == [manifest.classes[0], 1]
    assert by_class.missing == {4: ["no such class"]}


def test_requests_of_several_kinds_are_images_by_id(asked, tiny_shards):
    manifest = shards.find(tiny_shards)
    ids, subjects = (manifest.table([role])[role].to_pylist() for role in ("id", "subject"))
    chosen = resolve(asked({"ids": [ids[40], "gone"]}, {"subjects": [subjects[3]]}, {"classes": [1]}), manifest)
    union = {40, *(i for i, name in enumerate(subjects) if name == subjects[3]), *rows(manifest, classes=[1]).tolist()}
    assert chosen.forget is not None and set(rows(manifest, ids=chosen.forget.ids).tolist()) == union
    assert chosen.matched[1] == 1 and chosen.missing == {1: ["gone"]}


def test_what_matches_nothing_is_told(asked, sqlite, tiny_shards):
    (request,) = asked({"subjects": ["nobody"]})
    chosen = resolve([request], shards.find(tiny_shards))
    assert chosen.forget is None and chosen.matched == {1: 0} and chosen.missing == {1: ["nobody"]}
    with Ledger(str(sqlite)) as ledger:
        ledger.advance(1, "withdrawn")
        ledger.erase([1], "0d")
        assert resolve(ledger.requests(), shards.find(tiny_shards)).erased == [1]
