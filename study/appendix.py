"""The end of a report: every run, and what it takes to make it all again."""

import shlex
from pathlib import Path

from engine import files, settings
from study import arms, figures
from study.figures import Section, Table, ends, number, points

FACTS = {"torch": "torch", "torchvision": "torchvision", "timm": "timm", "python": "Python", "device": "device",
         "processor": "processor", "threads": "threads", "commit": "commit",
         "uncommitted_changes": "changed since the commit"}


def the_runs(study):
    """Every run, with its curves."""
    table, results = [], [run for _, run in study.results]
    parts = {"val %": ("val", "accuracy"), "test %": ("test", "accuracy"), "clean test %": ("clean_test", "accuracy"),
             "worst group %": ("test", "worst_group")}
    parts = {name: way for name, way in parts.items() if any(share(run, *way) is not None for run in results)}
    for arm, run in study.results:
        cost, late = run.metrics["cost"], run.log[len(run.log) // 2:]
        table.append([arm, run.seed, *(points(share(run, *way)) for way in parts.values()), run.metrics["epochs"],
                      number(cost["train_seconds"], 1), cost["images_seen"], cost["erased_images"],
                      sum(line["erased_images"] for line in late),
                      number(cost["peak_gpu_allocated_mb"] or cost["peak_host_mb"], 0), str(run.folder)])
    skipped = sum(run.metrics["skipped_images"] for run in results)
    answer = f"{len(table)} runs of {len(study.arms)} arms."
    return Section("The runs", answer + f" Images left out by --skip-bad, over all runs: {skipped}." * bool(skipped), [
        figures.curves("loss", study.arms, "train_loss", "training loss"),
        Table("runs", "Every run.", ["arm", "seed", *parts, "epochs", "seconds", "images", "erased", "erased, 2nd half",
                                     "memory MB", "folder"], table), *asked(study)])


def asked(study):
    """What each network answered under --heat snapshot, and what the least and the most accurate run transplanted."""
    rows = [[arm, run.seed, answer["epoch"], points(answer["follows"], 1, True), ends(answer["interval"], 1),
             answer["pairs"], "yes" if answer["transplants"] else "no"] for arm, run in study.results
            if "snapshot" in run.metrics for answer in [*run.metrics["snapshot"]["before"], run.metrics["snapshot"]]]
    table = Table("asked", "By how many points a network follows few pixels, in a run under --heat snapshot, with the "
                  "95% interval over pairs of images; yes: every image is transplanted from there on.",
                  ["arm", "seed", "after epochs", "follows", "95% interval", "pairs", "depends"], rows)
    done = [run for _, run in study.results if run.metrics.get("snapshot", {}).get("transplants")
            and run.config["control"] is None and (run.folder / "sheet.png").exists()]
    done.sort(key=lambda run: run.metrics["test"]["accuracy"])
    sheets = [figures.from_png(f"sheet-{word}", run.folder / "sheet.png",
                               f"What is transplanted: {run.folder.name}, of these runs the {word} accurate on test.")
              for word, run in zip(("least", "most"), (done[0], done[-1]) if done else ())]
    return [table, *sheets] if rows else []


def share(run, part, key):
    """A share of a run's metrics; None where it has none."""
    return run.metrics.get(part, {}).get(key)


def how_made(study):
    """Versions, machine, data, commands and settings."""
    results = [run for _, run in study.results]
    made, first = [files.read_json(run.folder / "env.json") for run in results], results[0].config
    keys = [key for key in settings.SETTINGS if key not in (*settings.PER_MACHINE, "seed")]
    varied = [key for key in keys if any(run.config[key] != first[key] for run in results)]
    facts = [[name, ", ".join(sorted({str(env.get(key)) for env in made}))] for key, name in FACTS.items()]
    facts += [["seeds", ", ".join(map(str, sorted({run.seed for run in results})))],
              ["fingerprint of the data", ", ".join(sorted({run.split["fingerprint"] for run in results}))],
              ["command", study.command]]
    commands = [[arm, run.seed, shlex.join(["python", Path(env["command"][0]).name, *env["command"][1:]])]
                for (arm, run), env in zip(study.results, made)]
    own = [[arm, *(str(next(iter(runs.values())).config[key]) for key in varied)] for arm, runs in study.arms.items()]
    shared = [[key, str(first[key])] for key in keys if key not in varied]
    notes = " ".join(f"Note: {note}." for note in arms.warnings_of(study.arms))
    return Section("How it was made", notes or "All runs were made with the same versions on the same machine.", [
        Table("environment", "Versions, machine, data.", ["what", "is"], facts, None),
        Table("commands", "What made each run.", ["arm", "seed", "command"], commands),
        Table("arms", "What differs between arms.", ["arm", *varied], own),
        Table("settings", "What all runs share.", ["setting", "value"], shared, None)])


SECTIONS = (the_runs, how_made)
