"""Train an image classifier with Proxy Attention: erase what misled it, and train on what is left.

    python train.py                                                # scikit-learn's digits, a small residual network
    python train.py --dataset asl --model vit_small --cam gradcam++
    python train.py --dataset folder --data-dir DIR                # any folder of class folders
    python train.py --cam none                                     # the same run without Proxy Attention
    python train.py --dry-run                                      # settings, split and network; trains nothing
    python train.py --resume runs/NAME                             # go on with an interrupted run

Each step of `train` below is one forward and one backward pass over a batch of one fixed size. Where the network got a fresh
image wrong, a class activation map taken from that same forward pass shows the pixels that misled it; a copy with these
pixels erased takes a seat in the next batch. Settings come from `configs.json`; each is an option here (`--help`).
"""

import argparse
import contextlib
import itertools
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import timm.optim
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import cam
import data
import eval as evaluation
import proxy
import run
from data import UserError

WARM_UP_SHARE = 0.25  # of the one-cycle schedule: the learning rate rises for a quarter of the steps
FEWEST_STEPS = 8  # a one-cycle schedule of fewer steps divides by zero or stays at zero: shorter runs end within this one
DISPLAY_SECONDS = 0.5  # the display asks the device for its counts this often; nothing else waits for it


def train(config, folder, dataset, split, model, device):
    """The loop: from the last checkpoint in `folder`, if there is one, to the last epoch."""
    amp = run.pick_amp(config["amp"], device)
    batches = data.Batches(dataset, split["train"], config["image_size"], config["batch_size"], device,
                           evaluation.decoding_workers(config), seed=config["seed"])
    validation = evaluation.batches_in_order(config, dataset, split["val"], device)
    augment = config["dataset_entry"]["augment"] if config["augment"] else None
    mean, std = (t.to(device) for t in run.normalisation(config, model))

    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(timm.optim.param_groups_weight_decay(model, config["weight_decay"]), lr=config["lr"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["lr"], pct_start=WARM_UP_SHARE,
                                                   total_steps=max(FEWEST_STEPS, config["epochs"] * len(batches)))
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
    explain = None if config["cam"] == "none" else cam.CAM(model, config["cam"], config["layer"], config["smooth"])
    seats = max(1, int(config["share"] * batches.order.batch_size))
    first_epoch, waiting = load_last(folder, model, optimizer, schedule, scaler, device)

    for epoch in range(first_epoch, config["epochs"]):
        model.train()
        batches.order.epoch = epoch
        erasing = explain is not None and proxy.is_on(epoch, config["warmup"])
        counts = Counts(device)
        for step, (pixels, labels) in enumerate(show(batches, epoch, config, counts)):
            # Order, augmentation and dropout follow from (seed, epoch, step) alone, whatever was drawn before.
            key = (config["seed"], epoch, step)
            torch.manual_seed(data.stable_seed("step", *key))
            images = data.prepare(pixels, mean, std, augment, key)
            fresh = torch.ones_like(labels, dtype=torch.bool)
            if waiting is not None:
                images, labels, fresh = proxy.seat(images, labels, waiting, config["budget"])

            with explain if erasing else contextlib.nullcontext():
                with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                    logits = model(images)
                    loss = F.cross_entropy(logits, labels)
                if erasing:
                    with counts.timing_cam():
                        draw = torch.rand(len(labels)).to(device, non_blocking=True)
                        rows, chosen = proxy.select(config["select"], logits, labels, fresh, seats, draw)
                        classes, against = cam.EXPLAIN[config["explain"]](logits[rows], labels[rows])
                        heat = cam.upsample(explain(logits, rows, classes, against), images.shape[-2:])
                        mask = proxy.pixel_mask(heat, config["area"], config["threshold"])
                        erased = proxy.erase(images[rows], mask, config["fill"], -mean / std)
                        waiting = proxy.Waiting(erased, labels[rows], chosen & mask.flatten(1).any(1))

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            counts.add(loss, logits, labels, fresh)

        line = {"epoch": epoch + 1, "lr": schedule.get_last_lr()[0], **counts.totals(),
                **validate(model, validation, mean, std, device, amp), **peaks(device)}
        finish_epoch(folder, line, waiting, model, optimizer, schedule, scaler)
        print_epoch(line, config)


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
        self.images, self.steps, self.start = 0, 0, time.perf_counter()
        self.cam_seconds, self.cam_events = 0.0, []

    def add(self, loss, logits, labels, fresh):
        wrong = (logits.detach().argmax(1) != labels) & fresh
        self.sums += torch.stack([loss.detach() * len(labels), fresh.sum(), wrong.sum(), (~fresh).sum()])
        self.images, self.steps = self.images + len(labels), self.steps + 1

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
                "optimizer_steps": self.steps, "train_seconds": seconds, "cam_seconds": cam_seconds}


def peaks(device):
    """Peak memory so far in MB (2^20 bytes): of this process, and of the GPU where there is one."""
    host = None
    if resource:
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    gpu = device.type == "cuda"
    return {"peak_gpu_allocated_mb": round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if gpu else None,
            "peak_gpu_reserved_mb": round(torch.cuda.max_memory_reserved(device) / 2**20, 1) if gpu else None,
            "peak_host_mb": host}


# --- checkpoints ---------------------------------------------------------------------------------------------------


def finish_epoch(folder, line, waiting, model, optimizer, schedule, scaler):
    """Log line, best.pt if this was the best epoch, last.pt: in this order, so that a crash in between repeats the epoch."""
    run.append_log(folder, line)
    if evaluation.best_epoch(run.read_log(folder)) == line["epoch"]:
        run.save_checkpoint(folder / "best.pt", {"epoch": line["epoch"], "model": model.state_dict()})
    run.save_checkpoint(folder / "last.pt", {
        "epoch": line["epoch"], "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(), "scaler": scaler.state_dict(),
        "waiting": None if waiting is None else waiting._asdict()})


def load_last(folder, model, optimizer, schedule, scaler, device):
    """Restore `last.pt` where there is one. Returns the number of finished epochs and the images that wait."""
    if not (folder / "last.pt").exists():
        run.cut_log(folder, 0)
        return 0, None
    state = run.load_checkpoint(folder / "last.pt", device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    scaler.load_state_dict(state["scaler"])
    run.cut_log(folder, state["epoch"])
    return state["epoch"], None if state["waiting"] is None else proxy.Waiting(**state["waiting"])


# --- what is shown -------------------------------------------------------------------------------------------------

console = Console(highlight=False)


def show(batches, epoch, config, counts):
    """Yield the batches, with a progress display where the output is a terminal."""
    if not console.is_terminal:
        yield from batches
        return
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        steps = len(batches)  # the bar and the time left are the run's, not the epoch's
        task = progress.add_task("", total=config["epochs"] * steps, completed=epoch * steps, state="",
                                 epoch=f"{epoch + 1}/{config['epochs']}")
        shown = time.perf_counter()
        for batch in batches:
            yield batch
            progress.advance(task)
            if time.perf_counter() - shown > DISPLAY_SECONDS:
                shown = time.perf_counter()
                progress.update(task, state=describe(counts.totals()))


def describe(line):
    return (f"loss {line['train_loss']:.3f}  accuracy {line['train_accuracy']:.3f}  misled {line['misled']:.1%}  "
            f"erased {line['erased_images']}  {line['images_seen'] / line['train_seconds']:.0f} images/s")


def print_epoch(line, config):
    left = (config["epochs"] - line["epoch"]) * (line["train_seconds"] + line["eval_seconds"])
    console.print(f"epoch {line['epoch']}/{config['epochs']}  {describe(line)}  val {line['val_accuracy']:.3f}  "
                  f"left {int(left) // 60}:{int(left) % 60:02d}", markup=False, soft_wrap=True)


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
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown option {unknown[0]!r}{run._nearest(unknown[0], known)}. See python train.py --help")
    given = vars(given)
    other = {key: given.pop(key) for key in ("resume", "dry_run")}
    for key, text in given.items():
        if run.SETTINGS[key].kind in (int, float):
            with contextlib.suppress(ValueError):  # what is no number is refused when settings are checked
                given[key] = run.SETTINGS[key].kind(text)
    return given, other


def start(options, dry_run):
    """A new run: everything is loaded and checked before its folder is made. Returns what `train` takes, or None."""
    config = run.resolve(run.read_configs(), options)
    device = run.pick_device(config["device"])
    dataset = data.load_dataset(config["dataset"], config["dataset_entry"], config["data_dir"])
    split = the_split(config, dataset)
    torch.manual_seed(config["seed"])
    model, text = run.build_network(config, len(dataset.classes))
    layer, grid = run.try_network(config, model)
    if dry_run:
        return print_dry_run(config, dataset, split, text, model, layer, grid)
    config["layer"] = layer or config["layer"]
    folder = make_folder(config)
    run.write_json(folder / "env.json", run.describe_environment(dataset, device))
    run.write_json(folder / "split.json", {"classes": dataset.classes, "fingerprint": dataset.fingerprint(), **split})
    run.write_json(folder / "config.json", config)  # last: a folder with it is a run that can be resumed
    console.print(f"{folder}: {text}", markup=False, soft_wrap=True)
    return config, folder, dataset, split, model, device


def the_split(config, dataset):
    """The run's split: drawn, or another run's."""
    if config["split_from"] is None:
        return data.make_split(dataset, config["dataset_entry"]["split"], config["seed"], config["train_fraction"])
    other = run.open_run(config["split_from"])
    return data.reuse_split(dataset, other.split, config["train_fraction"], config["seed"],
                            other.folder / "split.json")


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
    """An interrupted run: what it was made with, checked to be still there. Returns what `train` takes."""
    opened = run.open_run(folder)
    other = [key for key in options if key not in ("device", "workers")]
    if other:
        raise UserError(f"--resume goes on with the settings of {folder}: leave out --{other[0].replace('_', '-')}, "
                        "or start a new run")
    config = opened.config | options
    device = run.pick_device(config["device"])
    dataset = opened.dataset()
    torch.manual_seed(config["seed"])
    # only a run that has no checkpoint yet needs the weights it started from
    model, _ = run.build_network(config, len(dataset.classes), False if (opened.folder / "last.pt").exists() else None)
    return config, opened.folder, dataset, opened.split, model, device


def main(arguments=None):
    """The command line; returns the exit status: 2 for what the user can mend, 130 when interrupted."""
    folder = None
    try:
        options, other = parse(arguments)
        ready = resume(other["resume"], options) if other["resume"] else start(options, other["dry_run"])
        if ready is None:
            return 0
        config, folder, dataset, split, model, device = ready
        train(*ready)
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
