"""A run's folder: made, locked, described, and opened again. Opening a run executes nothing that lies in it.

    run = open_run("runs/NAME")        # config, split, log; run.network(), run.dataset()
"""

import contextlib
import itertools
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from engine import costs, files, settings
from engine.checkpoint import load_checkpoint
from engine.decoy import draw_decoy
from engine.files import UserError
from engine.network import build_network
from engine.split import PARTS

LOCK = ".lock"
LEFT = (LOCK, "env.json", "split.json", "bad-images.txt")  # in a folder, by a process killed before it is a run's
_held = []  # open files, whose locks last as long as the process
_noted = set()  # what was printed of older runs, so that a report on a hundred of them prints it once


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
        """The run's dataset, without what it skipped; UserError where it is gone or its content has changed."""
        dataset = data.load_dataset(self.config).without(self.split["skipped"])
        if dataset.fingerprint != self.split["fingerprint"]:
            raise UserError(f"dataset {dataset.name} in {dataset.root} is not the one that {self.folder} was made "
                            "with: images, names or classes differ. Where that lies elsewhere now, --resume with "
                            "--data-dir DIR goes on")
        if self.config["decoy"]:
            dataset.decoy = draw_decoy(dataset, self.split, self.config["decoy"], self.config["seed"])
        return dataset


def open_run(folder):
    """The run in `folder`, its settings checked as those of configs.json are; UserError where it is none."""
    folder = Path(folder)
    if not os.path.isfile(folder / "config.json"):  # Path.is_file raises for a name that is too long
        raise UserError(f"{folder}: not a run's folder, it holds no config.json")
    where, split_file = str(folder / "config.json"), folder / "split.json"
    config = modernised(files.read_json(where), where)
    entries = {"dataset_entry": settings.dataset, "model_entry": settings.MODEL}
    levels = settings.Setting(int, "", "", 255, 65535)  # `Dataset.levels`, where they are fewer
    settings.check(config, {"format": int, "levels?": levels, **settings.SETTINGS, **entries}, where)
    try:
        settings.check_agreement(config, {})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    lists = dict.fromkeys(("classes", *PARTS, "skipped"), settings.texts)
    split = settings.check(files.read_json(split_file), {"fingerprint": str, **lists}, str(split_file))
    return Run(folder, config, split, read_log(folder))


def modernised(config, where):
    """A run's config in today's format; prints once what is ignored of an older one. UserError for a newer one."""
    if not isinstance(config, dict):
        raise UserError(f"{where}: not a run's settings")
    number = config.get("format")
    number = number if isinstance(number, int) else 1  # which had a setting of that name, a text
    if number > settings.FORMAT:
        raise UserError(f"{where}: made by a newer program, format {number}; this one reads up to {settings.FORMAT}")
    if number == 1:
        ignored = ", ".join(f"{key} {value}" for key, value in _from_format_1(config).items())
        if ignored not in _noted:
            _noted.add(ignored)
            note = f"ignored: {ignored}" if ignored else "all that was set still holds"
            print(f"{where}: made by an earlier program; {note}", file=sys.stderr)
    if "heat_from" in config:  # before there were snapshots
        config["heat"] = config.pop("heat_from")
        config |= {"step": "online"} if config["heat"] else {}
    if isinstance(config.get("decoy"), bool):  # before it was a share
        config["decoy"] = float(config["decoy"])
    missing = {key: setting.neutral for key, setting in settings.SETTINGS.items() if key not in config}
    return config | missing | {"format": settings.FORMAT}


def _from_format_1(config):
    """Change a config of format 1 in place; returns {setting: value} of what is ignored of it."""
    mixed = "cutmix" if config.get("cutmix") else "mixup"  # both, by turns, were possible
    on_top = [f"{key}:{config.pop(key)}" for key in ("random_erasing", mixed) if config.get(key)]
    config["augment"] = ",".join([str(config.get("augment", "light")), *on_top])
    if config.get("warmup") and not config.get("schedule"):
        config["schedule"] = f"after:{config.pop('warmup')}"
    if config.pop("same_step", False):
        config["step"] = "same_step"
    if (config.get("mode"), config.get("protocol")) == ("online", "resplit"):
        config["mode"] = config.pop("protocol")
    gone = {key: config.pop(key) for key in (*settings.DROPPED, *data.ON_TOP) if key in config}
    ignored = {key: value for key, value in gone.items() if value != settings.DROPPED.get(key, 0)}
    if config.get("fill") in ("white", "max", "min"):
        ignored["fill"], config["fill"] = config["fill"], "black"
    config["area"] = config.get("area") or 0.1  # null beside a threshold
    return ignored


def open_finished(folder, option=""):
    """`open_run` of a run that has its result; option: what named it, for the UserError where it has none."""
    opened = open_run(folder)
    if not (opened.folder / "metrics.json").is_file():
        raise UserError(f"{option}{opened.folder}: not finished; first run python train.py --resume "
                        f"{files.quoted(opened.folder)}")
    return opened


def read_log(folder):
    return files.read_lines(Path(folder) / "log.jsonl")


def read_predictions(folder):
    """The arrays of `predictions.npz`; UserError where it is missing or damaged."""
    path = Path(folder) / "predictions.npz"
    if not path.exists():
        raise UserError(f"{path}: no such file; finish the run with python train.py --resume {files.quoted(folder)}")
    return files.read_arrays(path)


def hold(folder):
    """Keep the run in `folder` to this process until it ends. Raises UserError where another process has it."""
    with contextlib.suppress(OSError):
        _held.append(files.lock(Path(folder) / LOCK))


def make_folder(config):
    """A folder for the run, new or with no more than LEFT; a name nobody asked for gets a number where it is taken."""
    asked, out = config["name"], Path(config["out"])
    images = config["dataset"]
    if images == "folder":  # file systems take 255 bytes in all
        images = files.safe_name(Path(config["data_dir"]).resolve().name).encode()[:100].decode(errors="ignore")
    base = asked or f"{images}-{config['model'].replace('/', '_')}-{config['cam']}-s{config['seed']}"
    for number in itertools.count(1):
        config["name"] = base if number == 1 else f"{base}-{number}"
        folder = out / config["name"]
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir() or any(p.name not in LEFT and p.suffix != ".tmp" for p in folder.iterdir()):
                if not asked and folder.is_dir():
                    continue
                raise UserError(f"{folder} is there already: choose another --name or --out, or go on with it with "
                                f"--resume {files.quoted(folder)}") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from None
        try:
            hold(folder)
            files.sweep(folder)
            return folder
        except UserError:  # another process has just made it
            if asked:
                raise


def describe_environment(dataset, device):
    """What `env.json` holds: enough to see why two machines differ."""
    import timm
    import torchvision

    def git(*command):
        with contextlib.suppress(OSError):  # no git
            answer = subprocess.run(["git", "-C", str(settings.HERE), *command], capture_output=True, text=True)
            return answer.stdout.strip() if answer.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    energy = costs.Energy(device)
    energy.close()  # with its thread: only the source is asked for
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": sys.argv, "commit": commit,
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
        "timm": timm.__version__, "numpy": np.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "platform": platform.platform(), "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "pillow": Image.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "energy": energy.source,
        "dataset": {"name": dataset.name, "root": str(Path(dataset.root).resolve()), "images": len(dataset),
                    "fingerprint": dataset.fingerprint},
    }


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
