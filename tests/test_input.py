"""Whatever images are given to it: broken in every way, and laid out wrongly.

It trains, or ends with status 2 and one line that names what to change; it never ends with a traceback, and never
writes outside its folder.
"""

import functools
import hashlib
import io
import os
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import draw_classes, draw_letter
from fontTools import fontBuilder
from fontTools.pens import ttGlyphPen
from PIL import Image
from test_data import load
from test_faults import error_line

import train
from engine import cache, display, files, loader, options, pictures, predict, ranks
from engine.dataset import Dataset, Names, to_rgb
from engine.folder import open_run
from engine.loader import Batches, Checked
from engine.split import PARTS

TINY = ("--dataset", "folder", "--model", "test_resnet", "--no-pretrained", "--image-size", "32", "--epochs", "1",
        "--batch-size", "8", "--workers", "0", "--device", "cpu", "--name", "run")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def bomb():
    """A PNG of 13,400 x 13,400 black pixels in 0.2 MB, a few more than Pillow opens."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(13_401)) for _ in range(13_400)) + packer.flush()
    header = (13_400).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def place(path, content):
    path.write_bytes(content)


LETTER = draw_letter("A", 7)
JPEG = encoded(LETTER, "JPEG")
# What cannot be used, and what is wrong with it.
BAD = {
    "empty.jpg": (lambda path: place(path, b""), "not an image"),
    "cut.jpg": (lambda path: place(path, JPEG[: len(JPEG) // 2]), "runcated"),
    "text.jpg": (lambda path: place(path, b"not an image at all\n" * 50), "not an image"),
    "page.png": (lambda path: place(path, b"<html><body>404</body></html>"), "not an image"),
    "folder.jpg": (lambda path: path.mkdir(), "a folder, not a file"),
    "broken link.jpg": (lambda path: path.symlink_to("gone.jpg"), "No such file"),
    "loop.jpg": (lambda path: path.symlink_to("loop.jpg"), "symbolic links"),
    "device.jpg": (lambda path: path.symlink_to("/dev/zero"), "not a file"),
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
    "turned.jpg": encoded(LETTER, "JPEG", exif=bytes.fromhex("45786966000049492a000800000001001201030001000000"
                                                             "06000000000000")),
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
    draw_letter("C", 1).save(tmp_path / "elsewhere.jpg")
    (root / "A" / "outside.jpg").symlink_to(tmp_path / "elsewhere.jpg")
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
    return sorted((str(p), p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() and not p.is_symlink() else b"")
                  for p in root.rglob("*"))


@pytest.mark.parametrize("keep", ["auto", "off"])
def test_bad_images_are_all_found_before_training_and_listed_or_left_out(keep, messy, tmp_path, capsys, monkeypatch):
    root, bad = messy
    arguments = [*TINY, "--data-dir", str(root), "--out", str(tmp_path / "runs"), "--cache", keep]
    before = state_of(root)
    assert train.main(arguments) == 2
    line = error_line(capsys)
    assert f"{len(bad)} of {25 + len(BAD) + len(GOOD)} images cannot be used" in line and "--skip-bad" in line
    assert not (tmp_path / "runs" / "run").exists()
    listed = dict(text.split("\t") for text in (tmp_path / "runs" / "bad-images.txt").read_text().splitlines())
    assert len(listed) == len(bad)
    for name, (_, wrong) in BAD.items():
        assert wrong in listed[files.one_line(root / "A" / name)], name

    assert train.main([*arguments, "--skip-bad"]) == 0
    output = capsys.readouterr()
    assert f"{len(bad)} images that cannot be used" in output.out and not output.err
    assert f"--skip-bad: {len(bad)} images were left out" in output.out
    opened = open_run(tmp_path / "runs" / "run")
    assert set(opened.split["skipped"]) == bad
    assert files.read_json(opened.folder / "metrics.json")["skipped_images"] == len(bad)
    used = {image_id for part in PARTS for image_id in opened.split[part]}
    letters = {f"{c}/{c}{i}.jpg" for c in "AB" for i in range(1, 13)}
    assert used == {f"A/{name}" for name in (*GOOD, "outside.jpg")} | letters
    assert (opened.folder / "bad-images.txt").read_bytes() == (tmp_path / "runs" / "bad-images.txt").read_bytes()

    monkeypatch.setattr(cache, "_decode_all", None)  # a resumed run knows, and decodes them no more
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
    assert files.read_json(tmp_path / "runs" / "run" / "metrics.json")["skipped_images"] == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO"])
def test_a_file_cut_anywhere_is_found_or_still_shows_the_complete_picture(kind, tmp_path):
    content = encoded(LETTER, kind)
    complete = to_rgb(Image.open(io.BytesIO(content)), 48).astype(int)
    for tenth in range(10):
        place(tmp_path / "x", content[: tenth * len(content) // 10])
        found = Dataset("x", tmp_path, ["a"], ["x"], np.zeros(1, np.int64), Names([str(tmp_path / "x")]))
        pixels, wrong, _ = Checked(found, [0], 48)[0]
        assert wrong or np.abs(pixels - complete).max() <= 2, f"{kind} cut at {tenth} tenths was taken for complete"


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


def a_class_all_bad(root):
    draw_classes(root, "AB", 9)
    (root / "C").mkdir()
    for i in range(9):
        place(root / "C" / f"{i}.jpg", b"")


def nested_one_class(root):
    draw_classes(root / "cat", "AB", 9)
    draw_classes(root / "dog", "C", 9)


def two_datasets(root):
    draw_classes(root / "one", "AB", 4)
    draw_classes(root / "two", "BA", 4)
    for image in root.glob("two/*/*.jpg"):
        image.write_bytes(image.read_bytes() + b"other")


@pytest.mark.parametrize("make, message", [
    (lambda root: None, "no images in"), (no_classes, "not two class folders"), (one_class, "not two class folders"),
    (one_image, "class 'C' has 1 different images"), (too_few, "class 'A' has 2 different images"),
    (all_alike, "class 'A' has 1 different"), (other_classes, "class 'C' has no image left to train on"),
    (a_class_all_bad, "images cannot be used|has 1 different images"),
    (two_datasets, "several folders hold class folders"), (nested_one_class, "9 of 27 images in"),
])
def test_a_folder_laid_out_wrongly_is_one_line(make, message, tmp_path, capsys):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    assert train.main([*TINY, "--data-dir", str(root), "--out", str(tmp_path / "runs"), "--skip-bad"]) == 2
    line = error_line(capsys)
    assert any(text in line for text in message.split("|")), line
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.slow
def test_ten_thousand_classes_train(tmp_path, monkeypatch):
    """The complete command takes a minute and a half for as many test images as classes; here its end has 200."""
    real = predict.write_predictions

    def write_predictions(folder, config, model, dataset, split, device):
        real(folder, config, model, dataset, {part: split[part][:200] for part in PARTS}, device)

    monkeypatch.setattr(predict, "write_predictions", write_predictions)
    for c in range(10_000):
        folder = tmp_path / "data" / f"{c:05d}"
        folder.mkdir(parents=True)
        for i in range(3):
            place(folder / f"{i}.ppm", b"P6 2 2 255\n" + (10 * c + i).to_bytes(12, "big"))
    assert train.main([*TINY, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "runs"),
                       "--batch-size", "2000", "--image-size", "8", "--cam", "none"]) == 0
    assert files.read_json(tmp_path / "runs" / "run" / "metrics.json")["test"]["images"] == 200
    split = open_run(tmp_path / "runs" / "run").split
    assert [len(split[part]) for part in ("classes", *PARTS)] == [10_000] * 4


def test_nested_folders_belong_to_their_class(tmp_path):
    draw_classes(tmp_path / "x" / "y", "AB", 5)
    draw_classes(tmp_path / "x" / "y" / "A" / "more" / "and more", "BC", 5)
    found = load("folder", tmp_path)
    assert found.classes == ["A", "B"] and np.bincount(found.labels).tolist() == [15, 5]


# --- whatever Pillow and its plugins raise -------------------------------------------------------------------------


RAISED = [RuntimeError("Failed to decode frame 0"), TypeError("a float is required"), struct.error("unpack requires"),
          KeyError(274), ZeroDivisionError("division by zero"), OverflowError(), MemoryError(), EOFError("no more"),
          AssertionError(), AttributeError("no attribute"), UserWarning("Corrupt EXIF data"), NotImplementedError()]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_an_image_at_which_anything_is_raised_is_a_bad_image(error, tmp_path, monkeypatch):
    draw_classes(tmp_path, "AB", 2)
    found, opened = load("folder", tmp_path), Image.open

    def open_image(file, *arguments):
        image = opened(file, *arguments)
        if hashlib.blake2b(file.getvalue(), digest_size=16).hexdigest() == found.digests[2]:
            image.load = functools.partial(throw, error)
        return image

    monkeypatch.setattr(Image, "open", open_image)
    (index, wrong), = cache.check_images(found, {"image_size": 16, "cache": "off", "workers": 0}).items()
    assert index == 2 and wrong == f"{type(error).__name__}: {error}".removesuffix(": ")
    with pytest.raises(files.UserError, match="B1.jpg: cannot be read as an image"):
        list(Batches(found, found.ids, 16, 4, torch.device("cpu")))


def throw(error):
    raise error


def test_an_error_of_a_decoder_in_a_worker_names_the_image_and_is_not_taken_for_the_workers_death(tmp_path, monkeypatch,
                                                                                                 capsys):
    draw_classes(tmp_path, "AB", 2)
    found = load("folder", tmp_path)
    monkeypatch.setattr(loader, "to_rgb", lambda *arguments: throw(RuntimeError("decoder failed")))
    with pytest.raises(files.UserError, match=r"A1.jpg: cannot be read as an image \(RuntimeError: decoder failed\)$"):
        list(Batches(found, found.ids, 16, 4, torch.device("cpu"), workers=1))
    for text in ("(pid 7) is killed by signal: Killed.", "(pid(s) 7) exited unexpectedly", "process 0"):
        error = RuntimeError(f"DataLoader worker {text}")
        monkeypatch.setattr(train.options, "parse", lambda *arguments, error=error: throw(error))
        if "pid" in text:
            assert train.main([]) == 2 and "decodes images was killed" in error_line(capsys)
        else:
            with pytest.raises(RuntimeError, match="process 0"):
                train.main([])


def test_a_signal_while_an_image_is_decoded_is_not_taken_for_a_broken_image(tmp_path, monkeypatch):
    draw_classes(tmp_path, "AB", 2)
    found = load("folder", tmp_path)
    monkeypatch.setattr(loader, "to_rgb", lambda *arguments: throw(ranks.Stopped(15)))
    with pytest.raises(ranks.Stopped):
        cache.check_images(found, {"image_size": 16, "cache": "off", "workers": 0})


# --- consoles and letters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding, printed", [
    ("ascii", r"caf\udce9 \u732b \xe9"), ("cp1252", r"caf\udce9 \u732b é"), ("utf-8", "caf\\udce9 猫 é")])
def test_names_are_printed_on_any_console(encoding, printed, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    options.use_any_console()
    print("caf\udce9 猫 é")
    display.Console(file=stream).print("caf\udce9 猫 é", markup=False)
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding).splitlines() == [printed] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_without_any_console_nothing_is_printed_into_a_file_that_is_opened_next(tmp_path):
    child = os.fork()
    if not child:  # as a service starts it
        for number in (0, 1, 2):
            os.close(number)
        sys.stdin = sys.stdout = sys.stderr = None
        options.use_any_console()
        with open(tmp_path / "file", "w") as file:
            print("on the console")
            display.console.print("on the console")
            os.write(1, b"from a library in C")
            file.write(f"{file.fileno() > 2}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and (tmp_path / "file").read_text() == "True"


@pytest.mark.slow
@pytest.mark.pictures
def test_class_folders_in_latin_1_train_to_the_end_and_are_drawn(tmp_path, capsys):
    for name in (b"caf\xe9", b"th\xe9 \xff", "犬".encode()):
        draw_classes(tmp_path / "x", "A", 5)
        (tmp_path / "x" / "A").rename(tmp_path / "x" / os.fsdecode(name))
        for image in (tmp_path / "x" / os.fsdecode(name)).iterdir():
            image.write_bytes(image.read_bytes() + name)
    arguments = [*TINY, "--data-dir", str(tmp_path / "x"), "--out", str(tmp_path / "runs")]
    assert train.main([*arguments, "--dry-run"]) == 0 and train.main(arguments) == 0
    assert open_run(tmp_path / "runs" / "run").split["classes"] == ["caf\udce9", "th\udce9 \udcff", "犬"]
    assert (tmp_path / "runs" / "run" / "confusion.png").exists() and (tmp_path / "runs" / "run" / "sheet.png").exists()
    assert not capsys.readouterr().err and files.readable("caf\udce9") == "caf\\xe9"


def test_letters_are_drawn_in_a_font_of_this_machine_that_has_them(tmp_path, monkeypatch):
    """Here one is made that has a single character, a black square."""
    builder, pen = fontBuilder.FontBuilder(1000, isTTF=True), ttGlyphPen.TTGlyphPen(None)
    for step, corner in zip((pen.moveTo, pen.lineTo, pen.lineTo, pen.lineTo), ((0, 0), (0, 900), (900, 900), (900, 0))):
        step(corner)
    pen.closePath()
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    builder.setupGlyf({".notdef": ttGlyphPen.TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (900, 0), "cat": (900, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    labels, logits, dark = np.array([0, 1]), np.eye(2), []
    for _ in range(2):
        pictures.fonts_with.cache_clear()
        pictures.draw_confusion(tmp_path, labels, logits, ["猫" * 5, "dog"])
        dark.append(int((np.asarray(Image.open(tmp_path / "confusion.png").convert("L")) < 60).sum()))
        manager = pictures.font_manager.fontManager
        monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
        manager.addfont(tmp_path / "squares.ttf")
        manager._findfont_cached.cache_clear()
    assert pictures.fonts_with(frozenset("a猫")) == ["Squares"] and pictures.fonts_with(frozenset("aß\n")) == []
    assert dark[1] > dark[0] + 600
    pictures.fonts_with.cache_clear()
