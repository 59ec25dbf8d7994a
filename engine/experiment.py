"""An experiment: the same training under settings that vary, seed by seed, each run in a process of its own.

    python train.py --experiment demo                        # runs what is not finished yet, into runs/demo/
    python train.py --experiment demo --jobs 2 --epochs 5    # two at a time; settings given here hold for every run
    python train.py --experiment demo --cell 3/6             # the third of six shares, as a job of a SLURM array

`experiments/NAME.json` has "arms", {name: settings}, or "grid", {setting: [values]}, or both, which are then combined;
"seeds", a list; "settings" that all runs have; and "help". With "like": OTHER it takes all these of another experiment,
and replaces what stands here: settings and arms key by key (an arm that is null goes), the rest as it stands. An arm
with "init", "reweight" or "heat": "@ARM" builds on that arm's run of the same seed.

A cell is one arm with one seed; its run is `runs/NAME/ARM-sSEED`, made by a command line that `env.json` shows and that
gives the same run by hand.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import Progress

from engine import costs, files, folder, settings
from engine.display import console
from engine.files import UserError

FOLDER = settings.HERE / "experiments"
POLL = 0.2  # seconds from one check of the processes to the next

# Each cell's process is a fork of one that has imported the libraries, which is most of the time of a small run, and
# has not touched a GPU. It imports no module of this program, for which it would search the current folder first.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
processes = multiprocessing.get_context(METHOD)
if METHOD == "forkserver":
    processes.set_forkserver_preload(["torch", "torch._dynamo", "torchvision.transforms.v2", "timm", "sklearn.metrics",
                                      "matplotlib.figure", "rich.progress"])


def arm_settings(found, where):
    if found is not None:
        settings.check(found, settings.some_settings, where)


def grid_values(found, where):
    for key, values in settings.check(found, {"*": list}, where).items():
        if not values:
            raise UserError(f"{where}.{key}: expected a list of values, found []")
        for value in values:
            settings.check({key: value}, settings.some_settings, where)


def seed_list(found, where):
    for seed in settings.check(found, list, where):
        settings.SETTINGS["seed"].check(seed, where)
    if not found or len(set(found)) < len(found):
        raise UserError(f"{where}: {json.dumps(found)}; expected one or more different seeds")


ENTRY = {"like?": str, "help?": str, "settings?": settings.some_settings, "arms?": {"*": arm_settings},
         "grid?": grid_values, "seeds?": seed_list}


def read_experiment(name, own=None, above=()):
    """{"settings", "arms", "grid", "seeds", ...} of experiments/NAME.json, with what it takes from others, checked.

    own: experiments of configs.json, {name: as in a file}. above: names that are "like" this one. Raises UserError.
    """
    known = {path.stem: path for path in sorted(FOLDER.glob("*.json"))} | (own or {})
    if name not in known:
        raise UserError(f"unknown experiment {name!r}; there are {', '.join(known)}{files.nearest(name, known)}")
    entry, where = known[name], f"experiments/{name}.json"
    entry = files.read_json(entry, unique_keys=True) if isinstance(entry, Path) else entry
    settings.check(entry, ENTRY, where)
    if other := entry.get("like"):
        if other in (*above, name):
            raise UserError(f"{where}: like: {other!r} leads back to this experiment; leave one of the two out")
        base = read_experiment(other, own, (*above, name))
        entry = base | entry | {key: base[key] | entry.get(key, {}) for key in ("settings", "arms")}
    entry = {"settings": {}, "arms": {}, "grid": {}} | entry
    entry["arms"] = {key: value for key, value in entry["arms"].items() if value is not None}
    if not entry["arms"] and not entry["grid"]:
        raise UserError(f"{where}: nothing varies; expected arms, {{name: settings}}, or grid, {{setting: [values]}}")
    if "seeds" not in entry:
        raise UserError(f"{where}: key 'seeds' is missing")
    return entry


class Cell(NamedTuple):
    arm: str
    seed: int
    options: dict  # settings, as `settings.resolve` takes them
    folder: Path
    needs: Path | None = None  # the run that it builds on

    def config(self, configs):
        return settings.resolve(configs, self.options)

    def finished(self):
        return (self.folder / "metrics.json").is_file()


def cells(configs, name, given):
    """The cells of an experiment, each arm's first seed before any second one. given: settings for all of them.

    Where an arm has "cam": "none", settings of the grid that then change nothing go, and cells then alike are one.
    """
    entry = read_experiment(name, configs.get("experiments"))
    arms, grid, common = entry["arms"] or {"": {}}, entry["grid"], entry["settings"]
    for key in given:
        if key in {"seed", "name", *grid, *itertools.chain(*arms.values())}:
            raise UserError(f"{settings.option(key)}: experiment {name} sets it for each run; leave it out")
    place, found = Path(given.get("out") or common.get("out") or configs["defaults"]["out"]) / name, {}
    for seed, (arm, own), values in itertools.product(entry["seeds"], arms.items(), itertools.product(*grid.values())):
        point = dict(zip(grid, values))
        if (common | own | point | given).get("cam") == "none":
            point = {key: value for key, value in point.items() if key not in settings.ERASING}
        texts = [f"{key}={'null' if value is None else value}" for key, value in point.items()]
        label = "-".join([arm] * bool(arm) + texts)
        cell_name, needs = files.safe_name(f"{label}-s{seed}"), None
        options = common | own | point | given | {"seed": seed, "out": str(place), "name": cell_name}
        for key in settings.OF_RUNS:
            if (other := options.get(key) or "").startswith("@"):
                if other[1:] not in arms or grid:
                    raise UserError(f"experiments/{name}.json: arms.{arm}.{key}: {other!r} is no arm, or there is a "
                                    "grid too")
                needs = place / files.safe_name(f"{other[1:]}-s{seed}")
                options[key] = str(needs)
        if options.get("init") and "weights" not in own:  # those given for all are where the arms without it start
            options.pop("weights", None)
        for key in set(settings.MOVED) - set(given):  # as --data-dir has it, or else as a path of configs.json
            if options.get(key) and not os.path.exists(options[key]) and os.path.exists(settings.HERE / options[key]):
                options[key] = str(settings.HERE / options[key])
        if given.get("cache", "auto") == "auto":  # decoded images are shared by the experiment, and with runs beside it
            options["cache"] = str(place.parent / ".cache")
        found.setdefault(cell_name, Cell(label, seed, options, place / cell_name, needs))
    return list(found.values())


def share_of(every, text):
    """The cells of share I of N, "I/N", each N-th one; all of them for None."""
    if text is None:
        return every
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--cell {text}: expected I/N with I from 1 to N, as 3/6; there are {len(every)} cells, "
                        f"so that sbatch --array=1-{len(every)} gives each a job")
    return every[int(number) - 1:: int(count)]


def typed(program, name, out=None):
    """The command that a user types for an experiment; out: where its runs lie, if not where they lie by default."""
    return f"python {program} --experiment {name}" + (f" --out {files.quoted(out)}" if out else "")


def command(cell, device=None, any_code=False):
    """The command line that makes the cell's run, or goes on with it."""
    start = [sys.executable, str(settings.HERE / "train.py")]
    if (cell.folder / "config.json").is_file():
        device = ["--device", device] if device else []
        return start + ["--resume", str(cell.folder), *device] + ["--any-code"] * any_code
    for key, value in (cell.options | ({"device": device} if device else {})).items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            start.append(f"--{option}" if value else f"--no-{option}")
        else:  # with = because values may begin with a dash
            start.append(f"--{option}={'null' if value is None else value}")
    return start


def run_cells(name, given, cell=None, jobs=1, any_code=False):
    """Run the cells that are not finished yet, `jobs` at a time; returns the exit status. A signal stops them too.

    cell: a share, "I/N". any_code: interrupted runs go on although the code has changed.
    """
    configs = settings.read_configs()
    every = cells(configs, name, given)
    mine, epochs = share_of(every, cell), check(every, configs)
    waiting, running, failed, number = [c for c in mine if not c.finished()], {}, [], signal.SIGTERM
    done = len(mine) - len(waiting)
    show(f"{every[0].folder.parent}: {len(every)} cells, {done} of {len(mine)} to do are done already")
    with Progress(console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=600) as bar:
        task = bar.add_task(name, total=sum(epochs[c.folder] for c in mine))
        try:
            while waiting or running:
                start_cells(waiting, running, jobs, any_code)
                time.sleep(POLL)
                names = ", ".join(c.folder.name for c, *_ in running.values())
                bar.update(task, completed=sum(map(epochs_done, mine)), description=names)
                failed += end_cells(running)
        except BaseException as error:
            number = getattr(error, "signal", signal.SIGINT if isinstance(error, KeyboardInterrupt) else number)
            raise
        finally:
            for _, process, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
            for _, process, _ in running.values():
                process.join()
    summarise(every, failed, name, given.get("out"))
    return 1 if failed else 0


def check(every, configs):
    """{folder: epochs} of the cells. Raises UserError for wrong settings, and for runs that were made with others."""
    epochs = {}
    for cell in every:
        config = cell.config(configs)
        epochs[cell.folder] = sum(settings.stage_epochs(config)) if config["mode"] == "staged" else config["epochs"]
        if (cell.folder / "config.json").is_file():
            there = folder.open_run(cell.folder).config
            for key in settings.differing_settings(config, there):
                raise UserError(f"{cell.folder} was made with other settings ({key} {there.get(key)!r}, now "
                                f"{config[key]!r}): choose another --out, or remove it")
    return epochs


def start_cells(waiting, running, jobs, any_code):
    """Start cells that can start, from `waiting`, in free slots of `running`, {slot: (cell, process, its start)}."""
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else None
    for slot in set(range(jobs)) - set(running):
        cell = next((c for c in waiting if c.needs is None or (c.needs / "metrics.json").is_file()), None)
        if cell is None:
            break
        waiting.remove(cell)
        gpus = torch.cuda.device_count() if jobs > 1 else 1
        device = f"cuda:{slot % gpus}" if gpus > 1 and cell.options.get("device", "auto") == "auto" else None
        files.make_folder(output_of(cell).parent)
        files.append_bytes(output_of(cell), b"")  # here a folder that is closed to us is one line
        alone = device and jobs <= gpus  # on its GPU
        shared = [] if jobs == 1 else ["RAPL"] if alone else ["RAPL", "NVML"]
        arguments = command(cell, device, any_code)[1:], str(output_of(cell)), threads, shared
        process = processes.Process(target=run_cell, args=arguments)
        process.start()
        running[slot] = cell, process, time.perf_counter()
    if waiting and not running:
        name, needs = waiting[0].folder.name, waiting[0].needs
        raise UserError(f"{name} starts from {needs}, which is not finished; first run that")


def run_cell(arguments, output, threads, shared):
    """The cell's process: the program and its arguments as if typed; what it prints is added to the file `output`.

    It has a group of its own, so that Ctrl-C reaches it once, through us. threads: of torch; None: its own choice.
    shared: the energy counters that are not this run's alone, which therefore has no `energy_wh` of them.
    """
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(output, "ab") as file, open(os.devnull, "rb") as nothing:
        for stream, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(stream.fileno(), target)
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # processes that decode images start as in any run
    if threads:
        torch.set_num_threads(threads)
    costs.Energy.shared = frozenset(shared)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")  # by its path: another train.py may lie in the current folder


def end_with(parent):
    """Where the experiment's process is killed, end this one as a signal would, with a checkpoint."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def end_cells(running):
    """Take ended cells out of `running`; returns those that failed. Raises UserError for one that could not start."""
    failed = []
    for slot in [slot for slot, (_, process, _) in running.items() if process.exitcode is not None]:
        cell, process, start = running.pop(slot)
        if process.exitcode:
            lines = output_of(cell).read_text(errors="replace").strip().splitlines()
            reason = lines[-1].removeprefix("train.py: ") if lines else "it printed nothing"
            if not (cell.folder / "config.json").is_file():
                raise UserError(f"{cell.folder.name} could not start: {reason}")
            failed.append(cell)
            show(f"{cell.folder.name}: ended with status {process.exitcode}: {reason}")
        else:
            show(f"{cell.folder.name}: test accuracy {accuracy(cell):.4f}, {time.perf_counter() - start:.0f} s")
    return failed


def show(text):
    console.print(text, markup=False, soft_wrap=True)


def output_of(cell):
    """The file of what the cell's processes printed; not beside its run, where none-s* would name both."""
    return cell.folder.parent / "output" / f"{cell.folder.name}.txt"


def accuracy(cell):
    return files.read_json(cell.folder / "metrics.json")["test"]["accuracy"]


def epochs_done(cell):
    try:
        return (cell.folder / "log.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def summarise(every, failed, name, out):
    """Print the test accuracy of each arm over its finished seeds. out: as on the command line."""
    show(f"\n{'arm':30}{'seeds':>8}{'test accuracy':>16}{'sd':>10}")
    for arm in dict.fromkeys(c.arm for c in every):
        found = [accuracy(c) for c in every if c.arm == arm and c.finished()]
        spread = f"{np.std(found, ddof=1):10.4f}" if len(found) > 1 else ""
        show(f"{arm:30}{len(found):>8}" + (f"{np.mean(found):16.4f}{spread}" if found else f"{'-':>16}"))
    left = sum(not c.finished() for c in every)
    if failed:
        show(f"\n{len(failed)} cells failed; see first {output_of(failed[0])}. The same command runs these again")
    elif left:
        show(f"\n{left} cells are left, for other shares or jobs")
    else:
        show(f"\nAll {len(every)} cells are done. {typed('report.py', name, out)} answers the questions, and with "
             "--text compares the arms here")
