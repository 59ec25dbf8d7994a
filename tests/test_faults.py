"""Faults while a run runs: each ends in one line that says what to do, or the run goes on; nothing is lost."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_kill import left_by

import proxy
import train
from engine import files, loader, predict, settings, training
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.folder import open_run, read_log

CPU = torch.device("cpu")
QUICK = ("--train-fraction", "0.1", "--batch-size", "32", "--workers", "0", "--device", "cpu")
STEPS = 4  # of an epoch of such a run
PHOTOGRAPHS = ("--dataset", "asl", "--model", "test_resnet", "--no-pretrained", "--image-size", "32", "--batch-size",
               "8", "--device", "cpu")


def error_line(capsys):
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# Checkpoints.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four epochs, with all its checkpoints; copy it before doing it harm."""
    out = tmp_path_factory.mktemp("finished")
    assert train.main(["--epochs", "4", "--out", str(out), "--name", "run", *QUICK]) == 0
    assert read_log(out / "run")[0]["optimizer_steps"] == STEPS
    return out / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of `finished` that may be harmed, without a result."""
    folder = tmp_path / "copy" / "run"
    shutil.copytree(finished, folder)
    for name in ("metrics.json", "predictions.npz"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("harm", ["truncated", "empty", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(harm, finished, copied, capsys):
    content = (copied / "last.pt").read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1:]
    if harm == "missing":
        (copied / "last.pt").unlink()
    else:
        (copied / "last.pt").write_bytes({"truncated": content[:-100], "empty": b"", "flipped": flipped}[harm])
    assert train.main(["--resume", str(copied)]) == 0
    out = capsys.readouterr().out
    assert f"{copied}/last.pt: " in out and "going on from the checkpoint before it, after 3 epochs" in out
    assert "epoch 4/4" in out and "epoch 3/4" not in out
    assert left_by(copied) == left_by(finished)
    assert (copied / "damaged.pt").exists() == (harm != "missing")


def test_with_no_checkpoint_left_that_can_be_read_it_says_so(copied, capsys):
    for name in ("last.pt", "previous.pt"):
        (copied / name).write_bytes(b"rubbish")
    assert train.main(["--resume", str(copied)]) == 2
    assert "damaged" in (line := error_line(capsys)) and "Remove both to train" in line
    for name in ("last.pt", "previous.pt"):
        (copied / name).unlink()
    assert train.main(["--resume", str(copied)]) == 0


@pytest.mark.parametrize("change, message", [
    (lambda made: made["settings"].update(model="resnet18"),
     'made with other settings than config.json has: model "resnet18", not "resnet10s"'),
    (lambda made: made["settings"].update(seed=7), "seed 7, not 0"),
    (lambda made: made["settings"]["dataset_entry"].update(image_size=8), "dataset_entry {"),
    (lambda made: made.update(dataset="0123"), "a dataset with other images"),
    (lambda made: made["classes"].reverse(), "a dataset with other classes"),
    (lambda made: made["versions"].update(torch="1.13.0"), 'made with torch "1.13.0", not "2'),
    (lambda made: made["code"].update({"proxy.py": "0"}), "made with another proxy.py than is here"),
    (lambda made: made["code"].update({"run.py": "0"}), "made with another run.py than is here"),
])
def test_a_checkpoint_of_something_else_is_refused_with_what_differs(change, message, copied, capsys):
    state = load_checkpoint(copied / "last.pt")
    change(state["made_with"])
    save_checkpoint(copied / "last.pt", state)
    assert train.main(["--resume", str(copied)]) == 2
    assert message in (line := error_line(capsys))
    assert train.main(["--resume", str(copied), "--any-code"]) == (0 if "--any-code" in line else 2)


def test_a_checkpoint_made_with_a_setting_that_is_gone_goes_on(copied):
    state = load_checkpoint(copied / "last.pt")
    state["made_with"]["settings"] |= {"upweight": 20, "format": "jpg"}
    save_checkpoint(copied / "last.pt", state)
    assert train.main(["--resume", str(copied)]) == 0


@pytest.mark.slow
def test_a_staged_run_with_a_damaged_checkpoint_repeats_the_stages_after_the_one_before(tmp_path, capsys):
    arguments = ["--mode", "staged", "--rounds", "1", "--select", "all", "--epochs", "2", *QUICK, "--classes", "3,8"]
    for name in ("alone", "harmed"):
        assert train.main([*arguments, "--out", str(tmp_path), "--name", name]) == 0
    folder = tmp_path / "harmed"
    state = load_checkpoint(folder / "previous.pt")
    assert state["epoch"] == 3  # the last but one epoch of stage 3
    for name in ("metrics.json", "predictions.npz"):
        (folder / name).unlink()
    (folder / "last.pt").write_bytes(b"")
    assert train.main(["--resume", str(folder)]) == 0
    assert left_by(folder) == left_by(tmp_path / "alone")
    # and one from before stage 2, whose images go and come back
    (folder / "last.pt").write_bytes(b"")
    save_checkpoint(folder / "previous.pt", state | {"epoch": 1})
    capsys.readouterr()
    train.main(["--resume", str(folder)])
    assert "round 1, stage 2" in capsys.readouterr().out


# Two processes on one folder.


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_second_process_on_a_runs_folder_stops_and_the_first_is_unharmed(tmp_path, train_process):
    arguments = ["--epochs", "5", "--out", tmp_path, *QUICK, "--train-fraction", "0.5"]
    first = train_process([*arguments, "--name", "run"])
    wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists())
    second = train_process(["--resume", tmp_path / "run"])
    assert second.wait() == 2
    assert f"process {first.pid} on " in second.output() and "is working on this run" in second.output()
    assert first.is_alive() and first.wait() == 0
    alone = train_process([*arguments, "--name", "alone"])
    assert alone.wait() == 0 and left_by(tmp_path / "run") == left_by(tmp_path / "alone")
    assert train_process(["--resume", tmp_path / "run"]).wait() == 0  # a dead process holds no lock


def test_a_folder_left_before_it_was_a_run_is_taken_over(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "env.json").write_text("{}")
    (folder / ".split.json.1.2.tmp").write_text("{")
    assert train.main(["--epochs", "1", "--out", str(tmp_path), "--name", "run", *QUICK]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    assert train.main(["--epochs", "1", "--out", str(tmp_path), "--name", "other", *QUICK]) == 2
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]


# Losses that are not finite.


def breaking(monkeypatch, breaks):
    """Make the loss of these training steps, counted from 0, not a number."""
    real, steps = proxy.cross_entropy, []

    def cross_entropy(*arguments):
        steps.append(len(steps))
        return real(*arguments) * (float("nan") if breaks(steps[-1]) else 1)

    monkeypatch.setattr(proxy, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("amp", ["off", pytest.param("float16", marks=pytest.mark.slow)])
def test_steps_whose_loss_is_not_finite_are_skipped_and_counted(amp, trained, monkeypatch):
    breaking(monkeypatch, lambda step: step in (1, 4, 5))
    folder = trained(*QUICK, "--classes", "1,3,7", "--train-fraction", "0.2", "--batch-size", "16", "--amp", amp)
    assert sum(line["skipped_steps"] for line in read_log(folder)) >= 3
    assert files.read_json(folder / "metrics.json")["cost"]["skipped_steps"] >= 3
    assert all(np.isfinite(line["train_loss"]) for line in read_log(folder))
    assert all(torch.isfinite(v).all() for v in load_checkpoint(folder / "last.pt")["model"].values())


def step_of(t, images):
    """One step on these images: whether it was skipped."""
    labels = torch.arange(len(images)) % t.classes
    return t.backward(F.cross_entropy(t.forward(images), labels), 0, 9)[1]


def test_a_skipped_step_changes_nothing_but_the_learning_rate():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1),
                                torch.nn.Flatten())
    config = settings.resolve(settings.read_configs(), {"cam": "none"})
    t = training.Training(config, model, CPU, 4, 100)
    t.begin_epoch(None)
    for images in (torch.randn(5, 3, 8, 8), torch.full((5, 3, 8, 8), float("inf")), torch.randn(5, 3, 8, 8)):
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer, rate = repr(t.optimizer.state_dict()["state"]), t.schedule.get_last_lr()
        skipped = bool(step_of(t, images))
        same = all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if "num_batches" not in k)
        assert same == skipped == bool(images.isinf().any())
        assert (repr(t.optimizer.state_dict()["state"]) == optimizer) == skipped
        assert t.schedule.get_last_lr() != rate
        assert all(torch.isfinite(v).all() for v in model.state_dict().values())


def test_a_step_that_is_skipped_right_after_resuming_keeps_the_statistics_of_the_checkpoint(copied):
    (copied / "previous.pt").replace(copied / "last.pt")  # after which there are steps to take
    opened, state = open_run(copied), load_checkpoint(copied / "last.pt")
    t = training.Training(opened.config, opened.network(), CPU, 10, 100)
    t.folder = copied
    t.model.load_state_dict({k: torch.zeros_like(v) for k, v in state["model"].items()})
    training.load_last(t, training.Stage(0, 100))
    t.begin_epoch(None)
    assert step_of(t, torch.full((5, 3, 32, 32), float("inf")))
    now = {k: v for k, v in t.model.state_dict().items() if "num_batches" not in k}
    assert all(torch.equal(v, state["model"][k]) for k, v in now.items())


@pytest.mark.parametrize("seconds", [600, 0])
def test_ten_skipped_steps_in_a_row_end_the_run_and_name_the_images(seconds, tmp_path, monkeypatch, capsys):
    """However many steps lie between two checkpoints, and in an epoch."""
    breaking(monkeypatch, lambda step: step >= 7)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", seconds)
    assert train.main(["--epochs", "9", "--out", str(tmp_path), "--name", "run", *QUICK, "--cam", "none"]) == 2
    folder, line = tmp_path / "run", error_line(capsys)
    found, ids = files.read_json(folder / "bad-batch.json"), open_run(folder).split["train"]
    assert (found["epoch"], found["step"]) == (7 // STEPS + 1, 7 % STEPS + 1)
    assert f"epoch {found['epoch']}, step {found['step']}" in line and found["images"][0] in line and "--lr" in line
    order = loader.Order(len(ids), 32, seed=0)
    order.epoch = found["epoch"] - 1
    names = [ids[i] for i in order.rows()[found["step"] - 1]]
    assert found["images"] == list(dict.fromkeys(names))
    state = load_checkpoint(folder / "last.pt")
    assert all(torch.isfinite(v).all() for v in state["model"].values())
    assert state["epoch"] < 5  # it ended soon


def test_nine_skipped_steps_in_a_row_do_not_end_a_run(trained, monkeypatch):
    breaking(monkeypatch, lambda step: step % 10 != 9)
    folder = trained(*QUICK, "--cam", "none", epochs=6)
    assert sum(line["skipped_steps"] for line in read_log(folder)) == 6 * STEPS - 2


def test_a_validation_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, monkeypatch, capsys):
    real, calls = predict.predict, []

    def some(*arguments):
        logits, labels = real(*arguments)
        calls.append(1)
        return logits * (float("nan") if len(calls) == 3 else 1), labels

    monkeypatch.setattr(predict, "predict", some)
    assert train.main(["--epochs", "4", "--out", str(tmp_path), "--name", "run", *QUICK]) == 2
    assert "the validation loss is nan, for the network's output is not finite" in (line := error_line(capsys))
    assert f"{tmp_path}/run/last.pt holds what came before" in line and "--lr" in line and "--resume" not in line
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2 == len(read_log(tmp_path / "run"))


# The world around.


def at_epoch(monkeypatch, number, happen):
    """Call `happen` when epoch `number` has been trained, before anything of it is written."""
    real = train.finish_epoch

    def finish_epoch(t, line):
        if line["epoch"] == number:
            happen(t.folder)
        real(t, line)

    monkeypatch.setattr(train, "finish_epoch", finish_epoch)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("change", ["removed", "changed", "truncated"])
def test_a_dataset_that_changes_under_a_run_ends_it_with_the_file_and_it_goes_on_when_it_is_back(
        change, workers, asl, tmp_path, monkeypatch, capsys):
    victim = asl / "asl_alphabet_train" / "asl_alphabet_train" / "A" / "A3.jpg"
    other = victim.with_name("A4.jpg").read_bytes()
    kept = {path: path.read_bytes() for path in victim.parent.glob("*.jpg")}

    def harm(folder):
        for path in victim.parent.glob("*.jpg"):
            if change == "removed":
                path.unlink()
            else:
                path.write_bytes(other[:900] if change == "truncated" else other + b" ")

    arguments = [*PHOTOGRAPHS, "--data-dir", str(asl), "--epochs", "3", "--cache", "off", "--workers", workers, "--out",
                 str(tmp_path / "runs")]
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, harm)
        assert train.main([*arguments, "--name", "run"]) == 2
    line = error_line(capsys)
    assert str(victim.parent) in line and "cannot be read as an image" in line and "--resume" in line
    assert ("No such file" if change == "removed" else "changed since") in line
    for path, content in kept.items():
        path.write_bytes(content)
    assert train.main(["--resume", str(tmp_path / "runs" / "run")]) == 0
    assert train.main([*arguments, "--name", "alone"]) == 0
    assert left_by(tmp_path / "runs" / "run") == left_by(tmp_path / "runs" / "alone")


def test_a_dataset_that_vanishes_does_not_matter_to_a_run_with_decoded_images(asl, tmp_path, monkeypatch):
    at_epoch(monkeypatch, 1, lambda folder: shutil.move(asl, tmp_path / "elsewhere"))
    assert train.main([*PHOTOGRAPHS, "--data-dir", str(asl), "--epochs", "2", "--out", str(tmp_path / "runs"), "--name",
                       "run"]) == 0


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_and_it_goes_on(asl, tmp_path, train_process):
    process = train_process([*PHOTOGRAPHS, "--data-dir", asl, "--epochs", "60", "--cache", "off", "--workers", "2",
                             "--out", tmp_path, "--name", "run"])
    wait_for(lambda: read_log(tmp_path / "run"))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait() == 2, process.output()
    assert "a process that decodes images was killed" in process.output() and "Traceback" not in process.output()
    assert f"--resume {tmp_path}/run" in process.output()


def test_a_runs_folder_that_is_removed_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    at_epoch(monkeypatch, 2, shutil.rmtree)
    assert train.main(["--epochs", "3", "--out", str(tmp_path), "--name", "run", *QUICK]) == 2
    assert f"{tmp_path}/run" in (line := error_line(capsys)) and "No such file" in line
    assert not (tmp_path / "run").exists()


def test_a_clock_that_is_set_back_changes_nothing(finished, tmp_path, monkeypatch):
    clock, lock = [2e9], threading.Lock()

    def backwards():
        with lock:
            clock[0] -= 3600
            return clock[0]

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 60)
    assert train.main(["--epochs", "4", "--out", str(tmp_path), "--name", "run", *QUICK]) == 0
    assert left_by(tmp_path / "run") == left_by(finished)


@pytest.mark.parametrize("seconds, steps", [(1, range(1, 4 * STEPS + 1)), (3, range(3, 4 * STEPS + 1, 3)), (600, [])])
def test_checkpoints_within_an_epoch_come_after_so_many_seconds_and_change_nothing(seconds, steps, finished, tmp_path,
                                                                                  monkeypatch):
    saved, real, clock = [], train.save_last, [0]

    def save_last(t, epoch, step, counts):
        saved.append(epoch * STEPS + step)
        real(t, epoch, step, counts)

    def monotonic():  # each step asks once, and once more where a checkpoint is due
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(train, "save_last", save_last)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", seconds)
    assert train.main(["--epochs", "4", "--out", str(tmp_path), "--name", "run", *QUICK]) == 0
    assert saved == list(steps)
    assert left_by(tmp_path / "run") == left_by(finished)


# Files that mean harm.


def test_nothing_but_the_weights_that_were_asked_for_touches_the_network(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"reached for the network: {arguments}")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert train.main(["--epochs", "1", "--out", str(tmp_path), "--name", "run", *QUICK]) == 0


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_that_would_run_code_is_refused(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("last.pt", "previous.pt"):
        save_checkpoint(copied / name, {"epoch": 1, "model": Bomb()})
    assert train.main(["--resume", str(copied)]) == 2
    assert "not a checkpoint" in error_line(capsys) and not (tmp_path / "exploded").exists()


def test_a_config_that_leads_elsewhere_is_refused(copied, capsys):
    """--resume takes a run's folder from anybody: its settings are checked as those of configs.json are."""
    config = files.read_json(copied / "config.json")
    changes = ({"epochs": "many"}, {"lr": None}, {"area": 7}, {"name": "../../elsewhere"}, {"model_entry": 3},
               {"dataset_entry": {}}, {"format": 9}, {"augment": ["light"]})
    texts = [json.dumps(config | change) for change in changes]
    for text in (*texts, "", "[]", "{", "null", "\xff"):
        (copied / "config.json").write_bytes(text.encode("latin-1"))
        assert train.main(["--resume", str(copied)]) == 2
        assert f"{copied}/config.json" in error_line(capsys)
    (copied / "config.json").write_text(json.dumps(config))
    for split in ("{}", json.dumps(files.read_json(copied / "split.json") | {"train": [1]})):
        (copied / "split.json").write_text(split)
        assert train.main(["--resume", str(copied)]) == 2
        assert f"{copied}/split.json" in error_line(capsys)
