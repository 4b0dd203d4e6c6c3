"""Reading slices, batching them, and drawing phantoms."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import warnings

import dataset
import modules

import numpy as np
import pytest
from conftest import ROOT, files_in, write_data, write_slices
from PIL import Image

# ---- Decoding ------------------------------------------------------------------------

# How to save an RGB picture, the file's ending, and the distance allowed from PIL's grey picture before
# it is rounded. 0.5 is the rounding of the result; to grey, libpng truncates where PIL rounds: 1 more at
# most; and two JPEG decoders may differ by 2 grey levels in their cosine transform.
KINDS = {
    "grey": (lambda rgb: rgb.convert("L"), "png", 0.5),
    "grey with alpha": (lambda rgb: rgb.convert("LA"), "png", 0.5),
    "1-bit": (lambda rgb: rgb.convert("1"), "png", 0.5),
    "16-bit": (lambda rgb: Image.fromarray(np.asarray(rgb.convert("L")).astype("uint16") * 251), "png", 1.5),
    "RGB": (lambda rgb: rgb, "png", 1.5),
    "RGBA": (lambda rgb: rgb.convert("RGBA"), "png", 1.5),
    "palette": (lambda rgb: rgb.quantize(64), "png", 1.5),
    "grey JPEG": (lambda rgb: rgb.convert("L"), "jpg", 2.5),
    "RGB JPEG": (lambda rgb: rgb, "jpg", 2.5),
}
SIZES = ((256, 256), (100, 77), (64, 64), (33, 50))


def colourful(width, height):
    """An RGB picture whose channels differ: a gradient each, with noise."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    noise = np.random.default_rng(0).uniform(0, 40, (height, width, 3))
    return Image.fromarray((np.stack([across, down * across, 1 - down], axis=-1) * 215 + noise).astype("uint8"))


def viewer_grey(path):
    """The grey picture that PIL shows, float in [0, 255]."""
    picture = Image.open(path)
    if picture.mode == "I;16":  # convert("L") would clip it, not scale it
        return np.asarray(picture) / 257
    return np.asarray(picture.convert("L")).astype(float)


def coverage(size):
    """Share of each of `size` pixels in each of the 64 that replace them: (64, size)."""
    edges = np.linspace(0, size, 64 + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * 64 / size


def area_resized(grey):
    return coverage(grey.shape[0]) @ grey @ coverage(grey.shape[1]).T


@pytest.mark.parametrize("kind, size", list(zip(KINDS, itertools.cycle(SIZES))), ids=KINDS)
def test_decodes_the_grey_picture_a_viewer_shows(kind, size, tmp_path):
    convert, ending, tolerance = KINDS[kind]
    path = tmp_path / f"picture.{ending}"
    convert(colourful(*size)).save(path)
    decoded = dataset.read_slice(str(path), 64).numpy()
    assert decoded.dtype == np.uint8 and decoded.shape == (64, 64)
    assert np.abs(decoded - area_resized(viewer_grey(path))).max() <= tolerance + 1e-3


def test_the_comparison_with_a_viewer_tells_wrong_greys_apart(tmp_path):
    """Control: equal weights for the channels, a picture turned on its side; and the nearest pixel is no mean."""
    path, rgb = tmp_path / "picture.png", colourful(256, 256)
    rgb.save(path)
    decoded, grey = dataset.read_slice(str(path), 64).numpy().astype(float), viewer_grey(path)
    assert np.abs(decoded - grey.reshape(64, 4, 64, 4).mean(axis=(1, 3))).max() <= 1.5
    for wrong in (area_resized(np.asarray(rgb).mean(axis=-1)), area_resized(grey).T, grey[2::4, 2::4]):
        assert np.abs(decoded - wrong).max() > 10


@pytest.mark.parametrize("size", [32, 128])
def test_slices_are_resized_to_any_size(size, tmp_path):
    path = tmp_path / "picture.png"
    colourful(256, 256).convert("L").save(path)
    grey = viewer_grey(path).reshape(size, 256 // size, size, 256 // size).mean(axis=(1, 3))
    assert np.abs(dataset.read_slice(str(path), size).numpy() - grey).max() <= 0.5 + 1e-3


def test_a_jpeg_that_a_viewer_turns_is_refused(data):
    """By its EXIF orientation; 1 is upright."""
    folder, exif = data / "keras_png_slices_train", Image.Exif()
    for case, orientation in ((8, 1), (9, 6)):
        exif[0x0112] = orientation
        colourful(20, 20).save(folder / f"case_{case}_slice_0.jpg", exif=exif)
    with pytest.raises(dataset.UserError, match=r"1 turned \(by EXIF\) .*case_9_slice_0.jpg$"):
        dataset.load(data)


def test_a_split_of_one_grey_is_refused_and_a_dark_one_is_noted(data):
    """Black slices, or all of one grey each; 12 bits in 16 are a sixteenth as bright as they should be."""
    folder = data / "keras_png_slices_test"
    for path in folder.iterdir():
        Image.fromarray(np.asarray(Image.open(path)).astype("uint16") * 16).save(path)
    with pytest.warns(UserWarning, match=r"keras_png_slices_test: the brightest pixel is 1\d of 255 \(12 bits"):
        dataset.load(data)
    for grey, path in enumerate(folder.iterdir()):
        Image.new("L", (8, 8), grey).save(path)
    with pytest.raises(dataset.UserError, match="keras_png_slices_test: each of its 2 slices is of one grey"):
        dataset.load(data)


# ---- Finding and ordering ------------------------------------------------------------


def test_order_is_by_case_then_slice_number(tmp_path):
    """Also of more slices than the 256 that the reader takes at a time, decoded in parallel."""
    names = [f"case_{case:03d}_slice_{index}.nii.png" for case in (2, 10, 100) for index in range(100)]
    write_slices(tmp_path, sorted(names))
    assert sorted(names) != names  # control: by name alone, slice 10 comes before slice 2
    split = dataset.load_split(tmp_path, "train")
    assert split.names.tolist() == names
    assert split.cases.tolist() == [2] * 100 + [10] * 100 + [100] * 100 and split.subjects == 3
    assert (
        split.slice_numbers.tolist() == [*range(100)] * 3 and split.slice_numbers.dtype == split.cases.dtype == np.int32
    )
    for name, image in zip(names, split.images):
        np.testing.assert_array_equal(image, dataset.read_slice(str(tmp_path / name), 64))


def test_masks_and_leftovers_of_macos_are_ignored_and_upper_case_endings_count(data):
    train = data / "keras_png_slices_train"
    write_slices(train, ["case_003_slice_0.PNG", "case_003_slice_1.JPG", "case_003_slice_2.Jpeg"])
    expected = sorted(os.listdir(train))
    write_slices(data / "keras_png_slices_seg_train", ["seg_001_slice_0.nii.png"])
    write_slices(train, ["seg_001_slice_0.nii.png", ".hidden.png"])
    for name in ("._case_001_slice_0.nii.png", ".DS_Store", "notes.txt"):
        (train / name).write_bytes(b"not a picture")
    loaded = dataset.load(data.parent)  # one level up will do
    assert list(loaded) == ["train", "validate", "test"] and loaded["train"].names.tolist() == expected


def test_a_file_name_need_not_be_utf8(data):
    """As old zip files leave them."""
    folder = data / "keras_png_slices_test"
    write_slices(folder, ["slice.png"])
    try:
        os.rename(folder / "slice.png", os.fsencode(folder / "coupe_sagittal") + b"\xe9e.png")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.warns(UserWarning, match="subjects cannot be told apart"):
        loaded = dataset.load(data)
    assert len(loaded["test"].images) == 3
    assert dataset.fingerprint(loaded)["test"]["images"] == 3


# ---- Subjects and splits -------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:some files")
@pytest.mark.parametrize("subjects, nameless, held_out", [(2, 0, 1), (10, 0, 1), (25, 0, 2), (3, 1, 1)])
def test_without_a_validate_folder_whole_subjects_are_held_out(tmp_path, subjects, nameless, held_out):
    """The last ones, also where a file is not named like the others."""
    folder = write_data(tmp_path, train=range(1, subjects + 1), test=[441]) / "keras_png_slices_train"
    write_slices(folder, ["another.png"] * nameless)
    loaded = dataset.load(tmp_path)
    train, validate = loaded["train"], loaded["validate"]
    first = subjects - held_out + 1
    assert sorted(set(validate.cases)) == [*range(first, subjects + 1)]
    assert sorted(set(train.cases)) == [-1] * nameless + [*range(1, first)]
    assert {*train.names, *validate.names} == set(os.listdir(folder))
    for split in (train, validate):
        for name, case, label, image in zip(split.names, split.cases, split.slice_numbers, split.images, strict=True):
            assert (case, label) == ((int(name[5:8]), int(name[15])) if name != "another.png" else (-1, -1))
            np.testing.assert_array_equal(image, dataset.read_slice(str(folder / name), 64))


@pytest.mark.filterwarnings("ignore:some files")
def test_a_tenth_of_the_subjects_and_a_tenth_of_the_nameless_slices_are_held_out(tmp_path):
    folder = write_data(tmp_path, train=[1, 2, 3], test=[441]) / "keras_png_slices_train"
    write_slices(folder, [f"{number}.png" for number in range(100)])
    validate = dataset.load(tmp_path)["validate"]
    assert sorted(validate.cases) == [-1] * 10 + [3, 3]


@pytest.mark.parametrize("with_validate", [True, False])
def test_free_file_names_work_with_one_warning(tmp_path, with_validate):
    for split in ("train", "test") + ("validate",) * with_validate:
        write_slices(tmp_path / f"keras_png_slices_{split}", [f"{split} {letter}.png" for letter in "cabdefghij"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = dataset.load(tmp_path)
    assert len(caught) == 1 and "subjects cannot be told apart" in str(caught[0].message)
    assert [len(loaded[name].names) for name in dataset.SPLITS] == ([10, 10, 10] if with_validate else [9, 1, 10])
    for split in loaded.values():
        assert split.subjects is None and (split.slice_numbers == -1).all() and (split.cases == -1).all()
    assert loaded["train"].names.tolist() == sorted(loaded["train"].names)


def test_case_and_slice_are_unknown_where_a_name_does_not_tell_and_only_there(data):
    """And a slice number that the model does not know is unknown to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.load(data)  # control: no warning yet
    write_slices(data / "keras_png_slices_test", ["another.png", "case_441_slice_31.nii.png"])
    with pytest.warns(UserWarning, match="subjects cannot be told apart"):
        test = dataset.load(data)["test"]
    assert test.names[0] == "another.png" and test.subjects is None
    assert test.cases.tolist() == [-1, 441, 441, 441] and test.slice_numbers.tolist() == [-1, 0, 1, 31]


def test_the_slices_of_a_head_and_the_one_below_each():
    places = [[-1, -1], [-1, -1], [3, 0], [3, 1], [3, 3], [7, 1], [7, 2], [7, 12], [8, 13]]
    cases, labels = np.array(places, np.int32).T
    slices = dataset.Slices(np.zeros((9, 2, 2), "uint8"), np.array(list("abcdefghi")), cases, labels)
    assert dataset.slices_below(cases, labels).tolist() == [-1, -1, -1, 2, -1, -1, 5, -1, -1]
    heads = dataset.heads_of(slices)
    assert set(heads) == {0, 1, 2, 3, 4}  # three that are known, and each nameless slice is one of its own
    alike = (cases[:, None] == cases) & (cases >= 0) | np.eye(9, dtype=bool)
    np.testing.assert_array_equal(heads[:, None] == heads, alike)
    chosen = slices[cases == 7]
    assert chosen.names.tolist() == ["f", "g", "h"]
    assert dataset.slices_below(chosen.cases, chosen.slice_numbers).tolist() == [-1, 0, -1]


# ---- Ranges and batches --------------------------------------------------------------


def test_a_split_is_uint8_and_to_float_is_its_share_of_255(data, capsys):
    """And what was found is printed, without a moving bar."""
    split = dataset.load(data)["train"]
    printed = capsys.readouterr().out
    assert "train: 4 slices of 2 subjects, 64x64, uint8" in printed and "test: 2 slices of 1 subjects" in printed
    assert printed.replace("\n", "").isprintable()
    assert split.images.dtype == np.uint8 and split.images.shape == (4, 64, 64)
    images = dataset.to_float(split.images)
    assert isinstance(images, np.ndarray) and images.dtype == np.float32 and images.shape == (4, 64, 64, 1)
    np.testing.assert_array_equal(images[..., 0], split.images.astype("float32") / np.float32(255))
    assert dataset.to_float(np.array([[[0, 255]]], "uint8")).ravel().tolist() == [0.0, 1.0]


def disc(size=64, radius=10):
    """A soft disc right of the centre, far from the edges: uint8 (size, size)."""
    down, across = np.mgrid[:size, :size] - (size - 1) / 2
    return np.uint8(200 * np.clip(0.5 + radius - np.hypot(down, across - 6), 0, 1))


def test_all_slices_of_a_head_are_changed_alike():
    """By the returned shares of each limit, which depend on the seed; threads give what a plain loop gives."""
    rng = np.random.default_rng(0)
    heads = np.repeat(np.arange(40), 3)[rng.permutation(120)]
    images = rng.integers(0, 256, (120, 24, 24), "uint8")
    pictures, changes = dataset.augment(images, heads, seed=(0, 1))
    assert pictures.dtype == np.uint8 and changes.dtype == np.float32
    looped = [dataset.change(image, amounts) for image, amounts in zip(images, changes[:, :5].astype(float))]
    np.testing.assert_allclose(pictures, np.array(looped).astype(int), atol=1)  # amounts are rounded to float32
    assert (changes[:, 5] == 1).all() and (np.abs(changes[:, :5]) <= 1).all()
    assert changes[:, :5].min() < -0.9 and changes[:, :5].max() > 0.9
    np.testing.assert_array_equal((changes[:, None] == changes).all(axis=-1), heads[:, None] == heads)
    np.testing.assert_array_equal(dataset.augment(images, heads, seed=(0, 1))[0], pictures)
    assert (dataset.augment(images, heads, seed=(1, 0))[1][:, :5] != changes[:, :5]).all()


def changed(image, *amounts):
    """`dataset.change` by pixels down and across, degrees, growth, and ln gamma."""
    return dataset.change(image, np.array(amounts) / dataset.CHANGE_LIMITS / [*image.shape, 1, 1, 1]).astype(int)


CHANGES = {
    "a pixel down": ([1, 0, 0, 0, 0], lambda image: np.roll(image, 1, axis=0)),
    "a pixel to the right": ([0, 1, 0, 0, 0], lambda image: np.roll(image, 1, axis=1)),
    "a right angle": ([0, 0, 90, 0, 0], lambda image: np.rot90(image, -1)),
    "squared": ([0, 0, 0, 0, np.log(2)], lambda image: np.rint(255 * (image / 255) ** 2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_what_it_says(name):
    """A turn takes what is on the right of the head to where a clock's hand would."""
    amounts, expected = CHANGES[name]
    np.testing.assert_allclose(changed(disc(), *amounts), expected(disc()).astype(int), atol=1)
    assert np.abs(expected(disc()).astype(int) - disc()).max() > 40


def test_no_change_changes_nothing_and_growth_is_of_lengths():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), "uint8")
    np.testing.assert_array_equal(changed(noise, 0, 0, 0, 0, 0), noise)
    assert changed(disc(), 0, 0, 0, 0.5, 0).sum() / disc().sum() == pytest.approx(1.5**2, rel=0.01)


def test_the_slice_below_is_that_of_the_next_lower_label_in_the_same_head():
    """Labels are places among the numbers that train has: of 0, 2 and 4 the slice below 2 is 0."""
    cases = np.array([-1, 3, 3, 3, 7, 7, 7, 8])
    labels = modules.labels_of([-1, 0, 2, 4, 0, 3, 4, 4], [0, 2, 4])
    assert labels.tolist() == [-1, 0, 1, 2, 0, -1, 2, 2]
    assert dataset.slices_below(cases, labels).tolist() == [-1, -1, 1, 2, -1, -1, -1, -1]


def numbered_batches(examples=12, seed=3, epochs=range(4)):
    """Batches of 4 index pairs of an example and one of its two variants: (batches, 4, 2)."""
    batches = np.stack(list(dataset.shuffled_batches(examples, 2, 4, seed, epochs).as_numpy_iterator()))
    assert batches.dtype == np.int32 and batches.shape[1:] == (4, 2)
    return batches


@pytest.mark.parametrize("examples", [12, 14])
def test_each_epoch_is_a_new_order_with_new_variants_and_repeats_none(examples):
    """With another seed it is another one; and what the batches leave over is not always the same."""

    def epochs(seed):
        return np.moveaxis(numbered_batches(examples, seed, range(30)).reshape(30, 12, 2), -1, 0)

    orders, variants = epochs(3)
    assert all(len(set(order)) == 12 for order in orders) and len(np.unique(orders)) == examples
    assert len(np.unique(orders, axis=0)) == len(np.unique(variants, axis=0)) == 30
    counts = np.histogram2d(orders.ravel(), variants.ravel(), bins=(examples, 2))[0]
    assert counts.min() >= 5  # of 30 draws or fewer; a fair coin gives less in 3 of 100,000
    assert 140 <= counts[:, 0].sum() <= 220  # of 360, a fair coin's 180 +- 4 standard deviations
    others = epochs(4)
    assert (orders != others[0]).any() and (variants != others[1]).any()


@pytest.mark.parametrize("start", [1, 3])
def test_batches_from_a_later_epoch_are_the_tail_of_all(start):
    """What a resumed training sees; an epoch has 3 batches here."""
    np.testing.assert_array_equal(numbered_batches(epochs=range(start, 4)), numbered_batches()[3 * start :])


# ---- Files and phantoms --------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    dataset.write_json(path, {"images": 1})
    before = path.read_bytes()

    def stop_halfway(temporary):
        temporary.write_text('{"imag')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataset.write_whole(path, stop_halfway)
    assert path.read_bytes() == before
    dataset.write_json(path, {"images": np.float32(2)})
    assert path.read_text() == '{\n  "images": 2.0\n}\n'
    assert files_in(tmp_path) == ["report.json"]  # what was left of the stopped write is replaced, then renamed


def test_json_is_strict(tmp_path):
    path, infinite = tmp_path / "report.json", np.float32("inf")
    content = {"scores": [float("nan"), 0.5, (infinite,)], "nested": {"psnr": -infinite, "rate": np.float64(0.1)}}
    dataset.write_json(path, {**content, "kept": [None, True, 3, "NaN"]})

    def refuse(constant):
        raise AssertionError(constant)

    written = json.loads(path.read_text(), parse_constant=refuse)
    assert written["scores"] == [None, 0.5, [None]] and written["nested"] == {"psnr": None, "rate": 0.1}
    assert written["kept"] == [None, True, 3, "NaN"] and isinstance(written["kept"][1], bool)


@pytest.fixture
def small_phantoms(monkeypatch):
    """Phantoms of 4 slices of 32x32, drawn in a hundredth of the time."""
    monkeypatch.setattr(dataset, "phantom_slices", functools.partial(dataset.phantom_slices, slices=4, size=32))


def test_phantoms_are_known_as_such_and_a_stopped_write_leaves_nothing(small_phantoms, data, tmp_path, monkeypatch):
    folder = tmp_path / "here" / "phantoms"
    dataset.write_phantom(folder, train=1, validate=1, test=1)
    assert dataset.is_phantom(folder) and dataset.is_phantom(folder.parent) and not dataset.is_phantom(data)
    monkeypatch.setattr(dataset, "phantom_slices", lambda rng: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dataset.write_phantom(tmp_path / "other")
    assert files_in(tmp_path) == ["here", "keras_png_slices_data"] and files_in(folder.parent) == ["phantoms"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_a_phantom_depends_on_the_seed_and_its_number_alone(small_phantoms, tmp_path):
    for name, train, seed in (("first", 2, 0), ("again", 2, 0), ("fewer", 1, 0), ("other", 2, 1)):
        dataset.write_phantom(tmp_path / name, train, validate=1, test=1, seed=seed)
    first, again, fewer, other = (contents(tmp_path / name) for name in ("first", "again", "fewer", "other"))
    assert len(first) == 16 and first == again
    assert len(fewer) == 12 and fewer == {path: first[path] for path in fewer}
    assert first.keys() == other.keys() and all(first[path] != other[path] for path in first)
    assert len(set(first.values())) == 16  # control: no subject and no slice is drawn twice


def test_phantoms_load_as_the_real_data_does_and_are_heads(phantoms):
    """Neighbouring slices are more alike than two subjects; and the farther apart, the less alike."""
    loaded = dataset.load(phantoms)
    cases = {name: sorted(set(split.cases.tolist())) for name, split in loaded.items()}
    assert cases == {"train": [1, 2, 3], "validate": [402], "test": [441]}
    assert all(split.slice_numbers.tolist() == list(range(32)) * split.subjects for split in loaded.values())
    images = loaded["train"].images
    assert images[:, :4, :4].max() == 0 and images.max() > 150  # black around, as real slices are
    heads = images.reshape(3, 32, 64, 64).astype(float)

    def difference(some, others):
        return np.abs(some - others).mean(axis=(-2, -1))

    between_subjects = min(difference(heads[i], heads[j]).min() for i, j in ((0, 1), (0, 2), (1, 2)))
    neighbours, far = difference(heads[:, 1:], heads[:, :-1]), difference(heads[:, 16:], heads[:, :-16])
    assert 0 < neighbours.min() <= neighbours.max() < between_subjects and neighbours.mean() < far.mean()


IMPORT = "import dataset, predict, train, matplotlib, keras, sys; print(matplotlib.get_backend(), sys.stderr)"
SETTINGS = {  # and the backend of matplotlib that is found
    "a backend of matplotlib that is there": ({"MPLBACKEND": "pgf"}, "pgf"),
    "that of a notebook": ({"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, r"\w+|module://.*"),
    "another backend of Keras": ({"KERAS_BACKEND": "jax"}, r"\w+"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_importing_the_scripts_writes_and_prints_nothing_and_needs_no_stderr(name, tmp_path):
    """Whatever the user has set the libraries to; and a notebook keeps its matplotlib backend."""
    empty, home = tmp_path / "empty", tmp_path / "home"
    empty.mkdir()
    home.mkdir()
    (home / "keras.json").write_text('{"backend": "torch", "floatx": "float64", "image_data_format": "channels_first"}')
    variables = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "KERAS_HOME": str(home), **SETTINGS[name][0]}
    environment = {name: value for name, value in os.environ.items() if name not in ("KERAS_BACKEND", "MPLBACKEND")}
    finished = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", IMPORT],
        cwd=empty, env={**environment, **variables}, stdout=subprocess.PIPE, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0 and os.listdir(empty) == []
    assert re.fullmatch(f"({SETTINGS[name][1]}) None\n", finished.stdout)
