"""Arms against a baseline: paired differences, how sure they are, and what they cost; what was reached, and what kept.

Shares are in [0, 1]; a difference is arm minus baseline. Seeds are what repeats: each gives an arm one figure.
"""

import functools
from pathlib import Path

import numpy as np

from study import faithfulness, statistics
from study.arms import pairs

PRICES = {"seconds": "train_seconds", "images": "images_seen", "steps": "optimizer_steps",
          "memory": "peak_gpu_allocated_mb", "energy": "energy_wh"}
TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # of validation accuracy, whatever the data: how soon is each reached?


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
        """The accuracies of every group on a part of the split, as `compare`, all of them one family."""
        return one_family([row for baseline, group in self.groups for row in compare(group, baseline, part)])

    def figures(self, values):
        """`compare_values` of every group. values: {arm: {seed: float}}."""
        return [row for baseline, group in self.groups
                for row in compare_values({arm: values[arm] for arm in group}, baseline)]


def compare(arms, baseline, part="test"):
    """The accuracy of every arm beside the baseline's, on one part of the split: as `compare_values`, and for all but
    the baseline price ({name: ratio to the baseline, or None}). Raises UserError where pairs have other test images.
    """
    paired = {arm: pairs(runs, arms[baseline]) for arm, runs in arms.items()}
    rows = compare_values({arm: {seed: run.correct(part).mean() for seed, run in runs.items()}
                           for arm, runs in arms.items()}, baseline)
    for row in rows[1:]:
        row["price"] = price(paired[row["arm"]]) if row["pairs"] else None
    return rows


def compare_values(values, baseline):
    """Any figure that each run has, of every arm beside the baseline's: a dict per arm, the baseline first.

    Keys: arm, seeds, mean, spread (standard deviation over seeds); for all but the baseline pairs, the number of seeds
    that both have; and where there are any difference, deviation (of the seeds' differences), interval (None for one
    seed), p (permutation, over seeds), effect (Cohen's d_z), needed (seeds that would resolve half a point).
    `one_family` corrects p. values: {arm: {seed: float}}.
    """
    rows = []
    for arm in [baseline, *(arm for arm in values if arm != baseline)]:
        means = list(values[arm].values())
        row = {"arm": arm, "seeds": len(means), "mean": float(np.mean(means)), "spread": spread(means)}
        rows.append(row)
        if arm == baseline:
            continue
        seeds = sorted(set(values[arm]) & set(values[baseline]))
        row["pairs"] = len(seeds)
        if seeds:
            gains = np.array([values[arm][seed] - values[baseline][seed] for seed in seeds], float)
            deviation = spread(gains)
            row |= {"difference": float(gains.mean().round(12)) + 0.0, "deviation": deviation,
                    "interval": statistics.interval(gains), "p": statistics.permutation_p(gains),
                    "effect": float(gains.mean() / deviation) if deviation else None,
                    "needed": None if deviation is None else statistics.seeds_to_resolve(deviation)}
    return rows


def spread(values):
    """Standard deviation over seeds; None for one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def one_family(rows):
    """The rows of a sentence or a table, with what Holm's correction over all of them leaves: p_holm and family, their
    number, in each row that has a p. A sentence that speaks of several measures, arms or sizes takes the rows of all.
    """
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, statistics.holm([row["p"] for row in compared])):
        row |= {"p_holm": p, "family": len(compared)}
    return rows


def say(row):
    """What the interval of a comparison of accuracies, and its p as `one_family` left it, allow to say, in words."""
    if "pairs" not in row:
        return "baseline"
    if not row["pairs"]:
        return "no seed in common with the baseline"
    if not row["difference"] and not row["deviation"]:
        return "the same in every seed"
    size, family = f"{'better' if row['difference'] > 0 else 'worse'} by {100 * abs(row['difference']):.2f} points", ""
    if row["pairs"] < 2:
        return f"{size} in one seed, which says nothing of others"
    low, high = sorted(100 * np.sign(row["difference"]) * end for end in row["interval"])
    if row["family"] > 1:
        family = f" after Holm over {row['family']} comparisons"
    if row["pairs"] < (least := statistics.fewest_seeds(row["family"])):
        verdict = f"{row['pairs']} seeds cannot be significant{family}, {least} can"
    else:
        verdict = f"{'significant' if row['p_holm'] < statistics.LEVEL else 'not significant'}{family}"
    return f"{size} ({low:.2f} to {high:.2f}), {verdict}"


def price(paired):
    """{what: ratio of the arm's to the baseline's, median over pairs}; None where a machine could not measure it."""
    def ratio(key):
        values = [(a.metrics["cost"][key], b.metrics["cost"][key]) for a, b in paired]
        return float(np.median([x / y for x, y in values])) if all(x is not None and y for x, y in values) else None

    found = {name: ratio(key) for name, key in PRICES.items()}
    if found["memory"] is None:
        found["memory"] = ratio("peak_host_mb")
    return found


def sooner(arms, baseline):
    """How soon each arm reaches each of TARGETS, against the baseline's runs of the same seeds, in epochs and images.

    A dict for each target that some run reaches, and each arm: target, arm, seeds, arrived (how many reach it), horizon
    (epochs, the fewest of these runs), and, for epochs and images, a row of `compare_values` of the time to the target.
    A run that never arrives is censored at the horizon and counts as that: such a mean is restricted, the area under
    the Kaplan-Meier curve up to the horizon (Royston and Parmar 2013). Images take the fewest images of these runs.
    """
    rows = []
    for target in TARGETS:
        each = [sooner_to(target, arm, arms, baseline) for arm in arms if set(arms[arm]) & set(arms[baseline])]
        rows += each if any(row["arrived"] for row in each) else []
    return rows


def sooner_to(target, arm, arms, baseline):
    """The dict of `sooner` of one target and one arm."""
    seeds = sorted(set(arms[arm]) & set(arms[baseline]))
    logs = {name: {seed: arms[name][seed].log for seed in seeds} for name in (baseline, arm)}
    horizon = min(len(log) for each in logs.values() for log in each.values())
    seen = {name: {seed: np.cumsum([line["images_seen"] for line in log[:horizon]]) for seed, log in each.items()}
            for name, each in logs.items()}
    most = min(images[-1] for each in seen.values() for images in each.values())
    epochs, images = {}, {}
    for name, each in logs.items():
        when = {seed: epoch_of(log[:horizon], target) for seed, log in each.items()}
        epochs[name] = {seed: epoch or horizon for seed, epoch in when.items()}
        images[name] = {seed: min(seen[name][seed][epoch - 1], most) if epoch else most for seed, epoch in when.items()}
    return {"target": target, "arm": arm, "seeds": len(seeds), "arrived": sum(map(bool, when.values())),
            "horizon": horizon, "epochs": compare_values(epochs, baseline)[-1],
            "images": compare_values(images, baseline)[-1]}


def epoch_of(log, target):
    """The first epoch, from 1, whose validation accuracy is at least target; None where there is none."""
    return next((epoch for epoch, line in enumerate(log, 1) if line["val_accuracy"] >= target), None)


def by_fraction(results):
    """{kind: {share of the training data: {seed: test accuracy}}} of (arm, Result) pairs; a kind is an arm at every
    share, of which it has two or more.
    """
    found = {}
    for arm, run in results:
        kind = found.setdefault(arm.split("-train_fraction=")[0], {})
        kind.setdefault(run.config["train_fraction"], {})[run.seed] = run.correct("test").mean()
    return {kind: dict(sorted(values.items())) for kind, values in found.items() if len(values) > 1}


def saved(kind, baseline):
    """{share: (estimate, interval), or None}: the part of its data that an arm saves the baseline, at most 1.

    On a share s the arm is as good as the baseline would be on s * 2^r: r is its gain on s, over seeds, divided by what
    the baseline gains there from a doubling (from the next smaller share to the next larger one), and 1 - 2^-r is
    saved; below 0, that much more is needed. The interval is Fieller's (`statistics.ratio_interval`). None where the
    baseline may gain nothing from more data, for then the ratio may be anything, or so little that r is more than 10: a
    slope between measured shares says nothing of a thousand times the data. kind, baseline: as in `by_fraction`.
    """
    found, shares = {}, list(baseline)
    for place, share in enumerate(shares):
        low, high = shares[max(0, place - 1)], shares[min(len(shares), place + 2) - 1]
        seeds = sorted(set(kind.get(share, ())) & set(baseline[share]) & set(baseline[low]) & set(baseline[high]))
        if seeds and low < high:
            gains = [kind[share][seed] - baseline[share][seed] for seed in seeds]
            doubling = [(baseline[high][seed] - baseline[low][seed]) / np.log2(high / low) for seed in seeds]
            near = abs(np.mean(gains)) < 10 * np.mean(doubling)
            interval = statistics.ratio_interval(gains, doubling) if near else None
            found[share] = interval and (1 - 2 ** -(np.mean(gains) / np.mean(doubling)),
                                         tuple(1 - 2**-end for end in interval))
    return found


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
