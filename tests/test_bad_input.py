"""What a user can get wrong: one line that names file and remedy, status 1 (2 for a wrong flag), nothing lost."""

import contextlib
import os
import re
import shutil
import struct
import subprocess
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run, run_process
from PIL import Image
from small_run import MAKES, NEW, SMALL, STAGES, WHERE, contents, finished, here, refused, stage  # noqa: F401

LISTS = "data/ImageSets/Segmentation"
PHOTO, MASK = "data/JPEGImages/toy_0000.jpg", "data/SegmentationClass/toy_0000.png"
# ---------------------------------------------------------------- what is done to the files


def put(path, content):
    """Write text or bytes there, whatever it was."""

    def do():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return do


def encoded(path, encoding):
    return lambda: Path(path).write_bytes(("# caf\u00e9\n" + Path(path).read_text()).encode(encoding))


def add(path, line):
    return lambda: Path(path).write_text(Path(path).read_text() + line + "\n")


def cut(path, size=None):
    """Leave the first half, or `size` bytes."""

    def do():
        found = Path(path).read_bytes()
        Path(path).write_bytes(found[: len(found) // 2 if size is None else size])

    return do


def link(path, to):
    def do():
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to(to)

    return do


def fifo(path):
    def do():
        Path(path).unlink(missing_ok=True)
        os.mkfifo(path)

    return do


def without(stage, also=lambda: None):
    """The stage is to be made anew, and something is wrong besides."""

    def do():
        for path in Path("out").glob(f"{MAKES[stage]}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        also()

    return do


def all_of(*actions):
    return lambda: [action() for action in actions]


def picture(path, size, mode="L", value=0):
    return lambda: Image.new(mode, size, value).save(path)


def bomb(path):
    """A PNG whose header promises 60000 x 60000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return put(path, b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def xml(text):
    """Image labels from Annotations instead of labels.txt, one of which is this."""

    def do():
        Path("data/labels.txt").unlink()
        for n in range(6):
            put(f"data/Annotations/toy_{n:04d}.xml", "<a><object><name>cat</name></object></a>")()
        put("data/Annotations/toy_0000.xml", text)()

    return do


def npz(change, path="out/cams/toy_0000.npz", save=np.savez):
    def do():
        arrays = dict(np.load(path))
        change(arrays)
        save(path, **arrays)

    return do


def npy(array=None, content=None, pickle=False):
    """Somebody's class maps maps/ID/CLASS.npy, one of them this."""

    def do():
        run("bnr.py", "export", "--data", "data", "--out", "out", "--to", "maps", *SMALL)
        path = next(Path("maps/toy_0000").iterdir())
        if content is None:
            np.save(path, array, allow_pickle=pickle)
        else:
            path.write_bytes(content(path.read_bytes()))

    return do


class Thing:
    """What no weight file should hold."""


WEIGHTS = {
    "absent": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("weights"),
    "zip": lambda path: np.savez(open(path, "wb"), a=np.zeros(3)),
    "list": lambda path: torch.save([torch.zeros(3)], path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "pickle": lambda path: torch.save({"model": Thing()}, path),
    "numbers": lambda path: torch.save({1: 2, "trans_cls_head.weight": 3}, path),
    "nested": lambda path: torch.save({"model": {"model": [1]}, "network": 3}, path),
    "script": lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path),
    "old": lambda path: torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False),
    "cut": lambda path: path.write_bytes(Path("out/classifier.pth").read_bytes()[:5000]),
}


def weights(kind):
    def do():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is told to be old
            WEIGHTS[kind](Path("w.pth"))

    return do


def spoilt(path, change):
    """A weight file of ours with something changed."""

    def do():
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)

    return do


def nan(saved):
    next(value for value in saved["model"].values() if value.is_floating_point()).view(-1)[0] = torch.nan


def swap(path, other):
    return lambda: shutil.copy(other, path)


NOTHING = all_of()
BILLION = (
    "<!DOCTYPE a [<!ENTITY a0 'lol'>"
    + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10))
    + "]><a><object><name>&a9;</name></object></a>"
)
OUTSIDE = "<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><a><object><name>&e;</name></object></a>"
train = (*STAGES["train"], *NEW)


ROWS = {  # what is wrong: (what makes it so, the command, what the line says)
    # lists, labels, classes
    "latin-1 list": (encoded(f"{LISTS}/train_aug.txt", "latin-1"), train, "train_aug.txt is no UTF-8 text: save"),
    "UTF-16 list": (encoded(f"{LISTS}/train_aug.txt", "utf-16"), train, "train_aug.txt is no UTF-8 text"),
    "UTF-16 list, no mark": (encoded(f"{LISTS}/train_aug.txt", "utf-16-le"), train, "train_aug.txt is no UTF-8 text"),
    "latin-1 labels": (encoded("data/labels.txt", "latin-1"), train, "labels.txt is no UTF-8 text"),
    "UTF-16 labels": (encoded("data/labels.txt", "utf-16"), train, "labels.txt is no UTF-8 text"),
    "latin-1 classes": (encoded("data/classes.txt", "latin-1"), train, "classes.txt is no UTF-8 text"),
    "UTF-16 classes": (encoded("data/classes.txt", "utf-16-be"), train, "classes.txt is no UTF-8 text"),
    "empty list": (put(f"{LISTS}/train_aug.txt", "\n \n"), train, "train_aug.txt is empty: one image id"),
    "no list": (lambda: Path(f"{LISTS}/train_aug.txt").unlink(), train, "has no train_aug.txt: one image id a line"),
    "list is a fifo": (fifo(f"{LISTS}/train_aug.txt"), train, "has no train_aug.txt"),
    "list is a loop": (link(f"{LISTS}/train_aug.txt", "train_aug.txt"), train, "has no train_aug.txt"),
    "id twice": (add(f"{LISTS}/train_aug.txt", "toy_0000"), train, "names 1 ids twice, first toy_0000"),
    "id ..": (add(f"{LISTS}/train_aug.txt", "../../evil"), train, "train_aug.txt has the id '../../evil'"),
    "id x/..": (
        add(f"{LISTS}/train_aug.txt", "/JPEGImages/a/../../b.jpg"),
        train,
        "which would lead out of the folder",
    ),
    "id absolute": (add(f"{LISTS}/train_aug.txt", "/etc/passwd"), train, "train_aug.txt has the id '/etc/passwd'"),
    "id NUL": (add(f"{LISTS}/train_aug.txt", "a\0b"), train, "train_aug.txt is no UTF-8 text"),
    "id .. in labels": (add("data/labels.txt", "../evil cat"), train, "labels.txt has the id '../evil'"),
    "id not there": (
        add(f"{LISTS}/train_aug.txt", "absent"),
        train,
        "JPEGImages lacks 1 of 5 photos, first absent.jpg",
    ),
    "labels twice": (add("data/labels.txt", "toy_0000 unicorn"), train, "labels.txt names toy_0000 twice"),
    "unknown label": (put("data/labels.txt", "toy_0000 unicorn"), train, 'the label "unicorn" of toy_0000 is none of'),
    "no label": (put("data/labels.txt", "toy_0001 cat"), train, "no image labels of toy_0000: not in data/labels.txt"),
    "no class": (
        all_of(put("photos/labels.txt", "a\nb\n"), picture("photos/a.jpg", (9, 9))),
        ("bnr.py", "train", "--data", "photos", "--out", "new", *SMALL),
        "photos names 0 classes: 1 to 254",
    ),
    "class twice": (add("data/classes.txt", "cat"), train, "data names 6 classes: 1 to 254 are needed, each once"),
    "class of two words": (add("data/classes.txt", "traffic light"), train, "'traffic light' has a space: write traf"),
    "class ..": (put("data/classes.txt", "cat\n../../evil"), train, "data has the class '../../evil', which"),
    "class absolute": (
        all_of(put("photos/labels.txt", "a /tmp/evil\n"), picture("photos/a.jpg", (9, 9))),
        ("bnr.py", "train", "--data", "photos", "--out", "new", *SMALL),
        "photos has the class '/tmp/evil', which would lead out",
    ),
    "300 classes": (put("data/classes.txt", "\n".join(map(str, range(300)))), train, "data names 300 classes"),
    "no data": (NOTHING, ("bnr.py", "train", "--data", "absent", *SMALL), "absent is no data set"),
    "data is a file": (NOTHING, ("bnr.py", "train", "--data", PHOTO, *SMALL), "is no data set"),
    "object without a name": (xml("<a><object/></a>"), train, "toy_0000.xml has an object without a name"),
    "XML cut": (xml("<a><object>"), train, "no image labels of toy_0000: .*toy_0000.xml: no element found"),
    "XML empty": (xml(""), train, "no image labels of toy_0000"),
    "XML that grows": (xml(BILLION), train, "toy_0000.xml: limit on input amplification"),
    "XML from outside": (xml(OUTSIDE), train, "toy_0000.xml: undefined entity"),
    "XML latin-1": (xml("<a>caf\u00e9</a>".encode("latin-1")), train, "toy_0000.xml is no UTF-8 text"),
    "XML deep": (xml("<a>" * 99999), train, "no image labels of toy_0000"),
    # photos
    "photo cut": (cut(PHOTO), train, "cannot read data/JPEGImages/toy_0000.jpg: .*truncated"),
    "photo empty": (put(PHOTO, ""), train, "cannot read data/JPEGImages/toy_0000.jpg"),
    "photo is text": (put(PHOTO, "hello"), train, "cannot read data/JPEGImages/toy_0000.jpg"),
    "photo is a bomb": (bomb(PHOTO), train, "cannot read data/JPEGImages/toy_0000.jpg: .*decompression bomb"),
    "photo is a fifo": (fifo(PHOTO), train, "JPEGImages lacks 1 of 4 photos, first toy_0000.jpg"),
    "photo is a loop": (link(PHOTO, "toy_0000.jpg"), train, "JPEGImages lacks 1 of 4 photos, first toy_0000.jpg"),
    "photo is a device": (link(PHOTO, "/dev/zero"), train, "JPEGImages lacks 1 of 4 photos, first toy_0000.jpg"),
    "fifo to predict": (
        fifo("pipe.jpg"),
        ("segment.py", "predict", "pipe.jpg", *WHERE),
        "no photo and no folder pipe.jpg",
    ),
    "device to predict": (NOTHING, ("segment.py", "predict", "/dev/zero", *WHERE), "no photo and no folder /dev/zero"),
    "no photos to predict": (
        put("mine/a.txt", ""),
        ("segment.py", "predict", "mine", *WHERE),
        "no photos in mine: of .jpg",
    ),
    "ids .. to predict": (NOTHING, ("segment.py", "predict", "--ids", "../evil", *WHERE), "--ids has the id '../evil'"),
    "ids / to predict": (NOTHING, ("segment.py", "predict", "--ids", "/etc/passwd", *WHERE), "--ids has the id"),
    "ids not there": (NOTHING, ("segment.py", "predict", "--ids", "toy", *WHERE), "lacks 1 of 1 photos, first toy.jpg"),
    "two photos of an id": (
        all_of(put("two/a.jpg", "1"), put("two/a.png", "2")),
        ("segment.py", "predict", "two", *WHERE),
        "two photos would be written as a",
    ),
    "a photo named as an overlay": (
        all_of(put("two/a.jpg", "1"), put("two/a_overlay.jpg", "2")),
        ("segment.py", "predict", "two", *WHERE),
        "two/a_overlay.jpg would be written over the overlay of two/a.jpg: rename it",
    ),
    # masks
    "mask of another size": (
        picture(MASK, (9, 9)),
        stage("evaluate"),
        "toy_0000.*9.*9|toy_0000.png is .*x.*, its photo 9x9",
    ),
    "mask cut": (cut(MASK), stage("evaluate"), "cannot read data/SegmentationClass/toy_0000.png"),
    "mask empty": (put(MASK, ""), stage("evaluate"), "cannot read data/SegmentationClass/toy_0000.png"),
    "mask value 77": (
        picture(MASK, (200, 200), "L", 77),
        stage("evaluate"),
        "toy_0000.png has value 77, but there are 6",
    ),
    "mask of colours": (
        picture(MASK, (200, 200), "RGB", (1, 2, 3)),
        stage("evaluate"),
        "has colours that are not of PASCAL",
    ),
    "mask of 16 bits": (picture(MASK, (200, 200), "I;16", 999), stage("evaluate"), "toy_0000.png is no index PNG"),
    "mask of floats": (
        all_of(picture("data/m.tiff", (9, 9), "F"), lambda: shutil.copy("data/m.tiff", MASK)),
        stage("evaluate"),
        "toy_0000.png is no index PNG",
    ),
    "mask is a bomb": (bomb(MASK), stage("evaluate"), "cannot read .*toy_0000.png: .*decompression bomb"),
    "mask missing": (
        lambda: Path(MASK).unlink(),
        stage("evaluate"),
        "SegmentationClass lacks 1 of 4 masks, first toy_0000",
    ),
    "masks of another size": (
        all_of(lambda: shutil.copytree("data/SegmentationClass", "mine"), picture("mine/toy_0000.png", (9, 9))),
        ("evaluate.py", "--masks", "mine", *WHERE),
        "mine/toy_0000.png is 9x9, its",
    ),
    "masks not there": (NOTHING, ("evaluate.py", "--masks", "mine", *WHERE), "mine lacks 4 of 4 masks"),
    "pseudo label of another size": (
        without("segmenter", picture("out/pseudo_labels/toy_0000.png", (9, 9))),
        stage("segmenter"),
        "pseudo_labels/toy_0000.png is 9x9, its photo",
    ),
    "pseudo label empty": (
        without("segmenter", put("out/pseudo_labels/toy_0000.png", "")),
        stage("segmenter"),
        "cannot read out/pseudo_labels/toy_0000.png",
    ),
    "pseudo label missing": (
        without("segmenter", lambda: Path("out/pseudo_labels/toy_0000.png").unlink()),
        stage("segmenter"),
        'pseudo_labels lacks 1 of 4 labels, first toy_0000.png: run "make psa"',
    ),
    "affinity label of another size": (
        without("affinity", picture("out/affinity_labels/toy_0000.png", (9, 9))),
        stage("affinity"),
        "affinity_labels/toy_0000.png is 9x9, its photo",
    ),
    # seeds
    "seeds cut": (
        without("labels", cut("out/cams/toy_0000.npz")),
        stage("labels"),
        'cams/toy_0000.npz is damaged .*: delete it and run "make cams"',
    ),
    "seeds empty": (without("labels", put("out/cams/toy_0000.npz", "")), stage("labels"), "toy_0000.npz is damaged"),
    "seeds are text": (
        without("walk", put("out/cams/toy_0000.npz", "hello")),
        stage("walk"),
        "toy_0000.npz is damaged",
    ),
    "seeds missing": (
        without("walk", lambda: Path("out/cams/toy_0000.npz").unlink()),
        stage("walk"),
        'cams lacks 1 of 4 seeds, first toy_0000.npz: run "make cams"',
    ),
    "seeds NaN": (
        without("labels", npz(lambda a: a["refined_0"].fill(np.nan))),
        stage("labels"),
        "toy_0000.npz has values that are not finite",
    ),
    "seeds infinite": (
        without("walk", npz(lambda a: a["refined_0"].fill(np.inf))),
        stage("walk"),
        "toy_0000.npz has values that are not finite",
    ),
    "seeds NaN, scored": (
        npz(lambda a: a["refined_0"].fill(np.nan)),
        stage("evaluate"),
        "toy_0000.npz has values that",
    ),
    "seeds of another photo": (
        without("labels", npz(lambda a: a.update(size=np.array([9, 9])))),
        stage("labels"),
        "toy_0000.npz is of a photo of another size",
    ),
    "seeds of a size too large": (
        without("labels", npz(lambda a: a.update(size=np.array([10**7] * 2)))),
        stage("labels"),
        "toy_0000.npz is damaged",
    ),
    "seeds of too few classes": (
        without("labels", npz(lambda a: a.update(classes=np.array([], int)))),
        stage("labels"),
        "toy_0000.npz is damaged",
    ),
    "seeds of class 77": (
        npz(lambda a: a.update(classes=np.full_like(a["classes"], 77))),
        stage("evaluate"),
        "toy_0000.npz has class 77, but there are 5",
    ),
    "seeds pickled": (
        without("labels", npz(lambda a: a.update(classes=np.array([Thing()])))),
        stage("labels"),
        "toy_0000.npz is damaged",
    ),
    "maps pickled": (
        npy(np.array([{}]), pickle=True),
        ("evaluate.py", "--seeds", "maps", *WHERE),
        "cannot read maps/toy_0000",
    ),
    "maps cut": (
        npy(content=lambda old: old[:-9]),
        ("evaluate.py", "--seeds", "maps", *WHERE),
        "cannot read maps/toy_0000",
    ),
    "maps empty": (
        npy(content=lambda old: b""),
        ("evaluate.py", "--seeds", "maps", *WHERE),
        "cannot read maps/toy_0000",
    ),
    "maps of one axis": (
        npy(np.zeros(3)),
        ("evaluate.py", "--seeds", "maps", *WHERE),
        r"maps/toy_0000 .*not \(H, W\)|cannot read",
    ),
    "maps NaN": (
        npy(np.full((9, 9), np.nan)),
        ("evaluate.py", "--seeds", "maps", *WHERE),
        "not finite|cannot read maps",
    ),
    "maps of a size too large": (
        npy(content=lambda old: old.replace(b"(", b"(99999999, ", 1).replace(b" " * 10, b"", 1)),
        ("evaluate.py", "--seeds", "maps", *WHERE),
        "cannot read maps/toy_0000",
    ),
    "maps in one pickle": (
        put("maps/toy_0000.npy", ""),
        ("evaluate.py", "--seeds", "maps", *WHERE),
        "toy_0000.npy is not read",
    ),
    # records
    **{
        f"classifier.json {name}": (
            put("out/classifier.json", content),
            stage("cams"),
            "out/classifier.json is (damaged or none of ours: move it away|no UTF-8)",
        )
        for name, content in {
            "empty": "",
            "text": "hello",
            "list": "[]",
            "foreign": '{"id": "7"}',
            "binary": bytes(range(256)),
            "UTF-16": "{}".encode("utf-16"),
            "of odd inputs": '{"id": "7", "done": true, "seconds": 1, "settings": {}, "inputs": {"foo": "1"}}',
            "of itself": '{"id": "7", "done": true, "seconds": 1, "settings": {}, "inputs": {"classifier": "8"}}',
            "settings a list": '{"id": "7", "done": true, "seconds": 1, "settings": [], "inputs": {}}',
        }.items()
    },
    "classifier.json foreign, scored": (
        put("out/classifier.json", '{"id": "7", "done": true, "seconds": 1, "settings": {}, "inputs": {}}'),
        stage("evaluate"),
        "out/classifier.json is damaged or none of ours: move it away",
    ),
    "cams.json cut": (cut("out/cams.json"), stage("labels"), "out/cams.json is damaged or none of ours: move it away"),
    "part.json text": (
        put("out/classifier.part.json", "hello"),
        (*stage("train"), "--lr", 2),
        "classifier.part.json is damaged",
    ),
    "record, only --out": (
        put("out/classifier.json", "[1]"),
        ("bnr.py", "cams", "--out", "out"),
        "classifier.json is damaged",
    ),
    "toy.json text": (
        put("data/toy.json", "hello"),
        ("prepare.py", "toy", "--root", "data"),
        "data/toy.json is damaged",
    ),
    "toy of another size": (
        NOTHING,
        ("prepare.py", "toy", "--root", "data"),
        "data holds a drawing of --seed 0 --train 4",
    ),
    "toy over other things": (NOTHING, ("prepare.py", "toy", "--root", "out"), "out holds something else"),
    **{
        f"results.json {name}, {command}": (
            all_of(put("out/results.json", text), put("out/rows/noise-x1-seed0/results.json", text)),
            ("report.py", command, *WHERE),
            "results.json is damaged or none of ours: move it away",
        )
        for name, text in {"text": "hello", "list": "[]", "foreign": "{}", "rows a number": '{"rows": 3}'}.items()
        for command in ("tables", "page")
    },
    # stages that are not there
    **{
        f"no {needs}": (NOTHING, (*STAGES[name], *NEW), f'(no|nothing) .*in new.*: run "make {target}"')
        for name, needs, target in (
            ("cams", "classifier", "train"),
            ("labels", "seeds", "cams"),
            ("affinity", "affinity labels", "psa"),
            ("segmenter", "pseudo labels", "psa"),
            ("predict", "segmenter", "seg"),
            ("evaluate", "thing to score", "train"),
        )
    },
    # weight files
    **{
        f"{kind} as classifier": (
            weights(kind),
            ("bnr.py", "cams", "--weights", "w.pth", *NEW),
            "w.pth.*: a TransCAM|w.pth",
        )
        for kind in WEIGHTS
    },
    **{
        f"{kind} as Conformer": (weights(kind), (*train, "--pretrained", "w.pth"), "w.pth")
        for kind in ("absent", "text", "list", "numbers", "nested", "cut", "fifo", "folder")
    },
    **{
        f"{kind} as ResNet-38": (
            without("affinity", weights(kind)),
            (*stage("affinity"), "--no-from-scratch", "--resnet38", "w.pth"),
            "w.pth",
        )
        for kind in ("absent", "text", "list", "numbers", "pickle")
    },
    "text as .params": (
        without("affinity", put("w.params", "hello")),
        (*stage("affinity"), "--no-from-scratch", "--resnet38", "w.params"),
        "w.params cannot be read as MXNet weights",
    ),
    **{
        f"no file of {flag}": (
            NOTHING,
            (*stage(name), "--fresh", "--no-from-scratch" if name != "cams" else "--plain", flag, "w.pth", *more),
            f"no file w.pth, named by {flag}: {fits}",
        )
        for name, flag, fits, *more in (
            ("train", "--pretrained", "Conformer_tiny_patch16.pth fits", "--arch", "tiny"),
            ("cams", "--weights", "a TransCAM classifier on Conformer-nano fits"),
            ("affinity", "--resnet38", "ilsvrc-cls_rna-a1_cls1000_ep-0001.params, or PSA's or SEAM's .pth, fits"),
            ("segmenter", "--backbone-weights", "torchvision's resnet50 or resnet101 on ImageNet"),
        )
    },
    "no weights": (NOTHING, (*train, "--no-from-scratch"), "no weights: CONFORMER=FILE"),
    "NaN in classifier": (
        without("cams", spoilt("out/classifier.pth", nan)),
        stage("cams"),
        "classifier.pth: .* not finite",
    ),
    "NaN in segmenter": (
        without("predict", spoilt("out/segmenter.pth", nan)),
        stage("predict"),
        "segmenter.pth: .* not finite",
    ),
    "classifier cut": (
        without("cams", cut("out/classifier.pth")),
        stage("cams"),
        'classifier.pth is damaged.*: run "make train"',
    ),
    "AffinityNet missing": (
        without("walk", lambda: Path("out/affinitynet.pth").unlink()),
        stage("walk"),
        'no weight file out/affinitynet.pth: run "make psa"',
    ),
    "another classifier": (
        without("cams", swap("out/classifier.pth", "out/segmenter.pth")),
        stage("cams"),
        "classifier.pth is not what classifier.json beside it tells of: delete it",
    ),
    "another AffinityNet": (
        without("walk", swap("out/affinitynet.pth", "out/segmenter.pth")),
        stage("walk"),
        "affinitynet.pth is not what affinitynet.json beside it tells of",
    ),
    "another segmenter": (
        without("predict", spoilt("out/segmenter.pth", lambda saved: saved.clear())),
        stage("predict"),
        "segmenter.pth is not what segmenter.json beside it tells of",
    ),
    # places to write to
    "out is a file": (put("new", ""), train, "new"),
    "out is below a file": (
        put("file", ""),
        (*STAGES["train"], "--data", "data", "--out", "file/out", *SMALL),
        "file/out",
    ),
    "export to a file": (put("file", ""), ("bnr.py", "export", "--to", "file", *WHERE), "cannot write file/"),
    "batch too large": (NOTHING, (*train, "--batch-size", 99), "4 training images are fewer than --batch-size 99"),
    "cuda that is not there": (
        NOTHING,
        (*train, "--device", "cuda:99"),
        "--device cuda:99: .*no usable GPU",
    ),
}


@pytest.mark.parametrize("what", ROWS)
def test_bad_files_are_named_in_one_line_and_nothing_is_lost(here, what):
    spoil, command, says = ROWS[what]
    spoil()
    assert re.search(says, refused(1, *command))


@pytest.mark.parametrize("name, folder", [("affinity", "affinity_labels"), ("segmenter", "pseudo_labels")])
def test_labels_of_another_size_end_a_training_before_it_begins(here, name, folder):
    without(name)()
    for n in (3, 2):
        picture(f"out/{folder}/toy_000{n}.png", (9, 9))()
    line = refused(1, *stage(name))
    assert re.search(f"{folder}/toy_0002.png is 9x9, its photo .*, the first of 2 .*: delete them and run", line)
    assert not list(Path("out").glob(f"{MAKES[name]}*"))


def test_without_a_list_train_the_photos_of_train_aug_are_segmented_to_be_shown(here):
    without("predict")()
    Path(f"{LISTS}/train.txt").unlink()
    run(*STAGES["predict"], *WHERE, "--split", "train")
    assert {path.stem for path in Path("out/segmentation").iterdir()} == {f"toy_000{n}" for n in range(4)}


def test_a_classifier_of_other_classes_is_refused(here):
    without("cams")()
    names = Path("data/classes.txt").read_text().split()
    Path("data/classes.txt").write_text("\n".join(names[::-1]))
    assert f"the classifier knows {' '.join(names)}, data has {' '.join(names[::-1])}" in refused(1, *stage("cams"))


CLASSIFIER, CAMS, AFFINITY, SEGMENTER = (
    ("bnr.py", "train"),
    ("bnr.py", "cams"),
    ("psa.py", "train"),
    ("segment.py", "train"),
)
FLAGS = [
    *[
        (*CLASSIFIER, *flags)
        for flags in (
            ("--epochs", -1),
            ("--epochs", "nan"),
            ("--epochs", 1.5),
            ("--batch-size", 0),
            ("--crop", 0),
            ("--crop", 100),
            ("--crop", 1000000),
            ("--batch-size", 1000000),
            ("--long-side", 96, 1000000),
            ("--lr", 0),
            ("--lr", "nan"),
            ("--lr", "inf"),
            ("--weight-decay", -1),
            ("--seed", -1),
            ("--seed", 2**32),
            ("--workers", -1),
            ("--workers", 1000000),
            ("--long-side", 96, 64),
            ("--long-side", 0, 64),
            ("--noise", "loud"),
            ("--noise", 0),
            ("--micro-batch", -1),
            ("--sharpness", -1),
            ("--sharpness", "nan"),
            ("--preset", "mine"),
            ("--arch", "huge"),
            ("--loss", "mse"),
            ("--device", "mps"),
            ("--device", "cpu:x"),
            ("--unknown",),
        )
    ],
    *[(*CAMS, "--scales", value) for value in (0, -1, "nan", "inf", "x", 1000000)],
    (*CAMS, "--batch-size", 0),
    *[
        (*AFFINITY, *flags)
        for flags in (
            ("--width", 0),
            ("--width", 1000000),
            ("--crop", 1000000),
            ("--dropout", 1.5),
            ("--dropout", -1),
            ("--momentum", 2),
            ("--epochs", -1),
            ("--lr", -1),
            ("--crop", 100),
        )
    ],
    *[
        ("psa.py", "labels", *flags)
        for flags in (
            ("--foreground", 1.1),
            ("--background", -0.1),
            ("--foreground", "nan"),
            ("--foreground", 0.2, "--background", 0.3),
        )
    ],
    *[
        ("psa.py", "walk", *flags)
        for flags in (("--background-score", 2), ("--beta", 0), ("--log-steps", -1), ("--log-steps", 99))
    ],
    *[
        (*SEGMENTER, *flags)
        for flags in (
            ("--iterations", -1),
            ("--scale-range", 1.5, 0.5),
            ("--scale-range", 0, 1),
            ("--scale-range", 1, 1000000),
            ("--batch-size", -3),
            ("--lr", "inf"),
        )
    ],
    ("segment.py", "predict", "--first", 0),
    ("segment.py", "predict", "--scales", 0),
    ("segment.py", "predict", "--scales", 1000000),
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(map(str, flags)))
def test_a_wrong_flag_is_one_line_and_status_2(here, flags):
    line = refused(
        2,
        *flags,
        *(
            ("--data", "data", "--out", "out")
            if "--preset" in flags or "--device" in flags or "--workers" in flags
            else WHERE
        ),
    )
    assert flags[2] in line


def test_no_command_is_one_line_and_status_2(here):
    refused(2, "bnr.py")
    refused(2, "bnr.py", "fly")


def test_a_byte_order_mark_is_read(here):
    for path in (f"{LISTS}/train_aug.txt", "data/labels.txt", "data/classes.txt"):
        Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    assert "done already" in run(*stage("train"))


def test_links_may_lead_anywhere_and_loops_end(here):
    shutil.move("data/JPEGImages", "elsewhere")
    Path("data/JPEGImages").symlink_to(here / "elsewhere")
    Path("elsewhere/loop").symlink_to(here / "elsewhere")
    os.mkfifo("elsewhere/pipe.jpg")
    Path("elsewhere/zero.jpg").symlink_to("/dev/zero")
    assert "6 photos" in run("prepare.py", "check", "--data", "data")
    assert "done already" in run(*stage("train"))
    assert "6 photos" in run("segment.py", "predict", "elsewhere", *WHERE, "--scales", 0.5, "--no-crf")


@contextlib.contextmanager
def mounted(folder, *options):
    """A file system of its own in memory; the test is skipped where that is not allowed."""
    Path(folder).mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder, *options], capture_output=True).returncode:
        pytest.skip("only root can mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", [name for name in STAGES if name != "evaluate"])
def test_a_disk_that_fills_up_is_one_line(here, name):
    without(name)()
    before = contents("out")
    with mounted("small", "-o", f"size={sum(map(len, before.values())) + 150_000}"):
        shutil.copytree("out", "small/out")
        Path("small/fill").write_bytes(bytes(1))
        with contextlib.suppress(OSError), open("small/fill", "wb", buffering=0) as file:
            for _ in range(10000):
                file.write(bytes(4096))
        where = ("--data", "data", "--out", "small/out", *SMALL)
        line = run(*STAGES[name], *where, status=1).strip().splitlines()[-1]
        assert re.match("error: .*small/out.*No space left on device: make room", line)
        assert {
            f"out/{path}": Path("small/out", path).read_bytes()
            for path in (path.removeprefix("out/") for path in before)
        } == before
        Path("small/fill").unlink()
        assert not list(Path("small").rglob(".*.tmp"))


@pytest.mark.parametrize("name", STAGES)
def test_a_folder_that_cannot_be_written_is_one_line(here, name):
    if name in MAKES:
        without(name)()
    with mounted("fixed"):
        shutil.copytree("out", "fixed/out")
        subprocess.run(["mount", "-o", "remount,ro", "fixed"], check=True)
        where = ("--data", "data", "--out", "fixed/out", *SMALL)
        line = run(*STAGES[name], *where, status=1).strip().splitlines()[-1]
        assert re.match("error: .*fixed/out.*Read-only file system: make room there, or take another", line)


def test_a_process_prints_one_line_on_stderr(here):
    said = run_process("bnr.py", "train", "--data", "absent", *SMALL, status=1)
    assert said.splitlines()[-1].startswith("error: absent is no data set") and "Traceback" not in said
    said = run_process("bnr.py", "train", "--epochs", -1, status=2)
    says = "-1 is no whole number of at least 0"
    assert said == f"error: argument --epochs: {says} (bnr.py train --help lists the flags)\n"


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError])
def test_a_bug_keeps_its_traceback(here, monkeypatch, error):
    import bnr

    def augment(*args):
        raise error

    monkeypatch.setattr(bnr, "augment", augment)
    with pytest.raises(error):
        run(*train)
