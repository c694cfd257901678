"""Checkpoints: whole or not at all, nothing in them runs, and what does not fit is named."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from genailab_helpers.checkpoints import first_difference, load_checkpoint, load_weights, save_checkpoint
from genailab_helpers.diffusion.architectures import UNet2D
from genailab_helpers.diffusion.denoiser import Denoiser, load_denoiser, save_denoiser


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_denoiser(path, Denoiser(UNet2D(base_channels=8, channel_multipliers=(1, 2), time_emb_dim=16), 8, 4))
    return path


def test_tensors_and_recipe_come_back(tmp_path):
    shared = torch.arange(6.0)
    tensors = {"a": shared, "b": shared[:3], "c": torch.tensor([1, 2]), "d": torch.rand(2, 3).T}
    recipe = {"network": {"base_channels": 8}, "name": "é", "steps": 3, "rate": 0.1, "none": None}
    save_checkpoint(tmp_path / "new" / "x.safetensors", tensors, recipe)
    found = load_checkpoint(tmp_path / "new" / "x.safetensors")
    assert found.recipe == recipe
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_a_checkpoint_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    save_checkpoint(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_half_stores_matrices_in_16_bits_and_leaves_the_rest(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"m": torch.rand(3, 3), "v": torch.rand(3), "i": torch.ones(2, 2, dtype=torch.long)}
    save_checkpoint(path, tensors, {}, half=True)
    kinds = {name: tensor.dtype for name, tensor in load_checkpoint(path).tensors.items()}
    assert kinds == {"m": torch.float16, "v": torch.float32, "i": torch.int64}


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(model_file, kept):
    data = model_file.read_bytes()
    model_file.write_bytes(data[:int(len(data) * kept)] if isinstance(kept, float) else data[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors: truncated"):
        load_denoiser(model_file)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


@pytest.mark.parametrize("write", [lambda path: path.write_bytes(pickle.dumps(Bomb())),
                                   lambda path: torch.save({"a": Bomb()}, path)])
def test_a_pickle_named_safetensors_is_refused_and_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: truncated, or no safetensors file"):
        load_denoiser(tmp_path / "model.safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("header", [None, {"other": "1"}, {"recipe": "{not json"}])
def test_a_file_without_recipe_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata=header)
    with pytest.raises(ValueError, match=r"model.safetensors: .*no safetensors file with a recipe"):
        load_denoiser(path)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, {"a": torch.ones(2)}, {"network": "resnet"})
    with pytest.raises(ValueError, match=r"model.safetensors: the recipe describes no denoiser"):
        load_denoiser(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors: there is no such checkpoint"):
        load_denoiser(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("bias"), r"x: another architecture.*at bias: .*none, the model needs shape \(2,\)"),
    (lambda t: t.update(more=torch.ones(1)), r"at more: the file has shape \(1,\), the model needs none"),
    (lambda t: t.update(weight=torch.ones(2, 4)), r"at weight: .*\(2, 4\), the model needs shape \(2, 3\)"),
])
def test_weights_that_do_not_fit_are_named_and_change_nothing(change, message):
    module = torch.nn.Linear(3, 2)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    tensors = {k: torch.zeros_like(v) for k, v in before.items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load_weights(module, tensors, "x")
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_recipe_that_contradicts_its_weights_is_refused(model_file):
    tensors, recipe = load_checkpoint(model_file)
    recipe["network"]["base_channels"] = 16
    save_checkpoint(model_file, tensors, recipe)
    with pytest.raises(ValueError, match=r"model.safetensors: another architecture; first difference at"):
        load_denoiser(model_file)


@pytest.mark.parametrize("change", [
    {"img_size": 10**9}, {"network": {"base_channels": 10**7}}, {"network": {"time_emb_dim": 10**9}}])
def test_a_recipe_that_asks_for_gigabytes_is_refused_before_they_are_taken(model_file, change):
    tensors, recipe = load_checkpoint(model_file)
    recipe = {**recipe, **change, "network": {**recipe["network"], **change.get("network", {})}}
    save_checkpoint(model_file, tensors, recipe)
    with pytest.raises(ValueError, match=r"model.safetensors: (another arch|the recipe describes no)"):
        load_denoiser(model_file)


def test_weights_that_are_not_finite_are_refused(model_file):
    tensors, recipe = load_checkpoint(model_file)
    tensors["denoiser.network.first.1.bias"][0] = torch.nan
    save_checkpoint(model_file, tensors, recipe)
    with pytest.raises(ValueError, match=r"model.safetensors: network.first.1.bias holds .* not finite"):
        load_denoiser(model_file)


def test_the_first_difference_of_recipes_is_named():
    a = {"network": {"levels": [1, 2], "base": 8}, "size": 64}
    assert first_difference(a, json.loads(json.dumps(a))) is None
    assert first_difference({**a, "more": 1}, a) is None
    assert first_difference({**a, "network": {"levels": [1, 3], "base": 8}}, a) == \
        "network.levels is [1, 3] in the file and [1, 2] here"
    assert first_difference({}, a) == f"network is None in the file and {a['network']!r} here"
