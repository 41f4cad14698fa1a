"""The class of each image, from the layouts in which data sets are published.

    folder       .../CLASS/FILE; the path below the split (a/abbey) where folders of one name lie in different places
    imagenet     .../SYNSET/FILE, or a tar for each synset; a flat validation folder with a list of labels
    places365    .../LETTER/CLASS/FILE and .../LETTER/CLASS/KIND/FILE: always the path below the split
    webdataset   KEY.jpg beside KEY.cls or KEY.json (`label`, `cls` or `class`), in tars

A list of labels (any layout but webdataset) has a line for each image: NAME LABEL, or LABEL alone in the order of the
names.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from unlearn.data import classes as class_lists
from unlearn.errors import DataError

log = logging.getLogger(__name__)

Layout = Literal["folder", "imagenet", "places365", "webdataset"]
ABOUT = {".cls", ".json"}  # suffixes of label files in a WebDataset
LARGEST = 1 << 20  # bytes of a label file
_SPLIT = re.compile(
    r"(ilsvrc\d+_img_)?(train|training|val|valid|validation|test|testing)(\d{4})?([_-](\d+|large|standard|challenge|images?|img|set|data))*",
    re.I,
)
_IMAGES = {"images", "image", "imgs", "img"}  # folder names that are not classes
_PUBLISHED = re.compile(r"(ilsvrc\d+|places365)_(val|test)_\d+", re.I)  # files of flat validation folders


@dataclass(frozen=True)
class Arranged:
    """labels: (name of image, label) in the order in which they are packed: by class. classes: names of the labels, or
    []. loose: how many images have no class and are left out."""

    labels: list[tuple[str, int]]
    classes: list[str]
    loose: int = 0


def arrange(
    images: Sequence[str], about: Sequence[str], read: Callable[[str], bytes], src: str,
    layout: Layout | None = None, split: str | None = None, labels: str | None = None, classes: list[str] | None = None,
) -> Arranged:  # fmt: skip
    """The label of each image. about: names of the files that hold labels (webdataset); labels: path of a list of
    labels. classes: names of the labels, where labels are numbers or are not in the order of the names.

    Raises DataError where images have no class, a list does not fit, or a class is not among `classes`.
    """
    if labels is not None:
        class_of = _listed(images, Path(labels))
    elif layout == "webdataset" or (layout is None and _has_labels_beside(images, about)):
        class_of = _beside(images, about, read, src)
    else:
        class_of = _folders(images, src, layout, split)
    loose = len(images) - sum(name in class_of for name in images)
    values = set(class_of.values())
    if wrong := sorted(v for v in values if (labels or about) and re.fullmatch(r"-\d+|\d{19,}", v)):
        raise DataError(f"{src}: label {wrong[0]}: labels are whole numbers from 0 to 10^18 - 1, or names")
    if (
        values
        and all(re.fullmatch(r"\d{1,18}", value) for value in values)
        and (labels is not None or about and layout != "folder")
    ):
        number, names = {value: int(value) for value in values}, classes or []
        if names and max(number.values()) >= len(names):
            raise DataError(f"{src}: label {max(number.values())}, and there are {len(names)} class names")
    else:
        names = classes or class_lists.ordered(values)
        number = {name: label for label, name in reversed(list(enumerate(names)))}
        if unknown := sorted(values - set(names)):
            raise DataError(f"{src}: class {unknown[0]!r} is not among the given class names")
    labelled = [(name, number[class_of[name]]) for name in images if name in class_of]
    # Sorted by class, so that a row group holds few labels and a selection reads few row groups.
    return Arranged(sorted(labelled, key=lambda pair: (pair[1], pair[0])), names, loose)


def _folders(images: Sequence[str], src: str, layout: Layout | None, split: str | None) -> dict[str, str]:
    """{image: class} from the folders of its path."""
    folders = {name: _parts(name)[:-1] for name in images}
    below = {folder: _below_split(folder, split) for folder in set(folders.values())}
    holding = {folder for folder, rest in below.items() if rest}
    _no_flat(folders, below, holding, src)
    splits = sorted({"/".join(f[: len(f) - len(below[f])]) for f in holding if len(below[f]) < len(f)})
    if split is None and len(splits) > 1:
        log.warning("%s: %s are packed as one set: choose one with --split", src, ", ".join(splits[:8]))
    wrapper, ending = _shared(sorted({below[folder] for folder in holding}))
    paths = {folder: below[folder][wrapper : len(below[folder]) - ending] for folder in holding}
    last: dict[str, set] = {}
    for path in paths.values():
        last.setdefault(path[-1], set()).add(path)
    synsets = all(re.fullmatch(r"n\d{8}", name) for name in last)
    twice = sorted(name for name, places in last.items() if len(places) > 1)
    letters = bool(paths) and all(len(path) > 1 and _letter(path) for path in paths.values())
    nested = layout == "places365" or (layout in (None, "folder") and not synsets and bool(twice or letters))
    if nested and twice:
        log.warning(("%s: %d folder name(s) stand in several places, for example %r: classes are named by their "
                     "whole path, as in %r"),
                    src, len(twice), twice[0], "/".join(sorted(last[twice[0]])[0]))  # fmt: skip
    return {name: "/".join(paths[f]) if nested else paths[f][-1] for name, f in folders.items() if f in holding}


def _below_split(folder: tuple[str, ...], split: str | None) -> tuple[str, ...]:
    """The part of a path below the folder of a split; the whole path if there is none."""
    if split is not None:
        return folder[folder.index(split) + 1 :] if split in folder else ()
    place = next((i for i, part in enumerate(folder[:-1]) if _SPLIT.fullmatch(part)), None)
    return folder if place is None else folder[place + 1 :]


def _no_flat(folders: dict[str, tuple], below: dict[tuple, tuple], holding: set[tuple], src: str) -> None:
    """Raises DataError where images lie directly in the folder of a split, as in many published validation sets."""
    splits = {folder[: len(folder) - len(rest)] for folder, rest in below.items() if len(rest) < len(folder)}
    beside = {path[:-1] for path in splits if path}
    flat = {
        f
        for f in holding
        if below[f] == f
        and _SPLIT.fullmatch(f[-1])
        and (f[:-1] in beside or all(_SPLIT.fullmatch(o[-1]) for o in holding))
    }
    flat |= {
        f for f in holding if len(below[f]) < len(f) and all(part.lower() in _IMAGES for part in below[f])
    }  # val/images/FILE
    count = Counter(folders.values())
    if len(holding) == 1 and not flat:
        flat = {
            f
            for f in holding
            if any(_PUBLISHED.match(PurePosixPath(n).name) for n, folder in folders.items() if folder == f)
        }
    if not holding and folders:
        flat = set(folders.values())
    if flat:
        folder = max(sorted(flat), key=lambda f: count[f])
        where = f"`{'/'.join(folder)}` itself" if folder else "no folder"
        raise DataError(
            f"{src}: {count[folder]} images lie in {where}, not in folders of classes: give their labels with "
            "--labels FILE, or choose another part with --split"
        )


def _shared(paths: list[tuple[str, ...]]) -> tuple[int, int]:
    """How many leading folders all paths share, and how many trailing ones (0 or 1) that are named `images`."""
    start = end = 0
    while (
        paths
        and all(len(p) > start + 1 and p[start] == paths[0][start] for p in paths)
        and not _letter(paths[0][start:])
    ):
        start += 1
    if all(len(p) > start + 1 and p[-1].lower() in _IMAGES for p in paths):
        end = 1
    elif start and len(paths) == 1 and paths[0][-1].lower() in _IMAGES:
        start, end = start - 1, 1
    return start, end


def _letter(path: Sequence[str]) -> bool:
    """Whether the first folder is the initial of the second, as in a/abbey."""
    return len(path) > 1 and len(path[0]) == 1 and path[0].lower() == path[1][:1].lower()


def _listed(images: Sequence[str], path: Path) -> dict[str, str]:
    """{image: label} of a list."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"{path}: cannot be read as a list of labels ({getattr(e, 'strerror', None) or 'not UTF-8'})"
        ) from None
    lines = [re.split(r"[\s,]+", line.strip(), maxsplit=2) for line in text.splitlines() if line.strip()]
    if lines and lines[0][0].lower() in ("imageid", "image", "filename", "name", "file"):
        lines = lines[1:]
    if lines and all(len(line) == 1 for line in lines):
        if len(lines) != len(images):
            raise DataError(f"{path}: {len(lines)} labels for {len(images)} images")
        return {
            name: line[0]
            for name, line in zip(sorted(images, key=lambda n: (PurePosixPath(n).name, n)), lines, strict=True)
        }
    known: dict[str, str] = {}
    for name, value in ((line[0].lstrip("/"), line[1]) for line in lines if len(line) > 1):
        if known.setdefault(name, value) != value:
            raise DataError(f"{path}: gives {name} the labels {known[name]} and {value}")
    label_of = {}
    for name in images:
        # Lists name an image by its whole path, the end of it, or its name without a suffix.
        parts = _parts(name)
        forms = ["/".join(parts[i:]) for i in range(len(parts))] + [PurePosixPath(name).stem]
        label = next((known[form] for form in forms if form in known), None)
        if label is not None:
            label_of[name] = label.strip("/")
    if missing := [name for name in images if name not in label_of]:
        raise DataError(
            f"{path}: {len(missing)} of {len(images)} images are not in this list, for example {missing[0]}"
        )
    return label_of


def _has_labels_beside(images: Sequence[str], about: Sequence[str]) -> bool:
    """Whether this is a WebDataset: there are .cls, or images without folders have a .json each."""
    if any(name.endswith(".cls") for name in about):
        return True
    keys = {_key(name) for name in about}
    return all(len(_parts(name)) == 1 and _key(name) in keys for name in images)


def _beside(images: Sequence[str], about: Sequence[str], read: Callable[[str], bytes], src: str) -> dict[str, str]:
    """{image: label} of a WebDataset: from the file with the same key."""
    beside: dict[str, list[str]] = {}
    for name in sorted(about):  # .cls before .json
        beside.setdefault(_key(name), []).append(name)
    label_of = {}
    for name in images:
        label = next(
            (value for other in beside.get(_key(name), ()) if (value := _value(read(other), other, src)) is not None),
            None,
        )
        if label is None:
            raise DataError(f"{src}: {name} has no label beside it: a .cls, or a .json with `label`, `cls` or `class`")
        label_of[name] = label
    return label_of


def _value(data: bytes, name: str, src: str) -> str | None:
    try:
        if len(data) > LARGEST:
            raise ValueError("too large")
        if not name.endswith(".json"):
            return data.decode().strip() or None
        tree = json.loads(data)
        value = next((tree[key] for key in ("label", "cls", "class") if tree.get(key) is not None), None)
    except (ValueError, AttributeError, RecursionError):
        raise DataError(f"{src}: {name} holds no label that can be read") from None
    return None if value is None else str(value)


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part not in ("", "."))
