"""What fills, controls and steps of `proxy.py` are made of: complete batches on the device, in fixed shapes."""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Scene(NamedTuple):
    """What a fill may look at, besides the N images that it fills and their mask. Images are normalised."""

    heat: torch.Tensor  # [N, H, W] in [0, 1]
    chosen: torch.Tensor  # bool [N]: the others are there for the shape's sake
    rows: torch.Tensor  # int64 [N]: where the images stand in the batch
    batch: torch.Tensor  # [B, 3, H, W]
    classes: torch.Tensor  # int64 [B]
    fresh: torch.Tensor  # bool [B]: False for erased copies
    black: torch.Tensor  # [1, 3, 1, 1]: what black and white are after normalisation
    white: torch.Tensor
    generator: torch.Generator  # on the images' device

    @property
    def own(self):
        """The classes of the N images, int64 [N]."""
        return self.classes[self.rows]


class Waiting(NamedTuple):
    """Erased images on their way into a step."""

    images: torch.Tensor  # [K, 3, H, W]
    labels: torch.Tensor  # [K], or [K, C]
    taken: torch.Tensor  # bool [K]: the others are there for the shape's sake


def put(images, mask, pixels):
    """`pixels`, anything that broadcasts to images, where the mask is."""
    return torch.where(mask[:, None], pixels.to(images.dtype), images)


def pasted(filled, images, mask, donors, given):
    """What is filled, with the masked pixels of `images[donors]` on top, at their own place, where one is given."""
    return put(filled, mask[donors] & given[:, None, None], images[donors])


def of_another_class(own, classes, may_give, generator):
    """For each of the N images one of M at random, of another class: int64 [N], and whether there is one, bool [N].

    own: the classes of the N, int64 [N]. classes: of the M, int64 [M]. may_give: bool [M].
    """
    foreign = (own[:, None] != classes) & may_give
    draw = torch.rand(foreign.shape, generator=generator, device=foreign.device)
    score, donors = torch.where(foreign, draw, -1.0).max(1)
    return donors, score >= 0


def other_chosen(scene):
    """For each of the N images another chosen one, a random step on: int64 [N], and whether there is one, bool [N]."""
    count, order = scene.chosen.sum().clamp(min=1), scene.chosen.logical_not().to(torch.uint8).argsort(stable=True)
    step = 1 + (torch.rand((), generator=scene.generator, device=order.device) * (count - 1)).long()
    donors = order[((scene.chosen.cumsum(0) - 1 + step) % count).clamp(min=0)]
    return donors, donors != torch.arange(len(donors), device=donors.device)


def beyond(heat):
    """Mask of what is hotter than the mean and two standard deviations. heat: [N, H, W] -> bool [N, H, W]."""
    spread, mean = torch.std_mean(heat, (1, 2), keepdim=True)
    return heat > mean + 2 * spread


def blurred(images, sigma):
    """Gaussian blur by `sigma` pixels of float [..., H, W]; at the edges over what there is."""
    kernels = []
    for side in images.shape[-2:]:
        place = torch.arange(side, device=images.device, dtype=images.dtype)
        kernel = torch.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2)
        kernels.append(kernel / kernel.sum(1, keepdim=True))
    return kernels[0] @ images @ kernels[1].T


def shifted_from(occupied, chance):
    """Where each place along a side comes from, int64 [N, S]. occupied: bool [N, S]. chance: [N] in [0, 1)."""
    size = occupied.shape[1]
    place = torch.arange(size, device=occupied.device)
    first = torch.where(occupied, place, size).amin(1)
    last = torch.where(occupied, place, -1).amax(1)
    free = size - 1 - (last - first)
    by = torch.where(free >= size / 4, (chance * (free + 1)).long() - first, (chance * size).long())
    return (place - by[:, None]) % size


# --- in whose seats ---------------------------------------------------------------------------------------------------


def wrong(logits, labels):
    """Whether the predicted class has no part in the label, bool [B]: under mixup, whether it is neither of the two."""
    predicted = logits.argmax(1)
    return predicted != labels if labels.dim() == 1 else labels.gather(1, predicted[:, None])[:, 0] == 0


def all_fresh(labels):
    return torch.ones(len(labels), dtype=torch.bool, device=labels.device)


def seat(images, labels, waiting, budget, rows=None):
    """The batch with the waiting images in it: images, labels, fresh and valid.

    budget "equal": each takes the seat of a fresh image, in `rows` or from the end, so that the step keeps its size;
    `images` is written to, since fresh memory would cost more than all else here.
    budget "extra": they ride behind the batch, in as many seats as there may be copies, so that its size is one and
    nothing waits until the device has counted; a seat that no copy takes holds a fresh image once more, which weighs
    nothing in the loss, and of which batch norm sees no other kind than it does anyway.
    fresh: bool [B], False for erased copies and such seats. valid: bool [B], False for such seats, or None for all.
    """
    taken, fresh = waiting.taken, all_fresh(labels)
    if rows is None:
        rows = torch.arange(len(labels) - len(taken), len(labels), device=labels.device)
    filled = torch.where(taken[:, None, None, None], waiting.images, images[rows])
    new = torch.where(taken if labels.dim() == 1 else taken[:, None], waiting.labels, labels[rows])
    if budget == "extra":
        joined = ((images, filled), (labels, new), (fresh, torch.zeros_like(taken)), (fresh, taken))
        return tuple(map(torch.cat, joined))
    return images.index_copy_(0, rows, filled), labels.index_copy(0, rows, new), fresh.index_copy(0, rows, ~taken), None


def cross_entropy(logits, labels, valid=None):
    """Mean cross-entropy over the valid images, bool [B]; by default over all."""
    if valid is None:
        return F.cross_entropy(logits.float(), labels)
    return torch.where(valid, F.cross_entropy(logits.float(), labels, reduction="none"), 0).sum() / valid.sum()


@contextlib.contextmanager
def statistics_kept(model):
    """Within it a model in training normalises by its batch as always, and its running statistics stay as they are."""
    tracking = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
