"""experiment.py: cells, shares, and real processes that are stopped and go on."""

import copy
import json
import signal
import time

import pytest

import experiment
import run
import train
from data import UserError

CONFIGS = run.read_configs()
GRID = {"settings": {"epochs": 4}, "arms": {"none": {"cam": "none"}, "gradcam++": {"cam": "gradcam++"}},
        "grid": {"train_fraction": [0.1, 1.0], "schedule": [None, "every:2"]}, "seeds": [3, 1]}
TINY = {"settings": {"dataset": "digits", "model": "test_resnet", "pretrained": False, "image_size": 32, "train_fraction": 0.2},
        "arms": {"none": {"cam": "none"}, "all": {"select": "all"}}, "seeds": [0]}


def with_experiment(entry):
    return copy.deepcopy(CONFIGS) | {"experiments": {"tiny": entry}}


def test_cells_are_arms_times_grid_times_seeds_and_each_resolves(tmp_path):
    found = experiment.cells(with_experiment(GRID), "tiny", {"out": str(tmp_path), "model": "test_vit"})
    assert len(found) == len({c.folder for c in found}) == 2 * 2 * 2 * 2
    assert [c.seed for c in found] == [3] * 8 + [1] * 8  # every arm has its first seed before any has its second
    assert found[1].arm == "none-train_fraction=0.1-schedule=every:2" and found[0].folder.parent == tmp_path / "tiny"
    config = found[1].config(CONFIGS)
    assert (config["cam"], config["train_fraction"], config["schedule"], config["seed"], config["epochs"], config["model"]) \
        == ("none", 0.1, "every:2", 3, 4, "test_vit")


def test_the_cells_of_a_killed_experiment_end_and_the_same_command_goes_on(tmp_path, train_process):
    configs = tmp_path / "configs.json"
    configs.write_text(json.dumps(with_experiment({**TINY, "arms": {"none": {"cam": "none"}}})))
    arguments, folder = ["--experiment", "tiny", "--out", tmp_path / "runs", "--epochs", "12"], tmp_path / "runs" / "tiny"
    process = train_process(arguments, configs=configs)
    while not run.read_log(folder / "none-s0") and process.is_alive():
        time.sleep(0.02)
    process.kill()
    end = time.monotonic() + 60
    while "interrupted; go on with" not in (folder / "output" / "none-s0.txt").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert len(run.read_log(folder / "none-s0")) < 12
    again = train_process(arguments, configs=configs)
    assert again.wait() == 0 and "All 1 cells are done" in again.output(), again.output()
    assert [line["epoch"] for line in run.read_log(folder / "none-s0")] == list(range(1, 13))


def test_every_cell_is_in_one_share():
    every = experiment.cells(with_experiment(GRID), "tiny", {})
    for count in (1, 3, 16):
        shares = [experiment.share_of(every, f"{i}/{count}") for i in range(1, count + 1)]
        assert sorted(c.folder for share in shares for c in share) == sorted(c.folder for c in every)
    for text in ("0/3", "4/3", "3", "a/b", "-1/3", "1/0"):
        with pytest.raises(UserError, match="--array=1-16"):
            experiment.share_of(every, text)


def test_a_cells_command_line_gives_its_settings(tmp_path):
    for cell in experiment.cells(with_experiment(GRID), "tiny", {"out": str(tmp_path)}):
        given, _ = train.parse(experiment.command(cell)[2:])
        assert run.resolve(CONFIGS, given) == cell.config(CONFIGS)


@pytest.mark.parametrize("arguments, message", [
    (["--experiment", "dem"], "Did you mean 'demo'"),
    (["--experiment", "demo", "--cam", "none"], "--cam: experiment demo sets it for each run"),
    (["--experiment", "demo", "--seed", "3"], "--seed: experiment demo sets it"),
    (["--experiment", "demo", "--jobs", "0"], "--jobs 0: expected a whole number"),
    (["--experiment", "demo", "--epochs", "0"], "--epochs: 0 is out of range"),
    (["--experiment", "demo", "--resume", "runs/x"], "goes with neither"),
    (["--cell", "1/2"], "--cell goes with --experiment"),
])
def test_a_mistake_is_one_line_before_anything_runs(arguments, message, tmp_path, capsys):
    assert train.main([*arguments, "--out", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("change, message", [
    ({"seeds": []}, "expected one or more different seeds"), ({"seeds": [1, 1]}, "different seeds"),
    ({"seeds": [1.5]}, "is not a whole number"), ({"arms": {}, "grid": {}}, "nothing varies"),
    ({"arms": {"a": {"camm": "none"}}}, "experiments.tiny.arms.a: unknown key 'camm'.*Did you mean 'cam'"),
    ({"grid": {"area": 0.1}}, "experiments.tiny.grid.area: expected a list"), ({"grid": {"area": [2]}}, "2.* is out of range"),
    ({"seed": [1]}, "unknown key 'seed'.*Did you mean 'seeds'"),
])
def test_an_experiment_that_is_wrong_is_named_with_its_place(change, message, tmp_path):
    path = tmp_path / "configs.json"
    path.write_text(json.dumps(with_experiment(GRID | change)))
    with pytest.raises(UserError, match=message):
        run.read_configs(path)


def test_a_stopped_experiment_goes_on_and_repeats_nothing_that_is_finished(tmp_path, train_process):
    configs = tmp_path / "configs.json"
    configs.write_text(json.dumps(with_experiment(TINY)))
    arguments, folder = ["--experiment", "tiny", "--out", tmp_path / "runs", "--epochs", "8"], tmp_path / "runs" / "tiny"
    process = train_process(arguments, configs=configs)
    while not (folder / "none-s0" / "last.pt").exists() and process.is_alive():
        time.sleep(0.02)
    process.signal(signal.SIGTERM)
    assert process.wait() == 143 and "the same command goes on" in process.output()
    assert (folder / "none-s0" / "last.pt").exists() and not (folder / "none-s0" / "metrics.json").exists()
    assert not (folder / "all-s0").exists()

    process = train_process([*arguments, "--jobs", "2"], configs=configs)
    assert process.wait() == 0, process.output()
    assert "All 2 cells are done" in process.output()
    assert [line["epoch"] for line in run.read_log(folder / "none-s0")] == list(range(1, 9))
    told = json.loads((folder / "all-s0" / "env.json").read_text())["command"]
    assert "--select=all" in told and "--epochs=8" in told and "--no-pretrained" in told

    before = (folder / "all-s0" / "metrics.json").stat().st_mtime_ns
    again = train_process([*arguments, "--cell", "2/2"], configs=configs)
    assert again.wait() == 0 and "1 of 1 to do are done already" in again.output()
    assert (folder / "all-s0" / "metrics.json").stat().st_mtime_ns == before
    other = train_process([*arguments[:-1], "3"], configs=configs)
    assert other.wait() == 2 and "was made with other settings (epochs 8, now 3)" in other.output()


def test_a_cell_that_cannot_start_ends_the_experiment_with_its_line(tmp_path, capsys):
    assert train.main(["--experiment", "demo", "--dataset", "asl", "--data-dir", str(tmp_path), "--out", str(tmp_path / "runs")]) == 2
    assert "none-s0 could not start" in (err := capsys.readouterr().err) and "no images" in err


@pytest.mark.parametrize("name", CONFIGS["experiments"])
def test_every_experiment_of_configs_json_resolves_and_runs_on_any_dataset(name, tmp_path):
    found = experiment.cells(CONFIGS, name, {"out": str(tmp_path), "dataset": "folder", "data_dir": str(tmp_path)})
    assert len({c.folder for c in found}) == len(found) > 1
    for cell in found:
        config = cell.config(CONFIGS)
        assert config["dataset"] == "folder" and (cell.needs is None or cell.needs in {c.folder for c in found})
        assert cell.needs is None or str(cell.needs) in [config[key] for key in run.OF_RUNS]


def test_cells_without_proxy_attention_do_not_vary_what_it_alone_reads():
    found = experiment.cells(CONFIGS, "published", {})
    without = [c for c in found if c.options["cam"] == "none"]
    assert len(without) == 4 * 2 and len(found) == 4 * 2 + 4 * 2 * 6 * 6 * 5
    assert without[0].arm == "none-model=resnet18-schedule=20,p,19"
    assert f"{len(found):,} runs" in CONFIGS["experiments"]["published"]["help"]


CHAIN = {"settings": TINY["settings"], "arms": {"second": {"cam": "none", "init": "@first"}, "first": {"cam": "none", "classes": "0,1,2"}}, "seeds": [0]}


def test_an_arm_that_starts_from_another_waits_for_it(tmp_path, monkeypatch, capsys):
    configs = tmp_path / "configs.json"
    configs.write_text(json.dumps(with_experiment(CHAIN)))
    monkeypatch.setattr(run.read_configs, "__defaults__", (configs,))
    arguments = ["--experiment", "tiny", "--out", str(tmp_path / "runs"), "--epochs", "1", "--device", "cpu"]
    assert train.main([*arguments, "--cell", "1/2"]) == 2
    assert "second-s0 starts from" in (err := capsys.readouterr().err) and "first run that" in err
    assert train.main(arguments) == 0
    assert "keeps 3 of 10 classes" in (tmp_path / "runs" / "tiny" / "output" / "second-s0.txt").read_text()
    configs.write_text(json.dumps(with_experiment(CHAIN | {"arms": {"second": {"init": "@fist"}}})))
    assert train.main(arguments) == 2
    assert "arms.second.init: '@fist' is no arm" in capsys.readouterr().err


def test_weights_for_all_are_where_the_arms_that_start_from_no_other_begin():
    found = {c.arm: c.options.get("weights") for c in experiment.cells(with_experiment(CHAIN), "tiny", {"weights": "w.pth"})}
    assert found == {"first": "w.pth", "second": None}
