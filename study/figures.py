"""The parts of a report, tables, pictures and sections, and how they are drawn and written.

Arms differ in colour, marker and line; what a figure shows stands beside it in words. All parts go into one HTML page,
and each table and picture into files of its own.
"""

import base64
import csv
import io
from collections import namedtuple
from pathlib import Path

import jinja2
import numpy as np
from matplotlib import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from engine import files, pictures
from study import comparison, statistics

# Okabe and Ito's colours, which colour-blind readers tell apart, darkest first.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c8c8c")
STYLES = cycler(linestyle=("-", "--", ":")) * (cycler(color=COLOURS) + cycler(marker=list("osD^vP*X")))  # an arm's each
BANDS = 6  # more arms would hide each other behind their bands: their lines alone
MEASURES = {"deletion": "deletion, area (lower is better)", "insertion": "insertion, area (higher)",
            "drop": "drop in confidence (lower)", "increase": "increase in confidence (higher)",
            "road": "ROAD (higher)", "sensitivity": "sensitivity to the weights (higher)",
            "pointing": "pointing game", "inside": "share of heat inside"}
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}", "<": r"\textless{}",
         ">": r"\textgreater{}", "–": "--", **{c: "\\" + c for c in "{}$&#%_"}}


# The parts of a report. Table.arm: the column that names the arm, or None; shown: on the page, or in its files alone.
# Picture.alternative: the figure in words.
Table = namedtuple("Table", "name caption header rows arm shown", defaults=[0, True])
Picture = namedtuple("Picture", "name caption figure alternative")
Section = namedtuple("Section", "title answer parts", defaults=[()])  # a question, its answer, tables and pictures


def points(value, digits=2, sign=False):
    """A share as percentage points; a dash for None."""
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.{digits}f}"


def number(value, digits=3):
    """A figure with so many digits; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def ends(interval, digits=2, scale=100):
    """An interval as text, by default of shares in points; a dash for None."""
    return " to ".join(f"{scale * end:.{digits}f}" for end in interval) if interval else "–"


def span(row, digits=3, scale=1):
    """The difference of a row of `comparison.compare_values`, and its interval; a dash where it has none."""
    if not row.get("pairs"):
        return "–"
    return f"{scale * row['difference']:+.{digits}f} ({ends(row['interval'], digits, scale)})"


def accuracies(rows, against, part="test"):
    """The Table of the accuracies of arms, compared. rows: of `comparison.compare`. against: {arm: its baseline}."""
    table = [[row["arm"], against[row["arm"]], row["seeds"], points(row["mean"]), points(row["spread"]),
              points(row.get("difference"), sign=True), ends(row.get("interval")), number(row.get("p"), 4),
              number(row.get("p_holm"), 4), number(row.get("effect"), 2), number(row.get("needed"), 0),
              comparison.say(row)] for row in rows]
    family = max((row.get("family", 0) for row in rows), default=0)
    return Table(
        "augmentation", f"{part.replace('_', ' ').capitalize()} accuracy by arm. Differences are paired by seed; "
        "intervals are Student's t over the seeds' differences; p by permutation over seeds, then by Holm over the "
        f"{family} comparisons of this table; d_z is Cohen's; seeds for 0.5: how many would resolve half a point.",
        ["arm", "against", "seeds", "accuracy %", "sd", "difference", "95% interval", "p", "p, Holm", "d_z",
         "seeds for 0.5", "in words"], table)


def per_seed(name, values):
    """The Table of what each run has, in files alone: intervals rest on it. values: {measure: {arm: {seed: float}}}."""
    rows = [[measure, arm, seed, number(value, 5)] for measure, arms in values.items() for arm, each in arms.items()
            for seed, value in sorted(each.items())]
    return Table(name, "A row for each run, of which the means and intervals are.", ["measure", "arm", "seed", "value"],
                 rows, 1, False)


def legend(axes):
    """A legend in as many columns as keep it low; a dollar sign in a name starts no formula."""
    made = axes.legend(fontsize=8, ncols=1 + len(axes.get_legend_handles_labels()[1]) // 12)
    for text in made.get_texts():
        text.set_parse_math(False)


def dots(name, rows, label, scale=100.0, unit=" points"):
    """[the Picture of differences to the baseline with their 95% intervals, an arm per line]; none without intervals.

    rows: of `comparison.compare`. label: of the axis, in which a difference of 1 is `scale`. unit: of the words.
    """
    rows = [row for row in rows if row.get("interval")]
    if not rows:
        return []
    figure = Figure((7, 0.9 + 0.32 * len(rows)), layout="constrained")
    draw_dots(figure.add_subplot(xlabel=label), rows, scale)
    caption = f"Differences with 95% intervals (t, over seeds), paired by seed: {label}."
    return [Picture(name, caption, figure, in_words(rows, scale, unit))]


def draw_dots(axes, rows, scale=1.0, names=None):
    """The dots and lines of `dots` on axes. names: of the lines, from the top; by default those of the rows."""
    names = names or [row["arm"] for row in rows]
    for row in rows:
        (low, high), place = (scale * x for x in row["interval"]), names.index(row["arm"])
        axes.plot([low, high], [place, place], color=COLOURS[1], linewidth=2)
        axes.plot(scale * row["difference"], place, "o", color=COLOURS[1], markersize=5)
    axes.axvline(0, color="0.5", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), names, parse_math=False)  # a name may hold dollar signs
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=6)  # more run into each other


def side_by_side(sets, label):
    """The figure of points of accuracy, a line for each arm and a panel for each set. sets: {title: rows}, as `dots`.

    A line is there for every arm of any set, in the order in which they come.
    """
    names = list(dict.fromkeys(row["arm"] for rows in sets.values() for row in rows))
    figure = Figure((2 + 1.9 * len(sets), 0.9 + 0.27 * len(names)), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(sets), sharey=True, squeeze=False)[0], sets.items()):
        draw_dots(axes, rows, 100, names)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y", color="0.92")
    figure.supxlabel(label, fontsize=9)
    return figure


def in_words(rows, scale=1.0, unit=""):
    """Differences and their intervals as words; rows without a difference are left out."""
    return "; ".join(f"{row['arm']} {scale * row['difference']:+.2f}{unit}, interval {ends(row['interval'], 2, scale)}"
                     for row in rows if row.get("pairs"))


def measures(rows):
    """The figure of `dots` of each measure. rows: {measure: rows of `comparison.compare_values`}."""
    lines = -(-len(rows) // 2)
    figure = Figure((9, lines * (0.9 + 0.25 * max(map(len, rows.values())))), layout="constrained")
    panels = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axes, (name, each) in zip(panels, rows.items()):
        draw_dots(axes, [row for row in each if row.get("interval")])
        axes.set_title(MEASURES[name], fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in panels[len(rows):]:
        axes.axis("off")
    return figure


def curves(name, arms, key, what, unit="", share=1.0):
    """The Picture of a number of the log, epoch by epoch: each arm's mean over seeds; for few arms the band of all.

    arms: {arm: {seed: Result}}. key: of a line of the log. share: what 1 of it is in `unit`.
    """
    ends, bands = [], len(arms) <= BANDS
    axes = Figure((7, 4), layout="constrained").add_subplot(xlabel="epoch", ylabel=what + unit, prop_cycle=STYLES)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for arm, runs in arms.items():
        length = min(len(run.log) for run in runs.values())
        values = np.array([[share * line[key] for line in run.log[:length]] for run in runs.values()])
        epochs = np.arange(1, length + 1)
        [line] = axes.plot(epochs, values.mean(0), label=arm, markevery=max(1, length // 8), markersize=4)
        if len(values) > 1 and bands:
            axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        ends.append(f"{arm} {values[:, -1].mean():.3g}")
    legend(axes)
    caption = f"{what.capitalize()} over epochs: mean over seeds" + ", and the band of all seeds" * bands + "."
    return Picture(name, caption, axes.figure, f"{what}{unit} over epochs; at the end " + ", ".join(ends))


def data_efficiency(found):
    """The figure of accuracy by share of the training data, with 95% intervals. found: `comparison.by_fraction`."""
    axes = Figure((7, 4), layout="constrained").add_subplot(
        xlabel="share of the training data %", ylabel="test accuracy %", xscale="log", prop_cycle=STYLES)
    for kind, values in found.items():
        x, each = [100 * share for share in values], [list(seeds.values()) for seeds in values.values()]
        mean = 100 * np.array([np.mean(seeds) for seeds in each])
        low, high = 100 * np.array([statistics.interval(seeds) or (np.mean(seeds),) * 2 for seeds in each]).T
        [line] = axes.plot(x, mean, label=kind)
        axes.fill_between(x, *np.clip((low, high), 0, 100), color=line.get_color(), alpha=0.15, linewidth=0)
    shares = sorted({100 * share for values in found.values() for share in values})
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    legend(axes)
    return axes.figure


def with_less_data(found, baseline):
    """[Picture, Table] of accuracy by share of the training data, and sentences. found: `comparison.by_fraction`."""
    most, table, texts = max(found[baseline]), [], []
    for kind, shares in found.items():
        saved = {share: (points(ratio[0], 0), ends(ratio[1], 0)) for share, ratio in
                 (comparison.saved(shares, found[baseline]) if kind != baseline else {}).items() if ratio}
        for share, seeds in shares.items():
            row = comparison.compare_values({"all": found[baseline][most], kind: seeds}, "all")[1]
            own = list(seeds.values())
            table.append([kind, f"{100 * share:g}", len(own), points(np.mean(own)), points(comparison.spread(own)),
                          ends(statistics.interval(own)), points(row.get("difference"), sign=True),
                          ends(row.get("interval")), *saved.get(share, "––")])
    for kind in (kind for kind in found if kind != baseline):
        less = [row for row in table if row[0] == kind and float(row[1]) < 100 * most][-1:]
        texts += [f"{kind} with {row[1]}%: {row[6]} points ({row[7]})" for row in less]
    caption = "Test accuracy by share of the training data: mean over seeds and its 95% interval (t)"
    words = "; ".join(f"{row[0]} with {row[1]}%: {row[3]}" for row in table)
    header = ["kind", "share %", "seeds", "accuracy %", "sd", "95% interval", "difference", "its 95% interval",
              "saves %", "saves, 95% interval"]
    return [Picture("data-efficiency", f"{caption}.", data_efficiency(found), words),
            Table("data-efficiency", f"{caption}; the difference, by seed, to {baseline} with {100 * most:g}% of it; "
                  "and what of its data the arm saves, by what the baseline gains there from twice as much (Fieller's "
                  "interval; below 0: so much more is needed).", header, table, None)
            ], f"Against {baseline} on {100 * most:g}% of the data: {'; '.join(texts)}"


def risks(pooled):
    """The figure of risk-coverage curves, all seeds together: {arm: [(confidence [N], correct bool [N]) of a seed]}."""
    axes = Figure((7, 4), layout="constrained").add_subplot(
        xlabel="images kept, the most confident first %", ylabel="errors among them %", prop_cycle=STYLES)
    for arm, runs in pooled.items():
        coverage, risk = statistics.risk_coverage(*map(np.concatenate, zip(*runs)))
        axes.plot(100 * coverage, 100 * risk, label=arm, marker="")
    legend(axes)
    return axes.figure


def photographs(name, images, heats, caption):
    """The Picture of images [N, H, W, 3] in [0, 1] in a line, and below it one for the heat [N, H, W] of each arm."""
    figure, grid = pictures.panels(max(4, 1.1 * len(images)), 1.25 * (1 + len(heats)), 1 + len(heats), len(images))
    lines = {"photographs": images} | {arm: pictures.overlay(images, heat) for arm, heat in heats.items()}
    for axes, (title, shown) in zip(grid, lines.items()):
        axes[0].set_title(title, fontsize=8, loc="left", parse_math=False)
        for each, image in zip(axes, shown):
            each.imshow(image)
    return Picture(name, caption, figure, caption)


def from_png(name, path, caption):
    """A Picture of a PNG file."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    figure = Figure((pixels.shape[1] / 150, pixels.shape[0] / 150))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels)
    axes.axis("off")
    return Picture(name, caption, figure, f"the picture {path}")


def write(folder, sections, study):
    """Write sections to a folder: figures/*.png and .pdf, tables/*.csv and .tex, and report.html. Returns its path.

    study: `comparison.Study`, of which `page.html` shows the name, the arms and the command. Raises UserError.
    """
    figures, tables = (files.make_folder(Path(folder) / name) for name in ("figures", "tables"))
    images = {}
    for part in (part for section in sections for part in section.parts):
        if isinstance(part, Table):
            write_text(tables / f"{part.name}.csv", as_csv(part))
            write_text(tables / f"{part.name}.tex", as_latex(part))
        else:
            png = figures / f"{part.name}.png"
            write_figure(png, part.figure, "png")
            write_figure(png.with_suffix(".pdf"), part.figure, "pdf", CreationDate=None)
            images[part.name] = base64.b64encode(png.read_bytes()).decode()
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader).get_template("page.html")
    text = template.render(sections=sections, images=images, study=study)
    write_text(Path(folder) / "report.html", text)
    return Path(folder) / "report.html"


def write_text(path, text):
    files.write_atomically(path, lambda file: file.write(text.encode("utf-8", "replace")))


def write_figure(path, figure, kind, **metadata):
    files.write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=150, metadata=metadata))


def as_text(header, rows):
    """A table for the terminal, its columns aligned."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_csv(table):
    text = io.StringIO()
    csv.writer(text).writerows([table.header, *table.rows])
    return text.getvalue()


def as_latex(table):
    """A table for LaTeX's booktabs; whatever names hold stands as text."""
    def escaped(text):
        return "".join(LATEX.get(c, c) for c in str(text))

    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (table.header, *table.rows)]
    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{escaped(table.caption)}}}",
                      rf"\begin{{tabular}}{{{'l' * len(table.header)}}}", r"\toprule", lines[0], r"\midrule",
                      *lines[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
