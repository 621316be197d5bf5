"""What make hands on to the scripts, and what it refuses."""
import os
import subprocess

import pytest
from conftest import ROOT


def make(*words, status=0):
    """What `make -n` prints."""
    typed = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
    done = subprocess.run(["make", "-n", "PYTHON=py", *words], cwd=ROOT, env=typed, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("variable", ["OUT", "DATA"])
@pytest.mark.parametrize("path", ["x/R&D", "my photos", "x;y", "x$y", "x#y", "x'y", 'x"y', "x`y", "(x"])
def test_a_path_that_a_shell_would_read_is_refused_in_a_line(variable, path):
    lines = make("train", f"{variable}={path}", status=2).splitlines()
    assert len(lines) == 1 and f"{variable} has a blank or a sign that a shell reads" in lines[0]


@pytest.mark.parametrize("value, flag", [
    ("1", True), ("yes", True), ("0", False), ("no", False), ("false", False), ("", False)])
def test_a_switch_is_on_or_off(value, flag):
    assert ("--fresh" in make("eval", f"FRESH={value}")) == flag
    said = make("train", f"FROM_SCRATCH={value}")
    assert ("--from-scratch" in said) == flag and ("--no-from-scratch" in said) == (not flag and value != "")


@pytest.mark.parametrize("word, says", [("FRESH=maybe", "is neither 1 nor 0"), ("ROWS=foo", "no row foo in Table 5")])
def test_what_make_does_not_know_is_refused(word, says):
    assert says in make("results", word, status=2)


@pytest.mark.parametrize("data, preset, out", [
    ((), "toy", "out/toy"), ((f"DATA={ROOT}/data//toy",), "toy", "out/toy"), (("DATA=./photos/",), "voc", "out/photos"),
    (("DATA=a/b", "PRESET=small"), "small", "out/b")])
def test_out_and_preset_follow_from_the_data_set(data, preset, out):
    said = make("cams", *data)
    assert f"--out {out} --preset {preset} " in said


def test_results_runs_each_loss_and_random_seed_and_goes_on_with_some():
    said = make("results", "OUT=o", "SEEDS=0 1", "ROWS=transcam noise-x2", "TRAIN_FLAGS=--epochs 3")
    trainings = [line for line in said.splitlines() if line.startswith("py bnr.py train")]
    assert [line.split("--out ")[1].split()[0] for line in trainings] == [
        f"o/rows/{row}-seed{seed}" for seed in (0, 1) for row in ("transcam", "noise-x2")]
    assert all("--epochs 3" in line for line in trainings) and "--loss transcam" in trainings[0]
    assert "--loss bnr --noise 2" in trainings[1] and "--seed 1" in trainings[2]
    assert said.count("segment.py predict") == 2 and said.count("wsss.evaluate") == 4 and "report tables" in said
