"""Measures `predict.py --anomalies` on synthetic changes of held-out slices, beside simpler maps.

    python tests/anomalies.py --run runs/oasis                      # the table, on the test split
    python tests/anomalies.py --run runs/oasis --split validate     # for choosing anything

One change a slice, in a disk of 3 to 6 pixels that lies inside the head. On --split validate the
distributions of the terms have seen the unchanged slices, so its figures flatter a little.

In the first table a map is measured by its average precision over the pixels inside all heads together
(chance is the share of changed pixels). The second has that of the anomaly map, and the area under the ROC curve
of the score, changed slices against the same unchanged; in brackets 95 % of what they become with other subjects.
Means are over the kinds without the last, the shift.
"""

import argparse
import collections
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dataset
import modules
import predict
from train import Run

import numpy as np
import tensorflow as tf
from scipy import ndimage, stats

RADII = 3, 6  # pixels
HEAD_ABOVE = 0.05  # the background of skull-stripped slices is 0
RESAMPLES = 200  # of the subjects


class Disk:
    """A disk somewhere inside the head."""

    def __init__(self, head, rng):
        depth = ndimage.distance_transform_edt(head)
        self.radius = min(rng.uniform(*RADII), depth.max())
        centre = rng.choice(np.argwhere(depth >= self.radius))
        self.offset = np.indices(head.shape) - centre[:, None, None]  # of each pixel from the centre
        self.distance = np.hypot(*self.offset)
        self.inside = self.distance <= self.radius

    def moved(self, image, by):
        """The image, each pixel fetched from so far away: (2, H, W)."""
        return ndimage.map_coordinates(image, np.indices(image.shape) + by, order=1, mode="nearest")


# Changes: a slice (H, W), the disk, another slice, random numbers -> the changed slice


def shuffle(image, disk, other, rng):
    changed = image.copy()
    changed[disk.inside] = rng.permutation(image[disk.inside])
    return changed


def sink(image, disk, other, rng):
    """At distance r of the centre is what was at 2 R - r: the tissue around the disk flows into it."""
    outwards = disk.offset / np.maximum(disk.distance, 1e-3)
    return disk.moved(image, 2 * (disk.radius - disk.distance) * outwards)


def shift(image, disk, other, rng):
    angle = rng.uniform(0, 2 * np.pi)
    return disk.moved(image, disk.radius * np.array([np.cos(angle), np.sin(angle)])[:, None, None])


KINDS = {
    **{f"disk of {grey:g}": lambda image, *others, grey=grey: np.full_like(image, grey) for grey in (0, 0.4, 0.6, 1)},
    "±0.25": lambda image, disk, other, rng: image + rng.choice([-0.25, 0.25]),
    "noise": lambda image, disk, other, rng: image + rng.normal(0, 0.2, image.shape),
    "shuffled": shuffle,
    "sink": sink,
    "half other": lambda image, disk, other, rng: (image + other) / 2,
    "shift": shift,
}


def head_of(image):
    return ndimage.binary_fill_holes(image > HEAD_ABOVE)


def change(images, subjects, kind, seed, indices):
    """Slices with one change of a kind each, rounded as a PNG is, and the disks: (N, H, W), bool (N, H, W)."""
    changed, disks = [], []
    for index in indices:
        rng = np.random.default_rng([seed, list(KINDS).index(kind), index])
        disk = Disk(head_of(images[index]), rng)
        other = images[rng.choice(np.flatnonzero(subjects != subjects[index]))]
        image = np.where(disk.inside, KINDS[kind](images[index], disk, other, rng), images[index])
        changed.append(np.rint(255 * image.clip(0, 1)) / 255)
        disks.append(disk.inside)
    return np.array(changed, np.float32), np.array(disks)


def hits(scores, truth):
    """Number of true and of all that score at least as high, at each threshold, the highest first."""
    order = np.argsort(-scores, kind="stable")
    is_last = np.append(np.diff(scores[order]) != 0, True)  # equal scores share a threshold
    return np.cumsum(truth[order])[is_last], np.flatnonzero(is_last) + 1


def average_precision(scores, truth):
    true, chosen = hits(scores, truth)
    return np.sum(np.diff(true, prepend=0) * true / chosen) / truth.sum()


def auroc(changed, unchanged):
    """Probability that a changed slice scores higher than an unchanged one; equal scores count half."""
    return stats.mannwhitneyu(changed, unchanged).statistic / len(changed) / len(unchanged)


def maps_of(detector, images, labels, clean_reconstructed):
    """Every row of the first table, for images (N, H, W, 1): {name: (N, H, W)}."""
    terms = detector.measure(images, labels)
    blur, difference = detector.SMOOTHING * images.shape[1], np.abs(images - clean_reconstructed)[..., 0]
    return {
        "z-score by level, smoothed": terms["level"],
        "residual, smoothed": terms["residual"],
        "surprise": tf.image.resize(terms["nats"][..., None], images.shape[1:3]).numpy()[..., 0],
        "surprise, smoothed, both orders": terms["surprise"],
        "anomaly map": detector.combine(terms),
        "oracle: clean reconstruction": ndimage.gaussian_filter(difference, blur, axes=(1, 2)),
    }


def print_table(title, columns, rows):
    """Print {name: cells} in Markdown."""
    print(f"\n|{title} | " + " | ".join(columns) + " |\n|" + "---|" * (1 + len(columns)))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    where = "folder of the slices (default: where the run was trained)"
    parser.add_argument("--data", type=dataset.folder, help=where)
    filled = "folder that train.py filled (default: %(default)s)"
    parser.add_argument("--run", type=dataset.folder, default="runs/oasis", help=filled)
    parser.add_argument("--split", choices=("validate", "test"), default="test")
    parser.add_argument("--slices", type=int, default=160, metavar="N", help="evenly spaced (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the changes (default: %(default)s)")
    return parser.parse_args(arguments)


def measure(options):
    run = Run(options.run)
    vqvae, pixelcnn = predict.load_run(run)
    splits = ("test",) if options.split == "test" else ("train", "validate")  # train, to hold out of it where need be
    split = predict.load_data(options, run, splits)[0][options.split]
    if (split.subjects or 0) < 2:
        raise dataset.UserError(f"{options.split} needs two known subjects at least: name the files case_N_slice_M")
    detector, _ = predict.make_detector(options, run, vqvae, pixelcnn)
    images = dataset.to_float(split.images)
    chosen = predict.evenly(options.slices, len(images))
    clean, labels = images[chosen], pixelcnn.labels_of(split.slice_numbers[chosen])
    heads = np.array([head_of(image) for image in clean[..., 0]])
    draws = [np.arange(len(chosen)), *predict.resample(split.cases[chosen], RESAMPLES)]

    reconstructed = vqvae.decode(vqvae.encode(clean)).numpy()
    unchanged = detector.score(detector.combine(detector.measure(clean, labels)))
    precision, resampled = collections.defaultdict(list), {}
    for kind in KINDS:
        print(f"{kind}: changing and examining {len(chosen)} slices")
        changed, disks = change(images[..., 0], split.cases, kind, options.seed, chosen)
        maps = maps_of(detector, changed[..., None], labels, reconstructed)
        precision["chance"].append(disks[heads].mean())
        for name, values in maps.items():
            precision[name].append(average_precision(values[heads], disks[heads]))
        found, score = maps["anomaly map"], detector.score(maps["anomaly map"])
        resampled[kind] = np.array(
            [(average_precision(found[i][heads[i]], disks[i][heads[i]]), auroc(score[i], unchanged[i])) for i in draws]
        )

    resampled["mean"] = np.mean(list(resampled.values())[:-1], axis=0)
    rows = {name: [f"{value:.3f}" for value in (*values, np.mean(values[:-1]))] for name, values in precision.items()}
    print_table(" average precision", [*KINDS, "mean"], rows)
    rows = {}
    for kind, values in resampled.items():
        limits = np.percentile(values[1:], [2.5, 97.5], axis=0)
        rows[kind] = ["{:.3f} ({:.2f} to {:.2f})".format(*of) for of in zip(values[0], *limits)]
    print_table("", ["average precision of the anomaly map", "AUROC of the slice, by its score"], rows)


def main(arguments=None):
    options = parse_arguments(arguments)
    print(modules.set_up_devices())
    with modules.keras_defaults():
        return dataset.run_script("anomalies.py", measure, options)


if __name__ == "__main__":
    sys.exit(main())
