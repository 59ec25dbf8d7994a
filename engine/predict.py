"""What a network predicts: logits of batches of images, and the `predictions.npz` that a run leaves."""

import time
from pathlib import Path

import numpy as np
import torch

from engine import cache, files, hooks, loader, metrics, network


@torch.no_grad()
def predict(model, batches, mean, std, device, amp=None):
    """Logits float32 [N, classes] and labels int64 [N], on the device, over all of `batches`; in eval mode meanwhile.

    batches: pairs of pixels, uint8 [B, 3, H, W], and labels [B]. mean, std: as `network.normalisation`, on the device.
    """
    training = model.training
    model.eval()
    logits, labels = [], []
    for pixels, targets in batches:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits.append(model(loader.prepare(pixels, mean, std)).float())
        labels.append(targets.to(device))
    model.train(training)
    if not labels:  # of several processes this one has no image
        return torch.zeros(0, 1, device=device), torch.zeros(0, dtype=torch.long, device=device)
    return torch.cat(logits), torch.cat(labels)


def batches_in_order(config, dataset, ids, device, **options):
    """Batches of the images `ids`, in their order. options: of `loader.Batches`, as rank and ranks, or decoy."""
    workers = cache.decoding_workers(config)
    return loader.Batches(dataset, ids, config["image_size"], config["batch_size"], device, workers, **options)


def readable_batches(config, dataset, device, unread):
    """Batches of a dataset's images, in order, but for those that cannot be read: `unread`, a dict, gets these.

    Yields pixels, uint8 [B, 3, H, W], on the device, and labels, int64 [B]. unread: {index: what is wrong with it}.
    """
    checked = loader.Checked(dataset, np.arange(len(dataset)), config["image_size"])
    batches = torch.utils.data.DataLoader(checked, config["batch_size"], num_workers=cache.decoding_workers(config),
                                          collate_fn=checked.collate)
    for number, (pixels, wrong, _) in enumerate(batches):
        indices = np.arange(len(wrong)) + number * batches.batch_size
        unread.update((i, text) for i, text in zip(indices.tolist(), wrong) if text is not None)
        if pixels is not None:
            kept = indices[[text is None for text in wrong]]
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device), torch.from_numpy(dataset.labels[kept])


def write_predictions(folder, config, model, dataset, split, device):
    """`predictions` as `predictions.npz`."""
    files.write_arrays(Path(folder) / "predictions.npz", predictions(config, model, dataset, split, device))


def predictions(config, model, dataset, split, device):
    """Predict the validation and test images once, in float32: {name: array}.

    Arrays: PART_ids, PART_logits, PART_labels for each PART of `metrics.PREDICTED` (the last under --decoy alone), and
    PART_groups where the dataset has groups; seconds. Raises UserError where an output is not finite.
    """
    mean, std = (t.to(device) for t in network.normalisation(config, model))
    arrays, start, groups = {}, time.perf_counter(), dict(zip(dataset.ids, dataset.groups or ()))
    for part in metrics.PREDICTED if config["decoy"] else metrics.PREDICTED[:2]:
        ids = split[part.removeprefix("clean_")]
        batches = batches_in_order(config, dataset, ids, device, decoy=not part.startswith("clean_"))
        with hooks.exact_float32():
            logits, labels = predict(model, batches, mean, std, device)
        if wrong := torch.nonzero(~torch.isfinite(logits).all(1)).flatten().tolist():
            raise files.UserError(
                f"the network's output is not finite for {len(wrong)} of {len(logits)} {part} images, the first "
                f"{ids[wrong[0]]!r}: it has diverged. Start anew with a lower --lr", resumable=False)
        arrays |= {f"{part}_ids": as_bytes(ids), f"{part}_logits": logits.cpu().numpy(),
                   f"{part}_labels": labels.cpu().numpy()}
        if groups:
            arrays[f"{part}_groups"] = as_bytes([groups[i] for i in ids])
    arrays["seconds"] = np.array(time.perf_counter() - start)
    return arrays


def as_bytes(texts):
    """Texts as an array of bytes, which NumPy saves without pickle, whatever the texts hold."""
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts])
