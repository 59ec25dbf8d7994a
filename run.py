"""A run: its settings, its network, and its folder with all that opens it again.

    config = resolve(read_configs(), {"dataset": "asl", "model": "vit_small"})   # every setting, checked
    model = build_network(config, classes=29)
    run = open_run("runs/NAME")                                                  # config, env, split, log, checkpoints

Every file is written under a temporary name, synced and renamed, so that a crash leaves the old one or the new one and
never half of one. Opening a run executes nothing that lies in it.
"""

import collections
import concurrent.futures
import contextlib
import csv
import difflib
import gc
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cache
import cam
import data
import proxy
from data import UserError, cannot_write, sync_folder, write_atomically

HERE = Path(__file__).resolve().parent
CONFIGS = HERE / "configs.json"

# --- settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One setting of a run: its type, what it may be, and what `--help` says. The default is in `configs.json`."""

    kind: type
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    optional: bool = False  # may be null
    word: str | None = None  # may be this word instead

    def check(self, value, where):
        """The value as it is used, or UserError that names `where` it stood."""
        if value is None and self.optional or value is not None and value == self.word:
            return value
        right = isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value, right = float(value), True
        if not right:
            names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
            raise UserError(f"{where}: {json.dumps(value)} is not {names[self.kind]}{' or null' * self.optional}"
                            + (f" or {self.word}" if self.word else ""))
        if self.choices and value not in self.choices:
            raise UserError(f"{where}: unknown {value!r}; expected one of {', '.join(self.choices)}"
                            + _nearest(value, self.choices))
        if self.kind in (int, float) and not ((self.low is None or value >= self.low)
                                              and (self.high is None or value <= self.high)):
            span = f"at least {self.low:g}" if self.high is None else f"between {self.low:g} and {self.high:g}"
            raise UserError(f"{where}: {value} is out of range; expected {span}")
        return value


AUTO = "auto"
TINY = 1e-9  # the lower end of ranges that exclude zero

SETTINGS = {
    "dataset": Setting(str, "what to train on: a dataset of configs.json, or `folder` with --data-dir"),
    "data_dir": Setting(str, "the dataset's folder, if not the one configs.json names", optional=True),
    "classes": Setting(str, "the only classes to use, with commas between (null: all)", optional=True),
    "model": Setting(str, "network: a short name of configs.json or any timm name"),
    "pretrained": Setting(bool, "start from timm's pretrained weights where it has them"),
    "weights": Setting(str, "start from a local .safetensors or .pth file instead", optional=True),
    "init": Setting(str, "start from the network of the finished run in this folder, keeping its split; classes are told by name",
                    optional=True),
    "reweight": Setting(str, "Just Train Twice: draw the training images that the finished run in this folder gets wrong --upweight times as "
                        "often", optional=True),
    "upweight": Setting(int, "how many times as often --reweight draws them", 1, 1000),
    "image_size": Setting(int, "side of the square images in pixels (null: the dataset's)", 8, 4096, optional=True),
    "train_fraction": Setting(float, "share of the training part to train on, stratified", TINY, 1),
    "decoy": Setting(bool, "plant a shortcut: a coloured square in a corner of each image gives its class away in training and validation, and "
                     "lies in the test"),
    "skip_bad": Setting(bool, "leave out images that cannot be used; without, they are listed and nothing is trained"),
    "split_from": Setting(str, "folder of a run whose split to use again", optional=True),
    "seed": Setting(int, "decides split, order, augmentation and initial weights", 0, 2**31),
    "epochs": Setting(int, "passes over the training part", 1, 100_000),
    "batch_size": Setting(int, "images per step; auto: as many as the GPU's memory holds", 2, 65_536, word=AUTO),
    "lr": Setting(float, "peak learning rate of the one-cycle schedule", TINY, 100),
    "layer_decay": Setting(float, "each layer below the head learns this much slower than the one above (timm); 1 is off", TINY, 1),
    "freeze": Setting(int, "epochs in which the head alone is trained, first", 0, 100_000),
    "accumulate": Setting(int, "batches whose gradients are added up before each optimizer step", 1, 10_000),
    "weight_decay": Setting(float, "AdamW's, on matrices and kernels only", 0, 10),
    "clip": Setting(float, "largest norm of the gradient", TINY, 1e9),
    "augment": Setting(str, "what is done to training images; light: the dataset's flip, rotation and shift",
                       choices=tuple(data.AUGMENTATIONS)),
    "random_erasing": Setting(float, "probability that a random rectangle of a training image becomes noise", 0, 1),
    "hide_and_seek": Setting(float, "probability that a cell of a training image is hidden; its paper has 0.5", 0, 1),
    "mixup": Setting(float, "alpha of mixup; 0 is off", 0, 100),
    "cutmix": Setting(float, "alpha of cutmix; 0 is off", 0, 100),
    "cam": Setting(str, "what gives the heat; none trains without Proxy Attention", choices=("none", *cam.METHODS)),
    "heat_from": Setting(str, "take the heat from the network of the finished run in this folder, which does not change, instead of from the one in "
                         "training; implies --same-step", optional=True),
    "layer": Setting(str, "the layer to explain, or several with commas between; -2 is the stage before the last (null: the deepest with "
                     "at least a 4x4 grid)", optional=True),
    "explain": Setting(str, "the score to explain: the predicted class's logit, the true one's, or the true one's margin "
                       "over the best other", choices=tuple(cam.EXPLAIN)),
    "smooth": Setting(bool, "eigen-smoothing: the first principal component of the weighted activations"),
    "warmup": Setting(int, "epochs before the first image is erased", 0, 100_000),
    "schedule": Setting(str, "epochs in which images are erased: every:K, after:E, plateau, or epochs and proxy rounds as 20,p,19 "
                        "(null: all)", optional=True),
    "same_step": Setting(bool, "erase and train on what is selected at once, through a second forward pass, not in the next step"),
    "select": Setting(str, "which images are erased: those the network gets wrong, or first those with the lowest confidence or "
                      "the highest loss", choices=tuple(proxy.SELECTIONS)),
    "subset": Setting(float, "share of the selected images that is erased", TINY, 1),
    "area": Setting(float, "erase this share of an image's pixels, the hottest", TINY, 1, optional=True),
    "grow": Setting(int, "epochs over which --area grows to its value, from an equal part of it in the first; 0: it is whole at once", 0, 100_000),
    "threshold": Setting(float, "erase the pixels at least this hot, instead of an area", 0, 1, optional=True),
    "soften": Setting(float, "blur the edges of what is erased, as a share of the image's side; 0 leaves them sharp", 0, 0.25),
    "fill": Setting(str, "what goes where an image is erased", choices=tuple(proxy.FILLS)),
    "weight": Setting(float, "of --fill blend: pixels are multiplied by 1 - weight * heat", 0, 1),
    "control": Setting(str, "what is erased instead, for comparison: the same shape at a random place, the least active pixels, or "
                       "the right pixels of images drawn at random", choices=tuple(proxy.CONTROLS), optional=True),
    "consistency": Setting(float, "of --same-step: times the divergence of what the network says of an erased copy from what it said of its "
                           "original is added to the loss; 0 is off", 0, 1000),
    "budget": Setting(str, "erased images take seats in the batch (equal) or ride behind it (extra)",
                      choices=("equal", "extra")),
    "share": Setting(float, "at most this share of a batch is erased images", TINY, 1),
    "mode": Setting(str, "erase within the training step (online), or between trainings and on disk (staged)",
                    choices=("online", "staged")),
    "rounds": Setting(int, "of --mode staged: at most so many times it erases and trains again", 0, 1000),
    "target_accuracy": Setting(float, "of --mode staged: validation accuracy that ends it (null: none)", TINY, 1, optional=True),
    "format": Setting(str, "of --mode staged: erased images are kept as", choices=("jpg", "png")),
    "protocol": Setting(str, "fixed: one split for the run; resplit: a new one at each p of --schedule, as the published "
                        "implementation, which leaks validation images into training", choices=("fixed", "resplit")),
    "device": Setting(str, "auto, cpu, cuda, cuda:1, mps"),
    "workers": Setting(int, "processes that decode images (null: one per core, 8 at most)", 0, 256, optional=True),
    "cache": Setting(str, "decoded images are kept in a folder: this one; auto: .cache in --out, where they fit; off: decode them "
                          "anew in every epoch"),
    "checkpoint_every": Setting(str, "optimizer steps, or minutes as 10m, from one checkpoint to the next within an epoch"),
    "compile": Setting(bool, "torch.compile the network"),
    "checkpointing": Setting(bool, "compute activations twice rather than keep them, where timm's network can"),
    "sync_bn": Setting(bool, "under torchrun: batch norm over the batches of all processes"),
    "deterministic": Setting(bool, "the same bits on a GPU too, at some cost in speed"),
    "amp": Setting(str, "mixed precision; auto: bfloat16 or float16 as the GPU can, off on a CPU",
                   choices=("auto", "off", "bfloat16", "float16")),
    "out": Setting(str, "folder that the runs' folders go into"),
    "name": Setting(str, "the run's name (null: dataset-model-cam-sSEED)", optional=True),
}
DATASET_KEYS = {"source": str, "path": (str, type(None)), "layout": str, "image_size": int,
                "normalisation": (str, dict), "split": dict, "augment": dict}
DATASET_EXTRAS = {"package": dict, "csv": dict, "torchvision": dict, "digits": dict, "settings": dict}
MODEL_KEYS, MODEL_EXTRAS = {"timm": str}, {"arguments": dict, "settings": dict}


def _nearest(word, known):
    near = difflib.get_close_matches(str(word), [str(k) for k in known], 1, 0.5)
    return f". Did you mean {near[0]!r}?" if near else ""


def _check_keys(found, required, extras, where):
    """The object at `where` has every required key, no unknown one, and each value of the right type."""
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object, found {json.dumps(found)}")
    known = {**required, **extras}
    for key, value in found.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; expected {', '.join(known)}{_nearest(key, known)}")
        if known[key] and (not isinstance(value, known[key]) or isinstance(value, bool) and known[key] is not bool):
            kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
            words = {str: "a text", int: "a whole number", float: "a number", dict: "an object", list: "a list",
                     bool: "true or false", type(None): "null"}
            raise UserError(f"{where}.{key}: {json.dumps(value)} is not {' or '.join(words[k] for k in kinds)}")
    for key in required:
        if key not in found:
            raise UserError(f"{where}: key {key!r} is missing")


def _check_settings(settings, where):
    for key, value in settings.items():
        if key not in SETTINGS:
            raise UserError(f"{where}: unknown key {key!r}; expected {', '.join(SETTINGS)}{_nearest(key, SETTINGS)}")
        settings[key] = SETTINGS[key].check(value, f"{where}.{key}")


def _once(pairs):
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"key {key!r} stands twice in the same object")
    return dict(pairs)


def read_json(path, unique_keys=False):
    """A JSON file's content; UserError that names file, line and column where it is not JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"), object_pairs_hook=_once if unique_keys else None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_configs(path=CONFIGS):
    """`configs.json`, checked: every key known, every type right, none missing. Raises UserError naming key and place."""
    configs = read_json(path, unique_keys=True)
    name = Path(path).name
    _check_keys(configs, {"defaults": dict, "models": dict, "datasets": dict}, {"experiments": dict}, name)
    _check_keys(configs["defaults"], dict.fromkeys(SETTINGS), {}, f"{name}: defaults")
    _check_settings(configs["defaults"], f"{name}: defaults")
    for short, entry in configs["models"].items():
        where = f"{name}: models.{short}"
        _check_keys(entry, MODEL_KEYS, MODEL_EXTRAS, where)
        _check_settings(entry.get("settings", {}), f"{where}.settings")
    for short, entry in configs["datasets"].items():
        _check_dataset(entry, f"{name}: datasets.{short}")
    for short, entry in configs.get("experiments", {}).items():
        _check_experiment(entry, f"{name}: experiments.{short}")
    return configs


def _check_experiment(entry, where):
    _check_keys(entry, {"seeds": list}, {"help": str, "settings": dict, "arms": dict, "grid": dict}, where)
    seeds = entry["seeds"]
    for seed in seeds:
        SETTINGS["seed"].check(seed, f"{where}.seeds")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{where}.seeds: {json.dumps(seeds)}; expected one or more different seeds")
    if not entry.get("arms") and not entry.get("grid"):
        raise UserError(f"{where}: nothing varies; expected arms, {{name: settings}}, or grid, {{setting: [values]}}")
    arms = entry.get("arms", {})
    _check_keys(arms, {}, dict.fromkeys(arms, dict), f"{where}.arms")
    for arm, settings in {"settings": entry.get("settings", {}), **{f"arms.{arm}": s for arm, s in arms.items()}}.items():
        _check_settings(settings, f"{where}.{arm}")
    for key, values in entry.get("grid", {}).items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}.grid.{key}: expected a list of values, found {json.dumps(values)}")
        for value in values:
            _check_settings({key: value}, f"{where}.grid")


def _check_dataset(entry, where):
    _check_keys(entry, DATASET_KEYS, DATASET_EXTRAS, where)
    Setting(str, "", choices=tuple(data.LAYOUTS)).check(entry["layout"], f"{where}.layout")
    SETTINGS["image_size"].check(entry["image_size"], f"{where}.image_size")
    _check_settings(entry.get("settings", {}), f"{where}.settings")
    split = entry["split"]
    _check_keys(split, {"rule": str, "val": (float, int), "test": (float, int)}, {"blocks": int}, f"{where}.split")
    Setting(str, "", choices=("stratified", "blocks")).check(split["rule"], f"{where}.split.rule")
    for part in ("val", "test"):
        Setting(float, "", TINY, 0.9).check(split[part], f"{where}.split.{part}")
    if split["val"] + split["test"] >= 1:
        raise UserError(f"{where}.split: val and test take {split['val'] + split['test']:g} of the images; "
                        "expected less than 1, so that some are left to train on")
    if split["rule"] == "blocks":
        _check_keys(split, {"blocks": int}, {"rule": str, "val": None, "test": None}, f"{where}.split")
        Setting(int, "", 3, 1_000_000).check(split["blocks"], f"{where}.split.blocks")
    augment = entry["augment"]
    _check_keys(augment, {"flip": bool, "rotate": (float, int), "shift": (float, int)}, {}, f"{where}.augment")
    Setting(float, "", 0, 180).check(augment["rotate"], f"{where}.augment.rotate")
    Setting(float, "", 0, 1).check(augment["shift"], f"{where}.augment.shift")
    normalisation = entry["normalisation"]
    if isinstance(normalisation, dict):
        _check_keys(normalisation, {"mean": list, "std": list}, {}, f"{where}.normalisation")
        for key, low in (("mean", 0), ("std", TINY)):
            if len(normalisation[key]) != 3:
                raise UserError(f"{where}.normalisation.{key}: expected three numbers, one per channel")
            for value in normalisation[key]:
                Setting(float, "", low, 1).check(value, f"{where}.normalisation.{key}")
    elif normalisation != "network":
        raise UserError(f"{where}.normalisation: {normalisation!r}; expected \"network\" (what the network's "
                        "pretrained weights were trained with) or an object of mean and std")
    if "digits" in entry:
        _check_keys(entry["digits"], {"images": int, "contrast": (float, int), "noise": (float, int)}, {}, f"{where}.digits")
        for key, low, high in (("images", 30, 1797), ("contrast", 0, 1), ("noise", 0, 10)):
            Setting(float, "", low, high).check(entry["digits"][key], f"{where}.digits.{key}")
    if entry["layout"] == "csv":
        _check_keys(entry, {"csv": dict}, {**DATASET_KEYS, **DATASET_EXTRAS}, where)
        texts = {"file": str, "path": str, "label": str}
        _check_keys(entry["csv"], texts, {"split": str, "group": str, "columns": list, "delimiter": str, "classes": dict, "parts": dict},
                    f"{where}.csv")
        for key in ("classes", "parts"):
            _check_keys(found := entry["csv"].get(key, {}), {}, dict.fromkeys(found, str), f"{where}.csv.{key}")
        for part in entry["csv"].get("parts", {}).values():
            Setting(str, "", choices=data.PARTS).check(part, f"{where}.csv.parts")
        for column in entry["csv"].get("columns", []):
            Setting(str, "").check(column, f"{where}.csv.columns")
        if len(entry["csv"].get("delimiter", ",")) != 1:
            raise UserError(f"{where}.csv.delimiter: {entry['csv']['delimiter']!r}; expected one character")
    if "package" in entry:
        _check_keys(entry["package"], {"module": str, "folder": str, "install": str}, {}, f"{where}.package")
    if entry["layout"] == "torchvision":
        from torchvision import datasets

        _check_keys(entry, {"torchvision": dict}, {**DATASET_KEYS, **DATASET_EXTRAS}, where)
        _check_keys(entry["torchvision"], {"class": str, "parts": dict}, {}, f"{where}.torchvision")
        Setting(str, "", choices=datasets.__all__).check(entry["torchvision"]["class"], f"{where}.torchvision.class")
        _check_keys(entry["torchvision"]["parts"], {"train": dict}, {"val": dict, "test": dict},
                    f"{where}.torchvision.parts")


def resolve(configs, options):
    """Every setting of a run, from weakest to strongest: defaults, the dataset's, the model's, `options`.

    options: {setting: value}, as given on the command line. Returns a flat dict with the keys of SETTINGS, plus
    "dataset_entry" and "model_entry", the parts of configs.json that they name. Raises UserError.
    """
    unknown = [key for key in options if key not in SETTINGS]
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}{_nearest(unknown[0], SETTINGS)}")
    options = {key: SETTINGS[key].check(value, f"--{key.replace('_', '-')}") for key, value in options.items()}
    chosen = {**configs["defaults"], **options}
    if chosen["dataset"] not in configs["datasets"]:
        known = configs["datasets"]
        raise UserError(f"unknown dataset {chosen['dataset']!r}; configs.json has {', '.join(known)}"
                        f"{_nearest(chosen['dataset'], known)}")
    dataset = configs["datasets"][chosen["dataset"]]
    chosen = {**chosen, **dataset.get("settings", {}), **options}
    model = configs["models"].get(chosen["model"]) or _timm_model(chosen["model"], configs["models"])
    config = {}
    for layer in (configs["defaults"], dataset.get("settings", {}), model.get("settings", {}), options):
        _area_or_threshold(config, layer)
    config = {key: config[key] for key in SETTINGS}
    config |= {"dataset": chosen["dataset"], "model": chosen["model"]}
    config["image_size"] = config["image_size"] or dataset["image_size"]
    config["data_dir"] = config["data_dir"] or (str(HERE / dataset["path"]) if dataset["path"] else None)
    if config["data_dir"] is None and "package" in dataset:
        config["data_dir"] = _package_folder(config["dataset"], dataset["package"])
    if config["dataset"] == "folder" and config["data_dir"] is None:
        raise UserError("dataset folder: name the folder of class folders with --data-dir DIR")
    _settings_that_agree(config, options)
    _check_name(config["name"])
    entry = {key: value for key, value in dataset.items() if key != "settings"}
    return config | {"dataset_entry": entry, "model_entry": {k: v for k, v in model.items() if k != "settings"}}


def _package_folder(name, package):
    """The folder of images in an installed Python package, which is found and not imported."""
    try:
        found = importlib.util.find_spec(package["module"])
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"dataset {name}: its package is not installed. Run {package['install']}, or name the dataset's folder with --data-dir DIR")
    return str(Path(found.submodule_search_locations[0]) / package["folder"])


def _check_name(name):
    if name is not None and (not name.strip(". ") or set(name) & set('/\\\0\n')):
        raise UserError(f"--name {name!r}: expected a plain folder name; --out says where it goes")


STAGED_ONLY = ("rounds", "target_accuracy", "format")
ONLINE_ONLY = ("same_step", "warmup", "share", "heat_from", "grow", "consistency")
OF_RUNS = ("init", "reweight", "heat_from")  # name the folder of another run


def _settings_that_agree(config, options):
    """Raise UserError for settings that exclude each other; make the epochs those of a listed schedule."""
    def option(key):
        return f"--{key.replace('_', '-')}"

    staged = config["mode"] == "staged"
    for key in options:
        if key in (ONLINE_ONLY if staged else STAGED_ONLY) and options[key] not in (None, False):
            raise UserError(f"{option(key)} goes with --mode {'online' if staged else 'staged'}: leave it out, or change --mode")
    read_interval(config["checkpoint_every"])
    if config["weights"] and config["init"]:
        raise UserError("--weights and --init contradict each other: give one of them")
    if config["reweight"] and (staged or config["protocol"] != "fixed"):
        raise UserError("--reweight goes with --mode online and --protocol fixed: leave it out, or change them")
    config["same_step"] = config["same_step"] or config["heat_from"] is not None
    if config["heat_from"] and config["cam"] == "none":
        raise UserError("--heat-from gives the heat to erase by: choose a --cam other than none")
    if config["consistency"] and (config["heat_from"] or not config["same_step"]):
        raise UserError("--consistency compares what the network says in the two passes of --same-step: give that, and leave --heat-from out")
    if config["grow"] and config["area"] is None:
        raise UserError("--grow goes with --area: leave it out, or --threshold")
    try:
        kind, argument = proxy.read_schedule(config["schedule"])
    except ValueError as error:
        raise UserError(f"--schedule {error}") from None
    if kind == "listed":
        if options.get("epochs", len(argument)) != len(argument):
            raise UserError(f"--schedule {config['schedule']}: adds up to {len(argument)} epochs, each p counting as one, but --epochs "
                            f"is {config['epochs']}; leave --epochs out, or make them agree")
        SETTINGS["epochs"].check(len(argument), f"--schedule {config['schedule']}: the sum of epochs")
        config["epochs"] = len(argument)
    elif kind in ("every", "after") and config["schedule"] and argument >= config["epochs"] + (kind == "every"):
        raise UserError(f"--schedule {config['schedule']}: erases nothing within {config['epochs']} epochs")
    if staged:
        if config["cam"] == "none":
            raise UserError("--mode staged erases between trainings: choose a --cam other than none")
        if config["schedule"] is not None and kind != "listed":
            raise UserError(f"--schedule {config['schedule']}: --mode staged takes epochs and rounds, as 20,p,19")
        if kind == "listed":
            if options.get("rounds", sum(argument)) != sum(argument):
                raise UserError(f"--schedule {config['schedule']}: has {sum(argument)} rounds, but --rounds is {config['rounds']}; leave "
                                "--rounds out, or make them agree")
            if not argument or argument[0]:
                raise UserError(f"--schedule {config['schedule']}: --mode staged begins with epochs of plain training, as 20,p,19")
            config["rounds"] = sum(argument)
    elif config["protocol"] == "resplit" and not (kind == "listed" and any(argument)):
        raise UserError("--protocol resplit draws a new split at each p: name them, as with --schedule 20,p,19")


PER_MACHINE = ("name", "out", "device", "workers", "cache", "checkpoint_every")  # settings that leave what is trained as it is


def differing_settings(config, there):
    """Settings in which a resolved config and that of a run differ, but for those of the machine and the run's place."""
    left_open = {"batch_size": (AUTO,), "layer": (None, cam.FROM_END.fullmatch(config["layer"] or "") and config["layer"])}  # which the run has filled in
    return [key for key in config if key not in PER_MACHINE and there.get(key) != config[key] and config[key] not in left_open.get(key, ())]


def read_interval(text):
    """--checkpoint-every: (number, whether it is minutes). Raises UserError."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})(m?)", text, re.ASCII)
    if not found:
        raise UserError(f"--checkpoint-every {text}: expected a number of steps, as 500, or of minutes, as 10m")
    return int(found[1]), bool(found[2])


# Settings that say nothing where --cam is none.
ERASING = ("heat_from", "layer", "explain", "smooth", "warmup", "same_step", "select", "subset", "area", "threshold", "soften", "fill", "weight", "control",
           "budget", "share", "grow", "consistency")


def stage_epochs(config):
    """Epochs of stage 1 and of stage 3 of each round, for --mode staged. Each p of a schedule is the first epoch of its round."""
    kind, argument = proxy.read_schedule(config["schedule"])
    if kind != "listed":
        return [config["epochs"]] * (1 + config["rounds"])
    starts = [epoch for epoch, p in enumerate(argument) if p]
    return [end - start for start, end in zip([0, *starts], [*starts, len(argument)])]


def _area_or_threshold(config, layer):
    """Put `layer` on top of `config`; of area and threshold, the one that is named later replaces the other."""
    named = [key for key in ("area", "threshold") if layer.get(key) is not None]
    if len(named) == 2:
        raise UserError("--area and --threshold contradict each other: give one of them")
    config.update(layer)
    if named:
        config["area" if named == ["threshold"] else "threshold"] = None
    if config["area"] is None and config["threshold"] is None:
        raise UserError("neither area nor threshold is set: give one of them")


def _timm_model(name, short_names):
    import timm

    if not timm.is_model(name):
        raise UserError(f"unknown model {name!r}; configs.json has {', '.join(short_names)}, and timm has "
                        f"{len(timm.list_models())} more{_nearest(name, [*short_names, *timm.list_models()])}")
    return {"timm": name}


# --- the network ---------------------------------------------------------------------------------------------------


def build_network(config, classes, pretrained=None):
    """The network of a resolved config, on the CPU, and what to say of its start.

    classes: number of outputs. pretrained: overrides config["pretrained"]; False for a network whose weights will be loaded from a
    checkpoint anyway. Returns (model, text). Raises UserError where the weights cannot be had.
    """
    import timm

    name, arguments = config["model_entry"]["timm"], dict(config["model_entry"].get("arguments", {}))
    known = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if known is not None and known.fixed_input_size:
        arguments["img_size"] = config["image_size"]
    weights = config["weights"] if pretrained is None else None
    pretrained = config["pretrained"] if pretrained is None else pretrained
    pretrained = pretrained and not weights
    text = "starts from random weights"
    if pretrained and not (known is not None and known.has_weights):
        pretrained, text = False, f"starts from random weights, for timm has no pretrained ones for {name}"
    if pretrained:
        text = f"starts from timm's pretrained weights {name}"
        _reach_hub(known, name)
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=classes, **arguments)
    except OSError as error:
        raise UserError(_no_hub(name, str(error).splitlines()[0])) from None
    except Exception as error:  # networks raise every kind for sizes and arguments that they were not made for
        given = f" with {arguments}" if arguments else ""
        raise UserError(f"timm cannot build {name}{given}: {str(error).splitlines()[0] if str(error) else error!r}. "
                        "Try another --image-size or --model") from None
    if weights:
        text = load_weights(model, weights)
    return model, text


def first_network(config, classes):
    """The network that a run starts with, on the CPU, and what to say of its start: as `build_network`, or another run's.

    classes: names. The initial weights follow from the seed.
    """
    torch.manual_seed(config["seed"])
    if config["init"] is None:
        return build_network(config, len(classes))
    model, _ = build_network(config, len(classes), pretrained=False)
    return model, _continue_from(model, config, classes)


def _continue_from(model, config, classes):
    """Load the last weights of the run config["init"]; of the head, the rows of the classes that both have, told by name."""
    opened = open_finished(config["init"], "--init ")
    if opened.config["model_entry"] != config["model_entry"]:
        raise UserError(f"--init {opened.folder}: its network is --model {opened.config['model']}, not {config['model']}")
    found, own, old = load_checkpoint(opened.folder / "last.pt")["model"], model.state_dict(), opened.split["classes"]
    head = head_names(config, model, len(classes))
    both = [c for c in classes if c in old]
    here, there = ([names.index(c) for c in both] for names in (classes, old))
    for name, tensor in own.items():
        axis = head.get(name)
        source = found.get(name)
        expected = list(tensor.shape)
        if axis is not None:
            expected[axis] = len(old)
        if source is None or list(source.shape) != expected:
            raise UserError(f"--init {opened.folder}: {name} is {'missing' if source is None else list(source.shape)} there, expected "
                            f"{expected}; use the same --image-size ({opened.config['image_size']})")
        if axis is None:
            tensor.copy_(source)
        elif both:
            tensor.index_copy_(axis, torch.tensor(here), source.index_select(axis, torch.tensor(there)))
    new = [c for c in classes if c not in old]
    return (f"starts from {opened.folder}; its head keeps {len(both)} of {len(classes)} classes"
            + (f", new are {', '.join(new[:10])}{' …' * (len(new) > 10)}" if new else ""))


def run_before(config, key, classes):
    """The finished run that config[key] names, on these classes. Raises UserError."""
    option = f"--{key.replace('_', '-')} "
    first = open_finished(config[key], option)
    if first.split["classes"] != classes:
        raise UserError(f"{option}{first.folder}: has the classes {', '.join(first.split['classes'][:10])}, not {', '.join(classes[:10])}; give a "
                        "run on the same data")
    return first


def heat_run(config, classes):
    """The finished run of --heat-from, or None. Raises UserError where its network is not this run's, for one layer is to serve both."""
    if config["heat_from"] is None:
        return None
    first = run_before(config, "heat_from", classes)
    for key, name in (("model_entry", "model"), ("image_size", "image_size")):
        if first.config[key] != config[key]:
            raise UserError(f"--heat-from {first.folder}: has --{name.replace('_', '-')} {json.dumps(first.config[name])}, not "
                            f"{json.dumps(config[name])}; give a run with the same")
    return first


def keep_heat_network(first, folder):
    """Copy the last weights of the run --heat-from into `heat.pt`, so that the run in `folder` is whole without it."""
    if first is not None:
        save_checkpoint(folder / "heat.pt", {"model": load_checkpoint(first.folder / "last.pt")["model"]})


def heat_network(config, classes, folder):
    """The network that the heat is of where that is not the one in training, frozen, in eval mode, on the CPU; else None. classes: how many."""
    if config["heat_from"] is None:
        return None
    model, _ = build_network(config, classes, pretrained=False)
    model.load_state_dict(load_checkpoint(folder / "heat.pt")["model"])
    return model.eval().requires_grad_(False)


def head_names(config, model, classes):
    """Names of the tensors whose shape depends on the number of classes: the head, or heads. -> {name: the axis that does}."""
    with torch.device("meta"):
        larger = build_network(config, classes + 1, pretrained=False)[0].state_dict()
    axes = {name: [i for i, (a, b) in enumerate(zip(tensor.shape, larger[name].shape)) if a != b]
            for name, tensor in model.state_dict().items()}
    return {name: axis[0] for name, axis in axes.items() if axis}


def _reach_hub(known, name):
    """Fail at once where weights neither lie in the hub's cache nor can be fetched: the hub itself retries for a minute."""
    import huggingface_hub

    if not known.hf_hub_id:
        return
    repo = known.hf_hub_id if "/" in known.hf_hub_id and not known.hf_hub_id.endswith("/") else f"timm/{name}"
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repo, file), str)
           for file in ("model.safetensors", "pytorch_model.bin")):
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(_no_hub(name, "HF_HUB_OFFLINE is set"))
    try:
        request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        raise UserError(_no_hub(name, getattr(error, "reason", error))) from None


def _no_hub(name, reason):
    return (f"the pretrained weights of {name} cannot be fetched ({reason}). Give a local file with --weights FILE "
            "(.safetensors or .pth), or train from random weights with --no-pretrained")


def read_weights(path):
    """{name: tensor} of a `.safetensors` or `.pth` file; executes nothing in it. Raises UserError where it cannot be read."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except Exception as error:  # both libraries raise many kinds for what is not such a file
        reason = "it holds more than tensors, and loading it could run code" if "weights_only" in str(error) \
            else str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"--weights {path}: cannot be loaded ({reason}). Expected a .safetensors file, or a .pth file of "
                        "tensors alone") from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise UserError(f"--weights {path}: holds {type(found).__name__}, not named tensors")
    return {str(k).removeprefix("module.").removeprefix("_orig_mod."): v for k, v in found.items()
            if isinstance(v, torch.Tensor)}


def load_weights(model, path):
    """Load a `.safetensors` or `.pth` file into `model`.

    Tensors that the network has not, or has in another shape (as the head for other classes), are left out. Where another library named
    them, they are told by their order. Returns a text that says which and why. Raises UserError where the file cannot be read or nothing in it fits.
    """
    found, own = read_weights(path), model.state_dict()
    by_order = not set(found) & set(own) and same_order(found, own)
    if by_order:
        found = dict(zip(own, found.values()))
    fits = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    if not fits:
        raise UserError(f"--weights {path}: none of its {len(found)} tensors fits {type(model).__name__}, whose first "
                        f"is {next(iter(own))} {list(next(iter(own.values())).shape)}")
    model.load_state_dict(fits, strict=False)
    lines = [f"starts from {path}: {len(fits)} of {len(own)} tensors" + ", told by their order, for no name is timm's" * by_order]
    lines += [f"  left out {k}: {list(v.shape)} in the file, {list(own[k].shape)} in the network"
              for k, v in found.items() if k in own and k not in fits]
    lines += [f"  left out {k}: the network has no such tensor" for k in found if k not in own]
    lines += [f"  not in the file, so random: {k}" for k in own if k not in found]
    return "\n".join(lines)


def same_order(found, own):
    """Whether two state dicts hold tensors of the same shapes one after the other; the head's two, the last, may be for other numbers of classes."""
    shapes, wanted = ([list(t.shape) for t in tensors.values()] for tensors in (found, own))
    return len(shapes) == len(wanted) > 2 and shapes[:-2] == wanted[:-2] and [s[1:] for s in shapes[-2:]] == [s[1:] for s in wanted[-2:]]


def classes_of_weights(config):
    """Number of classes that the weights of a config were trained for: the file's head says, or else timm."""
    import timm

    known = timm.models.get_pretrained_cfg(config["model_entry"]["timm"], allow_unregistered=True)
    if config["weights"] and known is not None and isinstance(known.classifier, str):
        head = read_weights(config["weights"]).get(f"{known.classifier}.weight")
        if head is not None:
            return len(head)
    return known.num_classes if known is not None else 1000


def normalisation(config, model):
    """(mean, std) [1, 3, 1, 1] for values in [0, 1]: the dataset's, or those that the network was pretrained with."""
    given = config["dataset_entry"]["normalisation"]
    if given == "network":
        given = {key: getattr(model, "pretrained_cfg", {}).get(key) or fallback for key, fallback in
                 (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))}  # ImageNet's
    return tuple(torch.tensor(given[key], dtype=torch.float32).view(1, 3, 1, 1) for key in ("mean", "std"))


def try_network(config, model):
    """One forward pass, in eval mode, that shows whether network, image size, method and layer fit together.

    Returns name and grid (h, w) of the explained layer, or (None, None) for --cam none; the model is left as it was. Raises
    UserError.
    """
    explain = contextlib.nullcontext()
    size, training, first = config["image_size"], model.training, next(model.parameters())
    what = f"{config['model']} with images of {size}x{size}"
    try:
        if config["cam"] != "none":
            what = f"--cam {config['cam']} with {what}"
            explain = cam.CAM(model, config["cam"], config["layer"], config["smooth"])
        with explain, torch.no_grad():
            logits = model.eval()(torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device))
            return (None, None) if config["cam"] == "none" else (explain.layer_name, explain(logits, rows=[]).shape[1:])
    except Exception as error:  # as in build_network
        raise UserError(f"{what}: {str(error).splitlines()[0] if str(error) else repr(error)}") from None
    finally:
        model.train(training)


def pick_device(name):
    """The torch device that a setting names; auto is CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not to be had here ({str(error).splitlines()[0]}). "
                        "Try --device cpu") from None
    return device


def pick_amp(name, device):
    """The dtype to autocast to, or None. auto: bfloat16 where the GPU has it, else float16; none on a CPU.

    On a CPU without bfloat16 instructions autocast is many times slower than float32, and with them a small network gains
    nothing, so there it has to be asked for.
    """
    if name == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


# --- the folder ----------------------------------------------------------------------------------------------------


def write_json(path, value):
    """`value` as JSON, the same bytes for the same value."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_arrays(path, arrays):
    """`arrays` {name: array} as an npz, without pickle. Not compressed: logits hardly shrink, and for 10,000 classes that took a minute."""
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_arrays(path):
    """{name: array} of an npz; UserError where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise UserError(f"{path}: cannot be read ({error}); remove it, and it is made again by python eval.py {Path(path).parent}") from None


def read_predictions(folder):
    """The arrays of `predictions.npz`; UserError where it is missing or damaged."""
    path = Path(folder) / "predictions.npz"
    if not path.exists():
        raise UserError(f"{path}: no such file; finish the run with python train.py --resume {folder}")
    return read_arrays(path)


def save_checkpoint(path, state):
    """`state`, a dict of tensors and plain values, as torch.save writes it: a zip file, whose comment is a checksum of all before."""
    def write(file):
        torch.save(state, file)
        file.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment, and the comment
        file.write(struct.pack("<H", CHECKSUM_BYTES))
        file.write(_checksum(file, file.tell()))

    write_atomically(path, write)


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote. Executes nothing in the file; raises UserError where it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            length = max(0, file.seek(0, os.SEEK_END) - CHECKSUM_BYTES)
            checksum = _checksum(file, length)
            if file.read() != checksum:
                raise UserError(f"{path}: damaged, its checksum is not that of its content ({length + CHECKSUM_BYTES} bytes)")
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except UserError:
        raise
    except Exception as error:  # torch raises many kinds for what is no checkpoint
        raise UserError(f"{path}: not a checkpoint ({str(error).splitlines()[0]})") from None


CHECKSUM_BYTES = 16


def _checksum(file, length):
    """blake2b of a file's first `length` bytes; leaves the file behind them."""
    file.seek(0)
    checksum = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    while length:
        block = file.read(min(length, 2**20))
        checksum.update(block)
        length -= len(block)
    return checksum.digest()


def keep_previous(path, previous):
    """Give the file a second name, so that it stays when `path` is written anew. A copy where the file system has no links."""
    path, previous = Path(path), Path(previous)
    if not path.exists():
        return
    temporary = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, previous)
        temporary.unlink(missing_ok=True)  # rename(2) does nothing where both names are of one file already
    except OSError as error:
        raise cannot_write(previous, error) from None


def last_checkpoint(folder, device="cpu"):
    """The content of `last.pt`, or of `previous.pt` where that is damaged or missing; and what to say of it, or None.

    (None, None) where there is neither. A damaged one is set aside as `damaged.pt`, and the one before becomes `last.pt`.
    Raises UserError where none is whole.
    """
    last, previous = Path(folder) / "last.pt", Path(folder) / "previous.pt"
    reason = f"{last}: missing"
    try:
        if last.exists():
            return load_checkpoint(last, device), None
        if not previous.exists():
            return None, None
    except UserError as error:
        reason = str(error)
    try:
        state = load_checkpoint(previous, device)
    except UserError:
        raise UserError(f"{reason}; and there is no whole previous.pt. Remove both to train {folder} from its beginning, with the same "
                        "split and settings", resumable=False) from None
    if last.exists():
        os.replace(last, last.with_name("damaged.pt"))
    keep_previous(previous, last)
    return state, (f"{reason}; going on from the checkpoint before it, after {state['epoch']} epochs"
                   + (f" and {state['step']} batches" if state["step"] else ""))


SOURCES = ("train.py", "run.py", "proxy.py", "cam.py", "data.py", "cache.py", "distributed.py", "eval.py")  # what decides what is trained
CODE = {name: hashlib.blake2b((HERE / name).read_bytes(), digest_size=8).hexdigest() for name in SOURCES}  # as it was when it was loaded


def made_with(config, split):
    """What a checkpoint depends on: settings, classes, dataset, versions and code. Plain values."""
    import timm

    return {"settings": {key: value for key, value in config.items() if key not in PER_MACHINE},
            "classes": split["classes"], "dataset": split["fingerprint"],
            "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
            "code": CODE}


def check_made_with(folder, there, now, any_code):
    """Raise UserError that says in what a checkpoint's `made_with` differs from this run's; any_code: code and versions may."""
    def differing(part):
        return [key for key in {**there[part], **now[part]} if there[part].get(key) != now[part].get(key)]

    path = Path(folder) / "last.pt"
    if keys := differing("settings"):
        pairs = ", ".join(f"{key} {json.dumps(there['settings'].get(key))}, not {json.dumps(now['settings'].get(key))}" for key in keys[:3])
        raise UserError(f"{path}: made with other settings than those in config.json: {pairs}. Put config.json back, or start a new run", resumable=False)
    if there["classes"] != now["classes"] or there["dataset"] != now["dataset"]:
        what = "classes" if there["classes"] != now["classes"] else "images"
        raise UserError(f"{path}: made on a dataset with other {what} than split.json names. Put split.json back, or start a new run", resumable=False)
    if any_code:
        return
    if keys := differing("versions"):
        pairs = ", ".join(f"{key} {there['versions'].get(key)}, not {now['versions'].get(key)}" for key in keys)
        raise UserError(f"{path}: made with {pairs}. Install these again, or go on regardless with --any-code, and perhaps to other figures", resumable=False)
    if keys := differing("code"):
        raise UserError(f"{path}: made with another {', '.join(keys)} than is here. Bring the code back, or go on regardless with --any-code, "
                        "and perhaps to other figures", resumable=False)


_locks = []  # open files, whose locks last as long as the process


def lock(folder):
    """Keep the run in `folder` to this process until it ends. Raises UserError where another process has it.

    The lock is the system's own: a process that was killed holds none, nor do processes that it left behind. On a file system without locks
    there is none.
    """
    try:
        import fcntl

        file = open(Path(folder) / LOCK, "a+")
    except (ImportError, OSError):
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder}: {file.read().strip() or 'another process'} is working on this run; wait for it, or stop it first") from None
    except OSError:
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    _locks.append(file)


LOCK = ".lock"


def is_leftover(folder):
    """Whether a folder holds no more than a process leaves that was killed before it had made a run of it."""
    folder = Path(folder)
    return folder.is_dir() and all(path.name in (LOCK, "env.json", "split.json", "bad-images.txt") or path.name.endswith(".tmp") for path in folder.iterdir())


def append_line(path, line):
    """Add one line to a JSON lines file, on the disk before this returns."""
    try:
        with open(path, "ab") as file:
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def read_log(folder):
    """The epochs' lines, first to last."""
    return read_lines(Path(folder) / "log.jsonl")


def read_lines(path):
    """What `append_line` wrote, first to last; a last line that a crash cut off is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cut_log(folder, epochs):
    """Keep the first `epochs` lines: what was logged after the checkpoint that a run resumes from happens again."""
    cut_lines(Path(folder) / "log.jsonl", epochs)


def cut_lines(path, count):
    """Keep the first `count` whole lines of a JSON lines file."""
    kept = "".join(json.dumps(line) + "\n" for line in read_lines(path)[:count])
    write_atomically(path, lambda file: file.write(kept.encode()))


def sweep(folder):
    """Remove what a killed process left half-written."""
    for path in Path(folder).rglob(".*.tmp"):
        path.unlink(missing_ok=True)


# --- erased images on the disk -------------------------------------------------------------------------------------

WRITERS = 4  # threads; encoding and the disk both leave Python's lock alone
IN_FLIGHT = 1024  # images that may wait to be written, 150 MB at 224 pixels; a disk that is slower still holds the device up
PICTURES = {"jpg": {"format": "JPEG", "quality": 95, "subsampling": 0}, "png": {"format": "PNG", "compress_level": 1}}
INDEX = ("file", "source", "label", "predicted", "confidence", "area")
PLAIN = set("-_+=,() ")  # in file names, besides letters and digits of any script, and dots within


def safe_name(text):
    """Any text as one file name, another for every text: %XX for what is not letter, digit or harmless; a hash for what is long."""
    name = ""
    for i, c in enumerate(text):
        plain = c.isalnum() or c in PLAIN and 0 < i < len(text) - 1 or c in "-_" or c == "." and 0 < i < len(text) - 1
        name += c if plain else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape"))
    if len(name.encode()) > 200:  # file systems take 255 bytes
        short = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        name = f"{name.encode()[:160].decode(errors='ignore')}~{short}"
    return name


class ErasedRound:
    """A round's erased images: `erased/round-R/CLASS/ID.jpg`, written by a pool of threads, `index.csv`, and how far it has come.

    Images come first, then their lines in the index, then `progress.json`, each on the disk before the next: whatever happens, all
    that progress tells of is there, and `looked_at` images need not be looked at again.

        with erased:
            erased.add(pictures, rows, looked_at, selected)     # comes back at once, unless IN_FLIGHT images wait
    """

    def __init__(self, folder, number, kind):
        self.run_folder, self.kind = Path(folder), kind
        self.folder = self.run_folder / "erased" / f"round-{number}"
        self.index, self.progress = self.folder / "index.csv", self.folder / "progress.json"
        state = read_json(self.progress) if self.progress.exists() else {"looked_at": 0, "selected": 0, "erased": 0}
        self.looked_at, self.selected, self.count = (state[key] for key in ("looked_at", "selected", "erased"))

    def rows(self):
        """The index's lines, as dicts with the keys of INDEX. file: relative to the run's folder. area: share of the pixels."""
        if not self.index.exists():
            return []
        with open(self.index, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.DictReader(file))[: self.count]

    def begin(self, order=None):
        """Start the index anew, or cut off what was written after the last progress.

        order: ids in the order in which they will be looked at, where that took work to find; kept in `order.json`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        rows = self.rows()
        write_atomically(self.index, lambda file: file.write(self._lines([dict(zip(INDEX, INDEX)), *rows])))
        if order is not None:
            write_json(self.folder / "order.json", order)
        self._save()

    def order(self):
        """What `begin` was given, or None."""
        path = self.folder / "order.json"
        return read_json(path) if path.exists() else None

    def __enter__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(WRITERS, "write")
        self._waiting, self._in_flight = collections.deque(), 0
        return self

    def add(self, pictures, rows, looked_at, selected):
        """Write erased images. pictures: n of uint8 [H, W, 3]. rows: n dicts with the keys of INDEX but for file.

        looked_at, selected: images so far, these included; those whose heat says nothing were selected and not erased.
        """
        jobs = []
        for picture, row in zip(pictures, rows):
            path = self.folder / safe_name(row["label"]) / f"{safe_name(row['source'])}.{self.kind}"
            row["file"] = path.relative_to(self.run_folder).as_posix()
            jobs.append(self._pool.submit(self._write, path, picture))
        self._waiting.append((jobs, rows, looked_at, selected))
        self._in_flight += len(jobs)
        while self._waiting and (self._in_flight > IN_FLIGHT or all(job.done() for job in self._waiting[0][0])):
            self._settle()

    def _write(self, path, picture):
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from None
        write_atomically(path, lambda file: Image.fromarray(picture).save(file, **PICTURES[self.kind]), sync_name=False)

    def _settle(self):
        """Wait for the oldest batch, then record it."""
        jobs, rows, looked_at, selected = self._waiting.popleft()
        for job in jobs:
            job.result()
        self._in_flight -= len(jobs)
        for folder in {(self.run_folder / row["file"]).parent for row in rows}:
            sync_folder(folder)
        try:
            with open(self.index, "ab") as file:
                file.write(self._lines(rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.index, error) from None
        self.count, self.looked_at, self.selected = self.count + len(rows), looked_at, selected
        self._save()

    def _lines(self, rows):
        text = io.StringIO()
        csv.DictWriter(text, INDEX).writerows(rows)
        return text.getvalue().encode("utf-8", "surrogateescape")

    def _save(self):
        write_json(self.progress, {"looked_at": self.looked_at, "selected": self.selected, "erased": self.count})

    def __exit__(self, kind, *rest):
        try:
            while kind is None and self._waiting:
                self._settle()
        finally:
            self._pool.shutdown(cancel_futures=True)


def held_mb(device):
    """Memory in use in MB (2^20 bytes): allocated on the GPU, or else resident in this process; None where neither can be told."""
    if device.type == "cuda":
        return round(torch.cuda.memory_allocated(device) / 2**20, 1)
    try:
        return round(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except (OSError, ValueError):
        return None


def release(device):
    """Give back what nothing refers to any more, from caches too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Energy:
    """Energy that this process's devices took since it was made, from counters of the hardware itself; nothing is estimated.

    source: what was read: "NVML" for the GPU that the process uses, "RAPL" for the CPU packages (of several processes on one machine the
    first reads them); None where there is neither. A thread reads RAPL now and then, as its counters start again from zero every
    few minutes under load.
    """

    PAUSE = 20.0  # seconds between two readings; a package at 1,000 W takes over four minutes to fill its counter

    def __init__(self, device, powercap="/sys/class/powercap", first=True):
        self._gpu, self._zones, self._joules, self._lock, self._end = None, [], 0.0, threading.Lock(), threading.Event()
        if device.type == "cuda":
            with contextlib.suppress(Exception):  # no library, no driver, or a GPU too old to count
                import pynvml

                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
                self._gpu = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
                self._gpu_start = self._gpu()
        for zone in sorted(Path(powercap).glob("intel-rapl:*")) if first else []:
            with contextlib.suppress(OSError, ValueError):
                if (zone / "name").read_text().startswith("package"):
                    self._zones.append([zone / "energy_uj", int((zone / "energy_uj").read_text()),
                                        int((zone / "max_energy_range_uj").read_text())])
        self.source = " and ".join(["NVML"] * (self._gpu is not None) + ["RAPL"] * bool(self._zones)) or None
        if self._zones:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while not self._end.wait(self.PAUSE):
            self.watt_hours()

    def watt_hours(self):
        """Watt hours so far; None where nothing can be read."""
        if self.source is None:
            return None
        with self._lock:
            for zone in self._zones:
                with contextlib.suppress(OSError, ValueError):
                    path, before, span = zone
                    zone[1] = int(path.read_text())
                    self._joules += (zone[1] - before) % (span + 1) / 1e6
            return (self._joules + (self._gpu() - self._gpu_start if self._gpu else 0)) / 3600

    def close(self):
        self._end.set()


def describe_environment(dataset, device):
    """What `env.json` holds: enough to say why two machines differ."""
    import torchvision
    import timm

    def git(*command):
        answer = subprocess.run(["git", "-C", str(HERE), *command], capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:  # no git
        commit, changed = None, None
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit,
        "uncommitted_changes": bool(changed) if commit else None,
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "timm": timm.__version__, "numpy": np.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "platform": platform.platform(), "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "pillow": Image.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "energy": Energy(device).source,
        "dataset": {"name": dataset.name, "root": str(Path(dataset.root).resolve()), "images": len(dataset),
                    "fingerprint": dataset.fingerprint()},
    }


def processor():
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def cache_folder(config):
    """Where decoded images and listings are kept: as the settings say, or beside the runs."""
    return Path(config["out"]) / ".cache" if config["cache"] in ("auto", "off") else Path(config["cache"])


def load_dataset(config):
    """The dataset of a resolved config; its listing is kept in the cache, unless --cache off."""
    given = config["dataset"], config["dataset_entry"], config["data_dir"]
    if config["cache"] == "off":
        return data.load_dataset(*given, config["classes"])
    return cache.load_dataset(*given, cache_folder(config), config["classes"])


@dataclass
class Run:
    """An opened run's folder. `last.pt` and `best.pt` are read when they are asked for."""

    folder: Path
    config: dict
    split: dict
    log: list

    def network(self, checkpoint="last.pt"):
        """The run's network with the weights of that checkpoint, in eval mode, on the CPU."""
        model, _ = build_network(self.config, len(self.split["classes"]), pretrained=False)
        model.load_state_dict(load_checkpoint(self.folder / checkpoint)["model"])
        return model.eval()

    def dataset(self):
        """The dataset that the run was made with, without what it skipped; UserError where it is gone or its content has changed."""
        dataset = load_dataset(self.config).without(self.split["skipped"])
        if dataset.fingerprint() != self.split["fingerprint"]:
            raise UserError(f"dataset {dataset.name} in {dataset.root} is not the one that {self.folder} was made with: "
                            "images, names or classes differ")
        return with_decoy(dataset, self.config, self.split)


def with_decoy(dataset, config, split):
    """The dataset, with the decoys of a run that has them."""
    dataset.decoy = data.draw_decoy(dataset, split, config["seed"]) if config["decoy"] else None
    return dataset


def open_finished(folder, option=""):
    """`open_run` of a run that has its result; option: what named it, for the UserError where it has none."""
    opened = open_run(folder)
    if not (opened.folder / "metrics.json").is_file():
        raise UserError(f"{option}{opened.folder}: not finished; first run python train.py --resume {opened.folder}")
    return opened


def open_run(folder):
    """The run in `folder`, its settings checked as those of configs.json are; UserError where it is none."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run's folder, it holds no config.json")
    config, split, where = read_json(folder / "config.json"), read_json(folder / "split.json"), str(folder / "config.json")
    _check_keys(config, {**dict.fromkeys(SETTINGS), "dataset_entry": dict, "model_entry": dict}, {}, where)
    settings = {key: config[key] for key in SETTINGS}
    _check_settings(settings, where)
    _check_dataset(config["dataset_entry"], f"{where}: dataset_entry")
    _check_keys(config["model_entry"], MODEL_KEYS, MODEL_EXTRAS, f"{where}: model_entry")
    try:
        _check_name(config["name"])
        _settings_that_agree(settings, {})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    config |= settings
    _check_keys(split, {"classes": list, "fingerprint": str, **dict.fromkeys((*data.PARTS, "skipped"), list)}, {}, str(folder / "split.json"))
    for key in ("classes", *data.PARTS, "skipped"):
        if not all(isinstance(text, str) for text in split[key]):
            raise UserError(f"{folder / 'split.json'}: {key}: expected texts alone")
    return Run(folder, config, split, read_log(folder))
