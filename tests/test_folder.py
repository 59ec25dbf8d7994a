"""engine/folder.py: a run's folder is made once, and opens again, also one that an earlier program made."""

import json
import os

import pytest
import torch
from conftest import draw_letter, hash_folder

import data
import train
from engine import files, folder, settings
from engine.files import UserError
from engine.settings import Setting
from staged import ErasedRound

# What the program wrote when it had 64 settings: `train.py --train-fraction 0.3 --epochs 3 --budget extra
# --cam gradcam++ --accumulate 2 --cutmix 1 --schedule every:2`.
FORMAT_1 = json.loads("""
{"dataset": "digits", "data_dir": null, "classes": null, "model": "resnet10s", "pretrained": false, "weights": null,
 "init": null, "reweight": null, "upweight": 20, "image_size": 32, "train_fraction": 0.3, "decoy": false,
 "skip_bad": false, "split_from": null, "seed": 0, "epochs": 3, "batch_size": 64, "lr": 0.003, "layer_decay": 1.0,
 "freeze": 0, "accumulate": 2, "weight_decay": 0.05, "clip": 1.0, "augment": "light", "random_erasing": 0.0,
 "hide_and_seek": 0.0, "mixup": 0.0, "cutmix": 1.0, "cam": "gradcam++", "heat_from": null, "layer": "layer4",
 "explain": "predicted", "smooth": false, "warmup": 0, "schedule": "every:2", "same_step": false, "select": "misled",
 "subset": 1.0, "area": 0.1, "grow": 0, "threshold": null, "soften": 0.0, "fill": "black", "weight": 1.0,
 "control": null, "consistency": 0.0, "budget": "extra", "share": 0.5, "mode": "online", "rounds": 3,
 "target_accuracy": null, "format": "jpg", "protocol": "fixed", "device": "cpu", "workers": 0, "cache": "auto",
 "checkpoint_every": "10m", "compile": false, "checkpointing": false, "sync_bn": false, "deterministic": false,
 "amp": "auto", "out": "runs", "name": "extra",
 "dataset_entry": {"source": "part of scikit-learn", "path": null, "layout": "digits", "image_size": 32,
                   "normalisation": {"mean": [0.305, 0.305, 0.305], "std": [0.376, 0.376, 0.376]},
                   "split": {"rule": "stratified", "val": 0.1, "test": 0.2},
                   "augment": {"flip": false, "rotate": 10, "shift": 0.1}},
 "model_entry": {"timm": "resnet18", "arguments": {"layers": [1, 1, 1, 1], "channels": [32, 48, 64, 96],
                                                   "stem_type": "deep", "stem_width": 16, "output_stride": 8}}}
""")
SPLIT = {"classes": list("0123456789"), "fingerprint": "0", "train": ["0000"], "val": ["0001"], "test": ["0002"],
         "skipped": []}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """`opened(config)` writes a run's folder with that config.json and opens it: its settings."""
    monkeypatch.setattr(folder, "_noted", set())

    def write_and_open(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "split.json").write_text(json.dumps(SPLIT))
        return folder.open_run(tmp_path).config

    return write_and_open


# Runs of an earlier program.


def test_a_run_made_with_64_settings_opens_with_todays(opened, capsys):
    assert len(FORMAT_1) == 64 + 2
    config = opened(FORMAT_1)
    assert set(config) == {*settings.SETTINGS, "format", "dataset_entry", "model_entry"}
    assert config["format"] == settings.FORMAT == 2
    assert (config["augment"], config["schedule"], config["mode"]) == ("light,cutmix:1.0", "every:2", "online")
    assert data.read_augment(config["augment"]) == ("light", {"cutmix": 1.0})
    kept = set(settings.SETTINGS) - {"augment", "step", "csv", "csv_columns", "heat"}
    assert {key: config[key] for key in kept} == {key: FORMAT_1[key] for key in kept}
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "config.json: made by an earlier program" in shown.err and "ignored" not in shown.err


@pytest.mark.parametrize("change, expected", [
    ({"cutmix": 0.0}, {"augment": "light"}),
    ({"cutmix": 0.0, "augment": "none", "random_erasing": 0.5, "mixup": 0.2},
     {"augment": "none,random_erasing:0.5,mixup:0.2"}),
    ({"schedule": None, "warmup": 2}, {"schedule": "after:2"}),
    ({"schedule": "2,p", "protocol": "resplit"}, {"mode": "resplit", "schedule": "2,p"}),
    ({"area": None, "threshold": 0.5}, {"area": 0.1}), ({"fill": "white"}, {"fill": "black"}),
    ({"same_step": True}, {"step": "same_step"}),
    ({"same_step": True, "heat_from": "runs/first"}, {"step": "online", "heat": "runs/first"}),
    ({}, {"step": "online"}),
])
def test_settings_that_are_parts_of_others_now_are_read_there(change, expected, opened):
    config = opened(FORMAT_1 | change)
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("change, ignored", [
    ({"freeze": 1, "clip": 2.0}, "freeze 1, clip 2.0"), ({"weight_decay": 0.0}, "weight_decay 0.0"),
    ({"format": "png", "smooth": True}, "smooth True, format png"),
    ({"warmup": 1}, "warmup 1"),  # beside a schedule
    ({"mode": "staged", "schedule": "1,p,1", "protocol": "resplit"}, "protocol resplit"),
    ({"mixup": 0.2}, "mixup 0.2"), ({"fill": "max"}, "fill max"),  # beside cutmix; a fill that is gone
    ({"area": None, "threshold": 0.5}, "threshold 0.5"), ({"checkpoint_every": "500"}, "checkpoint_every 500"),
])
def test_what_is_ignored_of_an_earlier_run_is_printed_once(change, ignored, opened, capsys):
    for _ in range(2):
        opened(FORMAT_1 | change)
    assert capsys.readouterr().err.splitlines()[0].endswith(f"made by an earlier program; ignored: {ignored}")
    opened(FORMAT_1 | change)
    assert capsys.readouterr().err == ""
    opened(FORMAT_1 | {"subset": 0.2})
    assert "ignored: subset 0.2" in capsys.readouterr().err


def test_a_run_made_before_a_setting_existed_opens_with_what_it_had_then(opened, monkeypatch, capsys):
    config = opened(FORMAT_1)
    capsys.readouterr()
    monkeypatch.setitem(settings.SETTINGS, "snapshot", Setting(int, "training", "of an epoch", 0, 9, neutral=0))
    monkeypatch.setitem(settings.SETTINGS, "teacher", Setting(str, "training", "a run", optional=True))
    assert opened(config) == config | {"snapshot": 0, "teacher": None} and capsys.readouterr().err == ""
    assert opened(FORMAT_1)["snapshot"] == 0


@pytest.mark.parametrize("change, message", [
    ({"format": 3}, "config.json: made by a newer program, format 3; this one reads up to 2"),
    ({"format": 2}, "config.json: unknown key 'upweight'"), ({"fill": "gray"}, "config.json: fill: unknown 'gray'"),
    ({"new": 1}, "config.json: unknown key 'new'"), ({"augment": ["light"]}, "config.json: augment .*expected one of"),
    ({"epochs": "3"}, 'config.json: epochs: "3" is not a whole number'),
])
def test_a_run_of_a_newer_program_or_with_settings_that_mean_nothing_is_refused(change, message, opened):
    with pytest.raises(UserError, match=message):
        opened(FORMAT_1 | change)


def test_what_a_run_wrote_opens_as_it_was_written(trained):
    path = trained("--train-fraction", "0.1", "--augment", "randaugment,mixup:0.3", "--layer", "layer3", epochs=1)
    written, run = files.read_json(path / "config.json"), folder.open_run(path)
    assert run.config == written and list(written)[0] == "format" and len(written) == len(settings.SETTINGS) + 3
    assert run.split == files.read_json(path / "split.json") and len(run.log) == 1
    model = run.network()
    assert not model.training and model.num_classes == 10 and run.dataset().fingerprint == run.split["fingerprint"]


# A folder for a run.


def test_a_name_that_nobody_asked_for_gets_a_number_where_it_is_taken(tmp_path):
    config = settings.resolve(settings.read_configs(), {"out": str(tmp_path)})
    for expected in ("digits-resnet10s-gradcam-s0", "digits-resnet10s-gradcam-s0-2"):
        path = folder.make_folder(config | {})
        assert path.name == expected
        (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is there already: choose another --name or --out, or go on with it"):
        folder.make_folder(config | {"name": "digits-resnet10s-gradcam-s0"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made .*; choose another --out"):
        folder.make_folder(config | {"out": str(tmp_path / "file")})


@pytest.mark.parametrize("images, expected", [("pets/photos", "photos"), ("a b: c", "a b%3A c"),
                                              ("猫" * 80, "猫" * 33)])
def test_a_run_on_a_folder_carries_the_folders_name(images, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / images).mkdir(parents=True)
    config = settings.resolve(settings.read_configs(), {"data_dir": images, "out": "runs"})
    assert folder.make_folder(config).name == f"{expected}-resnet18-gradcam-s0"
    config = settings.resolve(settings.read_configs(), {"csv": f"{images}/labels.csv", "out": "runs", "seed": 1})
    assert folder.make_folder(config).name == f"{expected}-resnet18-gradcam-s1"


def test_a_log_is_cut_to_the_epochs_of_the_checkpoint(tmp_path):
    for epoch in (1, 2, 3):
        files.append_line(tmp_path / "log.jsonl", {"epoch": epoch})
    files.cut_lines(tmp_path / "log.jsonl", 2)
    assert [line["epoch"] for line in folder.read_log(tmp_path)] == [1, 2]


def test_the_environment_shows_why_two_machines_differ(trained):
    found = files.read_json(trained("--train-fraction", "0.1", "--device", "cpu", epochs=1) / "env.json")
    assert found["torch"] == torch.__version__ and found["device"] == "cpu" and found["threads"] >= 1
    assert found["dataset"]["name"] == "digits" and found["dataset"]["images"] == 1797 and found["processor"]


# Names.

ODD = ["a b", "é <b>狗", "$x_2$ & [red]", "-rf", "100%"]


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.parametrize("mode", [["--budget", "extra"], ["--mode", "staged", "--rounds", "1", "--select", "all",
                                                          "--cam", "center", "--control", "label"]])
def test_names_with_markup_stay_in_the_runs_folder_and_the_dataset_is_untouched(mode, tmp_path):
    root = tmp_path / "images"
    for letter, name in zip("ABCDE", ODD):
        (root / name).mkdir(parents=True)
        for frame in range(6):
            draw_letter(letter, frame).save(root / name / f"{name} [red] {frame}.jpg")
    before = hash_folder(root)
    assert train.main(["--dataset", "folder", "--data-dir", str(root), "--model", "test_resnet", "--no-pretrained",
                       "--image-size", "64", "--epochs", "1", "--out", str(tmp_path / "runs"), "--name", "run",
                       "--workers", "0", *mode]) == 0
    assert hash_folder(root) == before and sorted(os.listdir(tmp_path)) == ["images", "runs"]
    opened = folder.open_run(tmp_path / "runs" / "run")
    assert set(opened.split["classes"]) == set(ODD) and (opened.folder / "sheet.png").exists()
    if "staged" in mode:
        rows = ErasedRound(opened.folder, 1).rows()
        assert rows and {row["label"] for row in rows} <= set(ODD)
        assert all((opened.folder / row["file"]).is_file() and row["file"].count("/") == 3 for row in rows)
