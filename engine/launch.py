"""From what was set to a run that can be trained: dataset, split, network, folder."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
from engine import before, cache, checkpoint, files, fit, folder, network, ranks, settings
from engine.dataset import ALL_LEVELS
from engine.decoy import draw_decoy
from engine.display import console
from engine.files import UserError
from engine.settings import SETTINGS, option
from engine.split import PARTS, make_split


class Ready(NamedTuple):
    """A run that can be trained, or go on. model: the network at its start; None for a run that goes on."""

    config: dict
    folder: Path
    dataset: object
    split: dict
    model: object
    device: object


def start(options, dry_run, show_sheet, train):
    """A new run, checked before its folder is made: `Ready`, or None for a dry run. train: for --batch-size auto."""
    config = settings.resolve(settings.read_configs(), options)
    device = network.pick_device(config["device"])
    config["amp"] = network.pick_amp(config["amp"], device)  # a run goes on in what it began with
    network.set_switches(config, device)
    dataset, skipped = say_what_is_left_out(config, data.load_dataset(config)), []
    split = the_split(config, dataset)  # fails before every image is opened
    if config["reweight"]:
        before.run_before(config, "reweight", dataset.classes)
    first = before.heat_run(config, dataset.classes)
    model, text = before.first_network(config, dataset.classes)
    layer, grid = network.try_network(config, model)
    if not dry_run:
        dataset, skipped = usable(config, dataset)
        split = the_split(config, dataset) if skipped else split
    if dataset.levels < ALL_LEVELS:
        config["levels"] = dataset.levels
        text += f"\nimages of 16 bits hold values up to {dataset.levels} at most, which becomes white"
    split = {"classes": dataset.classes, "fingerprint": dataset.fingerprint, **split,
             "skipped": [image_id for image_id, _, _ in skipped]}
    if config["decoy"]:
        dataset.decoy = draw_decoy(dataset, split, config["decoy"], config["seed"])
    config["layer"] = layer or config["layer"]
    if config["batch_size"] == settings.AUTO:
        size = fit.fitting_batch(train, config, model, dataset.classes, device, len(split["train"]))
        config["batch_size"] = size
        text += f"\n--batch-size auto: {size} images fit {device}; the learning rate stays {config['lr']:g}"
    if dry_run:
        print_dry_run(config, dataset, split, text, model, layer, grid)
        if show_sheet:
            from engine import pictures  # matplotlib takes a second

            explained = first.network() if first else model
            print(f"\nLook at {pictures.draw_space(config, explained.to(device), dataset, split, device)}")
        return None
    path = folder.make_folder(config)
    files.write_json(path / "env.json", folder.describe_environment(dataset, device))
    if skipped:
        write_bad_images(path / "bad-images.txt", skipped)
        text += f"\n{len(skipped)} images that cannot be used are left out, see {path}/bad-images.txt"
    before.keep_heat_network(first, path)
    files.write_json(path / "split.json", split)
    files.write_json(path / "config.json", config)  # last: a folder with it is a run that can be resumed
    cache.keep_digests(dataset)
    console.print(f"{path}: {text}", markup=False, soft_wrap=True)
    return Ready(config, path, dataset, split, model, device)


def say_what_is_left_out(config, dataset):
    """Print a dataset's notes, and return it; UserError where a class would be lost that nobody left out."""
    lost = ", ".join(f"{name} ({there})" for name, there in list(dataset.lost.items())[:5]) \
        + ", …" * (len(dataset.lost) > 5)
    if lost and config["classes"] is None and not config["skip_bad"]:
        raise UserError(f"dataset {dataset.name}: {len(dataset.lost)} class folders in {dataset.root} hold no image: "
                        f"{lost}. Put images there, as .jpg or .png; or leave them out with --skip-bad, or name the "
                        "other classes with --classes")
    for note in [f"--skip-bad leaves out the classes {lost}"] * bool(lost) + dataset.notes:
        console.print(files.one_line(f"dataset {dataset.name}: {note}"), markup=False, soft_wrap=True)
    return dataset


def usable(config, dataset):
    """The dataset without images that cannot be used, and these as (id, file, what is wrong); or UserError."""
    found = [(dataset.ids[i], str(dataset.where(i)), wrong) for i, wrong in cache.check_images(dataset, config).items()]
    if not found or config["skip_bad"]:
        return dataset.without([image_id for image_id, _, _ in found]), found
    path = files.make_folder(config["out"]) / "bad-images.txt"
    write_bad_images(path, found)
    raise UserError(f"dataset {dataset.name}: {len(found)} of {len(dataset)} images cannot be used, the first "
                    f"{found[0][1]} ({found[0][2]}). All are listed in {path}: mend or remove them, or leave them out "
                    "with --skip-bad")


def write_bad_images(path, found):
    """A line per image: file, a tab, what is wrong."""
    text = "".join(f"{files.one_line(file)}\t{files.one_line(wrong)}\n" for _, file, wrong in found)
    files.write_atomically(path, lambda file: file.write(text.encode()))


def the_split(config, dataset):
    """The run's split. What the run of --init was trained on is not tested on."""
    known = {}
    if config["init"] is not None:
        first = folder.open_run(config["init"]).split
        known = {image_id: part for part in PARTS for image_id in first[part]}
    return make_split(dataset, config["dataset_entry"]["split"], config["seed"], config["train_fraction"], known)


def print_dry_run(config, dataset, split, text, model, layer, grid):
    """Resolved settings, the split's sizes per class, and the network's size."""
    for key in SETTINGS:
        print(f"{key:15} {config[key]}")
    label = dict(zip(dataset.ids, dataset.labels.tolist()))
    sizes = [np.bincount([label[i] for i in split[part]], minlength=len(dataset.classes)) for part in PARTS]
    width = max(5, *(len(c) for c in dataset.classes))
    print()
    for name, *row in [("class", *PARTS), *zip(dataset.classes, *sizes), ("all", *map(sum, sizes))]:
        print(f"{name:{width}}" + "".join(f"{cell:>8}" for cell in row))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{config['model']} ({config['model_entry']['timm']}): {parameters:,} parameters, "
          f"{parameters * 4 / 2**20:.1f} MB in float32; {text}")
    if layer:
        print(f"explains {layer}, a grid of {grid[0]}x{grid[1]}")
    print("\nNothing was trained or written. Leave out --dry-run to start.")


def resume(path, options):
    """An interrupted run: what it was made with, checked to be still there. Returns `Ready`. Raises UserError."""
    path = Path(path)
    if ranks.RANK == 0 and os.path.isfile(path / "config.json"):
        folder.hold(path)
    opened = folder.open_run(path)
    moved = moved_to(opened.config, options)
    other = [key for key in options if key not in ("device", "workers", "cache", *moved)]
    if other:
        raise UserError(f"--resume goes on with the settings of {path}: leave out {option(other[0])}, or start anew")
    if ranks.RANK == 0:
        files.sweep(path)
    opened.config |= moved
    config = opened.config | options
    device, dataset = network.pick_device(config["device"]), opened.dataset()
    if moved and ranks.RANK == 0:  # it is the same dataset
        files.write_json(path / "config.json", opened.config)
    network.set_switches(config, device)
    if ranks.LOCAL_RANK == 0:
        cache.keep_digests(dataset)
    if network.pick_amp(config["amp"], device) != "off" and device.type == "cpu":
        console.print(f"{path}: goes on in {config['amp']}, as it began; on a CPU that is slow", soft_wrap=True)
    return Ready(config, opened.folder, dataset, opened.split, None, device)


def moved_to(config, options):
    """{setting: value} of where a run's images lie now; a CSV file that lay among them has moved with them."""
    found = {key: options[key] for key in settings.MOVED if options.get(key) and config[key]}
    if "data_dir" in found and config["csv"] and "csv" not in found:
        inside = os.path.relpath(config["csv"], config["data_dir"])
        found |= {} if inside.startswith("..") else {"csv": os.path.join(found["data_dir"], inside)}
    return found


def start_together(options, other, train):
    """`start` or `resume`; of several processes rank 0 makes or opens the run, and then the others open it.

    So rank 0 alone reads and hashes a dataset's files, and the others find its list of them in the cache. Where each
    machine has a cache of its own, the first process of each does it for those beside it.
    """
    config = shared_config(options, other) if ranks.RANKS > 1 and not other["resume"] else None
    if ranks.RANKS > 1:
        options["device"] = ranks.start(options.get("device", "auto"))
    ready = []

    def first():
        if other["resume"]:
            ready.append(resume(other["resume"], options))
        elif config and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and (path := interrupted_run(config)):
            ready.append(resume(path, {}))
        else:
            ready.append(start(options, other["dry_run"], other["show"], train))
        return ready[0] and str(ready[0].folder)

    def opened():
        if not ready:
            ready.append(resume(path, options if other["resume"] else {"device": options["device"]}))

    path = ranks.from_first(first)
    ranks.from_each(ranks.machines(), opened)
    opened()
    return ready[0]


def shared_config(options, other):
    """The settings of a new run of several processes; UserError before they join where they cannot share it."""
    if other["dry_run"]:
        raise UserError("--dry-run: leave torchrun out")
    config = settings.resolve(settings.read_configs(), options)
    if config["batch_size"] == settings.AUTO:
        raise UserError("--batch-size auto tries steps in one process: leave torchrun out to see its number, then give "
                        "that times the number of processes")
    if config["batch_size"] % ranks.RANKS:
        raise UserError(f"--batch-size {config['batch_size']}: {ranks.RANKS} processes cannot share it evenly")
    return config


def interrupted_run(config):
    """The newest folder of an unfinished run with these very settings, or None: torchrun's restart goes on with it."""
    found = []
    for path in Path(config["out"]).glob("*/config.json"):
        with contextlib.suppress(UserError):
            there = folder.open_run(path.parent).config
            if not settings.differing_settings(config, there) and not (path.parent / "metrics.json").exists():
                found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def ready_checkpoint(path, config, split, any_code):
    """How many epochs lie before the checkpoint that the run goes on from; 0 without one. Raises UserError."""
    state, text = checkpoint.last_checkpoint(path)
    if text:
        console.print(text, markup=False, soft_wrap=True)
    if state is None:
        return 0
    checkpoint.check_made_with(path, state["made_with"], checkpoint.made_with(config, split), any_code)
    return state["epoch"]


def open_network(config, path, dataset):
    """The network that a run goes on with: only one without a checkpoint needs the weights it starts from."""
    if (path / "last.pt").exists():
        torch.manual_seed(config["seed"])
        return network.build_network(config, len(dataset.classes), pretrained=False)[0]
    return before.first_network(config, dataset.classes)[0]
