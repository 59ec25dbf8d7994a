"""Train an image classifier with Proxy Attention: erase what misled it, and train on what is left.

    python train.py                                            # scikit-learn's digits, a small residual network
    python train.py --dataset asl --model vit_small --cam gradcam++
    python train.py FOLDER                                     # any folder of class folders
    python train.py --csv FILE                                 # any CSV with paths of images and labels
    python train.py --cam none                                 # the same run without Proxy Attention
    python train.py --mode staged --rounds 3                   # erase between trainings, and keep the images on disk
    python train.py --dry-run --show                           # settings, split, network, a sheet of fills and controls
    python train.py --resume runs/NAME                         # go on with an interrupted run
    python train.py --experiment demo --jobs 2                 # the runs of an experiment that are not finished yet
    torchrun --nproc-per-node 4 train.py --dataset places      # on several GPUs, or CPUs

Each step of `train` below is one forward and one backward pass over a batch of one fixed size. Where the network got a
fresh image wrong, a class activation map taken from that same forward pass shows the pixels that misled it; a copy
with these pixels erased takes a seat in the next batch. How a step does that stands in `proxy.py`, `STEPS`. Settings
come from `configs.json`; each is an option here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python leaves it out under PYTHONSAFEPATH

from engine import options

if __name__ == "__main__":
    options.answer_help(__doc__)

import torch

import eval as evaluation
from engine import before, cache, experiment, files, launch, metrics, ranks
from engine.costs import Counts, memory
from engine.display import console, print_epoch, show
from engine.files import UserError
from engine.fit import out_of_memory
from engine.folder import read_log
from engine.settings import SNAPSHOT
from engine.training import Interval, Parts, Stage, check_finite, finish_epoch, load_last, save_last, set_up, validate
from snapshot import with_snapshot
from staged import staged


def train(config, folder, dataset, split, model, device, stage, stop):
    """The loop: from the last checkpoint in `folder`, if there is one, to the stage's end, or until a signal stops it.

    split: {"train", "val": ids}. model: the network, trained in place. stage: `Stage`, the epochs. stop: `ranks.Stop`.
    """
    parts = Parts(config, folder, dataset, split, device)
    t = set_up(config, folder, parts, model, device, stage)
    first_epoch, first_step, counts = load_last(t, stage)
    accuracies = [line["val_accuracy"] for line in read_log(folder)][:first_epoch]
    due, stop.within_steps = Interval(), True

    for epoch in range(first_epoch, stage.pause or stage.end):
        batches = parts.of(epoch, first_step)
        counts = counts or Counts(device, t.energy)
        t.begin_epoch(counts)
        take_step = t.proxy.step(epoch, accuracies)  # one of proxy.STEPS; plain in epochs in which nothing is erased
        for step, (pixels, labels) in enumerate(show(batches, epoch, stage, counts), first_step):
            images, labels = t.prepare(pixels, labels, epoch, step, len(batches))
            trained = take_step(t.forward, images, labels, t.proxy)
            updated, skipped = t.backward(trained.loss, step, len(batches))
            counts.add(trained, updated, skipped)
            if updated:
                number, save = stop.asked(due.passed())
                if number or save:
                    check_finite(t, parts)
                    save_last(t, epoch, step + 1, counts)
                if number:
                    raise ranks.Stopped(number)
        check_finite(t, parts)

        line = {"epoch": epoch + 1, "lr": t.schedule.get_last_lr()[0], **counts.totals(ranks.everyone),
                **validate(t, parts.validation), **memory(device), **parts.notes(), **stage.notes(parts)}
        finish_epoch(t, line)
        accuracies.append(line["val_accuracy"])
        first_step, counts = 0, None
        print_epoch(line, stage)
    t.energy.close()
    stop.leave_steps()


def run_to_its_end(ready, stop, any_code):
    """Train, online or staged, from wherever the run stands. ready: `launch.Ready`."""
    config, folder, dataset, split, model, device = ready
    epoch = ranks.from_first(launch.ready_checkpoint, folder, config, split, any_code)
    if config["mode"] == "resplit":
        console.print(f"--mode resplit: {metrics.LEAK}", soft_wrap=True)
    text = ranks.from_first(cache.open_pixels, dataset, config) if dataset.pixels is None else None
    if ranks.RANKS > 1:  # each machine may have a cache of its own
        ranks.from_each(ranks.machines(), cache.open_pixels, dataset, config)
        if ranks.LOCAL_RANK:
            cache.open_pixels(dataset, config, build=False)
    if text:
        console.print(text, markup=False, soft_wrap=True)
    if config["reweight"]:
        misled = ranks.from_first(before.first_misled, config, folder, dataset, split, device)
        split = {**split, "misled": misled}
    if config["mode"] == "staged":
        del model  # each stage opens its own
        staged(config, folder, dataset, split, device, stop, epoch, train)
    elif config["heat"] == SNAPSHOT:
        del model
        with_snapshot(config, folder, dataset, split, device, stop, epoch, train)
    else:
        model = model or launch.open_network(config, folder, dataset)
        train(config, folder, dataset, split, model, device, Stage(0, config["epochs"]), stop)


def main(arguments=None):
    """The command line; returns the exit status: 2 for what the user can mend, 128 and the number of a signal."""
    options.use_any_console()
    ready, other, stop = None, {}, ranks.Stop()
    try:
        given, other = options.parse(arguments, __doc__)
        if other["experiment"]:
            if ranks.RANKS > 1:
                raise UserError("--experiment: leave torchrun out; its runs have a process each")
            return experiment.run_cells(other["experiment"], given, other["cell"], int(other["jobs"] or 1),
                                        other["any_code"])
        ready = launch.start_together(given, other, train)
        if ready is None:
            return 0
        run_to_its_end(ready, stop, other["any_code"])
        if ranks.RANK:
            return 0
        result = evaluation.finish(ready.folder, ready.dataset, ready.device)
    except UserError as error:
        if ranks.first_to_say(error):
            show_error(error, ready)
        return 2
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):  # it died
            show_error(UserError("a process that decodes images was killed, most often because memory ran out, or "
                                 "shared memory (/dev/shm): give fewer with --workers"), ready)
        elif ready and (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            show_error(out_of_memory(ready.config, ready.folder, ready.device), ready)
        else:
            raise
        return 2
    except (KeyboardInterrupt, ranks.Stopped) as stopped:
        go_on = f"; go on with {ranks.LAUNCHER} train.py --resume {files.quoted(ready.folder)}" if ready else \
            "; the same command goes on" if other.get("experiment") else ""
        if ranks.RANK == 0:
            print(f"\ntrain.py: interrupted{go_on}", file=sys.stderr)
        return 128 + getattr(stopped, "signal", 2)
    finally:
        stop.end()
        ranks.end()
    print(f"\n{evaluation.describe(ready.folder, result)}\n\nLook at {ready.folder}/sheet.png and curves.png; "
          f"print this again with python eval.py {files.quoted(ready.folder)}")
    return 0


def show_error(error, ready):
    """A UserError as one line, with how to go on where a run has begun."""
    command = f"{ranks.LAUNCHER} train.py --resume {files.quoted(ready.folder)}" if ready else ""
    go_on = f". Then go on with {command}" if ready and error.resumable else ""
    print(files.one_line(f"train.py: {error}{go_on}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
