"""`dataset.py --from`: made-up heads, written in each form in which OASIS-1 can be had, come back as course slices."""

import dataclasses
import os

import dataset

import nibabel
import numpy as np
import pytest
from conftest import cut
from PIL import Image

NAMES = [source.name for source in dataset.SOURCES]


def head(x, y, z):
    """Brightness of a lopsided head, 0 to 2000, at mm to the left, to the front, and above the lowest slice."""
    brain = np.exp(-(np.hypot(x / 60, y / 80) ** 8))
    mark = np.exp(-(((x - 25) / 12) ** 2) - ((y + 3 * z - 45) / 9) ** 2)  # further back higher up
    return brain * (400 + 800 * mark) * (1 + z.clip(0, 31) / 50) * (z > -5)


def centred(count, mm=1.0):
    return (np.arange(count) - (count - 1) / 2) * mm


def as_stored(kind):
    """The head on the grid of a source: of a volume, or (61, 248, 496) for the pictures 100 to 160."""
    order, *axes = [
        ("xyz", centred(176), centred(208), np.arange(176) - 70),
        ("xzy", centred(160), 103 - np.arange(192), centred(224)),
        ("zxy", np.arange(100, 161) - 129, centred(248, 160 / 248), centred(496, 256 / 496)),
    ][kind]
    return head(**dict(zip(order, np.meshgrid(*axes, indexing="ij"))))


def write(folder, kind, array, case=1, visit=1, scan=1):
    """One head in the files of a source; the path of the last."""
    session = f"OAS1_{case:04d}_MR{visit}"
    if kind == 0:
        path = folder / "disc1" / session / "PROCESSED/MPRAGE/T88_111" / f"{session}_mpr_n4_anon_111_t88_masked_gfc.hdr"
        header = nibabel.AnalyzeHeader(endianness=">")
        header.set_data_dtype(np.int16)
        images = {path: nibabel.AnalyzeImage(array[..., None].astype(">i2"), None, header)}
    elif kind == 1:
        path = folder / f"OASIS_{session}" / "aligned_norm.nii.gz"
        images = {path: nibabel.Nifti1Image((array / 2000).astype("float32"), np.diag([-1, 1, -1, 1]))}
    else:
        pictures = [Image.fromarray((picture / 8).astype("uint8")).convert("RGB") for picture in array]
        images = {folder / "Demented" / f"{session}_mpr-{scan}_{i}.jpg": image for i, image in enumerate(pictures, 100)}
    for path, image in images.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path) if kind == 2 else nibabel.save(image, path)
    return path


@pytest.mark.parametrize("kind", range(3), ids=NAMES)
def test_a_head_comes_back_with_its_slices_and_orientation_on_one_grey_scale(kind, tmp_path):
    mm = centred(256, [208 / 256, 208 / 256, 1][kind])
    z, x, y = np.meshgrid(np.arange(32), mm, mm, indexing="ij")
    in_file = (np.abs(x) < [88, 80, 80][kind]) & (np.abs(y) < [104, 112, 128][kind])
    expected = head(x, y, z) / np.percentile(head(x, y, z)[in_file], 99.9)  # one white for all slices

    def distance(array):
        write(tmp_path, kind, array)
        source, heads = dataset.find_heads(tmp_path)
        pictures = dataset.head_slices(heads[1], source).numpy()
        assert source.name == NAMES[kind] and pictures.shape == (32, 256, 256) and pictures.dtype == np.uint8
        return np.abs(pictures - 255 * expected.clip(0, 1)).mean()

    array = as_stored(kind)
    assert distance(array) < 0.5
    if kind == 0:  # controls: turned, mirrored, upside down, a slice too high, along wrong axes, a grey scale a slice
        wrong = [array[:, ::-1], array[::-1], array[..., ::-1], np.roll(array, 1, 2), array.transpose(2, 1, 0)]
        assert min(map(distance, [*wrong, array * (1500 / array.max((0, 1)).clip(1))])) > 0.5


@pytest.fixture
def arrays(monkeypatch):
    shapes = [(18, 21, 110), (16, 110, 22), (25, 50)]  # small heads, as which `dataset` expects them
    small = [dataclasses.replace(source, shape=shape) for source, shape in zip(dataset.SOURCES, shapes)]
    monkeypatch.setattr(dataset, "SOURCES", small)
    return [np.random.default_rng(0).integers(100, 2000, shape) for shape in (*shapes[:2], (61, 25, 50))]


@pytest.mark.parametrize("kind", range(3), ids=NAMES)
def test_a_folder_is_made_of_one_head_a_subject(kind, arrays, tmp_path, capsys):
    oasis, target = tmp_path / "oasis", tmp_path / "keras_png_slices_data"
    for case, folder in (2, oasis), (30, oasis), (7, oasis), (401, tmp_path / "other"):
        write(folder, kind, arrays[kind], case)
    (oasis / "link").symlink_to(tmp_path / "other")
    (oasis / "loop").symlink_to(oasis)
    write(oasis, kind, arrays[kind] // 4, 7, visit=2)
    write(oasis, kind, arrays[kind], 30, scan=2)  # a volume is of all scans, so that this is the same file
    assert dataset.main(["--from", str(oasis), str(target)]) == 0
    assert f"4 heads of {NAMES[kind]}; left out: 1 second visits, {int(kind == 2)} repeated" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [target, oasis, tmp_path / "other"]
    splits = dataset.load(target)
    cases = {name: {*split.cases} for name, split in splits.items()}
    assert cases == {"train": {2, 7}, "validate": {30}, "test": {401}}
    assert all(split.slice_numbers.tolist() == list(range(32)) * split.subjects for split in splits.values())
    assert np.array_equal(*np.split(splits["train"].images, 2))  # of the first visit, not of the second


@pytest.mark.parametrize("count", [3, 4, 10, 15, 39, 416])
def test_splits_hold_about_a_tenth_and_every_subject_once(count):
    numbers = [3 * number + 1 for number in range(count)]
    splits = dataset.split_cases(numbers)
    assert [*splits["train"], *splits["validate"], *splits["test"]] == numbers and splits["train"]
    assert all(1 <= len(splits[name]) <= max(1, count / 10 + 0.5) for name in ("validate", "test"))


def test_of_single_slices_the_highest_32_that_are_there_are_taken(arrays, tmp_path):
    numbers = np.arange(61)
    path = write(tmp_path, 2, 8 * 4 * np.ones_like(arrays[2]) * numbers[:, None, None])  # the higher the brighter
    path.with_name(path.name.replace("160", "150")).unlink()
    source, heads = dataset.find_heads(tmp_path)
    pictures = dataset.head_slices(heads[1], source)
    np.testing.assert_allclose(pictures[:, 128, 128], 255 / 60 * np.delete(numbers, 50)[-32:], atol=2)


def of(value, dtype):  # put such voxels into a volume
    return lambda path: nibabel.save(nibabel.Nifti1Image(np.full((16, 110, 22), value, dtype), np.eye(4)), path)


BROKEN = {  # source, what is done to a file of the second head, what the message says
    "a cut disc": (0, lambda path: cut(path.with_suffix(".img")), "cannot be read"),
    "a cut NIfTI": (1, cut, "cannot be read"),
    "a cut JPEG": (2, cut, "mpr-1_160.jpg cannot be read"),
    "few JPEGs": (2, lambda path: [p.unlink() for p in sorted(path.parent.glob("*_0002_*"))[31:]], "31 slices, not 32"),
    "RGB": (1, of(0, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "has voxels that are not numbers, or not one each"),
    "complex": (1, of(1, "complex64"), "has voxels that are not numbers, or not one each"),
    "NaN": (1, of(np.nan, "float32"), "has voxels that are not numbers"),
}


@pytest.mark.parametrize("kind, damage, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_nothing_is_left(kind, damage, message, arrays, tmp_path, refuse):
    damage([write(tmp_path / "oasis", kind, arrays[kind], case) for case in (1, 2, 3)][1])
    told = refuse(dataset, ["--from", tmp_path / "oasis", tmp_path / "slices"], "OAS1_0002_MR1", message)
    assert told.endswith(("download it again", "take it out of the folder")) and os.listdir(tmp_path) == ["oasis"]


def test_what_else_is_refused(arrays, tmp_path, refuse, capsys, monkeypatch):
    oasis, target, link = tmp_path / "oasis", tmp_path / "slices", tmp_path / "oasis" / "disc2"
    both = "--from", oasis, target
    refuse(dataset, both, f"--from {oasis}: no such folder")
    oasis.mkdir()
    refuse(dataset, both, "nothing known", "t88_masked_gfc", "aligned_norm.nii.gz", "mpr-1_100.jpg")
    path, _ = (write(oasis, 0, arrays[0], case) for case in (1, 2))
    refuse(dataset, both, "only 2 subject(s)", "add another disc")
    for wrong, expected in (arrays[0][:-1], "(17, 21, 110, 1), not (18, 21, 110)"), (0 * arrays[0], "no brain in it"):
        write(oasis, 0, wrong, 3)
        refuse(dataset, both, "OAS1_0003", expected)
    write(oasis, 0, arrays[0], 3)
    refuse(dataset, ["--from", oasis, path / "slices"], "cannot be written")
    monkeypatch.setattr(dataset, "head_slices", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert dataset.main(list(map(str, both))) == 130
    assert capsys.readouterr().err == "dataset.py: stopped; give the same command again\n"
    assert list(tmp_path.iterdir()) == [oasis]  # no .partial, no slices
    link.symlink_to("gone")
    refuse(dataset, both, f"{link}: No such file or directory")
    target.mkdir()
    refuse(dataset, both, f"{target} exists", "delete it")
