"""bench.py: what it prints is what it keeps. How long anything takes is not tested."""

import csv

import pytest

import bench


@pytest.mark.parametrize("arguments", [["cam", "--methods", "gradcam", "layercam"], ["step"], ["input"], ["staged"]])
def test_a_table_is_kept_as_it_is_printed_with_the_machine_and_what_was_set(arguments, tmp_path, capsys):
    kept = tmp_path / "table.csv"
    small = ["--models", "test_resnet", "--image-size", "64", "--batch-size", "4", "--rounds", "1", "--images", "16", "--device", "cpu"]
    assert bench.main([*arguments, *small, "--csv", str(kept)]) == 0
    rows, printed = list(csv.DictReader(kept.open())), capsys.readouterr().out
    assert len(rows) == {"cam": 2, "step": 3, "input": 1, "staged": 1}[arguments[0]]
    lines = [line.split() for line in printed.splitlines() if line.startswith("test_resnet")]
    for row, line in zip(rows, lines, strict=True):
        assert "batch 4" in row["set"] and "torch" in row["machine"] and row["network"] == line[0] == "test_resnet"
        values = list(row.values())[:-2]
        assert len(values) == len(line)
        for value, shown in zip(values[1:], line[1:]):
            number = shown.removesuffix("%")
            if number.replace(".", "").isdecimal():
                assert float(value) == pytest.approx(float(number) / (100 if "%" in shown else 1), abs=0.06)
    if arguments[0] == "cam":
        assert all(float(r["adds"]) / float(r["forward"]) == pytest.approx(float(r["adds/forward"])) for r in rows)


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "a").write_text("")
    assert bench.main(["cam", "--models", "test_resnet", "--image-size", "64", "--batch-size", "2", "--rounds", "1", "--methods", "gradcam", "--device", "cpu",
                       "--csv", str(tmp_path / "a" / "table.csv")]) == 2
    assert "table.csv" in capsys.readouterr().err
