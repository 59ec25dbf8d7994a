"""What a run is worth: its metrics, its costs and its pictures; and the heat of its network in any image.

    python eval.py runs/NAME                            # print metrics and costs, rewrite metrics.json and the pictures
    python eval.py runs/NAME --checkpoint best          # print the figures of the best network on validation
    python eval.py runs/NAME --data-dir DIR             # print the figures on another labelled folder
    python eval.py runs/NAME --image cat.jpg FOLDER --cam gradcam layercam      # predict, and draw the heat, in these
    python eval.py --model efficientnet_lite0 --weights FILE --image cat.jpg    # the same without a run

A run leaves `predictions.npz` and `log.jsonl`; metrics and costs follow from these two, the same figures every time.
Only `sheet.png` needs the images and the network again. Several runs are compared by report.py. With --data-dir and
--image, `predictions.csv` in the run's folder has a row per image.

Judged is the network after the last epoch, whose learning rate has come down to zero, and not the best of all epochs on
validation: with a hundred validation images the best is the luckiest, and on digits it did worse on test in every trial
where the two differed. `best.pt` is kept for those who want it (--checkpoint best).
"""

import argparse
import csv
import io
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python leaves it out under PYTHONSAFEPATH

import numpy as np
import torch

import cam
import data
import snapshot
from engine import cache, files, hooks, metrics, network, predict, settings
from engine.dataset import image_extensions, natural_order, reason
from engine.files import UserError
from engine.folder import open_run, read_predictions
from engine.options import Parser, program


FEW = 20  # classes whose figures `describe` lists
EARLY = 0.25  # of the epochs: where most images are misled in more of them, `describe` advises to erase later


def figures(opened, found):
    """What `metrics.json` holds, of an opened run and the arrays of its `predictions.npz`."""
    stages = files.read_lines(opened.folder / "stages.jsonl")
    erasing = [line for line in stages if line["stage"] == 2]
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
    if opened.config["heat"] == settings.SNAPSHOT:
        erasing = files.read_json(opened.folder / "snapshot.json")
        result["snapshot"] = {**erasing[-1], "before": erasing[:-1]}
    result |= {"cost": metrics.costs(opened.log, float(found["seconds"]), erasing), "epochs": len(opened.log),
               "best_epoch": metrics.best_epoch(opened.log), "skipped_images": len(opened.split["skipped"])}
    if stages:
        result["ended"] = stages[-1].get("ended")
    return result


def table(parts):
    """Lines with the figures, {part: `metrics.metrics`}, side by side."""
    lines = ["", f"{'':22}" + "".join(f"{part:>12}" for part in parts)]
    for name in [name for name, value in next(iter(parts.values())).items() if not isinstance(value, dict)]:
        values = [each.get(name) for each in parts.values()]
        cells = ["-" if v is None else f"{v:.4f}" if isinstance(v, float) else v for v in values]
        lines.append(f"{name:22}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def describe(folder, result, checkpoint="last"):
    """The figures of a run's `metrics.json` as text for the terminal."""
    test, parts = result["test"], [part for part in metrics.PREDICTED if part in result]
    judged = "judged after the last" if checkpoint == "last" else f"judged with {checkpoint}.pt"
    lines = [f"{folder}: {result['epochs']} epochs, {judged}; best on validation was {result['best_epoch']}",
             *table({part: result[part] for part in parts})]
    by_class = {files.one_line(name): value for name, value in test["per_class"].items()}
    if len(by_class) <= FEW:
        width = max(22, *(len(name) + 2 for name in by_class))
        lines += ["", f"{'test, by class':{width}}{'images':>12}{'precision':>12}{'recall':>12}{'f1':>12}"]
        lines += [f"{name:{width}}{value['images']:>12}"
                  + "".join(f"{value[key]:>12.4f}" for key in ("precision", "recall", "f1"))
                  for name, value in by_class.items()]
    else:
        worst = min(by_class, key=lambda name: by_class[name]["f1"])
        lines += ["", f"by class: test.per_class in {folder}/metrics.json, for {len(by_class)} classes; the lowest f1 "
                      f"is that of {worst}, {by_class[worst]['f1']:.4f}"]
    if "clean_test" in parts:
        lines += ["", "--decoy: squares show the class in val as often as in training, and another in test; clean_test "
                  "has none"]
    if "snapshot" in result:
        then = "every image was transplanted" if result["snapshot"]["transplants"] else "nothing was done"
        lines += ["", f"snapshot: {snapshot.describe(result['snapshot'])}; from there on {then}"]
    if "groups" in test:
        groups = [f"{name} {group['accuracy']:.4f} of {group['images']}" for name, group in test["groups"].items()]
        lines += ["", "test accuracy by class and group: " + "; ".join(groups)]
    lines += ["", *(f"{name:22}{'not measured here' if value is None else f'{value:,}':>20}"
                    for name, value in result["cost"].items())]
    if result["cost"]["second_pass_images"]:
        lines += ["", "second_pass_images went through the network once more, for the heat that decides what is erased"]
    if result["skipped_images"]:
        lines += ["", f"--skip-bad: {result['skipped_images']} images were left out, see {folder}/bad-images.txt"]
    opened = open_run(folder)
    if opened.config["mode"] == "resplit":
        lines += ["", f"WARNING, --mode resplit: {metrics.LEAK}"]
    early = [line["epoch"] for line in opened.log if line["erased_images"] and line["misled"] > 0.5]
    chosen = opened.config["mode"] == "online" and opened.config["select"] == "misled"
    if chosen and len(early) > EARLY * len(opened.log) and len(opened.log) > 1:
        lines += ["", f"in {len(early)} epochs over half of the images were misled, and copies of them, erased, "
                      "trained on: on photographs that cost accuracy (results/summary.md); "
                      f"--schedule after:{min(early[-1], len(opened.log) - 1)} begins later"]
    return "\n".join(lines)


def draw(opened, predictions, dataset, model, device):
    """All pictures of a run; without the dataset those that need no image. model: the run's, or None to open it."""
    from engine import pictures  # matplotlib takes a second, that no dry run should wait for

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
    classes, about = opened.split["classes"], opened.folder / "network.json"
    network.set_switches(opened.config, device)
    if dataset is not None and dataset.pixels is None:
        cache.open_pixels(dataset, opened.config, build=False)
    if not (opened.folder / "predictions.npz").exists():
        dataset = dataset or opened.dataset()
        model = opened.network().to(device)
        predict.write_predictions(folder, opened.config, model, dataset, opened.split, device)
    if not about.exists():
        files.write_json(about, network.described(opened.config, classes, model))
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


def show_checkpoint(folder, checkpoint, device):
    """Print a run's figures as another of its checkpoints has them; nothing is written."""
    opened = open_run(folder)
    network.set_switches(opened.config, device)
    dataset, model = opened.dataset(), opened.network(f"{checkpoint}.pt").to(device)
    cache.open_pixels(dataset, opened.config, build=False)
    found = predict.predictions(opened.config, model, dataset, opened.split, device)
    print(describe(folder, figures(opened, found), checkpoint))


def show_folder(options, device):
    """`--data-dir`: print the figures of a run's network on another labelled folder. Raises UserError at the end where
    images cannot be read."""
    opened, unread = open_run(options.runs[0]), {}
    dataset = labelled(opened, options.data_dir)
    network.set_switches(opened.config, device)
    model = opened.network(f"{options.checkpoint}.pt").to(device)
    mean, std = (t.to(device) for t in network.normalisation(opened.config, model))
    batches = predict.readable_batches(opened.config, dataset, device, unread)
    with hooks.exact_float32():
        logits, labels = (t.cpu().numpy() for t in predict.predict(model, batches, mean, std, device))
    for index, wrong in unread.items():
        print(files.one_line(f"passed over: {dataset.where(index)} ({wrong})"))
    if len(labels):
        classes, confidence = opened.split["classes"], metrics.softmax(logits)
        print("\n".join(table({"test": metrics.metrics(labels, logits, classes)})))
        ids = [image_id for i, image_id in enumerate(dataset.ids) if i not in unread]
        write_rows(options, [("image", "true", "predicted", "confidence"),
                             *((i, classes[t], classes[p], f"{c[p]:.4f}")
                               for i, t, p, c in zip(ids, labels, logits.argmax(1), confidence))])
    refuse_unread({dataset.where(i): wrong for i, wrong in unread.items()}, len(dataset), "--data-dir")


def labelled(opened, folder):
    """The images of another folder as a dataset with the run's classes; prints which of these are missing there."""
    entry, classes = opened.config["dataset_entry"] | {"source": None}, opened.split["classes"]
    if not (entry["layout"] == "csv" and (Path(folder) / entry["csv"]["file"]).is_file()):
        entry["layout"] = "folders"
    found = data.load_dataset(opened.config | {"dataset": "folder", "dataset_entry": entry, "data_dir": folder,
                                               "classes": None, "csv": None, "cache": "off"})
    numbers = np.array([classes.index(name) if name in classes else -1 for name in found.classes])[found.labels]
    part = "test" if found.parts and "test" in found.parts else None
    kept = [i for i, number in enumerate(numbers) if number >= 0 and (part is None or found.parts[i] == part)]
    missing = [name for name in classes if name not in found.classes]
    unknown = [f"{name} ({int((found.labels == i).sum())} images){files.nearest(name, missing)}"
               for i, name in enumerate(found.classes) if name not in classes]
    if not kept:
        raise UserError(f"--data-dir {folder}: no image of a class of {opened.folder}, which has {', '.join(classes)}; "
                        f"found {', '.join(found.classes)}")
    note = f", its {part} part alone" if part else ""
    lines = [f"{folder}: {len(kept)} of {len(found)} images{note}, {len(set(numbers[kept]))} of {len(classes)} classes"]
    if missing:
        lines.append(f"classes that it lacks, which count as 0 in averages called macro: {', '.join(missing)}")
    if unknown:
        lines.append(f"classes that the run does not know, left out: {', '.join(unknown)}")
    print(*map(files.one_line, lines), sep="\n")
    return found.keep(kept, classes, numbers[kept])


def write_rows(options, rows):
    """`predictions.csv` in the run's folder; where that is closed to writing, or there is none, beside the sheets."""
    own = options.runs and os.access(options.runs[0], os.W_OK)
    path, text = Path(options.runs[0] if own else options.out or ".") / "predictions.csv", io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.write_atomically(path, lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")))
    print(f"\npredictions: {path}")


def refuse_unread(unread, count, where):
    """Raise UserError where images could not be read, after all the others were dealt with. unread: {file: reason}."""
    for file, wrong in list(unread.items())[:1]:
        raise UserError(f"{where}: {len(unread)} of {count} images cannot be read and were passed over, the first "
                        f"{file} ({wrong}); the others are done")


def image_files(paths):
    """The images that `paths` name: files as they are, folders with every image below them, in natural order.

    What is hidden in a folder, as the ._ files that macOS leaves, is named and passed over.
    """
    found = []
    for path in map(Path, paths):
        below = [path] if path.is_file() else [
            p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in image_extensions()]
        hidden = {p for p in below if any(n.startswith((".", "__MACOSX")) for n in p.relative_to(path).parts)}
        for p in sorted(hidden):
            print(files.one_line(f"passed over: {p} (hidden, and no image of yours)"))
        if len(hidden) == len(below):
            raise UserError(f"--image {path}: {'no images in this folder' if path.is_dir() else 'no such file'}")
        found += sorted(set(below) - hidden, key=lambda p: natural_order(str(p)))
    return found


def open_network(options):
    """Settings, network and names of classes: a run's, or those of --model and --weights."""
    if options.runs:
        opened = open_run(options.runs[0])
        return opened.config, opened.network(f"{options.checkpoint}.pt"), opened.split["classes"]
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
    """`--image`: the predicted class of each, and a sheet heat-NAME.png with its heat by each method."""
    from engine import pictures

    config, model, classes = open_network(options)
    model = model.to(network.pick_device(options.device))
    methods = options.cam or [config["cam"] if config["cam"] != "none" else "gradcam"]
    for method in methods:
        settings.SETTINGS["cam"].check(method, "--cam")
    out = files.make_folder(options.out or (options.runs[0] if options.runs else "."))
    config["layer"] = options.layer or config["layer"]
    images, taken, rows, unread = image_files(options.image), set(), [], {}
    for file in images:
        try:
            pixels, aspect = pictures.read_image(file, config)
        except Exception as error:  # Pillow's plugins raise anything
            unread[file] = reason(error)
            print(files.one_line(f"passed over: {file} ({unread[file]})"))
            continue
        path, number = out / f"heat-{file.stem}.png", 1
        while path in taken:
            number += 1
            path = out / f"heat-{file.stem}-{number}.png"
        taken.add(path)
        predicted, confidence = pictures.draw_heats(path, file.name, pixels, aspect, model, config, classes, methods)
        rows.append((file, predicted, f"{confidence:.4f}"))
        print(files.one_line(f"{file}: {predicted} ({confidence:.2f}), {path}"))
    if rows:
        write_rows(options, [("image", "predicted", "confidence"), *rows])
        print(f"{len(rows)} sheets in {out}")
    refuse_unread(unread, len(images), "--image")


def parse(arguments):
    """The options of the command line, checked. Raises UserError."""
    parser = Parser("eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder, as runs/NAME")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last",
                        help="the network after the last epoch, or the best on validation (default: last)")
    parser.add_argument("--data-dir", metavar="DIR", help="another folder of class folders, to judge the network on")
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
    if options.data_dir and (options.image or len(options.runs) != 1):
        parser.error("--data-dir: name one run, and no --image")
    if options.checkpoint != "last" and options.model:
        parser.error("--checkpoint goes with a run")
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
        return
    device = network.pick_device(options.device)
    if options.data_dir:
        show_folder(options, device)
        return
    for folder in options.runs:
        if options.checkpoint == "last":
            show_run(folder, device)
        else:
            show_checkpoint(folder, options.checkpoint, device)


if __name__ == "__main__":
    sys.exit(main())
