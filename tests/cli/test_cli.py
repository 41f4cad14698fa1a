"""The command line as a user meets it: what works, and one clear message with exit code 2 for every mistake."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from support.command import refused
from support.images import tiny_table
from support.s3 import ADMIN, BUCKET

from unlearn import config
from unlearn.data import shards
from unlearn.data.storage import Storage
from unlearn.training import metrics

LIGHT = """
import sys
from unlearn.cli.app import main
try:
    main(["--help"])
except SystemExit:
    pass
print([m for m in ("torch", "ray", "timm", "pyarrow") if m in sys.modules])
import jobs.train
print([m for m in ("torchmetrics", "timm", "deepspeed", "ray") if m in sys.modules])
"""


def test_help_is_light():
    """No heavy import stands between the user and the help; nor, between them and a mistake in a run, what only its
    workers need."""
    out = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True).stdout
    assert "Usage" in out and out.rstrip().splitlines()[-2:] == ["[]", "[]"]


def test_version_models_methods_schema(told):
    from unlearn import __version__

    assert told("--version")[1].strip() == f"unlearn {__version__}"
    assert "vit_large_patch16" in told("models")[1]
    assert "encoder_l2" in told("methods")[1]
    assert json.loads(told("config", "schema")[1])["properties"]["method"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.zerostage=2", "training.zerostage: unknown key; did you mean zero_stage?"),
        ("training.lr=fast", "training.lr"),
        ("data.train=/nowhere", "/nowhere: no manifest.row_groups there"),
        ("data.forget.classes=[unicorn]", "no class 'unicorn'"),
        ("data.forget.classes=[]", "data.forget selects no image"),
        ("data.forget=null", "data.forget is missing"),
        ("data.retain={classes: [ant, bee]}", "overlap in 12 image(s), for example row 0 of row group 0 of"),
        ("data.forget.ids=[nobody]", "1 of 1 not found, for example number 1"),
        ("model.weights=/nowhere.pth", "/nowhere.pth"),
        ("model.weights=null", "model.weights is missing"),
        ("model.options={width: 32}", "encoder.cls_token has shape (1, 1, 16)"),
        ("model.family=gpt", "no model family 'gpt'; known: mae"),
        ("model.first_stage=/nowhere", "no weights at /nowhere"),
        ("method.name=pretrain_first_stage", "mae has no first stage that is trained here"),
        ("method.name=hope", "no method 'hope'; known: encoder_l2"),
        ("method.noise_region=hole", "never sees the hole"),
        ("evaluation.data=/nowhere", "/nowhere: no manifest.row_groups there"),
        ("evaluation.features=eyes", "no network 'eyes'; known: efficientnet_lite0"),
        ("evaluation.features=inception", "give its file as evaluation.features_weights"),
        ("evaluation.oracle=/nowhere", "no weights at /nowhere"),
        ("training.forget_fraction=0", "training.forget_fraction is 0"),
        ("cluster.workers=2", "engine torch is one process"),
    ],
)
def test_mistakes_in_the_config(told, written, override, message):
    assert message in refused(told, "run", written(override))


def test_convert_writes_what_other_libraries_read(told, tmp_path):
    folder = tmp_path / "theirs"
    out = told("convert", "embedded:mae-fashion", folder)[1]
    assert f"written: {folder}" in out
    assert f"loads with: transformers.ViTMAEForPreTraining.from_pretrained('{folder}')" in out
    assert json.loads((folder / "config.json").read_text())["model_type"] == "vit_mae"
    assert "is not empty: give a new folder" in refused(told, "convert", "embedded:mae-fashion", folder)
    assert "name it with --family" in refused(told, "convert", folder, tmp_path / "again")
    told("convert", folder, tmp_path / "again", "--family", "mae")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    told("convert", folder, tmp_path / "ours", "--family", "mae", "--ours", "--option", "norm_pix_loss=true")
    card = json.loads((tmp_path / "ours" / "model.json").read_text())
    assert card["options"]["norm_pix_loss"] is True and card["from"] == str(folder)
    told("convert", tmp_path / "ours", tmp_path / "half", "--dtype", "float16", "--option", "norm_pix_loss=false")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["norm_pix_loss"] is False
    size, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("again", "half"))
    assert half < 0.6 * size
    assert "--dtype int8: give one of float64" in refused(told, "convert", folder, tmp_path / "no", "--dtype", "int8")
    assert "--option depth: write it as key=value" in refused(
        told, "convert", folder, tmp_path / "no", "--family", "mae", "--option", "depth"
    )


def test_too_few_cpus_or_gpus(told, written):
    many = written("training.engine=deepspeed", "cluster.workers=4", "cluster.cpus_per_worker=500")
    assert "2000 CPUs are asked for" in refused(told, "run", many)
    gpus = written("training.engine=deepspeed", "cluster.gpus_per_worker=99")
    assert "99 GPUs are asked for" in refused(told, "run", gpus)


def test_no_such_file(told, tmp_path):
    assert "No such file" in refused(told, "run", tmp_path / "none.yaml")
    assert "no config.yaml in it" in refused(told, "report", tmp_path)
    assert "write it as key=value" in refused(
        told, "config", "show", "jobs/configs/demo_fashion.yaml", "--set", "alpha"
    )


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_a_shard_that_is_not_parquet(told, written, tmp_path, damage):
    folder = tmp_path / "shards"
    folder.mkdir()
    pq.write_table(tiny_table(0, 48), folder / "shard-0.parquet", row_group_size=8)
    shards.index(str(folder))
    data = (folder / "shard-0.parquet").read_bytes()
    (folder / "shard-0.parquet").write_bytes(data[: len(data) // 2] if damage == "truncated" else b"not parquet")
    path = written(f"data.train={folder}", "data.forget.classes=[0]")
    assert "shard-0.parquet: not the file of the manifest" in refused(told, "run", path)
    shards.save(replace(shards.load(str(folder)), values=""))
    assert "shard-0.parquet: truncated, or not Parquet" in refused(told, "run", path)
    assert "shard-0.parquet has" in refused(told, "shards", "verify", folder)


@pytest.fixture
def damaged(tmp_path) -> str:
    """The small data set with two images that do not decode."""
    table = tiny_table(0, 48).to_pylist()
    for row in (13, 20):
        table[row]["image"]["bytes"] = b"\x89PNG" + b"nonsense"
    folder = tmp_path / "damaged"
    folder.mkdir()
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(table, shards.SCHEMA), folder / "shard-0.parquet", row_group_size=8)
    shards.index(str(folder))
    return str(folder)


def test_images_that_do_not_decode(told, written, damaged):
    """Named by id; skipped and counted up to the limit."""
    options = [f"data.train={damaged}", "data.forget.classes=[0]", "training.steps=12", "training.batch_size=12"]
    err = refused(told, "run", written(*options, "data.max_bad_images=1"))
    assert "2 image(s) of" in err and "img-013" in err and "img-020" in err and "max_bad_images (now 1)" in err
    assert "2 of 48 images do not decode: img-013, img-020" in refused(told, "shards", "verify", damaged)
    path = written(*options, "data.max_bad_images=2", "method.name=pretrain")
    assert told("pretrain", path, "--set", f"run_dir={damaged}-run")[0] == 0
    assert metrics.read(f"{damaged}-run")[-1]["bad_images"] == 2
    assert json.loads(Path(f"{damaged}-run/bad_images.json").read_text()) == {"retain": ["img-013", "img-020"]}


def test_a_run_folder_in_use_and_a_checkpoint_of_another_config(told, written):
    path = written("method.name=pretrain")
    assert told("pretrain", path)[0] == 0
    assert "add --resume to go on" in refused(told, "pretrain", path)
    assert "another config" in refused(told, "pretrain", path, "--resume", "--set", "training.lr=0.5")
    assert told("pretrain", path, "--resume")[0] == 0


def test_a_loss_that_is_not_finite(told, written, tmp_path):
    """The last good checkpoint stays, the message says which loss."""
    path = written(
        "training.lr=1.0e+30", "training.clip=0", "training.checkpoint_every=1", "training.schedule=constant"
    )
    err = refused(told, "run", path)
    assert "retain loss is not finite; stopped before the update" in err
    assert (tmp_path / "run/checkpoints/step-00000001/COMMIT").exists()


def test_wrong_s3_credentials(told, written, s3_user):
    s3_user(("nobody", "nothing-secret"))
    err = refused(told, "run", written(f"data.train=s3://{BUCKET}/shards"))
    assert f"s3://{BUCKET}/shards" in err and "check" in err and "nothing-secret" not in err


def test_what_is_ignored_is_said(told, written):
    code, _, err = told(
        "config", "check", written(), "--set", "evaluation.features_weights=/x", "--set", "training.warmup_steps=9"
    )
    assert code == 0 and "evaluation.features_weights is ignored" in err and "warmup_steps 9 is not shorter" in err


def test_run_evaluate_report_show(told, written, tmp_path):
    """A run folder is enough for every later command."""
    code, out, _ = told("run", written())
    assert code == 0 and "report.html" in out and "efficientnet_lite0" in out
    folder = tmp_path / "run"
    assert json.loads((folder / "model/model.json").read_text())["family"] == "mae"
    (folder / "report.html").unlink()
    assert told("report", folder)[0] == 0 and (folder / "report.html").exists()
    assert told("evaluate", folder, "--set", "evaluation.limit=4")[0] == 0
    assert json.loads((folder / "metrics.json").read_text())["rows"][0]["images"] == 4
    assert config.parse(yaml.safe_load(told("config", "show", folder)[1])) == config.load(folder / "config.yaml")
    # The folder that is named is meant, also where it is a copy of the one in its config.
    copy = shutil.copytree(folder, tmp_path / "copy")
    (folder / "report.html").unlink(), (copy / "report.html").unlink()
    assert told("report", copy)[0] == 0 and (copy / "report.html").exists() and not (folder / "report.html").exists()


def test_everything_on_s3(told, written, tiny_shards, s3):
    """Shards, run folder, model and report on S3; no secret in anything that was written."""
    here, there, run = Storage(tiny_shards), Storage(f"{s3}/shards"), Storage(f"{s3}/run")
    for name in here.files():
        there.write(name, here.read(name))
    assert told("shards", "verify", f"{s3}/shards")[0] == 0
    code, out, err = told("run", written(f"data.train={s3}/shards", f"run_dir={s3}/run"))
    assert code == 0 and f"{s3}/run/report.html" in out
    assert {"config.yaml", "metrics.jsonl", "metrics.json", "report.html", "model/weights.safetensors"} <= set(
        run.files()
    )
    assert not any(ADMIN[1].encode() in run.read(name) for name in run.files()) and ADMIN[1] not in out + err
    assert told("report", f"{s3}/run")[0] == 0


def test_shards_commands(told, tmp_path, tiny_shards):
    import numpy as np
    from support.images import encode

    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.zeros((8, 8, 3), np.uint8)))
    code, out, _ = told("shards", "build", tmp_path / "images", tmp_path / "shards")
    assert code == 0 and "cat (2), dog (1)" in out
    assert "every checksum and every image is good" in told("shards", "verify", tmp_path / "shards")[1]
    assert "holds shards already" in refused(told, "shards", "build", tmp_path / "images", tmp_path / "shards")
    assert "48" in told("shards", "inspect", tiny_shards)[1]
