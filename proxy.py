"""Proxy Attention's own decisions: in which step, which images, which pixels, what instead, and when.

`STEPS` has the ways to take a training step; `online` is the method itself. To add a step, a way to select images, a
control, a fill or a schedule, add a function to `STEPS`, `SELECTIONS`, `CONTROLS`, `FILLS` or `SCHEDULES`.

Everything works on complete batches on the device, with fixed shapes and without waiting for the device, so that a step
costs the same whether one image is erased or many. What is left to chance follows from `key`, as (seed, epoch, step),
and each decision has draws of its own: a control that changes one decision leaves the others as they were.

Labels are classes, int64 [B], or under mixup and cutmix shares of classes, float [B, C]. Images are normalised.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import cam
from engine.chance import torch_generator
from engine.costs import timed
from engine.erasing import (Scene, Waiting, all_fresh, beyond, blurred, cross_entropy, of_another_class, other_chosen,
                            pasted, put, seat, shifted_from, statistics_kept, wrong)

# --- in which step: (net: images -> logits, images [B, 3, H, W], labels, Proxy) -> Trained ---------------------------


class Trained(NamedTuple):
    """A step. fresh, valid: as `seat` gives them. second_pass: images that passed for their heat alone."""

    loss: torch.Tensor
    fresh: torch.Tensor
    valid: torch.Tensor | None = None
    second_pass: int = 0


def plain(net, images, labels, proxy):
    """A step in which nothing is erased; copies that the step before erased are still trained on."""
    images, labels, fresh, valid = proxy.seat(images, labels)
    logits = net(images)
    proxy.count(logits, labels, fresh)
    return Trained(cross_entropy(logits, labels, valid), fresh, valid)


def online(net, images, labels, proxy):
    """The method: one forward and one backward pass; what this step erases is trained on in the next."""
    images, labels, fresh, valid = proxy.seat(images, labels)  # erased copies of the step before take their seats
    with proxy.explain:
        logits = net(images)
        proxy.count(logits, labels, fresh)
        rows, chosen = proxy.select(logits, labels, fresh)  # which images
        loss = cross_entropy(logits, labels, valid)

        def erase(heat):
            mask = proxy.mask(heat)  # which pixels
            proxy.waiting = proxy.fill(images, labels, fresh, rows, chosen, heat, mask)  # what instead

        proxy.with_heat(erase, loss, logits, labels, rows, images.shape[-2:], valid)
    return Trained(loss, fresh, valid)


def same_step(net, images, labels, proxy):
    """As `online`, but what is erased is trained on at once, through a second forward pass."""
    with proxy.explain, statistics_kept(proxy.explain.model):
        logits, fresh, passed = net(images), all_fresh(labels), len(labels)
        proxy.count(logits, labels, fresh)
        rows, chosen = proxy.select(logits, labels, fresh)
        copies, _, _ = proxy.erased(images, labels, fresh, logits, rows, chosen)
    del logits  # and with it the first pass, before the second
    images, labels, fresh, valid = proxy.join(images, labels, rows, copies)
    return Trained(cross_entropy(net(images), labels, valid), fresh, valid, passed)


def of_another(net, images, labels, proxy):
    """As `same_step`, but the heat is that of another network, `proxy.heat_net`, which is not trained."""
    with proxy.explain:
        logits, fresh = proxy.heat_net(images), all_fresh(labels)
        rows, chosen = proxy.select(logits, labels, fresh)
        copies, _, _ = proxy.erased(images, labels, fresh, logits, rows, chosen)
    del logits
    return trained_on(net, images, labels, rows, copies, proxy, len(labels))


def of_snapshot(net, images, labels, proxy):
    """Every image with the snapshot's heat, `proxy.heat_of_batch`, which was taken before: no other pass."""
    every, rows = all_fresh(labels), torch.arange(len(labels), device=labels.device)
    copies = proxy.fill(images, labels, every, rows, every, proxy.heat_of_batch, proxy.mask(proxy.heat_of_batch))
    return trained_on(net, images, labels, rows, copies, proxy)


def trained_on(net, images, labels, rows, copies, proxy, passed=0):
    """A step on a batch with the copies of its images `rows`; the network sees the images only as it trains on them."""
    images, labels, fresh, valid = proxy.join(images, labels, rows, copies)
    logits = net(images)
    proxy.count(logits, labels, all_fresh(labels) if valid is None else valid)
    return Trained(cross_entropy(logits, labels, valid), fresh, valid, passed)


STEPS = {"online": online, "same_step": same_step}


class Proxy:
    """What a step works with: a run's settings, the heat, and the erased copies that wait for the next step.

    config: the settings step, schedule, select, control, explain, area, fill, budget. explain: the `cam.CAM` to enter
    around the forward pass, or None. normalisation: (mean, std), each [1, 3, 1, 1]. seats: at most so many images are
    erased in a step; all by default. heat_net: images -> logits of another network, where the heat is of that one.
    counts: the epoch's `costs.Counts`, or None. grids: [N, h, w], heat of all training images, where it is the
    snapshot's. Set `key` before each step, from which all draws follow, and beside grids `heat_of_batch`, [B, H, W].
    """

    def __init__(self, config, explain, normalisation, seats=None, heat_net=None, counts=None, grids=None):
        self.config, self.explain, self.seats, self.heat_net, self.grids = config, explain, seats, heat_net, grids
        mean, std = normalisation
        self.black, self.white = -mean / std, (1 - mean) / std
        self.key, self.waiting, self.counts, self.heat_of_batch = (), None, counts, None

    def step(self, epoch, accuracies):
        """The function of an epoch's steps. accuracies: on validation, of each epoch before."""
        name, argument = read_schedule(self.config["schedule"])
        if self.grids is not None:
            return of_snapshot
        if self.explain is None or not SCHEDULES[name](epoch, argument, accuracies):
            return plain
        return STEPS[self.config["step"]] if self.heat_net is None else of_another

    def count(self, logits, labels, fresh):
        """Note how many of the fresh images are misled."""
        if self.counts:
            self.counts.misled(wrong(logits.detach(), labels), fresh)

    def seat(self, images, labels):
        """The batch with the waiting copies in it: images, labels, fresh and valid, as `erasing.seat`."""
        waiting, self.waiting = self.waiting, None
        if waiting is None:
            return images, labels, all_fresh(labels), None
        return seat(images, labels, waiting, self.config["budget"])

    def join(self, images, labels, rows, copies):
        """The batch with the copies of its images `rows`: in their place (budget equal), or behind it (extra)."""
        return seat(images, labels, copies, self.config["budget"], rows)

    @timed
    def select(self, logits, labels, fresh):
        """Which images: rows, int64 [N], and chosen, bool [N], as `select`."""
        seats = len(labels) if self.seats is None else self.seats
        return select(self.config["select"], logits, labels, fresh, seats, self.key, self.config["control"])

    @timed
    def heat(self, logits, labels, rows, size):
        """Heat of these rows at the images' size: [N, H, W] in [0, 1]."""
        explained, against = cam.EXPLAIN[self.config["explain"]](logits[rows], labels[rows])
        return cam.upsample(self.explain(logits, rows, explained, against), size)

    def with_heat(self, erase, loss, logits, labels, rows, size, valid=None):
        """Call erase(heat), as `heat` gives it: at once, or with --explain loss in the loss's own backward pass."""
        if self.config["explain"] != "loss" or self.explain.method in cam.NO_GRADIENT:
            return erase(self.heat(logits, labels, rows, size))
        images = len(labels) if valid is None else valid.sum()
        self.explain.in_backward(loss, images, rows, lambda heat: erase(self.brought(heat, size)))

    @timed
    def brought(self, heat, size):
        """Heat at the images' size, of a function that gives it on its own grid."""
        return cam.upsample(heat(), size)

    @timed
    def mask(self, heat):
        """Which pixels: bool [N, H, W]."""
        return pixel_mask(heat, self.config["area"], self.config["control"], self.key)

    @timed
    def fill(self, images, labels, fresh, rows, chosen, heat, mask):
        """What instead: the erased copies of these rows, as `Waiting`; where the heat is zero, none is taken."""
        chosen = chosen & mask.flatten(1).any(1)
        scene = Scene(heat, chosen, rows, images, cam.true_class(labels), fresh, self.black, self.white,
                      torch_generator(images.device, "fill", *self.key))
        return Waiting(FILLS[self.config["fill"]](images[rows], mask, scene), labels[rows], chosen)

    def erased(self, images, labels, fresh, logits, rows, chosen):
        """Heat, mask and fill, inside the block of `explain`: (Waiting, heat [N, H, W], mask bool [N, H, W])."""
        heat = self.heat(logits, labels, rows, images.shape[-2:])
        mask = self.mask(heat)
        return self.fill(images, labels, fresh, rows, chosen, heat, mask), heat, mask


# --- which images: (logits float32 [B, C], labels, draw [B] in [0, 1)) -> wanted bool [B], rank [B], highest first ----


def misled(logits, labels, draw):
    """Images that the network gets wrong, in random order."""
    return wrong(logits, labels), draw


def unsure(logits, labels, draw):
    """All images, the one with the lowest confidence in its predicted class first."""
    confidence = logits.softmax(1).amax(1)
    return torch.ones_like(confidence, dtype=torch.bool), 1 - confidence


def loss(logits, labels, draw):
    """All images, the one with the highest cross-entropy first."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    return torch.ones_like(losses, dtype=torch.bool), losses


def everything(logits, labels, draw):
    """All images, in random order."""
    return torch.ones_like(draw, dtype=torch.bool), draw


SELECTIONS = {"misled": misled, "unsure": unsure, "loss": loss, "all": everything}


def select(selection, logits, labels, fresh, seats, key, control=None):
    """The fresh images that `selection` wants, at most `seats`.

    selection: a key of SELECTIONS. fresh: bool [B], False for images that are erased copies. key: what the draws
    follow from. control "label": as many of the fresh images, but drawn at random. Returns rows, int64 [seats], and
    chosen, bool [seats]: which of these rows are really selected. The shape is fixed so that nothing has to wait until
    the device has counted.
    """
    draws = torch.rand(3, len(logits), generator=torch_generator(logits.device, "select", *key), device=logits.device)
    wanted, rank = SELECTIONS[selection](logits.detach().float(), labels, draws[0])
    wanted = wanted & fresh
    if control == "label":
        count, wanted, rank = wanted.sum(), fresh, draws[2]  # draws[1] had a use once: published runs keep their draws
    score, rows = torch.where(wanted, rank, -torch.inf).topk(seats)
    chosen = score > -torch.inf
    return rows, chosen & (torch.arange(seats, device=rows.device) < count) if control == "label" else chosen


# --- which pixels --------------------------------------------------------------------------------------------------


def hottest(heat, area):
    """Mask of the hottest share `area` of each image's pixels, to within one pixel. heat: [N, H, W] -> bool [N, H, W].

    The threshold of the method's proposal, chosen for each image so that as much is erased of every one.
    """
    flat = heat.flatten(1)
    pixels = flat.topk(round(area * flat.shape[1]), sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, pixels, True).view_as(heat)


def pixel_mask(heat, area, control=None, key=()):
    """`hottest`, or the mask that `control`, a key of CONTROLS, puts in its place.

    heat: [N, H, W] in [0, 1]. area: a share, or "2sd" for `beyond`, as in MaskTune (Asgari Taghanaki et al. 2022).
    Returns bool [N, H, W], empty where the heat is zero everywhere.
    """
    mask = beyond(heat) if area == "2sd" else hottest(heat, area)
    if len(heat):
        mask = mask & (heat.flatten(1).amax(1) > 0)[:, None, None]
    return mask if control is None else CONTROLS[control](mask, heat, torch_generator(heat.device, "control", *key))


# Controls: (mask bool [N, H, W], heat [N, H, W], generator) -> the mask to erase instead, of the same area per image.


def moved(mask, heat, generator):
    """Each image's shape at a random place: shifted as a whole, and staying whole.

    Along a side where the shape leaves less than a quarter free, it is shifted around the edge instead.
    """
    chance = torch.rand(2, len(mask), generator=generator, device=mask.device)
    down, across = shifted_from(mask.any(2), chance[0]), shifted_from(mask.any(1), chance[1])
    images = torch.arange(len(mask), device=mask.device)[:, None, None]
    return mask[images, down[:, :, None], across[:, None, :]]


def coolest(mask, heat, generator):
    """The least active pixels, as many as the mask has and none of its own.

    Large parts of a heat are zero: among equals a smooth random field decides, so that they too form blobs.
    """
    field = F.interpolate(torch.rand(len(heat), 1, 4, 4, generator=generator, device=heat.device, dtype=heat.dtype),
                          size=heat.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    cool = (heat + 1e-6 * field).masked_fill(mask, torch.inf).flatten(1)
    rank = torch.arange(cool.shape[1], device=cool.device).expand_as(cool)
    rank = torch.zeros_like(rank).scatter_(1, cool.argsort(1), rank)
    return (rank < mask.flatten(1).sum(1, keepdim=True)).view_as(mask)


CONTROLS = {"random": moved, "coolest": coolest, "label": lambda mask, *_: mask}  # there it is `select` that differs


# --- what instead: (images [N, 3, H, W], mask bool [N, H, W], scene) -> new images ----------------------------


def black(images, mask, scene):
    """Black pixels, as the method was proposed."""
    return put(images, mask, scene.black)


def mean(images, mask, scene):
    """The image's own mean colour."""
    return put(images, mask, images.mean((2, 3), keepdim=True))


def noise(images, mask, scene):
    """Independent normal values with the mean and spread of normalised images, cut off at black and white."""
    normal = torch.randn(images.shape, generator=scene.generator, device=images.device)
    return put(images, mask, normal.clamp_(scene.black, scene.white))


BLUR = 1 / 16  # of the side, as a standard deviation: shapes go, colours stay


def blur(images, mask, scene):
    """The image itself, blurred."""
    return put(images, mask, blurred(images, BLUR * images.shape[-1]))


def blend(images, mask, scene):
    """Pixel values times 1 - heat, as the published implementation's "blended" with weight 1."""
    return put(images, mask, images - scene.heat[:, None] * (images - scene.black))


def other(images, mask, scene):
    """The same place of another image of the batch, of another class; black where the batch has none.

    The idea of visual context augmentation (Dvornik et al. 2018), with whatever the other image holds there.
    """
    donors, given = of_another_class(scene.own, scene.classes, scene.fresh, scene.generator)
    return put(images, mask, torch.where(given[:, None, None, None], scene.batch[donors], scene.black))


def transplant(images, mask, scene):
    """Noise in the image's own hot pixels, and another chosen image's hot pixels pasted in at their own place.

    So the image shows evidence against what the network relies on, its label unchanged; one chosen alone, only noise.
    """
    return pasted(noise(images, mask, scene), images, mask, *other_chosen(scene))


def swap(images, mask, scene):
    """Pixels of a chosen image of another class, both where the image itself is hot and where the other is.

    As `transplant`, but all that is pasted speaks against the label, where with two classes half of what `transplant`
    pastes repeats a shortcut; and no noise marks these images. Noise where no image of another class was chosen.
    """
    if not len(images):
        return images
    donors, given = of_another_class(scene.own, scene.own, scene.chosen, scene.generator)
    pasted = put(images, mask | mask[donors], images[donors])
    return torch.where(given[:, None, None, None], pasted, noise(images, mask, scene))


FILLS = {"black": black, "mean": mean, "noise": noise, "blur": blur, "blend": blend, "other": other,
         "transplant": transplant, "swap": swap}


# --- when: (epoch counted from 0, argument, validation accuracies of the epochs before) -> bool ----------------------


def every(epoch, argument, accuracies):
    """Every K-th epoch."""
    return (epoch + 1) % argument == 0


def after(epoch, argument, accuracies):
    """All epochs after the first E."""
    return epoch >= argument


def plateau(epoch, argument, accuracies):
    """From when the best validation accuracy has not risen for K epochs, to the end."""
    return any(max(accuracies[:end]) >= max(accuracies[end:end + argument])
               for end in range(1, min(epoch, len(accuracies)) - argument + 1))


def listed(epoch, argument, accuracies):
    """The published notation, as "20,p,19": that many epochs without, and each p an epoch with Proxy Attention."""
    return argument[epoch]


SCHEDULES = {"every": every, "after": after, "plateau": plateau, "listed": listed}
PATIENCE = 3  # epochs without a rise that make a plateau, where no number is given


def read_schedule(text):
    """(key of SCHEDULES, its argument) of "every:K", "after:E", "plateau", "plateau:K" or "20,p,19"; None is after:0.

    The argument of "listed" has a bool per epoch. Raises ValueError, saying what is expected.
    """
    if text is None:
        return "after", 0
    name, colon, argument = text.strip().partition(":")
    if name in SCHEDULES and name != "listed":
        if not colon and name == "plateau":
            return name, PATIENCE
        if not argument.isdecimal() or int(argument) < (name != "after"):
            raise ValueError(f"{text!r}: expected a whole number behind {name}:, as {name}:3")
        return name, int(argument)
    epochs = []
    for piece in text.lower().split(","):
        if piece.strip() != "p" and not (piece.strip().isdecimal() and int(piece) <= 100_000):
            raise ValueError(f"{text!r}: expected every:K, after:E, plateau, or epochs and p, as 20,p,19")
        epochs += [True] if piece.strip() == "p" else [False] * int(piece)
    return "listed", epochs
