"""bench.py: what it prints is what it keeps. How long anything takes is not tested."""

import csv

import numpy as np
import pytest
import torch

import bench
import cam
from engine.files import UserError
from study import peers, timing

SMALL = ["--models", "test_resnet", "--image-size", "64", "--batch-size", "4", "--rounds", "1", "--images", "60",
         "--device", "cpu"]
ROWS = {"cam": 2, "step": 3, "train": 2, "staged": 1, "runs": 3, "snapshot": 1}


@pytest.mark.slow
@pytest.mark.parametrize("what", ROWS)
def test_a_table_is_kept_as_it_is_printed_with_the_machine_and_what_was_set(what, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "table.csv"
    monkeypatch.setattr(peers, "run_of", lambda command, epochs, place: 1.0 + epochs)
    script = tmp_path / "train.py"
    more = ["--methods", "gradcam", "layercam", "--csv", str(kept), "--script", str(script)]
    assert bench.main([what, *SMALL, *more]) == 0
    rows, printed = list(csv.DictReader(kept.open())), capsys.readouterr().out
    assert len(rows) == ROWS[what]
    lines = [line.split() for line in printed.splitlines() if line.startswith("test_resnet")]
    for row, line in zip(rows, lines, strict=True):
        assert "batch 4" in row["set"] and "torch" in row["machine"] and row["network"] == line[0] == "test_resnet"
        values = list(row.values())[:-2]
        assert len(values) == len(line)
        for value, shown in zip(values[1:], line[1:]):
            number = shown.removesuffix("%")
            if number.replace(".", "").isdecimal() and value.replace(".", "").isdecimal():
                assert float(value) == pytest.approx(float(number) / (100 if "%" in shown else 1), abs=0.06)
    if what == "cam":
        assert all(float(r["adds"]) / float(r["forward"]) == pytest.approx(float(r["adds/forward"])) for r in rows)
    if what == "step":
        for row in rows:
            low, high = map(float, row["loss 95%"].split("-"))
            assert low - 0.001 <= float(row["loss"]) <= high + 0.001
    if what == "runs":
        assert [row["kind"] for row in rows] == ["none", "gradcam", "timm"]
        assert {float(row["an epoch"]) for row in rows} == {1} and {float(row["around"]) for row in rows} == {1}


@pytest.mark.slow
def test_a_command_of_ours_is_a_run_and_one_that_fails_is_said(tmp_path):
    options = bench.parse(["runs", *SMALL, "--images", "80"])
    given = peers.options_of_a_run("test_resnet", tmp_path, options)
    command = peers.commands(given, "test_resnet", None)["gradcam"]
    peers.run_of(command, 1, tmp_path)
    with pytest.raises(UserError, match="train.py ended with status 2: .*--epochs"):
        peers.run_of(command, 0, tmp_path)


def test_a_ratio_is_the_median_of_its_rounds_and_its_interval_covers_the_true_one():
    assert timing.ratio({"plain": [1.0, 2.0, 4.0], "loss": [1.1, 2.4, 4.2]}, "loss", "plain") == (1.1, "1.050-1.200")
    assert timing.ratio({"plain": [1.0]}, "library", "plain") == (None, None)
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        taken = {"plain": np.ones(11), "loss": np.exp(0.05 * random.standard_normal(11))}
        low, high = map(float, timing.ratio(taken, "loss", "plain")[1].split("-"))
        covered += low <= 1 <= high
    assert 0.95 < covered / 400 < 1


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "a").write_text("")
    assert bench.main(["cam", *SMALL, "--methods", "gradcam", "--csv", str(tmp_path / "a" / "table.csv")]) == 2
    assert "table.csv" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["leak"], ["cam", "--colour"], []])
def test_a_mistake_is_one_line_and_status_2(arguments, capsys):
    assert bench.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.py: ") and err.count("\n") == 1


def test_a_step_is_the_programs_own_with_the_share_that_was_asked_for():
    options = bench.parse(["step", *SMALL])
    model, images = bench.network_and_images("test_resnet", options)
    labels = torch.arange(4)
    for share, number in ((0.0, 0), (0.25, 1), (1.0, 2)):  # at most half of the seats
        eraser = bench.eraser_of("loss", cam.CAM(model, "gradcam"), share, images)
        trained = bench.STEPS["loss"](model.train(), images, labels, eraser)
        trained.loss.backward()  # which brings the heat
        assert trained.fresh.all() and int(eraser.waiting.taken.sum()) == number
        assert int((~bench.STEPS["loss"](model, images, labels, eraser).fresh).sum()) == number


@pytest.mark.skipif(not peers.installed(), reason="needs the grad-cam library of tests/requirements.txt")
def test_the_library_explains_the_same_layer_and_finds_the_same_heat():
    torch.manual_seed(0)
    options = bench.parse(["cam", *SMALL])
    model, images = bench.network_and_images("test_resnet", options)
    classes, explain = torch.tensor([3, 1, 4, 1]), cam.CAM(model, "layercam")
    theirs = peers.heat_of(model, images, classes, "layercam", explain)()
    with explain:
        ours = cam.upsample(explain(model.eval()(images), classes=classes), 64).numpy()
    assert theirs.shape == ours.shape == (4, 64, 64)
    assert abs(theirs - ours).max() < 0.01
    assert peers.heat_of(model, images, classes, "rollout", explain) is None
