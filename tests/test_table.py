"""engine/table.py: CSV files of labels as people have them, and what `--csv` makes of them."""

import json

import pytest
from conftest import draw_classes, draw_letter
from test_data import CONFIGS, load
from test_faults import error_line

import data
import train
from engine import files, folder, settings
from engine.table import read_columns

ROWS = [(f"{c}/{c}{i}.jpg", name) for c, name in (("A", "Käfer"), ("B", "Bär; rot")) for i in range(1, 7)]
TINY = ("--model", "test_resnet", "--no-pretrained", "--image-size", "32", "--epochs", "1", "--batch-size", "8",
        "--workers", "0", "--device", "cpu", "--name", "run")


@pytest.fixture
def pictures(tmp_path):
    """A/A1.jpg to B/B6.jpg."""
    draw_classes(tmp_path / "p", "AB", 6)
    return tmp_path / "p"


def lines_of(rows, delimiter=","):
    quoted = [[f'"{value}"' if delimiter in value else value for value in row] for row in rows]
    return "".join(delimiter.join(row) + "\r\n" for row in quoted)


def read(root, text="", encoding="utf-8", **spec):
    """The dataset of a CSV file of this text, whose entry has these keys."""
    if text:
        (root / "labels.csv").write_bytes(text.encode(encoding))
    return load("folder", root, layout="csv", csv={"file": "labels.csv"} | spec)


def labels_of(found):
    return {image_id: found.classes[label] for image_id, label in zip(found.ids, found.labels)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_any_encoding_and_delimiter_of_spreadsheets_gives_the_same(encoding, delimiter, pictures, capsys):
    text = lines_of([("file", "label"), *ROWS], delimiter)
    for named in ({"path": "file", "label": "label"}, {}):
        assert labels_of(read(pictures, text, encoding, **named)) == dict(ROWS)
        assert ("Windows-1252" in capsys.readouterr().out) == (encoding == "cp1252")


def test_a_file_in_no_such_encoding_is_named(pictures):
    with pytest.raises(files.UserError, match="labels.csv: no text in UTF-8, UTF-16 or Windows-1252; save it as UTF-8"):
        (pictures / "labels.csv").write_bytes(b"file,label\nA/A1.jpg,\x81\x8d")
        read(pictures)


def test_blanks_empty_rows_excels_first_line_and_columns_of_no_use_do_no_harm(pictures):
    rows = [(" file ", "  breed", "note")] + [(f" {path}  ", f"\t{name} ", "") for path, name in ROWS]
    for text in (lines_of(rows), lines_of(rows) + ",,\r\n,,\r\n\r\n", "sep=;\r\n" + lines_of(rows, ";")):
        assert labels_of(read(pictures, text)) == dict(ROWS)


def test_paths_of_windows_with_dots_in_front_and_in_full_are_those_of_the_folder(pictures):
    rows = [("./" + ROWS[0][0], ROWS[0][1]), (str(pictures / ROWS[1][0]), ROWS[1][1]),
            *((path.replace("/", "\\"), name) for path, name in ROWS[2:])]
    assert labels_of(read(pictures, lines_of([("file", "label"), *rows]))) == dict(ROWS)


@pytest.mark.parametrize("name_of", [lambda path: path[2:-4], lambda path: path[2:], lambda path: path[:-4],
                                     lambda path: path[2:-4].lower(), lambda path: path[:-4] + ".JPG"])
def test_ids_without_folder_or_ending_are_found(name_of, pictures, tmp_path):
    (tmp_path / "labels.csv").write_text(lines_of([("id", "label"), *((name_of(p), name) for p, name in ROWS)]))
    assert labels_of(read(tmp_path)) == {f"p/{path}": name for path, name in ROWS}


def test_a_label_that_a_folder_is_called_is_no_path(pictures):
    rows = [(path[2:-4], path[0]) for path, _ in ROWS]
    assert labels_of(read(pictures, lines_of([("id", "folder"), *rows]))) == {path: path[0] for path, _ in ROWS}


def test_an_id_that_two_files_have_is_named_with_both(pictures):
    draw_letter("A", 77).save(pictures / "A1.png")
    with pytest.raises(files.UserError, match=r"labels.csv, line 2: A1 may be (A/A1.jpg or A1.png|A1.png or A/A1.jpg)"):
        read(pictures, lines_of([("id", "label"), *((path[2:-4], name) for path, name in ROWS)]))


def test_a_file_without_header_has_columns_that_are_numbers(pictures, capsys):
    assert labels_of(read(pictures, lines_of(ROWS))) == dict(ROWS)
    assert "path from column '1', label from column '2'" in capsys.readouterr().out
    reverse = lines_of([(name, path) for path, name in ROWS])
    assert labels_of(read(pictures, reverse, path="2", label="1")) == dict(ROWS)


def test_what_was_guessed_is_printed_with_what_was_not_used(pictures, capsys):
    rows = [("age", "image", "breed")] + [(str(i), path, name) for i, (path, name) in enumerate(ROWS)]
    assert labels_of(read(pictures, lines_of(rows))) == dict(ROWS)
    assert "labels.csv: path from column 'image', label from column 'breed'; not used: age" in capsys.readouterr().out
    read(pictures, path="image", label="age", parts={})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns, message", [
    (("image", "size", "age"), "more than one, is plainly the label; it has image, size, age. Name the columns with"),
    (("image", "label", "class"), "more than one, is plainly the label"),
    (("nothing", "label", "age"), "more than one, names images in"), (("image", "copy", "label"), "names images in"),
])
def test_where_there_is_doubt_it_asks(columns, message, pictures):
    rows = [[path if c in ("image", "copy") else name for c in columns] for path, name in ROWS]
    with pytest.raises(files.UserError, match=message):
        read(pictures, lines_of([columns, *rows]))


def split_rows(values):
    return [(path, name, values[i % 3]) for i, (path, name) in enumerate(ROWS)]


@pytest.mark.parametrize("column, values, spec, parts", [
    ("split", ("train", "VALID ", "Testing"), {}, ("train", "val", "test")),
    ("is_valid", ("False", "False", "True"), {}, ("train", "train", "val")),
    ("is_train", ("1", "1", "0"), {}, ("train", "train", "test")),
    ("fold", ("True", "False", "0"), {"split": "fold", "parts": {"True": "train", "False": "val", "0": "test"}},
     ("train", "val", "test")),
    ("Train", ("TRUE", "TRUE", "FALSE"), {"split": "Train"}, ("train", "train", "test")),
    ("set", ("0", "1", "2"), {}, None),  # whatever that means
])
def test_parts_are_words_or_yes_and_no_or_what_the_entry_says(column, values, spec, parts, pictures):
    found = read(pictures, lines_of([("file", "label", column), *split_rows(values)]), **spec)
    expected = parts and {path: parts[i % 3] for i, (path, _) in enumerate(ROWS)}
    assert (found.parts and dict(zip(found.ids, found.parts))) == expected


@pytest.mark.parametrize("row, message", [
    ("A/A1.jpg,", "line 14: empty path or label"), ("A/A1.jpg,a, b", "line 14: more values than columns, the first 'b"),
    ("../secret.jpg,x", "line 14: ../secret.jpg leads out of"), ("/etc/passwd,x", "line 14: /etc/passwd leads out of"),
    ("A/A1.jpg,cat", "A/A1.jpg is named twice"),
])
def test_a_row_that_says_nothing_is_named_with_its_line(row, message, pictures):
    with pytest.raises(files.UserError, match=message):
        read(pictures, lines_of([("file", "label"), *ROWS]) + row, path="file", label="label")


def test_a_few_images_that_are_not_there_are_left_to_the_check_and_many_are_named(pictures):
    for number, (path, _) in enumerate(ROWS[:7]):
        if number == 6:
            assert len(read(pictures, path="file", label="label")) == 12
        (pictures / path).rename(pictures / f"gone{number}.jpg")
        (pictures / "labels.csv").write_text(lines_of([("file", "label"), *ROWS]))
    with pytest.raises(files.UserError, match="names 7 images that are not there, .*A1.jpg.* with an ending, as .jpg"):
        read(pictures, path="file", label="label")


@pytest.mark.parametrize("text, expected", [
    ("path=file,label=breed", {"path": "file", "label": "breed"}), ("", {}), (" split = is it? ", {"split": "is it?"}),
    ('path=1,"label=a, b",group=x=y', {"path": "1", "label": "a, b", "group": "x=y"}),
])
def test_columns_are_named_by_what_they_hold(text, expected):
    assert read_columns(text) == expected


@pytest.mark.parametrize("text", ["file,label", "image=file", "path=", "path=a,path=b", "=", ","])
def test_columns_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match="expected columns as path=FILE,label=BREED"):
        read_columns(text)


# The command line.


def run_of(tmp_path, *arguments):
    assert train.main([*arguments, *TINY, "--out", str(tmp_path / "runs")]) == 0
    return folder.open_run(tmp_path / "runs" / "run")


def test_a_csv_is_trained_on_without_another_word_and_kept_with_the_run(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (pictures / "labels.csv").write_text(lines_of([("file", "label"), *ROWS]))
    opened = run_of(tmp_path, "--csv", "p/labels.csv", "--no-pretrained")
    assert (opened.config["dataset"], opened.config["data_dir"]) == ("folder", "p")
    assert opened.split["classes"] == ["Bär; rot", "Käfer"] and len(opened.dataset()) == 12
    assert train.main(["--resume", "runs/run"]) == 0
    assert train.main(["--init", "runs/run", "--csv", "p/labels.csv", *TINY, "--out", "more"]) == 0
    assert train.main(["--mode", "staged", "--rounds", "1", "--csv", "p/labels.csv", *TINY, "--out", "staged"]) == 0


def test_paths_start_from_data_dir_and_columns_are_those_that_are_named(pictures, tmp_path):
    rows = [(path[2:], name, "p") for path, name in ROWS if path.startswith("A")]
    rows += [(path[2:], name, "q") for path, name in ROWS if path.startswith("B")]
    (tmp_path / "here.tsv").write_text(lines_of([("f", "breed", "place"), *rows], "\t"))
    opened = run_of(tmp_path, "--csv", str(tmp_path / "here.tsv"), "--data-dir", str(pictures), "--csv-columns",
                    "path=f,label=place")
    assert opened.split["classes"] == ["p", "q"] and "A/A1.jpg" in opened.dataset().ids
    assert opened.config["dataset_entry"]["csv"] == {"file": "here.tsv", "path": "f", "label": "place"}


@pytest.mark.parametrize("arguments, message", [
    (["--csv", "gone.csv"], "gone.csv"), (["--csv-columns", "path=a"], "--csv-columns goes with --csv FILE"),
    (["--csv", "a.csv", "--csv-columns", "file,label"], "--csv-columns 'file,label': expected columns as path=FILE"),
    (["--csv", "a.csv", "--dataset", "digits"], "--csv: the images of dataset digits come with scikit-learn"),
    (["--csv", "a.csv", "--dataset", "pets"], "--csv: dataset pets is no folder of images"),
])
def test_what_cannot_be_a_csv_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*arguments, *TINY]) == 2
    assert message in error_line(capsys)


def test_a_dataset_of_configs_json_keeps_what_it_says_of_its_csv(pictures):
    given = {"dataset": "waterbirds", "csv": f"{pictures}/new.csv", "csv_columns": "label=z"}
    config = settings.resolve(CONFIGS, given)
    spec = config["dataset_entry"]["csv"]
    assert (spec["file"], spec["path"], spec["label"], spec["split"]) == ("new.csv", "img_filename", "z", "split")
    assert config["data_dir"] == str(pictures)


def test_cells_of_an_experiment_may_have_a_csv(pictures):
    from engine import experiment

    found = experiment.cells(CONFIGS, "demo", {"dataset": "folder", "csv": f"{pictures}/labels.csv"})
    (pictures / "labels.csv").write_text(lines_of([("file", "label"), *ROWS]))
    config = found[0].config(CONFIGS)
    assert json.dumps(config) and len(data.load_dataset(config | {"cache": "off"})) == 12
    assert f"--csv={pictures}/labels.csv" in experiment.command(found[0])
