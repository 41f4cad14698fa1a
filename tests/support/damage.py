"""Damage as disks, networks and strangers do it, drawn from a seed: bytes of any file, values of a JSON file."""

import copy
import json
from collections.abc import Callable

import numpy as np

from unlearn.errors import UnlearnError

VALUES = [None, True, -1, 0, 1 << 70, 1e308, "", "\0\x1b", "../../x", [], [[]], {}, {"": None}, [None] * 3, "NaN"]


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to four pieces changed, lost, doubled or added; one in four only near an end, where headers
    are."""
    broken = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        reach = len(broken) if rng.random() < 0.75 else min(len(broken), 256)
        at = int(rng.integers(reach + 1))
        at = at if rng.random() < 0.5 else len(broken) - at
        length = int(rng.integers(1, 9)) if rng.random() < 0.8 else int(rng.integers(1, 2000))
        kind = rng.integers(6)
        if kind == 0 and at < len(broken):
            broken[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            broken[at : at + length] = rng.bytes(len(broken[at : at + length]))
        elif kind == 2:
            broken[at : at + 4] = b"\xff\xff\xff\x7f" if rng.random() < 0.5 else bytes(4)
        elif kind == 3:
            del broken[at : at + length]
        elif kind == 4:
            broken[at:at] = broken[at : at + length]
        elif kind == 5 and rng.random() < 0.3:
            del broken[at:]
    return bytes(broken)


def damaged_json(data: bytes, rng: np.random.Generator) -> bytes:
    """A JSON file whose syntax is right, and of which one to three values are others, or gone."""
    tree = copy.deepcopy(json.loads(data))
    for _ in range(rng.integers(1, 4)):
        places = list(_places(tree))
        if not places:
            break
        parent, key = places[rng.integers(len(places))]
        if rng.random() < 0.2:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    return json.dumps(tree).encode()


def _places(tree):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


def verdict(call: Callable[[], object]) -> str:
    """ "taken", or the name of the project's own error that was raised; any other exception passes."""
    try:
        call()
        return "taken"
    except UnlearnError as e:
        assert str(e) and len(str(e)) < 3000, "a message of a length that can be read"
        return type(e).__name__
