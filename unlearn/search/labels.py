"""Where the labels of points go, so that none lies over another label, another point or a name at the border."""

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
    """Labels of points (text, x, y) in a drawing of this size, each in the first free place beside its point. What
    finds none is written into the label of the nearest point, as in "3, 7". taken: boxes that are to stay free."""

    def free(box: Box) -> bool:
        inside = box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height
        return inside and not any(_meet(box, other) for other in [*taken, *dots, *(one.box for _, _, one in labels)])

    dots = [(x - POINT, y - POINT, x + POINT, y + POINT) for _, x, y in points]
    labels: list[tuple[float, float, Label]] = []  # with their points
    for text, x, y in points:
        places = [Label(text, x + side, y + rise, "start" if side > 0 else "end") for side, rise in SIDES]
        if (label := next((place for place in places if free(place.box)), None)) is None and labels:
            near = min(range(len(labels)), key=lambda i: (labels[i][0] - x) ** 2 + (labels[i][1] - y) ** 2)
            at, up, host = labels[near]
            labels[near] = at, up, Label(f"{host.text}, {text}", host.x, host.y, host.anchor)
        else:
            labels.append((x, y, label or places[0]))
    return [label for _, _, label in labels]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
