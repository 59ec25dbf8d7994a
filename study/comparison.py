"""Arms against a baseline: paired differences, how sure they are, and what they cost; what was reached, and what kept.

Shares are in [0, 1]; a difference is arm minus baseline.
"""

import functools
from pathlib import Path

import numpy as np

from study import faithfulness, statistics
from study.arms import pairs

PRICES = {"seconds": "train_seconds", "images": "images_seen", "steps": "optimizer_steps",
          "memory": "peak_gpu_allocated_mb", "energy": "energy_wh"}


class Study:
    """What a report is made of: arms of finished runs, and how to open their networks.

    groups: [(baseline, arms)], each arm with those that were set the same task (`arms.groups`). about, command: what
    it is for, and what makes it. heat: whether to use networks and images, on `device`.
    """

    def __init__(self, groups, name="", about="", command="", device=None, heat=True):
        self.groups, self.name, self.about, self.command = groups, name, about, command
        self.device, self.heat, self.baseline = device, heat, groups[0][0]
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
    """The accuracy of every arm beside the baseline's, on one part of the split: as `compare_values`, and for all but
    the baseline needed (seeds that would resolve half a point), alike (right and wrong on the same images), says, price
    ({name: ratio to the baseline, or None}).
    """
    right = {arm: {seed: run.correct(part) for seed, run in runs.items()} for arm, runs in arms.items()}
    paired = {arm: pairs(runs, arms[baseline]) for arm, runs in arms.items()}
    shared = {arm for arm, found in paired.items()
              if len(found) > 1 and all(b.split["test"] == found[0][1].split["test"] for _, b in found)}
    rows = compare_values(right, baseline, shared)
    count = sum("p" in row for row in rows)
    for row in rows[1:]:
        found = paired[row["arm"]]
        if not found:
            row |= {"pairs": 0, "says": "no seed in common with the baseline"}
            continue
        row["alike"] = all(np.array_equal(a.correct(part), b.correct(part)) for a, b in found)
        row["needed"] = statistics.seeds_to_resolve(row["deviation"]) if len(found) > 1 else None
        row |= {"says": say(row, count), "price": price(found)}
    return rows


def compare_values(values, baseline, shared=()):
    """Any figure that each image of a run has, of every arm beside the baseline's: a dict per arm, the baseline first.

    Keys: arm, seeds, mean, spread (standard deviation over seeds); and for arms that share seeds with the baseline
    pairs, difference, deviation (of the seeds' differences), interval, p (permutation, over seeds), p_holm, effect
    (Cohen's d_z). values: {arm: {seed: bool or float [N]}}; a seed has the same images in every arm. shared: arms whose
    seeds all have the same images.
    """
    rows = []
    for arm in [baseline, *(arm for arm in values if arm != baseline)]:
        means = [each.mean() for each in values[arm].values()]
        row = {"arm": arm, "seeds": len(means), "mean": float(np.mean(means)),
               "spread": float(np.std(means, ddof=1)) if len(means) > 1 else None}
        rows.append(row)
        seeds = sorted(set(values[arm]) & set(values[baseline]))
        if arm == baseline or not seeds:
            continue
        kind = np.int8 if values[arm][seeds[0]].dtype == bool else np.float64
        found = [values[arm][seed].astype(kind) - values[baseline][seed] for seed in seeds]
        gains = np.array([each.mean() for each in found])
        deviation = gains.std(ddof=1) if len(gains) > 1 else None
        row |= {"pairs": len(gains), "difference": float(gains.mean()), "deviation": deviation,
                "interval": statistics.bootstrap_interval(found, arm in shared),
                "p": statistics.permutation_p(gains), "effect": float(gains.mean() / deviation) if deviation else None}
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, statistics.holm([row["p"] for row in compared])):
        row["p_holm"] = p
    return rows


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


def reached(arms, baseline):
    """When each run first reached the best validation accuracy of the baseline's run of its seed, of training since the
    run began: {arm: [{"seed", "epochs", "images", "seconds"}]}, None where it never did.
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


def added_classes(arms):
    """Two {arm: {seed: Result}} for `old_and_new`: arms that started from a run on fewer classes, and those that learnt
    all classes at once; and their runs on the first classes. Both are empty where no class was added.
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
    """Accuracies on the first run's classes and on those added: {arm: [{"seed", "old", "new", "forgotten"}]}.

    forgotten: accuracy of the first run on the test images that both have, minus that after, or None. arms, first:
    {arm: {seed: Result}}, of `added_classes`.
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


def misled_confidence(arm, baseline):
    """Of the test images that misled the baseline: its confidence, the arm's, and whether the arm is right there, [N].

    None where no image misled it. arm, baseline: {seed: Result}.
    """
    found = []
    for a, b in pairs(arm, baseline):
        wrong = ~b.correct("test")
        found.append([b.confidence()[wrong], a.confidence()[wrong], a.correct("test")[wrong]])
    joined = [np.concatenate(parts) for parts in zip(*found)]
    return joined if joined and len(joined[0]) else None
