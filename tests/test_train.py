"""train.py and eval.py from the command line: what a user types, and what a run leaves."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hash_folder
from PIL import Image

import cam
import data
import eval as evaluation
import proxy
import run
import train

REPOSITORY = Path(train.__file__).parent
LITE0 = REPOSITORY.parent / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"
LEFT = [".lock", "best.pt", "config.json", "confusion.png", "curves.png", "env.json", "last.pt", "log.jsonl", "metrics.json",
        "predictions.npz", "previous.pt", "reliability.png", "sheet.png", "split.json"]


def command(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, **options)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_with_no_arguments_it_trains_on_digits_to_096(tmp_path):
    answer = command("train.py", "--out", str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    folder = tmp_path / "digits-resnet10s-gradcam-s0"
    assert sorted(p.name for p in folder.iterdir()) == LEFT
    found = metrics_of(folder)
    assert found["test"]["accuracy"] >= 0.96
    assert found["cost"]["erased_images"] > 100 and found["cost"]["optimizer_steps"] == 400
    assert f"python eval.py {folder}" in answer.stdout.splitlines()[-1]
    for picture in ("confusion.png", "curves.png", "reliability.png", "sheet.png"):
        assert np.asarray(Image.open(folder / picture).convert("L")).std() > 10


@pytest.mark.pictures
def test_eval_prints_the_metrics_again_and_rewrites_them_identically(trained):
    folder = trained()
    before = (folder / "metrics.json").read_bytes()
    (folder / "metrics.json").unlink()
    answer = command("eval.py", str(folder))
    assert answer.returncode == 0, answer.stderr
    assert (folder / "metrics.json").read_bytes() == before
    for words in ("f1_macro", "peak_host_mb", "train_seconds", f"{metrics_of(folder)['test']['accuracy']:.4f}"):
        assert words in answer.stdout
    (folder / "predictions.npz").unlink()  # then they are made again, from last.pt
    assert evaluation.main([str(folder)]) == 0
    assert metrics_of(folder)["test"] == json.loads(before)["test"]


@pytest.mark.pictures
@pytest.mark.parametrize("arguments", [["--explain", "true", "--cam", "layercam"], ["--explain", "margin", "--smooth"],
                                       ["--layer", "layer2,layer4", "--cam", "hirescam"], ["--cam", "random"],
                                       ["--cam", "cam"], ["--cam", "eigencam", "--threshold", "0.6"]])
def test_each_way_of_explaining_trains(trained, arguments):
    folder = trained(*arguments, epochs=1)
    assert run.read_log(folder)[0]["erased_images"] > 0 and (folder / "sheet.png").exists()


def test_rollout_trains_a_vit_and_its_run_opens_again(asl, tmp_path):
    assert train.main(["--dataset", "asl", "--data-dir", str(asl), "--model", "test_vit", "--image-size", "160", "--cam",
                       "gradrollout", "--no-pretrained", "--epochs", "1", "--out", str(tmp_path), "--name", "r"]) == 0
    assert json.loads((tmp_path / "r" / "config.json").read_text())["layer"] is None
    assert evaluation.main([str(tmp_path / "r")]) == 0


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """scikit-learn's two sample photographs as files, one of them in a subfolder."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photographs")
    (folder / "more").mkdir()
    for name, picture in zip(("china.jpg", "more/flower.png"), load_sample_images().images):
        Image.fromarray(picture).save(folder / name)
    return folder


def test_image_sheets_show_what_each_method_sees(trained, photographs, tmp_path, capsys):
    folder, before = trained(epochs=1), hash_folder(photographs)
    assert evaluation.main([str(folder), "--image", str(photographs), str(photographs / "china.jpg"), "--cam", "gradcam",
                            "eigencam", "center", "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["heat-china-2.png", "heat-china.png", "heat-flower.png"]
    for path in tmp_path.glob("*.png"):
        sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
        panels = np.array_split(sheet[len(sheet) // 2], 4, axis=0)  # one row of pixels through the four pictures
        assert all((panel.max(1) - panel.min(1)).max() > 20 for panel in panels)
    assert hash_folder(photographs) == before
    assert evaluation.main([str(folder), "--image", str(photographs / "gone.jpg")]) == 2
    assert evaluation.main([str(folder), "--image", str(photographs), "--cam", "rollout"]) == 2
    assert evaluation.main([str(folder), "--cam", "gradcam"]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in shown] == ["eval.py"] * 3
    assert "gone.jpg: no such file" in shown[0] and "rollout needs a transformer" in shown[1] and "go with --image" in shown[2]


@pytest.mark.skipif(not LITE0.exists(), reason="needs shared/weights beside the project")
def test_image_sheets_need_no_run(photographs, tmp_path, capsys):
    assert evaluation.main(["--model", "efficientnet_lite0", "--weights", str(LITE0), "--image", str(photographs / "china.jpg"),
                            "--out", str(tmp_path)]) == 0
    assert "296 of 296 tensors" in capsys.readouterr().out and (tmp_path / "heat-china.png").exists()


def test_with_and_without_proxy_attention_split_steps_and_images_are_the_same(trained):
    plain, proxied = trained("--cam", "none"), trained("--cam", "gradcam++")
    assert (plain / "split.json").read_bytes() == (proxied / "split.json").read_bytes()
    costs = [metrics_of(folder)["cost"] for folder in (plain, proxied)]
    for key in ("optimizer_steps", "images_seen"):
        assert costs[0][key] == costs[1][key]
    assert costs[0]["erased_images"] == costs[0]["cam_seconds"] == 0 < costs[1]["erased_images"]


def test_budget_extra_sees_the_erased_images_on_top(trained):
    cost = metrics_of(trained("--budget", "extra"))["cost"]
    assert cost["images_seen"] == 2 * 20 * 64 + cost["erased_images"] and cost["erased_images"] > 0


def test_warm_up_epochs_erase_nothing(trained):
    lines = run.read_log(trained("--warmup", "1"))
    assert lines[0]["erased_images"] == 0 < lines[1]["erased_images"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(trained):
    weights = [run.load_checkpoint(trained("--seed", s) / "last.pt")["model"] for s in ("5", "5", "6")]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["fc.weight"], weights[2]["fc.weight"])


def test_an_interrupted_run_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch, capsys):
    whole = trained(epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(["--epochs", "3", "--out", str(tmp_path), "--name", "cut"]) == 130
    assert f"go on with python train.py --resume {tmp_path / 'cut'}" in capsys.readouterr().err
    assert len(run.read_log(tmp_path / "cut")) == 1
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    for checkpoint in ("last.pt", "best.pt"):
        a, b = (run.load_checkpoint(folder / checkpoint)["model"] for folder in (whole, tmp_path / "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics_of(whole)["test"] == metrics_of(tmp_path / "cut")["test"]
    assert train.main(["--resume", str(tmp_path / "cut"), "--lr", "1"]) == 2
    assert "leave out --lr" in capsys.readouterr().err


@pytest.mark.pictures
def test_the_command_its_user_types_most(asl, tmp_path):
    before = hash_folder(asl)
    assert train.main(["--dataset", "asl", "--model", "vit_small", "--cam", "gradcam++", "--no-pretrained", "--epochs", "1",
                       "--data-dir", str(asl), "--out", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs" / "asl-vit_small-gradcam++-s0"
    assert sorted(p.name for p in folder.iterdir()) == [name for name in LEFT if name != "previous.pt"]  # one epoch
    config = json.loads((folder / "config.json").read_text())
    assert config["layer"] == "blocks.11.norm1" and config["image_size"] == 224
    assert hash_folder(asl) == before


def test_without_the_images_it_says_where_to_get_them_and_writes_nothing(tmp_path, capsys):
    out, images = tmp_path / "runs", tmp_path / "images"
    assert train.main(["--dataset", "asl", "--model", "vit_small", "--cam", "gradcam++", "--out", str(out), "--data-dir", str(images)]) == 2
    answer = capsys.readouterr()
    assert answer.out == "" and not out.exists()
    assert answer.err.count("\n") == 1
    for words in ("dataset asl", str(images), "https://www.kaggle.com/datasets/grassknoted/asl-alphabet", "--data-dir"):
        assert words in answer.err


def test_a_dry_run_tells_all_and_writes_nothing(asl, tmp_path, capsys):
    before = hash_folder(tmp_path)
    assert train.main(["--dataset", "asl", "--data-dir", str(asl), "--model", "test_vit", "--no-pretrained", "--dry-run",
                       "--image-size", "160", "--out", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    for words in (r"^lr +0.0003$", r"^A +7 +1 +2$", r"^all +21 +3 +6$", r"^test_vit .* parameters",
                  r"^explains blocks.5.norm1, a grid of 10x10$"):
        assert re.search(words, shown, re.MULTILINE), words
    assert hash_folder(tmp_path) == before


@pytest.mark.parametrize("arguments, message", [
    (["--epoch", "3"], "unknown option '--epoch'. Did you mean '--epochs'?"),
    (["--epochs", "three"], '--epochs: "three" is not a whole number'),
    (["--epochs"], "argument --epochs: expected one argument"),
    (["--lr", "nan"], "--lr: nan is out of range"),
    (["--cam", "grad-cam"], "--cam: unknown 'grad-cam'; expected one of none, cam, gradcam, "),
    (["--cam", "cam", "--model", "test_vit", "--image-size", "160"], "cam needs a linear head on the global average"),
    (["--image-size", "8", "--model", "test_vit2"], "test_vit2 with images of 8x8: Input height (8) should be divisible"),
    (["--image-size", "16", "--model", "vit_tiny", "--no-pretrained"], "no layer keeps a 4x4 grid for images of 16x16"),
    (["--layer", "layer7"], "no layer 'layer7' in this network"),
    (["--device", "cuda:99"], "--device cuda:99: not to be had here"),
    (["--device", "gpu"], "--device gpu: not to be had here"),
    (["--split-from", "nowhere"], "nowhere: not a run's folder"),
    (["--resume", "nowhere"], "nowhere: not a run's folder"),
    (["--area", "0.1", "--threshold", "0.5"], "--area and --threshold contradict each other"),
    (["--name", "../x"], "--name '../x': expected a plain folder name"),
])
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert train.main([*arguments, "--out", str(tmp_path / "runs")]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1 and shown.startswith("train.py: ")
    assert not (tmp_path / "runs").exists()


def test_an_old_runs_folder_is_never_written_over(trained, capsys):
    folder = trained(epochs=1)
    before = hash_folder(folder)
    assert train.main(["--out", str(folder.parent), "--name", "run"]) == 2
    assert f"--resume {folder}" in capsys.readouterr().err and hash_folder(folder) == before


def test_split_from_uses_another_runs_split(trained):
    first = trained("--seed", "3", epochs=1)
    second = trained("--seed", "4", "--split-from", str(first), "--train-fraction", "0.1", epochs=1)
    a, b = (json.loads((folder / "split.json").read_text()) for folder in (first, second))
    assert a["val"] == b["val"] and a["test"] == b["test"] and set(b["train"]) < set(a["train"])
    assert len(b["train"]) == pytest.approx(len(a["train"]) / 10, abs=5)


def test_help_shows_each_option_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    defaults = run.read_configs()["defaults"]
    for key in run.SETTINGS:
        assert f"--{key.replace('_', '-')}" in shown
        assert f"(default: {'null' if defaults[key] is None else defaults[key]})" in shown


@pytest.mark.parametrize("batch_size, steps", [(1000, 1), (128, 2), (100, 3), (64, 4), (51, 5)])
def test_a_run_of_very_few_steps_still_learns(trained, batch_size, steps):
    folder = trained("--train-fraction", "0.2", "--batch-size", str(batch_size), epochs=1)
    assert metrics_of(folder)["cost"]["optimizer_steps"] == steps
    torch.manual_seed(0)
    start, _ = run.build_network(run.open_run(folder).config, 10)
    trained_weights = run.load_checkpoint(folder / "last.pt")["model"]
    assert (start.fc.weight - trained_weights["fc.weight"]).abs().max() > 1e-5


# --- the whole space


@pytest.mark.pictures
@pytest.mark.parametrize("arguments", [
    ["--select", "unsure", "--subset", "0.2"], ["--select", "loss"], ["--select", "all", "--fill", "transplant", "--soften", "0.05"],
    ["--fill", "other", "--control", "random"], ["--fill", "blend", "--threshold", "0.3", "--weight", "0.5"],
    ["--control", "coolest", "--fill", "noise"], ["--control", "label", "--fill", "blur"],
    ["--augment", "none", "--random-erasing", "0.5"], ["--augment", "trivialaugment", "--hide-and-seek", "0.2"],
    ["--augment", "randaugment", "--mixup", "0.2", "--cutmix", "1"], ["--mixup", "0.4", "--same-step", "--fill", "other"],
    ["--cutmix", "1", "--budget", "extra", "--explain", "margin"], ["--same-step", "--consistency", "1", "--grow", "2"],
    ["--same-step", "--consistency", "2", "--budget", "extra", "--mixup", "0.2"]])
def test_each_part_of_the_space_trains_with_proxy_attention(trained, arguments):
    folder = trained(*arguments, "--train-fraction", "0.3", epochs=1)
    line = run.read_log(folder)[0]
    assert line["erased_images"] > 0 and np.isfinite(line["train_loss"]) and (folder / "sheet.png").exists()


def test_everything_selected_fills_the_seats_that_share_gives(trained):
    cost = metrics_of(trained("--select", "all", "--share", "0.25"))["cost"]
    assert cost["erased_images"] == (2 * 20 - 1) * 16  # every step but the first has a quarter of 64 erased images
    part = metrics_of(trained("--select", "all", "--share", "0.25", "--subset", "0.1"))["cost"]
    assert part["erased_images"] == pytest.approx((2 * 20 - 1) * 5.8, rel=0.15)  # a tenth of the 58 fresh ones


def test_images_wait_for_one_step_only(trained):
    lines = run.read_log(trained("--schedule", "1,p,2", epochs=4))
    counts = [line["erased_images"] for line in lines]
    assert counts[0] == counts[3] == 0 < counts[1] and counts[2] < 64 / 2 + 1  # those of the last proxy step ride in the first after


@pytest.mark.parametrize("budget", ["equal", "extra"])
def test_in_the_same_step_each_selected_image_is_trained_on_through_a_second_pass(trained, budget, capsys):
    folder = trained("--same-step", "--budget", budget, "--select", "all", "--schedule", "1,p")
    lines, cost = run.read_log(folder), metrics_of(folder)["cost"]
    assert lines[0]["second_pass_images"] == lines[0]["erased_images"] == 0
    assert lines[1]["erased_images"] == 20 * 64
    assert lines[1]["images_seen"] == lines[1]["second_pass_images"] == 20 * 64 * (1 if budget == "equal" else 2)
    assert cost["second_pass_images"] == lines[1]["second_pass_images"] and cost["optimizer_steps"] == 40
    assert "went through the network once more" in capsys.readouterr().out


def test_consistency_brings_what_is_said_of_a_copy_nearer_to_what_was_said_of_its_original(trained, monkeypatch):
    same, found, disagreement = ("--same-step", "--select", "all", "--subset", "0.5", "--area", "0.3", "--train-fraction", "0.3"), [], proxy.disagreement
    monkeypatch.setattr(proxy, "disagreement", lambda *arguments: found.append(disagreement(*arguments)) or found[-1])
    for weight in ("1e-6", "10"):
        trained(*same, "--consistency", weight, epochs=4)
    loose, tight = (sum(found[start:start + 10]) for start in (len(found) // 2 - 10, len(found) - 10))  # the last ten steps of each
    assert 0 < tight < 0.7 * loose


def test_an_area_grows_to_its_whole(trained, monkeypatch):
    found, pixel_mask = [], proxy.pixel_mask
    monkeypatch.setattr(proxy, "pixel_mask", lambda heat, area, *rest: found.append(round(area, 6)) or pixel_mask(heat, area, *rest))
    trained("--train-fraction", "0.1", "--area", "0.3", "--grow", "3", "--warmup", "1", epochs=5)
    assert list(dict.fromkeys(found)) == [0.1, 0.2, 0.3]


def test_a_schedule_decides_in_which_epochs_images_are_erased(trained):
    counts = [line["erased_images"] > 0 for line in run.read_log(trained("--schedule", "every:2", epochs=3))]
    assert counts[:2] == [False, True]
    lines = run.read_log(trained("--schedule", "plateau:1", "--lr", "1e-9", "--budget", "extra", epochs=4))  # it learns nothing
    accuracies = [line["val_accuracy"] for line in lines]
    on = [evaluation.proxy.is_on("plateau:1", epoch, accuracies[:epoch]) for epoch in range(4)]
    assert [line["erased_images"] > 0 for line in lines] == on and on[-1] and not any(on[:2])


def test_a_dry_run_shows_every_fill_and_control_on_one_sheet(tmp_path, capsys):
    before = len(list(REPOSITORY.iterdir()))
    assert train.main(["--dry-run", "--show", "--out", str(tmp_path), "--name", "x"]) == 0
    assert f"Look at {tmp_path / 'x-show.png'}" in capsys.readouterr().out and len(list(REPOSITORY.iterdir())) == before
    sheet = np.asarray(Image.open(tmp_path / "x-show.png").convert("RGB")).astype(int)
    lines = 2 + len(evaluation.proxy.FILLS) + len(evaluation.proxy.CONTROLS) + 3 + 1
    rows = [part[:, sheet.shape[1] // 7:] for part in np.array_split(sheet, lines)]
    assert all(np.ptp(row) > 100 for row in rows)
    assert train.main(["--show"]) == 2 and "--show goes with --dry-run" in capsys.readouterr().err


# --- the step


def weights_of(folder):
    return run.load_checkpoint(folder / "last.pt")["model"]


def test_gradients_of_two_batches_are_those_of_one_of_their_size(trained):
    plain = ["--model", "test_vit", "--image-size", "32", "--no-pretrained", "--cam", "none", "--augment", "none", "--train-fraction", "0.2"]
    one, two = trained(*plain, "--batch-size", "64"), trained(*plain, "--batch-size", "32", "--accumulate", "2")
    steps = [metrics_of(folder)["cost"]["optimizer_steps"] for folder in (one, two)]
    assert steps == [2 * 4, 2 * 4] and metrics_of(one)["cost"]["images_seen"] == metrics_of(two)["cost"]["images_seen"]
    a, b = weights_of(one), weights_of(two)
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_freezing_trains_the_head_alone_and_then_everything(trained):
    start, _ = run.first_network(run.open_run(trained("--freeze", "1", "--train-fraction", "0.1", epochs=1)).config, list("0123456789"))
    start = start.state_dict()
    frozen = weights_of(trained("--freeze", "1", "--train-fraction", "0.1", epochs=1))
    changed = {name for name in start if not torch.equal(start[name], frozen[name])}
    assert changed == {"fc.weight", "fc.bias"}
    later = weights_of(trained("--freeze", "1", "--train-fraction", "0.1", epochs=2))
    assert not torch.equal(start["conv1.0.weight"], later["conv1.0.weight"])


def test_layer_decay_slows_the_layers_below(trained):
    config = run.resolve(run.read_configs(), {"model": "test_vit", "image_size": 160, "pretrained": False, "layer_decay": 0.5})
    model, _ = run.build_network(config, 10)
    t = train.Training(config, model, torch.device("cpu"), 10, 100)
    rates = {id(p): group["lr"] for group in t.optimizer.param_groups for p in group["params"]}
    assert rates[id(model.blocks[0].mlp.fc1.weight)] < rates[id(model.blocks[5].mlp.fc1.weight)] < rates[id(model.head.weight)]
    assert rates[id(model.blocks[4].mlp.fc1.weight)] == pytest.approx(rates[id(model.blocks[5].mlp.fc1.weight)] / 2)


def test_checkpointing_gives_the_same_weights_and_the_same_heat(trained):
    plain = ["--model", "test_resnet", "--image-size", "64", "--no-pretrained", "--train-fraction", "0.1"]
    one, two = trained(*plain, epochs=1), trained(*plain, "--checkpointing", epochs=1)
    a, b = weights_of(one), weights_of(two)
    learned = [name for name in a if "running" not in name and "num_batches" not in name]  # batch norm counts a batch twice then
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in learned)
    assert [line["erased_images"] for line in run.read_log(one)] == [line["erased_images"] for line in run.read_log(two)]


def test_out_of_memory_is_one_line_with_what_would_fit(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "forward", full)
    assert train.main(["--out", str(tmp_path), "--name", "r", "--batch-size", "64"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--batch-size 32 --accumulate 2" in shown and "--checkpointing" in shown


# --- warm start, parts of datasets, the published protocol


# --- the largest batch


@pytest.mark.parametrize("limit", [2, 3, 7, 8, 9, 37, 500, 2000])
def test_the_largest_batch_is_found_to_within_an_eighth_in_few_trials(limit):
    tried = []
    found = train.largest_batch(lambda size: tried.append(size) or size <= limit, 1000)
    assert found <= min(limit, 1000) and found >= min(limit, 1000) * (1 - 1 / 8) - 1 and len(tried) < 16
    assert found < 16 or found % 8 == 0


def test_a_trial_takes_real_steps_with_everything_selected_and_leaves_the_network_as_it_was(monkeypatch, capsys):
    config = run.resolve(run.read_configs(), {"model": "test_resnet", "pretrained": False, "image_size": 32, "budget": "extra",
                                              "warmup": 3, "freeze": 1})
    model, _ = run.first_network(config, ["a", "b"])
    before, sizes, step = copy.deepcopy(model.state_dict()), [], train.forward

    def forward(network, images, labels, amp):
        sizes.append(len(images))
        if len(images) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return step(network, images, labels, amp)

    monkeypatch.setattr(train, "forward", forward)
    train.trial_steps(config, model, ["a", "b"], torch.device("cpu"), 16)
    assert sizes[0] == 16 and 16 <= max(sizes[1:]) <= 24 and len(sizes) == 3
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(torch.OutOfMemoryError):
        train.trial_steps(config, model, ["a", "b"], torch.device("cpu"), 41)
    monkeypatch.undo()
    assert train.main(["--batch-size", "auto"]) == 2 and "asks how much a GPU holds" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_batch_that_is_found_trains(trained):
    folder = trained("--model", "resnet50", "--no-pretrained", "--image-size", "224", "--batch-size", "auto", "--cam", "gradcam++", epochs=1)
    assert json.loads((folder / "config.json").read_text())["batch_size"] >= 64


def test_a_run_starts_from_another_with_more_classes(trained, capsys):
    first = trained("--classes", "1,3,7", "--cam", "none", epochs=2)
    second = trained("--init", str(first), "--cam", "none", "--lr", "1e-9", "--seed", "4", epochs=1)
    assert "its head keeps 3 of 10 classes, new are 0, 2, 4, 5, 6, 8, 9" in " ".join(capsys.readouterr().out.split())
    old, new = (run.load_checkpoint(folder / "last.pt")["model"] for folder in (first, second))
    assert torch.allclose(new["layer2.0.conv1.weight"], old["layer2.0.conv1.weight"], atol=1e-5)
    assert torch.allclose(new["fc.weight"][[1, 3, 7]], old["fc.weight"], atol=1e-5)
    assert not torch.allclose(new["fc.weight"][[0, 2, 4]], old["fc.weight"], atol=1e-2)
    splits = [json.loads((folder / "split.json").read_text()) for folder in (first, second)]
    assert splits[0]["classes"] == ["1", "3", "7"] and set(splits[0]["test"]) <= set(splits[1]["test"])
    assert not set(splits[0]["train"]) & {*splits[1]["test"], *splits[1]["val"]}


def test_a_run_that_starts_from_another_on_the_same_data_goes_on_where_that_was(trained):
    first = trained("--cam", "none", epochs=4)
    second = trained("--init", str(first), "--lr", "1e-9", epochs=1)
    assert metrics_of(second)["test"]["accuracy"] == pytest.approx(metrics_of(first)["test"]["accuracy"], abs=0.02)
    assert (first / "split.json").read_bytes() == (second / "split.json").read_bytes()


def test_what_cannot_be_started_from_is_refused(trained, tmp_path, capsys):
    first = trained(epochs=1)
    for arguments, message in [
            (["--init", str(tmp_path)], "not a run's folder"),
            (["--init", str(first), "--model", "test_resnet"], "its network is --model resnet10s, not test_resnet"),
            (["--init", str(first), "--split-from", str(trained("--seed", "9", epochs=1))], "was trained on; leave one of the two out"),
            (["--classes", "1,x"], "--classes: dataset digits has no class 'x'")]:
        assert train.main([*arguments, "--out", str(tmp_path / "runs")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "runs").exists()
    (first / "metrics.json").unlink()
    assert train.main(["--init", str(first), "--out", str(tmp_path / "runs")]) == 2
    assert f"not finished; first run python train.py --resume {first}" in capsys.readouterr().err


def test_the_published_protocol_leaks_and_every_page_says_so(tmp_path, capsys):
    found = {}
    for protocol in ("fixed", "resplit"):
        assert train.main(["--dataset", "noisy_digits", "--cam", "none", "--schedule", "8,p,8,p,2", "--protocol", protocol, "--out",
                           str(tmp_path), "--name", protocol]) == 0
        found[protocol] = metrics_of(tmp_path / protocol)
    shown = capsys.readouterr().out
    assert found["resplit"]["val"]["accuracy"] > found["fixed"]["val"]["accuracy"] + 0.15
    assert abs(found["resplit"]["test"]["accuracy"] - found["fixed"]["test"]["accuracy"]) < 0.1
    assert found["resplit"]["cost"]["optimizer_steps"] == found["fixed"]["cost"]["optimizer_steps"]
    assert shown.count("LEAK") == 20 and f"WARNING, --protocol resplit: {evaluation.LEAK}" in shown
    assert all(line["warning"] == evaluation.LEAK for line in run.read_log(tmp_path / "resplit"))
    assert json.loads((tmp_path / "resplit" / "config.json").read_text())["protocol"] == found["resplit"]["protocol"] == "resplit"
    assert evaluation.main([str(tmp_path / "fixed"), str(tmp_path / "resplit")]) == 2
    assert "--any-protocol" in capsys.readouterr().err
    assert evaluation.main([str(tmp_path / "fixed"), str(tmp_path / "resplit"), "--any-protocol"]) == 0


# --- the staged pipeline


STAGED = ["--mode", "staged", "--train-fraction", "0.3", "--format", "png"]


def picture(folder, row):
    return np.asarray(Image.open(folder / row["file"])).astype(int)


def test_the_staged_pipeline_erases_what_misled_and_trains_again(trained):
    folder = trained(*STAGED, "--schedule", "2,p,1,p", epochs=5)
    lines, stages = run.read_log(folder), run.read_lines(folder / "stages.jsonl")
    assert [(s["round"], s["stage"]) for s in stages] == [(0, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, None)]
    assert stages[-1]["ended"] == metrics_of(folder)["ended"] == "all rounds are done"
    assert [line["round"] for line in lines] == [0, 0, 1, 1, 2] and lines[1]["erased_images"] == 0
    opened = run.open_run(folder)
    dataset, train_ids = opened.dataset(), opened.split["train"]
    mean, std = run.normalisation(opened.config, None)
    for number in (1, 2):
        rows = run.ErasedRound(folder, number, "png").rows()
        assert len(rows) == stages[2 * number - 1]["erased_images"] > 0 and stages[2 * number - 1]["images"] == len(train_ids)
        assert {row["source"] for row in rows} <= set(train_ids) and len({row["source"] for row in rows}) == len(rows)
        for row in rows:
            index = dataset.ids.index(row["source"])
            assert row["label"] == dataset.classes[dataset.labels[index]] != row["predicted"]
            assert row["file"].startswith(f"erased/round-{number}/{row['label']}/")
            changed = (picture(folder, row) != evaluation.data.to_rgb(dataset.open(index), 32)).any(2)
            assert changed.sum() <= 102 and float(row["area"]) == pytest.approx(102 / 1024, abs=1e-5)
            assert (picture(folder, row)[changed] == 0).all() and 0.1 < float(row["confidence"]) <= 1
    cost = metrics_of(folder)["cost"]
    assert cost["second_pass_images"] == 2 * len(train_ids) and cost["cam_seconds"] > 0
    assert cost["erased_images"] == sum(line["erased_images"] for line in lines) > 0


def test_a_stages_network_and_optimizer_are_gone_when_it_ends(trained, monkeypatch):
    import weakref

    kept, alive = [], []
    build, record = torch.optim.AdamW, run.append_line

    def remember(*arguments, **options):
        kept.append(weakref.ref(optimizer := build(*arguments, **options)))
        kept.append(weakref.ref(optimizer.param_groups[0]["params"][0]))
        return optimizer

    def look(path, line):
        if path.name == "stages.jsonl":
            alive.append([reference() is not None for reference in kept])
        record(path, line)

    monkeypatch.setattr(torch.optim, "AdamW", remember)
    monkeypatch.setattr(run, "append_line", look)
    stages = run.read_lines(trained(*STAGED, "--rounds", "1", epochs=1) / "stages.jsonl")
    assert len(kept) == 4 and len(alive) == 4 and not any(sum(alive, []))
    assert all(stage["held_mb"] > 0 and stage["left_mb"] > 0 for stage in stages[:-1])


@pytest.mark.parametrize("budget, images", [("equal", 0), ("extra", 1)])
def test_stage_3_trains_on_copies_instead_of_their_originals_or_on_both(trained, budget, images):
    folder = trained(*STAGED, "--rounds", "1", "--budget", budget, "--batch-size", "16", epochs=1)
    erased, lines = len(run.ErasedRound(folder, 1, "png").rows()), run.read_log(folder)
    whole = len(run.open_run(folder).split["train"])
    assert lines[1]["images_seen"] == -(-(whole + images * erased) // 16) * 16
    assert erased <= lines[1]["erased_images"] < erased + 16


def test_a_round_whose_heat_says_nothing_says_so(trained, monkeypatch):
    monkeypatch.setattr(evaluation.cam, "rescale", torch.zeros_like)
    folder = trained(*STAGED, epochs=1)
    selected = run.read_lines(folder / "stages.jsonl")[1]["selected"]
    assert selected > 100 and metrics_of(folder)["ended"] == f"the heat of all {selected} selected images is zero"


def test_staged_runs_end_early_and_say_why(trained, capsys):
    folder = trained(*STAGED, "--target-accuracy", "0.05", epochs=2)
    assert "reaches the target 0.05" in metrics_of(folder)["ended"] and len(run.read_log(folder)) == 2
    folder = trained("--mode", "staged", "--classes", "0,1", epochs=8)
    assert metrics_of(folder)["ended"] == "no training image is misled" and len(run.read_log(folder)) < 32
    assert "ended in round" in capsys.readouterr().out


@pytest.mark.parametrize("select", ["unsure", "loss"])
def test_a_staged_subset_takes_the_hardest_of_all_training_images(trained, select):
    folder = trained(*STAGED, "--rounds", "1", "--select", select, "--subset", "0.1", epochs=1)
    opened = run.open_run(folder)
    dataset, ids = opened.dataset(), opened.split["train"]
    rows = run.ErasedRound(folder, 1, "png").rows()
    assert len(rows) == round(0.1 * len(ids))
    rest = set(ids) - {row["source"] for row in rows}
    opened.config["seed"] = 0
    state = run.load_checkpoint(folder / "best.pt")  # of stage 1, unless stage 3 was better
    if state["epoch"] == 1:
        model = opened.network("best.pt")
        logits, labels = evaluation.predict(model, evaluation.batches_in_order(opened.config, dataset, ids, torch.device("cpu")),
                                            *run.normalisation(opened.config, model), torch.device("cpu"))
        score = dict(zip(ids, evaluation.proxy.SELECTIONS[select](logits, labels, None)[1].tolist()))
        assert min(score[row["source"]] for row in rows) >= max(score[i] for i in rest) - 1e-5


def same_run(a, b):
    """The same weights, and the same erased images, line by line and byte by byte."""
    states = [run.load_checkpoint(folder / "last.pt")["model"] for folder in (a, b)]
    files = [{p.relative_to(f): p.read_bytes() for p in f.glob("erased/**/*") if p.is_file()} for f in (a, b)]
    return all(torch.equal(states[0][k], states[1][k]) for k in states[0]) and files[0] == files[1] and files[0]         and [s["stage"] for s in run.read_lines(a / "stages.jsonl")] == [s["stage"] for s in run.read_lines(b / "stages.jsonl")]


RESPLIT = [*STAGED, "--schedule", "1,p,p", "--select", "loss", "--subset", "0.5", "--fill", "transplant", "--protocol", "resplit"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The staged run that is killed below, left alone."""
    out = tmp_path_factory.mktemp("whole")
    assert train.main([*RESPLIT, "--epochs", "3", "--out", str(out), "--name", "whole"]) == 0
    return out / "whole"


@pytest.mark.parametrize("moment", ["write_json", "append_line", "save_checkpoint"])
def test_a_staged_run_that_was_killed_goes_on_with_what_is_on_disk(whole, tmp_path, monkeypatch, moment):
    arguments = RESPLIT
    plain, calls = getattr(run, moment), [0]

    def dies(*given):
        calls[0] += 1
        if calls[0] % 7 == 2:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(run, moment, dies)
    status = train.main([*arguments, "--epochs", "3", "--out", str(tmp_path), "--name", "cut"])
    attempts = 0
    while status == 130 and (attempts := attempts + 1) < 30:
        if not (tmp_path / "cut" / "config.json").exists():  # it died before there was a run
            status = train.main([*arguments, "--epochs", "3", "--out", str(tmp_path), "--name", "cut"])
        else:
            status = train.main(["--resume", str(tmp_path / "cut")])
    assert status == 0 and attempts > 0
    assert same_run(whole, tmp_path / "cut")


def test_a_staged_run_repeats_no_finished_work(trained, tmp_path, monkeypatch):
    arguments = [*STAGED, "--rounds", "1", "--batch-size", "32"]
    looked, record = [], run.ErasedRound.add
    monkeypatch.setattr(run.ErasedRound, "add", lambda self, *given: (record(self, *given), looked.append(given[2])))
    with monkeypatch.context() as patch:
        def stop(self, *given):
            if given[2] >= 160:
                raise KeyboardInterrupt
            record(self, *given)
            looked.append(given[2])
            while self._waiting:
                self._settle()
        patch.setattr(run.ErasedRound, "add", stop)
        assert train.main([*arguments, "--epochs", "1", "--out", str(tmp_path), "--name", "cut"]) == 130
    assert looked == [32, 64, 96, 128]
    epochs = len(run.read_log(tmp_path / "cut"))
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert looked[4:] == [*range(160, looked[-1], 32), looked[-1]] and epochs == 1 and len(run.read_log(tmp_path / "cut")) == 2


def test_a_full_disk_in_a_staged_run_keeps_the_last_checkpoint_and_the_run_goes_on(tmp_path, train_process):
    process = train_process([*STAGED, "--rounds", "1", "--epochs", "1", "--out", tmp_path, "--name", "run"], limit=100_000)
    assert process.wait() == 2  # config and split fit, a checkpoint does not
    assert "cannot be written (" in (last := process.output().splitlines()[-1]) and f"go on with python train.py --resume {tmp_path / 'run'}" in last
    assert train_process(["--resume", tmp_path / "run"]).wait() == 0
    assert len(run.read_log(tmp_path / "run")) == 2


ODD = ["a b", "é <b>狗", "$x_2$ & [red]", "-rf", "100%"]


@pytest.mark.pictures
@pytest.mark.parametrize("mode", [["--budget", "extra"], ["--mode", "staged", "--rounds", "1", "--select", "all", "--cam", "center", "--control", "label"]])
def test_names_with_markup_stay_in_the_runs_folder_and_the_dataset_is_untouched(mode, tmp_path):
    from conftest import draw_letter

    root = tmp_path / "images"
    for number, name in enumerate(ODD):
        (root / name).mkdir(parents=True)
        for frame in range(6):
            draw_letter("ABCDE"[number], frame).save(root / name / f"{name} [red] {frame}.jpg")
    before = hash_folder(root)
    assert train.main(["--dataset", "folder", "--data-dir", str(root), "--model", "test_resnet", "--no-pretrained", "--image-size", "64",
                       "--epochs", "1", "--out", str(tmp_path / "runs"), "--name", "run", "--workers", "0", *mode]) == 0
    assert hash_folder(root) == before and sorted(p.name for p in tmp_path.iterdir()) == ["images", "runs"]
    opened = run.open_run(tmp_path / "runs" / "run")
    assert set(opened.split["classes"]) == set(ODD) and (opened.folder / "sheet.png").exists()
    if "staged" in mode:
        rows = run.ErasedRound(opened.folder, 1, "jpg").rows()
        assert rows and {row["label"] for row in rows} <= set(ODD)
        assert all((opened.folder / row["file"]).is_file() and row["file"].count("/") == 3 for row in rows)


def test_just_train_twice_draws_what_the_first_run_got_wrong_more_often(trained, tmp_path, capsys):
    settings = ("--decoy", "--train-fraction", "0.2", "--cam", "none")
    first = trained(*settings, epochs=3)
    second = trained(*settings, "--reweight", str(first), "--upweight", "5", epochs=2)
    opened = run.open_run(first)
    dataset = opened.dataset()
    model, (mean, std) = opened.network().eval(), run.normalisation(opened.config, opened.network())
    wrong = []
    for (images, labels), image_id in zip(data.Batches(dataset, opened.split["train"], 32, 1, torch.device("cpu")), opened.split["train"]):
        with torch.no_grad():
            wrong += [image_id] * (model(data.prepare(images, mean, std)).argmax(1) != labels).item()
    assert wrong == run.read_json(second / "reweighted.json")["misled"] and 0 < len(wrong) < len(opened.split["train"])
    batches = train.open_batches(run.open_run(second).config, dataset, {**opened.split, "misled": wrong}, torch.device("cpu"))[0]
    assert set(batches.order.weights.tolist()) == {1, 5} and (batches.order.weights == 5).sum() == len(wrong)
    assert run.read_log(second)[0]["images_seen"] == run.read_log(first)[0]["images_seen"]
    for arguments, says in ((["--reweight", str(tmp_path)], "config.json"), (["--reweight", str(first), "--classes", "1,2"], "has the classes 0, 1"),
                            (["--reweight", str(first), "--mode", "staged"], "goes with --mode online")):
        assert train.main([*arguments, "--cam", "none", "--out", str(tmp_path / "runs")] if "staged" not in arguments else
                          [*arguments, "--out", str(tmp_path / "runs")]) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "runs").exists()


@pytest.mark.pictures
def test_the_heat_may_come_from_the_network_of_a_run_before_which_stays_as_it_is(trained, monkeypatch, capsys):
    small = ("--train-fraction", "0.2", "--batch-size", "32")
    first = trained(*small, "--cam", "none", epochs=3)
    network, seen = run.open_run(first).network(), []
    erased_copies = proxy.erased_copies

    def spy(config, explain, images, labels, logits, *rest):
        with torch.no_grad():
            said = network(images)
        found = erased_copies(config, explain, images, labels, logits, *rest)
        with cam.CAM(network, config["cam"], config["layer"]) as own:
            own_heat = cam.upsample(own(network(images), rest[1], labels[rest[1]]), images.shape[-2:])
        seen.append((torch.allclose(said, logits, atol=1e-4), torch.allclose(own_heat, found[1], atol=1e-3)))
        return found

    monkeypatch.setattr(proxy, "erased_copies", spy)
    second = trained(*small, "--heat-from", str(first), "--select", "all", "--explain", "true", "--fill", "noise")
    assert len(seen) == 2 * 8 + 1 and all(map(all, seen))  # each step, and the sheet
    lines, kept, own = run.read_log(second), weights_of(first), weights_of(second)
    assert all(line["second_pass_images"] == 8 * 32 >= line["erased_images"] > 200 for line in lines)  # a heat may be zero
    assert 0 < lines[0]["train_accuracy"] < 1 and not torch.equal(kept["fc.weight"], own["fc.weight"])
    given = run.load_checkpoint(second / "heat.pt")["model"]
    assert kept.keys() == given.keys() and all(torch.equal(kept[k], given[k]) for k in kept)

    monkeypatch.undo()
    (second / "metrics.json").unlink()
    first.rename(first.with_name("gone"))  # the run is whole without it
    assert evaluation.main([str(second)]) == 0 and (second / "metrics.json").is_file()


def test_a_run_with_the_heat_of_another_goes_on_to_the_same_bits_without_it(trained, tmp_path, monkeypatch, capsys):
    first = trained("--train-fraction", "0.2", "--cam", "none", epochs=2)
    arguments = ["--train-fraction", "0.2", "--heat-from", str(first), "--select", "all", "--fill", "transplant", "--epochs", "2", "--out", str(tmp_path), "--name"]
    assert train.main([*arguments, "whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main([*arguments, "cut"]) == 130
    first.rename(tmp_path / "elsewhere")
    heat, cut = (tmp_path / "cut" / "heat.pt").read_bytes(), tmp_path / "cut"
    for harm in (lambda path: path.write_bytes(heat[:-100]), Path.unlink):
        harm(cut / "heat.pt")
        capsys.readouterr()
        assert train.main(["--resume", str(cut)]) == 2
        assert f"{cut}/heat.pt" in (err := capsys.readouterr().err) and err.count("\n") == 1
    (cut / "heat.pt").write_bytes(heat)
    assert train.main(["--resume", str(cut)]) == 0
    a, b = (weights_of(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a) and metrics_of(cut)["test"] == metrics_of(tmp_path / "whole")["test"]


def test_a_run_that_cannot_give_the_heat_is_named_before_anything_is_trained(trained, tmp_path, capsys):
    first, out = str(trained("--train-fraction", "0.2", "--cam", "none", epochs=3)), tmp_path / "runs"
    for arguments, says in ((["--heat-from", str(tmp_path)], "config.json"), (["--heat-from", first, "--classes", "1,2"], "has the classes 0, 1"),
                            (["--heat-from", first, "--model", "test_vit", "--no-pretrained"], 'has --model "resnet10s", not "test_vit"'),
                            (["--heat-from", first, "--image-size", "40"], "has --image-size 32, not 40"),
                            (["--heat-from", first, "--cam", "none"], "a --cam other than none"),
                            (["--heat-from", first, "--mode", "staged"], "goes with --mode online"),
                            (["--heat-from", first, "--consistency", "1"], "leave --heat-from out"), (["--consistency", "1"], "give that"),
                            (["--grow", "2", "--threshold", "0.5"], "--grow goes with --area")):
        assert train.main([*arguments, "--out", str(out)]) == 2
        assert says in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_trains(trained, amp):
    line = run.read_log(trained("--amp", amp, "--classes", "1,3,7", "--train-fraction", "0.3", "--batch-size", "16", epochs=1))[0]
    assert np.isfinite(line["train_loss"]) and line["erased_images"] > 0


def test_the_metrics_are_those_of_a_case_worked_by_hand():
    labels = np.array([0, 0, 1, 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
    found = evaluation.metrics(labels, np.log(probabilities), ["a", "b", "c"])
    assert found["accuracy"] == 0.75 and found["top5"] is None
    assert found["recall_macro"] == pytest.approx((0.5 + 1 + 1) / 3) == found["balanced_accuracy"]
    assert found["precision_macro"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["log_loss"] == pytest.approx(-np.log([0.8, 0.2, 0.6, 0.4]).mean())
    assert found["brier"] == pytest.approx(((0.04 + 0.01 + 0.01) + (0.64 + 0.49 + 0.01) + (0.01 + 0.16 + 0.09)
                                            + (0.09 + 0.09 + 0.36)) / 4)
    assert found["ece"] == pytest.approx((0.2 + 0.7 + 0.4 + 0.6) / 4)  # each confidence alone in its bin
    assert evaluation.expected_calibration_error(np.array([0.9, 0.9]), np.array([True, False])) == pytest.approx(0.4)
    assert found["per_class"]["b"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "images": 1}
