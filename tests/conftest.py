"""Small real data for the tests: folders of drawn pictures, and a run or two to look at."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network


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
