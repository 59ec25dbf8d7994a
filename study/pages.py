"""The pages of results/, and what the README says of them, made from the tables beside them: none is typed by hand.

    python -m study.pages       # write results/*.md, README.md's answers, augmentation.csv and pictures again

results/pages/NAME.md is a page as a jinja2 template, in which expressions stand for figures; what they may call is in
`Results`. What a page compares goes into results/comparisons.csv, with the family over which Holm corrected it. All
comparisons rest on runs.csv, a row a run: those that a page names, and augmentation.csv, every arm with its baseline.
"""

import csv
import functools
import re
import sys
import textwrap

import jinja2
import numpy as np

from engine import settings
from engine.files import UserError
from engine.options import program
from study import comparison, figures, statistics
from study.figures import Table, ends, number, points

FOLDER = settings.HERE / "results"
IMAGES = {"digits": (179, 359), "faint_digits": (110, 164), "noisy_digits": (80, 121), "elpv": (262, 656),
          "sign-digits": (206, 633), "pacs-photo": (167, 333), "bar": (195, 654), "pacs": (240, 960),
          "asl-rooms": (725, 870), "asl": (2030, 4060)}  # val, test
# The figure of question 1: the sets, as {title: (folder, the name of an arm there)}, and what is compared with what.
SETS = {"sign language": ("arms-asl", "{}"), "all its frames": ("arms-asl-pretrained", "{}"),
        "all its frames, ResNet": ("arms-asl-whole", "{}"),
        "hand signs": ("arms-sign", "{}"), "hand signs, 64 pixels": ("arms-tenth", "{}"), "actions": ("arms-bar", "{}"),
        "solar cells": ("arms-elpv", "{}"), "digits": ("arms", "{}-train_fraction=0.05")}
PAIRS = [(arm, "none") for arm in ("gradcam", "gradcam++", "layercam", "random place", "coolest", "random images",
                                   "random erasing", "cutmix", "trivialaugment", "cutmix and gradcam",
                                   "trivialaugment and gradcam", "staged", "extra")]
PAIRS += [("gradcam", control) for control in ("random place", "coolest", "random images", "random erasing")]
PAIRS += [("late gradcam", "none"), ("late random place", "none"), ("late gradcam", "late random place"),
          ("vit, gradcam", "vit"), ("gradcam, longer", "none, longer"), ("extra", "none, longer"),
          ("trivialaugment and gradcam", "trivialaugment")]
ANSWERS = re.compile(r"(?<=<!-- made by python -m study\.pages -->\n).*(?=<!-- end -->)", re.DOTALL)
WIDTH = 120


@functools.cache
def table(name):
    """The rows of results/NAME.csv, a dict each."""
    with open(FOLDER / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@functools.cache
def runs(folder, column="test %"):
    """{arm: {seed: figure}} of a column of a folder's runs.csv; accuracies, rounded there, are exact shares again."""
    shared = {row["setting"]: row["value"] for row in table(f"{folder}/settings")}
    of_arms, found = {row["arm"]: row for row in table(f"{folder}/arms")}, {}
    for row in table(f"{folder}/runs"):
        value = float(row[column])
        if column in ("val %", "test %"):
            among = IMAGES[of_arms[row["arm"]].get("dataset") or shared["dataset"]][column == "test %"]
            count = round(value / 100 * among)
            if abs(100 * count / among - value) > 0.00501:  # halves are rounded either way
                raise UserError(f"results/{folder}/runs.csv: {row[column]} is no share of {among} images")
            value = count / among
        found.setdefault(row["arm"], {})[int(row["seed"])] = value
    return found


def compared(folder, column="test %"):
    """The rows of `comparison.compare_values` of every arm with its baseline, as augmentation.csv pairs them."""
    values, groups = runs(folder, column), {}
    for row in table(f"{folder}/augmentation"):
        groups.setdefault(row["against"], {})[row["arm"]] = values[row["arm"]]
    return [row | {"folder": folder, "against": baseline} for baseline, group in groups.items()
            for row in comparison.compare_values(group, baseline)]


class Results:
    """What a template may call. families: {name: rows}, and asked: all comparisons, as the templates asked for them."""

    def __init__(self):
        self.families, self.asked = {}, {}

    def compare(self, arm, values, base, **about):
        """The row of `comparison.compare_values` of {seed: figure} against base; about: folder, against, part."""
        row = comparison.compare_values({"": base, arm: values}, "")[1] | about
        return self.asked.setdefault((arm, *about.values()), comparison.one_family([row])[0])

    def pair(self, folder, arm, against, part="test %"):
        """The row of one arm against another, which may be of another folder: [folder, arm]."""
        other, base = (folder, against) if isinstance(against, str) else against
        against = base if other == folder else f"{other}: {base}"
        return self.compare(arm, runs(folder, part)[arm], runs(other, part)[base], folder=folder, against=against,
                            part=part)

    def versus(self, folder, arms, baseline="none", suffix="", part="test %"):
        """`pair` of several arms with one; suffix: behind the name of each."""
        return [self.pair(folder, arm + suffix, baseline + suffix, part) for arm in arms]

    def elsewhere(self, folder, arm, against):
        """`pair` of the runs that were first made on another kind of processor, as they came out there."""
        had = {row["run"]: float(row["test %"]) / 100 for row in table("repeats")
               if row["experiment"] == folder and row["instructions"] == "AVX512, then AMD's"}
        values = [{seed: had[f"{name}-s{seed}"] for seed in runs(folder)[name] if f"{name}-s{seed}" in had}
                  for name in (arm, against)]
        return self.compare(arm, *values, folder=folder, against=against, part="test %, other processor")

    def over_shares(self, folder, arm, against):
        """`pair` on validation, of the mean over 5 and 10% of the training data."""
        both = [{seed: np.mean([runs(folder, "val %")[f"{name}-train_fraction={share}"][seed] for share in (0.05, 0.1)])
                 for seed in runs(folder, "val %")[f"{name}-train_fraction=0.05"]} for name in (arm, against)]
        return self.compare(arm, *both, folder=folder, against=against, part="val %, mean of 5 and 10%")

    def misled(self, folder, measure, explained, layer="the rule's", against=("predicted", "the rule's")):
        """The row of one way to explain against another, of the misled images of the runs without Proxy Attention."""
        values = [{int(row["seed"]): float(row[measure]) / 100 for row in table(f"{folder}/where-runs")
                   if (row["arm"], row["images"], row["explained"], row["layer"]) == ("none", "misled", *way)}
                  for way in ((explained, layer), against)]
        return self.compare(", ".join((explained, layer)), *values, folder=folder, against=", ".join(against),
                            part=f"{measure} %")

    def family(self, name, rows):
        """These rows, corrected together, by (folder, arm, against, part); comparisons.csv has them under this name.

        The first two are enough where they name one row.
        """
        rows, found = comparison.one_family([dict(row) for row in rows]), {}
        for row in self.families.setdefault(name, rows):
            found |= {key_of(row)[:length]: row for length in (2, 3, 4)}
        return found

    def as_table(self):
        """comparisons.csv: every comparison that the pages name, those of a family first."""
        within = {key_of(row) for rows in self.families.values() for row in rows}
        alone = [row for row in self.asked.values() if key_of(row) not in within]
        rows = [[name, *key_of(row), row["pairs"], points(row["difference"], sign=True), ends(row["interval"]),
                 number(row["p"], 4), number(row["p_holm"], 4), row["family"]]
                for name, rows in (self.families | {"alone": alone}).items() for row in rows]
        return Table("comparisons", "", ["of", "folder", "arm", "against", "part", "seeds", "difference",
                                         "95% interval", "p", "p, Holm", "family"], rows)

    def render(self, template):
        """A template's text with its figures, wrapped."""
        here = (exists, runs, cell, text, mean, level, exact, answered, sooner, zip, self.pair, self.versus,
                self.elsewhere, self.over_shares, self.misled, self.family)
        names = {each.__name__: each for each in here} | {"interval": statistics.interval, "table": table}
        made = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        made.filters |= {"span": lambda row, digits=2, scale=100: figures.span(row, digits, scale),
                         "pc": lambda share: f"{100 * share:.1f}",
                         "r": lambda number, digits=1: f"{number:.{digits}f}"}
        return wrapped(made.from_string(template.read_text(encoding="utf-8")).render(names).strip()) + "\n"


def key_of(row):
    """What names a comparison."""
    return tuple(row[name] for name in ("folder", "arm", "against", "part"))


def text(name, column, **where):
    """A cell of results/NAME.csv, of the one row whose columns have these values."""
    found = [row for row in table(name) if all(row[key] == str(value) for key, value in where.items())]
    if len(found) != 1:
        raise UserError(f"results/{name}.csv: {len(found)} rows have {where}")
    return found[0][column]


def exists(name):
    """Whether there is a results/NAME.csv."""
    return (FOLDER / f"{name}.csv").exists()


def cell(name, column, **where):
    """`text` as a number where it is one."""
    found = text(name, column, **where)
    return float(found) if re.fullmatch(r"[+-]?\d+(\.\d+)?", found) else found


def mean(folder, arm, column="test %", percent=True):
    """The mean over an arm's runs of a column; accuracies in percent."""
    return float(np.mean(list(runs(folder, column)[arm].values()))) * (100 if column.endswith(" %") and percent else 1)


def level(folder, arm, column="test %"):
    """An arm's accuracy in percent, and its standard deviation over seeds, as text."""
    return f"{mean(folder, arm, column):.1f} ± {100 * comparison.spread(list(runs(folder, column)[arm].values())):.1f}"


def answered(arm, *folders):
    """How many runs of an arm under --heat snapshot were found to follow, and how many there are."""
    asked = [row for folder in folders for row in table(f"{folder}/asked") if row["arm"] == arm]
    return sum(row["depends"] == "yes" for row in asked), sum(len(runs(folder)[arm]) for folder in folders)


def exact(count, among):
    """The exact interval of a share of runs, in percent, as text."""
    return ends(statistics.exact_interval(count, among), 0)


def sooner(folder, arm, target):
    """Two cells of a table: an arm's restricted mean epochs to a target and how many seeds arrive; the difference."""
    where = {"arm": arm, "target %": target}
    epochs, arrive, difference = (text(f"{folder}/convergence", column, **where)
                                  for column in ("epochs", "arrive", "difference in epochs, 95% interval"))
    return f"{epochs} ({arrive.split()[0]}) | {difference}"


def wrapped(text):
    """Markdown with paragraphs and items of lists filled to WIDTH; code, tables, headings and comments as they are."""
    done = []
    for block in re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE):
        for part in [block] if block.startswith("```") else re.split(r"(\n\n+|\n(?=- |\d+\. ))", block):
            if part.strip() and not re.match(r"\s*(```|\||#|<|!|\[\d)", part):
                indent = " " * len(re.match(r"\s*(- |\d+\. )?", part)[0])
                whole = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), " ".join(part.split()))
                part = textwrap.fill(whole, WIDTH, subsequent_indent=indent, break_long_words=False,
                                     break_on_hyphens=False).replace("\0", " ")
            done.append(part)
    return "".join(done)


def in_sets(results):
    """{title of SETS: rows} of PAIRS, as far as a set has both arms; an arm is named with what it is compared with."""
    found = {}
    for title, (folder, name) in SETS.items():
        there = runs(folder) if exists(f"{folder}/runs") else {}
        for pair in PAIRS:
            arm, against = (name.format(arm) for arm in pair)
            if arm in there and against in there:
                row = results.pair(folder, arm, against) | {"arm": " − ".join(pair)}
                found.setdefault(title, []).append(row)
    return found


def made():
    """{path: text} of all that this program writes, but the pictures."""
    results, found = Results(), {}
    for template in sorted((FOLDER / "pages").glob("*.md")):
        found[FOLDER / template.name] = results.render(template)
    readme, answers = settings.HERE / "README.md", found.pop(FOLDER / "answers.md")
    found[readme] = ANSWERS.sub(lambda _: answers, readme.read_text(encoding="utf-8"))
    found[FOLDER / "comparisons.csv"] = figures.as_csv(results.as_table())
    for file in sorted(FOLDER.glob("*/runs.csv")):
        rows = comparison.one_family(compared(file.parent.name))
        against = {row["arm"]: row["against"] for row in rows}
        found[file.with_name("augmentation.csv")] = figures.as_csv(figures.accuracies(rows, against))
    return found


@program("study.pages")
def main(_):
    """The command line."""
    for path, text in made().items():
        figures.write_text(path, text)
    label = "test accuracy, points: difference and its interval over seeds"
    figures.write_figure(FOLDER / "augmentation.png", figures.side_by_side(in_sets(Results()), label), "png")
    for picture in sorted(FOLDER.glob("*/shortcut.png")):
        rows = [row for row in compared(picture.parent.name) if "clean" not in row["arm"]]
        label = "test accuracy, points against the same without it"
        figures.write_figure(picture, figures.dots("shortcut", rows, label)[0].figure, "png")


if __name__ == "__main__":
    sys.exit(main())
