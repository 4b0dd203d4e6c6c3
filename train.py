"""Fits the VQ-VAE on brain slices, then the PixelCNN on its codes.

    python train.py --data keras_png_slices_data      # the preprocessed OASIS slices
    python train.py --demo                            # random head phantoms, nothing to download
    python train.py --original --run runs/original    # the settings of the 2022 project, for comparison

Everything goes into the run directory (--run): settings, models, histories, loss plots. The same
command continues a run that was stopped. Afterwards: python predict.py --run RUN.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import signal
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import dataset
import modules


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
    dropout: float = setting(0.2, "rate in every residual block", 0.0, 0.9)
    zero_init: bool = setting(True, "residual blocks start as identities, which allows the learning rate below")
    context_filters: int = setting(64, "channels that sum up all rows above; 0 for none", 0, 4096)
    learned_position: bool = setting(True, "add a learned vector for each grid position")
    labels: bool = setting(True, "tell the slice number, where names tell it")
    scores: int = setting(16, "principal scores of the whole slice that are told, if labels are; 0 for none", 0, 64)
    below: bool = setting(True, "tell the slice below in the same head, if labels are: for whole heads")
    pixelcnn_epochs: int = setting(100, "epochs of the PixelCNN", 1, 10**6)
    pixelcnn_batch_size: int = setting(128, "grids of codes a step", 1, 2**16)
    pixelcnn_learning_rate: float = setting(1e-2, "at its highest", 1e-8, 1.0)
    pixelcnn_warmup_epochs: int = setting(1, "over which the learning rate rises to it, at most half of all", 0, 10**6)
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
    "zero_init": False,
    "context_filters": 0,
    "learned_position": False,
    "labels": False,
    "scores": 0,
    "below": False,
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


def as_flag(name):
    return "--" + name.replace("_", "-")


def parse_arguments(arguments):
    """Command line -> (Settings, argparse.Namespace of data, run, demo, original)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"Other defaults of --demo: {DEMO}. Of --original: {ORIGINAL}. A flag given beside them still counts.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", help="folder of the slices (default: keras_png_slices_data)")
    parser.add_argument("--run", help="folder of the results (default: runs/oasis; runs/demo with --demo)")
    parser.add_argument("--demo", action="store_true", help="draw head phantoms into the run directory and use them")
    parser.add_argument("--original", action="store_true", help="the settings of the original project")
    for field in dataclasses.fields(Settings):
        if field.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif field.type in (int, float):
            options = {"type": field.type, "metavar": "N"}
        else:
            options = {"type": int, "nargs": "+", "metavar": "N"}
        parser.add_argument(as_flag(field.name), help=field.metadata["help"] + " (default: %(default)s)", **options)
    parser.set_defaults(**dataclasses.asdict(Settings()))
    options = parser.parse_args(arguments)
    parser.set_defaults(**(DEMO if options.demo else {}), **(ORIGINAL if options.original else {}))
    options = parser.parse_args(arguments)  # again, for the defaults of --demo and --original are other ones
    if options.demo and options.data:
        parser.error("--demo makes its own data: leave out --data, or --demo")
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    check_ranges(settings, parser)
    options.run = pathlib.Path(options.run or ("runs/demo" if options.demo else "runs/oasis"))
    options.data = options.run / "phantom_slices" if options.demo else options.data or "keras_png_slices_data"
    return settings, options


def check_ranges(settings, parser):
    for field in dataclasses.fields(Settings):
        value, low, high = getattr(settings, field.name), field.metadata["low"], field.metadata["high"]
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if low is not None and not low <= number <= high:
                parser.error(f"{as_flag(field.name)} must be from {low} to {high}, not {number}")
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
        if models := sorted(path.name for path in [*run.glob("*.keras"), *run.glob("*_last.npz")]):
            raise dataset.UserError(f"--run {run} holds {models[0]}, but no config.json: choose another --run")
        dataset.write_json(run / "config.json", config)
        return
    for name, now in config["settings"].items():
        if (then := before["settings"].get(name)) != now:
            raise dataset.UserError(
                f"--run {run} was started with {as_flag(name)} {then}, not {now}: choose another --run"
            )
    for split in data:
        if before["data"][split] != data[split]:
            raise dataset.UserError(f"--run {run} was started with other {split} data: restore them, or another --run")
    if before["versions"] != config["versions"]:
        print(f"warning: this run was started with {before['versions']}, now there are {config['versions']}")


# --------------------------------------------------------------------------------------
# One stage: a model, fitted epoch by epoch into the run directory
# --------------------------------------------------------------------------------------

SAVE_EVERY = 60  # seconds, at least, between two savings: on a fast card one takes longer than an epoch


class Stage:
    """One model of a run, "vqvae" or "pixelcnn": its settings, and its files in the run directory."""

    def __init__(self, run, name, settings):
        self.run, self.name, self.settings = run, name, settings
        self.best = run / f"{name}.keras"
        self.last = run / f"{name}_last.npz"  # all that a stopped training needs to go on; gone when finished
        self.history = run / f"{name}_history.csv"
        self.plot = run / f"{name}_loss.png"

    def setting(self, name, default=None):
        return getattr(self.settings, f"{self.name}_{name}", default)


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
        if stage.last.exists():
            self.load(len(model.variables))
        self.saved, self.saved_at = len(self.rows), time.time()  # epochs; time

    def load(self, variables):
        try:
            with np.load(self.stage.last) as file:
                self.rows = json.loads(str(file["rows"]))
                self.last = [file[f"last{i}"] for i in range(len(self.state))]
                self.best = [file[f"best{i}"] for i in range(variables)]
            for variable, value in zip(self.state, self.last):
                variable.assign(value)
        except Exception as error:  # NumPy and zipfile have many kinds of their own for damaged files
            raise dataset.UserError(
                f"{self.stage.last} is broken ({type(error).__name__}): "
                f"delete it, and {self.stage.name} starts again from its first epoch"
            ) from None

    def save(self):
        if self.saved == len(self.rows):
            return
        arrays = {f"{kind}{i}": value for kind in ("last", "best") for i, value in enumerate(getattr(self, kind))}
        # The history first, so that it is never behind what a stopped training goes on from.
        dataset.write_table(self.stage.history, self.rows[0], [row.values() for row in self.rows])
        dataset.write_arrays(self.stage.last, np.savez, rows=json.dumps(self.rows), **arrays)  # not compressed: faster
        self.saved, self.saved_at = len(self.rows), time.time()

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.time()

    def on_epoch_end(self, epoch, logs=None):
        name, epochs = self.stage.name, self.stage.setting("epochs")
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            raise dataset.UserError(
                f"{name}: the loss is not a number in epoch {epoch + 1}; what came before is kept. "
                f"Lower --{name}-learning-rate, in another --run"
            )
        row = {"epoch": epoch + 1, "seconds": round(time.time() - self.started, 2)}
        rows = [*self.rows, {**row, **{key: float(value) for key, value in logs.items()}}]
        last = [keras.ops.convert_to_numpy(variable) for variable in self.state]
        is_best = min(rows, key=selection_loss) is rows[-1]
        # All at once: Ctrl-C may come anywhere, and what it saves must belong together.
        self.rows, self.last, self.best = rows, last, last[: len(self.model.variables)] if is_best else self.best
        if time.time() > self.saved_at + SAVE_EVERY or epoch + 1 == epochs:
            self.save()
        left = row["seconds"] * (epochs - epoch - 1) / 60  # too much in the first epoch of a call, which compiles
        print(f"{name}: epoch {epoch + 1} of {epochs}, about {left:.1f} min left")


def make_optimizer(stage, steps):
    """Adam; or Muon, whose steps of a matrix change all of its directions alike (Liu et al., arXiv 2502.16982).

    The learning rate rises from 0 for the warm-up, then it falls to 0 along half a cosine, or stays.
    Keras advises Adam for embeddings and for the output layer.
    """
    epochs, highest = stage.setting("epochs"), stage.setting("learning_rate")
    warmup = int(min(stage.setting("warmup_epochs", 0), epochs / 2) * steps)
    rates = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else highest,
        epochs * steps - warmup,
        alpha=0.0 if stage.settings.cosine_decay else 1.0,
        warmup_target=highest if warmup else None,
        warmup_steps=warmup,
    )
    clip_norm = stage.setting("clip_norm") or None
    if not stage.setting("muon"):
        return keras.optimizers.Adam(rates, global_clipnorm=clip_norm)
    return keras.optimizers.Muon(
        rates, weight_decay=None, adam_weight_decay=None, global_clipnorm=clip_norm, exclude_layers=["logits"]
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
    model.compile(optimizer=make_optimizer(stage, steps))
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
                verbose=dataset.progress_verbosity(),
            )
        except (KeyboardInterrupt, dataset.UserError):
            checkpoint.save()
            raise
    # A model of its own, without the optimizer and what the compiling left.
    best = type(model).from_config(model.get_config())
    for variable, value in zip(best.variables, checkpoint.best, strict=True):
        variable.assign(value)
    dataset.write_whole(stage.best, best.save)
    plot_history(stage, checkpoint.rows)
    config = dataset.read_config(stage.run)
    config["finished"][stage.name] = dataset.file_checksum(stage.best)
    dataset.write_json(stage.run / "config.json", config)
    stage.last.unlink(missing_ok=True)
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
    dataset.write_whole(stage.plot, lambda temporary: figure.savefig(temporary, format="png"))


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


def make_pixelcnn(settings, num_labels=0, num_scores=0):
    side = dataset.IMAGE_SIZE // 2 ** len(settings.filters)
    return modules.PixelCNN(
        settings.num_embeddings,
        (side, side),
        filters=settings.pixelcnn_filters,
        residual_blocks=settings.pixelcnn_blocks,
        dropout=settings.dropout,
        zero_init=settings.zero_init,
        context_filters=settings.context_filters,
        learned_position=settings.learned_position,
        num_labels=num_labels,
        num_scores=num_scores,
        num_changes=dataset.NUM_CHANGES if settings.augmentations else 0,
        tell_below=settings.below and num_labels > 0,
    )


def fit_vqvae(run, settings, train, validate):
    """The VQ-VAE of a run, fitted on the slices of two splits."""
    if finished := dataset.finished_model(run, "vqvae"):
        print("vqvae: finished before")
        return finished
    with tf.device("CPU"):  # the data stay on the host
        images = tf.stack(dataset.shown_variants(train.images, settings.mirror), axis=1)

    def prepare(index):
        return tf.cast(tf.gather_nd(images, index)[..., None], tf.float32) / 255

    def make_model():
        return make_vqvae(settings, data_variance=np.var(dataset.to_float(train.images)))

    return fit(Stage(run, "vqvae", settings), make_model, images.shape[:2], prepare, dataset.to_float(validate.images))


def fit_pixelcnn(run, settings, vqvae, train, validate):
    """The PixelCNN of a run, fitted on the codes of the same slices, and on what is known of them."""
    if dataset.finished_model(run, "pixelcnn"):
        print("pixelcnn: finished before")
        return
    num_labels = 1 + int(train.labels.max()) if settings.labels else 0
    num_scores = min(settings.scores, len(train.images) - 1) if num_labels else 0
    codes, scores, changes = encode_variants(vqvae, train, num_scores, settings)
    with tf.device("CPU"):
        shown = {"codes": codes, "scores": scores, "changes": changes}
        shown = {name: tf.constant(values) for name, values in shown.items() if values.size}  # there may be no scores
        labels, below = tf.constant(train.known_labels(num_labels)), tf.constant(dataset.slices_below(train))

    def prepare(index):
        """What is shown and told of a batch. The slice below has the same change."""
        example, variant = index[:, 0], index[:, 1]
        batch = {name: tf.gather_nd(values, index) for name, values in shown.items()}
        lower = tf.gather(below, example)[:, None, None]
        lower_codes = tf.gather_nd(shown["codes"], tf.stack([tf.maximum(lower[:, 0, 0], 0), variant], axis=1))
        batch["codes"] = tf.cast(batch["codes"], tf.int32)
        batch["below"] = tf.where(lower < 0, -1, tf.cast(lower_codes, tf.int32))
        return {**batch, "labels": tf.gather(labels, example)}

    def make_model():
        model = make_pixelcnn(settings, num_labels, num_scores)
        if num_scores:
            known = train.labels >= 0
            model.fit_scores(scores[known, 0], train.labels[known], dataset.heads_of(train[known]))
        return model

    codes_to_validate = vqvae.encode(dataset.to_float(validate.images))
    validation = {"codes": codes_to_validate, "labels": validate.known_labels(num_labels)}
    fit(Stage(run, "pixelcnn", settings), make_model, codes.shape[:2], prepare, validation)


def encode_variants(vqvae, train, num_scores, settings):
    """What the PixelCNN is shown of each training slice: as it is, mirrored, and changed copies of both in turn.

    Returns: codes, the smallest integers that hold K, (N, V, h, w); standardised principal scores of each,
        float32 (N, V, num_scores); the changes of each, float32 (N, V, 6), see `dataset.augment`.
    """
    scores_of = dataset.principal_scores(dataset.to_float(train.images), num_scores)
    heads, unchanged = dataset.heads_of(train), dataset.shown_variants(train.images, settings.mirror)
    variants = []

    def add_variant(pictures, changes):
        images = dataset.to_float(pictures)
        codes = vqvae.encode(images).numpy().astype(np.min_scalar_type(vqvae.num_embeddings - 1))
        variants.append((codes, scores_of(images), changes))

    for pictures in unchanged:
        add_variant(pictures, np.zeros((len(pictures), dataset.NUM_CHANGES), np.float32))
    # About a quarter of all that is shown is unchanged, for so the prior is measured and sampled.
    variants *= max(1, settings.augmentations // (3 * len(unchanged)))
    print(f"making {settings.augmentations} changed copies of {len(train.images)} training slices")
    for number in dataset.progress(range(settings.augmentations), "copy"):
        add_variant(*dataset.augment(unchanged[number % len(unchanged)], heads, (settings.seed, number)))
    return tuple(np.stack(parts, axis=1) for parts in zip(*variants))


def prepare_run(settings, options):
    """The run directory, with its config.json, and the data: {name: Slices}."""
    if options.demo and not options.data.exists():
        dataset.write_phantom(options.data)
    splits = dataset.load(options.data)  # first, so that a misspelt folder leaves no empty run behind
    with dataset.told_if_it_fails(options.run):
        options.run.mkdir(parents=True, exist_ok=True)
    open_run(options.run, settings, options.data, dataset.fingerprint(splits), options.demo)
    return splits


def train(settings, options):
    """Both models of a run, from where an earlier call was stopped."""
    splits = prepare_run(settings, options)
    print(json.dumps(dataclasses.asdict(settings), indent=2))
    vqvae = fit_vqvae(options.run, settings, splits["train"], splits["validate"])
    fit_pixelcnn(options.run, settings, vqvae, splits["train"], splits["validate"])
    print(f"done: now run python predict.py --run {shlex.quote(str(options.run))}")


def main(arguments=None):
    settings, options = parse_arguments(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the last epoch is saved
    print(modules.set_up_devices())
    return dataset.exit_code("train.py", train, settings, options)


if __name__ == "__main__":
    sys.exit(main())
