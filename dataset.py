"""The OASIS slices: PNG files -> one uint8 array a split, and batches of it for training.

The preprocessed OASIS set, as unzipped, has 32 slices of every subject:

    keras_png_slices_data/
      keras_png_slices_train/     case_001_slice_0.nii.png ...   fits the models
      keras_png_slices_validate/  case_402_slice_0.nii.png ...   chooses the best epoch
      keras_png_slices_test/      case_441_slice_0.nii.png ...   is only ever measured
      keras_png_slices_seg_*/     masks, ignored

Other PNG or JPEG files in these three folders work too. `write_phantom` makes such a folder out of
random head phantoms, for a try without any download. Run as a script, this file prints what it finds:

    python dataset.py keras_png_slices_data
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import warnings
import zipfile
import zlib

import numpy as np
from scipy import ndimage


@contextlib.contextmanager
def quiet_start():
    """Keep a dozen lines that TensorFlow writes past sys.stderr, whatever its log level, off the screen."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


with quiet_start():
    import keras
    import tensorflow as tf

SPLITS = ("train", "validate", "test")
IMAGE_SIZE = 64  # pixels a side, after resizing
HELD_OUT = 10  # without a validate folder, one subject in this many is held out of train


@dataclasses.dataclass
class Split:
    """The slices of one split, ordered by case and slice number."""

    images: np.ndarray  # uint8 [0, 255], (N, 64, 64)
    names: list[str]  # file names
    subjects: list[str] | None  # "case_001", one a slice; None where the names do not tell
    labels: np.ndarray | None  # slice numbers, int32 (N,); None where the names do not tell


def known_labels(split, num_labels):
    """Slice numbers below `num_labels`, -1 for others and where the names do not tell: int32 (N,)."""
    labels = np.full(len(split.images), -1, np.int32) if split.labels is None else split.labels
    return np.where(labels < num_labels, labels, -1)


def to_float(images):
    """uint8 [0, 255], (N, H, W) -> float32 [0, 1], (N, H, W, 1)."""
    return tf.cast(images, tf.float32)[..., None] / 255.0


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


def find_data(folder):
    """The folder that holds keras_png_slices_train: `folder` itself, or one inside it."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"--data {folder}: no such folder; name the unzipped keras_png_slices_data (or try python train.py --demo)"
        )
    for candidate in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        if (candidate / "keras_png_slices_train").is_dir():
            return candidate
    raise UserError(
        f"--data {folder}: no folder keras_png_slices_train in it, nor one level down; "
        "name the unzipped keras_png_slices_data"
    )


def parse_name(name):
    """Case and slice number: case_001_slice_2.nii.png -> (1, 2); None for a name of another form."""
    match = re.match(r"case_(\d+)_slice_(\d{1,4})\.", name)
    return match and (int(match[1]), int(match[2]))


def slice_number(name):
    """The number behind "slice" in a file name, as in case_001_slice_2.nii.png or P7-Slice02.jpg; None without one."""
    match = re.search(r"(?<![a-z])slice[ _-]?(\d{1,9})(?!\d)", name.lower())
    return match and int(match[1])


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
    return sorted(paths, key=lambda path: (parse_name(path.name) or (0, 0), path.name))


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


def read_images(paths, label):
    """Decode files in parallel: list of paths -> uint8 (N, 64, 64). Every broken file is reported."""
    images = np.empty((len(paths), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    decoded = tf.data.Dataset.from_tensor_slices([os.fsencode(path) for path in paths])
    decoded = decoded.map(read_slice, num_parallel_calls=tf.data.AUTOTUNE).batch(256).prefetch(2)
    print(f"{label}: reading {len(paths)} slices")
    progress = progress_bar(len(paths), "slice")
    done = 0
    try:
        for batch in decoded.as_numpy_iterator():
            images[done : done + len(batch)] = batch
            done += len(batch)
            progress.update(done)
    except tf.errors.OpError:
        broken = [path for path in paths if is_broken(path)]
        names = ", ".join(str(path) for path in broken[:10])
        raise UserError(f"{len(broken)} unreadable image file(s), restore or delete them: {names}") from None
    return images


def load_split(folder, label):
    """Every slice of one split folder, as a `Split`."""
    paths = list_slices(folder)
    parsed = [parse_name(path.name) for path in paths]
    subjects = labels = None
    if None not in parsed:
        subjects = [f"case_{case:03d}" for case, _ in parsed]
        labels = np.array([index for _, index in parsed], np.int32)
    return Split(read_images(paths, label), [path.name for path in paths], subjects, labels)


def load(folder, splits=SPLITS):
    """Read the splits of the data in `folder`, or one level down: {name: Split}.

    Without a validate folder, every tenth subject of train is held out for it. Raises UserError
    for missing folders, broken files, and a subject that is in two splits.
    """
    root = find_data(folder)
    loaded = {}
    for name in splits:
        split_folder = root / f"keras_png_slices_{name}"
        if split_folder.is_dir():
            loaded[name] = load_split(split_folder, name)
        elif name != "validate":
            raise UserError(f"--data {root}: no folder {split_folder.name} in it; unzip the data again")

    if any(split.subjects is None for split in loaded.values()):
        warnings.warn(
            "some files are not named case_N_slice_M: subjects cannot be told apart, "
            "so nobody can check that none is in two splits",
            stacklevel=2,
        )
    else:
        refuse_shared_subjects(loaded)
    if "validate" in splits and "validate" not in loaded:
        loaded["train"], loaded["validate"] = hold_out(loaded["train"])
    for name, split in loaded.items():
        subjects = f" of {len(set(split.subjects))} subjects" if split.subjects else ""
        print(f"{name}: {len(split.images)} slices{subjects}, {IMAGE_SIZE}x{IMAGE_SIZE}, "
              f"uint8 {split.images.min()} to {split.images.max()}")  # fmt: skip
    return loaded


def refuse_shared_subjects(loaded):
    names = list(loaded)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = sorted(set(loaded[first].subjects) & set(loaded[second].subjects))
            if shared:
                raise UserError(
                    f"{len(shared)} subject(s) in both {first} and {second}, remove them from one: "
                    + ", ".join(shared[:10])
                )


def hold_out(train):
    """Split train into (train, validate) by whole subjects, or by its last tenth where names do not tell."""
    if train.subjects:
        chosen = set(sorted(set(train.subjects))[HELD_OUT - 1 :: HELD_OUT] or train.subjects[-1:])
        held_out = np.array([subject in chosen for subject in train.subjects])
    else:
        held_out = np.arange(len(train.images)) >= len(train.images) * (HELD_OUT - 1) // HELD_OUT
    if held_out.all():
        raise UserError("only one subject in train and no validate folder: nothing left to train on; add subjects")

    def part(keep):
        indices = np.flatnonzero(keep)
        return Split(
            train.images[indices],
            [train.names[i] for i in indices],
            train.subjects and [train.subjects[i] for i in indices],
            None if train.labels is None else train.labels[indices],
        )

    return part(~held_out), part(held_out)


def fingerprint(loaded):
    """What tells one data set from another: {split: {"images", "subjects", "sha256"}} of names and pixels."""
    return {
        name: {
            "images": len(split.images),
            "subjects": len(set(split.subjects)) if split.subjects else None,
            "sha256": hashlib.sha256(os.fsencode("\n".join(split.names)) + split.images.tobytes()).hexdigest(),
        }
        for name, split in loaded.items()
    }


# --------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------


def mirrored(images):
    """(N, H, W) -> the same, mirrored. Up-down is left-right of the head."""
    return images[:, ::-1]


def shown_variants(images, mirror):
    """What a model is shown of unchanged slices: [(N, H, W)] as they are, and mirrored where `mirror` says so."""
    return [images] + [mirrored(images)] * mirror


# What `augment` changes at most: pixels down and across, degrees, growth, and ln gamma.
CHANGE_LIMITS = np.array([2, 2, 4, 0.04, 0.12])
NUM_CHANGES = len(CHANGE_LIMITS) + 1  # numbers that tell of a copy: those, and a 1


def augment(images, seed):
    """A changed copy of each slice: shifted, turned, scaled (cubic splines), lighter or darker; and the changes.

    Args:
        images: uint8 (N, H, W).
        seed: int, or several.

    Returns: uint8 (N, H, W); float32 (N, 6): five uniform numbers from -1 to 1, how much of each of
        CHANGE_LIMITS was applied, and a 1, where a slice as it is has six zeros.
    """
    rng = np.random.default_rng(seed)
    amounts = rng.uniform(-1, 1, (len(images), len(CHANGE_LIMITS)))
    changed = np.empty_like(images)
    centre = (np.array(images.shape[1:]) - 1) / 2
    for i, image in enumerate(images):
        *shift, turn, growth, gamma = amounts[i] * CHANGE_LIMITS
        cos, sin = np.cos(np.radians(turn)), np.sin(np.radians(turn))
        matrix = np.array([[cos, -sin], [sin, cos]]) / (1 + growth)  # from the new picture to the old
        offset = centre - matrix @ (centre + shift)
        moved = ndimage.affine_transform(image / np.float32(255), matrix, offset, order=3).clip(0, 1)
        changed[i] = np.rint(255 * moved ** np.exp(gamma))
    return changed, np.pad(amounts, [[0, 0], [0, 1]], constant_values=1).astype(np.float32)


def shuffled_batches(variants, batch_size, seed, epochs):
    """Batches of the same structure and dtypes, (batch_size, ...), that depend on nothing but `seed` and the epoch.

    Args:
        variants: (N, V, ...), V variants of each of N examples, or several such arrays that belong
            together. An epoch visits every example once, in a new order, as one of its variants at random.
        batch_size: at most N. The last N % batch_size examples of an epoch's order wait for the next.
        seed: int.
        epochs: range of epoch numbers.
    """
    variants = tf.nest.map_structure(tf.constant, variants)
    examples, choices = tf.nest.flatten(variants)[0].shape[:2]

    def one_epoch(epoch):
        order = tf.random.experimental.stateless_shuffle(tf.range(examples), seed=(seed, 2 * epoch))
        choice = tf.random.stateless_uniform((examples,), (seed, 2 * epoch + 1), maxval=choices, dtype=tf.int32)
        indices = tf.data.Dataset.from_tensor_slices(tf.stack([order, choice], axis=1))
        return indices.batch(batch_size, drop_remainder=True)

    def gather(index):
        return tf.nest.map_structure(lambda array: tf.gather_nd(array, index), variants)

    batches = tf.data.Dataset.range(epochs.start, epochs.stop).flat_map(one_epoch)
    return batches.map(gather).prefetch(tf.data.AUTOTUNE)


def in_batches(function, *arrays, batch_size=256):
    """function(*arrays), a batch at a time, so that the memory it takes does not grow with N: (N, ...) -> (N, ...)."""
    parts = [slice(start, start + batch_size) for start in range(0, len(arrays[0]), batch_size)]
    return np.concatenate([function(*(tf.constant(array[part]) for array in arrays)) for part in parts])


def codes_of(vqvae, images):
    """float32 (N, H, W) in [0, 1] -> codes int32 (N, h, w)."""
    return in_batches(vqvae.encode, images[..., None])


def images_of(vqvae, codes):
    """Codes int32 (N, h, w) -> float32 (N, H, W) in [0, 1]."""
    return in_batches(vqvae.decode, codes)[..., 0]


# --------------------------------------------------------------------------------------
# The demo phantom
# --------------------------------------------------------------------------------------


def smooth_noise(rng, points, wavelength, waves=8):
    """Random field of unit variance at `points` (3, ...): a sum of plane waves in random directions."""
    directions = rng.standard_normal((waves, 3), "float32")
    directions *= 2 * np.pi / wavelength / np.linalg.norm(directions, axis=1, keepdims=True)
    phases = rng.uniform(0, 2 * np.pi, waves).tolist()
    total = sum(np.cos(np.tensordot(k, points, 1) + p) for k, p in zip(directions, phases))
    return total * (2 / waves) ** 0.5


def ellipsoid_depth(points, centre, radii, lean):
    """Approximate depth inside an ellipsoid whose front end leans outwards by `lean` radians."""
    along, across, level = (p - c for p, c in zip(points, centre))
    along, across = along * np.cos(lean) + across * np.sin(lean), across * np.cos(lean) - along * np.sin(lean)
    return radii[1] * (1 - np.sqrt(sum((p / r) ** 2 for p, r in zip((along, across, level), radii))))


def phantom_slices(rng, slices=32, size=256):
    """Axial T1-like slices (slices, size, size), uint8, of one random head that faces right."""
    grid = size // 2  # drawn at half size for speed; lengths are in half picture widths
    axis = np.linspace(-1, 1, grid, dtype="float32")
    height = np.linspace(0, 0.25, slices, dtype="float32")
    points = z, y, x = np.stack(np.meshgrid(height, axis, axis, indexing="ij"))
    level = 4 * z + rng.uniform(-0.12, 0.12)  # 0: thalamus, 1: top of the ventricles
    tilt, warp = rng.normal(0, 0.03), [smooth_noise(rng, points, 0.9) for _ in range(2)]
    x, y = x + tilt * y + 0.008 * warp[0], y - tilt * x + 0.008 * warp[1]

    # An egg, wider at the back. Every `depth` is a distance to a surface, positive inside.
    length, width = rng.uniform(0.68, 0.76), rng.uniform(0.53, 0.6)
    along = x / length
    across = np.abs(y) / width / (1 - 0.08 * along)
    surface_depth = width * (1 - 0.07 * level**2 - (np.abs(along) ** 2.3 + across**2.3) ** (1 / 2.3))
    callosum = 0.5 - 0.15 * level**2  # where it joins the hemispheres there is no fissure
    fissure_depth = np.hypot(y, length * np.clip(callosum - np.abs(along + 0.02), 0, 1))

    # Sulci are the zero surfaces of a noise that is stretched along the way from the core of a
    # hemisphere to its surface, so that they mostly cut the surface at right angles.
    core_x, core_y = np.clip(x, -0.4, 0.36), 0.24 * np.sign(y)
    pull = 0.35 + 0.22 / (np.hypot(x - core_x, y - core_y) + 0.08)
    meander_x, meander_y = (0.03 * smooth_noise(rng, points, 0.25) for _ in range(2))
    unfolded = [0.7 * z, core_y + (y - core_y) * pull + meander_y, core_x + (x - core_x) * pull + meander_x]
    fold = smooth_noise(rng, np.stack(unfolded), rng.uniform(0.145, 0.19), waves=12)
    slope = np.sqrt(sum(g**2 for g in np.gradient(fold, height[1], 2 / grid, 2 / grid)))
    fold_depth = rng.uniform(0.14, 0.19) * (1 + 8 * meander_x)
    below_folds = np.clip(np.minimum(surface_depth, 2 * fissure_depth) - fold_depth, 0, 1)
    sulcus_depth = np.hypot(np.abs(fold) / np.clip(slope, 10, 60), below_folds)
    atrophy = rng.uniform(0, 1)
    cortex_depth = np.minimum.reduce([surface_depth, fissure_depth, sulcus_depth]) - 0.004 - 0.012 * atrophy

    image = np.zeros_like(x)

    def paint(depth, brightness):
        """Fill the inside, with an edge about a pixel soft, as a scan's partial volume makes it."""
        image[...] += np.clip(0.5 + depth * grid / 2.5, 0, 1) * (brightness - image)

    fluid, grey, white = 0.1, rng.uniform(0.36, 0.44), rng.uniform(0.65, 0.78)
    nucleus, swelling = (grey + white) / 2, 0.7 + 0.8 * atrophy
    skull_depth = surface_depth + rng.uniform(0.035, 0.05)
    scalp_depth = skull_depth + 0.03 + 0.004 * warp[0]
    paint(scalp_depth, 0.85)
    paint(skull_depth, 0.06)
    paint(surface_depth + 0.015, fluid)
    paint(cortex_depth, grey)
    paint(cortex_depth - rng.uniform(0.03, 0.042), white)
    bent = across - 0.9 * (along - 0.05) ** 2 - 0.06 * level  # ventricles bow around the thalamus
    for brightness, centre, radii, lean in (
        (nucleus, (-0.10, 0.17, 0.0), (0.22, 0.15, 0.6), -0.2),  # thalamus
        (nucleus, (0.10, 0.44, 0.0), (0.24, 0.11, 0.5), -0.2),  # putamen
        (nucleus, (0.22, 0.20, 0.4), (0.22, 0.11, 0.5), 0.0),  # caudate nucleus
        (fluid, (-0.02, 0.00, 0.0), (0.14, 0.04 * swelling, 0.60), 0.0),  # third ventricle
        (fluid, (0.30, 0.08, 0.4), (0.20, 0.10 * swelling, 0.55), 0.25),  # frontal horn
        (fluid, (0.02, 0.08, 0.7), (0.42, 0.08 * swelling, 0.30), 0.0),  # body of the lateral ventricle
        (fluid, (-0.33, 0.15, 0.2), (0.20, 0.10 * swelling, 0.60), -0.35),  # occipital horn
    ):
        paint(width * ellipsoid_depth((along, bent, level), centre, radii, lean), brightness)
    image *= 1 + 0.06 * smooth_noise(rng, points, 2)  # uneven coil sensitivity
    image += 0.015 * rng.standard_normal(image.shape, "float32")
    image *= scalp_depth > 0
    for dimension in (1, 2):  # linear interpolation to full size
        image = ndimage.convolve1d(image.repeat(2, dimension), [0.25, 0.5, 0.25], dimension)
    return (255 * np.clip(image, 0, 1)).astype("uint8")


def write_phantom(folder, train=24, validate=4, test=4, seed=0):
    """Write that many phantom subjects to the new `folder` as PNGs, in the layout of the real data set."""
    folder = pathlib.Path(folder)
    partial = folder.with_name(folder.name + ".partial")  # renamed once complete, so no half is ever used
    shutil.rmtree(partial, ignore_errors=True)
    cases = {"train": range(1, 1 + train), "validate": range(402, 402 + validate), "test": range(441, 441 + test)}
    print(f"drawing {train + validate + test} head phantoms into {folder}")
    progress = progress_bar(train + validate + test, "subject")
    with told_if_it_fails(folder):
        for split in SPLITS:
            split_folder = partial / f"keras_png_slices_{split}"
            split_folder.mkdir(parents=True)
            for case in cases[split]:
                for index, picture in enumerate(phantom_slices(np.random.default_rng((seed, case)))):
                    path = split_folder / f"case_{case:03d}_slice_{index}.nii.png"
                    tf.io.write_file(str(path), tf.io.encode_png(picture[..., None]))
                progress.add(1)
        partial.rename(folder)


# --------------------------------------------------------------------------------------
# Files of a run, progress and errors
# --------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend; shown as one line, without a traceback."""


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
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2, default=float) + "\n"))


def read_config(run):
    """config.json of a run, as a dictionary; None where there is no run yet."""
    path = run / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        complete = {"folder", "phantom"} <= config["data"].keys() and "mirror" in config["settings"]
        if complete and all(isinstance(config[part], dict) for part in ("settings", "data", "versions", "finished")):
            return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"{path} is broken, or of an earlier version: choose another --run, or delete {shlex.quote(str(run))}"
    )


def file_checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_model(path, remedy, **options):
    """The model in a .keras file; where the file is cut off or damaged, the user is told the remedy."""
    try:
        with zipfile.ZipFile(path) as archive:  # Keras loads damaged weights without a word
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged}")
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is broken ({type(error).__name__}): {remedy}") from None
    try:
        return keras.saving.load_model(path, **options)
    except (TypeError, ValueError) as error:  # of an older version of these scripts, say
        cause = str(error).strip().splitlines()[0]
        raise UserError(f"{path} is whole, but this version cannot open it ({cause}): {remedy}") from error


def progress_verbosity():
    """Of Keras's bars: they move on a terminal, and are a single line in a log."""
    return 1 if sys.stdout.isatty() else 2


def progress_bar(total, unit):
    return keras.utils.Progbar(total, unit_name=unit, verbose=progress_verbosity())


if __name__ == "__main__":
    try:
        load(sys.argv[1] if len(sys.argv) > 1 else "keras_png_slices_data")
    except UserError as error:
        print(f"dataset.py: {error}", file=sys.stderr)
        sys.exit(2)
