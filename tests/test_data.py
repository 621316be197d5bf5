"""Data sets, photos, masks, files of seeds, and what `evaluate` counts faster than the plain metrics."""
import shutil

import numpy as np
import pytest
import torch
from conftest import make_set
from PIL import Image
from torchvision.transforms import v2

import data
import evaluate
import seeds
import stage
from stage import InputError


@pytest.mark.parametrize("lines", ["a\nb\n", "a\r\nb", "/JPEGImages/a.jpg /Masks/a.png\n/JPEGImages/b.jpg /x/b.png\n"])
def test_lists_are_read_in_both_forms_and_with_any_line_end(tmp_path, lines):
    dataset = data.DataSet(make_set(tmp_path))
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").unlink()
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_bytes(lines.encode())
    assert dataset.ids("train_aug") == ["a", "b"]


def test_labels_come_from_the_text_file_or_else_from_object_names(tmp_path):
    make_set(tmp_path)
    (tmp_path / "labels.txt").write_text("\ufeffa dog cat\n", encoding="utf-8")  # with a byte order mark
    (tmp_path / "Annotations").mkdir()
    part = "<part><name>head</name></part>"
    objects = "".join(f"<object><name>{name}</name>{part}</object>" for name in ("dog", "dog"))
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
    with pytest.raises(InputError, match="two photos have the id far/b"):
        data.DataSet(tmp_path).photo_of


def test_classes_default_to_vocs(tmp_path):
    (make_set(tmp_path) / "classes.txt").unlink()
    dataset = data.DataSet(tmp_path)
    assert dataset.num_classes == 21 and dataset.labels(["a"])[0, 7] == 1


# ---------------------------------------------------------------- photos and masks

def test_photos_are_turned_as_exif_says_and_16_bits_scaled(tmp_path):
    photo = Image.new("RGB", (6, 4))
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(tmp_path / "turned.jpg").size == (4, 6)
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.array(data.read_image(tmp_path / "deep.png"))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


def test_labels_of_another_size_are_told_by_their_headers_and_turned_photos_by_their_turn(tmp_path):
    dataset = data.DataSet(make_set(tmp_path, "abc", size=(20, 30)))
    sideways, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 8
    sideways.save(dataset.image("c"), exif=exif)
    for name in "abc":
        data.write_mask(tmp_path / f"{name}.png", np.zeros((30, 20)))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])  # the header is enough
    data.require_labels(dataset, list("abc"), tmp_path, "labels")
    data.write_mask(tmp_path / "b.png", np.zeros((9, 8)))
    data.write_mask(tmp_path / "c.png", np.zeros((20, 30)))
    says = "b.png is 8x9, its photo 20x30, the first of 2 labels of another size than their photos"
    with pytest.raises(InputError, match=f"{says}$"):
        data.require_labels(dataset, list("abc"), tmp_path, "labels")
    with pytest.raises(InputError, match=f"{says}: delete them and do it again$"):
        data.require_labels(dataset, list("abc"), tmp_path, "labels", "do it again")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1"])
def test_photos_of_every_mode_load_as_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode).save(path)
    image = data.read_image(path)
    assert image.mode == "RGB" and np.array(image).shape == (3, 4, 3) and np.array(image).min() > 250


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
        with pytest.raises(InputError, match=says):
            data.read_mask(tmp_path / name)


def test_a_mask_comes_back_from_its_file(tmp_path):
    mask = np.array([[0, 1, 255], [20, 3, 0]], np.uint8)
    data.write_mask(tmp_path / "new/x.png", mask)
    assert (data.read_mask(tmp_path / "new/x.png", 21, (2, 3)) == mask).all()
    assert Image.open(tmp_path / "new/x.png").getpalette()[3:6] == [128, 0, 0]  # VOC's colour of class 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]
    with pytest.raises(InputError, match="x.png has value 20, but there are 5 classes"):
        data.read_mask(tmp_path / "new/x.png", 5)
    with pytest.raises(InputError, match="x.png is 3x2, its photo 2x3"):
        data.read_mask(tmp_path / "new/x.png", 21, (3, 2))


def test_palette_is_pascal_vocs():
    found = data.palette()[[0, 1, 2, 15, 255]].tolist()
    assert found == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]]


def test_an_overlay_colours_the_classes_and_neither_background_nor_void():
    photo = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    found = data.overlay(photo, np.array([[0, 1], [255, 2]], np.uint8), strength=1.0)
    assert found.permute(1, 2, 0).tolist() == [[[100] * 3, [128, 0, 0]], [[100] * 3, [0, 128, 0]]]
    assert (data.overlay(photo, np.zeros((2, 2), np.uint8)) == photo).all()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(ZeroDivisionError):
        stage.write(tmp_path / "x", lambda file: file.write(b"new") / 0)
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_long_side_is_resized_within_its_range():
    sizes = {data.random_long_side(Image.new("RGB", (200, 100)), 32, 64).size for _ in range(50)}
    assert all(32 <= w <= 64 and abs(h - w / 2) <= 0.5 for w, h in sizes) and len(sizes) > 10


# ---------------------------------------------------------------- seeds and their scores

def test_seeds_come_back_as_the_sum_of_resized_scales(tmp_path):
    torch.manual_seed(0)
    maps = [torch.randn(2, side, side) for side in (3, 6, 9)]
    seeds.write_seeds(tmp_path / "x.npz", [1, 4], (31, 45), refined=[scale.numpy() for scale in maps])
    classes, cams = seeds.read_seeds(tmp_path / "x.npz")
    full = sum(v2.functional.resize(scale, [31, 45], v2.InterpolationMode.BILINEAR, antialias=False) for scale in maps)
    assert classes.tolist() == [1, 4]
    np.testing.assert_allclose(cams, seeds.normalise(full.clamp(min=0)).numpy(), atol=1e-5)
    with pytest.raises(InputError, match='x.npz is damaged or lacks plain seeds: delete it and run "make cams"'):
        seeds.read_seeds(tmp_path / "x.npz", "plain")


def test_eigen_seeds_go_to_the_class_whose_plain_cam_is_largest(tmp_path):
    plain = np.zeros((2, 2, 2), np.float32)
    plain[0, :, 0], plain[1, :, 1] = 1, 1  # the first class on the left, the second on the right
    eigen = np.array([[[0, 1], [2, 3]]], np.float32)
    seeds.write_seeds(tmp_path / "x.npz", [1, 4], (2, 2), plain=[plain], eigen=[eigen])
    _, cams = seeds.read_seeds(tmp_path / "x.npz", "eigen")
    np.testing.assert_allclose(cams, np.array([[[0, 0], [2, 0]], [[0, 1], [0, 3]]]) / 3, atol=1e-4)


def test_a_photo_without_labels_has_seeds_of_background_only(tmp_path):
    none = np.zeros((0, 2, 2), np.float32)
    seeds.write_seeds(tmp_path / "x.npz", np.zeros(0, np.int64), (8, 9), refined=[none])
    classes, cams = seeds.read_seeds(tmp_path / "x.npz")
    assert (seeds.hard_threshold(classes, cams, 0.3) == np.zeros((8, 9))).all()
    counts = evaluate.confusion_over_thresholds(np.ones((8, 9), np.uint8), classes, cams, 3)
    assert (counts[:, 1, 0] == 72).all() and (counts.sum((1, 2)) == 72).all()


def test_sweep_equals_one_confusion_matrix_per_threshold():
    r = np.random.RandomState(0)
    classes = np.array([1, 3])
    cams = (r.randint(0, 80, (2, 40, 50)) / np.float32(100)).astype(np.float32)  # many values exactly at a threshold
    mask = r.choice([0, 1, 2, 3, data.VOID], (40, 50)).astype(np.uint8)
    counts = evaluate.confusion_over_thresholds(mask, classes, cams, 5)
    plain = [evaluate.confusion(mask, seeds.hard_threshold(classes, cams, t), 5) for t in evaluate.THRESHOLDS]
    assert (counts == np.stack(plain)).all()
    best = evaluate.best_threshold(counts)
    assert best["miou"] == max(best["curve"]) == best["curve"][round(100 * best["best"])]
    assert best["miou"] == pytest.approx(100 * np.nanmean(best["iou"]))


def test_iou_equals_a_plain_loop():
    r = np.random.RandomState(0)
    mask = r.choice([0, 1, 2, data.VOID], (30, 30)).astype(np.uint8)
    prediction = r.choice([0, 2, 3], (30, 30)).astype(np.uint8)
    found = evaluate.iou(evaluate.confusion(mask, prediction, 6))
    for c in range(6):
        seen = mask != data.VOID
        both = ((mask == c) & (prediction == c) & seen).sum()
        union = (((mask == c) | (prediction == c)) & seen).sum()
        assert np.isnan(found[c]) if union == 0 else found[c] == both / union


def test_a_data_set_is_known_by_the_list_that_is_trained_on(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "toy")
    before = data.DataSet(tmp_path / "toy")
    path = before.list_file("train")
    path.write_text("\n".join(before.ids("train")[1:]))
    after = data.DataSet(tmp_path / "toy")
    assert after.digest == before.digest and after.digest_of("train") != data.DataSet(toy).digest_of("train")
