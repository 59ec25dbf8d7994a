"""How the program is built: files and functions that fit a reader, and imports that only point down one list."""

import ast
from pathlib import Path

import pytest

from engine import settings

HERE = Path(settings.__file__).parent.parent
PROGRAM = sorted([*HERE.glob("*.py"), *HERE.glob("engine/*.py"), *HERE.glob("study/*.py")])
TESTS = sorted(HERE.glob("tests/*.py"))

# A module imports only what stands behind it here.
ORDER = [
    "bench", "report",
    *(f"study.{name}" for name in ("pages", "failure", "appendix", "explain", "figures", "comparison", "arms", "timing",
                                   "statistics", "faithfulness", "peers")),
    "train", "staged", "eval", "snapshot",
    *(f"engine.{name}" for name in ("experiment", "launch", "fit", "training", "pictures", "before", "predict",
                                    "metrics", "folder", "checkpoint", "network", "options", "settings",
                                    "schema")),
    "proxy", "cam", "data",
    *(f"engine.{name}" for name in ("costs", "hooks", "erasing", "policies", "classes", "table", "cache", "loader",
                                    "decoy", "dataset", "split", "display", "ranks", "chance", "files")),
]


def name_of(path):
    return path.relative_to(HERE).as_posix()


def module_of(path):
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def functions_of(tree):
    """(name, lines from def to the end) of every function, also of those within classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


def imports_of(tree, known):
    """(module of `known`, line) of every import of one, also of those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:  # engine.files.UserError is of engine.files
                name = name.rpartition(".")[0]
            if name:
                yield name, node.lineno


@pytest.mark.parametrize("path", PROGRAM, ids=name_of)
def test_a_file_has_at_most_400_lines(path):
    assert len(lines_of(path)) <= (300 if path.name == "train.py" else 400)


@pytest.mark.parametrize("path", [*PROGRAM, *TESTS], ids=name_of)
def test_no_line_has_more_than_120_columns(path):
    assert [number for number, line in enumerate(lines_of(path), 1) if len(line) > 120] == []


@pytest.mark.parametrize("path", PROGRAM, ids=name_of)
def test_a_function_has_at_most_70_lines(path):
    assert [(name, length) for name, length in functions_of(tree_of(path)) if length > 70] == []


def test_the_loop_of_train_has_at_most_60_lines():
    assert dict(functions_of(tree_of(HERE / "train.py")))["train"] <= 60


def test_the_order_names_every_module_once():
    modules = {module_of(path) for path in PROGRAM if path.name != "__init__.py"}
    assert modules == set(ORDER) and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", PROGRAM, ids=name_of)
def test_imports_point_down_the_order(path):
    """So they form no circle. A package holds nothing of its own, and is imported module by module."""
    module, tree = module_of(path), tree_of(path)
    if path.name == "__init__.py":
        assert not tree.body
        return
    place = {name: number for number, name in enumerate(ORDER)}
    up = [f"{module} imports {other} in line {line}" for other, line in imports_of(tree, place)
          if place[other] <= place[module]]
    assert up == []


def test_an_import_that_points_up_is_found_wherever_it_stands():
    lines = ["import torch", "from engine.files import UserError", "def f():", "    from engine import fit",
             "    import train"]
    found = list(imports_of(ast.parse("\n".join(lines)), ORDER))
    assert found == [("engine.files", 2), ("engine.fit", 4), ("train", 5)]


def test_there_are_at_most_42_settings():
    """40, and `csv` with `csv_columns`: most people's labels are a CSV, and who has one should not edit a file."""
    assert len(settings.SETTINGS) <= 42
