"""Training: what is left of a run that was stopped, the optimizers, and what one GPU does differently."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import dataset
import train

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, TINY, TRAINED, eagerly, files_in, read_history, write_data, write_slices

# --------------------------------------------------------------------------------------
# A run that was stopped
# --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is tidied up."""


def kill_before_rename(monkeypatch, number, name="", replace=os.replace):
    """Let train.py be killed when it is about to give a file (of that name) its final name, for that many-th time."""
    renamed = []

    def rename_or_die(source, target):
        renamed.append(os.path.basename(target))
        if renamed[-1] == (name or renamed[-1]) and (renamed.count(name) if name else len(renamed)) == number:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(dataset.os, "replace", rename_or_die)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
@eagerly()
def test_stopped_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch, capsys):
    """The disk is full once; then killed before two files have their names."""
    data, start = write_data(tmp_path / "data", train=[1, 2, 3], validate=[402], test=[441]), train.Run.start
    runs = run, whole = tmp_path / "run", tmp_path / "whole"
    shorter = ["--vqvae-epochs", "2", "--vqvae-batch-size", "3", "--pixelcnn-epochs", "2", "--pixelcnn-blocks", "1"]

    def fit(run):
        return train.main(["--data", str(data), "--run", str(run), *TINY, *shorter])

    def open_and_fill(*arguments):
        start(*arguments)
        (run / "partial.npz").symlink_to("/dev/full")

    assert fit(whole) == 0
    monkeypatch.setattr(train, "SAVE_EVERY", -1)  # after every epoch
    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "start", open_and_fill)
        assert fit(run) == 2
    assert f"{run / 'vqvae_last.npz'} cannot be written (No space left on device)" in capsys.readouterr().err
    for name, number in (("vqvae.keras", 1), ("pixelcnn_last.npz", 2)):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_before_rename(patched, number, name)
            fit(run)
    assert fit(run) == 0
    assert files_in(run) == sorted(TRAINED)
    for name in ("vqvae", "pixelcnn"):
        history, expected = (read_history(folder / f"{name}_history.csv") for folder in runs)
        assert history == [pytest.approx(row, rel=1e-6) for row in expected]
        model, expected = (keras.saving.load_model(folder / f"{name}.keras") for folder in runs)
        for weight, expected_weight in zip(model.weights, expected.weights, strict=True):
            np.testing.assert_allclose(weight, expected_weight, rtol=1e-4, atol=1e-6)


def test_a_run_that_is_told_to_stop_saves_its_last_epoch(data, tmp_path):
    """Long before a minute has passed. As a user or a queue does it: SIGTERM, after some epochs."""
    command = [sys.executable, "-u", ROOT / "train.py", "--data", data, "--run", tmp_path / "run", *TINY]
    command += ["--vqvae-epochs", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("vqvae: epoch 2 of"):
                process.send_signal(signal.SIGTERM)
        error = process.stderr.read()
    assert process.returncode == 130 and "give the same command again" in error and "Traceback" not in error
    with np.load(tmp_path / "run" / "vqvae_last.npz") as last:
        _, rows = json.loads(str(last["rows"]))
    assert len(rows) >= 2 and len(read_history(tmp_path / "run" / "vqvae_history.csv")) == len(rows)


@keras.saving.register_keras_serializable(package="tests")
class Point(keras.Model):
    """Learns the place of numbers, with two dropout masks that it shows: a model that is fitted in no time."""

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


def fit_point(run, seed=0, kind=Point, epochs=2, how=eagerly):
    """`train.fit` of two epochs or so, the masks of its steps noted from none on: the stage."""
    run.mkdir(exist_ok=True)
    settings = train.Settings(seed, vqvae_batch_size=2, vqvae_learning_rate=1.0, cosine_decay=False)
    settings.vqvae_epochs = epochs
    opened = train.Run(run)
    if opened.config is None:
        opened.start(settings, run, {}, False)
    stage = train.Stage(opened, "vqvae", settings)
    Point.masks.clear()
    with how():
        train.fit(stage, kind, (6, 1), lambda index: tf.gather(PLACES[:6], index[:, 0]), PLACES[6:])
    return stage


def loss_at(place):
    return pytest.approx(np.square(PLACES[6:] - place).mean(), rel=1e-5)


def place_of(stage):
    return float(keras.saving.load_model(stage.run.folder / "vqvae.keras").place)


FILES_OF_A_STAGE = 8  # config.json, history and last of two epochs; the best, plot, and config.json again


def test_the_best_model_is_that_of_a_row_wherever_a_run_was_killed(tmp_path, monkeypatch):
    """On another machine an epoch that is done again rounds otherwise: here it has other batches."""

    def losses_of(stage):
        """Of the epochs, after a look at whether the kept model is that of the best."""
        losses = [row["val_loss"] for row in read_history(stage.history)]
        assert min(losses) == loss_at(place_of(stage))
        return losses

    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    losses = losses_of(fit_point(tmp_path / "whole"))
    assert losses[1] < losses[0] - 0.1
    for number in range(2, FILES_OF_A_STAGE + 1):
        run = tmp_path / str(number)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_before_rename(patched, number)
            fit_point(run)
        assert len(losses_of(fit_point(run, seed=1))) == 2, number
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
    with np.load(tmp_path / "vqvae_last.npz") as last:
        _, (row,) = json.loads(str(last["rows"]))
        assert last["last0"] == last["best0"] and row["val_loss"] == loss_at(last["last0"])


@pytest.mark.parametrize("save_every, savings", [(-1, 4), (60, 1)])
def test_a_training_is_saved_once_a_minute_and_when_it_ends(save_every, savings, tmp_path, monkeypatch):
    saved, write = [], dataset.write_whole
    monkeypatch.setattr(train, "SAVE_EVERY", save_every)
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
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_before_rename(patched, 2, "vqvae_last.npz")
        masks_of("killed")
    assert masks_of("killed") == masks[3:]  # the second epoch, again
    assert not {mask for step in masks for mask in step} & {mask for step in masks_of("other", seed=1) for mask in step}


def test_a_loss_that_is_not_a_number_stops_the_stage(tmp_path):
    """exp(5 * 17) is a float32, exp(5 * 18) is not: it happens in the sixth epoch."""
    with pytest.raises(dataset.UserError, match=r"not a number in epoch 6;.*Lower --vqvae-learning-rate"):
        fit_point(tmp_path, kind=Runaway, epochs=8)
    assert len(read_history(tmp_path / "vqvae_history.csv")) == 5
    with np.load(tmp_path / "vqvae_last.npz") as last:
        assert (last["last0"], last["best0"]) == pytest.approx((15, 3), rel=1e-4)


# --------------------------------------------------------------------------------------
# Optimizers
# --------------------------------------------------------------------------------------


def make_optimizer(steps, **settings):
    """The optimizer of ten epochs of a PixelCNN, by default of Adam at a learning rate of 0.5."""
    numbers = {"epochs": 10, "learning_rate": 0.5, "warmup_epochs": 0, "muon": False, "clip_norm": 0.0, **settings}
    decay = numbers.pop("cosine_decay", False)
    settings = train.Settings(cosine_decay=decay, **{f"pixelcnn_{name}": value for name, value in numbers.items()})
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
    model = train.make_pixelcnn(train.Settings(pixelcnn_filters=8, pixelcnn_blocks=1, num_embeddings=8), range(3))
    optimizer = make_optimizer(1, muon=True)
    optimizer.build(model.trainable_variables)
    by_muon = [v.path for v, velocity in zip(model.trainable_variables, optimizer.adam_velocities) if velocity is None]
    (block,), (context,) = model.blocks, model.contexts
    dense = [block.narrow, block.widen, context.narrow, *model.head[:2]]
    assert sorted(by_muon) == sorted(layer.kernel.path for layer in dense)
    assert model.head[2].kernel.path not in by_muon and len(set(by_muon)) == 5


# --------------------------------------------------------------------------------------
# What the prior is made of
# --------------------------------------------------------------------------------------


def test_slices_without_a_name_do_not_narrow_the_drawn_scores(tmp_path, monkeypatch):
    """Sixteen of them beside four heads: counted as heads, all at the mean, they would halve the spread."""
    data = write_data(tmp_path / "data", train=[1, 2, 3, 4], validate=[402], test=[441])
    write_slices(data / "keras_png_slices_train", [f"{letter}.png" for letter in "abcdefghijklmnop"])
    settings = train.Settings(filters=(4, 4), pixelcnn_filters=2, pixelcnn_blocks=1, scores=2, augmentations=0)
    with pytest.warns(UserWarning, match="subjects cannot be told apart"):
        splits, made = dataset.load(data), []
    run = train.Run(tmp_path / "run")
    run.config = {"finished": {"vqvae": {"sha256": ""}}}
    monkeypatch.setattr(train, "fit", lambda stage, make_model, *others: made.append(make_model()))
    train.fit_pixelcnn(run, settings, train.make_vqvae(settings), splits["train"], splits["validate"])
    images = dataset.to_float(splits["train"].images)
    scores = made[0].head_scores.of(images)
    for label in (0, 1):
        of_heads, drawn = (
            scores[splits["train"].slice_numbers == label],
            made[0].draw_scores(np.full(5000, label), seed=0),
        )
        np.testing.assert_allclose(np.std(drawn, axis=0), of_heads.std(axis=0, ddof=1), rtol=0.1)


# --------------------------------------------------------------------------------------
# What one GPU does differently, on a CPU: XLA compiles the steps, and int32 variables stay on the host
# --------------------------------------------------------------------------------------

# TensorFlow has no GPU kernel for int32 variables, and XLA refuses a variable of another device than the step's.
# Two logical CPUs stand for the host and the card.
FIT_ON_A_CARD = """
import sys
import keras, tensorflow as tf
from keras.src.backend.tensorflow import core
import modules, train

run, *arguments = sys.argv[1:]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
create, add_weight = core.Variable._initialize, keras.layers.Layer.add_weight
compile_model = keras.Model.compile

def create_where_a_gpu_machine_does(variable, value):
    with tf.device("CPU:0" if variable.dtype == "int32" else "CPU:1"):
        create(variable, value)

def add_counter(layer, *arguments, **options):
    if options.get("dtype") == "int64":
        options["dtype"] = counter_dtype
    return add_weight(layer, *arguments, **options)

core.Variable._initialize = create_where_a_gpu_machine_does
keras.layers.Layer.add_weight = add_counter
keras.Model.compile = lambda model, **options: compile_model(model, jit_compile=True, **options)
for counter_dtype in ("int64", "int32"):
    with tf.device("CPU:1"):
        assert train.main([*arguments, "--run", run + counter_dtype]) == 0
"""


def test_both_models_fit_where_int32_variables_are_on_another_device(data, tmp_path):
    """And control: where the codebook's counter of steps is one, the first step fails."""
    short = "--vqvae-epochs 1 --pixelcnn-epochs 1 --pixelcnn-blocks 1 --augmentations 1"
    command = [sys.executable, "-c", FIT_ON_A_CARD, tmp_path / "run", "--data", data, *TINY, *short.split()]
    finished = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.stdout.count("done: now run python predict.py") == 1, finished.stderr
    assert finished.returncode == 1 and "tfvariable_on_a_different_device" in finished.stderr


def test_no_variable_is_int32():
    """Of Adam and Muon, with a codebook that is trained by gradient and one that is not."""
    for flags in ([], ["--original"]):
        settings, _ = train.parse_arguments([*flags, "--pixelcnn-filters", "4", "--pixelcnn-blocks", "1"])
        stages = {"vqvae": train.make_vqvae(settings), "pixelcnn": train.make_pixelcnn(settings, range(32), True)}
        for name, model in stages.items():
            model.compile(train.stage_optimizer(train.Stage(train.Run(pathlib.Path("x")), name, settings), 1))
            model.optimizer.build(model.trainable_variables)
            variables = model.variables + model.optimizer.variables + [v for m in model.metrics for v in m.variables]
            assert {variable.dtype for variable in variables} <= {"int64", "float32", "float64"}
