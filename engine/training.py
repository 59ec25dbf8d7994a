"""What the loop of `train.py` works with: the parts of the data, the network in training, and its checkpoints."""

import functools
import math
import time
from typing import NamedTuple

import numpy as np
import timm.optim
import torch
import torch.nn.functional as F

import cam
import data
import proxy
from engine import before, cache, checkpoint, costs, files, metrics, predict, ranks, split
from engine.chance import stable_seed
from engine.display import console
from engine.files import UserError
from engine.folder import read_log
from engine.loader import Batches, pixels_of, prepare, sent
from engine.network import AMP, normalisation, pick_amp
from engine.settings import SNAPSHOT

WEIGHT_DECAY = 0.05  # AdamW's, on matrices and kernels only
CLIP = 1.0  # largest norm of the gradient
WARM_UP_SHARE = 0.25  # of the one-cycle schedule: the learning rate rises for a quarter of the steps
SHARE = 0.5  # of a batch, at most, is erased for the next step; steps that train on it at once may erase all
FEWEST_STEPS = 8  # a one-cycle schedule of fewer divides by zero or stays at zero: shorter runs end within this one
CHECKPOINT_SECONDS = 600  # from one checkpoint to the next within an epoch
SKIPS_IN_A_ROW = 10  # steps without a finite gradient that end a run; float16's scaler finds its scale in fewer
START_ANEW = "Start anew with a lower --lr, or without --amp float16"


class Stage(NamedTuple):
    """The epochs that one call of `train` covers. A run has one stage, a staged run several, --heat snapshot two."""

    start: int  # epochs that lie before it
    end: int
    round: int | None = None  # of a staged run
    copies: frozenset = frozenset()  # ids of training images that are erased copies
    pause: int | None = None  # `train` returns after so many epochs, in the middle of the stage's learning rates
    follows: float | None = None  # under --heat snapshot, once it is taken: its answer
    grids: torch.Tensor | None = None  # and its heat of the training images, [N, h, w], if it is to be used

    def notes(self, parts):
        """What a staged run, or --heat snapshot, adds to an epoch's line in the log."""
        if self.round is None:
            return {} if self.follows is None else {"follows": self.follows}
        seen = (parts.split["train"][i] in self.copies for i in parts.batches.order.rows().flat)
        return {"round": self.round, "erased_images": sum(seen)}


class Parts:
    """This process's share of training and validation batches; under --mode resplit dealt out anew at each p."""

    def __init__(self, config, folder, dataset, split, device):
        self.config, self.folder, self.dataset, self.device = config, folder, dataset, device
        self.open(split)

    def open(self, split):
        self.split, config, weights = split, self.config, None
        share = {"rank": ranks.RANK, "ranks": ranks.RANKS}
        if config["reweight"]:
            wrong = set(split["misled"])
            weights = np.array([before.UPWEIGHT if i in wrong else 1 for i in split["train"]])
        self.batches = Batches(self.dataset, split["train"], config["image_size"], config["batch_size"], self.device,
                               cache.decoding_workers(config), seed=config["seed"], weights=weights, **share)
        self.validation = predict.batches_in_order(config, self.dataset, split["val"], self.device, **share)

    def of(self, epoch, first_step):
        """The training batches of an epoch, from a step on."""
        if self.config["mode"] == "resplit":
            rounds = proxy.read_schedule(self.config["schedule"])[1]
            if rounds[epoch]:
                number = sum(rounds[: epoch + 1])
                self.open(split.redraw(self.dataset, self.split, self.config["seed"], number))
                if ranks.RANK == 0:
                    files.write_json(self.folder / "split.json", self.split)
                console.print(f"new split {number}: {metrics.LEAK}", soft_wrap=True)
        self.batches.order.epoch, self.batches.order.start = epoch, first_step
        return self.batches

    def notes(self):
        """What an epoch's line in the log says of the parts."""
        return {"warning": metrics.LEAK} if self.config["mode"] == "resplit" else {}


class Training:
    """What the steps of a stage work with: network, optimizer, learning rate, and Proxy Attention's part.

    model: the network; what a step calls is the model, compiled or shared between processes as the settings have it.
    classes: their number. steps: optimizer steps in all. explained: under --heat RUN the network whose heat it is.
    grids: as in `Stage`.
    """

    def __init__(self, config, model, device, classes, steps, seats=None, explained=None, grids=None):
        self.config, self.model, self.device, self.classes = config, model, device, classes
        self.amp = AMP[pick_amp(config["amp"], device)]
        self.mean, self.std = (t.to(device) for t in normalisation(config, model))
        model.to(device, memory_format=torch.channels_last)
        self.statistics = flattened([b for b in model.buffers() if b.is_floating_point()])
        groups = timm.optim.param_groups_weight_decay(model, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=config["lr"], fused=device.type in ("cpu", "cuda"))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, config["lr"], pct_start=WARM_UP_SHARE,
                                                            total_steps=max(FEWEST_STEPS, steps))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        self.shared = ranks.wrap(model, device)
        self.network = torch.compile(self.shared) if config["compile"] else self.shared
        self.energy = costs.Energy(device, first=ranks.LOCAL_RANK == 0)
        self.skipped, self.row = [], []  # ((epoch, step), bool on the device) since the last `check_finite`; its end
        self.rows = None, None  # an epoch, and the positions of its images
        explain = heat_net = None
        if explained is not None:  # another network is neither trained nor compiled
            explained.to(device, memory_format=torch.channels_last)
            heat_net = functools.partial(self.forward, network=explained)
        if config["cam"] != "none" and config["mode"] != "staged" and config["heat"] != SNAPSHOT:
            compiled = config["compile"] and explained is None
            explain = cam.CAM(model if explained is None else explained, config["cam"], config["layer"], compiled)
        grids = grids if grids is None else grids.to(device)
        self.proxy = proxy.Proxy(config, explain, (self.mean, self.std), seats, heat_net, grids=grids)

    def forward(self, images, network=None):
        """Logits of one forward pass, in mixed precision where the settings have it."""
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            return (self.network if network is None else network)(images)

    def begin_epoch(self, counts):
        self.proxy.counts, self.kept = counts, [flat.clone() for flat in self.statistics]
        self.model.train()

    def prepare(self, pixels, labels, epoch, step, steps):
        """Augmented images and their labels. Order, augmentation and dropout follow from (seed, epoch, step) alone.

        steps: batches of an epoch. Several processes average gradients in the last batch of an optimizer step alone.
        """
        ranks.average(self.shared, self.updates(step, steps))
        key = self.proxy.key = (self.config["seed"], epoch, step)
        torch.manual_seed(stable_seed("step", *key, *[ranks.RANK] * (ranks.RANK > 0)))
        first = ranks.RANK * len(labels)
        place = (first, ranks.RANKS * len(labels))
        if self.proxy.grids is not None:
            if self.rows[0] != epoch:
                self.rows = epoch, self.order.rows()
            rows = sent(torch.from_numpy(self.rows[1][step, first:first + len(labels)]), self.device)
            heat = self.proxy.grids[rows].float()
            self.proxy.heat_of_batch = data.moved(heat, pixels.shape[-1], self.config, key, place)
        return data.augment(pixels, labels, self.mean, self.std, self.classes, self.config, key, place)

    def updates(self, step, steps):
        """Whether the optimizer steps after this batch: every --accumulate-th, and the last of an epoch's `steps`."""
        return (step + 1) % self.config["accumulate"] == 0 or step + 1 == steps

    def backward(self, loss, step, steps):
        """Gradients of one batch, and after every --accumulate-th a step of the optimizer, if they are finite.

        Returns (updated, skipped): whether there was to be a step, and whether it was skipped, a bool on the device.
        """
        every = self.config["accumulate"]
        together = min(every, steps - step // every * every)  # the last ones of an epoch may be fewer
        self.scaler.scale(loss / together).backward()
        if not self.updates(step, steps):
            return False, None
        self.scaler.unscale_(self.optimizer)
        skipped = ~torch.isfinite(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        if self.scaler.is_enabled():  # it checks for itself
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skipped.float()  # torch's own way to have the kernel skip the step
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        for kept, flat in zip(self.kept, self.statistics):  # those of batches go back where the step was skipped: what
            flat.copy_(torch.where(skipped, kept, flat, out=kept))  # is not finite stays for ever
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped.append((self.proxy.key[1:], skipped))
        return True, skipped

    def skips_in_a_row(self):
        """(epoch, step) of the first of SKIPS_IN_A_ROW skipped steps, over all calls, or None; waits for the device."""
        steps, flags = zip(*self.skipped) if self.skipped else ((), ())
        self.skipped = []
        for step, skipped in zip(steps, torch.stack(flags).tolist() if flags else ()):
            self.row = [*self.row, step] if skipped else []
            if len(self.row) == SKIPS_IN_A_ROW:
                return self.row[0]


def flattened(buffers):
    """One vector for each dtype of these tensors, which are views of it from now on: kept or put back all at once."""
    flats = []
    for dtype in dict.fromkeys(b.dtype for b in buffers):
        own = [b for b in buffers if b.dtype == dtype]
        flats.append(torch.cat([b.flatten() for b in own]))
        for b, part in zip(own, flats[-1].split([b.numel() for b in own])):
            b.data = part.view_as(b)
    return flats


def set_up(config, folder, parts, model, device, stage):
    """`Training` for a stage."""
    classes, at_once = len(parts.dataset.classes), config["step"] == "same_step" or config["heat"] is not None
    seats = max(1, int((1 if at_once else SHARE) * parts.batches.order.batch_size))
    explained = None if config["heat"] == SNAPSHOT else before.heat_network(config, classes, folder)
    updates = math.ceil(len(parts.batches) / config["accumulate"])  # of an epoch
    t = Training(config, model, device, classes, (stage.end - stage.start) * updates, seats, explained, stage.grids)
    t.folder, t.made_with, t.order = folder, checkpoint.made_with(config, parts.split), parts.batches.order
    return t


def validate(t, batches):
    """Loss and accuracy on the validation part, each image once over all processes, and the seconds that took."""
    start = time.perf_counter()
    ranks.share_buffers(t.model)
    logits, labels = predict.predict(t.model, batches, t.mean, t.std, t.device, t.amp)
    found = [F.cross_entropy(logits, labels, reduction="sum").item() if len(labels) else 0.0,
             (logits.argmax(1) == labels).sum().item(), len(labels)]
    loss, right, count = map(sum, zip(*ranks.everyone(found)))
    if not math.isfinite(loss):
        raise UserError(f"the validation loss is {loss / count}, for the network's output is not finite. "
                        f"{t.folder}/last.pt holds what came before. {START_ANEW}", resumable=False)
    return {"val_loss": loss / count, "val_accuracy": right / count, "eval_seconds": time.perf_counter() - start}


class Interval:
    """When the next checkpoint within an epoch is due."""

    def __init__(self):
        self.start = time.monotonic()  # a clock that nobody sets back

    def passed(self):
        """Whether it is due; then a new interval begins."""
        if time.monotonic() - self.start < CHECKPOINT_SECONDS:
            return False
        self.start = time.monotonic()
        return True


def check_finite(t, parts):
    """Raise UserError where the last steps had no finite loss or gradient; their images go into `bad-batch.json`."""
    first = t.skips_in_a_row()
    if first is None:
        return
    epoch, step = first
    parts.batches.order.epoch = epoch
    rows = parts.batches.order.rows()[max(0, step + 1 - t.config["accumulate"]):step + 1].ravel()
    names = list(dict.fromkeys(parts.split["train"][i] for i in rows.tolist()))
    path = t.folder / "bad-batch.json"
    if ranks.RANK == 0:
        files.write_json(path, {"epoch": epoch + 1, "step": step + 1, "images": names})
    raise UserError(f"loss or gradient were not finite for {SKIPS_IN_A_ROW} steps in a row, first in epoch {epoch + 1}"
                    f", step {step + 1}, with the images {', '.join(map(repr, names[:3]))} …, all in {path}. None of "
                    f"these steps was taken: {t.folder}/last.pt holds what came before. {START_ANEW}", resumable=False)


def finish_epoch(t, line):
    """Log line, best.pt after the best epoch, last.pt: in this order, so that after a crash the epoch is repeated."""
    if ranks.RANK == 0:
        files.append_line(t.folder / "log.jsonl", line)
        if metrics.best_epoch(read_log(t.folder)) == line["epoch"]:
            checkpoint.save_checkpoint(t.folder / "best.pt", {"epoch": line["epoch"], "model": t.model.state_dict()})
    save_last(t, line["epoch"], 0)


def save_last(t, epoch, step, counts=None):
    """`last.pt`: all that the run goes on with after `epoch` epochs and `step` batches, of all ranks."""
    waiting = None if t.proxy.waiting is None else [ranks.to_first(part) for part in packed(t)]
    counts = None if counts is None else ranks.everyone(counts.so_far())
    if ranks.RANK == 0:
        checkpoint.keep_previous(t.folder / "last.pt", t.folder / "previous.pt")
        checkpoint.save_checkpoint(t.folder / "last.pt", {
            "made_with": t.made_with, "epoch": epoch, "step": step, "model": t.model.state_dict(),
            "optimizer": t.optimizer.state_dict(), "schedule": t.schedule.state_dict(), "scaler": t.scaler.state_dict(),
            "counts": counts, "waiting": waiting and [torch.cat(parts) for parts in waiting]})


def packed(t):
    """The images that wait, for a checkpoint: pixels, uint8, where these give the same bits back on every rank."""
    images = t.proxy.waiting.images
    pixels = pixels_of(images, t.mean, t.std)
    exact = torch.equal(prepare(pixels, t.mean, t.std).view(torch.int32), images.view(torch.int32))
    return t.proxy.waiting._replace(images=pixels if all(ranks.everyone(exact)) else images)


def load_last(t, stage):
    """Restore `last.pt` where there is one; at the start of a later stage its weights alone.

    Returns the finished epochs, the batches after them, and the epoch's `Counts` so far or None.
    """
    path = t.folder / "last.pt"
    state = checkpoint.load_checkpoint(path) if path.exists() else None
    if ranks.RANK == 0:
        files.cut_lines(t.folder / "log.jsonl", state["epoch"] if state else 0)  # what follows happens again
    if state is None:
        return 0, 0, None
    t.model.load_state_dict(state["model"])
    if (state["epoch"], state["step"]) == (stage.start, 0):
        return state["epoch"], 0, None
    t.optimizer.load_state_dict(state["optimizer"])
    t.schedule.load_state_dict(state["schedule"])
    if bool(state["scaler"]) != t.scaler.is_enabled():  # of a run whose config.json says amp auto, as older ones do
        kind = "in float16" if state["scaler"] else "but not in float16"
        raise UserError(f"{path}: began in mixed precision, {kind}, as its GPU had it; go on with a GPU of that kind",
                        resumable=False)
    t.scaler.load_state_dict(state["scaler"])
    if state["waiting"] is not None:  # there may be another number of processes now
        own = proxy.Waiting(*(part.tensor_split(ranks.RANKS)[ranks.RANK].to(t.device) for part in state["waiting"]))
        pixels = own.images.dtype == torch.uint8
        t.proxy.waiting = own._replace(images=prepare(own.images, t.mean, t.std)) if pixels else own
    every, counts = state["counts"], None
    if every is not None:
        if len(every) != ranks.RANKS:
            every = [costs.merged(every)] + [None] * (ranks.RANKS - 1)
        counts = costs.Counts(t.device, t.energy, every[ranks.RANK])
    return state["epoch"], state["step"], counts
