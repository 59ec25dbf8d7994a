"""A CSV file of labels as people have them: any encoding and delimiter of spreadsheets, paths or ids, header or none.

    rows = read_rows(path, {"file": "labels.csv"}, root, {"train": "train", "testing": "test"}, images)
"""

import csv
import functools
import io
import os
import re
from pathlib import Path

from engine.display import console
from engine.files import UserError, one_line

KEYS = ("path", "label", "split", "group")  # the columns that are read
DELIMITERS = ",;\t|"
# What columns are called where nobody names them, if one column alone has such a name.
LABELS = ("label", "labels", "class", "classes", "class_name", "classname", "category", "target", "species", "breed",
          "diagnosis", "dx", "y")
SPLITS = ("split", "part", "partition", "set", "subset", "is_train", "is_training", "is_valid", "is_val", "is_test")


def read_rows(path, spec, root, words, images):
    """[(image's path relative to `root`, class, part or None, group or None)] of a CSV file. Raises UserError.

    spec: as `data.table` has it. words: {value of a split column: part}. images: gives every image below `root`, as
    (folder as a tuple of names, name in it).
    """
    files = Files(root, images)
    text, note = read_text(path)
    table, columns = _open(path, text, spec, files)
    spec, guess = _with_columns(path, spec, table, columns, files, words)
    if notes := "; ".join(filter(None, (guess, note))):
        console.print(one_line(f"{path}: {notes}"), markup=False, soft_wrap=True)
    words = {key.lower(): part for key, part in (words | _flags(spec.get("split")) | spec.get("parts", {})).items()}
    found = []
    for line, row in table:
        try:
            found.append(_row(row, spec, words, files))
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}.") from None
    if len(files.absent) > len(found) / 2:  # the column or the folder is wrong; a few are images that cannot be used
        raise UserError(f"{path} names {len(files.absent)} images that are not there, the first "
                        f"{root / files.absent[0]}, neither as it stands nor in other folders or with an ending, as "
                        ".jpg. --data-dir DIR names the folder that the paths start from")
    return found


def read_text(path):
    """The text of a file as spreadsheets write it, and what to print of its encoding, or None. Raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif b"\0" in content[:2]:  # half of the first character, without a mark of the order
        encodings = ["utf-16-be" if content[:1] == b"\0" else "utf-16-le"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            note = "read as Windows-1252, for it is not UTF-8" if encoding == "cp1252" else None
            return content.decode(encoding), note
        except UnicodeDecodeError:
            pass
    raise UserError(f"{path}: no text in UTF-8, UTF-16 or Windows-1252; save it as UTF-8")


class Files:
    """The images below a folder, by what CSVs call them. absent: what was asked for and is not there."""

    def __init__(self, root, images):
        self.root, self.images, self.absent = root, images, []

    @functools.cached_property
    def known(self):
        """{end of a path in small letters, from any folder on, with and without its ending: paths} of every image."""
        known = {}
        for names in ((*inside, name) for inside, name in self.images()):
            for end in ("/".join(names[start:]) for start in range(len(names))):
                for text in {end, os.path.splitext(end)[0]}:
                    known.setdefault(text.casefold(), []).append("/".join(names))
        return known

    def matching(self, text):
        """The paths, relative to the root, that a text may mean: the one that it is, or those that end so."""
        path = self.root / text
        there = text and os.path.lexists(path) and not os.path.isdir(path)  # a class may be called as a folder is
        return [text] if there else self.known.get(text.casefold(), [])

    def find(self, text):
        """The path that a text means; where there is none the text, which `absent` then has. Raises ValueError."""
        text = _relative(text, self.root)
        if os.path.isabs(text) or ".." in text.split("/"):
            raise ValueError(f"{text} leads out of {self.root}; expected a path relative to that")
        found = self.matching(text)
        if len(found) > 1:
            raise ValueError(f"{text} may be {found[0]} or {found[1]}; write the path in full, or name the folder of "
                             "one with --data-dir")
        if not found:
            self.absent.append(text)
        return found[0] if found else text


def _relative(text, root):
    """A path as a CSV has it, with / between names, relative to `root` where it lies there, without ./ in front."""
    if "\\" in text and not os.path.lexists(root / text):
        text = text.replace("\\", "/")  # as Windows writes it
    if os.path.isabs(text):
        inside = os.path.relpath(text, os.path.abspath(root))
        text = text if inside.startswith("..") else inside
    return text and Path(text).as_posix()


def read_columns(text):
    """{"path", "label", "split", "group": column} of "path=file,label=breed"; ValueError continues a message."""
    found = {}
    for item in next(csv.reader([text], skipinitialspace=True), []):
        key, _, column = (part.strip() for part in item.partition("="))
        if key not in KEYS or not column or key in found:
            raise ValueError(f"{text!r}: expected columns as path=FILE,label=BREED,split=PART,group=PLACE, one with a "
                             "comma in quotes")
        found[key] = column
    return found


def _open(path, text, spec, files):
    """Rows as (line, {column: value}), and the columns. The delimiter is that under which most columns are found."""
    if sign := re.match(r'"?sep=(.)"?[ \t]*(?=[\r\n])', text):  # Excel's own way to name it
        spec, text = {"delimiter": sign[1]} | spec, text[sign.end():]
    needed = [spec[key] for key in KEYS if spec.get(key)]
    tables = [_read(path, text, delimiter, spec.get("columns"), needed, files)
              for delimiter in (spec.get("delimiter") or DELIMITERS)]
    return max(tables, key=lambda table: (sum(c in table[1] for c in needed), len(table[1])))


def _read(path, text, delimiter, columns, needed, files):
    """Rows and columns under a delimiter. A first line that names images is no header: columns are then 1, 2, 3 …"""
    reader, rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True), []
    try:
        for values in reader:
            values = [value.strip() for value in values]
            if not any(values):  # spreadsheets end with such rows
                continue
            if columns is None:
                header = any(c in values for c in needed) or not any(map(files.matching, values))
                columns = values if header else [str(number) for number in range(1, len(values) + 1)]
                if header:
                    continue
            rows.append((reader.line_num, dict(zip(columns, values)) | {None: values[len(columns):]}))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no CSV ({error})") from None
    return rows, columns or []


def _with_columns(path, spec, table, columns, files, words):
    """The spec with every column, and what to print of those that were guessed, or None. Raises UserError."""
    listed, how = ", ".join(columns) or "none", "--csv-columns path=FILE,label=BREED"
    if absent := [spec[key] for key in KEYS if spec.get(key) and spec[key] not in columns]:
        raise UserError(f"{path}: no column {absent[0]!r}; it has {listed}. Name the columns with {how}, or in the "
                        "dataset's csv in configs.json.")
    if spec.get("path") and spec.get("label"):
        return spec, None
    found = _guessed(spec, table, columns, files, words)
    for key, why in (("path", f"names images in {files.root}"), ("label", "is plainly the label")):
        if key not in found:
            raise UserError(f"{path}: no column, or more than one, {why}; it has {listed}. Name the columns with {how}")
    unused = [column for column in columns if column not in found.values()]
    guess = ", ".join(f"{key} from column {column!r}" for key, column in found.items())
    return spec | found, guess + (f"; not used: {', '.join(unused)}; --csv-columns names others" if unused else "")


def _guessed(spec, table, columns, files, words):
    """{key: column}: those that the spec names, and of path, split and label those that only one column can be."""
    found = {key: spec[key] for key in KEYS if spec.get(key)}
    some = [row for _, row in table[:: max(1, len(table) // 20)]]  # from all over the file

    def names_images(column):
        return sum(bool(files.matching(_relative(row.get(column, ""), files.root))) for row in some) > len(some) / 2

    def names_parts(column):
        known = words | _flags(column) | spec.get("parts", {})
        return column.lower() in SPLITS and {known.get(row.get(column, "").lower()) for _, row in table} > {"train"}

    def only(key, serves):
        free = [column for column in columns if column not in found.values()]
        serving = [column for column in free if serves(column)]
        if key not in found and len(serving) == 1:
            found[key] = serving[0]

    only("path", names_images)
    only("split", lambda column: names_parts(column) and None not in found)
    only("label", lambda column: column.lower() in LABELS)
    only("label", lambda column: True)
    return found


def _flags(column):
    """{value: part} of a split column called is_valid, train and the like, which says yes or no."""
    part = {"train": "train", "training": "train", "valid": "val", "val": "val", "test": "test"}.get(
        (column or "").lower().removeprefix("is_"))
    if part is None:
        return {}
    other = "test" if part == "train" else "train"
    return {**dict.fromkeys(("1", "true", "yes"), part), **dict.fromkeys(("0", "false", "no"), other)}


def _row(row, spec, words, files):
    """(path, class, part, group) of a CSV's row. Raises ValueError."""
    if further := [value for value in row[None] if value]:
        raise ValueError(f"more values than columns, the first {further[0]!r}; put one that holds the delimiter in "
                         "quotes")
    text, label, part, group = (row.get(spec[key], "") if spec.get(key) else None for key in KEYS)
    if not text or not label:
        raise ValueError("empty path or label")
    if part is not None and part.lower() not in words:
        raise ValueError(f"split {part!r}; expected train, val or test, or what csv.parts of configs.json has")
    if spec.get("classes") and label not in spec["classes"]:
        raise ValueError(f"label {label!r}; the csv.classes of configs.json has {', '.join(spec['classes'])}")
    return files.find(text), spec.get("classes", {}).get(label, label), part and words[part.lower()], group
