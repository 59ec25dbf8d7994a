"""Images and labels: how a dataset lies on the disk, and what is done to training images.

    dataset = load_dataset(config)                                                # ids, labels, classes, digests
    images, labels = augment(pixels, labels, mean, std, classes, config, key)     # each image changed its own way

To add a dataset, add an entry to `configs.json`; to add a way of lying on the disk or of augmenting, add a function to
`LAYOUTS`, `AUGMENTATIONS` or `ON_TOP`. Nothing here ever writes to a dataset's folder.
"""

import csv
import functools
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from engine import cache, policies
from engine.chance import numpy_generator, stable_seed, torch_generator
from engine.classes import PART_OF_FOLDER, absent, contents, find, walk
from engine.dataset import ALL_LEVELS, Dataset, Names, natural_order
from engine.files import UserError, nearest
from engine.loader import normalise, sent, to_float
from engine.table import read_rows

EXCEPT = "except:"  # in front of the --classes that are left out

def load_dataset(config):
    """The `Dataset` of a resolved config, its content hashed. UserError where it is not there as its entry has it."""
    name, entry, root = config["dataset"], config["dataset_entry"], Path(config["data_dir"] or ".")
    if entry["layout"] != "digits" and (why := absent(root)):
        raise UserError(missing(name, entry, why))
    if config.get("csv"):
        entry = entry | {"csv": entry["csv"] | {"file": os.path.abspath(config["csv"])}}
    dataset = LAYOUTS[entry["layout"]](name, entry, root)
    dataset.levels = config.get("levels", ALL_LEVELS)
    cache.set_digests(dataset, config)
    return dataset if config["classes"] is None else only(dataset, config["classes"])


def only(dataset, text):
    """The dataset with some classes alone: their names with commas between, in quotes where a name has a comma.

    With "except:" in front, all but these. A class may be called that too: then it is the class.
    """
    names = next(csv.reader([text], skipinitialspace=True), [])
    but = text.startswith(EXCEPT) and names[0] not in dataset.classes
    names = next(csv.reader([text.removeprefix(EXCEPT)], skipinitialspace=True), []) if but else names
    for name in names:
        if name in dataset.lost:
            raise UserError(f"--classes: the folder of class {name} holds no image; there is {dataset.lost[name]}")
        if name not in dataset.classes:
            listed = f"; it has {', '.join(dataset.classes[:10])} …"
            raise UserError(f"--classes: dataset {dataset.name} has no class {name!r}"
                            f"{nearest(name, dataset.classes) or listed}")
    classes = [c for c in dataset.classes if (c in names) != but]
    if len(classes) < 2:
        raise UserError(f"--classes: expected at least two classes, found {', '.join(classes) or 'none'}")
    numbers = np.array([dataset.classes.index(c) for c in classes])  # rising, as both are in one order
    kept = np.flatnonzero(np.isin(dataset.labels, numbers))
    return dataset.keep(kept.tolist(), classes, np.searchsorted(numbers, dataset.labels[kept]))


def missing(name, entry, what):
    """The message for a dataset that is not where it should be."""
    known = entry.get("source") and name != "folder"
    source = f" Get it: {entry['source']}; or" if known else " Put it there, or"
    end = "" if what.endswith("?") else "."
    return f"dataset {name}: {what}{end}{source} name its folder with --data-dir DIR."


# --- layouts: (name, its entry in configs.json, root folder) -> Dataset -----------------------------------------------


def digits(name, entry, root):
    """The 1,797 scanned digits of 8 x 8 pixels that come with scikit-learn (Alpaydin and Kaynak 1998).

    `entry["digits"]`, where there is one, makes them hard: the first `images` of them, with `contrast` times the
    contrast under normal noise with standard deviation `noise`, both as shares of black to white.
    """
    from sklearn.datasets import load_digits

    scans, hard = load_digits(), entry.get("digits", {"images": None, "contrast": 1, "noise": 0})
    grey, labels = scans.images[: hard["images"]] / 16, scans.target[: hard["images"]].astype(np.int64)
    noise = numpy_generator("noise").standard_normal(grey.shape)
    grey = 0.5 + hard["contrast"] * (grey - 0.5) + hard["noise"] * noise
    grey = np.rint(255 * grey.clip(0, 1)).astype(np.uint8)
    return Dataset(name, root, [str(c) for c in range(10)], [f"{i:04d}" for i in range(len(grey))], labels,
                   np.repeat(grey[..., None], 3, axis=3))


def folders(name, entry, root):
    """A folder of class folders, at whatever depth the archive unpacked to, with or without train/val/test above.

    What else lies there is told in the dataset's `notes`; see `find`.
    """
    tree = walk(root)
    if not tree.images:
        raise UserError(missing(name, entry, f"no images in {root.resolve()}; there is {contents(tree)}"))
    found = find(name, tree)
    dataset = _from_rows(name, root, found.rows, official=len({row[2] for row in found.rows}) > 1)
    dataset.notes, dataset.lost, dataset.masks = found.notes, found.lost, found.masks
    return dataset


def table(name, entry, root):
    """A CSV file with a row per image. `entry["csv"]`: file, and the columns that hold path, label, split and group.

    A path is relative to `root`; where no such file is there, it may be a name or an id, without folders and ending.
    columns: their names where the file has none. delimiter: " " for any number of spaces; if it is not given, the one
    of comma, semicolon, tab and bar that gives the columns. classes: {value of the label column: class}. parts: {value
    of the split column: "train", "val" or "test"}, if it has others. Where path or label is not named, what is not
    named is guessed, and printed.
    """
    path = root / entry["csv"]["file"]
    if not os.path.isfile(path):
        raise UserError(missing(name, entry, f"no {path.resolve()}"))
    rows = read_rows(path, entry["csv"], root, PART_OF_FOLDER, lambda: walk(root).images)
    return _from_rows(name, root, rows, official=any(part for _, _, part, _ in rows))


def torchvision_class(name, entry, root):
    """A class of torchvision, never downloaded. `entry["torchvision"]`: the class; parts, {part: its arguments}."""
    from torchvision import datasets

    spec = entry["torchvision"]
    sources, ids, labels, files, parts = [], [], [], [], []
    for part, arguments in spec["parts"].items():
        try:
            sources.append(source := getattr(datasets, spec["class"])(str(root), **arguments))
        except (RuntimeError, OSError, ValueError) as error:
            why = str(error).removesuffix(" You can use download=True to download it").rstrip(".")
            raise UserError(missing(name, entry, f"torchvision's {spec['class']} in {root.resolve()}: {why}")) from None
        own = next((getattr(source, a) for a in ("_images", "_image_files") if hasattr(source, a)), [])
        files += map(str, own)
        ids += [Path(f).relative_to(root).as_posix() for f in own] or [f"{part}/{i:06d}" for i in range(len(source))]
        labels += next(getattr(source, a) for a in ("targets", "_labels", "labels", "y") if hasattr(source, a))
        parts += [part] * len(source)
    if isinstance(getattr(source, "data", None), np.ndarray):
        images = np.concatenate([source.data for source in sources])
    else:
        images = Names(files) if files else torch.utils.data.ConcatDataset(sources)
    classes = getattr(sources[0], "classes", None) or sources[0].categories
    return Dataset(name, root, list(classes), ids, np.array(labels, dtype=np.int64), images,
                   parts if len(spec["parts"]) > 1 else None)


LAYOUTS = {"digits": digits, "folders": folders, "csv": table, "torchvision": torchvision_class}


def _from_rows(name, root, rows, official):
    """Dataset from (path relative to root, class, part, group) rows, in the natural order of the paths."""
    rows = sorted(set(rows), key=lambda row: natural_order(row[0]))
    twice = next((a[0] for a, b in zip(rows, rows[1:]) if a[0] == b[0]), None)
    if twice is not None:
        raise UserError(f"dataset {name}: {root / twice} is named twice, with different labels, parts or groups.")
    classes = sorted({row[1] for row in rows}, key=natural_order)
    if len(classes) < 2:
        raise UserError(f"dataset {name}: only one class, {classes[0]!r}, in {root}; expected at least two.")
    number = {c: i for i, c in enumerate(classes)}
    ids, names, parts, groups = zip(*rows)
    return Dataset(name, root, classes, list(ids), np.array([number[c] for c in names], dtype=np.int64),
                   Names(str(root / i) for i in ids), list(parts) if official else None,
                   [group or "" for group in groups] if any(groups) else None)


# --- augmentations: (pixels uint8 [B, 3, H, W], the dataset's `augment` entry, key, place) -> float32 [B, 3, H, W] ----
# The result is in [0, 1]. key: what the draws follow from. place: (first, all), where these images stand in a batch
# that several processes share, so that what is drawn for an image does not depend on their number; None: the batch is
# complete.

def unchanged(pixels, entry, key, place=None):
    return to_float(pixels)


def light(pixels, entry, key, place=None):
    """Each image flipped, turned, shifted. entry: {"flip": bool, "rotate": degrees, "shift": share of the side}."""
    return sampled(to_float(pixels), places(pixels, entry, key, place))


def places(images, entry, key, place):
    """Where `light` takes the pixels of its images [B, C, H, W] from: a grid [B, H, W, 2], as `affine_grid`'s."""
    first, every = place or (0, len(images))
    draws = torch.rand(every, 4, generator=torch_generator("cpu", "augment", *key))[first:first + len(images)]
    angle, across, down, mirror = sent(draws, images.device).T
    angle = (2 * angle - 1) * math.radians(entry["rotate"])
    across, down = (2 * (2 * shift - 1) * entry["shift"] for shift in (across, down))  # the grid spans -1 to 1
    mirror = torch.where(mirror < 0.5, -1.0, 1.0) if entry["flip"] else torch.ones_like(mirror)
    cos, sin = angle.cos(), angle.sin()
    moves = torch.stack([cos * mirror, -sin, across, sin * mirror, cos, down], dim=1).view(-1, 2, 3)
    return F.affine_grid(moves, images.shape, align_corners=False)


def sampled(images, grid):
    """Images at the places of a grid; outside the edge repeats, for a black rim would look like something erased."""
    if images.device.type != "mps":
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return F.grid_sample(images, inside(grid), align_corners=False)  # Apple's have no "border" before torch 2.13


def inside(grid):
    """A grid [B, H, W, 2] kept between the middles of the outermost pixels: what "border" does."""
    across, down = (part.clamp(1 / n - 1, 1 - 1 / n) for part, n in zip(grid.unbind(3), grid.shape[2:0:-1]))
    return torch.stack([across, down], 3)


def policy(transform, pixels, entry, key, place=None):
    """What torchvision's transform, with its defaults, draws for each image, done on the device."""
    return to_float(policies.changed(pixels, operations(transform, len(pixels), pixels.shape[-1], key, place)))


@functools.lru_cache(1)  # heat that moves with the images asks again
def operations(transform, count, side, key, place):
    return policies.drawn(transform(), count, (place or (0, 0))[0], side, "augment", *key)


# RandAugment: Cubuk et al. 2020, two operations of magnitude 9. TrivialAugment: Mueller and Hutter 2021, one of any.
AUGMENTATIONS = {"none": unchanged, "light": light, "randaugment": partial(policy, v2.RandAugment),
                 "trivialaugment": partial(policy, v2.TrivialAugmentWide)}


# --- where they take heat of images as they are: (heat [B, 1, h, w], side, entry, key, place) -> [B, 1, side, side] --


def in_place(heat, side, entry, key, place=None):
    return F.interpolate(heat, (side, side), mode="bilinear", align_corners=False)


def with_light(heat, side, entry, key, place=None):
    return sampled(heat, places(heat[:, :, :1, :1].expand(-1, -1, side, side), entry, key, place))


def with_policy(transform, heat, side, entry, key, place=None):
    return policies.carried(in_place(heat, side, entry, key), operations(transform, len(heat), side, key, place))


MOVES = {"none": in_place, "light": with_light, "randaugment": partial(with_policy, v2.RandAugment),
         "trivialaugment": partial(with_policy, v2.TrivialAugmentWide)}


def moved(heat, side, config, key, place=None):
    """Heat [B, side, side] of heat [B, h, w], moved as `augment` moves the images that it was taken of."""
    base = read_augment(config["augment"])[0]
    return MOVES[base](heat[:, None], side, config["dataset_entry"]["augment"], key, place)[:, 0]


# --- on top: (images normalised, labels, value, number of classes, key, place) -> images, labels ----------------------


def random_erasing(images, labels, value, classes, key, place):
    """A random rectangle of an image becomes noise, with probability `value`: Zhong et al. 2020, torchvision's."""
    transform, first = v2.RandomErasing(value, value="random"), (place or (0, 0))[0]
    drawn = policies.rectangles(transform, len(images), first, images.shape[1:], "random erasing", *key)
    return policies.erased(images, *drawn), labels


def mixed(transform, images, labels, value, classes, key, place):
    """torchvision's transform with alpha `value`. Labels become shares, float32 [B, C]."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_seed("mix", *key))
        return v2.RandomChoice([transform(alpha=value, num_classes=classes)])(images, labels)


# {name: (function, default value)}. CutMix: Yun et al. 2019. Mixup: Zhang et al. 2018.
ON_TOP = {"random_erasing": (random_erasing, 0.5), "cutmix": (partial(mixed, v2.CutMix), 1.0),
          "mixup": (partial(mixed, v2.MixUp), 0.2)}


@functools.cache  # each step asks
def read_augment(text):
    """(key of AUGMENTATIONS, by default light; {key of ON_TOP: value}) of --augment. Raises ValueError."""
    words = [word.strip().partition(":") for word in text.split(",")]
    base = words.pop(0)[0] if words[0][0] in AUGMENTATIONS and not words[0][1] else "light"
    on_top = {}
    for name, colon, number in words:
        if name not in ON_TOP or name in on_top:
            near = nearest(name, [*AUGMENTATIONS, *ON_TOP])
            raise ValueError(f"{text!r}: expected one of {', '.join(AUGMENTATIONS)}, and behind commas any of "
                             f"{', '.join(ON_TOP)}, as light,random_erasing:0.5{near}")
        try:
            on_top[name] = float(number) if colon else ON_TOP[name][1]
        except ValueError:
            on_top[name] = math.nan
        if not 0 < on_top[name] <= (1 if name == "random_erasing" else 100):
            raise ValueError(f"{text!r}: {number!r} is out of range behind {name}:, as {name}:{ON_TOP[name][1]}")
    if len({"cutmix", "mixup"} & set(on_top)) == 2:
        raise ValueError(f"{text!r}: cutmix and mixup contradict each other; give one of them")
    return base, on_top


def augment(pixels, labels, mean, std, classes, config, key, place=None):
    """Normalised images from pixels, each changed its own way by what config["augment"] names; and their labels.

    pixels: uint8 [B, 3, H, W]. labels: int64 [B]. mean, std: as in `loader.prepare`. classes: their number. key: what
    the draws follow from, as (seed, epoch, step). place: as for AUGMENTATIONS. Returns float32 [B, 3, H, W], channels
    last, and labels, int64 [B] or under cutmix and mixup shares float32 [B, C].
    """
    base, on_top = read_augment(config["augment"])
    images = AUGMENTATIONS[base](pixels, config["dataset_entry"]["augment"], key, place)
    images = normalise(images, mean, std)
    for name, value in on_top.items():
        images, labels = ON_TOP[name][0](images, labels, value, classes, key, place)
    return images.contiguous(memory_format=torch.channels_last), labels
