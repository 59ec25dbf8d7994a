"""engine/fit.py: the largest batch that fits the memory, and the error for one that does not."""

import copy

import pytest
import torch

import train
from engine import before, fit, settings, training
from engine.files import read_json

CPU = torch.device("cpu")


def test_out_of_memory_is_one_line_with_what_would_fit(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training.Training, "forward", full)
    assert train.main(["--out", str(tmp_path), "--name", "r", "--batch-size", "64"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "--batch-size 32 --accumulate 2" in shown
    assert f"what {tmp_path}/r has is intact" in shown and "--resume" not in shown


@pytest.mark.parametrize("limit", [2, 3, 7, 8, 9, 37, 500, 2000])
def test_the_largest_batch_is_found_to_within_an_eighth_in_few_trials(limit):
    tried, most = [], min(limit, 1000)
    found = fit.largest_batch(lambda size: tried.append(size) or size <= limit, 1000)
    assert most * (1 - 1 / 8) - 1 <= found <= most and len(tried) < 16
    assert found < 16 or found % 8 == 0


def test_where_not_even_two_images_fit_the_error_says_what_else_to_try():
    with pytest.raises(settings.UserError, match="--batch-size 2 does not fit; try --amp auto"):
        fit.largest_batch(lambda size: False, 1000)


@pytest.mark.parametrize("mode, largest", [("online", range(17, 25)), ("staged", [16])])  # a staged step erases nothing
def test_a_trial_takes_real_steps_with_everything_selected_and_leaves_the_network_as_it_was(mode, largest, monkeypatch):
    options = {"model": "test_resnet", "pretrained": False, "image_size": 32, "budget": "extra", "mode": mode}
    config = settings.resolve(settings.read_configs(), options) | {"schedule": "after:3", "reweight": "a run"}
    model, _ = before.first_network(config, ["a", "b"])
    weights, sizes, step = copy.deepcopy(model.state_dict()), [], training.Training.forward

    def forward(self, images, network=None):
        sizes.append(len(images))
        if len(images) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, images, network)

    monkeypatch.setattr(training.Training, "forward", forward)
    fit.trial_steps(train.train, config, model, ["a", "b"], CPU, 16)
    assert sizes[0] == 16 and max(sizes[1:]) in largest and len(sizes) == 3
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    with pytest.raises(torch.OutOfMemoryError):
        fit.trial_steps(train.train, config, model, ["a", "b"], CPU, 41)


def test_a_runs_peak_memory_is_not_that_of_its_trials(monkeypatch):
    called = []
    for name in ("set_per_process_memory_fraction", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(fit, "trial_steps", lambda *_: called.append("trial"))
    assert fit.fitting_batch(None, None, None, None, torch.device("cuda", 0), 100) == 10
    assert "trial" in called and called[-1] == "reset_peak_memory_stats"


def test_auto_needs_a_gpu_to_ask(capsys):
    assert train.main(["--batch-size", "auto", "--device", "cpu"]) == 2
    assert "asks how much a GPU holds" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_batch_that_is_found_trains(trained):
    folder = trained("--model", "resnet50", "--no-pretrained", "--image-size", "224", "--batch-size", "auto", "--cam",
                     "gradcam++", epochs=1)
    assert read_json(folder / "config.json")["batch_size"] >= 64
