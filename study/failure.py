"""Learning from Failure (Nam et al. 2020), to compare with: trained with the settings and split of finished runs.

    python -m study.failure runs/NAME … > failure.csv       # a row a run: accuracies in percent

Two networks see the same batches. One, the biased, learns by generalised cross-entropy mostly from what it gets right
already, and so a shortcut; the other weighs each image by how much harder it is for the biased one. It finds what
contradicts a shortcut where some training images do: not where all agree with it. Settings are those of the authors'
program. Nothing is written but the rows, and a run that is interrupted begins again.
"""

import csv
import sys

import torch
import torch.nn.functional as F

import data
from engine import before, cache, chance, costs, folder, metrics, network, predict
from engine.files import UserError
from engine.options import Parser, program
from engine.training import Parts, Stage, set_up

Q = 0.7  # of the generalised cross-entropy
DECAY = 0.7  # of an image's loss, from one epoch to the next


class Losses:
    """A moving mean of each training image's loss, as a share of the largest of its class. labels: int64 [N]."""

    def __init__(self, labels, classes):
        self.labels, self.classes = labels, classes
        self.values = torch.full(labels.shape, torch.nan, device=labels.device)

    def update(self, rows, losses):
        """Take in the losses of these images, [B], and return their shares, [B]. rows: int64 [B]."""
        old = self.values[rows]
        self.values[rows] = torch.where(old.isnan(), losses, DECAY * old + (1 - DECAY) * losses)
        largest = self.values.new_zeros(self.classes).scatter_reduce(0, self.labels, self.values.nan_to_num(), "amax")
        return self.values[rows] / largest[self.labels[rows]].clamp(min=1e-12)


def losses_of(biased, other, labels, rows, of_biased, of_other):
    """The loss of each network, from its logits [B, C]: section 3 of the paper. of_biased, of_other: `Losses`."""
    hard, entropy = F.cross_entropy(biased, labels, reduction="none"), F.cross_entropy(other, labels, reduction="none")
    easy, own = of_biased.update(rows, hard.detach()), of_other.update(rows, entropy.detach())
    weights = easy / (easy + own + 1e-8)
    return ((1 - (-hard).exp() ** Q) / Q).mean(), (weights * entropy).mean()


def learn(run, device):
    """Train both networks. run: `folder.Run`. Returns {part: accuracy} of the one that is to be used, for each part
    of `metrics.PREDICTED` that the run has.

    Raises UserError where images are mixed, for then an image has no loss of its own.
    """
    config, dataset = run.config | {"cam": "none", "heat": None, "mode": "online", "reweight": None}, run.dataset()
    if mixed := {"cutmix", "mixup"} & set(data.read_augment(config["augment"])[1]):
        raise UserError(f"{run.folder}: --augment {mixed.pop()} mixes images; name a run without")
    if dataset.pixels is None:
        cache.open_pixels(dataset, config, build=False)
    parts, epochs = Parts(config, run.folder, dataset, run.split, device), config["epochs"]
    seeds = config["seed"], chance.stable_seed("biased", config["seed"])
    models = [before.first_network(config | {"seed": seed % 2**31}, dataset.classes)[0] for seed in seeds]
    other, biased = both = [set_up(config, run.folder, parts, model, device, Stage(0, epochs)) for model in models]
    seen = [Losses(parts.batches.labels.to(device), len(dataset.classes)) for _ in both]
    for epoch in range(epochs):
        batches = parts.of(epoch, 0)
        for each in both:
            each.begin_epoch(costs.Counts(device, each.energy))
        for step, ((pixels, labels), rows) in enumerate(zip(batches, batches.order.rows())):
            images, labels = other.prepare(pixels, labels, epoch, step, len(batches))
            biased.proxy.key = other.proxy.key
            logits = [each.forward(images).float() for each in (biased, other)]
            found = losses_of(*logits, labels, torch.from_numpy(rows).to(device), *seen)
            for each, loss in zip((biased, other), found):
                each.backward(loss, step, len(batches))
    for each in both:
        each.energy.close()
    found = predict.predictions(config, other.model, dataset, run.split, device)
    return {part: (found[f"{part}_logits"].argmax(1) == found[f"{part}_labels"]).mean()
            for part in metrics.PREDICTED if f"{part}_logits" in found}


@program("study.failure")
def main(arguments):
    """The command line."""
    parser = Parser(prog="study.failure", description="Learning from Failure, with the settings of finished runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    paths, rows = parser.parse(arguments)["runs"], csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["run", "val %", "test %", "clean test %"])
    for path in paths:
        run = folder.open_finished(path)
        found = learn(run, network.pick_device(run.config["device"]))
        rows.writerow([path, *(f"{100 * share:.2f}" for share in found.values())])
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
