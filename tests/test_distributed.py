"""Several processes that train one network, and runs that a signal stops: real processes, gloo on this machine's CPU."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run
import train

REPOSITORY = Path(train.__file__).parent
TINY = ["--model", "test_vit", "--no-pretrained", "--image-size", "32", "--train-fraction", "0.3"]  # no batch norm
TINY_GRID = ["--layer", "blocks.1"]


def numbers(folder):
    return [[line[key] for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "images_seen", "optimizer_steps")]
            for line in run.read_log(folder)]


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory, train_process):
    """The same run with one process and with two, no Proxy Attention."""
    out = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        process = train_process([*TINY, "--cam", "none", "--epochs", "2", "--out", out, "--name", ranks], ranks=ranks)
        assert process.wait() == 0, process.output()
    return out / "1", out / "2"


def test_two_processes_give_the_losses_of_one(alone_and_together):
    alone, together = map(numbers, alone_and_together)
    assert len(alone) == len(together) == 2
    for one, two in zip(alone, together):
        assert one == pytest.approx(two, rel=2e-3)
        assert one[4:] == two[4:]
    weights = [run.load_checkpoint(folder / "last.pt")["model"] for folder in alone_and_together]
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=2e-3) for k in weights[0])


def test_metrics_count_each_image_once_and_one_process_writes(alone_and_together):
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in alone_and_together]
    for part in ("val", "test"):
        assert metrics[0][part]["images"] == metrics[1][part]["images"]
    assert sorted(p.name for p in alone_and_together[0].iterdir()) == sorted(p.name for p in alone_and_together[1].iterdir())


def test_erased_images_stay_on_their_rank_and_another_number_of_ranks_goes_on(tmp_path, train_process):
    arguments = ["--dataset", "digits", "--train-fraction", "0.3", "--epochs", "60", "--select", "all", "--out", str(tmp_path), "--name", "r"]
    process = train_process(arguments, ranks=2)
    while not (tmp_path / "r" / "last.pt").exists() and process.is_alive():
        time.sleep(0.1)
    process.signal(signal.SIGTERM)
    assert process.wait() == 143, process.output()
    state = run.load_checkpoint(tmp_path / "r" / "last.pt")
    assert state["waiting"][2].shape == (32,) and state["epoch"] < 60  # 16 seats of 32 images on each of two ranks
    lines = run.read_log(tmp_path / "r")
    assert lines[0]["erased_images"] == (6 - 1) * 32 and lines[0]["images_seen"] == 6 * 64
    config = json.loads((tmp_path / "r" / "config.json").read_text())  # end it soon
    (tmp_path / "r" / "config.json").write_text(json.dumps(config | {"epochs": state["epoch"] + 1}))
    state["made_with"]["settings"]["epochs"] = state["epoch"] + 1
    run.save_checkpoint(tmp_path / "r" / "last.pt", state)
    assert train_process(["--resume", tmp_path / "r"]).wait() == 0
    assert run.read_log(tmp_path / "r")[-1]["erased_images"] >= 6 * 32 - 32


def test_the_ranks_validate_the_network_that_is_saved(tmp_path, train_process):
    """Each has batch statistics of its own after the last step of an epoch; those of rank 0 are saved."""
    process = train_process(["--dataset", "digits", "--train-fraction", "0.15", "--batch-size", "32", "--epochs", "2", "--out", tmp_path, "--name", "r"], ranks=2)
    assert process.wait() == 0, process.output()
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert run.read_log(tmp_path / "r")[-1]["val_loss"] == pytest.approx(metrics["val"]["log_loss"], rel=1e-6)


def test_a_mistake_is_said_once(tmp_path, train_process):
    process = train_process(["--batch-size", "63", "--out", tmp_path / "runs"], ranks=2)
    assert process.wait() == 2 and process.output().count("2 processes cannot share it evenly") == 1 and not (tmp_path / "runs").exists()


def test_a_process_that_dies_ends_the_job_and_torchrun_goes_on_with_it(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = subprocess.Popen([*torchrun, "train.py", *TINY, "--cam", "none", "--epochs", "12", "--out", str(tmp_path), "--name", "r"], cwd=REPOSITORY,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(run.read_log(tmp_path / "r")) < 2 and process.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert [line["epoch"] for line in run.read_log(tmp_path / "r")] == list(range(1, 13))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["r"]


# --- signals


STOPPED = ["--train-fraction", "0.5", "--epochs", "4", "--threshold", "0.5"]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, train_process):
    """The run that is stopped below, without being stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert train_process([*STOPPED, "--out", out, "--name", "whole"]).wait() == 0
    return out / "whole"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_run_after_the_step_and_the_run_goes_on_to_the_same_bits(number, status, left_alone, tmp_path, train_process):
    process = train_process([*STOPPED, "--out", tmp_path, "--name", "cut"])
    while not run.read_log(tmp_path / "cut") and process.is_alive():
        time.sleep(0.02)
    time.sleep(0.15)
    process.signal(number)
    assert process.wait() == status
    assert process.output().splitlines()[-1] == f"train.py: interrupted; go on with python train.py --resume {tmp_path / 'cut'}"
    assert train_process(["--resume", tmp_path / "cut"]).wait() == 0
    states = [run.load_checkpoint(folder / "last.pt") for folder in (tmp_path / "cut", left_alone)]
    for part in ("model", "optimizer"):
        assert torch.equal(*(torch.cat([t.flatten().float() for t in tensors(state[part])]) for state in states)), part
    logs = [[{key: value for key, value in line.items() if "seconds" not in key and "_mb" not in key}
             for line in run.read_log(folder)] for folder in (tmp_path / "cut", left_alone)]
    assert logs[0] == logs[1]


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)


def test_a_second_signal_ends_a_run_at_once(tmp_path, train_process):
    """It does not wait for the step, which takes all of an epoch here: the checkpoint of the epoch before is what remains."""
    process = train_process([*STOPPED, "--out", tmp_path, "--name", "cut", "--epochs", "4", "--accumulate", "1000", "--train-fraction", "1",
                             "--image-size", "64", "--augment", "randaugment"])
    while not (tmp_path / "cut" / "last.pt").exists() and process.is_alive():  # the log's line comes before it
        time.sleep(0.02)
    while process.is_alive():  # two that come during one call of torch's are one to Python, which is told after it
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.wait() == 130 and "go on with python train.py --resume" in process.output()
    state = run.load_checkpoint(tmp_path / "cut" / "last.pt")
    assert state["step"] == 0 and state["epoch"] == len(run.read_log(tmp_path / "cut"))
