"""Lists of class names: the common list of many files, and a class of one data set found in another.

Classes of two data sets are compared by name wherever there are names: a label is an index into a list, and lists
differ.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from unlearn.data.manifest import Manifest
from unlearn.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def ordered(names: Collection[str]) -> list[str]:
    """Names in the order of their labels: by their value where all are whole numbers, else as text."""
    return sorted(names, key=lambda name: (int(name), name)) if names and all(map(_is_number, names)) else sorted(names)


def common(lists: dict[str, list[str]], text: bool, given: list[str] | None) -> list[str]:
    """The class list of a folder. lists: those of its files. text: whether labels of some are written as names.

    given: names from the user. Where the files' lists differ, names missing from earlier lists are appended.
    Raises DataError where some files have class names and others do not, or a name is not among the given ones.
    """
    name_lists = list(lists.values())
    if all(names == name_lists[0] for names in name_lists) and given is None:
        return name_lists[0] if name_lists else []
    for where, names in lists.items():
        if not names:
            raise DataError(
                f"{where}: its labels have no names, and files beside it name theirs; give all names with --classes, "
                "or index it apart"
            )
        if len(set(names)) < len(names) and any(names != other for other in name_lists):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise DataError(
                f"{where}: two classes are called {twice!r}, and files beside it have other class lists; write them "
                "alike"
            )
        if given is not None and (unknown := [name for name in names if name not in given]):
            raise DataError(f"{where}: class {unknown[0]!r} is not among the given class names")
    if given is not None:
        return given
    if text:
        return ordered({name for names in name_lists for name in names})
    return list(dict.fromkeys(name for names in name_lists for name in names))


def mapping(names: list[str], common: list[str]) -> list[int]:
    """The index in the common list of each name of a file's list."""
    if names == common[: len(names)]:  # also where two classes have one name
        return list(range(len(names)))
    place = {name: label for label, name in reversed(list(enumerate(common)))}
    return [place[name] for name in names]


def label(manifest: Manifest, span: tuple[int, int], value: int | str, where: str) -> int:
    """The label of a class by its name (text) or its label (a number). span: the smallest and the largest label of the
    data.

    Raises ConfigError for a class that does not exist, and for a name that several classes share.
    """
    if isinstance(value, str):
        labels = [i for i, name in enumerate(manifest.classes) if name == value]
        if not labels:
            raise ConfigError(f"{where}: no class {value!r} in {manifest.uri}; it has {_some(manifest.classes)}")
        if len(labels) > 1:
            numbers = ", ".join(map(str, labels))
            raise ConfigError(
                f"{where}: {len(labels)} classes of {manifest.uri} are called {value!r}; give the label: one of "
                f"{numbers}"
            )
        return labels[0]
    if not span[0] <= value <= span[1]:
        raise ConfigError(f"{where}: no class {value} in {manifest.uri}; labels run from {span[0]} to {span[1]}")
    if str(value) in manifest.classes and manifest.classes[value : value + 1] != [str(value)]:
        named = manifest.classes.index(str(value))
        log.warning(("%s: %d is taken as a label, which is class %r; for the class that is named so (label %d) write "
                     "\"%d\" in quotes"),
                    where, value, manifest.class_name(value), named, value)  # fmt: skip
    return value


def translated(number: int, source: Manifest, target: Manifest, where: str) -> int | None:
    """The label in `target` of a class of `source`; None where `target` names its classes and has none of that name.

    Raises ConfigError, which names the class, where this cannot be determined.
    """
    if source.classes == target.classes:
        return number
    name = source.class_name(number)
    if not source.classes or not target.classes:
        lacking = target if source.classes else source
        raise ConfigError(
            f"{where}: class {name!r} of {source.uri} cannot be found in {target.uri}: classes of different data are "
            f"compared by name, and {lacking.uri} has no names; give them with `unlearn shards index {lacking.uri} "
            "--classes FILE`"
        )
    if not number < len(source.classes):
        raise ConfigError(f"{where}: {name} of {source.uri} has no name by which it could be found in {target.uri}")
    plain = source.classes[number]
    if plain in source.repeated or plain in target.repeated:
        raise ConfigError(
            f"{where}: several classes are called {plain!r}, so class {name!r} of {source.uri} cannot be found in "
            f"{target.uri}"
        )
    return target.classes.index(plain) if plain in target.classes else None


def read(path: str) -> list[str]:
    """Class names from a text file: one a line in the order of the labels, or NAME NUMBER, or a WordNet id followed by
    its words."""
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"{path}: cannot be read as a list of class names ({getattr(e, 'strerror', None) or 'not UTF-8'})"
        ) from None
    if numbered := [match for line in lines if (match := re.fullmatch(r"(.*\S)\s+(\d+)", line))]:
        if len(numbered) == len(lines) and sorted(int(m[2]) for m in numbered) == list(range(len(lines))):
            lines = [m[1] for m in sorted(numbered, key=lambda m: int(m[2]))]
    if all(re.match(r"n\d{8}\b", line) for line in lines):
        lines = [line.split()[0] for line in lines]
    if not lines:
        raise DataError(f"{path}: no class name in it")
    return [line.removeprefix("/") for line in lines]  # Places365 writes /a/abbey


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _some(names: list[str]) -> str:
    return ("labels without names: use numbers" if not names else ", ".join(names[:20])) + (
        ", ..." if len(names) > 20 else ""
    )
