"""What a run is worth: its metrics, its costs and its pictures; and the heat of its network in any image.

    python eval.py runs/NAME                            # print metrics and costs, rewrite metrics.json and the pictures
    python eval.py runs/NAME --image cat.jpg FOLDER --cam gradcam layercam      # draw the heat in these images
    python eval.py --model efficientnet_lite0 --weights FILE --image cat.jpg    # the same without a run

A run leaves `predictions.npz` and `log.jsonl`; metrics and costs follow from these two, the same figures every time.
Only `sheet.png` needs the images and the network again. Several runs are compared by report.py.

Judged is the network after the last epoch, whose learning rate has come down to zero, and not the best of all epochs on
validation: with a hundred validation images the best is the luckiest, and on digits it did worse on test in every trial
where the two differed. `best.pt` is kept for those who want it.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

import cam
from engine import cache, files, metrics, network, pictures, predict, settings
from engine.dataset import image_extensions, natural_order
from engine.files import UserError
from engine.folder import open_run, read_predictions
from engine.launch import Parser, program


def figures(opened, found):
    """What `metrics.json` holds, of an opened run and the arrays of its `predictions.npz`."""
    stages = files.read_lines(opened.folder / "stages.jsonl")
    if not opened.log:
        raise UserError(f"{opened.folder}: log.jsonl is missing or empty, so the costs are not known")
    classes, result = opened.split["classes"], {}
    for part in metrics.PREDICTED:
        if f"{part}_labels" not in found:
            continue
        labels, logits = found[f"{part}_labels"], found[f"{part}_logits"]
        result[part] = metrics.metrics(labels, logits, classes)
        if f"{part}_groups" in found:
            groups, worst = metrics.group_metrics(labels, logits, found[f"{part}_groups"], classes)
            result[part] |= {"groups": groups, "worst_group": worst}
    result |= {"cost": metrics.costs(opened.log, float(found["seconds"]), stages), "epochs": len(opened.log),
               "best_epoch": metrics.best_epoch(opened.log), "skipped_images": len(opened.split["skipped"])}
    if stages:
        result["ended"] = stages[-1].get("ended")
    return result


def describe(folder, result):
    """The figures of a run's `metrics.json` as text for the terminal."""
    test, parts = result["test"], [part for part in metrics.PREDICTED if part in result]
    lines = [f"{folder}: {result['epochs']} epochs, judged after the last; best on validation was "
             f"{result['best_epoch']}", "", f"{'':22}" + "".join(f"{part:>12}" for part in parts)]
    for name in [name for name, value in test.items() if not isinstance(value, dict)]:
        values = [result[part][name] for part in parts]
        cells = ["-" if v is None else f"{v:.4f}" if isinstance(v, float) else v for v in values]
        lines.append(f"{name:22}" + "".join(f"{cell:>12}" for cell in cells))
    if "clean_test" in parts:
        lines += ["", "--decoy: squares show the true class in val and another in test; clean_test has none"]
    if "groups" in test:
        groups = [f"{name} {group['accuracy']:.4f} of {group['images']}" for name, group in test["groups"].items()]
        lines += ["", "test accuracy by class and group: " + "; ".join(groups)]
    lines += ["", *(f"{name:22}{'not measured here' if value is None else f'{value:,}':>20}"
                    for name, value in result["cost"].items())]
    if result["cost"]["second_pass_images"]:
        lines += ["", "second_pass_images went through the network once more, for the heat that decides what is erased"]
    if result["skipped_images"]:
        lines += ["", f"--skip-bad: {result['skipped_images']} images were left out, see {folder}/bad-images.txt"]
    if open_run(folder).config["mode"] == "resplit":
        lines += ["", f"WARNING, --mode resplit: {metrics.LEAK}"]
    return "\n".join(lines)


def draw(opened, predictions, dataset, model, device):
    """All pictures of a run; without the dataset those that need no image. model: the run's, or None to open it."""
    labels, logits = predictions["test_labels"], predictions["test_logits"]
    pictures.draw_confusion(opened.folder, labels, logits, opened.split["classes"])
    pictures.draw_reliability(opened.folder, labels, logits)
    pictures.draw_curves(opened.folder, opened.log)
    if dataset is not None:
        model = model or opened.network().to(device)
        try:
            pictures.draw_sheet(opened.folder, opened.config, model, dataset, opened.split, predictions, device)
        except ValueError as error:  # a run without Proxy Attention may be one that no CAM can explain
            print(f"sheet.png was not drawn: {error}")


def finish(folder, dataset=None, device=torch.device("cpu")):
    """What a trained run still lacks: predictions, `metrics.json` and pictures. Returns the metrics.

    Predictions that are there are not made again. Without the dataset the sheet stays as it is.
    """
    opened, model = open_run(folder), None
    network.set_switches(opened.config, device)
    if dataset is not None and dataset.pixels is None:
        cache.open_pixels(dataset, opened.config, build=False)
    if not (opened.folder / "predictions.npz").exists():
        dataset = dataset or opened.dataset()
        model = opened.network().to(device)
        predict.write_predictions(folder, opened.config, model, dataset, opened.split, device)
    predictions = read_predictions(folder)
    result = figures(opened, predictions)
    files.write_json(opened.folder / "metrics.json", result)
    draw(opened, predictions, dataset, model, device)
    return result


def show_run(folder, device):
    """Print a run's figures, and write its `metrics.json` and pictures again, if it is not another user's."""
    opened, reason = open_run(folder), None
    if not os.access(folder, os.W_OK):
        print(describe(folder, figures(opened, read_predictions(folder))))
        print(f"\nnothing was written: {folder} is closed to writing")
        return
    try:
        dataset = opened.dataset()
    except UserError as error:
        dataset, reason = None, error
    print(describe(folder, finish(folder, dataset, device)))
    print(f"\npictures: {folder}/confusion.png, reliability.png, curves.png, sheet.png")
    if reason:
        print(f"sheet.png was not drawn anew: {reason}")


def image_files(paths):
    """The images that `paths` name: files as they are, folders with every image below them, in natural order."""
    found = []
    for path in map(Path, paths):
        below = [path] if path.is_file() else [
            p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in image_extensions()]
        if not below:
            raise UserError(f"--image {path}: {'no images in this folder' if path.is_dir() else 'no such file'}")
        found += sorted(below, key=lambda p: natural_order(str(p)))
    return found


def open_network(options):
    """Settings, network and names of classes: a run's, or those of --model and --weights."""
    if options.runs:
        opened = open_run(options.runs[0])
        return opened.config, opened.network(), opened.split["classes"]
    given = {"dataset": "folder", "data_dir": ".", "model": options.model, "weights": options.weights}
    config = settings.resolve(settings.read_configs(), given)
    classes = [str(c) for c in range(network.classes_of_weights(config))]
    if len(classes) == 1000:
        from timm.data import ImageNetInfo

        names = ImageNetInfo()
        classes = [names.index_to_description(c).split(",")[0] for c in range(1000)]
    model, text = network.build_network(config, len(classes))
    print(text)
    return config, model.eval(), classes


def draw_images(options):
    """`--image`: a sheet per image, heat-NAME.png, with the heat of the predicted class by each method."""
    config, model, classes = open_network(options)
    model = model.to(network.pick_device(options.device))
    methods = options.cam or [config["cam"] if config["cam"] != "none" else "gradcam"]
    for method in methods:
        settings.SETTINGS["cam"].check(method, "--cam")
    out = files.make_folder(options.out or (options.runs[0] if options.runs else "."))
    config["layer"] = options.layer or config["layer"]
    images, taken = image_files(options.image), set()
    for file in images:
        path, number = out / f"heat-{file.stem}.png", 1
        while path in taken:
            number += 1
            path = out / f"heat-{file.stem}-{number}.png"
        taken.add(path)
        pictures.draw_heats(path, file, model, config, classes, methods)
        print(path)
    print(f"{len(images)} sheets in {out}")


def parse(arguments):
    """The options of the command line, checked. Raises UserError."""
    parser = Parser("eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder, as runs/NAME")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="images, or folders of them, to draw the heat in")
    parser.add_argument("--cam", nargs="+", metavar="METHOD", help=f"{', '.join(cam.METHODS)} (default: the run's)")
    parser.add_argument("--layer", help="the layer to explain (default: the run's, or the deepest with a 4x4 grid)")
    parser.add_argument("--model", help="a network instead of a run's")
    parser.add_argument("--weights", metavar="FILE", help="with --model: its weights (default: timm's pretrained ones)")
    parser.add_argument("--out", metavar="FOLDER", help="folder for the sheets (default: the run's, or this one)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    options = argparse.Namespace(**parser.parse(arguments))
    for name in ("cam", "layer", "model", "weights", "out"):
        if getattr(options, name) and not options.image:
            parser.error(f"--{name} goes with --image")
    if options.weights and not options.model:
        parser.error("--weights goes with --model")
    if options.image and len(options.runs) + bool(options.model) != 1:
        parser.error("--image: name one run, or a network with --model")
    if not options.image and not options.runs:
        parser.error("name a run's folder, as runs/NAME")
    return options


@program("eval.py")
def main(arguments=None):
    """The command line."""
    options = parse(arguments)
    if options.image:
        draw_images(options)
    for folder in options.runs if not options.image else []:
        show_run(folder, network.pick_device(options.device))


if __name__ == "__main__":
    sys.exit(main())
