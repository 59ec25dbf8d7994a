"""report.py: its tables against study/comparison.py, what it escapes, and the page opened in a browser."""

import copy
import csv
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_classes
from PIL import Image
from scipy import stats
from test_comparison import simulated

import report
import train
from engine import experiment, files, settings
from study import arms as study_arms
from study import comparison, explain, figures, statistics

pytestmark = pytest.mark.slow  # its experiments take ten seconds to make

SCRIPT, DOLLARS, ARM = "<script>alert(1)</script>", "$x_1$ & 100%", "gradcam++ <img src=http://example.com/x.png>"
ARMS = {"none": {"cam": "none", "image_size": 32}, ARM: {"cam": "gradcam++", "select": "all", "image_size": 32},
        "vit": {"model": "test_vit", "cam": "none", "image_size": 64},
        "square": {"cam": "none", "decoy": 1, "image_size": 32},
        "square, all": {"select": "all", "decoy": 1, "image_size": 32}}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of real runs on pictures whose classes and arm hold markup: its folder, and the runs' arms."""
    out = tmp_path_factory.mktemp("report")
    draw_classes(out / "data", classes="AB", frames=16)
    with open(out / "data" / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "kind", "ground"])
        rows.writerows([f"{c}/{c}{i}.jpg", kind, ("land", "water")[i % 2]]
                       for c, kind in (("A", SCRIPT), ("B", DOLLARS)) for i in range(1, 17))
    configs = copy.deepcopy(settings.read_configs())
    columns = {"file": "labels.csv", "path": "file", "label": "kind", "group": "ground"}
    configs["datasets"]["marked"] = configs["datasets"]["folder"] | {"layout": "csv", "csv": columns,
                                                                     "path": str(out / "data")}
    given = {"dataset": "marked", "model": "test_resnet", "pretrained": False, "epochs": 2, "batch_size": 8}
    configs["experiments"] = {"tiny": {"help": f"Is <b>this</b> text? {SCRIPT}", "arms": ARMS, "seeds": [0, 1],
                                       "settings": given}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "read_configs", lambda *arguments: configs)
        patch.setattr(explain, "EXPLAINED", 6)
        for cell in experiment.cells(configs, "tiny", {"out": str(out / "runs")}):
            assert train.main(experiment.command(cell)[2:]) == 0
        squares = [str(out / "runs" / "tiny" / f"square-s{seed}") for seed in (0, 1)]
        assert explain.main([*squares, "--where", "--cam", "gradcam"]) == 0
        assert report.main(["--experiment", "tiny", "--out", str(out / "runs")]) == 0
        arms, _ = study_arms.arms_of_experiment("tiny", {"out": str(out / "runs")})
    return out / "runs" / "tiny" / "report", arms


def rows_of(folder, table):
    with open(folder / "tables" / f"{table}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_report_says_what_the_comparison_found(written):
    folder, arms = written
    rows = {row["arm"]: row for row in rows_of(folder, "augmentation")}
    assert list(rows) == ["none", ARM, "vit", "square", "square, all"]
    for arm, baseline in ((ARM, "none"), ("square, all", "square")):
        theirs = comparison.compare({name: arms[name] for name in (baseline, arm)}, baseline)[1]
        assert rows[arm]["against"] == baseline and rows[arm]["difference"] == f"{100 * theirs['difference']:+.2f}"
        assert rows[arm]["p"] == f"{theirs['p']:.4f}" and rows[arm]["p, Holm"] == f"{min(1, 2 * theirs['p']):.4f}"
    assert rows["vit"]["against"] == "vit" and rows["vit"]["difference"] == "–"
    found = {row["arm"]: row for row in rows_of(folder, "shortcut")}
    clean = np.mean([run.correct("clean_test").mean() for run in arms["square"].values()])
    assert found["square"]["clean test"] == f"{100 * clean:.2f}" and found["none"]["clean test"] == "–"
    assert 0 <= float(found["square"]["heat on the square"]) <= 100
    groups = {row["arm"]: row for row in rows_of(folder, "groups")}
    worst = {arm: [run.metrics["test"]["worst_group"] for run in runs.values()] for arm, runs in arms.items()}
    assert groups[ARM]["worst group"] == f"{100 * np.mean(worst[ARM]):.2f}" and groups["none"]["difference"] == "–"
    assert groups[ARM]["difference"] == f"{100 * (np.mean(worst[ARM]) - np.mean(worst['none'])):+.2f}"
    alike = rows_of(folder, "attention")
    assert [row["arm"] for row in alike][-1] == "a centred Gaussian"
    assert all(-1 <= float(row["mean"]) <= 1 for row in alike) and {row["measure"] for row in alike} == {
        "correlation", "correlation, gradrollout", "overlap"}
    assert {row["arm"] for row in alike} == {*(row["arm"] for row in alike if row["measure"] == "correlation")}
    each = [float(row["value"]) for row in rows_of(folder, "attention-runs")
            if (row["measure"], row["arm"]) == ("correlation", ARM)]
    assert len(each) == 2 and alike[1]["arm"] == ARM
    assert float(alike[1]["mean"]) == pytest.approx(np.mean(each), abs=1e-3)
    reached = rows_of(folder, "convergence-runs")
    assert len(reached) == len(ARMS) * 2 * len(comparison.TARGETS)
    for row in rows_of(folder, "convergence"):
        epochs = [int(each["epoch"] or 2) for each in reached
                  if (each["arm"], each["target %"]) == (row["arm"], row["target %"])]
        assert float(row["epochs"]) == pytest.approx(np.mean(epochs), abs=0.05) and row["horizon"] == "2"
    runs = [(row["arm"], row["seed"]) for row in rows_of(folder, "runs")]
    assert runs == [(arm, seed) for arm in ARMS for seed in "01"]


def test_every_figure_and_table_comes_in_each_format_and_with_words(written):
    folder, _ = written
    page = (folder / "report.html").read_text(encoding="utf-8")
    drawn, tables = sorted((folder / "figures").glob("*.png")), sorted((folder / "tables").glob("*.csv"))
    assert {p.stem for p in drawn} >= {"augmentation", "attention", "convergence", "explanations", "shortcut",
                                       "confidence", "loss"}
    for path in drawn:
        assert Image.open(path).size[0] > 500 and path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert page.count("<img ") == len(drawn) and all(len(text) > 10 for text in re.findall(r'<img alt="([^"]*)"', page))
    assert page.count("<table>") <= len(tables) and not list(folder.rglob("*.tmp*"))
    for path in tables:
        lines = path.with_suffix(".tex").read_text(encoding="utf-8").splitlines()
        body = [line for line in lines if line.endswith(r"\\")]
        columns = re.fullmatch(r"\\begin\{tabular\}\{(l+)\}", lines[3])[1]
        with open(path, newline="", encoding="utf-8") as file:
            assert lines[4] == r"\toprule" and len(body) == len(list(csv.reader(file)))
        assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in body)
        assert not any(re.search(r"(?<!\\)[$%#_]", line) for line in body)


def test_the_questions_come_first_each_with_an_answer(written):
    page = (written[0] / "report.html").read_text(encoding="utf-8")
    found = re.findall(r"<h2 id=s\d+>(.*?)</h2><p class=answer>(.*?)</p>", page)
    assert [title.split()[0] for title, _ in found] == "Can Can Does Does Can Is The How".split()
    assert all(answer for _, answer in found) and "Validation cannot see the shortcut" in found[4][1]
    assert "on test over 2 seeds" in found[0][1] and "rank correlation" in found[1][1]
    assert re.findall(r'<a href="#(s\d+)">', page) == re.findall(r"<h2 id=(s\d+)>", page)


def test_what_where_found_is_a_table_of_means_over_the_runs(written):
    folder, arms = written
    rows = rows_of(folder, "where")
    each = [files.read_json(run.folder / "where.json") for run in arms["square"].values()]
    assert [tuple(row.values())[:6] for row in rows] == [
        ("square", "2", "val", "gradcam", "the rule's", score) for score in ("predicted", "true", "margin", "loss")]
    for place, row in enumerate(rows):
        mean = 100 * np.mean([found[place]["erased"] for found in each])
        assert float(row[explain.FOUND["erased"]]) == pytest.approx(mean, abs=0.01)
        assert row["freed"] == "–"  # measured by --misled alone


def test_a_where_json_written_before_it_knew_the_worst_class_gives_a_dash(tmp_path):
    old = {"method": "gradcam", "layer": None, "explain": "true", "erased": 0.5, "pointing": 1, "inside": 0.5,
           "covered": 0.1}
    files.write_json(tmp_path / "where.json", [old])
    assert explain.where_found([SimpleNamespace(folder=tmp_path)]) == {
        ("val", "gradcam", "the rule's", "true"): [1, 0.5, None, 1, 0.5, 0.1, None, None, None]}


def test_markup_in_names_is_text(written):
    page = (written[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1 and "alert(1)" in page and html.escape(SCRIPT) in page
    assert "<img src=http" not in page and html.escape(ARM) in page and "<b>this</b>" not in page


def test_no_heat_takes_neither_networks_nor_images(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    folders = [str(r.folder) for arm in ("none", ARM) for r in written[1][arm].values()]
    assert report.main([*folders, "--by", "cam,select,layer", "--no-heat", "--out", str(tmp_path / "r")]) == 0
    assert "4 runs of 2 arms" in capsys.readouterr().out
    assert "Left out by --no-heat" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")


def test_text_is_the_comparison_and_takes_neither_networks_nor_images(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "__call__", None)
    monkeypatch.chdir(tmp_path)
    squares = [str(run.folder) for arm in ("square", "square, all") for run in written[1][arm].values()]
    assert report.main([*squares, "--by", "cam,select,layer", "--text"]) == 0
    printed = capsys.readouterr().out
    assert "Test accuracy by arm" in printed and "Clean test accuracy by arm" in printed
    assert printed.count("What each arm costs") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    ([], "name runs or an experiment"),
    (["--experiment", "demo", "--txt"], "unknown option '--txt'. Did you mean '--text'?"),
    (["--experiment", "dem"], "Did you mean 'demo'"),
    (["--experiment", "demo", "--out", "EMPTY"], "no run is finished; first run python train.py --experiment demo"),
    (["EMPTY"], "EMPTY"),
])
def test_what_cannot_be_reported_is_said_in_a_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_fits_a_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        report.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) < 40


def test_less_data_is_compared_with_the_baseline_on_all_of_it():
    """Made-up runs in which half of the data is more than enough."""
    arms = {}
    for kind, accuracies in {"none": (0.6, 0.7, 0.8), "gradcam++": (0.7, 0.9, 0.95)}.items():
        for share, accuracy in zip((0.25, 0.5, 1.0), accuracies):
            config = dict.fromkeys(study_arms.TASK) | {"train_fraction": share, "cam": kind}
            made = simulated({"none": (6, 0.5), kind: (6, accuracy)}, images=4000, config=config)
            arms[f"{kind}-train_fraction={share}"] = made[kind]
            arms[f"cutmix-train_fraction={share}"] = made["none"]  # without Proxy Attention, but no baseline
    study = comparison.Study(study_arms.groups(arms))
    assert len(study.groups) == 3 and study.against["gradcam++-train_fraction=0.5"] == "none-train_fraction=0.5"
    (_, table), text = figures.with_less_data(comparison.by_fraction(study.results), "none")
    rows = {(row[0], row[1]): row for row in table.rows}
    assert [row[2] for row in table.rows] == [6] * 9
    half, none = ([run.correct("test").mean() for run in arms[name].values()]
                  for name in ("gradcam++-train_fraction=0.5", "none-train_fraction=1.0"))
    low, high = stats.ttest_rel(half, none).confidence_interval()
    cells = [f"{100 * (np.mean(half) - np.mean(none)):+.2f}", f"{100 * low:.2f} to {100 * high:.2f}"]
    assert rows["gradcam++", "50"][6:8] == cells and rows["none", "100"][6] == "+0.00"
    assert text.startswith("Against none on 100% of the data: ")
    assert f"gradcam++ with 50%: {cells[0]} points ({cells[1]})" in text
    assert float(rows["gradcam++", "25"][3]) == pytest.approx(70, abs=1)
    for share, saves in (("25", 50), ("50", 75)):  # one and two doublings of the data, of 10 points each
        low, high = map(float, rows["gradcam++", share][9].split(" to "))
        assert float(rows["gradcam++", share][8]) == pytest.approx(saves, abs=2) and low < saves < high
    assert rows["none", "50"][8:] == ["–", "–"]
    flat = {share: dict(enumerate([0.8, 0.9, 0.7])) for share in (0.5, 1.0)}  # more data: nothing, so nothing to save
    assert comparison.saved({0.5: dict(enumerate([0.9, 0.8, 0.9]))}, flat) == {0.5: None}
    assert comparison.saved({0.5: {0: 0.9, 1: 0.8}}, {0.5: {0: 0.8, 1: 0.7}, 1.0: {0: 0.5, 1: 0.41}}) == {0.5: None}
    little = {share: {0: share * 0.01, 1: share * 0.011} for share in (0.5, 1.0)}  # 0.5 points a doubling
    for worse, told in ((0.04, True), (0.06, False)):
        kind = {0.5: {seed: value - worse for seed, value in little[0.5].items()}}
        assert bool(comparison.saved(kind, little)[0.5]) == told


def test_arms_on_other_shares_that_no_arm_has_twice_say_nothing_of_less_data():
    config = dict.fromkeys(study_arms.TASK) | {"cam": "none"}
    made = simulated({"none": (3, 0.7), "more": (3, 0.8)}, images=100, config=config | {"train_fraction": 0.1})
    made["more"] = {s: run._replace(config=run.config | {"train_fraction": 0.5}) for s, run in made["more"].items()}
    for run in (run for runs in made.values() for run in runs.values()):
        run.log[:] = [{"val_accuracy": 0.6, "images_seen": 10}]
    section = report.convergence(comparison.Study(study_arms.groups(made)))
    assert {part.name for part in section.parts} == {"convergence", "convergence-runs"}


def test_verdicts_of_many_arms_are_counted():
    made = simulated({"none": (8, 0.7), "much": (8, 0.9), "less": (8, 0.5), "a": (8, 0.7), "b": (2, 0.7)}, images=1000)
    text = report.verdicts(comparison.one_family(comparison.compare(made, "none"))[1:])
    assert text == ("Of 4 arms, after Holm over 4 comparisons: 1 better ('much'); 1 worse ('less'); 1 not significant; "
                    "1 with too few seeds to be significant")


def explained(monkeypatch, effect):
    """The Section of question 4 and its Table's rows, of ten seeds whose measures differ by `effect` beside chance."""
    draw = np.random.default_rng(0)
    made = simulated({"none": (10, 0.7), "a": (10, 0.7)}, images=40)
    monkeypatch.setattr(explain, "write_explanations", lambda folder, *rest: {
        name: draw.normal(effect * (folder == "a"), 1, 5) for name in figures.MEASURES} | {"curve": np.zeros((5, 2))})
    section = report.explainability(comparison.Study([("none", made)]))
    table = next(part for part in section.parts if part.name == "explanations" and hasattr(part, "rows"))
    runs = next(part for part in section.parts if part.name == "explanations-runs")
    return section, [row for row in table.rows if row[1] == "a"], runs.rows


def test_holm_goes_over_all_measures_that_the_answer_speaks_of(monkeypatch):
    section, rows, _ = explained(monkeypatch, 0.45)
    assert {row[7] for row in rows} == {len(figures.MEASURES)}
    assert [float(row[6]) for row in rows] == pytest.approx(statistics.holm([float(row[5]) for row in rows]), abs=1e-3)
    for row in rows:
        assert (f"a: {row[0]}" in section.answer) == (float(row[6]) < 0.05)
    assert any(float(row[5]) < 0.05 <= float(row[6]) for row in rows)  # that would have been called sure before


def test_every_interval_of_question_4_follows_from_the_table_of_runs(monkeypatch):
    _, rows, runs = explained(monkeypatch, 0.5)
    for row in rows:
        none, arm = ([float(value) for measure, name, _, value in runs
                      if (figures.MEASURES[measure], name) == (row[0], of)] for of in ("none", "a"))
        low, high = stats.ttest_rel(arm, none).confidence_interval()
        assert row[4] == f"{np.mean(np.subtract(arm, none)):+.3f} ({low:.3f} to {high:.3f})"


def test_the_answer_to_what_was_kept_names_arms_and_figures():
    made = simulated({"first": (2, 0.7), "later": (2, 0.8)}, images=40)
    for place, (arm, seed) in enumerate((arm, seed) for arm in made for seed in made[arm]):
        made[arm][seed] = run = made[arm][seed]._replace(folder=f"/runs/{place}")
        run.config["init"] = f"/runs/{place - 2}" if arm == "later" else None
        run.split["classes"] = ["a", "b"] if arm == "later" else ["a"]
        run.found["test_labels"][:20] = 0
    section = report.continual(comparison.Study([("first", made)]))
    (table,), rows = section.parts, comparison.old_and_new({"later": made["later"]}, {"later": made["first"]})["later"]
    means = {key: f"{100 * np.mean([row[key] for row in rows]):.2f}" for key in ("old", "new", "forgotten")}
    assert table.rows == [["later", 2, *means.values(), "2.0"]]
    assert section.answer.startswith(f"later: {means['old']}% on old classes, {means['new']}% on new ones, ")
    assert report.continual(comparison.Study([("first", {"first": made["first"]})])) is None


# --- in a browser --------------------------------------------------------------------------------------------------

browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


def chromium(page, folder, *options, width=1000):
    """What headless Chromium prints about a page: (its document after scripts have run, its console)."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}/profile",
         f"--window-size={width},900", "--enable-logging=stderr", "--virtual-time-budget=3000", *options,
         *([] if any(o.startswith("--print") for o in options) else ["--dump-dom"]), f"file://{page}"],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


class Proxy(http.server.BaseHTTPRequestHandler):
    """Writes down whatever a browser asks it for, and has nothing."""

    def answer(self):
        self.server.asked.append(self.path)
        self.send_error(404)

    do_GET = do_CONNECT = do_POST = do_HEAD = answer

    def log_message(self, *arguments):
        pass


@pytest.fixture
def proxy():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def changed(page, folder, script):
    """A copy of a page that runs a script after its own, which writes into the `id=found` at its end."""
    path = folder / "changed.html"
    write = f"document.getElementById('found').textContent = (() => {{{script}}})()"
    path.write_text(f"{page.read_text(encoding='utf-8')}<pre id=found></pre><script>{write}</script>", encoding="utf-8")
    return path


def found_by(document):
    return html.unescape(re.search(r'<pre id="found">(.*?)</pre>', document, re.S)[1])


@browser
def test_the_page_opens_without_a_word_in_the_console_and_asks_for_nothing(written, tmp_path, proxy):
    through = f"--proxy-server=127.0.0.1:{proxy.server_port}"
    document, console = chromium(written[0] / "report.html", tmp_path, through)
    assert console == [] and [path for path in proxy.asked if "example.com" in path or "google" not in path] == []
    assert document.count("<script>") == 1 and html.escape(SCRIPT, quote=False) in document
    bad = tmp_path / "bad.html"  # that would have been seen
    bad.write_text("<img src=http://example.com/x.png><script>nothing()</script>")
    assert chromium(bad, tmp_path, through)[1] and "http://example.com/x.png" in proxy.asked


@browser
def test_tables_are_sorted_and_arms_hidden_in_the_page(written, tmp_path):
    script = """
      const table = [...document.querySelectorAll('table')].find(t => t.tHead.textContent.includes('folder'));
      const column = n => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[n].textContent);
      const place = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === 'seed');
      const before = column(place), found = [];
      const head = table.tHead.rows[0].cells[place];
      head.firstChild.click(); found.push(column(place), head.ariaSort);
      head.firstChild.click(); found.push(column(place));
      const box = [...document.querySelectorAll('fieldset input')][1]; box.click(); found.push(box.value, column(0));
      box.click(); found.push(column(0).length);
      return JSON.stringify([before, ...found]);"""
    page = changed(written[0] / "report.html", tmp_path, script)
    before, up, sort, down, arm, left, rows = json.loads(found_by(chromium(page, tmp_path)[0]))
    assert sorted(before, key=float) == up == down[::-1] and sort == "ascending" and len(set(up)) > 1
    assert arm == ARM and set(left) == set(ARMS) - {ARM} and rows == 10


@browser
def test_the_page_fits_a_phone_a_dark_room_and_paper(written, tmp_path):
    page = written[0] / "report.html"
    script = """
      const look = getComputedStyle(document.body);
      return [innerWidth, document.documentElement.scrollWidth, look.backgroundColor, look.color].join(' ')"""
    dark = ("--blink-settings=preferredColorScheme=0",)
    for width, options, paper in ((390, (), "rgb(255, 255, 255)"), (1000, dark, "rgb(23, 24, 26)")):
        found = found_by(chromium(changed(page, tmp_path, script), tmp_path, *options, width=width)[0])
        inner, scroll = map(int, found.split()[:2])
        assert scroll <= inner and paper in found, found
    chromium(page, tmp_path, f"--print-to-pdf={tmp_path}/page.pdf")
    printed = Path(tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 40


@pytest.mark.parametrize("arms", [2, figures.BANDS, figures.BANDS + 1])
def test_bands_are_drawn_where_few_arms_share_the_figure(arms):
    def logged(seed):
        return SimpleNamespace(log=[{"accuracy": 0.1 * (epoch + seed)} for epoch in range(4)])
    made = {f"arm {i}": {seed: logged(seed) for seed in (0, 1)} for i in range(arms)}
    picture = figures.curves("convergence", made, "accuracy", "accuracy", " %", 100)
    axes = picture.figure.axes[0]
    assert ("band" in picture.caption) == (arms <= figures.BANDS)
    assert len(axes.lines) == arms and len(axes.collections) == (arms if arms <= figures.BANDS else 0)
    assert axes.lines[0].get_ydata() == pytest.approx([5, 15, 25, 35]) and "arm 1 35" in picture.alternative
