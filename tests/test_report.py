"""report.py: tables of runs written by hand, the page in a real Chromium, pictures of a small toy run."""
import base64
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import bnr
import data
import evaluate
import page
import pictures
import report
import results
import seeds
import stage
import walkthrough

HOSTILE = ["cat", "<script>boom()</script>", '"><img/src=x/onerror=boom()>']  # names of classes
STAGES = ("plain CAM", "refined seeds", "pseudo labels", "segmenter")


# ---------------------------------------------------------------- tables

def results_of(miou, classes=("background", "cat"), **flags):
    """An OUT/results.json as evaluate.py writes it. miou: of the STAGES, None where one was not run."""
    rows = [{"stage": "classifier", "split": "val", "n": 8, "note": "mAP", "map": 0.5, "entropy": 0.25},
            {"stage": "random maps", "split": "train", "n": 24, "miou": 11.0, "iou": [0.1, 0.1]},
            {"stage": "background", "split": "train", "n": 24, "miou": 9.0, "iou": [0.2, float("nan")]}]
    for name, value in zip(STAGES, miou):
        row = {"stage": name, "split": "val" if name == "segmenter" else "train", "n": 8 if name == "segmenter" else 24}
        if value is None:
            rows.append({**row, "note": "not run: make psa"})
            continue
        rows.append({**row, "threshold": "-", "crf": "no", "miou": value, "iou": [value / 100, float("nan")]})
        if name == "refined seeds":
            rows[-1].update(best=0.3, threshold="0.30 (best)", curve=[value - abs(t - 30) / 10 for t in range(60)])
    return {"data": "toy", "classes": list(classes), "rows": rows, "devices": ["a card"],
            "precision": {"classifier": "bf16"}, "seconds": {"classifier": 1800},
            "settings": {"classifier": {"epochs": 2, "loss": "bnr", "seed": 0, **flags}}}


@pytest.fixture
def rows(toy, tmp_path):
    """Runs of Table 5: two seeds of ×1, one of the baseline without a segmenter. -> data, out"""
    runs = {"noise-x1-seed0": results_of((40, 50, 60, 70)), "noise-x1-seed1": results_of((41, 54, 61, 72), seed=1),
            "transcam-seed0": results_of((39, 48, None, None), loss="transcam"),
            "start-seed0": results_of((5, 6, None, None), epochs=0)}
    for name, value in runs.items():
        stage.write_json(tmp_path / "out" / "rows" / name / "results.json", value)
    return toy, tmp_path / "out"


def cells(text, first):
    """The cells of the lines of a Markdown table that begin with a word."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_tables_give_mean_and_deviation_beside_the_paper(rows):
    said = run("report.py", "tables", "--data", rows[0], "--out", rows[1], "--device", "cpu")
    assert cells(said, "BNR")[0] == ["BNR", "66.2", "47.4", "52.00 ± 2.83"]  # deviation of 50, 54 with n - 1
    assert cells(said, "TransCAM + PSA")[0] == ["TransCAM + PSA", "70.2", "48.7", "not run"]
    assert cells(said, "BNR")[1] == ["BNR", "70.5", "71.1", "71.00 ± 1.41", "not run"]
    assert cells(said, "BNR")[2] == ["BNR", "45.9", "not run"]
    assert cells(said, "without noise")[0] == ["without noise", "62.4", "not run"]
    row = cells(said, "noise-x1")[0]
    assert row[1] == "0, 1 (2 not run)" and row[5] == "52.00 ± 2.83 (50.00, 54.00)" and row[8] == "1.00"
    assert cells(said, "no-noise")[0][1] == "(0, 1, 2 not run)"
    assert all(text in said for text in ("train, N = 24", "val, N = 8", "On a card, in bf16", "`classifier` epochs=2"))


def test_paper_classes_stand_beside_ours_where_they_are_vocs(toy, tmp_path):
    run_of_voc = results_of((1, 2, 3, 70), classes=("background", "cat"))
    stage.write_json(tmp_path / "rows" / "noise-x1-seed0" / "results.json", run_of_voc)
    said = run("report.py", "tables", "--data", toy, "--out", tmp_path, "--device", "cpu")
    assert cells(said, "background")[0] == ["background", "91.3", "91.2", "not run", "91.6", "91.6", "70.0"]
    assert not cells(said, "tvmonitor")  # no class of this set
    assert cells(said, "mIoU")[0] == ["mIoU", "69.3", "69.6", "not run", "70.5", "71.1", "70.0"]


def test_tables_are_written_into_a_file(rows, tmp_path):
    path = tmp_path / "results_toy.md"
    for _ in range(2):
        run("report.py", "tables", "--data", rows[0], "--out", rows[1], "--device", "cpu", "--into", path)
    text = path.read_text()
    assert text.startswith("# Results: ") and text.count("**Table 1.") == 1


def test_differences_are_those_of_the_same_seed(toy, tmp_path):
    for name, value in {"transcam-seed0": (39, 48, None, None), "transcam-seed1": (39, 50, None, None),
                        "noise-x1-seed0": (40, 50, 60, 70), "noise-x1-seed1": (41, 49, 61, 72)}.items():
        stage.write_json(tmp_path / "rows" / name / "results.json", results_of(value))
    said = run("report.py", "tables", "--data", toy, "--out", tmp_path, "--device", "cpu")
    line = cells(said, "noise-x1")[1]
    assert line[3:6] == ["1.50 ± 0.71 (+1.00, +2.00)", "0.50 ± 2.12 (+2.00, -1.00)", "not run"]


def test_what_stands_beside_the_rows_is_told_with_its_own_settings(toy, tmp_path):
    folder = tmp_path / "rows"
    stage.write_json(folder / "transcam-seed0" / "results.json", results_of((39, 48, None, None), lr=1))
    stage.write_json(folder / "transcam-shifted-seed0" / "results.json", results_of((39, 48, 57, 59), lr=1))
    ceiling = {**results_of((None, None, None, 55)), "settings": {"segmenter": {"lr": 3, "seed": 0}}}
    stage.write_json(folder / "true-masks-seed0" / "results.json", ceiling)
    record = {"id": "", "done": True, "seconds": 0, "settings": {"epochs": 2, "lr": 9}, "inputs": {}}
    stage.write_json(folder / "warm" / "classifier.json", record)
    watched = {"map": 0.5, "plain": 40.0, "refined": None, "entropy": [0.4, 0.6], "own_rows": 0.9,
               "object_attention": 0.7}
    stage.write_json(folder / "warm-wide" / "classifier.json", {**record, "watched": {"0": watched}})
    said = run("report.py", "tables", "--data", toy, "--out", tmp_path, "--device", "cpu")
    assert cells(said, "TransCAM + PSA, shifted")[0] == ["TransCAM + PSA, shifted", "", "", "57.00"]
    assert cells(said, "TransCAM, shifted")[0] == ["TransCAM, shifted", "", "", "59.00", "not run"]
    assert cells(said, "background")[0][-1] == "59.0" and "TransCAM, shifted: ours" in said
    assert "BNR, shifted" not in said
    assert cells(said, "true-masks")[0][7] == "55.00" and not cells(said, "warm")
    assert cells(said, "warm-wide")[0][1:] == ["0", "50.00", "40.00", "", "0.50", "0.90", "0.70"]
    assert "- `classifier of the warm start` lr=9\n- `segmenter of true-masks` lr=3\n" in said


def test_runs_of_other_settings_are_not_one_table(rows):
    other = results_of((1, 2, None, None), epochs=3, noise=2)
    stage.write_json(rows[1] / "rows" / "noise-x2-seed0" / "results.json", other)
    said = run("report.py", "tables", "--data", rows[0], "--out", rows[1], "--device", "cpu", status=1)
    assert "classifier had --epochs 3 in noise-x2-seed0, 2 in transcam-seed0: not one table" in said


def test_no_run_names_the_command_that_makes_one(toy, tmp_path):
    said = run("report.py", "tables", "--data", toy, "--out", tmp_path, "--device", "cpu", status=1)
    assert 'run "make results"' in said


# ---------------------------------------------------------------- page

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run written by hand, of a data set with hostile names: four photos of train, three of val. -> data, out"""
    root, out = tmp_path_factory.mktemp("<i>data") / "set", tmp_path_factory.mktemp("out")
    names = ["a", "b", "<b>c", "d", "e", "f", "g"]
    for n, name in enumerate(names):
        rng = np.random.RandomState(n)
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        photo = Image.fromarray(rng.randint(0, 255, (48, 64 - 8 * n, 3)).astype(np.uint8))
        photo.save(root / "JPEGImages" / f"{name}.jpg")
        mask = np.zeros((48, 64 - 8 * n), np.uint8)
        mask[8:40, 4:12], mask[0] = 1 + n % 3, data.VOID
        data.write_mask(root / "SegmentationClass" / f"{name}.png", mask)
        wrong = mask.copy()
        wrong[8:8 + 4 * n] = 2  # the later, the worse
        data.write_mask(out / ("pseudo_labels" if n < 4 else "segmentation") / f"{name}.png", wrong)
        if n < 4:
            maps = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(n)).numpy()
            seeds.write_seeds(out / "cams" / f"{name}.npz", [1 + n % 3], mask.shape, refined=[maps])
    lines = [f"{name} {HOSTILE[n % 3]}" for n, name in enumerate(names)]
    for name, text in (("labels", lines), ("classes", HOSTILE), ("ImageSets/Segmentation/train", names[:4]),
                       ("ImageSets/Segmentation/train_aug", names[:4]), ("ImageSets/Segmentation/val", names[4:])):
        stage.write_lines(root / f"{name}.txt", text)
    results = results_of((40, 50, 60, 70), classes=["background", *HOSTILE])
    for row in results["rows"]:
        row.update(iou=[0.5, float("nan"), 0.25, 0.0]) if "iou" in row else None
    stage.write_json(out / "results.json", results)
    steps = [{"stage": "classifier", "id": "x", "step": step, "steps": 30, "loss": 2.0 - step / 30, "L_cls": 1.0,
              "L_M**": 0.5, "lr": 0.1, "images_s": 3, "gb": 1, "precision": "float32"} for step in (10, 20)]
    (out / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"stage": "classi')
    where = ("--data", root, "--out", out, "--device", "cpu", "--workers", 0)
    assert "7 photos" in run("report.py", "page", *where)
    return root, out


def embedded(out):
    """The data of OUT/report.html."""
    return json.loads(re.search(r'type="application/json">(.*?)</script>', (out / "report.html").read_text(), re.S)[1])


def test_page_is_one_file_without_addresses_and_without_markup_of_names(made):
    text = (made[1] / "report.html").read_text()
    assert set(re.findall(r"https?://([^\"'` ]*)", text)) == {"www.w3.org/${svg"}  # the names of SVG and HTML
    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text
    value = embedded(made[1])
    assert [name for name, _ in value["classes"][1:]] == HOSTILE
    assert {split: found["n"] for split, found in value["splits"].items()} == {"val": 3, "train": 4}


def test_scores_of_the_page_are_those_of_the_confusion_matrix(made):
    root, out = made
    for photo in embedded(out)["splits"]["train"]["photos"]:
        paths = root / "SegmentationClass" / f"{photo['name']}.png", out / "pseudo_labels" / f"{photo['name']}.png"
        matrix = evaluate.confusion(*(data.read_mask(path) for path in paths), 4)
        assert photo["scores"]["pseudo"]["iou"] == pytest.approx(np.nanmean(evaluate.iou(matrix)))
        cams = seeds.read_seeds(out / "cams" / f"{photo['name']}.npz")
        seed = seeds.hard_threshold(*cams, 0.3)  # the best of results.json
        matrix = evaluate.confusion(data.read_mask(paths[0]), seed, 4)
        assert photo["scores"]["seed"]["iou"] == pytest.approx(np.nanmean(evaluate.iou(matrix)))


def test_most_frequent_error_of_a_photo_is_named():
    matrix = np.array([[50, 0, 10], [5, 20, 0], [0, 0, 15]])
    assert page.score(matrix)["wrong"] == [0, 2, 0.1]
    assert page.score(np.diag([3, 4]))["wrong"] is None


def test_larger_lists_show_the_worst_and_an_even_choice_of_the_others(made, tmp_path):
    where = ("--data", made[0], "--out", made[1], "--device", "cpu", "--workers", 0)
    try:
        run("report.py", "page", *where, "--photos", 2)
        photos = embedded(made[1])["splits"]["train"]["photos"]
        assert [photo["name"] for photo in photos] == ["d", "<b>c"]
    finally:
        run("report.py", "page", *where)


def test_page_of_photos_without_masks_and_without_a_run(toy, tmp_path):
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    for n, name in enumerate(("one", "sub/two")):
        shutil.copy(data.DataSet(toy).image(f"toy_000{n}"), tmp_path / "mine" / f"{name}.jpg")
    stage.write_lines(tmp_path / "mine" / "labels.txt", ["one rabbit", "sub/two bear rabbit"])
    run("report.py", "page", "--data", tmp_path / "mine", "--out", tmp_path, "--device", "cpu")
    value = embedded(tmp_path)
    photos = value["splits"]["train"]["photos"]
    assert [(photo["name"], photo["classes"], photo["scores"]) for photo in photos] == [
        ("one", [2], {}), ("sub/two", [1, 2], {})]
    assert value["tables"] == value["charts"] == value["numbers"] == []


def send(address, value=None, method="POST"):
    """One request to chromedriver. -> its answer"""
    body = json.dumps(value or {}).encode() if method == "POST" else None
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, method=method), timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None


class Browser:
    """Chromium through chromedriver (the WebDriver protocol)."""

    KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Left": "\ue012", "Right": "\ue014", "Down": "\ue015"}

    def __init__(self, address):
        self.address = address

    def run(self, script):
        return send(f"{self.address}/execute/sync", {"script": script, "args": []})

    def open(self, path, width=1280, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        send(f"{self.address}/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        send(f"{self.address}/url", {"url": path.resolve().as_uri()})

    def element(self, css):
        return next(iter(send(f"{self.address}/element", {"using": "css selector", "value": css}).values()))

    def click(self, css):
        send(f"{self.address}/element/{self.element(css)}/click")

    def choose(self, css, text):
        send(f"{self.address}/element/{self.element(css)}/value", {"text": text})

    def press(self, key):
        keys = [{"type": kind, "value": self.KEYS[key]} for kind in ("keyDown", "keyUp")]
        send(f"{self.address}/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def wait(self, condition):
        """Until a condition in JavaScript holds."""
        script = f"const look = done => {condition} ? done(true) : setTimeout(look, 20, done); look(arguments[0]);"
        assert send(f"{self.address}/execute/async", {"script": script, "args": []}), condition

    def show(self, number=0):
        """Scroll to a card, until its pictures are there."""
        card = f"document.querySelectorAll('.card')[{number}]"
        self.run(f"{card}.scrollIntoView()")
        self.wait(f"{card}.querySelector('img')")

    def names(self):
        """Of the photos that are listed, in order."""
        return self.run("return [...document.querySelectorAll('.card')].map(card => card.photo.name)")

    def errors(self):
        """What the console said."""
        return [entry["message"] for entry in send(f"{self.address}/se/log", {"type": "browser"})]

    def save(self, path):
        path.write_bytes(base64.b64decode(send(f"{self.address}/screenshot", method="GET")))


@pytest.fixture(scope="module")
def browser():
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no chromium with chromedriver (Debian: apt-get install chromium chromium-driver)")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync")
    with tempfile.TemporaryDirectory() as profile:
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            started = (re.search(r"started successfully on port (\d+)", line) for line in process.stdout)
            address = f"http://127.0.0.1:{next(found for found in started if found)[1]}/session"
            options = {"binary": program, "args": [*flags, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = send(address, {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            yield Browser(f"{address}/{session}")
            send(f"{address}/{session}", method="DELETE")
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def tab(browser, made):
    """The page, freshly opened; no console error by the end of the test."""
    browser.open(made[1] / "report.html")
    yield browser
    assert browser.errors() == []


def test_hostile_names_stay_text_in_the_browser(tab):
    assert tab.run("return document.querySelectorAll('script').length") == 2
    assert tab.run("return typeof boom") == "undefined" and tab.run("return document.title") == "BNR report: set"
    chips = tab.run("return [...document.querySelectorAll('#classes button')].map(chip => chip.textContent)")
    assert chips == ["all classes 3", f"{HOSTILE[0]} 1", f"{HOSTILE[1]} 1", f"{HOSTILE[2]} 1"]
    tab.click("#splits button:nth-child(2)")
    tab.show()
    assert "<b>c" in tab.names() and "<b>c" in tab.run("return document.querySelector('#cards').textContent")
    assert tab.run("return document.querySelectorAll('.card b b').length") == 0


def test_photos_are_sorted_by_iou_or_name(tab):
    tab.click("#splits button:nth-child(2)")
    assert tab.run("return document.getElementById('stage').value") == "pseudo"
    assert tab.names() == ["d", "<b>c", "b", "a"]  # the later, the worse
    tab.choose("#sort", "best first")
    assert tab.names() == ["a", "b", "<b>c", "d"]
    tab.choose("#stage", "seed")
    scores = tab.run("return [...document.querySelectorAll('.card')].map(card => card.photo.scores.seed.iou)")
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    tab.choose("#sort", "by name")
    assert tab.names() == ["<b>c", "a", "b", "d"]


def test_class_chip_leaves_the_photos_of_that_class(tab):
    tab.click("#splits button:nth-child(2)")
    tab.click("#classes button:nth-child(2)")
    assert set(tab.names()) == {"a", "d"}
    assert tab.run("return document.getElementById('count').textContent") == "2 of 4 photos"
    pressed = "return document.querySelector('#classes [aria-pressed=true]').textContent"
    assert tab.run(pressed) == "cat 2"
    tab.click("#classes button:nth-child(1)")
    assert len(tab.names()) == 4


def test_slider_sets_the_opacity_of_the_labels(tab):
    opacity = "return getComputedStyle(document.querySelector('.photo img + img')).opacity"
    tab.show()
    assert tab.run(opacity) == "0.75"
    tab.run("document.querySelector('#slider input').focus()")
    for _ in range(5):
        tab.press("Left")
    assert tab.run(opacity) == "0.7"


def test_keyboard_moves_opens_and_closes(tab):
    tab.press("Right")
    tab.press("Right")
    second, third = tab.names()[1:3]
    tab.wait(f"document.activeElement.photo?.name === '{second}'")
    tab.press("Enter")
    opened = "document.getElementById('viewer').open && document.getElementById('viewed').textContent"
    tab.wait(f"({opened}) === '{second}'")
    tab.press("Right")
    tab.wait(f"({opened}) === '{third}'")
    pressed = "return document.querySelector('#viewer [aria-pressed=true]').textContent"
    before = tab.run(pressed)
    tab.press("Down")
    assert tab.run(pressed) != before
    tab.press("Escape")
    tab.wait(f"document.activeElement.photo?.name === '{third}'")
    assert tab.run(f"return {opened}") is False


def test_page_fits_a_phone(browser, made):
    browser.open(made[1] / "report.html", 390, 844)
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    browser.show()
    tiles = "const [a, b, c] = [...document.querySelectorAll('.tiles figure')].map(f => f.getBoundingClientRect()); "
    assert browser.run(tiles + "return a.top === b.top && c.top > a.top && a.width > 150")
    assert browser.run("return parseFloat(getComputedStyle(document.body).fontSize)") >= 15
    browser.click(".card")
    assert browser.run("return document.getElementById('viewer').getBoundingClientRect().width") <= 390
    assert browser.errors() == []


def test_pictures_of_400_photos_are_made_as_they_come_near(browser, made, tmp_path):
    value = embedded(made[1])
    del value["splits"]["val"]
    photos = [{**photo, "name": str(n)} for n, photo in enumerate(value["splits"]["train"]["photos"] * 100)]
    value["splits"]["train"]["photos"] = photos
    (tmp_path / "many.html").write_text(page.render(value))
    browser.open(tmp_path / "many.html")
    assert len(browser.names()) == 400
    count = "return document.querySelectorAll('.tiles').length"
    browser.show(5)
    assert browser.run(count) < 60
    browser.show(399)
    assert browser.run(count) < 120 and browser.errors() == []


def test_curves_are_drawn_with_their_names(tab):
    titles = tab.run("return [...document.querySelectorAll('.charts h3')].map(title => title.textContent)")
    assert titles == ["Seeds: mIoU over the hard threshold", "Training loss: classifier"]
    keys = tab.run("return [...document.querySelectorAll('.key')].map(key => key.textContent)")
    assert keys == ["refined seeds: 50.00 at 0.3", "loss", "L_cls", "L_M**"]
    tab.wait("document.querySelectorAll('.charts path').length === 4")


# ---------------------------------------------------------------- a small run and its pictures

SMALL = {"train": "--epochs 1 --crop 64 --long-side 64 96 --batch-size 8", "predict": "--scales 0.5",
         "affinity": "--epochs 1 --width 2 --crop 64 --batch-size 8",
         "seg": "--iterations 2 --width 2 --crop 64 --batch-size 8"}


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """Baseline and ×1, this one through all stages, by `results.py`, twice. -> data, out, what each printed"""
    out = tmp_path_factory.mktemp("results")
    flags = [f"--{step}-flags={more}" for step, more in SMALL.items()]
    command = ("results.py", "--data", toy, "--out", out, "--preset", "toy", "--device", "cpu",
               "--workers", 0, "--rows", "transcam", "noise-x1", "--seeds", 0, "--further", "noise-x1", *flags)

    class InThisProcess:
        returncode = 0

        def __init__(self, command, **streams):
            print(run(Path(command[1]).name, *command[2:]))

        def poll(self):
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results.subprocess, "Popen", InThisProcess)
        said = run(*command)
        again = run(*command)
    return toy, out, said, again


def test_results_run_each_row_through_its_stages_and_print_the_tables(trained):
    toy, out, said, again = trained
    assert [line.split()[2:4] for line in said.splitlines() if line.startswith("$ python")] == [
        ["bnr.py", "train"], ["bnr.py", "cams"], ["evaluate.py", "--data"],
        ["bnr.py", "train"], ["bnr.py", "cams"], ["psa.py", "labels"], ["psa.py", "train"], ["psa.py", "walk"],
        ["segment.py", "train"], ["segment.py", "predict"], ["evaluate.py", "--data"],
        ["bnr.py", "train"], ["bnr.py", "cams"], ["evaluate.py", "--data"]]
    assert {path.name for path in (out / "rows").iterdir()} == {"transcam-seed0", "noise-x1-seed0", "start-seed0"}
    assert again.count("done already") == 11 and "done already" not in said
    row = cells(said, "noise-x1")[0]
    results = stage.read_json(out / "rows" / "noise-x1-seed0" / "results.json")
    assert row[7] == f"{next(entry['miou'] for entry in results['rows'] if entry['stage'] == 'segmenter'):.2f}"
    assert cells(said, "transcam")[0][7] == "not run"


def test_results_can_start_warm_move_the_thresholds_and_train_on_true_masks(toy, tmp_path, monkeypatch):
    called, row = [], tmp_path / "rows" / "transcam-seed1"

    def run_all(rows, jobs):
        for words, *_ in itertools.chain(*rows):
            called.append(" ".join(map(str, words)))

    monkeypatch.setattr(results, "run_all", run_all)
    monkeypatch.setattr(results, "tables", lambda args: None)
    stage.write_json(row / "results.json", results_of((39, 48, None, None)))  # the seeds' best threshold is 0.30
    for name in ("classifier.json", "classifier.pth", "cams.json", "cams/toy_0000.npz"):
        stage.write(row / name, lambda file: file.write(b"seeds"))
    run("results.py", "--data", toy, "--out", tmp_path, "--preset", "small", "--device", "cpu", "--rows", "transcam",
        "no-noise", "--seeds", 0, 1, "--further-seeds", 1, "--warm-start", "w.pth", "--shifted", "--true-masks",
        "--warm-flags=--micro-batch 2")
    warm = tmp_path / "rows" / "warm"
    assert called[0].startswith("bnr.py train") and called[0].endswith("--pretrained w.pth --micro-batch 2")
    assert f"--out {warm} --preset warm --seed 0" in called[0]
    assert sum(f"--pretrained {warm / 'classifier.pth'}" in line for line in called) == 5  # 2 rows, 2 seeds; start
    assert all("--amp" in line and ("--micro-batch" not in line) == (n > 0) for n, line in enumerate(called))
    walks = [line for line in called if line.startswith("psa.py walk")]
    assert [Path(line.split()[5]).name for line in walks] == ["transcam-seed1", "transcam-shifted-seed1"]
    segmenters = [Path(line.split()[5]).name for line in called if line.startswith("segment.py train")]
    assert segmenters == ["transcam-shifted-seed1", "true-masks-seed0"]
    assert walks[1].endswith("--background-score 0.30")
    assert [line.split(" --fo")[1] for line in called if "--foreground" in line] == ["reground 0.48 --background 0.13"]
    assert (tmp_path / "rows" / "transcam-shifted-seed1" / "cams" / "toy_0000.npz").read_bytes() == b"seeds"
    ceiling = next(line for line in called if "--train-list train" in line)
    assert ceiling.startswith("segment.py train") and ceiling.endswith(f"--labels {toy / 'SegmentationClass'}")


def test_sheets_show_best_middle_and_worst_photos(trained):
    toy, out = trained[:2]
    row = out / "rows" / "noise-x1-seed0"
    first = row / "affinity_labels" / f"{data.DataSet(toy).ids('train')[0]}.png"
    whole = first.read_bytes()
    data.write_mask(first, np.full_like(data.read_mask(first), data.VOID))  # labelled nowhere
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run("report.py", "sheets", "--data", toy, "--out", row, "--device", "cpu", "--height", 32)
    finally:
        first.write_bytes(whole)
    folder = row / "sheets"
    assert {path.stem for path in folder.iterdir()} == {"cams", "affinity_labels", "pseudo_labels", "segmentation"}
    for path in folder.iterdir():
        assert Image.open(path).height == 4 + 3 * (20 + 2 * (32 + 6)) + 30 - 4
    (row / "segmentation").rename(row / "elsewhere")
    said = run("report.py", "sheets", "--data", toy, "--out", row, "--device", "cpu", "--height", 32)
    (row / "elsewhere").rename(row / "segmentation")
    assert "segmentation: not drawn, as no photo of val has both" in said and "pseudo_labels.png" in said


def test_rows_run_at_the_same_time(tmp_path, monkeypatch):
    """Two that wait for each other: one after the other would give up."""
    meet = """import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
until = time.time() + 20
while not pathlib.Path(sys.argv[2]).exists():
    assert time.time() < until
    time.sleep(0.02)"""

    def start(words, *_, own_log):
        return subprocess.Popen([sys.executable, "-c", meet, *words]), "meet", ""

    monkeypatch.setattr(results, "start", start)
    a, b = tmp_path / "a", tmp_path / "b"
    results.run_all([iter([((a, b), 1, tmp_path)]), iter([((b, a), 1, tmp_path)])], jobs=2)
    with pytest.raises(stage.InputError, match="meet ended with status 1"):  # for want of a folder
        results.run_all([iter([((tmp_path / "no" / "a", b), 1, tmp_path)])], jobs=1)


@pytest.mark.parametrize("signal_sent", [False, True])
def test_no_row_goes_on_alone(tmp_path, monkeypatch, signal_sent):
    """One fails, or all are stopped: what still runs is ended."""
    begun = []

    def start(words, *_, own_log):
        begun.append(subprocess.Popen([sys.executable, "-c", words]))
        return begun[-1], "row", ""

    def stopped(seconds):
        raise SystemExit(130)

    monkeypatch.setattr(results, "start", start)
    monkeypatch.setattr(results, "GRACE", 0)
    if signal_sent:
        monkeypatch.setattr(results.time, "sleep", stopped)
    other = "import time; time.sleep(30)" if signal_sent else "raise SystemExit(3)"
    with pytest.raises(SystemExit if signal_sent else stage.InputError):
        rows = [iter([(text, 1, tmp_path)]) for text in ("import time; time.sleep(30)", other)]
        results.run_all(rows, jobs=2)
    assert begun[0].returncode == -15 and all(process.returncode is not None for process in begun)


def test_a_stage_that_fails_ends_the_results(toy, tmp_path):
    said = run("results.py", "--data", toy, "--out", tmp_path, "--preset", "toy", "--device", "cpu", "--jobs", 2,
               "--rows", "transcam", "no-noise", "--train-flags=--crop 65", status=1)
    assert "bnr.py train" in said and "ended with status 2: see " in said
    assert any("--crop 65" in path.read_text() for path in tmp_path.glob("rows/*/log.txt"))
    assert not (tmp_path / "rows" / "start-seed0").exists()


def test_any_photo_is_shown_without_its_data_set(trained, tmp_path, monkeypatch):
    toy, out = trained[:2]
    photo = tmp_path / "holiday.png"
    data.read_image(data.DataSet(toy).image("toy_0000")).rotate(90, expand=True).save(photo)
    monkeypatch.chdir(tmp_path)
    flags = ("--out", tmp_path, "--device", "cpu", "--weights", out / "rows" / "noise-x1-seed0" / "classifier.pth")
    said = run("report.py", "show", photo, photo, *flags, "--classes", "cat", "lion", "--height", 64)
    assert re.search(r"holiday.png: cat \d\.\d\d, lion \d\.\d\d", said)
    with Image.open(tmp_path / "show.png") as picture:
        assert picture.height == 4 * (20 + 64 + 6) + 4  # a row a class with its title, for each photo
    said = run("report.py", "show", photo, *flags, "--classes", "dog", status=2)
    assert "--classes dog" in said and "knows cat rabbit cow bear lion" in said
    said = run("report.py", "show", photo, *flags[:4], status=1)
    assert "no weight file" in said and "make train" in said


def test_maps_of_a_photo_are_those_of_the_seeds_file(trained):
    toy, out = trained[:2]
    folder, dataset = out / "rows" / "noise-x1-seed0", data.DataSet(toy)
    model, network = bnr.load_classifier(folder / "classifier.pth", dataset.num_classes, "cpu")
    image = data.read_image(dataset.image("toy_0001"))
    found = pictures.look(model, image, network["crop"], (1.0, 1.5, 2.0), torch.device("cpu"), False)
    for kind in ("plain", "refined"):
        classes, maps = seeds.read_seeds(folder / "cams" / "toy_0001.npz", kind)
        ours = seeds.combine_scales([scale[classes - 1] for scale in found[kind]], image.size[::-1])
        assert np.abs(ours.numpy() - maps).max() < 1e-4
    assert found["attention"].sum() == pytest.approx(pictures.attention_of(model, image, 64, "cpu")[0].mean(0).sum())


def test_stages_of_a_run_stand_side_by_side_and_white_where_one_has_not_run(trained):
    toy, out = trained[:2]
    for row, lacking in (("noise-x1", ["segmentation"]), ("transcam", ["pseudo label", "segmentation"])):
        folder, dataset = out / "rows" / f"{row}-seed0", data.DataSet(toy)
        panels = pictures.stages_of(dataset, folder, "toy_0000", 0.3)
        assert list(panels) == ["photo", "ground truth", "plain CAM", "refined CAM", "seed at 0.30", "pseudo label",
                                "segmentation"]
        assert [title for title, picture in panels.items() if picture is None] == lacking
        assert len({picture.shape for picture in panels.values() if picture is not None}) == 1
        said = run("report.py", "show", "--data", toy, "--out", folder, "--device", "cpu", "--ids", "toy_0000")
        assert str(folder / "show.png") in said and Image.open(folder / "show.png").height == 4 + 20 + 160 + 6 + 30 - 4


def test_all_photos_that_are_named_are_shown(trained):
    toy, out = trained[:2]
    folder = out / "rows" / "noise-x1-seed0"
    run("report.py", "show", "--out", folder, "--device", "cpu", "--ids", *(f"toy_000{n}" for n in range(6)))
    assert Image.open(folder / "show.png").height > 6 * 160


def test_tables_know_the_data_set_of_their_rows(trained):
    toy, out = trained[:2]
    assert f"ours, {toy.name} train, N = 24" in run("report.py", "tables", "--out", out, "--device", "cpu")


def test_figures_are_drawn_or_what_they_lack_is_named(trained, tmp_path, monkeypatch):
    toy, out = trained[:2]
    flags = ("--data", toy, "--out", out, "--device", "cpu", "--seeds", 0, "--height", 64, "--first", 2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = run("report.py", "figures", *flags, "--place", 0.5, 0.5)
    assert {path.name for path in (out / "figures").iterdir()} == {"figure_1.png", "figure_3.png", "figure_5.png"}
    assert 'figure_4 is not drawn: matplotlib is missing: "make figures" installs it' in said
    (tmp_path / "rows").mkdir()
    shutil.copytree(out / "rows" / "noise-x1-seed0", tmp_path / "rows" / "noise-x1-seed0")
    said = run("report.py", "figures", *flags[:2], "--out", tmp_path, *flags[4:])
    command = f"python results.py --data {toy} --out {tmp_path} --rows transcam --seeds 0"
    assert f'figure_1 is not drawn: no seeds in {tmp_path}/rows/transcam-seed0: run "{command}"' in said
    assert f'figure_5 is not drawn: no classifier in {tmp_path}/rows/transcam-seed0: run "{command}"' in said
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["figure_3.png"]


def test_figures_take_the_run_in_out_where_there_are_no_rows(trained, tmp_path):
    toy, out = trained[:2]
    shutil.copytree(out / "rows" / "noise-x1-seed0", tmp_path / "one")
    said = run("report.py", "figures", "--data", toy, "--out", tmp_path / "one", "--device", "cpu", "--height", 64)
    assert [path.name for path in (tmp_path / "one" / "figures").iterdir()] == ["figure_3.png"]
    assert "no classifier in" in said and "--rows transcam" in said


def test_walkthrough_runs_from_top_to_bottom(trained, tmp_path):
    toy, out = trained[:2]
    page_of, text = tmp_path / "walkthrough.md", stage.read_text(ROOT / "docs" / "walkthrough.md")
    page_of.write_text(re.sub("```text\n.*?```\n", "", text, flags=re.DOTALL))
    walkthrough.rewrite(page_of, toy, out / "rows" / "noise-x1-seed0")
    made = page_of.read_text()
    blocks = [re.findall("```python\n(.*?)```\n", page, flags=re.DOTALL) for page in (made, text)]
    assert blocks[0] == blocks[1] and made.count("```text") == text.count("```text") == len(blocks[0]) - 1
    drawn = set(re.findall(r"\]\((.*?)\)", text))
    assert drawn == {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "walkthrough").iterdir()}
    assert all((ROOT / "docs" / path).is_file() for path in drawn) and len(text.splitlines()) < 200


def test_figure_4_draws_each_row_of_table_5(rows, monkeypatch):
    pytest.importorskip("matplotlib", reason="no matplotlib (make figures installs it)")
    said = run("report.py", "figures", "--data", rows[0], "--out", rows[1], "--device", "cpu")
    assert Image.open(rows[1] / "figures" / "figure_4.png").size == (900, 600)
    assert "figure_4 lacks no-noise" in said and "figure_4 lacks transcam" not in said


def test_the_page_of_a_run_has_its_losses_and_its_tables(trained):
    toy, out = trained[:2]
    folder = out / "rows" / "noise-x1-seed0"
    run("report.py", "page", "--data", toy, "--out", folder, "--device", "cpu", "--workers", 0)
    value = embedded(folder)
    assert [chart["title"] for chart in value["charts"]] == [
        "Seeds: mIoU over the hard threshold", "While training: a sample of train at one scale",
        "Training loss: classifier", "Training loss: AffinityNet", "Training loss: segmenter"]
    assert {line["name"] for line in value["charts"][2]["series"]} == {"loss", "L_cls", "L_M**"}
    assert value["splits"]["train"]["layers"] == ["truth", "cam", "seed", "pseudo"] and value["settings"].keys() == {
        "classifier", "cams", "affinity_labels", "affinitynet", "pseudo_labels", "segmenter", "segmentation"}
    assert "Table 5. Seeds by the noise in the loss, mIoU %" in [table["title"] for table in value["tables"]]


def test_colours_of_a_map_follow_its_values():
    photo = torch.full((3, 1, 2), 100, dtype=torch.uint8)
    drawn = pictures.heat(photo, np.array([2]), np.array([[[0.0, 1.0]]], np.float32))
    assert drawn[:, 0, 0].tolist() == [35, 35, 35] and drawn[:, 0, 1].tolist() == [0, 128, 0]  # the palette's green
    drawn = pictures.glow(photo, torch.tensor([[0.0, 1.0]]))
    assert drawn[:, 0, 0].tolist() == [30, 30, 30] and drawn[:, 0, 1].tolist() == [208, 208, 208]


def test_place_of_figure_5_is_the_one_asked_for_or_in_the_middle_of_the_objects(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "set")
    mask = np.zeros((64, 96), np.uint8)
    mask[16:48, 48:96] = 2
    data.write_mask(tmp_path / "set" / "SegmentationClass" / "toy_0000.png", mask)
    dataset = data.DataSet(tmp_path / "set")
    objects, place = pictures.places_of(dataset, "toy_0000", 4, None)
    assert objects.nonzero()[:, 0].tolist() == [6, 7, 10, 11]
    assert place in (6, 7, 10, 11)
    assert pictures.places_of(dataset, "toy_0000", 4, (0.99, 0.3))[1] == 7
