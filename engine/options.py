"""The command line of the programs: options, and errors of one line. Nothing here imports torch, for that is slow."""

import argparse
import contextlib
import functools
import os
import sys

from engine import files, settings
from engine.files import UserError
from engine.settings import SETTINGS, option


def use_any_console():
    """Write what the console's encoding lacks as \\uNNNN, and nothing where there is no console: call this first."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file that is opened had its number, and would get what is printed
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """Whose errors are one line."""

    def error(self, message):
        raise UserError(f"{message}{'.' * (message[-1] not in '.?')} See python {self.prog} --help")

    def parse(self, arguments, alone=None):
        """{option: value} of those given; UserError for an unknown one that names the nearest.

        alone: the option whose value one word may be that stands by itself, or None.
        """
        given, unknown = self.parse_known_args(arguments)
        if alone and len(unknown) == 1 and not unknown[0].startswith("-") and alone not in given:
            setattr(given, alone, unknown.pop())
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"unknown option {unknown[0]!r}{files.nearest(unknown[0], known)}")
        return vars(given)


def program(name):
    """Decorate a `main`: it returns the exit status, 0, or 2 with one line on what the user can mend."""
    def decorate(main):
        @functools.wraps(main)
        def inner(arguments=None):
            use_any_console()
            try:
                main(arguments)
            except UserError as error:
                print(files.one_line(f"{name}: {error}"), file=sys.stderr)
                return 2
            return 0

        return inner

    return decorate


COMMAND = ("resume", "any_code", "dry_run", "show", "experiment", "cell", "jobs")


def parse(arguments, text):
    """(settings given, other options) from the command line; one option per entry of `SETTINGS`. text: of --help."""
    defaults = files.read_json(settings.CONFIGS, unique_keys=True)["defaults"]  # checked when they are used
    parser = Parser(prog="train.py", usage="%(prog)s [FOLDER] [option …]", description=text, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter, epilog="Datasets and models of configs.json "
                    "may bring settings of their own, which come before these defaults.")
    command = parser.add_argument_group("command")
    command.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with the settings it has")
    command.add_argument("--any-code", action="store_true", help="with --resume: although code or versions differ")
    command.add_argument("--dry-run", action="store_true", help="print settings, split and network, then stop")
    command.add_argument("--show", action="store_true", help="with --dry-run: write a sheet of misled training images "
                         "under every fill, every control and three areas")
    command.add_argument("--experiment", metavar="NAME", help="run experiments/NAME.json: what is not finished of it")
    command.add_argument("--cell", metavar="I/N", help="with --experiment: only the I-th of N shares, for job arrays")
    command.add_argument("--jobs", metavar="K", help="with --experiment: so many runs side by side (default: 1)")
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(s.group for s in SETTINGS.values())}
    for key, setting in SETTINGS.items():
        choices = f": {', '.join(setting.choices)}" if setting.choices else ""
        default = "null" if defaults[key] is None else defaults[key]
        about = f"{setting.help}{choices} (default: {default})".replace("%", "%%")
        kind = {"action": argparse.BooleanOptionalAction} if setting.kind is bool else {"metavar": key.upper()}
        kind |= {} if setting.bare is None else {"nargs": "?", "const": str(setting.bare)}
        groups[setting.group].add_argument(option(key), default=argparse.SUPPRESS, help=about, **kind)
    command.add_argument("--same-step", dest="step", action="store_const", const="same_step", default=argparse.SUPPRESS,
                        help="the same as --step same_step")
    given = parser.parse(arguments, "data_dir")
    if empty := [key for key, text in given.items() if isinstance(text, list)]:  # what argparse makes of --key=--
        raise UserError(f"{option(empty[0])}: expected a value. See python train.py --help")
    run = given.get("data_dir", os.devnull)
    if all(os.path.isfile(os.path.join(run, name)) for name in ("config.json", "split.json")):
        raise UserError(f"{run} is a run's folder: --resume goes on with it, and python eval.py shows it")
    other = {key: given.pop(key) for key in COMMAND}
    _check_command(other)
    return {key: _typed(key, text) for key, text in given.items()}, other


def _check_command(other):
    needed = {"any_code": "experiment" if other["experiment"] else "resume", "show": "dry_run", "cell": "experiment",
              "jobs": "experiment"}
    for key, other_key in needed.items():
        if other[key] and not other[other_key]:
            raise UserError(f"{option(key)} goes with {option(other_key)}. See python train.py --help")
    if other["experiment"] and (other["resume"] or other["dry_run"]):
        raise UserError("--experiment goes with neither --resume nor --dry-run: it goes on with what is not finished")
    if other["jobs"] is not None and not (other["jobs"].isdecimal() and 1 <= int(other["jobs"]) <= 1000):
        raise UserError(f"--jobs {other['jobs']}: expected a number from 1 to 1000")


def _typed(key, text):
    """A setting's value from its text; what is no number stays a text and is refused when settings are checked."""
    if text == "null" and SETTINGS[key].optional:
        return None
    if SETTINGS[key].kind in (int, float):
        with contextlib.suppress(ValueError):
            return SETTINGS[key].kind(text)
    return text


def answer_help(text):
    """End the program after --help, where that is asked, before what takes seconds to import. text: train.py's own."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        use_any_console()
        parse(None, text)
