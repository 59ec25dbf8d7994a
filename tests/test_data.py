"""data.py: how datasets lie on the disk, and what is done to training images."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_classes, draw_letter
from torchvision.transforms import v2

import data
from engine import settings
from engine.chance import stable_seed
from engine.files import UserError
from engine.loader import Batches, normalise, prepare
from engine.split import make_split

CONFIGS = settings.read_configs()
STRATIFIED = {"rule": "stratified", "val": 0.1, "test": 0.2}
KEY = (0, 1, 2)


def load(name, root, classes=None, **changes):
    """A dataset of configs.json, whose entry is changed in what is given, in the folder `root`."""
    return data.load_dataset({"dataset": name, "dataset_entry": CONFIGS["datasets"][name] | changes, "data_dir": root,
                              "classes": classes, "cache": "off"})


# --- layouts


def test_the_digits_are_scikit_learns():
    found = load("digits", None)
    assert len(found) == 1797 and found.images.shape == (1797, 8, 8, 3) and found.images.max() == 255
    assert np.bincount(found.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_noisy_digits_are_few_faint_and_always_the_same():
    found, again = load("noisy_digits", None), load("noisy_digits", None)
    assert len(found) == 400 and np.array_equal(found.images, again.images)
    clean = load("digits", None).images[:400] / 255
    noise = found.images / 255 - (0.5 + 0.25 * (clean - 0.5))
    assert noise.std() == pytest.approx(0.25, abs=0.02) and abs(noise.mean()) < 0.01


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
    split = make_split(load("folder", tmp_path), STRATIFIED, seed=0)
    assert {part: len(ids) for part, ids in split.items()} == {"train": 18, "val": 6, "test": 9}
    assert all(i.startswith("set/valid/") for i in split["val"])
    shutil.rmtree(tmp_path / "set" / "test")
    split = make_split(load("folder", tmp_path), STRATIFIED, seed=0)
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
            assert len(load("folder", tmp_path, **entry)) == 10  # those that cannot be read are found as they are read
    with pytest.raises(UserError, match="names 10 images that are not there, the first .*A/A1.jpg"):
        load("folder", tmp_path, **entry)
    with open(tmp_path / "labels.csv", "a") as file:
        file.write("../../etc/passwd,letter\n")
    with pytest.raises(UserError, match="line 12: ../../etc/passwd leads out of"):
        load("folder", tmp_path, **entry)


def test_a_csv_without_a_header_in_columns_of_spaces_with_classes_parts_and_groups(tmp_path):
    draw_classes(tmp_path / "images", classes="AB", frames=6)
    lines = [f"images/{c}/{c}{i}.jpg  {'0.0' if c == 'A' else '1.0'}   {i % 3}    {'mono' if i < 3 else 'poly'}"
             for c in "AB" for i in range(1, 7)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    spec = {"file": "labels.csv", "columns": ["path", "p", "part", "type"], "delimiter": " ", "path": "path",
            "label": "p", "split": "part", "group": "type", "classes": {"0.0": "fine", "1.0": "broken"},
            "parts": {"0": "train", "1": "val", "2": "test"}}
    found = load("folder", tmp_path, layout="csv", csv=spec)
    assert found.classes == ["broken", "fine"] and found.groups.count("mono") == 4 and found.parts.count("val") == 4
    assert found.ids[0] == "images/A/A1.jpg" and found.classes[found.labels[0]] == "fine" and found.groups[0] == "mono"
    part = found.without(found.ids[:1])
    assert part.groups == found.groups[1:]
    with pytest.raises(UserError, match=r"line 1: label '0.0'; the csv.classes of configs.json has 1.0"):
        load("folder", tmp_path, layout="csv", csv=spec | {"classes": {"1.0": "broken"}})
    (tmp_path / "labels.csv").write_text("\n".join([*lines, lines[0].replace("0.0", "1.0")]))
    with pytest.raises(UserError, match="A1.jpg is named twice"):
        load("folder", tmp_path, layout="csv", csv=spec)


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
    split = make_split(found, STRATIFIED, seed=0)
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
    batch, labels = next(iter(Batches(found, found.ids, 32, 4, torch.device("cpu"))))
    assert batch.shape == (4, 3, 32, 32) and labels.tolist() == [0] * 4


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path):
    where = re.escape(str(tmp_path / "gone"))
    for name in ("asl", "pets", "folder"):
        with pytest.raises(UserError, match=f"^dataset {name}: no folder {where}.*--data-dir DIR.$"):
            load(name, tmp_path / "gone")
    with pytest.raises(UserError, match="no images in .*https://www.kaggle.com/datasets/grassknoted/asl-alphabet"):
        load("asl", tmp_path)
    with pytest.raises(UserError, match="torchvision's OxfordIIITPet in .*: Dataset not found. "
                                        "Get it: python -c .*download=True"):
        load("pets", tmp_path)
    draw_classes(tmp_path, classes="A")
    with pytest.raises(UserError, match="holds 10 images but not two class folders of them"):
        load("folder", tmp_path)


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it():
    configs = settings.read_configs()
    configs["datasets"]["elpv"]["package"]["module"] = "no_such_package"
    with pytest.raises(UserError, match="dataset elpv: its package is not installed. "
                                        "Run python -m pip install elpv-dataset"):
        settings.resolve(configs, {"dataset": "elpv"})


def test_the_solar_cells_are_those_of_the_package():
    pytest.importorskip("elpv_dataset", reason="pip install elpv-dataset")
    found = data.load_dataset(settings.resolve(CONFIGS, {"dataset": "elpv", "cache": "off"}))
    assert np.bincount(found.labels).tolist() == [821, 1803] and found.classes == ["defective", "functional"]
    assert found.open(0).size == (300, 300) and sorted(set(found.groups)) == ["mono", "poly"]


# --- some classes of a dataset


def test_classes_keeps_only_those_in_the_datasets_order(asl):
    found = load("asl", asl, "C, A")
    assert found.classes == ["A", "C"] and len(found) == 20 and len(found.digests) == 20
    assert set(found.labels[:10]) == {0} and set(found.labels[10:]) == {1}
    assert all("/A/" in i for i in found.ids[:10])
    with pytest.raises(UserError, match="no class 'c'. Did you mean 'C'|no class 'c'; it has A, B, C"):
        load("asl", asl, "A,c")
    with pytest.raises(UserError, match="at least two classes"):
        load("asl", asl, "A")


def test_classes_with_a_comma_are_named_in_quotes(tmp_path):
    draw_classes(tmp_path, ["Pug, old", "Boxer", "Spitz"], 3)
    assert load("folder", tmp_path, '"Pug, old",Boxer').classes == ["Boxer", "Pug, old"]
    assert load("folder", tmp_path, 'except:"Pug, old"').classes == ["Boxer", "Spitz"]


def test_classes_can_leave_some_out(tmp_path):
    draw_classes(tmp_path, ["A", "B", "C", "except:A"], 3)
    assert load("folder", tmp_path, "except:C, B").classes == ["A", "except:A"]
    assert load("folder", tmp_path, "except:A,B").classes == ["B", "except:A"]  # a class that is called so
    with pytest.raises(UserError, match="no class 'D'"):
        load("folder", tmp_path, "except:D")
    with pytest.raises(UserError, match="at least two classes, found C"):
        load("folder", tmp_path, "except:B,A,except:A")


def test_a_folder_that_is_not_there_comes_with_the_nearest_and_a_file_with_what_it_may_be(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos.zip").touch()
    with pytest.raises(UserError, match=r"no folder .*/foto\. Did you mean 'photos'\? Put it there.*--data-dir DIR\.$"):
        load("folder", tmp_path / "foto")
    with pytest.raises(UserError, match="photos.zip is a file: unpack an archive, and give a CSV of labels to --csv"):
        load("folder", tmp_path / "photos.zip")


def test_digits_that_are_parts_are_the_same_images():
    every, part = load("digits", None), load("digits", None, "3,8")
    assert all(np.array_equal(part.images[i], every.images[int(part.ids[i])]) for i in range(len(part)))


# --- augmentation

MEAN, STD = torch.full((1, 3, 1, 1), 0.5), torch.full((1, 3, 1, 1), 0.25)
ENTRY = {"flip": False, "rotate": 10, "shift": 0.1}
EACH_ITS_OWN_WAY = ["light", "randaugment", "trivialaugment", "none,random_erasing:0.9"]


def augmented(pixels, text, key=KEY, entry=ENTRY, place=None):
    config, labels = {"augment": text, "dataset_entry": {"augment": entry}}, torch.arange(len(pixels)) % 5
    images, same = data.augment(pixels, labels, MEAN, STD, 5, config, key, place)
    assert same is labels
    return images


def alike(count=16, size=16):
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels.repeat(count, 1, 1, 1)


@pytest.mark.parametrize("text", EACH_ITS_OWN_WAY)
def test_augmentation_follows_from_its_key_and_differs_by_image(text):
    one, again, other = (augmented(alike(), text, key) for key in (KEY, KEY, (0, 1, 3)))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert len({tuple(image.flatten().tolist()) for image in one}) > 8
    assert one.is_contiguous(memory_format=torch.channels_last) and one.dtype == torch.float32
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    augmented(alike(), text)
    assert torch.equal(torch.rand(1), expected)  # dropout's draws are left alone


@pytest.mark.parametrize("text", EACH_ITS_OWN_WAY)
def test_an_image_is_augmented_alike_whether_its_batch_is_shared_or_not(text):
    entry, pixels = ENTRY | {"flip": True}, torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    shares = [augmented(pixels[i:i + 4], text, entry=entry, place=(i, 8)) for i in (0, 4)]
    assert torch.allclose(torch.cat(shares), augmented(pixels, text, entry=entry), atol=1e-5)


def test_without_augmentation_images_are_only_normalised():
    assert torch.equal(augmented(alike(), "none"), prepare(alike(), MEAN, STD))


def test_light_augmentation_moves_no_further_than_the_dataset_allows():
    pixels = alike()
    still = augmented(pixels, "light", entry={"flip": False, "rotate": 0, "shift": 0})
    torch.testing.assert_close(still, (pixels / 255 - 0.5) / 0.25, atol=1e-4, rtol=0)
    flipped = augmented(pixels, "light", entry={"flip": True, "rotate": 0, "shift": 0})
    turned = [not torch.allclose(f, s, atol=1e-3) for f, s in zip(flipped, still)]
    assert any(turned) and all(torch.allclose(f, s.flip(-1) if t else s, atol=1e-4)
                               for f, s, t in zip(flipped, still, turned))


@pytest.mark.parametrize("name, policy", [("randaugment", "RandAugment"), ("trivialaugment", "TrivialAugmentWide")])
def test_the_policies_are_torchvisions_on_each_image_alone(name, policy):
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    transform, expected = getattr(v2, policy)(fill=128), []
    with torch.random.fork_rng():
        for number, image in enumerate(pixels):
            torch.manual_seed(stable_seed("augment", *KEY, number))
            expected.append(transform(image))
    assert torch.equal(augmented(pixels, name), prepare(torch.stack(expected), MEAN, STD))


def test_random_erasing_puts_noise_into_a_rectangle_of_that_share_of_images():
    pixels = torch.full((400, 3, 32, 32), 128, dtype=torch.uint8)
    changed = (augmented(pixels, "none,random_erasing:0.3") != prepare(pixels, MEAN, STD)).any(1)
    share = changed.any(2).any(1).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.07)
    for mask in changed[changed.any(2).any(1)]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_labels_give_the_share_of_each_class_in_an_image(name):
    labels, (mix, _) = torch.arange(16) % 5, data.ON_TOP[name]
    pure = labels.float().view(-1, 1, 1, 1).expand(16, 3, 32, 32).contiguous()  # an image shows its class
    images, shares = mix(pure, labels, 1.0, 5, KEY, None)
    assert shares.shape == (16, 5) and shares.sum(1).allclose(torch.ones(16)) and (shares > 0).sum() > 16
    assert torch.allclose(images.mean((1, 2, 3)), shares @ torch.arange(5.0), atol=1e-3)
    assert torch.equal(mix(pure, labels, 1.0, 5, KEY, None)[0], images)
    assert not torch.equal(mix(pure, labels, 1.0, 5, (0, 1, 3), None)[0], images)


def test_mixup_blends_all_pixels_alike_and_cutmix_pastes_some():
    labels, pure = torch.arange(8), torch.arange(8.0).view(-1, 1, 1, 1).expand(8, 3, 32, 32).contiguous()
    kinds = {"mixup": set(), "cutmix": set()}
    for step in range(30):
        for name, found in kinds.items():
            images, _ = data.ON_TOP[name][0](pure, labels, 1.0, 8, (0, 0, step), None)
            found.add(bool((images.flatten(1).amax(1) - images.flatten(1).amin(1)).max() > 1e-6))
    assert kinds["mixup"] == {False} and True in kinds["cutmix"]


def test_augment_applies_its_parts_one_after_the_other_in_the_order_they_are_named():
    pixels, labels, config = alike(), torch.arange(16) % 5, {"dataset_entry": {"augment": ENTRY}}
    moved = normalise(data.light(pixels, ENTRY, KEY), MEAN, STD)
    parts = {"random_erasing:0.5": (data.random_erasing, 0.5), "cutmix:0.7": (data.ON_TOP["cutmix"][0], 0.7)}
    results = []
    for order in (list(parts), list(parts)[::-1]):
        images, shares = moved, labels
        for name in order:
            function, value = parts[name]
            images, shares = function(images, shares, value, 5, KEY, None)
        results.append(images)
        found = data.augment(pixels, labels, MEAN, STD, 5, config | {"augment": ",".join(["light", *order])}, KEY)
        assert torch.equal(found[0], images) and torch.equal(found[1], shares) and shares.shape == (16, 5)
    assert not torch.equal(*results)


@pytest.mark.parametrize("text, expected", [
    ("none", ("none", {})), ("light", ("light", {})), ("cutmix:1", ("light", {"cutmix": 1.0})),
    ("random_erasing", ("light", {"random_erasing": 0.5})), ("none,cutmix", ("none", {"cutmix": 1.0})),
    ("mixup", ("light", {"mixup": 0.2})), (" randaugment , mixup:100", ("randaugment", {"mixup": 100.0})),
    ("trivialaugment,mixup:.4,random_erasing:1", ("trivialaugment", {"mixup": 0.4, "random_erasing": 1.0}))])
def test_augment_names_one_augmentation_and_what_comes_on_top(text, expected):
    assert data.read_augment(text) == expected


@pytest.mark.parametrize("text, message", [
    ("", f"expected one of {', '.join(data.AUGMENTATIONS)}, and behind commas any of {', '.join(data.ON_TOP)}, as "
         "light,random_erasing:0.5"),
    ("ligth", "Did you mean 'light'"), ("light,cutmx:1", "Did you mean 'cutmix'"), ("light:1", "expected one of "),
    ("cutmix,light", "expected one of "), ("light,none", "expected one of "),
    ("light,", "expected one of "), ("mixup,mixup", "expected one of "),
    ("random_erasing:1.1", "'1.1' is out of range behind random_erasing:"),
    ("random_erasing:0", "'0' is out of range"), ("mixup:nan", "'nan' is out of range behind mixup:, as mixup:0.2"),
    ("mixup:", "'' is out of range"), ("cutmix:x", "'x' is out of range"), ("cutmix:101", "'101' is out of range"),
    ("cutmix,mixup", "cutmix and mixup contradict each other; give one of them")])
def test_an_augment_that_cannot_be_read_is_refused_with_what_was_expected(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(repr(text))}: .*{re.escape(message)}"):
        data.read_augment(text)


def test_a_grid_kept_inside_repeats_the_edge_where_there_is_no_border_padding():
    images, moves = torch.rand(4, 3, 20, 33), torch.randn(4, 2, 3)
    grid = F.affine_grid(moves, images.shape, align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    found = F.grid_sample(images, data.inside(grid), align_corners=False)
    assert grid.abs().max() > 1.5 and torch.allclose(found, expected, atol=1e-5)
