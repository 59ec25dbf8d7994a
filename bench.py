"""What it costs, side by side in one run: every variant in turn, round after round, medians.

    python bench.py cam                                   # heat: ours within a step and alone, and the libraries'
    python bench.py cam --models resnet18 vit_small --rounds 15 --batch-size 16
    python bench.py compile --models resnet18             # what the graph break of a hook costs a compiled step
    python bench.py staged --models resnet18              # finding, explaining, erasing and saving, beside a plain evaluation pass
    python bench.py leak                                  # what a new split at each proxy round adds to validation accuracy

Times wander with the machine; the ratios of one run are what to read. Needs `tests/requirements.txt` for the grad-cam library;
torch-cam joins where it is installed (`pip install torchcam`).
"""

import argparse
import contextlib
import gc
import io
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import cam
import eval as evaluation
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
    """{name: median milliseconds} of {name: function}, interleaved, after one round to warm up.

    A function that returns seconds is counted by these, and not by what the whole call took.
    """
    taken = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, variant in variants.items():
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


def bench_cam(options):
    """Heat of a whole batch, network by network and method by method; prints a table, in milliseconds.

    adds: what heat on its own grid takes within a training step; to size: bringing it to image size. alone: a forward pass made for
    the heat, to image size, as the libraries do it. peak: most memory that the heat takes within a step, as a share of what A, its
    gradient and the maps take.
    """
    device = run.pick_device(options.device)
    libraries = cam_libraries()
    print(f"{describe_machine(device)}\nbatch {options.batch_size}, {options.image_size} pixels, float32, random weights, "
          f"medians of {options.rounds} rounds, milliseconds")
    names = ["forward", "train step", "adds", "to size", "alone", *libraries]
    print(f"\n{'network':16}{'method':12}" + "".join(f"{n:>12}" for n in names)
          + f"{'adds/forward':>14}" + "".join(f"{n + '/alone':>16}" for n in libraries) + f"{'peak/(A+G+maps)':>17}")
    for short in options.models:
        model, images = network_and_images(short, options, device)
        for method in options.methods:
            bench_cam_method(model, images, method, libraries, options.rounds, device, short)


def bench_cam_method(model, images, method, libraries, rounds, device, short):
    """One line of the table."""
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
    print(f"{short:16}{method:12}" + "".join(f"{times[n]:12.2f}" if n in times else f"{'-':>12}" for n in variants)
          + f"{times['adds'] / times['forward']:14.4f}"
          + "".join(f"{times[n] / times['alone']:16.2f}" if n in times else f"{'-':>16}" for n in libraries)
          + f"{peak / allowed:17.2f}", flush=True)


def bench_compile(options):
    """A training step under torch.compile: plain, with the hook and its graph breaks, and with the heat of every image as well."""
    device = run.pick_device(options.device)
    print(f"{describe_machine(device)}\nbatch {options.batch_size}, {options.image_size} pixels, float32, random weights, "
          f"medians of {options.rounds} rounds, milliseconds\n\n{'network':16}{'eager':>12}{'compiled':>12}{'with hook':>12}"
          f"{'with heat':>12}{'hook/compiled':>16}{'heat/compiled':>16}")
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
        print(f"{short:16}" + "".join(f"{time:12.2f}" for time in times.values())
              + "".join(f"{times[n] / times['compiled']:16.3f}" for n in ("hook", "heat")), flush=True)


def bench_staged(options):
    """Stage 2 of --mode staged over JPEG files, all of them erased, beside a plain evaluation pass over the same files."""
    device = run.pick_device(options.device)
    print(f"{describe_machine(device)}\n{options.images} JPEG files of {options.image_size} pixels, batch {options.batch_size}, all "
          f"erased and saved; random weights, medians of {options.rounds} rounds, seconds\n\n"
          f"{'network':16}{'evaluation':>12}{'stage 2':>12}{'ratio':>12}")
    for short in options.models:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
            draw_photographs(Path(place, "images"), options.images, options.image_size)
            config, folder, dataset, split, model, _ = train.start({
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
        print(f"{short:16}" + "".join(f"{time / 1000:12.2f}" for time in times.values())
              + f"{times['stage 2'] / times['evaluation']:12.3f}", flush=True)


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
    print(f"{describe_machine(run.pick_device(options.device))}\n--dataset noisy_digits --cam none, {options.seeds} seeds: mean and "
          f"standard deviation\n\n{'schedule':20}{'protocol':12}{'validation':>18}{'test':>18}")
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
            print(f"{schedule:20}{protocol:12}" + "".join(f"{m:9.3f} +- {s:5.3f}" for m, s in zip(means[protocol], spread)), flush=True)
        gain = means["resplit"] - means["fixed"]
        print(f"{schedule:20}{'difference':12}" + "".join(f"{g:+9.3f}{'':9}" for g in gain), flush=True)
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


BENCHES = {"cam": bench_cam, "compile": bench_compile, "staged": bench_staged, "leak": bench_leak}


def main(arguments=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(BENCHES), help="what to measure")
    parser.add_argument("--models", nargs="+", default=CAM_MODELS, help=f"networks (default: {' '.join(CAM_MODELS)})")
    parser.add_argument("--methods", nargs="+", default=["gradcam", "gradcam++"], choices=tuple(cam.METHODS),
                        help="CAM methods (default: gradcam gradcam++)")
    parser.add_argument("--batch-size", type=int, default=16, help="images (default: 16)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default: 224)")
    parser.add_argument("--images", type=int, default=1200, help="of staged: files (default: 1200)")
    parser.add_argument("--seeds", type=int, default=5, help="of leak: seeds (default: 5)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to take the median of (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    options = parser.parse_args(arguments)
    try:
        BENCHES[options.what](options)
    except UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
