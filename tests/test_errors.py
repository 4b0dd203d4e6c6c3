"""What a user can get wrong: each ends with one line that names the file or flag and the remedy."""

import dataclasses
import errno
import os
import pathlib
import re
import runpy
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
from conftest import ROOT, TINY, cut, eagerly, files_in, killed_before, write_data, write_slices
from PIL import Image

# ---- Flags ---------------------------------------------------------------------------

FLAGS = {
    "misspelt, train": (train, "--vqvae-epohcs 3", "--vqvae-epohcs"),
    "abbreviated, predict": (predict, "--temp 1", "--temp"),
    "a word that belongs to no flag": (train, "keras_png_slices_data", "keras_png_slices_data"),
    "a switch with a value": (train, "--mirror=yes", "--mirror"),
    "demo and data": (train, "--demo --data here", "--demo", "--data", "leave out"),
    "half an epoch": (train, "--vqvae-epochs 1.5", "--vqvae-epochs", "1.5"),
    "odd filters": (train, "--pixelcnn-filters 63", "--pixelcnn-filters", "even", "63"),
    "too many halvings": (train, "--vqvae-filters 8 8 8 8 8 8 8", "--vqvae-filters", "64", "7"),
    "no folder of slices": (train, "--data=", "--data", "empty"),
    "no folder of a run": (predict, "--run=", "--run", "empty"),
    "temperature 0": (predict, "--temperature 0", "--temperature", "from 0.01 to 100", "not 0"),
    "temperature nan": (predict, "--temperature nan", "--temperature", "nan"),
    "no samples": (predict, "--num-samples 0", "--num-samples", "from 1", "not 0"),
    "no heads": (predict, "--heads 0", "--heads", "from 1", "not 0"),
    "two slice numbers for all": (predict, "--anomalies x --slice 1 2", "one number"),
    "anomalies and completions": (predict, "--anomalies x --complete", "leave out"),
    "anomalies and heads": (predict, "--anomalies x --heads 1", "leave out"),
    "anomalies and temperature": (predict, "--anomalies x --temperature 2", "leave out"),
    "seed beyond int32": (predict, f"--seed {2**31}", "--seed", "from 0 to"),
}


@pytest.mark.parametrize("row", FLAGS.values(), ids=FLAGS)
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


# ---- Data, and the run directory -----------------------------------------------------

SETTINGS, _ = train.parse_arguments(TINY)


def arguments(script, place):
    """Of train.py or predict.py, for a place: a folder with slices in data, and a run of them in run."""
    return ["--data", f"{place}/data", "--run", f"{place}/run", *(TINY if script is train else [])]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A place without a run."""
    place = tmp_path_factory.mktemp("fresh")
    write_data(place / "data", train=[1, 2], validate=[402], test=[441])
    return place


@pytest.fixture(scope="module")
def stopped(fresh, tmp_path_factory):
    """A place where training was killed when the VQ-VAE was about to be finished."""
    place = shutil.copytree(fresh, tmp_path_factory.mktemp("stopped") / "place")
    with eagerly(), killed_before("replace", "vqvae.keras"):
        train.main(arguments(train, place))
    assert files_in(place / "run") == ["config.json", "vqvae_history.csv", "vqvae_last.npz", "vqvae_loss.png"]
    return place


@pytest.fixture(scope="module")
def trained(fresh, tmp_path_factory):
    """A place whose run has both models, as far as the scripts look before they train or measure."""
    place = shutil.copytree(fresh, tmp_path_factory.mktemp("trained") / "place")
    run = train.Run(place / "run")
    run.folder.mkdir()
    run.start(SETTINGS, place / "data", dataset.fingerprint(dataset.load(place / "data")), False)
    run.finish("vqvae", train.make_vqvae(SETTINGS), {})
    finish_pixelcnn(run.folder, train.make_prior(SETTINGS, range(2), below=True))
    return place


def finish_pixelcnn(folder, model):
    """As if it had been fitted on the codes of the VQ-VAE that is there."""
    run = train.Run(folder)
    run.finish("pixelcnn", model, {"vqvae": run.config["finished"]["vqvae"]["sha256"]})


def later_version(run):
    """A prior of whose class an argument is not known here."""
    get_config = modules.Prior.get_config
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(modules.Prior, "get_config", lambda model: {**get_config(model), "wings": 2})
        finish_pixelcnn(run, train.make_prior(SETTINGS))


def another_vqvae(run):
    """Another VQ-VAE, with a checksum that says it belongs here."""
    train.Run(run).finish("vqvae", train.make_vqvae(SETTINGS, data_variance=2.0), {})


def damage(path):
    """Change a byte in the middle of a file, as a failing disk does, and some beside it."""
    content = bytearray(path.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 16)
    content[middle] = bytes(255 - byte for byte in content[middle])
    path.write_bytes(content)


def make_folder(path):
    """An empty one, in the place of a folder or a file, which then can be neither read nor removed."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir()


def without(word):
    """An object of that name in a JSON file."""
    return lambda path: path.write_text(path.read_text().replace(f'"{word}": {{', '"other": {'))


def of_another_vqvae(path):
    """What a stopped training goes on from, as that of a stage on the codes of another VQ-VAE."""
    rows = str(np.load(path)["rows"]).replace("{}", '{"vqvae": "another"}', 1)
    np.savez(path, **{**np.load(path), "rows": rows})


TRAIN, VALIDATE, TEST = (f"data/keras_png_slices_{split}" for split in dataset.SPLITS)
FIRST, SLICE = f"{TRAIN}/case_001_slice_0.nii.png", f"{TEST}/case_441_slice_0.nii.png"
CONFIG, LAST, VQVAE, PIXELCNN = "run/config.json", "run/vqvae_last.npz", "run/vqvae.keras", "run/pixelcnn.keras"
BROKEN, NOT_THE_MODEL = ("{path} is broken", "delete it"), ("{path} is not the model", "restore", "another --run")
OTHER_DATA = ("{run}", "another --run", "restore")
# A script, a place, a file or folder in it, what is done to that, and what the message must then have in it.
REFUSED = {
    "no folder": (train, "fresh", "data", shutil.rmtree, "{path}: no such folder", "unzipped"),
    "a file": (train, "fresh", "data", lambda p: [shutil.rmtree(p), p.write_bytes(b"PK")], "{path}", "unzipped"),
    "an empty folder": (train, "fresh", "data", make_folder, "{path}", "keras_png_slices_train", "unzip"),
    "no test folder": (train, "fresh", TEST, shutil.rmtree, "{data}", "keras_png_slices_test", "unzip"),
    "empty validate folder": (train, "fresh", VALIDATE, make_folder, "{path}", "seg_", "unzip"),
    "damaged PNG": (train, "fresh", FIRST, damage, "1 unreadable", "{path}", "restore or delete"),
    "link to nothing": (train, "fresh", f"{TRAIN}/a.png", lambda p: p.symlink_to("gone"), "1 unreadable", "{path}"),
    "one subject and no validate folder": (
        *(train, "fresh", "data", lambda p: [shutil.rmtree(p), write_data(p, train=[1], test=[441])]),
        *("one subject", "validate", "add"),
    ),
    "train in a file": (train, "fresh", "run", pathlib.Path.touch, "{path} cannot be written", "File exists", "fix"),
    "a file for a run": (predict, "fresh", "run", pathlib.Path.touch, "--run {path}", "train.py"),
    "an earlier version": (train, "stopped", CONFIG, without("finished"), "{path} is broken"),
    "a slice less": (train, "stopped", SLICE, os.unlink, "other test", *OTHER_DATA),
    "a slice renamed": (train, "stopped", SLICE, lambda p: p.rename(f"{p}.png"), "other test", *OTHER_DATA),
    "a slice changed": (train, "stopped", FIRST, Image.new("L", (8, 8)).save, "other train", *OTHER_DATA),
    "arrays cut": (train, "stopped", LAST, cut, *BROKEN),
    "arrays damaged": (train, "stopped", LAST, damage, *BROKEN),
    "arrays without bytes": (train, "stopped", LAST, lambda p: cut(p, 0), *BROKEN),
    "an array less": (train, "stopped", LAST, lambda p: np.savez(p, **dict([*np.load(p).items()][:-1])), *BROKEN),
    "another shape": (train, "stopped", LAST, lambda p: np.savez(p, **{**np.load(p), "last1": np.zeros(7)}), *BROKEN),
    "another stage": (train, "stopped", LAST, of_another_vqvae, "{path} was fitted on the codes of another", "delete"),
    "no config.json": (train, "trained", CONFIG, os.unlink, "{run}", ".keras", "config.json", "another --run"),
    "no VQ-VAE": (train, "trained", VQVAE, os.unlink, *NOT_THE_MODEL),
    "damaged VQ-VAE": (train, "trained", VQVAE, damage, *NOT_THE_MODEL),
    "no run": (predict, "trained", "run", shutil.rmtree, "{path}: no run", "python train.py --run {path}"),
    "half of it": (predict, "trained", CONFIG, without("pixelcnn"), "{run}", "not finished", "again"),
    "cut PixelCNN": (predict, "trained", PIXELCNN, cut, *NOT_THE_MODEL),
    "later version": (predict, "trained", "run", later_version, "{path}/pixelcnn.keras is of another version", "wings"),
    "config.json cut": (predict, "trained", CONFIG, cut, "{path} is", "delete"),
    "another VQ-VAE": (predict, "trained", "run", another_vqvae, "{path}/pixelcnn", "another vqvae", "another --run"),
    "config.json a folder": (predict, "trained", CONFIG, make_folder, "{path}", "directory", "fix"),
    "a model is a folder": (predict, "trained", VQVAE, make_folder, "{path}", "directory", "fix"),
}


def contents(place):
    """Of all files and folders but the lock."""
    return {path: path.is_file() and path.read_bytes() for path in place.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_on_or_gone_on_with_or_measured_is_refused(row, request, refuse, tmp_path):
    """And not a byte is changed, and no run started."""
    script, kind, path, spoil, *expected = row
    original = request.getfixturevalue(kind)
    place = shutil.copytree(original, tmp_path / "place")
    for config in place.glob("run/config.json"):  # would be written again, for the slices have moved
        config.write_text(config.read_text().replace(str(original), str(place)))
    spoil(place / path)
    before = contents(place)
    names = {"path": place / path, "data": place / "data", "run": place / "run"}
    refuse(script, arguments(script, place), *(words.format(**names) for words in expected))
    assert contents(place) == before


def test_all_unreadable_files_are_counted_and_ten_named(data, refuse, tmp_path):
    """Twelve broken in four ways, PNGs and JPEGs, among as many whole ones."""
    folder, endings = data / "keras_png_slices_train", enumerate(["png"] * 6 + ["jpg"] * 6, start=2)
    names = [f"slice_{number}.{ending}" for number, ending in endings]
    whole, broken = ([folder / f"case_{case:03d}_{name}" for name in names] for case in (1, 2))
    write_slices(folder, [path.name for path in whole + broken])
    ways = cut, lambda p: cut(p, 0), lambda p: p.write_text("text"), make_folder
    for i, path in enumerate(broken):
        ways[i % 4](path)
    ten = ", ".join(map(str, broken[:10]))
    line = refuse(train, ["--data", data, "--run", tmp_path / "run", *TINY], "12 unreadable", ten, "restore or delete")
    assert not any(str(path) in line for path in whole + broken[10:])


@pytest.mark.parametrize("flags", ["--seed 1", "--vqvae-filters 8 16", "--no-mirror"])
def test_other_settings_are_refused_by_name(flags, stopped, refuse):
    flag = flags.split()[0].replace("--no-", "--")
    expected = f"{stopped}/run", f"{flag} ", "choose another --run"
    refuse(train, [*arguments(train, stopped), *flags.split()], *expected)


HOLD = "import filelock, sys, time; held = filelock.FileLock(sys.argv[1]).acquire(); print(flush=True); time.sleep(600)"


def test_a_run_has_one_writer_and_one_that_was_killed_leaves_no_lock(trained, refuse):
    expected = f"--run {trained}/run is being written by another process", "wait"
    with train.Run(trained / "run").one_writer():
        for script in (train, predict):
            refuse(script, arguments(script, trained), *expected)
    command = [sys.executable, "-c", HOLD, trained / "run/.lock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        refuse(train, arguments(train, trained), *expected)
        other.kill()
    assert train.main(arguments(train, trained)) == 0  # finished, and free again


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_that_cannot_be_had_is_not_one_that_is_held(trained, refuse, monkeypatch):
    """Where a mount has none, filelock makes the file itself the lock. An empty one, copied with a run, is free."""
    lock = trained / "run/.lock"

    def fail(number):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", lambda *arguments: fail(errno.ENOLCK))
    refuse(train, arguments(train, trained), f"{lock} cannot be written ({os.strerror(errno.ENOLCK)})")
    monkeypatch.setattr("fcntl.flock", lambda *arguments: fail(errno.ENOSYS))
    lock.write_text("7\nelsewhere\n")
    for script in (train, predict):
        whose = f"--run {trained}/run is being written by process 7 on elsewhere"
        refuse(script, arguments(script, trained), whose, f"if that process is gone, delete {lock}")
    lock.write_text("")
    assert train.main(arguments(train, trained)) == 0 and not lock.exists()


def test_a_home_is_found_and_other_libraries_are_refused(refuse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    refuse(train, ["--data=~/none", "--run=~/run"], f"{tmp_path}/none: no such folder", "--data")
    refuse(predict, ["--run=~/run"], f"--run {tmp_path}/run: no run here")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    refuse(predict, ["--run=~/run"], "Keras already runs on jax", "restart Python")


def test_what_a_run_cannot_draw_is_refused(trained, refuse, tmp_path):
    """Before a slice is read: the data are gone, and else nothing is said of it."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    gone = ["--run", run, "--data", "gone"]
    refuse(predict, gone, "gone: no such folder", "unzipped")  # control
    for number in (2, -1):
        refuse(predict, [*gone, "--slice", 1, number], f"--slice {number}", "slice numbers 0, 1")
    refuse(predict, [*gone, "--slice", 0, 1], "gone: no such folder")  # control
    finish_pixelcnn(run, train.make_prior(SETTINGS))
    refuse(predict, [*gone, "--slice", 0], "--slice 0", "no slice numbers")
    refuse(predict, [*gone, "--heads", 1], "--heads", "without --no-below")


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


@pytest.mark.parametrize("call", ["train.py --data nowhere", "predict.py --run nowhere", "dataset.py nowhere"])
def test_a_script_called_as_a_program_ends_with_exit_code_2_and_one_line(call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", call.split())
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    assert stop.value.code == 2 and not list(tmp_path.iterdir())  # no empty run either
    assert re.fullmatch(rf"{sys.argv[0]}: .*nowhere: no .*(unzipped|train\.py).*\n", capsys.readouterr().err)
