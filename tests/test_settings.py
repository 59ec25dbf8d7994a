"""engine/settings.py: configs.json and a run's settings, checked; each mistake is named with its place."""

import copy
import json

import pytest

from engine import settings
from engine.files import UserError
from engine.settings import resolve

CONFIGS = settings.read_configs()


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


# configs.json


@pytest.mark.parametrize("path, value, message", [
    ("defaults.epoch", 3, r"configs.json: defaults: unknown key 'epoch'.*Did you mean 'epochs'\?"),
    ("defaults.epochs", "3", 'configs.json: defaults.epochs: "3" is not a whole number'),
    ("defaults.epochs", True, "defaults.epochs: true is not a whole number"),
    ("defaults.epochs", 0, "defaults.epochs: 0 is out of range; expected between 1 and"),
    ("defaults.lr", float("nan"), "defaults.lr: nan is out of range"),
    ("defaults.lr", None, "defaults.lr: null is not a number"),
    ("defaults.cam", "gradcam+", r"defaults.cam: unknown 'gradcam\+'.*Did you mean 'gradcam"),
    ("defaults.augment", "lite", "defaults.augment 'lite': expected one of .*none, light.*Did you mean 'light'"),
    ("defaults.budget", "gone", "configs.json: defaults: key 'budget' is missing"),
    ("defaults.warmup", 3, "configs.json: defaults: unknown key 'warmup'"),
    ("datasets.asl.layout", "gone", "datasets.asl: key 'layout' is missing"),
    ("datasets.asl.layout", "folder", "datasets.asl.layout: unknown 'folder'.*Did you mean 'folders'"),
    ("datasets.asl.imagesize", 3, r"datasets.asl: unknown key 'imagesize'.*Did you mean 'image_size'\?"),
    ("datasets.asl.image_size", "224", 'datasets.asl.image_size: "224" is not a whole number'),
    ("datasets.asl.split", 0.1, "datasets.asl.split: 0.1 is not an object"),
    ("datasets.asl.split.blocks", "gone", "datasets.asl.split: key 'blocks' is missing"),
    ("datasets.asl.split.test", 0.95, "datasets.asl.split.test: 0.95 is out of range"),
    ("datasets.asl.split.val", 0.85, "val and test take 1.05 of the images"),
    ("datasets.asl.augment.rotate", 200, "datasets.asl.augment.rotate: 200.* is out of range"),
    ("datasets.asl.normalisation", "imagenet", "datasets.asl.normalisation: 'imagenet'; expected"),
    ("datasets.digits.normalisation.std", [1, 1], "normalisation.std: expected three numbers"),
    ("datasets.noisy_digits.digits.contrast", 2, "digits.contrast: 2.* is out of range; expected between 0 and 1"),
    ("datasets.elpv.csv.delimiter", ", ", "elpv.csv.delimiter: ', '; expected one character"),
    ("datasets.elpv.csv.columns", ["path", 1], "elpv.csv.columns: expected texts alone"),
    ("datasets.waterbirds.csv.parts", {"1": "valid"}, "csv.parts.*unknown 'valid'; expected one of train, val, test"),
    ("datasets.waterbirds.csv.classes", {"1": 1}, "waterbirds.csv.classes.1: 1 is not a text"),
    ("datasets.waterbirds.csv", "gone", "datasets.waterbirds: key 'csv' is missing"),
    ("datasets.pets.torchvision.class", "OxfordPet", "Did you mean 'OxfordIIITPet'"),
    ("datasets.pets.torchvision", "gone", "datasets.pets: key 'torchvision' is missing"),
    ("datasets.asl.settings.model", 3, "datasets.asl.settings.model: 3 is not a text"),
    ("datasets.asl", [], r"datasets.asl: expected an object, found \[\]"),
    ("models.vit_small.timm", "gone", "models.vit_small: key 'timm' is missing"),
    ("models.vit_small.setting", {}, "models.vit_small: unknown key 'setting'.*Did you mean 'settings'"),
    ("models.vit_small", "vit", 'models.vit_small: expected an object, found "vit"'),
    ("datasets", "gone", "configs.json: key 'datasets' is missing"),
])
def test_a_mistake_in_configs_json_is_named_with_its_place(path, value, message, tmp_path):
    file = tmp_path / "configs.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(UserError, match=message):
        settings.read_configs(file)


def test_what_is_not_json_is_named_with_line_and_column(tmp_path):
    file = tmp_path / "configs.json"
    file.write_text('{\n "defaults": {,}\n}')
    with pytest.raises(UserError, match="configs.json, line 2, column 15: not JSON"):
        settings.read_configs(file)
    file.write_text('{"defaults": {}, "models": {"a": {}, "a": {}}}')
    with pytest.raises(UserError, match="configs.json: key 'a' stands twice"):
        settings.read_configs(file)


# A run's settings.


def test_the_stronger_setting_wins():
    assert resolve(CONFIGS, {})["lr"] == 0.003  # the model's
    assert resolve(CONFIGS, {})["epochs"] == 20  # the dataset's
    assert resolve(CONFIGS, {"epochs": 3, "lr": 1})["epochs"] == 3
    config = resolve(CONFIGS, {"dataset": "asl", "model": "vit_small", "cam": "gradcam++"})
    assert (config["epochs"], config["lr"], config["image_size"], config["area"]) == (5, 0.0001, 224, 0.1)
    assert config["model_entry"]["timm"].startswith("vit_small_patch16_224") and config["pretrained"]


@pytest.mark.parametrize("options, message", [
    ({"schedule": "20,p,19", "epochs": 30}, "adds up to 40 epochs, each p counting as one, but --epochs is 30"),
    ({"schedule": "every:0"}, "--schedule 'every:0': expected a whole number"),
    ({"schedule": "sometimes"}, "--schedule 'sometimes': expected every:K, after:E, plateau, or epochs and p"),
    ({"schedule": "after:20"}, "--schedule after:20: erases nothing within 20 epochs"),
    ({"schedule": "every:21"}, "--schedule every:21: erases nothing within 20 epochs"),
    ({"rounds": 2}, "--rounds goes with --mode staged"),
    ({"target_accuracy": 0.9}, "--target-accuracy goes with --mode staged"),
    ({"mode": "staged", "step": "same_step"}, "--step goes with --mode online"),
    ({"step": "same_step", "heat": "runs/first"}, "--step same_step goes with a network's own heat"),
    ({"heat": "snapshot", "cam": "none"}, "choose a --cam other than none"),
    ({"heat": "snapshot", "step": "same_step"}, "--step same_step goes with a network's own heat"),
    ({"heat": "snapshot", "select": "misled"}, "--heat snapshot changes every image: --select misled does not go with"),
    ({"heat": "snapshot", "control": "label"}, "--heat snapshot changes every image: --control label does not go with"),
    ({"heat": "snapshot", "augment": "cutmix"}, "has heat of single images, which --augment cutmix mixes"),
    ({"heat": "snapshot", "schedule": "plateau"}, "--schedule plateau: --heat snapshot takes every:K or after:E"),
    ({"heat": "snapshot", "schedule": "after:0"}, "--schedule after:0: --heat snapshot takes every:K or after:E"),
    ({"heat": "snapshot", "schedule": "every:20"}, "--schedule every:20: --heat snapshot takes every:K or after:E, in"),
    ({"heat": "snapshot", "epochs": 1}, "expected --epochs 2 at least"),
    ({"heat": "snapshot", "mode": "staged"}, "--heat goes with --mode online"),
    ({"heat": "snapshot", "mode": "resplit", "schedule": "1,p,1"}, "--mode resplit does not go with it"),
    ({"mode": "staged", "cam": "none"}, "choose a --cam other than none"),
    ({"mode": "staged", "schedule": "every:2"}, "--mode staged takes epochs and rounds, as 20,p,19"),
    ({"mode": "staged", "schedule": "p,3"}, "--mode staged begins with epochs of plain training"),
    ({"mode": "staged", "schedule": "2,p,1", "rounds": 2}, "has 1 rounds, but --rounds is 2"),
    ({"mode": "resplit"}, "--mode resplit draws a new split at each p"),
    ({"mode": "resplit", "schedule": "20"}, "--mode resplit draws a new split at each p"),
    ({"mode": "resplit", "schedule": "2,p", "rounds": 1}, "--rounds goes with --mode staged"),
    ({"weights": "a.pth", "init": "runs/a"}, "--weights and --init contradict each other"),
    ({"target_accuracy": 1.5, "mode": "staged"}, "--target-accuracy: 1.5 is out of range"),
    ({"control": "hottest"}, "--control: unknown 'hottest'; expected one of "),
    ({"threshold": 0.5}, "unknown setting 'threshold'"),
])
def test_settings_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(UserError) as error:
        resolve(CONFIGS, options)
    assert message in str(error.value)


def test_a_listed_schedule_decides_how_many_epochs_there_are():
    assert resolve(CONFIGS, {"schedule": "20,p,19"})["epochs"] == 40
    assert resolve(CONFIGS, {"schedule": "2,p,1", "epochs": 4})["epochs"] == 4
    assert settings.stage_epochs(resolve(CONFIGS, {"mode": "staged", "rounds": 2})) == [20, 20, 20]
    staged = resolve(CONFIGS, {"mode": "staged", "schedule": "5,p,9,p,9,p,9,p,4"})
    assert settings.stage_epochs(staged) == [5, 10, 10, 10, 5] and staged["rounds"] == 4


def test_a_folder_alone_is_trained_on_and_never_the_digits():
    assert resolve(CONFIGS, {"data_dir": "photos"})["dataset"] == "folder"
    assert resolve(CONFIGS, {"data_dir": "photos", "dataset": "asl"})["dataset"] == "asl"
    assert resolve(changed("defaults.data_dir", "photos"), {})["dataset"] == "folder"
    assert resolve(changed("defaults.dataset", "asl"), {"data_dir": "photos"})["dataset"] == "asl"
    for name in ("digits", "noisy_digits"):
        with pytest.raises(UserError, match=f"--data-dir: the images of dataset {name} come with scikit-learn"):
            resolve(CONFIGS, {"data_dir": "photos", "dataset": name})


def test_unknown_names_come_with_the_nearest_known():
    with pytest.raises(UserError, match="unknown dataset 'digit'.*Did you mean 'digits'"):
        resolve(CONFIGS, {"dataset": "digit"})
    with pytest.raises(UserError, match="unknown model 'vit_smal'.*Did you mean 'vit_small'"):
        resolve(CONFIGS, {"model": "vit_smal"})
    with pytest.raises(UserError, match="--fill: unknown 'blakc'.*Did you mean 'black'"):
        resolve(CONFIGS, {"fill": "blakc"})
    with pytest.raises(UserError, match="name the folder of class folders with --data-dir DIR"):
        resolve(CONFIGS, {"dataset": "folder"})


def test_what_the_run_filled_in_is_no_difference_between_settings():
    """--batch-size auto and a layer left to the rule are in a run's config as what was found."""
    there = resolve(CONFIGS, {"batch_size": 64, "layer": "layer4", "name": "a", "out": "b", "workers": 3})
    for options in ({"batch_size": "auto"}, {"layer": "-2"}, {"device": "cpu", "cache": "off"}, {"layer": "layer4"}):
        assert settings.differing_settings(resolve(CONFIGS, options), there) == []
    assert settings.differing_settings(resolve(CONFIGS, {"lr": 0.1, "layer": "layer3"}), there) == ["lr", "layer"]
