"""What the tests share: phantom slices, and one tiny run that train.py and predict.py made of them.

They run on the CPU, also where there is a GPU.
"""

import os
import pathlib
import subprocess
import sys

import pytest

# Before TensorFlow is imported, here and in the processes of the tests.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # what XLA compiles runs once or twice

import dataset
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Small enough for seconds on a CPU, and every part of the default networks is in it.
TINY = [
    *("--num-embeddings", "16", "--filters", "4", "8", "--decoder-blocks", "1", "--vqvae-epochs", "3"),
    *("--pixelcnn-filters", "8", "--pixelcnn-blocks", "2", "--pixelcnn-epochs", "3"),
    *("--vqvae-batch-size", "32", "--pixelcnn-batch-size", "32", "--augmentations", "2", "--scores", "4"),
]


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A folder of phantoms: 3 subjects to train on, 1 to validate, 1 to test."""
    folder = tmp_path_factory.mktemp("phantoms") / "keras_png_slices_data"
    dataset.write_phantom(folder, train=3, validate=1, test=1)
    return folder


def run_script(script, *arguments, **options):
    """Run train.py or predict.py as a user does: the finished process, with its output as text."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(scope="session")
def finished_run(phantoms, tmp_path_factory):
    """The folder of a tiny run, trained and measured. Not to be changed by a test: copy it."""
    run = tmp_path_factory.mktemp("runs") / "a tiny run"
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 0
    predicted = run_script("predict.py", "--run", run, "--complete")
    assert predicted.returncode == 0, predicted.stderr
    return run
