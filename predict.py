"""Reconstructs the test slices, draws novel ones, and measures both; or shows what is unexpected in other slices.

    python predict.py --run runs/oasis                   # a novel slice of the level of every test slice
    python predict.py --run runs/oasis --slice 5 20      # novel slices of these two levels in turn
    python predict.py --run runs/oasis --complete        # also completes the lower half of test slices
    python predict.py --run runs/oasis --heads 20        # also draws whole heads, slice by slice
    python predict.py --run runs/oasis --anomalies mine  # which slices of the folder "mine", and where in them

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
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from skimage.metrics import structural_similarity

COMPONENTS = 64  # principal components of frechet_pca
WHOLE_SLICE = slice(2, 12)  # principal components 3 to 12: differences of whole slices within a level
NEIGHBOURS = 20  # training slices, nearest by L2, among which the most similar is looked for
RESAMPLES = 1000  # of the test subjects, for an interval
WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}  # SSIM as in Wang et al. 2004
WRITTEN = ("reconstructions.png", "samples.png", "samples.npz", "completions.png", "heads.png", "heads.npz")

# ---- Measures. Images are float32 (N, H, W) in [0, 1] --------------------------------


def ssim(images, others, **options):
    """Structural similarity of each pair: (N,)."""
    pairs = zip(images, others, strict=True)
    return np.array([structural_similarity(a, b, data_range=1.0, **options) for a, b in pairs])


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair in dB, the peak being 1: (N,). Infinite for equal ones."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(images - others).mean(axis=(1, 2)))


def ratio(value, unit):
    """value / unit; None where there is nothing to compare with."""
    return float(value / unit) if unit > 0 else None


def sharpness(images):
    """Mean gradient magnitude."""
    down, across = np.diff(images, axis=1)[:, :, :-1], np.diff(images, axis=2)[:, :-1]
    return float(np.hypot(down, across).mean())


def frechet_distance(scores, others):
    """Frechet distance between the Gaussians fitted to two sets of scores (N, C), (M, C).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Dowson and Landau 1982.
    """
    cov1, cov2 = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (scores, others))
    # tr (C1 C2)^(1/2) by the eigenvalues of C1 C2, which are real and not negative.
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov1 @ cov2).real, 0)).sum()
    return float(np.square(scores.mean(0) - others.mean(0)).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


def variance_ratio(scores, others):
    """Variance of scores in the components of WHOLE_SLICE over that of others; None where there are none."""
    variance, expected = scores[:, WHOLE_SLICE].var(axis=0), others[:, WHOLE_SLICE].var(axis=0)
    return ratio(variance.mean(), expected.mean()) if expected.size else None


def resample(cases, count):
    """Indices of the slices of as many subjects, drawn with replacement, for a bootstrap: a list of `count` arrays."""
    slices_of = [np.flatnonzero(cases == case) for case in np.unique(cases)]
    draws = np.random.default_rng(0).integers(len(slices_of), size=(count, len(slices_of)))
    return [np.concatenate([slices_of[i] for i in draw]) for draw in draws]


def with_interval(name, values, cases):
    """The mean of a measure of slices, and what 95 % of draws of other subjects give, as two entries of the report.

    The interval is None where fewer than two subjects are known.
    """
    limits = None
    if cases.min() >= 0 and len(np.unique(cases)) > 1:
        means = [values[chosen].mean() for chosen in resample(cases, RESAMPLES)]
        limits = np.percentile(means, [2.5, 97.5]).tolist()
    return {name: values.mean(), f"{name}_interval": limits}


def nearest_training_slices(images, train, label):
    """Index of, and SSIM with, the most similar training slice of each image: (N,), (N,)."""
    print(f"comparing {len(images)} {label} with the training slices")
    flat, near = train.reshape(len(train), -1), min(NEIGHBOURS, len(train))
    squares, indices, similarities = np.square(flat).sum(axis=1), np.empty(len(images), int), np.empty(len(images))
    for start in dataset.progress(range(0, len(images), 64), "batch"):
        batch = images[start : start + 64]  # one product for all of them reads the training slices once
        distances = squares - 2 * batch.reshape(len(batch), -1) @ flat.T
        for i, image in enumerate(batch):
            candidates = np.argpartition(distances[i], near - 1)[:near]
            found = ssim([image] * near, train[candidates])
            indices[start + i], similarities[start + i] = candidates[found.argmax()], found.max()
    return indices, similarities


def histogram_entropy(codes):
    """Entropy in nats of the histogram of codes."""
    return stats.entropy(np.bincount(codes.ravel()))


# ---- The report ----------------------------------------------------------------------


@dataclasses.dataclass
class Measured:
    """Slices with what the measures need of them."""

    images: np.ndarray  # float32 (N, H, W) in [0, 1]
    slice_numbers: np.ndarray  # int32 (N,); -1 where not known
    codes: np.ndarray  # int32 (N, h, w)
    cases: np.ndarray | None = None  # numbers of the subjects, int32 (N,); -1 where not known


def measure_reconstructions(test, reconstructed):
    similarity = ssim(test.images, reconstructed)
    return {
        "split": "test",
        "images": len(test.images),
        **with_interval("ssim_mean", similarity, test.cases),
        "ssim_std": similarity.std(),
        "ssim_min": similarity.min(),
        **with_interval("ssim_gaussian_mean", ssim(test.images, reconstructed, **WANG), test.cases),
        **with_interval("psnr_mean", psnr(test.images, reconstructed), test.cases),
        "sharpness_ratio": ratio(sharpness(reconstructed), sharpness(test.images)),
    }


def measure_codebook(num_embeddings, codes):
    return {
        "grid": list(codes.shape[1:]),
        "num_embeddings": num_embeddings,
        "used": len(np.unique(codes)),
        "perplexity": np.exp(histogram_entropy(codes)),
        "bits_per_image": codes[0].size * np.log2(num_embeddings),
    }


def nats_of_slices(pixelcnn, codes, **conditions):
    """Mean negative log-likelihood of the codes of each slice under the prior, exact and not a bound: (N,), nats."""
    nats = pixelcnn.nll(codes, dataset.verbosity(), **conditions)
    return nats.numpy().mean(axis=(1, 2), dtype=np.float64)


def measure_prior(pixelcnn, test, train):
    def nats_of(slices):
        return nats_of_slices(pixelcnn, slices.codes, labels=pixelcnn.labels_of(slices.slice_numbers))

    nats, positions = nats_of(test), test.codes[0].size
    return {
        "split": "test",
        **with_interval("nats_per_code", nats, test.cases),
        "bits_per_code": nats.mean() / np.log(2),
        "bits_per_image": nats.mean() / np.log(2) * positions,
        # What the codes cost without a prior that looks at other codes, and what those it was fitted on cost.
        "histogram_bits_per_image": histogram_entropy(test.codes) / np.log(2) * positions,
        "train_nats_per_code": nats_of(train).mean(),
    }


def draw_of_levels(pool, slice_numbers, seed):
    """As many indices into a pool of slice numbers, at random, each of the number that is asked for if there is one."""
    order, chosen = np.random.default_rng(seed).permutation(len(pool)), np.empty(len(slice_numbers), int)
    for number in np.unique(slice_numbers):
        asked, having = slice_numbers == number, order[pool[order] == number]
        chosen[asked] = np.resize(having if number >= 0 and len(having) else order, asked.sum())
    return chosen


def variance_ratios(novel, slice_numbers, test, train, components, seed):
    """How much novel slices differ as wholes, and test slices of the same levels: over training slices of these.

    Args: images and slice numbers of the novel slices; `Measured` test and training slices; principal components.
    """
    copies = max(1, len(train.images) // len(slice_numbers))
    every = np.repeat(slice_numbers, copies)  # as many as there are, of the levels in proportion
    expected = train.images[draw_of_levels(train.slice_numbers, every, seed)]
    real = test.images[draw_of_levels(test.slice_numbers, slice_numbers, seed)]
    of_novel, of_test, of_train = (modules.project(images, components) for images in (novel, real, expected))
    return {
        "component_variance_ratio": variance_ratio(of_novel, of_train),
        "test_component_variance_ratio": variance_ratio(of_test, of_train),
    }


def level_error(asked, found):
    """Mean distance of slice numbers, where both are known; None where they never are."""
    known = (asked >= 0) & (found >= 0)
    return np.abs(asked - found)[known].mean() if known.any() else None


def measure_samples(novel, test, reconstructed, train, components, mirror, seed):
    """The measures of novel slices; the nearest training slice of each, which may be mirrored, and their SSIM.

    Args:
        novel, test, train: `Measured`.
        reconstructed: images of the test slices.
        components: principal components of the training slices.
        mirror: whether the models were fitted on mirrored training slices too.
    """
    as_many = train.images[draw_of_levels(train.slice_numbers, novel.slice_numbers, seed)]
    of_novel, of_test, of_train = (
        modules.project(images, components) for images in (novel.images, test.images, as_many)
    )

    variants = dataset.with_mirrored(train.images, mirror)
    seen, levels = np.concatenate(variants), np.tile(train.slice_numbers, len(variants))
    near_novel, novel_ssim = nearest_training_slices(novel.images, seen, "novel slices")
    near_reconstructed, reconstructed_ssim = nearest_training_slices(reconstructed, seen, "reconstructions")
    near_test, test_ssim = nearest_training_slices(test.images, seen, "test slices")
    measures = {
        "frechet_pca": frechet_distance(of_novel, of_test),
        "frechet_pca_floor": frechet_distance(of_train, of_test),
        "sharpness_ratio": ratio(sharpness(novel.images), sharpness(test.images)),
        "nearest_train_ssim_mean": novel_ssim.mean(),
        "nearest_train_ssim_max": novel_ssim.max(),
        "reconstruction_nearest_train_ssim_mean": reconstructed_ssim.mean(),
        "test_nearest_train_ssim_mean": test_ssim.mean(),
        "level_error": level_error(novel.slice_numbers, levels[near_novel]),
        "reconstruction_level_error": level_error(test.slice_numbers, levels[near_reconstructed]),
        "test_level_error": level_error(test.slice_numbers, levels[near_test]),
        **variance_ratios(novel.images, novel.slice_numbers, test, train, components, seed),
    }
    return measures, seen[near_novel], novel_ssim


def measure_heads(heads, pixelcnn, test, reconstructed, train, components, seed):
    """The measures of whole novel heads.

    Args:
        heads: images (N, L, H, W).
        test, train: `Measured`.
        reconstructed: images of the test slices.
        components: principal components of the training slices.
    """
    labels = pixelcnn.labels_of(test.slice_numbers)
    below = dataset.slices_below(test.cases, labels)
    upper = np.flatnonzero(below >= 0)
    lower, nats = below[upper], None
    if len(upper):
        nats = nats_of_slices(pixelcnn, test.codes[upper], labels=labels[upper], below=test.codes[lower]).mean()

    def change(images):
        return np.abs(images[upper] - images[lower]).mean() if len(upper) else None

    slice_numbers = np.tile(pixelcnn.slice_numbers, len(heads))
    return {
        "count": len(heads),
        "nats_per_code": nats,
        "neighbour_change": np.mean([np.abs(np.diff(head, axis=0)).mean() for head in heads]),
        "reconstruction_neighbour_change": change(reconstructed),
        "test_neighbour_change": change(test.images),
        **variance_ratios(heads.reshape(-1, *heads.shape[2:]), slice_numbers, test, train, components, seed),
    }


# ---- Pictures ------------------------------------------------------------------------


def show(axis, image, caption="", **options):
    axis.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(caption, fontsize=8)


def picture_grid(title, rows, size=1.3):
    """A figure of rows of pictures: (name, images, captions or none) each; a picture is `size` inches wide."""
    columns = max(len(images) for _, images, _ in rows)
    figure = Figure(figsize=(size * columns, (size + 0.25) * len(rows) + 0.5), layout="tight")
    for axes, (name, images, captions) in zip(figure.subplots(len(rows), columns, squeeze=False), rows):
        for axis, image, caption in zip(axes, images, captions or [""] * columns):
            show(axis, image, caption)
        for axis in axes[len(images) :]:
            axis.set_axis_off()
        axes[0].set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def evenly(count, total):
    """`count` indices spread over range(total), chosen by nothing but their place."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def draw_reconstructions(path, test, reconstructed, num_embeddings, kind):
    chosen = evenly(8, len(test.images))
    captions = [f"SSIM {similarity:.3f}" for similarity in ssim(test.images[chosen], reconstructed[chosen])]
    codes = [colormaps["nipy_spectral"](grid / (num_embeddings - 1)) for grid in test.codes[chosen]]
    rows = [(f"test {kind}", test.images[chosen], None), ("reconstruction", reconstructed[chosen], captions)]
    rows.append(("codes", codes, None))
    title = f"{len(chosen)} of {len(test.images)} test {kind}s, evenly spaced, not selected"
    dataset.write_figure(path, picture_grid(title, rows, 1.5))


def pictured(slice_numbers, rows=3, columns=8):
    """Which samples are shown, (rows, columns): levels in order, evenly spaced, and the first draws of each."""
    levels = np.unique(slice_numbers)
    of_level = [np.flatnonzero(slice_numbers == level)[:rows] for level in levels[evenly(columns, len(levels))]]
    if len(of_level) == columns and all(len(draws) == rows for draws in of_level):
        return np.stack(of_level, axis=1)
    first = np.argsort(slice_numbers[: rows * columns], kind="stable")
    columns = min(columns, len(first))
    return first[: len(first) // columns * columns].reshape(-1, columns)


def draw_samples(path, novel, nearest, similarity, kind, options):
    """Rows of novel slices, and under each the nearest training slice."""
    rows, chosen = [], pictured(novel.slice_numbers)
    for indices in chosen:
        numbers = novel.slice_numbers[indices]
        rows.append(("novel", novel.images[indices], [f"slice {number}" if number >= 0 else "" for number in numbers]))
        captions = [f"SSIM {value:.2f}" for value in similarity[indices]]
        rows.append(("nearest in train", nearest[indices], captions))
    title = (
        f"Novel {kind}s, not selected: {chosen.size} of {len(novel.images)}, seed {options.seed}, "
        f"temperature {options.temperature}. Under each its nearest training {kind} and their SSIM"
    )
    dataset.write_figure(path, picture_grid(title, rows))


def draw_completions(path, vqvae, pixelcnn, test, kind, options):
    """Keep the codes of the upper half of test slices and draw the rest, three times."""
    chosen, draws = evenly(8, len(test.images)), 3
    known = np.tile(test.codes[chosen], (draws, 1, 1))
    kept = known.shape[1] // 2  # rows of codes
    known[:, kept:] = -1
    labels = np.tile(pixelcnn.labels_of(test.slice_numbers[chosen]), draws)
    # Without scores: drawn ones would not be those of the upper half.
    scores = np.full((len(known), pixelcnn.num_scores), np.nan, np.float32)
    streams = np.arange(len(known)).reshape(-1, draws).T.ravel()
    drawn = pixelcnn.sample(
        len(known), options.seed, options.temperature, known=known, streams=streams, labels=labels, scores=scores
    )
    rows = [(f"test {kind}", test.images[chosen], None)]
    rows += [("lower half drawn", images, None) for images in np.split(decode(vqvae, drawn), draws)]
    title = f"Codes above the line kept, those below drawn: seed {options.seed}, temperature {options.temperature}"
    figure = picture_grid(title, rows, 1.5)
    border = test.images.shape[1] * kept / known.shape[1] - 0.5
    for axis in figure.axes[len(chosen) :]:
        axis.axhline(border, color="tab:orange", linewidth=0.8)
    dataset.write_figure(path, figure)


def draw_head_cuts(path, heads, slice_numbers, test, kind, options):
    """A row for each head: a real one, then novel ones; slices from the lowest up, then cut the other two ways."""
    rows, count = [], min(3, len(heads))
    named = np.flatnonzero((test.cases >= 0) & (test.slice_numbers >= 0))
    real = named[test.cases[named] == test.cases[named[:1]]]
    shown = [(f"test {kind}", test.images[real], test.slice_numbers[real])] if len(real) else []
    for name, head, numbers in shown + [(f"novel {i}", heads[i], slice_numbers) for i in range(count)]:
        places = evenly(8, len(head))
        cuts = [head[::-1, head.shape[1] // 2], head[::-1, :, head.shape[2] // 2]]
        captions = [f"slice {numbers[place]}" for place in places]
        rows.append((name, [*head[places], *cuts], [*captions, "sagittal", "coronal"]))
    title = (
        f"Whole novel heads, not selected: the first {count} of {len(heads)}, seed {options.seed}, "
        f"temperature {options.temperature}" + ("; and the first test head" if len(real) else "")
    )
    dataset.write_figure(path, picture_grid(title, rows))


# ---- A run, and what is drawn from it ------------------------------------------------


def load_run(run):
    """The VQ-VAE and the PixelCNN of a finished `Run`."""
    if run.config is None:
        command = f"python train.py --run {quote(run.folder)}"
        raise dataset.UserError(f"--run {run.folder}: no run here; first {command}")
    vqvae, pixelcnn = run.model("vqvae"), run.model("pixelcnn")
    if pixelcnn is None:
        raise dataset.UserError(f"--run {run.folder}: training has not finished; give the same train.py command again")
    return vqvae, pixelcnn


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
    """What the pictures call a slice. Args: the entry "data" of config.json or report.json."""
    return "phantom" if data["phantom"] else "slice"


def check_asked(options, pixelcnn):
    """Refuse what this run cannot draw, before anything is read."""
    numbers = pixelcnn.slice_numbers
    for number in options.slice or []:
        if number not in numbers:
            known = f"the slice numbers {', '.join(map(str, numbers))}" if numbers else "no slice numbers"
            raise dataset.UserError(f"--slice {number}: this run has {known}")
    if options.heads and not pixelcnn.below:
        remedy = "train on heads with neighbouring slices, without --no-below"
        raise dataset.UserError(f"--heads: this run knows nothing of the slice below; {remedy}")


def decode(vqvae, codes):
    """Codes int32 (N, h, w) -> float32 (N, H, W) in [0, 1]."""
    return vqvae.decode(codes, dataset.verbosity()).numpy()[..., 0]


def encode_split(split, vqvae, pixelcnn):
    images = dataset.to_float(split.images)
    known = pixelcnn.labels_of(split.slice_numbers) >= 0
    codes = vqvae.encode(images, dataset.verbosity()).numpy()
    return Measured(images[..., 0], np.where(known, split.slice_numbers, -1), codes, split.cases)


def draw_novel(vqvae, pixelcnn, test_numbers, options):
    """The novel slices that are asked for, of the levels of --slice or of the test slices, and the seconds it took."""
    numbers = np.array(options.slice or test_numbers, np.int32)
    numbers = np.resize(numbers, options.num_samples or len(test_numbers))
    print(f"sampling {len(numbers)} novel slices")
    started = time.monotonic()
    labels, bar = pixelcnn.labels_of(numbers), dataset.verbosity()
    codes = pixelcnn.sample(len(numbers), options.seed, options.temperature, verbose=bar, labels=labels).numpy()
    return Measured(decode(vqvae, codes), numbers, codes), time.monotonic() - started


def draw_heads(pixelcnn, count, seed, temperature):
    """Codes of whole novel heads, each slice given the one below: int32 (count, L, h, w)."""
    print(f"sampling {count} whole heads")
    slices, below = [], np.full((count, *pixelcnn.grid), -1, np.int32)
    for label in dataset.progress(range(pixelcnn.num_labels), "slice"):
        conditions = {"labels": np.full(count, label, np.int32), "below": below}
        if pixelcnn.num_scores:  # with one seed, for they belong together
            conditions["scores"] = pixelcnn.draw_scores(conditions["labels"], seed)
        below = pixelcnn.sample(count, (seed + 65537 * label) % 2**31, temperature, **conditions).numpy()
        slices.append(below)
    return np.stack(slices, axis=1)


def predict(options):
    run = Run(options.run)
    vqvae, pixelcnn = load_run(run)
    check_asked(options, pixelcnn)
    splits, data = load_data(options, run)
    for name in ("train", "test"):
        if len(splits[name].images) < 2:  # one has no covariance
            raise dataset.UserError(f"keras_png_slices_{name} has 1 slice, the measures need at least 2: add some")
    with run.one_writer():
        report = measure_and_draw(options, run, vqvae, pixelcnn, splits, data)
        dataset.write_json(run.folder / "report.json", report)
    print((run.folder / "report.json").read_text())
    print(f"done: the pictures and report.json are in {run.folder}")


def measure_and_draw(options, run, vqvae, pixelcnn, splits, data):
    """Write all files but report.json, and return what goes into that."""
    folder, kind, mirror = run.folder, kind_of(run.config["data"]), run.config["settings"]["mirror"]
    print("encoding and reconstructing")
    train, test = (encode_split(splits[name], vqvae, pixelcnn) for name in ("train", "test"))
    reconstructed = decode(vqvae, test.codes)
    novel, seconds = draw_novel(vqvae, pixelcnn, test.slice_numbers, options)
    components = modules.principal_components(train.images, COMPONENTS)
    measures, nearest, similarity = measure_samples(novel, test, reconstructed, train, components, mirror, options.seed)
    report = {
        "data": data,
        "reconstruction": measure_reconstructions(test, reconstructed),
        "codebook": measure_codebook(pixelcnn.num_embeddings, test.codes),
        "prior": measure_prior(pixelcnn, test, train),
        "samples": {
            "count": len(novel.images),
            "seed": options.seed,
            "temperature": options.temperature,
            "slices": options.slice,  # None: those of the test slices
            "seconds": seconds,
            **measures,
        },
    }
    for name in ("report.json", *WRITTEN):  # of an earlier call; the new report comes last
        (folder / name).unlink(missing_ok=True)
    draw_reconstructions(folder / "reconstructions.png", test, reconstructed, pixelcnn.num_embeddings, kind_of(data))
    draw_samples(folder / "samples.png", novel, nearest, similarity, kind, options)
    dataset.write_arrays(folder / "samples.npz", images=novel.images, codes=novel.codes, labels=novel.slice_numbers)
    if options.complete:
        draw_completions(folder / "completions.png", vqvae, pixelcnn, test, kind_of(data), options)
    if options.heads:
        codes = draw_heads(pixelcnn, options.heads, options.seed, options.temperature)
        heads = decode(vqvae, codes.reshape(-1, *pixelcnn.grid)).reshape(*codes.shape[:2], *test.images.shape[1:])
        report["heads"] = measure_heads(heads, pixelcnn, test, reconstructed, train, components, options.seed)
        draw_head_cuts(folder / "heads.png", heads, pixelcnn.slice_numbers, test, kind, options)
        dataset.write_arrays(folder / "heads.npz", images=heads, codes=codes)
    return report


# ---- Anomalies in other slices -------------------------------------------------------


def numbers_of(names, given):
    """The slice number of each file: from its name, else the given one, else -1."""
    numbers = np.array([dataset.slice_number(name) for name in names])
    return np.where(numbers < 0, given[0] if given else -1, numbers)


def picture_names(names):
    """NAME.png of each file NAME.xyz, numbered where several have one name, also where case does not count."""
    pictures = {}  # casefolded -> name
    for name in names:
        stem = pathlib.Path(name).stem
        candidates = itertools.chain([stem], (f"{stem[:60]}_{number}" for number in itertools.count(1)))
        picture = next(candidate for candidate in candidates if candidate.casefold() not in pictures)
        pictures[picture.casefold()] = picture
    return [f"{picture}.png" for picture in pictures.values()]


def draw_anomalies(folder, names, found, kind):
    """A picture of each slice: input, surprise, mean restoration, anomaly map, on one scale for the whole folder."""
    maps = {
        "input": (found["images"], "gray", 1),
        "surprise, nats": (found["surprise"], "inferno", found["surprise"].max()),
        "mean restoration": (found["restored"], "gray", 1),
        "anomaly map": (found["anomaly_map"], "inferno", found["anomaly_map"].max()),
    }
    figure = Figure(figsize=(9.6, 2.9), dpi=85, layout="constrained")
    for axis, (title, (values, cmap, highest)) in zip(figure.subplots(1, len(maps)), maps.items()):
        show(axis, values[0], cmap=cmap, vmax=highest)
        axis.set_title(title, fontsize=9)
        if cmap != "gray":
            figure.colorbar(axis.images[0], ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
    axes, title = figure.axes[: len(maps)], figure.suptitle(names[0], fontsize=9, parse_math=False)
    changing = [title, *(artist for axis in axes for artist in (axis.images[0], *axis.spines.values()))]

    # What is the same in all pictures is laid out and drawn once.
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")
    for artist in changing:
        artist.set_animated(True)  # left out of what is drawn next
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    print(f"drawing {len(names)} pictures")
    for i, picture in enumerate(dataset.progress(picture_names(names), "picture")):
        canvas.restore_region(background)
        for axis, (values, _, _) in zip(axes, maps.values()):
            axis.images[0].set_data(values[i])
        score = f"score {found['score'][i]:.2f}, above {found['percentile'][i]:.0f} % of the validation {kind}s"
        title.set_text(f"{names[i]}: {score}")
        for artist in changing:
            figure.draw_artist(artist)
        dataset.write_whole(folder / picture, Image.fromarray(np.asarray(canvas.buffer_rgba())).save)


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


def make_detector(options, run, vqvae, pixelcnn):
    """`AnomalyDetector` of a run, and what the data are that it takes for normal."""
    splits, data = load_data(options, run, ("train", "validate"))
    print("examining validation slices, to know what is normal")
    normal = [
        (dataset.to_float(splits[name].images), pixelcnn.labels_of(splits[name].slice_numbers))
        for name in ("train", "validate")
    ]
    mirror = run.config["settings"]["mirror"]
    return modules.AnomalyDetector(vqvae, pixelcnn, *normal, mirror, dataset.verbosity()), data


def find_anomalies(options):
    run, folder = Run(options.run), options.anomalies
    vqvae, pixelcnn = load_run(run)
    check_asked(options, pixelcnn)
    if not folder.is_dir():
        raise dataset.UserError(f"--anomalies {folder}: no such folder; name one with PNG or JPEG slices in it")
    results = run.folder / "anomalies"
    if folder.resolve().is_relative_to(results.resolve()):
        raise dataset.UserError(f"--anomalies {folder}: the results would replace the slices; name another folder")
    paths = dataset.list_slices(folder, "put some there, or name another folder")
    names = np.array([os.fsencode(path.name).decode("utf-8", "replace") for path in paths])
    images = dataset.to_float(dataset.read_images(paths, "anomalies", run.config["settings"]["image_size"]))

    detector, data = make_detector(options, run, vqvae, pixelcnn)
    print(f"examining {len(images)} slices")
    labels = pixelcnn.labels_of(numbers_of(names, options.slice))
    found = {"images": images[..., 0], **detector.examine(images, labels, options.seed, dataset.verbosity())}
    found["labels"] = np.array([*pixelcnn.slice_numbers, -1], np.int32)[found["labels"]]  # numbers as in the names
    with run.one_writer(), dataset.write_errors(results):
        (results / "anomalies.csv").unlink(missing_ok=True)  # of an earlier call; the new one comes last
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        draw_anomalies(results, names, found, kind_of(data))
        save_anomalies(results, names, found)


# ---- Main ----------------------------------------------------------------------------


def parse_arguments(arguments):
    number = dataset.number
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    where = "folder of the slices (default: where the run was trained)"
    parser.add_argument("--data", type=dataset.folder, help=where)
    filled = "folder that train.py filled (default: %(default)s)"
    parser.add_argument("--run", type=dataset.folder, default="runs/oasis", help=filled)
    count, typical = "default: the number of test slices", "1 samples the model itself"
    parser.add_argument("--num-samples", type=number(int, 2, 10**5), metavar="N", help=count)
    parser.add_argument("--temperature", type=number(float, 0.01, 100), default=1.0, metavar="T", help=typical)
    drawn = "of all that is drawn (default: %(default)s)"
    parser.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, metavar="N", help=drawn)
    levels = "levels to draw, in turn (default: the test's); of --anomalies the one where a name has none"
    parser.add_argument("--slice", type=int, nargs="+", metavar="N", help=levels)
    parser.add_argument("--complete", action="store_true", help="draw the lower half of test slices, given the upper")
    heads = "draw N whole heads too, each slice given that below"
    parser.add_argument("--heads", type=number(int, 1, 10**4), metavar="N", help=heads)
    unexpected = "show what is unexpected in the slices of this folder"
    parser.add_argument("--anomalies", type=dataset.folder, metavar="FOLDER", help=unexpected)
    options = parser.parse_args(arguments)
    if options.anomalies is not None:
        if options.complete or options.heads or options.num_samples is not None or options.temperature != 1:
            parser.error(
                "--anomalies draws no novel slices: leave out --complete, --heads, --num-samples and --temperature"
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
