"""engine/experiment.py: what an experiment's file holds, its cells, and real processes that are stopped and go on."""

import json
import signal
import subprocess
import sys
import time

import conftest
import pytest
import torch

import train
from engine import experiment, folder, options, settings
from engine.files import UserError

CONFIGS = settings.read_configs()
NAMES = sorted(path.stem for path in experiment.FOLDER.glob("*.json"))
GRID = {"settings": {"epochs": 4}, "arms": {"none": {"cam": "none"}, "gradcam++": {"cam": "gradcam++"}},
        "grid": {"train_fraction": [0.1, 1.0], "schedule": [None, "every:2"]}, "seeds": [3, 1]}
TINY = {"settings": {"dataset": "digits", "model": "test_resnet", "pretrained": False, "image_size": 32,
                     "train_fraction": 0.2},
        "arms": {"none": {"cam": "none"}, "all": {"select": "all"}}, "seeds": [0]}
CHAIN = {"settings": TINY["settings"], "seeds": [0],
         "arms": {"second": {"cam": "none", "init": "@first"}, "first": {"cam": "none", "classes": "0,1,2"}}}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """`written(tiny=…)` puts experiments, by name, where the program finds them, and returns their folder."""
    place = tmp_path / "experiments"
    place.mkdir()
    monkeypatch.setattr(experiment, "FOLDER", place)

    def write(**entries):
        for name, entry in entries.items():
            (place / f"{name}.json").write_text(json.dumps(entry))
        return place

    return write


def train_with(experiments, *arguments):
    """In a process of its own: `train.py` with other experiments."""
    experiment.FOLDER = experiments
    conftest._train_main(*arguments)


class Process(conftest.TrainProcess):
    """`train.py --experiment`, with the experiments of another folder."""

    def __init__(self, arguments, experiments, output):
        self.paths = [output]
        call = (experiments, list(map(str, arguments)), str(output), 0, 1, 0, None, None, False)
        self.processes = [conftest.quickly.Process(target=train_with, args=call)]
        self.processes[0].start()


@pytest.fixture
def start(written, tmp_path):
    """`start(arguments)` starts a `Process` with what was `written`; what still runs at the test's end is killed."""
    started = []

    def begin(arguments):
        started.append(Process(arguments, tmp_path / "experiments", tmp_path / f"{len(started)}.txt"))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def cells_of(name, given):
    return experiment.cells(CONFIGS, name, given)


# What an experiment is.


def test_cells_are_arms_times_grid_times_seeds_and_each_resolves(written, tmp_path):
    written(tiny=GRID)
    found = cells_of("tiny", {"out": str(tmp_path), "model": "test_vit"})
    assert len(found) == len({c.folder for c in found}) == 2 * 2 * 2 * 2
    assert [c.seed for c in found] == [3] * 8 + [1] * 8  # every arm has its first seed before any has its second
    assert found[1].arm == "none-train_fraction=0.1-schedule=every:2" and found[0].folder.parent == tmp_path / "tiny"
    config = found[1].config(CONFIGS)
    assert [config[key] for key in ("cam", "train_fraction", "schedule", "seed", "epochs", "model")] \
        == ["none", 0.1, "every:2", 3, 4, "test_vit"]


def test_cells_without_proxy_attention_do_not_vary_what_it_alone_reads(written):
    grid = {"area": [0.1, 0.2], "fill": ["black", "noise", "blur"], "train_fraction": [0.1, 1.0]}
    written(tiny=GRID | {"grid": grid})
    found = cells_of("tiny", {})
    without = [c for c in found if c.options["cam"] == "none"]
    assert len(without) == 2 * 2 and len(found) == 2 * 2 + 2 * 2 * 6
    assert without[0].arm == "none-train_fraction=0.1" and "area" not in without[0].options


def test_an_experiment_like_another_takes_what_it_does_not_replace(written):
    arms = {"none": None, "gradcam++": {"area": 0.2}, "new": {}}
    written(tiny=GRID, same={"like": "tiny"},
            other={"like": "tiny", "settings": {"lr": 0.1}, "arms": arms, "grid": {}})
    first, other = experiment.read_experiment("tiny"), experiment.read_experiment("other")
    assert {key: experiment.read_experiment("same")[key] for key in first} == first
    assert other["settings"] == {"epochs": 4, "lr": 0.1} and other["seeds"] == [3, 1] and other["grid"] == {}
    assert other["arms"] == {"gradcam++": {"area": 0.2}, "new": {}}  # an arm is replaced as a unit


@pytest.mark.parametrize("change, message", [
    ({"seeds": []}, "expected one or more different seeds"), ({"seeds": [1, 1]}, "different seeds"),
    ({"seeds": [1.5]}, "is not a whole number"), ({"arms": {}, "grid": {}}, "nothing varies"),
    ({"arms": {"a": {"camm": "none"}}}, "tiny.json: arms.a: unknown key 'camm'.*Did you mean 'cam'"),
    ({"grid": {"area": 0.1}}, "tiny.json: grid.area: 0.1 is not a list"), ({"grid": {"area": [2]}}, "out of range"),
    ({"grid": {"area": []}}, "grid.area: expected a list of values"), ({"seeds": 1}, "seeds: 1 is not a list"),
    ({"seed": [1]}, "unknown key 'seed'.*Did you mean 'seeds'"),
    ({"arms": {"a": 1}}, "tiny.json: arms.a: expected an object"),
    ({"like": "tiny"}, "like: 'tiny' leads back"), ({"like": "gird"}, "unknown experiment 'gird'.*Did you mean 'grid'"),
    ({"like": "loop"}, "leads back to this experiment"),
])
def test_an_experiment_that_is_wrong_is_named_with_its_place(change, message, written):
    written(tiny=GRID | change, grid=GRID, loop={"like": "tiny"})
    with pytest.raises(UserError, match=message):
        experiment.read_experiment("tiny")


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_resolves_and_runs_on_any_dataset(name, tmp_path):
    found = cells_of(name, {"out": str(tmp_path), "dataset": "folder", "data_dir": str(tmp_path)})
    assert len({c.folder for c in found}) == len(found) > 1 and experiment.read_experiment(name)["help"]
    for cell in found:
        config = cell.config(CONFIGS)
        assert config["dataset"] == "folder" and (cell.needs is None or cell.needs in {c.folder for c in found})
        assert cell.needs is None or str(cell.needs) in [config[key] for key in settings.OF_RUNS]


def test_the_arms_of_question_1_are_the_same_on_every_amount_of_data():
    plain = {key: value for key, value in experiment.read_experiment("arms")["arms"].items() if key != "staged"}
    for name in ("arms-quarter", "arms-whole", "arms-elpv"):
        other = experiment.read_experiment(name)
        assert {key: value for key, value in other["arms"].items() if key != "staged"} == plain and not other["grid"]
        schedule = [int(n) for n in other["arms"]["staged"]["schedule"].split(",") if n != "p"]
        assert sum(schedule) + 1 == other["settings"]["epochs"]


def test_every_cell_is_in_one_share(written):
    written(tiny=GRID)
    every = cells_of("tiny", {})
    for count in (1, 3, 16):
        shares = [experiment.share_of(every, f"{i}/{count}") for i in range(1, count + 1)]
        assert sorted(c.folder for share in shares for c in share) == sorted(c.folder for c in every)
    for text in ("0/3", "4/3", "3", "a/b", "-1/3", "1/0"):
        with pytest.raises(UserError, match="--array=1-16"):
            experiment.share_of(every, text)


def test_a_cells_command_line_gives_its_settings(written, tmp_path):
    written(tiny=GRID)
    for cell in cells_of("tiny", {"out": str(tmp_path)}):
        given, _ = options.parse(experiment.command(cell)[2:], "")
        assert settings.resolve(CONFIGS, given) == cell.config(CONFIGS)


def test_a_relative_data_dir_starts_from_here_or_else_from_the_programs_folder(written, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "HERE", tmp_path / "program")
    monkeypatch.chdir(tmp_path)
    for name in ("here", "program/there", "program/here"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "program" / "labels.csv").touch()
    arms = {arm: {"data_dir": place} for arm, place in (("a", "here"), ("b", "there"), ("c", "gone"))}
    arms["d"] = {"csv": "labels.csv"}
    written(tiny={"arms": arms, "seeds": [0]})
    found = {cell.arm: cell.options for cell in cells_of("tiny", {})}
    assert [found[arm].get("data_dir") for arm in "abc"] == ["here", str(tmp_path / "program" / "there"), "gone"]
    assert found["d"]["csv"] == str(tmp_path / "program" / "labels.csv")


def test_weights_for_all_are_where_the_arms_that_start_from_no_other_begin(written):
    written(tiny=CHAIN)
    found = {c.arm: c.options.get("weights") for c in cells_of("tiny", {"weights": "w.pth"})}
    assert found == {"first": "w.pth", "second": None}


@pytest.mark.parametrize("arguments, message", [
    (["--experiment", "dem"], "Did you mean 'demo'"),
    (["--experiment", "demo", "--cam", "none"], "--cam: experiment demo sets it for each run"),
    (["--experiment", "demo", "--seed", "3"], "--seed: experiment demo sets it"),
    (["--experiment", "demo", "--jobs", "0"], "--jobs 0: expected a number"),
    (["--experiment", "demo", "--epochs", "0"], "--epochs: 0 is out of range"),
    (["--experiment", "demo", "--resume", "runs/x"], "goes with neither"),
    (["--cell", "1/2"], "--cell goes with --experiment"),
])
def test_a_mistake_is_one_line_before_anything_runs(arguments, message, tmp_path, capsys):
    assert train.main([*arguments, "--out", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


# Its processes.


@pytest.mark.parametrize("jobs, gpus, device, shared", [
    (1, 0, "auto", []), (1, 2, "auto", []), (2, 0, "auto", ["RAPL", "NVML"]), (2, 1, "auto", ["RAPL", "NVML"]),
    (2, 2, "auto", ["RAPL"]), (3, 2, "auto", ["RAPL", "NVML"]), (2, 2, "cuda:0", ["RAPL", "NVML"])])
def test_a_counter_that_runs_side_by_side_share_is_named_to_them(jobs, gpus, device, shared, written, tmp_path,
                                                                 monkeypatch):
    class Process:
        def __init__(self, target, args):
            self.args = args

        def start(self):
            assert self.args[3] == shared

    written(tiny=TINY)
    monkeypatch.setattr(experiment.processes, "Process", Process)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    waiting, running = cells_of("tiny", {"out": str(tmp_path), "device": device}), {}
    experiment.start_cells(waiting, running, jobs, False)
    assert len(running) == min(jobs, 2)


def test_a_cells_process_leaves_out_the_counters_that_others_share(tmp_path):
    script, output = tmp_path / "script.py", tmp_path / "output.txt"
    script.write_text("from engine import costs; print(sorted(costs.Energy.shared))")
    for shared in ([], ["RAPL"]):
        process = experiment.processes.Process(target=experiment.run_cell, args=([str(script)], str(output), 1, shared))
        process.start()
        process.join(60)
    assert output.read_text() == "[]\n['RAPL']\n"


@pytest.mark.slow
def test_the_cells_of_a_killed_experiment_end_and_the_same_command_goes_on(written, tmp_path, start):
    written(tiny=TINY | {"arms": {"none": {"cam": "none"}}})
    arguments = ["--experiment", "tiny", "--out", tmp_path / "runs", "--epochs", "12"]
    runs = tmp_path / "runs" / "tiny"
    process = start(arguments)
    while not folder.read_log(runs / "none-s0") and process.is_alive():
        time.sleep(0.02)
    process.kill()
    end = time.monotonic() + 60
    output = runs / "output" / "none-s0.txt"
    while "interrupted; go on with" not in output.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert len(folder.read_log(runs / "none-s0")) < 12
    again = start(arguments)
    assert again.wait() == 0 and "All 1 cells are done" in again.output(), again.output()
    assert [line["epoch"] for line in folder.read_log(runs / "none-s0")] == list(range(1, 13))


@pytest.mark.slow
def test_a_stopped_experiment_goes_on_and_repeats_nothing_that_is_finished(written, tmp_path, start):
    written(tiny=TINY)
    arguments, runs = ["--experiment", "tiny", "--out", tmp_path / "runs", "--epochs", "8"], tmp_path / "runs" / "tiny"
    process = start(arguments)
    while not (runs / "none-s0" / "last.pt").exists() and process.is_alive():
        time.sleep(0.02)
    process.signal(signal.SIGTERM)
    assert process.wait() == 143 and "the same command goes on" in process.output()
    assert (runs / "none-s0" / "last.pt").exists() and not (runs / "none-s0" / "metrics.json").exists()
    assert not (runs / "all-s0").exists()

    process = start([*arguments, "--jobs", "2"])
    assert process.wait() == 0, process.output()
    assert "All 2 cells are done" in process.output()
    assert [line["epoch"] for line in folder.read_log(runs / "none-s0")] == list(range(1, 9))
    typed = json.loads((runs / "all-s0" / "env.json").read_text())["command"]
    assert "--select=all" in typed and "--epochs=8" in typed and "--no-pretrained" in typed

    before = (runs / "all-s0" / "metrics.json").stat().st_mtime_ns
    again = start([*arguments, "--cell", "2/2"])
    assert again.wait() == 0 and "1 of 1 to do are done already" in again.output()
    assert (runs / "all-s0" / "metrics.json").stat().st_mtime_ns == before
    other = start([*arguments[:-1], "3"])
    assert other.wait() == 2 and "was made with other settings (epochs 8, now 3)" in other.output()


def test_a_cell_that_cannot_start_ends_the_experiment_with_its_line(tmp_path, capsys):
    assert train.main(["--experiment", "demo", "--dataset", "asl", "--data-dir", str(tmp_path), "--out",
                       str(tmp_path / "runs")]) == 2
    assert "none-s0 could not start" in (err := capsys.readouterr().err) and "no images" in err


@pytest.mark.slow
def test_an_arm_that_starts_from_another_waits_for_it(written, tmp_path, capsys):
    written(tiny=CHAIN)
    arguments = ["--experiment", "tiny", "--out", str(tmp_path / "runs"), "--epochs", "1", "--device", "cpu"]
    assert train.main([*arguments, "--cell", "1/2"]) == 2
    assert "second-s0 starts from" in (err := capsys.readouterr().err) and "first run that" in err
    assert train.main(arguments) == 0
    assert "keeps 3 of 10 classes" in (tmp_path / "runs" / "tiny" / "output" / "second-s0.txt").read_text()
    written(tiny=CHAIN | {"arms": {"second": {"init": "@fist"}}})
    assert train.main(arguments) == 2
    assert "arms.second.init: '@fist' is no arm" in capsys.readouterr().err


@pytest.mark.slow
def test_cells_run_this_program_whatever_lies_in_the_current_folder(tmp_path):
    for name in ("train.py", "data.py", "proxy.py", "engine/__init__.py", "engine/experiment.py", "study/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("import pathlib; pathlib.Path(__file__).with_suffix('.imported').touch()")
    answer = subprocess.run([sys.executable, str(settings.HERE / "train.py"), "--experiment", "demo", "--cell", "1/6",
                             "--model", "test_resnet", "--epochs", "1", "--train-fraction", "0.1", "--device", "cpu",
                             "--out", "runs"], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "runs" / "demo" / "none-s0" / "metrics.json").exists()
    assert not list(tmp_path.rglob("*.imported"))
