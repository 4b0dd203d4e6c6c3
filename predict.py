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
import os
import pathlib
import shlex
import shutil
import sys
import time

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from skimage.metrics import structural_similarity

import dataset
import modules

COMPONENTS = 64  # principal components of frechet_pca
WHOLE_SLICE = slice(2, 12)  # principal components 3 to 12: differences of whole slices within a level
NEIGHBOURS = 20  # training slices, nearest by L2, among which the most similar is looked for
RESAMPLES = 1000  # of the test subjects, for an interval
WANG = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}  # SSIM as in Wang et al. 2004

# --------------------------------------------------------------------------------------
# Measures. Images are float32 (N, 64, 64) in [0, 1]
# --------------------------------------------------------------------------------------


def ssim(images, others, **options):
    """Structural similarity of each pair: (N,)."""
    pairs = zip(images, others, strict=True)
    return np.array([structural_similarity(a, b, data_range=1.0, **options) for a, b in pairs])


def psnr(images, others):
    """Peak signal-to-noise ratio of each pair in dB, the peak being 1: (N,). Infinite for equal ones."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.square(images - others).mean(axis=(1, 2)))


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
    return variance.mean() / expected.mean() if expected.size else None


def resample(cases, count):
    """Indices of the slices of as many subjects, drawn with replacement, for a bootstrap: a list of `count` arrays."""
    slices_of = [np.flatnonzero(cases == case) for case in np.unique(cases)]
    draws = np.random.default_rng(0).integers(len(slices_of), size=(count, len(slices_of)))
    return [np.concatenate([slices_of[i] for i in draw]) for draw in draws]


def with_interval(name, values, cases):
    """The mean of a measure of slices, and what 95 % of draws of other subjects give, as two entries of the report.

    The interval is None where names do not tell at least two subjects.
    """
    limits = None
    if cases.min() >= 0 and len(np.unique(cases)) > 1:
        means = [values[chosen].mean() for chosen in resample(cases, RESAMPLES)]
        limits = np.percentile(means, [2.5, 97.5]).tolist()
    return {name: values.mean(), f"{name}_interval": limits}


def nearest_training_slices(images, train, label):
    """Index of, and SSIM with, the most similar training slice of each image: (N,), (N,)."""
    print(f"comparing {len(images)} {label} with the training slices")
    train_flat = train.reshape(len(train), -1)
    squares, near = np.square(train_flat).sum(axis=1), min(NEIGHBOURS, len(train))
    indices, similarities = np.empty(len(images), int), np.empty(len(images))
    for i, image in enumerate(dataset.progress(images, "slice")):
        candidates = np.argpartition(squares - 2 * train_flat @ image.ravel(), near - 1)[:near]
        found = ssim([image] * near, train[candidates])
        indices[i], similarities[i] = candidates[found.argmax()], found.max()
    return indices, similarities


def histogram_entropy(codes):
    """Entropy in nats of the histogram of codes."""
    return stats.entropy(np.bincount(codes.ravel()))


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


class Measured:
    """Slices with what the measures need of them."""

    def __init__(self, images, labels, codes, cases=None):
        self.images = images  # float32 (N, 64, 64) in [0, 1]
        self.labels = labels  # slice numbers, int32 (N,); -1 where not known
        self.codes = codes  # int32 (N, h, w)
        self.cases = cases  # numbers of the subjects, int32 (N,); -1 where not known


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
        "sharpness_ratio": sharpness(reconstructed) / sharpness(test.images),
    }


def measure_codebook(num_embeddings, codes):
    return {
        "grid": list(codes.shape[1:]),
        "num_embeddings": num_embeddings,
        "used": len(np.unique(codes)),
        "perplexity": np.exp(histogram_entropy(codes)),
        "bits_per_image": codes[0].size * np.log2(num_embeddings),
    }


def nats_of_slices(pixelcnn, codes, **told):
    """Mean negative log-likelihood of the codes of each slice under the prior, exact and not a bound: (N,), nats."""
    return pixelcnn.nll(codes, **told).numpy().mean(axis=(1, 2), dtype=np.float64)


def measure_prior(pixelcnn, test, train):
    nats, positions = nats_of_slices(pixelcnn, test.codes, labels=test.labels), test.codes[0].size
    return {
        "split": "test",
        **with_interval("nats_per_code", nats, test.cases),
        "bits_per_code": nats.mean() / np.log(2),
        "bits_per_image": nats.mean() / np.log(2) * positions,
        # What the codes cost without a prior that looks at other codes, and what those it was fitted on cost.
        "histogram_bits_per_image": histogram_entropy(test.codes) / np.log(2) * positions,
        "train_nats_per_code": nats_of_slices(pixelcnn, train.codes, labels=train.labels).mean(),
    }


def draw_of_labels(pool, labels, seed):
    """As many indices into a pool of labels, at random, each of the label that is asked for where there is one."""
    order, chosen = np.random.default_rng(seed).permutation(len(pool)), np.empty(len(labels), int)
    for label in np.unique(labels):
        asked, having = labels == label, order[pool[order] == label]
        chosen[asked] = np.resize(having if label >= 0 and len(having) else order, asked.sum())
    return chosen


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
        mirror: whether the models were shown mirrored training slices too.
    """
    of_novel, of_test, of_train = (dataset.project(slices.images, components) for slices in (novel, test, train))
    as_many = of_train[draw_of_labels(train.labels, novel.labels, seed)]

    variants = dataset.shown_variants(train.images, mirror)
    shown, levels = np.concatenate(variants), np.tile(train.labels, len(variants))
    near_novel, novel_ssim = nearest_training_slices(novel.images, shown, "novel slices")
    near_reconstructed, reconstructed_ssim = nearest_training_slices(reconstructed, shown, "reconstructions")
    near_test, test_ssim = nearest_training_slices(test.images, shown, "test slices")
    measures = {
        "frechet_pca": frechet_distance(of_novel, of_test),
        "frechet_pca_floor": frechet_distance(as_many, of_test),
        "sharpness_ratio": sharpness(novel.images) / sharpness(test.images),
        "nearest_train_ssim_mean": novel_ssim.mean(),
        "nearest_train_ssim_max": novel_ssim.max(),
        "reconstruction_nearest_train_ssim_mean": reconstructed_ssim.mean(),
        "test_nearest_train_ssim_mean": test_ssim.mean(),
        "level_error": level_error(novel.labels, levels[near_novel]),
        "reconstruction_level_error": level_error(test.labels, levels[near_reconstructed]),
        "test_level_error": level_error(test.labels, levels[near_test]),
        "component_variance_ratio": variance_ratio(of_novel, of_train),
    }
    return measures, shown[near_novel], novel_ssim


def measure_heads(heads, pixelcnn, test, reconstructed, train, components, test_below):
    """The measures of whole novel heads.

    Args:
        heads: images (N, L, 64, 64).
        components: principal components of the training slices.
        test_below: index of the slice below each test slice, -1 where there is none.
    """
    upper = np.flatnonzero(test_below >= 0)
    lower = test_below[upper]
    told = {"labels": test.labels[upper], "below": test.codes[lower]}
    nats = nats_of_slices(pixelcnn, test.codes[upper], **told).mean() if len(upper) else None

    def change(images):
        return np.abs(images[upper] - images[lower]).mean() if len(upper) else None

    of_heads, of_train = (dataset.project(images.reshape(-1, 64, 64), components) for images in (heads, train.images))
    return {
        "count": len(heads),
        "nats_per_code": nats,
        "neighbour_change": np.abs(np.diff(heads, axis=1)).mean(),
        "reconstruction_neighbour_change": change(reconstructed),
        "test_neighbour_change": change(test.images),
        "component_variance_ratio": variance_ratio(of_heads, of_train),
    }


# --------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------


def show(axis, image, caption="", **options):
    axis.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(caption, fontsize=8)


def save(figure, path):
    dataset.write_whole(path, lambda temporary: figure.savefig(temporary, dpi=85, format="png"))


def evenly(count, total):
    """`count` indices spread over range(total), chosen by nothing but their place."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def draw_reconstructions(path, test, reconstructed, num_embeddings, kind):
    chosen = evenly(8, len(test.images))
    figure = Figure(figsize=(1.5 * len(chosen), 5.2), layout="tight")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for axis, i in zip(axes.T, chosen):
        show(axis[0], test.images[i])
        show(axis[1], reconstructed[i], f"SSIM {ssim(test.images[i : i + 1], reconstructed[i : i + 1])[0]:.3f}")
        show(axis[2], test.codes[i], cmap="nipy_spectral", vmax=num_embeddings - 1)
    for axis, label in zip(axes[:, 0], (f"test {kind}", "reconstruction", "codes")):
        axis.set_ylabel(label)
    figure.suptitle(f"{len(chosen)} of {len(test.images)} test {kind}s, evenly spaced, not selected", fontsize=10)
    save(figure, path)


def pictured(labels, rows=3, columns=8):
    """Which samples are shown, (rows, columns): levels in order, evenly spaced, and the first draws of each."""
    levels = np.unique(labels)
    of_level = [np.flatnonzero(labels == level)[:rows] for level in levels[evenly(columns, len(levels))]]
    if len(of_level) == columns and all(len(draws) == rows for draws in of_level):
        return np.stack(of_level, axis=1)
    first = np.argsort(labels[: rows * columns], kind="stable")
    columns = min(columns, len(first))
    return first[: len(first) // columns * columns].reshape(-1, columns)


def draw_samples(path, novel, nearest, similarity, kind, options):
    """Rows of novel slices, and under each the nearest training slice."""
    chosen = pictured(novel.labels)
    rows, columns = chosen.shape
    figure = Figure(figsize=(1.15 * columns, 2.7 * rows + 0.5), layout="tight")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for (row, column), i in np.ndenumerate(chosen):
        show(axes[2 * row, column], novel.images[i], f"slice {novel.labels[i]}" if novel.labels[i] >= 0 else "")
        show(axes[2 * row + 1, column], nearest[i], f"SSIM {similarity[i]:.2f}")
    for row in range(rows):
        axes[2 * row, 0].set_ylabel("novel", fontsize=9)
        axes[2 * row + 1, 0].set_ylabel("nearest in train", fontsize=9)
    figure.suptitle(
        f"Novel {kind}s, not selected: {chosen.size} of {len(novel.labels)}, seed {options.seed}, "
        f"temperature {options.temperature}. Under each its nearest training {kind} and their SSIM",
        fontsize=10,
    )
    save(figure, path)


def draw_completions(path, vqvae, pixelcnn, test, kind, options):
    """Keep the codes of the upper half of test slices and draw the rest, three times."""
    chosen, draws = evenly(8, len(test.images)), 3
    known = np.repeat(test.codes[chosen], draws, axis=0)
    known[:, known.shape[1] // 2 :] = -1
    # Scores that are drawn would not be those of the upper half.
    told = {"labels": np.repeat(test.labels[chosen], draws), "scores": pixelcnn.nothing_told(len(known))["scores"]}
    drawn = pixelcnn.sample(len(known), options.seed, options.temperature, known=known, **told)
    completed = decode(vqvae, drawn).reshape(len(chosen), draws, *test.images.shape[1:])
    figure = Figure(figsize=(1.5 * len(chosen), 6.6), layout="tight")
    axes = figure.subplots(1 + draws, len(chosen), squeeze=False)
    for axis, original, images in zip(axes.T, test.images[chosen], completed):
        show(axis[0], original)
        for below, image in zip(axis[1:], images):
            show(below, image)
            below.axhline(test.images.shape[1] / 2 - 0.5, color="tab:orange", linewidth=0.8)
    axes[0, 0].set_ylabel(f"test {kind}")
    for axis in axes[1:, 0]:
        axis.set_ylabel("lower half drawn")
    figure.suptitle(
        f"Codes above the line kept, those below drawn: seed {options.seed}, temperature {options.temperature}",
        fontsize=10,
    )
    save(figure, path)


def draw_head_cuts(path, heads, test, kind, options):
    """A row for each head: a real one, then novel ones; slices from the lowest up, then cut the other two ways."""
    real = test.images[test.cases == test.cases[0]]
    rows = {f"test {kind}": real, **{f"novel {i}": head for i, head in enumerate(heads[:3])}}
    columns = min(8, heads.shape[1])
    figure = Figure(figsize=(1.25 * (columns + 2), 1.45 * len(rows) + 0.5), layout="tight")
    axes = figure.subplots(len(rows), columns + 2, squeeze=False)
    for axis, (name, head) in zip(axes, rows.items()):
        for place, number in zip(axis, evenly(columns, len(head))):
            show(place, head[number], f"slice {number}")
        show(axis[columns], head[::-1, head.shape[1] // 2], "sagittal")
        show(axis[columns + 1], head[::-1, :, head.shape[2] // 2], "coronal")
        axis[0].set_ylabel(name, fontsize=9)
    figure.suptitle(
        f"Whole novel heads, not selected: the first {len(rows) - 1} of {len(heads)}, seed {options.seed}, "
        f"temperature {options.temperature}; and the first test head",
        fontsize=10,
    )
    save(figure, path)


# --------------------------------------------------------------------------------------
# A run, and what is drawn from it
# --------------------------------------------------------------------------------------


def load_run(run):
    """config.json of a finished run, its VQ-VAE and its PixelCNN."""
    config = dataset.read_config(run)
    if config is None:
        raise dataset.UserError(f"--run {run}: no run here; first python train.py --run {shlex.quote(str(run))}")
    vqvae, pixelcnn = (dataset.finished_model(run, name) for name in ("vqvae", "pixelcnn"))
    if pixelcnn is None:
        raise dataset.UserError(f"--run {run}: training has not finished; give the same train.py command again")
    return config, vqvae, pixelcnn


def load_data(options, config, splits):
    """The splits that are asked for, and what the report says of them."""
    folder = options.data or config["data"]["folder"]
    loaded = dataset.load(folder, splits)
    found = dataset.fingerprint(loaded)
    others = [name for name in found if found[name] != config["data"].get(name)]
    if others:
        print(f"note: other {', '.join(others)} slices than those of the training")
    return loaded, {
        "folder": str(pathlib.Path(folder).resolve()),
        **{f"{name}_{count}": split[count] for name, split in found.items() for count in ("images", "subjects")},
        "phantom": config["data"]["phantom"],
        "sha256": {name: split["sha256"] for name, split in found.items()},
        "as_trained": not others,
    }


def check_asked(options, pixelcnn):
    """Refuse what this run cannot draw, before anything is read."""
    for number in options.slice or []:
        if not 0 <= number < pixelcnn.num_labels:
            raise dataset.UserError(f"--slice {number}: this run has {pixelcnn.num_labels} slice numbers, from 0 on")
    if options.heads and not pixelcnn.tell_below:
        raise dataset.UserError("--heads: this run was not told the slice below; train without --no-below")


def decode(vqvae, codes):
    """Codes int32 (N, h, w) -> float32 (N, 64, 64) in [0, 1]."""
    return vqvae.decode(codes).numpy()[..., 0]


def encode_split(split, vqvae, num_labels):
    images = dataset.to_float(split.images)
    return Measured(images[..., 0], split.known_labels(num_labels), vqvae.encode(images).numpy(), split.cases)


def draw_novel(vqvae, pixelcnn, test_labels, options):
    """The novel slices that are asked for, of the levels of --slice or of the test slices, and the seconds it took."""
    labels = np.array(options.slice or test_labels, np.int32)
    labels = np.resize(labels, options.num_samples or len(test_labels))
    print(f"sampling {len(labels)} novel slices")
    started = time.time()
    codes = pixelcnn.sample(len(labels), options.seed, options.temperature, labels=labels).numpy()
    return Measured(decode(vqvae, codes), labels, codes), time.time() - started


def draw_heads(pixelcnn, count, seed, temperature):
    """Codes of whole novel heads, each slice given the one below: int32 (count, L, h, w)."""
    print(f"sampling {count} whole heads")
    slices, below = [], np.full((count, *pixelcnn.grid), -1, np.int32)
    for label in dataset.progress(range(pixelcnn.num_labels), "slice"):
        told = {"labels": np.full(count, label, np.int32), "below": below}
        if pixelcnn.num_scores:  # with one seed, for they belong together
            told["scores"] = pixelcnn.draw_scores(told["labels"], seed)
        below = pixelcnn.sample(count, (seed + 65537 * label) % 2**31, temperature, **told).numpy()
        slices.append(below)
    return np.stack(slices, axis=1)


def predict(options):
    run = pathlib.Path(options.run)
    config, vqvae, pixelcnn = load_run(run)
    check_asked(options, pixelcnn)
    splits, data = load_data(options, config, dataset.SPLITS)
    for name in ("train", "test"):
        if len(splits[name].images) < 2:  # one has no covariance
            raise dataset.UserError(f"keras_png_slices_{name} has 1 slice, the measures need at least 2: add some")
    kind = "phantom" if config["data"]["phantom"] else "slice"

    print("encoding and reconstructing")
    train, test = (encode_split(splits[name], vqvae, pixelcnn.num_labels) for name in ("train", "test"))
    reconstructed = decode(vqvae, test.codes)
    novel, seconds = draw_novel(vqvae, pixelcnn, test.labels, options)
    components = dataset.principal_components(train.images, min(COMPONENTS, len(train.images) - 1))
    measures, nearest, similarity = measure_samples(
        novel, test, reconstructed, train, components, config["settings"]["mirror"], options.seed
    )
    report = {
        "data": data,
        "reconstruction": measure_reconstructions(test, reconstructed),
        "codebook": measure_codebook(pixelcnn.num_embeddings, test.codes),
        "prior": measure_prior(pixelcnn, test, train),
        "samples": {
            "count": len(novel.labels),
            "seed": options.seed,
            "temperature": options.temperature,
            "slices": options.slice,  # None: those of the test slices
            "seconds": seconds,
            **measures,
        },
    }
    for name in ("completions.png", "heads.png", "heads.npz"):  # of an earlier call
        (run / name).unlink(missing_ok=True)
    draw_reconstructions(run / "reconstructions.png", test, reconstructed, pixelcnn.num_embeddings, kind)
    draw_samples(run / "samples.png", novel, nearest, similarity, kind, options)
    dataset.write_arrays(run / "samples.npz", images=novel.images, codes=novel.codes, labels=novel.labels)
    if options.complete:
        draw_completions(run / "completions.png", vqvae, pixelcnn, test, kind, options)
    if options.heads:
        codes = draw_heads(pixelcnn, options.heads, options.seed, options.temperature)
        heads = decode(vqvae, codes.reshape(-1, *pixelcnn.grid)).reshape(*codes.shape[:2], *test.images.shape[1:])
        below = dataset.slices_below(splits["test"])
        report["heads"] = measure_heads(heads, pixelcnn, test, reconstructed, train, components, below)
        draw_head_cuts(run / "heads.png", heads, test, kind, options)
        dataset.write_arrays(run / "heads.npz", images=heads, codes=codes)
    dataset.write_json(run / "report.json", report)
    print((run / "report.json").read_text())
    print(f"done: the pictures and report.json are in {run}")


# --------------------------------------------------------------------------------------
# Anomalies in other slices
# --------------------------------------------------------------------------------------


def labels_of(names, options, num_labels):
    """The slice number of each file: from its name, else --slice, else -1; -1 too for one that the run has not."""
    numbers = np.array([dataset.slice_number(name) for name in names])
    labels = np.where(numbers < 0, options.slice[0] if options.slice else -1, numbers)
    return np.where(labels < num_labels, labels, -1).astype(np.int32)


def picture_names(names):
    """NAME.png of each file NAME.xyz, numbered where several have one name, also where case does not count."""
    pictures = []
    for name in names:
        stem = picture = pathlib.Path(name).stem
        while picture.casefold() in {other.casefold() for other in pictures}:
            picture = f"{stem}_{len(pictures)}"
        pictures.append(picture)
    return [f"{picture}.png" for picture in pictures]


def draw_anomalies(folder, names, found, kind):
    """A picture of each slice: input, surprise, mean restoration, anomaly map, on one scale for the whole folder."""
    maps = {
        "input": (found["images"], "gray", 1),
        "surprise, nats": (found["surprise"], "inferno", found["surprise"].max()),
        "mean restoration": (found["restored"], "gray", 1),
        "anomaly map": (found["anomaly_map"], "inferno", found["anomaly_map"].max()),
    }
    print(f"drawing {len(names)} pictures")
    for i, picture in enumerate(dataset.progress(picture_names(names), "picture")):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        for axis, (title, (values, cmap, highest)) in zip(figure.subplots(1, len(maps)), maps.items()):
            show(axis, values[i], cmap=cmap, vmax=highest)
            axis.set_title(title, fontsize=9)
            if cmap != "gray":
                figure.colorbar(axis.images[0], ax=axis, shrink=0.8).ax.tick_params(labelsize=7)
        score = f"score {found['score'][i]:.2f}, above {found['percentile'][i]:.0f} % of the validation {kind}s"
        figure.suptitle(f"{names[i]}: {score}", fontsize=9, parse_math=False)
        save(figure, folder / picture)


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
        print(f"  {score:>9}, above {percentile:>5} % of the validation slices: {ascii(str(name))[1:-1]}")


def make_detector(options, config, vqvae, pixelcnn):
    """`AnomalyDetector` of a run."""
    splits, _ = load_data(options, config, ("train", "validate"))
    print("examining validation slices, to know what is normal")
    train, validate = (
        (dataset.to_float(splits[name].images), splits[name].known_labels(pixelcnn.num_labels))
        for name in ("train", "validate")
    )
    scores_of = dataset.principal_scores(train[0], pixelcnn.num_scores)
    return modules.AnomalyDetector(vqvae, pixelcnn, train, validate, config["settings"]["mirror"], scores_of)


def find_anomalies(options):
    run, folder = pathlib.Path(options.run), pathlib.Path(options.anomalies)
    config, vqvae, pixelcnn = load_run(run)
    check_asked(options, pixelcnn)
    if not folder.is_dir():
        raise dataset.UserError(f"--anomalies {folder}: no such folder; name one with PNG or JPEG slices in it")
    results = run / "anomalies"
    if folder.resolve().is_relative_to(results.resolve()):
        raise dataset.UserError(f"--anomalies {folder}: the results would replace the slices; name another folder")
    paths = dataset.list_slices(folder, "put some there, or name another folder")
    names = np.array([os.fsencode(path.name).decode("utf-8", "replace") for path in paths])
    labels = labels_of(names, options, pixelcnn.num_labels)
    images = dataset.to_float(dataset.read_images(paths, "anomalies"))

    detector = make_detector(options, config, vqvae, pixelcnn)
    print(f"examining {len(images)} slices")
    found = {"images": images[..., 0], **detector.examine(images, labels, options.seed)}
    with dataset.told_if_it_fails(results):
        shutil.rmtree(results, ignore_errors=True)  # what an earlier call left
        results.mkdir()
    save_anomalies(results, names, found)
    draw_anomalies(results, names, found, "phantom" if config["data"]["phantom"] else "slice")


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
    levels = "levels to draw, in turn (default: the test's); of --anomalies the one where names tell none"
    parser.add_argument("--slice", type=int, nargs="+", metavar="N", help=levels)
    parser.add_argument("--complete", action="store_true", help="draw the lower half of test slices, given the upper")
    parser.add_argument("--heads", type=int, metavar="N", help="draw N whole heads too, each slice given that below")
    parser.add_argument("--anomalies", metavar="FOLDER", help="show what is unexpected in the slices of this folder")
    options = parser.parse_args(arguments)
    if options.anomalies is not None:
        if options.complete or options.heads or options.num_samples is not None or options.temperature != 1:
            parser.error(
                "--anomalies draws no novel slices: leave out --complete, --heads, --num-samples and --temperature"
            )
        if options.slice and len(options.slice) > 1:
            parser.error("--slice with --anomalies is one number, that of all slices whose names have none")
    ranges = {"num_samples": (2, 10**6), "heads": (1, 10**4), "temperature": (0.01, 100), "seed": (0, 2**31 - 1)}
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, not {value}")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    print(modules.set_up_devices())
    return dataset.exit_code("predict.py", predict if options.anomalies is None else find_anomalies, options)


if __name__ == "__main__":
    sys.exit(main())
