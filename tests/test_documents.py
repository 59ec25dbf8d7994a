"""The documents fit a screen, and name only files, options and experiments that there are."""

import re

import pytest

from engine import settings

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
