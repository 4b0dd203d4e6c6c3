"""Draws the diagrams of the README from a run.

    python tests/pictures.py --run runs/oasis --out readme_images

vqvae_diagram.png: what becomes of a test slice in the VQ-VAE. generation.png: how one novel slice comes about.
masked_context.png: the masks of the PixelCNN, and which earlier codes change its prediction at one position.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dataset
import modules
import predict
from train import Run

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

GREY = 0.85  # of what there is not, or not yet


def panel(axis, title, image, caption="", **options):
    axis.imshow(image, **options)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(caption, fontsize=9)


def plot_vqvae(path, vqvae, image):
    """A slice, uint8 (H, W), its latents, codes and reconstruction."""
    codebook, latents = vqvae.quantizer.codebook.numpy(), vqvae.encoder(vqvae.as_floats(image[None])).numpy()[0]
    codes = vqvae.encode(image[None])
    vectors, reconstruction = codebook[codes[0]], vqvae.decode(codes)[0, ..., 0]
    similarity = predict.ssim([image / 255], [reconstruction])[0]
    # Ranked together, so that a latent and a code near it have similar colours.
    colours = predict.code_colours(np.concatenate([codebook, latents.reshape(-1, latents.shape[-1])]))
    of_codes, of_latents = colours[codes[0]], colours[len(codebook) :].reshape(*latents.shape[:2], 3)
    figure = Figure(figsize=(13, 2.9), layout="constrained")
    axes = figure.subplots(1, 5)
    panel(axes[0], "slice x", image, "{}x{} pixels".format(*image.shape), cmap="gray")
    caption = "{}x{} vectors of {} numbers".format(*latents.shape)
    panel(axes[1], "encoder: latents z", of_latents, caption)
    panel(axes[2], f"nearest of {len(codebook)} codes e", of_codes, "k = argmin |z - e_k|²")
    error = np.linalg.norm(latents - vectors, axis=-1)
    panel(axes[3], "error |z - e_k|", error, "gradient: straight through", cmap="viridis", vmin=0)
    figure.colorbar(axes[3].images[0], ax=axes[3])
    caption = f"from the vectors e_k; SSIM {similarity:.3f}"
    panel(axes[4], "decoder: reconstruction", reconstruction, caption, cmap="gray")
    dataset.write_figure(path, figure)


def plot_generation(path, vqvae, prior, slice_number, seed):
    """The first draw of a seed: its scores, its codes after a third, two thirds and all of the steps, and the slice."""
    labels = prior.labels_of([slice_number])
    scores, codes = prior.draw_scores(labels, seed)[0], prior.sample(1, seed, labels=labels)[0]
    colours = predict.code_colours(vqvae.quantizer.codebook.numpy())[codes]
    figure = Figure(figsize=(13, 2.9), layout="constrained")
    axes = figure.subplots(1, 5)
    axes[0].bar(range(len(scores)), scores, color="tab:blue")
    axes[0].set_title(f"1. slice {slice_number}: {len(scores)} scores are drawn", fontsize=10)
    axes[0].set_xlabel("brightness, size, shape ... of the whole slice", fontsize=9)
    for axis, share, title in zip(
        axes[1:4], (1 / 3, 2 / 3, 1), ("2. the PixelCNN draws codes", "one by one", "to the end")
    ):
        drawn = np.arange(codes.size).reshape(codes.shape) < share * codes.size
        panel(axis, title, np.where(drawn[..., None], colours, GREY), f"{drawn.sum()} of {codes.size} codes")
    image = vqvae.decode(codes[None])[0, ..., 0]
    panel(axes[4], "3. the decoder makes them a slice", image, "{}x{} pixels".format(*image.shape), cmap="gray")
    dataset.write_figure(path, figure)


def influence(prior, codes, labels, position):
    """Mean KL divergence, nats, of the prediction at a position when an earlier code is that of another slice: (h, w).

    NaN for later positions, and where no two slices differ.
    """
    row, column = position
    found, others = np.full(prior.grid, np.nan), np.roll(codes, len(codes) // 2, axis=0)

    @tf.function
    def log_probabilities(codes):
        return tf.nn.log_softmax(prior({"codes": codes, "labels": labels})[:, row, column])

    before = log_probabilities(codes).numpy()
    for place in np.ndindex(prior.grid):
        at = (slice(None), *place)
        if place < position and (differ := codes[at] != others[at]).any():
            swapped = codes.copy()
            swapped[at] = others[at]
            after = log_probabilities(swapped).numpy()
            found[place] = (np.exp(before) * (before - after)).sum(axis=1)[differ].mean()
    return found


def plot_context(path, prior, codes, labels):
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes, position = figure.subplots(1, 3), (prior.grid[0] // 2, prior.grid[1] * 5 // 8)
    masks = {"first layer: 7x7, type A": (7, 24, "the position itself is hidden")}
    masks["each block: 3x3, type B"] = (3, 5, "its features, made of earlier codes, are visible")
    for axis, (title, (size, taps, caption)) in zip(axes, masks.items()):
        mask = np.where(np.arange(size**2) < taps, 0.6, 1.0).reshape(size, size)
        panel(axis, title, mask, caption, cmap="Blues_r", vmin=0, vmax=1)
        axis.set(xticks=np.arange(size - 1) + 0.5, yticks=np.arange(size - 1) + 0.5, xticklabels=[], yticklabels=[])
        axis.tick_params(length=0)
        axis.grid(color="grey", linewidth=1.5)
        axis.plot(size // 2, size // 2, "o", color="tab:red")
    caption = "log10 of the change (KL, nats) when an earlier code\nis another slice's. Grey: all have the same code"
    axes[2].set_facecolor(str(GREY))
    found = influence(prior, codes, labels, position)
    panel(axes[2], "what reaches one position, trained", np.log10(np.maximum(found, 1e-6)), caption)
    later = np.arange(found.size).reshape(found.shape) >= position[0] * prior.grid[1] + position[1]
    axes[2].imshow(np.where(later, 1.0, np.nan), cmap="gray", vmin=0, vmax=1)
    axes[2].plot(*position[::-1], "o", color="tab:red")
    figure.colorbar(axes[2].images[0], ax=axes[2])
    dataset.write_figure(path, figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", type=dataset.folder, default="runs/oasis", help="default: %(default)s")
    parser.add_argument("--out", type=dataset.folder, default="readme_images", help="default: %(default)s")
    options = parser.parse_args(arguments)
    with modules.keras_defaults():
        run = Run(options.run)
        vqvae, prior = predict.load_run(run)
        plot_generation(
            options.out / "generation.png", vqvae, prior, prior.slice_numbers[len(prior.slice_numbers) // 2], 0
        )
        test = dataset.load(run.data_folder, ("test",), run.config["settings"]["image_size"])["test"]
        plot_vqvae(options.out / "vqvae_diagram.png", vqvae, test.images[len(test.images) // 2])
        chosen = predict.evenly(64, len(test.images))
        codes, labels = vqvae.encode(test.images[chosen]), prior.labels_of(test.slice_numbers[chosen])
        plot_context(options.out / "masked_context.png", prior, codes, labels)


if __name__ == "__main__":
    sys.exit(main())
