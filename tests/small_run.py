"""A small toy set and a finished run of all stages, for the tests that spoil a copy of it."""

import contextlib
import re
import shutil
import signal
import warnings
from pathlib import Path

import pytest
from conftest import run

TRAIN = ("--crop", 64, "--batch-size", 2)
STAGES = {  # what makes the finished run
    "train": ("bnr.py", "train", *TRAIN, "--epochs", 1, "--long-side", 64, 96),
    "cams": ("bnr.py", "cams", "--scales", 0.5),
    "labels": ("psa.py", "labels"),
    "affinity": ("psa.py", "train", *TRAIN, "--epochs", 1, "--width", 1),
    "walk": ("psa.py", "walk"),
    "segmenter": ("segment.py", "train", *TRAIN, "--iterations", 2, "--width", 1),
    "predict": ("segment.py", "predict", "--scales", 0.5),
    "evaluate": ("evaluate.py",),
}
MAKES = {
    "train": "classifier",
    "cams": "cams",
    "labels": "affinity_labels",
    "affinity": "affinitynet",
    "walk": "pseudo_labels",
    "segmenter": "segmenter",
    "predict": "segmentation",
}
SMALL = ("--preset", "toy", "--device", "cpu", "--workers", 0)
WHERE = ("--data", "data", "--out", "out", *SMALL)
NEW = ("--data", "data", "--out", "new", *SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small toy set and a run of all stages, in a folder of its own."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        run("prepare.py", "toy", "--root", "data", "--train", 4, "--val", 2)
        for script, *flags in STAGES.values():
            run(script, *flags, *WHERE)
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of it, to be spoilt; whatever hangs is ended."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    signal.alarm(60)
    yield tmp_path
    signal.alarm(0)


def contents(folder="."):
    """Path: bytes, of every file there."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def stage(name):
    """Its command line on this run."""
    return (*STAGES[name], *WHERE)


def refused(status, *command):
    """Run it; OUT and DATA stay as they are, but for what an unfinished stage may leave. -> the one line"""
    before = contents()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        said = run(*command, status=status)
    after = contents()
    assert "Traceback" not in said
    assert {path: after.get(path) for path in before} == before
    assert all(".part" in path or path.endswith("log.jsonl") for path in after.keys() - before.keys())
    lines = [line for line in said.splitlines() if re.match(r"error|usage|.*[Ww]arning", line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    return lines[0]
