"""Training: what is left of a run that was stopped, what does not change it, and what one GPU does differently."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import types

import dataset
import modules
import predict
import train

import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY, TRAINED, eagerly, files_in, killed_before, read_history, write_data
from PIL import Image

# ---- A run that was stopped, or that has an unusual Keras ----------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and `fit`, which starts or continues another one with the same arguments."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_data(folder / "data", train=[1, 2, 3], validate=[402], test=[441])
    short = "--image-size 16 --vqvae-epochs 2 --vqvae-batch-size 3 --pixelcnn-epochs 2 --pixelcnn-residual-blocks 1"

    def fit(run):
        with eagerly():
            return train.main(["--data", str(data), "--run", str(run), *TINY, *short.split()])

    assert fit(folder / "run") == 0
    return types.SimpleNamespace(run=folder / "run", data=data, fit=fit)


def assert_same_training(run, expected):
    for name in ("vqvae", "pixelcnn"):
        rows, expected_rows = (read_history(folder / f"{name}_history.csv") for folder in (run, expected))
        assert rows == [pytest.approx(row, rel=1e-6) for row in expected_rows]
        models = [keras.saving.load_model(folder / f"{name}.keras") for folder in (run, expected)]
        for weight, expected_weight in zip(*(model.weights for model in models), strict=True):
            np.testing.assert_allclose(weight, expected_weight, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_stopped_run_ends_as_the_uninterrupted_one(whole, tmp_path, monkeypatch, capsys):
    """The disk is full once; then killed before two files have their names."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".partial.npz").symlink_to("/dev/full")
    monkeypatch.setattr(train, "SAVE_EVERY", -1)  # after every epoch
    assert whole.fit(run) == 2
    assert f"{run / 'vqvae_last.npz'} cannot be written (No space left on device)" in capsys.readouterr().err
    for name, number in (("vqvae.keras", 1), ("pixelcnn_last.npz", 2)):
        with killed_before("replace", name, number):
            whole.fit(run)
    with np.load(run / "pixelcnn_last.npz") as last:
        assert json.loads(str(last["rows"]))[0] == {"vqvae": train.checksum(run / "vqvae.keras")}
    assert whole.fit(run) == 0
    assert files_in(run) == sorted(TRAINED)
    assert_same_training(run, whole.run)


def test_what_a_user_has_set_changes_nothing_and_is_back_afterwards(whole, tmp_path):
    run = tmp_path / "run"
    settings = {"floatx": "float64", "image_data_format": "channels_first", "max_epochs": 1, "max_steps_per_epoch": 1}
    with modules.keras_defaults(), matplotlib.rc_context({"text.usetex": True}):  # what is set inside is put back
        for name, value in {**settings, "dtype_policy": "mixed_float16"}.items():
            getattr(keras.config, f"set_{name}")(value)
        assert whole.fit(run) == predict.main(["--run", str(run)]) == 0
        assert {name: getattr(keras.config, name)() for name in settings} == settings
        assert keras.config.dtype_policy().name == "mixed_float16" and matplotlib.rcParams["text.usetex"]
    vqvae, prior = (keras.saving.load_model(whole.run / f"{name}.keras") for name in ("vqvae", "pixelcnn"))
    test = dataset.load(whole.data, ("test",), 16)["test"]
    nats = prior.nll(vqvae.encode(test.images), labels=test.slice_numbers).mean()
    assert json.loads((run / "report.json").read_text())["prior"]["nats_per_code"] == pytest.approx(nats, rel=1e-5)
    assert_same_training(run, whole.run)


def test_a_run_that_is_terminated_saves_what_belongs_together(whole, tmp_path, capsys):
    """Long before a minute has passed: SIGTERM comes between the weights of the second epoch and its optimizer."""
    convert = keras.ops.convert_to_numpy

    def stop_and_convert(variable):
        if variable.path.endswith("iteration") and variable == 4:
            signal.raise_signal(signal.SIGTERM)
        return convert(variable)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keras.ops, "convert_to_numpy", stop_and_convert)
        assert whole.fit(tmp_path) == 130
    assert capsys.readouterr().err == "train.py: stopped; give the same command again\n"
    assert len(saved(tmp_path)[0]) == len(read_history(tmp_path / "vqvae_history.csv")) == 1
    assert whole.fit(tmp_path) == 0
    assert_same_training(tmp_path, whole.run)


def saved(run):
    """What a stopped training of the VQ-VAE goes on from: its rows, and the arrays by name."""
    with np.load(run / "vqvae_last.npz") as last:
        return json.loads(str(last["rows"]))[1], dict(last)


# ---- The same, of a model that is fitted in no time ----------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Point(keras.Model):
    """Learns the place of numbers, with two dropout masks that it notes."""

    masks = []  # noqa: RUF012

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drops = [keras.layers.Dropout(0.5), keras.layers.Dropout(0.5)]
        self.place = self.add_weight(name="place", shape=(), initializer="zeros")
        self.built = True

    def call(self, numbers, training=False):
        if training:
            masks = [drop(tf.ones((64,)), training=True) > 0 for drop in self.drops]
            tf.numpy_function(lambda *both: Point.masks.append([mask.tobytes() for mask in both]), masks, [])
        return numbers

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return tf.reduce_mean(tf.square(y_pred - self.place))


PLACES = np.random.default_rng(0).normal(5, 3, 11).astype("float32")  # 6 to learn from, 3 steps an epoch; 5 to validate


def fit_point(folder, seed=0, epochs=2, how=eagerly):
    """A stage of two epochs or so, the masks of its steps noted from none on; returns where the point is."""
    run = train.Run(folder)
    numbers = {"vqvae_batch_size": 2, "vqvae_learning_rate": 1.0, "vqvae_epochs": epochs}
    settings = train.Settings(seed, cosine_decay=False, **numbers)
    folder.mkdir(exist_ok=True)
    if run.config is None:
        run.start(settings, folder, {}, False)
    stage = train.Stage(run, "vqvae", settings)
    Point.masks.clear()
    with how():
        if not stage.finished_model():
            train.fit(stage, Point, (6, 1), lambda index: tf.gather(PLACES[:6], index[:, 0]), PLACES[6:])
    return float(keras.saving.load_model(folder / "vqvae.keras").place)


def test_the_best_model_is_that_of_a_row_wherever_a_run_was_killed(tmp_path, monkeypatch):
    """On another machine an epoch that is done again rounds otherwise: here it has other batches."""

    def losses_of(run, **options):
        """Of the epochs, after a look at whether the kept model is that of the best."""
        place, losses = fit_point(run, **options), [row["val_loss"] for row in read_history(run / "vqvae_history.csv")]
        assert min(losses) == pytest.approx(np.square(PLACES[6:] - place).mean(), rel=1e-5)
        return losses

    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    losses = losses_of(tmp_path / "whole")
    assert losses[1] < losses[0] - 0.1
    # config.json, history and last of two epochs; plot, the best, and config.json again; then the last is removed
    for kill in [*(("replace", None, number) for number in range(2, 9)), ("unlink", "vqvae_last.npz", 1)]:
        run = tmp_path / str(kill)
        with killed_before(*kill):
            fit_point(run)
        assert len(losses_of(run, seed=1)) == 2 and files_in(run) == files_in(tmp_path / "whole"), kill


@pytest.mark.parametrize("seconds, savings", [(61, 4), (1, 1)])
def test_a_training_is_saved_once_a_minute_and_when_it_ends(seconds, savings, tmp_path, monkeypatch):
    """Whatever the clock says: it is set back all the time. So many seconds pass between two looks at a watch."""
    clock, watch, saved, write = itertools.count(10**9, -3600), itertools.count(0, seconds), [], dataset.write_whole
    monkeypatch.setattr(train, "time", types.SimpleNamespace(time=clock.__next__, monotonic=watch.__next__))
    monkeypatch.setattr(dataset, "write_whole", lambda path, how: (saved.append(path.name), write(path, how)))
    fit_point(tmp_path, epochs=4)
    assert saved.count("vqvae_last.npz") == savings


def test_no_two_steps_share_a_dropout_mask_and_resuming_repeats_none(tmp_path, monkeypatch):
    """Traced, for a seed that was baked into the graph would be the same in every step."""

    def masks_of(run, **options):
        fit_point(tmp_path / run, how=contextlib.nullcontext, **options)
        return list(Point.masks)

    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    masks = masks_of("whole")
    assert len(masks) == 6 and len({mask for step in masks for mask in step}) == 12
    with killed_before("replace", "vqvae_last.npz", 2):
        masks_of("killed")
    assert masks_of("killed") == masks[3:]  # the second epoch, again
    assert not {mask for step in masks for mask in step} & {mask for step in masks_of("other", seed=1) for mask in step}


def test_a_loss_that_is_not_a_number_stops_the_stage_and_the_best_epoch_is_kept(tmp_path, monkeypatch):
    """Steps of 1: epochs end at 3, 6, and so on. exp(5 * 17) is a float32, exp(5 * 18), in the sixth epoch, is not."""
    loss = lambda self, *batch, **options: tf.exp(5 * tf.stop_gradient(self.place)) - self.place  # noqa: E731
    monkeypatch.setattr(Point, "compute_loss", loss)
    with pytest.raises(dataset.UserError, match=r"not a number in epoch 6;.*Lower --vqvae-learning-rate"):
        fit_point(tmp_path, epochs=8)
    rows, last = saved(tmp_path)
    assert len(read_history(tmp_path / "vqvae_history.csv")) == len(rows) == 5
    assert (last["last0"], last["best0"]) == pytest.approx((15, 3), rel=1e-4)
    assert fit_point(tmp_path, epochs=5) == pytest.approx(3, rel=1e-4)
    # Nothing depends on the terms of the quantizer.
    rows = [{"val_loss": 0.2, "val_quantizer_loss": 0.0}, {"val_loss": 0.6, "val_quantizer_loss": 0.5}]
    assert min(rows, key=train.selection_loss) is rows[1]


@pytest.mark.parametrize("warmup, rises_until", [(0, 0), (2, 20), (50, 50)])
@pytest.mark.parametrize("cosine_decay", [True, False])
def test_a_learning_rate_rises_and_falls_to_nothing_or_stays(warmup, rises_until, cosine_decay):
    """A warm-up takes half of the training at most."""
    optimizer, steps, rates = train.make_optimizer(0.5, 10, 10, warmup, cosine_decay), np.arange(101), []
    for step in steps:
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    later = 0.25 + 0.25 * np.cos(np.pi * (steps - rises_until) / (100 - rises_until)) if cosine_decay else 0.5
    np.testing.assert_allclose(rates, np.where(steps < rises_until, steps / max(2 * rises_until, 1), later), atol=1e-6)


def test_muon_takes_the_1x1_convolutions_alone_and_gradients_are_shortened_where_a_norm_is_given():
    settings = train.Settings(pixelcnn_filters=8, pixelcnn_residual_blocks=1, image_size=16)
    stage = train.Stage(train.Run(pathlib.Path("none")), "pixelcnn", settings)
    model, optimizer = train.make_prior(settings, range(3), below=True), train.stage_optimizer(stage, 1)
    optimizer.build(model.trainable_variables)
    by_muon = [v.path for v, velocity in zip(model.trainable_variables, optimizer.adam_velocities) if velocity is None]
    (context, block), (*last, logits) = model.network.trunk, model.network.last
    dense = {layer.kernel.path for layer in (block.narrow, block.widen, context.narrow, *last)}
    assert {*by_muon} == dense and len(by_muon) == 5 and logits.kernel.path not in by_muon
    for muon, norm in itertools.product((True, False), (2.0, None)):
        assert train.make_optimizer(0.5, 1, 1, clip_norm=norm or 0, muon=muon).global_clipnorm == norm


@pytest.mark.parametrize("count", [1, 100])
def test_a_plot_shows_every_curve_and_says_what_the_prior_knows(count, tmp_path, monkeypatch):
    """Of one epoch too: a line of one point is nothing without a marker."""
    columns, figures = ("epoch", "loss", "val_loss", "perplexity", "val_perplexity"), []
    rows = [dict.fromkeys(columns, i + 1.0) for i in range(count)]
    monkeypatch.setattr(dataset, "write_figure", lambda path, figure: figures.append(figure))
    stage = train.Stage(train.Run(tmp_path), "pixelcnn", train.Settings())
    train.plot_history(stage, rows, types.SimpleNamespace(num_scores=4, below=True))
    loss, perplexity = figures[0].axes
    assert (loss.get_yscale(), perplexity.get_yscale()) == ("log", "linear")
    for line in (*loss.lines, *perplexity.lines):
        assert len(line.get_xdata()) > 1 or line.get_marker() != "None"
    legend = [text.get_text() for text in loss.get_legend().texts]
    assert legend[0] == "training: scores and slice below hidden half of the time" and len(legend) == len(loss.lines)
    assert legend[1] == "validation: slice number alone"


# ---- What the models are fitted on ---------------------------------------------------


@pytest.mark.parametrize(
    "degrees, axis, said", [(0, 1, "up and down"), (90, 2, "left and right"), (45, None, "is not")]
)
def test_the_axis_along_which_heads_are_mirrored_is_kept(degrees, axis, said, phantoms, tmp_path, monkeypatch, capsys):
    """Heads that lie on their side, or stand upright. Turned by 45 degrees they have no mirror axis."""
    data, made = shutil.copytree(phantoms, tmp_path / "data"), []
    for path in data.rglob("*.png"):
        Image.open(path).rotate(degrees).save(path)
    monkeypatch.setattr(train, "fit", lambda stage, model, counts, prepare, _: made.append((counts[1], prepare)))
    monkeypatch.setattr(train, "fit_pixelcnn", lambda *arguments: None)
    for flag in ("--mirror", "--no-mirror"):
        assert train.main(["--data", str(data), "--run", str(tmp_path / flag), "--image-size", "32", flag]) == 0
        assert said in capsys.readouterr().out or flag == "--no-mirror"
    assert [train.Run(tmp_path / flag).mirror_axis for flag in ("--mirror", "--no-mirror")] == [axis, None]
    assert [variants for variants, _ in made] == [1 if axis is None else 2, 1]
    images = made[0][1](np.array([[5, 0], [5, made[0][0] - 1]]))[..., 0]  # of the sixth slice, the first and the last
    assert axis is None or np.array_equal(images[1], np.flip(images[0], axis - 1))


def made_for_pixelcnn(folder, slices, mirror_axis=1, **settings):
    """What `train.fit_pixelcnn` gives to `train.fit`, by name, and the VQ-VAE, which is not fitted."""
    settings = train.Settings(**{"pixelcnn_filters": 2, "pixelcnn_residual_blocks": 1, **settings})
    run, vqvae, made = train.Run(folder), train.make_vqvae(settings), {}
    run.start(settings, folder, {}, False, mirror_axis)
    run.config["finished"]["vqvae"] = {"sha256": ""}
    with pytest.MonkeyPatch.context() as patched:
        names = "make_model", "counts", "prepare"
        patched.setattr(train, "fit", lambda stage, *values: made.update(zip(names, values)))
        train.fit_pixelcnn(run, settings, vqvae, slices, slices[:2])
    return types.SimpleNamespace(vqvae=vqvae, **made)


def test_slices_without_a_name_do_not_narrow_the_drawn_scores():
    """Sixteen of them beside four heads: counted as heads, all at the mean, they would halve the spread."""
    images, labels = np.random.default_rng(0).random((24, 8, 8, 1), np.float32), np.array([0, 1] * 4 + [-1] * 16)
    scores = modules.HeadScores(2, 2, num_pixels=64)
    scores.fit(images, labels, heads=np.array([0, 0, 1, 1, 2, 2, 3, 3, *range(4, 20)]))
    for label in (0, 1):
        drawn, of_heads = scores.draw(np.full(5000, label), seed=0), scores.of(images[labels == label])
        np.testing.assert_allclose(drawn.std(axis=0), of_heads.std(axis=0, ddof=1), rtol=0.1)


@pytest.mark.parametrize("mirror_axis", [1, 2])
def test_every_condition_belongs_to_its_picture(mirror_axis, phantoms, tmp_path):
    """A quarter of the variants is unchanged; changes, scores and the slice below are those of the picture."""
    slices = dataset.load_split(phantoms / "keras_png_slices_train", "train")[:64]
    made = made_for_pixelcnn(tmp_path, slices, mirror_axis, augmentations=12)
    assert tuple(made.counts) == (64, 16)

    def variants_of(example):
        """All variants of one slice, as arrays."""
        index = tf.stack([tf.fill((16,), example), tf.range(16)], axis=1)
        return {name: values.numpy() for name, values in made.prepare(index).items()}

    lower, batch = variants_of(40), variants_of(41)
    unchanged = (batch["changes"] == 0).all(axis=1)
    assert unchanged.sum() == 4 and (batch["changes"][~unchanged, -1] == 1).all()
    assert (batch["labels"] == 9).all() and (variants_of(32)["below"] == -1).all()
    np.testing.assert_array_equal(batch["below"], lower["codes"])
    np.testing.assert_array_equal(batch["changes"], lower["changes"])  # of the whole head

    mirrored, scores_of = np.flip(slices.images[41], mirror_axis - 1), made.make_model().head_scores.of

    def matches(variant, changes):
        """Whether codes and scores are those of the slice, or of its mirror image, changed like this."""
        both = [slices.images[41], mirrored]
        both = dataset.to_float([dataset.change(image, changes[:-1]) if changes.any() else image for image in both])
        agreeing = (made.vqvae.encode(both) == batch["codes"][variant]).mean(axis=(1, 2))
        return ((agreeing > 0.98) & (np.abs(scores_of(both) - batch["scores"][variant]).max(axis=1) < 0.02)).any()

    assert all(matches(variant, batch["changes"][variant]) for variant in range(16))
    assert not any(matches(variant, variants_of(3)["changes"][variant]) for variant in np.flatnonzero(~unchanged))


@pytest.mark.parametrize("flags, compiled", [("", True), ("--original", False)])
def test_one_card_can_fit_both_models(flags, compiled):
    """XLA compiles the steps. No variable is int32: these stay on the host, where a compiled step cannot read them."""
    small = "--image-size 16 --vqvae-filters 4 8 --pixelcnn-filters 4 --pixelcnn-residual-blocks 1"
    settings, _ = train.parse_arguments(f"{flags} {small}".split())
    vqvae = train.make_vqvae(settings)
    prior = train.make_prior(settings, range(32) if settings.labels else (), below=settings.below)
    codes = {"codes": tf.zeros((2, *prior.grid), tf.int32), **prior.unknown(2)}
    for name, model, batch in (("vqvae", vqvae, tf.ones((2, 16, 16, 1))), ("pixelcnn", prior, codes)):
        stage = train.Stage(train.Run(pathlib.Path("none")), name, settings)
        model.compile(train.stage_optimizer(stage, steps_per_epoch=1), jit_compile=compiled, run_eagerly=not compiled)
        assert np.isfinite(model.fit(batch, verbose=0).history["loss"]).all()
        variables = model.variables + model.optimizer.variables + [v for m in model.metrics for v in m.variables]
        assert {v.dtype for v in variables} <= {"int64", "float32"}
