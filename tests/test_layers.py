"""Each layer against Keras's own contract of a layer, plain and under mixed precision; the user's Keras settings."""

import modules

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src import testing

RNG = np.random.default_rng(0)
CODES = {"input_data": RNG.integers(6, size=(2, 4, 6)).astype("int32")}
FEATURES = {"input_data": RNG.normal(size=(2, 4, 6, 8)).astype("float32")}
SHAPES = {"labels_shape": (2,), "scores_shape": (2, 2), "below_shape": (2, 4, 6), "changes_shape": (2, 2)}
NAMED = {"input_shape": SHAPES, "input_dtype": dict(zip(SHAPES, ("int32", "float32", "int32", "float32")))}
NAMED["run_training_check"] = False  # Keras has none for inputs with names
QUANTIZER = {"num_embeddings": 7, "embedding_dim": 8}
CONDITIONS = {"num_labels": 3, "num_scores": 2, "num_changes": 2, "below": True, "learned_position": True}
LAYERS = {
    "quantizer, moving average": (modules.VectorQuantizer, QUANTIZER, FEATURES),
    "quantizer, by gradient": (modules.VectorQuantizer, {**QUANTIZER, "ema_decay": None}, FEATURES),
    "mask A": (modules.MaskedConv2D, {"filters": 4, "kernel_size": 5, "mask_type": "A"}, FEATURES),
    "mask B": (modules.MaskedConv2D, {"filters": 4, "kernel_size": 3, "mask_type": "B"}, FEATURES),
    "mask A of codes": (modules.MaskedCodeConv2D, {"num_embeddings": 6, "filters": 4, "kernel_size": 7}, CODES),
    "residual block": (modules.ResidualBlock, {"filters": 8, "dropout": 0.1, "zero_init": False}, FEATURES),
    "row context": (modules.RowContext, {"filters": 4, "dropout": 0.1}, FEATURES),
    "conditions": (modules.Conditioning, {"grid": (4, 6), "filters": 8, "num_embeddings": 64, **CONDITIONS}, NAMED),
}


@pytest.mark.filterwarnings("ignore::UserWarning:keras")  # of how its test calls fit
@pytest.mark.parametrize("layer, arguments, inputs", LAYERS.values(), ids=LAYERS)
def test_a_layer_keeps_the_contract_of_keras(layer, arguments, inputs):
    """Its configuration, building, symbolic call, a step of training, and mixed precision."""
    testing.TestCase().run_layer_test(layer, arguments, run_mixed_precision_check=True, **inputs)


SET = {"dtype_policy": "mixed_float16", "floatx": "float64", "image_data_format": "channels_first"}


def numbers():
    """What both models make of the same images, the VQ-VAE after a step of training."""
    keras.utils.set_random_seed(0)
    vqvae = modules.VQVAE(8, 4, image_size=16, filters=(4, 4), encoder_blocks=1, decoder_blocks=1)
    network = modules.PixelCNN(8, (4, 4), 8, 2, dropout=0.1, between=[modules.RowContext(4, dtype="float32")])
    prior = modules.Prior(network, range(2), below=True)
    images = np.random.default_rng(0).random((6, 16, 16, 1)).astype("float32")
    vqvae.compile(keras.optimizers.Adam(1e-3), run_eagerly=True)
    vqvae.fit(images, verbose=0)
    codes = vqvae.encode(images)
    return [codes, vqvae.decode(codes), prior(codes), prior.sample(3, seed=0, labels=np.zeros(3, np.int32))]


@pytest.fixture(scope="module")
def by_default():
    return numbers()


@pytest.mark.parametrize("name, value", SET.items())
def test_models_are_float32_with_the_channels_last_whatever_keras_is_set_to(name, value, by_default):
    with modules.keras_defaults():  # what is set inside is put back
        getattr(keras.config, f"set_{name}")(value)
        found = numbers()
        left = getattr(keras.config, name)()
        assert getattr(left, "name", left) == value  # the user's are left as they are
        assert keras.config.dtype_policy().name == (value if name == "dtype_policy" else "float32")
    for ours, expected in zip(found, by_default):
        assert ours.dtype == expected.dtype and ours.dtype in (tf.float32, tf.int32)
        np.testing.assert_allclose(ours, expected, atol=1e-5)
