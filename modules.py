"""The two networks, a VQ-VAE for brain slices and a PixelCNN prior over its codes; and the anomaly maps of both.

References, cited below as [n]:
[1] van den Oord, Vinyals, Kavukcuoglu: Neural Discrete Representation Learning, arXiv 1711.00937
[2] van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, arXiv 1601.06759
[3] van den Oord et al.: Conditional Image Generation with PixelCNN Decoders, arXiv 1606.05328
[4] Paul: Vector-Quantized Variational Autoencoders, keras.io/examples/generative/vq_vae
[5] Ramachandran et al.: Fast Generation for Convolutional Autoregressive Models, arXiv 1704.06001
[6] Jun et al.: Distribution Augmentation for Generative Modeling, ICML 2020
[7] Li, Katabi, He: Return of Unconditional Generation, arXiv 2312.03701
[8] Naval Marimont, Tarroni: Anomaly Detection through Latent Space Restoration using VQ-VAEs, arXiv 2012.06765

Shapes: B images of H x W pixels, a latent grid of h x w positions, D numbers a latent vector,
K codes. An image is float32 in [0, 1], (B, H, W, 1); its codes are int32 in [0, K), (B, h, w).

    import keras, modules
    vqvae = keras.saving.load_model("runs/oasis/vqvae.keras")
    pixelcnn = keras.saving.load_model("runs/oasis/pixelcnn.keras")
    images = vqvae.decode(pixelcnn.sample(16, seed=0))
"""

import contextlib
import inspect
import os

os.environ["KERAS_BACKEND"] = "tensorflow"  # before Keras is imported, and whatever keras.json says

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf
import tensorflow_probability as tfp
from keras import layers
from scipy import ndimage, signal


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
    """What is made inside is float32 with the channels last, and fitted to its end, whatever Keras was set to."""
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


register = keras.saving.register_keras_serializable(package="oasis")


class SavesItsArguments:
    """`get_config` of a model that keeps every argument of its constructor under the argument's name.

    (Keras does this for layers, not for models.)
    """

    def get_config(self):
        names = list(inspect.signature(type(self).__init__).parameters)[1:-1]  # without self and **kwargs
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def in_batches(function, inputs, verbose=0, size=256):
    """Apply a function to a batch at a time: of memory only the results grow with N.

    Args:
        function: a batch of the inputs -> a tensor, or a dictionary of tensors, with the batch first.
        inputs: an array (N, ...), or a dictionary of such.
        verbose: 1 for a moving progress bar, 2 for one line, 0 for neither.
        size: of a batch.

    Returns: what the function returns, for all N.
    """
    batches = tf.data.Dataset.from_tensor_slices(inputs).batch(size)
    bar, results = keras.utils.Progbar(len(batches), verbose=verbose, unit_name="batch"), []
    for batch in batches:
        results.append(function(batch))
        bar.add(1)
    return tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *results)


# ---- VQ-VAE --------------------------------------------------------------------------


def histogram(codes, num_embeddings):
    """How often each code occurs: int32 (N,) -> float32 (K,). XLA compiles this, and not tf.math.bincount."""
    return tf.math.unsorted_segment_sum(tf.ones(tf.shape(codes)), codes, num_embeddings)


class CodebookUsage(keras.metrics.Metric):
    """Perplexity exp(H) of the code histogram, and the number of codes used, over a whole epoch.

    The perplexity of a single batch depends on the batch size; this one counts until it is reset.
    """

    def __init__(self, num_embeddings, **kwargs):
        super().__init__(**kwargs)
        self.num_embeddings = num_embeddings
        self.counts = self.add_variable((num_embeddings,), "zeros", dtype="float32", name="counts")

    def update_state(self, codes, sample_weight=None):
        self.counts.assign_add(histogram(tf.reshape(codes, (-1,)), self.num_embeddings))

    def result(self):
        counts = tf.convert_to_tensor(self.counts)
        frequencies = counts / tf.maximum(tf.reduce_sum(counts), 1)
        return {
            "perplexity": tf.exp(-tf.reduce_sum(tf.math.xlogy(frequencies, frequencies))),
            "codes_used": tf.reduce_sum(tf.cast(counts > 0, tf.float32)),
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
        commitment_cost: beta of [1, equation 3].
        ema_decay: gamma of [1, appendix A.1]; None trains the codebook by gradient [1, equation 3].

    Shapes: latents (..., D) -> the nearest codebook vectors (..., D).
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
            autocast=False,
        )
        if self.ema_decay is not None:
            state = {"trainable": False, "initializer": "zeros", "autocast": False}
            self.ema_counts = self.add_weight(name="ema_counts", shape=shape[:1], **state)
            self.ema_sums = self.add_weight(name="ema_sums", shape=shape, **state)
            # int64: on a GPU machine int32 variables stay on the host, where a step compiled by XLA cannot read them.
            self.ema_steps = self.add_weight(name="ema_steps", shape=(), dtype="int64", **state)

    def call(self, latents, training=False):
        latents = tf.cast(latents, tf.float32)
        codes = self.nearest(latents)
        quantized = self.lookup(codes)
        self.usage.update_state(codes)

        # The losses are taken before the straight-through line: after it no gradient is left for them.
        commitment_loss = tf.reduce_mean(tf.square(latents - tf.stop_gradient(quantized)))
        self.add_loss(self.commitment_cost * commitment_loss)
        if self.ema_decay is None:
            codebook_loss = tf.reduce_mean(tf.square(tf.stop_gradient(latents) - quantized))
            self.add_loss(codebook_loss)
        elif training:
            self.move_codebook(tf.stop_gradient(latents), codes)

        return tf.cast(latents + tf.stop_gradient(quantized - latents), self.compute_dtype)

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
        """One step of the moving averages [1, equations 6 to 8]; dead codes restart at random latents of the batch."""
        latents, codes = tf.reshape(latents, (-1, self.embedding_dim)), tf.reshape(codes, (-1,))

        def average(old, new):
            return self.ema_decay * old + (1 - self.ema_decay) * new

        counts = average(self.ema_counts, histogram(codes, self.num_embeddings))
        sums = average(self.ema_sums, tf.math.unsorted_segment_sum(latents, codes, self.num_embeddings))

        even_share = tf.cast(tf.size(codes), tf.float32) / self.num_embeddings
        dead = counts < self.DEAD_BELOW * even_share
        # Stateless, so that a resumed training draws what the uninterrupted one would have drawn.
        seed = tf.cast(tf.stack([0, tf.convert_to_tensor(self.ema_steps)]), tf.int32)
        picks = tf.random.stateless_uniform((self.num_embeddings,), seed, maxval=tf.size(codes), dtype=tf.int32)
        counts = tf.where(dead, self.REBORN_WITH * even_share, counts)
        sums = tf.where(dead[:, None], counts[:, None] * tf.gather(latents, picks), sums)

        self.ema_counts.assign(counts)
        self.ema_sums.assign(sums)
        self.codebook.assign(sums / counts[:, None])
        self.ema_steps.assign(self.ema_steps + 1)


def add_residual(x, filters):
    """x + Conv1x1(ReLU(Conv3x3(ReLU(x)))) [1, section 4.1]."""
    h = layers.Conv2D(filters, 3, padding="same", activation="relu")(layers.ReLU()(x))
    return layers.Add()([x, layers.Conv2D(filters, 1)(h)])


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

    x, y, luminance, contrast = images[..., 0], others[..., 0], 0.01**2, 0.03**2
    mean_x, mean_y = blur(x), blur(y)
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = blur(x * y) - product, blur(x**2 + y**2) - squares
    similarity = (2 * product + luminance) / (squares + luminance)
    similarity *= (2 * covariance + contrast) / (variances + contrast)
    return tf.reduce_mean(similarity, axis=(1, 2))


@register
class VQVAE(SavesItsArguments, keras.Model):
    """Encoder, vector quantizer, decoder [1], fitted on images alone: `fit(images)`.

    loss = MSE / data_variance + ssim_weight * (1 - SSIM) + the losses of the quantizer.

    The encoder and decoder are those of [1, section 4.1] (strided convolutions, then residual
    blocks); without residual blocks they are the plain stack of [4].

    Args:
        num_embeddings, embedding_dim, commitment_cost, ema_decay: see `VectorQuantizer`.
        image_size: H = W, in pixels; with `ssim_weight` 11 at least, the SSIM window.
        filters: width of each stride-2 convolution of the encoder, outermost first. The latent
            grid has H / 2**len(filters) rows and columns.
        kernel_size: of the strided convolutions.
        encoder_blocks, decoder_blocks: residual blocks of each.
        ssim_weight: of the term 1 - SSIM (Wang et al. 2004, 11x11 Gaussian window); 0 leaves it out.
        data_variance: variance of the training pixels, the unit of the squared error, as in [4].
    """

    @keras_defaults()
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
        super().__init__(**kwargs)
        if image_size % 2 ** len(filters):
            raise ValueError(f"image_size {image_size} cannot be halved {len(filters)} times, once for each of filters")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.commitment_cost, self.ema_decay = commitment_cost, ema_decay
        self.image_size, self.filters, self.kernel_size = image_size, list(filters), kernel_size
        self.encoder_blocks, self.decoder_blocks = encoder_blocks, decoder_blocks
        self.ssim_weight, self.data_variance = ssim_weight, float(data_variance)
        self.encoder = build_encoder(image_size, embedding_dim, filters, kernel_size, encoder_blocks)
        self.quantizer = VectorQuantizer(num_embeddings, embedding_dim, commitment_cost, ema_decay)
        self.decoder = build_decoder(image_size, embedding_dim, filters, kernel_size, decoder_blocks)
        self.terms = {
            name: keras.metrics.Mean(name=name)
            for name in ["reconstruction_loss", "quantizer_loss"] + ["ssim_loss"] * bool(ssim_weight)
        }
        self.quantizer.build(self.decoder.input_shape)
        self.built = True

    def call(self, images, training=False):
        return self.decoder(self.quantizer(self.encoder(images), training=training))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of a batch of images x, reconstructed as y_pred; its terms are logged by name."""
        x = tf.cast(x, y_pred.dtype)  # Keras gives it the user's floatx
        terms = {
            "reconstruction_loss": tf.reduce_mean(tf.square(x - y_pred)) / self.data_variance,
            "quantizer_loss": tf.add_n(self.losses),
        }
        if self.ssim_weight:
            terms["ssim_loss"] = self.ssim_weight * (1 - tf.reduce_mean(ssim(x, y_pred)))
        for name, value in terms.items():
            self.terms[name].update_state(value, sample_weight=tf.shape(x)[0])
        return tf.add_n(list(terms.values()))

    def encode(self, images, verbose=0):
        """Codes of images: float32 (B, H, W, 1) in [0, 1] -> int32 (B, h, w) in [0, K)."""
        return in_batches(self.encode_batch, images, verbose)

    def decode(self, codes, verbose=0):
        """Images of codes: int32 (B, h, w) in [0, K) -> float32 (B, H, W, 1), clipped to [0, 1]."""
        return in_batches(self.decode_batch, codes, verbose)

    @tf.function(reduce_retracing=True)
    def encode_batch(self, images):
        return self.quantizer.nearest(self.encoder(images))

    @tf.function(reduce_retracing=True)
    def decode_batch(self, codes):
        return tf.clip_by_value(self.decoder(self.quantizer.lookup(codes)), 0.0, 1.0)


# ---- The layers of the PixelCNN ------------------------------------------------------


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
    row of the kernel. Same function, same gradient.

    Shapes: int32 (B, h, w) in [0, K) -> (B, h, w, filters). Outside the grid there is "no code", a zero vector.
    """

    def __init__(self, num_embeddings, filters, kernel_size, **kwargs):
        super().__init__(filters, kernel_size, "A", **kwargs)
        self.num_embeddings = num_embeddings

    def build(self, codes_shape):
        super().build((*codes_shape, self.num_embeddings))

    def call(self, codes):
        k, r = self.kernel_size, self.kernel_size // 2
        height, width = tf.shape(codes)[1], tf.shape(codes)[2]
        padded = tf.pad(codes, [[0, 0], [r, 0], [r, r]], constant_values=self.num_embeddings)
        offsets = [divmod(tap, k) for tap in range(self.taps)]
        visible = [padded[:, down : down + height, right : right + width] for down, right in offsets]
        kernel, bias = self.padded_kernel(), tf.cast(self.bias, self.compute_dtype)
        # One tap after the other: half the time of a single look-up, whose result is `taps` times as large.
        return tf.add_n([tf.gather(kernel[tap], codes) for tap, codes in enumerate(visible)]) + bias

    def padded_kernel(self):
        """(taps, K + 1, filters): the last row of a tap, of zeros, is for "no code"."""
        return tf.pad(tf.cast(self.kernel, self.compute_dtype), [[0, 0], [0, 1], [0, 0]])

    def step(self, rows, codes):
        """`call` at one position [5].

        Args: `padded_kernel` as rows (taps * (K + 1), filters); the codes that it sees, K for "no code" (taps, N).
        Returns: (N, filters).
        """
        index = codes + (self.num_embeddings + 1) * tf.range(self.taps)[:, None]
        return tf.reduce_sum(tf.gather(rows, index), axis=0) + self.bias


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
        hidden = tf.nn.relu(self.masked(tf.nn.relu(self.narrow(tf.nn.relu(x)))))
        return x + self.widen(self.drop(hidden, training=training))

    def step(self, x, earlier):
        """`call` at one position [5].

        Args: x (B, filters); what all earlier positions give to `masked` here (B, filters / 2).
        Returns: the output (B, filters), and the input of `masked` here (B, filters / 2).
        """
        current = tf.nn.relu(self.narrow(tf.nn.relu(x)))
        hidden = earlier + tf.matmul(current, self.masked.kernel[-1])
        return x + self.widen(tf.nn.relu(hidden)), current


@register
class RowContext(layers.Layer):
    """Adds to each position p a summary of all rows above: x_p + W_p ReLU(weighted sum of ReLU(Dense(x))).

    A masked 3x3 convolution carries one position further; what holds for the whole picture, such as its brightness,
    arrives after many blocks and fades. Here every row has its own weighting of the positions above it, which starts
    as their mean, and each position reads the summary through a matrix of its own: the slices are registered, so
    that the part of the head which comes next has a fixed place. (Of its own row the convolutions show a position as
    many codes to the left as there are blocks, and four more.)

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
        self.weights_above = self.add_weight(
            name="weights_above",
            shape=(height, height * width, self.filters),
            initializer=lambda shape, dtype: tf.broadcast_to(tf.cast(mean, dtype), shape),
        )
        self.readout = self.add_weight(
            name="readout", shape=(height, width, self.filters, channels), initializer="zeros"
        )
        self.bias = self.add_weight(name="bias", shape=(channels,), initializer="zeros")

    def call(self, x, training=False):
        height, width = self.readout.shape[:2]
        features = tf.reshape(self.narrow(x), (-1, height * width, self.filters))  # (B, h w, F)
        weights, readout, bias = (tf.cast(w, x.dtype) for w in (self.weights_above, self.readout, self.bias))
        summary = tf.nn.relu(tf.einsum("rpf,bpf->brf", weights * tf.cast(self.is_above, x.dtype), features))
        summary = self.drop(summary, training=training)  # (B, h, F)
        return x + tf.einsum("brf,rwfc->brwc", summary, readout) + bias

    def step(self, x, summary, row, column):
        """`call` at one position [5].

        Args: x (B, C); the weighted sum over the rows above (B, filters); the position.
        Returns: the output (B, C), and what this position adds to the sums of all rows (h, B, filters).
        """
        position = row * self.readout.shape[1] + column
        weights = self.weights_above[:, position] * tf.constant(self.is_above)[:, position]  # (h, F)
        added = weights[:, None] * self.narrow(x)
        return x + tf.matmul(tf.nn.relu(summary), self.readout[row, column]) + self.bias, added


# ---- What the PixelCNN is conditioned on ---------------------------------------------

# Standard deviation that the rounding to uint8 alone gives a component of pixels in [0, 1]: 1/255 is the step.
ROUNDING = 1 / 255 / np.sqrt(12)


def principal_components(images, count):
    """The pixels' mean (P,), and the principal components of most variance (P, count), the first one first.

    There are fewer where the images vary in fewer ways than `count`: a variance that the rounding of pixels can cause
    does not count. The largest entry of each is positive, so that the signs are the same on every machine.
    """
    pixels = images.reshape(len(images), -1)
    mean = pixels.mean(axis=0)
    few = len(pixels) < len(mean)  # images, so that their products with one another are the smaller matrix
    centred = (pixels - mean).astype(np.float64 if few else np.float32)
    products = centred @ centred.T if few else centred.T @ centred
    first = max(0, len(products) - count)
    variances, vectors = scipy.linalg.eigh(products, subset_by_index=[first, len(products) - 1])
    vectors = vectors[:, variances / len(pixels) > ROUNDING**2][:, ::-1]
    axes = centred.T @ vectors if few else vectors
    axes /= np.linalg.norm(axes, axis=0)
    return mean, axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])


def project(images, components):
    """Coordinates of images on principal components: (N, ...) -> float64 (N, count)."""
    mean, axes = components
    parts = np.array_split(images, len(images) // 1024 + 1)
    return np.concatenate([(part.reshape(len(part), -1) - mean).astype(np.float64) @ axes for part in parts])


@register
class HeadScores(layers.Layer):
    """What sets whole slices apart, such as brightness and shape: principal scores, and their Gaussian [7].

    A score is the coordinate of a slice on a principal component of the training slices, whose scores have a standard
    deviation of 1. The scores of all slices of a novel head are drawn at once, from a Gaussian of whole heads: the
    first MAX_HEADS of the training. (Of a single head it knows the mean alone, so every draw is that.)

    Args:
        num_labels: L, the number of slices of a whole head.
        num_scores: S, scores of a slice. Where the slices do not vary in as many ways, the last are 0.
        num_pixels: of a slice.
    """

    MAX_HEADS = 384

    def __init__(self, num_labels, num_scores, num_pixels, **kwargs):
        super().__init__(trainable=False, **kwargs)
        self.num_labels, self.num_scores, self.num_pixels = num_labels, num_scores, num_pixels
        zeros = {"initializer": "zeros", "trainable": False, "autocast": False}
        self.pixel_mean = self.add_weight(name="pixel_mean", shape=(num_pixels,), dtype="float32", **zeros)
        self.axes = self.add_weight(name="axes", shape=(num_pixels, num_scores), dtype="float64", **zeros)
        shape = (num_labels, num_scores)
        self.means = self.add_weight(name="means", shape=shape, dtype="float32", **zeros)
        self.factor = self.add_weight(name="factor", shape=(self.MAX_HEADS, *shape), dtype="float32", **zeros)
        self.built = True

    def fit(self, images, labels, heads):
        """Fit the components and the Gaussian to the training slices.

        Args: images, float32 (N, H, W, 1) in [0, 1]; labels, int (N,), -1 where not known; heads, int (N,), the same
            for slices of one head.
        """
        mean, axes = principal_components(images, self.num_scores)
        axes = axes / project(images, (mean, axes)).std(axis=0)
        self.pixel_mean.assign(mean)
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
        return project(np.asarray(images), (self.pixel_mean.numpy(), self.axes.numpy())).astype(np.float32)

    def draw(self, labels, seed, streams=None):
        """Scores of novel slices.

        Args: labels, int (N,), -1 where not known; seed, int; streams, int (N,): slices of one stream and seed are of
            the same head, whatever their labels; None for a head each.
        Returns: float32 (N, S); NaN where the label is not known.
        """
        labels = np.asarray(labels)
        streams = np.arange(len(labels)) if streams is None else np.asarray(streams)
        draws = tf.random.stateless_normal((int(streams.max()) + 1, self.MAX_HEADS), (seed, -1))
        heads = self.means + tf.tensordot(draws, tf.convert_to_tensor(self.factor), 1)  # (streams, L, S)
        scores = tf.gather_nd(heads, np.stack([streams, np.maximum(labels, 0)], axis=1))
        return tf.where(labels[:, None] < 0, np.float32("nan"), scores)


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

    Call arguments: see `PixelCNN`; `unknown` gives the values that stand for unknown conditions.
    Returns: (B, h, w, filters); zeros where there is no condition.
    """

    HIDDEN = {"labels": 0.1, "scores": 0.5, "below": 0.5}  # noqa: RUF012, shares of the training examples
    SCORE_NOISE = 0.1  # of the scores in training, so that none names a single training slice

    def __init__(
        self, grid, filters, num_embeddings, learned_position, num_labels, num_scores, num_changes, below, **kwargs
    ):
        super().__init__(**kwargs)
        self.grid, self.filters, self.learned_position, self.below = tuple(grid), filters, learned_position, below
        self.num_labels, self.num_scores, self.num_changes = num_labels, num_scores, num_changes
        if below:
            policy = {"dtype": self.dtype_policy}
            self.below_network = keras.Sequential(
                [
                    keras.Input(self.grid, dtype="int32"),
                    layers.Embedding(num_embeddings, 32, **policy),
                    layers.Conv2D(32, 3, padding="same", activation="relu", **policy),
                    layers.Conv2D(filters, 3, padding="same", **policy),
                ]
            )
        self.seeds = keras.random.SeedGenerator()

    def build(self, labels_shape, scores_shape, below_shape, changes_shape):
        known = int(self.num_scores > 0)  # a number that says whether the scores are known
        numbers = self.learned_position + self.num_labels + self.num_scores + known + self.num_changes
        self.maps = self.add_weight(name="maps", shape=(numbers, *self.grid, self.filters), initializer="zeros")

    def unknown(self, count):
        """The conditions of `count` slices of which nothing is known."""
        return {
            "labels": tf.fill((count,), -1),
            "scores": tf.fill((count, self.num_scores), np.float32("nan")),
            "below": tf.fill((count, *self.grid), -1),
            "changes": tf.zeros((count, self.num_changes)),
        }

    def call(self, labels, scores, below, changes, training=False):
        count, dtype = tf.shape(labels)[0], self.compute_dtype
        conditions, unknown = {"labels": labels, "scores": scores, "below": below}, self.unknown(count)

        def seen(name):
            if not training:
                return conditions[name]
            shape = [count] + [1] * (len(conditions[name].shape) - 1)
            hidden = keras.random.uniform(shape, dtype="float32", seed=self.seeds) < self.HIDDEN[name]
            return tf.where(hidden, tf.cast(unknown[name], conditions[name].dtype), conditions[name])

        numbers = [tf.ones((count, int(self.learned_position)), dtype)]
        if self.num_labels:
            numbers.append(tf.one_hot(seen("labels"), self.num_labels, dtype=dtype))  # zeros for -1
        if self.num_scores:
            scores = seen("scores")
            if training:
                noise = keras.random.normal(tf.shape(scores), dtype="float32", seed=self.seeds)
                scores += tf.cast(self.SCORE_NOISE * noise, scores.dtype)
            known = tf.math.is_finite(scores)
            scores = tf.where(known, scores, tf.zeros_like(scores))
            numbers += [tf.cast(scores, dtype), tf.cast(known[:, :1], dtype)]
        if self.num_changes:
            numbers.append(tf.cast(changes, dtype))
        added = tf.tensordot(tf.concat(numbers, axis=1), tf.cast(self.maps, dtype), 1)
        if self.below:
            codes = seen("below")
            features = self.below_network(tf.maximum(codes, 0))
            added += tf.where(codes[..., None] < 0, tf.zeros_like(features), features)
        return added


# ---- PixelCNN ------------------------------------------------------------------------

CONTEXT_EVERY = 5  # residual blocks
STREAMS = 512  # sampled at once, with noise of one seed a position


def labels_of(slice_numbers, of_labels):
    """Index of each slice number in `of_labels`, which ascend: int32 (N,); -1 where it is not among them."""
    labels = np.searchsorted(of_labels, slice_numbers)
    return np.where(np.isin(slice_numbers, of_labels), labels, -1).astype(np.int32)


@register
class PixelCNN(SavesItsArguments, keras.Model):
    """Autoregressive prior over a grid of codes: p(codes) = prod p(code | earlier codes) [2, equation 1].

    A masked 7x7 convolution of type A, residual blocks, two ReLU-1x1 layers, and K logits. Every factor can be
    conditioned on what is known of the slice beside its codes, see `Conditioning`.

    `fit` takes what `call` takes, and minimises the mean of -ln p of a code, in nats.

    Args:
        num_embeddings: K.
        grid: (h, w).
        filters: channels between the residual blocks.
        residual_blocks: 15 in [2, table 1].
        dropout, zero_init: see `ResidualBlock`.
        context_filters: channels of a `RowContext` before every fifth residual block; 0 for none.
        learned_position: add a learned vector for each position.
        num_labels, num_scores, num_changes, below: of the conditions; 0 or False for one that is never known.
        slice_numbers: the number in the file names that each label stands for, ascending; None: the label itself.
        image_size: of the slices that have the scores, in pixels.

    Call arguments: codes, int32 (B, h, w) in [0, K), or a dictionary of them and, where known, of the conditions:
        labels: int32 (B,) in [0, num_labels), which slice of a head it is; -1 where not known.
        scores: float32 (B, num_scores), see `HeadScores`; NaN where not known.
        below: int32 (B, h, w) in [0, K), the codes of the slice below in the same head; -1 where not known.
        changes: float32 (B, num_changes), the augmentation [6]; zeros for a slice as it is.
    Returns: logits, float32 (B, h, w, K); those at a position depend on earlier codes and on the conditions.
    """

    @keras_defaults()
    def __init__(
        self,
        num_embeddings,
        grid,
        filters=128,
        residual_blocks=15,
        dropout=0.0,
        zero_init=True,
        context_filters=0,
        learned_position=True,
        num_labels=0,
        num_scores=0,
        num_changes=0,
        below=False,
        slice_numbers=None,
        image_size=64,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_embeddings, self.grid, self.filters = num_embeddings, tuple(grid), filters
        self.residual_blocks, self.dropout, self.zero_init = residual_blocks, dropout, zero_init
        self.context_filters, self.learned_position = context_filters, learned_position
        self.num_labels, self.num_scores, self.num_changes, self.below = num_labels, num_scores, num_changes, below
        self.slice_numbers = list(range(num_labels)) if slice_numbers is None else list(map(int, slice_numbers))
        self.image_size = image_size
        self.first = MaskedCodeConv2D(num_embeddings, filters, 7)
        self.blocks = [ResidualBlock(filters, dropout, zero_init) for _ in range(residual_blocks)]
        contexts = len(self.blocks[::CONTEXT_EVERY]) if context_filters else 0
        self.contexts = [RowContext(context_filters, dropout) for _ in range(contexts)]
        self.head = [
            layers.Dense(filters, activation="relu"),
            layers.Dense(filters, activation="relu"),
            layers.Dense(num_embeddings, name="logits"),
        ]
        self.conditioning = Conditioning(
            grid, filters, num_embeddings, learned_position, num_labels, num_scores, num_changes, below
        )
        if num_scores:
            self.head_scores = HeadScores(num_labels, num_scores, image_size**2)
        self(np.zeros((1, *self.grid), np.int32))  # builds the layers

    def call(self, inputs, training=False):
        codes, conditions = self.split(inputs)
        x = self.first(codes) + self.conditioning(**conditions, training=training)  # (B, h, w, C)
        for i, block in enumerate(self.blocks):
            if self.contexts and i % CONTEXT_EVERY == 0:
                x = self.contexts[i // CONTEXT_EVERY](x, training=training)
            x = block(x, training=training)
        return self.logits(x)

    def logits(self, x):
        """Features (..., C) -> logits (..., K)."""
        x = tf.nn.relu(x)
        for layer in self.head:
            x = layer(x)
        return x

    def split(self, inputs):
        """Codes, or a dictionary of codes and some conditions -> the codes, and every condition."""
        conditions = dict(inputs) if isinstance(inputs, dict) else {"codes": inputs}
        codes = tf.convert_to_tensor(conditions.pop("codes"))
        if tf.executing_eagerly():
            self.check(len(codes), codes=codes, **conditions)
        return codes, self.conditioning.unknown(tf.shape(codes)[0]) | conditions

    def check(self, count, **inputs):
        """Raise a ValueError where an input has a wrong name or shape, or a code or label that the model has not."""
        conditions = {"labels": (), "scores": (self.num_scores,), "below": self.grid, "changes": (self.num_changes,)}
        shapes = {"codes": self.grid, "known": self.grid, **conditions}
        ranges = dict.fromkeys(("known", "below"), (-1, self.num_embeddings - 1))
        ranges |= {"codes": (0, self.num_embeddings - 1), "labels": (-1, self.num_labels - 1)}
        for name, values in inputs.items():
            if name not in shapes:
                raise ValueError(f"the conditions are {', '.join(conditions)}, not {name}")
            if tuple(np.shape(values)) != (count, *shapes[name]):
                raise ValueError(f"{name} must have shape {(count, *shapes[name])}, got {tuple(np.shape(values))}")
            if name in ranges and count:
                (low, high), lowest, highest = ranges[name], np.min(values), np.max(values)
                if not low <= lowest <= highest <= high:
                    raise ValueError(f"{name} must be from {low} to {high}, got {lowest} to {highest}")

    def labels_of(self, slice_numbers):
        """Labels of the slice numbers of files: int (N,) -> int32 (N,); -1 for a number that the model has not."""
        return labels_of(slice_numbers, self.slice_numbers)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean negative log-likelihood of the codes in x under the logits y_pred, nats a code."""
        codes = x["codes"] if isinstance(x, dict) else x
        return -tf.reduce_mean(tfp.distributions.Categorical(logits=y_pred).log_prob(codes))

    def nll(self, codes, verbose=0, **conditions):
        """-ln p of every code given the earlier ones and the conditions, see the class: float32 (B, h, w), nats."""
        codes, conditions = self.split({"codes": codes, **conditions})
        return in_batches(self.nll_batch, {"codes": codes, **conditions}, verbose)

    @tf.function(reduce_retracing=True)
    def nll_batch(self, inputs):
        return -tfp.distributions.Categorical(logits=self(inputs)).log_prob(inputs["codes"])

    def draw_scores(self, labels, seed, streams=None):
        """Scores of novel slices, see `HeadScores.draw`."""
        return self.head_scores.draw(labels, seed, streams)

    def sample(self, num_samples, seed, temperature=1.0, known=None, streams=None, verbose=0, **conditions):
        """Draw codes position by position, in raster order.

        Args:
            num_samples: N.
            seed: int.
            temperature: divides the logits: 1 samples the model, less is more typical.
            known: int32 (N, h, w) of codes to keep, -1 where one is to be drawn; None draws all.
            streams: int (N,), pictures of the same stream and seed have the same random numbers, whatever N is;
                None numbers them from 0.
            verbose: see `in_batches`.
            conditions: see the class. With labels and without scores, scores are drawn first.

        Returns: int32 (N, h, w) in [0, K).
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        known = np.full((num_samples, *self.grid), -1, np.int32) if known is None else known
        streams = np.arange(num_samples) if streams is None else np.asarray(streams)
        self.check(num_samples, known=known, **conditions)
        if self.num_scores and "labels" in conditions and "scores" not in conditions:
            conditions["scores"] = self.draw_scores(conditions["labels"], seed, streams)

        def draw_batch(batch):
            known, (blocks, places) = batch.pop("known"), np.divmod(batch.pop("streams"), STREAMS)
            condition_map, codes = self.conditioning(**batch), np.empty(known.shape, np.int32)
            for block in np.unique(blocks):  # one, where streams are numbered from 0
                here, of_block = blocks == block, np.array([seed, block], np.int32)
                codes[here] = self.draw(condition_map[here], known[here], places[here], of_block, temperature)
            return codes

        inputs = self.conditioning.unknown(num_samples) | conditions
        inputs |= {"known": known, "streams": streams.astype(np.int32)}
        return in_batches(draw_batch, inputs, verbose, STREAMS)

    # The sampler. What it draws is what this draws:
    #
    #     for each position in raster order:
    #         logits = pixelcnn({"codes": codes, **conditions})[position] / temperature
    #         codes[position] = the known code, or else a draw from Categorical(logits)
    #
    # But of the network only what is new is computed [5]: the column of features at this position. What the masked
    # convolutions see of earlier positions is read from a cache, and the row contexts have running sums. Of a block it
    # needs `masked`, its one 3x3 convolution of type B, and `step`.

    @tf.function(  # a batch of 1 that is known to be 1 would give the loop's variables shapes that change
        input_signature=[tf.TensorSpec((None, None, None, None))]
        + [tf.TensorSpec(shape, tf.int32) for shape in ((None, None, None), (None,), (2,))]
        + [tf.TensorSpec(())]
    )
    def draw(self, condition_map, known, streams, seed, temperature):
        """`sample` of one block of streams, as one graph.

        Args: the map of `conditioning`; codes to keep; streams in [0, STREAMS); the seed, and the number of the block;
            the temperature.
        """
        count, (height, width), r = tf.shape(known)[0], self.grid, self.first.kernel_size // 2
        codes = tf.fill((height + r, width + 2 * r, count), self.num_embeddings)  # padded as in the first layer
        rows = tf.reshape(self.first.padded_kernel(), (-1, self.filters))
        # The inputs of the masked 3x3 convolutions, (blocks, N, C / 2) a position, in this row and the one above,
        # which take turns. Both ends of a row stay zeros.
        zeros = tf.zeros((2 * (width + 2), len(self.blocks), count, self.blocks[0].masked.kernel.shape[1]))
        cache = tf.TensorArray(tf.float32, 2 * (width + 2), clear_after_read=False).unstack(zeros)
        kernels = [tf.stack([block.masked.kernel[tap] for block in self.blocks]) for tap in range(4)]
        biases = tf.stack([tf.convert_to_tensor(block.masked.bias) for block in self.blocks])[:, None]
        sums = tf.zeros((len(self.contexts), height, count, self.context_filters))  # of the contexts, for each row

        for position in tf.range(height * width):
            row, column = position // width, position % width
            this, above = (row % 2) * (width + 2) + column, ((row + 1) % 2) * (width + 2) + column
            visible = tf.reshape(codes[row : row + r + 1, column : column + 2 * r + 1], (-1, count))
            x = self.first.step(rows, visible[: self.first.taps]) + condition_map[:, row, column]
            neighbours = [cache.read(place) for place in (above, above + 1, above + 2, this)]
            earlier = biases + tf.add_n([tf.matmul(seen, kernel) for seen, kernel in zip(neighbours, kernels)])
            inputs, to_sums = [], []
            for i, (block, from_earlier) in enumerate(zip(self.blocks, tf.unstack(earlier))):
                if self.contexts and i % CONTEXT_EVERY == 0:
                    context = len(to_sums)
                    x, added = self.contexts[context].step(x, sums[context, row], row, column)
                    to_sums.append(added)
                x, current = block.step(x, from_earlier)
                inputs.append(current)
            if self.contexts:
                sums += tf.stack(to_sums)
            cache = cache.write(this + 1, tf.stack(inputs))

            logits = self.logits(x) / temperature + self.gumbel_noise(streams, seed, position)
            drawn = tf.argmax(logits, axis=-1, output_type=tf.int32)
            chosen = tf.where(known[:, row, column] >= 0, known[:, row, column], drawn)
            codes = tf.tensor_scatter_nd_update(codes, [[row + r, column + r]], [chosen])

        return tf.transpose(codes[r:, r : r + width], (2, 0, 1))

    def gumbel_noise(self, streams, seed, position):
        """Noise (N, K): the largest of logits + noise is a draw from Categorical(logits).

        Unlike the noise of Categorical.sample, that of a stream does not depend on N. Args: see `draw`.
        """
        shape, tiny = (tf.reduce_max(streams) + 1, self.num_embeddings), np.finfo(np.float32).tiny  # no ln 0
        place = seed[1] * self.grid[0] * self.grid[1] + position
        uniform = tf.random.stateless_uniform(shape, tf.stack([seed[0], place]), minval=tiny)
        return tfp.distributions.Gumbel(0.0, 1.0).quantile(tf.gather(uniform, streams))


# ---- Anomalies -----------------------------------------------------------------------


class AnomalyDetector:
    """How unexpected each code and each pixel of a slice is, given the two networks of a run.

    Three terms are strong on different changes; each is smoothed by a Gaussian:
        surprise: -ln p of the codes given the slice's own scores [8]. Sees grey values in the wrong place, is blind to
            what no code expresses.
        residual: of the reconstruction. Sees texture that no code expresses, and little else.
        level: z-score of the pixels among the training slices of the same label.

    To be combined they need one unit: of each the map takes -ln p, p being the share of the validation slices'
    pixels in which the term is higher, and of these the root of the sum of squares. It ranks pixels, and is no
    probability. Nothing in it is tuned to a run.

    Args:
        vqvae, pixelcnn: the models.
        train, validate: pairs of images, float32 (N, H, W, 1) in [0, 1], and labels, int32 (N,), -1 where not known.
        mirror: whether the prior was fitted on mirrored slices; then surprise is the mean of both raster orders.
        verbose: see `in_batches`.
    """

    SMOOTHING = 1 / 32  # of the side, standard deviation
    SPREAD_FLOOR = 0.1  # least standard deviation of a z-score, in [0, 1] of the pixels: registration is no better
    PERCENTILES = np.array([*range(100), 99.8])  # of a term; above the last its distribution is taken for exponential
    SCORED = 0.01  # the score of a slice is the mean of this share of its pixels, the highest of the map
    REDRAWN = 90  # percentile of the validation slices' nats above which a restoration draws a code anew
    RESTORATIONS = 8

    def __init__(self, vqvae, pixelcnn, train, validate, mirror, verbose=0):
        self.vqvae, self.pixelcnn, self.mirror = vqvae, pixelcnn, mirror
        images, labels = train
        levels = [images[labels == label] for label in range(pixelcnn.num_labels)]
        levels = [level if len(level) else images for level in levels] + [images]  # the last is for -1
        self.mean = np.stack([level.mean(axis=0) for level in levels])
        self.spread = np.maximum([level.std(axis=0) for level in levels], self.SPREAD_FLOOR)

        validate = dict(zip(("images", "labels"), validate))
        normal = in_batches(lambda batch: self.measure(**batch), validate, verbose)
        self.redraw_above = np.percentile(normal["nats"], self.REDRAWN)
        self.tails = {name: self.tail(normal[name].numpy()) for name in ("surprise", "residual", "level")}
        self.normal_scores = np.sort(self.score(self.combine(normal)))

    def nats(self, images, codes, labels):
        """-ln p of the codes, given the labels and the slices' own scores: (N, h, w)."""
        conditions = {"labels": labels}
        if self.pixelcnn.num_scores:
            conditions["scores"] = self.pixelcnn.head_scores.of(images)
        return self.pixelcnn.nll(codes, **conditions).numpy()

    def measure(self, images, labels):
        """The labels, see `likeliest`; codes and their nats (N, h, w); and the terms of the map (N, H, W), by name."""
        images = np.asarray(images)
        codes = self.vqvae.encode(images)
        labels = self.likeliest(images, codes, labels)
        nats = self.nats(images, codes, labels)
        orders = [nats]
        if self.mirror:  # what comes last in one raster order comes first in the other
            mirrored = images[:, ::-1]
            orders.append(self.nats(mirrored, self.vqvae.encode(mirrored), labels)[:, ::-1])
        terms = {
            "surprise": tf.image.resize(np.mean(orders, axis=0)[..., None], images.shape[1:3]).numpy(),
            "residual": np.abs(images - self.vqvae.decode(codes)),
            "level": np.abs(images - self.mean[labels]) / self.spread[labels],
        }
        blur = self.SMOOTHING * images.shape[1]
        terms = {name: ndimage.gaussian_filter(term[..., 0], blur, axes=(1, 2)) for name, term in terms.items()}
        return {"labels": labels, "codes": codes, "nats": nats, **terms}

    def tail(self, values):
        """PERCENTILES of a term of the validation slices, and the mean excess over the last of those above it."""
        percentiles = np.percentile(values, self.PERCENTILES)
        beyond = values[values > percentiles[-1]] - percentiles[-1]
        return percentiles, max(beyond.mean() if len(beyond) else 0.0, 1e-6)

    def combine(self, terms):
        """Root of the sum of the squared -ln p of the terms: {name: (N, H, W)} -> (N, H, W), at least 0."""
        squares = 0
        for name, (percentiles, excess) in self.tails.items():
            body = np.interp(terms[name], percentiles, -np.log(1 - self.PERCENTILES / 100))
            squares += np.square(body + np.maximum(terms[name] - percentiles[-1], 0) / excess)
        return np.sqrt(squares).astype(np.float32)

    def score(self, maps):
        """Mean of the highest pixels of each map: (N, H, W) -> (N,)."""
        highest = max(1, round(self.SCORED * maps[0].size))
        return np.sort(maps.reshape(len(maps), -1), axis=1)[:, -highest:].mean(axis=1)

    def likeliest(self, images, codes, labels):
        """The labels, an unknown one replaced by that under which the codes are most probable: int32 (N,)."""
        labels, unknown = np.array(labels, np.int32), np.flatnonzero(np.asarray(labels) < 0)
        if len(unknown) and self.pixelcnn.num_labels:
            images, codes = images[unknown], codes.numpy()[unknown]
            candidates = [np.full(len(unknown), label) for label in range(self.pixelcnn.num_labels)]
            nats = [self.nats(images, codes, candidate).mean(axis=(1, 2)) for candidate in candidates]
            labels[unknown] = np.argmin(nats, axis=0)
        return labels

    def restore(self, codes, labels, nats, seed):
        """Mean of RESTORATIONS of each slice, in which codes that surprise are drawn anew [8]: (N, H, W)."""
        known = np.where(nats > self.redraw_above, -1, codes)
        known, labels = (np.repeat(values, self.RESTORATIONS, axis=0) for values in (known, labels))
        streams = np.tile(np.arange(self.RESTORATIONS), len(codes))
        # Without scores: those of a changed slice would bring the change back.
        scores = np.full((len(known), self.pixelcnn.num_scores), np.nan, np.float32)
        drawn = self.pixelcnn.sample(len(known), seed, known=known, streams=streams, labels=labels, scores=scores)
        restored = self.vqvae.decode(drawn).numpy()[..., 0]
        return restored.reshape(len(codes), self.RESTORATIONS, *restored.shape[1:]).mean(axis=1)

    def examine(self, images, labels, seed, verbose=0):
        """The maps of slices.

        Args: images, float32 (N, H, W, 1) in [0, 1]; labels, int32 (N,), -1 where not known; seed of the
            restorations, which are for the eye and not in the map; verbose, see `in_batches`.
        Returns: {"labels": int32 (N,), the likeliest where not known, "surprise": nats of the codes in raster order
            (N, h, w), "restored": (N, H, W), "anomaly_map": (N, H, W), "score": (N,), "percentile": (N,), of the
            validation slices that score lower}.
        """

        def examine_batch(batch):
            found = self.measure(**batch)
            maps = self.combine(found)
            score = self.score(maps)
            return {
                "labels": found["labels"],
                "surprise": found["nats"],
                "restored": self.restore(found["codes"], found["labels"], found["nats"], seed),
                "anomaly_map": maps,
                "score": score,
                "percentile": 100 * np.searchsorted(self.normal_scores, score) / len(self.normal_scores),
            }

        found = in_batches(examine_batch, {"images": images, "labels": labels}, verbose, 256 // self.RESTORATIONS)
        return {name: values.numpy() for name, values in found.items()}
