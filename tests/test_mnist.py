"""The measure on binarised MNIST, on made digits."""

import functools
import re
import signal

import modules

import mnist
import numpy as np
import pytest
from conftest import eagerly, read_history


@eagerly()
def test_made_digits_are_learned_and_measured_also_after_a_stop(tmp_path, monkeypatch, capsys):
    """Black and white pixels stay what they are; twenty grey ones are coins, and there is nothing else to learn."""
    digit = np.zeros((28, 28), np.uint8)
    digit[20:25, 3:20], digit[10:12, 5:15] = 255, 128
    for name, count in (("train", 80), ("t10k", 48)):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(bytes(16) + count * digit.tobytes())
    for name, value in {"VALIDATE": 16, "BATCH_SIZE": 8, "LEARNING_RATE": 3e-2}.items():
        monkeypatch.setattr(mnist, name, value)
    monkeypatch.setattr(modules, "PixelCNN", functools.partial(modules.PixelCNN, residual_blocks=1))
    train, validate, test = mnist.binarised_mnist(tmp_path)
    assert (len(train), len(validate), len(test)) == (64, 16, 48) and 0.4 < train[:, digit == 128].mean() < 0.6
    np.testing.assert_array_equal(test[:, digit != 128], np.broadcast_to(digit[digit != 128] > 0, (48, 764)))
    np.testing.assert_array_equal(mnist.binarised_mnist(tmp_path)[2], test)  # one draw for all runs

    def measure(run):
        return mnist.main(["--data", str(tmp_path), "--epochs=2", "--filters=8", "--run", str(tmp_path / run)])

    with pytest.MonkeyPatch.context() as patched:  # Ctrl-C when the first epoch is saved
        patched.setattr(mnist.keras.callbacks.CSVLogger, "on_epoch_end", lambda *_: signal.raise_signal(signal.SIGINT))
        assert measure("stopped") == 130
    assert measure("stopped") == measure("whole") == 0
    nats, error = map(float, re.search(r"test: (\S+) \+- (\S+) nats an image, 48", capsys.readouterr().out).groups())
    assert 20 * np.log(2) - 0.5 < nats < 784 * np.log(2) / 3 and 0 <= error < nats
    stopped, whole = (read_history(tmp_path / run / "history.csv") for run in ("stopped", "whole"))
    assert stopped == [pytest.approx(whole[1], rel=1e-5)] and (tmp_path / "stopped/mnist.png").exists()
