"""snapshot.py: whether a network follows a few pixels, and what a run does with the answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cam
import data
import eval as evaluation
import proxy
import snapshot
import train
from engine import files, loader, network, policies, settings
from engine.checkpoint import load_checkpoint
from engine.decoy import draw_decoy
from engine.folder import open_run, read_log
from engine.loader import prepare, to_float
from study import appendix, arms

SMALL = ["--dataset", "faint_digits", "--train-fraction", "0.5", "--epochs", "4"]
ONCE = ["--heat", "snapshot", "--schedule", "after:1"]
ALWAYS, NEVER = -2, 2  # thresholds
NUMBERS = ("train_loss", "val_loss", "lr", "images_seen", "optimizer_steps", "misled")


def same_bits(*folders):
    a, b = (load_checkpoint(folder / "last.pt")["model"] for folder in folders)
    return all(torch.equal(a[key], b[key]) for key in a)


def numbers(folder):
    return [[line[key] for key in NUMBERS] for line in read_log(folder)]


# --- follows


def images_with_squares(count=12, side=32):
    """Dark images, each with a square of its class's channel at a place of its own, their labels, and heat there."""
    chance = torch.Generator().manual_seed(0)
    images, heat = 0.1 * torch.rand(count, 3, side, side, generator=chance), torch.zeros(count, side, side)
    labels = torch.arange(count) % 3
    for image, label, warm, (y, x) in zip(images, labels, heat, torch.randint(side - 5, (count, 2), generator=chance)):
        image[:, y:y + 5, x:x + 5], warm[y:y + 5, x:x + 5] = 0, 1
        image[label, y:y + 5, x:x + 5] = 0.75
    return images, labels, heat


def told_by_squares(images):
    """Logits that count the pixels of just the squares' colours."""
    colours = 0.75 * torch.eye(3)
    return (images[:, None] - colours[..., None, None]).abs().amax(2).lt(1e-3).sum((2, 3)).float()


def asked(forward, config=None):
    config = {"area": 25 / 32**2, "seed": 0} | (config or {})
    return SimpleNamespace(forward=forward, config=config, mean=torch.zeros(1, 3, 1, 1), std=torch.ones(1, 3, 1, 1))


def test_a_network_that_goes_by_the_hot_pixels_says_the_donors_class_and_at_random_places_does_not():
    images, labels, heat = images_with_squares()
    logits = told_by_squares(images)
    assert torch.equal(logits.argmax(1), labels)
    donor, known, hot, other = snapshot.pairs(asked(told_by_squares), images, labels, logits, heat, (0, 0))
    assert known.all() and hot.all() and (donor != labels).all()
    assert other.float().mean() < 0.3  # where both random places happen to hit the squares


def test_a_network_that_goes_by_all_of_an_image_follows_no_pixels():
    images, labels, heat = images_with_squares()
    images = images + 0.2 * labels[:, None, None, None]

    def forward(images):
        return -(images.mean((1, 2, 3))[:, None] - (0.05 + 0.2 * torch.arange(3))).abs()

    logits = forward(images)
    _, known, hot, other = snapshot.pairs(asked(forward), images, labels, logits, heat, (0, 0))
    assert known.all() and not hot.any() and not other.any()


def test_a_donor_that_is_not_recognised_or_has_no_heat_makes_no_pair():
    images, labels, heat = images_with_squares()
    heat[labels == 1] = 0
    logits = told_by_squares(images)
    logits[labels == 2] = torch.tensor([1.0, 0, 0])
    donor, known, *_ = snapshot.pairs(asked(told_by_squares), images, labels, logits, heat, (0, 0))
    assert torch.equal(known, donor == 0) and known.any() and not known[labels == 0].any()


def test_so_many_pairs_tell_a_difference_of_shares_to_within_5_points():
    assert 1.96 / snapshot.PAIRS**0.5 <= 0.05 < 1.96 / (snapshot.PAIRS - 2) ** 0.5  # its deviation is at most 1


def test_a_snapshot_takes_its_batch_statistics_anew_and_the_run_keeps_its_own(transplanted):
    run = open_run(transplanted)
    ids, model = run.split["train"], run.network()
    model.load_state_dict(load_checkpoint(transplanted / "heat.pt")["model"])
    mean, std = network.normalisation(run.config, model)
    batches = loader.Batches(run.dataset(), ids, run.config["image_size"], len(ids), torch.device("cpu"))
    (pixels, _), = batches
    seen = []
    model.bn1.register_forward_pre_hook(lambda module, args: seen.append(args[0].mean((0, 2, 3))))
    with torch.no_grad():
        model(prepare(pixels, mean, std))
    assert torch.allclose(model.bn1.running_mean, seen[0], atol=0.05 * seen[0].abs().max())
    assert not torch.equal(run.network().bn1.running_mean, model.bn1.running_mean)


def test_the_interval_of_follows_covers_what_it_should():
    random = np.random.default_rng(0)
    for up, down, count in ((0.3, 0.05, 40), (0.02, 0.02, 300), (0.9, 0.0, 12), (0.5, 0.1, 1500)):
        draws = random.choice([1.0, -1.0, 0.0], (2000, count), p=[up, down, 1 - up - down])
        covered = np.mean([low <= up - down <= high for low, high in map(snapshot.interval, draws)])
        assert 0.93 < covered < 0.995
    low, high = snapshot.interval(np.zeros(0))
    assert low < -0.9 and high > 0.9  # of no pair nothing is known


# --- heat that moves with its image


def config_of(augment, **entry):
    return {"augment": augment, "dataset_entry": {"augment": {"flip": True, "rotate": 30, "shift": 0.2} | entry}}


def test_heat_moves_as_light_moves_its_image():
    grid, config, key = torch.rand(6, 8, 8), config_of("light"), (0, 1, 2)
    at_size = F.interpolate(grid[:, None], (40, 40), mode="bilinear", align_corners=False)
    pixels = (255 * at_size).round().to(torch.uint8).expand(-1, 3, -1, -1)
    images = data.AUGMENTATIONS["light"](pixels, config["dataset_entry"]["augment"], key)
    assert (data.moved(at_size[:, 0], 40, config, key) - images[:, 0]).abs().max() < 1 / 255
    assert (data.moved(grid, 40, config, key) - images[:, 0]).abs().mean() < 0.02  # in one interpolation, not two
    second = data.moved(grid[3:], 40, config, key, (3, 6))
    assert torch.equal(second, data.moved(grid, 40, config, key)[3:])  # of a batch that two processes share


@pytest.mark.parametrize("name", [name for name, (function, _) in policies.OPERATIONS.items()])
def test_heat_moves_as_a_policys_operation_moves_its_image(name, monkeypatch):
    magnitude = {"Rotate": 25.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 9.0, "TranslateY": 9.0,
                 "Posterize": 4.0}.get(name, 0.5)
    monkeypatch.setattr(policies, "drawn", lambda transform, count, *_: [[(name, magnitude)]] * count)
    data.operations.cache_clear()
    spot = torch.zeros(2, 40, 40)
    spot[0, 12:16, 20:24] = spot[1, 25:29, 10:14] = 1
    images = (200 * spot[:, None]).to(torch.uint8).expand(-1, 3, -1, -1)
    seen = to_float(policies.changed(images, policies.drawn(None, 2)))[:, 0]
    seen = (seen - seen.flatten(1).median(1).values[:, None, None]).abs() > 0.2
    seen &= (policies.changed(torch.ones_like(images), policies.drawn(None, 2))[:, 0] != policies.GREY)  # from outside
    found = data.moved(spot, 40, config_of("randaugment"), (0, 0, 0)) > 0.5
    data.operations.cache_clear()
    if name != "Posterize" or seen.any():
        assert (found & seen).sum() > 0.6 * (found | seen).sum()


def test_every_augmentation_says_where_it_takes_heat():
    assert data.MOVES.keys() == data.AUGMENTATIONS.keys()


# --- runs


@pytest.fixture
def threshold(monkeypatch):
    return lambda value: monkeypatch.setattr(snapshot, "THRESHOLD", value)


def test_below_the_threshold_a_run_is_one_without_proxy_attention_to_the_last_bit(trained, threshold):
    threshold(NEVER)
    asking = trained(*SMALL, "--heat", "snapshot", epochs=4)
    plain = trained(*SMALL, "--cam", "none", epochs=4)
    assert same_bits(asking, plain) and numbers(asking) == numbers(plain)
    metrics = files.read_json(asking / "metrics.json")
    found, cost = metrics["snapshot"], metrics["cost"]
    assert not found["transplants"] and cost["erased_images"] == 0
    answers = [*found["before"], found]
    assert [answer["epoch"] for answer in answers] == [1, 2, 3]  # after each quarter
    assert [line.get("follows") for line in read_log(asking)] == [None, *(answer["follows"] for answer in answers)]
    each = 3 * found["asked"] + len(open_run(asking).split["train"]) // 32 * 32
    assert cost["second_pass_images"] == 3 * each and found["images"] == each
    assert not (asking / "heat.pt").exists() and not (asking / "snapshot.npz").exists()


@pytest.fixture
def transplanted(trained, threshold):
    threshold(ALWAYS)
    return trained(*SMALL, *ONCE, "--decoy", epochs=4)


@pytest.mark.pictures
def test_above_it_every_image_is_transplanted_from_there_on_and_the_learning_rate_begins_anew(transplanted, capsys):
    log, found = read_log(transplanted), files.read_json(transplanted / "metrics.json")["snapshot"]
    assert [line["erased_images"] == line["images_seen"] for line in log] == [False, True, True, True]
    assert log[0]["erased_images"] == 0 and log[0]["lr"] > log[-1]["lr"] and log[1]["lr"] > log[3]["lr"]
    images = files.read_json(transplanted / "metrics.json")["cost"]["second_pass_images"]
    train_images = len(open_run(transplanted).split["train"])
    assert images == found["images"] == 3 * found["asked"] + train_images // 32 * 32 + train_images
    assert evaluation.main([str(transplanted)]) == 0
    assert "the network after 1 epochs follows" in capsys.readouterr().out and (transplanted / "sheet.png").exists()


@pytest.mark.pictures
def test_a_report_has_each_answer_and_what_the_best_and_worst_run_transplanted(transplanted):
    result = arms.read_result(transplanted)
    table, least, most = appendix.asked(SimpleNamespace(results=[("snapshot", result), ("again", result)]))
    follows = result.metrics["snapshot"]["follows"]
    assert [row[:4] for row in table.rows] == [[arm, 0, 1, f"{100 * follows:+.1f}"] for arm in ("snapshot", "again")]
    assert (least.name, most.name) == ("sheet-least", "sheet-most") and "run" in least.caption
    assert appendix.asked(SimpleNamespace(results=[])) == []


def test_the_heat_that_is_kept_is_that_of_the_snapshot_image_by_image(transplanted):
    run = open_run(transplanted)
    assert run.config["layer"] == "layer3" and run.config["schedule"] == "after:1"
    grids = files.read_arrays(transplanted / "snapshot.npz")["grids"]
    model = run.network()
    model.load_state_dict(load_checkpoint(transplanted / "heat.pt")["model"])
    dataset, size = run.dataset(), run.config["image_size"]
    dataset.decoy = draw_decoy(dataset, run.split, 1, 0)
    mean, std = network.normalisation(run.config, model)
    for number in (0, 7, len(grids) - 1):
        batch = loader.Batches(dataset, [run.split["train"][number]], size, 1, torch.device("cpu"))
        pixels, labels = next(iter(batch))
        with cam.CAM(model, "elementwise", "layer3") as explain:
            logits = model(prepare(pixels, mean, std))
            best = logits[0].detach().clone()
            best[labels] = -torch.inf
            expected = explain(logits, None, labels, best.argmax()[None])
        assert grids[number] == pytest.approx(expected[0].numpy(), abs=2e-3)




MOMENTS = {"in the test": (snapshot, "pairs"), "in the pass": (snapshot, "heat_of_all"),
           "before it is written": (files, "write_arrays"), "before the answer": (files, "write_json"),
           "before the first step": (proxy, "of_snapshot")}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_cut_off_at_any_moment_ends_with_the_same_bits(moment, transplanted, tmp_path, monkeypatch):
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)

    def cut(*arguments):
        if name != "write_json" or str(arguments[0]).endswith("snapshot.json"):
            raise KeyboardInterrupt
        return original(*arguments)

    arguments = [*SMALL, *ONCE, "--decoy", "--out", str(tmp_path), "--name", "cut"]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        assert train.main(arguments) == 130
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert same_bits(tmp_path / "cut", transplanted) and numbers(tmp_path / "cut") == numbers(transplanted)


@pytest.mark.slow
@pytest.mark.parametrize("answer", [ALWAYS, NEVER])
def test_it_goes_on_from_any_epoch_and_asks_again_where_the_checkpoint_lies_before_the_answer(answer, threshold,
                                                                                               trained, tmp_path,
                                                                                               monkeypatch):
    threshold(answer)
    asks = [*SMALL, "--heat", "snapshot", "--schedule", "every:1" if answer == NEVER else "after:2"]
    whole = trained(*asks, epochs=4)
    for last in (2, 3):
        with monkeypatch.context() as patch:
            def cut(line, stage, last=last):
                if line["epoch"] == last:
                    raise KeyboardInterrupt
            patch.setattr(train, "print_epoch", cut)
            assert train.main([*asks, "--out", str(tmp_path), "--name", f"{last}"]) == 130
        folder = tmp_path / f"{last}"
        if last == 2:  # the checkpoint after it is damaged: that after the first epoch serves
            (folder / "last.pt").write_bytes(b"damaged")
            path = folder / "snapshot.json"
            answers = files.read_json(path) if path.exists() else []
            files.write_json(path, [*answers, {"epoch": 2, "transplants": answer == NEVER}])
        assert train.main(["--resume", str(folder)]) == 0
        assert same_bits(folder, whole) and numbers(folder) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name, harm", [
    ("snapshot.json", lambda path: path.unlink()), ("snapshot.json", lambda path: path.write_text("[{]")),
    ("snapshot.npz", lambda path: path.unlink()), ("snapshot.npz", lambda path: path.write_bytes(b"PK"))])
def test_a_file_of_a_snapshot_that_is_gone_or_damaged_is_named(name, harm, threshold, tmp_path, monkeypatch, capsys):
    threshold(ALWAYS)
    with monkeypatch.context() as patch:
        def cut(line, stage):
            if line["epoch"] == 3:
                raise KeyboardInterrupt
        patch.setattr(train, "print_epoch", cut)
        assert train.main([*SMALL, *ONCE, "--out", str(tmp_path), "--name", "cut"]) == 130
    harm(tmp_path / "cut" / name)
    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "cut")]) == 2
    line = capsys.readouterr().err
    assert f"{tmp_path}/cut/{name}" in line and line.count("\n") == 1


@pytest.mark.slow
def test_two_processes_share_the_pass_and_give_one_run(train_process, tmp_path):
    arguments = ["--model", "test_vit", "--no-pretrained", "--image-size", "64", *SMALL, *ONCE, "--decoy",
                 "--out", tmp_path]
    for ranks in (1, 2):
        process = train_process([*arguments, "--name", ranks], ranks=ranks, target=always)
        assert process.wait() == 0, process.output()
    one, two = (files.read_arrays(tmp_path / name / "snapshot.npz")["grids"] for name in "12")
    assert one.shape == two.shape and abs(one - two).mean() < 0.01  # whose weights differ by rounding
    assert [line["erased_images"] for line in read_log(tmp_path / "1")] == \
        [line["erased_images"] for line in read_log(tmp_path / "2")]


def always(*arguments):
    from conftest import _train_main
    snapshot.THRESHOLD = ALWAYS
    _train_main(*arguments)


@pytest.mark.slow
def test_a_square_is_found_and_unlearnt_and_where_there_is_none_nothing_is_done(trained):
    square = trained("--dataset", "faint_digits", "--heat", "snapshot", "--decoy", epochs=40)
    found = files.read_json(square / "metrics.json")
    assert found["snapshot"]["transplants"] and found["test"]["accuracy"] > 0.7
    clean = trained("--dataset", "faint_digits", "--heat", "snapshot", epochs=40)
    assert not files.read_json(clean / "metrics.json")["snapshot"]["transplants"]


def test_the_settings_of_a_snapshot_are_defaults_that_can_be_changed():
    resolve = settings.resolve(settings.read_configs(), {"heat": "snapshot", "area": 0.05})
    assert {key: resolve[key] for key in settings.OF_SNAPSHOT} == settings.OF_SNAPSHOT | {"area": 0.05}
    assert resolve["schedule"] == "every:5"  # of 20
