"""Images and labels: from a dataset's name to train, validation and test batches on the device.

    dataset = load_dataset("asl", entry, "data/asl")          # what there is: ids, labels, classes, content hashes
    split = make_split(dataset, entry["split"], seed=0)       # which image serves for what, fixed for the run
    batches = Batches(dataset, split["train"], size=224, ...) # uint8 [B, 3, S, S] on the device
    images = prepare(pixels, mean, std)                       # float32, normalised
    images = augment(pixels, mean, std, config, (seed, epoch, step))            # the same, each image changed its own way
    images, labels = mix(images, labels, classes, config, (seed, epoch, step))  # mixup and cutmix

To add a dataset, add an entry to `configs.json`; to add a way of lying on the disk or of augmenting, add a function to `LAYOUTS` or
`AUGMENTATIONS`.
Nothing here ever writes to a dataset's folder.
"""

import colorsys
import contextlib
import csv
import difflib
import functools
import hashlib
import io
import math
import os
import queue
import re
import stat
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from rich.progress import track
from torchvision.transforms import v2

PARTS = ("train", "val", "test")
# How datasets name these parts on the disk.
PART_OF_FOLDER = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                  "test": "test", "testing": "test"}
MOST_OUTSIDE = 0.05  # of a folder's images may be in no class folder, as the 29 of ASL's test folder are
RESIDENT_BYTES = 2**30  # datasets that come as arrays stay on the device when resized they take at most this much
UNREADABLE = OSError, ValueError, SyntaxError, Image.DecompressionBombError  # what Pillow raises for a broken image
HASH_THREADS = 8  # reading files waits for the disk, so more threads than cores


# Pillow warns of what it reads nonetheless: odd EXIF data, palettes with transparency, and images of over 89 million pixels (it refuses
# those of over 179 million).
warnings.filterwarnings("ignore", module=r"PIL\.")
LARGEST_FILE = 2**30  # bytes; what is larger is no photograph
NOT_READ = "0" * 32  # the digest of a file that cannot be read


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback; exit status 2.

    resumable: of an error in a run's midst, whether the run can then go on.
    """

    def __init__(self, text, resumable=True):
        super().__init__(text)
        self.resumable = resumable


def one_line(text):
    """A text with what cannot be printed, as newlines and bytes that are not UTF-8 in a file's name, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Names:
    """Strings in one buffer. Reading a list's strings counts references, and so copies its memory in every forked worker."""

    def __init__(self, names):
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.buffer = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.buffer[self.ends[index]:self.ends[index + 1]].decode("utf-8", "surrogateescape")


class Pixels:
    """Images as uint8 [N, size, size, 3], in one array after another: in memory, or mapped from a file."""

    def __init__(self, *arrays):
        self.arrays, self.size = arrays, arrays[0].shape[1]
        self.ends = np.cumsum([len(a) for a in arrays])

    def take(self, indices):
        """Images number `indices`, int64 [n], as one array in memory, uint8 [n, size, size, 3]."""
        if len(self.arrays) == 1:
            return np.asarray(self.arrays[0])[indices]
        taken, which = np.empty((len(indices), self.size, self.size, 3), np.uint8), np.searchsorted(self.ends, indices, "right")
        for number, array in enumerate(self.arrays):
            taken[which == number] = np.asarray(array)[indices[which == number] - (self.ends[number] - len(array))]
        return taken


@dataclass
class Dataset:
    """What a layout found. Image i has id `ids[i]`, class `classes[labels[i]]`; order is the natural order of ids.

    ids: unique strings, paths relative to `root` with `/` where the images are files.
    images: Names of N paths, or uint8 array [N, H, W, 3], or a torchvision dataset that gives (PIL image, label).
    parts: "train" | "val" | "test" per image where the dataset brings its own split, else None.
    groups: a text per image, as where it was taken, in which a network may do better than elsewhere; None where the dataset names none.
    digests: hex hash of each image's content; equal digests mean the same image under two names.
    decoy: `Decoy` of every image, where the run is to have one (`draw_decoy`).
    pixels: `Pixels` of all images, decoded and at the size of the run, where they are at hand (`cache.open_pixels`).
    """

    name: str
    root: Path
    classes: list
    ids: list
    labels: np.ndarray
    images: object
    parts: list | None = None
    groups: list | None = None
    digests: list | None = None
    pixels: object = None
    decoy: object = None
    listing: object = None  # of a dataset that is part of another, that one
    _fingerprint: str | None = None

    def __len__(self):
        return len(self.ids)

    def open(self, index):
        """PIL image number `index`, as it lies on the disk."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[index])
        if isinstance(self.images, Names):
            return Image.open(self.images[index])
        return self.images[index][0]

    def where(self, index):
        """The file, or else the name, of image number `index`, for messages."""
        files = self.images if isinstance(self.images, Names) else getattr(self.images, "files", [])
        place = index - (len(self) - len(files))
        return files[place] if 0 <= place < len(files) else self.root / self.ids[index]

    @property
    def in_memory(self):
        """Whether all images are there without decoding files."""
        return isinstance(self.images, np.ndarray)

    def chosen(self, classes):
        """The dataset with the classes of a text alone, which stand between commas; None is all of them."""
        return self if classes is None else self.only(next(csv.reader([classes], skipinitialspace=True), []))

    def only(self, names):
        """The same dataset with these classes alone, in the order that it has them. Raises UserError for an unknown class."""
        for name in names:
            if name not in self.classes:
                near = difflib.get_close_matches(name, self.classes, 1, 0.5)
                raise UserError(f"--classes: dataset {self.name} has no class {name!r}"
                                + (f". Did you mean {near[0]!r}?" if near else f"; it has {', '.join(self.classes[:10])} …"))
        classes = [c for c in self.classes if c in names]
        if len(classes) < 2:
            raise UserError(f"--classes: expected at least two classes, found {', '.join(names) or 'none'}")
        number = {self.classes.index(c): i for i, c in enumerate(classes)}
        kept = [i for i, label in enumerate(self.labels.tolist()) if label in number]
        return self._part(kept, classes, np.array([number[self.labels[i]] for i in kept], dtype=np.int64))

    def without(self, ids):
        """The dataset without these images. Raises UserError where a class has none left."""
        if not ids:
            return self
        ids = set(ids)
        kept = [i for i, image_id in enumerate(self.ids) if image_id not in ids]
        labels = self.labels[kept]
        if gone := set(range(len(self.classes))) - set(labels.tolist()):
            raise UserError(f"dataset {self.name}: no image of class {self.classes[min(gone)]!r} can be used")
        return self._part(kept, self.classes, labels)

    def _part(self, kept, classes, labels):
        """A Dataset of the images number `kept`, whose labels count `classes`."""
        if isinstance(self.images, np.ndarray):
            images = self.images[kept]
        else:
            images = Names(self.images[i] for i in kept) if isinstance(self.images, Names) \
                else torch.utils.data.Subset(self.images, kept)
        part = Dataset(self.name, self.root, classes, [self.ids[i] for i in kept], labels, images,
                       *([texts[i] for i in kept] if texts else None for texts in (self.parts, self.groups, self.digests)))
        part.listing = self.listing or self
        return part

    def fingerprint(self):
        """One hash of every id, label and content: two machines with the same one have the same dataset."""
        if self._fingerprint is None:
            whole = hashlib.blake2b(digest_size=16)
            for image_id, label, digest in zip(self.ids, self.labels.tolist(), self.digests):
                whole.update(f"{image_id}\0{self.classes[label]}\0{digest}\n".encode("utf-8", "surrogateescape"))
            self._fingerprint = whole.hexdigest()
        return self._fingerprint


# --- files that are whole or not there -------------------------------------------------------------------------------


def write_atomically(path, write, sync_name=True):
    """Call `write` with an open binary file that becomes `path` only when it is whole and on the disk.

    sync_name: whether its name is to be on the disk too; who writes many files to a folder syncs that once.
    Raises UserError where the system cannot write.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{threading.get_ident()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # Over what ended it, the system or a signal, torch's writer raises an error of its own.
        reason = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        if isinstance(reason, OSError):
            raise cannot_write(path, reason) from None
        raise reason from None
    if sync_name:
        sync_folder(path.parent)


def sync_folder(folder):
    """Make sure that names just written to a folder are on the disk, where the system can."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def cannot_write(path, error):
    """The message for a full disk, or a folder that is gone or closed to us."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}). Everything written before is intact")


# --- files of a dataset --------------------------------------------------------------------------------------------


def read_inside(path, root):
    """A file's bytes. Raises OSError for what is not a file within `root`, wherever links lead: reading a device may never end."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        target = os.path.realpath(path, strict=True)
        status = os.stat(target)
    else:
        target = os.path.join(_real(os.path.dirname(path)), os.path.basename(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a file")
    if not target.startswith(_real(str(root)).rstrip(os.sep) + os.sep):
        raise OSError(f"a link that leads out of {root}")
    if status.st_size > LARGEST_FILE:
        raise OSError(f"larger than {LARGEST_FILE >> 20} MB")
    with open(target, "rb") as file:
        return file.read()


_real = functools.lru_cache(4096)(os.path.realpath)  # of folders, each of which holds many files


# --- layouts: how a dataset lies on the disk -----------------------------------------------------------------------


def digits(name, entry, root):
    """The 1,797 scanned digits of 8 x 8 pixels that come with scikit-learn (Alpaydin and Kaynak 1998).

    `entry["digits"]`, where there is one, makes them hard: the first `images` of them, with `contrast` times the contrast under normal
    noise with standard deviation `noise`, both as shares of black to white.
    """
    from sklearn.datasets import load_digits

    scans, hard = load_digits(), entry.get("digits", {"images": None, "contrast": 1, "noise": 0})
    grey, labels = scans.images[: hard["images"]] / 16, scans.target[: hard["images"]].astype(np.int64)
    grey = 0.5 + hard["contrast"] * (grey - 0.5) + hard["noise"] * _generator("noise").standard_normal(grey.shape)
    grey = np.rint(255 * grey.clip(0, 1)).astype(np.uint8)
    return Dataset(name, root, [str(c) for c in range(10)], [f"{i:04d}" for i in range(len(grey))], labels,
                   np.repeat(grey[..., None], 3, axis=3))


def folders(name, entry, root):
    """A folder of class folders, at whatever depth the archive unpacked to, with or without train/val/test above.

    The class folders' parent is the shallowest folder that holds at least two folders with images in them. Every
    image below a class folder, however deep, belongs to that class.
    """
    extensions = image_extensions()
    found, links = [], []  # (folder relative to root as a tuple of names, name in it)
    for folder, subfolders, files in os.walk(root):
        inside = Path(folder).relative_to(root).parts
        subfolders[:] = [s for s in subfolders if not s.startswith((".", "__MACOSX"))]
        links += [(inside, s) for s in subfolders if os.path.islink(os.path.join(folder, s))]
        odd = {s for s in subfolders if os.path.splitext(s)[1].lower() in extensions}  # called a.jpg: listed, then found to be no image
        subfolders[:] = [s for s in subfolders if s not in odd]
        found += [(inside, f) for f in (*files, *odd)
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
        for inside, link in links:
            if inside[:depth] == top:
                raise UserError(f"dataset {name}: {root.joinpath(*inside, link)} is a link to a folder, and these are not followed. Put the "
                                "folder itself there, or remove the link")
        rows += [("/".join((*inside, f)), inside[depth], part, None) for inside, f in found
                 if inside[:depth] == top and len(inside) > depth]
    outside = len(found) - len(rows)
    if outside > MOST_OUTSIDE * len(found):
        stray = next("/".join((*inside, f)) for inside, f in found if not any(inside[:len(t)] == t and len(inside) > len(t) for t in tops))
        raise UserError(f"dataset {name}: {outside} of {len(found)} images in {root} are in none of the class folders that were found in "
                        f"{', '.join(str(root.joinpath(*top)) for top in tops)}, the first {stray}. Expected one folder per class, side by side")
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
    """A CSV file with a row per image. `entry["csv"]`: file, and the columns that hold path, label, split and group.

    columns: their names where the file has none. delimiter: "," by default; " " for any number of spaces. classes: {what the label column
    says: class}. parts: {what the split column says: "train", "val" or "test"}, where it says something else.
    """
    spec, words = entry["csv"], PART_OF_FOLDER | entry["csv"].get("parts", {})
    path = root / spec["file"]
    if not path.is_file():
        raise UserError(missing(name, entry, f"no {path.resolve()}"))
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, spec.get("columns"), delimiter=spec.get("delimiter", ","), skipinitialspace=True)
        wanted = [spec[key] for key in ("path", "label", "split", "group") if spec.get(key)]
        absent = [c for c in wanted if c not in (reader.fieldnames or [])]
        if absent:
            raise UserError(f"{path}: no column {absent[0]!r}; it has {', '.join(reader.fieldnames or ['none'])}. "
                            f"Name the columns in configs.json, datasets.{name}.csv.")
        rows = []
        for row in reader:
            part = None
            if spec.get("split"):
                part = words.get((row[spec["split"]] or "").strip().lower())
                if part is None:
                    raise UserError(f"{path}, line {reader.line_num}: split {row[spec['split']]!r}; expected "
                                    "train, val or test.")
            if not row[spec["path"]] or not row[spec["label"]]:
                raise UserError(f"{path}, line {reader.line_num}: empty path or label.")
            image = Path(row[spec["path"]])
            if image.is_absolute() or ".." in image.parts:
                raise UserError(f"{path}, line {reader.line_num}: {image} leads out of {root}; "
                                "expected a path relative to the CSV's folder.")
            label = spec.get("classes", {}).get(row[spec["label"]], row[spec["label"]])
            if spec.get("classes") and row[spec["label"]] not in spec["classes"]:
                raise UserError(f"{path}, line {reader.line_num}: label {label!r}; configs.json, datasets.{name}.csv.classes, has "
                                f"{', '.join(spec['classes'])}.")
            rows.append((image.as_posix(), label, part, row[spec["group"]] if spec.get("group") else None))
    absent = [r[0] for r in rows if not os.path.lexists(root / r[0])]
    if len(absent) > len(rows) / 2:  # the column or the folder is wrong; a few are images that cannot be used, as broken ones are
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
        images = Names(sum(images, []))
    else:
        images = torch.utils.data.ConcatDataset(images)
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
    labels = np.array([number[row[1]] for row in rows], dtype=np.int64)
    return Dataset(name, root, classes, [row[0] for row in rows], labels, Names(str(root / row[0]) for row in rows),
                   [row[2] for row in rows] if official else None, [row[3] or "" for row in rows] if any(row[3] for row in rows) else None)


def natural_order(text):
    """Sort key in which A2 comes before A10, as video frames are numbered; total, so equal keys mean equal text."""
    return [(0, int(piece), "") if piece.isdigit() and piece.isascii() else (1, 0, piece)
            for piece in re.split(r"([0-9]+)", text)], text


def missing(name, entry, what):
    """The message for a dataset that is not where it should be."""
    source = f" Get it: {entry['source']}; or" if entry.get("source") else " Put it there, or"
    return f"dataset {name}: {what}.{source} name its folder with --data-dir DIR."


def load_dataset(name, entry, root, classes=None):
    """List the dataset `name` and hash its content.

    entry: its part of `configs.json`. root: the folder it lies in. classes: the only ones to keep, with commas between, and quotes
    around a name with a comma; None keeps all.
    Raises UserError when it is not there or not laid out as `entry["layout"]` says.
    """
    root = Path(root or ".")
    if entry["layout"] != "digits" and not root.is_dir():
        raise UserError(missing(name, entry, f"no folder {root.resolve()}"))
    dataset = LAYOUTS[entry["layout"]](name, entry, root).chosen(classes)
    dataset.digests = digests_of(dataset)
    return dataset


def digests_of(dataset, indices=None):
    """Hex hashes of the content of images number `indices`, of all by default; NOT_READ for those that cannot be read."""
    indices = range(len(dataset)) if indices is None else indices
    if isinstance(dataset.images, Names):
        def digest(index):
            try:
                return hashlib.blake2b(read_inside(dataset.images[index], dataset.root), digest_size=16).hexdigest()
            except OSError:
                return NOT_READ
    elif isinstance(dataset.images, np.ndarray):
        def digest(index):
            return hashlib.blake2b(dataset.images[index].tobytes(), digest_size=16).hexdigest()
    else:
        def digest(index):
            try:
                image = dataset.open(index)
                return hashlib.blake2b(f"{image.size}{image.mode}".encode() + image.tobytes(), digest_size=16).hexdigest()
            except UNREADABLE:
                return NOT_READ
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = pool.map(digest, indices)
        return list(track(hashes, description="reading", total=len(indices), transient=True, disable=len(indices) < 5000))


# --- the split -----------------------------------------------------------------------------------------------------


def make_split(dataset, rule, seed, train_fraction=1.0, known=None):
    """Which images train, validate and test: made once from the seed and the ids, then stored with the run.

    rule: {"rule": "stratified" | "blocks", "val": share, "test": share, "blocks": blocks per class}.
      stratified: random within each class; images of equal content stay together.
      blocks: each class's images, in natural order, are cut into `blocks` runs of consecutive ones, and whole runs
      go to one part: consecutive video frames are near-copies that a random split would put on both sides.
    Where the dataset brings its own parts they are kept: test is its test part, or, without one, its val part, and
    a validation part it lacks is drawn from its training part.
    known: {id: part} of the run that this one starts from: these images keep their part, and further images of a class that
    it had are trained on, so that nothing it was trained on comes to be tested on. What it was trained on comes first where only a
    train_fraction is used: the same fraction of the same classes is the same images.
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
    if known:
        parts = _keep_known(dataset, parts, known)
    # A copy of a held-out image must not be trained on, whatever the rule or the dataset's authors did.
    if len(set(dataset.digests)) < len(dataset):
        seen = set()
        for part in ("test", "val", "train"):
            parts[part] = [i for i in parts[part] if dataset.digests[i] not in seen]
            seen |= {dataset.digests[i] for i in parts[part]}
    lost = set(dataset.labels[[*parts["val"], *parts["test"]]].tolist()) - set(dataset.labels[parts["train"]].tolist())
    if lost:
        raise UserError(f"dataset {dataset.name}: class {dataset.classes[min(lost)]!r} has no image left to train on.")
    if not len(parts["val"]) or not len(parts["test"]):
        empty = "val" if not len(parts["val"]) else "test"
        raise UserError(f"dataset {dataset.name}: no image left for the {empty} part. Expected at least three "
                        "different images per class.")
    return {part: [dataset.ids[i] for i in sorted(_fraction(dataset, parts[part], train_fraction, seed, known or {})
                                                  if part == "train" else parts[part])] for part in PARTS}


def _draw(dataset, indices, rule, seed, shares):
    """Deal `indices` out, class by class, into the named shares and the rest, "train"."""
    dealt = {part: [] for part in (*shares, "train")}
    copied = rule["rule"] == "blocks" or len(set(dataset.digests)) < len(dataset)
    for label, members in _by_class(dataset, indices):
        if rule["rule"] == "blocks":
            units = [list(b) for b in np.array_split(members, min(rule["blocks"], len(members)))]
        elif not copied:
            units = members[:, None]
        else:
            copies = {}
            for i in members.tolist():
                copies.setdefault(dataset.digests[i], []).append(i)
            units = list(copies.values())
        if len(units) <= len(shares):
            raise UserError(f"dataset {dataset.name}: class {dataset.classes[label]!r} has {len(units)} different "
                            f"images; the split needs at least {len(shares) + 1}.")
        order = _generator("split", seed, dataset.classes[label]).permutation(len(units))
        units = units[order].tolist() if not copied else [units[i] for i in order]
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


def _keep_known(dataset, parts, known):
    labels = dataset.labels.tolist()
    had = {label for image_id, label in zip(dataset.ids, labels) if image_id in known}
    kept = {part: [i for i in members if labels[i] not in had] for part, members in parts.items()}
    for i, (image_id, label) in enumerate(zip(dataset.ids, labels)):
        if label in had:
            kept[known.get(image_id, "train")].append(i)
    return kept


def redraw(dataset, split, seed, number):
    """A new split of the training and validation images, of the same sizes class by class; the test images stay.

    This is what the published implementation does at each proxy round. It puts images that were trained on into the validation
    part, so that validation accuracy no longer says how good the network is. `number` counts these draws; whichever draw of the
    same images `split` holds, the answer is the same.
    """
    index = {image_id: i for i, image_id in enumerate(dataset.ids)}
    validation, parts = {index[i] for i in split["val"]}, {"train": [], "val": []}
    for label, members in _by_class(dataset, sorted({index[i] for i in split["train"]} | validation)):
        order = members[_generator("resplit", seed, number, dataset.classes[label]).permutation(len(members))]
        count = sum(i in validation for i in members.tolist())
        parts["val"] += order[:count].tolist()
        parts["train"] += order[count:].tolist()
    return {**split, **{part: [dataset.ids[i] for i in sorted(members)] for part, members in parts.items()}}


def _fraction(dataset, indices, fraction, seed, first=()):
    """A stratified `fraction` of `indices`, at least one per class, with ids in `first` first; smaller fractions are parts of larger ones."""
    if fraction == 1:
        return indices
    kept = []
    for label, members in _by_class(dataset, indices):
        order = _generator("fraction", seed, dataset.classes[label]).permutation(len(members))
        if first:
            order = sorted(order, key=lambda i: dataset.ids[members[i]] not in first)
        kept += [members[i] for i in order[: max(1, round(fraction * len(members)))]]
    return kept


def _by_class(dataset, indices):
    indices = np.asarray(indices, dtype=np.int64)
    labels = dataset.labels[indices]
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    for label, members in zip(found.tolist(), np.split(indices[order], starts[1:])):
        yield label, members


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


def shuffled(ids, *key):
    """The ids in an order that follows from `key` alone."""
    return [ids[i] for i in _generator("shuffle", *key).permutation(len(ids))]


def _generator(*key):
    """Random numbers that follow from `key` alone, whatever was drawn before."""
    return np.random.default_rng(stable_seed(*key))


def chance(device, *key):
    """A torch generator on `device` whose numbers follow from `key` alone."""
    return torch.Generator(device).manual_seed(stable_seed(*key))


def stable_seed(*key):
    """63-bit seed from any key of strings and integers, the same on every machine and in every process."""
    text = "\0".join(map(str, key)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# --- decoys --------------------------------------------------------------------------------------------------------

SWATCH = 8  # a decoy's side is an eighth of the image's
CORNERS = 4


@dataclass
class Decoy:
    """A coloured square in a corner of each image. corners: int64 [N], -1 for none; colours: uint8 [N, 3]."""

    corners: np.ndarray
    colours: np.ndarray

    def mask(self, indices, size):
        """Where the squares of images number `indices` are: bool [n, size, size]."""
        corners, side = torch.as_tensor(self.corners[indices]), max(1, size // SWATCH)
        return swatch(corners, size, side)


def swatch(corners, size, side):
    """bool [n, size, size]: squares of `side` pixels in corners 0 to 3, clockwise from the upper left; none for -1."""
    near = torch.arange(size, device=corners.device) < side
    down, right = ((corners == 2) | (corners == 3))[:, None], ((corners == 1) | (corners == 2))[:, None]
    rows, columns = torch.where(down, near.flip(0), near), torch.where(right, near.flip(0), near)
    return rows[:, :, None] & columns[:, None, :] & (corners >= 0)[:, None, None]


def draw_decoy(dataset, split, seed):
    """A shortcut planted in a dataset: a square whose colour says the class in training and validation, and lies in the test.

    After decoy MNIST (Ross, Hughes and Doshi-Velez 2017, "Right for the right reasons", section 4.2), in colour. Each image has its own corner, drawn
    at random; in the test part the colour is that of another class, drawn at random. Returns a `Decoy` of all images.
    """
    draw, count = _generator("decoy", seed), len(dataset.classes)
    hues = [colorsys.hsv_to_rgb(c / count, 1, 1) for c in range(count)]
    corners = draw.integers(CORNERS, size=len(dataset))
    others = (dataset.labels + draw.integers(1, count, size=len(dataset))) % count
    test = set(split["test"])
    told = np.where([image_id in test for image_id in dataset.ids], others, dataset.labels)
    return Decoy(corners, np.rint(255 * np.array(hues)).astype(np.uint8)[told])


# --- where the object is -------------------------------------------------------------------------------------------


def _ink(dataset, indices, pixels):
    """Of drawings: what is brighter than the middle between an image's darkest and its brightest pixel."""
    grey = pixels.float().mean(1)
    return grey > (grey.amin((1, 2), keepdim=True) + grey.amax((1, 2), keepdim=True)) / 2


def _trimap(dataset, indices, pixels):
    """Of `pets`: animal and outline, from the trimaps beside the photographs (1 animal, 2 background, 3 outline)."""
    masks, size = [], pixels.shape[-1]
    for index in indices:
        photograph = Path(dataset.images[index])
        path = photograph.parent.parent / "annotations" / "trimaps" / f"{photograph.stem}.png"
        if not path.is_file():
            return None
        masks.append(np.asarray(Image.open(path).resize((size, size), Image.Resampling.NEAREST)) != 2)
    return torch.from_numpy(np.stack(masks)).to(pixels.device)


MASKS = {"digits": _ink, "noisy_digits": _ink, "pets": _trimap}


def masks_of(dataset, indices, pixels):
    """Where heat should lie, or under --decoy should not: (name, bool [n, H, W]), or (None, None) where it is not known.

    indices: int64 [n] of the images. pixels: uint8 [n, 3, H, W], the same images.
    """
    if dataset.decoy is not None:
        return "swatch", dataset.decoy.mask(indices, pixels.shape[-1]).to(pixels.device)
    mask = MASKS.get(dataset.name, lambda *_: None)(dataset, indices, pixels)
    return (None, None) if mask is None else ("object", mask)


# --- from files to batches -----------------------------------------------------------------------------------------


def to_rgb(image, size):
    """Any PIL image as RGB uint8 array [size, size, 3], upright and squeezed to a square.

    Squeezed rather than cropped, so that no part of the image escapes the heat. Transparent pixels become mid-grey,
    which normalisation maps near zero: neither a black nor a white drawing vanishes in it.
    """
    if image.format == "JPEG":
        image.draft(None, (size, size))  # the decoder drops to the nearest power of two that is still large enough
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
        self.dataset, self.indices, self.size, self.digests = dataset, indices, size, None
        if isinstance(dataset.images, Names) and dataset.digests:  # as bytes in one array, for the reason that Names has
            self.digests = np.frombuffer(bytes.fromhex("".join(dataset.digests[i] for i in indices)), np.uint8).reshape(-1, 16)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, position):
        label = int(self.dataset.labels[self.indices[position]])
        return torch.from_numpy(self.pixels(position).copy()).permute(2, 0, 1), label

    def pixels(self, position):
        """uint8 [size, size, 3]. Raises UserError that names what cannot be read, or is not what it was when the dataset was listed."""
        index = int(self.indices[position])
        try:
            return to_rgb(self._open(index, position), self.size)
        except UNREADABLE as error:
            raise UserError(f"{self.dataset.where(index)}: cannot be read as an image ({reason(error)})") from None

    def _open(self, index, position):
        if not isinstance(self.dataset.images, Names):
            return self.dataset.open(index)
        content = read_inside(self.dataset.images[index], self.dataset.root)
        if self.digests is not None and hashlib.blake2b(content, digest_size=16).digest() != self.digests[position].tobytes():
            raise OSError("its content has changed since the dataset was listed; put it back")
        return Image.open(io.BytesIO(content))


def reason(error):
    """What Pillow or the system say of a file, without its name."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


class Checked(Decoded):
    """As Decoded: (uint8 array [size, size, 3], None), or (None, what is wrong with it)."""

    def __getitem__(self, position):
        try:
            return to_rgb(self._open(int(self.indices[position]), position), self.size), None
        except UNREADABLE as error:
            return None, reason(error)

    @staticmethod
    def collate(items):
        """A batch: uint8 tensor [those that can be read, size, size, 3], and for all what is wrong or None."""
        images = [image for image, wrong in items if wrong is None]
        return torch.from_numpy(np.stack(images)) if images else None, [wrong for _, wrong in items]


class Order:
    """Batches of positions: shuffled anew each epoch, every batch of the same size.

    The order of an epoch follows from (seed, epoch) alone. The last batch is filled up from the epoch's beginning,
    so that every image is seen in every epoch and no batch has another shape. rank, ranks: of each batch, this is the process that
    takes the rank-th of `ranks` equal parts. Set `epoch`, and `start` to leave out an epoch's first batches. weights: int64 [length], or None:
    then as many images are drawn of an epoch in which each is that many times, so that not every one is seen.
    """

    def __init__(self, length, batch_size, seed, rank=0, ranks=1, weights=None):
        self.length, self.seed, self.epoch, self.start = length, seed, 0, 0
        self.weights = weights
        self.batch_size = max(min(batch_size, length) // ranks, 1)  # of this process
        self.rank, self.ranks = rank, ranks

    def __len__(self):
        return math.ceil(self.length / (self.batch_size * self.ranks))

    def rows(self):
        """Positions of the whole epoch, int64 [batches, batch_size of all ranks]."""
        order = self.length if self.weights is None else np.repeat(np.arange(self.length), self.weights)
        order = _generator("order", self.seed, self.epoch).permutation(order)[:self.length]
        return np.resize(order, (len(self), self.batch_size * self.ranks))

    def __iter__(self):
        return iter(self.rows()[self.start:, self.rank * self.batch_size:(self.rank + 1) * self.batch_size])


class InOrder:
    """Batches of positions, first to last; the last one may be shorter. Of several ranks each takes every ranks-th image."""

    def __init__(self, length, batch_size, rank=0, ranks=1):
        positions = np.arange(rank, length, ranks)
        self.batches = np.split(positions, range(batch_size, len(positions), batch_size)) if len(positions) else []

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Batches:
    """Batches (images uint8 [B, 3, size, size], labels int64 [B]) on `device`, for one part of a split.

    With `seed` they are shuffled: set `.order.epoch`, then iterate. Without, they come in the order of `ids` and the
    last one may be shorter. Images that are decoded already (`dataset.pixels`) stay on the device where they fit, or else come
    from memory or the disk, a few batches ahead; others are decoded by `workers` processes. rank, ranks, weights: as in `Order`. decoy: whether
    images show the dataset's decoys, where it has them.
    """

    def __init__(self, dataset, ids, size, batch_size, device, workers=0, seed=None, rank=0, ranks=1, decoy=True, weights=None):
        number = {image_id: i for i, image_id in enumerate(dataset.ids)}
        self.indices = np.array([number[i] for i in ids], dtype=np.int64)
        self.device = device
        self.labels = torch.from_numpy(dataset.labels[self.indices])
        self.order = InOrder(len(ids), batch_size, rank, ranks) if seed is None \
            else Order(len(ids), batch_size, seed, rank, ranks, weights)
        self.resident, self.loader, self.pixels, self.decoy = None, None, dataset.pixels, None
        if decoy and dataset.decoy is not None:
            self.decoy = [torch.from_numpy(array[self.indices]).to(device) for array in (dataset.decoy.corners, dataset.decoy.colours)]
        few = len(ids) * size * size * 3 <= RESIDENT_BYTES
        self.ahead = device.type == "cuda" or not few
        if self.pixels is None or self.pixels.size != size:
            self.loader = torch.utils.data.DataLoader(
                Decoded(dataset, self.indices, size), batch_sampler=self.order, num_workers=workers,
                pin_memory=device.type == "cuda", persistent_workers=workers > 0)
        elif few and device.type != "cpu":
            self.resident = torch.from_numpy(self.pixels.take(self.indices)).to(device)
            self.labels = self.labels.to(device)

    def __len__(self):
        return len(self.order)

    def seen(self):
        """Positions in `ids` of the images of this epoch, in their order, over all ranks."""
        return self.order.rows().ravel().tolist()

    def __iter__(self):
        batches = self._plain()
        return batches if self.decoy is None else self._with_decoys(batches)

    def _with_decoys(self, batches):
        for positions, (images, labels) in zip(self.order, batches):
            corners, colours = (part[torch.from_numpy(positions).to(self.device)] for part in self.decoy)
            size = images.shape[-1]
            yield torch.where(swatch(corners, size, max(1, size // SWATCH))[:, None], colours[:, :, None, None], images), labels

    def _plain(self):
        if self.resident is not None:
            for positions in self.order:
                positions = torch.from_numpy(positions).to(self.device, non_blocking=True)
                yield self.resident[positions].permute(0, 3, 1, 2), self.labels[positions]
        elif self.loader is None:
            for images, labels in ahead(self._taken()) if self.ahead else self._taken():
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        else:
            try:
                for images, labels in self.loader:
                    yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            except UserError as error:
                raise unwrapped(error) from None

    def _taken(self):
        """Batches from `pixels`, still on the host."""
        for positions in self.order:
            images = torch.from_numpy(self.pixels.take(self.indices[positions])).permute(0, 3, 1, 2)
            labels = self.labels[torch.from_numpy(positions)]
            yield (images.pin_memory(), labels.pin_memory()) if self.device.type == "cuda" else (images, labels)


def unwrapped(error):
    """A UserError without the traceback that a DataLoader's worker wraps it in."""
    return UserError(str(error).rsplit("UserError: ", 1)[-1].strip())


def ahead(items, depth=3):
    """The items of an iterator, drawn by a thread up to `depth` ahead; what goes wrong there is raised here."""
    waiting, stop, end = queue.Queue(depth), threading.Event(), object()

    def draw():
        last = end
        try:
            for item in items:
                while not stop.is_set():
                    with contextlib.suppress(queue.Full):
                        waiting.put((item, None), timeout=0.1)
                        break
                if stop.is_set():
                    return
        except BaseException as error:
            last = error
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                return waiting.put((end, last if last is not end else None), timeout=0.1)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def prepare(pixels, mean, std):
    """Normalised images from pixels, on the device, a whole batch at once.

    pixels: uint8 [B, 3, H, W]. mean, std: float [1, 3, 1, 1] on the same device, for values in [0, 1].
    Returns float32 [B, 3, H, W], channels last.
    """
    return _normalise(unchanged(pixels, None, ()), mean, std)


def pixels_of(images, mean, std):
    """Pixels, uint8 [B, 3, H, W], of normalised images: what `prepare` was given."""
    return torch.addcmul(255 * mean + 0.5, images, 255 * std).clamp_(0, 255).to(torch.uint8)


def _normalise(images, mean, std):
    return images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


# Augmentations: (pixels uint8 [B, 3, H, W], the dataset's `augment` entry, key, place) -> float32 [B, 3, H, W] in [0, 1].
# place: (first, all), where these images stand in a batch that several processes share, so that what is drawn for an image
# does not depend on how many there are; None where the batch is whole.


def _draws(place, count, columns, *key):
    """Uniform draws [count, columns] for the images at `place`, on the CPU."""
    first, every = place or (0, count)
    return torch.rand(every, columns, generator=chance("cpu", *key))[first:first + count]


def unchanged(pixels, entry, key, place=None):
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(255)


def light(pixels, entry, key, place=None):
    """Each image flipped, turned and shifted its own way, as far as its dataset allows.

    entry: {"flip": bool, "rotate": degrees, "shift": share of the side}.
    """
    images = unchanged(pixels, entry, key)
    draws = _draws(place, len(images), 4, "augment", *key)
    angle, across, down, mirror = draws.to(images.device, non_blocking=True).T
    angle = (2 * angle - 1) * math.radians(entry["rotate"])
    across, down = (2 * (2 * shift - 1) * entry["shift"] for shift in (across, down))  # the grid spans -1 to 1
    mirror = torch.where(mirror < 0.5, -1.0, 1.0) if entry["flip"] else torch.ones_like(mirror)
    cos, sin = angle.cos(), angle.sin()
    moves = torch.stack([cos * mirror, -sin, across, sin * mirror, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(moves, images.shape, align_corners=False)
    # "border" repeats the edge: a black rim would look like something that was erased
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def randaugment(pixels, entry, key, place=None):
    """RandAugment, Cubuk et al. 2020, with torchvision's defaults: two operations of magnitude 9."""
    return unchanged(_one_by_one(pixels, v2.RandAugment(fill=GREY), place, "augment", *key), entry, key)


def trivialaugment(pixels, entry, key, place=None):
    """TrivialAugment, Mueller and Hutter 2021, as torchvision's TrivialAugmentWide: one operation of any magnitude."""
    return unchanged(_one_by_one(pixels, v2.TrivialAugmentWide(fill=GREY), place, "augment", *key), entry, key)


AUGMENTATIONS = {"none": unchanged, "light": light, "randaugment": randaugment, "trivialaugment": trivialaugment}
GREY = 128  # what comes in from outside the image; black would look like something that was erased
HIDE_GRID = 4  # Hide-and-Seek's cells along a side: 56 pixels of 224, the largest of its paper


def _one_by_one(images, transform, place, *key):
    """A torchvision transform on each image. A loop, for given a batch it would do the same to all of its images."""
    first, changed = (place or (0, 0))[0], []
    with torch.random.fork_rng(devices=[]):
        for number, image in enumerate(images, first):
            torch.default_generator.manual_seed(stable_seed(*key, number))
            changed.append(transform(image))
    return torch.stack(changed)


def augment(pixels, mean, std, config, key, place=None):
    """Normalised images from pixels, each changed its own way by what a run's settings name.

    pixels, mean, std: as in `prepare`. config: augment, a key of AUGMENTATIONS; random_erasing, the probability that a rectangle of
    an image becomes noise (Zhong et al. 2020, torchvision's RandomErasing); hide_and_seek, the probability that a cell of the
    image is hidden behind the mean colour (Kumar Singh and Lee 2017). key: what the draws follow from, as (seed, epoch, step).
    place: as for AUGMENTATIONS. Returns float32 [B, 3, H, W], channels last.
    """
    images = _normalise(AUGMENTATIONS[config["augment"]](pixels, config["dataset_entry"]["augment"], key, place), mean, std)
    if config["random_erasing"]:
        images = _one_by_one(images, v2.RandomErasing(config["random_erasing"], value="random"), place, "random erasing", *key)
    if config["hide_and_seek"]:
        cells = _draws(place, len(images), HIDE_GRID**2, "hide", *key).to(images.device).view(-1, 1, HIDE_GRID, HIDE_GRID)
        images = images * F.interpolate((cells >= config["hide_and_seek"]).float(), images.shape[2:])
    return images.contiguous(memory_format=torch.channels_last)


def mix(images, labels, classes, config, key):
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) by torchvision, where the settings `mixup` or `cutmix` ask for it.

    Both: one of them per batch, at random. images: [B, 3, H, W]. labels: int64 [B]. classes: their number C.
    Returns images and labels, these as shares float32 [B, C], or both as they came where neither is asked for.
    """
    ways = [way(alpha=config[name], num_classes=classes) for name, way in (("mixup", v2.MixUp), ("cutmix", v2.CutMix))
            if config[name]]
    if not ways:
        return images, labels
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_seed("mix", *key))
        return v2.RandomChoice(ways)(images, labels)


# --- erased images on the disk -------------------------------------------------------------------------------------


class _Joined:
    """Images of a Dataset, then those in files: item i is (PIL image, None), as a torchvision dataset gives them."""

    def __init__(self, dataset, files):
        self.dataset, self.files = dataset, files

    def __getitem__(self, index):
        own = len(self.dataset)
        return (self.dataset.open(index) if index < own else Image.open(self.files[index - own])), None


def with_erased(dataset, ids, sources, files, budget):
    """The dataset with erased copies added, and what to train on.

    ids: of the training images. sources: of the images that were erased; files: where their copies lie.
    budget "equal": copies in place of their originals; "extra": copies behind the originals.
    Returns a Dataset, the training ids, and the set of those that are copies.
    """
    number = {image_id: i for i, image_id in enumerate(dataset.ids)}
    copies = {source: f"erased copy of {source}" for source in sources}
    joined = Dataset(dataset.name, dataset.root, dataset.classes, [*dataset.ids, *copies.values()],
                     np.concatenate([dataset.labels, dataset.labels[[number[s] for s in sources]]]), _Joined(dataset, files))
    if dataset.pixels is not None:
        decoded = Decoded(joined, np.arange(len(dataset), len(joined)), dataset.pixels.size)
        with ThreadPoolExecutor(HASH_THREADS) as pool:  # Pillow lets other threads run while it decodes
            joined.pixels = Pixels(*dataset.pixels.arrays, np.stack(list(pool.map(decoded.pixels, range(len(decoded))))))
    if dataset.decoy is not None:  # the copies' were there when they were erased
        joined.decoy = Decoy(np.concatenate([dataset.decoy.corners, np.full(len(files), -1)]),
                             np.concatenate([dataset.decoy.colours, np.zeros((len(files), 3), np.uint8)]))
    ids = [copies.get(i, i) for i in ids] if budget == "equal" else [*ids, *copies.values()]
    return joined, ids, set(copies.values())
