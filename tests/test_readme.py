"""What the README states and a program can check: flags, advice, keys, figures and pictures."""

import json
import re

import dataset
import predict
import train

import anomalies
import bench
import mnist
import pictures
import pytest
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
REPORT = json.loads((ROOT / "readme_images" / "report.json").read_text())
SCRIPTS = {"train": train, "predict": predict, "dataset": dataset, "tests/anomalies": anomalies, "tests/bench": bench}
SCRIPTS |= {"tests/mnist": mnist, "tests/pictures": pictures}
OF_OTHERS = {"--version", "--wildcards", "--dist", "--xla_gpu_cuda_data_dir"}  # of Python, tar, pytest and XLA


def flags_of(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    return set(re.findall(r"--[a-z][a-z-]*[a-z]", capsys.readouterr().out))


def value_of(key):
    value = REPORT
    for name in key.split("."):
        value = value[name]
    return value


def test_every_flag_exists_and_no_advice_names_a_default(capsys):
    flags = {name: flags_of(script, capsys) for name, script in SCRIPTS.items()}
    commands = re.findall(r"python (\S+)\.py([^\n`#]*)", TEXT)
    assert {name for name, _ in commands} >= {"train", "predict", "dataset", "tests/anomalies"}
    for name, arguments in commands:
        assert set(re.findall(r"(--[\w-]+)", arguments)) <= flags[name], (name, arguments)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXT)) - OF_OTHERS
    assert named <= flags["train"] | flags["predict"] | flags["dataset"] | flags["tests/mnist"]
    for flag, *values in re.findall(r"`--([\w-]+) ([\d.]+)(?: ([\d.]+))*`", TEXT):
        default = getattr(train.Settings(), flag.replace("-", "_"))
        given = [float(value) for value in values if value]
        assert given != [float(x) for x in (default if isinstance(default, tuple) else [default])], flag


def test_every_key_exists():
    keys = re.findall(r"`((?:data|reconstruction|codebook|prior|samples|heads)\.(?!png|npz)\w+)`", TEXT)
    assert len(set(keys)) > 12
    for key in keys:
        value_of(key)
    everything = json.dumps(REPORT)
    for name in re.findall(r"`(\w*(?:ssim|nats|bits|ratio|auroc|error|change)_?\w*)`", TEXT):
        assert f'"{name}"' in everything, name


def is_rounded(number, value):
    """Whether a number in the text is the value, rounded to as many digits."""
    digits = len(number.partition(".")[2])
    return float(number) == pytest.approx(value, abs=0.5001 * 10**-digits)


def test_the_figures_of_the_table_are_those_of_the_report():
    """The defaults, their intervals, and the column of real slices and reconstructions."""
    values = re.findall(r"-?\d+\.?\d*", json.dumps(REPORT))
    rows = re.findall(r"^\|([^|\n]+)\|([^|\n]*)\|([^|\n]*)\|[^|\n]*\|[^|\n]*\| `([a-z]+\.\w+)` \|$", TEXT, re.M)
    assert len(rows) > 12
    for _, references, found, key in rows:
        number, *limits = re.findall(r"\d+(?:\.\d+)?", found)
        assert is_rounded(number, value_of(key)), key
        if limits:
            assert all(map(is_rounded, limits, value_of(f"{key}_interval"))), key
        for reference in re.findall(r"\d+\.\d+", references):
            assert any(is_rounded(reference, float(value)) for value in values), (key, reference)


def test_every_picture_is_there_small_and_shown():
    shown = set(re.findall(r"\]\(readme_images/(\S+?)\)", TEXT))
    assert shown == {path.name for path in (ROOT / "readme_images").iterdir()}
    assert all(path.stat().st_size < 300_000 for path in (ROOT / "readme_images").iterdir())
