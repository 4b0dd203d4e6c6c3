"""What the tests share: slices, the scripts as a user calls them, and what they leave behind."""

import contextlib
import csv
import functools
import os
import pathlib
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

# Before TensorFlow is imported, here and in the processes of the tests.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # on the CPU, also where there is a GPU
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # what XLA compiles runs once or twice

import dataset

import keras

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Small enough for seconds on a CPU, and every part of the default networks is in it.
TINY = [
    *("--vqvae-num-embeddings", "16", "--vqvae-filters", "4", "8", "--vqvae-decoder-blocks", "1"),
    *("--vqvae-epochs", "3", "--vqvae-batch-size", "32", "--augmentations", "2", "--scores", "4"),
    *("--pixelcnn-filters=8", "--pixelcnn-residual-blocks=2", "--pixelcnn-epochs=3", "--pixelcnn-batch-size=32"),
]
TRAINED = ["config.json"] + [f"{name}{end}" for name in ("vqvae", "pixelcnn")
                             for end in (".keras", "_history.csv", "_loss.png")]  # fmt: skip


# ---- Slices --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A folder of phantoms: 3 subjects to train on, 1 to validate, 1 to test."""
    folder = tmp_path_factory.mktemp("phantoms") / "keras_png_slices_data"
    dataset.write_phantom(folder, train=3, validate=1, test=1)
    return folder


def write_slices(folder, names):
    """An 8x8 picture for each name, of noise that depends on the name alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (8, 8), "uint8")
        Image.fromarray(pixels).save(folder / name)


def write_data(root, slice_numbers=(0, 1), **cases):
    """The layout of the real data, with two slices of each case or those numbers: write_data(root, train=[1, 2])."""
    for split, heads in cases.items():
        names = [f"case_{case:03d}_slice_{number}.nii.png" for case in heads for number in slice_numbers]
        write_slices(root / f"keras_png_slices_{split}", names)
    return root


@pytest.fixture
def data(tmp_path):
    """A folder of slices with nothing wrong in it, yet."""
    return write_data(tmp_path / "keras_png_slices_data", train=[1, 2], validate=[402], test=[441])


def cut(path, share=0.5):
    """Leave the first part of a file, as a stopped download or a full disk does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


# ---- The scripts, and what they leave ------------------------------------------------


@contextlib.contextmanager
def eagerly():
    """Models are fitted without a graph: of a few steps, most of the time would go into tracing them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keras.Model, "compile", functools.partialmethod(keras.Model.compile, run_eagerly=True))
        yield


def run_script(script, *arguments, **options):
    """Run train.py or predict.py as a user does: the finished process, with its output as text."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is tidied up."""


@contextlib.contextmanager
def killed_before(function, name=None, number=1):
    """A script is killed when it is about to call os.replace or os.unlink, of that name, for that many-th time."""
    call, calls = getattr(os, function), []

    def call_or_die(*paths, **options):
        if name in (None, pathlib.Path(paths[-1]).name):
            calls.append(paths)
            if len(calls) == number:
                raise Killed
        call(*paths, **options)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(os, function, call_or_die)
        yield


def files_in(folder):
    """Names of its files and folders, without the hidden ones, such as the lock of a run."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def read_history(path):
    """Rows without the seconds, which no two runs share."""
    with open(path, newline="") as file:
        return [{name: float(row[name]) for name in row if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture
def refuse(capsys, monkeypatch):
    """Call the main() of a script: exit code 2, and one line that begins with its name and has what is expected."""

    def check(script, arguments, *expected):
        name = f"{script.__name__}.py"
        monkeypatch.setattr(sys, "argv", [name])  # argparse begins its message with it
        capsys.readouterr()
        try:
            code = script.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if not re.match(r"usage: |\s", line)]  # argparse's usage
        assert code == 2 and "done: " not in printed.out and "Traceback" not in printed.err
        assert len(lines) == 1 and lines[0].startswith(f"{name}: "), printed.err
        for words in expected:
            assert words in lines[0]
        return lines[0]

    return check
