"""study/arms.py and study/comparison.py: simulated runs with a known answer, and real ones on the command line."""

import json
import re

import numpy as np
import pytest
from scipy import stats

import report
import train
from engine import experiment, files, metrics, settings
from engine.files import UserError
from study import arms as study_arms
from study import comparison


def simulated(accuracies, images=500, seed=0, spread=0.0, shared_difficulty=0.0, config=None):
    """{arm: {seed: Result}} of made-up predictions. accuracies: {arm: (number of seeds, accuracy)}.

    spread: of a seed's accuracy, the same for both arms, as when a test part is hard. shared_difficulty: share of the
    images that all get right or wrong alike.
    """
    draw, found = np.random.default_rng(seed), {}
    count = max(n for n, _ in accuracies.values())
    luck, alike = draw.normal(0, spread, count), [draw.random(images) < shared_difficulty for _ in range(count)]
    common = [draw.random(images) for _ in range(count)]
    for arm, (seeds, accuracy) in accuracies.items():
        found[arm] = {}
        for s in range(seeds):
            right = np.where(alike[s], common[s], draw.random(images)) < accuracy + luck[s]
            cost = dict.fromkeys(comparison.PRICES.values(), 2.0)
            cost |= {"peak_host_mb": 3.0, "peak_gpu_allocated_mb": None, "energy_wh": None}
            found[arm][s] = study_arms.Result(
                arm, {"seed": s, "cam": arm, "mode": "online"} | (config or {}),
                {"fingerprint": "f", "test": [f"{s}/{i}" for i in range(images)]}, [], {"cost": cost},
                {"test_logits": np.stack([1.0 - right, right], 1), "test_labels": np.ones(images, int)})
    return found


def row_of(arms, arm="a", baseline="none"):
    """The row of an arm, in a family of all arms, with what is said of it."""
    rows = comparison.one_family(comparison.compare(arms, baseline))
    return next(row | {"says": comparison.say(row)} for row in rows if row["arm"] == arm)


def test_a_planted_difference_of_two_points_over_ten_seeds_is_found():
    options = {"images": 2000, "spread": 0.02, "shared_difficulty": 0.8}
    row = row_of(simulated({"none": (10, 0.80), "a": (10, 0.82)}, **options))
    low, high = row["interval"]
    assert row["p"] < 0.05 and low > 0 and low < 0.02 < high
    assert row["says"] == (f"better by {100 * row['difference']:.2f} points ({100 * low:.2f} to {100 * high:.2f}), "
                           "significant")
    assert row_of(simulated({"none": (10, 0.82), "a": (10, 0.80)}, **options))["says"].startswith("worse by")


@pytest.mark.slow
def test_of_two_hundred_null_comparisons_about_one_in_twenty_is_called_significant():
    called = [row_of(simulated({"none": (10, 0.8), "a": (10, 0.8)}, images=200, seed=s, spread=0.03))["says"]
              for s in range(200)]
    assert 2 <= sum(text.endswith("), significant") for text in called) <= 20  # binomial(200, 0.05): all but 1 in 1,000


@pytest.mark.slow
@pytest.mark.parametrize("corrected", [True, False])
def test_of_families_of_seven_in_which_nothing_differs_one_in_twenty_calls_anything_different(corrected):
    """Seven measures of one arm, as question 4 speaks of them: with Holm over all of them, and over each alone."""
    draw, called = np.random.default_rng(0), 0
    for _ in range(200):
        values = draw.normal(0, 1, (7, 2, 10))
        tables = [comparison.compare_values({"none": dict(enumerate(base)), "a": dict(enumerate(arm))}, "none")
                  for base, arm in values]
        for rows in [sum(tables, [])] if corrected else tables:
            comparison.one_family(rows)
        called += any(row["p_holm"] < 0.05 for rows in tables for row in rows if "p" in row)
    assert (2 <= called <= 20) if corrected else called > 40


def test_a_family_is_all_that_it_is_given_and_every_row_knows_its_size():
    values = {"none": dict(enumerate(np.zeros(10))), "a": dict(enumerate(np.arange(10) + 1.0)),
              "b": dict(enumerate(np.arange(10) - 4.0))}
    one, two = (comparison.compare_values(values, "none") for _ in range(2))
    rows = comparison.one_family([*one, *two])
    assert [row.get("family") for row in rows] == [None, 4, 4] * 2
    assert [row["p_holm"] for row in rows if row["arm"] == "a"] == [4 * 2 / 2**10] * 2
    assert comparison.one_family([]) == []


def test_what_is_said_is_the_interval_and_what_holm_left_and_no_more():
    def said(gains, family):
        values = {"none": dict.fromkeys(range(len(gains)), 0.0), "a": dict(enumerate(gains))}
        others = [{"p": 0.9} for _ in range(family - 1)]
        return comparison.say(comparison.one_family(comparison.compare_values(values, "none")[1:] + others)[0])
    gains = [0.005, 0.03, 0.01, -0.004, 0.008, 0.016, -0.003, 0.015, 0.009, 0.009]
    low, high = (100 * end for end in stats.ttest_1samp(gains, 0).confidence_interval())
    size = f"by 0.95 points ({low:.2f} to {high:.2f})"
    assert low > 0
    assert said(gains, 1) == f"better {size}, significant"
    assert said(gains, 12) == f"better {size}, not significant after Holm over 12 comparisons"
    assert said([-gain for gain in gains], 2) == f"worse {size}, significant after Holm over 2 comparisons"
    assert said(gains[:5], 12).endswith("), 5 seeds cannot be significant after Holm over 12 comparisons, 9 can")
    assert said(gains[:1], 1) == "better by 0.50 points in one seed, which says nothing of others"
    assert said([0.0] * 5, 2) == "the same in every seed"


def test_with_one_seed_there_is_no_interval():
    row = row_of(simulated({"none": (1, 0.5), "a": (1, 0.9)}))
    assert row["interval"] is row["deviation"] is row["needed"] is None and row["p"] == 1


def test_arms_without_a_common_seed_are_not_compared():
    arms = simulated({"none": (1, 0.5), "a": (2, 0.9)})
    del arms["a"][0]
    row = row_of(arms)
    assert row["pairs"] == 0 and row["says"] == "no seed in common with the baseline" and "p" not in row


def test_the_price_is_a_ratio_to_the_baseline():
    arms = simulated({"none": (3, 0.8), "a": (3, 0.8)})
    for s in range(3):
        arms["a"][s].metrics["cost"] |= {"train_seconds": 3.0 + s, "peak_host_mb": 6.0}
    assert row_of(arms)["price"] == {"seconds": 2.0, "images": 1.0, "steps": 1.0, "memory": 2.0, "energy": None}


def test_runs_with_other_test_images_are_not_compared():
    arms = simulated({"none": (3, 0.8), "a": (3, 0.8)})
    arms["a"][1].split["test"][0] = "another"
    with pytest.raises(UserError, match="seed 1 and other test images"):
        comparison.compare(arms, "none")


def test_a_comparison_is_scipys_of_the_seeds_pairs():
    arms = simulated({"none": (8, 0.7), "a": (8, 0.75)}, images=300, spread=0.02)
    base, arm = ([run.correct("test").mean() for run in arms[name].values()] for name in ("none", "a"))
    row, theirs = row_of(arms), stats.ttest_rel(arm, base)
    assert row["interval"] == pytest.approx(theirs.confidence_interval(0.95))
    assert row["effect"] == pytest.approx(theirs.statistic / 8**0.5)
    assert row["difference"] == pytest.approx(np.mean(arm) - np.mean(base)) and row["spread"] == np.std(arm, ddof=1)


def logged(*accuracies, images=10):
    """A run of which only the log is known."""
    log = [{"val_accuracy": value, "images_seen": images} for value in accuracies]
    return study_arms.Result("x", {}, {}, log, {}, {})


def test_a_run_that_never_arrives_counts_as_the_horizon_and_pairs_are_kept():
    arms = {"none": {0: logged(0.1, 0.6, 0.6), 1: logged(0.6, 0.1, 0.2), 2: logged(0.9, 0.9, 0.9)},
            "a": {0: logged(0.1, 0.1, 0.1), 1: logged(0.1, 0.1, 0.6)}}
    half = [row for row in comparison.sooner(arms, "none") if row["target"] == 0.5]
    assert [(row["arm"], row["arrived"], row["seeds"]) for row in half] == [("none", 3, 3), ("a", 1, 2)]
    assert {row["horizon"] for row in half} == {3}
    assert half[0]["epochs"]["mean"] == pytest.approx((2 + 1 + 1) / 3)
    assert half[1]["epochs"]["mean"] == 3 and half[1]["epochs"]["difference"] == ((3 - 2) + (3 - 1)) / 2
    assert half[1]["images"]["difference"] == 15
    assert {row["target"] for row in comparison.sooner(arms, "none")} == {0.5, 0.7, 0.8, 0.9}  # no run reaches 0.95


def test_targets_do_not_come_from_the_baseline():
    """So an arm that is better is not held against a bar that the baseline reaches by definition."""
    arms = {"none": {0: logged(0.2, 0.3), 1: logged(0.3, 0.2)}, "a": {0: logged(0.8, 0.9), 1: logged(0.9, 0.9)}}
    rows = comparison.sooner(arms, "none")
    assert {row["arrived"] for row in rows if row["arm"] == "none"} == {0}
    assert {row["target"] for row in rows if row["arm"] == "a" and row["arrived"] == 2} == {0.5, 0.7, 0.8, 0.9}


def test_an_arm_that_sees_more_images_an_epoch_is_compared_in_images():
    arms = {"none": {0: logged(0.1, 0.6, 0.6), 1: logged(0.1, 0.6, 0.6)},
            "extra": {0: logged(0.1, 0.6, 0.6, images=14), 1: logged(0.1, 0.1, 0.6, images=14)}}
    [row] = [row for row in comparison.sooner(arms, "none") if row["target"] == 0.5 and row["arm"] == "extra"]
    assert row["epochs"]["difference"] == 0.5
    assert row["images"]["difference"] == ((28 - 20) + (30 - 20)) / 2  # the second arrives after 42, the horizon is 30


def test_a_shorter_arm_shortens_the_horizon_of_both():
    arms = {"none": {0: logged(0.1, 0.1, 0.1, 0.6)}, "a": {0: logged(0.1, 0.6)}}
    [row] = [row for row in comparison.sooner(arms, "none") if row["target"] == 0.5 and row["arm"] == "a"]
    assert row["horizon"] == 2 and row["epochs"]["difference"] == 0


def test_the_restricted_mean_is_the_area_under_the_kaplan_meier_curve():
    draw = np.random.default_rng(0)
    runs = {seed: logged(*np.maximum.accumulate(draw.random(40) ** 9)) for seed in range(30)}
    [row] = [row for row in comparison.sooner({"none": runs}, "none") if row["target"] == 0.8]
    assert 3 < row["arrived"] < 27 and row["horizon"] == 40
    epochs = [comparison.epoch_of(run.log, 0.8) for run in runs.values()]
    curve = stats.ecdf(stats.CensoredData(uncensored=[epoch for epoch in epochs if epoch],
                                          right=[40] * epochs.count(None))).sf
    steps = np.concatenate([[0], curve.quantiles[curve.quantiles < 40], [40]])
    area = np.sum(np.diff(steps) * curve.evaluate(steps[:-1]))
    assert row["epochs"]["mean"] == pytest.approx(area)


def result(classes, test, labels, predicted):
    found = {"test_labels": np.array(labels), "test_logits": np.eye(len(classes))[predicted]}
    return study_arms.Result("x", {}, {"classes": classes, "test": test}, [], {}, found)


def test_what_was_kept_and_what_was_forgotten():
    first = result(["a", "b"], ["1", "2", "3", "4"], [0, 0, 1, 1], [0, 0, 1, 1])  # knew all four
    after = result(["a", "b", "c"], ["1", "2", "3", "4", "5", "6"], [0, 0, 1, 1, 2, 2], [0, 2, 1, 2, 2, 0])
    assert comparison.old_and_new({"x": {0: after}}, {"x": {0: first}}) == {
        "x": [{"seed": 0, "old": 0.5, "new": 0.5, "forgotten": 0.5}]}


@pytest.mark.parametrize("added", [[], ["b"]])
def test_what_is_kept_is_asked_only_where_classes_were_added(added):
    made = simulated({"first": (2, 0.7), "later": (2, 0.8), "at once": (2, 0.8)}, images=40)
    for number, (arm, seed) in enumerate((arm, seed) for arm in made for seed in made[arm]):
        made[arm][seed] = run = made[arm][seed]._replace(folder=f"/runs/{number}")
        run.config["init"] = f"/runs/{number - 2}" if arm == "later" else None
        run.split["classes"] = ["a"] + added * (arm != "first")
    later, first = comparison.added_classes(made)
    assert list(later) == list(first) == (["later", "at once"] if added else [])
    assert all(runs[seed] is made["first"][seed] for runs in first.values() for seed in (0, 1))


def test_confidence_is_taken_where_the_baseline_was_misled():
    base, arm, right = (result(["a", "b"], ["1", "2", "3"], [0, 0, 1], found)
                        for found in ([0, 1, 0], [1, 0, 0], [0, 0, 1]))
    for run in (base, arm, right):
        run.split["fingerprint"] = "f"
    before, now, mended = comparison.misled_confidence({0: arm}, {0: base})
    assert before == pytest.approx([np.e / (1 + np.e)] * 2) == now and mended.tolist() == [True, False]
    assert comparison.misled_confidence({0: arm}, {0: right}) is None


def test_the_baseline_is_the_arm_without_proxy_attention():
    arms = simulated({"gradcam": (1, 0.5), "plain": (1, 0.5)})
    arms["plain"][0].config["cam"] = "none"
    assert study_arms.pick_baseline(arms) == "plain" and study_arms.pick_baseline(arms, "gradcam") == "gradcam"
    assert study_arms.pick_baseline(simulated({"b": (1, 0.5), "a": (1, 0.5)})) == "b"
    with pytest.raises(UserError, match="--baseline plian: no such arm; there are gradcam, plain. Did you mean"):
        study_arms.pick_baseline(arms, "plian")


def test_a_reader_is_warned_of_other_versions_unpaired_seeds_and_a_leak(tmp_path):
    arms = simulated({"none": (2, 0.5), "a": (3, 0.5)})
    for arm, runs in arms.items():
        for seed, run in runs.items():
            runs[seed] = run._replace(folder=tmp_path / f"{arm}{seed}")
            runs[seed].folder.mkdir()
            files.write_json(runs[seed].folder / "env.json", {"torch": f"2.{seed}", "timm": "1"})
    versions, seeds = study_arms.warnings_of(arms)
    assert versions == "the runs were made with different torch: 2.0, 2.1, 2.2" and "same seeds" in seeds
    arms["a"][0].config["mode"] = "resplit"
    assert study_arms.warnings_of(arms)[2:] == [f"some runs have --mode resplit: {metrics.LEAK}"]


# --- real runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Two arms of two seeds on a few digits, and a run that differs in its epochs too."""
    out = tmp_path_factory.mktemp("four")
    for cam, seed, epochs, name in (("none", 0, 2, "none0"), ("none", 1, 2, "none1"), ("gradcam", 0, 2, "gradcam0"),
                                    ("gradcam", 1, 2, "gradcam1"), ("gradcam", 0, 1, "other")):
        assert train.main(["--train-fraction", "0.1", "--epochs", str(epochs), "--cam", cam, "--seed", str(seed),
                           "--out", str(out), "--name", name, "--batch-size", "32"]) == 0
    return out


def cells_of(printed, arm):
    """The cells of an arm's first row in a printed table."""
    return next(line.split("  ") for line in printed.splitlines() if line.startswith(f"{arm}  "))


@pytest.mark.slow
def test_runs_are_compared_on_the_command_line(four, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main([*(str(four / f"{cam}{seed}") for cam in ("gradcam", "none") for seed in (0, 1)), "--text"]) == 0
    printed = capsys.readouterr().out
    found = {name: files.read_json(four / name / "metrics.json")["test"]["accuracy"]
             for name in ("none0", "none1", "gradcam0", "gradcam1")}
    mean = 50 * (found["gradcam0"] + found["gradcam1"])
    cells = [cell.strip() for cell in cells_of(printed, "cam gradcam") if cell]
    assert cells[:4] == ["cam gradcam", "cam none", "2", f"{mean:.2f}"]
    assert cells[5] == f"{mean - 50 * (found['none0'] + found['none1']):+.2f}"
    same = found["none0"] == found["gradcam0"] and found["none1"] == found["gradcam1"]
    assert cells[-1].endswith("the same in every seed" if same else "2 seeds cannot be significant, 6 can")
    assert "What each arm costs" in printed
    assert not list(tmp_path.iterdir())  # nothing is written


def test_a_run_compared_with_itself_shows_no_difference(four, capsys):
    assert report.main([*[str(four / "none0")] * 2, "--text"]) == 0
    printed = capsys.readouterr().out
    assert "the same in every seed" in printed and "run (2)" in printed


def test_runs_that_differ_in_more_than_one_setting_are_refused_with_the_list(four, capsys):
    both = [str(four / "none0"), str(four / "other"), "--text"]
    assert report.main(both) == 2
    assert "epochs: 2, 1; cam: none, gradcam" in (err := capsys.readouterr().err) and "--by" in err
    assert report.main([*both, "--by", "cam"]) == 2
    assert "epochs: 2, 1" in capsys.readouterr().err
    assert report.main([*both, "--by", "cam,epoch"]) == 2
    assert "--by epoch: no setting in which runs are compared. Did you mean 'epochs'?" in capsys.readouterr().err
    assert report.main([*both, "--by", "cam,epochs", "--baseline", "cam none, epochs 2"]) == 0


@pytest.mark.slow
def test_an_experiment_is_compared_by_its_arms(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "FOLDER", tmp_path / "experiments")
    (tmp_path / "experiments").mkdir()
    entry = files.read_json(settings.HERE / "experiments" / "demo.json")
    entry["settings"] |= {"train_fraction": 0.1, "epochs": 1}
    (tmp_path / "experiments" / "demo.json").write_text(json.dumps(entry))
    out = str(tmp_path / "runs")
    assert report.main(["--experiment", "demo", "--out", out, "--text"]) == 2
    assert "first run python train.py --experiment demo" in capsys.readouterr().err
    for cell in experiment.cells(settings.read_configs(), "demo", {"out": out})[:4]:
        assert train.main(experiment.command(cell)[2:]) == 0
    capsys.readouterr()
    assert report.main(["--experiment", "demo", "--out", out, "--text"]) == 0
    printed = capsys.readouterr().out
    assert re.search("2 seeds cannot be significant|the same in every seed", " ".join(cells_of(printed, "gradcam++")))
    assert "2 runs are not finished yet" in printed and not (tmp_path / "runs" / "demo" / "report").exists()
