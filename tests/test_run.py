"""run.py: settings that are checked, weights that run nothing, files that are whole."""

import copy
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import data
import distributed
import run
from conftest import quickly, resize_limit
from data import UserError

CONFIGS = run.read_configs()
LITE0 = Path(__file__).resolve().parents[2] / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"


def changed(path, value="gone", configs=CONFIGS):
    """configs.json with the entry at `path` set to `value`, or removed."""
    configs = copy.deepcopy(configs)
    *above, last = path.split(".")
    place = configs
    for key in above:
        place = place[key]
    if value == "gone":
        del place[last]
    else:
        place[last] = value
    return configs


@pytest.mark.parametrize("path, value, message", [
    ("defaults.epoch", 3, r"configs.json: defaults: unknown key 'epoch'.*Did you mean 'epochs'\?"),
    ("defaults.epochs", "3", 'configs.json: defaults.epochs: "3" is not a whole number'),
    ("defaults.epochs", True, "defaults.epochs: true is not a whole number"),
    ("defaults.epochs", 0, "defaults.epochs: 0 is out of range; expected between 1 and"),
    ("defaults.lr", float("nan"), "defaults.lr: nan is out of range"),
    ("defaults.cam", "gradcam+", r"defaults.cam: unknown 'gradcam\+'.*Did you mean 'gradcam"),
    ("defaults.budget", "gone", "configs.json: defaults: key 'budget' is missing"),
    ("datasets.asl.layout", "gone", "datasets.asl: key 'layout' is missing"),
    ("datasets.asl.layout", "folder", "datasets.asl.layout: unknown 'folder'.*Did you mean 'folders'"),
    ("datasets.asl.imagesize", 3, r"datasets.asl: unknown key 'imagesize'.*Did you mean 'image_size'\?"),
    ("datasets.asl.image_size", "224", 'datasets.asl.image_size: "224" is not a whole number'),
    ("datasets.asl.split.blocks", "gone", "datasets.asl.split: key 'blocks' is missing"),
    ("datasets.asl.split.test", 0.95, "datasets.asl.split.test: 0.95 is out of range"),
    ("datasets.asl.split.val", 0.85, "val and test take 1.05 of the images"),
    ("datasets.asl.normalisation", "imagenet", "datasets.asl.normalisation: 'imagenet'; expected"),
    ("datasets.digits.normalisation.std", [1, 1], "normalisation.std: expected three numbers"),
    ("datasets.pets.torchvision.class", "OxfordPet", "Did you mean 'OxfordIIITPet'"),
    ("datasets.pets.torchvision", "gone", "datasets.pets: key 'torchvision' is missing"),
    ("datasets.asl.settings.model", 3, "datasets.asl.settings.model: 3 is not a text"),
    ("models.vit_small.timm", "gone", "models.vit_small: key 'timm' is missing"),
    ("models.vit_small.setting", {}, "models.vit_small: unknown key 'setting'.*Did you mean 'settings'"),
    ("models.vit_small", "vit", 'models.vit_small: expected an object, found "vit"'),
    ("datasets", "gone", "configs.json: key 'datasets' is missing"),
])
def test_a_mistake_in_configs_json_is_named_with_its_place(path, value, message, tmp_path):
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(UserError, match=message):
        run.read_configs(file)


def test_what_is_not_json_is_named_with_line_and_column(tmp_path):
    file = tmp_path / "configs.json"
    file.write_text('{\n "defaults": {,}\n}')
    with pytest.raises(UserError, match="configs.json, line 2, column 15: not JSON"):
        run.read_configs(file)
    file.write_text('{"defaults": {}, "models": {"a": {}, "a": {}}}')
    with pytest.raises(UserError, match="configs.json: key 'a' stands twice"):
        run.read_configs(file)


def test_the_stronger_setting_wins():
    assert run.resolve(CONFIGS, {})["lr"] == 0.003  # the model's
    assert run.resolve(CONFIGS, {})["epochs"] == 20  # the dataset's
    assert run.resolve(CONFIGS, {"epochs": 3, "lr": 1})["epochs"] == 3
    config = run.resolve(CONFIGS, {"dataset": "asl", "model": "vit_small", "cam": "gradcam++"})
    assert (config["epochs"], config["lr"], config["image_size"], config["area"]) == (5, 0.0001, 224, 0.1)
    assert config["model_entry"]["timm"].startswith("vit_small_patch16_224") and config["pretrained"]


def test_of_area_and_threshold_the_one_that_was_asked_for_counts():
    assert run.resolve(CONFIGS, {"threshold": 0.6})["area"] is None
    assert run.resolve(changed("defaults.area", None, changed("defaults.threshold", 0.5)), {"area": 0.2})["threshold"] is None
    with pytest.raises(UserError, match="--area and --threshold contradict each other"):
        run.resolve(CONFIGS, {"threshold": 0.6, "area": 0.2})


@pytest.mark.parametrize("options, message", [
    ({"schedule": "20,p,19", "epochs": 30}, "adds up to 40 epochs, each p counting as one, but --epochs is 30"),
    ({"schedule": "every:0"}, "--schedule 'every:0': expected a whole number"),
    ({"schedule": "sometimes"}, "--schedule 'sometimes': expected every:K, after:E, plateau, or epochs and p"),
    ({"schedule": "after:20"}, "--schedule after:20: erases nothing within 20 epochs"),
    ({"schedule": "every:21"}, "--schedule every:21: erases nothing within 20 epochs"),
    ({"rounds": 2}, "--rounds goes with --mode staged"),
    ({"target_accuracy": 0.9}, "--target-accuracy goes with --mode staged"),
    ({"mode": "staged", "same_step": True}, "--same-step goes with --mode online"),
    ({"mode": "staged", "cam": "none"}, "choose a --cam other than none"),
    ({"mode": "staged", "schedule": "every:2"}, "--mode staged takes epochs and rounds, as 20,p,19"),
    ({"mode": "staged", "schedule": "p,3"}, "--mode staged begins with epochs of plain training"),
    ({"mode": "staged", "schedule": "2,p,1", "rounds": 2}, "has 1 rounds, but --rounds is 2"),
    ({"protocol": "resplit"}, "--protocol resplit draws a new split at each p"),
    ({"protocol": "resplit", "schedule": "20"}, "--protocol resplit draws a new split at each p"),
    ({"weights": "a.pth", "init": "runs/a"}, "--weights and --init contradict each other"),
    ({"target_accuracy": 1.5, "mode": "staged"}, "--target-accuracy: 1.5 is out of range"),
    ({"control": "hottest"}, "--control: unknown 'hottest'; expected one of random, coolest, label"),
])
def test_settings_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(UserError) as error:
        run.resolve(CONFIGS, options)
    assert message in str(error.value)


def test_a_listed_schedule_says_how_many_epochs_there_are():
    assert run.resolve(CONFIGS, {"schedule": "20,p,19"})["epochs"] == 40
    assert run.resolve(CONFIGS, {"schedule": "2,p,1", "epochs": 4})["epochs"] == 4
    assert run.stage_epochs(run.resolve(CONFIGS, {"mode": "staged", "rounds": 2})) == [20, 20, 20]
    staged = run.resolve(CONFIGS, {"mode": "staged", "schedule": "5,p,9,p,9,p,9,p,4"})
    assert run.stage_epochs(staged) == [5, 10, 10, 10, 5] and staged["rounds"] == 4


def test_unknown_names_come_with_the_nearest_known():
    with pytest.raises(UserError, match="unknown dataset 'digit'.*Did you mean 'digits'"):
        run.resolve(CONFIGS, {"dataset": "digit"})
    with pytest.raises(UserError, match="unknown model 'vit_smal'.*Did you mean 'vit_small'"):
        run.resolve(CONFIGS, {"model": "vit_smal"})
    with pytest.raises(UserError, match="--fill: unknown 'blakc'.*Did you mean 'black'"):
        run.resolve(CONFIGS, {"fill": "blakc"})
    with pytest.raises(UserError, match="folder with --data-dir|--data-dir DIR"):
        run.resolve(CONFIGS, {"dataset": "folder"})


# --- weights


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return run.build_network(run.resolve(CONFIGS, {"model": "test_resnet", "pretrained": False}), 10)[0]


@pytest.mark.parametrize("name", list(CONFIGS["models"]))
def test_every_short_name_builds(name):
    with torch.device("meta"):
        model, text = run.build_network(run.resolve(CONFIGS, {"model": name}), 10, pretrained=False)
    assert model.num_classes == 10


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "parallel"])
def test_weights_load_from_a_file_and_say_what_was_left_out(kind, tiny, tmp_path):
    from safetensors.torch import save_file

    config = run.resolve(CONFIGS, {"model": "test_resnet", "weights": str(tmp_path / "w.pth")})
    state = {k: v + 1 if v.is_floating_point() else v for k, v in tiny.state_dict().items()}
    state["extra"] = torch.zeros(2)
    del state["bn1.weight"]
    if kind == "safetensors":
        config["weights"] = str(tmp_path / "w.safetensors")
        save_file(state, config["weights"])
    else:
        torch.save({"pth": state, "wrapped": {"state_dict": state, "epoch": 3},
                    "parallel": {f"module.{k}": v for k, v in state.items()}}[kind], config["weights"])
    model, text = run.build_network(config, 5)
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], state["layer1.0.conv1.weight"])
    assert "left out fc.weight: [10, 96] in the file, [5, 96] in the network" in text
    assert "left out extra: the network has no such tensor" in text
    assert "not in the file, so random: bn1.weight" in text


def test_weights_under_another_librarys_names_are_told_by_their_order(tiny, tmp_path):
    state = {f"_part{i}": v + 1 if v.is_floating_point() else v for i, v in enumerate(tiny.state_dict().values())}
    torch.save(state, tmp_path / "w.pth")
    model, text = run.build_network(run.resolve(CONFIGS, {"model": "test_resnet", "weights": str(tmp_path / "w.pth")}), 5)
    assert "told by their order" in text and "left out fc.weight: [10, 96] in the file, [5, 96] in the network" in text
    for (name, ours), theirs in zip(model.state_dict().items(), state.values()):
        assert name.startswith("fc") or torch.equal(ours, theirs)
    state["_part3"] = state["_part3"][:1]  # one other shape, and nothing can be told
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="tensors fits"):
        run.load_weights(tiny, tmp_path / "w.pth")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


@pytest.mark.parametrize("ended", [KeyboardInterrupt(), distributed.Stopped(15), RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")])
def test_what_a_signal_raises_while_torch_writes_comes_through(ended, tmp_path):
    """torch's writer, left in the middle, raises "unexpected pos" over it; a run would end with a traceback."""
    def write(file):
        real, calls = file.write, []

        class Ending:
            def write(self, content):
                calls.append(content)
                if len(calls) == 3:
                    raise ended
                return real(content)

            def flush(self):
                file.flush()

        torch.save({"a": torch.zeros(100_000)}, Ending())

    with pytest.raises(type(ended)) as caught:
        data.write_atomically(tmp_path / "last.pt", write)
    assert caught.value is ended and not list(tmp_path.iterdir())


def test_a_pickle_bomb_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in (("a.pth", lambda f: torch.save({"x": Bomb()}, f)), ("b.pth", lambda f: f.write(pickle.dumps(Bomb())))):
        with open(name, "wb") as file:
            write(file)
        with pytest.raises(UserError, match="cannot be loaded"):
            run.load_weights(tiny, name)
        with pytest.raises(UserError, match="damaged"):
            run.load_checkpoint(name)
    assert not Path("bomb-went-off").exists()


def test_weights_that_cannot_serve_are_an_error(tiny, tmp_path):
    with pytest.raises(UserError, match="gone.pth: no such file"):
        run.load_weights(tiny, tmp_path / "gone.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="text.safetensors: cannot be loaded"):
        run.load_weights(tiny, tmp_path / "text.safetensors")
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="none of its 1 tensors fits ResNet"):
        run.load_weights(tiny, tmp_path / "other.pth")


@pytest.mark.skipif(not LITE0.exists(), reason="needs shared/weights beside the project")
def test_a_real_imagenet_network_knows_the_two_sample_photographs():
    config = run.resolve(CONFIGS, {"model": "efficientnet_lite0", "weights": str(LITE0), "dataset": "folder",
                                   "data_dir": "."})
    model, text = run.build_network(config, 1000)
    assert "left out" not in text and "random" not in text
    mean, std = run.normalisation(config, model)
    assert mean.flatten().tolist() == [0.5] * 3
    pixels = torch.stack([torch.from_numpy(data.to_rgb(Image.fromarray(p), 224).copy()).permute(2, 0, 1)
                          for p in load_sample_images().images])
    with torch.no_grad():
        top5 = model.eval()(data.prepare(pixels, mean, std)).topk(5).indices.tolist()
    temple = {663, 668, 698, 832, 888, 536, 975}  # monastery, mosque, palace, stupa, viaduct, dock, lakeside
    assert len(temple & set(top5[0])) >= 2 and top5[1][0] in {985, 723, 989, 309, 308}  # daisy, pinwheel, hip, bee, fly


def test_an_unreachable_hub_is_one_message_that_offers_both_ways_out(monkeypatch):
    import huggingface_hub

    config = run.resolve(CONFIGS, {"model": "resnet18"}) | {"pretrained": True}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    for offline in (True, False):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        with pytest.raises(UserError, match="resnet18.a1_in1k cannot be fetched.*--weights FILE.*--no-pretrained"):
            run.build_network(config, 10)


def test_a_network_without_pretrained_weights_says_that_it_starts_from_random_ones():
    config = run.resolve(CONFIGS, {"model": "resnet18d", "epochs": 1}) | {"pretrained": True}
    config["model_entry"] = {"timm": "resnet14t"}
    import timm

    bare = next(name for name in timm.list_models("resnet*") if not timm.models.get_pretrained_cfg(name).has_weights)
    config["model_entry"] = {"timm": bare}
    with torch.device("meta"):
        assert "random weights, for timm has no pretrained ones" in run.build_network(config, 10)[1]


# --- files


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "state"
    run.write_atomically(file, lambda f: f.write(b"old"))

    def crash(f):
        f.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write_atomically(file, crash)
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["state"]


def test_a_log_line_cut_off_by_a_crash_is_left_out(tmp_path):
    run.append_line(tmp_path / "log.jsonl", {"epoch": 1})
    run.append_line(tmp_path / "log.jsonl", {"epoch": 2})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    assert [line["epoch"] for line in run.read_log(tmp_path)] == [1, 2]
    run.cut_log(tmp_path, 1)
    assert [line["epoch"] for line in run.read_log(tmp_path)] == [1]


def test_a_damaged_checkpoint_is_named(tmp_path):
    run.save_checkpoint(tmp_path / "last.pt", {"model": {"w": torch.zeros(100)}})
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="last.pt: damaged"):
        run.load_checkpoint(tmp_path / "last.pt")


def write_on_a_full_disk(folder, write, answer):
    """Run in a child process: the error that a function of `run` ends with there."""
    resize_limit(4096)
    os.chdir(folder)
    try:
        getattr(run, write[0])(*write[1:])
    except UserError as error:
        answer.put(str(error))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")
@pytest.mark.parametrize("write", [("save_checkpoint", "last.pt", {"w": list(range(9000))}), ("write_json", "a.json", "x" * 9000),
                                   ("append_line", "log.jsonl", "x" * 9000)], ids=lambda write: write[0])
def test_a_full_disk_is_one_error_and_leaves_what_was_there(write, tmp_path):
    for name in ("last.pt", "a.json"):
        (tmp_path / name).write_text("old")
    answer = quickly.Queue()
    process = quickly.Process(target=write_on_a_full_disk, args=(str(tmp_path), write, answer))
    process.start()
    text = answer.get(timeout=60)
    process.join()
    assert "cannot be written (" in text and "intact" in text and "\n" not in text
    assert (tmp_path / "last.pt").read_text() == (tmp_path / "a.json").read_text() == "old"
    assert not list(tmp_path.glob(".*tmp"))


# --- erased images on the disk


NAMES = ["A", "n02085620-Chihuahua", "a/b", "../../etc", "..", ".", ".hidden", "a b", " a", "a.", "é ü", "狗", "<b>bold</b>", "a\nb",
         "100%", "a%2Fb", "con:aux*?", "$x^2$", "[red]", "x" * 300, "x" * 301, "狗" * 200, "\udcff.jpg", "A/1.jpg", "A\\1", "\0"]


def test_any_text_makes_a_file_name_of_its_own_that_stays_in_its_folder(tmp_path):
    safe = [run.safe_name(name) for name in NAMES]
    assert len(set(safe)) == len(NAMES) and safe[:2] == NAMES[:2] and "é ü" in safe and "狗" in safe
    for name in safe:
        (tmp_path / f"{name}.jpg").write_text(name)
        assert (tmp_path / f"{name}.jpg").resolve().parent == tmp_path.resolve() and not name.startswith((".", " "))
    assert len(os.listdir(tmp_path)) == len(NAMES)


def erased_row(source, label="a"):
    return {"source": source, "label": label, "predicted": "b", "confidence": "0.5", "area": "0.1"}


def test_erased_images_are_written_indexed_and_taken_up_again(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (len(NAMES), 8, 8, 3), dtype=np.uint8)
    kept = run.ErasedRound(tmp_path, 1, "png")
    kept.begin(NAMES)
    with kept:
        kept.add(pictures, [erased_row(name, label) for name, label in zip(NAMES, reversed(NAMES))], 40, 30)
        kept.add([], [], 50, 31)
    again = run.ErasedRound(tmp_path, 1, "png")
    rows = again.rows()
    assert (again.looked_at, again.selected, again.order()) == (50, 31, NAMES) and [row["source"] for row in rows] == NAMES
    for row, picture in zip(rows, pictures):
        assert (tmp_path / row["file"]).resolve().is_relative_to(tmp_path / "erased" / "round-1")
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file"])), picture)
    with open(again.index, "a") as file:  # a crash after the index and before the progress
        file.write("erased/round-1/x.png,x,a,b,0.1,")
    again.begin()
    assert again.rows() == rows and again.index.read_text(errors="surrogateescape").count("x.png") == 0


def test_an_image_that_cannot_be_written_ends_the_round_with_an_error(tmp_path):
    kept = run.ErasedRound(tmp_path, 1, "jpg")
    kept.begin()
    (kept.folder / "a").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        with kept:
            kept.add(np.zeros((1, 8, 8, 3), np.uint8), [erased_row("1")], 1, 1)
    assert run.ErasedRound(tmp_path, 1, "jpg").looked_at == 0


# --- energy


def counter(folder, name, energy, number=0, span=999_999):
    zone = folder / f"intel-rapl:{number}"
    zone.mkdir(exist_ok=True)
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", span)):
        (zone / file).write_text(f"{text}\n")


def test_energy_is_the_packages_own_count_also_when_it_starts_again(tmp_path):
    counter(tmp_path, "package-0", 900_000)
    counter(tmp_path, "package-1", 0, 1)
    counter(tmp_path, "dram", 0, 2)
    energy = run.Energy(torch.device("cpu"), tmp_path)
    assert energy.source == "RAPL" and energy.watt_hours() == 0
    counter(tmp_path, "package-0", 100_000)  # 200,000 later
    counter(tmp_path, "package-1", 700_000, 1)
    counter(tmp_path, "dram", 999, 2)
    assert energy.watt_hours() == pytest.approx(0.9 / 3600) == energy.watt_hours()
    energy.close()


def test_where_nothing_counts_energy_it_is_not_told(tmp_path):
    energy = run.Energy(torch.device("cpu"), tmp_path)
    assert energy.source is None and energy.watt_hours() is None
