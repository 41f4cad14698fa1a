"""Files of a folder, a tar, a zip, or below s3://, by name: the files to pack, without those that are not data.

Left out are hidden files and folders, and temporary files of Spark, macOS and file servers. Symbolic links to folders
are followed, links inside a tar are resolved. A tar inside a tar or a folder is read as a folder of its name, as
ImageNet is published.
"""

import bz2
import contextlib
import gzip
import lzma
import os
import posixpath
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from unlearn.data.storage import Storage, local_copy, told
from unlearn.errors import DataError

COMPRESSED = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"]\0\0": lzma.open,
}  # signature of a compressed tar -> function that opens it
DIRT = {"__MACOSX", "_temporary", "@eaDir", "lost+found", "$RECYCLE.BIN"}
LARGEST = 1 << 28  # bytes of one file: a small archive can unpack to any size
Wanted = Callable[[str], bool]
Place = tuple[int, int]  # offset and bytes in a file


@dataclass
class Source:
    """names: of the wanted files, sorted; of members with equal names the last is used. read: the content of a file.
    left_out: how many files are not taken, by their suffix."""

    names: list[str] = field(default_factory=list)
    read: Callable[[str], bytes] = lambda name: b""
    left_out: Counter = field(default_factory=Counter)


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
    return _zip(path, wanted) if zipfile.is_zipfile(path) and not tarfile.is_tarfile(path) else _tar(path, wanted)


def is_dirt(name: str) -> bool:
    """Whether a file is hidden or a system file, and not data, by the names in its path."""
    return any(part in DIRT or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


@contextlib.contextmanager
def _remote(src: str, wanted: Wanted, nested: bool | None) -> Iterator[Source]:
    storage = Storage(src)
    if storage.is_file():
        with local_copy(src) as path, source(str(path), wanted, nested) as listing:
            yield listing
        return
    listing = Source(read=storage.read)
    for name in storage.files():
        _sort_in(listing, name, wanted)
    yield listing


@contextlib.contextmanager
def _folder(path: Path, wanted: Wanted, nested: bool | None) -> Iterator[Source]:
    inner: dict[str, tuple[Path, Place]] = {}

    def read(name: str) -> bytes:
        if name in inner:
            file, place = inner[name]
            with open(file, "rb") as opened, _told_as_tar(file):
                return _piece(opened, place, name)
        with told(f"{path}/{name}"):
            return (path / name).read_bytes()

    listing = Source(read=read)
    tars = []
    for name in sorted(_walk(path)):
        if name.lower().endswith(".tar") and not is_dirt(name):
            tars.append(name)
        else:
            _sort_in(listing, name, wanted)
    if nested or (nested is None and not listing.names):
        for name in tars:
            with _told_as_tar(path / name), open(path / name, "rb") as file:
                for member, place in _inner(file, name, wanted, listing):
                    inner[member] = path / name, place
        listing.names = sorted([*listing.names, *inner])
    else:
        listing.left_out[".tar"] += len(tars)
    yield listing


def _walk(root: Path) -> Iterator[str]:
    """Names of all files below a folder; links to folders are followed, except those that form a cycle."""
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [name for name in below if not real.startswith(os.path.join(os.path.realpath(os.path.join(folder, name)), ""))
                    and os.path.realpath(os.path.join(folder, name)) != real]  # fmt: skip
        for name in files:
            if os.path.isfile(path := os.path.join(folder, name)):
                yield Path(path).relative_to(root).as_posix()


@contextlib.contextmanager
def _zip(path: Path, wanted: Wanted) -> Iterator[Source]:
    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (
            zipfile.BadZipFile,
            OSError,
            RuntimeError,
            NotImplementedError,
            zlib.error,
            lzma.LZMAError,
            EOFError,
        ) as e:
            raise DataError(f"{path}: {name}: cannot be unpacked ({e})") from None

    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as e:
        raise DataError(f"{path}: not a zip file, or cut short ({e})") from None
    with archive:
        listing = Source(read=read)
        for member in archive.infolist():
            if not member.is_dir():
                _sort_in(listing, member.filename, wanted, member.file_size)
        listing.names.sort()
        yield listing


@contextlib.contextmanager
def _tar(path: Path, wanted: Wanted) -> Iterator[Source]:
    """The members of a tar, read by their offset: tarfile would search all members for each name."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile())
        scan = _Scan(wanted)
        with _told_as_tar(path):
            if _is_plain(path):
                tar = stack.enter_context(tarfile.open(path, "r:"))
                file = stack.enter_context(open(path, "rb"))
                # Sparse members, which are rare, are read by tarfile.
                scan.run(tar, lambda m: m if m.issparse() else (m.offset_data, m.size), file)
            else:
                _unpack(path, scan, scan.wants, file)
                if missing := scan.targets():  # files wanted only through links
                    _unpack(path, scan, missing.__contains__, file)
        scan.resolve()

        def read(name: str) -> bytes:
            place = scan.places[name]
            with _told_as_tar(path):
                if not isinstance(place, tarfile.TarInfo):
                    return _piece(file, place, name)
                content = tar.extractfile(place)
                assert content is not None, "a regular file"
                return content.read()

        yield Source(sorted(scan.names), read, scan.left_out)


class _Scan:
    """The members of a tar: wanted files and their places, and links to them."""

    def __init__(self, wanted: Wanted):
        self.wanted = wanted
        self.names: list[str] = []
        self.places: dict[str, Place | tarfile.TarInfo] = {}
        self.others: dict[str, Place | tarfile.TarInfo | None] = {}  # possible link targets, by normalized name
        self.links: dict[str, str] = {}
        self.left_out: Counter = Counter()

    def wants(self, name: str) -> bool:
        return not is_dirt(name) and self.wanted(name)

    def run(
        self, tar: tarfile.TarFile, place: Callable[[tarfile.TarInfo], Place | tarfile.TarInfo | None], file: BinaryIO
    ) -> None:
        """Record every member. place: where its content is in `file`, or None where it is not there."""
        for member in _members(tar):
            name = member.name
            if member.issym() or member.islnk():
                base = posixpath.dirname(name) if member.issym() else ""
                self.links[name] = posixpath.normpath(posixpath.join(base, member.linkname))
            elif member.isfile() and name.lower().endswith(".tar") and (at := place(member)) and isinstance(at, tuple):
                inner = Source()
                for inner_name, inner_place in _inner(file, name, self.wanted, inner, at):
                    self._take(inner_name, inner_place)
                self.left_out += inner.left_out
            elif member.isfile():
                self.note(name, place(member), member.size)

    def note(self, name: str, place: Place | tarfile.TarInfo | None, size: int) -> None:
        if is_dirt(name):
            return
        if size > LARGEST:
            self.left_out["larger than 256 MiB"] += 1
            return
        self.others[posixpath.normpath(name)] = place
        if self.wanted(name):
            self._take(name, place)
        else:
            self.left_out[PurePosixPath(name).suffix.lower() or "no suffix"] += 1

    def _take(self, name: str, place) -> None:
        self.names.append(name)
        self.places[name] = place

    def _ends(self) -> Iterator[tuple[str, str]]:
        """(name, target file) of every link to a file, and of every file below a linked folder."""
        for link, target in self.links.items():
            if is_dirt(link):
                continue
            for _ in range(40):  # a link may lead to a link
                if target not in self.links:
                    break
                target = self.links[target]
            if target in self.others:
                yield link, target
            else:
                for name in [n for n in self.others if n.startswith(f"{target}/")]:
                    yield f"{link}{name[len(target) :]}", name

    def targets(self) -> set[str]:
        """Targets of wanted links whose content was not stored."""
        return {target for name, target in self._ends() if self.wanted(name) and self.others[target] is None}

    def resolve(self) -> None:
        """Add the targets of links, under the links' names."""
        followed = [(name, target) for name, target in self._ends()]
        for name, target in followed:
            if self.wanted(name):
                self._take(name, self.others[target])
        reached = {name for name, _ in followed}
        lost = [link for link in self.links if self.wanted(link) and not is_dirt(link) and link not in reached]
        self.left_out["links that lead nowhere"] += len(lost)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  it would keep every one of them
        yield member


def _inner(
    file: BinaryIO, name: str, wanted: Wanted, listing: Source, place: Place = (0, 0)
) -> Iterator[tuple[str, Place]]:
    """(name, place in `file`) of the wanted members of a plain tar that begins at a place of an open file."""
    before = file.tell()
    file.seek(place[0])
    folder = name[: -len(".tar")]
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in _members(tar):
            inner = f"{folder}/{member.name}"
            if member.isfile() and not is_dirt(inner):
                if wanted(inner) and not member.issparse() and member.size <= LARGEST:
                    yield inner, (member.offset_data, member.size)
                else:
                    listing.left_out[PurePosixPath(inner).suffix.lower() or "no suffix"] += 1
    file.seek(before)


def _unpack(path: Path, scan: _Scan, keep: Callable[[str], bool], file: BinaryIO) -> None:
    """Write members of a compressed tar to `file`: on the first call those that `scan` wants, then those selected by
    `keep` (link targets)."""
    first = not scan.places and not scan.others

    def write(member: tarfile.TarInfo) -> Place | None:
        inner = member.name.lower().endswith(".tar") and not is_dirt(member.name)
        if (
            member.size > LARGEST
            and not inner
            or not (keep(posixpath.normpath(member.name)) or keep(member.name) or (first and inner))
        ):
            return None
        content, place = tar.extractfile(member), file.seek(0, os.SEEK_END)
        assert content is not None, "a regular file"
        with told(tempfile.gettempdir()):
            for piece in iter(lambda: content.read(1 << 20), b""):
                file.write(piece)
            file.flush()
        return place, member.size

    decompressor = _decompressor(path)
    assert decompressor is not None, "a tar that is not plain"
    with decompressor(path) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            if first:
                scan.run(tar, write, file)
            else:
                for member in _members(tar):
                    if member.isfile() and (place := write(member)):
                        scan.others[posixpath.normpath(member.name)] = place
        while stream.read(1 << 20):  # read to the end, so that the checksum there is verified
            pass


def _sort_in(listing: Source, name: str, wanted: Wanted, size: int = 0) -> None:
    if is_dirt(name):
        return
    if size > LARGEST:
        listing.left_out["larger than 256 MiB"] += 1
    elif wanted(name):
        listing.names.append(name)
    else:
        listing.left_out[PurePosixPath(name).suffix.lower() or "no suffix"] += 1


def _piece(file: BinaryIO, place: Place, name: str) -> bytes:
    if len(data := os.pread(file.fileno(), place[1], place[0])) != place[1]:
        raise EOFError(f"{name} is not there whole")
    return data


def _is_plain(path: Path) -> bool:
    try:
        tarfile.open(path, "r:").close()
        return True
    except tarfile.ReadError:
        if _decompressor(path) is None:
            raise
        return False


def _decompressor(path: Path) -> Callable | None:
    with open(path, "rb") as file:
        start = file.read(6)
    return next((open_ for magic, open_ in COMPRESSED.items() if start.startswith(magic)), None)


@contextlib.contextmanager
def _told_as_tar(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as e:
        raise DataError(f"{path}: not a tar file, or cut short ({e})") from None
