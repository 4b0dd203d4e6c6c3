"""Measures `predict.py --anomalies` on synthetic changes of held-out slices, beside simpler maps.

    python tests/anomalies.py --run runs/oasis                      # the table, on the test split
    python tests/anomalies.py --run runs/oasis --split validate     # for choosing anything
    python tests/anomalies.py --run runs/oasis --picture some.png   # a picture of some changes, and no table

One change a slice, in a disk of 3 to 6 pixels inside the head. On --split validate the distributions of the terms have
seen the unchanged slices, so its figures flatter a little. A map is measured by its average precision over the pixels
inside all heads together (chance is the share of changed pixels), the score by the area under the ROC curve, changed
slices against the same unchanged. Means are over the kinds without the last, the shift; brackets are 95 % bootstrap
intervals over subjects.
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
from matplotlib import colormaps
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

RADII = 3, 6  # pixels
HEAD_ABOVE = 0.05  # the background of skull-stripped slices is 0
RESAMPLES = 200  # of the subjects
PICTURED = "disk of 0.4", "±0.25", "shuffled", "sink", "shift", "half other"


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
    return disk.moved(image, 2 * (disk.radius - disk.distance) * disk.offset / np.maximum(disk.distance, 1e-3))


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


def change(images, subjects, kind, seed, indices):
    """Slices with one change of a kind each, rounded as a PNG is, and the disks: (N, H, W), bool (N, H, W)."""
    changed, disks = [], []
    for index in indices:
        rng = np.random.default_rng([seed, list(KINDS).index(kind), index])
        disk = Disk(predict.pixels_of_head(images[index], HEAD_ABOVE), rng)
        other = images[rng.choice(np.flatnonzero(subjects != subjects[index]))]
        image = np.where(disk.inside, KINDS[kind](images[index], disk, other, rng), images[index])
        changed.append(np.rint(255 * image.clip(0, 1)) / 255)
        disks.append(disk.inside)
    return np.array(changed, np.float32), np.array(disks)


def maps_of(detector, images, labels, clean_reconstructed):
    """Every row of the first table, for images (N, H, W, 1): {name: (N, H, W)}."""
    found = detector.measure(images, labels)
    blur, difference = detector.SMOOTHING * images.shape[1], np.abs(images - clean_reconstructed)[..., 0]
    return {
        "z-score by slice number, smoothed": found["terms"]["z_score"],
        "residual, smoothed": found["terms"]["residual"],
        "surprise": tf.image.resize(found["nats"][..., None], images.shape[1:3]).numpy()[..., 0],
        "surprise, smoothed, both orders": found["terms"]["surprise"],
        "anomaly map": detector.combine(found["terms"]),
        "oracle: clean reconstruction": ndimage.gaussian_filter(difference, blur, axes=(1, 2)),
    }


def measure(detector, split, labels, options):
    """Print the table in Markdown, and the means with their intervals."""
    images, chosen = dataset.to_float(split.images), predict.evenly(options.slices, len(labels))
    clean, labels, cases = images[chosen], labels[chosen], split.cases[chosen]
    heads = np.array([predict.pixels_of_head(image, HEAD_ABOVE) for image in clean[..., 0]])
    reconstructed = detector.vqvae.decode(detector.vqvae.encode(clean))
    unchanged, columns, found = detector.score(detector.combine(detector.measure(clean, labels)["terms"])), {}, {}

    def precision_and_auroc(kind, chosen=slice(None)):
        """Of the anomaly map and of the score, on changes of this kind."""
        disks, maps, score = (values[chosen] for values in found[kind])
        both, is_changed = np.append(score, unchanged[chosen]), np.repeat([1, 0], len(score))
        return average_precision_score(disks[heads[chosen]], maps[heads[chosen]]), roc_auc_score(is_changed, both)

    def means(subjects):
        chosen = np.concatenate([np.flatnonzero(cases == case) for case in subjects])
        return np.mean([precision_and_auroc(kind, chosen) for kind in list(KINDS)[:-1]], axis=0)

    for kind in KINDS:
        print(f"{kind}: changing and examining {len(chosen)} slices")
        changed, disks = change(images[..., 0], split.cases, kind, options.seed, chosen)
        maps = maps_of(detector, changed[..., None], labels, reconstructed)
        found[kind] = disks, maps["anomaly map"], detector.score(maps["anomaly map"])
        precision = {name: average_precision_score(disks[heads], values[heads]) for name, values in maps.items()}
        columns[kind] = {"chance": disks[heads].mean(), **precision, "AUROC of the score": precision_and_auroc(kind)[1]}
    print("\n| average precision | " + " | ".join([*columns, "mean"]) + " |\n" + "|---" * (2 + len(columns)) + "|")
    for name in columns["shift"]:
        values = [column[name] for column in columns.values()]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in [*values, np.mean(values[:-1])]) + " |")
    limits = np.transpose(predict.interval(means, np.unique(cases), resamples=RESAMPLES))
    for name, (low, high) in zip(("average precision of the anomaly map", "AUROC of the score"), limits):
        print(f"mean {name}: {low:.3f} to {high:.3f} with other subjects")


def plot(detector, split, labels, options):
    """Write a picture of changed slices, evenly spaced over the split, one of each kind in PICTURED."""
    images, chosen = dataset.to_float(split.images)[..., 0], predict.evenly(len(PICTURED), len(labels))
    changes = [change(images, split.cases, kind, options.seed, [index]) for kind, index in zip(PICTURED, chosen)]
    changed, disks = (np.concatenate(parts) for parts in zip(*changes))
    found = detector.examine(changed[..., None], labels[chosen], options.seed)
    maps, captions = found["anomaly_map"], [f"score above {percentile:.0f} %" for percentile in found["percentile"]]

    def outlined(pictures, colours):
        """Enlarged, with the outline of each disk."""
        pictures = [colormaps[colours](predict.enlarged(picture))[..., :3] for picture in pictures]
        for picture, disk in zip(pictures, map(predict.enlarged, disks)):
            picture[ndimage.binary_dilation(disk) & ~disk] = 0, 1, 1
        return pictures

    rows = [(f"{options.split} slice", images[chosen], None), ("changed", outlined(changed, "gray"), PICTURED)]
    rows.append(("anomaly map", outlined(maps / maps.max(), "inferno"), captions))
    title = f"One change a slice, outlined, not selected, seed {options.seed}; scores among those of validation slices"
    dataset.write_figure(options.picture, predict.picture_grid(title, rows))


def examine(options):
    run = Run(options.run)
    models = predict.load_run(run)
    splits = ("test",) if options.split == "test" else ("train", "validate")  # train, to hold out of it where need be
    split = predict.load_data(options, run, splits)[0][options.split]
    if (split.subjects or 0) < 2:
        raise dataset.UserError(f"{options.split} needs two known subjects at least: name the files case_N_slice_M")
    detector, _ = predict.make_detector(options, run, *models)
    labels = detector.prior.labels_of(split.slice_numbers)
    (plot if options.picture else measure)(detector, split, labels, options)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", type=dataset.folder, help="folder of the slices (default: where the run was trained)")
    add("--run", type=dataset.folder, default="runs/oasis", help="folder that train.py filled (default: %(default)s)")
    add("--split", choices=("validate", "test"), default="test")
    add("--slices", type=int, default=160, metavar="N", help="evenly spaced (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the changes (default: %(default)s)")
    add("--picture", type=dataset.folder, metavar="FILE", help="write a picture of some changes, and no table")
    options = parser.parse_args(arguments)
    print(modules.set_up_devices())
    with modules.keras_defaults():
        return dataset.run_script("anomalies.py", examine, options)


if __name__ == "__main__":
    sys.exit(main())
