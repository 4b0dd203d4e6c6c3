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
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is imported

import keras
import matplotlib
import numpy as np
import tensorflow as tf

import dataset
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
    ema_decay: float = setting(0.99, "of the codebook's moving average; 0 trains it by gradient", 0.0, 0.9999)
    filters: tuple[int, ...] = setting((32, 64), "width of each halving convolution; 2 make a 16x16 grid", 1, 1024)
    kernel_size: int = setting(4, "of the halving convolutions", 2, 9)
    residual_blocks: int = setting(2, "in the encoder, and again in the decoder", 0, 32)
    ssim_weight: float = setting(1.0, "of 1 - SSIM beside the squared error", 0.0, 100.0)
    vqvae_epochs: int = setting(30, "epochs of the VQ-VAE", 1, 10**6)
    vqvae_batch_size: int = setting(64, "slices a step", 1, 2**16)
    vqvae_learning_rate: float = setting(1e-3, "Adam's, at the start", 1e-8, 1.0)

    # PixelCNN
    pixelcnn_filters: int = setting(64, "channels between the residual blocks, half of them inside", 2, 4096)
    pixelcnn_blocks: int = setting(15, "residual blocks; 15 in the PixelRNN paper, table 1", 1, 128)
    dropout: float = setting(0.4, "rate in every residual block and context", 0.0, 0.9)
    learned_position: bool = setting(True, "add a learned vector for each grid position")
    context_filters: int = setting(64, "channels that sum up all earlier codes; 0 for none", 0, 4096)
    pixelcnn_epochs: int = setting(100, "epochs of the PixelCNN", 1, 10**6)
    pixelcnn_batch_size: int = setting(128, "grids of codes a step", 1, 2**16)
    pixelcnn_learning_rate: float = setting(1e-3, "Adam's, at the start", 1e-8, 1.0)

    # Both
    cosine_decay: bool = setting(True, "lower both learning rates to 0 along a cosine")
    mirror: bool = setting(True, "show every slice as its mirror image half of the time")


# The settings of the original project, as far as its README gives them, and its keras.io ancestor's where not.
ORIGINAL = {
    "num_embeddings": 128,
    "ema_decay": 0.0,
    "filters": (16, 32, 64),
    "kernel_size": 3,
    "residual_blocks": 0,
    "ssim_weight": 0.0,
    "pixelcnn_filters": 128,
    "dropout": 0.0,
    "learned_position": False,
    "context_filters": 0,
    "pixelcnn_learning_rate": 3e-4,
    "cosine_decay": False,
    "mirror": False,
}
# A few hundred phantoms, and a demo that ends in minutes: smaller batches for more steps, a codebook that opens in a
# few of them, and little dropout, for there is no time to overfit.
DEMO = {
    "ema_decay": 0.9,
    "vqvae_batch_size": 32,
    "vqvae_epochs": 12,
    "pixelcnn_batch_size": 32,
    "pixelcnn_epochs": 8,
    "pixelcnn_learning_rate": 3e-3,
    "dropout": 0.1,
}


# --------------------------------------------------------------------------------------
# Settings and the run directory
# --------------------------------------------------------------------------------------


def parse_arguments(arguments):
    """Command line -> (Settings, argparse.Namespace of data, run, demo, original)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="--original and --demo change defaults; a flag given beside them still counts.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", help="folder of the slices (default: keras_png_slices_data)")
    parser.add_argument("--run", help="folder of the results (default: runs/oasis; runs/demo with --demo)")
    parser.add_argument("--demo", action="store_true", help="draw head phantoms into the run directory and use them")
    parser.add_argument("--original", action="store_true", help="the settings of the original project")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        meaning = f"{field.metadata['help']} (default: {field.default})"
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
    }
    config = json.loads(json.dumps(config))  # tuples become lists, as in a config read from a file
    path = run / "config.json"
    if not path.exists():
        dataset.write_json(path, config)
        return
    try:
        before = json.loads(path.read_text())
        versions, before_data, before_settings = ({**before[part]} for part in ("versions", "data", "settings"))
    except (OSError, ValueError, KeyError, TypeError):
        raise dataset.UserError(f"{path} is broken: choose another --run, or delete this one") from None
    for name in config["settings"]:
        now, then = config["settings"][name], before_settings.get(name)
        if now != then:
            flag = "--" + name.replace("_", "-")
            raise dataset.UserError(f"--run {run} was started with {flag} {then}, not {now}: choose another --run")
    for split in data:
        if before_data.get(split) != data[split]:
            then = (before_data.get(split) or {}).get("images")
            raise dataset.UserError(
                f"--run {run} was started with other {split} slices "
                f"({then}, now {data[split]['images']}): choose another --run, or restore the data"
            )
    for library, version in config["versions"].items():
        if versions.get(library) != version:
            print(f"warning: this run was started with {library} {versions.get(library)}, now {version}")


# --------------------------------------------------------------------------------------
# One stage: a model, fitted epoch by epoch into the run directory
# --------------------------------------------------------------------------------------


class Stage:
    """The files of one model in the run directory."""

    def __init__(self, run, name, epochs):
        self.name, self.epochs = name, epochs
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
        return self.plot.exists() and self.best.exists() and not self.last.exists()


def data_loss(row, split=""):
    """The loss without the quantizer's terms; the best epoch is that with the least on validate (split "val_").

    Those terms follow the scale of the latents, and can grow while the reconstructions get better.
    """
    return row[f"{split}loss"] - row.get(f"{split}quantizer_loss", 0)


class Keeper(keras.callbacks.Callback):
    """After each epoch: keeps the best model, the history, and what a later call needs to go on.

    The three files are written in this order, so that whenever the run is killed, the first two
    hold at least what `last` holds; an epoch that is done again gives the same again.
    """

    def __init__(self, stage, rows, seed):
        super().__init__()
        self.stage, self.rows, self.seed = stage, rows, seed

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.time()
        # Dropout depends on the epoch alone, as the data order does: resuming needs no hidden state.
        states = [v for v in self.model.non_trainable_variables if v.name == "seed_generator_state"]
        for number, state in enumerate(states):
            state.assign([self.seed + 7919 * number, epoch])

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, "seconds": round(time.time() - self.started, 2), **logs}
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            raise dataset.UserError(
                f"{self.stage.name}: the loss is not a number in epoch {epoch + 1}; the best model so far is kept. "
                f"Lower --{self.stage.name}-learning-rate, in another --run"
            )
        if all(data_loss(row, "val_") < data_loss(earlier, "val_") for earlier in self.rows):
            dataset.write_whole(self.stage.best, self.model.save)
        self.rows.append(row)
        self.stage.write_history(self.rows)
        dataset.write_whole(self.stage.last, self.model.save)
        left = np.median([row["seconds"] for row in self.rows]) * (self.stage.epochs - len(self.rows))
        print(f"{self.stage.name}: epoch {len(self.rows)} of {self.stage.epochs}, about {left / 60:.0f} min left")


def fit(stage, settings, make_model, variants, validation, batch_size, learning_rate, prepare, loss=None):
    """Fit a model to its last epoch, from where an earlier call was stopped, if it was.

    Args:
        stage: `Stage`.
        make_model: () -> keras.Model, not compiled.
        variants: training examples (N, V, ...), see `dataset.shuffled_batches`.
        validation: validation examples (N, ...).
        prepare: batch of examples -> what the model is fitted on.
        loss: of `Model.compile`.
    """
    batch_size = min(batch_size, len(variants))
    steps = len(variants) // batch_size
    # Every GPU of the machine; where there is one or none, TensorFlow chooses the device by itself.
    several = len(tf.config.list_physical_devices("GPU")) > 1
    strategy = tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()
    with strategy.scope():
        if stage.last.exists():
            model = dataset.load_model(stage.last, f"delete it, and {stage.name} starts again from its first epoch")
        else:
            keras.utils.set_random_seed(settings.seed)
            model = make_model()
            if settings.cosine_decay:
                learning_rate = keras.optimizers.schedules.CosineDecay(learning_rate, steps * stage.epochs)
            model.compile(optimizer=keras.optimizers.Adam(learning_rate), loss=loss)

    done = int(model.optimizer.iterations) // steps
    rows = stage.read_history(done)
    if done:
        print(f"{stage.name}: goes on after epoch {done} of {stage.epochs}")
    if done < stage.epochs:
        batches = dataset.shuffled_batches(variants, batch_size, settings.seed, range(done, stage.epochs))
        model.fit(
            batches.map(prepare),
            validation_data=tf.data.Dataset.from_tensor_slices(validation).batch(batch_size).map(prepare),
            initial_epoch=done,
            epochs=stage.epochs,
            steps_per_epoch=steps,
            callbacks=[Keeper(stage, rows, settings.seed)],
            shuffle=False,  # done by the batches
            verbose=1 if sys.stdout.isatty() else 2,
        )
    plot_history(stage, rows)
    stage.last.unlink()


def plot_history(stage, rows):
    """Training and validation loss against the epoch, the kept epoch marked; perplexity, where there is one."""
    epochs = [row["epoch"] for row in rows]
    best = min(rows, key=lambda row: data_loss(row, "val_"))
    has_codebook = "perplexity" in rows[0]
    figure, axes = plt.subplots(1, 1 + has_codebook, figsize=(5 + 4 * has_codebook, 3.5), squeeze=False)
    axis = axes[0, 0]
    axis.plot(epochs, [data_loss(row) for row in rows], label="training")
    axis.plot(epochs, [data_loss(row, "val_") for row in rows], label="validation")
    least = data_loss(best, "val_")
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
        residual_blocks=settings.residual_blocks,
        ssim_weight=settings.ssim_weight,
        data_variance=data_variance,
    )


def make_pixelcnn(settings):
    side = dataset.IMAGE_SIZE // 2 ** len(settings.filters)
    return modules.PixelCNN(
        settings.num_embeddings,
        (side, side),
        filters=settings.pixelcnn_filters,
        residual_blocks=settings.pixelcnn_blocks,
        dropout=settings.dropout,
        learned_position=settings.learned_position,
        context_filters=settings.context_filters,
    )


def fit_vqvae(stage, settings, variants, validate):
    """Training slices uint8 (N, V, 64, 64), validation slices (N, 64, 64) -> stage.best."""
    fit(
        stage,
        settings,
        lambda: make_vqvae(settings, data_variance=np.var(variants[:, 0] / np.float32(255))),
        variants,
        validate,
        settings.vqvae_batch_size,
        settings.vqvae_learning_rate,
        prepare=dataset.to_float,
    )


def fit_pixelcnn(stage, settings, vqvae, variants, validate):
    """The same slices, encoded once -> stage.best."""
    fit(
        stage,
        settings,
        lambda: make_pixelcnn(settings),
        np.stack([encode(vqvae, variants[:, i]) for i in range(variants.shape[1])], axis=1),
        encode(vqvae, validate),
        settings.pixelcnn_batch_size,
        settings.pixelcnn_learning_rate,
        prepare=lambda codes: (codes, codes),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )


def encode(vqvae, images):
    """Codes of uint8 images (N, 64, 64) -> int32 (N, h, w)."""
    return dataset.in_batches(lambda batch: vqvae.encode(dataset.to_float(batch)), images)


def main(arguments=None):
    settings, options = parse_arguments(arguments)
    run = options.run
    stages = Stage(run, "vqvae", settings.vqvae_epochs), Stage(run, "pixelcnn", settings.pixelcnn_epochs)
    try:
        if run.exists() and not run.is_dir():
            raise dataset.UserError(f"--run {run} is a file: choose another")
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise dataset.UserError(f"--run {run} cannot be created ({error.strerror}): choose another") from None
        if options.demo and not options.data.exists():
            dataset.write_phantom(options.data)
        splits = dataset.load(options.data)
        open_run(run, settings, options.data, dataset.fingerprint(splits), options.demo)
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        train, validate = splits["train"].images, splits["validate"].images
        variants = dataset.with_mirrored(train) if settings.mirror else train[:, None]

        for stage in stages:
            if stage.is_finished():
                print(f"{stage.name}: finished before, {stage.best}")
            elif stage.name == "vqvae":
                fit_vqvae(stage, settings, variants, validate)
            else:
                vqvae = dataset.load_model(stages[0].best, "delete it, and the VQ-VAE is trained again")
                fit_pixelcnn(stage, settings, vqvae, variants, validate)
    except dataset.UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"train.py: stopped; the same command goes on where {run} ends", file=sys.stderr)
        return 130
    print(f"done: now run python predict.py --run {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
