"""What may be set of a run, and how it comes together: defaults, the dataset's, the network's, the command line's.

    config = resolve(read_configs(), {"dataset": "asl", "model": "vit_small"})   # every setting, checked
"""

import importlib.util
from pathlib import Path

from engine.files import UserError, named, nearest, read_json
from engine.schema import (HERE, TINY, Keys, Setting, check, delimiter, imported, normalisation, number, one_of, split,
                           texts, torchvision_class)

CONFIGS = HERE / "configs.json"
FORMAT = 2  # of config.json: 1, which names no format, is that of runs made with 64 settings
AUTO = "auto"
read_augment, read_schedule = imported("data", "read_augment"), imported("proxy", "read_schedule")
read_columns = imported("engine.table", "read_columns")

DATA, NETWORK, TRAINING, STAGED, MACHINE = "data", "network", "training", "staged and published pipeline", "machine"
WHEN, IMAGES, PIXELS, INSTEAD, CONTROLS = (f"Proxy Attention: {what}" for what in (
    "when", "which images", "which pixels", "what instead, and in which seats", "control"))

SETTINGS = {
    "dataset": Setting(str, DATA, "a dataset of configs.json, or `folder`, as --data-dir or --csv alone mean"),
    "data_dir": Setting(str, DATA, "the dataset's folder, if not the one configs.json names", optional=True,
                        syntax=named),
    "csv": Setting(str, DATA, "a CSV file with a row per image: a path relative to --data-dir, or else to its own "
                   "folder; or an id, without folder and ending", optional=True, syntax=named),
    "csv_columns": Setting(str, DATA, "its columns, as path=FILE,label=BREED,split=PART,group=PLACE; 1, 2, 3 … where "
                           "it has no header (null: guessed where there is no doubt)", optional=True,
                           syntax=read_columns),
    "classes": Setting(str, DATA, "the only classes to use, with commas between, or except:A,B (null: all)",
                       optional=True),
    "image_size": Setting(int, DATA, "side of the square images (null: as the dataset)", 8, 4096, optional=True),
    "train_fraction": Setting(float, DATA, "share of the training part to train on, stratified", TINY, 1),
    "skip_bad": Setting(bool, DATA, "leave out images that cannot be used; without, they end the run at its start"),
    "decoy": Setting(float, DATA, "plant a shortcut: in this share of the training images (without a number: in all) "
                     "a coloured corner shows the class, in the others and in the test another one; 0: none", 0, 1,
                     bare=1.0),
    "model": Setting(str, NETWORK, "a short name of configs.json or any timm name"),
    "pretrained": Setting(bool, NETWORK, "start from timm's pretrained weights where it has them"),
    "weights": Setting(str, NETWORK, "start from a local .safetensors or .pth file instead; in a folder, from the one "
                       "with the network's name in timm", optional=True, syntax=named),
    "init": Setting(str, NETWORK, "start from the network of the finished run in this folder and keep its split; "
                    "classes are matched by name", optional=True),
    "epochs": Setting(int, TRAINING, "passes over the training part", 1, 100_000),
    "batch_size": Setting(int, TRAINING, "images per step; auto: as many as the GPU holds", 2, 65_536, word=AUTO),
    "accumulate": Setting(int, TRAINING, "batches whose gradients are added up before each optimizer step", 1, 10_000),
    "lr": Setting(float, TRAINING, "peak learning rate of the one-cycle schedule", TINY, 100),
    "augment": Setting(str, TRAINING, f"one of {', '.join(Keys('data', 'AUGMENTATIONS'))}, and behind commas any of "
                       f"{', '.join(Keys('data', 'ON_TOP'))}, with a value behind a colon: light,random_erasing:0.5. "
                       "light: the dataset's flip, rotation and shift", syntax=read_augment),
    "reweight": Setting(str, TRAINING, "Just Train Twice: draw training images that the finished run in this folder "
                        "gets wrong 20 times as often", optional=True),
    "seed": Setting(int, TRAINING, "decides split, order, augmentation and initial weights", 0, 2**31),
    "schedule": Setting(str, WHEN, "epochs in which images are erased: every:K, after:E, plateau, or epochs and proxy "
                        "rounds as 20,p,19 (null: all)", optional=True, syntax=read_schedule),
    "step": Setting(str, WHEN, "train on what is erased in the next step (online), or at once, through a second pass "
                    "(same_step)", choices=Keys("proxy", "STEPS"), neutral="online"),
    "select": Setting(str, IMAGES, "those the network gets wrong, or first those with the lowest confidence or the "
                      "highest loss, or all", choices=Keys("proxy", "SELECTIONS")),
    "cam": Setting(str, PIXELS, "what gives the heat; none: no Proxy Attention",
                   choices=Keys("cam", "METHODS", "none")),
    "layer": Setting(str, PIXELS, "the layer to explain; -2 is the stage before the last (null: the deepest with a 4x4 "
                     "grid)", optional=True),
    "explain": Setting(str, PIXELS, "what to explain: the loss, whose own backward pass brings the heat; or the "
                       "predicted class's logit, the true one's, or its margin over the best other",
                       choices=Keys("cam", "EXPLAIN")),
    "heat": Setting(str, PIXELS, "whose heat, if not the network's own as it trains (null): snapshot, that of its copy "
                    "from when a test says that it depends on few pixels, asked as --schedule says, by default after "
                    "each quarter of the epochs; or of the finished run in this folder", optional=True),
    "area": Setting(float, PIXELS, "erase this share of an image's pixels, the hottest; or 2sd, what is hotter than "
                    "the mean and two standard deviations", TINY, 1, word="2sd"),
    "fill": Setting(str, INSTEAD, "what goes where an image is erased", choices=Keys("proxy", "FILLS")),
    "budget": Setting(str, INSTEAD, "erased images take seats in the batch (equal) or ride behind it (extra)",
                      choices=("equal", "extra")),
    "control": Setting(str, CONTROLS, "the same shape at a random place, the least active pixels, or the right pixels "
                       "of images drawn at random", choices=Keys("proxy", "CONTROLS"), optional=True),
    "mode": Setting(str, STAGED, "erase within the training step (online); between trainings and on disk (staged); or "
                    "within the step, with a new split at each p of --schedule as the published implementation, which "
                    "leaks validation images into training (resplit)", choices=("online", "staged", "resplit")),
    "rounds": Setting(int, STAGED, "of --mode staged: at most so many times it erases and trains again", 0, 1000),
    "target_accuracy": Setting(float, STAGED, "validation accuracy that ends --mode staged", TINY, 1, optional=True),
    "device": Setting(str, MACHINE, "auto, cpu, cuda, cuda:1, mps"),
    "workers": Setting(int, MACHINE, "processes that decode (null: one a core, 8 at most)", 0, 256, optional=True),
    "cache": Setting(str, MACHINE, "decoded images are kept in this folder; auto: in .cache in --out, where they fit; "
                     "off: decode them anew in every epoch"),
    "amp": Setting(str, MACHINE, "mixed precision; auto: bfloat16 or float16 as the GPU can, off on a CPU",
                   choices=("auto", "off", "bfloat16", "float16")),
    "compile": Setting(bool, MACHINE, "torch.compile the network"),
    "deterministic": Setting(bool, MACHINE, "the same bits on a GPU too, at some cost in speed"),
    "out": Setting(str, MACHINE, "folder that the runs' folders go into"),
    "name": Setting(str, MACHINE, "the run's name (null: dataset-model-cam-sSEED, or FOLDER-model…)", optional=True),
}

PER_MACHINE = ("name", "out", "device", "workers", "cache")  # settings that leave what is trained as it is
MOVED = ("data_dir", "csv")  # may be others when a run goes on: the dataset's fingerprint tells whether it is the same
OF_RUNS = ("init", "reweight", "heat")  # name the folder of another run
STAGED_ONLY, ONLINE_ONLY = ("rounds", "target_accuracy"), ("step", "heat")
# Settings that mean nothing where --cam is none.
ERASING = ("step", "select", "layer", "explain", "heat", "area", "fill", "budget", "control")
SNAPSHOT = "snapshot"
# Defaults under --heat snapshot: how a shortcut is found and unlearned best, chosen in `tune-shortcut` and
# `tune-snapshot`; and of the epochs, those before it is asked, and asked again.
OF_SNAPSHOT = {"select": "all", "cam": "elementwise", "layer": "-2", "explain": "margin", "area": 0.03,
               "fill": "transplant"}
SNAPSHOT_SHARE = 0.25
# Settings of format 1 that are gone, and what the program does now in their place.
DROPPED = {"layer_decay": 1.0, "freeze": 0, "weight_decay": 0.05, "clip": 1.0, "hide_and_seek": 0, "smooth": False,
           "warmup": 0, "subset": 1.0, "share": 0.5, "grow": 0, "threshold": None, "soften": 0, "weight": 1.0,
           "consistency": 0, "upweight": 20, "split_from": None, "format": "jpg", "protocol": "fixed",
           "checkpointing": False, "sync_bn": False, "checkpoint_every": "10m"}


def option(key):
    return f"--{key.replace('_', '-')}"


def dataset(found, where):
    """An entry of datasets; one of layout csv or torchvision has a part of that name."""
    layout = found.get("layout") if isinstance(found, dict) else None
    needed = {key: DATASET[f"{key}?"] for key in ("csv", "torchvision") if key == layout}
    check(found, {key: schema for key, schema in DATASET.items() if key.rstrip("?") not in needed} | needed, where)


some_settings = {f"{key}?": setting for key, setting in SETTINGS.items()}
MODEL = {"timm": str, "arguments?": dict, "settings?": some_settings}
DATASET = {
    "source": str, "path": (str, type(None)), "layout": one_of(Keys("data", "LAYOUTS")),
    "image_size": SETTINGS["image_size"],
    "normalisation": normalisation, "split": split, "settings?": some_settings,
    "augment": {"flip": bool, "rotate": number(0, 180), "shift": number(0, 1)},
    "digits?": {"images": Setting(int, "", "", 30, 1797), "contrast": number(0, 1), "noise": number(0, 10)},
    "package?": {"module": str, "folder": str, "install": str},
    "csv?": {"file": str, "path?": str, "label?": str, "split?": str, "group?": str, "columns?": texts,
             "delimiter?": delimiter, "classes?": {"*": str}, "parts?": {"*": one_of(Keys("engine.split", "PARTS"))}},
    "torchvision?": {"class": torchvision_class, "parts": {"train": dict, "val?": dict, "test?": dict}}}


def read_configs(path=CONFIGS):
    """`configs.json`, checked: every key known, every type right, none missing. Raises UserError."""
    schema = {"defaults": SETTINGS, "models": {"*": MODEL}, "datasets": {"*": dataset}, "experiments?": {"*": dict}}
    return check(read_json(path, unique_keys=True), schema, Path(path).name)


def resolve(configs, options):
    """Every setting of a run, from weakest to strongest: defaults, the dataset's, the network's, `options`.

    options: {setting: value}, as given on the command line. Returns a flat dict with the keys of SETTINGS, plus
    "format", and "dataset_entry" and "model_entry", the parts of configs.json that they name. Raises UserError.
    """
    unknown = [key for key in options if key not in SETTINGS]
    if unknown:
        raise UserError(f"unknown setting {unknown[0]!r}{nearest(unknown[0], SETTINGS)}")
    options = {key: SETTINGS[key].check(value, option(key)) for key, value in options.items()}
    known, chosen = configs["datasets"], {**configs["defaults"], **options}
    if chosen["dataset"] not in known:
        raise UserError(f"unknown dataset {chosen['dataset']!r}; configs.json has {', '.join(known)}"
                        f"{nearest(chosen['dataset'], known)}")
    placed = next((key for key in ("csv", "data_dir") if chosen[key]), None)  # images of one's own
    if placed and known[chosen["dataset"]]["layout"] == "digits":
        if "dataset" in options:
            raise UserError(f"{option(placed)}: the images of dataset {chosen['dataset']} come with scikit-learn; give "
                            "--dataset folder to train on your own")
        chosen["dataset"] = "folder"
    dataset = known[chosen["dataset"]]
    dataset = _with_csv(dataset, chosen | dataset.get("settings", {}) | options)
    name = {**chosen, **dataset.get("settings", {}), **options}["model"]
    model = configs["models"].get(name, {"timm": name})
    if name not in configs["models"]:
        import timm

        if not timm.is_model(name):
            raise UserError(f"unknown model {name!r}; configs.json has {', '.join(configs['models'])}, and timm has "
                            f"{len(timm.list_models())} more{nearest(name, [*configs['models'], *timm.list_models()])}")
    given = {**dataset.get("settings", {}), **model.get("settings", {}), **options}
    of_heat = dict(OF_SNAPSHOT) if (configs["defaults"] | given)["heat"] == SNAPSHOT else {}
    if given.get("cam") in Keys("cam", "ATTENTION"):  # which has no layer
        of_heat.pop("layer", None)
    config = configs["defaults"] | of_heat | given
    config = {key: config[key] for key in SETTINGS} | {"dataset": chosen["dataset"], "model": name}
    config["image_size"] = config["image_size"] or dataset["image_size"]
    if config["csv"] and not config["data_dir"]:
        config["data_dir"] = str(Path(config["csv"]).parent)
    config["data_dir"] = config["data_dir"] or (str(HERE / dataset["path"]) if dataset["path"] else None)
    if config["data_dir"] is None and "package" in dataset:
        config["data_dir"] = _package_folder(config["dataset"], dataset["package"])
    if config["dataset"] == "folder" and config["data_dir"] is None:
        raise UserError("dataset folder: name the folder of class folders with --data-dir DIR, or give --csv FILE")
    check_agreement(config, options)
    entries = {name: {key: value for key, value in entry.items() if key != "settings"}
               for name, entry in (("dataset_entry", dataset), ("model_entry", model))}
    return {"format": FORMAT} | config | entries


def _with_csv(entry, chosen):
    """A dataset's entry with --csv, whose file `config["csv"]` names, and --csv-columns; without these as it is."""
    if chosen["csv_columns"] and not chosen["csv"]:
        raise UserError("--csv-columns goes with --csv FILE")
    if not chosen["csv"]:
        return entry
    if entry["layout"] not in ("folders", "csv"):
        raise UserError(f"--csv: dataset {chosen['dataset']} is no folder of images; leave --dataset out")
    columns = read_columns(chosen["csv_columns"] or "")
    return entry | {"layout": "csv", "csv": entry.get("csv", {}) | {"file": Path(chosen["csv"]).name} | columns}


def _package_folder(name, package):
    """The folder of images in an installed Python package, which is found and not imported."""
    try:
        found = importlib.util.find_spec(package["module"])
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"dataset {name}: its package is not installed. Run {package['install']}, or name the "
                        "dataset's folder with --data-dir DIR")
    return str(Path(found.submodule_search_locations[0]) / package["folder"])


def check_agreement(config, options):
    """Raise UserError for settings that exclude each other; make the epochs those of a listed schedule.

    options: what was given on the command line, which alone can contradict a default.
    """
    staged = config["mode"] == "staged"
    for key in options:
        if key in (ONLINE_ONLY if staged else STAGED_ONLY) and options[key] not in (None, False):
            raise UserError(f"{option(key)} goes with --mode {'online' if staged else 'staged'}: leave it out, or "
                            "change --mode")
    name = config["name"]
    if name is not None and (not name.strip(". ") or set(name) & set("/\\\0\n")):
        raise UserError(f"--name {name!r}: expected a plain folder name; --out names the folder it goes into")
    if config["weights"] and config["init"]:
        raise UserError("--weights and --init contradict each other: give one of them")
    if config["reweight"] and config["mode"] != "online":
        raise UserError("--reweight goes with --mode online: leave it out, or change --mode")
    if config["heat"]:
        _check_heat(config)
    _check_schedule(config, options)


def _check_heat(config):
    """What goes with another network's heat; makes --schedule of a snapshot what it is by default."""
    if config["cam"] == "none":
        raise UserError("--heat gives the heat to erase by: choose a --cam other than none")
    if config["step"] != "online":
        raise UserError(f"--step {config['step']} goes with a network's own heat: leave it out, or --heat")
    if config["heat"] != SNAPSHOT:
        return
    for key, serves in (("mode", ("online",)), ("select", ("all",)), ("control", (None, "random", "coolest"))):
        if config[key] not in serves:
            raise UserError(f"--heat snapshot changes every image: {option(key)} {config[key]} does not go with it; "
                            "leave it out")
    if on_top := {"cutmix", "mixup"} & set(read_augment(config["augment"])[1]):
        raise UserError(f"--heat snapshot has heat of single images, which --augment {on_top.pop()} mixes: leave one "
                        "of the two out")
    if config["epochs"] < 2:
        raise UserError("--heat snapshot takes it between two epochs: expected --epochs 2 at least")
    config["schedule"] = config["schedule"] or f"every:{max(1, round(SNAPSHOT_SHARE * config['epochs']))}"
    kind, epochs = read_schedule(config["schedule"])
    if kind not in ("every", "after") or not 0 < epochs < config["epochs"]:
        raise UserError(f"--schedule {config['schedule']}: --heat snapshot takes every:K or after:E, in epochs between "
                        f"1 and {config['epochs'] - 1}")


def _check_schedule(config, options):
    text, staged = config["schedule"], config["mode"] == "staged"
    kind, argument = read_schedule(text)
    if kind == "listed":
        if options.get("epochs", len(argument)) != len(argument):
            raise UserError(f"--schedule {text}: adds up to {len(argument)} epochs, each p counting as one, but "
                            f"--epochs is {config['epochs']}; leave --epochs out, or make them agree")
        config["epochs"] = SETTINGS["epochs"].check(len(argument), f"--schedule {text}: the sum of epochs")
    elif text and kind in ("every", "after") and argument >= config["epochs"] + (kind == "every"):
        raise UserError(f"--schedule {text}: erases nothing within {config['epochs']} epochs")
    if staged:
        if config["cam"] == "none":
            raise UserError("--mode staged erases between trainings: choose a --cam other than none")
        if text is not None and kind != "listed":
            raise UserError(f"--schedule {text}: --mode staged takes epochs and rounds, as 20,p,19")
        if kind == "listed":
            if options.get("rounds", sum(argument)) != sum(argument):
                raise UserError(f"--schedule {text}: has {sum(argument)} rounds, but --rounds is {config['rounds']}; "
                                "leave --rounds out, or make them agree")
            if not argument or argument[0]:
                raise UserError(f"--schedule {text}: --mode staged begins with epochs of plain training, as 20,p,19")
            config["rounds"] = sum(argument)
    elif config["mode"] == "resplit" and not (kind == "listed" and any(argument)):
        raise UserError("--mode resplit draws a new split at each p: name them, as with --schedule 20,p,19")


def stage_epochs(config):
    """Epochs of stage 1 and of stage 3 of each round, for --mode staged. Each p of a schedule begins its round."""
    kind, argument = read_schedule(config["schedule"])
    if kind != "listed":
        return [config["epochs"]] * (1 + config["rounds"])
    starts = [epoch for epoch, p in enumerate(argument) if p]
    return [end - start for start, end in zip([0, *starts], [*starts, len(argument)])]


def differing_settings(config, there):
    """Settings in which a resolved config and that of a run differ, but for PER_MACHINE."""
    filled = {"batch_size": config["batch_size"] == AUTO, "amp": config["amp"] == AUTO,
              "layer": config["layer"] is None or config["layer"].startswith("-")}  # by the run
    return [key for key in config if key not in PER_MACHINE and there.get(key) != config[key] and not filled.get(key)]
