"""Sizes as people write them, and what a control group lets a process have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn import sizes


def test_sizes_are_read_as_people_write_them():
    written = {
        "80GiB": 80 << 30,
        "1.5 g": 3 << 29,
        "512MB": 512 << 20,
        " 4 KiB ": 4096,
        "2t": 2 << 40,
        "1000": 1000,
        "7b": 7,
        "0": 0,
    }
    assert {text: sizes.parse(text) for text in written} == written


@given(st.integers(0, 1 << 50))
def test_a_number_is_a_number_of_bytes(count):
    # Through a float, which is exact up to 2**53.
    assert sizes.parse(str(count)) == sizes.parse(f"{count}B") == count


@pytest.mark.parametrize("text", ["large", "", "GiB", "-1", "1e9", "5 XB", "1,5GB", "0x10"])
def test_what_is_no_size_is_told(text):
    with pytest.raises(ValueError, match="write it as 80GiB or 512MiB"):
        sizes.parse(text)


def test_memory_is_the_machines_or_what_its_control_group_allows(tmp_path, monkeypatch):
    limits = [tmp_path / "v2", tmp_path / "v1"]
    monkeypatch.setattr(sizes, "LIMITS", [str(path) for path in limits])
    whole = sizes.host_memory()
    assert whole > 1 << 30
    limits[0].write_text("max\n")
    limits[1].write_text("9223372036854771712\n")  # version 1 writes this where there is none
    assert sizes.host_memory() == whole
    limits[0].write_text("1048576\n")
    assert sizes.host_memory() == 1 << 20
