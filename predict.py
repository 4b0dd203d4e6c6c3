"""Reconstructs the test slices, draws novel ones, and measures both; or shows what is unexpected in other slices.

    python predict.py --run runs/oasis                   # a novel slice of the level of every test slice
    python predict.py --run runs/oasis --slice 5 20      # novel slices of these two levels in turn
    python predict.py --run runs/oasis --complete        # also completes the lower half of test slices
    python predict.py --run runs/oasis --anomalies mine  # which slices of the folder "mine", and where in them

Into the run directory go reconstructions.png, samples.png, samples.npz and report.json (with
--complete also completions.png). Everything is measured on the whole test split. With --anomalies
none of these is made: anomalies/ gets anomalies.csv, anomalies.npz and a picture of each slice.
"""

import argparse
import csv
import json
import os
import pathlib
import shlex
import sys
import time
import typing

import dataset  # first, for it keeps TensorFlow's start-up log off the screen

# isort: split
import matplotlib
import numpy as np
import scipy.linalg
import tensorflow as tf
from scipy import ndimage
from skimage.metrics import structural_similarity

import modules

matplotlib.use("agg")
from matplotlib import pyplot as plt

COMPONENTS = 64  # principal components of frechet_pca
TIMID = slice(2, 12)  # principal components 3 to 12: differences of whole slices, which a prior draws too timidly
NEIGHBOURS = 20  # training slices, nearest by L2, among which the most similar is looked for
RESAMPLES = 1000  # of the test subjects, for an interval
PICTURED = (3, 8)  # rows and columns of novel slices in samples.png
WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}  # SSIM as in Wang et al. 2004


class Slices(typing.NamedTuple):
    """Slices of the data, or novel ones."""

    images: np.ndarray  # float32 (N, 64, 64) in [0, 1]
    labels: np.ndarray  # slice numbers, int32 (N,); -1 where not known
    codes: np.ndarray  # int32 (N, h, w)


# --------------------------------------------------------------------------------------
# Measures. Images are float32 (N, 64, 64) in [0, 1]
# --------------------------------------------------------------------------------------


def ssim(images, others, **options):
    """Structural similarity of each pair: (N,)."""
    pairs = zip(images, others, strict=True)
    return np.array([structural_similarity(a, b, data_range=1.0, **options) for a, b in pairs])


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair in dB, the peak being 1: (N,)."""
    return -10 * np.log10(np.square(images - others).mean(axis=(1, 2)))


def sharpness(images):
    """Mean gradient magnitude."""
    down, across = np.diff(images, axis=1)[:, :, :-1], np.diff(images, axis=2)[:, :-1]
    return float(np.hypot(down, across).mean())


def principal_components(images):
    """Mean (P,) and the leading principal components (P, COMPONENTS) of the P pixels, the first one first."""
    pixels = images.reshape(len(images), -1)
    mean = pixels.mean(axis=0)
    count = min(COMPONENTS, len(pixels) - 1)
    size = pixels.shape[1]
    covariance = np.cov(pixels.astype(np.float32), rowvar=False, dtype=np.float32)
    return mean, scipy.linalg.eigh(covariance, subset_by_index=[size - count, size - 1])[1][:, ::-1]


def project(images, components):
    """Scores of images in principal components: (N, COMPONENTS)."""
    mean, axes = components
    return (images.reshape(len(images), -1) - mean).astype(np.float64) @ axes


def frechet_distance(scores, others):
    """Frechet distance between the Gaussians fitted to two sets of scores (N, C), (M, C).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Dowson and Landau 1982.
    """
    cov1, cov2 = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (scores, others))
    # tr (C1 C2)^(1/2) by the eigenvalues of C1 C2, which are real and not negative.
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov1 @ cov2).real, 0)).sum()
    return float(np.square(scores.mean(0) - others.mean(0)).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


def resample(subjects, count):
    """Indices of the slices of as many subjects, drawn with replacement, for a bootstrap: a list of `count` arrays."""
    slices_of = [np.flatnonzero(np.array(subjects) == subject) for subject in sorted(set(subjects))]
    draws = np.random.default_rng(0).integers(len(slices_of), size=(count, len(slices_of)))
    return [np.concatenate([slices_of[i] for i in draw]) for draw in draws]


def interval(subjects, statistic):
    """95 % of what a statistic of slices becomes with other subjects: a bootstrap over whole subjects.

    Args:
        subjects: the subject of each slice; None where it is not known.
        statistic: of the indices of slices.

    Returns: [low, high]; None where there are not two subjects.
    """
    if subjects is None or len(set(subjects)) < 2:
        return None
    values = [statistic(chosen) for chosen in resample(subjects, RESAMPLES)]
    return np.percentile(values, [2.5, 97.5]).tolist()


def nearest_training_slices(images, train, label):
    """Index of, and SSIM with, the most similar training slice of each image: (N,), (N,)."""
    flat, train_flat = images.reshape(len(images), -1), train.reshape(len(train), -1)
    distances = np.square(train_flat).sum(axis=1) - 2 * flat @ train_flat.T
    candidates = np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS]
    print(f"comparing {len(images)} {label} with the training slices")
    progress = dataset.progress_bar(len(images), "slice")
    indices, similarities = np.empty(len(images), int), np.empty(len(images))
    for i, image in enumerate(images):
        found = ssim([image] * len(candidates[i]), train[candidates[i]])
        indices[i], similarities[i] = candidates[i][found.argmax()], found.max()
        progress.update(i + 1)
    return indices, similarities


def histogram_entropy(codes, num_embeddings):
    """Entropy in nats of the histogram of codes."""
    counts = np.bincount(codes.ravel(), minlength=num_embeddings)
    frequencies = counts[counts > 0] / codes.size
    return float(-np.sum(frequencies * np.log(frequencies)))


def nats_of_slices(pixelcnn, codes, labels):
    """Mean negative log-likelihood of the codes of each slice under the prior, exact and not a bound: (N,), nats."""
    return dataset.in_batches(pixelcnn.nll, codes, labels).mean(axis=(1, 2), dtype=np.float64)


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


def with_interval(name, values, subjects):
    """The mean of a measure of slices, and its interval, as two entries of the report."""
    return {name: values.mean(), f"{name}_interval": interval(subjects, lambda chosen: values[chosen].mean())}


def measure_reconstructions(test, reconstructed, subjects):
    similarity = ssim(test, reconstructed)
    return {
        "split": "test",
        "images": len(test),
        **with_interval("ssim_mean", similarity, subjects),
        "ssim_std": similarity.std(),
        "ssim_min": similarity.min(),
        **with_interval("ssim_gaussian_mean", ssim(test, reconstructed, **WANG), subjects),
        **with_interval("psnr_mean", psnr(test, reconstructed), subjects),
        "sharpness_ratio": sharpness(reconstructed) / sharpness(test),
    }


def measure_codebook(num_embeddings, test_codes, train_codes):
    return {
        "grid": list(test_codes.shape[1:]),
        "num_embeddings": num_embeddings,
        "used": len(np.unique(test_codes)),
        "perplexity": np.exp(histogram_entropy(test_codes, num_embeddings)),
        "bits_per_image": test_codes[0].size * np.log2(num_embeddings),
        "train_used": len(np.unique(train_codes)),
        "train_perplexity": np.exp(histogram_entropy(train_codes, num_embeddings)),
    }


def measure_prior(pixelcnn, test, train, subjects):
    nats, positions = nats_of_slices(pixelcnn, test.codes, test.labels), test.codes[0].size
    histogram = histogram_entropy(test.codes, pixelcnn.num_embeddings)
    return {
        "split": "test",
        **with_interval("nats_per_code", nats, subjects),
        "bits_per_code": nats.mean() / np.log(2),
        "bits_per_image": nats.mean() / np.log(2) * positions,
        # What the codes cost without a prior that looks at other codes, and what those it was fitted on cost.
        "histogram_bits_per_image": histogram / np.log(2) * positions,
        "train_nats_per_code": nats_of_slices(pixelcnn, train.codes, train.labels).mean(),
    }


def draw_of_labels(pool, labels, seed):
    """As many indices into a pool of labels, at random, each of the label that is asked for where there is one."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(pool))
    chosen = np.empty(len(labels), int)
    for label in np.unique(labels):
        asked = np.flatnonzero(labels == label)
        having = order[pool[order] == label]
        chosen[asked] = np.resize(having if label >= 0 and len(having) else order, len(asked))
    return chosen


def level_error(asked, found):
    """Mean distance of slice numbers, where both are known; None where they never are."""
    both = (asked >= 0) & (found >= 0)
    return np.abs(asked - found)[both].mean() if both.any() else None


def measure_samples(novel, test, reconstructed, train, mirror, seed):
    """The measures of novel slices; the nearest training slice of each, which may be mirrored, and their SSIM.

    Args:
        novel, test, train: `Slices`.
        reconstructed: images of the test slices.
        mirror: whether the models were shown mirrored training slices too.
    """
    components = principal_components(train.images)
    of_novel, of_test, of_train = (project(slices.images, components) for slices in (novel, test, train))
    as_many = of_train[draw_of_labels(train.labels, novel.labels, seed)]

    variants = dataset.shown_variants(train.images, mirror)
    shown, levels = np.concatenate(variants), np.tile(train.labels, len(variants))
    near_novel, novel_ssim = nearest_training_slices(novel.images, shown, "novel slices")
    near_reconstructed, reconstructed_ssim = nearest_training_slices(
        reconstructed, shown, "reconstructions of test slices"
    )
    near_test, test_ssim = nearest_training_slices(test.images, shown, "test slices")
    measures = {
        "frechet_pca": frechet_distance(of_novel, of_test),
        "frechet_pca_floor": frechet_distance(as_many, of_test),
        "sharpness_ratio": sharpness(novel.images) / sharpness(test.images),
        "nearest_train_ssim_mean": novel_ssim.mean(),
        "nearest_train_ssim_max": novel_ssim.max(),
        "reconstruction_nearest_train_ssim_mean": reconstructed_ssim.mean(),
        "test_nearest_train_ssim_mean": test_ssim.mean(),
        "test_nearest_train_ssim_max": test_ssim.max(),
        "level_error": level_error(novel.labels, levels[near_novel]),
        "reconstruction_level_error": level_error(test.labels, levels[near_reconstructed]),
        "test_level_error": level_error(test.labels, levels[near_test]),
        "component_variance_ratio": of_novel.var(0)[TIMID].mean() / of_train.var(0)[TIMID].mean(),
    }
    return measures, shown[near_novel], novel_ssim


# --------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------


def show(axis, image, caption="", **options):
    axis.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel(caption, fontsize=8)


def save(figure, path):
    figure.tight_layout()
    dataset.write_whole(path, lambda temporary: figure.savefig(temporary, dpi=85))
    plt.close(figure)


def evenly(count, total):
    """`count` indices spread over range(total), chosen by nothing but their place."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def draw_reconstructions(path, test, reconstructed, num_embeddings, kind):
    chosen = evenly(8, len(test.images))
    figure, axes = plt.subplots(3, len(chosen), figsize=(1.5 * len(chosen), 5.2), squeeze=False)
    for axis, i in zip(axes.T, chosen):
        show(axis[0], test.images[i])
        show(axis[1], reconstructed[i], f"SSIM {ssim(test.images[i : i + 1], reconstructed[i : i + 1])[0]:.3f}")
        show(axis[2], test.codes[i], cmap="nipy_spectral", vmax=num_embeddings - 1)
    for axis, label in zip(axes[:, 0], (f"test {kind}", "reconstruction", "codes")):
        axis.set_ylabel(label)
    figure.suptitle(f"{len(chosen)} of {len(test.images)} test {kind}s, evenly spaced, not selected", fontsize=10)
    save(figure, path)


def pictured(labels):
    """Which samples are shown, (rows, columns): levels in order, evenly spaced, and the first draws of each."""
    rows, columns = PICTURED
    levels = np.unique(labels)
    of_level = [np.flatnonzero(labels == level)[:rows] for level in levels[evenly(columns, len(levels))]]
    if len(of_level) == columns and all(len(draws) == rows for draws in of_level):
        return np.stack(of_level, axis=1)
    first = np.argsort(labels[: rows * columns], kind="stable")
    columns = min(columns, len(first))
    return first[: len(first) // columns * columns].reshape(-1, columns)


def draw_samples(path, novel, nearest, similarity, caption):
    """Rows of novel slices, and under each the nearest training slice."""
    chosen = pictured(novel.labels)
    rows, columns = chosen.shape
    figure, axes = plt.subplots(2 * rows, columns, figsize=(1.15 * columns, 2.7 * rows + 0.5), squeeze=False)
    for (row, column), i in np.ndenumerate(chosen):
        show(axes[2 * row, column], novel.images[i], f"slice {novel.labels[i]}" if novel.labels[i] >= 0 else "")
        show(axes[2 * row + 1, column], nearest[i], f"SSIM {similarity[i]:.2f}")
    for row in range(rows):
        axes[2 * row, 0].set_ylabel("novel", fontsize=9)
        axes[2 * row + 1, 0].set_ylabel("nearest in train", fontsize=9)
    figure.suptitle(caption, fontsize=10)
    save(figure, path)


def draw_completions(path, vqvae, pixelcnn, test, seed, temperature, kind):
    """Keep the codes of the upper half of test slices and draw the rest, three times."""
    chosen, draws = evenly(8, len(test.images)), 3
    known = np.repeat(test.codes[chosen], draws, axis=0)
    known[:, known.shape[1] // 2 :] = -1
    drawn = pixelcnn.sample(len(known), seed, temperature, known=known, labels=np.repeat(test.labels[chosen], draws))
    completed = dataset.images_of(vqvae, drawn)
    completed = completed.reshape(len(chosen), draws, *test.images.shape[1:])
    figure, axes = plt.subplots(1 + draws, len(chosen), figsize=(1.5 * len(chosen), 6.6), squeeze=False)
    for axis, original, drawn in zip(axes.T, test.images[chosen], completed):
        show(axis[0], original)
        for below, image in zip(axis[1:], drawn):
            show(below, image)
            below.axhline(test.images.shape[1] / 2 - 0.5, color="tab:orange", linewidth=0.8)
    axes[0, 0].set_ylabel(f"test {kind}")
    for axis in axes[1:, 0]:
        axis.set_ylabel("lower half drawn")
    figure.suptitle(
        f"Codes above the line kept, those below drawn: seed {seed}, temperature {temperature}", fontsize=10
    )
    save(figure, path)


# --------------------------------------------------------------------------------------
# Anomalies
# --------------------------------------------------------------------------------------

REDRAWN = 90  # percentile of the validation slices' nats above which a code is redrawn
SCORED = 98  # and above which it counts in the score of its slice
SMOOTHING = 2  # pixels, standard deviation of the Gaussian that smooths each term of the map
SPREAD_FLOOR = 0.1  # least standard deviation of a z-score, in [0, 1] of the pixels: registration is no better
PERCENTILES = np.array([*range(100), 99.8])  # of a term; above the last its distribution is taken for exponential
CALIBRATING = 128  # validation slices, evenly spaced, whose maps say what is normal
# Slices at once: always as many, so that no number of a slice depends on the others, not even by rounding.
EXAMINED = 16


def upsample(maps):
    """Bilinear: (N, h, w) -> (N, 64, 64)."""
    return tf.image.resize(maps[..., None], (dataset.IMAGE_SIZE, dataset.IMAGE_SIZE)).numpy()[..., 0]


def smooth(maps):
    """Gaussian: (N, 64, 64) -> the same."""
    return ndimage.gaussian_filter(maps, (0, SMOOTHING, SMOOTHING))


class AnomalyDetector:
    """How unexpected each code and each pixel of a slice is.

    Score and restorations are those of Naval Marimont and Tarroni, arXiv 2012.06765, but that the codes to draw
    anew are chosen at once and not in the raster loop, given those already restored: measured, that was better.

    Four terms are strong on different changes; each is smoothed:
        surprise: -ln p of the codes. Sees grey values in the wrong place, is blind to what no code expresses.
        residual: of the plain reconstruction. Sees texture that no code expresses, and little else.
        level: z-score of the pixels among the training slices of the same number.
        restoration: z-score of the pixels among restorations, where surprising codes are drawn anew.

    To be combined they need one unit: of each the map takes -ln p, p being the share of the validation slices'
    pixels in which the term is higher, and of these the root of the sum of squares. (Their plain sum is Fisher's
    statistic for independent tests, and hides what one term alone sees; their largest forgoes what several see a
    little. It ranks pixels, and is no probability.) All thresholds and distributions are those of the validation
    slices, so nothing is tuned to a run.

    Args:
        vqvae, pixelcnn: the models.
        train, validate: pairs of images (N, 64, 64) in [0, 1] and labels int32 (N,), -1 where not known.
        mirror: whether the prior has seen mirrored slices; then surprise is the mean of both raster orders.
        restorations: R, draws of each slice.
        seed: int.
    """

    def __init__(self, vqvae, pixelcnn, train, validate, mirror, restorations, seed):
        self.vqvae, self.pixelcnn = vqvae, pixelcnn
        self.mirror, self.restorations, self.seed = mirror, restorations, seed
        self.measure_levels(*train)
        images, labels = validate
        nats = self.surprise(images, labels)
        self.redraw_above, self.score_above = np.percentile(nats, [REDRAWN, SCORED])
        self.scores = self.score(nats)
        chosen = evenly(CALIBRATING, len(images))
        terms = self.examine(images[chosen], labels[chosen])["terms"]
        self.tails = {name: self.measure_tail(values) for name, values in terms.items()}

    def measure_levels(self, images, labels):
        """Mean and standard deviation of the pixels at each label; those of all slices come last, for -1."""
        levels = [images[labels == label] for label in range(self.pixelcnn.num_labels)]
        levels = [level if len(level) else images for level in levels] + [images]
        self.mean = np.stack([level.mean(axis=0) for level in levels])
        self.spread = np.maximum([level.std(axis=0) for level in levels], SPREAD_FLOOR)

    def surprise(self, images, labels):
        """-ln p of each code given the earlier ones and the label: (N, h, w), nats."""
        parts = [self.nats(self.vqvae.encode(batch), of)[:count] for batch, of, count in fixed_batches(images, labels)]
        return np.concatenate(parts)

    def nats(self, codes, labels):
        return self.pixelcnn.nll(codes, tf.constant(labels)).numpy()

    def score(self, surprise):
        """Sum of the surprise of the codes that are beyond the validation slices' percentile: (N, h, w) -> (N,)."""
        return np.where(surprise > self.score_above, surprise, 0).sum(axis=(1, 2), dtype=np.float64)

    def percentile(self, scores):
        """Percentage of the validation slices that score lower: (N,) -> (N,)."""
        return 100 * np.searchsorted(np.sort(self.scores), scores) / len(self.scores)

    def restore(self, codes, nats, labels):
        """Restorations of each slice, in which codes above the threshold are drawn anew: (N, R, 64, 64) in [0, 1].

        Draw r of every slice has the same random numbers, whichever slices are examined with it.
        """
        count = len(codes)
        known = np.repeat(np.where(nats > self.redraw_above, -1, codes), self.restorations, axis=0)
        streams = np.tile(np.arange(self.restorations), count)
        labels = np.repeat(labels, self.restorations)
        restored = self.vqvae.decode(self.pixelcnn.restore(known, labels, np.inf, streams, self.seed))
        return restored.numpy().reshape(count, self.restorations, dataset.IMAGE_SIZE, dataset.IMAGE_SIZE)

    def examine(self, images, labels):
        """What the maps are made of.

        Args:
            images: (N, 64, 64) in [0, 1].
            labels: int32 (N,), -1 where not known.

        Returns: {"surprise": (N, h, w) in nats, "restored": the mean of the restorations (N, 64, 64),
            "terms": {name: (N, 64, 64)}}.
        """
        progress = dataset.progress_bar(len(images), "slice")
        batches, done = [], 0
        for batch, of, count in fixed_batches(images, labels):
            found = self.examine_batch(batch[..., 0], of)
            batches.append(tf.nest.map_structure(lambda values, count=count: values[:count], found))
            done += count
            progress.update(done)
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)

    def examine_batch(self, images, labels):
        codes = self.vqvae.encode(images[..., None])
        reconstructed = self.vqvae.decode(codes).numpy()[..., 0]
        nats = both = self.nats(codes, labels)
        if self.mirror:  # what comes last in one order comes first in the other
            turned = self.vqvae.encode(dataset.mirrored(images)[..., None])
            both = (nats + dataset.mirrored(self.nats(turned, labels))) / 2
        restored = self.restore(codes.numpy(), nats, labels)
        mean, spread = restored.mean(axis=1), restored.std(axis=1)
        terms = {
            "surprise": upsample(both),
            "residual": np.abs(images - reconstructed),
            "level": np.abs(images - self.mean[labels]) / self.spread[labels],
            "restoration": np.abs(images - mean) / (spread + SPREAD_FLOOR),
        }
        return {"surprise": nats, "restored": mean, "terms": {name: smooth(term) for name, term in terms.items()}}

    @staticmethod
    def measure_tail(values):
        """PERCENTILES of a term of the validation slices, and the mean excess over the last of those above it."""
        percentiles = np.percentile(values, PERCENTILES)
        beyond = values[values > percentiles[-1]] - percentiles[-1]
        return percentiles, max(beyond.mean() if len(beyond) else 0.0, 1e-6)

    def anomaly_map(self, terms):
        """Root of the sum of the squared -ln p of the terms: {name: (N, 64, 64)} -> (N, 64, 64), at least 0."""
        squares = 0
        for name, values in terms.items():
            percentiles, excess = self.tails[name]
            body = np.interp(values, percentiles, -np.log(1 - PERCENTILES / 100))
            squares += np.square(body + np.maximum(values - percentiles[-1], 0) / excess)
        return np.sqrt(squares).astype(np.float32)


def fixed_batches(images, labels):
    """Batches of EXAMINED slices (EXAMINED, 64, 64, 1), their labels, and how many of them are not padding."""
    for start in range(0, len(images), EXAMINED):
        batch, of = images[start : start + EXAMINED], labels[start : start + EXAMINED]
        padding = EXAMINED - len(batch)
        padded = np.pad(batch, [[0, padding], [0, 0], [0, 0]])
        yield padded[..., None], np.pad(of, [0, padding], constant_values=-1), len(batch)


def numbers_of(names, options, num_labels):
    """The label of each file: from its name, else --slice, else -1; -1 too for a number that the run does not know."""
    numbers = [dataset.slice_number(name) for name in names]
    fallback = asked_labels(options, num_labels, [-1])[0]
    labels = np.array([fallback if number is None else number for number in numbers])
    unknown = labels >= num_labels
    if unknown.any():
        knows = f"0 to {num_labels - 1}" if num_labels else "none"
        print(
            f"note: the slice numbers of {unknown.sum()} names are not among those of this run ({knows}): "
            "these slices are examined as of a number that is not known"
        )
    return np.where(unknown, -1, labels).astype(np.int32)


def picture_names(names):
    """NAME.png of each file NAME.xyz; NAME.xyz.png where two files would share it."""
    stems = [pathlib.Path(name).stem for name in names]
    shared = {stem for stem in stems if stems.count(stem) > 1}
    return [f"{name if stem in shared else stem}.png" for name, stem in zip(names, stems)]


def draw_anomalies(folder, found, captions):
    """A picture of each slice: input, surprise, mean restoration, anomaly map, on one scale for the whole folder."""
    kinds = {
        "input": (found["images"], "gray", 1),
        "surprise, nats": (found["surprise"], "inferno", found["surprise"].max()),
        "mean restoration": (found["restored"], "gray", 1),
        "anomaly map": (found["anomaly_map"], "inferno", found["anomaly_map"].max()),
    }
    figure, axes = plt.subplots(1, len(kinds), figsize=(9.6, 2.7), layout="constrained", dpi=85)
    shown = []
    for axis, (title, (values, cmap, highest)) in zip(axes, kinds.items()):
        show(axis, values[0], cmap=cmap, vmax=highest)
        axis.set_title(title, fontsize=9)
        shown.append(axis.images[0])
        if cmap != "gray":
            figure.colorbar(shown[-1], ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
    heading = figure.suptitle(captions[0], fontsize=9, parse_math=False)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    heading.set_visible(False)
    figure.canvas.draw()
    heading.set_visible(True)
    # The frame is drawn once and only the maps and the heading anew: a third of the time.
    frame = figure.canvas.copy_from_bbox(figure.bbox)
    print(f"drawing {len(captions)} pictures")
    progress = dataset.progress_bar(len(captions), "picture")
    for i, name in enumerate(picture_names(found["names"])):
        figure.canvas.restore_region(frame)
        for axis, image, (values, *_) in zip(axes, shown, kinds.values()):
            image.set_data(values[i])
            axis.draw_artist(image)
        heading.set_text(captions[i])
        figure.draw_artist(heading)
        pixels = np.asarray(figure.canvas.buffer_rgba())
        dataset.write_whole(folder / name, lambda temporary, pixels=pixels: plt.imsave(temporary, pixels, format="png"))
        progress.update(i + 1)
    plt.close(figure)


def detectors(options, config, vqvae, pixelcnn):
    """A function that gives the `AnomalyDetector` for slices whose number is known, or is not."""
    folder = options.data or config["data"]["folder"]
    splits = dataset.load(folder, ("train", "validate"))
    if others := other_splits(dataset.fingerprint(splits), config):
        print(f"note: other {', '.join(others)} slices than those of the training")
    images = {name: split.images.astype(np.float32) / 255 for name, split in splits.items()}
    labels = {name: dataset.known_labels(split, pixelcnn.num_labels) for name, split in splits.items()}

    def detector(known):
        print(f"examining validation slices, to know what is normal{'' if known else ' without a number'}")
        # A slice is compared with validation slices of which the prior is told as much.
        validate = images["validate"], labels["validate"] if known else np.full_like(labels["validate"], -1)
        train = images["train"], labels["train"]
        mirror = config["settings"]["mirror"]
        return AnomalyDetector(vqvae, pixelcnn, train, validate, mirror, options.restorations, options.seed)

    return detector


def find_anomalies(options):
    print(modules.set_up_devices())
    run, folder = pathlib.Path(options.run), pathlib.Path(options.anomalies)
    config, vqvae, pixelcnn = load_run(run)
    if not folder.is_dir():
        raise dataset.UserError(f"--anomalies {folder}: no such folder; name one with PNG or JPEG slices in it")
    results = run / "anomalies"
    if folder.resolve() == results.resolve():
        raise dataset.UserError(f"--anomalies {folder}: the pictures would overwrite the slices; name another folder")
    paths = dataset.list_slices(folder, "put some there, or name another folder")
    names = [path.name for path in paths]
    labels = numbers_of(names, options, pixelcnn.num_labels)
    images = dataset.read_images(paths, "anomalies").astype(np.float32) / 255

    detector = detectors(options, config, vqvae, pixelcnn)
    parts, order = [], []
    for known in (True, False):
        chosen = np.flatnonzero((labels >= 0) == known)
        if not len(chosen):
            continue
        normal = detector(known)
        print(f"examining {len(chosen)} slices")
        found = normal.examine(images[chosen], labels[chosen])
        found["anomaly_map"] = normal.anomaly_map(found.pop("terms"))
        found["score"] = normal.score(found["surprise"])
        found["percentile"] = normal.percentile(found["score"])
        parts.append(found)
        order.extend(chosen)
    back = np.argsort(order)
    found = {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}
    found = {"names": np.array(names), "images": images, "labels": labels, **found}
    save_anomalies(results, found)
    kind = "phantom" if config["data"]["phantom"] else "slice"
    captions = [f"{name}: score {found['score'][i]:.1f}, above {found['percentile'][i]:.0f} % of the validation {kind}s"
                for i, name in enumerate(names)]  # fmt: skip
    draw_anomalies(results, found, [os.fsencode(caption).decode("utf-8", "replace") for caption in captions])


def save_anomalies(folder, found):
    """anomalies.npz, in the order of the folder, and anomalies.csv, the most surprising first."""
    with dataset.told_if_it_fails(folder):
        folder.mkdir(exist_ok=True)
    arrays = {name: values for name, values in found.items() if name != "percentile"}

    def save_arrays(path):
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    rows = []
    for i in np.argsort(-found["score"], kind="stable"):
        rows.append(
            [found["names"][i], found["labels"][i], f"{found['score'][i]:.4f}", f"{found['percentile'][i]:.1f}"]
        )

    def save_table(path):
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([["name", "slice", "score", "percentile"], *rows])

    dataset.write_whole(folder / "anomalies.npz", save_arrays)
    dataset.write_whole(folder / "anomalies.csv", save_table)
    print(f"{folder / 'anomalies.csv'}: of {len(rows)} slices the most surprising are")
    for name, _, score, percentile in rows[:5]:
        print(f"  {score:>9}, above {percentile:>5} % of the validation slices: {ascii(str(name))[1:-1]}")


# --------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", help="folder of the slices (default: where the run was trained)")
    parser.add_argument("--run", default="runs/oasis", help="folder that train.py filled (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, metavar="N", help="default: the number of test slices")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="1 samples the model itself")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: %(default)s)")
    parser.add_argument(
        "--slice",
        type=int,
        nargs="+",
        metavar="N",
        help="levels to draw, in turn (default: the test's); of --anomalies the one where names tell none",
    )
    parser.add_argument("--complete", action="store_true", help="draw the lower half of test slices, given the upper")
    parser.add_argument("--anomalies", metavar="FOLDER", help="show what is unexpected in the slices of this folder")
    parser.add_argument("--restorations", type=int, metavar="N", help="draws of each of them (default: 8)")
    options = parser.parse_args(arguments)
    if options.anomalies is None:
        if options.restorations is not None:
            parser.error("--restorations is for --anomalies")
    elif options.complete or options.num_samples is not None or options.temperature != 1:
        parser.error("--anomalies draws no novel slices: leave out --complete, --num-samples and --temperature")
    elif options.slice and len(options.slice) > 1:
        parser.error("--slice with --anomalies is one number, that of all slices whose names have none")
    if options.restorations is None:
        options.restorations = 8
    if not 1 <= options.restorations <= 100:
        parser.error(f"--restorations must be from 1 to 100, not {options.restorations}")
    if options.num_samples is not None and options.num_samples < 2:
        parser.error(f"--num-samples must be at least 2, not {options.num_samples}")
    if not 0.01 <= options.temperature <= 100:
        parser.error(f"--temperature must be from 0.01 to 100, not {options.temperature}")
    if options.slice and min(options.slice) < 0:
        parser.error(f"--slice must be at least 0, not {min(options.slice)}")
    if not 0 <= options.seed < 2**31:
        parser.error(f"--seed must be from 0 to {2**31 - 1}, not {options.seed}")
    return options


def load_run(run):
    """config.json of a finished run, its VQ-VAE and its PixelCNN."""
    quoted = shlex.quote(str(run))
    config = dataset.read_config(run)
    if config is None:
        raise dataset.UserError(f"--run {run}: no run here; first python train.py --run {quoted}")
    models = []
    for name in ("vqvae", "pixelcnn"):
        path = run / f"{name}.keras"
        if name not in config["finished"]:
            raise dataset.UserError(
                f"--run {run}: {name} has not finished training; give the same train.py command again"
            )
        if not path.exists():
            raise dataset.UserError(f"{path} is missing: restore it, or train again in another --run")
        models.append(dataset.load_model(path, "train again in another --run", compile=False))
        if dataset.file_checksum(path) != config["finished"][name]:
            raise dataset.UserError(f"{path} is not the model that this run was finished with: restore it")
    return config, *models


def other_splits(found, config):
    """The splits of a fingerprint that are not those the run was trained with."""
    return [name for name in found if found[name] != config["data"].get(name)]


def load_data(options, config):
    """The splits, and what report.json says of them."""
    folder = options.data or config["data"]["folder"]
    splits = dataset.load(folder)
    for name in ("train", "test"):
        if len(splits[name].images) < 2:  # one has no covariance
            raise dataset.UserError(f"keras_png_slices_{name} has 1 slice, the measures need at least 2: add some")
    found = dataset.fingerprint(splits)
    others = other_splits(found, config)
    if others:
        print(f"note: other {', '.join(others)} slices than those of the training; report.json says so")
    return splits, {
        "folder": str(pathlib.Path(folder).resolve()),
        **{f"{name}_images": found[name]["images"] for name in splits},
        "test_subjects": found["test"]["subjects"],
        "phantom": config["data"]["phantom"],
        "sha256": {name: found[name]["sha256"] for name in splits},
        "as_trained": not others,
    }


def asked_labels(options, num_labels, otherwise):
    """The labels of --slice, after a look whether this run knows them; `otherwise` without."""
    if options.slice and not num_labels:
        raise dataset.UserError("--slice: this run knows no slice numbers, its files were not named case_N_slice_M")
    if options.slice and max(options.slice) >= num_labels:
        raise dataset.UserError(f"--slice must be from 0 to {num_labels - 1} in this run, not {max(options.slice)}")
    return options.slice or otherwise


def predict(options):
    print(modules.set_up_devices())
    run = pathlib.Path(options.run)
    config, vqvae, pixelcnn = load_run(run)
    splits, data = load_data(options, config)
    kind = "phantom" if data["phantom"] else "slice"
    subjects = splits["test"].subjects

    print("encoding and reconstructing")
    train, test = (encode_split(splits[name], vqvae, pixelcnn.num_labels) for name in ("train", "test"))
    reconstructed = dataset.images_of(vqvae, test.codes)
    novel, seconds = draw_novel(vqvae, pixelcnn, test.labels, options, kind)
    measures, nearest, similarity = measure_samples(
        novel, test, reconstructed, train, config["settings"]["mirror"], options.seed
    )
    report = {
        "data": data,
        "reconstruction": measure_reconstructions(test.images, reconstructed, subjects),
        "codebook": measure_codebook(pixelcnn.num_embeddings, test.codes, train.codes),
        "prior": measure_prior(pixelcnn, test, train, subjects),
        "samples": {
            "count": len(novel.labels),
            "seed": options.seed,
            "temperature": options.temperature,
            "slices": options.slice,  # None: those of the test slices
            "seconds": seconds,
            **measures,
        },
    }

    draw_reconstructions(run / "reconstructions.png", test, reconstructed, pixelcnn.num_embeddings, kind)
    caption = (
        f"Novel {kind}s, not selected: {pictured(novel.labels).size} of {len(novel.labels)}, seed {options.seed}, "
        f"temperature {options.temperature}. Under each its nearest training {kind} and their SSIM"
    )
    draw_samples(run / "samples.png", novel, nearest, similarity, caption)
    if options.complete:
        draw_completions(run / "completions.png", vqvae, pixelcnn, test, options.seed, options.temperature, kind)

    def save_samples(path):
        with open(path, "wb") as file:
            np.savez_compressed(file, **novel._asdict())

    dataset.write_whole(run / "samples.npz", save_samples)
    dataset.write_json(run / "report.json", report)
    print(json.dumps(report, indent=2, default=float))
    print(f"done: the pictures and report.json are in {run}")


def encode_split(split, vqvae, num_labels):
    images = split.images.astype(np.float32) / 255
    return Slices(images, dataset.known_labels(split, num_labels), dataset.codes_of(vqvae, images))


def draw_novel(vqvae, pixelcnn, test_labels, options, kind):
    """The novel slices that are asked for, of the levels of --slice or of the test slices, and the seconds it took."""
    labels = asked_labels(options, pixelcnn.num_labels, test_labels)
    labels = np.resize(labels, options.num_samples or len(test_labels)).astype(np.int32)
    print(f"sampling {len(labels)} novel {kind}s")
    started = time.time()
    codes = pixelcnn.sample(len(labels), options.seed, options.temperature, labels=labels).numpy()
    novel = Slices(dataset.images_of(vqvae, codes), labels, codes)
    return novel, time.time() - started


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        (predict if options.anomalies is None else find_anomalies)(options)
    except dataset.UserError as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("predict.py: stopped; the same command starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
