"""Several processes that train one network, and runs that a signal stops: real processes, gloo on this machine's CPU."""

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
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(ranks, *arguments, restarts=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    return subprocess.Popen([sys.executable, *(torchrun if ranks > 1 else []), "train.py", *arguments], cwd=REPOSITORY, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)


def finish(process):
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def numbers(folder):
    return [[line[key] for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "images_seen", "optimizer_steps")]
            for line in run.read_log(folder)]


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory):
    """The same run with one process and with two, no Proxy Attention."""
    out = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        status, _, err = finish(launch(ranks, *TINY, "--cam", "none", "--epochs", "2", "--out", str(out), "--name", str(ranks)))
        assert status == 0, err
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


def test_erased_images_stay_on_their_rank_and_another_number_of_ranks_goes_on(tmp_path):
    arguments = ["--dataset", "digits", "--train-fraction", "0.3", "--epochs", "60", "--select", "all", "--out", str(tmp_path), "--name", "r"]
    process = launch(2, *arguments)
    while not (tmp_path / "r" / "last.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    finish(process)
    state = run.load_checkpoint(tmp_path / "r" / "last.pt")
    assert state["waiting"][2].shape == (32,) and state["epoch"] < 60  # 16 seats of 32 images on each of two ranks
    lines = run.read_log(tmp_path / "r")
    assert lines[0]["erased_images"] == (6 - 1) * 32 and lines[0]["images_seen"] == 6 * 64
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    (tmp_path / "r" / "config.json").write_text(json.dumps(config | {"epochs": state["epoch"] + 1}))
    status, _, err = finish(launch(1, "--resume", str(tmp_path / "r")))
    assert status == 0, err
    assert run.read_log(tmp_path / "r")[-1]["erased_images"] >= 6 * 32 - 32


def test_a_mistake_is_said_once(tmp_path):
    status, _, err = finish(launch(2, "--batch-size", "63", "--out", str(tmp_path / "runs")))
    assert status != 0 and err.count("2 processes cannot share it evenly") == 1 and not (tmp_path / "runs").exists()


def test_a_process_that_dies_ends_the_job_and_torchrun_goes_on_with_it(tmp_path):
    process = launch(2, *TINY, "--cam", "none", "--epochs", "30", "--out", str(tmp_path), "--name", "r", restarts=1)
    while len(run.read_log(tmp_path / "r")) < 2 and process.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 0, err
    assert [line["epoch"] for line in run.read_log(tmp_path / "r")] == list(range(1, 31))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["r"]


# --- signals


STOPPED = ["--train-fraction", "0.5", "--epochs", "4", "--threshold", "0.5"]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """The run that is stopped below, without being stopped."""
    out = tmp_path_factory.mktemp("whole")
    status, _, err = finish(launch(1, *STOPPED, "--out", str(out), "--name", "whole"))
    assert status == 0, err
    return out / "whole"


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_run_after_the_step_and_the_run_goes_on_to_the_same_bits(number, status, left_alone, tmp_path):
    process = launch(1, *STOPPED, "--out", str(tmp_path), "--name", "cut")
    while not run.read_log(tmp_path / "cut") and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.15)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == status and err.count("\n") == 2 and f"go on with python train.py --resume {tmp_path / 'cut'}" in err
    assert finish(launch(1, "--resume", str(tmp_path / "cut")))[0] == 0
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
