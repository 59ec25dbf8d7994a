"""What a run is worth: predictions, metrics, costs and pictures.

    python eval.py runs/NAME              # print metrics and costs again, rewrite metrics.json and the pictures
    python eval.py runs/A runs/B          # the same for several
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
from sklearn.metrics import (accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss,
                             precision_recall_fscore_support, top_k_accuracy_score)

import cache
import cam
import data
import proxy
import run
from data import UserError

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


def batches_in_order(config, dataset, ids, device, **ranks):
    """Batches of the images `ids`, in their order; of `rank` and `ranks` processes this one's share."""
    return data.Batches(dataset, ids, config["image_size"], config["batch_size"], device, decoding_workers(config), **ranks)


def open_pixels(config, dataset, build=True):
    """Set `dataset.pixels` as --cache has it; returns what to say of it, or None."""
    dataset.pixels, text = cache.open_pixels(dataset, config["image_size"], config["cache"], run.cache_folder(config),
                                             decoding_workers(config), build)
    return text


def decoding_workers(config):
    """Processes that decode images: as configured, or one per core, 8 at most."""
    return config["workers"] if config["workers"] is not None else min(8, os.cpu_count() or 1)


def write_predictions(folder, config, model, dataset, split, device):
    """Predict the validation and test images once, in float32, into `predictions.npz`."""
    mean, std = (t.to(device) for t in run.normalisation(config, model))
    arrays, start = {}, time.perf_counter()
    for part in ("val", "test"):
        logits, labels = predict(model, batches_in_order(config, dataset, split[part], device), mean, std, device)
        arrays |= {f"{part}_ids": np.array(split[part]).astype(np.bytes_) if all(i.isascii() for i in split[part])
                   else np.array([i.encode("utf-8", "surrogateescape") for i in split[part]]),
                   f"{part}_logits": logits.cpu().numpy(), f"{part}_labels": labels.cpu().numpy()}
    run.write_arrays(Path(folder) / "predictions.npz", {**arrays, "seconds": np.array(time.perf_counter() - start)})


def read_predictions(folder):
    """{name: array} of `predictions.npz`; UserError where it is missing or damaged."""
    path = Path(folder) / "predictions.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; finish the run with python train.py --resume {folder}") from None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise UserError(f"{path}: cannot be read ({error}); remove it and run python eval.py {folder}") from None


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
        "images_per_second": round(total("images_seen") / seconds, 2) if seconds else None,
        "peak_gpu_allocated_mb": peak("peak_gpu_allocated_mb"),
        "peak_gpu_reserved_mb": peak("peak_gpu_reserved_mb"),
        "peak_host_mb": peak("peak_host_mb"),
        "energy_wh": round(sum(energies), 4) if energies else None,
    }


def best_epoch(log):
    """Number of the epoch with the highest validation accuracy; of equals, the one with the lowest validation loss."""
    return max(range(len(log)), key=lambda i: (log[i]["val_accuracy"], -log[i]["val_loss"])) + 1


def judge(folder):
    """Write and return `metrics.json` of a run that has its predictions."""
    opened, found = run.open_run(folder), read_predictions(folder)
    stages = run.read_lines(opened.folder / "stages.jsonl")
    if not opened.log:
        raise UserError(f"{folder}: log.jsonl is missing or empty, so the costs are not known")
    classes = opened.split["classes"]
    result = {part: metrics(found[f"{part}_labels"], found[f"{part}_logits"], classes) for part in ("val", "test")}
    result |= {"cost": costs(opened.log, float(found["seconds"]), stages), "epochs": len(opened.log),
               "best_epoch": best_epoch(opened.log), "protocol": opened.config["protocol"]}
    if stages:
        result["ended"] = stages[-1].get("ended")
    run.write_json(opened.folder / "metrics.json", result)
    return result


def describe(folder, result):
    """The figures of `metrics.json` as lines for a person."""
    names = ["accuracy", "balanced_accuracy", "precision_macro", "recall_macro", "f1_macro", "top5", "log_loss", "brier",
             "ece"]
    lines = [f"{folder}: {result['epochs']} epochs, judged after the last; best on validation was {result['best_epoch']}", "",
             f"{'':22}{'val':>10}{'test':>10}", f"{'images':22}{result['val']['images']:>10}{result['test']['images']:>10}"]
    for name in names:
        lines.append(f"{name:22}" + "".join(
            f"{'-':>10}" if result[part][name] is None else f"{result[part][name]:>10.4f}" for part in ("val", "test")))
    lines.append("")
    for name, value in result["cost"].items():
        lines.append(f"{name:22}{'not measured here' if value is None else f'{value:,}':>20}")
    if result["cost"]["second_pass_images"]:
        lines[-1:] += ["", "second_pass_images went through the network once more, only for the heat that says what to erase"]
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
    with cam.CAM(model, method, config["layer"], config["smooth"]) as explain:
        copies, heat, _ = proxy.erased_copies(config, explain, images, classes, model(images), every >= 0, every, every >= 0,
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


def draw(opened, predictions):
    """All pictures that need neither the images nor the network."""
    labels, logits = predictions["test_labels"], predictions["test_logits"]
    draw_confusion(opened.folder, labels, logits, opened.split["classes"])
    draw_reliability(opened.folder, labels, logits)
    draw_curves(opened.folder, opened.log)


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
    result, predictions = judge(folder), read_predictions(folder)
    draw(opened, predictions)
    if dataset is not None:
        model = model or opened.network().to(device)
        try:
            draw_sheet(opened.folder, opened.config, model, dataset, opened.split, predictions, device)
        except ValueError as error:  # a run without Proxy Attention may be one that no CAM can explain
            print(f"sheet.png was not drawn: {error}")
    return result


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


def main(arguments=None):
    """The command line; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder, as runs/NAME")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--image", nargs="+", help="images, or folders of them, to draw the heat for")
    parser.add_argument("--cam", nargs="+", help=f"with --image: {', '.join(cam.METHODS)} (default: the run's own, or gradcam)")
    parser.add_argument("--layer", help="with --image: the layer to explain (default: the run's own, or the rule's)")
    parser.add_argument("--model", help="with --image: a network instead of a run's")
    parser.add_argument("--weights", help="with --model: its weights (default: timm's pretrained ones)")
    parser.add_argument("--out", help="with --image: folder for the sheets (default: the run's, or the current one)")
    parser.add_argument("--any-protocol", action="store_true", help="show runs with a fixed split beside runs without")
    options = parser.parse_args(arguments)
    try:
        if bool(options.runs) == bool(options.model) or (options.image and len(options.runs) > 1):
            raise UserError("name runs, or with --image one run or a network with --model. See python eval.py --help")
        if not options.image and (options.model or options.cam or options.layer or options.out or options.weights):
            raise UserError("--model, --weights, --cam, --layer and --out go with --image. See python eval.py --help")
        if options.image:
            explain_images(options)
            return 0
        if not options.any_protocol and len({run.open_run(folder).config["protocol"] for folder in options.runs}) > 1:
            raise UserError("some of these runs were trained with --protocol resplit, which leaks validation images into training; "
                            "leave them out, or mix them on purpose with --any-protocol")
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
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
