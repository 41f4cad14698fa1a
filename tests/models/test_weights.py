"""Weights in and out: what does not fit is named, nothing is unpickled, a folder comes back as it was written."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from support.models import TINY

from unlearn import config
from unlearn.data.storage import Storage
from unlearn.errors import ConfigError, StorageError, WeightsError
from unlearn.models import weights

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
    assert all(torch.equal(t.float(), tensors[n]) and tensors[n].dtype == torch.float32 for n, t in model.state_dict().items())
    with pytest.raises(WeightsError, match="encoder.blocks.2.norm1.weight"):
        build(place, options={"depth": 3})


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "nested"])
def test_a_single_file_loads_with_the_shape_given(tensors, tmp_path, place, suffix):
    path = tmp_path / f"w.{'pth' if suffix == 'nested' else suffix}"
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if suffix == "nested" else tensors, path)
    Storage(place).write(path.name, path.read_bytes())
    model = build(f"{place}/{path.name}", options=TINY)
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())


def test_every_tensor_that_does_not_fit_is_named(tensors, tmp_path):
    wrong = {n: t for n, t in tensors.items() if n != "encoder.cls_token"} | {"head.weight": torch.zeros(2)}
    wrong["decoder.pred.bias"] = torch.zeros(3)
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as e:
        build(tmp_path / "w.safetensors", options=TINY)
    for words in ("missing encoder.cls_token", "unexpected head.weight", "decoder.pred.bias has shape (3,), the model wants (192,)"):
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
@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"text" * 99, lambda d: b"PK\x03\x04" + b"\0" * 99])
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
    with pytest.raises(ConfigError, match="model.variant vit_micro_patch8_64 has another .* than .* was made with: leave model.variant out"):
        weights.build(config.Model(variant="vit_micro_patch8_64", weights=str(tmp_path)))


def test_a_variant_and_a_family_that_do_not_exist_are_told():
    with pytest.raises(ConfigError, match="mae has no variant 'vit_giant'; known: vit_base_patch16"):
        weights.build(config.Model(variant="vit_giant"))
    with pytest.raises(ConfigError, match="no model family 'gan'; known: mae"):
        weights.build(config.Model(family="gan"))
