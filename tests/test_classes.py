"""engine/classes.py: class folders as archives, links and failed downloads leave them."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from test_data import load
from test_input import state_of

from engine import classes
from engine.files import UserError
from engine.launch import say_what_is_left_out


def place(root, *paths):
    """An image of its own at each path; a path that ends otherwise is a file of a few bytes, one with / a folder."""
    for path in map(root.joinpath, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            pixels = np.random.default_rng(list(str(path).encode())).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        else:
            path.write_bytes(b"\0\0\0\x18ftypheic")


def place_classes(root, names="AB", count=4):
    place(root, *(f"{name}/{i}.png" for name in names for i in range(count)))


def noted(dataset, *words):
    """The dataset's only note with all these words."""
    note, = [note for note in dataset.notes if all(word in note for word in words)]
    return note


# Archives as they unpack.


@pytest.mark.parametrize("used, again", [
    ("Set", "set/Set"), ("", "Set"), ("x/Set", "x/Set/Set"), ("a", "b"), ("x", "y/more/x")])
def test_the_same_class_folders_a_second_time_count_once_and_a_line_names_those_that_are_used(used, again, tmp_path):
    place_classes(tmp_path / used)
    shutil.copytree(tmp_path / used, tmp_path.parent / "copy")
    shutil.move(tmp_path.parent / "copy", tmp_path / again)
    found = load("folder", tmp_path)
    assert found.classes == ["A", "B"] and len(found) == 8
    assert noted(found, "8 images are copies").endswith(f", the first {tmp_path / again / 'A' / '0.png'}")
    assert f"of those in {tmp_path / used}, " in noted(found, "copies")


def test_a_second_copy_of_all_parts_counts_once(tmp_path):
    for part in ("train", "val", "test"):
        place_classes(tmp_path / "xray" / part)
    shutil.copytree(tmp_path / "xray", tmp_path / "again" / "xray")
    shutil.move(tmp_path / "again" / "xray", tmp_path / "xray")
    found = load("folder", tmp_path)
    assert len(found) == 24 and [found.parts.count(part) for part in ("train", "val", "test")] == [8, 8, 8]
    assert "24 images are copies" in noted(found, "copies")


def test_a_second_set_of_the_same_classes_with_other_images_is_refused(tmp_path):
    place_classes(tmp_path / "one")
    place_classes(tmp_path / "two")
    shutil.copy(tmp_path / "one" / "A" / "0.png", tmp_path / "two" / "A" / "0.png")
    with pytest.raises(UserError, match="several folders hold class folders: .*one, .*two. Name one with --data-dir"):
        load("folder", tmp_path)


@pytest.mark.parametrize("image, mask", [
    ("{}/images/{}.png", "{}/masks/{}.png"), ("images/{}/{}.jpg", "masks/{}/{}.png"), ("{}/{}.png", "{}/{}_mask.png"),
    ("{}/x {}.png", "{}/x {}_mask_1.png"), ("{}/{}.jpg", "Masks/{}/{}.png"), ("{}/img/{}.jpg", "{}/gt/{}_mask.png"),
    ("{}/{}.jpg", "{}/mask/{}.jpg"), ("{}/Images/{}.jpg", "{}/Segmentation/{}-segmentation.png")])
def test_masks_beside_images_are_no_images_and_no_classes(image, mask, tmp_path):
    place(tmp_path, *(text.format(name, i) for name in ("sick", "well") for i in range(4) for text in (image, mask)))
    found = load("folder", tmp_path)
    assert found.classes == ["sick", "well"] and len(found) == 8
    assert found.masks[image.format("sick", 2)] == [mask.format("sick", 2)] and len(found.masks) == 8
    assert "--where" in noted(found, "8 images are masks")
    (tmp_path / mask.format("well", 3)).unlink()
    found = load("folder", tmp_path)
    assert len(found) == 8 and found.masks is None and noted(found, "7 images are masks", "not every image has one")


def test_classes_that_are_called_mask_stay_classes(tmp_path):
    place(tmp_path, *(f"{name}/{i}.png" for name in ("mask", "no_mask") for i in range(4)))
    assert load("folder", tmp_path).classes == ["mask", "no_mask"]


@pytest.mark.parametrize("flat", ["test/{}.jpg", "test1/{}.jpg", "test/test/{}.png", "Test_Images/{}.jpg", "val/{}.jpg",
                                  "unlabeled/x/{}.png"])
def test_a_part_that_lies_flat_and_unlabelled_is_left_out_with_a_line(flat, tmp_path):
    place_classes(tmp_path / "train")
    place(tmp_path, *(flat.format(i) for i in range(9)))
    found = load("folder", tmp_path)
    assert len(found) == 8 and found.parts is None
    assert noted(found, "9 images of an unlabelled part are left out", str(tmp_path / flat.format(0)))


@pytest.mark.parametrize("flat", ["train/{}.jpg", "more/{}.jpg", "protest/{}.jpg"])
def test_images_to_train_on_that_lie_flat_are_refused(flat, tmp_path):
    place_classes(tmp_path / "test")
    place(tmp_path, *(flat.format(i) for i in range(9)))
    with pytest.raises(UserError, match="9 of 17 images in .* are in none of the class folders .*test, the first"):
        load("folder", tmp_path)


def test_among_class_folders_test_is_a_part_without_classes_and_train_a_class_and_lines_say_so(tmp_path):
    place_classes(tmp_path, ["bus", "train", "ship", "Test"])
    found = load("folder", tmp_path)
    assert found.classes == ["bus", "ship", "train"] and noted(found, "folder train counts as a class")
    assert noted(found, "4 images of an unlabelled part are left out", f"{tmp_path}/Test/0.png")


# Nothing vanishes without a word.


def empty(root):
    (root / "C").mkdir()
    (root / "C" / ".gitkeep").write_text("")


def unreadable(root):
    place(root, "C/0.jpg")


@pytest.mark.parametrize("make, there", [
    (lambda root: place(root, "C/1.HEIC", "C/2.heic"), "2 .heic"), (empty, "empty"),
    (lambda root: place(root, "C/photo 1", "C/more/photo 2", "C/3.dng"), "2 without ending, 1 .dng"),
    (lambda root: (root / "C").symlink_to(root / "gone"), "a link to .*gone, which is not there"),
    (lambda root: (root / "C").symlink_to(root / "A"), "a link to .*A, which is read already"),
    (unreadable, "Permission denied"), (lambda root: place(root, "C/images/1.raw", "C/masks/1.png"), "1 .raw")])
def test_a_class_of_which_no_image_can_be_opened_is_refused_unless_it_is_left_out(make, there, tmp_path, monkeypatch,
                                                                                 capsys):
    place_classes(tmp_path)
    make(tmp_path)
    scandir = os.scandir

    def scan(path):
        if make is unreadable and str(path).endswith("/C"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    found = load("folder", tmp_path)
    with pytest.raises(UserError, match=rf"1 class folders in .* hold no image: C \({there}\).*--skip-bad.*--classes"):
        say_what_is_left_out({"classes": None, "skip_bad": False}, found)
    assert say_what_is_left_out({"classes": None, "skip_bad": True}, found).classes == ["A", "B"]
    assert "--skip-bad leaves out the classes C (" in capsys.readouterr().out
    assert say_what_is_left_out({"classes": "A,B", "skip_bad": False}, load("folder", tmp_path, "A,B"))
    with pytest.raises(UserError, match="folder of class C holds no image"):
        load("folder", tmp_path, "A,C")


def test_files_that_are_no_images_are_counted_by_their_ending_and_named(tmp_path):
    place_classes(tmp_path)
    place(tmp_path, "A/1.heic", "A/2.HEIC", "B/deep/IMG_3", "B/Thumbs.db", "B/.DS_Store", "notes/a.txt", "README.md")
    found = load("folder", tmp_path)
    assert not found.lost and found.classes == ["A", "B"] and len(found.notes) == 1
    note = noted(found, "4 files in class folders are left out", "(2 .heic, 1 .txt, 1 without ending)")
    assert note.endswith(f"the first {tmp_path}/A/1.heic")


def test_a_class_that_is_empty_in_one_part_alone_is_no_error(tmp_path):
    place_classes(tmp_path / "train")
    place_classes(tmp_path / "valid", "A")
    place(tmp_path / "valid", "C/1.heic")
    (tmp_path / "valid" / "B").mkdir()
    found = load("folder", tmp_path / "train")
    assert not found.lost and not found.notes
    place_classes(tmp_path / "valid", "D")
    found = load("folder", tmp_path)
    assert list(found.lost) == ["C"] and noted(found, f"1 folders are left out, the first {tmp_path}/valid/B")


def test_where_class_folders_are_missing_the_message_says_what_is_there(tmp_path):
    place(tmp_path / "photos", "cat/1.heic", "cat/2.heic", "dog/a.zip", "labels.csv")
    (tmp_path / "photos" / "owl").mkdir()
    with pytest.raises(UserError, match=r"no images in .*photos; there is cat \(2 .heic\), dog \(1 .zip\), owl "
                                        r"\(empty\), 1 .csv\."):
        load("folder", tmp_path / "photos")
    place(tmp_path / "photos", "cat/1.jpg", "2.jpg")
    with pytest.raises(UserError, match=r"2 images but not two class folders of them; there is cat \(2 .heic, 1 .jpg"):
        load("folder", tmp_path / "photos")
    with pytest.raises(UserError, match=r"no folder .*photo\. Did you mean 'photos'\? Put it there"):
        load("folder", tmp_path / "photo")
    with pytest.raises(UserError, match=r"a.zip is a file: unpack an archive"):
        load("folder", tmp_path / "photos" / "dog" / "a.zip")
    (tmp_path / "data").symlink_to("/gone")
    with pytest.raises(UserError, match="data is a link to /gone, which is not there"):
        load("folder", tmp_path / "data")


# Links.


def linked_files(pool, root):
    for path in sorted(pool.rglob("*.png")):
        link = root / path.relative_to(pool)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


def linked_blobs(pool, root):
    """As a snapshot of Hugging Face: relative links to files whose names have no ending."""
    linked_files(pool, root)
    for number, link in enumerate(sorted(root.rglob("*.png"))):
        blob = pool.parent / "blobs" / f"{number:064x}"
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(link, blob)
        link.unlink()
        link.symlink_to(os.path.relpath(blob, link.parent))


def linked_classes(pool, root):
    root.mkdir()
    for folder in sorted(pool.iterdir()):
        (root / folder.name).symlink_to(folder)


def a_linked_root(pool, root):
    (root.parent / "between").symlink_to(pool)
    root.symlink_to("between")


@pytest.mark.parametrize("link", [linked_files, linked_blobs, linked_classes, a_linked_root])
def test_a_dataset_of_links_is_the_dataset_itself_and_nothing_is_written_through_one(link, tmp_path):
    place_classes(tmp_path / "pool")
    link(tmp_path / "pool", tmp_path / "data")
    before = state_of(tmp_path)
    found, direct = load("folder", tmp_path / "data"), load("folder", tmp_path / "pool")
    assert found.ids == direct.ids and found.digests == direct.digests and not found.notes and not found.lost
    assert found.fingerprint == direct.fingerprint and state_of(tmp_path) == before


def test_links_that_loop_end_and_are_named(tmp_path):
    place_classes(tmp_path / "data")
    place(tmp_path / "other", "C/1.png")
    for number, target in enumerate([tmp_path / "data", tmp_path, "/", ".", "../A", "../B"]):
        (tmp_path / "data" / "A" / f"link {number}").symlink_to(target)
    (tmp_path / "data" / "B" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "data" / "B")
    found = load("folder", tmp_path / "data")
    assert found.classes == ["A", "B"] and len(found) == 9 and found.ids[-1] == "B/more/C/1.png"
    assert noted(found, "7 folders are left out")


def test_a_folder_counts_where_it_is_and_not_where_a_link_to_it_is(tmp_path):
    place_classes(tmp_path, "BZ")
    (tmp_path / "A").symlink_to("Z")
    tree = classes.walk(tmp_path)
    assert {inside for inside, _ in tree.images} == {("B",), ("Z",)} and "read already" in tree.folders["A",]
