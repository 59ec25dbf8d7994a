"""The parts of a report, tables, pictures and sections, and how they are drawn and written.

Arms differ in colour, marker and line; what a figure shows stands beside it in words. All parts go into one HTML page,
and each table and picture into files of its own.
"""

import base64
import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine import files, pictures
from study import statistics

# Okabe and Ito's colours, which colour-blind readers tell apart, darkest first.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c8c8c")
MARKERS, LINES = "osD^vP*X", ("-", "--", ":")
BANDS = 6  # more arms would hide each other behind their bands: their lines alone
MEASURES = {"deletion": "deletion, area (lower is better)", "insertion": "insertion, area (higher)",
            "drop": "drop in confidence (lower)", "increase": "increase in confidence (higher)",
            "road": "ROAD (higher)", "sensitivity": "sensitivity to the weights (higher)",
            "pointing": "pointing game", "inside": "share of heat inside"}
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}", "<": r"\textless{}",
         ">": r"\textgreater{}", "–": "--", **{c: "\\" + c for c in "{}$&#%_"}}


@dataclass
class Table:
    """Rows of texts and numbers under a header. arm: the column that names the arm, or None."""

    name: str
    caption: str
    header: list
    rows: list
    arm: int | None = 0


@dataclass
class Picture:
    """A figure, and what it shows in words for those who cannot see it."""

    name: str
    caption: str
    figure: Figure
    alternative: str


@dataclass
class Section:
    """A question, its answer in a sentence or two, and the tables and pictures that show it."""

    title: str
    answer: str
    parts: list = field(default_factory=list)


def points(value, digits=2, sign=False):
    """A share as percentage points; a dash for None."""
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.{digits}f}"


def number(value, digits=3):
    """A figure with so many digits; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def span(row):
    """The difference of a row of `comparison.compare_values`, and its interval; a dash where it has none."""
    if not row.get("pairs"):
        return "–"
    low, high = row["interval"]
    return f"{row['difference']:+.3f} ({low:.3f} to {high:.3f})"


def own_span(values):
    """The mean over seeds of values, S arrays [N_s], and its own 95% interval, as texts."""
    low, high = statistics.bootstrap_interval(values, False)
    return number(np.mean([each.mean() for each in values])), f"its own: {low:.3f} to {high:.3f}"


# --- pictures ------------------------------------------------------------------------------------------------------


def style_of(arm, arms):
    """Colour, marker and line of an arm among all."""
    place = list(arms).index(arm)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)],
            "linestyle": LINES[place // len(COLOURS) % len(LINES)]}


def legend(axes):
    """A legend in as many columns as keep it low. Names are shown as they are, also where they hold dollar signs."""
    made = axes.legend(fontsize=8, ncols=1 + len(axes.get_legend_handles_labels()[1]) // 12)
    for text in made.get_texts():
        text.set_parse_math(False)


def band(axes, x, low, high, colour):
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def dots(name, caption, rows, label, scale=100.0, unit=" points"):
    """[the Picture of differences to the baseline with their 95% intervals, an arm per line]; none without differences.

    rows: of `comparison.compare`. label: of the axis, in which a difference of 1 is `scale`. unit: of the words.
    """
    rows = [row for row in rows if row.get("pairs")]
    if not rows:
        return []
    figure = Figure((7, 0.9 + 0.32 * len(rows)), layout="constrained")
    draw_dots(figure.add_subplot(xlabel=label), rows, scale)
    return [Picture(name, caption, figure, in_words(rows, scale, unit))]


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
    pictures.plain(axes)


def in_words(rows, scale=1.0, unit=""):
    """Differences and their intervals as words; rows without a difference are left out."""
    return "; ".join(f"{row['arm']} {scale * row['difference']:+.2f}{unit}, interval {scale * row['interval'][0]:.2f} "
                     f"to {scale * row['interval'][1]:.2f}" for row in rows if row.get("pairs"))


def measures(rows):
    """The figure of `dots` of each measure. rows: {measure: rows of `comparison.compare_values`}."""
    lines = -(-len(rows) // 2)
    figure = Figure((9, lines * (0.9 + 0.25 * max(map(len, rows.values())))), layout="constrained")
    panels = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axes, (name, each) in zip(panels, rows.items()):
        draw_dots(axes, each)
        axes.set_title(MEASURES[name], fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in panels[len(rows):]:
        axes.axis("off")
    return figure


def curves(name, arms, key, what, unit="", share=1.0):
    """The Picture of a number of the log, epoch by epoch: of each arm the mean over seeds.

    For up to BANDS arms with the band from the least to the greatest. arms: {arm: {seed: Result}}. key: of a line of
    the log; share: what 1 of it is in `unit`.
    """
    figure, ends, bands = Figure((7, 4), layout="constrained"), [], len(arms) <= BANDS
    axes = figure.add_subplot(xlabel="epoch", ylabel=what + unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for arm, runs in arms.items():
        length, style = min(len(run.log) for run in runs.values()), style_of(arm, arms)
        values = np.array([[share * line[key] for line in run.log[:length]] for run in runs.values()])
        epochs = np.arange(1, length + 1)
        axes.plot(epochs, values.mean(0), label=arm, markevery=max(1, length // 8), markersize=4, **style)
        if len(values) > 1 and bands:
            band(axes, epochs, values.min(0), values.max(0), style["color"])
        ends.append(f"{arm} {values[:, -1].mean():.3g}")
    legend(axes)
    caption = f"{what.capitalize()} over epochs: mean over seeds"
    caption += ", and the band from the lowest seed to the highest." if bands else "."
    return Picture(name, caption, figure, f"{what}{unit} over epochs; at the end " + ", ".join(ends))


def data_efficiency(found):
    """The figure of accuracy by share of the training data, with 95% intervals. found: `comparison.by_fraction`."""
    figure, shares = Figure((7, 4), layout="constrained"), sorted({x for values in found.values() for x in values})
    axes = figure.add_subplot(xlabel="share of the training data %", ylabel="test accuracy %", xscale="log")
    for kind, values in found.items():
        x, style = [100 * share for share in values], style_of(kind, found)
        mean = np.array([100 * np.mean(each) for each in values.values()])
        half = np.array([100 * statistics.half_interval(each) for each in values.values()])
        axes.plot(x, mean, label=kind, **style)
        band(axes, x, mean - half, mean + half, style["color"])
    axes.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
    axes.minorticks_off()
    legend(axes)
    return figure


def explanation_curves(values):
    """The figure of mean deletion and insertion curves. values: {measure: {arm: {seed: [N, steps + 1]}}}."""
    figure = Figure((9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion")):
        arms = values[f"{name}_curve"]
        for arm, runs in arms.items():
            mean = np.mean([each.mean(0) for each in runs.values()], 0)
            axes.plot(np.linspace(0, 100, len(mean)), mean, label=arm, markevery=4, markersize=4, **style_of(arm, arms))
        axes.set_xlabel(f"pixels {'deleted' if name == 'deletion' else 'inserted'} %")
        axes.set_title(name)
    figure.axes[0].set_ylabel("probability of the class")
    legend(figure.axes[0])
    return figure


def risks(pooled):
    """The figure of risk-coverage curves of all seeds together, and the band between seeds.

    pooled: {arm: [(confidence [N], correct bool [N]) of each seed]}.
    """
    figure = Figure((7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="images kept, the most confident first %", ylabel="errors among them %")
    for arm, runs in pooled.items():
        colour = style_of(arm, pooled)["color"]
        coverage, risk = statistics.risk_coverage(*(np.concatenate(parts) for parts in zip(*runs)))
        axes.plot(100 * coverage, 100 * risk, label=arm, color=colour)
        if len({len(sure) for sure, _ in runs}) == 1 < len(runs):
            each = [statistics.risk_coverage(*run) for run in runs]
            few = slice(None, None, max(1, len(each[0][0]) // 200))
            seeds = 100 * np.array([risk[few] for _, risk in each])
            band(axes, 100 * each[0][0][few], seeds.min(0), seeds.max(0), colour)
    legend(axes)
    return figure


def disagreements(images, titles, lines):
    """The figure of images in a row, and below, for each arm, the heat of what it predicts.

    images: [N, H, W, 3] in [0, 1]. titles: N texts. lines: for each arm (heat [N, h, w], N texts).
    """
    figure = Figure((1.7 * len(images), 6.1), layout="constrained")
    grid = figure.subplots(1 + len(lines), len(images), squeeze=False)
    for axes, image, title in zip(grid[0], images, titles):
        axes.imshow(image)
        axes.set_title(title, fontsize=8)
    for row, (heat, texts) in zip(grid[1:], lines):
        heat = F.interpolate(heat[:, None], images.shape[1:3], mode="bilinear")[:, 0].numpy()
        for axes, image, warmth, text in zip(row, images, heat, texts):
            axes.imshow(pictures.overlay(image, warmth))
            axes.set_title(text, fontsize=7)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        pictures.plain(axes)
    return figure


# --- files ---------------------------------------------------------------------------------------------------------


def write(folder, sections, study):
    """Write sections to a folder: figures/*.png and .pdf, tables/*.csv and .tex, and report.html. Returns its path.

    study: `comparison.Study`, of which `page.html` shows the name, the arms and the command. Raises UserError.
    """
    figures, tables = (files.make_folder(Path(folder) / name) for name in ("figures", "tables"))
    images = {}
    for part in (part for section in sections for part in section.parts):
        if isinstance(part, Table):
            write_bytes(tables / f"{part.name}.csv", as_csv(part).encode("utf-8", "replace"))
            write_bytes(tables / f"{part.name}.tex", as_latex(part).encode("utf-8", "replace"))
        else:
            png, pdf = as_bytes(part.figure, "png"), as_bytes(part.figure, "pdf", CreationDate=None)
            write_bytes(figures / f"{part.name}.png", png)
            write_bytes(figures / f"{part.name}.pdf", pdf)
            images[part.name] = base64.b64encode(png).decode()
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader).get_template("page.html")
    text = template.render(sections=sections, images=images, study=study)
    write_bytes(Path(folder) / "report.html", text.encode("utf-8", "replace"))
    return Path(folder) / "report.html"


def write_bytes(path, content):
    files.write_atomically(path, lambda file: file.write(content))


def as_bytes(figure, kind, **metadata):
    """A figure as the content of a PNG or PDF file."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150, metadata=metadata)
    return content.getvalue()


def as_text(header, rows):
    """A table for the terminal, its columns aligned."""
    rows = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_csv(table):
    """A table as CSV."""
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
