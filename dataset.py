"""The OASIS slices: PNG files -> one uint8 array a split, and batches of it for training.

The preprocessed OASIS set, as unzipped, has 32 slices of every subject:

    keras_png_slices_data/
      keras_png_slices_train/     case_001_slice_0.nii.png ...   fits the models
      keras_png_slices_validate/  case_402_slice_0.nii.png ...   chooses the best epoch
      keras_png_slices_test/      case_441_slice_0.nii.png ...   is only ever measured
      keras_png_slices_seg_*/     masks, ignored

Other PNG or JPEG files in these three folders work too. `write_phantom` makes such a folder out of random head
phantoms, to try things out without any download. As a script, this file prints what it finds; with --from it makes
such a folder out of OASIS-1, unpacked into FOLDER:

    python dataset.py keras_png_slices_data
    python dataset.py --from FOLDER keras_png_slices_data
"""

import argparse
import contextlib
import csv
import dataclasses
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

# Set before the libraries are imported: Keras runs on TensorFlow, whatever keras.json says; TensorFlow prints nothing
# about missing GPUs; and the plotting backend of a notebook, which its processes inherit, is dropped if they lack it.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "matplotlib_inline" in os.environ.get("MPLBACKEND", "") and importlib.util.find_spec("matplotlib_inline") is None:
    del os.environ["MPLBACKEND"]

import keras
import matplotlib.style
import nibabel
import numpy as np
import tensorflow as tf
import tqdm
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
        """Their count; None if the subject of any slice is not known."""
        return None if (self.cases < 0).any() else len(np.unique(self.cases))


def to_float(images):
    """uint8 [0, 255], (N, H, W) -> float32 [0, 1], (N, H, W, 1)."""
    return np.asarray(images, np.float32)[..., None] / np.float32(255)


# ---- Reading -------------------------------------------------------------------------


def visible(folder):
    """What is in a folder, but for hidden files, such as the "._case_001..." that macOS leaves in zips."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def find_data(folder):
    """The folder that holds keras_png_slices_train: `folder` itself, or the only one inside it that does."""
    folder = pathlib.Path(folder)
    if folder.is_dir():
        found = [path for path in (folder, *visible(folder)) if (path / "keras_png_slices_train").is_dir()]
        if len(found) == 1 or found[:1] == [folder]:
            return found[0]
        names = ", ".join(path.name for path in found)
        none = ": no folder keras_png_slices_train in it, nor one level down"
        problem = f": several data sets in it ({names})" if found else none
    else:
        kind = folder.suffix.replace(".", " ")  # of .zip and .tar files, say
        problem = f" is a{kind} file: unzip it" if folder.is_file() else ": no such folder"
    raise UserError(f"{folder}{problem}; name the unzipped keras_png_slices_data by --data, or try train.py --demo")


SLICE = r"(?<![a-z])slice[ _-]*0*(\d{1,9})(?!\d)"  # nine digits at most, so that the number is an int32


def parse_name(name):
    """Case and slice number: Case-001_slice_02.nii (1).png -> (1, 2); (-1, -1) for a name of another form."""
    match = re.match(r"case[ _-]*0*(\d{1,9})[ _-]*" + SLICE, name.lower())
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def slice_number(name):
    """The slice number alone, wherever it is in a name, as in case_001_slice_2.nii.png or P7-Slice02.jpg; else -1."""
    match = re.search(SLICE, name.lower())
    return int(match[1]) if match else -1


def list_slices(folder, remedy="unzip the data again"):
    """Paths of the slices in one folder, by case and slice number, else by name."""
    paths = [path for path in visible(folder) if re.match(r"(?s)(?!seg_).*\.(?i:png|jpe?g)$", path.name)]
    if not paths:
        raise UserError(f"{folder}: no slices in it (PNG or JPEG; seg_* masks do not count); {remedy}")
    return sorted(paths, key=lambda path: (parse_name(path.name), path.name))


def pairs_of(names, keys):
    """Every name whose key an earlier one has, after that one: ["a and b", ...]."""
    first = {}
    return [f"{first[key]} and {name}" for name, key in zip(names, keys) if first.setdefault(key, name) != name]


def read_slice(path, image_size):
    """One file -> its grey picture, padded with black to a square and area-averaged to uint8; its height and width."""
    image = tf.io.decode_image(tf.io.read_file(path), channels=1, expand_animations=False)
    shape = tf.shape(image)[:2]
    image = tf.image.resize_with_crop_or_pad(image, tf.reduce_max(shape), tf.reduce_max(shape))
    image = tf.image.resize(image, (image_size, image_size), method="area")
    return tf.cast(tf.round(image[..., 0]), tf.uint8), shape


def is_turned(path):
    """Whether a viewer shows this JPEG turned or mirrored, by its EXIF orientation."""
    with contextlib.suppress(OSError), Image.open(path) as image:
        return image.format == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return False


def refuse(files, problem, remedy):
    """Stop if there are any such files, and name ten of them."""
    if files:
        raise UserError(f"{len(files)} {problem}, {remedy}: {', '.join(map(str, files[:10]))}")


def read_images(paths, name, image_size):
    """Decode files in parallel: list of paths -> uint8 (N, image_size, image_size). Every unusable file is reported."""
    jpegs = [path for path in paths if path.suffix.lower() != ".png"]
    refuse([path for path in jpegs if is_turned(path)], "turned (by EXIF) image file(s)", "save upright")
    print(f"{name}: reading {len(paths)} slices")
    files = tf.data.Dataset.from_tensor_slices([os.fsencode(path) for path in paths]).enumerate()
    read = files.map(lambda index, path: (index, *read_slice(path, image_size)), num_parallel_calls=tf.data.AUTOTUNE)
    batches = without_autotuning(read.ignore_errors().batch(256))
    batches = list(progress(batches, "batch", -(-len(paths) // 256)))
    done = {index for batch in batches for index in batch[0].numpy()}
    refuse([path for i, path in enumerate(paths) if i not in done], "unreadable image file(s)", "restore or delete")
    _, images, shapes = map(np.concatenate, zip(*batches))
    shapes = [f"{width}x{height}" for height, width in np.unique(shapes, axis=0)]
    if len(shapes) > 1:
        print(f"{name}: slices of {len(shapes)} shapes, each padded to a square: {', '.join(shapes[:10])}")
    return images


def load_split(folder, name, image_size=64):
    """Every slice of one split folder, as `Slices`."""
    paths = list_slices(folder)
    names, numbers = [path.name for path in paths], [parse_name(path.name) for path in paths]
    stems = (re.sub(r"(?<![\d.])0+(?=\d)", "", path.stem.lower()) for path in paths)  # slice_03 -> slice_3
    pairs = pairs_of(names, (known if known[0] >= 0 else stem for known, stem in zip(numbers, stems)))
    refuse(pairs, f"slice(s) with two files in {folder}", "keep one of each")
    images = read_images(paths, name, image_size)
    if (images.min(axis=(1, 2)) == images.max(axis=(1, 2))).all():
        raise UserError(f"{folder}: each of its {len(images)} slices is of one grey; unzip the data again")
    if images.max() < 64:
        remedy = "(12 bits in a 16-bit PNG look like this); write slices that are bright in a viewer"
        warnings.warn(f"{folder}: the brightest pixel is {images.max()} of 255 {remedy}", stacklevel=3)
    pairs = pairs_of(names, (hash(image.tobytes()) for image in images))
    if copies := [pair for pair in pairs if re.search(r"(?i)(\(\d+\)|copy( \d+)?)\.\w+( and |$)", pair)]:
        warnings.warn(f"{folder}: {copies[0]} have the same pixels ({len(copies)} such): delete copies", stacklevel=3)
    return Slices(images, np.array(names), *np.array(numbers, np.int32).T)


def load(folder, splits=SPLITS, image_size=64):
    """{split: Slices} of the data in `folder`, or one level down. A validate folder that is not there is held out."""
    root, loaded, folders = find_data(folder), {}, {name: f"keras_png_slices_{name}" for name in SPLITS}
    print(f"data: {root.resolve()}")
    for path in visible(root):
        if re.match("(?i)keras_png_slices?_(?!seg)", path.name) and path.name not in folders.values() and path.is_dir():
            raise UserError(f"{path} is none of {', '.join(folders.values())}: rename it, or move it away")
    for name in splits:
        if (root / folders[name]).is_dir():
            loaded[name] = load_split(root / folders[name], name, image_size)
        elif name != "validate":
            raise UserError(f"{root}: no folder {folders[name]} in it; unzip the data again")
    for one, other in itertools.combinations(loaded, 2):
        if shared := ({*loaded[one].cases} & {*loaded[other].cases}) - {-1}:
            remedy = "number the subjects of each split differently; if they are the same people, remove them from one"
            raise UserError(f"case_{min(shared):03d} is in both {one} and {other}: {remedy}")
    if unnamed := [name for split in loaded.values() for name in split.names[split.cases < 0]]:
        form = "case_N_slice_M, of 9 digits at most: subjects cannot be told apart, nor leaks found"
        warnings.warn(f"some files, such as {unnamed[0]}, are not named {form}", stacklevel=2)
    if "validate" in splits and "validate" not in loaded:
        loaded["train"], loaded["validate"] = hold_out(loaded["train"])
        print(f"validate: {len(loaded['validate'].images)} slices held out of train")
    for name, split in loaded.items():
        print(f"{name}: {len(split.images)} slices of {split.subjects or 'unknown'} subjects, "
              f"{image_size}x{image_size}, uint8 {split.images.min()} to {split.images.max()}")  # fmt: skip
    return loaded


def is_phantom(folder):
    """Whether the data in `folder`, or one level down, are phantoms."""
    return (find_data(folder) / PHANTOM).exists()


def hold_out(train):
    """Split train into (train, validate): a tenth of the subjects, and of the slices whose subject is not known."""
    heads, named = heads_of(train), train.cases >= 0
    groups = [group for group in (np.unique(heads[named]), np.unique(heads[~named])) if len(group) > 1]
    if not groups:
        raise UserError("only one subject in train and no validate folder: nothing left to train on; add subjects")
    held_out = np.isin(heads, np.concatenate([group[-max(1, len(group) // HELD_OUT) :] for group in groups]))
    return train[~held_out], train[held_out]


def fingerprint(loaded):
    """A fingerprint of a data set: {split: {"images", "subjects", "sha256"}} of names and pixels."""
    found = {}
    for name, split in loaded.items():
        sha256 = hashlib.sha256(os.fsencode("\n".join(split.names)) + split.images.tobytes()).hexdigest()
        found[name] = {"images": len(split.images), "subjects": split.subjects, "sha256": sha256}
    return found


def write_data(folder, splits, head, marker=None):
    """Write a new folder, which appears complete or not at all: head(case), uint8 (L, H, W), for {split: its cases}."""
    heads = [(split, case) for split, cases in splits.items() for case in cases]
    with write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.partial", dir=folder.parent) as partial:
            whole = pathlib.Path(partial) / folder.name
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
    pattern: str  # of folder/file; the groups are case and visit, and for single slices scan and number
    shape: tuple[int, ...]  # of an array in a file
    axis: int | None  # of a volume, from slice to slice; None where a file is one slice
    taken: range | None  # of a volume, the slices that are taken, lowest first; else the highest are
    size: tuple[int, int]  # what a slice is scaled to, before it is centred in 256 x 256 pixels


# Names, shapes and axes are those of the documentation; none of the three was tested on its files (see README.md).
#   Discs: 1 mm voxels in Talairach space; left-right, posterior to anterior, inferior to superior. The slices taken,
#     midbrain to the roof of the lateral ventricles, are an estimate. The size is 256/208 pixels a mm.
#   neurite-oasis: the same slices and size in FreeSurfer's Talairach space, where heads are about 5 % larger; right to
#     left, superior to inferior, posterior to anterior. z = 0 is at 128 - 31, where 31 voxels were cut off.
#   JPEG copies: single scans, axial, with the skull, not aligned; 61 slices a millimetre apart, of which the highest
#     32 are the most like the others'. 496 x 248 pixels are 256 x 160 mm, since a scan has 256 x 128 voxels of
#     1 x 1.25 mm; a pixel a mm keeps the whole frame. That the heads face right is a guess.
SOURCES = (
    Source("OASIS-1 discs", "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr",
           r".*/OAS1_(?P<case>\d+)_MR(?P<visit>\d+)_mpr_n\d+_anon_111_t88_masked_gfc\.(?:hdr|img)",
           shape=(176, 208, 176), axis=2, taken=range(70, 102), size=(216, 256)),
    Source("neurite-oasis", "OASIS_OAS1_0001_MR1/aligned_norm.nii.gz",
           r"OASIS_OAS1_(?P<case>\d+)_MR(?P<visit>\d+)/aligned_norm\.nii\.gz",
           shape=(160, 192, 224), axis=1, taken=range(103, 71, -1), size=(196, 276)),
    Source("JPEG copies", "OAS1_0001_MR1_mpr-1_100.jpg",
           r".*/OAS1_(?P<case>\d+)_MR(?P<visit>\d+)_mpr-(?P<scan>\d+)_(?P<number>\d+)\.jpg",
           shape=(248, 496), axis=None, taken=None, size=(160, 256)),
)  # fmt: skip


def files_below(folder, above=()):
    """Every file in `folder` and below, following links. What cannot be read raises an OSError: a head may be in it."""
    above = (*above, os.path.realpath(folder))
    for path in visible(folder):
        if path.is_file():
            yield path
        elif os.path.realpath(path) not in above:  # else it is a link that leads back
            yield from files_below(path, above)


def find_heads(folder):
    """What is in `folder` or below: Source, {case: {slice number: path}}; a volume is number 0."""
    if not folder.is_dir():
        raise UserError(f"--from {folder}: no such folder; name the one that OASIS-1 was unpacked into")
    paths = list(files_below(folder))
    for source in SOURCES:
        scans = {}  # (case, visit, scan) -> {slice number: path}
        for path in paths:
            if match := re.fullmatch(source.pattern, f"{path.parent.name}/{path.name}"):
                *scan, number = (int(match.groupdict().get(name, 0)) for name in ("case", "visit", "scan", "number"))
                scans.setdefault(tuple(scan), {}).setdefault(number, path)
        if scans:
            first = {}  # scan of each case: others are the same head again, and would leak from split to split
            for (case, _, _), files in sorted(scans.items()):
                first.setdefault(case, files)
            visits = len({scan[:2] for scan in scans})
            print(f"{folder}: {len(first)} heads of {source.name}; left out: {visits - len(first)} second visits, "
                  f"{len(scans) - visits} repeated scans")  # fmt: skip
            return source, first
    examples = ", or ".join(f"{source.example} ({source.name})" for source in SOURCES)
    raise UserError(f"--from {folder}: nothing known in it; unpack OASIS-1 there. Looked for files such as {examples}")


def read_checked(path, source):
    """The array in one file: grey values, of the shape that `source` has."""
    try:
        if source.axis is None:
            array = tf.io.decode_image(tf.io.read_file(os.fsencode(path)), channels=1).numpy()
        else:
            array = np.asarray(nibabel.load(path).dataobj)  # as stored, whatever the header says of directions
    except Exception as error:  # nibabel has many kinds of its own for damaged files
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({cause}): unpack or download it again") from None
    if array.shape not in (source.shape, (*source.shape, 1)):
        problem = f"is of shape {array.shape}, not {source.shape}"
    elif array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        problem = f"has voxels that are not numbers, or not one each ({array.dtype})"
    else:
        return array.reshape(source.shape)
    raise UserError(f"{path} {problem}: take it out of the folder")


def head_slices(files, source):
    """One head, {slice number: path}, as in the course set: uint8 (32, 256, 256). White is its 99.9th percentile."""
    path = next(iter(files.values()))
    if source.axis is not None:
        slices = np.moveaxis(read_checked(path, source), source.axis, 0)[list(source.taken)]
    elif len(files) < 32:
        raise UserError(f"{path}: of this scan there are {len(files)} slices, not 32 or more: download it again")
    else:
        slices = np.stack([read_checked(files[number], source) for number in sorted(files)[-32:]])
    white = np.percentile(slices.astype(np.float64), 99.9)  # of float32, versions of NumPy round it differently
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
    print(f"{target}: 32 slices of each head; {', '.join(f'{split} {len(cases)}' for split, cases in splits.items())}")


# ---- Heads, augmentation and batches -------------------------------------------------


def heads_of(slices):
    """Number of the head of each slice, from 0: int (N,). A slice of an unknown subject is a head of its own."""
    unknown = slices.cases < 0
    cases = np.where(unknown, np.arange(len(unknown)) - len(unknown), slices.cases)
    return np.unique(cases, return_inverse=True)[1]


def slices_below(cases, labels):
    """Index of the slice of the next lower label in the same head, -1 where there is none: int (N,) twice -> (N,)."""
    heads = list(zip(cases.tolist(), labels.tolist()))
    places = {head: index for index, head in enumerate(heads)}
    lower = [places.get((case, label - 1), -1) for case, label in heads]
    return np.where((cases < 0) | (labels < 1), -1, lower).astype(np.int32)


def mirror_axis(images):
    """Axis along which the mean of images (N, H, W) is symmetric: 1 (heads on their side), 2 (upright), else None."""
    mean = images.mean(axis=0)
    down, across = (np.corrcoef(mean.ravel(), np.flip(mean, axis).ravel())[0, 1] for axis in (0, 1))
    if max(down, across) < 0.95 or abs(down - across) < 0.01:  # course slices have .992 and .939
        return None
    return 1 if down > across else 2


def with_mirrored(images, axis):
    """[images (N, H, W)], and their mirror images too unless `axis` is None."""
    return [images] if axis is None else [images, np.flip(images, axis)]


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
    """A changed copy of each slice, uint8 (N, H, W), those of a head changed alike; and the changes, float32 (N, 6).

    `heads` is equal for slices of a head, int (N,) from 0. Changes are five uniform numbers from -1 to 1, how much of
    each of CHANGE_LIMITS was applied, and a 1. (A slice as it is has six zeros.)
    """
    amounts = np.random.default_rng(seed).uniform(-1, 1, (heads.max() + 1, len(CHANGE_LIMITS)))[heads]
    with futures.ThreadPoolExecutor(os.cpu_count()) as threads:  # scipy.ndimage lets them run side by side
        changed = list(threads.map(change, images, amounts))
    return np.stack(changed), np.pad(amounts, [[0, 0], [0, 1]], constant_values=1).astype(np.float32)


def without_autotuning(data):
    """The same tf.data.Dataset. With autotuning the end of a pass may wait as long as the pass took, up to a minute."""
    options = tf.data.Options()
    options.autotune.enabled = False
    return data.with_options(options)


def shuffled_batches(examples, variants, batch_size, seed, epochs):
    """Batches of index pairs (example, variant), int32 (batch_size, 2), that depend on `seed` and the epoch alone.

    An epoch visits the examples in a new order, each at most once, as one of its variants at random. Examples that
    do not fill a last batch are left out of that epoch.
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
    heights = np.linspace(0, 1, slices) + rng.uniform(-0.1, 0.1)  # 0: thalamus, 1: top of the ventricles
    # Both halves of a head are alike. Lengths are in units of the head, so that all in it grows with it.
    axis = np.linspace(-1, 1, size, dtype="float32")
    along, across = (axis + tilt * axis[:, None]) / length, np.abs(axis[:, None] - tilt * axis) / width
    egg = (np.abs(along) ** 2.3 + (across * (1 + 0.08 * along)) ** 2.3) ** (1 / 2.3)  # 1 at the skull; wider behind
    fissure = np.hypot(1.4 * across, 2 * np.maximum(0.5 - np.abs(along + 0.02), 0))  # 0 in it, none at the callosum
    angle = np.arctan2(across, along)

    def ellipsoid(x, y, height, radii, lean=0.0):
        """Depth (size, size) below the surface of one at (x, y), `height` off its middle; its front leans outwards."""
        x, y = along - x, across - y
        x, y = (x + lean * y) / radii[0], (y - lean * x) / radii[1]
        return radii[1] * (1 - np.sqrt(x**2 + y**2 + (height / radii[2]) ** 2))

    pictures = []
    for height in heights.tolist():  # Python floats, which keep the arrays float32
        skull = 0.93 - 0.06 * height**2 - egg  # depths are positive inside
        sulci = (0.5 + 0.3 * np.cos(11 * angle + shift + height) + 0.2 * np.cos(7 * angle - shift)) ** 2
        image = np.zeros_like(egg)
        for depth, brightness in (  # each organ covers what was painted before it
            (skull + 0.16, scalp),
            (skull + 0.07, fluid),  # bone is as dark as the fluid in it
            (np.minimum(skull - 0.04 * sulci, fissure) - gap, grey),  # cortex
            (np.minimum(skull - 0.14 * sulci, fissure) - gap - 0.09, white),
            (ellipsoid(-0.10, 0.18, height, (0.23, 0.15, 0.7), -0.2), nucleus),  # thalamus
            (ellipsoid(0.12, 0.44, height, (0.26, 0.12, 0.6), -0.2), nucleus),  # putamen
            (ellipsoid(0.24, 0.26, height - 0.4, (0.22, 0.12, 0.6)), nucleus),  # caudate nucleus
            (ellipsoid(-0.04, 0.00, height, (0.16, 0.6 * wide, 0.6)), fluid),  # third ventricle
            (ellipsoid(0.30, 0.05 + wide, height - 0.4, (0.22, wide, 0.6), 0.35), fluid),  # frontal horn
            (ellipsoid(0.02, 0.05 + wide, height - 0.8, (0.40, wide, 0.4)), fluid),  # body of the lateral ventricle
            (ellipsoid(-0.36, 0.12 + wide, height - 0.2, (0.26, wide, 0.7), -0.5), fluid),  # occipital horn
        ):
            image += np.clip(0.5 + depth * size / 8, 0, 1) * (brightness - image)  # a soft edge, as in a scan
        pictures.append(np.rint(255 * image).astype("uint8"))
    return np.stack(pictures)


def write_phantom(folder, train=24, validate=4, test=4, seed=0):
    """Write that many phantom subjects to the new `folder` as PNGs, in the layout of the real data set."""
    cases = {"train": range(1, 1 + train), "validate": range(402, 402 + validate), "test": range(441, 441 + test)}
    print(f"drawing {train + validate + test} head phantoms into {folder}")
    write_data(pathlib.Path(folder), cases, lambda case: phantom_slices(np.random.default_rng((seed, case))), PHANTOM)


# ---- Errors, whole files and progress bars, for all scripts --------------------------


class UserError(Exception):
    """Something the user can fix; shown as one line, without a traceback."""


def run_script(script, work, *arguments):
    """Call work(*arguments), whose errors end in one line: the exit code, which is 0, 2, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # that of a notebook has not
            stream.reconfigure(errors="backslashreplace")  # file names may have letters that the console has not
    try:
        if keras.backend.backend() != "tensorflow":
            raise UserError(f"Keras already runs on {keras.backend.backend()}: restart Python, and call this first")
        with matplotlib.style.context("default"):  # whatever the user's matplotlibrc says
            work(*arguments)
        return 0
    except UserError as error:
        code, message = 2, error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        code, message = 2, f"{place}{error.strerror or error}; fix that, then try again"
    except KeyboardInterrupt:
        code, message = 130, "stopped; give the same command again"
    print(f"{script}: {message}", file=sys.stderr)
    return code


@contextlib.contextmanager
def write_errors(path):
    """A full disk or a missing permission, while `path` is written, becomes a `UserError` that names it."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path} cannot be written ({reason}): fix that, then give the same command again") from None


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
    content = json.loads(json.dumps(content, default=float), parse_constant=lambda name: None)  # float: of NumPy's
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
    """Of Keras's `fit`: bars that move on a terminal, a line an epoch in a log."""
    return 1 if sys.stdout.isatty() else 2


def progress(items, unit, total=None):
    """The items one by one, with a bar if this is a terminal."""
    return tqdm.tqdm(items, unit=unit, total=total, disable=None, file=sys.stdout)


def folder(text):
    """A path on the command line, in which a shell leaves the ~ of --run=~/here."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty (a shell variable that is not set?)")
    return pathlib.Path(os.path.expanduser(text))


def number(kind, low, high):
    """A number on the command line, int or float, from low to high."""

    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {text}")
        return value

    parse.__name__ = kind.__name__  # in the message of argparse, where it is no number
    return parse


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Print what a folder of slices holds, or make one out of OASIS-1.")
    parser.add_argument("folder", nargs="?", type=folder, default="keras_png_slices_data", help="slices (%(default)s)")
    source = "make it, out of the OASIS-1 in this folder"
    parser.add_argument("--from", dest="source", metavar="FOLDER", type=folder, help=source)
    options = parser.parse_args(arguments)
    with tf.device("CPU"):  # the memory of a GPU is left to a training
        work = [load] if options.source is None else [import_oasis, options.source]
        return run_script("dataset.py", *work, options.folder)


if __name__ == "__main__":
    sys.exit(main())
