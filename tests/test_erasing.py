"""engine/erasing.py: whose seats erased copies take, and the blur."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from engine.erasing import Waiting, blurred, cross_entropy, seat

LABELS = torch.tensor([0, 1, 0, 1, 0])


def images_of_ones():
    return torch.ones(5, 3, 2, 2)


def waiting(labels=(7, 8, 9)):
    """Three erased copies, of which the second is there for the shape's sake."""
    return Waiting(-torch.ones(3, 3, 2, 2), torch.tensor(labels), torch.tensor([True, False, True]))


def test_budget_equal_gives_erased_images_seats_of_fresh_ones():
    images, labels, fresh, valid = seat(images_of_ones(), LABELS, waiting(), "equal")
    assert valid is None
    assert labels.tolist() == [0, 1, 7, 1, 9]
    assert fresh.tolist() == [True, True, False, True, False]
    assert images[:, 0, 0, 0].tolist() == [1, 1, -1, 1, -1]


def test_budget_extra_lets_them_ride_behind_in_a_batch_of_one_size():
    images, labels, fresh, valid = seat(images_of_ones(), LABELS, waiting(), "extra")
    assert labels.tolist() == [0, 1, 0, 1, 0, 7, 1, 9]  # a seat that no copy takes holds a fresh image once more
    assert fresh.tolist() == [True] * 5 + [False] * 3 and valid.tolist() == [True] * 6 + [False, True]
    assert images[:, 0, 0, 0].tolist() == [1] * 5 + [-1, 1, -1]


def test_copies_take_the_seats_of_the_rows_that_are_given_or_ride_behind():
    rows = torch.tensor([3, 0, 1])
    images, labels, fresh, _ = seat(images_of_ones(), LABELS, waiting(), "equal", rows)
    assert labels.tolist() == [0, 9, 0, 7, 0] and fresh.tolist() == [True, False, True, False, True]
    assert images[:, 0, 0, 0].tolist() == [1, -1, 1, -1, 1]
    images, labels, fresh, _ = seat(images_of_ones(), LABELS, waiting(), "extra", rows)
    assert labels.tolist() == [0, 1, 0, 1, 0, 7, 0, 9] and fresh.tolist() == [True] * 5 + [False] * 3
    assert LABELS.tolist() == [0, 1, 0, 1, 0]  # left as they are


@pytest.mark.parametrize("budget", ["equal", "extra"])
def test_seats_leave_images_channels_last(budget):
    images = torch.randn(8, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    copies = Waiting(images[:4].clone(), torch.zeros(4, dtype=torch.long), torch.arange(4) % 2 == 0)
    seated, *_ = seat(images, torch.zeros(8, dtype=torch.long), copies, budget)
    assert seated.is_contiguous(memory_format=torch.channels_last)


def test_mixed_labels_take_their_seats_too():
    _, labels, *_ = seat(images_of_ones(), torch.eye(2)[LABELS], waiting([[0.3, 0.7]] * 3), "equal")
    mixed = [pytest.approx(0.3), pytest.approx(0.7)]
    assert labels.tolist() == [[1, 0], [0, 1], mixed, [0, 1], mixed]


def test_the_loss_is_the_mean_over_valid_images():
    logits, valid = torch.randn(8, 3), torch.arange(8) % 3 > 0
    for labels in (torch.arange(8) % 3, torch.rand(8, 3).softmax(1)):
        expected = F.cross_entropy(logits[valid], labels[valid])
        assert cross_entropy(logits, labels, valid).item() == pytest.approx(expected.item(), rel=1e-6)
        assert cross_entropy(logits, labels).item() == F.cross_entropy(logits, labels).item()


def test_the_blur_is_torchvisions():
    images = torch.rand(2, 3, 40, 40)
    found = blurred(images, 2.0)[..., 10:30, 10:30]  # they differ in what they take to lie beyond the edge
    assert torch.allclose(found, gaussian_blur(images, [21, 21], [2.0, 2.0])[..., 10:30, 10:30], atol=1e-4)
