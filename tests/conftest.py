"""Small real data for the tests: folders of drawn pictures, and a run or two to look at."""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this program's files, wherever pytest was started
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, so that each has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")


import eval as evaluation  # noqa: E402

# A run's pictures take longer than the training of most runs here: only tests marked with `pictures` draw them, and
# real command lines.
DRAW, evaluation.draw = evaluation.draw, lambda *arguments: None


def pytest_configure(config):
    config.addinivalue_line("markers", "pictures: this test's runs draw their pictures")
    config.addinivalue_line("markers", "slow: takes more than a few seconds; the quick tests are -m 'not slow'")


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    if request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(evaluation, "draw", DRAW)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="how often tests/test_kill.py kills a run (default: 20)")


def draw_letter(letter, frame, size=48):
    """A photograph-like picture: a letter on a noisy background, moving a little from frame to frame."""
    noise = np.random.default_rng(frame * 31 + ord(letter[0])).integers(60, 120, (size, size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    ImageDraw.Draw(image).text((size / 3 + frame % 5, size / 4), letter, fill=(240, 220, 200), font_size=size // 2)
    return image


def draw_classes(folder, classes="ABC", frames=10):
    """FOLDER/A/A1.jpg … as in the ASL alphabet."""
    for letter in classes:
        (folder / letter).mkdir(parents=True)
        for frame in range(1, frames + 1):
            draw_letter(letter, frame).save(folder / letter / f"{letter}{frame}.jpg", quality=90)


def hash_folder(folder):
    """One hash of every name, time and byte below `folder`."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}".encode())
        whole.update(path.read_bytes() if path.is_file() else b"")
    return whole.hexdigest()


@pytest.fixture
def asl(tmp_path):
    """A folder as Kaggle's ASL archive unpacks, with three letters of ten frames each."""
    root = tmp_path / "asl"
    draw_classes(root / "asl_alphabet_train" / "asl_alphabet_train")
    test = root / "asl_alphabet_test" / "asl_alphabet_test"
    test.mkdir(parents=True)
    draw_letter("A", 99).save(test / "A_test.jpg")
    return root


@pytest.fixture
def trained(tmp_path_factory, request):
    """`trained("--cam", "none", …)` runs `train.py` on digits in this process and gives the run's folder."""
    import train

    def run_it(*arguments, epochs=2):
        out = tmp_path_factory.mktemp("runs")
        assert train.main(["--epochs", str(epochs), "--out", str(out), "--name", "run", *arguments]) == 0
        return out / "run"

    return run_it


# Processes that have the libraries imported when they start: tenths of a second, where a new Python takes four seconds.
quickly = multiprocessing.get_context("forkserver")
quickly.set_forkserver_preload(["timm", "torchvision.transforms.v2", "sklearn.metrics", "matplotlib.figure",
                                "scipy.stats", "rich.progress", "torch._dynamo"])


def resize_limit(limit):
    """Run in a child process: files can grow to `limit` bytes, as on a disk that is nearly full."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _train_main(arguments, output, rank, ranks_, port, limit, configs, every_step):
    import torch

    import train
    from engine import display, ranks, settings, training

    multiprocessing.set_start_method(None, force=True)  # as in a process of its own: its workers end when it is killed
    if configs:
        settings.read_configs.__defaults__ = (configs,)
    if every_step:
        training.CHECKPOINT_SECONDS = 0
    evaluation.draw = lambda *arguments: None
    with open(output, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if ranks_ > 1:  # what torchrun sets, and what was read when these were imported
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                       "WORLD_SIZE": str(ranks_), "LOCAL_RANK": str(rank)}
        ranks.RANK, ranks.RANKS, ranks.LOCAL_RANK, display.console.quiet = rank, ranks_, rank, rank > 0
        ranks.HERE = ranks_
        torch.set_num_threads(1)
    if limit:
        resize_limit(limit)
    sys.exit(train.main(arguments))


def train_and_tell(arguments, seen):
    """`_train_main` with its arguments, in one thread; beside its output a JSON file has what was seen by its end."""
    import torch

    torch.set_num_threads(1)
    try:
        _train_main(*arguments)
    finally:
        with open(f"{arguments[1]}.json", "w") as file:
            json.dump(seen, file)


class TrainProcess:
    """`train.py` with arguments, in a process of its own, or in several as under torchrun; its output goes to files.

    limit: of what it may write to one file, in bytes. configs: another configs.json. every_step: it writes a checkpoint
    after each step. target: what calls `_train_main`, given its arguments.
    """

    def __init__(self, arguments, path, ranks=1, limit=None, configs=None, every_step=False, target=_train_main):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.paths = [path.with_suffix(f".{rank}.txt") for rank in range(ranks)]
        words = list(map(str, arguments))
        self.processes = [quickly.Process(target=target, args=(words, str(p), rank, ranks, port, limit, configs,
                                                              every_step)) for rank, p in enumerate(self.paths)]
        for process in self.processes:
            process.start()

    @property
    def pid(self):
        return self.processes[0].pid

    def output(self):
        return "".join(path.read_text() for path in self.paths)

    def is_alive(self):
        return any(process.is_alive() for process in self.processes)

    def signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self):
        """The exit status of the first that failed, or 0; a number below zero is the signal that killed it."""
        for process in self.processes:
            process.join(120)
            assert process.exitcode is not None, f"still running: {self.output()}"
        return next((process.exitcode for process in self.processes if process.exitcode), 0)


@pytest.fixture(scope="module")
def train_process(tmp_path_factory):
    """`train_process(arguments, …)` starts a `TrainProcess`; what still runs at the test's end is killed."""
    folder, started = tmp_path_factory.mktemp("output"), []

    def start(arguments, **options):
        started.append(TrainProcess(arguments, folder / f"{len(started)}", **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
