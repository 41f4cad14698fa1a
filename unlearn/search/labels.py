"""Where the labels of points go, so that none lies over another label, another point or a name at the border."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# In the drawing's units, where letters are largest: on a phone.
LETTER, HEIGHT, POINT = 12, 15, 5
GAP = 6
# Of a label's corner to its point: beside it above and below, then the same further away.
SIDES = [(side, rise) for rise in (-GAP, GAP + HEIGHT, -GAP - HEIGHT, GAP + 2 * HEIGHT) for side in (GAP, -GAP)]

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Label:
    """A text whose base line begins, or ends where `anchor` is "end", at x, y."""

    text: str
    x: float
    y: float
    anchor: str

    @property
    def box(self) -> Box:
        """What it covers."""
        width = LETTER * len(self.text)
        left = self.x - width if self.anchor == "end" else self.x
        return left, self.y - HEIGHT, left + width, self.y


def placed(
    points: Sequence[tuple[str, float, float]], taken: Sequence[Box], width: float, height: float
) -> list[Label]:
    """Labels of points (text, x, y) in a drawing of this size, each in the first free place at its point. What finds
    none is written into the label of the nearest point that has room for it, as in "3, 7" or "3, 7 and 2 more"; what
    finds none there either has no label. taken: boxes that are to stay free."""
    dots = [(x - POINT, y - POINT, x + POINT, y + POINT) for _, x, y in points]
    made: dict[int, tuple[list[str], Label]] = {}  # by the index of the point: texts that stand for it

    def place(texts: list[str], index: int) -> Label | None:
        boxes = [*taken, *dots, *(label.box for other, (_, label) in made.items() if other != index)]
        for count in range(len(texts), 0, -1):
            more = f" and {len(texts) - count} more" if count < len(texts) else ""
            for label in _places(", ".join(texts[:count]) + more, *points[index][1:], width):
                left, top, right, bottom = box = label.box
                inside = left >= 0 and top >= 0 and right <= width and bottom <= height
                if inside and not any(_meet(box, other) for other in boxes):
                    return label
        return None

    for i, (text, _, _) in enumerate(points):
        if label := place([text], i):
            made[i] = [text], label
    for i in [i for i in range(len(points)) if i not in made]:
        for near in sorted(made, key=lambda j: math.dist(points[i][1:], points[j][1:])):
            texts = [*made[near][0], points[i][0]]
            if label := place(texts, near):
                made[near] = texts, label
                break
    return [label for _, label in made.values()]


def _places(text: str, x: float, y: float, width: float) -> list[Label]:
    """Where a label may lie: beside its point, or above and below it, moved into the drawing."""
    beside = [Label(text, x + side, y + rise, "start" if side > 0 else "end") for side, rise in SIDES]
    moved = min(x + GAP, width - LETTER * len(text))
    return beside + [Label(text, moved, y + rise, "start") for _, rise in SIDES[::2]]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
