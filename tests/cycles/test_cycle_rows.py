"""Shards are written anew without the rows that were served, and a base that may remember what is gone is refused."""

import pytest
from support.cycles import ask, standing, written

from jobs import cycle as job
from unlearn import certificate, config
from unlearn.data import shards
from unlearn.errors import CycleError
from unlearn.ledger.ledger import Ledger
from unlearn.models import weights
from unlearn.releases import verification
from unlearn.releases.store import Store


@pytest.fixture(scope="module")
def rewritten(made, tmp_path_factory):
    """(cycle, what it came to): two subjects' images are left out of new shards."""
    cycle = made(delete_rows=str(tmp_path_factory.mktemp("kept")))
    ask(cycle, {"subjects": ["person-1"]}, {"subjects": ["person-2"]})
    return cycle, job.run(cycle)


def on(cycle, data: str, base: str | None = None):
    """The same cycle on other data, from another base."""
    run = cycle.run | {"data": cycle.run["data"] | {"train": data}}
    return cycle.model_copy(update={"run": run | ({"model": {"weights": base}} if base else {})})


def test_the_certificate_names_the_manifests_before_and_after(rewritten):
    cycle, ended = rewritten
    rows, before = ended.outcome.rows, shards.load(cycle.run["data"]["train"])
    after = shards.load(rows.uri)
    release = verification.verify(ended.outcome.folder, certificate.public_key(cycle.key.replace(".key", ".pub")))
    assert (release.rewritten.before, release.rewritten.after) == (before.hash, after.hash) == (rows.before, rows.after)
    assert set(release.data.values()) == {before.hash} and any(after.hash[:16] in claim for claim in release.claimed)
    assert after.rows == before.rows - rows.removed == 48 - 20
    assert not {"person-1", "person-2"} & set(after.table(["subject"])["subject"].to_pylist())
    beside = [f"{before.uri}/manifest.{kind}" for kind in ("images", "rows")]
    assert rows.delete == [*(f"{before.uri}/shard-{n}.parquet" for n in range(3)), *beside]
    assert shards.load(before.uri).table(["id"]).num_rows == 48, "nothing is deleted"


def test_a_base_that_may_remember_what_is_gone_is_refused(rewritten):
    cycle, ended = rewritten
    moved = on(cycle, ended.outcome.rows.uri)
    (late,) = ask(cycle, {"subjects": ["person-3"]})
    with pytest.raises(CycleError, match=r"request\(s\) 1, 2 were served, and images of theirs are not in .* any more"):
        job.select(moved)
    assert standing(cycle)[late] == "received"


def test_a_base_that_was_trained_on_what_is_left_has_never_seen_them(rewritten, tmp_path):
    cycle, ended = rewritten
    kept = ended.outcome.rows.uri
    if set(standing(cycle).values()) == {"released"}:
        ask(cycle, {"subjects": ["person-3"]})
    for trained_on, refused in (
        ({"retain": shards.load(kept).hash, "weights": "0" * 64}, True),
        ({"retain": shards.load(kept).hash}, False),
    ):
        base = str(tmp_path / str(refused))
        weights.write(weights.build(config.Model(weights=cycle.base)), base, {"data": trained_on})
        moved = on(cycle, kept, base).model_copy(update={"delete_rows": None})
        if refused:  # it started from weights of which nothing is known
            with pytest.raises(CycleError, match="may remember them"):
                job.select(moved)
            continue
        ended = job.run(moved)
    assert [a.number for a in ended.selection.unseen] == [1, 2] and [a.number for a in ended.selection.new] == [3]
    one, two = (Store(cycle.releases).release(version) for version in ("v1", "v2"))
    assert set(one.requests) < set(two.requests), "they are still served"


def test_an_erased_request_is_served_only_where_its_images_are_said_to_be_gone(made, tmp_path, monkeypatch, told):
    """The base was trained on what is there, the image of the erased request among it: it must not count as unseen."""
    cycle = made()
    ask(cycle, {"ids": ["img-003"]})
    job.run(cycle)
    base = str(tmp_path / "base")
    trained_on = {"retain": shards.load(cycle.run["data"]["train"]).hash}
    weights.write(weights.build(config.Model(weights=cycle.base)), base, {"data": trained_on})
    cycle = on(cycle, cycle.run["data"]["train"], base)
    ask(cycle, {"subjects": ["person-1"]})
    begun = job.select(cycle)
    with Ledger(cycle.ledger) as ledger:
        ledger.erase([1], "0d", images_gone=True)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "gone", lambda self: set())  # as if it had been erased before anybody was asked
        with pytest.raises(CycleError, match=r"request\(s\) 1 were served and then erased: nobody knows which images"):
            job.select(cycle)
    assert standing(cycle) == {1: "released", 2: "received"}, "the cycle that was to serve it again is given back"
    selection = job.select(cycle)
    assert selection.id != begun.id and [asked.number for asked in selection.unseen] == [1]
    assert "unseen   1: none of their images is in the data" in told("cycle", "show", written(cycle), selection.id)[1]
