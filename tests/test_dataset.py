"""Reading slices, batching them, and drawing phantoms."""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import dataset
import modules

import numpy as np
import pytest
from conftest import ROOT, killed_before, write_data, write_slices
from PIL import Image

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
SIZES, SIDES = ((256, 256), (100, 77), (64, 64), (33, 50)), (64, 128, 64, 32)


def colourful(width, height):
    """An RGB picture whose channels differ: a gradient each, with noise."""
    down, across = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    noise = np.random.default_rng(0).uniform(0, 40, (height, width, 3))
    return Image.fromarray((np.stack([across, down * across, 1 - down], axis=-1) * 215 + noise).astype("uint8"))


def viewer_grey(path):
    """The grey picture that PIL shows, float in [0, 255], with black at both sides to make it a square."""
    picture = Image.open(path)  # 16 bits: convert("L") would clip them, not scale them
    grey = np.asarray(picture) / 257 if picture.mode == "I;16" else np.asarray(picture.convert("L")).astype(float)
    return np.pad(grey, [[(max(grey.shape) - side) // 2, -((side - max(grey.shape)) // 2)] for side in grey.shape])


def area_resized(grey, side=64):
    """Each pixel is the mean of the area that it replaces."""
    rows = grey.repeat(side, axis=0).reshape(side, *grey.shape).mean(axis=1)
    return rows.repeat(side, axis=1).reshape(side, side, -1).mean(axis=2)


@pytest.mark.parametrize("kind, size, side", [*zip(KINDS, 3 * SIZES, 3 * SIDES)], ids=str)
def test_decodes_the_grey_picture_a_viewer_shows(kind, size, side, tmp_path):
    convert, ending, tolerance = KINDS[kind]
    path, rgb = tmp_path / f"picture.{ending}", colourful(*size)
    convert(rgb).save(path)
    decoded, shape = (values.numpy() for values in dataset.read_slice(str(path), side))
    assert decoded.dtype == np.uint8 and decoded.shape == (side, side) and (*shape,) == size[::-1]
    grey = viewer_grey(path)
    assert np.abs(decoded - area_resized(grey, side)).max() <= tolerance + 1e-3
    if kind == "RGB":  # controls: equal weights for the channels, turned on its side, and the nearest pixel, no mean
        assert np.abs(decoded - grey.reshape(64, 4, 64, 4).mean(axis=(1, 3))).max() <= 1.5
        for wrong in (area_resized(np.asarray(rgb).mean(axis=-1)), area_resized(grey).T, grey[2::4, 2::4]):
            assert np.abs(decoded - wrong).max() > 10


def test_turned_jpegs_and_a_split_of_one_grey_are_refused_and_a_dark_one_is_noted(data):
    """12 bits in 16 are a sixteenth as bright as they should be; turned by the EXIF orientation, where 1 is upright."""
    folder, exif = data / "keras_png_slices_test", Image.Exif()
    for path in folder.iterdir():
        Image.fromarray(np.asarray(Image.open(path)).astype("uint16") * 16).save(path)
    with pytest.warns(UserWarning, match=r"keras_png_slices_test: the brightest pixel is 1\d of 255 \(12 bits"):
        dataset.load(data)
    for grey, path in enumerate(folder.iterdir()):
        Image.new("L", (8, 8), grey).save(path)
    with pytest.raises(dataset.UserError, match="keras_png_slices_test: each of its 2 slices is of one grey"):
        dataset.load(data)
    for case, orientation in ((8, 1), (9, 6)):
        exif[0x0112] = orientation
        colourful(20, 20).save(folder / f"case_{case}_slice_0.jpg", exif=exif)
    with pytest.raises(dataset.UserError, match=r"1 turned \(by EXIF\) .*case_9_slice_0.jpg$"):
        dataset.load(data)


# ---- Names, folders, subjects and splits ---------------------------------------------


def test_order_is_by_case_then_slice_number(tmp_path):
    """Also of more slices than the 256 that the reader takes at a time, decoded in parallel."""
    names = [f"case_{case:03d}_slice_{index}.nii.png" for case in (2, 10, 100) for index in range(100)]
    write_slices(tmp_path, sorted(names))
    assert sorted(names) != names  # control: by name alone, slice 10 comes before slice 2
    split = dataset.load_split(tmp_path, "train")
    assert split.names.tolist() == names and split.subjects == 3
    assert [*zip(split.cases, split.slice_numbers)] == [(case, index) for case in (2, 10, 100) for index in range(100)]
    assert split.slice_numbers.dtype == split.cases.dtype == np.int32 and split.images.dtype == np.uint8
    for name, image in zip(names, split.images):
        np.testing.assert_array_equal(image, dataset.read_slice(str(tmp_path / name), 64)[0])


@pytest.mark.filterwarnings("ignore:some files")
def test_slices_have_any_name_and_masks_and_leftovers_of_macos_are_ignored(data):
    """Endings may be in upper case; and a name need not be UTF-8, as old zip files leave them."""
    train = data / "keras_png_slices_train"
    write_slices(train, ["a.png", "case_003_slice_0.PNG", "case_003_slice_1.JPG", "case_003_slice_2.Jpeg"])
    with contextlib.suppress(OSError):  # where a file system has no such names
        os.rename(train / "a.png", os.fsencode(train / "a") + b"\xe9.png")
    expected = sorted(os.listdir(train))
    write_slices(data / "keras_png_slices_seg_train", ["seg_001_slice_0.nii.png"])
    write_slices(train, ["seg_001_slice_0.nii.png", ".hidden.png"])
    for name in ("._case_001_slice_0.nii.png", ".DS_Store", "notes.txt"):
        (train / name).write_bytes(b"not a picture")
    loaded = dataset.load(data.parent)  # one level up will do
    assert list(loaded) == ["train", "validate", "test"] and loaded["train"].names.tolist() == expected
    assert dataset.fingerprint(loaded)["train"]["images"] == len(loaded["train"].images) == len(expected)


@pytest.mark.filterwarnings("ignore:some files")
def test_a_slice_has_one_file(data):
    """Two of one number or name are refused. A copy by its pixels and its name is told, not one by either alone."""
    folder = data / "keras_png_slices_test"
    write_slices(folder, ["a.png", "b (2).png", "c.png", "10.png", "100.png", "0.5.png", "0.05.png"])
    for name, copy in ("a", "a (1)"), ("a", "a - Copy"), ("c", "d"):
        shutil.copy(folder / f"{name}.png", folder / f"{copy}.png")
    with pytest.warns(UserWarning, match=r"_test: a \(1\).png and a - Copy.png have the same pixels \(2 such\)"):
        dataset.load(data)
    (folder / "a (1).png").unlink()
    with pytest.warns(UserWarning, match=r"_test: a - Copy.png and a.png have the same pixels \(1 such\)"):
        dataset.load(data)
    ends = (".nii (1).png", " - Copy.png", ".seg.png", ".jpg")
    pairs = [(f"case_441_slice_{i}.nii.png", f"case_441_slice_{i}{end}") for i, end in enumerate(ends)]
    pairs += [("case_002_slice_3.png", "case_2_slice_03.png"), ("slice_03.png", "slice_3.png"), ("a.jpg", "a.png")]
    write_slices(folder, sum(pairs, ()))
    with pytest.raises(dataset.UserError, match=r"^7 slice\(s\) with two files in .*_test, keep one") as refused:
        dataset.load(data)
    assert all(f"{one} and {other}" in str(refused.value) for one, other in map(sorted, pairs))


def test_it_is_certain_and_said_what_is_read(data, refuse, capsys):
    """Hidden folders are no data sets; and an unset variable of a shell is no folder."""
    above = data.parent
    shutil.copytree(data, above / ".hidden")
    Image.new("L", (30, 20)).save(data / "keras_png_slices_test" / "case_441_slice_2.png")
    assert dataset.main([str(above)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"data: {data}\n") and printed.replace("\n", "").isprintable()  # no moving bar
    assert "train: 4 slices of 2 subjects, 64x64, uint8" in printed and printed.count("shapes") == 1
    assert "test: slices of 2 shapes, each padded to a square: 8x8, 30x20\n" in printed
    for name in ("keras_png_slices_val", "keras_png_slice_validate", "Keras_PNG_slices_testing"):
        (data / name).mkdir()
        refuse(dataset, [above], f"{data / name} is none of keras_png_slices_train, ", "rename it")
        (data / name).rmdir()
    shutil.copytree(data, above / "more")
    refuse(dataset, [above], f"{above}: several data sets in it (keras_png_slices_data, more)")
    (above / "x.zip").touch()
    refuse(dataset, [above / "x.zip"], "x.zip is a zip file: unzip it")
    write_data(above / "same", train=[1, 2], test=[2])
    refuse(dataset, [above / "same"], "case_002", "number the subjects of each split differently", "same people")
    for arguments in ([""], ["--from", ""], ["--from", above, " "]):
        refuse(dataset, arguments, "the path is empty")


@pytest.mark.parametrize("subjects, first, nameless", [(2, 2, 0), (25, 24, 0), (10, 10, 1), (3, 3, 100), (0, 1, 10)])
def test_without_a_validate_folder_a_tenth_is_held_out(tmp_path, subjects, first, nameless, recwarn, capsys):
    """The last subjects, whole, at least one; and of the slices that are not named like the others."""
    folder = write_data(tmp_path, train=range(1, subjects + 1), test=[441]) / "keras_png_slices_train"
    write_slices(folder, [f"{number}.png" for number in range(nameless)])
    loaded = dataset.load(tmp_path)
    assert len(recwarn) == (nameless > 0)
    train, validate = loaded["train"], loaded["validate"]
    assert f"\nvalidate: {len(validate.names)} slices held out of train\n" in capsys.readouterr().out
    assert sorted(validate.cases) == [-1] * (nameless // 10) + sorted(2 * [*range(first, subjects + 1)])
    assert sorted([*train.names, *validate.names]) == sorted(os.listdir(folder))
    for split in (train, validate):
        for name, case, label, image in zip(split.names, split.cases, split.slice_numbers, split.images, strict=True):
            assert (case, label) == ((int(name[5:8]), int(name[15])) if name.startswith("case_") else (-1, -1))
            np.testing.assert_array_equal(image, dataset.read_slice(str(folder / name), 64)[0])


def test_case_and_slice_are_unknown_where_a_name_does_not_tell_and_only_there(data, recwarn):
    """With one warning. `slice_number` needs no case; a number that is no int32 is not known, nor is it another."""
    names = {
        "case_001_slice_00012.nii.png": (1, 12, 12), "CASE_001_SLICE_3.PNG": (1, 3, 3), "case-1-slice-2.png": (1, 2, 2),
        "Case 1 slice 31 - Copy.jpg": (1, 31, 31), "case_2147483648_slice_1.png": (-1, -1, 1),
        "case_1_slice_2147483648.png": (-1, -1, -1), "staircase_1_slice_2.png": (-1, -1, 2),
    }  # fmt: skip
    assert {name: (*dataset.parse_name(name), dataset.slice_number(name)) for name in names} == names
    dataset.load(data)
    assert not recwarn.list  # control
    for split in dataset.SPLITS:
        write_slices(data / f"keras_png_slices_{split}", ["b.png", "c.png", "a.png"])
    write_slices(data / "keras_png_slices_test", ["case_441_slice_31.nii.png"])
    with pytest.warns(UserWarning, match="such as a.png, are .* subjects cannot be told apart") as caught:
        test = dataset.load(data)["test"]
    assert len(caught) == 1
    assert test.names[:3].tolist() == ["a.png", "b.png", "c.png"] and test.subjects is None
    assert test.cases.tolist() == [-1] * 3 + [441] * 3 and test.slice_numbers.tolist() == [-1] * 3 + [0, 1, 31]


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
    below = dataset.slices_below(chosen.cases, chosen.slice_numbers)
    assert chosen.names.tolist() == ["f", "g", "h"] and below.tolist() == [-1, 0, -1]
    # Labels are places among the numbers that train has: of 0, 2 and 4 the slice below 2 is 0.
    labels = modules.labels_of([-1, 0, 2, 4, 0, 3, 4, 4], [0, 2, 4])
    below = dataset.slices_below(np.array([-1, 3, 3, 3, 7, 7, 7, 8]), labels).tolist()
    assert labels.tolist() == [-1, 0, 1, 2, 0, -1, 2, 2] and below == [-1, -1, 1, 2, -1, -1, -1, -1]


def test_to_float_is_the_share_of_255():
    images = dataset.to_float(np.arange(256, dtype="uint8").reshape(4, 8, 8))
    assert isinstance(images, np.ndarray) and images.dtype == np.float32 and images.shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(images.ravel(), np.arange(256, dtype="float32") / np.float32(255))


def test_heads_are_mirrored_along_the_axis_under_which_their_mean_is_like_itself(phantoms):
    lying = dataset.load(phantoms, ("train",))["train"].images
    upright, lopsided = np.rot90(lying, axes=(1, 2)), lying * np.triu(np.ones((64, 64), np.uint8))
    round_ones = np.minimum(lying, np.rot90(lying, axes=(1, 2)))  # alike under both, as some digits are
    pictures = lying, upright, lopsided, round_ones
    assert [dataset.mirror_axis(images) for images in pictures] == [1, 2, None, None]
    for axis, expected in ((None, [lying]), (1, [lying, lying[:, ::-1]]), (2, [lying, lying[:, :, ::-1]])):
        np.testing.assert_array_equal(dataset.with_mirrored(lying, axis), expected)


def test_all_slices_of_a_head_are_changed_alike():
    """By the returned shares of each limit, which depend on the seed; threads give what a plain loop gives."""
    rng = np.random.default_rng(0)
    heads = np.repeat(np.arange(40), 3)[rng.permutation(120)]
    images = rng.integers(0, 256, (120, 24, 24), "uint8")
    pictures, changes = dataset.augment(images, heads, seed=(0, 1))
    assert pictures.dtype == np.uint8 and changes.dtype == np.float32 and (changes[:, 5] == 1).all()
    looped = [dataset.change(image, amounts) for image, amounts in zip(images, changes[:, :5].astype(float))]
    np.testing.assert_allclose(pictures, np.array(looped).astype(int), atol=1)  # amounts are rounded to float32
    assert -1 <= changes.min() < -0.9 and 0.9 < changes[:, :5].max() <= 1
    np.testing.assert_array_equal((changes[:, None] == changes).all(axis=-1), heads[:, None] == heads)
    np.testing.assert_array_equal(dataset.augment(images, heads, seed=(0, 1))[0], pictures)
    assert (dataset.augment(images, heads, seed=(1, 0))[1][:, :5] != changes[:, :5]).all()


def test_a_change_is_what_it_says_growth_is_of_lengths_and_no_change_changes_nothing():
    down, across = np.mgrid[:64, :64] - 31.5
    disc = np.uint8(200 * np.clip(10.5 - np.hypot(down, across - 6), 0, 1))  # soft, right of the centre, far from edges

    def changed(image, *amounts):
        """By pixels down and across, degrees, growth, and ln gamma."""
        return dataset.change(image, np.array(amounts) / dataset.CHANGE_LIMITS / [64, 64, 1, 1, 1]).astype(int)

    for amounts, expected in (
        ([1, 0, 0, 0, 0], np.roll(disc, 1, axis=0)),
        ([0, 1, 0, 0, 0], np.roll(disc, 1, axis=1)),
        ([0, 0, 90, 0, 0], np.rot90(disc, -1)),  # as a clock's hand turns
        ([0, 0, 0, 0, np.log(2)], np.rint(255 * (disc / 255) ** 2)),
    ):
        np.testing.assert_allclose(changed(disc, *amounts), expected.astype(int), atol=1, err_msg=str(amounts))
        assert np.abs(expected.astype(int) - disc).max() > 40
    assert changed(disc, 0, 0, 0, 0.5, 0).sum() / disc.sum() == pytest.approx(1.5**2, rel=0.01)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), "uint8")
    np.testing.assert_array_equal(changed(noise, 0, 0, 0, 0, 0), noise)


@pytest.mark.parametrize("examples", [12, 14])
def test_each_epoch_is_a_new_order_with_new_variants_and_repeats_none(examples):
    """What batches leave over is not always the same. Epochs from a later one on, of a resumed training, are equal."""

    def epochs(seed, first=0):
        batches = np.stack([*dataset.shuffled_batches(examples, 2, 4, seed, range(first, 30)).as_numpy_iterator()])
        assert batches.dtype == np.int32 and batches.shape[1:] == (4, 2)
        return batches.reshape(-1, 12, 2)  # of an example and one of its two variants

    orders, variants = np.moveaxis(epochs(3), -1, 0)
    assert all(len(set(order)) == 12 for order in orders) and len(np.unique(orders)) == examples
    assert len(np.unique(orders, axis=0)) == len(np.unique(variants, axis=0)) == 30
    counts = np.histogram2d(orders.ravel(), variants.ravel(), bins=(examples, 2))[0]
    assert counts.min() >= 5  # of 30 draws or fewer; a fair coin gives less in 3 of 100,000
    assert 140 <= counts[:, 0].sum() <= 220  # of 360, a fair coin's 180 +- 4 standard deviations
    assert (epochs(4) != epochs(3)).any(axis=(0, 1)).all()
    for first in (1, 3):
        np.testing.assert_array_equal(epochs(3, first), epochs(3)[first:])


# ---- Files and phantoms --------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all_and_json_is_strict(tmp_path):
    path, infinite = tmp_path / "report.json", np.float32("inf")
    dataset.write_json(path, {"images": 1})
    with killed_before("replace"):
        dataset.write_json(path, {"images": 3})
    assert json.loads(path.read_text()) == {"images": 1}
    dataset.write_json(path, {"images": np.float32(2)})
    assert path.read_text() == '{\n  "images": 2.0\n}\n'
    assert os.listdir(tmp_path) == ["report.json"]  # what was left of the stopped write is replaced, then renamed
    content = {"scores": [float("nan"), 0.5, (infinite,)], "nested": {"psnr": -infinite, "rate": np.float64(0.1)}}
    dataset.write_json(path, {**content, "kept": [None, True, 3, "NaN"]})
    expected = '{"scores": [null, 0.5, [null]], "nested": {"psnr": null, "rate": 0.1}, "kept": [null, true, 3, "NaN"]}'
    assert json.dumps(json.loads(path.read_text())) == expected


def test_a_phantom_depends_on_the_seed_and_its_number_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "phantom_slices", functools.partial(dataset.phantom_slices, slices=4, size=32))  # fast

    def drawn(name, train, seed):
        folder = tmp_path / "new" / name
        dataset.write_phantom(folder, train, validate=1, test=1, seed=seed)
        assert dataset.is_phantom(folder)
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.png")}

    first, again, fewer, other = drawn("1", 2, 0), drawn("2", 2, 0), drawn("3", 1, 0), drawn("4", 2, 1)
    assert len(first) == len(set(first.values())) == 16 and first == again  # nothing is drawn twice
    assert len(fewer) == 12 and fewer == {path: first[path] for path in fewer}
    assert first.keys() == other.keys() and all(first[path] != other[path] for path in first)


def test_phantoms_load_as_the_real_data_does_and_are_heads(phantoms):
    """Neighbouring slices are more alike than two subjects; and the farther apart, the less alike."""
    loaded = dataset.load(phantoms)
    cases = {name: sorted(set(split.cases.tolist())) for name, split in loaded.items()}
    assert cases == {"train": [1, 2, 3], "validate": [402], "test": [441]}
    assert all(split.slice_numbers.tolist() == list(range(32)) * split.subjects for split in loaded.values())
    images = loaded["train"].images
    assert images[:, :4, :4].max() == 0 and images.max() > 150  # black around, as real slices are
    heads = images.reshape(3, 32, 64, 64).astype(float)
    between_subjects = min(np.abs(heads[i] - heads[j]).mean(axis=(1, 2)).min() for i, j in ((0, 1), (0, 2), (1, 2)))
    neighbours, far = (np.abs(heads[:, step:] - heads[:, :-step]).mean(axis=(2, 3)) for step in (1, 16))
    assert 0 < neighbours.min() <= neighbours.max() < between_subjects and neighbours.mean() < far.mean()


IMPORT = "import dataset, predict, train, matplotlib, keras, sys; print(matplotlib.get_backend(), sys.stderr)"
NOTEBOOK = "module://matplotlib_inline.backend_inline"


@pytest.mark.parametrize("plots, found, backend", [("pgf", "pgf", ""), (NOTEBOOK, r"\w+|module://.*", "jax")])
def test_importing_the_scripts_writes_and_prints_nothing_and_needs_no_stderr(plots, found, backend, tmp_path):
    """Whatever the user has set the libraries to; and matplotlib keeps its backend, if it is there."""
    keras_json = tmp_path / "keras.json"
    keras_json.write_text('{"backend": "torch", "floatx": "float64", "image_data_format": "channels_first"}')
    variables = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "KERAS_HOME": str(tmp_path)}
    finished = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, IMPORT], cwd=tmp_path, stdout=subprocess.PIPE,
        env={**os.environ, **variables, "MPLBACKEND": plots, "KERAS_BACKEND": backend}, text=True, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0 and list(tmp_path.iterdir()) == [keras_json]
    assert re.fullmatch(f"({found}) None\n", finished.stdout)
