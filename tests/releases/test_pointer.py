"""The pointer: one release is current, what is withdrawn never is, and what was forgotten is not brought back
unseen."""

import json
import threading

import pytest
from support.releases import finished, weights_of

from unlearn.errors import ReleaseError
from unlearn.releases import lineage, pointer, publish
from unlearn.releases.store import Store


def put(store: Store, signer, *requests: str, base: str = "0" * 64, **about) -> str:
    """Publish a run that nobody has published before; its version."""
    number = len(store.releases()) + 1
    run = finished(f"{store.storage.uri}-run-{number}", number, base=base)
    return publish.publish(run, store, signer, requests, **about).release.version


def test_promote_and_roll_back(store, signer):
    assert pointer.read(store) == pointer.State()
    for requests in ((), ("a",), ("a",)):
        pointer.promote(store, put(store, signer, *requests), by="ada")
    document = json.loads(store.storage.read("current.json"))
    assert document["version"] == "v3" and document["folder"] == store.release("v3").folder
    assert document["weights"] == store.release("v3").weights and store.release("v3").parent.version == "v2"
    assert pointer.rollback(store, reason="worse").version == "v2"
    with pytest.raises(ReleaseError, match=r"v1 remembers what v2, v3 has forgotten: 1 request\(s\)"):
        pointer.rollback(store)
    with pytest.raises(ReleaseError, match="--force wants its reason"):
        pointer.rollback(store, force=True)
    state = pointer.rollback(store, reason="v2 does not load", force=True, by="bob")
    last = state.history[-1]
    assert state.version == "v1" and (last.action, last.before, last.after) == ("rollback", "v2", "v1")
    assert (last.forced, last.remembered, last.reason, last.by) == (True, 1, "v2 does not load", "bob")
    with pytest.raises(ReleaseError, match="no earlier release"):
        pointer.rollback(store)
    with pytest.raises(ReleaseError, match="v1 is current: there is nothing to go back to"):
        pointer.rollback(store, "v1")
    assert pointer.promote(store, "v3").version == "v3" and pointer.promote(store, "v3").history[-1].before == "v1"
    assert [move.after for move in pointer.read(store).history] == ["v1", "v2", "v3", "v2", "v1", "v3"]


def test_what_was_withdrawn_is_never_current(store, signer):
    for requests in ((), (), ()):
        pointer.promote(store, put(store, signer, *requests))
    with pytest.raises(ReleaseError, match="v3 is current: promote another"):
        pointer.withdraw(store, "v3", "bad")
    with pytest.raises(ReleaseError, match="wants its reason"):
        pointer.withdraw(store, "v2", " ")
    pointer.withdraw(store, "v2", "wrong shards")
    with pytest.raises(ReleaseError, match="v2 was withdrawn, and cannot be current: wrong shards"):
        pointer.promote(store, "v2", "please", force=True)
    with pytest.raises(ReleaseError, match="withdrawn already"):
        pointer.withdraw(store, "v2", "again")
    assert pointer.rollback(store).version == "v1", "v2 is passed over"
    assert pointer.withdraw(store, "v1", "gone", force=True)[0].version is None
    assert pointer.read(store).folder is None
    with pytest.raises(ReleaseError, match="never current"):
        pointer.rollback(store, "v4")
    with pytest.raises(ReleaseError, match="has no release v9"):
        pointer.promote(store, "v9")
    with pytest.raises(ReleaseError, match="3: a version is written v1"):
        pointer.promote(store, "3")


def test_a_release_that_replaces_others_withdraws_them_when_it_is_current(store, signer):
    pointer.promote(store, put(store, signer))
    put(store, signer, "a", withdraws=["v1"])
    assert pointer.read(store).withdrawn == {}
    state = pointer.promote(store, "v2")
    assert state.withdrawn["v1"].by_release == "v2" and state.withdrawn["v1"].reason == "replaced by v2"
    with pytest.raises(ReleaseError, match="this model is v1, which was withdrawn"):
        publish.publish(f"{store.storage.uri}-run-1", store, signer)
    with pytest.raises(ReleaseError, match="v1 was withdrawn: name another"):
        put(store, signer, parent="v1")


def test_a_withdrawn_release_that_was_never_current_has_promised_nothing(store, signer):
    pointer.promote(store, put(store, signer, "a"))
    put(store, signer, "a", "b")
    third = put(store, signer, "a", "c")
    with pytest.raises(ReleaseError, match="v3 remembers what v2 has forgotten"):
        pointer.promote(store, third)
    pointer.withdraw(store, "v2", "request b was withdrawn")
    assert pointer.promote(store, third).version == "v3"


def test_what_was_current_once_has_promised_though_it_is_withdrawn(store, signer):
    for requests in ((), ("a",)):
        pointer.promote(store, put(store, signer, *requests))
    pointer.withdraw(store, "v2", "bad", force=True)
    with pytest.raises(ReleaseError, match="v1 remembers what v2 has forgotten"):
        pointer.rollback(store)


def test_a_model_says_what_came_from_it(store, signer, tmp_path):
    pointer.promote(store, put(store, signer))
    put(store, signer, base=weights_of(f"{store.storage.uri}-run-1"), parent="v1")
    put(store, signer, base=weights_of(f"{store.storage.uri}-run-2"), parent="v1")
    put(store, signer, parent="v3")
    assert store.release("v2").base.version == "v1"
    told = [(each.version, each.how, each.of) for each in lineage.descendants(store.release("v1"), store.releases())]
    assert told == [("v2", "made from", "v1"), ("v3", "made from", "v2"), ("v4", "follows", "v3")]
    assert [each.version for each in pointer.withdraw(store, "v2", "bad")[1]] == ["v3", "v4"]
    assert lineage.descendants(store.release("v4"), store.releases()) == []


def test_changes_at_once_lose_none(place, signer):
    store = Store(f"{place}/store")
    versions = [put(store, signer) for _ in range(3)]
    start = threading.Barrier(3)

    def one(version: str) -> None:
        start.wait()
        pointer.promote(Store(store.storage.uri), version)

    threads = [threading.Thread(target=one, args=[version]) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    history = pointer.read(store).history
    assert sorted(move.after for move in history) == versions
    assert [move.before for move in history] == [None, *(move.after for move in history[:-1])]


def test_a_release_that_lacks_a_file_is_not_promoted(store, signer):
    release = store.release(put(store, signer))
    store.folder(release).delete("model/weights.safetensors")
    with pytest.raises(ReleaseError, match="lacks model/weights.safetensors"):
        pointer.promote(store, "v1")
    assert pointer.read(store).version is None


@pytest.mark.parametrize("name", ["model/weights.safetensors", "release.json", "certificate.json"])
def test_a_release_that_was_changed_is_not_current_again(store, signer, name):
    for _ in range(2):
        pointer.promote(store, put(store, signer))
    folder = store.folder(store.release("v1"))
    folder.write(name, folder.read(name) + b"\n")
    for move in (
        lambda: pointer.rollback(store, "v1", "v2 is bad", force=True),
        lambda: pointer.promote(store, "v1", "v2 is bad", force=True),
    ):
        with pytest.raises(ReleaseError, match=f"is not v1 as it was published: {name} changed since"):
            move()
    assert pointer.read(store).version == "v2"


def test_exchanged_certificates_are_told(store, signer):
    put(store, signer), put(store, signer)
    store.storage.write("certificates/v1.json", store.storage.read("certificates/v2.json"))
    with pytest.raises(ReleaseError, match="v1.json speaks of v2 in v2-.*: certificates were exchanged"):
        store.releases()


def test_a_damaged_pointer_is_told(store):
    store.storage.write("current.json", b'{"version": 3}')
    with pytest.raises(ReleaseError, match="current.json is damaged"):
        pointer.read(store)
