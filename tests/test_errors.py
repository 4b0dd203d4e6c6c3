"""What a user can get wrong: each ends with one line that names the file or flag and the remedy."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import dataset
import modules
import predict
import train

import keras
import numpy as np
import pytest
from conftest import ROOT, TINY, assert_refused, cases, cut, eagerly, files_in, run_script, write_data, write_slices
from PIL import Image


def damage(path):
    """Change some bytes in the middle of a file, as a failing disk does."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 16)
    content[middle] = bytes(byte ^ 0xFF for byte in content[middle])
    path.write_bytes(content)


# ---- Flags ---------------------------------------------------------------------------

FLAGS = [
    ("misspelt, train", train, "--vqvae-epohcs 3", "--vqvae-epohcs"),
    ("abbreviated, predict", predict, "--temp 1", "--temp"),
    ("a word that belongs to no flag", train, "keras_png_slices_data", "keras_png_slices_data"),
    ("a switch with a value", train, "--mirror=yes", "--mirror"),
    ("demo and data", train, "--demo --data here", "--demo", "--data", "leave out"),
    ("half an epoch", train, "--vqvae-epochs 1.5", "--vqvae-epochs", "1.5"),
    ("odd filters", train, "--pixelcnn-filters 63", "--pixelcnn-filters", "even", "63"),
    ("too many halvings", train, "--filters 8 8 8 8 8 8 8", "--filters", "64", "7"),
    ("temperature 0", predict, "--temperature 0", "--temperature", "from 0.01 to 100", "not 0"),
    ("temperature nan", predict, "--temperature nan", "--temperature", "nan"),
    ("one sample has no covariance", predict, "--num-samples 1", "--num-samples", "from 2", "not 1"),
    ("no heads", predict, "--heads 0", "--heads", "from 1", "not 0"),
    ("two slice numbers for all", predict, "--anomalies x --slice 1 2", "one number"),
    ("anomalies and completions", predict, "--anomalies x --complete", "leave out"),
    ("anomalies and heads", predict, "--anomalies x --heads 1", "leave out"),
    ("anomalies and temperature", predict, "--anomalies x --temperature 2", "leave out"),
    ("seed beyond int32", predict, f"--seed {2**31}", "--seed", "from 0 to"),
]


@pytest.mark.parametrize("row", cases([(name, row) for name, *row in FLAGS]))
def test_a_wrong_flag_is_refused(row, refuse):
    script, arguments, *expected = row
    refuse(script, arguments.split(), *expected)


NUMBERS = [field for field in dataclasses.fields(train.Settings) if field.type is not bool]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_every_number_of_the_settings_has_a_range(field, refuse):
    """One step below it, one above, and what is not a number are refused."""
    flag, (low, high) = "--" + field.name.replace("_", "-"), (field.metadata["low"], field.metadata["high"])
    for value in (low - 1, high + 1):
        refuse(train, [flag, value], flag, f"from {low} to {high}", str(value))
    for value in ("nan", "inf", "many"):
        refuse(train, [flag, value], flag, value)


# ---- Data ----------------------------------------------------------------------------


def split_folder(data, name="train"):
    return data / f"keras_png_slices_{name}"


def first_slice(data, name="train"):
    return min(split_folder(data, name).iterdir())


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def leave_one_subject(data):
    shutil.rmtree(split_folder(data, "validate"))
    for path in split_folder(data).glob("*_002_*"):
        path.unlink()


def copy_to_test(data):
    """With more zeros in front of its number."""
    shutil.copy(first_slice(data), split_folder(data, "test") / "case_00001_slice_0.png")


# What is done to the data, and what the message must then have in it; {train} stands for the folder of that split.
BAD_DATA = [
    ("no folder", shutil.rmtree, "{data}", "no such folder", "unzipped"),
    ("a file", lambda d: [shutil.rmtree(d), d.write_bytes(b"PK")], "{data}", "unzipped"),
    ("an empty folder", empty, "{data}", "keras_png_slices_train", "unzip"),
    ("no test folder", lambda d: shutil.rmtree(split_folder(d, "test")), "{data}", "keras_png_slices_test", "unzip"),
    ("empty validate folder", lambda d: empty(split_folder(d, "validate")), "{validate}", "seg_", "unzip"),
    ("damaged PNG", lambda d: damage(first_slice(d)), "1 unreadable", "{first}", "restore or delete"),
    ("link to nothing", lambda d: (split_folder(d) / "a.png").symlink_to("gone"), "1 unreadable", "{train}/a.png"),
    ("a subject in two splits", copy_to_test, "case_001", "train and test", "remove"),
    ("one subject and no validate folder", leave_one_subject, "one subject", "validate", "add"),
]


@pytest.mark.parametrize("row", cases([(name, row) for name, *row in BAD_DATA]))
def test_bad_data_is_refused(row, data, refuse, tmp_path):
    spoil, *expected = row
    names = {"data": data, "first": first_slice(data), **{name: split_folder(data, name) for name in dataset.SPLITS}}
    spoil(data)
    arguments = ["--data", data, "--run", tmp_path / "run", *TINY]
    refuse(train, arguments, *(words.format(**names) for words in expected))
    assert not (tmp_path / "run").exists()  # no run was started


def test_all_unreadable_files_are_counted_and_ten_named(data, refuse, tmp_path):
    """Twelve broken in four ways, PNGs and JPEGs, among as many whole ones."""
    folder = split_folder(data)
    endings = ["png"] * 6 + ["jpg"] * 6
    whole, broken = ([folder / f"case_{case:03d}_slice_{i}.{end}" for i, end in enumerate(endings)] for case in (1, 2))
    write_slices(folder, [path.name for path in whole + broken])
    ways = cut, lambda p: cut(p, 0), lambda p: p.write_text("text"), lambda p: [p.unlink(), p.mkdir()]
    for i, path in enumerate(broken):
        ways[i % 4](path)
    ten = ", ".join(map(str, broken[:10]))
    line = refuse(train, ["--data", data, "--run", tmp_path / "run", *TINY], "12 unreadable", ten, "restore or delete")
    assert not any(str(path) in line for path in whole + broken[10:])


# ---- The run directory ---------------------------------------------------------------


@dataclasses.dataclass
class Place:
    """Slices and a run that was made of them; the arguments of each script that go with it."""

    folder: os.PathLike

    def __post_init__(self):
        self.data, self.run = self.folder / "keras_png_slices_data", self.folder / "run"
        self.arguments = {train: ["--data", self.data, "--run", self.run, *TINY], predict: ["--run", self.run]}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A place where training was stopped in the second epoch of the VQ-VAE."""
    place = Place(tmp_path_factory.mktemp("stopped"))
    write_data(place.data, train=[1, 2], validate=[402], test=[441])
    begin = train.Checkpoint.on_epoch_begin

    def begin_or_stop(checkpoint, epoch, logs=None):
        begin(checkpoint, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    with eagerly(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.Checkpoint, "on_epoch_begin", begin_or_stop)
        assert train.main(list(map(str, place.arguments[train]))) == 130
    assert files_in(place.run) == ["config.json", "vqvae_history.csv", "vqvae_last.npz"]
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A place whose run has both models, as far as the scripts look before they train or measure."""
    place = Place(tmp_path_factory.mktemp("trained"))
    write_data(place.data, train=[1, 2], validate=[402], test=[441])
    settings, _ = train.parse_arguments(list(map(str, place.arguments[train])))
    place.run.mkdir()
    train.Run(place.run).start(settings, place.data, dataset.fingerprint(dataset.load(place.data)), False)
    finish_with(place, "vqvae", train.make_vqvae(settings))
    finish_with(place, "pixelcnn", train.make_pixelcnn(settings, range(2), below=True))
    return place


def finish_with(place, name, model):
    run = train.Run(place.run)
    run.finish(name, model, {"vqvae": run.config["finished"]["vqvae"]["sha256"]} if name == "pixelcnn" else {})


def copy_of(place, folder):
    shutil.copytree(place.folder, folder)
    return Place(folder)


def edit_config(edit):
    """Let a function change what config.json holds."""

    def spoil(place):
        path = place.run / "config.json"
        config = json.loads(path.read_text())
        edit(config)
        path.write_text(json.dumps(config))

    return spoil


def edit_arrays(edit):
    """Let a function change the arrays that a stopped training left."""

    def spoil(place):
        path = place.run / "vqvae_last.npz"
        arrays = dict(np.load(path))
        edit(arrays)
        np.savez(path, **arrays)

    return spoil


def later_version(place):
    """Of whose class an argument is not known here."""
    get_config = modules.PixelCNN.get_config
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(modules.PixelCNN, "get_config", lambda model: {**get_config(model), "wings": 2})
        finish_with(place, "pixelcnn", modules.PixelCNN(4, (2, 2), filters=2, residual_blocks=1))


def unlink(name):
    return lambda place: (place.run / name).unlink()


def make_folder(name):
    """In the place of a file, which then can be neither read nor removed."""
    return lambda place: [(place.run / name).unlink(missing_ok=True), (place.run / name).mkdir()]


def of_another_vqvae(place):
    """Another VQ-VAE, with a checksum that says it belongs here."""
    settings, _ = train.parse_arguments(list(map(str, place.arguments[train])))
    finish_with(place, "vqvae", train.make_vqvae(settings, data_variance=2.0))


def unfinish(name):
    return edit_config(lambda config: config["finished"].pop(name))


def rename(place):
    first_slice(place.data, "test").rename(split_folder(place.data, "test") / "case_441_slice_9.nii.png")


def leave_one(split):
    """A slice, for the Frechet distance needs a covariance."""
    return lambda place: [path.unlink() for path in sorted(split_folder(place.data, split).iterdir())[1:]]


ANOTHER_MODEL = ("is not the model", "restore", "another --run")
OTHER_DATA, DELETE = ("{run}", "another --run", "restore"), ("{run}/vqvae_last.npz is broken", "delete it")
# A script, a place, what is done to it, and what the message must then have in it; {run} stands for the run.
REFUSED = [
    (train, "stopped", "an earlier version", edit_config(lambda c: c.pop("finished")), "{run}/config.json is broken"),
    (train, "stopped", "a slice less", lambda p: first_slice(p.data, "test").unlink(), "other test", *OTHER_DATA),
    (train, "stopped", "a slice renamed", rename, "other test", *OTHER_DATA),
    (
        *(train, "stopped", "a slice changed", lambda p: Image.new("L", (8, 8)).save(first_slice(p.data))),
        *("other train", *OTHER_DATA),
    ),
    (train, "stopped", "arrays cut", lambda p: cut(p.run / "vqvae_last.npz"), *DELETE),
    (train, "stopped", "arrays damaged", lambda p: damage(p.run / "vqvae_last.npz"), *DELETE),
    (train, "stopped", "arrays without bytes", lambda p: cut(p.run / "vqvae_last.npz", 0), *DELETE),
    (train, "stopped", "an array less", edit_arrays(lambda a: a.pop("best1")), *DELETE),
    (train, "stopped", "of another shape", edit_arrays(lambda a: a.update(last1=np.zeros(7))), *DELETE),
    (train, "trained", "no config.json", unlink("config.json"), "{run}", ".keras", "config.json", "another --run"),
    (train, "trained", "no VQ-VAE", unlink("vqvae.keras"), "{run}/vqvae.keras", *ANOTHER_MODEL),
    (train, "trained", "damaged VQ-VAE", lambda p: damage(p.run / "vqvae.keras"), "{run}/vqvae.keras", *ANOTHER_MODEL),
    (predict, "trained", "not there", lambda p: shutil.rmtree(p.run), "{run}: no run", "python train.py --run {run}"),
    (predict, "trained", "half of the PixelCNN", unfinish("pixelcnn"), "{run}", "not finished", "again"),
    (predict, "trained", "cut PixelCNN", lambda p: cut(p.run / "pixelcnn.keras"), "{run}/pixelcnn", *ANOTHER_MODEL),
    (predict, "trained", "later version", later_version, "{run}/pixelcnn.keras is of another version", "wings"),
    (predict, "trained", "config.json cut", lambda p: cut(p.run / "config.json"), "{run}/config.json is", "delete"),
    (predict, "trained", "another VQ-VAE", of_another_vqvae, "{run}/pixelcnn", "another vqvae.keras", "another --run"),
    (predict, "trained", "config.json a folder", make_folder("config.json"), "{run}/config.json", "directory", "mend"),
    (predict, "trained", "a model is a folder", make_folder("vqvae.keras"), "{run}/vqvae.keras", "directory", "mend"),
    (predict, "trained", "one training slice", leave_one("train"), "keras_png_slices_train", "2", "add"),
    (predict, "trained", "one test slice", leave_one("test"), "keras_png_slices_test", "2", "add"),
]


def contents(place):
    """Of all files but the lock."""
    return {path: path.read_bytes() for path in place.folder.rglob("[!.]*.*") if path.is_file()}


@pytest.mark.parametrize("row", cases([(f"{row[1]}, {row[2]}", row) for row in REFUSED]))
def test_a_run_that_cannot_go_on_or_be_measured_is_refused(row, request, refuse, tmp_path):
    """And not a byte of it is changed."""
    script, kind, _, spoil, *expected = row
    place = copy_of(request.getfixturevalue(kind), tmp_path / "place")
    edit_config(lambda config: config["data"].update(folder=str(place.data)))(place)
    spoil(place)
    before = contents(place)
    refuse(script, place.arguments[script], *(words.format(run=place.run) for words in expected))
    assert contents(place) == before


@pytest.mark.parametrize("flags", ["--seed 1", "--filters 8 16", "--no-mirror"])
def test_other_settings_are_refused_by_name(flags, stopped, refuse):
    flag = flags.split()[0].replace("--no-", "--")
    refuse(train, [*stopped.arguments[train], *flags.split()], str(stopped.run), f"{flag} ", "choose another --run")


def test_a_run_that_is_a_file_or_in_one_is_refused(data, refuse, tmp_path):
    run = tmp_path / "run"
    run.write_text("a file")
    refuse(train, ["--data", data, "--run", run], f"{run} cannot be written", "File exists", "mend")
    refuse(train, ["--data", data, "--run", run / "inside"], f"{run / 'inside'} cannot be written", "mend")
    refuse(predict, ["--run", run], f"--run {run}", "train.py")


HOLD_THE_RUN = """
import pathlib, sys, time, train
with train.Run(pathlib.Path(sys.argv[1])).one_writer():
    print("here", flush=True)
    time.sleep(600)
"""


def test_a_run_has_one_writer_and_one_that_was_killed_leaves_no_lock(trained, refuse, tmp_path, monkeypatch):
    place = copy_of(trained, tmp_path / "place")
    edit_config(lambda config: config["data"].update(folder=str(place.data)))(place)
    command = [sys.executable, "-c", HOLD_THE_RUN, place.run]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "here\n"
        for script in (train, predict):
            refuse(script, place.arguments[script], f"--run {place.run} is being written by another process", "wait")
        other.kill()
    assert train.main(list(map(str, place.arguments[train]))) == 0  # finished, and free again


def test_a_home_is_found_and_other_libraries_are_refused(refuse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    refuse(train, ["--data=~/none", "--run=~/run"], f"{tmp_path}/none: no such folder", "--data")
    refuse(predict, ["--run=~/run"], f"--run {tmp_path}/run: no run here")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    refuse(predict, ["--run=~/run"], "Keras already runs on jax", "restart Python")


def test_what_a_run_cannot_draw_is_refused(trained, refuse, tmp_path):
    """Before a slice is read: the data are gone, and else nothing is said of it."""
    place = copy_of(trained, tmp_path / "place")
    edit_config(lambda config: config["data"].update(folder="gone"))(place)
    refuse(predict, ["--run", place.run], "gone: no such folder", "unzipped")  # control
    for number in (2, -1):
        refuse(predict, ["--run", place.run, "--slice", 1, number], f"--slice {number}", "slice numbers 0, 1")
    refuse(predict, ["--run", place.run, "--slice", 0, 1], "gone: no such folder")  # control
    settings, _ = train.parse_arguments([*TINY, "--no-below"])
    finish_with(place, "pixelcnn", train.make_pixelcnn(settings))
    refuse(predict, ["--run", place.run, "--slice", 0], "--slice 0", "no slice numbers")
    refuse(predict, ["--run", place.run, "--heads", 1], "--heads", "without --no-below")


# ---- As a user sees it ---------------------------------------------------------------


def suggested(text):
    """The words of the command that a message suggests, as a shell would read them."""
    return shlex.split(re.search(r"(?:python|delete) (.*)", text)[1])


def test_a_suggested_command_can_be_pasted_whatever_the_folder_is_called(data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "my 'first' run"
    assert predict.main(["--run", str(run)]) == 2
    assert suggested(capsys.readouterr().err) == ["train.py", "--run", str(run)]
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert predict.main(["--run", str(run)]) == 2
    assert suggested(capsys.readouterr().err) == [str(run)]
    (run / "config.json").unlink()
    for name in ("fit_vqvae", "fit_pixelcnn"):
        monkeypatch.setattr(train, name, lambda *arguments: None)  # no need to fit what is not looked at
    assert train.main(["--data", str(data), "--run", str(run), *TINY]) == 0
    assert suggested(capsys.readouterr().out) == ["predict.py", "--run", str(run)]


def test_the_exit_code_and_the_line_of_a_real_process(refuse, tmp_path):
    finished = run_script("train.py", "--data", "nowhere", cwd=tmp_path)
    message = finished.stderr[finished.stderr.index("train.py: ") :]  # before it, TensorFlow says what it runs on
    assert_refused("train", finished.returncode, message, "nowhere", "unzipped")
    assert not list(tmp_path.iterdir())  # no empty run either
    refuse(dataset, [tmp_path / "nowhere"], "nowhere", "unzipped")
