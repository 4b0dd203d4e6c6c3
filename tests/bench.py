"""Prints each claim of speed with both of its sides, timed in turns on this machine.

    python tests/bench.py                                 # everything, on phantoms
    python tests/bench.py --data keras_png_slices_data    # (d) and (e) on these slices
    python tests/bench.py --only a b                      # sampling alone

(a) sampling 50 pictures, against one `predict` of the same network for every grid position
(b) sampling 256 pictures, against one compiled forward pass over 256 pictures
(c) an epoch of training, against the plain networks written out below
(d) loading a split, against `keras.utils.load_img` in a loop and against bare decoding
(e) peak memory of train.py, against that of its imports alone

A time is the median of a few repetitions, which take turns (A B A B), after one that does not
count. In brackets behind a ratio: the lowest and the highest ratio of one turn.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from keras import layers

import dataset
import modules
import train

REPETITIONS = 5
EVERY = 8  # (a) times one grid position in this many, and scales
SLICES = 4480  # (c) an epoch: the slices of 140 subjects
CPU_STEPS = 4  # (c) steps of a PixelCNN timed without a GPU, and scaled to an epoch

PUBLISHED = train.Settings()
ORIGINAL = train.Settings(**train.ORIGINAL)
FINER = dataclasses.replace(ORIGINAL, num_embeddings=256, filters=(32, 64))  # the original's prior on a 16x16 grid
GPUS = tf.config.list_physical_devices("GPU")


# --------------------------------------------------------------------------------------
# Timing and printing
# --------------------------------------------------------------------------------------


def measure(*functions):
    """Seconds that each function takes, in turns: (functions, REPETITIONS)."""

    def seconds(function):
        started = time.perf_counter()
        function()
        tf.test.experimental.sync_devices()  # a GPU may still be at it
        return time.perf_counter() - started

    turns = [[seconds(function) for function in functions] for _ in range(1 + REPETITIONS)]
    return np.array(turns[1:]).T


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def row(what, ours, against, theirs, ratio):
    print(f"{what:<41} {ours:>8}   {against:<36} {theirs:>8}   {ratio}", flush=True)


def compare(what, ours, against, theirs, unit=None):
    """Print a row of two medians: how many times faster ours is, or ours in units of the other side."""

    def ratio(ours, theirs):
        return ours / theirs if unit else theirs / ours

    medians, turns = (np.median(ours), np.median(theirs)), ratio(ours, theirs)
    ours, theirs = (f"{number(median)} s" for median in medians)
    spread = f"({number(turns.min())} to {number(turns.max())})"
    row(what, ours, against, theirs, f"{number(ratio(*medians))}{unit or 'x'} {spread}")


def print_header(devices):
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processors = [line.split(": ")[1] for line in lines if line.startswith("model name")] or [platform.processor()]
    print(f"{processors[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(devices)
    print(", ".join(f"{library} {version}" for library, version in train.library_versions().items()))
    print(f"medians of {REPETITIONS} repetitions in turns\n")
    row("", "ours", "against", "", "ratio")


# --------------------------------------------------------------------------------------
# The plain networks
# --------------------------------------------------------------------------------------


class PlainMaskedConv2D(layers.Conv2D):
    """The textbook form: every entry of the kernel is stored, masked, and multiplied."""

    def __init__(self, filters, kernel_size, mask_type):
        super().__init__(filters, kernel_size, padding="same")
        entries = np.arange(kernel_size**2).reshape(kernel_size, kernel_size, 1, 1)
        self.mask = (entries < modules.visible_taps(kernel_size, mask_type)).astype("float32")

    def call(self, inputs):
        return tf.nn.conv2d(inputs, self.kernel * self.mask, strides=1, padding="SAME") + self.bias


class OneHotQuantizer(layers.Layer):
    """The quantizer of [4]: whole distances, one-hot codes, and a matrix product for the lookup."""

    def __init__(self, num_embeddings, embedding_dim, commitment_cost):
        super().__init__()
        self.num_embeddings, self.commitment_cost = num_embeddings, commitment_cost
        self.codebook = self.add_weight(name="codebook", shape=(num_embeddings, embedding_dim))

    def call(self, latents):
        flat = tf.reshape(latents, (-1, latents.shape[-1]))
        codebook = tf.convert_to_tensor(self.codebook)
        squares = tf.reduce_sum(flat**2, axis=1, keepdims=True) + tf.reduce_sum(codebook**2, axis=1)
        codes = tf.argmin(squares - 2 * tf.matmul(flat, codebook, transpose_b=True), axis=1)
        quantized = tf.matmul(tf.one_hot(codes, self.num_embeddings), codebook)
        quantized = tf.reshape(quantized, tf.shape(latents))
        commitment_loss = tf.reduce_mean((tf.stop_gradient(quantized) - latents) ** 2)
        codebook_loss = tf.reduce_mean((quantized - tf.stop_gradient(latents)) ** 2)
        self.add_loss(self.commitment_cost * commitment_loss + codebook_loss)
        return latents + tf.stop_gradient(quantized - latents)


def copy_weights(plain, ours):
    """Fill the weights of one layer with those of another, and the hidden entries of a masked kernel with ones."""
    for target, source in zip(plain.trainable_weights, ours.trainable_weights, strict=True):
        hidden = np.ones(math.prod(target.shape) - math.prod(source.shape))
        target.assign(np.append(source, hidden).reshape(target.shape))


def plain_pixelcnn(ours):
    """The network of `ours` and its weights, told nothing, on one-hot codes, of full kernels and 1x1 convolutions."""

    def plain(layer, source, inputs):
        outputs = layer(inputs)
        copy_weights(layer, source)
        return outputs

    codes = keras.Input(ours.grid, dtype="int32")
    one_hot = keras.ops.one_hot(codes, ours.num_embeddings)
    x = plain(PlainMaskedConv2D(ours.filters, 7, "A"), ours.first, one_hot)
    for i, block in enumerate(ours.blocks):
        if ours.contexts and i % modules.CONTEXT_EVERY == 0:  # the same on both sides
            x = plain(
                modules.RowContext(ours.context_filters, ours.dropout), ours.contexts[i // modules.CONTEXT_EVERY], x
            )
        hidden = plain(layers.Conv2D(ours.filters // 2, 1, activation="relu"), block.narrow, layers.ReLU()(x))
        hidden = plain(PlainMaskedConv2D(ours.filters // 2, 3, "B"), block.masked, hidden)
        hidden = layers.SpatialDropout2D(ours.dropout)(layers.ReLU()(hidden))
        x = layers.Add()([x, plain(layers.Conv2D(ours.filters, 1), block.widen, hidden)])
    x = layers.ReLU()(x)
    for dense in ours.head:
        x = plain(layers.Conv2D(dense.units, 1, activation=dense.activation), dense, x)
    return keras.Model(codes, x)


def plain_vqvae(ours):
    """The network of `ours` and its weights, without the SSIM term and without residual blocks."""
    shape = ours.image_size, ours.embedding_dim, ours.filters, ours.kernel_size, 0
    quantizer = OneHotQuantizer(ours.num_embeddings, ours.embedding_dim, ours.commitment_cost)
    parts = modules.build_encoder(*shape), quantizer, modules.build_decoder(*shape)
    for part, source in zip(parts, (ours.encoder, ours.quantizer, ours.decoder)):
        copy_weights(part, source)
    return keras.Sequential(parts)


# --------------------------------------------------------------------------------------
# The parts
# --------------------------------------------------------------------------------------


def make_pixelcnn(settings):
    """The prior of train.py without labels and augmentation, and what it is called in the table."""
    model = train.make_pixelcnn(dataclasses.replace(settings, augmentations=0))
    height, width = model.grid
    return model, f"{height}x{width}, K={model.num_embeddings}, {model.filters} filters"


def random_codes(model, pictures):
    return np.random.default_rng(0).integers(model.num_embeddings, size=(pictures, *model.grid), dtype="int32")


def bench_predict(settings):
    """(a) for one network."""
    model, name = make_pixelcnn(settings)
    size = math.prod(model.grid)
    positions = range(0, size, EVERY)

    def predict_per_position():
        codes = np.zeros((50, *model.grid), "int32")
        for position in positions:
            logits = model.predict(codes, verbose=0)
            here = (slice(None), *divmod(position, model.grid[1]))
            codes[here] = tfp.distributions.Categorical(logits=logits[here]).sample()

    ours, theirs = measure(lambda: model.sample(50, seed=0), predict_per_position)
    against = f"{size} predicts ({len(positions)} timed, scaled)"
    compare(f"(a) sample 50: {name}", ours, against, theirs * size / len(positions))


def bench_passes(settings):
    """(b) for one network."""
    model, name = make_pixelcnn(settings)
    codes = tf.constant(random_codes(model, 256))
    our_pass, plain_pass = tf.function(model), tf.function(plain_pixelcnn(model))
    sides = (lambda: model.sample(256, seed=0), lambda: our_pass(codes), lambda: plain_pass(codes))
    sampling, ours, plain = measure(*sides)
    compare(f"(b) sample 256: {name}", sampling, "a pass of this network over 256", ours, " passes")
    compare(f"(b) sample 256: {name}", sampling, "a pass of the plain network over 256", plain, " passes")


def compare_epochs(what, ours, plain, examples, prepare, batch_size, steps):
    """(c) for two compiled models with the same weights: `fit` on the same batches."""
    examples = tf.constant(examples)

    def gather(index):
        batch = prepare(tf.gather_nd(examples, index[:, :1]))
        return batch, batch

    batches = dataset.shuffled_batches(len(examples), 1, batch_size, 0, range(100)).map(gather)
    inputs = next(iter(batches))[0][:8]
    outputs, expected = np.array(ours(inputs)), np.array(plain(inputs))
    difference = f"{np.abs(outputs - expected).max():.0e}"
    row(what, "", "largest difference of the outputs", difference, f"where they reach {np.abs(expected).max():.2g}")

    epoch = SLICES // batch_size
    options = {"steps_per_epoch": steps, "shuffle": False, "verbose": 0}
    sides = [lambda model=model: model.fit(batches, **options) for model in (ours, plain)]
    our_seconds, plain_seconds = measure(*sides) * epoch / steps
    compare(what, our_seconds, "plain" + f" ({steps} of {epoch} steps)" * (steps < epoch), plain_seconds)


def bench_pixelcnn_epoch(settings):
    ours, name = make_pixelcnn(settings)
    plain = plain_pixelcnn(ours)
    ours.compile(keras.optimizers.Adam(settings.pixelcnn_learning_rate))
    plain.compile(
        keras.optimizers.Adam(settings.pixelcnn_learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    codes, batch_size = random_codes(ours, SLICES), settings.pixelcnn_batch_size
    steps = SLICES // batch_size if GPUS else CPU_STEPS
    compare_epochs(f"(c) epoch: {name}", ours, plain, codes, tf.identity, batch_size, steps)


def bench_vqvae_epoch():
    ours = train.make_vqvae(ORIGINAL)
    plain = plain_vqvae(ours)
    ours.compile(keras.optimizers.Adam(ORIGINAL.vqvae_learning_rate))
    plain.compile(keras.optimizers.Adam(ORIGINAL.vqvae_learning_rate), "mean_squared_error")
    shape = (SLICES, dataset.IMAGE_SIZE, dataset.IMAGE_SIZE)
    images, batch_size = np.random.default_rng(0).integers(256, size=shape, dtype="uint8"), ORIGINAL.vqvae_batch_size

    def prepare(batch):
        return tf.cast(batch[..., None], tf.float32) / 255

    compare_epochs("(c) epoch: VQ-VAE", ours, plain, images, prepare, batch_size, SLICES // batch_size)


def bench_loading(data):
    """(d)"""
    paths = dataset.list_slices(dataset.find_data(data) / "keras_png_slices_train")
    size = (dataset.IMAGE_SIZE, dataset.IMAGE_SIZE)

    def read_images():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            dataset.read_images(paths, "train")

    def load_img():
        for path in paths:
            keras.utils.img_to_array(keras.utils.load_img(path, color_mode="grayscale", target_size=size))

    def decode_only():
        files = tf.data.Dataset.from_tensor_slices([str(path) for path in paths])
        images = files.map(lambda path: tf.io.decode_png(tf.io.read_file(path), 1), num_parallel_calls=tf.data.AUTOTUNE)
        images.reduce(0, lambda total, image: total + tf.size(image))

    ours, loop, floor = measure(read_images, load_img, decode_only)
    compare(f"(d) load {len(paths)} slices", ours, "load_img in a loop", loop)
    compare(f"(d) load {len(paths)} slices", ours, "bare decoding on all cores", floor, " of it")


def peak_memory(*arguments):
    """Peak resident memory of a Python process, in GB.

    A new process counts from its parent's peak; so a small one in between starts and measures it.
    """
    between = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", between, sys.executable, *map(str, arguments)]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def bench_memory(data):
    """(e)"""
    with tempfile.TemporaryDirectory() as folder:
        epochs = ("--vqvae-epochs", 1, "--pixelcnn-epochs", 1)
        ours = peak_memory(train.__file__, "--data", data, "--run", f"{folder}/run", *epochs)
    imports = peak_memory(train.__file__, "--help")
    against = f"{ours:.2f} GB", "train.py --help", f"{imports:.2f} GB"
    row("(e) peak memory, train.py for 1+1 epochs", *against, f"{ours / imports:.2f} of it")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", help="folder of the slices (default: phantoms, drawn into a temporary folder)")
    parser.add_argument("--only", nargs="+", choices="abcde", default="abcde", help="parts to run (default: all)")
    options = parser.parse_args(arguments)
    devices = modules.set_up_devices()

    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if not data and {"d", "e"} & set(options.only):
            data = pathlib.Path(folder) / "phantom_slices"
            dataset.write_phantom(data)
        print_header(devices)
        if "a" in options.only:
            bench_predict(PUBLISHED)
            bench_predict(ORIGINAL)
        if "b" in options.only:
            for settings in (PUBLISHED, FINER, ORIGINAL):
                bench_passes(settings)
        if "c" in options.only:
            for settings in (PUBLISHED, FINER, ORIGINAL):
                bench_pixelcnn_epoch(settings)
            bench_vqvae_epoch()
        if "d" in options.only:
            bench_loading(data)
        if "e" in options.only:
            bench_memory(data)


if __name__ == "__main__":
    main()
