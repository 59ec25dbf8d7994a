"""What need not be done twice: images decoded and resized once, files listed and hashed once.

    dataset = load_dataset("asl", entry, "data/asl", "runs/.cache")             # as data.load_dataset, from the listing kept there
    dataset.pixels, text = open_pixels(dataset, 224, "auto", "runs/.cache", 8)  # uint8 [N, 224, 224, 3], mapped from a file

Both live in one folder, which may be removed at any time: what is missing is made again. A file there is named after the content that it
was made from, so that data that changed has another; it gets its name only when it is whole, so that a half-built one is never
used; and a lock keeps two runs from building the same one side by side.
"""

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

import data
from data import UserError

VERSION = 1  # of `data.to_rgb` and of the files here: other pixels need another number
LEAST_FREE = 0.5  # of the disk's free space, --cache auto takes at most this much
MEMORY_SHARE = 0.8  # and no more than this of the memory, for what the system cannot keep there it reads from the disk again and again

# --- decoded images ------------------------------------------------------------------------------------------------


def open_pixels(dataset, size, cache, folder, workers, build=True):
    """All images of a dataset, decoded, as `data.Pixels`, or None; and what to say of it, or None.

    cache: "off"; "auto": where it fits the disk that `folder` is on; or a folder, which then must hold it. workers: processes that decode.
    build: whether to make what is not there. Small datasets that come as arrays are simply kept in memory. Raises UserError where an
    image cannot be read or the folder cannot be written.
    """
    needed = len(dataset) * size * size * 3
    if dataset.in_memory and needed <= data.RESIDENT_BYTES:
        everything = data.Decoded(dataset, np.arange(len(dataset)), size)
        return data.Pixels(np.stack([everything.pixels(i) for i in range(len(dataset))])), None
    if cache == "off":
        return None, None
    folder = Path(folder if cache == "auto" else cache)
    path = _pixel_file(folder, dataset, size)
    if found := _mapped(path, len(dataset), size):
        return found, f"{path}: images as decoded before"
    if not build:
        return None, None
    if cache == "auto" and (why := _does_not_fit(folder, needed)):
        return None, f"images are decoded anew in every epoch: {why}; --cache DIR keeps them in another folder"
    with _writing(folder, path):
        if not (found := _mapped(path, len(dataset), size)):  # or another run has just made it
            bad = _decode_all(dataset, size, path, workers)
            for index, wrong in bad.items():
                raise UserError(f"{dataset.where(index)}: cannot be read as an image ({wrong})")
            found = _mapped(path, len(dataset), size)
    return found, f"{path}: {len(dataset)} images decoded once, {needed / 2**20:.0f} MB"


def check_images(dataset, size, cache, folder, workers):
    """Decode every image once, to see whether it can be used. Returns {index: what is wrong with it}.

    Arguments as for `open_pixels`, which finds the pixels of those that can be used, where they are kept. What was found is remembered, so
    that the same files are not looked at again, but not with --cache off.
    """
    if dataset.in_memory:
        return {}
    if cache == "off":
        return _decode_all(dataset, size, None, workers)
    folder = Path(folder if cache == "auto" else cache)
    path = _pixel_file(folder, dataset, size)
    found = path.with_name(f"checked-{path.stem}.json")

    def known():
        try:
            return {int(index): wrong for index, wrong in json.loads(found.read_text("utf-8")).items()}
        except (OSError, ValueError, AttributeError):
            return {} if _mapped(path, len(dataset), size) else None

    if (bad := known()) is not None:
        return bad
    needed = len(dataset) * size * size * 3
    with _writing(folder, path):
        if (bad := known()) is None:
            bad = _decode_all(dataset, size, None if cache == "auto" and _does_not_fit(folder, needed) else path, workers)
            text = json.dumps(bad)
            data.write_atomically(found, lambda file: file.write(text.encode()))
    return bad


def _pixel_file(folder, dataset, size):
    key = hashlib.blake2b(f"{VERSION} {size} {''.join(dataset.digests)}".encode(), digest_size=12).hexdigest()
    return folder / f"{dataset.name}-{size}-{key}.npy"


def _mapped(path, count, size):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return data.Pixels(array) if array.shape == (count, size, size, 3) and array.dtype == np.uint8 else None


def _does_not_fit(folder, needed):
    """Why --cache auto leaves it, or None."""
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


def _decode_all(dataset, size, path, workers):
    """Decode every image. Returns {index: what is wrong with it} of those that cannot be used.

    path: where the pixels of the whole dataset go, or None; where some images are bad, those of the others go under the name that a dataset
    without these has. They are written image after image: a disk that fills up is then an error, where a mapped file would be a crash.
    """
    loader = torch.utils.data.DataLoader(data.Checked(dataset, np.arange(len(dataset)), size), batch_size=32, num_workers=workers,
                                         collate_fn=data.Checked.collate)
    bad = {}

    def write(file):
        def header(count):
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)})

        if file:
            header(len(dataset))
        for number, (images, wrong) in enumerate(track(loader, "decoding", transient=True, disable=len(dataset) < 1000)):
            bad.update((number * loader.batch_size + i, text) for i, text in enumerate(wrong) if text is not None)
            if file and images is not None:
                file.write(images.numpy())
        if file and bad:  # the header's length leaves room for any count
            file.seek(0)
            header(len(dataset) - len(bad))

    if path is None:
        write(None)
        return bad
    data.write_atomically(path, write)
    if bad:
        with contextlib.suppress(UserError):  # a class that has none left
            os.replace(path, _pixel_file(path.parent, dataset.without(dataset.ids[i] for i in bad), size))
        path.unlink(missing_ok=True)
    return bad


@contextlib.contextmanager
def _writing(folder, path):
    """What is made at `path` in the cache's folder, by one process at a time; UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another folder with --cache DIR, or "
                        "--cache off") from None


@contextlib.contextmanager
def _locked(path):
    """Only one process at a time, where the system has such locks; a dead process holds none."""
    with open(path.with_name(f".{path.name}.lock"), "wb") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


# --- listings ------------------------------------------------------------------------------------------------------


def load_dataset(name, entry, root, folder, classes=None):
    """As `data.load_dataset`. Files are listed and hashed only where folder or file have another time or size than last time.

    folder: where the listing is kept; `keep_listing` writes it, once it is clear that there will be a run. One that cannot be read or
    written costs time and nothing else.
    """
    if entry["layout"] == "digits" or not Path(root or ".").is_dir():
        return data.load_dataset(name, entry, root, classes)
    key = hashlib.blake2b(json.dumps([VERSION, str(Path(root).resolve()), entry], sort_keys=True).encode("utf-8", "surrogateescape"),
                          digest_size=12).hexdigest()
    path = Path(folder) / f"listing-{key}.npz"
    kept = _read_listing(path)
    unchanged = kept is not None and _unchanged(kept)
    dataset = _listed(name, root, kept) if unchanged and entry["layout"] == "folders" else None
    dataset = dataset or data.LAYOUTS[entry["layout"]](name, entry, Path(root))
    if isinstance(dataset.images, data.Names):
        sizes, times = _stat(dataset.images)
        _hash_what_changed(dataset, sizes, times, kept)
        if not unchanged or not np.array_equal(kept["times"], times):
            dataset.unwritten = path, sizes, times
    else:
        dataset.digests = data.digests_of(dataset)
    return dataset.chosen(classes)


def keep_listing(dataset):
    """Write the listing of a dataset that `load_dataset` gave, if it is not there as it should be."""
    whole = dataset.listing or dataset
    if hasattr(whole, "unwritten"):
        _write_listing(whole, *whole.__dict__.pop("unwritten"))


def _read_listing(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except Exception:  # numpy and zipfile raise many kinds for a damaged file, which is then made again
        return None


def _texts(array):
    return array.tobytes().decode("utf-8", "surrogateescape").split("\0") if len(array) else []


def _bytes(texts):
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _times_of(folders):
    def time_of(folder):
        try:
            return os.stat(folder).st_mtime_ns
        except OSError:
            return -1

    return np.array([time_of(folder) for folder in folders], dtype=np.int64)


def _unchanged(kept):
    """Whether no folder has got, lost or renamed a file since."""
    return np.array_equal(kept["folder_times"], _times_of(_texts(kept["folders"])))


def _listed(name, root, kept):
    ids, parts = _texts(kept["ids"]), _texts(kept["parts"])
    return data.Dataset(name, Path(root), _texts(kept["classes"]), ids, kept["labels"],
                        data.Names(f"{root}{os.sep}{i}" for i in ids), parts or None)


def _stat(files):
    """Sizes and modification times, int64 [N] each; -1 where a file cannot be asked."""
    def ask(block):
        found = np.full((len(block), 2), -1, dtype=np.int64)
        for row, index in enumerate(block):
            with contextlib.suppress(OSError):
                status = os.stat(files[index])
                found[row] = status.st_size, status.st_mtime_ns
        return found

    blocks = np.array_split(np.arange(len(files)), max(1, len(files) // 1000))
    with ThreadPoolExecutor(data.HASH_THREADS) as pool:
        return np.concatenate(list(pool.map(ask, blocks))).T


def _hash_what_changed(dataset, sizes, times, kept):
    """Fill `dataset.digests`, from the listing where size and time are what they were."""
    digests, again = [None] * len(dataset), range(len(dataset))
    if kept:
        place = {image_id: i for i, image_id in enumerate(_texts(kept["ids"]))}
        hexes = kept["digests"].tobytes().hex()
        old = np.array([place.get(image_id, -1) for image_id in dataset.ids], dtype=np.int64)
        same = (old >= 0) & (kept["sizes"][old] == sizes) & (kept["times"][old] == times) & (times >= 0)
        same &= np.array([not hexes.startswith(data.NOT_READ, 32 * o) for o in old], dtype=bool)  # it may be readable by now
        for i in np.flatnonzero(same):
            digests[i] = hexes[32 * old[i]:32 * old[i] + 32]
        again = np.flatnonzero(~same).tolist()
    for i, digest in zip(again, data.digests_of(dataset, again)):
        digests[i] = digest
    dataset.digests = digests


def _write_listing(dataset, path, sizes, times):
    folders = sorted({str(dataset.root), *(folder for folder, *_ in os.walk(dataset.root))})
    arrays = {"ids": _bytes(dataset.ids), "classes": _bytes(dataset.classes), "labels": dataset.labels, "sizes": sizes, "times": times,
              "parts": _bytes(dataset.parts or []), "digests": np.frombuffer(bytes.fromhex("".join(dataset.digests)), np.uint8),
              "folders": _bytes(folders), "folder_times": _times_of(folders)}
    with contextlib.suppress(UserError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        data.write_atomically(path, lambda file: np.savez(file, **arrays))
