"""engine/cache.py: images decoded once and files hashed once, and made again when the data is another."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import draw_letter, hash_folder
from test_data import CONFIGS, load

import data
from engine import cache
from engine.dataset import to_rgb
from engine.files import UserError
from engine.loader import Batches, Decoded
from engine.settings import HERE


def opened(dataset, out, folder="auto", size=32):
    """The text of `open_pixels`, which sets `dataset.pixels`."""
    dataset.pixels = None
    return cache.open_pixels(dataset, {"image_size": size, "cache": str(folder), "out": out, "workers": 0})


def test_images_from_the_cache_are_those_that_decoding_gives(asl, tmp_path):
    before, dataset = hash_folder(asl), load("asl", asl)
    plain = list(Batches(dataset, dataset.ids[::-1], 32, 8, torch.device("cpu")))
    assert "30 images decoded once" in opened(dataset, tmp_path)
    cached = list(Batches(dataset, dataset.ids[::-1], 32, 8, torch.device("cpu")))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(plain, cached, strict=True))
    assert "as decoded before" in opened(dataset, tmp_path) and hash_folder(asl) == before
    assert opened(dataset, tmp_path, "off") is None and dataset.pixels is None
    assert "decoded once" in opened(dataset, tmp_path, tmp_path / "elsewhere")
    assert [len(list((tmp_path / name).glob("*.npy"))) for name in (".cache", "elsewhere")] == [1, 1]


def test_what_is_not_there_is_only_made_where_that_is_wanted(asl, tmp_path):
    dataset, config = load("asl", asl), {"image_size": 32, "cache": "auto", "out": tmp_path, "workers": 0}
    assert cache.open_pixels(dataset, config, build=False) is None and dataset.pixels is None
    assert not (tmp_path / ".cache").exists()
    cache.open_pixels(dataset, config)
    again = load("asl", asl)
    assert "as decoded before" in cache.open_pixels(again, config, build=False) and again.pixels.size == 32


def test_another_size_or_other_content_is_decoded_anew(asl, tmp_path):
    dataset = load("asl", asl)
    opened(dataset, tmp_path)
    assert "decoded once" in opened(dataset, tmp_path, size=48) and dataset.pixels.size == 48
    draw_letter("Z", 5).save(next(asl.rglob("A1.jpg")), quality=90)
    changed = load("asl", asl)
    assert "decoded once" in opened(changed, tmp_path) and len(list((tmp_path / ".cache").glob("*.npy"))) == 3
    index = next(i for i, name in enumerate(changed.ids) if name.endswith("/A1.jpg"))
    assert np.array_equal(changed.pixels.take(np.array([index]))[0], to_rgb(changed.open(index), 32))


def test_a_half_built_cache_is_never_used(asl, tmp_path):
    dataset = load("asl", asl)
    opened(dataset, tmp_path)
    file = next((tmp_path / ".cache").glob("*.npy"))
    content = file.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"garbage" * 99):
        file.write_bytes(broken)
        assert "decoded once" in opened(dataset, tmp_path) and file.read_bytes() == content
    leftover = file.with_name(f".{file.name}.1.2.tmp")
    leftover.write_bytes(content[:100])
    file.unlink()
    opened(dataset, tmp_path)
    assert not leftover.exists() and file.read_bytes() == content


BUILD = """
import sys, time
from test_data import load
from engine import cache

def slowly(*arguments):
    time.sleep(3)  # the other process has begun meanwhile
    print("decoded", end=" ")
    return decode_all(*arguments)

dataset, decode_all, cache._decode_all = load("asl", sys.argv[1]), cache._decode_all, slowly
cache.open_pixels(dataset, {"image_size": 32, "cache": sys.argv[2], "workers": 0})
print(int(dataset.pixels.take(list(range(len(dataset)))).sum()))
"""


@pytest.mark.slow
def test_two_runs_that_build_at_once_both_get_it_and_one_builds(asl, tmp_path):
    folder, environment = tmp_path / "c", os.environ | {"PYTHONPATH": f"{HERE}:{HERE / 'tests'}"}
    runs = [subprocess.Popen([sys.executable, "-c", BUILD, asl, folder], stdout=subprocess.PIPE, text=True,
                             env=environment) for _ in range(2)]
    words = sorted((process.communicate()[0].split() for process in runs), key=len)
    assert [len(line) for line in words] == [1, 2] and words[1] == ["decoded", words[0][0]]
    assert len(list(folder.glob("*.npy"))) == 1 and not list(folder.glob(".*tmp"))


def test_a_broken_image_stops_the_build_and_leaves_the_others(asl, tmp_path):
    next(asl.rglob("B2.jpg")).write_bytes(b"not an image")
    with pytest.raises(UserError, match="B2.jpg: cannot be read as an image"):
        opened(dataset := load("asl", asl), tmp_path)
    assert len([p for p in (tmp_path / ".cache").iterdir() if p.suffix in (".npy", ".tmp")]) == 1
    rest = dataset.without([i for i in dataset.ids if i.endswith("B2.jpg")])
    assert "as decoded before" in opened(rest, tmp_path)
    direct = Decoded(rest, np.arange(29), 32)
    assert all((rest.pixels.take(np.array([i])) == direct.pixels(i)).all() for i in range(29))


def test_what_does_not_fit_is_decoded_every_epoch_and_the_text_gives_the_reason(asl, tmp_path, monkeypatch):
    dataset = load("asl", asl)
    monkeypatch.setattr(cache, "memory_bytes", lambda: 100)
    assert "would not stay in" in opened(dataset, tmp_path) and dataset.pixels is None
    monkeypatch.setattr(cache, "LEAST_FREE", 1e-12)
    assert "free in" in opened(dataset, tmp_path) and dataset.pixels is None and not list(tmp_path.rglob("*.npy"))
    assert "decoded once" in opened(dataset, tmp_path, tmp_path)  # who names a folder has decided


def test_a_folder_that_cannot_be_written_is_an_error(asl, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*--cache DIR, or --cache off"):
        opened(load("asl", asl), tmp_path, tmp_path / "file")


# --- digests


def remembered(asl, out):
    """The dataset as a run with its cache in `out` has it, which keeps the digests."""
    dataset = data.load_dataset({"dataset": "asl", "dataset_entry": CONFIGS["datasets"]["asl"], "data_dir": asl,
                                 "classes": None, "cache": "auto", "out": out})
    cache.keep_digests(dataset)
    return dataset


@pytest.fixture
def hashed(monkeypatch):
    """How many files each dataset had hashed, where not all of them."""
    counts, real = [], cache.digests_of

    def digests_of(dataset, indices=None):
        if indices is not None:
            counts.append(len(indices))
        return real(dataset, indices)

    monkeypatch.setattr(cache, "digests_of", digests_of)
    return counts


def test_remembered_digests_are_the_same_and_no_file_is_read_twice(asl, tmp_path, hashed):
    plain, before = load("asl", asl), hash_folder(asl)
    for dataset in (remembered(asl, tmp_path), remembered(asl, tmp_path)):
        assert dataset.ids == plain.ids and dataset.digests == plain.digests
        assert dataset.fingerprint == plain.fingerprint and dataset.classes == plain.classes
        assert list(dataset.images) == list(plain.images)
    assert hashed == [30, 0] and hash_folder(asl) == before
    assert [path.name.partition("-")[0] for path in (tmp_path / ".cache").iterdir()] == ["digests"]


@pytest.mark.parametrize("change", ["content", "added", "removed", "class", "renamed"])
def test_what_changed_is_noticed_and_nothing_else_is_read_again(asl, tmp_path, change, hashed):
    remembered(asl, tmp_path)
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
        found, plain = remembered(asl, tmp_path), load("asl", asl)
        assert found.ids == plain.ids and found.fingerprint == plain.fingerprint and found.classes == plain.classes
    assert hashed == [30, change != "removed", 0]


def test_a_file_that_could_not_be_read_is_hashed_again_next_time(asl, tmp_path, hashed, monkeypatch):
    real = cache.read_file

    def unreadable(path):
        if path.endswith("B3.jpg"):
            raise OSError("stale file handle")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_file", unreadable)
        assert cache.NOT_READ in remembered(asl, tmp_path).digests
    assert remembered(asl, tmp_path).digests == load("asl", asl).digests and hashed[-1] == 1


@pytest.mark.parametrize("content", [b"damaged", b"", b"\xff", b"[]", b"null", b'{"A1.jpg": 3}', b'{"A1.jpg": []}'])
def test_damaged_digests_cost_time_and_nothing_else(content, asl, tmp_path, hashed):
    remembered(asl, tmp_path)
    next((tmp_path / ".cache").glob("digests-*.json")).write_bytes(content)
    assert remembered(asl, tmp_path).fingerprint == load("asl", asl).fingerprint
    assert remembered(asl, tmp_path).fingerprint == load("asl", asl).fingerprint and hashed == [30, 30, 0]


def test_digests_that_cannot_be_kept_cost_time_and_nothing_else(asl, tmp_path, hashed):
    (tmp_path / ".cache").write_text("")
    for _ in range(2):
        assert remembered(asl, tmp_path).fingerprint == load("asl", asl).fingerprint
    assert hashed == [30, 30]
