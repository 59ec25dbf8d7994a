"""What need not be done twice: images decoded and resized once, files hashed once.

Both live in one folder (`--cache`), which may be removed at any time: what is missing is made again. Decoded images
lie in a file named after the content that they were made from, so that data that changed has another; it gets its name
only when it is complete, and a lock keeps two runs from building the same one side by side.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from engine.dataset import ALL_LEVELS, LEVELS, Names, Pixels, read_file
from engine.display import progress
from engine.files import UserError, lock, write_atomically
from engine.loader import RESIDENT_BYTES, Checked, Decoded, end_if_lost

VERSION = 1  # of `dataset.to_rgb` and of the files here: other pixels need another number
LEAST_FREE = 0.5  # of the disk's free space, --cache auto takes at most this much
MEMORY_SHARE = 0.8  # and of the memory: what the system cannot keep there it reads from the disk again and again
HASH_THREADS = 8  # reading files waits for the disk, so more threads than cores
NOT_READ = "0" * 32  # the digest of a file that cannot be read


def cache_folder(config):
    """Where decoded images and digests are kept: as the settings have it, or beside the runs."""
    return Path(config["out"]) / ".cache" if config["cache"] in ("auto", "off") else Path(config["cache"])


def decoding_workers(config):
    """Processes that decode images: as configured, or one per core, 8 at most."""
    return config["workers"] if config["workers"] is not None else min(8, os.cpu_count() or 1)


def open_pixels(dataset, config, build=True):
    """Set `dataset.pixels`, all images decoded at config["image_size"], and return what to print of it, or None.

    --cache off: none; auto: where they fit the disk; or a folder, which then must hold them. build: whether to make
    what is not there. Small datasets that come as arrays are kept in memory. Raises UserError.
    """
    size, count = config["image_size"], len(dataset)
    needed = count * size * size * 3
    if isinstance(dataset.images, np.ndarray) and needed <= RESIDENT_BYTES:
        every = Decoded(dataset, np.arange(count), size)
        dataset.pixels = Pixels(np.stack([every.pixels(i) for i in range(count)]))
        return None
    if config["cache"] == "off":
        return None
    folder = cache_folder(config)
    path = _pixel_file(folder, dataset, size)
    dataset.pixels = _mapped(path, count, size)
    if dataset.pixels:
        return f"{path}: images as decoded before"
    if not build:
        return None
    if config["cache"] == "auto" and (why := _does_not_fit(folder, needed)):
        return f"images are decoded anew in every epoch: {why}; --cache DIR keeps them in another folder"
    with _writing(folder, path):
        dataset.pixels = _mapped(path, count, size)  # another run may just have made it
        if not dataset.pixels:
            for index, wrong in _decode_all(dataset, size, path, decoding_workers(config)).items():
                raise UserError(f"{dataset.where(index)}: cannot be read as an image ({wrong})")
            dataset.pixels = _mapped(path, count, size)
    return f"{path}: {count} images decoded once, {needed / 2**20:.0f} MB"


def check_images(dataset, config):
    """Decode every image once, to see whether it can be used. Returns {index: what is wrong with it}.

    Sets `dataset.levels`. `open_pixels` finds the pixels of those that can be used, where they are kept. The result is
    remembered, so that the same files are not decoded again, but not with --cache off.
    """
    size, workers = config["image_size"], decoding_workers(config)
    if isinstance(dataset.images, np.ndarray):
        return {}
    if config["cache"] == "off":
        return _decode_all(dataset, size, None, workers, new=True)
    folder = cache_folder(config)
    path = _pixel_file(folder, dataset, size)
    found = path.with_name(f"seen-{path.stem}.json")

    def known():
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):  # it is not there, or damaged
            seen = json.loads(found.read_text("utf-8"))
            dataset.levels = LEVELS[LEVELS.index(seen.pop("levels"))]
            return {int(index): wrong for index, wrong in seen.items()}

    if (bad := known()) is not None:
        return bad
    fits = config["cache"] != "auto" or not _does_not_fit(folder, len(dataset) * size * size * 3)
    with _writing(folder, path):
        if (bad := known()) is None:
            bad = _decode_all(dataset, size, path if fits else None, workers, new=True)
            text = json.dumps(bad | {"levels": dataset.levels})
            write_atomically(found, lambda file: file.write(text.encode()))
    return bad


def _pixel_file(folder, dataset, size):
    levels = f"{dataset.levels} " * (dataset.levels != ALL_LEVELS)
    key = hashlib.blake2b(f"{VERSION} {size} {levels}{''.join(dataset.digests)}".encode(), digest_size=12).hexdigest()
    return folder / f"{dataset.name}-{size}-{key}.npy"


def _mapped(path, count, size):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return Pixels(array) if array.shape == (count, size, size, 3) and array.dtype == np.uint8 else None


def _does_not_fit(folder, needed):
    """Why --cache auto keeps no decoded images, or None."""
    there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free, memory = shutil.disk_usage(there).free, memory_bytes()
    if needed > LEAST_FREE * free:
        return f"their cache would take {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB free in {there}"
    if memory and needed > MEMORY_SHARE * memory:
        return f"their cache of {needed / 2**30:.1f} GiB would not stay in {memory / 2**30:.1f} GiB of memory"
    return None


def memory_bytes():
    """Memory of this machine, or of the container that we are in; None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(limit).read_text()))
    return min(found, default=None)


def _decode_all(dataset, size, path, workers, new=False):
    """Decode every image. Returns {index: what is wrong with it} of those that cannot be used.

    path: where the pixels go, or None; where some images are bad, those of the others go under the name that a dataset
    without these has. They are written image by image: a full disk is then an error, where a mapped file would crash.
    new: of a new run, which finds the dataset's `levels`; where they are fewer, all is decoded once more with these.
    """
    loader = torch.utils.data.DataLoader(Checked(dataset, np.arange(len(dataset)), size), batch_size=32,
                                         num_workers=workers, collate_fn=Checked.collate, worker_init_fn=end_if_lost)
    bad = {}

    def header(file, count):
        about = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
        np.lib.format.write_array_header_1_0(file, about)

    def write(file):
        """Note in `bad` what cannot be used, and put the rest into the file, if there is one; again at fewer levels."""
        if file:
            file.seek(0)
            header(file, len(dataset))
        largest = 0
        for number, (images, wrong, value) in enumerate(progress(loader, f"decoding {len(dataset)} images, batch")):
            largest = max(largest, value)
            bad.update((number * loader.batch_size + i, text) for i, text in enumerate(wrong) if text is not None)
            if file and images is not None:
                file.write(images)
        if file and bad:  # the header's length leaves room for any count
            file.seek(0)
            header(file, len(dataset) - len(bad))
        fitting = next(top for top in LEVELS if largest <= top)
        if new and largest and fitting < dataset.levels:
            dataset.levels = fitting
            write(file)

    if path is None:
        write(None)
        return bad
    write_atomically(path, write)
    with contextlib.suppress(UserError):  # a class that has none left
        os.replace(path, _pixel_file(path.parent, dataset.without([dataset.ids[i] for i in bad]), size))
    if bad:
        path.unlink(missing_ok=True)
    return bad


@contextlib.contextmanager
def _writing(folder, path):
    """What is made at `path` in the cache's folder, by one process at a time; UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(path.with_name(f".{path.name}.lock"), wait=True):
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)
            yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another folder with --cache "
                        "DIR, or --cache off") from None


def set_digests(dataset, config):
    """Set `dataset.digests`; files are read only where size or time differ from those of the last run's list.

    `keep_digests` writes the list, once there will be a run. One that cannot be read or written costs time alone.
    """
    if config["cache"] == "off" or not isinstance(dataset.images, Names):
        dataset.digests = digests_of(dataset)
        return
    place = f"{VERSION} {Path(dataset.root).resolve()}".encode("utf-8", "surrogateescape")
    path = cache_folder(config) / f"digests-{hashlib.blake2b(place, digest_size=12).hexdigest()}.json"
    try:
        listed = json.loads(path.read_text("utf-8", "surrogateescape")).items()
        known = {image_id: (sign, digest) for image_id, (sign, digest) in listed}
    except (OSError, ValueError, TypeError, AttributeError):  # it is not there, or damaged
        known = {}
    signs = _signs(dataset.images)
    old = [known.get(image_id, (None, NOT_READ)) for image_id in dataset.ids]
    again = [i for i, (sign, digest) in enumerate(old) if sign != signs[i] or digest == NOT_READ]  # now readable, maybe
    dataset.digests = [digest for _, digest in old]
    for i, digest in zip(again, digests_of(dataset, again)):
        dataset.digests[i] = digest
    if again:
        dataset.unwritten = path, dict(zip(dataset.ids, zip(signs, dataset.digests)))


def keep_digests(dataset):
    if dataset.unwritten:
        path, known = dataset.unwritten
        content, dataset.unwritten = json.dumps(known).encode("utf-8", "surrogateescape"), None
        with contextlib.suppress(UserError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write(content))


def _signs(files):
    """Size and time of each file, as one text; None where it cannot be asked for them."""
    def ask(block):
        signs = [None] * len(block)
        for place, index in enumerate(block.tolist()):
            with contextlib.suppress(OSError):
                status = os.stat(files[index])
                signs[place] = f"{status.st_size} {status.st_mtime_ns}"
        return signs

    # A task for each of a million files takes ten times as long, and gigabytes.
    blocks = np.array_split(np.arange(len(files)), max(1, len(files) // 1000))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(itertools.chain.from_iterable(pool.map(ask, blocks)))


def digests_of(dataset, indices=None):
    """Hex hashes of the content of images number `indices`, by default of all; NOT_READ where one cannot be read."""
    indices = range(len(dataset)) if indices is None else indices

    def content(index):
        if isinstance(dataset.images, Names):
            return read_file(dataset.images[index])
        if isinstance(dataset.images, np.ndarray):
            return dataset.images[index].tobytes()
        image = dataset.open(index)
        return f"{image.size}{image.mode}".encode() + image.tobytes()

    def digest(index):
        try:
            return hashlib.blake2b(content(index), digest_size=16).hexdigest()
        except Exception:  # Pillow's plugins raise anything
            return NOT_READ

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        hashes = pool.map(digest, indices)
        return list(progress(hashes, "reading images", len(indices)))
