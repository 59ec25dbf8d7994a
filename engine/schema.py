"""What a value may be, of a setting or of configs.json: kinds, and the check with its message.

A schema is a type or several, a `Setting`, a function of (value, where), or an object {key: schema}, where "key?" may
be missing and "*" stands for any key. Nothing here imports torch, for that is slow.
"""

import ast
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.files import UserError, nearest

HERE = Path(__file__).resolve().parent.parent  # the project's folder
TINY = 1e-9  # the lower end of ranges that exclude zero
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object",
         list: "a list", type(None): "null"}


class Keys:
    """The keys of a table of another file, as of cam.py, data.py or proxy.py.

    Where that is not imported yet they are read from the file, for it imports torch, which --help should not wait for.
    """

    def __init__(self, module, table, *before):
        self.module, self.table, self.before = module, table, before

    def __iter__(self):
        there = sys.modules.get(self.module)
        return iter((*self.before, *(getattr(there, self.table) if there else self.read())))

    def read(self):
        """The keys as they stand in the file: of an object, or of a tuple, which may name other tables of the file."""
        file = HERE / f"{self.module.replace('.', '/')}.py"
        tables = {node.targets[0].id: node.value for node in ast.parse(file.read_text(encoding="utf-8")).body
                  if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
        found, keys = tables[self.table], []
        for part in found.keys if isinstance(found, ast.Dict) else found.elts:
            keys += Keys(self.module, part.value.id).read() if isinstance(part, ast.Starred) else [part.value]
        return keys


def imported(module, function):
    """`function` of a module that is imported when it is called, and not before."""
    return lambda *arguments: getattr(importlib.import_module(module), function)(*arguments)


@dataclass(frozen=True)
class Setting:
    """One setting of a run: its type, where it stands in `--help` and what that says, what it may be.

    The default is in `configs.json`. neutral: what a run had that was made before the setting existed.
    """

    kind: type
    group: str
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple | Keys = ()
    optional: bool = False  # may be null
    word: str | None = None  # may be this word instead
    syntax: object = None  # a function of the value that raises ValueError
    neutral: object = None
    bare: object = None  # what the option means without a value, if it may have none

    def check(self, value, where):
        """The value as it is used, or UserError that names `where` it stood."""
        if value is None and self.optional or value is not None and value == self.word:
            return value
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            raise UserError(f"{where}: {json.dumps(value)} is not {WORDS[self.kind]}{' or null' * self.optional}"
                            + (f" or {self.word}" if self.word else ""))
        if self.choices and value not in self.choices:
            raise UserError(f"{where}: unknown {value!r}; expected one of {', '.join(self.choices)}"
                            + nearest(value, self.choices))
        if self.kind in (int, float) and not self.low <= value <= self.high:
            raise UserError(f"{where}: {value} is out of range; expected between {self.low:g} and {self.high:g}")
        if self.syntax:
            try:
                self.syntax(value)
            except ValueError as error:
                raise UserError(f"{where} {error}") from None
        return value


def number(low, high):
    return Setting(float, "", "", low, high)


def one_of(words):
    return Setting(str, "", "", choices=words)


def normalisation(found, where):
    """How pixels are normalised: "network", or the mean and standard deviation of the three channels."""
    if not isinstance(found, dict):
        if found != "network":
            raise UserError(f"{where}: {found!r}; expected \"network\" (what the network's pretrained weights were "
                            "trained with) or an object of mean and std")
        return
    check(found, {"mean": list, "std": list}, where)
    for key, low in (("mean", 0), ("std", TINY)):
        if len(found[key]) != 3:
            raise UserError(f"{where}.{key}: expected three numbers, one per channel")
        for value in found[key]:
            check(value, number(low, 1), f"{where}.{key}")


def split(found, where):
    """How a dataset is split, as `split.make_split` takes it."""
    check(found, dict, where)
    blocks = {"blocks" if found.get("rule") == "blocks" else "blocks?": Setting(int, "", "", 3, 1_000_000)}
    share = number(TINY, 0.9)
    check(found, {"rule": one_of(("stratified", "blocks")), "val": share, "test": share, **blocks}, where)
    if found["val"] + found["test"] >= 1:
        raise UserError(f"{where}: val and test take {found['val'] + found['test']:g} of the images; expected less "
                        "than 1, so that some are left to train on")


def delimiter(found, where):
    if not isinstance(found, str) or len(found) != 1:
        raise UserError(f"{where}: {found!r}; expected one character")


def texts(found, where):
    if not all(isinstance(text, str) for text in check(found, list, where)):
        raise UserError(f"{where}: expected texts alone")


def torchvision_class(found, where):
    from torchvision import datasets

    check(found, one_of(datasets.__all__), where)


def check(found, schema, where):
    """The value, or the same object, checked, with floats for integers where these are meant; or UserError."""
    if isinstance(schema, Setting):
        return schema.check(found, where)
    if isinstance(schema, dict):
        return _check_object(found, schema, where)
    if not isinstance(schema, (type, tuple)):
        schema(found, where)
    elif not isinstance(found, schema) or isinstance(found, bool) and schema is not bool:
        kinds = schema if isinstance(schema, tuple) else (schema,)
        raise UserError(f"{where}: {json.dumps(found)} is not {' or '.join(WORDS[kind] for kind in kinds)}")
    return found


def _check_object(found, schema, where):
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object, found {json.dumps(found)}")
    known = {key.rstrip("?"): inner for key, inner in schema.items()}
    inside = f"{where}: " if where.endswith(".json") else f"{where}."
    for key, value in found.items():
        if key not in known and "*" not in known:
            raise UserError(f"{where}: unknown key {key!r}; expected {', '.join(known)}{nearest(key, known)}")
        found[key] = check(value, known.get(key, known.get("*")), f"{inside}{key}")
    for key in schema:
        if key not in found and not key.endswith(("?", "*")):
            raise UserError(f"{where}: key {key!r} is missing")
    return found
