"""What a dataset is: ids, labels and images, and how a file becomes pixels.

Nothing here ever writes to a dataset's folder.
"""

import functools
import hashlib
import os
import re
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from engine.files import UserError

LARGEST_FILE = 2**30  # bytes; what is larger is no photograph
ALL_LEVELS = 65535  # the largest value of 16 bits
LEVELS = 255, 1023, 4095, 16383, ALL_LEVELS  # and of 8, 10, 12 and 14, which cameras and scanners put in 16-bit files
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}  # by EXIF orientation

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
    levels: the value that becomes white in images of 16 bits, one of LEVELS, the same for all of them.
    notes: lines on what lies in the folder and is not used. lost: {class: what its folder holds instead of images}.
    masks: {id: mask files, relative to root}, where each image has some that show its object; or None.
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
    levels: int = ALL_LEVELS
    notes: list = field(default_factory=list)
    lost: dict = field(default_factory=dict)
    masks: dict | None = None

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
                       unwritten=self.unwritten, levels=self.levels, notes=self.notes, masks=self.masks)

    def without(self, ids):
        """The dataset without these images. Raises UserError where a class has none left."""
        if not ids:
            return self
        ids = set(ids)
        kept = [i for i, image_id in enumerate(self.ids) if image_id not in ids]
        labels = self.labels[kept]
        if gone := set(range(len(self.classes))) - set(labels.tolist()):
            raise UserError(f"dataset {self.name}: no image of class {self.classes[min(gone)]!r} can be used; mend "
                            "some, or name the other classes with --classes")
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


def image_extensions():
    """The file endings, as ".jpg", of every format that Pillow opens."""
    return {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def read_file(path):
    """A file's bytes, wherever links lead. Raises OSError for what is no file: a device may not end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a file")
    if status.st_size > LARGEST_FILE:
        raise OSError(f"larger than {LARGEST_FILE >> 20} MB")
    with open(path, "rb") as file:
        return file.read()


def upright(image):
    """A PIL image turned as its EXIF data says. Pillow's own function also writes these anew, and fails at odd ones."""
    image.load()  # TIFF files are turned here
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def to_rgb(image, size, levels=ALL_LEVELS):
    """Any PIL image as RGB uint8 array [size, size, 3], upright and squeezed to a square.

    Squeezed rather than cropped, so that no part of the image escapes the heat. Transparent pixels become mid-grey,
    which normalisation maps near zero: neither a black nor a white drawing vanishes in it. levels: what becomes white
    in files of 16 bits, one of LEVELS. May raise anything at all for a broken image: Pillow's plugins do.
    """
    if image.format == "JPEG":
        image.draft(None, (size, size))  # the decoder drops to the nearest power of two that is still large enough
    deep = is_deep(image)
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image), image.mode, levels))
    elif deep and levels < ALL_LEVELS:  # in colour Pillow keeps the upper 8 bits alone
        lighter = [min(255, value * (ALL_LEVELS + 1) // (levels + 1)) for value in range(256)]
        image = image.point(lighter * len(image.getbands()))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (128, 128, 128, 255)), image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def is_deep(image):
    """Whether a PIL image, not loaded yet, has 16 bits or more for a value in its file."""
    return image.mode.startswith("I") or ";16B" in (tile := str(getattr(image, "tile", ())[:1])) or ";16L" in tile


def largest_value(image):
    """The largest value of a loaded PIL image that `is_deep`; 0 where it is none of 16 bits.

    All images of a dataset are scaled by the smallest of LEVELS that holds all of theirs. Scaled by its own, a dark
    photograph would be as bright as the others.
    """
    if image.mode.startswith("I"):
        largest = int(np.asarray(image).max(initial=0))
        return largest if largest <= ALL_LEVELS else 0
    return int(np.asarray(image.convert("RGB")).max(initial=0)) * 256 + 255  # of colours Pillow keeps the upper 8 bits


def _to_8_bit(values, mode, levels):
    """Grey values of more than 8 bits as uint8: whole ones up to 16 bits by `levels`, others by their own largest."""
    values = np.nan_to_num(values.astype(np.float64))
    largest = values.max(initial=0)
    if mode == "F":
        levels = next((top for top in (1, 255, ALL_LEVELS) if largest <= top), largest)
    elif largest > ALL_LEVELS:
        levels = largest
    elif mode == "I" and levels == ALL_LEVELS and largest <= 255:
        levels = 255
    return np.rint(np.clip(values * (255 / levels), 0, 255)).astype(np.uint8)


def reason(error):
    """What Pillow or the system have against a file, without its name."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    text = getattr(error, "strerror", None) or str(error).split("\n")[0]
    if isinstance(error, (OSError, ValueError, SyntaxError, Image.DecompressionBombError)):  # what Pillow documents
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
