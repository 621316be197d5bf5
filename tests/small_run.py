"""A small toy set and a finished run of all stages, for the tests that spoil a copy of it."""
import contextlib
import gc
import json
import re
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from conftest import run

TRAIN = ("--crop", 64, "--batch-size", 2)
STAGES = {  # folder in OUT: what makes it
    "classifier": ("bnr", "train", *TRAIN, "--epochs", 1, "--long-side", 64, 96),
    "cams": ("bnr", "cams", "--scales", 0.5),
    "affinity_labels": ("psa", "labels"),
    "affinitynet": ("psa", "train", *TRAIN, "--epochs", 1, "--width", 1),
    "pseudo_labels": ("psa", "walk"),
    "segmenter": ("segment", "train", *TRAIN, "--iterations", 2, "--width", 1),
    "segmentation": ("segment", "predict", "--scales", 0.5)}
TRAININGS = ("classifier", "affinitynet", "segmenter")
SMALL = ("--preset", "toy", "--device", "cpu", "--workers", 0)
WHERE = ("--data", "data", "--out", "out", *SMALL)
NEW = ("--data", "data", "--out", "new", *SMALL)
EXPORT = ("bnr", "export", "--to", "maps")


@contextlib.contextmanager
def one_thread():
    """Sums in another order are other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small toy set and a run of all stages, in a folder of its own."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder), one_thread():
        run("wsss.prepare", "toy", "--root", "data", "--train", 4, "--val", 2)
        for script, *flags in STAGES.values():
            run(script, *flags, *WHERE)
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of it, to be spoilt; whatever hangs is ended."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    signal.alarm(120)
    with one_thread():
        yield tmp_path
    signal.alarm(0)


def contents(folder="."):
    """Path: bytes, of every file there."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def stage(name):
    """Its command line on this run."""
    return (*STAGES[name], *WHERE)


def record(name, out="out"):
    return json.loads(Path(out, name, "record.json").read_text())


def results(name, out="out"):
    """What a stage made, to be compared, less its record. -> tensors or bytes, by name"""
    path = Path(out, name, "model.pth")
    if path.is_file():
        return {key: value.tolist() for key, value in torch.load(path, weights_only=True)["model"].items()}
    return {path.name: path.read_bytes() for path in Path(out, name).iterdir() if path.name != "record.json"}


def refused(status, *command):
    """Run it; OUT and DATA stay as they are, but for what an unfinished stage may leave. -> the one line"""
    before = contents()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)
        said = run(*command, status=status)
    after = contents()
    assert {path: after.get(path) for path in before} == before
    assert all(".part/" in path or path.endswith(".lock") for path in after.keys() - before.keys())
    lines = [line for line in said.splitlines() if re.match(r"error|usage|Traceback|.*[Ww]arning", line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    return lines[0]


@contextlib.contextmanager
def stopped(monkeypatch, module, function, call=1):
    """Ctrl-C at the n-th call of a function; afterwards as if that process had ended."""
    plain, calls = getattr(module, function), []

    def stop(*given, **named):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, stop)
        yield
    gc.collect()  # lets go of the stage's folder
