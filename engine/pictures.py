"""The pictures of a run: what its figures and what its network show, one function a picture, all as PNG files.

Colours are those of viridis and cividis, which grow evenly in lightness and which colour-blind readers can tell apart.
"""

import contextlib
import functools
import math
import warnings

import numpy as np
import torch
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import Image
from sklearn.metrics import confusion_matrix

import cam
import proxy
from engine import before, chance, files, loader, metrics, network, predict
from engine.dataset import ALL_LEVELS, to_rgb, upright
from engine.files import readable

HEAT_COLOURS = colormaps["viridis"]
SHEET_IMAGES = 8  # in two rows of four
SPACE_IMAGES, SPACE_AREAS = 6, (0.05, 0.15, 0.4)
OUTLINE = "#e69f00"  # around what is erased, since black on black cannot be seen
NAMES = {"parse_math": False}  # of texts that hold names: a dollar sign would start a formula


def save_figure(figure, path):
    """Write a figure as PNG: a complete file or none. Letters come from any font of this machine that has them."""
    texts = figure.findobj(Text)
    fonts = fonts_with(frozenset("".join(text.get_text() for text in texts)))
    for text in texts if fonts else ():
        text.set_fontfamily([*text.get_fontfamily(), *fonts])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for letters that no font has
        files.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


@functools.cache
def fonts_with(characters):
    """Families of fonts that have these characters, as far as DejaVu Sans lacks them: those with most of them first."""
    own = FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    missing = {ord(c) for c in characters} - own.keys() - {ord("\n")}
    has, chosen = {}, []
    for entry in font_manager.fontManager.ttflist if missing else ():
        with contextlib.suppress(RuntimeError, OSError):  # some are damaged, or have pictures alone, as of emoji
            font = FT2Font(entry.fname)
            if font.scalable and "Last Resort" not in entry.name:  # which has a box for every letter there is
                has[entry.name] = has.get(entry.name, set()) | missing & font.get_charmap().keys()
    while has and (best := max(has, key=lambda name: len(has[name] & missing))) and has[best] & missing:
        chosen.append(best)
        missing -= has.pop(best)
    return chosen


def panels(width, height, rows, columns):
    """A figure of so many inches, and its axes [rows, columns] without frames and ticks."""
    figure = Figure((width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    return figure, grid


def overlay(image, heat):
    """Heat [..., H, W] in colours over the greys of images [..., H, W, 3], all in [0, 1]: no colour is an image's."""
    grey = image @ np.array([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
    return 0.5 * grey[..., None] + 0.5 * HEAT_COLOURS(heat)[..., :3]


def shown(images, mean, std):
    """Normalised images [N, 3, H, W] as NumPy pictures [N, H, W, 3] in [0, 1]."""
    return loader.pixels_of(images, mean, std).permute(0, 2, 3, 1).cpu().numpy() / 255


def draw_confusion(folder, labels, logits, classes):
    """`confusion.png`: the share of each true class that was predicted as each class; counts where they can be read."""
    classes = list(map(readable, classes))
    counts = confusion_matrix(labels, logits.argmax(1), labels=np.arange(len(classes)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(14, 4 + 0.3 * len(classes))
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true", title="Test images: true against predicted class")
    figure.colorbar(axes.imshow(shares, vmin=0, vmax=1, cmap="cividis"), label="share of the true class")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0, **NAMES)
        axes.set_yticks(range(len(classes)), classes, **NAMES)
    if len(classes) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "black" if shares[row, column] > 0.5 else "white"
                axes.text(column, row, count, ha="center", va="center", fontsize=8, color=colour)
    save_figure(figure, folder / "confusion.png")


def draw_reliability(folder, labels, logits):
    """`reliability.png`: accuracy against confidence in bins, and how many images each bin holds."""
    confidence, correct = metrics.softmax(logits).max(1), logits.argmax(1) == labels
    sizes, confident, right = metrics.calibration(confidence, correct)
    some, bins = sizes > 0, len(sizes)
    figure = Figure((5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfectly calibrated")
    upper.plot(confident[some] / sizes[some], right[some] / sizes[some], marker="o", color=HEAT_COLOURS(0.4),
               label="this run", clip_on=False)
    ece = metrics.expected_calibration_error(confidence, correct)
    upper.set(ylabel="accuracy", title=f"Test images: reliability (ECE {ece:.3f})", xlim=(0, 1), ylim=(0, 1))
    upper.legend()
    lower.bar((np.arange(bins) + 0.5) / bins, sizes, width=0.9 / bins, color=HEAT_COLOURS(0.4))
    lower.set(xlabel="confidence of the predicted class", ylabel="images")
    save_figure(figure, folder / "reliability.png")


def draw_curves(folder, log):
    """`curves.png`: loss, accuracy, and the shares that Proxy Attention found and erased, over epochs."""
    figure = Figure((12, 3.6), layout="constrained")
    shares = {"misled": [line["misled"] for line in log],
              "erased": [line["erased_images"] / line["images_seen"] for line in log]}
    loss, accuracy = ({part: [line[f"{part}_{name}"] for line in log] for part in ("val", "train")}
                      for name in ("loss", "accuracy"))
    titles = {"Cross-entropy": loss, "Accuracy": accuracy, "Share of the images trained on": shares}
    for axes, (title, lines) in zip(figure.subplots(1, 3), titles.items()):
        for (label, values), colour in zip(lines.items(), (0.25, 0.75)):
            axes.plot([line["epoch"] for line in log], values, marker=".", color=HEAT_COLOURS(colour), label=label)
        axes.set(title=title, xlabel="epoch", ylim=(0, None) if lines is shares else None)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, folder / "curves.png")


def draw_sheet(folder, config, model, dataset, split, predictions, device):
    """`sheet.png`: misled test images, their heat, and what this run's settings erase of them.

    Where fewer than eight test images are misled, the least sure ones follow and are marked as such. predictions: the
    arrays of `predictions.npz`. Raises ValueError where the network has no layer that a CAM can explain.
    """
    labels, logits = predictions["test_labels"], predictions["test_logits"]
    predicted, confidence = logits.argmax(1), metrics.softmax(logits).max(1)
    order = np.lexsort((np.where(predicted == labels, confidence, -confidence), predicted == labels))[:SHEET_IMAGES]
    mean, std = (t.to(device) for t in network.normalisation(config, model))
    ids = [split["test"][i] for i in order]
    pixels, _ = next(iter(loader.Batches(dataset, ids, config["image_size"], len(ids), device)))
    images = loader.prepare(pixels, mean, std)
    method = "gradcam" if config["cam"] == "none" else config["cam"]
    explained = before.heat_network(config, len(dataset.classes), folder)
    explained = model if explained is None else explained.to(device)
    every, classes = torch.arange(len(ids), device=device), torch.from_numpy(labels[order]).to(device)
    with cam.CAM(explained, method, config["layer"]) as explain:
        eraser = proxy.Proxy(config, explain, (mean, std))
        eraser.key = ("sheet",)
        copies, heat, _ = eraser.erased(images, classes, every >= 0, explained(images), every, every >= 0)
    pictures, heat = shown(images, mean, std), heat.cpu().numpy()
    triples = zip(pictures, overlay(pictures, heat), shown(copies.images, mean, std))
    figure, grid = panels(11.6, 12.8, 6, 4)
    figure.suptitle(f"Test images: as they are, {method} heat (--explain {config['explain']}), and with the pixels "
                    "that this run's settings erase", fontsize=10)
    for place, (i, triple) in enumerate(zip(order, triples)):
        below = grid[3 * (place // 4):, place % 4]
        for axes, picture in zip(below, triple):
            axes.imshow(picture, interpolation="nearest")
        kind = "right, but unsure" if predicted[i] == labels[i] else "misled"
        true, chosen = readable(dataset.classes[labels[i]]), readable(dataset.classes[predicted[i]])
        below[0].set_title(f"{kind}\ntrue {true}\npredicted {chosen} "
                           f"({confidence[i]:.2f})", fontsize=9, **NAMES)
    save_figure(figure, folder / "sheet.png")


def draw_space(config, model, dataset, split, device):
    """OUT/NAME-show.png: the same misled training images under every fill, every control and three areas.

    The heat is that of the network as it is, trained or not. In the row of control `label` stand other images, since
    that control draws others. Returns the path. Raises UserError where the network gets too few images wrong.
    """
    config = config | {"select": "misled", "cam": "gradcam" if config["cam"] == "none" else config["cam"]}
    normalisation = tuple(t.to(device) for t in network.normalisation(config, model))
    ids = chance.shuffled(split["train"], "show", config["seed"])
    with cam.CAM(model.eval(), config["cam"], config["layer"]) as explain:
        for pixels, labels in predict.batches_in_order(config, dataset, ids, device):
            images = loader.prepare(pixels, *normalisation)
            logits = model(images)
            if int(proxy.wrong(logits, labels).sum()) >= min(SPACE_IMAGES, len(labels)):
                break
        else:
            raise files.UserError(f"--show: no batch of training images has {SPACE_IMAGES} that this network gets "
                                  "wrong; try a larger --batch-size, or a network that is not trained yet")
        lines, rows = _space_lines(config, explain, normalisation, images, labels, logits)
    figure, grid = panels(1.5 * (len(rows) + 1), 1.5 * len(lines) + 0.6, len(lines), len(rows) + 1)
    for row, (name, pictures, masks) in zip(grid, lines):
        row[0].text(0.95, 0.5, name, ha="right", va="center", fontsize=9)
        for place, axes in enumerate(row[1:]):
            axes.imshow(pictures[place], interpolation="nearest")
            if masks is not None and 0 < masks[place].mean() < 1:
                axes.contour(masks[place], levels=[0.5], colors=[OUTLINE], linewidths=0.6)
    for axes, label, predicted in zip(grid[0, 1:], labels[rows].tolist(), logits[rows].argmax(1).tolist()):
        text = f"true {dataset.classes[label]}\npredicted {dataset.classes[predicted]}"
        axes.set_title(readable(text), fontsize=7, **NAMES)
    path = files.make_folder(config["out"]) / f"{config['name'] or config['dataset']}-show.png"
    save_figure(figure, path)
    return path


def _space_lines(config, explain, normalisation, images, labels, logits):
    """The lines of `draw_space`: (name, pictures [N, H, W, 3], masks [N, H, W] or None); and the rows of the batch."""
    fresh, seats = torch.ones_like(labels, dtype=torch.bool), min(SPACE_IMAGES, len(labels))

    def erased(change):
        eraser = proxy.Proxy(config | {"control": None} | change, explain, normalisation, seats)
        eraser.key = ("show", config["seed"])
        rows, chosen = eraser.select(logits, labels, fresh)
        return rows, *eraser.erased(images, labels, fresh, logits, rows, chosen)

    rows, _, heat, _ = erased({})
    pictures, heat = shown(images[rows], *normalisation), heat.cpu().numpy()
    lines = [("as they are", pictures, None), ("heat", overlay(pictures, heat), None)]
    for key, values in (("fill", proxy.FILLS), ("control", proxy.CONTROLS), ("area", SPACE_AREAS)):
        for value in values:
            _, copies, _, mask = erased({key: value})
            lines.append((f"--{key} {value}", shown(copies.images, *normalisation), mask.cpu().numpy()))
    return lines, rows


def read_image(file, config):
    """Pixels of an image, uint8 [size, size, 3] as a run's config has them, and its height per width.

    Raises anything at all for a broken one, as `to_rgb` does.
    """
    with Image.open(file) as image:
        pixels, turned = to_rgb(image, config["image_size"], config.get("levels", ALL_LEVELS)), upright(image)
    return pixels, turned.height / turned.width


def draw_heats(path, name, pixels, aspect, model, config, classes, methods):
    """`path`: an image of that name, and the heat of its predicted class by each CAM method, from one forward pass.

    pixels, aspect: of `read_image`. model: in eval mode. config: of a run, for image_size, layer and normalisation.
    classes: their names. Returns the predicted one and its confidence. Raises UserError where a method does not suit.
    """
    device, size = next(model.parameters()).device, config["image_size"]
    mean, std = (t.to(device) for t in network.normalisation(config, model))
    with contextlib.ExitStack() as blocks:
        try:
            heats = [blocks.enter_context(cam.CAM(model, method, None if method in cam.ATTENTION else config["layer"]))
                     for method in methods]
            batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device)
            logits = model(loader.prepare(batch, mean, std))
            heats = [cam.upsample(heat(logits), size)[0].cpu().numpy() for heat in heats]
        except ValueError as error:
            raise files.UserError(str(error)) from None
    confidence, best = logits.detach()[0].softmax(0).topk(min(3, len(classes)))
    predicted = [f"{classes[c]} ({p:.2f})" for c, p in zip(best.tolist(), confidence.tolist())]
    pictures = [pixels / 255] + [overlay(pixels / 255, heat) for heat in heats]
    titles = ["\n".join([name, *predicted])] + [f"{method}\n{predicted[0]}" for method in methods]
    columns = min(5, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure, grid = panels(3 * columns, (3 * min(2, aspect) + 0.9) * rows, rows, columns)
    for axes, picture, title in zip(grid.flat, pictures, titles):
        axes.imshow(picture, aspect=aspect)  # the network saw a square; people see the image
        axes.set_title(readable(title), fontsize=9, **NAMES)
    save_figure(figure, path)
    return classes[best[0].item()], confidence[0].item()
