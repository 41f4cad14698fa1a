"""Three processes publish, promote, roll back and withdraw at once, and are killed at random points, again and again.

UNLEARN_KILLS=150 python -m pytest -m slow -s tests/releases/test_kills.py      150 kills on disk, and 150 on S3
"""

import os
import random
import signal
import time

import pytest
from support.releases import finished

from unlearn.data import s3_client
from unlearn.errors import ReleaseError
from unlearn.releases import files, pointer, publish, verification
from unlearn.releases.store import Store

KILLS = int(os.environ.get("UNLEARN_KILLS", "60"))


def work(store: Store, runs: list[str], signer, seed: float) -> None:
    """Without an end; whatever else than a refusal happens ends the process with 3."""
    s3_client.client.cache_clear()
    draw = random.Random(seed)
    acts = (
        lambda known: publish.publish(draw.choice(runs), store, signer, draw.sample("abc", draw.randint(0, 3))),
        lambda known: pointer.promote(store, draw.choice(known), "x", draw.random() < 0.5),
        lambda known: pointer.rollback(store),
        lambda known: pointer.withdraw(store, draw.choice(known), "x", draw.random() < 0.5),
    )
    try:
        while True:
            (act,) = draw.choices(acts, (5, 3, 1, 1))
            try:
                act([release.version for release in store.releases()] or ["v1"])
            except ReleaseError:
                pass
    except BaseException as e:
        print(type(e).__name__, e)
        os._exit(3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_the_store_is_consistent(place, signer, public):
    store, draw, killed = Store(f"{place}/store"), random.Random(0), 0
    runs = [finished(f"{place}/run-{number}", number) for number in range(8)]
    while killed < KILLS:
        processes = []
        for _ in range(3):
            seed = draw.random()
            if (process := os.fork()) == 0:
                work(store, runs, signer, seed)
            processes.append(process)
        time.sleep(draw.uniform(0.3, 3))
        for process in processes:
            time.sleep(draw.uniform(0, 0.1))
            os.kill(process, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "it met what is no refusal"
            killed += 1
        known, state = store.releases(), pointer.read(store)
        assert [release.version for release in known] == [f"v{number}" for number in range(1, len(known) + 1)]
        assert state.version not in state.withdrawn
        assert [move.before for move in state.history] == [None, *(move.after for move in state.history)][
            : len(state.history)
        ]
    for release in known:
        store.complete(release)
        verification.verify(store.folder(release).uri, public)
    folders = {name.partition("/")[0] for name in files.listing(store.storage)}
    print(f"{killed} kills, {len(known)} releases, {len(state.history)} moves of the pointer")
    # Of the next version alone there may be files of publishers that were killed.
    left = {name for name in folders if name.startswith("v")} - {release.folder for release in known}
    assert known and all(name.startswith(f"v{len(known) + 1}-") for name in left)
