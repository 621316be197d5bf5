"""The scripts through their own command lines on a small toy set, and what stands around a run."""
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, run_process
from PIL import Image
from small_run import EXPORT, NEW, SMALL, STAGES, TRAININGS, WHERE, contents, record, results, stage

import bnr
from wsss import seeds
from wsss.data import DataSet, read_image
from wsss.masks import read_mask


def test_every_stage_runs_without_masks_and_writes_into_out_alone(here):
    shutil.move("data/SegmentationClass", "hidden")
    before, expected = contents(), {name: results(name) for name in STAGES}
    for name in STAGES:
        said = run(*STAGES[name], *NEW)
        assert said.startswith("device: cpu") and said.count(f"\n{name}: ") == 2 and said.endswith(f"-> new/{name}\n")
        assert results(name, "new").keys() == expected[name].keys()
        if name not in TRAININGS:
            assert results(name, "new") == expected[name]
    after = contents()
    assert {path for path in after if not path.startswith("new/")} == before.keys() and before.items() <= after.items()
    assert {path.name for path in Path("new").glob("[!.]*")} == STAGES.keys()


def test_every_stage_writes_what_the_next_reads(here):
    dataset = DataSet("data")
    train, val = dataset.ids("train_aug"), dataset.ids("val")
    for folder, ids, ending in (("cams", train, ".npz"), ("affinity_labels", train, ".png"),
                                ("pseudo_labels", train, ".png"), ("segmentation", val, ".png")):
        assert {path.name for path in Path("out", folder).iterdir()} == {*(f"{i}{ending}" for i in ids), "record.json"}
    for name in train:
        expected = {1 + dataset.classes.index(label) for label in dataset.names(name)}
        size = read_image(dataset.image(name)).size[::-1]
        label = read_mask(Path(f"out/pseudo_labels/{name}.png"), 6, size)
        classes, cams = seeds.read_seeds(Path(f"out/cams/{name}.npz"))
        assert set(np.unique(label)) <= {0} | expected and set(classes.tolist()) == expected
        assert cams.shape == (len(expected), *size) and cams.min() >= 0 and cams.max() <= 1


def test_records_name_settings_inputs_device_and_precision(here):
    for name in STAGES:
        entry = record(name)
        assert entry["done"] and entry["seconds"] > 0 and entry["precision"] == "float32" and "CPU" in entry["device"]
        assert entry["preset"] == "toy" and Path(entry["data"]).name == "data" and 0.1 < entry["peak_gb"] < 100
    assert record("pseudo_labels")["inputs"] == {name: record(name)["id"] for name in ("cams", "affinitynet")}
    assert {"epochs": 1, "crop": 64, "seed": 0, "loss": "bnr"}.items() <= record("classifier")["settings"].items()


def test_exported_maps_are_the_seeds(here):
    run(*EXPORT, *WHERE)
    dataset = DataSet("data")
    for name in dataset.ids("train"):
        classes, cams = seeds.read_seeds(Path(f"out/cams/{name}.npz"))
        assert {path.stem for path in Path("maps", name).iterdir()} == set(dataset.names(name))
        for c, cam in zip(classes, cams):
            np.testing.assert_array_equal(np.load(f"maps/{name}/{dataset.classes[c - 1]}.npy"), cam)


def test_exported_maps_can_be_scored_also_of_a_photo_without_classes(here):
    seeds.write_seeds(Path("out/cams/toy_0000.npz"), np.zeros(0, int), (9, 9), {"refined": [np.zeros((0, 1, 1))]})
    run(*EXPORT, *WHERE)
    assert not list(Path("maps/toy_0000").iterdir()) and "maps" in run("wsss.evaluate", "--class-maps", "maps", *WHERE)


def test_the_segmenter_trains_on_anybodys_masks(here):
    shutil.copytree("out/pseudo_labels", "mine")
    run(*STAGES["segmenter"], *NEW, "--labels", "mine")
    assert results("segmenter", "new") == results("segmenter")
    assert record("segmenter", "new")["settings"]["labels"] == "mine" and not record("segmenter", "new")["inputs"]


def test_any_photos_are_segmented_each_with_an_overlay(here):
    Path("in/deep").mkdir(parents=True)
    read_image(Path("data/JPEGImages/toy_0004.jpg")).save("in/deep/photo.PNG")
    shutil.copy("data/JPEGImages/toy_0004.jpg", "one.jpg")
    run("segment", "predict", "in", "one.jpg", *WHERE, "--scales", 0.5)
    for photo in ("deep/photo", "one"):
        mask = Path(f"out/predictions/{photo}.png")
        assert Image.open(f"out/predictions/{photo}_overlay.png").size == Image.open(mask).size
        assert mask.read_bytes() == Path("out/segmentation/toy_0004.png").read_bytes()


def test_a_folder_around_out_is_searched_for_photos_alone(here):
    Path("mine").mkdir()
    shutil.copy("data/JPEGImages/toy_0000.jpg", "mine/a.jpg"), shutil.move("out", "mine/out")
    command = ("segment", "predict", "mine", "--data", "data", "--out", "mine/out", *SMALL, "--no-crf")
    first, second = run(*command), run(*command)
    assert "note" not in first and "1 photos ->" in first and "1 photos ->" in second
    assert "note: 1 masks in mine/out/predictions will be overwritten, first a.png" in second


def test_without_a_list_val_the_photos_of_train_aug_are_segmented(here):
    shutil.rmtree("out/segmentation")
    Path("data/ImageSets/Segmentation/val.txt").unlink()
    run(*stage("segmentation"))
    assert results("segmentation").keys() == {f"toy_000{n}.png" for n in range(4)}


def test_the_submission_is_complete_and_of_the_photos_sizes(here):
    assert "no test.txt" in run("segment", "submit", *WHERE, status=1)
    run("segment", "submit", *WHERE, "--no-crf", "--scales", 0.5, "--split", "val")
    with tarfile.open("out/results.tar.gz") as archive:
        for name in DataSet("data").ids("val"):
            mask = Image.open(archive.extractfile(f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png"))
            assert mask.mode == "P" and mask.size == read_image(Path(f"data/JPEGImages/{name}.jpg")).size
        assert len(archive.getmembers()) == 2


@pytest.mark.parametrize("work", [lambda: torch.empty(10 ** 15), lambda: np.empty(10 ** 15), None])
def test_too_little_memory_is_told_in_one_line(here, monkeypatch, work):
    def attend(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory") if work is None else work()

    monkeypatch.setattr(bnr, "attend", attend)
    said = run(*STAGES["classifier"], *NEW, status=1)
    assert re.search(r"\nerror: too little memory: try --micro-batch.*\n$", said)
    assert "Traceback" not in said


def test_from_scratch_a_word_for_weights_is_not_read_and_this_is_told(here):
    assert "note: --from-scratch does not read resnet50" in run(*STAGES["classifier"], *NEW, "--pretrained", "resnet50")


def test_a_worker_that_dies_is_told_in_one_line(here, monkeypatch):
    monkeypatch.setattr(bnr, "attend", lambda *given: exec('raise RuntimeError("DataLoader worker (pid 7) is killed")'))
    assert "\nerror: a worker process died, perhaps out of memory" in run(*STAGES["classifier"], *NEW, status=1)


def test_what_needs_no_gpu_opens_none(here, monkeypatch):
    monkeypatch.setattr(torch, "ones", lambda *size, device: pytest.fail(f"{device} was opened"))
    for command in (STAGES["affinity_labels"], EXPORT):
        assert "device: cpu" in run(*command, "--data", "data", "--out", "out", "--preset", "toy")


def test_ranks_in_the_environment_mean_nothing_without_torchrun(here, monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    assert "-> new/classifier" in run_process(*STAGES["classifier"], *NEW)


@pytest.mark.parametrize("shell, status, makes", [
    ("{python} {bnr} cams {flags} >&- 2>&-", 0, True),
    ("{python} {bnr} cams {flags} | head -1; exit ${{PIPESTATUS[0]}}", 141, False)])
def test_closed_streams_end_in_no_traceback(here, shell, status, makes):
    flags = " ".join(map(str, ("--scales", 0.5, "--data", "data", "--out", "out", "--fresh", *SMALL)))
    old = record("cams")["id"]
    command = shell.format(python=sys.executable, bnr=ROOT / "bnr.py", flags=flags)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == status and "rror" not in done.stderr and "Traceback" not in done.stderr, done
    assert not makes or record("cams")["id"] != old


@pytest.mark.parametrize("script", ["bnr.py", "psa.py", "segment.py", "-mwsss.evaluate", "-mwsss.prepare"])
def test_a_python_without_the_packages_says_what_to_install(script):
    done = subprocess.run([sys.executable, "-S", script, "train"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(r"error: \w+ is not installed here: run pip install -r requirements.txt\n", done.stderr)
