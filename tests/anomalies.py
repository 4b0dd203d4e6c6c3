"""Measures `predict.py --anomalies` on synthetic changes of held-out slices, beside simpler maps.

    python tests/anomalies.py --run runs/oasis                      # the table, on the test split
    python tests/anomalies.py --run runs/oasis --split validate     # for choosing anything

One change a slice, in a disk of 3 to 6 pixels that lies inside the head. On --split validate the
thresholds have seen the unchanged slices, so its figures flatter a little.

In the first table a map is measured by its average precision over the pixels inside all heads together
(chance is the share of changed pixels); in the second the three maps that matter also by their best Dice
coefficient, and by the Dice coefficient at the threshold that marks 5 % of the unchanged pixels. In the third
a score of whole slices is measured by its area under the ROC curve, changed slices against the same unchanged.
In brackets: 95 % of what it becomes with other subjects. Means are over the kinds without the last, the shift.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dataset  # before TensorFlow

# isort: split
import numpy as np
from scipy import ndimage, stats

import modules
import predict

RADII = 3, 6  # pixels
HEAD_ABOVE = 0.05  # the background of skull-stripped slices is 0
FALSE_POSITIVES = 0.05
RESAMPLES = 200  # of the subjects


# --------------------------------------------------------------------------------------
# Changes: the slice (64, 64), the disk, another slice, random numbers -> the changed slice
# --------------------------------------------------------------------------------------


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
        """The image, each pixel fetched from so far away: (2, 64, 64)."""
        return ndimage.map_coordinates(image, np.indices(image.shape) + by, order=1, mode="nearest")


def fill(value):
    return lambda image, disk, other, rng: np.full_like(image, value)


def brighten(image, disk, other, rng):
    return image + rng.choice([-0.25, 0.25])


def add_noise(image, disk, other, rng):
    return image + rng.normal(0, 0.2, image.shape)


def shuffle(image, disk, other, rng):
    changed = image.copy()
    changed[disk.inside] = rng.permutation(image[disk.inside])
    return changed


def sink(image, disk, other, rng):
    """At distance r of the centre is what was at 2 R - r: the tissue around the disk flows into it."""
    outwards = disk.offset / np.maximum(disk.distance, 1e-3)
    return disk.moved(image, 2 * (disk.radius - disk.distance) * outwards)


def blend(image, disk, other, rng):
    return (image + other) / 2


def shift(image, disk, other, rng):
    angle = rng.uniform(0, 2 * np.pi)
    return disk.moved(image, disk.radius * np.array([np.cos(angle), np.sin(angle)])[:, None, None])


KINDS = {
    "disk of 0": fill(0.0),
    "disk of 0.4": fill(0.4),
    "disk of 0.6": fill(0.6),
    "disk of 1": fill(1.0),
    "±0.25": brighten,
    "noise": add_noise,
    "shuffled": shuffle,
    "sink": sink,
    "half other": blend,
    "shift": shift,
}


def head_of(image):
    return ndimage.binary_fill_holes(image > HEAD_ABOVE)


def change(images, subjects, kind, seed, indices):
    """Slices with one change of a kind each, rounded as a PNG is, and the disks: (N, 64, 64), bool (N, 64, 64)."""
    changed, disks = [], []
    for index in indices:
        rng = np.random.default_rng([seed, list(KINDS).index(kind), index])
        disk = Disk(head_of(images[index]), rng)
        other = images[rng.choice(np.flatnonzero(subjects != subjects[index]))]
        image = np.where(disk.inside, KINDS[kind](images[index], disk, other, rng), images[index])
        changed.append(np.rint(255 * image.clip(0, 1)) / 255)
        disks.append(disk.inside)
    return np.array(changed, np.float32), np.array(disks)


# --------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------


def hits(scores, truth):
    """Number of true and of all that score at least as high, at each threshold, the highest first."""
    order = np.argsort(-scores, kind="stable")
    is_last = np.append(np.diff(scores[order]) != 0, True)  # equal scores share a threshold
    return np.cumsum(truth[order])[is_last], np.flatnonzero(is_last) + 1


def average_precision(scores, truth):
    true, chosen = hits(scores, truth)
    return np.sum(np.diff(true, prepend=0) * true / chosen) / truth.sum()


def best_dice(scores, truth):
    true, chosen = hits(scores, truth)
    return np.max(2 * true / (chosen + truth.sum()))


def dice_at_false_positives(scores, truth):
    chosen = scores > np.quantile(scores[~truth], 1 - FALSE_POSITIVES)
    return 2 * (chosen & truth).sum() / (chosen.sum() + truth.sum())


def auroc(changed, unchanged):
    """Probability that a changed slice scores higher than an unchanged one; equal scores count half."""
    return stats.mannwhitneyu(changed, unchanged).statistic / len(changed) / len(unchanged)


def bootstrap(statistic, subjects):
    """statistic(indices of slices): of all, then of RESAMPLES draws of as many subjects."""
    draws = [np.arange(len(subjects)), *predict.resample(subjects, RESAMPLES)]
    return np.array([statistic(chosen) for chosen in draws])


# --------------------------------------------------------------------------------------
# Maps
# --------------------------------------------------------------------------------------


def restored_in_the_loop(detector, images, labels):
    """The restoration term where a code is judged given the codes already restored, and not all at once."""
    terms = []
    for batch, of, count in predict.fixed_batches(images, labels):
        known = np.repeat(detector.vqvae.encode(batch), detector.restorations, axis=0)
        streams = np.tile(np.arange(detector.restorations), len(of))
        repeated = np.repeat(of, detector.restorations)
        codes = detector.pixelcnn.restore(known, repeated, detector.redraw_above, streams, detector.seed)
        restored = detector.vqvae.decode(codes).numpy().reshape(len(of), -1, *images.shape[1:])
        spread = restored.std(axis=1) + predict.SPREAD_FLOOR
        terms.append((np.abs(batch[..., 0] - restored.mean(axis=1)) / spread)[:count])
    return predict.smooth(np.concatenate(terms))


def maps_of(detector, images, labels, clean_reconstructed):
    """Every row of the first table: {name: (N, 64, 64)}; and the surprise (N, h, w)."""
    found = detector.examine(images, labels)
    terms, surprise = found["terms"], predict.upsample(found["surprise"])
    reconstructed = dataset.images_of(detector.vqvae, dataset.codes_of(detector.vqvae, images))
    residual = np.abs(images - reconstructed)
    restored = np.abs(images - found["restored"])
    return {
        "intensity": images,
        "z-score by level": np.abs(images - detector.mean[labels]) / detector.spread[labels],
        "the same, smoothed": terms["level"],
        "residual": residual,
        "residual, smoothed": terms["residual"],
        "surprise": surprise,
        "surprise, smoothed, both orders": terms["surprise"],
        "residual of restorations, smoothed": predict.smooth(restored),
        "the same x surprise": predict.smooth(restored) * predict.smooth(surprise),
        "z-score by restorations, smoothed": terms["restoration"],
        "the same, judged in the loop": restored_in_the_loop(detector, images, labels),
        "anomaly map": detector.anomaly_map(terms),
        "without restorations": detector.anomaly_map({name: v for name, v in terms.items() if name != "restoration"}),
        "oracle: clean reconstruction": predict.smooth(np.abs(images - clean_reconstructed)),
    }, found["surprise"]


def slice_scores(detector, maps, surprise):
    """Every row of the third table: {name: (N,)}."""
    return {
        "score of anomalies.csv": detector.score(surprise),
        "highest of the surprise": maps["surprise"].max(axis=(1, 2)),
        "mean z-score by level": maps["z-score by level"].mean(axis=(1, 2)),
        "highest of the residual, smoothed": maps["residual, smoothed"].max(axis=(1, 2)),
        "highest of the anomaly map": maps["anomaly map"].max(axis=(1, 2)),
    }


def print_table(title, rows):
    """Print {name: {kind: text or number}} in Markdown, with the mean of numbers."""
    print(f"\n| {title} | " + " | ".join(KINDS) + " | mean |\n|---" + "|---" * (len(KINDS) + 1) + "|")
    for name, values in rows.items():
        cells = [f"{values[kind]:.3f}" for kind in KINDS] + [f"{np.mean(list(values.values())[:-1]):.3f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def print_intervals(name, resampled):
    cells = ["{:.3f} ({:.2f} to {:.2f})".format(of[0], *np.percentile(of[1:], [2.5, 97.5])) for of in resampled]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", help="folder of the slices (default: where the run was trained)")
    parser.add_argument("--run", default="runs/oasis", help="folder that train.py filled (default: %(default)s)")
    parser.add_argument("--split", choices=("validate", "test"), default="test")
    parser.add_argument("--slices", type=int, default=160, metavar="N", help="evenly spaced (default: %(default)s)")
    parser.add_argument("--restorations", type=int, default=8, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of changes and draws (default: %(default)s)")
    options = parser.parse_args()

    print(modules.set_up_devices())
    config, vqvae, pixelcnn = predict.load_run(pathlib.Path(options.run))
    splits = ("test",) if options.split == "test" else ("train", "validate")  # train, to hold out of it where need be
    split = dataset.load(options.data or config["data"]["folder"], splits)[options.split]
    detector = predict.detectors(options, config, vqvae, pixelcnn)(known=pixelcnn.num_labels > 0)
    images = split.images.astype(np.float32) / 255
    if split.subjects is None or len(set(split.subjects)) < 2:
        raise dataset.UserError(f"{options.split}: two subjects at least are needed, and names that tell them")
    subjects = np.array(split.subjects)
    chosen = predict.evenly(options.slices, len(images))
    labels = dataset.known_labels(split, pixelcnn.num_labels)[chosen]
    heads = np.array([head_of(image) for image in images[chosen]])

    reconstructed = dataset.images_of(vqvae, dataset.codes_of(vqvae, images[chosen]))
    unchanged = slice_scores(detector, *maps_of(detector, images[chosen], labels, reconstructed))
    prevalence, precision, dice, slices, curves = {}, {}, {}, {}, {}
    for kind in KINDS:
        print(f"{kind}: changing and examining {len(chosen)} slices")
        changed, disks = change(images, subjects, kind, options.seed, chosen)
        maps, surprise = maps_of(detector, changed, labels, reconstructed)
        truth = disks[heads]
        prevalence[kind] = truth.mean()
        for name, values in maps.items():
            precision.setdefault(name, {})[kind] = average_precision(values[heads], truth)
        for name in ("the same, smoothed", "surprise", "anomaly map"):
            dice.setdefault(f"{name}: best", {})[kind] = best_dice(maps[name][heads], truth)
            dice.setdefault(f"{name}: at 5 %", {})[kind] = dice_at_false_positives(maps[name][heads], truth)
        scores = slice_scores(detector, maps, surprise)
        for name, values in scores.items():
            slices.setdefault(name, {})[kind] = auroc(values, unchanged[name])
        curves[kind] = maps["anomaly map"], disks, scores["highest of the anomaly map"]

    print_table("average precision", {"chance": prevalence, **precision})
    print_table("Dice", dice)
    print_table("AUROC of the slice", slices)
    normal = unchanged["highest of the anomaly map"]
    print("\n| anomaly map | average precision | AUROC of the slice, by its highest |\n|---|---|---|")
    resampled = []
    for kind, (values, disks, highest) in curves.items():
        resampled.append(
            [
                bootstrap(
                    lambda i, v=values, d=disks: average_precision(v[i][heads[i]], d[i][heads[i]]), subjects[chosen]
                ),
                bootstrap(lambda i, h=highest: auroc(h[i], normal[i]), subjects[chosen]),
            ]
        )
        print_intervals(kind, resampled[-1])
    print_intervals("mean", np.mean(resampled[:-1], axis=0))


if __name__ == "__main__":
    try:
        main()
    except dataset.UserError as error:
        print(f"anomalies.py: {error}", file=sys.stderr)
        sys.exit(2)
