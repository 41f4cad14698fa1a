"""A compressed tar, unpacked once for all processes of a machine."""

import hashlib
import json
import tempfile
from pathlib import Path

from unlearn.data import tars
from unlearn.data.node_cache import private, shared
from unlearn.data.storage import Storage, told

_CHUNK = 1 << 20  # bytes


def plain(path: Path) -> Path:
    """A path at which the same tar can be read without unpacking: below TMPDIR, as long as this process or another one
    that asked for it runs. Anything but a compressed tar stays where it is.

    Raises DataError where it is damaged, or unpacks to far more than it is; StorageError where there is no room.
    """
    if not path.is_file() or not tars.is_tar(path) or tars.is_plain(path):
        return path
    facts = Storage(path).facts()
    key = hashlib.sha256(json.dumps([str(path.resolve()), facts.size, facts.etag]).encode()).hexdigest()[:32]
    folder = shared(private("unpacked") / key, lambda empty: _unpack(path, empty / path.name))
    return folder / path.name


def _unpack(path: Path, to: Path) -> None:
    with tars.told_as_tar(path), tars.unpacking(path) as stream, open(to, "wb") as file:
        for chunk in iter(lambda: stream.read(_CHUNK), b""):
            with told(tempfile.gettempdir()):
                file.write(chunk)
