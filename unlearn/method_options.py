"""The options of a method in a tree of plain values, and what becomes of them where it is given another method."""

import functools
import logging
from collections.abc import Collection
from typing import Any

from unlearn.registry import METHODS

log = logging.getLogger(__name__)

DEFAULT = "encoder_l2"


def name_in(tree: dict[str, Any]) -> str:
    """The method that a tree names, by its name of today."""
    method = tree.get("method")
    name = str(method.get("name", DEFAULT)) if isinstance(method, dict) else DEFAULT
    return METHODS.aliases.get(name, name)


def drop_former(tree: dict[str, Any], former: str, changed: Collection[str]) -> None:
    """Drop the options that `tree` has for the former method, where `changed`, the keys that were set since, gave it
    another one that lacks them; what is dropped is told once. An unknown method is told later, with all other
    mistakes."""
    name, method = name_in(tree), tree.get("method")
    if "method.name" not in changed or name == former or not {name, former} <= set(METHODS.entries):
        return
    if not isinstance(method, dict):
        return
    lacking = set(METHODS.load(former).Options.model_fields) - set(METHODS.load(name).Options.model_fields)
    dropped = tuple(key for key in method if key in lacking and f"method.{key}" not in changed)
    for key in dropped:
        del method[key]
    if dropped:
        _tell(name, former, dropped)


@functools.cache
def _tell(name: str, former: str, dropped: tuple[str, ...]) -> None:
    keys = ", ".join(f"method.{key}" for key in dropped)
    log.warning("method.name is %s now: left out %s, which was given for %s", name, keys, former)
