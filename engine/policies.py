"""RandAugment, TrivialAugment and random erasing on complete batches.

torchvision draws for each image, on the host; images that drew the same operation are changed together, on the device,
which nothing waits for.

An operation does to each image, with its own magnitude, what torchvision's kernel does to one: (images uint8
[n, 3, H, W], parameters [n, 1, 1, 1] each) -> uint8 [n, 3, H, W].
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import equalize_image

from engine.chance import stable_seed
from engine.loader import sent

GREY = 128  # what comes in from outside the image; black would look like something that was erased


def moved(images, *matrix):
    """Each pixel from where its image's matrix, a b c d e f, puts it from the centre; the nearest, or grey outside."""
    shown = F.grid_sample(images.float() - GREY, places(images, *matrix), "nearest", "zeros", align_corners=False)
    return (shown + GREY).to(torch.uint8)


def places(images, *matrix):
    """The grid of `moved`, [n, H, W, 2]."""
    height, width = images.shape[2:]
    theta = torch.stack([part.flatten() for part in matrix], 1).view(-1, 2, 3).transpose(1, 2)
    scale = torch.arange(2, device=images.device)  # made there: torch.tensor would have to be sent
    theta = theta / torch.where(scale == 0, 0.5 * width, 0.5 * height)
    across, down = (torch.linspace((1.0 - n) * 0.5, (n - 1.0) * 0.5, n, device=images.device) for n in (width, height))
    points = torch.stack([*torch.meshgrid(across, down, indexing="xy"), torch.ones_like(down[:, None] + across)], 2)
    return (points.view(1, -1, 3).expand(len(images), -1, -1) @ theta).view(-1, height, width, 2)


def blended(images, other, share, rest):
    """share * images + rest * other."""
    return torch.addcmul(images * share, other, rest).clamp_(0, 255).to(torch.uint8)


def grey(images):
    red, green, blue = images.split(1, 1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def sharpness(images, share, rest):
    sharp = images.float()
    if images.shape[2] > 2:
        inside = sharp[..., 1:-1, 1:-1]
        smooth = (9 / 13 * F.avg_pool2d(sharp, 3, 1) + 4 / 13 * inside).round_()
        inside.addcmul_(smooth - inside, rest)
    return sharp.clamp_(0, 255).to(torch.uint8)


def autocontrast(images):
    low, high = images.amin((2, 3), keepdim=True).float(), images.amax((2, 3), keepdim=True).float()
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1.0 / 255))
    return ((images - torch.where(flat, 0.0, low)) / scale).clamp_(0, 255).to(torch.uint8)


def turn(angle, side):
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return cos, -sin, 0, sin, cos, 0


def shares(m, side):
    return 1.0 + m, 1.0 - (1.0 + m)


# {torchvision's name: (function, (magnitude, side of the images) -> its parameters)}
OPERATIONS = {
    "Identity": (lambda images: images, lambda m, side: ()),
    "ShearX": (moved, lambda m, side: (1, m, m * side / 2, 0, 1, 0)),
    "ShearY": (moved, lambda m, side: (1, 0, 0, m, 1, m * side / 2)),
    "TranslateX": (moved, lambda m, side: (1, 0, -int(m), 0, 1, 0)),
    "TranslateY": (moved, lambda m, side: (1, 0, 0, 0, 1, -int(m))),
    "Rotate": (moved, turn),
    "Brightness": (lambda images, share, rest: (images * share).clamp_(0, 255).to(torch.uint8), shares),
    "Color": (lambda images, *both: blended(images, grey(images), *both), shares),
    "Contrast": (lambda images, *both: blended(images, grey(images).mean((1, 2, 3), keepdim=True), *both), shares),
    "Sharpness": (sharpness, shares),
    "Posterize": (lambda images, bits: images & bits.to(torch.uint8), lambda m, side: (256 - 2 ** (8 - int(m)),)),
    "Solarize": (lambda images, least: torch.where(images >= least, 255 - images, images), lambda m, side: (255 * m,)),
    "AutoContrast": (autocontrast, lambda m, side: ()),
    "Equalize": (equalize_image, lambda m, side: ()),
}


def drawn(transform, count, first, side, *key):
    """What torchvision's transform would do to `count` images of this side: for each a list of (name, magnitude)."""
    found, image = [], torch.empty(3, side, side, dtype=torch.uint8)
    transform._apply_image_or_video_transform = lambda image, *drawn, **others: found[-1].append(drawn) or image
    with torch.random.fork_rng(devices=[]):
        for number in range(first, first + count):
            torch.default_generator.manual_seed(stable_seed(*key, number))
            found.append([])
            transform(image)
    return found


def changed(images, operations):
    """Images uint8 [B, 3, S, S], each after its own operations: a list of (name, magnitude) for each, of one length."""
    images, side = images.clone(), images.shape[-1]
    for each in zip(*operations):
        functions = [OPERATIONS[name][0] for name, _ in each]
        kinds = list(dict.fromkeys(functions))
        order = sorted(range(len(each)), key=lambda row: kinds.index(functions[row]))
        parameters = [OPERATIONS[name][1](magnitude, side) for name, magnitude in each]
        table = torch.tensor([[row, *parameters[row], *[0.0] * (6 - len(parameters[row]))] for row in order])
        table = sent(table, images.device)  # one copy for all
        done = 0
        for function, rows in itertools.groupby(order, key=lambda row: functions[row]):
            rows = list(rows)
            there, *numbers = table[done:done + len(rows)].T
            done, there = done + len(rows), there.long()
            numbers = [column[:, None, None, None] for column in numbers[:len(parameters[rows[0]])]]
            images.index_copy_(0, there, function(images[there], *numbers))
    return images


def carried(maps, operations):
    """Maps float32 [B, 1, S, S], each moved as its image's operations move that in `changed`; 0 comes in from outside.
    """
    side, still = maps.shape[-1], (1, 0, 0, 0, 1, 0)
    for each in zip(*operations):
        matrices = [OPERATIONS[name][1](m, side) if OPERATIONS[name][0] is moved else still for name, m in each]
        numbers = sent(torch.tensor(matrices, dtype=torch.float32), maps.device).T[..., None, None, None]
        maps = F.grid_sample(maps, places(maps, *numbers), "bilinear", "zeros", align_corners=False)
    return maps


def rectangles(transform, count, first, shape, *key):
    """Boxes, int64 [count, 5], and the noise in them, one vector, as torchvision's RandomErasing draws them.

    A box is left, top, width, height, and where its noise begins; of width 0 where nothing is erased.
    """
    boxes, values, image = [], [torch.zeros(1)], torch.empty(shape)
    with torch.random.fork_rng(devices=[]):
        for number in range(first, first + count):
            torch.default_generator.manual_seed(stable_seed(*key, number))
            found = transform.make_params([image]) if torch.rand(1) < transform.p else {"v": None}
            begin = sum(map(len, values))
            boxes.append([0, 0, 0, 0, 0])
            if found["v"] is not None:
                boxes[-1] = [*(found[name] for name in "jiwh"), begin]
                values.append(found["v"].flatten())
    return torch.tensor(boxes), torch.cat(values)


def erased(images, boxes, values):
    """Images [B, 3, H, W] with noise in their boxes, of `rectangles`."""
    boxes, values = (sent(part, images.device) for part in (boxes, values))
    left, top, width, height, begin = boxes.T[:, :, None, None, None]
    channel, down, across = (torch.arange(n, device=images.device) for n in images.shape[1:])
    down, across = down[:, None] - top, across - left
    inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    place = begin + (channel[:, None, None] * height + down) * width + across
    return torch.where(inside, values[torch.where(inside, place, 0)].to(images.dtype), images)
