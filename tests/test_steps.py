"""proxy.py: `STEPS`, called as the loop calls them, and the `Proxy` that they work with."""

import pytest
import timm
import torch
import torch.nn.functional as F

import cam
import proxy
from engine import costs
from engine.erasing import statistics_kept

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
KEY, CLASSES = (0, 1, 2), 5
SETTINGS = {"select": "misled", "control": None, "explain": "predicted", "area": 0.1, "fill": "black",
            "budget": "equal", "schedule": None, "step": "online"}
BUDGETS = pytest.mark.parametrize("budget", ["equal", "extra"])


def network(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=CLASSES).eval()


@pytest.fixture
def net():
    return network()


def batch(seed, count=8):
    """Normalised images and their labels."""
    chance = torch.Generator().manual_seed(seed)
    images = (torch.rand(count, 3, 64, 64, generator=chance) - MEAN) / STD
    return images, torch.randint(0, CLASSES, (count,), generator=chance)


def proxy_of(net, heat_net=None, seats=None, counts=None, **changes):
    explain = cam.CAM(heat_net or net, "gradcam")
    made = proxy.Proxy(SETTINGS | changes, explain, (MEAN, STD), seats, heat_net, counts)
    made.key = KEY
    return made


def erased_of(net, images, labels, fresh=None, **changes):
    """rows, chosen, and what `Proxy.erased` gives of a batch: copies, heat and mask."""
    p, fresh = proxy_of(net, **changes), torch.ones(len(labels), dtype=torch.bool) if fresh is None else fresh
    with p.explain:
        logits = net(images)
        rows, chosen = p.select(logits, labels, fresh)
        return rows, chosen, *p.erased(images, labels, fresh, logits, rows, chosen)


def alike(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def counts():
    return costs.Counts(torch.device("cpu"), costs.Energy(torch.device("cpu"), powercap="/none"))


def simple_seats(batch, copies, budget, rows=None):
    """Images and labels of a batch with the copies that are taken, and no others, in it."""
    if budget == "equal":
        return proxy.seat(*batch, copies, budget, rows)[:2]
    return tuple(torch.cat([own, more[copies.taken]]) for own, more in zip(batch, copies[:2]))


def simple_loss(net, *seats):
    images, labels = simple_seats(*seats)
    return F.cross_entropy(net(images), labels).item()


# --- online


def test_online_erases_what_erased_gives_and_its_copies_wait(net):
    images, labels = batch(1)
    p = proxy_of(net)
    trained = proxy.STEPS["online"](net, images, labels, p)
    _, chosen, copies, _, _ = erased_of(net, images, labels)
    assert alike(p.waiting, copies) and chosen.any() and torch.equal(copies.taken, chosen)
    assert trained.fresh.all() and len(trained.fresh) == 8 and trained.second_pass == 0
    trained.loss.backward()
    found = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    F.cross_entropy(net(images), labels).backward()  # this batch is trained on as it came
    assert alike(found, [parameter.grad for parameter in net.parameters()])


@pytest.mark.parametrize("explain", cam.EXPLAIN)
def test_what_is_erased_is_made_of_selection_heat_mask_and_fill(explain, net):
    images, labels = batch(1)
    rows, chosen, copies, heat, mask = erased_of(net, images, labels, explain=explain)
    logits = net(images)
    assert torch.equal(rows[chosen].sort().values, (logits.argmax(1) != labels).nonzero()[:, 0])
    with cam.CAM(net, "gradcam") as by_hand:
        logits = net(images)
        classes, against = cam.EXPLAIN[explain](logits[rows], labels[rows])
        assert torch.equal(heat, cam.upsample(by_hand(logits, rows, classes, against), 64))
    shown = heat.amax((1, 2)) > 0
    assert torch.equal(mask, proxy.hottest(heat, 0.1) & shown[:, None, None])
    assert torch.equal(copies.taken, chosen & shown) and shown.any()
    assert torch.equal(copies.images, torch.where(mask[:, None], -MEAN / STD, images[rows]))
    assert torch.equal(copies.labels, labels[rows])


@BUDGETS
def test_waiting_copies_are_in_the_next_batch_once_and_are_not_erased_again(budget, net):
    first, second = batch(1), batch(2)
    p = proxy_of(net, budget=budget)
    proxy.online(net, *first, p)
    copies = p.waiting
    trained = proxy.online(net, *second, p)
    images, labels, fresh, valid = proxy.seat(*second, copies, budget)
    assert torch.equal(trained.fresh, fresh) and copies.taken.any() and not copies.taken.all()
    assert len(fresh) == (8 if budget == "equal" else 16)
    assert trained.loss.item() == pytest.approx(simple_loss(net, second, copies, budget), rel=1e-6)
    rows, _, expected, _, _ = erased_of(net, images, labels, fresh, budget=budget)
    assert alike(p.waiting, expected) and fresh[rows[expected.taken]].all()


@BUDGETS
def test_a_plain_step_trains_on_the_copies_that_wait_and_erases_none(budget, net):
    first, second = batch(1), batch(2)
    p = proxy_of(net, budget=budget)
    proxy.online(net, *first, p)
    copies, fresh = p.waiting, proxy.seat(*second, p.waiting, budget)[2]
    trained = proxy.plain(net, *second, p)
    assert p.waiting is None and torch.equal(trained.fresh, fresh) and not fresh.all()
    assert trained.loss.item() == pytest.approx(simple_loss(net, second, copies, budget), rel=1e-6)
    assert len(proxy.plain(net, *second, p).fresh) == 8  # and from then on the batch is as it was


def test_at_most_as_many_copies_wait_as_there_are_seats(net):
    images, labels = batch(1)
    p = proxy_of(net, seats=2, select="all")
    proxy.online(net, images, labels, p)
    assert len(p.waiting.taken) == 2 and p.waiting.taken.all()


@pytest.mark.parametrize("step", ["online", "same_step"])
@BUDGETS
def test_where_nothing_is_misled_nothing_is_erased(step, budget, net):
    images, _ = batch(1)
    labels, p = net(images).argmax(1), proxy_of(net, budget=budget)
    for _ in range(2):
        trained = proxy.STEPS[step](net, images, labels, p)
        assert trained.fresh.sum() == 8 and (trained.valid is None or torch.equal(trained.valid, trained.fresh))
        assert trained.loss.item() == pytest.approx(F.cross_entropy(net(images), labels).item(), rel=1e-6)


def test_where_the_heat_is_zero_no_copy_is_taken(net):
    images, labels = batch(1)
    torch.nn.init.zeros_(net.get_classifier().weight)
    p = proxy_of(net, select="all")
    proxy.online(net, images, labels, p)
    assert not p.waiting.taken.any()


def test_copies_of_mixed_images_keep_their_mixed_labels(net):
    images, labels = batch(1)
    shares = 0.6 * F.one_hot(labels, CLASSES) + 0.4 * F.one_hot(labels.roll(1), CLASSES)
    p = proxy_of(net)
    trained = proxy.online(net, images, shares, p)
    rows, _, copies, _, _ = erased_of(net, images, shares)
    assert alike(p.waiting, copies) and torch.equal(p.waiting.labels, shares[rows]) and copies.taken.any()
    assert trained.loss.item() == F.cross_entropy(net(images), shares).item()


# --- in the same step


@BUDGETS
def test_same_step_trains_on_its_copies_at_once_in_a_second_pass(budget, net):
    images, labels = batch(1)
    p = proxy_of(net, budget=budget, counts=counts())
    trained = proxy.STEPS["same_step"](net, images.clone(), labels, p)
    rows, _, copies, _, _ = erased_of(net, images, labels)
    wrong = int(copies.taken.sum())
    fresh = proxy.seat(images.clone(), labels, copies, budget, rows)[2]
    assert p.waiting is None and torch.equal(trained.fresh, fresh) and 0 < wrong < 8
    assert trained.loss.item() == pytest.approx(simple_loss(net, (images, labels), copies, budget, rows), rel=1e-6)
    assert len(fresh) == (8 if budget == "equal" else 16) and trained.second_pass == 8
    assert (p.counts.so_far()["fresh"], p.counts.so_far()["wrong"]) == (8, wrong)


@BUDGETS
def test_another_networks_heat_erases_what_another_network_shows_and_trains_the_one_in_training(budget, net):
    images, labels = batch(1)
    other = network(7).requires_grad_(False)
    p = proxy_of(net, other, budget=budget, counts=counts())
    trained = proxy.of_another(net, images.clone(), labels, p)
    rows, _, copies, _, _ = erased_of(other, images, labels)
    assert not torch.equal(net(images).argmax(1), other(images).argmax(1))  # they are misled by other images
    joined, of_joined = simple_seats((images, labels), copies, budget, rows)
    logits = net(joined)
    assert p.waiting is None and copies.taken.any() and trained.second_pass == 8
    assert trained.loss.item() == pytest.approx(F.cross_entropy(logits, of_joined).item(), rel=1e-6)
    trained.loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in other.parameters())
    found = p.counts.so_far()  # the network in training meets these images once, copies and all
    assert (found["fresh"], found["wrong"]) == (len(joined), (logits.argmax(1) != of_joined).sum())


@BUDGETS
def test_the_pass_for_the_heat_of_same_step_leaves_batch_norms_statistics_alone(budget, net):
    images, labels = batch(1)
    other, p = network().train(), proxy_of(net.train(), budget=budget)
    kept = []
    p.join = lambda *arguments: kept.append(proxy.Proxy.join(p, *arguments)) or kept[0]
    loss = proxy.STEPS["same_step"](net, images, labels, p).loss
    expected = proxy.cross_entropy(other(kept[0][0]), kept[0][1], kept[0][3])  # one plain pass over the joined batch
    assert torch.equal(loss, expected)
    assert len(list(net.buffers())) > 20 and alike(net.buffers(), other.buffers())


def test_what_passes_for_its_heat_is_normalised_by_its_batch(net):
    images, _ = batch(1)
    with statistics_kept(net.train()):
        assert torch.equal(net(images), network().train()(images))
        assert torch.equal(net.eval()(images), network()(images))


@pytest.mark.slow
def test_a_compiled_network_leaves_its_statistics_alone_too(net):
    images, _ = batch(1)
    compiled, kept = torch.compile(net.train(), backend="eager"), [b.clone() for b in net.buffers()]
    with statistics_kept(net):
        first = compiled(images)
    assert alike(net.buffers(), kept) and torch.equal(compiled(images), first) and not alike(net.buffers(), kept)
    with statistics_kept(net):
        kept = [b.clone() for b in net.buffers()]
        compiled(images)
    assert alike(net.buffers(), kept)


# --- which step


def test_settings_and_schedule_decide_which_step_is_taken(net):
    assert proxy_of(net).step(0, []) is proxy.online
    for name in proxy.STEPS:
        assert proxy_of(net, step=name).step(0, []) is proxy.STEPS[name]
        steps = [proxy_of(net, schedule="after:2", step=name).step(epoch, [0.5] * epoch) for epoch in range(4)]
        assert steps[:2] == [proxy.plain] * 2 and steps[2] is steps[3] is not proxy.plain
    assert proxy.Proxy(SETTINGS, None, (MEAN, STD)).step(0, []) is proxy.plain


@pytest.mark.parametrize("step", ["plain", "online"])
def test_misled_images_are_counted_among_the_fresh_ones_alone(step, net):
    first, second = batch(1), batch(2)
    p = proxy_of(net)
    proxy.online(net, *first, p)
    images, labels, fresh, _ = proxy.seat(*second, p.waiting, "equal")
    wrong = (net(images).argmax(1) != labels) & fresh
    p.counts = counts()
    getattr(proxy, step)(net, *second, p)
    assert (p.counts.so_far()["fresh"], p.counts.so_far()["wrong"]) == (fresh.sum(), wrong.sum())


@pytest.mark.parametrize("step", ["online", "same_step"])
def test_under_budget_extra_seats_that_no_copy_takes_are_not_counted(step, net):
    p, seen, erased, losses = proxy_of(net, budget="extra", step=step, counts=counts()), 0, 0, 0.0
    for seed in (1, 2, 3):
        trained = p.step(0, [])(net, *batch(seed), p)
        p.counts.add(trained, True, torch.tensor(False))
        valid, fresh = (trained.fresh if trained.valid is None else trained.valid), trained.fresh
        seen, erased = seen + int(valid.sum()), erased + int((valid & ~fresh).sum())
        losses += trained.loss.item() * int(valid.sum())
    totals = p.counts.totals()
    assert (totals["images_seen"], totals["erased_images"]) == (seen, erased) and seen == 24 + erased
    assert totals["train_loss"] == pytest.approx(losses / seen) and erased and not valid.all()


@pytest.mark.parametrize("changes", [{"fill": "noise"}, {"control": "random"}, {"control": "label"}])
def test_what_is_left_to_chance_in_a_step_follows_from_its_key_alone(changes, net):
    images, labels = batch(1)
    waiting = []
    for key in (KEY, KEY, (0, 1, 3)):
        p = proxy_of(net, seats=2, select="unsure", **changes)
        p.key = key
        proxy.online(net, images, labels, p)
        waiting.append(p.waiting)
    assert alike(waiting[0], waiting[1]) and not torch.equal(waiting[0].images, waiting[2].images)


@BUDGETS
def test_with_the_loss_explained_copies_come_from_its_own_backward_pass(budget, net, monkeypatch):
    first, second, p = batch(1), batch(2), proxy_of(net, explain="loss", budget=budget)
    expected = [erased_of(net, *first, explain="loss")[2]]
    images, labels, fresh, _ = proxy.seat(*second, expected[0], budget)
    expected.append(erased_of(net, images, labels, fresh, explain="loss")[2])
    monkeypatch.setattr(torch.autograd, "grad", None)  # no walk for the heat
    for images_and_labels, copies in zip((first, second), expected):
        trained = proxy.online(net, *images_and_labels, p)
        assert p.waiting is None and trained.second_pass == 0
        (512 * trained.loss / 2).backward()  # scaled, and one of two batches
        assert torch.equal(p.waiting.taken, copies.taken) and copies.taken.any()
        assert torch.equal(p.waiting.labels, copies.labels)
        differ = (p.waiting.images != copies.images)[copies.taken]
        assert differ.float().mean() < 0.005  # where two places are equally hot, but for rounding
    assert not p.explain.activations
