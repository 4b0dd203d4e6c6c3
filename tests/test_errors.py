"""What a user can get wrong: each ends with one line that names the file or flag and the remedy."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import sys
import zipfile

import keras
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
    ("misspelt, predict", predict, "--temprature 1", "--temprature"),
    ("abbreviated, train", train, "--vqvae-e 3", "--vqvae-e"),
    ("abbreviated, predict", predict, "--temp 1", "--temp"),
    ("of the other script", predict, "--demo", "--demo"),
    ("a word that belongs to no flag", train, "keras_png_slices_data", "keras_png_slices_data"),
    ("value left out", train, "--pixelcnn-epochs", "--pixelcnn-epochs"),
    ("no value for filters", train, "--filters --mirror", "--filters"),
    ("a switch with a value", train, "--mirror=yes", "--mirror"),
    ("demo and data", train, "--demo --data here", "--demo", "--data", "leave out"),
    ("vqvae epochs 0", train, "--vqvae-epochs 0", "--vqvae-epochs", "from 1 to", "0"),
    ("pixelcnn epochs 0", train, "--pixelcnn-epochs 0", "--pixelcnn-epochs", "from 1 to", "0"),
    ("half an epoch", train, "--vqvae-epochs 1.5", "--vqvae-epochs", "1.5"),
    ("beta 3", train, "--commitment-cost 3", "--commitment-cost", "from 0.25 to 2", "3"),
    ("beta 0.2", train, "--commitment-cost 0.2", "--commitment-cost", "from 0.25 to 2", "0.2"),
    ("dropout 1.5", train, "--dropout 1.5", "--dropout", "from 0", "1.5"),
    ("learning rate 0", train, "--vqvae-learning-rate 0", "--vqvae-learning-rate", "from 1e-08"),
    ("seed -1, train", train, "--seed -1", "--seed", "from 0 to", "-1"),
    ("odd filters", train, "--pixelcnn-filters 63", "--pixelcnn-filters", "even", "63"),
    ("too many halvings", train, "--filters 8 8 8 8 8 8 8", "--filters", "64", "7"),
    ("one of the filters 0", train, "--filters 8 0", "--filters", "from 1 to", "0"),
    ("temperature 0", predict, "--temperature 0", "--temperature", "not 0"),
    ("temperature -1", predict, "--temperature -1", "--temperature", "not -1"),
    ("temperature nan", predict, "--temperature nan", "--temperature", "nan"),
    ("temperature inf", predict, "--temperature inf", "--temperature", "inf"),
    ("temperature 0 as a float32", predict, "--temperature 1e-50", "--temperature", "1e-50"),
    ("temperature infinite as a float32", predict, "--temperature 1e50", "--temperature", "1e+50"),
    ("no samples", predict, "--num-samples 0", "--num-samples", "at least 2"),
    ("one sample has no covariance", predict, "--num-samples 1", "--num-samples", "at least 2"),
    ("seed -1, predict", predict, "--seed -1", "--seed", "from 0 to", "-1"),
    ("seed beyond int32", predict, f"--seed {2**31}", "--seed", "from 0 to"),
    ("slice -1", predict, "--slice 3 -1", "--slice", "at least 0", "-1"),
    ("no slice", predict, "--slice", "--slice"),
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


def replace_by_file(path):
    shutil.rmtree(path)
    path.write_bytes(b"PK")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def leave_masks_only(data):
    for path in split_folder(data).iterdir():
        path.rename(path.with_name(path.name.replace("case_", "seg_")))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def cut_jpeg(data):
    path = split_folder(data) / "case_009_slice_0.jpg"
    write_slices(path.parent, [path.name])
    cut(path)


# What is done to the data, and what the message must then have in it; {train} stands for the folder of that split.
BAD_DATA = [
    ("no folder", shutil.rmtree, "--data {data}", "no such folder", "unzipped"),
    ("a file", replace_by_file, "--data {data}", "unzipped"),
    ("empty", empty, "--data {data}", "keras_png_slices_train", "unzip"),
    ("no train folder", lambda d: shutil.rmtree(split_folder(d)), "{data}", "keras_png_slices_train", "unzip"),
    ("no test folder", lambda d: shutil.rmtree(split_folder(d, "test")), "{data}", "keras_png_slices_test", "unzip"),
    ("empty train folder", lambda d: empty(split_folder(d)), "{train}", "unzip"),
    ("empty validate folder", lambda d: empty(split_folder(d, "validate")), "{validate}", "unzip"),
    ("empty test folder", lambda d: empty(split_folder(d, "test")), "{test}", "unzip"),
    ("only masks", leave_masks_only, "{train}", "seg_", "unzip"),
    ("cut PNG", lambda d: cut(first_slice(d)), "1 unreadable", "{first}", "restore or delete"),
    ("damaged PNG", lambda d: damage(first_slice(d)), "1 unreadable", "{first}", "restore or delete"),
    ("cut JPEG", cut_jpeg, "1 unreadable", "{train}/case_009_slice_0.jpg", "restore or delete"),
    ("PNG of no bytes", lambda d: cut(first_slice(d), 0), "1 unreadable", "{first}", "restore or delete"),
    ("text named .png", lambda d: first_slice(d).write_text("Not Found"), "1 unreadable", "{first}", "restore"),
    ("folder named .png", lambda d: replace_by_folder(first_slice(d)), "1 unreadable", "{first}", "restore or delete"),
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
    """Twelve broken in four ways, among as many whole ones."""
    folder = split_folder(data)
    whole, broken = ([folder / f"case_{case:03d}_slice_{index}.png" for index in range(12)] for case in (1, 2))
    write_slices(folder, [path.name for path in whole + broken])
    ways = (cut, lambda path: cut(path, 0), lambda path: path.write_text("text"), replace_by_folder)
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
    """A place where training was stopped in the second epoch of the VQ-VAE, after its history was written."""
    place = Place(tmp_path_factory.mktemp("stopped"))
    write_data(place.data, train=[1, 2], validate=[402], test=[441])
    rename, renamed = os.replace, []

    def rename_or_stop(source, target):
        renamed.append(os.path.basename(target))
        if renamed.count("vqvae_last.keras") == 2:
            raise KeyboardInterrupt
        rename(source, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "replace", rename_or_stop)
        assert train.main(list(map(str, place.train))) == 130
    assert len((place.run / "vqvae_history.csv").read_text().splitlines()) == 3
    return place


@pytest.fixture(scope="module")
def trained(stopped, tmp_path_factory):
    """A place whose run has both models, as far as the scripts look before they train or measure."""
    place = Place(tmp_path_factory.mktemp("trained") / "copy")
    shutil.copytree(stopped.folder, place.folder)
    (place.run / "vqvae_last.keras").unlink()
    modules.PixelCNN(16, (16, 16), filters=8, residual_blocks=2, num_labels=2).save(place.run / "pixelcnn.keras")
    sums = {name: dataset.file_checksum(place.run / f"{name}.keras") for name in ("vqvae", "pixelcnn")}
    edit_config(lambda config: config["data"].update(folder=str(place.data)))(place)
    edit_config(lambda config: config.update(finished=sums))(place)
    return place


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


def write_config(text):
    return lambda place: (place.run / "config.json").write_text(text)


def edit_history(edit):
    """Rewrite the lines of the VQ-VAE's history."""

    def spoil(place):
        path = place.run / "vqvae_history.csv"
        path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")

    return spoil


def another_model(name):
    """Put a whole model of the same shape, but with other weights, in the place of one of a run."""

    def spoil(place):
        model = keras.saving.load_model(place.run / f"{name}.keras")
        for weight in model.trainable_weights:
            weight.assign(weight + 1e-3)
        model.save(place.run / f"{name}.keras")

    return spoil


def unlink(name):
    return lambda place: (place.run / name).unlink()


def forget_slice(place):
    first_slice(place.data, "test").unlink()


def rename_slice(place):
    first_slice(place.data).rename(split_folder(place.data) / "case_001_slice_7.nii.png")


def change_slice(place):
    Image.new("L", (8, 8), 77).save(first_slice(place.data, "validate"))


# What is done to the place, and what train.py's message must have in it, beside the path of the run.
BAD_RESUMES = [
    ("config.json cut", lambda p: cut(p.run / "config.json"), "config.json", "broken", "--run"),
    ("config.json without bytes", write_config(""), "config.json", "broken", "--run"),
    ("config.json a list", write_config("[]"), "config.json", "broken", "--run"),
    ("config.json with a list", edit_config(lambda c: c.update(settings=[])), "config.json", "broken", "--run"),
    ("config.json with text", edit_config(lambda c: c.update(data="here")), "config.json", "broken", "--run"),
    ("config.json without data", edit_config(lambda c: c.pop("data")), "config.json", "broken", "--run"),
    ("config.json without versions", edit_config(lambda c: c.pop("versions")), "config.json", "broken", "--run"),
    ("a slice less", forget_slice, "test", "2, now 1", "another --run", "restore"),
    ("a slice renamed", rename_slice, "train", "another --run", "restore"),
    ("a slice changed", change_slice, "validate", "another --run", "restore"),
    ("checkpoint cut", lambda p: cut(p.run / "vqvae_last.keras"), "vqvae_last.keras", "delete"),
    ("checkpoint damaged", lambda p: damage(p.run / "vqvae_last.keras"), "vqvae_last.keras", "delete"),
    ("checkpoint without bytes", lambda p: cut(p.run / "vqvae_last.keras", 0), "vqvae_last.keras", "delete"),
    ("no config.json", unlink("config.json"), ".keras", "config.json", "another --run"),
    ("history without numbers", edit_history(lambda lines: [lines[0], "one,two"]), "vqvae_history.csv", "delete"),
    ("history without columns", edit_history(lambda lines: ["epoch", "1"]), "vqvae_history.csv", "delete"),
    ("history cut in a row", edit_history(lambda lines: [lines[0], lines[1][:9]]), "vqvae_history.csv", "delete"),
    ("history without rows", edit_history(lambda lines: lines[:1]), "vqvae_history.csv", "delete"),
    ("history without its first row", edit_history(lambda lines: [lines[0], lines[2]]), "vqvae_history.csv", "delete"),
    ("no history", unlink("vqvae_history.csv"), "vqvae_history.csv", "delete"),
    ("config.json without what is finished", edit_config(lambda c: c.pop("finished")), "config.json", "broken"),
]
# The same for a run that is finished, or whose VQ-VAE is: its codes are those of that one and no other.
BAD_FINISHED = [
    ("no VQ-VAE", unlink("vqvae.keras"), "vqvae.keras", "restore", "another --run"),
    ("no PixelCNN", unlink("pixelcnn.keras"), "pixelcnn.keras", "restore", "another --run"),
    ("VQ-VAE cut", lambda p: cut(p.run / "vqvae.keras"), "vqvae.keras", "restore", "another --run"),
    ("another VQ-VAE", another_model("vqvae"), "vqvae.keras", "restore", "another --run"),
    ("another PixelCNN", another_model("pixelcnn"), "pixelcnn.keras", "restore", "another --run"),
    (
        "another VQ-VAE before the PixelCNN was begun",
        lambda p: [f(p) for f in (edit_config(lambda c: c["finished"].pop("pixelcnn")), another_model("vqvae"))],
        *("vqvae.keras", "restore", "another --run"),
    ),
    ("no config.json", unlink("config.json"), ".keras", "config.json", "another --run"),
]
REFUSED = [("stopped", *row) for row in BAD_RESUMES] + [("trained", *row) for row in BAD_FINISHED]


@pytest.mark.parametrize("row", cases([(f"{kind}, {name}", (kind, *row)) for kind, name, *row in REFUSED]))
def test_a_run_that_cannot_go_on_is_refused(row, request, refuse, tmp_path):
    """And not a byte of it is changed."""
    kind, spoil, *expected = row
    place = copy_of(request.getfixturevalue(kind), tmp_path / "place")
    spoil(place)
    before = {path.name: path.read_bytes() for path in place.run.iterdir()}
    refuse(train, place.train, str(place.run), *expected)
    assert {path.name: path.read_bytes() for path in place.run.iterdir()} == before


@pytest.mark.parametrize("flags", ["--seed 1", "--filters 8 16", "--no-mirror", "--vqvae-epochs 4", "--dropout 0.25"])
def test_other_settings_are_refused_by_name(flags, stopped, refuse):
    flag = flags.split()[0].replace("--no-", "--")
    refuse(train, [*stopped.train, *flags.split()], str(stopped.run), f"{flag} ", "choose another --run")


def test_a_run_that_is_a_file_is_refused(data, refuse, tmp_path):
    (tmp_path / "run").write_text("a file")
    refuse(train, ["--data", data, "--run", tmp_path / "run"], f"--run {tmp_path / 'run'}", "file", "choose another")
    refuse(predict, ["--run", tmp_path / "run"], f"--run {tmp_path / 'run'}", "train.py")


def test_a_run_that_cannot_be_created_is_refused(data, refuse, tmp_path):
    (tmp_path / "file").write_text("a file")
    run = tmp_path / "file" / "run"
    refuse(train, ["--data", data, "--run", run], f"--run {run}", "choose another")


def unfinish(name):
    return edit_config(lambda config: config["finished"].pop(name))


# What is done to a trained run, and what predict.py's message must have in it, beside the path of the run.
BAD_RUNS = [
    ("not there", lambda p: shutil.rmtree(p.run), "no run", "python train.py --run"),
    ("empty", lambda p: empty(p.run), "no run", "python train.py --run"),
    ("half of the VQ-VAE", unfinish("vqvae"), "vqvae", "again"),
    ("half of the PixelCNN", unfinish("pixelcnn"), "pixelcnn", "again"),
    ("no VQ-VAE", unlink("vqvae.keras"), "vqvae"),
    ("no PixelCNN", unlink("pixelcnn.keras"), "pixelcnn"),
    ("another VQ-VAE", another_model("vqvae"), "vqvae.keras", "restore"),
    ("another PixelCNN", another_model("pixelcnn"), "pixelcnn.keras", "restore"),
    ("VQ-VAE cut", lambda p: cut(p.run / "vqvae.keras"), "vqvae.keras", "broken", "train again"),
    ("VQ-VAE damaged", lambda p: damage(p.run / "vqvae.keras"), "vqvae.keras", "broken", "train again"),
    ("VQ-VAE without bytes", lambda p: cut(p.run / "vqvae.keras", 0), "vqvae.keras", "broken", "train again"),
    ("PixelCNN cut", lambda p: cut(p.run / "pixelcnn.keras"), "pixelcnn.keras", "broken", "train again"),
    ("PixelCNN damaged", lambda p: damage(p.run / "pixelcnn.keras"), "pixelcnn.keras", "broken", "train again"),
    ("config.json cut", lambda p: cut(p.run / "config.json"), "config.json", "broken", "--run"),
    ("config.json without bytes", write_config(""), "config.json", "broken", "--run"),
    ("config.json a list", write_config("[]"), "config.json", "broken", "--run"),
    ("config.json with a list", edit_config(lambda c: c.update(data=[])), "config.json", "broken", "--run"),
    ("no settings", edit_config(lambda c: c.pop("settings")), "config.json", "broken", "--run"),
    ("no word on mirroring", edit_config(lambda c: c["settings"].pop("mirror")), "config.json", "broken", "--run"),
    ("no data folder", edit_config(lambda c: c["data"].pop("folder")), "config.json", "broken", "--run"),
    ("no word on phantoms", edit_config(lambda c: c["data"].pop("phantom")), "config.json", "broken", "--run"),
]


@pytest.mark.parametrize("row", cases([(name, row) for name, *row in BAD_RUNS]))
def test_a_run_that_cannot_be_measured_is_refused(row, trained, refuse, tmp_path):
    spoil, *expected = row
    place = copy_of(trained, tmp_path / "place")
    spoil(place)
    refuse(predict, ["--run", place.run], str(place.run), *expected)


def test_a_level_the_run_does_not_know_is_refused(trained, refuse):
    refuse(predict, ["--run", trained.run, "--slice", 1, 2], "--slice", "from 0 to 1", "not 2")


def test_a_level_of_a_run_without_slice_numbers_is_refused(trained, refuse, tmp_path):
    place = copy_of(trained, tmp_path / "place")
    modules.PixelCNN(16, (16, 16), filters=8, residual_blocks=2).save(place.run / "pixelcnn.keras")
    checksum = dataset.file_checksum(place.run / "pixelcnn.keras")
    edit_config(lambda config: config["finished"].update(pixelcnn=checksum))(place)
    refuse(predict, ["--run", place.run, "--slice", 1], "--slice", "no slice numbers", "case_N_slice_M")


def test_data_that_moved_since_training_is_missed_by_name(trained, refuse, tmp_path):
    """The remedy is --data; predict.py itself has no --demo to offer."""
    place = copy_of(trained, tmp_path / "place")
    edit_config(lambda config: config["data"].update(folder=str(place.folder / "gone")))(place)
    line = refuse(predict, ["--run", place.run], f"--data {place.folder / 'gone'}", "no such folder", "unzipped")
    assert "--demo" not in line.replace("train.py --demo", "")


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_slice_is_too_few_to_measure_on(split, trained, refuse, tmp_path):
    """The Frechet distance needs a covariance, of the training and of the test slices."""
    place = copy_of(trained, tmp_path / "place")
    for path in sorted(split_folder(place.data, split).iterdir())[1:]:
        path.unlink()
    refuse(predict, ["--run", place.run, "--data", place.data], f"keras_png_slices_{split}", "2", "add")


# --------------------------------------------------------------------------------------
# Model files
# --------------------------------------------------------------------------------------


def edit_model(path, edit):
    """Let a function change the configuration in a .keras file."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(files["config.json"])
    edit(config)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, "config.json": json.dumps(config)}.items():
            archive.writestr(name, content)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "pixelcnn.keras"
    modules.PixelCNN(4, (2, 2), filters=2, residual_blocks=1).save(path)
    return path


@pytest.mark.parametrize("spoil", [cut, damage, lambda path: cut(path, 0), replace_by_folder], ids=repr)
def test_a_damaged_model_is_called_broken(spoil, saved):
    assert isinstance(dataset.load_model(saved, "train again"), modules.PixelCNN)
    spoil(saved)
    with pytest.raises(dataset.UserError, match=re.escape(f"{saved} is broken ") + ".*train again"):
        dataset.load_model(saved, "train again")


def test_a_whole_model_that_cannot_be_opened_shows_its_cause(saved):
    """As one of a later version would be: its class has an argument that this one does not know."""
    edit_model(saved, lambda config: config["config"].update(wings=2))
    with pytest.raises(dataset.UserError, match=re.escape(str(saved)) + ".*wings.*train again") as refusal:
        dataset.load_model(saved, "train again")
    assert "broken" not in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_running_out_of_memory_is_not_damage(saved, monkeypatch):
    def run_out(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(keras.saving, "load_model", run_out)
    with pytest.raises(MemoryError):
        dataset.load_model(saved, "train again")


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
    for owner, name in ((train, "fit_vqvae"), (train, "fit_pixelcnn"), (dataset, "load_model")):
        monkeypatch.setattr(owner, name, lambda *arguments: None)  # no need to fit what is not looked at
    data = write_data(tmp_path / "data", train=[1], validate=[402], test=[441])
    assert train.main(["--data", str(data), "--run", str(run), *TINY]) == 0
    assert suggested(capsys.readouterr().out) == ["predict.py", "--run", str(run)]


@pytest.mark.parametrize("script", ["train", "dataset"])
def test_the_exit_code_and_the_line_of_a_real_process(script, tmp_path):
    arguments = ["--data", "nowhere"] if script == "train" else ["nowhere"]
    finished = run_script(f"{script}.py", *arguments, cwd=tmp_path)
    assert_refused(script, finished.returncode, finished.stderr, "nowhere", "unzipped")
    assert not list(tmp_path.iterdir())  # no empty run either
