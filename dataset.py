"""The OASIS slices: PNG files -> one uint8 array a split, and batches of it for training.

The preprocessed OASIS set, as unzipped, has 32 slices of every subject:

    keras_png_slices_data/
      keras_png_slices_train/     case_001_slice_0.nii.png ...   fits the models
      keras_png_slices_validate/  case_402_slice_0.nii.png ...   chooses the best epoch
      keras_png_slices_test/      case_441_slice_0.nii.png ...   is only ever measured
      keras_png_slices_seg_*/     masks, ignored

Other PNG or JPEG files in these three folders work too. `write_phantom` makes such a folder out of
random head phantoms, for a try without any download. Run as a script, this file prints what it finds;
with --from it makes such a folder out of OASIS-1, unpacked into FOLDER:

    python dataset.py keras_png_slices_data
    python dataset.py --from FOLDER keras_png_slices_data
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import warnings
from concurrent import futures

import keras
import nibabel
import numpy as np
import scipy.linalg
import tensorflow as tf
from scipy import ndimage

SPLITS = ("train", "validate", "test")
IMAGE_SIZE = 64  # pixels a side, after resizing
HELD_OUT = 10  # without a validate folder, one subject in this many is held out of train


@dataclasses.dataclass
class Slices:
    """The slices of one split, ordered by case and slice number."""

    images: np.ndarray  # uint8 [0, 255], (N, 64, 64)
    names: np.ndarray  # file names (N,)
    cases: np.ndarray  # number of the subject, int32 (N,); -1 where the name does not tell
    labels: np.ndarray  # slice number, int32 (N,); -1 where the name does not tell

    def __getitem__(self, chosen):
        return Slices(self.images[chosen], self.names[chosen], self.cases[chosen], self.labels[chosen])

    def known_labels(self, num_labels):
        """The slice numbers below `num_labels`, else -1: int32 (N,)."""
        return np.where(self.labels < num_labels, self.labels, -1).astype(np.int32)

    @property
    def subjects(self):
        """How many there are; None where a name does not tell."""
        return None if (self.cases < 0).any() else len(np.unique(self.cases))


def to_float(images):
    """uint8 [0, 255], (N, H, W) -> float32 [0, 1], (N, H, W, 1)."""
    return np.asarray(images, np.float32)[..., None] / np.float32(255)


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


def find_data(folder):
    """The folder that holds keras_png_slices_train: `folder` itself, or one inside it."""
    folder = pathlib.Path(folder)
    for candidate in [folder, *sorted(folder.glob("*"))]:
        if (candidate / "keras_png_slices_train").is_dir():
            return candidate
    problem = "no folder keras_png_slices_train in it, nor one level down" if folder.is_dir() else "no such folder"
    raise UserError(f"{folder}: {problem}; name the unzipped keras_png_slices_data (or try train.py --demo)")


def parse_name(name):
    """Case and slice number: case_001_slice_2.nii.png -> (1, 2); (-1, -1) for a name of another form."""
    match = re.match(r"case_(\d{1,9})_slice_(\d{1,4})\.", name)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def slice_number(name):
    """The number behind "slice" in a file name, as in case_001_slice_2.nii.png or P7-Slice02.jpg; -1 without one."""
    match = re.search(r"(?<![a-z])slice[ _-]?(\d{1,4})(?!\d)", name.lower())
    return int(match[1]) if match else -1


def list_slices(folder, remedy="unzip the data again"):
    """Paths of the slices in one folder, by case and slice number, else by name."""
    paths = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".png", ".jpg", ".jpeg")
        and not path.name.startswith((".", "seg_"))  # "._case_001..." is left behind by macOS zips
    ]
    if not paths:
        raise UserError(f"{folder}: no slices in it (PNG or JPEG; seg_* masks do not count); {remedy}")
    return sorted(paths, key=lambda path: (parse_name(path.name), path.name))


def read_slice(path):
    """One image file -> its grey image, area-averaged to uint8 (64, 64)."""
    image = tf.io.decode_image(tf.io.read_file(path), channels=1, expand_animations=False)
    image = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE), method="area")
    return tf.cast(tf.round(image[..., 0]), tf.uint8)


def is_broken(path):
    try:
        read_slice(os.fsencode(path))
    except tf.errors.OpError:
        return True
    return False


def read_images(paths, name):
    """Decode files in parallel: list of paths -> uint8 (N, 64, 64). Every broken file is reported."""
    print(f"{name}: reading {len(paths)} slices")
    decoded = tf.data.Dataset.from_tensor_slices([os.fsencode(path) for path in paths])
    decoded = decoded.map(read_slice, num_parallel_calls=tf.data.AUTOTUNE).batch(256).prefetch(2)
    try:
        return np.concatenate([batch.numpy() for batch in progress(decoded, "batch")])
    except tf.errors.OpError:
        broken = [path for path in paths if is_broken(path)]
        names = ", ".join(str(path) for path in broken[:10])
        raise UserError(f"{len(broken)} unreadable image file(s), restore or delete them: {names}") from None


def load_split(folder, label):
    """Every slice of one split folder, as `Slices`."""
    paths = list_slices(folder)
    cases, labels = np.array([parse_name(path.name) for path in paths], np.int32).T
    return Slices(read_images(paths, label), np.array([path.name for path in paths]), cases, labels)


def load(folder, splits=SPLITS):
    """Read the splits of the data in `folder`, or one level down: {name: Slices}.

    Without a validate folder, the last tenth of train's subjects is held out for it.
    """
    root = find_data(folder)
    loaded = {}
    for name in splits:
        split_folder = root / f"keras_png_slices_{name}"
        if split_folder.is_dir():
            loaded[name] = load_split(split_folder, name)
        elif name != "validate":
            raise UserError(f"{root}: no folder {split_folder.name} in it; unzip the data again")

    for one, other in itertools.combinations(loaded, 2):
        if shared := {*loaded[one].cases} & {*loaded[other].cases} - {-1}:
            raise UserError(f"case_{min(shared):03d} is in both {one} and {other}: remove it from one")
    if any(split.subjects is None for split in loaded.values()):
        message = "some files are not named case_N_slice_M: subjects cannot be told apart, nor leaks found"
        warnings.warn(message, stacklevel=2)
    if "validate" in splits and "validate" not in loaded:
        loaded["train"], loaded["validate"] = hold_out(loaded["train"])
    for name, split in loaded.items():
        subjects = f" of {split.subjects} subjects" if split.subjects else ""
        print(f"{name}: {len(split.images)} slices{subjects}, {IMAGE_SIZE}x{IMAGE_SIZE}, "
              f"uint8 {split.images.min()} to {split.images.max()}")  # fmt: skip
    return loaded


def hold_out(train):
    """Split train into (train, validate) by whole subjects, or by slices where names do not tell: about a tenth."""
    heads = heads_of(train)
    count = heads.max() + 1
    held_out = heads >= count - max(1, count // HELD_OUT)
    if held_out.all():
        raise UserError("only one subject in train and no validate folder: nothing left to train on; add subjects")
    return train[~held_out], train[held_out]


def fingerprint(loaded):
    """What tells one data set from another: {split: {"images", "subjects", "sha256"}} of names and pixels."""
    return {
        name: {
            "images": len(split.images),
            "subjects": split.subjects,
            "sha256": hashlib.sha256(os.fsencode("\n".join(split.names)) + split.images.tobytes()).hexdigest(),
        }
        for name, split in loaded.items()
    }


def write_data(folder, splits, head):
    """Write a new folder of slices, which appears complete or not at all: {split: cases}, case -> uint8 (L, H, W)."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    heads = [(split, case) for split, cases in splits.items() for case in cases]
    try:
        with told_if_it_fails(folder):
            for split, case in progress(heads, "head"):
                for index, picture in enumerate(head(case)):
                    path = partial / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_{index}.nii.png"
                    tf.io.write_file(str(path), tf.io.encode_png(picture[..., None]))  # makes the folders too
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --------------------------------------------------------------------------------------
# The same folder, out of OASIS-1 as anybody can download it
# --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """One form in which OASIS-1 can be had, and which 32 slices of a head are taken."""

    name: str
    example: str  # one of its files
    pattern: str  # of folder/file; the groups are case and visit, and for single slices scan and level
    shape: tuple[int, ...]  # of an array in a file
    axis: int | None  # of a volume, from slice to slice; None where a file is one slice
    levels: range | None  # of a volume, the slices that are taken, lowest first; else the highest
    size: tuple[int, int]  # what a slice is scaled to, before it is centred in 256 x 256 pixels


# Names, shapes and axes are of the documentation; no file of the three was at hand (see README.md).
#   Discs: 1 mm voxels in Talairach space; left-right, posterior to anterior, inferior to superior. The levels are
#     estimated: midbrain to the roof of the lateral ventricles. The size is 256/208 pixels a mm.
#   neurite-oasis: 1 mm voxels in FreeSurfer's Talairach space; right to left, superior to inferior, posterior to
#     anterior. z = 0 is at 128 - 31, where 31 voxels were cut off, so the levels are z = -6 to 25 mm, estimated as
#     above. The size is 256/208 pixels a mm too; heads are about 5 % larger in that space.
#   JPEG copies: single scans, axial, with the skull, not aligned; 61 levels a millimetre apart, of which the highest
#     32 are the most like the others'. 496 x 248 pixels are 256 x 160 mm, since a scan has 256 x 128 voxels of
#     1 x 1.25 mm; a pixel a mm keeps the whole frame. That the heads face right is a guess.
# fmt: off
SOURCES = (
    Source("OASIS-1 discs", "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr",
           r".*/OAS1_(?P<case>\d+)_MR(?P<visit>\d+)_mpr_n\d+_anon_111_t88_masked_gfc\.(?:hdr|img)",
           shape=(176, 208, 176), axis=2, levels=range(70, 102), size=(216, 256)),
    Source("neurite-oasis", "OASIS_OAS1_0001_MR1/aligned_norm.nii.gz",
           r"OASIS_OAS1_(?P<case>\d+)_MR(?P<visit>\d+)/aligned_norm\.nii\.gz",
           shape=(160, 192, 224), axis=1, levels=range(103, 71, -1), size=(196, 276)),
    Source("JPEG copies", "OAS1_0001_MR1_mpr-1_100.jpg",
           r".*/OAS1_(?P<case>\d+)_MR(?P<visit>\d+)_mpr-(?P<scan>\d+)_(?P<level>\d+)\.jpg",
           shape=(248, 496), axis=None, levels=None, size=(160, 256)),
)
# fmt: on


def find_heads(folder):
    """What is in `folder` or below, one head a subject: Source, {case: {level: path}}; a volume has level 0.

    A subject's second visit and repeated scans are the same head again, and would leak from split to split.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"--from {folder}: no such folder; name the one that OASIS-1 was unpacked into")
    paths = sorted(folder.rglob("*"))
    for source in SOURCES:
        scans = {}  # (case, visit, scan) -> {level: path}
        for path in paths:
            if match := re.fullmatch(source.pattern, f"{path.parent.name}/{path.name}"):
                numbers = {"scan": 0, "level": 0, **{name: int(digits) for name, digits in match.groupdict().items()}}
                scan = scans.setdefault((numbers["case"], numbers["visit"], numbers["scan"]), {})
                scan.setdefault(numbers["level"], path)
        if scans:
            first = {}  # of each case the first visit, and of that the first scan
            for (case, _, _), files in sorted(scans.items()):
                first.setdefault(case, files)
            visits = len({scan[:2] for scan in scans})
            print(f"{folder}: {len(first)} heads of {source.name}; left out: {visits - len(first)} second visits, "
                  f"{len(scans) - visits} repeated scans")  # fmt: skip
            return source, first
    examples = ", or ".join(f"{source.example} ({source.name})" for source in SOURCES)
    raise UserError(f"--from {folder}: nothing known in it; unpack OASIS-1 there. Looked for files such as {examples}")


def read_checked(path, source):
    """The array in one file, which must be of the shape that `source` has."""
    try:
        if source.axis is None:
            array = tf.io.decode_image(tf.io.read_file(os.fsencode(path)), channels=1).numpy()
        else:
            array = np.asarray(nibabel.load(path).dataobj)  # as stored, whatever the header says of directions
    except Exception as error:  # nibabel has many kinds of its own for damaged files
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({cause}): unpack or download it again") from None
    if array.shape not in (source.shape, (*source.shape, 1)):
        raise UserError(f"{path} is of shape {array.shape}, not {source.shape}: take it out of the folder")
    return array.reshape(source.shape)


def head_slices(files, source):
    """One head, {level: path}, as in the course set: uint8 (32, 256, 256). White is the 99.9th percentile of all 32."""
    path = next(iter(files.values()))
    if source.axis is not None:
        slices = np.moveaxis(read_checked(path, source), source.axis, 0)[list(source.levels)]
    elif len(files) < 32:
        raise UserError(f"{path}: of this scan there are {len(files)} slices, not 32 or more: download it again")
    else:
        slices = np.stack([read_checked(files[level], source) for level in sorted(files)[-32:]])
    white = np.percentile(slices, 99.9)
    if not white > 0:
        raise UserError(f"{path}: no brain in it; download it again, or take it out of the folder")
    slices = tf.image.resize(slices[..., None] / np.float32(white), source.size, antialias=True)
    slices = tf.image.resize_with_crop_or_pad(slices, 256, 256)
    return tf.cast(tf.round(255 * tf.clip_by_value(slices[..., 0], 0, 1)), tf.uint8)


def split_cases(cases):
    """Sorted case numbers -> {split: case numbers}: the last tenth is for test, the tenth before it for validate."""
    if len(cases) < 3:
        raise UserError(f"only {len(cases)} subject(s), and each of {', '.join(SPLITS)} needs one: add another disc")
    tenth = max(1, round(len(cases) / 10))
    return {"train": cases[: -2 * tenth], "validate": cases[-2 * tenth : -tenth], "test": cases[-tenth:]}


def import_oasis(folder, target):
    """Write 32 slices of every head in `folder` to the new folder `target`, which appears complete or not at all."""
    target = pathlib.Path(target)
    if target.exists():
        raise UserError(f"{target} exists: name another folder, or delete it first")
    source, heads = find_heads(folder)
    splits = split_cases(list(heads))
    write_data(target, splits, lambda case: head_slices(heads[case], source))
    counts = ", ".join(f"{split} {len(cases)}" for split, cases in splits.items())
    print(f"{target}: 32 slices of every head; heads: {counts}")


# --------------------------------------------------------------------------------------
# What the models are shown
# --------------------------------------------------------------------------------------


def shown_variants(images, mirror):
    """Unchanged slices as a model is shown them: [(N, H, W)] as they are, and mirrored where `mirror` says so.

    The heads lie on their side: up and down of a slice are left and right of the head.
    """
    return [images] + [images[:, ::-1]] * mirror


# What `augment` changes at most: pixels down and across, degrees, growth, and ln gamma.
CHANGE_LIMITS = np.array([2, 2, 4, 0.04, 0.12])
NUM_CHANGES = len(CHANGE_LIMITS) + 1  # numbers that tell of a copy: those, and a 1


def change(image, amounts):
    """One slice shifted, turned, scaled (cubic splines), lighter or darker: uint8 (H, W) -> the same."""
    *shift, turn, growth, gamma = amounts * CHANGE_LIMITS
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    matrix = np.array([[cos, -sin], [sin, cos]]) / (1 + growth)  # from the new picture to the old
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - matrix @ (centre + shift)
    moved = ndimage.affine_transform(image / np.float32(255), matrix, offset, order=3).clip(0, 1)
    return np.rint(255 * moved ** np.exp(gamma)).astype(np.uint8)


def augment(images, heads, seed):
    """A changed copy of each slice, all slices of a head changed alike; and the changes.

    Args:
        images: uint8 (N, H, W).
        heads: int (N,), which of them belong together.
        seed: int, or several.

    Returns: uint8 (N, H, W); float32 (N, 6): five uniform numbers from -1 to 1, how much of each of
        CHANGE_LIMITS was applied, and a 1, where a slice as it is has six zeros.
    """
    amounts = np.random.default_rng(seed).uniform(-1, 1, (max(heads) + 1, len(CHANGE_LIMITS)))[heads]
    with futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # scipy.ndimage lets them run side by side
        changed = list(threads.map(change, images, amounts))
    return np.stack(changed), np.pad(amounts, [[0, 0], [0, 1]], constant_values=1).astype(np.float32)


def heads_of(slices):
    """Which slices are of the same head, from 0: int (N,). Where names do not tell, every slice is one of its own."""
    unknown = slices.cases < 0
    cases = np.where(unknown, -1 - np.arange(len(unknown)), slices.cases)
    return np.unique(cases, return_inverse=True)[1]


def slices_below(slices):
    """Index of the slice below in the same head, which is the one before, or -1 where there is none: int32 (N,)."""
    follows = (np.diff(slices.cases, prepend=-1) == 0) & (np.diff(slices.labels, prepend=-1) == 1)
    return np.where(follows, np.arange(len(follows)) - 1, -1).astype(np.int32)


def principal_components(images, count):
    """Mean (P,) and the leading principal components (P, count) of the P pixels, the first one first.

    The largest entry of each is positive, so that they have the same signs on every machine.
    """
    pixels = images.reshape(len(images), -1)
    mean = pixels.mean(axis=0)
    if not count:
        return mean, np.zeros((len(mean), 0))
    few = len(pixels) < len(mean)  # slices, so that their products with one another are the smaller matrix
    centred = (pixels - mean).astype(np.float64 if few else np.float32)
    products = centred @ centred.T if few else centred.T @ centred
    vectors = scipy.linalg.eigh(products, subset_by_index=[len(products) - count, len(products) - 1])[1][:, ::-1]
    axes = centred.T @ vectors if few else vectors
    axes /= np.linalg.norm(axes, axis=0)
    return mean, axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(count)])


def project(images, components):
    """Scores of images in principal components: (N, count)."""
    mean, axes = components
    return (images.reshape(len(images), -1) - mean).astype(np.float64) @ axes


def principal_scores(images, count):
    """What tells scores to the PixelCNN: a function, pictures -> float32 (N, count), by which `images` vary by 1."""
    mean, axes = principal_components(images, count)
    axes = axes / project(images, (mean, axes)).std(axis=0)
    return lambda pictures: project(pictures, (mean, axes)).astype(np.float32)


def shuffled_batches(examples, variants, batch_size, seed, epochs):
    """Batches of index pairs (example, variant), int32 (batch_size, 2), that depend on `seed` and the epoch alone.

    An epoch visits every example once, in a new order, as one of its variants at random. The last
    examples % batch_size of an epoch's order wait for the next.
    """

    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(examples), seed=(seed, 2 * epoch))
        choice = tf.random.stateless_uniform((examples,), (seed, 2 * epoch + 1), maxval=variants, dtype=tf.int32)
        indices = tf.data.Dataset.from_tensor_slices(tf.stack([order, choice], axis=1))
        return indices.batch(batch_size, drop_remainder=True)

    return tf.data.Dataset.range(epochs.start, epochs.stop).flat_map(one_epoch)


# --------------------------------------------------------------------------------------
# The demo phantom
# --------------------------------------------------------------------------------------


def phantom_slices(rng, slices=32, size=256):
    """Axial T1-like slices of one random head that faces right: uint8 [0, 255], (slices, size, size)."""
    length, width = rng.uniform(0.68, 0.78), rng.uniform(0.54, 0.62)  # of half a picture
    tilt, shift, atrophy = rng.normal(0, 0.04), rng.uniform(-0.5, 0.5), rng.uniform(0, 1)
    wide, gap = 0.06 + 0.08 * atrophy, 0.01 + 0.03 * atrophy  # of the ventricles, and around the brain
    white = rng.uniform(0.7, 0.9)
    grey, nucleus, fluid, scalp = 0.55 * white, 0.8 * white, 0.08, 0.8
    levels = np.linspace(0, 1, slices) + rng.uniform(-0.1, 0.1)  # 0: thalamus, 1: top of the ventricles

    # Both halves of a head are alike. Lengths are in units of the head, so that all in it grows with it.
    axis = np.linspace(-1, 1, size, dtype="float32")
    along, across = (axis + tilt * axis[:, None]) / length, np.abs(axis[:, None] - tilt * axis) / width
    egg = (np.abs(along) ** 2.3 + (across * (1 + 0.08 * along)) ** 2.3) ** (1 / 2.3)  # 1 at the skull; wider behind
    fissure = np.hypot(1.4 * across, 2 * np.maximum(0.5 - np.abs(along + 0.02), 0))  # 0 in it, none at the callosum
    angle = np.arctan2(across, along)

    def ellipsoid(x, y, level, radii, lean=0.0):
        """Depth (size, size) below the surface of one at (x, y), `level` off its middle; its front leans outwards."""
        x, y = along - x, across - y
        x, y = (x + lean * y) / radii[0], (y - lean * x) / radii[1]
        return radii[1] * (1 - np.sqrt(x**2 + y**2 + (level / radii[2]) ** 2))

    def draw(level):
        """One slice: uint8 (size, size). Each organ covers what was painted before it."""
        skull = 0.93 - 0.06 * level**2 - egg  # depths are positive inside
        sulci = (0.5 + 0.3 * np.cos(11 * angle + shift + level) + 0.2 * np.cos(7 * angle - shift)) ** 2
        image = np.zeros_like(egg)
        for depth, brightness in (
            (skull + 0.16, scalp),
            (skull + 0.07, fluid),  # bone is as dark as the fluid in it
            (np.minimum(skull - 0.04 * sulci, fissure) - gap, grey),  # cortex
            (np.minimum(skull - 0.14 * sulci, fissure) - gap - 0.09, white),
            (ellipsoid(-0.10, 0.18, level, (0.23, 0.15, 0.7), -0.2), nucleus),  # thalamus
            (ellipsoid(0.12, 0.44, level, (0.26, 0.12, 0.6), -0.2), nucleus),  # putamen
            (ellipsoid(0.24, 0.26, level - 0.4, (0.22, 0.12, 0.6)), nucleus),  # caudate nucleus
            (ellipsoid(-0.04, 0.00, level, (0.16, 0.6 * wide, 0.6)), fluid),  # third ventricle
            (ellipsoid(0.30, 0.05 + wide, level - 0.4, (0.22, wide, 0.6), 0.35), fluid),  # frontal horn
            (ellipsoid(0.02, 0.05 + wide, level - 0.8, (0.40, wide, 0.4)), fluid),  # body of the lateral ventricle
            (ellipsoid(-0.36, 0.12 + wide, level - 0.2, (0.26, wide, 0.7), -0.5), fluid),  # occipital horn
        ):
            image += np.clip(0.5 + depth * size / 8, 0, 1) * (brightness - image)  # a soft edge, as in a scan
        return np.rint(255 * image).astype("uint8")

    return np.stack([draw(level) for level in levels.tolist()])  # Python floats, which keep the arrays float32


def write_phantom(folder, train=24, validate=4, test=4, seed=0):
    """Write that many phantom subjects to the new `folder` as PNGs, in the layout of the real data set."""
    cases = {"train": range(1, 1 + train), "validate": range(402, 402 + validate), "test": range(441, 441 + test)}
    print(f"drawing {train + validate + test} head phantoms into {folder}")
    write_data(pathlib.Path(folder), cases, lambda case: phantom_slices(np.random.default_rng((seed, case))))


# --------------------------------------------------------------------------------------
# Files of a run, progress and errors
# --------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend; shown as one line, without a traceback."""


def exit_code(script, work, *arguments):
    """work(*arguments) -> 0; else what is wrong is told in one line, and 2, or 130 where the user stopped it."""
    try:
        work(*arguments)
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: stopped; give the same command again", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def told_if_it_fails(path):
    """A full disk or a missing permission, while `path` is written, is told in one line."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path} cannot be written ({reason}): mend that, then give the same command again") from None


def write_whole(path, write):
    """Call write(temporary path), then rename: a file under its final name is always complete."""
    temporary = path.with_name(f"partial_{path.name}")
    with told_if_it_fails(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # half a file would keep the disk full
            raise


def write_json(path, content):
    """Strict JSON: what is not a finite number becomes null."""
    text = json.dumps(content, default=float)  # NumPy's float32
    content = json.loads(text, parse_constant=lambda name: None)  # NaN and Infinity
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def write_arrays(path, save=np.savez_compressed, **arrays):
    write_whole(path, lambda temporary: save(temporary, **arrays))


def write_table(path, header, rows):
    """A CSV file."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])

    write_whole(path, write)


def read_config(run):
    """config.json of a run, as a dictionary; None where there is no run yet."""
    path = run / "config.json"
    if not path.exists():
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        config = json.loads(path.read_text())
        if {"settings", "data", "versions", "finished"} <= config.keys() and "scores" in config["settings"]:
            return config
    raise UserError(
        f"{path} is broken, or of an earlier version: choose another --run, or delete {shlex.quote(str(run))}"
    )


def file_checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finished_model(run, name):
    """The model that a run was finished with, "vqvae" or "pixelcnn"; None where it is not finished.

    Import `modules` before. Another model, or a damaged one, is refused: the codes of a run are those of one VQ-VAE.
    """
    expected, path = read_config(run)["finished"].get(name), run / f"{name}.keras"
    if expected is None:
        return None
    if not path.exists() or file_checksum(path) != expected:
        raise UserError(
            f"{path} is not the model that this run was finished with: restore it, or train in another --run"
        )
    try:
        return keras.saving.load_model(path, compile=False)
    except (TypeError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is of another version ({cause}): train in another --run") from error


def progress_verbosity():
    """Of Keras's bars: they move on a terminal, and are a single line in a log."""
    return 1 if sys.stdout.isatty() else 2


def progress(items, unit):
    """The items one by one, with a bar that moves when one is done with."""
    bar = keras.utils.Progbar(len(items), unit_name=unit, verbose=progress_verbosity())
    for item in items:
        yield item
        bar.add(1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Print what a folder of slices holds, or make one out of OASIS-1.")
    parser.add_argument("folder", nargs="?", default="keras_png_slices_data", help="the folder of slices (%(default)s)")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="make it, out of the OASIS-1 in this folder")
    options = parser.parse_args(arguments)
    if options.source is None:
        return exit_code("dataset.py", load, options.folder)
    return exit_code("dataset.py", import_oasis, options.source, options.folder)


if __name__ == "__main__":
    sys.exit(main())
