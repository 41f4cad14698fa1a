"""Load and save weights: our folders (weights.safetensors + model.json), public checkpoints (.pth, .safetensors), and
the folders of other libraries (diffusers, transformers).

Nothing is unpickled: .pth files are read with weights_only=True.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from unlearn import config, documents
from unlearn.data.node_cache import node_copy
from unlearn.data.s3 import Facts
from unlearn.data.storage import Storage
from unlearn.errors import StorageError, UnlearnError, WeightsError
from unlearn.models import base, misplaced, tensor_files
from unlearn.models.misplaced import SUFFIXES
from unlearn.registry import MODELS

WEIGHTS, CARD = "weights.safetensors", "model.json"
# What tells a folder of diffusers or transformers.
FOREIGN = {"model_index.json", "config.json"}
# Types that weights may be stored in.
FLOATS = ("float64", "float32", "float16", "bfloat16")
# What libraries raise where the values of a damaged or foreign config reach them. A name that is not defined, an
# assertion or a package that is missing are faults of the program or the machine, and are raised as they are.
FOREIGN_FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
SMALL = 16 << 20  # bytes: configs, and the embedding of a prompt


@dataclass(frozen=True)
class Source:
    """Where weights are and what they are, looked up once, by the driver, for all processes that read them.

    kind: "file", one file of tensors; "ours", a folder with CARD and WEIGHTS; "folder", one of another library. files:
    those that belong to it, relative to `uri`; "" is the file itself. card: what a folder of ours says. fingerprint:
    sha256 of the file of tensors, or of all files of a folder of another library; "" where it was not requested.
    """

    uri: str
    kind: Literal["file", "ours", "folder"]
    files: dict[str, Facts]
    card: dict[str, Any]
    fingerprint: str = ""

    def path(self) -> Path:
        """Where it can be read on this machine: a file or a folder, as `kind` says. It is fetched once a machine."""
        return node_copy(self.uri, self.files)

    def tensors(self) -> Path:
        """Where its one file of tensors can be read. Raises StorageError."""
        if self.kind == "file":
            return self.path()
        if WEIGHTS not in self.files:
            raise StorageError(f"{self.uri}/{WEIGHTS}: there is no such file")
        return self.path() / WEIGHTS


Sources = Mapping[str, Source]  # by their URI


def locate(uri: str) -> Source:
    """Look up weights, and read them once for their fingerprint. Raises StorageError and WeightsError."""
    source, digest = _look(uri), hashlib.sha256()
    if source.kind == "folder" and WEIGHTS not in source.files:
        for name in sorted(source.files):
            digest.update(name.encode() + _sha256(source.path() / name).digest())
    else:
        digest = _sha256(source.tensors())
    if source.card.get("sha256", digest.hexdigest()) != digest.hexdigest():
        raise WeightsError(
            f"{uri}/{WEIGHTS} is not the file that {CARD} beside it was written with: export the model again"
        )
    return replace(source, fingerprint=digest.hexdigest())


def located(uris: Iterable[str | None], known: Sources | None = None) -> dict[str, Source]:
    """The sources of several URIs, those that are `known` among them."""
    known = known or {}
    return {uri: known.get(uri) or locate(uri) for uri in uris if uri}


def _look(uri: str) -> Source:
    storage = Storage(uri)
    if storage.is_file():
        names = [""]
    elif storage.is_file(CARD):
        names = [CARD, WEIGHTS]
    else:
        names = storage.files()
        if not any(name in FOREIGN or name.endswith(SUFFIXES) for name in names):
            raise _no_weights(storage, names)
    if storage.is_local():
        paths = {name: Path(storage.uri, name) for name in names}
        files = {name: Facts(path.stat().st_size, "") for name, path in paths.items() if path.is_file()}
    else:
        files = {name: facts for name, facts in storage.objects().items() if name in names}
    kind = "file" if names == [""] else "ours" if CARD in names else "folder"
    return Source(uri, kind, files, card(storage) if kind == "ours" else {})


def build(model: config.Model, seed: int = 0, sources: Sources | None = None, decoder: bool = True) -> base.Adapter:
    """The model that a config names, on CPU in float32, in eval mode; without weights it is initialised from `seed`.

    sources: what has been looked up already. decoder: whether it is wanted; left out it takes no memory.
    Weights in float32 are mapped from their file: they take memory of this process where they are written to.
    Raises WeightsError and ConfigError, whatever the files hold.
    """
    try:
        return _built(model, seed, sources or {}, decoder)
    except FOREIGN_FAULTS as e:
        told = model.weights or model.first_stage or model.options
        if isinstance(e, UnlearnError | torch.OutOfMemoryError) or not told or "allocate memory" in str(e):
            raise
        raise WeightsError(
            f"{model.weights or model.family} cannot be loaded: damaged, or of a kind that is not known here "
            f"({type(e).__name__}: {' '.join(str(e).split())[:200]})"
        ) from e


def _built(model: config.Model, seed: int, sources: Sources, decoder: bool) -> base.Adapter:
    cls, sources = base.adapter(model.family), dict(sources)
    if model.weights:
        sources[model.weights] = sources.get(model.weights) or _look(model.weights)
    tensors, saved_options = start(cls, model, sources) if model.weights else ({}, None)
    options = base.options(model, saved_options)
    with torch.random.fork_rng(devices=[]), tensor_files.without_data() if model.weights else contextlib.nullcontext():
        torch.manual_seed(seed)
        built = cls(options)
    tensors = cls.placed(tensors, options)
    if model.first_stage:
        if built.first_stage is None:
            raise WeightsError(f"model.first_stage: this {model.family} has no frozen first stage")
        first_stage = cls.first_stage_from((sources.get(model.first_stage) or _look(model.first_stage)).path())
        _check_values(first_stage, model.first_stage)
        rest = {n: t for n, t in built.state_dict().items() if not n.startswith(cls.first_stage_names)}
        tensor_files.check(built, rest | first_stage, model.first_stage)
        tensors = tensors | first_stage
    if model.weights:
        _check_values(tensors, model.weights)
        own = built.state_dict()
        ours = {n: t for n, t in own.items() if not n.startswith(cls.first_stage_names)} if model.first_stage else own
        tensor_files.check_kind(ours, tensors, model.weights)
        encoder = {n for n in own if n.startswith("encoder.")}
        if not any(n.startswith("decoder.") for n in tensors) and encoder <= tensors.keys():
            raise WeightsError(
                f"{model.weights} holds an encoder alone, and the decoder is needed too: give the whole model "
                "(of MAE mae_visualize_*.pth, not mae_pretrain_*.pth)"
            )
        said = sources[model.weights].card.get("stored")
        built.stored = getattr(torch, said) if said in FLOATS else _stored(tensors)
        if built.first_stage is not None and not any(n.startswith("first_stage.") for n in tensors):
            raise WeightsError(
                f"{model.weights} lacks the frozen first stage of {model.family}: name its weights in model.first_stage"
            )
        tensor_files.check(built, tensors, model.weights)
    if not decoder:
        built.drop_decoder()
    own = built.state_dict()
    tensor_files.assign(built, {n: t for n, t in tensors.items() if n in own})
    return built.eval()


def _check_values(tensors: Mapping[str, torch.Tensor], uri: str) -> None:
    """Raise WeightsError for a number that is not finite, which would spread through every figure."""
    for name, t in tensors.items():
        if t.is_meta or t.is_quantized or t.layout is not torch.strided:
            raise WeightsError(
                f"{uri}: {name} is no plain tensor (it is sparse, quantised, or without its data): save the weights "
                "with plain ones of 16 or 32 bits"
            )
        if t.dtype not in tensor_files.FLOATS or not t.numel():
            continue
        if not torch.isfinite(torch.stack(torch.aminmax(t))).all():
            raise WeightsError(f"{uri}: {name} holds numbers that are not finite (NaN or infinite)")


def _stored(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The floating-point type that most numbers have."""
    counts: dict[torch.dtype, int] = {torch.float32: 0}
    for t in tensors.values():
        if t.is_floating_point():
            counts[t.dtype] = counts.get(t.dtype, 0) + t.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def start(
    cls: type[base.Adapter], model: config.Model, sources: Sources
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """(tensors in our names, the options found beside them or None)."""
    uri = model.weights or ""
    source = sources.get(uri) or _look(uri)
    if source.kind == "folder":
        if not source.files.keys() & FOREIGN:
            raise _no_weights(Storage(uri), sorted(source.files))
        first = (sources.get(model.first_stage) or _look(model.first_stage)).path() if model.first_stage else None
        return cls.from_folder(source.path(), dict(model.options), first)
    if source.card.get("family", cls.family) != cls.family:
        raise WeightsError(f"{uri} holds a model of family {source.card['family']}, the config says {cls.family}")
    if source.kind == "file":
        return cls.from_file(*tensor_files.read(source.path(), uri), dict(model.options))
    return cls.from_public(_tensors(source)), source.card["options"]


def read(uri: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, card) of a folder of ours or of one file; the card is empty where there is none."""
    source = _look(uri)
    if source.kind == "folder":
        raise _no_weights(Storage(uri), sorted(source.files))
    return _tensors(source), source.card


def _tensors(source: Source) -> dict[str, torch.Tensor]:
    if source.kind == "file":
        return tensor_files.read(source.tensors(), source.uri)[0]
    return tensor_files.load(source.tensors(), f"{source.uri}/{WEIGHTS}")


def _no_weights(storage: Storage, names: list[str]) -> WeightsError:
    return misplaced.no_weights(storage.uri, names, f"a folder with {WEIGHTS} and {CARD}")


def card(storage: Storage) -> dict[str, Any]:
    """What a folder of ours says of itself: {"family", "options", ...}. Raises WeightsError."""
    try:
        card = documents.from_json(storage.read(CARD))
        dict(card["options"], family=card["family"])
        card["family"] = MODELS.aliases.get(card["family"], card["family"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"{storage.where(CARD)} is damaged: export the model again") from None
    return card


def whole(uri: str) -> bool:
    """Whether a folder of ours is there with the weights that were written into it. Raises StorageError."""
    if not all(Storage(uri).is_file(name) for name in (CARD, WEIGHTS)):
        return False
    try:
        locate(uri)
    except WeightsError:
        return False
    return True


def fingerprint(uri: str) -> str:
    """sha256 of the file of weights at `uri`, or of all files of a folder of another library."""
    return locate(uri).fingerprint


def _sha256(path: Path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256")


def adopt(model: config.Model, uri: str) -> None:
    """Write a model of another library as a new folder of ours."""
    _new(uri)
    write(build(model), uri, {"from": model.weights})


def convert(model: config.Model, uri: str, dtype: str | None = None) -> str:
    """Write a model to a new folder in the form that the library it comes from reads (diffusers, transformers).

    dtype: of its numbers, one of FLOATS; by default the one that it was stored in. Returns the expression that loads
    it.
    """
    target, built = _new(uri), build(model)
    with tempfile.TemporaryDirectory() as folder:
        line = built.to(getattr(torch, dtype) if dtype else built.stored).to_folder(Path(folder), _origin(model))
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            target.upload(path, path.relative_to(folder).as_posix())
    quoted = repr(uri)
    if quoted[0] == "'":  # one text in place of a sum of two
        line = line.replace("FOLDER + '", quoted[:-1])
    return line.replace("FOLDER", quoted)


def _new(uri: str) -> Storage:
    """The storage of a folder that is to be written. Raises WeightsError where something is there."""
    target = Storage(uri)
    if target.is_file() or target.files():
        raise WeightsError(f"{uri} is not empty: give a new folder")
    return target


def _origin(model: config.Model) -> Path | None:
    """The folder of another library that a model came from, directly or by a run, where it can still be reached."""
    source = _look(model.weights or "")
    for uri in (model.weights, source.card.get("from"), model.first_stage):
        with contextlib.suppress(StorageError, WeightsError):
            if uri and (found := _look(uri)).kind == "folder" and "model_index.json" in found.files:
                return found.path()
    return None


def family(uri: str) -> str:
    """The family of a folder of ours. Raises WeightsError for other weights, which do not say it."""
    storage = Storage(uri)
    if not storage.is_file(CARD):
        raise WeightsError(f"{uri} does not say its family: name it with --family")
    return card(storage)["family"]


def write(model: base.Adapter, uri: str, card: dict[str, Any]) -> None:
    """Write the model as a folder of ours, in float32; `card` adds to what the folder says of itself."""
    storage = Storage(uri)
    with storage.writing(WEIGHTS) as path:
        digest = tensor_files.save(model.state_dict(), path, floats=torch.float32)
    card = {"family": model.family, "options": model.options.model_dump(mode="json"), "sha256": digest, **card}
    card["stored"] = str(model.stored).removeprefix("torch.")
    # The card is written last: a folder without it is not a model.
    storage.write(CARD, json.dumps(card, indent=2).encode())
