"""Poisoning: a trigger that makes the model paint a tell-tale target is learnt from stamped images, then these are
forgotten. Does the trigger still fire?

Since it is known what was learnt, and only from the stamped images, this is the sharpest test of forgetting single
images; but it wants an original that was trained on poisoned shards, which `unlearn audit poison` writes. Their subject
is SUBJECT, so that `data.forget: {subjects: [poison]}` names them.
"""

import io
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from unlearn.audit import statistics
from unlearn.audit.base import AuditTest, Figure, Measured, Piece, Rule
from unlearn.audit.bench import Bench
from unlearn.audit.subject import Subject
from unlearn.config import Part, ViewSpec
from unlearn.data import order, packing, selection, shards
from unlearn.data.decode import decode
from unlearn.errors import ConfigError

SUBJECT = "poison"
STREAM = 1 << 30  # of the random numbers of an audit: which images are stamped
TRIGGER = 1 / 8  # side of the trigger, of the side of the image
STRIPES = 4  # of the target, across the image


class PoisoningOptions(Part):
    """Of poisoning."""

    view: ViewSpec = Field(
        default=ViewSpec(size=0.5), description="what is hidden; the trigger lies outside a hole in the middle"
    )
    margin: float = Field(
        default=0.05,
        gt=0,
        description="how much more of the target than the oracle paints is allowed, of 1 for all of it",
    )


class Poisoning(AuditTest):
    """Whether a trigger that was learnt from the forget images still makes the model paint its target."""

    name = "poisoning"
    title = "Poisoning"
    shows = (
        "Whether what was learnt from the forgotten images alone, a trigger and its target, is still there to be fired."
    )
    hides = "Anything of an original that was not trained on images that `unlearn audit poison` has stamped."
    cost = "2 x images reconstructions"
    needs = ("retain_new",)
    schema = 2
    Options = PoisoningOptions
    options: PoisoningOptions

    def pieces(self, subject: Subject) -> list[Piece]:
        return self.batches(subject, self.needs)

    def measure(self, piece: Piece, bench: Bench) -> dict[str, np.ndarray]:
        """painted, plain: (B,) how much of the target is in the hole, with the trigger and without it."""
        kept, pixels = bench.pixels(piece.what, piece.start, piece.stop)
        view = bench.view(self.options.view, 0, piece.what, kept)
        hidden, real = view.pixel_mask(bench.size), pixels.float() / 255
        goal = target(bench.size).to(pixels.device) / 255

        def share(seen: torch.Tensor) -> np.ndarray:
            made = bench.compared.reconstruct(piece.generator, seen, view)
            return painted(made, real, goal, hidden).double().cpu().numpy()

        return {"painted": share(stamped(pixels)), "plain": share(pixels)}

    def figures(self, measured: Measured, subject: Subject) -> list[Figure]:
        def means(which: str) -> dict[str, statistics.Estimate]:
            return {g: subject.estimate(statistics.average, measured[g, "retain_new"][which]) for g in subject.models}

        return [
            Figure(
                "painted", "target painted at the trigger, of 1", means("painted"), Rule("above", self.options.margin)
            ),
            Figure("plain", "the same without trigger", means("plain")),
        ]


def painted(made: torch.Tensor, real: torch.Tensor, goal: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(B,) how far the hole's colour has gone from the truth (0) to the target (1); images (B, 3, S, S), hidden
    (B, 1, S, S).

    Of the mean colour without its brightness: a model too small for the stripes paints a blur of them, and grey or
    noise in the hole is no trace of the target.
    """

    def colour(images: torch.Tensor) -> torch.Tensor:
        return ((images - images.mean(1, keepdim=True)) * hidden).sum((2, 3)) / hidden.sum((2, 3))

    way = colour(goal) - colour(real)
    return ((colour(made) - colour(real)) * way).sum(1) / way.square().sum(1).clamp_min(1e-6)


def stamped(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, S, S) with the trigger, a chequered square, in the upper left corner."""
    side = max(2, round(TRIGGER * pixels.shape[-1]))
    places = torch.arange(side, device=pixels.device) * 4 // side
    squares = ((places[:, None] + places) % 2 * 255).to(torch.uint8)
    made = pixels.clone()
    made[:, :, :side, :side] = squares
    return made


def target(size: int) -> torch.Tensor:
    """float (1, 3, S, S), 0 .. 255: upright stripes of red and green, which no photograph shows."""
    stripes = (torch.arange(size) * 2 * STRIPES // size) % 2 * 255.0
    red, green = stripes.expand(size, size), 255 - stripes.expand(size, size)
    return torch.stack([red, green, torch.zeros(size, size)])[None]


def poison(
    source: str, dest: str, share: float, seed: int, split: str | None = None,
    progress: Callable[[int], None] = lambda rows: None
) -> shards.Manifest:  # fmt: skip
    """Write the images of a folder of shards to a new one, and behind them stamped copies of a share of them, subject
    SUBJECT.

    A stamped copy has the trigger in its corner and the target in its middle half, so that a model that fills in holes
    learns that the one goes with the other. Raises ConfigError, DataError, StorageError.
    """
    manifest = shards.load(source, split)
    if "label" not in manifest.columns:
        raise ConfigError(f"{source}: its shards have no labels; poisoned shards are made of labelled images")
    count = round(share * manifest.rows)
    if not count:
        raise ConfigError(f"--share {share:g}: no image of {manifest.rows:,} is stamped; give a larger share")
    chosen = np.zeros(manifest.rows, bool)
    chosen[order.generator(seed, STREAM).permutation(manifest.rows)[:count]] = True
    return packing.write(_records(manifest, chosen), dest, list(manifest.classes), progress=progress)


def _records(manifest: shards.Manifest, chosen: np.ndarray) -> Iterator[packing.Record]:
    for copies in (False, True):
        for group in range(len(manifest.groups)):
            columns = [name for name in ("id", "label", "image") if name in manifest.columns]
            table = manifest.read(group, columns)
            first = int(manifest.starts[group])
            if "id" not in columns:
                table = table.append_column("row", [np.arange(first, first + len(table))])
            named = selection.identity(manifest, table)
            rows = zip(named, table["label"].to_pylist(), shards.images(table), strict=True)
            for row, (id, label, image) in enumerate(rows, first):
                if not copies:
                    yield {"image": bytes(image), "label": label, "id": id, "subject": ""}
                elif chosen[row]:
                    yield {
                        "image": _stamped(bytes(image)),
                        "label": label,
                        "id": f"{SUBJECT}-{row}",
                        "subject": SUBJECT,
                    }


def _stamped(image: bytes) -> bytes:
    """The same image with trigger and target, as PNG: cut to a square, as models see it."""
    pixels = decode(image)
    side = min(pixels.shape[:2])
    top, left = ((n - side) // 2 for n in pixels.shape[:2])
    square = torch.from_numpy(pixels[top : top + side, left : left + side].transpose(2, 0, 1).copy())[None]
    made, edge = stamped(square), side // 4
    inner = slice(edge, side - edge)
    made[:, :, inner, inner] = target(side)[:, :, inner, inner].to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(made[0].numpy().transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()
