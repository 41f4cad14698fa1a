"""The shape of a run's model, found without reading a weight, and also where the weights are not here."""

import contextlib
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from unlearn import config
from unlearn.data.storage import Storage
from unlearn.errors import StorageError, WeightsError
from unlearn.models import base, weights


def model_options(model: config.Model) -> tuple[base.ModelOptions, str | None]:
    """(the shape that a config asks for, a note where its weights are not here).

    No weight is read, only the options that lie beside the weights, or that the names and shapes in a local file tell.
    Where these are missing or out of reach the shape is that of model.variant. Raises WeightsError where there is none,
    ConfigError.
    """
    recorded, absent = None, []
    if model.weights:
        try:
            recorded = _recorded(model.weights, model)
        except StorageError as e:
            if not model.variant:
                known = ", ".join(base.adapter(model.family).variants)
                raise WeightsError(f"{e}; or name model.variant, to plan without weights; known: {known}") from None
            absent.append(f"model.weights {model.weights}")
    if model.first_stage and not _is_there(model.first_stage):
        absent.append(f"model.first_stage {model.first_stage}")
    shape = (
        "that of model.weights"
        if recorded
        else f"model.variant {model.variant}"
        if model.variant
        else "the family's default"
    )
    note = f"not here: {', '.join(absent)}; the shape planned for is {shape}" if absent else None
    return base.options(model, recorded), note


def _recorded(uri: str, model: config.Model) -> dict[str, Any] | None:
    """The options that lie beside the weights, or that a file here tells; None where it tells none. Raises StorageError
    where no weights can be reached, WeightsError for damaged or other ones."""
    storage, cls = Storage(uri), base.adapter(model.family)
    if storage.is_file():
        return weights.start(cls, model, {})[1] if storage.is_local() else None
    if storage.is_file(weights.CARD):
        card = weights.card(storage)
        if base.adapter(card["family"]) is not cls:
            raise WeightsError(f"{uri} holds a model of family {card['family']}, the config says {cls.family}")
        return card["options"]
    if any(storage.is_file(name) for name in weights.FOREIGN):
        rest = Storage(model.first_stage) if model.first_stage else None
        with (
            _small_files(storage, cls.option_files) as folder,
            _small_files(rest, cls.option_files) if rest and not rest.is_file() else contextlib.nullcontext() as first,
        ):
            return cls.options_from_folder(folder, dict(model.options), first)
    raise StorageError(f"no weights at {uri}: give a .safetensors or .pth file, or the folder of a model")


@contextlib.contextmanager
def _small_files(storage: Storage, patterns: tuple[str, ...]) -> Iterator[Path]:
    """A local folder with those files of a folder whose names match: the folder itself, or a temporary copy."""
    if storage.is_local():
        yield Path(storage.uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.files():
            if any(fnmatch(name, pattern) for pattern in patterns):
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(storage.read(name))
        yield Path(folder)


def _is_there(uri: str) -> bool:
    """Whether there is a file or a folder with something in it, as far as can be seen from here."""
    try:
        storage = Storage(uri)
        return Path(storage.uri).exists() if storage.is_local() else storage.is_file() or bool(storage.files())
    except StorageError:
        return False
