"""Shadow models: trained as the original was, each without another half of the forget images.

They say what the errors on one image are when it was learnt and when it was not, and so which images are learnt by
heart. Pairs of shadows divide the forget images: what one has seen the other has not. One folder of them serves every
audit of the same forget set.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np

from unlearn import config
from unlearn.data import duplicates, order
from unlearn.data.selection import RowSet
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, UnlearnError
from unlearn.models import weights
from unlearn.run import Run
from unlearn.training import loop
from unlearn.training.export import export

CARD = "shadows.json"
STREAM = 1 << 28  # of the random numbers of an audit: which half of the forget images a shadow sees


def seen(count: int, number: int, seed: int) -> np.ndarray:
    """(count,) bool: which forget images shadow `number` was trained on."""
    half = order.generator(seed, STREAM, number // 2).permutation(count) % 2 == 0
    return half if number % 2 == 0 else ~half


def name(number: int) -> str:
    return f"shadow-{number:03d}"


def identity(recipe: Run, forget: RowSet) -> str:
    """The hash of how shadows are trained, and of what they do or do not see."""
    told = [recipe.settings.hash(), recipe.origin, forget.digest]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def card(folder: str, recipe: Run, forget: RowSet) -> None:
    """Write down whose shadows a folder holds. Raises ConfigError where it holds others, or where the recipe is of
    other data."""
    if recipe.sets["retain"].manifest.hash != forget.manifest.hash:
        raise ConfigError(
            "--recipe: its data.train is not that of the run; shadows are trained on what the original was trained on"
        )
    if missing := int((~np.isin(forget.rows, recipe.sets["retain"].rows)).sum()):
        raise ConfigError(
            f"--recipe: {missing} of the {len(forget)} forget images are not among its training images, so no shadow "
            "would have seen them; give the recipe of the original, not that of an oracle"
        )
    known = {"identity": identity(recipe, forget), "forget": forget.digest, "seed": recipe.settings.seed}
    storage = Storage(folder)
    if not storage.create(CARD, json.dumps(known).encode()) and _card(folder) != known:
        raise ConfigError(f"{folder} holds shadows of another recipe or forget set: give another folder")


def _card(folder: str) -> dict:
    try:
        known = json.loads(Storage(folder).read(CARD))
        assert isinstance(known["seed"], int) and isinstance(known["forget"], str)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UnlearnError(
            f"{folder}/{CARD} is damaged, or of an earlier version that did not write down which images its shadows "
            "were trained without: train them again, in another folder"
        ) from None
    return known


def found(folder: str, model: config.Model, forget: RowSet) -> tuple[dict[str, config.Model], int]:
    """({name: shadow}, the seed of their halves) of a folder, in order. Raises UnlearnError where they are of another
    forget set."""
    known, storage, models = _card(folder), Storage(folder), {}
    if known["forget"] != forget.digest:
        raise ConfigError(
            f"{folder}: its shadows were trained for another forget set than that of this run ({len(forget)} images): "
            "which images a shadow has seen would be wrong. Train shadows for this run, in another folder"
        )
    while storage.is_file(f"{name(len(models))}/model/{weights.CARD}"):
        number = len(models)
        models[name(number)] = model.model_copy(update={"weights": storage.where(f"{name(number)}/model")})
    return models, known["seed"]


class Trainer:
    """What a worker does with one shadow after another. recipe: the run that trains the original. Going on where it was
    stopped."""

    def __init__(self, recipe: Run, folder: str, forget: RowSet):
        self.recipe, self.folder, self.forget = recipe, folder, forget

    def __call__(self, number: int) -> str:
        settings = self.recipe.settings
        own = settings.model_copy(
            update={
                "run_dir": f"{self.folder}/{name(number)}", "seed": settings.seed + 1 + number,
                "training": settings.training.model_copy(update={"engine": "torch",
                        "micro_batch_size": settings.micro_batch}),
                "cluster": settings.cluster.model_copy(update={"workers": 1}),
            }
        )  # fmt: skip
        run = replace(self.recipe, settings=own, sets={"retain": self._rows(number)})
        storage = Storage(own.run_dir)
        if weights.whole(storage.where("model")):
            return storage.where("model")
        loop.worker(run)
        return export(run)

    def _rows(self, number: int) -> RowSet:
        """The rows that a shadow sees: the recipe's, but for the other half of the forget images."""
        whole = self.recipe.sets["retain"]
        unseen = self.forget.rows[~seen(len(self.forget), number, self.recipe.settings.seed)]
        keep = ~np.isin(whole.rows, unseen)
        keep &= ~duplicates.in_both((self.forget.manifest, unseen), (whole.manifest, whole.rows))
        return replace(whole, rows=whole.rows[keep], labels=whole.labels[keep])
