"""Fits the VQ-VAE on brain slices, then the PixelCNN on its codes.

    python train.py --data keras_png_slices_data      # the preprocessed OASIS slices
    python train.py --demo                            # random head phantoms, nothing to download
    python train.py --original --run runs/original    # the settings of the 2022 project, for comparison

Everything goes into the run directory (--run): settings, models, histories, loss plots. The same
command continues a run that was stopped. Afterwards: python predict.py --run RUN.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time

import dataset
import modules

import filelock
import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure


def setting(default, meaning, low=None, high=None):
    """A field of `Settings`: its default, its help text, and the range of a number, ends included."""
    return dataclasses.field(default=default, metadata={"help": meaning, "low": low, "high": high})


@dataclasses.dataclass
class Settings:
    """Every number of a run. The defaults are the published run."""

    seed: int = setting(0, "of the weights, the order of the slices and the dropout", 0, 2**31 - 1)
    image_size: int = setting(64, "pixels a side, to which the slices are resized", 16, 1024)

    # VQ-VAE
    num_embeddings: int = setting(256, "K, codes in the codebook", 2, 2**15)
    embedding_dim: int = setting(16, "D, numbers a code stands for", 1, 1024)
    commitment_cost: float = setting(1.0, "beta of the VQ-VAE paper, equation 3", 0.25, 2.0)
    ema_decay: float = setting(0.9, "of the codebook's moving average; 0 trains it by gradient", 0.0, 0.9999)
    filters: tuple[int, ...] = setting((32, 64), "width of each halving convolution; 2 make a 16x16 grid", 1, 1024)
    kernel_size: int = setting(4, "of the halving convolutions", 2, 9)
    encoder_blocks: int = setting(0, "residual blocks of the encoder; fewer make codes that depend on less", 0, 32)
    decoder_blocks: int = setting(3, "residual blocks of the decoder", 0, 32)
    ssim_weight: float = setting(2.0, "of 1 - SSIM beside the squared error", 0.0, 100.0)
    vqvae_epochs: int = setting(30, "epochs of the VQ-VAE", 1, 10**6)
    vqvae_batch_size: int = setting(64, "slices a step", 1, 2**16)
    vqvae_learning_rate: float = setting(1e-3, "of Adam, at the start", 1e-8, 1.0)

    # PixelCNN
    pixelcnn_filters: int = setting(64, "channels between the residual blocks, half of them inside", 2, 4096)
    pixelcnn_blocks: int = setting(15, "residual blocks; 15 in the PixelRNN paper, table 1", 1, 128)
    dropout: float = setting(0.2, "rate in every residual block", 0.0, 0.9)
    zero_init: bool = setting(True, "residual blocks start as identities, which allows the learning rate below")
    context_filters: int = setting(64, "channels that sum up all rows above; 0 for none", 0, 4096)
    learned_position: bool = setting(True, "add a learned vector for each grid position")
    labels: bool = setting(True, "condition on the slice number, where file names have it")
    scores: int = setting(16, "principal scores of the whole slice to condition on, if on labels; 0 for none", 0, 64)
    below: bool = setting(True, "condition on the slice below in the same head, if on labels: for whole heads")
    pixelcnn_epochs: int = setting(100, "epochs of the PixelCNN", 1, 10**6)
    pixelcnn_batch_size: int = setting(128, "grids of codes a step", 1, 2**16)
    pixelcnn_learning_rate: float = setting(1e-2, "at its highest", 1e-8, 1.0)
    pixelcnn_warmup_epochs: int = setting(1, "over which the learning rate rises to it, at most half of all", 0, 10**6)
    pixelcnn_clip_norm: float = setting(1.0, "norm to which a step's gradient is shortened; 0 for none", 0.0, 1e6)
    pixelcnn_muon: bool = setting(True, "fit dense layers but the logits by Muon, the rest by Adam; else all by Adam")

    # Both
    cosine_decay: bool = setting(True, "lower both learning rates to 0 along a cosine")
    mirror: bool = setting(True, "fit on the mirror image of every slice too")
    augmentations: int = setting(24, "changed copies of each slice for the PixelCNN, conditioned on the change", 0, 64)


# Where the original project differs from these defaults, by its README, else by its keras.io ancestor.
ORIGINAL = """
    --num-embeddings 128 --ema-decay 0 --filters 16 32 64 --kernel-size 3 --decoder-blocks 0 --ssim-weight 0
    --pixelcnn-filters 128 --dropout 0 --no-zero-init --context-filters 0 --no-learned-position
    --no-labels --scores 0 --no-below --pixelcnn-learning-rate 3e-4 --pixelcnn-warmup-epochs 0 --pixelcnn-clip-norm 0
    --no-pixelcnn-muon --no-cosine-decay --no-mirror --augmentations 0
"""
# A few hundred phantoms, and a demo that ends in minutes: smaller batches for more steps.
DEMO = "--vqvae-batch-size 32 --vqvae-epochs 16 --pixelcnn-batch-size 32 --pixelcnn-epochs 24"


# ---- The command line ----------------------------------------------------------------


def as_flag(name):
    return "--" + name.replace("_", "-")


def parse_arguments(arguments=None):
    """Command line -> (Settings, argparse.Namespace of data, run, demo, original)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"--demo stands for: {DEMO}. --original stands for: {ORIGINAL}. Flags beside them count.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=dataset.folder, help="folder of the slices (default: keras_png_slices_data)")
    runs = "folder of the results (default: runs/oasis; runs/demo with --demo)"
    parser.add_argument("--run", type=dataset.folder, help=runs)
    parser.add_argument("--demo", action="store_true", help="draw head phantoms into the run directory and use them")
    parser.add_argument("--original", action="store_true", help="the settings of the original project")
    for field in dataclasses.fields(Settings):
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            kind = float if field.type is float else int
            low, high = field.metadata["low"], field.metadata["high"]
            options = {"type": dataset.number(kind, low, high), "metavar": "N"}
            if field.type not in (int, float):
                options["nargs"] = "+"
        meaning = field.metadata["help"] + " (default: %(default)s)"
        parser.add_argument(as_flag(field.name), default=field.default, help=meaning, **options)
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    # Flags that stand for others come before those that were given, which count.
    options = parser.parse_args(DEMO.split() * options.demo + ORIGINAL.split() * options.original + given)
    if options.demo and options.data:
        parser.error("--demo makes its own data: leave out --data, or --demo")
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    if settings.image_size % 2 ** len(settings.filters):
        halvings = len(settings.filters)
        parser.error(f"--filters: {settings.image_size} pixels (--image-size) cannot be halved {halvings} times")
    if settings.pixelcnn_filters % 2:
        parser.error(f"--pixelcnn-filters must be even, not {settings.pixelcnn_filters}")
    options.run = options.run or dataset.folder("runs/demo" if options.demo else "runs/oasis")
    phantoms = options.run / "phantom_slices" if options.demo else None
    options.data = options.data or phantoms or dataset.folder("keras_png_slices_data")
    return settings, options


# ---- The run directory ---------------------------------------------------------------


def library_versions():
    return {"python": sys.version.split()[0], "tensorflow": tf.__version__, "keras": keras.__version__}


def quote(argument):
    """A word of a command line that can be pasted."""
    return shlex.quote(str(argument)) if os.name == "posix" else subprocess.list2cmdline([str(argument)])


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Run:
    """A run directory: its config.json, its two models, and the lock of the one process that writes into it.

    config.json holds the settings, what the data were, and, under "finished", the checksum of each model once it is
    fitted; that of the PixelCNN goes with the checksum of the VQ-VAE whose codes it was fitted on.
    """

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "config.json"
        self.read_config()

    def read_config(self):
        """Read config.json into `config`, which is None where there is none yet."""
        self.config, names = None, {field.name for field in dataclasses.fields(Settings)}
        if not self.path.exists():
            return
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            config = json.loads(self.path.read_text())
            if {"settings", "data", "versions", "finished"} <= config.keys() and config["settings"].keys() == names:
                self.config = config
                return
        raise dataset.UserError(
            f"{self.path} is broken, or of another version: choose another --run, or delete {quote(self.folder)}"
        )

    def refusal(self, problem, remedy="choose another --run"):
        return dataset.UserError(f"--run {self.folder} {problem}: {remedy}")

    @contextlib.contextmanager
    def one_writer(self):
        """Only one process at a time is inside. The lock of a process ends with it, however it ends."""
        with dataset.write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = filelock.FileLock(self.folder / ".lock").acquire(timeout=0)
        except filelock.Timeout:
            remedy = "wait until it ends, or choose another --run"
            raise self.refusal("is being written by another process", remedy) from None
        with lock:
            self.read_config()  # another process may have written it before
            yield

    def start(self, settings, data_folder, data, phantom):
        """Write config.json into a new run directory, or refuse one that was started otherwise."""
        place, here = data_folder.resolve(), self.folder.resolve()
        if place.is_relative_to(here):  # a run with its data can be moved
            place = place.relative_to(here)
        config = {
            "settings": dataclasses.asdict(settings),
            "data": {"folder": str(place), "phantom": phantom, **data},
            "versions": library_versions(),
            "finished": {},
        }
        config = json.loads(json.dumps(config))  # tuples become lists, as in a config read from a file
        if self.config is None:
            if models := sorted(path.name for path in [*self.folder.glob("*.keras"), *self.folder.glob("*_last.npz")]):
                raise self.refusal(f"holds {models[0]}, but no config.json")
        else:
            for name, now in config["settings"].items():
                if (then := self.config["settings"][name]) != now:
                    raise self.refusal(f"was started with {as_flag(name)} {then}, not {now}")
            for split in data:
                if self.config["data"][split] != data[split]:
                    raise self.refusal(f"was started with other {split} data", "restore them, or choose another --run")
            if (then := self.config["versions"]) != config["versions"]:
                print(f"warning: this run was started with {then}, now there are {config['versions']}")
            config = {**self.config, "data": config["data"]}  # which may have moved
        if config != self.config:
            self.config = config
            dataset.write_json(self.path, config)

    @property
    def data_folder(self):
        return self.folder / self.config["data"]["folder"]

    def model(self, name):
        """The model that the run was finished with, "vqvae" or "pixelcnn"; None where it is not finished.

        Another model, or a damaged one, is refused, and so is a PixelCNN of the codes of another VQ-VAE.
        """
        finished, path = self.config["finished"].get(name), self.folder / f"{name}.keras"
        if finished is None:
            return None
        if not path.exists() or checksum(path) != finished["sha256"]:
            message = "is not the model that this run was finished with: restore it, or train in another --run"
            raise dataset.UserError(f"{path} {message}")
        if name == "pixelcnn" and finished["vqvae"] != self.config["finished"]["vqvae"]["sha256"]:
            raise dataset.UserError(f"{path} was fitted on the codes of another vqvae.keras: train in another --run")
        try:
            return keras.saving.load_model(path, compile=False)
        except (TypeError, ValueError) as error:
            cause = str(error).strip().splitlines()[0]
            raise dataset.UserError(f"{path} is of another version ({cause}): train in another --run") from error

    def finish(self, name, model, fitted_on):
        """Save a fitted model, and write down its checksum, with what else `fitted_on` says."""
        path, finished = self.folder / f"{name}.keras", self.config["finished"]
        self.read_config()
        if self.config["finished"] != finished:  # where a lock is not seen: two machines at one Drive
            raise self.refusal("was trained by another process at the same time")
        dataset.write_whole(path, model.save)
        finished[name] = {"sha256": checksum(path), **fitted_on}
        self.config["finished"] = finished
        dataset.write_json(self.path, self.config)


# ---- One stage: a model, fitted epoch by epoch into the run directory ----------------

SAVE_EVERY = 60  # seconds, at least, between two savings: on a fast card one takes longer than an epoch


class Stage:
    """One model of a run, "vqvae" or "pixelcnn": its settings, and its files in the run directory.

    `fitted_on` is what belongs to the fitted model beside settings and data: the checksum of the VQ-VAE.
    """

    def __init__(self, run, name, settings, **fitted_on):
        self.run, self.name, self.settings, self.fitted_on = run, name, settings, fitted_on
        self.resume_path = run.folder / f"{name}_last.npz"  # where a stopped training goes on; gone when finished
        self.history = run.folder / f"{name}_history.csv"
        self.plot = run.folder / f"{name}_loss.png"

    def setting(self, name, default=None):
        return getattr(self.settings, f"{self.name}_{name}", default)

    def finished_model(self):
        """The model, where it is finished, and what a training that was killed at its very end has left is removed."""
        if model := self.run.model(self.name):
            print(f"{self.name}: finished before")
            self.resume_path.unlink(missing_ok=True)
        return model


def selection_loss(row, split="val_"):
    """What chooses the epoch: the loss without the quantizer's terms, on validate unless `split` is empty.

    Those terms follow the scale of the latents, and can grow while the reconstructions get better.
    """
    return row[f"{split}loss"] - row.get(f"{split}quantizer_loss", 0)


class Checkpoint(keras.callbacks.Callback):
    """Keeps the history, the weights of the last and of the best epoch, and the optimizer.

    They go into one file, so that they always belong together: a run that is killed goes on from a row of its
    history, and the best model is that of a row.
    """

    def __init__(self, stage, model):
        super().__init__()
        self.stage, self.rows, self.last, self.best = stage, [], [], []
        # The random states of dropout are variables of the model: a resumed training draws what comes next.
        self.state = model.variables + model.optimizer.variables
        if stage.resume_path.exists():
            self.load(len(model.variables))
        self.saved, self.saved_at = len(self.rows), time.monotonic()  # epochs; time

    def load(self, variables):
        try:
            with np.load(self.stage.resume_path) as file:
                fitted_on, self.rows = json.loads(str(file["rows"]))
                self.last = [file[f"last{i}"] for i in range(len(self.state))]
                self.best = [file[f"best{i}"] for i in range(variables)]
            for variable, value in zip(self.state, self.last):
                variable.assign(value)
        except Exception as error:  # NumPy and zipfile have many kinds of their own for damaged files
            raise dataset.UserError(
                f"{self.stage.resume_path} is broken ({type(error).__name__}): "
                f"delete it, and {self.stage.name} starts again from its first epoch"
            ) from None
        if fitted_on != self.stage.fitted_on:
            raise dataset.UserError(
                f"{self.stage.resume_path} was fitted on the codes of another vqvae.keras: "
                f"delete it, and {self.stage.name} starts again from its first epoch"
            )

    def save(self):
        if self.saved == len(self.rows):
            return
        arrays = {f"{kind}{i}": value for kind in ("last", "best") for i, value in enumerate(getattr(self, kind))}
        rows = json.dumps([self.stage.fitted_on, self.rows])
        # The history first, so that it is never behind what a stopped training goes on from.
        dataset.write_table(self.stage.history, self.rows[0], [row.values() for row in self.rows])
        dataset.write_arrays(self.stage.resume_path, np.savez, rows=rows, **arrays)  # not compressed: faster
        self.saved, self.saved_at = len(self.rows), time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        name, epochs = self.stage.name, self.stage.setting("epochs")
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            raise dataset.UserError(
                f"{name}: the loss is not a number in epoch {epoch + 1}; what came before is kept. "
                f"Lower --{name}-learning-rate, in another --run"
            )
        row = {"epoch": epoch + 1, "seconds": round(time.monotonic() - self.started, 2)}
        rows = [*self.rows, {**row, **{key: float(value) for key, value in logs.items()}}]
        last = [keras.ops.convert_to_numpy(variable) for variable in self.state]
        is_best = min(rows, key=selection_loss) is rows[-1]
        # All at once: Ctrl-C may come anywhere, and what it saves must belong together.
        self.rows, self.last, self.best = rows, last, last[: len(self.model.variables)] if is_best else self.best
        if time.monotonic() > self.saved_at + SAVE_EVERY or epoch + 1 == epochs:
            self.save()
        left = row["seconds"] * (epochs - epoch - 1) / 60  # too much in the first epoch of a call, which compiles
        print(f"{name}: epoch {epoch + 1} of {epochs}, about {left:.1f} min left")


def make_optimizer(learning_rate, steps, warmup=0, cosine_decay=True, clip_norm=None, muon=False):
    """Adam; or Muon, which orthogonalises the momentum of a matrix (Liu et al., arXiv 2502.16982).

    The learning rate rises from 0 for `warmup` of the steps, then it falls to 0 along half a cosine, or stays.
    Keras advises Adam for embeddings and for the output layer.
    """
    rates = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else learning_rate,
        steps - warmup,
        alpha=0.0 if cosine_decay else 1.0,
        warmup_target=learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    if not muon:
        return keras.optimizers.Adam(rates, global_clipnorm=clip_norm)
    return keras.optimizers.Muon(
        rates, weight_decay=None, adam_weight_decay=None, global_clipnorm=clip_norm, exclude_layers=["logits"]
    )


def stage_optimizer(stage, steps_per_epoch):
    """The optimizer that the settings ask for. A warm-up takes half of the training at most."""
    epochs = stage.setting("epochs")
    return make_optimizer(
        stage.setting("learning_rate"),
        epochs * steps_per_epoch,
        warmup=int(min(stage.setting("warmup_epochs", 0), epochs / 2) * steps_per_epoch),
        cosine_decay=stage.settings.cosine_decay,
        clip_norm=stage.setting("clip_norm") or None,
        muon=stage.setting("muon", False),
    )


def fit(stage, make_model, counts, prepare, validation):
    """Fit a model to its last epoch, from where an earlier call was stopped, if it was.

    Args:
        stage: `Stage`.
        make_model: () -> keras.Model, not compiled.
        counts: how many training examples there are, and variants of each.
        prepare: index pairs (example, variant), int32 (B, 2) -> what the model is fitted on.
        validation: what the model is validated on, (N, ...).

    Returns: the model of the best epoch.
    """
    seed, epochs = stage.settings.seed, stage.setting("epochs")
    batch_size = min(stage.setting("batch_size"), counts[0])
    steps = counts[0] // batch_size
    keras.utils.set_random_seed(seed)
    model = make_model()
    model.compile(optimizer=stage_optimizer(stage, steps))
    model.optimizer.build(model.trainable_variables)
    checkpoint = Checkpoint(stage, model)
    done = len(checkpoint.rows)
    if done:
        print(f"{stage.name}: goes on after epoch {done} of {epochs}")
    if done < epochs:
        batches = dataset.shuffled_batches(*counts, batch_size, seed, range(done, epochs))
        try:
            model.fit(
                batches.map(prepare).prefetch(tf.data.AUTOTUNE),
                validation_data=tf.data.Dataset.from_tensor_slices(validation).batch(batch_size),
                initial_epoch=done,
                epochs=epochs,
                steps_per_epoch=steps,
                callbacks=[checkpoint],
                shuffle=False,  # done by the batches
                verbose=dataset.verbosity(),
            )
        except (KeyboardInterrupt, Exception):
            checkpoint.save()
            raise
    # A model of its own, without the optimizer and what the compiling left.
    best = type(model).from_config(model.get_config())
    for variable, value in zip(best.variables, checkpoint.best, strict=True):
        variable.assign(value)
    plot_history(stage, checkpoint.rows)
    stage.run.finish(stage.name, best, stage.fitted_on)
    stage.resume_path.unlink(missing_ok=True)
    return best


def plot_history(stage, rows):
    """Training and validation loss against the epoch, and perplexity where there is one; the kept epoch is marked."""
    epochs, best = [row["epoch"] for row in rows], min(rows, key=selection_loss)
    panels = {"nats per code": selection_loss}
    if "perplexity" in rows[0]:
        panels = {
            "loss without the quantizer's terms": selection_loss,
            "perplexity of the codebook": lambda row, split="val_": row[f"{split}perplexity"],
        }
    figure = Figure(figsize=(1 + 4 * len(panels), 3.5), layout="tight")
    for axis, (name, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        axis.plot(epochs, [value(row, "") for row in rows], label="training")
        axis.plot(epochs, [value(row) for row in rows], label="validation")
        axis.plot(best["epoch"], value(best), "o", label=f"kept: epoch {best['epoch']}, {value(best):.3f}")
        axis.set(xlabel="epoch", ylabel=name, title=stage.name)
        axis.legend()
    dataset.write_figure(stage.plot, figure)


# ---- The two stages ------------------------------------------------------------------


def make_vqvae(settings, data_variance=1.0):
    return modules.VQVAE(
        settings.num_embeddings,
        settings.embedding_dim,
        settings.commitment_cost,
        settings.ema_decay or None,
        image_size=settings.image_size,
        filters=settings.filters,
        kernel_size=settings.kernel_size,
        encoder_blocks=settings.encoder_blocks,
        decoder_blocks=settings.decoder_blocks,
        ssim_weight=settings.ssim_weight,
        data_variance=data_variance,
    )


def make_pixelcnn(settings, slice_numbers=(), below=False):
    """The PixelCNN that the settings ask for, of slices with these numbers, of which some have one below."""
    side = settings.image_size // 2 ** len(settings.filters)
    return modules.PixelCNN(
        settings.num_embeddings,
        (side, side),
        filters=settings.pixelcnn_filters,
        residual_blocks=settings.pixelcnn_blocks,
        dropout=settings.dropout,
        zero_init=settings.zero_init,
        context_filters=settings.context_filters,
        learned_position=settings.learned_position,
        num_labels=len(slice_numbers),
        num_scores=settings.scores if len(slice_numbers) else 0,
        num_changes=dataset.NUM_CHANGES if settings.augmentations else 0,
        below=below,
        slice_numbers=slice_numbers,
        image_size=settings.image_size,
    )


def fit_vqvae(run, settings, train, validate):
    """The VQ-VAE of a run, fitted on the slices of two splits."""
    stage = Stage(run, "vqvae", settings)
    if finished := stage.finished_model():
        return finished
    with tf.device("CPU"):  # the data stay on the host
        images = tf.stack(dataset.with_mirrored(train.images, settings.mirror), axis=1)

    def prepare(index):
        return tf.cast(tf.gather_nd(images, index)[..., None], tf.float32) / 255

    def make_model():
        return make_vqvae(settings, data_variance=np.var(dataset.to_float(train.images)))

    return fit(stage, make_model, images.shape[:2], prepare, dataset.to_float(validate.images))


def fit_pixelcnn(run, settings, vqvae, train, validate):
    """The PixelCNN of a run, fitted on the codes of the same slices, and on what is known of them."""
    stage = Stage(run, "pixelcnn", settings, vqvae=run.config["finished"]["vqvae"]["sha256"])
    if stage.finished_model():
        return
    slice_numbers = np.unique(train.slice_numbers[train.slice_numbers >= 0]) if settings.labels else np.array([], int)
    labels = modules.labels_of(train.slice_numbers, slice_numbers)
    below = dataset.slices_below(train.cases, labels)
    num_scores = settings.scores if len(slice_numbers) else 0
    head_scores = modules.HeadScores(len(slice_numbers), num_scores, settings.image_size**2)
    if num_scores:
        head_scores.fit(dataset.to_float(train.images), labels, dataset.heads_of(train))
    codes, scores, changes = encode_variants(vqvae, train, head_scores, settings)
    with tf.device("CPU"):
        variants = {"codes": codes, "scores": scores, "changes": changes}  # there may be no scores
        variants = {name: tf.constant(values) for name, values in variants.items() if values.size}
        lower_slices, all_labels = tf.constant(below), tf.constant(labels)

    def make_model():
        model = make_pixelcnn(settings, slice_numbers, bool(settings.below and (below >= 0).any()))
        if num_scores:
            model.head_scores.set_weights(head_scores.get_weights())
        return model

    def prepare(index):
        """The codes of a batch, and its conditions. The slice below has the same change."""
        example, variant = index[:, 0], index[:, 1]
        batch = {name: tf.gather_nd(values, index) for name, values in variants.items()}
        lower = tf.gather(lower_slices, example)
        lower_codes = tf.gather_nd(variants["codes"], tf.stack([tf.maximum(lower, 0), variant], axis=1))
        batch["codes"] = tf.cast(batch["codes"], tf.int32)
        batch["below"] = tf.where(lower[:, None, None] < 0, -1, tf.cast(lower_codes, tf.int32))
        return {**batch, "labels": tf.gather(all_labels, example)}

    codes_to_validate = vqvae.encode(dataset.to_float(validate.images))
    validation = {"codes": codes_to_validate, "labels": modules.labels_of(validate.slice_numbers, slice_numbers)}
    fit(stage, make_model, codes.shape[:2], prepare, validation)


def encode_variants(vqvae, train, head_scores, settings):
    """The variants of each training slice for the PixelCNN: as it is, mirrored, and changed copies of both in turn.

    Returns: codes, the smallest integers that hold K, (N, V, h, w); scores of each, float32 (N, V, S); the changes of
        each, float32 (N, V, 6), see `dataset.augment`.
    """
    heads, unchanged = dataset.heads_of(train), dataset.with_mirrored(train.images, settings.mirror)
    variants = []

    def add_variant(pictures, changes):
        images = dataset.to_float(pictures)
        codes = vqvae.encode(images).numpy().astype(np.min_scalar_type(vqvae.num_embeddings - 1))
        variants.append((codes, head_scores.of(images), changes))

    for pictures in unchanged:
        add_variant(pictures, np.zeros((len(pictures), dataset.NUM_CHANGES), np.float32))
    # About a quarter of all variants is unchanged, for so the prior is measured and sampled.
    variants *= max(1, settings.augmentations // (3 * len(unchanged)))
    print(f"making {settings.augmentations} changed copies of {len(train.images)} training slices")
    for number in dataset.progress(range(settings.augmentations), "copy"):
        add_variant(*dataset.augment(unchanged[number % len(unchanged)], heads, (settings.seed, number)))
    return tuple(np.stack(parts, axis=1) for parts in zip(*variants))


def train(settings, options):
    """Both models of a run, from where an earlier call was stopped."""
    run = Run(options.run)
    if not options.demo:
        splits = dataset.load(options.data, image_size=settings.image_size)  # a misspelt folder leaves no run behind
    with run.one_writer():
        if options.demo:
            if not options.data.exists():
                dataset.write_phantom(options.data)
            splits = dataset.load(options.data, image_size=settings.image_size)
        run.start(settings, options.data, dataset.fingerprint(splits), dataset.is_phantom(options.data))
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        vqvae = fit_vqvae(run, settings, splits["train"], splits["validate"])
        fit_pixelcnn(run, settings, vqvae, splits["train"], splits["validate"])
    print(f"done: now run python predict.py --run {quote(options.run)}")


def main(arguments=None):
    settings, options = parse_arguments(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the last epoch is saved
    print(modules.set_up_devices())
    with modules.keras_defaults():
        return dataset.run_script("train.py", train, settings, options)


if __name__ == "__main__":
    sys.exit(main())
