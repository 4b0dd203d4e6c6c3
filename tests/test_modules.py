"""Properties of the two networks, each against a plain second computation or with a control that fails."""

import dataclasses
import itertools

import modules

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp

# All conditions of a prior; and a prior without any.
CONDITIONS = {"slice_numbers": range(3), "num_scores": 2, "num_changes": 2, "below": True, "num_pixels": 16}
PLAIN = {"context_filters": 0, "learned_position": False}


def randomise(layer, seed=0):
    """Give a value to weights that start at zero too: a bug must not hide behind a zero."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.2, weight.shape))
    return layer


def make_prior(grid, filters=8, residual_blocks=6, context_filters=4, num_embeddings=6, **conditions):
    """With row contexts before two of its blocks."""
    keras.utils.set_random_seed(0)
    contexts = [modules.RowContext(context_filters) for _ in range(2)] if context_filters else ()
    network = modules.PixelCNN(num_embeddings, grid, filters, residual_blocks, between=contexts)
    return randomise(modules.Prior(network, **conditions))


def random_codes(grid, count=3, seed=0):
    return np.random.default_rng(seed).integers(0, 6, (count, *grid)).astype("int32")


def tiny_vqvae(**options):
    keras.utils.set_random_seed(0)
    options = {"image_size": 16, "filters": (4, 8), "encoder_blocks": 1, "decoder_blocks": 1, **options}
    return modules.VQVAE(16, 4, **options)


def blobs(count=64, size=16, seed=0):
    """Smooth random images (N, size, size, 1) in [0, 1]."""
    coarse = np.random.default_rng(seed).random((count, 4, 4, 1))
    return tf.image.resize(coarse, (size, size)).numpy()


# ---- Vector quantizer ----------------------------------------------------------------


def make_quantizer(ema_decay=0.99, commitment_cost=1.0):
    quantizer = modules.VectorQuantizer(7, 3, commitment_cost, ema_decay)
    quantizer.build((None, None, None, 3))
    rng = np.random.default_rng(0)
    quantizer.codebook.assign(rng.normal(size=(7, 3)))
    return quantizer, tf.constant(rng.normal(size=(2, 4, 5, 3)), tf.float32)


def test_quantizer_takes_the_nearest_code():
    quantizer, latents = make_quantizer()
    codebook = quantizer.codebook.numpy()
    distances = np.square(latents.numpy()[..., None, :] - codebook).sum(axis=-1)
    nearest = distances.argmin(axis=-1)
    np.testing.assert_array_equal(quantizer.nearest(latents), nearest)
    np.testing.assert_allclose(quantizer(latents), codebook[nearest], atol=1e-6)
    assert (quantizer.nearest(latents).numpy() != distances.argmax(axis=-1)).all()


def test_gradients_pass_straight_through_and_the_losses_pull_the_latents_and_the_used_codes():
    quantizer, latents = make_quantizer(ema_decay=None, commitment_cost=0.25)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(latents)
        total = tf.reduce_sum(2.0 * quantizer(latents))
        loss = tf.add_n(quantizer.losses)
    np.testing.assert_allclose(tape.gradient(total, latents), np.full(latents.shape, 2.0))
    to_latents, to_codebook = tape.gradient(loss, [latents, quantizer.codebook.value])
    chosen = quantizer.codebook.numpy()[quantizer.nearest(latents)]
    np.testing.assert_allclose(to_latents, 0.25 * 2 * (latents - chosen) / latents.numpy().size, rtol=1e-5, atol=1e-7)
    moved = np.flatnonzero(np.abs(tf.convert_to_tensor(to_codebook)).sum(axis=1))
    np.testing.assert_array_equal(moved, np.unique(quantizer.nearest(latents)))


def test_moving_average_is_that_of_the_paper():
    """One step of [1, equations 6 to 8], by loops."""
    quantizer, latents = make_quantizer(ema_decay=0.9)
    codes = quantizer.nearest(latents).numpy()
    quantizer.ema_counts.assign(np.full(7, 5.0))
    quantizer.ema_sums.assign(5.0 * quantizer.codebook.numpy())
    counts, sums = quantizer.ema_counts.numpy(), quantizer.ema_sums.numpy()
    quantizer(latents)
    np.testing.assert_array_equal(quantizer.ema_counts, counts)  # only training moves it
    quantizer(latents, training=True)
    for code in range(7):
        chosen = latents.numpy()[codes == code]
        counts[code] = 0.9 * counts[code] + 0.1 * len(chosen)
        sums[code] = 0.9 * sums[code] + 0.1 * chosen.sum(axis=0)
    np.testing.assert_allclose(quantizer.codebook, sums / counts[:, None], rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "XLA"])
def test_dead_codes_come_back_as_latents_of_the_batch(compiled):
    quantizer, latents = make_quantizer()
    quantizer.ema_counts.assign([0, 0, 9, 9, 9, 9, 9])
    quantizer.ema_sums.assign(9 * quantizer.codebook.numpy())
    quantizer.codebook.assign(tf.concat([[[1e3] * 3, [-1e3] * 3], quantizer.codebook[2:]], axis=0))  # far from all
    tf.function(quantizer, jit_compile=compiled)(latents, training=True)
    distance = np.abs(latents.numpy().reshape(-1, 3) - quantizer.codebook.numpy()[:, None]).sum(axis=-1).min(axis=1)
    assert (distance[:2] < 1e-5).all()
    assert (distance[2:] > 1e-3).all()  # the living moved a little, but were not replaced


@pytest.mark.parametrize("ema_decay", [0.9, None])
def test_codebook_moves_in_fit_alone_and_the_moving_average_uses_all_of_it(ema_decay):
    """A codebook held as a bare tf.Variable never would move, and nothing complains."""
    model, images = tiny_vqvae(ema_decay=ema_decay, ssim_weight=0, data_variance=0.05), blobs(256)
    assert any(v is model.quantizer.codebook for v in model.trainable_variables) == (ema_decay is None)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    before = model.quantizer.codebook.numpy()
    model.evaluate(images[:32], verbose=0)
    np.testing.assert_array_equal(model.quantizer.codebook, before)
    model.fit(images, epochs=8, verbose=0)
    assert np.abs(model.quantizer.codebook.numpy() - before).max() > 1e-4
    used = len(np.unique(model.encode(images)))
    assert used == 16 if ema_decay else used < 16


def test_usage_is_that_of_all_batches_together():
    codes = np.random.default_rng(0).integers(0, 5, (4, 30))
    usage = modules.CodebookUsage(8)
    for batch in codes:
        usage.update_state(batch)
    share = np.bincount(codes.ravel(), minlength=8) / codes.size
    result = usage.result()
    np.testing.assert_allclose(result["perplexity"], np.exp(-sum(p * np.log(p) for p in share if p)), rtol=1e-5)
    assert result["codes_used"] == 5
    usage.reset_state()
    assert usage.result()["codes_used"] == 0


# ---- VQ-VAE --------------------------------------------------------------------------


def test_decode_of_encode_is_the_call_clipped_however_many_there_are():
    model, images = tiny_vqvae(), blobs(300)  # more than one batch of `in_batches`
    codes = model.encode(images)
    assert codes.shape == (300, 4, 4) and codes.dtype == tf.int32
    np.testing.assert_allclose(model.decode(codes), np.clip(model(images), 0, 1), atol=1e-5)


def test_ssim_and_its_gradient_are_those_of_tensorflow():
    images, others = tf.constant(blobs(5, 24)), tf.constant(blobs(5, 24, seed=1))
    ours = tfp.math.value_and_gradient(lambda x: modules.ssim(images, x), others)
    theirs = tfp.math.value_and_gradient(lambda x: tf.image.ssim(images, x, 1.0), others)
    for found, expected in zip(ours, theirs):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(ours[0]) > 0.01 and np.abs(ours[1]).max() > 1e-3


def test_loss_has_the_terms_it_says():
    model, images = tiny_vqvae(ssim_weight=0.5, data_variance=0.1, commitment_cost=2.0), blobs(4)
    model.compile(run_eagerly=True)
    logs = model.evaluate(images, verbose=0, return_dict=True)
    output = np.array(model(images))
    latents = np.array(model.encoder(images))
    quantized = np.array(model.quantizer.lookup(model.encode(images)))
    expected = np.square(images - output).mean() / 0.1 + 2.0 * np.square(latents - quantized).mean()
    expected += 0.5 * (1 - tf.image.ssim(images, output, 1.0).numpy().mean())
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


# ---- Masked convolutions -------------------------------------------------------------


MASKED = {  # a layer, and how many entries of its kernel are not masked: the first ones
    "A": (lambda: modules.MaskedConv2D(4, 3, "A"), 4),
    "B": (lambda: modules.MaskedConv2D(4, 3, "B"), 5),
    "lookup": (lambda: modules.MaskedCodeConv2D(6, 4, 7), 24),
}


@pytest.mark.parametrize("kind", MASKED)
def test_masked_convolution_is_the_plain_one_with_a_masked_kernel(kind, grid=(4, 6)):
    """Of one-hot codes where it is a look-up. Gradients too."""
    (make, taps), codes = MASKED[kind], random_codes(grid)
    x = tf.one_hot(codes, 6) if kind == "lookup" else tf.random.stateless_normal((3, *grid, 6), (0, 0))
    layer, seen = make(), codes if kind == "lookup" else x
    layer(seen)
    randomise(layer)
    k = layer.kernel_size
    kernel = tf.pad(layer.kernel, [[0, k * k - taps], [0, 0], [0, 0]])
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, kernel])
        ours = layer(seen)
        plain = tf.nn.conv2d(x, tf.reshape(kernel, (k, k, 6, 4)), 1, "SAME") + layer.bias
        our_loss, plain_loss = tf.reduce_sum(tf.sin(ours)), tf.reduce_sum(tf.sin(plain))
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    our_gradient = tf.convert_to_tensor(tape.gradient(our_loss, layer.kernel.value))
    np.testing.assert_allclose(our_gradient, tape.gradient(plain_loss, kernel)[:taps], atol=1e-4)
    if kind != "lookup":
        np.testing.assert_allclose(tape.gradient(our_loss, x), tape.gradient(plain_loss, x), atol=1e-5)


# ---- PixelCNN: what its logits depend on ---------------------------------------------


def influence(function, grid):
    """Whether the code p changes the output q, both in raster order, in any of eight examples: bool (h w, h w)."""
    size = np.prod(grid)
    codes = random_codes(grid, 8).reshape(8, 1, size)
    nudged = np.where(np.eye(size, dtype=bool), (codes + 1) % 6, codes)
    before = np.array(function(codes.reshape(-1, *grid))).reshape(8, 1, size, -1)
    after = np.array(function(nudged.reshape(-1, *grid))).reshape(8, size, size, -1)
    return (np.abs(after - before) > 1e-5).any(axis=(0, 3))


def expected_influence(grid, contexts):
    """The same by the masks.

    Of the rows above, the convolutions see one column a row further to the right, and two more by the first layer.
    A context sees the features of whole rows, of which none has seen the code at its own position.
    """
    row, column, at_row, at_column = np.indices((*grid, *grid))
    above = at_row - row
    by_convolutions = np.where(above == 0, column < at_column, (above > 0) & (column <= at_column + above + 2))
    by_contexts = contexts & (row * grid[1] + column < at_row * grid[1] - 1)
    return (by_convolutions | by_contexts).reshape((np.prod(grid),) * 2)


@pytest.mark.parametrize("contexts", [True, False])
def test_logits_depend_on_earlier_codes_alone_and_on_all_but_the_blind_spot(contexts, grid=(4, 9)):
    model = make_prior(grid, filters=16, context_filters=4 * contexts, **CONDITIONS)

    def logits(codes):
        conditions = {name: np.repeat(values[1:2], len(codes), axis=0) for name, values in all_conditions(grid).items()}
        return model({"codes": codes, **conditions})

    expected = expected_influence(grid, contexts)
    assert not np.tril(expected).any()
    np.testing.assert_array_equal(influence(logits, grid), expected)


def test_control_a_mask_of_type_b_first_leaks_and_so_does_a_context_of_its_own_row():
    layer = modules.MaskedConv2D(4, 7, "B")
    layer.build((None, 4, 6, 6))
    assert influence(lambda codes: layer(tf.one_hot(codes, 6)), (4, 6)).diagonal().all()
    model = make_prior((4, 6))
    for context in model.network.between:
        context.is_above = np.repeat(np.tri(4, dtype="float32"), 6, axis=1)[..., None]
    assert np.tril(influence(model, (4, 6)), -1).any()


LABELS = np.array([-1, 2, 0, 1, -1, 2, 2, 0, 1], "int32")


def all_conditions(grid):
    """Conditions of nine slices: of the first none is known, of the second all are, of others some."""
    rng = np.random.default_rng(1)
    scores, changes = rng.normal(size=(9, 2)).astype("float32"), rng.uniform(-1, 1, (9, 2)).astype("float32")
    below = random_codes(grid, 9, seed=2)
    scores[[0, 4, 7]], below[[0, 3]], changes[[0, 5]] = np.nan, -1, 0
    return {"labels": LABELS, "scores": scores, "below": below, "changes": changes}


@pytest.fixture(scope="module")
def model():
    """A prior with all conditions, and scores of ten made-up heads. Not to be changed by a test."""
    model = make_prior((4, 6), filters=16, **CONDITIONS)
    model.head_scores.fit_gaussian(np.random.default_rng(0).normal(size=(10, 3, 2)))
    return model


@pytest.mark.parametrize("name", ["labels", "scores", "below", "changes"])
def test_a_condition_reaches_every_position_and_an_unknown_one_is_none(name, model):
    codes, conditions = random_codes((4, 6), 9), all_conditions((4, 6))
    logits = np.array(model({"codes": codes, **conditions}))
    unknown = {"labels": -1, "scores": np.nan, "below": -1, "changes": 0}[name]
    known = ~np.isclose(conditions[name].reshape(9, -1)[:, 0], unknown, equal_nan=True)
    assert 0 < known.sum() < 9
    del conditions[name]
    difference = np.abs(logits - model({"codes": codes, **conditions})).max(axis=-1)
    assert (difference[known] > 1e-4).all()
    assert (difference[~known] == 0).all()


def test_without_conditions_the_prior_is_the_network_and_a_map_is_added_after_its_first_layer():
    prior, codes = make_prior((4, 6), **PLAIN), random_codes((4, 6))
    network, x = prior.network, prior.network.first(codes)
    condition_map = tf.random.stateless_normal(x.shape, (0, 0))

    def after_the_first(x):
        for block in network.trunk:
            x = block(x)
        return network.logits(x)

    np.testing.assert_array_equal(prior(codes), after_the_first(x))
    np.testing.assert_array_equal(network(codes), after_the_first(x))
    np.testing.assert_array_equal(network(codes, condition_map), after_the_first(x + condition_map))


def test_a_label_is_the_place_of_a_slice_number_among_those_of_train():
    """Whatever they begin with, and one that is far away costs one label."""
    numbers = [100, 102, 103, 9999]
    model = make_prior((2, 2), residual_blocks=1, slice_numbers=numbers)
    labels = model.labels_of([103, 100, 9999, 101, -1, 0])
    assert labels.tolist() == [2, 0, 3, -1, -1, -1] and model.num_labels == 4
    assert model.numbers_of(labels).tolist() == [103, 100, 9999, -1, -1, -1]
    assert model.labels_of(np.array([], int)).shape == (0,) and model.labels_of([100]).dtype == np.int32
    assert model.conditioning.maps.shape[0] == 1 + 4


def nats_of(logits, codes):
    """-ln of the softmax at each code, in numpy."""
    logits = np.array(logits, "float64")
    log_sum = np.log(np.exp(logits).sum(axis=-1))
    return log_sum - np.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]


def test_nll_is_that_of_the_softmax_given_the_conditions(model):
    codes, conditions = random_codes((4, 6), 9), all_conditions((4, 6))
    nats = model.nll(codes, **conditions)
    assert nats.shape == (9, 4, 6) and nats.dtype == np.float32
    np.testing.assert_allclose(nats, nats_of(model({"codes": codes, **conditions}), codes), rtol=1e-4, atol=1e-5)
    difference = np.abs(model.nll(codes) - nats).max(axis=(1, 2))
    assert difference[0] == 0 and (difference[1:] > 1e-2).all()  # the first one has no condition


# ---- PixelCNN: sampling --------------------------------------------------------------


@pytest.mark.parametrize("given, known, temperature", [("all", 0, 1.0), ("all", 1 / 3, 0.7), ("none", 1 / 3, 1.0)])
def test_the_cached_sampler_draws_what_the_naive_loop_draws(given, known, temperature, model):
    """Of the codes a share is known; some pictures share the random numbers of others; without conditions, a square."""
    grid = (4, 6) if given == "all" else (5, 5)
    known = np.where(np.random.default_rng(1).random((9, *grid)) < known, random_codes(grid, 9), -1).astype("int32")
    model, conditions = (model, all_conditions(grid)) if given == "all" else (make_prior(grid, **PLAIN), {})

    def draw(cached, seed=11, temperature=temperature):
        return model.sample(9, seed, temperature, known=known, cached=cached, **conditions)

    naive = draw(False)
    np.testing.assert_array_equal(draw(True), naive)
    np.testing.assert_array_equal(naive[known >= 0], known[known >= 0])
    assert (draw(True, seed=12) != naive).mean() > 0.1 and (draw(True, temperature=temperature + 1) != naive).any()
    inputs, places = {**model.checked_conditions(9, 9, conditions), "known": known}, [5, 1, 0, 3, 4, 5, 9, 7, 2]
    shared = [np.array(model.draw(inputs, 11, temperature, places, cached=cached)) for cached in (True, False)]
    np.testing.assert_array_equal(*shared)
    np.testing.assert_array_equal(shared[0][[1, 3, 4, 7]], naive[[1, 3, 4, 7]])  # those at their own place


class Transformer(keras.Model):
    """Somebody's network: causal attention, with the call of a PixelCNN."""

    num_embeddings, grid, filters = 6, (4, 6), 8

    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(7, 8)
        self.attention = keras.layers.MultiHeadAttention(2, 4)
        self.logits = keras.layers.Dense(6)

    def call(self, codes, condition_map, training=False):
        earlier = tf.pad(tf.reshape(codes, (-1, 24))[:, :-1], [[0, 0], [1, 0]], constant_values=6)
        x = self.embedding(earlier) + tf.reshape(condition_map, (-1, 24, 8))
        return tf.reshape(self.logits(self.attention(x, x, use_causal_mask=True)), (-1, 4, 6, 6))


def test_a_prior_of_another_network_is_sampled_by_the_naive_loop():
    prior = randomise(modules.Prior(Transformer(), **CONDITIONS))
    conditions = all_conditions((4, 6))
    codes = prior.sample(9, seed=11, **conditions)
    assert not np.tril(influence(prior, (4, 6))).any()  # it is causal
    probabilities = np.exp(-prior.nll(codes, **conditions)).mean()
    assert probabilities > np.exp(-prior.nll(random_codes((4, 6), 9), **conditions)).mean()
    assert (prior.sample(9, seed=12, **conditions) != codes).any()


FORGETFUL = [
    (modules.RowContext, lambda layer, x, training=False: x + layer.bias),
    (modules.MaskedConv2D, lambda layer, x: tf.matmul(x, layer.kernel[-1]) + layer.bias),
]


@pytest.mark.parametrize("kind, call", FORGETFUL)
def test_control_a_network_that_forgets_earlier_positions_draws_other_codes(kind, call, model, monkeypatch):
    monkeypatch.setattr(kind, "call", call)
    cached, naive = (model.sample(9, 11, cached=cached, **all_conditions((4, 6))) for cached in (True, False))
    assert (cached != naive).any()


def test_draws_have_the_probabilities_of_the_logits():
    """Chi-square of how often each pair of first codes was drawn: 35 degrees of freedom, standard deviation 8."""
    model, count = make_prior((2, 2), residual_blocks=1, **PLAIN), 20_000
    model.network.last[-1].bias.assign(np.arange(6) / 3)  # far from uniform
    pairs = np.array(list(itertools.product(range(6), repeat=2)))
    logits = model(np.stack([pairs, pairs], axis=1))[:, 0]

    def surprise(drawn_at, expected_at):
        drawn = model.sample(count, 0, drawn_at)[:, 0]
        observed = np.bincount(drawn @ [6, 1], minlength=36)
        expected = count * np.exp(-nats_of(logits / expected_at, pairs).sum(axis=1))
        return np.sum((observed - expected) ** 2 / expected)

    for temperature in (1.0, 0.7):
        assert surprise(temperature, temperature) < 35 + 5 * 8
        assert surprise(temperature, temperature + 0.2) > 35 + 5 * 8


def test_a_picture_is_that_of_its_place_and_seed_however_many_there_are(model):
    conditions = all_conditions((4, 6))
    first = model.sample(9, seed=1, **conditions)
    for count in (1, 4):
        some = {name: values[:count] for name, values in conditions.items()}
        np.testing.assert_array_equal(model.sample(count, seed=1, **some), first[:count])
    assert (model.sample(9, seed=2, **conditions) != first).any(axis=(1, 2)).all()
    many = model.sample(600, seed=1)  # more than are drawn at once
    assert len({picture.tobytes() for picture in many}) == 600
    np.testing.assert_array_equal(model.sample(514, seed=1), many[:514])
    tracings = model.cached_sampler.draw.experimental_get_tracing_count()
    assert tracings == 1  # another N or seed does not trace the graph again


def draw_heads(table, count=20_000):
    """Scores of novel heads, (count, L, S), from the Gaussian of a table of heads."""
    scores = modules.HeadScores(*table.shape[1:], num_pixels=1)
    scores.fit_gaussian(table)
    return scores.draw_heads(count, seed=3)


@pytest.mark.parametrize("heads", [4, 40, 400])
def test_drawn_scores_have_the_mean_and_covariance_of_those_of_the_heads(heads):
    """Also between a slice and its neighbours: the three of a head share a part, and each has its own."""
    rng = np.random.default_rng(0)
    shared, own = rng.normal(size=(heads, 1, 2)), 0.5 * rng.normal(size=(heads, 3, 2))
    table = shared + own + np.arange(6).reshape(3, 2)
    drawn, covariance = draw_heads(table), np.cov(table.reshape(heads, 6), rowvar=False)
    np.testing.assert_allclose(drawn.mean(axis=0), table.mean(axis=0), atol=0.06)
    np.testing.assert_allclose(np.cov(drawn.reshape(-1, 6), rowvar=False), covariance, atol=0.08)
    assert np.abs(covariance[:2, 2:]).max() > 0.3


@pytest.mark.parametrize("share", [0.5, 4 / 32])
def test_missing_slices_do_not_narrow_the_drawn_scores(share):
    """At each label they have the variance of the slices that are there, and neighbours still belong together."""
    rng, labels = np.random.default_rng(0), np.arange(32)
    waves = rng.normal(size=(200, 2, 1, 2)) * np.stack([np.cos(labels / 16), np.sin(labels / 16)])[..., None]
    table = waves.sum(axis=1) + 5 * labels[:, None]  # (200, 32, 2)
    table[rng.random((200, 32)) > share] = np.nan
    table = table[np.isfinite(table[..., 0]).any(axis=1)]
    there = np.nanstd(table, axis=0, ddof=1)
    drawn = draw_heads(table, 4000)
    np.testing.assert_allclose(drawn.std(axis=0), there, rtol=0.1)
    neighbours = [np.corrcoef(drawn[:, label, 0], drawn[:, label + 1, 0])[0, 1] for label in range(31)]
    assert np.min(neighbours) > 0.7
    mean_instead = np.where(np.isnan(table), np.nanmean(table, axis=0), table)
    assert (mean_instead.std(axis=0) < 0.8 * there).all()  # control: a missing slice taken for the mean of its label


def test_scores_are_standardised_and_of_variation_beyond_rounding_alone():
    """Of black slices and of copies nothing is left that could be blown up to a standard deviation of 1."""
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1)).astype("float32") / 255
    images[10:] = 0
    scores = modules.HeadScores(4, 12, 64)
    scores.fit(images, np.arange(16) % 4, np.arange(16) // 4)
    of_images = scores.of(images)
    np.testing.assert_allclose(of_images[:, :10].std(axis=0, ddof=1), 1, rtol=1e-4)
    assert (of_images[:, 10:] == 0).all() and np.abs(of_images).max() < 5
    assert np.isfinite(scores.draw(np.arange(4), seed=0)).all()
    nearly = np.full((16, 8, 8, 1), 0.5, np.float32)
    nearly[0, 0, 0] += 1e-4
    scores.fit(nearly, np.arange(16) % 4, np.arange(16) // 4)
    assert (scores.axes.numpy() == 0).all()


@pytest.mark.parametrize("count", [12, 30])
def test_scores_are_those_of_the_singular_values(count):
    """Of fewer images than their 20 pixels, and of more."""
    images = np.random.default_rng(0).normal(size=(count, 4, 5, 1)).astype("float32") * np.arange(1, 6)[:, None]
    scores = modules.HeadScores(3, 3, 20)
    scores.fit(images, np.arange(count) % 3, np.arange(count) // 3)
    flat = images.reshape(count, 20) - images.reshape(count, 20).mean(axis=0)
    exact = np.linalg.svd(flat)[2][:3].T
    exact *= np.sign(exact[np.abs(exact).argmax(axis=0), range(3)])  # the same signs on every machine
    expected = flat @ exact / (flat @ exact).std(axis=0, ddof=1)
    np.testing.assert_allclose(scores.of(images), expected, atol=1e-3)


def test_drawn_scores_are_of_a_head_each_and_unknown_where_the_label_is(model):
    drawn = model.draw_scores([0, 1, 0, -1, 0], seed=5)
    np.testing.assert_array_equal(model.draw_scores([0, 2], seed=5)[0], drawn[0])
    assert np.isnan(drawn[3]).all() and np.isfinite(drawn[[0, 1, 2, 4]]).all()
    for other in (*drawn[[1, 2, 4]], model.draw_scores([0], seed=6)[0]):
        assert (other != drawn[0]).all()


def test_heads_are_drawn_from_the_lowest_slice_up_each_given_the_one_below(model):
    """A head does not depend on how many there are, and its slices share their scores."""
    heads = model.sample_heads(3, seed=4, temperature=0.8)
    np.testing.assert_array_equal(model.sample_heads(1, seed=4, temperature=0.8), heads[:1])
    scores, below = model.head_scores.draw_heads(3, seed=4), np.full((3, 4, 6), -1, "int32")
    for label in range(3):
        known = {"labels": np.full(3, label), "scores": scores[:, label], "below": below}
        below = model.sample(3, 4 + 65537 * label, 0.8, **known)
        np.testing.assert_array_equal(heads[:, label], below)
    assert heads.shape == (3, 3, 4, 6) and (model.sample_heads(1, seed=5)[0] != heads[0]).any()


def test_scores_are_drawn_where_labels_alone_are_given(model):
    drawn, samples = model.draw_scores(LABELS, 1), model.sample(9, 1, labels=LABELS)
    np.testing.assert_array_equal(model.sample(9, 1, labels=LABELS, scores=drawn), samples)
    unknown = model.sample(9, 1, labels=LABELS, scores=np.full((9, 2), np.nan, "float32"))
    assert (unknown != samples).any()
    np.testing.assert_array_equal(model.sample(9, 1, labels=LABELS, scores=model.unknown(9)["scores"]), unknown)


# ---- Training and files --------------------------------------------------------------


def test_a_residual_block_starts_as_what_passes_it_by():
    x = tf.random.stateless_normal((2, 4, 6, 8), (0, 0))
    np.testing.assert_array_equal(modules.ResidualBlock(8)(x), x)
    block = modules.ResidualBlock(8, dropout=0.3, zero_init=False)
    assert np.abs(block(x) - x).max() > 0.1
    assert block.drop.rate == 0.3 and isinstance(block.drop, keras.layers.SpatialDropout2D)  # of whole channels
    assert (block(x, training=True) != block(x)).numpy().any()


def condition_maps(model, count, training=False, **known):
    """What `Conditioning` makes of what is known of so many slices, a row each."""
    conditions = {**model.unknown(count), **known}
    return model.conditioning(**conditions, training=training).numpy().reshape(count, -1)


def test_labels_scores_and_slices_below_are_hidden_from_their_shares(monkeypatch):
    """Each by itself: of 4,000 slices with the same conditions, how many keep each of the eight subsets."""
    monkeypatch.setattr(modules.Conditioning, "SCORE_NOISE", 0.0)
    model, count = make_prior((2, 2), residual_blocks=1, **CONDITIONS), 4000
    conditions = {"labels": np.ones(1, "int32"), "scores": np.ones((1, 2), "float32"), "below": random_codes((2, 2), 1)}
    shares = {"labels": 0.1, "scores": 0.5, "below": 0.5}
    maps, expected = [], []
    for hidden in itertools.product([False, True], repeat=3):
        left = {name: conditions[name] for name, hide in zip(shares, hidden) if not hide}
        maps.append(condition_maps(model, 1, **left)[0])
        expected.append(np.prod([share if hide else 1 - share for share, hide in zip(shares.values(), hidden)]))
    conditions = {name: np.repeat(values, count, axis=0) for name, values in conditions.items()}

    def choices(training):
        """Which of `maps` each slice has."""
        distances = np.abs(condition_maps(model, count, training, **conditions)[:, None] - maps).max(axis=-1)
        assert (np.sort(distances, axis=1)[:, :2] < 1e-4).tolist() == [[True, False]] * count
        return distances.argmin(axis=1)

    first, expected = choices(True), np.array(expected)
    observed = np.bincount(first, minlength=8) / count
    assert (np.abs(observed - expected) < 4 * np.sqrt(expected * (1 - expected) / count)).all()
    assert (choices(True) != first).any()
    assert (choices(False) == 0).all()


def hide_nothing(model):
    """No condition is hidden from a training slice."""
    table = model.conditioning.table
    model.conditioning.table = {name: dataclasses.replace(table[name], hidden=0) for name in table}


def test_scores_are_blurred_in_training_alone():
    model = make_prior((2, 2), residual_blocks=1, slice_numbers=range(3), num_scores=2, num_pixels=1)
    hide_nothing(model)
    zeros = np.zeros((4000, 2), "float32")
    plain, blurred = (condition_maps(model, 4000, training, scores=zeros) for training in (False, True))
    of_scores = model.conditioning.maps.numpy()[4:6].reshape(2, -1)  # after a constant and three labels
    np.testing.assert_allclose(blurred.std(axis=0), 0.1 * np.linalg.norm(of_scores, axis=0), rtol=0.06)
    assert (plain == plain[0]).all()


def examples_of(name, count):
    """Examples of the models in MODELS: images; or codes, of which few differ from row to row, and all conditions."""
    if name == "VQ-VAE":
        return blobs(count)
    rng = np.random.default_rng(1)
    codes = np.where(rng.random((count, 4, 4)) < 0.7, np.arange(4), random_codes((4, 4), count)).astype("int32")
    numbers = {name: rng.normal(size=(count, 2)).astype("float32") for name in ("scores", "changes")}
    conditions = {"labels": codes[:, 0, 0] % 3, "below": codes[::-1], **numbers}
    return codes if name == "PixelCNN" else {"codes": codes, **conditions}


MODELS = {
    "VQ-VAE": lambda: tiny_vqvae(encoder_blocks=0),
    "PixelCNN": lambda: modules.PixelCNN(6, (4, 4), 8, 1),
    "prior": lambda: make_prior((4, 4), residual_blocks=2, **CONDITIONS),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_is_the_mean_over_slices(name):
    """And not over batches, of which the last one is small."""
    model, examples = MODELS[name](), examples_of(name, 5)
    randomise(model)
    model.compile(run_eagerly=True)

    def loss(first, last):
        part = tf.nest.map_structure(lambda array: array[first:last], examples)
        batches = tf.data.Dataset.from_tensor_slices(part).batch(4)
        return model.evaluate(batches, verbose=0, return_dict=True)["loss"]

    assert loss(0, 5) == pytest.approx(np.mean([loss(i, i + 1) for i in range(5)]), rel=1e-5)
    assert loss(0, 5) != pytest.approx(np.mean([loss(0, 4), loss(4, 5)]), rel=5e-5)


@pytest.mark.parametrize("name", MODELS)
def test_steps_compiled_by_xla_give_the_same_losses(name, monkeypatch):
    monkeypatch.setattr(modules.Conditioning, "SCORE_NOISE", 0.0)  # with XLA, random numbers are others
    losses = {}
    for compiled in (False, True):
        keras.utils.set_random_seed(0)
        model = MODELS[name]()
        if name == "prior":
            hide_nothing(model)
        model.compile(keras.optimizers.Adam(1e-2), run_eagerly=not compiled, jit_compile=compiled)
        data = tf.data.Dataset.from_tensor_slices(examples_of(name, 48)).batch(16)
        losses[compiled] = model.fit(data, epochs=3, verbose=0, shuffle=False).history["loss"]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-3)
    assert losses[False][-1] < 0.95 * losses[False][0]  # control: they learn, so that the losses move


def test_saved_models_reopen(tmp_path):
    """As they were; that a fresh process opens them too is seen by test_runs."""
    vqvae, conditions = tiny_vqvae(), all_conditions((4, 4))
    prior = make_prior((4, 4), num_embeddings=16, **CONDITIONS)
    prior.head_scores.fit(blobs(12, 4), np.arange(12) % 3, np.arange(12) // 3)
    vqvae(blobs(), training=True)  # moves the codebook

    def made_by(vqvae, prior):
        codes = prior.sample(9, seed=5, labels=conditions["labels"], below=conditions["below"])
        scores = prior.head_scores.of(blobs(9, 4)), prior.draw_scores([0, 2], seed=1)
        return codes, vqvae.decode(codes), prior({"codes": codes, **conditions}), *scores

    reopened = []
    for model in (vqvae, prior):
        model.save(tmp_path / "model.keras")
        reopened.append(keras.saving.load_model(tmp_path / "model.keras"))
    for ours, theirs in zip(made_by(vqvae, prior), made_by(*reopened)):
        np.testing.assert_array_equal(ours, theirs)
    # Exported as they are: images go in, or codes, which are integers.
    for model, inputs in zip(reopened, (blobs(3), random_codes((4, 4)))):
        model.export(tmp_path / "exported", verbose=False)
        exported = tf.saved_model.load(tmp_path / "exported")
        np.testing.assert_allclose(exported.serve(inputs), model(inputs), atol=1e-5)


# ---- As Keras's users use them -------------------------------------------------------


def test_a_frozen_codebook_stays_where_it_is():
    """Also inside a model of somebody's own, like the batch normalisation beside it."""
    model = keras.Sequential([keras.layers.BatchNormalization(), modules.VectorQuantizer(7, 3)])
    latents = np.random.default_rng(0).normal(size=(8, 4, 5, 3)).astype("float32")
    model(latents, training=True)
    state = [v for v in model.variables if "usage" not in v.path]

    def moved(trainable):
        before = [v.numpy() for v in state]
        model.trainable = trainable
        model(latents, training=True)
        return [(v.numpy() != old).any() for v, old in zip(state, before)]

    assert not any(moved(False)) and any(moved(True))


@pytest.mark.parametrize("name", MODELS)
def test_weights_weigh_examples_and_targets_are_refused(name):
    model, examples = randomise(MODELS[name]()), examples_of(name, 3)
    model.compile(run_eagerly=True)

    def error(weights=None, chosen=slice(3)):
        """The loss without that of the quantizer, which has no weights."""
        part = tf.nest.map_structure(lambda array: array[chosen], examples)
        logs = model.evaluate(part, sample_weight=weights, verbose=0, return_dict=True)
        return logs["loss"] - logs.get("quantizer_loss", 0)

    each = [error(chosen=slice(i, i + 1)) for i in range(3)]
    assert error(np.array([1.0, 0, 3])) == pytest.approx((each[0] + 3 * each[2]) / 4, rel=1e-4)
    assert error() == pytest.approx(np.mean(each), rel=1e-4) != pytest.approx((each[0] + 3 * each[2]) / 4, rel=1e-4)
    weights = np.array([0, 2.0, 1])
    logs = model.fit(examples, validation_data=(examples, None, weights), verbose=0).history
    assert logs["val_loss"][0] - logs.get("val_quantizer_loss", [0])[0] == pytest.approx(error(weights), rel=1e-4)
    with pytest.raises(ValueError, match="leave out the targets"):
        model.fit(examples, np.zeros(3), verbose=0)
    model.compile(loss="mse", run_eagerly=True)
    with pytest.raises(ValueError, match=r"leave out .* the loss of compile"):
        model.fit(examples, verbose=0)


def test_two_quantizers_of_a_model_have_a_perplexity_each():
    images = keras.Input((4, 4, 3))
    coarse, fine = modules.VectorQuantizer(2, 3, name="coarse"), modules.VectorQuantizer(8, 3, name="fine")
    model = keras.Model(images, coarse(images) + fine(images))
    model.compile(loss="mse", run_eagerly=True)
    logs = model.evaluate(*2 * [np.random.default_rng(0).normal(0, 0.1, (9, 4, 4, 3))], verbose=0, return_dict=True)
    assert logs["coarse_codes_used"] <= 2 < logs["fine_codes_used"] and "perplexity" not in logs


def test_the_bytes_of_an_image_are_its_floats_and_what_is_neither_is_refused():
    model, uint8 = tiny_vqvae(), np.rint(255 * blobs(9)).astype("uint8")
    codes = model.encode(uint8 / np.float32(255))
    np.testing.assert_array_equal(model.encode(uint8), codes)
    np.testing.assert_array_equal(model.encode(uint8[..., 0]), codes)
    model.compile(run_eagerly=True)
    losses = [model.evaluate(images, verbose=0) for images in (uint8, uint8[..., 0], uint8 / np.float32(255))]
    np.testing.assert_allclose(losses, np.repeat(losses[-1:], 3, axis=0), rtol=1e-5)
    for wrong, message in ((255 * blobs(2), "from 0 to 1"), (blobs(2) - 1, "from 0 to 1"), (blobs(2, 12), "shape")):
        for ask in (model.encode, model, lambda images: model.predict(images, verbose=0)):
            with pytest.raises(ValueError, match=f"images must .*{message}"):
                ask(wrong)
    for codes, message in ((np.full((1, 4, 4), 16), "from 0 to 15"), (np.zeros((1, 2, 8), int), "shape")):
        with pytest.raises(ValueError, match=f"codes must .*{message}"):
            model.decode(codes)


def test_no_number_that_is_none_is_made_where_nothing_is_known(model):
    """As people see it who look for one."""
    tf.debugging.enable_check_numerics()
    try:
        prior = make_prior((4, 4), residual_blocks=1, context_filters=0, **CONDITIONS)
        prior.compile(run_eagerly=True)
        conditions = all_conditions((4, 4))
        conditions["scores"] = np.nan_to_num(conditions["scores"], nan=modules.UNKNOWN_SCORE)
        prior.fit({"codes": random_codes((4, 4), 9), **conditions}, verbose=0)
        model.sample(9, seed=0, labels=LABELS)
        model.nll(random_codes((4, 6), 9), **all_conditions((4, 6)))
    finally:
        tf.debugging.disable_check_numerics()


# ---- What is refused -----------------------------------------------------------------

REFUSED = [  # what is asked, and what the message has in it
    (lambda model: modules.VQVAE(4, 4, image_size=20, filters=(4, 4, 4)), "image_size 20"),
    (lambda model: modules.VectorQuantizer(4, 3).build((None, 2, 2, 5)), "embedding_dim is 3"),
    (lambda model: modules.MaskedConv2D(4, 4, "A"), "odd"),
    (lambda model: modules.MaskedConv2D(4, 3, "C"), "mask_type"),
    (lambda model: model.sample(0, seed=0), "num_samples"),
    (lambda model: model.sample(2, seed=0, known=np.zeros((2, 6, 4), "int32")), "known must have shape"),
    (lambda model: model.sample(1, seed=0, known=np.full((1, 4, 6), 6)), "known must be from -1 to 5"),
    (lambda model: model.nll(np.full((1, 4, 6), 6)), "codes must be from 0 to 5"),
    (lambda model: model(np.full((1, 4, 6), -1)), "codes must be from 0 to 5"),
    (lambda model: model.nll(np.zeros((1, 4, 6))), "codes must be integers"),
    (
        lambda model: model.nll(np.zeros((1, 4, 6), int), wings=2),
        "conditions are labels, scores, below, changes, not wings",
    ),
    *((lambda model, t=t: model.sample(1, 0, t), "temperature must be from 1e-6") for t in (0.0, -1.0, 1e-40, np.nan)),
    *((lambda model, s=s: model.sample(1, s), "seed must be an integer from 0") for s in (0.5, -1, 2**31, None)),
    (lambda model: model.sample(1.5, 0), "num_samples must be an integer"),
    (lambda model: model.draw_scores([0], 0.5), "seed must be an integer"),
    (lambda model: model.draw_scores([3], 0), "labels must be from -1 to 2"),
    (lambda model: make_prior((4, 6)).sample_heads(1, 0), "nothing of the slice below"),
    (lambda model: make_prior((4, 6)).nll(np.zeros((1, 4, 6), int), labels=[0]), "labels must be from -1 to -1"),
]


@pytest.mark.parametrize("ask, message", REFUSED)
def test_what_cannot_be_is_refused(ask, message, model):
    with pytest.raises(ValueError, match=message):
        ask(model)


WRONG = [("labels", np.full(9, 99)), ("labels", np.full(9, -2)), ("labels", LABELS[:8])]
WRONG += [("below", np.full((9, 4, 6), 6)), ("below", np.full((9, 4, 6), -2))]
WRONG += [(name, np.zeros((9, 3), "float32")) for name in ("scores", "below", "changes")]


@pytest.mark.parametrize("name, values", WRONG)
def test_a_condition_of_another_shape_or_that_the_model_has_not_is_refused(name, values, model):
    codes, wrong = random_codes((4, 6), 9), {name: values}
    inputs = {"codes": codes, **wrong}
    for ask in (model, lambda inputs: model.nll(**inputs), lambda inputs: model.sample(9, seed=0, **wrong)):
        with pytest.raises(ValueError, match=f"{name} must"):
            ask(inputs)
    # In a graph too, where a shape is seen when it is traced, and a value when it runs.
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=f"{name} must"):
        tf.function(model)(tf.nest.map_structure(tf.constant, inputs))


def test_codes_that_a_model_has_not_are_refused_by_fit_evaluate_and_predict():
    model, codes = modules.PixelCNN(6, (2, 2), 8, 1), np.full((4, 2, 2), 6)
    model.compile()
    for ask in (model.fit, model.evaluate, model.predict):
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="codes must be from 0 to 5"):
            ask(codes, verbose=0)
        with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=r"codes must have shape|not compatible"):
            ask(codes[:, :, :1] % 6, verbose=0)  # which could be broadcast
