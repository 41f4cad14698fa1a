"""Signed checkpoints of a ledger in a folder or on S3, away from its database.

    checkpoint-SIZE-ROOT.json         a DSSE envelope: {"ledger", "size", "root", "requests", "at", "base", "first"}
    leaves-FIRST-SIZE-ROOT.bin        the hashes of leaves FIRST to SIZE - 1, 32 bytes each; those before are of `base`

The root says whether the ledger still holds what it held; the leaves say which entry does not. They hold no personal
data.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key

from unlearn import certificate, documents
from unlearn.data.storage import Storage
from unlearn.errors import StorageError
from unlearn.ledger import entry
from unlearn.ledger.tree import WIDTH, Tree
from unlearn.ledger.walk import Walk

TYPE = "application/vnd.unlearn.ledger-checkpoint+json"


@dataclass(frozen=True)
class Checkpoint:
    """What a ledger held once. size: entries; root: hex; requests: the highest number; base: the name of the checkpoint
    that has the leaves before `first`, "" where that is 0."""

    ledger: str
    size: int
    root: str
    requests: int
    at: str
    base: str
    first: int

    @property
    def name(self) -> str:
        return f"checkpoint-{self.size:012d}-{self.root[:16]}.json"

    @property
    def leaves_name(self) -> str:
        return f"leaves-{self.first:012d}-{self.size:012d}-{self.root[:16]}.bin"

    @property
    def key(self) -> tuple[int, str]:
        return self.size, self.root

    def __str__(self) -> str:
        return f"the checkpoint of {self.at} ({self.size} entries)"


class Checkpoints:
    """Those below a URI whose signature is good, the smallest first; `wrong` names the others.

    Raises StorageError where the place is out of reach.
    """

    def __init__(self, uri: str, key: Key):
        self.storage, self.wrong = Storage(uri), []
        read = [self._read(name, key) for name in self.storage.files() if name.startswith("checkpoint-")]
        self.all = sorted(filter(None, read), key=lambda checkpoint: checkpoint.key)
        self._by_name = {checkpoint.name: checkpoint for checkpoint in self.all}
        for checkpoint in self.all:
            if checkpoint.base and checkpoint.base not in self._by_name:
                self.wrong.append(f"{checkpoint.base}: removed, {checkpoint.name} was written after it")

    def leaves(self, checkpoint: Checkpoint) -> bytes | None:
        """The hashes of its leaves, 32 bytes each; None where they are not there or are not those of its root."""
        parts, current = [], checkpoint
        while current is not None:
            try:
                part = self.storage.read(current.leaves_name)
            except StorageError:
                return None
            end = current.size if current is checkpoint else parts[-1][0]
            parts.append((current.first, part[: (end - current.first) * WIDTH]))
            current = self._by_name.get(current.base) if current.first else None
        whole = b"".join(part for _, part in reversed(parts))
        return whole if Tree(whole).root() == checkpoint.root else None

    def write(self, walk: Walk, base: Checkpoint | None, signer: CryptoSigner) -> Checkpoint:
        """A checkpoint of the whole ledger; the leaves first, since a checkpoint without them names nothing."""
        size, root = walk.tree.size, walk.tree.root()
        first, before = (base.size, base.name) if base else (0, "")
        checkpoint = Checkpoint(walk.ledger, size, root, walk.last, entry.now(), before, first)
        envelope = Envelope(entry.canonical(asdict(checkpoint)).encode(), TYPE, {})
        envelope.sign(signer)
        self.storage.create(checkpoint.leaves_name, bytes(walk.tree.leaves[first * WIDTH :]))
        self.storage.create(checkpoint.name, json.dumps(envelope.to_dict()).encode())
        return checkpoint

    def _read(self, name: str, key: Key) -> Checkpoint | None:
        data = self.storage.read(name)
        try:
            envelope = Envelope.from_dict(documents.from_json(data))
            envelope.verify([key], 1)
        except VerificationError:
            self.wrong.append(f"{name}: not signed with this key, or changed since")
            return None
        except certificate.DAMAGE:
            self.wrong.append(f"{name}: damaged, it cannot be read")
            return None
        if envelope.payload_type != TYPE:
            self.wrong.append(f"{name}: signed, but no checkpoint of a ledger")
            return None
        try:
            checkpoint = Checkpoint(**json.loads(envelope.payload))
        except TypeError:
            self.wrong.append(f"{name}: written by another version of unlearn")
            return None
        if checkpoint.name != name:
            self.wrong.append(f"{name}: holds {checkpoint.name}")
        return checkpoint


def common(ours: bytes | bytearray, theirs: bytes) -> int:
    """How many leaves at the start are the same."""
    low, high = 0, min(len(ours), len(theirs)) // WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ours[: middle * WIDTH] == theirs[: middle * WIDTH] else (low, middle - 1)
    return low


def differing(ours: bytes | bytearray, theirs: bytes) -> Sequence[int]:
    """Positions that both have, with other leaves."""
    size = min(len(ours), len(theirs)) // WIDTH
    return [p for p in range(size) if ours[p * WIDTH : (p + 1) * WIDTH] != theirs[p * WIDTH : (p + 1) * WIDTH]]
