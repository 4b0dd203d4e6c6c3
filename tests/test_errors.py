"""What a user can get wrong: each ends with one line that names the file or flag and the remedy."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from conftest import TINY, run_script
from PIL import Image
from test_dataset import write_data, write_slices

import dataset
import modules
import predict
import train

# Lines on stderr that are not the message: the usage that argparse puts before an error.
USAGE = re.compile(r"usage: |\s")


def assert_refused(script, code, stderr, *expected):
    """Exit code 2, and one line that begins with the script's name and has all that is expected in it: that line."""
    lines = [line for line in stderr.splitlines() if not USAGE.match(line)]
    assert code == 2 and "Traceback" not in stderr
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: "), stderr
    for words in expected:
        assert words in lines[0]
    return lines[0]


@pytest.fixture
def refuse(capsys, monkeypatch):
    """Call the main() of a script, which must refuse its arguments as `assert_refused` says."""

    def check(script, arguments, *expected):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])  # argparse begins its message with it
        capsys.readouterr()
        try:
            code = script.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert "done: " not in printed.out
        return assert_refused(script.__name__, code, printed.err, *expected)

    return check


def cases(table):
    """Rows of (name, ...) as parameters that pytest lists by their names."""
    return [pytest.param(*rest, id=name) for name, *rest in table]


def cut(path, share=0.5):
    """Leave the first part of a file, as a stopped download or a full disk does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def damage(path):
    """Change some bytes in the middle of a file, as a failing disk does."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 16)
    content[middle] = bytes(byte ^ 0xFF for byte in content[middle])
    path.write_bytes(content)


# --------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------

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
    ("one sample has no covariance", predict, "--num-samples 1", "--num-samples", "at least 2"),
    ("no heads", predict, "--heads 0", "--heads", "at least 1"),
    ("seed beyond int32", predict, f"--seed {2**31}", "--seed", "from 0 to"),
    ("slice -1", predict, "--slice 3 -1", "--slice", "at least 0", "-1"),
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


# --------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A folder of slices with nothing wrong in it, yet."""
    return write_data(tmp_path / "keras_png_slices_data", train=[1, 2], validate=[402], test=[441])


def split_folder(data, name="train"):
    return data / f"keras_png_slices_{name}"


def first_slice(data, name="train"):
    return min(split_folder(data, name).iterdir())


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# What is done to the data, and what the message must then have in it; {train} stands for the folder of that split.
BAD_DATA = [
    ("no folder", shutil.rmtree, "--data {data}", "no such folder", "unzipped"),
    ("a file", lambda d: [shutil.rmtree(d), d.write_bytes(b"PK")], "--data {data}", "unzipped"),
    ("an empty folder", empty, "--data {data}", "keras_png_slices_train", "unzip"),
    ("no test folder", lambda d: shutil.rmtree(split_folder(d, "test")), "{data}", "keras_png_slices_test", "unzip"),
    ("empty validate folder", lambda d: empty(split_folder(d, "validate")), "{validate}", "seg_", "unzip"),
    ("damaged PNG", lambda d: damage(first_slice(d)), "1 unreadable", "{first}", "restore or delete"),
    ("link to nothing", lambda d: (split_folder(d) / "a.png").symlink_to("gone"), "1 unreadable", "{train}/a.png"),
    (
        "a subject in two splits",
        lambda d: shutil.copy(first_slice(d), split_folder(d, "test")),
        *("case_001", "train and test", "remove"),
    ),
    (
        "one subject and no validate folder",
        lambda d: [shutil.rmtree(split_folder(d, "validate")), *(p.unlink() for p in split_folder(d).glob("*_002_*"))],
        *("one subject", "validate", "add"),
    ),
]


@pytest.mark.parametrize("row", cases([(name, row) for name, *row in BAD_DATA]))
def test_bad_data_is_refused(row, data, refuse, tmp_path):
    spoil, *expected = row
    names = {"data": data, "first": first_slice(data), **{name: split_folder(data, name) for name in dataset.SPLITS}}
    spoil(data)
    arguments = ["--data", data, "--run", tmp_path / "run", *TINY]
    refuse(train, arguments, *(words.format(**names) for words in expected))
    assert not (tmp_path / "run" / "config.json").exists()  # no run was started


def test_all_unreadable_files_are_counted_and_ten_named(data, refuse, tmp_path):
    """Twelve broken in four ways, PNGs and JPEGs, among as many whole ones."""
    folder = split_folder(data)
    endings = ["png"] * 6 + ["jpg"] * 6
    whole, broken = ([folder / f"case_{case:03d}_slice_{i}.{end}" for i, end in enumerate(endings)] for case in (1, 2))
    write_slices(folder, [path.name for path in whole + broken])
    ways = (
        cut,
        lambda path: cut(path, 0),
        lambda path: path.write_text("text"),
        lambda path: [path.unlink(), path.mkdir()],
    )
    for i, path in enumerate(broken):
        ways[i % 4](path)
    ten = ", ".join(map(str, broken[:10]))
    line = refuse(train, ["--data", data, "--run", tmp_path / "run", *TINY], "12 unreadable", ten, "restore or delete")
    assert not any(str(path) in line for path in whole + broken[10:])


# --------------------------------------------------------------------------------------
# The run directory
# --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Place:
    """Slices and a run that was made of them; `train` is the command that continues it."""

    folder: os.PathLike

    def __post_init__(self):
        self.data, self.run = self.folder / "keras_png_slices_data", self.folder / "run"
        self.train = ["--data", self.data, "--run", self.run, *TINY]


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

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train.Checkpoint, "on_epoch_begin", begin_or_stop)
        assert train.main(list(map(str, place.train))) == 130
    assert {path.name for path in place.run.iterdir()} == {"config.json", "vqvae_last.npz", "vqvae_history.csv"}
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A place whose run has both models, as far as the scripts look before they train or measure."""
    place = Place(tmp_path_factory.mktemp("trained"))
    write_data(place.data, train=[1, 2], validate=[402], test=[441])
    settings, options = train.parse_arguments(list(map(str, place.train)))
    train.prepare_run(settings, options)
    finish_with(place, "vqvae", train.make_vqvae(settings))
    finish_with(place, "pixelcnn", train.make_pixelcnn(settings, num_labels=2))
    return place


def finish_with(place, name, model):
    model.save(place.run / f"{name}.keras")
    checksum = dataset.file_checksum(place.run / f"{name}.keras")
    edit_config(lambda config: config["finished"].update({name: checksum}))(place)


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


# What is done to the place, and what train.py's message must have in it, beside the path of the run.
ANOTHER_MODEL = ("is not the model", "restore", "another --run")
REFUSED = [
    ("stopped", "config.json cut", lambda p: cut(p.run / "config.json"), "config.json is broken", "another --run"),
    ("stopped", "config.json of an earlier version", edit_config(lambda c: c.pop("finished")), "config.json", "broken"),
    (
        "stopped",
        "a slice less",
        lambda p: first_slice(p.data, "test").unlink(),
        "test",
        "2, now 1",
        "another --run",
        "restore",
    ),
    (
        "stopped",
        "another slice",
        lambda p: Image.new("L", (8, 8)).save(first_slice(p.data)),
        "train",
        "another --run",
        "restore",
    ),
    ("stopped", "arrays cut", lambda p: cut(p.run / "vqvae_last.npz"), "vqvae_last.npz is broken", "delete it"),
    ("stopped", "arrays damaged", lambda p: damage(p.run / "vqvae_last.npz"), "vqvae_last.npz", "delete it"),
    ("stopped", "arrays without bytes", lambda p: cut(p.run / "vqvae_last.npz", 0), "vqvae_last.npz", "delete it"),
    ("stopped", "an array less", edit_arrays(lambda a: a.pop("best1")), "vqvae_last.npz", "delete it"),
    ("stopped", "of another shape", edit_arrays(lambda a: a.update(last1=np.zeros(7))), "vqvae_last.npz", "delete it"),
    ("trained", "no config.json", unlink("config.json"), ".keras", "config.json", "another --run"),
    ("trained", "no VQ-VAE", unlink("vqvae.keras"), "vqvae.keras", *ANOTHER_MODEL),
    ("trained", "damaged VQ-VAE", lambda p: damage(p.run / "vqvae.keras"), "vqvae.keras", *ANOTHER_MODEL),
    ("trained", "another PixelCNN", lambda p: cut(p.run / "pixelcnn.keras"), "pixelcnn.keras", *ANOTHER_MODEL),
]


@pytest.mark.parametrize("row", cases([(f"{kind}, {name}", (kind, *row)) for kind, name, *row in REFUSED]))
def test_a_run_that_cannot_go_on_is_refused(row, request, refuse, tmp_path):
    """And not a byte of it is changed."""
    kind, spoil, *expected = row
    place = copy_of(request.getfixturevalue(kind), tmp_path / "place")
    spoil(place)
    before = {path.name: path.read_bytes() for path in place.run.iterdir()}
    refuse(train, place.train, str(place.run), *expected)
    assert {path.name: path.read_bytes() for path in place.run.iterdir()} == before


@pytest.mark.parametrize("flags", ["--seed 1", "--filters 8 16", "--no-mirror"])
def test_other_settings_are_refused_by_name(flags, stopped, refuse):
    flag = flags.split()[0].replace("--no-", "--")
    refuse(train, [*stopped.train, *flags.split()], str(stopped.run), f"{flag} ", "choose another --run")


def test_a_run_that_is_a_file_or_in_one_is_refused(data, refuse, tmp_path):
    (tmp_path / "run").write_text("a file")
    refuse(train, ["--data", data, "--run", tmp_path / "run"], f"--run {tmp_path / 'run'}", "file", "choose another")
    refuse(predict, ["--run", tmp_path / "run"], f"--run {tmp_path / 'run'}", "train.py")
    inside = tmp_path / "run" / "inside"
    refuse(train, ["--data", data, "--run", inside], f"--run {inside} cannot be created", "choose another")


def unfinish(name):
    return edit_config(lambda config: config["finished"].pop(name))


# What is done to a trained run, and what predict.py's message must have in it, beside the path of the run.
BAD_RUNS = [
    ("not there", lambda p: shutil.rmtree(p.run), "no run", "python train.py --run"),
    ("half of the PixelCNN", unfinish("pixelcnn"), "pixelcnn", "again"),
    ("another VQ-VAE", lambda p: shutil.copy(p.run / "pixelcnn.keras", p.run / "vqvae.keras"), *ANOTHER_MODEL),
    ("PixelCNN of a later version", later_version, "pixelcnn.keras is of another version", "wings", "another --run"),
    ("config.json cut", lambda p: cut(p.run / "config.json"), "config.json is broken", "delete"),
]


@pytest.mark.parametrize("row", cases([(name, row) for name, *row in BAD_RUNS]))
def test_a_run_that_cannot_be_measured_is_refused(row, trained, refuse, tmp_path):
    spoil, *expected = row
    place = copy_of(trained, tmp_path / "place")
    spoil(place)
    refuse(predict, ["--run", place.run], str(place.run), *expected)


def test_what_a_run_cannot_draw_is_refused(trained, refuse, tmp_path):
    """Before a slice is read."""
    place = copy_of(trained, tmp_path / "place")
    shutil.rmtree(place.data)
    refuse(predict, ["--run", place.run, "--slice", 1, 2], "--slice", "from 0 to 1", "not 2")
    settings, _ = train.parse_arguments([*TINY, "--no-below"])
    finish_with(place, "pixelcnn", train.make_pixelcnn(settings))
    refuse(predict, ["--run", place.run, "--slice", 1], "--slice", "knows no slice numbers")
    refuse(predict, ["--run", place.run, "--heads", 1], "--heads", "train without --no-below")


def test_data_that_moved_since_training_is_missed_by_name(trained, refuse, tmp_path):
    place = copy_of(trained, tmp_path / "place")
    edit_config(lambda config: config["data"].update(folder=str(place.folder / "gone")))(place)
    refuse(predict, ["--run", place.run], f"--data {place.folder / 'gone'}", "no such folder", "unzipped")


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_slice_is_too_few_to_measure_on(split, trained, refuse, tmp_path):
    """The Frechet distance needs a covariance, of the training and of the test slices."""
    place = copy_of(trained, tmp_path / "place")
    for path in sorted(split_folder(place.data, split).iterdir())[1:]:
        path.unlink()
    refuse(predict, ["--run", place.run, "--data", place.data], f"keras_png_slices_{split}", "2", "add")


# --------------------------------------------------------------------------------------
# As a user sees it
# --------------------------------------------------------------------------------------


def suggested(text):
    """The words of the command that a message suggests, as a shell would read them."""
    return shlex.split(re.search(r"(?:python|delete) (.*)", text)[1])


def test_a_suggested_command_can_be_pasted_whatever_the_folder_is_called(tmp_path, monkeypatch, capsys):
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
    data = write_data(tmp_path / "data", train=[1], validate=[402], test=[441])
    assert train.main(["--data", str(data), "--run", str(run), *TINY]) == 0
    assert suggested(capsys.readouterr().out) == ["predict.py", "--run", str(run)]


def test_the_exit_code_and_the_line_of_a_real_process(refuse, tmp_path):
    finished = run_script("train.py", "--data", "nowhere", cwd=tmp_path)
    message = finished.stderr[finished.stderr.index("train.py: ") :]  # before it, TensorFlow says what it runs on
    assert_refused("train", finished.returncode, message, "nowhere", "unzipped")
    assert not list(tmp_path.iterdir())  # no empty run either
    refuse(dataset, [tmp_path / "nowhere"], "nowhere", "unzipped")
