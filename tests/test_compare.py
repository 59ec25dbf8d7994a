"""compare.py: statistics against scipy and simulations with a known answer, and real runs."""

import json

import numpy as np
import pytest
from scipy import stats

import compare
import eval as evaluation
import run
import train
from data import UserError


def simulated(accuracies, images=500, seed=0, spread=0.0, shared_difficulty=0.0, config=None):
    """{arm: {seed: Result}} of made-up predictions. accuracies: {arm: (number of seeds, accuracy)}. spread: of a seed's accuracy, the same
    for both arms, as when a test part is hard. shared_difficulty: share of the images that all get right or wrong alike."""
    draw, arms = np.random.default_rng(seed), {}
    count = max(n for n, _ in accuracies.values())
    luck, alike = draw.normal(0, spread, count), [draw.random(images) < shared_difficulty for _ in range(count)]
    common = [draw.random(images) for _ in range(count)]
    for arm, (seeds, accuracy) in accuracies.items():
        arms[arm] = {}
        for s in range(seeds):
            right = np.where(alike[s], common[s], draw.random(images)) < accuracy + luck[s]
            logits = np.stack([1.0 - right, right], 1)
            cost = dict.fromkeys(compare.PRICES.values(), 2.0) | {"peak_host_mb": 3.0, "peak_gpu_allocated_mb": None, "energy_wh": None}
            arms[arm][s] = compare.Result(arm, {"seed": s, "cam": arm} | (config or {}), {"fingerprint": "f", "test": [f"{s}/{i}" for i in range(images)]},
                                          [], {"cost": cost}, {"test_logits": logits, "test_labels": np.ones(images, int)})
    return arms


def row_of(arms, arm="a", baseline="none"):
    return next(row for row in compare.compare(arms, baseline) if row["arm"] == arm)


def test_a_planted_difference_of_two_points_over_ten_seeds_is_found():
    row = row_of(simulated({"none": (10, 0.80), "a": (10, 0.82)}, images=2000, spread=0.02, shared_difficulty=0.8))
    low, high = row["interval"]
    assert row["p"] < 0.05 and low > 0 and low < 0.02 < high and row["says"].startswith("better by")
    assert row_of(simulated({"none": (10, 0.82), "a": (10, 0.80)}, images=2000, spread=0.02, shared_difficulty=0.8))["says"].startswith("worse by")


def test_of_two_hundred_null_comparisons_about_one_in_twenty_is_called_different():
    called = [row_of(simulated({"none": (10, 0.8), "a": (10, 0.8)}, images=200, seed=s, spread=0.03))["says"].split()[0] for s in range(200)]
    different = sum(word in ("better", "worse") for word in called)
    assert 2 <= different <= 20  # binomial(200, 0.05): all but 1 in 1,000
    assert called.count("no") == 200 - different


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for s in range(100):
        low, high = row_of(simulated({"none": (15, 0.7), "a": (15, 0.73)}, images=300, seed=s, spread=0.02))["interval"]
        covered += low <= 0.03 <= high
    assert covered >= 87


def test_with_few_seeds_it_says_that_they_are_too_few():
    assert compare.fewest_seeds() == 6
    row = row_of(simulated({"none": (5, 0.5), "a": (5, 0.9)}))
    assert row["p"] == pytest.approx(2 / 2**5) and row["says"] == "too few seeds to tell: 5, at least 6 are needed"
    assert row_of(simulated({"none": (6, 0.5), "a": (6, 0.9)}))["says"].startswith("better")


def test_p_values_are_scipys_and_those_of_a_case_worked_by_hand():
    assert compare.permutation_p([1.0, 2.0, 3.0, -1.0]) == pytest.approx(6 / 16)  # sums of at least 5 in size: 1+2+3+1, 1+2+3-1, -1+2+3+1, and these turned
    assert compare.mcnemar_p(9, 1) == pytest.approx(2 * (stats.binom.pmf(0, 10, 0.5) + stats.binom.pmf(1, 10, 0.5)))
    assert compare.mcnemar_p(0, 0) == 1
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([]) == []


def test_the_seeds_needed_are_those_of_a_power_calculation():
    assert compare.seeds_to_resolve(0.01, 0.01 * 0.5) == 34  # Cohen's table for a paired t-test, d 0.5, power 0.8
    assert compare.seeds_to_resolve(0.01, 0.01 * 0.8) == 15  # and d 0.8
    found = [stats.ttest_1samp(np.random.default_rng(s).normal(0.5, 1, 34), 0).pvalue < 0.05 for s in range(2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)
    assert compare.seeds_to_resolve(0.5, 0.005) == pytest.approx((1.96 + 0.8416) ** 2 * 100**2, rel=0.01)


def test_shared_test_images_are_drawn_together():
    """One image that decides a quarter of the difference in each seed: drawn together its luck does not average out."""
    draw = np.random.default_rng(0)
    image = (draw.random(200) < 0.1).astype(int)
    alone, shared = (compare.bootstrap_interval([image] * 20, together) for together in (False, True))
    assert shared[1] - shared[0] > 3 * (alone[1] - alone[0])


def test_the_price_is_a_ratio_to_the_baseline():
    arms = simulated({"none": (3, 0.8), "a": (3, 0.8)})
    for s in range(3):
        arms["a"][s].metrics["cost"] |= {"train_seconds": 3.0 + s, "peak_host_mb": 6.0}
    assert row_of(arms)["price"] == {"seconds": 2.0, "images": 1.0, "steps": 1.0, "memory": 2.0, "energy": None}


def test_runs_with_other_test_images_are_not_compared():
    arms = simulated({"none": (3, 0.8), "a": (3, 0.8)})
    arms["a"][1].split["test"][0] = "another"
    with pytest.raises(UserError, match="seed 1 and other test images"):
        compare.compare(arms, "none")


# --- real runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Two arms of two seeds on a few digits."""
    out = tmp_path_factory.mktemp("four")
    for cam in ("none", "gradcam"):
        for seed in (0, 1):
            assert train.main(["--train-fraction", "0.1", "--epochs", "2", "--cam", cam, "--seed", str(seed), "--out", str(out), "--name",
                               f"{cam}{seed}", "--batch-size", "32"]) == 0
    assert train.main(["--train-fraction", "0.1", "--epochs", "1", "--cam", "gradcam", "--out", str(out), "--name", "other", "--batch-size", "32"]) == 0
    return out


def test_runs_are_compared_on_the_command_line(four, capsys):
    assert evaluation.main([str(four / f"{cam}{seed}") for cam in ("gradcam", "none") for seed in (0, 1)]) == 0
    out = capsys.readouterr().out
    assert "against 'cam none'" in out and "cam gradcam: too few seeds to tell: 2" in out
    found = {folder: run.read_json(four / folder / "metrics.json")["test"]["accuracy"] for folder in ("none0", "none1", "gradcam0", "gradcam1")}
    mean = 100 * (found["gradcam0"] + found["gradcam1"]) / 2
    assert f"{mean:8.2f}" in out and f"{mean - 50 * (found['none0'] + found['none1']):8.2f}" in out


def test_a_run_compared_with_itself_shows_no_difference(four, capsys):
    assert evaluation.main([str(four / "none0")] * 2) == 0
    out = capsys.readouterr().out
    assert "right and wrong on the same images" in out and "0.00 to 0.00" in out


def test_runs_that_differ_in_more_than_one_setting_are_refused_with_the_list(four, capsys):
    assert evaluation.main([str(four / "none0"), str(four / "other")]) == 2
    assert "epochs: 2, 1; cam: none, gradcam" in (err := capsys.readouterr().err) and "--by" in err
    assert evaluation.main([str(four / "none0"), str(four / "other"), "--by", "cam"]) == 2
    assert "epochs: 2, 1" in capsys.readouterr().err
    assert evaluation.main([str(four / "none0"), str(four / "other"), "--by", "cam,epochs", "--baseline", "cam none, epochs 2"]) == 0


def test_an_experiment_is_compared_by_its_arms(tmp_path, monkeypatch, capsys):
    configs = run.read_configs()
    configs["experiments"]["demo"]["settings"] |= {"train_fraction": 0.1, "epochs": 1}
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    monkeypatch.setattr(run.read_configs, "__defaults__", (tmp_path / "configs.json",))
    out = str(tmp_path / "runs")
    assert evaluation.main(["--experiment", "demo", "--out", out]) == 2
    assert "first run python train.py --experiment demo" in capsys.readouterr().err
    for cell in compare.experiment.cells(configs, "demo", {"out": out})[:4]:
        assert train.main(compare.experiment.command(cell)[2:]) == 0
    capsys.readouterr()
    assert evaluation.main(["--experiment", "demo", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "gradcam++: too few seeds" in printed and "2 runs are not finished yet" in printed


def test_when_the_baselines_best_was_reached():
    arms = simulated({"none": (1, 0.8), "a": (1, 0.8)})
    for arm, values in (("none", (0.5, 0.9, 0.8)), ("a", (0.2, 0.91, 0.1))):
        arms[arm][0].log.extend({"val_accuracy": v, "images_seen": 10, "train_seconds": 2.0} for v in values)
    assert compare.reached(arms, "none") == {"none": [{"seed": 0, "epochs": 2, "images": 20, "seconds": 4.0}],
                                             "a": [{"seed": 0, "epochs": 2, "images": 20, "seconds": 4.0}]}


# --- other figures -------------------------------------------------------------------------------------------------


def test_any_figure_is_compared_as_accuracy_is():
    """0s and 1s compared as figures and as what was correct: the same rows, but for the luck of the draws."""
    arms = simulated({"none": (8, 0.7), "a": (8, 0.75)}, images=300, spread=0.02)
    as_figures = compare.compare_values({arm: {s: r.correct("test").astype(float) for s, r in runs.items()} for arm, runs in arms.items()}, "none")[1]
    as_right = row_of(arms)
    for key in ("mean", "difference", "p", "p_holm", "effect"):
        assert as_figures[key] == pytest.approx(as_right[key])
    assert as_figures["interval"] == pytest.approx(as_right["interval"], abs=0.002)


def test_what_no_number_of_points_could_show_among_so_many_arms_is_not_called_no_difference():
    accuracies = {"none": (7, 0.5)} | {name: (7, 0.9) for name in "abcd"} | {"same": (7, 0.5)}
    rows = {row["arm"]: row for row in compare.compare(simulated(accuracies, images=2000, seed=1), "none")}
    assert rows["a"]["p"] == pytest.approx(2 / 2**7) and rows["a"]["p_holm"] == pytest.approx(5 * 2 / 2**7)
    assert rows["a"]["says"] == "too few seeds to tell among 5 arms: 7, at least 8 are needed" and rows["same"]["says"].startswith("no difference larger than")
    accuracies = {name: (8, share) for name, (_, share) in accuracies.items()}
    rows = {row["arm"]: row for row in compare.compare(simulated(accuracies, images=2000, seed=1), "none")}
    assert rows["a"]["says"].startswith("better by 4")


def test_risk_and_coverage_of_a_case_worked_by_hand():
    coverage, risk = compare.risk_coverage(np.array([0.9, 0.6, 0.8, 0.7]), np.array([True, False, True, False]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1] and risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])


def test_what_was_kept_and_what_was_forgotten():
    def result(classes, test, labels, predicted):
        return compare.Result("x", {}, {"classes": classes, "test": test}, [], {}, {
            "test_labels": np.array(labels), "test_logits": np.eye(len(classes))[predicted]})

    first = result(["a", "b"], ["1", "2", "3", "4"], [0, 0, 1, 1], [0, 0, 1, 1])  # knew all four
    after = result(["a", "b", "c"], ["1", "2", "3", "4", "5", "6"], [0, 0, 1, 1, 2, 2], [0, 2, 1, 2, 2, 0])
    assert compare.old_and_new({"x": {0: after}}, {"x": {0: first}}) == {"x": [{"seed": 0, "old": 0.5, "new": 0.5, "forgotten": 0.5}]}
