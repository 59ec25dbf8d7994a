"""staged.py: the method as first proposed, in rounds, with erased images on the disk; stopped at any moment."""

import os
import shutil
import signal
import time
import weakref

import conftest
import numpy as np
import pytest
import torch
from PIL import Image
from test_files import NAMES

import cam
import staged
import train
from engine import checkpoint, files, predict
from engine.dataset import to_rgb
from engine.folder import open_run, read_log
from engine.network import normalisation

STAGED = ["--mode", "staged", "--train-fraction", "0.15"]


@pytest.fixture
def exact(monkeypatch):
    """Erased images keep their very pixels, where a test compares these."""
    monkeypatch.setattr(staged, "JPEG", {"format": "PNG", "compress_level": 1})


def picture(folder, row):
    return np.asarray(Image.open(folder / row["file"])).astype(int)


def stages_of(folder):
    return files.read_lines(folder / "stages.jsonl")


def ended(folder):
    return files.read_json(folder / "metrics.json")["ended"]


# Rounds and stages.


@pytest.mark.slow
def test_the_staged_pipeline_erases_what_misled_and_trains_again(trained, exact):
    folder = trained(*STAGED, "--schedule", "2,p,1,p", epochs=5)
    lines, stages = read_log(folder), stages_of(folder)
    assert [(s["round"], s["stage"]) for s in stages] == [(0, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, None)]
    assert stages[-1]["ended"] == ended(folder) == "all rounds are done"
    assert [line["round"] for line in lines] == [0, 0, 1, 1, 2] and lines[1]["erased_images"] == 0
    opened = open_run(folder)
    dataset, train_ids = opened.dataset(), opened.split["train"]
    for number in (1, 2):
        rows, stage = staged.ErasedRound(folder, number).rows(), stages[2 * number - 1]
        assert len(rows) == stage["erased_images"] > 0 and stage["images"] == len(train_ids)
        sources = {row["source"] for row in rows}
        assert sources <= set(train_ids) and len(sources) == len(rows)
        for row in rows:
            index = dataset.ids.index(row["source"])
            assert row["label"] == dataset.classes[dataset.labels[index]] != row["predicted"]
            assert row["file"].startswith(f"erased/round-{number}/{row['label']}/")
            changed = (picture(folder, row) != to_rgb(dataset.open(index), 32)).any(2)
            assert changed.sum() <= 102 and float(row["area"]) == pytest.approx(102 / 1024, abs=1e-5)
            assert (picture(folder, row)[changed] == 0).all() and 0.1 < float(row["confidence"]) <= 1
    cost = files.read_json(folder / "metrics.json")["cost"]
    assert cost["second_pass_images"] == 2 * len(train_ids) and cost["cam_seconds"] > 0
    assert cost["erased_images"] == sum(line["erased_images"] for line in lines) > 0


@pytest.mark.slow
def test_erased_images_are_kept_as_jpegs_near_their_pixels(trained):
    folder = trained(*STAGED, "--rounds", "1", "--batch-size", "32", epochs=1)
    dataset = open_run(folder).dataset()
    for row in staged.ErasedRound(folder, 1).rows():
        assert Image.open(folder / row["file"]).format == "JPEG" and row["file"].endswith(".jpg")
        original = to_rgb(dataset.open(dataset.ids.index(row["source"])), 32).astype(int)
        kept = (np.abs(picture(folder, row) - original) < 32).all(2)  # a tenth is black, and edges ring
        assert kept.mean() > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("budget, images", [("equal", 0), ("extra", 1)])
def test_stage_3_trains_on_copies_instead_of_their_originals_or_on_both(trained, budget, images):
    folder = trained(*STAGED, "--rounds", "1", "--budget", budget, "--batch-size", "16", epochs=1)
    erased, lines = len(staged.ErasedRound(folder, 1).rows()), read_log(folder)
    count = len(open_run(folder).split["train"])
    assert lines[1]["images_seen"] == -(-(count + images * erased) // 16) * 16
    assert erased <= lines[1]["erased_images"] < erased + 16


@pytest.mark.slow
@pytest.mark.parametrize("select", ["unsure", "loss"])
def test_where_every_image_is_selected_every_image_is_erased(trained, select):
    folder = trained(*STAGED, "--rounds", "1", "--select", select, "--cam", "center", epochs=1)
    rows = staged.ErasedRound(folder, 1).rows()
    assert sorted(row["source"] for row in rows) == open_run(folder).split["train"]


@pytest.mark.slow
def test_the_index_tells_what_the_network_of_stage_1_predicted(trained, monkeypatch):
    states, real = [], train.finish_epoch

    def finish_epoch(t, line):
        real(t, line)
        states.append({key: value.clone() for key, value in t.model.state_dict().items()})

    monkeypatch.setattr(train, "finish_epoch", finish_epoch)
    folder = trained(*STAGED, "--rounds", "1", epochs=1)
    opened, cpu = open_run(folder), torch.device("cpu")
    dataset, ids, model = opened.dataset(), opened.split["train"], opened.network()
    model.load_state_dict(states[0])
    batches = predict.batches_in_order(opened.config, dataset, ids, cpu)
    logits, labels = predict.predict(model, batches, *normalisation(opened.config, model), cpu)
    confidence, predicted = logits.softmax(1).max(1)
    rows = {row["source"]: row for row in staged.ErasedRound(folder, 1).rows()}
    wrong = {i for i, best, label in zip(ids, predicted.tolist(), labels.tolist()) if best != label}
    assert set(rows) <= wrong and len(rows) >= 0.9 * len(wrong)  # the heat of a few may be zero
    for image_id, best, sure in zip(ids, predicted.tolist(), confidence.tolist()):
        if image_id in rows:
            assert rows[image_id]["predicted"] == dataset.classes[best]
            assert float(rows[image_id]["confidence"]) == pytest.approx(sure, abs=1e-4)


@pytest.mark.slow
def test_a_stages_network_and_optimizer_are_gone_when_it_ends(trained, monkeypatch):
    kept, alive = [], []
    build, record = torch.optim.AdamW, files.append_line

    def remember(*arguments, **options):
        optimizer = build(*arguments, **options)
        kept.extend([weakref.ref(optimizer), weakref.ref(optimizer.param_groups[0]["params"][0])])
        return optimizer

    def note(path, line):
        if path.name == "stages.jsonl":
            alive.append([reference() is not None for reference in kept])
        record(path, line)

    monkeypatch.setattr(torch.optim, "AdamW", remember)
    monkeypatch.setattr(files, "append_line", note)
    stages = stages_of(trained(*STAGED, "--rounds", "1", epochs=1))
    assert len(kept) == 4 and len(alive) == 4 and not any(sum(alive, []))
    assert all(stage["held_mb"] > 0 and stage["left_mb"] > 0 for stage in stages[:-1])


# How it ends.


def test_a_round_whose_heat_shows_nothing_says_so(trained, monkeypatch):
    monkeypatch.setattr(cam, "rescale", torch.zeros_like)
    folder = trained(*STAGED, epochs=1)
    selected = stages_of(folder)[1]["selected"]
    assert selected > 50 and ended(folder) == f"the heat of all {selected} selected images is zero"


@pytest.mark.slow
def test_staged_runs_end_early_and_say_why(trained, capsys):
    folder = trained(*STAGED, "--target-accuracy", "0.05", epochs=2)
    assert "reaches the target 0.05" in ended(folder) and len(read_log(folder)) == 2
    folder = trained("--mode", "staged", "--classes", "0,1", epochs=8)
    assert ended(folder) == "no training image is misled" and len(read_log(folder)) < 32
    assert "ended in round" in capsys.readouterr().out


# Killed, damaged, or without room on the disk.


def same_run(a, b):
    """The same weights, and the same erased images, line by line and byte by byte."""
    states = [checkpoint.load_checkpoint(folder / "last.pt")["model"] for folder in (a, b)]
    left = [{p.relative_to(f): p.read_bytes() for p in f.glob("erased/**/*") if p.is_file()} for f in (a, b)]
    stages = [[stage["stage"] for stage in stages_of(folder)] for folder in (a, b)]
    return all(torch.equal(states[0][k], states[1][k]) for k in states[0]) and left[0] == left[1] and left[0] \
        and stages[0] == stages[1]


ROUNDS = [*STAGED, "--schedule", "1,p,p", "--select", "loss", "--fill", "transplant"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The staged run that is killed below, left alone."""
    out = tmp_path_factory.mktemp("alone")
    assert train.main([*ROUNDS, "--out", str(out), "--name", "alone"]) == 0
    return out / "alone"


@pytest.mark.slow
@pytest.mark.parametrize("module, moment", [(files, "write_json"), (files, "append_line"),
                                            (checkpoint, "save_checkpoint")])
def test_a_staged_run_that_was_killed_goes_on_with_what_is_on_disk(alone, tmp_path, monkeypatch, module, moment):
    plain, calls = getattr(module, moment), [0]

    def dies(*given):
        calls[0] += 1
        if calls[0] % 7 == 2:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(module, moment, dies)
    first, folder = [*ROUNDS, "--out", str(tmp_path), "--name", "cut"], tmp_path / "cut"
    status = train.main(first)
    attempts = 0
    while status == 130 and (attempts := attempts + 1) < 30:  # where it died before there was a run, it begins anew
        status = train.main(["--resume", str(folder)] if (folder / "config.json").exists() else first)
    assert status == 0 and attempts > 0
    assert same_run(alone, folder)


@pytest.mark.slow
def test_a_staged_run_repeats_no_finished_work(trained, tmp_path, monkeypatch):
    arguments = [*STAGED, "--rounds", "1", "--batch-size", "32", "--epochs", "1", "--out", str(tmp_path)]
    counted, add = [], staged.ErasedRound.add

    def stop(self, start, entries, selected):
        if start == 128:
            raise KeyboardInterrupt
        count(self, start, entries, selected)

    def count(self, start, entries, selected):
        add(self, start, entries, selected)
        counted.append(start)

    with monkeypatch.context() as patch:
        patch.setattr(staged.ErasedRound, "add", stop)
        assert train.main([*arguments, "--name", "cut"]) == 130
    assert counted == [0, 32, 64, 96] and len(read_log(tmp_path / "cut")) == 1
    monkeypatch.setattr(staged.ErasedRound, "add", count)
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    images = len(open_run(tmp_path / "cut").split["train"])
    assert counted == [*range(0, images, 32)] and len(read_log(tmp_path / "cut")) == 2


@pytest.mark.slow
def test_a_full_disk_in_a_staged_run_keeps_the_last_checkpoint_and_the_run_goes_on(tmp_path, train_process):
    folder = tmp_path / "run"
    arguments = [*STAGED, "--rounds", "1", "--epochs", "1", "--out", tmp_path, "--name", "run"]
    process = train_process(arguments, limit=100_000)
    assert process.wait() == 2  # config and split fit, a checkpoint does not
    last = process.output().splitlines()[-1]
    assert "cannot be written (" in last and f"go on with python train.py --resume {folder}" in last
    assert train_process(["--resume", folder]).wait() == 0
    assert len(read_log(folder)) == 2


# Several processes.


def erasing(*arguments):
    """In a process of its own: `train.py`; beside its output a file tells which batches it erased."""
    add, batches = staged.ErasedRound.add, []

    def noted(self, start, entries, selected):
        add(self, start, entries, selected)
        batches.append(start)

    staged.ErasedRound.add = noted
    conftest.train_and_tell(arguments, batches)


def dying(*arguments):
    """In a process of its own: `train.py`, killed as it begins to write its third batch."""
    add, batches = staged.ErasedRound.add, []

    def dies(self, start, entries, selected):
        batches.append(start)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, start, entries, selected)

    staged.ErasedRound.add = dies
    torch.set_num_threads(1)
    conftest._train_main(*arguments)


def erased_by(folder):
    return {p.relative_to(folder): p.read_bytes() for p in (folder / "erased").rglob("*") if p.is_file()}


def batches_of(process):
    return [files.read_json(f"{path}.json") for path in process.paths]


@pytest.fixture(scope="module")
def after_stage_1(tmp_path_factory):
    """A run that has done stage 1, with 8 batches to erase, the last one short."""
    out = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged, "erase_stage", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main([*STAGED, "--rounds", "1", "--select", "loss", "--fill", "transplant", "--batch-size", "24",
                           "--epochs", "1", "--out", str(out), "--name", "run"]) == 130
    return out / "run"


@pytest.fixture(scope="module")
def erased_alone(after_stage_1, tmp_path_factory, train_process):
    folder = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(after_stage_1, folder)
    process = train_process(["--resume", folder], target=erasing)
    assert process.wait() == 0 and batches_of(process) == [[*range(0, 188, 24)]]
    return folder


@pytest.mark.slow
def test_several_processes_erase_the_files_of_one_each_batch_once(after_stage_1, erased_alone, tmp_path, train_process):
    shutil.copytree(after_stage_1, tmp_path / "run")
    process = train_process(["--resume", tmp_path / "run"], ranks=2, target=erasing)
    assert process.wait() == 0, process.output()
    assert batches_of(process) == [[0, 48, 96, 144], [24, 72, 120, 168]]
    assert len(erased_by(erased_alone)) > 150 and erased_by(tmp_path / "run") == erased_by(erased_alone)
    lines, alone = stages_of(tmp_path / "run"), stages_of(erased_alone)
    assert [(s["round"], s["stage"]) for s in lines] == [(s["round"], s["stage"]) for s in alone]
    assert all(lines[1][key] == alone[1][key] for key in ("images", "selected", "erased_images"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_stage_2_goes_on_after_a_kill_with_any_number_of_processes(ranks, after_stage_1, erased_alone, tmp_path,
                                                                  train_process):
    folder = tmp_path / "run"
    shutil.copytree(after_stage_1, folder)
    process = train_process(["--resume", folder], ranks=2, target=dying)
    assert process.wait() == -signal.SIGKILL
    done = [int(path.stem) for path in (folder / "erased" / "round-1" / ".batches").glob("*.json")]
    assert {0, 48} <= set(done) <= {0, 24, 48, 72}  # the second process goes with the first, which it may still ask
    process = train_process(["--resume", folder], ranks=ranks, target=erasing)
    assert process.wait() == 0, process.output()
    assert sorted(sum(batches_of(process), [])) == [start for start in range(0, 188, 24) if start not in done]
    assert erased_by(folder) == erased_by(erased_alone)


def late(*arguments):
    """In a process of its own: `train.py`, which writes lines long after the other process would read them."""
    append = files.append_line

    def slowly(path, line):
        time.sleep(1)
        append(path, line)

    files.append_line = slowly
    conftest._train_main(*arguments)


@pytest.mark.slow
def test_all_stages_run_in_several_processes_however_late_the_first_writes(tmp_path, train_process):
    process = train_process([*STAGED, "--schedule", "1,p,p", "--batch-size", "32", "--out", tmp_path, "--name", "run"],
                            ranks=2, target=late)
    assert process.wait() == 0, process.output()
    expected = [(0, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, None)]
    assert [(s["round"], s["stage"]) for s in stages_of(tmp_path / "run")] == expected
    assert len(read_log(tmp_path / "run")) == 3 and ended(tmp_path / "run") == "all rounds are done"


# Erased images on the disk.


def row_of(source, label="a"):
    return {"source": source, "label": label, "predicted": "b", "confidence": "0.5", "area": "0.1"}


def test_erased_images_are_written_indexed_and_taken_up_again(tmp_path, exact):
    names = [name for name in NAMES if "\0" not in name]  # which no file's name holds, and Python 3.10's csv refuses
    pictures = np.random.default_rng(0).integers(0, 256, (len(names), 8, 8, 3), dtype=np.uint8)
    kept = staged.ErasedRound(tmp_path, 1)
    assert kept.left(50, 20) == [0, 20, 40] and kept.counts() == [0, 0, 0]
    entries = [(p, row_of(name, label)) for p, name, label in zip(pictures, names, reversed(names))]
    kept.add(40, entries[2:], 20)  # by another process, before the batches in front of it
    kept.add(0, entries[:2], 10)
    again = staged.ErasedRound(tmp_path, 1)
    assert again.left(50, 20) == [20]
    again.add(20, [], 1)
    assert again.join(50) == [50, 31, len(names)] == again.join(50) and again.left(50, 20) == []
    rows = again.rows()
    assert [row["source"] for row in rows] == names
    for row, expected in zip(rows, pictures):
        assert (tmp_path / row["file"]).resolve().is_relative_to(tmp_path / "erased" / "round-1")
        assert np.array_equal(picture(tmp_path, row), expected)
    assert sorted(p.name for p in again.folder.iterdir() if p.is_file()) == ["index.csv", "progress.json"]


def test_an_image_that_cannot_be_written_ends_the_round_with_an_error(tmp_path):
    kept = staged.ErasedRound(tmp_path, 1)
    kept.left(1, 1)
    (kept.folder / "a").write_text("a file where a folder should be")
    with pytest.raises(files.UserError, match="cannot be written"):
        kept.add(0, [(np.zeros((8, 8, 3), np.uint8), row_of("1"))], 1)
    assert staged.ErasedRound(tmp_path, 1).left(1, 1) == [0]
