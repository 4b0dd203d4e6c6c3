"""`predict.py --anomalies`: what it writes, what its numbers depend on, and what it refuses; and the two benches."""

import csv
import dataclasses
import re
import shutil

import dataset
import modules
import predict
import train

import anomalies
import bench
import numpy as np
import pytest
from conftest import TINY, cut, files_in, killed_before
from PIL import Image


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    """A tiny run whose prior is conditioned on the slice number alone, and has seen enough to know the numbers."""
    run = tmp_path_factory.mktemp("anomalies") / "run"
    number_alone = "--scores 0 --no-below --augmentations 0 --pixelcnn-context-filters 0 --pixelcnn-dropout 0"
    flags = f"{number_alone} --pixelcnn-residual-blocks 1 --pixelcnn-epochs 15 --pixelcnn-batch-size 8".split()
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY, *flags]) == 0
    return run


@pytest.fixture(scope="module")
def detector(run):
    opened = train.Run(run)
    found, _ = predict.make_detector(predict.parse_arguments([]), opened, *predict.load_run(opened))
    found.RESTORATIONS = 2
    return found


@pytest.fixture(scope="module")
def slices(phantoms):
    """Every third test slice, (11, 64, 64, 1), and their slice numbers, which are labels too."""
    split = dataset.load(phantoms, ("test",))["test"][::3]
    return dataset.to_float(split.images), split.slice_numbers


LONG = "x" * 246  # with .png as long as most file systems allow, nearly


@pytest.fixture
def mixed(phantoms, tmp_path):
    """A folder of slices of all sorts of names and files."""
    folder, source = tmp_path / "mixed", phantoms / "keras_png_slices_test"
    folder.mkdir()
    shutil.copy(source / "case_441_slice_30.nii.png", folder)
    picture = Image.open(source / "case_441_slice_9.nii.png")
    picture.resize((100, 80)).convert("RGB").save(folder / "P7-Slice09.JPG", quality=95)
    Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(folder / "$16 bit$.png")
    for name in ("a.png", "a.jpg", "case_1_slice_77.png", f"{LONG}.png"):
        picture.save(folder / name)
    return folder


# ---- What is written -----------------------------------------------------------------


def test_files_of_the_command(run, mixed):
    results, arguments = run / "anomalies", ["--run", str(run), "--anomalies", str(mixed), "--slice", "12"]
    results.mkdir(exist_ok=True)
    for name in ("older.png", "anomalies.csv"):
        (results / name).write_text("of an earlier call")
    with killed_before("unlink", "older.png"):
        predict.main(arguments)
    assert files_in(results) == ["older.png"]  # the table came last, and went first
    assert predict.main(arguments) == 0
    names = "case_441_slice_30.nii", "P7-Slice09", "case_1_slice_77", "$16 bit$", "a", "a_1", LONG
    pictures = [f"{name}.png" for name in names]
    assert files_in(results) == sorted([*pictures, "anomalies.csv", "anomalies.npz"])
    assert len({Image.open(results / name).size for name in pictures}) == 1

    arrays = dict(np.load(results / "anomalies.npz"))
    maps = {name: (7, 64, 64) for name in ("images", "restored", "anomaly_map")}
    shapes = {"names": (7,), "labels": (7,), "score": (7,), "surprise": (7, 16, 16), **maps}
    assert {name: values.shape for name, values in arrays.items()} == shapes
    assert arrays["labels"].dtype == np.int32 and arrays["anomaly_map"].dtype == np.float32
    assert all(np.isfinite(values).all() for name, values in arrays.items() if name != "names")
    labels = dict(zip(arrays["names"], arrays["labels"]))
    assert 0 <= labels.pop("case_1_slice_77.png") < 32  # the likeliest, for there is no such number in this run
    of_names = {"case_441_slice_30.nii.png": 30, "P7-Slice09.JPG": 9}
    assert labels == {**dict.fromkeys(("$16 bit$.png", "a.png", "a.jpg", f"{LONG}.png"), 12), **of_names}
    deep, plain = (list(arrays["names"]).index(name) for name in ("$16 bit$.png", "a.png"))
    np.testing.assert_allclose(arrays["anomaly_map"][deep], arrays["anomaly_map"][plain], rtol=1e-4)

    with open(results / "anomalies.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "slice", "score", "percentile"]
    order = np.argsort(-arrays["score"], kind="stable")  # the most surprising first
    assert [row["name"] for row in rows] == arrays["names"][order].tolist()
    assert [int(row["slice"]) for row in rows] == arrays["labels"][order].tolist()
    np.testing.assert_allclose([float(row["score"]) for row in rows], arrays["score"][order], atol=1e-4)
    assert all(0 <= float(row["percentile"]) <= 100 for row in rows)


def test_a_picture_shows_each_pixel_of_its_slice(tmp_path):
    """Nine times each; what stands around the panels is the same in all pictures, but for the line of text."""
    rng, names = np.random.default_rng(0), np.array(["a.png", "b.png"])
    found = {name: rng.random((2, 64, 64)) for name in ("images", "restored", "anomaly_map")}
    found |= {"surprise": rng.random((2, 16, 16)), "score": rng.random(2), "percentile": np.array([5.0, 100.0])}
    predict.plot_anomalies(tmp_path, names, found, "slice")
    pictures = np.stack([np.asarray(Image.open(tmp_path / name))[..., 0] for name in names])
    panels, expected = pictures[:, -200:-8, 8:200], 255 * found["images"].repeat(3, axis=1).repeat(3, axis=2)
    np.testing.assert_allclose(panels, expected, atol=2)
    differs = pictures[0] != pictures[1]
    assert differs[:28].any() and not differs[28:-200].any() and not differs[:, 400:460][28:].any()


def test_no_two_pictures_have_one_name():
    """Also where case does not count."""
    names = ["a.png", "a.jpg", "a.png.jpg", "Head.png", "head.jpg", "a_1.png"]
    pictures = predict.picture_names(names)
    assert len({picture.casefold() for picture in pictures}) == len(names)
    assert pictures[0] == "a.png" and all(picture.endswith(".png") for picture in pictures)


# ---- What the numbers depend on ------------------------------------------------------


def test_a_slice_does_not_depend_on_the_others(detector, slices):
    """In another order and alone it has the same numbers; to rounding, for batches of other sizes sum in other ways."""
    images, labels = slices
    order = np.random.default_rng(0).permutation(len(images))
    found, again = detector.examine(images, labels, 0), detector.examine(images[order], labels[order], 0)
    alone = detector.examine(images[7:8], labels[7:8], 0)
    for name, values in found.items():
        np.testing.assert_allclose(again[name], values[order], rtol=1e-3, atol=1e-3, err_msg=name)
        np.testing.assert_allclose(alone[name][0], values[7], rtol=1e-3, atol=1e-3, err_msg=name)
    assert not np.allclose(found["anomaly_map"][6], found["anomaly_map"][7], atol=0.1)
    other = detector.examine(images[7:8], labels[7:8], seed=1)
    np.testing.assert_array_equal(other["surprise"], alone["surprise"])
    assert (other["restored"] != alone["restored"]).any()


def test_a_slice_without_a_number_gets_the_likeliest(detector, slices):
    images, labels = slices
    known = np.where(np.arange(len(labels)) % 2, labels, -1).astype(np.int32)
    codes = detector.vqvae.encode(images)
    found = detector.likeliest(images, codes, known)
    np.testing.assert_array_equal(found[1::2], labels[1::2])
    assert (found >= 0).all() and np.abs(found - labels)[::2].mean() < 5  # at random about 11
    of_labels = found, labels, (found + 16) % 32
    nats, true, wrong = (detector.nats(images, codes, of).mean(axis=(1, 2)) for of in of_labels)
    assert (nats <= true + 1e-5).all() and true.mean() < 0.99 * wrong.mean()


def test_the_map_is_the_root_of_the_squared_logarithms_of_shares(detector, monkeypatch):
    """Up to the highest value of the validation slices, beyond which no share is known."""
    values, shares = np.random.default_rng(0).exponential(size=100_000), 1 - np.exp(-detector.log_shares)
    points = np.array([0.5, 2.0, 4.0, 8.0])  # an exponential distribution has -ln p = value
    for others, expected in (({}, points), ({"other": points[::-1]}, np.hypot(points, points[::-1]))):
        terms = {"one": points, **others}
        monkeypatch.setattr(detector, "quantiles", dict.fromkeys(terms, np.quantile(values, shares)))
        np.testing.assert_allclose(detector.combine(terms), expected, rtol=0.05, atol=0.03)
    assert detector.combine({"one": np.array([100.0]), "other": [0.0]}) == np.float32(np.log(32 * 64 * 64))


@pytest.mark.parametrize("axis", [1, 2])
def test_surprise_is_the_mean_of_both_raster_orders(axis, detector, slices, monkeypatch):
    """So the maps of a mirrored slice are the mirrored maps, where the models were fitted on such slices."""
    images, labels = slices

    def surprise(images, mirror_axis):
        monkeypatch.setattr(detector, "mirror_axis", mirror_axis)
        return detector.measure(images, labels)["terms"]["surprise"]

    both, mirrored = surprise(images, axis), surprise(np.flip(images, axis), axis)
    np.testing.assert_allclose(np.flip(mirrored, axis), both, atol=1e-4)
    assert not np.allclose(surprise(images, None), both, atol=0.01)  # control


def test_a_score_is_the_mean_of_the_highest_hundredth(detector):
    maps = np.random.default_rng(0).permuted(np.arange(2 * 64 * 64.0)).reshape(2, 64, 64)
    expected = [sorted(values.ravel())[-41:] for values in maps]
    np.testing.assert_allclose(detector.score(maps), np.mean(expected, axis=1))


def test_a_percentile_is_among_the_validation_slices_examined_alike(detector, phantoms):
    """Examined again, the lowest has none below it; also those whose numbers are not known, and the likeliest count."""
    train_split, validate = dataset.load(phantoms, ("train", "validate")).values()
    normal = dataset.to_float(train_split.images), train_split.slice_numbers
    validate = dataset.to_float(validate.images), np.where(validate.slice_numbers % 2, validate.slice_numbers, -1)
    alike = predict.AnomalyDetector(detector.vqvae, detector.prior, normal, validate, detector.mirror_axis)
    alike.RESTORATIONS = 2
    percentile = alike.examine(*validate, seed=0)["percentile"]
    np.testing.assert_allclose(np.sort(percentile), 100 * np.arange(32) / 32, atol=4)


# ---- What is refused -----------------------------------------------------------------


def test_wrong_folders_and_numbers_are_refused(run, mixed, refuse, tmp_path):
    table, command = run / "anomalies" / "anomalies.csv", ["--run", run, "--anomalies"]
    table.parent.mkdir(exist_ok=True)
    table.write_text("of before")
    refuse(predict, [*command, tmp_path / "none"], "--anomalies", "none", "no such folder")
    refuse(predict, [*command, tmp_path], str(tmp_path), "no slices in it", "another folder")
    refuse(predict, [*command, table.parent], "would replace the slices", "another folder")
    refuse(predict, [*command, mixed, "--slice", 32], "--slice 32", "this run has the slice numbers 0, 1, 2")
    cut(mixed / "a.png")
    refuse(predict, [*command, mixed], "1 unreadable", "a.png")
    assert table.read_text() == "of before"


# ---- The benches ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", anomalies.KINDS)
def test_a_change_stays_in_its_disk_and_has_its_own_seed(kind, slices):
    images, subjects = slices[0][..., 0], np.arange(11) // 4
    changed, disks = anomalies.change(images, subjects, kind, 0, [3, 9])
    assert (changed != images[[3, 9]])[disks].any()
    np.testing.assert_allclose(changed[~disks], images[[3, 9]][~disks], atol=1e-6)
    assert not (disks & ~np.array([predict.pixels_of_head(image, 0.05) for image in images[[3, 9]]])).any()
    np.testing.assert_array_equal(anomalies.change(images, subjects, kind, 0, [9])[0][0], changed[1])
    assert (anomalies.change(images, subjects, kind, 1, [9])[0][0] != changed[1]).any()


def test_the_bench_of_the_maps(run, phantoms, tmp_path, monkeypatch, capsys):
    """The whole command, on two kinds and the slices of the test and a validation subject."""
    data = shutil.copytree(phantoms, tmp_path / "data")
    for path in (data / "keras_png_slices_validate").iterdir():
        shutil.copy(path, data / "keras_png_slices_test" / path.name.replace("case_402", "case_442"))
    monkeypatch.setattr(anomalies, "KINDS", {kind: anomalies.KINDS[kind] for kind in ("disk of 1", "shift")})
    monkeypatch.setattr(anomalies, "RESAMPLES", 20)
    command = ["--run", str(run), "--data", str(data), "--slices", "12"]
    assert anomalies.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {name: [float(cell) for cell in cells] for name, *cells in
            (line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "0." in line)}  # fmt: skip
    assert next(iter(rows)) == "chance" and list(rows)[-2:] == ["oracle: clean reconstruction", "AUROC of the score"]
    assert rows["anomaly map"][0] > 3 * rows["chance"][0]  # disks of 1
    assert all(0 < value <= 1 for row in rows.values() for value in row) and len(rows["chance"]) == 3
    for line, row in zip(lines[-2:], ("anomaly map", "AUROC of the score")):
        low, high = (float(word) for word in re.findall(r"0\.\d+|1\.0+", line))
        assert low <= rows[row][-1] <= high
    monkeypatch.setattr(anomalies, "PICTURED", ("shift", "disk of 1"))
    assert anomalies.main([*command, "--picture", str(tmp_path / "changes.png")]) == 0
    assert Image.open(tmp_path / "changes.png").size[1] > 3 * 128


def test_the_bench_of_speed(monkeypatch, capsys):
    """With small networks it measures something; in (c) it stops where the two sides differ."""
    small = {"vqvae_num_embeddings": 16, "vqvae_filters": (4, 4, 4, 4), "pixelcnn_residual_blocks": 1}
    small = train.Settings(**small, pixelcnn_filters=8, scores=2)
    plain = dataclasses.replace(small, labels=False, below=False)
    for name, value in {"REPETITIONS": 1, "EVERY": 64, "BATCH": 2, "PUBLISHED": small, "ORIGINAL": plain}.items():
        monkeypatch.setattr(bench, name, value)
    bench.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("(")]
    assert [line[1] for line in lines] == list("ababccc")
    ssim = modules.ssim
    monkeypatch.setattr(modules, "ssim", lambda *pair: 2 * ssim(*pair))
    with pytest.raises(AssertionError, match="SSIM"):
        bench.main(["--only", "c"])
