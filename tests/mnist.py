"""Fits the PixelCNN, and nothing else, to binarised MNIST, for a number beside that of the paper.

    python tests/mnist.py --data FOLDER     # of the four idx files of MNIST, unpacked

Pixel Recurrent Neural Networks (van den Oord et al. 2016), table 4, gives a PixelCNN 81.30 nats an image. As there, a
pixel is one of two codes, and nothing else is known. Each pixel is drawn once with its grey value as probability, by
the fixed seed BINARISED: published figures are of another draw, or of a new one each epoch. The last 5,000 training
images validate; nothing is chosen by the test images, and the network of the last epoch is measured. The same command
goes on where one was stopped.
"""

import argparse
import csv
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dataset
import modules
import train

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

BINARISED = 0  # seed
VALIDATE = 5000  # images
BATCH_SIZE, WARMUP, LEARNING_RATE = 32, 0.25, 5e-3  # images a step; epochs; at its highest


def binarised_mnist(folder):
    """Training, validation and test images, int32 (N, 28, 28) of 0 and 1."""
    images, rng = [], np.random.default_rng(BINARISED)
    for name in ("train", "t10k"):
        grey = np.fromfile(folder / f"{name}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 28, 28)
        images.append((rng.random(grey.shape) < grey / 255).astype(np.int32))
    return images[0][:-VALIDATE], images[0][-VALIDATE:], images[1]


def measure(options):
    """Fit a PixelCNN of 15 blocks, and print the nats of a test image under it."""
    images, validate, test = binarised_mnist(options.data)
    steps, epochs, seed = len(images) // BATCH_SIZE, options.epochs, options.seed
    keras.utils.set_random_seed(seed)
    model = modules.PixelCNN(2, test.shape[1:], options.filters)
    model.compile(train.make_optimizer(LEARNING_RATE, epochs, steps, WARMUP, clip_norm=1.0, muon=True))
    backup = keras.callbacks.BackupAndRestore(options.run / "backup", double_checkpoint=True, delete_checkpoint=False)
    backup.set_model(model)
    backup.on_train_begin()  # restores what there is: here too, to know how many epochs are done
    done, history = int(model.optimizer.iterations) // steps, options.run / "history.csv"
    print(f"{model.count_params()} parameters, {epochs} epochs of {steps} steps of {BATCH_SIZE} images, {done} done")

    def add_nats(epoch, logs):
        logs["validation_nats"] = test[0].size * logs["val_loss"]
        print(f"epoch {epoch + 1}: {logs['validation_nats']:.2f} nats a validation image", flush=True)

    if done < epochs:
        report = keras.callbacks.LambdaCallback(on_epoch_end=add_nats)
        fit = {"epochs": epochs, "steps_per_epoch": steps, "shuffle": False, "verbose": dataset.verbosity()}
        fit["callbacks"] = [report, backup, keras.callbacks.CSVLogger(history, append=True)]
        images = tf.constant(images)
        batches = dataset.shuffled_batches(len(images), 1, BATCH_SIZE, seed, range(done, epochs))
        batches = batches.map(lambda index: tf.gather(images, index[:, 0])).prefetch(2)
        validation = tf.data.Dataset.from_tensor_slices(validate).batch(256)
        batches, validation = map(dataset.without_autotuning, (batches, validation))
        model.fit(batches, validation_data=validation, **fit)
    prior = modules.Prior(model, learned_position=False)  # of no condition: it measures and samples
    nats = prior.nll(test, verbose=True).sum(axis=(1, 2), dtype=np.float64)
    error = nats.std() / math.sqrt(len(nats))
    print(f"test: {nats.mean():.2f} +- {error:.2f} nats an image, {len(test)} images; the paper has 81.30")
    samples = prior.sample(48, seed, verbose=True).reshape(4, 12, 28, 28)
    rows = [(int(row["epoch"]) + 1, float(row["validation_nats"])) for row in csv.DictReader(history.open())]
    figure = Figure(figsize=(12, 4), layout="constrained")
    curve, digits = figure.subplots(1, 2)
    curve.plot(*np.transpose(rows) * [[steps], [1]], marker=".")
    curve.axhline(81.30, color="grey", linestyle="dashed", label="test images in the paper")
    curve.set(xlabel=f"steps of {BATCH_SIZE} images", ylabel="nats a validation image")
    curve.legend()
    digits.imshow(samples.swapaxes(1, 2).reshape(4 * 28, 12 * 28), cmap="gray")
    digits.set(title=f"48 samples, not selected, seed {seed}", xticks=[], yticks=[])
    dataset.write_figure(history.with_name("mnist.png"), figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    count, default = {"type": dataset.number(int, 1, 10**4), "metavar": "N"}, "default: %(default)s"
    parser.add_argument("--data", type=dataset.folder, required=True, help="folder of the idx files")
    parser.add_argument("--run", type=dataset.folder, default="runs/mnist", help="folder of the results; " + default)
    parser.add_argument("--epochs", default=20, help=default, **count)
    parser.add_argument("--filters", default=64, help=default, **count)
    parser.add_argument("--seed", type=dataset.number(int, 0, 10**4), default=0, metavar="N", help=default)
    options = parser.parse_args(arguments)
    options.run.mkdir(parents=True, exist_ok=True)
    print(modules.set_up_devices())
    with modules.keras_defaults():
        return dataset.run_script("mnist.py", measure, options)


if __name__ == "__main__":
    sys.exit(main())
