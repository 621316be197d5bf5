"""The scripts through their own command lines on a small toy set, and the errors that they promise."""
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, run, run_process
from PIL import Image

import bnr
import data
import engine
import seeds
from stage import InputError

SMALL = ("--preset", "toy", "--device", "cpu", "--workers", 0)
CLASSIFIER = ("--epochs", 2, "--crop", 64, "--long-side", 64, 96, "--batch-size", 8)
AFFINITY = ("--epochs", 1, "--width", 2, "--crop", 64, "--batch-size", 8)
SEGMENTER = ("--iterations", 4, "--width", 2, "--crop", 64, "--batch-size", 8)
STAGES = {"classifier": ("bnr.py", "train", *CLASSIFIER), "cams": ("bnr.py", "cams"),
          "affinity_labels": ("psa.py", "labels"), "affinitynet": ("psa.py", "train", *AFFINITY),
          "pseudo_labels": ("psa.py", "walk"), "segmenter": ("segment.py", "train", *SEGMENTER),
          "segmentation": ("segment.py", "predict")}


@pytest.fixture(scope="module")
def done(toy, tmp_path_factory):
    """All stages, run with the masks out of reach; then scored. -> data, out, what was printed"""
    out, hidden = tmp_path_factory.mktemp("out"), toy / "hidden"
    (toy / "SegmentationClass").rename(hidden)
    where, said = ("--data", toy, "--out", out, *SMALL), {}
    for name, command in STAGES.items():  # two as a user types them: a training, and one with a pool of processes
        start = run_process if name in ("classifier", "affinity_labels") else run
        said[name] = start(*command, *where, *(("--workers", 2) if name == "affinity_labels" else ()))
    said["unscored"] = run("evaluate.py", *where)
    hidden.rename(toy / "SegmentationClass")
    said["evaluate"] = run_process("evaluate.py", *where)
    return toy, out, said


def rows_of(out):
    return {row["stage"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


def record(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_device_is_the_first_thing_printed(done):
    assert all(text.startswith("device: cpu") for text in done[2].values())


def test_every_stage_writes_what_the_next_reads(done):
    toy, out, _ = done
    dataset = data.DataSet(toy)
    train, val = dataset.ids("train_aug"), dataset.ids("val")
    for folder, ids, ending in (("cams", train, ".npz"), ("affinity_labels", train, ".png"),
                                ("pseudo_labels", train, ".png"), ("segmentation", val, ".png")):
        assert {path.name for path in (out / folder).iterdir()} == {name + ending for name in ids}
    for name in train:
        own = {1 + dataset.classes.index(label) for label in dataset.names(name)}
        size = data.read_image(dataset.image(name)).size[::-1]
        label = data.read_mask(out / "pseudo_labels" / f"{name}.png", 6, size)
        classes, cams = seeds.read_seeds(out / "cams" / f"{name}.npz")
        assert set(np.unique(label)) <= {0} | own and set(classes.tolist()) == own
        assert cams.shape == (len(own), *size) and cams.min() >= 0 and cams.max() <= 1


def test_records_name_settings_inputs_device_and_precision(done):
    _, out, said = done
    for name in STAGES:
        found = record(out, name)
        assert found["done"] and found["seconds"] > 0 and found["precision"] == "float32" and "CPU" in found["device"]
        assert f"{name}: " in said[name] and not (out / f"{name}.part.json").exists()
    assert record(out, "pseudo_labels")["inputs"].keys() == {"cams", "affinitynet"}
    assert record(out, "classifier")["settings"]["epochs"] == 2 and 0.1 < record(out, "classifier")["peak_gb"] < 100


def test_table_has_a_row_a_stage_and_the_json_the_same_numbers(done):
    toy, out, said = done
    rows = rows_of(out)
    assert list(rows) == ["classifier", "random maps", "background", "plain CAM", "refined seeds", "affinity labels",
                          "pseudo labels", "segmenter"]
    for row in list(rows.values())[1:]:
        assert f"{row['miou']:.2f}" in said["evaluate"] and len(row["iou"]) == 6
        assert row["miou"] == pytest.approx(100 * np.nanmean(row["iou"]))
        assert row["n"] == (8 if row["split"] == "val" else 24)
    for part in ("0.60/0.25", "bg 0.42", "by looking at the masks", "% of pixels that are labelled", "float32"):
        assert part in said["evaluate"]
    dataset = data.DataSet(toy)
    masks = np.concatenate([data.read_mask(dataset.mask(name)).ravel() for name in dataset.ids("train")])
    share = (masks == 0).sum() / (masks != data.VOID).sum()
    assert rows["background"]["iou"] == pytest.approx([share, 0, 0, 0, 0, 0])


def test_figures_are_logged_before_and_after_each_epoch(done):
    _, out, said = done
    watched = record(out, "classifier")["watched"]
    assert list(watched) == ["0", "3", "6"]
    for found in watched.values():
        assert np.shape(found["entropy"]) == (4,) and 0 < np.min(found["entropy"]) and np.max(found["entropy"]) <= 1
        means = f"entropy {np.mean(found['entropy']):.3f}, own_rows {found['own_rows']:.3f}"
        assert means in said["classifier"]
        assert found["refined"] is None  # the masks were out of reach
    assert rows_of(out)["classifier"]["entropy"] == pytest.approx(np.mean(found["entropy"]))


def test_an_untrained_classifier_and_one_list_can_be_exported(toy, tmp_path):
    where = ("--data", toy, "--out", tmp_path, *SMALL)
    run("bnr.py", "train", *where, *CLASSIFIER, "--epochs", 0)
    found = record(tmp_path, "classifier")["watched"]["0"]
    assert 0 < found["object_area"] < 1 and 0 < found["refined"] < 100
    run("bnr.py", "cams", *where, "--eigen", "--split", "val")
    assert {path.stem for path in (tmp_path / "cams").iterdir()} == set(data.DataSet(toy).ids("val"))
    run("bnr.py", "cams", *where, "--eigen")
    run("evaluate.py", *where)
    assert {"plain CAM", "Eigen-CAM", "refined seeds"} < rows_of(tmp_path).keys()
    assert rows_of(tmp_path)["Eigen-CAM"]["n"] == 24


def test_without_masks_the_table_says_so(done):
    said = done[2]["unscored"]
    assert "has no SegmentationClass" in said and "no masks" in said and "make show" in said


def test_anybodys_masks_and_class_maps_are_scored_alike(done, tmp_path):
    toy, out, _ = done
    rows, where = rows_of(out), ("evaluate.py", "--data", toy, *SMALL)
    said = run(*where, "--masks", out / "pseudo_labels", "--seeds", out / "cams")
    assert f"{rows['pseudo labels']['miou']:.2f}" in said and f"{rows['refined seeds']['miou']:.2f}" in said
    run("bnr.py", "export", "--out", out, "--to", tmp_path / "npy")  # the data set is that of the run
    assert f"{rows['refined seeds']['miou']:.2f}" in run(*where, "--seeds", tmp_path / "npy")
    name = data.DataSet(toy).ids("train")[0]
    (tmp_path / "npy" / "README").touch()
    (tmp_path / "npy" / "other").mkdir()
    np.save(tmp_path / "npy/other/cat.npy", np.zeros((2, 2)))
    said = run(*where, "--seeds", tmp_path / "npy")
    assert f"{rows['refined seeds']['miou']:.2f}" in said and "left out" not in run(*where, "--seeds", out / "cams")
    assert f"2 files in {tmp_path}/npy are no class maps of these 24 photos and are left out, first " in said
    assert f"left out, first {tmp_path}/npy/README\n" in said
    np.save(tmp_path / "npy" / name / "unicorn.npy", np.zeros((2, 2)))
    assert f"{name}/unicorn.npy is of none of the classes cat rabbit" in refused(*where, "--seeds", tmp_path / "npy")
    shutil.rmtree(tmp_path / "npy" / name)
    assert f"no class maps of {name}" in refused(*where, "--seeds", tmp_path / "npy")
    np.save(tmp_path / "npy" / f"{name}.npy", {0: np.zeros((2, 2))})
    assert "A pickle" in refused(*where, "--seeds", tmp_path / "npy")


def test_the_segmenter_trains_on_anybodys_masks(done, tmp_path):
    toy, out, _ = done
    train = ("segment.py", "train", "--data", toy, *SMALL, *SEGMENTER, "--labels")
    run(*train, out / "pseudo_labels", "--out", tmp_path / "out")
    both = [torch.load(folder / "segmenter.pth", weights_only=True)["model"] for folder in (out, tmp_path / "out")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    assert "lacks 24 of 24 labels" in refused(*train, tmp_path, "--out", tmp_path / "new")
    shutil.copytree(out / "pseudo_labels", tmp_path / "foreign")
    name = data.DataSet(toy).ids("train")[0]
    mask = data.read_mask(tmp_path / "foreign" / f"{name}.png")
    data.write_mask(tmp_path / "foreign" / f"{name}.png", np.full_like(mask, 77))
    said = refused(*train, tmp_path / "foreign", "--out", tmp_path / "new")
    assert f"{name}.png has value 77, but there are 6 classes" in said


def test_any_photos_are_segmented_each_with_an_overlay(done, tmp_path):
    toy, out, _ = done
    name = data.DataSet(toy).ids("train")[0]
    photo = toy / "JPEGImages" / f"{name}.jpg"
    (tmp_path / "in/deep").mkdir(parents=True)
    data.read_image(photo).save(tmp_path / "in/deep/photo.PNG")
    shutil.copy(photo, tmp_path / "one.jpg")
    run("segment.py", "predict", tmp_path / "in", tmp_path / "one.jpg", "--out", out, *SMALL)
    for found in ("deep/photo", "one"):
        mask = data.read_mask(out / "predictions" / f"{found}.png")
        assert mask.shape[::-1] == data.read_image(out / "predictions" / f"{found}_overlay.png").size
    run("segment.py", "predict", "--data", toy, "--out", out, *SMALL, "--ids", name)
    assert (out / "segmentation" / f"{name}.png").read_bytes() == (out / "predictions/one.png").read_bytes()
    assert "no photo and no folder" in refused("segment.py", "predict", tmp_path / "absent.jpg", "--out", out)
    first = (out / "predictions/deep/photo.png").read_bytes()
    run("segment.py", "predict", tmp_path / "in", "--out", out, "--device", "cpu")  # preset and scales of the run
    assert (out / "predictions/deep/photo.png").read_bytes() == first


def test_the_submission_is_complete_and_of_the_photos_sizes(done):
    toy, out, _ = done
    dataset = data.DataSet(toy)
    submit = ("segment.py", "submit", "--data", toy, "--out", out)
    assert "no test.txt" in refused(*submit)
    run(*submit, *SMALL, "--no-crf", "--split", "val")
    with tarfile.open(out / "results.tar.gz") as archive:
        members = {member.name: member for member in archive.getmembers()}
        assert len(members) == 8
        for name in dataset.ids("val"):
            member = members[f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png"]
            mask = Image.open(archive.extractfile(member))
            assert mask.mode == "P" and mask.size == data.read_image(dataset.image(name)).size


# ---------------------------------------------------------------- going on

def test_a_second_call_does_nothing_again(done):
    toy, out, _ = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for command in STAGES.values():
        assert "done already" in run(*command, "--data", toy, "--out", out, *SMALL)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_lost_files_are_named_and_made_again_and_no_others(done, tmp_path):
    toy, out, _ = done
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    where = ("--data", toy, "--out", tmp_path, *SMALL)
    for name, ending, read in (("cams", ".npz", lambda path: seeds.read_seeds(path)[1]),
                               ("pseudo_labels", ".png", data.read_mask)):
        lost, cut, kept = sorted((tmp_path / name).glob(f"*{ending}"))[:3]
        expected, time = [read(path) for path in (lost, cut)], kept.stat().st_mtime_ns
        lost.unlink()
        cut.write_bytes(cut.read_bytes()[:-20])
        if name == "pseudo_labels":
            said = run("evaluate.py", *where)
            assert f"2 of 24 pseudo labels are missing, first {lost.stem}: make psa" in said
        assert "what is missing or damaged is made again" in run(*STAGES[name], *where)
        for path, values in zip((lost, cut), expected):  # seeds but for the rounding, which depends on the batch
            np.testing.assert_allclose(read(path), values, atol=1e-4)
        assert kept.stat().st_mtime_ns == time


def test_a_classifier_killed_within_an_epoch_goes_on_and_equals_one_that_never_stopped(done, tmp_path, monkeypatch):
    toy, out, _ = done
    train, write = ("bnr.py", "train", "--data", toy, "--out", tmp_path, *SMALL, *CLASSIFIER), engine.write

    class Killed(BaseException):
        pass

    def killed(path, save, sync=False):
        write(path, save, sync)
        if path.suffix == ".pth" and torch.load(path, weights_only=True)["step"] == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine, "SAVE_SECONDS", 0)
        patch.setattr(engine, "LOG_STEPS", 1)
        patch.setattr(engine, "write", killed)
        with pytest.raises(Killed):
            run(*train)
    run(*train)
    resumed, whole = (torch.load(folder / "classifier.pth", weights_only=True) for folder in (tmp_path, out))
    assert all(torch.equal(resumed["model"][name], whole["model"][name]) for name in whole["model"])
    assert resumed["network"] == {"arch": "nano", "classes": data.DataSet(toy).classes, "crop": 64}
    watched = [record(folder, "classifier")["watched"] for folder in (tmp_path, out)]
    assert watched[0]["6"]["entropy"] == watched[1]["6"]["entropy"]
    run(*train, "--epochs", 3)
    run(*train, "--epochs", 3, "--out", tmp_path / "whole")
    grown, whole = (torch.load(path / "classifier.pth", weights_only=True) for path in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(grown["model"][name], whole["model"][name]) for name in whole["model"])
    assert list(record(tmp_path, "classifier")["watched"]) == ["0", "3", "6", "9"]


def test_other_settings_need_fresh_and_later_stages_then_say_that_they_are_old(done, tmp_path):
    toy, out, _ = done
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    where = ("--data", toy, "--out", tmp_path, *SMALL)
    for name in ("segmenter", "affinitynet", "classifier"):
        command = (*STAGES[name], *where, "--micro-batch", 3)
        assert "made with other settings: micro_batch 0 -> 3: take another OUT=" in refused(*command)
        assert "micro_batch=3" in run(*command, "--fresh")
    assert "precision float32 -> bf16" in refused("bnr.py", "train", *where, *CLASSIFIER, "--micro-batch", 3, "--amp")
    said = refused(*STAGES["affinity_labels"], *where)
    assert 'seeds in' in said and ': older than the classifier: run "make cams" first' in said
    said = run("evaluate.py", *where)
    assert "older than the classifier: make cams" in said and rows_of(tmp_path)["segmenter"]["stale"]
    assert "made anew, as the classifier changed" in run(*STAGES["cams"], *where)


def test_ctrl_c_is_one_line_and_status_130(toy, tmp_path):
    flags = map(str, ("train", "--data", toy, "--out", tmp_path, *SMALL, *CLASSIFIER, "--epochs", 999))
    process = subprocess.Popen([sys.executable, ROOT / "bnr.py", *flags], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith("device: cpu")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert said.endswith("stopped: the same command goes on from here\n")


def full_card():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize("work, what", [
    (full_card, "card"), (lambda: torch.empty(10 ** 15), "machine"), (lambda: np.empty(10 ** 15), "machine")])
def test_too_little_memory_is_told_in_one_line(monkeypatch, work, what):
    def train(args):
        work()
    monkeypatch.setattr(bnr, "train", train)
    said = run("bnr.py", "train", "--device", "cpu", status=1)
    assert re.fullmatch(rf"device: .*\nerror: the {what} has too little memory.*--micro-batch.*\n", said)


# ---------------------------------------------------------------- errors: one line, status 1 (2 for a wrong flag)

def refused(script, *flags, status=1):
    said = run(script, *flags, *SMALL, status=status)
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("command, needs", [
    (("bnr.py", "cams"), 'no classifier in .*: run "make train"'),
    (("psa.py", "labels"), 'no seeds in .*: run "make cams"'),
    (("psa.py", "train"), 'no affinity labels in .*: run "make psa"'),
    (("psa.py", "walk"), 'no seeds in .*: run "make cams"'),
    (("segment.py", "train"), 'no pseudo labels in .*: run "make psa"'),
    (("segment.py", "predict"), 'no segmenter in .*: run "make seg"'),
    (("bnr.py", "export", "--to", "x"), 'no seeds in .*: run "make cams"'),
    (("evaluate.py",), 'nothing to score in .*: run "make train"')])
def test_a_missing_stage_is_named_with_its_command(toy, tmp_path, command, needs):
    assert re.search(needs, refused(*command, "--data", toy, "--out", tmp_path))


def test_missing_weights_are_named_unless_from_scratch(toy, tmp_path):
    where = ("--data", toy, "--out", tmp_path)
    said = refused("bnr.py", "train", *where, "--no-from-scratch", "--arch", "tiny")
    assert "no weights" in said and "Conformer_tiny_patch16.pth" in said
    assert "no file" in refused("bnr.py", "train", *where, "--pretrained", tmp_path / "x.pth")
    shutil.copytree(toy / "SegmentationClass", tmp_path / "labels")
    train = ("segment.py", "train", *where, "--labels", tmp_path / "labels", "--no-from-scratch")
    assert "RESNET38=FILE (--resnet38) takes ilsvrc" in refused(*train)
    (tmp_path / "r.pth").touch()
    train = (*train[:-1], "--from-scratch", "--resnet38", tmp_path / "r.pth")
    assert "--from-scratch does not read" in refused(*train, status=2)


def test_bad_data_is_named(toy, tmp_path):
    assert "JPEGImages" in refused("bnr.py", "train", "--data", tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(toy, copy)
    train = ("bnr.py", "train", "--data", copy, "--out", tmp_path / "out")
    assert "24 training images are fewer than --batch-size 99" in refused(*train, "--batch-size", 99)
    (copy / "JPEGImages/toy_0003.jpg").unlink()
    assert "JPEGImages lacks 1 of 24 photos, first toy_0003.jpg" in refused(*train)
    (copy / "ImageSets/Segmentation/train_aug.txt").write_text("toy_0000\ntoy_0000\n")
    assert "twice, first toy_0000" in refused(*train)
    (copy / "ImageSets/Segmentation/train_aug.txt").unlink()
    assert "has no train_aug.txt" in refused(*train)
    shutil.copy(toy / "ImageSets/Segmentation/val.txt", copy / "ImageSets/Segmentation/train_aug.txt")
    (copy / "labels.txt").write_text("toy_0024 unicorn\n")
    assert 'the label "unicorn" of toy_0024 is none of its 5 classes' in refused(*train)
    (copy / "labels.txt").unlink()
    assert "no image labels of toy_0024" in refused(*train)
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_of_a_process(tmp_path):
    said = run_process("bnr.py", "train", "--data", tmp_path, status=1)
    assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said


@pytest.mark.parametrize("flags, says", [
    (("--loss", "mse"), "invalid choice: 'mse'"), (("--micro-batch", -1), "-1 is no whole number of at least 0"),
    (("--lr", 0), "0 is no number above 0"), (("--noise", "much"), "much is no number above 0"),
    (("--long-side", 9, 8), "9 is more than 8"), (("--crop", 100), "--crop 100 is no multiple of 16")])
def test_a_wrong_flag_has_status_2_and_names_the_range(toy, flags, says):
    assert says in refused("bnr.py", "train", "--data", toy, *flags, status=2)


def test_a_device_that_is_not_there_is_an_error(toy, tmp_path):
    where = ("--data", toy, "--out", tmp_path, "--device")
    assert "--device mps is neither cuda" in run("evaluate.py", *where, "mps", status=2)
    if not torch.cuda.is_available():
        assert "finds no usable GPU" in run("bnr.py", "train", *where, "cuda", status=1)


def test_processes_without_a_gpu_each_are_an_error_and_do_not_wait(monkeypatch):
    monkeypatch.setattr(engine, "WORLD", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "9")
    with pytest.raises(InputError, match="cuda:9: .* no usable GPU: each of 2 processes needs one"):
        engine.pick_device(None)


def test_what_needs_no_gpu_opens_none(done, monkeypatch):
    toy, out, _ = done
    monkeypatch.setattr(torch, "ones", lambda *size, device: pytest.fail(f"{device} was opened"))
    for command in (("psa.py", "labels"), ("evaluate.py",), ("report.py", "sheets")):
        assert "device: cpu" in run(*command, "--data", toy, "--out", out, "--preset", "toy", "--workers", 0)


def test_a_folder_without_photos_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no photos in" in refused("segment.py", "predict", tmp_path / "empty", "--out", tmp_path)
