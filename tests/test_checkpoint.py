"""engine/checkpoint.py: a complete checkpoint is there whenever the process dies, and a damaged one is found."""

import json
import os
import random
import zipfile

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.files import UserError
from engine.settings import read_configs, resolve

STATE = {"epoch": 1, "model": {"weight": torch.arange(400.0).view(40, 10), "bias": torch.zeros(10)}}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint, and its bytes."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE)
    return path, path.read_bytes()


def parts_of(path):
    """{name: (first byte, one behind the last)} of what the zip file holds, each stored as it is."""
    with zipfile.ZipFile(path) as file:
        found = {}
        for part in file.infolist():
            assert part.compress_type == zipfile.ZIP_STORED
            with open(path, "rb") as opened:
                opened.seek(part.header_offset + 26)
                name, extra = (int.from_bytes(opened.read(2), "little") for _ in range(2))
            start = part.header_offset + 30 + name + extra
            found[part.filename] = start, start + part.file_size
    return found


def test_what_is_saved_is_loaded_also_by_torch(saved):
    path, _ = saved
    for found in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert found["epoch"] == 1 and torch.equal(found["model"]["weight"], STATE["model"]["weight"])


def test_every_flipped_bit_in_what_a_checkpoint_holds_is_found(saved):
    path, content = saved
    parts, draw = parts_of(path), random.Random(0)
    tensors = sum(end - start for name, (start, end) in parts.items() if "/data/" in name)
    assert tensors == 4 * (400 + 10)
    for start, end in parts.values():
        for place in {start, end - 1, *draw.sample(range(start, end), min(end - start, 200))} if end > start else ():
            changed = content[place] ^ 1 << draw.randrange(8)
            path.write_bytes(content[:place] + bytes([changed]) + content[place + 1:])
            with pytest.raises(UserError, match="last.pt: damaged, or not a checkpoint"):
                load_checkpoint(path)


def test_a_byte_that_is_flipped_anywhere_is_found_or_changes_nothing(saved):
    path, content = saved
    draw, found = random.Random(0), 0
    for place in draw.sample(range(len(content)), 400):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1:])
        try:
            state = load_checkpoint(path)
        except UserError:
            found += 1
        else:  # it is in the names or the gaps between what the file holds
            assert state["epoch"] == 1 and torch.equal(state["model"]["weight"], STATE["model"]["weight"])
            assert torch.equal(state["model"]["bias"], STATE["model"]["bias"])
    assert found > 100


def test_every_cut_is_found(saved):
    path, content = saved
    for length in (0, 1, 10, 16, 17, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="last.pt: damaged"):
            load_checkpoint(path)
    with pytest.raises(UserError, match="gone.pt: no such checkpoint"):
        load_checkpoint(path.with_name("gone.pt"))


# The newest and the one before it.


def test_killed_between_the_two_names_a_checkpoint_is_there(saved, monkeypatch):
    """Whatever the moment of saving at which the process dies, the checkpoint before is still there, complete."""
    path, _ = saved
    for replaced in range(2):
        calls = []

        def dying(source, target):
            calls.append(target)
            if len(calls) > replaced:
                raise KeyboardInterrupt
            os.rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.keep_previous(path, path.with_name("previous.pt"))
                save_checkpoint(path, {"epoch": 2, "step": 0})
        assert checkpoint.last_checkpoint(path.parent)[0]["epoch"] == 1


def test_two_names_of_one_checkpoint_leave_no_third(saved):
    """As after a kill between the two names: rename(2) of one file's two names does nothing."""
    path, previous = saved[0], saved[0].with_name("previous.pt")
    for _ in range(2):
        checkpoint.keep_previous(path, previous)
        assert previous.samefile(path) and not list(path.parent.glob(".*.tmp"))


def test_where_links_cannot_be_made_the_one_before_is_a_copy(saved, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    path, previous = saved[0], saved[0].with_name("previous.pt")
    monkeypatch.setattr(os, "link", refuse)
    checkpoint.keep_previous(path, previous)
    save_checkpoint(path, STATE | {"epoch": 2})
    assert load_checkpoint(previous)["epoch"] == 1


def test_of_two_checkpoints_the_newest_that_can_be_read_is_used(saved):
    path, content = saved
    assert checkpoint.last_checkpoint(path.parent)[1] is None
    checkpoint.keep_previous(path, path.with_name("previous.pt"))
    save_checkpoint(path, STATE | {"epoch": 2, "step": 3})
    assert checkpoint.last_checkpoint(path.parent)[0]["epoch"] == 2
    path.write_bytes(content[:-100])
    path.with_name("previous.pt").unlink()
    save_checkpoint(path.with_name("previous.pt"), STATE | {"step": 3})
    state, text = checkpoint.last_checkpoint(path.parent)
    assert state["epoch"] == 1 and text.endswith("going on from the checkpoint before it, after 1 epochs and 3 batches")
    assert path.with_name("damaged.pt").exists() and load_checkpoint(path)["epoch"] == 1
    for name in ("last.pt", "previous.pt"):
        path.with_name(name).write_bytes(b"")
    with pytest.raises(UserError, match="previous.pt cannot be read either"):
        checkpoint.last_checkpoint(path.parent)
    for name in ("last.pt", "previous.pt"):
        path.with_name(name).unlink()
    assert checkpoint.last_checkpoint(path.parent) == (None, None)


# What it was made with.


def test_a_checkpoint_names_the_code_that_decides_what_is_trained():
    made = checkpoint.made_with(resolve(read_configs(), {"out": "elsewhere"}), {"classes": ["a"], "fingerprint": "0"})
    assert {"train.py", "staged.py", "proxy.py", "cam.py", "data.py", "engine/training.py"} <= set(made["code"])
    assert "eval.py" not in made["code"] and not {"out", "name", "device", "workers", "cache"} & set(made["settings"])
    json.dumps(made)  # plain values
