"""What is shown of a run while it runs: a line per epoch, and within it a bar, or now and then a line in a file."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from engine import ranks

SECONDS = 0.5  # the display asks for the device's counts this often
FIRST_LINE, LINES = 5, 30  # seconds, where there is no terminal: to the first line of `progress`, and between any two
console = Console(highlight=False, quiet=ranks.RANK > 0)


def progress(items, text, total=None):
    """Yield the items, of which there are `total`, by default their length."""
    total = len(items) if total is None else total
    if console.is_terminal:
        yield from track(items, text, total, console=console, transient=True)
        return
    due = time.monotonic() + FIRST_LINE
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() > due:
            due = time.monotonic() + LINES
            console.print(f"{text}: {number} of {total}", markup=False, soft_wrap=True)


def show(batches, epoch, stage, counts):
    """Yield an epoch's batches, with a display of the stage where the output is a terminal."""
    if not console.is_terminal:
        due = time.monotonic() + LINES
        for step, batch in enumerate(batches, batches.order.start + 1):
            yield batch
            if time.monotonic() > due and not console.quiet:
                due = time.monotonic() + LINES
                console.print(f"epoch {epoch + 1}/{stage.end}  step {step}/{len(batches)}  {describe(counts.lately())}",
                              markup=False, soft_wrap=True)
        return
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        steps = len(batches)  # the bar and the time left are the stage's, not the epoch's
        done = (epoch - stage.start) * steps + batches.order.start
        task = bar.add_task("", total=(stage.end - stage.start) * steps, completed=done, state="",
                            epoch=f"{epoch + 1}/{stage.end}")
        shown = time.perf_counter()
        for batch in batches:
            yield batch
            bar.advance(task)
            if time.perf_counter() - shown > SECONDS:
                shown = time.perf_counter()
                bar.update(task, state=describe(counts.lately()))


def describe(line):
    return (f"loss {line['train_loss']:.3f}  accuracy {line['train_accuracy']:.3f}  misled {line['misled']:.1%}  "
            f"erased {line['erased_images']}  {line['images_seen'] / line['train_seconds']:.0f} images/s")


def print_epoch(line, stage):
    left = (stage.end - line["epoch"]) * (line["train_seconds"] + line["eval_seconds"])
    leak = "  LEAK" if "warning" in line else ""
    console.print(f"epoch {line['epoch']}/{stage.end}  {describe(line)}  val {line['val_accuracy']:.3f}  "
                  f"left {int(left) // 60}:{int(left) % 60:02d}{leak}", markup=False, soft_wrap=True)
