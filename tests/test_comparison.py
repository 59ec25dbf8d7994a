"""study/arms.py and study/comparison.py: simulated runs with a known answer, and real ones on the command line."""

import json

import numpy as np
import pytest

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
    return next(row for row in comparison.compare(arms, baseline) if row["arm"] == arm)


def test_a_planted_difference_of_two_points_over_ten_seeds_is_found():
    options = {"images": 2000, "spread": 0.02, "shared_difficulty": 0.8}
    row = row_of(simulated({"none": (10, 0.80), "a": (10, 0.82)}, **options))
    low, high = row["interval"]
    assert row["p"] < 0.05 and low > 0 and low < 0.02 < high and row["says"].startswith("better by")
    assert row_of(simulated({"none": (10, 0.82), "a": (10, 0.80)}, **options))["says"].startswith("worse by")


@pytest.mark.slow
def test_of_two_hundred_null_comparisons_about_one_in_twenty_is_called_different():
    called = [row_of(simulated({"none": (10, 0.8), "a": (10, 0.8)}, images=200, seed=s, spread=0.03))["says"].split()[0]
              for s in range(200)]
    different = sum(word in ("better", "worse") for word in called)
    assert 2 <= different <= 20  # binomial(200, 0.05): all but 1 in 1,000
    assert called.count("no") == 200 - different


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for s in range(100):
        low, high = row_of(simulated({"none": (15, 0.7), "a": (15, 0.73)}, images=300, seed=s, spread=0.02))["interval"]
        covered += low <= 0.03 <= high
    assert covered >= 87


def test_with_few_seeds_it_says_that_they_are_too_few():
    row = row_of(simulated({"none": (5, 0.5), "a": (5, 0.9)}))
    assert row["p"] == pytest.approx(2 / 2**5) and row["says"] == "too few seeds to tell: 5, at least 6 are needed"
    assert row_of(simulated({"none": (6, 0.5), "a": (6, 0.9)}))["says"].startswith("better")


def test_arms_without_a_common_seed_are_not_compared():
    arms = simulated({"none": (1, 0.5), "a": (2, 0.9)})
    del arms["a"][0]
    row = row_of(arms)
    assert row["pairs"] == 0 and row["says"] == "no seed in common with the baseline" and "p" not in row


def test_what_no_number_of_points_could_show_among_so_many_arms_is_not_called_no_difference():
    def rows(seeds):
        accuracies = {"none": (seeds, 0.5)} | {name: (seeds, 0.9) for name in "abcd"} | {"same": (seeds, 0.5)}
        return {row["arm"]: row for row in comparison.compare(simulated(accuracies, images=2000, seed=1), "none")}
    few = rows(7)
    assert few["a"]["p"] == pytest.approx(2 / 2**7) and few["a"]["p_holm"] == pytest.approx(5 * 2 / 2**7)
    assert few["a"]["says"] == "too few seeds to tell among 5 arms: 7, at least 8 are needed"
    assert few["same"]["says"].startswith("no difference larger than")
    assert rows(8)["a"]["says"].startswith("better by 4")


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


def test_any_figure_is_compared_as_accuracy_is():
    """0s and 1s compared as figures and as what was correct: the same rows, but for the luck of the draws."""
    arms = simulated({"none": (8, 0.7), "a": (8, 0.75)}, images=300, spread=0.02)
    values = {arm: {s: run.correct("test").astype(float) for s, run in runs.items()} for arm, runs in arms.items()}
    as_figures, as_right = comparison.compare_values(values, "none")[1], row_of(arms)
    for key in ("mean", "spread", "pairs", "difference", "p", "p_holm", "effect"):
        assert as_figures[key] == pytest.approx(as_right[key])
    assert as_figures["interval"] == pytest.approx(as_right["interval"], abs=0.002)


def test_when_the_baselines_best_was_reached():
    arms = simulated({"none": (1, 0.8), "a": (1, 0.8), "b": (1, 0.8)})
    for arm, values in (("none", (0.5, 0.9, 0.8)), ("a", (0.2, 0.91, 0.1)), ("b", (0.2, 0.3, 0.1))):
        arms[arm][0].log.extend({"val_accuracy": v, "images_seen": 10, "train_seconds": 2.0} for v in values)
    second = [{"seed": 0, "epochs": 2, "images": 20, "seconds": 4.0}]
    never = [{"seed": 0, "epochs": None, "images": None, "seconds": None}]
    assert comparison.reached(arms, "none") == {"none": second, "a": second, "b": never}


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
    assert cells[-1] == "too few seeds to tell: 2, at least 6 are needed" and "What each arm costs" in printed
    assert not list(tmp_path.iterdir())  # nothing is written


def test_a_run_compared_with_itself_shows_no_difference(four, capsys):
    assert report.main([*[str(four / "none0")] * 2, "--text"]) == 0
    printed = capsys.readouterr().out
    assert "right and wrong on the same images" in printed and "0.00 to 0.00" in printed and "run (2)" in printed


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
    assert "too few seeds to tell: 2" in " ".join(cells_of(printed, "gradcam++"))
    assert "2 runs are not finished yet" in printed and not (tmp_path / "runs" / "demo" / "report").exists()
