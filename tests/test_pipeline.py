"""The five scripts through their own command lines on a small toy set, and the errors that they promise."""
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from conftest import run, run_process
from PIL import Image

import data

SMALL = ("--preset", "toy", "--device", "cpu", "--workers", 0)
CLASSIFIER = ("--epochs", 2, "--crop", 64, "--long-side", 64, 96, "--batch-size", 8)
AFFINITY = ("--epochs", 1, "--width", 2, "--crop", 64, "--batch-size", 8)
SEGMENTER = ("--iterations", 4, "--width", 2, "--crop", 64, "--batch-size", 8)


@pytest.fixture(scope="module")
def done(toy, tmp_path_factory):
    """All stages, trained and exported with the masks out of reach; then scored. -> data, out, what was printed"""
    out, hidden = tmp_path_factory.mktemp("out"), toy / "hidden"
    (toy / "SegmentationClass").rename(hidden)
    where, said = ("--data", toy, "--out", out, *SMALL), {}
    said["train"] = run_process("bnr.py", "train", *where, *CLASSIFIER)
    said["cams"] = run_process("bnr.py", "cams", *where)
    said["labels"] = run_process("psa.py", "labels", "--preset", "toy", "--data", toy, "--out", out, "--device", "cpu", "--workers", 2)
    said["affinity"] = run_process("psa.py", "train", *where, *AFFINITY)
    said["walk"] = run_process("psa.py", "walk", *where)
    said["segmenter"] = run_process("segment.py", "train", *where, *SEGMENTER)
    said["predict"] = run_process("segment.py", "predict", *where)
    said["unscored"] = run("data.py", "eval", *where)
    hidden.rename(toy / "SegmentationClass")
    said["eval"] = run_process("data.py", "eval", *where)
    return toy, out, said


def test_device_is_the_first_thing_printed(done):
    assert all(text.startswith("device: cpu") for text in done[2].values())


def test_every_stage_writes_what_the_next_reads(done):
    toy, out, _ = done
    train, val = data.DataSet(toy).ids("train_aug"), data.DataSet(toy).ids("val")
    for folder, ids, suffix in (("cams", train, ".npz"), ("affinity_labels", train, ".png"), ("pseudo_labels", train, ".png"),
                                ("segmentation", val, ".png")):
        assert {p.name for p in (out / folder).iterdir()} == {id + suffix for id in ids}
    for id in train:
        own = {1 + data.TOY_CLASSES.index(name) for name in data.DataSet(toy)._names(id)}
        size = data.read_image(toy / "JPEGImages" / f"{id}.jpg").size[::-1]
        label, seeds = data.read_mask(out / "pseudo_labels" / f"{id}.png"), data.read_seeds(out / "cams" / f"{id}.npz")
        assert label.shape == size == seeds[1].shape[1:]
        assert set(np.unique(label)) <= {0} | own == {0} | set(seeds[0].tolist())
        assert seeds[1].min() >= 0 and seeds[1].max() <= 1


def test_table_has_a_row_a_stage_and_the_json_the_same_numbers(done):
    toy, out, said = done
    results = json.loads((out / "results.json").read_text())
    stages = ["classifier", "plain CAM", "refined seeds", "affinity labels", "pseudo labels", "segmenter"]
    assert [row["stage"] for row in results["rows"]] == stages
    for row in results["rows"][1:]:
        assert f"{row['miou']:.2f}" in said["eval"] and len(row["iou"]) == 6
        assert row["miou"] == pytest.approx(100 * np.nanmean(row["iou"]))
        assert row["n"] == (8 if row["split"] == "val" else 24)
    assert "0.50/0.15" in said["eval"] and "bg 0.30" in said["eval"] and "looking at the masks" in said["eval"]
    assert "% of pixels that are labelled" in said["eval"]


def test_without_masks_the_table_says_so_and_pictures_are_drawn(done):
    said = done[2]["unscored"]
    assert "has no SegmentationClass" in said and "no masks" in said and f"drawn -> {done[1] / 'labels.png'}" in said


def test_anybodys_masks_and_class_maps_are_scored_alike(done, tmp_path):
    toy, out, _ = done
    rows = {r["stage"]: r for r in json.loads((out / "results.json").read_text())["rows"]}
    said = run("data.py", "eval", "--data", toy, "--masks", out / "pseudo_labels", "--seeds", out / "cams", *SMALL)
    assert f"{rows['pseudo labels']['miou']:.2f}" in said and f"{rows['refined seeds']['miou']:.2f}" in said
    run("data.py", "export", "--data", toy, "--out", out, "--to", tmp_path / "npy", *SMALL)
    said = run("data.py", "eval", "--data", toy, "--seeds", tmp_path / "npy", *SMALL)
    assert f"{rows['refined seeds']['miou']:.2f}" in said
    id = data.DataSet(toy).ids("train")[0]
    shutil.rmtree(tmp_path / "npy" / id)
    assert f"no class maps of {id}" in refused("data.py", "eval", "--data", toy, "--seeds", tmp_path / "npy")
    np.save(tmp_path / "npy" / f"{id}.npy", {0: np.zeros((2, 2))})
    assert "is a pickle" in refused("data.py", "eval", "--data", toy, "--seeds", tmp_path / "npy")


def test_the_segmenter_trains_on_anybodys_masks(done, tmp_path):
    toy, out, _ = done
    run("segment.py", "train", "--data", toy, "--out", tmp_path / "out", *SMALL, *SEGMENTER, "--labels", out / "pseudo_labels")
    both = [torch.load(o / "segmenter.pth", weights_only=True)["model"]["cls_conv.weight"] for o in (out, tmp_path / "out")]
    assert torch.equal(*both)
    lacks = refused("segment.py", "train", "--data", toy, "--out", tmp_path / "new", *SEGMENTER, "--labels", tmp_path)
    assert "lacks 24 of 24" in lacks


def test_any_photos_are_segmented_each_with_an_overlay(done, tmp_path):
    toy, out, _ = done
    id = data.DataSet(toy).ids("train")[0]
    (tmp_path / "in/deep").mkdir(parents=True)
    data.read_image(toy / "JPEGImages" / f"{id}.jpg").save(tmp_path / "in/deep/photo.PNG")
    shutil.copy(toy / "JPEGImages" / f"{id}.jpg", tmp_path / "one.jpg")
    run("segment.py", "predict", tmp_path / "in", tmp_path / "one.jpg", "--out", out, *SMALL)
    for name in ("deep/photo", "one"):
        mask = data.read_mask(out / "predictions" / f"{name}.png")
        assert mask.shape[::-1] == data.read_image(out / "predictions" / f"{name}_overlay.png").size
    run("segment.py", "predict", "--data", toy, "--out", out, *SMALL, "--ids", id)
    assert (data.read_mask(out / "segmentation" / f"{id}.png") == data.read_mask(out / "predictions/one.png")).all()
    assert "no photo and no folder" in refused("segment.py", "predict", tmp_path / "absent.jpg", "--out", out)


def test_the_submission_is_complete_and_of_the_photos_sizes(done, tmp_path):
    toy, out, _ = done
    ids = data.DataSet(toy).ids("val")
    flags = ("--data", toy, "--out", out, *SMALL, "--no-crf")
    assert "no test.txt" in refused("segment.py", "submit", "--data", toy, "--out", out)
    run("segment.py", "submit", *flags, "--split", "val")
    with tarfile.open(out / "results.tar.gz") as tar:
        assert sorted(tar.getnames()) == sorted(f"results/VOC2012/Segmentation/comp6_test_cls/{id}.png" for id in ids)
        for member, id in zip(sorted(tar.getmembers(), key=lambda m: m.name), sorted(ids)):
            mask = Image.open(tar.extractfile(member))
            assert mask.mode == "P" and mask.size == data.read_image(toy / "JPEGImages" / f"{id}.jpg").size


def test_a_second_call_does_nothing_again(done):
    toy, out, _ = done
    where = ("--data", toy, "--out", out, *SMALL)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for script, command, flags in (("bnr.py", "train", CLASSIFIER), ("bnr.py", "cams", ()), ("psa.py", "labels", ()),
                                   ("psa.py", "train", AFFINITY), ("psa.py", "walk", ()), ("segment.py", "train", SEGMENTER),
                                   ("segment.py", "predict", ())):
        assert "done already" in run(script, command, *where, *flags)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_one_lost_file_is_made_again_and_no_other(done):
    toy, out, _ = done
    lost, kept = sorted((out / "pseudo_labels").iterdir())[:2]
    content, time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    said = run("data.py", "eval", "--data", toy, "--out", out, "--workers", 0, status=1)
    assert f"no prediction {lost}" in said
    run("psa.py", "walk", "--data", toy, "--out", out, *SMALL)
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == time


def test_training_resumed_after_an_epoch_equals_one_that_never_stopped(done, tmp_path, monkeypatch):
    toy, out, _ = done
    first, write = tmp_path / "classifier.pth", data.write
    flags = ("--data", toy, "--out", tmp_path, *SMALL, *CLASSIFIER)

    def stop(path, save):
        write(path, save)
        if path == first:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "write", stop)
    run("bnr.py", "train", *flags, status=130)
    monkeypatch.undo()
    assert torch.load(first, weights_only=True)["step"] == 3
    run("bnr.py", "train", *flags)
    resumed, whole = (torch.load(p, weights_only=True)["model"] for p in (first, out / "classifier.pth"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_show_draws_a_row_of_six_panels(done):
    toy, out, _ = done
    id = data.DataSet(toy).ids("train")[0]
    run("segment.py", "predict", "--data", toy, "--out", out, *SMALL, "--ids", id)
    run("bnr.py", "show", "--data", toy, "--out", out, *SMALL, "--ids", id, "--height", 60)
    width, height = Image.open(out / "show.png").size
    photo = data.read_image(toy / "JPEGImages" / f"{id}.jpg").size
    assert height == 60 + 8 and width == 6 * (round(60 * photo[0] / photo[1]) + 4) + 4


def test_cams_takes_a_transcam_classifier_and_drops_its_background_row(done, tmp_path):
    toy, out, _ = done
    state = torch.load(out / "classifier.pth", weights_only=True)["model"]
    for name in ("conv_cls_head", "trans_cls_head"):
        for kind in ("weight", "bias"):
            value = state[f"{name}.{kind}"]
            state[f"{name}.{kind}"] = torch.cat([torch.full_like(value[:1], 1e6), value])
    torch.save(state, tmp_path / "transcam.pth")
    run("bnr.py", "cams", "--data", toy, "--out", tmp_path, *SMALL, "--crop", 64, "--weights", tmp_path / "transcam.pth")
    for path in (tmp_path / "cams").iterdir():
        ours, theirs = data.read_seeds(path), data.read_seeds(out / "cams" / path.name)
        assert (ours[0] == theirs[0]).all() and np.abs(ours[1] - theirs[1]).max() < 1e-5


def test_a_partial_file_needs_partial_and_fresh_blocks_start_sharp(done, tmp_path):
    toy, out, _ = done
    state = torch.load(out / "classifier.pth", weights_only=True)["model"]
    torch.save({k: v for k, v in state.items() if "trans" not in k or "cnn_block" in k}, tmp_path / "conv.pth")
    flags = ("train", "--data", toy, "--out", tmp_path / "out", *CLASSIFIER, "--epochs", 1, "--pretrained", tmp_path / "conv.pth")
    assert "--partial takes" in refused("bnr.py", *flags)
    said = run("bnr.py", *flags, *SMALL, "--partial")
    assert "fresh: " in said and "trans_1" in said and "conv_1 " not in said


def test_ablation_prints_table_5s_rows(toy, tmp_path):
    flags = ("--data", toy, "--out", tmp_path, *SMALL, *CLASSIFIER, "--epochs", 1)
    run("bnr.py", "train", *flags)
    said = run("bnr.py", "ablation", *flags, "--seeds", 0, 1)
    assert "classifier: done already" in said  # the run itself is a row
    for row in ("transcam", "no noise", "noise x1", "noise x2"):
        assert f"\n{row}\n" in said
    assert len(list(tmp_path.glob("ablation/*/cams.json"))) == 7
    assert said.count("refined seeds    train     2") == 4


def test_mean_over_runs(done, tmp_path):
    for n, value in enumerate((50.0, 60.0)):
        data.write_json(tmp_path / str(n) / "results.json", {"rows": [{"stage": "segmenter", "split": "val", "miou": value}]})
    assert "55.00   7.07  50.00 60.00" in run("data.py", "mean", tmp_path / "0", tmp_path / "1")
    assert "make eval" in run("data.py", "mean", tmp_path / "2", status=1)


# ---------------------------------------------------------------- errors: one line, status 1

def refused(script, *flags):
    said = run(script, *flags, *SMALL, status=1)
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("script, command, needs", [
    ("bnr.py", "cams", 'no classifier in .*: run "make train"'), ("psa.py", "labels", 'no seeds in .*: run "make cams"'),
    ("psa.py", "train", 'no affinity labels in .*: run "make psa"'), ("psa.py", "walk", 'no seeds in .*: run "make cams"'),
    ("segment.py", "train", 'no pseudo labels in .*: run "make psa"'), ("segment.py", "predict", 'no segmenter in .*: run "make seg"'),
    ("bnr.py", "show", 'no seeds in .*: run "make cams"'), ("data.py", "eval", 'nothing to score in .*: run "make train"')])
def test_a_missing_stage_is_named_with_its_command(toy, tmp_path, script, command, needs):
    assert re.search(needs, refused(script, command, "--data", toy, "--out", tmp_path))


def test_missing_weights_are_named_unless_from_scratch(toy, tmp_path):
    where = ("--data", toy, "--out", tmp_path)
    assert "Conformer_nano_patch16.pth" in refused("bnr.py", "train", *where, "--no-from-scratch")
    assert "no weight file" in refused("bnr.py", "train", *where, "--pretrained", tmp_path / "x.pth")


def test_bad_data_is_named(toy, tmp_path):
    assert "JPEGImages" in refused("bnr.py", "train", "--data", tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(toy, copy)
    where = ("--data", copy, "--out", tmp_path / "out")
    assert "fewer than a batch of 99" in refused("bnr.py", "train", *where, "--batch-size", 99)
    assert "no multiple of 16" in refused("bnr.py", "train", *where, "--crop", 100)
    (copy / "JPEGImages/toy_0003.jpg").unlink()
    assert "JPEGImages lacks 1 of 24 images, first toy_0003.jpg" in refused("bnr.py", "train", *where)
    (copy / "ImageSets/Segmentation/train_aug.txt").write_text("toy_0000\ntoy_0000\n")
    assert "twice, first toy_0000" in refused("bnr.py", "train", *where)
    (copy / "ImageSets/Segmentation/train_aug.txt").unlink()
    assert "has no train_aug.txt" in refused("bnr.py", "train", *where)
    assert not (tmp_path / "out").exists()


def test_an_unknown_label_is_named(toy, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(toy, copy)
    (copy / "labels.txt").write_text("toy_0000 unicorn\n")
    assert 'the label "unicorn" of toy_0000' in refused("bnr.py", "train", "--data", copy, "--out", tmp_path)
    (copy / "labels.txt").unlink()
    assert "no image labels of toy_0000" in refused("bnr.py", "train", "--data", copy, "--out", tmp_path)


def test_errors_are_one_line_of_a_process(tmp_path):
    said = run_process("bnr.py", "train", "--data", tmp_path, status=1)
    assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said


def test_a_wrong_flag_has_status_2(toy):
    run("bnr.py", "train", "--data", toy, "--loss", "mse", status=2)


def test_a_gpu_that_is_not_there_is_an_error(toy):
    if not torch.cuda.is_available():
        assert "finds no usable GPU" in run("bnr.py", "train", "--data", toy, "--device", "cuda", status=1)


def test_toy_is_not_drawn_over_other_data(tmp_path):
    (tmp_path / "mine.jpg").touch()
    assert "not drawing over it" in run("data.py", "toy", "--root", tmp_path, status=1)
