"""proxy.py: which images, which pixels, what instead, and when."""

import pytest
import torch
import torch.nn.functional as F
from test_data import load

import cam
import proxy
from engine import network, settings
from engine.chance import torch_generator
from engine.loader import Batches, prepare

LABELS = torch.tensor([0, 1, 0, 1, 0])
LOGITS = F.one_hot(torch.tensor([0, 0, 1, 1, 1]), 2).float()  # rows 1, 2 and 4 are misled
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
KEY = (0, 1, 2)

# --- which images


def picked(seats, selection="misled", fresh=None, key=KEY, logits=LOGITS, labels=LABELS, **options):
    fresh = torch.ones(len(labels), dtype=torch.bool) if fresh is None else fresh
    rows, chosen = proxy.select(selection, logits, labels, fresh, seats, key, **options)
    assert rows.shape == chosen.shape == (seats,) and len(set(rows.tolist())) == seats
    return rows[chosen].tolist()


def test_images_that_the_network_gets_wrong_are_selected():
    assert sorted(picked(seats=5)) == [1, 2, 4]


def test_an_erased_image_is_not_erased_again():
    assert sorted(picked(seats=5, fresh=torch.tensor([True, False, True, True, True]))) == [2, 4]


def test_where_too_many_are_misled_chance_decides_and_follows_from_the_key():
    found = {tuple(sorted(picked(seats=2, key=(step,)))) for step in range(50)}
    assert found == {(1, 2), (1, 4), (2, 4)}
    assert picked(seats=2, key=(7,)) == picked(seats=2, key=(7,))


GRADED = torch.tensor([[4.0, 0], [0, 3], [1, 0], [0, 2], [0.5, 0]])  # ever less sure: rows 0, 1, 3, 2, 4


def test_unsure_takes_the_lowest_confidence_first_right_or_wrong():
    assert picked(5, "unsure", logits=GRADED) == [4, 2, 3, 1, 0]
    assert picked(2, "unsure", logits=GRADED) == [4, 2]


def test_loss_takes_the_highest_loss_first():
    labels = torch.tensor([1, 1, 0, 0, 0])  # row 0 is wrong by 4, row 3 by 2
    expected = F.cross_entropy(GRADED, labels, reduction="none").argsort(descending=True).tolist()
    assert picked(5, "loss", logits=GRADED, labels=labels) == expected and expected[:2] == [0, 3]


def test_all_takes_every_fresh_image_in_random_order():
    assert sorted(picked(5, "all")) == [0, 1, 2, 3, 4]
    assert len({picked(1, "all", key=(k,))[0] for k in range(60)}) == 5


def test_control_label_erases_as_many_images_but_any():
    for key in range(100):
        assert len(picked(5, key=(key,), control="label")) == len(picked(5, key=(key,)))
    assert {row for key in range(100) for row in picked(5, key=(key,), control="label")} == {0, 1, 2, 3, 4}
    fresh = torch.tensor([True, False, True, True, True])
    assert all(1 not in picked(5, key=(key,), control="label", fresh=fresh) for key in range(50))


def test_under_mixed_labels_an_image_is_misled_where_neither_class_was_predicted():
    labels = torch.tensor([[0.6, 0.4, 0], [0.6, 0.4, 0], [0.0, 0.5, 0.5]])
    logits = F.one_hot(torch.tensor([1, 2, 0]), 3).float()
    assert sorted(picked(3, logits=logits, labels=labels)) == [1, 2]
    assert cam.true_class(labels).tolist() == [0, 0, 1] and cam.true_class(LABELS) is LABELS


# --- which pixels


def test_the_masks_area_is_the_one_asked_for_and_its_pixels_are_the_hottest():
    heat = torch.rand(4, 30, 41)
    for area in (0.01, 0.1, 0.5, 1.0):
        mask = proxy.pixel_mask(heat, area=area)
        assert mask.sum((1, 2)).eq(round(area * 30 * 41)).all()
        for image, pixels in zip(heat, mask):
            assert pixels.all() or image[pixels].min() >= image[~pixels].max()


def blobs(count=40, size=32):
    """Heat as a CAM of a 4 x 4 grid gives it, with large parts at zero."""
    return cam.upsample(torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(0)).relu(), size)


@pytest.mark.parametrize("control", [None, *proxy.CONTROLS])
def test_where_the_heat_is_zero_nothing_is_erased(control):
    assert not proxy.pixel_mask(torch.zeros(2, 8, 8), 0.3, control, KEY).any()
    assert proxy.pixel_mask(torch.zeros(0, 8, 8), 0.3, control, KEY).shape == (0, 8, 8)
    heat = blobs(6)
    heat[[0, 4]] = 0
    areas = proxy.pixel_mask(heat, 0.1, control, KEY).sum((1, 2)).tolist()
    assert areas == [0, 102, 102, 102, 0, 102]


def outline(mask):
    """A mask cut out along its bounding box."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].tolist()


def test_control_random_keeps_the_shape_and_moves_it_anywhere():
    heat = blobs()
    moved = 0
    for plain, control in zip(proxy.pixel_mask(heat, 0.05), proxy.pixel_mask(heat, 0.05, "random", KEY)):
        assert control.sum() == plain.sum()
        if max(len(outline(plain)), len(outline(plain)[0])) <= 24:  # it has room
            assert outline(control) == outline(plain)
            moved += not torch.equal(control, plain)
    assert moved > 20
    one = torch.zeros(3000, 9, 9, dtype=torch.bool)
    one[:, 3:5, 6] = True
    places = proxy.moved(one, None, torch_generator("cpu", 1)).float().mean(0)  # 8 x 9 of them, equally likely
    assert places[0].mul(72).allclose(torch.ones(9), atol=0.5)  # at the rim one of them covers a pixel
    assert places[4].mul(72).allclose(torch.full((9,), 2.0), atol=0.7)  # inside two do


def test_control_random_shifts_around_the_edge_what_has_no_room():
    mask = torch.rand(20, 16, 16) < 0.3
    control = proxy.moved(mask, None, torch_generator("cpu", 2))
    for plain, found in zip(mask, control):
        shifts = [(down, across) for down in range(16) for across in range(16)]
        assert any(torch.equal(plain.roll(shift, (0, 1)), found) for shift in shifts)


@pytest.mark.parametrize("area", [0.05, 0.1, 0.3, 0.5])
def test_control_coolest_takes_the_least_active_pixels_and_none_of_the_plain_mask(area):
    heat = blobs()
    plain, control = proxy.pixel_mask(heat, area), proxy.pixel_mask(heat, area, "coolest", KEY)
    assert torch.equal(control.sum((1, 2)), plain.sum((1, 2))) and not (plain & control).any()
    for image, pixels in zip(heat, control):
        assert image[pixels].max() <= image[~pixels].min() + 1e-5


def test_coolest_pixels_lie_together_where_many_are_equally_cool():
    def edges(mask):
        return (mask[:, 1:] != mask[:, :-1]).sum() + (mask[:, :, 1:] != mask[:, :, :-1]).sum()

    heat = blobs()
    control = proxy.pixel_mask(heat, 0.1, "coolest", KEY)
    assert edges(control) < 2 * edges(proxy.pixel_mask(heat, 0.1)) < edges(torch.rand(40, 32, 32) < 0.1)


# --- what instead


def scene_of(images, count=None, **changes):
    """A batch of images of alternating classes, the first `count` of them erased."""
    count = len(images) if count is None else count
    heat = torch.rand(count, *images.shape[2:], generator=torch_generator("cpu", "heat"))
    scene = proxy.Scene(heat, torch.ones(count, dtype=torch.bool), torch.arange(count), images,
                        torch.arange(len(images)) % 2, torch.ones(len(images), dtype=torch.bool), -MEAN / STD,
                        (1 - MEAN) / STD, torch_generator("cpu", "test"))
    return scene._replace(**changes)


@pytest.fixture
def images():
    torch.manual_seed(0)
    return (torch.rand(6, 3, 24, 24) - MEAN) / STD


@pytest.fixture
def mask():
    return proxy.hottest(blobs(6, 24), 0.2)


def filled(images, mask, fill, **changes):
    return proxy.FILLS[fill](images, mask, scene_of(images, **changes))


def none_filled(images, mask, fill, **changes):
    """The shape that comes out where no image of the batch is to be filled."""
    return proxy.FILLS[fill](images[:0], mask[:0], scene_of(images, 0, **changes)).shape


def outside(images, mask):
    return images.permute(0, 2, 3, 1)[~mask]


def inside(images, mask):
    return images.permute(0, 2, 3, 1)[mask]


@pytest.mark.parametrize("fill", [f for f in proxy.FILLS if f not in ("transplant", "swap")])
def test_a_fill_changes_the_masked_pixels_of_new_images_and_no_others(fill, images, mask):
    before = images.clone()
    erased = filled(images, mask, fill)
    assert torch.equal(images, before)
    assert torch.equal(outside(erased, mask), outside(images, mask))
    assert (inside(erased, mask) != inside(images, mask)).any(1).float().mean() > 0.95
    assert torch.equal(filled(images, torch.zeros_like(mask), fill), images)
    assert none_filled(images, mask, fill) == (0, 3, 24, 24)


def test_black_is_black(images, mask):
    pixels = filled(images, mask, "black") * STD + MEAN
    assert inside(pixels, mask).abs().max() < 1e-6


def test_mean_is_the_images_own_channel_by_channel(images, mask):
    for image, erased, pixels in zip(images, filled(images, mask, "mean"), mask):
        assert torch.allclose(erased[:, pixels], image.mean((1, 2))[:, None].expand(3, int(pixels.sum())))


def test_noise_has_the_datas_mean_and_spread_and_stays_between_black_and_white():
    images, everywhere = torch.zeros(40, 3, 24, 24), torch.ones(40, 24, 24, dtype=torch.bool)
    wide = {"black": torch.full((1, 3, 1, 1), -9.0), "white": torch.full((1, 3, 1, 1), 9.0)}
    noise = filled(images, everywhere, "noise", **wide)
    assert noise.mean().abs() < 0.02 and noise.std().sub(1).abs() < 0.02
    assert torch.corrcoef(noise.flatten(2).mean(1))[0, 1:].abs().max() < 0.2  # new for every image
    shown = filled(images, everywhere, "noise") * STD + MEAN
    assert shown.min() >= -1e-6 and shown.max() <= 1 + 1e-6


def test_blur_takes_the_shapes_and_leaves_the_colours():
    stripes = torch.zeros(1, 3, 32, 32)
    stripes[..., ::2] = 1.0
    blurred = filled(stripes, torch.ones(1, 32, 32, dtype=torch.bool), "blur")
    assert blurred.std() < 0.1 * stripes.std() and blurred.mean().item() == pytest.approx(0.5, abs=0.02)


def test_blend_multiplies_pixel_values_by_one_minus_the_heat(images, mask):
    heat = blobs(6, 24)
    pixels = filled(images, mask, "blend", heat=heat) * STD + MEAN
    expected = (images * STD + MEAN) * (1 - heat[:, None])
    assert torch.allclose(inside(pixels, mask), inside(expected, mask), atol=1e-5)
    assert torch.equal(filled(images, mask, "blend", heat=torch.zeros(6, 24, 24)), images)


def test_other_takes_the_same_place_of_a_fresh_image_of_another_class(images, mask):
    fresh = torch.tensor([True, True, True, False, True, True])
    seen = set()
    for key in range(40):
        erased = filled(images, mask, "other", fresh=fresh, generator=torch_generator("cpu", key))
        for i, pixels in enumerate(mask):
            donors = [j for j in range(6) if torch.equal(erased[i][:, pixels], images[j][:, pixels])]
            assert len(donors) == 1 and donors[0] % 2 != i % 2 and donors[0] != 3
            seen.add((i, donors[0]))
    assert len(seen) == 3 * 3 + 3 * 2  # every image that may give does
    alone = filled(images, mask, "other", classes=torch.zeros(6, dtype=torch.long))
    assert torch.equal(alone, filled(images, mask, "black"))


def test_transplant_makes_noise_of_the_own_hot_pixels_and_pastes_anothers_at_their_place(images, mask):
    chosen = torch.tensor([True, False, True, True, False, True])
    seen = set()
    for key in range(40):
        noise, erased = (filled(images, mask, fill, chosen=chosen, generator=torch_generator("cpu", key))
                         for fill in ("noise", "transplant"))
        for i in chosen.nonzero()[:, 0].tolist():
            donors = [j for j in range(6) if j != i and torch.equal(erased[i][:, mask[j]], images[j][:, mask[j]])]
            assert len(donors) == 1 and chosen[donors[0]]
            elsewhere = ~mask[donors[0]]
            assert torch.equal(erased[i][:, elsewhere], noise[i][:, elsewhere])
            seen.add((i, donors[0]))
    assert len(seen) == 4 * 3
    alone = torch.tensor([False, True] + [False] * 4)
    lonely = {fill: filled(images, mask, fill, chosen=alone)[1] for fill in ("noise", "transplant")}
    assert torch.equal(lonely["noise"], lonely["transplant"])
    assert none_filled(images, mask, "transplant") == (0, 3, 24, 24)


def test_swap_takes_own_and_the_others_hot_pixels_from_one_chosen_image_of_another_class(images, mask):
    chosen, classes = torch.tensor([True, False, True, True, False, True]), torch.tensor([0, 1, 0, 1, 2, 1])
    seen = set()
    for key in range(40):
        generator = torch_generator("cpu", key)
        erased = filled(images, mask, "swap", chosen=chosen, classes=classes, generator=generator)
        for i in chosen.nonzero()[:, 0].tolist():
            swapped = [torch.where(mask[i] | mask[j], images[j], images[i]) for j in range(6)]
            donors = [j for j in range(6) if torch.equal(erased[i], swapped[j])]
            assert len(donors) == 1 and chosen[donors[0]] and classes[donors[0]] != classes[i]
            seen.add((i, donors[0]))
    assert seen == {(0, 3), (0, 5), (2, 3), (2, 5), (3, 0), (3, 2), (5, 0), (5, 2)}
    alike = filled(images, mask, "swap", classes=torch.zeros(6, dtype=torch.long))
    assert torch.equal(outside(alike, mask), outside(images, mask))
    assert (inside(alike, mask) != inside(images, mask)).any(1).float().mean() > 0.95
    assert none_filled(images, mask, "swap") == (0, 3, 24, 24)


# --- a control differs from the run it controls in one thing


def copies_of(control):
    """What one step of digits erases, through the program's own path. Returns rows, chosen, copies, heat and mask."""
    config = settings.resolve(settings.read_configs(), {"fill": "noise", "control": control, "explain": "predicted"})
    torch.manual_seed(0)
    model, _ = network.build_network(config, 10)
    dataset = load("digits", None)
    pixels, labels = next(iter(Batches(dataset, dataset.ids[:64], 32, 64, torch.device("cpu"))))
    images, fresh = prepare(pixels, MEAN, STD), torch.ones(64, dtype=torch.bool)
    with cam.CAM(model, config["cam"]) as explain:
        p = proxy.Proxy(config, explain, (MEAN, STD), seats=24)
        p.key = KEY
        logits = model(images)
        rows, chosen = p.select(logits, labels, fresh)
        return rows, chosen, *p.erased(images, labels, fresh, logits, rows, chosen)


@pytest.mark.parametrize("control", ["random", "coolest"])
def test_controls_of_the_place_keep_images_count_area_heat_and_noise(control):
    rows, chosen, copies, heat, mask = copies_of(None)
    rows2, chosen2, copies2, heat2, mask2 = copies_of(control)
    assert torch.equal(rows, rows2) and torch.equal(chosen, chosen2) and torch.equal(heat, heat2)
    assert torch.equal(copies.labels, copies2.labels) and torch.equal(copies.taken, copies2.taken)
    assert torch.equal(mask.sum((1, 2)), mask2.sum((1, 2))) and not torch.equal(mask, mask2)
    both = mask & mask2
    assert both.any() or control == "coolest"
    assert torch.equal(inside(copies.images, both), inside(copies2.images, both))  # the noise of a pixel is the same


def test_control_label_keeps_count_area_and_the_right_pixels_of_the_images_it_draws():
    _, chosen, copies, _, mask = copies_of(None)
    rows, chosen2, copies2, heat2, mask2 = copies_of("label")
    assert chosen.sum() == chosen2.sum() and copies.taken.sum() == copies2.taken.sum()
    assert torch.equal(mask2, proxy.pixel_mask(heat2, 0.1))
    assert torch.equal(mask.sum((1, 2))[copies.taken], mask2.sum((1, 2))[copies2.taken])


# --- when


def on(schedule, epochs, accuracies=None):
    accuracies = [0.0] * epochs if accuracies is None else accuracies
    name, argument = proxy.read_schedule(schedule)
    return "".join(".X"[proxy.SCHEDULES[name](epoch, argument, accuracies[:epoch])] for epoch in range(epochs))


def test_schedules_give_the_epochs_in_which_images_are_erased():
    assert on(None, 4) == "XXXX"
    assert on("every:3", 7) == "..X..X."
    assert on("after:2", 4) == "..XX"
    assert on("2,p,1,p", 5) == "..X.X"
    assert on("20,p,19", 40) == "." * 20 + "X" + "." * 19
    assert on("5,p,9,p,9,p,9,p,4", 40) == ".....X.........X.........X.........X...."


def test_plateau_switches_on_when_validation_accuracy_stops_rising_and_stays_on():
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert on("plateau", 6, rising) == "......"
    assert on("plateau", 8, [0.1, 0.5, 0.5, 0.4, 0.5, 0.9, 0.95, 0.96]) == ".....XXX"  # three epochs at most 0.5
    assert on("plateau:2", 6, [0.1, 0.5, 0.5, 0.4, 0.5, 0.9]) == "....XX"


@pytest.mark.parametrize("text", ["every:0", "every", "every:x", "after:-1", "plateau:0", "20,q,19", "20;p", "", "p:3",
                                  "1.5,p"])
def test_a_schedule_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="expected"):
        proxy.read_schedule(text)
