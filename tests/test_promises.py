"""A run knows what it is: no flag loses a result, nothing stale is shown as fresh, nothing damaged taken as done."""

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
from conftest import ROOT, run, run_process
from small_run import MAKES, SMALL, STAGES, WHERE, contents, finished, here, refused, stage  # noqa: F401 (fixtures)
from stage import Stage

import engine
import kills

OTHER = {  # a flag of each stage, and what the refusal says of it
    "train": ("--lr", 2e-3, "lr 0.001 -> 0.002"),
    "cams": ("--scales", 1, r"scales \[0.5\] -> \[1.0\]"),
    "labels": ("--foreground", 0.6, "foreground 0.5 -> 0.6"),
    "affinity": ("--dropout", 0.5, "dropout 0.0 -> 0.5"),
    "walk": ("--beta", 8, "beta 14 -> 8.0"),
    "segmenter": ("--iterations", 1, "iterations 2 -> 1"),
    "predict": ("--no-crf", "crf True -> False"),
}
TRAININGS = ("train", "affinity", "segmenter")


def results(name, out="out"):
    """What a stage made, less its id: tensors of a network, bytes of files."""
    path = Path(out, f"{MAKES[name]}.pth")
    return torch.load(path, weights_only=True)["model"] if path.is_file() else contents(Path(out, MAKES[name]))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As each process of torchrun has; sums in another order are other bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(one, other):
    if any(isinstance(value, torch.Tensor) for value in one.values()):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return [Path(path).name for path in one] == [Path(path).name for path in other] and list(one.values()) == list(
        other.values()
    )


def record(name, out="out"):
    return json.loads(Path(out, f"{MAKES[name]}.json").read_text())


def rows():
    run(*stage("evaluate"))
    return {row["stage"]: row for row in json.loads(Path("out/results.json").read_text())["rows"]}


def interrupt(monkeypatch, module, function, call):
    """Ctrl-C at the n-th call of a function."""
    plain, calls = getattr(module, function), []

    def stop(*args, **flags):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(*args, **flags)

    monkeypatch.setattr(module, function, stop)


# ---------------------------------------------------------------- a flag destroys nothing


@pytest.mark.parametrize("name", OTHER)
def test_other_settings_are_refused_with_the_differences(here, name):
    *flags, says = OTHER[name]
    line = refused(1, *stage(name), *flags)
    assert re.search(f"out .finished.: made with other settings: {says}: take another OUT=.*FRESH=1", line)


@pytest.mark.parametrize("name", MAKES)
def test_another_seed_is_refused_for_a_training_alone(here, name):
    if name in TRAININGS:
        assert "seed 0 -> 1" in refused(1, *stage(name), "--seed", 1)
    else:
        assert "done already" in run(*stage(name), "--seed", 1)


@pytest.mark.parametrize("name", MAKES)
def test_a_fresh_one_replaces_the_old_only_when_it_is_complete(here, monkeypatch, name):
    flags, before = OTHER[name][:-1], contents("out")
    interrupt(monkeypatch, *((engine, "_log", 1) if name in TRAININGS else (Stage, "finish", 1)))
    with pytest.raises(KeyboardInterrupt):
        run(*stage(name), *flags, "--fresh")
    assert {path: contents("out").get(path) for path in before if "log.jsonl" not in path} == {
        path: content for path, content in before.items() if "log.jsonl" not in path
    }
    assert "done already" in run(*stage(name))  # the old one is the result still
    monkeypatch.undo()
    monkeypatch.chdir(here)
    run(*stage(name), *flags, "--fresh")
    assert not [path for path in contents("out") if ".part" in path or ".old" in path or ".tmp" in path]
    assert "done already" in run(*stage(name), *flags)
    assert refused(1, *stage(name))  # that is another one now


def test_a_result_whose_renaming_was_stopped_is_not_trained_on_by_fresh(here, monkeypatch):
    flags, replace = (*stage("train"), "--lr", 2e-3, "--fresh"), os.replace

    def stop(source, target):
        if Path(target).name == "classifier.json":
            raise KeyboardInterrupt
        replace(source, target)

    for module, function, wrong in ((os, "replace", stop), (engine, "_log", None)):
        if wrong:
            monkeypatch.setattr(module, function, wrong)
        else:
            interrupt(monkeypatch, module, function, 1)
        with pytest.raises(KeyboardInterrupt):
            run(*flags)
        monkeypatch.undo()
        monkeypatch.chdir(here)
    assert record("train")["done"] and record("train")["settings"]["lr"] == 2e-3
    assert not json.loads(Path("out/classifier.part.json").read_text())["done"]


def test_more_epochs_go_on_as_if_never_stopped(here):
    old = record("train")["id"]
    said = run(*stage("train"), "--epochs", 3)
    assert "4/12" in said.replace(" ", "") and record("train")["id"] != old  # images that are done already
    run(*STAGES["train"], "--epochs", 3, "--data", "data", "--out", "new", *SMALL)
    assert same(results("train"), results("train", "new"))
    assert list(record("train")["watched"]) == list(record("train", "new")["watched"]) == ["0", "2", "4", "6"]
    assert "epochs 3 -> 2" in refused(1, *stage("train"), "--epochs", 2)
    assert "made anew, as the classifier changed" in run(*stage("cams"))


def test_more_epochs_than_an_unfinished_run_was_to_have(here, monkeypatch):
    flags = (*STAGES["train"], "--data", "data", "--out", "new", *SMALL)
    interrupt(monkeypatch, engine, "_log", 2)
    monkeypatch.setattr(engine, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--epochs", 2)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert "epochs 2 -> 1" in refused(1, *flags)
    run(*flags, "--epochs", 3)
    run(*stage("train"), "--epochs", 3)
    assert same(results("train"), results("train", "new"))


def test_a_data_set_is_known_by_its_lists_and_labels_not_by_its_path(here):
    shutil.move("data", "moved")
    for name in MAKES:
        assert "done already" in run(*STAGES[name], "--data", "moved", "--out", "out", *SMALL)
    Path("out/classifier.json").write_text(json.dumps({**record("train"), "data": str(here / "data")}))
    says = f"error: {here}/data is no data set: .*; the run in out was made from this folder: --data names its new"
    for name in ("train", "evaluate"):
        assert re.match(says, refused(1, *STAGES[name], "--out", "out", *SMALL))
    assert "--data names" not in refused(1, *stage("cams"))
    labels = Path("moved/labels.txt").read_text()
    Path("moved/labels.txt").write_text(
        labels.replace("\n", " cat\n", 1) if " cat" not in labels.split("\n")[0] else labels.replace(" cat", "", 1)
    )
    Path("data").symlink_to("moved")
    for name in ("train", "cams", "walk"):
        assert "the data set has other lists or labels" in refused(1, *stage(name))


def test_a_weight_file_is_known_by_its_bytes_not_by_its_name(here):
    state = torch.load("out/classifier.pth", weights_only=True)["model"]
    torch.save(state, "a.pth")
    flags = (*STAGES["train"], "--data", "data", "--out", "new", *SMALL)
    run(*flags, "--pretrained", "a.pth")
    shutil.move("a.pth", "b.pth")
    assert "done already" in run(*flags, "--pretrained", "b.pth")
    torch.save({name: value * 2 for name, value in state.items()}, "c.pth")
    assert "pretrained " in refused(1, *flags, "--pretrained", "c.pth")


def test_a_flag_that_an_older_record_lacks_counts_as_its_default(here):
    old = record("train")
    for flag in ("lr", "loss", "data_set"):
        del old["settings"][flag]
    Path("out/classifier.json").write_text(json.dumps(old))
    assert "done already" in run(*stage("train"))
    assert "loss bnr -> transcam" in refused(1, *stage("train"), "--loss", "transcam")
    for name, flag in (("labels", "foreground"), ("walk", "background_score"), ("predict", "crf")):
        old = record(name)
        del old["settings"][flag]
        Path(f"out/{MAKES[name]}.json").write_text(json.dumps(old))
        assert MAKES[name].replace("_", " ").replace("segmentation", "segmenter") in rows()


@pytest.mark.parametrize("name", TRAININGS)
def test_a_loss_that_is_not_finite_overwrites_nothing(here, name):
    line = refused(1, *stage(name), "--lr", 1e30, "--epochs" if name != "segmenter" else "--iterations", 6, "--fresh")
    assert re.search(
        r"is (nan at step \d of \d+|not finite after step \d), photos toy_\d+ toy_\d+: try a lower --lr", line
    )
    assert "done already" in run(*stage(name))


# ---------------------------------------------------------------- stale is not shown as fresh


def test_what_hangs_on_an_earlier_input_is_marked_refused_and_made_anew(here):
    assert not any("stale" in row for row in rows().values())
    run(*stage("train"), "--lr", 2e-3, "--fresh")
    for command in ("page", "show", "sheets"):
        said = run("report.py", command, *WHERE)
        assert "note: segmenter in out: older than the classifier: make seg" in said
    assert "older than the classifier: make seg" in Path("out/report.html").read_text()
    assert "note: seeds in out: older than the classifier" in run("bnr.py", "export", *WHERE, "--to", "maps")
    scored = Path("out/results.json").read_text()
    found = rows()
    for row, target in (
        ("refined seeds", "cams"),
        ("affinity labels", "psa"),
        ("pseudo labels", "psa"),
        ("segmenter", "seg"),
    ):
        assert found[row]["stale"] == f"older than the classifier: make {target}"
    assert ': older than the classifier: run "make cams" first' in refused(1, *stage("labels"))
    for name, source in (
        ("cams", "classifier"),
        ("labels", "seeds"),
        ("affinity", "affinity labels"),
        ("walk", "seeds and the AffinityNet"),
        ("segmenter", "pseudo labels"),
        ("predict", "segmenter"),
    ):
        assert f"made anew, as the {source} changed" in run(*stage(name))
    Path("out/results.json").write_text(scored)
    run("report.py", "page", *WHERE)
    assert "scored before the segmentation was made anew: make eval" in Path("out/report.html").read_text()
    assert not any("stale" in row for row in rows().values())
    run("report.py", "page", *WHERE)
    assert not re.search("scored before|older than the", Path("out/report.html").read_text())


def test_an_unfinished_stage_whose_input_changed_begins_anew(here, monkeypatch):
    interrupt(monkeypatch, Stage, "finish", 1)
    with pytest.raises(KeyboardInterrupt):
        run(*stage("labels"), "--foreground", 0.6, "--fresh")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    run(*stage("cams"), "--scales", 1, "--fresh")
    run(*stage("labels"), "--foreground", 0.6, "--fresh")
    run(*STAGES["labels"], "--foreground", 0.6, "--fresh", *WHERE)
    assert len(results("labels")) == 4
    anew = results("labels")
    run(*stage("labels"), "--foreground", 0.6, "--fresh")
    assert same(results("labels"), anew)


# ---------------------------------------------------------------- what is there is looked at


@pytest.mark.parametrize("damage", ["deleted", "cut", "empty"])
@pytest.mark.parametrize("name", MAKES)
def test_what_is_deleted_or_damaged_is_made_again_and_nothing_else(here, name, damage):
    before, times = results(name), {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}
    path = Path("out", f"{MAKES[name]}.pth")
    path = path if path.is_file() else sorted(Path("out", MAKES[name]).iterdir())[0]
    path.unlink() if damage == "deleted" else path.write_bytes(path.read_bytes()[:-5] if damage == "cut" else b"")
    assert "damaged" in run(*stage(name))
    assert same(results(name), before)
    record_of = Path("out", f"{MAKES[name]}.json")
    changed = {p for p in times if p.stat().st_mtime_ns != times[p]}
    assert changed <= {path, record_of, Path("out/log.jsonl")}


def test_seeds_made_again_alone_are_the_same_bytes(here, monkeypatch):
    """A short batch would sum in another order: it is filled up."""
    import bnr

    plain, sizes = bnr.multi_scale, []
    monkeypatch.setattr(bnr, "multi_scale", lambda *args: sizes.append(len(args[1][0])) or plain(*args))
    run(*stage("cams"), "--scales", 0.5, 1, 2, "--eigen", "--batch-size", 3, "--fresh")  # of 4 photos
    before = results("cams")
    for path in sorted(Path("out/cams").iterdir())[::2]:
        path.unlink()
        assert "damaged" in run(*stage("cams"), "--scales", 0.5, 1, 2, "--eigen", "--batch-size", 3)
    assert sizes == [3] * 4 and same(results("cams"), before)


def test_a_part_of_the_list_is_not_the_whole(here):
    shutil.rmtree("out/segmentation"), Path("out/segmentation.json").unlink()
    run(*stage("predict"), "--first", 1)
    row = rows()["segmenter"]
    assert row["n"] == 1 and row["missing"].startswith("1 of 2 segmentation are missing, first toy_0005: make seg")
    run(*stage("predict"))
    assert "missing" not in rows()["segmenter"]
    shutil.rmtree("out/cams"), Path("out/cams.json").unlink()
    run(*stage("cams"), "--split", "val")
    assert "refined seeds" not in [name for name, row in rows().items() if "miou" in row]
    shutil.rmtree("out/affinity_labels"), Path("out/affinity_labels.json").unlink()
    assert 'cams lacks 4 of 4 seeds, first toy_0000.npz: run "make cams"' in refused(1, *stage("labels"))
    run(*stage("cams"))
    assert {path.stem for path in Path("out/cams").iterdir()} == {f"toy_{n:04d}" for n in range(6)}


def test_a_part_made_anew_does_not_replace_the_whole(here):
    says = "--fresh with --first, --ids or --split would lose 1 other files of out/segmentation: leave them out"
    assert says in refused(1, *stage("predict"), "--first", 1, "--fresh")
    assert "would lose 4 other files of out/cams" in refused(1, *stage("cams"), "--split", "val", "--fresh")
    assert "done already" in run(*stage("predict"))
    run(*stage("train"), "--lr", 2e-3, "--fresh")
    run(*stage("cams"), "--split", "val", "--fresh")  # the others are of an earlier classifier
    assert len(list(Path("out/cams").iterdir())) == 2


def test_check_names_what_would_break_a_stage(here):
    def problems():
        return run("prepare.py", "check", "--data", "data", status=1)

    assert "no problems" in run("prepare.py", "check", "--data", "data")
    for path, content, says in (
        ("ImageSets/Segmentation/val.txt", "", "problem: .*val.txt is empty"),
        ("labels.txt", "toy_0000 cat\ntoy_0000 cow\n", "problem: .*labels.txt names toy_0000 twice, with other"),
        (
            "labels.txt",
            "\n".join(f"toy_{n:04d}" for n in range(6)),
            "problem: 4 of 4 photos in train_aug have no label",
        ),
        ("labels.txt", "toy_0000 cat", "problem: no image labels of toy_0001"),
        ("JPEGImages/toy_0001.jpg", "", "problem: cannot read .*toy_0001.jpg"),
        ("SegmentationClass/toy_0001.png", None, "problem: .*lacks 1 of 4 masks of train, first toy_0001.png"),
        ("ImageSets/Segmentation/train.txt", "toy_0000\ntoy_0000\n", "problem: .*train.txt names 1 ids twice"),
    ):
        path = Path("data", path)
        old = path.read_bytes()
        path.unlink() if content is None else path.write_text(content)
        assert re.search(says, problems())
        path.write_bytes(old)


@pytest.mark.parametrize("command", [stage("cams"), stage("evaluate"), ("report.py", "sheets", *WHERE)])
def test_temporary_files_of_dead_processes_are_swept_away(here, command):
    dead, alive = Path("out/.a.png.4194305.tmp"), Path(f"out/.b.png.{os.getppid()}.tmp")
    dead.touch(), alive.touch()
    run(*command)
    assert alive.exists() and not dead.exists()


# ---------------------------------------------------------------- several processes, workers, signals, kills


def test_two_processes_train_and_export_as_one_does(here):
    """By gloo on the CPU: 5 steps of each training, and the exports from one process's weights."""
    five = {
        "train": ("--epochs", 5, "--batch-size", 4),
        "affinity": ("--epochs", 5, "--batch-size", 4),
        "segmenter": ("--iterations", 5, "--batch-size", 4),
    }
    commands = [
        [*map(str, (*STAGES[name], *five[name], "--data", "data", "--out", f"two_{name}", *SMALL))] for name in five
    ]
    for name in five:
        shutil.copytree("out", f"two_{name}"), shutil.copytree("out", f"one_{name}")
        for path in [*Path(f"two_{name}").glob(f"{MAKES[name]}.*"), *Path(f"one_{name}").glob(f"{MAKES[name]}.*")]:
            path.unlink()
        run(*STAGES[name], *five[name], "--data", "data", "--out", f"one_{name}", *SMALL, "--micro-batch", 2)
    exports = ("cams", "labels", "walk", "predict")
    shutil.copytree("out", "two")
    for name in exports:
        shutil.rmtree(f"two/{MAKES[name]}")
        commands.append([*map(str, (*STAGES[name], "--data", "data", "--out", "two", *SMALL))])
    Path("all.py").write_text(f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
first = dist.init_process_group
dist.init_process_group = lambda backend, timeout: dist.is_initialized() or first(backend, timeout=timeout)
dist.destroy_process_group = lambda: None  # one group for all commands, which saves the imports
import bnr
precision = bnr.average_precision
bnr.average_precision = lambda *args, **how: print(f"mAP by process {{dist.get_rank()}}") or precision(*args, **how)
for script, *flags in {commands!r}:
    sys.argv = [script, *flags]
    importlib.import_module(script[:-3]).main()
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "all.py"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mAP by process 0" in done.stdout and "mAP by process 1" not in done.stdout
    assert record("train", "two_train")["map"] is not None
    for name in five:
        one, two = results(name, f"one_{name}"), results(name, f"two_{name}")
        for key in one:
            if "running" not in key and "num_batches" not in key:
                torch.testing.assert_close(
                    two[key], one[key], rtol=0, atol=1e-5, msg=lambda text: f"{name} {key}: {text}"
                )
    for name in exports:
        assert same(results(name), results(name, "two"))


@pytest.mark.parametrize("number, after", [(signal.SIGINT, 0.3), (signal.SIGTERM, 1.0), (signal.SIGINT, "step 0:")])
def test_ctrl_c_is_one_line_that_says_how_to_go_on(here, number, after):
    command = [*STAGES["train"], "--data", "data", "--out", "new", *SMALL, "--epochs", 999]
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / command[0], *map(str, command[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    if isinstance(after, str):
        while after not in said:
            said += process.stdout.readline()
    else:
        time.sleep(after)
    process.send_signal(number)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, said
    assert said.count("stopped: the same command goes on from here") == 1
    assert "Traceback" not in said and "Error" not in said


def test_ctrl_c_wins_over_the_error_that_torch_makes_of_a_stopped_worker():
    code = """
import signal, stage, subprocess, time
def torchs(number, frame):
    raise RuntimeError("DataLoader worker exited unexpectedly")
signal.signal(signal.SIGCHLD, torchs)
worker = subprocess.Popen(["sleep", "60"])
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    worker.kill()
    time.sleep(0.5)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert "Error" not in process.communicate(timeout=60)[1] and process.returncode == 130


def test_workers_give_the_same_bytes_and_end_with_a_parent_that_is_killed(here):
    flags = ("--data", "data", "--out", "out", *SMALL[:-1], 2)
    command = [sys.executable, ROOT / "psa.py", *map(str, (*STAGES["labels"][1:], *flags))]
    one = results("labels")
    shutil.rmtree("out/affinity_labels"), Path("out/affinity_labels.json").unlink()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(kills.living(process.pid)) < 4:  # itself, two workers, one that tidies up
        time.sleep(0.05)
    assert process.poll() is None
    process.kill()
    process.wait()
    end = time.time() + 15
    while (left := kills.living(process.pid)) and time.time() < end:
        time.sleep(0.1)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left
    run_process("psa.py", *STAGES["labels"][1:], *flags)
    assert same(results("labels"), one)


def test_a_few_kills_lose_nothing():
    """The short form of tests/kills.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/kills.py", "--trials", "1", "--stages", "drawing", "train", "cams"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r" 1 trials .* 0 failures", done.stdout)) == 3
