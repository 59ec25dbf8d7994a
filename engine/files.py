"""Files that are complete or not there, and the error for what a user can mend.

Every file is written under a temporary name, synced and renamed: a crash leaves the old one or the new one, and never
half of one. Reading a file runs nothing that lies in it.
"""

import contextlib
import difflib
import errno
import getpass
import hashlib
import json
import logging
import os
import platform
import shlex
import subprocess
import threading
from collections import Counter
from pathlib import Path

import numpy as np

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # its own cache may be closed to it: that is nobody's business


NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)  # what file systems say that cannot sync this

try:
    getpass.getuser()
except (KeyError, OSError, ImportError):  # a container's user id without a name, for which torch asks as it is imported
    os.environ["USER"] = "user"


class UserError(Exception):
    """What the user can mend: one line without a traceback, exit status 2. resumable: whether its run can go on."""

    def __init__(self, text, resumable=True):
        super().__init__(text)
        self.resumable = resumable


def one_line(text):
    """A text with what cannot be printed, as newlines and bytes that are not UTF-8, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def readable(name):
    """A name whose bytes are not UTF-8 with these as \\xNN, for pictures."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def nearest(word, known):
    """". Did you mean 'x'?" for the known word that is most like this one; "" where none is."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], 1, 0.5)
    return f". Did you mean {near[0]!r}?" if near else ""


def named(text):
    """Raise ValueError for what names nothing, as a variable of the shell that is not set: it must not go unnoticed."""
    if not text.strip() or "\0" in text:
        raise ValueError(f"{text!r}: expected the name of a file or folder")


def short_reason(error):
    """The first line of what a library raised."""
    return str(error).splitlines()[0] if str(error) else repr(error)


def write_atomically(path, write, sync_name=True):
    """Call `write` with an open binary file that becomes `path` when it is complete and on the disk; or UserError.

    sync_name: whether its name is to be on the disk too; who writes many files to a folder syncs that once.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:100]}.{threading.get_ident()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            sync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # Over what ended it, the system or a signal, torch's writer raises an error of its own.
        reason = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        if isinstance(reason, OSError):
            raise cannot_write(path, reason) from None
        raise reason from None
    if sync_name:
        sync_folder(path.parent)


def sync(descriptor):
    """Wait until an open file or folder is on the disk; for a folder not all file systems can (CIFS, FUSE, 9p)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_folder(folder):
    """Make sure that names just written to a folder are on the disk, where the system can."""
    if os.name == "posix":
        with contextlib.suppress(PermissionError):  # one that may be written to and not be read
            opened = os.open(folder, os.O_RDONLY)
            try:
                sync(opened)
            finally:
                os.close(opened)


def cannot_write(path, error):
    """The error for a full disk, or a folder that is gone or closed to us."""
    return UserError(f"{path}: cannot be written ({error.strerror or error}). Everything written before is intact")


def make_folder(path):
    """The folder and those above it, if they are not there; UserError where they cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None
    return Path(path)


def write_json(path, value):
    """`value` as JSON, the same bytes for the same value."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_arrays(path, arrays):
    """{name: array} as an npz. Not compressed: logits hardly shrink, and for 10,000 classes that took a minute."""
    write_atomically(path, lambda file: np.savez(file, **arrays))


def append_line(path, line):
    """Add one line to a JSON lines file, on the disk before this returns."""
    append_bytes(path, (json.dumps(line) + "\n").encode())


def append_bytes(path, content):
    """Add bytes to a file, on the disk before this returns. Raises UserError."""
    try:
        with open(path, "ab") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def sweep(folder):
    """Remove what a killed process left half-written."""
    for path in Path(folder).rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def _once(pairs):
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise UserError(f"key {key!r} stands twice in the same object")
    return dict(pairs)


def read_json(path, unique_keys=False):
    """A JSON file's content; UserError that names file, line and column where it is not JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"), object_pairs_hook=_once if unique_keys else None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def quoted(path):
    """A path as a shell takes it, for a command that is shown."""
    return shlex.quote(str(path)) if os.name == "posix" else subprocess.list2cmdline([str(path)])


def read_arrays(path):
    """{name: array} of an npz; UserError where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise UserError(f"{path}: cannot be read ({error}); remove it, and it is made again by "
                        f"python eval.py {quoted(Path(path).parent)}") from None


def read_lines(path):
    """What `append_line` wrote, first to last; a last line that a crash cut off is left out."""
    lines = []
    for text in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cut_lines(path, count):
    kept = "".join(json.dumps(line) + "\n" for line in read_lines(path)[:count])
    write_atomically(path, lambda file: file.write(kept.encode()))


PLAIN = set("-_+=,() ")  # in file names, besides letters and digits of any script, and dots within


def safe_name(text):
    """Any text as one file name, another for every text: %XX for what is neither letter, digit nor harmless."""
    name = ""
    for i, c in enumerate(text):
        within = 0 < i < len(text) - 1
        plain = c.isalnum() or c in "-_" or within and (c in PLAIN or c == ".")
        name += c if plain else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape"))
    if len(name.encode()) > 200:  # file systems take 255 bytes
        short = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        name = f"{name.encode()[:160].decode(errors='ignore')}~{short}"
    return name


def lock(path, wait=False):
    """Keep the file `path` to this process. Returns it open: the lock ends when it is closed, or with the process.

    wait: until another process that has it is done; without, UserError names that process. The lock is the system's
    own: a killed process holds none. Where the system has no locks there is none. May raise OSError.
    """
    file = open(path, "a+")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{Path(path).parent}: {file.read().strip() or 'another process'} is working on this run; wait "
                        "for it, or stop it first") from None
    except (ImportError, OSError):
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
