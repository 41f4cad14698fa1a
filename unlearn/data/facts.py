"""What a storage tells of a file without reading it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """Size in bytes, and an ETag, which changes with the content (of a local file: with its time and place)."""

    size: int
    etag: str
