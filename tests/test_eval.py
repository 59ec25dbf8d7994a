"""eval.py: figures and pictures of a run, and the heat of a network in any image."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hash_folder
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score

import eval as evaluation
import proxy
import train
from engine import checkpoint, metrics
from engine.folder import open_run, read_predictions

REPOSITORY = Path(evaluation.__file__).parent
LITE0 = REPOSITORY.parent / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"


def command(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, **options)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


# Figures.


def test_the_metrics_are_those_of_a_case_worked_by_hand():
    labels = np.array([0, 0, 1, 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    found = metrics.metrics(labels, np.log(probabilities), ["a", "b", "c"])
    assert found["accuracy"] == 0.75 and found["top5"] is None
    assert found["recall_macro"] == pytest.approx((0.5 + 1 + 1) / 3) == found["balanced_accuracy"]
    assert found["precision_macro"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["log_loss"] == pytest.approx(-np.log([0.8, 0.2, 0.6, 0.4]).mean())
    assert found["brier"] == pytest.approx(((0.04 + 0.01 + 0.01) + (0.64 + 0.49 + 0.01) + (0.01 + 0.16 + 0.09)
                                            + (0.09 + 0.09 + 0.36)) / 4)
    assert found["ece"] == pytest.approx((0.2 + 0.7 + 0.4 + 0.6) / 4)  # each confidence alone in its bin
    assert metrics.expected_calibration_error(np.array([0.9, 0.9]), np.array([True, False])) == pytest.approx(0.4)
    assert found["per_class"]["b"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "images": 1}


def test_a_class_without_images_counts_as_0_in_macro_averages_and_not_in_balanced_accuracy():
    labels, logits = np.array([0, 0, 1, 1]), np.eye(4)[[0, 1, 1, 2]]
    found = metrics.metrics(labels, logits, list("abcd"))
    assert found["recall_macro"] == 0.25 and found["balanced_accuracy"] == 0.5
    kept = [0, 1, 2]  # without the class that is predicted and has no image, scikit-learn can be asked
    assert balanced_accuracy_score(labels[kept], logits.argmax(1)[kept]) == pytest.approx(
        metrics.metrics(labels[kept], logits[kept], list("abcd"))["balanced_accuracy"])


def test_the_error_of_calibration_is_the_area_between_its_curve_and_the_diagonal():
    random = np.random.default_rng(0)
    confidence = random.uniform(0.1, 1, 1000)
    correct = random.random(1000) < confidence**2
    sizes, confident, right = metrics.calibration(confidence, correct)
    assert sizes.sum() == 1000 and right.sum() == correct.sum() and confident.sum() == pytest.approx(confidence.sum())
    some = sizes > 0
    gaps = np.abs(right[some] / sizes[some] - confident[some] / sizes[some])
    found = metrics.expected_calibration_error(confidence, correct)
    assert found == pytest.approx((gaps * sizes[some]).sum() / 1000) and found > 0.1
    assert [metrics.calibration(np.array([p]), np.array([True]))[0].argmax() for p in (0.01, 0.5, 1.0)] == [0, 7, 14]


def test_softmax_is_that_of_torch_and_stands_large_logits():
    logits = np.array([[1e4, 0, -1e4], [0.5, 0.25, 0]], np.float32)
    expected = torch.from_numpy(logits).double().softmax(1).numpy()
    assert metrics.softmax(logits).dtype == np.float64 and np.allclose(metrics.softmax(logits), expected, atol=1e-15)


@pytest.mark.slow
@pytest.mark.pictures
def test_eval_prints_the_metrics_again_and_rewrites_them_identically(trained):
    folder = trained()
    before = (folder / "metrics.json").read_bytes()
    (folder / "metrics.json").unlink()
    answer = command("eval.py", str(folder))
    assert answer.returncode == 0, answer.stderr
    assert (folder / "metrics.json").read_bytes() == before
    for words in ("f1_macro", "peak_host_mb", "train_seconds", f"{metrics_of(folder)['test']['accuracy']:.4f}"):
        assert words in answer.stdout
    for picture in ("confusion.png", "curves.png", "reliability.png", "sheet.png"):
        assert np.asarray(Image.open(folder / picture).convert("L")).std() > 10
    (folder / "predictions.npz").unlink()  # then they are made again, from last.pt
    assert evaluation.main([str(folder)]) == 0
    assert metrics_of(folder)["test"] == json.loads(before)["test"]


@pytest.mark.slow
def test_few_classes_have_a_line_each_and_many_are_where_the_text_says(trained):
    run = trained("--train-fraction", "0.1", epochs=1)
    result = metrics_of(run)
    text = evaluation.describe(run, result)
    for name, figures in result["test"]["per_class"].items():
        cells = [str(figures["images"]), *(f"{figures[key]:.4f}" for key in ("precision", "recall", "f1"))]
        assert [name, *cells] in [line.split() for line in text.splitlines()]
    many = {f"class\n{i}": {"images": 3, "precision": 0.5, "recall": 0.25, "f1": 0.1 + i / 100} for i in range(21)}
    result["test"]["per_class"] = many
    text = evaluation.describe(run, result)
    assert f"test.per_class in {run}/metrics.json, for 21 classes; the lowest f1 is that of class\\n0, 0.1000" in text


@pytest.mark.slow
def test_a_run_that_erased_while_most_images_misled_it_is_told_to_begin_later(trained):
    run = trained("--train-fraction", "0.1", epochs=2)  # 126 digits, two epochs: it has hardly learnt them
    assert "in 2 epochs over half" in (text := evaluation.describe(run, metrics_of(run)))
    assert "--schedule after:1 begins later" in text
    late = trained("--train-fraction", "0.1", "--schedule", "after:1", "--select", "all", epochs=2)
    assert "begins later" not in evaluation.describe(late, metrics_of(late))
    few = [line | {"misled": 0.4} for line in map(json.loads, (run / "log.jsonl").read_text().splitlines())]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in few))
    assert "begins later" not in evaluation.describe(run, metrics_of(run))


def test_several_runs_are_printed_one_after_the_other(trained, capsys):
    folders = [str(trained("--cam", cam, epochs=1)) for cam in ("none", "gradcam")]
    capsys.readouterr()
    assert evaluation.main(folders) == 0
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines() if "judged after the last" in line] == folders


def test_a_run_in_a_folder_that_is_closed_to_writing_is_printed_and_left_as_it_is(trained, monkeypatch, capsys):
    folder = trained("--cam", "none", epochs=1)
    before = hash_folder(folder)
    capsys.readouterr()
    monkeypatch.setattr(evaluation.os, "access", lambda *arguments: False)  # root may write everywhere
    assert evaluation.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"{metrics_of(folder)['test']['accuracy']:.4f}" in shown and "nothing was written" in shown
    assert hash_folder(folder) == before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run on digits."""
    out = tmp_path_factory.mktemp("runs")
    words = "--epochs 1 --cam none --train-fraction 0.2 --name r --out".split()
    assert train.main([*words, str(out)]) == 0
    return out / "r"


def test_another_checkpoint_is_judged_and_nothing_is_written(run, tmp_path, capsys):
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    state = checkpoint.load_checkpoint(folder / "best.pt")
    state["model"] |= {"fc.weight": torch.zeros(10, 96), "fc.bias": torch.eye(10)[3]}  # it says 3 to everything
    checkpoint.save_checkpoint(folder / "best.pt", state)
    before, labels = hash_folder(folder), read_predictions(folder)["test_labels"]
    capsys.readouterr()
    assert evaluation.main([str(folder), "--checkpoint", "best"]) == 0
    shown = capsys.readouterr().out
    assert f"{(labels == 3).mean():.4f}" in shown and "judged with best.pt" in shown and hash_folder(folder) == before
    assert metrics_of(folder)["test"]["accuracy"] != (labels == 3).mean()


# Another labelled folder.


@pytest.fixture
def scans(run, tmp_path):
    """The test images of digits 1 to 8 as files in class folders, the scans themselves: (folder, their numbers)."""
    images, labels = load_digits(return_X_y=True)
    numbers = [i for i in map(int, open_run(run).split["test"]) if 1 <= labels[i] <= 8]
    for i in numbers:
        (tmp_path / "new" / str(labels[i])).mkdir(parents=True, exist_ok=True)
        grey = np.rint(255 * images[i].reshape(8, 8) / 16).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / "new" / str(labels[i]) / f"{i}.png")
    return tmp_path / "new", numbers


def rows_of(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_another_labelled_folder_is_judged_as_the_same_images_were_in_the_run(run, scans, capsys):
    (folder, numbers), found = scans, read_predictions(run)
    logits = dict(zip(map(int, found["test_ids"]), found["test_logits"]))
    labels = load_digits().target
    right = [logits[i].argmax() == labels[i] for i in numbers]
    capsys.readouterr()
    assert evaluation.main([str(run), "--data-dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"accuracy +{np.mean(right):.4f}\n", shown) and "8 of 10 classes" in shown
    assert "classes that it lacks, which count as 0 in averages called macro: 0, 9\n" in shown
    rows = {int(Path(row["image"]).stem): row for row in rows_of(run / "predictions.csv")}
    assert {i: (row["true"], row["predicted"]) for i, row in rows.items()} == {
        i: (str(labels[i]), str(logits[i].argmax())) for i in numbers}
    assert all(float(rows[i]["confidence"]) == pytest.approx(metrics.softmax(logits[i][None]).max(), abs=2e-4)
               for i in numbers)


def test_classes_and_images_of_another_folder_that_cannot_be_judged_are_named(run, scans, capsys):
    folder, numbers = scans
    (folder / "1").rename(folder / "one")
    (folder / "8" / "broken.png").write_bytes(b"\x89PNG")
    count = len(list((folder / "one").iterdir()))
    capsys.readouterr()
    assert evaluation.main([str(run), "--data-dir", str(folder)]) == 2
    shown = capsys.readouterr()
    assert "lacks, which count as 0 in averages called macro: 0, 1, 9" in shown.out
    assert f"does not know, left out: one ({count} images)" in shown.out
    assert "8/broken.png (" in shown.out and re.search(r"\naccuracy +0", shown.out)
    assert f"1 of {len(numbers) - count + 1} images cannot be read" in shown.err and shown.err.count("\n") == 1
    assert len(rows_of(run / "predictions.csv")) == len(numbers) - count
    for each in folder.iterdir():
        each.rename(folder / f"digit {each.name}")
    assert evaluation.main([str(run), "--data-dir", str(folder)]) == 2
    assert "no image of a class of" in capsys.readouterr().err


def test_of_a_folder_with_parts_the_test_part_alone_is_judged(run, scans, capsys):
    folder, _ = scans
    for part, digits in (("train", "12"), ("test", "34")):
        for digit in digits:
            (folder / part).mkdir(exist_ok=True)
            (folder / digit).rename(folder / part / digit)
    for digit in "5678":
        shutil.rmtree(folder / digit)
    kept, every = (len(list(folder.glob(f"{part}/*/*"))) for part in ("test", "*"))
    assert evaluation.main([str(run), "--data-dir", str(folder)]) == 0
    assert f"{kept} of {every} images, its test part alone, 2 of 10 classes" in capsys.readouterr().out


# Any images.


def test_of_a_folder_of_images_the_broken_and_hidden_are_named_and_the_others_predicted(run, scans, tmp_path, capsys):
    (folder, numbers), found = scans, read_predictions(run)
    odd, kept = tmp_path / "odd", [path for path in sorted(folder.rglob("*.png"))[:2]]
    (odd / "__MACOSX").mkdir(parents=True)
    for number, path in enumerate(kept):
        path.rename(odd / f"{number}-{path.name}")
    for name in ("._0.png", "__MACOSX/0.png", ".hidden.jpg"):
        (odd / name).write_bytes(b"Mac OS X")
    (odd / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    capsys.readouterr()
    assert evaluation.main([str(run), "--image", str(odd), "--cam", "center", "--out", str(tmp_path / "sheets")]) == 2
    shown = capsys.readouterr()
    assert len(list((tmp_path / "sheets").iterdir())) == 2
    for name in ("._0.png", "__MACOSX/0.png", ".hidden.jpg", "cut.jpg"):
        assert re.search(rf"passed over: .*{re.escape(name)} \(", shown.out)
    assert "1 of 3 images cannot be read" in shown.err and "cut.jpg" in shown.err and shown.err.count("\n") == 1
    logits = dict(zip(map(int, found["test_ids"]), found["test_logits"]))
    for row, path in zip(rows_of(run / "predictions.csv"), kept):
        predicted, confidence = logits[int(path.stem)].argmax(), metrics.softmax(logits[int(path.stem)][None]).max()
        assert row["image"].endswith(path.name) and row["predicted"] == str(predicted)
        assert float(row["confidence"]) == pytest.approx(confidence, abs=2e-4)
        assert f"{row['image']}: {predicted} ({confidence:.2f})" in shown.out


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """scikit-learn's two sample photographs as files, one of them in a subfolder."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photographs")
    (folder / "more").mkdir()
    for name, picture in zip(("china.jpg", "more/flower.png"), load_sample_images().images):
        Image.fromarray(picture).save(folder / name)
    return folder


@pytest.mark.slow
def test_image_sheets_show_what_each_method_sees(trained, photographs, tmp_path, capsys):
    folder, before = trained(epochs=1), hash_folder(photographs)
    assert evaluation.main([str(folder), "--image", str(photographs), str(photographs / "china.jpg"), "--cam",
                            "gradcam", "eigencam", "center", "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["heat-china-2.png", "heat-china.png", "heat-flower.png"]
    for path in tmp_path.glob("*.png"):
        sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
        panels = np.array_split(sheet[len(sheet) // 2], 4, axis=0)  # one row of pixels through the four pictures
        assert all((panel.max(1) - panel.min(1)).max() > 20 for panel in panels)
    assert hash_folder(photographs) == before
    assert evaluation.main([str(folder), "--image", str(photographs / "gone.jpg")]) == 2
    assert evaluation.main([str(folder), "--image", str(photographs), "--cam", "rollout"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in shown] == ["eval.py"] * 2
    assert "gone.jpg: no such file" in shown[0] and "rollout needs a transformer" in shown[1]


@pytest.mark.skipif(not LITE0.exists(), reason="needs shared/weights beside the project")
def test_image_sheets_need_no_run(photographs, tmp_path, capsys):
    assert evaluation.main(["--model", "efficientnet_lite0", "--weights", str(LITE0), "--image",
                            str(photographs / "china.jpg"), "--out", str(tmp_path)]) == 0
    assert "296 of 296 tensors" in capsys.readouterr().out and (tmp_path / "heat-china.png").exists()


@pytest.mark.parametrize("arguments, message", [
    ([], "name a run's folder"), (["r", "--cam", "gradcam"], "--cam goes with --image"),
    (["--model", "resnet18"], "--model goes with --image"), (["r", "--out", "o"], "--out goes with --image"),
    (["--image", "a.jpg"], "name one run, or a network with --model"),
    (["r", "s", "--image", "a.jpg"], "name one run, or a network with --model"),
    (["r", "--data-dir", "d", "--image", "a.jpg"], "--data-dir: name one run"),
    (["r", "s", "--data-dir", "d"], "--data-dir: name one run"), (["r", "--checkpoint", "first"], "invalid choice"),
    (["--model", "m", "--image", "a.jpg", "--checkpoint", "best"], "--checkpoint goes with a run"),
    (["r", "--weights", "w.pt", "--image", "a.jpg"], "--weights goes with --model"),
    (["r", "--colour"], "unknown option '--colour'"), (["r"], "r: not a run's folder"),
])
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("eval.py: ") and message in err and err.count("\n") == 1


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.main(["--help"])
    shown = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and len(shown) <= 50 and max(map(len, shown)) <= 120


# The sheet of `train.py --dry-run --show`.


@pytest.mark.slow
def test_a_dry_run_shows_every_fill_and_control_on_one_sheet(tmp_path, capsys):
    before = len(list(REPOSITORY.iterdir()))
    assert train.main(["--dry-run", "--show", "--out", str(tmp_path), "--name", "x"]) == 0
    assert str(tmp_path / "x-show.png") in capsys.readouterr().out and len(list(REPOSITORY.iterdir())) == before
    sheet = np.asarray(Image.open(tmp_path / "x-show.png").convert("RGB")).astype(int)
    lines = 2 + len(proxy.FILLS) + len(proxy.CONTROLS) + 3
    rows = [part[:, sheet.shape[1] // 7:] for part in np.array_split(sheet, lines)]
    assert all(np.ptp(row) > 100 for row in rows)
    assert train.main(["--show"]) == 2 and "--show goes with --dry-run" in capsys.readouterr().err
