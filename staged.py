"""The method as it was first proposed: train; find what misled the trained network and erase it on disk; train again.

    python train.py --mode staged --rounds 3 --target-accuracy 0.99

Stage 1 trains. Each round has a stage 2, which erases, and a stage 3, which trains on. Each stage opens what the one
before saved, and what it held is released at its end. Erased images lie in the run's folder, never in the dataset's.
Under torchrun all processes take part in every stage; in stage 2 each erases batches of its own.
"""

import csv
import io
import itertools
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import cam
import proxy
from engine import costs, display, files, predict, ranks
from engine.chance import shuffled
from engine.dataset import Dataset, Pixels
from engine.decoy import Decoy
from engine.display import console
from engine.folder import open_run, read_log
from engine.launch import open_network
from engine.loader import Decoded, pixels_of, prepare
from engine.network import AMP, normalisation, pick_amp
from engine.settings import stage_epochs
from engine.training import Stage

INDEX = ("file", "source", "label", "predicted", "confidence", "area")
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}


def staged(config, folder, dataset, split, device, stop, epoch, train):
    """All stages, from wherever the run stands: a stage that is in `stages.jsonl` is done.

    epoch: epochs in the checkpoint; where it was damaged and the one before it is used, stages after that happen again.
    train: the loop of `train.py`.
    """
    ends = list(itertools.accumulate(stage_epochs(config)))
    done = {tuple(stage) for stage in ranks.from_first(stages_done, folder, ends, epoch)}

    def train_stage(dataset, split, stage):
        network = open_network(config, folder, dataset)
        train(config, folder, dataset, split, network, device, stage, stop)
        return {"held_mb": ranks.from_first(lambda: read_log(folder)[-1]["held_mb"])}  # which the first has written

    if (0, 1) not in done:
        run_stage(folder, device, 0, 1, train_stage, dataset, split, Stage(0, ends[0], 0))
    for round_, (start, end) in enumerate(zip(ends, ends[1:]), 1):
        accuracy, target = read_log(folder)[start - 1]["val_accuracy"], config["target_accuracy"]
        if target is not None and accuracy >= target:
            reason = f"validation accuracy {accuracy:.4f} reaches the target {target:g}"
            return record_end(folder, done, round_, reason)
        if (round_, 2) not in done:
            run_stage(folder, device, round_, 2, erase_stage, config, folder, dataset, split, device, round_)
        erased = ErasedRound(folder, round_)
        found, selected = erased.rows(), erased.counts()[1]
        if not found:
            reason = f"the heat of all {selected} selected images is zero" if selected else \
                "no training image is misled" if config["select"] == "misled" else "no training image is selected"
            return record_end(folder, done, round_, reason)
        if (round_, 3) not in done:
            joined, ids, copies = with_erased(dataset, split["train"], found, folder, config["budget"])
            run_stage(folder, device, round_, 3, train_stage, joined, {**split, "train": ids},
                      Stage(start, end, round_, frozenset(copies)))
    record_end(folder, done, len(ends) - 1, "all rounds are done")


def stages_done(folder, ends, epoch):
    """(round, stage) of the stages that lie before the checkpoint; what lies behind it is removed."""
    def before_checkpoint(line):
        return [0, *ends][line["round"] + (line["stage"] in (1, 3))] <= epoch

    kept = list(itertools.takewhile(before_checkpoint, files.read_lines(folder / "stages.jsonl")))
    files.cut_lines(folder / "stages.jsonl", len(kept))
    for round_, start in enumerate(ends, 1):
        if start > epoch:
            shutil.rmtree(folder / "erased" / f"round-{round_}", ignore_errors=True)
    return [(line["round"], line["stage"]) for line in kept]


def run_stage(folder, device, round_, number, work, *arguments):
    """Call a stage, let go of all it held, and record it in `stages.jsonl` with the memory before and after."""
    start, energy = time.perf_counter(), costs.Energy(device, first=ranks.LOCAL_RANK == 0)
    line = {"round": round_, "stage": number, **work(*arguments), "seconds": round(time.perf_counter() - start, 3),
            "energy_wh": costs.added(ranks.everyone(energy.watt_hours()))}
    energy.close()
    costs.release(device)
    line["left_mb"] = costs.held_mb(device)
    ranks.from_first(files.append_line, folder / "stages.jsonl", line)  # the others then read what the stage wrote
    erased = f"{line['erased_images']} of {line['images']} training images erased, " if number == 2 else ""
    console.print(f"round {round_}, stage {number}: {erased}{line['seconds']:.1f} s, memory held {line['held_mb']} MB, "
                  f"after {line['left_mb']} MB", soft_wrap=True)


def record_end(folder, done, round_, reason):
    if (round_, None) not in done and ranks.RANK == 0:
        files.append_line(folder / "stages.jsonl", {"round": round_, "stage": None, "ended": reason})
    console.print(f"ended in round {round_}: {reason}", soft_wrap=True)


def erase_stage(config, folder, dataset, split, device, round_):
    """Stage 2: over the training images, find, explain, erase and save, in one forward pass each.

    The network is frozen, so that autograd keeps only what lies behind the explained layer. Images come in random
    order, without augmentation. Batches that are done already are not done again; of the others each of several
    processes takes every ranks-th one. What is drawn follows from the batch's place in the order, so that their number
    changes nothing.
    """
    model = open_run(folder).network().to(device, memory_format=torch.channels_last).requires_grad_(False)
    amp, (mean, std) = AMP[pick_amp(config["amp"], device)], (t.to(device) for t in normalisation(config, model))
    erased, order = ErasedRound(folder, round_), shuffled(split["train"], "stage 2", config["seed"], round_)
    starts = ranks.from_first(erased.left, len(order), config["batch_size"])[ranks.RANK::ranks.RANKS]
    label, own = dict(zip(dataset.ids, dataset.labels)), [order[i:i + config["batch_size"]] for i in starts]
    with cam.CAM(model, config["cam"], config["layer"]) as explain:
        chooser = proxy.Proxy(config, explain, (mean, std))
        batches = predict.batches_in_order(config, dataset, list(itertools.chain(*own)), device)
        for start, (pixels, labels) in zip(starts, display.progress(batches, f"round {round_}: erasing")):
            chooser.key = (config["seed"], "round", round_, start)
            images, fresh = prepare(pixels, mean, std), torch.ones_like(labels, dtype=torch.bool)
            with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                logits = model(images)
            rows, chosen = chooser.select(logits, labels, fresh)
            rows, chosen = rows[chosen], chosen[chosen]
            copies, _, mask = chooser.erased(images, labels, fresh, logits, rows, chosen)
            pictures = pixels_of(copies.images, mean, std).permute(0, 2, 3, 1).cpu().numpy()
            confidence, predicted = logits.detach().float().softmax(1)[rows].max(1)
            columns = (rows, predicted, confidence, mask.float().mean((1, 2)), copies.taken)
            entries = []
            for picture, row, best, sure, area, taken in zip(pictures, *(t.tolist() for t in columns)):
                source = order[start + row]
                if taken:
                    entries.append((picture, {"source": source, "label": dataset.classes[label[source]],
                                              "predicted": dataset.classes[best], "confidence": f"{sure:.6f}",
                                              "area": f"{area:.6f}"}))
            erased.add(start, entries, len(copies.labels))
    held = ranks.from_each(range(ranks.RANKS), costs.held_mb, device)  # all have written theirs
    images, selected, count = ranks.from_first(erased.join, len(order))
    return {"images": images, "selected": selected, "erased_images": count,
            "held_mb": max(filter(None, held), default=None)}


class ErasedRound:
    """A round's erased images: `erased/round-R/CLASS/ID.jpg`, `index.csv`, and their counts in `progress.json`.

    Of each batch the images come first, then a file that names them, in `.batches`, each on the disk before the next: a
    batch that has its file need not be explained again, whoever did it. At the end the first process joins these files
    in the order of the batches.
    """

    def __init__(self, folder, number):
        self.run_folder = Path(folder)
        self.folder = self.run_folder / "erased" / f"round-{number}"
        self.index, self.progress = self.folder / "index.csv", self.folder / "progress.json"
        self.batches = self.folder / ".batches"  # no class has this folder: `safe_name` begins with no dot

    def counts(self):
        """(training images, those selected, those erased: whose heat is not zero everywhere); zeros before the end."""
        state = files.read_json(self.progress) if self.progress.exists() else {}
        return [state.get(key, 0) for key in ("images", "selected", "erased")]

    def rows(self):
        """The index's lines, dicts keyed by INDEX. file: relative to the run's folder; area: share of pixels."""
        with open(self.index, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.DictReader(file))

    def left(self, images, batch_size):
        """The number of the first image of each batch that is not done."""
        files.make_folder(self.batches)
        done = {int(path.stem) for path in self.batches.glob("*.json")}
        return [] if self.counts()[0] == images else [i for i in range(0, images, batch_size) if i not in done]

    def add(self, start, entries, selected):
        """Write a batch's erased images, (uint8 [H, W, 3], its line but for file) each. start: its first image."""
        for picture, row in entries:
            folder = files.make_folder(self.folder / files.safe_name(row["label"]))
            path = folder / f"{files.safe_name(row['source'])}.jpg"
            row["file"] = path.relative_to(self.run_folder).as_posix()
            image = Image.fromarray(picture)
            files.write_atomically(path, lambda file, image=image: image.save(file, **JPEG), sync_name=False)
        for folder in {(self.run_folder / row["file"]).parent for _, row in entries}:
            files.sync_folder(folder)
        batch = {"selected": selected, "rows": [row for _, row in entries]}
        files.write_json(self.batches / f"{start:012}.json", batch)

    def join(self, images):
        """Write index and counts, once all batches of `images` in all are done. Returns `counts`."""
        if self.counts()[0] < images:
            batches = [files.read_json(path) for path in sorted(self.batches.glob("*.json"))]
            rows = [row for batch in batches for row in batch["rows"]]
            content, selected = _lines([dict(zip(INDEX, INDEX)), *rows]), sum(batch["selected"] for batch in batches)
            files.write_atomically(self.index, lambda file: file.write(content))
            files.write_json(self.progress, {"images": images, "selected": selected, "erased": len(rows)})
        shutil.rmtree(self.batches, ignore_errors=True)
        return self.counts()


def _lines(rows):
    text = io.StringIO()
    csv.DictWriter(text, INDEX).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


class _Joined:
    """Images of a Dataset, then those in files: item i is (PIL image, None), as a torchvision dataset gives them."""

    def __init__(self, dataset, files):
        self.dataset, self.files = dataset, files

    def __getitem__(self, index):
        own = len(self.dataset)
        return (self.dataset.open(index) if index < own else Image.open(self.files[index - own])), None


def with_erased(dataset, ids, rows, folder, budget):
    """The dataset with erased copies added, and what to train on.

    ids: of the training images. rows: of the copies, as `ErasedRound.rows` of the run in `folder` gives them.
    budget "equal": copies in place of their originals; "extra": copies behind the originals.
    Returns a Dataset, the training ids, and the set of those that are copies.
    """
    number = {image_id: i for i, image_id in enumerate(dataset.ids)}
    paths = [str(folder / row["file"]) for row in rows]
    copies = {row["source"]: f"erased copy of {row['source']}" for row in rows}
    labels = np.concatenate([dataset.labels, dataset.labels[[number[source] for source in copies]]])
    joined = Dataset(dataset.name, dataset.root, dataset.classes, [*dataset.ids, *copies.values()], labels,
                     _Joined(dataset, paths))
    if dataset.pixels is not None:
        decoded = Decoded(joined, np.arange(len(dataset), len(joined)), dataset.pixels.size)
        added = np.stack([decoded.pixels(i) for i in range(len(decoded))])
        joined.pixels = Pixels(*dataset.pixels.arrays, added)
    if dataset.decoy is not None:  # the copies' were there when they were erased
        joined.decoy = Decoy(np.concatenate([dataset.decoy.corners, np.full(len(paths), -1)]),
                             np.concatenate([dataset.decoy.colours, np.zeros((len(paths), 3), np.uint8)]))
    ids = [copies.get(i, i) for i in ids] if budget == "equal" else [*ids, *copies.values()]
    return joined, ids, set(copies.values())
