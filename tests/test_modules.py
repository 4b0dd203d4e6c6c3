"""Properties of the two networks, each against a plain second computation or with a control that fails."""

import functools
import json
import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_probability as tfp
from conftest import ROOT

import modules

GRIDS = [(5, 5), (4, 6)]


def randomise(layer, seed=0):
    """Give every weight a value, also those that start at zero: a bug must not hide behind a zero."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.2, weight.shape))
    return layer


def make_pixelcnn(grid, **options):
    keras.utils.set_random_seed(0)
    options = {"filters": 8, "residual_blocks": 7, "context_filters": 4, **options}
    return randomise(modules.PixelCNN(6, grid, **options))


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


# --------------------------------------------------------------------------------------
# Vector quantizer
# --------------------------------------------------------------------------------------


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


def test_gradient_passes_straight_through():
    quantizer, latents = make_quantizer()
    with tf.GradientTape() as tape:
        tape.watch(latents)
        total = tf.reduce_sum(2.0 * quantizer(latents))
    np.testing.assert_allclose(tape.gradient(total, latents), np.full(latents.shape, 2.0))


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_commitment_pulls_the_latents_and_the_codebook_loss_the_used_codes(beta):
    quantizer, latents = make_quantizer(ema_decay=None, commitment_cost=beta)
    with tf.GradientTape() as tape:
        tape.watch(latents)
        quantizer(latents)
        loss = tf.add_n(quantizer.losses)
    to_latents, to_codebook = tape.gradient(loss, [latents, quantizer.codebook.value])
    chosen = quantizer.codebook.numpy()[quantizer.nearest(latents)]
    np.testing.assert_allclose(to_latents, beta * 2 * (latents - chosen) / latents.numpy().size, rtol=1e-5, atol=1e-7)
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


def test_dead_code_comes_back_as_a_latent_of_the_batch():
    quantizer, latents = make_quantizer()
    quantizer.ema_counts.assign([0, 9, 9, 9, 9, 9, 9])
    quantizer.ema_sums.assign(9 * quantizer.codebook.numpy())
    quantizer.codebook.assign(tf.concat([[[1e3] * 3], quantizer.codebook[1:]], axis=0))  # far from everything
    quantizer(latents, training=True)
    distance = np.abs(latents.numpy().reshape(-1, 3) - quantizer.codebook.numpy()[:, None]).sum(axis=-1).min(axis=1)
    assert distance[0] < 1e-5
    assert (distance[1:] > 1e-3).all()  # the living moved a little, but were not replaced


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "XLA"])
def test_codes_of_the_first_step_are_distinct(compiled):
    """Most of a batch is background, one latent again and again; drawn with replacement it would be most codes, too."""
    quantizer = modules.VectorQuantizer(16, 16)
    quantizer.build((None, 16))
    rng = np.random.default_rng(0)
    latents = np.repeat(rng.normal(size=(1, 16)), 1003, axis=0).astype("float32")
    latents[rng.choice(1003, 15, replace=False)] = rng.normal(size=(15, 16))
    tf.function(quantizer, jit_compile=compiled)(latents, training=True)
    assert len(np.unique(quantizer.codebook.numpy().round(5), axis=0)) == 16
    assert len(np.unique(latents[rng.integers(1003, size=16)], axis=0)) < 5


def test_fewer_latents_than_codes_are_drawn_again():
    quantizer, latents = make_quantizer()
    drawn = quantizer.draw_distinct(tf.reshape(latents, (-1, 3))[:4]).numpy()
    np.testing.assert_array_equal(np.unique(drawn, axis=0), np.unique(latents[0, 0, :4], axis=0))
    assert drawn.shape == (7, 3)


@pytest.mark.parametrize("ema_decay", [None, 0.99])
def test_codebook_moves_in_fit_and_only_there(ema_decay):
    """A codebook held as a bare tf.Variable never would, and nothing complains."""
    model = tiny_vqvae(ema_decay=ema_decay, ssim_weight=0)
    assert any(v is model.quantizer.codebook for v in model.trainable_variables) == (ema_decay is None)
    model.compile(optimizer="adam")
    before = model.quantizer.codebook.numpy()
    model.evaluate(blobs(), verbose=0)
    np.testing.assert_array_equal(model.quantizer.codebook, before)
    model.fit(blobs(), epochs=1, verbose=0)
    assert np.abs(model.quantizer.codebook.numpy() - before).max() > 1e-4


def test_codebook_starts_from_data_and_is_used():
    """The moving average with new life for dead codes uses every code; the plain codebook does not."""
    used = {}
    for ema_decay in (0.9, None):
        model = tiny_vqvae(ema_decay=ema_decay, ssim_weight=0, data_variance=0.05)
        model.compile(optimizer=keras.optimizers.Adam(1e-2))
        model.fit(blobs(256), epochs=20, verbose=0)
        used[ema_decay] = len(np.unique(model.encode(blobs(256))))
    assert used[0.9] == 16
    assert used[None] < 16


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "XLA"])
def test_usage_is_that_of_all_batches_together(compiled):
    codes = np.random.default_rng(0).integers(0, 5, (4, 30))
    usage = modules.CodebookUsage(8)
    update = tf.function(usage.update_state, jit_compile=compiled)
    for batch in codes:
        update(batch)
    share = np.bincount(codes.ravel(), minlength=8) / codes.size
    result = usage.result()
    np.testing.assert_allclose(result["perplexity"], np.exp(-sum(p * np.log(p) for p in share if p)), rtol=1e-5)
    assert result["codes_used"] == 5
    usage.reset_state()
    assert usage.result()["codes_used"] == 0


# --------------------------------------------------------------------------------------
# VQ-VAE
# --------------------------------------------------------------------------------------


def test_decode_of_encode_is_the_call_clipped():
    model, images = tiny_vqvae(), blobs(4)
    codes = model.encode(images)
    assert codes.shape == (4, 4, 4)
    assert codes.dtype == tf.int32
    np.testing.assert_allclose(model.decode(codes), np.clip(model(images), 0, 1), atol=1e-5)


def test_loss_has_the_terms_it_says():
    model, images = tiny_vqvae(ssim_weight=0.5, data_variance=0.1, commitment_cost=2.0), blobs(4)
    model.compile()
    logs = model.evaluate(images, verbose=0, return_dict=True)
    output = np.array(model(images))
    latents = np.array(model.encoder(images))
    quantized = np.array(model.quantizer.lookup(model.encode(images)))
    expected = np.square(images - output).mean() / 0.1 + 2.0 * np.square(latents - quantized).mean()
    expected += 0.5 * (1 - tf.image.ssim(images, output, 1.0).numpy().mean())
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        logs["loss"], logs["reconstruction_loss"] + logs["ssim_loss"] + logs["quantizer_loss"], rtol=1e-5
    )


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="image_size 20"):
        modules.VQVAE(4, 4, image_size=20, filters=(4, 4, 4))
    with pytest.raises(ValueError, match="embedding_dim is 3"):
        modules.VectorQuantizer(4, 3).build((None, 2, 2, 5))
    with pytest.raises(ValueError, match="odd"):
        modules.MaskedConv2D(4, 4, "A")
    with pytest.raises(ValueError, match="mask_type"):
        modules.MaskedConv2D(4, 3, "C")


# --------------------------------------------------------------------------------------
# Masked convolutions
# --------------------------------------------------------------------------------------


def full_kernel(layer, mask):
    """The k x k kernel of a masked layer, with a zero wherever its mask has one."""
    k = layer.kernel_size
    kernel = np.zeros((k * k, *layer.kernel.shape[1:]), "float32")
    kernel[np.flatnonzero(mask)] = layer.kernel.numpy()
    return tf.constant(kernel.reshape(k, k, *layer.kernel.shape[1:]))


@pytest.mark.parametrize("mask_type, mask", [("A", [1, 1, 1, 1, 0, 0, 0, 0, 0]), ("B", [1, 1, 1, 1, 1, 0, 0, 0, 0])])
@pytest.mark.parametrize("grid", GRIDS)
def test_masked_convolution_is_the_plain_one_with_a_masked_kernel(mask_type, mask, grid):
    layer = modules.MaskedConv2D(4, 3, mask_type)
    layer.build((None, *grid, 2))
    randomise(layer)
    x = tf.random.stateless_normal((2, *grid, 2), (0, 0))
    kernel = full_kernel(layer, mask)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([x, kernel])
        ours = layer(x)
        plain = tf.nn.conv2d(x, kernel, 1, "SAME") + layer.bias
        ours_loss, plain_loss = tf.reduce_sum(tf.sin(ours)), tf.reduce_sum(tf.sin(plain))
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    np.testing.assert_allclose(tape.gradient(ours_loss, x), tape.gradient(plain_loss, x), atol=1e-5)
    plain_gradient = tape.gradient(plain_loss, kernel).numpy().reshape(9, 2, 4)[np.flatnonzero(mask)]
    np.testing.assert_allclose(tape.gradient(ours_loss, layer.kernel.value), plain_gradient, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_lookup_is_the_masked_convolution_of_one_hot_codes(grid):
    layer = modules.MaskedCodeConv2D(6, 4, 7)
    layer.build((None, *grid))
    randomise(layer)
    codes = random_codes(grid)
    kernel = full_kernel(layer, np.arange(49) < 24)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(kernel)
        ours = layer(codes)
        plain = tf.nn.conv2d(tf.one_hot(codes, 6), kernel, 1, "SAME") + layer.bias
        ours_loss, plain_loss = tf.reduce_sum(tf.sin(ours)), tf.reduce_sum(tf.sin(plain))
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    plain_gradient = tape.gradient(plain_loss, kernel).numpy().reshape(49, 6, 4)[:24]
    ours_gradient = tf.convert_to_tensor(tape.gradient(ours_loss, layer.kernel.value))
    np.testing.assert_allclose(ours_gradient, plain_gradient, atol=1e-4)


# --------------------------------------------------------------------------------------
# PixelCNN
# --------------------------------------------------------------------------------------


def leaks(function, codes):
    """Raster positions whose code changes an output at or before them."""
    positions = codes[0].size
    before = np.array(function(codes)).reshape(len(codes), positions, -1)
    found = []
    for position in range(positions):
        nudged = codes.reshape(len(codes), -1).copy()
        nudged[:, position] = (nudged[:, position] + 1) % 6
        after = np.array(function(nudged.reshape(codes.shape))).reshape(len(codes), positions, -1)
        if not np.allclose(after[:, : position + 1], before[:, : position + 1], atol=1e-5):
            found.append(position)
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_logits_depend_on_earlier_codes_alone(grid):
    model = make_pixelcnn(grid)
    assert leaks(model, random_codes(grid)) == []


@pytest.mark.parametrize("grid", GRIDS)
def test_control_a_mask_of_type_b_first_leaks_everywhere(grid):
    layer = modules.MaskedConv2D(4, 7, "B")
    layer.build((None, *grid, 6))
    assert leaks(lambda codes: layer(tf.one_hot(codes, 6)), random_codes(grid)) == list(range(grid[0] * grid[1]))


def test_control_a_context_that_sees_its_whole_row_leaks():
    model = make_pixelcnn((4, 6))
    for context in model.contexts:
        context.is_above = np.repeat(np.tri(4, dtype="float32"), 6, axis=1)
    assert len(leaks(model, random_codes((4, 6)))) > 0


def test_last_logits_see_every_code_before_them():
    model, codes = make_pixelcnn((6, 9), filters=32), random_codes((6, 9), count=1)
    before = np.array(model(codes))[0, -1, -1]
    unseen = []
    for position in range(codes.size - 1):
        nudged = codes.copy()
        nudged.reshape(-1)[position] = (nudged.reshape(-1)[position] + 1) % 6
        if np.array_equal(np.array(model(nudged))[0, -1, -1], before):
            unseen.append(position)
    assert unseen == []


LABELS = np.array([2, -1, 0, 1, -1, 2, 2, 0, 1], "int32")
PARTS = {
    "all parts": {"num_labels": 3, "num_changes": 2},
    "no parts": {"context_filters": 0, "learned_position": False},
}


def draw(model, known, labels, streams, seed=3, keep_up_to=np.inf, temperature=1.0):
    """`PixelCNN.draw` of arrays: the codes and the nats of each, as arrays."""
    integers = (tf.constant(value, tf.int32) for value in (known, labels, streams, seed))
    codes, nats = model.draw(*integers, tf.constant(keep_up_to, tf.float32), tf.constant(temperature, tf.float32))
    return codes.numpy(), nats.numpy()


def nats_of_a_draw(model, labels):
    """The nats of the codes that the sampler drew: as it saw them, and as the full network gives them."""
    codes, nats = draw(model, np.full((9, *model.grid), -1), labels, np.arange(9))
    return nats, nats_of(model((codes, labels)), codes)


def nats_of(logits, codes):
    """-ln of the softmax at each code, in numpy."""
    logits = np.array(logits, "float64")
    log_sum = np.log(np.exp(logits).sum(axis=-1))
    return log_sum - np.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("parts", PARTS)
def test_sampler_draws_from_the_logits_of_the_full_network(grid, parts):
    model = make_pixelcnn(grid, **PARTS[parts])
    labels = LABELS if model.num_labels else np.full(9, -1, "int32")
    sampler, network = nats_of_a_draw(model, labels)
    assert np.ptp(network) > 1
    np.testing.assert_allclose(sampler, network, atol=2e-5)


def test_control_other_labels_cost_other_nats():
    model = make_pixelcnn((4, 6), num_labels=3)
    codes, nats = draw(model, np.full((9, 4, 6), -1), LABELS, np.arange(9))
    for others in (np.where(LABELS < 0, 0, -1), (LABELS + 1) % 3):
        difference = np.abs(nats_of(model((codes, others.astype("int32"))), codes) - nats)
        assert (difference.max(axis=(1, 2)) > 1e-2).all()


def draw_naively(model, known, labels, streams, seed, keep_up_to, temperature):
    """What `PixelCNN.draw` does, with one pass of the full network for every position."""
    codes, gumbel, network = np.zeros_like(known), tfp.distributions.Gumbel(0.0, 1.0), tf.function(model)
    for row, column in np.ndindex(model.grid):
        logits, given = network((codes, labels)).numpy()[:, row, column], known[:, row, column]
        noise = gumbel.sample((max(streams) + 1, model.grid[1], model.num_embeddings), seed=[seed, row])
        drawn = (logits / temperature + noise.numpy()[streams, column]).argmax(axis=-1)
        is_kept = (given >= 0) & (nats_of(logits, np.maximum(given, 0)) <= keep_up_to)
        codes[:, row, column] = np.where(is_kept, given, drawn)
    return codes


@pytest.mark.parametrize("keep_up_to, temperature", [(np.inf, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("parts", PARTS)
def test_sampler_draws_what_a_naive_one_draws(parts, keep_up_to, temperature):
    """A third of the codes is to be drawn, the rest known; two pictures share a stream."""
    model = make_pixelcnn((4, 6), **PARTS[parts])
    labels = LABELS if model.num_labels else np.full(9, -1, "int32")
    known = np.where(np.random.default_rng(1).random((9, 4, 6)) < 1 / 3, -1, random_codes((4, 6), 9)).astype("int32")
    streams = np.array([5, 1, 0, 3, 4, 5, 9, 7, 2])
    codes = draw_naively(model, known, labels, streams, 11, keep_up_to, temperature)
    np.testing.assert_array_equal(draw(model, known, labels, streams, 11, keep_up_to, temperature)[0], codes)
    assert (draw(model, known, labels, streams, 12, keep_up_to, temperature)[0] != codes).any()


STALE = {
    "block": (modules.ResidualBlock, "step", lambda step: lambda block, x, seen: step(block, x, tf.zeros_like(seen))),
    "context": (modules.GlobalContext, "to_rows_below", lambda below: lambda *at: tf.zeros_like(below(*at))),
}


@pytest.mark.parametrize("part", STALE)
def test_control_a_stale_cache_gives_other_logits(part, monkeypatch):
    owner, name, spoil = STALE[part]
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    sampler, network = nats_of_a_draw(make_pixelcnn((5, 5), num_labels=3), LABELS)
    assert np.abs(sampler - network).max() > 1e-2


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_have_the_probabilities_of_the_logits(temperature):
    """Observed counts of the first code against the softmax, within four standard errors."""
    model, count = make_pixelcnn((2, 2)), 20_000
    model.head[-1].bias.assign(np.arange(6) / 3)  # far from uniform
    observed = np.bincount(model.sample(count, 0, temperature)[:, 0, 0], minlength=6)
    logits = model(np.zeros((1, 2, 2), "int32"))[0, 0, 0]

    def surprise(probabilities):
        expected = count * np.array(probabilities)
        return np.abs(observed - expected).max() / np.sqrt(count / 4)

    assert surprise(tf.nn.softmax(logits / temperature)) < 4
    assert surprise(tf.nn.softmax(logits / (temperature + 0.5))) > 4


def test_seed_decides_the_picture():
    model, labels = make_pixelcnn((4, 6), num_labels=3), np.arange(40) % 4 - 1
    first = model.sample(40, seed=1, labels=labels).numpy()
    np.testing.assert_array_equal(model.sample(40, seed=1, labels=labels), first)
    np.testing.assert_array_equal(model.sample(7, seed=1, labels=labels[:7]), first[:7])
    assert (model.sample(40, seed=2, labels=labels).numpy() != first).any()
    assert len({picture.tobytes() for picture in first}) > 30


def test_labels_decide_the_picture_and_none_means_not_known():
    model = make_pixelcnn((4, 6), num_labels=3)
    unknown = model.sample(9, seed=1).numpy()
    np.testing.assert_array_equal(model.sample(9, seed=1, labels=[-1] * 9), unknown)
    drawn = model.sample(9, seed=1, labels=LABELS).numpy()
    np.testing.assert_array_equal(drawn[LABELS < 0], unknown[LABELS < 0])
    assert (drawn[LABELS >= 0] != unknown[LABELS >= 0]).any()


def test_a_single_picture_can_be_drawn_first():
    assert make_pixelcnn((4, 6)).sample(1, seed=0).shape == (1, 4, 6)


def test_another_seed_does_not_trace_the_graph_again():
    model = make_pixelcnn((4, 6))
    for seed in range(3):
        model.sample(4 + seed, seed=seed, temperature=1.0 + seed)
    assert model.draw.experimental_get_tracing_count() == 1


def test_known_codes_are_kept_and_the_rest_follows_them():
    model = make_pixelcnn((4, 6))
    known = random_codes((4, 6), count=8)
    known[:, 2:] = -1
    completed = model.sample(8, seed=0, known=known).numpy()
    np.testing.assert_array_equal(completed[:, :2], known[:, :2])
    assert completed.min() >= 0
    free = model.sample(8, seed=0).numpy()
    assert (completed[:, 2:] != free[:, 2:]).any()


def test_known_codes_that_were_drawn_lead_to_the_same_picture():
    """The given codes meet the same cache as drawn ones: a second drawing changes nothing."""
    model = make_pixelcnn((4, 6))
    free = model.sample(8, seed=0).numpy()
    known = free.copy()
    known[:, 2:] = -1
    np.testing.assert_array_equal(model.sample(8, seed=0, known=known), free)


def test_wrong_requests_are_refused():
    model = make_pixelcnn((4, 6))
    with pytest.raises(ValueError, match="num_samples"):
        model.sample(0, seed=0)
    with pytest.raises(ValueError, match="temperature"):
        model.sample(1, seed=0, temperature=0.0)
    with pytest.raises(ValueError, match="known"):
        model.sample(2, seed=0, known=np.zeros((2, 6, 4), "int32"))


@pytest.mark.parametrize("num_labels", [0, 3])
def test_wrong_labels_are_refused(num_labels):
    model = make_pixelcnn((4, 6), num_labels=num_labels)
    for labels, words in (([-1], "shape"), ([-1, -1, -1], "shape"), ([-1, -2], "-2"), ([-1, num_labels], "from -1 to")):
        with pytest.raises(ValueError, match=f"labels must .*{words}"):
            model.sample(2, seed=0, labels=labels)


def test_codes_alone_are_codes_of_an_unknown_label_and_no_changes():
    model, codes = make_pixelcnn((4, 6), num_labels=3, num_changes=2), random_codes((4, 6))
    alone, unknown = np.array(model(codes)), np.full(3, -1)
    for inputs in ((codes, unknown), (codes, unknown, np.zeros((3, 2), "float32"))):
        np.testing.assert_array_equal(model(inputs), alone)
    told = np.array(model((codes, np.array([0, -1, 1]), np.float32([[0, 0], [0, 1], [0, 0]]))))
    assert (np.abs(told - alone).max(axis=(1, 2, 3)) > 1e-2).all()  # control: a label or a change is not nothing


def test_nll_is_that_of_the_softmax_given_the_label():
    model, codes = make_pixelcnn((4, 6), num_labels=3), random_codes((4, 6), count=9)
    nats = model.nll(codes, LABELS)
    assert nats.shape == (9, 4, 6) and nats.dtype == tf.float32
    np.testing.assert_allclose(nats, nats_of(model((codes, LABELS)), codes), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(model.nll(codes), model.nll(codes, np.full(9, -1)))
    assert (np.abs(model.nll(codes) - nats).max(axis=(1, 2)) > 1e-2).tolist() == (LABELS >= 0).tolist()


def test_restoring_redraws_what_costs_too_much_given_what_is_restored():
    model, known, streams = make_pixelcnn((4, 6), num_labels=3), random_codes((4, 6), count=9), np.arange(9)
    np.testing.assert_array_equal(model.restore(known, LABELS, np.inf, streams, seed=2), known)
    restored = model.restore(known, LABELS, 2.0, streams, seed=2).numpy()
    # The logits at a position depend on the codes before it, which are the restored ones.
    cost = nats_of(model((restored, LABELS)), known)
    assert np.abs(cost - 2).min() > 1e-4 and 0.1 < (cost > 2).mean() < 0.9
    np.testing.assert_array_equal(restored[cost <= 2], known[cost <= 2])
    assert (restored[cost > 2] != known[cost > 2]).mean() > 0.7  # a draw can be what it replaces
    kept = restored == known
    assert (model.nll(restored, LABELS).numpy()[kept & (cost <= 2)] <= 2 + 1e-4).all()
    np.testing.assert_array_equal(model.restore(known, LABELS, 0.0, streams, 2), model.sample(9, 2, labels=LABELS))


def test_a_stream_is_the_picture_of_its_number():
    model = make_pixelcnn((4, 6), num_labels=3)
    nothing, drawn = np.full((4, 4, 6), -1), model.sample(6, seed=2).numpy()
    restored = model.restore(nothing, None, np.inf, [5, 0, 5, 3], seed=2).numpy()
    np.testing.assert_array_equal(restored, drawn[[5, 0, 5, 3]])
    assert (restored[0] != restored[1]).any()


# --------------------------------------------------------------------------------------
# What chance does in training
# --------------------------------------------------------------------------------------


def test_a_residual_block_starts_as_what_passes_it_by():
    x = tf.random.stateless_normal((2, 4, 6, 8), (0, 0))
    np.testing.assert_array_equal(modules.ResidualBlock(8)(x), x)
    assert np.abs(modules.ResidualBlock(8, zero_init=False)(x) - x).max() > 0.1


def test_random_numbers_are_uniform_and_the_same_with_xla():
    def draw():
        return modules.uniform((4000,), tf.constant([3, 5]))

    numbers = tf.function(draw)().numpy()
    np.testing.assert_array_equal(tf.function(draw, jit_compile=True)(), numbers)
    assert 0 <= numbers.min() < 0.01 and 0.99 < numbers.max() <= 1
    assert abs(numbers.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 4000)


def test_dropout_zeroes_a_share_and_keeps_the_mean():
    layer, x = modules.Dropout(0.3), tf.ones((100, 100))
    np.testing.assert_array_equal(layer(x), x)
    first, second = (layer(x, training=True).numpy() for _ in range(2))
    for dropped in (first, second):
        np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.7], rtol=1e-6)
        assert abs((dropped == 0).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1e4)
    assert abs(((first == 0) & (second == 0)).mean() - 0.09) < 0.012  # two steps have nothing to do with each other


def test_one_label_in_ten_is_not_told_in_training(monkeypatch):
    model, told = make_pixelcnn((2, 2), num_labels=3), []
    call = modules.PixelCNN.call

    def spy(self, inputs, training=False):
        told.append(np.array(inputs[1]))
        return call(self, inputs, training=training)

    monkeypatch.setattr(modules.PixelCNN, "call", spy)
    codes, labels = random_codes((2, 2), count=4000), np.arange(4000, dtype="int32") % 3
    for training in (False, True, True):
        model.terms((codes, labels), training=training)
    np.testing.assert_array_equal(told[0], labels)
    for seen in told[1:]:
        hidden = seen == -1
        np.testing.assert_array_equal(seen[~hidden], labels[~hidden])
        assert abs(hidden.mean() - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 4000)
    assert (told[1] != told[2]).any()


# --------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------


def examples_of(name, count):
    """Examples of the models in MODELS: images, or codes with a label and changes."""
    rng = np.random.default_rng(1)
    if name.startswith("VQ-VAE"):
        return blobs(count)
    labels, changes = rng.integers(-1, 3, count).astype("int32"), rng.normal(size=(count, 2)).astype("float32")
    return random_codes((4, 4), count), labels, changes


def batches_of(examples, size):
    """As `fit` and `evaluate` take them."""
    batches = tf.data.Dataset.from_tensor_slices(examples).batch(size)
    return batches.map(lambda *inputs: inputs if len(inputs) == 1 else (inputs,))


ORIGINAL = {"filters": (4, 4, 8), "kernel_size": 3, "encoder_blocks": 0, "decoder_blocks": 0, "ssim_weight": 0.0}
MODELS = {
    "VQ-VAE": lambda: tiny_vqvae(encoder_blocks=0),
    "VQ-VAE, original": lambda: tiny_vqvae(**ORIGINAL, ema_decay=None),
    "VQ-VAE, coarse grid": lambda: tiny_vqvae(**ORIGINAL, ema_decay=0.9),
    "PixelCNN": lambda: make_pixelcnn((4, 4), residual_blocks=1, num_labels=3, num_changes=2, dropout=0.4),
    "PixelCNN, original": lambda: make_pixelcnn((4, 4), residual_blocks=1, **PARTS["no parts"]),
}


@pytest.mark.parametrize("name", ["VQ-VAE", "PixelCNN"])
def test_a_loss_is_the_mean_over_slices(name):
    """And not over batches, of which the last one is small."""
    model, examples = MODELS[name](), examples_of(name, 6)
    model.compile()

    def loss(first, last):
        part = tf.nest.map_structure(lambda array: array[first:last], examples)
        return model.evaluate(batches_of(part, 4), verbose=0, return_dict=True)["loss"]

    assert loss(0, 6) == pytest.approx(np.mean([loss(i, i + 1) for i in range(6)]), rel=1e-5)
    assert loss(0, 6) != pytest.approx(np.mean([loss(0, 4), loss(4, 6)]), rel=1e-3)


@functools.cache
def fitted(name, compiled, seed=0):
    """Losses of three epochs of three steps, and of the slices that validate them."""
    model, examples = MODELS[name](), examples_of(name, 48)
    for number, state in enumerate(v for v in model.non_trainable_variables if v.name == "seed_generator_state"):
        state.assign([seed + number, 0])
    adam, muon = keras.optimizers.Adam(1e-2), keras.optimizers.Muon(1e-2, global_clipnorm=1.0)
    model.compile(optimizer=muon if name == "PixelCNN" else adam, jit_compile=compiled)
    data = batches_of(examples, 16)
    history = model.fit(data, validation_data=data, epochs=3, verbose=0, shuffle=False).history
    return np.array([history["loss"], history["val_loss"]])


@pytest.mark.parametrize("name", MODELS)
def test_steps_compiled_by_xla_give_the_same_losses(name):
    losses = fitted(name, compiled=False)
    np.testing.assert_allclose(fitted(name, compiled=True), losses, rtol=1e-4)
    assert np.ptp(losses) > 1e-2


def test_control_other_dropout_masks_give_other_losses():
    assert np.abs(fitted("PixelCNN", False, seed=1) / fitted("PixelCNN", False) - 1).max() > 4e-4


# --------------------------------------------------------------------------------------
# Files and devices
# --------------------------------------------------------------------------------------

REOPEN = """
import sys, numpy, keras, modules
folder = sys.argv[1]
vqvae, pixelcnn = (keras.saving.load_model(f"{folder}/{name}.keras") for name in ("vqvae", "pixelcnn"))
codes = pixelcnn.sample(2, seed=5)
numpy.savez(f"{folder}/reopened.npz", codes=codes, images=vqvae.decode(codes), logits=pixelcnn(codes))
"""


def test_saved_models_reopen_in_a_fresh_process(tmp_path):
    vqvae, pixelcnn = tiny_vqvae(), randomise(modules.PixelCNN(16, (4, 4), 8, 6, context_filters=4))
    vqvae.compile(optimizer="adam")
    vqvae.fit(blobs(), verbose=0)
    vqvae.save(tmp_path / "vqvae.keras")
    pixelcnn.save(tmp_path / "pixelcnn.keras")
    subprocess.run([sys.executable, "-c", REOPEN, tmp_path], cwd=ROOT, check=True, capture_output=True)
    reopened = np.load(tmp_path / "reopened.npz")
    codes = pixelcnn.sample(2, seed=5)
    np.testing.assert_array_equal(reopened["codes"], codes)
    np.testing.assert_array_equal(reopened["images"], vqvae.decode(codes))
    np.testing.assert_array_equal(reopened["logits"], pixelcnn(codes))


def on_two_devices():
    """What the tests of two replicas look at, as JSON. For a process of its own: devices are chosen before all else."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    modules.LABELS_HIDDEN = 0.0
    makers = {
        "VQ-VAE": tiny_vqvae,
        "VQ-VAE, by gradient": lambda: tiny_vqvae(ema_decay=None),
        "PixelCNN": lambda: make_pixelcnn((4, 4), residual_blocks=1, num_labels=3, num_changes=2),
    }
    found = {}
    for name, make in makers.items():
        ends = []
        for strategy in (tf.distribute.get_strategy(), two):
            with strategy.scope():
                model = make()
                model.compile(optimizer=keras.optimizers.SGD(0.1))
            # Batches of 5 are divided 3 to 2; the fifth slice to validate on leaves a replica without any.
            data, validation = batches_of(examples_of(name, 20), 5), batches_of(examples_of(name, 5), 4)
            before = [np.array(v) for v in model.trainable_variables]
            history = model.fit(data, validation_data=validation, epochs=2, verbose=0, shuffle=False).history
            ends.append([np.array(v) for v in model.variables if v.name != "seed_generator_state"])
            found.setdefault(name, {}).setdefault("losses", []).append([history["loss"], history["val_loss"]])
        found[name]["apart"] = max(float(np.abs(a - b).max()) for a, b in zip(*ends))
        found[name]["moved"] = max(float(np.abs(a - b).max()) for a, b in zip(before, model.trainable_variables))
    for owner in (modules, keras.layers):
        with two.scope():
            layer = owner.Dropout(0.5)
        masks = two.run(tf.function(lambda layer=layer: layer(tf.ones((100,)), training=True)))
        first, second = (mask.numpy() > 0 for mask in two.experimental_local_results(masks))
        found[f"{owner.__name__} masks differ in"] = int((first != second).sum())
    return json.dumps({**found, "run": run_on_two_devices(two)})


def run_on_two_devices(two):
    """A small model fitted as train.py does it, and once more, killed in its second epoch."""
    import test_runs

    modules.choose_strategy = lambda: two
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        folder = pathlib.Path(folder)
        whole = test_runs.fit_point(folder / "whole")
        masks, rows = np.ravel(test_runs.Point.masks), test_runs.read_history(whole.history)
        test_runs.kill_before_rename(patched, 2, "vqvae_last.keras")
        with pytest.raises(test_runs.Killed):
            test_runs.fit_point(folder / "killed")
        patched.undo()
        resumed = test_runs.fit_point(folder / "killed")
        again = np.ravel(test_runs.Point.masks)
        return {
            "masks": len(masks),
            "distinct masks": len(set(masks)),
            "masks of the resumed epoch": len(set(again) & set(masks)),
            "the same history": test_runs.read_history(resumed.history) == rows,
            "the best row": test_runs.has_the_best_row(resumed),
        }


@pytest.fixture(scope="module")
def two_devices():
    script = "import sys; sys.path[:0] = ['tests']; import test_modules; print(test_modules.on_two_devices())"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["VQ-VAE", "VQ-VAE, by gradient", "PixelCNN"])
def test_two_devices_end_with_the_weights_and_losses_of_one(name, two_devices):
    found = two_devices[name]
    assert found["apart"] < 1e-4 < 1e-2 < found["moved"]
    one, two = found["losses"]
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert np.isfinite(one).all()


def test_each_device_has_its_own_dropout_mask(two_devices):
    """Of 100 numbers half or so; Keras's own layer has the same mask on both."""
    assert 25 < two_devices["modules masks differ in"] < 75
    assert two_devices["keras.layers masks differ in"] == 0


def test_a_run_on_two_devices_can_be_resumed(two_devices):
    """Two masks on two devices in each of six steps: all differ, and the resumed epoch has those it had."""
    assert two_devices["run"] == {
        "masks": 24,
        "distinct masks": 24,
        "masks of the resumed epoch": 12,
        "the same history": True,
        "the best row": True,
    }
