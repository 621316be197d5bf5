"""The commands of prepare.py: toy set, VOC, COCO (miniature annotation files, masks worked by hand), and check."""
import io
import json
import os
import sys
import tarfile
from importlib.util import find_spec

import numpy as np
import pytest
from conftest import make_set, run
from PIL import Image

import data
import prepare


def said_in_one_line(printed):
    """A command that failed says so in one line, its last. -> that line"""
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and printed.splitlines()[-1] == lines[0]
    return lines[0]


def files_in(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- toy set

def draw(root, *flags, status=0):
    return run("prepare.py", "toy", "--root", root, "--train", 4, "--val", 2, *flags, status=status)


def test_toy_set_is_the_same_for_a_seed_and_differs_for_another():
    first, again, other = (prepare.toy_picture(np.random.RandomState([seed, 3])) for seed in (0, 0, 1))
    assert (np.array(first[0]) == np.array(again[0])).all() and (first[1] == again[1]).all()
    assert first[1].shape != other[1].shape or (first[1] != other[1]).any()


def test_toy_pictures_have_the_promised_sizes_values_and_void_borders():
    for n in range(12):
        photo, mask = prepare.toy_picture(np.random.RandomState([0, n]))
        assert photo.mode == "RGB" and photo.size == mask.shape[::-1] and all(160 <= side <= 256 for side in photo.size)
        assert set(np.unique(mask)) <= {0, 1, 2, 3, 4, 5, data.VOID}
        here, below = mask[:-1], mask[1:]
        assert not ((here != below) & (here != data.VOID) & (below != data.VOID)).any()  # void between any two classes


def test_a_toy_set_is_a_data_set_without_problems_and_is_drawn_once(tmp_path):
    said = draw(tmp_path / "toy")
    assert "4 train, 2 val pictures, 6 of them drawn now" in said
    dataset = data.DataSet(tmp_path / "toy")
    assert dataset.ids("train_aug") == dataset.ids("train") == [f"toy_{n:04d}" for n in range(4)]
    assert dataset.ids("val") == ["toy_0004", "toy_0005"] and dataset.classes == list(prepare.TOY_CLASSES)
    assert "no problems" in run("prepare.py", "check", "--data", tmp_path / "toy")
    before = files_in(tmp_path / "toy")
    assert "is drawn already" in draw(tmp_path / "toy") and files_in(tmp_path / "toy") == before
    assert not (tmp_path / "toy/toy.part.json").exists()


def test_an_interrupted_drawing_is_drawn_on(tmp_path, monkeypatch):
    draw(tmp_path / "whole")
    plain, calls = prepare.toy_picture, []

    def interrupted(rng):
        calls.append(rng)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(rng)
    monkeypatch.setattr(prepare, "toy_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "toy")
    assert not (tmp_path / "toy/toy.json").exists()  # which make takes for a finished set
    photo = tmp_path / "toy/JPEGImages/toy_0001.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    (tmp_path / "toy/JPEGImages/.toy_0003.jpg.999999999.tmp").write_bytes(b"of a process that was killed")
    kept = tmp_path / "toy/JPEGImages/toy_0002.jpg"
    time = kept.stat().st_mtime_ns
    assert "4 of them drawn now" in draw(tmp_path / "toy")
    assert files_in(tmp_path / "toy") == files_in(tmp_path / "whole") and kept.stat().st_mtime_ns == time


def test_a_drawing_interrupted_before_its_first_picture_is_drawn_on(tmp_path):
    draw(tmp_path / "whole")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/toy.part.json").write_bytes((tmp_path / "whole/toy.json").read_bytes())
    draw(tmp_path / "toy")
    assert files_in(tmp_path / "toy") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("flags, unfinished", [(("--seed", 1), False), (("--train", 5), True)])
def test_a_toy_set_of_another_seed_or_size_is_refused(tmp_path, flags, unfinished):
    draw(tmp_path)
    if unfinished:
        (tmp_path / "toy.json").rename(tmp_path / "toy.part.json")
    before = files_in(tmp_path)
    said = said_in_one_line(draw(tmp_path, *flags, status=1))
    assert "holds a drawing of --seed 0 --train 4 --val 2: take another --root" in said and files_in(tmp_path) == before


def test_a_damaged_picture_of_a_finished_toy_set_is_drawn_again_and_edited_lists_stay(tmp_path):
    draw(tmp_path)
    before = files_in(tmp_path)
    (tmp_path / "SegmentationClass/toy_0002.png").write_bytes(b"")
    (tmp_path / "JPEGImages/toy_0005.jpg").unlink()
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text("toy_0001\n")
    (tmp_path / "classes.txt").unlink()
    assert "2 of them drawn now" in draw(tmp_path)
    assert files_in(tmp_path) == {**before, "ImageSets/Segmentation/train_aug.txt": b"toy_0001\n"}


def test_a_toy_set_is_drawn_neither_over_other_things_nor_over_a_file(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(b"x")
    assert "holds something else" in said_in_one_line(draw(tmp_path / "mine", status=1))
    said_in_one_line(draw(tmp_path / "mine/photo.jpg", status=1))
    assert files_in(tmp_path) == {"mine/photo.jpg": b"x"}
    (tmp_path / "mine/toy.json").write_text("[1")
    assert "toy.json is damaged or none of ours" in said_in_one_line(draw(tmp_path / "mine", status=1))


@pytest.mark.parametrize("flags", [
    ("toy", "--train", 0), ("toy", "--val", -1), ("toy", "--seed", -1), ("toy", "--seed", 2 ** 32),
    ("toy", "--train", "many"), ("coco", "--root", "x", "--workers", -1), ("voc",), ()])
def test_a_wrong_flag_is_exit_status_2(flags):
    assert "Traceback" not in run("prepare.py", *flags, status=2)


# ---------------------------------------------------------------- PASCAL VOC 2012

def make_devkit(tmp_path):
    devkit = tmp_path / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True)
    (tmp_path / "sbd").mkdir()
    for name, labels in {"a": ["dog", "dog"], "b": ["cat", "person"], "c": ["sheep"], "d": ["cow"], "e": []}.items():
        Image.new("RGB", (5, 4)).save(devkit / "JPEGImages" / f"{name}.jpg")
        objects = "".join(f"<object><name>{label}</name><difficult>1</difficult><part><name>head</name></part></object>"
                          for label in labels)
        text = f"<annotation><folder>VOC2012</folder>{objects}</annotation>"
        (devkit / "Annotations" / f"{name}.xml").write_text(text)
    (devkit / "ImageSets/Segmentation/train.txt").write_text("a")
    (devkit / "ImageSets/Segmentation/val.txt").write_text("b\r\n")
    (tmp_path / "sbd/train.txt").write_text("b\r\nc\r\n")
    (tmp_path / "sbd/val.txt").write_text("d\na")
    return devkit


def test_voc_lists_and_labels_come_from_devkit_and_sbd(tmp_path, monkeypatch):
    devkit = make_devkit(tmp_path)
    said = run("prepare.py", "voc", "--root", tmp_path, status=1)  # written, but no complete VOC 2012
    assert "train 1, val 1, test 0, train_aug 3" in said and "train_aug has 3 ids, VOC 2012's 10582" in said
    assert (devkit / "ImageSets/Segmentation/train_aug.txt").read_text() == "a\nc\nd\n"
    assert (devkit / "labels.txt").read_text() == "a dog\nb cat person\nc sheep\nd cow\n"
    assert data.DataSet(devkit).ids("train_aug") == ["a", "c", "d"]
    (devkit / "JPEGImages/d.jpg").unlink()
    said = run("prepare.py", "voc", "--root", devkit, "--sbd", tmp_path / "sbd", status=1)
    assert "JPEGImages lacks 1 of 3 photos, first d.jpg" in said_in_one_line(said)

    def offline(url, folder, md5):
        raise OSError("no route")
    monkeypatch.setattr(prepare, "download_url", offline)
    (tmp_path / "sbd/train.txt").unlink()
    said = run("prepare.py", "voc", "--root", devkit, status=1)
    assert "lacks benchmark_RELEASE/dataset/train.txt of SBD" in said_in_one_line(said)
    said = run("prepare.py", "voc", "--root", tmp_path / "empty", status=1)
    assert "lacks VOCdevkit/VOC2012, and http" in said_in_one_line(said)


def test_voc_refuses_a_list_that_leads_out_and_writes_nothing(tmp_path):
    devkit = make_devkit(tmp_path)
    (tmp_path / "sbd/train.txt").write_text("c\n../../evil\n")
    before = files_in(tmp_path)
    said = run("prepare.py", "voc", "--root", devkit, "--sbd", tmp_path / "sbd", status=1)
    assert "../../evil" in said_in_one_line(said)
    assert files_in(tmp_path) == before


def archive_of(path, *members):
    """A tar archive of empty members, each a name, or a TarInfo."""
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            archive.addfile(member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member), io.BytesIO())


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("member, says", [
    ("../evil", "its member ../evil is absolute or has .. in its path"),
    ("/tmp/evil", "its member /tmp/evil is absolute"),
    (special("a/link", tarfile.SYMTYPE, "../../evil"), "outside"),
    (special("a/hard", tarfile.LNKTYPE, "../evil"), "outside"), (special("a/pipe", tarfile.FIFOTYPE), "special file")])
def test_an_archive_that_would_write_elsewhere_is_refused_whole(tmp_path, monkeypatch, member, says):
    root = tmp_path / "deep/root"

    def download(url, folder, md5):
        root.mkdir(parents=True)
        archive_of(root / url.rsplit("/")[-1], "VOCdevkit/good", member)
    monkeypatch.setattr(prepare, "download_url", download)
    said = said_in_one_line(run("prepare.py", "voc", "--root", root, status=1))
    assert "VOCtrainval_11-May-2012.tar" in said and says in said
    assert len(list(tmp_path.rglob("*"))) == 3  # deep, root and the archive


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_an_archive_that_is_none_is_named(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(data.InputError, match="cannot unpack .*x.tar"):
        prepare.unpack(tmp_path / "x.tar", tmp_path)


def test_an_archive_cut_short_is_named(tmp_path):
    big = tmp_path / "noise"
    big.write_bytes(os.urandom(100_000))
    with tarfile.open(tmp_path / "x.tar", "w:gz") as archive:
        archive.add(big, "noise")
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:50_000])
    with pytest.raises(data.InputError, match="cannot unpack .*x.tar"):
        prepare.unpack(tmp_path / "x.tar", tmp_path / "to")


def test_a_good_archive_is_unpacked(tmp_path):
    archive_of(tmp_path / "x.tar", "VOC2012/JPEGImages/a.jpg", special("VOC2012/link", tarfile.SYMTYPE, "JPEGImages"))
    prepare.unpack(tmp_path / "x.tar", tmp_path)
    assert (tmp_path / "VOC2012/link/a.jpg").is_file()


def test_an_archive_whose_unpacking_was_killed_is_unpacked_again(tmp_path, monkeypatch):
    devkit, root, fetched = make_devkit(tmp_path / "made"), tmp_path / "root", []
    root.mkdir()

    def download(url, folder, md5):
        fetched.append(url)
        with tarfile.open(folder / url.rsplit("/")[-1], "w") as archive:
            archive.add(devkit, "VOCdevkit/VOC2012")

    class Killed(BaseException):
        pass

    def killed(self, folder, filter):
        self.extract(self.getmember("VOCdevkit/VOC2012/JPEGImages/a.jpg"), folder, filter=filter)
        raise Killed

    monkeypatch.setattr(prepare, "download_url", download)
    voc = ("prepare.py", "voc", "--root", root, "--sbd", tmp_path / "made/sbd")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", killed)
        with pytest.raises(Killed):
            run(*voc)
    assert (root / "VOCdevkit/VOC2012/JPEGImages/a.jpg").is_file() and len(fetched) == 1
    assert "train 1, val 1, test 0, train_aug 3" in run(*voc, status=1) and len(fetched) == 2
    assert "train 1, val 1, test 0, train_aug 3" in run(*voc, status=1) and len(fetched) == 2  # whole: not again


# ---------------------------------------------------------------- MS COCO 2014

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
    said = run("prepare.py", "coco", "--root", root, "--workers", workers, status=status)
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
    monkeypatch.setattr(prepare, "decode", decode)


def test_coco_masks_labels_and_lists_by_hand(tmp_path, plain_decode):
    said = prepare_coco(make_coco(tmp_path))
    names = [f"train2014/COCO_train2014_{n:012d}" for n in (9, 12, 30)]
    dataset = data.DataSet(tmp_path)
    assert dataset.classes == ["traffic_light", "dog", "toothbrush"]
    assert dataset.ids("train_aug") == dataset.ids("train") == names
    assert dataset.ids("val") == ["val2014/COCO_val2014_000000000006"]
    for n in MASKS:
        assert data.read_mask(dataset.mask(f"train2014/COCO_train2014_{n:012d}")).tolist() == MASKS[n]
    assert (data.read_mask(dataset.mask(dataset.ids("val")[0])) == 2).all()
    assert len(list(tmp_path.glob("SegmentationClass/*/*"))) == 4
    assert dataset.labels(names).tolist() == [[1, 0, 1], [1, 1, 1], [1, 1, 1]]  # a crowd counts
    assert "train_aug: images a class: traffic_light 3, dog 2, toothbrush 3" in said
    assert "val: images a class: traffic_light 0, dog 1, toothbrush 0" in said
    assert "train_aug 3, val 1, train 3" in said
    assert "train_aug has 3 ids, COCO 2014's 82081; val has 1 ids, COCO 2014's 40137" in said
    assert "peak memory" in said
    for split in ("train2014", "val2014"):
        assert (tmp_path / "JPEGImages" / split).readlink().as_posix() == f"../{split}"
    assert "no problems" in run("prepare.py", "check", "--data", tmp_path)


def test_coco_goes_on_where_it_was_stopped(tmp_path, plain_decode):
    prepare_coco(make_coco(tmp_path))
    files = files_in(tmp_path)
    lost, empty, *kept = sorted(tmp_path.glob("SegmentationClass/*/*"))
    times = [path.stat().st_mtime_ns for path in kept]
    lost.unlink()
    empty.write_bytes(b"")
    lost.with_name(".lost.png.4194305.tmp").touch()  # of a process that was killed
    prepare_coco(tmp_path)
    assert files_in(tmp_path) == files and [path.stat().st_mtime_ns for path in kept] == times


@pytest.mark.parametrize("wrong, says", [
    (annotation(70, 8, 2, []), "annotation 70 is of image 8, category 2, of which one is not listed"),
    (annotation(70, 9, 3, []), "annotation 70 is of image 9, category 3, of which one is not listed"),
    (annotation(70, 9, 2, [[0, 0, "x"]]), "instances_train2014.json: TypeError"),
    ({"id": 70, "image_id": 9}, "instances_train2014.json: KeyError 'segmentation'")])
def test_coco_names_a_wrong_annotation(tmp_path, plain_decode, wrong, says):
    assert says in said_in_one_line(prepare_coco(make_coco(tmp_path, TRAIN + [wrong])))
    assert not (tmp_path / "SegmentationClass").exists()


@pytest.mark.parametrize("key, value", [
    ("file_name", "../../evil.jpg"), ("file_name", "/tmp/evil.jpg"),
    ("file_name", "COCO_train2014_000000000012.jpg"),  # that of another
    ("height", 0), ("width", 1e300)])
def test_coco_names_an_image_with_an_odd_entry(tmp_path, plain_decode, key, value):
    path = make_coco(tmp_path / "root") / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    content["images"][2][key] = value
    path.write_text(json.dumps(content))
    before = files_in(tmp_path)
    said_in_one_line(prepare_coco(tmp_path / "root"))
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("content", [
    "[" * 100_000, '{"images": 1, "annotations": 2, "categories": 3}'])
def test_coco_names_an_annotation_file_of_odd_content(tmp_path, plain_decode, content):
    path = make_coco(tmp_path) / "annotations/instances_train2014.json"
    path.write_text(content)
    assert "instances_train2014.json" in said_in_one_line(prepare_coco(tmp_path))
    path.write_bytes(b"\xff\xfe{\x00}\x00")
    assert "is no UTF-8 text" in said_in_one_line(prepare_coco(tmp_path))


def test_coco_names_what_is_missing_broken_or_in_the_way(tmp_path, plain_decode):
    path = make_coco(tmp_path) / "annotations/instances_val2014.json"
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert "instances_val2014.json: JSONDecodeError" in prepare_coco(tmp_path)
    path.write_text(whole.replace("dog", "cat"))
    assert "instances_val2014.json has other categories than the other split" in prepare_coco(tmp_path)
    assert not (tmp_path / "ImageSets").exists()  # half a data set has no lists
    path.unlink()
    (tmp_path / "val2014").rename(tmp_path / "moved")
    assert "lacks val2014, annotations/instances_val2014.json of COCO 2014" in prepare_coco(tmp_path)
    (tmp_path / "moved").rename(tmp_path / "val2014")
    path.write_text(whole)
    (tmp_path / "val2014/COCO_val2014_000000000006.jpg").unlink()
    assert "val2014 lacks 1 of 1 photos, first COCO_val2014_000000000006.jpg" in prepare_coco(tmp_path)
    (tmp_path / "JPEGImages/mine").mkdir()
    assert "JPEGImages holds more than links to train2014 and val2014" in prepare_coco(tmp_path)


def test_coco_without_pycocotools_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert 'run "make coco DATA=DIR"' in said_in_one_line(prepare_coco(make_coco(tmp_path)))


@pytest.mark.skipif(find_spec("pycocotools") is None, reason="make coco installs pycocotools")
@pytest.mark.parametrize("workers", [0, 2])
def test_pycocotools_draws_the_same_masks_and_packed_runs(tmp_path, workers):
    # BOX: from the fourth on, a length less the one two before
    packed = annotation(9, 4, 7, {"size": [4, 6], "counts": "82208"})
    prepare_coco(make_coco(tmp_path, TRAIN + [packed]), workers=workers)
    box = np.zeros((4, 6), int)
    box[:2, 2:4] = 2
    for n, mask in {**MASKS, 4: box.tolist()}.items():
        assert data.read_mask(tmp_path / f"SegmentationClass/train2014/COCO_train2014_{n:012d}.png").tolist() == mask
    triangle = prepare.decode([[0, 0, 4, 0, 0, 4], [1, 1, 2, 2]], 4, 4)
    # centres within, those on the edge not
    assert triangle.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    bad = annotation(10, 4, 7, {"size": [4, 5], "counts": [20]})
    said = said_in_one_line(prepare_coco(make_coco(tmp_path / "bad", TRAIN + [bad]), workers=workers))
    assert said.startswith("error: annotation 10 for ")
    assert said.endswith("(4x6) cannot be decoded: run lengths of another size")


@pytest.mark.skipif(find_spec("pycocotools") is None, reason="make coco installs pycocotools")
@pytest.mark.parametrize("segmentation", [
    [[0, 0, 4, 0, 0, float("nan")]], [[0, 0, 4, 0, 0, 1e300]], {"size": [4, 6], "counts": None},
    {"size": [4, 6], "counts": [-1, 25]}])
def test_pycocotools_is_spared_what_it_cannot_take(tmp_path, segmentation):
    bad = annotation(10, 4, 7, segmentation)
    said = said_in_one_line(prepare_coco(make_coco(tmp_path, TRAIN + [bad])))
    assert "annotation 10 for" in said and "cannot be decoded" in said


# ---------------------------------------------------------------- check

def problems_of(root):
    """What check names, each kind of problem in one line."""
    said = run("prepare.py", "check", "--data", root, status=1)
    said_in_one_line(said)
    found = [line.removeprefix("problem: ") for line in said.splitlines() if line.startswith("problem: ")]
    assert f"error: {len(found)} problems in {root}" in said
    return found


def test_check_counts_and_notes_what_breaks_nothing(tmp_path):
    make_set(tmp_path, ids=("a", "b", "c"))
    data.write_mask(tmp_path / "SegmentationClass/a.png", np.full((30, 20), 2))
    said = run("prepare.py", "check", "--data", tmp_path)
    assert "3 photos in" in said and "3 classes with background: cat dog" in said
    assert "train_aug: 3 images, 1 masks, 0 without any label; images a class: cat 3, dog 0" in said
    assert "no problems" in said and "note: masks and labels of 1 photos differ, first a: mask dog, labels cat" in said
    assert "longer than" not in said
    Image.new("RGB", (2000, 10)).save(tmp_path / "JPEGImages/c.jpg")
    said = run("prepare.py", "check", "--data", tmp_path)
    assert "note: 1 photos are longer than 1000 pixels, first c: 2000x10" in said


def test_check_looks_at_everything_before_it_fails(tmp_path):
    make_set(tmp_path, ids=("a", "b", "c", "d", "e"))
    lists = tmp_path / "ImageSets/Segmentation"
    (lists / "train_aug.txt").write_text("a\nb\nc\nd\nd\ne\nlost\n../evil\n")
    (lists / "train.txt").write_text("a\nb\nc\n")
    (lists / "val.txt").write_text("\n")
    (tmp_path / "labels.txt").write_text("a cat\nb cat\nc cow\nd\n")  # none of e
    data.write_mask(tmp_path / "SegmentationClass/a.png", np.full((30, 21), 2))
    data.write_mask(tmp_path / "SegmentationClass/b.png", np.full((30, 20), 3))
    (tmp_path / "JPEGImages/c.jpg").write_bytes((tmp_path / "JPEGImages/c.jpg").read_bytes()[:200])
    Image.new("RGB", (20, 30)).save(tmp_path / "JPEGImages/b.png")
    found = problems_of(tmp_path)
    for says in (
            "two photos have the id b", "'../evil', which would lead out", "lacks 1 of 6 photos, first lost.jpg",
            "val.txt is empty", 'the label "cow" of c is none of its 2 classes', "no image labels of e",
            "1 of 5 photos in train_aug have no label, first d", "lacks 1 of 3 masks of train, first c.png",
            "a.png is 21x30, its photo 20x30", "b.png has value 3", "c.jpg"):
        assert sum(says in line for line in found) == 1, (says, found)
    assert len(found) == 11
    (lists / "train_aug.txt").write_text("a\nb\nc\nd\nd\ne\n")
    assert any("train_aug.txt names 1 ids twice, first d" in line for line in problems_of(tmp_path))


@pytest.mark.parametrize("name", ["train_aug", "train", "val"])
def test_check_names_an_empty_list(tmp_path, name):
    (make_set(tmp_path) / f"ImageSets/Segmentation/{name}.txt").write_text("\n \n")
    assert problems_of(tmp_path) == [f"{tmp_path}/ImageSets/Segmentation/{name}.txt is empty: one image id a line"]


def test_check_names_a_photo_listed_twice_also_with_other_classes(tmp_path):
    make_set(tmp_path)
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text("a\nb\na\n")
    assert problems_of(tmp_path) == [f"{tmp_path}/ImageSets/Segmentation/train_aug.txt names 1 ids twice, first a"]
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_text("a\nb\n")
    (tmp_path / "labels.txt").write_text("a cat\nb cat\na dog\n../c cat\nb cat\nb cat dog\n")
    labels = tmp_path / "labels.txt"
    assert problems_of(tmp_path) == [
        f"{labels} names a twice, with other classes",
        f"{labels} has the id '../c', which would lead out of the folder",
        f"{labels} names b twice, with other classes"]


def test_check_misses_masks_of_train_and_val_only_where_there_are_masks(tmp_path):
    make_set(tmp_path)
    for name in ("train", "val"):
        (tmp_path / f"ImageSets/Segmentation/{name}.txt").write_text("b\n")
    assert "no problems" in run("prepare.py", "check", "--data", tmp_path)
    (tmp_path / "SegmentationClass").mkdir()
    folder = tmp_path / "SegmentationClass"
    assert problems_of(tmp_path) == [f"{folder} lacks 1 of 1 masks of {name}, first b.png" for name in ("train", "val")]


def test_check_goes_on_in_a_folder_of_photos_with_labels(tmp_path):
    for name in ("a.jpg", "b.png", "b.webp"):
        Image.new("RGB", (5, 4)).save(tmp_path / name)
    (tmp_path / "c.jpg").write_bytes(b"")
    (tmp_path / "labels.txt").write_text("a.jpg plum\nb apple\nc.jpg\nlost plum\n")
    found = problems_of(tmp_path)
    for says in ("two photos have the id b", "lacks 1 of 4 photos, first lost.jpg",
                 "1 of 3 photos in train_aug have no label, first c", "c.jpg"):
        assert any(says in line for line in found), (says, found)


def test_check_shows_twenty_problems_and_counts_all(tmp_path):
    make_set(tmp_path, ids=[f"{n:02d}" for n in range(30)])
    for path in (tmp_path / "JPEGImages").iterdir():
        path.write_bytes(b"")
    said = run("prepare.py", "check", "--data", tmp_path, status=1)
    assert said.count("problem: ") == 20 and f"error: 30 problems in {tmp_path}" in said


def test_check_does_not_hang_on_pipes_devices_and_loops(tmp_path):
    make_set(tmp_path)
    (tmp_path / "JPEGImages/loop").symlink_to("..")
    (tmp_path / "JPEGImages/self.jpg").symlink_to("self.jpg")
    (tmp_path / "JPEGImages/zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "JPEGImages/pipe.jpg")
    assert "no problems" in run("prepare.py", "check", "--data", tmp_path)
    with open(tmp_path / "ImageSets/Segmentation/train_aug.txt", "a") as file:
        file.write("pipe\nzero\n")
    (tmp_path / "SegmentationClass").mkdir()
    os.mkfifo(tmp_path / "SegmentationClass/a.png")
    assert problems_of(tmp_path) == [f"{tmp_path}/JPEGImages lacks 2 of 4 photos, first pipe.jpg"]


@pytest.mark.parametrize("file, content", [
    ("ImageSets/Segmentation/train_aug.txt", "a\né\n".encode("latin-1")),
    ("ImageSets/Segmentation/val.txt", b"a\0b\n")])
def test_check_names_a_text_of_odd_bytes(tmp_path, file, content):
    (make_set(tmp_path) / file).write_bytes(content)
    said_in_one_line(run("prepare.py", "check", "--data", tmp_path, status=1))


def test_check_of_no_data_set_says_how_to_draw_one(tmp_path):
    said = said_in_one_line(run("prepare.py", "check", "--data", tmp_path / "none", status=1))
    assert 'the toy set is drawn by "python prepare.py toy"' in said
