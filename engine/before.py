"""What a run takes from a run before: its network to start from, its heat, or what it got wrong.

`--init RUN` starts from that run's weights, `--heat RUN` takes the heat of its network, which stays as it is, and
`--reweight RUN` draws the training images that it gets wrong more often.
"""

import json

import torch

from engine import files, predict
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.display import console
from engine.files import UserError
from engine.folder import open_finished
from engine.network import build_network, head_names, normalisation
from engine.settings import SNAPSHOT, option

UPWEIGHT = 20  # how many times as often --reweight draws an image; chosen in `tune-shortcut` among 5, 20 and 50


def first_network(config, classes):
    """The network that a run starts with, on the CPU, and a text on its start: as `build_network`, or another run's.

    classes: names. The initial weights follow from the seed. Under --init they are the last of that run; of the head,
    the rows of the classes that both have, by name.
    """
    torch.manual_seed(config["seed"])
    if config["init"] is None:
        return build_network(config, len(classes))
    model, _ = build_network(config, len(classes), pretrained=False)
    opened = open_finished(config["init"], "--init ")
    if opened.config["model_entry"] != config["model_entry"]:
        raise UserError(f"--init {opened.folder}: its --model is {opened.config['model']}, not {config['model']}")
    found, own, old = load_checkpoint(opened.folder / "last.pt")["model"], model.state_dict(), opened.split["classes"]
    head = head_names(config, model, len(classes))
    both = [c for c in classes if c in old]
    here, there = (torch.tensor([names.index(c) for c in both], dtype=torch.long) for names in (classes, old))
    for name, tensor in own.items():
        axis, source = head.get(name), found.get(name)
        expected = list(tensor.shape)
        if axis is not None:
            expected[axis] = len(old)
        if source is None or list(source.shape) != expected:
            raise UserError(f"--init {opened.folder}: {name} is {'missing' if source is None else list(source.shape)} "
                            f"there, expected {expected}; use the same --image-size ({opened.config['image_size']})")
        if axis is None:
            tensor.copy_(source)
        elif both:
            tensor.index_copy_(axis, here, source.index_select(axis, there))
    new = [c for c in classes if c not in old]
    more = f", new are {', '.join(new[:10])}{' …' * (len(new) > 10)}" if new else ""
    return model, f"starts from {opened.folder}; its head keeps {len(both)} of {len(classes)} classes{more}"


def run_before(config, key, classes):
    """The finished run that config[key] names, on these classes. Raises UserError."""
    first = open_finished(config[key], f"{option(key)} ")
    if first.split["classes"] != classes:
        raise UserError(f"{option(key)} {first.folder}: has the classes {', '.join(first.split['classes'][:10])}, not "
                        f"{', '.join(classes[:10])}; give a run on the same data")
    return first


def heat_run(config, classes):
    """The run of --heat, or None. Raises UserError where its network is not this run's: one layer serves both."""
    if config["heat"] in (None, SNAPSHOT):
        return None
    first = run_before(config, "heat", classes)
    for key, name in (("model_entry", "model"), ("image_size", "image_size")):
        if first.config[key] != config[key]:
            raise UserError(f"--heat {first.folder}: has {option(name)} {json.dumps(first.config[name])}, not "
                            f"{json.dumps(config[name])}; give a run with the same")
    return first


def keep_heat_network(first, folder):
    """Copy the last weights of the run --heat into `folder`, as `heat.pt`: the run is then complete without it."""
    if first is not None:
        save_checkpoint(folder / "heat.pt", {"model": load_checkpoint(first.folder / "last.pt")["model"]})


def heat_network(config, classes, folder):
    """The network of --heat, as `folder` keeps it, frozen, in eval mode, on the CPU; None where it is a run's own."""
    if config["heat"] is None or config["heat"] == SNAPSHOT and not (folder / "heat.pt").exists():
        return None
    model, _ = build_network(config, classes, pretrained=False)
    model.load_state_dict(load_checkpoint(folder / "heat.pt")["model"])
    return model.eval().requires_grad_(False)


def first_misled(config, folder, dataset, split, device):
    """Ids of the training images that the run of --reweight gets wrong in the end; kept in `reweighted.json`.

    The first half of Just Train Twice (Liu et al. 2021, algorithm 1); `Order` draws these more often, in the second.
    """
    if (folder / "reweighted.json").is_file():
        return files.read_json(folder / "reweighted.json")["misled"]
    first = run_before(config, "reweight", split["classes"])
    model = first.network().to(device, memory_format=torch.channels_last)
    mean, std = (t.to(device) for t in normalisation(first.config, model))
    batches = predict.batches_in_order(config, dataset, split["train"], device)
    logits, labels = predict.predict(model, batches, mean, std, device)
    wrong = (logits.argmax(1) != labels).tolist()
    misled = [image_id for image_id, is_wrong in zip(split["train"], wrong) if is_wrong]
    files.write_json(folder / "reweighted.json", {"run": str(first.folder), "misled": misled})
    console.print(f"--reweight: {len(misled)} of {len(wrong)} training images are wrong there, and drawn {UPWEIGHT} "
                  "times as often", soft_wrap=True)
    return misled
