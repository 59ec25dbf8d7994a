"""engine/network.py: networks that are built, and weights that are loaded and run nothing."""

import argparse
import contextlib
import os
import pickle
import socket
import threading
from pathlib import Path

import numpy as np
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


def test_a_folder_of_weights_serves_each_network_by_its_name_in_timm(tiny, tmp_path):
    config = resolve(CONFIGS, {"model": "test_resnet", "weights": str(tmp_path)})
    with pytest.raises(UserError, match=r"no test_resnet\.safetensors and no test_resnet\.pth"):
        network.build_network(config, 10)
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "test_vit.safetensors")
    torch.save(tiny.state_dict(), tmp_path / "test_resnet.pth")
    model, text = network.build_network(config, 10)
    assert "test_resnet.pth: 92 of 92 tensors" in text and network.classes_of_weights(config) == 10
    assert all(torch.equal(value, tiny.state_dict()[key]) for key, value in model.state_dict().items())
    config = resolve(CONFIGS, {"model": "test_vit", "weights": str(tmp_path)})
    assert "test_vit.safetensors" in network.build_network(config, 10)[1]


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def body(state):
    return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}


FILES = {  # of one network's weights, as people save them: state dict -> what lies in the file
    "two levels down": lambda w: {"epoch": 3, "checkpoint": {"model": w}},
    "a list": lambda w: [w, {"state": {0: {"exp_avg": torch.zeros(2)}}}],
    "wrappers in odd order": lambda w: under("net.module.backbone._orig_mod.model.", w),
    "an average of the weights": lambda w: {"ema": {"n_averaged": torch.tensor(9), **under("module.", w)}},
    "a wrapped name": lambda w: {key.replace("layer1.", "layer1._orig_mod._fsdp_wrapped_module."): tensor
                                 for key, tensor in w.items()},
    "lightning": lambda w: {"state_dict": {**under("model.", w), "loss.weight": torch.ones(10), "f1.tp": torch.ones(3)},
                            "loops": {}, "global_step": 7},
    "a loss of more tensors than the network": lambda w: {
        **under("module.", w), **{f"module.loss.vgg.{i}.weight": torch.zeros(3) for i in range(len(w))}},
    "a teacher of another size beside it": lambda w: {
        "teacher": {key: torch.zeros(7, 7) for key in w}, "student": under("module.backbone.", w)},
    "an optimizer in front": lambda w: {"optimizer": {i: {"exp_avg": t.clone()} for i, t in enumerate(w.values())},
                                        "net": w, "acc": torch.tensor(0.9)},
    "the head beside the body": lambda w: {"model": {**under("encoder.", body(w)), "fc.weight": w["fc.weight"],
                                                     "fc.bias": w["fc.bias"]}},
}


@pytest.mark.parametrize("kind", list(FILES))
def test_weights_are_found_wherever_a_file_has_them(kind, tiny, tmp_path):
    state = {key: tensor + 1 for key, tensor in tiny.state_dict().items()}
    torch.save(FILES[kind](state), tmp_path / "w.ckpt")
    text = network.load_weights(tiny, tmp_path / "w.ckpt")
    assert f"{len(state)} of {len(state)} tensors" in text.splitlines()[0] and "random" not in text
    assert all(torch.equal(tensor, state[key]) for key, tensor in tiny.state_dict().items())
    config = resolve(CONFIGS, {"model": "test_resnet", "weights": str(tmp_path / "w.ckpt")})
    assert network.classes_of_weights(config) == 10


def test_what_stands_beside_the_weights_is_named_and_a_head_for_other_classes_too(tiny, tmp_path):
    state = under("module.", timm.create_model("test_resnet", num_classes=4).state_dict())
    torch.save({"model": state, "queue": torch.zeros(9), "criterion": {"centers": torch.zeros(3)}}, tmp_path / "w.pt")
    first, *lines = network.load_weights(tiny, tmp_path / "w.pt").splitlines()
    assert first.endswith("90 of 92 tensors, those under 'model.module'")
    assert lines == ["  left out fc.weight: [4, 96] in the file, [10, 96] in the network",
                     "  left out fc.bias: [4] in the file, [10] in the network",
                     "  left out 2 tensors that are not under it: queue, criterion"]


def test_names_that_end_alike_by_chance_are_no_weights(tiny, tmp_path):
    head = tiny.fc.state_dict(prefix="fc.") | {"attn.qkv.weight": torch.zeros(8, 8)}
    torch.save({f"blocks.{i}.{name}": tensor for i in range(3) for name, tensor in head.items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="none of its 9 tensors fits ResNet: the first is blocks.0.fc.weight "):
        network.load_weights(tiny, tmp_path / "w.pth")


def test_safetensors_are_told_by_their_content(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "blob")  # as the hub's cache names them
    assert "92 of 92 tensors" in network.load_weights(tiny, tmp_path / "blob")


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
@pytest.mark.parametrize("kind, names", [("namespace", "argparse.Namespace"), ("path", "pathlib."), ("numpy", "numpy"),
                                         ("nested", "argparse.Namespace"), ("network", "timm.models.resnet.ResNet"),
                                         ("network inside", "timm.models.resnet.ResNet"), ("script", "TorchScript")])
def test_a_file_of_more_than_tensors_is_refused_with_two_lines_that_turn_it_into_one_that_serves(
        kind, names, tiny, tmp_path):
    path, state = tmp_path / "w.pth.tar", tiny.state_dict()
    if kind == "script":
        torch.jit.trace(tiny.eval(), torch.zeros(1, 3, 64, 64)).save(path)
    else:
        torch.save({"namespace": {"state_dict": state, "args": argparse.Namespace(lr=0.1)},
                    "path": {**under("module.", state), "where": Path("x")},
                    "numpy": {"model": state, "best": np.float64(3), "curve": np.zeros(2)},
                    "nested": {"state_dict": state, "hyper_parameters": {"args": argparse.Namespace()}},
                    "network": tiny, "network inside": {"epoch": 1, "model": tiny}}[kind], path)
    other = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(UserError, match=f"{names}.*could run code") as caught:
        network.load_weights(other, path)
    assert "\n" not in str(caught.value)
    first, second = str(caught.value).split("(1) ")[1].split(" (2) ")
    exec(f"{first}\n{second}", {})  # as a user who trusts the file
    assert "92 of 92 tensors" in network.load_weights(other, tmp_path / "w-tensors.pth")
    assert all(torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"<html>gone</html>", b"version https://git-lfs.github.com/spec/v1", None])
def test_what_is_no_file_of_weights_is_not_said_to_hold_code(content, tiny, tmp_path):
    if content is None:  # cut off
        torch.save(tiny.state_dict(), tmp_path / "w.pth")
        content = (tmp_path / "w.pth").read_bytes()[:3000]
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded: it is no such file, or not all of it. Expected"):
        network.load_weights(tiny, tmp_path / "w.pth")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


def test_a_pickle_bomb_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Bomb()}, "a.pth")
    Path("b.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(UserError, match="cannot be loaded") as caught:
            network.load_weights(tiny, name)
        assert "weights_only=False" not in str(caught.value)
        assert ("Do not trust this file" in str(caught.value)) == (name == "a.pth")
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
    with pytest.raises(UserError, match=r"none of its 1 tensors fits ResNet: .*other.weight \[3\]"):
        network.load_weights(tiny, tmp_path / "other.pth")


def test_weights_are_matched_by_name_alone(tiny, tmp_path):
    torch.save({f"_part{i}": v for i, v in enumerate(tiny.state_dict().values())}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="tensors fits ResNet: the first is _part0"):
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


@pytest.fixture
def hub(monkeypatch):
    """hub(address): pretrained weights are not in the cache, and the hub is there. Returns the message of the error."""
    import huggingface_hub

    def message(address, offline=False):
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        config = resolve(CONFIGS, {"model": "resnet18"}) | {"pretrained": True}
        with pytest.raises(UserError, match="resnet18.a1_in1k cannot be had.*--weights FILE.*--no-pretr") as caught:
            network.build_network(config, 10)
        return str(caught.value)

    return message


@contextlib.contextmanager
def listening(answer):
    """The address of a server that gives this answer, bytes, to whoever asks, or None: it never answers."""
    kept, server = [], socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                kept.append(server.accept()[0])
                if answer is not None:
                    kept[-1].recv(4096)
                    kept[-1].sendall(answer)
                    kept.pop().close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def test_an_unreachable_hub_is_one_message_that_offers_both_ways_out(hub):
    assert "HF_HUB_OFFLINE is set" in hub("http://127.0.0.1:9", offline=True)
    assert "http://127.0.0.1:9: " in hub("http://127.0.0.1:9")  # nobody listens there


@pytest.mark.parametrize("address", ["mirror.invalid", "//mirror.invalid", "https//mirror.invalid", "localhost:9"])
def test_a_hubs_address_without_a_scheme_is_named(address, hub):
    assert f"HF_ENDPOINT={address} has no scheme; expected an address as https://HOST" in hub(address)


@pytest.mark.parametrize("answer, reason", [
    (None, "timed out"), (b"", "closed connection"), (b"SSH-2.0-x\r\n", "SSH"),
    (b"HTTP/1.1 503 Busy\r\n\r\n", "answers HTTP Error 503: Busy")], ids=["silent", "closes", "other", "busy"])
def test_a_hub_that_does_not_answer_as_one_is_named(answer, reason, hub, monkeypatch):
    monkeypatch.setattr(network, "HUB_SECONDS", 0.2)
    with listening(answer) as address:
        assert reason in hub(address) and address in hub(address)


def test_pretrained_weights_that_are_broken_are_not_taken_for_a_network_that_cannot_be_built(hub, monkeypatch):
    real = timm.create_model

    def create(name, pretrained=False, **arguments):
        if pretrained:
            raise ValueError("header too large")
        return real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(network, "_reach_hub", lambda known, name: None)
    assert "cannot be had (header too large)" in hub("")


@pytest.mark.parametrize("name, there", [("resnet18.in1k", "resnet18.a1_in1k, resnet18.a2_in1k"),
                                         ("test_vit.imagenet", "test_vit.r160_in1k"),
                                         ("resnext26ts.x", "resnext26ts.ra2_in1k")])
def test_a_tag_that_timm_does_not_have_is_one_message_with_those_that_it_has(name, there):
    config = resolve(CONFIGS, {"model": name, "pretrained": False, "dataset": "folder", "data_dir": "."})
    for ask in (lambda: network.build_network(config, 10), lambda: network.classes_of_weights(config)):
        with pytest.raises(UserError, match=f"model {name}: Invalid pretrained tag .*{there}"):
            ask()


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
