"""engine/network.py: networks that are built, and weights that are loaded and run nothing."""

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from engine import checkpoint, loader, network, settings
from engine.dataset import to_rgb
from engine.files import UserError
from engine.settings import resolve

CONFIGS = settings.read_configs()
LITE0 = settings.HERE.parent / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return network.build_network(resolve(CONFIGS, {"model": "test_resnet", "pretrained": False}), 10)[0]


@pytest.mark.parametrize("name", list(CONFIGS["models"]))
def test_every_short_name_builds(name):
    with torch.device("meta"):
        model, text = network.build_network(resolve(CONFIGS, {"model": name}), 10, pretrained=False)
    assert model.num_classes == 10 and text == "starts from random weights"


def test_the_tensors_of_the_head_are_those_whose_shape_depends_on_the_classes(tiny):
    config = resolve(CONFIGS, {"model": "test_resnet", "pretrained": False})
    assert network.head_names(config, tiny, 10) == {"fc.weight": 0, "fc.bias": 0}


# Weights.


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "parallel"])
def test_weights_load_from_a_file_and_say_what_was_left_out(kind, tiny, tmp_path):
    config = resolve(CONFIGS, {"model": "test_resnet", "weights": str(tmp_path / "w.pth")})
    state = {k: v + 1 if v.is_floating_point() else v for k, v in tiny.state_dict().items()}
    state["extra"] = torch.zeros(2)
    del state["bn1.weight"]
    if kind == "safetensors":
        config["weights"] = str(tmp_path / "w.safetensors")
        save_file(state, config["weights"])
    else:
        torch.save({"pth": state, "wrapped": {"state_dict": state, "epoch": 3},
                    "parallel": {f"module.{k}": v for k, v in state.items()}}[kind], config["weights"])
    model, text = network.build_network(config, 5)
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert "left out fc.weight: [10, 96] in the file, [5, 96] in the network" in text
    assert "left out extra: the network has no such tensor" in text
    assert "not in the file, so random: bn1.weight" in text
    assert network.classes_of_weights(config) == 10


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


def test_a_pickle_bomb_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Bomb()}, "a.pth")
    Path("b.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(UserError, match="cannot be loaded"):
            network.load_weights(tiny, name)
        with pytest.raises(UserError, match="damaged, or not a checkpoint"):
            checkpoint.load_checkpoint(name)
    assert not Path("bomb-went-off").exists()


def test_weights_that_cannot_serve_are_an_error(tiny, tmp_path):
    with pytest.raises(UserError, match="gone.pth: no such file"):
        network.load_weights(tiny, tmp_path / "gone.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="text.safetensors: cannot be loaded"):
        network.load_weights(tiny, tmp_path / "text.safetensors")
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="none of its 1 tensors fits ResNet"):
        network.load_weights(tiny, tmp_path / "other.pth")


def test_weights_are_matched_by_name_alone(tiny, tmp_path):
    torch.save({f"_part{i}": v for i, v in enumerate(tiny.state_dict().values())}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="tensors fits ResNet, whose first is"):
        network.load_weights(tiny, tmp_path / "w.pth")


@pytest.mark.skipif(not LITE0.exists(), reason="needs shared/weights beside the project")
def test_a_real_imagenet_network_knows_the_two_sample_photographs():
    config = resolve(CONFIGS, {"model": "efficientnet_lite0", "weights": str(LITE0), "dataset": "folder",
                               "data_dir": "."})
    model, text = network.build_network(config, 1000)
    assert "left out" not in text and "random" not in text
    mean, std = network.normalisation(config, model)
    assert mean.flatten().tolist() == [0.5] * 3
    pixels = torch.stack([torch.from_numpy(to_rgb(Image.fromarray(p), 224).copy()).permute(2, 0, 1)
                          for p in load_sample_images().images])
    with torch.no_grad():
        top5 = model.eval()(loader.prepare(pixels, mean, std)).topk(5).indices.tolist()
    temple = {663, 668, 698, 832, 888, 536, 975}  # monastery, mosque, palace, stupa, viaduct, dock, lakeside
    flower = {985, 723, 989, 309, 308}  # daisy, pinwheel, hip, bee, fly
    assert len(temple & set(top5[0])) >= 2 and top5[1][0] in flower


def test_an_unreachable_hub_is_one_message_that_offers_both_ways_out(monkeypatch):
    import huggingface_hub

    config = resolve(CONFIGS, {"model": "resnet18"}) | {"pretrained": True}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    for offline in (True, False):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        with pytest.raises(UserError, match="resnet18.a1_in1k cannot be fetched.*--weights FILE.*--no-pretrained"):
            network.build_network(config, 10)


def test_a_network_without_pretrained_weights_says_that_it_starts_from_random_ones():
    bare = next(name for name in timm.list_models("resnet*") if not timm.models.get_pretrained_cfg(name).has_weights)
    config = resolve(CONFIGS, {"model": "resnet18d"}) | {"pretrained": True, "model_entry": {"timm": bare}}
    with torch.device("meta"):
        assert "random weights, for timm has no pretrained ones" in network.build_network(config, 10)[1]
