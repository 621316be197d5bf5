"""A run knows what it is: no flag loses a result, nothing stale is taken as fresh, nothing damaged as done."""
import contextlib
import fcntl
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PATH, ROOT, run, run_process
from PIL import Image
from small_run import EXPORT, NEW, SMALL, STAGES, TRAININGS, WHERE, contents, record, refused, results, stage, stopped
from wsss import stage as stages
from wsss import training
from wsss.data import DataSet
from wsss.toy import TOY_CLASSES

sys.path.insert(0, str(ROOT / "tests" / "scripts"))
import kills  # noqa: E402, found by the line above

OTHER = {  # a flag of each stage, and what the refusal says of it
    "classifier": ("--lr", 2e-3, "lr 0.001 -> 0.002"), "cams": ("--scales", 1, r"scales \[0.5\] -> \[1.0\]"),
    "affinity_labels": ("--foreground", 0.55, r"foreground 0.\d+ -> 0.55"),
    "affinitynet": ("--dropout", 0.5, "dropout 0.0 -> 0.5"), "pseudo_labels": ("--beta", 8, "beta 14.0 -> 8.0"),
    "segmenter": ("--iterations", 1, "iterations 2 -> 1"), "segmentation": ("--no-crf", "crf True -> False")}
LIST = "data/ImageSets/Segmentation/{}.txt"


def temporary(folder="out"):
    return [path for path in Path(folder).rglob("*") if re.search(r"\.part|\.earlier|\.wsss", str(path))]


def start(*command, **more):
    """A process of its own, which takes Ctrl-C also where a shell started the tests in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([sys.executable, "-u", "-m", command[0], *map(str, command[1:])], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=PATH, **more)


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_refused_with_the_differences(here, name):
    *flags, says = OTHER[name]
    line = refused(1, *stage(name), *flags)
    assert re.search(f"out/{name} was made with other settings: {says}: take another OUT=.*FRESH=1", line)
    if name in TRAININGS:
        assert "seed 0 -> 1" in refused(1, *stage(name), "--seed", 1)
    else:
        assert "done already" in run(*stage(name), "--seed", 1)


@pytest.mark.parametrize("name", STAGES)
def test_a_fresh_one_replaces_the_old_only_when_it_is_complete(here, monkeypatch, name):
    flags, before = OTHER[name][:-1], contents("out")
    with stopped(monkeypatch, stages.Stage, "finish"):
        run(*stage(name), *flags, "--fresh", status=130)
    assert {path: contents("out").get(path) for path in before} == before
    assert "done already" in run(*stage(name))  # the old one is the result still
    run(*stage(name), *flags, "--fresh")
    assert not temporary() and "done already" in run(*stage(name), *flags)
    assert refused(1, *stage(name))  # that is another one now


def test_fresh_starts_over_where_an_interrupted_run_would_go_on(here, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    flags = (*STAGES["classifier"], *NEW, "--epochs", 2)
    with stopped(monkeypatch, training, "train_step", 4):
        run(*flags, status=130)
    unfinished = json.loads(Path("new/classifier.part/record.json").read_text())["id"]
    assert Path("new/classifier.part/checkpoint.pth").is_file()
    said = run(*flags, "--fresh")
    assert "0/8" in said and record("classifier", "new")["id"] != unfinished
    with stopped(monkeypatch, training, "train_step", 4):
        run(*flags, "--fresh", status=130)
    assert "6/8" in run(*flags) and "done already" in run(*flags)
    steps = [json.loads(line)["step"] for line in Path("new/classifier/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4] and not Path("new/classifier/checkpoint.pth").exists()


@pytest.mark.parametrize("name, call", [("classifier", 1), ("cams", 1), ("cams", 2), ("cams", 3), ("segmenter", 2)])
def test_a_stop_between_the_renames_is_settled_by_the_stage_itself(here, monkeypatch, name, call):
    """The old result goes into the new one, the new one takes its place, the old one is deleted."""
    flags, plain, count = OTHER[name][:-1], os.replace, []

    def stop(source, target=None):
        count.append(1) if Path(source).is_dir() else None
        if len(count) == call:
            raise KeyboardInterrupt
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        if call == 3:
            patch.setattr(shutil, "rmtree", stop)
        run(*stage(name), *flags, "--fresh", status=130)
    gc.collect()
    left = contents("out")
    with contextlib.suppress(AssertionError):  # where there is nothing to read for the moment
        run(*EXPORT, *WHERE)
    assert contents("out") == left and not Path("maps/.earlier").exists()  # a reader changes nothing
    assert "done already" in run(*stage(name), *flags) and not temporary()


@pytest.mark.parametrize("name, flags, lost, target", [
    ("segmentation", ("--first", 1), 1, "seg"), ("segmentation", ("--ids", "toy_0004"), 1, "seg"),
    ("cams", ("--split", "val"), 4, "cams")])
def test_a_part_made_again_does_not_replace_the_whole(here, monkeypatch, name, flags, lost, target):
    says = f'{lost} files of out/{name} would be lost: run "make {target}" first, and this without --fresh'
    assert says in refused(1, *stage(name), *flags, "--fresh")
    assert "done already" in run(*stage(name))
    if name == "segmentation":  # nor where it is made again as its input changed, from nothing or from a part
        run(*stage("segmenter"), "--fresh")
        assert says in refused(1, *stage(name), *flags)
        with stopped(monkeypatch, stages.Stage, "finish"):
            run(*stage(name), status=130)
        assert says in refused(1, *stage(name), *flags)


def test_a_part_of_the_list_is_not_the_whole(here):
    shutil.rmtree("out/segmentation")
    run(*stage("segmentation"), "--ids", "toy_0004.jpg")
    assert list(results("segmentation")) == ["toy_0004.png"]
    run(*stage("segmentation"))
    assert len(results("segmentation")) == 2
    shutil.rmtree("out/cams"), shutil.rmtree("out/affinity_labels")
    run(*stage("cams"), "--split", "val")
    assert 'lacks 4 of 4 seeds, first toy_0000.npz: run "make cams"' in refused(1, *stage("affinity_labels"))
    run(*stage("cams"))
    assert set(results("cams")) == {f"toy_{n:04d}.npz" for n in range(6)}


def test_a_data_set_is_known_by_its_lists_and_labels_not_by_its_path(here):
    shutil.move("data", "moved")
    moved = ("--data", "moved", "--out", "out", *SMALL)
    assert all("done already" in run(*STAGES[name], *moved) for name in STAGES)
    shutil.move("moved", "data")
    old = record("classifier")
    Path(LIST.format("val")).write_text("toy_0004\n")  # the score stays with the list that it was measured on
    assert "done already" in run(*stage("classifier"))
    assert record("classifier") == old and old["map_n"] == 2 and old["map_of"] != DataSet("data").digest_of("val")


@pytest.mark.parametrize("changed", [  # one class more in the middle, one less, other labels, another list
    {"data/classes.txt": " ".join([TOY_CLASSES[0], "zebra", *TOY_CLASSES[1:]])},
    {"data/classes.txt": "cat", "data/labels.txt": "cat"}, {"data/labels.txt": "cat rabbit"},
    {LIST.format("train_aug"): "toy_0000 toy_0001"}])
def test_other_classes_lists_or_labels_than_a_stage_was_made_from_are_refused(here, changed):
    for path, words in changed.items():
        lines = [f"toy_{n:04d} {words}" for n in range(6)] if "labels" in path else words.split()
        Path(path).write_text("\n".join(lines))
    assert "the data set has other lists or labels" in refused(1, *stage("classifier"))
    for name in ("cams", "affinity_labels", "affinitynet", "pseudo_labels", "segmenter", "segmentation"):
        assert "was made from other lists, labels or classes: take another OUT=" in refused(1, *stage(name))
    assert "was made from other lists, labels or classes" in refused(1, *EXPORT, *WHERE)


@pytest.mark.parametrize("command", [*list(STAGES.values())[1:], EXPORT,
                                     ("segment", "predict", "data/JPEGImages")])
def test_another_preset_is_refused(here, command):
    line = refused(1, *command, *WHERE, "--preset", "small", "--no-amp")
    assert "is of another preset: add PRESET=toy (--preset)" in line


def test_a_weight_file_is_known_by_its_bytes_not_by_its_name(here):
    state = torch.load("out/classifier/model.pth", weights_only=True)["model"]
    torch.save(state, "a.pth")
    flags = (*STAGES["classifier"], *NEW, "--no-from-scratch")
    run(*flags, "--pretrained", "a.pth")
    shutil.move("a.pth", "b.pth")
    assert "done already" in run(*flags, "--pretrained", "b.pth")
    torch.save({name: value * 2 for name, value in state.items()}, "b.pth")
    assert "pretrained " in refused(1, *flags, "--pretrained", "b.pth")


@pytest.mark.parametrize("name", TRAININGS)
def test_a_loss_that_is_not_finite_overwrites_nothing(here, name):
    steps = "--iterations" if name == "segmenter" else "--epochs"
    line = refused(1, *stage(name), "--lr", 1e30, steps, 6, "--fresh")
    assert re.search(r"(is (nan|inf) at step \d+|not finite after step \d+): try a lower --lr", line)
    assert "done already" in run(*stage(name))


def test_what_hangs_on_an_earlier_input_is_refused_and_made_again(here, monkeypatch):
    with stopped(monkeypatch, stages.Stage, "finish"):
        run(*stage("cams"), "--fresh", status=130)
    run(*stage("classifier"), "--lr", 2e-3, "--fresh")
    assert "seeds in out: older than the classifier: make cams" in refused(1, *stage("affinity_labels"))
    assert "note: the seeds in out: older than the classifier: make cams" in run(*EXPORT, *WHERE)
    assert "note: the segmenter in out: older than the" in run("segment", "predict", "data/JPEGImages", *WHERE)
    assert "segmenter in out: older than the classifier: make cams" in refused(1, *stage("segmentation"))
    for name, source in (("cams", "classifier"), ("affinity_labels", "seeds"), ("affinitynet", "affinity labels"),
                         ("pseudo_labels", "seeds and the AffinityNet"), ("segmenter", "pseudo labels"),
                         ("segmentation", "segmenter")):
        assert run(*stage(name)).count(f"made again, as the {source} changed") == 1
        assert "done already" in run(*stage(name)) and not temporary()


@pytest.mark.parametrize("damage", ["deleted", "cut"])
@pytest.mark.parametrize("name", STAGES)
def test_what_is_deleted_or_damaged_is_made_again_and_nothing_else(here, name, damage):
    before, times = results(name), {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*")}
    ending = ".pth" if name in TRAININGS else ".npz" if name == "cams" else ".png"
    path = sorted(Path("out", name).glob(f"*{ending}"))[0]
    path.unlink() if damage == "deleted" else path.write_bytes(path.read_bytes()[:-5])
    assert "damaged" in run(*stage(name)) and results(name) == before and not temporary()
    changed = {p for p in times if p.stat().st_mtime_ns != times[p]}
    assert changed <= {path, path.with_name("record.json"), path.with_name("log.jsonl")}


def test_only_the_stage_itself_sweeps_its_folder(here):
    litter = Path("out/cams/.a.npz.77.wsss")
    kept = [Path("out/.draft.2024.tmp"), Path("out/cams.old/a.npz"), Path("out/notes/.b.wsss")]
    for path in (litter, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    shutil.rmtree("out/affinity_labels")
    run(*stage("affinity_labels")), run(*EXPORT, *WHERE)
    assert litter.exists()
    Path("out/cams/toy_0000.npz").unlink()
    run(*stage("cams"))
    assert not litter.exists() and all(path.exists() for path in kept)


def test_a_changed_photo_is_named_with_what_mends_it(here):
    Image.new("RGB", (90, 70)).save("data/JPEGImages/toy_0000.jpg")
    for name in ("affinity_labels", "pseudo_labels"):
        assert 'toy_0000.npz is of a photo of another size: delete it and run "make cams"' in refused(
            1, *stage(name), "--fresh")
        shutil.rmtree(f"out/{name}.part")  # which would be gone on with
    Path("out/cams/toy_0000.npz").unlink()
    run(*stage("cams"))
    assert "pseudo labels in out: older than the seeds: make psa" in refused(1, *stage("segmenter"))
    for name in ("affinity_labels", "pseudo_labels"):  # the files of that photo alone
        others = {path: content for path, content in results(name).items() if "0000" not in path}
        run(*stage(name))
        assert Image.open(f"out/{name}/toy_0000.png").size == (90, 70) and others.items() <= results(name).items()
        assert "done already" in run(*stage(name))


@pytest.mark.parametrize("name", STAGES)
def test_a_second_process_in_one_folder_is_refused(here, name):
    with open(f"out/.{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flags in ((), ("--fresh",)):
            says = f"another process is at work in out/{name}.part: wait for it, or take another OUT="
            assert says in refused(1, *stage(name), *flags)
    run(*stage(name))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_process_that_is_stopped_leaves_no_lock_and_says_how_to_go_on(here, number, status):
    command = (*STAGES["classifier"], *NEW, "--epochs", 999)
    process = start(*command)
    while "step 2:" not in process.stdout.readline():
        assert process.poll() is None
    assert "another process is at work in new/classifier.part: wait for it" in run(*command, "--fresh", status=1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == status and "Traceback" not in said and "Error" not in said
    assert said.endswith(", goes on from here\n") == (number == signal.SIGINT)
    run(*STAGES["classifier"], *NEW, "--fresh")


@pytest.mark.parametrize("name", TRAININGS)
def test_a_stopped_training_goes_on_to_the_same_bytes(here, monkeypatch, name):
    steps = ("--iterations", 6) if name == "segmenter" else ("--epochs", 3)
    run(*stage(name), *steps, "--fresh")
    whole = results(name)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    monkeypatch.setattr(training, "LOG_STEPS", 1)
    shutil.rmtree(f"out/{name}")
    with stopped(monkeypatch, training, "train_step", 4):
        said = run(*stage(name), *steps, status=130)
    assert said.endswith("\nstopped: the same command, without --fresh (FRESH=1), goes on from here\n")
    assert "6/12" in run(*stage(name), *steps)
    assert results(name) == whole and not temporary()


def test_workers_give_the_same_bytes_and_end_with_a_parent_that_is_killed(here):
    flags, one = ("--data", "data", "--out", "out", *SMALL[:-1], 2), results("affinity_labels")
    shutil.rmtree("out/affinity_labels")
    process = start("psa", "labels", *flags, start_new_session=True)
    while len(kills.living(process.pid)) < 4:  # itself, two workers, one that tidies up
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while (left := kills.living(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left
    run("psa", "labels", *flags)
    assert results("affinity_labels") == one


def test_two_processes_train_as_one_does(here):
    """By gloo on the CPU: 5 steps of each training; the first process scores and writes, other stages refuse two."""
    commands = [("psa", "labels", *WHERE)]
    for name in TRAININGS:
        five = ("--iterations" if name == "segmenter" else "--epochs", 5, "--batch-size", 4)
        for out in (f"one_{name}", f"two_{name}"):
            shutil.copytree("out", out)
            shutil.rmtree(f"{out}/{name}")
        run(*STAGES[name], *five, "--data", "data", "--out", f"one_{name}", *SMALL, "--micro-batch", 2)
        commands.append((*STAGES[name], *five, "--data", "data", "--out", f"two_{name}", *SMALL))
    Path("all.py").write_text(f"""
import importlib, sys
import torch.distributed as dist
first = dist.init_process_group
dist.init_process_group = lambda backend, timeout: dist.is_initialized() or first(backend, timeout=timeout)
dist.destroy_process_group = lambda: None  # one group for all commands, which saves the imports
for script, *flags in {[[*map(str, command)] for command in commands]!r}:
    sys.argv = [script, *flags]
    try:
        importlib.import_module(script).main()
    except SystemExit as stop:
        assert script == "psa" and stop.code == 2
""")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = subprocess.run([sys.executable, *torchrun, "all.py"], capture_output=True, text=True, env=PATH)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("error: psa labels runs in one process: torchrun is for the trainings") == 2
    assert done.stdout.count("map_n") == 5 and record("classifier", "two_classifier")["map_n"] == 2
    for name in TRAININGS:
        one, two = (torch.load(f"{n}_{name}/{name}/model.pth", weights_only=True)["model"] for n in ("one", "two"))
        for key in one:
            if "running" not in key and "num_batches" not in key:
                torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5, msg=lambda text: f"{key}: {text}")


def test_a_few_kills_lose_nothing():
    said = run_process("tests.scripts.kills", "--trials", 1, "--stages", "drawing", "train")
    assert len(re.findall(r" [1-9] kills .* 0 failures", said)) == 2
