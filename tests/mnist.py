"""Fits the PixelCNN to binarised MNIST, for a number beside that of the paper.

    python tests/mnist.py --data FOLDER     # of the four idx files of MNIST, unpacked

Pixel Recurrent Neural Networks (van den Oord et al. 2016), table 4, gives a PixelCNN 81.30 nats an image. As there, a
pixel is one of two codes, and there is no condition. Each pixel is drawn once with its grey value as probability, by
the fixed seed BINARISED: published figures are of another draw, or of a new one each epoch. The last 5,000 training
images validate; nothing is chosen by the test images, and the network of the last epoch is measured.
"""

import argparse
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dataset
import modules
import predict
import train

import keras
import numpy as np

BINARISED = 0  # seed
VALIDATE = 5000  # images
BATCH_SIZE, WARMUP, LEARNING_RATE = 64, 200, 5e-3  # images a step; steps; at its highest


def binarised_mnist(folder):
    """Training, validation and test images, int32 (N, 28, 28) of 0 and 1."""
    rng = np.random.default_rng(BINARISED)

    def read(name):
        grey = np.fromfile(folder / f"{name}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28)
        return (rng.random(grey.shape) < grey / 255).astype(np.int32)

    train_images, test = read("train"), read("t10k")
    return train_images[:-VALIDATE], train_images[-VALIDATE:], test


def measure(options):
    """Of a PixelCNN of 15 blocks, fitted; prints nats an image after each epoch too."""
    images, validate, test = binarised_mnist(options.data)
    keras.utils.set_random_seed(options.seed)
    model = modules.PixelCNN(2, images.shape[1:], options.filters)
    steps = options.epochs * math.ceil(len(images) / BATCH_SIZE)
    model.compile(train.make_optimizer(LEARNING_RATE, steps, min(WARMUP, steps // 2), clip_norm=1.0, muon=True))
    print(f"{model.count_params()} parameters, {steps} steps of {BATCH_SIZE} of {len(images)} images")

    def print_nats(epoch, logs):
        nats = {name: round(images[0].size * value, 2) for name, value in logs.items()}
        print(f"epoch {epoch + 1}: nats an image {nats}", flush=True)

    bar = dataset.verbosity()
    report = keras.callbacks.LambdaCallback(on_epoch_end=print_nats)
    model.fit(
        images, batch_size=BATCH_SIZE, epochs=options.epochs, validation_data=(validate,), callbacks=report, verbose=bar
    )
    nats = model.nll(test, bar).numpy().sum(axis=(1, 2), dtype=np.float64)
    error = nats.std() / math.sqrt(len(nats))
    print(f"test: {nats.mean():.2f} +- {error:.2f} nats an image, {len(test)} images; the paper has 81.30")
    novel = model.sample(48, options.seed, verbose=bar).numpy().reshape(4, 12, 28, 28)
    rows = [("novel", row, None) for row in novel] + [("test", test[i : i + 12], None) for i in (0, 12)]
    title = f"Binarised MNIST: 48 samples, not selected, seed {options.seed}; and the first test digits"
    dataset.write_figure(options.picture, predict.picture_grid(title, rows, 0.8))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    number, default = dataset.number, "default: %(default)s"
    parser.add_argument("--data", type=dataset.folder, required=True, help="folder of the idx files")
    parser.add_argument("--epochs", type=number(int, 1, 10**4), default=6, metavar="N", help=default)
    parser.add_argument("--filters", type=number(int, 2, 4096), default=64, metavar="N", help=default)
    of = "of the weights and the samples; " + default
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help=of)
    parser.add_argument("--picture", type=dataset.folder, default="mnist.png", help=default)
    options = parser.parse_args(arguments)
    print(modules.set_up_devices())
    with modules.keras_defaults():
        return dataset.run_script("mnist.py", measure, options)


if __name__ == "__main__":
    sys.exit(main())
