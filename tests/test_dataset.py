"""engine/dataset.py: what counts as an image, and that a dataset's folder stays as it is."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import hash_folder
from PIL import Image, ImageOps
from test_data import load

from engine import cache
from engine.dataset import Names, Pixels, is_deep, to_rgb, upright
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_pillow_turns_it_also_where_its_exif_data_cannot_be_written_again(orientation):
    entries = struct.pack("<HHIHHHHII", 0x0112, 3, 1, orientation, 0, 0x0118, 5, 1, 38)  # a fraction for a whole number
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<III", 0, 72, 1)
    picture, odd, plain = Image.radial_gradient("L").crop((0, 30, 90, 100)), io.BytesIO(), Image.Exif()
    picture.save(odd, "PNG", exif=exif)
    plain[0x0112], fine = orientation, io.BytesIO()
    picture.save(fine, "PNG", exif=plain)
    expected = ImageOps.exif_transpose(Image.open(fine))
    assert np.array_equal(np.asarray(upright(Image.open(odd))), np.asarray(expected))
    assert upright(Image.open(odd)).size == ((90, 70) if orientation < 5 else (70, 90))


# Values of 16 bits.


def png_of_16_bits(values):
    """A PNG of 16 bits a value, uint16 [H, W] or [H, W, 3], which Pillow writes only of greys."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *values.shape[1::-1], 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def scans(folder, top, shape=(8, 8)):
    """Two classes of images with values up to `top`; those of class dark hold a fifth of it. Returns {id: values}."""
    every, draw = {}, np.random.default_rng(top)
    for number in range(8):
        name = ("dark", "light")[number % 2]
        values = draw.integers(0, top // (1 if number % 2 else 5) + 1, shape, dtype=np.uint16)
        values.flat[0] = top // (1 if number % 2 else 5)
        path = folder / name / f"{number}.{'tif' if number == 3 and values.ndim == 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tif":
            Image.fromarray(values).save(path)
        else:
            path.write_bytes(png_of_16_bits(values))
        every[f"{name}/{path.name}"] = values
    return every


@pytest.mark.parametrize("keep", ["auto", "off"])
@pytest.mark.parametrize("top, levels", [(255, 255), (1000, 1023), (4095, 4095), (4096, 16383), (60_000, 65_535)])
def test_images_of_16_bits_are_all_scaled_by_the_fewest_levels_that_hold_every_one(top, levels, keep, tmp_path):
    every, found = scans(tmp_path / "data", top), load("folder", tmp_path / "data")
    config = {"image_size": 8, "cache": keep, "out": tmp_path, "workers": 0}
    for _ in range(2):  # the second time it is remembered
        found = load("folder", tmp_path / "data")
        assert cache.check_images(found, config) == {} and found.levels == levels
        cache.open_pixels(found, config)
        (batch, _), = Batches(found, found.ids, 8, 8, torch.device("cpu"))
        for image, image_id in zip(batch, found.ids):
            expected = np.rint(every[image_id] * (255 / levels))
            assert np.array_equal(image.numpy(), expected[None].repeat(3, 0)), image_id


def test_a_run_from_before_is_scaled_as_it_was(tmp_path):
    every, found = scans(tmp_path / "data", 1000), load("folder", tmp_path / "data")
    cache.open_pixels(found, {"image_size": 8, "cache": "auto", "out": tmp_path, "workers": 0})
    (batch, _), = Batches(found, found.ids, 8, 8, torch.device("cpu"))
    assert found.levels == 65535 and int(batch.max()) == round(1000 / 65535 * 255)


def test_colours_of_16_bits_are_not_left_dark(tmp_path):
    every, found = scans(tmp_path / "data", 4095, (8, 8, 3)), load("folder", tmp_path / "data")
    assert cache.check_images(found, {"image_size": 8, "cache": "off", "workers": 0}) == {} and found.levels == 4095
    (batch, _), = Batches(found, found.ids, 8, 8, torch.device("cpu"))
    for image, image_id in zip(batch, found.ids):
        assert np.abs(image.permute(1, 2, 0).numpy() - every[image_id] / 4095 * 255).max() <= 16


def test_bmp_images_of_5_bits_a_colour_are_not_taken_for_ones_of_16_bits():
    rows = b"".join(struct.pack("<4H", *[31 << 10, 31 << 5, 31, 0]) for _ in range(4))
    sizes = 54 + len(rows), 0, 0, 54, 40, 4, 4, 1, 16, 0, len(rows), 0, 0, 0, 0
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", *sizes)
    image = Image.open(io.BytesIO(header + rows))
    assert not is_deep(image) and to_rgb(image, 4, 1023)[0, 0].tolist() == [255, 0, 0]
