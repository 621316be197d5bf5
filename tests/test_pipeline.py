"""The five scripts through their own command lines on a small toy set, and the errors that they promise."""
import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, run, run_process
from PIL import Image

import bnr
import data
import psa
from conformer import Conformer

SMALL = ("--preset", "toy", "--device", "cpu", "--workers", 0)
CLASSIFIER = ("--epochs", 2, "--crop", 64, "--long-side", 64, 96, "--batch-size", 8)
AFFINITY = ("--epochs", 1, "--width", 2, "--crop", 64, "--batch-size", 8)
SEGMENTER = ("--iterations", 4, "--width", 2, "--crop", 64, "--batch-size", 8)


@pytest.fixture(scope="module")
def done(toy, tmp_path_factory):
    """All stages, trained and exported with the masks out of reach; then scored. -> data, out, what was printed"""
    out, hidden = tmp_path_factory.mktemp("out"), toy / "hidden"
    (toy / "SegmentationClass").rename(hidden)
    where, said = ("--data", toy, "--out", out, *SMALL), {}
    said["train"] = run_process("bnr.py", "train", *where, *CLASSIFIER)
    said["cams"] = run_process("bnr.py", "cams", *where)
    said["labels"] = run_process("psa.py", "labels", "--preset", "toy", "--data", toy, "--out", out, "--device", "cpu", "--workers", 2)
    said["affinity"] = run_process("psa.py", "train", *where, *AFFINITY)
    said["walk"] = run_process("psa.py", "walk", *where)
    said["segmenter"] = run_process("segment.py", "train", *where, *SEGMENTER)
    said["predict"] = run_process("segment.py", "predict", *where)
    said["unscored"] = run("data.py", "eval", *where)
    hidden.rename(toy / "SegmentationClass")
    said["eval"] = run_process("data.py", "eval", *where)
    return toy, out, said


def test_device_is_the_first_thing_printed(done):
    assert all(text.startswith("device: cpu") for text in done[2].values())


def test_every_stage_writes_what_the_next_reads(done):
    toy, out, _ = done
    train, val = data.DataSet(toy).ids("train_aug"), data.DataSet(toy).ids("val")
    for folder, ids, suffix in (("cams", train, ".npz"), ("affinity_labels", train, ".png"), ("pseudo_labels", train, ".png"),
                                ("segmentation", val, ".png")):
        assert {p.name for p in (out / folder).iterdir()} == {id + suffix for id in ids}
    for id in train:
        own = {1 + data.TOY_CLASSES.index(name) for name in data.DataSet(toy)._names(id)}
        size = data.read_image(toy / "JPEGImages" / f"{id}.jpg").size[::-1]
        label, seeds = data.read_mask(out / "pseudo_labels" / f"{id}.png"), data.read_seeds(out / "cams" / f"{id}.npz")
        assert label.shape == size == seeds[1].shape[1:]
        assert set(np.unique(label)) <= {0} | own == {0} | set(seeds[0].tolist())
        assert seeds[1].min() >= 0 and seeds[1].max() <= 1


def test_table_has_a_row_a_stage_and_the_json_the_same_numbers(done):
    toy, out, said = done
    results = json.loads((out / "results.json").read_text())
    stages = ["classifier", "random seeds", "background", "plain CAM", "refined seeds", "affinity labels", "pseudo labels", "segmenter"]
    assert [row["stage"] for row in results["rows"]] == stages
    for row in results["rows"][1:]:
        assert f"{row['miou']:.2f}" in said["eval"] and len(row["iou"]) == 6
        assert row["miou"] == pytest.approx(100 * np.nanmean(row["iou"]))
        assert row["n"] == (8 if row["split"] == "val" else 24)
    assert "0.50/0.15" in said["eval"] and "bg 0.30" in said["eval"] and "looking at the masks" in said["eval"]
    assert "% of pixels that are labelled" in said["eval"]


def test_floor_of_background_everywhere_is_its_share_of_the_masks(done):
    toy, out, _ = done
    dataset = data.DataSet(toy)
    masks = np.concatenate([data.read_mask(dataset.mask(id)).ravel() for id in dataset.ids("train")])
    row = next(r for r in json.loads((out / "results.json").read_text())["rows"] if r["stage"] == "background")
    assert row["iou"] == pytest.approx([(masks == 0).sum() / (masks != data.VOID).sum(), 0, 0, 0, 0, 0])


def test_figures_are_logged_before_and_after_each_epoch(done):
    _, out, said = done
    logged = json.loads((out / "classifier.json").read_text())["watched"]
    assert list(logged) == ["0", "3", "6"]
    for found in logged.values():
        assert np.shape(found["entropy"]) == (4,) and 0 < np.min(found["entropy"]) and np.max(found["entropy"]) <= 1
        assert f"entropy {np.mean(found['entropy']):.3f}, own_rows {found['own_rows']:.3f}" in said["train"]
        assert found["refined"] is None  # the masks were out of reach
    row = json.loads((out / "results.json").read_text())["rows"][0]
    assert row["entropy"] == pytest.approx(np.mean(found["entropy"]))


def test_an_untrained_classifier_and_one_list_can_be_exported(toy, tmp_path):
    flags = ("--data", toy, "--out", tmp_path, *SMALL)
    run("bnr.py", "train", *flags, *CLASSIFIER, "--epochs", 0)
    run("bnr.py", "cams", *flags, "--split", "val")
    assert {p.stem for p in (tmp_path / "cams").iterdir()} == set(data.DataSet(toy).ids("val"))


def test_a_compiled_export_goes_on_with_the_same_run(done, tmp_path, monkeypatch):
    toy, out, _ = done
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    lost, passes = next((tmp_path / "cams").iterdir()), []
    lost.unlink()
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: lambda images: (passes.append(len(images)), forward(images))[1])
    run("bnr.py", "cams", "--data", toy, "--out", tmp_path, *SMALL, "--compile")
    assert passes == [2, 2, 2]  # the photo that was lost and its mirror image, at three scales
    assert np.abs(data.read_seeds(lost)[1] - data.read_seeds(out / "cams" / lost.name)[1]).max() < 1e-4


def test_without_masks_the_table_says_so_and_pictures_are_drawn(done):
    said = done[2]["unscored"]
    assert "has no SegmentationClass" in said and "no masks" in said and f"drawn -> {done[1] / 'labels.png'}" in said


def test_anybodys_masks_and_class_maps_are_scored_alike(done, tmp_path):
    toy, out, _ = done
    rows = {r["stage"]: r for r in json.loads((out / "results.json").read_text())["rows"]}
    said = run("data.py", "eval", "--data", toy, "--masks", out / "pseudo_labels", "--seeds", out / "cams", *SMALL)
    assert f"{rows['pseudo labels']['miou']:.2f}" in said and f"{rows['refined seeds']['miou']:.2f}" in said
    run("data.py", "export", "--out", out, "--to", tmp_path / "npy")  # the data set is that of the run
    said = run("data.py", "eval", "--data", toy, "--seeds", tmp_path / "npy", *SMALL)
    assert f"{rows['refined seeds']['miou']:.2f}" in said
    id = data.DataSet(toy).ids("train")[0]
    shutil.rmtree(tmp_path / "npy" / id)
    assert f"no class maps of {id}" in refused("data.py", "eval", "--data", toy, "--seeds", tmp_path / "npy")
    np.save(tmp_path / "npy" / f"{id}.npy", {0: np.zeros((2, 2))})
    assert "is a pickle" in refused("data.py", "eval", "--data", toy, "--seeds", tmp_path / "npy")


def test_the_segmenter_trains_on_anybodys_masks(done, tmp_path):
    toy, out, _ = done
    run("segment.py", "train", "--data", toy, "--out", tmp_path / "out", *SMALL, *SEGMENTER, "--labels", out / "pseudo_labels")
    both = [torch.load(o / "segmenter.pth", weights_only=True)["model"]["cls_conv.weight"] for o in (out, tmp_path / "out")]
    assert torch.equal(*both)
    lacks = refused("segment.py", "train", "--data", toy, "--out", tmp_path / "new", *SEGMENTER, "--labels", tmp_path)
    assert "lacks 24 of 24" in lacks
    shutil.copytree(out / "pseudo_labels", tmp_path / "foreign")
    id = data.DataSet(toy).ids("train")[0]
    data.write_mask(tmp_path / "foreign" / f"{id}.png", np.full((9, 9), 77))
    flags = ("--data", toy, "--out", tmp_path / "new", *SMALL, *SEGMENTER, "--labels", tmp_path / "foreign")
    assert f"{id}.png has value 77, but there are 6 classes" in refused("segment.py", "train", *flags)


def test_any_photos_are_segmented_each_with_an_overlay(done, tmp_path):
    toy, out, _ = done
    id = data.DataSet(toy).ids("train")[0]
    (tmp_path / "in/deep").mkdir(parents=True)
    data.read_image(toy / "JPEGImages" / f"{id}.jpg").save(tmp_path / "in/deep/photo.PNG")
    shutil.copy(toy / "JPEGImages" / f"{id}.jpg", tmp_path / "one.jpg")
    run("segment.py", "predict", tmp_path / "in", tmp_path / "one.jpg", "--out", out, *SMALL)
    for name in ("deep/photo", "one"):
        mask = data.read_mask(out / "predictions" / f"{name}.png")
        assert mask.shape[::-1] == data.read_image(out / "predictions" / f"{name}_overlay.png").size
    run("segment.py", "predict", "--data", toy, "--out", out, *SMALL, "--ids", id)
    assert (data.read_mask(out / "segmentation" / f"{id}.png") == data.read_mask(out / "predictions/one.png")).all()
    assert "no photo and no folder" in refused("segment.py", "predict", tmp_path / "absent.jpg", "--out", out)
    first = (out / "predictions/deep/photo.png").read_bytes()
    run("segment.py", "predict", tmp_path / "in", "--out", out, "--device", "cpu")  # preset, and so scales, are those of the run
    assert (out / "predictions/deep/photo.png").read_bytes() == first


def test_the_submission_is_complete_and_of_the_photos_sizes(done, tmp_path):
    toy, out, _ = done
    ids = data.DataSet(toy).ids("val")
    flags = ("--data", toy, "--out", out, *SMALL, "--no-crf")
    assert "no test.txt" in refused("segment.py", "submit", "--data", toy, "--out", out)
    run("segment.py", "submit", *flags, "--split", "val")
    with tarfile.open(out / "results.tar.gz") as tar:
        assert sorted(tar.getnames()) == sorted(f"results/VOC2012/Segmentation/comp6_test_cls/{id}.png" for id in ids)
        for member, id in zip(sorted(tar.getmembers(), key=lambda m: m.name), sorted(ids)):
            mask = Image.open(tar.extractfile(member))
            assert mask.mode == "P" and mask.size == data.read_image(toy / "JPEGImages" / f"{id}.jpg").size


def test_a_second_call_does_nothing_again(done):
    toy, out, _ = done
    where = ("--data", toy, "--out", out, *SMALL)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for script, command, flags in (("bnr.py", "train", CLASSIFIER), ("bnr.py", "cams", ()), ("psa.py", "labels", ()),
                                   ("psa.py", "train", AFFINITY), ("psa.py", "walk", ()), ("segment.py", "train", SEGMENTER),
                                   ("segment.py", "predict", ())):
        assert "done already" in run(script, command, *where, *flags)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_one_lost_file_is_made_again_and_no_other(done):
    toy, out, _ = done
    lost, kept = sorted((out / "pseudo_labels").iterdir())[:2]
    content, time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    said = run("data.py", "eval", "--data", toy, "--out", out, "--workers", 0, status=1)
    assert f"no prediction {lost}" in said
    run("psa.py", "walk", "--data", toy, "--out", out, *SMALL)
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == time


@pytest.mark.parametrize("step", [0, 3])
def test_training_resumed_between_epochs_equals_one_that_never_stopped(done, tmp_path, monkeypatch, step):
    toy, out, _ = done
    first, write = tmp_path / "classifier.pth", data.write
    flags = ("--data", toy, "--out", tmp_path, *SMALL, *CLASSIFIER)

    def stop(path, save):
        write(path, save)
        if path == first and torch.load(first, weights_only=True)["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "write", stop)
    run("bnr.py", "train", *flags, status=130)
    monkeypatch.undo()
    assert torch.load(first, weights_only=True)["step"] == step
    run("bnr.py", "train", *flags)
    resumed, whole = (torch.load(p, weights_only=True)["model"] for p in (first, out / "classifier.pth"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("make, blocks", [
    (lambda: Conformer("nano", 3), lambda net: net.stages()), (lambda: psa.ResNet38(2), lambda net: net.children()),
    (lambda: psa.ResNetStages("resnet50"), lambda net: net.children())])
def test_recomputed_activations_change_neither_gradients_nor_statistics(make, blocks):
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        net = make().train()
        if again:
            data.recompute(blocks(net))
        torch.manual_seed(1)  # dropout and drop path
        net(torch.randn(2, 3, 32, 32))[0].square().mean().backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        found.append({**grads, **{name: b for name, b in net.named_buffers() if "running" in name}})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], msg=name)


class Tensors(torch.utils.data.TensorDataset):
    """Takes the loader's (index, seed)."""

    def __getitem__(self, index):
        return super().__getitem__(index[0])


def test_micro_batches_have_the_gradient_of_the_batch(tmp_path):
    torch.manual_seed(0)
    photos, labels = torch.randn(15, 4), torch.rand(15, 3).round()
    weights = []
    for micro in (0, 2, 5, 7):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 3)
        args = argparse.Namespace(out=tmp_path / str(micro), device=torch.device("cpu"), amp=False, seed=0, micro_batch=micro, batch_size=5)
        stage = argparse.Namespace(args=args, name="net", record={"id": "0", "settings": {}}, save=lambda: None)
        data.fit(stage, net, torch.optim.SGD(net.parameters(), 0.5), Tensors(photos, labels), steps=6, loss_of=lambda part, batch:
                 bnr.soft_margin_loss(net(part[0]), part[1]) * len(part[0]) / len(batch[0]))
        weights.append(net.weight.detach())
    for parts in weights[1:]:
        torch.testing.assert_close(parts, weights[0])


def test_networks_train_in_micro_batches_and_recompute(done, tmp_path):
    toy, out, _ = done
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    for script, flags in (("bnr.py", CLASSIFIER), ("segment.py", (*SEGMENTER, "--labels", out / "pseudo_labels")), ("psa.py", AFFINITY)):
        more = ("--micro-batch", 3, "--recompute")
        assert "micro_batch=3" in run(script, "train", "--data", toy, "--out", tmp_path, *SMALL, *flags, *more)
    for name in ("classifier", "segmenter", "affinitynet"):
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["done"] and 0.1 < record["peak_gb"] < 100


def test_a_run_begun_without_a_loss_scale_goes_on_with_one(tmp_path, monkeypatch):
    def fit(epochs):
        net = torch.nn.Linear(4, 3)
        args = argparse.Namespace(out=tmp_path, device=torch.device("cpu"), amp=epochs == 2, seed=0, micro_batch=0, batch_size=5)
        stage = argparse.Namespace(args=args, name="net", record={"id": "0", "settings": {}}, save=lambda: None)
        data.fit(stage, net, torch.optim.SGD(net.parameters(), 0.5), Tensors(torch.randn(10, 4)), lambda part, batch: net(part[0]).square().mean(), 2 * epochs)
        return data.read_weights(tmp_path / "net.pth", quiet=True)

    assert not fit(1)["scaler"]
    monkeypatch.setattr(data, "amp_dtype", lambda device: torch.float16)
    resumed = fit(2)
    assert resumed["step"] == 4 and resumed["scaler"]["scale"] > 1


def test_a_full_card_is_told_in_one_line(monkeypatch):
    def show(args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    monkeypatch.setattr(bnr, "show", show)
    assert re.fullmatch(r"device: .*\nerror: the card has too little memory.*--micro-batch.*\n", run("bnr.py", "show", "--device", "cpu", status=1))


def test_a_long_stage_says_what_it_will_take(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data.Bar, "AFTER", -1)
    (tmp_path / "one").write_bytes(bytes(5_000_000))
    with data.Bar(total=1000, desc="cams", writes=tmp_path) as bar:
        for _ in range(3):
            bar.update()
    said = capsys.readouterr()
    assert len(re.findall(r"cams: estimate: \d+\.\d\d h to go, \d+\.\d GB of memory, 5\.00 GB of disk", said.out + said.err)) == 1
    with data.Bar(total=2, desc="score") as bar:  # writes nothing
        bar.update(), bar.update()
    said = capsys.readouterr()
    assert "score: estimate: " in said.out + said.err and "disk" not in said.out + said.err


def test_show_draws_a_row_of_six_panels(done):
    toy, out, _ = done
    id = data.DataSet(toy).ids("train")[0]
    run("segment.py", "predict", "--data", toy, "--out", out, *SMALL, "--ids", id)
    run("bnr.py", "show", "--data", toy, "--out", out, *SMALL, "--ids", id, "--height", 60)
    width, height = Image.open(out / "show.png").size
    photo = data.read_image(toy / "JPEGImages" / f"{id}.jpg").size
    assert height == 60 + 8 and width == 6 * (round(60 * photo[0] / photo[1]) + 4) + 4


def test_a_partial_file_needs_partial_and_fresh_blocks_start_sharp(done, tmp_path):
    toy, out, _ = done
    state = torch.load(out / "classifier.pth", weights_only=True)["model"]
    torch.save({k: v for k, v in state.items() if "trans" not in k or "cnn_block" in k}, tmp_path / "conv.pth")
    flags = ("train", "--data", toy, "--out", tmp_path / "out", *CLASSIFIER, "--epochs", 1, "--pretrained", tmp_path / "conv.pth")
    assert "--partial takes" in refused("bnr.py", *flags)
    said = run("bnr.py", *flags, *SMALL, "--partial")
    assert "fresh: " in said and "trans_1" in said and "conv_1 " not in said


def write_run(folder, miou, noise="1", epochs=1):
    """A run of `make results` as `data.py eval` leaves it."""
    rows = [{"stage": "classifier", "split": "val", "map": 0.5, "entropy": 0.25}, {"stage": "background", "split": "train", "miou": 9.0},
            {"stage": "refined seeds", "split": "train", "miou": miou, "curve": [miou - 1] * 60}]
    settings = {"classifier": {"noise": noise, "epochs": epochs, "data": f"{folder}/voc6"}}
    data.write_json(folder / "results.json", {"rows": rows, "settings": settings, "seconds": {"cams": 1800}, "devices": ["card"]})


def test_report_gives_mean_and_deviation_and_names_what_is_missing(tmp_path):
    for row, seed, miou in (("transcam", 0, 50.0), ("transcam", 2, 60.0), ("transcam", 10, 99.0), ("noise-x1", 0, 70.0)):
        write_run(tmp_path / f"rows/{row}-seed{seed}", miou, noise=row)
    write_run(tmp_path / "rows/untrained-seed0", 1.0, epochs=0)
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- rows of toy -->\n<!-- end of toy -->\nbelow\n")
    flags = ("report", "--data", tmp_path / "toy", "--out", tmp_path, "--readme", readme, "--rows", "transcam", "noise-x2")
    for _ in range(2):  # again into its own tables
        said = run("data.py", *flags)
        table = said[said.index("| row"):]
        assert readme.read_text() == f"above\n<!-- rows of toy -->\n{table}<!-- end of toy -->\nbelow\n"
    assert "| transcam | 0, 2 (1 not run) | 50.00 ± 0.00 (50.00, 50.00) | 0.250 ± 0.000 (0.250, 0.250) | not run | 55.00 ± 7.07 (50.00, 60.00) " in said
    assert "| noise-x1 | 0 (1, 2 not run) | 50.00 | 0.250 | not run | 70.00 | not run | not run | 0.50 |" in said
    assert "| noise-x2 |  (0, 1, 2 not run) | not run |" in said and "| background | | | | | 9.00 | | | |" in said
    assert "| transcam | 54.00 | 54.00 |" in said and "On card. " in said and "`classifier` epochs=1." in said
    assert said.index("| noise-x2") < said.index("| noise-x1") < said.index("| untrained")
    write_run(tmp_path / "rows/noise-x1-seed1", 70.0, epochs=2)
    assert "--epochs 2" in run("data.py", *flags, status=1) and table in readme.read_text()  # runs of unlike settings are no table
    assert "make results" in run("data.py", "report", "--data", tmp_path, "--out", tmp_path / "none", status=1)


def test_make_results_runs_rows_and_seeds_that_are_missing(toy, tmp_path):
    write_run(tmp_path / "rows/transcam-seed0", 50.0)
    done = subprocess.run(["make", "-n", "results", f"DATA={toy}", f"OUT={tmp_path}", "SEEDS=0 1", "ROWS=transcam noise-x2", "FURTHER=transcam",
                           f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(sys.executable)]
    trained = [line for line in lines if "bnr.py train" in line]
    assert [line.split("/rows/")[1].split()[0] for line in trained] == ["noise-x2-seed0", "transcam-seed1", "noise-x2-seed1", "untrained-seed0"]
    assert "--noise 2" in trained[0] and "--seed 1" in trained[1] and "--loss transcam" in trained[1] and "--epochs 0" in trained[3]
    assert sum("segment.py train" in line for line in lines) == 1 and "data.py report" in lines[-1]
    wrong = subprocess.run(["make", "-n", "results", f"OUT={tmp_path}", "ROWS=noise-x4"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "no row noise-x4" in wrong.stderr


# ---------------------------------------------------------------- errors: one line, status 1

def refused(script, *flags):
    said = run(script, *flags, *SMALL, status=1)
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.parametrize("script, command, needs", [
    ("bnr.py", "cams", 'no classifier in .*: run "make train"'), ("psa.py", "labels", 'no seeds in .*: run "make cams"'),
    ("psa.py", "train", 'no affinity labels in .*: run "make psa"'), ("psa.py", "walk", 'no seeds in .*: run "make cams"'),
    ("segment.py", "train", 'no pseudo labels in .*: run "make psa"'), ("segment.py", "predict", 'no segmenter in .*: run "make seg"'),
    ("bnr.py", "show", 'no seeds in .*: run "make cams"'), ("data.py", "eval", 'nothing to score in .*: run "make train"')])
def test_a_missing_stage_is_named_with_its_command(toy, tmp_path, script, command, needs):
    assert re.search(needs, refused(script, command, "--data", toy, "--out", tmp_path))


def test_missing_weights_are_named_unless_from_scratch(toy, tmp_path):
    where = ("--data", toy, "--out", tmp_path)
    assert "Conformer_nano_patch16.pth" in refused("bnr.py", "train", *where, "--no-from-scratch")
    assert "no weight file" in refused("bnr.py", "train", *where, "--pretrained", tmp_path / "x.pth")


def test_bad_data_is_named(toy, tmp_path):
    assert "JPEGImages" in refused("bnr.py", "train", "--data", tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(toy, copy)
    where = ("--data", copy, "--out", tmp_path / "out")
    assert "fewer than a batch of 99" in refused("bnr.py", "train", *where, "--batch-size", 99)
    assert "no multiple of 16" in refused("bnr.py", "train", *where, "--crop", 100)
    (copy / "JPEGImages/toy_0003.jpg").unlink()
    assert "JPEGImages lacks 1 of 24 images, first toy_0003.jpg" in refused("bnr.py", "train", *where)
    (copy / "ImageSets/Segmentation/train_aug.txt").write_text("toy_0000\ntoy_0000\n")
    assert "twice, first toy_0000" in refused("bnr.py", "train", *where)
    (copy / "ImageSets/Segmentation/train_aug.txt").unlink()
    assert "has no train_aug.txt" in refused("bnr.py", "train", *where)
    assert not (tmp_path / "out").exists()


def test_an_unknown_label_is_named(toy, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(toy, copy)
    (copy / "labels.txt").write_text("toy_0000 unicorn\n")
    assert 'the label "unicorn" of toy_0000' in refused("bnr.py", "train", "--data", copy, "--out", tmp_path)
    (copy / "labels.txt").unlink()
    assert "no image labels of toy_0000" in refused("bnr.py", "train", "--data", copy, "--out", tmp_path)


def test_errors_are_one_line_of_a_process(tmp_path):
    said = run_process("bnr.py", "train", "--data", tmp_path, status=1)
    assert said.splitlines()[-1].startswith("error: ") and "Traceback" not in said


def test_a_wrong_flag_has_status_2(toy):
    run("bnr.py", "train", "--data", toy, "--loss", "mse", status=2)


def test_an_unknown_device_or_number_of_images_is_an_error(toy, tmp_path):
    assert "neither cuda" in run("data.py", "eval", "--data", toy, "--out", tmp_path, "--device", "mps", status=1)
    assert "--micro-batch -1" in refused("bnr.py", "train", "--data", toy, "--out", tmp_path, *CLASSIFIER, "--micro-batch", -1)
    (tmp_path / "empty").mkdir()
    assert "no photos in" in refused("segment.py", "predict", tmp_path / "empty", "--out", tmp_path)


def test_a_gpu_that_is_not_there_is_an_error(toy):
    if not torch.cuda.is_available():
        assert "finds no usable GPU" in run("bnr.py", "train", "--data", toy, "--device", "cuda", status=1)


def test_toy_is_not_drawn_over_other_data(tmp_path):
    (tmp_path / "mine.jpg").touch()
    assert "not drawing over it" in run("data.py", "toy", "--root", tmp_path, status=1)
