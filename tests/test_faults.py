"""What goes wrong while a run runs, injected: each ends in one line that says what to do, or goes on; nothing written is lost."""

import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import run
import train
from data import UserError
from test_kill import left_by

QUICK = ("--train-fraction", "0.1", "--batch-size", "32", "--workers", "0", "--device", "cpu")


def said(capsys):
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of four epochs, with all its checkpoints; copy it before doing it harm."""
    out = tmp_path_factory.mktemp("finished")
    assert train.main(["--epochs", "4", "--out", str(out), "--name", "run", *QUICK]) == 0
    return out / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """`finished`, and a copy of it that may be harmed, of three epochs and without a result."""
    folder = tmp_path / "copy" / "run"
    shutil.copytree(finished, folder)
    for name in ("metrics.json", "predictions.npz"):
        (folder / name).unlink()
    return finished, folder


@pytest.mark.parametrize("harm", ["truncated", "empty", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(harm, copied, capsys):
    finished, folder = copied
    content = (folder / "last.pt").read_bytes()
    if harm == "missing":
        (folder / "last.pt").unlink()
    else:
        flipped = content[:5000] + bytes([content[5000] ^ 8]) + content[5001:]
        (folder / "last.pt").write_bytes({"truncated": content[:-100], "empty": b"", "flipped": flipped}[harm])
    assert train.main(["--resume", str(folder)]) == 0
    captured = capsys.readouterr()
    assert f"{folder}/last.pt: " in captured.out and "going on from the checkpoint before it, after 3 epochs" in captured.out
    assert "epoch 4/4" in captured.out and "epoch 3/4" not in captured.out
    assert left_by(folder) == left_by(finished)
    assert (folder / "damaged.pt").exists() == (harm != "missing")


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path, draw = tmp_path / "last.pt", random.Random(0)
    run.save_checkpoint(path, {"epoch": 1, "model": {"weight": torch.randn(40, 10), "bias": torch.zeros(10)}})
    content = path.read_bytes()
    assert torch.equal(run.load_checkpoint(path)["model"]["bias"], torch.zeros(10))
    torch.load(path, weights_only=True)  # any other program opens it too
    for position in [0, 1, len(content) - 1, *draw.sample(range(len(content)), 200)]:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1 << draw.randrange(8)]) + content[position + 1:])
        with pytest.raises(UserError, match="last.pt: damaged"):
            run.load_checkpoint(path)
    for length in (0, 1, 10, 16, 17, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="last.pt: damaged"):
            run.load_checkpoint(path)


def test_with_no_whole_checkpoint_left_it_says_so(copied, capsys):
    _, folder = copied
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"rubbish")
    assert train.main(["--resume", str(folder)]) == 2
    assert "damaged" in (line := said(capsys)) and "Remove both to train" in line
    for name in ("last.pt", "previous.pt"):
        (folder / name).unlink()
    assert train.main(["--resume", str(folder)]) == 0


def test_killed_between_the_two_names_a_checkpoint_is_there(copied, monkeypatch):
    """Whatever the moment in save_last at which the process dies, a whole checkpoint remains."""
    _, folder = copied
    before = run.load_checkpoint(folder / "last.pt")["epoch"]
    for replaced in range(2):
        calls = []

        def dying(source, target):
            calls.append(target)
            if len(calls) > replaced:
                raise KeyboardInterrupt
            os.rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                run.keep_previous(folder / "last.pt", folder / "previous.pt")
                run.save_checkpoint(folder / "last.pt", {"epoch": before + 1, "step": 0})
        assert run.last_checkpoint(folder)[0]["epoch"] == before


def test_two_names_of_one_checkpoint_leave_no_third(copied):
    """As after a kill between the two names: rename(2) of one file's two names does nothing."""
    _, folder = copied
    (folder / "previous.pt").unlink(missing_ok=True)
    for _ in range(2):
        run.keep_previous(folder / "last.pt", folder / "previous.pt")
        assert (folder / "previous.pt").samefile(folder / "last.pt") and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("change, message", [
    (lambda made: made["settings"].update(model="resnet18"), "made with other settings than those in config.json: model \"resnet18\", not"),
    (lambda made: made["settings"].update(seed=7), "seed 7, not 0"),
    (lambda made: made.update(dataset="0123"), "a dataset with other images"),
    (lambda made: made["classes"].reverse(), "a dataset with other classes"),
    (lambda made: made["versions"].update(torch="1.13.0"), "made with torch 1.13.0, not 2"),
    (lambda made: made["code"].update({"proxy.py": "0"}), "made with another proxy.py than is here"),
])
def test_a_checkpoint_of_something_else_is_refused_with_what_differs(change, message, copied, capsys):
    _, folder = copied
    state = run.load_checkpoint(folder / "last.pt")
    change(state["made_with"])
    run.save_checkpoint(folder / "last.pt", state)
    assert train.main(["--resume", str(folder)]) == 2
    assert message in (line := said(capsys))
    assert train.main(["--resume", str(folder), "--any-code"]) == (0 if "--any-code" in line else 2)


def test_a_staged_run_with_a_damaged_checkpoint_repeats_the_stages_after_the_one_before(tmp_path, capsys):
    arguments = ["--mode", "staged", "--rounds", "1", "--select", "all", "--epochs", "2", *QUICK, "--classes", "3,8"]
    for name in ("alone", "harmed"):
        assert train.main([*arguments, "--out", str(tmp_path), "--name", name]) == 0
    folder = tmp_path / "harmed"
    shutil.copy(folder / "last.pt", folder / "kept.pt")
    state = run.load_checkpoint(folder / "previous.pt")
    assert state["epoch"] == 3  # the last but one epoch of stage 3
    for name in ("metrics.json", "predictions.npz"):
        (folder / name).unlink()
    (folder / "last.pt").write_bytes(b"")
    assert train.main(["--resume", str(folder)]) == 0
    a, b = left_by(folder), left_by(tmp_path / "alone")
    assert a == b
    # and one from before stage 2, whose images go and come back
    (folder / "last.pt").write_bytes(b"")
    state["epoch"] = 1
    run.save_checkpoint(folder / "previous.pt", state)
    capsys.readouterr()
    train.main(["--resume", str(folder)])
    assert "round 1, stage 2" in capsys.readouterr().out


# --- two processes on one folder -----------------------------------------------------------------------------------


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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


# --- losses that are not finite ------------------------------------------------------------------------------------


def breaking(monkeypatch, bad_steps):
    """Make the loss of these training steps, counted from 0, not a number."""
    real, steps = train.forward, []

    def forward(model, images, labels, amp):
        logits, loss = real(model, images, labels, amp)
        steps.append(len(steps))
        return logits, loss * float("nan") if bad_steps(steps[-1]) else loss

    monkeypatch.setattr(train, "forward", forward)


@pytest.mark.parametrize("amp", ["off", "float16"])
def test_steps_whose_loss_is_not_finite_are_skipped_and_counted(amp, trained, monkeypatch):
    breaking(monkeypatch, lambda step: step in (1, 4, 5))
    folder = trained(*QUICK, "--classes", "1,3,7", "--train-fraction", "0.2", "--batch-size", "16", "--amp", amp)
    assert sum(line["skipped_steps"] for line in run.read_log(folder)) >= 3
    assert run.read_json(folder / "metrics.json")["cost"]["skipped_steps"] >= 3
    assert all(np.isfinite(line["train_loss"]) for line in run.read_log(folder))
    assert all(torch.isfinite(v).all() for v in run.load_checkpoint(folder / "last.pt")["model"].values())


def test_a_skipped_step_changes_nothing_but_the_learning_rate():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    config = run.resolve(run.read_configs(), {"cam": "none"})
    t = train.Training(config, model, torch.device("cpu"), 4, 100)
    t.begin_epoch(0)
    for images in (torch.randn(5, 3, 8, 8), torch.full((5, 3, 8, 8), float("inf")), torch.randn(5, 3, 8, 8)):
        before = {k: v.clone() for k, v in model.state_dict().items()}, repr(t.optimizer.state_dict()["state"])
        _, bad = t.backward(train.forward(model, images, torch.arange(5) % 4, None)[1], 0, 9)
        same = all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items() if "num_batches" not in k)
        assert same == bool(bad) == bool(images.isinf().any())
        assert (repr(t.optimizer.state_dict()["state"]) == before[1]) == bool(bad)
        assert all(torch.isfinite(v).all() for v in model.state_dict().values())


def test_a_step_that_is_skipped_right_after_resuming_keeps_the_statistics_of_the_checkpoint(copied, monkeypatch):
    _, folder = copied
    (folder / "previous.pt").replace(folder / "last.pt")  # after which there are steps to take
    opened, state = run.open_run(folder), run.load_checkpoint(folder / "last.pt")
    t = train.Training(opened.config, opened.network(), torch.device("cpu"), 10, 100)
    t.model.load_state_dict({k: torch.zeros_like(v) for k, v in state["model"].items()})
    t.kept = train.flat(t.statistics)
    train.load_last(folder, train.Stage(0, 100), t)
    t.begin_epoch(1)
    _, bad = t.backward(train.forward(t.model, torch.full((5, 3, 32, 32), float("inf")), torch.arange(5), None)[1], 0, 9)
    assert bad and all(torch.equal(v, state["model"][k]) for k, v in t.model.state_dict().items() if "num_batches" not in k)


def test_ten_skipped_steps_in_a_row_end_the_run_and_name_the_images(tmp_path, monkeypatch, capsys):
    breaking(monkeypatch, lambda step: step >= 7)
    assert train.main(["--epochs", "9", "--out", str(tmp_path), "--name", "run", *QUICK, "--cam", "none"]) == 2
    folder, line = tmp_path / "run", said(capsys)
    steps = run.read_log(folder)[0]["optimizer_steps"]
    found = run.read_json(folder / "bad-batch.json")
    assert (found["epoch"], found["step"]) == (7 // steps + 1, 7 % steps + 1)
    assert f"epoch {found['epoch']}, step {found['step']}" in line and found["images"][0] in line and "--lr" in line
    order = data.Order(len(run.open_run(folder).split["train"]), 32, seed=0)
    order.epoch = found["epoch"] - 1
    names = [run.open_run(folder).split["train"][i] for i in order.rows()[found["step"] - 1]]
    assert found["images"] == list(dict.fromkeys(names))
    state = run.load_checkpoint(folder / "last.pt")
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_validation_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, monkeypatch, capsys):
    real = train.validate
    calls = []

    def validate(t, batches):
        calls.append(1)
        return real(t, batches) | ({"val_loss": float("nan")} if len(calls) == 3 else {})

    monkeypatch.setattr(train, "validate", validate)
    assert train.main(["--epochs", "4", "--out", str(tmp_path), "--name", "run", *QUICK]) == 2
    assert "epoch 3: the validation loss is nan" in said(capsys)
    assert run.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2


# --- the world around ----------------------------------------------------------------------------------------------


def at_epoch(monkeypatch, number, happen):
    """Call `happen` when epoch `number` has been trained, before anything of it is written."""
    real = train.finish_epoch

    def finish_epoch(folder, line, waiting, t):
        if line["epoch"] == number:
            happen(folder)
        real(folder, line, waiting, t)

    monkeypatch.setattr(train, "finish_epoch", finish_epoch)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("change", ["removed", "changed", "truncated"])
def test_a_dataset_that_changes_under_a_run_ends_it_with_the_file_and_it_goes_on_when_it_is_back(change, workers, asl, tmp_path, monkeypatch,
                                                                                               capsys):
    victim = asl / "asl_alphabet_train" / "asl_alphabet_train" / "A" / "A3.jpg"
    content, other = victim.read_bytes(), victim.with_name("A4.jpg").read_bytes()

    def harm(folder):
        for path in victim.parent.glob("*.jpg"):
            if change == "removed":
                path.unlink()
            else:
                path.write_bytes(other[:900] if change == "truncated" else other + b" ")

    kept = {path: path.read_bytes() for path in victim.parent.glob("*.jpg")}
    arguments = ["--dataset", "asl", "--data-dir", str(asl), "--model", "test_resnet", "--no-pretrained", "--image-size", "32", "--epochs", "3",
                 "--batch-size", "8", "--cache", "off", "--workers", workers, "--device", "cpu", "--out", str(tmp_path / "runs")]
    with monkeypatch.context() as patch:
        at_epoch(patch, 1, harm)
        assert train.main([*arguments, "--name", "run"]) == 2
    line = said(capsys)
    assert str(victim.parent) in line and "cannot be read as an image" in line and "--resume" in line
    assert ("No such file" if change == "removed" else "changed since") in line
    for path, was in kept.items():
        path.write_bytes(was)
    assert content == victim.read_bytes()
    assert train.main(["--resume", str(tmp_path / "runs" / "run")]) == 0
    assert train.main([*arguments, "--name", "alone"]) == 0
    assert left_by(tmp_path / "runs" / "run") == left_by(tmp_path / "runs" / "alone")


def test_a_dataset_that_vanishes_does_not_matter_to_a_run_with_decoded_images(asl, tmp_path, monkeypatch):
    at_epoch(monkeypatch, 1, lambda folder: shutil.move(asl, tmp_path / "elsewhere"))
    assert train.main(["--dataset", "asl", "--data-dir", str(asl), "--model", "test_resnet", "--no-pretrained", "--image-size", "32",
                       "--epochs", "2", "--device", "cpu", "--out", str(tmp_path / "runs"), "--name", "run"]) == 0


def test_a_worker_that_is_killed_ends_the_run_and_it_goes_on(asl, tmp_path, train_process):
    arguments = ["--dataset", "asl", "--data-dir", asl, "--model", "test_resnet", "--no-pretrained", "--image-size", "32", "--epochs", "60",
                 "--batch-size", "8", "--cache", "off", "--workers", "2", "--device", "cpu", "--out", tmp_path]
    process = train_process([*arguments, "--name", "run"])
    wait_for(lambda: run.read_log(tmp_path / "run"))
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait() == 2, process.output()
    assert "a process that decodes images was killed" in process.output() and "Traceback" not in process.output()
    assert f"--resume {tmp_path}/run" in process.output()


def test_a_runs_folder_that_is_removed_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    at_epoch(monkeypatch, 2, shutil.rmtree)
    assert train.main(["--epochs", "3", "--out", str(tmp_path), "--name", "run", *QUICK]) == 2
    assert f"{tmp_path}/run" in (line := said(capsys)) and "No such file" in line
    assert not (tmp_path / "run").exists()


def test_a_clock_that_is_set_back_changes_nothing(finished, tmp_path, monkeypatch):
    clock, lock = [2e9], threading.Lock()

    def backwards():
        with lock:
            clock[0] -= 3600
            return clock[0]

    monkeypatch.setattr(time, "time", backwards)
    assert train.main(["--epochs", "4", "--out", str(tmp_path), "--name", "run", *QUICK, "--checkpoint-every", "1m"]) == 0
    assert left_by(tmp_path / "run") == left_by(finished)


@pytest.mark.parametrize("every, saves", [("3", 2), ("500", 0), ("10m", 0)])
def test_checkpoints_come_as_often_as_asked_and_change_nothing(every, saves, finished, tmp_path, monkeypatch):
    saved, real = [], train.save_last
    monkeypatch.setattr(train, "save_last", lambda folder, t, epoch, step, *rest: (saved.append((epoch, step)), real(folder, t, epoch, step, *rest)))
    assert train.main(["--epochs", "4", "--out", str(tmp_path), "--name", "run", *QUICK, "--checkpoint-every", every]) == 0
    steps = run.read_log(finished)[0]["optimizer_steps"]
    expected = 4 * steps // int(every) if saves else 0
    assert len([step for _, step in saved if step]) in (expected, expected - 1)
    assert left_by(tmp_path / "run") == left_by(finished)


def test_minutes_pass_by_a_clock_that_nobody_sets_back(monkeypatch):
    interval, now = train.Interval("2m"), time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 119)
    assert not interval.passed()
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert interval.passed() and not interval.passed()


@pytest.mark.parametrize("text", ["", "0", "-3", "10s", "m", "1.5", "1e3", "10 m", "nan"])
def test_an_interval_that_is_none_is_refused(text, capsys):
    assert train.main(["--dry-run", f"--checkpoint-every={text}"]) == 2
    assert "--checkpoint-every" in said(capsys)


# --- files that mean harm ------------------------------------------------------------------------------------------


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
    _, folder = copied
    monkeypatch.chdir(tmp_path)
    for name in ("last.pt", "previous.pt"):
        run.save_checkpoint(folder / name, {"epoch": 1, "model": Bomb()})
    assert train.main(["--resume", str(folder)]) == 2
    assert "not a checkpoint" in said(capsys) and not (tmp_path / "exploded").exists()


def test_a_config_that_leads_elsewhere_is_refused(copied, capsys):
    """--resume takes a run's folder from anybody: its settings are checked as those of configs.json are."""
    _, folder = copied
    config = run.read_json(folder / "config.json")
    for change in ({"epochs": "many"}, {"lr": None}, {"area": 7}, {"name": "../../elsewhere"}, {"model_entry": 3}):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert train.main(["--resume", str(folder)]) == 2
        assert f"{folder}/config.json" in said(capsys)
    for text in ("", "[]", "{", "null", "\xff"):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        assert train.main(["--resume", str(folder)]) == 2
        assert f"{folder}/config.json" in said(capsys)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "split.json").write_text("{}")
    assert train.main(["--resume", str(folder)]) == 2
    assert f"{folder}/split.json" in said(capsys)
