"""Whatever command line, configs.json or experiment is given to it, it is understood or refused in one line.

The program ends with status 0, or with 2 and one line that names what to change; it never ends with a traceback, and
never writes outside its folder.
"""

import contextlib
import json

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_faults import error_line

import train
from engine import experiment, files, settings

WORDS = st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.sampled_from(
    ["nan", "inf", "-1", "0", "1", "0.5", "1e309", "null", "auto", "none", "true", "../..", "/", "\0", "\udcff", "--",
     "-", "digits", "gradcam", "all", "every:0", "20,p,19", "after:-1", "light,cutmix:nan", "layer3", "9" * 400]))
NAMES = sorted(settings.SETTINGS)
OTHERS = st.sampled_from(["--resume", "--experiment", "--cell", "--jobs", "--any-code", "--show", "--dry-run",
                          "--help-me"])


def option(name, word):
    flag = f"--{name.replace('_', '-')}"
    if settings.SETTINGS[name].kind is bool:
        return flag if len(word) % 2 else flag.replace("--", "--no-", 1)
    return f"{flag}={word}"


@st.composite
def right(draw, name):
    """A value that the setting takes, as far as its type, range and choices say."""
    setting = settings.SETTINGS[name]
    if setting.choices:
        return draw(st.sampled_from(tuple(setting.choices)))
    if setting.kind in (int, float):
        low, high = setting.low or 0, min(setting.high or 10, (setting.low or 0) + 10)
        return str(draw(st.integers(int(low), int(high)) if setting.kind is int else st.floats(low, high)))
    if setting.syntax:
        return draw(st.sampled_from(["null", "every:2", "p,1", "none", "light,random_erasing", "mixup:0.4", "cutmix"]))
    return draw(st.sampled_from(["null", "auto", "digits", "1,3"]))


def options_of(names, words):
    """Options of some settings. words: a function of a setting's name."""
    return st.sampled_from(names).flatmap(lambda name: words(name).map(lambda word: option(name, word)))


ONE = options_of(NAMES, lambda name: st.one_of(WORDS, right(name)))
SAFE = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def runs_or_names_why(arguments, tmp_path, capsys):
    """Status 0, or 2 with one line; nothing written but below --out."""
    inside = tmp_path / "inside"
    inside.mkdir(exist_ok=True)
    before = sorted(p.name for p in tmp_path.iterdir())
    status = train.main([*arguments, f"--out={inside / 'runs'}", "--device=cpu", "--workers=0"])
    captured = capsys.readouterr()
    assert status in (0, 2), captured.err
    assert status == 0 or len(captured.err.splitlines()) == 1 and captured.err.startswith("train.py: "), captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.slow
@hypothesis_settings(**SAFE, max_examples=150)
@given(options=st.lists(st.one_of(ONE, ONE, ONE, WORDS, OTHERS, st.builds("{}={}".format, OTHERS, WORDS)), max_size=4))
@example(options=["--experiment=demo", "--jobs=--"])
@example(options=["--resume=--"])
@example(options=["--heat=" + "9" * 400])
@example(options=["--dataset=folder", "--data-dir=" + "9" * 400])
def test_whatever_the_command_line_holds_is_understood_or_refused_in_one_line(options, tmp_path_factory, capsys,
                                                                              monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "above" / "beside" / "command lines"
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)  # "../.." is a dataset's folder, too, and elsewhere may be a whole disk
    runs_or_names_why([*options, "--dry-run"], folder, capsys)


VALID = ("cam", "explain", "select", "fill", "control", "area", "augment", "budget", "step", "mode", "schedule",
         "accumulate", "amp", "lr", "seed", "batch_size", "deterministic", "classes", "decoy", "rounds",
         "target_accuracy")


@pytest.mark.slow
@hypothesis_settings(**SAFE, max_examples=8)
@given(options=st.lists(options_of(VALID, right), max_size=6))
def test_settings_that_are_taken_train_to_the_end(options, tmp_path_factory, capsys):
    folder = tmp_path_factory.mktemp("valid")
    runs_or_names_why([*options, "--epochs=1", "--train-fraction=0.06"], folder, capsys)


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3),
                                            st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=5)


def paths_in(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_in(inner, (*path, key))


def changed(content, where, value, drop):
    """A copy in which another value stands at a place, or with `drop` nothing, where that can be."""
    content = json.loads(json.dumps(content))
    if not where:
        return value
    inner = content
    for key in where[:-1]:
        inner = inner[key]
    if drop and isinstance(inner, dict):
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return content


CONFIGS = settings.read_configs()
PLACES = sorted(paths_in(CONFIGS), key=repr)


@pytest.mark.slow
@hypothesis_settings(**SAFE, max_examples=150)
@given(where=st.sampled_from(PLACES), value=JSON, drop=st.booleans())
def test_whatever_configs_json_holds_is_understood_or_refused_in_one_line(where, value, drop, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "configs"
    folder.mkdir(exist_ok=True)
    (folder / "configs.json").write_text(json.dumps(changed(CONFIGS, where, value, drop)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings.read_configs, "__defaults__", (folder / "configs.json",))
        runs_or_names_why(["--dry-run"], folder, capsys)


EXPERIMENTS = {path.stem: files.read_json(path) for path in experiment.FOLDER.glob("*.json")}
PLACES_OF_EXPERIMENTS = sorted(((name, *path) for name, entry in EXPERIMENTS.items() for path in paths_in(entry)),
                               key=repr)


@hypothesis_settings(**SAFE, max_examples=300)
@given(where=st.sampled_from(PLACES_OF_EXPERIMENTS), value=st.one_of(JSON, st.sampled_from(sorted(EXPERIMENTS))),
       drop=st.booleans())
def test_whatever_an_experiment_holds_it_is_understood_or_refused(where, value, drop):
    name, *path = where
    configs = CONFIGS | {"experiments": {name: changed(EXPERIMENTS[name], path, value, drop)}}
    with contextlib.suppress(files.UserError):
        for cell in experiment.cells(configs, name, {"dataset": "digits"}):
            cell.config(configs)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"null", b"{" * 100_000, b"[" * 100_000,
                                     b'{"defaults": 1e999}', b"NaN"])
def test_a_configs_json_that_is_none_is_named(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs.json").write_bytes(content)
    monkeypatch.setattr(settings.read_configs, "__defaults__", (tmp_path / "configs.json",))
    assert train.main(["--dry-run"]) == 2
    assert "configs.json" in error_line(capsys)
