"""The files of a tar, compressed or not, and of tars inside it.

Sizes are checked before anything is read, since few bytes can stand for many: headers, members with holes, compression.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import posixpath
import tarfile
import tempfile
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from unlearn.data import sources
from unlearn.data.sources import LARGEST, OUTSIDE, Source, Wanted, is_dirt, leads_out
from unlearn.data.storage import told
from unlearn.errors import DataError

COMPRESSED = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"]\0\0": lzma.open,
}  # signature of a compressed tar -> function that opens it
HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
HEADER = 1 << 20  # bytes of one of these, which tarfile keeps in memory
Place = tuple[int, int]  # offset and bytes in a file


class Refused(tarfile.TarError):
    """A tar that would take too much memory, or is of a kind that is not read."""


class _Member(tarfile.TarInfo):
    """A member whose header is checked before it is followed."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # where tarfile lets subclasses step in
        if self.type in HEADERS and self.size > HEADER:
            raise Refused(f"has a header of {self.size:,} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(self.name)
        return super()._proc_member(tar)  # pyright: ignore[reportAttributeAccessIssue]

    def _proc_gnusparse_10(self, member: tarfile.TarInfo, *_) -> None:
        raise _sparse(member.name)


class _Limited:
    """A stream that unpacks a file, up to the bytes that it may unpack to."""

    def __init__(self, stream: BinaryIO, packed: int):
        self.stream, self.packed, self.left = stream, packed, sources.unpacked(packed)

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise Refused(sources.bomb(self.packed))
        return data


class _Part(io.RawIOBase):
    """A part of an open file, as a file of its own; the position in the open file stays."""

    def __init__(self, file: BinaryIO, place: Place):
        self.file, (self.start, self.size), self.at = file, place, 0

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, into: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        count = max(0, min(len(into), self.size - self.at))
        data = os.pread(self.file.fileno(), count, self.start + self.at)
        into[: len(data)] = data
        self.at += len(data)
        return len(data)


@contextlib.contextmanager
def source(path: Path, wanted: Wanted) -> Iterator[Source]:
    """The members of a tar, read by their offset: tarfile would search all members for each name."""
    with contextlib.ExitStack() as stack:
        scan = _Scan(path, wanted)
        with told_as_tar(path):
            if is_plain(path):
                file = stack.enter_context(open(path, "rb"))
                tar = stack.enter_context(_open(fileobj=file, mode="r:"))
                scan.run(tar, lambda m: (m.offset_data, m.size), file)
            else:
                file = stack.enter_context(tempfile.TemporaryFile())
                _unpack(path, scan, scan.wants, file)
                if missing := scan.targets():  # files wanted only through links
                    _unpack(path, scan, missing.__contains__, file)
        scan.resolve()

        def read(name: str) -> bytes:
            with told_as_tar(path):
                return piece(file, scan.places[name], name)

        yield Source(sorted(scan.places), read, scan.left_out)


def is_tar(path: Path) -> bool:
    """Whether a file begins as a tar does, compressed or not. Raises DataError where it cannot be read."""
    with told_as_tar(path):
        try:
            _open(name=path, mode="r:*").close()
        except tarfile.ReadError:
            return False
        return True


class _Scan:
    """The members of a tar: wanted files and their places, and links to them."""

    def __init__(self, path: Path, wanted: Wanted):
        self.path, self.wanted = path, wanted
        self.places: dict[str, Place] = {}
        self.others: dict[str, Place | None] = {}  # possible link targets, by normalized name
        self.links: dict[str, str] = {}
        self.left_out: Counter = Counter()

    def wants(self, name: str) -> bool:
        return not is_dirt(name) and self.wanted(name)

    def run(self, tar: tarfile.TarFile, place: Callable[[tarfile.TarInfo], Place | None], file: BinaryIO) -> None:
        """Record every member. place: where its content is in `file`, or None where it is not there."""
        for member in _members(tar):
            name = member.name
            if leads_out(name):
                self.left_out[OUTSIDE] += not member.isdir()
            elif member.issym() or member.islnk():
                base = posixpath.dirname(name) if member.issym() else ""
                self.links[name] = posixpath.normpath(posixpath.join(base, member.linkname)).lstrip("/")
            elif member.isfile() and name.lower().endswith(".tar") and not is_dirt(name) and (at := place(member)):
                listing = Source()
                with told_as_tar(self.path / name):
                    for inner_name, inner_place in inner(file, name, self.wanted, listing, at):
                        self.places[inner_name] = inner_place
                self.left_out += listing.left_out
            elif member.isfile():
                self.note(name, place(member), member.size)

    def note(self, name: str, place: Place | None, size: int) -> None:
        if is_dirt(name):
            return
        if size > LARGEST:
            self.left_out["larger than 256 MiB"] += 1
            return
        self.links.pop(name, None)
        self.others[posixpath.normpath(name)] = place
        if self.wanted(name):
            assert place is not None, "what is wanted is kept"
            self.places[name] = place
        else:
            self.left_out[PurePosixPath(name).suffix.lower() or "no suffix"] += 1

    def _ends(self) -> Iterator[tuple[str, str]]:
        """(name, target file) of every link to a file, and of every file below a linked folder."""
        files = sorted(self.others)
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
                first, stop = (bisect_left(files, f"{target}{mark}") for mark in "/0")  # 0 is next to /
                for name in files[first:stop]:
                    yield f"{link}{name[len(target) :]}", name

    def targets(self) -> set[str]:
        """Targets of wanted links whose content was not stored."""
        return {target for name, target in self._ends() if self.wanted(name) and self.others[target] is None}

    def resolve(self) -> None:
        """Add the targets of links, under the links' names."""
        followed = [(name, target) for name, target in self._ends()]
        for name, target in followed:
            if self.wanted(name) and (place := self.others[target]):
                self.places[name] = place
        reached = {name for name, _ in followed}
        lost = [link for link in self.links if self.wanted(link) and not is_dirt(link) and link not in reached]
        self.left_out["links that lead nowhere"] += len(lost)


def _open(**options) -> tarfile.TarFile:
    return tarfile.open(tarinfo=_Member, **options)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  it would keep every one of them
        if member.size < 0:  # tarfile would go back, and round and round
            raise Refused(f"{member.name[:200]} has a negative size")
        if member.issparse():
            raise _sparse(member.name)
        member.name = member.name.lstrip("/")  # as tar takes them
        yield member
    # tarfile takes half a header for the end of the archive.
    if isinstance(file := tar.fileobj, io.IOBase):
        file.seek(tar.offset)  # pyright: ignore[reportAttributeAccessIssue]
        if 0 < len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:  # pyright: ignore[reportAttributeAccessIssue]
            raise Refused("not whole: it is cut short within the header of a file; fetch it again")


def _sparse(name: str) -> Refused:
    return Refused(f"{name[:200]} is stored with holes (sparse), which is not read: pack it again without --sparse")


def inner(file: BinaryIO, name: str, wanted: Wanted, listing: Source, place: Place) -> Iterator[tuple[str, Place]]:
    """(name, place in `file`) of the wanted members of a plain tar at a place of an open file."""
    folder = name[: -len(".tar")]
    with _open(fileobj=_Part(file, place), mode="r:") as tar:
        for member in _members(tar):
            path = f"{folder}/{member.name}"
            if member.isfile() and not is_dirt(path):
                if leads_out(member.name):
                    listing.left_out[OUTSIDE] += 1
                elif wanted(path) and member.size <= LARGEST:
                    yield path, (place[0] + member.offset_data, member.size)
                else:
                    listing.left_out[PurePosixPath(path).suffix.lower() or "no suffix"] += 1


def _unpack(path: Path, scan: _Scan, keep: Callable[[str], bool], file: BinaryIO) -> None:
    """Write members of a compressed tar to `file`: on the first call those that `scan` wants, then those selected by
    `keep` (link targets)."""
    first = not scan.places and not scan.others

    def write(member: tarfile.TarInfo) -> Place | None:
        nested = member.name.lower().endswith(".tar") and not is_dirt(member.name)
        if (
            member.size > LARGEST
            and not nested
            or not (keep(posixpath.normpath(member.name)) or keep(member.name) or (first and nested))
        ):
            return None
        content, place = tar.extractfile(member), file.seek(0, os.SEEK_END)
        assert content is not None, "a regular file"
        with told(tempfile.gettempdir()):
            for piece in iter(lambda: content.read(1 << 20), b""):
                file.write(piece)
            file.flush()
        return place, member.size

    with unpacking(path) as stream, _open(fileobj=stream, mode="r|") as tar:
        if first:
            scan.run(tar, write, file)
        else:
            for member in _members(tar):
                if member.isfile() and (place := write(member)):
                    scan.others[posixpath.normpath(member.name)] = place


@contextlib.contextmanager
def unpacking(path: Path) -> Iterator[_Limited]:
    """The stream of a compressed tar; it is read to the end, so that the checksum there is verified."""
    decompressor = _decompressor(path)
    assert decompressor is not None, "a tar that is not plain"
    with decompressor(path) as unpacked:
        stream = _Limited(unpacked, path.stat().st_size)
        yield stream
        while stream.read(1 << 20):
            pass


def piece(file: BinaryIO, place: Place, name: str) -> bytes:
    if len(data := os.pread(file.fileno(), place[1], place[0])) != place[1]:
        raise EOFError(f"{name} is not there whole")
    return data


def is_plain(path: Path) -> bool:
    try:
        _open(name=path, mode="r:").close()
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
def told_as_tar(path: Path | str) -> Iterator[None]:
    try:
        yield
    except Refused as e:
        raise DataError(f"{path}: {e}") from None
    except (
        tarfile.TarError,
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
        zlib.error,
        lzma.LZMAError,
    ) as e:
        raise DataError(f"{path}: not a tar file, or cut short ({f'{e}'[:200]})") from None
