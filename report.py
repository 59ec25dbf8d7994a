"""The answers to the research questions, as a page to look at: one HTML file, and every figure and table of it for a thesis.

    python report.py --experiment demo                  # what is finished of an experiment, into runs/demo/report/
    python report.py runs/A-s0 runs/B-s0 …              # runs that differ in one setting, into ./report/
    python report.py --experiment demo --no-heat        # without what needs networks and images: a few seconds

`report.html` needs no network and no other file. Beside it lie figures/*.png and *.pdf, tables/*.csv and *.tex (booktabs). Each question is a
function in QUESTIONS, which gives a `Section`; one that the runs do not ask says what to run.
"""

import argparse
import base64
import csv
import html
import io
import itertools
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

import cam
import compare
import data
import eval as evaluation
import experiment
import explain
import run
from data import UserError

# Okabe and Ito's colours, which colour-blind readers tell apart, darkest first; markers differ too.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c8c8c")
MARKERS = "osD^vP*X"
PICTURES = 6  # test images on which arms disagree most
BANDS = 6  # more arms would hide each other behind their bands: their lines alone
MEASURES = {"deletion": "deletion, area (lower is better)", "insertion": "insertion, area (higher)", "drop": "drop in confidence (lower)",
            "increase": "increase in confidence (higher)", "road": "ROAD (higher)", "sensitivity": "sensitivity to the weights (higher)",
            "pointing": "pointing game", "inside": "share of heat inside"}


def style_of(place):
    """Colour, marker and line of the arm at this place among all."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "linestyle": ("-", "--", ":")[place // len(COLOURS) % 3]}


@dataclass
class Table:
    """A table: rows of texts and numbers under a header. arm: the column that names the arm, or None."""

    name: str
    caption: str
    header: list
    rows: list
    arm: int | None = 0


@dataclass
class Picture:
    """A figure, and what it shows in words for those who cannot see it."""

    name: str
    figure: Figure
    caption: str
    alternative: str


@dataclass
class Section:
    """A question, its answer in a sentence or two, and what shows it."""

    title: str
    answer: str
    parts: list = field(default_factory=list)  # Tables and Pictures


@dataclass
class Study:
    """What a report is made of: arms of finished runs, and how to look at their networks.

    groups: [(baseline, arms)], each arm with those that were set the same task (`compare.groups`).
    """

    groups: list
    name: str
    about: str
    command: str
    device: object
    heat: bool = True
    _rows: dict = field(default_factory=dict)

    def __post_init__(self):
        self.arms = {arm: runs for _, group in self.groups for arm, runs in group.items()}
        self.baseline = self.groups[0][0]
        self.against = {arm: baseline for baseline, group in self.groups for arm in group}

    def rows(self, part="test"):
        """`compare.compare` of every group, once per part."""
        if part not in self._rows:
            self._rows[part] = [row for baseline, group in self.groups for row in compare.compare(group, baseline, part)]
        return self._rows[part]

    def figures(self, values):
        """`compare.compare_values` of every group. values: {arm: {seed: float [N]}}."""
        return [row for baseline, group in self.groups for row in compare.compare_values({arm: values[arm] for arm in group}, baseline)]

    def others(self):
        """The arms that are compared with another."""
        return [arm for arm, baseline in self.against.items() if arm != baseline]

    def style(self, arm):
        return style_of(list(self.arms).index(arm))

    def results(self):
        return [(arm, result) for arm, runs in self.arms.items() for _, result in sorted(runs.items())]

    def methods(self):
        """The CAM methods that any arm was trained with."""
        return {r.config["cam"] for _, r in self.results()}


def points(value, digits=2, sign=False):
    """A share as percentage points; a dash for None."""
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.{digits}f}"


def number(value, digits=3):
    """A figure with so many digits; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


# --- figures -------------------------------------------------------------------------------------------------------


def dots(rows, label, scale=100.0):
    """Differences to the baseline with their 95% intervals, an arm per line."""
    rows = [row for row in rows if row.get("pairs")]
    figure = Figure((7, 0.9 + 0.32 * len(rows)), layout="constrained")
    draw_dots(figure.add_subplot(xlabel=label), rows, scale)
    return figure


def draw_dots(axes, rows, scale=1.0):
    """The dots and lines of `dots` on axes."""
    for place, row in enumerate(rows):
        low, high = (scale * x for x in row["interval"])
        axes.plot([low, high], [place, place], color=COLOURS[1], linewidth=2)
        axes.plot(scale * row["difference"], place, "o", color=COLOURS[1])
    axes.axvline(0, color="0.5", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6)  # more run into each other
    plain(axes)


def in_words(rows, scale=100.0, unit=" points"):
    """What `dots` shows, for those who cannot see it."""
    return "; ".join(f"{r['arm']} {scale * r['difference']:+.2f}{unit}, interval {scale * r['interval'][0]:.2f} to {scale * r['interval'][1]:.2f}"
                     for r in rows if r.get("pairs"))


def plain(axes):
    """Names are shown as they are, also where they hold dollar signs."""
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title, *(axes.get_legend().get_texts() if axes.get_legend() else ())):
        text.set_parse_math(False)


def curves(study, name, key, what, unit="", share=1.0):
    """The Picture of a number of the log, epoch by epoch: of each arm the mean over seeds, and for up to BANDS arms the band from the least to the greatest."""
    label, bands = what + unit, len(study.arms) <= BANDS
    figure, ends = Figure((7, 4), layout="constrained"), []
    axes = figure.add_subplot(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for arm, runs in study.arms.items():
        length = min(len(r.log) for r in runs.values())
        values = np.array([[share * line[key] for line in r.log[:length]] for r in runs.values()])
        style, epochs = study.style(arm), np.arange(1, length + 1)
        axes.plot(epochs, values.mean(0), label=arm, markevery=max(1, length // 8), markersize=4, **style)
        if len(values) > 1 and bands:
            axes.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
        ends.append(f"{arm} {values[:, -1].mean():.3g}")
    legend(axes)
    caption = f"{what.capitalize()} over epochs: mean over seeds" + (", and the band from the lowest seed to the highest." if bands else ".")
    return Picture(name, figure, caption, f"{label} over epochs; at the end " + ", ".join(ends))


def legend(axes):
    """A legend in as many columns as keep it low."""
    axes.legend(fontsize=8, ncols=1 + len(axes.get_legend_handles_labels()[1]) // 12)
    plain(axes)


# --- the questions -------------------------------------------------------------------------------------------------


def augmentation(study):
    """Question 1: is it an augmentation?"""
    rows = study.rows()
    compared = [row for row in rows if row.get("pairs")]
    base = f"{study.baseline} reaches {points(rows[0]['mean'])}% on test over {rows[0]['seeds']} seeds"
    answer = f"{base}. {verdicts(compared)}."
    against = study.baseline if len(study.groups) == 1 else "the same without it"
    header = ["arm", "against", "seeds", "accuracy %", "sd", "difference", "95% interval", "p", "p, Holm", "McNemar p", "d_z", "seeds for 0.5", "in words"]
    found = [[row["arm"], study.against[row["arm"]], row["seeds"], points(row["mean"]), points(row["spread"])] + ([
        points(row["difference"], sign=True), f"{points(row['interval'][0])} to {points(row['interval'][1])}", number(row["p"]),
        number(row["p_holm"]), number(row["p_mcnemar"]), number(row["effect"], 2), row["needed"] if row["needed"] is not None else "–", row["says"]]
        if row.get("pairs") else ["–"] * 7 + [row.get("says", "baseline")]) for row in rows]
    prices = [[row["arm"], study.against[row["arm"]], *(number(value) for value in row["price"].values())] for row in compared]
    parts = [Picture("augmentation", dots(rows, f"test accuracy, points against {against}"),
                     "Differences in test accuracy, paired by seed, with 95% intervals.", in_words(compared))] if compared else []
    return Section("Can attention maps make an augmentation?", answer, [
        *parts, Table("augmentation", "Test accuracy by arm. Differences are paired by seed; intervals by bootstrap over seeds and test images; p by "
                      "permutation over seeds, then corrected by Holm over the arms with the same baseline; d_z is Cohen's; the last but one column is how "
                      "many seeds would resolve 0.5 points.", header, found),
        Table("price", "What each arm costs, as multiples of what it is compared with (medians over seeds).", ["arm", "against", *compare.PRICES], prices)])


def verdicts(rows):
    """What a comparison found, in a sentence: each arm in words, or of many arms how many of each kind and which."""
    if len(rows) <= 3:
        return "; ".join(f"{row['arm']} ({points(row['difference'], sign=True)} points): {row['says']}" for row in rows) or "There is nothing to compare it with"
    kinds = {word: [row for row in rows if row["says"].startswith(start)] for word, start in
             (("better", "better"), ("worse", "worse"), ("with too few seeds to tell", "too few"), ("with no difference found", ("no difference", "right and wrong")))}
    says = "; ".join(f"{len(found)} {word}" + f" ({', '.join(repr(row['arm']) for row in found)})" * bool(found and word in ("better", "worse"))
                     for word, found in kinds.items() if found or word == "better")
    spans = [max(map(abs, row["interval"])) for row in kinds["with no difference found"]]
    return f"Of {len(rows)} arms {says}" + (f", and none larger than {points(max(spans))} points likely" if spans else "")


def attention(study):
    """Question 2: does the CNN look where the ViT attends?"""
    title = "Can a CNN be brought to look where a ViT attends?"
    transformers = [arm for arm, runs in study.arms.items() if _attends(next(iter(runs.values())))]
    others = [arm for arm in study.arms if arm not in transformers]
    if not transformers or not others or not study.heat:
        return Section(title, "Left out by --no-heat." if transformers and others else "Not asked by these runs: it takes arms with a ViT and arms with a "
                       "CNN on the same data, as in python train.py --experiment vit-attention.")
    vit, base = (compare.pick_baseline({arm: study.arms[arm] for arm in arms}) for arms in (transformers, others))
    method = explain.other_method(study.methods())
    values = {"correlation": {}, "overlap": {}}
    for arm in others:
        for a, b in compare.pairs(study.arms[arm], study.arms[vit]):
            for key, found in likeness(study, a, method, b, "rollout").items():
                values[key].setdefault(arm, {})[a.seed] = found
    if base not in values["correlation"]:
        return Section(title, f"{base} and {vit} have no seed in common.")
    rows = {key: compare.compare_values(values[key], base) for key in values}
    table = [[a["arm"], number(a["mean"]), _span(a), number(b["mean"]), _span(b), number(a.get("p")), number(a.get("p_holm"))] for a, b in zip(*rows.values())]
    for name, likes in reference_likeness(study, base, vit, method).items():
        cells = []
        for key in values:
            low, high = compare.bootstrap_interval([like[key] for like in likes], False)
            cells += [number(float(np.mean([like[key].mean() for like in likes]))), f"its own: {low:.3f} to {high:.3f}"]
        table.append([name, *cells, "–", "–"])
    says = in_words(rows["correlation"], 1.0, "")
    few = min((row["pairs"] for row in rows["correlation"][1:]), default=0) < compare.fewest_seeds()
    answer = (f"The heat ({method}) of {base} and the attention rollout of {vit} have a rank correlation of {rows['correlation'][0]['mean']:.3f}"
              + "".join(f"; {row[0]} have {row[1]}" if "seeds" in row[0] else f"; {row[0]} has {row[1]}" for row in table[len(rows["correlation"]):])
              + (f". Against {base}: {says}" + (" (too few seeds to tell)" if few else "") if says else "") + ".")
    return Section(title, answer, [
        Picture("attention", dots(rows["correlation"], f"rank correlation with {vit}, difference to {base}", 1.0),
                f"How much nearer each arm's heat is to the attention rollout of {vit} than that of {base}, with 95% intervals.", says or "no other arm"),
        Table("attention", f"How alike {method} heat is to the attention rollout of {vit}, on the same test images: rank correlation over pixels, and "
              "intersection over union of the hottest fifth. Below, what to compare with, with intervals of their own.",
              ["arm", "correlation", "difference, 95% interval", "overlap", "difference, 95% interval", "p", "p, Holm"], table)])


def _span(row):
    return f"{row['difference']:+.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})" if row.get("pairs") else "–"


def _attends(result):
    """Whether a run's network has the plain attention that rollout reads, over enough patches."""
    model = run.build_network(result.config, len(result.split["classes"]), pretrained=False)[0].eval()
    try:
        explain.heat_of(model, torch.zeros(1, 3, *[result.config["image_size"]] * 2), "rollout", None)
        return True
    except ValueError:
        return False


def heats(study, result, ids, method):
    """Heat [N, H, W] on the CPU of a run's predicted classes in images `ids`."""
    config = result.config
    opened = run.open_run(result.folder)
    dataset = opened.dataset()
    if dataset.pixels is None:
        evaluation.open_pixels(config, dataset, build=False)
    model = opened.network().to(study.device)
    mean, std = (t.to(study.device) for t in run.normalisation(config, model))
    layer = config["layer"] if config["cam"] not in cam.ATTENTION else None
    batches = data.Batches(dataset, ids, config["image_size"], evaluation.explained_at_once(config["image_size"]), study.device)
    return torch.cat([explain.heat_of(model, data.prepare(pixels, mean, std), method, layer)[0].cpu() for pixels, _ in batches])


def likeness(study, a, method_a, b, method_b, ids=None):
    """{"correlation", "overlap"} [N] of two runs' heats in the same test images."""
    ids = ids or data.shuffled(a.split["test"], "explained", a.seed)[:evaluation.EXPLAINED]
    one, two = heats(study, a, ids, method_a), heats(study, b, ids, method_b)
    if one.shape != two.shape:
        two = torch.nn.functional.interpolate(two[:, None], one.shape[1:], mode="bilinear")[:, 0]
    return {"correlation": explain.rank_correlation(one, two).numpy(), "overlap": explain.overlap(one, two).numpy()}


def reference_likeness(study, base, vit, method):
    """What the likeness of a CNN and a ViT is to be compared with: {name: [likeness]}.

    Two seeds of one CNN, on test images that both have, so that neither was trained on them; and the ViT with a Gaussian in the middle.
    """
    runs, found = [r for _, r in sorted(study.arms[base].items())], {}
    for a, b in zip(runs, runs[1:]):
        theirs = set(b.split["test"])
        both = [i for i in a.split["test"] if i in theirs][:evaluation.EXPLAINED]
        if both:
            found.setdefault(f"two seeds of {base}", []).append(likeness(study, a, method, b, method, both))
    found["a centred Gaussian"] = [likeness(study, r, "center", r, "rollout") for r in study.arms[vit].values()]
    return found


def convergence(study):
    """Question 3: sooner, and with less data?"""
    parts = [curves(study, "convergence", "val_accuracy", "validation accuracy", " %", 100)]
    table, says = [], []
    for baseline, group in study.groups:
        for arm, runs in compare.reached(group, baseline).items():
            got = [r for r in runs if r["epochs"]]
            cells = [f"{np.mean([r[key] for r in got]):.{digits}f}" if got else "–" for key, digits in (("epochs", 1), ("images", 0), ("seconds", 1))]
            table.append([arm, baseline, f"{len(got)} of {len(runs)}", *cells])
            if arm != baseline:
                says.append(f"{arm} reaches that in {len(got)} of {len(runs)} seeds" + (f", after {cells[0]} epochs on average" if got else ""))
    first = next(row for row in table if row[0] == study.baseline)
    answer = f"{study.baseline} reaches its best validation accuracy after {first[3]} epochs; " + "; ".join(says[:3]) + ("; …" * (len(says) > 3)) + "."
    parts.append(Table("convergence", "When each run first reached the best validation accuracy that the arm it is compared with had with the same seed: means "
                       "over the seeds that did.", ["arm", "against", "seeds that did", "epochs", "images", "seconds"], table))
    if fractions := by_fraction(study):
        part, text = fractions
        parts += part
        answer += f" {text}"
    return Section("Does the network converge faster, and so need less data?", answer, parts)


def by_fraction(study):
    """Accuracy against the share of the training data, where that varies: ([Picture, Table], a sentence), or None."""
    found = {}
    for arm, result in study.results():
        found.setdefault(arm.split("-train_fraction=")[0], {}).setdefault(result.config["train_fraction"], []).append(result.correct("test").mean())
    fractions = sorted({f for kind in found.values() for f in kind})
    if len(fractions) < 2:
        return None
    figure = Figure((7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="share of the training data %", ylabel="test accuracy %", xscale="log")
    for place, (kind, values) in enumerate(found.items()):
        x = sorted(values)
        mean, half = (np.array([100 * function(values[f]) for f in x]) for function in (np.mean, half_interval))
        axes.plot([100 * f for f in x], mean, label=kind, **style_of(place))
        axes.fill_between([100 * f for f in x], mean - half, mean + half, color=style_of(place)["color"], alpha=0.15, linewidth=0)
    axes.set_xticks([100 * f for f in fractions], [f"{100 * f:g}" for f in fractions])
    axes.minorticks_off()
    legend(axes)
    table = [[kind, f"{100 * f:g}", len(v), points(np.mean(v)), f"± {points(half_interval(v))}"] for kind, values in found.items() for f, v in sorted(values.items())]
    baseline = study.baseline.split("-train_fraction=")[0]
    largest_share = max(found[baseline])
    whole = np.mean(found[baseline][largest_share])
    enough = {kind: next((f for f in sorted(values) if f < largest_share and np.mean(values[f]) >= whole), None)
              for kind, values in found.items() if kind != baseline}
    text = " ".join(f"{kind} equals the arm {baseline} on {100 * largest_share:g}% of the data with {100 * f:g}%." for kind, f in enough.items() if f)
    if few := [kind for kind, f in enough.items() if not f]:
        text = f"{text} With less of it {', '.join(few)} did not equal {baseline} on {100 * largest_share:g}% of the data.".strip()
    return [Picture("data-efficiency", figure, "Test accuracy against the share of the training data: mean over seeds and its 95% interval (t).",
                    "; ".join(f"{row[0]} with {row[1]}%: {row[3]}" for row in table)),
            Table("data-efficiency", "Test accuracy by share of the training data, with 95% intervals of the mean over seeds (t).",
                  ["kind", "share %", "seeds", "accuracy %", "95% interval"], table, None)], text


def half_interval(values):
    """Half the 95% interval of a mean over seeds, by Student's t; 0 for one seed."""
    return float(stats.t.ppf(1 - compare.LEVEL / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def explainability(study):
    """Question 4: is it easier to explain?"""
    title = "Does it change how well the network can be explained?"
    if not study.heat:
        return Section(title, "Left out by --no-heat.")
    method = explain.other_method(study.methods())
    values = {}
    for arm, result in study.results():
        for name, found in evaluation.write_explanations(result.folder, method, study.device).items():
            values.setdefault(name, {}).setdefault(arm, {})[result.seed] = found
    rows = {name: study.figures(values[name]) for name in MEASURES if name in values and len(values[name]) == len(study.arms)}
    compared = {name: [row for row in each if row.get("pairs")] for name, each in rows.items()}
    table = [[MEASURES[name], row["arm"], number(row["mean"], 4), number(row["spread"], 4), _span(row), number(row.get("p")), number(row.get("p_holm"))]
             for name, each in rows.items() for row in each]
    surest = [f"{row['arm']}: {MEASURES[name]} {row['difference']:+.3f}" for name, each in compared.items() for row in each if row["p_holm"] < compare.LEVEL]
    few = min((row["pairs"] for each in compared.values() for row in each), default=0) < compare.fewest_seeds()
    answer = (f"Measured with {method}, which no arm was trained with: " + ("; ".join(surest) if surest else
              "too few seeds to tell" if few else "no measure differs from the baseline's beyond chance") + ".")
    parts = [Picture("curves-of-explanations", explanation_curves(study, values), f"Probability of the predicted class as the hottest pixels ({method}) are deleted, and "
                     "as they are inserted, the hottest first: means over images and seeds.", "; ".join(
                         f"{row[1]}: {row[0]} {row[2]}" for row in table if row[0] in (MEASURES["deletion"], MEASURES["insertion"])))]
    if any(compared.values()):
        lines = -(-len(rows) // 2)
        figure = Figure((9, lines * (0.9 + 0.25 * len(study.others()))), layout="constrained")
        every = list(figure.subplots(lines, 2, squeeze=False).flat)
        for axes, (name, each) in zip(every, compared.items()):
            draw_dots(axes, each)
            axes.set_title(MEASURES[name], fontsize=9)
            axes.tick_params(labelsize=8)
        for axes in every[len(rows):]:
            axes.axis("off")
        parts.append(Picture("explanations", figure, "Differences in each measure, paired by image and seed, with 95% intervals.",
                             "; ".join(f"{MEASURES[name]}: {in_words(each, 1.0, '')}" for name, each in compared.items())))
    return Section(title, answer, [*parts, Table(
        "explanations", f"Explanations by {method}, on {evaluation.EXPLAINED} test images of each seed.",
        ["measure", "arm", "mean", "sd", "difference, 95% interval", "p", "p, Holm"], table, 1)])


def explanation_curves(study, values):
    """Mean deletion and insertion curves of each arm, side by side."""
    figure = Figure((9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion")):
        for arm, runs in values[f"{name}_curve"].items():
            mean = np.mean([v.mean(0) for v in runs.values()], 0)
            axes.plot(np.linspace(0, 100, len(mean)), mean, label=arm, markevery=4, markersize=4, **study.style(arm))
        axes.set_xlabel(f"pixels {'deleted' if name == 'deletion' else 'inserted'} %")
        axes.set_title(name)
    figure.axes[0].set_ylabel("probability of the class")
    legend(figure.axes[0])
    return figure


def leak(study):
    """What the published protocol adds to validation accuracy."""
    if not any(r.config["protocol"] == "resplit" for _, r in study.results()):
        return None
    table = []
    for arm, runs in study.arms.items():
        val, test = (np.array([r.metrics[part]["accuracy"] for r in runs.values()]) for part in ("val", "test"))
        table.append([arm, next(iter(runs.values())).config["protocol"], len(runs), points(val.mean()), f"± {points(half_interval(val))}", points(test.mean()),
                      f"± {points(half_interval(test))}", points((val - test).mean(), sign=True)])
    answer = "; ".join(f"{row[0]}: {row[3]}% on validation, {row[5]}% on test" for row in table) + f". Note: {evaluation.LEAK}."
    return Section("How much of the validation accuracy is a leak?", answer, [
        Table("leak", "Accuracy in %, with 95% intervals of the mean over seeds (t), and how far validation lies above test.",
              ["arm", "protocol", "seeds", "validation", "interval", "test", "interval", "above"], table)])


def shortcut(study):
    """Question 5: is a shortcut unlearned?"""
    decoyed = next(((baseline, group) for baseline, group in study.groups if any(r.config["decoy"] for runs in group.values() for r in runs.values())), None)
    grouped = any("worst_group" in r.metrics["test"] for _, r in study.results())
    if decoyed is None and not grouped:
        return None
    title, parts, answer = "Can it unlearn a shortcut that nobody labelled?", [], []
    if decoyed:
        base, group = decoyed
        rows = {row["arm"]: row for row in study.rows()}
        compared = [rows[arm] for arm in group]
        answer.append(f"Where the square lies, {base} recognises {points(rows[base]['mean'])}% of the test images; {verdicts(compared[1:])}. Validation "
                      "cannot see the shortcut, for there it tells the truth: runs are judged after their last epoch.")
        clean = [row for arm, row in rows.items() if arm not in group and row.get("pairs")]
        if clean:
            answer.append(f"Without squares: {verdicts(clean)}.")
        table = [[arm, len(runs), *(points(_mean(runs, part)) for part in ("val", "test", "clean_test")), *_on_the_swatch(study, runs), *_leaning(study, runs)]
                 for arm, runs in study.arms.items()]
        parts = [Picture("shortcut", dots(compared, f"lying test accuracy, points against {base}"),
                         "Accuracy where the square lies, paired by seed, with 95% intervals.", in_words(compared)),
                 Table("shortcut", "Accuracy in %: validation (the square tells the truth), test (it lies), the same test without squares, and the share of the heat on the "
                       "square, with its share of the pixels, which chance would give. Arms without a decoy have one test. Leans: in how many runs eval.py --leaning, "
                       f"which looks at validation alone, finds that the network goes by few pixels, and by how many points (above {100 * explain.LEANS:g} it does).",
                       ["arm", "seeds", "validation", "test", "clean test", "heat on the square", "chance", "leans", "by"], table)]
        if found := _where(study):
            parts.append(Table("where", f"How much of the square in validation images the hottest {100 * explain.LEAN_AREA:g}% of the pixels cover, and in the class where that is least; how often the "
                               "hottest lies on it, and which share of the heat does, in %, by eval.py --where: method, layer and explained score.",
                               ["arm", "seeds", "method", "layer", "explained", "covered", "in worst class", "hottest on it", "heat on it", "chance"], found))
    if grouped:
        table = worst_groups(study)
        answer.append("Worst group: " + "; ".join(f"{row[0]} {row[2]}%" for row in table) + ".")
        parts.append(Table("groups", "Test accuracy of the worst group (class within group) in %, p by permutation over seeds.",
                           ["arm", "seeds", "worst group", "sd", "difference", "p"], table))
    return Section(title, " ".join(answer), parts)


def _mean(runs, part):
    return np.mean([r.correct(part).mean() for r in runs.values()]) if all(f"{part}_labels" in r.found for r in runs.values()) else None


def _on_the_swatch(study, runs):
    """Share of the heat on the decoy's square and of the pixels that it covers, over the runs; dashes where it was not measured."""
    if not study.heat or not all(r.config["decoy"] for r in runs.values()):
        return ["–", "–"]
    found = [evaluation.write_explanations(r.folder, explain.other_method(study.methods()), study.device) for r in runs.values()]
    return [points(np.mean([f[key].mean() for f in found])) for key in ("inside", "covered")]


def _where(study):
    """Rows of a table: what `eval.py --where` has found in runs of each arm, means over those in which it was asked.

    A `where.json` written before it knew the worst class gives a dash there.
    """
    rows = []
    for arm, runs in study.arms.items():
        found = {}
        for r in runs.values():
            for row in run.read_json(r.folder / "where.json") if (r.folder / "where.json").exists() else []:
                found.setdefault((row["method"], row["layer"] or "the rule's", row["explain"]), []).append(row)
        for way, each in found.items():
            columns = ([row.get(key) for row in each] for key in ("erased", "worst_class", "pointing", "inside", "covered"))
            rows.append([arm, len(each), *way, *(points(None if None in column else np.mean(column)) for column in columns)])
    return rows


def _leaning(study, runs):
    """In how many runs the network leans on few pixels, and by how many points; dashes where it was not measured."""
    if not study.heat and not all((r.folder / "leaning.json").exists() for r in runs.values()):
        return ["–", "–"]
    gaps = [evaluation.write_leaning(r.folder, study.device)["ways"][0]["gap"] for r in runs.values()]
    return [f"{sum(gap > explain.LEANS for gap in gaps)} of {len(gaps)}", points(np.mean(gaps), sign=True)]


def worst_groups(study):
    """Rows of a table: each arm's accuracy in its worst group (Sagawa et al. 2020), and the difference to its baseline."""
    table = []
    for arm, runs in study.arms.items():
        each = {seed: r.metrics["test"]["worst_group"] for seed, r in runs.items()}
        base = {seed: r.metrics["test"]["worst_group"] for seed, r in study.arms[study.against[arm]].items()}
        gains = np.array([each[seed] - base[seed] for seed in sorted(set(each) & set(base))])
        values = list(each.values())
        own = arm == study.against[arm] or not len(gains)
        table.append([arm, len(values), points(np.mean(values)), points(np.std(values, ddof=1) if len(values) > 1 else None),
                      "–" if own else points(gains.mean(), sign=True), "–" if own else number(compare.permutation_p(gains))])
    return table


def continual(study):
    """What is kept of the first classes, where arms start from other arms."""
    later = {arm: runs for arm, runs in study.arms.items() if any(r.config["init"] for r in runs.values())}
    if not later:
        return None
    by_folder = {Path(r.folder).resolve(): r for _, r in study.results()}
    first, chosen = {}, {}
    for arm, runs in later.items():
        for seed, result in runs.items():
            start = by_folder.get(Path(result.config["init"]).resolve())
            if start is not None and set(result.split["classes"]) - set(start.split["classes"]):
                first.setdefault(arm, {})[seed], chosen.setdefault(arm, {})[seed] = start, result
    if not chosen:
        return None
    size = len(next(iter(next(iter(chosen.values())).values())).split["classes"])
    any_first = next(iter(first.values()))
    for arm, runs in study.arms.items():  # those that learned everything at once
        if arm not in later and all(len(r.split["classes"]) == size for r in runs.values()):
            chosen[arm] = {s: r for s, r in runs.items() if s in any_first}
            first[arm] = any_first
    found = compare.old_and_new(chosen, first)
    table = [[arm, len(rows), *(points(np.mean([r[key] for r in rows])) for key in ("old", "new")),
              points(np.mean([r["forgotten"] for r in rows if r["forgotten"] is not None])) if arm in later else "–",
              number(float(np.mean([r.metrics["cost"]["train_seconds"] for r in chosen[arm].values()])), 1)] for arm, rows in found.items()]
    answer = "; ".join(f"{row[0]}: {row[2]}% on old classes, {row[3]}% on new ones, " + (f"{row[4]} points forgotten, " if row[0] in later else "")
                       + f"trained in {row[5]} s" for row in table) + "."
    return Section("What is kept when classes are added?", answer, [
        Table("continual", "Test accuracy in % on the first classes and on those added; forgotten: accuracy on the first classes before, minus after; seconds of "
              "the last training alone.", ["arm", "seeds", "old classes", "new classes", "forgotten", "seconds"], table)])


def confidence(study):
    """Accuracy against confidence."""
    figure = Figure((7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="images kept, the most confident first %", ylabel="errors among them %")
    table = []
    for arm, runs in study.arms.items():
        pooled = [(evaluation.softmax(r.found["test_logits"]).max(1), r.correct("test")) for r in runs.values()]
        sure, right = (np.concatenate(parts) for parts in zip(*pooled))
        coverage, risk = compare.risk_coverage(sure, right)
        style = study.style(arm)
        axes.plot(100 * coverage, 100 * risk, label=arm, color=style["color"])
        ece = np.mean([evaluation.expected_calibration_error(s, c) for s, c in pooled])
        aurc = np.mean([compare.risk_coverage(s, c)[1].mean() for s, c in pooled])
        bounds = (np.quantile([compare.risk_coverage(s, c)[1][::max(1, len(s) // 200)] for s, c in pooled], q, axis=0) for q in (0, 1))
        if len({len(s) for s, _ in pooled}) == 1 < len(pooled):
            thin = compare.risk_coverage(*pooled[0])[0][::max(1, len(pooled[0][0]) // 200)]
            axes.fill_between(100 * thin, *(100 * bound for bound in bounds), color=style["color"], alpha=0.12, linewidth=0)
        table.append([arm, number(float(aurc), 4), number(float(ece), 4), points(sure.mean()), *misled_confidence(study, arm)])
    legend(axes)
    base = next(row for row in table if row[0] == study.baseline)
    answer = (f"{study.baseline}: calibration error {base[2]}, area under the risk-coverage curve {base[1]}; " + "; ".join(
        f"{row[0]}: {row[2]} and {row[1]}" for row in table if row[0] != study.baseline) + ".")
    return Section("Is it as right as it is sure?", answer, [
        Picture("confidence", figure, "Risk-coverage curves: the share of errors among the most confident test images, all seeds together.", answer),
        Table("confidence", "Area under the risk-coverage curve (lower is better), expected calibration error, mean confidence, and of the test images that "
              "misled the arm it is compared with: mean confidence there and here, and how many are right here, all in %.",
              ["arm", "AURC", "ECE", "confidence", "misled, before", "misled, now", "of them right"], table)])


def misled_confidence(study, arm):
    """Of the test images that misled the baseline: its confidence, this arm's, and the share that this arm gets right."""
    before, now, right = [], [], []
    for a, b in compare.pairs(study.arms[arm], study.arms[study.against[arm]]):
        wrong = ~b.correct("test")
        before.append(evaluation.softmax(b.found["test_logits"]).max(1)[wrong])
        now.append(evaluation.softmax(a.found["test_logits"]).max(1)[wrong])
        right.append(a.correct("test")[wrong])
    if not before or not len(np.concatenate(before)):
        return ["–"] * 3
    return [points(np.concatenate(values).mean()) for values in (before, now, right)]


QUESTIONS = (augmentation, attention, convergence, explainability, shortcut, continual, confidence, leak)


# --- the runs themselves -------------------------------------------------------------------------------------------


def the_runs(study):
    """Every run, with its curves."""
    table = [[arm, r.seed, points(r.metrics["val"]["accuracy"]), points(r.metrics["test"]["accuracy"]), r.metrics["epochs"],
              number(r.metrics["cost"]["train_seconds"], 1), r.metrics["cost"]["images_seen"], r.metrics["cost"]["erased_images"],
              number(r.metrics["cost"]["peak_gpu_allocated_mb"] or r.metrics["cost"]["peak_host_mb"], 0), str(r.folder)] for arm, r in study.results()]
    skipped = sum(r.metrics["skipped_images"] for _, r in study.results())
    return Section("The runs", f"{len(table)} runs of {len(study.arms)} arms." + (f" Images left out by --skip-bad, over all runs: {skipped}." if skipped else ""), [
        curves(study, "loss", "train_loss", "training loss"),
        Table("runs", "Every run.", ["arm", "seed", "val %", "test %", "epochs", "seconds", "images", "erased", "memory MB", "folder"], table)])


def disagreements(study):
    """The test images on which the baseline and the arm that differs most from it disagree most, with both heats."""
    title = "Where the arms disagree"
    paired = {arm: compare.pairs(study.arms[arm], study.arms[study.baseline]) for arm in study.others() if study.against[arm] == study.baseline}
    paired = {arm: found[0] for arm, found in paired.items() if found and found[0][0].split["classes"] == found[0][1].split["classes"]}
    if not paired or not study.heat:
        return Section(title, "Left out by --no-heat." if paired else "There is nothing to compare.")
    apart = {arm: np.abs(sureness(a) - sureness(b)) for arm, (a, b) in paired.items()}
    arm = max(apart, key=lambda name: apart[name].mean())
    a, b = paired[arm]
    chosen = np.argsort(-apart[arm], kind="stable")[:PICTURES]
    ids, labels, classes = [b.split["test"][i] for i in chosen], b.found["test_labels"][chosen], b.split["classes"]
    method = explain.other_method(study.methods())
    pictures = pictures_of(b, ids)
    figure = Figure((1.7 * len(ids), 5.8), layout="constrained")
    grid, told = figure.subplots(3, len(ids), squeeze=False), []
    for axes, picture, label in zip(grid[0], pictures, labels):
        axes.imshow(picture)
        axes.set_title(f"class: {classes[label]}", fontsize=8)
    for line, name, result in ((1, study.baseline, b), (2, arm, a)):
        said, sure, heat = result.found["test_logits"][chosen].argmax(1), sureness(result)[chosen], heats(study, result, ids, method)
        for column, axes in enumerate(grid[line]):
            axes.imshow(evaluation.overlay(pictures[column], torch.nn.functional.interpolate(
                heat[column][None, None], pictures[column].shape[:2], mode="bilinear")[0, 0].numpy()))
            axes.set_title(f"{name[:22]}\nsays {classes[said[column]]}, {100 * sure[column]:.0f}% {classes[labels[column]]}", fontsize=7)
            told.append(f"{ids[column]}, {name}: says {classes[said[column]]}, {100 * sure[column]:.0f}% {classes[labels[column]]}")
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        plain(axes)
    return Section(title, f"Seed {b.seed}: the {len(ids)} test images to whose class {study.baseline} and {arm} give the most different probability.", [
        Picture("disagreements", figure, f"The image; the heat ({method}) of what {study.baseline} predicts; and of what {arm} predicts.", "; ".join(told))])


def sureness(result):
    """A run's probability of the true class of each test image, [N]."""
    labels = result.found["test_labels"]
    return evaluation.softmax(result.found["test_logits"])[np.arange(len(labels)), labels]


def pictures_of(result, ids):
    """Images as the network saw them: [N, H, W, 3] in [0, 1]."""
    dataset = run.open_run(result.folder).dataset()
    if dataset.pixels is None:
        evaluation.open_pixels(result.config, dataset, build=False)
    pixels, _ = next(iter(data.Batches(dataset, ids, result.config["image_size"], len(ids), torch.device("cpu"))))
    return pixels.permute(0, 2, 3, 1).numpy() / 255


def how_made(study):
    """Versions, machine, data, commands and settings: what it takes to do it again."""
    results = [r for _, r in study.results()]
    keys = [key for key in run.SETTINGS if key not in (*run.PER_MACHINE, "seed")]
    shared = [[key, str(results[0].config[key])] for key in keys if all(r.config[key] == results[0].config[key] for r in results)]
    varied = [key for key in keys if any(r.config[key] != results[0].config[key] for r in results)]
    own = [[arm, *(str(next(iter(runs.values())).config[key]) for key in varied)] for arm, runs in study.arms.items()]
    made = [run.read_json(r.folder / "env.json") for r in results]

    def each(key):
        return ", ".join(sorted({str(env.get(key)) for env in made}))

    facts = [[name, each(key)] for name, key in (("torch", "torch"), ("torchvision", "torchvision"), ("timm", "timm"), ("Python", "python"),
                                                 ("device", "device"), ("processor", "processor"), ("threads", "threads"), ("commit", "commit"),
                                                 ("changed since the commit", "uncommitted_changes"))]
    facts += [["seeds", ", ".join(map(str, sorted({r.seed for r in results})))],
              ["fingerprint of the data", ", ".join(sorted({r.split["fingerprint"] for r in results}))], ["command", study.command]]
    notes = compare.warnings_of(study.arms)
    return Section("How it was made", " ".join(f"Note: {note}." for note in notes) or "All runs were made with the same versions on the same machine.", [
        Table("environment", "Versions, machine, data.", ["what", "is"], facts, None),
        Table("commands", "What made each run.", ["arm", "seed", "command"], [
            [arm, r.seed, "python " + " ".join(map(shlex.quote, [Path(env["command"][0]).name, *env["command"][1:]]))]
            for (arm, r), env in zip(study.results(), made)]),
        Table("arms", "What differs between arms.", ["arm", *varied], own), Table("settings", "What all runs share.", ["setting", "value"], shared, None)])


# --- files ---------------------------------------------------------------------------------------------------------


def write_report(study, folder):
    """All sections into `report.html`, figures/ and tables/ of a folder. Returns the page's path."""
    folder = Path(folder)
    for name in ("figures", "tables"):
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise data.cannot_write(folder, error) from None
    sections = [section for section in (make(study) for make in (*QUESTIONS, the_runs, disagreements, how_made)) if section]
    for part in itertools.chain(*(section.parts for section in sections)):
        if isinstance(part, Picture):
            for kind in ("png", "pdf"):
                content = io.BytesIO()
                part.figure.savefig(content, format=kind, dpi=150, metadata={"CreationDate": None} if kind == "pdf" else None)
                run.write_atomically(folder / "figures" / f"{part.name}.{kind}", lambda file, content=content: file.write(content.getvalue()))
        else:
            for kind, text in (("csv", as_csv(part)), ("tex", as_latex(part))):
                run.write_atomically(folder / "tables" / f"{part.name}.{kind}", lambda file, text=text: file.write(text.encode("utf-8", "replace")))
    page = as_page(study, sections, folder)
    run.write_atomically(folder / "report.html", lambda file: file.write(page.encode("utf-8", "replace")))
    return folder / "report.html"


def as_csv(table):
    """A table as CSV."""
    text = io.StringIO()
    csv.writer(text).writerows([table.header, *table.rows])
    return text.getvalue()


LATEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_", "^": r"\^{}",
         "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}", "–": "--"}


def as_latex(table):
    """A booktabs table; whatever names hold stands as text."""
    def cells(row):
        return " & ".join("".join(LATEX.get(c, c) for c in str(cell)) for cell in row) + r" \\"

    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{''.join(LATEX.get(c, c) for c in table.caption)}}}",
                      rf"\begin{{tabular}}{{{'l' * len(table.header)}}}", r"\toprule", cells(table.header), r"\midrule", *map(cells, table.rows),
                      r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


STYLE = """
:root{color-scheme:light dark;--ink:#1b1b1b;--paper:#fff;--line:#d0d0d0;--soft:#f4f4f2;--link:#0b5c8f}
@media (prefers-color-scheme:dark){:root{--ink:#e8e6e3;--paper:#17181a;--line:#3c3f43;--soft:#222427;--link:#7cc4f5}}
*{box-sizing:border-box}body{margin:0 auto;max-width:62rem;padding:1rem 1.2rem 4rem;font:17px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
h1{font-size:1.7rem;line-height:1.2;margin:1.5rem 0 .3rem}h2{font-size:1.25rem;margin:2.8rem 0 .4rem;border-top:1px solid var(--line);padding-top:1.2rem}
a{color:var(--link)}.answer{font-size:1.05rem;background:var(--soft);border-left:4px solid var(--link);padding:.7rem 1rem;margin:.6rem 0 1.2rem;overflow-wrap:anywhere}
figure{margin:1.2rem 0}figure img{max-width:100%;background:#fff;border-radius:6px;padding:6px}figcaption{font-size:.88rem;opacity:.85;padding:.3rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;margin:.2rem 0 1.4rem}
th,td{padding:.28rem .65rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;min-width:3.2rem}td:first-child{min-width:7rem}td:last-child{min-width:9rem;overflow-wrap:anywhere}thead th{border-bottom:2px solid var(--ink);white-space:nowrap}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible,a:focus-visible{outline:2px solid var(--link)}
fieldset{border:1px solid var(--line);border-radius:6px;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.9rem}nav ol{padding-left:1.2rem}
@media print{body{font-size:10pt;max-width:none}fieldset,nav{display:none}.scroll{overflow:visible}h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""
SCRIPT = """
for (const button of document.querySelectorAll('th button')) button.onclick = () => {
  const head = button.parentNode, body = head.closest('table').tBodies[0], place = head.cellIndex;
  const up = head.ariaSort !== 'ascending', text = row => row.cells[place].textContent;
  for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
  head.ariaSort = up ? 'ascending' : 'descending';
  const size = row => { const n = parseFloat(text(row)); return isNaN(n) ? Infinity : n; };  // what has no value goes last
  [...body.rows].sort((a, b) => size(a) === size(b) ? text(a).localeCompare(text(b)) : (up || size(a) === Infinity || size(b) === Infinity ? 1 : -1) * (size(a) - size(b)))
    .forEach(row => body.append(row));
};
for (const box of document.querySelectorAll('fieldset input')) box.onchange = () => {
  for (const row of document.querySelectorAll('tr[data-arm]')) if (row.dataset.arm === box.value) row.hidden = !box.checked;
};
"""


def as_page(study, sections, folder):
    """The whole report as one HTML page; every text from outside is escaped."""
    e = html.escape
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>",
             # Nothing is loaded from anywhere: the page holds all it shows.
             "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
             f"<title>{e(study.name)}: Proxy Attention</title><style>{STYLE}</style>",
             f"<h1>{e(study.name)}</h1>" + f"<p>{e(study.about)}</p>" * bool(study.about)
             + f"<p>Arms are compared with <b>{e(study.baseline)}</b>" + " or what stands for it in their task" * (len(study.groups) > 1)
             + f". Made by <code>{e(study.command)}</code>.</p><nav><ol>"]
    parts += [f"<li><a href='#s{i}'>{e(section.title)}</a>" for i, section in enumerate(sections)]
    parts.append("</ol></nav><fieldset><legend>Arms in tables</legend>")
    parts += [f"<label><input type=checkbox checked value=\"{e(arm)}\"> {e(arm)}</label>" for arm in study.arms]
    parts.append("</fieldset><main>")
    for i, section in enumerate(sections):
        parts.append(f"<h2 id=s{i}>{e(section.title)}</h2><p class=answer>{e(section.answer)}</p>")
        for part in section.parts:
            if isinstance(part, Picture):
                content = base64.b64encode((folder / "figures" / f"{part.name}.png").read_bytes()).decode()
                parts.append(f"<figure><img alt=\"{e(part.alternative)}\" src='data:image/png;base64,{content}'>"
                             f"<figcaption>{e(part.caption)}</figcaption></figure>")
            elif part.rows:
                head = "".join(f"<th scope=col><button>{e(str(cell))}</button></th>" for cell in part.header)
                marks = [f' data-arm="{e(str(row[part.arm]))}"' if part.arm is not None else "" for row in part.rows]
                rows = "".join(f"<tr{mark}>" + "".join(f"<td>{e(str(cell))}</td>" for cell in row) + "</tr>" for mark, row in zip(marks, part.rows))
                parts.append(f"<figure><figcaption>{e(part.caption)}</figcaption><div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead>"
                             f"<tbody>{rows}</tbody></table></div></figure>")
    parts.append(f"</main><script>{SCRIPT}</script></html>")
    return "\n".join(parts)


def main(arguments=None):
    """The command line; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished runs")
    parser.add_argument("--out", help="the folder that the experiment's runs are in (default: configs.json's), or for runs the report's folder")
    compare.add_options(parser)
    parser.add_argument("--no-heat", action="store_true", help="leave out what needs the networks and the images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    options = parser.parse_args(arguments)
    try:
        if bool(options.runs) == bool(options.experiment):
            raise UserError("name runs or an experiment. See python report.py --help")
        configs, about, (arms, left) = run.read_configs(), "", compare.arms_asked(options)
        if options.experiment:
            folder = Path(options.out or configs["defaults"]["out"]) / options.experiment / "report"
            if not arms:
                raise UserError(f"--experiment {options.experiment}: no run is finished; first run {experiment.typed('train.py', options.experiment, options.out)}")
            about, command = configs["experiments"][options.experiment].get("help", ""), experiment.typed("train.py", options.experiment, options.out)
        else:
            folder = Path(options.out or "report")
            command = "python report.py " + " ".join(options.runs)
        groups = compare.groups(arms, options.baseline, by_task=bool(options.experiment))
        study = Study(groups, options.experiment or "Runs", about, command, run.pick_device(options.device), not options.no_heat)
        page = write_report(study, folder)
    except UserError as error:
        print(data.one_line(f"report.py: {error}"), file=sys.stderr)
        return 2
    print(f"{page}: {sum(map(len, arms.values()))} runs of {len(arms)} arms" + (f"; {left} runs are not finished yet" if left else "")
          + f"\nOpen it in a browser; figures and tables for a text lie in {page.parent}{os.sep}figures and tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
