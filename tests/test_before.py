"""engine/before.py: runs that start from another run, take their heat from it, or draw what it got wrong more often."""

from pathlib import Path

import pytest
import torch

import cam
import eval as evaluation
import proxy
import train
from engine import files, loader
from engine.before import UPWEIGHT
from engine.checkpoint import load_checkpoint
from engine.folder import open_run, read_log
from engine.network import normalisation
from engine.training import Parts

CPU = torch.device("cpu")
PART = ("--train-fraction", "0.3")


def split_of(folder):
    return files.read_json(folder / "split.json")


def accuracy_of(folder):
    return files.read_json(folder / "metrics.json")["test"]["accuracy"]


def weights_of(folder):
    return load_checkpoint(folder / "last.pt")["model"]


def refused(arguments, message, out, capsys):
    """`train.py` ends with this one line, and nothing is written."""
    assert train.main([*arguments, "--out", str(out)]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1 and not out.exists()


# --init


def test_a_run_starts_from_another_with_more_classes(trained, capsys):
    first = trained(*PART, "--classes", "1,3,7", "--cam", "none", epochs=2)
    second = trained(*PART, "--init", str(first), "--cam", "none", "--lr", "1e-9", "--seed", "4", epochs=1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "its head keeps 3 of 10 classes, new are 0, 2, 4, 5, 6, 8, 9" in shown
    old, new = weights_of(first), weights_of(second)
    assert torch.allclose(new["layer2.0.conv1.weight"], old["layer2.0.conv1.weight"], atol=1e-5)
    assert torch.allclose(new["fc.weight"][[1, 3, 7]], old["fc.weight"], atol=1e-5)
    assert not torch.allclose(new["fc.weight"][[0, 2, 4]], old["fc.weight"], atol=1e-2)
    splits = [split_of(folder) for folder in (first, second)]
    assert splits[0]["classes"] == ["1", "3", "7"] and set(splits[0]["test"]) <= set(splits[1]["test"])
    assert not set(splits[0]["train"]) & {*splits[1]["test"], *splits[1]["val"]}


@pytest.mark.slow
def test_a_run_that_starts_from_another_on_the_same_data_goes_on_where_that_was(trained):
    first = trained("--cam", "none", epochs=4)
    second = trained("--init", str(first), "--lr", "1e-9", epochs=1)
    assert accuracy_of(second) == pytest.approx(accuracy_of(first), abs=0.02)
    assert (first / "split.json").read_bytes() == (second / "split.json").read_bytes()


def test_what_cannot_be_started_from_is_refused(trained, tmp_path, capsys):
    first, out = trained(*PART, epochs=1), tmp_path / "runs"
    refused(["--init", str(tmp_path)], "not a run's folder", out, capsys)
    refused(["--init", str(first), "--model", "test_resnet"], "its --model is resnet10s, not test_resnet", out,
            capsys)
    refused(["--init", str(first), "--weights", "w.pth"], "--weights and --init contradict each other", out, capsys)
    (first / "metrics.json").unlink()
    refused(["--init", str(first)], f"not finished; first run python train.py --resume {first}", out, capsys)


# --reweight


@pytest.mark.slow
def test_just_train_twice_draws_what_the_first_run_got_wrong_more_often(trained):
    settings = ("--decoy", "--train-fraction", "0.2", "--cam", "none")
    first = trained(*settings, epochs=3)
    second = trained(*settings, "--reweight", str(first), epochs=2)
    opened = open_run(first)
    dataset, ids, wrong = opened.dataset(), opened.split["train"], []
    model, (mean, std) = opened.network().eval(), normalisation(opened.config, opened.network())
    for (images, labels), image_id in zip(loader.Batches(dataset, ids, 32, 1, CPU), ids):
        with torch.no_grad():
            wrong += [image_id] * (model(loader.prepare(images, mean, std)).argmax(1) != labels).item()
    assert wrong == files.read_json(second / "reweighted.json")["misled"] and 0 < len(wrong) < len(ids)
    parts = Parts(open_run(second).config, second, dataset, {**opened.split, "misled": wrong}, CPU)
    weights = parts.batches.order.weights
    assert UPWEIGHT == 20 and set(weights.tolist()) == {1, 20} and (weights == 20).sum() == len(wrong)
    assert read_log(second)[0]["images_seen"] == read_log(first)[0]["images_seen"]


@pytest.mark.parametrize("arguments, message", [
    (["--reweight", "elsewhere"], "config.json"), (["--reweight", "first", "--classes", "1,2"], "has the classes 0, 1"),
    (["--reweight", "first", "--mode", "staged", "--cam", "gradcam"], "goes with --mode online"),
    (["--reweight", "first", "--mode", "resplit", "--schedule", "p"], "goes with --mode online")])
def test_a_run_that_cannot_be_built_on_is_named_before_anything_is_trained(arguments, message, once, tmp_path, capsys,
                                                                           monkeypatch):
    monkeypatch.chdir(once.parent)
    refused(["--cam", "none", *arguments], message, tmp_path / "runs", capsys)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A short run, `first`, in the folder where the tests that take it are."""
    out = tmp_path_factory.mktemp("once")
    assert train.main(["--train-fraction", "0.2", "--cam", "none", "--epochs", "3", "--out", str(out), "--name",
                       "first"]) == 0
    return out / "first"


# --heat


@pytest.mark.slow
@pytest.mark.pictures
def test_the_heat_may_come_from_the_network_of_a_run_before_which_stays_as_it_is(trained, monkeypatch):
    small = ("--train-fraction", "0.2", "--batch-size", "32")
    first = trained(*small, "--cam", "none", epochs=3)
    network, seen = open_run(first).network(), []
    erased = proxy.Proxy.erased

    def spy(self, images, labels, fresh, logits, rows, chosen):
        with torch.no_grad():
            expected = network(images)
        found = erased(self, images, labels, fresh, logits, rows, chosen)
        with cam.CAM(network, "gradcam", None) as own:
            own_heat = cam.upsample(own(network(images), rows, labels[rows]), images.shape[-2:])
        seen.append((torch.allclose(expected, logits, atol=1e-4), torch.allclose(own_heat, found[1], atol=1e-3)))
        return found

    monkeypatch.setattr(proxy.Proxy, "erased", spy)
    second = trained(*small, "--heat", str(first), "--select", "all", "--explain", "true", "--fill", "noise")
    assert len(seen) == 2 * 8 + 1 and all(map(all, seen))  # each step, and the sheet
    lines, kept, own = read_log(second), weights_of(first), weights_of(second)
    assert all(line["second_pass_images"] == 8 * 32 >= line["erased_images"] > 200 for line in lines)  # heat can be 0
    assert 0 < lines[0]["train_accuracy"] < 1 and not torch.equal(kept["fc.weight"], own["fc.weight"])
    given = load_checkpoint(second / "heat.pt")["model"]
    assert kept.keys() == given.keys() and all(torch.equal(kept[k], given[k]) for k in kept)

    monkeypatch.undo()
    (second / "metrics.json").unlink()
    first.rename(first.with_name("gone"))  # the run is complete without it
    assert evaluation.main([str(second)]) == 0 and (second / "metrics.json").is_file()


@pytest.mark.slow
def test_a_run_with_the_heat_of_another_goes_on_to_the_same_bits_without_it(trained, tmp_path, monkeypatch, capsys):
    first = trained("--train-fraction", "0.2", "--cam", "none", epochs=2)
    arguments = ["--train-fraction", "0.2", "--heat", str(first), "--select", "all", "--fill", "transplant",
                 "--epochs", "2", "--out", str(tmp_path), "--name"]
    assert train.main([*arguments, "alone"]) == 0
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
    a, b = (weights_of(tmp_path / name) for name in ("alone", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a) and accuracy_of(cut) == accuracy_of(tmp_path / "alone")


@pytest.mark.parametrize("arguments, message", [
    (["--heat", "elsewhere"], "config.json"),
    (["--heat", "first", "--classes", "1,2"], "has the classes 0, 1"),
    (["--heat", "first", "--model", "test_vit", "--no-pretrained"], 'has --model "resnet10s", not "test_vit"'),
    (["--heat", "first", "--image-size", "40"], "has --image-size 32, not 40"),
    (["--heat", "first", "--cam", "none"], "a --cam other than none"),
    (["--heat", "first", "--mode", "staged"], "goes with --mode online")])
def test_a_run_that_cannot_give_the_heat_is_named_before_anything_is_trained(arguments, message, once, tmp_path,
                                                                             monkeypatch, capsys):
    monkeypatch.chdir(once.parent)
    refused(arguments, message, tmp_path / "runs", capsys)
