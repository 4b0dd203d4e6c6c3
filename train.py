"""Fits the VQ-VAE on brain slices, then the PixelCNN on its codes.

    python train.py --data keras_png_slices_data      # the preprocessed OASIS slices
    python train.py --demo                            # random head phantoms, nothing to download
    python train.py --original --run runs/original    # the settings of the 2022 project, for comparison

Everything goes into the run directory (--run): settings, models, histories, loss plots. The same
command continues a run that was stopped. Afterwards: python predict.py --run RUN.
"""

import argparse
import csv
import dataclasses
import json
import pathlib
import shlex
import sys
import time

import dataset  # first, for it keeps TensorFlow's start-up log off the screen

# isort: split
import keras
import matplotlib
import numpy as np
import tensorflow as tf

import modules

matplotlib.use("agg")
from matplotlib import pyplot as plt


def setting(default, meaning, low=None, high=None):
    """A field of `Settings`: its default, its help text, and the range of a number, ends included."""
    return dataclasses.field(default=default, metadata={"help": meaning, "low": low, "high": high})


@dataclasses.dataclass
class Settings:
    """Every number of a run. The defaults are the published run."""

    seed: int = setting(0, "of the weights, the order of the slices and the dropout", 0, 2**31 - 1)

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
    dropout: float = setting(0.2, "rate in every residual block and context", 0.0, 0.9)
    learned_position: bool = setting(True, "add a learned vector for each grid position")
    context_filters: int = setting(64, "channels that sum up all earlier codes; 0 for none", 0, 4096)
    zero_init: bool = setting(True, "residual blocks start as identities, which allows the learning rate below")
    pixelcnn_epochs: int = setting(100, "epochs of the PixelCNN", 1, 10**6)
    pixelcnn_batch_size: int = setting(128, "grids of codes a step", 1, 2**16)
    pixelcnn_learning_rate: float = setting(1e-2, "at its highest", 1e-8, 1.0)
    pixelcnn_warmup_epochs: int = setting(1, "over which the learning rate rises to it; 0 for none", 0, 10**6)
    pixelcnn_clip_norm: float = setting(1.0, "norm to which a step's gradient is shortened; 0 for none", 0.0, 1e6)
    pixelcnn_muon: bool = setting(True, "fit the 1x1 convolutions by Muon, the rest by Adam; else all by Adam")

    # Both
    cosine_decay: bool = setting(True, "lower both learning rates to 0 along a cosine")
    mirror: bool = setting(True, "show every slice as its mirror image too")
    augmentations: int = setting(24, "changed copies of each slice for the PixelCNN, which is told the changes", 0, 64)


# The settings of the original project, as far as its README gives them, and its keras.io ancestor's where not.
ORIGINAL = {
    "num_embeddings": 128,
    "ema_decay": 0.0,
    "filters": (16, 32, 64),
    "kernel_size": 3,
    "decoder_blocks": 0,
    "ssim_weight": 0.0,
    "pixelcnn_filters": 128,
    "dropout": 0.0,
    "learned_position": False,
    "context_filters": 0,
    "zero_init": False,
    "pixelcnn_learning_rate": 3e-4,
    "pixelcnn_warmup_epochs": 0,
    "pixelcnn_clip_norm": 0.0,
    "pixelcnn_muon": False,
    "cosine_decay": False,
    "mirror": False,
    "augmentations": 0,
}
# A few hundred phantoms, and a demo that ends in minutes: smaller batches for more steps.
DEMO = {
    "vqvae_batch_size": 32,
    "vqvae_epochs": 16,
    "pixelcnn_batch_size": 32,
    "pixelcnn_epochs": 24,
}


# --------------------------------------------------------------------------------------
# Settings and the run directory
# --------------------------------------------------------------------------------------


def as_typed(value):
    """A setting as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def as_flags(settings):
    """Settings as they are given on the command line."""

    def as_flag(name, value):
        name = name.replace("_", "-")
        return f"--no-{name}" if value is False else f"--{name} {as_typed(value)}"

    return ", ".join(as_flag(name, value) for name, value in settings.items())


def parse_arguments(arguments):
    """Command line -> (Settings, argparse.Namespace of data, run, demo, original)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"Other defaults of --demo: {as_flags(DEMO)}. Of --original: {as_flags(ORIGINAL)}. "
        "A flag given beside them still counts.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", help="folder of the slices (default: keras_png_slices_data)")
    parser.add_argument("--run", help="folder of the results (default: runs/oasis; runs/demo with --demo)")
    parser.add_argument("--demo", action="store_true", help="draw head phantoms into the run directory and use them")
    parser.add_argument("--original", action="store_true", help="the settings of the original project")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        meaning = f"{field.metadata['help']} (default: {as_typed(field.default)})"
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=meaning)
        elif field.type in (int, float):
            parser.add_argument(flag, type=field.type, metavar="N", help=meaning)
        else:
            parser.add_argument(flag, type=int, nargs="+", metavar="N", help=meaning)
    options = parser.parse_args(arguments)
    if options.demo and options.data:
        parser.error("--demo makes its own data: leave out --data, or --demo")

    values = {**(DEMO if options.demo else {}), **(ORIGINAL if options.original else {})}
    for field in dataclasses.fields(Settings):
        given = getattr(options, field.name)
        if given is not None:
            values[field.name] = tuple(given) if isinstance(given, list) else given
    settings = Settings(**values)
    check_ranges(settings, parser)
    options.run = pathlib.Path(options.run or ("runs/demo" if options.demo else "runs/oasis"))
    options.data = options.run / "phantom_slices" if options.demo else options.data or "keras_png_slices_data"
    return settings, options


def check_ranges(settings, parser):
    for field in dataclasses.fields(Settings):
        value, low, high = getattr(settings, field.name), field.metadata["low"], field.metadata["high"]
        for number in value if isinstance(value, tuple) else [value]:
            if low is not None and not low <= number <= high:
                parser.error(f"--{field.name.replace('_', '-')} must be from {low} to {high}, not {number}")
    if dataset.IMAGE_SIZE % 2 ** len(settings.filters):
        parser.error(f"--filters: {dataset.IMAGE_SIZE} pixels cannot be halved {len(settings.filters)} times")
    if settings.pixelcnn_filters % 2:
        parser.error(f"--pixelcnn-filters must be even, not {settings.pixelcnn_filters}")


def library_versions():
    return {"python": sys.version.split()[0], "tensorflow": tf.__version__, "keras": keras.__version__}


def open_run(run, settings, data_folder, data, phantom):
    """Write config.json into a new run directory, or refuse one that was started otherwise."""
    config = {
        "settings": dataclasses.asdict(settings),
        "data": {"folder": str(pathlib.Path(data_folder).resolve()), "phantom": phantom, **data},
        "versions": library_versions(),
        "finished": {},  # {stage: sha256 of its model}
    }
    config = json.loads(json.dumps(config))  # tuples become lists, as in a config read from a file
    before = dataset.read_config(run)
    if before is None:
        if models := sorted(path.name for path in run.glob("*.keras")):
            raise dataset.UserError(f"--run {run} holds {models[0]}, but no config.json: choose another --run")
        dataset.write_json(run / "config.json", config)
        return
    for name in config["settings"]:
        now, then = config["settings"][name], before["settings"].get(name)
        if now != then:
            flag = "--" + name.replace("_", "-")
            raise dataset.UserError(f"--run {run} was started with {flag} {then}, not {now}: choose another --run")
    for split in data:
        if before["data"].get(split) != data[split]:
            then = (before["data"].get(split) or {}).get("images")
            raise dataset.UserError(
                f"--run {run} was started with other {split} slices "
                f"({then}, now {data[split]['images']}): choose another --run, or restore the data"
            )
    for library, version in config["versions"].items():
        if before["versions"].get(library) != version:
            print(f"warning: this run was started with {library} {before['versions'].get(library)}, now {version}")


# --------------------------------------------------------------------------------------
# One stage: a model, fitted epoch by epoch into the run directory
# --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Schedule:
    """How long, and in what steps, a model is fitted."""

    epochs: int
    batch_size: int
    learning_rate: float  # at its highest
    warmup_epochs: int = 0  # over which it rises to that
    cosine_decay: bool = True  # whether it then falls to 0 along half a cosine
    clip_norm: float = 0  # norm to which a step's gradient is shortened; 0 for none
    muon: bool = False  # whether matrices are fitted by Muon, and only the rest by Adam
    seed: int = 0  # of the weights, the order of the examples and the dropout


class Stage:
    """One model of a run: its schedule, and its files in the run directory."""

    def __init__(self, run, name, schedule):
        self.name, self.schedule = name, schedule
        self.best = run / f"{name}.keras"
        self.last = run / f"{name}_last.keras"  # model and optimizer, to resume from; gone when finished
        self.history = run / f"{name}_history.csv"
        self.plot = run / f"{name}_loss.png"

    def read_history(self, epochs):
        """The rows of the first epochs, as {column: number}."""
        if not epochs:
            return []
        try:
            with open(self.history, newline="") as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)][:epochs]
            if [row["epoch"] for row in rows if {"loss", "val_loss"} <= row.keys()] == list(range(1, epochs + 1)):
                return rows
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise dataset.UserError(
            f"{self.history} does not hold the {epochs} epoch(s) that {self.last.name} has behind it: "
            f"delete both, and {self.name} starts again from its first epoch"
        )

    def write_history(self, rows):
        def write(path):
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows({**row, "epoch": int(row["epoch"])} for row in rows)

        dataset.write_whole(self.history, write)

    def is_finished(self):
        """Whether config.json says so. A model that is not the one it speaks of is refused.

        The PixelCNN of a run belongs to the codes of one VQ-VAE, so neither is ever fitted a second time.
        """
        finished = dataset.read_config(self.best.parent)["finished"].get(self.name)
        if finished is None:
            return False
        if not self.best.exists() or dataset.file_checksum(self.best) != finished:
            raise dataset.UserError(
                f"{self.best} is not the model that this run was finished with: restore it, or choose another --run"
            )
        self.last.unlink(missing_ok=True)  # a run that was killed at the end of `finish` leaves it behind
        print(f"{self.name}: finished before, {self.best}")
        return True

    def finish(self, rows):
        """Plot the history, and note in config.json which model the stage ended with."""
        plot_history(self, rows)
        config = dataset.read_config(self.best.parent)
        config["finished"][self.name] = dataset.file_checksum(self.best)
        dataset.write_json(self.best.parent / "config.json", config)
        self.last.unlink()


def selection_loss(row, split="val_"):
    """What chooses the epoch: the loss without the quantizer's terms, on validate unless `split` is empty.

    Those terms follow the scale of the latents, and can grow while the reconstructions get better.
    """
    return row[f"{split}loss"] - row.get(f"{split}quantizer_loss", 0)


def save_alone(model, path):
    """Write a model without its optimizer, a third of the size, and not compiled."""
    alone = type(model).from_config(model.get_config())
    alone.set_weights(model.get_weights())
    alone.save(path)


class Checkpoint(keras.callbacks.Callback):
    """After each epoch: keeps the history, what a later call needs to go on, and the best model.

    The files are written in this order. A run that was killed between them has a row more than `last`
    has epochs, which is written again, or a `last` that is better than `best`, which `keep_best` mends:
    so the best model always is that of a row.
    """

    def __init__(self, stage, rows):
        super().__init__()
        self.stage, self.rows = stage, rows

    def on_train_begin(self, logs=None):
        self.keep_best()

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.time()
        # Dropout depends on the number of the step alone, as the data order does: resuming needs no hidden state.
        states = [v for v in self.model.non_trainable_variables if v.name == "seed_generator_state"]
        for number, state in enumerate(states):
            state.assign([self.stage.schedule.seed + 7919 * number, int(self.model.optimizer.iterations.numpy())])

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, "seconds": round(time.time() - self.started, 2), **logs}
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            raise dataset.UserError(
                f"{self.stage.name}: the loss is not a number in epoch {epoch + 1}; the best model so far is kept. "
                f"Lower --{self.stage.name}-learning-rate, in another --run"
            )
        self.rows.append(row)
        self.stage.write_history(self.rows)
        dataset.write_whole(self.stage.last, self.model.save)
        self.keep_best()
        epochs = self.stage.schedule.epochs
        left = np.median([row["seconds"] for row in self.rows]) * (epochs - len(self.rows))
        left = f"{left / 60:.0f} min" if left > 120 else f"{left:.0f} s"
        print(f"{self.stage.name}: epoch {len(self.rows)} of {epochs}, about {left} left")

    def keep_best(self):
        if not self.rows:
            return
        if min(self.rows, key=selection_loss) is self.rows[-1]:
            dataset.write_whole(self.stage.best, lambda path: save_alone(self.model, path))
        elif not self.stage.best.exists():
            raise dataset.UserError(
                f"{self.stage.best} is missing: restore it, or delete {self.stage.last.name}, "
                f"and {self.stage.name} starts again from its first epoch"
            )


def learning_rates(schedule, steps):
    """The learning rate at each step, `steps` an epoch: a rise from 0, then half a cosine to 0; or a constant."""
    highest, warmup = schedule.learning_rate, schedule.warmup_epochs * steps
    if not schedule.cosine_decay:
        return highest
    if not warmup:
        return keras.optimizers.schedules.CosineDecay(highest, schedule.epochs * steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(schedule.epochs * steps - warmup, 1), warmup_target=highest, warmup_steps=warmup
    )


def make_optimizer(schedule, steps):
    """Adam; or Muon, whose steps of a matrix change all of its directions alike (Liu et al., arXiv 2502.16982)."""
    rates, clip_norm = learning_rates(schedule, steps), schedule.clip_norm or None
    if not schedule.muon:
        return keras.optimizers.Adam(rates, global_clipnorm=clip_norm)
    return keras.optimizers.Muon(rates, weight_decay=None, adam_weight_decay=None, global_clipnorm=clip_norm)


def fit(stage, make_model, variants, validation, prepare):
    """Fit a model to its last epoch, from where an earlier call was stopped, if it was.

    Args:
        stage: `Stage`.
        make_model: () -> keras.Model, not compiled.
        variants: training examples (N, V, ...), see `dataset.shuffled_batches`.
        validation: validation examples (N, ...).
        prepare: batch of examples -> what the model is fitted on.
    """
    schedule = stage.schedule
    examples = len(tf.nest.flatten(variants)[0])
    batch_size = min(schedule.batch_size, examples)
    steps = examples // batch_size
    with modules.choose_strategy().scope():
        if stage.last.exists():
            model = dataset.load_model(stage.last, f"delete it, and {stage.name} starts again from its first epoch")
        else:
            keras.utils.set_random_seed(schedule.seed)
            model = make_model()
            model.compile(optimizer=make_optimizer(schedule, steps))
        model.jit_compile = modules.use_xla()  # a saved model has the choice of the machine that saved it

    done = int(model.optimizer.iterations.numpy()) // steps
    rows = stage.read_history(done)
    if done:
        print(f"{stage.name}: goes on after epoch {done} of {schedule.epochs}")
    batches = dataset.shuffled_batches(variants, batch_size, schedule.seed, range(done, schedule.epochs))
    model.fit(
        batches.map(prepare),
        validation_data=tf.data.Dataset.from_tensor_slices(validation).batch(batch_size).map(prepare),
        initial_epoch=done,
        epochs=schedule.epochs,
        steps_per_epoch=steps,
        callbacks=[Checkpoint(stage, rows)],
        shuffle=False,  # done by the batches
        verbose=dataset.progress_verbosity(),
    )
    stage.finish(rows)


def plot_history(stage, rows):
    """Training and validation loss against the epoch, the kept epoch marked; perplexity, where there is one."""
    epochs = [row["epoch"] for row in rows]
    best = min(rows, key=selection_loss)
    has_codebook = "perplexity" in rows[0]
    figure, axes = plt.subplots(1, 1 + has_codebook, figsize=(5 + 4 * has_codebook, 3.5), squeeze=False)
    axis = axes[0, 0]
    axis.plot(epochs, [selection_loss(row, "") for row in rows], label="training")
    axis.plot(epochs, [selection_loss(row) for row in rows], label="validation")
    least = selection_loss(best)
    axis.plot(best["epoch"], least, "o", label=f"kept: epoch {best['epoch']:.0f}, {least:.3f}")
    unit = "loss without the quantizer's terms" if has_codebook else "nats per code"
    axis.set(xlabel="epoch", ylabel=unit, title=stage.name)
    axis.legend()
    if has_codebook:
        axes[0, 1].plot(epochs, [row["perplexity"] for row in rows], label="training")
        axes[0, 1].plot(epochs, [row["val_perplexity"] for row in rows], label="validation")
        axes[0, 1].set(xlabel="epoch", ylabel="perplexity", title="codebook, over each epoch", ylim=(0, None))
        axes[0, 1].legend()
    figure.tight_layout()
    dataset.write_whole(stage.plot, figure.savefig)
    plt.close(figure)


# --------------------------------------------------------------------------------------
# The two stages
# --------------------------------------------------------------------------------------


def make_vqvae(settings, data_variance=1.0):
    return modules.VQVAE(
        settings.num_embeddings,
        settings.embedding_dim,
        settings.commitment_cost,
        settings.ema_decay or None,
        image_size=dataset.IMAGE_SIZE,
        filters=settings.filters,
        kernel_size=settings.kernel_size,
        encoder_blocks=settings.encoder_blocks,
        decoder_blocks=settings.decoder_blocks,
        ssim_weight=settings.ssim_weight,
        data_variance=data_variance,
    )


def make_pixelcnn(settings, num_labels=0):
    side = dataset.IMAGE_SIZE // 2 ** len(settings.filters)
    return modules.PixelCNN(
        settings.num_embeddings,
        (side, side),
        filters=settings.pixelcnn_filters,
        residual_blocks=settings.pixelcnn_blocks,
        dropout=settings.dropout,
        learned_position=settings.learned_position,
        context_filters=settings.context_filters,
        zero_init=settings.zero_init,
        num_labels=num_labels,
        num_changes=dataset.NUM_CHANGES if settings.augmentations else 0,
    )


def fit_vqvae(run, settings, train, validate):
    """The VQ-VAE of a run, fitted on the slices of two splits."""
    schedule = Schedule(
        settings.vqvae_epochs,
        settings.vqvae_batch_size,
        settings.vqvae_learning_rate,
        cosine_decay=settings.cosine_decay,
        seed=settings.seed,
    )
    stage = Stage(run, "vqvae", schedule)
    if not stage.is_finished():
        fit(
            stage,
            lambda: make_vqvae(settings, data_variance=np.var(train.images / np.float32(255))),
            np.stack(dataset.shown_variants(train.images, settings.mirror), axis=1),
            validate.images,
            prepare=dataset.to_float,
        )
    return dataset.load_model(stage.best, "choose another --run")


def fit_pixelcnn(run, settings, vqvae, train, validate):
    """The PixelCNN of a run, fitted on the codes of the same slices, with the slice numbers as labels."""
    schedule = Schedule(
        settings.pixelcnn_epochs,
        settings.pixelcnn_batch_size,
        settings.pixelcnn_learning_rate,
        settings.pixelcnn_warmup_epochs,
        settings.cosine_decay,
        settings.pixelcnn_clip_norm,
        settings.pixelcnn_muon,
        settings.seed,
    )
    stage = Stage(run, "pixelcnn", schedule)
    if stage.is_finished():
        return
    num_labels = 0 if train.labels is None else 1 + int(train.labels.max())
    train_labels, validate_labels = (dataset.known_labels(split, num_labels) for split in (train, validate))
    codes, changes = encode_variants(vqvae, train.images, settings)
    fit(
        stage,
        lambda: make_pixelcnn(settings, num_labels),
        (codes, np.repeat(train_labels[:, None], codes.shape[1], axis=1), changes),
        (dataset.codes_of(vqvae, validate.images / np.float32(255)), validate_labels),
        prepare=lambda *inputs: (inputs,),
    )


def encode_variants(vqvae, images, settings):
    """What the PixelCNN is shown of each slice: as it is, mirrored, and changed copies of both in turn.

    Args: images, uint8 (N, H, W).
    Returns: codes, int32 (N, V, h, w); the changes of each, float32 (N, V, 6), see `dataset.augment`.
    """
    unchanged = dataset.shown_variants(images, settings.mirror)
    # About a quarter of all that is shown is unchanged, for so the prior is measured and sampled.
    repeats = max(1, settings.augmentations // (3 * len(unchanged)))
    codes = [dataset.codes_of(vqvae, pictures / np.float32(255)) for pictures in unchanged] * repeats
    changes = [np.zeros((len(images), dataset.NUM_CHANGES), np.float32)] * len(codes)
    if settings.augmentations:
        print(f"making {settings.augmentations} changed copies of {len(images)} training slices")
        progress = dataset.progress_bar(settings.augmentations, "copy")
    for number in range(settings.augmentations):
        changed, told = dataset.augment(unchanged[number % len(unchanged)], (settings.seed, number))
        codes.append(dataset.codes_of(vqvae, changed / np.float32(255)))
        changes.append(told)
        progress.update(number + 1)
    return np.stack(codes, axis=1), np.stack(changes, axis=1)


def prepare_run(settings, options):
    """The run directory, with its config.json, and the data: {name: Split}."""
    run = options.run
    if run.exists() and not run.is_dir():
        raise dataset.UserError(f"--run {run} is a file: choose another")
    if not options.demo:
        dataset.find_data(options.data)  # so that a misspelt folder leaves no empty run behind
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise dataset.UserError(f"--run {run} cannot be created ({error.strerror}): choose another") from None
    if options.demo and not options.data.exists():
        dataset.write_phantom(options.data)
    splits = dataset.load(options.data)
    open_run(run, settings, options.data, dataset.fingerprint(splits), options.demo)
    return splits


def main(arguments=None):
    settings, options = parse_arguments(arguments)
    try:
        print(modules.set_up_devices())
        splits = prepare_run(settings, options)
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        vqvae = fit_vqvae(options.run, settings, splits["train"], splits["validate"])
        fit_pixelcnn(options.run, settings, vqvae, splits["train"], splits["validate"])
    except dataset.UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    print(f"done: now run python predict.py --run {shlex.quote(str(options.run))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
