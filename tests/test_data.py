"""Data sets, transforms, seeds, metrics."""
import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from torchvision.transforms import v2

import data


def make_set(root, ids=("a", "b"), size=(20, 30)):
    """A data set of black photos, all of class "cat", without masks."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for id in ids:
        Image.new("RGB", size).save(root / "JPEGImages" / f"{id}.jpg")
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "labels.txt").write_text("".join(f"{id} cat\n" for id in ids))
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("".join(f"{id}\n" for id in ids))
    return root


def test_toy_set_is_the_same_for_a_seed_and_differs_for_another():
    first, again, other = (data.toy_picture(np.random.RandomState([seed, 3])) for seed in (0, 0, 1))
    assert (np.array(first[0]) == np.array(again[0])).all() and (first[1] == again[1]).all()
    assert first[1].shape != other[1].shape or (first[1] != other[1]).any()


def test_toy_pictures_have_the_promised_sizes_values_and_void_borders():
    for n in range(12):
        photo, mask = data.toy_picture(np.random.RandomState([0, n]))
        assert photo.mode == "RGB" and photo.size == mask.shape[::-1] and all(160 <= side <= 256 for side in photo.size)
        assert set(np.unique(mask)) <= {0, 1, 2, 3, 4, 5, data.VOID}
        here, below = mask[:-1], mask[1:]
        assert not ((here != below) & (here != data.VOID) & (below != data.VOID)).any()  # void between any two classes


@pytest.mark.parametrize("lines", ["a\nb\n", "a\r\nb", "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/b.jpg /x/b.png\n"])
def test_lists_are_read_in_both_forms_and_with_any_line_end(tmp_path, lines):
    dataset = data.DataSet(make_set(tmp_path))
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").unlink()
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_bytes(lines.encode())
    assert dataset.ids("train_aug") == ["a", "b"]


def test_labels_come_from_the_text_file_or_else_from_object_names(tmp_path):
    make_set(tmp_path)
    (tmp_path / "labels.txt").write_text("a dog cat\n")
    (tmp_path / "Annotations").mkdir()
    part = "<part><name>head</name></part>"
    objects = "".join(f"<object><name>{n}</name>{part}</object>" for n in ("dog", "dog"))
    (tmp_path / "Annotations/b.xml").write_text(f"<annotation>{objects}</annotation>")
    assert data.DataSet(tmp_path).labels(["a", "b"]).tolist() == [[1, 1], [0, 1]]


def test_a_folder_of_photos_with_labels_is_a_data_set(tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    for name in ("a.JPG", "far/b.jpeg", "far/away/c.PNG", "d.webp"):
        Image.new("RGB", (5, 4)).save(tmp_path / name)
    (tmp_path / "labels.txt").write_text("a.JPG plum\r\nfar/b apple plum\n\nfar/away/c.PNG apple\nd")
    dataset = data.DataSet(tmp_path)
    assert dataset.classes == ["apple", "plum"] and dataset.num_classes == 3
    assert dataset.ids("train_aug") == ["a", "far/b", "far/away/c", "d"] and dataset.ids("val", required=False) == []
    assert dataset.ids("train") == dataset.ids("train_aug")
    assert dataset.image("far/away/c") == tmp_path / "far/away/c.PNG"
    assert dataset.labels(["a", "far/b", "d"]).tolist() == [[0, 1], [1, 1], [0, 0]]
    Image.new("RGB", (5, 4)).save(tmp_path / "far/b.png")
    with pytest.raises(data.InputError, match="two photos have the id far/b"):
        data.DataSet(tmp_path).photo_of


def test_photos_are_turned_as_exif_says_and_16_bits_scaled(tmp_path):
    photo = Image.new("RGB", (6, 4))
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").size == (4, 6)
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.array(data.read_image(tmp_path / "deep.png"))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


def test_masks_in_vocs_colours_or_16_bits_become_indices(tmp_path, capsys):
    mask = np.array([[0, 1, 255], [20, 3, 0]], np.uint8)
    Image.fromarray(data.palette()[mask]).save(tmp_path / "colours.png")
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("colours.png", "deep.png", "colours.png"):
        assert (data.read_mask(tmp_path / name) == mask).all()
    assert capsys.readouterr().out.count("read as PASCAL VOC's palette") == 1
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "other.png")
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "high.png")
    for name, says in (("other.png", "colours that are not"), ("high.png", "is no index PNG")):
        with pytest.raises(data.InputError, match=says):
            data.read_mask(tmp_path / name)


def test_classes_default_to_vocs(tmp_path):
    (make_set(tmp_path) / "classes.txt").unlink()
    dataset = data.DataSet(tmp_path)
    assert dataset.num_classes == 21 and dataset.labels(["a"])[0, 7] == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_photos_of_every_mode_load_as_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode).save(path)
    image = data.read_image(path)
    assert image.mode == "RGB" and np.array(image).shape == (3, 4, 3) and np.array(image).min() > 250


def test_a_mask_comes_back_from_its_file(tmp_path):
    mask = np.array([[0, 1, 255], [20, 3, 0]], np.uint8)
    data.write_mask(tmp_path / "new/x.png", mask)
    assert (data.read_mask(tmp_path / "new/x.png") == mask).all()
    assert Image.open(tmp_path / "new/x.png").getpalette()[3:6] == [128, 0, 0]  # VOC's colour of class 1
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.png"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(ZeroDivisionError):
        data.write(tmp_path / "x", lambda file: file.write(b"new") / 0)
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_long_side_is_resized_within_its_range():
    sizes = {data.random_long_side(Image.new("RGB", (200, 100)), 32, 64).size for _ in range(50)}
    assert all(32 <= w <= 64 and abs(h - w / 2) <= 0.5 for w, h in sizes) and len(sizes) > 10


def test_normalised_maps_span_zero_to_one():
    cams = torch.tensor([[[2.0, 4.0], [3.0, 2.0]], [[0.0, 0.0], [0.0, 8.0]]])
    out = data.normalise(cams)
    torch.testing.assert_close(out, torch.tensor([[[0, 1.0], [0.5, 0]], [[0, 0], [0, 1]]]), atol=2e-5, rtol=0)


def test_seeds_come_back_as_the_sum_of_resized_scales(tmp_path):
    torch.manual_seed(0)
    maps = [torch.randn(2, side, side) for side in (3, 6, 9)]
    data.write_seeds(tmp_path / "x.npz", [1, 4], (31, 45), refined=[m.numpy() for m in maps])
    classes, cams = data.read_seeds(tmp_path / "x.npz")
    full = sum(v2.functional.resize(m, [31, 45], v2.InterpolationMode.BILINEAR, antialias=False) for m in maps).clamp(min=0)
    assert classes.tolist() == [1, 4]
    np.testing.assert_allclose(cams, data.normalise(full).numpy(), atol=1e-5)
    with pytest.raises(data.InputError, match="plain"):
        data.read_seeds(tmp_path / "x.npz", "plain")


def test_a_photo_without_labels_has_seeds_of_background_only(tmp_path):
    data.write_seeds(tmp_path / "x.npz", np.zeros(0, np.int64), (8, 9), refined=[np.zeros((0, 2, 2), np.float32)])
    classes, cams = data.read_seeds(tmp_path / "x.npz")
    assert (data.hard_threshold(classes, cams, 0.3) == np.zeros((8, 9))).all()
    counts = data.confusion_over_thresholds(np.ones((8, 9), np.uint8), classes, cams, 3)
    assert (counts[:, 1, 0] == 72).all() and (counts.sum((1, 2)) == 72).all()


def test_hard_threshold_takes_the_class_at_equality():
    cams = np.array([[[0.5, 0.2]], [[0.1, 0.3]]], np.float32)
    assert data.hard_threshold(np.array([3, 7]), cams, 0.5).tolist() == [[3, 0]]
    assert data.hard_threshold(np.array([3, 7]), cams, 0.3).tolist() == [[3, 7]]


def test_sweep_equals_one_confusion_matrix_per_threshold():
    r = np.random.RandomState(0)
    classes = np.array([1, 3])
    cams = (r.randint(0, 80, (2, 40, 50)) / np.float32(100)).astype(np.float32)  # many values exactly at a threshold
    mask = r.choice([0, 1, 2, 3, data.VOID], (40, 50)).astype(np.uint8)
    counts = data.confusion_over_thresholds(mask, classes, cams, 5)
    for threshold, matrix in zip(data.THRESHOLDS, counts):
        assert (matrix == data.confusion(mask, data.hard_threshold(classes, cams, threshold), 5)).all()


def test_miou_equals_a_plain_loop_and_leaves_out_what_is_absent():
    r = np.random.RandomState(0)
    mask = r.choice([0, 1, 2, data.VOID], (30, 30)).astype(np.uint8)
    prediction = r.choice([0, 2, 3], (30, 30)).astype(np.uint8)
    found = data.iou(data.confusion(mask, prediction, 6))
    for c in range(6):
        seen = mask != data.VOID
        both = ((mask == c) & (prediction == c) & seen).sum()
        union = (((mask == c) | (prediction == c)) & seen).sum()
        assert np.isnan(found[c]) if union == 0 else found[c] == both / union
    assert np.isnan(found[4]) and found[1] == 0


def test_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    labels = torch.tensor([[1.0, 0], [0, 0], [1, 0]])  # hits at ranks 1 and 3; the second class never occurs
    assert data.mean_average_precision(scores, labels) == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_palette_is_pascal_vocs():
    assert data.palette()[[0, 1, 2, 15, 255]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]]


def _double(x):
    return 2 * x


@pytest.mark.parametrize("workers", [0, 2])
def test_every_job_of_a_pool_comes_back(workers):
    assert list(data.in_processes(_double, ((n,) for n in range(20)), workers, 20, "")) == list(range(0, 40, 2))


def test_check_names_what_would_break_a_stage(tmp_path):
    make_set(tmp_path, ids=("a", "b", "c"))
    data.write_mask(tmp_path / "SegmentationClass/a.png", np.full((30, 20), 2))
    said = run("data.py", "check", "--data", tmp_path)
    assert "no problems" in said and "note: masks and labels of 1 photos differ, first a: mask dog, labels cat" in said
    assert "longer than" not in said
    Image.new("RGB", (2000, 10)).save(tmp_path / "JPEGImages/c.jpg")
    assert "note: 1 photos are longer than 1000 pixels, first c: 2000x10" in run("data.py", "check", "--data", tmp_path)
    Image.new("RGB", (20, 30)).save(tmp_path / "JPEGImages/b.png")
    assert "two photos have the id b" in run("data.py", "check", "--data", tmp_path, status=1)
    (tmp_path / "JPEGImages/b.png").unlink()
    data.write_mask(tmp_path / "SegmentationClass/a.png", np.full((30, 21), 2))
    data.write_mask(tmp_path / "SegmentationClass/b.png", np.full((30, 20), 3))
    (tmp_path / "JPEGImages/c.jpg").write_bytes((tmp_path / "JPEGImages/c.jpg").read_bytes()[:200])
    said = run("data.py", "check", "--data", tmp_path, status=1)
    assert "a: image 30x20, mask 30x21" in said and "b.png has value 3" in said and "c.jpg" in said and "3 problems" in said


def test_weights_must_fit_and_what_stays_fresh_is_listed(tmp_path, capsys):
    net, state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)), {}
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3), "1.weight": torch.ones(9, 3), "1.bias": torch.ones(9)}
    with pytest.raises(data.InputError, match=r"file does not fit.*1.weight \(file \(9, 3\), network \(4, 3\)\)"):
        data.load_weights(net, state, "file")
    assert data.load_weights(net, state, "file", heads=("1",)) == ["1.weight", "1.bias"]
    assert "fresh: 1 (2)" in capsys.readouterr().out and net[0].weight.sum() == 6
    del state["0.bias"]
    with pytest.raises(data.InputError, match="1 missing, first 0.bias"):
        data.load_weights(net, state, "file", heads=("1",))
    assert "0.bias" in data.load_weights(net, state, "file", heads=("1",), partial=True)


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x80\x04\x95"])
def test_a_file_that_is_no_weight_file_is_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(data.InputError, match="w.pth"):
        data.read_weights(tmp_path / "w.pth")


def test_voc_lists_and_labels_come_from_devkit_and_sbd(tmp_path, monkeypatch):
    devkit = tmp_path / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True)
    (tmp_path / "sbd").mkdir()
    for id, names in {"a": ["dog", "dog"], "b": ["cat", "person"], "c": ["sheep"], "d": ["cow"], "e": []}.items():
        Image.new("RGB", (5, 4)).save(devkit / "JPEGImages" / f"{id}.jpg")
        objects = "".join(f"<object><name>{n}</name><difficult>1</difficult><part><name>head</name></part></object>" for n in names)
        (devkit / "Annotations" / f"{id}.xml").write_text(f"<annotation><folder>VOC2012</folder>{objects}</annotation>")
    (devkit / "ImageSets/Segmentation/train.txt").write_text("a")
    (devkit / "ImageSets/Segmentation/val.txt").write_text("b\r\n")
    (tmp_path / "sbd/train.txt").write_text("b\r\nc\r\n")
    (tmp_path / "sbd/val.txt").write_text("d\na")
    said = run("data.py", "voc", "--root", tmp_path, status=1)  # written, but no complete VOC 2012
    assert "train 1, val 1, test 0, train_aug 3" in said and "train_aug has 3 ids, VOC 2012's 10582" in said
    assert (devkit / "ImageSets/Segmentation/train_aug.txt").read_text() == "a\nc\nd\n"
    assert (devkit / "labels.txt").read_text() == "a dog\nb cat person\nc sheep\nd cow\n"
    assert data.DataSet(devkit).ids("train_aug") == ["a", "c", "d"]
    (devkit / "JPEGImages/d.jpg").unlink()
    assert "JPEGImages lacks 1 of 3 images, first d.jpg" in run("data.py", "voc", "--root", devkit, "--sbd", tmp_path / "sbd", status=1)

    def offline(url, folder, md5):
        raise OSError("no route")
    monkeypatch.setattr(data, "download_and_extract_archive", offline)
    (tmp_path / "sbd/train.txt").unlink()
    assert "lacks benchmark_RELEASE/dataset/train.txt of SBD" in run("data.py", "voc", "--root", devkit, status=1)
    assert "lacks VOCdevkit/VOC2012, and http" in run("data.py", "voc", "--root", tmp_path / "empty", status=1)
