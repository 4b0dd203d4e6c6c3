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
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
import warnings
from concurrent import futures

# Before the libraries are imported: Keras runs on TensorFlow, whatever keras.json says; no line of TensorFlow about
# cards that are not there; and no plots through a notebook, which hands its backend to processes that cannot have it.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "matplotlib_inline" in os.environ.get("MPLBACKEND", "") and importlib.util.find_spec("matplotlib_inline") is None:
    del os.environ["MPLBACKEND"]

import keras
import matplotlib.style
import nibabel
import numpy as np
import tensorflow as tf
from PIL import ExifTags, Image
from scipy import ndimage

SPLITS = ("train", "validate", "test")
HELD_OUT = 10  # without a validate folder, one subject in this many is held out of train
PHANTOM = "phantom.txt"  # marks a folder of phantoms


@dataclasses.dataclass
class Slices:
    """The slices of one split, ordered by case and slice number."""

    images: np.ndarray  # uint8 [0, 255], (N, H, W)
    names: np.ndarray  # file names (N,)
    cases: np.ndarray  # number of the subject, int32 (N,); -1 where not known
    slice_numbers: np.ndarray  # int32 (N,); -1 where not known

    def __getitem__(self, chosen):
        return Slices(self.images[chosen], self.names[chosen], self.cases[chosen], self.slice_numbers[chosen])

    @property
    def subjects(self):
        """How many there are; None where one is not known."""
        return None if (self.cases < 0).any() else len(np.unique(self.cases))


def to_float(images):
    """uint8 [0, 255], (N, H, W) -> float32 [0, 1], (N, H, W, 1)."""
    return np.asarray(images, np.float32)[..., None] / np.float32(255)


# ---- Reading -------------------------------------------------------------------------


def find_data(folder):
    """The folder that holds keras_png_slices_train: `folder` itself, or one inside it."""
    folder = pathlib.Path(folder)
    for candidate in [folder, *sorted(folder.glob("*"))]:
        if (candidate / "keras_png_slices_train").is_dir():
            return candidate
    problem = "no folder keras_png_slices_train in it, nor one level down" if folder.is_dir() else "no such folder"
    raise UserError(f"{folder}: {problem}; name the unzipped keras_png_slices_data by --data, or try train.py --demo")


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


def read_slice(path, image_size):
    """One image file -> its grey image, area-averaged to uint8 (image_size, image_size)."""
    image = tf.io.decode_image(tf.io.read_file(path), channels=1, expand_animations=False)
    image = tf.image.resize(image, (image_size, image_size), method="area")
    return tf.cast(tf.round(image[..., 0]), tf.uint8)


def is_broken(path):
    try:
        read_slice(os.fsencode(path), 1)
    except tf.errors.OpError:
        return True
    return False


def is_turned(path):
    """Whether a viewer shows this JPEG turned or mirrored, by its EXIF orientation."""
    with contextlib.suppress(OSError), Image.open(path) as image:
        return image.format == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


def read_images(paths, name, image_size):
    """Decode files in parallel: list of paths -> uint8 (N, image_size, image_size). Every unusable file is reported."""

    def refuse(files, problem, remedy):
        names = ", ".join(str(path) for path in files[:10])
        raise UserError(f"{len(files)} {problem} image file(s), {remedy}: {names}")

    if turned := [path for path in paths if path.suffix.lower() != ".png" and is_turned(path)]:
        refuse(turned, "turned (by EXIF)", "save upright")
    print(f"{name}: reading {len(paths)} slices")
    decoded = tf.data.Dataset.from_tensor_slices([os.fsencode(path) for path in paths])
    read = functools.partial(read_slice, image_size=image_size)
    decoded = decoded.map(read, num_parallel_calls=tf.data.AUTOTUNE).batch(256).prefetch(2)
    try:
        return np.concatenate([batch.numpy() for batch in progress(decoded, "batch")])
    except tf.errors.OpError:
        if broken := [path for path in paths if is_broken(path)]:
            refuse(broken, "unreadable", "restore or delete")
        raise


def load_split(folder, name, image_size=64):
    """Every slice of one split folder, as `Slices`."""
    paths = list_slices(folder)
    cases, slice_numbers = np.array([parse_name(path.name) for path in paths], np.int32).T
    images = read_images(paths, name, image_size)
    if (images.min(axis=(1, 2)) == images.max(axis=(1, 2))).all():
        raise UserError(f"{folder}: each of its {len(images)} slices is of one grey; unzip the data again")
    if images.max() < 64:
        warnings.warn(
            f"{folder}: the brightest pixel is {images.max()} of 255 (12 bits in a 16-bit PNG look like this); "
            "write slices that are bright in a viewer",
            stacklevel=3,
        )
    return Slices(images, np.array([path.name for path in paths]), cases, slice_numbers)


def load(folder, splits=SPLITS, image_size=64):
    """Read the splits of the data in `folder`, or one level down: {name: Slices}.

    Without a validate folder, the last tenth of train's subjects is held out for it.
    """
    root = find_data(folder)
    loaded = {}
    for name in splits:
        split_folder = root / f"keras_png_slices_{name}"
        if split_folder.is_dir():
            loaded[name] = load_split(split_folder, name, image_size)
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
        print(f"{name}: {len(split.images)} slices{subjects}, {image_size}x{image_size}, "
              f"uint8 {split.images.min()} to {split.images.max()}")  # fmt: skip
    return loaded


def is_phantom(folder):
    """Whether the data in `folder`, or one level down, are phantoms."""
    return (find_data(folder) / PHANTOM).exists()


def hold_out(train):
    """Split train into (train, validate): a tenth of the subjects, and of the slices of no known subject."""
    heads, named, held_out = heads_of(train), train.cases >= 0, np.zeros(len(train.cases), bool)
    for group in (named, ~named):
        members = np.unique(heads[group])
        if len(members) > 1:
            held_out |= np.isin(heads, members[-max(1, len(members) // HELD_OUT) :])
    if not held_out.any():
        raise UserError("only one subject in train and no validate folder: nothing left to train on; add subjects")
    return train[~held_out], train[held_out]


def fingerprint(loaded):
    """A fingerprint of a data set: {split: {"images", "subjects", "sha256"}} of names and pixels."""
    return {
        name: {
            "images": len(split.images),
            "subjects": split.subjects,
            "sha256": hashlib.sha256(os.fsencode("\n".join(split.names)) + split.images.tobytes()).hexdigest(),
        }
        for name, split in loaded.items()
    }


def write_data(folder, splits, head, marker=None):
    """Write a new folder of slices, which appears complete or not at all.

    Args:
        folder: `pathlib.Path`, which does not exist yet.
        splits: {split: numbers of its cases}.
        head: function, number of a case -> uint8 (L, H, W).
        marker: name of an empty file that goes into the folder.

    Raises: `UserError` where it cannot be written.
    """
    heads = [(split, case) for split, cases in splits.items() for case in cases]
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial", dir=folder.parent) as partial:
            whole = pathlib.Path(partial) / folder.name
            whole.mkdir()
            for split, case in progress(heads, "head"):
                for index, picture in enumerate(head(case)):
                    path = whole / f"keras_png_slices_{split}" / f"case_{case:03d}_slice_{index}.nii.png"
                    tf.io.write_file(str(path), tf.io.encode_png(picture[..., None]))  # makes the folders too
            if marker:
                (whole / marker).touch()
            whole.rename(folder)


# ---- The same folder, out of OASIS-1 as anybody can download it ----------------------


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
    if target.exists():
        raise UserError(f"{target} exists: name another folder, or delete it first")
    source, heads = find_heads(folder)
    splits = split_cases(list(heads))
    write_data(target, splits, lambda case: head_slices(heads[case], source))
    counts = ", ".join(f"{split} {len(cases)}" for split, cases in splits.items())
    print(f"{target}: 32 slices of every head; heads: {counts}")


# ---- Heads, augmentation and batches -------------------------------------------------


def heads_of(slices):
    """Which slices are of the same head, from 0: int (N,). A slice of no known subject is one of its own."""
    unknown = slices.cases < 0
    cases = np.where(unknown, np.arange(len(unknown)) - len(unknown), slices.cases)
    return np.unique(cases, return_inverse=True)[1]


def slices_below(cases, labels):
    """Index of the slice of the next lower label in the same head, -1 where there is none: int (N,) twice -> (N,)."""
    heads = list(zip(cases.tolist(), labels.tolist()))
    places = {head: index for index, head in enumerate(heads)}
    lower = [places.get((case, label - 1), -1) for case, label in heads]
    return np.where((cases < 0) | (labels < 1), -1, lower).astype(np.int32)


def with_mirrored(images, mirror):
    """[images (N, H, W)], and their mirror images too where `mirror` says so.

    The heads lie on their side: up and down of a slice are left and right of the head.
    """
    return [images, images[:, ::-1]] if mirror else [images]


# What `augment` changes at most: shares of the side down and across, degrees, growth, and ln gamma.
CHANGE_LIMITS = np.array([1 / 32, 1 / 32, 4, 0.04, 0.12])
NUM_CHANGES = len(CHANGE_LIMITS) + 1  # numbers that describe a copy: those, and a 1


def change(image, amounts):
    """One slice shifted, turned, scaled (cubic splines), lighter or darker: uint8 (H, W) -> the same."""
    down, across, turn, growth, gamma = amounts * CHANGE_LIMITS
    cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    matrix = np.array([[cos, -sin], [sin, cos]]) / (1 + growth)  # from the new picture to the old
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - matrix @ (centre + np.array(image.shape) * (down, across))
    moved = ndimage.affine_transform(image / np.float32(255), matrix, offset, order=3).clip(0, 1)
    return np.rint(255 * moved ** np.exp(gamma)).astype(np.uint8)


def augment(images, heads, seed):
    """A changed copy of each slice, all slices of a head changed alike; and the changes.

    Args:
        images: uint8 (N, H, W).
        heads: int (N,) from 0, the same for slices of one head.
        seed: int, or several.

    Returns: uint8 (N, H, W); float32 (N, 6): five uniform numbers from -1 to 1, how much of each of
        CHANGE_LIMITS was applied, and a 1, where a slice as it is has six zeros.
    """
    amounts = np.random.default_rng(seed).uniform(-1, 1, (max(heads) + 1, len(CHANGE_LIMITS)))[heads]
    with futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # scipy.ndimage lets them run side by side
        changed = list(threads.map(change, images, amounts))
    return np.stack(changed), np.pad(amounts, [[0, 0], [0, 1]], constant_values=1).astype(np.float32)


def shuffled_batches(examples, variants, batch_size, seed, epochs):
    """Batches of index pairs (example, variant), int32 (batch_size, 2), that depend on `seed` and the epoch alone.

    An epoch visits the examples in a new order, each at most once, as one of its variants at random. What does not
    fill a last batch is left out of that epoch.
    """

    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(examples), seed=(seed, 2 * epoch))
        choice = tf.random.stateless_uniform((examples,), (seed, 2 * epoch + 1), maxval=variants, dtype=tf.int32)
        indices = tf.data.Dataset.from_tensor_slices(tf.stack([order, choice], axis=1))
        return indices.batch(batch_size, drop_remainder=True)

    return tf.data.Dataset.range(epochs.start, epochs.stop).flat_map(one_epoch)


# ---- The demo phantom ----------------------------------------------------------------


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
    write_data(pathlib.Path(folder), cases, lambda case: phantom_slices(np.random.default_rng((seed, case))), PHANTOM)


# ---- Errors, whole files and progress bars, for all scripts --------------------------


class UserError(Exception):
    """Something the user can mend; shown as one line, without a traceback."""


def run_script(script, work, *arguments):
    """Call work(*arguments), whose errors end in one line: the exit code, which is 0, 2, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # that of a notebook has not
            stream.reconfigure(errors="backslashreplace")  # file names may have letters that the console has not
    try:
        if keras.backend.backend() != "tensorflow":
            raise UserError(
                f"Keras already runs on {keras.backend.backend()} here: restart Python, and call this first"
            )
        with matplotlib.style.context("default"):  # whatever the user's matplotlibrc says
            work(*arguments)
    except UserError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"{script}: {place}{error.strerror or error}; mend that, then try again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: stopped; give the same command again", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def write_errors(path):
    """A full disk or a missing permission, while `path` is written, becomes a `UserError` that names it."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path} cannot be written ({reason}): mend that, then give the same command again") from None


def write_whole(path, write):
    """Call write(temporary path), then rename: a file under its final name is always complete."""
    temporary = path.with_name(f".partial{path.suffix}")  # hidden, as no slice is
    with write_errors(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        except Exception:
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


def write_figure(path, figure):
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=85, format="png"))


def verbosity():
    """Of Keras's progress bars: they move on a terminal, and are a single line in a log."""
    return 1 if sys.stdout.isatty() else 2


def progress(items, unit):
    """The items one by one, with a bar that moves when one is done with."""
    bar = keras.utils.Progbar(len(items), unit_name=unit, verbose=verbosity())
    for item in items:
        yield item
        bar.add(1)


def folder(text):
    """A folder on the command line, in which a shell leaves the ~ of --run=~/here."""
    return pathlib.Path(text).expanduser()


def number(kind, low, high):
    """A number on the command line, int or float, from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    parse.__name__ = kind.__name__  # in the message of argparse, where it is no number
    return parse


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Print what a folder of slices holds, or make one out of OASIS-1.")
    data = {"nargs": "?", "type": folder, "default": "keras_png_slices_data"}
    parser.add_argument("folder", help="the folder of slices (%(default)s)", **data)
    source = "make it, out of the OASIS-1 in this folder"
    parser.add_argument("--from", dest="source", metavar="FOLDER", type=folder, help=source)
    options = parser.parse_args(arguments)
    with tf.device("CPU"):  # the memory of a GPU is left to a training
        if options.source is None:
            return run_script("dataset.py", load, options.folder)
        return run_script("dataset.py", import_oasis, options.source, options.folder)


if __name__ == "__main__":
    sys.exit(main())
