"""From image files to batches on the device.

    batches = Batches(dataset, split["train"], size=224, batch_size=64, device=device, seed=0)
    for pixels, labels in batches: ...                        # uint8 [B, 3, 224, 224], int64 [B]
    images = prepare(pixels, mean, std)                       # float32, normalised
"""

import collections
import hashlib
import io
import math
import multiprocessing.queues
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from engine.chance import numpy_generator
from engine.dataset import Names, is_deep, largest_value, read_file, reason, to_rgb
from engine.decoy import swatch
from engine.files import UserError

RESIDENT_BYTES = 2**30  # decoded images stay on the device where they take at most this much
SHARED = "/dev/shm"  # where processes of Linux hand over tensors; 64 MB in a container of Docker
SPARE = 2  # times what one loader needs there: another one, or another run, may be at work


class Decoded(torch.utils.data.Dataset):
    """Images `indices` of a Dataset as (uint8 tensor [3, size, size], label); what DataLoader workers run."""

    def __init__(self, dataset, indices, size):
        self.dataset, self.indices, self.size, self.digests = dataset, indices, size, None
        if isinstance(dataset.images, Names) and dataset.digests:  # as bytes in one array, for Names' reason
            hexes = "".join(dataset.digests[i] for i in indices)
            self.digests = np.frombuffer(bytes.fromhex(hexes), np.uint8).reshape(-1, 16)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, position):
        label = int(self.dataset.labels[self.indices[position]])
        return torch.from_numpy(self.pixels(position).copy()).permute(2, 0, 1), label

    def pixels(self, position):
        """uint8 [size, size, 3]. Raises UserError naming what cannot be read, or has changed since it was listed."""
        index = int(self.indices[position])
        try:
            return to_rgb(self._open(index, position), self.size, self.dataset.levels)
        except Exception as error:  # Pillow's plugins raise anything
            raise UserError(f"{self.dataset.where(index)}: cannot be read as an image ({reason(error)})") from None

    def _open(self, index, position):
        if not isinstance(self.dataset.images, Names):
            return self.dataset.open(index)
        content = read_file(self.dataset.images[index])
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if self.digests is not None and digest != self.digests[position].tobytes():
            raise OSError("its content has changed since the dataset was listed; put it back")
        return Image.open(io.BytesIO(content))


class Checked(Decoded):
    """As Decoded: (uint8 array [size, size, 3], None, `largest_value` or 0), or (None, what is wrong with it, 0)."""

    def __getitem__(self, position):
        try:
            image = self._open(int(self.indices[position]), position)
            deep, pixels = is_deep(image), to_rgb(image, self.size, self.dataset.levels)
            return pixels, None, largest_value(image) if deep else 0
        except Exception as error:  # Pillow's plugins raise anything
            return None, reason(error), 0

    @staticmethod
    def collate(items):
        """A batch: uint8 array [those that can be read, size, size, 3]; for all what is wrong or None; the largest."""
        images = [image for image, wrong, _ in items if wrong is None]
        return np.stack(images) if images else None, [wrong for _, wrong, _ in items], max(top for *_, top in items)


def as_arrays(items):
    """A batch of `Decoded` as arrays, which processes send through a pipe: slower than tensors in shared memory."""
    images, labels = zip(*items)
    return np.stack([image.numpy() for image in images]), np.array(labels, dtype=np.int64)


def fits_shared(needed):
    """Whether shared memory has room for so many bytes; also where it has no place of its own, as outside of Linux."""
    try:
        return shutil.disk_usage(SHARED).free > SPARE * needed
    except OSError:
        return True


def end_if_lost(_):
    """In a process that decodes: end where a batch cannot be sent, for which the other side would wait for ever."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))


class Order:
    """Batches of positions: shuffled anew each epoch, every batch of the same size.

    The order of an epoch follows from (seed, epoch) alone. The last batch is filled up from the epoch's beginning, so
    that every image is seen in every epoch and no batch has another shape. rank, ranks: of each batch this process
    takes the rank-th of `ranks` equal parts. Set `epoch`, and `start` to leave out an epoch's first batches. weights:
    int64 [length], or None: then an epoch draws `length` images among all, each as many times as its weight.
    """

    def __init__(self, length, batch_size, seed, rank=0, ranks=1, weights=None):
        self.length, self.seed, self.epoch, self.start = length, seed, 0, 0
        self.weights = weights
        self.batch_size = max(min(batch_size, length) // ranks, 1)  # of this process
        self.rank, self.ranks = rank, ranks

    def __len__(self):
        return math.ceil(self.length / (self.batch_size * self.ranks))

    def rows(self):
        """Positions of an epoch's images, int64 [batches, batch_size of all ranks]."""
        order = self.length if self.weights is None else np.repeat(np.arange(self.length), self.weights)
        order = numpy_generator("order", self.seed, self.epoch).permutation(order)[:self.length]
        return np.resize(order, (len(self), self.batch_size * self.ranks))

    def __iter__(self):
        return iter(self.rows()[self.start:, self.rank * self.batch_size:(self.rank + 1) * self.batch_size])


def in_order(length, batch_size, rank, ranks):
    """Batches of positions, in order; the last may be shorter. Each of several ranks takes every ranks-th image."""
    positions = np.arange(rank, length, ranks)
    return np.split(positions, range(batch_size, len(positions), batch_size)) if len(positions) else []


class Batches:
    """Batches (images uint8 [B, 3, size, size], labels int64 [B]) on `device`, for one part of a split.

    With `seed` they are shuffled: set `.order.epoch`, then iterate. Without, they come in the order of `ids` and the
    last one may be shorter. Images that are decoded already (`dataset.pixels`) stay on the device where they fit, or
    come from memory or the disk, a few batches ahead; others are decoded by `workers` processes. rank, ranks, weights:
    as in `Order`. decoy: whether images show the dataset's decoys, where it has them.
    """

    def __init__(self, dataset, ids, size, batch_size, device, workers=0, seed=None, rank=0, ranks=1, decoy=True,
                 weights=None):
        number = {image_id: i for i, image_id in enumerate(dataset.ids)}
        self.indices = np.array([number[i] for i in ids], dtype=np.int64)
        self.device, self.pixels = device, dataset.pixels
        self.labels = torch.from_numpy(dataset.labels[self.indices])
        self.order = in_order(len(ids), batch_size, rank, ranks) if seed is None \
            else Order(len(ids), batch_size, seed, rank, ranks, weights)
        self.resident = self.loader = self.decoy = None
        if decoy and dataset.decoy is not None:
            arrays = (dataset.decoy.corners, dataset.decoy.colours)
            self.decoy = [torch.from_numpy(array[self.indices]).to(device) for array in arrays]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        few = len(ids) * size * size * 3 <= RESIDENT_BYTES
        self.ahead = device.type == "cuda" or not few
        if self.pixels is None or self.pixels.size != size:
            at_once = (2 * workers + 1) * batch_size * size * size * 3  # DataLoader prepares two batches a process
            self.loader = torch.utils.data.DataLoader(
                Decoded(dataset, self.indices, size), batch_sampler=self.order, num_workers=workers,
                pin_memory=device.type == "cuda", persistent_workers=workers > 0, worker_init_fn=end_if_lost,
                collate_fn=None if fits_shared(at_once) else as_arrays)
        elif few and device.type != "cpu":
            self.resident = torch.from_numpy(self.pixels.take(self.indices)).to(device)
            self.labels = self.labels.to(device)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        if self.decoy is None:
            yield from self._without_decoys()
            return
        for positions, (images, labels) in zip(self.order, self._without_decoys()):
            positions, = self._sent(torch.from_numpy(positions))
            corners, colours = (part[positions] for part in self.decoy)
            square = swatch(corners, images.shape[-1])[:, None]
            yield torch.where(square, colours[:, :, None, None], images), labels

    def _without_decoys(self):
        if self.resident is not None:
            for positions in self.order:
                positions, = self._sent(torch.from_numpy(positions))
                yield self.resident[positions].permute(0, 3, 1, 2), self.labels[positions]
            return
        host = self.loader if self.loader is not None else ahead(self._taken()) if self.ahead else self._taken()
        try:
            for images, labels in host:
                yield self._sent(torch.as_tensor(images), torch.as_tensor(labels))
        except UserError as error:  # without the traceback that a DataLoader's worker wraps it in
            raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None

    def _taken(self):
        """Batches from `pixels`, still on the host, in memory that a GPU can read; torch uses it again once it has."""
        pinned, size = self.device.type == "cuda", self.pixels.size
        for positions in self.order:
            images = torch.empty(len(positions), size, size, 3, dtype=torch.uint8, pin_memory=pinned)
            self.pixels.take(self.indices[positions], images.numpy())
            labels = self.labels[torch.from_numpy(positions)]
            yield images.permute(0, 3, 1, 2), labels.pin_memory() if pinned else labels

    def _sent(self, *tensors):
        """Tensors of the host on the device: on a GPU copied beside what it computes, which then waits for them."""
        if self.stream is None:
            return tuple(sent(tensor, self.device) for tensor in tensors)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            there = tuple(sent(tensor, self.device) for tensor in tensors)
        computing.wait_stream(self.stream)
        for tensor in there:
            tensor.record_stream(computing)  # their memory is not the copies' again before that has read it
        return there


def sent(tensor, device):
    """A tensor of the host on the device, without waiting; but for Apple's, which would read memory that is gone."""
    return tensor.to(device, non_blocking=device.type != "mps")


def ahead(items, depth=3):
    """The items of an iterator, drawn by a thread up to `depth` ahead; what goes wrong there is raised here."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item


def prepare(pixels, mean, std):
    """Normalised images, float32 [B, 3, H, W], channels last, of pixels, uint8 [B, 3, H, W], on their device.

    mean, std: float [1, 3, 1, 1] on the same device, for values in [0, 1].
    """
    return normalise(to_float(pixels), mean, std)


def to_float(pixels):
    """float32 [B, 3, H, W] in [0, 1], channels last, of uint8 pixels."""
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(255)


def normalise(images, mean, std):
    return images.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


def pixels_of(images, mean, std):
    """Pixels, uint8 [B, 3, H, W], of normalised images: what `prepare` was given."""
    return torch.addcmul(255 * mean + 0.5, images, 255 * std).clamp_(0, 255).to(torch.uint8)
