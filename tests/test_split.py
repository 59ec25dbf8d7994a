"""engine/split.py: a split that does not leak."""

import shutil

import numpy as np
import pytest
from conftest import draw_classes
from test_data import STRATIFIED, load

from engine.files import UserError
from engine.split import PARTS, make_split, redraw

BLOCKS = {"rule": "blocks", "blocks": 20, "val": 0.1, "test": 0.2}


def parts_of(dataset, split):
    number = {image_id: i for i, image_id in enumerate(dataset.ids)}
    return {part: [number[i] for i in split[part]] for part in PARTS}


def test_the_split_is_stratified_and_the_same_every_time():
    found = load("digits", None)
    split = make_split(found, STRATIFIED, seed=3)
    assert split == make_split(found, STRATIFIED, seed=3)
    assert split != make_split(found, STRATIFIED, seed=4)
    assert sorted(sum(split.values(), [])) == found.ids
    for part, share in (("test", 0.2), ("val", 0.1)):
        counts = np.bincount(found.labels[parts_of(found, split)[part]])
        assert np.abs(counts - share * np.bincount(found.labels)).max() <= 1


def test_copies_of_one_image_never_straddle_parts(tmp_path):
    draw_classes(tmp_path, frames=12)
    for letter in "ABC":
        for i in range(1, 13):
            shutil.copy(tmp_path / letter / f"{letter}{i}.jpg", tmp_path / letter / f"{letter}{i + 100}.jpg")
    shutil.copy(tmp_path / "A" / "A1.jpg", tmp_path / "B" / "B999.jpg")
    found = load("folder", tmp_path)
    for rule in (STRATIFIED, BLOCKS):
        for seed in range(5):
            parts = parts_of(found, make_split(found, rule, seed))
            contents = {part: {found.digests[i] for i in parts[part]} for part in parts}
            assert not (contents["train"] & contents["val"] | contents["train"] & contents["test"]
                        | contents["val"] & contents["test"])


def test_a_held_out_copy_is_taken_out_of_an_official_training_part(tmp_path):
    draw_classes(tmp_path / "train", frames=8)
    (tmp_path / "test").mkdir()
    for letter in "ABC":
        (tmp_path / "test" / letter).mkdir()
        shutil.copy(tmp_path / "train" / letter / f"{letter}3.jpg", tmp_path / "test" / letter / "x.jpg")
    split = make_split(load("folder", tmp_path), STRATIFIED, seed=0)
    assert len(split["test"]) == 3 and not any(i.endswith("3.jpg") for i in split["train"] + split["val"])


def test_asls_split_takes_blocks_of_consecutive_frames(tmp_path):
    for letter in "AB":
        (tmp_path / letter).mkdir()
        for frame in range(1, 201):
            (tmp_path / letter / f"{letter}{frame}.jpg").write_bytes(f"{letter}{frame}".encode())
    found = load("asl", tmp_path)
    split = make_split(found, BLOCKS, seed=0)
    assert {part: len(ids) for part, ids in split.items()} == {"train": 280, "val": 40, "test": 80}
    part_of = {image_id: part for part, ids in split.items() for image_id in ids}
    for letter in "AB":
        sequence = [part_of[f"{letter}/{letter}{frame}.jpg"] for frame in range(1, 201)]
        blocks = [sequence[i:i + 10] for i in range(0, 200, 10)]
        assert all(len(set(block)) == 1 for block in blocks)


def test_a_fraction_of_the_training_part_leaves_the_rest_alone():
    found = load("digits", None)
    full, tenth, fifth = (make_split(found, STRATIFIED, 0, f) for f in (1.0, 0.1, 0.2))
    assert tenth["val"] == full["val"] and tenth["test"] == full["test"]
    assert set(tenth["train"]) < set(fifth["train"]) < set(full["train"])
    counts = np.bincount(found.labels[parts_of(found, tenth)["train"]])
    assert np.abs(counts - np.bincount(found.labels[parts_of(found, full)["train"]]) / 10).max() <= 0.5


def test_too_few_images_for_a_split_is_an_error_that_names_the_class(tmp_path):
    draw_classes(tmp_path, frames=5)
    for i in range(2, 5):
        shutil.copy(tmp_path / "B" / "B1.jpg", tmp_path / "B" / f"B{i}.jpg")
    with pytest.raises(UserError, match="class 'B' has 2 different images; the split needs at least 3"):
        make_split(load("folder", tmp_path), STRATIFIED, seed=0)


def test_a_new_split_deals_out_training_and_validation_anew_and_leaves_test_alone():
    found = load("digits", None)
    split, number = make_split(found, STRATIFIED, 0), dict(zip(found.ids, found.labels.tolist()))
    one, two = (redraw(found, split, 0, number) for number in (1, 2))
    for new in (one, two):
        assert new["test"] == split["test"]
        assert set(new["train"]) | set(new["val"]) == set(split["train"]) | set(split["val"])
        for part in ("train", "val"):
            sizes = [sorted(number[i] for i in ids[part]) for ids in (new, split)]
            assert sizes[0] == sizes[1]  # class by class
    leaked = len(set(one["val"]) & set(split["train"])) / len(one["val"])
    assert leaked > 0.8 and one["val"] != two["val"]
    assert redraw(found, two, 0, 1) == one  # whichever draw it is asked from


def test_what_an_earlier_run_was_trained_on_is_never_tested_on():
    every, part = load("digits", None), load("digits", None, "0,1,2")
    first = make_split(part, STRATIFIED, 5, 0.3)
    known = {image_id: name for name in PARTS for image_id in first[name]}
    split = make_split(every, STRATIFIED, 6, 1.0, known)
    assert set(first["val"]) <= set(split["val"]) and set(first["test"]) <= set(split["test"])
    assert not set(first["train"]) & (set(split["val"]) | set(split["test"]))
    old = {i for i, label in zip(every.ids, every.labels) if label < 3}
    assert set(split["val"]) & old == set(first["val"])  # what was left out of its training part is trained on
    assert {i for i in split["test"]} - old and sum(map(len, split.values())) == len(every)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_a_run_that_goes_on_with_the_same_fraction_trains_on_the_same_images(fraction):
    found = load("digits", None)
    first = make_split(found, STRATIFIED, 5, fraction)
    known = {image_id: part for part in PARTS for image_id in first[part]}
    assert make_split(found, STRATIFIED, 5, fraction, known) == first
    more = make_split(found, STRATIFIED, 5, 2 * fraction, known)
    assert set(first["train"]) < set(more["train"]) and (more["val"], more["test"]) == (first["val"], first["test"])
