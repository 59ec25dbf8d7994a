"""The documents fit a screen, and name only files, options and experiments that there are."""

import csv
import re

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

import train
from engine import metrics, settings
from engine.files import UserError
from engine.folder import open_run, read_predictions
from study import figures, pages

HERE = settings.HERE
DOCUMENTS = sorted([HERE / "README.md", *HERE.glob("docs/*.md"), *HERE.glob("results/*.md")])
HISTORY = HERE / "results" / "PLAN.md"  # written before the runs, with the options and names of its day
OF_TODAY = [path for path in DOCUMENTS if path != HISTORY]
PROGRAMS = ["train.py", "eval.py", "report.py", "bench.py", "engine/*.py", "study/*.py", "tests/conftest.py"]
OTHERS = {"--help",  # argparse
          "--dist",  # pytest-xdist
          "--nproc-per-node", "--max-restarts",  # torchrun
          "--array", "--signal"}  # sbatch
LINK = re.compile(r"""\]\(([^)\s]+)\)|^\[\w+\]: (\S+)|\bsrc="([^"]+)\"""", re.MULTILINE)


def name_of(path):
    return str(path.relative_to(HERE))


def known_options():
    """Every option of the programs: one for each setting, and those that their sources declare."""
    options = set(OTHERS)
    for key, setting in settings.SETTINGS.items():
        option = key.replace("_", "-")
        options |= {f"--{option}", f"--no-{option}"} if setting.kind is bool else {f"--{option}"}
    for pattern in PROGRAMS:
        for path in HERE.glob(pattern):
            source = path.read_text(encoding="utf-8")
            options.update(re.findall(r'(?:add_argument|addoption)\(\s*"(--[a-z-]+)"', source))
    return options


def anchors_of(path):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_150_lines():
    assert len((HERE / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_line_has_more_than_120_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    for link in map("".join, LINK.findall(path.read_text(encoding="utf-8"))):
        if not re.match(r"[a-z]+:", link):
            file, _, anchor = link.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), link
            assert not anchor or anchor in anchors_of(there), link


@pytest.mark.parametrize("path", OF_TODAY, ids=name_of)
def test_every_option_is_one_that_a_program_knows(path):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text(encoding="utf-8")))
    assert named - known_options() == set()


@pytest.mark.parametrize("path", OF_TODAY, ids=name_of)
def test_every_experiment_is_a_file(path):
    named = re.findall(r"--experiment\s+([a-z][\w-]*)", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (HERE / "experiments" / f"{name}.json").exists()] == []


def test_the_readme_names_the_programs_and_the_tables_of_today():
    """Each row of the table of tables: the file is there, and defines the names before it."""
    rows = re.findall(r"^\|[^|]*\|[^|]*\|([^|]*)\| `(.+?)` \|$", (HERE / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 10
    for names, file in rows:
        if "NAME" not in file:
            source = (HERE / file).read_text(encoding="utf-8")
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^\s*(?:def {name}\(|{name} = )", source, re.MULTILINE), f"{name} in {file}"


# --- the code of docs/use.md ------------------------------------------------------------------------------------------

ALONE, NETWORK, EXPORT, ONNX = re.findall(r"```python\n(.*?)```", (HERE / "docs" / "use.md").read_text("utf-8"), re.S)


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A folder with a run, as runs/NAME, an image of its test part, as cat.png, and what the page's lines made there:
    (folder, {name: value})."""
    folder, names = tmp_path_factory.mktemp("use"), {}
    words = "--epochs 1 --cam none --train-fraction 0.2 --name NAME --out".split()
    assert train.main([*words, str(folder / "runs")]) == 0
    number = int(open_run(folder / "runs" / "NAME").split["test"][0])
    grey = np.rint(255 * load_digits().images[number] / 16).astype(np.uint8)
    Image.fromarray(grey).save(folder / "cat.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(NETWORK, names)
    return folder, names


def test_the_pages_lines_predict_what_the_run_did(used):
    folder, names = used
    found = read_predictions(folder / "runs" / "NAME")
    assert names["about"]["classes"][names["number"]] == str(found["test_logits"][0].argmax())
    assert names["confidence"].item() == pytest.approx(metrics.softmax(found["test_logits"][:1]).max(), abs=1e-5)


@pytest.mark.slow
def test_the_page_exports_the_network_and_checks_it(used, monkeypatch):
    folder, names = used
    monkeypatch.chdir(folder)
    exec(EXPORT, dict(names))
    assert (folder / "network.pt2").stat().st_size > 1e5


@pytest.mark.slow
def test_the_page_writes_onnx_and_checks_it(used, monkeypatch):
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnxscript, of tests/requirements.txt")
    pytest.importorskip("onnxruntime", reason="reading ONNX needs onnxruntime, of tests/requirements.txt")
    folder, names = used
    monkeypatch.chdir(folder)
    made = {"images": torch.randn(2, 3, names["size"], names["size"]), "batch": torch.export.Dim("batch")}
    exec(ONNX, names | made)
    assert (folder / "network.onnx").exists()


def test_the_page_explains_torchvisions_vit_within_training(monkeypatch):
    names, net = {}, torchvision.models.VisionTransformer(224, 16, 12, 2, 32, 64, num_classes=10)
    torch.nn.init.normal_(net.heads.head.weight)  # torchvision's starts at zero, where no heat is
    monkeypatch.setattr(torchvision.models, "vit_b_16", lambda num_classes: net)
    exec(ALONE, names)
    assert names["heat"].shape == (2, 224, 224) and names["heat"].amax((1, 2)).eq(1).all()
    assert names["net"].conv_proj.weight.grad.abs().sum() > 0


# --- the figures of the pages --------------------------------------------------------------------------------------

TEMPLATES = sorted((HERE / "results" / "pages").glob("*.md"))
BY_HAND = {"PLAN.md", "related.md"}  # a plan of its day; and no figures


@pytest.fixture(scope="module")
def made():
    return pages.made()


def test_every_page_of_results_is_made_from_a_template():
    written = {path.name for path in HERE.glob("results/*.md")} - BY_HAND
    assert {path.name for path in TEMPLATES} == written | {"answers.md"}


def test_pages_the_readme_and_tables_hold_what_the_csv_files_say(made):
    """A digit changed by hand, in a page or in a CSV file, is found here; python -m study.pages writes them again."""
    assert {HERE / "README.md", HERE / "results" / "comparisons.csv"} < set(made)
    for path, text in made.items():
        assert path.read_bytes() == text.encode(), f"{name_of(path)}: run python -m study.pages"


@pytest.mark.parametrize("column", ["test %", "val %"])
def test_a_wrong_digit_in_a_csv_file_changes_a_page(column, monkeypatch):
    real = pages.table

    def wrong(name):
        rows = [dict(row) for row in real(name)]
        if name == "arms/runs":
            for row in rows:
                if row["arm"] == "gradcam-train_fraction=0.05":
                    row[column] = "50.14" if column == "test %" else "50.28"
        return rows
    monkeypatch.setattr(pages, "table", wrong)
    monkeypatch.setattr(pages, "runs", pages.runs.__wrapped__)
    template = HERE / "results" / "pages" / "answers.md"
    changed = pages.Results().render(template) not in (HERE / "README.md").read_text(encoding="utf-8")
    assert changed == (column == "test %")


def test_an_accuracy_that_is_no_share_of_the_images_is_refused(monkeypatch):
    rows = {"x/settings": [{"setting": "dataset", "value": "digits"}], "x/arms": [{"arm": "a"}]}
    monkeypatch.setattr(pages, "table", lambda name: rows.get(name, [{"arm": "a", "seed": "1", "test %": "91.09"},
                                                                     {"arm": "a", "seed": "2", "test %": "91.36"}]))
    assert pages.runs.__wrapped__("x") == {"a": {1: 327 / 359, 2: 328 / 359}}
    rows["x/runs"] = [{"arm": "a", "seed": "1", "test %": "91.10"}]
    with pytest.raises(UserError, match="results/x/runs.csv: 91.10 is no share of 359 images"):
        pages.runs.__wrapped__("x")


def test_paragraphs_are_filled_and_code_and_tables_stay():
    code, table = "```sh\nx  =  1\n```", "| a | b |\n|---|---|\n| 1  | 2 |"
    text = f"# Title\n\none\ntwo `a  b` {'word ' * 30}\n\n{code}\n\n{table}\n\n- first\n  of two\n- second"
    filled = pages.wrapped(text)
    assert code in filled and table in filled and "one two `a  b`" in filled.replace("`a b`", "`a  b`")
    assert "\n- first of two\n- second" in filled and max(map(len, filled.splitlines())) <= pages.WIDTH


def test_a_line_of_the_figure_of_question_1_is_the_same_arm_in_every_panel():
    def row(arm, difference):
        return {"arm": arm, "difference": difference, "interval": (difference - 0.01, difference + 0.01)}
    sets = {"one": [row("a", 0.02), row("c", -0.03)], "two": [row("b", 0.01), row("c", 0.04)]}
    figure = figures.side_by_side(sets, "points")
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    shown = [{names[int(line.get_ydata()[0])]: float(line.get_xdata()[0]) for line in axes.lines
              if line.get_marker() == "o"} for axes in figure.axes]
    assert [axes.get_title() for axes in figure.axes] == ["one", "two"]
    assert shown == [{"a": 2, "c": -3}, {"b": 1, "c": 4}]


def test_the_figure_of_question_1_shows_what_the_tables_say():
    [cells] = [rows for title, rows in pages.in_sets(pages.Results()).items() if title == "solar cells"]
    named = {row["arm"]: row["against"] for row in pages.table("arms-elpv/augmentation")}
    for row in (row for row in cells if row["arm"].endswith("− none")):
        arm = row["arm"].removesuffix(" − none")
        said = pages.text("arms-elpv/augmentation", "difference", arm=arm)
        assert figures.points(row["difference"], sign=True) == said and named[arm] == "none"
    assert len(cells) >= 16


def bare(template):
    """What of a template is typed by hand, without code, links, and the counts and settings that it declares."""
    text = template.read_text(encoding="utf-8")
    declared = re.findall(r'"([^"]+)"', re.match(r"\{#- counts:(.*?)-#\}", text, re.DOTALL)[1])
    for pattern in (r"\{#.*?#\}", r"\{%.*?%\}", r"\{\{.*?\}\}", r"```.*?```"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\[\d\]: \S+|<!--.*?-->", " ", text)
    text = " ".join(text.split())
    for words in sorted([*declared, "95%"], key=len, reverse=True):  # of intervals
        text = text.replace(words, " ")
    return text


@pytest.mark.parametrize("template", TEMPLATES, ids=name_of)
def test_no_figure_is_typed_by_hand(template):
    """Digits stand in a template's expressions, in code, or in the counts and settings that its first lines declare."""
    text = re.sub(r"\b(?:resnet|vit|swin|convnext|efficientnet|lite)\w*\d*\w*", " ", bare(template))
    assert re.findall(r"[^ ]* ?[^ ]*\d[^ ]*", text) == []


def test_comparisons_are_scipys_of_the_runs(made):
    """Every row of comparisons.csv, recomputed from runs.csv alone."""
    rows = list(csv.DictReader(made[HERE / "results" / "comparisons.csv"].splitlines()))
    assert len(rows) > 100
    folders = {path.parent.name: list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
               for path in HERE.glob("results/*/runs.csv")}
    for row in (row for row in rows if row["part"] in ("val %", "test %")):
        other = (row["folder"], *row["against"].split(": "))[-2:]
        arm, base = ({run["seed"]: float(run[row["part"]]) for run in folders[folder] if run["arm"] == name}
                     for folder, name in ((row["folder"], row["arm"]), other))
        seeds = sorted(set(arm) & set(base))
        test = stats.ttest_rel([arm[seed] for seed in seeds], [base[seed] for seed in seeds])
        low, high = test.confidence_interval()
        assert int(row["seeds"]) == len(seeds) and float(row["family"]) >= 1
        assert [float(end) for end in row["95% interval"].split(" to ")] == pytest.approx([low, high], abs=0.03)
        assert float(row["p"]) <= float(row["p, Holm"]) <= 1
    for name in {row["of"] for row in rows} - {"alone"}:
        family = [row for row in rows if row["of"] == name]
        assert {int(row["family"]) for row in family} == {len(family)}
        assert min(float(row["p, Holm"]) for row in family) == pytest.approx(
            min(1, len(family) * min(float(row["p"]) for row in family)), abs=len(family) * 1e-4)


@pytest.mark.parametrize("again", sorted(HERE.glob("results/*/runs-again.csv")), ids=name_of)
def test_runs_that_were_made_again_are_those_that_are_published(again):
    """Their logs were gone: trained again with the same settings and seeds, to the same bits."""
    published, repeated = (
        {(row["arm"], row["seed"]): [row[key] for key in ("val %", "test %", "epochs", "images", "erased")]
         for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())}
        for path in (again.with_name("runs.csv"), again))
    assert repeated.items() <= published.items() and len(repeated) >= 30


@pytest.mark.parametrize("path", sorted(HERE.glob("results/*/convergence-runs.csv")), ids=name_of)
def test_times_to_a_target_follow_from_the_table_of_runs(path):
    """Restricted means, how many arrive, and paired differences in epochs."""
    runs, rows = ([*csv.DictReader(each.read_text(encoding="utf-8").splitlines())]
                  for each in (path, path.with_name("convergence.csv")))

    def epochs(arm, target):
        return [min(int(run["epoch"] or horizon), horizon)
                for run in runs if (run["arm"], run["target %"]) == (arm, target)]
    assert {row["arm"] for row in rows} == {run["arm"] for run in runs}
    for row in rows:
        horizon = min(int(run["epochs in all"]) for run in runs if run["arm"] in (row["arm"], row["against"]))
        mine, base = (epochs(arm, row["target %"]) for arm in (row["arm"], row["against"]))
        arrived = [run for run in runs if run["epoch"] and int(run["epoch"]) <= horizon
                   and all(run[key] == row[key] for key in ("arm", "target %"))]
        assert float(row["epochs"]) == pytest.approx(sum(mine) / len(mine), abs=0.051)
        assert (row["arrive"], row["horizon"]) == (f"{len(arrived)} of {len(mine)}", str(horizon))
        if row["arm"] != row["against"]:
            low, high = stats.ttest_rel(mine, base).confidence_interval()
            difference, ends = row["difference in epochs, 95% interval"].split(" (")
            assert float(difference) == pytest.approx(sum(mine) / len(mine) - sum(base) / len(base), abs=0.051)
            if low == low:  # not all alike
                assert [float(end) for end in ends.rstrip(")").split(" to ")] == pytest.approx([low, high], abs=0.051)


COMPARED = {"vit-attention": (10, {"gradcam++": "none", "vit, gradcam++": "vit"}, {"attention": 2, "explanations": 16}),
            "arms-sign": (8, {"gradcam": "none", "random place": "none", "vit, gradcam": "vit"},
                          {"attention": 6, "explanations": 24})}  # seeds, {arm: against}, and how many comparisons


@pytest.mark.parametrize("folder", COMPARED)
@pytest.mark.parametrize("name", ["attention", "explanations"])
def test_differences_of_questions_2_and_4_follow_from_the_table_of_runs(name, folder):
    """Mean, difference and interval of each arm against the one of its kind without Proxy Attention."""
    seeds, against, count = COMPARED[folder]
    runs, rows = ([*csv.DictReader((HERE / "results" / folder / f"{file}.csv").read_text("utf-8").splitlines())]
                  for file in (f"{name}-runs", name))
    values = {}
    for run in runs:
        measure = figures.MEASURES.get(run["measure"], run["measure"])
        values.setdefault((measure, run["arm"]), []).append(float(run["value"]))
    compared = [row for row in rows if row["p"] != "–"]
    assert len(rows) == len(values) and len(compared) == count[name]
    for row in compared:
        mine, base = values[row["measure"], row["arm"]], values[row["measure"], against[row["arm"]]]
        low, high = stats.ttest_rel(mine, base).confidence_interval()
        found = [float(each) for each in re.findall(r"[+-]?\d+\.\d+", row["difference, 95% interval"])]
        assert found == pytest.approx([np.mean(mine) - np.mean(base), low, high], abs=6e-4)
        assert float(row["mean"]) == pytest.approx(np.mean(mine), abs=6e-4) and len(mine) == len(base) == seeds
