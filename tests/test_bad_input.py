"""What a user can get wrong: one line that names file and remedy, status 1 (2 for a wrong flag), nothing lost."""
import contextlib
import gc
import os
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run, run_process
from PIL import Image
from small_run import EXPORT, NEW, SMALL, STAGES, WHERE, contents, refused, stage

LISTS, PHOTO = "data/ImageSets/Segmentation", "data/JPEGImages/toy_0000.jpg"
MASK = "data/SegmentationClass/toy_0000.png"


def later(do):
    """A function whose call gives what does it, when that is called in its turn."""
    return lambda *given: lambda: do(*given)


@later
def put(path, content=""):
    """Write text or bytes there, whatever it was."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).unlink(missing_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


gone, swap = later(os.unlink), later(shutil.copy)
add = later(lambda path, line: put(path, Path(path).read_text() + line + "\n")())
encoded = later(lambda path, encoding: put(path, ("# caf\u00e9\n" + Path(path).read_text()).encode(encoding))())
cut = later(lambda path: put(path, Path(path).read_bytes()[:Path(path).stat().st_size // 2])())
picture = later(lambda path, size, mode="L", value=0, form="PNG": Image.new(mode, size, value).save(path, form))
all_of = later(lambda *actions: [action() for action in actions])
without = later(lambda name, *others: (shutil.rmtree(Path("out", name)), all_of(*others)()))  # to be made again


@later
def link(path, to):
    Path(path).unlink(missing_ok=True)
    Path(path).symlink_to(to)


@later
def fifo(path):
    Path(path).unlink(missing_ok=True)
    os.mkfifo(path)


@later
def xml(text):
    """Image labels from Annotations instead of labels.txt, one of which is this."""
    gone("data/labels.txt")()
    for n in range(6):
        put(f"data/Annotations/toy_{n:04d}.xml", "<a><object><name>cat</name></object></a>" if n else text)()


@later
def npz(change, path="out/cams/toy_0000.npz"):
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)


class Thing:
    """What no weight file should hold."""


def saved(value):
    return lambda path: torch.save(value, path)


WEIGHTS = {  # what w.pth is: (what makes it, what the line says of it)
    "absent": (lambda path: None, "no "), "folder": (os.mkdir, ""), "fifo": (os.mkfifo, ""),
    "empty": (lambda path: path.touch(), "is damaged"), "text": (lambda path: path.write_text("hello"), "is damaged"),
    "object": (saved({"model": Thing()}), r"holds more than tensors \(test_bad_input.Thing\)"),
    "list": (saved([torch.zeros(3)]), "holds a list, not named tensors"), "tensor": (saved(torch.zeros(3)), "a Tensor"),
    "numbers": (saved({1: 2, "trans_cls_head.weight": 3}), "does not fit"),
    "nested": (saved({"model": {"model": [1]}, "network": 3}), "does not fit")}


@later
def nan(name):
    """A weight file of ours with a value that is not a number."""
    content = torch.load(f"out/{name}/model.pth", weights_only=True)
    next(value for value in content["model"].values() if value.is_floating_point()).view(-1)[0] = torch.nan
    torch.save(content, f"out/{name}/model.pth")


NOTHING = all_of()
train = (*STAGES["classifier"], *NEW)
on_masks = (*STAGES["segmenter"], *NEW, "--labels", "data/SegmentationClass")
predict = ("segment", "predict")
NO_UTF8 = "is not UTF-8 text: save it as UTF-8"

ROWS = {  # what is wrong: (what makes it so, the command, what the line says)
    # lists, labels, classes
    **{f"{path} in {code}": (encoded(f"{LISTS}/{path}.txt" if path == "train_aug" else f"data/{path}.txt", code), train,
                             f"{path}.txt {NO_UTF8}")
       for path in ("train_aug", "labels", "classes") for code in ("latin-1", "utf-16", "utf-16-le")},
    "empty list": (put(f"{LISTS}/train_aug.txt", "\n \n"), train, "train_aug.txt is empty: one image id"),
    "no list": (gone(f"{LISTS}/train_aug.txt"), train, "has no train_aug.txt: one image id a line"),
    **{f"list is {what}": (spoil, train, "has no train_aug.txt") for what, spoil in (
        ("a fifo", fifo(f"{LISTS}/train_aug.txt")), ("a loop", link(f"{LISTS}/train_aug.txt", "train_aug.txt")))},
    "id twice": (add(f"{LISTS}/train_aug.txt", "toy_0000"), train, "line 5 .* names toy_0000 a second time"),
    "id .. in labels": (add("data/labels.txt", "../evil cat"), train, "../evil"),
    **{f"id {name}": (add(f"{LISTS}/train_aug.txt", name), train, f"train_aug.txt, line 5 .* has the id '{name}',")
       for name in ("../../evil", "/JPEGImages/a/../../b.jpg", "/etc/passwd")},
    "id not there": (add(f"{LISTS}/train_aug.txt", "absent"), train, "lacks 1 of 5 photos, first absent"),
    "labels twice": (add("data/labels.txt", "toy_0000 unicorn"), train, "line 7 .* names toy_0000 a second time"),
    "unknown label": (put("data/labels.txt", "toy_0000 unicorn"), train, "the label 'unicorn' of toy_0000"),
    "no label": (put("data/labels.txt", "toy_0001 cat"), train, "no labels of toy_0000: not in data/labels.txt"),
    "class twice": (add("data/classes.txt", "cat"), train, "data names 6 classes: 1 to 254 are needed, each once"),
    "class of two words": (add("data/classes.txt", "traffic light"), train, "'traffic light' has a space: write traf"),
    "class ..": (put("data/classes.txt", "cat\n../../evil"), train, "data has the class '../../evil', which"),
    "no data": (NOTHING, ("bnr", "train", "--data", "absent", *SMALL), "absent is not a data set"),
    "data is a file": (NOTHING, ("bnr", "train", "--data", PHOTO, *SMALL), "is not a data set"),
    "object without a name": (xml("<a><object/></a>"), train, "the label '' of toy_0000 is not in classes.txt"),
    # photos
    **{f"photo {what}": (spoil(PHOTO), train, f"cannot read {PHOTO}.*{says}") for what, spoil, says in (
        ("cut", cut, "truncated"), ("empty", put, ""), ("text", lambda path: put(path, "hello"), ""))},
    **{f"photo {what}": (spoil, train, "JPEGImages lacks 1 of 6 photos, first toy_0000.jpg: .*labels.txt, line 1")
       for what, spoil in (("a fifo", fifo(PHOTO)), ("a loop", link(PHOTO, "toy_0000.jpg")),
                           ("a device", link(PHOTO, "/dev/zero")))},
    "fifo to predict": (fifo("pipe.jpg"), (*predict, "pipe.jpg", *WHERE), "pipe.jpg is neither a photo nor a folder"),
    "nothing to predict": (put("mine/a.txt"), (*predict, "mine", *WHERE), "no photos in mine: of .jpg"),
    "ids .. to predict": (NOTHING, (*predict, "--ids", "../evil", *WHERE), "--ids has the id '../evil'"),
    "a photo of floats": (picture(PHOTO, (9, 9), "F", 0, "TIFF"), train, f"cannot read {PHOTO}: its pixels are floats"),
    "photo named as an overlay": (all_of(put("two/a.jpg"), put("two/a_overlay.jpg")), (*predict, "two", *WHERE),
                                  "a_overlay.png would be a mask and the overlay of a: rename a_overlay"),
    "two photos of an id": (all_of(put("two/a.jpg", "1"), put("two/a.png", "2")), (*predict, "two", *WHERE),
                            "two photos have the id a"),
    # masks, labels
    **{f"mask {what}": (spoil(MASK), on_masks, says) for what, spoil, says in (
        ("of another size", lambda path: picture(path, (9, 9)), "toy_0000.png is 9x9, its photo"),
        ("cut", cut, f"cannot read {MASK}"), ("empty", put, f"cannot read {MASK}"))},
    "mask missing": (gone(MASK), on_masks, "SegmentationClass lacks 1 of 4 labels, first toy_0000"),
    **{f"mask {what}": (lambda how=how: picture(MASK, Image.open(PHOTO).size, *how)(), on_masks, f"toy_0000.png {says}")
       for what, says, *how in (("of value 77", "has value 77, but there are 6", "L", 77),
                                ("of colours", "has colours that are not of PASCAL", "RGB", (1, 2, 3)),
                                ("of 16 bits", "is .*index PNG", "I;16", 999),
                                ("of floats", "is .*index PNG", "F", 0, "TIFF"))},
    **{f"{folder} {what}": (without(name, spoil(f"out/{folder}/toy_0000.png")), stage(name), says)
       for name, folder in (("affinitynet", "affinity_labels"), ("segmenter", "pseudo_labels"))
       for what, spoil, says in (
           ("of another size", lambda path: picture(path, (9, 9)), f"{folder}/toy_0000.png is 9x9, its photo "),
           ("empty", put, f"cannot read out/{folder}/toy_0000.png"),
           ("missing", gone, f'{folder} lacks 1 of 4 .*labels, first toy_0000.png: run "make psa"'))},
    # seeds
    **{f"seeds {what}, {name}": (without(name, spoil), stage(name), says)
       for name in ("affinity_labels", "pseudo_labels") for what, spoil, says in (
           ("cut", cut("out/cams/toy_0000.npz"), 'toy_0000.npz is damaged .*: delete it and run "make cams"'),
           ("empty", put("out/cams/toy_0000.npz"), "toy_0000.npz is damaged"),
           ("missing", gone("out/cams/toy_0000.npz"), 'lacks 1 of 4 seeds, first toy_0000.npz: run "make cams"'),
           ("NaN", npz(lambda a: a["refined_0"].fill(np.nan)), "toy_0000.npz is damaged"),
           ("of a size too large", npz(lambda a: a.update(size=np.array([10 ** 7] * 2))), "toy_0000.npz is damaged"),
           ("without classes", npz(lambda a: a.update(classes=np.array([], int))), "toy_0000.npz is damaged"),
           ("pickled", npz(lambda a: a.update(classes=np.array([Thing()]))), "toy_0000.npz is damaged"),
           ("of a photo that grew", picture(PHOTO, (300, 300), "RGB", 0, "JPEG"),
            'toy_0000.npz is of a photo of another size: delete it and run "make cams"'))},
    # records, folders that are somebody else's
    **{f"record {what}": (put("out/classifier/record.json", content), stage("cams"),
                          "classifier/record.json is (damaged or not one of ours: move it away|not UTF-8)")
       for what, content in (("empty", ""), ("text", "hello"), ("list", "[]"), ("foreign", '{"id": "7"}'),
                             ("binary", bytes(range(256))), ("UTF-16", "{}".encode("utf-16")))},
    "record of a part": (put("out/cams.part/record.json", "hello"), stage("cams"), "cams.part/record.json is damaged"),
    "an older version": (all_of(without("cams"), put("out/cams.json", "{}")), stage("cams"),
                         r"out was made by an older version \(cams.json\): take another OUT="),
    **{f"{name} {what}": (all_of(without(name.removesuffix(".part")), spoil(f"out/{name}")),
                          (*stage(name.removesuffix(".part")), *flags), says)
       for name in ("classifier", "cams", "cams.part") for flags in ((), ("--fresh",)) for what, spoil, says in (
           (f"somebody's {flags}", lambda path: put(f"{path}/a.jpg"), "is not a result of ours, it has no record.json"),
           (f"a file {flags}", put, "is not a result of ours"),
           (f"a link {flags}", lambda path: all_of(lambda: os.mkdir("there"), link(path, "../there")), "is a link"))},
    "photos in a folder cams": (all_of(put("data/cams/a.jpg"), lambda: shutil.move("out/classifier", "data")),
                                ("bnr", "cams", "--data", "data", "--out", "data", *SMALL),
                                "data/cams is not a result of ours"),
    # stages that are not there
    **{f"no {what}": (NOTHING, (*command, *NEW), f'no {what} in new/.*: run "make {target}"')
       for command, what, target in (
           (STAGES["cams"], "classifier", "train"), (STAGES["affinity_labels"], "seeds", "cams"),
           (STAGES["affinitynet"], "affinity labels", "psa"), (STAGES["segmenter"], "pseudo labels", "psa"),
           (STAGES["segmentation"], "segmenter", "seg"))},
    "nothing to export": (NOTHING, ("bnr", "export", "--to", "x", *NEW), 'no seeds in new/cams: run "make cams"'),
    # weight files
    **{f"{kind} as {fits}": (later(make)(Path("w.pth")), (*command, "w.pth"), f"{says}.*: {fits}")
       for kind, (make, says) in WEIGHTS.items() for fits, command in (
           ("a TransCAM classifier on Conformer-nano fits", ("bnr", "cams", *NEW, "--weights")),
           ("Conformer_tiny_patch16.pth fits", (*train, "--no-from-scratch", "--arch", "tiny", "--pretrained")),
           ("ilsvrc-cls_rna-a1_cls1000_ep-0001.params, or PSA's or SEAM's .pth, fits",
            (*stage("affinitynet"), "--fresh", "--no-from-scratch", "--resnet38")),
           ("torchvision's resnet50 on ImageNet fits",
            (*stage("affinitynet"), "--fresh", "--no-from-scratch", "--backbone", "resnet50", "--backbone-weights")))},
    "text as .params": (without("affinitynet", put("w.params", "hello")),
                        (*stage("affinitynet"), "--no-from-scratch", "--resnet38", "w.params"),
                        "w.params cannot be read as MXNet weights"),
    "no weights": (NOTHING, (*train, "--no-from-scratch"), "no weights: CONFORMER=FILE"),
    "no weights for the segmenter": (NOTHING, (*on_masks, "--no-from-scratch"), "no weights: RESNET38=FILE"),
    **{f"{name} with NaN": (without(reader, nan(name)), stage(reader), "model.pth: .* not finite")
       for name, reader in (("classifier", "cams"), ("affinitynet", "pseudo_labels"), ("segmenter", "segmentation"))},
    "classifier cut": (without("cams", cut("out/classifier/model.pth")), stage("cams"),
                       'classifier/model.pth is damaged.*: run "make train"'),
    "AffinityNet missing": (without("pseudo_labels", gone("out/affinitynet/model.pth")), stage("pseudo_labels"),
                            'no weight file out/affinitynet/model.pth: run "make psa"'),
    **{f"another {name}": (without(reader, swap(f"out/{other}/model.pth", f"out/{name}/model.pth")), stage(reader),
                           f"{name}/model.pth does not belong to the record beside it: delete it")
       for name, other, reader in (("classifier", "segmenter", "cams"), ("affinitynet", "segmenter", "pseudo_labels"),
                                   ("segmenter", "classifier", "segmentation"))},
    # places to write to, sizes, devices
    "out is a file": (put("new"), train, "new"),
    "out is below a file": (put("new"), (*train, "--out", "new/out"), "new/out"),
    "export again": (put("maps/a/cat.npy"), (*EXPORT, *WHERE), "maps is not empty: remove it, or take another --to"),
    "export to a file": (put("file"), ("bnr", "export", "--to", "file", *WHERE),
                         "file/toy_0000: Not a directory: take another folder"),
    "batch too large": (NOTHING, (*train, "--batch-size", 99), "only 4 training images: lower --batch-size 99"),
    **{f"one value for BatchNorm, {flags}": (NOTHING, (*train, "--crop", 16, *flags), "BatchNorm")
       for flags in (("--batch-size", 1), ("--batch-size", 3, "--micro-batch", 2))},
    "cuda that is not there": (NOTHING, (*train, "--device", "cuda:99"), "--device cuda:99: torch .* cannot use it"),
}


@pytest.mark.parametrize("what", ROWS)
def test_bad_files_are_named_in_one_line_and_nothing_is_lost(here, what):
    spoil, command, says = ROWS[what]
    spoil()
    assert re.search(says, refused(1, *command))


FLAGS = {  # command: wrong flags
    ("bnr", "train"): (
        ("--epochs", -1), ("--epochs", "nan"), ("--epochs", 1.5), ("--batch-size", 0), ("--crop", 100),
        ("--crop", 1000000), ("--lr", 0), ("--lr", "nan"), ("--lr", "inf"), ("--weight-decay", -1), ("--seed", 2 ** 32),
        ("--workers", -1), ("--long-side", 96, 64), ("--long-side", 0, 64), ("--noise", "loud"), ("--noise", 0),
        ("--micro-batch", -1), ("--sharpness", "nan"), ("--preset", "mine"), ("--arch", "huge"), ("--loss", "mse"),
        ("--device", "mps"), ("--device", "cpu:x"), ("--from-scratch", "--pretrained", PHOTO), ("--unknown",)),
    ("bnr", "cams"): (("--scales", 0), ("--scales", "nan"), ("--scales", "x"), ("--batch-size", 0)),
    ("psa", "train"): (("--width", 0), ("--crop", 100), ("--crop", 16), ("--dropout", 1.5), ("--momentum", 2)),
    ("psa", "labels"): (("--foreground", 1.1), ("--background", -0.1), ("--foreground", 0.1, "--background", 0.3)),
    ("psa", "walk"): (("--background-score", 2), ("--beta", 0), ("--log-steps", -1), ("--log-steps", 11)),
    ("segment", "train"): (("--scale-range", 1.5, 0.5), ("--scale-range", 0, 1),
                              ("--from-scratch", "--batch-size", 2, "--resnet38", PHOTO, "--fresh")),
    ("segment", "predict"): (("--first", 0), ("--scales", 0)),
    ("bnr",): (("fly",),)}


@pytest.mark.parametrize("command, flags", [(command, flags) for command in FLAGS for flags in FLAGS[command]])
def test_a_wrong_flag_is_one_line_and_status_2(here, command, flags):
    where = {"--preset": WHERE[:4], "--device": WHERE[:4], "--workers": WHERE[:4], "fly": ()}
    assert str(flags[0]) in refused(2, *command, *flags, *where.get(flags[0], WHERE))


@pytest.mark.parametrize("command", [
    ("segment", "predict", PHOTO), ("bnr", "export", "--to", "maps"), ("bnr", "cams")])
def test_an_out_without_data_is_refused(here, command):
    assert "--out without --data would read the toy set: add --data" in refused(2, *command, "--out", "out")


def test_links_may_lead_anywhere_and_loops_end(here):
    shutil.move("data/JPEGImages", "elsewhere")
    Path("data/JPEGImages").symlink_to(here / "elsewhere")
    Path("elsewhere/loop").symlink_to(here / "elsewhere")
    fifo("elsewhere/pipe.jpg")()
    link("elsewhere/zero.jpg", "/dev/zero")()
    assert "done already" in run(*stage("classifier"))
    assert "6 photos" in run(*predict, "elsewhere", *WHERE, "--scales", 0.5, "--no-crf")


def test_what_systems_leave_in_folders_changes_nothing(here):
    folders = [path for path in Path().rglob("*") if path.is_dir()]
    for folder in folders:
        for name in (".DS_Store", "Thumbs.db", "._toy_0000.npz", "._a.jpg"):
            (folder / name).write_bytes(b"x")
    for name in STAGES:
        assert "done already" in run(*stage(name))
    run("bnr", "export", "--to", "maps", *WHERE)
    assert {path.name for path in Path("maps").iterdir()} == {f"toy_{n:04d}" for n in range(4)}
    labels = ("--labels", "data/SegmentationClass")
    run(*STAGES["segmenter"], *NEW, *labels)
    put("data/SegmentationClass/.DS_Store", "another")()
    assert "done already" in run(*STAGES["segmenter"], *NEW, *labels)
    assert "6 photos" in run(*predict, "data/JPEGImages", *WHERE, "--scales", 0.5, "--no-crf")
    for name in ("segmentation", "classifier"):  # and what remains where a result is deleted
        for path in Path("out", name).iterdir():
            path.unlink() if path.name[0] not in ".T" else None
        run(*stage(name), "--fresh")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 3, "state_dict": state}])
def test_weights_are_read_from_what_people_save_them_in(here, prefix, wrap):
    state = torch.load("out/classifier/model.pth", weights_only=True)["model"]
    torch.save(wrap({f"{prefix}{name}": tensor for name, tensor in state.items()}), "w.pth")
    run(*STAGES["cams"], "--crop", 64, *NEW, "--weights", "w.pth")
    for n in range(4):
        assert Path(f"new/cams/toy_000{n}.npz").read_bytes() == Path(f"out/cams/toy_000{n}.npz").read_bytes()


@contextlib.contextmanager
def largest_file(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_is_full_is_one_line(here, name):
    sizes = [path.stat().st_size for path in Path("out", name).iterdir() if path.suffix in (".pth", ".npz", ".png")]
    without(name)()
    before = contents("out")
    with largest_file(min(sizes) - 1):
        line = run(*stage(name), status=1).strip().splitlines()[-1]
    assert re.search(f"^error: cannot write out/{name}.part/.*: File too large: make room there, or take another", line)
    assert {path: content for path, content in contents("out").items() if ".part/" not in path} == before
    assert not list(Path("out").rglob("*.wsss"))
    gc.collect()  # lets go of the folder, as the end of a process does
    run(*stage(name))


@contextlib.contextmanager
def as_nobody():
    """Root may read and write everything: become somebody who may not, for a while."""
    user = os.geteuid()
    os.setresuid(user or 65534, user or 65534, user)
    try:
        yield
    finally:
        os.setresuid(user, user, user)


@pytest.mark.parametrize("path, mode, command, says", [
    (PHOTO, 0, train, f"cannot read {PHOTO}: .*Permission denied"),
    (f"{LISTS}/train_aug.txt", 0, train, "cannot read .*train_aug.txt: Permission denied"),
    ("out/classifier/record.json", 0, stage("cams"), "cannot read out/classifier/record.json: Permission denied"),
    ("out/classifier/model.pth", 0, (*stage("cams"), "--fresh"), "model.pth: Permission denied: allow it"),
    ("out/cams", 0o555, (*stage("cams"), "--fresh"), "out/cams cannot be replaced: allow writing there"),
    ("out", 0o555, (*stage("cams"), "--fresh"), "out/cams cannot be replaced: allow writing there"),
    (".", 0o555, train, "new.*: Permission denied: allow it, or take another folder")])
def test_what_is_not_allowed_is_said(here, path, mode, command, says):
    for entry in [here, *here.rglob("*")]:
        entry.chmod(0o777 if entry.is_dir() else 0o666)
    Path(path).chmod(mode)
    with as_nobody():
        said = run(*command, status=1)
    assert re.search(f"^error: .*{says}", said, re.M) and "Traceback" not in said and "make room" not in said


def test_a_process_prints_one_line_on_stderr(here):
    said = run_process("bnr", "train", "--epochs", -1, status=2)
    assert said.startswith("error: argument --epochs: -1 is not a whole number of at least 0") and said.count("\n") == 1


def test_a_bug_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr("bnr.augment", lambda *given: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run(*train)
