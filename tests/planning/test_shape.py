"""The shape of a model is found without reading a weight, and also where the weights, the VAE and the data are not
here."""

import json
import shutil
from pathlib import Path

import pytest
from support.command import refused
from support.models import SMALL, build

import jobs
from unlearn import config
from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, weights
from unlearn.planning import cost, footprint, memory
from unlearn.planning.shape import model_options

CONFIGS = sorted(
    p
    for p in Path(jobs.__file__).with_name("configs").glob("*.yaml")
    if not p.name.startswith(("sweep_", "cycle_", "compare_"))
)


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """Stand in an empty folder: the weights and the data of the configs are at paths relative to it."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_planned_without_weights_and_data(path, nothing_here):
    settings = config.load(path)
    options, note = model_options(settings.model)
    given = [uri for uri in (settings.model.weights, settings.model.first_stage) if uri and "embedded" not in uri]
    assert (
        note is None
        if not given
        else all(uri in note for uri in given) and f"model.variant {settings.model.variant}" in note
    )
    assert options == base.options(settings.model) or not given
    strategy = memory.strategy(settings)
    precision = memory.precision(settings, strategy)
    measured = footprint.measure(settings, settings.micro_batch, precision, strategy.checkpointing, options)
    needed = memory.estimate(measured, strategy, precision, settings.cluster.workers, settings.accumulation, cuda=True)
    assert (
        measured.trained.count
        and needed.total > measured.trained.count
        and cost.work(settings, options=options).step > 0
    )


def test_several_configs_are_planned_in_turn(told, nothing_here):
    first, second = (str(path) for path in CONFIGS if path.stem in ("mage_fashion", "migan_fashion"))
    code, out, _ = told("plan", first, second)
    assert code == 0 and out.count("advice:") == 2 and f"== {second}" in out
    assert out.count("note: not here: model.weights") == 2 and "is model.variant migan_nano_32" in out
    broken = refused(told, "plan", first, second, "--set", "model.variant=null")
    assert broken.count("no weights at") == 2 and "known: mage_vit_base" in broken and "known: migan_512" in broken


def test_without_weights_and_without_a_variant_there_is_no_shape(tmp_path):
    with pytest.raises(
        WeightsError, match="no weights at /nowhere.*or name model.variant, to plan without weights; known: vit_base"
    ):
        model_options(config.Model(weights="/nowhere"))
    with pytest.raises(ConfigError, match="no variant 'vit_enormous'"):
        model_options(config.Model(weights="/nowhere", variant="vit_enormous"))
    options, note = model_options(config.Model(weights="/nowhere", variant="vit_large_patch16"))
    assert options.width == 1024 and note.startswith("not here: model.weights /nowhere;")


def test_weights_on_a_server_that_does_not_answer_are_not_here(s3_user):
    s3_user(("A", "S"), url="http://127.0.0.1:1")
    options, note = model_options(config.Model(weights="s3://bucket/model", variant="vit_large_patch16"))
    assert options.width == 1024 and "s3://bucket/model" in note
    with pytest.raises(WeightsError, match="no S3 server answers.*or name model.variant"):
        model_options(config.Model(weights="s3://bucket/model"))


@pytest.mark.parametrize("shape", SMALL)
def test_a_folder_of_ours_says_its_shape(shape, tmp_path):
    model = build(shape)
    weights.write(model, str(tmp_path), {})
    (tmp_path / weights.WEIGHTS).unlink()
    asked = config.Model(family=model.family, weights=str(tmp_path), first_stage="/nowhere")
    assert model_options(asked) == (
        model.options,
        "not here: model.first_stage /nowhere; the shape planned for is that of model.weights",
    )
    card = tmp_path / weights.CARD
    other = "migan" if model.family == "mae" else "mae"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"family": other}))
    with pytest.raises(WeightsError, match=f"holds a model of family {other}, the config says {model.family}"):
        model_options(asked)
    card.write_text("{")
    with pytest.raises(WeightsError, match="model.json is damaged"):
        model_options(asked)


def test_a_variant_that_contradicts_the_weights_is_refused_before_the_run(tiny_model):
    with pytest.raises(ConfigError, match="has another .* than .* was made with: leave model.variant out"):
        model_options(config.Model(weights=tiny_model, variant="vit_large_patch16"))


@pytest.mark.parametrize("shape", ["mae", "diffusion_pixel", "diffusion_flux"])
@pytest.mark.parametrize("at", ["here", "s3"])
def test_a_folder_of_another_library_says_its_shape_without_its_weights(shape, at, tmp_path, request):
    model = build(shape)
    model.to_folder(tmp_path)
    options = {"image_size": 32, **({} if shape == "mae" else {"grid": 4, "sampling_steps": 2})}
    known = config.Model(family=model.family, weights=str(tmp_path), options=options)
    expected = weights.build(known).options
    for path in [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.bin")]:
        if path.name != "prompt.safetensors":
            path.unlink()
    if at == "s3":
        known = known.model_copy(update={"weights": uploaded(tmp_path, request.getfixturevalue("s3"))})
    assert model_options(known) == (expected, None)


def uploaded(folder: Path, uri: str) -> str:
    from unlearn.data.storage import Storage

    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        Storage(uri).write(path.relative_to(folder).as_posix(), path.read_bytes())
    shutil.rmtree(folder)
    return uri
