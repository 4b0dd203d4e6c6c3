"""What one GPU does differently, on a CPU: XLA compiles the steps, and int32 variables stay on the host.

TensorFlow has no GPU kernel for int32 variables, and XLA refuses a variable of another device than the step's.
Two logical CPUs stand for the host and the card.
"""

import pathlib
import subprocess
import sys

from conftest import ROOT, TINY

import train

FIT_ON_A_CARD = """
import sys
import keras, tensorflow as tf
from keras.src.backend.tensorflow import core
import modules, train

counter_dtype, *arguments = sys.argv[1:]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
create, add_weight = core.Variable._initialize, keras.layers.Layer.add_weight
compile_model = keras.Model.compile

def create_where_a_gpu_machine_does(variable, value):
    with tf.device("CPU:0" if variable.dtype == "int32" else "CPU:1"):
        create(variable, value)

def add_counter(layer, *arguments, **options):
    if options.get("dtype") == "int64":
        options["dtype"] = counter_dtype
    return add_weight(layer, *arguments, **options)

core.Variable._initialize = create_where_a_gpu_machine_does
keras.layers.Layer.add_weight = add_counter
keras.Model.compile = lambda model, **options: compile_model(model, jit_compile=True, **options)
with tf.device("CPU:1"):
    sys.exit(train.main(arguments))
"""


def fit_on_a_card(counter_dtype, phantoms, run):
    """train.py on made-up host and card; the codebook's counter of steps has that dtype."""
    command = [sys.executable, "-c", FIT_ON_A_CARD, counter_dtype, "--data", phantoms, "--run", run, *TINY]
    command += ["--vqvae-epochs", 1, "--pixelcnn-epochs", 1, "--pixelcnn-blocks", 1, "--augmentations", 1]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_both_models_fit_where_int32_variables_are_on_another_device(phantoms, tmp_path):
    finished = fit_on_a_card("int64", phantoms, tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    assert "done: now run python predict.py" in finished.stdout


def test_control_an_int32_counter_stops_the_first_step(phantoms, tmp_path):
    finished = fit_on_a_card("int32", phantoms, tmp_path / "run")
    assert finished.returncode != 0 and "tfvariable_on_a_different_device" in finished.stderr


def test_no_variable_is_int32():
    for values in ({}, train.ORIGINAL, {"pixelcnn_muon": False, "encoder_blocks": 1}):
        settings = train.Settings(**values)
        stages = {"vqvae": train.make_vqvae(settings), "pixelcnn": train.make_pixelcnn(settings, 32, settings.scores)}
        for name, model in stages.items():
            model.compile(train.make_optimizer(train.Stage(pathlib.Path("x"), name, settings), steps=1))
            model.optimizer.build(model.trainable_variables)
            variables = model.variables + model.optimizer.variables + [v for m in model.metrics for v in m.variables]
            assert {variable.dtype for variable in variables} <= {"int64", "float32"}
