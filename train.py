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
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
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
    """Every number of a run: of data, conditions and both models, then of one model. Defaults: the published run."""

    seed: int = setting(0, "of the weights, the order of the slices and the dropout", 0, 2**31 - 1)
    image_size: int = setting(64, "pixels a side, to which the slices are resized", 16, 1024)
    mirror: bool = setting(True, "fit on the mirror image of every slice too, left and right of the head swapped")
    labels: bool = setting(True, "condition on the slice number, where file names have it")
    scores: int = setting(16, "principal scores of the whole slice to condition on, if on labels; 0 for none", 0, 64)
    below: bool = setting(True, "condition on the slice below in the same head, if on labels: for whole heads")
    augmentations: int = setting(24, "changed copies of each slice for the PixelCNN, conditioned on the change", 0, 64)
    cosine_decay: bool = setting(True, "lower both learning rates to 0 along a cosine")

    vqvae_num_embeddings: int = setting(256, "K, codes in the codebook", 2, 2**15)
    vqvae_embedding_dim: int = setting(16, "D, numbers a code stands for", 1, 1024)
    vqvae_commitment_cost: float = setting(1.0, "beta of the VQ-VAE paper, equation 3", 0.25, 2.0)
    vqvae_ema_decay: float = setting(0.9, "of the codebook's moving average; 0 trains it by gradient", 0.0, 0.9999)
    vqvae_filters: tuple[int, ...] = setting(
        (32, 64), "widths of the halving convolutions; 2 make 16x16 codes", 1, 1024
    )
    vqvae_kernel_size: int = setting(4, "of the halving convolutions", 2, 9)
    vqvae_encoder_blocks: int = setting(0, "residual blocks; with fewer, a code depends on fewer pixels", 0, 32)
    vqvae_decoder_blocks: int = setting(3, "residual blocks of the decoder", 0, 32)
    vqvae_ssim_weight: float = setting(2.0, "of 1 - SSIM beside the squared error", 0.0, 100.0)
    vqvae_epochs: int = setting(30, "epochs of the VQ-VAE", 1, 10**6)
    vqvae_batch_size: int = setting(64, "slices a step", 1, 2**16)
    vqvae_learning_rate: float = setting(1e-3, "of Adam, at the start", 1e-8, 1.0)

    pixelcnn_filters: int = setting(64, "channels between the residual blocks, half of them inside", 2, 4096)
    pixelcnn_residual_blocks: int = setting(15, "residual blocks; 15 in the PixelRNN paper, table 1", 1, 128)
    pixelcnn_dropout: float = setting(0.2, "rate in every residual block", 0.0, 0.9)
    pixelcnn_zero_init: bool = setting(True, "residual blocks start as identities: allows the learning rate below")
    pixelcnn_context_filters: int = setting(64, "channels that sum up all rows above; 0 for none", 0, 4096)
    pixelcnn_learned_position: bool = setting(True, "add a learned vector for each grid position")
    pixelcnn_epochs: int = setting(100, "epochs of the PixelCNN", 1, 10**6)
    pixelcnn_batch_size: int = setting(128, "grids of codes a step", 1, 2**16)
    pixelcnn_learning_rate: float = setting(1e-2, "at its highest", 1e-8, 1.0)
    pixelcnn_warmup_epochs: int = setting(1, "over which the learning rate rises to it, at most half of all", 0, 10**6)
    pixelcnn_clip_norm: float = setting(1.0, "norm to which a step's gradient is shortened; 0 for none", 0.0, 1e6)
    pixelcnn_muon: bool = setting(True, "fit dense layers but the logits by Muon, the rest by Adam; else all by Adam")


# Where the original project differs from these defaults, by its README, else by its keras.io ancestor.
ORIGINAL = """
    --vqvae-num-embeddings 128 --vqvae-ema-decay 0 --vqvae-filters 16 32 64 --vqvae-kernel-size 3
    --vqvae-decoder-blocks 0 --vqvae-ssim-weight 0 --no-labels --scores 0 --no-below --no-mirror --augmentations 0
    --pixelcnn-filters 128 --pixelcnn-dropout 0 --no-pixelcnn-zero-init --pixelcnn-context-filters 0
    --no-pixelcnn-learned-position --pixelcnn-learning-rate 3e-4 --pixelcnn-warmup-epochs 0 --pixelcnn-clip-norm 0
    --no-pixelcnn-muon --no-cosine-decay
"""
# For a few hundred phantoms, in minutes: smaller batches make more steps.
DEMO = "--vqvae-batch-size 32 --vqvae-epochs 16 --pixelcnn-batch-size 32 --pixelcnn-epochs 24"


# ---- The command line ----------------------------------------------------------------


def arguments_of(function, settings, prefix):
    """The arguments of a function, such as the constructor of a model, that are settings behind the prefix."""
    names = inspect.signature(function).parameters
    return {name: getattr(settings, prefix + name) for name in names if hasattr(settings, prefix + name)}


def parse_arguments(arguments=None):
    """Command line -> (Settings, argparse.Namespace of data, run, demo, original)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"--demo stands for: {DEMO}. --original stands for: {ORIGINAL}. Explicit flags override them.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=dataset.folder, help="folder of the slices (default: keras_png_slices_data)")
    parser.add_argument("--run", type=dataset.folder, help="folder of the results (default: runs/oasis, or runs/demo)")
    parser.add_argument("--demo", action="store_true", help="draw head phantoms into the run directory and use them")
    parser.add_argument("--original", action="store_true", help="the settings of the original project")
    for field in dataclasses.fields(Settings):
        options = {"action": argparse.BooleanOptionalAction}
        if field.type is not bool:
            kind, nargs = float if field.type is float else int, None if field.type in (int, float) else "+"
            number = dataset.number(kind, field.metadata["low"], field.metadata["high"])
            options = {"type": number, "metavar": "N", "nargs": nargs}
        flag, meaning = "--" + field.name.replace("_", "-"), field.metadata["help"] + " (default: %(default)s)"
        parser.add_argument(flag, default=field.default, help=meaning, **options)
    given = sys.argv[1:] if arguments is None else list(arguments)
    sets = DEMO.split() * ("--demo" in given) + ORIGINAL.split() * ("--original" in given)
    options = parser.parse_args(sets + given)  # the last of equal flags counts
    if options.demo and options.data:
        parser.error("--demo makes its own data: leave out --data, or --demo")
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    if settings.image_size % 2 ** (halvings := len(settings.vqvae_filters)):
        parser.error(f"--vqvae-filters: {settings.image_size} pixels (--image-size) cannot be halved {halvings} times")
    if settings.pixelcnn_filters % 2:
        parser.error(f"--pixelcnn-filters must be even, not {settings.pixelcnn_filters}")
    run = options.run = options.run or dataset.folder("runs/demo" if options.demo else "runs/oasis")
    options.data = options.data or (run / "phantom_slices" if options.demo else dataset.folder("keras_png_slices_data"))
    return settings, options


# ---- The run directory ---------------------------------------------------------------


def quote(argument):
    """A word of a command line that can be pasted."""
    return shlex.quote(str(argument)) if os.name == "posix" else subprocess.list2cmdline([str(argument)])


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Run:
    """A run directory: its config.json, its two models, and the lock of the one process that writes into it.

    Under "finished" config.json has the checksum of each fitted model, and with the PixelCNN's that of its VQ-VAE.
    """

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "config.json"
        self.read_config()

    def read_config(self):
        """Read config.json into `config`, which is None where there is none yet."""
        self.config = None
        if not self.path.exists():
            return
        keys, names = {"settings", "data", "mirror_axis", "versions", "finished"}, dataclasses.asdict(Settings()).keys()
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            config = json.loads(self.path.read_text())
            if keys <= config.keys() and config["settings"].keys() == names:
                self.config = config
                return
        remedy = f"choose another --run, or delete {quote(self.folder)}"
        raise dataset.UserError(f"{self.path} is broken, or of another version: {remedy}")

    def refusal(self, problem, remedy="choose another --run"):
        return dataset.UserError(f"--run {self.folder} {problem}: {remedy}")

    @contextlib.contextmanager
    def one_writer(self):
        """Only one process at a time is inside."""
        with dataset.write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self.lock():
            self.read_config()  # another process may have written it before
            yield

    def lock(self):
        """Lock the file .lock, or raise a `UserError` that names the holder.

        The operating system frees a lock when its process ends. On file systems without locks, filelock creates the
        file instead and writes its owner into it: that outlives an owner on another machine. Nobody holds an empty one.
        """
        path = self.folder / ".lock"
        lock, owner, remedy = filelock.FileLock(path), "another process", "wait until it ends, or choose another --run"
        with dataset.write_errors(path), contextlib.suppress(filelock.Timeout):  # which is an OSError
            return lock.acquire(timeout=0)
        with dataset.write_errors(path), contextlib.suppress(FileNotFoundError):
            if hasattr(lock, "pid"):  # the file itself is the lock
                time.sleep(0.5)  # for an owner that is being written
                if not (lines := path.read_text(errors="replace").split()):
                    path.unlink()
                    return self.lock()
                owner = f"process {' on '.join(lines[:2])}"
                remedy += f"; if that process is gone, delete {quote(path)}"
        raise self.refusal(f"is being written by {owner}", remedy)

    def start(self, settings, data_folder, data, phantom, mirror_axis=None):
        """Write config.json into a new run directory, or refuse one that was started otherwise."""
        place, here = data_folder.resolve(), self.folder.resolve()
        place = place.relative_to(here) if place.is_relative_to(here) else place  # a run with its data can be moved
        config = {
            "settings": dataclasses.asdict(settings),
            "data": {"folder": str(place), "phantom": phantom, **data},
            "mirror_axis": mirror_axis,
            "versions": {"python": sys.version.split()[0], "tensorflow": tf.__version__, "keras": keras.__version__},
            "finished": {},
        }
        config = json.loads(json.dumps(config))  # tuples become lists, as in a config read from a file
        if self.config is None:
            if models := sorted(path.name for path in [*self.folder.glob("*.keras"), *self.folder.glob("*_last.npz")]):
                raise self.refusal(f"holds {models[0]}, but no config.json")
        else:
            for name, now in config["settings"].items():
                if (then := self.config["settings"][name]) != now:
                    raise self.refusal(f"was started with --{name.replace('_', '-')} {then}, not {now}")
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

    @property
    def mirror_axis(self):
        """The axis along which slices are mirrored, see `dataset.mirror_axis`; None where they are not."""
        return self.config["mirror_axis"]

    def model(self, name):
        """The model that the run was finished with, "vqvae" or "pixelcnn", or None; another in its place is refused."""
        finished, path = self.config["finished"].get(name), self.folder / f"{name}.keras"
        if finished is None:
            return None
        if not path.exists() or checksum(path) != finished["sha256"]:
            problem = "is not the model that this run was finished with"
        elif name == "pixelcnn" and finished["vqvae"] != self.config["finished"]["vqvae"]["sha256"]:
            problem = "was fitted on the codes of another vqvae.keras"
        else:
            try:
                return keras.saving.load_model(path, compile=False)
            except (TypeError, ValueError) as error:
                problem = f"is of another version ({str(error).strip().splitlines()[0]})"
        raise dataset.UserError(f"{path} {problem}: restore it, or train in another --run")

    def finish(self, name, model, fitted_on):
        """Save a fitted model, and write down its checksum, with what else `fitted_on` says."""
        path, finished = self.folder / f"{name}.keras", self.config["finished"]
        self.read_config()
        if (
            self.config is None or self.config["finished"] != finished
        ):  # where a lock is not seen: two machines with one Drive
            raise self.refusal("was trained by another process at the same time")
        dataset.write_whole(path, model.save)
        self.config["finished"] = {**finished, name: {"sha256": checksum(path), **fitted_on}}
        dataset.write_json(self.path, self.config)


# ---- One stage: a model, fitted epoch by epoch into the run directory ----------------

SAVE_EVERY = 60  # seconds, at least, between two savings: on a fast card one takes longer than an epoch


class Stage:
    """One model of a run, "vqvae" or "pixelcnn". `fitted_on`, the checksum of the VQ-VAE, is written down with it."""

    def __init__(self, run, name, settings, **fitted_on):
        self.run, self.name, self.settings, self.fitted_on = run, name, settings, fitted_on
        self.epochs, self.batch_size = (getattr(settings, f"{name}_{field}") for field in ("epochs", "batch_size"))
        self.resume_path = run.folder / f"{name}_last.npz"  # where a stopped training goes on; gone when finished

    def finished_model(self):
        """The model, where it is finished: then a leftover resume file is deleted."""
        if model := self.run.model(self.name):
            print(f"{self.name}: finished before")
            self.resume_path.unlink(missing_ok=True)
        return model


def selection_loss(row, split="val_"):
    """What chooses the epoch: the loss without the quantizer's, which can grow while the reconstructions get better."""
    return row[f"{split}loss"] - row.get(f"{split}quantizer_loss", 0)


class Checkpoint(keras.callbacks.Callback):
    """Keeps history, weights of the last and of the best epoch, and optimizer, in one file: after a kill they match."""

    def __init__(self, stage, model):
        super().__init__()
        self.stage, self.rows, self.last, self.best = stage, [], [], []
        # The random states of dropout are variables of the model: a resumed training draws what comes next.
        self.state = model.variables + model.optimizer.variables
        if stage.resume_path.exists():
            self.load(len(model.variables))
        self.saved, self.saved_at = len(self.rows), time.monotonic()  # epochs; time

    def load(self, variables):
        path, problem = self.stage.resume_path, None
        try:
            with np.load(path) as file:
                fitted_on, self.rows = json.loads(str(file["rows"]))
                self.last = [file[f"last{i}"] for i in range(len(self.state))]
                self.best = [file[f"best{i}"] for i in range(variables)]
            for variable, value in zip(self.state, self.last):
                variable.assign(value)
            if fitted_on != self.stage.fitted_on:
                problem = "was fitted on the codes of another vqvae.keras"
        except Exception as error:  # NumPy and zipfile have many kinds of their own for damaged files
            problem = f"is broken ({type(error).__name__})"
        if problem:
            raise dataset.UserError(f"{path} {problem}: delete it, and {self.stage.name} starts again")

    def save(self):
        if self.saved == len(self.rows):
            return
        arrays = {f"{kind}{i}": value for kind in ("last", "best") for i, value in enumerate(getattr(self, kind))}
        rows = json.dumps([self.stage.fitted_on, self.rows])
        # The history first: it must have every row that a stopped training goes on from.
        path = self.stage.run.folder / f"{self.stage.name}_history.csv"
        dataset.write_table(path, self.rows[0], [row.values() for row in self.rows])
        dataset.write_arrays(self.stage.resume_path, np.savez, rows=rows, **arrays)  # not compressed: faster
        self.saved, self.saved_at = len(self.rows), time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        name, epochs = self.stage.name, self.stage.epochs
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            remedy = f"what came before is kept. Lower --{name}-learning-rate, in another --run"
            raise dataset.UserError(f"{name}: the loss is not a number in epoch {epoch + 1}; {remedy}")
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


def make_optimizer(learning_rate, epochs, steps_per_epoch, warmup_epochs=0, cosine_decay=True, clip_norm=0, muon=False):
    """Adam; or Muon, which orthogonalises the momentum of a matrix (Liu et al., arXiv 2502.16982).

    The learning rate rises from 0 in the warm-up, half of the training at most; then it falls to 0 along half a cosine,
    or stays. Keras advises Adam for embeddings and for the output layer.
    """
    warmup = int(min(warmup_epochs, epochs / 2) * steps_per_epoch)
    start, target = (0.0, learning_rate) if warmup else (learning_rate, None)
    rates = keras.optimizers.schedules.CosineDecay(
        start, epochs * steps_per_epoch - warmup, 1.0 - cosine_decay, warmup_target=target, warmup_steps=warmup
    )
    options = {"learning_rate": rates, "global_clipnorm": clip_norm or None}
    if not muon:
        return keras.optimizers.Adam(**options)
    return keras.optimizers.Muon(**options, weight_decay=None, adam_weight_decay=None, exclude_layers=["logits"])


def stage_optimizer(stage, steps_per_epoch):
    """The optimizer that the settings ask for."""
    own = arguments_of(make_optimizer, stage.settings, f"{stage.name}_")
    return make_optimizer(steps_per_epoch=steps_per_epoch, cosine_decay=stage.settings.cosine_decay, **own)


def fit(stage, make_model, counts, prepare, validation):
    """The best epoch's model of a stage, which is fitted from where an earlier call was stopped, if it was.

    Args:
        make_model: () -> keras.Model, not compiled.
        counts: how many training examples there are, and variants of each.
        prepare: index pairs (example, variant), int32 (B, 2) -> what the model is fitted on.
        validation: what the model is validated on, (N, ...).
    """
    seed, epochs, batch_size = stage.settings.seed, stage.epochs, min(stage.batch_size, counts[0])
    steps = counts[0] // batch_size
    keras.utils.set_random_seed(seed)
    model = make_model()
    model.compile(optimizer=stage_optimizer(stage, steps))
    model.optimizer.build(model.trainable_variables)
    checkpoint = Checkpoint(stage, model)
    if done := len(checkpoint.rows):
        print(f"{stage.name}: goes on after epoch {done} of {epochs}")
    if done < epochs:
        batches = dataset.shuffled_batches(*counts, batch_size, seed, range(done, epochs)).map(prepare).prefetch(2)
        validation = tf.data.Dataset.from_tensor_slices(validation).batch(batch_size)
        try:
            model.fit(
                dataset.without_autotuning(batches),
                validation_data=dataset.without_autotuning(validation),
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
    plot_history(stage, checkpoint.rows, best)
    stage.run.finish(stage.name, best, stage.fitted_on)
    stage.resume_path.unlink(missing_ok=True)
    return best


def plot_history(stage, rows, model):
    """Training and validation loss against the epoch, and perplexity where there is one; the kept epoch is marked."""
    epochs, best = [row["epoch"] for row in rows], min(rows, key=selection_loss)
    panels = {"nats per code": selection_loss}
    if "perplexity" in rows[0]:
        panels = {"loss without that of the quantizer": selection_loss}
        panels["perplexity of the codebook"] = lambda row, split="val_": row[f"{split}perplexity"]
    curves, marker = {"": "training", "val_": "validation"}, "." if len(rows) < 10 else None
    hidden = {"scores": getattr(model, "num_scores", 0), "slice below": getattr(model, "below", False)}
    if hidden := " and ".join(name for name, known in hidden.items() if known):
        curves = {"": f"training: {hidden} hidden half of the time", "val_": "validation: slice number alone"}
    figure = Figure(figsize=(1 + 5 * len(panels), 4), layout="tight")
    for axis, (name, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for split, label in curves.items():
            axis.plot(epochs, [value(row, split) for row in rows], marker=marker, label=label)
        axis.plot(best["epoch"], value(best), "o", label=f"kept: epoch {best['epoch']}, {value(best):.3f}")
        axis.set(xlabel="epoch", ylabel=name, title=stage.name, yscale="log" if "loss" in name else "linear")
        axis.legend()
    dataset.write_figure(stage.run.folder / f"{stage.name}_loss.png", figure)


# ---- The two stages ------------------------------------------------------------------


def make_vqvae(settings, data_variance=1.0):
    own = arguments_of(modules.VQVAE.__init__, settings, "vqvae_")
    return modules.VQVAE(image_size=settings.image_size, data_variance=data_variance, **own)


def make_prior(settings, slice_numbers=(), below=False):
    """The prior of slices with these numbers: the PixelCNN that the settings ask for; with `below`, of whole heads."""
    own, filters = arguments_of(modules.PixelCNN.__init__, settings, "pixelcnn_"), settings.pixelcnn_context_filters
    between = [modules.RowContext(filters, own["dropout"]) for _ in range(0, own["residual_blocks"], 5) if filters]
    side = settings.image_size // 2 ** len(settings.vqvae_filters)
    network = modules.PixelCNN(settings.vqvae_num_embeddings, (side, side), between=between, **own)
    own = arguments_of(modules.Prior.__init__, settings, "pixelcnn_")
    own |= {"num_scores": settings.scores if len(slice_numbers) else 0, "num_pixels": settings.image_size**2}
    own |= {"num_changes": dataset.NUM_CHANGES if settings.augmentations else 0}
    return modules.Prior(network, slice_numbers, below=below, **own)


def fit_vqvae(run, settings, train, validate):
    """The VQ-VAE of a run, fitted on the slices of two splits."""
    stage = Stage(run, "vqvae", settings)
    if finished := stage.finished_model():
        return finished
    with tf.device("CPU"):  # the data stay on the host
        images = tf.stack(dataset.with_mirrored(train.images, run.mirror_axis), axis=1)

    def prepare(index):
        return tf.cast(tf.gather_nd(images, index)[..., None], tf.float32) / 255

    variance, validation = np.var(dataset.to_float(train.images)), dataset.to_float(validate.images)
    return fit(stage, lambda: make_vqvae(settings, variance), images.shape[:2], prepare, validation)


def fit_pixelcnn(run, settings, vqvae, train, validate):
    """The PixelCNN of a run, fitted on the codes of the same slices, and on what is known of them."""
    stage = Stage(run, "pixelcnn", settings, vqvae=run.config["finished"]["vqvae"]["sha256"])
    if stage.finished_model():
        return
    slice_numbers = np.unique(train.slice_numbers[train.slice_numbers >= 0]) if settings.labels else np.array([], int)
    labels = modules.labels_of(train.slice_numbers, slice_numbers)
    below = dataset.slices_below(train.cases, labels)
    knows_below, num_scores = bool(settings.below and (below >= 0).any()), settings.scores * (len(slice_numbers) > 0)
    head_scores = modules.HeadScores(len(slice_numbers), num_scores, settings.image_size**2)
    if num_scores:
        head_scores.fit(dataset.to_float(train.images), labels, dataset.heads_of(train))
    with tf.device("CPU"):
        variants = encode_variants(vqvae, train, head_scores, settings, run.mirror_axis)
        variants = {name: tf.constant(values) for name, values in variants.items()}
        lower_slices, all_labels = tf.constant(below), tf.constant(labels)

    def make_model():
        model = make_prior(settings, slice_numbers, knows_below)
        if num_scores:
            model.head_scores.set_weights(head_scores.get_weights())
        return model

    def prepare(index):
        """The codes of a batch, and its conditions. The slice below has the same change."""
        example, variant = index[:, 0], index[:, 1]
        batch = {name: tf.gather_nd(values, index) for name, values in variants.items()}
        batch |= {"codes": tf.cast(batch["codes"], tf.int32), "labels": tf.gather(all_labels, example)}
        if knows_below:
            lower = tf.gather(lower_slices, example)
            codes = tf.gather_nd(variants["codes"], tf.stack([tf.maximum(lower, 0), variant], axis=1))
            batch["below"] = tf.where(lower[:, None, None] < 0, -1, tf.cast(codes, tf.int32))
        return batch

    validation = {"labels": modules.labels_of(validate.slice_numbers, slice_numbers)}
    validation["codes"] = vqvae.encode(dataset.to_float(validate.images))
    fit(stage, make_model, variants["codes"].shape[:2], prepare, validation)


def encode_variants(vqvae, train, head_scores, settings, mirror_axis):
    """V variants of each training slice: itself, its mirror image, both several times, then changed copies of the two.

    Returns: {"codes": (N, V, h, w), the smallest integers that hold K; "scores": of each, float32 (N, V, S); "changes":
        of each, float32 (N, V, 6), see `dataset.augment`}, the last two where the prior knows them.
    """
    heads, unchanged = dataset.heads_of(train), dataset.with_mirrored(train.images, mirror_axis)
    variants, kind = [], np.min_scalar_type(vqvae.num_embeddings - 1)

    def add_variant(pictures, changes):
        images = dataset.to_float(pictures)
        variant = {"codes": vqvae.encode(images).astype(kind)}
        if head_scores.num_scores:
            variant["scores"] = head_scores.of(images)
        if settings.augmentations:
            variant["changes"] = changes
        variants.append(variant)

    for pictures in unchanged:
        add_variant(pictures, np.zeros((len(pictures), dataset.NUM_CHANGES), np.float32))
    # About a quarter of all variants is unchanged, because the prior is measured and sampled without changes.
    variants *= max(1, round(settings.augmentations / (3 * len(unchanged))))
    if settings.augmentations:
        print(f"making {settings.augmentations} changed copies of {len(train.images)} training slices")
    for number in dataset.progress(range(settings.augmentations), "copy"):
        add_variant(*dataset.augment(unchanged[number % len(unchanged)], heads, (settings.seed, number)))
    return {name: np.stack([variant[name] for variant in variants], axis=1) for name in variants[0]}


def train(settings, options):
    """Both models of a run, from where an earlier call was stopped."""
    run = Run(options.run)
    if options.demo and not options.data.exists():
        dataset.write_phantom(options.data)
    splits = dataset.load(options.data, image_size=settings.image_size)  # a misspelt folder leaves no run behind
    axis = dataset.mirror_axis(splits["train"].images) if settings.mirror else None
    with run.one_writer():
        run.start(settings, options.data, dataset.fingerprint(splits), dataset.is_phantom(options.data), axis)
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        heads = {1: "lies on its side: mirrored up and down", 2: "stands upright: mirrored left and right"}
        print(f"the head {heads.get(run.mirror_axis, 'is not mirrored: no mirror axis, or --no-mirror')}")
        vqvae = fit_vqvae(run, settings, splits["train"], splits["validate"])
        fit_pixelcnn(run, settings, vqvae, splits["train"], splits["validate"])
    print(f"done: now run python predict.py --run {quote(options.run)}")


def main(arguments=None):
    settings, options = parse_arguments(arguments)
    with contextlib.suppress(ValueError):  # in a thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the last epoch is saved
    print(modules.set_up_devices())
    with modules.keras_defaults():
        return dataset.run_script("train.py", train, settings, options)


if __name__ == "__main__":
    sys.exit(main())
