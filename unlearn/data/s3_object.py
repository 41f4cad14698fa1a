"""One S3 object for random access, as readers of Parquet need it: ranges are read as they are asked for.

Every range is of the same version: where the object is replaced meanwhile, the next one is refused.
"""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

# Bytes of one request; more are read by several at a time.
PIECE, THREADS = 8 << 20, 8


class Object(io.RawIOBase):
    """size: bytes. fetch(start, stop) -> those bytes; it is called in several threads. end: its last bytes, where they
    are known."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes], end: bytes = b""):
        self.size, self._fetch, self._end, self._at = size, fetch, end, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes | bytearray:  # pyright: ignore[reportIncompatibleMethodOverride]
        start = self._at
        stop = self.size if size is None or size < 0 else min(self.size, start + size)
        self._at = max(start, stop)
        if (first := start - self.size + len(self._end)) >= 0:
            return self._end[first : first + stop - start] if stop > start else b""
        if stop - start <= PIECE:
            return self._fetch(start, stop) if stop > start else b""
        data = bytearray(stop - start)

        def piece(first: int) -> None:
            last = min(stop, first + PIECE)
            data[first - start : last - start] = self._fetch(first, last)

        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(piece, range(start, stop, PIECE)):
                pass
        return data
