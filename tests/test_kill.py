"""Runs that are killed at any moment, in real processes, end as if nobody had touched them: the same bits in all files.

    python -m pytest tests/test_kill.py --kills 200      # the long form
"""

import hashlib
import random
import time

import numpy as np
import pytest
import torch

from engine import files
from engine.checkpoint import load_checkpoint

SMALL = ("--epochs", "4", "--batch-size", "32", "--train-fraction", "0.15", "--workers", "0", "--device", "cpu")
RUNS = {  # name: (its share of the kills, arguments)
    "online": (6, (*SMALL, "--select", "all", "--augment", "light,mixup:0.2")),
    "staged": (5, ("--mode", "staged", "--rounds", "2", "--select", "all", "--fill", "transplant", *SMALL, "--classes",
                   "1,3,7,8")),
    "extra": (4, ("--budget", "extra", "--accumulate", "2", "--cam", "gradcam++", "--schedule", "every:2", *SMALL)),
    "workers": (3, ("--dataset", "folder", "--model", "test_resnet", "--no-pretrained", "--cache", "off", "--select",
                    "all", "--image-size", "32", "--batch-size", "8", "--epochs", "3", "--workers", "2", "--device",
                    "cpu")),
    "ranks": (2, (*SMALL, "--select", "all")),
}
RUNS["staged in ranks"] = (1, RUNS["staged"][1])
TIMES = {"train_seconds", "cam_seconds", "eval_seconds", "images_per_second", "peak_host_mb", "held_mb", "energy_wh",
         "seconds", "left_mb", "peak_gpu_allocated_mb", "peak_gpu_reserved_mb"}


def without_times(line):
    return {key: value for key, value in line.items() if key not in TIMES}


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def left_by(folder):
    """All that a run leaves, but for times and memory, as {name: hash or value}."""
    found = {}
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(folder / name)
        state.pop("made_with", None)
        found[name] = repr(hashed(state))
    for name in ("log.jsonl", "stages.jsonl"):
        found[name] = [without_times(line) for line in files.read_lines(folder / name)]
    with np.load(folder / "predictions.npz") as file:
        found["predictions.npz"] = {key: hash_of(file[key].tobytes()) for key in file.files if key != "seconds"}
    metrics = files.read_json(folder / "metrics.json")
    found["metrics.json"] = metrics | {"cost": without_times(metrics["cost"])}
    found["split.json"] = (folder / "split.json").read_bytes()
    for path in sorted((folder / "erased").rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = hash_of(path.read_bytes())
    return found


def hashed(value):
    """Nested state with each tensor as the hash of its bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hash_of(value.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: hashed(v) for key, v in value.items()}
    return [hashed(v) for v in value] if isinstance(value, (list, tuple)) else value


def arguments_of(kind, out, asl):
    chosen = RUNS[kind][1]
    return [*chosen, *(["--data-dir", str(asl)] if "folder" in chosen else []), "--out", str(out), "--name", "run"]


def next_arguments(folder, first):
    """The command that goes on, or the first one again where no run was made yet."""
    return ["--resume", str(folder)] if (folder / "config.json").is_file() else first


def kill_within(process, folder, moment, seconds):
    """SIGKILL after so many seconds, or while a checkpoint is being written. Whether it was still running."""
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        if moment == "write" and any(folder.glob(".last.pt.*.tmp")):
            break
        time.sleep(0.0005 if moment == "write" else 0.01)
    alive = process.is_alive()
    process.kill()
    return alive


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_killed_at_random_moments_leaves_the_same_bits(kind, asl, tmp_path, train_process, request):
    kills = max(1, round(request.config.getoption("kills") * RUNS[kind][0] / 20))
    first, folder, draw = arguments_of(kind, tmp_path / "killed", asl), tmp_path / "killed" / "run", random.Random(kind)
    options = {"ranks": 2 if "ranks" in kind else 1, "every_step": True}
    train_process(["--dry-run"]).wait()  # torch is imported once
    start = time.monotonic()
    alone = train_process(arguments_of(kind, tmp_path / "alone", asl), **options)
    assert alone.wait() == 0, alone.output()
    duration, done, writes = time.monotonic() - start, 0, 0
    while done < kills:
        process = train_process(next_arguments(folder, first), **options)
        moment = "write" if done % 3 == 1 else "any"
        seconds = draw.uniform(0.05, 0.9) * duration if moment == "any" else 2 * duration
        if kill_within(process, folder, moment, seconds):
            done, writes = done + 1, writes + any(folder.glob(".last.pt.*.tmp"))
        else:  # it had ended before: begin anew
            assert process.wait() == 0, process.output()
            assert left_by(folder) == left_by(tmp_path / "alone" / "run")
            folder.rename(folder.with_name(f"ended-{done}-{time.monotonic_ns()}"))
    process = train_process(next_arguments(folder, first), **options)
    assert process.wait() == 0, process.output()
    assert writes or kills < 2, "no kill met a checkpoint being written"
    assert left_by(folder) == left_by(tmp_path / "alone" / "run")
    assert not list(folder.rglob("*.tmp"))
