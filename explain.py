"""How good is an explanation? What a network's confidence does as the pixels that the heat names are taken away, and where the heat lies.

    python eval.py runs/NAME --explanations                 # into explanations.json and .npz, measured with a method other than the run's own
    python eval.py runs/NAME --explanations --cam gradcam   # with this one
    python eval.py runs/NAME --leaning                      # is there a shortcut? Looks at validation images alone
    python eval.py runs/NAME --where --layer -2             # how much of a planted square, or of the object, each way of explaining finds

Everything takes whole batches on their device. images: [N, 3, H, W], normalised. heat: [N, H, W] in [0, 1] at the images' size. classes: int64 [N],
whose probability is watched. "Taken away" is: black as the network sees it (the mean colour, 0 after normalisation) for deletion, a blurred image
for insertion, and what is around it for ROAD.
"""

import torch
import torch.nn.functional as F

import cam
import data
import proxy

STEPS = 20  # of the deletion and insertion curves
BLUR = 5 / 224  # of the side: the standard deviation in Petsiuk et al.'s code
PERCENTILES = tuple(range(10, 100, 10))  # of ROAD, as in its paper
ROAD_NOISE = 0.01  # its noise, on normalised images
SOLVER_STEPS, SOLVER_ERROR = 2000, 1e-3  # which leaves an error of about the noise, root mean square
COARSEST = 8  # pixels a side, where solving starts
ROUNDING = 2e-7  # of an image's size: a residual below it is none
HOTTEST = 0.2  # a fifth of the pixels, of which two heats' intersection over union is taken


@torch.no_grad()
def probability(model, images, classes):
    """Softmax probability [N] of `classes`."""
    return model(images).float().softmax(1).gather(1, classes[:, None])[:, 0]


def ranks_of(heat, *key):
    """Place of each pixel, hottest first: int64 [N, H, W] from 0. Among equals, of which a heat that was cut at zero has many, chance decides."""
    flat = heat.flatten(1)
    chance = torch.rand(flat.shape, generator=data.chance("cpu", "ranks", *key)).to(flat.device)
    order = chance.argsort(1)
    order = order.gather(1, flat.gather(1, order).argsort(dim=1, descending=True, stable=True))
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(heat.shape)


def curve(model, start, end, ranks, classes, steps=STEPS):
    """Probability of `classes` as the pixels of `start` become those of `end`, the hottest first, in equal steps: [N, steps + 1]."""
    pixels = ranks[0].numel()
    return torch.stack([probability(model, torch.where((ranks < pixels * k // steps)[:, None], end, start), classes) for k in range(steps + 1)], 1)


def area_under(values):
    """Mean of curves [N, steps + 1] by the trapezoid rule, [N]."""
    return (values[:, 1:] + values[:, :-1]).mean(1) / 2


def deletion(model, images, ranks, classes, steps=STEPS):
    """Deletion curve [N, steps + 1], Petsiuk, Das and Saenko 2018 (RISE), section 4.1; the lower its area, the better the heat."""
    return curve(model, images, torch.zeros_like(images), ranks, classes, steps)


def insertion(model, images, ranks, classes, steps=STEPS):
    """Insertion curve [N, steps + 1], as `deletion`; the higher its area, the better the heat."""
    return curve(model, proxy.blurred(images, BLUR * images.shape[-1]), images, ranks, classes, steps)


def drop_and_increase(model, images, heat, classes):
    """Average drop and increase in confidence, Chattopadhay et al. 2018 (Grad-CAM++), equations 11 and 12, for each image.

    Of the image times its heat: the share of the probability that is lost, [N] in [0, 1], and whether it rose, bool [N].
    """
    before, after = probability(model, images, classes), probability(model, images * heat[:, None], classes)
    return (before - after).clamp_min(0) / before, after > before


# --- ROAD ----------------------------------------------------------------------------------------------------------

_NEAR = torch.tensor([[1 / 12, 1 / 6, 1 / 12], [1 / 6, 0.0, 1 / 6], [1 / 12, 1 / 6, 1 / 12]])  # weights of a pixel's neighbours


def impute(images, missing, *key, noise=ROAD_NOISE, error=SOLVER_ERROR):
    """Missing pixels as the weighted mean of their neighbours, all at once, and a little noise: Rong et al. 2022 (ROAD), section 4.2.

    missing: bool [N, H, W]. One linear system per image, symmetric and positive definite, solved by conjugate gradients for the whole batch, until
    the residual is `error` of its right side. Where all pixels are missing they become 0, the mean colour.
    """
    filled = _solve(images, missing[:, None].to(images.dtype), error)
    grain = torch.randn(images.shape, generator=data.chance("cpu", "road", *key)).to(images) * noise if noise else 0
    return torch.where(missing[:, None], filled + grain, images)


def _solve(images, unknown, error):
    """What `impute` puts at the pixels where unknown [N, 1, H, W] is 1; 0 elsewhere.

    It starts from the solution at half the size: conjugate gradients mend what is fine in a few steps and what is broad in very many, and
    the smaller image has that right. At 224 pixels it takes an eighth of the time (half missing, error 1e-3) and comes nearer.
    """
    planes, tiny = images.shape[0] * images.shape[1], torch.finfo(images.dtype).tiny
    weights = _NEAR.to(images).expand(planes, 1, 3, 3)

    def near(x):  # planes as the channels of one image: 15 times faster on a CPU than 3 channels of many
        return F.conv2d(x.reshape(1, planes, *x.shape[2:]), weights, padding=1, groups=planes).view(x.shape)

    def dot(a, b):
        return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).view(-1, 1, 1, 1)

    around = unknown * near(torch.ones_like(images))  # less than 1 at the image's edges

    def apply(x):
        return torch.addcmul(around * x, unknown, near(x), value=-1)

    if min(images.shape[-2:]) >= 2 * COARSEST:
        known = F.avg_pool2d(1 - unknown, 2, ceil_mode=True)
        half = F.avg_pool2d((1 - unknown) * images, 2, ceil_mode=True) / known.clamp_min(0.1)  # of 4 pixels at least one is known, or none
        nothing = (known == 0).to(images.dtype)
        x = unknown * F.interpolate(half + _solve(half, nothing, error), images.shape[-2:], mode="bilinear")
    else:
        mean = ((1 - unknown) * images).sum((2, 3), keepdim=True) / (1 - unknown).sum((2, 3), keepdim=True).clamp_min(1)
        x = unknown * mean
    right = unknown * near((1 - unknown) * images)
    residual = right - apply(x)
    direction, length = residual.clone(), dot(residual, residual)
    enough = error**2 * dot(right, right) + ROUNDING**2 * dot(images, images) + tiny
    for step in range(SOLVER_STEPS):
        if step % 10 == 0 and bool((length <= enough).all()):
            break
        product = apply(direction)
        rate = torch.where(length <= enough, 0, length / dot(direction, product).clamp_min(tiny))
        x.addcmul_(rate, direction)
        residual.addcmul_(rate, product, value=-1)
        before, length = length, dot(residual, residual)
        direction.mul_(length / before.clamp_min(tiny)).add_(residual)
    return x


def road(model, images, ranks, classes, *key, percentiles=PERCENTILES, noise=ROAD_NOISE):
    """ROAD, Rong et al. 2022: probability with the hottest, and with the coolest pixels imputed: two [N, percentiles].

    Column p: the hottest (coolest) 100 - p% of the pixels are missing, as in grad-cam's implementation. Their mean difference, coolest
    minus hottest, halved, is its ROADCombined.
    """
    pixels, found = ranks[0].numel(), []
    for first in (ranks, pixels - 1 - ranks):
        missing = [first < pixels - round(p / 100 * pixels) for p in percentiles]
        found.append(torch.stack([probability(model, impute(images, m, *key, i, noise=noise), classes) for i, m in enumerate(missing)], 1))
    return tuple(found)


# --- where the heat lies -------------------------------------------------------------------------------------------


def pointing(heat, mask):
    """Whether the hottest pixel lies inside the mask, bool [N]: the pointing game, Zhang et al. 2018. mask: bool [N, H, W]."""
    return mask.flatten(1).gather(1, heat.flatten(1).argmax(1, keepdim=True))[:, 0]


def share_inside(heat, mask):
    """Share of the heat that lies inside the mask, [N]; 0 where there is no heat."""
    return (heat * mask).sum((1, 2)) / heat.sum((1, 2)).clamp_min(torch.finfo(heat.dtype).tiny)


def rank_correlation(a, b):
    """Spearman's correlation of two heats, pixel by pixel, [N]; ties share their mean rank; 0 where a heat is flat."""
    a, b = _mean_ranks(a.flatten(1)), _mean_ranks(b.flatten(1))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(a.dtype).tiny)


def _mean_ranks(values):
    """Ranks [N, P] from 0, float64, the mean of theirs for equal values."""
    ordered, order = values.sort(1)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = new.cumsum(1) - 1
    places = torch.arange(values.shape[1], device=values.device, dtype=torch.float64).expand_as(values).contiguous()
    sums = torch.zeros_like(places).scatter_add_(1, group, places)
    counts = torch.zeros_like(places).scatter_add_(1, group, torch.ones_like(places))
    return torch.zeros_like(places).scatter_(1, order, (sums / counts.clamp_min(1)).gather(1, group))


def overlap(a, b, share=HOTTEST):
    """Intersection over union of the hottest `share` of the pixels of two heats, [N]."""
    count = round(share * a[0].numel())
    a, b = (ranks_of(heat, "overlap") < count for heat in (a, b))
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))


# --- sensitivity to the weights ------------------------------------------------------------------------------------


@torch.no_grad()
def randomised(model, generator):
    """A copy of the model whose every parameter's values are shuffled: Adebayo et al. 2018, "Sanity checks", full randomisation."""
    import copy

    other = copy.deepcopy(model)
    for parameter in other.parameters():
        values = parameter.flatten()
        parameter.copy_(values[torch.randperm(len(values), generator=generator).to(values.device)].view_as(parameter))
    return other


def heat_of(model, images, method, layer, classes=None):
    """Heat [N, H, W] at the images' size, of the predicted class or of `classes`, and the logits [N, C]; model in eval mode."""
    with cam.CAM(model, method, None if method in cam.ATTENTION else layer) as explain:
        logits = model(images)
        heat = cam.upsample(explain(logits, classes=classes), images.shape[-2:])
    return heat, logits.detach()


# --- does it lean on few pixels? -----------------------------------------------------------------------------------

LEAN_AREA = 0.05  # of an image's pixels
LEANS = 0.14  # accuracy that the hottest of these are worth more than others; midway between what seeds 0 to 4 had with a shortcut (0.17 to 0.26) and without (-0.08 to 0.11)
# Ways to explain: method, key of cam.EXPLAIN, layer. Grad-CAM's weights are means over the map, which one small square hardly moves; GradCAMElementWise keeps what speaks
# for the class place by place, also where an activation is negative (of a linear bottleneck), which LayerCAM drops.
WAYS = (("gradcam", "predicted", None), ("elementwise", "margin", "-2"))


def leaning(model, images, labels, normalisation, way=WAYS[0], key=()):
    """Which images a network in eval mode gets right: as they are, with the hottest LEAN_AREA of their pixels as noise, and with the same shape as noise
    at a random place: three bool [N], "right", "hottest" and "random".

    Where "hottest" is lost and "random" is not, the network recognises the image by a few pixels in one place, as it does by a shortcut; an object
    leaves enough to be recognised by. It takes labels of validation images alone, to which a shortcut tells the truth. The erasing is the
    training step's own. way: CAM method, what is explained, and layer, as in WAYS: one that does not find what the network goes by loses nothing, so that
    the way that loses most is the one to train with. normalisation: (mean, std), each [1, 3, 1, 1]. Raises ValueError where the way fits no layer.
    """
    method, score, layer = way
    settings = {"explain": score, "area": LEAN_AREA, "threshold": None, "soften": 0, "fill": "noise", "weight": 1.0}
    rows, every = torch.arange(len(images), device=images.device), torch.ones(len(images), dtype=torch.bool, device=images.device)
    with cam.CAM(model, method, layer) as explain:
        logits = model(images)
        erased = {name: proxy.erased_copies(settings | {"control": control}, explain, images, labels, logits, every, rows, every, normalisation, key)[0].images
                  for name, control in (("hottest", None), ("random", "random"))}
    with torch.no_grad():
        return {"right": logits.argmax(1) == labels} | {name: model(copies).argmax(1) == labels for name, copies in erased.items()}


def where(model, images, labels, mask, methods, layer):
    """How well each way of explaining finds what the mask covers: {(method, key of cam.EXPLAIN): {name: float [N]}}.

    erased: the share of the mask among the hottest LEAN_AREA of the pixels, which is how much of a shortcut the training step would erase. pointing,
    inside, covered: as in `measure`. model: in eval mode. labels: int64 [N]. mask: bool [N, H, W], not empty.
    """
    found, area = {}, mask.float().sum((1, 2))
    for method in methods:
        for name, scores in cam.EXPLAIN.items():
            with cam.CAM(model, method, None if method in cam.ATTENTION else layer) as explain:
                logits = model(images)
                heat = cam.upsample(explain(logits, None, *scores(logits, labels)), images.shape[-2:])
            erased = proxy.pixel_mask(heat, LEAN_AREA) & mask
            found[method, name] = {"erased": erased.float().sum((1, 2)) / area, "pointing": pointing(heat, mask).float(),
                                   "inside": share_inside(heat, mask), "covered": mask.float().mean((1, 2))}
    return found


def other_method(trained):
    """A CAM method that none of `trained` is: a network may learn the method it was trained with instead of where to look."""
    return next(method for method in ("layercam", "gradcam", "hirescam", "gradcam++", "eigencam", "xgradcam") if method not in trained)


def measure(model, images, method, layer, mask=None, key=()):
    """Every figure of this file for one batch: {name: float tensor [N]}, and the curves [N, STEPS + 1]. The class is the predicted one. mask: bool [N, H, W] of what the heat
    should lie on, or None.

    deletion, insertion: areas under their curves. drop, increase. road: ROADCombined. sensitivity: 1 minus the rank correlation of the heat with
    that of a network of shuffled weights. With a mask: pointing, inside, and covered, its share of the pixels, which chance would give.
    """
    heat, logits = heat_of(model, images, method, layer)
    classes, ranks = logits.argmax(1), ranks_of(heat, *key)
    drop, increase = drop_and_increase(model, images, heat, classes)
    hot, cool = road(model, images, ranks, classes, *key)
    shuffled = randomised(model, torch.Generator().manual_seed(data.stable_seed("randomised", *key)))
    other, _ = heat_of(shuffled, images, method, layer, classes)
    curves = {"deletion": deletion(model, images, ranks, classes), "insertion": insertion(model, images, ranks, classes)}
    found = {name: area_under(values) for name, values in curves.items()} | {f"{name}_curve": values for name, values in curves.items()}
    found |= {"drop": drop, "increase": increase.float(), "road": (cool - hot).mean(1) / 2, "sensitivity": 1 - rank_correlation(heat, other).float()}
    if mask is not None:
        found |= {"pointing": pointing(heat, mask).float(), "inside": share_inside(heat, mask), "covered": mask.float().mean((1, 2))}
    return found
