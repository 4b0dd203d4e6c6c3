"""A VQ-VAE of brain slices [1], a PixelCNN [2] as the prior over its codes, and a fast sampler of that prior [5].

References, cited below as [n]:
[1] van den Oord, Vinyals, Kavukcuoglu: Neural Discrete Representation Learning, arXiv 1711.00937
[2] van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, arXiv 1601.06759
[3] van den Oord et al.: Conditional Image Generation with PixelCNN Decoders, arXiv 1606.05328
[4] Paul: Vector-Quantized Variational Autoencoders, keras.io/examples/generative/vq_vae
[5] Ramachandran et al.: Fast Generation for Convolutional Autoregressive Models, arXiv 1704.06001
[6] Jun et al.: Distribution Augmentation for Generative Modeling, ICML 2020
[7] Li, Katabi, He: Return of Unconditional Generation, arXiv 2312.03701

Shapes: B images of H x W pixels, a latent grid of h x w positions, D numbers a latent vector,
K codes, C channels. An image is float32 in [0, 1], (B, H, W, 1); its codes are int32 in [0, K), (B, h, w).

    import keras, modules
    vqvae = keras.saving.load_model("runs/oasis/vqvae.keras")
    prior = keras.saving.load_model("runs/oasis/pixelcnn.keras")
    images = vqvae.decode(prior.sample(16, seed=0))
"""

import contextlib
import dataclasses
import functools
import inspect
import numbers
import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported, and whatever keras.json says

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf
import tensorflow_probability as tfp
from keras import layers
from scipy import signal
from sklearn.decomposition import PCA
from tqdm import tqdm

register = keras.saving.register_keras_serializable(package="oasis")


class Model(keras.Model):
    """A model with a loss of its own, `loss_of`, that reopens from its constructor's arguments.

    Each argument is an attribute of the same name.
    """

    def get_config(self):
        names = list(inspect.signature(type(self).__init__).parameters)[1:-1]  # without self and **kwargs
        arguments = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **keras.saving.serialize_keras_object(arguments)}

    @classmethod
    def from_config(cls, config):
        return cls(**keras.saving.deserialize_keras_object(config))

    def fit(self, x=None, y=None, *arguments, sample_weight=None, **options):
        validation = options.get("validation_data")
        if isinstance(validation, tuple) and len(validation) == 3:
            options["validation_data"] = (validation[0], with_weights(*validation[1:]), validation[2])
        return super().fit(x, with_weights(y, sample_weight), *arguments, sample_weight=sample_weight, **options)

    def evaluate(self, x=None, y=None, *arguments, sample_weight=None, **options):
        return super().evaluate(x, with_weights(y, sample_weight), *arguments, sample_weight=sample_weight, **options)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if self.loss is not None or (y is not None and y.shape[-1] != 0):
            raise ValueError("the model has its own loss: leave out the targets y, and the loss of compile()")
        return self.loss_of(x, y_pred, sample_weight)


def with_weights(y, sample_weight):
    """Targets of no numbers where there are weights alone, which Keras throws away without targets."""
    return y if y is not None or sample_weight is None else np.empty((len(sample_weight), 0))


def weighted_mean(values, weights=None):
    """Mean over the examples of a batch: (B,), and their weights (B,) or None -> ()."""
    if weights is None:
        return tf.reduce_mean(values)
    weights = tf.cast(tf.reshape(weights, tf.shape(values)), values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(weights * values), tf.reduce_sum(weights))


# ---- The VQ-VAE [1] ------------------------------------------------------------------


def histogram(codes, num_embeddings):
    """How often each code occurs: int32 (N,) -> float32 (K,). Unlike tf.math.bincount, XLA can compile it."""
    return tf.math.unsorted_segment_sum(tf.ones(tf.shape(codes)), codes, num_embeddings)


class CodebookUsage(keras.metrics.Metric):
    """Perplexity exp(H) of the code histogram, and the number of codes used, over a whole epoch.

    The perplexity of a single batch depends on the batch size; this one counts until it is reset.
    `prefix` tells the quantizers of one model apart.
    """

    def __init__(self, num_embeddings, prefix="", **kwargs):
        super().__init__(**kwargs)
        self.num_embeddings, self.prefix = num_embeddings, prefix
        self.counts = self.add_variable((num_embeddings,), "zeros", dtype="float32", name="counts")

    def update_state(self, codes, sample_weight=None):
        self.counts.assign_add(histogram(tf.reshape(codes, (-1,)), self.num_embeddings))

    def result(self):
        counts = tf.convert_to_tensor(self.counts)
        frequencies = counts / tf.maximum(tf.reduce_sum(counts), 1)
        return {
            f"{self.prefix}perplexity": tf.exp(-tf.reduce_sum(tf.math.xlogy(frequencies, frequencies))),
            f"{self.prefix}codes_used": tf.reduce_sum(tf.cast(counts > 0, tf.float32)),
        }


@register
class VectorQuantizer(layers.Layer):
    """Replaces each latent vector by the nearest vector of a learned codebook [1, section 3.1].

    The gradient passes straight through; `losses` holds the commitment term, and the codebook
    term where the codebook is trained by gradient. With `ema_decay` the codebook instead follows
    the moving average of the latents that chose it [1, appendix A.1], and a code that is hardly
    chosen restarts at a random latent vector of the batch: so the codebook starts from data, and
    codes that die come back. Distances, codebook and losses are float32 under every dtype policy.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the length of a latent vector.
        commitment_cost: beta of [1, equation 3], here of the mean, not the sum, of the D squared differences.
        ema_decay: gamma of [1, appendix A.1]; 0 trains the codebook by gradient [1, equation 3].

    Shapes: latents (..., D) -> the nearest codebook vectors (..., D).
    """

    # A code is dead while it is chosen less than this often, 1 being the even share of B*h*w / K.
    DEAD_BELOW = 0.02
    REBORN_WITH = 0.2  # and then counts as if it were chosen this often

    def __init__(self, num_embeddings, embedding_dim, commitment_cost=1.0, ema_decay=0.99, **kwargs):
        super().__init__(**kwargs)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost
        self.ema_decay = ema_decay
        # Keras numbers the second layer of a kind: its name then keeps the keys of the two apart.
        self.usage = CodebookUsage(num_embeddings, "" if self.name == "vector_quantizer" else f"{self.name}_")

    def build(self, latents_shape):
        if latents_shape[-1] != self.embedding_dim:
            raise ValueError(f"embedding_dim is {self.embedding_dim}, the latents have {latents_shape[-1]} channels")
        shape = (self.num_embeddings, self.embedding_dim)
        # add_weight, not tf.Variable: Keras 3 neither trains nor saves a bare variable.
        uniform = keras.initializers.RandomUniform(-0.05, 0.05)
        self.codebook = self.add_weight(shape, uniform, trainable=not self.ema_decay, autocast=False, name="codebook")
        if self.ema_decay:
            state = {"trainable": False, "initializer": "zeros", "autocast": False}
            self.ema_counts = self.add_weight(name="ema_counts", shape=shape[:1], **state)
            self.ema_sums = self.add_weight(name="ema_sums", shape=shape, **state)
            # int64: on a GPU machine int32 variables stay on the host, where a step compiled by XLA cannot read them.
            self.ema_steps = self.add_weight(name="ema_steps", shape=(), dtype="int64", **state)

    def call(self, latents, training=False):
        latents = tf.cast(latents, tf.float32)  # (B, h, w, D)
        codes = self.nearest(latents)  # (B, h, w)
        quantized = self.lookup(codes)  # (B, h, w, D)
        self.usage.update_state(codes)

        commitment_loss = tf.reduce_mean(tf.square(latents - tf.stop_gradient(quantized)))
        self.add_loss(self.commitment_cost * commitment_loss)
        if not self.ema_decay:
            codebook_loss = tf.reduce_mean(tf.square(tf.stop_gradient(latents) - quantized))
            self.add_loss(codebook_loss)
        elif training and self.trainable:
            self.move_codebook(tf.stop_gradient(latents), codes)

        # The value of `quantized`, the gradient of `latents` [1, section 3.2]. None of it reaches the codebook.
        straight_through = latents + tf.stop_gradient(quantized - latents)
        return tf.cast(straight_through, self.compute_dtype)

    def nearest(self, latents):
        """Index of the nearest codebook vector by L2: float32 (..., D) -> int32 (...)."""
        flat = tf.reshape(latents, (-1, self.embedding_dim))
        codebook = tf.convert_to_tensor(self.codebook)
        # |z - e|^2 without |z|^2, which is the same for every code: (N, K).
        distances = tf.reduce_sum(tf.square(codebook), axis=1) - 2 * tf.matmul(flat, codebook, transpose_b=True)
        return tf.reshape(tf.argmin(distances, axis=1, output_type=tf.int32), tf.shape(latents)[:-1])

    def lookup(self, codes):
        """Codebook vectors: int32 (...) -> float32 (..., D)."""
        return tf.gather(tf.convert_to_tensor(self.codebook), codes)

    def move_codebook(self, latents, codes):
        """One step of training: the moving averages, then the restart of dead codes."""
        latents, codes = tf.reshape(latents, (-1, self.embedding_dim)), tf.reshape(codes, (-1,))
        counts, sums = self.moving_averages(latents, codes)
        counts, sums = self.restart_dead_codes(counts, sums, latents)
        self.ema_counts.assign(counts)
        self.ema_sums.assign(sums)
        self.codebook.assign(sums / counts[:, None])
        self.ema_steps.assign(self.ema_steps + 1)

    def moving_averages(self, latents, codes):
        """How often each code was chosen, and the sum of the latents that chose it: (K,), (K, D).

        [1, equations 6 and 7], of latents (N, D) and their codes (N,).
        """

        def average(old, new):
            return self.ema_decay * old + (1 - self.ema_decay) * new

        counts = average(self.ema_counts, histogram(codes, self.num_embeddings))
        sums = average(self.ema_sums, tf.math.unsorted_segment_sum(latents, codes, self.num_embeddings))
        return counts, sums

    def restart_dead_codes(self, counts, sums, latents):
        """The same two averages, in which a code that is hardly chosen is a random latent vector of the batch."""
        batch = tf.shape(latents)[0]
        even_share = tf.cast(batch, tf.float32) / self.num_embeddings
        dead = counts < self.DEAD_BELOW * even_share
        # Stateless, so that a resumed training draws what the uninterrupted one would have drawn.
        seed = tf.cast(tf.stack([0, tf.convert_to_tensor(self.ema_steps)]), tf.int32)
        picks = tf.random.stateless_uniform((self.num_embeddings,), seed, maxval=batch, dtype=tf.int32)
        counts = tf.where(dead, self.REBORN_WITH * even_share, counts)
        return counts, tf.where(dead[:, None], counts[:, None] * tf.gather(latents, picks), sums)


def add_residual(x, filters):
    """x + Conv1x1(ReLU(Conv3x3(ReLU(x)))) [1, section 4.1]."""
    hidden = layers.Conv2D(filters, 3, padding="same", activation="relu")(layers.ReLU()(x))
    return layers.Add()([x, layers.Conv2D(filters, 1)(hidden)])


def build_encoder(image_size, embedding_dim, filters, kernel_size, residual_blocks):
    """Images (B, H, W, 1) -> latents (B, h, w, D); every entry of `filters` halves the grid."""
    x = images = keras.Input((image_size, image_size, 1))
    for width in filters:
        x = layers.Conv2D(width, kernel_size, strides=2, padding="same", activation="relu")(x)
    for _ in range(residual_blocks):
        x = add_residual(x, filters[-1])
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
            x = add_residual(x, width)
        x = layers.ReLU()(x)
    for width in widths:
        x = layers.Conv2DTranspose(width, kernel_size, strides=2, padding="same", activation="relu")(x)
    stride = image_size // x.shape[1]  # what is left to reach H x W: 1 without residual blocks, else 2
    images = layers.Conv2DTranspose(1, kernel_size, strides=stride, padding="same")(x)
    return keras.Model(latents, images, name="decoder")


def ssim(images, others):
    """Structural similarity of pairs, Wang et al. 2004: (B, H, H, 1) in [0, 1], twice -> (B,).

    The same as tf.image.ssim, whose depthwise convolutions take three quarters of a training step on a CPU: here the
    11x11 Gaussian window is two products with a band matrix.
    """
    window = signal.windows.gaussian(11, 1.5)
    # (H - 10, H)
    band = scipy.linalg.convolution_matrix(window / window.sum(), images.shape[1] - 10).T.astype("float32")

    def blur(maps):
        return tf.matmul(band, tf.matmul(maps, band, transpose_b=True))

    x, y, c1, c2 = images[..., 0], others[..., 0], 0.01**2, 0.03**2
    mean_x, mean_y = blur(x), blur(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = blur(x * y) - product, blur(x**2 + y**2) - squares
    similarity = (2 * product + c1) / (squares + c1)
    similarity *= (2 * covariance + c2) / (variances + c2)
    return tf.reduce_mean(similarity, axis=(1, 2))


@register
class VQVAE(Model):
    """Encoder, vector quantizer, decoder [1], fitted on images alone: `fit(images)`.

    loss = MSE / data_variance + ssim_weight * (1 - SSIM) + the losses of the quantizer.

    The encoder and decoder are those of [1, section 4.1] (strided convolutions, then residual
    blocks); without residual blocks they are the plain stack of [4]. Images are float in [0, 1],
    (B, H, W, 1), or uint8 in [0, 255]; the channel may be left out. `sample_weight` weighs the
    errors of the images; the quantizer's losses have no weights, like all that layers add.

    Args:
        num_embeddings, embedding_dim, commitment_cost, ema_decay: see `VectorQuantizer`.
        image_size: H = W, in pixels; with `ssim_weight` 11 at least, the SSIM window.
        filters: width of each stride-2 convolution of the encoder, outermost first. The latent
            grid has H / 2**len(filters) rows and columns.
        kernel_size: of the strided convolutions.
        encoder_blocks, decoder_blocks: residual blocks of each.
        ssim_weight: of the term 1 - SSIM (Wang et al. 2004, 11x11 Gaussian window); 0 leaves it out.
        data_variance: variance of the training pixels, the unit of the squared error, as in [4].

    Raises: ValueError for images of another size, or beyond their range.
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
        if image_size % 2 ** len(filters):
            raise ValueError(f"image_size {image_size} cannot be halved {len(filters)} times, once for each of filters")
        with keras_defaults():
            super().__init__(**kwargs)
            self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
            self.commitment_cost, self.ema_decay = commitment_cost, ema_decay
            self.image_size, self.filters, self.kernel_size = image_size, list(filters), kernel_size
            self.encoder_blocks, self.decoder_blocks = encoder_blocks, decoder_blocks
            self.ssim_weight, self.data_variance = ssim_weight, float(data_variance)
            self.encoder = build_encoder(image_size, embedding_dim, filters, kernel_size, encoder_blocks)
            self.quantizer = VectorQuantizer(
                num_embeddings, embedding_dim, commitment_cost, ema_decay, name="vector_quantizer"
            )
            self.decoder = build_decoder(image_size, embedding_dim, filters, kernel_size, decoder_blocks)
            self.terms = {
                name: keras.metrics.Mean(name=name)
                for name in ["reconstruction_loss", "quantizer_loss"] + ["ssim_loss"] * bool(ssim_weight)
            }
        self(np.zeros((1, image_size, image_size, 1), np.float32))  # builds the quantizer
        self.quantizer.usage.reset_state()

    def call(self, images, training=False):
        latents = self.encoder(self.as_floats(images))  # (B, H, W, 1) -> (B, h, w, D)
        quantized = self.quantizer(latents, training=training)  # (B, h, w, D)
        return self.decoder(quantized)  # (B, H, W, 1)

    def as_floats(self, images):
        """Images as the networks take them, float32 in [0, 1], (B, H, W, 1)."""
        images = tf.convert_to_tensor(images)
        if len(images.shape) == 3:
            images = images[..., None]
        images = check_shape("images", images, (None, self.image_size, self.image_size, 1))
        if images.dtype == tf.uint8:
            return tf.cast(images, tf.float32) / 255
        images = tf.cast(images, tf.float32)
        check_range("images", images, 0, 1, rounding=1e-3)
        return images

    def loss_of(self, images, reconstructions, sample_weight):
        """The loss of a batch; its terms are logged by name."""
        images = self.as_floats(images)
        squared_errors = tf.reduce_mean(tf.square(images - reconstructions), axis=(1, 2, 3))
        terms = {
            "reconstruction_loss": weighted_mean(squared_errors, sample_weight) / self.data_variance,
            "quantizer_loss": tf.add_n(self.losses),
        }
        if self.ssim_weight:
            terms["ssim_loss"] = self.ssim_weight * (1 - weighted_mean(ssim(images, reconstructions), sample_weight))
        for name, value in terms.items():
            self.terms[name].update_state(value, sample_weight=tf.shape(images)[0])
        return tf.add_n(list(terms.values()))

    def encode(self, images, verbose=False):
        """Codes of images, see the class -> int32 (B, h, w) in [0, K)."""
        return in_batches(self.encode_batch, images, verbose)

    def decode(self, codes, verbose=False):
        """Images of codes: int32 (B, h, w) in [0, K) -> float32 (B, H, W, 1), clipped to [0, 1]."""
        codes = check_codes(codes, self.decoder.input_shape[1:3], self.num_embeddings)
        return in_batches(self.decode_batch, codes, verbose)

    def encode_batch(self, images):
        return self.encode_floats(self.as_floats(images))

    @tf.function(reduce_retracing=True)
    def encode_floats(self, images):
        return self.quantizer.nearest(self.encoder(images))

    @tf.function(reduce_retracing=True)
    def decode_batch(self, codes):
        return tf.clip_by_value(self.decoder(self.quantizer.lookup(codes)), 0.0, 1.0)


# ---- The PixelCNN [2] ----------------------------------------------------------------


@register
class MaskedConv2D(layers.Layer):
    """Convolution that sees only earlier positions in raster order [2, section 3.4].

    A 3x3 mask of each type; A hides the position itself, B shows it:

        A: 1 1 1    B: 1 1 1
           1 0 0       1 1 0
           0 0 0       0 0 0

    A stack of these has a blind spot [3, section 2.2]: of the rows above it never sees what lies further to the
    right than one column a row. The 7x7 first layer sees two columns further.

    Only the visible entries of the kernel exist as weights, and the rows below are never multiplied.
    (Assigning a masked kernel inside `call`, as in keras.io/examples/generative/pixelcnn, trains and
    saves the hidden entries.)

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
        self.taps = kernel_size**2 // 2 + (mask_type == "B")  # the visible entries

    def build(self, input_shape):
        # Keras reads the fans off this shape as those of a kernel with `taps` entries.
        self.kernel = self.add_weight(name="kernel", shape=(self.taps, input_shape[-1], self.filters))
        self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros")

    def call(self, inputs):
        k, r = self.kernel_size, self.kernel_size // 2
        taps, channels, filters = self.kernel.shape
        kernel = tf.pad(tf.cast(self.kernel, inputs.dtype), [[0, (r + 1) * k - taps], [0, 0], [0, 0]])
        # Padded by hand: a fifth faster on a CPU than the `padding` argument of conv2d.
        padded = tf.pad(inputs, [[0, 0], [r, 0], [r, r], [0, 0]])
        kernel = tf.reshape(kernel, (r + 1, k, channels, filters))
        return tf.nn.conv2d(padded, kernel, strides=1, padding="VALID") + tf.cast(self.bias, inputs.dtype)


@register
class MaskedCodeConv2D(MaskedConv2D):
    """`MaskedConv2D` of type A on one-hot codes, as the lookup and sum that it is.

    The one-hot product multiplies K - 1 zeros for every code; here each visible code picks its
    row of the kernel. Same function, same gradient. (Of few codes the product is the faster one.)

    Shapes: int32 (B, h, w) in [0, K) -> (B, h, w, filters). Outside the grid there is "no code", a zero vector.
    """

    FEW_CODES = 32

    def __init__(self, num_embeddings, filters, kernel_size, **kwargs):
        super().__init__(filters, kernel_size, "A", **kwargs)
        self.num_embeddings = num_embeddings

    def build(self, codes_shape):
        super().build((*codes_shape, self.num_embeddings))

    def call(self, codes):
        if self.num_embeddings <= self.FEW_CODES:
            return super().call(tf.one_hot(codes, self.num_embeddings, dtype=self.compute_dtype))
        k, r = self.kernel_size, self.kernel_size // 2
        height, width = tf.shape(codes)[1], tf.shape(codes)[2]
        padded = tf.pad(codes, [[0, 0], [r, 0], [r, r]], constant_values=self.num_embeddings)
        offsets = [divmod(tap, k) for tap in range(self.taps)]
        visible = [padded[:, down : down + height, right : right + width] for down, right in offsets]
        kernel, bias = self.padded_kernel(), tf.cast(self.bias, self.compute_dtype)
        # One tap after the other: half the time of a single look-up, whose result is `taps` times as large.
        return tf.add_n([tf.gather(kernel[tap], seen) for tap, seen in enumerate(visible)]) + bias

    def padded_kernel(self):
        """(taps, K + 1, filters): the last row of a tap, of zeros, is for "no code"."""
        return tf.pad(tf.cast(self.kernel, self.compute_dtype), [[0, 0], [0, 1], [0, 0]])


@register
class ResidualBlock(layers.Layer):
    """x + Conv1x1(ReLU(MaskedConv3x3(ReLU(Conv1x1(ReLU(x)))))) [2, figure 5].

    Args:
        filters: channels of x; the masked convolution has half of them.
        dropout: share of the channels that are dropped before the last 1x1 convolution in training.
        zero_init: start as x alone, so that a deep stack can be trained with a large learning rate.

    Shapes: (B, h, w, filters) -> the same.
    """

    def __init__(self, filters, dropout=0.0, zero_init=True, **kwargs):
        super().__init__(**kwargs)
        policy = {"dtype": self.dtype_policy}
        self.narrow = layers.Dense(filters // 2, **policy)  # on (B, h, w, C), Dense is the 1x1 convolution
        self.masked = MaskedConv2D(filters // 2, 3, "B", **policy)
        self.widen = layers.Dense(filters, kernel_initializer="zeros" if zero_init else "glorot_uniform", **policy)
        self.drop = layers.SpatialDropout2D(dropout, **policy)

    def build(self, input_shape):
        self.narrow.build(input_shape)
        hidden_shape = (*input_shape[:-1], self.narrow.units)
        self.masked.build(hidden_shape)
        self.widen.build(hidden_shape)

    def call(self, x, training=False):
        hidden = self.narrow(tf.nn.relu(x))  # (B, h, w, C / 2)
        hidden = self.masked(tf.nn.relu(hidden))  # (B, h, w, C / 2)
        hidden = self.drop(tf.nn.relu(hidden), training=training)
        return x + self.widen(hidden)  # (B, h, w, C)


@register
class PixelCNN(Model):
    """The network of [2, table 1]: p(codes) = prod p(code | earlier codes) [2, equation 1].

    A masked 7x7 convolution of type A, residual blocks, then three times ReLU and 1x1 convolution, to K logits.
    `fit(codes)` minimises the mean of -ln p of a code, in nats.

    Args:
        num_embeddings: K.
        grid: (h, w).
        filters: C, between the residual blocks; 2h in [2, figure 5].
        residual_blocks: 15 in [2].
        dropout, zero_init: see `ResidualBlock`.
        between: layers (B, h, w, filters) -> the same, that see no later position. They are put before blocks, at
            even distances.

    Call arguments: codes, int32 (B, h, w) in [0, K); a map (B, h, w, filters), which is added after the first layer.
    Returns: logits (B, h, w, K); those at a position depend on earlier codes, and on the map there and before.
    """

    input_dtype = "int32"  # of what Keras exports

    def __init__(
        self, num_embeddings, grid, filters=128, residual_blocks=15, dropout=0.0, zero_init=True, between=(), **kwargs
    ):
        with keras_defaults():
            super().__init__(autocast=False, **kwargs)
            self.num_embeddings, self.grid, self.filters = num_embeddings, tuple(grid), filters
            self.residual_blocks, self.dropout, self.zero_init = residual_blocks, dropout, zero_init
            self.between = list(between)
            self.first = MaskedCodeConv2D(num_embeddings, filters, 7)
            self.trunk = [ResidualBlock(filters, dropout, zero_init) for _ in range(residual_blocks)]
            for i, layer in reversed(list(enumerate(self.between))):
                self.trunk.insert(i * residual_blocks // len(self.between), layer)
            self.last = [
                layers.Dense(filters, activation="relu"),
                layers.Dense(filters, activation="relu"),
                layers.Dense(num_embeddings, name="logits"),
            ]
        self(np.zeros((1, *self.grid), np.int32))  # builds the layers

    def call(self, codes, condition_map=None, training=False):
        codes = check_codes(codes, self.grid, self.num_embeddings)  # (B, h, w)
        x = self.first(codes)  # (B, h, w, C)
        if condition_map is not None:
            x += condition_map  # (B, h, w, C)
        for layer in self.trunk:
            x = layer(x, training=training)  # (B, h, w, C)
        return self.logits(x)  # (B, h, w, K)

    def logits(self, x):
        """Features (..., C) -> logits (..., K)."""
        x = tf.nn.relu(x)
        for layer in self.last:
            x = layer(x)
        return x

    def loss_of(self, codes, logits, sample_weight):
        return mean_nats(codes, logits, sample_weight)


def nats(codes, logits):
    """-ln p of codes: int32 (B, h, w), (B, h, w, K) -> (B, h, w)."""
    return -tfp.distributions.Categorical(logits=logits).log_prob(codes)


def mean_nats(codes, logits, sample_weight=None):
    return weighted_mean(tf.reduce_mean(nats(codes, logits), axis=(1, 2)), sample_weight)


# ---- Row contexts, which are in no paper ---------------------------------------------


@register
class RowContext(layers.Layer):
    """Adds to each position p a summary of all rows above: x_p + W_p ReLU(weighted sum of ReLU(Dense(x))).

    A masked 3x3 convolution carries one position further; what holds for the whole picture, such as its brightness,
    arrives after many blocks and fades. Here every row has its own weighting of the positions above it, which starts
    as their mean, and each position reads the summary through a matrix of its own: the slices are registered, so
    that the part of the head which comes next has a fixed place. (In its own row a position sees, through the
    convolutions, as many codes to its left as there are blocks, and three more.)

    Args:
        filters: channels of the summary.
        dropout: rate of the dropout on the summary.

    Shapes: (B, h, w, C) -> the same.
    """

    def __init__(self, filters, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.narrow = layers.Dense(filters, activation="relu", dtype=self.dtype_policy)
        self.drop = layers.Dropout(dropout, dtype=self.dtype_policy)

    def build(self, input_shape):
        height, width, channels = input_shape[1:]
        self.narrow.build(input_shape)
        self.is_above = np.repeat(np.tri(height, k=-1, dtype="float32"), width, axis=1)[..., None]  # (h, h w, 1)
        mean = self.is_above / np.maximum(self.is_above.sum(axis=1, keepdims=True), 1)
        shapes = (height, height * width, self.filters), (height, width, self.filters, channels)
        as_mean = lambda shape, dtype: tf.broadcast_to(tf.cast(mean, dtype), shape)  # noqa: E731
        self.weights_above = self.add_weight(shapes[0], as_mean, name="weights_above")
        self.readout = self.add_weight(shapes[1], "zeros", name="readout")
        self.bias = self.add_weight((channels,), "zeros", name="bias")

    def call(self, x, training=False):
        height, width = self.readout.shape[:2]
        features = tf.reshape(self.narrow(x), (-1, height * width, self.filters))  # (B, h w, F)
        weights, readout, bias = (tf.cast(w, x.dtype) for w in (self.weights_above, self.readout, self.bias))
        summary = tf.nn.relu(tf.einsum("rpf,bpf->brf", weights * tf.cast(self.is_above, x.dtype), features))
        summary = self.drop(summary, training=training)  # (B, h, F)
        return x + tf.einsum("brf,rwfc->brwc", summary, readout) + bias  # (B, h, w, C)


# ---- The prior: a PixelCNN given what is known of a slice ----------------------------

UNKNOWN_SCORE = -8192.0  # stands for a score that is not known: in the graph no NaN is needed, nor made


@dataclasses.dataclass(frozen=True)
class Condition:
    """What may be known of each slice beside its codes."""

    shape: tuple  # of one slice
    dtype: str
    unknown: float  # the value for "not known"
    hidden: float  # share of the slices from which it is hidden in training
    highest: int | None = None  # of an integer condition, whose lowest value is `unknown`


@register
class Conditioning(layers.Layer):
    """All that is known of a slice beside its codes, as one map: the location dependent term of [3, section 2.3].

    Each number is multiplied by a learned map (h, w, C), and the maps are added. A constant 1 among the numbers gives a
    learned vector for each position. The codes of the slice below go through two convolutions. In training labels,
    scores and the slice below are each hidden from a share of the slices, so that the network does without them too.

    Args:
        grid, filters: (h, w), C of the map.
        num_embeddings: K, of the slice below.
        learned_position: whether there is the constant 1.
        num_labels, num_scores, num_changes, below: of the conditions; 0 or False for one that is never known.

    Call arguments: the conditions in `table`, see `Prior`.
    Returns: (B, h, w, filters); zeros where there is no condition.
    """

    SCORE_NOISE = 0.1  # of the scores in training, so that none names a single training slice

    def __init__(
        self, grid, filters, num_embeddings, learned_position, num_labels, num_scores, num_changes, below, **kwargs
    ):
        super().__init__(**kwargs)
        self.grid, self.filters, self.learned_position, self.below = tuple(grid), filters, learned_position, below
        self.num_labels, self.num_scores, self.num_changes = num_labels, num_scores, num_changes
        self.table = {
            "labels": Condition((), "int32", -1, hidden=0.1, highest=num_labels - 1),
            "scores": Condition((num_scores,), "float32", UNKNOWN_SCORE, hidden=0.5),
            "below": Condition(self.grid, "int32", -1, hidden=0.5, highest=num_embeddings - 1 if below else -1),
            "changes": Condition((num_changes,), "float32", 0, hidden=0),
        }
        if below:
            policy = {"dtype": self.dtype_policy}
            embedding = layers.Embedding(num_embeddings, 32, **policy)
            convolution = layers.Conv2D(32, 3, padding="same", activation="relu", **policy)
            last = layers.Conv2D(filters, 3, padding="same", **policy)
            inputs = keras.Input(self.grid, dtype="int32")
            self.below_network = keras.Sequential([inputs, embedding, convolution, last])
        self.seeds = keras.random.SeedGenerator()

    def build(self, labels_shape, scores_shape, below_shape, changes_shape):
        flag = int(self.num_scores > 0)  # a number that says whether the scores are known
        numbers = self.learned_position + self.num_labels + self.num_scores + flag + self.num_changes
        self.maps = self.add_weight(name="maps", shape=(numbers, *self.grid, self.filters), initializer="zeros")

    def call(self, labels, scores, below, changes, training=False):
        count, dtype = tf.shape(labels)[0], self.compute_dtype

        def seen(name, values):
            """A condition as the network sees it: in training it is hidden from some slices."""
            if not training:
                return values
            shape = [count] + [1] * (len(values.shape) - 1)
            hidden = keras.random.uniform(shape, dtype="float32", seed=self.seeds) < self.table[name].hidden
            return tf.where(hidden, tf.cast(self.table[name].unknown, values.dtype), values)

        numbers = [tf.ones((count, int(self.learned_position)), dtype)]
        if self.num_labels:
            numbers.append(tf.one_hot(seen("labels", labels), self.num_labels, dtype=dtype))  # zeros for -1
        if self.num_scores:
            scores = seen("scores", scores)
            are_known = scores > UNKNOWN_SCORE
            if training:
                noise = keras.random.normal(tf.shape(scores), dtype="float32", seed=self.seeds)
                scores += tf.cast(self.SCORE_NOISE * noise, scores.dtype)
            scores = tf.where(are_known, scores, tf.zeros_like(scores))
            numbers += [tf.cast(scores, dtype), tf.cast(are_known[:, :1], dtype)]
        if self.num_changes:
            numbers.append(tf.cast(changes, dtype))
        added = tf.tensordot(tf.concat(numbers, axis=1), tf.cast(self.maps, dtype), 1)  # (B, h, w, C)
        if self.below:
            codes = seen("below", below)
            features = self.below_network(tf.maximum(codes, 0))  # (B, h, w, C)
            added += tf.where(codes[..., None] < 0, tf.zeros_like(features), features)
        return added


@register
class HeadScores(layers.Layer):
    """What sets whole slices apart, such as brightness and shape: principal scores, and their Gaussian.

    A score is the coordinate of a slice on a principal component of the training slices, whose scores have a standard
    deviation of 1. The scores of all slices of a novel head are drawn at once, from a Gaussian of whole heads: the
    MAX_HEADS first of the training. (Fitted to one head, it always draws the mean.) As in [7] a representation is drawn
    first, and the picture given it.

    Args:
        num_labels: L, the number of slices of a whole head.
        num_scores: S, scores of a slice. Where the slices do not vary in as many ways, the last are 0.
        num_pixels: of a slice.
    """

    MAX_HEADS = 384
    # Standard deviation that the rounding to uint8 alone gives a component of pixels in [0, 1]: 1/255 is the step.
    ROUNDING = 1 / 255 / np.sqrt(12)

    def __init__(self, num_labels, num_scores, num_pixels, **kwargs):
        super().__init__(trainable=False, **kwargs)
        self.num_labels, self.num_scores, self.num_pixels = num_labels, num_scores, num_pixels
        state = {"initializer": "zeros", "trainable": False, "autocast": False, "dtype": "float32"}
        self.pixel_mean = self.add_weight(name="pixel_mean", shape=(num_pixels,), **state)
        self.axes = self.add_weight(name="axes", shape=(num_pixels, num_scores), **state)
        shape = (num_labels, num_scores)
        self.means = self.add_weight(name="means", shape=shape, **state)
        self.factor = self.add_weight(name="factor", shape=(self.MAX_HEADS, *shape), **state)
        self.built = True

    def fit(self, images, labels, heads):
        """Fit the components and the Gaussian to the training slices.

        Args: images, float32 (N, H, W, 1) in [0, 1]; labels, int (N,), -1 where not known; heads, int (N,), the same
            for slices of one head.
        """
        pixels = np.asarray(images).reshape(len(images), -1)
        count = max(1, min(self.num_scores, len(pixels) - 1, self.num_pixels))
        solver = "arpack" if count < min(pixels.shape) else "full"
        found = PCA(count, svd_solver=solver, random_state=0).fit(pixels)
        varies = found.explained_variance_ > self.ROUNDING**2  # more than the rounding of pixels makes
        axes = (found.components_[varies] / np.sqrt(found.explained_variance_[varies, None])).T
        self.pixel_mean.assign(found.mean_)
        self.axes.assign(np.pad(axes, [[0, 0], [0, self.num_scores - axes.shape[1]]]))
        known = labels >= 0
        heads = np.unique(heads[known], return_inverse=True)[1]
        table = np.full((heads.max() + 1, self.num_labels, self.num_scores), np.nan)
        table[heads, labels[known]] = self.of(images[known])
        self.fit_gaussian(table)

    def fit_gaussian(self, table):
        """Fit the Gaussian to the scores of heads (N, L, S), NaN where a head has no slice of that label.

        For a slice that is not there, the deviation from the mean is interpolated between its neighbours, so that
        the slices of a head stay together; then each label gets the variance of the slices that are there.
        """
        means, counts = np.nanmean(table, axis=0), np.isfinite(table).sum(axis=0)
        deviations, places = table - means, np.arange(self.num_labels)
        variances = np.nansum(deviations**2, axis=0) / np.maximum(counts - 1, 1)
        for head in deviations:
            missing = np.isnan(head[:, 0])
            for scores in head.T:
                scores[missing] = np.interp(places[missing], places[~missing], scores[~missing])
        factor = deviations[: self.MAX_HEADS]
        factor /= np.sqrt(max(len(factor) - 1, 1))  # factor^T factor is the covariance
        found = np.sum(factor**2, axis=0)
        scale = np.sqrt(np.divide(variances, found, where=(counts > 1) & (found > 0), out=np.ones_like(found)))
        self.means.assign(means)
        self.factor.assign(np.pad(factor * scale, [[0, self.MAX_HEADS - len(factor)], [0, 0], [0, 0]]))

    def of(self, images):
        """Scores of slices: float32 (N, H, W, 1) in [0, 1] -> float32 (N, S)."""
        pixels = np.reshape(images, (len(images), -1))
        return (pixels - self.pixel_mean.numpy()) @ self.axes.numpy()

    def draw_heads(self, count, seed):
        """Scores of all slices of novel heads: float32 (count, L, S)."""
        deviations = np.tensordot(self.standard_normal(count, seed), self.factor.numpy(), 1)
        return (self.means.numpy() + deviations).astype(np.float32)

    def draw(self, labels, seed):
        """Scores of novel slices, each of a head of its own: int (N,) -> float32 (N, S); NaN for the label -1."""
        draws, labels = self.standard_normal(len(labels), seed), np.asarray(labels)
        scores = np.full((len(labels), self.num_scores), np.nan, np.float32)
        for label in np.unique(labels[labels >= 0]):
            of_label = labels == label
            scores[of_label] = self.means[label] + draws[of_label] @ self.factor[:, label].numpy()
        return scores

    def standard_normal(self, count, seed):
        """float64 (count, MAX_HEADS): the order of summation is lost when scores are rounded to float32."""
        return np.random.default_rng(seed).standard_normal((count, self.MAX_HEADS))


def labels_of(slice_numbers, model_numbers):
    """Index of each slice number in `model_numbers`, which ascend: int32 (N,); -1 where it is not among them."""
    labels = np.searchsorted(model_numbers, slice_numbers)
    return np.where(np.isin(slice_numbers, model_numbers), labels, -1).astype(np.int32)


@register
class Prior(Model):
    """p(codes | what is known of the slice): a `PixelCNN`, or any network with its call, and `Conditioning`.

    `fit` takes what `call` takes, and minimises the mean of -ln p of a code, in nats.

    Args:
        network: codes (B, h, w) and a map (B, h, w, filters) -> logits (B, h, w, num_embeddings), a Keras model with
            the attributes grid, filters and num_embeddings.
        slice_numbers: the number in the file names that each label stands for, ascending; none: labels are not known.
        num_scores: scores of a slice, see `HeadScores`; 0 for none.
        num_changes: numbers that describe an augmentation; 0 for none.
        below: whether the slice below may be known.
        learned_position: add a learned vector for each position.
        num_pixels: of the slices that have the scores.

    Call arguments: codes, int32 (B, h, w) in [0, K), or a dictionary of them and, where known, of the conditions:
        labels: int32 (B,) in [0, num_labels), which slice of a head it is; -1 where not known.
        scores: float32 (B, num_scores), see `HeadScores`; UNKNOWN_SCORE or NaN where not known, all
            or none.
        below: int32 (B, h, w) in [0, K), the codes of the slice below in the same head; -1 where not known.
        changes: float32 (B, num_changes), the augmentation [6]; zeros for a slice as it is.
    Returns: logits, float32 (B, h, w, K); those at a position depend on earlier codes and on the conditions.
    Raises: ValueError for another name or shape, or a code or label that the model has not. In a graph the values
        raise a tf.errors.InvalidArgumentError, unless XLA compiles it.
    """

    input_dtype = "int32"  # of what Keras exports
    BATCH = 512  # pictures that are sampled at once

    def __init__(
        self,
        network,
        slice_numbers=(),
        num_scores=0,
        num_changes=0,
        below=False,
        learned_position=True,
        num_pixels=0,
        **kwargs,
    ):
        with keras_defaults():
            super().__init__(autocast=False, **kwargs)
            self.network, self.grid, self.num_embeddings = network, tuple(network.grid), network.num_embeddings
            self.slice_numbers, self.num_labels = [int(number) for number in slice_numbers], len(slice_numbers)
            self.num_scores, self.num_changes, self.below = num_scores, num_changes, below
            self.learned_position, self.num_pixels = learned_position, num_pixels
            self.conditioning = Conditioning(
                *(self.grid, network.filters, self.num_embeddings, learned_position),
                *(self.num_labels, num_scores, num_changes, below),
            )
            if num_scores:
                self.head_scores = HeadScores(self.num_labels, num_scores, num_pixels)
        self(np.zeros((1, *self.grid), np.int32))  # builds the layers

    def call(self, inputs, training=False):
        codes, conditions = self.checked(inputs)  # (B, h, w)
        condition_map = self.conditioning(**conditions, training=training)  # (B, h, w, C)
        return self.network(codes, condition_map, training=training)  # (B, h, w, K)

    def unknown(self, count):
        """The conditions of `count` slices of which nothing is known."""
        return {
            name: tf.fill((count, *condition.shape), tf.cast(condition.unknown, condition.dtype))
            for name, condition in self.conditioning.table.items()
        }

    def checked(self, inputs):
        """Codes, or a dictionary of codes and some conditions -> the codes, and every condition."""
        inputs = dict(inputs) if isinstance(inputs, dict) else {"codes": inputs}
        codes = check_codes(inputs.pop("codes"), self.grid, self.num_embeddings)
        return codes, self.checked_conditions(codes.shape[0], tf.shape(codes)[0], inputs)

    def checked_conditions(self, static_count, count, given):
        """Every condition of `count` slices, checked; what is not given is not known. `static_count` may be None."""
        table, conditions = self.conditioning.table, self.unknown(count)
        for name, values in given.items():
            if name not in table:
                raise ValueError(f"the conditions are {', '.join(table)}, not {name}")
            condition, values = table[name], tf.convert_to_tensor(values)
            if values.dtype.is_floating:
                values = tf.where(tf.math.is_nan(values), tf.cast(condition.unknown, values.dtype), values)
            values = check_shape(name, values, (static_count, *condition.shape))
            if condition.highest is not None:
                check_integers(name, values, condition.unknown, condition.highest)
            conditions[name] = tf.cast(values, condition.dtype)
        return conditions

    def loss_of(self, inputs, logits, sample_weight):
        return mean_nats(inputs["codes"] if isinstance(inputs, dict) else inputs, logits, sample_weight)

    def nll(self, codes, verbose=False, **conditions):
        """-ln p of every code given the earlier ones and the conditions, see the class: float32 (B, h, w), nats."""
        codes, conditions = self.checked({"codes": codes, **conditions})
        return in_batches(self.nll_batch, {"codes": codes, **conditions}, verbose)

    @tf.function(reduce_retracing=True)
    def nll_batch(self, inputs):
        return nats(inputs["codes"], self(inputs))

    def labels_of(self, slice_numbers):
        """Labels of the slice numbers of files: int (N,) -> int32 (N,); -1 for a number that the model has not."""
        return labels_of(slice_numbers, self.slice_numbers)

    def numbers_of(self, labels):
        """The slice numbers that labels stand for: int (N,) -> int32 (N,); -1 for -1."""
        return np.array([*self.slice_numbers, -1], np.int32)[labels]

    def draw_scores(self, labels, seed):
        """Scores of novel slices, see `HeadScores.draw`."""
        check_integer("seed", seed, 0, MAX_INT32)
        labels = check_shape("labels", labels, (None,))
        check_integers("labels", labels, -1, self.num_labels - 1)
        return self.head_scores.draw(labels.numpy(), seed)

    def sample(self, num_samples, seed, temperature=1.0, known=None, cached=None, verbose=False, **conditions):
        """Draw codes position by position, in raster order. Picture n of a seed is the same however many are drawn.

        Args:
            num_samples: N.
            seed: int, from 0 to 2**31 - 1.
            temperature: divides the logits: 1 samples the model, less is more typical; from 1e-6 to 1e6.
            known: int32 (N, h, w) of codes to keep, -1 where one is to be drawn; None draws all.
            cached: see `draw`.
            verbose: whether there is a progress bar.
            conditions: see the class. With labels and without scores, scores are drawn first.

        Returns: int32 (N, h, w) in [0, K).
        """
        check_integer("num_samples", num_samples, 1, MAX_INT32)
        check_integer("seed", seed, 0, MAX_INT32)
        if not 1e-6 <= temperature <= 1e6:
            raise ValueError(f"temperature must be from 1e-6 to 1e6, got {temperature}")
        known = np.full((num_samples, *self.grid), -1, np.int32) if known is None else known
        known = check_shape("known", known, (num_samples, *self.grid))
        check_integers("known", known, -1, self.num_embeddings - 1)
        if self.num_scores and "labels" in conditions and "scores" not in conditions:
            conditions["scores"] = self.draw_scores(conditions["labels"], seed)
        conditions = self.checked_conditions(num_samples, num_samples, conditions)

        def draw_batch(batch):
            index = batch.pop("index")
            return self.draw(batch, seed, temperature, index % self.BATCH, index[0] // self.BATCH, cached)

        inputs = {"known": known, "index": np.arange(num_samples), **conditions}
        return in_batches(draw_batch, inputs, verbose, self.BATCH)

    def draw(self, inputs, seed, temperature, places, batch=0, cached=None):
        """`sample` of one batch: int32 (N, h, w) in [0, K).

        Args:
            inputs: the dictionary of `known` (see `sample`) and of every condition.
            seed, temperature: see `sample`.
            places: int (N,), of the pictures in the batch; those of one place have the same random numbers.
            batch: number of the batch.
            cached: True for the cached sampler, False for the naive loop; None: cached where it can be.
        """
        known, conditions = inputs["known"], {name: inputs[name] for name in self.conditioning.table}
        condition_map = self.conditioning(**conditions)
        if cached is None:
            cached = CachedSampler.supports(self.network)
        draw = self.cached_sampler.draw if cached else functools.partial(draw_naively, self.network)
        return draw(condition_map, known, np.int32([seed, batch]), np.int32(places), np.float32(temperature))

    @functools.cached_property
    def cached_sampler(self):
        return CachedSampler(self.network)

    def sample_heads(self, count, seed, temperature=1.0, verbose=False):
        """Draw whole heads from the lowest slice up, each slice given the one below: int32 (count, L, h, w)."""
        check_integer("count", count, 1, MAX_INT32)
        check_integer("seed", seed, 0, MAX_INT32)
        if not (self.below and self.num_labels):
            raise ValueError("the model knows nothing of the slice below: it cannot draw heads")
        slices, conditions = [], {"below": np.full((count, *self.grid), -1, np.int32)}
        scores = self.head_scores.draw_heads(count, seed) if self.num_scores else None
        for label in tqdm(range(self.num_labels), unit="slice", disable=None if verbose else True, file=sys.stdout):
            conditions["labels"] = np.full(count, label, np.int32)
            if self.num_scores:
                conditions["scores"] = scores[:, label]
            conditions["below"] = self.sample(count, (seed + 65537 * label) % 2**31, temperature, **conditions)
            slices.append(conditions["below"])
        return np.stack(slices, axis=1)


def draw_naively(network, condition_map, known, seed, places, temperature):
    """Draw the codes of one batch: for each position, in raster order, a pass of the whole network.

    Args: network; condition_map (N, h, w, C); known (N, h, w), codes to keep, -1 where one is to be drawn; seed and
        places, see `gumbel_noise`; temperature.
    """
    codes = np.zeros_like(known)
    for position, (row, column) in enumerate(np.ndindex(known.shape[1:])):
        logits = network(codes, condition_map)[:, row, column] / temperature  # (N, K)
        noise = gumbel_noise(seed, known[0].size, position, places, logits.shape[1])
        drawn = np.argmax(logits + noise, axis=1)
        codes[:, row, column] = np.where(known[:, row, column] < 0, drawn, known[:, row, column])
    return codes


def gumbel_noise(seed, num_positions, position, places, num_embeddings):
    """Noise (N, K) at one position: the largest of logits + noise is a draw from Categorical(logits).

    Unlike the noise of Categorical.sample, that of a picture does not depend on N.
    Args: the seed and the number of the batch, int32 (2,); h w; the position; places in the batch, int32 (N,); K.
    """
    shape, tiny = (tf.reduce_max(places) + 1, num_embeddings), np.finfo(np.float32).tiny  # no ln 0
    uniform = tf.random.stateless_uniform(shape, tf.stack([seed[0], seed[1] * num_positions + position]), minval=tiny)
    return tfp.distributions.Gumbel(0.0, 1.0).quantile(tf.gather(uniform, places))


# ---- The cached sampler [5] ----------------------------------------------------------


class CachedSampler:
    """Draws what `draw_naively` draws, and computes of a `PixelCNN` only what is new: the features at one position.

    What the masked convolutions see of earlier positions is read from a cache, and row contexts have running sums.

    Args:
        network: a `PixelCNN` of nothing but residual blocks and row contexts.
    """

    def __init__(self, network):
        self.network = network

    @staticmethod
    def supports(network):
        kinds = {type(layer) for layer in getattr(network, "trunk", ())}
        return type(network) is PixelCNN and ResidualBlock in kinds and kinds <= {ResidualBlock, RowContext}

    # A batch of 1 that is known to be 1 would give the loop's variables shapes that change.
    INTEGERS = (tf.TensorSpec(shape, tf.int32) for shape in ((None, None, None), (2,), (None,)))

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, None)), *INTEGERS, tf.TensorSpec(())])
    def draw(self, condition_map, known, seed, places, temperature):
        """See `draw_naively`."""
        network, (height, width), count = self.network, self.network.grid, tf.shape(known)[0]
        blocks = [layer for layer in network.trunk if isinstance(layer, ResidualBlock)]
        contexts = [layer for layer in network.trunk if isinstance(layer, RowContext)]
        r, codes_seen = network.first.kernel_size // 2, network.first.taps
        codes = tf.fill((height + r, width + 2 * r, count), network.num_embeddings)  # padded as in the first layer
        rows = tf.reshape(network.first.padded_kernel(), (-1, network.filters))
        # Two padded rows that take turns: row y begins at (y % 2) * (width + 2). A place holds the inputs of the masked
        # 3x3 convolutions, (blocks, N, C / 2); both ends of a row stay zeros.
        zeros = tf.zeros((2 * (width + 2), len(blocks), count, blocks[0].masked.kernel.shape[1]))
        cache = tf.TensorArray(tf.float32, 2 * (width + 2), clear_after_read=False).unstack(zeros)
        kernels = [tf.stack([block.masked.kernel[tap] for block in blocks]) for tap in range(4)]
        biases = tf.stack([tf.convert_to_tensor(block.masked.bias) for block in blocks])[:, None]
        # The weighted sums of the row contexts, over the positions so far, for each row.
        sums = tf.zeros((len(contexts), height, count, contexts[0].filters if contexts else 0))

        for position in tf.range(height * width):
            row, column = position // width, position % width
            # The left ends of the 3x3 window in this row, and in the one above.
            this, above = (row % 2) * (width + 2) + column, ((row + 1) % 2) * (width + 2) + column
            visible = tf.reshape(codes[row : row + r + 1, column : column + 2 * r + 1], (-1, count))[:codes_seen]
            x = self.first_layer(rows, visible) + condition_map[:, row, column]
            neighbours = [cache.read(place) for place in (above, above + 1, above + 2, this)]
            earlier = biases + tf.add_n([tf.matmul(seen, kernel) for seen, kernel in zip(neighbours, kernels)])
            inputs, to_sums = [], []
            for layer in network.trunk:
                if isinstance(layer, ResidualBlock):
                    x, current = self.residual_block(layer, x, earlier[len(inputs)])
                    inputs.append(current)
                else:
                    x, added = self.row_context(layer, x, sums[len(to_sums), row], row, column)
                    to_sums.append(added)
            if contexts:
                sums += tf.stack(to_sums)
            cache = cache.write(this + 1, tf.stack(inputs))

            noise = gumbel_noise(seed, height * width, position, places, network.num_embeddings)
            drawn = tf.argmax(network.logits(x) / temperature + noise, axis=-1, output_type=tf.int32)
            chosen = tf.where(known[:, row, column] < 0, drawn, known[:, row, column])
            codes = tf.tensor_scatter_nd_update(codes, [[row + r, column + r]], [chosen])

        return tf.transpose(codes[r:, r : r + width], (2, 0, 1))

    def first_layer(self, rows, visible):
        """`MaskedCodeConv2D` at one position.

        Args: its `padded_kernel` as rows (taps * (K + 1), C); the codes that it sees, K for "no code" (taps, N).
        Returns: (N, C).
        """
        first = self.network.first
        index = visible + (first.num_embeddings + 1) * tf.range(first.taps)[:, None]
        return tf.reduce_sum(tf.gather(rows, index), axis=0) + first.bias

    def residual_block(self, block, x, earlier):
        """`ResidualBlock` at one position.

        Args: x (N, C); what all earlier positions give to its masked convolution here (N, C / 2).
        Returns: the output (N, C), and the input of the masked convolution here (N, C / 2).
        """
        current = tf.nn.relu(block.narrow(tf.nn.relu(x)))
        hidden = earlier + tf.matmul(current, block.masked.kernel[-1])
        return x + block.widen(tf.nn.relu(hidden)), current

    def row_context(self, context, x, summary, row, column):
        """`RowContext` at one position.

        Args: x (N, C); the weighted sum over the rows above (N, filters); the position.
        Returns: the output (N, C), and what this position adds to the sums of all rows (h, N, filters).
        """
        position = row * context.readout.shape[1] + column
        weights = context.weights_above[:, position] * tf.constant(context.is_above)[:, position]  # (h, F)
        added = weights[:, None] * context.narrow(x)
        return x + tf.matmul(tf.nn.relu(summary), context.readout[row, column]) + context.bias, added


# ---- Checks, batches, devices and the settings of Keras ------------------------------

MAX_INT32 = 2**31 - 1


def check_integer(name, value, low, high):
    if not isinstance(value, numbers.Integral) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value}")


def check_shape(name, values, shape):
    """A tensor of values, which must have this shape; None stands for any size."""
    values = tf.convert_to_tensor(values)
    if not values.shape.is_compatible_with(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(values.shape)}")
    return tf.ensure_shape(values, shape)  # a graph may see it only when it runs


def check_range(name, values, low, high, rounding=0):
    """Refuse values beyond a range: a ValueError, or in a graph a tf.errors.InvalidArgumentError."""
    lowest, highest, message = tf.reduce_min(values), tf.reduce_max(values), f"{name} must be from {low} to {high}"
    is_inside = (lowest >= low - rounding) & (highest <= high + rounding)
    if not tf.executing_eagerly():
        tf.debugging.Assert(is_inside, [message, "lowest and highest:", lowest, highest])
    elif not is_inside:
        raise ValueError(f"{message}, got {lowest} to {highest}")


def check_integers(name, values, low, high):
    if not tf.as_dtype(values.dtype).is_integer:
        raise ValueError(f"{name} must be integers, got {tf.as_dtype(values.dtype).name}")
    check_range(name, values, low, high)


def check_codes(codes, grid, num_embeddings):
    """Codes as a tensor, int32 (B, h, w) in [0, K)."""
    codes = check_shape("codes", codes, (None, *grid))
    check_integers("codes", codes, 0, num_embeddings - 1)
    return tf.cast(codes, tf.int32)


def in_batches(function, inputs, verbose=False, size=256):
    """Apply a function to one batch at a time; only the results need memory in proportion to N.

    Args:
        function: a batch of the inputs -> an array or tensor, or a dictionary of them, with the batch first.
        inputs: an array (N, ...), or a dictionary of such.
        verbose: whether there is a progress bar. In a log there is none.
        size: of a batch.

    Returns: what the function returns, for all N, as NumPy arrays.
    """
    inputs = tf.nest.map_structure(np.asarray, inputs)
    starts = range(0, max(1, len(tf.nest.flatten(inputs)[0])), size)
    results = []
    for start in tqdm(starts, unit="batch", disable=None if verbose else True, file=sys.stdout):
        results.append(function(tf.nest.map_structure(lambda array, i=start: array[i : i + size], inputs)))
    return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *results)


def set_up_devices():
    """Prepare what TensorFlow runs on, before anything else does; returns a line that says what that is.

    On a GPU, memory is taken as it is needed, so that two processes can share a card, and products stay
    in float32 (no TF32): nearest codes and likelihoods are to be those of a CPU.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "running on the CPU: TensorFlow sees no GPU"
    with contextlib.suppress(RuntimeError):  # in a notebook where TensorFlow has started already
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", gpus[0].name)
    others = f", the first of {len(gpus)}: CUDA_VISIBLE_DEVICES chooses another" if len(gpus) > 1 else ""
    return f"running on one GPU, {name}{others}"


@contextlib.contextmanager
def keras_defaults():
    """Inside, Keras uses its defaults, whatever the user configured: float32, the channels last, all epochs."""
    defaults = {"floatx": "float32", "dtype_policy": "float32", "image_data_format": "channels_last"}
    defaults |= {"max_epochs": None, "max_steps_per_epoch": None}

    def configure(settings):
        for name, value in settings.items():
            getattr(keras.config, f"set_{name}")(value)

    before = {name: getattr(keras.config, name)() for name in defaults}
    configure(defaults)
    try:
        yield
    finally:
        configure(before)
