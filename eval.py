"""What a run is worth: predictions, metrics, costs and pictures.

    python eval.py runs/NAME              # print metrics and costs again, rewrite metrics.json and the pictures
    python eval.py runs/A runs/B …        # compare runs that differ in one setting, seed by seed
    python eval.py --experiment NAME      # compare the arms of an experiment
    python eval.py runs/NAME --explanations            # deletion, insertion, ROAD …: how good is its heat?
    python eval.py runs/NAME --leaning                 # does it recognise images by few pixels, as by a shortcut?
    python eval.py runs/NAME --where --layer -2        # how much of a planted square, or of the object, does each method find there?
    python eval.py runs/NAME --image cat.jpg FOLDER --cam gradcam layercam       # where it looks in these images
    python eval.py --model efficientnet_lite0 --weights FILE --image cat.jpg     # the same for a network without a run

A run leaves `predictions.npz` (ids, labels and logits of the validation and test images) and `log.jsonl`; everything here
follows from these two, so that the same run gives the same figures, byte for byte. Only `sheet.png` needs the images and the
network again.

The network that is judged is the one after the last epoch, whose learning rate has come down to zero, and not the best of all
epochs on validation: with a hundred validation images the best is the luckiest, and on digits it did worse on test in every
trial where the two differed. `best.pt` is kept for those who want it.
"""

import argparse
import contextlib
import math
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from rich.progress import track
from sklearn.metrics import (accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss,
                             precision_recall_fscore_support, top_k_accuracy_score)

import cache
import cam
import compare
import data
import experiment
import explain
import proxy
import run
from data import UserError

PREDICTED = ("val", "test", "clean_test")  # the last, under --decoy, without decoys
LEAK = "validation images have been trained on; validation accuracy says nothing about new images"
ECE_BINS = 15  # as Guo et al. 2017
SHEET_IMAGES = 8
HEAT_COLOURS = colormaps["viridis"]  # perceptually uniform and safe for colour-blind readers

# --- predictions ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, batches, mean, std, device, amp=None):
    """Logits float32 [N, classes] and labels int64 [N], both on the device, over all of `batches`; eval mode meanwhile."""
    training = model.training
    model.eval()
    logits, labels = [], []
    for pixels, targets in batches:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            logits.append(model(data.prepare(pixels, mean, std)).float())
        labels.append(targets.to(device))
    model.train(training)
    if not labels:  # of several processes this one has no image
        return torch.zeros(0, 1, device=device), torch.zeros(0, dtype=torch.long, device=device)
    return torch.cat(logits), torch.cat(labels)


def batches_in_order(config, dataset, ids, device, **options):
    """Batches of the images `ids`, in their order. options: rank and ranks, of which this is the share; decoy."""
    return data.Batches(dataset, ids, config["image_size"], config["batch_size"], device, decoding_workers(config), **options)


def open_pixels(config, dataset, build=True):
    """Set `dataset.pixels` as --cache has it; returns what to say of it, or None."""
    dataset.pixels, text = cache.open_pixels(dataset, config["image_size"], config["cache"], run.cache_folder(config),
                                             decoding_workers(config), build)
    return text


def check_images(config, dataset):
    """{index: what is wrong with it} of the images that cannot be used."""
    return cache.check_images(dataset, config["image_size"], config["cache"], run.cache_folder(config), decoding_workers(config))


def decoding_workers(config):
    """Processes that decode images: as configured, or one per core, 8 at most."""
    return config["workers"] if config["workers"] is not None else min(8, os.cpu_count() or 1)


def write_predictions(folder, config, model, dataset, split, device):
    """Predict the validation and test images once, in float32, into `predictions.npz`; under --decoy those of the test also without decoys.

    Arrays: PART_ids, PART_logits, PART_labels, and PART_groups where the dataset has groups, for each PART; seconds.
    """
    mean, std = (t.to(device) for t in run.normalisation(config, model))
    arrays, start, groups = {}, time.perf_counter(), dict(zip(dataset.ids, dataset.groups or ()))
    for part in PREDICTED if config["decoy"] else PREDICTED[:2]:
        ids = split[part.removeprefix("clean_")]
        batches = batches_in_order(config, dataset, ids, device, decoy=not part.startswith("clean_"))
        logits, labels = predict(model, batches, mean, std, device)
        if not torch.isfinite(logits).all():
            worst = torch.nonzero(~torch.isfinite(logits).all(1)).flatten().tolist()
            raise UserError(f"the network's output is not finite for {len(worst)} of {len(logits)} {part} images, the first "
                            f"{ids[worst[0]]!r}: it has diverged. Start anew with a lower --lr", resumable=False)
        arrays |= {f"{part}_ids": _texts(ids), f"{part}_logits": logits.cpu().numpy(), f"{part}_labels": labels.cpu().numpy()}
        if groups:
            arrays[f"{part}_groups"] = _texts([groups[i] for i in ids])
    run.write_arrays(Path(folder) / "predictions.npz", {**arrays, "seconds": np.array(time.perf_counter() - start)})


def _texts(texts):
    """As an array of bytes, which needs no pickle, whatever the texts."""
    return np.array([text.encode("utf-8", "surrogateescape") for text in texts])


# --- metrics -------------------------------------------------------------------------------------------------------


def softmax(logits):
    """Probabilities float64 [N, C] of logits [N, C]."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(1, keepdims=True)


def expected_calibration_error(confidence, correct, bins=ECE_BINS):
    """Guo et al. 2017, equation 3, with bins of equal width: mean over bins of |accuracy - confidence|, by size.

    confidence: [N] in (0, 1]. correct: bool [N].
    """
    edge = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(edge, correct, bins) - np.bincount(edge, confidence, bins)
    return float(np.abs(gap).sum() / len(confidence))


def metrics(labels, logits, classes):
    """The figures of one part of the split.

    labels: int [N]. logits: float [N, C]. classes: C names. Averages called macro are over classes, absent ones counting as 0.
    brier: sum over classes of squared differences, mean over images, 0 to 2 (Brier 1950). top5: null for up to 5 classes.
    """
    probabilities = softmax(logits)
    predicted, every = logits.argmax(1), np.arange(len(classes))
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    brier = np.mean(np.sum((probabilities - np.eye(len(classes))[labels]) ** 2, axis=1))
    seen = np.unique(labels)
    return {
        "images": len(labels),
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(recall[seen].mean() if len(seen) < len(classes)
                                   else balanced_accuracy_score(labels, predicted)),
        "precision_macro": float(precision.mean()),
        "recall_macro": float(recall.mean()),
        "f1_macro": float(f1.mean()),
        "top5": float(top_k_accuracy_score(labels, logits, k=5, labels=every)) if len(classes) > 5 else None,
        "log_loss": float(log_loss(labels, probabilities, labels=every)),
        "brier": float(brier),
        "ece": expected_calibration_error(probabilities.max(1), predicted == labels),
        "per_class": {name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]),
                             "images": int(support[i])} for i, name in enumerate(classes)},
    }


def costs(log, prediction_seconds, stages=()):
    """What the run took, from its log: sums over epochs, peaks as peaks. None where the machine cannot tell.

    energy_wh: of training, from the counters that `run.Energy` finds. second_pass_images: images that went through the network once
    more, only to be looked at: with --same-step each batch that is erased, and in a staged run the training images of each
    stage 2, whose seconds count as the heat's and as training.
    """
    looking = [line for line in stages if line["stage"] == 2]
    looking_seconds = sum(line["seconds"] for line in looking)

    def total(key):
        return sum(line[key] for line in log)

    def peak(key):
        return max((line[key] for line in log if line[key] is not None), default=None)

    energies = [line["energy_wh"] for line in (*log, *looking) if line["energy_wh"] is not None]
    seconds = total("train_seconds") + looking_seconds
    return {
        "train_seconds": round(seconds, 3),
        "cam_seconds": round(total("cam_seconds") + looking_seconds, 3),
        "eval_seconds": round(total("eval_seconds") + prediction_seconds, 3),
        "images_seen": total("images_seen"),
        "erased_images": total("erased_images"),
        "second_pass_images": total("second_pass_images") + sum(line["images"] for line in looking),
        "optimizer_steps": total("optimizer_steps"),
        "skipped_steps": total("skipped_steps"),
        "images_per_second": round(total("images_seen") / seconds, 2) if seconds else None,
        "peak_gpu_allocated_mb": peak("peak_gpu_allocated_mb"),
        "peak_gpu_reserved_mb": peak("peak_gpu_reserved_mb"),
        "peak_host_mb": peak("peak_host_mb"),
        "energy_wh": round(sum(energies), 4) if energies else None,
    }


def group_metrics(labels, logits, groups, classes):
    """Accuracy of each class within each group, and of the worst of these (Sagawa et al. 2020), which is the one to watch.

    groups: [N] bytes. Returns {"CLASS, GROUP": {"images", "accuracy"}}, and the lowest accuracy.
    """
    found, right = {}, logits.argmax(1) == labels
    for name in np.unique(groups):
        for c in np.unique(labels[groups == name]):
            inside = right[(groups == name) & (labels == c)]
            found[f"{classes[c]}, {name.decode('utf-8', 'surrogateescape')}"] = {"images": len(inside), "accuracy": float(inside.mean())}
    return found, min(each["accuracy"] for each in found.values())


def best_epoch(log):
    """Number of the epoch with the highest validation accuracy; of equals, the one with the lowest validation loss."""
    return max(range(len(log)), key=lambda i: (log[i]["val_accuracy"], -log[i]["val_loss"])) + 1


def judge(folder):
    """Write and return `metrics.json` of a run that has its predictions."""
    opened, found = run.open_run(folder), run.read_predictions(folder)
    stages = run.read_lines(opened.folder / "stages.jsonl")
    if not opened.log:
        raise UserError(f"{folder}: log.jsonl is missing or empty, so the costs are not known")
    classes = opened.split["classes"]
    result = {part: metrics(found[f"{part}_labels"], found[f"{part}_logits"], classes) for part in PREDICTED if f"{part}_labels" in found}
    for part in result:
        if f"{part}_groups" in found:
            groups, worst = group_metrics(*(found[f"{part}_{what}"] for what in ("labels", "logits", "groups")), classes)
            result[part] |= {"groups": groups, "worst_group": worst}
    result |= {"cost": costs(opened.log, float(found["seconds"]), stages), "epochs": len(opened.log),
               "best_epoch": best_epoch(opened.log), "protocol": opened.config["protocol"],
               "skipped_images": len(opened.split["skipped"])}
    if stages:
        result["ended"] = stages[-1].get("ended")
    run.write_json(opened.folder / "metrics.json", result)
    return result


def describe(folder, result):
    """The figures of `metrics.json` as lines for a person."""
    names = ["accuracy", "balanced_accuracy", "precision_macro", "recall_macro", "f1_macro", "top5", "log_loss", "brier",
             "ece"] + ["worst_group"] * ("worst_group" in result["test"])
    parts = [part for part in PREDICTED if part in result]
    lines = [f"{folder}: {result['epochs']} epochs, judged after the last; best on validation was {result['best_epoch']}", "",
             f"{'':22}" + "".join(f"{part:>12}" for part in parts), f"{'images':22}" + "".join(f"{result[part]['images']:>12}" for part in parts)]
    for name in names:
        lines.append(f"{name:22}" + "".join(
            f"{'-':>12}" if result[part][name] is None else f"{result[part][name]:>12.4f}" for part in parts))
    if "clean_test" in parts:
        lines += ["", "--decoy: squares tell the truth in val and lie in test; clean_test is the test without them"]
    if "groups" in result["test"]:
        lines += ["", "test accuracy by class and group: " + "; ".join(
            f"{name} {group['accuracy']:.4f} of {group['images']}" for name, group in result["test"]["groups"].items())]
    lines.append("")
    for name, value in result["cost"].items():
        lines.append(f"{name:22}{'not measured here' if value is None else f'{value:,}':>20}")
    if result["cost"]["second_pass_images"]:
        lines[-1:] += ["", "second_pass_images went through the network once more, only for the heat that says what to erase"]
    if result["skipped_images"]:
        lines += ["", f"--skip-bad: {result['skipped_images']} images that cannot be used were left out, see {folder}/bad-images.txt"]
    if result["protocol"] == "resplit":
        lines += ["", f"WARNING, --protocol resplit: {LEAK}"]
    return "\n".join(lines)


# --- pictures ------------------------------------------------------------------------------------------------------


def save_figure(figure, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for letters that the font lacks
        run.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _plain(axes):
    """Class names are shown as they are, also where they hold dollar signs."""
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title):
        text.set_parse_math(False)


def draw_confusion(folder, labels, logits, classes):
    """`confusion.png`: share of each true class that was predicted as each class; counts where they can be read."""
    counts = confusion_matrix(labels, logits.argmax(1), labels=np.arange(len(classes)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(14, 4 + 0.3 * len(classes))
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true", title="Test images: true against predicted class")
    figure.colorbar(axes.imshow(shares, vmin=0, vmax=1, cmap="cividis"), label="share of the true class")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(column, row, count, ha="center", va="center", fontsize=8,
                          color="black" if shares[row, column] > 0.5 else "white")
    _plain(axes)
    save_figure(figure, folder / "confusion.png")


def draw_reliability(folder, labels, logits):
    """`reliability.png`: accuracy against confidence in bins, and how many images each bin holds."""
    probabilities = softmax(logits)
    confidence, correct = probabilities.max(1), logits.argmax(1) == labels
    edge = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    sizes = np.bincount(edge, minlength=ECE_BINS)
    some = sizes > 0
    sure, right = (np.bincount(edge, v, ECE_BINS)[some] / sizes[some] for v in (confidence, correct))
    figure = Figure((5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
    upper.plot(sure, right, marker="o", color=HEAT_COLOURS(0.4), label="this run", clip_on=False)
    ece = expected_calibration_error(confidence, correct)
    upper.set(ylabel="accuracy", title=f"Test images: reliability (ECE {ece:.3f})", xlim=(0, 1), ylim=(0, 1))
    upper.legend()
    lower.bar((np.arange(ECE_BINS) + 0.5) / ECE_BINS, sizes, width=0.9 / ECE_BINS, color=HEAT_COLOURS(0.4))
    lower.set(xlabel="confidence of the predicted class", ylabel="images")
    save_figure(figure, folder / "reliability.png")


def draw_curves(folder, log):
    """`curves.png`: loss, accuracy, and what Proxy Attention found, over epochs."""
    epochs = [line["epoch"] for line in log]
    figure = Figure((12, 3.6), layout="constrained")
    loss, accuracy, proxied = figure.subplots(1, 3)
    for axes, name, title in ((loss, "loss", "Cross-entropy"), (accuracy, "accuracy", "Accuracy")):
        for part, colour in (("train", HEAT_COLOURS(0.75)), ("val", HEAT_COLOURS(0.25))):
            axes.plot(epochs, [line[f"{part}_{name}"] for line in log], marker=".", color=colour, label=part)
        axes.set(xlabel="epoch", title=title)
        axes.legend()
    proxied.plot(epochs, [line["misled"] for line in log], marker=".", color=HEAT_COLOURS(0.25), label="misled")
    proxied.plot(epochs, [line["erased_images"] / line["images_seen"] for line in log], marker=".",
                 color=HEAT_COLOURS(0.75), label="erased")
    proxied.set(xlabel="epoch", title="Share of the images trained on", ylim=(0, None))
    proxied.legend()
    for axes in (loss, accuracy, proxied):
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, folder / "curves.png")


def overlay(image, heat):
    """Heat [H, W] in [0, 1] in colours over the greys of an image [H, W, 3] in [0, 1], so that no colour is the image's."""
    grey = image @ np.array([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
    return 0.5 * grey[..., None] + 0.5 * HEAT_COLOURS(heat)[..., :3]


def draw_sheet(folder, config, model, dataset, split, predictions, device):
    """`sheet.png`: misled test images, their heat, and what Proxy Attention would erase of them.

    Where fewer than eight test images are misled, the least sure ones follow and are marked as such.
    """
    labels, logits = predictions["test_labels"], predictions["test_logits"]
    probabilities = softmax(logits)
    predicted, confidence = logits.argmax(1), probabilities.max(1)
    order = np.lexsort((np.where(predicted == labels, confidence, -confidence), predicted == labels))[:SHEET_IMAGES]
    mean, std = (t.to(device) for t in run.normalisation(config, model))
    batches = data.Batches(dataset, [split["test"][i] for i in order], config["image_size"], len(order), device)
    pixels, _ = next(iter(batches))
    images = data.prepare(pixels, mean, std)
    method = "gradcam" if config["cam"] == "none" else config["cam"]
    every, classes = torch.arange(len(order), device=device), torch.from_numpy(labels[order]).to(device)
    explained = run.heat_network(config, len(dataset.classes), folder)
    explained = model if explained is None else explained.to(device)
    with cam.CAM(explained, method, config["layer"], config["smooth"]) as explain:
        copies, heat, _ = proxy.erased_copies(config, explain, images, classes, explained(images), every >= 0, every, every >= 0,
                                              (mean, std), ("sheet",))

    def shown(batch):
        return data.pixels_of(batch, mean, std).permute(0, 2, 3, 1).cpu().numpy() / 255

    columns = min(4, len(order))
    rows = math.ceil(len(order) / columns)
    figure = Figure((2.9 * columns, 6.4 * rows), layout="constrained")
    figure.suptitle(f"Test images: as they are, {method} heat ({config['explain']} class), and with the pixels that this "
                    f"run's settings erase", fontsize=10)
    grid = figure.subplots(3 * rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for place, index in enumerate(order):
        row, column = 3 * (place // columns), place % columns
        image = shown(images)[place]
        for offset, picture in enumerate((image, overlay(image, heat[place].cpu().numpy()), shown(copies.images)[place])):
            grid[row + offset, column].imshow(picture, interpolation="nearest")
        right = predicted[index] == labels[index]
        names = [dataset.classes[labels[index]], dataset.classes[predicted[index]]]
        grid[row, column].set_title(f"{'right, but unsure' if right else 'misled'}\ntrue {names[0]}\n"
                                    f"predicted {names[1]} ({confidence[index]:.2f})", fontsize=9)
        _plain(grid[row, column])
    save_figure(figure, folder / "sheet.png")


OUTLINE = "#e69f00"  # around what is erased, as black on black would not be seen
SPACE_IMAGES, SPACE_AREAS = 6, (0.05, 0.15, 0.4)


def draw_space(config, model, dataset, split, device):
    """One sheet, OUT/NAME-show.png: the same misled training images under every fill, every control and three areas.

    The heat is that of the network as it stands, so of an untrained one where neither --init nor pretrained weights are used. Under
    control `label` other images stand in the row, as it is the images that this control draws. Returns the path.
    """
    config = config | {"cam": "gradcam" if config["cam"] == "none" else config["cam"]}
    mean, std = (t.to(device) for t in run.normalisation(config, model))
    ids = data.shuffled(split["train"], "show", config["seed"])
    for pixels, labels in batches_in_order(config, dataset, ids, device):
        images, fresh, key = data.prepare(pixels, mean, std), torch.ones_like(labels, dtype=torch.bool), ("show", config["seed"])
        with cam.CAM(model.eval(), config["cam"], config["layer"], config["smooth"]) as explain:
            logits = model(images)
            seats = min(SPACE_IMAGES, len(labels))
            rows, chosen = proxy.select("misled", logits, labels, fresh, seats, key)
            if not chosen.all():
                continue  # this batch holds too few

            def copies(change):
                changed, where = config | {"control": None, **change}, rows
                if changed["control"] == "label":
                    where, _ = proxy.select("misled", logits, labels, fresh, seats, key, control="label")
                return proxy.erased_copies(changed, explain, images, labels, logits, fresh, where, chosen, (mean, std), key)

            heat = copies({})[1].cpu().numpy()
            lines = [("as they are", images[rows], None), ("heat", images[rows], None)]
            changes = [(f"--fill {fill}", {"fill": fill}) for fill in proxy.FILLS]
            changes += [(f"--control {control}", {"control": control}) for control in proxy.CONTROLS]
            changes += [(f"--area {area}", {"area": area, "threshold": None}) for area in SPACE_AREAS]
            changes += [("--soften 0.05", {"soften": 0.05})]
            for name, change in changes:
                erased, _, mask = copies(change)
                lines.append((name, erased.images, mask.cpu().numpy()))
        break
    else:
        raise UserError(f"--show: no batch of training images has {SPACE_IMAGES} that this network gets wrong; try a larger "
                        "--batch-size, or a network that is not trained yet")
    names = [f"true {dataset.classes[label]}\npredicted {dataset.classes[said]}"
             for label, said in zip(labels[rows].tolist(), logits[rows].argmax(1).tolist())]
    figure = Figure((1.5 * (len(rows) + 1), 1.5 * len(lines) + 0.6), layout="constrained")
    grid = figure.subplots(len(lines), len(rows) + 1, squeeze=False)
    for line, (name, batch, masks) in zip(grid, lines):
        pictures = data.pixels_of(batch, mean, std).permute(0, 2, 3, 1).cpu().numpy() / 255
        line[0].text(0.95, 0.5, name, ha="right", va="center", fontsize=9)
        for place, axes in enumerate(line[1:]):
            axes.imshow(overlay(pictures[place], heat[place]) if name == "heat" else pictures[place], interpolation="nearest")
            if masks is not None and 0 < masks[place].mean() < 1:
                axes.contour(masks[place], levels=[0.5], colors=[OUTLINE], linewidths=0.6)
        for axes in line:
            axes.axis("off")
    for axes, name in zip(grid[0, 1:], names):
        axes.set_title(name, fontsize=7)
        _plain(axes)
    path = Path(config["out"]) / f"{config['name'] or config['dataset']}-show.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
    return path


def draw(opened, predictions, dataset, model, device):
    """All pictures; without the dataset those that need neither the images nor the network. model: the run's, where it is at hand."""
    labels, logits = predictions["test_labels"], predictions["test_logits"]
    draw_confusion(opened.folder, labels, logits, opened.split["classes"])
    draw_reliability(opened.folder, labels, logits)
    draw_curves(opened.folder, opened.log)
    if dataset is not None:
        model = model or opened.network().to(device)
        try:
            draw_sheet(opened.folder, opened.config, model, dataset, opened.split, predictions, device)
        except ValueError as error:  # a run without Proxy Attention may be one that no CAM can explain
            print(f"sheet.png was not drawn: {error}")


def finish(folder, dataset=None, device=torch.device("cpu")):
    """All that a run whose training has ended still owes: predictions, `metrics.json`, pictures. Returns the metrics.

    Predictions that are there are not made again. Without the dataset the sheet is left as it is.
    """
    opened = run.open_run(folder)
    model = None
    if dataset is not None and dataset.pixels is None:
        open_pixels(opened.config, dataset, build=False)
    if not (opened.folder / "predictions.npz").exists():
        dataset = dataset or opened.dataset()
        model = opened.network().to(device)
        write_predictions(folder, opened.config, model, dataset, opened.split, device)
    result, predictions = judge(folder), run.read_predictions(folder)
    draw(opened, predictions, dataset, model, device)
    return result


# --- how good its explanations are ---------------------------------------------------------------------------------

EXPLAINED = 200  # test images, drawn at random; every seed's are its own
LEANING = 1000  # validation images, likewise
WAY = ("cam", "explain", "layer")  # what an entry of explain.WAYS holds
UNLEARN = f"--select all --cam elementwise --explain margin --layer -2 --fill swap --area {explain.LEAN_AREA:g}"  # what did so on digits and on photographs
PIXELS_AT_ONCE = 32 * 224 * 224


def explained_at_once(size):
    """How many images of `size` pixels a side are explained at once."""
    return max(1, min(EXPLAINED, PIXELS_AT_ONCE // size**2))


def open_to_explain(opened, part, drawn_as, most, device):
    """What the heat of a finished run is measured on: dataset, network in eval mode, (mean, std), and ids and batches of at most so many images of a
    part, drawn at random."""
    config, dataset = opened.config, opened.dataset()
    if dataset.pixels is None:
        open_pixels(config, dataset, build=False)
    model = opened.network().to(device)
    ids, size = data.shuffled(opened.split[part], drawn_as, config["seed"])[:most], config["image_size"]
    batches = data.Batches(dataset, ids, size, explained_at_once(size), device, decoding_workers(config))
    return dataset, model, tuple(t.to(device) for t in run.normalisation(config, model)), ids, batches


def with_masks(dataset, batches):
    """Batches with what `data.masks_of` knows of their images: (pixels, labels, name, mask)."""
    done = 0
    for pixels, labels in batches:
        yield pixels, labels, *data.masks_of(dataset, batches.indices[done:done + len(pixels)], pixels)
        done += len(pixels)


def write_explanations(folder, method=None, device=torch.device("cpu")):
    """Measure a finished run's explanations on its test images: `explanations.npz`, a value per image, and `explanations.json`, their means.

    method: a CAM method; by default one that the run was not trained with. What is there is not measured again. Returns {name: [N]}.
    """
    opened = run.open_run(folder)
    config, path = opened.config, opened.folder / "explanations.npz"
    method = method or explain.other_method({config["cam"]})
    if path.exists() and (there := run.read_arrays(path))["method"] == method.encode():
        return {name: there[name] for name in there if name not in ("method", "ids", "mask")}
    dataset, model, normalisation, ids, batches = open_to_explain(opened, "test", "explained", EXPLAINED, device)
    layer, measured = config["layer"] if config["cam"] not in cam.ATTENTION else None, []
    shown = track(with_masks(dataset, batches), f"{folder}: explaining", len(batches), transient=True, disable=not sys.stderr.isatty())
    for number, (pixels, _, name, mask) in enumerate(shown):
        measured.append(explain.measure(model, data.prepare(pixels, *normalisation), method, layer, mask, (config["seed"], number)))
    values = {key: torch.cat([batch[key] for batch in measured]).cpu().numpy() for key in measured[0]}
    run.write_arrays(path, values | {"ids": _texts(ids), "method": np.array(method.encode()), "mask": np.array((name or "").encode())})
    run.write_json(opened.folder / "explanations.json", {"method": method, "images": len(ids), "mask": name,
                                                         **{key: value.mean(0).tolist() for key, value in values.items()}})
    return values


def describe_explanations(folder):
    """`explanations.json` as lines for a person."""
    found = run.read_json(Path(folder) / "explanations.json")
    better = {"deletion": "lower is better", "insertion": "higher", "drop": "lower", "increase": "higher", "road": "higher",
              "sensitivity": "higher: shuffled weights change the heat", "pointing": f"hottest pixel on the {found['mask']}",
              "inside": f"share of the heat on the {found['mask']}", "covered": "what chance would give"}
    lines = [f"{folder}: the heat of {found['method']} on {found['images']} test images"]
    return "\n".join(lines + [f"{name:22}{found[name]:>10.4f}  {text}" for name, text in better.items() if name in found])


def write_leaning(folder, device=torch.device("cpu")):
    """Whether a finished run's network leans on few pixels, by `explain.leaning` on its validation images: into `leaning.json`, and returned.

    images; "right", the share of them that is right as they are; "ways": for each of `explain.WAYS` that the network has a layer for "cam", "explain" and
    "layer", the shares that are right without the hottest pixels and without as many at a random place ("hottest", "random"), "gap", random minus
    hottest, and "interval", its 95% interval over images. The way with the largest gap stands first. What is there is not measured again.
    """
    opened = run.open_run(folder)
    path = opened.folder / "leaning.json"
    if path.exists() and "ways" in (told := run.read_json(path)) and {tuple(way[key] for key in WAY) for way in told["ways"]} <= set(explain.WAYS):
        return told
    _, model, normalisation, ids, batches = open_to_explain(opened, "val", "leaning", LEANING, device)
    told, why_not = [], None
    for way in explain.WAYS:
        try:
            found = [explain.leaning(model, data.prepare(pixels, *normalisation), labels.to(device), normalisation, way,
                                     (opened.config["seed"], number)) for number, (pixels, labels) in enumerate(batches)]
        except ValueError as error:  # no layer for it
            why_not = error
            continue
        values = {name: torch.cat([batch[name] for batch in found]).cpu().numpy() for name in found[0]}
        gap = values["random"].astype(np.int8) - values["hottest"].astype(np.int8)
        told.append({**dict(zip(WAY, way)), **{name: float(value.mean()) for name, value in values.items()},
                     "gap": float(gap.mean()), "interval": compare.bootstrap_interval([gap], False)})
    if not told:
        raise UserError(f"--leaning {folder}: {why_not}")
    told = {"images": len(ids), "right": told[0]["right"], "ways": sorted(told, key=lambda way: -way["gap"])}
    run.write_json(path, told)
    return told


def describe_leaning(folder, told):
    """What `write_leaning` found, for a person."""
    lines = [f"{folder}: of {told['images']} validation images {100 * told['right']:.1f}% are right. With {100 * explain.LEAN_AREA:g}% of their pixels as noise, the hottest or as many "
             "at a random place:", f"{'method':12}{'explained':12}{'layer':18}{'hottest':>9}{'random':>9}{'costs':>9}   95% interval"]
    for way in told["ways"]:
        low, high = way["interval"]
        lines.append(f"{way['cam']:12}{way['explain']:12}{way['layer'] or 'as the rule has':18}{100 * way['hottest']:8.1f}%{100 * way['random']:8.1f}%"
                     f"{100 * way['gap']:+9.1f}   {100 * low:.1f} to {100 * high:.1f}")
    return "\n".join(lines) + "\n" + (
        f"It leans on few pixels, as on a shortcut: train with {UNLEARN}" if told["ways"][0]["gap"] > explain.LEANS else
        f"It does not lean on few pixels (that is above {100 * explain.LEANS:g} points): no shortcut is found")


def write_where(folder, methods, layer, device=torch.device("cpu")):
    """How much of a run's planted squares, or of the object, each way of explaining finds on its validation images, as `explain.where`.

    methods: CAM methods. layer: the layer to explain; None for the run's own or the rule's. Adds to `where.json`, a row for each method, layer and
    explained score, and returns those asked for: means over the images, and "worst_class", `erased` in the class where it is least. A network can
    learn the square of one class and tell the other by its absence; then no heat finds the other's. Raises UserError where nothing is known of where
    heat should lie.
    """
    opened = run.open_run(folder)
    config = opened.config
    dataset, model, normalisation, ids, batches = open_to_explain(opened, "val", "where", LEANING, device)
    layer, parts = layer or (config["layer"] if config["cam"] not in cam.ATTENTION else None), []
    for pixels, labels, name, mask in with_masks(dataset, batches):
        if mask is None:
            raise UserError(f"--where {folder}: nothing is known of where the object is in {config['dataset']}; it is for runs with --decoy, and for "
                            f"{', '.join(data.MASKS)}")
        try:
            labels = labels.to(device)
            parts.append((labels, explain.where(model, data.prepare(pixels, *normalisation), labels, mask, methods, layer)))
        except ValueError as error:
            raise UserError(f"--where {folder}: {error}") from None
    rows, labels = [], torch.cat([each for each, _ in parts])
    for method, score in parts[0][1]:
        found = {key: torch.cat([part[method, score][key] for _, part in parts]) for key in parts[0][1][method, score]}
        rows.append({"method": method, "layer": layer, "explain": score, "mask": name, "images": len(ids),
                     **{key: float(each.mean()) for key, each in found.items()},
                     "worst_class": min(float(found["erased"][labels == label].mean()) for label in labels.unique())})
    path, asked = opened.folder / "where.json", {(r["method"], r["layer"], r["explain"]) for r in rows}
    there = run.read_json(path) if path.exists() else []
    run.write_json(path, [r for r in there if (r["method"], r["layer"], r["explain"]) not in asked] + rows)
    return rows


def describe_where(folder, rows):
    """What `write_where` found, for a person."""
    lines = [f"{folder}: of the {rows[0]['mask']} in {rows[0]['images']} validation images, {100 * rows[0]['covered']:.1f}% of their pixels",
             f"{'method':14}{'layer':20}{'explained':12}{f'hottest {100 * explain.LEAN_AREA:g}% cover':>20}{'in worst class':>16}{'hottest pixel on it':>22}{'heat on it':>12}"]
    lines += [f"{r['method']:14}{r['layer'] or 'as the rule has it':20}{r['explain']:12}{100 * r['erased']:19.1f}%{100 * r['worst_class']:15.1f}%"
              f"{100 * r['pointing']:21.1f}%{100 * r['inside']:11.1f}%" for r in rows]
    return "\n".join(lines)


# --- where a network looks in any image ------------------------------------------------------------------------------


def image_files(paths):
    """The images that `paths` name: files as they are, folders with every image below them, in natural order."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in data.image_extensions()]
            if not inside:
                raise UserError(f"--image {path}: no images in this folder")
            files += sorted(inside, key=lambda p: data.natural_order(str(p)))
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--image {path}: no such file")
    return files


def draw_heats(path, file, model, classes, methods, layer, mean, std, size, device):
    """One sheet, `path`: the image in `file`, and the heat of its predicted class by each method, from one forward pass."""
    try:
        image = Image.open(file)
        pixels = data.to_rgb(image, size)
    except data.UNREADABLE as error:
        raise UserError(f"--image {file}: cannot be read as an image ({error})") from None
    upright = ImageOps.exif_transpose(image)
    with contextlib.ExitStack() as blocks:
        try:
            heats = [blocks.enter_context(cam.CAM(model, method, None if method in cam.ATTENTION else layer))
                     for method in methods]
            logits = model(data.prepare(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device), mean, std))
            heats = [cam.upsample(heat(logits), size)[0].cpu().numpy() for heat in heats]
        except ValueError as error:
            raise UserError(str(error)) from None
    confidence, best = logits.detach()[0].softmax(0).topk(min(3, len(classes)))
    said = [f"{classes[c]} ({p:.2f})" for c, p in zip(best.tolist(), confidence.tolist())]

    columns = min(5, 1 + len(methods))
    rows = math.ceil((1 + len(methods)) / columns)
    figure = Figure((3 * columns, (3 * min(2, upright.height / upright.width) + 0.9) * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    pictures = [pixels / 255] + [overlay(pixels / 255, heat) for heat in heats]
    titles = ["\n".join([file.name, *said])] + [f"{method}\n{said[0]}" for method in methods]
    for axes, picture, title in zip(panels, pictures, titles):
        axes.imshow(picture, aspect=upright.height / upright.width)  # the network saw a square; people see the image
        axes.set_title(title, fontsize=9)
        axes.title.set_parse_math(False)
    save_figure(figure, path)


def explain_images(options):
    """`--image`: a sheet per image, for a run's network or for one named with --model."""
    device = run.pick_device(options.device)
    if options.runs:
        opened = run.open_run(options.runs[0])
        config, model, classes = opened.config, opened.network(), opened.split["classes"]
    else:
        given = {"dataset": "folder", "data_dir": ".", "model": options.model, "weights": options.weights}
        config = run.resolve(run.read_configs(), {key: value for key, value in given.items() if value is not None})
        classes = [str(c) for c in range(run.classes_of_weights(config))]
        if len(classes) == 1000:
            from timm.data import ImageNetInfo

            names = ImageNetInfo()
            classes = [names.index_to_description(c).split(",")[0] for c in range(1000)]
        model, text = run.build_network(config, len(classes))
        print(text)
    model = model.to(device).eval()
    layer = options.layer or config["layer"]
    methods = options.cam or [config["cam"] if config["cam"] != "none" else "gradcam"]
    for method in methods:
        run.SETTINGS["cam"].check(method, "--cam")
    mean, std = (t.to(device) for t in run.normalisation(config, model))
    out = Path(options.out or (options.runs[0] if options.runs else "."))
    out.mkdir(parents=True, exist_ok=True)
    files, taken = image_files(options.image), set()
    for file in files:
        name = next(n for n in (f"heat-{file.stem}{i}.png" for i in ("", *(f"-{k}" for k in range(2, 10**6))))
                    if n not in taken)
        taken.add(name)
        draw_heats(out / name, file, model, classes, methods, layer, mean, std, config["image_size"], device)
        print(out / name)
    print(f"{len(files)} sheets in {out}")


def compare_arms(options):
    """Print the comparison of an experiment's arms, or of the runs named."""
    arms, left = compare.arms_asked(options)
    if options.experiment and len(arms) < 2:
        raise UserError(f"--experiment {options.experiment}: fewer than two arms have a finished run; first run "
                        + experiment.typed("train.py", options.experiment, options.out))
    groups = compare.groups(arms, options.baseline, by_task=bool(options.experiment))
    runs = [result for arm in arms.values() for result in arm.values()]
    if not options.any_protocol and len({result.config["protocol"] for result in runs}) > 1:
        raise UserError("some of these runs were trained with --protocol resplit, which leaks validation images into training; leave them out, or mix "
                        "them on purpose with --any-protocol")
    for part in ("test", "clean_test"):
        if all(f"{part}_labels" in result.found for result in runs):
            for baseline, group in groups:
                print(compare.describe(group, baseline, part) + "\n")
    for text in compare.warnings_of(arms) + [LEAK] * (runs[0].config["protocol"] == "resplit"):
        print(f"note: {text}")
    print(f"{left} runs are not finished yet: {experiment.typed('train.py', options.experiment, options.out)}" if left
          else "Run more seeds to narrow the intervals; python eval.py RUN shows one run")
    return 0


def main(arguments=None):
    """The command line; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder, as runs/NAME")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--image", nargs="+", help="images, or folders of them, to draw the heat for")
    parser.add_argument("--cam", nargs="+", help=f"with --image, --where or --explanations: {', '.join(cam.METHODS)} (default with --image: the run's own, or gradcam)")
    parser.add_argument("--layer", help="with --image or --where: the layer to explain (default: the run's own, or the rule's)")
    parser.add_argument("--model", help="with --image: a network instead of a run's")
    parser.add_argument("--weights", help="with --model: its weights (default: timm's pretrained ones)")
    parser.add_argument("--out", help="with --image: folder for the sheets (default: the run's, or the current one); with --experiment: "
                        "the one it was run with")
    parser.add_argument("--explanations", action="store_true", help="measure the explanations of runs: deletion, insertion, ROAD and others")
    parser.add_argument("--leaning", action="store_true", help="do runs lean on few pixels, as on a shortcut? Looks at validation images alone")
    parser.add_argument("--where", action="store_true", help="how much of the planted square, or of the object, do --cam's methods find at --layer?")
    compare.add_options(parser)
    parser.add_argument("--any-protocol", action="store_true", help="show runs with a fixed split beside runs without")
    options = parser.parse_args(arguments)
    try:
        if sum(map(bool, (options.runs, options.model, options.experiment))) != 1 or (options.image and len(options.runs) > 1):
            raise UserError("name runs, or an experiment, or with --image one run or a network with --model. See python eval.py --help")
        if not options.image and (options.model or options.cam and not (options.explanations or options.where) or options.layer and not options.where
                                  or options.weights or options.out and not options.experiment):
            raise UserError("--model, --weights, --cam, --layer and --out go with --image. See python eval.py --help")
        if (options.leaning or options.where) and not options.runs:
            raise UserError("--leaning and --where go with runs. See python eval.py --help")
        if options.explanations and not options.runs or options.explanations and options.cam and len(options.cam) > 1:
            raise UserError("--explanations goes with runs, and with one --cam at most. See python eval.py --help")
        if options.leaning:
            for folder in options.runs:
                print(describe_leaning(folder, write_leaning(folder, run.pick_device(options.device))))
            return 0
        if options.where:
            methods = options.cam or ["gradcam", "layercam"]
            for method in methods:
                run.SETTINGS["cam"].check(method, "--cam")
            for folder in options.runs:
                print(describe_where(folder, write_where(folder, methods, options.layer, run.pick_device(options.device))) + "\n")
            return 0
        if options.explanations:
            for folder in options.runs:
                run.SETTINGS["cam"].check(options.cam[0] if options.cam else "gradcam", "--cam")
                write_explanations(folder, options.cam[0] if options.cam else None, run.pick_device(options.device))
                print(describe_explanations(folder) + "\n")
            return 0
        if options.experiment or len(options.runs) > 1:
            return compare_arms(options)
        if options.baseline or options.by:
            raise UserError("--baseline and --by compare several runs: name them. See python eval.py --help")
        if options.image:
            explain_images(options)
            return 0
        for folder in options.runs:
            opened, why_not = run.open_run(folder), None
            try:
                dataset = opened.dataset()
            except UserError as error:
                dataset, why_not = None, error
            print(describe(folder, finish(folder, dataset, run.pick_device(options.device))))
            print(f"\npictures: {folder}/confusion.png, reliability.png, curves.png, sheet.png")
            if why_not:
                print(f"sheet.png was not drawn anew: {why_not}")
    except UserError as error:
        print(data.one_line(f"eval.py: {error}"), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
