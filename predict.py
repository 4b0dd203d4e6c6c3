"""Reconstructs the test slices, draws novel ones, and measures both.

    python predict.py --run runs/oasis                   # as many novel slices as there are test slices
    python predict.py --run runs/oasis --complete        # also completes the lower half of test slices

Into the run directory go reconstructions.png, samples.png, samples.npz and report.json (with
--complete also completions.png). Everything is measured on the whole test split.
"""

import argparse
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import matplotlib
import numpy as np
import scipy.linalg
import tensorflow as tf
import tensorflow_probability as tfp
from skimage.metrics import structural_similarity

import dataset
import modules  # noqa: F401 - registers the classes that load_model needs

matplotlib.use("agg")
from matplotlib import pyplot as plt

COMPONENTS = 64  # principal components of frechet_pca
NEIGHBOURS = 20  # training slices, nearest by L2, among which the most similar is looked for
PICTURED = 16  # novel slices in samples.png
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
    """Mean (P,) and the leading principal components (P, COMPONENTS) of the P pixels."""
    pixels = images.reshape(len(images), -1)
    mean = pixels.mean(axis=0)
    count = min(COMPONENTS, len(pixels) - 1)
    size = pixels.shape[1]
    covariance = np.cov(pixels.astype(np.float32), rowvar=False, dtype=np.float32)
    return mean, scipy.linalg.eigh(covariance, subset_by_index=[size - count, size - 1])[1]


def frechet_distance(images, others, components):
    """Frechet distance between Gaussians fitted to two sets of images, in principal components.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Dowson and Landau 1982.
    """
    mean, axes = components
    first, second = ((x.reshape(len(x), -1) - mean).astype(np.float64) @ axes for x in (images, others))
    cov1, cov2 = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (first, second))
    # tr (C1 C2)^(1/2) by the eigenvalues of C1 C2, which are real and not negative.
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov1 @ cov2).real, 0)).sum()
    return float(np.square(first.mean(0) - second.mean(0)).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


def nearest_training_slices(images, train, label):
    """Index of, and SSIM with, the most similar training slice of each image: (N,), (N,)."""
    flat, train_flat = images.reshape(len(images), -1), train.reshape(len(train), -1)
    distances = np.square(train_flat).sum(axis=1) - 2 * flat @ train_flat.T
    candidates = np.argsort(distances, axis=1)[:, :NEIGHBOURS]
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


def nats_per_code(pixelcnn, codes):
    """Mean negative log-likelihood of codes under the prior: exact, not a bound."""

    @tf.function(reduce_retracing=True)
    def negative_log_likelihood(batch):
        return -tfp.distributions.Categorical(logits=pixelcnn(batch)).log_prob(batch)

    return float(dataset.in_batches(negative_log_likelihood, codes).mean(dtype=np.float64))


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


def measure_reconstructions(test, reconstructed):
    similarity = ssim(test, reconstructed)
    return {
        "split": "test",
        "images": len(test),
        "ssim_mean": similarity.mean(),
        "ssim_std": similarity.std(),
        "ssim_min": similarity.min(),
        "ssim_gaussian_mean": ssim(test, reconstructed, **WANG).mean(),
        "psnr_mean": psnr(test, reconstructed).mean(),
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


def measure_prior(pixelcnn, test_codes, train_codes):
    nats, positions = nats_per_code(pixelcnn, test_codes), test_codes[0].size
    histogram = histogram_entropy(test_codes, pixelcnn.num_embeddings)
    return {
        "split": "test",
        "nats_per_code": nats,
        "bits_per_code": nats / np.log(2),
        "bits_per_image": nats / np.log(2) * positions,
        # What the codes cost without a prior that looks at other codes, and what those it was fitted on cost.
        "histogram_bits_per_image": histogram / np.log(2) * positions,
        "train_nats_per_code": nats_per_code(pixelcnn, train_codes),
    }


def measure_samples(samples, test, reconstructed, train):
    """The measures of the samples, and the index of the nearest training slice of each."""
    components = principal_components(train)
    nearest, similarity = nearest_training_slices(samples, train, "novel slices")
    measures = {
        "frechet_pca": frechet_distance(samples, test, components),
        "frechet_pca_floor": frechet_distance(train, test, components),
        "sharpness_ratio": sharpness(samples) / sharpness(test),
        "nearest_train_ssim_mean": similarity.mean(),
        "nearest_train_ssim_max": similarity.max(),
        "reconstruction_nearest_train_ssim_mean": nearest_training_slices(
            reconstructed, train, "reconstructions of test slices"
        )[1].mean(),
        "test_nearest_train_ssim_mean": nearest_training_slices(test, train, "test slices")[1].mean(),
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


def draw_samples(path, samples, nearest, similarity, caption):
    count = min(PICTURED, len(samples))
    rows = -(-count // 4)
    figure, axes = plt.subplots(rows, 8, figsize=(12, 1.75 * rows + 0.5), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(count):
        left, right = axes[i // 4, 2 * (i % 4) : 2 * (i % 4) + 2]
        left.axis("on"), right.axis("on")
        show(left, samples[i], "novel")
        show(right, nearest[i], f"nearest in train, {similarity[i]:.2f}")
    figure.suptitle(caption, fontsize=10)
    save(figure, path)


def draw_completions(path, vqvae, pixelcnn, test, codes, seed, temperature, kind):
    """Keep the codes of the upper half of test slices and draw the rest, three times."""
    chosen, draws = evenly(8, len(test)), 3
    known = np.repeat(codes[chosen], draws, axis=0)
    known[:, codes.shape[1] // 2 :] = -1
    completed = decode(vqvae, pixelcnn.sample(len(known), seed, temperature, known=known))
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
    parser.add_argument("--complete", action="store_true", help="draw the lower half of test slices, given the upper")
    options = parser.parse_args(arguments)
    if options.num_samples is not None and options.num_samples < 2:
        parser.error(f"--num-samples must be at least 2, not {options.num_samples}")
    if not 0.01 <= options.temperature <= 100:
        parser.error(f"--temperature must be from 0.01 to 100, not {options.temperature}")
    if not 0 <= options.seed < 2**31:
        parser.error(f"--seed must be from 0 to {2**31 - 1}, not {options.seed}")
    return options


def read_config(run):
    """K, the folder of the slices, and whether they are phantoms."""
    path = run / "config.json"
    if not path.exists():
        raise dataset.UserError(f"--run {run}: no run here; first python train.py --run {run}")
    try:
        config = json.loads(path.read_text())
        return config["settings"]["num_embeddings"], config["data"]["folder"], config["data"]["phantom"]
    except (OSError, ValueError, KeyError, TypeError):
        raise dataset.UserError(f"{path} is broken: train again, in another --run") from None


def load_model(run, name):
    path = run / f"{name}.keras"
    if not path.exists() or (run / f"{name}_last.keras").exists():
        raise dataset.UserError(f"--run {run}: {name} is not trained to its end; give the same train.py command again")
    return dataset.load_model(path, "train again in another --run", compile=False)


def predict(options):
    run = pathlib.Path(options.run)
    num_embeddings, folder, phantom = read_config(run)
    vqvae, pixelcnn = load_model(run, "vqvae"), load_model(run, "pixelcnn")
    splits = dataset.load(options.data or folder)
    for name in ("train", "test"):
        if len(splits[name].images) < 2:  # one has no covariance
            raise dataset.UserError(f"keras_png_slices_{name} has 1 slice, the measures need at least 2: add some")
    kind = "phantom" if phantom else "slice"
    train, validate, test = (splits[name].images.astype(np.float32) / 255 for name in dataset.SPLITS)

    print("encoding and reconstructing")
    train_codes, test_codes = encode(vqvae, train), encode(vqvae, test)
    reconstructed = decode(vqvae, test_codes)

    count = options.num_samples or len(test)
    print(f"sampling {count} novel {kind}s")
    started = time.time()
    codes = pixelcnn.sample(count, options.seed, options.temperature).numpy()
    samples = decode(vqvae, codes)
    seconds = time.time() - started

    measures, nearest, similarity = measure_samples(samples, test, reconstructed, train)
    report = {
        "data": {
            "train_images": len(train),
            "validate_images": len(validate),
            "test_images": len(test),
            "test_subjects": len(set(splits["test"].subjects)) if splits["test"].subjects else None,
            "phantom": phantom,
        },
        "reconstruction": measure_reconstructions(test, reconstructed),
        "codebook": measure_codebook(num_embeddings, test_codes, train_codes),
        "prior": measure_prior(pixelcnn, test_codes, train_codes),
        "samples": {
            "count": count,
            "seed": options.seed,
            "temperature": options.temperature,
            "seconds": seconds,
            **measures,
        },
    }

    draw_reconstructions(run / "reconstructions.png", test, reconstructed, test_codes, num_embeddings, kind)
    caption = (
        f"Novel {kind}s, the first {min(count, PICTURED)} of {count}, not selected: seed {options.seed}, "
        f"temperature {options.temperature}. Beside each its nearest training {kind} and their SSIM"
    )
    draw_samples(run / "samples.png", samples, train[nearest], similarity, caption)
    if options.complete:
        draw_completions(
            run / "completions.png", vqvae, pixelcnn, test, test_codes, options.seed, options.temperature, kind
        )

    def save_samples(path):
        with open(path, "wb") as file:
            np.savez_compressed(file, images=samples, codes=codes)

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
