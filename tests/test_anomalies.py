"""`predict.py --anomalies`: what it writes, what its numbers depend on, and what it refuses."""

import copy
import csv
import shutil

import anomalies as bench
import keras
import numpy as np
import pytest
from PIL import Image
from test_errors import cut, refuse  # noqa: F401  (a fixture)

import dataset
import modules
import predict

LEVELS = 32


def write_run(folder, phantoms, num_labels):
    """A run whose networks are small and hardly trained: enough for all but good maps."""
    folder.mkdir()
    keras.utils.set_random_seed(1)
    images = dataset.load(phantoms, ("train", "validate"))["train"].images[::4] / np.float32(255)
    vqvae = modules.VQVAE(16, 4, filters=(4, 8), decoder_blocks=1, ssim_weight=0.0)
    latents = np.unique(vqvae.encoder(images[..., None]).numpy().reshape(-1, 4), axis=0)
    vqvae.quantizer.codebook.assign(latents[np.linspace(0, len(latents) - 1, 16).astype(int)])
    vqvae.compile(optimizer="adam")
    vqvae.fit(images[..., None], verbose=0, epochs=2)
    pixelcnn = modules.PixelCNN(16, (16, 16), filters=8, residual_blocks=2, num_labels=num_labels)
    pixelcnn.compile(optimizer=keras.optimizers.Adam(3e-3))
    pixelcnn.fit(dataset.codes_of(vqvae, images), verbose=0, epochs=2)
    finished = {}
    for name, model in (("vqvae", vqvae), ("pixelcnn", pixelcnn)):
        model.save(folder / f"{name}.keras")
        finished[name] = dataset.file_checksum(folder / f"{name}.keras")
    data = {"folder": str(phantoms), "phantom": True}
    dataset.write_json(
        folder / "config.json", {"settings": {"mirror": True}, "data": data, "versions": {}, "finished": finished}
    )
    return folder


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("anomalies") / "run", phantoms, LEVELS)


@pytest.fixture(scope="module")
def run_without_labels(phantoms, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("anomalies") / "unlabelled", phantoms, 0)


@pytest.fixture(scope="module")
def detect(run):
    """A function that makes the detector of the run."""
    config, vqvae, pixelcnn = predict.load_run(run)

    def make(known=True):
        options = predict.parse_arguments(["--anomalies", "x", "--restorations", "2"])
        return predict.detectors(options, config, vqvae, pixelcnn)(known)

    return make


@pytest.fixture(scope="module")
def detector(detect):
    return detect()


@pytest.fixture(scope="module")
def slices(phantoms):
    """Test slices (20, 64, 64) and their labels."""
    split = dataset.load(phantoms, ("test",))["test"]
    return split.images[:20].astype(np.float32) / 255, split.labels[:20]


def examine(run, folder, *arguments):
    """Run the command: the rows of anomalies.csv and the arrays of anomalies.npz."""
    code = predict.main(["--run", str(run), "--anomalies", str(folder), "--restorations", "2", *map(str, arguments)])
    assert code == 0
    with open(run / "anomalies" / "anomalies.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with np.load(run / "anomalies" / "anomalies.npz") as arrays:
        return rows, dict(arrays)


@pytest.fixture(scope="module")
def mixed(phantoms, tmp_path_factory):
    """A folder of slices of all sorts of names and files."""
    folder = tmp_path_factory.mktemp("mixed")
    source = phantoms / "keras_png_slices_test"
    for number in (3, 30):
        shutil.copy(source / f"case_441_slice_{number}.nii.png", folder)
    picture = Image.open(source / "case_441_slice_9.nii.png")
    picture.resize((100, 80)).convert("RGB").save(folder / "P7-Slice09.JPG", quality=95)
    Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(folder / "$16 bit$.png")
    picture.save(folder / "head.png")
    picture.save(folder / "head.jpg")
    picture.save(folder / "case_1_slice_77.png")
    return folder


# --------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------


def test_files_of_the_command(run, mixed, capsys):
    rows, arrays = examine(run, mixed, "--slice", 12)
    names = sorted(path.name for path in mixed.iterdir())
    assert sorted(arrays["names"]) == sorted(row["name"] for row in rows) == names
    count = len(names)
    shapes = {
        "names": (count,),
        "images": (count, 64, 64),
        "surprise": (count, 16, 16),
        "restored": (count, 64, 64),
        "anomaly_map": (count, 64, 64),
        "score": (count,),
        "labels": (count,),
    }
    assert {name: values.shape for name, values in arrays.items()} == shapes
    assert all(arrays[name].dtype == np.float32 for name in ("images", "surprise", "restored", "anomaly_map"))
    assert arrays["labels"].dtype == np.int32
    assert all(np.isfinite(values).all() for name, values in arrays.items() if name != "names")
    for name in ("images", "restored"):
        assert 0 <= arrays[name].min() <= arrays[name].max() <= 1

    labels = dict(zip(arrays["names"], arrays["labels"]))
    assert labels == {
        "case_441_slice_3.nii.png": 3,
        "case_441_slice_30.nii.png": 30,
        "P7-Slice09.JPG": 9,
        "case_1_slice_77.png": -1,  # no such number in this run
        **{name: 12 for name in ("$16 bit$.png", "head.png", "head.jpg")},
    }
    assert "not known" in capsys.readouterr().out

    scores = [float(row["score"]) for row in rows]
    assert list(rows[0]) == ["name", "slice", "score", "percentile"]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    by_name = dict(zip(arrays["names"], arrays["score"]))
    assert all(float(row["score"]) == pytest.approx(by_name[row["name"]], abs=1e-4) for row in rows)
    assert all(int(row["slice"]) == labels[row["name"]] for row in rows)
    assert all(0 <= float(row["percentile"]) <= 100 for row in rows)

    pictures = {"case_441_slice_3.nii", "case_441_slice_30.nii", "P7-Slice09", "case_1_slice_77", "$16 bit$"}
    pictures = {f"{name}.png" for name in pictures | {"head.png", "head.jpg"}}
    files = {path.name for path in (run / "anomalies").iterdir()}
    assert files == pictures | {"anomalies.csv", "anomalies.npz"}
    assert len({Image.open(run / "anomalies" / name).size for name in pictures}) == 1


def test_the_same_grey_picture_gives_the_same_maps_in_any_format(run, mixed):
    _, arrays = examine(run, mixed, "--slice", 12)
    deep, head = (list(arrays["names"]).index(name) for name in ("$16 bit$.png", "head.png"))
    assert np.array_equal(arrays["anomaly_map"][deep], arrays["anomaly_map"][head])
    assert np.array_equal(arrays["restored"][deep], arrays["restored"][head])


def test_a_run_without_labels_knows_no_numbers(run_without_labels, mixed):
    _, arrays = examine(run_without_labels, mixed)
    assert (arrays["labels"] == -1).all()


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("case_001_slice_2.nii.png", 2),
        ("OAS1_0001_slice_031.png", 31),
        ("P7-Slice09.JPG", 9),
        ("slice 4.png", 4),
        ("head.png", None),
        ("slice.png", None),
        ("head_12.png", None),
        ("backslice_3.png", None),
    ],
)
def test_slice_number_of_a_name(name, number):
    assert dataset.slice_number(name) == number


# --------------------------------------------------------------------------------------
# What the numbers depend on
# --------------------------------------------------------------------------------------


def same(found, others, name):
    return np.array_equal(found[name], others[name])


def test_a_slice_does_not_depend_on_the_others(detector, slices):
    """To the bit: in another order, at another place of the batch, alone, and beside slices of another kind."""
    images, labels = slices
    found = detector.examine(images, labels)
    order = np.random.default_rng(0).permutation(len(images))
    again = detector.examine(images[order], labels[order])
    alone = detector.examine(images[7:8], labels[7:8])
    beside = detector.examine(np.concatenate([np.ones((3, 64, 64), np.float32), images[7:8]]), labels[[0, 1, 2, 7]])
    for name in ("surprise", "restored"):
        assert np.array_equal(found[name][order], again[name])
        assert np.array_equal(found[name][7], alone[name][0])
        assert np.array_equal(found[name][7], beside[name][-1])
    for name, values in found["terms"].items():
        assert np.array_equal(values[order], again["terms"][name])
        assert np.array_equal(values[7], alone["terms"][name][0])
    assert np.array_equal(detector.anomaly_map(found["terms"])[7], detector.anomaly_map(alone["terms"])[0])


def test_control_numbers_that_run_through_the_batch_depend_on_the_others(detector, slices, monkeypatch):
    images, labels = slices
    monkeypatch.setattr(np, "tile", lambda streams, count: np.arange(count * len(streams)))
    beside, alone = (detector.examine(images[part], labels[part])["restored"] for part in (slice(6, 8), slice(7, 8)))
    assert not np.array_equal(beside[-1], alone[0])


def test_the_seed_decides_the_restorations_and_not_the_surprise(detector, slices):
    images, labels = (part[:4] for part in slices)
    reseeded = copy.copy(detector)
    reseeded.seed = 1
    first, again, other = (each.examine(images, labels) for each in (detector, detector, reseeded))
    assert same(first, again, "restored") and not same(first, other, "restored")
    assert same(first, other, "surprise")


def test_the_label_counts(detector, slices):
    images, labels = (part[:4] for part in slices)
    assert not same(*(detector.examine(images, of) for of in (labels, labels + 9)), "surprise")


def validation_nats(detector, phantoms, known):
    split = dataset.load(phantoms, ("train", "validate"))["validate"]
    labels = split.labels if known else np.full_like(split.labels, -1)
    codes = dataset.codes_of(detector.vqvae, split.images.astype(np.float32) / 255)
    return dataset.in_batches(detector.pixelcnn.nll, codes, labels)


@pytest.mark.parametrize("known", [True, False])
def test_thresholds_are_percentiles_of_the_validation_slices(detect, phantoms, slices, known):
    """Of those that the prior is told as much of; and the score is the sum beyond."""
    detector = detect(known=known)
    nats = validation_nats(detector, phantoms, known)
    assert np.allclose([detector.redraw_above, detector.score_above], np.percentile(nats, [90, 98]), rtol=1e-5)
    images, labels = slices
    surprise = detector.examine(images, labels if known else np.full_like(labels, -1))["surprise"]
    expected = np.array([values[values > detector.score_above].sum() for values in surprise])
    assert np.allclose(detector.score(surprise), expected, rtol=1e-5) and len(set(expected)) > 3
    lower = [100 * np.mean(detector.scores < score) for score in detector.score(surprise)]
    assert np.allclose(detector.percentile(detector.score(surprise)), lower)


def test_only_codes_beyond_the_threshold_are_drawn_anew(detector, slices):
    images, labels = (part[:16] for part in slices)
    codes = dataset.codes_of(detector.vqvae, images)
    kept = detector.restore(codes, np.zeros(codes.shape), labels)
    assert np.allclose(kept, dataset.images_of(detector.vqvae, codes)[:, None], atol=1e-6)
    drawn = detector.restore(codes, np.full(codes.shape, np.inf), labels)
    assert not np.allclose(drawn, kept, atol=0.01)


def test_the_map_is_the_root_of_the_squared_logarithms_of_shares(detector):
    detector = copy.copy(detector)
    values = np.random.default_rng(0).exponential(size=100_000)
    detector.tails = {"term": detector.measure_tail(values)}
    points = np.array([0.5, 2.0, 4.0, 8.0])  # an exponential distribution has -ln p = value
    assert np.allclose(detector.anomaly_map({"term": points}), points, rtol=0.05, atol=0.02)
    detector.tails["other"] = detector.tails["term"]
    both = detector.anomaly_map({"term": points, "other": points})
    assert np.allclose(both, np.sqrt(2) * points, rtol=0.05, atol=0.03)


def test_a_changed_disk_stands_out(detector, slices):
    images, labels = slices
    subjects = np.arange(len(images))
    changed, disks = bench.change(images, subjects, "disk of 1", 0, range(len(images)))
    before, after = (detector.anomaly_map(detector.examine(of, labels)["terms"]) for of in (images, changed))
    assert after[disks].mean() > 1.5 * before[disks].mean()
    assert bench.average_precision(after.ravel(), disks.ravel()) > 3 * disks.mean()


# --------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------


def test_wrong_folders_are_refused(run, refuse, tmp_path):  # noqa: F811
    refuse(predict, ["--run", run, "--anomalies", tmp_path / "none"], "--anomalies", "none", "no such folder")
    (tmp_path / "notes.txt").write_text("no slice")
    refuse(predict, ["--run", run, "--anomalies", tmp_path], str(tmp_path), "no slices in it", "another folder")
    (run / "anomalies").mkdir(exist_ok=True)
    refuse(predict, ["--run", run, "--anomalies", run / "anomalies"], "overwrite", "another folder")


def test_a_broken_image_is_refused_and_the_old_table_stays(run, mixed, refuse, tmp_path):  # noqa: F811
    table = run / "anomalies" / "anomalies.csv"
    table.parent.mkdir(exist_ok=True)
    table.write_text("of before")
    folder = tmp_path / "slices"
    shutil.copytree(mixed, folder)
    cut(folder / "head.png")
    refuse(predict, ["--run", run, "--anomalies", folder], "1 unreadable", "head.png")
    assert table.read_text() == "of before"


def test_slice_numbers_that_the_run_does_not_know_are_refused(run, run_without_labels, mixed, refuse):  # noqa: F811
    refuse(predict, ["--run", run, "--anomalies", mixed, "--slice", LEVELS], "--slice", "0 to 31", "not 32")
    refuse(predict, ["--run", run_without_labels, "--anomalies", mixed, "--slice", 3], "--slice", "no slice numbers")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--anomalies x --slice 1 2", "one number"),
        ("--anomalies x --restorations 0", "--restorations must be from 1"),
        ("--anomalies x --complete", "leave out"),
        ("--anomalies x --num-samples 4", "leave out"),
        ("--anomalies x --temperature 0.5", "leave out"),
        ("--restorations 4", "--anomalies"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(arguments, expected, refuse):  # noqa: F811
    refuse(predict, arguments.split(), expected)


# --------------------------------------------------------------------------------------
# The bench
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", bench.KINDS)
def test_a_change_stays_in_its_disk_and_has_its_own_seed(kind, slices):
    images, _ = slices
    subjects = np.arange(len(images)) // 4
    changed, disks = bench.change(images, subjects, kind, 0, [3, 9])
    assert (changed != np.rint(255 * images[[3, 9]]) / np.float32(255))[disks].any()
    assert np.array_equal(changed[~disks], images[[3, 9]][~disks])
    assert not (disks & ~np.array([bench.head_of(image) for image in images[[3, 9]]])).any()
    assert np.array_equal(bench.change(images, subjects, kind, 0, [9])[0][0], changed[1])
    assert not np.array_equal(bench.change(images, subjects, kind, 1, [9])[0][0], changed[1])


def test_measures_of_the_bench():
    scores, truth = np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False])
    assert bench.average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert bench.average_precision(np.zeros(4), truth) == 0.5  # chance, in whatever order
    assert bench.best_dice(scores, truth) == pytest.approx(0.8)
    assert bench.auroc(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(3.5 / 4)
