"""Parquet files, opened for reading. A footer is fetched and parsed once in a process: in a file of thousands of row
groups it takes longer than a row group."""

import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.data.facts import Facts
from unlearn.data.recent import Recent
from unlearn.data.storage import Storage
from unlearn.errors import DataError

FOOTERS = 64 << 20  # bytes of memory for the footers that are kept
LFS = b"version https://git-lfs"  # how a pointer begins
END = 64 << 10  # bytes that Arrow reads for a footer before it knows how long that is
PARSED = 11  # bytes of memory for one of a footer as it is stored
_footers = Recent(FOOTERS)


def parquet(storage: Storage, name: str, sha256: str = "", versions: dict[str, str] | None = None) -> pq.ParquetFile:
    """Open a shard. sha256: of the file that is expected, which tells its footer from that of another file of this
    name; versions: as `Storage.open` takes them. Raises DataError where it is not Parquet, StorageError."""
    where = storage.where(name)

    def read() -> tuple[tuple[Facts, pq.FileMetaData], int]:
        facts, file = storage.open_from_end(name, END, versions)
        metadata = opened(file, where).metadata
        return (facts, metadata), metadata.serialized_size * PARSED

    facts, metadata = _footers.get((where, sha256), read)
    if storage.is_local() and storage.facts(name) != facts:  # on S3 each read is of these facts, or refused
        forget(storage, name, sha256)
        facts, metadata = _footers.get((where, sha256), read)
    return opened(storage.open(name, versions, facts), where, metadata, pre_buffer=not storage.is_local())


def forget(storage: Storage, name: str, sha256: str) -> None:
    """Read the footer of a shard anew when it is opened the next time."""
    _footers.drop((storage.where(name), sha256))


def opened(
    file: pa.NativeFile, where: str, metadata: pq.FileMetaData | None = None, pre_buffer: bool = False
) -> pq.ParquetFile:
    """metadata: its footer, where that has been read already."""
    try:
        return pq.ParquetFile(file, metadata=metadata, pre_buffer=pre_buffer)
    except (pa.ArrowException, OSError) as e:
        file.seek(0)
        if file.read(len(LFS)) == LFS:
            raise DataError(
                f"{where} is a pointer of git-lfs, not the file itself: fetch that with `git lfs pull`"
            ) from None
        raise DataError(f"{where}: truncated, or not Parquet ({short(e)}); restore the shard") from None


def extent(file: pq.ParquetFile, g: int) -> tuple[int, int, int]:
    """(rows, offset, bytes) of a row group, from the file's footer."""
    meta = file.metadata.row_group(g)
    chunks = [meta.column(c) for c in range(meta.num_columns)]
    # Without a dictionary page its offset is None, or 0 from some writers.
    offset = min(c.dictionary_page_offset or c.data_page_offset for c in chunks)
    return meta.num_rows, offset, sum(c.total_compressed_size for c in chunks)


def short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
