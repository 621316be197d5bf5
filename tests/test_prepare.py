"""The commands of wsss.prepare: toy set, VOC, COCO (miniature annotation files, masks worked by hand), and check."""
import json
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import make_set, run
from PIL import Image
from small_run import stopped

from wsss import prepare
from wsss.data import DataSet
from wsss.masks import VOID, read_mask, write_mask


def said_in_one_line(printed):
    """A command that failed says so in one line, its last. -> that line"""
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and printed.splitlines()[-1] == lines[0]
    return lines[0]


def files_in(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def draw(root, *flags, status=0):
    return run("wsss.prepare", "toy", "--root", root, "--train", 4, "--val", 2, *flags, status=status)


def test_toy_pictures_have_the_promised_sizes_values_and_void_borders():
    for n in range(12):
        photo, mask = prepare.toy_picture(np.random.RandomState([0, n]))
        assert photo.mode == "RGB" and photo.size == mask.shape[::-1] and all(160 <= side <= 256 for side in photo.size)
        assert set(np.unique(mask)) <= {0, 1, 2, 3, 4, 5, VOID}
        here, below = mask[:-1], mask[1:]
        assert not ((here != below) & (here != VOID) & (below != VOID)).any()  # void between any two classes


def test_a_toy_set_is_a_data_set_without_problems_and_is_drawn_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "4 train, 2 val pictures" in draw(".")
    dataset = DataSet(tmp_path)
    assert dataset.ids("train_aug") == dataset.ids("train") == [f"toy_{n:04d}" for n in range(4)]
    assert dataset.ids("val") == ["toy_0004", "toy_0005"] and dataset.classes == list(prepare.TOY_CLASSES)
    assert "no problems" in run("wsss.prepare", "check", "--data", tmp_path)
    before = files_in(tmp_path)
    assert "is drawn already" in draw(tmp_path) and files_in(tmp_path) == before


def test_an_interrupted_toy_set_is_drawn_again(tmp_path, monkeypatch):
    with stopped(monkeypatch, prepare, "toy_picture", 3):
        draw(tmp_path / "a", status=130)
    assert not (tmp_path / "a").exists()
    draw(tmp_path / "a"), draw(tmp_path / "b")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b") and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("flags, file, content, says", [
    (("--seed", 1), None, None, "holds another drawing: take another --root"),
    (("--train", 5), None, None, "holds another drawing"),
    ((), "toy.json", b"[1", "toy.json is damaged or not one of ours"), ((), "photo.jpg", b"x", "holds something else")])
def test_a_toy_set_is_not_drawn_over_anything_else(tmp_path, flags, file, content, says):
    if file:
        (tmp_path / file).write_bytes(content)
    else:
        draw(tmp_path)
    before = files_in(tmp_path)
    assert says in said_in_one_line(draw(tmp_path, *flags, status=1)) and files_in(tmp_path) == before


def make_devkit(tmp_path):
    devkit = tmp_path / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True)
    (tmp_path / "benchmark_RELEASE/dataset").mkdir(parents=True)
    for name, labels in {"a": ["dog", "dog"], "b": ["cat", "person"], "c": ["sheep"], "d": ["cow"], "e": []}.items():
        Image.new("RGB", (5, 4)).save(devkit / "JPEGImages" / f"{name}.jpg")
        objects = "".join(f"<object><name>{label}</name><difficult>1</difficult><part><name>head</name></part></object>"
                          for label in labels)
        text = f"<annotation><folder>VOC2012</folder>{objects}</annotation>"
        (devkit / "Annotations" / f"{name}.xml").write_text(text)
    (devkit / "ImageSets/Segmentation/train.txt").write_text("a")
    (devkit / "ImageSets/Segmentation/val.txt").write_text("b\r\n")
    (tmp_path / "benchmark_RELEASE/dataset/train.txt").write_text("b\r\nc\r\n")
    (tmp_path / "benchmark_RELEASE/dataset/val.txt").write_text("d\na")
    return devkit


def prepare_voc(root, *flags):
    """Status 1: what is written has not VOC's sizes."""
    return said_in_one_line(run("wsss.prepare", "voc", "--root", root, *flags, status=1))


def test_voc_lists_and_labels_come_from_devkit_and_sbd(tmp_path):
    devkit, sbd = make_devkit(tmp_path), tmp_path / "benchmark_RELEASE/dataset"
    assert "train_aug has 3 ids, VOC 2012's 10582" in prepare_voc(tmp_path)
    assert (devkit / "ImageSets/Segmentation/train_aug.txt").read_text() == "a\nc\nd\n"
    assert (devkit / "labels.txt").read_text() == "a dog\nb cat person\nc sheep\nd cow\n"
    (devkit / "JPEGImages/d.jpg").unlink()
    assert "JPEGImages lacks 1 of 4 photos, first d.jpg" in prepare_voc(devkit, "--sbd", sbd)
    Image.new("RGB", (5, 4)).save(devkit / "JPEGImages/d.jpg")
    (sbd / "train.txt").write_text("c\n../../evil\n")
    before = files_in(tmp_path)
    assert "train.txt, line 2 ('../../evil') has the id" in prepare_voc(devkit, "--sbd", sbd)
    assert files_in(tmp_path) == before
    (sbd / "train.txt").unlink()
    assert "lacks 1 of 2 lists of SBD, first train.txt: take them from benchmark_RELEASE" in prepare_voc(tmp_path)
    shutil.rmtree(devkit), (sbd / "train.txt").write_text("c\n")
    assert "is not a data set: it has neither JPEGImages nor" in prepare_voc(tmp_path)


NEEDS_COCO = pytest.mark.skipif(find_spec("pycocotools") is None, reason="make coco installs pycocotools")
BOX = {"size": [4, 6], "counts": [8, 2, 2, 2, 10]}  # rows 0 and 1 of columns 2 and 3


def rectangle(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def annotation(number, image, category, segmentation, crowd=0):
    return {"id": number, "image_id": image, "category_id": category, "iscrowd": crowd, "segmentation": segmentation,
            "area": 1}


TRAIN = [  # category ids with gaps, as COCO's: 2 is class 1, 7 class 2, 90 class 3
    annotation(1, 9, 90, [rectangle(0, 0, 6, 4)]),
    annotation(2, 9, 2, [rectangle(1, 1, 4, 3)]),  # the smaller comes later ...
    annotation(3, 30, 2, [rectangle(1, 1, 4, 3)]),
    annotation(4, 30, 90, [rectangle(0, 0, 6, 4)]),  # ... or earlier, and stays on top
    annotation(5, 30, 7, [rectangle(0, 0, 2, 3)]),  # as large as 3, and later
    annotation(6, 12, 7, BOX, crowd=1), annotation(7, 12, 2, [rectangle(0, 0, 3, 1), rectangle(5, 3, 6, 4)]),
    annotation(8, 12, 90, {"size": [4, 6], "counts": [0, 24]}, crowd=1)]
MASKS = {
    9: [[3, 3, 3, 3, 3, 3], [3, 1, 1, 1, 3, 3], [3, 1, 1, 1, 3, 3], [3, 3, 3, 3, 3, 3]],
    30: [[2, 2, 3, 3, 3, 3], [2, 2, 1, 1, 3, 3], [2, 2, 1, 1, 3, 3], [3, 3, 3, 3, 3, 3]],
    # 7 and 6 have an area of four: the later lies on top
    12: [[1, 1, 1, 255, 255, 255], [255] * 6, [255] * 6, [255] * 5 + [1]]}


def make_coco(root, train=TRAIN):
    """Black photos of 4 x 6, without instances number 4 of train and 5 of val."""
    val = [annotation(1, 6, 7, [rectangle(0, 0, 6, 4)])]
    for split, numbers, annotations in (("train2014", (30, 4, 9, 12), train), ("val2014", (5, 6), val)):
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images = [{"id": n, "file_name": f"COCO_{split}_{n:012d}.jpg", "height": 4, "width": 6} for n in numbers]
        for image in images:
            Image.new("RGB", (6, 4)).save(root / split / image["file_name"])
        categories = [{"id": n, "name": name, "supercategory": "x"}
                      for n, name in ((90, "toothbrush"), (2, "traffic light"), (7, "dog"))]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def prepare_coco(root, status=1, workers=0):
    """Status 1: what is written has not COCO's sizes."""
    said = run("wsss.prepare", "coco", "--root", root, "--workers", workers, status=status)
    assert "Traceback" not in said
    return said


@NEEDS_COCO
def test_coco_masks_labels_and_lists_by_hand(tmp_path):
    said = prepare_coco(make_coco(tmp_path))
    names = [f"train2014/COCO_train2014_{n:012d}" for n in (9, 12, 30)]
    dataset = DataSet(tmp_path)
    assert dataset.classes == ["traffic_light", "dog", "toothbrush"]
    assert dataset.ids("train_aug") == dataset.ids("train") == names
    assert dataset.ids("val") == ["val2014/COCO_val2014_000000000006"]
    for n in MASKS:
        assert read_mask(dataset.mask(f"train2014/COCO_train2014_{n:012d}")).tolist() == MASKS[n]
    assert (read_mask(dataset.mask(dataset.ids("val")[0])) == 2).all()
    assert len(list(tmp_path.glob("SegmentationClass/*/*"))) == 4
    assert dataset.labels(names).tolist() == [[1, 0, 1], [1, 1, 1], [1, 1, 1]]  # a crowd counts
    assert "train_aug 3, val 1, train 3" in said
    assert "train_aug has 3 ids, COCO 2014's 82081; val has 1 ids, COCO 2014's 40137" in said
    for split in ("train2014", "val2014"):
        assert (tmp_path / "JPEGImages" / split).readlink().as_posix() == f"../{split}"
    assert "no problems" in run("wsss.prepare", "check", "--data", tmp_path)
    files = files_in(tmp_path)
    lost, empty, kept, *_ = sorted(tmp_path.glob("SegmentationClass/*/*"))
    time = kept.stat().st_mtime_ns
    lost.unlink()
    empty.write_bytes(b"")
    prepare_coco(tmp_path)  # goes on
    assert files_in(tmp_path) == files and kept.stat().st_mtime_ns == time


@NEEDS_COCO
@pytest.mark.parametrize("part, entry, says", [
    ("annotations", annotation(70, 8, 2, []), "instances_train2014.json: KeyError 8"),
    ("annotations", annotation(70, 9, 3, []), "instances_train2014.json: ValueError 3 is not in list"),
    ("annotations", {"id": 70, "image_id": 9, "iscrowd": 0, "category_id": 2}, "KeyError 'segmentation'"),
    ("annotations", annotation(70, 9, 2, {"size": [4, 6], "counts": 3}), "annotation of COCO_train2014_000000000009"),
    ("images", {"file_name": "../../evil.jpg"}, "lacks 1 of 3 photos, first evil.jpg"),
    ("images", None, "instances_train2014.json: JSONDecodeError")])
def test_coco_names_a_wrong_entry_and_writes_nothing(tmp_path, part, entry, says):
    path = make_coco(tmp_path) / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    if part == "annotations":
        content[part].append(entry)
    elif entry:
        content[part][2].update(entry)
    path.write_text(json.dumps(content)[:None if entry else -20])
    before = files_in(tmp_path)
    assert says in said_in_one_line(prepare_coco(tmp_path)) and files_in(tmp_path) == before


@NEEDS_COCO
def test_coco_names_what_is_missing_or_in_the_way(tmp_path):
    path = make_coco(tmp_path) / "annotations/instances_val2014.json"
    path.write_text((text := path.read_text()).replace("dog", "cat"))
    assert "instances_val2014.json has other categories than the other split" in prepare_coco(tmp_path)
    path.write_text(text), (tmp_path / "val2014/COCO_val2014_000000000006.jpg").unlink()
    assert "val2014 lacks 1 of 1 photos, first COCO_val2014_000000000006.jpg" in prepare_coco(tmp_path)
    assert not (tmp_path / "ImageSets").exists()  # half a data set has no lists
    path.unlink()
    assert "lacks annotations/instances_val2014.json of COCO 2014" in prepare_coco(tmp_path)


def test_coco_without_pycocotools_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert 'run "make coco DATA=DIR"' in said_in_one_line(prepare_coco(make_coco(tmp_path)))


def problems_of(root):
    """What check names, each kind of problem in one line."""
    said = run("wsss.prepare", "check", "--data", root, status=1)
    problems = [line.removeprefix("problem: ") for line in said.splitlines() if line.startswith("problem: ")]
    assert said_in_one_line(said) == f"error: {len(problems)} problems in {root}"
    return problems


def test_check_counts_and_notes_what_breaks_nothing(tmp_path):
    make_set(tmp_path, "abc")
    (tmp_path / "labels.txt").write_text("a cat\nb cat\nc\n")  # c is a negative
    for name, value in (("a", 1), ("b", 2)):
        write_mask(tmp_path / f"SegmentationClass/{name}.png", np.full((30, 20), value))
    said = run("wsss.prepare", "check", "--data", tmp_path)
    for line in ("3 photos in", "3 classes with background: cat dog", "no problems",
                 "train_aug: 3 images, 2 masks, 1 without any label; images a class: cat 2, dog 0",
                 "note: masks and labels of 1 photos differ, first b: mask dog, labels cat"):
        assert line in said


def test_check_names_masks_that_contradict_labels_and_photos_of_val_that_are_trained_on(tmp_path):
    make_set(tmp_path, "ab")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("b\n")
    for name in "ab":
        write_mask(tmp_path / f"SegmentationClass/{name}.png", np.full((30, 20), VOID))
    line = "none of {} masks shows a class: they hold 0 (background) and 255 (void) alone, where classes are 1 to 2"
    assert problems_of(tmp_path) == [
        "1 of 1 photos in val stand in train_aug or train too, first b", f"train_aug: {line.format(2)}",
        f"val: {line.format(1)}"]


def test_check_looks_at_everything_before_it_fails(tmp_path):
    make_set(tmp_path, ids="abcde")
    lists = tmp_path / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("a\nb\nc\n../evil\n")
    (lists / "val.txt").write_text("\n")
    (tmp_path / "labels.txt").write_text("a cat\nb cat\nc cat\nd\ne cat\n")
    write_mask(tmp_path / "SegmentationClass/a.png", np.full((30, 21), 2))
    write_mask(tmp_path / "SegmentationClass/b.png", np.full((30, 20), 3))
    (tmp_path / "JPEGImages/c.jpg").write_bytes((tmp_path / "JPEGImages/c.jpg").read_bytes()[:200])
    problems = problems_of(tmp_path)
    for says in ("'../evil', which would lead out", "val.txt is empty", "a.png is 21x30, its photo 20x30",
                 "b.png has value 3", "c.jpg"):
        assert sum(says in line for line in problems) == 1, (says, problems)
    assert len(problems) == 5
    (lists / "train.txt").write_text("a\nb\nc\n")
    assert any("lacks 1 of 3 masks of train, first c.png" in line for line in problems_of(tmp_path))
    (tmp_path / "labels.txt").write_text("a cat\nb cat\nc cow\nd cat\n")
    assert "the label 'cow' of c is not in classes.txt" in problems_of(tmp_path)[0]


def test_check_reads_a_folder_of_photos_with_labels(tmp_path):
    for name in ("a.jpg", "b.png", "c.tif", "not_listed.jpg"):
        Image.new("RGB", (5, 4)).save(tmp_path / name)
    (tmp_path / "labels.txt").write_text("a.jpg plum\nb apple\nc.tif\n")
    for name, value in (("a", 2), ("b", 1), ("c", 0)):
        write_mask(tmp_path / f"SegmentationClass/{name}.png", np.full((4, 5), value))
    said = run("wsss.prepare", "check", "--data", tmp_path)
    assert "4 photos in" in said and "no problems" in said
    (tmp_path / "c.tif").write_bytes(b"")
    assert "cannot read" in problems_of(tmp_path)[0]
    (tmp_path / "b.webp").write_bytes((tmp_path / "b.png").read_bytes())
    assert "two photos have the id b" in run("wsss.prepare", "check", "--data", tmp_path, status=1)


def test_check_shows_ten_problems_and_counts_all_of_many_photos(tmp_path):
    make_set(tmp_path, ids=[f"{n:04d}" for n in range(1010)])  # enough for more processes
    for path in sorted((tmp_path / "JPEGImages").iterdir())[-30:]:
        path.write_bytes(b"")
    said = run("wsss.prepare", "check", "--data", tmp_path, status=1)
    assert said.count("problem: ") == 10 and f"error: 30 problems in {tmp_path}" in said
