"""A comparison on a real Ray cluster of this machine: tuned, run, and gone on with where something is missing."""

from pathlib import Path

import pytest
from support.runs import export, tiny_config
from support.workers import together

from jobs import compare as job
from unlearn.data.storage import Storage
from unlearn.search import compare as comparisons
from unlearn.search.records import Trials

STEPS = ["training.engine=deepspeed", "training.micro_batch_size=8", "training.clip=0", "training.weight_decay=0"]


@pytest.mark.slow
def test_methods_are_tuned_and_compared_and_it_goes_on(tiny_shards, tiny_model, tmp_path):
    run = tiny_config("unused", tiny_shards, tiny_model, *STEPS, "cluster.cpus_per_worker=0.5")
    found = comparisons.parse({
        "compare_dir": str(tmp_path / "compare"), "run": run.model_dump(mode="json", exclude_defaults=True),
        "concurrent": 2,
        "methods": {
            "paper": {"method": {"name": "encoder_l2"}, "tune": {"method.alpha": [0.25, 1.0]}},
            "saliency": {"method": {"name": "encoder_l2", "saliency": 0.5}, "tune": {"method.alpha": [0.25, 1.0]}},
            "too fast": {"method": {"name": "max_loss"}, "set": {"training.lr": 1e30},
                "tune": {"method.alpha": [0.25, 1.0]}},
        },
        "tune": {"limit": 8, "choose": ["retain.cosine.drop"]}, "seeds": [0, 1], "audit": {"tests": ["membership"]},
    })  # fmt: skip
    job.prepare(found)
    told = []
    document = job.compare(found, lambda *now: told.append(now))
    rows = {row["method"]: row for row in document["rows"]}
    assert [rows[name]["done"] for name in ("paper", "saliency", "too fast")] == [2, 2, 0]
    audits = {"verdicts": {"NOT SHOWN": 2}, "failed": {}, "broken": 0, "message": None}
    assert rows["paper"]["audits"] == audits, "there are no held-out images"
    assert "not finite" in rows["too fast"]["failed"] and ("comparing", 6, 6) in told and ("tuning", 6, 6) in told

    final = Storage(found.final({label: rows[label]["options"] for label in found.methods}).sweep_dir)
    trials = {trial.id: trial for trial in Trials(final).all()}
    gone = next(trial for trial in trials.values() if trial.seed == 1 and trial.status == "done")
    before = Path(final.where(f"{gone.run}/model/weights.safetensors")).read_bytes()
    final.delete(f"trials/{gone.id}.json")
    final.delete(gone.run)
    again = job.compare(found)
    assert Path(final.where(f"{gone.run}/model/weights.safetensors")).read_bytes() == before
    assert {t.id: t.ended for t in Trials(final).all() if t.id != gone.id} == {
        t.id: t.ended for t in trials.values() if t.id != gone.id
    }
    figures = ("forget.cosine", "retain.cosine")
    for row in again["rows"]:
        assert [row["figures"].get(f) for f in figures] == [rows[row["method"]]["figures"].get(f) for f in figures]

    # A run of the comparison is the run that its configuration says, without Ray or a worker that has run others
    # before.
    stage = found.final({label: rows[label]["options"] for label in found.methods})
    alone = stage.of(gone.parameters, gone.seed, gone.model, gone.id).model_copy(
        update={"run_dir": str(tmp_path / "alone")}
    )
    together([alone], 1)
    assert Path(export(alone), "weights.safetensors").read_bytes() == before
