"""The end of a report: every run, the images on which arms disagree, and what it takes to make it all again."""

import shlex
from pathlib import Path

import numpy as np

from engine import files, settings
from study import arms, comparison, explain, figures
from study.figures import Picture, Section, Table, number, points

PICTURES = 6  # test images on which arms disagree most
FACTS = {"torch": "torch", "torchvision": "torchvision", "timm": "timm", "python": "Python", "device": "device",
         "processor": "processor", "threads": "threads", "commit": "commit",
         "uncommitted_changes": "changed since the commit"}


def the_runs(study):
    """Every run, with its curves."""
    table = []
    for arm, run in study.results:
        cost = run.metrics["cost"]
        table.append([arm, run.seed, points(run.metrics["val"]["accuracy"]), points(run.metrics["test"]["accuracy"]),
                      run.metrics["epochs"], number(cost["train_seconds"], 1), cost["images_seen"],
                      cost["erased_images"], number(cost["peak_gpu_allocated_mb"] or cost["peak_host_mb"], 0),
                      str(run.folder)])
    skipped = sum(run.metrics["skipped_images"] for _, run in study.results)
    answer = f"{len(table)} runs of {len(study.arms)} arms."
    return Section("The runs", answer + f" Images left out by --skip-bad, over all runs: {skipped}." * bool(skipped), [
        figures.curves("loss", study.arms, "train_loss", "training loss"),
        Table("runs", "Every run.", ["arm", "seed", "val %", "test %", "epochs", "seconds", "images", "erased",
                                     "memory MB", "folder"], table)])


def disagreements(study):
    """The test images on which the baseline and the arm that differs most from it disagree most, with both heats."""
    title, paired, apart = "Where the arms disagree", {}, {}
    for arm, baseline in study.against.items():
        found = arms.pairs(study.arms[arm], study.arms[baseline]) if arm != baseline == study.baseline else []
        if found and found[0][0].split["classes"] == found[0][1].split["classes"]:
            paired[arm] = found[0]
            apart[arm] = np.abs(np.subtract(*(comparison.probabilities(run)[1] for run in found[0])))
    if not paired or not study.heat:
        return Section(title, "Left out by --no-heat." if paired else "There is nothing to compare.")
    arm = max(apart, key=lambda name: apart[name].mean())
    (other, run), lines, words, images = paired[arm], [], [], []
    chosen = np.argsort(-apart[arm], kind="stable")[:PICTURES]
    ids, classes = [run.split["test"][i] for i in chosen], run.split["classes"]
    names = [classes[label] for label in run.found["test_labels"][chosen]]
    for name, each in ((study.baseline, run), (arm, other)):
        predicted, sure = each.found["test_logits"][chosen].argmax(1), comparison.probabilities(each)[1][chosen]
        texts = [(f"predicts {classes[p]}", f"{100 * s:.0f}% {true}") for p, s, true in zip(predicted, sure, names)]
        heat, pixels = explain.heats(each.folder, ids, study.method, study.device)
        images.append(pixels.numpy() / 255)
        lines.append((heat, ["\n".join(line[:22] for line in (name, *text)) for text in texts]))
        words += [f"{image_id}, {name}: {', '.join(text)}" for image_id, text in zip(ids, texts)]
    figure = figures.disagreements(images[0], [f"class: {name}" for name in names], lines)
    return Section(title, f"Seed {run.seed}: the {len(ids)} test images to whose class {study.baseline} and {arm} give "
                   "the most different probability.", [
        Picture("disagreements", f"The image; the heat ({study.method}) of what {study.baseline} predicts; and of what "
                f"{arm} predicts.", figure, "; ".join(words))])


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


SECTIONS = (the_runs, disagreements, how_made)
