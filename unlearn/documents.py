"""YAML and JSON from outside, within bounds: neither length, nor depth, nor aliases that multiply, nor numbers without
end exhaust memory, the stack or patience."""

import json
from typing import Any

import yaml

DEPTH = 32  # parts within parts
REPEATED = 64 << 10  # characters and values that all aliases of a document may repeat together
DIGITS = 64  # characters of a whole number
LONGEST = 16 << 20  # characters of YAML, which takes about two seconds a MiB


def from_yaml(text: str) -> Any:
    """Plain values. Raises ValueError, in one line, for what is no YAML or goes beyond the bounds."""
    if len(text) > LONGEST:
        raise ValueError(f"{len(text):,} characters, and {LONGEST:,} are the most: long lists belong in files")
    try:
        return bounded(yaml.load(text, Loader=_Loader))
    except Exception as e:  # PyYAML raises what its constructors meet in a value that is wrong
        plain = isinstance(e, yaml.YAMLError | ValueError)
        raise ValueError(" ".join(str(e).split())[:400] if plain else "a value that its tag does not allow") from None


def from_json(text: str | bytes) -> Any:
    """Plain values. Raises ValueError for what is no JSON or goes beyond the bounds."""
    try:
        return bounded(json.loads(text))
    except RecursionError:
        raise ValueError(f"more than {DEPTH} parts within parts") from None


def mapping(text: bytes) -> dict[str, Any]:
    """What a JSON object holds; nothing where it is damaged or is no object."""
    try:
        tree = from_json(text)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def bounded(tree: Any) -> Any:
    """`tree`, which holds no part deeper than DEPTH and no whole number over 64 bits. Raises ValueError."""
    level = [tree]
    for _ in range(DEPTH + 1):
        if any(isinstance(value, int) and not -(1 << 63) <= value < 1 << 64 for value in level):
            raise ValueError("a whole number of more than 64 bits")
        parts = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [child for part in parts for child in part]
        if not level:
            return tree
    raise ValueError(f"more than {DEPTH} parts within parts")


class _Loader(yaml.SafeLoader):
    """Counts while it reads: what an alias stands for is never written out."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._repeated = 0
        self._sizes: dict[int, int] = {}  # by the identity of a node, which the tree keeps alive

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if (size := self._sizes.get(id(node))) is None:
                raise ValueError("an alias of the part that it is in")
            self._repeated += size
            if self._repeated > REPEATED:
                raise ValueError(f"its aliases repeat more than {REPEATED:,} characters: write the values out")
            return node
        if self._depth > DEPTH:
            raise ValueError(f"more than {DEPTH} parts within parts")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode):
            self._sizes[id(node)] = 1 + len(node.value)
        elif isinstance(node, yaml.CollectionNode):
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
            parts = (part for each in node.value for part in (each if isinstance(each, tuple) else (each,)))
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        return node

    def whole_number(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > DIGITS:
            raise ValueError(f"a whole number of {len(node.value):,} characters")
        return self.construct_yaml_int(node)


def _check_keys(node: yaml.MappingNode) -> None:
    """PyYAML takes the last of several values of one key."""
    seen: set[str] = set()
    for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key in seen and key != "<<":
            raise ValueError(f"the key {key[:40]!r} stands twice in one part")
        seen.add(key)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
