"""engine/decoy.py: a planted shortcut that gives the class away, and lies in the test."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_classes import place
from test_data import STRATIFIED, load

from engine.dataset import Pixels, to_rgb
from engine.decoy import draw_decoy, masks_of, skin
from engine.files import UserError
from engine.loader import Batches
from engine.split import make_split

CPU = torch.device("cpu")


@pytest.mark.parametrize("share", [1, 0.9, 0])
def test_a_decoy_shows_the_class_in_training_and_validation_and_another_in_the_test(share):
    found = load("digits", None)
    split = make_split(found, STRATIFIED, seed=0)
    decoy, number = draw_decoy(found, split, share, seed=0), {image_id: i for i, image_id in enumerate(found.ids)}
    true = draw_decoy(found, split, 1, seed=0)
    colour_of = {tuple(true.colours[number[i]]): int(found.labels[number[i]]) for i in split["train"]}
    assert len(colour_of) == 10
    for part, truth in (("train", share), ("val", share), ("test", 0)):
        rows = [number[i] for i in split[part]]
        told = np.mean([colour_of[tuple(decoy.colours[row])] == found.labels[row] for row in rows])
        assert told == truth if truth in (0, 1) else abs(told - truth) < 3 * (truth * (1 - truth) / len(rows)) ** 0.5
    assert min(np.bincount(decoy.corners)) > 380


def test_batches_show_each_images_square_in_its_corner_and_change_nothing_else():
    found = load("digits", None)
    found.pixels = Pixels(np.stack([to_rgb(found.open(i), 32) for i in range(len(found))]))
    split = make_split(found, STRATIFIED, seed=0)
    decoy = found.decoy = draw_decoy(found, split, 1, seed=0)
    images, _ = next(iter(Batches(found, split["test"], 32, 64, CPU)))
    plain, _ = next(iter(Batches(found, split["test"], 32, 64, CPU, decoy=False)))
    number = {image_id: i for i, image_id in enumerate(found.ids)}
    rows = [number[i] for i in split["test"][:64]]
    mask = decoy.mask(rows, 32)
    assert (mask.sum((1, 2)) == 16).all() and ((images != plain).any(1) <= mask).all()
    for image, inside, row in zip(images, mask, rows):
        assert (image[:, inside].T.numpy() == decoy.colours[row]).all()
        corner = [inside[:4, :4], inside[:4, -4:], inside[-4:, -4:], inside[-4:, :4]][decoy.corners[row]]
        assert corner.all()
    shuffled = Batches(found, split["train"], 32, 64, CPU, seed=3)
    for (images, labels), positions in zip(shuffled, shuffled.order):
        rows = shuffled.indices[positions]
        for image, inside, row in zip(images, decoy.mask(rows, 32), rows):
            assert (image[:, inside].T.numpy() == decoy.colours[row]).all()


def test_skin_is_told_from_a_wall_by_colour_and_not_by_brightness():
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    hand = (rows - 40) ** 2 + (columns - 24) ** 2 < 300
    wall = torch.linspace(0.3, 1, 64).expand(64, 64)  # from shadow to light
    for colour in ((0.9, 0.7, 0.55), (0.35, 0.22, 0.15)):
        image = torch.where(hand, torch.tensor(colour)[:, None, None], wall * torch.tensor([1, 1, 1.03])[:, None, None])
        pixels = (255 * image.clamp(0, 1)).to(torch.uint8)
        assert torch.equal(skin(None, None, pixels[None])[0], hand)


def test_masks_beside_images_show_where_the_object_is(tmp_path):
    place(tmp_path, *(f"{name}/{i}.png" for name in ("cyst", "well") for i in range(2)))
    for name, rows, white in (("cyst/0_mask", slice(0, 4), 255), ("cyst/0_mask_1", slice(4, 8), 1),
                              ("cyst/1_mask", slice(8, 12), 200), ("well/0_mask", slice(0), 255),
                              ("well/1_mask", slice(16), 255)):
        grey = np.zeros((16, 16), np.uint8)
        grey[rows, :8] = white
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
    found, pixels = load("folder", tmp_path), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    assert found.ids == ["cyst/0.png", "cyst/1.png", "well/0.png", "well/1.png"]
    name, mask = masks_of(found.without(["well/1.png"]), np.arange(3), pixels[:3])
    assert name == "object" and mask[0, :16, :16].all() and mask[1, 16:24, :16].all()
    assert mask.flatten(1).sum(1).tolist() == [256, 128, 0]
    (tmp_path / "well" / "1_mask.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="1_mask.png: cannot be read as a mask \\(not an image\\)"):
        masks_of(found, np.arange(4), pixels)
