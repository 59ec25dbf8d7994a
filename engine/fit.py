"""What fits the memory: --batch-size auto, and the error for a batch that does not fit."""

import contextlib
import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

from engine import before, costs
from engine.dataset import Dataset, Pixels
from engine.files import UserError
from engine.ranks import Stop
from engine.training import Stage

TRIAL_SHARE = 0.92  # of the GPU's memory, which trial steps may take: validation and fragments need some of the rest
TRIAL_STEPS = 3  # the first erases, the second has erased images in it, the third finds all buffers taken
FEWEST_BATCHES = 10  # an epoch of fewer steps learns little, however many images the memory could hold


def fitting_batch(train, config, model, classes, device, images):
    """The most images whose training step fits the GPU, every image selected, at least 10 batches in an epoch.

    Found by trial, with the loop `train` itself on a copy of the network and on blank images. classes: names.
    """
    if device.type != "cuda":
        raise UserError(f"--batch-size auto asks how much a GPU holds, and this run is on {device}: give a number")

    def fits(size):
        torch.cuda.set_per_process_memory_fraction(TRIAL_SHARE, device)
        try:
            trial_steps(train, config, model, classes, device, size)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            costs.release(device)
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    try:
        return largest_batch(fits, max(2, images // FEWEST_BATCHES))
    finally:
        torch.cuda.reset_peak_memory_stats(device)  # a run's peak is not that of its trials


def largest_batch(fits, most):
    """The largest number from 2 to `most` that fits, to within an eighth; above 16 a multiple of 8; or UserError."""
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
        raise UserError("out of memory: --batch-size 2 does not fit; try --amp auto, a smaller --image-size or --model")
    return low if low < 16 else low - low % 8


class Enough(Exception):
    """Raised by `Trial` after its last step."""


class Trial(Stop):
    """Ends `train` from within, after a few steps, before anything is saved."""

    def __init__(self):
        self.steps = 0

    def asked(self, due=False):
        self.steps += 1
        if self.steps == TRIAL_STEPS:
            raise Enough
        return 0, False


def trial_steps(train, config, model, classes, device, size):
    """The first steps of a run with batches of `size`, everything selected, in a folder that is thrown away."""
    side, count = config["image_size"], TRIAL_STEPS * size
    blank = np.broadcast_to(np.zeros(1, dtype=np.uint8), (count, side, side, 3))
    dataset = Dataset("trial", Path(), classes, [str(i) for i in range(count)], np.zeros(count, dtype=np.int64), blank,
                      pixels=Pixels(blank))
    config = config | {"batch_size": size, "select": "all", "schedule": None, "accumulate": 1, "compile": False,
                       "reweight": None, "mode": "staged" if config["mode"] == "staged" else "online"}
    split = {"classes": classes, "fingerprint": "", "train": dataset.ids, "val": dataset.ids[:size]}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        before.keep_heat_network(before.heat_run(config, classes), Path(folder))
        train(config, Path(folder), dataset, split, copy.deepcopy(model), device, Stage(0, 1), Trial())


def out_of_memory(config, folder, device):
    """The error for a batch that does not fit, with what was used and what would fit."""
    gpu, gib = device.type == "cuda", 2**30
    used = "all there is"
    if gpu:
        most, every = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[1]
        used = f"{most / gib:.1f} of {every / gib:.1f} GiB"
    half = f"--batch-size {max(2, config['batch_size'] // 2)} --accumulate {2 * config['accumulate']}"
    ways = ", or ".join([half, *["--amp auto"] * (gpu and config["amp"] == "off")])
    return UserError(f"out of memory on {device}: {config['model']} with batches of {config['batch_size']} images of "
                     f"{config['image_size']} pixels used {used}. Start anew with {ways}; what {folder} has is intact",
                     resumable=False)
