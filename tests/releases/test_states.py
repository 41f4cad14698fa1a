"""Publish, promote, roll back and withdraw in any order: what must hold does hold, and nothing is refused that need not
be."""

import shutil
import tempfile

import hypothesis.strategies as st
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.releases import finished

from unlearn import certificate
from unlearn.errors import ReleaseError
from unlearn.releases import pointer, publish, verification
from unlearn.releases.store import Store


class Releases(RuleBasedStateMachine):
    """The store beside a model of it: what each version serves, what is current, what once was, what is withdrawn."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        _, self.public = certificate.generate(f"{self.folder}/key")
        self.signer = certificate.private_key(f"{self.folder}/key.key")
        self.store = Store(f"{self.folder}/store")
        self.serves: dict[str, set[str]] = {}
        self.current: str | None = None
        self.served: list[str] = []
        self.withdrawn: set[str] = set()

    def forgotten_by_others(self, version: str) -> set[str]:
        others = (v for v in self.serves if v in self.served or v not in self.withdrawn)
        return set().union(*(self.serves[v] for v in others)) - self.serves[version]

    def moved(self, act, version: str, forced: bool) -> None:
        """A move to a version, which must succeed exactly where the model says so."""
        allowed = version not in self.withdrawn and (forced or not self.forgotten_by_others(version))
        lost = len(self.forgotten_by_others(version))
        try:
            state = act("why" if forced else "", forced)
        except ReleaseError:
            assert version != self.current and not allowed
            return
        assert allowed or version == self.current
        if version != self.current:
            assert state.history[-1].remembered == lost and state.history[-1].forced is bool(lost)
        self.current = version
        self.served.append(version)

    @precondition(lambda self: len(self.serves) < 6)
    @rule(requests=st.sets(st.sampled_from("abc")))
    def publish(self, requests):
        run = finished(f"{self.folder}/run-{len(self.serves)}", len(self.serves))
        release = publish.publish(run, self.store, self.signer, sorted(requests)).release
        assert (
            release.version == f"v{len(self.serves) + 1}"
            and (release.parent and release.parent.version) == self.current
        )
        self.serves[release.version] = requests

    @precondition(lambda self: self.serves)
    @rule(data=st.data(), forced=st.booleans())
    def promote(self, data, forced):
        version = data.draw(st.sampled_from(sorted(self.serves)))
        self.moved(lambda reason, force: pointer.promote(self.store, version, reason, force), version, forced)

    @precondition(lambda self: set(self.served) - {self.current})
    @rule(data=st.data(), forced=st.booleans())
    def rollback(self, data, forced):
        version = data.draw(st.sampled_from(sorted(set(self.served) - {self.current})))
        self.moved(lambda reason, force: pointer.rollback(self.store, version, reason, force), version, forced)

    @precondition(lambda self: self.serves)
    @rule(data=st.data(), forced=st.booleans())
    def withdraw(self, data, forced):
        version = data.draw(st.sampled_from(sorted(self.serves)))
        try:
            pointer.withdraw(self.store, version, "bad", forced)
        except ReleaseError:
            assert version in self.withdrawn or (version == self.current and not forced)
            return
        assert version not in self.withdrawn and (version != self.current or forced)
        self.withdrawn.add(version)
        self.current = None if version == self.current else self.current

    @invariant()
    def the_pointer_is_what_the_model_says(self):
        state = pointer.read(self.store)
        assert (
            state.version == self.current
            and set(state.withdrawn) == self.withdrawn
            and state.version not in self.withdrawn
        )
        assert state.served == set(self.served)
        assert [move.before for move in state.history] == [None, *(move.after for move in state.history)][
            : len(state.history)
        ]

    def teardown(self):
        assert [release.version for release in self.store.releases()] == list(self.serves)
        for release in self.store.releases():
            verification.verify(self.store.folder(release).uri, self.public)
        shutil.rmtree(self.folder)


TestReleases = Releases.TestCase
# A failure is not made smaller: every step writes files.
TestReleases.settings = settings(
    phases=[Phase.generate], max_examples=6, stateful_step_count=14, deadline=None, derandomize=True
)
