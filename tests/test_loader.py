"""engine/loader.py: from image files to batches, every image of an epoch once."""

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_classes
from PIL import Image
from test_data import MEAN, STD, STRATIFIED, alike, load

from engine import loader
from engine.dataset import Dataset, Names, Pixels, to_rgb
from engine.files import UserError
from engine.loader import Batches, Order, ahead, pixels_of, prepare, sent
from engine.split import make_split
from staged import with_erased

CPU = torch.device("cpu")


def test_an_epoch_has_every_image_in_batches_of_one_size():
    found = load("digits", None)
    batches = Batches(found, found.ids[:100], 8, 32, CPU, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        batches.order.epoch = epoch
        assert [len(labels) for _, labels in batches] == [32] * 4
        orders.append([list(b) for b in batches.order])
        assert set(sum(orders[-1], [])) == set(range(100))
    assert orders[0] == orders[2] != orders[1]


def test_weights_draw_images_more_often_in_an_epoch_of_the_same_length():
    weights = np.where(np.arange(100) < 10, 20, 1)
    order, drawn = Order(100, 20, seed=3, weights=weights), np.zeros(100)
    for order.epoch in range(400):
        assert order.rows().shape == (5, 20)
        drawn += np.bincount(order.rows().ravel(), minlength=100)
    assert drawn[:10].mean() / drawn[10:].mean() == pytest.approx(20, rel=0.05)  # 100 of 290, none of them twice
    assert np.array_equal(order.rows(), order.rows())
    plain = Order(100, 20, seed=3).rows()
    assert np.array_equal(Order(100, 20, seed=3, weights=np.ones(100, dtype=int)).rows(), plain)


def test_batches_from_files_and_from_memory_are_alike(tmp_path):
    found = load("digits", None)
    for i in range(24):
        folder = tmp_path / str(found.labels[i])
        folder.mkdir(exist_ok=True)
        Image.fromarray(found.images[i]).save(folder / f"{i:04d}.png")
    files = load("folder", tmp_path)
    order = sorted(range(24), key=lambda i: (found.labels[i], i))
    from_files = list(Batches(files, files.ids, 16, 10, CPU, workers=1))
    in_memory = list(Batches(found, [found.ids[i] for i in order], 16, 10, CPU))
    assert [len(labels) for _, labels in from_files] == [10, 10, 4]
    for (a, b), (c, d) in zip(from_files, in_memory, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_a_broken_image_is_an_error_that_names_it(tmp_path):
    draw_classes(tmp_path, frames=4)
    (tmp_path / "B" / "B2.jpg").write_bytes((tmp_path / "B" / "B2.jpg").read_bytes()[:200])
    for workers in (0, 1):
        batches = Batches(found := load("folder", tmp_path), found.ids, 32, 4, CPU, workers)
        with pytest.raises(UserError, match=r"^\S*/B/B2.jpg: cannot be read as an image \(.*\)$"):
            list(batches)


def test_images_are_normalised_and_their_pixels_can_be_had_back():
    images = prepare(alike(), MEAN, STD)
    torch.testing.assert_close(images, (alike() / 255 - 0.5) / 0.25)
    assert torch.equal(pixels_of(images, MEAN, STD), alike())


def test_batches_drawn_ahead_are_the_same_and_errors_come_through():
    assert list(ahead(iter(range(100)))) == list(range(100))

    def fails():
        yield 1
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        list(ahead(fails()))
    endless = ahead(iter(int, 1))
    next(endless)
    endless.close()  # ends the thread


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("budget, expected", [("equal", [0, None, None, 3]), ("extra", [0, 1, 2, 3, None, None])])
def test_erased_copies_replace_their_originals_or_come_on_top(budget, expected, in_memory, tmp_path):
    found = load("digits", None)
    if in_memory:
        found.pixels = Pixels(np.stack([to_rgb(found.open(i), 8) for i in range(len(found))]))
    for i in (1, 2):
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"source": found.ids[i], "file": f"{i}.png"} for i in (1, 2)]
    joined, ids, copies = with_erased(found, found.ids[:4], rows, tmp_path, budget)
    pixels, labels = next(iter(Batches(joined, ids, 8, 10, CPU)))
    originals, _ = next(iter(Batches(found, found.ids[:4], 8, 10, CPU)))
    assert len(copies) == 2 and [i in copies for i in ids] == [e is None for e in expected]
    assert (joined.pixels is not None) == in_memory
    grey = iter((10, 20))
    for image, index in zip(pixels, expected, strict=True):
        assert image.eq(next(grey)).all() if index is None else torch.equal(image, originals[index])
    of_copies = [int(label) for label, index in zip(labels, expected) if index is None]
    assert of_copies == found.labels[1:3].tolist()


def synthetic(count):
    """A dataset of files that are not there, in 1,000 classes."""
    ids = [f"{i % 1000:03d}/{i:07d}.jpg" for i in range(count)]
    digests = [f"{i:032x}" for i in range(count)]
    return Dataset("synthetic", Path("."), [f"{i:03d}" for i in range(1000)], ids, np.arange(count) % 1000, Names(ids),
                   digests=digests)


@pytest.mark.slow
def test_two_million_files_take_seconds_and_epochs_take_no_more_memory(capsys):
    start = time.perf_counter()
    dataset = synthetic(2_000_000)
    made = time.perf_counter()
    split = make_split(dataset, STRATIFIED, 0)
    batches = Batches(dataset, split["train"], 32, 256, CPU, seed=0)
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


@pytest.mark.parametrize("device, waits", [("cuda", False), ("mps", True), ("cpu", False)])
def test_a_copy_waits_on_apples_devices_alone(device, waits):
    class Tensor:
        def to(self, device, non_blocking):
            return device, non_blocking

    assert sent(Tensor(), torch.device(device)) == (torch.device(device), not waits)


# Shared memory.


@pytest.mark.parametrize("free", [0, 2**40])
def test_batches_come_through_shared_memory_where_it_has_room_and_are_the_same(free, asl, monkeypatch):
    dataset, sent_as = load("asl", asl), []
    plain = list(Batches(dataset, dataset.ids, 32, 8, CPU))
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: type("", (), {"free": free}))
    monkeypatch.setattr(loader, "as_arrays", lambda items, real=loader.as_arrays: sent_as.append(1) or real(items))
    batches = Batches(dataset, dataset.ids, 32, 8, CPU, workers=0)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(plain, batches, strict=True))
    assert bool(sent_as) == (free == 0)


def test_where_there_is_no_such_place_it_has_room(monkeypatch):
    monkeypatch.setattr(loader, "SHARED", "/nowhere")
    assert loader.fits_shared(2**60)


class Lost(torch.utils.data.Dataset):
    """A batch of it cannot be sent to another process."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


def as_lost(items):
    return lambda: items


def test_a_batch_that_cannot_be_sent_ends_the_process_where_one_would_wait_for_ever():
    batches = torch.utils.data.DataLoader(Lost(), batch_size=2, num_workers=1, collate_fn=as_lost, timeout=60,
                                          worker_init_fn=loader.end_if_lost)
    with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
        list(batches)
