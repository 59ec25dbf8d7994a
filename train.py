"""Train an image classifier with Proxy Attention: erase what misled it, and train on what is left.

    python train.py                                                # scikit-learn's digits, a small residual network
    python train.py --dataset asl --model vit_small --cam gradcam++
    python train.py --dataset folder --data-dir DIR                # any folder of class folders
    python train.py --cam none                                     # the same run without Proxy Attention
    python train.py --mode staged --rounds 3                       # erase between trainings, and keep the erased images on disk
    python train.py --dry-run --show                               # settings, split, network, and a sheet of every fill and control
    python train.py --resume runs/NAME                             # go on with an interrupted run

Each step of `train` below is one forward and one backward pass over a batch of one fixed size. Where the network got a fresh
image wrong, a class activation map taken from that same forward pass shows the pixels that misled it; a copy with these
pixels erased takes a seat in the next batch. `staged`, further down, is the method as it was first proposed: train, then erase what
misled the trained network, then train again. Settings come from `configs.json`; each is an option here (`--help`).
"""

import argparse
import contextlib
import itertools
import sys
import time
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

import timm.optim
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

import cam
import data
import eval as evaluation
import proxy
import run
from data import UserError

WARM_UP_SHARE = 0.25  # of the one-cycle schedule: the learning rate rises for a quarter of the steps
FEWEST_STEPS = 8  # a one-cycle schedule of fewer steps divides by zero or stays at zero: shorter runs end within this one
DISPLAY_SECONDS = 0.5  # the display asks the device for its counts this often; nothing else waits for it


class Stage(NamedTuple):
    """The epochs that one call of `train` covers. A run has one stage, a staged run several."""

    start: int  # epochs that lie before it
    end: int
    round: int = 0
    copies: frozenset = frozenset()  # ids of training images that are erased copies


def train(config, folder, dataset, split, model, device, stage):
    """The loop: from the last checkpoint in `folder`, if there is one, to the end of the stage."""
    amp, classes = run.pick_amp(config["amp"], device), len(dataset.classes)
    batches, validation = open_batches(config, dataset, split, device)
    mean, std = (t.to(device) for t in run.normalisation(config, model))

    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(timm.optim.param_groups_weight_decay(model, config["weight_decay"]), lr=config["lr"])
    steps = (stage.end - stage.start) * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["lr"], pct_start=WARM_UP_SHARE,
                                                   total_steps=max(FEWEST_STEPS, steps))
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    erases = config["cam"] != "none" and config["mode"] == "online"
    explain = cam.CAM(model, config["cam"], config["layer"], config["smooth"]) if erases else None
    seats = max(1, int((1 if config["same_step"] else config["share"]) * batches.order.batch_size))
    first_epoch, waiting = load_last(folder, stage, model, optimizer, schedule, scaler, device)
    accuracies = [line["val_accuracy"] for line in run.read_log(folder)]

    for epoch in range(first_epoch, stage.end):
        if round_ := new_split_at(config, epoch):
            split = draw_new_split(config, folder, dataset, split, round_)
            batches, validation = open_batches(config, dataset, split, device)
        model.train()
        batches.order.epoch = epoch
        erasing = erases and proxy.is_on(config["schedule"], epoch, accuracies, config["warmup"])
        counts = Counts(device)
        for step, (pixels, labels) in enumerate(show(batches, epoch, stage, counts)):
            # Order, augmentation and dropout follow from (seed, epoch, step) alone, whatever was drawn before.
            key = (config["seed"], epoch, step)
            torch.manual_seed(data.stable_seed("step", *key))
            images = data.augment(pixels, mean, std, config, key)
            images, labels = data.mix(images, labels, classes, config, key)
            fresh = torch.ones(len(labels), dtype=torch.bool, device=device)
            if waiting is not None:
                images, labels, fresh = proxy.seat(images, labels, waiting, config["budget"])
                waiting = None

            with explain if erasing else contextlib.nullcontext():
                logits, loss = forward(model, images, labels, amp)
                counts.look(logits, labels, fresh)
                if erasing:
                    with counts.timing_cam():
                        rows, chosen = proxy.select(config["select"], logits, labels, fresh, seats, key, config["subset"],
                                                    config["control"])
                        waiting, *_ = proxy.erased_copies(config, explain, images, labels, logits, fresh, rows, chosen,
                                                          (mean, std), key)
            if erasing and config["same_step"]:
                del logits, loss  # the first pass was for the heat alone
                images, labels, fresh = proxy.join(images, labels, rows, waiting, config["budget"])
                logits, loss = forward(model, images, labels, amp)
                counts.second_pass_images += len(labels)
                waiting = None

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            counts.add(loss, fresh)

        line = {"epoch": epoch + 1, "lr": schedule.get_last_lr()[0], **counts.totals(),
                **validate(model, validation, mean, std, device, amp), **memory(device)}
        if config["mode"] == "staged":
            line |= {"round": stage.round, "erased_images": sum(split["train"][i] in stage.copies for i in batches.seen())}
        if config["protocol"] == "resplit":
            line["warning"] = evaluation.LEAK
        finish_epoch(folder, line, waiting, model, optimizer, schedule, scaler)
        accuracies.append(line["val_accuracy"])
        print_epoch(line, stage)


def forward(model, images, labels, amp):
    """Logits and loss of one forward pass. labels: classes, or under mixup and cutmix shares of classes."""
    with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
        logits = model(images)
        return logits, F.cross_entropy(logits, labels)


def open_batches(config, dataset, split, device):
    """Training batches, shuffled, and validation batches, in order."""
    training = data.Batches(dataset, split["train"], config["image_size"], config["batch_size"], device,
                            evaluation.decoding_workers(config), seed=config["seed"])
    return training, evaluation.batches_in_order(config, dataset, split["val"], device)


def validate(model, batches, mean, std, device, amp):
    """Loss and accuracy on the validation part, and the seconds that took."""
    start = time.perf_counter()
    logits, labels = evaluation.predict(model, batches, mean, std, device, amp)
    loss, accuracy = F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    return {"val_loss": loss, "val_accuracy": accuracy, "eval_seconds": time.perf_counter() - start}


class Counts:
    """What an epoch adds up to. It is summed on the device, which is asked for it at the display's pace and at the end."""

    def __init__(self, device):
        self.device = device
        self.sums = torch.zeros(4, device=device)  # loss times images, fresh images, those misled, erased images
        self.images, self.second_pass_images, self.steps, self.start = 0, 0, 0, time.perf_counter()
        self.cam_seconds, self.cam_events = 0.0, []

    def look(self, logits, labels, fresh):
        """What the network says of the images that come as they are."""
        self.sums[1:3] += torch.stack([fresh.sum(), (proxy.wrong(logits.detach(), labels) & fresh).sum()])

    def add(self, loss, fresh):
        """A step, and the images that it trained on."""
        self.sums[::3] += torch.stack([loss.detach() * len(fresh), (~fresh).sum()])
        self.images, self.steps = self.images + len(fresh), self.steps + 1

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

    def totals(self):
        """The epoch's share of a line of `log.jsonl`; waits for the device."""
        loss, fresh, wrong, erased = self.sums.tolist()
        seconds = time.perf_counter() - self.start
        cam_seconds = self.cam_seconds + sum(start.elapsed_time(end) for start, end in self.cam_events) / 1000
        return {"train_loss": loss / max(self.images, 1), "train_accuracy": 1 - wrong / max(fresh, 1),
                "misled": wrong / max(fresh, 1), "erased_images": int(erased), "images_seen": self.images,
                "second_pass_images": self.second_pass_images, "optimizer_steps": self.steps, "train_seconds": seconds, "cam_seconds": cam_seconds}


def memory(device):
    """Peak memory so far and memory held now in MB (2^20 bytes): of this process, and of the GPU where there is one."""
    host = None
    if resource:
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    gpu = device.type == "cuda"
    return {"peak_gpu_allocated_mb": round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if gpu else None,
            "peak_gpu_reserved_mb": round(torch.cuda.max_memory_reserved(device) / 2**20, 1) if gpu else None,
            "peak_host_mb": host, "held_mb": run.held_mb(device)}


# --- checkpoints ---------------------------------------------------------------------------------------------------


def finish_epoch(folder, line, waiting, model, optimizer, schedule, scaler):
    """Log line, best.pt if this was the best epoch, last.pt: in this order, so that a crash in between repeats the epoch."""
    run.append_line(folder / "log.jsonl", line)
    if evaluation.best_epoch(run.read_log(folder)) == line["epoch"]:
        run.save_checkpoint(folder / "best.pt", {"epoch": line["epoch"], "model": model.state_dict()})
    run.save_checkpoint(folder / "last.pt", {
        "epoch": line["epoch"], "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(), "scaler": scaler.state_dict(),
        "waiting": None if waiting is None else waiting._asdict()})


def load_last(folder, stage, model, optimizer, schedule, scaler, device):
    """Restore `last.pt` where there is one; at the start of a later stage its weights alone.

    Returns the number of finished epochs and the images that wait.
    """
    if not (folder / "last.pt").exists():
        run.cut_log(folder, 0)
        return 0, None
    state = run.load_checkpoint(folder / "last.pt", device)
    run.cut_log(folder, state["epoch"])
    model.load_state_dict(state["model"])
    if state["epoch"] == stage.start:
        return state["epoch"], None
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    scaler.load_state_dict(state["scaler"])
    return state["epoch"], None if state["waiting"] is None else proxy.Waiting(**state["waiting"])


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
    write_split(folder, dataset, split)
    console.print(f"new split {number}: {evaluation.LEAK}", soft_wrap=True)
    return split


def write_split(folder, dataset, split):
    run.write_json(folder / "split.json", {"classes": dataset.classes, "fingerprint": dataset.fingerprint(),
                                           **{part: split[part] for part in data.PARTS}})


# --- the staged pipeline -------------------------------------------------------------------------------------------


def staged(config, folder, dataset, split, device):
    """The method as first proposed: stage 1 trains; each round then erases what misled the saved network, and trains again.

    Each stage opens what the one before saved, and what it held is released at its end. A stage that is in `stages.jsonl` is done.
    """
    run.cut_lines(folder / "stages.jsonl", len(run.read_lines(folder / "stages.jsonl")))
    done = {(line["round"], line["stage"]) for line in run.read_lines(folder / "stages.jsonl")}
    ends = list(itertools.accumulate(run.stage_epochs(config)))
    for round_, (start, end) in enumerate(zip([0, *ends], ends)):
        stage = Stage(start, end, round_)
        if round_ == 0:
            if (0, 1) not in done:
                run_stage(folder, device, round_, 1, train_stage, config, folder, dataset, split, device, stage)
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
                      stage._replace(copies=frozenset(copies)))
    say_end(folder, done, len(ends) - 1, "all rounds are done")


def run_stage(folder, device, round_, number, work, *arguments):
    """Call a stage, let go of all it held, and record it in `stages.jsonl` with the memory before and after."""
    start = time.perf_counter()
    line = {"round": round_, "stage": number, **work(*arguments), "seconds": round(time.perf_counter() - start, 3)}
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


def train_stage(config, folder, dataset, split, device, stage):
    """Stages 1 and 3: train, from what was saved."""
    train(config, folder, dataset, split, open_network(config, folder, dataset), device, stage)
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

console = Console(highlight=False)


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
        task = bar.add_task("", total=(stage.end - stage.start) * steps, completed=(epoch - stage.start) * steps, state="",
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
    parser.add_argument("--dry-run", action="store_true", help="print settings, split and network, then stop")
    parser.add_argument("--show", action="store_true", help="with --dry-run: write a sheet of misled training images under every "
                        "fill, every control and three areas")
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown option {unknown[0]!r}{run._nearest(unknown[0], known)}. See python train.py --help")
    given = vars(given)
    other = {key: given.pop(key) for key in ("resume", "dry_run", "show")}
    if other["show"] and not other["dry_run"]:
        raise UserError("--show goes with --dry-run. See python train.py --help")
    for key, text in given.items():
        if run.SETTINGS[key].kind in (int, float):
            with contextlib.suppress(ValueError):  # what is no number is refused when settings are checked
                given[key] = run.SETTINGS[key].kind(text)
    return given, other


def start(options, dry_run, show_sheet):
    """A new run: everything is loaded and checked before its folder is made. Returns what `main` goes on with, or None."""
    config = run.resolve(run.read_configs(), options)
    device = run.pick_device(config["device"])
    dataset = data.load_dataset(config["dataset"], config["dataset_entry"], config["data_dir"], config["classes"])
    split = the_split(config, dataset)
    model, text = run.first_network(config, dataset.classes)
    layer, grid = run.try_network(config, model)
    config["layer"] = layer or config["layer"]
    if dry_run:
        print_dry_run(config, dataset, split, text, model, layer, grid)
        if show_sheet:
            print(f"\nLook at {evaluation.draw_space(config, model.to(device), dataset, split, device)}")
        return None
    folder = make_folder(config)
    run.write_json(folder / "env.json", run.describe_environment(dataset, device))
    write_split(folder, dataset, split)
    run.write_json(folder / "config.json", config)  # last: a folder with it is a run that can be resumed
    console.print(f"{folder}: {text}", markup=False, soft_wrap=True)
    return config, folder, dataset, split, model, device


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
    """A folder for the run, which was not there before; a name that nobody asked for gets a number where it is taken."""
    asked, out = config["name"], Path(config["out"])
    base = asked or f"{config['dataset']}-{config['model'].replace('/', '_')}-{config['cam']}-s{config['seed']}"
    for number in itertools.count(1):
        config["name"] = base if number == 1 else f"{base}-{number}"
        folder = out / config["name"]
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if asked or not folder.exists():  # or a file is where --out should be
                raise UserError(f"{folder} is there already: choose another --name or --out, or go on with it with "
                                f"--resume {folder}") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from None


def resume(folder, options):
    """An interrupted run: what it was made with, checked to be still there. Returns what `main` goes on with."""
    opened = run.open_run(folder)
    other = [key for key in options if key not in ("device", "workers")]
    if other:
        raise UserError(f"--resume goes on with the settings of {folder}: leave out --{other[0].replace('_', '-')}, "
                        "or start a new run")
    run.sweep(opened.folder)
    config = opened.config | options
    return config, opened.folder, opened.dataset(), opened.split, None, run.pick_device(config["device"])


def open_network(config, folder, dataset):
    """The network that a run goes on with: only one without a checkpoint needs the weights it starts from."""
    if (folder / "last.pt").exists():
        torch.manual_seed(config["seed"])
        return run.build_network(config, len(dataset.classes), pretrained=False)[0]
    return run.first_network(config, dataset.classes)[0]


def main(arguments=None):
    """The command line; returns the exit status: 2 for what the user can mend, 130 when interrupted."""
    folder = None
    try:
        options, other = parse(arguments)
        ready = resume(other["resume"], options) if other["resume"] else start(options, other["dry_run"], other["show"])
        if ready is None:
            return 0
        config, folder, dataset, split, model, device = ready
        if config["protocol"] == "resplit":
            console.print(f"--protocol resplit: {evaluation.LEAK}", soft_wrap=True)
        if config["mode"] == "staged":
            del model, ready
            staged(config, folder, dataset, split, device)
        else:
            train(config, folder, dataset, split, model or open_network(config, folder, dataset), device,
                  Stage(0, config["epochs"]))
            del model, ready
        result = evaluation.finish(folder, dataset, device)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f"; go on with python train.py --resume {folder}" if folder else ""
        print(f"\ntrain.py: interrupted{where}", file=sys.stderr)
        return 130
    print(f"\n{evaluation.describe(folder, result)}\n\nLook at {folder}/sheet.png and curves.png; "
          f"print this again with python eval.py {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
