"""engine/training.py: the parts of the loop that hold the network's state."""

import copy
import io
from types import SimpleNamespace

import pytest
import timm
import torch

from engine import display
from engine.training import flattened


def network():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).train()
    model(torch.randn(4, 3, 64, 64))  # moves the running statistics
    return model


def statistics(model):
    return [b for b in model.buffers() if b.is_floating_point()]


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file


def test_flattened_statistics_are_one_vector_and_stay_the_models_own():
    model, plain = network(), network()
    buffers = statistics(model)
    flat, = flattened(buffers)
    assert all(a is b for a, b in zip(statistics(model), buffers)) and flat.numel() == sum(b.numel() for b in buffers)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    images = torch.randn(4, 3, 64, 64)
    assert torch.equal(model(images), plain(images))  # and both move theirs
    assert torch.equal(flat, torch.cat([b.flatten() for b in statistics(plain)]))
    kept = flat.clone()
    model(images + 1)
    assert not torch.equal(kept, flat)
    flat.copy_(kept)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()) if a.is_floating_point())


def test_flattened_statistics_are_loaded_copied_and_saved_as_others_are():
    model, plain = network(), network()
    flat, = flattened(statistics(model))
    assert abs(len(saved(model).getvalue()) - len(saved(plain).getvalue())) < 0.05 * len(saved(plain).getvalue())
    other = copy.deepcopy(model)
    assert torch.equal(flattened(statistics(other))[0], flat)
    flat.zero_()
    assert all(b.any() for b in statistics(other))  # its own
    model.load_state_dict(torch.load(io.BytesIO(saved(plain).getvalue()), weights_only=True))
    assert torch.equal(flat, torch.cat([b.flatten() for b in statistics(plain)]))
    assert all(torch.equal(a, b) for a, b in zip(torch.load(io.BytesIO(saved(model).getvalue())).values(),
                                                 plain.state_dict().values(), strict=True))


def test_tensors_of_several_types_have_a_vector_each():
    tensors = [torch.ones(2), torch.zeros(3, 2, dtype=torch.float64), torch.full((2, 2), 2.0)]
    flats = flattened(tensors)
    assert [f.tolist() for f in flats] == [[1, 1, 2, 2, 2, 2], [0] * 6] and flattened([]) == []
    flats[1] += 1
    assert tensors[1].eq(1).all() and tensors[1].shape == (3, 2)


# What is shown where there is no terminal.


@pytest.mark.parametrize("seconds, shown", [(0, 4), (1000, 0)])
def test_without_a_terminal_there_is_a_line_now_and_then(seconds, shown, monkeypatch, capsys):
    for name in ("FIRST_LINE", "LINES"):
        monkeypatch.setattr(display, name, seconds)
    assert list(display.progress(iter("abcd"), "decoding", 4)) == list("abcd")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"decoding: {number} of 4" for number in range(1, shown + 1)]


@pytest.mark.parametrize("seconds, shown", [(0, ["5/6", "6/6"]), (1000, [])])
def test_without_a_terminal_an_epoch_says_how_far_it_is(seconds, shown, monkeypatch, capsys):
    class Batches(list):
        order = SimpleNamespace(start=4)

        def __iter__(self):
            return iter(self[4:])

    line = {"train_loss": 1, "train_accuracy": 0.5, "misled": 0.5, "erased_images": 3, "images_seen": 8,
            "train_seconds": 2}
    monkeypatch.setattr(display, "LINES", seconds)
    counts, stage = SimpleNamespace(lately=lambda: line), SimpleNamespace(start=0, end=9)
    assert list(display.show(Batches("abcdef"), 1, stage, counts)) == ["e", "f"]
    text = "  loss 1.000  accuracy 0.500  misled 50.0%  erased 3  4 images/s"
    assert capsys.readouterr().out.splitlines() == [f"epoch 2/9  step {step}{text}" for step in shown]
