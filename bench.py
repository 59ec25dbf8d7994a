"""What it costs, side by side in one run: every variant in turn, round after round, medians.

    python bench.py cam --models resnet18         # heat: ours within a step and alone, and the grad-cam library's
    python bench.py step                          # a step with Proxy Attention beside one without, and the library's
    python bench.py train --models resnet18       # complete epochs, beside timm's building blocks in a plain loop
    python bench.py staged --models resnet18      # stage 2 of --mode staged, beside a plain evaluation pass

Times wander with the machine; the ratios of one run are what counts. The grad-cam library takes part where it is
installed (`tests/requirements.txt`). `--csv FILE` keeps the table, with the machine and the settings.
"""

import contextlib
import csv
import gc
import io
import itertools
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import cam
import data
import proxy
import staged
from engine import cache, checkpoint, costs, files, folder, launch, loader, network, predict, settings, training
from study import peers

MODELS = ["resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_small", "swin_tiny"]
MISLED = (0.0, 0.1, 1.0)  # shares of a batch
STEPS = dict.fromkeys(["equal", "loss", "extra"], proxy.STEPS["online"]) | {"second pass": proxy.STEPS["same_step"]}


def now(device):
    """Seconds, after the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def medians(variants, rounds, device):
    """{name: median milliseconds} of {name: function}, after a round to warm up, in an order that changes each round.

    A function that returns a float is counted by these seconds, and not by what the call took. None is left out.
    """
    variants = {name: variant for name, variant in variants.items() if variant}
    taken = {name: [] for name in variants}
    order = random.Random(0)  # what runs first in a round would otherwise always follow the same one
    for round_ in range(rounds + 1):
        for name, variant in order.sample(list(variants.items()), len(variants)):
            gc.collect()
            start = now(device)
            counted = variant()
            seconds = counted if isinstance(counted, float) else now(device) - start
            if round_:
                taken[name].append(1000 * seconds)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_bytes(work, device):
    """Most bytes that `work` had allocated at one time, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


class Table:
    """A table that is printed row by row and, under --csv, written anew with each row."""

    def __init__(self, options, text, **columns):
        """text: what is measured. columns: names and formats of the numbers; before them stands the network."""
        name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else \
            f"{folder.processor()}, {torch.get_num_threads()} threads"
        self.machine = f"{name}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
        self.text = (f"{text}; batch {options.batch_size}, {options.image_size} pixels, float32, random weights, "
                     f"medians of {options.rounds} rounds")
        self.file, self.columns = options.csv, {"network": "", **columns}
        self.rows = [[*self.columns, "machine", "set"]]
        print(f"{self.machine}\n{self.text}\n")
        self._print(self.columns)

    def _print(self, values):
        cells = []
        for value, (name, form) in zip(values, self.columns.items()):
            text = value if isinstance(value, str) else "-" if value is None else format(value, form)
            cells.append(f"{text:>{max(11, len(name))}}" if form else f"{text:16}")
        print("  ".join(cells), flush=True)

    def add(self, *values):
        """A row; None is printed as a dash."""
        self._print(values)
        self.rows.append([*values, self.machine, self.text])
        if self.file:
            text = io.StringIO(newline="")
            csv.writer(text).writerows(self.rows)
            files.write_atomically(Path(self.file), lambda file: file.write(text.getvalue().encode()))


def over(times, name, other):
    """One time as a multiple of another, or None where it was not taken."""
    return times[name] / times[other] if name in times else None


def network_and_images(short, options):
    """A network with random weights for ten classes, and a batch for it, both channels last on the device."""
    config = settings.resolve(settings.read_configs(), {"dataset": "folder", "data_dir": ".", "model": short,
                                                        "pretrained": False, "image_size": options.image_size})
    torch.manual_seed(0)
    model, _ = network.build_network(config, 10)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=options.device)
    return model.to(options.device, memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)


def bench_cam(options):
    """Heat of a batch, network by network and method by method; prints a table, in milliseconds.

    adds: what heat on its own grid takes within a training step. alone: with a forward pass made for the heat, and at
    image size, as the library does it. peak: most memory that the heat takes within a step, as a share of what A, its
    gradient and the maps take.
    """
    table = Table(options, "milliseconds", method="", **dict.fromkeys(["forward", "adds", "alone", "grad-cam"], ".2f"),
                  **{"adds/forward": ".4f", "grad-cam/alone": ".2f", "peak/(A+G+maps)": ".2f"})
    for short in options.models:
        model, images = network_and_images(short, options)
        for method in options.methods:
            table.add(short, method, *bench_cam_method(model, images, method, options.rounds))


def bench_cam_method(model, images, method, rounds):
    """The figures of one row of `bench_cam`."""
    device, explain = images.device, cam.CAM(model, method)
    classes = torch.ones(len(images), dtype=torch.long, device=device)

    def forward():
        start = now(device)
        logits = model.train()(images)
        seconds = now(device) - start
        del logits  # and the graph, whose end is not counted
        return seconds

    def adds():
        with explain:
            logits = model.train()(images)
            start = now(device)
            explain(logits, classes=classes)
            return now(device) - start

    def alone():
        with explain:
            cam.upsample(explain(model.eval()(images), classes=classes), images.shape[-1])

    alone()  # fixes the layer
    variants = {"forward": forward, "adds": adds, "alone": alone,
                "grad-cam": peers.heat_of(model, images, classes, method, explain)}
    times = medians(variants, rounds, device)
    with explain:
        logits = model.train()(images)
        allowed = 4 * (2 * explain.activations[0].numel() + explain(logits, classes=classes).numel())
        peak = peak_bytes(lambda: explain(logits, classes=classes), device)
        del logits
    return (*map(times.get, variants), over(times, "adds", "forward"), over(times, "grad-cam", "alone"), peak / allowed)


class Timed(proxy.Proxy):
    """A Proxy that also times how the copies of the step before are seated."""

    seat = proxy.timed(proxy.Proxy.seat)


def bench_step(options):
    """A step: plain; with Proxy Attention at either budget, with --explain loss (and budget equal), or with
    --same-step; and with the library's heat.

    Which images count as misled is forced, for 0, 10 and 100% of the batch; copies take up to half of the seats, as in
    a run, and with extra ride in half as many seats more, which are computed whether taken or not. parts of equal:
    seconds that a step with budget equal spends on what the plain one has not, on a CPU.
    """
    device, names = options.device, ["plain", "equal", "loss", "extra", "second pass", "library"]
    table = Table(options, f"{options.methods[0]}: milliseconds, then multiples of plain", misled=".0%",
                  **dict.fromkeys(names, ".1f"), **dict.fromkeys([f"{name}/" for name in names[1:]], ".3f"),
                  **{"parts of equal": ".3f", "equal memory": ".3f"})
    for short in options.models:
        model, images = network_and_images(short, options)
        labels, (mean, std) = torch.arange(len(images), device=device) % 10, unchanged(device)
        pixels = loader.pixels_of(images, mean, std / 4)
        for share in MISLED:
            own = {name: [] for name in names}  # seconds of each step
            steps = {name: step_of(name, model, pixels, labels, share, options.methods[0], own[name]) for name in names}
            times = medians(steps, options.rounds, device)
            parts = 1000 * statistics.median(own["equal"][1:]) / times["plain"] if device.type == "cpu" else None
            memory = peak_bytes(steps["equal"], device) / peak_bytes(steps["plain"], device)
            table.add(short, share, *map(times.get, names), *(over(times, name, "plain") for name in names[1:]), parts,
                      memory)


def unchanged(device):
    """(mean, std) that leave images as they are."""
    return torch.zeros(1, 3, 1, 1, device=device), torch.ones(1, 3, 1, 1, device=device)


def eraser_of(name, explain, share, images):
    """The Proxy of a kind of step, which takes the first `share` of each batch for those to erase."""
    def forced(logits, labels, draw):
        return torch.arange(len(draw), device=draw.device) < round(share * len(draw)), draw

    proxy.SELECTIONS[f"forced {share}"] = forced
    config = settings.resolve(settings.read_configs(), {"dataset": "folder", "data_dir": "."})
    config |= {"select": f"forced {share}", "budget": "extra" if name == "extra" else "equal",
               "explain": "loss" if name == "loss" else "predicted"}
    return Timed(config, explain, unchanged(images.device), None if name == "second pass" else max(1, len(images) // 2))


def step_of(name, model, pixels, labels, share, method, own):
    """A function that makes one training step of a kind, from uint8 pixels on; None for a library that is not there.

    own: gets, for each step, the seconds that it spends on Proxy Attention.
    """
    if name == "library" and not peers.installed():
        return None
    device, (mean, std), heat = pixels.device, unchanged(pixels.device), None
    explain, number, step = cam.CAM(model, method), round(share * len(labels)), STEPS.get(name, proxy.plain)
    with explain, torch.no_grad():
        model(loader.prepare(pixels[:2], mean, std))  # fixes the layer
    if name == "library" and number:
        heat = peers.heat_of(model, loader.prepare(pixels[:number], mean, std), labels[:number], method, explain)
    eraser, energy = eraser_of(name, explain, share, pixels), costs.Energy(device, first=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, fused=device.type in ("cpu", "cuda"))

    def work():
        if heat:
            heat()
        eraser.counts = costs.Counts(device, energy)
        step(model.train(), loader.prepare(pixels, mean, std), labels, eraser).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        own.append(eraser.counts.cam_seconds)

    return work


def options_of_a_run(short, place, options):
    """Settings of a run on crops of scikit-learn's two sample photographs, written as JPEG files into `place`."""
    random, photographs, size = np.random.default_rng(0), load_sample_images().images, options.image_size
    for number in range(options.images):
        photograph, path = photographs[number % 2], Path(place, "images", "ab"[number % 2], f"{number}.jpg")
        down, across = (random.integers(0, side - size + 1) for side in photograph.shape[:2])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[down:down + size, across:across + size]).save(path, quality=90)
    return {"dataset": "folder", "data_dir": f"{place}/images", "model": short, "pretrained": False, "out": place,
            "image_size": options.image_size, "batch_size": options.batch_size, "device": str(options.device)}


def bench_train(options):
    """Complete epochs over JPEG files: ours, from the cache, and timm's own parts in a plain loop."""
    device = options.device
    table = Table(options, f"images per second of {options.images} JPEG files", cache="", timm=".1f", ours=".1f",
                  **{"ours/timm": ".3f"})
    for short, kept in itertools.product(options.models, ("off", "auto")):
        with tempfile.TemporaryDirectory() as place:
            given = options_of_a_run(short, place, options) | {"cam": "none", "amp": "off", "cache": kept}
            config = settings.resolve(settings.read_configs(), given)
            theirs, seen = peers.timms_epoch(config, device)
            dataset = data.load_dataset(config)
            cache.open_pixels(dataset, config)
            ids = {"train": dataset.ids, "val": dataset.ids}
            parts = training.Parts(config, None, dataset, ids, device)
            torch.manual_seed(0)
            t = training.Training(config, network.build_network(config, 2)[0], device, 2, 10**6)

            def ours():  # as train.py does, without Proxy Attention
                t.begin_epoch(None)
                for step, (pixels, labels) in enumerate(parts.batches):
                    images, labels = t.prepare(pixels, labels, 0, step, len(parts.batches))
                    t.backward(proxy.plain(t.forward, images, labels, t.proxy).loss, step, len(parts.batches))
                t.skips_in_a_row()

            times = medians({"timm": theirs, "ours": ours}, options.rounds, device)
        own = len(parts.batches) * parts.batches.order.batch_size
        speeds = [1000 * seen / times["timm"], 1000 * own / times["ours"]]
        table.add(short, "on" if kept == "auto" else kept, *speeds, speeds[1] / speeds[0])


def bench_staged(options):
    """Stage 2 of --mode staged over JPEG files, all of them erased, beside a plain evaluation pass over the same."""
    table = Table(options, f"seconds for {options.images} JPEG files, all erased and saved", evaluation=".2f",
                  **{"stage 2": ".2f"}, ratio=".3f")
    for short in options.models:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            given = options_of_a_run(short, place, options) | {"mode": "staged", "select": "all", "cache": "off"}
            config, path, dataset, split, model, device = launch.start(given, False, False, None)
            split["train"] = dataset.ids
            checkpoint.save_checkpoint(path / "last.pt", {"model": model.state_dict()})

            def evaluate():
                model = folder.open_run(path).network().to(device, memory_format=torch.channels_last)
                mean, std = (t.to(device) for t in network.normalisation(config, model))
                batches = predict.batches_in_order(config, dataset, dataset.ids, device)
                predict.predict(model, batches, mean, std, device, network.AMP[config["amp"]])

            def stage_2():
                shutil.rmtree(path / "erased", ignore_errors=True)
                start = now(device)
                staged.erase_stage(config, path, dataset, split, device, 1)
                return now(device) - start

            times = medians({"evaluation": evaluate, "stage 2": stage_2}, options.rounds, device)
        table.add(short, times["evaluation"] / 1000, times["stage 2"] / 1000, over(times, "stage 2", "evaluation"))


BENCHES = {"cam": bench_cam, "step": bench_step, "train": bench_train, "staged": bench_staged}


def parse(arguments):
    """The options of the command line. Raises UserError."""
    parser = launch.Parser("bench.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(BENCHES), help="what to measure")
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"networks (default: {' '.join(MODELS)})")
    parser.add_argument("--methods", nargs="+", default=["gradcam", "gradcam++"], choices=tuple(cam.METHODS),
                        metavar="METHOD", help="CAM methods (default: gradcam gradcam++)")
    parser.add_argument("--batch-size", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default: 224)")
    parser.add_argument("--images", type=int, default=1200, help="of train and staged: files (default: 1200)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--csv", metavar="FILE", help="write the table to this file as well")
    options = Namespace(**parser.parse(arguments))
    options.device = network.pick_device(options.device)
    return options


@launch.program("bench.py")
def main(arguments=None):
    """The command line."""
    options = parse(arguments)
    BENCHES[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
