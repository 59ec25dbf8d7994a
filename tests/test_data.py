"""data.py: what counts as an image, how datasets lie on the disk, and a split that does not leak."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import draw_classes, draw_letter, hash_folder
from PIL import Image

import data
import run
from data import UserError

CONFIGS = run.read_configs()
STRATIFIED, BLOCKS = {"rule": "stratified", "val": 0.1, "test": 0.2}, {"rule": "blocks", "blocks": 20, "val": 0.1,
                                                                      "test": 0.2}


def load(name, root, **changes):
    return data.load_dataset(name, {**CONFIGS["datasets"][name], **changes}, root)


def parts_of(dataset, split):
    number = {image_id: i for i, image_id in enumerate(dataset.ids)}
    return {part: [number[i] for i in split[part]] for part in data.PARTS}


# --- images


def grey_ramp(dtype, top):
    return (np.linspace(0, 1, 64).reshape(1, 64).repeat(64, 0) * top).astype(dtype)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "PA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_kind_of_image_becomes_the_same_rgb_picture(mode, tmp_path):
    ramp = Image.fromarray(grey_ramp(np.uint8, 255))
    file = tmp_path / ("ramp.tif" if mode in ("CMYK", "YCbCr", "F", "I", "PA", "LA") else "ramp.png")
    if mode in ("I;16", "I", "F"):
        Image.fromarray(grey_ramp({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode],
                                  {"I;16": 65535, "I": 65535, "F": 1}[mode])).save(file)
    elif mode in ("PA", "HSV"):
        file = None
    else:
        ramp.convert("RGB").convert(mode).save(file)
    image = Image.open(file) if file else ramp.convert("RGB").convert(mode if mode == "HSV" else "P")
    pixels = data.to_rgb(image, 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    expected = np.asarray(ramp.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(pixels.mean((0, 2)) - expected.mean((0, 2))).max() < (60 if mode == "1" else 12)


def test_transparent_pixels_become_grey_so_that_neither_black_nor_white_drawings_vanish():
    for ink in (0, 255):
        image = Image.new("RGBA", (8, 8), (ink, ink, ink, 0))
        image.paste((ink, ink, ink, 255), (0, 0, 4, 8))
        pixels = data.to_rgb(image, 8)
        assert (pixels[:, :4] == ink).all() and (pixels[:, 4:] == 128).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.info["transparency"] = 0
    palette.paste(1, (0, 0, 4, 8))
    assert data.to_rgb(palette, 8)[0, 0].tolist() == [0, 255, 0] and data.to_rgb(palette, 8)[0, 7].tolist() == [128] * 3


def test_an_exif_rotated_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = image.getexif()
    exif[0x0112] = 6  # rotate a quarter turn clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = data.to_rgb(Image.open(tmp_path / "turned.jpg"), 16)
    assert pixels[:6].mean() > 250 and pixels[10:].mean() < 5


def test_a_broken_image_is_an_error_that_names_it(tmp_path):
    draw_classes(tmp_path, frames=4)
    (tmp_path / "B" / "B2.jpg").write_bytes((tmp_path / "B" / "B2.jpg").read_bytes()[:200])
    for workers in (0, 1):
        batches = data.Batches(found := load("folder", tmp_path), found.ids, 32, 4, torch.device("cpu"), workers)
        with pytest.raises(UserError, match=r"^\S*/B/B2.jpg: cannot be read as an image \(.*\)$"):
            list(batches)


# --- layouts


def test_weights_draw_images_more_often_in_an_epoch_of_the_same_length():
    weights = np.where(np.arange(100) < 10, 20, 1)
    order, seen = data.Order(100, 20, seed=3, weights=weights), np.zeros(100)
    for order.epoch in range(400):
        assert order.rows().shape == (5, 20)
        seen += np.bincount(order.rows().ravel(), minlength=100)
    assert seen[:10].mean() / seen[10:].mean() == pytest.approx(20, rel=0.05)  # 100 of 290 are drawn, none of them twice
    assert np.array_equal(order.rows(), order.rows())
    plain = data.Order(100, 20, seed=3).rows()
    assert np.array_equal(data.Order(100, 20, seed=3, weights=np.ones(100, dtype=int)).rows(), plain)


def test_the_digits_are_scikit_learns():
    found = load("digits", None)
    assert len(found) == 1797 and found.images.shape == (1797, 8, 8, 3) and found.images.max() == 255
    assert np.bincount(found.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("above", ["", "asl", "a/b/c", "asl_alphabet_train/asl_alphabet_train"])
def test_class_folders_are_found_at_any_depth(above, tmp_path):
    draw_classes(tmp_path / above, frames=3)
    (tmp_path / "__MACOSX" / "x").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "x" / "._A1.jpg").write_bytes(b"\0")
    (tmp_path / above / "A" / ".DS_Store").write_bytes(b"\0")
    found = load("asl", tmp_path)
    assert found.classes == ["A", "B", "C"] and len(found) == 9
    assert found.ids[0] == f"{above}/A/A1.jpg".lstrip("/")


def test_asls_own_test_folder_holds_no_classes(asl):
    assert load("asl", asl).classes == ["A", "B", "C"] and len(load("asl", asl)) == 30


def test_train_val_and_test_folders_are_kept_as_they_are(tmp_path):
    for part, frames in (("train", 6), ("valid", 2), ("test", 3)):
        draw_classes(tmp_path / "set" / part, frames=frames)
        for i, path in enumerate(sorted((tmp_path / "set" / part).rglob("*.jpg"))):
            draw_letter(path.parent.name, 100 * frames + i).save(path)
    found = load("folder", tmp_path)
    split = data.make_split(found, STRATIFIED, seed=0)
    assert {part: len(ids) for part, ids in split.items()} == {"train": 18, "val": 6, "test": 9}
    assert all(i.startswith("set/valid/") for i in split["val"])
    shutil.rmtree(tmp_path / "set" / "test")
    split = data.make_split(load("folder", tmp_path), STRATIFIED, seed=0)
    assert all(i.startswith("set/valid/") for i in split["test"]) and len(split["test"]) == 6
    assert all(i.startswith("set/train/") for i in split["val"] + split["train"]) and len(split["val"]) == 3


def test_a_csv_names_paths_and_labels(tmp_path):
    draw_classes(tmp_path / "pictures", classes="AB", frames=5)
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "kind"])
        rows.writerows([f"pictures/{c}/{c}{i}.jpg", f"letter, {c}"] for c in "AB" for i in range(1, 6))
    entry = {"layout": "csv", "csv": {"file": "labels.csv", "path": "file", "label": "kind"}}
    found = load("folder", tmp_path, **entry)
    assert found.classes == ["letter, A", "letter, B"] and len(found) == 10
    with pytest.raises(UserError, match="labels.csv: no column 'label'; it has file, kind"):
        load("folder", tmp_path, **{**entry, "csv": {**entry["csv"], "label": "label"}})
    for name in "BA":
        (tmp_path / "pictures" / name).rename(tmp_path / "pictures" / f"no {name}")
        if name == "B":
            assert len(load("folder", tmp_path, **entry)) == 10  # the bad ones are found when images are looked at
    with pytest.raises(UserError, match="names 10 images that are not there, the first .*A/A1.jpg"):
        load("folder", tmp_path, **entry)
    with open(tmp_path / "labels.csv", "a") as file:
        file.write("../../etc/passwd,letter\n")
    with pytest.raises(UserError, match="line 12: ../../etc/passwd leads out of"):
        load("folder", tmp_path, **entry)


def test_torchvisions_pets_are_read_from_the_disk(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    for part, first in (("trainval", 1), ("test", 21)):
        lines = []
        for label, breed in enumerate(("Abyssinian", "beagle"), start=1):
            for i in range(first, first + 6):
                draw_letter(breed, i).save(base / "images" / f"{breed}_{i}.jpg")
                lines.append(f"{breed}_{i} {label} 1 1")
        (base / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    found = load("pets", tmp_path)
    assert found.classes == ["Abyssinian", "Beagle"]
    split = data.make_split(found, STRATIFIED, seed=0)
    assert {part: len(ids) for part, ids in split.items()} == {"train": 10, "val": 2, "test": 12}
    assert split["test"][0] == "oxford-iiit-pet/images/Abyssinian_21.jpg"


def test_torchvisions_cifar_and_caltech_are_read_from_the_disk(tmp_path, monkeypatch):
    import pickle

    from torchvision import datasets

    base = tmp_path / "cifar-100-python"
    base.mkdir()
    for part, count in (("train", 300), ("test", 100)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
        (base / part).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [i % 100 for i in range(count)]}))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class{i:02d}" for i in range(100)]}))
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)  # these are not the real files
    monkeypatch.setitem(datasets.CIFAR100.meta, "md5", None)
    found = load("cifar100", tmp_path)
    assert found.images.shape == (400, 32, 32, 3) and len(found.classes) == 100

    for category in ("BACKGROUND_Google", "ant", "crab"):
        folder = tmp_path / "caltech101" / "101_ObjectCategories" / category
        folder.mkdir(parents=True)
        for i in range(1, 6):
            draw_letter(category, i).save(folder / f"image_{i:04d}.jpg")
    (tmp_path / "caltech101" / "Annotations").mkdir()
    found = load("caltech101", tmp_path)
    assert found.classes == ["ant", "crab"] and len(found) == 10
    batch, labels = next(iter(data.Batches(found, found.ids, 32, 4, torch.device("cpu"))))
    assert batch.shape == (4, 3, 32, 32) and labels.tolist() == [0] * 4


def test_what_is_missing_is_said_with_where_to_get_it(tmp_path):
    where = re.escape(str(tmp_path / "gone"))
    for name in ("asl", "pets", "folder"):
        with pytest.raises(UserError, match=f"^dataset {name}: no folder {where}.*--data-dir DIR.$"):
            load(name, tmp_path / "gone")
    with pytest.raises(UserError, match="no images in .*https://www.kaggle.com/datasets/grassknoted/asl-alphabet"):
        load("asl", tmp_path)
    with pytest.raises(UserError, match="torchvision's OxfordIIITPet in .*: Dataset not found. Get it: python -c .*download=True"):
        load("pets", tmp_path)
    draw_classes(tmp_path, classes="A")
    with pytest.raises(UserError, match="holds 10 images but not two class folders of them"):
        load("folder", tmp_path)


# --- the split


def test_the_split_is_stratified_and_the_same_every_time():
    found = load("digits", None)
    split = data.make_split(found, STRATIFIED, seed=3)
    assert split == data.make_split(found, STRATIFIED, seed=3)
    assert split != data.make_split(found, STRATIFIED, seed=4)
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
            parts = parts_of(found, data.make_split(found, rule, seed))
            contents = {part: {found.digests[i] for i in parts[part]} for part in parts}
            assert not (contents["train"] & contents["val"] | contents["train"] & contents["test"]
                        | contents["val"] & contents["test"])


def test_a_held_out_copy_is_taken_out_of_an_official_training_part(tmp_path):
    draw_classes(tmp_path / "train", frames=8)
    (tmp_path / "test").mkdir()
    for letter in "ABC":
        (tmp_path / "test" / letter).mkdir()
        shutil.copy(tmp_path / "train" / letter / f"{letter}3.jpg", tmp_path / "test" / letter / "x.jpg")
    split = data.make_split(load("folder", tmp_path), STRATIFIED, seed=0)
    assert len(split["test"]) == 3 and not any(i.endswith("3.jpg") for i in split["train"] + split["val"])


def test_asls_split_takes_blocks_of_consecutive_frames(tmp_path):
    for letter in "AB":
        (tmp_path / letter).mkdir()
        for frame in range(1, 201):
            (tmp_path / letter / f"{letter}{frame}.jpg").write_bytes(f"{letter}{frame}".encode())
    found = load("asl", tmp_path)
    split = data.make_split(found, BLOCKS, seed=0)
    assert {part: len(ids) for part, ids in split.items()} == {"train": 280, "val": 40, "test": 80}
    part_of = {image_id: part for part, ids in split.items() for image_id in ids}
    for letter in "AB":
        sequence = [part_of[f"{letter}/{letter}{frame}.jpg"] for frame in range(1, 201)]
        blocks = [sequence[i:i + 10] for i in range(0, 200, 10)]
        assert all(len(set(block)) == 1 for block in blocks)


def test_a_fraction_of_the_training_part_leaves_the_rest_alone():
    found = load("digits", None)
    whole, tenth, fifth = (data.make_split(found, STRATIFIED, 0, f) for f in (1.0, 0.1, 0.2))
    assert tenth["val"] == whole["val"] and tenth["test"] == whole["test"]
    assert set(tenth["train"]) < set(fifth["train"]) < set(whole["train"])
    counts = np.bincount(found.labels[parts_of(found, tenth)["train"]])
    assert np.abs(counts - np.bincount(found.labels[parts_of(found, whole)["train"]]) / 10).max() <= 0.5


def test_too_few_images_for_a_split_is_an_error_that_names_the_class(tmp_path):
    draw_classes(tmp_path, frames=5)
    for i in range(2, 5):
        shutil.copy(tmp_path / "B" / "B1.jpg", tmp_path / "B" / f"B{i}.jpg")
    with pytest.raises(UserError, match="class 'B' has 2 different images; the split needs at least 3"):
        data.make_split(load("folder", tmp_path), STRATIFIED, seed=0)


# --- batches


def test_an_epoch_sees_every_image_in_batches_of_one_size():
    found = load("digits", None)
    batches = data.Batches(found, found.ids[:100], 8, 32, torch.device("cpu"), seed=0)
    orders = []
    for epoch in (0, 1, 0):
        batches.order.epoch = epoch
        seen = [labels.tolist() for _, labels in batches]
        assert [len(s) for s in seen] == [32] * 4
        orders.append([list(b) for b in batches.order])
        assert set(sum(orders[-1], [])) == set(range(100))
    assert orders[0] == orders[2] != orders[1]


def test_batches_from_files_and_from_memory_are_alike(tmp_path):
    found = load("digits", None)
    for i in range(24):
        folder = tmp_path / str(found.labels[i])
        folder.mkdir(exist_ok=True)
        Image.fromarray(found.images[i]).save(folder / f"{i:04d}.png")
    files = load("folder", tmp_path)
    order = sorted(range(24), key=lambda i: (found.labels[i], i))
    from_files = list(data.Batches(files, files.ids, 16, 10, torch.device("cpu"), workers=1))
    in_memory = list(data.Batches(found, [found.ids[i] for i in order], 16, 10, torch.device("cpu")))
    assert [len(labels) for _, labels in from_files] == [10, 10, 4]
    for (a, b), (c, d) in zip(from_files, in_memory):
        assert torch.equal(a, c) and torch.equal(b, d)


# --- augmentation

MEAN, STD = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)


def augmented(pixels, key=(0, 1, 2), entry=None, **settings):
    config = {"augment": "none", "random_erasing": 0, "hide_and_seek": 0, "mixup": 0, "cutmix": 0, **settings}
    config["dataset_entry"] = {"augment": entry or {"flip": False, "rotate": 10, "shift": 0.1}}
    return data.augment(pixels, MEAN, STD, config, key)


def alike(count=16, size=16):
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels.repeat(count, 1, 1, 1)


@pytest.mark.parametrize("settings", [{"augment": "light"}, {"augment": "randaugment"}, {"augment": "trivialaugment"},
                                      {"random_erasing": 0.9}, {"hide_and_seek": 0.5}])
def test_augmentation_follows_from_its_key_and_differs_by_image(settings):
    one, again, other = (augmented(alike(), key, **settings) for key in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len({tuple(image.flatten().tolist()) for image in one}) > 8
    assert one.is_contiguous(memory_format=torch.channels_last) and one.dtype == torch.float32
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    augmented(alike(), **settings)
    assert torch.equal(torch.rand(1), expected)  # dropout's draws are left alone


@pytest.mark.parametrize("settings", [{"augment": "light"}, {"augment": "trivialaugment"}, {"random_erasing": 0.9}, {"hide_and_seek": 0.5}])
def test_an_image_is_augmented_alike_whether_its_batch_is_shared_or_not(settings):
    config = {"augment": "none", "random_erasing": 0, "hide_and_seek": 0, **settings}
    config["dataset_entry"] = {"augment": {"flip": True, "rotate": 10, "shift": 0.1}}
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    whole = data.augment(pixels, MEAN, STD, config, (0, 1, 2))
    shares = [data.augment(pixels[i:i + 4], MEAN, STD, config, (0, 1, 2), (i, 8)) for i in (0, 4)]
    assert torch.allclose(torch.cat(shares), whole, atol=1e-5)


def test_without_augmentation_images_are_only_normalised():
    assert torch.equal(augmented(alike()), data.prepare(alike(), MEAN, STD))
    torch.testing.assert_close(data.prepare(alike(), MEAN, STD), (alike() / 255 - 0.5) / 0.25)
    assert torch.equal(data.pixels_of(data.prepare(alike(), MEAN, STD), MEAN, STD), alike())


def test_light_augmentation_moves_no_further_than_the_dataset_allows():
    pixels = alike()
    still = augmented(pixels, augment="light", entry={"flip": False, "rotate": 0, "shift": 0})
    torch.testing.assert_close(still, (pixels / 255 - 0.5) / 0.25, atol=1e-4, rtol=0)
    flipped = augmented(pixels, augment="light", entry={"flip": True, "rotate": 0, "shift": 0})
    turned = [not torch.allclose(f, s, atol=1e-3) for f, s in zip(flipped, still)]
    assert any(turned) and all(torch.allclose(f, s.flip(-1) if t else s, atol=1e-4)
                               for f, s, t in zip(flipped, still, turned))


@pytest.mark.parametrize("name, policy", [("randaugment", "RandAugment"), ("trivialaugment", "TrivialAugmentWide")])
def test_the_policies_are_torchvisions_on_each_image_alone(name, policy):
    from torchvision.transforms import v2

    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    transform, expected = getattr(v2, policy)(fill=128), []
    with torch.random.fork_rng():
        for number, image in enumerate(pixels):
            torch.manual_seed(data.stable_seed("augment", 0, 1, 2, number))
            expected.append(transform(image))
    assert torch.equal(augmented(pixels, augment=name), data.prepare(torch.stack(expected), MEAN, STD))


def test_random_erasing_puts_noise_into_a_rectangle_of_that_share_of_images():
    pixels = torch.full((400, 3, 32, 32), 128, dtype=torch.uint8)
    changed = (augmented(pixels, random_erasing=0.3) != data.prepare(pixels, MEAN, STD)).any(1)
    share = changed.any(2).any(1).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.07)
    for mask in changed[changed.any(2).any(1)]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns


def test_hide_and_seek_hides_cells_of_a_grid_behind_the_mean():
    images = augmented(torch.full((400, 3, 32, 32), 200, dtype=torch.uint8), hide_and_seek=0.4)
    cells = images.unfold(2, 8, 8).unfold(3, 8, 8)  # 4 x 4 cells of 8 x 8 pixels
    assert torch.equal(cells.amin((4, 5)), cells.amax((4, 5)))  # a cell is hidden or shown as a whole
    assert (cells == 0).float().mean().item() == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_labels_say_how_much_of_each_image_there_is(name):
    labels = torch.arange(16) % 5
    pure = labels.float().view(-1, 1, 1, 1).expand(16, 3, 32, 32).contiguous()  # an image shows its class
    config = {"mixup": 0, "cutmix": 0, name: 1.0}
    images, shares = data.mix(pure, labels, 5, config, (0, 1, 2))
    assert shares.shape == (16, 5) and shares.sum(1).allclose(torch.ones(16)) and (shares > 0).sum() > 16
    assert torch.allclose(images.mean((1, 2, 3)), shares @ torch.arange(5.0), atol=1e-3)
    assert torch.equal(data.mix(pure, labels, 5, config, (0, 1, 2))[0], images)
    assert not torch.equal(data.mix(pure, labels, 5, config, (0, 1, 3))[0], images)


def test_mixup_and_cutmix_together_take_turns_and_neither_leaves_all_as_it_is():
    labels, pure = torch.arange(8), torch.arange(8.0).view(-1, 1, 1, 1).expand(8, 3, 32, 32).contiguous()
    kinds = set()
    for step in range(30):
        images, _ = data.mix(pure, labels, 8, {"mixup": 1.0, "cutmix": 1.0}, (0, 0, step))
        kinds.add(bool((images.flatten(1).amax(1) - images.flatten(1).amin(1)).max() > 1e-6))
    assert kinds == {True, False}  # cutmix leaves two values in an image, mixup one
    images, same = data.mix(pure, labels, 8, {"mixup": 0, "cutmix": 0}, (0, 0, 0))
    assert images is pure and same is labels


# --- parts of datasets, new splits, erased copies


def test_classes_keeps_only_those_in_the_datasets_order(asl):
    found = data.load_dataset("asl", CONFIGS["datasets"]["asl"], asl, "C, A")
    assert found.classes == ["A", "C"] and len(found) == 20 and set(found.labels[:10]) == {0} and set(found.labels[10:]) == {1}
    assert all("/A/" in i for i in found.ids[:10]) and len(found.digests) == 20
    with pytest.raises(UserError, match="no class 'c'. Did you mean 'C'|no class 'c'; it has A, B, C"):
        data.load_dataset("asl", CONFIGS["datasets"]["asl"], asl, "A,c")
    with pytest.raises(UserError, match="at least two classes"):
        data.load_dataset("asl", CONFIGS["datasets"]["asl"], asl, "A")


def test_classes_with_a_comma_are_named_in_quotes(tmp_path):
    draw_classes(tmp_path, ["Pug, old", "Boxer", "Spitz"], 3)
    found = data.load_dataset("folder", CONFIGS["datasets"]["folder"], tmp_path, '"Pug, old",Boxer')
    assert found.classes == ["Boxer", "Pug, old"]


def test_digits_that_are_parts_are_the_same_images():
    whole, part = load("digits", None), data.load_dataset("digits", CONFIGS["datasets"]["digits"], None, "3,8")
    assert all(np.array_equal(part.images[i], whole.images[int(part.ids[i])]) for i in range(len(part)))


def test_noisy_digits_are_few_faint_and_always_the_same():
    found, again = load("noisy_digits", None), load("noisy_digits", None)
    assert len(found) == 400 and np.array_equal(found.images, again.images)
    clean = load("digits", None).images[:400] / 255
    noise = found.images / 255 - (0.5 + 0.25 * (clean - 0.5))
    assert noise.std() == pytest.approx(0.25, abs=0.02) and abs(noise.mean()) < 0.01


def test_a_new_split_deals_out_training_and_validation_anew_and_leaves_test_alone():
    found = load("digits", None)
    split = data.make_split(found, STRATIFIED, 0)
    one, two = (data.redraw(found, split, 0, number) for number in (1, 2))
    for new in (one, two):
        assert new["test"] == split["test"] and set(new["train"]) | set(new["val"]) == set(split["train"]) | set(split["val"])
        for part in ("train", "val"):
            number = dict(zip(found.ids, found.labels.tolist()))
            sizes = [sorted(number[i] for i in ids[part]) for ids in (new, split)]
            assert sizes[0] == sizes[1]  # class by class
    leaked = len(set(one["val"]) & set(split["train"])) / len(one["val"])
    assert leaked > 0.8 and one["val"] != two["val"]
    assert data.redraw(found, two, 0, 1) == one  # whichever draw it is asked from


def test_what_an_earlier_run_was_trained_on_is_never_tested_on():
    whole = load("digits", None)
    part = data.load_dataset("digits", CONFIGS["datasets"]["digits"], None, "0,1,2")
    first = data.make_split(part, STRATIFIED, 5, 0.3)
    known = {image_id: name for name in data.PARTS for image_id in first[name]}
    split = data.make_split(whole, STRATIFIED, 6, 1.0, known)
    assert set(first["val"]) <= set(split["val"]) and set(first["test"]) <= set(split["test"])
    assert not set(first["train"]) & (set(split["val"]) | set(split["test"]))
    old = {i for i, label in zip(whole.ids, whole.labels) if label < 3}
    assert set(split["val"]) & old == set(first["val"])  # what was left out of its training part is trained on
    assert {i for i in split["test"]} - old and sum(map(len, split.values())) == len(whole)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_a_run_that_goes_on_with_the_same_fraction_trains_on_the_same_images(fraction):
    whole = load("digits", None)
    first = data.make_split(whole, STRATIFIED, 5, fraction)
    known = {image_id: part for part in data.PARTS for image_id in first[part]}
    assert data.make_split(whole, STRATIFIED, 5, fraction, known) == first
    more = data.make_split(whole, STRATIFIED, 5, 2 * fraction, known)
    assert set(first["train"]) < set(more["train"]) and (more["val"], more["test"]) == (first["val"], first["test"])


def test_erased_copies_replace_their_originals_or_come_on_top(tmp_path):
    found = load("digits", None)
    for i in (1, 2):
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    train, files = found.ids[:4], [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    for budget, expected in (("equal", [0, None, None, 3]), ("extra", [0, 1, 2, 3, None, None])):
        joined, ids, copies = data.with_erased(found, train, found.ids[1:3], files, budget)
        pixels, labels = next(iter(data.Batches(joined, ids, 8, 10, torch.device("cpu"))))
        originals = next(iter(data.Batches(found, found.ids[:4], 8, 10, torch.device("cpu"))))
        assert len(copies) == 2 and [i in copies for i in ids] == [e is None for e in expected]
        grey = iter((10, 20))
        for position, index in enumerate(expected):
            assert pixels[position].eq(next(grey)).all() if index is None else torch.equal(pixels[position], originals[0][index])
        of_copies = [int(label) for label, index in zip(labels, expected) if index is None]
        assert of_copies == found.labels[1:3].tolist()


def test_reading_a_dataset_leaves_it_byte_for_byte_as_it_was(asl):
    before = hash_folder(asl)
    found = load("asl", asl)
    list(data.Batches(found, found.ids, 32, 8, torch.device("cpu"), workers=1))
    assert hash_folder(asl) == before


# --- groups and decoys


def test_a_csv_without_a_header_in_columns_of_spaces_with_classes_parts_and_groups(tmp_path):
    draw_classes(tmp_path / "images", classes="AB", frames=6)
    lines = [f"images/{c}/{c}{i}.jpg  {'0.0' if c == 'A' else '1.0'}   {i % 3}    {'mono' if i < 3 else 'poly'}" for c in "AB" for i in range(1, 7)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    spec = {"file": "labels.csv", "columns": ["path", "p", "part", "type"], "delimiter": " ", "path": "path", "label": "p", "split": "part",
            "group": "type", "classes": {"0.0": "fine", "1.0": "broken"}, "parts": {"0": "train", "1": "val", "2": "test"}}
    found = load("folder", tmp_path, layout="csv", csv=spec)
    assert found.classes == ["broken", "fine"] and found.groups.count("mono") == 4 and found.parts.count("val") == 4
    assert found.ids[0] == "images/A/A1.jpg" and found.classes[found.labels[0]] == "fine" and found.groups[0] == "mono"
    part = found.without(found.ids[:1])
    assert part.groups == found.groups[1:]
    with pytest.raises(UserError, match=r"line 1: label '0.0'; configs.json, .* has 1.0"):
        load("folder", tmp_path, layout="csv", csv=spec | {"classes": {"1.0": "broken"}})
    (tmp_path / "labels.csv").write_text("\n".join([*lines, lines[0].replace("0.0", "1.0")]))
    with pytest.raises(UserError, match="A1.jpg is named twice"):
        load("folder", tmp_path, layout="csv", csv=spec)


def test_a_package_that_is_missing_is_said_with_the_command_that_installs_it(monkeypatch):
    configs = run.read_configs()
    configs["datasets"]["elpv"]["package"]["module"] = "no_such_package"
    with pytest.raises(UserError, match="dataset elpv: its package is not installed. Run python -m pip install elpv-dataset"):
        run.resolve(configs, {"dataset": "elpv"})


def test_the_solar_cells_are_those_of_the_package():
    pytest.importorskip("elpv_dataset", reason="pip install elpv-dataset")
    config = run.resolve(run.read_configs(), {"dataset": "elpv"})
    found = data.load_dataset("elpv", config["dataset_entry"], config["data_dir"])
    assert np.bincount(found.labels).tolist() == [821, 1803] and found.classes == ["defective", "functional"]
    assert found.open(0).size == (300, 300) and sorted(set(found.groups)) == ["mono", "poly"]


def test_a_decoy_tells_the_class_in_training_and_validation_and_another_in_the_test():
    found = load("digits", None)
    found.pixels = data.Pixels(np.stack([data.to_rgb(found.open(i), 32) for i in range(len(found))]))
    split = data.make_split(found, STRATIFIED, seed=0)
    decoy = found.decoy = data.draw_decoy(found, split, seed=0)
    number = {image_id: i for i, image_id in enumerate(found.ids)}
    colour_of = {tuple(decoy.colours[number[i]]): int(found.labels[number[i]]) for i in split["train"]}
    assert len(colour_of) == 10
    for part, truth in (("train", True), ("val", True), ("test", False)):
        assert all((colour_of[tuple(decoy.colours[number[i]])] == found.labels[number[i]]) == truth for i in split[part])
    assert min(np.bincount(decoy.corners)) > 380
    images, _ = next(iter(data.Batches(found, split["test"], 32, 64, torch.device("cpu"))))
    plain, _ = next(iter(data.Batches(found, split["test"], 32, 64, torch.device("cpu"), decoy=False)))
    rows = [number[i] for i in split["test"][:64]]
    mask = decoy.mask(rows, 32)
    assert (mask.sum((1, 2)) == 16).all() and ((images != plain).any(1) <= mask).all()
    for image, inside, row in zip(images, mask, rows):
        assert (image[:, inside].T.numpy() == decoy.colours[row]).all()
        corner = [inside[:4, :4], inside[:4, -4:], inside[-4:, -4:], inside[-4:, :4]][decoy.corners[row]]
        assert corner.all()
    shuffled = data.Batches(found, split["train"], 32, 64, torch.device("cpu"), seed=3)
    for (images, labels), positions in zip(shuffled, shuffled.order):
        rows = shuffled.indices[positions]
        assert all((image[:, inside].T.numpy() == decoy.colours[row]).all() for image, inside, row in zip(images, decoy.mask(rows, 32), rows))
