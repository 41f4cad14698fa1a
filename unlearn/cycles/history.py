"""What cycles have done, as one value each, from their records."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from unlearn import documents
from unlearn.cycles.records import NEW, OLD, Judgement, Outcome, Records, Selection

SETS = ("forget", NEW, OLD, "retain")


@dataclass(frozen=True)
class Told:
    """One cycle. tried: the verdicts, in order; ends: given up, perhaps more than once, and at last released; figures:
    cosine and PSNR of the newest rung that was judged, by set and generator, under the main view: {set: {generator:
    {name: value}}}."""

    selection: Selection
    tried: list[Judgement]
    ends: list[Outcome]
    figures: dict[str, dict[str, dict[str, float]]]

    @property
    def ended(self) -> str:
        """In words."""
        if not self.ends:
            return "not ended"
        last = self.ends[-1]
        return "retraining is due" if last.due else f"{last.release}, {'' if last.promoted else 'not '}made current"

    def document(self) -> dict[str, Any]:
        """As plain values, for programs."""
        return {
            **self.selection.model_dump(), "ended": self.ended, "ends": [end.model_dump() for end in self.ends],
            "verdicts": [judgement.model_dump(mode="json") for judgement in self.tried], "figures": self.figures,
        }  # fmt: skip


def of(records: Records) -> list[Told]:
    """All cycles, the first one first. One that was selected and superseded before anything came of it is left out."""
    every = [one(records, selection) for selection in records.all()]
    return [told for told in every if told.tried or told.ends or told is every[-1]]


def one(records: Records, selection: Selection) -> Told:
    """One cycle."""
    tried, ends = records.judgements(selection.id), records.outcomes(selection.id)
    return Told(selection, tried, ends, _figures(records, selection.id, tried))


def _figures(records: Records, id: str, tried: Iterable[Judgement]) -> dict[str, dict[str, dict[str, float]]]:
    for judgement in reversed(list(tried)):
        found = records.storage.read_version(f"{id}/runs/{judgement.run}/metrics.json")
        if found is None:  # the run folder was deleted
            continue
        document = documents.from_json(found[0])
        figures: dict[str, dict[str, dict[str, float]]] = {}
        for row in document["rows"]:
            if row["view"] == document["views"][0] and row["set"] in SETS:
                own = figures.setdefault(row["set"], {})
                own[row["generator"]] = {name: row[name] for name in ("cosine", "psnr") if row.get(name) is not None}
        return figures
    return {}
