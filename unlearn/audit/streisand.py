"""Streisand: do the outputs themselves say what was forgotten?

A classifier is asked to tell what a model makes of forget images from what it makes of images that no model has seen.
It looks at low-level statistics of the hole alone (brightness, contrast, roughness, the seam at its edge), not at what
is shown there: noise, grey or speckle give a forgotten image away, a plausible filling does not. A second figure asks
how unusually they miss the true image, among what the model makes of retained images. The reference is in both how well
the oracle's outputs are told apart.
"""

import numpy as np
import torch
from pydantic import Field

from unlearn.audit import linear, statistics
from unlearn.audit.base import AuditTest, Figure, Measured, Piece, Rule
from unlearn.audit.bench import Bench
from unlearn.audit.subject import Subject
from unlearn.config import Part, Positive, ViewSpec


class StreisandOptions(Part):
    """Of the Streisand check."""

    view: ViewSpec = Field(default=ViewSpec(size=0.5), description="what is hidden")
    folds: Positive = Field(default=5, ge=2, description="of cross-validation")
    ridge: float = Field(default=0.01, gt=0, description="penalty of the classifier")
    margin: float = Field(default=0.05, gt=0, description="AUC above the oracle's that is allowed")


class Streisand(AuditTest):
    """Whether outputs on the forget set can be told from outputs on what no model has seen."""

    name = "streisand"
    title = "Streisand check"
    shows = (
        "Whether someone who sees outputs alone could tell which images were forgotten, since the model paints "
        "conspicuously on them."
    )
    hides = (
        "A conspicuousness that is not in simple statistics of the filled hole; and what images of really "
        "unseen classes look like, where `unseen` names none."
    )
    cost = "2 x images reconstructions"
    needs = ("forget", "unseen", "retain_new")
    schema = 2
    Options = StreisandOptions
    options: StreisandOptions

    def pieces(self, subject: Subject) -> list[Piece]:
        return self.batches(subject, self.needs)

    def measure(self, piece: Piece, bench: Bench) -> dict[str, np.ndarray]:
        kept, pixels = bench.pixels(piece.what, piece.start, piece.stop)
        view = bench.view(self.options.view, 0, piece.what, kept)
        made = bench.compared.reconstruct(piece.generator, pixels, view)
        hidden = view.pixel_mask(bench.size)
        seen = looks(made, hidden)
        return {"looks": seen.cpu().numpy(), "off": (seen - looks(pixels.float() / 255, hidden)).cpu().numpy()}

    def figures(self, measured: Measured, subject: Subject) -> list[Figure]:
        known, unusual, options = {}, {}, self.options
        usual = min(len(measured[g, "retain_new"]["off"]) for g in subject.models)
        absent = "" if usual > 1 else "it takes two held-out images of the retained classes"
        for generator in subject.models:
            forgotten, unseen = (measured[generator, name]["looks"] for name in self.needs[:2])
            told = linear.crossed(forgotten, unseen, options.ridge, options.folds, subject.settings.seed)
            known[generator] = subject.estimate(statistics.auc, *told)
            if absent:
                continue
            off, kept = (measured[generator, name]["off"] for name in ("forget", "retain_new"))
            distances = (_unusual(x, kept[::2]) for x in (off, kept[1::2]))
            unusual[generator] = subject.estimate(statistics.auc, *distances)
        note = (
            ""
            if subject.settings.unseen
            else "Unseen images are retained ones on their side: no shards of unseen classes are named (`unseen`)."
        )
        rule = Rule("above", options.margin, power=False, most=1.0)
        title = "how outputs miss the truth, on forget images against retained ones: AUC"
        return [
            Figure("auc", "outputs on forget images against outputs on unseen ones: AUC", known, rule, note=note),
            Figure("unusual", title, unusual, rule, absent=absent),
        ]


def _unusual(rows: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """(N,) squared Mahalanobis distance of rows to what is usual."""
    mean, scale = usual.mean(0), usual.std(0).clip(1e-9)
    x, known = (rows - mean) / scale, (usual - mean) / scale
    inverse = np.linalg.inv(known.T @ known / len(known) + 0.01 * np.eye(known.shape[1]))
    return np.einsum("ni,ij,nj->n", x, inverse, x)


def looks(made: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(B, 17) statistics of what was filled in. made: (B, 3, S, S) in [0, 1]; hidden: (B, 1, S, S) bool."""
    made = made.double()
    inside, outside = _of(made, hidden.double()), _of(made, (~hidden).double())
    dark, bright = (made < 0.02) & hidden, (made > 0.98) & hidden
    columns = [*inside.values(), *outside.values(), _seam(made, hidden)]
    columns += [share.double().mean((1, 2, 3)) for share in (dark, bright)]
    columns += [(inside[name] + 0.01).log() - (outside[name] + 0.01).log() for name in ("contrast", "roughness")]
    return torch.stack(columns, 1)


def _of(made: torch.Tensor, where: torch.Tensor) -> dict[str, torch.Tensor]:
    """(B,) statistics each of the pixels where `where`, (B, 1, S, S), is 1."""
    count = where.sum((1, 2, 3)).clamp_min(1)[:, None]
    mean = (made * where).sum((2, 3)) / count
    variance = ((made - mean[:, :, None, None]).square() * where).sum((2, 3)) / count
    grey = made.mean(1, keepdim=True)
    steps = []
    for axis in (2, 3):
        both = where.narrow(axis, 1, where.shape[axis] - 1) * where.narrow(axis, 0, where.shape[axis] - 1)
        steps.append((grey.diff(dim=axis).abs() * both).sum((1, 2, 3)) / both.sum((1, 2, 3)).clamp_min(1))
    return {
        "brightness": mean.mean(1), "contrast": variance.mean(1).sqrt(),
        "colour": (mean - mean.mean(1, keepdim=True)).square().mean(1).sqrt(),
        "steps down": steps[0], "steps across": steps[1], "roughness": _rough(grey, where),
    }  # fmt: skip


def _rough(grey: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """(B,) mean absolute Laplacian over the pixels whose neighbours are there too."""
    kernel = torch.tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=grey.dtype, device=grey.device)[None, None]
    whole = torch.nn.functional.conv2d(where, torch.ones_like(kernel)) > 8.5
    bent = torch.nn.functional.conv2d(grey, kernel).abs() * whole
    return bent.sum((1, 2, 3)) / whole.sum((1, 2, 3)).clamp_min(1)


def _seam(made: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(B,) mean absolute step between a hidden pixel and a visible one beside it."""
    steps, count = 0.0, 0.0
    for axis in (2, 3):
        size = made.shape[axis] - 1
        edge = hidden.narrow(axis, 1, size) ^ hidden.narrow(axis, 0, size)
        steps = steps + (made.diff(dim=axis).abs() * edge).sum((1, 2, 3)) / 3
        count = count + edge.sum((1, 2, 3))
    return steps / torch.as_tensor(count).clamp_min(1)
