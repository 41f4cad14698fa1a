"""The named shapes of all families and the parameters of their parts, read from catalogue.json without importing torch.

`python -m unlearn.models.catalogue` writes catalogue.json again, after a variant was added or changed.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from unlearn.registry import MODELS

FILE = Path(__file__).with_name("catalogue.json")


@dataclass(frozen=True)
class NamedShape:
    """image_size: pixels a side. encoder, decoder, first_stage: numbers of parameters, 0 where there is none."""

    family: str
    variant: str
    image_size: int
    encoder: int
    decoder: int
    first_stage: int


def shapes() -> list[NamedShape]:
    """The variants of every registered family; those of a family that catalogue.json lacks are counted."""
    recorded = [NamedShape(**row) for row in json.loads(FILE.read_text())]
    known = {family: [shape for shape in recorded if shape.family == family] for family in MODELS}
    return [shape for family in MODELS for shape in known[family] or counted(family)]


def counted(family: str) -> list[NamedShape]:
    """The variants of one family, from its models, which are built without data."""
    import torch

    from unlearn import config
    from unlearn.models import base

    counts = []
    for variant in base.adapter(family).variants:
        with torch.device("meta"):
            model = base.adapter(family)(base.options(config.Model(family=family, variant=variant)))
        parts = (model.encoder, model.decoder, model.first_stage)
        parameters = (sum(p.numel() for p in part.parameters()) if part is not None else 0 for part in parts)
        counts.append(NamedShape(family, variant, model.options.image_size, *parameters))
    return counts


def write() -> None:
    """Write catalogue.json, a line for each shape."""
    rows = [json.dumps(asdict(shape)) for family in MODELS for shape in counted(family)]
    FILE.write_text("[\n  " + ",\n  ".join(rows) + "\n]\n")


if __name__ == "__main__":
    write()
