import pytest
import yaml

from unlearn import config
from unlearn.errors import ConfigError

BASE = {"run_dir": "runs/x", "data": {"train": "embedded:fashion-train"}, "training": {"steps": 10}}


def parse(*overrides: str) -> config.RunConfig:
    return config.parse(config.override(yaml.safe_load(yaml.safe_dump(BASE)), list(overrides)))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["trainig.steps=3"], "trainig: unknown key; did you mean training?"),
        (["data.forget.clases=[1]"], "data.forget.clases: unknown key; did you mean classes?"),
        (["train_views=[{sise: 0.3}]"], "train_views.0.sise: unknown key; did you mean size?"),
        (["zzz=1"], "zzz: unknown key; known keys: name, seed"),
        (["data.forget.classes=[no]"], "data.forget.classes.0: false is neither a label nor a name"),
        (["data.forget.exclude_classes=[1.0]"], "data.forget.exclude_classes.0: 1.0 is neither a label nor a name"),
        (["train_views=[{size: [0.6, 0.3]}]"], "give 0 < low <= high < 1"),
        (["train_views=[{size: 1.0}]"], "give 0 < low <= high < 1"),
        (["train_views=[{size: 0}]"], "give 0 < low <= high < 1"),
        (["train_views=[{kind: circle}]"], "train_views.0.kind: Input should be 'centre', 'outpaint'"),
        (["train_views=[]"], "train_views: List should have at least 1 item"),
        (["training.epochs=3"], "exactly one of steps and epochs"),
        (["training.steps=null"], "exactly one of steps and epochs"),
        (["training.engine=torch", "cluster.workers=4"], "set cluster.workers to 1 (now 4)"),
        (["training.batch_size=10", "cluster.workers=4"], "10 does not divide among 4 workers"),
        (
            ["training.batch_size=10", "training.micro_batch_size=4"],
            "not a multiple of micro_batch_size x workers = 4 x 1",
        ),
        (["training.micro_batch_size=1", "data.forget={}"], "one retain and one forget row"),
        (["data.retain={}", "data.proxy={}"], "give retain or proxy, not both"),
        (["data.proxy_data=x"], "data.proxy_data is given without data.proxy"),
        (["method.alpha=-1"], "method.alpha: Input should be greater than or equal to 0 (given: -1)"),
        (["training.lr=.nan"], "training.lr: Input should be a finite number"),
        (["training.betas=[0.9, 1.5]"], "training.betas.1: Input should be less than 1"),
        (["data.train='s3://'"], "data.train: name the bucket, as in s3://bucket/prefix"),
        (["name=a b"], "name: String should match pattern"),
        (["run_dir=null"], "run_dir: Input should be a valid string"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_the_remedy(overrides, message):
    with pytest.raises(ConfigError) as e:
        parse(*overrides)
    assert message in str(e.value)


def test_every_mistake_is_told_at_once():
    with pytest.raises(ConfigError) as e:
        parse("seed=-1", "method.noise=pink", "cluster.wrokers=2")
    assert all(word in str(e.value) for word in ("seed", "method.noise", "did you mean workers"))


def test_overrides_make_missing_parts_and_read_yaml_values():
    run = parse("data.forget.classes=[1, Bag]", "training.lr=3e-4", "method.noise=batch", "training.clip=0")
    assert run.data.forget.classes == [1, "Bag"] and run.training.lr == 3e-4
    assert run.method.noise == "batch" and run.training.clip == 0


@pytest.mark.parametrize("item", ["seed", "=3", "seed=[1", "a.b"])
def test_a_malformed_override_is_told(item):
    with pytest.raises(ConfigError, match="--set"):
        parse(item)


@pytest.mark.parametrize(
    "item",
    ["cluster.max_failures=0", "cluster.gpus_per_worker=1", "run_dir=elsewhere", "name=other", "data.train=copy/of/it",
     "data.cache=none", "data.cache_bytes=1GiB", "data.decode_threads=7", "data.read_ahead=1",
     "training.checkpoint_every=1", "training.log_every=1",
     "training.keep_checkpoints=9", "data.max_bad_images=3", "training.activation_checkpointing=true",
     "training.engine=torch", "training.zero_stage=3", "training.offload_optimizer=true",
     "evaluation.limit=5"],
)  # fmt: skip
def test_the_hash_ignores_where_and_how_it_runs(item):
    assert parse(item) != parse() and parse(item).hash() == parse().hash()


@pytest.mark.parametrize(
    "item",
    ["seed=1", "method.alpha=0.3", "method.noise=batch", "training.lr=0.2", "training.steps=11",
        "training.batch_size=32",
     "training.micro_batch_size=16", "training.dtype=bf16", "training.threads=2", "training.warmup_steps=2",
     "training.clip=0",
     "data.forget={classes: [1]}", "data.retain={limit: 5}", "data.shuffle_rows=7", "data.augment=crop_flip",
     "model.variant=vit_nano_patch4_32", "model.options={depth: 3}", "train_views=[{size: 0.25}]"],
)  # fmt: skip
def test_the_hash_tells_what_decides_the_weights(item):
    assert parse(item).hash() != parse().hash()


def test_the_hash_is_the_same_for_any_number_of_workers_with_the_same_micro_batch():
    fixed = "training.micro_batch_size=16"
    assert parse(fixed).hash() == parse(fixed, "cluster.workers=4").hash() == parse("cluster.workers=4").hash()


def test_sizes_are_numbers_or_text_and_the_default_is_the_same_on_every_machine():
    assert parse("data.cache_bytes=1.5GiB") == parse(f"data.cache_bytes={3 << 29}") and parse().data.cache_bytes is None
    assert "cache_bytes: null" in config.dump(parse())
    for wrong, why in (("large", "write it as 80GiB or 512MiB"), ("-1", "greater than or equal to 0")):
        with pytest.raises(ConfigError, match=f"data.cache_bytes: .*{why}"):
            parse(f"data.cache_bytes={wrong}")


def test_dump_and_load_round_trip(tmp_path):
    run = parse(
        "data.forget.ids=[a, b]", "train_views=[{kind: box, size: [0.2, 0.4]}]", "evaluation.views=[{size: 0.3}]"
    )
    (tmp_path / "run.yaml").write_text(config.dump(run))
    assert config.load(tmp_path / "run.yaml") == run
    assert config.load(tmp_path / "run.yaml", ["seed=4"]).seed == 4


def test_paths_become_absolute_and_other_places_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("run_dir=a/../b").run_dir == str(tmp_path / "b")
    for uri in ("s3://bucket/x", "embedded:fashion-test"):
        assert parse(f"data.train={uri}").data.train == uri
    # One folder has one name, by which jobs that write there are told apart.
    assert parse("run_dir=s3://bucket/x/").run_dir == "s3://bucket/x" and parse("run_dir=file:///x/").run_dir == "/x"


def test_locations_are_all_that_are_read_or_written():
    """Every field of that type, found in the schema of the classes."""
    parts = {name: field.annotation for name, field in config.RunConfig.model_fields.items()}
    wanted = {"run_dir"}
    for name, part in parts.items():
        fields = getattr(part, "__annotations__", {})
        wanted |= {f"{name}.{key}" for key, kind in fields.items() if kind in (config.Location, config.Location | None)}
    wanted.add("evaluation.oracle")  # or a list of several
    everything = [f"{key}=/a" for key in wanted] + ["data.proxy={}"]
    assert set(parse(*everything).locations()) == wanted and len(wanted) == 10
    several = parse("evaluation.oracle=[/a, /b]")
    assert several.evaluation.oracles == ["/a", "/b"] and several.locations()["evaluation.oracle.1"] == "/b"
    assert several.hash() == parse().hash()


@pytest.mark.parametrize(
    "text, message",
    [("a: [", "not YAML"), ("[1, 2]", "expected keys and values"), (None, "give the path of a YAML file")],
)
def test_a_file_that_is_no_config_is_told(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(path)


def test_nothing_can_be_changed_after_validation():
    with pytest.raises(ValueError, match="frozen"):
        parse().seed = 5


def test_another_method_leaves_the_options_of_the_former_behind(caplog):
    """Those that a file gave it, and that the new one lacks; never one that the user gives, or that no method has."""
    former = BASE | {"method": {"name": "encoder_l2", "alpha": 0.5, "noise": "batch", "saliency": 0.5}}

    def changed(*overrides: str, tree: dict = former) -> config.RunConfig:
        return config.parse(config.override(yaml.safe_load(yaml.safe_dump(tree)), list(overrides)))

    caplog.clear()
    run, again = (changed("method.name=decoupling", "method.threshold=2") for _ in range(2))
    kept = {"name": "decoupling", "saliency": 0.5, "threshold": 2, "climb": "all"}
    assert run == again and run.method.model_dump() == kept
    told = "method.name is decoupling now: left out method.alpha, method.noise, which was given for encoder_l2"
    assert caplog.messages == [told]
    written = BASE | {"method": {"name": "decoupling", "saliency": 0.5, "threshold": 2}}
    assert run.hash() == config.parse(written).hash()
    with pytest.raises(ConfigError, match="method.alpha: unknown key"):
        changed("method.name=decoupling", "method.alpha=0.1")
    with pytest.raises(ConfigError, match="method.alfa: unknown key"):
        changed("method.name=decoupling", tree=BASE | {"method": {"alfa": 1}})
    with pytest.raises(ConfigError, match="method.name: no method 'decuple'; known"):
        changed("method.name=decuple")
