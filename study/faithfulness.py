"""How good is an explanation? What a network's probability does as hot pixels are taken away, where the heat lies, and
whether a network depends on few pixels. `study/explain.py` measures it for runs.

Everything takes batches on their device. images: [N, 3, H, W] float32, normalised. heat: [N, H, W] in [0, 1], at
the images' size. classes: int64 [N], whose probability is watched. mask: bool [N, H, W]. "Taken away" is 0, the mean
colour, for deletion, a blurred image for insertion, and what is around it for ROAD. A model is in eval mode.
"""

import copy

import torch
import torch.nn.functional as F
from scipy import stats

import cam
import proxy
from engine.chance import stable_seed, torch_generator

STEPS = 20  # of the deletion and insertion curves
BLUR = 5 / 224  # of the side: the standard deviation in Petsiuk et al.'s code
PERCENTILES = tuple(range(10, 100, 10))  # of ROAD, as in its paper
ROAD_NOISE = 0.01  # its noise, on normalised images
SOLVER_STEPS, SOLVER_ERROR = 2000, 1e-3  # which leaves an error of about the noise, root mean square
COARSEST = 8  # pixels a side, where solving starts
ROUNDING = 2e-7  # of an image's size: a residual below it is none
HOTTEST = 0.2  # share of the pixels, of `overlap`


@torch.no_grad()
def probability(model, images, classes):
    """Softmax probability of `classes`, as these [N] or [N, K]."""
    return model(images).float().softmax(1).gather(1, classes.view(len(classes), -1)).view_as(classes)


def ranks_of(heat, *key):
    """Place of each pixel, the hottest first: int64 [N, H, W] from 0. Chance decides among equals, as of zeros."""
    flat = heat.flatten(1)
    chance = torch.rand(flat.shape, generator=torch_generator("cpu", "ranks", *key)).to(flat.device)
    order = chance.argsort(1)
    order = order.gather(1, flat.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return order.argsort(1).view(heat.shape)


def curve(model, start, end, ranks, classes):
    """Probability of `classes` as pixels of `start` become those of `end`, the hottest first: [N, STEPS + 1]."""
    pixels = ranks[0].numel()
    return torch.stack([probability(model, torch.where((ranks < pixels * k // STEPS)[:, None], end, start), classes)
                        for k in range(STEPS + 1)], 1)


def deletion(model, images, ranks, classes):
    """Deletion curve [N, STEPS + 1], Petsiuk et al. 2018 (RISE), section 4.1; the lower its area, the better."""
    return curve(model, images, torch.zeros_like(images), ranks, classes)


def insertion(model, images, ranks, classes):
    """Insertion curve [N, STEPS + 1], as `deletion`; the higher its area, the better."""
    return curve(model, proxy.blurred(images, BLUR * images.shape[-1]), images, ranks, classes)


def drop_and_increase(model, images, heat, classes):
    """Average drop and increase in confidence, Chattopadhay et al. 2018 (Grad-CAM++), equations 11 and 12, per image.

    Of the image times its heat: the share of the probability lost, [N] in [0, 1], and whether it rose, bool [N].
    """
    before, after = probability(model, images, classes), probability(model, images * heat[:, None], classes)
    return (before - after).clamp_min(0) / before, after > before


_NEAR = torch.tensor([[1 / 12, 1 / 6, 1 / 12], [1 / 6, 0.0, 1 / 6], [1 / 12, 1 / 6, 1 / 12]])  # weights of neighbours


def impute(images, missing, *key, noise=ROAD_NOISE, error=SOLVER_ERROR):
    """Missing pixels as weighted means of their neighbours, and a little noise: Rong et al. 2022 (ROAD), section 4.2.

    missing: bool [N, H, W]. One linear system per image, symmetric and positive definite, solved by conjugate gradients
    for the batch at once, until the residual is `error` of its right side. Where all pixels are missing they become 0.
    """
    filled = _solve(images, missing[:, None].to(images.dtype), error)
    grain = torch.randn(images.shape, generator=torch_generator("cpu", "road", *key)).to(images) * noise
    return torch.where(missing[:, None], filled + grain, images)


def _solve(images, unknown, error):
    """What `impute` puts at the pixels where unknown [N, 1, H, W] is 1; 0 elsewhere.

    Conjugate gradients mend what is fine in a few steps and what is broad in very many. So they start from the solution
    at half the size, at the coarsest from the mean: at 224 pixels in an eighth of the time (half missing, error 1e-3).
    """
    planes, known = images.shape[0] * images.shape[1], 1 - unknown
    weights = _NEAR.to(images).expand(planes, 1, 3, 3)

    def near(x):  # planes as the channels of one image: 15 times faster on a CPU than 3 channels of many
        return F.conv2d(x.reshape(1, planes, *x.shape[2:]), weights, padding=1, groups=planes).view(x.shape)

    around = unknown * near(torch.ones_like(images))  # less than 1 at the image's edges

    def apply(x):
        return torch.addcmul(around * x, unknown, near(x), value=-1)

    if min(images.shape[-2:]) < 2 * COARSEST:
        start = (known * images).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp_min(1)
    else:
        part = F.avg_pool2d(known, 2, ceil_mode=True)
        half = F.avg_pool2d(known * images, 2, ceil_mode=True) / part.clamp_min(0.1)  # of 4 one is known, or none
        half = half + _solve(half, (part == 0).to(images.dtype), error)
        start = F.interpolate(half, images.shape[-2:], mode="bilinear")
    return _conjugate_gradients(apply, unknown * start, unknown * near(known * images), images, error)


def _conjugate_gradients(apply, x, right, images, error):
    """Solve apply(x) = right, each [N, 3, H, W], from `x` on, in place, until the residual is `error` of `right`."""
    def dot(a, b):
        return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).view(-1, 1, 1, 1)

    tiny = torch.finfo(images.dtype).tiny
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


def road(model, images, ranks, classes, *key, noise=ROAD_NOISE):
    """ROAD, Rong et al. 2022: probability with the hottest, and with the coolest pixels imputed: two [N, PERCENTILES].

    classes: [N]; or [N, K], which gives two [N, PERCENTILES, K]. Column p: the hottest (coolest) 100 - p% of the pixels
    are missing, as in grad-cam's implementation. Their mean difference, coolest minus hottest, halved, is its
    ROADCombined.
    """
    pixels, found = ranks[0].numel(), []
    for first in (ranks, pixels - 1 - ranks):
        missing = [first < pixels - round(p / 100 * pixels) for p in PERCENTILES]
        found.append(torch.stack([probability(model, impute(images, m, *key, i, noise=noise), classes)
                                  for i, m in enumerate(missing)], 1))
    return tuple(found)


def lies(heat, mask):
    """Where the heat lies: {name: float [N]}.

    pointing: whether the hottest pixel is inside the mask, the pointing game, Zhang et al. 2018. inside: the share of
    the heat that is, 0 where there is no heat. covered: the mask's share of the pixels, as chance would give.
    """
    return {"pointing": mask.flatten(1).gather(1, heat.flatten(1).argmax(1, keepdim=True))[:, 0].float(),
            "inside": (heat * mask).sum((1, 2)) / heat.sum((1, 2)).clamp_min(torch.finfo(heat.dtype).tiny),
            "covered": mask.float().mean((1, 2))}


def rank_correlation(a, b):
    """Spearman's correlation of two heats, pixel by pixel, float64 [N]; ties share a rank; 0 where a heat is flat."""
    a, b = (torch.from_numpy(stats.rankdata(heat.flatten(1).cpu().numpy(), axis=1)) for heat in (a, b))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(a.dtype).tiny)


def overlap(a, b):
    """Intersection over union of the hottest fifth of the pixels of two heats, [N]."""
    count = round(HOTTEST * a[0].numel())
    a, b = (ranks_of(heat, "overlap") < count for heat in (a, b))
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))


@torch.no_grad()
def randomised(model, generator):
    """A copy of the model with every parameter's values shuffled: Adebayo et al. 2018, "Sanity checks"."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        values = parameter.flatten()
        parameter.copy_(values[torch.randperm(len(values), generator=generator).to(values.device)].view_as(parameter))
    return other


def heat_of(model, images, method, layer, classes=None, score=None):
    """Heat [N, H, W] at the images' size, of the predicted class or of `classes`, and the logits [N, C].

    score: a key of `cam.EXPLAIN` to explain instead; classes are then the labels, int64 [N].
    """
    with cam.CAM(model, method, None if method in cam.ATTENTION else layer) as explain:
        logits = model(images)
        grids = (explain(logits, classes=classes) if score is None
                 else explain(logits, None, *cam.EXPLAIN[score](logits, classes)))
        heat = cam.upsample(grids, images.shape[-2:])
    return heat, logits.detach()


def other_method(trained):
    """A CAM method that none of `trained` is: a network may learn its own method instead of where to attend."""
    methods = ("layercam", "gradcam", "hirescam", "gradcam++", "eigencam", "xgradcam")
    return next(method for method in methods if method not in trained)


def measure(model, images, method, layer, mask=None, key=()):
    """Every figure of this file for one batch: {name: float tensor [N]}, and the curves [N, STEPS + 1].

    The class is the predicted one. mask: what the heat should lie on, or None. deletion, insertion: areas under their
    curves. drop, increase. road: ROADCombined. sensitivity: 1 minus the rank correlation of the heat with that of a
    network of shuffled weights. With a mask: what `lies` gives.
    """
    heat, logits = heat_of(model, images, method, layer)
    classes, ranks = logits.argmax(1), ranks_of(heat, *key)
    drop, increase = drop_and_increase(model, images, heat, classes)
    hot, cool = road(model, images, ranks, classes, *key)
    shuffled = randomised(model, torch.Generator().manual_seed(stable_seed("randomised", *key)))
    other, _ = heat_of(shuffled, images, method, layer, classes)
    down, up = deletion(model, images, ranks, classes), insertion(model, images, ranks, classes)
    found = {"deletion": torch.trapezoid(down, dx=1 / STEPS), "insertion": torch.trapezoid(up, dx=1 / STEPS),
             "deletion_curve": down, "insertion_curve": up, "drop": drop, "increase": increase.float(),
             "road": (cool - hot).mean(1) / 2, "sensitivity": 1 - rank_correlation(heat, other).float()}
    return found if mask is None else found | lies(heat, mask)


FEW = 0.05  # of an image's pixels


def where(model, images, labels, mask, methods, layer, misled=None):
    """How well each way of explaining finds what matters: {(method, key of cam.EXPLAIN): {name: float [N]}}.

    With a mask, not empty: erased, the share of it among the hottest FEW of the pixels; and what `lies` gives. misled:
    the key of the draws, for images that the network gets wrong; then also overlap with the heat of the predicted
    class; road, what that class loses with the hottest pixels against the coolest (ROADCombined); and freed, what the
    true class gains so. labels: int64 [N].
    """
    found = {}
    for method in methods:
        for name in cam.EXPLAIN:
            heat, logits = heat_of(model, images, method, layer, labels, name)
            values = found[method, name] = {}
            if mask is not None:
                erased = (proxy.pixel_mask(heat, FEW) & mask).float().sum((1, 2))
                values |= {"erased": erased / mask.float().sum((1, 2)), **lies(heat, mask)}
            if misled is not None:
                first = heat if name == "predicted" else first
                values["overlap"] = overlap(heat, first)
                both = torch.stack([logits.argmax(1), labels], 1)
                hot, cool = road(model, images, ranks_of(heat, *misled), both, *misled)
                values["road"], values["freed"] = ((cool - hot).mean(1) / 2 * both.new_tensor([1, -1])).T
    return found
