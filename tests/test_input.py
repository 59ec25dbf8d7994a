"""Whatever is given to it: images of every kind of brokenness, folders laid out wrongly, settings that make no sense.

It trains, or ends with status 2 and one line that says what to change; it never ends with a traceback, and never writes outside its folder.
"""

import functools
import io
import json
import os
import shutil
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cache
import data
import eval as evaluation
import run
import train
from conftest import draw_classes, draw_letter, hash_folder
from test_faults import said

TINY = ("--dataset", "folder", "--model", "test_resnet", "--no-pretrained", "--image-size", "32", "--epochs", "1", "--batch-size", "8",
        "--workers", "0", "--device", "cpu", "--name", "run")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def bomb():
    """A PNG of 30,000 x 30,000 black pixels in 2.6 MB."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(90_001)) for _ in range(30_000)) + packer.flush()
    header = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def place(path, content):
    path.write_bytes(content)


LETTER = draw_letter("A", 7)
JPEG = encoded(LETTER, "JPEG")
# What cannot be used, and what is said of it.
BAD = {
    "empty.jpg": (lambda path: place(path, b""), "not an image"),
    "cut.jpg": (lambda path: place(path, JPEG[: len(JPEG) // 2]), "runcated"),
    "text.jpg": (lambda path: place(path, b"not an image at all\n" * 50), "not an image"),
    "page.png": (lambda path: place(path, b"<html><body>404</body></html>"), "not an image"),
    "folder.jpg": (lambda path: path.mkdir(), "a folder, not a file"),
    "broken link.jpg": (lambda path: path.symlink_to("gone.jpg"), "No such file"),
    "loop.jpg": (lambda path: path.symlink_to("loop.jpg"), "symbolic links"),
    "outside.jpg": (lambda path: path.symlink_to(path.parents[2] / "secret.jpg"), "a link that leads out of"),
    "queue.jpg": (lambda path: os.mkfifo(path), "not a file"),
    "bomb.png": (lambda path: place(path, bomb()), "decompression bomb"),
    "new\nline.jpg": (lambda path: place(path, b""), "not an image"),
    os.fsdecode(b"not utf-8 \xff.jpg"): (lambda path: place(path, b""), "not an image"),
    "x" * 251 + ".jpg": (lambda path: place(path, b""), "not an image"),
}
# What is odd and can be used.
GOOD = {
    "really a png.jpg": encoded(LETTER, "PNG"),
    "1x1.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
    "1x20000.png": encoded(Image.new("RGB", (1, 20_000), "blue"), "PNG"),
    "animated.gif": encoded(LETTER, "GIF", save_all=True, append_images=[draw_letter("A", 8), draw_letter("A", 9)]),
    "16 bit.png": encoded(Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257), "PNG"),
    "cmyk.jpg": encoded(LETTER.convert("CMYK"), "JPEG"),
    "palette.png": encoded(LETTER.quantize(16), "PNG", transparency=3),
    "turned.jpg": encoded(LETTER, "JPEG", exif=bytes.fromhex("45786966000049492a00080000000100120103000100000006000000000000")),
    "UPPER.JPG": JPEG + b"\0",
    os.fsdecode(b"also not utf-8 \xfe.jpg"): JPEG + b"\1",
    "also\na new line.jpg": JPEG + b"\2",
    "y" * 251 + ".jpg": JPEG + b"\3",
}


@pytest.fixture
def messy(tmp_path):
    """A dataset with everything bad and everything odd in it, as (folder, the bad ones' ids)."""
    root = tmp_path / "letters"
    draw_classes(root, "AB", 12)
    draw_letter("C", 1).save(tmp_path / "secret.jpg")
    for name, (make, _) in BAD.items():
        make(root / "A" / name)
    for name, content in GOOD.items():
        place(root / "A" / name, content)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._A1.jpg"):
        place(root / "A" / name, b"\0\1")
    (root / "__MACOSX" / "A").mkdir(parents=True)
    place(root / "__MACOSX" / "A" / "._A1.jpg", b"\0")
    return root, {f"A/{name}" for name in BAD}


def state_of(root):
    """Names, times and bytes below a folder; links and queues as names alone."""
    return sorted((str(p), p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() and not p.is_symlink() else b"") for p in root.rglob("*"))


@pytest.mark.parametrize("keep", ["auto", "off"])
def test_bad_images_are_all_found_before_training_and_listed_or_left_out(keep, messy, tmp_path, capsys, monkeypatch):
    root, bad = messy
    arguments = [*TINY, "--data-dir", str(root), "--out", str(tmp_path / "runs"), "--cache", keep]
    before = state_of(root)
    assert train.main(arguments) == 2
    line = said(capsys)
    assert f"{len(bad)} of {24 + len(BAD) + len(GOOD)} images cannot be used" in line and "--skip-bad" in line
    assert not (tmp_path / "runs" / "run").exists()
    listed = dict(text.split("\t") for text in (tmp_path / "runs" / "bad-images.txt").read_text().splitlines())
    assert len(listed) == len(bad)
    for name, (_, wrong) in BAD.items():
        assert wrong in listed[data.one_line(root / "A" / name)], name

    assert train.main([*arguments, "--skip-bad"]) == 0
    output = capsys.readouterr()
    assert output.out.count(f"{len(bad)} images that cannot be used") == 2 and not output.err
    opened = run.open_run(tmp_path / "runs" / "run")
    assert set(opened.split["skipped"]) == bad and run.read_json(opened.folder / "metrics.json")["skipped_images"] == len(bad)
    used = {image_id for part in data.PARTS for image_id in opened.split[part]}
    assert used == {f"A/{name}" for name in GOOD} | {f"{c}/{c}{i}.jpg" for c in "AB" for i in range(1, 13)}
    assert (opened.folder / "bad-images.txt").read_bytes() == (tmp_path / "runs" / "bad-images.txt").read_bytes()

    monkeypatch.setattr(cache, "_decode_all", None)  # a resumed run knows, and looks no more
    for name in ("metrics.json", "predictions.npz"):
        (opened.folder / name).unlink()
    assert train.main(["--resume", str(opened.folder)]) == 0
    assert state_of(root) == before


def test_what_was_found_is_remembered_until_the_files_change(messy, tmp_path, monkeypatch):
    root, bad = messy
    arguments = [*TINY, "--data-dir", str(root), "--out", str(tmp_path / "runs")]
    assert train.main(arguments) == 2
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_decode_all", None)
        assert train.main(arguments) == 2
    for image_id in bad:
        path = root / image_id
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert train.main(arguments) == 0
    assert run.read_json(tmp_path / "runs" / "run" / "metrics.json")["skipped_images"] == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO"])
def test_a_file_cut_anywhere_is_found_or_still_shows_the_whole_picture(kind, tmp_path):
    content = encoded(LETTER, kind)
    whole = data.to_rgb(Image.open(io.BytesIO(content)), 48).astype(int)
    for tenth in range(10):
        place(tmp_path / "x", content[: tenth * len(content) // 10])
        found = data.Dataset("x", tmp_path, ["a"], ["x"], np.zeros(1, np.int64), data.Names([str(tmp_path / "x")]))
        pixels, wrong = data.Checked(found, [0], 48)[0]
        assert wrong or np.abs(pixels - whole).max() <= 2, f"{kind} cut at {tenth} tenths was taken for whole"


# --- how a dataset lies on the disk --------------------------------------------------------------------------------


def no_classes(root):
    draw_letter("A", 1).save(root / "a.jpg")


def one_class(root):
    draw_classes(root, "A", 9)


def one_image(root):
    draw_classes(root, "AB", 9)
    (root / "C").mkdir()
    draw_letter("C", 1).save(root / "C" / "C1.jpg")


def too_few(root):
    draw_classes(root, "AB", 2)


def all_alike(root):
    draw_classes(root, "AB", 1)
    for i in range(9):
        shutil.copy(root / "A" / "A1.jpg", root / "A" / f"{i}.jpg")


def other_classes(root):
    draw_classes(root / "train", "AB", 9)
    draw_classes(root / "val", "AC", 3)


def a_linked_class(root):
    draw_classes(root, "AB", 9)
    (root / "C").symlink_to(root / "A")


def a_class_all_bad(root):
    draw_classes(root, "AB", 9)
    (root / "C").mkdir()
    for i in range(9):
        place(root / "C" / f"{i}.jpg", b"")


def nested_one_class(root):
    draw_classes(root / "cat", "AB", 9)
    draw_classes(root / "dog", "A", 9)


def two_datasets(root):
    draw_classes(root / "one", "AB", 4)
    draw_classes(root / "two", "AB", 4)


@pytest.mark.parametrize("make, message", [
    (lambda root: None, "no images in"), (no_classes, "not two class folders"), (one_class, "not two class folders"),
    (one_image, "class 'C' has 1 different images"), (too_few, "class 'A' has 2 different images"), (all_alike, "class 'A' has 1 different"),
    (other_classes, "class 'C' has no image left to train on"), (a_linked_class, "C is a link to a folder"),
    (a_class_all_bad, "images cannot be used|has 1 different images"), (two_datasets, "several folders in"),
    (nested_one_class, "9 of 27 images in"),
])
def test_a_folder_laid_out_wrongly_is_one_line(make, message, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    assert train.main([*TINY, "--data-dir", str(root), "--out", str(tmp_path / "runs"), "--skip-bad"]) == 2
    line = said(capsys)
    assert any(text in line for text in message.split("|")), line
    assert not (tmp_path / "runs" / "run").exists()


def test_ten_thousand_classes_train(tmp_path, monkeypatch):
    """The whole command takes a minute and a half for as many test images as classes; here the end of it sees two hundred."""
    real = evaluation.write_predictions
    monkeypatch.setattr(evaluation, "write_predictions", lambda folder, config, model, dataset, split, device: real(
        folder, config, model, dataset, {part: split[part][:200] for part in data.PARTS}, device))
    for c in range(10_000):
        folder = tmp_path / "data" / f"{c:05d}"
        folder.mkdir(parents=True)
        for i in range(3):
            place(folder / f"{i}.ppm", b"P6 2 2 255\n" + (10 * c + i).to_bytes(12, "big"))
    assert train.main([*TINY, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "runs"), "--batch-size", "2000", "--image-size", "8",
                       "--cam", "none"]) == 0
    assert run.read_json(tmp_path / "runs" / "run" / "metrics.json")["test"]["images"] == 200
    split = run.open_run(tmp_path / "runs" / "run").split
    assert [len(split[part]) for part in ("classes", *data.PARTS)] == [10_000] * 4


def test_nested_folders_belong_to_their_class(tmp_path):
    draw_classes(tmp_path / "x" / "y", "AB", 5)
    draw_classes(tmp_path / "x" / "y" / "A" / "more" / "and more", "BC", 5)
    found = data.load_dataset("folder", run.read_configs()["datasets"]["folder"], tmp_path)
    assert found.classes == ["A", "B"] and np.bincount(found.labels).tolist() == [15, 5]


# --- settings ------------------------------------------------------------------------------------------------------

WORDS = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(
    ["nan", "inf", "-1", "0", "1", "0.5", "1e309", "null", "auto", "none", "true", "../..", "/", "\0", "\udcff", "--", "-", "digits", "gradcam", "all",
     "every:0", "20,p,19", "after:-1", "10m", "layer3", "9" * 400]))
NAMES = sorted(run.SETTINGS)
OTHERS = st.sampled_from(["--resume", "--experiment", "--cell", "--jobs", "--any-code", "--show", "--dry-run", "--help-me"])


def option(name, word):
    flag = f"--{name.replace('_', '-')}"
    if run.SETTINGS[name].kind is bool:
        return flag if len(word) % 2 else flag.replace("--", "--no-", 1)
    return f"{flag}={word}"


@st.composite
def right(draw, name):
    """A value that the setting takes, as far as its type, range and choices say."""
    setting = run.SETTINGS[name]
    if setting.choices:
        return draw(st.sampled_from(setting.choices))
    if setting.kind in (int, float):
        low, high = setting.low or 0, min(setting.high or 10, (setting.low or 0) + 10)
        return str(draw(st.integers(int(low), int(high)) if setting.kind is int else st.floats(low, high)))
    return draw(st.sampled_from(["null", "auto", "10m", "every:2", "digits", "1,3"]))


ONE = st.sampled_from(NAMES).flatmap(lambda name: st.one_of(WORDS, right(name)).map(lambda word: option(name, word)))
SAFE = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def runs_or_says_why(arguments, tmp_path, capsys):
    """Status 0, or 2 with one line; nothing written but below --out."""
    inside = tmp_path / "inside"
    inside.mkdir(exist_ok=True)
    outside = hash_folder(tmp_path / "outside") if (tmp_path / "outside").exists() else None
    before = sorted(p.name for p in tmp_path.iterdir())
    status = train.main([*arguments, f"--out={inside / 'runs'}", "--device=cpu", "--workers=0"])
    captured = capsys.readouterr()
    assert status in (0, 2), captured.err
    assert status == 0 or len(captured.err.splitlines()) == 1 and captured.err.startswith("train.py: "), captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert outside is None or hash_folder(tmp_path / "outside") == outside
    return status


@settings(**SAFE, max_examples=150)
@given(options=st.lists(st.one_of(ONE, ONE, ONE, WORDS, OTHERS, st.builds("{}={}".format, OTHERS, WORDS)), max_size=4))
def test_whatever_the_command_line_it_is_understood_or_refused_in_one_line(options, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "command lines"
    folder.mkdir(exist_ok=True)
    runs_or_says_why([*options, "--dry-run"], folder, capsys)


VALID = ("cam", "explain", "smooth", "select", "fill", "control", "area", "threshold", "soften", "share", "subset", "augment", "mixup", "cutmix",
         "random_erasing", "hide_and_seek", "budget", "same_step", "mode", "schedule", "warmup", "accumulate", "freeze", "layer_decay", "amp",
         "checkpointing", "clip", "lr", "weight_decay", "seed", "batch_size", "model", "deterministic", "classes", "format", "rounds")


@settings(**SAFE, max_examples=8)
@given(options=st.lists(st.sampled_from(VALID).flatmap(lambda name: right(name).map(lambda word: option(name, word))), max_size=6))
def test_settings_that_are_taken_train_to_the_end(options, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("valid")
    options = [text for text in options if not text.startswith("--model")]
    runs_or_says_why([*options, "--epochs=1", "--train-fraction=0.06"], folder, capsys)


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=5)


def paths_in(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_in(inner, (*path, key))


CONFIGS = run.read_configs()
PLACES = sorted(paths_in(CONFIGS), key=repr)


@settings(**SAFE, max_examples=150)
@given(where=st.sampled_from(PLACES), value=JSON, drop=st.booleans())
def test_whatever_configs_json_says_it_is_understood_or_refused_in_one_line(where, value, drop, tmp_path_factory, capsys):
    configs = json.loads(json.dumps(CONFIGS))
    inner = configs
    for key in where[:-1]:
        inner = inner[key]
    if not where:
        configs = value
    elif drop and isinstance(inner, dict):
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    folder = tmp_path_factory.getbasetemp() / "configs"
    folder.mkdir(exist_ok=True)
    (folder / "configs.json").write_text(json.dumps(configs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CONFIGS", folder / "configs.json")
        patch.setattr(run.read_configs, "__defaults__", (folder / "configs.json",))
        for arguments in (["--dry-run"], ["--dry-run", "--experiment", "demo"]):
            runs_or_says_why(arguments, folder, capsys)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b"{" * 100_000, b"[" * 100_000, b'{"defaults": 1e999}', b"NaN"])
def test_a_configs_json_that_is_none_is_named(content, tmp_path, monkeypatch, capsys):
    place(tmp_path / "configs.json", content)
    monkeypatch.setattr(run.read_configs, "__defaults__", (tmp_path / "configs.json",))
    assert train.main(["--dry-run"]) == 2
    assert "configs.json" in said(capsys)
