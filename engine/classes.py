"""Class folders: which images below a folder are of which class and part, and a word on all else that lies there.

    tree = walk(root)                    # images, other files and folders; links are followed, and nothing is written
    found = find("folder", tree)         # rows, notes, lost classes, masks
"""

import contextlib
import filecmp
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from engine.dataset import image_extensions, natural_order
from engine.files import UserError, nearest

# How datasets name these parts on the disk.
PART_OF_FOLDER = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                  "test": "test", "testing": "test"}
UNLABELLED = re.compile("(?:.*[^a-z])?(?:test|testing|val|valid|validation|unlabell?ed)(?:[^a-z].*)?", re.I | re.S)
MOST_OUTSIDE = 0.05  # of all images may be in no class folder elsewhere
NO_DATA = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini",
           "__pycache__")  # what systems leave anywhere
TEXTS = {".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".md", ".html", ".log", ".py", ".ipynb"}
IMAGE_FOLDERS = {"image", "images", "img", "imgs"}
MASK_FOLDERS = {"mask", "masks", "segmentation", "segmentations", "ground_truth", "groundtruth", "gt", "annotation",
                "annotations", "label", "labels"}
MASK_FILE = re.compile(r"(.+)[_-](?:mask|segmentation)(?:[_-]?\d+)?", re.I)


class Tree(NamedTuple):
    """What lies below `root`; a folder is a tuple of names from there down."""

    root: Path
    images: list  # (folder, file) of all with the ending of an image
    others: list  # (folder, file) of the rest
    folders: dict  # {folder: why nothing in it is read, or None}

    def path(self, image):
        return self.root.joinpath(*image[0], image[1])


class Found(NamedTuple):
    """rows: (id, class, part or None). notes: lines on what is not used. lost: {class: what lies there instead of
    images}. masks: {id: files relative to the root}, where each image has at least one, else None."""

    rows: list
    notes: list
    lost: dict
    masks: dict | None


def walk(root):
    """The `Tree` of a folder. Links are followed where they lead to what is not read already, so that loops end."""
    tree, extensions = Tree(Path(root), [], [], {}), image_extensions()
    folders, links, seen = [((), os.path.realpath(root))], [], set()
    while folders or links:
        inside, real = folders.pop() if folders else links.pop(0)  # a folder counts where it is, not where a link is
        tree.folders[inside] = f"a link to {real}, which is read already" if real in seen else None
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        except OSError as error:
            tree.folders[inside] = error.strerror
            continue
        for entry in entries:
            name, below = entry.name, (*inside, entry.name)
            image = os.path.splitext(name)[1].lower() in extensions  # a folder a.jpg is a bad image
            if name.startswith(".") or name in NO_DATA:
                continue
            if image or not (entry.is_symlink() or entry.is_dir()):
                (tree.images if image else tree.others).append((inside, name))
            elif not entry.is_symlink():
                folders.append((below, os.path.join(real, name)))
            elif f"{real}{os.sep}".startswith(f"{(target := os.path.realpath(entry.path)).rstrip(os.sep)}{os.sep}"):
                tree.folders[below] = f"a link back to {target}"
            elif os.path.isdir(target):
                links.append((below, target))
            elif os.path.exists(target):
                tree.others.append((inside, name))
            else:
                tree.folders[below] = f"a link to {target}, which is not there"
    return tree


def kinds(names):
    """How many files there are of which ending, as "8 .heic, 2 without ending"."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without ending" for name in names)
    counts = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    return ", ".join([f"{count} {kind}" for kind, count in counts[:4]] + ["…"] * (len(counts) > 4))


def contents(tree):
    """What lies in a folder, or in the first below it that holds more than one folder, for messages."""
    files, top = [*tree.images, *tree.others], ()
    if tree.folders[()]:
        return f"nothing that can be read ({tree.folders[()]})"
    while True:
        below = sorted(folder for folder in tree.folders if len(folder) == len(top) + 1 and folder[:-1] == top)
        beside = [file for inside, file in files if inside == top]
        if len(below) != 1 or beside:
            break
        top, = below
    inner = [f"{'/'.join(folder)} ({tree.folders[folder] or _below(files, folder) or 'empty'})" for folder in below[:5]]
    return ", ".join(inner + ["…"] * (len(below) > 5) + [kinds(beside)] * bool(beside)) or "nothing"


def _below(files, folder):
    return kinds(file for inside, file in files if inside[:len(folder)] == folder)


def absent(root):
    """Why `root` is no folder of a dataset, for messages, with the nearest name of what lies there; None if it is."""
    path = os.path.abspath(root)
    if path == os.path.dirname(path):
        return f"{path} is all of the disk"
    if os.path.isdir(path):
        return None
    if os.path.isfile(path):
        return f"{path} is a file: unpack an archive, and give a CSV of labels to --csv"
    if os.path.islink(path):
        return f"{path} is a link to {os.readlink(path)}, which is not there"
    with contextlib.suppress(OSError):
        return f"no folder {path}{nearest(os.path.basename(path), os.listdir(os.path.dirname(path)))}"
    return f"no folder {path}"


def part_of(folder):
    """The part of a dataset that a folder, a tuple of names, is named after, or None."""
    return next(filter(None, (PART_OF_FOLDER.get(name.lower()) for name in reversed(folder))), None)


def class_parents(with_images):
    """Folders (tuples of names) that hold class folders, given the set of folders that hold images directly."""
    for holders in (with_images, {f[:n] for f in with_images for n in range(1, len(f) + 1)}):
        children = {}
        for folder in holders:
            if folder:
                children.setdefault(folder[:-1], set()).add(folder)
        # train/val/test folders with images directly in them hold no classes
        parents = [parent for parent, folders in children.items()
                   if len(folders) > 1 and not all(f[-1].lower() in PART_OF_FOLDER for f in folders)]
        if parents:
            depth = min(map(len, parents))
            return sorted(p for p in parents if len(p) == depth)
    return []


def mask_images(tree):
    """{mask: its image, or None}, each (folder, file): what lies in masks/ beside images/ or beside the images
    themselves, under the same names; and X_mask.png beside X.png."""
    named = {inside for inside in tree.folders if any(name.lower() in MASK_FOLDERS for name in inside)}
    maybe = [(inside, file) for inside, file in tree.images if inside in named or MASK_FILE.fullmatch(_stem(file))]
    if not maybe:
        return {}
    stems = {(inside, _stem(file)): (inside, file) for inside, file in tree.images}
    beside = {folder[:-1]: folder for folder in tree.folders if folder and folder[-1].lower() in IMAGE_FOLDERS}
    masks = {}
    for inside, file in maybe:
        stem = _stem(file)
        short = match[1] if (match := MASK_FILE.fullmatch(stem)) else stem
        places = [inside] if match else []
        for n, name in enumerate(inside):
            if name.lower() in MASK_FOLDERS:
                above, below = inside[:n], inside[n + 1:]
                places.append((*beside.get(above, above), *below))
                if above in beside:
                    masks[inside, file] = None
        image = next((stems[key] for place in places for key in ((place, stem), (place, short))
                      if key in stems and key != (inside, stem)), None)
        if image:
            masks[inside, file] = image
    return masks


def _stem(file):
    return os.path.splitext(file)[0]


def find(name, tree):
    """What a `Tree` of class folders holds, as `Found`: at whatever depth they lie, with or without parts above.

    The class folders' parent is the shallowest folder that holds at least two folders with images in them; of several,
    each is a part of its own. Every image below a class folder, however deep, belongs to that class. Raises UserError.
    """
    masks = mask_images(tree)
    images = [image for image in tree.images if image not in masks]
    tops = class_parents({inside for inside, _ in images})
    if not tops:
        raise UserError(f"dataset {name}: {tree.root} holds {len(images)} images but not two class folders of them; "
                        f"there is {contents(tree)}. Expected one folder per class, named after it, with that class's "
                        "images inside.")
    parts = {}  # {part: its folder of class folders}
    for top in tops:
        parts.setdefault(part_of(top), top)
    if len(parts) > 1:
        parts.pop(None, None)
    rows, copies, outside = _sort_out(tree, images, parts)
    flat = [image for image in outside if _is_unlabelled(image[0], parts)]
    stray = sorted(set(outside) - set(flat), key=_order)
    _check_stray(name, tree, tops, parts, stray, len(images))
    beside = _masks_of(rows, masks)
    notes = [_note(tree, *each) for each in (
        (copies, f"images are copies of those in {_listed(tree, parts.values())}, which count"),
        (flat, "images of an unlabelled part are left out"),
        (stray, "images in no class folder are left out"),
        (masks, "images are masks, and " + ("`python -m study.explain RUN --where` compares heat with them" if beside
                                            else "left out, for not every image has one"))) if each[0]]
    lost = _lost(tree, images, parts, {row[1] for row in rows.values()}, notes)
    return Found(list(rows.values()), notes, lost, beside)


def _order(image):
    return natural_order("/".join((*image[0], image[1])))


def _note(tree, which, text):
    return f"{len(which)} {text}, the first {tree.path(min(which, key=_order))}"


def _listed(tree, folders):
    return ", ".join(str(tree.root.joinpath(*folder)) for folder in folders)


def _is_unlabelled(folder, parts):
    """Whether this is of a part that lies flat, as the test part of a competition, beside one to train on."""
    part = part_of(folder)
    own = {top[:n] for top in parts.values() for n in range(1, len(top) + 1)}
    return ({None, "train"} & parts.keys() and part != "train" and part not in parts.keys() - {None}
            and any(UNLABELLED.fullmatch(name) for n, name in enumerate(folder) if folder[:n + 1] not in own))


def _sort_out(tree, images, parts):
    """({image: row of `Found`}, copies of these elsewhere, all other images): each image (folder, file)."""
    whole, depth = {top: part for part, top in parts.items()}, len(next(iter(parts.values())))
    rows, outside, folders, twins = {}, [], defaultdict(list), defaultdict(list)
    # Among class folders `test` and `val` are parts, but `train` may be a vehicle.
    names = {inside[depth] for inside, _ in images if len(inside) > depth and inside[:depth] in whole}
    held_out = {name for name in names if None in parts and PART_OF_FOLDER.get(name.lower()) in ("val", "test")}
    if len(names - held_out) < 2:
        held_out = set()
    for inside, file in images:
        if len(inside) > depth and inside[:depth] in whole and inside[depth] not in held_out:
            rows[inside, file] = "/".join((*inside, file)), inside[depth], whole[inside[:depth]], None
            folders[inside[:depth + 1]].append((inside, file))
            twins[inside[depth:], file].append((inside, file))
        else:
            outside.append((inside, file))

    def is_copy(image, first):
        """Whether the same file lies, under the same class and name, in a class folder."""
        inside, file = image
        there = (twin for n in range(first, len(inside)) for twin in twins.get((inside[n:], file), ()))
        with contextlib.suppress(OSError):
            return any(filecmp.cmp(tree.path(image), tree.path(twin)) for twin in there)

    for folder, within in folders.items():  # a second copy of all class folders, among these
        if all(len(inside) > depth + 1 and inside[depth + 1] in names for inside, _ in within):
            again = [image for image in within if is_copy(image, depth + 1)]
            if len(again) > len(within) / 2:
                outside += within
                for inside, file in within:
                    del rows[inside, file], twins[inside[depth:], file]
    copies = {image for image in outside if is_copy(image, 0)}
    return rows, copies, [image for image in outside if image not in copies]


def _check_stray(name, tree, tops, parts, stray, count):
    """UserError where other images than a few lie outside the class folders."""
    spare = set(tops) - set(parts.values())
    if any(inside[:len(tops[0])] in spare for inside, _ in stray):
        raise UserError(f"dataset {name}: several folders hold class folders: {_listed(tree, tops)}. Name one with "
                        "--data-dir; or, where these are the classes, leave one folder of images in each")
    if len(stray) > MOST_OUTSIDE * count:
        raise UserError(f"dataset {name}: {len(stray)} of {count} images in {tree.root} are in none of the class "
                        f"folders that were found in {_listed(tree, parts.values())}, the first {tree.path(stray[0])}. "
                        "Expected one folder per class, side by side; name their parent with --data-dir")


def _masks_of(rows, masks):
    """{id: masks, as ids} where every image has one, else None."""
    found = defaultdict(list)
    for (inside, file), image in masks.items():
        if image in rows:
            found[rows[image][0]].append("/".join((*inside, file)))
    return dict(found) if len(found) == len(rows) else None


def _lost(tree, images, parts, classes, notes):
    """{class: what its folder holds instead of images}; adds to the notes what else is not read."""
    depth, lost, within, left = len(next(iter(parts.values()))), {}, defaultdict(list), []
    holding = {inside[:depth + 1] for inside, _ in images}
    for inside, file in tree.others:
        if inside[:depth] in parts.values() and len(inside) > depth:
            within[inside[:depth + 1]].append((inside, file))
    others = [file for files in within.values() for file in files]
    if others:
        notes.append(_note(tree, others, f"files in class folders are left out, for their endings are no image's "
                                         f"({kinds(file for _, file in others)})"))
    for folder, why in tree.folders.items():
        files = [file for _, file in within.get(folder, ())]
        is_class = len(folder) == depth + 1 and folder[:-1] in parts.values() and folder not in holding
        if is_class and folder[-1] not in classes and folder[-1].lower() not in PART_OF_FOLDER.keys() | MASK_FOLDERS \
                and not (files and {os.path.splitext(file)[1].lower() for file in files} <= TEXTS):
            lost[folder[-1]] = why or kinds(files) or "empty"
        elif why or is_class and not files:
            left.append((folder, why or "no images"))
    if left:
        notes.append(f"{len(left)} folders are left out, the first {tree.root.joinpath(*left[0][0])} ({left[0][1]})")
    notes += [f"folder {c} counts as a class; --classes leaves it out" for c in sorted(classes)
              if None in parts and c.lower() in PART_OF_FOLDER]
    return lost
