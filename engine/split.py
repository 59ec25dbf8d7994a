"""Which image serves for what: the split into training, validation and test images, drawn once for a run.

    rule = {"rule": "stratified", "val": 0.1, "test": 0.2}
    split = make_split(dataset, rule, seed=0)    # {"train": [ids], "val": [ids], "test": [ids]}
"""

import numpy as np

from engine.chance import numpy_generator
from engine.files import UserError

PARTS = ("train", "val", "test")


def make_split(dataset, rule, seed, train_fraction=1.0, known=None):
    """Which images train, validate and test: made once from the seed and the ids, then stored with the run.

    rule: {"rule": "stratified" | "blocks", "val": share, "test": share, "blocks": blocks per class}.
      stratified: random within each class; images of equal content stay together.
      blocks: each class's images, in natural order, are cut into `blocks` runs of consecutive ones, and a run goes to
      one part as it is: consecutive video frames are near-copies that a random split would put on both sides.
    Where the dataset brings its own parts they are kept: test is its test part, or, without one, its val part, and a
    validation part it lacks is drawn from its training part.
    known: {id: part} of the run that this one starts from: these images keep their part, and further images of a class
    that it had are trained on, so that nothing it was trained on comes to be tested on. What it was trained on comes
    first where only a train_fraction is used: the same fraction of the same classes is the same images.
    Returns {"train": [ids], "val": [ids], "test": [ids]}; no content is in two parts. Raises UserError.
    """
    everything = np.arange(len(dataset))
    if dataset.parts is None:
        parts = _draw(dataset, everything, rule, seed, {"test": rule["test"], "val": rule["val"]})
    else:
        own = np.array(dataset.parts)
        held_out = "test" if "test" in own else "val"
        parts = {"train": everything[own == "train"], "test": everything[own == held_out]}
        if held_out == "test" and "val" in own:
            parts["val"] = everything[own == "val"]
        else:
            parts |= _draw(dataset, parts["train"], rule, seed, {"val": rule["val"]})
    if known:
        parts = _keep_known(dataset, parts, known)
    seen = set()  # a copy of a held-out image must not be trained on, whatever the dataset's authors did
    for part in ("test", "val", "train"):
        parts[part] = [i for i in parts[part] if dataset.digests[i] not in seen]
        seen |= {dataset.digests[i] for i in parts[part]}
    held_out = set(dataset.labels[[*parts["val"], *parts["test"]]].tolist())
    if lost := held_out - set(dataset.labels[parts["train"]].tolist()):
        raise UserError(f"dataset {dataset.name}: class {dataset.classes[min(lost)]!r} has no image left to train on.")
    for part in ("val", "test"):
        if not len(parts[part]):
            raise UserError(f"dataset {dataset.name}: no image left for the {part} part. Expected at least three "
                            "different images per class.")
    parts["train"] = _fraction(dataset, parts["train"], train_fraction, seed, known or {})
    return {part: [dataset.ids[i] for i in sorted(parts[part])] for part in PARTS}


def _draw(dataset, indices, rule, seed, shares):
    """Deal `indices` out, class by class, into the named shares and the rest, "train"."""
    dealt = {part: [] for part in (*shares, "train")}
    for label, members in _by_class(dataset, indices):
        if rule["rule"] == "blocks":
            units = [block.tolist() for block in np.array_split(members, min(rule["blocks"], len(members)))]
        else:
            alike = {}
            for i in members.tolist():
                alike.setdefault(dataset.digests[i], []).append(i)
            units = list(alike.values())
        if len(units) <= len(shares):
            raise UserError(f"dataset {dataset.name}: class {dataset.classes[label]!r} has {len(units)} different "
                            f"images; the split needs at least {len(shares) + 1}.")
        units = [units[i] for i in numpy_generator("split", seed, dataset.classes[label]).permutation(len(units))]
        for number, (part, share) in enumerate(shares.items()):
            # at least one unit each, and one left for every part still to come
            wanted, count, still = share * len(members), 0, len(shares) - number
            while len(units) > still and (count == 0 or count + len(units[-1]) / 2 <= wanted):
                unit = units.pop()
                dealt[part] += unit
                count += len(unit)
        dealt["train"] += [i for unit in units for i in unit]
    return dealt


def _keep_known(dataset, parts, known):
    labels = dataset.labels.tolist()
    had = {label for image_id, label in zip(dataset.ids, labels) if image_id in known}
    kept = {part: [i for i in members if labels[i] not in had] for part, members in parts.items()}
    for i, (image_id, label) in enumerate(zip(dataset.ids, labels)):
        if label in had:
            kept[known.get(image_id, "train")].append(i)
    return kept


def redraw(dataset, split, seed, number):
    """A new split of the training and validation images, of the same sizes class by class; the test images stay.

    This is what the published implementation does at each proxy round. It puts images that were trained on into the
    validation part, so that validation accuracy no longer shows how good the network is. `number` counts these draws;
    whichever draw of the same images `split` holds, the answer is the same.
    """
    index = {image_id: i for i, image_id in enumerate(dataset.ids)}
    validation, parts = {index[i] for i in split["val"]}, {"train": [], "val": []}
    for label, members in _by_class(dataset, sorted({index[i] for i in split["train"]} | validation)):
        order = numpy_generator("resplit", seed, number, dataset.classes[label]).permutation(len(members))
        count = sum(i in validation for i in members.tolist())
        parts["val"] += members[order[:count]].tolist()
        parts["train"] += members[order[count:]].tolist()
    return {**split, **{part: [dataset.ids[i] for i in sorted(members)] for part, members in parts.items()}}


def _fraction(dataset, indices, fraction, seed, first):
    """A stratified `fraction` of `indices`, at least one per class, `first` first; smaller ones lie in larger ones."""
    if fraction == 1:
        return indices
    kept = []
    for label, members in _by_class(dataset, indices):
        order = numpy_generator("fraction", seed, dataset.classes[label]).permutation(len(members))
        if first:
            order = sorted(order, key=lambda i: dataset.ids[members[i]] not in first)
        kept += [members[i] for i in order[: max(1, round(fraction * len(members)))]]
    return kept


def _by_class(dataset, indices):
    indices = np.asarray(indices, dtype=np.int64)
    labels = dataset.labels[indices]
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    yield from zip(found.tolist(), np.split(indices[order], starts[1:]))
