"""Arms of an experiment against a baseline: paired differences, how sure they are, and what they cost.

    python eval.py --experiment demo                                   # the runs that are finished of an experiment
    python eval.py runs/digits-a-s0 runs/digits-b-s0 …                 # any runs that differ in one setting, paired by seed

An arm is a set of settings; its runs differ in their seed alone. Each is paired with the baseline's run of the same seed, which has the
same split, so that what both find easy or hard cancels out. Statistics are scipy's.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

import experiment
import run
from data import UserError

LEVEL = 0.05
DRAWS = 10_000  # of the bootstrap
RESOLVE = 0.005  # half a point of accuracy: how many seeds would resolve it?
POWER = 0.8  # with which probability
FOLLOWS = {"layer": "cam", "area": "threshold", "epochs": "schedule", "rounds": "schedule"}  # settings that others decide
TASK = ("dataset", "data_dir", "classes", "model", "image_size", "train_fraction", "decoy")
PRICES = {"seconds": "train_seconds", "images": "images_seen", "steps": "optimizer_steps", "memory": "peak_gpu_allocated_mb",
          "energy": "energy_wh"}


class Result(NamedTuple):
    """A finished run. found: what `run.read_predictions` gives."""

    folder: object
    config: dict
    split: dict
    log: list
    metrics: dict
    found: dict

    @property
    def seed(self):
        return self.config["seed"]

    def correct(self, part):
        """Whether each image of a part was recognised, bool [N]."""
        return self.found[f"{part}_logits"].argmax(1) == self.found[f"{part}_labels"]


def read_result(folder):
    """A finished run; UserError where it is none."""
    opened = run.open_finished(folder)
    return Result(opened.folder, opened.config, opened.split, opened.log, run.read_json(opened.folder / "metrics.json"),
                  run.read_predictions(folder))


# --- arms ----------------------------------------------------------------------------------------------------------


def add_options(parser):
    """The options of a command line that say what is compared, as `arms_asked` reads them."""
    parser.add_argument("--experiment", metavar="NAME", help="compare the finished runs of an experiment of configs.json")
    parser.add_argument("--baseline", metavar="ARM", help="the arm that the others are compared with (default: the one without Proxy Attention)")
    parser.add_argument("--by", metavar="KEY,KEY", help="settings to compare, where runs differ in more than one")


def arms_asked(options):
    """The arms of --experiment, or of the runs that were named, and how many runs are left of the experiment."""
    if options.experiment:
        return arms_of_experiment(run.read_configs(), options.experiment, {"out": options.out} if options.out else {})
    return arms_of_runs(options.runs, options.by.split(",") if options.by else ()), 0


def arms_of_experiment(configs, name, given):
    """{arm: {seed: Result}} of an experiment's finished cells, and how many are left. given: settings as on the command line."""
    arms, left = {}, 0
    for cell in experiment.cells(configs, name, given):
        if cell.finished():
            arms.setdefault(cell.arm, {})[cell.seed] = read_result(cell.folder)
        else:
            left += 1
    return arms, left


def arms_of_runs(folders, by=()):
    """{arm: {seed: Result}} of runs that differ in the settings `by`, or else in one, besides the seed. Raises UserError."""
    results = [read_result(folder) for folder in folders]
    settings = {key: [r.config[key] for r in results] for key in (*run.SETTINGS, "dataset_entry", "model_entry")
                if key not in (*run.PER_MACHINE, "seed")}
    differing = [key for key, values in settings.items() if any(value != values[0] for value in values)]
    compared = list(by) or [key for key in differing if FOLLOWS.get(key) not in differing]
    other = [key for key in differing if key not in compared and FOLLOWS.get(key) not in compared]
    if len(compared) > 1 and not by or other:
        listed = "; ".join(f"{key}: {', '.join(dict.fromkeys(map(str, settings[key])))}" for key in (other if by else compared))
        raise UserError(f"these runs differ in more than one setting, so that no difference could be put down to it: {listed}. Leave runs out, or "
                        "name the settings to compare with --by KEY,KEY")
    arms = {}
    for result in results:
        label = ", ".join(f"{key} {result.config[key]}" for key in compared) or "run"
        for number in range(1, len(results) + 1):  # the same settings and seed again are an arm of their own
            arm = arms.setdefault(label if number == 1 else f"{label} ({number})", {})
            if result.seed not in arm:
                arm[result.seed] = result
                break
    return arms


def pick_baseline(arms, name=None):
    """The arm that the others are compared with: the one named, or the one without Proxy Attention, or the first."""
    if name is not None:
        if name not in arms:
            raise UserError(f"--baseline {name}: no such arm; there are {', '.join(arms)}{run._nearest(name, arms)}")
        return name
    without = [arm for arm, runs in arms.items() if all(r.config["cam"] == "none" for r in runs.values())]
    return "none" if "none" in arms else without[0] if without else next(iter(arms))


def groups(arms, baseline=None, by_task=True):
    """[(baseline, {arm: runs})]: arms of an experiment that were set the same task, and which of these the others are compared with.

    With a baseline, which is then that of all, or without by_task: one group.

    A task is the settings in TASK: an arm on a tenth of the images is compared with the baseline on a tenth of the images. The group of the arm
    that `pick_baseline` picks comes first.
    """
    if baseline or not by_task:
        return [(pick_baseline(arms, baseline), arms)]
    found = {}
    for arm, runs in arms.items():
        found.setdefault(tuple(str(next(iter(runs.values())).config[key]) for key in TASK), {})[arm] = runs
    first = pick_baseline(arms)
    return sorted(((pick_baseline(group), group) for group in found.values()), key=lambda pair: first not in pair[1])


def pairs(arm, baseline):
    """[(run of the arm, run of the baseline)] with the same seed; UserError where two of these do not have the same split."""
    found = []
    for seed in sorted(set(arm) & set(baseline)):
        a, b = arm[seed], baseline[seed]
        if a.split["fingerprint"] != b.split["fingerprint"] or a.split["test"] != b.split["test"]:
            raise UserError(f"{a.folder} and {b.folder} have seed {seed} and other test images: they cannot be compared")
        found.append((a, b))
    return found


# --- statistics ----------------------------------------------------------------------------------------------------


def bootstrap_interval(differences, shared):
    """95% interval of the mean difference, over seeds and test images (a two-level bootstrap, Davison and Hinkley 1997, section 3.8).

    differences: a list of S arrays [N_s], arm minus baseline, for each seed's test images: of what was correct, -1, 0 and 1, or of any figure.
    shared: whether these are the same images for all seeds, so that they are drawn together. With one seed over its images alone.
    """
    draw, seeds = np.random.default_rng(0), len(differences)
    chosen = draw.integers(seeds, size=(DRAWS, seeds))
    if shared:
        means = np.take_along_axis(_means_of_draws(draw, np.stack(differences), DRAWS), chosen, 1)
    elif differences[0].dtype != np.int8:
        means = np.empty(chosen.shape)
        for seed, values in enumerate(differences):
            means[chosen == seed] = _means_of_draws(draw, values[None], (chosen == seed).sum())[:, 0]
    else:  # drawing a seed's images anew changes how many of them are 1, 0 and -1
        counts = np.array([[(d == value).sum() for value in (1, 0, -1)] for d in differences])
        sizes = counts.sum(1)
        found = draw.multinomial(sizes[chosen], (counts / sizes[:, None])[chosen])
        means = (found[..., 0] - found[..., 2]) / sizes[chosen]
    return tuple(float(q) for q in np.quantile(means.mean(1), [LEVEL / 2, 1 - LEVEL / 2]))


def _means_of_draws(draw, values, draws):
    """Means of values [S, N] over so many draws of N of the N images with replacement, the same for all rows: [draws, S]."""
    images, means = values.shape[1], []
    for block in np.array_split(np.arange(draws), max(1, draws * images // 20_000_000)):
        weights = draw.multinomial(images, np.full(images, 1 / images), size=len(block)).astype(np.float32)
        means.append(weights @ values.T.astype(np.float32) / images)
    return np.concatenate(means)


def permutation_p(differences):
    """Two-sided p of a mean difference of zero, by flipping the signs of the seeds' differences [S]: exact up to 13 seeds."""
    if len(differences) < 2 or not np.any(differences):
        return 1.0
    return float(stats.permutation_test((np.asarray(differences),), np.mean, permutation_type="samples", n_resamples=9999,
                                        random_state=0).pvalue)


def mcnemar_p(gained, lost):
    """McNemar's exact test: of the images on which two networks differ, is a half right in each? (McNemar 1947)"""
    return float(stats.binomtest(int(gained), int(gained + lost)).pvalue) if gained + lost else 1.0


def holm(values):
    """p-values corrected for their number (Holm 1979)."""
    order = np.argsort(values)
    corrected = np.maximum.accumulate(np.asarray(values)[order] * np.arange(len(values), 0, -1))
    result = np.empty(len(values))
    result[order] = np.minimum(corrected, 1)
    return result.tolist()


def seeds_to_resolve(spread, difference=RESOLVE):
    """How many paired seeds a t-test needs to find a `difference` with probability POWER, given the differences' standard deviation."""
    if spread == 0:
        return 2
    low, high = 1, 2
    while not _power(high, difference / spread) >= POWER:
        low, high = high, 2 * high
        if high > 10**7:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(middle, difference / spread) >= POWER else (middle, high)
    return high


def _power(count, effect):
    """Power of a two-sided paired t-test. Above 1,000 pairs t is normal."""
    if count > 1000:
        return stats.norm.sf(stats.norm.ppf(1 - LEVEL / 2) - effect * np.sqrt(count))
    return stats.nct.sf(stats.t.ppf(1 - LEVEL / 2, count - 1), count - 1, effect * np.sqrt(count))


def fewest_seeds(arms=1):
    """So many seeds the permutation test needs before it can find anything: its least p is 2 in 2 to their number, and Holm's of `arms` that times as much."""
    return int(np.ceil(1 + np.log2(arms / LEVEL)))


# --- comparisons ---------------------------------------------------------------------------------------------------


def compare(arms, baseline, part="test"):
    """What every arm is worth beside the baseline, on one part: a dict per arm, the baseline first.

    Accuracies are shares, differences arm minus baseline. Keys: arm, seeds, mean, spread (standard deviation over seeds); and for all but the
    baseline pairs, difference, interval, p (permutation, over seeds), p_holm, p_mcnemar (pooled images), effect (Cohen's d_z), needed (seeds that
    would resolve half a point), says, price ({name: ratio to the baseline, median over pairs, or None}).
    """
    order = [baseline, *(arm for arm in arms if arm != baseline)]
    rows = []
    for arm in order:
        accuracies = [r.correct(part).mean() for r in arms[arm].values()]
        row = {"arm": arm, "seeds": len(accuracies), "mean": float(np.mean(accuracies)),
               "spread": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None}
        if arm != baseline:
            row |= _against(pairs(arms[arm], arms[baseline]), part)
        rows.append(row)
    compared = [row for row in rows[1:] if row["pairs"]]
    for row, p in zip(compared, holm([row["p"] for row in compared])):
        row["p_holm"] = p
        row["says"] = say(row, len(compared))
    return rows


def _against(paired, part):
    if not paired:
        return {"pairs": 0, "says": "no seed in common with the baseline"}
    found = [a.correct(part).astype(np.int8) - b.correct(part).astype(np.int8) for a, b in paired]
    differences = np.array([d.mean() for d in found])
    spread = float(differences.std(ddof=1)) if len(paired) > 1 else None
    shared = len(paired) > 1 and all(b.split["test"] == paired[0][1].split["test"] for _, b in paired)
    return {"pairs": len(paired), "difference": float(differences.mean()), "interval": bootstrap_interval(found, shared),
            "p": permutation_p(differences), "p_mcnemar": mcnemar_p(sum((d > 0).sum() for d in found), sum((d < 0).sum() for d in found)),
            "effect": float(differences.mean() / spread) if spread else None, "needed": seeds_to_resolve(spread) if spread is not None else None,
            "alike": not any(d.any() for d in found), "price": price(paired)}


def compare_values(values, baseline):
    """As `compare`, of any figure that each image of a run has, as those of explanations. values: {arm: {seed: float [N]}}.

    The same seed has the same images in every arm. Keys of a row: arm, seeds, mean, spread; and pairs, difference, interval, p, p_holm,
    effect.
    """
    rows = []
    for arm in [baseline, *(arm for arm in values if arm != baseline)]:
        means = [v.mean() for v in values[arm].values()]
        row = {"arm": arm, "seeds": len(means), "mean": float(np.mean(means)), "spread": float(np.std(means, ddof=1)) if len(means) > 1 else None}
        seeds = sorted(set(values[arm]) & set(values[baseline]))
        if arm != baseline and seeds:
            found = [values[arm][s].astype(np.float64) - values[baseline][s] for s in seeds]
            differences = np.array([d.mean() for d in found])
            spread = differences.std(ddof=1) if len(seeds) > 1 else 0
            row |= {"pairs": len(seeds), "difference": float(differences.mean()), "interval": bootstrap_interval(found, False),
                    "p": permutation_p(differences), "effect": float(differences.mean() / spread) if spread else None}
        rows.append(row)
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, holm([row["p"] for row in compared])):
        row["p_holm"] = p
    return rows


def risk_coverage(confidence, correct):
    """Share of errors among the most confident images, for each share of images kept: (coverage [N], risk [N]), El-Yaniv and Wiener 2010.

    The mean of the risks is the area under the curve (AURC, Geifman and El-Yaniv 2017): the lower, the better confidence tells errors apart.
    """
    order = np.argsort(-confidence, kind="stable")
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), np.cumsum(~correct[order]) / kept


def old_and_new(arms, first):
    """What continual learning kept and learned: accuracies on the classes of the first run and on the others, and what was forgotten.

    arms: {arm: {seed: Result}} of runs on all classes. first: {arm: {seed: Result}}, the run on the first classes that each arm started from, or any
    for one that started from nothing. forgotten: accuracy of the first run on the first classes' test images that both have, minus that after. Returns
    {arm: [{"seed", "old", "new", "forgotten"}]}.
    """
    found = {}
    for arm, runs in arms.items():
        found[arm] = []
        for seed, result in sorted(runs.items()):
            before = first[arm][seed]
            right, names = result.correct("test"), np.array(result.split["classes"])[result.found["test_labels"]]
            old = np.isin(names, before.split["classes"])
            then = dict(zip(before.split["test"], before.correct("test")))
            both = [i for i, image_id in enumerate(result.split["test"]) if image_id in then]
            kept = np.mean([then[result.split["test"][i]] for i in both]) - right[both].mean() if both else None
            found[arm].append({"seed": seed, "old": float(right[old].mean()), "new": float(right[~old].mean()),
                               "forgotten": None if kept is None else float(kept)})
    return found


def say(row, arms=1):
    """What a comparison's figures, as one of so many arms', allow to be said, in words."""
    points = 100 * row["difference"]
    if row["alike"]:
        return "right and wrong on the same images"
    if row["pairs"] < fewest_seeds():
        return f"too few seeds to tell: {row['pairs']}, at least {fewest_seeds()} are needed"
    if row["p_holm"] < LEVEL:
        return f"{'better' if points > 0 else 'worse'} by {abs(points):.2f} points"
    if row["p"] < LEVEL and row["pairs"] < fewest_seeds(arms):
        return f"too few seeds to tell among {arms} arms: {row['pairs']}, at least {fewest_seeds(arms)} are needed"
    return f"no difference larger than {100 * max(map(abs, row['interval'])):.2f} points"


def price(paired):
    """{what: ratio of the arm's to the baseline's, median over pairs}; None where a machine could not tell."""
    def ratio(key):
        values = [(a.metrics["cost"][key], b.metrics["cost"][key]) for a, b in paired]
        return float(np.median([x / y for x, y in values])) if all(x is not None and y for x, y in values) else None

    found = {name: ratio(key) for name, key in PRICES.items()}
    if found["memory"] is None:
        found["memory"] = ratio("peak_host_mb")
    return found


def reached(arms, baseline):
    """Question 3: when each run first reached the best validation accuracy of the baseline's run of its seed.

    Returns {arm: [{"seed", "epochs", "images", "seconds"}]}, with None where a run never did. Images and seconds are those trained on and
    in, since the run began.
    """
    found = {}
    for arm, runs in arms.items():
        found[arm] = []
        for seed in sorted(set(runs) & set(arms[baseline])):
            target = max(line["val_accuracy"] for line in arms[baseline][seed].log)
            log, when = runs[seed].log, None
            when = next((i for i, line in enumerate(log, 1) if line["val_accuracy"] >= target), None)
            found[arm].append({"seed": seed, "epochs": when, "images": sum(line["images_seen"] for line in log[:when]) if when else None,
                               "seconds": sum(line["train_seconds"] for line in log[:when]) if when else None})
    return found


def warnings_of(arms):
    """What a reader of the comparison must know: other machines or versions, other lengths, seeds without a partner."""
    results = [r for runs in arms.values() for r in runs.values()]
    texts = []
    made = [run.read_json(r.folder / "env.json") for r in results]
    for key in ("torch", "timm", "device", "processor", "commit"):
        if len({str(env.get(key)) for env in made}) > 1:
            texts.append(f"the runs were made with different {key}: {', '.join(sorted({str(env.get(key)) for env in made}))}")
    if len({frozenset(runs) for runs in arms.values()}) > 1:
        texts.append("the arms do not all have the same seeds: each is compared on those that it shares with the baseline")
    return texts


def describe(arms, baseline, part="test"):
    """The comparison as lines for a person."""
    rows = compare(arms, baseline, part)
    width = max(len(row["arm"]) for row in rows) + 2
    lines = [f"{part} accuracy in %, against {baseline!r}; 95% intervals over seeds and images, p over seeds by permutation, then corrected for the "
             "number of arms (Holm), McNemar's p over images", "",
             f"{'arm':{width}}{'seeds':>6}{'mean':>8}{'sd':>7}{'diff':>8}{'interval':>18}{'p':>8}{'Holm':>8}{'McNemar':>9}{'d_z':>7}{'seeds for 0.5':>15}"]
    for row in rows:
        spread = f"{100 * row['spread']:7.2f}" if row["spread"] is not None else f"{'-':>7}"
        text = f"{row['arm']:{width}}{row['seeds']:>6}{100 * row['mean']:8.2f}{spread}"
        if row.get("pairs"):
            low, high = row["interval"]
            effect = f"{row['effect']:7.2f}" if row["effect"] is not None else f"{'-':>7}"
            span = f"{100 * low:.2f} to {100 * high:.2f}"
            text += (f"{100 * row['difference']:8.2f}{span:>18}{row['p']:8.3f}{row['p_holm']:8.3f}{row['p_mcnemar']:9.3f}{effect}"
                     f"{row['needed'] if row['needed'] is not None else '-':>15}")
        lines.append(text)
    lines += ["", f"{'arm':{width}}" + "".join(f"{name:>10}" for name in PRICES) + "   times the baseline's"]
    for row in rows[1:]:
        if row["pairs"]:
            lines.append(f"{row['arm']:{width}}" + "".join(f"{'-' if v is None else f'{v:.3f}':>10}" for v in row["price"].values()))
    lines += ["", *(f"{row['arm']}: {row['says']}" for row in rows[1:])]
    return "\n".join(lines)
