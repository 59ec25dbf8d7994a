"""Proxy Attention's own decisions: which images, which pixels, what instead, when, and in whose seats.

    rows, chosen = select("misled", logits, labels, fresh, seats=8, key=key)    # which images
    mask = pixel_mask(heat, area=0.1)                                           # which pixels
    erased = erase(images[rows], mask, "black", scene)                          # what instead
    images, labels, fresh = seat(images, labels, waiting, "equal")              # in the next step
    is_on("every:3", epoch, accuracies)                                         # when

Everything works on whole batches on the device, with fixed shapes and without waiting for the device, so that a training
step costs the same whether one image is erased or many. What is left to chance follows from `key`, as (seed, epoch, step),
and each decision has draws of its own: a control that changes one decision leaves the others as they were.

To add a way of selecting, controlling, filling or scheduling, add a function to `SELECTIONS`, `CONTROLS`, `FILLS` or `SCHEDULES`.

Labels are classes, int64 [B], or under mixup and cutmix shares of classes, float [B, C].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import cam
import data

# --- which images: (logits float32 [B, C], labels, draw [B] in [0, 1)) -> wanted bool [B], rank [B], the highest first ----


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
RANKED = {"unsure", "loss"}  # their order is not left to chance


def wrong(logits, labels):
    """Whether the predicted class has no part in the label, bool [B]: it is another class, or under mixup neither of the two."""
    predicted = logits.argmax(1)
    return predicted != labels if labels.dim() == 1 else labels.gather(1, predicted[:, None])[:, 0] == 0


def true_class(labels):
    """The label's class, int64 [B]; of a mixed label the one with the larger share."""
    return labels if labels.dim() == 1 else labels.argmax(1)


def select(selection, logits, labels, fresh, seats, key, subset=1.0, control=None):
    """The first `subset` of the fresh images that `selection` wants, at most `seats`.

    selection: a key of SELECTIONS. fresh: bool [B], False for images that are erased copies. key: what the draws follow from.
    subset: share in (0, 1]; what it leaves of an image is rounded at random, so that the mean is exact. control "label": just as many
    of the fresh images, but drawn at random.
    Returns rows, int64 [seats], and chosen, bool [seats]: which of these rows are really selected. The shape is fixed so that
    nothing has to wait until the device has counted.
    """
    draws = torch.rand(3, len(logits), generator=data.chance(logits.device, "select", *key), device=logits.device)
    wanted, rank = SELECTIONS[selection](logits.detach().float(), labels, draws[0])
    wanted = wanted & fresh
    count = wanted.sum()
    if subset < 1:
        count = (subset * count + draws[1, 0]).floor()
    if control == "label":
        wanted, rank = fresh, draws[2]
    score, rows = torch.where(wanted, rank, -torch.inf).topk(seats)
    return rows, (torch.arange(seats, device=rows.device) < count) & (score > -torch.inf)


# --- which pixels --------------------------------------------------------------------------------------------------


def hottest(heat, area):
    """Mask of the hottest share `area` of each image's pixels, to within one pixel. heat: [N, H, W] -> bool [N, H, W]."""
    flat = heat.flatten(1)
    pixels = flat.topk(round(area * flat.shape[1]), sorted=False).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, pixels, True).view_as(heat)


def above(heat, threshold):
    """Mask of the pixels at least `threshold` hot. heat: [N, H, W] in [0, 1] -> bool [N, H, W]."""
    return heat >= threshold


def grown(area, grow, epoch):
    """The area in an epoch, counted from 0 at the first that erases: in equal steps up to its whole over `grow` epochs."""
    return area * (epoch + 1) / grow if 0 <= epoch < grow else area


def pixel_mask(heat, area=None, threshold=None, control=None, key=()):
    """`hottest` or `above`, whichever is given, or the mask that `control`, a key of CONTROLS, puts in its place.

    heat: [N, H, W] in [0, 1]. Returns bool [N, H, W], empty where the heat is zero everywhere and so says nothing.
    """
    mask = hottest(heat, area) if threshold is None else above(heat, threshold)
    if len(heat):
        mask = mask & (heat.flatten(1).amax(1) > 0)[:, None, None]
    return mask if control is None else CONTROLS[control](mask, heat, data.chance(heat.device, "control", *key))


# Controls: (mask bool [N, H, W], heat [N, H, W], generator) -> the mask that is erased instead, of the same area per image.


def moved(mask, heat, generator):
    """Each image's shape at a random place: shifted as a whole, and staying whole.

    Along a side where the shape leaves less than a quarter free, so that it could hardly move, it is shifted around the edge instead.
    """
    chance = torch.rand(2, len(mask), generator=generator, device=mask.device)
    down, across = _shift(mask.any(2), chance[0]), _shift(mask.any(1), chance[1])
    images = torch.arange(len(mask), device=mask.device)[:, None, None]
    return mask[images, down[:, :, None], across[:, None, :]]


def _shift(occupied, chance):
    """Where each place along a side comes from, int64 [N, S]. occupied: bool [N, S]. chance: [N] in [0, 1)."""
    size = occupied.shape[1]
    place = torch.arange(size, device=occupied.device)
    first = torch.where(occupied, place, size).amin(1)
    last = torch.where(occupied, place, -1).amax(1)
    free = size - 1 - (last - first)
    by = torch.where(free >= size / 4, (chance * (free + 1)).long() - first, (chance * size).long())
    return (place - by[:, None]) % size


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


def unmoved(mask, heat, generator):
    """The right pixels: under control "label" it is `select` that differs."""
    return mask


CONTROLS = {"random": moved, "coolest": coolest, "label": unmoved}


def soften(mask, width):
    """Mask with edges that fade, float [N, H, W]: blurred by `width` as a share of the side; 0 leaves it bool and sharp."""
    return blurred(mask.float(), width * mask.shape[-1]) if width else mask


def blurred(images, sigma):
    """Gaussian blur by `sigma` pixels of float [..., H, W]; at the edges over what there is."""
    kernels = []
    for side in images.shape[-2:]:
        place = torch.arange(side, device=images.device, dtype=images.dtype)
        kernel = torch.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2)
        kernels.append(kernel / kernel.sum(1, keepdim=True))
    return kernels[0] @ images @ kernels[1].T


# --- what instead: (images [N, 3, H, W], mask bool or float [N, H, W], scene) -> new images ----------------------------


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
    weight: float  # of `blend`
    generator: torch.Generator  # on the images' device


def put(images, mask, pixels):
    """`pixels` where the mask is, and in proportion where it is between 0 and 1; anything that broadcasts to images."""
    mask = mask[:, None]
    pixels = pixels.to(images.dtype).expand_as(images)
    return torch.where(mask, pixels, images) if mask.dtype == torch.bool else torch.lerp(images, pixels, mask.to(images.dtype))


def black(images, mask, scene):
    """Black pixels, as the method was proposed."""
    return put(images, mask, scene.black)


def white(images, mask, scene):
    return put(images, mask, scene.white)


def mean(images, mask, scene):
    """The image's own mean colour."""
    return put(images, mask, images.mean((2, 3), keepdim=True))


def maximum(images, mask, scene):
    """The largest value of each of the image's channels."""
    return put(images, mask, images.amax((2, 3), keepdim=True))


def minimum(images, mask, scene):
    """The smallest value of each of the image's channels."""
    return put(images, mask, images.amin((2, 3), keepdim=True))


def noise(images, mask, scene):
    """Independent normal values with the mean and spread that normalisation brings images to, cut off at black and white."""
    normal = torch.randn(images.shape, generator=scene.generator, device=images.device)
    return put(images, mask, normal.clamp(scene.black, scene.white))


BLUR = 1 / 16  # of the side, as a standard deviation: shapes go, colours stay


def blur(images, mask, scene):
    """The image itself, blurred."""
    return put(images, mask, blurred(images, BLUR * images.shape[-1]))


def blend(images, mask, scene):
    """Pixel values times (1 - weight heat), as the published implementation's "blended"; the mask says where."""
    return put(images, mask, images - scene.weight * scene.heat[:, None] * (images - scene.black))


def other(images, mask, scene):
    """The same place of another image of the batch, of another class; black where the batch has none.

    The idea of visual context augmentation (Dvornik et al. 2018), with whatever the other image holds there.
    """
    donors, given = _of_another_class(scene, scene.classes, scene.fresh)
    return put(images, mask, torch.where(given[:, None, None, None], scene.batch[donors], scene.black))


def _of_another_class(scene, classes, may_give):
    """For each of the N images one of M at random that may give and has another class, int64 [N], and whether there is one, bool [N]."""
    foreign = (scene.classes[scene.rows][:, None] != classes) & may_give
    draw = torch.rand(foreign.shape, generator=scene.generator, device=foreign.device)
    score, donors = torch.where(foreign, draw, -1.0).max(1)
    return donors, score >= 0


def transplant(images, mask, scene):
    """Noise in the image's own hot pixels, and another chosen image's hot pixels pasted in at their own place.

    So the image shows evidence against what the network leans on, under an unchanged label. An image chosen alone only gets the noise.
    """
    filled = noise(images, mask, scene)
    count, order = scene.chosen.sum().clamp(min=1), scene.chosen.logical_not().to(torch.uint8).argsort(stable=True)
    place = scene.chosen.cumsum(0) - 1
    step = 1 + (torch.rand((), generator=scene.generator, device=images.device) * (count - 1)).long()
    donors = order[((place + step) % count).clamp(min=0)]
    itself = donors == torch.arange(len(donors), device=donors.device)
    pasted = mask[donors] & ~itself[:, None, None] if mask.dtype == torch.bool else mask[donors] * ~itself[:, None, None]
    return put(filled, pasted, images[donors])


def swap(images, mask, scene):
    """Another chosen image's pixels, both where the image itself is hot and where the other is; the other is of another class.

    As `transplant`, but whatever is pasted speaks against the label, where with two classes half of what `transplant` pastes repeats a shortcut; and
    no noise tells these images from others. Noise where no image of another class was chosen.
    """
    if not len(images):
        return images
    donors, given = _of_another_class(scene, scene.classes[scene.rows], scene.chosen)
    both = mask | mask[donors] if mask.dtype == torch.bool else torch.maximum(mask, mask[donors])
    return torch.where(given[:, None, None, None], put(images, both, images[donors]), noise(images, mask, scene))


FILLS = {"black": black, "white": white, "mean": mean, "max": maximum, "min": minimum, "noise": noise, "blur": blur,
         "blend": blend, "other": other, "transplant": transplant, "swap": swap}


def erase(images, mask, fill, scene):
    """New images with the masked pixels filled; `images` itself is left as it is.

    images: [N, 3, H, W], normalised. mask: bool [N, H, W], or float in [0, 1] as `soften` gives it. fill: a key of FILLS.
    """
    return FILLS[fill](images, mask, scene)


class Waiting(NamedTuple):
    """Erased images on their way into a step: images [K, 3, H, W], labels [K] or [K, C], and taken, bool [K]: which are real."""

    images: torch.Tensor
    labels: torch.Tensor
    taken: torch.Tensor


def erased_copies(config, explain, images, labels, logits, fresh, rows, chosen, normalisation, key):
    """Heat, mask and fill for the selected rows of a batch, as a run's settings have them.

    config: the settings explain, area, threshold, control, soften, fill and weight. explain: the entered `cam.CAM` through which
    logits [B, C] of images [B, 3, H, W] came. labels, fresh: as in `select`, which gave rows and chosen, [N]. normalisation: (mean,
    std), each [1, 3, 1, 1]. Returns Waiting of N images, heat [N, H, W] and mask bool [N, H, W].
    """
    classes, (mean, std) = true_class(labels), normalisation
    explained, against = cam.EXPLAIN[config["explain"]](logits[rows], classes[rows])
    heat = cam.upsample(explain(logits, rows, explained, against), images.shape[-2:])
    mask = pixel_mask(heat, config["area"], config["threshold"], config["control"], key)
    chosen = chosen & mask.flatten(1).any(1)
    scene = Scene(heat, chosen, rows, images, classes, fresh, -mean / std, (1 - mean) / std, config["weight"],
                  data.chance(images.device, "fill", *key))
    erased = erase(images[rows], soften(mask, config["soften"]), config["fill"], scene)
    return Waiting(erased, labels[rows], chosen), heat, mask


# --- in whose seats ------------------------------------------------------------------------------------------------


def seat(images, labels, waiting, budget):
    """The batch with the waiting images in it.

    budget "equal": each takes the seat of one fresh image, so that the step is the size it would have been without.
    budget "extra": they ride behind the batch, which grows by their number (and waits for the device to count them).
    Returns images, labels, and fresh: bool, False for the erased ones.
    """
    seats, taken = len(waiting.taken), waiting.taken
    if budget == "extra":
        fresh = torch.ones(len(labels) + int(taken.sum()), dtype=torch.bool, device=labels.device)
        fresh[len(labels):] = False
        return torch.cat([images, waiting.images[taken]]), torch.cat([labels, waiting.labels[taken]]), fresh
    last = torch.arange(len(labels) - seats, len(labels), device=labels.device)
    return replace(images, labels, last, waiting)


def join(images, labels, rows, waiting, budget):
    """The batch with the erased copies of its own images `rows`: in their place (budget "equal") or behind it ("extra")."""
    return replace(images, labels, rows, waiting) if budget == "equal" else seat(images, labels, waiting, budget)


def replace(images, labels, rows, waiting):
    """The batch with the waiting images in the given rows. Returns images, labels, and fresh: bool, False for the erased ones."""
    taken = waiting.taken
    filled = torch.where(taken[:, None, None, None], waiting.images, images[rows])
    images = images.clone().index_copy_(0, rows, filled)  # in place, since index_copy would not keep channels last
    labels = labels.index_copy(0, rows, torch.where(taken if labels.dim() == 1 else taken[:, None], waiting.labels, labels[rows]))
    return images, labels, torch.ones(len(labels), dtype=torch.bool, device=labels.device).index_copy(0, rows, ~taken)


def disagreement(said, logits, rows, taken, budget):
    """Kullback-Leibler divergence of what the network says of erased copies from what it said of their originals, which is not trained on.

    The consistency loss of Xie et al. 2020 (UDA, equation 1), with erasing as the augmentation. said: logits [N, C] of the originals. logits: [B, C] of the
    batch that `join` gave, with rows and budget as there and taken as in its waiting images. Returns the sum over the copies through B, so
    that it weighs against a mean cross-entropy as image against image.
    """
    if budget == "equal":
        copies = logits[rows]
    else:
        said, copies, taken = said[taken], logits[len(logits) - int(taken.sum()):], taken[taken]
    divergence = F.kl_div(copies.float().log_softmax(1), said.float().softmax(1), reduction="none").sum(1)
    return (divergence * taken).sum() / len(logits)


# --- when: (epoch counted from 0, argument, validation accuracies of the epochs before) -> bool -------------------------


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
    """(key of SCHEDULES, its argument) for "every:K", "after:E", "plateau", "plateau:K" or "20,p,19"; None means after:0.

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
            raise ValueError(f"{text!r}: expected every:K, after:E, plateau, or epochs and p with commas between, as 20,p,19")
        epochs += [True] if piece.strip() == "p" else [False] * int(piece)
    return "listed", epochs


def is_on(schedule, epoch, accuracies, warmup=0):
    """Whether images are erased in this epoch (counted from 0), by a schedule in words; never in the first `warmup`.

    accuracies: validation accuracy of each epoch before this one.
    """
    name, argument = read_schedule(schedule)
    return epoch >= warmup and SCHEDULES[name](epoch, argument, accuracies)
