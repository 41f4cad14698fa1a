"""Checkpoints as others save them: what is taken, what is refused, and what is said."""

import argparse
import gzip
import json
import pathlib
import pickle
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.models import TINY

from unlearn import config
from unlearn.errors import WeightsError
from unlearn.models import base, tensor_files, weights


@pytest.fixture(scope="module")
def model():
    return weights.build(config.Model(options=TINY), seed=5)


def load(path, **options):
    return weights.build(config.Model(weights=str(path), options=TINY | options))


def public(model) -> dict[str, torch.Tensor]:
    """By the names of facebookresearch/mae."""
    names = {n: n.removeprefix("encoder.").replace("decoder.", "decoder_") for n in model.state_dict()}
    names["decoder.mask_token"] = "mask_token"
    return {names[n]: t for n, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.", "backbone.", "encoder."]
)
def test_what_wrappers_put_before_names_is_taken_off(prefix, model, tmp_path):
    tensors = {f"{prefix}{n}": t for n, t in public(model).items()}
    tensors = {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in tensors.items()}
    for name, content in (("a.pth", {"state_dict": tensors}), ("b.pth", {"model_ema": tensors})):
        torch.save(content, tmp_path / name)
        found = load(tmp_path / name).state_dict()
        assert all(torch.equal(t, found[n]) for n, t in model.state_dict().items())
    save_file(tensors, tmp_path / "c.safetensors")
    assert load(tmp_path / "c.safetensors").state_dict().keys() == model.state_dict().keys()


def test_a_moving_average_beside_the_weights_is_told(model, tmp_path, logged):
    zeros = {n: torch.zeros_like(t) for n, t in public(model).items()}
    torch.save({"model": public(model), "model_ema": zeros}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").encoder.cls_token.any()
    assert "its model is taken; it holds model_ema too" in logged.text
    zeros = {f"model_ema.{n}": t for n, t in zeros.items()}
    torch.save({f"model.{n}": t for n, t in public(model).items()} | zeros, tmp_path / "flat.pth")
    assert load(tmp_path / "flat.pth").encoder.cls_token.any()
    assert "flat.pth: the moving average in it (model_ema.*) is left out" in logged.text
    save_file(zeros, tmp_path / "alone.safetensors")
    assert not load(tmp_path / "alone.safetensors").encoder.cls_token.any()


def test_of_two_copies_the_one_that_is_trained_is_taken(model, tmp_path, logged):
    tensors, zeros = public(model), {n: torch.zeros_like(t) for n, t in public(model).items()}
    copies = {f"online.{n}": t for n, t in tensors.items()} | {f"ema_model.{n}": t for n, t in zeros.items()}
    save_file(copies | {"step": torch.tensor(3)}, tmp_path / "w.safetensors")
    assert load(tmp_path / "w.safetensors").encoder.cls_token.any()
    assert "of two copies in it, online.* is taken and ema_model.* left out" in logged.text
    save_file({n.replace("ema_model", "other"): t for n, t in copies.items()}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"holds two copies of a model, \w+\.\* and \w+\.\*: save one of them"):
        load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda t: {n: x.to(torch.float8_e4m3fn) for n, x in t.items()}, "has numbers of the type float8_e4m3fn"),
    (lambda t: t | {"norm.weight": torch.ones(16, dtype=torch.int8)}, "norm.weight has numbers of the type int8"),
    (lambda t: t | {"blocks.0.attn.qkv.weight_scale": torch.ones(1)}, "quantised, as its .*qkv.weight_scale"),
    (lambda t: t | {"norm.weight": torch.ones(16).to_sparse()}, "encoder.norm.weight is no plain tensor"),
])  # fmt: skip
def test_numbers_that_are_no_weights_as_they_stand_are_refused(change, message, model, tmp_path):
    torch.save(change(public(model)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=f"{message}.*of 16 or 32 bits"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("content, message", [
    (lambda b: b[:-100], "it is cut short: [0-9,]+ of [0-9,]+ bytes are there"),
    (lambda b: b[:200], "it is cut short: 200 bytes are there, its header alone has"),
    (lambda b: b"", "it is empty"),
    (lambda b: b"<!DOCTYPE html><html>404</html>", "it is a web page"),
    (lambda b: gzip.compress(b), "it is compressed by gzip: unpack it first"),
    (lambda b: b"GGUF" + b, "it is of GGUF, whose numbers are quantised"),
])  # fmt: skip
def test_what_a_file_is_instead_of_weights_is_told(content, message, model, tmp_path):
    save_file(public(model), tmp_path / "w.bin")
    load(tmp_path / "w.bin")  # by its first bytes, not by its name
    (tmp_path / "w.bin").write_bytes(content((tmp_path / "w.bin").read_bytes()))
    with pytest.raises(WeightsError, match=f"w.bin cannot be read as weights .*{message}"):
        load(tmp_path / "w.bin")


def test_a_lora_and_an_average_without_its_weights_are_told(tmp_path):
    torch.save({f"{n}.lora_A.weight": torch.ones(2, 2) for n in ("down.to_q", "up.to_k")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds changes to a model .LoRA.: give a model that they were merged into"):
        load(tmp_path / "w.pth")
    torch.save({"model_ema.diffusion_modelout2bias": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="moving average by names of its own .* without the weights that it is of"):
        load(tmp_path / "w.pth")


def test_archives_of_something_else_are_told(model, tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="it is a TorchScript program"):
        load(tmp_path / "w.pth")
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    with pytest.raises(WeightsError, match=r"it is a zip archive of other files \(a.npy\)"):
        load(tmp_path / "w.npz")


def test_what_to_give_in_place_of_a_path_without_weights_is_told(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "hub/snapshots/abc"):
        (tmp_path / folder).mkdir(parents=True)
        save_file(public(model), tmp_path / folder / "model.safetensors")
    (tmp_path / "link.pth").symlink_to("nowhere.pth")
    for path, message in (
        ("one", "give the file itself: .*/one/model.safetensors"),
        ("hub", r"a hub's cache: give one of its snapshots \(snapshots/abc in it\)"),
        ("facebook/vit-mae-base", "nothing is downloaded here, so fetch it .`hf download facebook/vit-mae-base"),
        ("link.pth", "it is a link to nowhere.pth, which is not there"),
    ):
        with pytest.raises(WeightsError, match=message):
            load(path)


@pytest.mark.parametrize(
    "name, value",
    [("numpy._core.multiarray.scalar", np.float64(3)), ("pathlib.PosixPath", pathlib.PosixPath("/data")),
     ("torch.nn.modules.linear.Linear", torch.nn.Linear(1, 1))],
)  # fmt: skip
def test_what_is_no_plain_data_is_named_with_the_way_out(name, value, model, tmp_path):
    torch.save({"model": public(model), "best": value}, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as e:
        load(tmp_path / "w.pth")
    assert f"it holds {name}, which is no plain data. If you trust it, open it with torch.load" in str(e.value)
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)


def test_a_plain_pickle_is_told_in_one_line(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": np.float64(2)}))
    with warnings.catch_warnings(), pytest.raises(WeightsError, match=r"cannot be read as weights .*: [^\n]+$"):
        warnings.simplefilter("ignore")
        load(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_pointer_of_git_lfs_is_told(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1227000000\n")
    with pytest.raises(WeightsError, match=f"{name} is a pointer of git-lfs.*git lfs pull"):
        load(tmp_path / name)


@pytest.mark.parametrize("value, dtype", [(float("nan"), torch.float32), (float("-inf"), torch.float16)])
def test_numbers_that_are_not_finite_are_refused(value, dtype, model, tmp_path):
    tensors = {n: t.to(dtype, copy=True) for n, t in public(model).items()}
    tensors["decoder_pred.bias"][7] = value
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="decoder.pred.bias holds numbers that are not finite"):
        load(tmp_path / "w.pth")


def test_whether_pixels_were_normalised_is_read_or_asked(model, tmp_path, logged):
    base.tell.cache_clear()
    arguments = argparse.Namespace(norm_pix_loss=True, lr=1e-3)
    torch.save({"model": public(model), "args": arguments}, tmp_path / "trained.pth")
    assert load(tmp_path / "trained.pth").options.norm_pix_loss
    assert not load(tmp_path / "trained.pth", norm_pix_loss=False).options.norm_pix_loss
    torch.save({"state_dict": public(model), "hyper_parameters": {"norm_pix_loss": True}}, tmp_path / "lightning.ckpt")
    assert load(tmp_path / "lightning.ckpt").options.norm_pix_loss
    torch.save({"model": public(model)}, tmp_path / "released.pth")
    load(tmp_path / "released.pth", norm_pix_loss=False)
    assert "norm_pix_loss" not in logged.text
    assert not load(tmp_path / "released.pth").options.norm_pix_loss
    assert "set model.options.norm_pix_loss to false or true" in logged.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_converting_keeps_the_type_of_the_numbers(dtype, model, tmp_path):
    torch.save({n: t.to(dtype) for n, t in public(model).items()}, tmp_path / "w.pth")
    source = config.Model(weights=str(tmp_path / "w.pth"), options=TINY)
    weights.write(weights.build(source), str(tmp_path / "ours"), {})  # as at the end of a run: in float32
    assert json.loads((tmp_path / "ours" / "model.json").read_text())["stored"] == str(dtype).removeprefix("torch.")
    for n, (start, asked, written) in enumerate(
        [(source, None, dtype), (config.Model(weights=str(tmp_path / "ours")), None, dtype),
            (source, "bfloat16", torch.bfloat16)]
    ):  # fmt: skip
        line = weights.convert(start, str(tmp_path / str(n)), asked)
        assert line == f"transformers.ViTMAEForPreTraining.from_pretrained('{tmp_path / str(n)}')"
        found = tensor_files.load(tmp_path / str(n) / "model.safetensors", "")
        assert {t.dtype for t in found.values()} == {written}
