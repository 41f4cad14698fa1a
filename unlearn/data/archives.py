"""Files of a folder, a tar, a zip, or below s3://, by name: the files to pack, without those that are not data.

Left out are hidden files and folders, and temporary files of Spark, macOS and file servers. Symbolic links to folders
are followed, links inside a tar are resolved. Absolute names in an archive lose their leading slashes. A tar inside a
tar or a folder is read as a folder of its name, as ImageNet is published; below s3:// each is fetched once to list it,
and its members are then read where they are.
"""

import contextlib
import lzma
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from unlearn.data import sources, tars
from unlearn.data.sources import Source, Wanted, is_dirt, leads_out
from unlearn.data.storage import Storage, download, local_copy, told
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
    objects = storage.objects()

    def read(name: str) -> bytes:
        if name not in inner:
            return storage.read(name)
        tar, (start, size) = inner[name]
        return storage.open(tar, facts=objects[tar]).read_at(size, start)

    @contextlib.contextmanager
    def copy(name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield download(storage, {name: objects[name]}, Path(folder)) / name

    listing = Source(read=read)
    inner = _take(listing, {n: facts.size for n, facts in objects.items()}, wanted, nested, copy, storage.where)
    yield listing


@contextlib.contextmanager
def _folder(path: Path, wanted: Wanted, nested: bool | None) -> Iterator[Source]:
    def read(name: str) -> bytes:
        if name in inner:
            tar, place = inner[name]
            with tars.told_as_tar(path / tar), open(path / tar, "rb") as file:
                return tars.piece(file, place, name)
        with told(f"{path}/{name}"):
            return (path / name).read_bytes()

    def size(name: str) -> int:
        with told(f"{path}/{name}"):
            return os.path.getsize(path / name)

    listing, sizes = Source(read=read), {name: size(name) for name in _walk(path)}
    inner = _take(listing, sizes, wanted, nested, lambda n: contextlib.nullcontext(path / n), lambda n: f"{path}/{n}")
    yield listing


def _take(
    listing: Source, sizes: dict[str, int], wanted: Wanted, nested: bool | None,
    local: Callable[[str], contextlib.AbstractContextManager[Path]], where: Callable[[str], str],
) -> dict[str, tuple[str, tars.Place]]:  # fmt: skip
    """Take the files of a folder, and members of the tars in it: {name of a member: (tar, place in it)}. local: a path
    at which a tar can be read; where: its place, for messages."""
    inner: dict[str, tuple[str, tars.Place]] = {}
    archives = [n for n in sorted(sizes) if n.lower().endswith(".tar") and not is_dirt(n) and not leads_out(n)]
    for name in sorted(sizes.keys() - archives):
        listing.sort_in(name, wanted, sizes[name])
    if nested or (nested is None and not listing.names):
        for name in archives:
            with local(name) as path, tars.told_as_tar(where(name)), open(path, "rb") as file:
                for member, place in tars.inner(file, name, wanted, listing, (0, sizes[name])):
                    inner[member] = name, place
        listing.names, listing.in_tars = sorted({*listing.names, *inner}), bool(inner)
    else:
        listing.left_out[".tar"] += len(archives)
    return inner


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
        about = members[name]
        with _told_as_zip(path, name), archive.open(about) as member:
            step = PIECE if about.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else SMALL_PIECE
            pieces = list(iter(lambda: member.read(step), b""))
            if sum(map(len, pieces)) != about.file_size:
                raise EOFError(f"not the {about.file_size} bytes of the index")
            return b"".join(pieces)

    with _told_as_zip(path):
        archive = zipfile.ZipFile(path)
    with archive:
        listing, packed = Source(read=read), path.stat().st_size
        members = {member.filename.lstrip("/"): member for member in archive.infolist()}
        for name, member in members.items():
            if not name.endswith("/"):
                listing.sort_in(name, wanted, member.file_size)
        if sum(members[name].file_size for name in listing.names) > sources.unpacked(packed):
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
