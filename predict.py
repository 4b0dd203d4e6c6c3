"""Reconstructs the test slices, draws novel ones, and measures both.

    python predict.py --run runs/oasis                   # a novel slice of the level of every test slice
    python predict.py --run runs/oasis --slice 5 20      # novel slices of these two levels in turn
    python predict.py --run runs/oasis --complete        # also completes the lower half of test slices

Into the run directory go reconstructions.png, samples.png, samples.npz and report.json (with
--complete also completions.png). Everything is measured on the whole test split.
"""

import argparse
import json
import pathlib
import shlex
import sys
import time

import dataset  # first, for it keeps TensorFlow's start-up log off the screen

# isort: split
import matplotlib
import numpy as np
import scipy.linalg
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


def interval(subjects, statistic):
    """95 % of what a statistic of slices becomes with other subjects: a bootstrap over whole subjects.

    Args:
        subjects: the subject of each slice; None where it is not known.
        statistic: of the indices of slices.

    Returns: [low, high]; None where there are not two subjects.
    """
    if subjects is None or len(set(subjects)) < 2:
        return None
    slices_of = [np.flatnonzero(np.array(subjects) == subject) for subject in sorted(set(subjects))]
    rng = np.random.default_rng(0)
    draws = rng.integers(len(slices_of), size=(RESAMPLES, len(slices_of)))
    values = [statistic(np.concatenate([slices_of[i] for i in draw])) for draw in draws]
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
    share = np.bincount(codes.ravel(), minlength=num_embeddings) / codes.size
    return float(-np.sum(share[share > 0] * np.log(share[share > 0])))


# --------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------


def encode(vqvae, images):
    """Images (N, 64, 64) -> codes int32 (N, h, w)."""
    return dataset.in_batches(vqvae.encode, images[..., None])


def decode(vqvae, codes):
    """Codes (N, h, w) -> images (N, 64, 64)."""
    return dataset.in_batches(vqvae.decode, codes)[..., 0]


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


def measure_prior(pixelcnn, test_codes, test_labels, train_codes, train_labels, subjects):
    nats, positions = nats_of_slices(pixelcnn, test_codes, test_labels), test_codes[0].size
    histogram = histogram_entropy(test_codes, pixelcnn.num_embeddings)
    return {
        "split": "test",
        **with_interval("nats_per_code", nats, subjects),
        "bits_per_code": nats.mean() / np.log(2),
        "bits_per_image": nats.mean() / np.log(2) * positions,
        # What the codes cost without a prior that looks at other codes, and what those it was fitted on cost.
        "histogram_bits_per_image": histogram / np.log(2) * positions,
        "train_nats_per_code": nats_of_slices(pixelcnn, train_codes, train_labels).mean(),
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


def measure_samples(samples, labels, test, reconstructed, train, seen, seed):
    """The measures of the samples, and the nearest training slice of each: index into `seen`, and SSIM.

    Args:
        samples, reconstructed: images; `labels` are the samples'.
        test, train: images and labels.
        seen: images and labels of all that the model was fitted on, the mirrored slices too.
    """
    components = principal_components(train[0])
    scores = {
        name: project(x, components) for name, x in (("samples", samples), ("test", test[0]), ("train", train[0]))
    }
    as_many = scores["train"][draw_of_labels(train[1], labels, seed)]

    nearest, similarity = nearest_training_slices(samples, seen[0], "novel slices")
    of_reconstructions = nearest_training_slices(reconstructed, seen[0], "reconstructions of test slices")
    of_test = nearest_training_slices(test[0], seen[0], "test slices")
    measures = {
        "frechet_pca": frechet_distance(scores["samples"], scores["test"]),
        "frechet_pca_floor": frechet_distance(as_many, scores["test"]),
        "sharpness_ratio": sharpness(samples) / sharpness(test[0]),
        "nearest_train_ssim_mean": similarity.mean(),
        "nearest_train_ssim_max": similarity.max(),
        "reconstruction_nearest_train_ssim_mean": of_reconstructions[1].mean(),
        "test_nearest_train_ssim_mean": of_test[1].mean(),
        "test_nearest_train_ssim_max": of_test[1].max(),
        "level_error": level_error(labels, seen[1][nearest]),
        "reconstruction_level_error": level_error(test[1], seen[1][of_reconstructions[0]]),
        "test_level_error": level_error(test[1], seen[1][of_test[0]]),
        "component_variance_ratio": scores["samples"].var(0)[TIMID].mean() / scores["train"].var(0)[TIMID].mean(),
    }
    return measures, nearest, similarity


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


def draw_reconstructions(path, test, reconstructed, codes, num_embeddings, kind):
    chosen = evenly(8, len(test))
    figure, axes = plt.subplots(3, len(chosen), figsize=(1.5 * len(chosen), 5.2), squeeze=False)
    for axis, i in zip(axes.T, chosen):
        show(axis[0], test[i])
        show(axis[1], reconstructed[i], f"SSIM {ssim(test[i : i + 1], reconstructed[i : i + 1])[0]:.3f}")
        show(axis[2], codes[i], cmap="nipy_spectral", vmax=num_embeddings - 1)
    for axis, label in zip(axes[:, 0], (f"test {kind}", "reconstruction", "codes")):
        axis.set_ylabel(label)
    figure.suptitle(f"{len(chosen)} of {len(test)} test {kind}s, evenly spaced, not selected", fontsize=10)
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


def draw_samples(path, samples, labels, nearest, similarity, caption):
    """Rows of novel slices, and under each the nearest training slice."""
    shown = pictured(labels)
    rows, columns = shown.shape
    figure, axes = plt.subplots(2 * rows, columns, figsize=(1.2 * columns, 2.85 * rows + 0.5), squeeze=False)
    for (row, column), i in np.ndenumerate(shown):
        show(axes[2 * row, column], samples[i], f"slice {labels[i]}" if labels[i] >= 0 else "")
        show(axes[2 * row + 1, column], nearest[i], f"SSIM {similarity[i]:.2f}")
    for row in range(rows):
        axes[2 * row, 0].set_ylabel("novel", fontsize=9)
        axes[2 * row + 1, 0].set_ylabel("nearest in train", fontsize=9)
    figure.suptitle(caption, fontsize=10)
    save(figure, path)


def draw_completions(path, vqvae, pixelcnn, test, labels, codes, seed, temperature, kind):
    """Keep the codes of the upper half of test slices and draw the rest, three times."""
    chosen, draws = evenly(8, len(test)), 3
    known = np.repeat(codes[chosen], draws, axis=0)
    known[:, codes.shape[1] // 2 :] = -1
    drawn = pixelcnn.sample(len(known), seed, temperature, known=known, labels=np.repeat(labels[chosen], draws))
    completed = decode(vqvae, drawn)
    completed = completed.reshape(len(chosen), draws, *test.shape[1:])
    figure, axes = plt.subplots(1 + draws, len(chosen), figsize=(1.5 * len(chosen), 6.6), squeeze=False)
    for axis, original, drawn in zip(axes.T, test[chosen], completed):
        show(axis[0], original)
        for below, image in zip(axis[1:], drawn):
            show(below, image)
            below.axhline(test.shape[1] / 2 - 0.5, color="tab:orange", linewidth=0.8)
    axes[0, 0].set_ylabel(f"test {kind}")
    for axis in axes[1:, 0]:
        axis.set_ylabel("lower half drawn")
    figure.suptitle(
        f"Codes above the line kept, those below drawn: seed {seed}, temperature {temperature}", fontsize=10
    )
    save(figure, path)


# --------------------------------------------------------------------------------------
# Main
# --------------------------------------------------------------------------------------


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", help="folder of the slices (default: where the run was trained)")
    parser.add_argument("--run", default="runs/oasis", help="folder that train.py filled (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, metavar="N", help="default: the number of test slices")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="1 samples the model itself")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the novel slices (default: %(default)s)")
    parser.add_argument(
        "--slice", type=int, nargs="+", metavar="N", help="levels to draw, in turn (default: the test's)"
    )
    parser.add_argument("--complete", action="store_true", help="draw the lower half of test slices, given the upper")
    options = parser.parse_args(arguments)
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
                f"--run {run}: {name} is not trained to its end; give the same train.py command again"
            )
        if not path.exists():
            raise dataset.UserError(f"{path} is missing: restore it, or train again in another --run")
        models.append(dataset.load_model(path, "train again in another --run", compile=False))
        if dataset.file_checksum(path) != config["finished"][name]:
            raise dataset.UserError(f"{path} is not the model that this run was finished with: restore it")
    return config, *models


def load_data(options, config):
    """The splits, and what report.json says of them."""
    folder = options.data or config["data"]["folder"]
    splits = dataset.load(folder)
    for name in ("train", "test"):
        if len(splits[name].images) < 2:  # one has no covariance
            raise dataset.UserError(f"keras_png_slices_{name} has 1 slice, the measures need at least 2: add some")
    found = dataset.fingerprint(splits)
    others = [name for name in splits if found[name] != config["data"].get(name)]
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


def asked_labels(options, pixelcnn, test_labels):
    """The label of each novel slice: those of --slice in turn, else those of the test slices."""
    if options.slice and not pixelcnn.num_labels:
        raise dataset.UserError("--slice: this run knows no slice numbers, its files were not named case_N_slice_M")
    if options.slice and max(options.slice) >= pixelcnn.num_labels:
        raise dataset.UserError(
            f"--slice must be from 0 to {pixelcnn.num_labels - 1} in this run, not {max(options.slice)}"
        )
    labels = options.slice or test_labels
    return np.resize(labels, options.num_samples or len(test_labels)).astype(np.int32)


def predict(options):
    print(modules.set_up_devices())
    run = pathlib.Path(options.run)
    config, vqvae, pixelcnn = load_run(run)
    splits, data = load_data(options, config)
    kind = "phantom" if data["phantom"] else "slice"
    train, test = (splits[name].images.astype(np.float32) / 255 for name in ("train", "test"))
    train_labels, test_labels = (dataset.known_labels(splits[name], pixelcnn.num_labels) for name in ("train", "test"))
    labels = asked_labels(options, pixelcnn, test_labels)
    subjects = splits["test"].subjects

    print("encoding and reconstructing")
    train_codes, test_codes = encode(vqvae, train), encode(vqvae, test)
    reconstructed = decode(vqvae, test_codes)

    print(f"sampling {len(labels)} novel {kind}s")
    started = time.time()
    codes = pixelcnn.sample(len(labels), options.seed, options.temperature, labels=labels).numpy()
    samples = decode(vqvae, codes)
    seconds = time.time() - started

    seen = train, train_labels
    if config["settings"]["mirror"]:
        seen = np.concatenate([train, dataset.mirrored(train)]), np.tile(train_labels, 2)
    measures, nearest, similarity = measure_samples(
        samples, labels, (test, test_labels), reconstructed, (train, train_labels), seen, options.seed
    )
    report = {
        "data": data,
        "reconstruction": measure_reconstructions(test, reconstructed, subjects),
        "codebook": measure_codebook(pixelcnn.num_embeddings, test_codes, train_codes),
        "prior": measure_prior(pixelcnn, test_codes, test_labels, train_codes, train_labels, subjects),
        "samples": {
            "count": len(labels),
            "seed": options.seed,
            "temperature": options.temperature,
            "seconds": seconds,
            **measures,
        },
    }

    draw_reconstructions(run / "reconstructions.png", test, reconstructed, test_codes, pixelcnn.num_embeddings, kind)
    caption = (
        f"Novel {kind}s, not selected: {pictured(labels).size} of {len(labels)}, seed {options.seed}, "
        f"temperature {options.temperature}. Under each its nearest training {kind} and their SSIM"
    )
    draw_samples(run / "samples.png", samples, labels, seen[0][nearest], similarity, caption)
    if options.complete:
        draw_completions(
            run / "completions.png",
            *(vqvae, pixelcnn, test, test_labels, test_codes, options.seed, options.temperature, kind),
        )

    def save_samples(path):
        with open(path, "wb") as file:
            np.savez_compressed(file, images=samples, codes=codes, labels=labels)

    dataset.write_whole(run / "samples.npz", save_samples)
    dataset.write_json(run / "report.json", report)
    print(json.dumps(report, indent=2, default=float))


def main(arguments=None):
    options = parse_arguments(arguments)
    try:
        predict(options)
    except dataset.UserError as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("predict.py: stopped; the same command starts again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
