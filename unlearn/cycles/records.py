"""What a cycle leaves in its folder, `cycle_dir/ID/`: each file is written once, and what is there is never changed.

    selection.json        which requests it serves, from which base, on which data
    runs/KEY/             the run folder of a rung, as any run's
    measured/KEY.json     which metrics.json of it is of this cycle; audited/KEY.json: which audit.json
    verdicts/KEY.json     what the gate said of which evidence, beside which parent
    outcome.json          the release that came of it
    given-up/KEY.json     no rung passed the gate: retraining is due
    rows.json             where shards without the served rows are, and which objects can be deleted
    events/*.json         the same as OpenLineage tells it

Requests are named by number and commitment. What they name is in the config.yaml of the runs alone.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from unlearn import documents
from unlearn.data.storage import Storage
from unlearn.errors import CycleError
from unlearn.releases.gate import Verdict

SELECTION, OUTCOME, ROWS = "selection.json", "outcome.json", "rows.json"
NEW, OLD = "forget_new", "forget_old"  # what is measured of a forget set: requests of this cycle, and of those before
RUNS, MEASURED, AUDITED, VERDICTS, GIVEN_UP = "runs", "measured", "audited", "verdicts", "given-up"


class Record(BaseModel):
    # A later version of this program may add a field; one that is there keeps its meaning.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Asked(Record):
    """A request by its number. images: how many images it meets; missing: how many of the values that it names no image
    has."""

    number: int
    commitment: str
    images: int
    missing: int = 0


class Selection(Record):
    """What one cycle serves. status: "selected"; "nothing" where no open request meets an image; "due" where these very
    requests were given up under these very settings: retraining is due, and nothing is tried again.

    id: of the cycle, of what is asked, the base and the data; empty with "nothing". new: the requests that are served
    now; old: those that were before, which are forgotten again; unseen: those of them that need not be, as the base was
    trained without their images. unmatched: numbers of open requests that meet no image; they stay open. base: sha256
    of the weights; data: hash of the manifest.
    """

    status: Literal["selected", "nothing", "due"]
    id: str = ""
    at: str = ""
    new: list[Asked] = []
    old: list[Asked] = []
    unseen: list[Asked] = []
    unmatched: list[int] = []
    base: str = ""
    data: str = ""

    @property
    def numbers(self) -> list[int]:
        """Of the requests that are served now."""
        return [asked.number for asked in self.new]


class Measured(Record):
    """sha256 of the metrics.json, or the audit.json, that was measured for a cycle."""

    sha256: str


class Judgement(Record):
    """What the gate said; verdict: None without a gate. run: the key of the run folder; parent: the release that it
    compared with; metrics, weights: sha256. requests: commitments to what the model serves, as its release lists
    them."""

    rung: int
    run: str
    verdict: Verdict | None
    parent: str | None
    metrics: str
    weights: str
    requests: list[str]
    at: str

    @property
    def passed(self) -> bool:
        return self.verdict is None or self.verdict.passed


class Rows(Record):
    """Shards without the served rows. before, after: hashes of the manifests; uri: where the new ones are; delete: the
    objects that hold the rows, or ids and checksums of theirs, which are not deleted by this program."""

    uri: str
    before: str
    after: str
    removed: int
    delete: list[str]


class Outcome(Record):
    """How a cycle ended. release: None where no rung passed. rung: the one that was released; numbers: of the requests
    that are served."""

    id: str
    at: str
    release: str | None
    folder: str | None = None
    weights: str | None = None
    rung: int | None = None
    run: str | None = None
    promoted: bool = False
    numbers: list[int] = []
    rows: Rows | None = None

    @property
    def due(self) -> bool:
        """Whether retraining is due."""
        return self.release is None


R = TypeVar("R", bound=Record)


class Records:
    """The folders of the cycles of one CYCLE.yaml."""

    def __init__(self, cycle_dir: str):
        self.storage = Storage(cycle_dir)

    def read(self, id: str, name: str, kind: type[R]) -> R | None:
        """A record, or None where it is not there. Raises CycleError where it is damaged."""
        found = self.storage.read_version(f"{id}/{name}")
        if found is None:
            return None
        try:
            return kind.model_validate(documents.from_json(found[0]))
        except (ValueError, ValidationError):
            raise CycleError(f"{self.storage.where(f'{id}/{name}')} is damaged: restore it from a backup") from None

    def keep(self, id: str, name: str, record: R) -> R:
        """Write a record if it is not there; what is there then."""
        data = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False).encode() + b"\n"
        if self.storage.create(f"{id}/{name}", data):
            return record
        return self.read(id, name, type(record)) or record

    def selection(self, id: str) -> Selection:
        """Raises CycleError where there is no such cycle."""
        if found := self.read(id, SELECTION, Selection):
            return found
        raise CycleError(f"{self.storage.uri} has no cycle {id}: `unlearn cycle show` names those there are")

    def all(self) -> Iterator[Selection]:
        """The cycles, the first one first."""
        ids = [name.partition("/")[0] for name in self.storage.files() if name.endswith(f"/{SELECTION}")]
        yield from sorted(map(self.selection, ids), key=lambda selection: selection.at)

    def run_folder(self, id: str, key: str) -> str:
        return self.storage.where(f"{id}/{RUNS}/{key}")

    def outcomes(self, id: str) -> list[Outcome]:
        """Every end that a cycle has had: given up, perhaps more than once under other settings, and at last
        released."""
        names = [n.removeprefix(f"{id}/") for n in self.storage.files(id) if n.startswith(f"{id}/{GIVEN_UP}/")]
        ends = [self.read(id, name, Outcome) for name in [*names, OUTCOME]]
        return sorted((end for end in ends if end), key=lambda end: end.at)

    def judgements(self, id: str) -> list[Judgement]:
        """What the gate said of its rungs, in order."""
        names = [n.removeprefix(f"{id}/") for n in self.storage.files(id) if n.startswith(f"{id}/{VERDICTS}/")]
        found = [self.read(id, name, Judgement) for name in names]
        return sorted((one for one in found if one), key=lambda one: one.at)


def now() -> str:
    """UTC to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
