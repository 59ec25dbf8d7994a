"""What it costs, side by side in one run: every variant in turn, round after round, medians.

    python bench.py cam --models resnet18         # heat: ours within a step and alone, and the grad-cam library's
    python bench.py step                          # a step with Proxy Attention beside one without, and the library's
    python bench.py train --models resnet18       # complete epochs, beside timm's building blocks in a plain loop
    python bench.py staged --models resnet18      # stage 2 of --mode staged, beside a plain evaluation pass
    python bench.py snapshot                      # a step and the pass of --heat snapshot, beside a plain one and peers
    python bench.py runs --script ~/timm/train.py # whole runs, beside timm's own script, which its repository has

Times wander with the machine; the ratios of one run are what counts. The grad-cam library takes part where it is
installed (`tests/requirements.txt`). `--csv FILE` keeps the table, with the machine and the settings.
"""

import contextlib
import functools
import io
import itertools
import shutil
import statistics
import sys
import tempfile
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python leaves it out under PYTHONSAFEPATH

import torch

import cam
import data
import proxy
import snapshot
import staged
from engine import cache, checkpoint, costs, folder, launch, loader, network, predict, settings, training
from engine.options import Parser, program
from study import peers
from study.timing import Table, medians, now, over, peak_bytes, ratio, timings

MODELS = ["resnet18", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_small", "swin_tiny"]
MISLED = (0.0, 0.1, 1.0)  # shares of a batch
STEPS = {"plain": proxy.plain, **dict.fromkeys(["loss", "predicted", "extra"], proxy.STEPS["online"]),
         "second pass": proxy.STEPS["same_step"], "library": proxy.plain}


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

    seat = costs.timed(proxy.Proxy.seat)


def bench_step(options):
    """A step: plain; with Proxy Attention and --explain loss or predicted (budget equal); with the loss's heat and
    budget extra, or --step same_step; and with the library's heat.

    Which images count as misled is forced, for 0, 10 and 100% of the batch; copies take up to half of the seats, as in
    a run, and with extra ride in half as many seats more, which are computed whether taken or not. own parts, memory:
    what the first step beside the plain one spends on what that has not (on a CPU), and its peak.
    """
    device = options.device
    names = ["plain", *(name for name in STEPS if name in options.steps and name != "plain")]
    first = names[1]
    table = Table(options, f"{options.methods[0]}: milliseconds, then multiples of plain", misled=".0%",
                  plain=".1f", **{f"{name}{more}": form for name in names[1:]
                                  for more, form in (("", ".3f"), (" 95%", ""))},
                  **{"own parts": ".3f", "memory": ".3f"})
    for short in options.models:
        model, images = network_and_images(short, options)
        labels, (mean, std) = torch.arange(len(images), device=device) % 10, unchanged(device)
        pixels = loader.pixels_of(images, mean, std / 4)
        for share in MISLED:
            own = {name: [] for name in names}  # seconds of each step
            steps = {name: step_of(name, model, pixels, labels, share, options.methods[0], own[name]) for name in names}
            taken = timings(steps, options.rounds, device)
            plain = statistics.median(taken["plain"])
            parts = 1000 * statistics.median(own[first][1:]) / plain if device.type == "cpu" else None
            memory = peak_bytes(steps[first], device) / peak_bytes(steps["plain"], device)
            ratios = itertools.chain(*(ratio(taken, name, "plain") for name in names[1:]))
            table.add(short, share, plain, *ratios, parts, memory)


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
               "explain": "predicted" if name == "predicted" else "loss"}
    return Timed(config, explain, unchanged(images.device), None if name == "second pass" else max(1, len(images) // 2))


def step_of(name, model, pixels, labels, share, method, own):
    """A function that makes one training step of a kind, from uint8 pixels on; None for a library that is not there.

    own: gets, for each step, the seconds that it spends on Proxy Attention.
    """
    if name == "library" and not peers.installed():
        return None
    device, (mean, std), heat = pixels.device, unchanged(pixels.device), None
    explain, number, step = cam.CAM(model, method), round(share * len(labels)), STEPS[name]
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


def bench_train(options):
    """Complete epochs over JPEG files: ours, from the cache, and timm's own parts in a plain loop."""
    device = options.device
    table = Table(options, f"images per second of {options.images} JPEG files", cache="", timm=".1f", ours=".1f",
                  **{"ours/timm": ".3f"})
    for short, kept in itertools.product(options.models, ("off", "auto")):
        with tempfile.TemporaryDirectory() as place:
            given = peers.options_of_a_run(short, place, options) | {"cam": "none", "amp": "off", "cache": kept}
            config = settings.resolve(settings.read_configs(), given)
            theirs, seen = peers.timms_epoch(config, device)
            dataset = data.load_dataset(config)
            cache.open_pixels(dataset, config)
            ids = [image_id for image_id, part in zip(dataset.ids, dataset.parts) if part == "train"]
            parts = training.Parts(config, None, dataset, {"train": ids, "val": ids}, device)
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
            given = peers.options_of_a_run(short, place, options) | {"mode": "staged", "select": "all", "cache": "off"}
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


def bench_snapshot(options):
    """--heat snapshot, as multiples of a plain step: its own; one whose heat another network gives in the step, as with
    first maps (--heat RUN); one that masks by that, as MaskTune. pass: of a plain evaluation of the same images.
    """
    device = options.device
    table = Table(options, "milliseconds, then multiples of plain", plain=".1f",
                  **{f"{name}{more}": form for name in ("snapshot", "first maps", "MaskTune", "pass")
                     for more, form in (("", ".3f"), (" 95%", ""))})
    for short in options.models:
        model, images = network_and_images(short, options)
        other, _ = network_and_images(short, options)
        labels, (mean, std) = torch.arange(len(images), device=device) % 10, unchanged(device)
        pixels = loader.pixels_of(images, mean, std / 4)
        config = settings.resolve(settings.read_configs(), {"dataset": "folder", "data_dir": ".", "heat": "snapshot",
                                                            "amp": "off", "image_size": options.image_size})
        explained = snapshot.Explained(config, None, other.eval().requires_grad_(False), device)
        explained.batches = lambda ids, **share: [(pixels, labels)]
        (*_, grids), = explained.of(None, "")  # fixes the layer
        masktune = config | {"cam": "xgradcam", "layer": None, "explain": "predicted", "area": "2sd", "fill": "black"}
        steps = {"plain": (proxy.plain, {"explain": None}), "snapshot": (proxy.of_snapshot, {"grids": grids}),
                 "first maps": (proxy.of_another, {"heat_net": other, "explain": explained.cam}),
                 "MaskTune": (proxy.of_another, {"heat_net": other, "explain": cam.CAM(other, "xgradcam")})}
        works = {name: snapshot_step(model, pixels, labels, step, masktune if name == "MaskTune" else config, parts)
                 for name, (step, parts) in steps.items()}
        works |= {"pass": lambda: list(explained.of(None, "")),
                  "evaluation": lambda: predict.predict(other, [(pixels, labels)], mean, std, device)}
        taken = timings(works, options.rounds, device)
        table.add(short, statistics.median(taken["plain"]), *itertools.chain(
            *(ratio(taken, name, "plain") for name in list(steps)[1:]), ratio(taken, "pass", "evaluation")))


def snapshot_step(model, pixels, labels, step, config, parts):
    """A function that makes one training step, from uint8 pixels on, as `bench_snapshot` compares them."""
    device = pixels.device
    eraser = proxy.Proxy(config, parts.pop("explain", None), unchanged(device), **parts)
    optimizer, key = torch.optim.AdamW(model.parameters(), lr=1e-12, fused=device.type in ("cpu", "cuda")), (0, 0, 0)

    def work():
        if eraser.grids is not None:
            eraser.heat_of_batch = data.moved(eraser.grids.float(), pixels.shape[-1], config, key)
        images, _ = data.augment(pixels, labels, *unchanged(device), 10, config, key)
        step(model.train(), images, labels, eraser).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


EPOCHS = 1, 4  # of bench_runs


def bench_runs(options):
    """Whole runs from the command line: ours without and with Proxy Attention, and timm's own train.py (--script).

    An epoch: what each of three more epochs takes. Around: what is left of a run, imports, checks, pictures and all.
    """
    table = Table(options, f"seconds of runs over {options.images} JPEG files", kind="",
                  **{"an epoch": ".2f", "images/s": ".1f", "around": ".2f"})
    for short in options.models:
        with tempfile.TemporaryDirectory() as place:
            given = peers.options_of_a_run(short, place, options)
            images = len(list(Path(given["data_dir"], "train").glob("*/*")))
            timm_name = settings.resolve(settings.read_configs(), given)["model_entry"]["timm"]
            kinds = peers.commands(given, timm_name, options.script)
            variants = {(kind, epochs): functools.partial(peers.run_of, kinds[kind], epochs, place)
                        for kind, epochs in itertools.product(kinds, EPOCHS)}
            times = medians(variants, options.rounds, options.device)
        for kind in kinds:
            few, many = (times[kind, epochs] / 1000 for epochs in EPOCHS)
            epoch = (many - few) / (EPOCHS[1] - EPOCHS[0])
            table.add(short, kind, epoch, images / epoch, few - EPOCHS[0] * epoch)


BENCHES = {"cam": bench_cam, "step": bench_step, "train": bench_train, "staged": bench_staged, "runs": bench_runs,
           "snapshot": bench_snapshot}


def parse(arguments):
    """The options of the command line. Raises UserError."""
    parser = Parser("bench.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(BENCHES), help="what to measure")
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"networks (default: {' '.join(MODELS)})")
    parser.add_argument("--methods", nargs="+", default=["gradcam", "gradcam++"], choices=tuple(cam.METHODS),
                        metavar="METHOD", help="CAM methods (default: gradcam gradcam++)")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=tuple(STEPS), metavar="STEP",
                        help=f"of step: kinds beside plain (default: {', '.join(list(STEPS)[1:])})")
    parser.add_argument("--batch-size", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default: 224)")
    parser.add_argument("--images", type=int, default=1200, help="of train, staged and runs: files (default: 1200)")
    parser.add_argument("--script", metavar="FILE", help="of runs: timm's train.py")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--csv", metavar="FILE", help="write the table to this file as well")
    options = Namespace(**parser.parse(arguments))
    options.device = network.pick_device(options.device)
    return options


@program("bench.py")
def main(arguments=None):
    """The command line."""
    options = parse(arguments)
    BENCHES[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
