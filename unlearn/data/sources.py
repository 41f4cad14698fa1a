"""What a place of images gives: the names of its files, sorted out, and their content."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

DIRT = {"__MACOSX", "_temporary", "@eaDir", "lost+found", "$RECYCLE.BIN"}
OUTSIDE = "name(s) that lead out of it: absolute, or with `..`"  # as what is left out is told
LARGEST = 1 << 28  # bytes of one file: a small archive can unpack to any size
# How many times its size an archive may unpack to, above SMALL bytes; images hardly compress, a bomb unpacks to 1,000
# times.
RATIO, SMALL = 100, 1 << 28
Wanted = Callable[[str], bool]


@dataclass
class Source:
    """names: of the wanted files, sorted, each once; of members with equal names the last is used. read: the content of
    a file. left_out: how many files are not taken, by their suffix. in_tars: whether some are members of tars in a
    folder."""

    names: list[str] = field(default_factory=list)
    read: Callable[[str], bytes] = lambda name: b""
    left_out: Counter = field(default_factory=Counter)
    in_tars: bool = False

    def sort_in(self, name: str, wanted: Wanted, size: int) -> None:
        """Take a file, or count it as left out."""
        if is_dirt(name):
            return
        if leads_out(name):
            self.left_out[OUTSIDE] += 1
        elif size > LARGEST:
            self.left_out["larger than 256 MiB"] += 1
        elif wanted(name):
            self.names.append(name)
        else:
            self.left_out[PurePosixPath(name).suffix.lower() or "no suffix"] += 1


def is_dirt(name: str) -> bool:
    """Whether a file is hidden or a system file, and not data, by the names in its path."""
    return any(part in DIRT or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


def leads_out(name: str) -> bool:
    """Whether a path is absolute or leads above the folder it is in: a class would be called `..`, and an id name a
    file of somebody else's."""
    return name.startswith("/") or ".." in name.split("/")


def unpacked(packed: int) -> int:
    """Bytes that an archive of `packed` bytes may unpack to."""
    return max(RATIO * packed, SMALL)


def bomb(packed: int) -> str:
    """What is said of an archive that unpacks to more."""
    return (
        f"unpacks to more than {unpacked(packed) >> 20} MiB, {RATIO} times its size: not the images that were "
        "packed; unpack it yourself if it is right"
    )
