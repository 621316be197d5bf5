"""Scores: the fast forms against the plain, and what is said beside a table that rests on doubtful data."""
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_set, run
from small_run import NEW, WHERE

from wsss.masks import VOID, read_mask, write_mask
from wsss.stage import read_json


TINY = ("--iterations", 0, "--crop", 64, "--batch-size", 2, "--width", 1)


def rows_of(said):
    """{stage: its line} of a printed table."""
    table = said[said.index("stage   "):said.index("\n\n", said.index("stage   "))]
    return {re.split("  +", line)[0]: line for line in table.splitlines()[1:]}


def score():
    return run("wsss.evaluate", *WHERE)


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def relabel(root):
    edit(root / "data/labels.txt", "toy_0000 ", "toy_0000 lion ")


def rename_a_class(root):
    edit(root / "data/classes.txt", "lion", "zebra")
    edit(root / "data/labels.txt", "lion", "zebra")


@pytest.mark.parametrize("change", [relabel, rename_a_class])
def test_rows_made_from_other_labels_or_classes_are_marked(here, change):
    assert "FRESH=1" not in score()
    change(here)
    marked = [name for name, line in rows_of(score()).items() if "made from other lists, labels or classes" in line]
    assert marked == ["classifier", "plain CAM", "refined seeds", "affinity labels", "pseudo labels", "segmenter"]


def test_labels_older_than_a_seed_that_was_made_again_alone_are_marked(here):
    (here / "out/cams/toy_0000.npz").unlink()
    run("bnr", "cams", "--scales", 0.5, *WHERE)
    marked = {name for name, line in rows_of(score()).items() if "older than the seeds: make psa" in line}
    assert {"affinity labels", "pseudo labels"} <= marked and "refined seeds" not in marked


def test_map_stands_beside_the_list_it_was_measured_on(here):
    lists = here / "data/ImageSets/Segmentation"
    (lists / "val.txt").write_text("toy_0004\n")
    line = rows_of(score())["classifier"]
    assert re.search(r"val +2 ", line) and "measured on another list val: make train FRESH=1" in line


def test_photos_of_val_that_were_trained_on_are_told_beside_the_row(here):
    with open(here / "data/ImageSets/Segmentation/train.txt", "a") as file:
        file.write("toy_0004\n")
    assert "1 of these photos stand in train or train_aug too, and were trained on" in rows_of(score())["segmenter"]
    run("segment", "train", *WHERE, "--train-list", "val", "--labels", "data/SegmentationClass", *TINY, "--fresh")
    assert "2 of these photos stand in train or train_aug or val too" in rows_of(score())["segmenter"]


def test_affinity_labels_are_scored_on_the_photos_that_have_some(here):
    for lines, says in (("toy_0000\n", r"train +1 .*0.60/0.25"), ("toy_0004\n", r"train +0 .*no photos to score")):
        (here / "data/ImageSets/Segmentation/train_aug.txt").write_text(lines)
        assert re.search(says, rows_of(score())["affinity labels"])


@pytest.mark.parametrize("folder", [("--masks", "data/SegmentationClass"), ()])
def test_masks_that_show_no_class_are_told_beside_the_table(here, folder):
    for path in Path("data/SegmentationClass").iterdir():
        mask = read_mask(path)
        write_mask(path, np.where(mask > 0, VOID, 0))
    said = run("wsss.evaluate", *WHERE, *folder)
    assert re.search(r"doubtful: none of \d masks shows a class", said)
    assert bool(folder) or read_json(here / "out/results.json")["doubts"]


def test_a_class_that_its_masks_do_not_show_is_told_where_masks_are_trained_on(here):
    edit(here / "data/labels.txt", "\n", " lion\n")
    for path in Path("data/SegmentationClass").iterdir():
        mask = read_mask(path)
        write_mask(path, np.where(mask == 5, 0, mask))
    said = run("segment", "train", *NEW, "--labels", "data/SegmentationClass", *TINY)
    assert "doubtful: data/SegmentationClass: lion: labelled in 4 photos, in none of the masks" in said


def test_a_damaged_prediction_is_an_error_and_a_missing_one_is_told(here):
    (here / "out/segmentation/toy_0004.png").unlink()
    assert "1 of 2 segmentations are missing, first toy_0004: make seg" in rows_of(score())["segmenter"]
    root = make_set(here / "set", "ab")
    (root / "ImageSets/Segmentation/train.txt").write_text("a\n")
    said = run("wsss.evaluate", "--data", root, "--masks", root / "JPEGImages", status=1)
    assert said.splitlines()[-1] == f"error: {root}/JPEGImages lacks 1 of 1 masks, first a.png"
