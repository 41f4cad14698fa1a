"""Weights in and out: what does not fit is named, nothing is unpickled, a folder comes back as it was written."""

import hashlib
import json
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.memory import peak
from support.models import SMALL, TINY
from support.models import build as build_small

from unlearn import config
from unlearn.data import node_cache
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, StorageError, WeightsError
from unlearn.models import base, tensor_files, weights
from unlearn.planning.shape import model_options

MODEL = config.Model(options=TINY)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return weights.build(MODEL, seed=5).state_dict()


def build(uri, **changes):
    return weights.build(config.Model(weights=str(uri), **changes))


def test_a_folder_of_ours_round_trips_here_and_on_s3(place):
    model = weights.build(MODEL, seed=5).double()
    weights.write(model, place, {"run": "test"})
    assert Storage(place).files() == ["model.json", "weights.safetensors"]
    tensors, card = weights.read(place)
    assert card["family"] == "mae" and card["run"] == "test" and card["options"]["width"] == 16
    back = build(place)
    assert not back.training and all(torch.equal(t, tensors[n]) for n, t in back.state_dict().items())
    assert all(
        torch.equal(t.float(), tensors[n]) and tensors[n].dtype == torch.float32 for n, t in model.state_dict().items()
    )
    with pytest.raises(WeightsError, match="encoder.blocks.2.norm1.weight"):
        build(place, options={"depth": 3})


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "nested", "legacy"])
def test_a_single_file_loads_with_the_shape_given(tensors, tmp_path, place, suffix):
    path = tmp_path / ("w.safetensors" if suffix == "safetensors" else "w.pth")
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(
            {"state_dict": tensors} if suffix == "nested" else tensors,
            path,
            _use_new_zipfile_serialization=suffix != "legacy",
        )
    Storage(place).write(path.name, path.read_bytes())
    model = build(f"{place}/{path.name}", options=TINY)
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())


def test_every_tensor_that_does_not_fit_is_named(tensors, tmp_path):
    wrong = {n: t for n, t in tensors.items() if n != "encoder.cls_token"} | {"head.weight": torch.zeros(2)}
    wrong["decoder.pred.bias"] = torch.zeros(3)
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as e:
        build(tmp_path / "w.safetensors", options=TINY)
    for words in (
        "missing encoder.cls_token",
        "unexpected head.weight",
        "decoder.pred.bias has shape (3,), the model wants (192,)",
    ):
        assert words in str(e.value)
    assert "model.variant or model.options" in str(e.value)
    with pytest.raises(WeightsError, match="and [0-9]+ more"):
        build(tmp_path / "w.safetensors")


class Attack:
    """A pickle that runs a command when it is loaded the ordinary way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tensors, tmp_path):
    pwned = tmp_path / "pwned"
    torch.save({"model": tensors, "args": Attack(pwned)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"model": Attack(pwned)}))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(WeightsError, match=f"{name} cannot be read as weights"):
            build(tmp_path / name, options=TINY)
        assert not pwned.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"text" * 99, lambda d: b"PK\x03\x04" + b"\0" * 99]
)
def test_a_damaged_file_is_told(tensors, tmp_path, name, damage):
    path = tmp_path / name
    save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(WeightsError, match=f"{name} cannot be read as weights"):
        build(path, options=TINY)


def test_a_file_without_tensors_is_told(tmp_path):
    for content in ([1, 2], {"model": {"a": 1}}, {"a": "text"}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match="holds no dictionary of tensors"):
            build(tmp_path / "w.pth", options=TINY)
    torch.save({"gen": {"a": torch.ones(1)}, "disc": {"a": torch.ones(1)}, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds several models: gen, disc; save one of them alone"):
        build(tmp_path / "w.pth", options=TINY)
    torch.save({"gen": {"a": torch.ones(1)}, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"holds other tensors \(such as encoder.a\) than this model.* another kind"):
        build(tmp_path / "w.pth", options=TINY)


@pytest.mark.parametrize("card", ["{", "[]", '{"family": "mae", "options": 3}', "\udcff"])
def test_a_damaged_card_is_told(tensors, place, card):
    weights.write(weights.build(MODEL), place, {})
    Storage(place).write("model.json", card.encode(errors="surrogateescape"))
    with pytest.raises(WeightsError, match="model.json is damaged"):
        build(place)


def test_another_family_and_nothing_at_all_are_told(place):
    with pytest.raises(WeightsError, match="no weights at .*give a .safetensors or .pth file, or a folder"):
        build(place)
    weights.write(weights.build(MODEL), place, {"family": "unet"})
    with pytest.raises(WeightsError, match="holds a model of family unet, the config says mae"):
        build(place)
    Storage(place).delete("weights.safetensors")
    Storage(place).write("model.json", b'{"family": "mae", "options": {}}')
    with pytest.raises(StorageError, match="weights.safetensors: there is no such"):
        build(place)


def test_a_variant_must_not_contradict_what_the_weights_say_of_themselves(tmp_path):
    model = weights.build(config.Model(variant="vit_nano_patch4_32", options={"mean": [0.2, 0.2, 0.2]}))
    weights.write(model, str(tmp_path), {})
    found = weights.build(config.Model(variant="vit_nano_patch4_32", weights=str(tmp_path)))
    assert found.options == model.options  # the mean too, of which the variant says nothing
    with pytest.raises(
        ConfigError,
        match="model.variant vit_micro_patch8_64 has another .* than .* was made with: leave model.variant out",
    ):
        weights.build(config.Model(variant="vit_micro_patch8_64", weights=str(tmp_path)))


def test_a_variant_and_a_family_that_do_not_exist_are_told():
    with pytest.raises(ConfigError, match="mae has no variant 'vit_giant'; known: vit_base_patch16"):
        weights.build(config.Model(variant="vit_giant"))
    with pytest.raises(ConfigError, match="no model family 'gan'; known: mae"):
        weights.build(config.Model(family="gan"))


ODD = {
    "a": torch.arange(3, dtype=torch.float32), "b": torch.randn(5, 7).double(), "c": torch.randn(16, 4),
    "d": torch.tensor(2.5),
    "e": torch.tensor([True, False]), "f": torch.arange(6).view(2, 3).T, "g": torch.randn(4, 5).bfloat16(),
    "h": torch.zeros(0, 3),
    "i": torch.arange(5, dtype=torch.uint8), "j": torch.randn(8, 8).half(),
}  # fmt: skip


def test_a_written_file_is_safetensors_with_its_sha256(tmp_path):
    digest = tensor_files.save(ODD, tmp_path / "t.safetensors", metadata={"format": "pt"})
    assert digest == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
    back = load_file(tmp_path / "t.safetensors")
    assert back.keys() == ODD.keys()
    assert all(
        torch.equal(back[n], t) and back[n].dtype == t.dtype and back[n].shape == t.shape for n, t in ODD.items()
    )
    tensor_files.save(ODD, tmp_path / "f.safetensors", floats=torch.float32)
    back = load_file(tmp_path / "f.safetensors")
    assert all(back[n].dtype == (torch.float32 if t.is_floating_point() else t.dtype) for n, t in ODD.items())
    assert torch.equal(back["b"], ODD["b"].float())


def test_the_card_names_the_sha256_and_another_file_is_refused(place):
    weights.write(weights.build(MODEL), place, {})
    content = Storage(place).read("weights.safetensors")
    assert (
        json.loads(Storage(place).read("model.json"))["sha256"]
        == hashlib.sha256(content).hexdigest()
        == weights.fingerprint(place)
    )
    Storage(place).write("weights.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        WeightsError, match="weights.safetensors is not the file that model.json beside it was written with"
    ):
        weights.locate(place)


def test_fingerprints_are_those_of_the_bytes(tensors, tmp_path):
    save_file(tensors, tmp_path / "w.safetensors")
    digest = hashlib.sha256((tmp_path / "w.safetensors").read_bytes())
    assert weights.fingerprint(str(tmp_path / "w.safetensors")) == digest.hexdigest()
    folder = tmp_path / "theirs"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "w.bin").write_bytes(b"12")
    whole = hashlib.sha256()
    for name, content in (("model_index.json", b"{}"), ("unet/w.bin", b"12")):
        whole.update(name.encode() + hashlib.sha256(content).digest())
    assert weights.fingerprint(str(folder)) == whole.hexdigest()


def test_a_folder_without_tensors_is_not_read_through(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard.parquet").write_bytes(b"0")
    for call in (weights.locate, weights.read, build):
        with pytest.raises(WeightsError, match="no weights at .*data: give"):
            call(str(tmp_path / "data"))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[str, int]:
    """(a folder of ours with some 110 MiB of weights, their bytes)."""
    folder = str(tmp_path_factory.mktemp("large") / "model")
    model = weights.build(
        config.Model(options={"width": 768, "depth": 3, "decoder_width": 256, "decoder_depth": 2, "image_size": 64})
    )
    weights.write(model, folder, {})
    return folder, Path(folder, "weights.safetensors").stat().st_size


def test_a_model_takes_the_memory_of_what_is_written_to_and_its_file_none(large, tmp_path):
    folder, size = large
    student, built = peak(lambda: build(folder))
    teacher, again = peak(lambda: build(folder))
    assert built < 0.1 * size and again < 0.1 * size
    with torch.no_grad():
        _, trained = peak(lambda: [p.add_(1) for p in student.encoder.parameters()])
    encoder = sum(p.numel() * p.element_size() for p in student.encoder.parameters())
    assert 0.9 * encoder < trained < 1.1 * encoder
    assert torch.equal(
        student.encoder.norm.weight, teacher.encoder.norm.weight + 1
    )  # the teacher has not moved with it
    _, written = peak(lambda: weights.write(student, str(tmp_path / "out"), {}))
    assert written < 0.2 * size
    half = teacher.bfloat16()
    _, converted = peak(lambda: weights.write(half, str(tmp_path / "half"), {}))  # one tensor at a time
    assert converted < 0.5 * size


@pytest.mark.parametrize("kind", ["pth", "bfloat16"])
def test_of_other_files_too_there_are_no_two_copies(large, tmp_path, kind):
    folder, size = large
    tensors = load_file(f"{folder}/weights.safetensors")
    if kind == "pth":
        torch.save(tensors, tmp_path / "w.pth")
    else:
        save_file({n: t.bfloat16() for n, t in tensors.items()}, tmp_path / "w.safetensors")
    options = model_options(config.Model(weights=folder))[0].model_dump()
    uri = tmp_path / ("w.pth" if kind == "pth" else "w.safetensors")
    _, built = peak(lambda: build(uri, options=options))
    assert built < (0.1 if kind == "pth" else 1.2) * size


def test_without_its_decoder_a_model_is_checked_all_the_same(tensors, tmp_path):
    save_file(tensors, tmp_path / "w.safetensors")
    model = weights.build(config.Model(weights=str(tmp_path / "w.safetensors"), options=TINY), decoder=False)
    assert model.decoder is None and torch.equal(model.encoder.cls_token, tensors["encoder.cls_token"])
    save_file({n: t for n, t in tensors.items() if n != "decoder.pred.bias"}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="missing decoder.pred.bias"):
        weights.build(config.Model(weights=str(tmp_path / "w.safetensors"), options=TINY), decoder=False)


def test_no_two_parameters_share_memory(tmp_path):
    """One tensor of a file that is two of the model: what trains the one must not move the other."""
    module = torch.nn.ModuleDict({name: torch.nn.Linear(16, 16, bias=False) for name in "abc"})
    weight = torch.randn(16, 16)
    torch.save({"w": weight, "both": torch.cat([weight, weight])}, tmp_path / "w.pth")
    held = tensor_files.load(tmp_path / "w.pth", "w")
    tensor_files.assign(module, {"a.weight": held["w"], "b.weight": held["w"], "c.weight": held["both"][8:24]})
    with torch.no_grad():
        module["a"].weight.zero_()
    assert torch.equal(module["b"].weight, weight) and torch.equal(module["c"].weight[:8], weight[8:])
    assert all(p.data_ptr() % tensor_files.ALIGNED == 0 and p.requires_grad for p in module.parameters())


def test_a_file_written_anew_leaves_the_model_that_was_read_from_it(large, tmp_path):
    model = build(large[0])
    held = model.encoder.norm.weight.clone()
    tensor_files.save({n: t * 0 for n, t in model.state_dict().items()}, tmp_path / "w.safetensors")
    other = build(tmp_path / "w.safetensors", options=model.options.model_dump())
    tensor_files.save(model.state_dict(), tmp_path / "w.safetensors")
    assert not other.encoder.norm.weight.any() and torch.equal(model.encoder.norm.weight, held)


@pytest.mark.parametrize("shape", SMALL)
def test_random_weights_are_those_of_the_seed(shape):
    family, options = SMALL[shape]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        plain = base.adapter(family)(base.options(config.Model(family=family, options=options)))
    state = torch.get_rng_state()
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in build_small(shape, 4).state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def own_copies(tmp_path, monkeypatch):
    """Copies of remote files go to a folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    node_cache._release_all()


def _digest(model: config.Model, sources) -> str:
    built = weights.build(model, 0, sources)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in built.state_dict().values())).hexdigest()


@pytest.mark.parametrize("kind", ["file", "ours"])
def test_what_was_looked_up_is_never_asked_again(proxied, s3, own_copies, tmp_path, kind):
    """The driver looks weights up, and this process is the first of its machine; another one then asks for nothing."""
    weights.write(weights.build(MODEL, seed=5), s3, {})
    uri = s3 if kind == "ours" else f"{s3}/weights.safetensors"
    model = config.Model(weights=uri, options=TINY)
    sources = weights.located([uri, None])
    assert sources[uri].fingerprint == hashlib.sha256(Storage(s3).read("weights.safetensors")).hexdigest()
    assert pickle.loads(pickle.dumps(sources)) == sources and sources[uri].kind == kind
    asked = len(proxied.requests)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_digest, (model, sources)) == _digest(model, sources)
    assert len(proxied.requests) == asked
    assert weights.located([uri], sources) == sources and len(proxied.requests) == asked


def test_weights_that_change_while_a_run_starts_are_told(s3, own_copies):
    weights.write(weights.build(MODEL, seed=5), s3, {})
    sources = weights.located([s3])
    node_cache._release_all()  # as on another machine, which has no copy
    weights.write(weights.build(MODEL, seed=6), s3, {})
    with pytest.raises(StorageError, match="(has changed since|was replaced while) it was .*: start again"):
        weights.build(config.Model(weights=s3), 0, sources)


def test_the_shape_is_told_without_the_tensors(proxied, s3):
    model = weights.build(MODEL, seed=5)
    weights.write(model, s3, {})
    before = len(proxied.requests)
    assert model_options(config.Model(weights=s3))[0] == model.options
    assert not any(
        path.partition("?")[0].endswith("weights.safetensors") and method == "GET"
        for method, path in proxied.requests[before:]
    )
    named = config.Model(variant="vit_nano_patch4_32", weights="s3://nowhere/at/all")
    assert model_options(named)[0] == base.options(config.Model(variant="vit_nano_patch4_32"))


def test_faults_of_the_program_and_of_the_machine_are_not_told_as_damage(tensors, tmp_path, monkeypatch):
    save_file(tensors, tmp_path / "w.safetensors")
    for fault in (NameError("name"), AssertionError(), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")):

        def broken(*_, fault=fault):
            raise fault

        monkeypatch.setattr(weights.tensor_files, "check", broken)
        with pytest.raises(type(fault)) as e:
            build(tmp_path / "w.safetensors", options=TINY)
        assert e.value is fault
    monkeypatch.setattr(weights.tensor_files, "check", lambda *_: {}["size"])
    with pytest.raises(WeightsError, match="w.safetensors cannot be loaded: damaged, or of a kind .*KeyError: 'size'"):
        build(tmp_path / "w.safetensors", options=TINY)
