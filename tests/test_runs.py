"""Whole runs: their files, the numbers of the report, and what is left of a run that was stopped."""

import csv
import hashlib
import json
import os
import re
import shutil
import types
import zipfile

import keras
import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
from conftest import TINY
from skimage.metrics import structural_similarity
from test_dataset import write_data, write_slices
from test_errors import edit_model

import dataset
import modules
import predict
import train

needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
FILES = [
    *("config.json", "report.json", "samples.npz", "samples.png", "reconstructions.png", "completions.png"),
    *("vqvae.keras", "vqvae_history.csv", "vqvae_loss.png"),
    *("pixelcnn.keras", "pixelcnn_history.csv", "pixelcnn_loss.png"),
]


MEASURED = ["report.json", "samples.npz", "samples.png", "reconstructions.png", "completions.png"]


def read_history(path):
    """Rows without the seconds, which no two runs share."""
    with open(path, newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]


# --------------------------------------------------------------------------------------
# A finished run
# --------------------------------------------------------------------------------------


def test_run_holds_every_file_and_nothing_else(finished_run):
    assert sorted(path.name for path in finished_run.iterdir()) == sorted(FILES)


def test_a_run_without_trouble_writes_nothing_to_stderr(finished_processes):
    assert [process.stderr for process in finished_processes[1:]] == ["", ""]


def test_settings_are_written_and_counted(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    assert config["settings"]["filters"] == [4, 8]
    assert config["settings"]["seed"] == 0
    assert [config["data"][split]["images"] for split in dataset.SPLITS] == [96, 32, 32]
    assert config["versions"]["keras"] == keras.__version__
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
        loss = pixelcnn.nll(vqvae.encode(images), validate.labels).numpy().mean()
    assert loss == pytest.approx(min(row["val_loss"] - row.get("val_quantizer_loss", 0) for row in rows), rel=1e-4)


@pytest.mark.parametrize("quantizer_loss, kept", [({"val_quantizer_loss": 0.5}, 2), ({}, 1)])
def test_the_quantizers_terms_do_not_choose_the_epoch(tmp_path, quantizer_loss, kept):
    stage = train.Stage(tmp_path, "vqvae", train.Schedule(2, 1, 1.0))
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile()
    checkpoint = train.Checkpoint(stage, [])
    checkpoint.set_model(model)
    for epoch, logs in enumerate([{"val_loss": 0.2, "val_quantizer_loss": 0.0}, {"val_loss": 0.6, **quantizer_loss}]):
        checkpoint.on_epoch_begin(epoch)
        model.layers[0].bias.assign([epoch + 1])
        checkpoint.on_epoch_end(epoch, {"loss": 0.0, **logs})
    assert keras.saving.load_model(stage.best).layers[0].bias.numpy() == [kept]


@pytest.fixture(scope="module")
def measured(finished_run, phantoms):
    """What a report is made of, again, from samples.npz and the saved models."""
    found = types.SimpleNamespace(report=json.loads((finished_run / "report.json").read_text()))
    found.vqvae = keras.saving.load_model(finished_run / "vqvae.keras")
    found.pixelcnn = keras.saving.load_model(finished_run / "pixelcnn.keras")
    found.samples = dict(np.load(finished_run / "samples.npz"))
    splits = dataset.load(phantoms)
    found.train, found.test = (splits[name].images.astype("float32") / 255 for name in ("train", "test"))
    found.train_labels, found.labels = splits["train"].labels, splits["test"].labels
    found.codes = found.vqvae.encode(found.test[..., None]).numpy()
    found.reconstructed = found.vqvae.decode(found.codes).numpy()[..., 0]
    return found


def test_report_of_the_reconstructions(measured):
    pairs = list(zip(measured.test, measured.reconstructed))
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity = [structural_similarity(a, b, data_range=1) for a, b in pairs]
    psnr = tf.image.psnr(measured.test[..., None], measured.reconstructed[..., None], 1.0)
    expected = {
        "ssim_mean": np.mean(similarity),
        "ssim_std": np.std(similarity),
        "ssim_min": np.min(similarity),
        "ssim_gaussian_mean": np.mean([structural_similarity(a, b, data_range=1, **wang) for a, b in pairs]),
        "psnr_mean": tf.reduce_mean(psnr),
        "sharpness_ratio": gradient(measured.reconstructed) / gradient(measured.test),
    }
    of_one_subject = {f"{name}_interval": None for name in ("ssim_mean", "ssim_gaussian_mean", "psnr_mean")}
    assert measured.report["reconstruction"] == {"split": "test", "images": 32} | of_one_subject | approx(expected)


def test_report_of_the_codes_and_their_prior(measured):
    codebook, prior, codes = measured.report["codebook"], measured.report["prior"], measured.codes
    share = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(share * np.log2(share)).sum()
    assert codebook["used"] == len(share)
    assert codebook["perplexity"] == pytest.approx(2**entropy)
    assert codebook["bits_per_image"] == 16 * 16 * 4
    assert codebook["grid"] == [16, 16]

    def nats(labels):
        probabilities = tf.nn.softmax(measured.pixelcnn((codes, labels))).numpy()
        return -np.log(np.take_along_axis(probabilities, codes[..., None], axis=-1)).mean(dtype=np.float64)

    told = nats(measured.labels)
    assert prior["nats_per_code"] == pytest.approx(told, rel=1e-5)
    assert prior["bits_per_code"] == pytest.approx(told / np.log(2), rel=1e-4)
    assert prior["bits_per_image"] == pytest.approx(256 * told / np.log(2), rel=1e-4)
    assert prior["histogram_bits_per_image"] == pytest.approx(256 * entropy, rel=1e-4)
    # Control: what labels are worth to a prior that was fitted in three epochs.
    others = np.full(32, -1), measured.labels[::-1], np.roll(measured.labels, 8)
    assert max(abs(nats(labels) - told) for labels in others) > 5e-5 * told


def test_samples_are_those_of_the_levels_of_the_test_slices(measured):
    samples = measured.samples
    assert samples["images"].shape == (32, 64, 64) and samples["images"].dtype == np.float32
    assert samples["codes"].dtype == samples["labels"].dtype == np.int32
    assert 0 <= samples["images"].min() <= samples["images"].max() <= 1
    np.testing.assert_array_equal(samples["labels"], np.arange(32))
    np.testing.assert_array_equal(samples["codes"], measured.pixelcnn.sample(32, seed=0, labels=measured.labels))
    np.testing.assert_allclose(samples["images"], measured.vqvae.decode(samples["codes"])[..., 0], atol=1e-6)


def test_report_of_the_samples(measured):
    report, images = measured.report["samples"], measured.samples["images"]
    seen = np.concatenate([measured.train, measured.train[:, ::-1]])  # mirrored slices are training slices
    levels = np.tile(measured.train_labels, 2)
    of_samples, of_reconstructions, of_test = (
        nearest(x, seen) for x in (images, measured.reconstructed, measured.test)
    )
    axes = principal_axes(measured.train)
    of_components = [(flat(x) @ axes[:, 2:12]).var(axis=0).mean() for x in (images, measured.train)]
    expected = {
        "frechet_pca": frechet(images, measured.test, axes),
        "sharpness_ratio": gradient(images) / gradient(measured.test),
        "nearest_train_ssim_mean": of_samples[1].mean(),
        "nearest_train_ssim_max": of_samples[1].max(),
        "reconstruction_nearest_train_ssim_mean": of_reconstructions[1].mean(),
        "test_nearest_train_ssim_mean": of_test[1].mean(),
        "test_nearest_train_ssim_max": of_test[1].max(),
        "level_error": np.abs(levels[of_samples[0]] - np.arange(32)).mean(),
        "reconstruction_level_error": np.abs(levels[of_reconstructions[0]] - np.arange(32)).mean(),
        "test_level_error": np.abs(levels[of_test[0]] - np.arange(32)).mean(),
        "component_variance_ratio": of_components[0] / of_components[1],
    }
    assert {name: report[name] for name in expected} == approx(expected)
    assert frechet(images, measured.train, axes) != pytest.approx(report["frechet_pca"], rel=1e-2)


def test_the_floor_is_that_of_as_many_training_slices_of_the_same_levels(measured):
    """It lies among draws of one subject for each level; as many slices of half of the levels are far from that."""
    axes, subjects = principal_axes(measured.train), measured.train.reshape(3, 32, 64, 64)
    draws = np.random.default_rng(0).integers(3, size=(30, 32))
    floors = [frechet(subjects[draw, np.arange(32)], measured.test, axes) for draw in draws]
    assert min(floors) < measured.report["samples"]["frechet_pca_floor"] < max(floors)
    assert frechet(subjects[:2, :16].reshape(32, 64, 64), measured.test, axes) > 1.2 * max(floors)


def test_report_says_which_data_it_measured(measured, finished_run, phantoms):
    config = json.loads((finished_run / "config.json").read_text())
    data = measured.report["data"]
    assert data["as_trained"] is True and data["phantom"] is False and data["test_subjects"] == 1
    assert data["folder"] == str(phantoms.resolve())
    assert data["sha256"] == {name: config["data"][name]["sha256"] for name in dataset.SPLITS}
    assert [data[f"{name}_images"] for name in dataset.SPLITS] == [96, 32, 32]


def approx(expected):
    return {name: pytest.approx(float(value), rel=1e-3) for name, value in expected.items()}


def gradient(images):
    down = images[:, 1:, :-1] - images[:, :-1, :-1]
    across = images[:, :-1, 1:] - images[:, :-1, :-1]
    return np.sqrt(down**2 + across**2).mean()


def flat(images):
    return images.reshape(len(images), -1).astype("float64")


def principal_axes(images):
    return np.linalg.svd(flat(images) - flat(images).mean(axis=0), full_matrices=False)[2][:64].T


def frechet(images, others, axes):
    first, second = flat(images) @ axes, flat(others) @ axes
    cov1, cov2 = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(cov1 @ cov2 + 1e-9 * np.eye(64)).real
    return np.square(first.mean(axis=0) - second.mean(axis=0)).sum() + np.trace(cov1 + cov2 - 2 * root)


def nearest(images, train_images):
    """The most similar of the 20 training slices that are nearest by L2, for each image, and its SSIM."""
    best = []
    for image in images:
        order = np.argsort(((train_images - image) ** 2).sum(axis=(1, 2)))[:20]
        similarity = [structural_similarity(image, train_images[i], data_range=1) for i in order]
        best.append((order[np.argmax(similarity)], max(similarity)))
    indices, similarities = zip(*best)
    return np.array(indices), np.array(similarities)


@pytest.mark.parametrize("lost", [[], ["vqvae_loss.png", "pixelcnn_loss.png", "report.json"]], ids=str)
def test_train_leaves_a_finished_run_alone(lost, finished_run, phantoms, tmp_path, capsys):
    """A picture says nothing about what is finished."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    for name in lost:
        (run / name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


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
    arguments = ["--run", str(copied_run), "--data", str(other_data), "--slice", "1", "0", "--num-samples", "5"]
    assert predict.main(arguments) == 0
    assert "other train, validate, test slices than those of the training" in capsys.readouterr().out
    report = json.loads((copied_run / "report.json").read_text())
    measured = dataset.fingerprint(dataset.load(other_data))
    assert report["data"]["as_trained"] is False
    assert report["data"]["sha256"] == {name: split["sha256"] for name, split in measured.items()}
    assert (report["data"]["test_images"], report["data"]["test_subjects"]) == (6, 3)
    for part, name in (("reconstruction", "ssim_mean"), ("prior", "nats_per_code")):
        low, high = report[part][f"{name}_interval"]
        assert low < report[part][name] < high
    # The levels that were asked for, in turn.
    samples = np.load(copied_run / "samples.npz")
    assert samples["labels"].tolist() == [1, 0, 1, 0, 1]
    pixelcnn = keras.saving.load_model(copied_run / "pixelcnn.keras")
    np.testing.assert_array_equal(samples["codes"], pixelcnn.sample(5, seed=0, labels=[1, 0, 1, 0, 1]))


@pytest.mark.parametrize(
    "was_mirrored, axis, is_known", [(True, 1, True), (True, 2, False), (False, 1, False)], ids=str
)
def test_a_mirrored_training_slice_is_no_novelty(was_mirrored, axis, is_known, copied_run, other_data, monkeypatch):
    """Where the model was shown mirrored slices; those flipped the other way it never saw."""
    config = json.loads((copied_run / "config.json").read_text())
    config["settings"]["mirror"] = was_mirrored
    (copied_run / "config.json").write_text(json.dumps(config))
    flipped = np.flip(dataset.load(other_data)["train"].images / np.float32(255), axis)
    monkeypatch.setattr(dataset, "images_of", lambda vqvae, codes: flipped[: len(codes)])
    for name in ("draw_reconstructions", "draw_samples"):
        monkeypatch.setattr(predict, name, lambda *arguments: None)
    assert predict.main(["--run", str(copied_run), "--data", str(other_data)]) == 0
    report = json.loads((copied_run / "report.json").read_text())["samples"]
    for name in ("nearest_train_ssim_mean", "reconstruction_nearest_train_ssim_mean"):
        assert report[name] == pytest.approx(1) if is_known else report[name] < 0.9
    assert report["level_error"] == 0 if is_known else report["level_error"] > 0


def test_data_without_slice_numbers_train_and_predict(tmp_path):
    for split in dataset.SPLITS:
        write_slices(tmp_path / f"keras_png_slices_{split}", [f"{split} {letter}.png" for letter in "abcd"])
    run, short = tmp_path / "run", ["--vqvae-epochs", "1", "--pixelcnn-epochs", "1", "--augmentations", "1"]
    with pytest.warns(UserWarning, match="subjects cannot be told apart"):
        assert train.main(["--data", str(tmp_path), "--run", str(run), *TINY, *short]) == 0
    with pytest.warns(UserWarning, match="subjects cannot be told apart"):
        assert predict.main(["--run", str(run), "--complete"]) == 0
    report, samples = json.loads((run / "report.json").read_text()), np.load(run / "samples.npz")
    assert samples["labels"].tolist() == [-1] * 4 and samples["labels"].dtype == np.int32
    vqvae, pixelcnn = (keras.saving.load_model(run / f"{name}.keras") for name in ("vqvae", "pixelcnn"))
    assert pixelcnn.num_labels == 0
    np.testing.assert_array_equal(samples["codes"], pixelcnn.sample(4, seed=0))
    with pytest.warns(UserWarning, match="subjects cannot be told apart"):
        test = dataset.to_float(dataset.load(tmp_path)["test"].images)
    assert report["prior"]["nats_per_code"] == pytest.approx(pixelcnn.nll(vqvae.encode(test)).numpy().mean(), rel=1e-4)
    for name in ("level_error", "reconstruction_level_error", "test_level_error"):
        assert report["samples"][name] is None
    assert report["data"]["test_subjects"] is report["prior"]["nats_per_code_interval"] is None


def test_an_interval_is_of_whole_subjects():
    """Slices of a subject come together or not at all; of one subject, or nobody knows of which, there is none."""
    values = np.array([0.0, 0.0, 0.0, 1.0])

    def mean(chosen):
        return values[chosen].mean()

    assert predict.interval(["a", "a", "a", "b"], mean) == [0, 1]
    low, high = predict.interval(list("aabbccddeeffgghh"), lambda chosen: (chosen // 2).mean())
    assert 0.5 < low < 2.5 and 4.5 < high < 6.5  # 3.5 is the mean, and 0.81 the error, of 8 subjects
    assert predict.interval(["a", "b"], lambda chosen: len(chosen)) == [2, 2]
    assert predict.interval(["a"] * 4, mean) is predict.interval(None, mean) is None


def test_a_level_error_is_that_of_known_levels():
    assert predict.level_error(np.array([3, 5, -1, 8]), np.array([4, 5, 7, -1])) == 0.5
    assert predict.level_error(np.array([-1, -1]), np.array([4, -1])) is None


def test_slices_are_drawn_of_the_levels_that_are_asked_for():
    pool, asked = np.repeat(np.arange(4), 5), np.array([2, 0, 2, 3, 2, 0])
    chosen = predict.draw_of_labels(pool, asked, seed=0)
    np.testing.assert_array_equal(pool[chosen], asked)
    assert len(set(chosen)) == 6
    np.testing.assert_array_equal(predict.draw_of_labels(pool, asked, seed=0), chosen)
    assert (predict.draw_of_labels(pool, asked, seed=1) != chosen).any()
    # Where there is none of a level, or none is asked for, any will do, and no two are the same.
    for label in (-1, 9):
        anything = predict.draw_of_labels(pool, np.full(20, label), seed=0)
        assert sorted(anything) == list(range(20))
    assert sorted(predict.draw_of_labels(pool, np.full(10, 1), seed=0)) == sorted([*range(5, 10)] * 2)


def test_pictured_samples_are_the_first_of_evenly_spaced_levels_in_order():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(32), 4))
    shown = predict.pictured(labels)
    assert shown.shape == predict.PICTURED
    assert (labels[shown] == labels[shown[0]]).all()
    assert labels[shown[0]].tolist() == [0, 4, 9, 13, 18, 22, 27, 31]
    for column, level in zip(shown.T, labels[shown[0]]):
        assert column.tolist() == np.flatnonzero(labels == level)[:3].tolist()


@pytest.mark.parametrize("count", [2, 5, 8, 9, 24, 30])
@pytest.mark.parametrize("levels", [1, 3, 32])
def test_few_samples_are_pictured_as_far_as_they_go(count, levels):
    """The first ones; what does not fill a row is left out, but never most of them."""
    labels = np.arange(count) % levels - (levels == 1)
    shown = predict.pictured(labels)
    assert len(np.unique(shown)) == shown.size <= 24
    assert shown.size >= min(count, 24) / 2 and shown.max() < count
    assert (np.diff(labels[shown.ravel()]) >= 0).all()


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


def assert_ends_as(run, finished_run, tolerance):
    """Both stages have the history and the weights of the finished run."""
    for name in ("vqvae", "pixelcnn"):
        history, expected = (read_history(folder / f"{name}_history.csv") for folder in (run, finished_run))
        assert [row["epoch"] for row in history] == [1, 2, 3]
        for row, expected_row in zip(history, expected):
            assert row == pytest.approx(expected_row, rel=tolerance)
        model, expected = (keras.saving.load_model(folder / f"{name}.keras") for folder in (run, finished_run))
        for weight, expected_weight in zip(model.trainable_weights, expected.trainable_weights):
            np.testing.assert_allclose(weight, expected_weight, rtol=100 * tolerance, atol=tolerance)


@needs_full_device
def test_stopped_run_ends_as_the_uninterrupted_one(finished_run, phantoms, tmp_path, monkeypatch, capsys):
    """The disk is full once; then killed before a file of every kind has its name."""
    run, open_run = tmp_path / "run", train.open_run

    def open_and_fill(*arguments):
        open_run(*arguments)
        (run / "partial_vqvae_last.keras").symlink_to("/dev/full")

    monkeypatch.setattr(train, "open_run", open_and_fill)
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 2
    monkeypatch.undo()
    assert f"{run / 'vqvae_last.keras'} cannot be written (No space left on device)" in capsys.readouterr().err
    for name, number in (("vqvae.keras", 1), ("vqvae_last.keras", 2), ("pixelcnn_history.csv", 2)):
        kill_before_rename(monkeypatch, number, name)
        with pytest.raises(Killed):
            train.main(["--data", str(phantoms), "--run", str(run), *TINY])
        for path in [*run.glob("vqvae*.keras"), *run.glob("pixelcnn*.keras")]:
            keras.saving.load_model(path)  # whatever has its final name opens
    monkeypatch.undo()
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 0
    assert_ends_as(run, finished_run, tolerance=1e-6)
    assert sorted(path.name for path in run.iterdir()) == [name for name in sorted(FILES) if name not in MEASURED]


def test_xla_is_the_choice_of_the_present_machine(finished_run, phantoms, tmp_path, monkeypatch):
    """Each stage is begun with it, killed in its second epoch, and resumed without."""
    choices, compiled, begin = iter([True, False, True, False]), [], train.Checkpoint.on_train_begin

    def spy(checkpoint, logs=None):
        compiled.append((checkpoint.stage.name, checkpoint.model.jit_compile))
        begin(checkpoint, logs)

    monkeypatch.setattr(train.Checkpoint, "on_train_begin", spy)
    monkeypatch.setattr(modules, "use_xla", lambda: next(choices))
    for name in ("vqvae", "pixelcnn"):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_before_rename(patched, 2, f"{name}_last.keras")
            train.main(["--data", str(phantoms), "--run", str(tmp_path), *TINY])
        # The best model is for every machine, and has no optimizer.
        best, last = tmp_path / f"{name}.keras", tmp_path / f"{name}_last.keras"
        assert best.stat().st_size < 0.7 * last.stat().st_size
        assert not json.loads(zipfile.ZipFile(best).read("config.json"))["compile_config"]
        edit_model(last, lambda config: config["compile_config"].update(jit_compile=True))  # as a GPU machine saves it
    assert train.main(["--data", str(phantoms), "--run", str(tmp_path), *TINY]) == 0
    assert compiled == [("vqvae", True), ("vqvae", False), ("pixelcnn", True), ("pixelcnn", False)]
    assert_ends_as(tmp_path, finished_run, tolerance=2e-3)


def test_control_another_seed_starts_elsewhere(finished_run, phantoms, tmp_path, monkeypatch):
    kill_before_rename(monkeypatch, 1, "vqvae_last.keras")  # the history of the first epoch is there
    with pytest.raises(Killed):
        train.main(["--data", str(phantoms), "--run", str(tmp_path), "--seed", "1", *TINY])
    first, expected = (read_history(folder / "vqvae_history.csv")[0] for folder in (tmp_path, finished_run))
    assert first["loss"] != pytest.approx(expected["loss"], rel=1e-3)


@keras.saving.register_keras_serializable(package="tests")
class Point(modules.MeanOverSlices):
    """Learns the place of numbers, with two dropout masks that it shows: a model that is fitted in no time."""

    masks = []  # noqa: RUF012

    def __init__(self, **kwargs):
        super().__init__(["loss"], **kwargs)
        self.drops = [modules.Dropout(0.5), modules.Dropout(0.5)]
        self.place = self.add_weight(name="place", shape=(), initializer="zeros")
        self.built = True

    def terms(self, numbers, training):
        if training:
            masks = [drop(tf.ones((64,)), training=True) > 0 for drop in self.drops]
            tf.numpy_function(lambda *both: Point.masks.append([mask.tobytes() for mask in both]), masks, [])
        return {"loss": self.distances(numbers)}

    def distances(self, numbers):
        return tf.square(numbers - self.place)


@keras.saving.register_keras_serializable(package="tests")
class Runaway(Point):
    """Goes on and on, a step of 1 at a learning rate of 1, and its loss is soon beyond float32."""

    def distances(self, numbers):
        return tf.fill(tf.shape(numbers), tf.exp(20 * tf.stop_gradient(self.place)) - self.place)


@keras.saving.register_keras_serializable(package="tests")
class Worsening(Point):
    """Goes on and on too, and its loss is its place: the first epoch is the best."""

    def distances(self, numbers):
        return tf.fill(tf.shape(numbers), 2 * tf.stop_gradient(self.place) - self.place)


PLACES = np.random.default_rng(0).normal(5, 3, 11).astype("float32")  # 6 to learn from, 3 steps an epoch; 5 to validate


def fit_point(run, seed=0, kind=Point, epochs=2):
    """`train.fit` of two epochs or so, the masks of its steps noted from none on: the stage."""
    run.mkdir(exist_ok=True)
    if not (run / "config.json").exists():
        data = {"folder": "", "phantom": False}
        dataset.write_json(
            run / "config.json", {"settings": {"mirror": 0}, "data": data, "versions": {}, "finished": {}}
        )
    stage = train.Stage(run, "vqvae", train.Schedule(epochs, 2, 1.0, cosine_decay=False, seed=seed))
    Point.masks.clear()
    train.fit(stage, kind, PLACES[:6, None], PLACES[6:], prepare=lambda numbers: numbers)
    return stage


def has_the_best_row(stage):
    """Whether the kept model is that of the best row of the history."""
    place = keras.saving.load_model(stage.best).place.numpy()
    loss = min(row["val_loss"] for row in read_history(stage.history))
    return bool(np.square(PLACES[6:] - place).mean() == pytest.approx(loss, rel=1e-5))


def kill_and_resume(folder, number, monkeypatch):
    """Killed before that many-th file has its name; what is redone then is not what was done before."""
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_before_rename(patched, number)
        fit_point(folder)
    return fit_point(folder, seed=1)


FILES_OF_A_STAGE = 8  # config.json, two epochs of history, last and best, the plot; and config.json again


def test_the_best_model_is_that_of_a_row_wherever_a_run_was_killed(tmp_path, monkeypatch):
    """On another machine an epoch that is done again rounds otherwise: here it has other batches."""
    whole = fit_point(tmp_path / "whole")
    assert has_the_best_row(whole)
    losses = [row["val_loss"] for row in read_history(whole.history)]
    assert losses[1] < losses[0] - 0.1  # so that both epochs write a best model
    for number in range(2, FILES_OF_A_STAGE + 2):
        stage = kill_and_resume(tmp_path / str(number), number, monkeypatch)
        assert has_the_best_row(stage), number
        assert stage.is_finished() and not stage.last.exists()


def test_control_a_best_model_that_is_not_mended_is_of_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Checkpoint, "on_train_begin", lambda checkpoint, logs=None: None)
    assert not has_the_best_row(kill_and_resume(tmp_path / "run", 7, monkeypatch))


def test_no_two_steps_share_a_dropout_mask_and_resuming_repeats_none(tmp_path, monkeypatch):
    fit_point(tmp_path / "whole")
    masks = list(Point.masks)
    assert len(masks) == 6 and len({mask for step in masks for mask in step}) == 12
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_before_rename(patched, 2, "vqvae_last.keras")
        fit_point(tmp_path / "killed")
    fit_point(tmp_path / "killed")
    assert Point.masks == masks[3:]  # the second epoch, again
    fit_point(tmp_path / "other", seed=1)
    assert not {mask for step in masks for mask in step} & {mask for step in Point.masks for mask in step}


def test_control_masks_that_begin_with_the_number_of_the_epoch_come_twice(tmp_path, monkeypatch):
    begin = train.Checkpoint.on_epoch_begin

    def begin_late(checkpoint, epoch, logs=None):
        begin(checkpoint, epoch, logs)
        for state in (v for v in checkpoint.model.non_trainable_variables if v.name == "seed_generator_state"):
            state.assign([state.numpy()[0], epoch])

    monkeypatch.setattr(train.Checkpoint, "on_epoch_begin", begin_late)
    fit_point(tmp_path)
    assert Point.masks[3:5] == Point.masks[1:3]


def test_a_best_model_that_is_gone_is_missed_before_another_epoch(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_before_rename(patched, 2, "vqvae_last.keras")
        fit_point(tmp_path)
    (tmp_path / "vqvae.keras").unlink()
    assert fit_point(tmp_path).is_finished()  # its only epoch is the best, and is in vqvae_last.keras

    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_before_rename(patched, 3, "vqvae_history.csv")
        fit_point(tmp_path / "worse", kind=Worsening, epochs=3)
    (tmp_path / "worse" / "vqvae.keras").unlink()
    with pytest.raises(dataset.UserError, match=r"vqvae\.keras is missing: restore it, or delete vqvae_last\.keras"):
        fit_point(tmp_path / "worse", kind=Worsening, epochs=3)


def test_a_quarter_of_what_the_prior_is_shown_is_unchanged(measured, phantoms):
    images = dataset.load(phantoms)["train"].images[:8]
    codes, changes = train.encode_variants(measured.vqvae, images, train.Settings(augmentations=12))
    assert codes.shape == (8, 16, 16, 16) and changes.shape == (8, 16, 6)
    unchanged = (changes == 0).all(axis=(0, 2))
    assert unchanged.sum() == 4 and (changes[:, ~unchanged, -1] == 1).all()
    plain, mirrored = (dataset.codes_of(measured.vqvae, x / np.float32(255)) for x in (images, images[:, ::-1]))
    for variant in codes[:, unchanged].swapaxes(0, 1):
        assert np.array_equal(variant, plain) or np.array_equal(variant, mirrored)
    for variant in codes[:, ~unchanged].swapaxes(0, 1):
        assert not np.array_equal(variant, plain) and not np.array_equal(variant, mirrored)


def test_after_one_huge_gradient_the_next_ones_count():
    def place_after(clip_norm):
        """Where ten gradients of -1 lead after one of a million."""
        optimizer = train.make_optimizer(train.Schedule(1, 1, 0.1, cosine_decay=False, clip_norm=clip_norm), 11)
        place = keras.Variable([0.0])
        for gradient in [1e6] + [-1.0] * 10:
            optimizer.apply([tf.constant([gradient])], [place])
        return float(place[0])

    assert place_after(1.0) > 0 > place_after(0.0)


def test_a_learning_rate_rises_and_falls_to_nothing():
    def rates(**schedule):
        rate = train.learning_rates(train.Schedule(10, 1, 0.5, **schedule), steps=10)
        return np.array([rate(step) for step in range(101)])

    risen = rates(warmup_epochs=2)
    np.testing.assert_allclose(risen[:21], np.linspace(0, 0.5, 21), atol=1e-6)
    assert (np.diff(risen[20:]) < 0).all() and risen[100] == pytest.approx(0, abs=1e-6)
    at_once = rates()
    assert at_once[0] == 0.5 and (np.diff(at_once) < 0).all() and at_once[100] == pytest.approx(0, abs=1e-6)
    assert train.learning_rates(train.Schedule(10, 1, 0.5, 2, cosine_decay=False), steps=10) == 0.5


@pytest.mark.parametrize("write", [lambda path: path.write_text("half"), die])
def test_file_under_its_final_name_is_the_old_one_until_the_new_is_whole(tmp_path, monkeypatch, write):
    path = tmp_path / "report.json"
    dataset.write_json(path, {"old": 1})
    monkeypatch.setattr(dataset.os, "replace", die)
    with pytest.raises(Killed):
        dataset.write_whole(path, write)
    assert json.loads(path.read_text()) == {"old": 1}


@needs_full_device
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    dataset.write_json(path, {"old": 1})
    (tmp_path / "partial_report.json").symlink_to("/dev/full")
    with pytest.raises(dataset.UserError, match=re.escape(f"{path} cannot be written (No space left on device)")):
        dataset.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_a_number_stops_the_stage(tmp_path):
    """exp(20 * 4) is a float32, exp(20 * 5) is not: it happens in the last step of the second epoch."""
    with pytest.raises(dataset.UserError, match=r"not a number in epoch 2;.*Lower --vqvae-learning-rate"):
        fit_point(tmp_path, kind=Runaway)
    assert len(read_history(tmp_path / "vqvae_history.csv")) == 1
    for name in ("vqvae.keras", "vqvae_last.keras"):
        assert keras.saving.load_model(tmp_path / name).place.numpy() == pytest.approx(3, rel=1e-4)
