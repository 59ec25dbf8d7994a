"""train.py and eval.py from the command line: what a user types, and what a run leaves."""

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

import eval as evaluation
import run
import train

REPOSITORY = Path(train.__file__).parent
LITE0 = REPOSITORY.parent / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"
LEFT = ["best.pt", "config.json", "confusion.png", "curves.png", "env.json", "last.pt", "log.jsonl", "metrics.json",
        "predictions.npz", "reliability.png", "sheet.png", "split.json"]


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


def test_the_command_its_user_types_most(asl, tmp_path):
    before = hash_folder(asl)
    assert train.main(["--dataset", "asl", "--model", "vit_small", "--cam", "gradcam++", "--no-pretrained", "--epochs", "1",
                       "--data-dir", str(asl), "--out", str(tmp_path / "runs")]) == 0
    folder = tmp_path / "runs" / "asl-vit_small-gradcam++-s0"
    assert sorted(p.name for p in folder.iterdir()) == LEFT
    config = json.loads((folder / "config.json").read_text())
    assert config["layer"] == "blocks.11.norm1" and config["image_size"] == 224
    assert hash_folder(asl) == before


def test_without_the_images_it_says_where_to_get_them_and_writes_nothing(tmp_path):
    out, images = tmp_path / "runs", tmp_path / "images"
    answer = command("train.py", "--dataset", "asl", "--model", "vit_small", "--cam", "gradcam++", "--out", str(out),
                     "--data-dir", str(images))
    assert answer.returncode == 2 and answer.stdout == "" and not out.exists()
    assert answer.stderr.count("\n") == 1
    for words in ("dataset asl", str(images), "https://www.kaggle.com/datasets/grassknoted/asl-alphabet", "--data-dir"):
        assert words in answer.stderr


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


def test_help_shows_each_option_with_its_default():
    shown = " ".join(command("train.py", "--help").stdout.split())
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


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_trains(trained, amp):
    line = run.read_log(trained("--amp", amp, "--train-fraction", "0.2", epochs=1))[0]
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
