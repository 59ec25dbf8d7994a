"""Unlearn in one run what was learnt first, and only where a test says that there is something to unlearn.

    python train.py --heat snapshot                         # asks after each quarter of the epochs
    python train.py --heat snapshot --schedule every:10     # after 10, 20, 30 …
    python train.py --heat snapshot --schedule after:10     # after 10, once

A shortcut is learnt early. So the run trains plainly for a few epochs; then its network's copy, the *snapshot*, is
asked whether it *follows*: whether it says another image's class when the other's few hottest pixels are pasted in,
and does not when as many from a random place are. No label of a shortcut is needed, and no test image. Where it does
not follow, the run goes on as one without Proxy Attention, to the same bits, and is asked again later. Where it does,
each training image's heat is taken once, by the snapshot, kept as a small grid, and moved with the image from there on;
its hottest pixels become noise, and another image's hottest are pasted in, so that what was learnt tells nothing more.

The answers lie in the run's folder, in `snapshot.json`; the snapshot itself in `heat.pt`, its heat in `snapshot.npz`.
"""

import time

import numpy as np
import torch
import torch.optim.swa_utils

import cam
import proxy
from engine import costs, files, predict, ranks
from engine.chance import shuffled, torch_generator
from engine.checkpoint import save_checkpoint
from engine.display import console, progress
from engine.erasing import Scene, of_another_class
from engine.files import UserError
from engine.folder import open_run
from engine.launch import open_network
from engine.loader import prepare
from engine.network import AMP, normalisation, pick_amp
from engine.training import Stage

# A difference of two shares of the same images has a standard deviation of at most 1: so many pairs tell it to within
# 5 points in 95%, whatever it is. A smaller dataset is asked in full.
PAIRS = 1537
# The lower end of the interval has to lie above it. Midway between what faint_digits had with planted squares (0.19 to
# 0.40) and without (-0.01 to 0.05), on seeds 0 to 4 and with snapshots after 5, 10 and 15 of 40 epochs.
THRESHOLD = 0.12


def with_snapshot(config, folder, dataset, split, device, stop, epoch, train):
    """A run under --heat snapshot, from wherever it stands. epoch: epochs in the checkpoint. train: of `train.py`."""
    (kind, every), last = proxy.read_schedule(config["schedule"]), config["epochs"]
    asks = range(every, last, every if kind == "every" else last)
    answers = ranks.from_first(answers_before, folder, epoch, list(asks))

    def stage(**of_stage):
        follows = answers[-1]["follows"] if answers else None
        train(config, folder, dataset, split, open_network(config, folder, dataset), device,
              Stage(end=last, follows=follows, **of_stage), stop)

    for ask_at in asks[len(answers):]:
        if answers and answers[-1]["transplants"]:
            break
        stage(start=0, pause=ask_at)
        answers.append(look(config, folder, dataset, split, device, ask_at, answers))
    if answers[-1]["transplants"]:
        grids = torch.from_numpy(files.read_arrays(folder / "snapshot.npz")["grids"])
        stage(start=answers[-1]["epoch"], grids=grids)  # learning rate and optimizer begin anew
    else:
        stage(start=0)  # as if nothing had been asked


def answers_before(folder, epoch, asks):
    """The answers in `snapshot.json` up to the checkpoint that the run goes on from: the others are asked anew.

    asks: after how many epochs it is asked. Raises UserError where an answer is gone that the run went on with.
    """
    path = folder / "snapshot.json"
    found = [answer for answer in files.read_json(path) if answer["epoch"] <= epoch] if path.exists() else []
    if len(found) < sum(ask < epoch for ask in asks) and not (found and found[-1]["transplants"]):
        raise UserError(f"{path}: lacks an answer that this run went on with. Put it back, or start anew",
                        resumable=False)
    return found


def look(config, folder, dataset, split, device, epoch, before):
    """Ask whether the network in `last.pt` follows; where it does, keep it and its heat of the training images.

    before: the answers so far. Returns this one, as it stands behind them in `snapshot.json`.
    """
    start, energy = time.perf_counter(), costs.Energy(device, first=ranks.LOCAL_RANK == 0)
    ranks.from_first(lambda: None)  # it has written `last.pt`
    model = open_run(folder).network().to(device, memory_format=torch.channels_last).requires_grad_(False)
    explained = Explained(config, dataset, model, device)
    ranks.from_first(explained.settle, split["train"])
    ranks.share_buffers(model)
    answer = ranks.from_first(ask, explained, split)
    grids = heat_of_all(explained, split["train"]) if answer["transplants"] else None
    answer |= {"epoch": epoch, "images": sum(ranks.everyone(explained.passed)),
               "seconds": round(time.perf_counter() - start, 3),
               "energy_wh": costs.added(ranks.everyone(energy.watt_hours()))}
    energy.close()
    costs.release(device)
    answer = ranks.from_first(write, folder, answer, grids, model.state_dict(), before)
    then = "from here on every image is transplanted" if answer["transplants"] else "the run goes on plainly"
    console.print(f"snapshot: {describe(answer)}; {then}", soft_wrap=True)
    return answer


def write(folder, answer, grids, state, before):
    """The snapshot and its heat, then the answer: with that the run goes on, and without it asks again."""
    if grids is not None:
        save_checkpoint(folder / "heat.pt", {"model": state})
        files.write_arrays(folder / "snapshot.npz", {"grids": grids})
    files.write_json(folder / "snapshot.json", [*before, answer])
    return answer


class Explained:
    """Batches of a run's images with their heat by one frozen network: images, labels, logits, grids [B, h, w]."""

    def __init__(self, config, dataset, model, device):
        self.config, self.dataset, self.model, self.device = config, dataset, model, device
        self.mean, self.std = (t.to(device) for t in normalisation(config, model))
        self.amp, self.passed = AMP[pick_amp(config["amp"], device)], 0  # images, through the network
        self.cam = cam.CAM(model, config["cam"], config["layer"])

    def settle(self, ids):
        """Take the statistics of batch norm anew, over some of the images that it trains on, as they are.

        While the learning rate is high the running ones lag behind the weights, and what a network says then is often
        one class. torch's function for averaged weights does it; a network without batch norm stays as it is.
        """
        ids = shuffled(ids, "settle", self.config["seed"])[:PAIRS]
        ids = ids[:max(1, len(ids) // self.config["batch_size"]) * self.config["batch_size"]]  # no small last batch
        batches = self.batches(ids)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            torch.optim.swa_utils.update_bn((prepare(pixels, self.mean, self.std) for pixels, _ in batches), self.model)
        self.passed += len(ids)

    def forward(self, images):
        self.passed += len(images)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.model(images)

    def batches(self, ids, **share):
        return predict.batches_in_order(self.config, self.dataset, ids, self.device, **share)

    def of(self, ids, text, **share):
        score = cam.EXPLAIN[self.config["explain"]]
        with self.cam as explain:
            for pixels, labels in progress(self.batches(ids, **share), text):
                images = prepare(pixels, self.mean, self.std)
                labels, logits = labels.to(self.device), self.forward(images)
                yield images, labels, logits, explain(logits, None, *score(logits, labels))


def heat_of_all(explained, ids):
    """Heat of these images, as they are: float16 [N, h, w], on rank 0; None on others, which take a share each."""
    found = [grids.half() for *_, grids in explained.of(ids, "heat", rank=ranks.RANK, ranks=ranks.RANKS)]
    shares = ranks.to_first(torch.cat(found))
    if shares is None:
        return None
    grids = torch.empty(len(ids), *shares[0].shape[1:], dtype=torch.float16)
    for rank, share in enumerate(shares):
        grids[rank::ranks.RANKS] = share
    return grids.numpy()


def ask(explained, split):
    """How much the network follows, over all and by the class that is pasted in: a dict, for `snapshot.json`.

    transplants: whether the lower end of the interval lies above the threshold, so that few pairs do not decide.
    follows: share of pairs, among those whose donor the network recognises, in which it says the donor's class when
    the donor's hottest pixels are pasted in, less that share when as many from a random place are.
    """
    classes, seed = split["classes"], explained.config["seed"]
    ids, found = shuffled([*split["train"], *split["val"]], "snapshot", seed)[:PAIRS], []
    for number, (images, labels, logits, grids) in enumerate(explained.of(ids, "does it follow?")):
        heat = cam.upsample(grids, images.shape[-2:])
        found.append(pairs(explained, images, labels, logits, heat, (seed, number)))
    donor, known, hot, other = (torch.cat(part).cpu().numpy() for part in zip(*found))
    donor, gain = donor[known], hot[known].astype(np.float64) - other[known]
    by_class = {classes[c]: float(gain[donor == c].mean()) for c in np.unique(donor)}
    low, high = interval(gain)
    return {"follows": float(gain.mean()) if len(gain) else 0.0, "interval": [low, high], "threshold": THRESHOLD,
            "pairs": len(gain), "asked": len(ids), "by_class": by_class, "transplants": low > THRESHOLD}


def interval(gain):
    """95% interval (low, high) of the mean of differences of paired yes and no, each -1, 0 or 1: float [N].

    Agresti and Min 2005: Wald's, as if there were half a pair more of each of the four kinds. It is over pairs, and
    speaks of this network alone.
    """
    up, down, count = float((gain > 0).sum()), float((gain < 0).sum()), len(gain) + 2
    half = 1.96 * (up + down + 1 - (up - down) ** 2 / count) ** 0.5 / count
    return (up - down) / count - half, (up - down) / count + half


def pairs(explained, images, labels, logits, heat, key):
    """What the network says of images [N, 3, H, W] with pixels of another image in them: four tensors [N].

    The donor's class, int64; whether the network recognises the donor, and the pair is one at all; whether it says the
    donor's class when the donor's hottest pixels are pasted in, and when as many from a random place are.
    """
    eraser = proxy.Proxy(explained.config, None, (explained.mean, explained.std))
    every, rows, said = labels >= 0, torch.arange(len(labels), device=labels.device), []
    for control in (None, "random"):
        mask = proxy.pixel_mask(heat, explained.config["area"], control, key)
        scene = Scene(heat, every, rows, images, labels, every, eraser.black, eraser.white,
                      torch_generator(images.device, "follows", *key))  # the same pairs and noise both times
        donors, given = of_another_class(labels, labels, mask.flatten(1).any(1), scene.generator)
        filled = proxy.pasted(proxy.noise(images, mask, scene), images, mask, donors, given)
        said.append(explained.forward(filled).argmax(1) == labels[donors])
    return labels[donors], given & (logits.argmax(1) == labels)[donors], *said


def describe(answer):
    """The answer in one sentence."""
    follows, low, high, threshold = (f"{100 * x:.1f}" for x in (answer["follows"], *answer["interval"],
                                                               answer["threshold"]))
    depends = "depends" if answer["transplants"] else "does not depend"
    return (f"the network after {answer['epoch']} epochs follows {follows} points ({low} to {high}, {answer['pairs']} "
            f"pairs; threshold {threshold}): it {depends} on few pixels")
