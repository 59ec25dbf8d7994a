"""What a dataset is: ids, labels and images, and how a file becomes pixels.

Nothing here ever writes to a dataset's folder.
"""

import functools
import hashlib
import os
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from engine.files import UserError

LARGEST_FILE = 2**30  # bytes; what is larger is no photograph
UNREADABLE = OSError, ValueError, SyntaxError, Image.DecompressionBombError  # what Pillow raises for a broken image

# Pillow warns of what it reads nonetheless: odd EXIF data, palettes with transparency, and images of over 89 million
# pixels (it refuses those of over 179 million).
warnings.filterwarnings("ignore", module=r"PIL\.")


class Names:
    """Strings in one buffer: reading those of a list counts references, and so copies it in every forked worker."""

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
    """Decoded images as uint8 [N, size, size, 3], in one array after another: in memory, or mapped from a file."""

    def __init__(self, *arrays):
        self.arrays, self.size = arrays, arrays[0].shape[1]
        self.ends = np.cumsum([len(a) for a in arrays])

    def take(self, indices, taken=None):
        """Images number `indices`, int64 [n], as one array in memory, uint8 [n, size, size, 3]: `taken`, if given."""
        if taken is None:
            taken = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        if len(self.arrays) == 1:
            return np.take(self.arrays[0], indices, 0, taken, "clip")  # straight there, which "raise" does not do
        which = np.searchsorted(self.ends, indices, "right")
        for number, array in enumerate(self.arrays):
            inside = which == number
            taken[inside] = np.asarray(array)[indices[inside] - (self.ends[number] - len(array))]
        return taken


@dataclass
class Dataset:
    """What a layout found. Image i has id `ids[i]`, class `classes[labels[i]]`; order is the natural order of ids.

    ids: unique strings, paths relative to `root` with `/` where the images are files.
    images: Names of N paths, or uint8 array [N, H, W, 3], or anything that gives (PIL image, label) for a number.
    parts: "train" | "val" | "test" per image where the dataset brings its own split, else None.
    groups: a text per image, as where it was taken, in which a network may do better than elsewhere; or None.
    digests: hex hash of each image's content; equal digests mean the same image under two names.
    decoy: `Decoy` of every image, where the run is to have one (`draw_decoy`).
    pixels: `Pixels` of all images at the size of the run, where they are decoded already (`cache.open_pixels`).
    unwritten: what `cache.keep_digests` writes once it is clear that there will be a run.
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
    unwritten: object = None

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

    def keep(self, kept, classes, labels):
        """The dataset of the images number `kept` alone, whose labels, int64 [n], count `classes`."""
        if isinstance(self.images, np.ndarray):
            images = self.images[kept]
        elif isinstance(self.images, Names):
            images = Names(self.images[i] for i in kept)
        else:
            images = torch.utils.data.Subset(self.images, kept)
        texts = ([texts[i] for i in kept] if texts else None for texts in (self.parts, self.groups, self.digests))
        return Dataset(self.name, self.root, classes, [self.ids[i] for i in kept], labels, images, *texts,
                       unwritten=self.unwritten)

    def without(self, ids):
        """The dataset without these images. Raises UserError where a class has none left."""
        if not ids:
            return self
        ids = set(ids)
        kept = [i for i, image_id in enumerate(self.ids) if image_id not in ids]
        labels = self.labels[kept]
        if gone := set(range(len(self.classes))) - set(labels.tolist()):
            raise UserError(f"dataset {self.name}: no image of class {self.classes[min(gone)]!r} can be used")
        return self.keep(kept, self.classes, labels)

    @functools.cached_property
    def fingerprint(self):
        """One hash of every id, label and content: two machines with the same one have the same dataset."""
        every = hashlib.blake2b(digest_size=16)
        for image_id, label, digest in zip(self.ids, self.labels.tolist(), self.digests):
            every.update(f"{image_id}\0{self.classes[label]}\0{digest}\n".encode("utf-8", "surrogateescape"))
        return every.hexdigest()


def natural_order(text):
    """Sort key in which A2 comes before A10, as video frames are numbered; total, so equal keys mean equal text."""
    return [(0, int(piece), "") if piece.isdigit() and piece.isascii() else (1, 0, piece)
            for piece in re.split(r"([0-9]+)", text)], text


_real = functools.lru_cache(4096)(os.path.realpath)  # of folders, each of which holds many files


def image_extensions():
    """The file endings, as ".jpg", of every format that Pillow opens."""
    return {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def read_file(path, root):
    """A file's bytes. Raises OSError for what is no file within `root`, wherever links lead: a device may not end."""
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
    """Grey values of more than 8 bits as uint8. Only `I;16` names its range; the others' follows from their largest."""
    values = np.nan_to_num(values.astype(np.float64))
    largest = values.max(initial=0)
    ranges = {"I": [255, 65535], "F": [1, 255, 65535]}.get(mode, [65535])
    top = next((r for r in ranges if largest <= r), largest)
    return np.rint(np.clip(values, 0, None) * (255 / top)).astype(np.uint8)


def reason(error):
    """What Pillow or the system have against a file, without its name."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
