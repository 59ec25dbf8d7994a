"""study/failure.py: Learning from Failure, a way to compare with."""

import csv

import pytest
import torch
import torch.nn.functional as F

from study import failure


def test_easy_images_teach_the_biased_network_and_hard_ones_the_other():
    torch.manual_seed(0)
    labels, rows = torch.randint(3, (12,)), torch.tensor([3, 7, 1, 8])
    biased, other = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    seen = [failure.Losses(labels, 3) for _ in range(2)]
    seen[0].values[7], seen[0].values[0] = 2.0, 9.0
    easy, hard = failure.losses_of(biased, other, labels[rows], rows, *seen)
    (easy + hard).backward()

    right = labels[rows]
    p = biased.softmax(1)[range(4), right].detach()
    entropy = F.cross_entropy(biased, right, reduction="none")
    expected, = torch.autograd.grad((entropy * p ** 0.7).mean(), biased, retain_graph=True)
    torch.testing.assert_close(biased.grad, expected)  # their equation: the gradient of cross-entropy, times p ** q

    of_biased, of_other = entropy.tolist(), F.cross_entropy(other, right, reduction="none").tolist()
    of_biased[1] = 0.7 * 2.0 + 0.3 * of_biased[1]
    share = []
    for losses, rest in ((of_biased, {0: 9.0}), (of_other, {})):  # each by the largest of its class so far
        known = {**rest, **dict(zip(rows.tolist(), losses))}
        share.append([loss / max(known[i] for i in known if labels[i] == c) for loss, c in zip(losses, right)])
    weights = torch.tensor([a / (a + b) for a, b in zip(*share)])
    torch.testing.assert_close(hard, (weights * F.cross_entropy(other, right, reduction="none")).mean())


@pytest.mark.slow
def test_it_trains_with_a_runs_settings_and_says_how_good_the_network_is(trained, capsys):
    run = trained("--dataset", "faint_digits", "--cam", "none", "--decoy", "0.9", epochs=3)
    capsys.readouterr()
    assert failure.main([str(run)]) == 0
    first = capsys.readouterr().out
    row, = csv.DictReader(first.splitlines())
    assert row["run"] == str(run) and 10 < float(row["val %"]) <= 100 and 0 < float(row["clean test %"]) <= 100
    assert failure.main([str(run)]) == 0 and capsys.readouterr().out == first
    assert failure.main([str(run / "nothing")]) == 2
    mixed = trained("--cam", "none", "--augment", "light,cutmix:1", "--train-fraction", "0.1", epochs=1)
    assert failure.main([str(mixed)]) == 2 and "name a run without" in capsys.readouterr().err
