"""The values of many rows piece by piece, so that choosing among millions of them takes little memory."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unlearn.data import row_values
from unlearn.data.manifest import Manifest
from unlearn.errors import DataError


class RowBatches:
    """Pieces of the columns of a manifest's rows. The file of all values is opened and compared once."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._file: pq.ParquetFile | None = None
        self._checked: set[int] = set()  # shards that have the size that the manifest says

    def read(self, columns: list[str], groups: Iterable[int], listed: int = 0) -> Iterator[pa.Table]:
        """These columns, and the row's number in a column `row`, of these row groups, which ascend; rows of other row
        groups may be among them. The last piece may be the only one, and empty.

        listed: values in a list in which each piece is looked up. Each look-up goes through the whole list, so pieces
        have at least a quarter as many rows. Raises DataError where a shard or the file of values does not match the
        manifest, StorageError.
        """
        together: list[pa.Table] = []
        for table in self._pieces(columns, groups):
            together.append(table)
            if sum(map(len, together)) >= listed // 4:
                yield pa.concat_tables(together, promote_options="permissive")
                together = []
        if together:
            yield pa.concat_tables(together, promote_options="permissive")

    def _pieces(self, columns: list[str], groups: Iterable[int]) -> Iterator[pa.Table]:
        manifest, wanted = self.manifest, np.fromiter(groups, np.int64)
        if manifest.values and columns and set(columns) <= set(manifest.columns) and len(wanted) > 1:
            yield from self._of_values(columns, wanted)
            return
        if not len(wanted):
            yield manifest.table(columns, [])
        # From the shards: whole row groups, as many rows together as the file of values has.
        ends = np.cumsum(np.diff(manifest.starts)[wanted]) // row_values.GROUP
        for part in np.split(wanted, np.flatnonzero(np.diff(ends)) + 1):
            if len(part):
                yield manifest.table(columns, part.tolist())

    def _of_values(self, columns: list[str], wanted: np.ndarray) -> Iterator[pa.Table]:
        manifest = self.manifest
        shards = set(manifest.shards_of(wanted)) - self._checked
        manifest.check_shards(shards)
        self._checked |= shards
        if self._file is None:
            self._file = row_values.opened(manifest.uri, manifest.split, manifest.values)
            if self._file.metadata.num_rows != manifest.rows:
                raise DataError(
                    f"{manifest.uri}: its file of values is of another manifest; run `unlearn shards index "
                    f"{manifest.given}`"
                )
        first, starts, ends = 0, manifest.starts[wanted], manifest.starts[wanted + 1]
        for g in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(g).num_rows
            if ((starts < first + count) & (ends > first)).any():
                table = row_values.piece(self._file, g, columns, manifest.uri)
                yield table.append_column("row", pa.array(np.arange(first, first + count)))
                del table
                pa.default_memory_pool().release_unused()  # else the pool grows by a piece each time
            first += count
