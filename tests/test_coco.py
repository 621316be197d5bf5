"""MS COCO 2014, on miniature annotation files whose masks and labels are worked by hand."""
import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import run
from PIL import Image

import data

BOX = {"size": [4, 6], "counts": [8, 2, 2, 2, 10]}  # rows 0 and 1 of columns 2 and 3


def rectangle(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def annotation(id, image, category, segmentation, crowd=0):
    return {"id": id, "image_id": image, "category_id": category, "iscrowd": crowd, "segmentation": segmentation, "area": 1}


TRAIN = [  # category ids with gaps, as COCO's: 2 is class 1, 7 class 2, 90 class 3
    annotation(1, 9, 90, [rectangle(0, 0, 6, 4)]), annotation(2, 9, 2, [rectangle(1, 1, 4, 3)]),  # the smaller comes later ...
    annotation(3, 30, 2, [rectangle(1, 1, 4, 3)]), annotation(4, 30, 90, [rectangle(0, 0, 6, 4)]),  # ... or earlier, and stays on top
    annotation(5, 30, 7, [rectangle(0, 0, 2, 3)]),  # as large as 3, and later
    annotation(6, 12, 7, BOX, crowd=1), annotation(7, 12, 2, [rectangle(0, 0, 3, 1), rectangle(5, 3, 6, 4)]),
    annotation(8, 12, 90, {"size": [4, 6], "counts": [0, 24]}, crowd=1)]
MASKS = {
    9: [[3, 3, 3, 3, 3, 3], [3, 1, 1, 1, 3, 3], [3, 1, 1, 1, 3, 3], [3, 3, 3, 3, 3, 3]],
    30: [[2, 2, 3, 3, 3, 3], [2, 2, 1, 1, 3, 3], [2, 2, 1, 1, 3, 3], [3, 3, 3, 3, 3, 3]],
    12: [[1, 1, 1, 255, 255, 255], [255] * 6, [255] * 6, [255] * 5 + [1]]}  # 7 and 6 have an area of four: the later lies on top


def make_coco(root, train=TRAIN):
    """Black photos of 4 x 6, without instances number 4 of train and 5 of val."""
    val = [annotation(1, 6, 7, [rectangle(0, 0, 6, 4)])]
    for split, ids, annotations in (("train2014", (30, 4, 9, 12), train), ("val2014", (5, 6), val)):
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images = [{"id": id, "file_name": f"COCO_{split}_{id:012d}.jpg", "height": 4, "width": 6} for id in ids]
        for image in images:
            Image.new("RGB", (6, 4)).save(root / split / image["file_name"])
        categories = [{"id": id, "name": name, "supercategory": "x"} for id, name in ((90, "toothbrush"), (2, "traffic light"), (7, "dog"))]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return root


def prepare(root, status=1, workers=0):
    """Status 1: what is written has not COCO's sizes."""
    said = run("data.py", "coco", "--root", root, "--workers", workers, status=status)
    assert "Traceback" not in said
    return said


@pytest.fixture
def plain_decode(monkeypatch):
    """Instead of pycocotools: axis-aligned rectangles and run lengths as lists."""
    def decode(segmentation, height, width):
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
        mask = np.zeros((height, width), bool)
        for x, y in ((p[::2], p[1::2]) for p in segmentation):
            mask[int(min(y)):int(max(y)), int(min(x)):int(max(x))] = True
        return mask
    monkeypatch.setattr(data, "decode", decode)


def test_coco_masks_labels_and_lists_by_hand(tmp_path, plain_decode):
    said = prepare(make_coco(tmp_path))
    ids = [f"train2014/COCO_train2014_{id:012d}" for id in (9, 12, 30)]
    dataset = data.DataSet(tmp_path)
    assert dataset.classes == ["traffic_light", "dog", "toothbrush"]
    assert dataset.ids("train_aug") == dataset.ids("train") == ids and dataset.ids("val") == ["val2014/COCO_val2014_000000000006"]
    for id in MASKS:
        assert data.read_mask(dataset.mask(f"train2014/COCO_train2014_{id:012d}")).tolist() == MASKS[id]
    assert (data.read_mask(dataset.mask(dataset.ids("val")[0])) == 2).all()
    assert len(list(tmp_path.glob("SegmentationClass/*/*"))) == 4
    assert dataset.labels(ids).tolist() == [[1, 0, 1], [1, 1, 1], [1, 1, 1]]  # a crowd counts
    assert "train_aug: images a class: traffic_light 3, dog 2, toothbrush 3" in said
    assert "val: images a class: traffic_light 0, dog 1, toothbrush 0" in said
    assert "train_aug 3, val 1, train 3" in said and "train_aug has 3 ids, COCO 2014's 82081; val has 1 ids, COCO 2014's 40137" in said
    assert "peak memory" in said
    for split in ("train2014", "val2014"):
        assert (tmp_path / "JPEGImages" / split).readlink().as_posix() == f"../{split}"
    assert "no problems" in run("data.py", "check", "--data", tmp_path)


def test_coco_goes_on_where_it_was_stopped(tmp_path, plain_decode):
    prepare(make_coco(tmp_path))
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    lost, *kept = sorted(tmp_path.glob("SegmentationClass/*/*"))
    times = [p.stat().st_mtime_ns for p in kept]
    lost.unlink()
    prepare(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files and [p.stat().st_mtime_ns for p in kept] == times


@pytest.mark.parametrize("wrong, says", [
    (annotation(70, 8, 2, []), "annotation 70 is of image 8, category 2, of which one is not listed"),
    (annotation(70, 9, 3, []), "annotation 70 is of image 9, category 3, of which one is not listed"),
    (annotation(70, 9, 2, [[0, 0, "x"]]), "instances_train2014.json: TypeError"),
    ({"id": 70, "image_id": 9}, "instances_train2014.json: KeyError 'segmentation'")])
def test_coco_names_a_wrong_annotation(tmp_path, plain_decode, wrong, says):
    assert says in prepare(make_coco(tmp_path, TRAIN + [wrong]))
    assert not (tmp_path / "SegmentationClass").exists()


def test_coco_names_what_is_missing_broken_or_in_the_way(tmp_path, plain_decode):
    path = make_coco(tmp_path) / "annotations/instances_val2014.json"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert "instances_val2014.json: JSONDecodeError" in prepare(tmp_path)
    path.write_text(whole.replace("dog", "cat"))
    assert "instances_val2014.json are not those of the other split" in prepare(tmp_path)
    assert not (tmp_path / "ImageSets").exists()  # half a data set has no lists
    path.unlink()
    (tmp_path / "val2014").rename(tmp_path / "moved")
    assert "lacks val2014, annotations/instances_val2014.json of COCO 2014" in prepare(tmp_path)
    (tmp_path / "moved").rename(tmp_path / "val2014")
    path.write_text(whole)
    (tmp_path / "val2014/COCO_val2014_000000000006.jpg").unlink()
    assert "val2014 lacks 1 of 1 images, first COCO_val2014_000000000006.jpg" in prepare(tmp_path)
    (tmp_path / "JPEGImages/mine").mkdir(parents=True)
    assert "JPEGImages holds more than links to train2014 and val2014" in prepare(tmp_path)


def test_coco_without_pycocotools_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert 'run "make coco DATA=DIR"' in prepare(make_coco(tmp_path))


@pytest.mark.skipif(find_spec("pycocotools") is None, reason="make coco installs pycocotools")
@pytest.mark.parametrize("workers", [0, 2])
def test_pycocotools_draws_the_same_masks_and_packed_runs(tmp_path, workers):
    packed = annotation(9, 4, 7, {"size": [4, 6], "counts": "82208"})  # BOX: from the fourth on, a length less the one two before
    prepare(make_coco(tmp_path, TRAIN + [packed]), workers=workers)
    box = np.zeros((4, 6), int)
    box[:2, 2:4] = 2
    for id, mask in {**MASKS, 4: box.tolist()}.items():
        assert data.read_mask(tmp_path / f"SegmentationClass/train2014/COCO_train2014_{id:012d}.png").tolist() == mask
    triangle = data.decode([[0, 0, 4, 0, 0, 4], [1, 1, 2, 2]], 4, 4)
    assert triangle.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]  # centres within, those on the edge not
    bad = annotation(10, 4, 7, {"size": [4, 5], "counts": [20]})
    said = prepare(make_coco(tmp_path / "bad", TRAIN + [bad]), workers=workers).splitlines()[-1]
    assert said.startswith("error: annotation 10 for ") and said.endswith("(4x6) cannot be decoded: run lengths of another size")
