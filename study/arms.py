"""Arms of a study: finished runs that differ in their seed alone, and with which arm each is compared.

A run is paired with the baseline's run of the same seed. Both have the same split, so what both find easy or hard
cancels out.
"""

from pathlib import Path
from typing import NamedTuple

from engine import experiment, files, folder, metrics, settings
from engine.files import UserError

FOLLOWS = {"layer": "cam", "epochs": "schedule", "rounds": "schedule"}  # settings that others decide
TASK = ("dataset", "data_dir", "classes", "model", "image_size", "train_fraction", "decoy")
MADE_WITH = ("torch", "timm", "device", "processor", "commit")  # of env.json: what must not differ unnoticed


class Result(NamedTuple):
    """A finished run. found: what `folder.read_predictions` gives."""

    folder: Path
    config: dict
    split: dict
    log: list
    metrics: dict
    found: dict

    @property
    def seed(self):
        return self.config["seed"]

    def correct(self, part):
        """Whether each image of a part was recognised, bool [N]."""
        return self.found[f"{part}_logits"].argmax(1) == self.found[f"{part}_labels"]

    def confidence(self):
        """Probability of the predicted class of each test image, float64 [N]."""
        return metrics.softmax(self.found["test_logits"]).max(1)


def read_result(path):
    """A finished run; UserError where it is none."""
    run = folder.open_finished(path)
    return Result(run.folder, run.config, run.split, run.log, files.read_json(run.folder / "metrics.json"),
                  folder.read_predictions(run.folder))


def arms_of_experiment(name, given):
    """{arm: {seed: Result}} of an experiment's finished cells, and how many are left. given: settings for all cells."""
    arms, cells = {}, experiment.cells(settings.read_configs(), name, given)
    finished = [cell for cell in cells if cell.finished()]
    for cell in finished:
        arms.setdefault(cell.arm, {})[cell.seed] = read_result(cell.folder)
    return arms, len(cells) - len(finished)


def arms_of_runs(paths, by=()):
    """{arm: {seed: Result}} of runs that differ in the settings `by`, or else in one, besides the seed.

    The same settings and seed again are an arm of their own. Raises UserError where runs differ in more.
    """
    results, arms = [read_result(path) for path in paths], {}
    keys = [key for key in settings.SETTINGS if key not in (*settings.PER_MACHINE, "seed")]
    values = {key: [result.config[key] for result in results] for key in (*keys, "dataset_entry", "model_entry")}
    for key in by:
        if key not in values:
            raise UserError(f"--by {key}: no setting in which runs are compared{files.nearest(key, values)}")
    differing = [key for key, each in values.items() if any(value != each[0] for value in each)]
    compared = list(by) or [key for key in differing if FOLLOWS.get(key) not in differing]
    other = [key for key in differing if key not in compared and FOLLOWS.get(key) not in compared]
    if len(compared) > 1 and not by or other:
        listed = [f"{key}: {', '.join(dict.fromkeys(map(str, values[key])))}" for key in (other if by else compared)]
        raise UserError("these runs differ in more than one setting, so that no difference could be put down to it: "
                        f"{'; '.join(listed)}. Leave runs out, or name the settings to compare with --by KEY,KEY")
    for result in results:
        label = name = ", ".join(f"{key} {result.config[key]}" for key in compared) or "run"
        number = 1
        while result.seed in arms.get(name, {}):
            number += 1
            name = f"{label} ({number})"
        arms.setdefault(name, {})[result.seed] = result
    return arms


def pick_baseline(arms, name=None):
    """The arm that the others are compared with: the one named, or the one without Proxy Attention, or the first."""
    if name is not None and name not in arms:
        raise UserError(f"--baseline {name}: no such arm; there are {', '.join(arms)}{files.nearest(name, arms)}")
    without = [arm for arm, runs in arms.items() if all(run.config["cam"] == "none" for run in runs.values())]
    return name or ("none" if "none" in arms else [*without, *arms][0])


def groups(arms, baseline=None, by_task=True):
    """[(baseline, {arm: runs})]: arms that were set the same task, and which of these the others are compared with.

    A task is the settings in TASK: an arm on a tenth of the images is compared with the baseline on a tenth of the
    images. The group of the arm that `pick_baseline` picks comes first. With a baseline, or without by_task: one group.
    """
    first, found = pick_baseline(arms, baseline), {}
    if baseline or not by_task:
        return [(first, arms)]
    for arm, runs in arms.items():
        config = next(iter(runs.values())).config
        found.setdefault(tuple(str(config[key]) for key in TASK), {})[arm] = runs
    return sorted(((pick_baseline(group), group) for group in found.values()), key=lambda pair: first not in pair[1])


def pairs(arm, baseline):
    """[(run of the arm, run of the baseline)] with the same seed; UserError where two of these have other splits."""
    found = [(arm[seed], baseline[seed]) for seed in sorted(set(arm) & set(baseline))]
    for a, b in found:
        if a.split["fingerprint"] != b.split["fingerprint"] or a.split["test"] != b.split["test"]:
            raise UserError(f"{a.folder} and {b.folder} have seed {a.seed} and other test images: they cannot be "
                            "compared. Leave one of them out")
    return found


def warnings_of(arms):
    """What a reader of the comparison must know: other machines or versions, unpaired seeds, and a leak, as texts."""
    results = [result for runs in arms.values() for result in runs.values()]
    made, texts = [files.read_json(result.folder / "env.json") for result in results], []
    for key in MADE_WITH:
        if len(different := sorted({str(env.get(key)) for env in made})) > 1:
            texts.append(f"the runs were made with different {key}: {', '.join(different)}")
    if len({frozenset(runs) for runs in arms.values()}) > 1:
        texts.append("the arms do not all have the same seeds: each is compared on those it shares with the baseline")
    if any(result.config["mode"] == "resplit" for result in results):
        texts.append(f"some runs have --mode resplit: {metrics.LEAK}")
    return texts
