"""Whole runs: their files, the numbers of the report, what the models learn, and what is left of a stopped run."""

import csv
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
from conftest import ROOT, TINY
from skimage.metrics import structural_similarity
from test_dataset import write_data, write_slices
from test_errors import refuse  # noqa: F401  (a fixture)

import dataset
import predict
import train

needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
TRAINED = ["config.json"] + [f"{name}{end}" for name in ("vqvae", "pixelcnn")
                             for end in (".keras", "_history.csv", "_loss.png")]  # fmt: skip
MEASURED = ["report.json", "samples.npz", "samples.png", "reconstructions.png", "completions.png"]


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def read_history(path):
    """Rows without the seconds, which no two runs share."""
    with open(path, newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


def read_report(run):
    """Strictly: Python reads NaN and Infinity too, which JSON does not have."""
    return json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)


# --------------------------------------------------------------------------------------
# A finished run
# --------------------------------------------------------------------------------------


def test_run_holds_every_file_and_nothing_else(finished_run):
    assert files_in(finished_run) == sorted(TRAINED + MEASURED)
    config = json.loads((finished_run / "config.json").read_text())
    assert config["settings"]["filters"] == [4, 8]
    assert [config["data"][split]["images"] for split in dataset.SPLITS] == [96, 32, 32]
    for name in ("vqvae", "pixelcnn"):
        assert config["finished"][name] == hashlib.sha256((finished_run / f"{name}.keras").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["vqvae", "pixelcnn"])
def test_kept_model_is_the_best_epoch_by_validation(finished_run, phantoms, name):
    rows = read_history(finished_run / f"{name}_history.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    validate = dataset.load(phantoms)["validate"]
    vqvae = keras.saving.load_model(finished_run / "vqvae.keras")
    images = dataset.to_float(validate.images)
    if name == "vqvae":
        vqvae.compile()
        measured = vqvae.evaluate(images, verbose=0, return_dict=True)
        loss = measured["loss"] - measured["quantizer_loss"]
    else:
        pixelcnn = keras.saving.load_model(finished_run / "pixelcnn.keras")
        loss = pixelcnn.nll(vqvae.encode(images), labels=validate.labels).numpy().mean()
    assert loss == pytest.approx(min(row["val_loss"] - row.get("val_quantizer_loss", 0) for row in rows), rel=1e-4)


def test_train_leaves_a_finished_run_alone(copied_run, phantoms, capsys):
    """A picture says nothing about what is finished."""
    for name in ("vqvae_loss.png", "report.json"):
        (copied_run / name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in copied_run.iterdir()}
    assert train.main(["--data", str(phantoms), "--run", str(copied_run), *TINY]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert {path.name: path.stat().st_mtime_ns for path in copied_run.iterdir()} == before


@pytest.fixture(scope="module")
def learned(phantoms, tmp_path_factory):
    """A run of wider layers and more steps, and what its report is made of, from the saved models and samples."""
    found = types.SimpleNamespace(run=tmp_path_factory.mktemp("learned") / "run")
    longer = ["--filters", "16", "32", "--vqvae-epochs", "12", "--vqvae-batch-size", "8"]
    longer += ["--vqvae-learning-rate", "0.003", "--pixelcnn-epochs", "16", "--pixelcnn-batch-size", "8"]
    assert train.main(["--data", str(phantoms), "--run", str(found.run), *TINY, *longer]) == 0
    assert predict.main(["--run", str(found.run), "--heads", "2"]) == 0
    found.report, found.samples = read_report(found.run), dict(np.load(found.run / "samples.npz"))
    found.vqvae, found.pixelcnn = (keras.saving.load_model(found.run / f"{n}.keras") for n in ("vqvae", "pixelcnn"))
    splits = dataset.load(phantoms)
    found.train, found.test = (dataset.to_float(splits[name].images) for name in ("train", "test"))
    found.split, found.labels = splits["train"], splits["test"].labels
    found.codes = found.vqvae.encode(found.test).numpy()
    found.reconstructed = found.vqvae.decode(found.codes).numpy()
    return found


def approx(expected):
    return {name: pytest.approx(float(value), rel=1e-3) for name, value in expected.items()}


def test_report_of_the_reconstructions(learned):
    pairs = learned.test, learned.reconstructed
    similarity = [structural_similarity(a[..., 0], b[..., 0], data_range=1) for a, b in zip(*pairs)]
    expected = {
        "ssim_mean": np.mean(similarity),
        "ssim_min": np.min(similarity),
        "ssim_gaussian_mean": np.mean(tf.image.ssim(*pairs, 1.0)),
        "psnr_mean": np.mean(tf.image.psnr(*pairs, 1.0)),
    }
    report = learned.report["reconstruction"]
    assert report == report | {"split": "test", "images": 32, "ssim_mean_interval": None} | approx(expected)


def test_report_of_the_codes_and_their_prior(learned):
    codebook, prior, codes = learned.report["codebook"], learned.report["prior"], learned.codes
    share = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(share * np.log2(share)).sum()
    assert codebook["used"] == len(share) and codebook["perplexity"] == pytest.approx(2**entropy)
    assert codebook["bits_per_image"] == 16 * 16 * 4 and codebook["grid"] == [16, 16]

    def nats(labels):
        probabilities = tf.nn.softmax(learned.pixelcnn({"codes": codes, "labels": labels})).numpy()
        return -np.log(np.take_along_axis(probabilities, codes[..., None], axis=-1)).mean(dtype=np.float64)

    told = nats(learned.labels)
    assert prior["nats_per_code"] == pytest.approx(told, rel=1e-5)
    assert prior["bits_per_image"] == pytest.approx(256 * told / np.log(2), rel=1e-4)
    assert prior["histogram_bits_per_image"] == pytest.approx(256 * entropy, rel=1e-4)
    assert nats(np.full(32, -1, np.int32)) != pytest.approx(told, rel=1e-3)  # control


def test_report_of_the_samples(learned):
    """Samples are of the levels of the test slices; the floor lies among draws of a training subject for each level."""
    report, samples, images = learned.report["samples"], learned.samples, learned.samples["images"][..., None]
    assert images.dtype == np.float32 and samples["codes"].dtype == samples["labels"].dtype == np.int32
    np.testing.assert_array_equal(samples["labels"], np.arange(32))
    np.testing.assert_array_equal(samples["codes"], learned.pixelcnn.sample(32, seed=0, labels=learned.labels))
    np.testing.assert_allclose(images, learned.vqvae.decode(samples["codes"]), atol=1e-6)
    axes = np.linalg.svd(flat(learned.train) - flat(learned.train).mean(axis=0), full_matrices=False)[2][:64].T
    seen = np.concatenate([learned.train, learned.train[:, ::-1]])  # mirrored slices are training slices
    found, similarity = nearest(images, seen).T
    variances = [(flat(x) @ axes[:, 2:12]).var(axis=0).mean() for x in (images, learned.train)]
    expected = {
        "frechet_pca": frechet(images, learned.test, axes),
        "sharpness_ratio": gradient(images) / gradient(learned.test),
        "nearest_train_ssim_mean": similarity.mean(),
        "nearest_train_ssim_max": similarity.max(),
        "test_nearest_train_ssim_mean": nearest(learned.test, seen)[:, 1].mean(),
        "level_error": np.abs(np.tile(learned.split.labels, 2)[found.astype(int)] - np.arange(32)).mean(),
        "component_variance_ratio": variances[0] / variances[1],
    }
    assert report == report | approx(expected)
    subjects = learned.train.reshape(3, 32, 64, 64)
    draws = np.random.default_rng(0).integers(3, size=(30, 32))
    floors = [frechet(subjects[draw, np.arange(32)], learned.test, axes) for draw in draws]
    assert min(floors) < report["frechet_pca_floor"] < max(floors)


def gradient(images):
    down, across = images[:, 1:, :-1] - images[:, :-1, :-1], images[:, :-1, 1:] - images[:, :-1, :-1]
    return np.sqrt(down**2 + across**2).mean()


def flat(images):
    return images.reshape(len(images), -1).astype("float64")


def frechet(images, others, axes):
    first, second = flat(images) @ axes, flat(others) @ axes
    cov1, cov2 = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(cov1 @ cov2 + 1e-9 * np.eye(64)).real
    return np.square(first.mean(axis=0) - second.mean(axis=0)).sum() + np.trace(cov1 + cov2 - 2 * root)


def nearest(images, seen):
    """The most similar of the 20 slices that are nearest by L2, for each image, and its SSIM: (N, 2)."""

    def best(image):
        order = np.argsort(((seen - image) ** 2).sum(axis=(1, 2, 3)))[:20]
        return max((structural_similarity(image[..., 0], seen[i, ..., 0], data_range=1), i) for i in order)[::-1]

    return np.array([best(image) for image in images])


# --------------------------------------------------------------------------------------
# What is learned, and whole heads
# --------------------------------------------------------------------------------------


def test_the_models_learn(learned):
    """Of three heads, what holds for another one."""
    assert learned.report["reconstruction"]["ssim_mean"] > 0.6
    prior = learned.report["prior"]
    assert prior["bits_per_image"] < 0.5 * prior["histogram_bits_per_image"]


def test_whole_heads_are_drawn_slice_by_slice(learned):
    pixelcnn, heads = learned.pixelcnn, np.load(learned.run / "heads.npz")
    codes = heads["codes"]
    assert codes.shape == (2, 32, 16, 16) and codes.dtype == np.int32
    assert heads["images"].shape == (2, 32, 64, 64) and heads["images"].dtype == np.float32
    np.testing.assert_allclose(heads["images"][1], learned.vqvae.decode(codes[1])[..., 0], atol=1e-6)
    report = learned.report["heads"]
    assert report["count"] == 2
    assert report["neighbour_change"] == pytest.approx(np.abs(np.diff(heads["images"], axis=1)).mean(), rel=1e-4)
    # A head does not depend on how many there are, and its slices are given the one below.
    np.testing.assert_array_equal(predict.draw_heads(pixelcnn, 1, 0, 1.0)[0], codes[0])
    assert (predict.draw_heads(pixelcnn, 1, 1, 1.0)[0, 0] != codes[0, 0]).any()
    labels = np.arange(1, 32, dtype=np.int32)

    def nats(below):
        return float(tf.reduce_mean(pixelcnn.nll(codes[0, 1:], labels=labels, below=below)))

    assert nats(codes[0, :-1]) < nats(codes[0, :-1][::-1])


# --------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------


@pytest.fixture
def other_data(tmp_path):
    """Noise instead of phantoms: slices 0 and 1 of each case."""
    return write_data(tmp_path / "other", train=[1, 2, 3], validate=[402], test=[441, 442, 443])


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_other_data_are_noted_and_measured(copied_run, other_data, capsys):
    """And nothing of an earlier call stays beside the new report."""
    for name in ("heads.png", "heads.npz"):
        (copied_run / name).write_text("of an earlier call")
    arguments = ["--run", str(copied_run), "--data", str(other_data), "--slice", "1", "0", "--num-samples", "5"]
    assert predict.main(arguments) == 0
    assert "other train, validate, test slices than those of the training" in capsys.readouterr().out
    assert files_in(copied_run) == sorted(TRAINED + MEASURED[:-1])
    report = read_report(copied_run)
    found = dataset.fingerprint(dataset.load(other_data))
    assert report["data"]["as_trained"] is False
    assert report["data"]["sha256"] == {name: split["sha256"] for name, split in found.items()}
    assert (report["data"]["test_images"], report["data"]["test_subjects"]) == (6, 3)
    for part, name in (("reconstruction", "ssim_mean"), ("prior", "nats_per_code")):
        low, high = report[part][f"{name}_interval"]
        assert low < report[part][name] < high
    # The levels that were asked for, in turn.
    samples = np.load(copied_run / "samples.npz")
    assert samples["labels"].tolist() == [1, 0, 1, 0, 1]
    pixelcnn = keras.saving.load_model(copied_run / "pixelcnn.keras")
    asked = np.array([1, 0, 1, 0, 1], np.int32)
    np.testing.assert_array_equal(samples["codes"], pixelcnn.sample(5, seed=0, labels=asked))


@pytest.mark.parametrize("mirror, axis, is_known", [(True, 1, True), (True, 2, False), (False, 1, False)], ids=str)
def test_a_mirrored_training_slice_is_no_novelty(mirror, axis, is_known, learned):
    """Where the model was shown mirrored slices; those flipped the other way it never saw."""
    images, labels = learned.train[::8, ::2, ::2, 0], learned.split.labels[::8]
    flipped = predict.Measured(np.flip(images, axis), labels, None)
    known = predict.Measured(images, labels, None)
    components = dataset.principal_components(images, 11)
    report, _, _ = predict.measure_samples(flipped, known, images, known, components, mirror, seed=0)
    assert report["test_nearest_train_ssim_mean"] == pytest.approx(1) and report["test_level_error"] == 0
    assert (report["nearest_train_ssim_mean"] == pytest.approx(1)) == is_known


def test_a_slice_that_is_not_known_is_refused_before_data_are_read(finished_run, refuse, tmp_path):  # noqa: F811
    arguments = ["--run", finished_run, "--data", tmp_path / "none", "--slice"]
    refuse(predict, [*arguments, 0, 99], "--slice must be from 0 to 31", "not 99")
    refuse(predict, [*arguments, 0, 31], "none", "no such folder")


def test_a_report_is_json_whatever_is_not_a_number(copied_run, tmp_path, learned):
    """Two training slices have no third principal component; equal images have an infinite PSNR."""
    data = write_data(tmp_path / "two", train=[1], validate=[402], test=[441])
    assert predict.main(["--run", str(copied_run), "--data", str(data), "--heads", "1"]) == 0
    assert read_report(copied_run)["samples"]["component_variance_ratio"] is None
    test = predict.Measured(learned.test[..., 0], learned.labels, None, np.repeat([1, 2], 16))
    report = predict.measure_reconstructions(test, test.images)
    assert math.isinf(report["psnr_mean"])
    dataset.write_json(copied_run / "report.json", report)
    assert read_report(copied_run)["psnr_mean"] is None


def test_data_without_slice_numbers_train_and_predict(tmp_path, refuse):  # noqa: F811
    for split in dataset.SPLITS:
        write_slices(tmp_path / f"keras_png_slices_{split}", [f"{split} {letter}.png" for letter in "abcd"])
    run, short = tmp_path / "run", ["--vqvae-epochs", "1", "--pixelcnn-epochs", "1", "--augmentations", "1"]
    with pytest.warns(UserWarning, match="subjects cannot be told apart"):
        assert train.main(["--data", str(tmp_path), "--run", str(run), *TINY, *short]) == 0
        assert predict.main(["--run", str(run), "--complete"]) == 0
        test = dataset.load(tmp_path)["test"]
    report, samples = read_report(run), np.load(run / "samples.npz")
    assert samples["labels"].tolist() == [-1] * 4 and samples["labels"].dtype == np.int32
    vqvae, pixelcnn = (keras.saving.load_model(run / f"{name}.keras") for name in ("vqvae", "pixelcnn"))
    assert pixelcnn.num_labels == 0
    np.testing.assert_array_equal(samples["codes"], pixelcnn.sample(4, seed=0))
    nats = pixelcnn.nll(vqvae.encode(dataset.to_float(test.images))).numpy().mean()
    assert report["prior"]["nats_per_code"] == pytest.approx(nats, rel=1e-4)
    assert report["samples"]["level_error"] is report["samples"]["test_level_error"] is None
    assert report["data"]["test_subjects"] is report["prior"]["nats_per_code_interval"] is None
    refuse(predict, ["--run", run, "--heads", 2], "--heads", "not told the slice below")


def test_an_interval_is_of_whole_subjects():
    """Slices of a subject come together or not at all; of one subject, or nobody knows of which, there is none."""

    def interval(values, cases):
        found = predict.with_interval("mean", np.array(values, float), np.array(cases))
        assert found["mean"] == np.mean(values)
        return found["mean_interval"]

    assert interval([0, 0, 0, 1], [7, 7, 7, 9]) == [0, 1]
    low, high = interval(np.arange(16) // 2, np.arange(16) // 2)
    assert 0.5 < low < 2.5 and 4.5 < high < 6.5  # 3.5 is the mean, and 0.81 the error, of 8 subjects
    assert interval([0, 0, 0, 1], [7, 7, 7, 7]) is interval([0, 0, 0, 1], [7, 7, -1, 9]) is None


def test_slices_are_drawn_of_the_levels_that_are_asked_for():
    pool, asked = np.repeat(np.arange(4), 5), np.array([2, 0, 2, 3, 2, 0])
    chosen = predict.draw_of_labels(pool, asked, seed=0)
    np.testing.assert_array_equal(pool[chosen], asked)
    assert len(set(chosen)) == 6 and (predict.draw_of_labels(pool, asked, seed=1) != chosen).any()
    # Where there is none of a level, or none is asked for, any will do, and no two are the same.
    for label in (-1, 9):
        assert sorted(predict.draw_of_labels(pool, np.full(20, label), seed=0)) == list(range(20))
    assert predict.level_error(np.array([3, 5, -1, 8]), np.array([4, 5, 7, -1])) == 0.5


def test_pictured_samples_are_the_first_of_evenly_spaced_levels_in_order():
    """Few samples as far as they go: what does not fill a row is left out, but never most of them."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(32), 4))
    shown = predict.pictured(labels)
    assert (labels[shown] == [[0, 4, 9, 13, 18, 22, 27, 31]] * 3).all()
    for column, level in zip(shown.T, labels[shown[0]]):
        assert column.tolist() == np.flatnonzero(labels == level)[:3].tolist()
    for count, levels in ((2, 1), (5, 3), (9, 32), (30, 3)):
        labels = np.arange(count) % levels
        shown = predict.pictured(labels)
        assert len(np.unique(shown)) == shown.size <= 24
        assert shown.size >= min(count, 24) / 2 and shown.max() < count
        assert (np.diff(labels[shown.ravel()]) >= 0).all()


# --------------------------------------------------------------------------------------
# What the prior is shown
# --------------------------------------------------------------------------------------


def test_what_the_prior_is_told_belongs_to_what_it_is_shown(learned, tmp_path, monkeypatch):
    """A quarter of it is unchanged; changes, scores and the slice below are those of the picture that is shown."""
    slices, settings = learned.split[:64], train.Settings(augmentations=12, pixelcnn_filters=8, pixelcnn_blocks=1)
    told = {}
    dataset.write_json(
        tmp_path / "config.json", {"settings": {"scores": 16}, "data": {}, "versions": {}, "finished": {}}
    )
    monkeypatch.setattr(train, "fit", lambda stage, make_model, counts, prepare, validation: told.update(locals()))
    train.fit_pixelcnn(tmp_path, settings, learned.vqvae, slices, slices[:8])
    assert tuple(told["counts"]) == (64, 16)

    def shown(example):
        """All variants of one slice, as arrays."""
        index = tf.stack([tf.fill((16,), example), tf.range(16)], axis=1)
        return {name: values.numpy() for name, values in told["prepare"](index).items()}

    lower, batch = shown(40), shown(41)
    unchanged = (batch["changes"] == 0).all(axis=1)
    assert unchanged.sum() == 4 and (batch["changes"][~unchanged, -1] == 1).all()
    assert (batch["labels"] == 9).all() and (shown(32)["below"] == -1).all()
    np.testing.assert_array_equal(batch["below"], lower["codes"])
    np.testing.assert_array_equal(batch["changes"], lower["changes"])  # of the whole head

    images = dataset.to_float(slices.images)
    components = dataset.standardised_components(images, 16)

    def matches(variant, changes):
        """Whether codes and scores are those of the slice, or of its mirror image, changed like this."""
        for image in (slices.images[41], slices.images[41, ::-1]):
            picture = dataset.to_float(dataset.change(image, changes[:-1]) if changes.any() else image)[None]
            scores = dataset.project(picture, components)[0]
            agreeing = (learned.vqvae.encode(picture)[0].numpy() == batch["codes"][variant]).mean()
            if agreeing > 0.98 and np.abs(scores - batch["scores"][variant]).max() < 0.02:
                return True
        return False

    assert all(matches(variant, batch["changes"][variant]) for variant in range(16))
    assert not any(matches(variant, shown(3)["changes"][variant]) for variant in np.flatnonzero(~unchanged))


# --------------------------------------------------------------------------------------
# A run that was stopped
# --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is tidied up."""


def die(*arguments):
    raise Killed


def kill_before_rename(monkeypatch, number, name="", replace=os.replace):
    """Let train.py be killed when it is about to give a file (of that name) its final name, for that many-th time."""
    renamed = []

    def rename_or_die(source, target):
        renamed.append(os.path.basename(target))
        if renamed[-1] == (name or renamed[-1]) and (renamed.count(name) if name else len(renamed)) == number:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(dataset.os, "replace", rename_or_die)


@needs_full_device
def test_stopped_run_ends_as_the_uninterrupted_one(finished_run, phantoms, tmp_path, monkeypatch, capsys):
    """The disk is full once; then killed before files of several kinds have their names."""
    run, open_run = tmp_path / "run", train.open_run

    def open_and_fill(*arguments):
        open_run(*arguments)
        (run / "partial_vqvae_last.npz").symlink_to("/dev/full")

    monkeypatch.setattr(train, "SAVE_EVERY", -1)  # after every epoch
    with monkeypatch.context() as patched:
        patched.setattr(train, "open_run", open_and_fill)
        assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 2
    assert f"{run / 'vqvae_last.npz'} cannot be written (No space left on device)" in capsys.readouterr().err
    for name, number in (("vqvae.keras", 1), ("pixelcnn_last.npz", 2), ("pixelcnn_history.csv", 2)):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_before_rename(patched, number, name)
            train.main(["--data", str(phantoms), "--run", str(run), *TINY])
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 0
    assert files_in(run) == sorted(TRAINED)
    for name in ("vqvae", "pixelcnn"):
        history, expected = (read_history(folder / f"{name}_history.csv") for folder in (run, finished_run))
        assert history == [pytest.approx(row, rel=1e-6) for row in expected]
        model, expected = (keras.saving.load_model(folder / f"{name}.keras") for folder in (run, finished_run))
        for weight, expected_weight in zip(model.weights, expected.weights):
            np.testing.assert_allclose(weight, expected_weight, rtol=1e-4, atol=1e-6)


def test_a_run_that_is_told_to_stop_saves_its_last_epoch(phantoms, tmp_path):
    """Long before a minute has passed. As a user or a queue does it: SIGTERM, after some epochs."""
    command = [sys.executable, "-u", ROOT / "train.py", "--data", phantoms, "--run", tmp_path / "run", *TINY]
    command += ["--vqvae-epochs", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("vqvae: epoch 2 of"):
                process.send_signal(signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 130 and "give the same command again" in error and "Traceback" not in error
    with np.load(tmp_path / "run" / "vqvae_last.npz") as last:
        rows = json.loads(str(last["rows"]))
    assert len(rows) >= 2 and len(read_history(tmp_path / "run" / "vqvae_history.csv")) == len(rows)


@keras.saving.register_keras_serializable(package="tests")
class Point(keras.Model):
    """Learns the place of numbers, with two dropout masks that it shows: a model that is fitted in no time."""

    masks = []  # noqa: RUF012

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drops = [keras.layers.Dropout(0.5), keras.layers.Dropout(0.5)]
        self.place = self.add_weight(name="place", shape=(), initializer="zeros")
        self.supports_jit = False  # for XLA calls no Python
        self.built = True

    def call(self, numbers, training=False):
        if training:
            masks = [drop(tf.ones((64,)), training=True) > 0 for drop in self.drops]
            tf.numpy_function(lambda *both: Point.masks.append([mask.tobytes() for mask in both]), masks, [])
        return self.distances(numbers)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return tf.reduce_mean(y_pred)

    def distances(self, numbers):
        return tf.square(numbers - self.place)


@keras.saving.register_keras_serializable(package="tests")
class Runaway(Point):
    """Goes on and on, a step of 1 at a learning rate of 1, and its loss grows until it is beyond float32."""

    def distances(self, numbers):
        return tf.fill(tf.shape(numbers), tf.exp(5 * tf.stop_gradient(self.place)) - self.place)


PLACES = np.random.default_rng(0).normal(5, 3, 11).astype("float32")  # 6 to learn from, 3 steps an epoch; 5 to validate


def fit_point(run, seed=0, kind=Point, epochs=2):
    """`train.fit` of two epochs or so, the masks of its steps noted from none on: the stage."""
    run.mkdir(exist_ok=True)
    settings = train.Settings(
        vqvae_epochs=epochs, vqvae_batch_size=2, vqvae_learning_rate=1.0, cosine_decay=False, seed=seed
    )
    if not (run / "config.json").exists():
        train.open_run(run, settings, "", {}, False)
    stage = train.Stage(run, "vqvae", settings)
    Point.masks.clear()
    train.fit(stage, kind, (6, 1), lambda index: tf.gather(PLACES[:6], index[:, 0]), PLACES[6:])
    return stage


def place_of(stage):
    return float(keras.saving.load_model(stage.best).place)


def has_the_best_row(stage):
    """Whether the kept model is that of the best row of the history."""
    loss = min(row["val_loss"] for row in read_history(stage.history))
    return bool(np.square(PLACES[6:] - place_of(stage)).mean() == pytest.approx(loss, rel=1e-5))


FILES_OF_A_STAGE = 9  # config.json, last and history of two epochs; the best, history, plot, and config.json again


def test_the_best_model_is_that_of_a_row_wherever_a_run_was_killed(tmp_path, monkeypatch):
    """On another machine an epoch that is done again rounds otherwise: here it has other batches."""
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    whole = fit_point(tmp_path / "whole")
    losses = [row["val_loss"] for row in read_history(whole.history)]
    assert has_the_best_row(whole) and losses[1] < losses[0] - 0.1
    for number in range(2, FILES_OF_A_STAGE + 1):
        run = tmp_path / str(number)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_before_rename(patched, number)
            fit_point(run)
        stage = fit_point(run, seed=1)
        assert has_the_best_row(stage) and len(read_history(stage.history)) == 2, number
        assert files_in(run) == ["config.json", "vqvae.keras", "vqvae_history.csv", "vqvae_loss.png"]


def test_the_best_epoch_is_kept_though_a_later_one_is_killed(tmp_path, monkeypatch):
    """Epochs end at 3, 6 and 9, of which 3 is the best; of the quantizer's terms nothing depends."""
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_before_rename(patched, 3, "vqvae_last.npz")
        fit_point(tmp_path, kind=Runaway, epochs=3)
    assert place_of(fit_point(tmp_path, kind=Runaway, epochs=3)) == pytest.approx(3, rel=1e-4)
    rows = [{"val_loss": 0.2, "val_quantizer_loss": 0.0}, {"val_loss": 0.6, "val_quantizer_loss": 0.5}]
    assert min(rows, key=train.selection_loss) is rows[1]


@pytest.mark.parametrize("save_every, savings", [(-1, 4), (60, 1)])
def test_a_training_is_saved_once_a_minute_and_when_it_ends(save_every, savings, tmp_path, monkeypatch):
    saved, write = [], dataset.write_whole
    monkeypatch.setattr(train, "SAVE_EVERY", save_every)
    monkeypatch.setattr(dataset, "write_whole", lambda path, how: (saved.append(path.name), write(path, how)))
    fit_point(tmp_path, epochs=4)
    assert saved.count("vqvae_last.npz") == savings


def test_no_two_steps_share_a_dropout_mask_and_resuming_repeats_none(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    fit_point(tmp_path / "whole")
    masks = list(Point.masks)
    assert len(masks) == 6 and len({mask for step in masks for mask in step}) == 12
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_before_rename(patched, 2, "vqvae_last.npz")
        fit_point(tmp_path / "killed")
    fit_point(tmp_path / "killed")
    assert Point.masks == masks[3:]  # the second epoch, again
    fit_point(tmp_path / "other", seed=1)
    assert not {mask for step in masks for mask in step} & {mask for step in Point.masks for mask in step}


def test_a_loss_that_is_not_a_number_stops_the_stage(tmp_path):
    """exp(5 * 17) is a float32, exp(5 * 18) is not: it happens in the sixth epoch."""
    with pytest.raises(dataset.UserError, match=r"not a number in epoch 6;.*Lower --vqvae-learning-rate"):
        fit_point(tmp_path, kind=Runaway, epochs=8)
    assert len(read_history(tmp_path / "vqvae_history.csv")) == 5
    with np.load(tmp_path / "vqvae_last.npz") as last:
        assert (last["last0"], last["best0"]) == pytest.approx((15, 3), rel=1e-4)


def make_optimizer(steps, **settings):
    """The optimizer of ten epochs of a PixelCNN, by default of Adam at a learning rate of 0.5."""
    numbers = {"epochs": 10, "learning_rate": 0.5, "warmup_epochs": 0, "muon": False, "clip_norm": 0.0, **settings}
    decay = numbers.pop("cosine_decay", False)
    settings = train.Settings(cosine_decay=decay, **{f"pixelcnn_{name}": value for name, value in numbers.items()})
    return train.make_optimizer(train.Stage(pathlib.Path(), "pixelcnn", settings), steps)


def test_after_one_huge_gradient_the_next_ones_count():
    def place_after(clip_norm):
        """Where ten gradients of -1 lead after one of a million."""
        optimizer, place = make_optimizer(11, clip_norm=clip_norm), keras.Variable([0.0])
        for gradient in [1e6] + [-1.0] * 10:
            optimizer.apply([tf.constant([gradient])], [place])
        return float(place[0])

    assert place_after(1.0) > 0 > place_after(0.0)


@pytest.mark.parametrize("warmup, rises_until", [(0, 0), (2, 20), (50, 50)])
@pytest.mark.parametrize("cosine_decay", [True, False])
def test_a_learning_rate_rises_and_falls_to_nothing_or_stays(warmup, rises_until, cosine_decay):
    """A warm-up takes half of the training at most."""
    optimizer, rates = make_optimizer(10, warmup_epochs=warmup, cosine_decay=cosine_decay), []
    for step in range(101):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    np.testing.assert_allclose(rates[:rises_until], 0.5 * np.arange(rises_until) / max(rises_until, 1), atol=1e-6)
    assert rates[rises_until] == pytest.approx(0.5)
    falling = np.diff(rates[rises_until:])
    assert (falling < 0).all() if cosine_decay else np.abs(falling).max() < 1e-6
    assert rates[100] == pytest.approx(0.0 if cosine_decay else 0.5, abs=1e-6)


def test_file_under_its_final_name_is_the_old_one_until_the_new_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    dataset.write_json(path, {"old": 1})
    monkeypatch.setattr(dataset.os, "replace", die)
    with pytest.raises(Killed):
        dataset.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
