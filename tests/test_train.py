"""train.py: the loop, in every variant that settings give it, and what a run leaves."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import hash_folder
from PIL import Image

import eval as evaluation
import proxy
import train
from engine import files, metrics, training
from engine.checkpoint import load_checkpoint
from engine.folder import open_run, read_log
from engine.network import build_network
from engine.settings import HERE

LEFT = [".lock", "best.pt", "config.json", "confusion.png", "curves.png", "env.json", "last.pt", "log.jsonl",
        "metrics.json", "network.json", "predictions.npz", "previous.pt", "reliability.png", "sheet.png", "split.json"]
PART = ("--train-fraction", "0.3")
STEPS = 6  # of an epoch on that part of the digits, with 64 images each


def metrics_of(folder):
    return files.read_json(folder / "metrics.json")


def weights_of(folder, checkpoint="last.pt"):
    return load_checkpoint(folder / checkpoint)["model"]


# What a user types.


@pytest.mark.slow
def test_with_no_arguments_it_trains_on_digits_to_096(tmp_path):
    answer = subprocess.run([sys.executable, "train.py", "--out", str(tmp_path)], cwd=HERE, capture_output=True,
                            text=True)
    assert answer.returncode == 0, answer.stderr
    folder = tmp_path / "digits-resnet10s-gradcam-s0"
    assert sorted(p.name for p in folder.iterdir()) == LEFT
    found = metrics_of(folder)
    assert found["test"]["accuracy"] >= 0.96
    assert found["cost"]["erased_images"] > 100 and found["cost"]["optimizer_steps"] == 20 * 20
    assert f"python eval.py {folder}" in answer.stdout.splitlines()[-1]
    for picture in ("confusion.png", "curves.png", "reliability.png", "sheet.png"):
        assert np.asarray(Image.open(folder / picture).convert("L")).std() > 10


@pytest.mark.slow
@pytest.mark.pictures
def test_the_command_its_user_types_most(asl, tmp_path):
    before = hash_folder(asl)
    assert train.main(["--dataset", "asl", "--model", "vit_small", "--cam", "gradcam++", "--no-pretrained", "--epochs",
                       "1", "--data-dir", str(asl), "--out", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs" / "asl-vit_small-gradcam++-s0"
    expected = [name for name in LEFT if name != "previous.pt"]  # one epoch
    assert sorted(p.name for p in folder.iterdir()) == expected
    config = files.read_json(folder / "config.json")
    assert config["layer"] == "blocks.11.norm1" and config["image_size"] == 224
    assert hash_folder(asl) == before


# With and without Proxy Attention.


@pytest.mark.slow
def test_with_and_without_proxy_attention_split_steps_and_images_are_the_same(trained):
    plain, proxied = trained(*PART, "--cam", "none"), trained(*PART, "--cam", "gradcam++")
    assert (plain / "split.json").read_bytes() == (proxied / "split.json").read_bytes()
    costs = [metrics_of(folder)["cost"] for folder in (plain, proxied)]
    for key in ("optimizer_steps", "images_seen"):
        assert costs[0][key] == costs[1][key]
    assert costs[0]["erased_images"] == costs[0]["cam_seconds"] == 0 < costs[1]["erased_images"]


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.parametrize("arguments", [
    ["--explain", "true", "--cam", "layercam"], ["--explain", "margin"], ["--layer", "layer2", "--cam", "hirescam"],
    ["--layer=-2"], ["--cam", "random"], ["--cam", "cam"], ["--cam", "eigencam"]])
def test_each_way_of_explaining_trains(trained, arguments):
    folder = trained(*PART, *arguments, epochs=1)
    assert read_log(folder)[0]["erased_images"] > 0 and (folder / "sheet.png").exists()


def test_rollout_trains_a_vit_and_its_run_opens_again(asl, tmp_path):
    assert train.main(["--dataset", "asl", "--data-dir", str(asl), "--model", "test_vit", "--image-size", "160",
                       "--cam", "gradrollout", "--no-pretrained", "--epochs", "1", "--out", str(tmp_path), "--name",
                       "r"]) == 0
    assert files.read_json(tmp_path / "r" / "config.json")["layer"] is None
    assert evaluation.main([str(tmp_path / "r")]) == 0


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.parametrize("arguments", [
    ["--select", "unsure", "--fill", "mean"], ["--select", "loss", "--fill", "swap"],
    ["--select", "all", "--fill", "transplant"], ["--fill", "other", "--control", "random"], ["--fill", "blend"],
    ["--control", "coolest", "--fill", "noise"], ["--control", "label", "--fill", "blur"],
    ["--augment", "none,random_erasing:0.5"], ["--augment", "trivialaugment"], ["--augment", "randaugment,cutmix:1"],
    ["--augment", "mixup:0.4", "--same-step", "--fill", "other"],
    ["--augment", "cutmix", "--budget", "extra", "--explain", "margin"],
    ["--augment", "light,random_erasing,mixup", "--same-step", "--budget", "extra"]])
def test_each_part_of_the_space_trains_with_proxy_attention(trained, arguments):
    folder = trained(*PART, *arguments, epochs=1)
    line = read_log(folder)[0]
    assert line["erased_images"] > 0 and np.isfinite(line["train_loss"]) and (folder / "sheet.png").exists()


# In which step, and whose seats.


def test_everything_selected_fills_half_of_the_seats(trained):
    cost = metrics_of(trained(*PART, "--select", "all", "--explain", "predicted"))["cost"]
    assert cost["erased_images"] == (2 * STEPS - 1) * 32  # in every step but the first


def test_budget_extra_sees_the_erased_images_on_top(trained):
    cost = metrics_of(trained(*PART, "--budget", "extra"))["cost"]
    assert cost["images_seen"] == 2 * STEPS * 64 + cost["erased_images"] and cost["erased_images"] > 0


@pytest.mark.slow
def test_images_wait_for_one_step_only(trained):
    lines = read_log(trained(*PART, "--schedule", "1,p,2", "--select", "all", "--explain", "predicted", epochs=4))
    # what the last step of the proxy round erased is in the first step after it
    assert [line["erased_images"] for line in lines] == [0, (STEPS - 1) * 32, 32, 0]


@pytest.mark.parametrize("budget", ["equal", "extra"])
def test_in_the_same_step_each_selected_image_is_trained_on_through_a_second_pass(trained, budget, capsys):
    folder = trained(*PART, "--same-step", "--budget", budget, "--select", "all", "--schedule", "1,p")
    lines, cost = read_log(folder), metrics_of(folder)["cost"]
    assert lines[0]["second_pass_images"] == lines[0]["erased_images"] == 0
    assert lines[1]["erased_images"] == STEPS * 64
    both = STEPS * 64 * (1 if budget == "equal" else 2)
    assert lines[1]["images_seen"] == both and lines[1]["second_pass_images"] == STEPS * 64
    assert cost["second_pass_images"] == lines[1]["second_pass_images"] and cost["optimizer_steps"] == 2 * STEPS
    assert "went through the network once more" in capsys.readouterr().out


# When.


@pytest.mark.slow
def test_a_schedule_decides_in_which_epochs_images_are_erased(trained):
    counts = [line["erased_images"] > 0 for line in read_log(trained(*PART, "--schedule", "every:2", epochs=3))]
    assert counts[:2] == [False, True]
    lines = read_log(trained(*PART, "--schedule", "after:1"))
    assert lines[0]["erased_images"] == 0 < lines[1]["erased_images"]


@pytest.mark.slow
def test_a_plateau_begins_where_validation_accuracy_stops_rising(trained):
    learns_nothing = ("--lr", "1e-9", "--budget", "extra")
    folder = trained(*PART, "--schedule", "plateau:1", *learns_nothing, epochs=4)
    accuracies = [line["val_accuracy"] for line in read_log(folder)]
    on = [proxy.SCHEDULES["plateau"](epoch, 1, accuracies[:epoch]) for epoch in range(4)]
    assert [line["erased_images"] > 0 for line in read_log(folder)] == on and on[-1] and not any(on[:2])


@pytest.mark.slow
def test_the_published_protocol_leaks_and_every_page_says_so(tmp_path, capsys):
    found = {}
    for mode in ("online", "resplit"):
        assert train.main(["--dataset", "noisy_digits", "--cam", "none", "--schedule", "8,p,8,p,2", "--mode", mode,
                           "--out", str(tmp_path), "--name", mode]) == 0
        found[mode] = metrics_of(tmp_path / mode)
    shown = capsys.readouterr().out
    assert found["resplit"]["val"]["accuracy"] > found["online"]["val"]["accuracy"] + 0.15
    assert abs(found["resplit"]["test"]["accuracy"] - found["online"]["test"]["accuracy"]) < 0.1
    assert found["resplit"]["cost"]["optimizer_steps"] == found["online"]["cost"]["optimizer_steps"]
    assert shown.count("LEAK") == 20 and f"WARNING, --mode resplit: {metrics.LEAK}" in shown
    assert shown.count(f"new split 1: {metrics.LEAK}") == shown.count(f"new split 2: {metrics.LEAK}") == 1
    assert all(line["warning"] == metrics.LEAK for line in read_log(tmp_path / "resplit"))
    assert not any("warning" in line for line in read_log(tmp_path / "online"))
    assert files.read_json(tmp_path / "resplit" / "config.json")["mode"] == "resplit"


# Bits.


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(trained):
    weights = [weights_of(trained(*PART, "--seed", s)) for s in ("5", "5", "6")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["fc.weight"], weights[2]["fc.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", [PART, (*PART, "--schedule", "p,p,p", "--mode", "resplit", "--select", "all")])
def test_an_interrupted_run_goes_on_to_the_same_weights(mode, trained, tmp_path, monkeypatch, capsys):
    alone = trained(*mode, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main([*mode, "--epochs", "3", "--out", str(tmp_path), "--name", "cut"]) == 130
    assert f"go on with python train.py --resume {tmp_path / 'cut'}" in capsys.readouterr().err
    assert len(read_log(tmp_path / "cut")) == 1
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    for checkpoint in ("last.pt", "best.pt"):
        a, b = (weights_of(folder, checkpoint) for folder in (alone, tmp_path / "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics_of(alone)["test"] == metrics_of(tmp_path / "cut")["test"]
    assert (alone / "split.json").read_bytes() == (tmp_path / "cut" / "split.json").read_bytes()


# The step.


@pytest.mark.parametrize("batch_size, steps", [(1000, 1), (128, 2), (100, 3), (64, 4), (51, 5)])
def test_a_run_of_very_few_steps_still_learns(trained, batch_size, steps):
    folder = trained("--train-fraction", "0.2", "--batch-size", str(batch_size), epochs=1)
    assert metrics_of(folder)["cost"]["optimizer_steps"] == steps
    torch.manual_seed(0)
    start, _ = build_network(open_run(folder).config, 10)
    assert (start.fc.weight - weights_of(folder)["fc.weight"]).abs().max() > 1e-5


def test_gradients_of_two_batches_are_those_of_one_of_their_size(trained):
    plain = ["--model", "test_vit", "--image-size", "32", "--no-pretrained", "--cam", "none", "--augment", "none",
             "--train-fraction", "0.2"]
    one = trained(*plain, "--batch-size", "64")
    two = trained(*plain, "--batch-size", "32", "--accumulate", "2")
    costs = [metrics_of(folder)["cost"] for folder in (one, two)]
    assert [cost["optimizer_steps"] for cost in costs] == [2 * 4, 2 * 4]
    assert costs[0]["images_seen"] == costs[1]["images_seen"]
    a, b = weights_of(one), weights_of(two)
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_trains(trained, amp):
    few = ("--classes", "1,3,7", "--train-fraction", "0.1", "--batch-size", "16", "--select", "all")
    folder = trained("--amp", amp, *few, epochs=1)
    line = read_log(folder)[0]
    assert np.isfinite(line["train_loss"]) and line["erased_images"] > 0


# Checkpoints within an epoch.


def test_minutes_pass_by_a_clock_that_nobody_sets_back(monkeypatch):
    interval, now = training.Interval(), training.time.monotonic()
    monkeypatch.setattr(training.time, "monotonic", lambda: now + training.CHECKPOINT_SECONDS - 1)
    assert not interval.passed()
    monkeypatch.setattr(training.time, "monotonic", lambda: now + training.CHECKPOINT_SECONDS + 1)
    assert interval.passed() and not interval.passed()
