"""Data sets, photos, masks, how they contradict each other, files of seeds, and what `evaluate` counts faster."""
import re

import numpy as np
import pytest
import torch
from conftest import make_set
from PIL import Image
from torchvision.transforms import v2

from wsss import seeds
from wsss.data import DataSet, photos_in, read_image
from wsss.masks import VOID, classes_in, contradictions, palette, read_mask, write_mask
from wsss.stage import InputError

GREEN, MAROON = [0, 128, 0], [128, 0, 0]  # VOC's 2 and 1


@pytest.mark.parametrize("lines", ["a\nb\n", "a\r\nb", "/JPEGImages/a.jpg /Masks/a.png\n/JPEGImages/b.jpg /x/b.png\n"])
def test_lists_are_read_in_both_forms_and_with_any_line_end(tmp_path, lines):
    dataset = DataSet(make_set(tmp_path))
    (tmp_path / "ImageSets/Segmentation/train_aug.txt").write_bytes(lines.encode())
    assert dataset.ids("train_aug") == ["a", "b"]


def test_labels_come_from_the_text_file_or_else_from_object_names(tmp_path):
    make_set(tmp_path)
    (tmp_path / "labels.txt").write_text("\ufeffa dog cat\n", encoding="utf-8")  # with a byte order mark
    (tmp_path / "Annotations").mkdir()
    part = "<part><name>head</name></part>"
    objects = "".join(f"<object><name>{name}</name>{part}</object>" for name in ("dog", "dog"))
    (tmp_path / "Annotations/b.xml").write_text(f"<annotation>{objects}</annotation>")
    assert DataSet(tmp_path).labels(["a", "b"]).tolist() == [[1, 1], [0, 1]]


def test_a_folder_of_photos_with_labels_is_a_data_set(tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    for name in ("a.JPG", "far/b.jpeg", "far/away/c.PNG", "d.webp"):
        Image.new("RGB", (5, 4)).save(tmp_path / name)
    (tmp_path / "labels.txt").write_text("a.JPG plum\r\nfar/b apple plum\n\nfar/away/c.PNG apple\nd")
    dataset = DataSet(tmp_path)
    assert dataset.classes == ["apple", "plum"] and dataset.num_classes == 3
    assert dataset.ids("train_aug") == ["a", "far/b", "far/away/c", "d"] and dataset.ids("val", required=False) == []
    assert dataset.ids("train") == dataset.ids("train_aug")
    assert dataset.image("far/away/c") == tmp_path / "far/away/c.PNG"
    assert dataset.labels(["a", "far/b", "d"]).tolist() == [[0, 1], [1, 1], [0, 0]]
    Image.new("RGB", (5, 4)).save(tmp_path / "far/b.png")
    with pytest.raises(InputError, match="two photos have the id far/b"):
        DataSet(tmp_path).photo_of


@pytest.mark.parametrize("photos, line, says", [
    ("cat.jpg", "cat (1).jpg cat", "line 2 .'cat .1..jpg cat'.: not a class: '.1..jpg'"),
    ("a.jpg", "a.jpg rabbit, bear", "line 2 .'a.jpg rabbit, bear'.: not a class: 'rabbit,'"),
    ("a.jpg", "a.jpg,cat", "line 2 .'a.jpg,cat'.$"), ("a.jpg", "b cat", "line 2 .'b cat'.$"),
    ("x.jpg", "x.png cat", "line 2 .'x.png cat'. names x.png, but the photo is x.jpg"),
    ("x.jpg", "../x cat", "line 2 .'../x cat'. has the id '../x', which would lead out"),
    ("cat (1).jpg", "cat (1).jpg\tcat", ["cat (1)"]), ("x.jpg.jpg", "x.jpg.jpg cat", ["x.jpg"]),
    ("x.jpg", "./x.jpg cat", ["x"]),
    ("x.jpg.jpg", "x.jpg cat", "line 2 .'x.jpg cat'.$"), ("x.bmp", "x.bmp cat", ["x"]), ("x.TIF", "x cat", ["x"])])
@pytest.mark.parametrize("is_voc", [False, True])
def test_a_line_is_read_as_what_it_says_or_refused(tmp_path, is_voc, photos, line, says):
    root = make_set(tmp_path / "voc", ids=()) if is_voc else tmp_path
    folder = root / "JPEGImages" if is_voc else root
    Image.new("RGB", (5, 4)).save(folder / photos)
    (root / "labels.txt").write_text(f"\n{line}\n")
    if is_voc:
        text, blank, _ = line.partition("\t" if "\t" in line else " ")
        (root / "ImageSets/Segmentation/train_aug.txt").write_text(text + blank)
    if isinstance(says, str):
        lacks = "lacks 1 of 1 photos, first .*: " if says.endswith("$") else ""
        with pytest.raises(InputError, match=f"{lacks}.*labels.txt, {says}"):
            DataSet(root).ids("train_aug")
    else:
        dataset = DataSet(root)
        assert dataset.ids("train_aug") == says and dataset.names(says[0]) == ["cat"]
        assert dataset.image(says[0]) == folder / photos and read_image(dataset.image(says[0])).size == (5, 4)


@pytest.mark.parametrize("line, says", [
    ("a (1)", "put a tab behind an id that has a blank"), ("a.png", "names a.png, but the photo is a.jpg"),
    ("a,b", "lacks 1 of 2 photos, first a,b.jpg: .*train_aug.txt, line 2 .'a,b'.$")])
def test_a_line_of_a_list_is_refused_with_its_number(tmp_path, line, says):
    (make_set(tmp_path) / "ImageSets/Segmentation/train_aug.txt").write_text(f"b\n{line}\n")
    with pytest.raises(InputError, match=says):
        DataSet(tmp_path).ids("train_aug")


@pytest.mark.parametrize("name", ["background", "_background_", "BG", "__ignore__", "void", "unlabeled"])
def test_background_and_void_are_refused_as_classes(tmp_path, name):
    (make_set(tmp_path) / "classes.txt").write_text(f"{name}\ncat\ndog\n")
    with pytest.raises(InputError, match=f"names the class '{name}': background is class 0 already, void is 255"):
        DataSet(tmp_path)


def test_what_a_file_browser_leaves_and_masks_are_not_photos(tmp_path):
    for name in ("a.jpg", "._a.jpg", "SegmentationClass/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4)).save(tmp_path / name)
    for name in ("Thumbs.db", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "labels.txt").write_text("a cat\n")
    assert list(DataSet(tmp_path).photo_of) == ["a"]
    assert list(photos_in([tmp_path], leave_out=tmp_path / "other")) == ["SegmentationClass/a", "a"]


@pytest.mark.parametrize("labels, masks, says", [
    ("cat cat dog", [[1], [1], [2]], []), ("cat cat dog", [[1, 2], [0], [2]], []),  # one that differs is normal
    ("cat cat dog", [[VOID], [0, VOID], [0]], ["none of 3 masks shows a class: they hold 0 .* alone"]),
    ("- - -", [[VOID], [0], [0]], []), ("cat cat -", [[1], [1], [2]], []),
    ("cat cat dog", [[1], [1], [1]], ["dog: labelled in 1 photos, in none of the masks"]),
    ("cat cat dog", [[1, 2], [1], [1]], ["dog: labelled in 1 photos, only in masks of photos without that label"]),
    ("cat cat cat", [[2], [1], [2]], ["2 of 3 masks show none of their photo's labels, first a"]),
    ("? ? ?", [[VOID], [0], [0]], ["none of 3 masks shows a class"]), ("? cat ?", [[2], [1], [2]], [])])
def test_masks_that_contradict_the_labels_are_told(tmp_path, labels, masks, says):
    make_set(tmp_path, "abc")  # of "?" nothing is known, "-" has no label
    lines = (f"{name} {label.strip('-')}\n" for name, label in zip("abc", labels.split()) if label != "?")
    (tmp_path / "labels.txt").write_text("".join(lines))
    dataset = DataSet(tmp_path)
    for name, values in zip("abc", masks):
        write_mask(dataset.mask(name), np.array([values], np.uint8))
    lines = contradictions(dataset, list("abc"), [classes_in(dataset.mask(name), 3) for name in "abc"])
    assert len(lines) == len(says)
    for line, start in zip(lines, says):
        assert re.match(start, line), line


def test_photos_are_turned_as_exif_says_and_16_bits_scaled(tmp_path):
    photo = Image.new("RGB", (6, 4))
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 6)
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.array(read_image(tmp_path / "deep.png"))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


def test_masks_of_another_size_are_told_with_the_turn_that_exif_asks_for(tmp_path):
    write_mask(tmp_path / "a.png", np.zeros((9, 8)))
    with pytest.raises(InputError, match="a.png is 8x9, its photo 20x30$"):
        read_mask(tmp_path / "a.png", size=(30, 20))
    with pytest.raises(InputError, match="a.png is 8x9, its photo 9x8: sides swapped, .* EXIF"):
        read_mask(tmp_path / "a.png", size=(8, 9))


def test_masks_in_vocs_colours_or_16_bits_become_indices(tmp_path, capsys):
    mask = np.array([[0, 1, 255], [20, 3, 0]], np.uint8)
    Image.fromarray(palette()[mask]).save(tmp_path / "colours.png")
    Image.fromarray(mask.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("colours.png", "deep.png", "colours.png"):
        assert (read_mask(tmp_path / name) == mask).all()
    assert capsys.readouterr().out.count("read as PASCAL VOC's palette") == 1
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "other.png")
    Image.fromarray(np.full((2, 2), 300, np.uint16)).save(tmp_path / "high.png")
    Image.fromarray(mask > 0).save(tmp_path / "bits.png")
    for name, says in (("other.png", "colours that are not"), ("high.png", "is not an index PNG"),
                       ("bits.png", "has one bit a pixel")):
        with pytest.raises(InputError, match=says):
            read_mask(tmp_path / name)


@pytest.mark.parametrize("colours, wrong", [
    ([[0, 0, 0], GREEN, MAROON], "index 1 has VOC's colour of 2: keep its palette, or save as RGB"),
    ([MAROON, [0, 0, 0], GREEN], "index 0 has VOC's colour of 1"),
    ([[0, 0, 0], MAROON, GREEN], None), ([[0, 0, 0], [64, 64, 64], [128, 128, 128]], None),
    ([[0, 0, 0], GREEN, [1, 2, 3]], None), ([[0, 0, 0], MAROON, [0, 0, 0]], None)])
def test_a_palette_that_was_renumbered_is_refused_and_any_other_stays(tmp_path, colours, wrong):
    values = np.array([[0, 1, 2]], np.uint8)
    mask = Image.fromarray(values)
    mask.putpalette(np.array(colours, np.uint8).tobytes())
    mask.save(tmp_path / "x.png")
    if wrong:
        with pytest.raises(InputError, match=f"x.png: {wrong}"):
            read_mask(tmp_path / "x.png")
    else:
        assert (read_mask(tmp_path / "x.png") == values).all()


def test_seeds_come_back_as_the_sum_of_resized_scales(tmp_path):
    torch.manual_seed(0)
    maps = [torch.randn(2, side, side) for side in (3, 6, 9)]
    seeds.write_seeds(tmp_path / "x.npz", [1, 4], (31, 45), {"refined": [scale.numpy() for scale in maps]})
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
    seeds.write_seeds(tmp_path / "x.npz", [1, 4], (2, 2), {"plain": [plain], "eigen": [eigen]})
    _, cams = seeds.read_seeds(tmp_path / "x.npz", "eigen")
    np.testing.assert_allclose(cams, np.array([[[0, 0], [2, 0]], [[0, 1], [0, 3]]]) / 3, atol=1e-4)
