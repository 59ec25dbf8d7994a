"""engine/dataset.py: what counts as an image, and that a dataset's folder stays as it is."""

import numpy as np
import pytest
import torch
from conftest import hash_folder
from PIL import Image
from test_data import load

from engine.dataset import Names, Pixels, to_rgb
from engine.loader import Batches


def grey_ramp(dtype, top):
    return (np.linspace(0, 1, 64).reshape(1, 64).repeat(64, 0) * top).astype(dtype)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "PA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_kind_of_image_becomes_the_same_rgb_picture(mode, tmp_path):
    ramp = Image.fromarray(grey_ramp(np.uint8, 255))
    file = tmp_path / ("ramp.tif" if mode in ("CMYK", "F", "I", "PA", "LA") else "ramp.png")
    if mode in ("I;16", "I", "F"):
        Image.fromarray(grey_ramp({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode],
                                  {"I;16": 65535, "I": 65535, "F": 1}[mode])).save(file)
    elif mode in ("PA", "HSV", "YCbCr"):  # a TIFF in YCbCr is one that not every Pillow reads back
        file = None
    else:
        ramp.convert("RGB").convert(mode).save(file)
    image = Image.open(file) if file else ramp.convert("RGB").convert("P" if mode == "PA" else mode)
    pixels = to_rgb(image, 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    expected = np.asarray(ramp.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(pixels.mean((0, 2)) - expected.mean((0, 2))).max() < (60 if mode == "1" else 12)


def test_transparent_pixels_become_grey_so_that_neither_black_nor_white_drawings_vanish():
    for ink in (0, 255):
        image = Image.new("RGBA", (8, 8), (ink, ink, ink, 0))
        image.paste((ink, ink, ink, 255), (0, 0, 4, 8))
        pixels = to_rgb(image, 8)
        assert (pixels[:, :4] == ink).all() and (pixels[:, 4:] == 128).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.info["transparency"] = 0
    palette.paste(1, (0, 0, 4, 8))
    assert to_rgb(palette, 8)[0, 0].tolist() == [0, 255, 0] and to_rgb(palette, 8)[0, 7].tolist() == [128] * 3


def test_an_exif_rotated_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white
    exif = image.getexif()
    exif[0x0112] = 6  # rotate a quarter turn clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = to_rgb(Image.open(tmp_path / "turned.jpg"), 16)
    assert pixels[:6].mean() > 250 and pixels[10:].mean() < 5


def test_names_in_one_buffer_and_pixels_in_several_arrays_are_taken_by_number():
    texts = ["a", "", "ü/ß.jpg", "not utf-8 \udcff"]
    assert list(Names(texts)) == texts and len(Names(texts)) == 4
    pixels = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)
    rows = np.array([6, 0, 3, 2, 3])
    for parts in ((pixels,), (pixels[:3], pixels[3:4], pixels[4:])):
        assert np.array_equal(Pixels(*parts).take(rows), pixels[rows])


def test_reading_a_dataset_leaves_it_byte_for_byte_as_it_was(asl):
    before = hash_folder(asl)
    found = load("asl", asl)
    list(Batches(found, found.ids, 32, 8, torch.device("cpu"), workers=1))
    assert hash_folder(asl) == before


@pytest.mark.parametrize("cuts", [[], [5], [2, 7]])
def test_pixels_are_taken_from_one_array_or_several_into_the_memory_that_is_given(cuts):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    pixels, rows, place = Pixels(*np.split(images, cuts)), np.array([9, 0, 5, 5, 2]), np.zeros((5, 4, 4, 3), np.uint8)
    assert pixels.take(rows, place) is place
    assert np.array_equal(place, images[rows]) and np.array_equal(pixels.take(rows), images[rows])
