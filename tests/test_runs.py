"""A finished run: its files, the numbers of its report, what the models learn, and other slices than 32 a head."""

import json
import shutil
import types

import dataset
import predict
import train

import keras
import numpy as np
import pictures
import pytest
import tensorflow as tf
from conftest import TINY, TRAINED, eagerly, files_in, killed_before, read_history, run_script, write_data, write_slices
from PIL import Image
from skimage.metrics import structural_similarity
from sklearn.decomposition import PCA

# Wider layers and more steps than a tiny run has, so that something is learned; and hardly a step.
LONGER = "--vqvae-filters 16 32 --vqvae-epochs 24 --vqvae-batch-size 8 --vqvae-learning-rate 0.003"
LONGER = [*TINY, *LONGER.split(), "--pixelcnn-epochs", "16", "--pixelcnn-batch-size", "8"]
SHORT = "--vqvae-epochs 1 --pixelcnn-epochs 1 --pixelcnn-residual-blocks 1 --augmentations 1 --image-size 16"
SHORT = [*TINY, *SHORT.split()]
PLAIN = ["report.json", "samples.npz", "samples.png", "reconstructions.png"]  # of predict.py without a flag


def read_report(run):
    """Strictly: Python reads NaN and Infinity too, which JSON does not have."""
    return json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def learned(phantoms, tmp_path_factory):
    """A run, and what its report is made of, from the saved models and samples. Not to be changed: copy the run."""
    found = types.SimpleNamespace(run=tmp_path_factory.mktemp("runs") / "a run")
    assert train.main(["--data", str(phantoms), "--run", str(found.run), *LONGER]) == 0
    predicted = run_script("predict.py", "--run", found.run, "--complete", "--heads", "2")
    assert predicted.returncode == 0, predicted.stderr
    found.report, found.samples = read_report(found.run), dict(np.load(found.run / "samples.npz"))
    found.vqvae, found.prior = predict.load_run(train.Run(found.run))
    found.splits = splits = dataset.load(phantoms)
    found.train, found.test = (dataset.to_float(splits[name].images) for name in ("train", "test"))
    found.numbers, found.codes = splits["test"].slice_numbers, found.vqvae.encode(found.test)
    found.reconstructed = found.vqvae.decode(found.codes)
    return found


@pytest.fixture
def copied_run(learned, tmp_path):
    return shutil.copytree(learned.run, tmp_path / "run")


def test_run_holds_every_file_and_nothing_else(learned):
    assert files_in(learned.run) == sorted([*TRAINED, *PLAIN, "completions.png", "heads.png", "heads.npz"])
    config = json.loads((learned.run / "config.json").read_text())
    assert config["settings"]["vqvae_filters"] == [16, 32]
    assert [config["data"][split]["images"] for split in dataset.SPLITS] == [96, 32, 32]
    checksums = {name: train.checksum(learned.run / f"{name}.keras") for name in ("vqvae", "pixelcnn")}
    assert {name: finished["sha256"] for name, finished in config["finished"].items()} == checksums
    assert config["finished"]["pixelcnn"]["vqvae"] == checksums["vqvae"]


@pytest.mark.parametrize("name, epochs", [("vqvae", 24), ("pixelcnn", 16)])
def test_kept_model_is_the_best_epoch_by_validation(name, epochs, learned):
    rows = read_history(learned.run / f"{name}_history.csv")
    assert [row["epoch"] for row in rows] == [*range(1, epochs + 1)]
    validate = learned.splits["validate"]
    if name == "vqvae":
        vqvae = keras.saving.load_model(learned.run / "vqvae.keras")
        vqvae.compile(run_eagerly=True)
        images = dataset.to_float(validate.images)
        loss = train.selection_loss(vqvae.evaluate(images, verbose=0, return_dict=True), "")
    else:
        loss = learned.prior.nll(learned.vqvae.encode(validate.images), labels=validate.slice_numbers).mean()
    losses = [row["val_loss"] - row.get("val_quantizer_loss", 0) for row in rows]  # no matter how long the latents are
    assert loss == pytest.approx(min(losses), rel=1e-4) and min(losses) < 0.99 * losses[0]


def test_train_leaves_a_finished_run_alone(copied_run, phantoms, capsys):
    """A picture says nothing about what is finished."""
    for name in ("vqvae_loss.png", "report.json"):
        (copied_run / name).unlink()

    def times():
        return {name: (copied_run / name).stat().st_mtime_ns for name in files_in(copied_run)}

    before = times()
    assert train.main(["--data", str(phantoms), "--run", str(copied_run), *LONGER]) == 0
    assert capsys.readouterr().out.count("finished before") == 2 and times() == before


# ---- Its report, computed otherwise --------------------------------------------------


def approx(expected):
    return {name: pytest.approx(float(value), rel=1e-3) for name, value in expected.items()}


def test_report_of_the_reconstructions(learned):
    pairs = [(a[..., 0], b[..., 0]) for a, b in zip(learned.test, learned.reconstructed)]
    similarity = [structural_similarity(a, b, data_range=1) for a, b in pairs]
    maps = [structural_similarity(a, b, data_range=1, full=True)[1] for a, b in pairs]
    inside = [a > 1 / 16 for a, _ in pairs]  # a skull has no hole in it that a phantom does not fill but by fluid
    expected = {
        "ssim_mean": np.mean(similarity),
        "ssim_min": np.min(similarity),
        "ssim_gaussian_mean": np.mean(tf.image.ssim(learned.test, learned.reconstructed, 1.0)),
        "ssim_inside_mean": np.mean([of[chosen].mean() for of, chosen in zip(maps, inside)]),
        "psnr_mean": np.mean(tf.image.psnr(learned.test, learned.reconstructed, 1.0)),
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
        probabilities = tf.nn.softmax(learned.prior({"codes": codes, "labels": labels})).numpy()
        return -np.log(np.take_along_axis(probabilities, codes[..., None], axis=-1)).mean(dtype=np.float64)

    of_numbers = nats(learned.numbers)
    assert prior["nats_per_code"] == pytest.approx(of_numbers, rel=1e-5)
    assert prior["bits_per_image"] == pytest.approx(256 * of_numbers / np.log(2), rel=1e-4)
    assert prior["histogram_bits_per_image"] == pytest.approx(256 * entropy, rel=1e-4)
    assert nats(np.full(32, -1, np.int32)) != pytest.approx(of_numbers, rel=1e-3)  # control
    assert prior["membership_auroc"] is prior["membership_auroc_interval"] is None  # of one test subject


def test_report_of_the_samples(learned):
    """Samples are of the slice numbers of the test slices."""
    report, samples, images = learned.report["samples"], learned.samples, learned.samples["images"][..., None]
    assert images.dtype == np.float32 and samples["codes"].dtype == samples["labels"].dtype == np.int32
    np.testing.assert_array_equal(samples["labels"], np.arange(32))
    np.testing.assert_array_equal(samples["codes"], learned.prior.sample(32, seed=0, labels=learned.numbers))
    np.testing.assert_allclose(images, learned.vqvae.decode(samples["codes"]), atol=1e-6)
    axes = np.linalg.svd(flat(learned.train) - flat(learned.train).mean(axis=0), full_matrices=False)[2][2:12].T
    seen = np.concatenate([learned.train, learned.train[:, ::-1]])  # mirrored slices are training slices
    found, similarity = nearest(images, seen).T
    numbers = np.tile(learned.splits["train"].slice_numbers, 2)[found.astype(int)]
    variances = [(flat(x) @ axes).var(axis=0).mean() for x in (images, learned.test, learned.train)]
    expected = {
        "sharpness_ratio": gradient(images) / gradient(learned.test),
        "nearest_train_ssim_mean": similarity.mean(),
        "nearest_train_ssim_max": similarity.max(),
        "test_nearest_train_ssim_mean": nearest(learned.test, seen)[:, 1].mean(),
        "level_error": np.abs(numbers - np.arange(32)).mean(),
        "component_variance_ratio": variances[0] / variances[2],
        "test_component_variance_ratio": variances[1] / variances[2],
    }
    assert report == report | approx(expected)
    # Of slices that are drawn one by one the error of a mean is known.
    low, high = report["nearest_train_ssim_mean_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * similarity.std() / np.sqrt(32), rel=0.15)
    for name in ("level_error", "component_variance_ratio"):
        low, high = report[f"{name}_interval"]
        assert low < report[name] < high


def gradient(images):
    down, across = images[:, 1:, :-1] - images[:, :-1, :-1], images[:, :-1, 1:] - images[:, :-1, :-1]
    return np.sqrt(down**2 + across**2).mean()


def flat(images):
    return images.reshape(len(images), -1).astype("float64")


def nearest(images, seen):
    """The most similar of the 20 slices that are nearest by L2, for each image, and its SSIM: (N, 2)."""

    def best(image):
        order = np.argsort(((seen - image) ** 2).sum(axis=(1, 2, 3)))[:20]
        return max((structural_similarity(image[..., 0], seen[i, ..., 0], data_range=1), i) for i in order)[::-1]

    return np.array([best(image) for image in images])


def test_the_models_learn(learned):
    """Of three heads, what holds for another one: reconstructions are nearer than the mean slice of that number."""
    of_number = learned.train.reshape(3, 32, 64, 64).mean(axis=0)
    assert learned.report["reconstruction"]["ssim_mean"] > predict.ssim(learned.test[..., 0], of_number).mean() + 0.03
    prior = learned.report["prior"]
    assert prior["bits_per_image"] < 0.5 * prior["histogram_bits_per_image"]


def test_whole_heads_are_drawn_slice_by_slice(learned):
    prior, report = learned.prior, learned.report["heads"]
    codes, images = (np.load(learned.run / "heads.npz")[name] for name in ("codes", "images"))
    assert codes.shape == (2, 32, 16, 16) and codes.dtype == np.int32
    assert images.shape == (2, 32, 64, 64) and images.dtype == np.float32
    np.testing.assert_allclose(images[1], learned.vqvae.decode(codes[1])[..., 0], atol=1e-6)
    np.testing.assert_array_equal(codes, prior.sample_heads(2, seed=0))
    low, high = report["neighbour_change_interval"]
    assert report["count"] == 2 and low <= report["neighbour_change"] <= high
    assert report["neighbour_change"] == pytest.approx(np.abs(np.diff(images, axis=1)).mean(), rel=1e-4)
    below, labels = learned.codes[:-1], learned.numbers[1:]
    nats = prior.nll(learned.codes[1:], labels=labels, below=below).mean()
    assert report["nats_per_code"] == pytest.approx(nats, rel=1e-4) and report["nats_per_code_interval"] is None
    right, wrong = (prior.nll(codes[0, 1:], labels=labels, below=below) for below in (codes[0, :-1], codes[0, -2::-1]))
    assert right.mean() < wrong.mean()


def test_the_maps_take_the_scores_of_the_training(learned, tmp_path):
    """Of another folder's slices they know what is normal; the scores stay those that the prior was fitted on."""
    other_data = write_data(tmp_path, train=[1, 2], validate=[402], test=[441])
    options = predict.parse_arguments(["--anomalies", "x", "--data", str(other_data)])
    detector, _ = predict.make_detector(options, train.Run(learned.run), learned.vqvae, learned.prior)
    scores = PCA(4, whiten=True).fit(flat(learned.train)).transform(flat(learned.test)).astype(np.float32)
    nats, conditions = detector.measure(learned.test, learned.numbers)["nats"], {"labels": learned.numbers}
    np.testing.assert_allclose(nats, learned.prior.nll(learned.codes, scores=scores, **conditions), rtol=1e-2)
    assert not np.allclose(nats, learned.prior.nll(learned.codes, **conditions), rtol=1e-1)  # control


def test_other_data_are_noted_and_measured(learned, copied_run, tmp_path, capsys):
    """Noise instead of phantoms; and nothing of the earlier call stays beside the new report."""
    other_data = write_data(tmp_path / "other", train=[1, 2, 3], validate=[402], test=[441, 442, 443])
    arguments = ["--run", str(copied_run), "--data", str(other_data), "--slice", "1", "0", "--num-samples", "5"]
    assert predict.main(arguments) == 0
    assert "other train, validate, test slices than those of the training" in capsys.readouterr().out
    assert files_in(copied_run) == sorted(TRAINED + PLAIN)
    report, found = read_report(copied_run), dataset.fingerprint(dataset.load(other_data))
    data = report["data"]
    assert data["as_trained"] is data["phantom"] is False and learned.report["data"]["phantom"]
    assert data["sha256"] == {name: split["sha256"] for name, split in found.items()}
    assert (data["test_images"], data["test_subjects"]) == (6, 3)
    for part, name in (("reconstruction", "ssim_mean"), ("prior", "nats_per_code"), ("prior", "membership_auroc")):
        low, high = report[part][f"{name}_interval"]
        assert low < report[part][name] < high
    samples, asked = np.load(copied_run / "samples.npz"), np.array([1, 0, 1, 0, 1], np.int32)  # in turn
    np.testing.assert_array_equal(samples["labels"], asked)
    np.testing.assert_array_equal(samples["codes"], learned.prior.sample(5, seed=0, labels=asked))


@pytest.mark.parametrize("mirror_axis", [1, 2, None])
def test_a_mirrored_training_slice_is_no_novelty(mirror_axis, learned):
    """Where the models were fitted on mirrored slices; not those flipped the other way."""
    known = learned.splits["train"][::8]
    evaluation = predict.Evaluation(learned.vqvae, learned.prior, known, known, mirror_axis)
    for axis in ((), 1, 2):
        indices, similarity = evaluation.nearest(np.flip(evaluation.test.images, axis), "slices")
        assert (similarity.mean() == pytest.approx(1)) == (axis in ((), mirror_axis))
        if axis in ((), mirror_axis):
            np.testing.assert_array_equal(evaluation.seen_labels[indices], known.slice_numbers)
    report = evaluation.measure_heads(learned.train.reshape(3, 32, 64, 64))  # beside slices that have none below
    assert np.isnan([report["nats_per_code"], report["test_neighbour_change"]]).all()


def test_variances_are_compared_within_the_slice_numbers_that_are_asked_for(learned):
    """As with --slice 5 20: that of the training slices of these is 1, though slices of all numbers differ more."""
    splits = learned.splits["train"], learned.splits["test"]
    evaluation = predict.Evaluation(learned.vqvae, learned.prior, *splits, mirror_axis=None)
    images, labels = evaluation.train.images, evaluation.train.labels
    axes = np.linalg.svd(flat(images) - flat(images).mean(axis=0), full_matrices=False)[2][2:12].T
    asked, asked_labels = images[np.isin(labels, [5, 20])], labels[np.isin(labels, [5, 20])]

    def variance(of):
        return (flat(of) @ axes).var(axis=0).mean()

    of_test = variance(evaluation.test.images[[5, 20]]) / variance(asked)
    ratios = evaluation.variance_ratios(asked[:, None], asked_labels)
    assert ratios == ratios | approx({"component_variance_ratio": 1, "test_component_variance_ratio": of_test})
    assert variance(asked) != pytest.approx(variance(images), rel=0.2)  # control


@pytest.mark.filterwarnings("ignore:some files", "ignore:invalid value encountered in divide")
@eagerly()
def test_data_without_slice_numbers_train_and_predict(tmp_path, refuse):
    """What two training slices do not have is null: a third principal component. One is enough to be compared with."""
    for split, letters in (("train", "ab"), ("validate", "a"), ("test", "abcd")):
        write_slices(tmp_path / f"keras_png_slices_{split}", [f"{split} {letter}.png" for letter in letters])
    run = tmp_path / "run"
    assert train.main(["--data", str(tmp_path), "--run", str(run), *SHORT]) == 0
    assert predict.main(["--run", str(run), "--complete"]) == 0
    test = dataset.load(tmp_path, ("test",), 16)["test"]
    report, samples = read_report(run), np.load(run / "samples.npz")
    vqvae, prior = predict.load_run(train.Run(run))
    assert samples["labels"].tolist() == [-1] * 4 and samples["labels"].dtype == np.int32
    assert prior.num_labels == 0
    np.testing.assert_array_equal(samples["codes"], prior.sample(4, seed=0))
    assert report["prior"]["nats_per_code"] == pytest.approx(prior.nll(vqvae.encode(test.images)).mean(), rel=1e-4)
    for name in ("level_error", "test_level_error", "component_variance_ratio", "component_variance_ratio_interval"):
        assert report["samples"][name] is None
    assert report["data"]["test_subjects"] is report["prior"]["nats_per_code_interval"] is None
    assert report["prior"]["membership_auroc"] is None
    refuse(predict, ["--run", run, "--heads", 2], "--heads", "knows nothing of the slice below")
    for name in ("train/train a", "test/test a", "test/test b", "test/test c"):
        (tmp_path / f"keras_png_slices_{name}.png").unlink()
    assert predict.main(["--run", str(run), "--num-samples", "1"]) == 0 and read_report(run)["samples"]["count"] == 1


# ---- Its measures and pictures -------------------------------------------------------


def test_an_interval_is_of_whole_subjects():
    """Slices of a subject come together or not at all; of one subject, or nobody knows of which, there is none."""

    def interval(values, cases):
        subjects = predict.Coded(None, None, None, np.array(cases)).subjects
        found = predict.with_interval("mean", predict.mean, predict.by_subject(np.array(values, float), subjects))
        assert found["mean"] == np.nanmean(values)
        return found["mean_interval"]

    assert interval([0, 0, 0, 1], [7, 7, 7, 9]) == interval([0, 0, 0, 1, np.nan], [7, 7, 7, 9, 7]) == [0, 1]
    low, high = interval(np.arange(16) // 2, np.arange(16) // 2)
    assert 0.5 < low < 2.5 and 4.5 < high < 6.5  # 3.5 is the mean, and 0.81 the error, of 8 subjects
    assert interval([0, 0, 0, 1], [7, 7, 7, 7]) is interval([0, 0, 0, 1], [7, 7, -1, 9]) is None


@pytest.mark.parametrize("gain, low, high", [(0.0, 0.2, 0.8), (0.3, 0.99, 1.0)], ids=["by chance", "by heart"])
def test_a_prior_that_knows_heads_by_heart_betrays_them(gain, low, high):
    """Heads differ in what they cost; where those of the training cost less than that by far, they are known."""
    rng, subjects = np.random.default_rng(0), np.repeat(np.arange(40), 32)
    heads = rng.normal(1.6, 0.05, (2, 40)) - [[0], [gain]]  # of the test, of the training
    test, train = (predict.by_subject(nats[subjects] + rng.normal(0, 0.01, len(subjects)), subjects) for nats in heads)
    found = predict.with_interval("auroc", predict.membership_auroc, test, train)
    assert low < found["auroc_interval"][0] <= found["auroc"] <= found["auroc_interval"][1] <= high
    assert found["auroc"] == pytest.approx((heads[1] < heads[0][:, None]).mean(), abs=0.02)


def test_slices_are_drawn_of_the_labels_that_are_asked_for():
    pool, asked = np.repeat(np.arange(4), 5), np.array([2, 0, 2, 3, 2, 0])
    chosen = predict.draw_alike(pool, asked)
    np.testing.assert_array_equal(pool[chosen], asked)
    assert len(set(chosen)) == 6 and (predict.draw_alike(pool, asked, seed=1) != chosen).any()
    # Where there is none of a label, or none is asked for, any will do, and no two are the same.
    for label in (-1, 9):
        assert sorted(predict.draw_alike(pool, np.full(20, label))) == list(range(20))


def test_pictured_samples_are_the_first_of_evenly_spaced_labels_in_order():
    """Few samples as far as they go: what does not fill a row is left out, but never most of them."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(32), 4))
    shown = predict.pictured(labels)
    assert (labels[shown] == [[0, 4, 9, 13, 18, 22, 27, 31]] * 3).all()
    for column, label in zip(shown.T, labels[shown[0]]):
        assert column.tolist() == np.flatnonzero(labels == label)[:3].tolist()
    for count, different in ((2, 1), (5, 3), (9, 32), (30, 3)):
        labels = np.arange(count) % different
        shown = predict.pictured(labels)
        assert len(np.unique(shown)) == shown.size <= 24
        assert shown.size >= min(count, 24) / 2 and shown.max() < count
        assert (np.diff(labels[shown.ravel()]) >= 0).all()


@pytest.mark.parametrize("shape, times", [((64, 64), 2), ((128, 128), 1), ((32, 64), 4), ((200, 150), 1)], ids=str)
def test_every_pixel_is_drawn_a_whole_number_of_times(shape, times, tmp_path):
    """Nothing of a slice is lost in a picture, and it is not blurred."""
    images = np.random.default_rng(0).integers(0, 256, (2, *shape)) / 255
    dataset.write_figure(tmp_path / "it.png", predict.picture_grid("title", [("name", images, ["a", "b"])]))
    expected = np.rint(255 * images[1]).repeat(times, axis=0).repeat(times, axis=1)
    picture, (height, width) = np.asarray(Image.open(tmp_path / "it.png"))[..., 0].astype(int), expected.shape
    rows = np.lib.stride_tricks.sliding_window_view(picture, width, axis=1)
    places = np.argwhere((np.abs(rows - expected[0]) <= 1).all(axis=-1))
    assert any(np.abs(picture[y : y + height, x : x + width] - expected).max() <= 1 for y, x in places)


# ---- Other heads, and other places ---------------------------------------------------


@eagerly()
def test_slice_numbers_and_sizes_are_those_of_the_files_wherever_they_are_moved(tmp_path, monkeypatch, capsys, refuse):
    """Heads of 100 to 103 and a stray 9999, which is one label more; 32 pixels a side."""
    numbers, run, data = [100, 101, 102, 103, 9999], tmp_path / "moved", tmp_path / "data"
    arguments = [*SHORT, "--image-size", "32"]

    def write_few(folder):
        (write_data(folder, numbers[:4], train=[1, 2, 3], validate=[402], test=[441, 442]) / dataset.PHANTOM).touch()
        write_slices(folder / "keras_png_slices_train", ["case_003_slice_9999.png"])

    def is_the_last(path):
        """The file that says that all is there."""
        return path.stat().st_mtime_ns == max(other.stat().st_mtime_ns for other in path.parent.glob("*.*"))

    # A demo finds its slices inside itself.
    monkeypatch.setattr(dataset, "write_phantom", write_few)
    assert train.main(["--demo", "--run", str(tmp_path / "run"), *arguments]) == 0
    (tmp_path / "run").rename(run)
    assert predict.main(["--run", str(run), "--heads", "2"]) == 0 and is_the_last(run / "report.json")
    found, samples, heads = read_report(run)["data"], np.load(run / "samples.npz"), np.load(run / "heads.npz")
    assert found["folder"] == str(run / "phantom_slices") and found["phantom"] and found["as_trained"]
    assert samples["labels"].tolist() == numbers[:4] * 2 and samples["images"].shape == (8, 32, 32)
    assert heads["images"].shape == (2, 5, 32, 32)
    prior = predict.load_run(train.Run(run))[1]
    assert prior.slice_numbers == numbers and prior.num_labels == 5
    refuse(predict, ["--run", run, "--slice", 1], "--slice 1", "the slice numbers 100, 101, 102, 103, 9999")

    # The data are moved out of it, and the command that names their new place does nothing else.
    (run / "phantom_slices").rename(data)
    assert train.main(["--data", str(data), "--run", str(run), *arguments]) == 0
    assert predict.main(["--run", str(run), "--anomalies", str(data / "keras_png_slices_test")]) == 0
    assert train.Run(run).data_folder == data and "note: other" not in capsys.readouterr().out
    found, table = np.load(run / "anomalies" / "anomalies.npz"), run / "anomalies" / "anomalies.csv"
    assert found["labels"].tolist() == numbers[:4] * 2 and found["anomaly_map"].shape == (8, 32, 32)
    rows = [row.split(",") for row in table.read_text().splitlines()[1:]]
    assert is_the_last(table) and all(f"slice_{number}." in name for name, number, *_ in rows)

    # The report, which came last, goes first.
    with killed_before("unlink", "reconstructions.png"):
        predict.main(["--run", str(run)])
    assert "reconstructions.png" in files_in(run) and "report.json" not in files_in(run)


def test_the_diagrams_show_the_run(learned, tmp_path):
    pictures.main(["--run", str(learned.run), "--out", str(tmp_path)])
    assert files_in(tmp_path) == ["generation.png", "masked_context.png", "vqvae_diagram.png"]
    codebook, codes = learned.vqvae.quantizer.codebook.numpy(), learned.codes
    flat = codes[0].ravel()
    drawn, expected = np.split(predict.code_colours(np.concatenate([codebook, codebook[flat]])), [len(codebook)])
    np.testing.assert_allclose(drawn[flat], expected, atol=1e-6)
    shifted = predict.code_colours(np.concatenate([codebook, codebook[flat] + 1]))  # latents far from codes
    assert np.abs(shifted[len(codebook) :] - shifted[flat]).max() > 0.1
    influence = pictures.influence(learned.prior, codes, learned.prior.labels_of(learned.numbers), (8, 4)).ravel()
    assert np.isnan(influence[8 * 16 + 4 :]).all() and np.nanmin(influence) > -1e-6 and influence[8 * 16 + 3] > 1e-6
