"""Sweeps whose records are written by hand, as a driver would have left them."""

import math
from typing import Any

import torch

from support.runs import tiny_config
from unlearn.data.storage import Storage
from unlearn.search import sweep_file
from unlearn.search.objectives import derived
from unlearn.search.records import Trial, Trials
from unlearn.search.space import Sweep

ALPHAS, SIZES, SEEDS = [0.01, 0.05, 0.25, 1.0], [10, 40, 160, 600], [0, 1, 2]


def grid_sweep(folder, **changes: Any) -> Sweep:
    """Four alphas by four sizes by three seeds, on the demo's run."""
    return sweep_file.parse({
        "sweep_dir": str(folder), "name": "fashion", "run": "jobs/configs/demo_fashion.yaml",
        "search": {"method.alpha": {"grid": ALPHAS}, "data.forget.per_class": {"grid": SIZES}}, "seeds": SEEDS,
        "objectives": {"retain.cosine": "maximise", "forget.cosine.to_oracle": "minimise"},
        "constraints": ["retain.cosine.drop <= 0.06"], "search_by": "grid",
    } | changes)  # fmt: skip


def tiny_tree(folder, tiny_shards, tiny_model, *overrides: str, **keys) -> dict[str, Any]:
    """A sweep of the tiny run; overrides: of the run."""
    steps = ("training.engine=deepspeed", "training.micro_batch_size=8", "evaluation.limit=null")
    run = tiny_config("unused", tiny_shards, tiny_model, *steps, *overrides)
    return {
        "sweep_dir": str(folder), "run": run.model_dump(mode="json", exclude_defaults=True), "tune_on": {"limit": 8},
        "objectives": {"retain.cosine.drop": "minimise", "forget.cosine.drop": "maximise"},
        "search": {"method.alpha": {"grid": [0.25, 1.0]}}, "search_by": "grid", **keys,
    }  # fmt: skip


def trial(point: str, seed: int, parameters: dict[str, Any], forget: float, retain: float, **changes: Any) -> Trial:
    """A trial that is done, with these cosines; the original has 0.77 and 0.78, the oracle 0.6 and 0.775."""
    original, oracle = {"forget.cosine": 0.77, "retain.cosine": 0.78}, {"forget.cosine": 0.6, "retain.cosine": 0.775}
    figures = derived({"forget.cosine": forget, "retain.cosine": retain}, original, oracle)
    id = f"{point}-s{seed}-m0"
    made = {
        "id": id, "point": point, "seed": seed, "model": None, "parameters": parameters, "status": "done",
        "run": f"runs/{id}", "figures": figures, "original": original, "oracle": oracle,
    }  # fmt: skip
    times = {"started": "2026-11-25T10:00:00+00:00", "ended": f"2026-11-25T10:{int(point[1:]):02d}:{seed:02d}+00:00"}
    seconds = {"start": 8.0 if seed == 0 else 0.5, "train": 11.0, "measure": 4.0, "other": 0.5}
    return Trial(**made | times | {"seconds": seconds, "warm": seed > 0} | changes)


def grid_trials() -> list[Trial]:
    """Records of `grid_sweep`: forgetting grows with alpha and size, and costs; one trial of p005 has failed."""
    made = []
    for number, (alpha, size) in enumerate((a, s) for a in ALPHAS for s in SIZES):
        for seed in SEEDS:
            noise = (seed - 1) * 0.004
            forget = 0.77 - 0.25 * (1 - math.exp(-3 * alpha * math.log10(size))) + noise
            retain = 0.78 - 0.025 * alpha * math.log10(size) + noise / 3
            failed = {"status": "failed", "message": "the loss is not finite at step 12", "figures": {}}
            given = {"method.alpha": alpha, "data.forget.per_class": size}
            made.append(
                trial(f"p{number:03d}", seed, given, forget, retain, **(failed if (number, seed) == (5, 1) else {}))
            )
    return made


def write(sweep: Sweep, trials: list[Trial]) -> None:
    """The folder of a sweep with these records."""
    storage = Storage(sweep.sweep_dir)
    storage.write("sweep.yaml", sweep_file.dump(sweep).encode())
    for one in trials:
        Trials(storage).write(one)


def grids(points: list[str], sets: tuple[str, ...] = ("retain",)) -> dict[str, list[dict]]:
    """Picture grids of these points, of two images: what the points have in common is the same."""
    image = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).remainder(251).to(torch.uint8)
    return {
        point: [
            {
                "set": name, "labels": ["Coat", "Shirt"],
                "columns": [("the image", image), ("unlearned model", (image + number).to(torch.uint8))],
            }
            for name in sets
        ]
        for number, point in enumerate(points)
    }  # fmt: skip
