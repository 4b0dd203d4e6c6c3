"""Whole runs: their files, the numbers of the report, and what is left of a run that was stopped."""

import csv
import json
import os
import re
import shutil

import keras
import numpy as np
import pytest
import scipy.linalg
import tensorflow as tf
from conftest import TINY
from skimage.metrics import structural_similarity

import dataset
import predict
import train

FILES = [
    *("config.json", "report.json", "samples.npz", "samples.png", "reconstructions.png", "completions.png"),
    *("vqvae.keras", "vqvae_history.csv", "vqvae_loss.png"),
    *("pixelcnn.keras", "pixelcnn_history.csv", "pixelcnn_loss.png"),
]


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


def test_settings_are_written_and_counted(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    assert config["settings"]["filters"] == [4, 8]
    assert config["settings"]["seed"] == 0
    assert [config["data"][split]["images"] for split in dataset.SPLITS] == [96, 32, 32]
    assert config["versions"]["keras"] == keras.__version__


@pytest.mark.parametrize("name", ["vqvae", "pixelcnn"])
def test_kept_model_is_the_best_epoch_by_validation(finished_run, phantoms, name):
    rows = read_history(finished_run / f"{name}_history.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    validate = dataset.load(phantoms)["validate"].images
    vqvae = keras.saving.load_model(finished_run / "vqvae.keras")
    if name == "vqvae":
        measured = vqvae.evaluate(dataset.to_float(validate), verbose=0, return_dict=True)
        loss = measured["loss"] - measured["quantizer_loss"]
    else:
        codes = predict.encode(vqvae, validate.astype("float32") / 255)
        loss = predict.nats_per_code(keras.saving.load_model(finished_run / "pixelcnn.keras"), codes)
    assert loss == pytest.approx(min(row["val_loss"] - row.get("val_quantizer_loss", 0) for row in rows), rel=1e-4)


@pytest.mark.parametrize("quantizer_loss, kept", [({"val_quantizer_loss": 0.5}, 2), ({}, 1)])
def test_the_quantizers_terms_do_not_choose_the_epoch(tmp_path, quantizer_loss, kept):
    stage = train.Stage(tmp_path, "vqvae", 2)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    keeper = train.Keeper(stage, [], seed=0)
    keeper.set_model(model)
    for epoch, logs in enumerate([{"val_loss": 0.2, "val_quantizer_loss": 0.0}, {"val_loss": 0.6, **quantizer_loss}]):
        keeper.on_epoch_begin(epoch)
        model.layers[0].bias.assign([epoch + 1])
        keeper.on_epoch_end(epoch, {"loss": 0.0, **logs})
    assert keras.saving.load_model(stage.best).layers[0].bias.numpy() == [kept]


def test_report_equals_a_recomputation(finished_run, phantoms):
    """Every number again, from samples.npz and the saved models, by other means than those of predict.py."""
    report = json.loads((finished_run / "report.json").read_text())
    samples = np.load(finished_run / "samples.npz")
    vqvae = keras.saving.load_model(finished_run / "vqvae.keras")
    pixelcnn = keras.saving.load_model(finished_run / "pixelcnn.keras")
    splits = {name: split.images.astype("float32") / 255 for name, split in dataset.load(phantoms).items()}
    train_images, test = splits["train"], splits["test"]
    codes = vqvae.encode(test[..., None]).numpy()
    reconstructed = vqvae.decode(codes).numpy()[..., 0]

    similarity = [structural_similarity(a, b, data_range=1) for a, b in zip(test, reconstructed)]
    gaussian = [
        structural_similarity(a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        for a, b in zip(test, reconstructed)
    ]
    expected = {
        "ssim_mean": np.mean(similarity),
        "ssim_std": np.std(similarity),
        "ssim_min": np.min(similarity),
        "ssim_gaussian_mean": np.mean(gaussian),
        "psnr_mean": tf.reduce_mean(tf.image.psnr(test[..., None], reconstructed[..., None], 1.0)),
        "sharpness_ratio": gradient(reconstructed) / gradient(test),
    }
    assert report["reconstruction"] == {"split": "test", "images": 32} | approx(expected)

    share = np.unique(codes, return_counts=True)[1] / codes.size
    assert report["codebook"]["used"] == len(share)
    assert report["codebook"]["perplexity"] == pytest.approx(2 ** -(share * np.log2(share)).sum())
    assert report["codebook"]["bits_per_image"] == 16 * 16 * 4
    assert report["codebook"]["grid"] == [16, 16]

    probabilities = tf.nn.softmax(pixelcnn(codes)).numpy()
    of_codes = np.take_along_axis(probabilities, codes[..., None], axis=-1)
    assert report["prior"]["bits_per_image"] == pytest.approx(-np.log2(of_codes).sum() / len(codes), rel=1e-4)
    assert report["prior"]["bits_per_code"] == pytest.approx(-np.log2(of_codes).mean(), rel=1e-4)
    assert report["prior"]["nats_per_code"] == pytest.approx(-np.log(of_codes).mean(), rel=1e-4)

    images = samples["images"]
    assert images.shape == (32, 64, 64)
    assert images.dtype == np.float32
    assert samples["codes"].dtype == np.int32
    np.testing.assert_array_equal(samples["codes"], pixelcnn.sample(32, seed=0))
    np.testing.assert_allclose(images, vqvae.decode(samples["codes"])[..., 0], atol=1e-6)
    assert 0 <= images.min() <= images.max() <= 1
    expected = {
        "frechet_pca": frechet(images, test, train_images),
        "frechet_pca_floor": frechet(train_images, test, train_images),
        "sharpness_ratio": gradient(images) / gradient(test),
        "nearest_train_ssim_mean": np.mean(nearest(images, train_images)),
        "nearest_train_ssim_max": np.max(nearest(images, train_images)),
        "reconstruction_nearest_train_ssim_mean": np.mean(nearest(reconstructed, train_images)),
        "test_nearest_train_ssim_mean": np.mean(nearest(test, train_images)),
    }
    assert {name: report["samples"][name] for name in expected} == approx(expected)
    assert frechet(images, train_images, train_images) != pytest.approx(report["samples"]["frechet_pca"], rel=1e-2)


def approx(expected):
    return {name: pytest.approx(float(value), rel=1e-3) for name, value in expected.items()}


def gradient(images):
    down = images[:, 1:, :-1] - images[:, :-1, :-1]
    across = images[:, :-1, 1:] - images[:, :-1, :-1]
    return np.sqrt(down**2 + across**2).mean()


def frechet(images, others, train_images):
    flat = train_images.reshape(len(train_images), -1).astype("float64")
    axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)[2][:64].T
    first, second = (x.reshape(len(x), -1) @ axes for x in (images, others))
    cov1, cov2 = np.cov(first.T), np.cov(second.T)
    root = scipy.linalg.sqrtm(cov1 @ cov2 + 1e-9 * np.eye(64)).real
    return np.square(first.mean(axis=0) - second.mean(axis=0)).sum() + np.trace(cov1 + cov2 - 2 * root)


def nearest(images, train_images):
    """Best SSIM among the 20 training slices that are nearest by L2, for each image."""
    best = []
    for image in images:
        order = np.argsort(((train_images - image) ** 2).sum(axis=(1, 2)))[:20]
        best.append(max(structural_similarity(image, train_images[i], data_range=1) for i in order))
    return best


def test_train_leaves_a_finished_run_alone(finished_run, phantoms, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


# --------------------------------------------------------------------------------------
# A run that was stopped
# --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is tidied up."""


def die(*arguments):
    raise Killed


def kill_before_rename(monkeypatch, number, replace=os.replace):
    """Let train.py be killed when it is about to give a file its final name, for that many-th time."""
    left = iter(range(number))
    monkeypatch.setattr(dataset.os, "replace", lambda *names: die() if next(left, None) is None else replace(*names))


def test_stopped_run_ends_as_the_uninterrupted_one(finished_run, phantoms, tmp_path, monkeypatch, capsys):
    """The disk is full once; then killed between writing and renaming of every kind of file in turn."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "partial_vqvae_last.keras").symlink_to("/dev/full")
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 2
    assert f"{run / 'vqvae_last.keras'} cannot be written (No space left on device)" in capsys.readouterr().err
    for number in (2, 4, 7):  # before the first state to resume from, a history, and the first model of a stage
        kill_before_rename(monkeypatch, number)
        with pytest.raises(Killed):
            train.main(["--data", str(phantoms), "--run", str(run), *TINY])
        for path in [*run.glob("vqvae*.keras"), *run.glob("pixelcnn*.keras")]:
            keras.saving.load_model(path)  # whatever has its final name opens
    assert not (run / "pixelcnn.keras").exists()
    monkeypatch.undo()
    assert train.main(["--data", str(phantoms), "--run", str(run), *TINY]) == 0
    for name in ("vqvae", "pixelcnn"):
        history, expected = (read_history(folder / f"{name}_history.csv") for folder in (run, finished_run))
        assert [row["epoch"] for row in history] == [1, 2, 3]
        for row, expected_row in zip(history, expected):
            assert row == pytest.approx(expected_row, rel=1e-6)
        model, expected = (keras.saving.load_model(folder / f"{name}.keras") for folder in (run, finished_run))
        for weight, expected_weight in zip(model.trainable_weights, expected.trainable_weights):
            np.testing.assert_allclose(weight, expected_weight, rtol=1e-4, atol=1e-6)


def test_control_another_seed_starts_elsewhere(finished_run, phantoms, tmp_path, monkeypatch):
    kill_before_rename(monkeypatch, 4)  # after the settings, and the first epoch's model, history and last state
    with pytest.raises(Killed):
        train.main(["--data", str(phantoms), "--run", str(tmp_path), "--seed", "1", *TINY])
    first, expected = (read_history(folder / "vqvae_history.csv")[0] for folder in (tmp_path, finished_run))
    assert first["loss"] != pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("write", [lambda path: path.write_text("half"), die])
def test_file_under_its_final_name_is_the_old_one_until_the_new_is_whole(tmp_path, monkeypatch, write):
    path = tmp_path / "report.json"
    dataset.write_json(path, {"old": 1})
    monkeypatch.setattr(dataset.os, "replace", die)
    with pytest.raises(Killed):
        dataset.write_whole(path, write)
    assert json.loads(path.read_text()) == {"old": 1}


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    dataset.write_json(path, {"old": 1})
    (tmp_path / "partial_report.json").symlink_to("/dev/full")
    with pytest.raises(dataset.UserError, match=re.escape(f"{path} cannot be written (No space left on device)")):
        dataset.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_loss_that_is_not_a_number_stops_the_stage(phantoms, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--data", str(phantoms), "--run", str(run), *TINY, "--vqvae-learning-rate", "1.0", "--seed", "3"]
    original = train.Keeper.on_epoch_end

    def spoil(keeper, epoch, logs):
        original(keeper, epoch, {**logs, "loss": float("nan") if epoch == 1 else logs["loss"]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Keeper, "on_epoch_end", spoil)
        assert train.main(arguments) == 2
    assert "epoch 2" in capsys.readouterr().err
    assert len(read_history(run / "vqvae_history.csv")) == 1
    keras.saving.load_model(run / "vqvae.keras")
