"""Images and labels: from a dataset's name to train, validation and test batches on the device.

    dataset = load_dataset("asl", entry, "data/asl")          # what there is: ids, labels, classes, content hashes
    split = make_split(dataset, entry["split"], seed=0)       # which image serves for what, fixed for the run
    batches = Batches(dataset, split["train"], size=224, ...) # uint8 [B, 3, S, S] on the device
    images = prepare(pixels, mean, std, augment=..., seed=(0, epoch, step))   # float32, normalised

To add a dataset, add an entry to `configs.json`; to add a way of lying on the disk, add a function to `LAYOUTS`.
Nothing here ever writes to a dataset's folder.
"""

import csv
import hashlib
import math
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from rich.progress import track

PARTS = ("train", "val", "test")
# How datasets name these parts on the disk.
PART_OF_FOLDER = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                  "test": "test", "testing": "test"}
RESIDENT_BYTES = 2**30  # datasets that come as arrays stay on the device when resized they take at most this much
UNREADABLE = OSError, ValueError, SyntaxError, Image.DecompressionBombError  # what Pillow raises for a broken image
HASH_THREADS = 8  # reading files waits for the disk, so more threads than cores


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback; exit status 2."""


@dataclass
class Dataset:
    """What a layout found. Image i has id `ids[i]`, class `classes[labels[i]]`; order is the natural order of ids.

    ids: unique strings, paths relative to `root` with `/` where the images are files.
    images: list of N paths, or uint8 array [N, H, W, 3], or a torchvision dataset that gives (PIL image, label).
    parts: "train" | "val" | "test" per image where the dataset brings its own split, else None.
    digests: hex hash of each image's content; equal digests mean the same image under two names.
    """

    name: str
    root: Path
    classes: list
    ids: list
    labels: np.ndarray
    images: object
    parts: list | None = None
    digests: list | None = None

    def __len__(self):
        return len(self.ids)

    def open(self, index):
        """PIL image number `index`, as it lies on the disk."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[index])
        if isinstance(self.images, list):
            return Image.open(self.images[index])
        return self.images[index][0]

    def fingerprint(self):
        """One hash of every id, label and content: two machines with the same one have the same dataset."""
        whole = hashlib.blake2b(digest_size=16)
        for image_id, label, digest in zip(self.ids, self.labels.tolist(), self.digests):
            whole.update(f"{image_id}\0{self.classes[label]}\0{digest}\n".encode("utf-8", "surrogateescape"))
        return whole.hexdigest()


# --- layouts: how a dataset lies on the disk -----------------------------------------------------------------------


def digits(name, entry, root):
    """The 1,797 scanned digits of 8 x 8 pixels that come with scikit-learn (Alpaydin and Kaynak 1998)."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    grey = np.rint(scans.images * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0 to 16
    ids = [f"{i:04d}" for i in range(len(grey))]
    return Dataset(name, root, [str(c) for c in range(10)], ids, scans.target.astype(np.int64),
                   np.repeat(grey[..., None], 3, axis=3))


def folders(name, entry, root):
    """A folder of class folders, at whatever depth the archive unpacked to, with or without train/val/test above.

    The class folders' parent is the shallowest folder that holds at least two folders with images in them. Every
    image below a class folder, however deep, belongs to that class.
    """
    extensions = image_extensions()
    found = []  # (folder relative to root as a tuple of names, file name)
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith((".", "__MACOSX"))]
        inside = Path(folder).relative_to(root).parts
        found += [(inside, f) for f in files
                  if not f.startswith(".") and os.path.splitext(f)[1].lower() in extensions]
    if not found:
        raise UserError(missing(name, entry, f"no images in {root.resolve()}"))

    tops = _class_parents({inside for inside, _ in found})
    parts_of_tops = [next((PART_OF_FOLDER[n.lower()] for n in reversed(top) if n.lower() in PART_OF_FOLDER), None)
                     for top in tops]
    if not tops:
        raise UserError(f"dataset {name}: {root} holds {len(found)} images but not two class folders of them. "
                        "Expected one folder per class, named after it, with that class's images inside.")
    if len(tops) > 1 and (None in parts_of_tops or len(set(parts_of_tops)) < len(tops)):
        names = ", ".join(str(root.joinpath(*top)) for top in tops)
        raise UserError(f"dataset {name}: several folders in {root} hold class folders: {names}. "
                        "Name one of them with --data-dir.")
    rows = []
    for top, part in zip(tops, parts_of_tops):
        depth = len(top)
        rows += [("/".join((*inside, f)), inside[depth], part) for inside, f in found
                 if inside[:depth] == top and len(inside) > depth]
    return _from_rows(name, root, rows, official=len(tops) > 1)


def image_extensions():
    """The file endings, as ".jpg", of every format that Pillow opens."""
    return {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _class_parents(with_images):
    """Folders (tuples of names) that hold class folders, given the set of folders that hold images directly."""
    for holders in (with_images, {f[:n] for f in with_images for n in range(1, len(f) + 1)}):
        children = {}
        for folder in holders:
            if folder:
                children.setdefault(folder[:-1], set()).add(folder)
        parents = [p for p, c in children.items() if len(c) > 1]
        # train/val/test folders with images directly in them hold no classes
        parents = [p for p in parents if not all(c[-1].lower() in PART_OF_FOLDER for c in children[p])]
        if parents:
            depth = min(map(len, parents))
            return sorted(p for p in parents if len(p) == depth)
    return []


def table(name, entry, root):
    """A CSV file with a row per image. `entry["csv"]`: file, and the columns that hold path, label and split."""
    spec = entry["csv"]
    path = root / spec["file"]
    if not path.is_file():
        raise UserError(missing(name, entry, f"no {path.resolve()}"))
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        wanted = [spec["path"], spec["label"]] + ([spec["split"]] if spec.get("split") else [])
        absent = [c for c in wanted if c not in (reader.fieldnames or [])]
        if absent:
            raise UserError(f"{path}: no column {absent[0]!r}; it has {', '.join(reader.fieldnames or ['none'])}. "
                            f"Name the columns in configs.json, datasets.{name}.csv.")
        rows = []
        for row in reader:
            part = None
            if spec.get("split"):
                part = PART_OF_FOLDER.get((row[spec["split"]] or "").strip().lower())
                if part is None:
                    raise UserError(f"{path}, line {reader.line_num}: split {row[spec['split']]!r}; expected "
                                    "train, val or test.")
            if not row[spec["path"]] or not row[spec["label"]]:
                raise UserError(f"{path}, line {reader.line_num}: empty path or label.")
            image = Path(row[spec["path"]])
            if image.is_absolute() or ".." in image.parts:
                raise UserError(f"{path}, line {reader.line_num}: {image} leads out of {root}; "
                                "expected a path relative to the CSV's folder.")
            rows.append((image.as_posix(), row[spec["label"]], part))
    absent = [r[0] for r in rows if not (root / r[0]).is_file()]
    if absent:
        raise UserError(f"{path} names {len(absent)} images that are not there, the first {root / absent[0]}.")
    return _from_rows(name, root, rows, official=bool(spec.get("split")))


def torchvision_class(name, entry, root):
    """One of torchvision's own dataset classes, read from the disk (never downloaded).

    `entry["torchvision"]`: the class and, per part, the arguments that select it.
    """
    from torchvision import datasets

    spec = entry["torchvision"]
    sources, ids, labels, images, parts = [], [], [], [], []
    for part, arguments in spec["parts"].items():
        try:
            sources.append(source := getattr(datasets, spec["class"])(str(root), **arguments))
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(missing(
                name, entry, f"torchvision's {spec['class']} in {root.resolve()}: "
                f"{str(error).removesuffix(' You can use download=True to download it').rstrip('.')}")) from None
        files = next((getattr(source, a) for a in ("_images", "_image_files") if hasattr(source, a)), None)
        targets = next(getattr(source, a) for a in ("targets", "_labels", "labels", "y") if hasattr(source, a))
        if isinstance(getattr(source, "data", None), np.ndarray):
            images.append(source.data)
            part_ids = [f"{part}/{i:06d}" for i in range(len(source))]
        elif files is not None:
            images.append([str(f) for f in files])
            part_ids = [Path(f).relative_to(root).as_posix() for f in files]
        else:
            images.append(source)
            part_ids = [f"{part}/{i:06d}" for i in range(len(source))]
        ids, labels, parts = ids + part_ids, labels + list(targets), parts + [part] * len(part_ids)
    if isinstance(images[0], np.ndarray):
        images = np.concatenate(images)
    elif isinstance(images[0], list):
        images = sum(images, [])
    else:
        images = torch.utils.data.ConcatDataset(images)
    classes = getattr(sources[0], "classes", None) or sources[0].categories
    return Dataset(name, root, list(classes), ids, np.array(labels, dtype=np.int64), images,
                   parts if len(spec["parts"]) > 1 else None)


LAYOUTS = {"digits": digits, "folders": folders, "csv": table, "torchvision": torchvision_class}


def _from_rows(name, root, rows, official):
    """Dataset from (path relative to root, class, part) rows, in the natural order of the paths."""
    rows = sorted(set(rows), key=lambda row: natural_order(row[0]))
    classes = sorted({row[1] for row in rows}, key=natural_order)
    if len(classes) < 2:
        raise UserError(f"dataset {name}: only one class, {classes[0]!r}, in {root}; expected at least two.")
    number = {c: i for i, c in enumerate(classes)}
    labels = np.array([number[row[1]] for row in rows], dtype=np.int64)
    return Dataset(name, root, classes, [row[0] for row in rows], labels, [str(root / row[0]) for row in rows],
                   [row[2] for row in rows] if official else None)


def natural_order(text):
    """Sort key in which A2 comes before A10, as video frames are numbered; total, so equal keys mean equal text."""
    return [(0, int(piece), "") if piece.isdigit() and piece.isascii() else (1, 0, piece)
            for piece in re.split(r"([0-9]+)", text)], text


def missing(name, entry, what):
    """The message for a dataset that is not where it should be."""
    source = f" Get it: {entry['source']}; or" if entry.get("source") else " Put it there, or"
    return f"dataset {name}: {what}.{source} name its folder with --data-dir DIR."


def load_dataset(name, entry, root):
    """List the dataset `name` and hash its content.

    entry: its part of `configs.json`. root: the folder it lies in.
    Raises UserError when it is not there or not laid out as `entry["layout"]` says.
    """
    root = Path(root or ".")
    if entry["layout"] != "digits" and not root.is_dir():
        raise UserError(missing(name, entry, f"no folder {root.resolve()}"))
    dataset = LAYOUTS[entry["layout"]](name, entry, root)
    dataset.digests = _digests(dataset)
    return dataset


def _digests(dataset):
    if isinstance(dataset.images, list):
        def digest(index):
            try:
                with open(dataset.images[index], "rb") as file:
                    return hashlib.blake2b(file.read(), digest_size=16).hexdigest()
            except OSError as error:
                raise UserError(f"{dataset.images[index]}: cannot be read ({error.strerror}).") from None
    elif isinstance(dataset.images, np.ndarray):
        def digest(index):
            return hashlib.blake2b(dataset.images[index].tobytes(), digest_size=16).hexdigest()
    else:
        def digest(index):
            image = dataset.open(index)
            return hashlib.blake2b(f"{image.size}{image.mode}".encode() + image.tobytes(), digest_size=16).hexdigest()
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = pool.map(digest, range(len(dataset)))
        return list(track(hashes, description="reading", total=len(dataset), transient=True,
                          disable=len(dataset) < 5000))


# --- the split -----------------------------------------------------------------------------------------------------


def make_split(dataset, rule, seed, train_fraction=1.0):
    """Which images train, validate and test: made once from the seed and the ids, then stored with the run.

    rule: {"rule": "stratified" | "blocks", "val": share, "test": share, "blocks": blocks per class}.
      stratified: random within each class; images of equal content stay together.
      blocks: each class's images, in natural order, are cut into `blocks` runs of consecutive ones, and whole runs
      go to one part: consecutive video frames are near-copies that a random split would put on both sides.
    Where the dataset brings its own parts they are kept: test is its test part, or, without one, its val part, and
    a validation part it lacks is drawn from its training part.
    Returns {"train": [ids], "val": [ids], "test": [ids]}; no content is in two parts.
    """
    everything = np.arange(len(dataset))
    if dataset.parts is None:
        parts = _draw(dataset, everything, rule, seed, {"test": rule["test"], "val": rule["val"]})
    else:
        own = np.array(dataset.parts)
        held_out = "test" if "test" in own else "val"
        parts = {"train": everything[own == "train"], "test": everything[own == held_out]}
        if held_out == "test" and "val" in own:
            parts["val"] = everything[own == "val"]
        else:
            parts |= _draw(dataset, parts["train"], rule, seed, {"val": rule["val"]})
    # A copy of a held-out image must not be trained on, whatever the rule or the dataset's authors did.
    seen = set()
    for part in ("test", "val", "train"):
        parts[part] = [i for i in parts[part] if dataset.digests[i] not in seen]
        seen |= {dataset.digests[i] for i in parts[part]}
    lost = set(dataset.labels[parts["val"]]) | set(dataset.labels[parts["test"]])
    lost -= set(dataset.labels[parts["train"]])
    if lost:
        raise UserError(f"dataset {dataset.name}: class {dataset.classes[min(lost)]!r} has no image left to train on.")
    if not parts["val"] or not parts["test"]:
        empty = "val" if not parts["val"] else "test"
        raise UserError(f"dataset {dataset.name}: no image left for the {empty} part. Expected at least three "
                        "different images per class.")
    return {part: [dataset.ids[i] for i in sorted(_fraction(dataset, parts[part], train_fraction, seed)
                                                  if part == "train" else parts[part])] for part in PARTS}


def _draw(dataset, indices, rule, seed, shares):
    """Deal `indices` out, class by class, into the named shares and the rest, "train"."""
    dealt = {part: [] for part in (*shares, "train")}
    for label, members in _by_class(dataset, indices):
        if rule["rule"] == "blocks":
            units = [list(b) for b in np.array_split(members, min(rule["blocks"], len(members)))]
        else:
            copies = {}
            for i in members:
                copies.setdefault(dataset.digests[i], []).append(i)
            units = list(copies.values())
        if len(units) <= len(shares):
            raise UserError(f"dataset {dataset.name}: class {dataset.classes[label]!r} has {len(units)} different "
                            f"images; the split needs at least {len(shares) + 1}.")
        units = [units[i] for i in _generator("split", seed, dataset.classes[label]).permutation(len(units))]
        left = len(units)
        for part, share in shares.items():
            # at least one unit each, and one left for every part still to come
            wanted, count, still = share * len(members), 0, len(shares) - list(shares).index(part)
            while units and left > still and (count == 0 or count + len(units[-1]) / 2 <= wanted):
                unit = units.pop()
                dealt[part] += unit
                count, left = count + len(unit), left - 1
        dealt["train"] += [i for unit in units for i in unit]
    return dealt


def _fraction(dataset, indices, fraction, seed):
    """A stratified `fraction` of `indices`, at least one per class; smaller fractions are parts of larger ones."""
    kept = []
    for label, members in _by_class(dataset, indices):
        order = _generator("fraction", seed, dataset.classes[label]).permutation(len(members))
        kept += [members[i] for i in order[: max(1, round(fraction * len(members)))]]
    return kept


def _by_class(dataset, indices):
    indices = np.asarray(indices, dtype=np.int64)
    for label in np.unique(dataset.labels[indices]):
        yield int(label), indices[dataset.labels[indices] == label]


def reuse_split(dataset, split, train_fraction, seed, origin):
    """The parts of another run's `split.json`, checked against this dataset; `origin` names it in errors."""
    if split["classes"] != dataset.classes:
        raise UserError(f"{origin}: made for classes {', '.join(split['classes'][:5])} …; dataset {dataset.name} has "
                        f"{', '.join(dataset.classes[:5])} ….")
    number = {image_id: i for i, image_id in enumerate(dataset.ids)}
    for part in PARTS:
        absent = [i for i in split[part] if i not in number]
        if absent:
            raise UserError(f"{origin}: names {len(absent)} images that dataset {dataset.name} lacks, the first "
                            f"{absent[0]!r}. Use the dataset that run was made with.")
    train = [number[i] for i in split["train"]]
    if train_fraction < 1:
        train = sorted(_fraction(dataset, train, train_fraction, seed))
    return {"train": [dataset.ids[i] for i in train], "val": split["val"], "test": split["test"]}


def _generator(*key):
    """Random numbers that follow from `key` alone, whatever was drawn before."""
    return np.random.default_rng(stable_seed(*key))


def stable_seed(*key):
    """63-bit seed from any key of strings and integers, the same on every machine and in every process."""
    text = "\0".join(map(str, key)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# --- from files to batches -----------------------------------------------------------------------------------------


def to_rgb(image, size):
    """Any PIL image as RGB uint8 array [size, size, 3], upright and squeezed to a square.

    Squeezed rather than cropped, so that no part of the image escapes the heat. Transparent pixels become mid-grey,
    which normalisation maps near zero: neither a black nor a white drawing vanishes in it.
    """
    if image.format == "JPEG":
        image.draft(None, (size, size))  # the decoder drops to the nearest power of two that is still large enough
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's advice on palettes with transparency, heeded below
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(_to_8_bit(np.asarray(image), image.mode))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _to_8_bit(values, mode):
    """Grey values of more than 8 bits as uint8. Only `I;16` says its range; the others' follows from their largest."""
    values = np.nan_to_num(values.astype(np.float64))
    largest = values.max(initial=0)
    ranges = {"I": [255, 65535], "F": [1, 255, 65535]}.get(mode, [65535])
    top = next((r for r in ranges if largest <= r), largest)
    return np.rint(np.clip(values, 0, None) * (255 / top)).astype(np.uint8)


class Decoded(torch.utils.data.Dataset):
    """Images `indices` of a Dataset as (uint8 tensor [3, size, size], label); what DataLoader workers run."""

    def __init__(self, dataset, indices, size):
        self.dataset, self.indices, self.size = dataset, indices, size

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, position):
        index = self.indices[position]
        try:
            pixels = to_rgb(self.dataset.open(index), self.size)
        except UNREADABLE as error:
            raise UserError(f"{self.dataset.root / self.dataset.ids[index]}: cannot be read as an image "
                            f"({error}). Mend or remove it.") from None
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), int(self.dataset.labels[index])


class Order:
    """Batches of positions, for a DataLoader: shuffled anew each epoch, every batch of the same size.

    The order of an epoch follows from (seed, epoch) alone. The last batch is filled up from the epoch's beginning,
    so that every image is seen in every epoch and no batch has another shape.
    """

    def __init__(self, length, batch_size, seed):
        self.length, self.batch_size, self.seed, self.epoch = length, min(batch_size, length), seed, 0

    def __len__(self):
        return math.ceil(self.length / self.batch_size)

    def __iter__(self):
        order = _generator("order", self.seed, self.epoch).permutation(self.length)
        order = np.resize(order, len(self) * self.batch_size)
        return iter(order.reshape(len(self), self.batch_size).tolist())


class Batches:
    """Batches (images uint8 [B, 3, size, size], labels int64 [B]) on `device`, for one part of a split.

    With `seed` they are shuffled: set `.order.epoch`, then iterate. Without, they come in the order of `ids` and the
    last one may be shorter.
    """

    def __init__(self, dataset, ids, size, batch_size, device, workers=0, seed=None):
        number = {image_id: i for i, image_id in enumerate(dataset.ids)}
        self.indices = [number[i] for i in ids]
        self.device = device
        self.labels = torch.from_numpy(dataset.labels[self.indices])
        if seed is None:
            self.order = torch.utils.data.BatchSampler(range(len(ids)), batch_size, drop_last=False)
        else:
            self.order = Order(len(ids), batch_size, seed)
        decoded = Decoded(dataset, self.indices, size)
        self.resident = None
        if isinstance(dataset.images, np.ndarray) and len(ids) * size * size * 3 <= RESIDENT_BYTES:
            self.resident = torch.stack([decoded[i][0] for i in range(len(ids))]).to(device)
            self.labels = self.labels.to(device)
        else:
            self.loader = torch.utils.data.DataLoader(
                decoded, batch_sampler=self.order, num_workers=workers, pin_memory=device.type == "cuda",
                persistent_workers=workers > 0)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        if self.resident is not None:
            for positions in self.order:
                positions = torch.tensor(positions, device=self.device)
                yield self.resident[positions], self.labels[positions]
        else:
            try:
                for images, labels in self.loader:
                    yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            except UserError as error:  # a worker's comes wrapped in its traceback
                raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


def prepare(pixels, mean, std, augment=None, seed=None):
    """Normalised images from pixels, on the device, a whole batch at once; with `augment`, each moved its own way.

    pixels: uint8 [B, 3, H, W]. mean, std: float [1, 3, 1, 1] on the same device, for values in [0, 1].
    augment: {"flip": bool, "rotate": degrees, "shift": share of the side}, or None to leave the images as they are.
    seed: key that the draws follow from, as (seed, epoch, step).
    Returns float32 [B, 3, H, W], channels last.
    """
    images = pixels.to(torch.float32, memory_format=torch.channels_last).div_(255)
    if augment:
        draws = torch.rand(len(images), 4, generator=torch.Generator().manual_seed(stable_seed("augment", *seed)))
        angle, across, down, mirror = draws.to(images.device, non_blocking=True).T
        angle = (2 * angle - 1) * math.radians(augment["rotate"])
        across, down = (2 * (2 * shift - 1) * augment["shift"] for shift in (across, down))  # the grid spans -1 to 1
        mirror = torch.where(mirror < 0.5, -1.0, 1.0) if augment["flip"] else torch.ones_like(mirror)
        cos, sin = angle.cos(), angle.sin()
        moves = torch.stack([cos * mirror, -sin, across, sin * mirror, cos, down], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(moves, images.shape, align_corners=False)
        # "border" repeats the edge: a black rim would look like something that was erased
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
