"""What `bench.py` and the tests compare with: the grad-cam library (Gildenblat and contributors), and timm's own parts.

    work = heat_of(model, images, classes, "gradcam", explain)      # None: not installed, or not one of its methods
    heat = work()                                                   # NumPy, [N, H, W] in [0, 1], at image size
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm.data
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images

from engine import cache, files, network, settings
from engine.files import UserError

# Our names of the methods -> the library's classes.
METHODS = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "xgradcam": "XGradCAM", "hirescam": "HiResCAM",
           "layercam": "LayerCAM", "elementwise": "GradCAMElementWise", "eigencam": "EigenCAM",
           "eigengradcam": "EigenGradCAM"}


def installed():
    """Whether the grad-cam library is there."""
    return importlib.util.find_spec("pytorch_grad_cam") is not None


def heat_of(model, images, classes, method, explain):
    """A function that makes the library's heat of `images` at the layer that `explain` explains, or None.

    images: [N, 3, H, W], normalised. classes: int64 [N], explained. explain: a `cam.CAM` of the model. The library's
    work: hooks, a forward and a backward pass through all of the network in eval mode, NumPy and OpenCV.
    """
    if method not in METHODS or not installed():
        return None
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with explain, torch.no_grad():
        model.eval()(images)  # so that the layer, and for `grid` the size of the images, are known
    targets = [ClassifierOutputTarget(c) for c in classes.tolist()]

    def work():
        model.eval()
        kind = getattr(pytorch_grad_cam, METHODS[method])
        with kind(model, [explain.layer], reshape_transform=explain.grid) as theirs:
            return theirs(images, targets)

    return work


def timms_epoch(config, device):
    """A function that trains for an epoch with timm's dataset, loader, network and optimizer; and its images.

    Channels last and with the fused optimizer, as ours; it decodes the files in every epoch.
    """
    size = (3, config["image_size"], config["image_size"])
    images = timm.data.create_dataset("folder", config["data_dir"], split="train")
    batches = timm.data.create_loader(
        images, size, config["batch_size"], is_training=True,
        use_prefetcher=device.type == "cuda", device=device, scale=(1, 1), ratio=(1, 1), color_jitter=None,
        num_workers=cache.decoding_workers(config), persistent_workers=True)
    model = network.build_network(config, 2)[0].to(device, memory_format=torch.channels_last).train()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-4, weight_decay=0.05,
                                               fused=device.type in ("cpu", "cuda"))

    def epoch():
        for images, labels in batches:
            images = images.to(device, memory_format=torch.channels_last)
            F.cross_entropy(model(images), labels.to(device)).backward()
            timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch, len(batches) * config["batch_size"]


def options_of_a_run(short, place, options):
    """Settings of a run on crops of scikit-learn's two sample photographs, written as JPEG files into `place`."""
    random, photographs, size = np.random.default_rng(0), load_sample_images().images, options.image_size
    for number in range(options.images):
        part = "train" if number // 2 % 10 else "val" if number // 2 % 20 else "test"
        photograph, path = photographs[number % 2], Path(place, "images", part, "ab"[number % 2], f"{number}.jpg")
        down, across = (random.integers(0, side - size + 1) for side in photograph.shape[:2])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[down:down + size, across:across + size]).save(path, quality=90)
    return {"dataset": "folder", "data_dir": f"{place}/images", "model": short, "pretrained": False, "out": place,
            "image_size": options.image_size, "batch_size": options.batch_size, "device": str(options.device)}


def commands(given, timm_name, script):
    """{kind: command line, but for the epochs}: a run without and with Proxy Attention, and timm's script, or None.

    given: the settings of ours. timm_name: the network's. All have the same images, batch size and optimizer.
    """
    size, batch = str(given["image_size"]), str(given["batch_size"])
    ours = [sys.executable, str(settings.HERE / "train.py"), "--dataset", "folder", "--data-dir", given["data_dir"],
            "--model", given["model"], "--no-pretrained", "--image-size", size, "--batch-size", batch,
            "--device", given["device"], "--out", f"{given['out']}/runs"]
    found = {"none": [*ours, "--cam", "none"], "gradcam": [*ours, "--cam", "gradcam"]}
    if script:
        found["timm"] = [
            sys.executable, script, "--data-dir", given["data_dir"], "--train-split", "train", "--val-split",
            "val", "--model", timm_name, "--num-classes", "2", "--img-size", size, "--batch-size", batch, "--opt",
            "adamw", "--lr", "3e-4", "--clip-grad", "1", "--scale", "1", "1", "--ratio", "1", "1", "--color-jitter",
            "0", "--warmup-epochs", "0", "--workers", "2", "--channels-last", "--output", f"{given['out']}/timm",
            "--device", given["device"]]
    return found


def run_of(command, epochs, place):
    """Run a command line to its end. Raises UserError where it fails."""
    done = subprocess.run([*command, "--epochs", str(epochs)], cwd=place, capture_output=True, text=True)
    shutil.rmtree(f"{place}/runs", ignore_errors=True)
    if done.returncode:
        raise UserError(f"{Path(command[1]).name} ended with status {done.returncode}: "
                        f"{files.short_reason(done.stderr.strip()[-300:])}")
