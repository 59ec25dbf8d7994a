"""How well the networks of runs can be explained, measured on images of the run and kept in its folder.

    python -m study.explain runs/NAME                       # deletion, insertion, ROAD …: how good is its heat?
    python -m study.explain runs/NAME --cam gradcam         # by this method, and not by one it was not trained with
    python -m study.explain runs/NAME --follows             # does it depend on few pixels, as on a shortcut?
    python -m study.explain runs/NAME --where --layer -2    # how much of a planted square, or of the object, heat finds
    python -m study.explain runs/NAME --misled              # in test images that are wrong: does it find what misleads?

Into explanations.json and .npz, follows.json and where.json; `faithfulness.py` has the measures, `snapshot.py` follows.
"""

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import cam
import proxy
import snapshot
from engine import cache, chance, decoy, display, files, folder, loader, network, predict, settings
from engine.erasing import of_another_class, put
from engine.files import UserError
from engine.options import Parser, program
from study import faithfulness
from study.figures import Table, as_text, number, points

EXPLAINED, FOUND_IN = 200, 1000  # test and validation images, drawn at random; every seed's are its own
PASTED, AREAS = 512, (0.03, 0.1, 0.25, 0.5)  # training and validation images, and shares of their pixels
PLACES = {"hottest": None, "random": "random", "coolest": "coolest"}  # a column's head: a control of `proxy.CONTROLS`
PIXELS_AT_ONCE = 32 * 224 * 224
OBJECT = "object"  # a heat that is all on it
EXAMPLES = 8
RULE = "the rule's"  # the layer where none is named
AREA = f"{100 * faithfulness.FEW:g}%"
# What --where measures, and a column's head.
FOUND = {"erased": f"hottest {AREA} cover", "worst_class": "in worst class", "pointing": "hottest on it",
         "inside": "heat on it", "covered": "chance", "overlap": "overlap", "road": "ROAD", "freed": "freed"}
BETTER = {"deletion": "lower is better", "insertion": "higher", "drop": "lower", "increase": "higher", "road": "higher",
          "sensitivity": "higher: shuffled weights change the heat", "pointing": "hottest pixel on the {mask}",
          "inside": "share of the heat on the {mask}", "covered": "what chance would give"}


class Images:
    """Images of a run, and its network in eval mode, on one device. normalisation: (mean, std), each [1, 3, 1, 1]."""

    def __init__(self, run, ids, device):
        self.run, self.ids, self.dataset, self.model = run, ids, run.dataset(), run.network().to(device)
        self.normalisation = tuple(t.to(device) for t in network.normalisation(run.config, self.model))
        if self.dataset.pixels is None:
            cache.open_pixels(self.dataset, run.config, build=False)
        size = run.config["image_size"]
        at_once = max(1, min(EXPLAINED, PIXELS_AT_ONCE // size**2))
        workers = cache.decoding_workers(run.config)
        self.batches = loader.Batches(self.dataset, ids, size, at_once, device, workers)

    def __iter__(self):
        """Batches: images [B, 3, H, W], normalised; labels [B]; pixels, uint8 [B, 3, H, W]; places [B] in the data."""
        done = 0
        for pixels, labels in display.progress(self.batches, f"{self.run.folder}: explaining"):
            places = self.batches.indices[done:done + len(pixels)]
            yield loader.prepare(pixels, *self.normalisation), labels.to(pixels.device), pixels, places
            done += len(pixels)


def drawn(run, part, key, most):
    """Ids of at most so many images of a part of a run's split, drawn at random by its seed and `key`."""
    return chance.shuffled(run.split[part], key, run.config["seed"])[:most]


def own_layer(config):
    """The layer that a run explains, for any method; None where the rule decides."""
    return None if config["cam"] in cam.ATTENTION else config["layer"]


@functools.lru_cache(maxsize=4)  # those of one pair of runs
def heats(path, ids, method, device):
    """Heat [N, H, W] of what a run's network predicts for the images `ids`, a tuple, on the CPU.

    method: of `cam.METHODS`; or OBJECT, 1 where the object is and 0 elsewhere, None where that is not known.
    """
    opened = Images(folder.open_run(path), ids, device)
    if method == OBJECT:
        masks = [decoy.masks_of(opened.dataset, places, pixels)[1] for _, _, pixels, places in opened]
        return None if masks[0] is None else torch.cat(masks).float().cpu()
    layer = own_layer(opened.run.config)
    return torch.cat([faithfulness.heat_of(opened.model, images, method, layer)[0].cpu() for images, *_ in opened])


def attends(result):
    """Whether a run's network has the plain attention that rollout reads, over enough patches."""
    config = result.config
    model, _ = network.build_network(config, len(result.split["classes"]), pretrained=False)
    try:
        faithfulness.heat_of(model.eval(), torch.zeros(1, 3, *[config["image_size"]] * 2), "rollout", None)
        return True
    except ValueError:
        return False


def likeness(a, method_a, b, methods_b, device, ids=None):
    """{"correlation", "overlap"}, each [N]: how alike the heats of two runs are in the same images; {} where one is not
    known. Of more methods than one for the second, "correlation, METHOD" for the others.

    a, b: `arms.Result`. ids: the images; by default EXPLAINED of a's test images.
    """
    ids, found = tuple(ids or drawn(a, "test", "explained", EXPLAINED)), {}
    one = heats(a.folder, ids, method_a, device)
    for place, method in enumerate(methods_b if one is not None else ()):
        two = at_size(heats(b.folder, ids, method, device), one.shape[1:])
        found[f"correlation, {method}" if place else "correlation"] = faithfulness.rank_correlation(one, two).numpy()
        if not place:
            found["overlap"] = faithfulness.overlap(one, two).numpy()
    return found


def kept(a, b, device, area=0.1):
    """Whether images that mislead run a keep their class erased: {"nothing" and PLACES: bool [N]}, what run b sees.

    Of a's misled test images: the hottest (at a random place, coolest) `area` of a's own heat as in training, Grad-CAM
    of the loss, in black. b: the run that judges, by another network. Empty where no image misled a. a, b: `Result`.
    """
    ids = [image_id for image_id, right in zip(a.split["test"], a.correct("test")) if not right]
    if not ids:
        return {}
    first, judge = Images(folder.open_run(a.folder), ids, device), Images(folder.open_run(b.folder), ids, device)
    layer, found, done = own_layer(first.run.config), {}, 0
    heat = torch.cat([faithfulness.heat_of(first.model, images, "gradcam", layer, labels, "loss")[0]
                      for images, labels, *_ in first])
    for number, (images, labels, *_) in enumerate(judge):
        hot = at_size(heat[done:done + len(images)], images.shape[-2:])
        done += len(images)
        erased = {"nothing": images}
        for place, control in PLACES.items():
            mask = proxy.pixel_mask(hot, area, control, (a.seed, number))[:, None]
            erased[place] = torch.where(mask, -judge.normalisation[0] / judge.normalisation[1], images)
        for place, seen in erased.items():
            with torch.no_grad():
                found.setdefault(place, []).append((judge.model(seen).argmax(1) == labels).cpu().numpy())
    return {place: np.concatenate(each) for place, each in found.items()}


def at_size(heat, size):
    """Heat [N, H, W] of a run with images of another size, at `size`."""
    return heat if heat.shape[1:] == size else F.interpolate(heat[:, None], size, mode="bilinear")[:, 0]


def examples(results, method, vit, device):
    """What eight test images look like to arms: (photographs [N, H, W, 3] in [0, 1], {arm: heat [N, H, W]}).

    The first drawn of each class, of up to EXAMPLES classes. results: {arm: Result}, explained by `method`; vit: the
    one explained by its rollout.
    """
    first = results[vit]
    label_of, chosen = dict(zip(first.split["test"], first.found["test_labels"])), {}
    for image_id in drawn(first, "test", "explained", EXPLAINED):
        chosen.setdefault(int(label_of[image_id]), image_id)
    ids = tuple(chosen[label] for label in sorted(chosen))[:EXAMPLES]
    opened = Images(folder.open_run(first.folder), ids, device)
    photographs = torch.cat([pixels.permute(0, 2, 3, 1).cpu() for _, _, pixels, _ in opened]).numpy() / 255
    found = {arm: heats(result.folder, ids, "rollout" if arm == vit else method, device)
             for arm, result in results.items()}
    return photographs, {arm: at_size(heat, photographs.shape[1:3]).numpy() for arm, heat in found.items()}


def references(cnn, vit, method, device):
    """What the likeness of a CNN and a ViT is compared with, as lists of `likeness`: of pairs of seeds of the CNN, each
    seed in one pair, on test images that both have; and with the ViT of a Gaussian in the middle of the image, and of
    the object, where that is known. cnn, vit: {seed: Result}.
    """
    runs, two_seeds = [cnn[seed] for seed in sorted(cnn)], []
    for a, b in zip(runs[::2], runs[1::2]):
        theirs = set(b.split["test"])
        if both := [image_id for image_id in a.split["test"] if image_id in theirs][:EXPLAINED]:
            two_seeds.append(likeness(a, method, b, [method], device, both))
    others = [[likeness(run, what, run, cam.ATTENTION, device) for what in ("center", OBJECT)] for run in vit.values()]
    return [two_seeds, *([found for found in each if found] for each in zip(*others))]


def write_explanations(path, method=None, device=torch.device("cpu")):
    """Measure a finished run's explanations on its test images by `faithfulness.measure`: {name: [N]}.

    Into explanations.npz, a value per image, and explanations.json, their means. method: a CAM method; by default one
    that the run was not trained with. What is there is not measured again.
    """
    run = folder.open_run(path)
    method, file = method or faithfulness.other_method({run.config["cam"]}), run.folder / "explanations.npz"
    if file.exists() and (there := files.read_arrays(file))["method"] == method.encode():
        return {name: there[name] for name in there if name not in ("method", "ids", "mask")}
    opened, measured = Images(run, drawn(run, "test", "explained", EXPLAINED), device), []
    for number, (images, _, pixels, places) in enumerate(opened):
        name, mask = decoy.masks_of(opened.dataset, places, pixels)
        measured.append(faithfulness.measure(opened.model, images, method, own_layer(run.config), mask,
                                             (run.config["seed"], number)))
    values = {key: torch.cat([batch[key] for batch in measured]).cpu().numpy() for key in measured[0]}
    files.write_arrays(file, values | {"ids": predict.as_bytes(opened.ids), "method": np.array(method.encode()),
                                       "mask": np.array((name or "").encode())})
    means = {key: value.mean(0).tolist() for key, value in values.items()}
    files.write_json(file.with_suffix(".json"), {"method": method, "images": len(opened.ids), "mask": name, **means})
    return values


def describe_explanations(path):
    """A run's explanations.json as lines for the terminal."""
    found = files.read_json(Path(path) / "explanations.json")
    rows = [[name, number(found[name], 4), text.format(mask=found["mask"])]
            for name, text in BETTER.items() if name in found]
    table = as_text(["measure", "mean", ""], rows)
    return f"{path}: the heat of {found['method']} on {found['images']} test images\n{table}"


def write_follows(path, device=torch.device("cpu")):
    """Whether a finished run's network depends on few pixels: `snapshot.ask` of its training and validation images.

    With the settings of --heat snapshot, whatever the run's own. Into follows.json, and returned; what is there is not
    measured again. Raises UserError where the network has no layer for it.
    """
    run = folder.open_run(path)
    if (run.folder / "follows.json").exists() and "pasted" in (known := files.read_json(run.folder / "follows.json")):
        return known
    dataset, model = run.dataset(), run.network().to(device, memory_format=torch.channels_last).requires_grad_(False)
    if dataset.pixels is None:
        cache.open_pixels(dataset, run.config, build=False)
    try:
        explained = snapshot.Explained(run.config | settings.OF_SNAPSHOT, dataset, model, device)
    except ValueError as error:  # no layer for it
        raise UserError(f"--follows {path}: {error}") from None
    ids = chance.shuffled([*run.split["train"], *run.split["val"]], "snapshot", run.config["seed"])[:PASTED]
    answer = snapshot.ask(explained, run.split) | {"epoch": len(run.log), "pasted": pasted(explained, ids)}
    files.write_json(run.folder / "follows.json", answer)
    return answer


def pasted(explained, ids):
    """Where in an image its class is told: a list of {"area", and of each of PLACES a share of pairs}.

    The share, among images that the network recognises, in which it says another image's class once such pixels of that
    one, which it recognises too, are pasted in at their own place.
    """
    found = {}
    for number, (images, labels, logits, grids) in enumerate(explained.of(ids, "what tells the class?")):
        heat, key = cam.upsample(grids, images.shape[-2:]), (explained.config["seed"], number)
        right, draws = logits.argmax(1) == labels, chance.torch_generator(images.device, "pasted", *key)
        donors, given = of_another_class(labels, labels, right, draws)
        for area in AREAS:
            for place, control in PLACES.items():
                mask = proxy.pixel_mask(heat, area, control, key)[donors]
                said = explained.forward(put(images, mask, images[donors])).argmax(1)
                found.setdefault((area, place), []).append((said == labels[donors])[right & given].cpu().numpy())
    share = {key: float(np.concatenate(values).sum() / max(1, sum(map(len, values)))) for key, values in found.items()}
    return [{"area": area} | {place: share[area, place] for place in PLACES} for area in AREAS]


def describe_follows(path, answer):
    """What `write_follows` found, as lines for the terminal."""
    name = max(map(len, answer["by_class"]))
    rows = [f"  {files.one_line(c):{name}} {points(value, 1, True):>6}" for c, value in answer["by_class"].items()]
    advice = "\nTrain with --heat snapshot, which unlearns that" if answer["transplants"] else ""
    told = as_text(["area, %", *PLACES], [[points(value, 1) for value in row.values()] for row in answer["pasted"]])
    return (f"{path}: {snapshot.describe(answer)}{advice}\nBy the class that is pasted in:\n" + "\n".join(rows)
            + f"\nSaid to be of another image's class once these pixels of it are pasted in, %:\n{told}")


def write_where(path, methods, layer=None, device=torch.device("cpu"), misled=False):
    """How well heat finds a run's planted squares, or the object, on its validation images: `faithfulness.where`.

    misled: on those of EXPLAINED test images that it gets wrong; there also what misled it. layer: None for the
    run's own or the rule's. Adds to where.json a row for each method, layer and explained score, and returns these:
    means over the images, and worst_class, `erased` in the class where it is least: a network can tell a class by the
    absence of the others' squares. Raises UserError where there is nothing to find.
    """
    images_of, part, most = ("misled", "test", EXPLAINED) if misled else ("val", "val", FOUND_IN)
    run = folder.open_run(path)
    ids, layer = drawn(run, part, "where", most), layer or own_layer(run.config)
    opened, parts, labels, rows = Images(run, ids, device), [], [], []
    for number, (images, classes, pixels, places) in enumerate(opened):
        if misled:
            with torch.no_grad():
                wrong = opened.model(images).argmax(1) != classes
            images, classes, pixels, places = images[wrong], classes[wrong], pixels[wrong], places[wrong.cpu().numpy()]
        if not len(images):
            continue
        name, mask = decoy.masks_of(opened.dataset, places, pixels)
        if mask is None and not misled:
            raise UserError(f"--where {path}: nothing is known of where the object is in {run.config['dataset']}; it "
                            f"is for runs with --decoy, for {', '.join(decoy.MASKS)}, and for class folders with "
                            "masks/ beside images/. --misled needs no such mask")
        try:
            parts.append(faithfulness.where(opened.model, images, classes, mask, methods, layer,
                                            (run.config["seed"], number) if misled else None))
        except ValueError as error:
            raise UserError(f"--where {path}: {error}") from None
        labels.append(classes)
    if not parts:
        raise UserError(f"--misled {path}: no image of its test part is misled")
    labels = torch.cat(labels)
    for method, score in parts[0]:
        found = {key: torch.cat([part[method, score][key] for part in parts]) for key in parts[0][method, score]}
        row = {"of": images_of, "method": method, "layer": layer, "explain": score, "mask": name, "images": len(labels),
               **{key: float(each.mean()) for key, each in found.items()}}
        if name:
            row["worst_class"] = min(float(found["erased"][labels == label].mean()) for label in labels.unique())
        rows.append(row)
    file, asked = run.folder / "where.json", [way_of(row) for row in rows]
    there = files.read_json(file) if file.exists() else []
    files.write_json(file, [row for row in there if way_of(row) not in asked] + rows)
    return rows


def way_of(row):
    """Kind of images (absent in older ones), method, layer and score of a row of where.json."""
    return row.get("of", "val"), row["method"], row["layer"] or RULE, row["explain"]


def where_found(runs):
    """{`way_of`: [number of runs, means of FOUND or None]} of the where.json that runs have."""
    found = {}
    for file in (Path(run.folder, "where.json") for run in runs):
        for row in files.read_json(file) if file.exists() else []:
            found.setdefault(way_of(row), []).append(row)
    for way, rows in found.items():
        columns = [[row.get(key) for row in rows] for key in FOUND]
        found[way] = [len(rows), *(None if None in column else np.mean(column) for column in columns)]
    return found


def tables_of_where(arms):
    """Two Tables of what the runs' where.json hold, means and each run's; none where they have none."""
    ways = [[arm, count, *way, *map(points, means)] for arm, runs in arms.items()
            for way, (count, *means) in where_found(runs.values()).items()]
    each = [[arm, seed, *way, *map(points, values)] for arm, runs in arms.items() for seed, run in runs.items()
            for way, (_, *values) in where_found([run]).items()]
    caption = ("By python -m study.explain RUN --where or --misled, in %: how much of the square (or the object) the "
               f"hottest {AREA} of the pixels cover, and in the class where that is least; how often the "
               "hottest pixel is on it; how much of the heat. Of test images that misled: overlap with the heat of the "
               "predicted class, what this loses with the hottest pixels (ROAD), what the true one gains (freed).")
    header = ["images", "method", "layer", "explained", *FOUND.values()]
    return [Table("where", caption, ["arm", "seeds", *header], ways),
            Table("where-runs", caption, ["arm", "seed", *header], each, shown=False)] if ways else []


def describe_where(path, rows):
    """What `write_where` found, as lines for the terminal."""
    kept = [key for key in FOUND if any(row.get(key) is not None for row in rows)]
    table = as_text(["images", "method", "layer", "explained", *(FOUND[key] for key in kept)],
                    [[*way_of(row), *(points(row.get(key), 1) for key in kept)] for row in rows])
    mask = f", and the {rows[0]['mask']} in them" * bool(rows[0]["mask"])
    return f"{path}: {rows[0]['images']} images{mask}; in %\n{table}"


def parse(arguments):
    """The options of the command line, checked. Raises UserError."""
    parser = Parser("-m study.explain", usage="python -m study.explain RUN … [options]", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a finished run's folder, as runs/NAME")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--follows", action="store_true", help="does it depend on few pixels, as on a shortcut?")
    modes.add_argument("--where", action="store_true", help="how much of the square, or of the object, heat finds")
    modes.add_argument("--misled", action="store_true", help="how well heat finds what misleads")
    parser.add_argument("--cam", nargs="+", metavar="METHOD",
                        help=f"one of {', '.join(cam.METHODS)}, with --where and --misled several (default: one that "
                        "the run was not trained with; with --where and --misled gradcam and layercam)")
    parser.add_argument("--layer", help="with --where and --misled: the layer (default: the run's own, or the rule's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    options = argparse.Namespace(**parser.parse(arguments))
    finds = options.where or options.misled
    if options.layer and not finds:
        parser.error("--layer goes with --where and --misled")
    if options.cam and (options.follows or len(options.cam) > 1 and not finds):
        parser.error("--cam takes one method, with --where and --misled several, and does not go with --follows")
    for method in options.cam or ():
        if method not in cam.METHODS:
            parser.error(f"--cam {method}: no CAM method{files.nearest(method, cam.METHODS)}")
    return options


@program("study.explain")
def main(arguments=None):
    """The command line."""
    options = parse(arguments)
    device = network.pick_device(options.device)
    for path in options.runs:
        if options.follows:
            print(describe_follows(path, write_follows(path, device)))
        elif options.where or options.misled:
            rows = write_where(path, options.cam or ["gradcam", "layercam"], options.layer, device, options.misled)
            print(describe_where(path, rows) + "\n")
        else:
            write_explanations(path, options.cam[0] if options.cam else None, device)
            print(describe_explanations(path) + "\n")


if __name__ == "__main__":
    sys.exit(main())
