"""Arms against a baseline: paired differences, how sure they are, and what they cost; what was reached, and what kept.

Shares are in [0, 1]; a difference is arm minus baseline.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import metrics
from study import faithfulness, statistics
from study.arms import pairs

PRICES = {"seconds": "train_seconds", "images": "images_seen", "steps": "optimizer_steps",
          "memory": "peak_gpu_allocated_mb", "energy": "energy_wh"}


@dataclass(eq=False)
class Study:
    """What a report is made of: arms of finished runs, and how to open their networks.

    groups: [(baseline, arms)], each arm with those that were set the same task (`arms.groups`). about, command: what
    it is for, and what makes it. heat: whether to use networks and images, on `device`.
    """

    groups: list
    name: str = ""
    about: str = ""
    command: str = ""
    device: object = None
    heat: bool = True

    def __post_init__(self):
        self.baseline = self.groups[0][0]
        self.arms = {arm: runs for _, group in self.groups for arm, runs in group.items()}
        self.against = {arm: baseline for baseline, group in self.groups for arm in group}
        self.results = [(arm, runs[seed]) for arm, runs in self.arms.items() for seed in sorted(runs)]
        self.method = faithfulness.other_method({run.config["cam"] for _, run in self.results})  # for every network

    @functools.cache
    def rows(self, part="test"):
        """`compare` of every group."""
        return [row for baseline, group in self.groups for row in compare(group, baseline, part)]

    def figures(self, values):
        """`compare_values` of every group. values: {arm: {seed: float [N]}}."""
        return [row for baseline, group in self.groups
                for row in compare_values({arm: values[arm] for arm in group}, baseline)]


def compare(arms, baseline, part="test"):
    """The accuracy of every arm beside the baseline's, on one part of the split: a dict per arm, the baseline first.

    Keys: arm, seeds, mean, spread (standard deviation over seeds); and for all but the baseline pairs, difference,
    interval, p (permutation, over seeds), p_holm, effect (Cohen's d_z), needed (seeds that would resolve half a point),
    alike (right and wrong on the same images), says, price ({name: ratio to the baseline, or None}).
    """
    rows = _means({arm: {s: run.correct(part) for s, run in runs.items()} for arm, runs in arms.items()}, baseline)
    for row in rows[1:]:
        paired = pairs(arms[row["arm"]], arms[baseline])
        if not paired:
            row |= {"pairs": 0, "says": "no seed in common with the baseline"}
            continue
        found = [a.correct(part).astype(np.int8) - b.correct(part).astype(np.int8) for a, b in paired]
        shared = len(paired) > 1 and all(b.split["test"] == paired[0][1].split["test"] for _, b in paired)
        needed = statistics.seeds_to_resolve(np.std([d.mean() for d in found], ddof=1)) if len(paired) > 1 else None
        row |= _against(found, shared) | {"needed": needed, "alike": not any(d.any() for d in found),
                                          "price": price(paired)}
    compared = _correct(rows)
    for row in compared:
        row["says"] = say(row, len(compared))
    return rows


def compare_values(values, baseline):
    """As `compare`, of any figure that each image of a run has; without needed, alike, says and price.

    values: {arm: {seed: float [N]}}; the same seed has the same images in every arm.
    """
    rows = _means(values, baseline)
    for row in rows[1:]:
        arm, base = values[row["arm"]], values[baseline]
        if seeds := sorted(set(arm) & set(base)):
            row |= _against([arm[seed].astype(np.float64) - base[seed] for seed in seeds], False)
    _correct(rows)
    return rows


def _means(values, baseline):
    """A row for each arm, the baseline first: mean and spread over seeds of {arm: {seed: [N]}}."""
    rows = []
    for arm in [baseline, *(arm for arm in values if arm != baseline)]:
        means = [each.mean() for each in values[arm].values()]
        rows.append({"arm": arm, "seeds": len(means), "mean": float(np.mean(means)),
                     "spread": float(np.std(means, ddof=1)) if len(means) > 1 else None})
    return rows


def _against(found, shared):
    """What `compare` has of differences: S arrays [N_s]. shared: as in `statistics.bootstrap_interval`."""
    differences = np.array([d.mean() for d in found])
    spread = differences.std(ddof=1) if len(found) > 1 else 0
    return {"pairs": len(found), "difference": float(differences.mean()),
            "interval": statistics.bootstrap_interval(found, shared), "p": statistics.permutation_p(differences),
            "effect": float(differences.mean() / spread) if spread else None}


def _correct(rows):
    """Set p_holm of the rows that were compared, and return these."""
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, statistics.holm([row["p"] for row in compared])):
        row["p_holm"] = p
    return compared


def say(row, arms=1):
    """What a comparison's figures, as those of one of so many arms, allow to conclude, in words."""
    points = 100 * row["difference"]
    if row["alike"]:
        return "right and wrong on the same images"
    if row["pairs"] < (least := statistics.fewest_seeds()):
        return f"too few seeds to tell: {row['pairs']}, at least {least} are needed"
    if row["p_holm"] < statistics.LEVEL:
        return f"{'better' if points > 0 else 'worse'} by {abs(points):.2f} points"
    if row["p"] < statistics.LEVEL and row["pairs"] < (least := statistics.fewest_seeds(arms)):
        return f"too few seeds to tell among {arms} arms: {row['pairs']}, at least {least} are needed"
    return f"no difference larger than {100 * max(map(abs, row['interval'])):.2f} points"


def price(paired):
    """{what: ratio of the arm's to the baseline's, median over pairs}; None where a machine could not measure it."""
    def ratio(key):
        values = [(a.metrics["cost"][key], b.metrics["cost"][key]) for a, b in paired]
        return float(np.median([x / y for x, y in values])) if all(x is not None and y for x, y in values) else None

    found = {name: ratio(key) for name, key in PRICES.items()}
    if found["memory"] is None:
        found["memory"] = ratio("peak_host_mb")
    return found


# --- what the questions ask besides accuracy -----------------------------------------------------------------------


def reached(arms, baseline):
    """When each run first reached the best validation accuracy of the baseline's run of its seed.

    Returns {arm: [{"seed", "epochs", "images", "seconds"}]}, with None where a run never did. Images and seconds are
    those of training, since the run began.
    """
    found = {}
    for arm, runs in arms.items():
        found[arm] = []
        for seed in sorted(set(runs) & set(arms[baseline])):
            target, log = max(line["val_accuracy"] for line in arms[baseline][seed].log), runs[seed].log
            when = next((i for i, line in enumerate(log, 1) if line["val_accuracy"] >= target), None)
            images, seconds = (sum(line[key] for line in log[:when]) if when else None
                               for key in ("images_seen", "train_seconds"))
            found[arm].append({"seed": seed, "epochs": when, "images": images, "seconds": seconds})
    return found


def by_fraction(results):
    """{kind: {share of the training data: [test accuracy]}} of (arm, Result) pairs; a kind is an arm at every share."""
    found = {}
    for arm, run in results:
        kind = found.setdefault(arm.split("-train_fraction=")[0], {})
        kind.setdefault(run.config["train_fraction"], []).append(run.correct("test").mean())
    return {kind: dict(sorted(values.items())) for kind, values in found.items()}


def worst_groups(study):
    """{arm: (accuracies in the worst group, Sagawa et al. 2020, and their gains over the baseline)}, each [seeds]."""
    worst, found = {}, {}
    for arm, run in study.results:
        worst.setdefault(arm, {})[run.seed] = run.metrics["test"]["worst_group"]
    for arm, each in worst.items():
        base = worst[study.against[arm]] if study.against[arm] != arm else {}
        found[arm] = np.array(list(each.values())), np.array([each[seed] - base[seed] for seed in each if seed in base])
    return found


def added_classes(arms):
    """Arms that started from a run on fewer classes, and beside them those that learnt all classes at once.

    Returns two {arm: {seed: Result}}, as `old_and_new` takes them: these, and the runs on the first classes. Both are
    empty where no class was added.
    """
    by_folder = {Path(run.folder).resolve(): run for runs in arms.values() for run in runs.values()}
    later, first = {}, {}
    for arm, runs in arms.items():
        for seed, run in runs.items():
            start = by_folder.get(Path(run.config["init"]).resolve()) if run.config["init"] else None
            if start and set(run.split["classes"]) - set(start.split["classes"]):
                later.setdefault(arm, {})[seed], first.setdefault(arm, {})[seed] = run, start
    sizes = {len(run.split["classes"]) for runs in later.values() for run in runs.values()}
    some = next(iter(first.values()), {})
    for arm, runs in arms.items():
        if at_once := {seed: run for seed, run in runs.items()
                       if seed in some and not run.config["init"] and len(run.split["classes"]) in sizes}:
            later[arm], first[arm] = at_once, some
    return later, first


def old_and_new(arms, first):
    """What continual learning kept and learned: accuracies on the first run's classes and on the others.

    arms, first: {arm: {seed: Result}}, runs on all classes and on the first ones, as of `added_classes`. Returns
    {arm: [{"seed", "old", "new", "forgotten"}]}; forgotten: accuracy of the first run on the test images that both
    have, minus that after, or None.
    """
    found = {}
    for arm, runs in arms.items():
        found[arm] = []
        for seed, run in sorted(runs.items()):
            before, right = first[arm][seed], run.correct("test")
            old = np.isin(np.array(run.split["classes"])[run.found["test_labels"]], before.split["classes"])
            then = dict(zip(before.split["test"], before.correct("test")))
            both = [i for i, image_id in enumerate(run.split["test"]) if image_id in then]
            lost = float(np.mean([then[run.split["test"][i]] for i in both]) - right[both].mean()) if both else None
            found[arm].append({"seed": seed, "old": float(right[old].mean()), "new": float(right[~old].mean()),
                               "forgotten": lost})
    return found


def probabilities(run):
    """A run's probabilities on the test images, each [N]: of the predicted class, and of the true class."""
    shares, labels = metrics.softmax(run.found["test_logits"]), run.found["test_labels"]
    return shares.max(1), shares[np.arange(len(labels)), labels]


def misled_confidence(arm, baseline):
    """Of the test images that misled the baseline: its confidence, the arm's, and whether the arm is right there, [N].

    None where no image misled it. arm, baseline: {seed: Result}.
    """
    found = []
    for a, b in pairs(arm, baseline):
        wrong = ~b.correct("test")
        found.append([probabilities(b)[0][wrong], probabilities(a)[0][wrong], a.correct("test")[wrong]])
    joined = [np.concatenate(parts) for parts in zip(*found)]
    return joined if joined and len(joined[0]) else None
