"""Prints each claim of speed with both of its sides, timed in turns on this machine.

    python tests/bench.py                                 # everything; (d) on phantoms
    python tests/bench.py --data keras_png_slices_data    # (d) on these slices
    python tests/bench.py --only a b                      # sampling alone

(a) sampling 50 pictures, against one `predict` of the same network for every grid position
(b) sampling 256 pictures, against one compiled forward pass over 256 pictures
(c) what is written otherwise than in a textbook, forwards and backwards, against the textbook's form
(d) loading a split, against `keras.utils.load_img` in a loop and against bare decoding

A time is the median of a few repetitions, which take turns (A B A B), after one that does not
count. In brackets behind a ratio: the lowest and the highest ratio of one turn.
"""

import argparse
import contextlib
import io
import math
import os
import pathlib
import platform
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dataset
import modules
import train

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

REPETITIONS = 5
EVERY = 8  # (a) times one grid position in this many, and scales
BATCH = 128  # of (c)

PUBLISHED = train.Settings()
ORIGINAL, _ = train.parse_arguments(["--original"])


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
# The parts
# --------------------------------------------------------------------------------------


def bench_sampling(settings, parts):
    """(a) and (b) for the prior of a run on 32 slices a head."""
    model = train.make_pixelcnn(settings, range(32) if settings.labels else (), settings.below)
    (height, width), size = model.grid, math.prod(model.grid)
    name = f"{height}x{width}, K={model.num_embeddings}, {model.filters} filters"
    positions = range(0, size, EVERY)

    def told(pictures):
        return {"labels": np.arange(pictures, dtype=np.int32) % 32} if settings.labels else {}

    def predict_per_position():
        codes = np.zeros((50, height, width), "int32")
        for position in positions:
            logits = model.predict({"codes": codes, **told(50)}, verbose=0)
            here = (slice(None), *divmod(position, width))
            codes[here] = tfp.distributions.Categorical(logits=logits[here]).sample()

    if "a" in parts:
        ours, theirs = measure(lambda: model.sample(50, seed=0, **told(50)), predict_per_position)
        against = f"{size} predicts ({len(positions)} timed, scaled)"
        compare(f"(a) sample 50: {name}", ours, against, theirs * size / len(positions))
    if "b" in parts:
        codes = np.random.default_rng(0).integers(model.num_embeddings, size=(256, height, width), dtype="int32")
        inputs, one_pass = tf.nest.map_structure(tf.constant, {"codes": codes, **told(256)}), tf.function(model)
        sampling, passing = measure(lambda: model.sample(256, seed=0, **told(256)), lambda: one_pass(inputs))
        compare(f"(b) sample 256: {name}", sampling, "a pass of this network over 256", passing, " passes")


def bench_part(name, textbook, ours, theirs, variables):
    """(c) for two functions of nothing with the same values, and with gradients for `variables`."""

    def step(function):
        def forwards_and_backwards():
            with tf.GradientTape() as tape:
                tape.watch(variables)
                result = function()
                loss = tf.reduce_sum(result**2)
            return result, tape.gradient(loss, variables)

        return tf.function(forwards_and_backwards)

    ours, theirs = step(ours), step(theirs)
    difference = np.abs(ours()[0] - theirs()[0]).max()
    if difference > 1e-4:
        raise AssertionError(f"{name}: the two sides differ by {difference}")
    our_seconds, their_seconds = measure(ours, theirs)
    compare(f"(c) {name}", our_seconds, textbook, their_seconds)


def bench_parts(settings):
    model = train.make_pixelcnn(settings)
    first, masked = model.first, model.blocks[0].masked
    rng = np.random.default_rng(0)
    codes = tf.constant(rng.integers(first.num_embeddings, size=(BATCH, *model.grid), dtype="int32"))
    x = tf.constant(rng.normal(size=(BATCH, *model.grid, masked.filters)), tf.float32)
    size = settings.image_size
    images, others = (tf.constant(rng.random((BATCH, size, size, 1)), tf.float32) for _ in range(2))

    def full(layer):
        """The k x k kernel of a masked layer, zeros where it is masked."""
        k, (taps, *channels) = layer.kernel_size, layer.kernel.shape
        return tf.reshape(tf.concat([layer.kernel, tf.zeros((k * k - taps, *channels))], axis=0), (k, k, *channels))

    def plain_first():
        return tf.nn.conv2d(tf.one_hot(codes, first.num_embeddings), full(first), 1, "SAME") + first.bias

    def plain_masked():
        return tf.nn.conv2d(x, full(masked), 1, "SAME") + masked.bias

    kernels = [layer.kernel.value for layer in (first, masked)]
    bench_part("first layer", "7x7 convolution of one-hot codes", lambda: first(codes), plain_first, kernels[0])
    bench_part("masked 3x3", "3x3 convolution, masked kernel", lambda: masked(x), plain_masked, kernels[1])
    bench_part("SSIM", "tf.image.ssim", lambda: modules.ssim(images, others),
               lambda: tf.image.ssim(images, others, 1.0), others)  # fmt: skip


def bench_loading(data):
    """(d)"""
    paths = dataset.list_slices(dataset.find_data(data) / "keras_png_slices_train")
    size = (PUBLISHED.image_size, PUBLISHED.image_size)

    def read_images():
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            dataset.read_images(paths, "train", PUBLISHED.image_size)

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


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", help="folder of the slices (default: phantoms, drawn into a temporary folder)")
    parser.add_argument("--only", nargs="+", choices="abcd", default="abcd", help="parts to run (default: all)")
    options = parser.parse_args(arguments)
    print_header(modules.set_up_devices())
    for settings in (PUBLISHED, ORIGINAL):
        if "a" in options.only or "b" in options.only:
            bench_sampling(settings, options.only)
    if "c" in options.only:
        bench_parts(PUBLISHED)
    if "d" in options.only:
        with tempfile.TemporaryDirectory() as folder:
            data = options.data
            if not data:
                data = pathlib.Path(folder) / "phantom_slices"
                dataset.write_phantom(data)
            bench_loading(data)


if __name__ == "__main__":
    main()
