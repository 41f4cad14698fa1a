"""Sizes in bytes: how people write them, and the memory of this machine."""

import os
import re
from pathlib import Path

UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
# Where the kernel gives the limit of this process's control group, version 2 and version 1.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parse(text: str) -> int:
    """Bytes of "80GiB", "24g", "512 MiB" or "1000"; units are powers of 1024. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if not match:
        raise ValueError("write it as 80GiB or 512MiB")
    return int(float(match[1]) * 1024 ** UNITS[match[2]])


def host_memory() -> int:
    """Bytes of this machine's memory, or of what its control group may use where that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path(limit).read_text().strip() for limit in LIMITS if os.path.isfile(limit)]
    return min([whole, *(int(limit) for limit in limits if limit.isdigit())])
