"""Proxy Attention's own decisions: which images, which pixels, what instead, when, and in whose seats.

    rows, chosen = select("misled", logits, labels, fresh, seats=8, draw=draw)   # which images
    mask = hottest(heat, area=0.1)                                               # which pixels
    erased = erase(images[rows], mask, "black", black)                           # what instead
    images, labels, fresh = seat(images, labels, waiting, "equal")               # in the next step

Everything works on whole batches on the device, with fixed shapes and without waiting for the device, so that a training
step costs the same whether one image is erased or many. To add a way of selecting or filling, add a function to
`SELECTIONS` or `FILLS`.
"""

from typing import NamedTuple

import torch

# --- which images --------------------------------------------------------------------------------------------------


def misled(logits, labels):
    """Images whose predicted class differs from their label."""
    return logits.argmax(1) != labels


SELECTIONS = {"misled": misled}  # (logits [B, classes], labels [B]) -> bool [B]


def select(selection, logits, labels, fresh, seats, draw):
    """Pick at most `seats` of the fresh images that `selection` names, at random where there are more.

    fresh: bool [B], False for images that are erased copies. draw: float [B] in [0, 1), decides among too many.
    Returns rows, int64 [seats], and chosen, bool [seats]: which of these rows are really selected. The shape is fixed so that
    nothing has to wait until the device has counted.
    """
    wanted = SELECTIONS[selection](logits, labels) & fresh
    score, rows = torch.where(wanted, 1 + draw, 0.0).topk(seats)
    return rows, score > 0


# --- which pixels --------------------------------------------------------------------------------------------------


def hottest(heat, area):
    """Mask of the hottest share `area` of each image's pixels, to within one pixel. heat: [N, H, W] -> bool [N, H, W]."""
    flat = heat.flatten(1)
    pixels = flat.topk(round(area * flat.shape[1]), sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, pixels, True).view_as(heat)


def above(heat, threshold):
    """Mask of the pixels at least `threshold` hot. heat: [N, H, W] in [0, 1] -> bool [N, H, W]."""
    return heat >= threshold


def pixel_mask(heat, area=None, threshold=None):
    """`hottest` or `above`, whichever is given; empty where the heat is zero everywhere and so says nothing."""
    mask = hottest(heat, area) if threshold is None else above(heat, threshold)
    return mask & (heat.flatten(1).amax(1) > 0)[:, None, None] if len(heat) else mask


# --- what instead --------------------------------------------------------------------------------------------------


def black(images, mask, black_level):
    """Black pixels, as the method was proposed."""
    return torch.where(mask[:, None], black_level.to(images.dtype), images)


FILLS = {"black": black}  # (images [N, 3, H, W], mask bool [N, H, W], black [1, 3, 1, 1]) -> images


def erase(images, mask, fill, black_level):
    """New images with the masked pixels filled; `images` itself is left as it is.

    images: [N, 3, H, W], normalised. mask: bool [N, H, W]. fill: a key of FILLS. black_level: what black is after normalisation,
    -mean / std, [1, 3, 1, 1].
    """
    return FILLS[fill](images, mask, black_level)


# --- when, and in whose seats --------------------------------------------------------------------------------------


def is_on(epoch, warmup):
    """Whether images are erased in this epoch (counted from 0): not in the first `warmup`."""
    return epoch >= warmup


class Waiting(NamedTuple):
    """Erased images on their way into the next step: images [K, 3, H, W], labels [K], and taken, bool [K]: which are real."""

    images: torch.Tensor
    labels: torch.Tensor
    taken: torch.Tensor


def seat(images, labels, waiting, budget):
    """The batch with the waiting images in it.

    budget "equal": each takes the seat of one fresh image, so that the step is the size it would have been without.
    budget "extra": they ride behind the batch, which grows by their number (and waits for the device to count them).
    Returns images, labels, and fresh: bool, False for the erased ones.
    """
    seats = len(waiting.taken)
    if budget == "extra":
        taken = waiting.taken
        fresh = torch.ones(len(labels) + int(taken.sum()), dtype=torch.bool, device=labels.device)
        fresh[len(labels):] = False
        return torch.cat([images, waiting.images[taken]]), torch.cat([labels, waiting.labels[taken]]), fresh
    fresh = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    fresh[-seats:] = ~waiting.taken
    images, labels = images.clone(), labels.clone()
    images[-seats:] = torch.where(waiting.taken[:, None, None, None], waiting.images, images[-seats:])
    labels[-seats:] = torch.where(waiting.taken, waiting.labels, labels[-seats:])
    return images, labels, fresh
