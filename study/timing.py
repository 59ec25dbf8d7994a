"""What `bench.py` measures with: rounds that take every variant in turn, their ratios, peaks of memory, a table."""

import csv
import gc
import io
import itertools
import platform
import random
import statistics
import time
from pathlib import Path

import timm
import torch

from engine import files, folder
from study.statistics import median_interval


def now(device):
    """Seconds, after the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timings(variants, rounds, device):
    """{name: [milliseconds]} of {name: function}, after a round to warm up, in an order that changes each round.

    A function that returns a float is counted by these seconds, and not by what the call took. None is left out.
    """
    variants = {name: variant for name, variant in variants.items() if variant}
    taken = {name: [] for name in variants}
    order = random.Random(0)  # what runs first in a round would otherwise always follow the same one
    for round_ in range(rounds + 1):
        for name, variant in order.sample(list(variants.items()), len(variants)):
            gc.collect()
            start = now(device)
            counted = variant()
            seconds = counted if isinstance(counted, float) else now(device) - start
            if round_:
                taken[name].append(1000 * seconds)
    return taken


def medians(variants, rounds, device):
    """{name: median milliseconds}, of `timings`."""
    return {name: statistics.median(times) for name, times in timings(variants, rounds, device).items()}


def peak_bytes(work, device):
    """Most bytes that `work` had allocated at one time, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = (event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(0, *itertools.accumulate(changes))


class Table:
    """A table that is printed row by row and, under --csv, written anew with each row."""

    def __init__(self, options, text, **columns):
        """text: what is measured. columns: names and formats of the numbers; before them stands the network."""
        name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else \
            f"{folder.processor()}, {torch.get_num_threads()} threads"
        self.machine = f"{name}; Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
        self.text = (f"{text}; batch {options.batch_size}, {options.image_size} pixels, float32, random weights, "
                     f"medians of {options.rounds} rounds")
        self.file, self.columns = options.csv, {"network": "", **columns}
        self.rows = [[*self.columns, "machine", "set"]]
        print(f"{self.machine}\n{self.text}\n")
        self._print(self.columns)

    def _print(self, values):
        cells = []
        for value, (name, form) in zip(values, self.columns.items()):
            text = value if isinstance(value, str) else "-" if value is None else format(value, form)
            cells.append(f"{text:>{max(11, len(name))}}" if form else f"{text:16}")
        print("  ".join(cells), flush=True)

    def add(self, *values):
        """A row; None is printed as a dash."""
        self._print(values)
        self.rows.append([*values, self.machine, self.text])
        if self.file:
            text = io.StringIO(newline="")
            csv.writer(text).writerows(self.rows)
            files.write_atomically(Path(self.file), lambda file: file.write(text.getvalue().encode()))


def over(times, name, other):
    """One time as a multiple of another, or None where it was not taken."""
    return times[name] / times[other] if name in times else None


def ratio(taken, name, other):
    """Median over rounds of one time as a multiple of another, and its interval "low-high"; (None, None) if not taken.
    """
    if name not in taken:
        return None, None
    ratios = [a / b for a, b in zip(taken[name], taken[other])]
    return statistics.median(ratios), "{:.3f}-{:.3f}".format(*median_interval(ratios))
