"""A planted shortcut, and where in an image heat should lie.

`--decoy` plants a coloured square whose colour gives the class away in training and validation, in all of the images or
in a share of them, and lies in the test.
`masks_of` gives the square, or of some datasets the object.
"""

import colorsys
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.chance import numpy_generator
from engine.dataset import read_file, reason, upright
from engine.files import UserError

SWATCH = 8  # a decoy's side is an eighth of the image's


@dataclass
class Decoy:
    """A coloured square in a corner of each image. corners: int64 [N], -1 for none; colours: uint8 [N, 3]."""

    corners: np.ndarray
    colours: np.ndarray

    def mask(self, indices, size):
        """Where the squares of images number `indices` are: bool [n, size, size]."""
        return swatch(torch.as_tensor(self.corners[indices]), size)


def swatch(corners, size):
    """bool [n, size, size]: squares in `corners`, int64 [n], 0 to 3 clockwise from the upper left; none for -1."""
    near = torch.arange(size, device=corners.device) < max(1, size // SWATCH)
    down, right = ((corners == 2) | (corners == 3))[:, None], ((corners == 1) | (corners == 2))[:, None]
    rows, columns = torch.where(down, near.flip(0), near), torch.where(right, near.flip(0), near)
    return rows[:, :, None] & columns[:, None, :] & (corners >= 0)[:, None, None]


def draw_decoy(dataset, split, share, seed):
    """A `Decoy` of all images: in training and validation the colour of the class, in the test that of another.

    After decoy MNIST (Ross, Hughes and Doshi-Velez 2017, "Right for the right reasons", section 4.2), in colour.
    Corners, and the other classes, are drawn at random. share: of the images of training and validation that show their
    class; the others show another, as in the test.
    """
    draw, count = numpy_generator("decoy", seed), len(dataset.classes)
    hues = [colorsys.hsv_to_rgb(c / count, 1, 1) for c in range(count)]
    corners = draw.integers(4, size=len(dataset))
    others = (dataset.labels + draw.integers(1, count, size=len(dataset))) % count
    test = set(split["test"])
    lies = np.array([image_id in test for image_id in dataset.ids]) | (draw.random(len(dataset)) >= share)
    shown = np.where(lies, others, dataset.labels)
    return Decoy(corners, np.rint(255 * np.array(hues)).astype(np.uint8)[shown])


# --- where the object is: (dataset, indices int64 [n], pixels uint8 [n, 3, H, W]) -> bool [n, H, W], or None ----------


def ink(dataset, indices, pixels):
    """Of drawings: what is brighter than the middle between an image's darkest and its brightest pixel."""
    return _upper_half(pixels.float().mean(1))


def skin(dataset, indices, pixels):
    """Of hands before a plain wall: red minus blue above the middle between its least and its most in the image."""
    return _upper_half(pixels[:, 0].float() - pixels[:, 2].float())


def _upper_half(values):
    """Which of values [n, H, W] lie above the middle between the least and the most of their image."""
    return values > (values.amin((1, 2), keepdim=True) + values.amax((1, 2), keepdim=True)) / 2


def trimap(dataset, indices, pixels):
    """Of `pets`: animal and outline, from the trimaps beside the photographs (1 animal, 2 background, 3 outline)."""
    masks, size = [], pixels.shape[-1]
    for index in indices:
        photograph = Path(dataset.images[index])
        path = photograph.parent.parent / "annotations" / "trimaps" / f"{photograph.stem}.png"
        if not path.is_file():
            return None
        masks.append(np.asarray(Image.open(path).resize((size, size), Image.Resampling.NEAREST)) != 2)
    return torch.from_numpy(np.stack(masks)).to(pixels.device)


def beside(dataset, indices, pixels):
    """Of class folders with masks beside their images: what is brighter than half of the mask's brightest, at least 1.

    An image's masks are joined. UserError names one that cannot be read.
    """
    masks, size = torch.zeros(len(indices), *pixels.shape[2:], dtype=torch.bool), pixels.shape[-1]
    for mask, index in zip(masks, indices):
        for name in dataset.masks[dataset.ids[index]]:
            try:
                grey = upright(Image.open(io.BytesIO(read_file(dataset.root / name)))).convert("L")
            except Exception as error:  # Pillow's plugins raise anything
                raise UserError(f"{dataset.root / name}: cannot be read as a mask ({reason(error)})") from None
            grey = np.asarray(grey.resize((size, size), Image.Resampling.NEAREST))
            mask |= torch.from_numpy(grey > max(1, grey.max()) / 2)
    return masks.to(pixels.device)


MASKS = {"digits": ink, "noisy_digits": ink, "sign-digits": skin, "pets": trimap}


def masks_of(dataset, indices, pixels):
    """Where heat should lie, or under --decoy should not: (name, bool [n, H, W]), or (None, None) if not known.

    indices: int64 [n] of the images. pixels: uint8 [n, 3, H, W], the same images.
    """
    if dataset.decoy is not None:
        return "swatch", dataset.decoy.mask(indices, pixels.shape[-1]).to(pixels.device)
    find = beside if dataset.masks else MASKS.get(dataset.name)
    mask = find and find(dataset, indices, pixels)
    return (None, None) if mask is None else ("object", mask)
