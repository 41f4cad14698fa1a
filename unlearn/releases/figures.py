"""The figures of metrics.json and audit.json under flat names: metrics.unlearned.forget.cosine,
audit.membership.unlearned.auc."""

import math
from collections.abc import Iterator
from typing import Any

# Generators that a figure of the unlearned model is compared with, by what a gate calls them.
GENERATORS = {"base": "original", "oracle": "oracle"}
UNLEARNED = "unlearned"
# Figures of a row of metrics.json; those with an interval also as FIGURE_low and FIGURE_high.
_INTERVALS = ("fid", "is", "kid", "cosine", "psnr", "ssim", "lpips")
FIGURES = (
    "images", "is_std", "cosine_std",
    *(f"{name}{end}" for name in _INTERVALS for end in ("", "_low", "_high")),
)  # fmt: skip
# What figures of metrics.json must have in common to be compared.
CONVENTIONS = ("features", "resize", "guidance_scale")


def flat(metrics: dict[str, Any], audit: dict[str, Any] | None = None) -> dict[str, float]:
    """{name: figure} of both documents. A row of a list is named by its texts; a row under the main view also without
    the view.

    What is null or not finite is left out, and so is a name that two figures would have.
    """
    found: dict[str, list[float]] = {}
    main = next(iter(metrics.get("views", ())), None)
    rows = [row for row in metrics.get("rows", ()) if row.get("view") == main]
    short = {"rows": [{name: value for name, value in row.items() if name != "view"} for row in rows]}
    for name, value in [*_walk("metrics", metrics), *_walk("metrics", short), *_walk("audit", audit or {})]:
        found.setdefault(name, []).append(value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def counterpart(name: str, against: str) -> str | None:
    """The name of the same figure of the base or the oracle; None where the figure is not one of the unlearned
    model."""
    parts = name.split(".")
    if UNLEARNED not in parts:
        return None
    parts[parts.index(UNLEARNED)] = GENERATORS[against]
    return ".".join(parts)


def conventions(metrics: dict[str, Any]) -> dict[str, Any]:
    """How the figures of a metrics.json were measured, as far as others are compared with them."""
    return {key: metrics.get(key) for key in CONVENTIONS} | {"main view": next(iter(metrics.get("views", ())), None)}


def _walk(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _walk(name if name == "metrics" and key == "rows" else f"{name}.{key}", part)
    elif isinstance(value, list):
        for place, part in enumerate(value):
            if isinstance(part, dict):
                said = [text for text in part.values() if isinstance(text, str)]
                yield from _walk(".".join([name, *said] if said else [name, str(place)]), part)
            else:
                yield from _walk(f"{name}.{place}", part)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield name, float(value)
