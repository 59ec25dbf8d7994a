"""An experiment: the same training under settings that vary, seed by seed, each run in a process of its own.

    python train.py --experiment demo                        # runs what is not finished yet, into runs/demo/
    python train.py --experiment demo --jobs 2 --epochs 5    # two at a time; settings given here hold for every run
    python train.py --experiment demo --cell 3/6             # the third of six shares, as a job of a SLURM array runs it

`configs.json` has, under "experiments", by name: "arms", {name: settings}, or "grid", {setting: [values]}, or both, which are then
combined; "seeds", a list; and "settings" that all runs have. An arm with "init", "reweight" or "heat_from": "@ARM" builds on that arm's run of the same seed. A cell is one arm with
one seed; its run is `runs/NAME/ARM-sSEED`, made by a command line that `env.json` shows and that gives the same run by hand. Where an arm has "cam":
"none", settings of the grid that would then say nothing are left out, and cells that are then alike are one.
"""

import contextlib
import itertools
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import run
from data import UserError

POLL = 0.2  # seconds between two looks at the processes

# Each cell's process is a fork of one that has done the imports, which are half the time of a small run. It has not touched a GPU.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
processes = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    processes.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.pyplot"])


class Cell(NamedTuple):
    arm: str
    seed: int
    options: dict  # settings, as `run.resolve` takes them
    folder: Path
    needs: Path | None = None  # the run that it builds on

    def config(self, configs):
        return run.resolve(configs, self.options)

    def finished(self):
        return (self.folder / "metrics.json").is_file()


def cells(configs, name, given):
    """The cells of an experiment, each arm's first seed before any second one. given: settings for all. Raises UserError."""
    known = configs.get("experiments", {})
    if name not in known:
        raise UserError(f"unknown experiment {name!r}; configs.json has {', '.join(known) or 'none'}{run._nearest(name, known)}")
    entry = known[name]
    arms, grid = entry.get("arms", {"": {}}), entry.get("grid", {})
    varied = {"seed", "name", *grid, *itertools.chain(*arms.values())}
    for key in given:
        if key in varied:
            raise UserError(f"--{key.replace('_', '-')}: experiment {name} sets it for each run; leave it out, or change configs.json")
    folder = Path(given.get("out") or entry.get("settings", {}).get("out") or configs["defaults"]["out"]) / name
    found = {}
    for seed, (arm, settings), values in itertools.product(entry["seeds"], arms.items(), itertools.product(*grid.values())):
        point = dict(zip(grid, values))
        if {**entry.get("settings", {}), **settings, **point, **given}.get("cam") == "none":
            point = {key: value for key, value in point.items() if key not in run.ERASING}
        label = "-".join([arm] * bool(arm) + [f"{key}={'null' if value is None else value}" for key, value in point.items()])
        cell_name = run.safe_name(f"{label}-s{seed}")
        options = {**entry.get("settings", {}), **settings, **point, **given, "seed": seed, "out": str(folder), "name": cell_name}
        needs = None
        for key in run.OF_RUNS:
            if (other := options.get(key) or "").startswith("@"):
                if other[1:] not in arms or grid:
                    raise UserError(f"configs.json: experiments.{name}.arms.{arm}.{key}: {other!r} is no arm, or there is a grid too")
                needs = folder / run.safe_name(f"{other[1:]}-s{seed}")
                options[key] = str(needs)
        if options.get("init") and "weights" not in settings:  # those given for all are where the arms without it start
            options.pop("weights", None)
        if given.get("cache", "auto") == "auto":  # decoded images are shared by the experiment, and with runs beside it
            options["cache"] = str(folder.parent / ".cache")
        found.setdefault(cell_name, Cell(label, seed, options, folder / cell_name, needs))
    return list(found.values())


def typed(program, name, out=None):
    """The command that a user types for an experiment whose runs lie in `out`, if that is not where they lie by default."""
    return f"python {program} --experiment {name}" + (f" --out {shlex.quote(str(out))}" if out else "")


def share_of(every, text):
    """The cells of share I of N, "I/N", each N-th one; all of them for None."""
    if text is None:
        return every
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--cell {text}: expected I/N with I from 1 to N, as 3/6; this experiment has {len(every)} cells, so that "
                        f"sbatch --array=1-{len(every)} gives each a job")
    return every[int(number) - 1:: int(count)]


def command(cell, device=None, any_code=False):
    """The command line that makes the cell's run, or goes on with it."""
    start = [sys.executable, str(run.HERE / "train.py")]
    if (cell.folder / "config.json").is_file():
        return start + ["--resume", str(cell.folder)] + (["--device", device] if device else []) + ["--any-code"] * any_code
    options = cell.options | ({"device": device} if device else {})
    for key, value in options.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            start.append(f"--{option}" if value else f"--no-{option}")
        else:  # with = because values may begin with a dash
            start.append(f"--{option}={'null' if value is None else value}")
    return start


def check(every, configs):
    """Raise UserError before anything runs: for settings that are wrong, and for runs that were made with others."""
    for cell in every:
        config = cell.config(configs)
        if (cell.folder / "config.json").is_file():
            there = run.open_run(cell.folder).config
            if differing := run.differing_settings(config, there):
                key = differing[0]
                raise UserError(f"{cell.folder} was made with other settings ({key} {there.get(key)!r}, now {config[key]!r}): choose "
                                "another --out, or remove it")


def run_cells(name, given, cell=None, jobs=1, any_code=False):
    """Run the cells that are not finished yet, `jobs` at a time; returns the exit status. The signal that stops it stops them too.

    any_code: interrupted ones go on although the code has changed.
    """
    console, configs = Console(highlight=False), run.read_configs()
    every = cells(configs, name, given)
    mine = share_of(every, cell)
    check(every, configs)
    epochs = {c: sum(run.stage_epochs(config)) if config["mode"] == "staged" else config["epochs"]
              for c, config in ((c.folder, c.config(configs)) for c in mine)}
    waiting, running, failed = [c for c in mine if not c.finished()], {}, []
    console.print(f"{every[0].folder.parent}: {len(every)} cells, {len(mine) - len(waiting)} of {len(mine)} to do are done already"
                  if mine else f"{name}: share {cell} of {len(every)} cells is empty", markup=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs, left"), TimeRemainingColumn())
    number = 15  # what ends the processes if this one fails
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=600) as bar:
        task = bar.add_task(name, total=sum(epochs.values()), completed=sum(epochs_done(c) for c in mine))
        try:
            while waiting or running:
                for slot in set(range(jobs)) - set(running):
                    if ready := next((c for c in waiting if c.needs is None or (c.needs / "metrics.json").is_file()), None):
                        waiting.remove(ready)
                        running[slot] = begin(ready, slot, jobs, any_code)
                if waiting and not running:
                    raise UserError(f"{waiting[0].folder.name} starts from {waiting[0].needs}, which is not finished; first run that")
                time.sleep(POLL)
                bar.update(task, completed=sum(epochs_done(c) for c in mine), description=", ".join(c.folder.name for c, *_ in running.values()))
                for slot, (c, process, start) in list(running.items()):
                    if process.exitcode is not None:
                        del running[slot]
                        say_end(console, c, process.exitcode, time.perf_counter() - start, failed)
                        if process.exitcode and not (c.folder / "config.json").is_file():
                            raise UserError(f"{c.folder.name} could not start: {last_line(c)}")
        except BaseException as error:
            number = getattr(error, "signal", 2 if isinstance(error, KeyboardInterrupt) else number)
            raise
        finally:
            for _, process, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
            for _, process, _ in running.values():
                process.join()
    summarise(console, every, failed, name, given.get("out"))
    return 1 if failed else 0


def begin(cell, slot, jobs, any_code):
    """Start a cell's process; returns (cell, process, time of its start)."""
    device, gpus = None, torch.cuda.device_count()
    if jobs > 1 and gpus > 1 and cell.options.get("device", "auto") == "auto":
        device = f"cuda:{slot % gpus}"
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else None
    try:
        output_of(cell).parent.mkdir(parents=True, exist_ok=True)
        open(output_of(cell), "ab").close()
    except OSError as error:
        raise UserError(f"{cell.folder.parent}: cannot be written ({error.strerror}); choose another --out") from None
    process = processes.Process(target=run_cell, args=(command(cell, device, any_code)[1:], str(output_of(cell)), threads))
    process.start()
    return cell, process, time.perf_counter()


def run_cell(command, output, threads):
    """The cell's process: the command line as if it had been typed, in a group of its own, so that Ctrl-C reaches it once and through us.

    What it prints is added to the file `output`. threads: of torch, or None for as many as it takes.
    """
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(output, "ab") as file, open(os.devnull, "rb") as nothing:
        for stream, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(stream.fileno(), target)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # processes that decode images start as in any run, and end when it is killed
    if threads:
        torch.set_num_threads(threads)
    sys.argv = command
    import train  # which imports this

    sys.exit(train.main(command[1:]))


def end_with(parent):
    """Where the experiment's process is killed, end this one as a signal would, with a checkpoint: the same command is to find nobody at work."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def output_of(cell):
    """What the cell's processes printed."""
    return cell.folder.parent / "output" / f"{cell.folder.name}.txt"  # and not beside it, where none-s* would name it together with the runs


def last_line(cell):
    lines = output_of(cell).read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("train.py: ") if lines else "it said nothing"


def epochs_done(cell):
    try:
        return (cell.folder / "log.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def say_end(console, cell, status, seconds, failed):
    if status:
        failed.append(cell)
        text = f"ended with status {status}: {last_line(cell)}"
    else:
        text = f"test accuracy {run.read_json(cell.folder / 'metrics.json')['test']['accuracy']:.4f}, {seconds:.0f} s"
    console.print(f"{cell.folder.name}: {text}", markup=False, soft_wrap=True)


def summarise(console, every, failed, name, out):
    """Test accuracy of each arm over its finished seeds. out: as on the command line."""
    console.print(f"\n{'arm':30}{'seeds':>8}{'test accuracy':>16}{'sd':>10}")
    for arm in dict.fromkeys(c.arm for c in every):
        found = [run.read_json(c.folder / "metrics.json")["test"]["accuracy"] for c in every if c.arm == arm and c.finished()]
        figures = f"{np.mean(found):16.4f}" + (f"{np.std(found, ddof=1):10.4f}" if len(found) > 1 else "") if found else f"{'-':>16}"
        console.print(f"{arm:30}{len(found):>8}{figures}", markup=False, soft_wrap=True)
    left = sum(not c.finished() for c in every)
    if failed:
        console.print(f"\n{len(failed)} cells failed; {output_of(failed[0])} tells of the first. Run the same command again for these alone")
    elif left:
        console.print(f"\n{left} cells are left, for other shares or jobs")
    else:
        console.print(f"\nAll {len(every)} cells are done. {typed('eval.py', name, out)} compares the arms, {typed('report.py', name, out)} answers the "
                      "questions", markup=False, soft_wrap=True)
