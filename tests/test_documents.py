"""YAML and JSON from outside: what cannot be meant ends at once, in one line, and takes no memory."""

import tracemalloc

import pytest
import yaml

from unlearn import config, documents
from unlearn.errors import ConfigError

ALIASES = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


def test_yaml_that_would_take_minutes_is_refused_at_once():
    with pytest.raises(ConfigError, match="17,825,795 characters, and 16,777,216 are the most: long lists belong in"):
        config.read("a: " + "x" * (17 << 20), "run.yaml")


@pytest.mark.parametrize(
    "text, why",
    [(ALIASES, "aliases repeat more than"), ("a: &a " + "x" * 70_000 + "\nb: *a", "aliases repeat more than"),
        ("a: &a [*a]", "an alias of the part"),
     ("[" * 10_000, "parts within parts"), ("{a: " * 10_000, "parts within parts"),
     ("".join("  " * i + "a:\n" for i in range(500)), "parts within parts"),
     ("x: &x " + "[" * 20 + "]" * 20 + "\ny: " + "[" * 20 + "*x" + "]" * 20, "parts within parts"),
     ("a: " + "9" * 6000, "whole number of 6,000 characters"), ("a: 0x" + "f" * 6000, "whole number of 6,002"),
     ("a: 0x" + "f" * 20, "64 bits"),
     ("a: 2024-99-99", "month must be"), ("a: !!bool x", "its tag does not allow"),
     ("a: !!python/object/apply:os.system [x]", "constructor"), ("a: [", "expected"),
     ("a: {b: 1, c: 2, b: 3}", "the key 'b' stands twice")],
)  # fmt: skip
def test_yaml_beyond_the_bounds_is_refused(text, why):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=why) as told:
            documents.from_yaml(text)
        with pytest.raises(ConfigError, match=why):
            config.read(text, "run.yaml")
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_yaml_within_them_is_read_as_before():
    text = (
        "a: &v {x: 1, y: [1.5, true, null, 2024-01-02]}\nb: *v\nc: {<<: *v, y: 0x10}\nd: 18446744073709551615\ne: 1_000"
    )
    assert documents.from_yaml(text) == yaml.safe_load(text) and documents.from_yaml("") is None


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 40 + "]" * 40, '{"a": ' * 40 + "1" + "}" * 40, "1" + "0" * 30, "9" * 6000, "{", "\xff"],
)
def test_json_beyond_the_bounds_is_refused(text):
    with pytest.raises(ValueError):
        documents.from_json(text)
    assert documents.from_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


@pytest.mark.parametrize(
    "item, why",
    [("seed=" + "9" * 6000, "--set seed=9+: the value is not YAML .a whole number of 6,000"),
        ("seed=9223372036854775808", "seed: .*less than"),
     ("model.options=" + "[" * 5000, "--set model.options=.*parts within parts"),
     (".".join("a" * 5000) + "=1", "a key of 5000 parts"),
     ("model.options={a: &a [x, x], b: [" + "*a, " * 40_000 + "*a]}", "aliases repeat")],
)  # fmt: skip
def test_overrides_are_bounded_too(item, why):
    with pytest.raises(ConfigError, match=why) as told:
        config.override({}, [item]) and config.parse(
            config.override({"run_dir": "r", "data": {"train": "t"}, "training": {"steps": 1}}, [item])
        )
    assert len(str(told.value)) < 600
