"""The measure on binarised MNIST, on made digits."""

import functools
import re

import modules

import mnist
import numpy as np
from conftest import eagerly
from PIL import Image


@eagerly()
def test_made_digits_are_binarised_learned_and_measured(tmp_path, monkeypatch, capsys):
    """Black and white pixels stay what they are; twenty grey ones are coins, and there is nothing else to learn."""
    digit = np.zeros((28, 28), np.uint8)
    digit[20:25, 3:20], digit[10:12, 5:15] = 255, 128
    for name, count in (("train", 80), ("t10k", 48)):
        content = bytes(16) + np.repeat(digit[None], count, axis=0).tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(content)
    for name, value in {"VALIDATE": 16, "BATCH_SIZE": 8, "LEARNING_RATE": 3e-2}.items():
        monkeypatch.setattr(mnist, name, value)
    monkeypatch.setattr(modules, "PixelCNN", functools.partial(modules.PixelCNN, residual_blocks=1))
    train, validate, test = mnist.binarised_mnist(tmp_path)
    assert (len(train), len(validate), len(test)) == (64, 16, 48)
    np.testing.assert_array_equal(test[:, digit != 128], np.broadcast_to(digit[digit != 128] > 0, (48, 764)))
    assert 0.4 < train[:, digit == 128].mean() < 0.6
    np.testing.assert_array_equal(mnist.binarised_mnist(tmp_path)[2], test)  # one draw for all runs

    picture = tmp_path / "mnist.png"
    arguments = ["--data", tmp_path, "--epochs", 3, "--filters", 8, "--picture", picture]
    assert mnist.main(list(map(str, arguments))) == 0
    printed = re.search(r"test: (\S+) \+- (\S+) nats an image, 48 images", capsys.readouterr().out)
    nats, error = map(float, printed.groups())
    assert 20 * np.log(2) - 0.5 < nats < 784 * np.log(2) / 3 and 0 <= error < nats
    assert Image.open(picture).size[0] > 500
