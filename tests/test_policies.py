"""engine/policies.py: torchvision's operations, to the last bit, with a magnitude of its own for each image."""

import pytest
import torch
from test_data import alike
from torchvision.transforms import v2

from engine import policies
from engine.chance import stable_seed

KINDS = {"RandAugment": v2.RandAugment(fill=policies.GREY), "TrivialAugment": v2.TrivialAugmentWide(fill=policies.GREY)}
SPACE = [(kind, name) for kind, transform in KINDS.items() for name in transform._AUGMENTATION_SPACE]


def photographs(side):
    from sklearn.datasets import load_sample_images

    whole = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) for p in load_sample_images().images])
    flat, dark = torch.full((1, 3, side, side), 7), torch.arange(3 * side * side).view(1, 3, side, side) % 20
    return torch.cat([v2.functional.resize(whole, [side, side]), flat, dark]).to(torch.uint8)


@pytest.mark.parametrize("side", [2, 33])
@pytest.mark.parametrize("kind, name", SPACE)
def test_each_operation_is_torchvisions_at_every_magnitude(kind, name, side):
    transform, images = KINDS[kind], photographs(side)
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    found = magnitudes(31, side, side)
    found = [0.0] if found is None else [sign * m for m in found.tolist() for sign in ((1, -1) if signed else (1,))]
    every = images.repeat_interleave(len(found), 0)
    changed = policies.changed(every, [[(name, magnitude)] for magnitude in found] * len(images))
    expected = [transform._apply_image_or_video_transform(image, name, magnitude, transform.interpolation,
                                                          transform._fill) for image in images for magnitude in found]
    assert torch.equal(changed, torch.stack(expected))
    assert name in ("Identity", "Equalize") or side == 2 or not torch.equal(changed, every)


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_drew_different_operations_get_each_its_own(kind):
    images = photographs(32).repeat(20, 1, 1, 1)
    drawn = policies.drawn(type(KINDS[kind])(), len(images), 0, 32, "x")
    assert len({name for each in drawn for name, _ in each}) == 14
    expected = []
    for number, image in enumerate(images):
        torch.manual_seed(stable_seed("x", number))
        expected.append(KINDS[kind](image))
    assert torch.equal(policies.changed(images, drawn), torch.stack(expected))


def test_random_erasing_is_torchvisions():
    images, transform = alike().float(), v2.RandomErasing(0.7, value="random")
    expected = []
    for number, image in enumerate(images, 5):
        torch.manual_seed(stable_seed("x", number))
        expected.append(transform(image))
    found = policies.erased(images, *policies.rectangles(transform, len(images), 5, images.shape[1:], "x"))
    assert torch.equal(found, torch.stack(expected)) and not torch.equal(found, images)
    never = policies.rectangles(v2.RandomErasing(1e-9, value="random"), len(images), 5, images.shape[1:], "x")
    assert torch.equal(policies.erased(images, *never), images)
