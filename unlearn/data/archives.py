"""Files of a folder, a tar, a zip, or below s3://, by name: the files to pack, without those that are not data.

Left out are hidden files and folders, and temporary files of Spark, macOS and file servers. Symbolic links to folders
are followed, links inside a tar are resolved. A tar inside a tar or a folder is read as a folder of its name, as
ImageNet is published.
"""

import contextlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from unlearn.data import sources, tars
from unlearn.data.sources import Source, Wanted, is_dirt
from unlearn.data.storage import Storage, local_copy, told
from unlearn.errors import DataError

# Bytes asked of a zip at once: inflating stops there, while other methods unpack whole what they were given.
PIECE, SMALL_PIECE = 1 << 20, 1 << 12


def source(src: str, wanted: Wanted, nested: bool | None = None) -> contextlib.AbstractContextManager[Source]:
    """The files of `src` for which wanted(name). nested: read tars inside a folder; None: only if there is nothing
    else.

    Raises DataError, StorageError.
    """
    if src.startswith("s3://"):
        return _remote(src, wanted, nested)
    path = Path(src.removeprefix("file://"))
    if not path.exists():
        raise DataError(f"{src}: no such folder, tar or zip file")
    if path.is_dir():
        return _folder(path, wanted, nested)
    return _zip(path, wanted) if zipfile.is_zipfile(path) and not tars.is_tar(path) else tars.source(path, wanted)


@contextlib.contextmanager
def _remote(src: str, wanted: Wanted, nested: bool | None) -> Iterator[Source]:
    storage = Storage(src)
    if storage.is_file():
        with local_copy(src) as path, source(str(path), wanted, nested) as listing:
            yield listing
        return
    listing = Source(read=storage.read)
    for name, facts in sorted(storage.objects().items()):
        listing.sort_in(name, wanted, facts.size)
    yield listing


@contextlib.contextmanager
def _folder(path: Path, wanted: Wanted, nested: bool | None) -> Iterator[Source]:
    inner: dict[str, tuple[Path, tars.Place]] = {}

    def read(name: str) -> bytes:
        if name in inner:
            file, place = inner[name]
            with open(file, "rb") as opened, tars.told_as_tar(file):
                return tars.piece(opened, place, name)
        with told(f"{path}/{name}"):
            return (path / name).read_bytes()

    listing = Source(read=read)
    archives = []
    for name in sorted(_walk(path)):
        if name.lower().endswith(".tar") and not is_dirt(name):
            archives.append(name)
        else:
            with told(f"{path}/{name}"):
                size = os.path.getsize(path / name)
            listing.sort_in(name, wanted, size)
    if nested or (nested is None and not listing.names):
        for name in archives:
            with tars.told_as_tar(path / name), open(path / name, "rb") as file:
                whole = 0, os.path.getsize(path / name)
                for member, place in tars.inner(file, name, wanted, listing, whole):
                    inner[member] = path / name, place
        listing.names = sorted({*listing.names, *inner})
    else:
        listing.left_out[".tar"] += len(archives)
    yield listing


def _walk(root: Path) -> Iterator[str]:
    """Names of all files below a folder; links to folders are followed, except those that form a cycle."""
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [name for name in below if not real.startswith(os.path.join(os.path.realpath(os.path.join(folder,
                            name)), ""))
                    and os.path.realpath(os.path.join(folder, name)) != real]  # fmt: skip
        for name in files:
            if os.path.isfile(path := os.path.join(folder, name)):
                yield Path(path).relative_to(root).as_posix()


@contextlib.contextmanager
def _zip(path: Path, wanted: Wanted) -> Iterator[Source]:
    def read(name: str) -> bytes:
        with _told_as_zip(path, name), archive.open(name) as member:
            about = archive.getinfo(name)
            step = PIECE if about.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else SMALL_PIECE
            pieces = list(iter(lambda: member.read(step), b""))
            if sum(map(len, pieces)) != about.file_size:
                raise EOFError(f"not the {about.file_size} bytes of the index")
            return b"".join(pieces)

    with _told_as_zip(path):
        archive = zipfile.ZipFile(path)
    with archive:
        listing, packed = Source(read=read), path.stat().st_size
        for name, size in {member.filename: member.file_size for member in archive.infolist()}.items():
            if not name.endswith("/"):
                listing.sort_in(name, wanted, size)
        if sum(archive.getinfo(name).file_size for name in listing.names) > sources.unpacked(packed):
            raise DataError(f"{path}: {sources.bomb(packed)}")
        listing.names.sort()
        yield listing


@contextlib.contextmanager
def _told_as_zip(path: Path, name: str = "") -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        OSError,
        RuntimeError,
        ValueError,
        EOFError,
        MemoryError,
        zlib.error,
        lzma.LZMAError,
    ) as e:
        what = f"{name[:200]}: cannot be unpacked" if name else "not a zip file, or cut short"
        raise DataError(f"{path}: {what} ({f'{e}'[:200]})") from None
