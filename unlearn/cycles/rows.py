"""Training data without the rows that a cycle serves, where that is wanted."""

from collections.abc import Callable

from unlearn.config import RunConfig
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import ROWS, Records, Rows
from unlearn.data import removal, selection
from unlearn.data.storage import Storage


def write(cycle: Cycle, records: Records, id: str, settings: RunConfig, check: Callable[[], None]) -> Rows | None:
    """Write the shards anew without the forget set of a run and its duplicates, once; None where cycle.delete_rows is
    not given."""
    if cycle.delete_rows is None:
        return None
    if done := records.read(id, ROWS, Rows):
        return done
    forgotten = selection.sets(settings.data, settings.seed)["forget"]
    gone, manifest = removal.with_duplicates(forgotten), forgotten.manifest
    made = removal.without(manifest, gone, Storage(cycle.delete_rows).where(id), check)
    delete = [f"{manifest.uri}/{name}" for name in removal.touched(manifest, gone)]
    return records.keep(
        id, ROWS, Rows(uri=made.uri, before=manifest.hash, after=made.hash, removed=len(gone), delete=delete)
    )
