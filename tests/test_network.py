"""engine/network.py: networks that are built, and weights that are loaded and run nothing."""

import contextlib
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

import train
from engine import checkpoint, launch, loader, network, predict, ranks, settings
from engine.dataset import to_rgb
from engine.files import UserError, read_json
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


# --- the device, which a stub plays: no GPU is needed ----------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Make torch believe in a GPU: gpu(capability, bfloat16, kernels); returns what the current one was set to."""
    def pretend(capability=(8, 0), bfloat16=True, kernels=("sm_75", "sm_80", "sm_90")):
        chosen = []
        stubs = {"is_available": lambda: True, "current_device": lambda: 0, "device_count": lambda: 2,
                 "get_device_capability": lambda device: capability, "get_arch_list": lambda: list(kernels),
                 "get_device_name": lambda device: "Some GPU", "set_device": chosen.append,
                 "is_bf16_supported": lambda including_emulation: bfloat16}
        for name, stub in stubs.items():
            monkeypatch.setattr(torch.cuda, name, stub)
        monkeypatch.setattr(torch, "empty", lambda *_, device: None)
        return chosen

    return pretend


@pytest.mark.parametrize("name, index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_picked_with_its_index_and_becomes_the_current_one(name, index, gpu):
    chosen = gpu()
    assert network.pick_device(name) == torch.device("cuda", index) and chosen == [torch.device("cuda", index)]


@pytest.mark.parametrize("capability, kernels, fits", [
    ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"], False),  # a V100 and torch 2.11
    ((7, 0), ["sm_70", "sm_75", "sm_80"], True), ((8, 6), ["sm_80"], True), ((8, 0), ["sm_86"], False),
    ((9, 0), ["sm_80", "sm_90a"], False), ((9, 0), ["sm_80", "compute_80"], True), ((12, 1), ["sm_120"], True),
    ((6, 1), ["sm_60", "sm_70"], True), ((9, 0), ["gfx90a"], True)])
def test_a_gpu_that_torch_has_no_kernels_for_is_refused_when_it_is_picked(capability, kernels, fits, gpu):
    gpu(capability, kernels=kernels)
    with contextlib.nullcontext() if fits else pytest.raises(UserError, match="no kernels for Some GPU") as caught:
        network.pick_device("auto")
    if not fits:
        assert f"sm_{capability[0]}{capability[1]}" in str(caught.value)
        assert ("torchvision 0.25.0" in str(caught.value)) == (capability[0] == 7)


def test_a_new_run_keeps_what_amp_auto_came_to_and_goes_on_in_it(trained, gpu):
    assert read_json(trained("--amp", "auto", epochs=1) / "config.json")["amp"] == "off"
    gpu(bfloat16=True)
    cuda = torch.device("cuda", 0)
    assert network.pick_amp("auto", cuda) == "bfloat16" and network.pick_amp("off", cuda) == "off"
    gpu(bfloat16=False)
    assert network.pick_amp("auto", cuda) == "float16"
    with pytest.raises(UserError, match="--amp bfloat16: Some GPU cannot"):
        network.pick_amp("bfloat16", cuda)


def test_an_older_run_in_float16_does_not_go_on_without_its_scaler(trained, capsys):
    folder = trained(epochs=1)
    state = checkpoint.load_checkpoint(folder / "last.pt")
    checkpoint.save_checkpoint(folder / "last.pt", state | {"scaler": torch.amp.GradScaler("cpu").state_dict()})
    assert train.main(["--resume", str(folder)]) == 2
    shown = capsys.readouterr().err
    assert "began in mixed precision, in float16" in shown and shown.count("\n") == 1


def test_what_is_reported_is_predicted_in_float32_that_nothing_rounds(trained, monkeypatch):
    def precision():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    seen, real, before = [], predict.predict, precision()
    monkeypatch.setattr(predict, "predict", lambda *arguments: seen.append(precision()) or real(*arguments))
    trained(epochs=1)
    assert seen[0] == before and seen[-1] == ("highest", False) and precision() == before


def test_a_run_goes_on_on_the_device_that_it_was_given(trained, gpu):
    folder = trained("--device", "cpu", epochs=1)
    gpu()
    assert launch.start_together({}, {"resume": folder}, None).device == torch.device("cpu")


@pytest.mark.parametrize("option", ["--deterministic", "--no-deterministic"])
def test_a_run_that_goes_on_has_its_switches_before_anything_is_computed(option, trained):
    folder = trained(option, epochs=1)
    torch.use_deterministic_algorithms(option == "--no-deterministic")
    launch.resume(folder, {})
    assert torch.are_deterministic_algorithms_enabled() == (option == "--deterministic")
    torch.use_deterministic_algorithms(False)


def test_torchrun_gives_each_process_a_gpu_of_its_own(gpu, monkeypatch):
    chosen = gpu()
    for name, value in (("RANKS", 2), ("LOCAL_RANK", 1)):
        monkeypatch.setattr(ranks, name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert [ranks.start(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert chosen == ["cuda:1", "cuda:1"]
    with pytest.raises(UserError, match="give --device cuda"):
        ranks.start("cuda:0")
    monkeypatch.setattr(ranks, "LOCAL_RANK", 2)
    with pytest.raises(UserError, match="more processes than the 2 GPUs here"):
        ranks.start("cuda")
