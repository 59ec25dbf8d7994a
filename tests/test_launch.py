"""engine/launch.py: the command line of train.py, what is refused before anything is written, and a dry run."""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
from conftest import draw_classes, draw_letter, hash_folder

import cam
import data
import proxy
import train
from engine import folder, launch, options, settings

COMMAND = re.compile(r"(?:torchrun [^#]*)?(?:python )?train\.py")


def help_of(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    return capsys.readouterr().out


# --help


def test_help_shows_each_option_with_its_default(capsys):
    shown = " ".join(help_of(capsys).split())
    defaults = settings.read_configs()["defaults"]
    for key in settings.SETTINGS:
        assert settings.option(key) in shown
        assert f"(default: {'null' if defaults[key] is None else defaults[key]})" in shown


def test_help_has_at_most_42_settings_in_groups_that_follow_the_method(capsys):
    shown = help_of(capsys)
    headings = re.findall(r"^(\S.*):$", shown, re.MULTILINE)
    groups = list(dict.fromkeys(setting.group for setting in settings.SETTINGS.values()))
    assert headings[headings.index("command") + 1:] == groups
    ours = [group.removeprefix("Proxy Attention: ") for group in groups if group.startswith("Proxy Attention")]
    assert [name.split(",")[0] for name in ours] == ["when", "which images", "which pixels", "what instead", "control"]
    found = {}
    for number, part in enumerate(re.split(r"^\S.*:$", shown, flags=re.MULTILINE)[-len(groups):]):
        for option in re.findall(r"^  (--[a-z-]+)", part, re.MULTILINE):
            found[option] = groups[number]
    assert found == {settings.option(key): setting.group for key, setting in settings.SETTINGS.items()}
    assert len(found) <= 42


def test_help_begins_with_commands_of_one_line_each(capsys):
    commands = [line for line in help_of(capsys).splitlines() if COMMAND.search(line) and "usage" not in line]
    assert len(commands) >= 9
    for line in commands:
        assert line.startswith("    ") and len(COMMAND.findall(line)) == 1 and len(line) <= 120, line


@pytest.mark.parametrize("program", ["train", "eval", "report", "bench"])
def test_a_program_finds_its_own_modules_where_python_does_not_look_beside_it(program, monkeypatch):
    """As under PYTHONSAFEPATH=1. Its first other import fails here, which is all of the program that runs."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(settings.HERE))])
    for name in ("torch", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        runpy.run_path(str(settings.HERE / f"{program}.py"))
    assert sys.path[0] == str(settings.HERE)


# What is refused.


@pytest.mark.parametrize("arguments, message", [
    (["--epoch", "3"], "unknown option '--epoch'. Did you mean '--epochs'?"),
    (["--epochs", "three"], '--epochs: "three" is not a whole number'),
    (["--epochs"], "argument --epochs: expected one argument"),
    (["--lr", "nan"], "--lr: nan is out of range"),
    (["--cam", "grad-cam"], "--cam: unknown 'grad-cam'; expected one of none, "),
    (["--cam", "cam", "--model", "test_vit", "--image-size", "160"], "cam needs a linear head on the global average"),
    (["--image-size", "8", "--model", "test_vit2"], "test_vit2 with images of 8x8: Input height (8) should be divis"),
    (["--image-size", "16", "--model", "vit_tiny", "--no-pretrained"], "no layer keeps a 4x4 grid for images of 16x16"),
    (["--layer", "layer7"], "no layer 'layer7' in this network"),
    (["--device", "cuda:99"], "--device cuda:99: not to be had here"),
    (["--device", "gpu"], "--device gpu: not to be had here"),
    (["--resume", "nowhere"], "nowhere: not a run's folder"),
    (["--name", "../x"], "--name '../x': expected a plain folder name"),
    (["--augment", "light,cutmx:1"], "--augment 'light,cutmx:1': expected one of "),
    (["--augment", "random_erasing:2"], "'2' is out of range behind random_erasing:"),
    (["--augment", "cutmix,mixup"], "cutmix and mixup contradict each other"),
    (["--classes", "1,x"], "--classes: dataset digits has no class 'x'"),
    (["--mode", "resplit"], "--mode resplit draws a new split at each p"),
    (["--warmup", "2"], "unknown option '--warmup'"),
    (["--any-code"], "--any-code goes with --resume"), (["--show"], "--show goes with --dry-run"),
    (["tests", "engine"], "unknown option 'tests'"), (["nowhere"], "no folder"),
    (["tests", "--data-dir", "engine"], "unknown option 'tests'"),
    (["--data-dir", ""], "--data-dir '': expected the name"), ([""], "--data-dir '': expected the name of a file or"),
    (["--csv= "], "--csv ' ': expected the name"), (["--weights="], "--weights '': expected the name"),
    (["--device", "mps:7"], "--device mps:7: not to be had here ("), (["--device", "meta"], "--device meta: not to be"),
])
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert train.main([*arguments, "--out", str(tmp_path / "runs")]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and shown.startswith("train.py: ") and len(shown) < 400
    assert not (tmp_path / "runs").exists()


def test_without_the_images_it_says_where_to_get_them_and_writes_nothing(tmp_path, capsys):
    out, images = tmp_path / "runs", tmp_path / "images"
    assert train.main(["--dataset", "asl", "--model", "vit_small", "--cam", "gradcam++", "--out", str(out),
                       "--data-dir", str(images)]) == 2
    answer = capsys.readouterr()
    assert answer.out == "" and not out.exists()
    assert answer.err.count("\n") == 1
    for words in ("dataset asl", str(images), "https://www.kaggle.com/datasets/grassknoted/asl-alphabet", "--data-dir"):
        assert words in answer.err


def test_an_old_runs_folder_is_never_written_over(trained, capsys):
    folder = trained("--train-fraction", "0.1", epochs=1)
    before = hash_folder(folder)
    assert train.main(["--out", str(folder.parent), "--name", "run"]) == 2
    assert f"--resume {folder}" in capsys.readouterr().err and hash_folder(folder) == before


def test_a_run_goes_on_with_the_settings_it_has(trained, capsys):
    folder = trained("--train-fraction", "0.1", epochs=1)
    assert train.main(["--resume", str(folder), "--lr", "1"]) == 2
    assert "leave out --lr" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--device", "cpu", "--workers", "0", "--cache", "off"]) == 0


# A dataset that lies elsewhere now.


TINY = ("--model", "test_resnet", "--no-pretrained", "--image-size", "32", "--batch-size", "8", "--workers", "0",
        "--device", "cpu", "--out", "runs", "--name", "run")


def unfinished(*arguments):
    """A run after one epoch of two. Each test has a folder of another name: where one leads is asked once a process."""
    assert train.main([*arguments, *TINY, "--epochs", "2"]) == 0
    for name in ("metrics.json", "predictions.npz"):
        folder.Path("runs", "run", name).unlink()
    shutil.copy("runs/run/previous.pt", "runs/run/last.pt")


def test_a_run_goes_on_where_its_dataset_lies_now_and_remembers_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_classes(tmp_path / "one", "AB", 8)
    unfinished("one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert train.main(["--resume", "runs/run"]) == 2
    assert "name its folder with --data-dir DIR" in capsys.readouterr().err
    assert train.main(["--resume", "runs/run", "--data-dir", "two"]) == 0
    assert "epoch 2/2" in (shown := capsys.readouterr().out) and "epoch 1/2" not in shown
    assert folder.open_run("runs/run").config["data_dir"] == "two" and train.main(["--resume", "runs/run"]) == 0


def test_a_run_does_not_go_on_with_another_dataset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw_classes(tmp_path / "right", "AB", 8)
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    draw_letter("C", 1).save(tmp_path / "wrong" / "A" / "A3.jpg")
    unfinished("right")
    before = (tmp_path / "runs" / "run" / "config.json").read_bytes()
    assert train.main(["--resume", "runs/run", "--data-dir", "wrong"]) == 2
    assert "wrong is not the one that runs/run was made with" in capsys.readouterr().err
    assert (tmp_path / "runs" / "run" / "config.json").read_bytes() == before


def test_a_csv_moves_with_its_images_or_is_named_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_classes(tmp_path / "old", "AB", 8)
    rows = "".join(f"{c}{i},{c}\n" for c in "AB" for i in range(1, 9))
    (tmp_path / "old" / "labels.csv").write_text(f"id,label\n{rows}")
    unfinished("--csv", "old/labels.csv")
    (tmp_path / "old").rename(tmp_path / "new")
    assert train.main(["--resume", "runs/run", "--data-dir", "new"]) == 0
    assert folder.open_run("runs/run").config["csv"] == "new/labels.csv"
    (tmp_path / "new" / "labels.csv").rename(tmp_path / "other.csv")
    assert train.main(["--resume", "runs/run", "--csv", "other.csv"]) == 0


def test_one_word_is_the_folder_unless_that_is_a_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert options.parse(["photos", "--epochs", "3"], "")[0] == {"data_dir": "photos", "epochs": 3}
    assert options.parse(["--epochs", "3", "photos"], "")[0] == {"data_dir": "photos", "epochs": 3}
    draw_classes(tmp_path / "photos", "AB", 8)
    assert train.main(["photos", *TINY, "--epochs", "1"]) == 0
    assert folder.open_run("runs/run").config["dataset"] == "folder"
    capsys.readouterr()
    assert train.main(["runs/run"]) == 2
    assert "runs/run is a run's folder: --resume goes on with it" in capsys.readouterr().err


# A dry run.


def test_a_dry_run_shows_settings_split_and_network_and_writes_nothing(asl, tmp_path, capsys):
    before = hash_folder(tmp_path)
    assert train.main(["--dataset", "asl", "--data-dir", str(asl), "--model", "test_vit", "--no-pretrained",
                       "--dry-run", "--image-size", "160", "--out", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    for words in (r"^lr +0.0003$", r"^A +7 +1 +2$", r"^all +21 +3 +6$", r"^test_vit .* parameters",
                  r"^explains blocks.5.norm1, a grid of 10x10$"):
        assert re.search(words, shown, re.MULTILINE), words
    assert hash_folder(tmp_path) == before


# Values from text.


@pytest.mark.parametrize("arguments, expected", [
    (["--epochs", "3", "--lr", "1e-3"], {"epochs": 3, "lr": 0.001}), (["--layer=-2"], {"layer": "-2"}),
    (["--schedule", "null", "--target-accuracy", "null"], {"schedule": None, "target_accuracy": None}),
    (["--no-pretrained", "--decoy"], {"pretrained": False, "decoy": 1}), (["--epochs", "null"], {"epochs": "null"}),
    (["--decoy", "0.9"], {"decoy": 0.9}), (["--decoy", "--seed", "1"], {"decoy": 1, "seed": 1}),
    (["--batch-size", "auto"], {"batch_size": "auto"}), ([], {}),
])
def test_options_become_values_of_their_settings(arguments, expected):
    assert options.parse(arguments, "")[0] == expected


def test_help_does_not_wait_for_torch_and_names_the_keys_that_the_tables_have():
    text = ("import runpy, sys; sys.argv = ['train.py', '--help']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally:\n    print('torch' in sys.modules, 'sklearn' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", text], cwd=settings.HERE, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False False"
    for table in (cam.METHODS, cam.EXPLAIN, proxy.FILLS, proxy.CONTROLS, proxy.SELECTIONS, proxy.STEPS, data.ON_TOP):
        assert all(key in done.stdout for key in table)


@pytest.mark.parametrize("module, table", [
    ("cam", "METHODS"), ("cam", "EXPLAIN"), ("proxy", "STEPS"), ("proxy", "SELECTIONS"), ("proxy", "FILLS"),
    ("proxy", "CONTROLS"), ("data", "AUGMENTATIONS"), ("data", "ON_TOP"), ("data", "LAYOUTS"),
    ("engine.split", "PARTS")])
def test_the_keys_that_are_read_from_a_file_are_those_of_its_table(module, table):
    keys = settings.Keys(module, table)
    assert keys.read() == list(keys) == list(getattr(sys.modules[module], table))


def test_a_new_entry_of_a_table_is_an_option_at_once(monkeypatch):
    monkeypatch.setitem(proxy.FILLS, "grey", proxy.black)
    assert settings.resolve(settings.read_configs(), {"fill": "grey"})["fill"] == "grey"
