"""Which release came from which, and what a model remembers that others have forgotten."""

from collections.abc import Iterable
from dataclasses import dataclass

from unlearn.releases.release import Release


@dataclass(frozen=True)
class Descendant:
    """how: "made from" where training started from its weights, "follows" where it was the current release before; of:
    which one of its line it came from."""

    version: str
    how: str
    of: str


def descendants(release: Release, releases: Iterable[Release]) -> list[Descendant]:
    """All that came from a release, directly or by others, the first one first."""
    line, found = {release.version: release.weights}, []
    for other in sorted(releases, key=lambda each: each.number):  # a release is younger than what it came from
        if other.version in line:
            continue
        base, parent = other.base and other.base.weights, other.parent and other.parent.version
        made_from = next((version for version, weights in line.items() if weights == base), None)
        if made_from or parent in line:
            found.append(Descendant(other.version, "made from" if made_from else "follows", made_from or str(parent)))
            line[other.version] = other.weights
    return found


def remembered(requests: Iterable[str], releases: Iterable[Release]) -> dict[str, list[str]]:
    """{commitment: versions that serve it} of the requests that these releases have served, and a model that serves
    `requests` has not."""
    served: dict[str, list[str]] = {}
    own = set(requests)
    for other in releases:
        for request in set(other.requests) - own:
            served.setdefault(request, []).append(other.version)
    return served
