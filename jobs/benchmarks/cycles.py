"""Ten cycles, from the base with all that was ever asked, beside the chained way: each from the model of the one
before, with what is new.

    python -m jobs.benchmarks.cycles [--cycles 10] [--steps 20] [--limit 50] [--seed 0] [--folder FOLDER]

Clothes of five classes are asked to be forgotten, half a class a cycle. Both ways are measured alike after each cycle:
on the images of the first request, and on held-out images of the classes that nobody asks for. Each way takes --steps a
cycle. At last one cycle from the base serves all requests at once, in as many steps as the chain has taken in all, with
its time by step. What has run is kept in --folder, so the same command goes on.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from jobs import cycle as job
from jobs import train
from jobs.pool import pool
from unlearn import certificate, config
from unlearn.config import Rows, RunConfig
from unlearn.cycles import cycle_file
from unlearn.cycles.cycle import Cycle
from unlearn.cycles.records import Records
from unlearn.data import selection, shards
from unlearn.data.storage import Storage
from unlearn.evaluation import measure
from unlearn.ledger.ledger import Ledger
from unlearn.run import resolve

CLASSES = ("Trouser", "Sandal", "Sneaker", "Bag", "Ankle boot")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        run = {
            "seed": options.seed, "model": {"weights": "embedded:mae-fashion"},
            "data": {"train": "embedded:fashion-train", "cache": "decoded"},
            "method": {"name": "encoder_l2", "alpha": 0.25},
            "training": {"engine": "torch", "steps": options.steps, "batch_size": 64, "lr": 1e-3, "warmup_steps": 10,
                "checkpoint_every": 1000},
            "evaluation": {"data": "embedded:fashion-test", "limit": options.limit, "views": [{"size": 0.5}]},
        }  # fmt: skip
        asked = requests(options.cycles)
        compare(run, asked, folder)
        at_once(run, asked)


def requests(count: int) -> list[list[str]]:
    """Ids of the images of each request: the halves of the classes, one after the other."""
    manifest = shards.load("embedded:fashion-train")
    table = manifest.table(["id", "label"]).to_pydict()
    halves = []
    for name in CLASSES:
        ids = [id for id, label in zip(table["id"], table["label"], strict=True) if manifest.classes[label] == name]
        halves += [ids[::2], ids[1::2]]
    return halves[:count]


def compare(run: dict, asked: list[list[str]], folder: Path) -> None:
    """Both ways, cycle by cycle."""
    quick = run | {"evaluation": run["evaluation"] | {"limit": 1}}  # what the cycle measures itself is not told here
    cycle, chained = opened(quick, folder / "base"), "embedded:mae-fashion"
    print("| cycle | first request: from base | chained | retain: from base | chained |\n|---|---|---|---|---|")
    for number, ids in enumerate(asked, 1):
        ended = ask(cycle, number, [ids])
        own = job.settings(cycle, job.opened(cycle, ended), 0)
        own = own.model_copy(
            update={"evaluation": own.evaluation.model_copy(update={"limit": run["evaluation"]["limit"]})}
        )
        after = {"base": figures(own, asked[0], f"{own.run_dir}/model")}
        forgotten = sorted(id for each in asked[:number] for id in each)
        chained = chain(run, ids, chained, str(folder / "chained" / str(number)))
        after["chained"] = figures(own, asked[0], chained)
        if number == 1:
            print(
                f"| before | {told(figures(own, asked[0], None), 'forget')} | | "
                f"{told(figures(own, asked[0], None), 'retain')} | |"
            )
        row = [told(after[way], name) for name in ("forget", "retain") for way in ("base", "chained")]
        print(f"| {number} ({len(forgotten)} images) | {' | '.join(row)} |", flush=True)


def opened(run: dict, folder: Path) -> Cycle:
    """A cycle with a ledger and keys of its own."""
    if not (folder / "releases.key").exists():
        certificate.generate(str(folder / "releases"))
        Ledger(str(folder / "ledger.sqlite"), create=True).database.close()
    places = {"cycle_dir": "cycles", "ledger": "ledger.sqlite", "releases": "releases", "key": "releases.key"}
    return cycle_file.parse({key: str(folder / name) for key, name in places.items()} | {"run": run})


def ask(cycle: Cycle, number: int, asked: list[list[str]]) -> str:
    """Record requests and serve them, if that was not done before; the id of the cycle."""
    with Ledger(cycle.ledger) as ledger:
        if len(ledger.requests()) < number:
            ledger.add([{"forget": {"ids": ids}} for ids in asked])
    job.run(cycle)
    return list(Records(cycle.cycle_dir).all())[number - 1].id


def chain(run: dict, ids: list[str], weights: str, folder: str) -> str:
    """One step of the chained way: forget these images alone, from the model before; the folder of its model."""
    tree = run | {"run_dir": folder, "model": {"weights": weights}, "data": run["data"] | {"forget": {"ids": ids}}}
    if not Storage(folder).is_file("model/model.json"):
        train.train(train.prepare(config.parse(tree), resume=True))
    return f"{folder}/model"


def figures(settings: RunConfig, first: list[str], model: str | None) -> dict[str, dict]:
    """{set: row of figures} of a model, None being the base, on the first request and on the classes that nobody asks
    for."""
    with tempfile.TemporaryDirectory() as scratch:
        if model is not None:
            os.symlink(model, f"{scratch}/model")
        data = settings.data.model_copy(update={"forget": Rows(classes=list(CLASSES))})
        settings = settings.model_copy(update={"run_dir": scratch, "data": data})
        run = resolve(settings, measured=True)
        rows = selection.select(
            run.sets["forget"].manifest, Rows(ids=first, limit=settings.evaluation.limit), 0, "forget"
        )
        run = replace(run, measured=run.measured | {"forget": rows})
        models = (
            {"original": settings.model}
            if model is None
            else {"unlearned": settings.model.model_copy(update={"weights": model})}
        )
        with pool(measure.Measurer, run, models, True, cluster=settings.cluster, workers=1, here=True) as mapped:
            document, _ = measure.evaluate(run, models, mapped, [])
        return {row["set"]: row for row in document["rows"]}


def told(rows: dict[str, dict], name: str) -> str:
    return f"{rows[name]['cosine']:.3f}, {rows[name]['psnr']:.1f} dB"


def at_once(run: dict, asked: list[list[str]]) -> None:
    """Figures of a cycle that serves all requests at once in the steps of the whole chain, and its time by step."""
    run = run | {"training": run["training"] | {"steps": run["training"]["steps"] * len(asked)}}
    with tempfile.TemporaryDirectory() as scratch:
        cycle = opened(run, Path(scratch))
        with Ledger(cycle.ledger) as ledger:
            ledger.add([{"forget": {"ids": ids}} for ids in asked])
        ended = job.run(cycle)
        own = job.settings(cycle, ended.selection, 0)
        after = figures(own, asked[0], f"{own.run_dir}/model")
    print(f"| all at once, {own.training.steps} steps | {told(after, 'forget')} | | {told(after, 'retain')} | |")
    seconds = ended.seconds
    whole, work = sum(seconds.values()), seconds["train"] + seconds["evaluate"]
    steps = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(
        f"\none cycle that serves {len(asked)} requests: {whole:.0f} s ({steps}); {1 - work / whole:.1%} is neither "
        "training nor evaluating"
    )


if __name__ == "__main__":
    main()
