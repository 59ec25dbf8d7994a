"""proxy.py: which images, which pixels, what instead, and in whose seats."""

import torch

import proxy

LABELS = torch.tensor([0, 1, 0, 1, 0])
LOGITS = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1]), 2).float()  # rows 1, 2 and 4 are misled


def picked(seats, fresh=None, draw=None):
    fresh = torch.ones(5, dtype=torch.bool) if fresh is None else fresh
    rows, chosen = proxy.select("misled", LOGITS, LABELS, fresh, seats, torch.rand(5) if draw is None else draw)
    assert rows.shape == chosen.shape == (seats,)
    return sorted(rows[chosen].tolist())


def test_images_that_the_network_gets_wrong_are_selected():
    assert picked(seats=5) == [1, 2, 4]


def test_an_erased_image_is_not_erased_again():
    assert picked(seats=5, fresh=torch.tensor([True, False, True, True, True])) == [2, 4]


def test_where_too_many_are_misled_the_draw_decides():
    assert picked(seats=2, draw=torch.tensor([0.9, 0.1, 0.5, 0.9, 0.4])) == [2, 4]
    assert picked(seats=2, draw=torch.tensor([0.9, 0.6, 0.5, 0.9, 0.0])) == [1, 2]


def test_the_masks_area_is_the_one_asked_for_and_its_pixels_are_the_hottest():
    heat = torch.rand(4, 30, 41)
    for area in (0.01, 0.1, 0.5, 1.0):
        mask = proxy.pixel_mask(heat, area=area)
        assert mask.sum((1, 2)).eq(round(area * 30 * 41)).all()
        for image, pixels in zip(heat, mask):
            assert pixels.all() or image[pixels].min() >= image[~pixels].max()


def test_the_threshold_keeps_what_is_at_least_that_hot():
    heat = torch.tensor([[[0.0, 0.5], [0.7, 1.0]]])
    assert proxy.pixel_mask(heat, threshold=0.7).tolist() == [[[False, False], [True, True]]]


def test_where_the_heat_says_nothing_nothing_is_erased():
    assert not proxy.pixel_mask(torch.zeros(2, 8, 8), area=0.3).any()
    assert not proxy.pixel_mask(torch.zeros(2, 8, 8), threshold=0.0).any()
    assert proxy.pixel_mask(torch.zeros(0, 8, 8), area=0.3).shape == (0, 8, 8)


def test_erase_paints_black_into_new_images_and_never_into_its_own():
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    images, mask = torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4) > 0.5
    before = images.clone()
    erased = proxy.erase(images, mask, "black", -mean / std)
    assert torch.equal(images, before)
    pixels = (erased * std + mean).permute(0, 2, 3, 1)
    assert pixels[mask].abs().max() < 1e-6
    assert torch.equal(erased.permute(0, 2, 3, 1)[~mask], images.permute(0, 2, 3, 1)[~mask])


def waiting(taken):
    return proxy.Waiting(-torch.ones(3, 3, 2, 2), torch.tensor([7, 8, 9]), torch.tensor(taken))


def test_budget_equal_gives_erased_images_seats_of_fresh_ones():
    images, labels, fresh = proxy.seat(torch.ones(5, 3, 2, 2), LABELS, waiting([True, False, True]), "equal")
    assert labels.tolist() == [0, 1, 7, 1, 9]
    assert fresh.tolist() == [True, True, False, True, False]
    assert images[:, 0, 0, 0].tolist() == [1, 1, -1, 1, -1]


def test_budget_extra_lets_them_ride_behind():
    images, labels, fresh = proxy.seat(torch.ones(5, 3, 2, 2), LABELS, waiting([True, False, True]), "extra")
    assert labels.tolist() == [0, 1, 0, 1, 0, 7, 9]
    assert fresh.tolist() == [True] * 5 + [False] * 2
    assert images[:, 0, 0, 0].tolist() == [1] * 5 + [-1] * 2


def test_warm_up_epochs_erase_nothing():
    assert [proxy.is_on(epoch, 2) for epoch in range(4)] == [False, False, True, True]
