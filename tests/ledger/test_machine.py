"""Any order of calls: the ledger says what a plain dictionary says, and verifies against every checkpoint."""

import shutil
import tempfile
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from securesystemslib.signer import CryptoSigner

from unlearn.errors import LedgerError
from unlearn.ledger import states, verification
from unlearn.ledger.ledger import Ledger

numbers = st.integers(1, 6)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.file, self.place = self.folder / "ledger.sqlite", str(self.folder / "place")
        self.signer = CryptoSigner(Ed25519PrivateKey.generate())
        self.ledger = Ledger(str(self.file), create=True)
        self.states: dict[int, str] = {}
        self.erased: set[int] = set()
        self.backup: tuple | None = None
        self.next = 1

    @initialize(count=st.integers(2, 3))
    def begin(self, count):
        self.add(count)

    @rule(count=st.integers(1, 3))
    def add(self, count):
        given = self.ledger.add([{"forget": {"subjects": [f"s{i}"]}} for i in range(count)])
        assert given == list(range(self.next, self.next + count))
        self.states |= dict.fromkeys(given, states.RECEIVED)
        self.next += count

    @rule(picks=st.lists(numbers, min_size=1, max_size=2, unique=True), state=st.sampled_from(states.STATES))
    def advance(self, picks, state):
        ids = sorted({self.pick(number) for number in picks})

        def allowed(number: int) -> bool:
            before = self.states.get(number)
            return before is not None and (state in states.NEXT[before] or before == state)

        try:
            self.ledger.advance(ids, state)
        except LedgerError:
            assert not all(allowed(number) for number in ids)
            return
        assert all(allowed(number) for number in ids)
        self.states |= dict.fromkeys(ids, state)

    @rule(number=numbers)
    def erase(self, number):
        number = self.pick(number)
        try:
            self.ledger.erase([number], "0d", images_gone=True)
        except LedgerError:
            assert self.states.get(number) not in states.CLOSED
            return
        self.erased.add(number)

    @rule()
    def checkpoint(self):
        verification.checkpoint(self.ledger, self.place, self.signer)

    @rule()
    def back_up(self):
        self.ledger.database.close()
        shutil.copy(self.file, self.folder / "backup")
        self.backup = dict(self.states), set(self.erased), self.next

    @precondition(lambda self: self.backup)
    @rule()
    def restore(self):
        self.checkpoint()
        self.ledger.database.close()
        shutil.copy(self.folder / "backup", self.file)
        self.states, self.erased = dict(self.backup[0]), set(self.backup[1])
        if verification.verify(self.ledger, self.place, self.signer.public_key).wrong:
            verification.reseal(self.ledger, self.place, self.signer, "restored")
        else:
            self.next = self.backup[2]
        self.backup = None

    @invariant()
    def it_says_what_was_done(self):
        requests = {request.id: request for request in self.ledger.requests()}
        assert {number: request.state for number, request in requests.items()} == self.states
        assert {number for number, request in requests.items() if request.forget is None} == self.erased
        assert verification.verify(self.ledger, self.place, self.signer.public_key).wrong == []

    def pick(self, number: int) -> int:
        """Mostly a request that there is."""
        return sorted(self.states)[number % len(self.states)] if self.states and number < 6 else number

    def teardown(self):
        self.ledger.database.close()
        shutil.rmtree(self.folder)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=8, stateful_step_count=15, deadline=None, derandomize=True)
