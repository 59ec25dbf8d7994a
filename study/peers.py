"""What `bench.py` and the tests compare with: the grad-cam library (Gildenblat and contributors), and timm's own parts.

    work = heat_of(model, images, classes, "gradcam", explain)      # None: not installed, or not one of its methods
    heat = work()                                                   # NumPy, [N, H, W] in [0, 1], at image size
"""

import importlib.util

import timm.data
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F

from engine import cache, network

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
    batches = timm.data.create_loader(
        timm.data.create_dataset("folder", config["data_dir"]), size, config["batch_size"], is_training=True,
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
