"""Training: what is left of a run that was stopped, what does not change it, and what one GPU does differently."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
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
from conftest import ROOT, TINY, TRAINED, eagerly, files_in, killed_before, read_history, write_data, write_slices

# ---- A run that was stopped, or that has an unusual Keras ----------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and `fit`, which starts or continues another one with the same arguments."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_data(folder / "data", train=[1, 2, 3], validate=[402], test=[441])
    short = "--image-size 16 --vqvae-epochs 2 --vqvae-batch-size 3 --pixelcnn-epochs 2 --pixelcnn-blocks 1"

    def fit(run):
        with eagerly():
            return train.main(["--data", str(data), "--run", str(run), *TINY, *short.split()])

    assert fit(folder / "run") == 0
    return types.SimpleNamespace(run=folder / "run", data=data, fit=fit)


def assert_same_training(run, expected):
    for name in ("vqvae", "pixelcnn"):
        histories = [read_history(folder / f"{name}_history.csv") for folder in (run, expected)]
        assert histories[0] == [pytest.approx(row, rel=1e-6) for row in histories[1]]
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
    with modules.keras_defaults(), matplotlib.rc_context({"text.usetex": True}):  # what is set inside is put back
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("mixed_float16")
        keras.config.set_image_data_format("channels_first")
        keras.config.set_max_epochs(1)
        keras.config.set_max_steps_per_epoch(1)
        assert whole.fit(run) == predict.main(["--run", str(run)]) == 0
        assert keras.config.dtype_policy().name == "mixed_float16" and matplotlib.rcParams["text.usetex"]
        assert (keras.config.floatx(), keras.config.image_data_format()) == ("float64", "channels_first")
        assert keras.config.max_epochs() == keras.config.max_steps_per_epoch() == 1
    vqvae, pixelcnn = predict.load_run(train.Run(whole.run))
    test = dataset.load(whole.data, ("test",), 16)["test"]
    nats = pixelcnn.nll(vqvae.encode(dataset.to_float(test.images)), labels=test.slice_numbers).numpy().mean()
    assert json.loads((run / "report.json").read_text())["prior"]["nats_per_code"] == pytest.approx(nats, rel=1e-5)
    assert_same_training(run, whole.run)


def test_a_run_that_is_terminated_saves_its_last_epoch(data, tmp_path):
    """Long before a minute has passed. As a user or a queue does it: SIGTERM, after some epochs."""
    command = [sys.executable, "-u", ROOT / "train.py", "--data", data, "--run", tmp_path / "run", *TINY]
    command += ["--vqvae-epochs", "100000", "--image-size", "16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("vqvae: epoch 2 of"):
                process.send_signal(signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 130 and "give the same command again" in error and "Traceback" not in error
    rows, _ = saved(tmp_path / "run")
    assert len(rows) >= 2 and len(read_history(tmp_path / "run" / "vqvae_history.csv")) == len(rows)


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


def fit_point(folder, seed=0, kind=Point, epochs=2, how=eagerly, **fitted_on):
    """A stage of two epochs or so, the masks of its steps noted from none on; returns where the point is."""
    run = train.Run(folder)
    settings = train.Settings(seed, vqvae_batch_size=2, vqvae_learning_rate=1.0, cosine_decay=False)
    settings.vqvae_epochs = epochs
    folder.mkdir(exist_ok=True)
    if run.config is None:
        run.start(settings, folder, {}, False)
    stage = train.Stage(run, "vqvae", settings, **fitted_on)
    Point.masks.clear()
    with how():
        if not stage.finished_model():
            train.fit(stage, kind, (6, 1), lambda index: tf.gather(PLACES[:6], index[:, 0]), PLACES[6:])
    return float(keras.saving.load_model(folder / "vqvae.keras").place)


def loss_at(place):
    return pytest.approx(np.square(PLACES[6:] - place).mean(), rel=1e-5)


# config.json, history and last of two epochs; plot, the best, and config.json again; then the last is removed
KILLS = [*(("replace", None, number) for number in range(2, 9)), ("unlink", "vqvae_last.npz", 1)]


def test_the_best_model_is_that_of_a_row_wherever_a_run_was_killed(tmp_path, monkeypatch):
    """On another machine an epoch that is done again rounds otherwise: here it has other batches."""

    def losses_of(run, **options):
        """Of the epochs, after a look at whether the kept model is that of the best."""
        place, losses = fit_point(run, **options), [row["val_loss"] for row in read_history(run / "vqvae_history.csv")]
        assert min(losses) == loss_at(place)
        return losses

    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    losses = losses_of(tmp_path / "whole")
    assert losses[1] < losses[0] - 0.1
    for number, kill in enumerate(KILLS):
        with killed_before(*kill):
            fit_point(tmp_path / str(number))
        assert len(losses_of(tmp_path / str(number), seed=1)) == 2, kill
        assert files_in(tmp_path / str(number)) == files_in(tmp_path / "whole"), kill


def test_a_stage_is_not_continued_on_the_codes_of_another_vqvae(tmp_path):
    with killed_before("replace", "vqvae.keras"):
        fit_point(tmp_path, vqvae="one")
    with pytest.raises(dataset.UserError, match=r"vqvae_last.npz was fitted on the codes of another vqvae.keras: del"):
        fit_point(tmp_path, vqvae="another")
    fit_point(tmp_path, vqvae="one")  # control


def test_ctrl_c_at_the_end_of_an_epoch_saves_what_belongs_together(tmp_path, monkeypatch):
    """It comes when the weights of the second epoch are taken, and the optimizer is not."""
    convert = keras.ops.convert_to_numpy

    def convert_or_stop(variable):
        if variable.name == "iteration" and variable == 6:
            raise KeyboardInterrupt
        return convert(variable)

    monkeypatch.setattr(keras.ops, "convert_to_numpy", convert_or_stop)
    with pytest.raises(KeyboardInterrupt):
        fit_point(tmp_path)
    (row,), last = saved(tmp_path)
    assert last["last0"] == last["best0"] and row["val_loss"] == loss_at(last["last0"])


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


def test_a_loss_that_is_not_a_number_stops_the_stage_and_the_best_epoch_is_kept(tmp_path):
    """Epochs end at 3, 6, and so on. exp(5 * 17) is a float32, exp(5 * 18) is not: it happens in the sixth epoch."""
    with pytest.raises(dataset.UserError, match=r"not a number in epoch 6;.*Lower --vqvae-learning-rate"):
        fit_point(tmp_path, kind=Runaway, epochs=8)
    rows, last = saved(tmp_path)
    assert len(read_history(tmp_path / "vqvae_history.csv")) == len(rows) == 5
    assert (last["last0"], last["best0"]) == pytest.approx((15, 3), rel=1e-4)
    assert fit_point(tmp_path, kind=Runaway, epochs=5) == pytest.approx(3, rel=1e-4)
    # Nothing depends on the terms of the quantizer.
    rows = [{"val_loss": 0.2, "val_quantizer_loss": 0.0}, {"val_loss": 0.6, "val_quantizer_loss": 0.5}]
    assert min(rows, key=train.selection_loss) is rows[1]


# ---- Optimizers ----------------------------------------------------------------------


def make_optimizer(steps, cosine_decay=False, **settings):
    """The optimizer of ten epochs of a PixelCNN, by default of Adam at a learning rate of 0.5."""
    numbers = {"epochs": 10, "learning_rate": 0.5, "warmup_epochs": 0, "muon": False, "clip_norm": 0.0, **settings}
    settings = train.Settings(cosine_decay=cosine_decay, **{f"pixelcnn_{key}": numbers[key] for key in numbers})
    return train.stage_optimizer(train.Stage(train.Run(pathlib.Path("none")), "pixelcnn", settings), steps)


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


@pytest.mark.parametrize("muon", [True, False])
def test_gradients_are_shortened_where_a_norm_is_given(muon):
    assert [make_optimizer(1, muon=muon, clip_norm=norm).global_clipnorm for norm in (1.0, 0.0)] == [1.0, None]


def test_muon_takes_the_1x1_convolutions_alone():
    settings = train.Settings(pixelcnn_filters=8, pixelcnn_blocks=1, num_embeddings=8, image_size=16, scores=2)
    model, optimizer = train.make_pixelcnn(settings, range(3), below=True), make_optimizer(1, muon=True)
    optimizer.build(model.trainable_variables)
    by_muon = [v.path for v, velocity in zip(model.trainable_variables, optimizer.adam_velocities) if velocity is None]
    (block,), (context,) = model.blocks, model.contexts
    dense = [block.narrow, block.widen, context.narrow, *model.head[:2]]
    assert sorted(by_muon) == sorted(layer.kernel.path for layer in dense)
    assert model.head[2].kernel.path not in by_muon and len(set(by_muon)) == 5


# ---- What the prior is fitted on -----------------------------------------------------


def made_for_pixelcnn(folder, slices, **settings):
    """What `train.fit_pixelcnn` gives to `train.fit`, by name, and the VQ-VAE, which is not fitted."""
    settings = train.Settings(**{"pixelcnn_filters": 2, "pixelcnn_blocks": 1, **settings})
    run, vqvae, made = train.Run(folder), train.make_vqvae(settings), {}
    run.start(settings, folder, {}, False)
    run.config["finished"]["vqvae"] = {"sha256": ""}
    with pytest.MonkeyPatch.context() as patched:
        names = "make_model", "counts", "prepare"
        patched.setattr(train, "fit", lambda stage, *values: made.update(zip(names, values)))
        train.fit_pixelcnn(run, settings, vqvae, slices, slices[:2])
    return types.SimpleNamespace(vqvae=vqvae, **made)


def test_slices_without_a_name_do_not_narrow_the_drawn_scores(data, tmp_path):
    """Sixteen of them beside four heads: counted as heads, all at the mean, they would halve the spread."""
    write_data(data, train=[3, 4])
    write_slices(data / "keras_png_slices_train", [f"{letter}.png" for letter in "abcdefghijklmnop"])
    slices = dataset.load_split(data / "keras_png_slices_train", "train", 16)
    made = made_for_pixelcnn(tmp_path, slices, image_size=16, filters=(4,), scores=2, augmentations=0)
    images, model = dataset.to_float(slices.images), made.make_model()
    scores = modules.project(images, modules.principal_components(images, 2))
    scores /= scores.std(axis=0)
    for number in (0, 1):
        of_heads, drawn = scores[slices.slice_numbers == number], model.draw_scores(np.full(5000, number), seed=0)
        np.testing.assert_allclose(np.std(drawn, axis=0), of_heads.std(axis=0, ddof=1), rtol=0.1)


def test_every_condition_belongs_to_its_picture(phantoms, tmp_path):
    """A quarter of the variants is unchanged; changes, scores and the slice below are those of the picture."""
    slices = dataset.load_split(phantoms / "keras_png_slices_train", "train")[:64]
    made = made_for_pixelcnn(tmp_path, slices, augmentations=12)
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

    scores_of = made.make_model().head_scores.of

    def matches(variant, changes):
        """Whether codes and scores are those of the slice, or of its mirror image, changed like this."""
        for image in (slices.images[41], slices.images[41, ::-1]):
            picture = dataset.to_float(dataset.change(image, changes[:-1]) if changes.any() else image)[None]
            agreeing = (made.vqvae.encode(picture)[0].numpy() == batch["codes"][variant]).mean()
            if agreeing > 0.98 and np.abs(scores_of(picture)[0] - batch["scores"][variant]).max() < 0.02:
                return True
        return False

    assert all(matches(variant, batch["changes"][variant]) for variant in range(16))
    assert not any(matches(variant, variants_of(3)["changes"][variant]) for variant in np.flatnonzero(~unchanged))


# ---- What one GPU does differently, on a CPU -----------------------------------------


@pytest.mark.parametrize("flags, compiled", [("", True), ("--original", False)])
def test_a_card_can_fit_both_models(flags, compiled):
    """XLA compiles the steps. No variable is int32: these stay on the host, where a compiled step cannot read them."""
    small = "--image-size 16 --filters 4 8 --decoder-blocks 1 --pixelcnn-filters 4 --pixelcnn-blocks 1"
    settings, _ = train.parse_arguments(f"{flags} {small}".split())
    vqvae = train.make_vqvae(settings)
    pixelcnn = train.make_pixelcnn(settings, range(32) if settings.labels else (), below=settings.below)
    codes = {"codes": tf.zeros((2, *pixelcnn.grid), tf.int32), **pixelcnn.conditioning.unknown(2)}
    for name, model, batch in (("vqvae", vqvae, tf.ones((2, 16, 16, 1))), ("pixelcnn", pixelcnn, codes)):
        stage = train.Stage(train.Run(pathlib.Path("none")), name, settings)
        model.compile(train.stage_optimizer(stage, steps_per_epoch=1), jit_compile=compiled, run_eagerly=not compiled)
        assert np.isfinite(model.fit(batch, verbose=0).history["loss"]).all()
        variables = model.variables + model.optimizer.variables + [v for m in model.metrics for v in m.variables]
        others = {v.path.split("/")[-1]: v.dtype for v in variables if v.dtype not in ("int64", "float32")}
        assert others == ({"axes": "float64"} if getattr(model, "num_scores", 0) else {})
