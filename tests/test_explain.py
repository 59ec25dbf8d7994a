"""study/faithfulness.py against grad-cam's metrics, scipy and cases with a known answer; study/explain.py on runs."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pytorch_grad_cam.metrics import road as library_road
from pytorch_grad_cam.metrics.cam_mult_image import DropInConfidence, IncreaseInConfidence
from pytorch_grad_cam.metrics.perturbation_confidence import PerturbationConfidenceMetric, RemoveMostRelevantFirst
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from scipy import stats
from test_data import load
from test_snapshot import asked, images_with_squares, told_by_squares

import train
from engine import decoy, files, folder, settings
from engine.dataset import Dataset, Names, to_rgb
from study import explain, faithfulness


@pytest.fixture(scope="module")
def small():
    """A network with an opinion, images, a heat without ties, and the classes that it predicts."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7).eval()
    torch.nn.init.normal_(model.fc.weight, std=0.5)
    images = torch.randn(5, 3, 24, 24)
    heat = torch.rand(5, 24, 24)
    return model, images, heat, model(images).argmax(1)


def targets(classes):
    return [ClassifierOutputSoftmaxTarget(c) for c in classes.tolist()]


@pytest.mark.parametrize("percentile", [10, 50, 75])
def test_deletion_is_the_librarys_perturbation_at_every_point(percentile, small):
    model, images, heat, classes = small
    library = PerturbationConfidenceMetric(RemoveMostRelevantFirst(percentile, lambda image, mask: image * mask))
    theirs = library(images, heat.numpy(), targets(classes), model, return_diff=False)
    ours = faithfulness.deletion(model, images, faithfulness.ranks_of(heat), classes)[:, 20 - percentile // 5]
    assert torch.allclose(ours, torch.from_numpy(theirs), atol=1e-5)


def test_curves_begin_and_end_where_they_should(small):
    model, images, heat, classes = small
    ranks = faithfulness.ranks_of(heat)
    down, up = (f(model, images, ranks, classes) for f in (faithfulness.deletion, faithfulness.insertion))
    as_they_are, nothing = (faithfulness.probability(model, images * share, classes) for share in (1, 0))
    assert torch.allclose(down[:, 0], as_they_are) and torch.allclose(up[:, -1], as_they_are)
    assert torch.allclose(down[:, -1], nothing)


def test_a_heat_on_what_decides_deletes_fast_and_inserts_fast():
    """A network that sees one corner alone: the heat of that corner is best by every measure."""
    class Corner(torch.nn.Module):
        def forward(self, images):
            return torch.stack([2 * images[:, 0, :16, :16].abs().mean((1, 2)), torch.ones(len(images))], 1)

    torch.manual_seed(0)
    images, classes = torch.randn(1, 3, 64, 64), torch.zeros(1, dtype=torch.long)
    right, wrong = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    right[:, :16, :16], wrong[:, 32:, 32:] = 1, 1
    areas = [[f(Corner(), images, faithfulness.ranks_of(heat), classes).mean().item()
              for heat in (right, wrong)] for f in (faithfulness.deletion, faithfulness.insertion)]
    assert areas[0][0] < areas[0][1] - 0.1 and areas[1][0] > areas[1][1] + 0.05
    hot, cool = faithfulness.road(Corner(), images, faithfulness.ranks_of(right), classes)
    assert (cool - hot).mean() > 0.1


def test_drop_and_increase_are_the_librarys(small):
    model, images, heat, classes = small
    drop, increase = faithfulness.drop_and_increase(model, images, heat, classes)
    before = faithfulness.probability(model, images, classes)
    theirs = torch.from_numpy(DropInConfidence()(images, heat.numpy(), targets(classes), model))
    assert torch.allclose(drop * before, theirs, atol=1e-5)  # the library leaves out the paper's division
    assert increase.float().tolist() == IncreaseInConfidence()(images, heat.numpy(), targets(classes), model).tolist()
    assert (drop > 0).any() and (drop[increase] == 0).all()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_imputed_pixels_are_the_librarys_solution(share, small):
    _, images, heat, _ = small
    missing = faithfulness.ranks_of(heat) < share * heat[0].numel()
    impute = library_road.NoisyLinearImputer(noise=0)
    theirs = torch.stack([impute(image, (~m).float()) for image, m in zip(images, missing)])
    assert torch.allclose(faithfulness.impute(images, missing, noise=0, error=1e-6), theirs, atol=1e-3)
    left = faithfulness.impute(images, missing, noise=0) - theirs
    assert left.square().mean().sqrt() < faithfulness.ROAD_NOISE  # the solver leaves less than ROAD adds
    none, everything = torch.zeros_like(missing), torch.ones_like(missing)
    assert torch.equal(faithfulness.impute(images, none, noise=0), images)
    assert torch.isfinite(faithfulness.impute(images, everything)).all()


def test_road_is_the_librarys(small, monkeypatch):
    model, images, heat, classes = small
    monkeypatch.setattr(library_road.NoisyLinearImputer.__init__, "__defaults__", (0, None))
    theirs = library_road.ROADCombined()(images, heat.numpy(), targets(classes), model)
    hot, cool = faithfulness.road(model, images, faithfulness.ranks_of(heat), classes, noise=0)
    assert ((cool - hot).mean(1) / 2).numpy() == pytest.approx(theirs, abs=2e-3)


def test_rank_correlation_is_scipys_also_with_ties():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 4, (6, 8, 8), generator=draw).float() for _ in range(2))
    b[0], b[1], b[2] = a[0], -a[1], 1
    others = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a[3:].numpy(), b[3:].numpy())]
    assert faithfulness.rank_correlation(a, b).tolist() == pytest.approx([1, -1, 0, *others], abs=1e-9)


def test_overlap_is_one_for_the_same_heat_and_none_for_the_opposite():
    heat = torch.rand(3, 10, 10)
    assert faithfulness.overlap(heat, heat).tolist() == [1, 1, 1]
    assert faithfulness.overlap(heat, -heat).tolist() == [0, 0, 0]
    other = torch.where(faithfulness.ranks_of(heat) < 10, heat, -heat)  # of twenty pixels that are taken ten are shared
    assert (faithfulness.overlap(heat, other) == 10 / 30).all()


def test_the_pointing_game_and_the_share_inside():
    heat, mask = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 0] = True
    heat[0, 0, 1], heat[0, 2, 2], heat[1, 3, 3] = 0.75, 0.25, 1
    found = {name: values.tolist() for name, values in faithfulness.lies(heat, mask).items()}
    assert found == {"pointing": [1, 0], "inside": [0.75, 0], "covered": [0.25, 0.25]}
    assert faithfulness.lies(heat * 0, mask)["inside"].tolist() == [0, 0]


def test_equal_pixels_are_ordered_by_chance_and_always_the_same_way():
    flat = torch.zeros(2, 6, 6)
    flat[:, 3, 3] = 1
    ranks = faithfulness.ranks_of(flat, 5)
    assert (ranks[:, 3, 3] == 0).all() and not torch.equal(ranks[0], ranks[1])
    assert torch.equal(ranks, faithfulness.ranks_of(flat, 5)) and not torch.equal(ranks, faithfulness.ranks_of(flat, 6))
    assert torch.equal(ranks.flatten(1).sort(1).values, torch.arange(36).expand(2, 36))


def test_a_network_of_shuffled_weights_has_the_same_values_and_another_heat(small):
    model, images, _, _ = small
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = faithfulness.randomised(model, torch.Generator().manual_seed(0))
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values), name
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    mask = torch.ones(6, 64, 64, dtype=torch.bool)
    found = faithfulness.measure(model, torch.randn(6, 3, 64, 64), "gradcam", None, mask)
    assert (found["sensitivity"] > 0.2).any()
    assert (found["inside"] - 1).abs().max() < 1e-5 and (found["covered"] == 1).all()
    drawn = {name: found.pop(f"{name}_curve") for name in ("deletion", "insertion")}
    assert set(found) == {"deletion", "insertion", "drop", "increase", "road", "sensitivity", "pointing", "inside",
                          "covered"}
    assert all(v.shape == (6,) and torch.isfinite(v).all() for v in found.values())
    for name, values in drawn.items():
        area = np.trapezoid(values.numpy(), dx=1 / faithfulness.STEPS, axis=1)
        assert found[name].numpy() == pytest.approx(area, rel=1e-5)


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deceived(tmp_path_factory):
    """A network that learned from faint digits with a decoy, without Proxy Attention."""
    out = tmp_path_factory.mktemp("deceived")
    options = ["--dataset", "noisy_digits", "--decoy", "--cam", "none", "--out", str(out), "--name", "run"]
    assert train.main(options) == 0
    return out / "run"


@pytest.mark.slow
def test_a_decoy_deceives_a_network_and_its_heat_lies_on_the_swatch(deceived, capsys):
    found = files.read_json(deceived / "metrics.json")
    assert found["val"]["accuracy"] > 0.7 and found["test"]["accuracy"] < 0.3
    images = found["test"]["images"]
    assert found["clean_test"]["images"] == images
    assert explain.main([str(deceived)]) == 0
    assert "share of the heat on the swatch" in capsys.readouterr().out
    means = files.read_json(deceived / "explanations.json")
    assert means["mask"] == "swatch" and means["method"] == "layercam" and means["images"] == images
    assert means["covered"] == pytest.approx(16 / 1024)
    assert means["inside"] > 5 * means["covered"] and means["pointing"] > 0.3


@pytest.mark.slow
def test_explanations_are_measured_once_and_with_the_method_that_was_asked_for(deceived, monkeypatch):
    assert explain.main([str(deceived), "--cam", "gradcam"]) == 0
    assert files.read_json(deceived / "explanations.json")["method"] == "gradcam"
    monkeypatch.setattr(faithfulness, "measure", None)
    values, arrays = explain.write_explanations(deceived, "gradcam"), files.read_arrays(deceived / "explanations.npz")
    assert len(values["deletion"]) > 100 and set(arrays) - set(values) == {"ids", "method", "mask"}
    assert all((arrays[name] == values[name]).all() for name in values)


def test_the_ink_of_digits_is_known():
    digits = load("digits", None)
    pixels = torch.from_numpy(np.stack([to_rgb(digits.open(i), 32) for i in range(20)])).permute(0, 3, 1, 2)
    name, mask = decoy.masks_of(digits, np.arange(20), pixels)
    assert name == "object" and mask.shape == (20, 32, 32) and 0.1 < mask.float().mean() < 0.5
    grey = pixels.float().mean(1)
    assert grey[mask].mean() > 3 * grey[~mask].mean()


def test_the_animal_of_pets_is_known(tmp_path):
    for folder in ("images", "annotations/trimaps"):
        (tmp_path / folder).mkdir(parents=True)
    trimap = np.full((40, 60), 2, np.uint8)
    trimap[10:30, 15:45], trimap[15:25, 20:40] = 3, 1
    Image.fromarray(trimap).save(tmp_path / "annotations" / "trimaps" / "cat_1.png")
    pets = Dataset("pets", tmp_path, ["cat"], ["cat_1.jpg"], np.zeros(1, np.int64),
                   Names([str(tmp_path / "images" / "cat_1.jpg")]))
    pixels = torch.zeros(1, 3, 20, 20, dtype=torch.uint8)
    _, mask = decoy.masks_of(pets, [0], pixels)
    assert mask[0, 5:15, 5:15].all() and mask.sum() == 100
    pets.images = Names([str(tmp_path / "images" / "dog.jpg")])
    assert decoy.masks_of(pets, [0], pixels) == (None, None)


@pytest.mark.slow
def test_a_network_that_depends_on_a_square_is_told_from_one_that_does_not(deceived, capsys):
    assert explain.main([str(deceived), "--follows"]) == 0
    printed, result = capsys.readouterr().out, files.read_json(deceived / "follows.json")
    assert result["transplants"] and "it depends on few pixels" in printed and "Train with --heat snapshot" in printed
    assert result["interval"][0] < result["follows"] < result["interval"][1] and len(result["by_class"]) > 1
    few, half = result["pasted"][0], result["pasted"][-1]
    assert few["hottest"] > 0.3 > 3 * few["random"] and few["coolest"] < 0.1  # the square is 1.6% of the pixels
    assert "\n3.0 " in printed and half["hottest"] > half["coolest"]
    assert train.main(["--cam", "none", "--epochs", "8", "--train-fraction", "0.5", "--out", str(deceived.parent),
                       "--name", "honest"]) == 0
    assert explain.main([str(deceived.parent / "honest"), "--follows"]) == 0
    printed = capsys.readouterr().out
    assert "does not depend on few pixels" in printed and "Train with" not in printed
    assert files.read_json(deceived.parent / "honest" / "metrics.json")["val"]["accuracy"] > 0.9


def test_where_the_class_is_told_shows_in_whose_pixels_change_what_is_said():
    images, labels, heat = images_with_squares()
    explained = asked(told_by_squares)
    explained.of = lambda ids, text: [(images, labels, told_by_squares(images), heat)]
    for row in explain.pasted(explained, []):  # two squares are a tie, which the class with the lower number wins
        assert row["coolest"] < 0.2 and 0.3 < row["hottest"] < 1
    heat = 1 - heat
    assert explain.pasted(explained, [])[0]["hottest"] == 0 < explain.pasted(explained, [])[-1]["coolest"]
    explained.of = lambda ids, text: [(images, labels, -told_by_squares(images), heat)]  # recognises none
    assert {row["hottest"] for row in explain.pasted(explained, [])} == {0}


def test_where_is_how_much_of_the_square_each_way_of_explaining_finds(deceived, capsys):
    assert explain.main([str(deceived), "--where", "--cam", "layercam", "random", "--layer", "layer1"]) == 0
    assert "and the swatch in them" in capsys.readouterr().out
    rows = {(row["method"], row["explain"]): row for row in files.read_json(deceived / "where.json")}
    scores = ("predicted", "true", "margin", "loss")
    assert set(rows) == {(method, score) for method in ("layercam", "random") for score in scores}
    chance, found = rows["random", "true"], rows["layercam", "true"]
    assert chance["covered"] == pytest.approx(16 / 1024)
    assert chance["erased"] < 0.25  # a smooth field has its peaks in corners, too
    assert found["erased"] > 2 * chance["erased"] and found["inside"] > 3 * chance["covered"]
    assert 0 <= found["worst_class"] < found["erased"]
    for _ in range(2):  # the second time in the place of the first
        assert explain.main([str(deceived), "--where", "--cam", "layercam"]) == 0
    layers = [row["layer"] for row in files.read_json(deceived / "where.json")]
    assert layers == ["layer1"] * 8 + [None] * 4


def test_where_shows_that_the_square_of_one_class_is_not_found(deceived, monkeypatch):
    """The heat of a network that knows class 3 by the absence of the others' squares."""
    real = faithfulness.where

    def blind(model, images, labels, *rest):
        return {way: found | {"erased": (labels != 3).float()}
                for way, found in real(model, images, labels, *rest).items()}
    monkeypatch.setattr(faithfulness, "where", blind)
    rows = explain.write_where(deceived, ["random"], None)
    assert {row["worst_class"] for row in rows} == {0} and all(0.8 < row["erased"] < 1 for row in rows)


def test_misled_asks_of_wrong_test_images_alone_what_misled_them(deceived, monkeypatch, capsys):
    monkeypatch.setattr(explain, "EXPLAINED", 30)
    found, asked = folder.read_predictions(deceived), explain.drawn(folder.open_run(deceived), "test", "where", 30)
    right = dict(zip(found["test_ids"], found["test_logits"].argmax(1) == found["test_labels"]))
    wrong = sum(not right[image_id.encode()] for image_id in asked)
    assert explain.main([str(deceived), "--misled", "--cam", "gradcam", "--layer", "layer2"]) == 0
    assert f"{wrong} images, and the swatch in them" in capsys.readouterr().out
    rows = {row["explain"]: row for row in files.read_json(deceived / "where.json") if row.get("of") == "misled"}
    assert {row["images"] for row in rows.values()} == {wrong} and rows["predicted"]["overlap"] == 1
    assert rows["true"]["overlap"] < rows["loss"]["overlap"] < 1  # which is the wrong class's evidence, less the true
    assert rows["predicted"]["road"] > rows["true"]["road"] and rows["loss"]["freed"] > rows["true"]["freed"]


def test_a_hot_pixel_that_misled_frees_the_true_class_and_one_that_did_not_does_not():
    """A network that goes by one corner: the heat there is what misled it, heat elsewhere is not."""
    class Corner(torch.nn.Module):
        def forward(self, images):
            return torch.stack([4 * images[:, 0, :8, :8].mean((1, 2)), torch.zeros(len(images))], 1)

    images, labels = torch.zeros(2, 3, 32, 32), torch.ones(2, dtype=torch.long)
    images[:, :, :8, :8] = 1
    heat = torch.zeros(2, 32, 32)
    heat[0, :8, :8], heat[1, 16:24, 16:24] = 1, 1
    ranks = faithfulness.ranks_of(heat)
    hot, cool = faithfulness.road(Corner(), images, ranks, labels)
    freed = (hot - cool).mean(1) / 2
    assert freed[0] > 0.2 and freed[1] < 0.05


def test_where_needs_a_mask_and_a_layer(deceived, trained, capsys):
    run = trained("--dataset", "faint_digits", "--cam", "none", epochs=1)
    capsys.readouterr()
    assert explain.main([str(run), "--where"]) == 2
    assert "nothing is known of where the object is in faint_digits" in capsys.readouterr().err
    assert not (run / "where.json").exists()
    assert explain.main([str(deceived), "--where", "--layer", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_two_seeds_are_compared_in_pairs_that_share_none(monkeypatch):
    """So that an interval over them is one of independent figures."""
    seen = []
    monkeypatch.setattr(explain, "likeness", lambda a, method, b, *rest: seen.append((a.folder, b.folder)))
    runs = {seed: SimpleNamespace(folder=seed, split={"test": ["1", "2"]}) for seed in range(5)}
    [two_seeds] = explain.references(runs, {}, "gradcam", None)
    assert seen == [(0, 1), (2, 3)] and len(two_seeds) == 2


def test_an_erased_copy_is_judged_by_another_network_on_the_images_that_misled(monkeypatch):
    """The judge sees the class in a corner, where the heat is, and loses it there alone. Images of two sizes."""
    class Judge(torch.nn.Module):
        def forward(self, images):
            lit = images[:, 0, :8, :8].mean((1, 2))
            return torch.stack([lit.new_full((len(lit),), 0.5), lit], 1)

    class Seen:
        run = SimpleNamespace(config={"cam": "gradcam", "layer": None})
        normalisation = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)

        def __init__(self, path, ids, device):
            self.ids, self.model = ids, Judge()
            self.size, self.at_once = {"a": (16, 3), "b": (32, 2)}[path]

        def __iter__(self):
            for start in range(0, len(self.ids), self.at_once):
                count = len(self.ids[start:start + self.at_once])
                yield torch.ones(count, 3, self.size, self.size), torch.ones(count, dtype=torch.long), None, None

    def corner(model, images, *rest):
        heat = torch.zeros(len(images), 16, 16)
        heat[:, :4, :4] = 1
        return heat, None
    monkeypatch.setattr(explain, "Images", Seen)
    monkeypatch.setattr(explain.folder, "open_run", lambda path: path)
    monkeypatch.setattr(faithfulness, "heat_of", corner)
    right = np.array([True, False, False, False, False, False])
    a, b = (SimpleNamespace(folder=name, seed=0, split={"test": list("uvwxyz")}, correct=lambda part: right)
            for name in "ab")
    found = explain.kept(a, b, torch.device("cpu"))
    assert {place: each.tolist() for place, each in found.items() if place != "random"} == {
        "nothing": [True] * 5, "hottest": [False] * 5, "coolest": [True] * 5}
    right[:] = True
    assert explain.kept(a, b, torch.device("cpu")) == {}


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, message", [
    ([], "required: RUN"),
    (["run", "--wher"], "unknown option '--wher'. Did you mean '--where'?"),
    (["run", "--where", "--follows"], "not allowed with"),
    (["run", "--layer", "layer1"], "--layer goes with --where"),
    (["run", "--cam", "gradcam", "layercam"], "--cam takes one method"),
    (["run", "--follows", "--cam", "gradcam"], "does not go with --follows"),
    (["run", "--cam", "gradcan"], "--cam gradcan: no CAM method. Did you mean 'gradcam'?"),
    (["run", "--cam", "none"], "--cam none: no CAM method"),
    (["run"], "not a run's folder"),
])
def test_what_cannot_be_explained_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert explain.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("study.explain: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_it_is_a_program_of_its_own_whose_help_fits_a_screen():
    done = subprocess.run([sys.executable, "-m", "study.explain", "--help"], cwd=settings.HERE, capture_output=True,
                          text=True, env=os.environ | {"COLUMNS": "100"})
    assert done.returncode == 0 and "usage: python -m study.explain RUN" in done.stdout
    assert len(done.stdout.splitlines()) < 40
