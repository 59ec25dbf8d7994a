"""Checkpoints: written in full or not at all, checked when they are read, and what they were made with.

`last.pt` is the newest, `previous.pt` the one before it. Loading runs nothing that lies in them.
"""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import torch

from engine.files import UserError, cannot_write, short_reason, write_atomically
from engine.settings import HERE, MOVED, PER_MACHINE, SETTINGS


def save_checkpoint(path, state):
    """`state`, a dict of tensors and plain values, as torch.save writes it: a zip file."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote. Executes nothing in the file; raises UserError where it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # reads every part against its CRC
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is not that of its content")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch and zipfile raise many kinds for what is no checkpoint
        raise UserError(f"{path}: damaged, or not a checkpoint ({short_reason(error)})") from None


def keep_previous(path, previous):
    """Give the file a second name, so that it stays when `path` is written anew. A copy where links cannot be made."""
    path, previous = Path(path), Path(previous)
    if not path.exists():
        return
    temporary = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, previous)
        temporary.unlink(missing_ok=True)  # rename(2) does nothing where both names are of one file already
    except OSError as error:
        raise cannot_write(previous, error) from None


def last_checkpoint(folder):
    """The content of `last.pt`, or of `previous.pt` where that is damaged or missing; and what to print of it, or None.

    (None, None) where there is neither. A damaged one becomes `damaged.pt`, and the one before `last.pt`.
    """
    last, previous = Path(folder) / "last.pt", Path(folder) / "previous.pt"
    reason = f"{last}: missing"
    try:
        if last.exists():
            return load_checkpoint(last), None
        if not previous.exists():
            return None, None
    except UserError as error:
        reason = str(error)
    try:
        state = load_checkpoint(previous)
    except UserError:
        raise UserError(f"{reason}; and previous.pt cannot be read either. Remove both to train {folder} from its "
                        "beginning, with the same split and settings", resumable=False) from None
    if last.exists():
        os.replace(last, last.with_name("damaged.pt"))
    keep_previous(previous, last)
    return state, (f"{reason}; going on from the checkpoint before it, after {state['epoch']} epochs"
                   + (f" and {state['step']} batches" if state["step"] else ""))


# What decides what is trained, as it was when it was loaded.
SOURCES = [*(HERE / f"{name}.py" for name in ("train", "staged", "proxy", "cam", "data")),
           *sorted((HERE / "engine").glob("*.py"))]
CODE = {path.relative_to(HERE).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        for path in SOURCES}


def made_with(config, split):
    """What a checkpoint depends on: settings, classes, dataset, versions and code. Plain values."""
    import timm

    return {"settings": {key: value for key, value in config.items() if key not in PER_MACHINE},
            "classes": split["classes"], "dataset": split["fingerprint"],
            "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
            "code": CODE}


def check_made_with(folder, there, now, any_code):
    """Raise UserError for a checkpoint made with other things than this run; any_code: code and versions may differ."""
    def differing(part, keys):
        return [key for key in keys if there[part].get(key) != now[part].get(key)]

    def refuse(what):
        raise UserError(f"{Path(folder) / 'last.pt'}: {what}", resumable=False)

    def pairs(part, keys):
        values = ((key, *(json.dumps(each[part].get(key)) for each in (there, now))) for key in keys[:3])
        return ", ".join(f"{key} {before}, not {after}" for key, before, after in values)

    if keys := differing("settings", [k for k in (*SETTINGS, "dataset_entry", "model_entry") if k not in MOVED]):
        refuse(f"made with other settings than config.json has: {pairs('settings', keys)}. Put it back, or start anew")
    if there["classes"] != now["classes"] or there["dataset"] != now["dataset"]:
        what = "classes" if there["classes"] != now["classes"] else "images"
        refuse(f"made on a dataset with other {what} than split.json names. Put split.json back, or start a new run")
    if any_code:
        return
    regardless = "go on regardless with --any-code, and perhaps to other figures"
    if keys := differing("versions", now["versions"]):
        refuse(f"made with {pairs('versions', keys)}. Install these again, or {regardless}")
    if keys := differing("code", {**there["code"], **now["code"]}):
        refuse(f"made with another {', '.join(keys)} than is here. Bring the code back, or {regardless}")
