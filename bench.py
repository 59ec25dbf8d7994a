"""What it costs, side by side in one run: every variant in turn, round after round, medians.

    python bench.py cam                                   # heat: ours within a step and alone, and the libraries'
    python bench.py cam --models resnet18 vit_small --rounds 15 --batch-size 16
    python bench.py step                                  # a training step with Proxy Attention beside one without, and beside the peers
    python bench.py input --models resnet18               # decoded images from the cache, beside one batch that is there already
    python bench.py train --models resnet18               # whole epochs, beside timm's building blocks driven plainly
    python bench.py compile --models resnet18             # what the graph break of a hook costs a compiled step
    python bench.py staged --models resnet18              # finding, explaining, erasing and saving, beside a plain evaluation pass
    python bench.py leak                                  # what a new split at each proxy round adds to validation accuracy

Times wander with the machine; the ratios of one run are what to read. Needs `tests/requirements.txt` for the grad-cam library;
torch-cam joins where it is installed (`pip install torchcam`). `--csv FILE` keeps the table as well, with the machine and what was set.
"""

import argparse
import contextlib
import csv
import gc
import io
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import timm.data
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
from PIL import Image

import cam
import data
import eval as evaluation
import proxy
import run
import train
from data import UserError

CAM_MODELS = ["resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_small", "swin_tiny"]


def now(device):
    """Seconds, after the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def medians(variants, rounds, device):
    """{name: median milliseconds} of {name: function}, interleaved in an order that changes from round to round, after one to warm up.

    A function that returns seconds is counted by these, and not by what the whole call took.
    """
    taken = {name: [] for name in variants}
    order = random.Random(0)  # what runs first in a round would otherwise always follow the same one
    for round_ in range(rounds + 1):
        for name, variant in order.sample(list(variants.items()), len(variants)):
            gc.collect()
            start = now(device)
            counted = variant()
            seconds = now(device) - start if counted is None else counted
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


def describe_machine(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{run.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"


class Table:
    """A table that is printed row by row and, under --csv, written anew with each row."""

    def __init__(self, options, device, text, columns):
        """text: what was set. columns: {name: width and format of its values, as "12.2f"}; a column of texts, "16s", stands to the left."""
        self.file, self.machine, self.text, self.columns, self.rows = options.csv, describe_machine(device), text, columns, []
        print(f"{self.machine}\n{text}\n\n" + self._line(columns))

    def _line(self, values):
        cells = []
        for value, (name, form) in zip(values, self.columns.items()):
            width, precision = form[:-1].partition(".")[::2]
            width = max(int(width), len(name) + 2)
            text = value if isinstance(value, str) else "-" if value is None else f"{value:.{precision}{form[-1]}}"
            cells.append(f"{text:<{width}}" if form[-1] == "s" else f"{text:>{width}}")
        return "".join(cells).rstrip()

    def add(self, *values):
        """A row; None is printed as a dash."""
        print(self._line(values), flush=True)
        self.rows.append(values)
        if self.file:
            text = io.StringIO(newline="")
            csv.writer(text).writerows([[*self.columns, "machine", "set"], *([*row, self.machine, self.text] for row in self.rows)])
            data.write_atomically(Path(self.file), lambda file: file.write(text.getvalue().encode()))


def over(times, name, other):
    """One time as a multiple of another, or None where it was not taken."""
    return times[name] / times[other] if name in times else None


def bench_cam(options):
    """Heat of a whole batch, network by network and method by method; prints a table, in milliseconds.

    adds: what heat on its own grid takes within a training step; to size: bringing it to image size. alone: a forward pass made for
    the heat, to image size, as the libraries do it. peak: most memory that the heat takes within a step, as a share of what A, its
    gradient and the maps take.
    """
    device = run.pick_device(options.device)
    libraries = cam_libraries()
    names = ["forward", "train step", "adds", "to size", "alone", *libraries]
    table = Table(options, device, f"batch {options.batch_size}, {options.image_size} pixels, float32, random weights, medians of {options.rounds} rounds, "
                  "milliseconds", {"network": "16s", "method": "12s", **dict.fromkeys(names, "12.2f"), "adds/forward": "14.4f",
                                   **{f"{name}/alone": "16.2f" for name in libraries}, "peak/(A+G+maps)": "17.2f"})
    for short in options.models:
        model, images = network_and_images(short, options, device)
        for method in options.methods:
            table.add(short, method, *bench_cam_method(model, images, method, libraries, options.rounds, device))


def bench_cam_method(model, images, method, libraries, rounds, device):
    """The figures of one row."""
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    classes = torch.ones(len(images), dtype=torch.long, device=device)
    explain = cam.CAM(model, method)

    def forward():
        model.train()
        start = now(device)
        logits = model(images)
        seconds = now(device) - start
        del logits
        return seconds

    def step():
        model.train()
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    def adds():
        model.train()
        with explain:
            logits = model(images)
            start = now(device)
            explain(logits, classes=classes)
            return now(device) - start

    def to_size():
        with explain:
            heat = explain(model(images), classes=classes)
            start = now(device)
            cam.upsample(heat, images.shape[-1])
            return now(device) - start

    def alone():
        model.eval()
        with explain:
            cam.upsample(explain(model(images), classes=classes), images.shape[-1])

    alone()  # fixes the layer
    variants = {"forward": forward, "train step": step, "adds": adds, "to size": to_size, "alone": alone}
    for name, library in libraries.items():
        variants[name] = library(model, images, classes, method, explain)
    times = medians({name: v for name, v in variants.items() if v}, rounds, device)

    model.train()
    with explain:
        logits = model(images)
        allowed = 4 * (2 * explain._activations[0].numel() + explain(logits, classes=classes).numel())
        peak = peak_bytes(lambda: explain(logits, classes=classes), device)
        del logits
    return (*map(times.get, variants), times["adds"] / times["forward"], *(over(times, name, "alone") for name in libraries), peak / allowed)


def bench_compile(options):
    """A training step under torch.compile: plain, with the hook and its graph breaks, and with the heat of every image as well."""
    device = run.pick_device(options.device)
    table = Table(options, device, f"batch {options.batch_size}, {options.image_size} pixels, float32, random weights, medians of {options.rounds} rounds, "
                  "milliseconds", {"network": "16s", **dict.fromkeys(["eager", "compiled", "with hook", "with heat"], "12.2f"),
                                   "hook/compiled": "16.3f", "heat/compiled": "16.3f"})
    for short in options.models:
        model, images = network_and_images(short, options, device)
        model.train()
        labels = torch.zeros(len(images), dtype=torch.long, device=device)
        plain, hooked = torch.compile(model), torch.compile(model)
        explain = cam.CAM(hooked, options.methods[0])
        with explain:
            model(images)  # fixes the layer

        def step(network, block=contextlib.nullcontext(), heat=False):
            with block:
                logits = network(images)
                if heat:
                    explain(logits)
                F.cross_entropy(logits, labels).backward()
            model.zero_grad(set_to_none=True)

        times = medians({"eager": lambda: step(model), "compiled": lambda: step(plain), "hook": lambda: step(hooked, explain),
                         "heat": lambda: step(hooked, explain, True)}, options.rounds, device)
        table.add(short, *times.values(), over(times, "hook", "compiled"), over(times, "heat", "compiled"))


STEP_MODELS = ["resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_small"]
MISLED = (0.0, 0.1, 1.0)


def bench_step(options):
    """A training step: plain; with Proxy Attention at either budget; with the library's maps; with a forward pass of its own for the heat.

    Which images count as misled is forced, for 0, 10 and 100% of the batch; erased images take up to half of the seats, as by default.
    """
    device = run.pick_device(options.device)
    names = ["plain", "equal", "extra", "second pass", "library"]
    table = Table(options, device, f"batch {options.batch_size}, {options.image_size} pixels, float32, random weights, {options.methods[0]}, medians of "
                  f"{options.rounds} rounds, milliseconds; then as multiples of plain",
                  {"network": "16s", "misled": "8.0%", **dict.fromkeys(names, "13.1f"), **{f"{name}/": "13.3f" for name in names[1:]},
                   "parts of equal": "16.3f", "equal memory": "14.3f"})
    for short in options.models:
        model, images = network_and_images(short, options, device)
        labels, pixels = torch.arange(len(images), device=device) % 10, data.pixels_of(images, torch.zeros(1, device=device), torch.full((1,), 0.25, device=device))
        for share in MISLED:
            parts = []  # seconds that each step with budget equal spends on what the plain one has not
            steps = {name: step_of(name, model, pixels, labels, share, options, device, parts if name == "equal" else []) for name in names}
            steps = {name: step for name, step in steps.items() if step}
            times = medians(steps, options.rounds, device)
            own = 1000 * statistics.median(parts[1:]) / times["plain"] if device.type == "cpu" else None
            memory = peak_bytes(steps["equal"], device) / peak_bytes(steps["plain"], device)
            table.add(short, share, *map(times.get, names), *(over(times, name, "plain") for name in names[1:]), own, memory)


@contextlib.contextmanager
def timed(parts):
    """Add what a block takes to the last of `parts`."""
    start = time.perf_counter()
    yield
    parts[-1] += time.perf_counter() - start


def step_of(name, model, pixels, labels, share, options, device, parts):
    """A function that makes one training step of a kind, from uint8 pixels on; None for the library where it is not installed.

    parts: gets, for each step with Proxy Attention, the seconds between the plain step's own work; on a GPU they say nothing.
    """
    config = run.resolve(run.read_configs(), {"dataset": "folder", "data_dir": ".", "budget": "extra" if name == "extra" else "equal"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, fused=device.type in ("cpu", "cuda"))
    mean = torch.zeros(1, 3, 1, 1, device=device)
    explain, waiting, seats = cam.CAM(model, options.methods[0]), [None], max(1, len(labels) // 2)
    number = round(share * len(labels))

    def erase(batch, targets, logits, fresh, places):
        proxy.SELECTIONS["forced"] = lambda logits, labels, draw: (torch.arange(len(draw), device=device) < number, draw)
        rows, chosen = proxy.select("forced", logits, targets, fresh, places, (0,))
        return rows, proxy.erased_copies(config, explain, batch, targets, logits, fresh, rows, chosen, (mean, mean + 1), (0,))[0]

    def finish(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def plain():
        model.train()
        finish(F.cross_entropy(model(data.prepare(pixels, mean, mean + 1)), labels))

    def ours():
        model.train()
        batch, targets, fresh = data.prepare(pixels, mean, mean + 1), labels, torch.ones_like(labels, dtype=torch.bool)
        parts.append(0.0)
        with timed(parts):
            if waiting[0] is not None:
                batch, targets, fresh = proxy.seat(batch, labels, waiting[0], config["budget"])
                waiting[0] = None
        with explain:
            logits = model(batch)
            loss = F.cross_entropy(logits, targets)
            with timed(parts):
                _, waiting[0] = erase(batch, targets, logits, fresh, seats)
        finish(loss)

    def second_pass():
        model.train()
        images, fresh = data.prepare(pixels, mean, mean + 1), torch.ones_like(labels, dtype=torch.bool)
        with explain:
            rows, copies = erase(images, labels, model(images), fresh, len(labels))
        batch, targets, _ = proxy.join(images, labels, rows, copies, "equal")
        finish(F.cross_entropy(model(batch), targets))

    with explain, torch.no_grad():
        model(data.prepare(pixels[:2], mean, mean + 1))  # fixes the layer
    if name != "library":
        return {"plain": plain, "equal": ours, "extra": ours, "second pass": second_pass}[name]
    maps = cam_libraries().get("grad-cam")
    if maps is None:
        return None

    def library():
        if number:
            maps(model, data.prepare(pixels[:number], mean, mean + 1), labels[:number], options.methods[0], explain)()
        plain()

    return library


def bench_input(options):
    """The same training steps on images from the cache, from files, and on one batch that is there already; images per second."""
    device = run.pick_device(options.device)
    table = Table(options, device, f"{options.images} JPEG files of {options.image_size} pixels, batch {options.batch_size}, no Proxy Attention, medians of "
                  f"{options.rounds} epochs, images per second",
                  {"network": "16s", **dict.fromkeys(["one batch", "cache", "files"], "12.1f"), "cache/one": "12.3f", "files/one": "12.3f"})
    for short in options.models:
        with tempfile.TemporaryDirectory() as place:
            config, dataset, model = files_and_network(short, place, options, device)
            files = data.Batches(dataset, dataset.ids, options.image_size, options.batch_size, device,
                                 evaluation.decoding_workers(config), seed=0)
            evaluation.open_pixels(config, dataset)
            cached = data.Batches(dataset, dataset.ids, options.image_size, options.batch_size, device, seed=0)
            t = train.set_up(config, model, device, len(dataset.classes), 10**6)
            t.begin_epoch(0)
            one = [tuple(part.clone() for part in next(iter(cached)))] * len(cached)
            times = medians({"one": lambda: epoch_of(t, config, one), "cache": lambda: epoch_of(t, config, cached),
                             "files": lambda: epoch_of(t, config, files)}, options.rounds, device)
        seen = len(cached) * cached.order.batch_size * 1000
        table.add(short, *(seen / time for time in times.values()), over(times, "one", "cache"), over(times, "one", "files"))


def files_and_network(short, place, options, device):
    """A folder of photographs under `place`, listed, and a network to train on it."""
    draw_photographs(Path(place, "images"), options.images, options.image_size)
    config = run.resolve(run.read_configs(), {
        "dataset": "folder", "data_dir": f"{place}/images", "model": short, "pretrained": False, "cam": "none", "out": place,
        "image_size": options.image_size, "batch_size": options.batch_size, "amp": "off"})
    dataset = run.load_dataset(config)
    torch.manual_seed(0)
    return config, dataset, run.build_network(config, len(dataset.classes))[0]


def epoch_of(t, config, batches):
    """The steps of `train.train`, without Proxy Attention."""
    for step, (pixels, labels) in enumerate(batches):
        images = data.augment(pixels, t.mean, t.std, config, (0, 0, step))
        t.backward(train.forward(t.network, images, labels, t.amp)[1], step, len(batches))


def bench_train(options):
    """Whole epochs over JPEG files: ours, from the cache, and timm's dataset, loader, network and optimizer in a plain loop."""
    device = run.pick_device(options.device)
    table = Table(options, device, f"{options.images} JPEG files of {options.image_size} pixels, batch {options.batch_size}, float32, medians of "
                  f"{options.rounds} epochs, images per second", {"network": "16s", "timm": "12.1f", "ours": "12.1f", "ours/timm": "12.3f"})
    for short in options.models:
        with tempfile.TemporaryDirectory() as place:
            config, dataset, model = files_and_network(short, place, options, device)
            evaluation.open_pixels(config, dataset)
            batches = data.Batches(dataset, dataset.ids, options.image_size, options.batch_size, device, seed=0)
            t = train.set_up(config, model, device, len(dataset.classes), 10**6)
            t.begin_epoch(0)
            theirs, _ = run.build_network(config, len(dataset.classes))
            theirs = theirs.to(device).train()
            optimizer = timm.optim.create_optimizer_v2(theirs, "adamw", lr=1e-4, weight_decay=0.05)
            loader = timm.data.create_loader(
                timm.data.create_dataset("folder", f"{place}/images"), (3, options.image_size, options.image_size), options.batch_size,
                is_training=True, use_prefetcher=device.type == "cuda", device=device, scale=(1, 1), ratio=(1, 1), color_jitter=None,
                num_workers=evaluation.decoding_workers(config), persistent_workers=True)

            def plainly():
                for images, labels in loader:
                    F.cross_entropy(theirs(images.to(device)), labels.to(device)).backward()
                    timm.utils.dispatch_clip_grad(theirs.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()

            times = medians({"timm": plainly, "ours": lambda: epoch_of(t, config, batches)}, options.rounds, device)
        seen = [len(loader) * options.batch_size, len(batches) * batches.order.batch_size]
        speeds = [1000 * count / time for count, time in zip(seen, times.values())]
        table.add(short, *speeds, speeds[1] / speeds[0])


def bench_staged(options):
    """Stage 2 of --mode staged over JPEG files, all of them erased, beside a plain evaluation pass over the same files."""
    device = run.pick_device(options.device)
    table = Table(options, device, f"{options.images} JPEG files of {options.image_size} pixels, batch {options.batch_size}, all erased and saved; random "
                  f"weights, medians of {options.rounds} rounds, seconds", {"network": "16s", "evaluation": "12.2f", "stage 2": "12.2f", "ratio": "12.3f"})
    for short in options.models:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            draw_photographs(Path(place, "images"), options.images, options.image_size)
            config, folder, dataset, split, model, _ = train.start({  # no cache: both read the files
                "dataset": "folder", "data_dir": f"{place}/images", "model": short, "pretrained": False, "mode": "staged",
                "select": "all", "image_size": options.image_size, "batch_size": options.batch_size, "out": place,
                "device": options.device}, False, False)
            split["train"] = dataset.ids
            run.save_checkpoint(folder / "last.pt", {"model": model.state_dict()})

            def evaluate():
                network = run.open_run(folder).network().to(device, memory_format=torch.channels_last)
                mean, std = (t.to(device) for t in run.normalisation(config, network))
                evaluation.predict(network, evaluation.batches_in_order(config, dataset, dataset.ids, device), mean, std, device,
                                   run.pick_amp(config["amp"], device))

            def stage_2():
                shutil.rmtree(folder / "erased", ignore_errors=True)
                start = now(device)
                train.erase_stage(config, folder, dataset, split, device, 1)
                return now(device) - start

            times = medians({"evaluation": evaluate, "stage 2": stage_2}, options.rounds, device)
        table.add(short, *(time / 1000 for time in times.values()), over(times, "stage 2", "evaluation"))


def draw_photographs(folder, count, size):
    """Crops of scikit-learn's two sample photographs, as JPEG files in two class folders."""
    from sklearn.datasets import load_sample_images

    random, photographs = np.random.default_rng(0), load_sample_images().images
    for number in range(count):
        photograph = photographs[number % 2]
        down, across = (random.integers(0, side - size + 1) for side in photograph.shape[:2])
        path = folder / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[down:down + size, across:across + size]).save(path, quality=90)


LEAK_SCHEDULES = ["20,p,19", "5,p,9,p,9,p,9,p,4"]  # as published


def bench_leak(options):
    """Validation and test accuracy with a fixed split and with a new one at each p; nothing is erased in any of these runs."""
    table = Table(options, run.pick_device(options.device), f"--dataset noisy_digits --cam none, {options.seeds} seeds: mean and standard deviation",
                  {"schedule": "20s", "protocol": "12s", "validation": "12.3f", "sd": "9.3f", "test": "9.3f", "sd of test": "9.3f"})
    for schedule in LEAK_SCHEDULES:
        means = {}
        for protocol in ("fixed", "resplit"):
            found = []
            for seed in range(options.seeds):
                with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
                    status = train.main(["--dataset", "noisy_digits", "--cam", "none", "--schedule", schedule, "--protocol", protocol,
                                         "--seed", str(seed), "--out", place, "--name", "run", "--device", options.device])
                    if status:
                        raise UserError(f"a run ended with status {status}")
                    metrics = run.read_json(Path(place, "run", "metrics.json"))
                found.append([metrics[part]["accuracy"] for part in ("val", "test")])
            means[protocol] = np.mean(found, axis=0)
            spread = np.std(found, axis=0, ddof=1) if len(found) > 1 else [float("nan")] * 2
            table.add(schedule, protocol, means[protocol][0], spread[0], means[protocol][1], spread[1])
        gain = means["resplit"] - means["fixed"]
        table.add(schedule, "difference", gain[0], None, gain[1], None)
    print("\nBoth protocols train the same steps on as many images. What resplit adds on validation and not on test is the leak.")


def network_and_images(short, options, device):
    """A network with random weights for ten classes, and a batch for it, both channels last on the device."""
    config = run.resolve(run.read_configs(), {"dataset": "folder", "data_dir": ".", "model": short, "pretrained": False,
                                              "image_size": options.image_size})
    torch.manual_seed(0)
    model, _ = run.build_network(config, 10)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device)
    return (model.to(device, memory_format=torch.channels_last), images.to(memory_format=torch.channels_last))


def cam_libraries():
    """{name: function of (model, images, classes, method, ours) -> function to time, or None} of what is installed."""
    found = {}
    try:
        import pytorch_grad_cam as library
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        print("grad-cam is not installed: pip install -r tests/requirements.txt")
    else:
        known = {"gradcam": library.GradCAM, "gradcam++": library.GradCAMPlusPlus, "xgradcam": library.XGradCAM,
                 "hirescam": library.HiResCAM, "layercam": library.LayerCAM, "elementwise": library.GradCAMElementWise,
                 "eigencam": library.EigenCAM, "eigengradcam": library.EigenGradCAM}

        def grad_cam(model, images, classes, method, ours):
            """Hooks, a forward and a backward pass through the whole network, NumPy and OpenCV image by image, at image size."""
            if method not in known:
                return None
            targets = [ClassifierOutputTarget(c) for c in classes.tolist()]

            def work():
                model.eval()
                with known[method](model, ours.layers, reshape_transform=ours.grid) as explain:
                    explain(images, targets)

            with ours:  # so that `ours.grid` knows the images' proportions
                ours._before(model, (images,), {})
            return work

        found["grad-cam"] = grad_cam
    try:
        from torchcam import methods
    except ImportError:
        pass
    else:
        others = {"gradcam": methods.GradCAM, "gradcam++": methods.GradCAMpp, "xgradcam": methods.XGradCAM,
                  "layercam": methods.LayerCAM}

        def torch_cam(model, images, classes, method, ours):
            """Hooks, a forward pass and a backward pass to the layer, brought to image size as ours is."""
            with ours:
                A = ours.layers and model.eval()(images[:1]) is not None and ours._activations[0]
            if method not in others or A.dim() != 4 or A.shape[1] == A.shape[2]:  # it knows [B, C, h, w] alone
                return None

            def work():
                model.eval()
                with others[method](model, target_layer=ours.layer_name) as explain:
                    maps = explain(classes.tolist(), model(images))[0]
                    F.interpolate(maps[:, None], size=images.shape[-2:], mode="bilinear")

            return work

        found["torch-cam"] = torch_cam
    return found


BENCHES = {"cam": bench_cam, "step": bench_step, "input": bench_input, "train": bench_train, "compile": bench_compile, "staged": bench_staged, "leak": bench_leak}


def main(arguments=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(BENCHES), help="what to measure")
    parser.add_argument("--models", nargs="+", help=f"networks (default: {' '.join(CAM_MODELS)}; of step {' '.join(STEP_MODELS)})")
    parser.add_argument("--methods", nargs="+", default=["gradcam", "gradcam++"], choices=tuple(cam.METHODS),
                        help="CAM methods (default: gradcam gradcam++)")
    parser.add_argument("--batch-size", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default: 224)")
    parser.add_argument("--images", type=int, default=1200, help="of staged: files (default: 1200)")
    parser.add_argument("--seeds", type=int, default=5, help="of leak: seeds (default: 5)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--csv", metavar="FILE", help="write the table to this file as well")
    options = parser.parse_args(arguments)
    options.models = options.models or (STEP_MODELS if options.what == "step" else CAM_MODELS)
    try:
        BENCHES[options.what](options)
    except UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
