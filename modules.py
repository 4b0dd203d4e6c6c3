"""The two networks: a VQ-VAE for 64x64 slices and a PixelCNN prior over its codes.

References, cited below as [n]:
[1] van den Oord, Vinyals, Kavukcuoglu: Neural Discrete Representation Learning, arXiv 1711.00937
[2] van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, arXiv 1601.06759
[3] van den Oord et al.: Conditional Image Generation with PixelCNN Decoders, arXiv 1606.05328
[4] Paul: Vector-Quantized Variational Autoencoders, keras.io/examples/generative/vq_vae
[5] Ramachandran et al.: Fast Generation for Convolutional Autoregressive Models, arXiv 1704.06001
[6] Jun et al.: Distribution Augmentation for Generative Modeling, ICML 2020
[7] Naval Marimont, Tarroni: Anomaly Detection through Latent Space Restoration using VQ-VAEs, arXiv 2012.06765

Shapes: B images of H x W pixels, a latent grid of h x w positions, D numbers a latent vector,
K codes. An image is float32 in [0, 1], (B, H, W, 1); its codes are int32 in [0, K), (B, h, w).

    vqvae = keras.saving.load_model("runs/oasis/vqvae.keras")
    pixelcnn = keras.saving.load_model("runs/oasis/pixelcnn.keras")
    images = vqvae.decode(pixelcnn.sample(16, seed=0))
"""

import keras
import numpy as np
import tensorflow as tf
import tensorflow_probability as tfp
from keras import layers


def set_up_devices():
    """Prepare what TensorFlow runs on; returns a line that says what that is. Call it before anything else.

    On a GPU, memory is taken as it is needed, so that two processes can share a card, and products stay
    in float32 (no TF32): nearest codes and likelihoods are to be those of a CPU.
    """
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
    return (
        f"running on {len(gpus)} GPU(s): {', '.join(names)}" if gpus else "running on the CPU: TensorFlow sees no GPU"
    )


def choose_strategy():
    """Every GPU of the machine; where there is one or none, TensorFlow chooses the device by itself."""
    several = len(tf.config.list_physical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def use_xla():
    """Whether training steps are compiled by XLA: on exactly one GPU, as Keras does by default.

    On a CPU compiled steps take twice the time, and a MirroredStrategy does without.
    """
    return len(tf.config.list_physical_devices("GPU")) == 1


register = keras.saving.register_keras_serializable(package="oasis")


# --------------------------------------------------------------------------------------
# VQ-VAE
# --------------------------------------------------------------------------------------


def histogram(codes, num_embeddings):
    """How often each code occurs: int32 (N,) -> float32 (K,). XLA compiles this, and not tf.math.bincount."""
    return tf.math.unsorted_segment_sum(tf.ones(tf.shape(codes)), codes, num_embeddings)


@register
class CodebookUsage(keras.metrics.Metric):
    """Perplexity exp(H) of the code histogram, and the number of codes used, over a whole epoch.

    The perplexity of a single batch depends on the batch size; this one counts until it is reset.
    """

    def __init__(self, num_embeddings, name="codebook_usage", **kwargs):
        super().__init__(name=name, **kwargs)
        self.num_embeddings = num_embeddings
        self.counts = self.add_variable((num_embeddings,), "zeros", aggregation="sum", name="counts")

    def update_state(self, codes, sample_weight=None):
        self.counts.assign_add(histogram(tf.reshape(codes, (-1,)), self.num_embeddings))

    def result(self):
        counts = tf.convert_to_tensor(self.counts)
        frequencies = counts / tf.maximum(tf.reduce_sum(counts), 1)
        return {
            "perplexity": tf.exp(-tf.reduce_sum(tf.math.xlogy(frequencies, frequencies))),
            "codes_used": tf.reduce_sum(tf.cast(counts > 0, tf.float32)),
        }

    def get_config(self):
        return {**super().get_config(), "num_embeddings": self.num_embeddings}


def uniform(shape, seed):
    """Random numbers from 0 to 1, by way of integers: of the same bits XLA makes other floats than TensorFlow does."""
    bits = tf.random.stateless_uniform(shape, seed, None, None, tf.int32, alg="philox")
    return tf.cast(bits, tf.float32) / 2**32 + 0.5


def mean_square(x):
    """Mean of the squares; 0 of no numbers, which is what a replica without a slice has."""
    return tf.math.divide_no_nan(tf.reduce_sum(tf.square(x)), tf.cast(tf.size(x), tf.float32))


@register
class VectorQuantizer(layers.Layer):
    """Replaces each latent vector by the nearest vector of a learned codebook [1, section 3.1].

    The gradient passes straight through; `losses` holds the commitment term, and the codebook
    term where the codebook is trained by gradient. With `ema_decay` the codebook instead follows
    the moving average of the latents that chose it [1, appendix A.1], and a code that is hardly
    chosen restarts at a latent vector of the current batch: so the codebook starts from data, and
    codes that die come back.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the length of a latent vector.
        commitment_cost: beta of [1, equation 3].
        ema_decay: gamma of [1, appendix A.1]; None trains the codebook by gradient [1, equation 3].

    Shapes: latents (..., D) -> the nearest codebook vectors, float32 (..., D).
    """

    # A code is dead while it is chosen less than this often, 1 being the even share of B*h*w / K.
    DEAD_BELOW = 0.02
    REBORN_WITH = 0.2

    def __init__(self, num_embeddings, embedding_dim, commitment_cost=1.0, ema_decay=0.99, **kwargs):
        super().__init__(**kwargs)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost
        self.ema_decay = ema_decay
        self.usage = CodebookUsage(num_embeddings)

    def build(self, latents_shape):
        if latents_shape[-1] != self.embedding_dim:
            raise ValueError(
                f"embedding_dim is {self.embedding_dim}, but the latents have {latents_shape[-1]} channels"
            )
        shape = (self.num_embeddings, self.embedding_dim)
        # add_weight, not tf.Variable: Keras 3 neither trains nor saves a bare variable.
        self.codebook = self.add_weight(
            name="codebook",
            shape=shape,
            initializer=keras.initializers.RandomUniform(-0.05, 0.05),
            trainable=self.ema_decay is None,
            aggregation="mean" if self.ema_decay is None else "only_first_replica",
        )
        if self.ema_decay is not None:
            state = {"trainable": False, "initializer": "zeros", "aggregation": "only_first_replica"}
            self.ema_counts = self.add_weight(name="ema_counts", shape=shape[:1], **state)
            self.ema_sums = self.add_weight(name="ema_sums", shape=shape, **state)
            # int64: on a GPU machine int32 variables stay on the host, where a step compiled by XLA cannot read them.
            self.ema_steps = self.add_weight(name="ema_steps", shape=(), dtype="int64", **state)

    def call(self, latents, training=False):
        codes = self.nearest(latents)
        quantized = self.lookup(codes)
        self.usage.update_state(codes)

        # The losses are taken before the straight-through line: after it no gradient is left for them.
        codebook_loss = mean_square(tf.stop_gradient(latents) - quantized)
        loss = self.commitment_cost * mean_square(latents - tf.stop_gradient(quantized))
        if self.ema_decay is None:
            loss += codebook_loss
        elif training:
            self.move_codebook(tf.stop_gradient(latents))
        # Added last: the replicas of a MirroredStrategy, which have one list of losses, take turns in `move_codebook`.
        self.add_loss(loss)

        return latents + tf.stop_gradient(quantized - latents)

    def nearest(self, latents):
        """Index of the nearest codebook vector by L2: (..., D) -> int32 (...)."""
        flat = tf.reshape(latents, (-1, self.embedding_dim))
        codebook = tf.convert_to_tensor(self.codebook)
        # |z - e|^2 without |z|^2, which is the same for every code: (N, K).
        distances = tf.reduce_sum(tf.square(codebook), axis=1) - 2 * tf.matmul(flat, codebook, transpose_b=True)
        return tf.reshape(tf.argmin(distances, axis=1, output_type=tf.int32), tf.shape(latents)[:-1])

    def lookup(self, codes):
        """Codebook vectors: int32 (...) -> float32 (..., D)."""
        return tf.gather(tf.convert_to_tensor(self.codebook), codes)

    def move_codebook(self, latents):
        """One step of the moving averages [1, equations 6 to 8], then new life for dead codes."""
        latents = tf.reshape(latents, (-1, self.embedding_dim))
        # Every replica of a MirroredStrategy sees the whole batch, so that all move alike.
        latents = tf.distribute.get_replica_context().all_gather(latents, axis=0)
        codes = self.nearest(latents)

        def average(old, new):
            return self.ema_decay * old + (1 - self.ema_decay) * new

        counts = average(self.ema_counts, histogram(codes, self.num_embeddings))
        sums = average(self.ema_sums, tf.math.unsorted_segment_sum(latents, codes, self.num_embeddings))

        even_share = tf.cast(tf.size(codes), tf.float32) / self.num_embeddings
        dead = counts < self.DEAD_BELOW * even_share
        counts = tf.where(dead, self.REBORN_WITH * even_share, counts)
        sums = tf.where(dead[:, None], counts[:, None] * self.draw_distinct(latents), sums)

        self.ema_counts.assign(counts)
        self.ema_sums.assign(sums)
        self.codebook.assign(sums / counts[:, None])
        self.ema_steps.assign(self.ema_steps + 1)

    def draw_distinct(self, latents):
        """K of the latents at random, no two alike if there are as many: (N, D) -> (K, D).

        Most of a batch is background, and all of its latents are the same one.
        """
        # Stateless, so that a resumed training draws what the uninterrupted one would have drawn.
        seed = tf.cast(tf.stack([0, tf.convert_to_tensor(self.ema_steps)]), tf.int32)
        # Sorted along a random direction, equal latents are neighbours; the first of each kind takes part.
        along = tf.reduce_sum(latents * (uniform((self.embedding_dim,), seed) - 0.5), axis=1)
        order = tf.argsort(along)
        along = tf.gather(along, order)
        is_first = tf.concat([[True], along[1:] != along[:-1]], axis=0)
        lots = uniform(tf.shape(along), seed) - tf.where(is_first, 0.0, 1.0)
        lots = tf.pad(lots, [[0, tf.maximum(self.num_embeddings - tf.size(lots), 0)]], constant_values=-2.0)
        picks = tf.math.top_k(lots, self.num_embeddings).indices % tf.size(order)
        return tf.gather(latents, tf.gather(order, picks))

    def get_config(self):
        return {
            **super().get_config(),
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "commitment_cost": self.commitment_cost,
            "ema_decay": self.ema_decay,
        }


def residual(x, filters):
    """x + Conv1x1(ReLU(Conv3x3(ReLU(x)))) [1, section 4.1]."""
    h = layers.Conv2D(filters, 3, padding="same", activation="relu")(layers.ReLU()(x))
    return layers.Add()([x, layers.Conv2D(filters, 1)(h)])


def build_encoder(image_size, embedding_dim, filters, kernel_size, residual_blocks):
    """Images (B, H, W, 1) -> latents (B, h, w, D); every entry of `filters` halves the grid."""
    x = images = keras.Input((image_size, image_size, 1))
    for width in filters:
        x = layers.Conv2D(width, kernel_size, strides=2, padding="same", activation="relu")(x)
    for _ in range(residual_blocks):
        x = residual(x, filters[-1])
    return keras.Model(images, layers.Conv2D(embedding_dim, 1)(x), name="encoder")


def build_decoder(image_size, embedding_dim, filters, kernel_size, residual_blocks):
    """Latents (B, h, w, D) -> images (B, H, W, 1): the encoder in reverse, with a linear last layer."""
    grid = image_size // 2 ** len(filters)
    x = latents = keras.Input((grid, grid, embedding_dim))
    widths = list(reversed(filters))
    if residual_blocks:
        width = widths.pop(0)
        x = layers.Conv2D(width, 3, padding="same")(x)
        for _ in range(residual_blocks):
            x = residual(x, width)
        x = layers.ReLU()(x)
    for width in widths:
        x = layers.Conv2DTranspose(width, kernel_size, strides=2, padding="same", activation="relu")(x)
    stride = image_size // x.shape[1]  # what is left to reach H x W: 1 without residual blocks, else 2
    return keras.Model(
        latents, layers.Conv2DTranspose(1, kernel_size, strides=stride, padding="same")(x), name="decoder"
    )


def of_none_too(network, x):
    """network(x), and of no slices none: TensorFlow's fused convolutions for the CPU fail on them."""
    slices = tf.shape(x)[0]
    padded = tf.pad(x, [[0, tf.cast(slices == 0, tf.int32)], [0, 0], [0, 0], [0, 0]])
    return network(padded)[:slices]


def negative_log_likelihood(logits, codes):
    """-ln p of codes: (..., K), int32 (...) -> float32 (...), nats."""
    return -tfp.distributions.Categorical(logits=logits).log_prob(codes)


class MeanOverSlices(keras.Model):
    """A model whose loss is the mean of `terms(inputs)["loss"]` over slices, however they are batched.

    A small last batch counts by its slices, and a batch may be divided unevenly, even to nothing,
    among the replicas of a MirroredStrategy. `fit` takes what `call` takes.
    """

    def __init__(self, term_names, **kwargs):
        super().__init__(**kwargs)
        self.means = {name: keras.metrics.Mean(name=name) for name in term_names}

    def terms(self, inputs, training):
        """The loss of each slice, and the terms that are logged with it: {name: float32 (B,)}."""
        raise NotImplementedError

    def _maybe_symbolic_build(self, **first_batch):
        """Keras would average the first batch over the replicas, which fails where it is divided unevenly.

        It does so to learn the shapes that a model is built with; here only the optimizer is left to build.
        """
        if self.optimizer is not None and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)

    def update_means(self, terms):
        for name, values in terms.items():
            self.means[name].update_state(values)

    def train_step(self, data):
        inputs = keras.utils.unpack_x_y_sample_weight(data)[0]
        with tf.GradientTape() as tape:
            terms = self.terms(inputs, training=True)
            # The optimizer sums the gradients of the replicas, so each divides by the slices of all.
            slices = tf.cast(tf.size(terms["loss"]), tf.float32)
            slices = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, slices)
            loss = tf.reduce_sum(terms["loss"]) / slices
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        self.update_means(terms)
        return self.get_metrics_result()

    def test_step(self, data):
        self.update_means(self.terms(keras.utils.unpack_x_y_sample_weight(data)[0], training=False))
        return self.get_metrics_result()

    @property
    def metrics(self):
        return list(self.means.values())


@register
class VQVAE(MeanOverSlices):
    """Encoder, vector quantizer, decoder [1], fitted on images alone: `fit(images)`.

    loss = MSE / data_variance + ssim_weight * (1 - SSIM) + the losses of the quantizer.

    The encoder and decoder are those of [1, section 4.1] (strided convolutions, then residual
    blocks); without residual blocks they are the plain stack of [4].

    Args:
        num_embeddings, embedding_dim, commitment_cost, ema_decay: see `VectorQuantizer`.
        image_size: H = W, in pixels.
        filters: width of each stride-2 convolution of the encoder, outermost first. The latent
            grid has H / 2**len(filters) rows and columns.
        kernel_size: of the strided convolutions.
        encoder_blocks, decoder_blocks: residual blocks of each.
        ssim_weight: of the term 1 - SSIM (Wang et al. 2004, 11x11 Gaussian window); 0 leaves it out.
        data_variance: variance of the training pixels, the unit of the squared error, as in [4].
    """

    def __init__(
        self,
        num_embeddings,
        embedding_dim,
        commitment_cost=1.0,
        ema_decay=0.99,
        image_size=64,
        filters=(32, 64),
        kernel_size=4,
        encoder_blocks=0,
        decoder_blocks=3,
        ssim_weight=2.0,
        data_variance=1.0,
        **kwargs,
    ):
        names = ["loss", "reconstruction_loss", "quantizer_loss"] + ["ssim_loss"] * bool(ssim_weight)
        super().__init__(names, **kwargs)
        if image_size % 2 ** len(filters):
            raise ValueError(f"image_size {image_size} cannot be halved {len(filters)} times, once for each of filters")
        self.config = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "commitment_cost": commitment_cost,
            "ema_decay": ema_decay,
            "image_size": image_size,
            "filters": list(filters),
            "kernel_size": kernel_size,
            "encoder_blocks": encoder_blocks,
            "decoder_blocks": decoder_blocks,
            "ssim_weight": ssim_weight,
            "data_variance": float(data_variance),
        }
        self.ssim_weight = ssim_weight
        self.data_variance = data_variance
        self.encoder = build_encoder(image_size, embedding_dim, filters, kernel_size, encoder_blocks)
        self.quantizer = VectorQuantizer(num_embeddings, embedding_dim, commitment_cost, ema_decay)
        self.decoder = build_decoder(image_size, embedding_dim, filters, kernel_size, decoder_blocks)
        self.build(self.encoder.input_shape)

    def build(self, images_shape):
        if not self.quantizer.built:
            self.quantizer.build(self.decoder.input_shape)
        self.built = True

    def call(self, images, training=False):
        quantized = self.quantizer(of_none_too(self.encoder, images), training=training)
        return of_none_too(self.decoder, quantized)

    def terms(self, images, training=False):
        reconstructed = self(images, training=training)
        squares = tf.reduce_mean(tf.square(images - reconstructed), axis=(1, 2, 3))
        terms = {
            "quantizer_loss": tf.fill(tf.shape(squares), self.quantizer.losses[-1]),  # of this replica
            "reconstruction_loss": squares / self.data_variance,
        }
        if self.ssim_weight:
            terms["ssim_loss"] = self.ssim_weight * (1 - tf.image.ssim(images, reconstructed, max_val=1.0))
        return {**terms, "loss": tf.add_n(list(terms.values()))}

    @property
    def metrics(self):
        return [*super().metrics, self.quantizer.usage]

    @tf.function(reduce_retracing=True)
    def encode(self, images):
        """Codes of images: float32 (B, H, W, 1) in [0, 1] -> int32 (B, h, w) in [0, K)."""
        return self.quantizer.nearest(self.encoder(images))

    @tf.function(reduce_retracing=True)
    def decode(self, codes):
        """Images of codes: int32 (B, h, w) in [0, K) -> float32 (B, H, W, 1), clipped to [0, 1]."""
        return tf.clip_by_value(self.decoder(self.quantizer.lookup(codes)), 0.0, 1.0)

    def get_config(self):
        return {**super().get_config(), **self.config}


# --------------------------------------------------------------------------------------
# PixelCNN
# --------------------------------------------------------------------------------------


def visible_taps(kernel_size, mask_type):
    """Number of kernel entries that a mask leaves: the rows above, the entries to the left, B's own."""
    return kernel_size * (kernel_size // 2) + kernel_size // 2 + (mask_type == "B")


@register
class MaskedConv2D(layers.Layer):
    """Convolution that sees only earlier positions in raster order [2, section 3.4].

    A 3x3 mask of each type; A hides the position itself, B shows it:

        A: 1 1 1    B: 1 1 1
           1 0 0       1 1 0
           0 0 0       0 0 0

    A stack of these has a blind spot [3, section 2.2]: of the rows above it never sees what lies further to the
    right than one column a row. The 7x7 first layer and `GlobalContext` see into it.

    Only the visible entries of the kernel exist as weights, and the rows below are never multiplied.
    (Assigning a masked kernel inside `call`, as in [4]'s sister example, trains and saves the
    hidden entries.)

    Args:
        filters: number of output channels.
        kernel_size: odd.
        mask_type: "A" or "B".

    Shapes: (B, h, w, C) -> (B, h, w, filters).
    """

    def __init__(self, filters, kernel_size, mask_type, **kwargs):
        super().__init__(**kwargs)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if mask_type not in ("A", "B"):
            raise ValueError(f"mask_type must be 'A' or 'B', got {mask_type!r}")
        self.filters = filters
        self.kernel_size = kernel_size
        self.mask_type = mask_type
        self.radius = kernel_size // 2

    def build(self, input_shape):
        taps = visible_taps(self.kernel_size, self.mask_type)
        # Keras reads the fans off this shape as those of a kernel with `taps` entries.
        self.kernel = self.add_weight(
            name="kernel", shape=(taps, input_shape[-1], self.filters), initializer="glorot_uniform"
        )
        self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros")

    def call(self, inputs):
        r, k = self.radius, self.kernel_size
        taps, channels, filters = self.kernel.shape
        hidden = tf.zeros(((r + 1) * k - taps, channels, filters))
        kernel = tf.reshape(tf.concat([self.kernel, hidden], axis=0), (r + 1, k, channels, filters))
        # Padded by hand: a fifth faster on a CPU than the `padding` argument of conv2d.
        padded = tf.pad(inputs, [[0, 0], [r, 0], [r, r], [0, 0]])
        return tf.nn.conv2d(padded, kernel, strides=1, padding="VALID") + self.bias

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "mask_type": self.mask_type,
        }


@register
class MaskedCodeConv2D(layers.Layer):
    """`MaskedConv2D` of type A on one-hot codes, as the lookup and sum that it is.

    The one-hot product multiplies K - 1 zeros for every code; here each visible code picks its
    row of the kernel. Same function, same gradient.

    Shapes: int32 (B, h, w) in [0, K) -> (B, h, w, filters). -1 stands for "no code", a zero vector.
    """

    def __init__(self, num_embeddings, filters, kernel_size, **kwargs):
        super().__init__(**kwargs)
        self.num_embeddings = num_embeddings
        self.filters = filters
        self.kernel_size = kernel_size
        self.radius = kernel_size // 2
        self.taps = visible_taps(kernel_size, "A")

    def build(self, codes_shape):
        self.kernel = self.add_weight(
            name="kernel", shape=(self.taps, self.num_embeddings, self.filters), initializer="glorot_uniform"
        )
        self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros")

    def table(self):
        """The kernel as rows (taps * K + 1, filters); the last, of zeros, is for "no code"."""
        rows = tf.reshape(tf.convert_to_tensor(self.kernel), (-1, self.filters))
        return tf.pad(rows, [[0, 1], [0, 0]])

    def lookup(self, table, codes, first_tap=0):
        """Sum of the kernel rows that `codes` pick: int32 (..., taps) -> (..., filters)."""
        tap = first_tap + tf.range(tf.shape(codes)[-1])
        index = tf.where(codes < 0, self.taps * self.num_embeddings, tap * self.num_embeddings + codes)
        return tf.reduce_sum(tf.gather(table, index), axis=-2)

    def call(self, codes):
        r, k = self.radius, self.kernel_size
        height, width = tf.shape(codes)[1], tf.shape(codes)[2]
        padded = tf.pad(codes, [[0, 0], [r, 0], [r, r]], constant_values=-1)
        offsets = [divmod(tap, k) for tap in range(self.taps)]
        visible = [padded[:, down : down + height, right : right + width] for down, right in offsets]
        return self.lookup(self.table(), tf.stack(visible, axis=-1)) + self.bias  # (B, h, w, taps) -> (B, h, w, C)

    def from_above(self, table, rows):
        """What the `radius` rows of codes above give to one row: (B, radius, w) -> (B, w, filters)."""
        r, k = self.radius, self.kernel_size
        width = tf.shape(rows)[2]
        padded = tf.pad(rows, [[0, 0], [0, 0], [r, r]], constant_values=-1)
        visible = [padded[:, down, right : right + width] for down in range(r) for right in range(k)]
        return self.lookup(table, tf.stack(visible, axis=-1)) + self.bias

    def from_left(self, table, left):
        """What the `radius` codes to the left give to one position: (B, radius) -> (B, filters)."""
        return self.lookup(table, left, first_tap=self.taps - self.radius)

    def get_config(self):
        return {
            **super().get_config(),
            "num_embeddings": self.num_embeddings,
            "filters": self.filters,
            "kernel_size": self.kernel_size,
        }


@register
class SeedGenerator(keras.random.SeedGenerator):
    """Keras's draws the same for every replica of a MirroredStrategy; here each has its own numbers."""

    def next(self, ordered=True):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        seed = tf.cast(super().next(ordered), tf.int32)
        return seed + tf.stack([100_003 * replica, 0])


@register
class Dropout(layers.Layer):
    """Zeroes a share of `rate` of its input in training, and scales up the rest."""

    def __init__(self, rate, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.seeds = SeedGenerator()

    def call(self, x, training=False):
        if not training or not self.rate:
            return x
        return tf.where(uniform(tf.shape(x), self.seeds.next()) < self.rate, 0.0, x / (1 - self.rate))

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


@register
class ResidualBlock(layers.Layer):
    """x + Conv1x1(ReLU(MaskedConv3x3(ReLU(Conv1x1(ReLU(x)))))) [2, figure 5].

    Args:
        filters: channels of x; the masked convolution has half of them.
        dropout: rate of the dropout before the last 1x1 convolution.
        zero_init: start as x alone, so that a deep stack bears a large learning rate.

    Shapes: (B, h, w, filters) -> the same.
    """

    def __init__(self, filters, dropout=0.0, zero_init=True, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.dropout = dropout
        self.zero_init = zero_init
        self.narrow = layers.Dense(filters // 2)  # on (B, h, w, C), Dense is the 1x1 convolution
        self.masked = MaskedConv2D(filters // 2, 3, "B")
        self.widen = layers.Dense(filters, kernel_initializer="zeros" if zero_init else "glorot_uniform")
        self.drop = Dropout(dropout)

    def build(self, input_shape):
        half = (*input_shape[:-1], self.filters // 2)
        self.narrow.build(input_shape)
        self.masked.build(half)
        self.widen.build(half)

    def call(self, x, training=False):
        hidden = tf.nn.relu(self.masked(tf.nn.relu(self.narrow(tf.nn.relu(x)))))
        return x + self.widen(self.drop(hidden, training=training))

    def step(self, x, earlier):
        """`call` at one position, from cached activations [5].

        Args: x (B, filters); what all earlier positions give to `masked` here (B, filters / 2).
        Returns: the output (B, filters), and the input of `masked` here (B, filters / 2).
        """
        current = tf.nn.relu(self.narrow(tf.nn.relu(x)))
        hidden = earlier + tf.matmul(current, self.masked.kernel[-1])
        return x + self.widen(tf.nn.relu(hidden)), current

    def get_config(self):
        config = {"filters": self.filters, "dropout": self.dropout, "zero_init": self.zero_init}
        return {**super().get_config(), **config}


@register
class GlobalContext(layers.Layer):
    """Adds to each position p a summary of all earlier ones: x_p + W_p ReLU(weighted sum of ReLU(Dense(x))).

    A masked 3x3 convolution carries one position further; what holds for the whole picture, such as
    its brightness, arrives after many blocks and fades. Here every channel of the summary is a
    learned weighting of the position itself and all earlier ones, which starts as their mean, and
    each position reads it through a matrix of its own: the slices are registered, so that the
    part of the head which comes next has a fixed place.

    Args:
        filters: channels of the summary.
        dropout: rate of the dropout on the summary.

    Shapes: (B, h, w, C) -> the same; a position depends on itself and on earlier ones.
    """

    def __init__(self, filters, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.dropout = dropout
        self.narrow = layers.Dense(filters, activation="relu")
        self.drop = Dropout(dropout)

    def build(self, input_shape):
        height, width, channels = input_shape[1:]
        self.grid = height, width
        row = np.arange(height)
        mean = 1 / (width * (row + 1))

        def start(values):
            return lambda shape, dtype: tf.broadcast_to(tf.cast(values, dtype), shape)

        # For each row, the weights of all positions in the rows above (F, h, h w), and in the row itself (h, w, F).
        self.is_above = np.repeat(row[:, None] > row, width, axis=1).astype("float32")  # (h, h w)
        self.weights_above = self.add_weight(
            name="weights_above", shape=(self.filters, height, height * width), initializer=start(mean[:, None])
        )
        self.weights_in_row = self.add_weight(
            name="weights_in_row", shape=(height, width, self.filters), initializer=start(mean[:, None, None])
        )
        # Keras would read the fans of this shape as those of one kernel of h * w entries.
        limit = np.sqrt(6 / (self.filters + channels))
        self.readout = self.add_weight(
            name="readout",
            shape=(height * width, self.filters, channels),
            initializer=keras.initializers.RandomUniform(-limit, limit),
        )
        self.bias = self.add_weight(name="bias", shape=(channels,), initializer="zeros")
        self.narrow.build(input_shape)

    def call(self, x, training=False):
        height, width = self.grid
        features = self.narrow(x)  # (B, h, w, F)
        positions = tf.reshape(features, (-1, height * width, self.filters))  # (B, h w, F)
        above = tf.einsum("frp,bpf->brf", self.weights_above * self.is_above, positions)  # (B, h, F)
        # A running sum along the row: this product is seven times faster than tf.cumsum.
        in_row = tf.matmul(tf.constant(np.tri(width, dtype="float32")), features * self.weights_in_row)  # (B, h, w, F)
        summary = self.drop(tf.nn.relu(above[:, :, None] + in_row), training=training)  # (B, h, w, F)
        summary = tf.transpose(tf.reshape(summary, tf.shape(positions)), (1, 0, 2))  # (h w, B, F)
        added = tf.transpose(tf.matmul(summary, self.readout), (1, 0, 2))  # (B, h w, C)
        return x + tf.reshape(added, tf.shape(x)) + self.bias

    def step(self, x, summed, row, column):
        """`call` at one position, from the weighted sum over all earlier ones [5].

        Args: x (B, C); the sum (B, filters); the position.
        Returns: the output (B, C); the sum, this position included; its features (B, filters), for `to_rows_below`.
        """
        features = self.narrow(x)
        summed += features * self.weights_in_row[row, column]
        added = tf.matmul(tf.nn.relu(summed), self.readout[row * self.grid[1] + column])
        return x + added + self.bias, summed, features

    def to_rows_below(self, features, row):
        """What the features of a row add to the weighted sums of the rows below: (w, B, filters) -> (h, B, filters)."""
        width = self.grid[1]
        weights = (self.weights_above * self.is_above)[:, :, row * width : (row + 1) * width]  # (F, h, w)
        return tf.einsum("frp,pbf->rbf", weights, features)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters, "dropout": self.dropout}


CONTEXT_EVERY = 5  # residual blocks
LABEL_RANK = 8  # numbers that stand for a label
LABELS_HIDDEN = 0.1  # share of the training examples whose label is not told, so that it need not be known


@register
class PixelCNN(MeanOverSlices):
    """Autoregressive prior over a grid of codes: p(codes | label) = prod p(code | earlier, label) [2, equation 1].

    A masked 7x7 convolution of type A, a learned vector for each grid position (the slices are
    registered, so a position has a meaning), residual blocks, two ReLU-1x1 layers, and K logits.
    A label adds a map of vectors of its own, as the location dependent conditioning of [3, section 2.3].

    `fit` takes batches of the call arguments, and gives the mean negative log-likelihood of a code in nats.

    Args:
        num_embeddings: K.
        grid: (h, w).
        filters: channels between the residual blocks.
        residual_blocks: 15 in [2, table 1].
        dropout: rate in every residual block and context.
        learned_position: adds the position vectors.
        context_filters: channels of a `GlobalContext` before every fifth residual block; 0 for none.
        zero_init: of the residual blocks.
        num_labels: number of labels; 0 for a prior without.
        num_changes: how many numbers tell of an augmentation [6]; 0 for a prior without.

    Call arguments: codes, int32 (B, h, w) in [0, K), or a tuple of codes and
        labels: int32 (B,) in [0, num_labels), -1 where it is not known (without labels: in none),
        changes: float32 (B, num_changes), zeros for a slice as it is (without changes: for all).
    Returns: logits, float32 (B, h, w, K); those at a position depend on earlier codes alone.
    """

    def __init__(
        self,
        num_embeddings,
        grid,
        filters=128,
        residual_blocks=15,
        dropout=0.0,
        learned_position=True,
        context_filters=0,
        zero_init=True,
        num_labels=0,
        num_changes=0,
        **kwargs,
    ):
        super().__init__(["loss"], **kwargs)
        self.num_embeddings = num_embeddings
        self.grid = tuple(grid)
        self.filters = filters
        self.dropout = dropout
        self.learned_position = learned_position
        self.zero_init = zero_init
        self.num_labels = num_labels
        self.num_changes = num_changes
        self.first = MaskedCodeConv2D(num_embeddings, filters, 7)
        self.blocks = [ResidualBlock(filters, dropout, zero_init) for _ in range(residual_blocks)]
        self.context_filters = context_filters
        contexts = len(self.blocks[::CONTEXT_EVERY]) if context_filters else 0
        self.contexts = [GlobalContext(context_filters, dropout) for _ in range(contexts)]
        self.head = [
            layers.Dense(filters, activation="relu"),
            layers.Dense(filters, activation="relu"),
            layers.Dense(num_embeddings),
        ]
        self.seeds = SeedGenerator()
        self.build((None, *self.grid))

    def build(self, codes_shape):
        if self.built:
            return
        features = (None, *self.grid, self.filters)
        self.first.build(codes_shape)
        if self.learned_position:
            self.position = self.add_weight(name="position", shape=features[1:], initializer="zeros")
        if self.num_labels:
            vectors, maps = (self.num_labels, LABEL_RANK), (LABEL_RANK, *features[1:])
            self.label_vectors = self.add_weight(name="label_vectors", shape=vectors, initializer="random_normal")
            self.label_maps = self.add_weight(name="label_maps", shape=maps, initializer="random_normal")
        if self.num_changes:
            shape = (self.num_changes, self.filters)
            self.change_vectors = self.add_weight(name="change_vectors", shape=shape, initializer="zeros")
        for layer in self.blocks + self.contexts:
            layer.build(features)
        for layer in self.head:
            layer.build(features)
        self.built = True

    def call(self, inputs, training=False):
        codes, labels, changes = self.unpack(inputs)
        x = self.first(codes)  # (B, h, w, C)
        if self.learned_position:
            x = x + self.position
        if self.num_labels:
            x = x + self.label_map(labels, self.label_maps)
        if self.num_changes:
            x = x + tf.matmul(changes, self.change_vectors)[:, None, None]
        for i, block in enumerate(self.blocks):
            if self.contexts and i % CONTEXT_EVERY == 0:
                x = self.contexts[i // CONTEXT_EVERY](x, training=training)
            x = block(x, training=training)
        return self.logits(x)

    def unpack(self, inputs):
        """Call arguments -> codes, labels, changes."""
        codes, *rest = inputs if isinstance(inputs, (tuple, list)) else [inputs]
        codes = tf.convert_to_tensor(codes)
        batch = tf.shape(codes)[0]
        labels = tf.convert_to_tensor(rest[0]) if rest else tf.fill((batch,), -1)
        changes = tf.convert_to_tensor(rest[1]) if rest[1:] else tf.zeros((batch, self.num_changes))
        return codes, labels, changes

    def label_map(self, labels, maps):
        """What labels add: int32 (B,) and the maps, or a row of them, (rank, ..., C) -> (B, ..., C); of -1, zeros."""
        known = tf.one_hot(labels, self.num_labels)  # zeros for -1
        return tf.tensordot(tf.matmul(known, self.label_vectors), maps, 1)

    def logits(self, x):
        """Features (..., C) -> logits (..., K)."""
        x = tf.nn.relu(x)
        for layer in self.head:
            x = layer(x)
        return x

    def terms(self, inputs, training):
        codes, labels, changes = self.unpack(inputs)
        if training and self.num_labels:
            lots = uniform(tf.shape(labels), self.seeds.next())
            labels = tf.where(lots < LABELS_HIDDEN, -1, labels)
        logits = self((codes, labels, changes), training=training)
        return {"loss": tf.reduce_mean(negative_log_likelihood(logits, codes), axis=(1, 2))}

    @tf.function(reduce_retracing=True)
    def nll(self, codes, labels=None):
        """-ln p of every code given the earlier ones and the label: (B, h, w), (B,) -> float32 (B, h, w), nats."""
        return negative_log_likelihood(self(codes if labels is None else (codes, labels)), codes)

    def sample(self, num_samples, seed, temperature=1.0, known=None, labels=None):
        """Draw codes position by position, in raster order, from cached activations [5].

        Args:
            num_samples: N.
            seed: int; picture n is the same whatever N is.
            temperature: divides the logits: 1 samples the model, less is more typical.
            known: int32 (N, h, w) of codes to keep, -1 where one is to be drawn; None draws all.
            labels: int32 (N,) in [0, num_labels), -1 where it is not known; None knows none.

        Returns: int32 (N, h, w) in [0, K).
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if known is None:
            known = tf.fill((num_samples, *self.grid), -1)
        if tuple(known.shape) != (num_samples, *self.grid):
            raise ValueError(f"known must have shape {(num_samples, *self.grid)}, got {tuple(known.shape)}")
        return self.restore(known, labels, np.inf, np.arange(num_samples), seed, temperature)

    def restore(self, known, labels, keep_up_to, streams, seed, temperature=1.0):
        """`sample`, where a known code is kept only if it costs at most `keep_up_to` nats given the earlier ones.

        The earlier ones are those already restored, as in [7].

        Args:
            known, labels, seed, temperature: see `sample`.
            keep_up_to: nats; infinity keeps all known codes.
            streams: int (N,); pictures of the same stream, seed and situation draw the same.

        Returns: int32 (N, h, w) in [0, K).
        """
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        labels = np.full(len(known), -1) if labels is None else np.asarray(labels)
        if labels.shape != (len(known),):
            raise ValueError(f"labels must have shape {(len(known),)}, got {labels.shape}")
        if len(labels) and not -1 <= labels.min() <= labels.max() < self.num_labels:
            raise ValueError(f"labels must be from -1 to {self.num_labels - 1}, got {labels.min()} to {labels.max()}")
        # Tensors, not Python numbers: those would trace the graph again for every seed.
        integers = (tf.cast(value, tf.int32) for value in (known, labels, streams, seed))
        return self.draw(*integers, tf.constant(keep_up_to, tf.float32), tf.constant(temperature, tf.float32))[0]

    @tf.function(  # a batch of 1 that is known to be 1 would give the loops' variables shapes that change
        input_signature=[tf.TensorSpec(shape, tf.int32) for shape in ((None, None, None), (None,), (None,), ())]
        + [tf.TensorSpec(())] * 2
    )
    def draw(self, known, labels, streams, seed, keep_up_to, temperature):
        """`restore` as one graph: codes (N, h, w), and -ln p of each, float32 (N, h, w)."""
        pictures = tf.shape(known)[0]
        height, width = self.grid

        # The cache: what the next row looks at.
        codes_above = tf.fill((pictures, self.first.radius, width), -1)
        hidden_above = tf.zeros((width, len(self.blocks), pictures, self.filters // 2))
        sums = tf.zeros((len(self.contexts), height, pictures, self.context_filters))
        all_codes = tf.TensorArray(tf.int32, height)
        all_nats = tf.TensorArray(tf.float32, height)

        for row in tf.range(height):
            noise = self.gumbel_noise(streams, seed, row)

            def choose(logits, column, row=row, noise=noise):
                """The code of one position, drawn or kept (N,), and its -ln p (N,): logits (N, K)."""
                drawn = tf.argmax(logits / temperature + noise[:, column], axis=-1, output_type=tf.int32)
                given = known[:, row, column]
                kept = (given >= 0) & (negative_log_likelihood(logits, tf.maximum(given, 0)) <= keep_up_to)
                codes = tf.where(kept, given, drawn)
                return codes, negative_log_likelihood(logits, codes)

            start, above = self.row_start(codes_above, labels, row), self.blocks_above(hidden_above)
            codes, nats, hidden_above, features = self.draw_row(row, start, above, sums, choose)
            codes_above = tf.concat([codes_above[:, 1:], codes[:, None]], axis=1)
            if self.contexts:
                sums += tf.stack([context.to_rows_below(of, row) for context, of in zip(self.contexts, features)])
            all_codes = all_codes.write(row, codes)
            all_nats = all_nats.write(row, nats)

        return tf.transpose(all_codes.stack(), (1, 0, 2)), tf.transpose(all_nats.stack(), (1, 0, 2))

    def draw_row(self, row, start, above, sums, choose):
        """One row of `draw`, from left to right.

        Args:
            row: its number.
            start: what enters the blocks but for the codes to the left (w, N, C).
            above: what the row above gives to the masked convolutions (w, blocks, N, C / 2).
            sums: of the contexts over the rows above (contexts, h, N, F).
            choose: (logits (N, K), column) -> codes (N,), their -ln p (N,).

        Returns: codes (N, w); -ln p (N, w); inputs of the masked convolutions (w, blocks, N, C / 2);
            features of each context, a list of (w, N, F).
        """
        pictures, width = tf.shape(start)[1], self.grid[1]
        table = self.first.table()
        left_kernels = tf.stack([block.masked.kernel[-2] for block in self.blocks])
        left_codes = tf.fill((pictures, self.first.radius), -1)
        left_hidden = tf.zeros((len(self.blocks), pictures, self.filters // 2))
        summed = [sums[i, row] for i in range(len(self.contexts))]
        all_codes = tf.TensorArray(tf.int32, width)
        all_nats = tf.TensorArray(tf.float32, width)
        all_hidden = tf.TensorArray(tf.float32, width)
        all_features = [tf.TensorArray(tf.float32, width) for _ in self.contexts]
        for column in tf.range(width):
            x = start[column] + self.first.from_left(table, left_codes)  # (N, C)
            earlier = above[column] + tf.matmul(left_hidden, left_kernels)  # (blocks, N, C / 2)
            logits, left_hidden, summed, features = self.step(x, earlier, summed, row, column)
            codes, nats = choose(logits, column)
            left_codes = tf.concat([left_codes[:, 1:], codes[:, None]], axis=1)
            all_codes = all_codes.write(column, codes)
            all_nats = all_nats.write(column, nats)
            all_hidden = all_hidden.write(column, left_hidden)
            all_features = [array.write(column, value) for array, value in zip(all_features, features)]
        features = [array.stack() for array in all_features]
        return tf.transpose(all_codes.stack()), tf.transpose(all_nats.stack()), all_hidden.stack(), features

    def step(self, x, earlier, summed, row, column):
        """`call` at one position, from cached activations [5].

        Args: what enters the blocks (N, C); what the earlier positions give to the masked convolutions
            (blocks, N, C / 2); the sums of each context over them, a list of (N, F); the position.
        Returns: logits (N, K); the inputs of the masked convolutions here (blocks, N, C / 2); the sums, this
            position included; the features of each context here, a list of (N, F).
        """
        hidden, sums, features = [], [], []
        for i, (block, from_earlier) in enumerate(zip(self.blocks, tf.unstack(earlier))):
            if self.contexts and i % CONTEXT_EVERY == 0:
                j = i // CONTEXT_EVERY
                x, summed_here, features_here = self.contexts[j].step(x, summed[j], row, column)
                sums.append(summed_here), features.append(features_here)
            x, hidden_here = block.step(x, from_earlier)
            hidden.append(hidden_here)
        return self.logits(x), tf.stack(hidden), sums, features

    def row_start(self, codes_above, labels, row):
        """What enters the blocks in a row, but for the codes to the left: (N, radius, w), (N,) -> (w, N, C)."""
        start = self.first.from_above(self.first.table(), codes_above)  # (N, w, C)
        if self.learned_position:
            start += self.position[row]
        if self.num_labels:
            start += self.label_map(labels, self.label_maps[:, row])
        return tf.transpose(start, (1, 0, 2))

    def gumbel_noise(self, streams, seed, row):
        """Noise that, added to logits, makes the largest a draw from the categorical distribution: (N, w, K).

        Unlike the noise of Categorical.sample, that of a stream does not depend on N.
        """
        shape = (tf.reduce_max(streams) + 1, self.grid[1], self.num_embeddings)
        noise = tfp.distributions.Gumbel(0.0, 1.0).sample(shape, seed=tf.stack([seed, row]))
        return tf.gather(noise, streams)

    def blocks_above(self, hidden):
        """What a row gives to the masked convolutions of the next, for all blocks in one product.

        Args: their inputs in the row (w, blocks, N, C). Returns: the same shape, biases included.
        """
        width, channels = hidden.shape[0], hidden.shape[-1]
        padded = tf.pad(hidden, [[1, 1], [0, 0], [0, 0], [0, 0]])
        neighbours = tf.concat([padded[right : right + width] for right in range(3)], axis=-1)
        kernels = tf.stack([tf.reshape(block.masked.kernel[:3], (3 * channels, channels)) for block in self.blocks])
        biases = tf.stack([tf.convert_to_tensor(block.masked.bias) for block in self.blocks])
        return tf.matmul(neighbours, kernels) + biases[:, None]

    def get_config(self):
        return {
            **super().get_config(),
            "num_embeddings": self.num_embeddings,
            "grid": list(self.grid),
            "filters": self.filters,
            "residual_blocks": len(self.blocks),
            "dropout": self.dropout,
            "learned_position": self.learned_position,
            "context_filters": self.context_filters,
            "zero_init": self.zero_init,
            "num_labels": self.num_labels,
            "num_changes": self.num_changes,
        }
