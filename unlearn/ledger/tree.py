"""The Merkle tree (RFC 9162) over the entries of a ledger."""

from pymerkle import BaseMerkleTree

WIDTH = 32  # bytes of a hash


class Tree(BaseMerkleTree):
    """A tree over the hashes of its leaves, which it keeps in memory: 32 bytes an entry."""

    def __init__(self, leaves: bytes = b""):
        super().__init__()
        self.leaves = bytearray(leaves)

    @property
    def size(self) -> int:
        """How many leaves it has."""
        return len(self.leaves) // WIDTH

    def root(self, size: int | None = None) -> str:
        """Hex of the root of the first `size` leaves, of all by default."""
        return self.get_root(size).hex()

    def leaf(self, position: int) -> bytes:
        return bytes(self.leaves[position * WIDTH : (position + 1) * WIDTH])

    def _encode_entry(self, data: str) -> bytes:
        return data.encode()

    def _store_leaf(self, data: str, digest: bytes) -> int:
        self.leaves += digest
        return self.size

    def _get_leaf(self, index: int) -> bytes:
        return self.leaf(index - 1)

    def _get_leaves(self, offset: int, width: int) -> list[bytes]:
        return [self.leaf(position) for position in range(offset, offset + width)]

    def _get_size(self) -> int:
        return self.size

    def _get_subroot_uncached(self, offset: int, width: int) -> bytes:
        """From the roots of both halves, which are kept, so that the roots of many sizes share their work."""
        if width <= self.threshold:
            return super()._get_subroot_uncached(offset, width)
        half = width // 2
        return self.hash_pair(self._get_subroot(offset, half), self._get_subroot(offset + half, half))
