"""Train an image classifier with Proxy Attention: erase what misled it, and train on what is left.

    python train.py                                                # scikit-learn's digits, a small residual network
    python train.py --dataset asl --model vit_small --cam gradcam++
    python train.py --dataset folder --data-dir DIR                # any folder of class folders
    python train.py --cam none                                     # the same run without Proxy Attention
    python train.py --mode staged --rounds 3                       # erase between trainings, and keep the erased images on disk
    python train.py --dry-run --show                               # settings, split, network, and a sheet of every fill and control
    python train.py --resume runs/NAME                             # go on with an interrupted run
    python train.py --experiment demo --jobs 2                     # the runs of an experiment that are not finished yet
    torchrun --nproc-per-node 4 train.py --dataset places          # on several GPUs, or CPUs

Each step of `train` below is one forward and one backward pass over a batch of one fixed size. Where the network got a fresh
image wrong, a class activation map taken from that same forward pass shows the pixels that misled it; a copy with these
pixels erased takes a seat in the next batch. `staged`, further down, is the method as it was first proposed: train, then erase what
misled the trained network, then train again. Settings come from `configs.json`; each is an option here (`--help`).
"""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

import numpy as np
import timm.layers
import timm.optim
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

import cache
import cam
import data
import distributed
import eval as evaluation
import experiment
import proxy
import run
from data import UserError

WARM_UP_SHARE = 0.25  # of the one-cycle schedule: the learning rate rises for a quarter of the steps
FEWEST_STEPS = 8  # a one-cycle schedule of fewer steps divides by zero or stays at zero: shorter runs end within this one
SKIPS_IN_A_ROW = 10  # optimizer steps whose gradient is not finite, after which a run ends; float16's scaler finds its scale in fewer
START_ANEW = "Start anew with a lower --lr, or without --amp float16"
DISPLAY_SECONDS = 0.5  # the display asks the device for its counts this often; nothing else waits for it


class Stage(NamedTuple):
    """The epochs that one call of `train` covers. A run has one stage, a staged run several."""

    start: int  # epochs that lie before it
    end: int
    round: int = 0
    copies: frozenset = frozenset()  # ids of training images that are erased copies


def train(config, folder, dataset, split, model, device, stage, stop):
    """The loop: from the last checkpoint in `folder`, if there is one, to the end of the stage, or until a signal stops it."""
    batches, validation = open_batches(config, dataset, split, device)
    t = set_up(config, model, device, len(dataset.classes), (stage.end - stage.start) * batches_to_steps(config, batches),
               run.heat_network(config, len(dataset.classes), folder))
    t.made_with = run.made_with(config, split)
    first_epoch, first_step, waiting, counts = load_last(folder, stage, t)
    accuracies = [line["val_accuracy"] for line in run.read_log(folder)][:first_epoch]
    place = (distributed.RANK * batches.order.batch_size, distributed.RANKS * batches.order.batch_size)
    seats = max(1, int((1 if config["same_step"] else config["share"]) * batches.order.batch_size))

    due = Interval(config["checkpoint_every"])
    stop.within_steps = True
    for epoch in range(first_epoch, stage.end):
        if round_ := new_split_at(config, epoch):
            split = draw_new_split(config, folder, dataset, split, round_)
            batches, validation = open_batches(config, dataset, split, device)
        t.begin_epoch(epoch)
        batches.order.epoch, batches.order.start = epoch, first_step
        erasing = t.explain is not None and proxy.is_on(config["schedule"], epoch, accuracies, config["warmup"])
        another = t.explained if erasing else None  # the network that the first pass goes through in place of the one in training
        settings = config | {"area": proxy.grown(config["area"], config["grow"], epoch - config["warmup"])}
        counts = counts or Counts(device, t.energy)
        for step, (pixels, labels) in enumerate(show(batches, epoch, stage, counts), first_step):
            # Order, augmentation and dropout follow from (seed, epoch, step) alone, whatever was drawn before.
            key = (config["seed"], epoch, step)
            torch.manual_seed(data.stable_seed("step", *key, *[distributed.RANK] * (distributed.RANK > 0)))
            images = data.augment(pixels, t.mean, t.std, config, key, place)
            images, labels = data.mix(images, labels, len(dataset.classes), config, key)
            fresh = torch.ones(len(labels), dtype=torch.bool, device=device)
            if waiting is not None:
                images, labels, fresh = proxy.seat(images, labels, waiting, config["budget"])
                waiting = None

            with t.explain if erasing else contextlib.nullcontext():
                logits, loss = forward(t.network if another is None else another, images, labels, t.amp)
                if another is None:
                    counts.look(logits, labels, fresh)
                if erasing:
                    with counts.timing_cam():
                        rows, chosen = proxy.select(config["select"], logits, labels, fresh, seats, key, config["subset"],
                                                    config["control"])
                        waiting, *_ = proxy.erased_copies(settings, t.explain, images, labels, logits, fresh, rows, chosen,
                                                          (t.mean, t.std), key)
            if erasing and config["same_step"]:
                said = logits.detach()[rows] if config["consistency"] else None
                del logits, loss  # the first pass was for the heat alone
                images, labels, fresh = proxy.join(images, labels, rows, waiting, config["budget"])
                logits, loss = forward(t.network, images, labels, t.amp)
                if another is not None:
                    counts.look(logits, labels, torch.ones_like(fresh))  # it sees these images only as it trains on them
                if config["consistency"]:
                    loss = loss + config["consistency"] * proxy.disagreement(said, logits, rows, waiting.taken, config["budget"])
                counts.second_pass_images += len(labels)
                waiting = None

            whole, bad = t.backward(loss, step, len(batches))
            counts.add(loss, fresh, whole, bad)
            if whole:
                if (first_bad := t.skips.found(bad, epoch * len(batches) + step)) is not None:
                    raise not_finite(config, folder, split, batches, first_bad)
                number, save = stop.asked(due.passed())
                if number or save:
                    save_last(folder, t, epoch, step + 1, waiting, counts)
                if number:
                    raise distributed.Stopped(number)

        line = {"epoch": epoch + 1, "lr": t.schedule.get_last_lr()[0], **counts.totals(distributed.everyone),
                **validate(t, validation), **memory(device)}
        if not math.isfinite(line["val_loss"]):
            raise UserError(f"epoch {epoch + 1}: the validation loss is {line['val_loss']}, for the network's output is not finite. "
                            f"{folder}/last.pt holds what came before. {START_ANEW}", resumable=False)
        if config["mode"] == "staged":
            line |= {"round": stage.round, "erased_images": sum(split["train"][i] in stage.copies for i in batches.seen())}
        if config["protocol"] == "resplit":
            line["warning"] = evaluation.LEAK
        first_step, counts = 0, None
        finish_epoch(folder, line, waiting, t)
        accuracies.append(line["val_accuracy"])
        print_epoch(line, stage)
    t.energy.close()
    stop.leave_steps()


class Training:
    """What the steps of a stage work with: network, optimizer, learning rate, and the heat.

    model: the network itself; network: what a step calls, which is the model, compiled or shared between processes as the settings say.
    explained: under --heat-from the network that gives the heat, as `run.heat_network` opens it, or None.
    """

    def __init__(self, config, model, device, classes, steps, explained=None):
        self.config, self.model, self.device = config, model, device
        self.amp = run.pick_amp(config["amp"], device)
        self.mean, self.std = (t.to(device) for t in run.normalisation(config, model))
        self.head = run.head_names(config, model, classes) if config["freeze"] else {}
        model.to(device, memory_format=torch.channels_last)
        groups = parameter_groups(config, model)
        self.optimizer = torch.optim.AdamW(groups, lr=config["lr"], fused=device.type in ("cpu", "cuda"))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [config["lr"] * group.get("lr_scale", 1) for group in groups], pct_start=WARM_UP_SHARE,
            total_steps=max(FEWEST_STEPS, steps))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        erases = config["cam"] != "none" and config["mode"] == "online"
        self.explain = self.network = self.frozen = None
        self.explained = explained and explained.to(device, memory_format=torch.channels_last)
        self.energy = run.Energy(device, first=distributed.LOCAL_RANK == 0)
        self.skips, self.made_with = Skips(device), None
        self.statistics = [b for b in model.buffers() if b.is_floating_point()]
        if erases:
            own = explained is None  # another network is neither checkpointed nor compiled
            layer = inner_layers(model, config["layer"]) if config["checkpointing"] and own else config["layer"]
            self.explain = cam.CAM(model if own else explained, config["cam"], layer, config["smooth"], compiled=config["compile"] and own)

    def begin_epoch(self, epoch):
        """Training mode; while --freeze lasts only for the head, the rest keeping also its batch statistics."""
        self.kept = flat(self.statistics)
        frozen = epoch < self.config["freeze"]
        if frozen is not self.frozen:
            self.frozen = frozen
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(not frozen or name in self.head)
            self.network = distributed.wrap(self.model, self.device)
            if self.config["compile"]:
                self.network = torch.compile(self.network)
        self.model.train(not frozen)

    def backward(self, loss, step, steps):
        """Gradients of one batch, and after every --accumulate-th the optimizer's step, which is skipped where they are not finite.

        Returns whether there was to be a step, and whether it was skipped, a bool on the device.
        """
        every = self.config["accumulate"]
        together = min(every, steps - step // every * every)  # the last ones of an epoch may be fewer
        whole = (step + 1) % every == 0 or step + 1 == steps
        with contextlib.nullcontext() if whole or distributed.RANKS == 1 else self.network.no_sync():
            self.scaler.scale(loss / together).backward()
        if not whole:
            return False, None
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config["clip"])
        bad = ~torch.isfinite(norm)
        if self.scaler.is_enabled():  # it looks for itself
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = bad.float()  # torch's own way to have the kernel skip the step, as its scaler does
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.keep_finite(bad)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True, bad

    def keep_finite(self, bad):
        """Put batch statistics back where the step was skipped: what is not finite in them would stay so for ever."""
        if self.statistics:
            self.kept = torch.where(bad, self.kept, flat(self.statistics))
            parts = self.kept.split([b.numel() for b in self.statistics])
            torch._foreach_copy_(self.statistics, [part.view_as(b) for part, b in zip(parts, self.statistics)])


def flat(tensors):
    """Tensors of one dtype as one vector, or None."""
    return torch.cat([t.flatten() for t in tensors]) if tensors else None


class Skips:
    """Optimizer steps in a row that were skipped, counted on the device and looked at without waiting for it."""

    def __init__(self, device):
        self.state = torch.zeros(2, dtype=torch.long, device=device)  # how many in a row, and the number of the first of them
        self.steps, self.copied = 0, None

    def found(self, bad, number):
        """Count a step, whether `bad` or not. Returns the number of the first of SKIPS_IN_A_ROW bad ones, or None.

        On a GPU the answer comes up to twice as many steps late, at the same step on every rank.
        """
        first = torch.where(self.state[0] > 0, self.state[1], number)
        self.state = torch.stack([(self.state[0] + 1) * bad, first])
        self.steps += 1
        if self.state.device.type == "cpu":
            seen = self.state
        elif self.steps % SKIPS_IN_A_ROW:
            return None
        else:
            seen, self.copied = self.copied, self._copy()
            if seen is None:
                return None
            seen[1].synchronize()
            seen = seen[0]
        many, first = seen.tolist()
        return first if many >= SKIPS_IN_A_ROW else None

    def _copy(self):
        host = torch.empty(2, dtype=torch.long, pin_memory=True).copy_(self.state, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event


def not_finite(config, folder, split, batches, number):
    """The error for a loss that stays infinite or not a number, first in batch `number` of all epochs; its images go into a file."""
    epoch, step = divmod(number, len(batches))
    batches.order.epoch = epoch
    rows = batches.order.rows()[max(0, step + 1 - config["accumulate"]):step + 1].ravel()
    names = list(dict.fromkeys(split["train"][i] for i in rows.tolist()))
    if distributed.RANK == 0:
        run.write_json(folder / "bad-batch.json", {"epoch": epoch + 1, "step": step + 1, "images": names})
    return UserError(f"loss or gradient were not finite for {SKIPS_IN_A_ROW} steps in a row, first in epoch {epoch + 1}, step {step + 1}, with the images "
                     f"{', '.join(map(json.dumps, names[:3]))} and {max(0, len(names) - 3)} more, all in {folder}/bad-batch.json. None of these steps "
                     f"was taken: {folder}/last.pt holds what came before. {START_ANEW}", resumable=False)


class Interval:
    """When the next checkpoint is due: --checkpoint-every so many optimizer steps, or minutes."""

    def __init__(self, text):
        self.number, self.minutes = run.read_interval(text)
        self.steps, self.start = 0, time.monotonic()  # a clock that nobody sets back

    def passed(self):
        """Count a step; whether it is time, and then a new interval begins."""
        self.steps += 1
        if (time.monotonic() - self.start) / 60 < self.number if self.minutes else self.steps < self.number:
            return False
        self.steps, self.start = 0, time.monotonic()
        return True


def inner_layers(model, names):
    """The last parts of the named layers, which give the same output: under checkpointing timm calls a stage's parts, not the stage."""
    found = []
    for name in names.split(",") if names else []:
        while isinstance(module := model.get_submodule(name.strip()), torch.nn.Sequential) and len(module):
            name = f"{name.strip()}.{list(module._modules)[-1]}"
        found.append(name)
    return ",".join(found) or None


def set_up(config, model, device, classes, steps, explained=None):
    """`Training`, after the switches that are torch's own and not the network's."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = not config["deterministic"]
    if config["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config["deterministic"])
    if config["checkpointing"]:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise UserError(f"--checkpointing: timm does not offer it for {config['model']}; leave it out") from None
    if config["sync_bn"] and distributed.RANKS > 1:
        if device.type != "cuda":
            raise UserError("--sync-bn: torch has it for GPUs alone; leave it out")
        timm.layers.convert_sync_batchnorm(model)
    return Training(config, model, device, classes, steps, explained)


def parameter_groups(config, model):
    """Parameters for AdamW: no decay of norms and biases, and under --layer-decay each layer at its own pace."""
    if config["layer_decay"] < 1:
        return timm.optim.param_groups_layer_decay(model, config["weight_decay"], layer_decay=config["layer_decay"])
    return timm.optim.param_groups_weight_decay(model, config["weight_decay"])


def batches_to_steps(config, batches):
    """Optimizer steps of an epoch."""
    return -(-len(batches) // config["accumulate"])


def forward(model, images, labels, amp):
    """Logits and loss of one forward pass. labels: classes, or under mixup and cutmix shares of classes."""
    with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
        logits = model(images)
        return logits, F.cross_entropy(logits, labels)


def open_batches(config, dataset, split, device):
    """This process's share of the training batches, shuffled, and of the validation batches, in order."""
    ranks, weights = {"rank": distributed.RANK, "ranks": distributed.RANKS}, None
    if config["reweight"]:
        wrong = set(split["misled"])
        weights = np.array([config["upweight"] if i in wrong else 1 for i in split["train"]])
    training = data.Batches(dataset, split["train"], config["image_size"], config["batch_size"], device,
                            evaluation.decoding_workers(config), seed=config["seed"], weights=weights, **ranks)
    return training, evaluation.batches_in_order(config, dataset, split["val"], device, **ranks)


def validate(t, batches):
    """Loss and accuracy on the validation part, each image once over all processes, and the seconds that took."""
    start = time.perf_counter()
    distributed.share_buffers(t.model)
    logits, labels = evaluation.predict(t.model, batches, t.mean, t.std, t.device, t.amp)
    found = [F.cross_entropy(logits, labels, reduction="sum").item() if len(labels) else 0.0,
             (logits.argmax(1) == labels).sum().item(), len(labels)]
    loss, right, count = map(sum, zip(*distributed.everyone(found)))
    return {"val_loss": loss / count, "val_accuracy": right / count, "eval_seconds": time.perf_counter() - start}


class Counts:
    """What an epoch adds up to. It is summed on the device, which is asked for it at the display's pace and at the end."""

    ADDED = ("loss", "fresh", "wrong", "erased_images", "skipped_steps", "images_seen", "second_pass_images", "energy_wh")  # over all processes
    SHARED = ("optimizer_steps", "train_seconds", "cam_seconds")  # these pass for all at the same time

    def __init__(self, device, energy, before=None):
        """energy: `run.Energy`. before: what `raw` gave of the same epoch, in a process that was stopped."""
        self.energy, self.energy_start = energy, energy.watt_hours() or 0.0
        self.device, self.before = device, dict.fromkeys((*self.ADDED, *self.SHARED), 0) | (before or {})
        # Loss times images, fresh images, those misled, erased images, and on rank 0 skipped steps, which are skipped on all; what is there
        # is added to as if nothing had come between.
        self.sums = torch.tensor([float(self.before.pop(key)) for key in self.ADDED[:5]], device=device)
        self.images, self.second_pass_images, self.steps, self.start = 0, 0, 0, time.perf_counter()
        self.cam_seconds, self.cam_events = 0.0, []

    def look(self, logits, labels, fresh):
        """What the network says of the images that come as they are."""
        self.sums[1:3] += torch.stack([fresh.sum(), (proxy.wrong(logits.detach(), labels) & fresh).sum()])

    def add(self, loss, fresh, whole, bad):
        """The images that a batch trained on; whole: it ended with an optimizer step; bad: which was skipped. A loss that is not finite adds 0."""
        self.sums[:4:3] += torch.stack([loss.detach().nan_to_num(0, 0, 0) * len(fresh), (~fresh).sum()])
        if whole and distributed.RANK == 0:
            self.sums[4] += bad
        self.images, self.steps = self.images + len(fresh), self.steps + whole

    @contextlib.contextmanager
    def timing_cam(self):
        """Time a block: on a GPU with events that nothing waits for."""
        if self.device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            self.cam_events.append(events)
        else:
            start = time.perf_counter()
            yield
            self.cam_seconds += time.perf_counter() - start

    def raw(self, everyone=lambda value: [value]):
        """The numbers so far, of this process or of `everyone`; waits for the device."""
        sums = self.sums.tolist()
        cam_seconds = self.cam_seconds + sum(start.elapsed_time(end) for start, end in self.cam_events) / 1000
        energy = (self.energy.watt_hours() or 0.0) - self.energy_start
        own = [*sums, self.images, self.second_pass_images, energy, self.steps, time.perf_counter() - self.start, cam_seconds]
        own = {key: self.before.get(key, 0) + value for key, value in zip((*self.ADDED, *self.SHARED), own)}
        return merge_counts(everyone(own))

    def totals(self, everyone=lambda value: [value]):
        """The epoch's share of a line of `log.jsonl`."""
        raw = self.raw(everyone)
        loss, fresh, wrong = (raw.pop(key) for key in ("loss", "fresh", "wrong"))
        raw |= {key: int(raw[key]) for key in ("erased_images", "skipped_steps")}
        raw["energy_wh"] = raw["energy_wh"] if self.energy.source else None
        return {"train_loss": loss / max(raw["images_seen"], 1), "train_accuracy": 1 - wrong / max(fresh, 1),
                "misled": wrong / max(fresh, 1), **raw}


def merge_counts(ranks):
    """What several processes counted, as one."""
    return {key: (sum if key in Counts.ADDED else max)(each[key] for each in ranks) for key in ranks[0]}


def memory(device):
    """Peak memory so far and memory held now in MB (2^20 bytes): of a process, and of its GPU where it has one; of
    several processes the largest."""
    host = None
    if resource:
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    gpu = device.type == "cuda"
    own = {"peak_gpu_allocated_mb": round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if gpu else None,
           "peak_gpu_reserved_mb": round(torch.cuda.max_memory_reserved(device) / 2**20, 1) if gpu else None,
           "peak_host_mb": host, "held_mb": run.held_mb(device)}
    return {key: max((each[key] for each in distributed.everyone(own) if each[key] is not None), default=None) for key in own}


# --- checkpoints ---------------------------------------------------------------------------------------------------


def finish_epoch(folder, line, waiting, t):
    """Log line, best.pt if this was the best epoch, last.pt: in this order, so that a crash in between repeats the epoch."""
    if distributed.RANK == 0:
        run.append_line(folder / "log.jsonl", line)
        if evaluation.best_epoch(run.read_log(folder)) == line["epoch"]:
            run.save_checkpoint(folder / "best.pt", {"epoch": line["epoch"], "model": t.model.state_dict()})
    save_last(folder, t, line["epoch"], 0, waiting)


def save_last(folder, t, epoch, step, waiting, counts=None):
    """`last.pt`: all that the run goes on with after `epoch` whole epochs and `step` batches. Of all ranks, with what waits on each."""
    waiting = distributed.everyone(None if waiting is None else [part.cpu() for part in waiting])
    counts = None if counts is None else distributed.everyone(counts.raw())
    if distributed.RANK == 0:
        waiting = [part for part in waiting if part is not None]
        run.keep_previous(folder / "last.pt", folder / "previous.pt")
        run.save_checkpoint(folder / "last.pt", {
            "made_with": t.made_with, "epoch": epoch, "step": step, "model": t.model.state_dict(), "optimizer": t.optimizer.state_dict(),
            "schedule": t.schedule.state_dict(), "scaler": t.scaler.state_dict(), "counts": counts,
            "waiting": [torch.cat(parts) for parts in zip(*waiting)] if waiting else None})


def load_last(folder, stage, t):
    """Restore `last.pt` where there is one; at the start of a later stage its weights alone.

    Returns the finished epochs, the batches after them, the images that wait for this process, and the epoch's counts so far or None.
    """
    if not (folder / "last.pt").exists():
        if distributed.RANK == 0:
            run.cut_log(folder, 0)
        return 0, 0, None, None
    state = run.load_checkpoint(folder / "last.pt", t.device)
    if distributed.RANK == 0:
        run.cut_log(folder, state["epoch"])
    t.model.load_state_dict(state["model"])
    if (state["epoch"], state["step"]) == (stage.start, 0):
        return state["epoch"], 0, None, None
    t.optimizer.load_state_dict(state["optimizer"])
    t.schedule.load_state_dict(state["schedule"])
    t.scaler.load_state_dict(state["scaler"])
    waiting, counts = state["waiting"], None
    if waiting is not None:  # there may be another number of processes now
        waiting = proxy.Waiting(*(part.tensor_split(distributed.RANKS)[distributed.RANK] for part in waiting))
    if state["counts"] is not None:
        every = state["counts"]
        if len(every) != distributed.RANKS:
            every = [merge_counts(every)] + [None] * (distributed.RANKS - 1)
        counts = Counts(t.device, t.energy, every[distributed.RANK])
    return state["epoch"], state["step"], waiting, counts


# --- the published protocol ----------------------------------------------------------------------------------------


def new_split_at(config, epoch):
    """The number of the split that this epoch begins with: under --protocol resplit how many p of the schedule there were; else 0."""
    if config["protocol"] == "fixed" or config["mode"] == "staged":
        return 0
    _, rounds = proxy.read_schedule(config["schedule"])
    return sum(rounds[: epoch + 1]) if rounds[epoch] else 0


def draw_new_split(config, folder, dataset, split, number):
    """Training and validation images dealt out anew, in memory and in the run's folder."""
    split = data.redraw(dataset, split, config["seed"], number)
    if distributed.RANK == 0:
        run.write_json(folder / "split.json", split)
    console.print(f"new split {number}: {evaluation.LEAK}", soft_wrap=True)
    return split


# --- the staged pipeline -------------------------------------------------------------------------------------------


def staged(config, folder, dataset, split, device, stop, epoch):
    """The method as first proposed: stage 1 trains; each round then erases what misled the saved network, and trains again.

    Each stage opens what the one before saved, and what it held is released at its end. A stage that is in `stages.jsonl` is done.
    epoch: whole epochs in the checkpoint; where it was damaged and the one before it is used, stages after that happen again.
    """
    ends = list(itertools.accumulate(run.stage_epochs(config)))
    lines = run.read_lines(folder / "stages.jsonl")
    kept = list(itertools.takewhile(lambda line: [0, *ends][line["round"] + (line["stage"] in (1, 3))] <= epoch, lines))
    run.cut_lines(folder / "stages.jsonl", len(kept))
    for round_, start in enumerate(ends, 1):
        if start > epoch:
            shutil.rmtree(folder / "erased" / f"round-{round_}", ignore_errors=True)
    done = {(line["round"], line["stage"]) for line in kept}
    for round_, (start, end) in enumerate(zip([0, *ends], ends)):
        stage = Stage(start, end, round_)
        if round_ == 0:
            if (0, 1) not in done:
                run_stage(folder, device, round_, 1, train_stage, config, folder, dataset, split, device, stage, stop)
            continue
        accuracy, target = run.read_log(folder)[start - 1]["val_accuracy"], config["target_accuracy"]
        if target is not None and accuracy >= target:
            return say_end(folder, done, round_, f"validation accuracy {accuracy:.4f} reaches the target {target:g}")
        if config["protocol"] == "resplit":
            split = draw_new_split(config, folder, dataset, split, round_)
        if (round_, 2) not in done:
            run_stage(folder, device, round_, 2, erase_stage, config, folder, dataset, split, device, round_)
        erased = run.ErasedRound(folder, round_, config["format"])
        found = erased.rows()
        if not found:
            return say_end(folder, done, round_, f"the heat of all {erased.selected} selected images is zero" if erased.selected
                           else "no training image is misled" if config["select"] == "misled" else "no training image is selected")
        if (round_, 3) not in done:
            sources, files = [row["source"] for row in found], [str(folder / row["file"]) for row in found]
            joined, ids, copies = data.with_erased(dataset, split["train"], sources, files, config["budget"])
            run_stage(folder, device, round_, 3, train_stage, config, folder, joined, {**split, "train": ids}, device,
                      stage._replace(copies=frozenset(copies)), stop)
    say_end(folder, done, len(ends) - 1, "all rounds are done")


def run_stage(folder, device, round_, number, work, *arguments):
    """Call a stage, let go of all it held, and record it in `stages.jsonl` with the memory before and after."""
    start, energy = time.perf_counter(), run.Energy(device)
    line = {"round": round_, "stage": number, **work(*arguments), "seconds": round(time.perf_counter() - start, 3),
            "energy_wh": energy.watt_hours()}
    energy.close()
    run.release(device)
    line["left_mb"] = run.held_mb(device)
    run.append_line(folder / "stages.jsonl", line)
    erased = f"{line['erased_images']} of {line['images']} training images erased, " if number == 2 else ""
    console.print(f"round {round_}, stage {number}: {erased}{line['seconds']:.1f} s, memory held {line['held_mb']} MB, after "
                  f"{line['left_mb']} MB", soft_wrap=True)


def say_end(folder, done, round_, reason):
    if (round_, None) not in done:
        run.append_line(folder / "stages.jsonl", {"round": round_, "stage": None, "ended": reason})
    console.print(f"ended in round {round_}: {reason}", soft_wrap=True)


def train_stage(config, folder, dataset, split, device, stage, stop):
    """Stages 1 and 3: train, from what was saved."""
    train(config, folder, dataset, split, open_network(config, folder, dataset), device, stage, stop)
    return {"held_mb": run.read_log(folder)[-1]["held_mb"]}


def erase_stage(config, folder, dataset, split, device, round_):
    """Stage 2: over the training images, find, explain, erase and save, in one forward pass each.

    The network is frozen, so that autograd keeps only what lies behind the explained layer. Images come in random order, without
    augmentation; what is done already is not done again. Where --subset ranks images (unsure, loss), a pass over all of
    them finds the first.
    """
    model = run.open_run(folder).network().to(device, memory_format=torch.channels_last).requires_grad_(False)
    amp, (mean, std) = run.pick_amp(config["amp"], device), (t.to(device) for t in run.normalisation(config, model))
    erased = run.ErasedRound(folder, round_, config["format"])
    select, subset, order = config["select"], config["subset"], erased.order()
    shuffled = data.shuffled(split["train"], "stage 2", config["seed"], round_)
    if subset < 1 and select in proxy.RANKED:
        order = order or rank_images(config, dataset, shuffled, model, mean, std, device, amp)
        select, subset = "all", 1.0
    erased.begin(order)
    order = (order or shuffled)[erased.looked_at:]
    batches, label, number = evaluation.batches_in_order(config, dataset, order, device), dict(zip(dataset.ids, dataset.labels)), 0
    looked_at, selected = erased.looked_at, erased.selected
    with erased, cam.CAM(model, config["cam"], config["layer"], config["smooth"]) as explain:
        for pixels, labels in progress(batches, f"round {round_}: erasing"):
            key = (config["seed"], "round", round_, looked_at)
            images, fresh = data.prepare(pixels, mean, std), torch.ones_like(labels, dtype=torch.bool)
            logits, _ = forward(model, images, labels, amp)
            rows, chosen = proxy.select(select, logits, labels, fresh, len(labels), key, subset, config["control"])
            copies, _, mask = proxy.erased_copies(config, explain, images, labels, logits, fresh, rows[chosen],
                                                  chosen[chosen], (mean, std), key)
            pictures = data.pixels_of(copies.images, mean, std).permute(0, 2, 3, 1).cpu().numpy()
            confidence, predicted = logits.detach().float().softmax(1)[rows[chosen]].max(1)
            areas = mask.float().mean((1, 2))
            told = zip(pictures, *(t.tolist() for t in (rows[chosen], predicted, confidence, areas, copies.taken)))
            told = [(picture, {"source": order[number + row], "label": dataset.classes[label[order[number + row]]],
                               "predicted": dataset.classes[said], "confidence": f"{sure:.6f}", "area": f"{area:.6f}"})
                    for picture, row, said, sure, area, taken in told if taken]
            number, looked_at, selected = number + len(labels), looked_at + len(labels), selected + len(copies.labels)
            erased.add([picture for picture, _ in told], [row for _, row in told], looked_at, selected)
    return {"images": looked_at, "selected": selected, "erased_images": erased.count, "held_mb": run.held_mb(device)}


@torch.no_grad()
def rank_images(config, dataset, ids, model, mean, std, device, amp):
    """The first --subset of the images by the run's selection; by control `label`, as many at random, for `ids` are shuffled."""
    ranks = []
    for pixels, labels in progress(evaluation.batches_in_order(config, dataset, ids, device), "ranking"):
        logits, _ = forward(model, data.prepare(pixels, mean, std), labels, amp)
        ranks.append(proxy.SELECTIONS[config["select"]](logits.float(), labels, None)[1])
    first = torch.cat(ranks).topk(round(config["subset"] * len(ids))).indices.tolist()
    return ids[: len(first)] if config["control"] == "label" else [ids[i] for i in first]


# --- what is shown -------------------------------------------------------------------------------------------------

console = Console(highlight=False, quiet=distributed.RANK > 0)


def progress(batches, text):
    """Yield the batches, with a progress bar where the output is a terminal."""
    return track(batches, text, len(batches), console=console, transient=True, disable=not console.is_terminal)


def show(batches, epoch, stage, counts):
    """Yield the batches, with a progress display where the output is a terminal."""
    if not console.is_terminal:
        yield from batches
        return
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        steps = len(batches)  # the bar and the time left are the stage's, not the epoch's
        task = bar.add_task("", total=(stage.end - stage.start) * steps, completed=(epoch - stage.start) * steps + batches.order.start, state="",
                                 epoch=f"{epoch + 1}/{stage.end}")
        shown = time.perf_counter()
        for batch in batches:
            yield batch
            bar.advance(task)
            if time.perf_counter() - shown > DISPLAY_SECONDS:
                shown = time.perf_counter()
                bar.update(task, state=describe(counts.totals()))


def describe(line):
    return (f"loss {line['train_loss']:.3f}  accuracy {line['train_accuracy']:.3f}  misled {line['misled']:.1%}  "
            f"erased {line['erased_images']}  {line['images_seen'] / line['train_seconds']:.0f} images/s")


def print_epoch(line, stage):
    left = (stage.end - line["epoch"]) * (line["train_seconds"] + line["eval_seconds"])
    console.print(f"epoch {line['epoch']}/{stage.end}  {describe(line)}  val {line['val_accuracy']:.3f}  "
                  f"left {int(left) // 60}:{int(left) % 60:02d}{'  LEAK' if 'warning' in line else ''}", markup=False, soft_wrap=True)


def print_dry_run(config, dataset, split, text, model, layer, grid):
    """Resolved settings, the split's sizes per class, and the network's size."""
    for key in run.SETTINGS:
        print(f"{key:15} {config[key]}")
    label = dict(zip(dataset.ids, dataset.labels.tolist()))
    sizes = {part: [0] * len(dataset.classes) for part in data.PARTS}
    for part, counted in sizes.items():
        for image_id in split[part]:
            counted[label[image_id]] += 1
    width = max(5, *(len(c) for c in dataset.classes))
    print(f"\n{'class':{width}}" + "".join(f"{part:>8}" for part in data.PARTS))
    for i, name in enumerate(dataset.classes):
        print(f"{name:{width}}" + "".join(f"{sizes[part][i]:>8}" for part in data.PARTS))
    print(f"{'all':{width}}" + "".join(f"{len(split[part]):>8}" for part in data.PARTS))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{config['model']} ({config['model_entry']['timm']}): {parameters:,} parameters, "
          f"{parameters * 4 / 2**20:.1f} MB in float32; {text}")
    if layer:
        print(f"explains {layer}, a grid of {grid[0]}x{grid[1]}")
    print("\nNothing was trained or written. Leave out --dry-run to start.")


# --- from the command line to the loop -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}. See python train.py --help")


def parse(arguments):
    """(settings given, other options) from the command line; one option per entry of `run.SETTINGS`."""
    defaults = run.read_configs()["defaults"]
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, epilog="Datasets and models of configs.json may bring settings of their own, which come "
                    "before these defaults.")
    for key, setting in run.SETTINGS.items():
        option = f"--{key.replace('_', '-')}"
        choices = f": {', '.join(setting.choices)}" if setting.choices else ""
        text = f"{setting.help}{choices} (default: {'null' if defaults[key] is None else defaults[key]})".replace("%", "%%")
        if setting.kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(option, metavar=key.upper(), default=argparse.SUPPRESS, help=text)
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with the settings it has")
    parser.add_argument("--any-code", action="store_true", help="with --resume: go on although code or versions have changed since")
    parser.add_argument("--dry-run", action="store_true", help="print settings, split and network, then stop")
    parser.add_argument("--show", action="store_true", help="with --dry-run: write a sheet of misled training images under every "
                        "fill, every control and three areas")
    parser.add_argument("--experiment", metavar="NAME", help="run an experiment of configs.json: what is not finished of it")
    parser.add_argument("--cell", metavar="I/N", help="with --experiment: only the I-th of N shares of its runs, for job arrays")
    parser.add_argument("--jobs", metavar="K", help="with --experiment: so many runs side by side (default: 1)")
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown option {unknown[0]!r}{run._nearest(unknown[0], known)}. See python train.py --help")
    given = vars(given)
    for key, value in given.items():
        if isinstance(value, list):  # what argparse makes of --key=--
            raise UserError(f"--{key.replace('_', '-')}: expected a value. See python train.py --help")
    other = {key: given.pop(key) for key in ("resume", "any_code", "dry_run", "show", "experiment", "cell", "jobs")}
    for key, needed in (("any_code", "experiment" if other["experiment"] else "resume"), ("show", "dry_run"), ("cell", "experiment"), ("jobs", "experiment")):
        if other[key] and not other[needed]:
            raise UserError(f"--{key.replace('_', '-')} goes with --{needed.replace('_', '-')}. See python train.py --help")
    if other["experiment"] and (other["resume"] or other["dry_run"]):
        raise UserError("--experiment goes with neither --resume nor --dry-run: it goes on by itself with what is not finished")
    if other["jobs"] is not None and not (other["jobs"].isdecimal() and 1 <= int(other["jobs"]) <= 1000):
        raise UserError(f"--jobs {other['jobs']}: expected a whole number from 1 to 1000")
    for key, text in given.items():
        if text == "null" and run.SETTINGS[key].optional:
            given[key] = None
        elif run.SETTINGS[key].kind in (int, float):
            with contextlib.suppress(ValueError):  # what is no number is refused when settings are checked
                given[key] = run.SETTINGS[key].kind(text)
    return given, other


def start(options, dry_run, show_sheet):
    """A new run: everything is loaded and checked before its folder is made. Returns what `main` goes on with, or None."""
    config = run.resolve(run.read_configs(), options)
    device = run.pick_device(config["device"])
    dataset, skipped = run.load_dataset(config), []
    split = the_split(config, dataset)  # fails before every image is looked at
    if config["reweight"]:
        run.run_before(config, "reweight", dataset.classes)
    first = run.heat_run(config, dataset.classes)
    model, text = run.first_network(config, dataset.classes)
    layer, grid = run.try_network(config, model)
    if not dry_run:
        dataset, skipped = usable(config, dataset)
        split = the_split(config, dataset) if skipped else split
    split = {"classes": dataset.classes, "fingerprint": dataset.fingerprint(), **split, "skipped": [i for i, _, _ in skipped]}
    run.with_decoy(dataset, config, split)
    config["layer"] = layer or config["layer"]
    if config["batch_size"] == run.AUTO:
        config["batch_size"] = fitting_batch(config, model, dataset.classes, device, len(split["train"]))
        text += f"\n--batch-size auto: {config['batch_size']} images fit {device}; the learning rate stays {config['lr']:g}"
    if dry_run:
        print_dry_run(config, dataset, split, text, model, layer, grid)
        if show_sheet:
            explained = first.network() if first else model
            print(f"\nLook at {evaluation.draw_space(config, explained.to(device), dataset, split, device)}")
        return None
    folder = make_folder(config)
    run.write_json(folder / "env.json", run.describe_environment(dataset, device))
    if skipped:
        write_bad_images(folder / "bad-images.txt", skipped)
        text += f"\n{len(skipped)} images that cannot be used are left out, see {folder}/bad-images.txt"
    run.keep_heat_network(first, folder)
    run.write_json(folder / "split.json", split)
    run.write_json(folder / "config.json", config)  # last: a folder with it is a run that can be resumed
    console.print(f"{folder}: {text}", markup=False, soft_wrap=True)
    return config, folder, dataset, split, model, device


def usable(config, dataset):
    """The dataset without images that cannot be used, and these as (id, file, what is wrong). Without --skip-bad a UserError for them."""
    bad = evaluation.check_images(config, dataset)
    found = [(dataset.ids[i], str(dataset.where(i)), wrong) for i, wrong in bad.items()]
    if not found or config["skip_bad"]:
        return dataset.without([image_id for image_id, _, _ in found]), found
    path = Path(config["out"]) / "bad-images.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.cannot_write(path, error) from None
    write_bad_images(path, found)
    raise UserError(f"dataset {dataset.name}: {len(found)} of {len(dataset)} images cannot be used, the first {found[0][1]} ({found[0][2]}). "
                    f"All are listed in {path}: mend or remove them, or leave them out with --skip-bad")


def write_bad_images(path, found):
    """A line per image: file, a tab, what is wrong."""
    text = "".join(f"{data.one_line(file)}\t{data.one_line(wrong)}\n" for _, file, wrong in found)
    data.write_atomically(path, lambda file: file.write(text.encode()))


def the_split(config, dataset):
    """The run's split: drawn, or another run's. What the run of --init was trained on is not tested on."""
    known = {}
    if config["init"] is not None:
        first = run.open_run(config["init"]).split
        known = {image_id: part for part in data.PARTS for image_id in first[part]}
    if config["split_from"] is None:
        return data.make_split(dataset, config["dataset_entry"]["split"], config["seed"], config["train_fraction"], known)
    other = run.open_run(config["split_from"])
    split = data.reuse_split(dataset, other.split, config["train_fraction"], config["seed"], other.folder / "split.json")
    for image_id in (*split["val"], *split["test"]):
        if known.get(image_id) == "train":
            raise UserError(f"--split-from {other.folder}: tests on {image_id!r}, which --init {config['init']} was trained on; leave "
                            "one of the two out")
    return split


def make_folder(config):
    """A folder for the run, which was not there before; a name that nobody asked for gets a number where it is taken.

    What a process left that was killed before it had made a run of it is taken over.
    """
    asked, out = config["name"], Path(config["out"])
    base = asked or f"{config['dataset']}-{config['model'].replace('/', '_')}-{config['cam']}-s{config['seed']}"
    for number in itertools.count(1):
        config["name"] = base if number == 1 else f"{base}-{number}"
        folder = out / config["name"]
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not run.is_leftover(folder):
                if not asked and folder.is_dir():
                    continue
                raise UserError(f"{folder} is there already: choose another --name or --out, or go on with it with "
                                f"--resume {folder}") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from None
        try:
            run.lock(folder)
            run.sweep(folder)
            return folder
        except UserError:  # another process has just made it
            if asked:
                raise


def resume(folder, options):
    """An interrupted run: what it was made with, checked to be still there. Returns what `main` goes on with."""
    if distributed.RANK == 0 and (Path(folder) / "config.json").is_file():
        run.lock(folder)
    opened = run.open_run(folder)
    other = [key for key in options if key not in ("device", "workers", "cache", "checkpoint_every")]
    if other:
        raise UserError(f"--resume goes on with the settings of {folder}: leave out --{other[0].replace('_', '-')}, "
                        "or start a new run")
    if distributed.RANK == 0:
        run.sweep(opened.folder)
    config = opened.config | options
    return config, opened.folder, opened.dataset(), opened.split, None, run.pick_device(config["device"])


def start_together(options, other):
    """`start` or `resume`; of several processes rank 0 makes the run, and the others open it."""
    options["device"] = distributed.start(options.get("device", "auto"))
    if other["resume"] or distributed.RANKS == 1:
        return resume(other["resume"], options) if other["resume"] else start(options, other["dry_run"], other["show"])
    if other["dry_run"]:
        raise UserError("--dry-run: leave torchrun out")
    config = run.resolve(run.read_configs(), options)
    if config["mode"] == "staged":
        raise UserError("--mode staged runs in one process: leave torchrun out")
    if config["batch_size"] == run.AUTO:
        raise UserError("--batch-size auto tries steps in one process: leave torchrun out to see its number, then give that times the "
                        "number of processes")
    if config["batch_size"] % distributed.RANKS:
        raise UserError(f"--batch-size {config['batch_size']}: {distributed.RANKS} processes cannot share it evenly")
    ready = []

    def first():
        folder = interrupted_run(config) if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) else None
        ready.append(resume(folder, {}) if folder else start(options, False, False))
        return str(ready[0][1])

    folder = distributed.from_first(first)
    return ready[0] if ready else resume(folder, {"device": options["device"]})


def interrupted_run(config):
    """The folder of an unfinished run with these very settings, the newest, or None: what torchrun restarts goes on with it."""
    found = []
    for path in Path(config["out"]).glob("*/config.json"):
        with contextlib.suppress(UserError):
            there = run.open_run(path.parent).config
            if not run.differing_settings(config, there) and not (path.parent / "metrics.json").exists():
                found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def open_network(config, folder, dataset):
    """The network that a run goes on with: only one without a checkpoint needs the weights it starts from."""
    if (folder / "last.pt").exists():
        torch.manual_seed(config["seed"])
        return run.build_network(config, len(dataset.classes), pretrained=False)[0]
    return run.first_network(config, dataset.classes)[0]


def main(arguments=None):
    """The command line; returns the exit status: 2 for what the user can mend, 128 and the signal's number when stopped by one."""
    ready, folder, other, stop = None, None, {}, distributed.Stop()
    try:
        options, other = parse(arguments)
        if other["experiment"]:
            if distributed.RANKS > 1:
                raise UserError("--experiment: leave torchrun out; its runs have a process each")
            return experiment.run_cells(other["experiment"], options, other["cell"], int(other["jobs"] or 1), other["any_code"])
        ready = start_together(options, other)
        if ready is None:
            return 0
        folder = ready[1]
        run_to_its_end(*ready, stop, other["any_code"])
        if distributed.RANK:
            return 0
        result = evaluation.finish(folder, ready[2], ready[5])
    except UserError as error:
        if distributed.RANK == 0:
            say(error, folder)
        return 2
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            say(UserError("a process that decodes images was killed, most often because memory ran out: give fewer with --workers"), folder)
        elif ready and (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            say(out_of_memory(ready[0], folder, ready[5]), folder)
        else:
            raise
        return 2
    except (KeyboardInterrupt, distributed.Stopped) as stopped:
        where = f"; go on with python train.py --resume {folder}" if folder else "; the same command goes on" if other.get("experiment") else ""
        if distributed.RANK == 0:
            print(f"\ntrain.py: interrupted{where}", file=sys.stderr)
        return 128 + getattr(stopped, "signal", 2)
    finally:
        stop.end()
        distributed.end()
    print(f"\n{evaluation.describe(folder, result)}\n\nLook at {folder}/sheet.png and curves.png; "
          f"print this again with python eval.py {folder}")
    return 0


def ready_checkpoint(folder, config, split, any_code):
    """How many whole epochs lie before the checkpoint that the run goes on from; 0 without one. Raises UserError if it cannot serve."""
    state, text = run.last_checkpoint(folder)
    if text:
        console.print(text, markup=False, soft_wrap=True)
    if state is None:
        return 0
    run.check_made_with(folder, state["made_with"], run.made_with(config, split), any_code)
    return state["epoch"]


def say(error, folder):
    """A UserError as one line, with how to go on where a run has begun."""
    go_on = f". Then go on with python train.py --resume {folder}" if folder and error.resumable else ""
    print(data.one_line(f"train.py: {error}{go_on}"), file=sys.stderr)


def run_to_its_end(config, folder, dataset, split, model, device, stop, any_code):
    """Train, online or staged, from wherever the run stands."""
    epoch = distributed.from_first(ready_checkpoint, folder, config, split, any_code)
    if config["protocol"] == "resplit":
        console.print(f"--protocol resplit: {evaluation.LEAK}", soft_wrap=True)
    if distributed.RANK == 0 and config["cache"] != "off":
        cache.keep_listing(dataset)
    text = distributed.from_first(evaluation.open_pixels, config, dataset) if dataset.pixels is None else None
    if distributed.RANK:
        evaluation.open_pixels(config, dataset, build=False)
    if text:
        console.print(text, markup=False, soft_wrap=True)
    if config["reweight"]:
        split = {**split, "misled": distributed.from_first(first_misled, config, folder, dataset, split, device)}
    if config["mode"] == "staged":
        del model
        staged(config, folder, dataset, split, device, stop, epoch)
    else:
        train(config, folder, dataset, split, model or open_network(config, folder, dataset), device, Stage(0, config["epochs"]),
              stop)


def first_misled(config, folder, dataset, split, device):
    """Ids of the training images that the run of --reweight gets wrong, as they are and with its last weights; kept in `reweighted.json`.

    The first half of Just Train Twice (Liu et al. 2021, algorithm 1); `Order` draws these more often, in the second. Raises UserError.
    """
    if (folder / "reweighted.json").is_file():
        return run.read_json(folder / "reweighted.json")["misled"]
    first = run.run_before(config, "reweight", split["classes"])
    model = first.network().to(device, memory_format=torch.channels_last)
    mean, std = (t.to(device) for t in run.normalisation(first.config, model))
    logits, labels = evaluation.predict(model, evaluation.batches_in_order(config, dataset, split["train"], device), mean, std, device)
    wrong = (logits.argmax(1) != labels).tolist()
    misled = [image_id for image_id, is_wrong in zip(split["train"], wrong) if is_wrong]
    run.write_json(folder / "reweighted.json", {"run": str(first.folder), "misled": misled})
    console.print(f"--reweight: {len(misled)} of {len(wrong)} training images are wrong there, and drawn {config['upweight']} times as often",
                  soft_wrap=True)
    return misled


# --- what fits the memory ------------------------------------------------------------------------------------------

TRIAL_SHARE = 0.92  # of the GPU's memory, which trial steps may take: validation and fragments need some of the rest
TRIAL_STEPS = 3  # the first erases, the second has erased images in it, the third finds all buffers taken
FEWEST_BATCHES = 10  # an epoch of fewer steps learns little, however many images the memory could hold


def fitting_batch(config, model, classes, device, images):
    """--batch-size auto: the most images whose training step fits the GPU, every image selected, at least 10 batches in an epoch.

    Found by trial, with `train` itself on a copy of the network and on blank images. Raises UserError where there is no GPU to ask, or
    not even two images fit.
    """
    if device.type != "cuda":
        raise UserError(f"--batch-size auto asks how much a GPU holds, and this run is on {device}: give a number")

    def fits(size):
        torch.cuda.set_per_process_memory_fraction(TRIAL_SHARE, device)
        try:
            trial_steps(config, model, classes, device, size)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            run.release(device)
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    return largest_batch(fits, max(2, images // FEWEST_BATCHES))


def largest_batch(fits, most):
    """The largest number from 2 to `most` that fits, to within an eighth; above 16 a multiple of 8. Raises UserError if 2 does not."""
    low, size = 1, min(8, most)
    while fits(size):
        low = size
        if size == most:
            return most
        size = min(2 * size, most)
    while size - low > max(1, low // 8):
        middle = (low + size) // 2
        low, size = (middle, size) if fits(middle) else (low, middle)
    if low == 1:
        raise UserError("out of memory: not even --batch-size 2 fits; try --checkpointing, --amp auto, a smaller --image-size or --model")
    return low if low < 16 else low - low % 8


class Enough(Exception):
    """Raised by `Trial` after its last step."""


class Trial(distributed.Stop):
    """Ends `train` from within, after a few steps, before anything is saved."""

    def __init__(self):
        self.steps = 0

    def asked(self, due=False):
        self.steps += 1
        if self.steps == TRIAL_STEPS:
            raise Enough
        return 0, False


def trial_steps(config, model, classes, device, size):
    """The first steps of a run with batches of `size`, everything selected, in a folder that is thrown away."""
    side, count = config["image_size"], TRIAL_STEPS * size
    blank = np.broadcast_to(np.zeros(1, dtype=np.uint8), (count, side, side, 3))
    dataset = data.Dataset("trial", Path(), classes, [str(i) for i in range(count)], np.zeros(count, dtype=np.int64), blank,
                           pixels=data.Pixels(blank))
    config = config | {"batch_size": size, "select": "all", "subset": 1.0, "schedule": None, "warmup": 0, "freeze": 0,
                       "accumulate": 1, "compile": False, "protocol": "fixed"}
    split = {"classes": classes, "fingerprint": "", "train": dataset.ids, "val": dataset.ids[:size]}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        run.keep_heat_network(run.heat_run(config, classes), Path(folder))
        train(config, Path(folder), dataset, split, copy.deepcopy(model), device,
              Stage(0, 1), Trial())


def out_of_memory(config, folder, device):
    """The error for a batch that does not fit, with what was used and what would fit."""
    gpu = device.type == "cuda"
    used = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} of {torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GiB" if gpu \
        else "all there is"
    half, ways = max(2, config["batch_size"] // 2), []
    ways.append(f"--batch-size {half} --accumulate {2 * config['accumulate']}")
    ways += ["--amp auto"] * (gpu and config["amp"] == "off") + ["--checkpointing"] * (not config["checkpointing"])
    return UserError(f"out of memory on {device}: {config['model']} with batches of {config['batch_size']} images of {config['image_size']} pixels "
                     f"used {used}. Start anew with {', or '.join(ways)}; what {folder} has is intact", resumable=False)


if __name__ == "__main__":
    sys.exit(main())
