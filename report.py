"""The answers to the research questions: one HTML page, and every figure and table of it in files of its own.

    python report.py --experiment demo              # what is finished of an experiment, into runs/demo/report/
    python report.py runs/A-s0 runs/B-s0 …          # runs that differ in one setting, into report/
    python report.py --experiment demo --text       # the comparison alone, in the terminal; writes nothing
    python report.py --experiment demo --no-heat    # without what needs networks and images: a few seconds

`report.html` needs no network and no other file; figures/*.png and *.pdf, tables/*.csv and *.tex (booktabs) are for a
text. Each question is a function in QUESTIONS, which gives a `Section`, or None where the runs do not ask it.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Python leaves it out under PYTHONSAFEPATH

import numpy as np

import cam
from engine import experiment, metrics, network, settings
from engine.files import UserError
from engine.options import Parser, program
from study import appendix, arms, comparison, explain, figures, statistics
from study.figures import MEASURES, Picture, Section, Table, ends, number, points, span


def augmentation(study):
    """Question 1: is it an augmentation?"""
    rows = study.rows()
    compared = [row for row in rows if row.get("pairs")]
    answer = (f"{study.baseline} reaches {points(rows[0]['mean'])}% on test over {rows[0]['seeds']} seeds. "
              f"{verdicts(compared)}.")
    against = study.baseline if len(study.groups) == 1 else "the same without it"
    dots = figures.dots("augmentation", compared, f"test accuracy, points against {against}")
    return Section("Can attention maps make an augmentation?", answer, dots + accuracies(study))


def accuracies(study, part="test"):
    """Two Tables: the accuracy of every arm on a part of the split, and what each arm costs."""
    rows = study.rows(part)
    costs = [[row["arm"], study.against[row["arm"]], *map(number, row["price"].values())]
             for row in rows if row.get("pairs")]
    return [figures.accuracies(rows, study.against, part),
            Table("price", "What each arm costs, as multiples of what it is compared with (medians over seeds).",
                  ["arm", "against", *comparison.PRICES], costs)]


def verdicts(rows):
    """What a comparison found, in a sentence: each arm in words, or of many arms how many of each kind and which."""
    if len(rows) <= 3:
        said = "; ".join(f"{row['arm']}: {comparison.say(row)}" for row in rows)
        return said or "There is nothing to compare it with"
    sure = [row for row in rows if row["p_holm"] < statistics.LEVEL]
    texts = [f"{len(found)} {kind}" + f" ({', '.join(repr(row['arm']) for row in found)})" * bool(found)
             for kind, found in (("better", [row for row in sure if row["difference"] > 0]),
                                 ("worse", [row for row in sure if row["difference"] < 0]))]
    few = sum(row["pairs"] < statistics.fewest_seeds(row["family"]) for row in rows)
    texts += [f"{len(rows) - len(sure) - few} not significant"]
    texts += [f"{few} with too few seeds to be significant"] * (few > 0)
    return f"Of {len(rows)} arms, after Holm over {rows[0]['family']} comparisons: {'; '.join(texts)}"


def attention(study):
    """Question 2: does the CNN attend where the ViT does?"""
    title = "Can a CNN be brought to attend where a ViT does?"
    if not study.heat:
        return Section(title, "Left out by --no-heat.")
    transformers = [arm for arm, runs in study.arms.items() if explain.attends(next(iter(runs.values())))]
    others = [arm for arm in study.arms if arm not in transformers]
    if not transformers or not others:
        return Section(title, "Not asked by these runs: it takes arms with a ViT and arms with a CNN on the same data, "
                       "as in python train.py --experiment vit-attention.")
    vit, base = (arms.pick_baseline({arm: study.arms[arm] for arm in each}) for each in (transformers, others))
    values, method = {}, study.method
    paired = [(arm, *pair) for arm in others for pair in arms.pairs(study.arms[arm], study.arms[vit])]
    for arm, a, b in sorted(paired, key=lambda pair: pair[2].seed):  # so that the ViT is asked once a seed
        for key, found in explain.likeness(a, method, b, cam.ATTENTION, study.device).items():
            values.setdefault(key, {}).setdefault(arm, {})[a.seed] = float(found.mean())
    if base not in values.get("correlation", ()):
        return Section(title, f"{base} and {vit} have no seed in common.")
    compared = {measure: comparison.compare_values(each, base) for measure, each in values.items()}
    likes = compared["correlation"]
    family = max(row.get("family", 0) for row in comparison.one_family(sum(compared.values(), [])))
    table = [[measure, row["arm"], number(row["mean"]), number(row["spread"]), span(row), number(row.get("p"), 4),
              number(row.get("p_holm"), 4)] for measure, rows in compared.items() for row in rows]
    answer = f"The heat ({method}) of {base} and the rollout of {vit} have a rank correlation of {table[0][2]}"
    references = explain.references(study.arms[base], study.arms[vit], method, study.device)
    for name, found in zip((f"two seeds of {base}", "a centred Gaussian", "the object itself"), references):
        for measure in found[0] if found else ():
            each = values[measure][name] = {place: float(like[measure].mean()) for place, like in enumerate(found)}
            means = list(each.values())
            table.append([measure, name, number(np.mean(means)), number(comparison.spread(means)), *"–––"])
            answer += f"; {name}: {table[-1][2]}" * (measure == "correlation")
    if differences := figures.in_words(likes):
        few = min(row["pairs"] for row in likes[1:]) < statistics.fewest_seeds(family)
        answer += f". Against {base}: {differences}" + f" (too few seeds for Holm over {family})" * few
    dots = figures.dots("attention", likes, f"rank correlation with {vit}, difference to {base}", 1, "")
    seed = min(set(study.arms[base]) & set(study.arms[vit]))
    runs = {arm: study.arms[arm][seed] for arm in (*others, vit) if seed in study.arms[arm]}
    caption = f"The first drawn test image of each class, seed {seed}; heat by {method}, of {vit} by rollout."
    return Section(title, f"{answer}.", dots + [
        figures.photographs("attention-examples", *explain.examples(runs, method, vit, study.device), caption),
        Table("attention", f"How alike {method} heat is to the attention rollout of {vit}, on the same test images: "
              "rank correlation over pixels, also with its gradient rollout; overlap (IoU) of the hottest fifth. "
              f"Intervals by t over seeds; Holm over all measures and arms ({family}). Last, what to compare with; "
              "each seed is in one pair of seeds.",
              ["measure", "arm", "mean", "sd", "difference, 95% interval", "p", "p, Holm"], table, 1),
        figures.per_seed("attention-runs", values), *erased_copies(study, others, transformers)])


def erased_copies(study, others, judges):
    """[Tables of what the arms `judges` see in images that mislead the arms `others`, once erased], or none."""
    found = {}
    for judge, arm in itertools.product(judges, others):
        for a, b in arms.pairs(study.arms[arm], study.arms[judge]):
            for place, right in explain.kept(a, b, study.device).items():
                found.setdefault((judge, arm), {}).setdefault(a.seed, {})[place] = float(right.mean())
    places = ["nothing", *explain.PLACES]
    table = [[*key, len(seeds), *(points(np.mean([each[place] for each in seeds.values()])) for place in places)]
             for key, seeds in found.items()]
    rows = [[*key, seed, *map(points, each.values())] for key, seeds in found.items()
            for seed, each in seeds.items()]
    caption = ("Do erased copies keep their class? Of test images that mislead an arm, how many a ViT recognises, "
               "in %: with nothing erased, the hottest tenth by Grad-CAM of the loss, as much at a random place, and "
               "the coolest, in black.")
    return [Table("kept", caption, ["judge", "arm", "seeds", *places], table),
            Table("kept-runs", caption, ["judge", "arm", "seed", *places], rows, shown=False)] if table else []


def convergence(study):
    """Question 3: sooner, and with less data?"""
    rows = [row | {"against": baseline} for baseline, group in study.groups
            for row in comparison.sooner(group, baseline)]
    compared = comparison.one_family([row["images"] for row in rows if row["arm"] != row["against"]])
    family = len(compared)
    table = [[row["arm"], row["against"], f"{100 * row['target']:g}", f"{row['arrived']} of {row['seeds']}",
              row["horizon"], number(row["epochs"]["mean"], 1), span(row["epochs"], 1),
              number(row["images"]["mean"], 0), span(row["images"], 0), number(row["images"].get("p"), 4),
              number(row["images"].get("p_holm"), 4)] for row in rows]
    sure = [row for row in rows if row["images"].get("p_holm", 1) < statistics.LEVEL]
    answer = f"Of {family} comparisons (arms times targets), after Holm over all of them, {len(sure)} are significant"
    if sure:
        answer += ": " + "; ".join(f"{row['arm']} to {100 * row['target']:g}% {span(row['images'], 0)} images"
                                   for row in sure[:3]) + "; …" * (len(sure) > 3)
    elif rows and rows[0]["seeds"] < (least := statistics.fewest_seeds(family or 1)):
        answer += f"; it takes {least} seeds"
    reached = [[arm, run.seed, f"{100 * target:g}", when or "", sum(line["images_seen"] for line in run.log[:when])
                if when else "", len(run.log)] for arm, run in study.results for target in comparison.TARGETS
               for when in [comparison.epoch_of(run.log, target)]]
    parts = [figures.curves("convergence", study.arms, "val_accuracy", "validation accuracy", " %", 100),
             Table("convergence", "How soon validation accuracy first reaches each target that some run reaches; a run "
                   "that never does counts as the horizon (restricted means, in epochs and in images). Differences by "
                   "seed, intervals by t; p by permutation on images, then by Holm over arms and targets, "
                   f"{family} comparisons.",
                   ["arm", "against", "target %", "arrive", "horizon", "epochs", "difference in epochs, 95% interval",
                    "images", "difference in images, 95% interval", "p", "p, Holm"], table),
             Table("convergence-runs", "When each run first reached each target; empty where it never did.",
                   ["arm", "seed", "target %", "epoch", "images", "epochs in all"], reached, 0, False)]
    found = comparison.by_fraction(study.results)
    if (kind := study.baseline.split("-train_fraction=")[0]) in found:
        more, text = figures.with_less_data(found, kind)
        parts, answer = parts + more, f"{answer}. {text}"
    return Section("Does the network converge faster, and so need less data?", f"{answer}.", parts)


def explainability(study):
    """Question 4: is it easier to explain?"""
    title, values = "Does it change how well the network can be explained?", {}
    if not study.heat:
        return Section(title, "Left out by --no-heat.", explain.tables_of_where(study.arms))
    for arm, run in study.results:
        for name, found in explain.write_explanations(run.folder, study.method, study.device).items():
            if found.ndim == 1:  # not a curve
                values.setdefault(name, {}).setdefault(arm, {})[run.seed] = float(found.mean())
    values = {name: values[name] for name in MEASURES if len(values.get(name, ())) == len(study.arms)}
    rows = {name: study.figures(each) for name, each in values.items()}
    for baseline in {*study.against.values()}:  # what is said of a baseline's arms is said by all measures
        comparison.one_family([row for each in rows.values() for row in each
                               if study.against[row["arm"]] == baseline])
    compared = {name: [row for row in each if row.get("pairs")] for name, each in rows.items()}
    table = [[MEASURES[name], row["arm"], number(row["mean"], 4), number(row["spread"], 4), span(row),
              number(row.get("p"), 4), number(row.get("p_holm"), 4), row.get("family", "–")]
             for name, each in rows.items() for row in each]
    sure = [f"{row['arm']}: {MEASURES[name]} {row['difference']:+.3f}"
            for name, each in compared.items() for row in each if row["p_holm"] < statistics.LEVEL]
    few = any(row["pairs"] < statistics.fewest_seeds(row["family"]) for each in compared.values() for row in each)
    found = "; ".join(sure) or ("too few seeds to tell" if few else "no measure differs significantly after Holm")
    caption = (f"Explanations by {study.method}, on {explain.EXPLAINED} test images of each seed; intervals by t over "
               "seeds; Holm over all measures and arms of one baseline, the family.")
    parts = [Table("explanations", caption, ["measure", "arm", "mean", "sd", "difference, 95% interval", "p", "p, Holm",
                                             "family"], table, 1),
             figures.per_seed("explanations-runs", values)]
    parts += explain.tables_of_where(study.arms)
    if any(compared.values()):
        words = "; ".join(f"{MEASURES[name]}: {figures.in_words(each)}" for name, each in compared.items())
        caption = "Differences in each measure, paired by seed, with 95% intervals (t)."
        parts = [Picture("explanations", caption, figures.measures(compared), words), *parts]
    return Section(title, f"Measured with {study.method}, which no arm was trained with: {found}.", parts)


def shortcut(study):
    """Question 5: is a shortcut unlearnt?"""
    parts, answers = [], []
    for base, group in study.groups:
        if not parts and any(run.config["decoy"] for runs in group.values() for run in runs.values()):
            parts, answers = planted(study, base, group)
    if any("worst_group" in run.metrics["test"] for _, run in study.results):
        worst = {arm: {seed: run.metrics["test"]["worst_group"] for seed, run in runs.items()}
                 for arm, runs in study.arms.items()}
        rows = comparison.one_family(study.figures(worst))
        table = [[row["arm"], row["seeds"], points(row["mean"]), points(row["spread"]),
                  points(row.get("difference"), sign=True), ends(row.get("interval")), number(row.get("p"), 4),
                  number(row.get("p_holm"), 4)] for row in rows]
        answers.append("Worst group: " + "; ".join(f"{row[0]} {row[2]}%" for row in table) + ".")
        parts.append(Table("groups", "Test accuracy in % of the worst group (class within group; Sagawa et al. 2020). "
                           f"Intervals by t over seeds; Holm over the {sum('p' in row for row in rows)} comparisons.",
                           ["arm", "seeds", "worst group", "sd", "difference", "95% interval", "p", "p, Holm"], table))
    title = "Can it unlearn a shortcut that nobody labelled?"
    return Section(title, " ".join(answers), parts) if parts else None


def planted(study, base, group):
    """Parts and sentences on the arms of a group with planted squares, and on those without. base: their baseline."""
    rows = {row["arm"]: row for row in study.rows()}
    compared = [rows[arm] for arm in group if rows[arm].get("pairs")]
    clean = [row for arm, row in rows.items() if arm not in group and row.get("pairs")]
    answers = [f"Where the square lies, {base} recognises {points(rows[base]['mean'])}% of the test images; "
               f"{verdicts(compared)}. Validation cannot see the shortcut, for there it tells the truth."]
    if clean:
        answers.append(f"Without squares: {verdicts(clean)}.")
    table = []
    for arm, runs in study.arms.items():
        each = list(runs.values())
        right = {part: [run.correct(part).mean() for run in each if f"{part}_labels" in run.found]
                 for part in metrics.PREDICTED}
        table.append([arm, len(each), *(points(np.mean(values) if values else None) for values in right.values()),
                      *on_the_square(study, each), *followed(study, each)])
    names = ["arm", "seeds", "validation", "test", "clean test", "heat on the square", "chance", "found", "follows"]
    parts = figures.dots("shortcut", compared, f"accuracy where the square lies, points against {base}") + [
        Table("shortcut", "Accuracy in %: validation (the square tells the truth), test (it lies), the same test "
              "without squares; the share of the heat on the square, and what chance would give. Found: in how many "
              "runs the network depends on few pixels, by --heat snapshot or by python -m study.explain RUN --follows, "
              "the exact 95% interval of that share, and the points by which it follows these.", names, table)]
    return parts, answers


def on_the_square(study, runs):
    """Share of the heat on the decoy's square, and of the pixels that it covers; dashes where it was not measured."""
    if not study.heat or not all(run.config["decoy"] for run in runs):
        return ["–", "–"]
    found = [explain.write_explanations(run.folder, study.method, study.device) for run in runs]
    return [points(np.mean([values[key].mean() for values in found])) for key in ("inside", "covered")]


def followed(study, runs):
    """In how many runs the network depends on few pixels, and by how many points; dashes where it was not measured."""
    if not (study.heat or all("snapshot" in run.metrics or (run.folder / "follows.json").exists() for run in runs)):
        return ["–", "–"]
    answers = [run.metrics.get("snapshot") or explain.write_follows(run.folder, study.device) for run in runs]
    count = sum(answer["transplants"] for answer in answers)
    return [f"{count} of {len(answers)} ({ends(statistics.exact_interval(count, len(answers)), 0)}%)",
            points(np.mean([answer["follows"] for answer in answers]), sign=True)]


def continual(study):
    """What is kept of the first classes, where arms start from other arms?"""
    later, first = comparison.added_classes(study.arms)
    table, answers = [], []
    for arm, rows in comparison.old_and_new(later, first).items():
        started = any(run.config["init"] for run in study.arms[arm].values())
        known = {key: [row[key] for row in rows if row[key] is not None] for key in ("old", "new", "forgotten")}
        old, new, forgotten = (points(np.mean(values) if values else None) for values in known.values())
        seconds = number(np.mean([run.metrics["cost"]["train_seconds"] for run in later[arm].values()]), 1)
        table.append([arm, len(rows), old, new, forgotten if started else "–", seconds])
        answers.append(f"{arm}: {old}% on old classes, {new}% on new ones, "
                       + f"{forgotten} points forgotten, " * started + f"trained in {seconds} s")
    part = Table("continual", "Test accuracy in %; forgotten: on old classes, before minus after; seconds of the last "
                 "training.", ["arm", "seeds", "old classes", "new classes", "forgotten", "seconds"], table)
    return Section("What is kept when classes are added?", "; ".join(answers) + ".", [part]) if table else None


def confidence(study):
    """Is it as sure as it is right?"""
    table, pooled = [], {}
    for arm, runs in study.arms.items():
        pooled[arm] = [(run.confidence(), run.correct("test")) for run in runs.values()]
        aurc = np.mean([statistics.risk_coverage(*each)[1].mean() for each in pooled[arm]])
        ece = np.mean([metrics.expected_calibration_error(*each) for each in pooled[arm]])
        sure = np.concatenate([confidence for confidence, _ in pooled[arm]]).mean()
        misled = comparison.misled_confidence(runs, study.arms[study.against[arm]])
        table.append([arm, number(aurc, 4), number(ece, 4), points(sure),
                      *(["–"] * 3 if misled is None else (points(values.mean()) for values in misled))])
    answer = "Calibration error and area under the risk-coverage curve: " + "; ".join(
        f"{row[0]} {row[2]} and {row[1]}" for row in table) + "."
    return Section("Is it as right as it is sure?", answer, [
        Picture("confidence", "The share of errors among the most confident test images, all seeds together.",
                figures.risks(pooled), answer),
        Table("confidence", "Area under the risk-coverage curve (lower is better), expected calibration error, mean "
              "confidence %; and on test images that misled the baseline: its confidence, the arm's, and % right now.",
              ["arm", "AURC", "ECE", "confidence", "misled, before", "misled, now", "of them right"], table)])


def leak(study):
    """How much does --mode resplit, the published implementation's, add to validation accuracy?"""
    table = []
    for arm, runs in study.arms.items():
        mode = next(iter(runs.values())).config["mode"]
        val, test = ([run.metrics[part]["accuracy"] for run in runs.values()] for part in ("val", "test"))
        cells = [cell for each in (val, test) for cell in (points(np.mean(each)), ends(statistics.interval(each)))]
        gaps = np.subtract(val, test)
        table.append([arm, mode, len(runs), *cells, points(gaps.mean(), sign=True), ends(statistics.interval(gaps))])
    if all(row[1] != "resplit" for row in table):
        return None
    answer = "; ".join(f"{row[0]}: {row[3]}% on validation, {row[5]}% on test" for row in table)
    return Section("How much of the validation accuracy is a leak?", f"{answer}. Note: {metrics.LEAK}.", [
        Table("leak", "Accuracy in % and its 95% interval over seeds (t); above: validation minus test, by seed.",
              ["arm", "mode", "seeds", "validation", "its 95% interval", "test", "its 95% interval", "above",
               "its 95% interval"], table)])


QUESTIONS = (augmentation, attention, convergence, explainability, shortcut, continual, confidence, leak)


def print_comparison(study, left):
    """`--text`: the comparison in the terminal, and what its reader must know. left: how many runs are not finished."""
    clean = all("clean_test_labels" in run.found for _, run in study.results)
    tables = accuracies(study) + accuracies(study, "clean_test")[:1] if clean else accuracies(study)
    for table in tables:
        print(f"{table.caption}\n\n{figures.as_text(table.header, table.rows)}\n")
    for text in arms.warnings_of(study.arms):
        print(f"note: {text}")
    print(f"{left} runs are not finished yet: {study.command}" if left else
          "Run more seeds to narrow the intervals; python eval.py RUN shows one run")


def parse(arguments):
    """The options of the command line, checked. Raises UserError."""
    parser = Parser("report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished runs")
    parser.add_argument("--experiment", metavar="NAME", help="compare the finished runs of experiments/NAME.json")
    parser.add_argument("--baseline", metavar="ARM", help="compare with this arm (default: the one with --cam none)")
    parser.add_argument("--by", metavar="KEY,KEY", help="settings to compare, where runs differ in more than one")
    parser.add_argument("--text", action="store_true", help="print the comparison in the terminal, and write nothing")
    parser.add_argument("--no-heat", action="store_true", help="leave out what needs the networks and the images")
    parser.add_argument("--out", metavar="FOLDER", help="the folder of the experiment's runs, or for runs the report's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    options = argparse.Namespace(**parser.parse(arguments))
    if bool(options.runs) == bool(options.experiment):
        parser.error("name runs or an experiment")
    return options


def open_study(options):
    """The Study that the command line asks for, the folder of its report, and how many runs are not finished."""
    name, device = options.experiment, network.pick_device(options.device)
    if name:
        configs, command = settings.read_configs(), experiment.typed("train.py", name, options.out)
        found, left = arms.arms_of_experiment(name, {"out": options.out} if options.out else {})
        if not found:
            raise UserError(f"--experiment {name}: no run is finished; first run {command}")
        about = experiment.read_experiment(name, configs.get("experiments")).get("help", "")
        folder = Path(options.out or configs["defaults"]["out"]) / name / "report"
    else:
        found, left = arms.arms_of_runs(options.runs, options.by.split(",") if options.by else ()), 0
        about, command, folder = "", "python report.py " + " ".join(options.runs), options.out or "report"
    groups = arms.groups(found, options.baseline, by_task=bool(name))
    return comparison.Study(groups, name or "Runs", about, command, device, not options.no_heat), folder, left


@program("report.py")
def main(arguments=None):
    """The command line."""
    options = parse(arguments)
    study, folder, left = open_study(options)
    if options.text:
        return print_comparison(study, left)
    sections = [section for make in (*QUESTIONS, *appendix.SECTIONS) if (section := make(study))]
    page = figures.write(folder, sections, study)
    print(f"{page}: {len(study.results)} runs of {len(study.arms)} arms"
          + f"; {left} runs are not finished yet" * bool(left))
    print("Open it in a browser; figures/ and tables/ beside it are for a text")


if __name__ == "__main__":
    sys.exit(main())
