"""Several processes that train one network, and runs that a signal stops: real processes, with gloo on the CPU."""

import contextlib
import functools
import math
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import conftest
import pytest
import torch

import proxy
import train
from engine import cache, checkpoint, files, ranks, training
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.folder import read_log
from engine.loader import prepare
from engine.settings import HERE

TINY = ["--model", "test_vit", "--no-pretrained", "--image-size", "32", "--train-fraction", "0.3"]  # no batch norm
NUMBERS = ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "images_seen", "optimizer_steps")


def numbers(folder):
    return [[line[key] for key in NUMBERS] for line in read_log(folder)]


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory, train_process):
    """The same run with one process and with two, no Proxy Attention."""
    out = tmp_path_factory.mktemp("ranks")
    for ranks in (1, 2):
        process = train_process([*TINY, "--cam", "none", "--epochs", "2", "--out", out, "--name", ranks], ranks=ranks)
        assert process.wait() == 0, process.output()
    return out / "1", out / "2"


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(alone_and_together):
    alone, together = map(numbers, alone_and_together)
    assert len(alone) == len(together) == 2
    for one, two in zip(alone, together):
        assert one == pytest.approx(two, rel=2e-3)
        assert one[4:] == two[4:]
    weights = [load_checkpoint(folder / "last.pt")["model"] for folder in alone_and_together]
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=2e-3) for k in weights[0])


@pytest.mark.slow
def test_metrics_count_each_image_once_and_one_process_writes(alone_and_together):
    metrics = [files.read_json(folder / "metrics.json") for folder in alone_and_together]
    for part in ("val", "test"):
        assert metrics[0][part]["images"] == metrics[1][part]["images"]
    names = [sorted(os.listdir(folder)) for folder in alone_and_together]
    assert names[0] == names[1]


@pytest.mark.slow
def test_erased_images_stay_on_their_rank_and_another_number_of_ranks_goes_on(tmp_path, train_process):
    folder = tmp_path / "r"
    process = train_process(["--dataset", "digits", "--train-fraction", "0.3", "--epochs", "60", "--select", "all",
                             "--explain", "predicted", "--out", tmp_path, "--name", "r"], ranks=2)
    while not (folder / "last.pt").exists() and process.is_alive():
        time.sleep(0.1)
    process.signal(signal.SIGTERM)
    assert process.wait() == 143, process.output()
    state = load_checkpoint(folder / "last.pt")
    assert state["waiting"][2].shape == (32,) and state["epoch"] < 60  # 16 seats of 32 images on each of two ranks
    lines = read_log(folder)
    assert lines[0]["erased_images"] == (6 - 1) * 32 and lines[0]["images_seen"] == 6 * 64
    config, epochs = files.read_json(folder / "config.json"), state["epoch"] + 1  # end it soon
    files.write_json(folder / "config.json", config | {"epochs": epochs})
    state["made_with"]["settings"]["epochs"] = epochs
    save_checkpoint(folder / "last.pt", state)
    assert train_process(["--resume", folder]).wait() == 0
    assert read_log(folder)[-1]["erased_images"] >= 6 * 32 - 32


@pytest.mark.slow
def test_the_ranks_validate_the_network_that_is_saved(tmp_path, train_process):
    """Each has batch statistics of its own after the last step of an epoch; those of rank 0 are saved."""
    process = train_process(["--dataset", "digits", "--train-fraction", "0.15", "--batch-size", "32", "--epochs", "2",
                             "--out", tmp_path, "--name", "r"], ranks=2)
    assert process.wait() == 0, process.output()
    metrics = files.read_json(tmp_path / "r" / "metrics.json")
    assert read_log(tmp_path / "r")[-1]["val_loss"] == pytest.approx(metrics["val"]["log_loss"], rel=1e-6)


@pytest.mark.parametrize("arguments, message", [
    (["--batch-size", "63"], "2 processes cannot share it evenly"),
    (["--batch-size", "auto"], "--batch-size auto tries steps in one process"),
    (["--dry-run"], "--dry-run: leave torchrun out")])
def test_a_mistake_is_printed_once(arguments, message, tmp_path, train_process):
    process = train_process([*arguments, "--out", tmp_path / "runs"], ranks=2)
    assert process.wait() == 2, process.output()
    assert process.output().count(message) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_torchrun_goes_on_with_it(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = subprocess.Popen([*torchrun, "train.py", *TINY, "--cam", "none", "--epochs", "12", "--out", str(tmp_path),
                                "--name", "r"], cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while len(read_log(tmp_path / "r")) < 2 and process.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert [line["epoch"] for line in read_log(tmp_path / "r")] == list(range(1, 13))
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["r"]


@pytest.mark.parametrize("world, local, typed", [
    (None, None, "python"), ("4", "4", "torchrun --nproc-per-node 4"),
    ("8", "4", "torchrun --nnodes 2 … --nproc-per-node 4")])
def test_a_run_is_gone_on_with_as_it_was_started(world, local, typed, monkeypatch):
    for name, value in (("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", local)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert runpy.run_path(ranks.__file__)["LAUNCHER"] == typed


# What each process does, counted in it.


def counted(*arguments):
    """In a process of its own: `train.py`; beside its output a file tells what it did, and sent to all others."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrap, recv, everyone, read_file = ranks.wrap, torch.distributed.recv, ranks.everyone, cache.read_file
    seen = {"averaged": 0, "received": 0, "largest": 0, "hashed": 0}

    def averaged(group, bucket):
        seen["averaged"] += bucket.is_last()
        return allreduce_hook(group, bucket)

    def wrapped(model, device):
        model = wrap(model, device)
        if ranks.RANKS > 1:
            model.register_comm_hook(None, averaged)
        return model

    def noted(key, function, size=lambda *given: 1):
        def inner(*given):
            seen[key] = max(seen[key], size(*given)) if key == "largest" else seen[key] + 1
            return function(*given)

        return inner

    ranks.wrap, torch.distributed.recv = wrapped, noted("received", recv)
    ranks.everyone = noted("largest", everyone, lambda value: len(pickle.dumps(value)))
    cache.read_file = noted("hashed", read_file)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # inductor takes minutes, and changes no hook
    conftest.train_and_tell(arguments, seen)


def restarted(*arguments):
    """In a process of its own: `counted`, as torchrun starts it anew after one has died."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    counted(*arguments)


def seen_by(process):
    return [files.read_json(f"{path}.json") for path in process.paths]


SEVEN = [*TINY, "--train-fraction", "0.35", "--image-size", "64", "--select", "all"]  # batches an epoch


@pytest.mark.slow
@pytest.mark.parametrize("accumulate, step, more", [
    (1, "online", []), (2, "online", ["--compile"]), (3, "online", []), (3, "same_step", []), (3, "another", []),
    (3, "same_step", ["--cam", "none"])])
def test_gradients_are_averaged_once_in_each_step_of_the_optimizer(accumulate, step, more, alone_and_together, tmp_path,
                                                                   train_process):
    """And where nothing depends on who has an image, the weights are those of one process with the same batches."""
    arguments = [*SEVEN, "--epochs", "2", "--accumulate", accumulate, *more, "--out", tmp_path]
    if step != "another":
        arguments += ["--step", step]
    else:
        first = train_process([*SEVEN, "--cam", "none", "--epochs", "1", "--out", tmp_path, "--name", "first"])
        assert first.wait() == 0, first.output()
        arguments += ["--heat", tmp_path / "first"]
    process = train_process([*arguments, "--name", "two"], ranks=2, target=counted)
    assert process.wait() == 0, process.output()
    steps = [line["optimizer_steps"] for line in read_log(tmp_path / "two")]
    assert steps == [math.ceil(7 / accumulate)] * 2
    assert [seen["averaged"] for seen in seen_by(process)] == [sum(steps)] * 2
    if step == "online":  # its seats and draws are each process's own
        return
    process = train_process([*arguments, "--name", "one"], target=counted)
    assert process.wait() == 0, process.output()
    weights = [load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "two")]
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=2e-3) for key in weights[0])


@pytest.mark.slow
def test_a_checkpoint_takes_the_images_that_wait_to_the_first_process_alone(tmp_path, train_process):
    process = train_process(["--train-fraction", "0.15", "--epochs", "1", "--select", "all", "--out", tmp_path,
                             "--name", "r"], ranks=2, target=counted, every_step=True)
    assert process.wait() == 0, process.output()
    first, second = seen_by(process)
    assert first["received"] > 0 and second["received"] == 0
    assert first["largest"] < 1000 and second["largest"] < 1000  # bytes that all get from each


@pytest.mark.slow
@pytest.mark.parametrize("how", ["new", "resumed", "restarted"])
def test_the_first_process_alone_reads_a_dataset_to_list_it(how, asl, tmp_path, train_process):
    arguments = ["--dataset", "folder", "--data-dir", asl / "asl_alphabet_train" / "asl_alphabet_train", "--model",
                 "test_resnet", "--no-pretrained", "--image-size", "32", "--batch-size", "4", "--epochs", "1",
                 "--workers", "0", "--cam", "none", "--out", tmp_path, "--name", "r"]
    if how != "new":
        assert train_process(arguments).wait() == 0
        (tmp_path / "r" / "metrics.json").unlink()
        for path in (tmp_path / ".cache").glob("digests-*"):
            path.unlink()
    process = train_process(["--resume", tmp_path / "r"] if how == "resumed" else arguments, ranks=2,
                            target=restarted if how == "restarted" else counted)
    assert process.wait() == 0, process.output()
    assert [seen["hashed"] for seen in seen_by(process)] == [30, 0]


def on_two_machines(*arguments):
    """In a process of its own: `counted`, the first half of the processes on one machine, the others on another."""
    start, folder = ranks.start, cache.cache_folder

    def start_there(device):
        ranks.HERE = ranks.RANKS // 2
        ranks.LOCAL_RANK = ranks.RANK % ranks.HERE
        return start(device)

    ranks.start = start_there
    cache.cache_folder = lambda config: folder(config) / f"machine {ranks.RANK // ranks.HERE}"
    counted(*arguments)


@pytest.mark.slow
def test_on_machines_with_a_cache_each_the_first_process_of_each_fills_it(asl, tmp_path, train_process):
    arguments = ["--dataset", "folder", "--data-dir", asl / "asl_alphabet_train" / "asl_alphabet_train", "--model",
                 "test_resnet", "--no-pretrained", "--image-size", "32", "--batch-size", "8", "--epochs", "1",
                 "--workers", "0", "--cam", "none", "--cache", tmp_path / "cache", "--out", tmp_path, "--name", "r"]
    process = train_process(arguments, ranks=4, target=on_two_machines)
    assert process.wait() == 0, process.output()
    assert [seen["hashed"] for seen in seen_by(process)] == [30, 0, 30, 0]
    for machine in (tmp_path / "cache" / "machine 0", tmp_path / "cache" / "machine 1"):
        assert len(list(machine.glob("digests-*.json"))) == len(list(machine.glob("*.npy"))) == 1


def fails_alone(*arguments):
    """In a process of its own: `train.py`, whose second process finds an error that no other has."""
    real = ranks.wrap

    def wrap(model, device):
        if ranks.RANK == 1:
            raise files.UserError("a.jpg: cannot be read")
        return real(model, device)

    ranks.wrap = wrap
    conftest._train_main(*arguments)


def test_an_error_of_any_process_is_printed(tmp_path, train_process):
    process = train_process([*TINY, "--cam", "none", "--out", tmp_path, "--name", "r"], ranks=2, target=fails_alone)
    process.processes[1].join(60)
    assert process.processes[1].exitcode == 2
    assert process.paths[1].read_text().count("train.py: a.jpg: cannot be read. Then go on with python") == 1


# What a checkpoint keeps of the images that wait.


MEAN, STD = torch.tensor([0.4, 0.5, 0.0]).view(1, 3, 1, 1), torch.tensor([0.2, 0.5, 1.0]).view(1, 3, 1, 1)


def kept_of(images):
    waiting = proxy.Waiting(images, torch.zeros(len(images), dtype=torch.long), torch.ones(len(images)) > 0)
    return training.packed(SimpleNamespace(proxy=SimpleNamespace(waiting=waiting), mean=MEAN, std=STD)).images


def test_images_that_wait_are_kept_as_pixels_where_these_give_the_same_bits():
    pixels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 4, 256)
    images = prepare(pixels, MEAN, STD)
    assert kept_of(images).dtype == torch.uint8 and torch.equal(kept_of(images), pixels)
    for other in (torch.nextafter(images, torch.ones(())), -images, torch.full_like(images, torch.nan)):
        assert kept_of(other) is other
    black = images.clone()
    black[:, 2, :, 0] = -0.0  # what is black, -mean / std, where the mean is 0
    assert torch.equal(black, images) and kept_of(black) is black


@pytest.mark.slow
@pytest.mark.parametrize("augment, dtype", [("none", torch.uint8), ("light", torch.float32)])
def test_a_run_goes_on_with_the_images_that_waited_to_the_same_bits(augment, dtype, trained, tmp_path, monkeypatch):
    arguments = ["--train-fraction", "0.15", "--select", "all", "--augment", augment]
    alone, folder, save = trained(*arguments), tmp_path / "cut", checkpoint.save_checkpoint

    def cut(path, state):
        save(path, state)
        if path.name == "last.pt" and (state["epoch"], state["step"]) == (1, 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", 0)
        patch.setattr(checkpoint, "save_checkpoint", cut)
        assert train.main([*arguments, "--epochs", "2", "--out", str(tmp_path), "--name", "cut"]) == 130
    assert load_checkpoint(folder / "last.pt")["waiting"][0].dtype == dtype
    assert train.main(["--resume", str(folder)]) == 0
    states = [load_checkpoint(path / "last.pt") for path in (folder, alone)]
    for part in ("model", "optimizer"):
        assert torch.equal(*(torch.cat([t.flatten().float() for t in tensors(state[part])]) for state in states)), part


def test_parts_of_any_size_come_to_the_first_process_from_all(tmp_path):
    """Also none at all, as where a run goes on with more processes than images wait."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [conftest.quickly.Process(target=sends, args=(rank, port, str(tmp_path))) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert others == [[None] * 3] * 2
    for dtype, found in zip((torch.uint8, torch.bool, torch.float32), first):
        assert [part.dtype for part in found] == [dtype] * 3
        assert [part.shape for part in found] == [(0, 2), (1, 2), (2, 2)]
        assert all((part == 1).all() for part in found)


def sends(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "3"}
    ranks.RANK, ranks.RANKS = rank, 3
    ranks.start("cpu")
    found = [ranks.to_first(torch.ones(rank, 2, dtype=dtype)) for dtype in (torch.uint8, torch.bool, torch.float32)]
    torch.save(found, f"{folder}/{rank}.pt")
    ranks.end()


# Signals.


STOPPED = ["--train-fraction", "0.5", "--epochs", "4", "--area", "0.2"]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, train_process):
    """The run that is stopped below, without being stopped."""
    out = tmp_path_factory.mktemp("alone")
    assert train_process([*STOPPED, "--out", out, "--name", "alone"]).wait() == 0
    return out / "alone"


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)


def log_without_times(folder):
    return [{key: value for key, value in line.items() if "seconds" not in key and "_mb" not in key}
            for line in read_log(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_a_run_after_the_step_and_the_run_goes_on_to_the_same_bits(number, status, left_alone, tmp_path,
                                                                                train_process):
    folder = tmp_path / "cut"
    process = train_process([*STOPPED, "--out", tmp_path, "--name", "cut"])
    while not read_log(folder) and process.is_alive():
        time.sleep(0.02)
    time.sleep(0.15)
    process.signal(number)
    assert process.wait() == status
    last = process.output().splitlines()[-1]
    assert last == f"train.py: interrupted; go on with python train.py --resume {folder}"
    assert train_process(["--resume", folder]).wait() == 0
    states = [load_checkpoint(path / "last.pt") for path in (folder, left_alone)]
    for part in ("model", "optimizer"):
        assert torch.equal(*(torch.cat([t.flatten().float() for t in tensors(state[part])]) for state in states)), part
    assert log_without_times(folder) == log_without_times(left_alone)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(tmp_path, train_process):
    """It does not wait for the step, which takes all of an epoch here: the checkpoint of the epoch before remains."""
    folder = tmp_path / "cut"
    process = train_process([*STOPPED, "--out", tmp_path, "--name", "cut", "--accumulate", "1000", "--train-fraction",
                             "1", "--image-size", "64", "--augment", "randaugment"])
    while not (folder / "last.pt").exists() and process.is_alive():  # the log's line comes before it
        time.sleep(0.02)
    while process.is_alive():  # two that come during one call of torch's are one to Python, which gets it after it
        with contextlib.suppress(ProcessLookupError):
            process.signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.wait() == 130 and "go on with python train.py --resume" in process.output()
    state = load_checkpoint(folder / "last.pt")
    assert state["step"] == 0 and state["epoch"] == len(read_log(folder))
