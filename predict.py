"""Reconstructs the test slices, draws novel ones, and measures both; or shows what is unexpected in other slices.

    python predict.py --run runs/oasis                   # a novel slice for the slice number of every test slice
    python predict.py --run runs/oasis --slice 5 20      # novel slices of these two slice numbers in turn
    python predict.py --run runs/oasis --complete        # also completes the lower half of test slices
    python predict.py --run runs/oasis --heads 20        # also draws whole heads, slice by slice
    python predict.py --run runs/oasis --anomalies mine  # which slices of the folder "mine" are unusual, and where

Into the run directory go reconstructions.png, samples.png, samples.npz and report.json (with --complete
also completions.png, with --heads heads.png and heads.npz). Everything is measured on the whole test split.
With --anomalies none of these is made: anomalies/ gets anomalies.csv, anomalies.npz and a picture of each slice.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import shutil
import sys
import time

import dataset
import modules
from train import Run, quote

import numpy as np
import tensorflow as tf
from matplotlib import cm, colormaps, colors, font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage, stats
from skimage.metrics import structural_similarity
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

COMPONENTS = slice(2, 12)  # principal components 3 to 12: how slices of one slice number differ as wholes
CUTS = {1: ("sagittal", "coronal"), 2: ("coronal", "sagittal"), None: ("middle row", "middle column")}  # by mirror axis
NEIGHBOURS = 20  # training slices, nearest by L2, among which the most similar is looked for
WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}  # SSIM as in Wang et al. 2004
WRITTEN = ("reconstructions.png", "samples.png", "samples.npz", "completions.png", "heads.png", "heads.npz")

# ---- Measures. Images are float32 (N, H, W) in [0, 1] --------------------------------


def ssim(images, others, **options):
    """Structural similarity of each pair: (N,)."""
    pairs = zip(images, others, strict=True)
    return np.array([structural_similarity(a, b, data_range=1.0, **options) for a, b in pairs])


def pixels_of_head(image, above=1 / 16):
    """Which pixels of a slice are of the head: brighter than the background, or enclosed by such: bool (H, W)."""
    return ndimage.binary_fill_holes(image > above)


def ssim_inside(images, others):
    """`ssim`, averaged over the pixels of the head in `images` alone: (N,); NaN for a slice that has none."""
    means = []
    for image, other in zip(images, others, strict=True):
        similarity = structural_similarity(image, other, data_range=1.0, full=True)[1][pixels_of_head(image)]
        means.append(similarity.mean() if similarity.size else np.nan)
    return np.array(means)


def sharpness(images):
    """Mean gradient magnitude."""
    down, across = np.diff(images, axis=1)[:, :, :-1], np.diff(images, axis=2)[:, :-1]
    return float(np.hypot(down, across).mean())


def ratio(value, unit):
    """value / unit; NaN, which is null in the report, where there is nothing to compare with."""
    return value / unit if unit > 0 else np.nan


def draw_alike(pool, labels, seed=0):
    """As many indices into a pool of labels, at random, each of the label that is asked for if there is one."""
    order, chosen = np.random.default_rng(seed).permutation(len(pool)), np.empty(len(labels), int)
    for label in np.unique(labels):
        asked, having = labels == label, order[pool[order] == label]
        chosen[asked] = np.resize(having if label >= 0 and len(having) else order, asked.sum())
    return chosen


# ---- Intervals -----------------------------------------------------------------------


def interval(statistic, *samples, resamples=1000):
    """The 95 % bootstrap interval of a statistic: [low, high]; None where it is not defined.

    Args: statistic, a function of the samples; samples, (N, ...) each, N above 1, resampled along the first axis.
    """
    if min(map(len, samples)) < 2:
        return None
    rng = np.random.default_rng(0)
    draws = [statistic(*(rng.choice(sample, len(sample)) for sample in samples)) for _ in range(resamples)]
    with np.errstate(invalid="ignore"):  # infinite ones
        limits = np.percentile(draws, [2.5, 97.5], axis=0)
    return limits.tolist() if np.isfinite(limits).all() else None


def with_interval(name, statistic, *samples):
    """A statistic of samples and its interval, as two entries of the report."""
    return {name: statistic(*samples), f"{name}_interval": interval(statistic, *samples)}


def by_subject(values, subjects):
    """Sum and number of the values of each subject, numbered from 0: (N,), (N,) -> (subjects, 2). NaN do not count."""
    counted = ~np.isnan(values)
    return np.stack([np.bincount(subjects, np.where(counted, values, 0)), np.bincount(subjects, counted)], axis=1)


def mean(sums):
    """The mean of all values, given those of `by_subject`."""
    return ratio(sums[:, 0].sum(), sums[:, 1].sum())


def membership_auroc(test, train):
    """Probability that a training subject's mean is lower than a test subject's, given `by_subject` of 2 or more."""
    if min(len(test), len(train)) < 2:
        return np.nan
    means = np.concatenate([sums[:, 0] / sums[:, 1] for sums in (test, train)])
    return roc_auc_score(np.repeat([1, 0], [len(test), len(train)]), means)


# ---- The report ----------------------------------------------------------------------


@dataclasses.dataclass
class Coded:
    """Slices and their codes."""

    images: np.ndarray  # float32 (N, H, W) in [0, 1]
    labels: np.ndarray  # int32 (N,); -1 where not known
    codes: np.ndarray  # int32 (N, h, w)
    cases: np.ndarray  # numbers of the subjects, (N,); -1 where not known

    @property
    def subjects(self):
        """Number of the subject of each slice, from 0: int (N,); all are 0 where one is not known."""
        return np.unique(self.cases if self.cases.min() >= 0 else 0 * self.cases, return_inverse=True)[1]


class Evaluation:
    """What the report is made of, and a method for each group of its entries.

    Args:
        vqvae, prior: the models of a run.
        train, test: `dataset.Slices`.
        mirror_axis: along which the models were fitted on mirrored slices too, or None.
    """

    def __init__(self, vqvae, prior, train, test, mirror_axis):
        self.prior, self.mirror_axis = prior, mirror_axis
        self.train, self.test = (self.encode(vqvae, split) for split in (train, test))
        self.reconstructed = decode(vqvae, self.test.codes)
        self.entropy = stats.entropy(np.bincount(self.test.codes.ravel()))  # of the histogram of the test codes, nats
        variants = dataset.with_mirrored(self.train.images, mirror_axis)
        self.seen, self.seen_labels = np.concatenate(variants), np.tile(self.train.labels, len(variants))
        self.neighbours = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(self.seen)), algorithm="brute")
        self.neighbours.fit(self.seen.reshape(len(self.seen), -1))
        count = min(COMPONENTS.stop, len(self.train.images) - 1)
        self.components = PCA(count, svd_solver="arpack" if count else "full", random_state=0)  # exact, and fast
        self.components.fit(self.train.images.reshape(len(self.train.images), -1))

    def encode(self, vqvae, split):
        codes, labels = vqvae.encode(split.images, verbose=True), self.prior.labels_of(split.slice_numbers)
        return Coded(dataset.to_float(split.images)[..., 0], labels, codes, split.cases)

    def nearest(self, images, what):
        """Index among `seen` of the most similar training slice of each image, and their SSIM: (N,), (N,)."""
        print(f"comparing {len(images)} {what} with the training slices")
        candidates = self.neighbours.kneighbors(images.reshape(len(images), -1), return_distance=False)
        found = []
        for near, image in zip(dataset.progress(candidates, "slice"), images):
            similarity = ssim([image] * len(near), self.seen[near])
            found.append((near[similarity.argmax()], similarity.max()))
        indices, similarities = zip(*found)
        return np.array(indices), np.array(similarities)

    def variance_ratios(self, novel, labels):
        """Variance of novel slices in COMPONENTS over that of training slices of the same labels; of test slices too.

        Args: images (N, M, H, W), of which a bootstrap takes M together; labels (N * M,).
        """
        every = np.repeat(labels, max(1, len(self.train.images) // len(labels)))  # the labels in proportion

        def coordinates(images):
            return self.components.transform(images.reshape(len(images), -1))[:, COMPONENTS]

        def variance(coordinates):
            """Summed over the components, of which there may be none."""
            return coordinates.var(axis=tuple(range(coordinates.ndim - 1))).sum()

        unit = variance(coordinates(self.train.images[draw_alike(self.train.labels, every)]))
        drawn = coordinates(novel.reshape(-1, *novel.shape[2:])).reshape(*novel.shape[:2], -1)
        real = coordinates(self.test.images[draw_alike(self.test.labels, labels)])
        return {
            **with_interval("component_variance_ratio", lambda sample: ratio(variance(sample), unit), drawn),
            "test_component_variance_ratio": ratio(variance(real), unit),
        }

    def measure_reconstructions(self):
        pairs, subjects = (self.test.images, self.reconstructed), self.test.subjects
        similarity = ssim(*pairs)
        with np.errstate(divide="ignore"):  # equal pictures
            decibels = -10 * np.log10(np.square(np.subtract(*pairs)).mean(axis=(1, 2)))
        return {
            "split": "test",
            "images": len(self.test.images),
            **with_interval("ssim_mean", mean, by_subject(similarity, subjects)),
            "ssim_std": similarity.std(),
            "ssim_min": similarity.min(),
            **with_interval("ssim_gaussian_mean", mean, by_subject(ssim(*pairs, **WANG), subjects)),
            **with_interval("ssim_inside_mean", mean, by_subject(ssim_inside(*pairs), subjects)),
            **with_interval("psnr_mean", mean, by_subject(decibels, subjects)),
            "sharpness_ratio": ratio(sharpness(self.reconstructed), sharpness(self.test.images)),
        }

    def measure_codebook(self):
        codes, num_embeddings = self.test.codes, self.prior.num_embeddings
        return {
            "grid": list(codes.shape[1:]),
            "num_embeddings": num_embeddings,
            "used": len(np.unique(codes)),
            "perplexity": np.exp(self.entropy),
            "bits_per_image": codes[0].size * np.log2(num_embeddings),
        }

    def nats(self, codes, **conditions):
        """Mean negative log-likelihood of the codes of each slice under the prior, exact and not a bound: (N,)."""
        return self.prior.nll(codes, verbose=True, **conditions).mean(axis=(1, 2), dtype=np.float64)

    def measure_prior(self):
        test, train = (self.nats(split.codes, labels=split.labels) for split in (self.test, self.train))
        codes_per_image = self.test.codes[0].size
        sums = by_subject(test, self.test.subjects), by_subject(train, self.train.subjects)
        return {
            "split": "test",
            **with_interval("nats_per_code", mean, sums[0]),
            "bits_per_code": test.mean() / np.log(2),
            "bits_per_image": test.mean() / np.log(2) * codes_per_image,
            # What the codes cost without a prior that looks at other codes, and what those it was fitted on cost.
            "histogram_bits_per_image": self.entropy / np.log(2) * codes_per_image,
            "train_nats_per_code": train.mean(),
            **with_interval("membership_auroc", membership_auroc, *sums),
        }

    def measure_samples(self, novel, nearest):
        """Args: `Coded` novel slices; what `nearest` finds for "novel", "reconstruction" and "test" slices."""
        report = {
            "sharpness_ratio": ratio(sharpness(novel.images), sharpness(self.test.images)),
            "nearest_train_ssim_max": nearest["novel"][1].max(),
            **self.variance_ratios(novel.images[:, None], novel.labels),
        }
        for name, (indices, similarity) in nearest.items():
            slices, prefix = novel if name == "novel" else self.test, f"{name}_".removeprefix("novel_")
            asked, found = (self.prior.numbers_of(labels) for labels in (slices.labels, self.seen_labels[indices]))
            errors = np.where((asked >= 0) & (found >= 0), np.abs(asked - found), np.nan)
            for measure, values in {"nearest_train_ssim_mean": similarity, "level_error": errors}.items():
                report |= with_interval(prefix + measure, mean, by_subject(values, slices.subjects))
        return report

    def measure_heads(self, heads):
        """Args: images of whole novel heads (N, L, H, W)."""
        test, below = self.test, dataset.slices_below(self.test.cases, self.test.labels)
        upper = np.flatnonzero(below >= 0)
        lower, subjects = below[upper], test.subjects[upper]
        conditions = {"labels": test.labels[upper], "below": test.codes[lower]}
        nats = self.nats(test.codes[upper], **conditions) if len(upper) else np.zeros(0)

        def change(images):
            """Sums of what neighbouring test slices differ by."""
            return by_subject(np.abs(images[upper] - images[lower]).mean(axis=(1, 2)), subjects)

        changes = np.array([np.abs(np.diff(head, axis=0)).mean() for head in heads])
        labels = np.tile(np.arange(self.prior.num_labels, dtype=np.int32), len(heads))
        return {
            "count": len(heads),
            **with_interval("nats_per_code", mean, by_subject(nats, subjects)),
            **with_interval("neighbour_change", mean, by_subject(changes, np.arange(len(heads)))),
            "reconstruction_neighbour_change": mean(change(self.reconstructed)),
            "test_neighbour_change": mean(change(test.images)),
            **self.variance_ratios(heads, labels),
        }


# ---- What is drawn from the models ---------------------------------------------------


def decode(vqvae, codes):
    """Codes int32 (..., h, w) -> float32 (..., H, W) in [0, 1]."""
    images = vqvae.decode(codes.reshape(-1, *codes.shape[-2:]), verbose=True)[..., 0]
    return images.reshape(*codes.shape[:-2], *images.shape[1:])


def draw_novel(vqvae, prior, labels, options):
    """Novel slices of these labels, as `Coded`. Each is a subject of its own."""
    print(f"sampling {len(labels)} novel slices")
    codes = prior.sample(len(labels), options.seed, options.temperature, verbose=True, labels=labels)
    return Coded(decode(vqvae, codes), labels, codes, np.arange(len(labels)))


def draw_completions(vqvae, prior, codes, labels, options, draws=3):
    """Keep the codes of the upper half of slices, (N, h, w), and draw the rest: images (draws, N, H, W)."""
    known = np.tile(codes, (draws, 1, 1))
    known[:, prior.grid[0] // 2 :] = -1
    # Without scores: drawn ones would not be those of the upper half.
    conditions = {"labels": np.tile(labels, draws), "scores": prior.unknown(len(known))["scores"]}
    drawn = prior.sample(len(known), options.seed, options.temperature, known=known, verbose=True, **conditions)
    return decode(vqvae, drawn.reshape(draws, *codes.shape))


# ---- Pictures ------------------------------------------------------------------------

DPI, SIDE = 85, 128  # of `dataset.write_figure`; of a picture in a figure, about


def enlarged(image, side=SIDE):
    """A picture in which each pixel of `image` (H, W, ...) is a whole number of pixels wide; about `side` high."""
    factor = max(1, min(round(side / image.shape[0]), round(2 * side / image.shape[1])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def picture_grid(title, rows):
    """A figure of rows of pictures: (name, images, captions or none) each."""
    rows = [(name, [enlarged(image) for image in images], captions) for name, images, captions in rows]
    heights = [max(len(image) for image in images) + (24 if captions else 8) for _, images, captions in rows]
    row_widths = [sum(image.shape[1] + 8 for image in images) for _, images, _ in rows]
    width, y = max(28 + max(row_widths), 7 * len(title)), sum(heights)  # y is from below
    height = y + 36
    figure = Figure(figsize=((width + 0.1) / DPI, (height + 0.1) / DPI))
    figure.text(0.5, 1 - 10 / height, title, fontsize=10, ha="center", va="top")
    for (name, images, captions), row_height in zip(rows, heights):
        x, middle = 24, y - len(images[0]) / 2
        figure.text(12 / width, middle / height, name, fontsize=9, ha="center", va="center", rotation="vertical")
        for image, caption in zip(images, captions or [""] * len(images)):
            figure.figimage(image, x, y - len(image), cmap="gray", vmin=0, vmax=1)
            place = (x + image.shape[1] / 2) / width, (y - len(image) - 3) / height
            figure.text(*place, caption, fontsize=8, ha="center", va="top")
            x += image.shape[1] + 8
        y -= row_height
    return figure


def evenly(count, total):
    """`count` indices spread over range(total), chosen by nothing but their place."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def captions_of(prior, labels):
    return [f"slice {number}" if number >= 0 else "" for number in prior.numbers_of(labels)]


def code_colours(codebook):
    """Red, green and blue of each code (K, D): its rank in the first three principal components, (K, 3) in [0, 1]."""
    components = PCA(min(3, *codebook.shape)).fit_transform(codebook)
    return np.pad(stats.rankdata(components, axis=0) / len(codebook), [[0, 0], [0, 3 - components.shape[1]]])


def plot_reconstructions(path, evaluation, codebook, kind):
    test, chosen = evaluation.test, evenly(8, len(evaluation.test.images))
    images, reconstructed = test.images[chosen], evaluation.reconstructed[chosen]
    rows = [
        (f"test {kind}", images, captions_of(evaluation.prior, test.labels[chosen])),
        ("reconstruction", reconstructed, [f"SSIM {similarity:.3f}" for similarity in ssim(images, reconstructed)]),
        ("codes", code_colours(codebook)[test.codes[chosen]], None),
    ]
    title = f"{len(chosen)} of {len(test.images)} test {kind}s, evenly spaced; similar codes have similar colours"
    dataset.write_figure(path, picture_grid(title, rows))


def pictured(labels, rows=3, columns=8):
    """Which samples are shown, (rows, columns): labels in order, evenly spaced, and the first draws of each."""
    different = np.unique(labels)
    of_label = [np.flatnonzero(labels == label)[:rows] for label in different[evenly(columns, len(different))]]
    if len(of_label) == columns and all(len(draws) == rows for draws in of_label):
        return np.stack(of_label, axis=1)
    first = np.argsort(labels[: rows * columns], kind="stable")
    columns = min(columns, len(first))
    return first[: len(first) // columns * columns].reshape(-1, columns)


def plot_samples(path, evaluation, novel, nearest, kinds, drawn):
    """Rows of novel slices, and one of test slices of the same numbers; under each the nearest training slice."""
    chosen, test, rows = pictured(novel.labels), evaluation.test, []
    shown = [("novel", novel, nearest["novel"], indices) for indices in chosen]
    shown.append((f"test {kinds[1]}", test, nearest["test"], draw_alike(test.labels, novel.labels[chosen[0]])))
    for name, slices, (near, similarity), indices in shown:
        rows.append((name, slices.images[indices], captions_of(evaluation.prior, slices.labels[indices])))
        captions = [f"SSIM {value:.2f}" for value in similarity[indices]]
        rows.append(("nearest in train", evaluation.seen[near[indices]], captions))
    title = f"{chosen.size} of {len(novel.images)} novel {kinds[0]}s, not selected, {drawn}; last, test {kinds[1]}s"
    dataset.write_figure(path, picture_grid(title, rows))


def plot_completions(path, evaluation, chosen, completed, kind, drawn):
    """Args: indices of test slices; their completions, images (draws, N, H, W)."""
    rows_of_codes = evaluation.prior.grid[0]
    border = evaluation.test.images.shape[1] * (rows_of_codes // 2) // rows_of_codes

    def marked(images):
        """With a mark on either side, where the codes that are kept end."""
        images = np.pad(images, [[0, 0], [0, 0], [2, 2]], constant_values=1)
        images[:, border - 1 : border + 1, [0, 1, -2, -1]] = 0
        return images

    real = {f"test {kind}": evaluation.test.images, "reconstruction": evaluation.reconstructed}
    rows = [(name, marked(images[chosen]), None) for name, images in real.items()]
    rows += [("lower half drawn", marked(images), None) for images in completed]
    dataset.write_figure(path, picture_grid(f"Codes above the marks kept, those below drawn: {drawn}", rows))


def plot_heads(path, evaluation, heads, kind, drawn):
    """A row for each head, a real one, its reconstruction and novel ones: from the lowest slice up, then two cuts."""
    test, rows = evaluation.test, []
    named = np.flatnonzero((test.cases >= 0) & (test.labels >= 0))
    real = named[test.cases[named] == test.cases[named[:1]]]
    shown = {f"test {kind}": test.images, "its reconstruction": evaluation.reconstructed}
    shown = [(name, images[real], test.labels[real]) for name, images in shown.items() if len(real)]
    shown += [(f"novel {i}", head, np.arange(len(head))) for i, head in enumerate(heads[:3])]
    for name, head, labels in shown:
        places, cuts = evenly(6, len(head)), [head[::-1, head.shape[1] // 2], head[::-1, :, head.shape[2] // 2]]
        captions = [*captions_of(evaluation.prior, labels[places]), *CUTS[evaluation.mirror_axis]]
        rows.append((name, [*head[places], *cuts], captions))
    title = f"Whole novel heads, not selected: the first {len(heads[:3])} of {len(heads)}, {drawn}"
    dataset.write_figure(path, picture_grid(title, rows))


# ---- A run, and its report -----------------------------------------------------------


def load_run(run):
    """The VQ-VAE and the prior of a finished `Run`."""
    if run.config is None:
        raise dataset.UserError(f"--run {run.folder}: no run here; first python train.py --run {quote(run.folder)}")
    vqvae, prior = run.model("vqvae"), run.model("pixelcnn")
    if prior is None:
        raise dataset.UserError(f"--run {run.folder}: training has not finished; give the same train.py command again")
    return vqvae, prior


def load_data(options, run, splits=dataset.SPLITS):
    """The splits that are asked for, and what the report says of them."""
    folder = options.data or run.data_folder
    loaded = dataset.load(folder, splits, run.config["settings"]["image_size"])
    found = dataset.fingerprint(loaded)
    others = [name for name in found if found[name] != run.config["data"].get(name)]
    if others:
        print(f"note: other {', '.join(others)} slices than those of the training")
    return loaded, {
        "folder": str(folder.resolve()),
        **{f"{name}_{count}": split[count] for name, split in found.items() for count in ("images", "subjects")},
        "phantom": dataset.is_phantom(folder),
        "sha256": {name: split["sha256"] for name, split in found.items()},
        "as_trained": not others,
    }


def kind_of(data):
    """What the pictures call a slice, given the entry "data" of config.json or report.json."""
    return "phantom" if data["phantom"] else "slice"


def check_asked(options, prior):
    """Refuse what this run cannot draw, before anything is read."""
    numbers = prior.slice_numbers
    for number in options.slice or []:
        if number not in numbers:
            there_are = f"the slice numbers {', '.join(map(str, numbers))}" if numbers else "no slice numbers"
            raise dataset.UserError(f"--slice {number}: this run has {there_are}")
    if options.heads and not prior.below:
        remedy = "train on heads with neighbouring slices, without --no-below"
        raise dataset.UserError(f"--heads: this run knows nothing of the slice below; {remedy}")


def predict(options):
    run = Run(options.run)
    vqvae, prior = load_run(run)
    check_asked(options, prior)
    splits, data = load_data(options, run)
    with run.one_writer():
        report = measure_and_draw(options, run, vqvae, prior, splits, data)
        dataset.write_json(run.folder / "report.json", report)
    print((run.folder / "report.json").read_text())
    print(f"done: the pictures and report.json are in {run.folder}")


def measure_and_draw(options, run, vqvae, prior, splits, data):
    """Write all files but report.json, and return what goes into that."""
    folder, kind, test_kind = run.folder, kind_of(run.config["data"]), kind_of(data)
    drawn = f"seed {options.seed}, temperature {options.temperature}"
    print("encoding and reconstructing")
    evaluation = Evaluation(vqvae, prior, splits["train"], splits["test"], run.mirror_axis)
    test = evaluation.test
    labels = prior.labels_of(options.slice) if options.slice else test.labels
    started = time.monotonic()
    novel = draw_novel(vqvae, prior, np.resize(labels, options.num_samples or len(test.labels)), options)
    seconds = time.monotonic() - started
    nearest = {
        "novel": evaluation.nearest(novel.images, "novel slices"),
        "reconstruction": evaluation.nearest(evaluation.reconstructed, "reconstructions"),
        "test": evaluation.nearest(test.images, "test slices"),
    }
    report = {
        "data": data,
        "reconstruction": evaluation.measure_reconstructions(),
        "codebook": evaluation.measure_codebook(),
        "prior": evaluation.measure_prior(),
        "samples": {
            "count": len(novel.images),
            "seed": options.seed,
            "temperature": options.temperature,
            "slices": options.slice,  # None: those of the test slices
            "seconds": seconds,
            **evaluation.measure_samples(novel, nearest),
        },
    }
    for name in ("report.json", *WRITTEN):  # of an earlier call; the new report comes last
        (folder / name).unlink(missing_ok=True)
    codebook = np.asarray(vqvae.quantizer.codebook)
    plot_reconstructions(folder / "reconstructions.png", evaluation, codebook, test_kind)
    plot_samples(folder / "samples.png", evaluation, novel, nearest, (kind, test_kind), drawn)
    numbers = prior.numbers_of(novel.labels)
    dataset.write_arrays(folder / "samples.npz", images=novel.images, codes=novel.codes, labels=numbers)
    if options.complete:
        chosen = evenly(8, len(test.images))
        completed = draw_completions(vqvae, prior, test.codes[chosen], test.labels[chosen], options)
        plot_completions(folder / "completions.png", evaluation, chosen, completed, test_kind, drawn)
    if options.heads:
        print(f"sampling {options.heads} whole heads")
        codes = prior.sample_heads(options.heads, options.seed, options.temperature, verbose=True)
        heads = decode(vqvae, codes)
        report["heads"] = evaluation.measure_heads(heads)
        plot_heads(folder / "heads.png", evaluation, heads, test_kind.replace("slice", "head"), drawn)
        dataset.write_arrays(folder / "heads.npz", images=heads, codes=codes)
    return report


# ---- Anomalies in other slices -------------------------------------------------------


class AnomalyDetector:
    """How unexpected each code and each pixel of a slice is, given the two models of a run.

    Three terms are strong on different changes; each is smoothed by a Gaussian:
        surprise: -ln p of the codes given the slice's own scores (Naval Marimont and Tarroni, arXiv 2012.06765). Sees
            grey values in the wrong place, is blind to what no code expresses.
        residual: of the reconstruction. Sees texture that no code expresses, and little else.
        z_score: of the pixels among the training slices of the same label.

    To have one unit, of each the map takes -ln p, p being the share of the validation slices' pixels in which the term
    is higher, and of these the root of the sum of squares. It ranks pixels, and is no probability.

    Args:
        vqvae, prior: the models.
        train, validate: pairs of images, float32 (N, H, W, 1) in [0, 1], and labels, int32 (N,), -1 where not known.
        mirror_axis: along which the prior was fitted on mirrored slices, or None. With it, surprise is the mean of that
            of the slice and of its mirror image, which are read in opposite directions.
    """

    SMOOTHING = 1 / 32  # of the side, standard deviation
    SPREAD_FLOOR = 0.1  # least standard deviation of a z-score, in [0, 1] of the pixels: registration is no better
    SCORED = 0.01  # the score of a slice is the mean of this share of its pixels, the highest of the map
    REDRAWN = 90  # percentile of the validation slices' nats above which a restoration draws a code anew
    RESTORATIONS = 8

    def __init__(self, vqvae, prior, train, validate, mirror_axis):
        self.vqvae, self.prior, self.mirror_axis = vqvae, prior, mirror_axis
        images, labels = train
        of_labels = [images[labels == label] for label in range(prior.num_labels)]
        of_labels = [same if len(same) else images for same in of_labels] + [images]  # the last is for -1
        self.mean = np.stack([same.mean(axis=0) for same in of_labels])
        self.spread = np.maximum([same.std(axis=0) for same in of_labels], self.SPREAD_FLOOR)

        validate = dict(zip(("images", "labels"), validate))
        normal = modules.in_batches(lambda batch: self.measure(**batch), validate, verbose=True)
        self.redraw_above = np.percentile(normal["nats"], self.REDRAWN)
        self.log_shares = np.linspace(0, np.log(validate["images"].size), 200)  # -ln p, up to that of one pixel
        shares = 1 - np.exp(-self.log_shares)
        self.quantiles = {name: np.quantile(values, shares) for name, values in normal["terms"].items()}
        self.normal_score = np.sort(self.score(self.combine(normal["terms"])))

    def nats(self, images, codes, labels):
        """-ln p of the codes, given the labels and the slices' own scores: (N, h, w)."""
        conditions = {"labels": labels}
        if self.prior.num_scores:
            conditions["scores"] = self.prior.head_scores.of(images)
        return self.prior.nll(codes, **conditions)

    def measure(self, images, labels):
        """The labels, see `likeliest`; codes and their nats, (N, h, w); the terms of the map, {name: (N, H, W)}."""
        codes = self.vqvae.encode(images)
        labels = self.likeliest(images, codes, labels)
        nats = self.nats(images, codes, labels)
        orders = [nats]
        if self.mirror_axis is not None:  # along which the mirror image is read in the opposite direction
            mirrored = np.flip(images, self.mirror_axis)
            orders.append(np.flip(self.nats(mirrored, self.vqvae.encode(mirrored), labels), self.mirror_axis))
        terms = {
            "surprise": tf.image.resize(np.mean(orders, axis=0)[..., None], images.shape[1:3]).numpy(),
            "residual": np.abs(images - self.vqvae.decode(codes)),
            "z_score": np.abs(images - self.mean[labels]) / self.spread[labels],
        }
        blur = self.SMOOTHING * images.shape[1]
        terms = {name: ndimage.gaussian_filter(term[..., 0], blur, axes=(1, 2)) for name, term in terms.items()}
        return {"labels": labels, "codes": codes, "nats": nats, "terms": terms}

    def combine(self, terms):
        """Root of the sum of the squared -ln p of the terms: {name: (N, H, W)} -> (N, H, W), at least 0."""
        logs = [np.interp(terms[name], quantiles, self.log_shares) for name, quantiles in self.quantiles.items()]
        return np.sqrt(np.square(logs).sum(axis=0)).astype(np.float32)

    def score(self, maps):
        """Mean of the highest pixels of each map: (N, H, W) -> (N,)."""
        highest = max(1, round(self.SCORED * maps[0].size))
        return np.sort(maps.reshape(len(maps), -1), axis=1)[:, -highest:].mean(axis=1)

    def likeliest(self, images, codes, labels):
        """The labels, an unknown one replaced by that under which the codes are most probable: int32 (N,)."""
        labels, unknown = np.array(labels, np.int32), np.flatnonzero(labels < 0)
        if len(unknown) and self.prior.num_labels:
            candidates = [np.full(len(unknown), label) for label in range(self.prior.num_labels)]
            nats = [self.nats(images[unknown], codes[unknown], candidate) for candidate in candidates]
            labels[unknown] = np.mean(nats, axis=(2, 3)).argmin(axis=0)
        return labels

    def restore(self, codes, labels, nats, seed):
        """Mean of RESTORATIONS of each slice, in which codes that surprise are drawn anew: (N, H, W)."""
        known = np.where(nats > self.redraw_above, -1, codes)
        known, labels = (np.repeat(values, self.RESTORATIONS, axis=0) for values in (known, labels))
        # Without scores: those of a changed slice would bring the change back.
        inputs = {**self.prior.unknown(len(known)), "known": known, "labels": labels}
        places = np.tile(np.arange(self.RESTORATIONS), len(codes))  # alike for all slices, whatever stands beside them
        restored = self.vqvae.decode(self.prior.draw(inputs, seed, 1.0, places))[..., 0]
        return restored.reshape(len(codes), self.RESTORATIONS, *restored.shape[1:]).mean(axis=1)

    def examine(self, images, labels, seed):
        """The maps of slices; those that are restored are for the eye, and not in the anomaly map.

        Args: images, float32 (N, H, W, 1) in [0, 1]; labels, int32 (N,), -1 where not known; seed of the restorations.
        Returns: {"labels": int32 (N,), the likeliest where not known, "surprise": nats of the codes in raster order
            (N, h, w), "restored", "anomaly_map": (N, H, W), "score": (N,), "percentile": (N,), of the validation
            slices that score lower}.
        """

        def examine_batch(batch):
            found = self.measure(**batch)
            maps = self.combine(found["terms"])
            score = self.score(maps)
            return {
                "labels": found["labels"],
                "surprise": found["nats"],
                "restored": self.restore(found["codes"], found["labels"], found["nats"], seed),
                "anomaly_map": maps,
                "score": score,
                "percentile": 100 * np.searchsorted(self.normal_score, score) / len(self.normal_score),
            }

        batch_size = self.prior.BATCH // 2 // self.RESTORATIONS
        return modules.in_batches(examine_batch, {"images": images, "labels": labels}, True, batch_size)


def picture_names(names):
    """NAME.png of each file NAME.xyz, numbered where several have one name, also where case does not count."""
    pictures = {}  # casefolded -> name
    for stem in (pathlib.Path(name).stem for name in names):
        candidates = itertools.chain([stem], (f"{stem[:60]}_{number}" for number in itertools.count(1)))
        picture = next(candidate for candidate in candidates if candidate.casefold() not in pictures)
        pictures[picture.casefold()] = picture
    return [f"{picture}.png" for picture in pictures.values()]


def plot_anomalies(folder, names, found, kind):
    """A picture of each slice: input, surprise, mean restoration, anomaly map, on one scale for the whole folder."""
    factor = found["images"].shape[1] // found["surprise"].shape[1]
    surprise = found["surprise"].repeat(factor, axis=1).repeat(factor, axis=2)
    side = len(enlarged(found["images"][0], 192))
    panels = [  # title, place from the left, values, colours, highest value
        ("input", 8, found["images"], "gray", 1),
        ("surprise, nats", 16 + side, surprise, "inferno", surprise.max()),
        ("mean restoration", 76 + 2 * side, found["restored"], "gray", 1),
        ("anomaly map", 84 + 3 * side, found["anomaly_map"], "inferno", found["anomaly_map"].max()),
    ]
    # What is the same in all pictures, titles and colour bars, is drawn once.
    width, height = 144 + 4 * side, 56 + side
    figure = Figure(figsize=((width + 0.1) / DPI, (height + 0.1) / DPI), dpi=DPI)
    for title, left, _, cmap, highest in panels:
        figure.text((left + side / 2) / width, (side + 14) / height, title, fontsize=9, ha="center")
        if cmap != "gray":
            bar = figure.add_axes(((left + side + 6) / width, 8 / height, 10 / width, side / height))
            figure.colorbar(cm.ScalarMappable(colors.Normalize(0, highest), cmap), bar).ax.tick_params(labelsize=7)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    frame, font = np.asarray(canvas.buffer_rgba()), ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 11)

    print(f"drawing {len(names)} pictures")
    for i, picture in enumerate(dataset.progress(picture_names(names), "picture")):
        pixels = frame.copy()
        for _, left, values, cmap, highest in panels:
            panel = colormaps[cmap](values[i] / max(highest, 1e-6), bytes=True)
            pixels[-8 - side : -8, left : left + side] = enlarged(panel, side)
        drawn = Image.fromarray(pixels)
        score = f"score {found['score'][i]:.2f}, above {found['percentile'][i]:.0f} % of the validation {kind}s"
        ImageDraw.Draw(drawn).text((8, 8), f"{score}: {names[i]}", "black", font)
        dataset.write_whole(folder / picture, drawn.save)


def save_anomalies(folder, names, found):
    """anomalies.npz, in the order of the folder, and anomalies.csv, the most surprising first."""
    arrays = {name: values for name, values in found.items() if name != "percentile"}
    dataset.write_arrays(folder / "anomalies.npz", names=names, **arrays)
    rows = [
        (names[i], found["labels"][i], f"{found['score'][i]:.4f}", f"{found['percentile'][i]:.1f}")
        for i in np.argsort(-found["score"], kind="stable")
    ]
    dataset.write_table(folder / "anomalies.csv", ("name", "slice", "score", "percentile"), rows)
    print(f"{folder / 'anomalies.csv'}: of {len(rows)} slices the most surprising are")
    for name, _, score, percentile in rows[:5]:
        print(f"  {score:>9}, above {percentile:>5} % of the validation slices: {name}")


def make_detector(options, run, vqvae, prior):
    """`AnomalyDetector` of a run, and what the data are that it takes for normal."""
    splits, data = load_data(options, run, ("train", "validate"))
    print("examining validation slices, to know what is normal")
    normal = [(dataset.to_float(split.images), prior.labels_of(split.slice_numbers)) for split in splits.values()]
    return AnomalyDetector(vqvae, prior, *normal, run.mirror_axis), data


def find_anomalies(options):
    run, folder = Run(options.run), options.anomalies
    vqvae, prior = load_run(run)
    check_asked(options, prior)
    if not folder.is_dir():
        raise dataset.UserError(f"--anomalies {folder}: no such folder; name one with PNG or JPEG slices in it")
    results = run.folder / "anomalies"
    if folder.resolve().is_relative_to(results.resolve()):
        raise dataset.UserError(f"--anomalies {folder}: the results would replace the slices; name another folder")
    paths = dataset.list_slices(folder, "put some there, or name another folder")
    names = np.array([os.fsencode(path.name).decode("utf-8", "replace") for path in paths])
    images = dataset.to_float(dataset.read_images(paths, "anomalies", run.config["settings"]["image_size"]))

    with run.one_writer():
        detector, data = make_detector(options, run, vqvae, prior)
        print(f"examining {len(images)} slices")
        numbers = np.array([dataset.slice_number(name) for name in names])
        labels = prior.labels_of(np.where(numbers < 0, options.slice[0] if options.slice else -1, numbers))
        found = {"images": images[..., 0], **detector.examine(images, labels, options.seed)}
        found["labels"] = prior.numbers_of(found["labels"])  # of the files, as in the names
        with dataset.write_errors(results):
            (results / "anomalies.csv").unlink(missing_ok=True)  # of an earlier call; the new one comes last
            shutil.rmtree(results, ignore_errors=True)
            results.mkdir()
            plot_anomalies(results, names, found, kind_of(data))
            save_anomalies(results, names, found)


# ---- Main ----------------------------------------------------------------------------


def parse_arguments(arguments):
    number, parser = dataset.number, argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add, asked = parser.add_argument, "slice numbers to draw, in turn (default: the test's); see --anomalies"
    add("--data", type=dataset.folder, help="folder of the slices (default: where the run was trained)")
    add("--run", type=dataset.folder, default="runs/oasis", help="folder that train.py filled (default: %(default)s)")
    add("--num-samples", type=number(int, 1, 10**5), metavar="N", help="default: the number of test slices")
    add("--temperature", type=number(float, 0.01, 100), default=1.0, metavar="T", help="1 samples the model itself")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help="of all draws (default: %(default)s)")
    add("--slice", type=int, nargs="+", metavar="N", help=asked)
    add("--complete", action="store_true", help="draw the lower half of test slices, given the upper")
    add("--heads", type=number(int, 1, 10**4), metavar="N", help="draw N whole heads too, each slice given that below")
    unexpected = "show what is unexpected in the slices of this folder; --slice is the number where a name has none"
    add("--anomalies", type=dataset.folder, metavar="FOLDER", help=unexpected)
    options = parser.parse_args(arguments)
    if options.anomalies is not None:
        if options.complete or options.heads or options.num_samples is not None or options.temperature != 1:
            parser.error(
                "--anomalies draws no novel slices: leave out --complete, --heads, --num-samples, --temperature"
            )
        if options.slice and len(options.slice) > 1:
            parser.error("--slice with --anomalies is one number, that of all slices whose names have none")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    print(modules.set_up_devices())
    with modules.keras_defaults():
        return dataset.run_script("predict.py", predict if options.anomalies is None else find_anomalies, options)


if __name__ == "__main__":
    sys.exit(main())
