"""Reading slices, batching them, and drawing phantoms."""

import dataclasses
import functools
import os
import warnings
import zlib

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, run_script
from PIL import Image
from scipy import ndimage

import dataset


def write_slices(folder, names):
    """An 8x8 picture for each name, of noise that depends on the name alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (8, 8), "uint8")
        Image.fromarray(pixels).save(folder / name)


def write_data(root, **cases):
    """The layout of the real data, with two slices of each case: write_data(root, train=[1, 2], test=[3])."""
    for split, numbers in cases.items():
        names = [f"case_{case:03d}_slice_{index}.nii.png" for case in numbers for index in range(2)]
        write_slices(root / f"keras_png_slices_{split}", names)
    return root


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "keras_png_slices_data", train=[1, 2], validate=[402], test=[441])


# --------------------------------------------------------------------------------------
# Decoding
# --------------------------------------------------------------------------------------

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
    edges = np.linspace(0, size, dataset.IMAGE_SIZE + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * dataset.IMAGE_SIZE / size


def area_resized(grey):
    return coverage(grey.shape[0]) @ grey @ coverage(grey.shape[1]).T


@pytest.mark.parametrize("size", [(256, 256), (100, 77), (64, 64), (33, 50)], ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize("kind", KINDS)
def test_decodes_the_grey_picture_a_viewer_shows(kind, size, tmp_path):
    convert, ending, tolerance = KINDS[kind]
    path = tmp_path / f"picture.{ending}"
    convert(colourful(*size)).save(path)
    decoded = dataset.read_slice(str(path)).numpy()
    assert decoded.dtype == np.uint8 and decoded.shape == (64, 64)
    assert np.abs(decoded - area_resized(viewer_grey(path))).max() <= tolerance + 1e-3


def test_the_comparison_with_a_viewer_tells_wrong_greys_apart(tmp_path):
    """Control: equal weights for the channels, a 16-bit picture's low byte, and a picture turned on its side."""
    path = tmp_path / "picture.png"
    rgb = colourful(100, 77)
    rgb.save(path)
    decoded = dataset.read_slice(str(path)).numpy()
    assert np.abs(decoded - area_resized(np.asarray(rgb).mean(axis=-1))).max() > 10
    assert np.abs(decoded - area_resized(viewer_grey(path)).T).max() > 10
    KINDS["16-bit"][0](rgb).save(path)
    low_byte = np.asarray(Image.open(path)) % 256
    assert np.abs(dataset.read_slice(str(path)).numpy() - area_resized(low_byte)).max() > 10


def test_area_resize_is_the_mean_of_4x4_blocks(tmp_path):
    """And, as a control, not the nearest pixel: on noise the two are far apart."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256), "uint8")
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    decoded = dataset.read_slice(str(tmp_path / "noise.png")).numpy()
    np.testing.assert_array_equal(decoded, np.rint(pixels.reshape(64, 4, 64, 4).mean(axis=(1, 3))))
    nearest = tf.image.resize(pixels[..., None], (64, 64), method="nearest").numpy()[..., 0]
    assert np.abs(decoded.astype(int) - nearest).mean() > 30


# --------------------------------------------------------------------------------------
# Finding and ordering
# --------------------------------------------------------------------------------------


def test_order_is_by_case_then_slice_number(tmp_path):
    names = [f"case_{case:03d}_slice_{index}.nii.png" for case in (2, 10, 100) for index in (0, 2, 10)]
    write_slices(tmp_path, sorted(names))
    assert sorted(names) != names  # control: by name alone, slice 10 comes before slice 2
    split = dataset.load_split(tmp_path, "train")
    assert split.names == names
    assert split.subjects == [name[:8] for name in names]
    assert split.labels.tolist() == [0, 2, 10] * 3 and split.labels.dtype == np.int32
    for name, image in zip(names, split.images):
        np.testing.assert_array_equal(image, dataset.read_slice(str(tmp_path / name)))


def test_more_slices_than_a_batch_of_the_reader_keep_their_order(tmp_path):
    """It decodes 256 at a time, in parallel."""
    for value in range(300):
        pixels = np.full((2, 2), value % 251, "uint8")
        Image.fromarray(pixels).save(tmp_path / f"case_001_slice_{value}.png")
    images = dataset.load_split(tmp_path, "train").images
    np.testing.assert_array_equal(images[:, 0, 0], np.arange(300) % 251)


def test_data_is_found_one_level_down(data):
    (data.parent / "a_folder_before").mkdir()
    assert dataset.find_data(data) == dataset.find_data(data.parent) == data


def test_masks_and_leftovers_of_macos_are_ignored(data):
    expected = {name: split.names for name, split in dataset.load(data).items()}
    train = data / "keras_png_slices_train"
    write_slices(data / "keras_png_slices_seg_train", ["seg_001_slice_0.nii.png"])
    write_slices(train, ["seg_001_slice_0.nii.png", ".hidden.png"])
    (train / "._case_001_slice_0.nii.png").write_bytes(b"not a picture")
    (train / ".DS_Store").write_bytes(b"neither")
    (train / "notes.txt").write_text("nor this")
    assert {name: split.names for name, split in dataset.load(data).items()} == expected


def test_upper_case_endings_count(tmp_path):
    names = ["case_001_slice_0.PNG", "case_001_slice_1.JPG", "case_001_slice_2.Jpeg", "case_001_slice_3.nii.png"]
    write_slices(tmp_path, names)
    assert dataset.load_split(tmp_path, "train").names == names


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


# --------------------------------------------------------------------------------------
# Subjects and splits
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [402, 441])
def test_a_subject_in_two_splits_is_refused(data, case):
    write_slices(data / "keras_png_slices_train", [f"case_{case}_slice_31.nii.png"])
    with pytest.raises(dataset.UserError, match=rf"both train and \w+.*case_{case}"):
        dataset.load(data)


def test_a_subject_is_known_without_its_leading_zeros(data):
    write_slices(data / "keras_png_slices_test", ["case_1_slice_0.png"])
    with pytest.raises(dataset.UserError, match=r"both train and test.*case_001"):
        dataset.load(data)


@pytest.mark.parametrize("subjects, held_out", [(2, 1), (9, 1), (10, 1), (25, 2)])
def test_without_a_validate_folder_whole_subjects_are_held_out(tmp_path, subjects, held_out):
    everyone = range(1, subjects + 1)
    loaded = dataset.load(write_data(tmp_path / "data", train=everyone, test=[441]))
    train, validate = loaded["train"], loaded["validate"]
    assert len(set(validate.subjects)) == held_out
    assert not set(train.subjects) & set(validate.subjects)
    assert sorted(train.names + validate.names) == sorted(os.listdir(tmp_path / "data" / "keras_png_slices_train"))
    for split in (train, validate):
        assert len(split.images) == len(split.names) == len(split.subjects) == len(split.labels)
        assert [name[:8] for name in split.names] == split.subjects
        assert [int(name[15]) for name in split.names] == split.labels.tolist()


def test_a_validate_folder_is_used_as_it_is(data):
    loaded = dataset.load(data)
    assert list(loaded) == ["train", "validate", "test"]
    assert set(loaded["train"].subjects) == {"case_001", "case_002"}
    assert set(loaded["validate"].subjects) == {"case_402"}


@pytest.mark.parametrize("with_validate", [True, False])
def test_free_file_names_work_with_one_warning(tmp_path, with_validate):
    for split in ("train", "test") + ("validate",) * with_validate:
        write_slices(tmp_path / f"keras_png_slices_{split}", [f"{split} {letter}.png" for letter in "cabdefghij"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = dataset.load(tmp_path)
    assert len(caught) == 1 and "subjects cannot be told apart" in str(caught[0].message)
    assert [len(loaded[name].names) for name in dataset.SPLITS] == ([10, 10, 10] if with_validate else [9, 1, 10])
    assert all(split.subjects is None and split.labels is None for split in loaded.values())
    assert loaded["train"].names == sorted(loaded["train"].names)


def test_labels_that_the_model_does_not_know_are_unknown(data):
    write_slices(data / "keras_png_slices_validate", ["case_402_slice_2.nii.png", "case_402_slice_31.nii.png"])
    validate = dataset.load(data)["validate"]
    assert dataset.known_labels(validate, 3).tolist() == [0, 1, 2, -1]
    assert dataset.known_labels(validate, 0).tolist() == [-1] * 4
    nameless = dataset.known_labels(dataclasses.replace(validate, labels=None), 3)
    assert nameless.tolist() == [-1] * 4 and nameless.dtype == dataset.known_labels(validate, 3).dtype == np.int32


def test_one_nameless_slice_leaves_its_split_without_labels(data):
    write_slices(data / "keras_png_slices_test", ["another.png"])
    with pytest.warns(UserWarning, match="subjects cannot be told apart"):
        loaded = dataset.load(data)
    assert loaded["test"].labels is None and loaded["train"].labels.tolist() == [0, 1, 0, 1]


def test_named_slices_give_no_warning(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.load(data)


def test_loading_prints_what_it_found(data, capsys):
    dataset.load(data)
    printed = capsys.readouterr().out
    assert "train: 4 slices of 2 subjects, 64x64, uint8" in printed
    assert "validate: 2 slices of 1 subjects" in printed and "test: 2 slices of 1 subjects" in printed
    assert printed.replace("\n", "").isprintable()  # no moving bar in a log


def test_the_fingerprint_tells_data_sets_apart(data):
    """A renamed file, a changed pixel and a slice less each change the fingerprint of their split, and of no other."""
    before = dataset.fingerprint(dataset.load(data))
    assert before == dataset.fingerprint(dataset.load(data.parent))
    assert before["train"]["images"] == 4 and before["train"]["subjects"] == 2
    test = data / "keras_png_slices_test"
    first, second = sorted(test.iterdir())

    def change_a_pixel():
        pixels = np.array(Image.open(second))
        pixels[0, 0] ^= 255
        Image.fromarray(pixels).save(second)

    seen = [before["test"]]
    for change in (lambda: first.rename(test / "case_441_slice_9.nii.png"), change_a_pixel, second.unlink):
        change()
        after = dataset.fingerprint(dataset.load(data))
        assert after["test"] not in seen and after["train"] == before["train"]
        seen.append(after["test"])


# --------------------------------------------------------------------------------------
# Ranges and batches
# --------------------------------------------------------------------------------------


def test_a_split_is_uint8_and_to_float_is_its_share_of_255(data):
    split = dataset.load(data)["train"]
    assert split.images.dtype == np.uint8 and split.images.shape == (4, 64, 64)
    images = dataset.to_float(split.images)
    assert images.dtype == tf.float32 and images.shape == (4, 64, 64, 1)
    np.testing.assert_array_equal(images[..., 0], split.images.astype("float32") / np.float32(255))
    ends = dataset.to_float(np.array([[[0, 255]]], "uint8"))
    assert ends.numpy().ravel().tolist() == [0.0, 1.0]


def test_mirroring_turns_a_slice_upside_down_once():
    """The heads lie on their side: their left and right are the picture's top and bottom."""
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64), "uint8")
    for image, mirrored in zip(images, dataset.mirrored(images), strict=True):
        np.testing.assert_array_equal(mirrored, np.flipud(image))
    np.testing.assert_array_equal(dataset.mirrored(dataset.mirrored(images)), images)


def disc(count=1, size=64, radius=10):
    """Slices (count, size, size) of a soft disc right of the centre, far from the edges."""
    down, across = np.mgrid[:size, :size] - (size - 1) / 2
    picture = np.clip(0.5 + radius - np.hypot(down, across - 6), 0, 1)
    return np.repeat(np.uint8(200 * picture)[None], count, axis=0)


@pytest.fixture
def changed(monkeypatch):
    """`dataset.augment` with other limits; and, if asked, with every change at its limit."""

    class AtTheLimit:
        def uniform(self, low, high, size):
            return np.full(size, high)

    def change(images, limits, at_the_limit=True):
        with monkeypatch.context() as patched:
            patched.setattr(dataset, "CHANGE_LIMITS", np.array(limits))
            if at_the_limit:
                patched.setattr(np.random, "default_rng", lambda seed: AtTheLimit())
            return dataset.augment(images, 0)

    return change


def test_changes_are_told_as_shares_of_their_limits():
    pictures, told = dataset.augment(disc(50), seed=(0, 1))
    assert pictures.shape == (50, 64, 64) and pictures.dtype == np.uint8
    assert told.shape == (50, 6) and told.dtype == np.float32
    assert (told[:, 5] == 1).all() and (np.abs(told[:, :5]) <= 1).all()
    assert told[:, :5].min() < -0.9 and told[:, :5].max() > 0.9 and len(np.unique(told[:, :5])) == 250
    assert len({picture.tobytes() for picture in pictures}) == 50


def test_changes_depend_on_the_seed_alone():
    first, again, other = (dataset.augment(disc(5), seed) for seed in ((0, 1), (0, 1), (1, 0)))
    for i in range(2):
        np.testing.assert_array_equal(first[i], again[i])
        assert (first[i] != other[i]).any()


def test_changes_of_nothing_give_the_slices_back(changed):
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), "uint8")
    np.testing.assert_array_equal(changed(noise, [0] * 5, at_the_limit=False)[0], noise)


CHANGES = {
    "a pixel down": ([1, 0, 0, 0, 0], lambda image: np.roll(image, 1, axis=0)),
    "a pixel to the right": ([0, 1, 0, 0, 0], lambda image: np.roll(image, 1, axis=1)),
    "a right angle": ([0, 0, 90, 0, 0], lambda image: np.rot90(image, -1)),
    "squared": ([0, 0, 0, 0, np.log(2)], lambda image: np.rint(255 * (image / 255) ** 2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_what_it_says(name, changed):
    """A turn takes what is on the right of the head to where a clock's hand would."""
    limits, expected = CHANGES[name]
    np.testing.assert_allclose(changed(disc(), limits)[0][0], expected(disc()[0]).astype(int), atol=1)
    assert np.abs(expected(disc()[0]).astype(int) - disc()[0]).max() > 40


def test_growth_is_of_lengths(changed):
    grown = changed(disc(), [0, 0, 0, 0.5, 0])[0]
    assert grown.sum() / disc().sum() == pytest.approx(1.5**2, rel=0.01)


def test_the_told_shift_is_the_one_of_the_picture(changed):
    def centre(images):
        return np.array([ndimage.center_of_mass(image) for image in images])

    pictures, told = changed(disc(20), [10, 5, 0, 0, 0], at_the_limit=False)
    np.testing.assert_allclose(centre(pictures) - centre(disc(20)), told[:, :2] * [10, 5], atol=0.02)


def numbered_batches(examples=12, seed=3, epochs=range(4)):
    """What `shuffled_batches` draws from examples that know their number and variant: (batch, 4, 2) of the two."""
    variants = np.stack(np.indices((examples, 2)), axis=-1)
    return np.stack(list(dataset.shuffled_batches(variants, 4, seed, epochs).as_numpy_iterator()))


def test_each_epoch_is_a_new_permutation_with_new_variants():
    orders, variants = np.moveaxis(numbered_batches().reshape(4, 12, 2), -1, 0)
    assert (np.sort(orders, axis=1) == np.arange(12)).all()
    assert len(np.unique(orders, axis=0)) == len(np.unique(variants, axis=0)) == 4


def test_an_epoch_repeats_no_example_where_the_batches_leave_a_rest():
    batches = numbered_batches(examples=14, epochs=range(10))
    assert len(batches) == 30
    for numbers in np.split(batches[..., 0], 10):
        assert len(np.unique(numbers)) == 12
    assert len(np.unique(batches[..., 0])) == 14  # the rest is not always the same


@pytest.mark.parametrize("start", [1, 3])
def test_batches_from_a_later_epoch_are_the_tail_of_all(start):
    """What a resumed training sees; an epoch has 3 batches here."""
    np.testing.assert_array_equal(numbered_batches(epochs=range(start, 4)), numbered_batches()[3 * start :])


def test_batches_depend_on_the_seed():
    """Control for the test above: in order and in variants they differ with another seed."""
    batches, others = numbered_batches(), numbered_batches(seed=4)
    assert (batches[..., 0] != others[..., 0]).any() and (batches[..., 1] != others[..., 1]).any()


def test_every_example_is_shown_as_both_variants_about_equally():
    batches = numbered_batches(epochs=range(30)).reshape(-1, 2)
    counts = np.histogram2d(*batches.T, bins=(12, 2))[0]
    assert counts.sum(axis=1).tolist() == [30] * 12
    assert counts.min() >= 5  # of 30 draws; a fair coin gives less in 3 of 100,000
    assert 140 <= counts[:, 0].sum() <= 220  # of 360, a fair coin's 180 +- 4 standard deviations


def test_batches_keep_the_type_and_shape_of_their_examples():
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64), "uint8")
    batches = dataset.shuffled_batches(np.stack([images, dataset.mirrored(images)], axis=1), 2, 0, range(1))
    for batch in batches:
        assert batch.dtype == tf.uint8 and batch.shape == (2, 64, 64)
        for image in batch.numpy():
            assert any((image == known).all() for known in (*images, *images[:, ::-1]))


def test_arrays_that_belong_together_stay_together():
    """Of any shape and type, and in the order of the same array on its own."""
    numbers = np.arange(24).reshape(12, 2)
    pictures = np.repeat(numbers[..., None, None], 3, axis=-1).astype("uint8")
    batches = list(dataset.shuffled_batches((pictures, numbers, numbers / 8), 4, 3, range(2)))
    assert len(batches) == 6
    for picture, number, eighth in batches:
        assert picture.shape == (4, 1, 3) and picture.dtype == tf.uint8 and eighth.dtype == tf.float64
        np.testing.assert_array_equal(picture[:, 0, 0], number)
        np.testing.assert_array_equal(eighth * 8, number)
    alone = dataset.shuffled_batches(numbers, 4, 3, range(2))
    np.testing.assert_array_equal([number for _, number, _ in batches], list(alone.as_numpy_iterator()))


def test_a_function_of_batches_is_that_of_all():
    sizes = []

    def product(some, others):
        sizes.append(len(some))
        return some * others[:, None]

    some, others = np.random.default_rng(0).random((10, 3)), np.arange(10.0)
    np.testing.assert_array_equal(dataset.in_batches(product, some, others, batch_size=4), some * others[:, None])
    assert sizes == [4, 4, 2]


# --------------------------------------------------------------------------------------
# Files and phantoms
# --------------------------------------------------------------------------------------


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
    assert os.listdir(tmp_path) == ["report.json"]  # what was left of the stopped write is replaced, then renamed


@pytest.fixture
def small_phantoms(monkeypatch):
    """Phantoms of 4 slices of 32x32, drawn in a hundredth of the time."""
    monkeypatch.setattr(dataset, "phantom_slices", functools.partial(dataset.phantom_slices, slices=4, size=32))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_phantoms_depend_on_the_seed_alone(small_phantoms, tmp_path):
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        dataset.write_phantom(tmp_path / name, train=2, validate=1, test=1, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert len(first) == 16 and first == again
    assert first.keys() == other.keys() and all(first[path] != other[path] for path in first)
    assert len(set(first.values())) == 16  # control: no subject and no slice is drawn twice


def test_a_subject_is_the_same_phantom_however_many_there_are(small_phantoms, tmp_path):
    dataset.write_phantom(tmp_path / "few", train=1, validate=1, test=1)
    dataset.write_phantom(tmp_path / "more", train=2, validate=1, test=1)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    assert few == {path: more[path] for path in few}


def test_phantoms_load_as_the_real_data_does(phantoms):
    loaded = dataset.load(phantoms)
    assert {name: sorted(set(split.subjects)) for name, split in loaded.items()} == {
        "train": ["case_001", "case_002", "case_003"],
        "validate": ["case_402"],
        "test": ["case_441"],
    }
    assert all(len(split.images) == 32 * len(set(split.subjects)) for split in loaded.values())
    corners = loaded["train"].images[:, :4, :4]
    assert corners.max() == 0 and loaded["train"].images.max() > 150  # black around, as real slices are


def test_neighbouring_slices_of_a_phantom_are_more_alike_than_two_subjects(phantoms):
    """Also slice by slice: the farther apart, the less alike."""
    heads = dataset.load(phantoms)["train"].images.reshape(3, 32, 64, 64).astype(float)

    def difference(some, others):
        return np.abs(some - others).mean(axis=(-2, -1))

    between_subjects = min(difference(heads[i], heads[j]).min() for i, j in ((0, 1), (0, 2), (1, 2)))
    neighbours, far = difference(heads[:, 1:], heads[:, :-1]), difference(heads[:, 16:], heads[:, :-16])
    assert neighbours.max() < between_subjects
    assert neighbours.mean() < far.mean()
    assert neighbours.min() > 0


def test_an_interrupted_phantom_leaves_no_folder_and_is_drawn_again(small_phantoms, monkeypatch, tmp_path):
    folder, draw, drawn = tmp_path / "phantoms", dataset.phantom_slices, []

    def draw_two(*arguments):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dataset, "phantom_slices", draw_two)
        dataset.write_phantom(folder, train=3, validate=1, test=1)
    assert len(drawn) == 2 and not folder.exists()

    dataset.write_phantom(folder, train=3, validate=1, test=1)
    assert os.listdir(tmp_path) == ["phantoms"]
    assert len(contents(folder)) == 20


def test_importing_the_modules_writes_and_prints_nothing(tmp_path):
    """Nor does TensorFlow, whose log goes past sys.stderr; what comes later is written as ever."""
    (tmp_path / "import_all.py").write_text(
        "import dataset, modules, predict, train\nimport sys\nprint('later', file=sys.stderr)\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    path = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    finished = run_script(tmp_path / "import_all.py", cwd=empty, env={**os.environ, **path})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "" and finished.stderr == "later\n" and os.listdir(empty) == []
