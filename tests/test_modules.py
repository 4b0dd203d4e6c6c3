"""Properties of the two networks, each against a plain second computation or with a control that fails."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
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
    return modules.VQVAE(16, 4, image_size=16, filters=(4, 8), residual_blocks=1, **options)


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
    np.testing.assert_array_equal(quantizer.ema_counts, counts)  # a call leaves it alone
    quantizer.move_codebook(latents)
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
    quantizer.move_codebook(latents)
    distance = np.abs(latents.numpy().reshape(-1, 3) - quantizer.codebook.numpy()[:, None]).sum(axis=-1).min(axis=1)
    assert distance[0] < 1e-5
    assert (distance[1:] > 1e-3).all()  # the living moved a little, but were not replaced


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


def logits_of_a_draw(model):
    """The logits of the codes that the sampler drew: as it saw them, and as the full network gives them."""
    codes, logits = model.draw(tf.fill((9, *model.grid), -1), tf.constant(3), tf.constant(1.0))
    return logits, tf.gather(model(codes), codes, batch_dims=3)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("options", [{}, {"context_filters": 0, "learned_position": False}])
def test_sampler_draws_from_the_logits_of_the_full_network(grid, options):
    sampler, network = logits_of_a_draw(make_pixelcnn(grid, **options))
    assert np.ptp(network) > 1
    np.testing.assert_allclose(sampler, network, atol=2e-5)


STALE = {
    "block": (modules.ResidualBlock, "step", lambda step: lambda block, x, seen: step(block, x, tf.zeros_like(seen))),
    "context": (modules.GlobalContext, "share", lambda share: lambda *arguments: tf.zeros_like(share(*arguments))),
}


@pytest.mark.parametrize("part", STALE)
def test_control_a_stale_cache_gives_other_logits(part, monkeypatch):
    owner, name, spoil = STALE[part]
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    sampler, network = logits_of_a_draw(make_pixelcnn((5, 5)))
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
    model = make_pixelcnn((4, 6))
    first = model.sample(40, seed=1).numpy()
    np.testing.assert_array_equal(model.sample(40, seed=1), first)
    np.testing.assert_array_equal(model.sample(7, seed=1), first[:7])
    assert (model.sample(40, seed=2).numpy() != first).any()
    assert len({picture.tobytes() for picture in first}) > 30


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


TWO_DEVICES = """
import sys, numpy, keras, tensorflow as tf
sys.path[:0] = ["tests"]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import test_modules

def fitted(strategy):
    with strategy.scope():
        model = test_modules.tiny_vqvae()
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        images = tf.data.Dataset.from_tensor_slices(test_modules.blobs()).batch(16)
        history = model.fit(images, epochs=2, verbose=0).history
    return [numpy.array(v) for v in model.variables], history["loss"]

one, one_loss = fitted(tf.distribute.get_strategy())
two, two_loss = fitted(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
print(max(abs(a - b).max() for a, b in zip(one, two)), max(abs(a - b) for a, b in zip(one_loss, two_loss)))
"""


def test_two_devices_end_with_the_weights_of_one():
    result = subprocess.run([sys.executable, "-c", TWO_DEVICES], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    weights, loss = map(float, result.stdout.split()[-2:])
    assert weights < 1e-4
    assert loss < 1e-4
