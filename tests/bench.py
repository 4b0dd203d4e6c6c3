"""Prints each claim of speed with both of its sides, timed in turns on this machine.

    python tests/bench.py                                 # everything
    python tests/bench.py --only a b                      # sampling alone

(a) the cached sampler's 50 pictures, against one `predict` of the same network for every grid position
(b) the cached sampler's 256 pictures, in compiled forward passes of the same network over 256 pictures
(c) what is written otherwise than in a textbook, forwards and backwards, against the textbook's form

A time is the median of a few repetitions, which take turns (A B A B), after one that does not
count. In brackets behind a ratio: the lowest and the highest ratio of one turn.
"""

import argparse
import math
import os
import pathlib
import platform
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import modules
import train

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp

REPETITIONS = 5
EVERY = 8  # (a) times one grid position in this many, and scales
BATCH = 128  # of (c)

PUBLISHED, ORIGINAL = (train.parse_arguments(flags)[0] for flags in ([], ["--original"]))


def seconds(function):
    started = time.perf_counter()
    function()
    tf.test.experimental.sync_devices()  # a GPU may still be at it
    return time.perf_counter() - started


def number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def print_row(what="", ours="ours", against="against", theirs="", ratio="ratio"):
    print(f"{what:<41} {ours:>8}   {against:<36} {theirs:>8}   {ratio}", flush=True)


def compare(what, ours, against, theirs, unit=None, scale=1):
    """Time two functions in turns, and print how many times faster ours is, or ours in units of the other side."""
    turns = [[seconds(ours), scale * seconds(theirs)] for _ in range(1 + REPETITIONS)]
    turns = np.array([*turns[1:], np.median(turns[1:], axis=0)])
    *ratios, ratio = turns[:, 0] / turns[:, 1] if unit else turns[:, 1] / turns[:, 0]
    ours, theirs = (f"{number(median)} s" for median in turns[-1])
    print_row(
        what, ours, against, theirs, f"{number(ratio)}{unit or 'x'} ({number(min(ratios))} to {number(max(ratios))})"
    )


def bench_sampling(settings, parts):
    """(a) and (b) for the prior of a run on 32 slices a head."""
    prior = train.make_prior(settings, range(32) if settings.labels else (), settings.below)
    (height, width), size = prior.grid, math.prod(prior.grid)
    name = f"{height}x{width}, K={prior.num_embeddings}, {prior.network.filters} filters"
    positions, labels = range(0, size, EVERY), prior.labels_of(np.arange(256) % 32)

    def sample(count):
        return prior.sample(count, seed=0, cached=True, labels=labels[:count])

    def predict_per_position():
        codes = np.zeros((50, height, width), "int32")
        for position in positions:
            logits = prior.predict({"codes": codes, "labels": labels[:50]}, verbose=0)
            here = (slice(None), *divmod(position, width))
            codes[here] = tfp.distributions.Categorical(logits=logits[here]).sample()

    if "a" in parts:
        against, scale = f"{size} predicts ({len(positions)} timed, scaled)", size / len(positions)
        compare(f"(a) sample 50: {name}", lambda: sample(50), against, predict_per_position, scale=scale)
    if "b" in parts:
        codes = tf.random.uniform((256, height, width), maxval=prior.num_embeddings, dtype=tf.int32)
        inputs, one_pass = {"codes": codes, "labels": tf.constant(labels)}, tf.function(prior)
        what, against = f"(b) sample 256: {name}", "a pass of this network over 256"
        compare(what, lambda: sample(256), against, lambda: one_pass(inputs), " passes")


def bench_part(name, textbook, ours, theirs, variables):
    """(c) for two functions of nothing with the same values, and with gradients for `variables`."""

    def step(function):
        def forwards_and_backwards():
            with tf.GradientTape() as tape:
                tape.watch(variables)
                result = function()
            return result, tape.gradient(result, variables, 2 * result)  # of the sum of squares

        return tf.function(forwards_and_backwards)

    ours, theirs = step(ours), step(theirs)
    np.testing.assert_allclose(ours()[0], theirs()[0], atol=1e-4, err_msg=name)
    compare(f"(c) {name}", ours, textbook, theirs)


def bench_parts(settings):
    network = train.make_prior(settings).network
    first, masked = network.first, next(layer.masked for layer in network.trunk if hasattr(layer, "masked"))
    codes = tf.random.uniform((BATCH, *network.grid), maxval=first.num_embeddings, dtype=tf.int32)
    x = tf.random.normal((BATCH, *network.grid, masked.kernel.shape[1]))
    images, others = tf.random.uniform((2, BATCH, settings.image_size, settings.image_size, 1))

    def plain(layer, inputs):
        """A convolution with the k x k kernel of a masked layer, zeros where it is masked."""
        k, (taps, *channels) = layer.kernel_size, layer.kernel.shape
        kernel = tf.concat([layer.kernel, tf.zeros((k * k - taps, *channels))], axis=0)
        return tf.nn.conv2d(inputs, tf.reshape(kernel, (k, k, *channels)), 1, "SAME") + layer.bias

    # fmt: off
    bench_part("first layer", "7x7 convolution of one-hot codes", lambda: first(codes),
               lambda: plain(first, tf.one_hot(codes, first.num_embeddings)), first.kernel.value)
    bench_part("masked 3x3", "3x3 convolution, masked kernel", lambda: masked(x),
               lambda: plain(masked, x), masked.kernel.value)
    bench_part("SSIM", "tf.image.ssim", lambda: modules.ssim(images, others),
               lambda: tf.image.ssim(images, others, 1.0), others)
    # fmt: on


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices="abc", default="abc", help="parts to run (default: all)")
    parts = parser.parse_args(arguments).only
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text() if info.exists() else "") or [platform.processor()]
    print(f"{names[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    print(modules.set_up_devices())
    print(f"TensorFlow {tf.__version__}, Keras {keras.__version__}; medians of {REPETITIONS} repetitions in turns\n")
    print_row()
    for settings in (PUBLISHED, ORIGINAL):
        bench_sampling(settings, parts)
    if "c" in parts:
        bench_parts(PUBLISHED)


if __name__ == "__main__":
    main()
