"""A run: its settings, its network, and its folder with all that opens it again.

    config = resolve(read_configs(), {"dataset": "asl", "model": "vit_small"})   # every setting, checked
    model = build_network(config, classes=29)
    run = open_run("runs/NAME")                                                  # config, env, split, log, checkpoints

Every file is written under a temporary name, synced and renamed, so that a crash leaves the old one or the new one and
never half of one. Opening a run executes nothing that lies in it.
"""

import contextlib
import difflib
import io
import json
import os
import platform
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch

import cam
import data
import proxy
from data import UserError

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

    def check(self, value, where):
        """The value as it is used, or UserError that names `where` it stood."""
        if value is None and self.optional:
            return None
        right = isinstance(value, self.kind) and (self.kind is bool or not isinstance(value, bool))
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value, right = float(value), True
        if not right:
            names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
            raise UserError(f"{where}: {json.dumps(value)} is not {names[self.kind]}{' or null' * self.optional}")
        if self.choices and value not in self.choices:
            raise UserError(f"{where}: unknown {value!r}; expected one of {', '.join(self.choices)}"
                            + _nearest(value, self.choices))
        if self.kind in (int, float) and not ((self.low is None or value >= self.low)
                                              and (self.high is None or value <= self.high)):
            span = f"at least {self.low:g}" if self.high is None else f"between {self.low:g} and {self.high:g}"
            raise UserError(f"{where}: {value} is out of range; expected {span}")
        return value


TINY = 1e-9  # the lower end of ranges that exclude zero

SETTINGS = {
    "dataset": Setting(str, "what to train on: a dataset of configs.json, or `folder` with --data-dir"),
    "data_dir": Setting(str, "the dataset's folder, if not the one configs.json names", optional=True),
    "model": Setting(str, "network: a short name of configs.json or any timm name"),
    "pretrained": Setting(bool, "start from timm's pretrained weights where it has them"),
    "weights": Setting(str, "start from a local .safetensors or .pth file instead", optional=True),
    "image_size": Setting(int, "side of the square images in pixels (null: the dataset's)", 8, 4096, optional=True),
    "train_fraction": Setting(float, "share of the training part to train on, stratified", TINY, 1),
    "split_from": Setting(str, "folder of a run whose split to use again", optional=True),
    "seed": Setting(int, "decides split, order, augmentation and initial weights", 0, 2**31),
    "epochs": Setting(int, "passes over the training part", 1, 100_000),
    "batch_size": Setting(int, "images per step", 2, 65_536),
    "lr": Setting(float, "peak learning rate of the one-cycle schedule", TINY, 100),
    "weight_decay": Setting(float, "AdamW's, on matrices and kernels only", 0, 10),
    "clip": Setting(float, "largest norm of the gradient", TINY, 1e9),
    "augment": Setting(bool, "light augmentation: the dataset's flip, rotation and shift"),
    "cam": Setting(str, "what gives the heat; none trains without Proxy Attention", choices=("none", *cam.METHODS)),
    "layer": Setting(str, "the layer to explain, or several with commas between (null: the deepest with at least a 4x4 "
                     "grid)", optional=True),
    "explain": Setting(str, "the score to explain: the predicted class's logit, the true one's, or the true one's margin "
                       "over the best other", choices=tuple(cam.EXPLAIN)),
    "smooth": Setting(bool, "eigen-smoothing: the first principal component of the weighted activations"),
    "warmup": Setting(int, "epochs before the first image is erased", 0, 100_000),
    "select": Setting(str, "which images are erased", choices=tuple(proxy.SELECTIONS)),
    "area": Setting(float, "erase this share of an image's pixels, the hottest", TINY, 1, optional=True),
    "threshold": Setting(float, "erase the pixels at least this hot, instead of an area", 0, 1, optional=True),
    "fill": Setting(str, "what goes where an image is erased", choices=tuple(proxy.FILLS)),
    "budget": Setting(str, "erased images take seats in the batch (equal) or ride behind it (extra)",
                      choices=("equal", "extra")),
    "share": Setting(float, "at most this share of a batch is erased images", TINY, 1),
    "device": Setting(str, "auto, cpu, cuda, cuda:1, mps"),
    "workers": Setting(int, "processes that decode images (null: one per core, 8 at most)", 0, 256, optional=True),
    "amp": Setting(str, "mixed precision; auto: bfloat16 or float16 as the GPU can, off on a CPU",
                   choices=("auto", "off", "bfloat16", "float16")),
    "out": Setting(str, "folder that the runs' folders go into"),
    "name": Setting(str, "the run's name (null: dataset-model-cam-sSEED)", optional=True),
}
DATASET_KEYS = {"source": str, "path": (str, type(None)), "layout": str, "image_size": int,
                "normalisation": (str, dict), "split": dict, "augment": dict}
DATASET_EXTRAS = {"csv": dict, "torchvision": dict, "settings": dict}
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
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_configs(path=CONFIGS):
    """`configs.json`, checked: every key known, every type right, none missing. Raises UserError naming key and place."""
    configs = read_json(path, unique_keys=True)
    name = Path(path).name
    _check_keys(configs, {"defaults": dict, "models": dict, "datasets": dict}, {}, name)
    _check_keys(configs["defaults"], dict.fromkeys(SETTINGS), {}, f"{name}: defaults")
    _check_settings(configs["defaults"], f"{name}: defaults")
    for short, entry in configs["models"].items():
        where = f"{name}: models.{short}"
        _check_keys(entry, MODEL_KEYS, MODEL_EXTRAS, where)
        _check_settings(entry.get("settings", {}), f"{where}.settings")
    for short, entry in configs["datasets"].items():
        _check_dataset(entry, f"{name}: datasets.{short}")
    return configs


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
    if entry["layout"] == "csv":
        _check_keys(entry, {"csv": dict}, {**DATASET_KEYS, **DATASET_EXTRAS}, where)
        _check_keys(entry["csv"], {"file": str, "path": str, "label": str}, {"split": str}, f"{where}.csv")
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
    if config["dataset"] == "folder" and config["data_dir"] is None:
        raise UserError("dataset folder: name the folder of class folders with --data-dir DIR")
    if config["name"] is not None and (not config["name"].strip(". ") or set(config["name"]) & set('/\\\0\n')):
        raise UserError(f"--name {config['name']!r}: expected a plain folder name; --out says where it goes")
    entry = {key: value for key, value in dataset.items() if key != "settings"}
    return config | {"dataset_entry": entry, "model_entry": {k: v for k, v in model.items() if k != "settings"}}


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
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = f" with {arguments}" if arguments else ""
        raise UserError(f"timm cannot build {name}{given}: {str(error).splitlines()[0] if str(error) else error!r}. "
                        "Try another --image-size or --model") from None
    if weights:
        text = load_weights(model, weights)
    return model, text


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

    Tensors that the network has not, or has in another shape (as the head for other classes), are left out. Returns a text that says
    which and why. Raises UserError where the file cannot be read or nothing in it fits.
    """
    found, own = read_weights(path), model.state_dict()
    fits = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    if not fits:
        raise UserError(f"--weights {path}: none of its {len(found)} tensors fits {type(model).__name__}, whose first "
                        f"is {next(iter(own))} {list(next(iter(own.values())).shape)}")
    model.load_state_dict(fits, strict=False)
    lines = [f"starts from {path}: {len(fits)} of {len(own)} tensors"]
    lines += [f"  left out {k}: {list(v.shape)} in the file, {list(own[k].shape)} in the network"
              for k, v in found.items() if k in own and k not in fits]
    lines += [f"  left out {k}: the network has no such tensor" for k in found if k not in own]
    lines += [f"  not in the file, so random: {k}" for k in own if k not in found]
    return "\n".join(lines)


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
    except (ValueError, RuntimeError, AssertionError) as error:
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


def write_atomically(path, write):
    """Call `write` with an open binary file that becomes `path` only when it is whole and on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY) if os.name == "posix" else None
    if folder is not None:
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path, value):
    """`value` as JSON, the same bytes for the same value."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_arrays(path, arrays):
    """`arrays` {name: array} as a compressed npz, without pickle."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def save_checkpoint(path, state):
    """`state`, a dict of tensors and plain values."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote. Executes nothing in the file; raises UserError where it is missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path}: not a whole checkpoint ({str(error).splitlines()[0]})") from None


def append_log(folder, line):
    """Add one epoch's line to `log.jsonl`, on the disk before this returns."""
    with open(Path(folder) / "log.jsonl", "ab") as file:
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_log(folder):
    """The epochs' lines, first to last; a last line that a crash cut off is left out."""
    path = Path(folder) / "log.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cut_log(folder, epochs):
    """Keep the first `epochs` lines: what was logged after the checkpoint that a run resumes from happens again."""
    kept = "".join(json.dumps(line) + "\n" for line in read_log(folder)[:epochs])
    write_atomically(Path(folder) / "log.jsonl", lambda file: file.write(kept.encode()))


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
        "threads": torch.get_num_threads(),
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
        """The dataset that the run was made with; UserError where it is gone or its content has changed."""
        dataset = data.load_dataset(self.config["dataset"], self.config["dataset_entry"], self.config["data_dir"])
        if dataset.fingerprint() != self.split["fingerprint"]:
            raise UserError(f"dataset {dataset.name} in {dataset.root} is not the one that {self.folder} was made with: "
                            "images, names or classes differ")
        return dataset


def open_run(folder):
    """The run in `folder`; UserError where it is none."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a run's folder, it holds no config.json")
    config, split = read_json(folder / "config.json"), read_json(folder / "split.json")
    for key in (*SETTINGS, "dataset_entry", "model_entry"):
        if key not in config:
            raise UserError(f"{folder / 'config.json'}: key {key!r} is missing")
    return Run(folder, config, split, read_log(folder))
