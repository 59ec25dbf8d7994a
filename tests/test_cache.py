"""cache.py: images decoded once and files hashed once, and made again when the data is another."""

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_letter, hash_folder

import cache
import data
import run
from data import UserError

ENTRY = run.read_configs()["datasets"]["asl"]


def load(asl, folder):
    dataset = cache.load_dataset("asl", ENTRY, asl, folder)
    cache.keep_listing(dataset)
    return dataset


def opened(dataset, folder, mode="auto", size=32, build=True):
    dataset.pixels, text = cache.open_pixels(dataset, size, mode, folder, 0, build)
    return text


def test_images_from_the_cache_are_those_that_decoding_gives(asl, tmp_path):
    before, dataset = hash_folder(asl), data.load_dataset("asl", ENTRY, asl)
    plain = list(data.Batches(dataset, dataset.ids[::-1], 32, 8, torch.device("cpu")))
    assert "30 images decoded once" in opened(dataset, tmp_path)
    cached = list(data.Batches(dataset, dataset.ids[::-1], 32, 8, torch.device("cpu")))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(plain, cached, strict=True))
    assert "as decoded before" in opened(dataset, tmp_path) and hash_folder(asl) == before
    assert opened(dataset, tmp_path, "off") is None and dataset.pixels is None
    assert "decoded once" in opened(dataset, tmp_path, str(tmp_path / "elsewhere"))
    assert len(list(tmp_path.glob("*.npy"))) == len(list((tmp_path / "elsewhere").glob("*.npy"))) == 1


def test_another_size_or_other_content_is_decoded_anew(asl, tmp_path):
    dataset = data.load_dataset("asl", ENTRY, asl)
    opened(dataset, tmp_path)
    assert "decoded once" in opened(dataset, tmp_path, size=48) and dataset.pixels.size == 48
    draw_letter("Z", 5).save(next(asl.rglob("A1.jpg")), quality=90)
    changed = data.load_dataset("asl", ENTRY, asl)
    assert "decoded once" in opened(changed, tmp_path) and len(list(tmp_path.glob("*.npy"))) == 3
    index = next(i for i, name in enumerate(changed.ids) if name.endswith("/A1.jpg"))
    assert np.array_equal(changed.pixels.take(np.array([index]))[0], data.to_rgb(changed.open(index), 32))


def test_a_half_built_cache_is_never_used(asl, tmp_path):
    dataset = data.load_dataset("asl", ENTRY, asl)
    opened(dataset, tmp_path)
    file = next(tmp_path.glob("*.npy"))
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"garbage" * 99):
        file.write_bytes(broken)
        assert "decoded once" in opened(dataset, tmp_path) and file.read_bytes() == whole
    leftover = tmp_path / f".{file.name}.1.2.tmp"
    leftover.write_bytes(whole[:100])
    file.unlink()
    opened(dataset, tmp_path)
    assert not leftover.exists() and file.read_bytes() == whole


def test_two_runs_that_build_at_once_both_get_it_and_one_builds(asl, tmp_path):
    code = ("import cache, run, sys; d = run.data.load_dataset('asl', run.read_configs()['datasets']['asl'], sys.argv[1]); "
            "d.pixels, text = cache.open_pixels(d, 32, 'auto', sys.argv[2], 0); print(text, int(d.pixels.take(slice(None)).sum()))")
    runs = [subprocess.Popen([sys.executable, "-c", code, str(asl), str(tmp_path / "c")], stdout=subprocess.PIPE, text=True,
                             cwd=run.HERE) for _ in range(2)]
    told = [process.communicate()[0].split() for process in runs]
    assert told[0][-1] == told[1][-1] and len(list((tmp_path / "c").glob("*.npy"))) == 1 and not list((tmp_path / "c").glob(".*tmp"))


def test_a_broken_image_stops_the_build_and_leaves_the_others(asl, tmp_path):
    next(asl.rglob("B2.jpg")).write_bytes(b"not an image")
    with pytest.raises(UserError, match="B2.jpg: cannot be read as an image"):
        opened(dataset := data.load_dataset("asl", ENTRY, asl), tmp_path)
    assert len([p for p in tmp_path.iterdir() if p.suffix in (".npy", ".tmp")]) == 1
    rest = dataset.without([i for i in dataset.ids if i.endswith("B2.jpg")])
    assert "as decoded before" in opened(rest, tmp_path)
    direct = data.Decoded(rest, np.arange(29), 32)
    assert all((rest.pixels.take(np.array([i])) == direct.pixels(i)).all() for i in range(29))


def test_what_does_not_fit_is_decoded_every_epoch_and_said(asl, tmp_path, monkeypatch):
    dataset = data.load_dataset("asl", ENTRY, asl)
    monkeypatch.setattr(cache, "memory_bytes", lambda: 100)
    assert "would not stay in" in opened(dataset, tmp_path) and dataset.pixels is None
    monkeypatch.setattr(cache, "LEAST_FREE", 1e-12)
    assert "free in" in opened(dataset, tmp_path) and dataset.pixels is None and not list(tmp_path.glob("*.npy"))
    assert "decoded once" in opened(dataset, tmp_path, str(tmp_path))  # who names a folder has decided


def test_a_folder_that_cannot_be_written_is_an_error(asl, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*--cache DIR, or --cache off"):
        opened(data.load_dataset("asl", ENTRY, asl), tmp_path, str(tmp_path / "file"))


def test_batches_drawn_ahead_are_the_same_and_errors_come_through(monkeypatch):
    assert list(data.ahead(iter(range(100)))) == list(range(100))

    def fails():
        yield 1
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        list(data.ahead(fails()))
    endless = data.ahead(iter(int, 1))
    next(endless)
    endless.close()  # ends the thread


# --- listings


def test_a_listing_is_the_same_and_nothing_is_read_twice(asl, tmp_path, monkeypatch):
    plain, first = data.load_dataset("asl", ENTRY, asl), load(asl, tmp_path)
    read = []
    monkeypatch.setattr(data, "digests_of", lambda dataset, indices=None: read.append(list(indices)) or [])
    monkeypatch.setattr(os, "walk", lambda *_: pytest.fail("listed again"))
    again = load(asl, tmp_path)
    for dataset in (first, again):
        assert dataset.ids == plain.ids and dataset.digests == plain.digests and dataset.fingerprint() == plain.fingerprint()
        assert list(dataset.images) == list(plain.images) and dataset.classes == plain.classes
    assert read == [[]]


@pytest.mark.parametrize("change", ["content", "added", "removed", "class", "renamed"])
def test_what_changed_is_noticed(asl, tmp_path, change):
    load(asl, tmp_path)
    image = next(asl.rglob("B3.jpg"))
    if change == "content":
        draw_letter("Q", 7).save(image)
    elif change == "added":
        draw_letter("Q", 7).save(image.with_name("B99.jpg"))
    elif change == "removed":
        image.unlink()
    elif change == "renamed":
        image.rename(image.with_name("B77.jpg"))
    else:
        (image.parent.parent / "D").mkdir()
        draw_letter("D", 7).save(image.parent.parent / "D" / "D1.jpg")
    for _ in range(2):
        found, plain = load(asl, tmp_path), data.load_dataset("asl", ENTRY, asl)
        assert found.ids == plain.ids and found.fingerprint() == plain.fingerprint() and found.classes == plain.classes


def test_a_damaged_listing_costs_time_and_nothing_else(asl, tmp_path):
    load(asl, tmp_path)
    next(tmp_path.glob("listing-*.npz")).write_bytes(b"damaged")
    assert load(asl, tmp_path).fingerprint() == data.load_dataset("asl", ENTRY, asl).fingerprint()


def synthetic(count):
    """A listing of files that are not there, in 1,000 classes."""
    ids = [f"{i % 1000:03d}/{i:07d}.jpg" for i in range(count)]
    digests = [f"{i:032x}" for i in range(count)]
    return data.Dataset("synthetic", Path("."), [f"{i:03d}" for i in range(1000)], ids, np.arange(count) % 1000, data.Names(ids),
                        digests=digests)


def test_two_million_files_take_seconds_and_epochs_take_no_more_memory(capsys):
    start = time.perf_counter()
    dataset = synthetic(2_000_000)
    made = time.perf_counter()
    split = data.make_split(dataset, {"rule": "stratified", "val": 0.1, "test": 0.2}, 0)
    batches = data.Batches(dataset, split["train"], 32, 256, torch.device("cpu"), seed=0)
    seconds = time.perf_counter() - made
    tracemalloc.start()
    peaks = []
    for epoch in range(3):
        batches.order.epoch = epoch
        count = sum(len(rows) for rows in batches.order)
        assert count == len(batches) * 256 >= len(split["train"])
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[2] < 1.05 * peaks[0] and peaks[0] < 100 * 2**20
    with capsys.disabled():
        print(f"[2 million files: listed in {made - start:.1f} s, split and batched in {seconds:.1f} s]", end=" ")
