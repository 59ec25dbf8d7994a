"""engine/files.py: files that are complete or not there, and any text as a file's name."""

import errno
import getpass
import os
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from conftest import quickly, resize_limit

from engine import checkpoint, files, ranks
from engine.files import UserError

# What names classes and images may have.
NAMES = ["A", "n02085620-Chihuahua", "a/b", "../../etc", "..", ".", ".hidden", "a b", " a", "a.", "é ü", "狗",
         "<b>bold</b>", "a\nb", "100%", "a%2Fb", "con:aux*?", "$x^2$", "[red]", "x" * 300, "x" * 301, "狗" * 200,
         "\udcff.jpg", "A/1.jpg", "A\\1", "\0"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "state"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def crash(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, crash)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("ended", [KeyboardInterrupt(), ranks.Stopped(15),
                                   RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")])
def test_what_a_signal_raises_while_torch_writes_comes_through(ended, tmp_path):
    """torch's writer, left in the middle, raises "unexpected pos" over it; a run would end with a traceback."""
    def write(file):
        real, calls = file.write, []

        class Ending:
            def write(self, content):
                calls.append(content)
                if len(calls) == 3:
                    raise ended
                return real(content)

            def flush(self):
                file.flush()

        torch.save({"a": torch.zeros(100_000)}, Ending())

    with pytest.raises(type(ended)) as caught:
        files.write_atomically(tmp_path / "last.pt", write)
    assert caught.value is ended and not list(tmp_path.iterdir())


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_line(path, {"epoch": 1})
    files.append_line(path, {"epoch": 2})
    with open(path, "a") as file:
        file.write('{"epoch": 3, "lo')
    assert [line["epoch"] for line in files.read_lines(path)] == [1, 2]
    files.cut_lines(path, 1)
    assert [line["epoch"] for line in files.read_lines(path)] == [1]


def write_on_a_full_disk(folder, module, function, arguments, answer):
    """Run in a child process: the error that a function ends with there."""
    resize_limit(4096)
    os.chdir(folder)
    try:
        getattr({"checkpoint": checkpoint, "files": files}[module], function)(*arguments)
    except UserError as error:
        answer.put(str(error))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX limits")
@pytest.mark.parametrize("module, function, arguments", [
    ("checkpoint", "save_checkpoint", ("last.pt", {"w": list(range(9000))})),
    ("files", "write_json", ("a.json", "x" * 9000)), ("files", "append_line", ("log.jsonl", "x" * 9000))])
def test_a_full_disk_is_one_error_and_leaves_what_was_there(module, function, arguments, tmp_path):
    for name in ("last.pt", "a.json"):
        (tmp_path / name).write_text("old")
    answer = quickly.Queue()
    process = quickly.Process(target=write_on_a_full_disk, args=(str(tmp_path), module, function, arguments, answer))
    process.start()
    text = answer.get(timeout=60)
    process.join()
    assert "cannot be written (" in text and "intact" in text and "\n" not in text
    assert (tmp_path / "last.pt").read_text() == (tmp_path / "a.json").read_text() == "old"
    assert not list(tmp_path.glob(".*tmp"))


def test_a_path_in_a_command_that_is_shown_can_be_pasted():
    assert files.quoted(Path("runs/a")) == "runs/a"
    assert shlex.split(f"python eval.py {files.quoted(Path('late gradcam-s0'))}")[2:] == ["late gradcam-s0"]


def test_any_text_makes_a_file_name_of_its_own_that_stays_in_its_folder(tmp_path):
    safe = [files.safe_name(name) for name in NAMES]
    assert len(set(safe)) == len(NAMES) and safe[:2] == NAMES[:2] and "é ü" in safe and "狗" in safe
    for name in safe:
        (tmp_path / f"{name}.jpg").write_text(name)
        assert (tmp_path / f"{name}.jpg").resolve().parent == tmp_path.resolve() and not name.startswith((".", " "))
    assert len(os.listdir(tmp_path)) == len(NAMES)


# Machines that cannot do what others can.


def failing(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_is_written_to_all_the_same(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(number))
    files.write_json(tmp_path / "a.json", [1])
    files.append_line(tmp_path / "log.jsonl", {"epoch": 1})
    assert files.read_json(tmp_path / "a.json") == [1] and files.read_lines(tmp_path / "log.jsonl") == [{"epoch": 1}]


def test_a_disk_that_fails_to_sync_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    for write in (files.write_json, files.append_line):
        with pytest.raises(UserError, match="cannot be written"):
            write(tmp_path / "a", [1])


def test_a_folder_that_may_not_be_read_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    files.sync_folder(tmp_path)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_without_hard_links_the_checkpoint_before_is_a_copy(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(number))
    (tmp_path / "last.pt").write_text("1")
    checkpoint.keep_previous(tmp_path / "last.pt", tmp_path / "previous.pt")
    assert (tmp_path / "previous.pt").read_text() == "1" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_without_locks_a_run_is_not_refused(number, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "lockf", failing(number))
    files.lock(tmp_path / ".lock").close()
    files.lock(tmp_path / ".lock", wait=True).close()


@pytest.mark.parametrize("raised", [KeyError("uid not found: 54321"), OSError("no name")])
def test_a_user_id_without_a_name_gets_one_for_torch(raised, monkeypatch):
    def without_name():
        raise raised

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    with monkeypatch.context() as patch:
        patch.setattr(getpass, "getuser", without_name)
        runpy.run_path(files.__file__)
    assert getpass.getuser() == "user"
