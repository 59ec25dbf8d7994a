"""explain.py against grad-cam's metrics, scipy, and cases with a known answer."""

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

import data
import eval as evaluation
import explain
import run
import train


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
    ours = explain.deletion(model, images, explain.ranks_of(heat), classes, steps=20)[:, 20 - percentile // 5]
    assert torch.allclose(ours, torch.from_numpy(theirs), atol=1e-5)


def test_curves_begin_and_end_where_they_should_and_their_area_is_numpys(small):
    model, images, heat, classes = small
    down, up = (f(model, images, explain.ranks_of(heat), classes) for f in (explain.deletion, explain.insertion))
    whole, nothing = explain.probability(model, images, classes), explain.probability(model, images * 0, classes)
    assert torch.allclose(down[:, 0], whole) and torch.allclose(down[:, -1], nothing) and torch.allclose(up[:, -1], whole)
    assert explain.area_under(up).numpy() == pytest.approx(np.trapezoid(up.numpy(), dx=1 / explain.STEPS, axis=1), rel=1e-5)


def test_a_heat_on_what_decides_deletes_fast_and_inserts_fast():
    """A network that looks at one corner alone: the heat of that corner is best by every measure."""
    class Corner(torch.nn.Module):
        def forward(self, images):
            return torch.stack([2 * images[:, 0, :16, :16].abs().mean((1, 2)), torch.ones(len(images))], 1)

    torch.manual_seed(0)
    images, classes = torch.randn(1, 3, 64, 64), torch.zeros(1, dtype=torch.long)
    right, wrong = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    right[:, :16, :16], wrong[:, 32:, 32:] = 1, 1
    areas = [[explain.area_under(f(Corner(), images, explain.ranks_of(heat), classes)).item() for heat in (right, wrong)]
             for f in (explain.deletion, explain.insertion)]
    assert areas[0][0] < areas[0][1] - 0.1 and areas[1][0] > areas[1][1] + 0.05
    hot, cool = explain.road(Corner(), images, explain.ranks_of(right), classes)
    assert (cool - hot).mean() > 0.1


def test_drop_and_increase_are_the_librarys(small):
    model, images, heat, classes = small
    drop, increase = explain.drop_and_increase(model, images, heat, classes)
    before = explain.probability(model, images, classes)
    theirs = DropInConfidence()(images, heat.numpy(), targets(classes), model)
    assert torch.allclose(drop * before, torch.from_numpy(theirs), atol=1e-5)  # the library leaves out the paper's division
    assert increase.float().tolist() == IncreaseInConfidence()(images, heat.numpy(), targets(classes), model).tolist()
    assert (drop > 0).any() and (drop[increase] == 0).all()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_imputed_pixels_are_the_librarys_solution(share, small):
    _, images, heat, _ = small
    missing = explain.ranks_of(heat) < share * heat[0].numel()
    theirs = torch.stack([library_road.NoisyLinearImputer(noise=0)(image, (~m).float()) for image, m in zip(images, missing)])
    assert torch.allclose(explain.impute(images, missing, noise=0, error=1e-6), theirs, atol=1e-3)
    quick = explain.impute(images, missing, noise=0) - theirs
    assert quick.square().mean().sqrt() < explain.ROAD_NOISE  # what the solver leaves is less than the noise that ROAD adds
    none, everything = torch.zeros_like(missing), torch.ones_like(missing)
    assert torch.equal(explain.impute(images, none, noise=0), images) and torch.isfinite(explain.impute(images, everything)).all()


def test_road_is_the_librarys(small, monkeypatch):
    model, images, heat, classes = small
    monkeypatch.setattr(library_road.NoisyLinearImputer.__init__, "__defaults__", (0, None))
    theirs = library_road.ROADCombined()(images, heat.numpy(), targets(classes), model)
    hot, cool = explain.road(model, images, explain.ranks_of(heat), classes, noise=0)
    assert ((cool - hot).mean(1) / 2).numpy() == pytest.approx(theirs, abs=2e-3)


def test_rank_correlation_is_scipys_also_with_ties():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 4, (6, 8, 8), generator=draw).float() for _ in range(2))
    b[0], b[1], b[2] = a[0], -a[1], 1
    expected = [1, -1, 0, *(stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a[3:].numpy(), b[3:].numpy()))]
    assert explain.rank_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-9)


def test_overlap_is_one_for_the_same_heat_and_none_for_the_opposite():
    heat = torch.rand(3, 10, 10)
    assert explain.overlap(heat, heat).tolist() == [1, 1, 1] and explain.overlap(heat, -heat).tolist() == [0, 0, 0]
    other = torch.where(explain.ranks_of(heat) < 10, heat, -heat)  # the hottest tenth is shared; twenty pixels are taken
    assert (explain.overlap(heat, other) == 10 / 30).all()


def test_the_pointing_game_and_the_share_inside():
    heat, mask = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, 0] = True
    heat[0, 0, 1], heat[0, 2, 2], heat[1, 3, 3] = 0.75, 0.25, 1
    assert explain.pointing(heat, mask).tolist() == [True, False] and explain.share_inside(heat, mask).tolist() == [0.75, 0]
    assert explain.share_inside(heat * 0, mask).tolist() == [0, 0]


def test_equal_pixels_are_ordered_by_chance_and_always_the_same_way():
    flat = torch.zeros(2, 6, 6)
    flat[:, 3, 3] = 1
    ranks = explain.ranks_of(flat, 5)
    assert (ranks[:, 3, 3] == 0).all() and torch.equal(ranks, explain.ranks_of(flat, 5)) and not torch.equal(ranks, explain.ranks_of(flat, 6))
    assert torch.equal(ranks.flatten(1).sort(1).values, torch.arange(36).expand(2, 36)) and not torch.equal(ranks[0], ranks[1])


def test_a_network_of_shuffled_weights_has_the_same_values_and_another_heat(small):
    model, images, _, _ = small
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = explain.randomised(model, torch.Generator().manual_seed(0))
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values), name
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    found = explain.measure(model, torch.randn(6, 3, 64, 64), "gradcam", None, torch.ones(6, 64, 64, dtype=torch.bool))
    assert (found["sensitivity"] > 0.2).any() and (found["inside"] - 1).abs().max() < 1e-5 and (found["covered"] == 1).all()
    drawn = {name: found.pop(f"{name}_curve") for name in ("deletion", "insertion")}
    assert set(found) == {"deletion", "insertion", "drop", "increase", "road", "sensitivity", "pointing", "inside", "covered"}
    assert all(v.shape == (6,) and torch.isfinite(v).all() for v in found.values())
    assert all(torch.equal(explain.area_under(values), found[name]) for name, values in drawn.items())


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deceived(tmp_path_factory):
    """A network that learned from faint digits with a decoy, without Proxy Attention."""
    out = tmp_path_factory.mktemp("deceived")
    assert train.main(["--dataset", "noisy_digits", "--decoy", "--cam", "none", "--out", str(out), "--name", "run"]) == 0
    return out / "run"


def test_a_decoy_deceives_a_network_and_its_heat_lies_on_the_swatch(deceived, capsys):
    found = run.read_json(deceived / "metrics.json")
    assert found["val"]["accuracy"] > 0.7 and found["test"]["accuracy"] < 0.3
    images = found["test"]["images"]
    assert found["clean_test"]["images"] == images
    assert evaluation.main([str(deceived), "--explanations"]) == 0
    out = capsys.readouterr().out
    told = run.read_json(deceived / "explanations.json")
    assert told["mask"] == "swatch" and told["method"] == "layercam" and told["images"] == images and "on the swatch" in out
    assert told["covered"] == pytest.approx(16 / 1024) and told["inside"] > 5 * told["covered"] and told["pointing"] > 0.3


def test_explanations_are_measured_once_and_with_the_method_that_was_asked_for(deceived, monkeypatch):
    values = evaluation.write_explanations(deceived, "gradcam")
    assert run.read_json(deceived / "explanations.json")["method"] == "gradcam" and len(values["deletion"]) > 100
    monkeypatch.setattr(explain, "measure", None)
    again = evaluation.write_explanations(deceived, "gradcam")
    assert all((again[name] == values[name]).all() for name in values) and set(again) == set(values)


def test_the_ink_of_digits_and_the_animal_of_pets_are_known(tmp_path):
    digits = data.load_dataset("digits", run.read_configs()["datasets"]["digits"], None)
    pixels = torch.from_numpy(np.stack([data.to_rgb(digits.open(i), 32) for i in range(20)])).permute(0, 3, 1, 2)
    name, mask = data.masks_of(digits, np.arange(20), pixels)
    assert name == "object" and mask.shape == (20, 32, 32) and 0.1 < mask.float().mean() < 0.5
    assert (pixels.float().mean(1)[mask].mean() > 3 * pixels.float().mean(1)[~mask].mean())

    for folder in ("images", "annotations/trimaps"):
        (tmp_path / folder).mkdir(parents=True)
    trimap = np.full((40, 60), 2, np.uint8)
    trimap[10:30, 15:45], trimap[15:25, 20:40] = 3, 1
    Image.fromarray(trimap).save(tmp_path / "annotations" / "trimaps" / "cat_1.png")
    pets = data.Dataset("pets", tmp_path, ["cat"], ["cat_1.jpg"], np.zeros(1, np.int64), data.Names([str(tmp_path / "images" / "cat_1.jpg")]))
    name, mask = data.masks_of(pets, [0], torch.zeros(1, 3, 20, 20, dtype=torch.uint8))
    assert mask[0, 5:15, 5:15].all() and mask.sum() == 100
    pets.images = data.Names([str(tmp_path / "images" / "dog.jpg")])
    assert data.masks_of(pets, [0], torch.zeros(1, 3, 20, 20, dtype=torch.uint8)) == (None, None)


def test_what_leans_on_a_swatch_is_told_from_what_does_not_and_by_which_way_of_explaining(deceived, capsys):
    assert evaluation.main([str(deceived), "--leaning"]) == 0
    out, told = capsys.readouterr().out, run.read_json(deceived / "leaning.json")
    found = run.read_json(deceived / "metrics.json")
    assert told["right"] == pytest.approx(found["val"]["accuracy"]) and told["images"] == found["val"]["images"]
    gaps = [way["gap"] for way in told["ways"]]
    assert gaps == sorted(gaps, reverse=True) and {(w["cam"], w["explain"], w["layer"]) for w in told["ways"]} == set(explain.WAYS)
    for way in told["ways"]:
        assert way["gap"] == pytest.approx(way["random"] - way["hottest"]) and way["interval"][0] < way["gap"] < way["interval"][1]
    assert "It leans on few pixels" in out and "--fill swap" in out
    run.resolve(run.read_configs(), train.parse(evaluation.UNLEARN.split())[0])
    assert train.main(["--cam", "none", "--epochs", "8", "--train-fraction", "0.5", "--out", str(deceived.parent), "--name", "honest"]) == 0
    assert evaluation.main([str(deceived.parent / "honest"), "--leaning"]) == 0
    assert "does not lean" in capsys.readouterr().out and run.read_json(deceived.parent / "honest" / "metrics.json")["val"]["accuracy"] > 0.9


def test_leaning_leaves_out_a_way_for_which_no_layer_is_fine_enough(deceived, monkeypatch):
    monkeypatch.setattr(explain, "WAYS", (("gradcam", "predicted", None), ("gradcam", "predicted", "-9")))
    assert [way["layer"] for way in evaluation.write_leaning(deceived)["ways"]] == [None]


def test_where_tells_how_much_of_the_square_each_way_of_explaining_finds(deceived, capsys):
    assert evaluation.main([str(deceived), "--where", "--cam", "layercam", "random", "--layer", "layer1"]) == 0
    assert "of the swatch in" in capsys.readouterr().out
    rows = {(r["method"], r["explain"]): r for r in run.read_json(deceived / "where.json")}
    assert set(rows) == {(method, score) for method in ("layercam", "random") for score in ("predicted", "true", "margin")}
    chance, found = rows["random", "true"], rows["layercam", "true"]
    assert chance["covered"] == pytest.approx(16 / 1024) and chance["erased"] < 0.25  # a smooth field has its peaks in corners, too
    assert found["erased"] > 2 * chance["erased"] and found["inside"] > 3 * chance["covered"]
    assert 0 <= found["worst_class"] < found["erased"]
    assert evaluation.main([str(deceived), "--where", "--cam", "layercam"]) == 0
    assert {r["layer"] for r in run.read_json(deceived / "where.json")} == {"layer1", None}


def test_where_tells_when_the_square_of_one_class_is_not_found(deceived, monkeypatch):
    """The heat of a network that knows class 3 by the absence of the others' squares."""
    real = explain.where
    def blind(model, images, labels, *rest):
        return {way: found | {"erased": (labels != 3).float()} for way, found in real(model, images, labels, *rest).items()}
    monkeypatch.setattr(explain, "where", blind)
    rows = evaluation.write_where(deceived, ["random"], None)
    assert {row["worst_class"] for row in rows} == {0} and all(0.8 < row["erased"] < 1 for row in rows)


def test_where_needs_a_mask_and_runs(tmp_path, capsys):
    assert train.main(["--dataset", "faint_digits", "--cam", "none", "--epochs", "1", "--out", str(tmp_path), "--name", "run"]) == 0
    capsys.readouterr()
    assert evaluation.main([str(tmp_path / "run"), "--where"]) == 2
    assert "nothing is known of where the object is in faint_digits" in capsys.readouterr().err
    assert evaluation.main(["--where"]) == 2
    assert evaluation.main([str(tmp_path / "run"), "--where", "--layer", "nowhere"]) == 2


def test_leaning_erases_what_the_training_step_erases(small):
    model, images, _, classes = small
    normalisation = tuple(torch.full((1, 3, 1, 1), value) for value in (0.5, 0.25))
    found = explain.leaning(model, images, classes, normalisation, key=(0,))
    assert set(found) == {"right", "hottest", "random"} and all(v.dtype == torch.bool and v.shape == classes.shape for v in found.values())
    assert torch.equal(found["right"], model(images).argmax(1) == classes)
    again = explain.leaning(model, images, classes, normalisation, key=(0,))
    assert all(torch.equal(found[name], again[name]) for name in found)
