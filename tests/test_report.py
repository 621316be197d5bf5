"""wsss.report: tables of runs written by hand, the gallery parsed, pictures of runs made by hand and by the scripts."""
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from small_run import WHERE

import bnr
from wsss import pictures
from wsss.data import DataSet, read_image
from wsss.masks import VOID, write_mask
from wsss.seeds import combine_scales, read_seeds, write_seeds
from wsss.stage import read_json, read_text, write_json, write_lines

sys.path.insert(0, str(ROOT / "tests" / "scripts"))
import walkthrough  # noqa: E402, found by the line above

HOSTILE = ["cat", "<script>boom()</script>", '"><img/src=x/onerror=boom()>']  # names of classes
PHOTOS = ["a", "b", "<b>c", 'd"50%', "e", "deep/f"]  # four of train, two of val


def report(command, *flags, status=0):
    return run("wsss.report", command, *WHERE, *flags, status=status)


def results_of(seeds, pseudo=None, segmenter=None, iou=0.7, classes=("background", "cow"), **settings):
    """An OUT/results.json as `make eval` writes it: mIoU of three stages, None where one was not run."""
    settings = {"epochs": 2, "loss": "bnr", "noise": 1.0, "seed": 0, **settings}
    results = {"data": "toy", "classes": list(classes), "rows": [], "doubts": [], "devices": ["a card"], "seconds": {},
               "settings": {"classifier": settings}, "precision": {"cams": "bf16"}}
    for stage, split, n, value in (("refined seeds", "train", 24, seeds), ("pseudo labels", "train", 24, pseudo),
                                   ("segmenter", "val", 8, segmenter)):
        scores = {"miou": value, "iou": [iou, float("nan")]} if value is not None else {"note": "not run: make psa"}
        results["rows"].append({"stage": stage, "of": "not there", "split": split, "n": n, **scores})
    results["rows"][0].update(best=0.3, threshold="0.30 (best)", curve=[seeds - abs(t - 30) / 10 for t in range(60)])
    return results


@pytest.fixture
def rows(made):
    """Runs of Table 5: two seeds of x1, one of the baseline without a segmenter. -> writes one more"""
    def write_row(name, *scores, **settings):
        write_json(Path("out/rows", name, "results.json"), results_of(*scores, **settings))

    write_row("transcam-seed0", 48, loss="transcam")
    write_row("noise-x1-seed0", 50, 60, 70)
    write_row("noise-x1-seed1", 54, 61, 72, 0.8, seed=1)
    return write_row


def cells(text, start):
    """The cells of the first line of a Markdown table that begins like this, after those."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line[len(start):].split("|")[:-1]]


@pytest.mark.parametrize("start, expected", [
    ("| BNR | 66.2 | 47.4 |", ["52.00 ± 2.83 (2 runs)"]),  # deviation of 50, 54 with n - 1
    ("| TransCAM | 64.9 | 46.2 |", ["48.00 (1 run)"]),
    ("| TransCAM + PSA |", ["70.2", "48.7", "not run"]),
    ("| BNR | 70.5 | 71.1 | 45.9 |", ["71.00 ± 1.41 (2 runs)"]),
    ("| background |", ["91.3", "91.2", "91.6", "91.6", "not run", "75.0 ± 7.1 (2 runs)"]),
    ("| cow |", ["73.9", "77.4", "77.2", "81.0", "not run", "absent"]),
    ("|  | paper, VOC val |", ["paper, VOC test", "paper, COCO val", "ours, toy val, N = 8"])])
def test_tables_give_mean_and_deviation_beside_the_paper(rows, start, expected):
    assert cells(report("tables"), start) == expected


def test_tables_are_written_into_a_file_with_machine_and_what_is_missing(rows):
    path = "out/rows/noise-x1-seed1/results.json"
    results = read_json(path)
    results["rows"][1]["missing"] = "1 of 24 pseudo labels are missing"
    write_json(path, results)
    said, text = report("tables"), Path("out/tables.md").read_text()
    assert text in said and text.startswith("# Results: toy\n") and "on a card, in bf16." in text
    assert text.endswith("Note: noise-x1-seed1, pseudo labels: 1 of 24 pseudo labels are missing.\n")


def test_runs_of_other_settings_are_not_one_table(rows):
    rows("noise-x2-seed0", 50, epochs=3, noise=2.0)
    said = report("tables", status=1)
    assert "error: classifier has epochs 3 in noise-x2-seed0, 2 in other runs: these do not belong in one table" in said
    assert "71.1 | 45.9 | 72.00 (1 run)" in report("tables", "--random-seeds", 1)
    assert 'no results of these SEEDS in out/rows: run "make res' in report("tables", "--random-seeds", 7, status=1)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A data set with hostile names, and a run of it without networks."""
    monkeypatch.chdir(tmp_path)
    for name, lines in (("train_aug", PHOTOS[:4]), ("train", PHOTOS[:4]), ("val", PHOTOS[4:])):
        write_lines(f"data/ImageSets/Segmentation/{name}.txt", lines)
    write_lines("data/labels.txt", [f"{name} {HOSTILE[n % 3]}" for n, name in enumerate(PHOTOS)])
    write_lines("data/classes.txt", HOSTILE)
    Path("data/JPEGImages/deep").mkdir(parents=True)
    for n, name in enumerate(PHOTOS):
        rng, size = np.random.RandomState(n), (48, 64 - 8 * n)
        Image.fromarray(rng.randint(0, 255, (*size, 3)).astype(np.uint8)).save(f"data/JPEGImages/{name}.jpg")
        mask = np.zeros(size, np.uint8)
        mask[8:40, 4:12], mask[0] = 1 + n % 3, VOID
        write_mask(f"data/SegmentationClass/{name}.png", mask)
        mask[8:8 + 4 * n] = 2  # the later, the worse
        write_mask(f"out/{'pseudo_labels' if n < 4 else 'segmentation'}/{name}.png", mask)
        if n < 4:
            write_seeds(f"out/cams/{name}.npz", [1 + n % 3], size, {"refined": [rng.rand(1, 3, 4).astype(np.float32)]})
    record = {"done": True, "seconds": 1, "data": "data", "preset": "toy",
              "settings": {"data_set": DataSet("data").digest_of("train_aug")}}
    for stage, inputs in (("cams", {}), ("pseudo_labels", {"cams": "an earlier one"}), ("segmentation", {})):
        write_json(f"out/{stage}/record.json", {**record, "id": f"of {stage}", "inputs": inputs})
    for junk in ("out/cams/._a.npz", "out/pseudo_labels/.DS_Store", "data/JPEGImages/._a.jpg"):
        Path(junk).write_bytes(b"of a system")
    results = results_of(40, 50, 60, classes=["background", *HOSTILE])
    results["rows"][1].update(of="pseudo_labels", id="another")
    write_json("out/results.json", results)


class Page(HTMLParser):
    """The tags of the gallery with their attributes, and the text after each."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], [""]
        self.feed(Path("out/report/index.html").read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text.append("")

    def handle_data(self, data):
        self.text[-1] += data.strip()


def test_gallery_has_every_picture_the_worst_first_and_names_as_text(made):
    report("gallery")
    page = Page()
    pictures = {unquote(attributes["src"]): attributes for tag, attributes in page.tags if tag == "img"}
    assert list(pictures) == [f"{'val' if name in PHOTOS[4:] else 'train'}/{name}.jpg" for name in (
        *PHOTOS[:3:-1], *PHOTOS[3::-1])]
    for file, attributes in pictures.items():
        size = int(attributes["width"]), int(attributes["height"])
        assert attributes["loading"] == "lazy" and Image.open(Path("out/report", file)).size == size
    assert {"a: 100.0 %", "<b>c: 53.0 %", *HOSTILE} <= set(page.text)  # (192/256 + 1680/2000 + 0) / 3
    assert not {tag for tag, _ in page.tags} & {"script", "b"} and page.tags.count(("tr", {"class": "stale"})) == 1
    assert any("scored before the pseudo labels was made again" in text for text in page.text)


@pytest.mark.parametrize("flags, rows", [([], 4), (["--first", 2], 2), (["--ids", "a.jpg", "deep/f"], 2)])
def test_show_has_a_row_a_photo_and_notes_what_is_older_than_its_input(made, flags, rows):
    assert "note: the pseudo labels in out: older than the seeds: make psa" in report("show", *flags, "--height", 40)
    assert Image.open("out/show.png").height == 6 + rows * (20 + 40 + 6)


def test_what_is_not_there_is_an_empty_panel(made):
    shutil.rmtree("data/SegmentationClass")
    for name in ("results.json", "pseudo_labels/b.png", "cams/b.npz"):
        Path("out", name).unlink()
    panels, _ = pictures.stages_of(DataSet("data"), "a", Path("out"), threshold=0.3)
    assert list(panels) == ["photo", "ground truth", "refined CAM", "seed at 0.30", "pseudo label", "segmentation"]
    assert [title for title, picture in panels.items() if picture is None] == ["ground truth", "segmentation"]
    report("gallery")
    assert {"a: not scored", "b: not scored", "not scored: make eval"} <= set(Page().text)


def resize(path):
    Image.open(path).resize((30, 20), Image.NEAREST).save(path)


@pytest.mark.parametrize("command", ["show", "gallery"])
@pytest.mark.parametrize("spoil, message", [
    (lambda: resize("out/pseudo_labels/a.png"),
     'out/pseudo_labels/a.png is 30x20, its photo 64x48: delete it and run "make psa"'),
    (lambda: resize("data/JPEGImages/a.jpg"),
     'out/cams/a.npz is of a photo of another size: delete it and run "make cams"'),
    (lambda: resize("data/SegmentationClass/a.png"), "data/SegmentationClass/a.png is 30x20, its photo 64x48"),
    (lambda: write_lines("data/classes.txt", ["ant", *HOSTILE]), "out/cams was made from other lists, labels"),
    (lambda: shutil.rmtree("out/cams"), 'no seeds in out/cams: run "make cams"'),
    (lambda: Path("data/JPEGImages/a.jpg").unlink(), "data/JPEGImages lacks 1 of 6 photos, first a.jpg: data/labels")])
def test_other_data_are_refused_in_a_line(made, command, spoil, message):
    spoil()
    said = report(command, status=1)
    assert message in said and "Traceback" not in said


def test_any_photo_is_shown(here):
    Image.open("data/JPEGImages/toy_0000.jpg").rotate(90, expand=True).save("holiday.png")
    said = report("show", "holiday.png", "holiday.png", "--classes", "cat", "lion", "--height", 64)
    assert re.search(r"holiday.png: cat \d\.\d\d, lion \d\.\d\d", said)
    assert Image.open("out/show.png").height == 6 + 2 * (20 + 64 + 6)
    assert "dog: the classifier knows cat rabbit" in report("show", "holiday.png", "--classes", "dog", status=2)
    shutil.rmtree("out/classifier")
    assert 'run "make train"' in report("show", "holiday.png", status=1)


def test_maps_of_a_photo_are_those_of_the_seeds_file(here):
    model, network = bnr.load_classifier(Path("out"), torch.device("cpu"))
    image = read_image(Path("data/JPEGImages/toy_0001.jpg"))
    seen = pictures.look(model, image, network["crop"], (0.5,), torch.device("cpu"), False)
    for kind in ("plain", "refined"):
        classes, maps = read_seeds(Path("out/cams/toy_0001.npz"), kind)
        ours = combine_scales([scale[classes - 1] for scale in seen[kind]], image.size[::-1])
        assert np.abs(ours.numpy() - maps).max() < 1e-4
    assert float(seen["attention"].sum()) == pytest.approx(4, abs=0.5)  # blocks, less what the class token takes


def test_figures_are_drawn_or_what_they_lack_is_named(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = report("figures", "--height", 32, status=1)
    assert 'no seeds in out/rows/transcam-seed0: make results ROWS=transcam SEEDS=0' in said
    for row in ("transcam", "noise-x1"):
        for stage in ("cams", "classifier", "segmentation"):
            shutil.copytree(f"out/{stage}", f"out/rows/{row}-seed1/{stage}")
    write_json(Path("out/rows/noise-x1-seed1/results.json"), results_of(50))
    said = report("figures", "--height", 32, "--random-seeds", 1, "--first", 2)
    assert {path.name for path in Path("out/figures").iterdir()} == {"figure_1.png", "figure_3.png", "figure_5.png"}
    assert 'figure_4 is not drawn: matplotlib is missing: "make figures" installs it' in said
    write_lines("data/labels.txt", [f"toy_000{n} lion" for n in range(6)])
    assert "was made from other lists, labels or classes" in report("figures", "--random-seeds", 1, status=1)


def test_figure_4_draws_each_row_of_table_5(rows):
    pytest.importorskip("matplotlib")
    report("figures")
    assert Image.open("out/figures/figure_4.png").size == (900, 600)


def test_walkthrough_runs_from_top_to_bottom(here):
    page, text = Path("walkthrough.md"), read_text(ROOT / "docs" / "walkthrough.md")
    page.write_text(re.sub("```text\n.*?```\n", "", text, flags=re.DOTALL))
    walkthrough.rewrite(page, Path("data"), Path("out"))
    again = page.read_text()
    blocks = [re.findall("```python\n(.*?)```\n", one, flags=re.DOTALL) for one in (again, text)]
    assert blocks[0] == blocks[1] and again.count("```text") == text.count("```text") == len(blocks[0]) - 1
    drawn = {path.as_posix() for path in Path("walkthrough").iterdir()}
    assert drawn == set(re.findall(r"\]\((walkthrough/.*?)\)", text)) and (ROOT / "docs" / min(drawn)).is_file()
