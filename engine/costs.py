"""What training costs and what an epoch adds up to: images, seconds, memory, energy. Nothing is estimated."""

import collections
import contextlib
import functools
import gc
import os
import sys
import threading
import time
import weakref
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch

from engine import ranks


class Counts:
    """What an epoch adds up to, on the device. before: what `so_far` gave of it in a process that was stopped."""

    # over all processes; and those that pass for all at the same time
    ADDED = ("loss", "fresh", "wrong", "erased_images", "skipped_steps", "images_seen", "second_pass_images",
             "energy_wh")
    SHARED = ("optimizer_steps", "train_seconds", "cam_seconds")

    def __init__(self, device, energy, before=None):
        self.energy, self.energy_start = energy, energy.watt_hours()
        self.device, self.before = device, dict.fromkeys((*self.ADDED, *self.SHARED), 0) | (before or {})
        # Loss times images, fresh images, those misled, erased images, on rank 0 skipped steps, which all skip, and
        # images of batches that the device has to count; what was counted before is added to as if nothing had come
        # between.
        self.sums = torch.tensor([float(self.before.pop(key)) for key in self.ADDED[:6]], device=device)
        self.images, self.second_pass_images, self.steps, self.start = 0, 0, 0, time.perf_counter()
        self.cam_seconds, self.cam_events, self.asked = 0.0, collections.deque(), None

    def misled(self, wrong, fresh):
        """Count the images that come as they are, and of these the wrong ones. Both bool [B]."""
        self.sums[1:3] += torch.stack([fresh.sum(), (wrong & fresh).sum()])

    def add(self, trained, updated, skipped):
        """Count a batch. trained: `proxy.Trained`; a loss not finite adds 0. updated, skipped: of `backward`."""
        fresh, valid = trained.fresh, trained.valid
        count, erased = (len(fresh), ~fresh) if valid is None else (valid.sum(), valid & ~fresh)
        self.sums[:4:3] += torch.stack([trained.loss.detach().nan_to_num(0, 0, 0) * count, erased.sum()])
        if updated and ranks.RANK == 0:
            self.sums[4] += skipped
        if valid is None:
            self.images += count
        else:
            self.sums[5] += count
        self.steps += updated
        self.second_pass_images += trained.second_pass

    @contextlib.contextmanager
    def timing_cam(self):
        """Time a block: on a GPU with events that nothing waits for."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record(stream)
            yield
            events[1].record(stream)
            self.cam_events.append(events)
            self.add_finished()
        else:
            start = time.perf_counter()
            yield
            self.cam_seconds += time.perf_counter() - start

    def add_finished(self):
        """Add up the times that the device has taken by now, each once."""
        while self.cam_events and self.cam_events[0][1].query():
            start, end = self.cam_events.popleft()
            self.cam_seconds += start.elapsed_time(end) / 1000

    def so_far(self, everyone=lambda value: [value], sums=None):
        """{name: number} of this process or of `everyone`; waits for the device, but where its `sums` are given."""
        sums = self.sums.tolist() if sums is None else sums
        sums[5] += self.images
        self.add_finished()
        energy = self.energy.watt_hours()
        energy = None if None in (energy, self.energy_start) else energy - self.energy_start
        seconds = time.perf_counter() - self.start
        own = [*sums, self.second_pass_images, energy, self.steps, seconds, self.cam_seconds]
        own = {key: added([self.before.get(key, 0), value]) for key, value in zip((*self.ADDED, *self.SHARED), own)}
        return merged(everyone(own))

    def lately(self):
        """As `totals`, for a display: on a GPU what it had counted when this was asked before, so that nobody waits."""
        if self.device.type != "cuda":
            return self.totals()
        copied, event = self.sums.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        (sums, there), self.asked = self.asked or (copied, event), (copied, event)
        there.synchronize()  # of the first alone there is anything to wait for
        return self.totals(sums=sums.tolist())

    def totals(self, everyone=lambda value: [value], sums=None):
        """The epoch's share of a line of `log.jsonl`."""
        found = self.so_far(everyone, sums)
        loss, fresh, wrong = (found.pop(key) for key in ("loss", "fresh", "wrong"))
        found |= {key: int(found[key]) for key in ("erased_images", "skipped_steps", "images_seen")}
        return {"train_loss": loss / max(found["images_seen"], 1), "train_accuracy": 1 - wrong / max(fresh, 1),
                "misled": wrong / max(fresh, 1), **found}


def timed(method):
    """A method whose time counts as the heat's, in its object's `counts`, `Counts` or None."""
    @functools.wraps(method)
    def inner(self, *arguments):
        with self.counts.timing_cam() if self.counts else contextlib.nullcontext():
            return method(self, *arguments)

    return inner


def merged(counts):
    """What several processes counted, as one."""
    return {key: (added if key in Counts.ADDED else max)([each[key] for each in counts]) for key in counts[0]}


def added(values):
    """Their sum; None where one of them is not known, for the rest would pass as the whole."""
    return None if None in values else sum(values)


def memory(device):
    """Memory of process and GPU in MB (2^20 bytes), at its peak and now; the largest of all ranks; None if unknown."""
    host = None
    if resource:
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        host = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
    gpu = device.type == "cuda"
    own = {"peak_gpu_allocated_mb": round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if gpu else None,
           "peak_gpu_reserved_mb": round(torch.cuda.max_memory_reserved(device) / 2**20, 1) if gpu else None,
           "peak_host_mb": host, "held_mb": held_mb(device)}
    every = ranks.everyone(own)
    return {key: max((each[key] for each in every if each[key] is not None), default=None) for key in own}


def held_mb(device):
    """Memory in use in MB (2^20 bytes): allocated on the GPU, or else resident in this process; None if unknown."""
    if device.type == "cuda":
        return round(torch.cuda.memory_allocated(device) / 2**20, 1)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except (OSError, ValueError):
        return None


def release(device):
    """Give back what nothing refers to any more, from caches too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Energy:
    """Energy that this process's device took since it was made, from a counter of the hardware itself.

    source: what is read: "NVML" for a GPU; "RAPL" for the CPU packages, where training runs on these (of several
    processes on one machine the first reads them); None where there is neither. A counter counts the whole device,
    whoever uses it. Of runs side by side (`--jobs`) each would count the others' energy too, and nothing tells whose it
    was: `shared` names the counters that are not read for that. A thread reads RAPL now and then, as its counters start
    again from zero every few minutes under load; it ends with `close`, or with this object.
    """

    PAUSE = 20.0  # seconds between two readings; a package at 1,000 W takes over four minutes to fill its counter
    shared = frozenset()  # of {"NVML", "RAPL"}; `experiment.run_cell` sets it

    def __init__(self, device, powercap="/sys/class/powercap", first=True):
        self._lock, end, read = threading.Lock(), threading.Event(), None
        with contextlib.suppress(Exception):  # no library, no driver, a GPU without the counter, a file closed to us
            if device.type == "cuda" and "NVML" not in self.shared:
                read = _gpu_joules(device)
            elif device.type == "cpu" and "RAPL" not in self.shared and first:
                read = _package_joules(Path(powercap))
        self.source = read and ("NVML" if device.type == "cuda" else "RAPL")
        self._read = (lambda: 0.0) if device.type == "cpu" and not first else read
        self.close = weakref.finalize(self, end.set)  # also where an error ends a run before it is called
        if self.source == "RAPL":
            threading.Thread(target=_watch, args=(weakref.ref(self), end), name="RAPL", daemon=True).start()

    def watt_hours(self):
        """Watt hours so far; None where nothing can be read, and from when it once could not: a part is no total."""
        with self._lock:
            try:
                return self._read() / 3600 if self._read else None
            except Exception:  # the system's, or NVML's own kinds
                self._read = None


def _gpu_joules(device):
    """A function that gives the joules that a GPU took since now. Raises what NVML raises."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # millijoules; virtual GPUs have no such counter
    return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1000


def _package_joules(powercap):
    """The same for the CPU packages; None where there are none. Raises OSError or ValueError."""
    def number(zone, name):
        return int((zone / name).read_text())

    zones = [z for z in sorted(powercap.glob("intel-rapl:*")) if (z / "name").read_text().startswith("package")]
    state = {zone: (number(zone, "energy_uj"), number(zone, "max_energy_range_uj") + 1) for zone in zones}
    total = 0

    def read():
        nonlocal total
        for zone, (before, span) in state.items():
            now = number(zone, "energy_uj")
            state[zone] = now, span
            total += (now - before) % span
        return total / 1e6

    return read if zones else None


def _watch(reference, end):
    """Read an `Energy` now and then, without keeping it alive."""
    while not end.wait(Energy.PAUSE) and (energy := reference()):
        energy.watt_hours()
        del energy
